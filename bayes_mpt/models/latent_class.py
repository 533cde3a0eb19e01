"""Latent class analysis."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.distributions import constraints
from torch import Tensor

from bayes_mpt.models.checks import CheckedModel, IntegersFrom, OneOf, check_memory, skipped_levels

__all__ = ["LatentClass"]

START_ROWS = 16  # rows that a class starts from: averages over many more would be the same in all classes
START_SHARE = 0.2  # of the frequencies in all rows, in those that a class starts from


class LatentClass(CheckedModel):
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

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "n_classes": [IntegersFrom(1)],
        "n_levels": [IntegersFrom(1), OneOf("auto")],
    }

    def __init__(self, n_classes: int = 2, n_levels: int | Literal["auto"] = "auto"):
        self.n_classes = n_classes
        self.n_levels = n_levels

    def __call__(self, x: Tensor) -> None:
        """Run the program on codes x (N, T)."""
        self._validate_params()
        n_classes, given = int(self.n_classes), self.n_levels
        lowest, highest = float(x.min()), float(x.max())
        if not lowest >= 0:  # NaN too
            raise ValueError(f"x must hold codes 0, 1, 2, ..., got {lowest:g}")
        n_levels = round(highest) + 1 if given == "auto" else int(given)
        what = f"classes for n_classes={n_classes}, n_levels={n_levels}"
        check_memory(
            what, n_classes * x.shape[1] * n_levels, x, "use fewer, or codes without gaps (OrdinalEncoder)"
        )
        weights = pyro.param("weights", lambda: x.new_full((n_classes,), 1 / n_classes), constraints.simplex)
        probs = pyro.param(
            "probs",
            lambda: _start(x, n_classes, n_levels),
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

    def advice(self, X: NDArray[np.floating]) -> list[str]:
        return skipped_levels(X) if self.n_levels == "auto" else []


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
