"""Shares that add up to one from real numbers, each of them as exact as the other.

    z_k = 1 / (1 + exp(-(u_k - log(K - k)))),    y_k = z_k prod_{j < k} (1 - z_j),    y_K = prod_j (1 - z_j)

as `torch.distributions.StickBreakingTransform`, k = 1 .. K - 1, with log z and log(1 - z) both by the logarithm of a
sigmoid. Torch takes 1 - z of a z that is at most 1 - 2e-16, so that no share but the first comes near 0: of a
Dirichlet(0.01) that leaves out two thirds of a corner.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.distributions.transforms import IndependentTransform, StickBreakingTransform
from torch.nn.functional import logsigmoid, pad

__all__ = ["Sticks", "with_exact_shares"]


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


def with_exact_shares(transform: Any) -> Any:
    """A transform, or one of independent parts, with `Sticks` where it breaks sticks."""
    if isinstance(transform, IndependentTransform):
        return IndependentTransform(
            with_exact_shares(transform.base_transform), transform.reinterpreted_batch_ndims
        )
    return Sticks() if isinstance(transform, StickBreakingTransform) else transform


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
