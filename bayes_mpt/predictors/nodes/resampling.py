"""Particles that are weighed, drawn again, and evaluated together or by halves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.optimize import brentq
from torch import Tensor

__all__ = ["by_halves", "next_temperature", "systematic", "weighted_root"]

KEEP = 0.5  # share of effective particles that a step of the temperature keeps


def by_halves(
    of: Callable[[Tensor], tuple[Tensor, ...]], u: Tensor, impossible: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """of(u), particles u (M, d) side by side, with what stands for one at which a matrix has no Cholesky factor.

    Particles side by side fail together: they are halved down to those that fail.
    """
    try:
        return of(u)
    except torch.linalg.LinAlgError:
        if len(u) == 1:
            return impossible
    halves = [by_halves(of, part, impossible) for part in u.chunk(2)]
    return tuple(torch.cat(parts, min(1, parts[0].ndim - 1)) for parts in zip(*halves, strict=True))


def next_temperature(way: Tensor, now: float) -> float:
    """The highest temperature that keeps a share of the particles effective."""

    def more(temperature: float) -> float:
        share = ((temperature - now) * way).softmax(0)
        return float(1 / share.square().sum()) - KEEP * len(way)

    return 1.0 if more(1.0) >= 0 else max(brentq(more, now, 1.0, xtol=1e-15, maxiter=1000), now + 1e-12)


def systematic(log_w: Tensor, n: int | None = None) -> Tensor:
    """Systematic resampling of each run, (R, S) -> indices (R, n), by default as many as there are."""
    n_runs, n = len(log_w), n or log_w.shape[1]
    edges = log_w.softmax(1).cumsum(1)
    start = torch.rand(n_runs, 1, dtype=log_w.dtype).to(log_w)
    points = (start + torch.arange(n, device=log_w.device)) / n
    return torch.searchsorted(edges / edges[:, -1:], points).clamp(max=log_w.shape[1] - 1)


def weighted_root(u: Tensor, share: Tensor) -> Tensor:
    """A lower factor of the weighted covariance of particles (S, d), drawn towards its diagonal."""
    mean = share @ u
    centred = u - mean
    cov = (share[:, None] * centred).mT @ centred
    variance = cov.diagonal().clamp(min=1e-12)
    ess = float(1 / share.square().sum())
    keep = ess / (ess + u.shape[1])
    cov = keep * cov + torch.diag((1 - keep) * variance + 1e-9 * variance)
    return torch.linalg.cholesky(cov)
