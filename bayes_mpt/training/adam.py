"""Climb the score of sampled masks by Adam."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayes_mpt.diagnostics import replicate_error
from bayes_mpt.predictors import Batch, Conditionals
from bayes_mpt.predictors.self_predictive import on_own_masks
from bayes_mpt.program.program import ModelError
from bayes_mpt.training.problem import (
    Fit,
    Problem,
    Report,
    assign,
    check_start,
    flat,
)
from bayes_mpt.training.units import units

__all__ = ["total_on_masks", "train_on_masks"]

WINDOW = 50  # steps between two looks of the stopping rule, at first
WINDOW_GROWTH = 1.4  # with every halving of the step
MAX_HALVINGS = 6
MIN_GAIN = 2e-5  # nats a row in a window, less than which halves the step
N_CHECK_DRAWS = 16
N_TOTALS = 8  # replicates of a score from one mask a row


def train_on_masks(
    problem: Problem,
    *,
    max_iter: int,
    learning_rate: float,
    batch_size: int | None = None,
    random_state: int,
    tol: float = 0.0,
    report: Report | None = None,
) -> Fit:
    """Maximise the masked score by Adam, a fresh draw of masks each step.

    After every window of steps (50 at first, longer as the steps shrink) the average of its iterates is scored on one
    fixed draw of masks and rows, so that two windows are compared without the noise of the masks. A window that gains
    less than ``tol`` (at least 2e-5) nats a row halves the step; after six halvings the training ends at the best
    average. Units are taken afresh each window, since the map moves.

    Raises
    ------
    ModelError
        If a parameter or its gradient is not finite, or touches nothing; it is named.
    """
    generator = torch.Generator().manual_seed(random_state)
    leaves = problem.leaves()
    fit = Fit("adam")
    check_start(problem, leaves, problem.objective.trial)
    check_seed = int(torch.randint(2**31, (), generator=generator))

    def check() -> float:
        """The score on the fixed draw."""
        fixed = torch.Generator().manual_seed(check_seed)
        with torch.no_grad():
            draws = [problem.score(_batch(problem, batch_size, fixed), fixed) for _ in range(N_CHECK_DRAWS)]
        return float(torch.stack(draws).mean())

    best = flat(leaves).detach().clone()
    best_check, rate, halvings = check(), learning_rate, 0
    windows = _Windows(problem, leaves, batch_size, learning_rate, generator, fit, report)
    try:
        while len(fit.history) < max_iter and halvings <= MAX_HALVINGS and not windows.stopped:
            window = round(WINDOW * WINDOW_GROWTH**halvings)
            average, n_steps = windows.run(min(window, max_iter - len(fit.history)), rate)
            if not n_steps:
                break
            last = flat(leaves).detach().clone()
            assign(leaves, average)
            gain = check() - best_check
            if gain > 0:
                best, best_check = average, best_check + gain
            if gain > max(tol, MIN_GAIN):
                assign(leaves, last)
            elif n_steps == window:
                halvings += 1
                rate *= 0.5
                assign(leaves, best)
    except KeyboardInterrupt:
        if not fit.history:
            raise
        fit.interrupted = True
    assign(leaves, best)
    fit.converged = halvings > MAX_HALVINGS and not fit.interrupted
    fit.n_iter = len(fit.history)
    return fit


@dataclass
class _Windows:
    """Windows of steps of one training."""

    problem: Problem
    leaves: dict[str, Tensor]
    batch_size: int | None
    learning_rate: float
    """That was asked for."""
    generator: torch.Generator
    fit: Fit
    report: Report | None
    stopped: bool = False
    """From outside."""

    def run(self, max_steps: int, rate: float) -> tuple[Tensor, int]:
        """One window, in fresh units: the average of its iterates, and how many there are."""
        fit, leaves = self.fit, self.leaves
        start, unit, phi, adam = _fresh_adam(self.problem, leaves, rate)
        total, n_steps = torch.zeros_like(start), 0
        try:
            for _ in range(max_steps):
                value, slope = self._slope()
                phi.grad = -unit * slope
                adam.step()
                theta = start + unit * phi.detach()
                assign(leaves, theta)
                total += theta
                n_steps += 1
                fit.history.append(value)
                if self.report is not None and self.report(len(fit.history), value):
                    self.stopped = True
                    break
        except KeyboardInterrupt:
            if not fit.history:
                raise
            fit.interrupted = self.stopped = True
        return total / max(1, n_steps), n_steps

    def _slope(self) -> tuple[float, Tensor]:
        """The score on a fresh draw, and its slope in the parameters."""
        batch = _batch(self.problem, self.batch_size, self.generator)
        score = self.problem.score(batch, self.generator)
        value = float(score.detach())
        if not math.isfinite(value):
            check_start(self.problem, self.leaves)
            raise ModelError(
                f"the masked score became {value} at step {len(self.fit.history)}: lower learning_rate (now "
                f"{self.learning_rate})"
            )
        grads = torch.autograd.grad(score, list(self.leaves.values()), materialize_grads=True)
        return value, torch.cat([g.flatten() for g in grads])


def _fresh_adam(
    problem: Problem, leaves: dict[str, Tensor], learning_rate: float
) -> tuple[Tensor, Tensor, Tensor, torch.optim.Adam]:
    """Start, units, the steps phi in theta = start + unit phi, and their optimiser."""
    start = flat(leaves).detach().clone()
    phi = torch.zeros_like(start).requires_grad_()
    return (
        start,
        units(problem.objective, leaves),
        phi,
        torch.optim.Adam([phi], lr=learning_rate, betas=(0.9, 0.99)),
    )


def _batch(problem: Problem, batch_size: int | None, generator: torch.Generator) -> Batch | None:
    """A random minibatch, whose mean score estimates that of all rows; None for all of them."""
    return None if batch_size is None else problem.objective.sample(batch_size, generator)


def total_on_masks(read: Conditionals, seed: int) -> tuple[float, float]:
    """The total score of all rows and its standard error, from replicates of one random mask for each row.

    Unbiased for the area under the masked curve, whatever was trained on; masks are independent between rows, so that
    the error falls with their number.
    """
    generator = torch.Generator().manual_seed(seed)
    totals = np.array([float(on_own_masks(read, generator).sum()) for _ in range(N_TOTALS)])
    return float(totals.mean()), replicate_error(totals)
