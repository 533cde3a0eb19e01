"""A program behind a call that it takes: in the precision of its network, with whole numbers, with several inputs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from copy import copy, deepcopy
from math import isfinite
from typing import Any

import torch
from numpy.typing import NDArray
from sklearn.exceptions import DataConversionWarning
from torch import Tensor

from bayes_mpt.estimators.rows import arguments
from bayes_mpt.program.offers import Around, offered
from bayes_mpt.program.own_factors import Cells, FactorTokens, find_cells
from bayes_mpt.program.program import ColumnObserved, HasFactors, Model, ModelError, SubSampled, list_names
from bayes_mpt.program.run import signature_of
from bayes_mpt.program.whole_plates import whole_plates
from bayes_mpt.warnings import warn

__all__ = ["CURABLE", "Adapted", "adapted_to"]

CURABLE = (ModelError, IndexError, TypeError, RuntimeError)
"""Some of them, of programs that are to be called in another way, or that torch refuses in words of its own."""


class Adapted(Around):
    """A program as the estimator calls it, ``model(x)`` or ``model(x, y)``.

    Parameters
    ----------
    model : callable
        The program as it is written.
    dtype : torch.dtype, optional
        Of its rows, where it has a network in single precision.
    kind : torch.dtype, optional
        To which its rows are turned: whole numbers, which it takes as indices, or booleans.
    column : bool, default=False
        Its second argument is a table of one column (N, 1), and it takes (N,).
    factors : dict of name to Cells, optional
        What it says by `pyro.factor` is believed to be the log-density of these cells.
    widths : tuple of int, optional
        It takes several tables of so many columns in place of one.

    Examples
    --------
    >>> def program(x1, x2, y):
    ...     return x1.shape, x2.shape
    >>> Adapted(program, widths=(1, 2))(torch.zeros(5, 3), torch.zeros(5))
    (torch.Size([5, 1]), torch.Size([5, 2]))
    """

    def __init__(
        self,
        model: Model,
        dtype: torch.dtype | None = None,
        kind: torch.dtype | None = None,
        column: bool = False,
        widths: tuple[int, ...] | None = None,
        factors: dict[str, Cells] | None = None,
    ):
        self.factors = factors or {}
        self.all_rows = False
        """Its sub-sampling plates take all rows."""
        self.model, self.kind, self.column, self.widths = model, kind, column, widths
        if dtype is not None:
            self.dtype = dtype
        if widths is None:
            self.__wrapped__ = model
        else:
            named = inspect.Parameter.POSITIONAL_OR_KEYWORD
            names = ["x", "y"] if _n_required(model) > len(widths) else ["x"]
            self.__signature__ = inspect.Signature([inspect.Parameter(n, named) for n in names])

    def __call__(self, x: Tensor, *others: Any) -> Any:
        """Run it."""
        # NaN, where a cell is missing, is neither a whole number nor a boolean: such a program wants complete rows
        x = x if self.kind is None else x.to(self.kind)
        if self.column and others and others[0].ndim == 2:
            others = (others[0][:, 0], *others[1:])
        tables = (x,) if self.widths is None else x.split(list(self.widths), 1)
        with whole_plates() if self.all_rows else nullcontext(), FactorTokens(self.factors, (x, *others)):
            return self.model(*tables, *others)

    @property
    def believed(self) -> str | None:
        """What no sum or integral has checked, and bounds that the program does not state, in words."""
        unchecked = [name for name, cells in self.factors.items() if not cells.checked]
        said = [f"not checked: factor {list_names(map(repr, unchecked))}"] if unchecked else []
        for name, cells in self.factors.items():
            ends = [
                f"{side} {b:.4g}"
                for side, b in zip(("above", "below"), cells.bounds, strict=True)
                if isfinite(b)
            ]
            if ends:
                said.append(f"{name!r} adds up to one over values {' and '.join(ends)}")
        return "; ".join(said) or None


def adapted_to(
    error: Exception,
    model: Model,
    adapted: Adapted | None,
    X: NDArray[Any],
    y: NDArray[Any] | None,
    device: str,
) -> Adapted:
    """A program as it is to be called, after a fit to X, y has raised this; called where it is caught.

    ``adapted`` is what was fitted, None where it was the model as it is written.

    Raises
    ------
    ModelError
        Where the program is to be changed; the error itself, where nothing is known to help.
    """
    is_network = adapted is None and isinstance(model, torch.nn.Module)
    adapted = Adapted(model) if adapted is None else copy(adapted)
    match error:
        case SubSampled() if not (adapted.all_rows or isinstance(adapted.model, torch.nn.Module)):
            adapted.all_rows = True
        case HasFactors() if not adapted.factors:
            if isinstance(adapted.model, torch.nn.Module):
                adapted.model = deepcopy(adapted.model).double()
            adapted.factors = find_cells(adapted, arguments(adapted, X, y, device))
        case SubSampled() | HasFactors():
            raise error
        case ModelError() if _in_single_precision(error) and not is_network and not offered(adapted, "dtype"):
            adapted.dtype = torch.float32
        case IndexError() if "used as indices" in str(error) and not is_network:
            if adapted.kind is not None or not bool((X == X.round()).all()):
                raise ModelError(
                    "the program takes a column as an index, and rows are floating-point numbers: write "
                    "x[:, j].long(), where j is that column; it must be complete"
                ) from error
            adapted.kind = torch.long
        case ModelError() | TypeError() | RuntimeError() if _wants_boolean(error) and not is_network:
            if adapted.kind is not None or not bool(((X == 0) | (X == 1)).all()):
                raise ModelError(
                    "the program takes a column as true or false, and rows are floating-point numbers: write "
                    "x[:, j] == 1, where j is that column; it must be complete"
                ) from error
            adapted.kind = torch.bool
        case ColumnObserved() if y is not None and y.ndim == 2 and not adapted.column:
            warn(
                f"y is a table of one column, {y.shape}, and the program observes {y.shape[:1]}: it is read as "
                "y.ravel()",
                DataConversionWarning,
            )
            adapted.column = True
        case RuntimeError() if "modified by an inplace operation" in str(error):
            raise ModelError(
                "the program writes into a tensor that it has computed with before (mu[t] = a * mu[t - 1]), so that "
                "torch has no gradient of it: collect the values in a list, and torch.stack(values, -1)"
            ) from error
        case _:
            raise error
    return adapted


def _in_single_precision(error: ModelError) -> bool:
    """Whether a network's parameters are; a constant is written in another precision by mistake."""
    return "mixes precisions" in str(error) and ": parameters [" in str(error)


def _wants_boolean(error: Exception) -> bool:
    """Whether a program negates a floating-point number, joins two by & or |, or asks whether it holds."""
    said = str(error)
    return "boolean tensor" in said or "Boolean-type" in said or "bitwise_" in said


def _n_required(model: Model) -> int:
    parameters: Sequence[inspect.Parameter] = list(signature_of(model).parameters.values())
    return sum(p.default is inspect.Parameter.empty for p in parameters)
