"""Latent class analysis."""

from __future__ import annotations

from numbers import Integral
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from sklearn.base import BaseEstimator
from torch import Tensor

__all__ = ["LatentClass"]

START_ROWS = 16  # rows that a class starts from: averages over many more would be the same in all classes
START_SHARE = 0.2  # of the frequencies in all rows, in those that a class starts from


class LatentClass(BaseEstimator):
    """Latent class analysis: tokens are codes 0, ..., L - 1, independent given the class of the row.

    Sites "class" (N,) and "x" (N, T), codes held as floats; parameters "weights" (C,) and "probs" (C, T, L).
    The classes start at the frequencies of the levels in a few rows each, drawn at random.

    Parameters
    ----------
    n_classes : int, default=2
        C >= 1.
    n_levels : int or "auto", default="auto"
        L >= 1, the same for all tokens. "auto" is the largest code of the first run plus one.

    Examples
    --------
    >>> pyro.clear_param_store()
    >>> x = torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    >>> trace = pyro.poutine.trace(LatentClass(2)).get_trace(x)
    >>> trace.nodes["class"]["value"].shape, trace.nodes["probs"]["value"].shape
    (torch.Size([3]), torch.Size([2, 3, 3]))
    """

    def __init__(self, n_classes: int = 2, n_levels: int | Literal["auto"] = "auto"):
        self.n_classes = n_classes
        self.n_levels = n_levels

    def __call__(self, x: Tensor) -> None:
        """Run the program on codes x (N, T)."""
        n_classes = _at_least_one("n_classes", self.n_classes)
        n_levels = self.n_levels
        if n_levels != "auto":
            n_levels = _at_least_one("n_levels", n_levels, ' or "auto"')
        lowest, highest = float(x.min()), float(x.max())
        if not lowest >= 0:  # NaN too
            raise ValueError(f"x must hold codes 0, 1, 2, ..., got {lowest:g}")
        weights = pyro.param("weights", lambda: x.new_full((n_classes,), 1 / n_classes), constraints.simplex)
        probs = pyro.param(
            "probs",
            lambda: _start(x, n_classes, round(highest) + 1 if n_levels == "auto" else n_levels),
            constraints.simplex,
        )
        if highest > probs.shape[-1] - 1:
            raise ValueError(
                f"x holds code {highest:g}, but parameter 'probs' has {probs.shape[-1]} levels, from 0: set "
                f"n_levels to the number of levels, {round(highest) + 1} or more, before the first run"
            )
        with pyro.plate("rows", len(x)):
            c = pyro.sample("class", dist.Categorical(weights))
            pyro.sample("x", dist.Categorical(probs[c]).to_event(1), obs=x)


def _at_least_one(name: str, value: Any, alternative: str = "") -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1{alternative}, got {value!r}")
    return int(value)


def _start(x: Tensor, n_classes: int, n_levels: int) -> Tensor:
    """Frequencies (C, T, L) in a few rows of each class, mixed with those in all rows; none is zero."""
    n_rows = len(x)
    # a cell filled with the column's mean counts as the nearest code
    codes = x.detach().round().long().clamp(max=n_levels - 1)  # (N, T)
    total = torch.stack([(codes == level).sum(0) for level in range(n_levels)], -1).to(x)  # (T, L)
    everywhere = (total + 1 / n_levels) / (n_rows + 1)
    drawn = torch.randint(n_rows, (n_classes, START_ROWS), device="cpu").to(x.device)
    # one class at a time, and no one-hot table of all rows
    own = torch.stack([torch.nn.functional.one_hot(codes[rows], n_levels).to(x).mean(0) for rows in drawn])
    return (1 - START_SHARE) * own + START_SHARE * everywhere
