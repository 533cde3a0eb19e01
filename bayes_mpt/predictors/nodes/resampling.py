"""Particles that are weighed, drawn again or at even ranks, and evaluated together or by halves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "by_halves",
    "effective",
    "evenly",
    "in_proportion",
    "next_temperature",
    "systematic",
    "weighted_root",
]

N_TRIED = 64  # nodes at which finer ones in every row are tried
CESS = 0.85  # share of the particles that stays effective from one temperature to the next
MAX_STRETCH = 10.0  # values that lie in a plane are left as they are
MIN_RISE = 1e-12  # of a temperature


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


def effective(log_weight: NDArray[np.float64]) -> float:
    """Share of equally weighted points (B,) that counts after a weighting."""
    w = np.exp(log_weight - log_weight.max())
    return float(w.sum() ** 2 / (w @ w)) / len(w)


def next_temperature(
    now: float, way: NDArray[np.float64], keep: float = CESS, min_rise: float = MIN_RISE
) -> float:
    """The highest temperature at which the conditional effective sample size of equal particles is kept.

    Parameters
    ----------
    now : float
        Temperature of the particles.
    way : array of shape (B,)
        log p - log q of each.
    keep : float, default=0.85
        Share of the particles (Zhou, Johansen & Aston 2016).
    min_rise : float
        Of the temperature, however few are kept.
    """
    if effective((1 - now) * way) >= keep:
        return 1.0
    low, high = 0.0, 1 - now
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if effective(middle * way) >= keep else (low, middle)
    return min(1.0, now + max(low, min_rise))


def systematic(log_w: Tensor, n: int | None = None) -> Tensor:
    """Systematic resampling of each run, (R, S) -> indices (R, n), by default as many as there are."""
    n_runs, n = len(log_w), n or log_w.shape[1]
    edges = log_w.softmax(1).cumsum(1)
    start = torch.rand(n_runs, 1, dtype=log_w.dtype).to(log_w)
    points = (start + torch.arange(n, device=log_w.device)) / n
    return torch.searchsorted(edges / edges[:, -1:], points).clamp(max=log_w.shape[1] - 1)


def in_proportion(log_w: Tensor, n: int = N_TRIED) -> tuple[Tensor, Tensor]:
    """n of S weighted points (S,) in proportion to their weights: which ones, and which part each is of the n.

    Examples
    --------
    >>> in_proportion(torch.tensor([0.5, 0.01, 0.49]).log(), 4)
    (tensor([0, 2]), tensor([0.5000, 0.5000]))
    """
    until = log_w.softmax(0).cumsum(0)
    part = (torch.arange(n, device=until.device) + 0.5) / n
    some, times = torch.searchsorted(until, part.to(until) * until[-1]).unique(return_counts=True)
    return some, times.to(log_w) / n


def weighted_root(u: Tensor, share: Tensor, label: Tensor | None = None) -> Tensor:
    """A lower factor of the weighted covariance of particles (S, d), drawn towards its diagonal.

    Within groups, where each particle has a ``label`` (S,): what lies between modes is no length of a move.
    """
    u = torch.where(share[:, None] > 0, u, 0.0)  # of an impossible one no number may be there
    label = torch.zeros(len(u), dtype=torch.long, device=u.device) if label is None else label
    of_group = torch.nn.functional.one_hot(label).to(u) * share[:, None]  # (S, K)
    mean = (of_group.mT @ u) / of_group.sum(0)[:, None].clamp(min=1e-300)
    centred = torch.where(share[:, None] > 0, u - mean[label], 0.0)
    cov = (share[:, None] * centred).mT @ centred
    variance = cov.diagonal().clamp(min=1e-12)
    ess = float(1 / share.square().sum())
    keep = ess / (ess + u.shape[1])
    cov = keep * cov + torch.diag((1 - keep) * variance + 1e-9 * variance)
    return torch.linalg.cholesky(cov)


def evenly(u: Tensor, share: Tensor, n: int) -> Tensor:
    """So many values (S, D, B, d) with the mean and covariance of nodes u (S, Q, B, d) with these shares (S, Q, B).

    Along one axis they are means of equal parts of the distribution, else nodes at even ranks, stretched to the
    covariance, which is that of a few values too small or random.
    """
    weight = share[..., None]
    mean = (weight * u).sum(1, keepdim=True)
    cut = share.cumsum(1)
    if u.shape[-1] == 1:
        # int_0^c of the quantile function, between the ends of n equal parts
        order = u[..., 0].argsort(1)
        cut = share.gather(1, order).cumsum(1).movedim(1, -1).contiguous()  # (S, B, Q)
        steps = u[..., 0].gather(1, order).movedim(1, -1)
        ends = (
            torch.linspace(0, 1, n + 1, dtype=u.dtype, device=u.device)
            .expand(*cut.shape[:-1], -1)
            .contiguous()
        )
        at = torch.searchsorted(cut, ends).clamp(max=cut.shape[-1] - 1)
        part = torch.diff(cut, dim=-1, prepend=torch.zeros_like(cut[..., :1]))
        before = (part * steps).cumsum(-1) - part * steps
        area = (before + (-(cut - part)) * steps).gather(-1, at) + ends * steps.gather(-1, at)
        drawn = (n * area.diff(dim=-1)).movedim(-1, 1)[..., None]
    else:
        even = (
            ((torch.arange(n, dtype=u.dtype, device=u.device) + 0.5) / n)
            .expand(*cut.shape[::2], n)
            .contiguous()
        )
        picked = torch.searchsorted(cut.movedim(1, -1).contiguous(), even).clamp(max=cut.shape[1] - 1)
        drawn = u.gather(1, picked.movedim(-1, 1)[..., None].expand(-1, -1, -1, u.shape[-1]))
    off, here = u - mean, drawn - drawn.mean(1, keepdim=True)
    wanted = torch.einsum("sqb,sqbi,sqbj->sbij", share, off, off)
    found = torch.einsum("snbi,snbj->sbij", here, here) / n
    root, failed = torch.linalg.cholesky_ex(found)
    target, failed_too = torch.linalg.cholesky_ex(wanted)
    well = (failed == 0) & (failed_too == 0)
    eye = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
    root = torch.where(well[..., None, None], root, eye)
    stretch = torch.where(well[..., None, None], target, eye) @ torch.linalg.inv(root)
    stretch = torch.where((stretch.abs().amax((-2, -1)) < MAX_STRETCH)[..., None, None], stretch, eye)
    return mean + (stretch[:, None] @ here[..., None])[..., 0]
