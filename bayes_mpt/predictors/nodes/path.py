"""Particles on their way from a reference r to a posterior, along r(u)^(1 - b) p(u, x)^b: pilot, frozen runs, and back.

A pilot chooses temperatures b, and lengths and units of Hamiltonian moves, by its own particles, which makes its
estimates biased. With these frozen, each run of fresh particles gives an unbiased estimate of Z (Del Moral, Doucet &
Jasra 2006),

    Z = prod over temperatures of the mean over particles of (p / r)^(b - b'),    b' the temperature before

A run back from a draw of the posterior gives one of 1 / Z in the same way, whose logarithm is too high on the average
where that of the first is too low (Grosse, Ghahramani & Adams 2015).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_mpt.predictors.nodes.particles import Target
from bayes_mpt.predictors.nodes.resampling import effective, next_temperature, systematic, weighted_root
from bayes_mpt.predictors.nodes.tempering import NEVER, Particles, hmc_move
from bayes_mpt.program.program import ModelError

__all__ = ["Arrived", "Path", "Stage", "next_step"]

MAX_LEVELS = 200
ACCEPTANCE = 0.8  # of the moves, that their lengths are adapted to
LEAPS = 4
MAX_STEP = 0.4  # in units of the spread of the particles: four of them are a quarter turn, which forgets most
WARM = 10  # moves of copies of one draw, before a run back


class Stage(NamedTuple):
    """A temperature and the moves at it."""

    temperature: float
    root: Tensor
    """(d, d) of the particles' covariance."""
    step: float


class Arrived(NamedTuple):
    """Particles at the posterior."""

    particles: Particles
    log_z: Tensor
    """(R,) of each run."""
    ancestor: Tensor
    """(R, S): which of its run's first particles each comes from."""
    variance: float
    """Of the log Z of a run, as the weights tell it: what it would be if moves forgot all."""


class Path(NamedTuple):
    """From a target's reference to its posterior."""

    target: Target
    n_moves: int

    def pilot(self, n_runs: int, n: int) -> tuple[list[Stage], Arrived]:
        """Runs that choose the stages together.

        Raises
        ------
        ModelError
            If more than 200 temperatures are needed.
        """
        stages: list[Stage] = []
        return stages, self._forward(stages, n_runs, n, choose=True)

    def run(self, stages: list[Stage], n_runs: int, n: int) -> Arrived:
        """Independent runs along frozen stages."""
        return self._forward(stages, n_runs, n, choose=False)

    def _forward(self, stages: list[Stage], n_runs: int, n: int, *, choose: bool) -> Arrived:
        now = self.target.start(n_runs, n)
        log_z = now.log_end.new_zeros(n_runs)
        ancestor = torch.arange(n, device=log_z.device).expand(n_runs, n)
        before, variance, step = 0.0, 0.0, now.u.shape[-1] ** -0.25
        for level in range(MAX_LEVELS + 1):
            if choose:
                possible = now.way[now.way > NEVER]
                b = next_temperature(before, possible.double().cpu().numpy()) if len(possible) else 1.0
                root = self._root(now, b - before)
                stages.append(Stage(b, root, step))
            b, root, step = stages[level]
            log_w = (b - before) * now.way
            log_z = log_z + log_w.logsumexp(1) - math.log(n)
            variance += (1 / effective(log_w.flatten().double().cpu().numpy()) - 1) / n
            index = systematic(log_w)
            now, ancestor = now.take(index), ancestor.gather(1, index)
            for _ in range(self.n_moves):
                now, accepted = self.move(now, b, root, step)
                if choose:
                    step = next_step(step, accepted)
            if choose:
                stages[level] = Stage(b, root, step)
            before = b
            if b == 1:
                return Arrived(now, log_z, ancestor, variance)
        names = ", ".join(repr(name) for name in self.target.shown.adaptive.space.names)
        raise ModelError(
            f"sequential Monte Carlo needs more than {MAX_LEVELS} temperatures from the prior to the posterior of "
            f"latent sites {names}, and came to {before:.2g} of 1: write narrower priors, in units of the data, or use "
            "Importance() with a guide"
        )

    def back(self, stages: list[Stage], u: Tensor) -> Tensor:
        """Log Z (R,) by runs back from draws u (R, S, d) of the posterior, which may be copies of one."""
        now = self.target.at(u)
        log_inverse = now.log_end.new_zeros(len(u))
        for level in reversed(range(len(stages))):
            b, root, step = stages[level]
            for _ in range(self.n_moves + WARM * (b == 1)):
                now, _ = self.move(now, b, root, step)
            log_w = ((stages[level - 1].temperature if level else 0.0) - b) * now.way
            log_inverse = log_inverse + log_w.logsumexp(1) - math.log(u.shape[1])
            now = now.take(systematic(log_w))
        return -log_inverse

    def _root(self, now: Particles, rise: float) -> Tensor:
        u, log_w = now.u.flatten(0, 1), rise * now.way.flatten()
        share = torch.where(now.way.flatten() > NEVER, log_w, -torch.inf).softmax(0).nan_to_num(0.0)
        if not bool(share.any()):
            return torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
        reference = self.target.reference
        label = reference.of_each(u).nan_to_num(-torch.inf).argmax(1) if len(reference) > 1 else None
        return weighted_root(u, share, label)

    def move(self, now: Particles, b: float, root: Tensor, step: float) -> tuple[Particles, float]:
        """Hamiltonian Monte Carlo in units of a covariance root root', and the mean chance that it was accepted."""
        jitter = step * (0.8 + 0.4 * torch.rand(*now.log_end.shape, 1, dtype=now.u.dtype).to(now.u))
        momentum = torch.randn(now.u.shape, dtype=now.u.dtype).to(now.u)  # in units of root^-T

        def uniform(like: Tensor) -> Tensor:
            return torch.rand(like.shape, dtype=like.dtype).to(like)

        moved, chance = hmc_move(self.target.at, now, b, jitter, momentum, uniform, LEAPS, root)
        return moved, float(chance.mean())


def next_step(step: float, accepted: float) -> float:
    """The length of the next move, after one that was accepted with a mean chance."""
    return min(step * math.exp(accepted - ACCEPTANCE), MAX_STEP)
