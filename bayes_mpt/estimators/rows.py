"""What comes in: a table, and the second argument of a program, as tensors; and what is refused of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils import check_array
from sklearn.utils.validation import validate_data
from torch import Tensor

from bayes_mpt.inputs import read_numbers, read_table, tensor_of
from bayes_mpt.program.offers import name_of, offered
from bayes_mpt.program.program import Model, ModelError, list_names
from bayes_mpt.program.run import signature_of, takes_visible
from bayes_mpt.program.statistics import SufficientStatistics, digest_of_rows, known_of
from bayes_mpt.warnings import PrecisionWarning, warn

__all__ = [
    "arguments",
    "as_fitted",
    "as_tensor",
    "check_program",
    "checked_rows",
    "data_digest",
    "dtype_of",
    "needs_y",
    "refuse_constant",
    "refuse_empty",
    "refuse_far",
    "refuse_missing",
    "refuse_one_row",
    "refuse_unobserved",
    "rows_of",
    "takes_y",
    "update_statistics",
    "warn_of_far",
]

LEAST_SPREAD = 1e-150  # of a column that is not constant: the squares of smaller numbers have few digits


def as_tensor(
    X: NDArray[np.floating], model: Model, device: str, shift: NDArray[np.float64] | None = None
) -> Tensor:
    """Rows in the model's precision, less the shift (T,)."""
    wanted = offered(model, "dtype")
    single = isinstance(wanted, torch.dtype) and wanted == torch.float32
    if shift is not None:
        X = np.asarray(X, dtype=np.float64) - shift
    array = np.asarray(X, dtype=np.float32 if single else np.float64)
    return tensor_of(array).to(device)


def arguments(
    model: Model, X: NDArray[np.floating], y: Any, device: str, shift: NDArray[np.float64] | None = None
) -> tuple[Any, ...]:
    """What the program is called with: rows, less the shift, and y where it takes it."""
    x = as_tensor(X, model, device, shift)
    if not takes_y(model):
        return (x,)
    if y is None:
        if needs_y(model):
            raise ValueError(f"the program {name_of(model)} takes a second argument: pass y")
        return (x,)
    y = read_numbers(y, len(X))
    y = tensor_of(y).to(device)
    return x, y.double() if y.is_floating_point() else y


def data_digest(X: Any) -> str:
    """Fingerprint of a table, to tell whether a model was fitted on it (``BayesMPT.data_digest_``).

    Examples
    --------
    >>> data_digest([[1.0, 2.0], [3.0, 4.0]]) == data_digest(np.array([[1.0, 2.0], [3.0, 4.0]]))
    True
    """
    rows = check_array(read_table(X), dtype=[np.float64, np.float32], ensure_all_finite="allow-nan")
    return digest_of_rows(rows)


def rows_of(a: Any, index: NDArray[Any]) -> Any:
    """Some rows of a table; None of none."""
    if a is None:
        return None
    return a.iloc[index] if hasattr(a, "iloc") else np.asarray(a)[index]


def dtype_of(X: Any) -> Any:
    """In which what is computed of a table is given back."""
    # a DataFrame has several
    dtypes = set(X.dtypes) if hasattr(X, "dtypes") else {getattr(X, "dtype", None)}
    return np.float32 if dtypes == {np.dtype(np.float32)} else np.float64


def as_fitted(estimator: Any, X: Any) -> bool:
    """Whether rows are an array in which scikit-learn's checks of a fitted estimator, long ones, find nothing."""
    return (
        type(X) is np.ndarray
        and X.dtype in (np.float64, np.float32)
        and X.ndim == 2
        and len(X) > 0
        and X.shape[1] == getattr(estimator, "n_features_in_", None)
        and not hasattr(estimator, "feature_names_in_")
    )


def checked_rows(estimator: Any, X: Any, *, reset: bool) -> NDArray[np.floating]:
    """A table as floating-point numbers; ``reset``: it is fitted, and says how many columns there are and their names.

    Raises
    ------
    ValueError
        If it is no table, or not one that the model observes.
    """
    X = read_table(X)
    if not reset and as_fitted(estimator, X):
        found = np.asarray(X)
    else:
        kinds = [np.float64, np.float32]
        found = validate_data(estimator, X, reset=reset, dtype=kinds, ensure_all_finite="allow-nan")
    check = offered(estimator.model, "check_rows")
    if check is not None:
        check(found, getattr(estimator, "feature_names_in_", range(found.shape[1])))
    return found


def check_program(program: Any, *, with_y: bool, name: str = "model", n_inputs: int = 1) -> None:
    """Refuse a program (or guide) that cannot be called, before anything runs; its hyper-parameters check themselves.

    Raises
    ------
    TypeError
        If it is a class.
    ModelError
        If it does not take the arguments that it is called with.
    """
    if isinstance(program, type):
        raise TypeError(
            f"{name} must be a program, got the class {program.__name__}: write {program.__name__}(...)"
        )
    if isinstance(program, BaseEstimator) and hasattr(program, "_parameter_constraints"):
        program._validate_params()
    said = name_of(program).partition("(")[0]
    try:
        signature = signature_of(program)
    except (TypeError, ValueError):
        return  # it does not say
    if name == "model" and n_inputs == 1 and not with_y and takes_y(program) and needs_y(program):
        raise ValueError(
            f"the program {said} takes a second argument: pass y, fit(X, y), or two tables, fit((x1, x2))"
        )
    args = ["x"] if n_inputs == 1 else [f"x{i + 1}" for i in range(n_inputs)]
    args += ["y"] * with_y
    visible = {"visible": None} if takes_visible(program) else {}
    try:
        signature.bind(*args, **visible)
    except TypeError as error:
        call = ", ".join([*args, *visible])
        kinds = [p.kind for p in signature.parameters.values()]
        if not kinds:
            raise ModelError(
                f"{name} {said}() takes no argument: its data stand in a closure, where no cell of them can be hidden. "
                f"Write def {said}({call}) with obs={args[-1]}, and pass the data to fit"
            ) from None
        several = sum(p.default is p.empty for p in signature.parameters.values()) - with_y
        tables = ", ".join(f"x{i + 1}" for i in range(several))
        other = (
            f", or pass its inputs as tables, fit(({tables}), y)"
            if several > n_inputs == 1 and with_y
            else ""
        )
        raise ModelError(
            f"{name} {said}{signature} is called as {said}({call}), which it does not take ({error}): write "
            f"def {said}({call}){other}, and give it other arguments by functools.partial"
        ) from None


def takes_y(model: Model) -> bool:
    """Whether the program has a second positional argument besides `visible`."""
    if takes_visible(model):
        return False
    try:
        kinds = [p.kind for p in signature_of(model).parameters.values()]
    except (TypeError, ValueError):
        return True
    one, either = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return kinds.count(one) + kinds.count(either) > 1 or inspect.Parameter.VAR_POSITIONAL in kinds


def needs_y(model: Model) -> bool:
    """Whether the program's second argument, which it has, has no default."""
    parameters = list(signature_of(model).parameters.values())
    return len(parameters) > 1 and parameters[1].default is inspect.Parameter.empty


def update_statistics(
    X: NDArray[np.floating],
    seen: SufficientStatistics | None,
    device: str,
    names: NDArray[Any],
    shift: NDArray[np.float64] | None = None,
) -> SufficientStatistics:
    """The moments of these rows, less the shift, and of those seen before; ``names`` (T,) of columns, for errors."""
    known: dict[Any, SufficientStatistics] = {}
    what = "moments", device, tuple(names)
    if seen is None and shift is None:  # which nobody adds to
        known = known_of(X)
    if what in known:
        return known[what]
    statistics = SufficientStatistics(X, device, shift)
    if seen is not None:
        statistics.update(seen)
    if not statistics.n:
        refuse_unobserved(statistics.incomplete.isnan().all(0).cpu().numpy(), names)
    broken = (~torch.isfinite(statistics.variance)).nonzero()[:, 0].tolist()
    if broken:
        raise ValueError(f"the squares of column {names[broken[0]]} overflow: rescale it")
    # without complete rows the variances are zero; of a constant they are too
    for column in (statistics.variance < LEAST_SPREAD**2).nonzero()[:, 0].tolist():
        cells = X[:, column][~np.isnan(X[:, column])]
        if len(cells) and 0 < cells.max() - cells.min() < LEAST_SPREAD:
            raise ValueError(f"the squares of column {names[column]} underflow: rescale it")
    known[what] = statistics
    return statistics


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


def _far_cell(
    rows: NDArray[np.floating], lost: NDArray[np.bool_], names: Iterable[Any], dtype: Any = np.float64
) -> str:
    """A cell that is as good as infinite, of the rows (N, T) of which an answer is ``lost`` (N,); else nothing.

    Squares in units of a noise overflow, of cells far below the root of the largest number.
    """
    if not lost.any():
        return ""
    far = (np.abs(rows) > float(np.finfo(dtype).max) ** 0.25) & lost[:, None]
    if not far.any():
        return ""
    row, column = np.argwhere(far)[0].tolist()
    return f"row {row} holds {rows[row, column]:g} in column {list(names)[column]}"


def refuse_far(
    found: NDArray[np.floating], rows: NDArray[np.floating], names: Iterable[Any], dtype: Any = np.float64
) -> None:
    """Answers (N, ...) that are NaN because a cell of the row is as good as infinite."""
    cell = _far_cell(rows, np.isnan(found).reshape(len(rows), -1).any(1), names, dtype)
    if cell:
        raise ValueError(
            f"{cell}, whose square no float holds: nothing can be said of this row. Look for an error of its unit, or "
            "give the cell as NaN, which is missing"
        )


def warn_of_far(
    nats: NDArray[np.floating], rows: NDArray[np.floating], names: Iterable[Any], dtype: Any = np.float64
) -> None:
    """Scores (N,) that are -inf for the same reason; refuse those that are NaN."""
    refuse_far(nats, rows, names, dtype)
    cell = _far_cell(rows, nats == -np.inf, names, dtype)
    if cell:
        warn(f"{cell}: the log-density of this row is less than a float holds, -inf", PrecisionWarning)


def refuse_one_row(n_rows: int, parameters: Sequence[str]) -> None:
    """One row says nothing of how rows differ; it can be scored where no parameter is estimated from it."""
    if n_rows == 1 and parameters:
        raise ValueError(
            f"X has 1 sample while a minimum of 2 is required to estimate {list_names(parameters)}. One row is enough "
            "where the program has no parameters, so that all is integrated"
        )


def refuse_constant(statistics: SufficientStatistics) -> None:
    """Rows that are all equal."""
    if statistics.complete and not bool((statistics.variance > 0).any()):
        raise ValueError(
            f"all {statistics.n_rows} rows are equal: every column is constant, so the likelihood has no maximum"
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
