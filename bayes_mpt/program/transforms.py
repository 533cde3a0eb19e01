"""Positive numbers, and shares that add up to one, from real numbers: each of them as exact as the other.

A positive number is exp(u), and where that leaves the floating-point numbers the smallest or the largest of them.
Shares are

    z_k = 1 / (1 + exp(-(u_k - log(K - k)))),    y_k = z_k prod_{j < k} (1 - z_j),    y_K = prod_j (1 - z_j)

as of `torch.distributions.StickBreakingTransform`, k = 1 .. K - 1, with log z and log(1 - z) both by the logarithm of a
sigmoid. Torch takes 1 - z of a z that is at most 1 - 2e-16, so that no share but the first comes near 0: of a
Dirichlet(0.01) that leaves out two thirds of a corner.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.distributions.transforms import (
    ComposeTransform,
    ExpTransform,
    IndependentTransform,
    StickBreakingTransform,
)
from torch.nn.functional import logsigmoid, pad

__all__ = ["Positive", "Sticks", "carried", "exact_transform"]


class Positive(Transform):
    """Real numbers to positive ones, never 0 nor infinite.

    Examples
    --------
    >>> u = torch.tensor([-800.0, 0.0, 800.0], dtype=torch.float64)
    >>> [f"{float(z):.3g}" for z in Positive()(u)]
    ['2.23e-308', '1', '1.8e+308']
    """

    domain = constraints.real
    codomain = constraints.positive
    bijective = True
    sign = 1

    def _call(self, x: Tensor) -> Tensor:
        return x.exp().clamp(torch.finfo(x.dtype).tiny, torch.finfo(x.dtype).max)

    def _inverse(self, y: Tensor) -> Tensor:
        return y.clamp(min=torch.finfo(y.dtype).tiny).log()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log dy / dx = x, also where y is at an end."""
        return x


class Sticks(Transform):
    """Real vectors (..., K - 1) to shares (..., K), no less than the smallest normal number of floating point.

    Examples
    --------
    >>> u = torch.tensor([-100.0, 100.0], dtype=torch.float64)
    >>> [f"{float(share):.2g}" for share in Sticks()(u)]
    ['1.9e-44', '1', '3.7e-44']
    """

    domain = constraints.real_vector
    codomain = constraints.simplex
    bijective = True

    def _call(self, x: Tensor) -> Tensor:
        _, log_share = _logs(x)
        return log_share.exp().clamp(min=torch.finfo(x.dtype).tiny)

    def _inverse(self, y: Tensor) -> Tensor:
        y = y.clamp(min=torch.finfo(y.dtype).tiny)
        left = y.flip(-1).cumsum(-1).flip(-1)[..., 1:]  # no difference of numbers near 1
        return y[..., :-1].log() - left.log() + _offset(left)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum over k of log d y_k / d u_k = log y_k + log(1 - z_k): (..., K - 1) -> (...)."""
        log_left, log_share = _logs(x)
        return (log_share[..., :-1] + log_left).sum(-1)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """(..., K - 1) -> (..., K)."""
        return torch.Size((*shape[:-1], shape[-1] + 1))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """(..., K) -> (..., K - 1)."""
        return torch.Size((*shape[:-1], shape[-1] - 1))


def exact_transform(transform: Any) -> Any:
    """A transform, its parts or one of independent parts, with `Positive` and `Sticks` in place of torch's."""
    if isinstance(transform, IndependentTransform):
        return IndependentTransform(
            exact_transform(transform.base_transform), transform.reinterpreted_batch_ndims
        )
    if isinstance(transform, ComposeTransform) and transform.parts:
        return ComposeTransform([exact_transform(part) for part in transform.parts])
    if isinstance(transform, ExpTransform):
        return Positive()
    return Sticks() if isinstance(transform, StickBreakingTransform) else transform


def carried(transform: Any, x: Tensor) -> Tensor:
    """What values made of real numbers x by a transform of one event carry: x, of shares their logarithms."""
    return _logs(x)[1] if isinstance(transform, Sticks) else x


def _logs(x: Tensor) -> tuple[Tensor, Tensor]:
    """log(1 - z) (..., K - 1), and the logarithms of the shares (..., K)."""
    v = x - _offset(x)
    log_left = logsigmoid(-v)
    before = pad(log_left.cumsum(-1), (1, 0))
    return log_left, pad(logsigmoid(v), (0, 1)) + before


def _offset(x: Tensor) -> Tensor:
    """log(K - k), with which u of 0 means equal shares: (K - 1,)."""
    n = x.shape[-1]
    return torch.arange(n, 0, -1, dtype=x.dtype, device=x.device).log()
