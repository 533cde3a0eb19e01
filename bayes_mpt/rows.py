"""What comes in: a table, and the second argument of a program, as tensors; and what is refused of them."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayes_mpt.moments import Table
from bayes_mpt.tracing import Model, takes_visible

__all__ = [
    "arguments",
    "as_tensor",
    "digest",
    "grow_table",
    "needs_y",
    "refuse_constant",
    "refuse_empty",
    "refuse_missing",
    "refuse_unobserved",
    "takes_y",
]


def as_tensor(X: NDArray[np.floating], model: Model, device: str) -> Tensor:
    """Rows in the model's precision."""
    wanted = getattr(model, "dtype", None)
    single = isinstance(wanted, torch.dtype) and wanted == torch.float32
    array = np.asarray(X, dtype=np.float32 if single else np.float64)
    # torch has no read-only tensors; nothing here writes into its rows
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(device)


def arguments(model: Model, X: NDArray[np.floating], y: Any, device: str) -> tuple[Any, ...]:
    """What the program is called with: rows, and y where it takes it."""
    x = as_tensor(X, model, device)
    if not takes_y(model):
        return (x,)
    if y is None:
        if needs_y(model):
            raise ValueError(f"the program {model!r} takes a second argument: pass y")
        return (x,)
    y = np.asarray(y)
    if len(y) != len(X):
        raise ValueError(f"y must have a row for each of the {len(X)} rows of X, got {len(y)}")
    if y.dtype.kind == "f" and np.isinf(y).any():
        raise ValueError("y contains infinity")
    y = torch.as_tensor(y if y.flags.writeable else y.copy()).to(device)
    return x, y.double() if y.is_floating_point() else y


def takes_y(model: Model) -> bool:
    """Whether the program has a second positional argument besides `visible`."""
    if takes_visible(model):
        return False
    target = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        kinds = [p.kind for p in inspect.signature(target).parameters.values()]
    except (TypeError, ValueError):
        return True
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(kind in positional for kind in kinds) > 1 or inspect.Parameter.VAR_POSITIONAL in kinds


def needs_y(model: Model) -> bool:
    """Whether the program's second argument, which it has, has no default."""
    target = model.forward if isinstance(model, torch.nn.Module) else model
    parameters = list(inspect.signature(target).parameters.values())
    return len(parameters) > 1 and parameters[1].default is inspect.Parameter.empty


def grow_table(X: NDArray[np.floating], seen: Table | None, device: str, names: NDArray[Any]) -> Table:
    """The moments of these rows and of those seen before; ``names`` (T,) are of the columns, for errors."""
    table = Table(X, device)
    if seen is not None:
        table.update(seen)
    if not table.n:
        refuse_unobserved(table.incomplete.isnan().all(0).cpu().numpy(), names)
    broken = (~torch.isfinite(table.cov.diagonal())).nonzero()[:, 0].tolist()
    if broken:
        raise ValueError(f"the squares of column {names[broken[0]]} overflow: rescale it")
    return table


def refuse_unobserved(columns: NDArray[np.bool_], names: NDArray[Any]) -> None:
    """Columns (T,) of which no cell was seen."""
    if columns.any():
        which = ", ".join(str(names[i]) for i in columns.nonzero()[0])
        raise ValueError(f"column {which} has no observed cell: nothing can be learned about it. Drop it")


def refuse_missing(X: NDArray[np.floating], names: NDArray[Any]) -> None:
    """Inputs of which every observation's distribution depends on all."""
    columns = np.isnan(X).any(0).nonzero()[0]
    if len(columns):
        raise ValueError(
            f"column {', '.join(str(names[c]) for c in columns)} of X has missing cells, on which "
            "the covariance of the observations depends: fill them or drop these rows. Only y may be missing"
        )


def refuse_constant(table: Table) -> None:
    """Rows that are all equal."""
    if table.complete and not bool((table.cov.diagonal() > 0).any()):
        raise ValueError(
            f"all {table.n_rows} rows are equal: every column is constant, so the likelihood has no maximum"
        )


def refuse_empty(y: NDArray[Any], *, estimated: bool) -> None:
    """Observations of one Gaussian vector from which nothing can be learnt; ``estimated``: parameters are."""
    seen = y[~np.isnan(y)] if y.dtype.kind == "f" else y
    if not seen.size:
        raise ValueError("y has no observed value: nothing can be learned about it")
    if estimated and bool((seen == seen.flat[0]).all()):
        raise ValueError(
            f"all {seen.size} observed values of y are {seen.flat[0]}: the likelihood grows without bound as the "
            "variance goes to zero. Leave out what is constant, or fix all hyper-parameters"
        )


def digest(X: NDArray[np.floating]) -> str:
    """A fingerprint of rows, features and scaling: bits of blocks of rows, summed and xored, then hashed."""
    h = hashlib.sha256(repr(X.shape).encode())
    step = max(1, 2**17 // max(1, X.shape[1]))
    for start in range(0, len(X), step):
        bits = np.ascontiguousarray(X[start : start + step], dtype=np.float64).view(np.uint64)
        h.update(np.bitwise_xor.reduce(bits, axis=0).tobytes())
        h.update(np.add.reduce(bits, axis=0, dtype=np.uint64).tobytes())
    return h.hexdigest()[:16]
