"""Hamiltonian Monte Carlo on q(u)^(1 - b) p(u, x)^b: the move of sequential Monte Carlo and of annealing.

Kept by hand: the moves of `pyro.infer` adapt one chain of one program at one temperature, here thousands of particles,
each with a temperature and a step of its own, move side by side, and the densities at their ends are used again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["IMPOSSIBLE", "NEVER", "Particles", "hmc_move"]

IMPOSSIBLE = -1e300  # log-density of particles that have none, finite so that differences are numbers
NEVER = -1e280  # below it no particle is possible


class Particles(NamedTuple):
    """Particles (S, N): S of each of N rows, or S of each of R runs (R, S), with two log-densities at each."""

    u: Tensor
    """(..., d)"""
    log_start: Tensor
    """(...) log q(u)."""
    log_end: Tensor
    """(...) log p(u, x_R)."""
    slope: Tensor
    """(2, ..., d) of both."""

    @property
    def way(self) -> Tensor:
        """(...) log p(u, x_R) - log q(u): what a step of the temperature weighs by."""
        return self.log_end - self.log_start

    def take(self, index: Tensor) -> Particles:
        """Particles index (R, S) of each run."""
        long = index[..., None].expand_as(self.u)
        return Particles(
            self.u.gather(1, long),
            self.log_start.gather(1, index),
            self.log_end.gather(1, index),
            self.slope.gather(2, long.expand_as(self.slope)),
        )


def hmc_move(
    at: Callable[[Tensor], Particles],
    now: Particles,
    beta: Tensor | float,
    step: Tensor,
    momentum: Tensor,
    uniform: Callable[[Tensor], Tensor],
    n_leaps: int,
    root: Tensor | None = None,
) -> tuple[Particles, Tensor]:
    """Particles after a move that leaves the tempered density as it is, and the chances (...) that it was accepted.

        p += step / 2 root' grad,    u += step root p,    p += step / 2 root' grad         n_leaps times

    Where a density is not a number nothing is accepted, and a slope that is none pulls nowhere.

    Parameters
    ----------
    at : callable
        Densities and slopes at u (..., d).
    now : Particles
    beta : Tensor or float
        Temperature b of each particle.
    step : Tensor
        Broadcasts with u: of each particle, and where there is no root of each axis.
    momentum : Tensor of shape (..., d)
        Standard normals.
    uniform : callable
        Draws uniform numbers like a tensor (...): the densities may draw before it.
    n_leaps : int
    root : Tensor of shape (d, d), optional
        A unit of the move along all axes: a root of the particles' covariance.
    """
    b = beta[..., None] if isinstance(beta, Tensor) else beta

    def slope(c: Particles) -> Tensor:
        grad = ((1 - b) * c.slope[0] + b * c.slope[1]).nan_to_num(0.0)
        return grad if root is None else grad @ root

    def energy(c: Particles, p: Tensor) -> Tensor:
        value = (1 - beta) * c.log_start + beta * c.log_end - 0.5 * p.square().sum(-1)
        return torch.where(value.isnan(), -torch.inf, value)

    new, p = now, momentum
    for _ in range(n_leaps):
        p = p + 0.5 * step * slope(new)
        new = at(new.u + step * (p if root is None else p @ root.mT))
        p = p + 0.5 * step * slope(new)
    log_ratio = energy(new, p) - energy(now, momentum)
    accept = uniform(log_ratio).log() < log_ratio
    pick = accept[..., None]
    after = Particles(
        torch.where(pick, new.u, now.u),
        torch.where(accept, new.log_start, now.log_start),
        torch.where(accept, new.log_end, now.log_end),
        torch.where(pick, new.slope, now.slope),
    )
    return after, log_ratio.clamp(max=0).exp().nan_to_num(0.0)
