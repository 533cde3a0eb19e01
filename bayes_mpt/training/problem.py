"""What is maximised over the parameters in Pyro's store, and how it went."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pyro
import torch
from torch import Tensor

from bayes_mpt.masks import torch_generator
from bayes_mpt.predictors import Batch, Bound, Conditionals, Objective
from bayes_mpt.predictors.self_predictive import on_own_masks
from bayes_mpt.program.program import ModelError
from bayes_mpt.program.statistics import SufficientStatistics
from bayes_mpt.training.noise_prior import NoisePrior

__all__ = [
    "Fit",
    "Problem",
    "Report",
    "assign",
    "check_finite",
    "check_start",
    "flat",
    "impossible",
    "restore",
    "untouched",
]

Report = Callable[[int, float], bool]
"""Called with (iteration, mean score a row) after each; True stops the training."""


@dataclass(frozen=True)
class Problem:
    """What is maximised: the mean score a row of an objective, with a penalty."""

    objective: Objective
    statistics: SufficientStatistics | None = None
    """Moments of all rows seen, where these are all that the score needs: closed forms take them."""
    log_prior: Callable[[], Tensor] | None = None
    """Of the current parameters, added to the total score of all rows."""
    noise_prior: NoisePrior | None = None
    """The same, where it is one of noise variances: the closed forms know it."""

    @property
    def bound(self) -> Bound:
        """The program, and how it is scored."""
        return self.objective.bound

    @property
    def has_holes(self) -> bool:
        """Whether there are moments, of rows with missing cells."""
        return self.statistics is not None and not self.statistics.complete

    @property
    def whole(self) -> Batch:
        """All rows."""
        return self.objective.whole

    def score(self, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Mean score a row of a batch, by default of all; with its share of the log prior."""
        part = self.whole if batch is None else batch
        return self.with_prior(self.objective(part, generator) / part.n_rows)

    def with_prior(self, score: Tensor) -> Tensor:
        """A mean score a row, with a row's share of the log prior at the present parameters."""
        return score if self.log_prior is None else score + self.log_prior() / self.whole.n_rows

    def score_of(self, read: Conditionals, batch: Batch | None = None) -> Tensor:
        """Mean score a row of what has been read, without the log prior."""
        batch = self.whole if batch is None else batch
        return self.objective.total(read, batch) / batch.n_rows

    def leaves(self) -> dict[str, Tensor]:
        """Unconstrained parameters of the program, and of a guide, by name."""
        store = dict(pyro.get_param_store().named_parameters())
        return {name: store[name] for name in self.bound.parameters}

    def of_program(self) -> dict[str, Tensor]:
        """Those of the program alone."""
        leaves = self.leaves()
        return {name: leaves[name] for name in self.bound.structure.parameters}


@dataclass
class Fit:
    """How a training went."""

    method: str
    history: list[float] = field(default_factory=list)
    """Mean score a row after each iteration."""
    n_iter: int = 0
    converged: bool = False
    interrupted: bool = False
    """By Ctrl-C; the parameters are the best until then."""
    at_zero: list[int] = field(default_factory=list)
    """Columns whose noise variance has ended at zero."""
    last: Conditionals | None = None
    """The conditionals at the fitted parameters, where they have been read; their score is the last of the history."""
    total: float | None = None
    """Their log-density of all rows, where that has been computed without error."""


# ------------------------------------------------------------------------------------------- the parameters


def flat(leaves: dict[str, Tensor]) -> Tensor:
    """All of them in one vector."""
    return torch.cat([leaf.flatten() for leaf in leaves.values()])


def assign(leaves: dict[str, Tensor], theta: Tensor) -> None:
    """Set them from one vector, as `flat` makes it."""
    with torch.no_grad():
        for leaf, value in zip(
            leaves.values(), theta.split([v.numel() for v in leaves.values()]), strict=True
        ):
            leaf.copy_(value.reshape(leaf.shape))


def restore(leaves: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    """Set them from copies by name."""
    with torch.no_grad():
        for name, leaf in leaves.items():
            leaf.copy_(before[name])


def check_finite(leaves: dict[str, Tensor]) -> None:
    """Refuse initial values that are not."""
    for name, leaf in leaves.items():
        if not bool(torch.isfinite(leaf).all()):
            raise ModelError(f"parameter {name!r} is not finite at the start: check its initial value")


def untouched(name: str) -> ModelError:
    """A parameter on which the score does not depend."""
    return ModelError(
        f"parameter {name!r} has no effect on the score: nothing in the observed site depends on it, or only through "
        ".detach() or the place of a jump. Remove it, or use it"
    )


@torch.no_grad()
def impossible(problem: Problem, read: Conditionals) -> str:
    """The rows that have no chance at all under a program that has been read, in words; empty without any."""
    if problem.bound.structure.takes_visible:
        by_row = on_own_masks(read, torch_generator(0))
    else:
        by_row = problem.objective.by_row(read)
    rows = (by_row == -math.inf).nonzero()[:, 0].tolist()
    if len(by_row) < 2 or not rows:
        return ""
    named = ", ".join(map(str, rows[:5])) + (f" and {len(rows) - 5} others" if len(rows) > 5 else "")
    drawn = not problem.bound.structure.takes_visible and read.evidence().drawn
    why = "have density 0 at every draw of the latents" if drawn else "cannot occur under the program"
    return f", since rows [{named}] (counted from 0) {why}"


def check_start(
    problem: Problem, leaves: dict[str, Tensor], batch: Batch | None = None
) -> tuple[Conditionals, float, Tensor]:
    """The conditionals of a batch at the start; what is maximised of it there, and its gradient, both finite."""
    check_finite(leaves)
    read = problem.objective.read(batch)
    score = problem.with_prior(problem.score_of(read, batch))
    if not leaves:
        raise ModelError("the program has no pyro.param: there is nothing to train")
    if not bool(torch.isfinite(score)):
        raise ModelError(
            f"the score is {float(score.detach())} at the start{impossible(problem, read)}: check the program and "
            "its data"
        )
    grads: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if score.requires_grad:
        grads = torch.autograd.grad(score, list(leaves.values()), allow_unused=True, retain_graph=True)
    for name, grad in zip(leaves, grads, strict=True):
        if grad is None:
            raise untouched(name)
        if not bool(torch.isfinite(grad).all()):
            raise ModelError(f"the gradient of parameter {name!r} is not finite at the start")
    return read, float(score.detach()), torch.cat([g.flatten() for g in grads if g is not None])
