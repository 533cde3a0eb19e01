"""Checks that the models share: hyper-parameters before anything runs, memory, codes that skip a level.

Constraints are those of scikit-learn's own parameter validation, in words of ours.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils._param_validation import InvalidParameterError, _Constraint, make_constraint
from torch import Tensor

__all__ = [
    "CheckedModel",
    "Instance",
    "IntegersFrom",
    "NumbersFrom",
    "OneOf",
    "Sequence",
    "check_codes",
    "check_memory",
    "skipped_levels",
    "unmasked",
]

COPIES = 6  # of parameters in training: value, gradient and its parts, two moments of Adam, the best so far
MAX_SHOWN = 5  # levels, in a warning
MAX_CODE = 2**31


class CheckedModel(BaseEstimator):
    """A model whose hyper-parameters are checked where it is called, and by `bayes_mpt.BayesMPT` before it is.

    `_parameter_constraints` says what each may be, as in scikit-learn; what depends on several of them is for
    `_validate_params` of the model, after that of this class.
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # made once, since programs run often
        cls._parameter_constraints = {
            name: [c if isinstance(c, _Constraint) else make_constraint(c) for c in constraints]
            for name, constraints in cls._parameter_constraints.items()
        }

    def _validate_params(self) -> None:
        for name, allowed in self._parameter_constraints.items():
            value = getattr(self, name)
            if not any(c.is_satisfied_by(value) for c in allowed):
                words = [str(c) for c in allowed]
                joined = (", or " if "," in words[0] else " or ").join(words)
                raise InvalidParameterError(f"{type(self).__name__}: {name} must be {joined}, got {value!r}")

    def advice(self, X: NDArray[np.floating]) -> list[str]:
        """What is odd about these settings for rows X (N, T), NaN where missing: sentences, of which fits warn."""
        return []


class IntegersFrom(_Constraint):
    """Integers of at least ``least``; True is none."""

    def __init__(self, least: int | None):
        super().__init__()
        self.least = least

    def is_satisfied_by(self, val: Any) -> bool:
        whole = isinstance(val, Integral) and not isinstance(val, bool)
        return whole and (self.least is None or int(val) >= self.least)

    def __str__(self) -> str:
        return "an integer" if self.least is None else f"an integer of at least {self.least}"


class NumbersFrom(_Constraint):
    """Finite numbers of at least zero, or above zero where ``positive``; True is none."""

    def __init__(self, *, positive: bool = False):
        super().__init__()
        self.positive = positive

    def is_satisfied_by(self, val: Any) -> bool:
        if not isinstance(val, Real) or isinstance(val, bool):
            return False
        return (float(val) > 0 if self.positive else float(val) >= 0) and float(val) < float("inf")

    def __str__(self) -> str:
        return "a positive number" if self.positive else "a number of at least 0"


class Instance(_Constraint):
    """Objects of a class, in words of one's own."""

    def __init__(self, of: type | tuple[type, ...], words: str):
        super().__init__()
        self.of, self.words = of, words

    def is_satisfied_by(self, val: Any) -> bool:
        return isinstance(val, self.of)

    def __str__(self) -> str:
        return self.words


class OneOf(_Constraint):
    """Some words."""

    def __init__(self, *options: str):
        super().__init__()
        self.options = options

    def is_satisfied_by(self, val: Any) -> bool:
        return isinstance(val, str) and val in self.options

    def __str__(self) -> str:
        return f"one of {', '.join(self.options)}" if len(self.options) > 1 else f'"{self.options[0]}"'


class Sequence(_Constraint):
    """Tuples or lists, of so many if ``length`` is given, of what another constraint allows."""

    def __init__(self, of: _Constraint, words: str, length: int | None = None):
        super().__init__()
        self.of, self.words, self.length = of, words, length

    def is_satisfied_by(self, val: Any) -> bool:
        if not isinstance(val, tuple | list) or (self.length is not None and len(val) != self.length):
            return False
        return all(self.of.is_satisfied_by(v) for v in val)

    def __str__(self) -> str:
        return self.words


def check_codes(X: NDArray[np.floating], names: Iterable[Any]) -> None:
    """Refuse cells of X (N, T) that are no codes; NaN is missing, ``names`` (T,) are those of the columns."""
    wrong = ~np.isnan(X) & ~((X >= 0) & (X < MAX_CODE) & (X == np.floor(X)))
    if wrong.any():
        row, column = np.argwhere(wrong)[0].tolist()
        raise ValueError(
            f"column {list(names)[column]} must hold codes 0, 1, 2, ..., got {float(X[row, column]):g} in row {row}: "
            "recode its values as whole numbers from 0, by scikit-learn's OrdinalEncoder, say; NaN is missing"
        )


def check_memory(what: str, n_numbers: int, x: Tensor, remedy: str) -> None:
    """Refuse parameters that cannot be trained on this device, before the system ends the process."""
    if x.is_cuda:
        has = torch.cuda.mem_get_info(x.device)[1]
    elif hasattr(os, "sysconf"):
        has = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return  # this system does not say
    need = COPIES * x.element_size() * n_numbers
    if need > has:
        raise ValueError(
            f"{what} take {need / 2**30:.3g} GiB in training, this device has {has / 2**30:.3g}: {remedy}"
        )


def unmasked(a: Any) -> Any:
    """Masked cells of `numpy.ma` as NaN; what has no mask as it is."""
    return np.ma.filled(a.astype(np.float64), np.nan) if isinstance(a, np.ma.MaskedArray) else a


def skipped_levels(X: NDArray[np.floating]) -> list[str]:
    """A sentence where no cell of X holds a level below the largest, so that the number of levels is in doubt."""
    count = np.bincount(X[~np.isnan(X)].astype(np.int64))
    skipped = np.flatnonzero(count == 0).tolist()
    if not skipped:
        return []
    shown = ", ".join(map(str, skipped[:MAX_SHOWN])) + (", ..." if len(skipped) > MAX_SHOWN else "")
    return [
        f"the codes of X go up to {len(count) - 1}, but no cell holds {shown}: each level takes parameters and some "
        f"probability. Recode the columns (OrdinalEncoder), or give n_levels={len(count)} if these levels exist"
    ]
