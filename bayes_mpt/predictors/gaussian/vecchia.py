"""Log-densities of Gaussian tokens given those before them in small sets, with gradients in closed form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bayes_mpt.predictors.gaussian.process import (
    LOG_2PI,
    cholesky,
)

__all__ = ["LogProbGiven", "SumOfParts", "whitened"]


class SumOfParts(torch.autograd.Function):
    """A sum of many parts and its gradient to the leaves, without keeping more than one part's graph at a time."""

    @staticmethod
    def forward(ctx: Any, parts: Callable[[], Iterator[Tensor]], *leaves: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=leaves[0].device)
        grads = [torch.zeros_like(leaf) for leaf in leaves]
        with torch.enable_grad():
            for part in parts():
                total = total + part.detach()
                for grad, more in zip(
                    grads, torch.autograd.grad(part, leaves, materialize_grads=True), strict=True
                ):
                    grad += more
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(grad * g for g in ctx.saved_tensors))


class LogProbGiven(torch.autograd.Function):
    """Log-densities (B, b) of those in the places ``own`` of residuals (B, k), each given all before it."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, cov: Tensor, own: Tensor) -> Tensor:
        root, white, at = whitened(residual, cov, own)
        ctx.save_for_backward(root, white, own)
        scale = root.diagonal(dim1=1, dim2=2).gather(1, at)
        return torch.where(
            own >= 0, -0.5 * (white[..., 0].gather(1, at).square() + LOG_2PI) - scale.log(), 0.0
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        root, white, own = ctx.saved_tensors
        at = own.clamp(min=0)[:, None, :]
        grad = torch.where(own >= 0, grad, 0.0)[:, None, :]
        z = white.mT.gather(2, at)  # (B, 1, b)
        # L^-T [z_<i, 0] and L^-T e_i, together
        before = torch.arange(white.shape[1], device=own.device)[:, None] < at  # (B, k, b)
        unit = torch.zeros_like(before, dtype=white.dtype).scatter_(1, at, 1.0)
        a, v = torch.linalg.solve_triangular(root.mT, torch.cat([white * before, unit], 2), upper=True).chunk(
            2, 2
        )
        by_residual = -(grad * z * v).sum(2)
        if not ctx.needs_input_grad[1]:
            return by_residual, None, None
        # 1/2 [z (v a' + a v') + (z^2 - 1) v v'] = 1/2 (v b' + b v'),  b = z a + (z^2 - 1)/2 v,  summed over i
        outer = (0.5 * grad * (z * a + 0.5 * (z.square() - 1) * v)) @ v.mT
        return by_residual, outer + outer.mT, None


def whitened(residual: Tensor, cov: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L (B, k, k), z = L^-1 r (B, k, 1), and places (B, b) that can be gathered from."""
    root = cholesky(cov)
    return root, torch.linalg.solve_triangular(root, residual[..., None], upper=False), own.clamp(min=0)
