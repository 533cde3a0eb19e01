"""What is maximised over the parameters in Pyro's store, and how it went."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pyro
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from bayes_mpt.masks import Policy, torch_generator
from bayes_mpt.predictors import Bound, Conditionals
from bayes_mpt.program.arguments import rows_of
from bayes_mpt.program.program import ModelError
from bayes_mpt.runtime.interrupts import check_stop

__all__ = [
    "Fit",
    "Problem",
    "Report",
    "assign",
    "check_finite",
    "check_start",
    "flat",
    "impossible",
    "one_thread",
    "restore",
    "share_of",
    "take_rows",
    "untouched",
]

Report = Callable[[int, float], bool]
"""Called with (iteration, mean score a row) after each; True stops the training."""


@dataclass(frozen=True)
class Problem:
    """What is maximised: the weighted score of these rows under this program."""

    predictor: Bound
    args: tuple[Any, ...]
    """What the program is called with when it is read."""
    rows: Tensor | None
    """(R, T) rows to score; None: the observed value of each reading."""
    weight: Tensor | None
    """(R,) of the rows; None: all one."""
    n_rows: int
    log_prior: Callable[[], Tensor] | None = None
    """Of the current parameters, added to the total score that is maximised."""
    some: tuple[Tensor, Tensor] | None = None
    """Tokens (B,) of a vector and their weights (B,), from which its score is estimated; None: all of it."""
    masks: Policy | None = None
    """What is scored, on one draw that stays, where no other masks are asked for; None: the joint density."""

    def read(self) -> Conditionals:
        """The conditionals of the rows at the current parameters."""
        check_stop()
        read = self.predictor.read(self.args)
        return read if self.rows is None else read.at(self.rows)

    def score(self, masks: Policy | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Mean score a row at the current parameters, exact or over one draw of masks; with the log prior."""
        if masks is None and self.predictor.climbs:
            check_stop()
            score = self.predictor.objective(self.args).sum() / self.n_rows
        else:
            score = self.score_of(self.read(), masks, generator)
        return score if self.log_prior is None else score + self.log_prior() / self.n_rows

    def score_of(
        self, read: Conditionals, masks: Policy | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Mean score a row of what has been read, without the log prior."""
        by_row = self.by_row(read, masks, generator)
        total = by_row.sum() if self.weight is None else self.weight @ by_row
        return total / self.n_rows

    def by_row(
        self, read: Any, masks: Policy | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """The score of each row (R,) of what has been read."""
        if self.some is not None:
            return read.partial(*self.some)
        masks = self.masks if masks is None else masks
        if masks is None:
            return read.score()
        generator = torch_generator(0) if generator is None else generator
        return read.score(self.predictor.draw_masks(masks, read.value, generator))

    def leaves(self) -> dict[str, Tensor]:
        """Unconstrained parameters of the program by name."""
        store = dict(pyro.get_param_store().named_parameters())
        return {name: store[name] for name in self.predictor.parameters}


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


def take_rows(problem: Problem, index: Tensor) -> Problem:
    """The problem of some of its rows, whose mean score estimates that of all."""
    log_prior = share_of(problem.log_prior, len(index) / problem.n_rows)
    args = rows_of(problem.args, index.to(problem.args[0].device))
    return replace(problem, args=args, n_rows=len(index), log_prior=log_prior)


def share_of(log_prior: Callable[[], Tensor] | None, share: float) -> Callable[[], Tensor] | None:
    """A log prior of all rows as seen by a part of them."""
    return None if log_prior is None else lambda: share * log_prior()


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
        ".detach(). Remove it, or use it"
    )


@torch.no_grad()
def impossible(problem: Problem, read: Conditionals) -> str:
    """The rows that have no chance at all under a program that has been read, in words; empty without any."""
    by_row = problem.by_row(read)
    if len(by_row) < 2:
        return ""
    rows = (by_row == -math.inf).nonzero()[:, 0].tolist()
    if not rows:
        return ""
    named = ", ".join(map(str, rows[:5])) + (f" and {len(rows) - 5} others" if len(rows) > 5 else "")
    why = (
        "have density 0 at every draw of the latents"
        if problem.predictor.sampled
        else "cannot occur under the program"
    )
    return f", since rows [{named}] (counted from 0) {why}"


def check_start(problem: Problem, leaves: dict[str, Tensor]) -> tuple[Conditionals, float, Tensor]:
    """The conditionals at the start, their score and its gradient, both finite."""
    check_finite(leaves)
    read = problem.read()
    score = problem.score_of(read)
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


@cache
def _threads() -> ThreadpoolController:
    return ThreadpoolController()


@contextmanager
def one_thread(n_cells: int) -> Iterator[None]:
    """One thread around small algebra, where handing work to threads costs more than the work; then as before."""
    if n_cells > 2**21:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _threads().limit(limits=1):
            yield
    finally:
        torch.set_num_threads(before)
