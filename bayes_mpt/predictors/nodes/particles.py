"""A program at particles: densities and slopes of many values of its latents, some at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_mpt.predictors.nodes.adaptive import AdaptiveNodes
from bayes_mpt.predictors.nodes.given import Given
from bayes_mpt.predictors.nodes.prior import prior_points
from bayes_mpt.predictors.nodes.reference import Reference
from bayes_mpt.predictors.nodes.resampling import by_halves
from bayes_mpt.predictors.nodes.tempering import IMPOSSIBLE, Particles
from bayes_mpt.program.arguments import Args

__all__ = ["Shown", "Target"]

CELLS = 2**19  # log-densities of tokens at a time


class Shown(NamedTuple):
    """A program with its arguments, and one vector of observations of which some are shown."""

    adaptive: AdaptiveNodes
    args: Args
    x: Tensor
    """(1, T), NaN where missing."""
    seen: Tensor
    """(T,)"""

    def given(self, u: Tensor) -> Iterator[tuple[Given, Tensor]]:
        """The inner model at u (M, d), by chunks, and what it leaves out (S, 1)."""
        for part in self.chunks(u):
            given, log_det, _ = self.adaptive.at(self.args, part[:, None])
            yield given, log_det

    def log_joint(self, u: Tensor) -> Tensor:
        """log p(u, x_R) (R, S)."""

        def of(part: Tensor) -> tuple[Tensor]:
            given, log_det, _ = self.adaptive.at(self.args, part[:, None])
            return ((given.log_joint(self.x, self.seen) + log_det)[:, 0],)

        never = (u.new_tensor([-math.inf]),)
        return torch.cat([by_halves(of, part, never)[0] for part in self.chunks(u.flatten(0, -2))]).reshape(
            u.shape[:-1]
        )

    def prior_points(self, n: int) -> Tensor:
        """Draws (n, d) from the prior."""
        return prior_points(self.adaptive, self.args.filled, n)

    def chunks(self, u: Tensor) -> tuple[Tensor, ...]:
        """Of points (M, d), as many as may be evaluated at a time."""
        return u.split(max(1, CELLS // max(1, self.x.shape[1] * self.adaptive.n_evaluations)))


class Target(NamedTuple):
    """The two ends of a path: a reference r, and the joint density of latents and what is shown."""

    shown: Shown
    reference: Reference

    def start(self, n_runs: int, n: int) -> Particles:
        """Draws (R, n) from the reference."""
        return self.at(self.reference.draw(n_runs, n, self.shown.prior_points))

    def at(self, u: Tensor) -> Particles:
        """Densities and slopes at u (R, S, d); where there is none, one that is never taken."""
        values, slopes = [], []
        with torch.enable_grad():
            for part in self.shown.chunks(u.flatten(0, 1)):
                value, slope = by_halves(
                    self._both,
                    part,
                    (part.new_full((2, 1), -math.inf), part.new_zeros(2, 1, part.shape[1])),
                )
                values.append(value)
                slopes.append(slope)
        start, end = torch.cat(values, 1).reshape(2, *u.shape[:2])
        bad = ~(torch.isfinite(start) & torch.isfinite(end))
        return Particles(
            u,
            torch.where(torch.isfinite(start), start, 0.1 * IMPOSSIBLE),
            torch.where(bad, IMPOSSIBLE, end),
            torch.cat(slopes, 1).reshape(2, *u.shape),
        )

    def _both(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """log r(u) and log p(u, x_R) at u (M, d), (2, M), and their slopes (2, M, d)."""
        leaf = u.detach().requires_grad_()
        shown = self.shown
        given, log_det, _ = shown.adaptive.at(shown.args, leaf[:, None])
        end = (given.log_joint(shown.x, shown.seen) + log_det)[:, 0]
        needed = bool(self.reference.prior)
        prior = (given.log_prior(shown.x) + log_det)[:, 0] if needed else torch.zeros_like(end)
        start = self.reference.log_prob(leaf, prior)
        slopes = [
            torch.autograd.grad(t.sum(), leaf, retain_graph=True, materialize_grads=True)[0]
            if t.requires_grad
            else torch.zeros_like(leaf)
            for t in (start, end)
        ]
        return torch.stack([start, end]).detach(), torch.stack(slopes)
