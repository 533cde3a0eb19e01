"""Newton's method on log-densities of all rows side by side, and Gaussians at their modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LaplaceApproximation", "curvature", "newton", "root_of", "times_covariance"]

LAST_GAIN = 1e-9  # nats: the next step would move the nodes by 1e-9 standard deviations
LONGEST_STEP = 5.0


class LaplaceApproximation(NamedTuple):
    """A Gaussian approximation of each row's posterior."""

    mode: Tensor
    """(..., N, d)"""
    root: Tensor
    """(..., N, d, d): covariance = root root'."""


@torch.enable_grad()
def newton(
    log_prob: Callable[[Tensor], Tensor], u: Tensor, max_steps: int, sure: float
) -> LaplaceApproximation:
    """Newton's method on (S, N, d) -> (S, N), all rows side by side, and the curvature at the last step but one.

    Of a log-density no more than the share ``sure`` is to be gained by a step that need not climb. Kept by hand:
    scipy's optimisers climb one row at a time, and not within torch's graph.
    """
    u = u.detach().requires_grad_()
    before = log_prob(u)
    for _ in range(max_steps):
        (slope,) = torch.autograd.grad(before.sum(), u, create_graph=True)
        root = root_of(curvature(slope, u))
        slope = slope.detach()
        step = times_covariance(root, slope)
        gain = (slope * step).sum(-1)  # (S, N)
        longest = step.abs().amax(-1, keepdim=True)
        step = step * (LONGEST_STEP / longest.clamp(min=LONGEST_STEP))
        if not bool((gain > LAST_GAIN).any()):  # Newton's last step squares what is left
            u = u + step
            break
        there = gain <= sure * (1 + before.detach().abs())
        u, before, moved = _walk(log_prob, u.detach(), step, before.detach(), there)
        if not moved:
            break
    return LaplaceApproximation(u.detach(), root)


def _walk(
    log_prob: Callable[[Tensor], Tensor], u: Tensor, step: Tensor, before: Tensor, there: Tensor
) -> tuple[Tensor, Tensor, bool]:
    """Halve the step of each row until it climbs, of those that are not there yet; log p there, and if any did."""
    share = torch.ones_like(before)
    best, better = u, there.clone()
    for _ in range(20):
        trial = (u + share[..., None] * step).requires_grad_()
        try:
            found = log_prob(trial)
        except ValueError:  # so far away that the program refuses: all rows shorter
            share = share / 2
            continue
        good = (found.detach() > before) & torch.isfinite(found.detach()) & ~better
        if bool(good.all()):
            return trial, found, True
        best = torch.where(good[..., None], trial.detach(), best)
        better |= good
        if bool(better.all()):
            break
        share = torch.where(better, share, share / 2)
    best.requires_grad_()
    return best, log_prob(best), bool((better & ~there).any())


def curvature(slope: Tensor, u: Tensor) -> Tensor:
    """-d slope / du of each row: (..., N, d), (..., N, d) -> (..., N, d, d)."""
    width = u.shape[-1]
    one = torch.eye(width, dtype=u.dtype, device=u.device)
    one = one.reshape(width, *[1] * (u.ndim - 1), width).expand(-1, *u.shape)  # (d, ..., N, d)
    (rows,) = torch.autograd.grad(
        slope, u, one, retain_graph=True, is_grads_batched=True, materialize_grads=True
    )
    rows = rows.movedim(0, -2)
    return -0.5 * (rows + rows.mT)


def root_of(curvature: Tensor) -> Tensor:
    """R with R R' = |H|^-1, (..., N, d, d); of a saddle the signs of its axes are dropped."""
    lower, info = torch.linalg.cholesky_ex(curvature)
    if not bool(info.any()):
        one = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, one.expand_as(lower), upper=False).mT.detach()
    one = torch.eye(curvature.shape[-1], dtype=curvature.dtype, device=curvature.device)
    known = torch.isfinite(curvature).all(-1).all(-1)[..., None, None]
    value, vector = torch.linalg.eigh(torch.where(known, curvature, one))  # else a step along the slope
    return (vector * value.abs().clamp(min=1e-10).rsqrt()[..., None, :]).detach()


def times_covariance(root: Tensor, slope: Tensor) -> Tensor:
    """Root root' slope, (..., d)."""
    return (root @ (root.mT @ slope[..., None]))[..., 0]
