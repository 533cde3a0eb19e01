"""What EM sums over rows for a mixture of Gaussians: 1, x, and the products that its covariances are made of."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DENSE", "n_products", "products_of"]

DENSE = ("full", "tied")  # covariances with products of different tokens


def products_of(rows: Tensor, covariance_type: str, *, gaps: bool = False) -> Tensor:
    """What EM sums over rows (N, T): 1, x and the products of tokens that the covariances are made of, (P, N).

    With ``gaps``, of diagonal and spherical covariances alone: zeros for the missing cells, and last which cells are
    observed.
    """
    x = rows.mT.contiguous()
    n_tokens = len(x)
    if covariance_type not in DENSE:
        observed = [(~x.isnan()).to(x)] if gaps else []
        x = x.nan_to_num(0.0) if gaps else x
        second = x.square() if covariance_type == "diag" else x.square().sum(0, keepdim=True)
        return torch.cat([x.new_ones(1, x.shape[1]), x, second, *observed])
    out = x.new_empty(n_products(n_tokens, covariance_type), x.shape[1])
    out[0], out[1 : n_tokens + 1] = 1.0, x
    end = n_tokens + 1
    for i in range(n_tokens):  # in the order of tril_indices
        torch.mul(x[: i + 1], x[i], out=out[end : end + i + 1])
        end += i + 1
    return out


def n_products(n_tokens: int, covariance_type: str) -> int:
    """P of the products, where no cell is missing."""
    second = {"diag": n_tokens, "spherical": 1}.get(covariance_type, n_tokens * (n_tokens + 1) // 2)
    return 1 + n_tokens + second
