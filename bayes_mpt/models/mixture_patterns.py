"""What EM expects of rows with missing cells under Gaussians: rows with the same cells observed are taken together.

Of a row with cells o observed, in component k (Ghahramani & Jordan 1994):

    E x = loc + S[:, o] S[o, o]^-1 (x_o - loc_o),        cov x = S - S[:, o] S[o, o]^-1 S[o, :].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_mpt.models.left_out import Key, Shares, plain_shares

__all__ = ["Block", "blocks_of", "expect_block"]

MAX_ROWS = 1024  # of a pattern that stand in one block
MAX_NUMBERS = 2**22  # that the algebra of a block holds at once


class Block(NamedTuple):
    """Patterns that have about as many rows each."""

    x: Tensor
    """(P, R, T), zero where missing"""
    seen: Tensor
    """(P, T), one where observed"""
    live: Tensor
    """(P, R), one for a row, zero where a pattern has fewer rows"""


def blocks_of(rows: Tensor) -> list[Block]:
    """Rows (N, T), NaN where missing, in blocks of patterns that have up to four times as many rows."""
    seen, which = torch.unique(~rows.isnan(), dim=0, return_inverse=True)
    by_size: dict[int, list[tuple[Tensor, Tensor]]] = {}
    order = which.argsort(stable=True)
    for pattern, index in zip(seen, order.split(which.bincount().tolist()), strict=True):
        for part in index.split(MAX_ROWS):
            by_size.setdefault(((len(part) - 1).bit_length() + 1) // 2, []).append((pattern, part))
    blocks = []
    for found in by_size.values():
        n_rows = max(len(index) for _, index in found)
        x = rows.new_zeros(len(found), n_rows, rows.shape[1])
        count = rows.new_zeros(len(found), n_rows)
        for p, (_, index) in enumerate(found):
            x[p, : len(index)] = rows[index].nan_to_num(0.0)
            count[p, : len(index)] = 1.0
        blocks.append(Block(x, torch.stack([pattern for pattern, _ in found]).to(rows), count))
    return blocks


def expect_block(
    block: Block,
    log_weights: Tensor,
    loc: Tensor,
    cov: Tensor,
    shares: Shares = plain_shares,
    key: Key = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of a block's expected rows under Gaussians, and its log-density.

    Parameters
    ----------
    block : Block
        P patterns of up to R rows.
    log_weights, loc : Tensor of shapes (..., K) and (..., K, T)
        Of the components of a mixture, or of several.
    cov : Tensor of shape (..., K, T, T) or (..., 1, T, T)
        Their covariances, or that of all.
    shares : Shares
        How rows are shared by the components, and under which name a stateful rule knows those of this block.

    Returns
    -------
    count, first, second : Tensor of shapes (..., K), (..., K, T), (..., K, T, T)
        Sums of 1, x and x x'.
    total : Tensor of shape (...)
        Nats of all rows.
    """
    n_tokens = loc.shape[-1]
    of_pattern = loc[..., 0].numel() * n_tokens * (3 * n_tokens + 4 * block.x.shape[1])
    step = max(1, MAX_NUMBERS // of_pattern)
    if step < len(block.x):
        parts = [Block(*part) for part in zip(*(a.split(step) for a in block), strict=True)]
        found = [expect_block(part, log_weights, loc, cov, shares, (*key, i)) for i, part in enumerate(parts)]
        count, first, second, total = (torch.stack(a).sum(0) for a in zip(*found, strict=True))
        return count, first, second, total
    x, seen, live = block
    both = seen[:, :, None] * seen[:, None, :]
    hidden, cov = 1 - seen, cov[..., None, :, :]
    # the observed block of S, and ones for the missing cells: (..., K or 1, P, T, T)
    root = torch.linalg.cholesky(cov * both + torch.diag_embed(hidden))
    precision = torch.cholesky_inverse(root) * both
    log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)  # (..., K or 1, P)
    centre = loc[..., None, None, :]
    off = (x - centre) * seen[:, None]  # (..., K, P, R, T)
    linear = off @ precision
    norm = log_det + math.log(2 * math.pi) * seen.sum(1)
    square = (linear * off).sum(-1)  # (..., K, P, R)
    log_prob = log_weights[..., None, None] - 0.5 * (norm[..., None] + square)
    n_cells = seen.sum(1, keepdim=True).expand_as(live).flatten()
    share, density = shares(key, log_prob.flatten(-2), lambda: square.flatten(-2), n_cells)
    share = share.unflatten(-1, live.shape) * live
    filled = torch.where(seen[:, None] > 0, x, centre + linear @ cov).flatten(-3, -2)  # (..., K, P R, T)
    of_filled = share.flatten(-2)[..., None] * filled
    left = cov - cov @ precision @ cov
    left = (left * (hidden[:, :, None] * hidden[:, None, :])).flatten(-2)  # (..., K or 1, P, T T)
    of_left = (share.sum(-1)[..., None, :] @ left).unflatten(-1, (n_tokens, n_tokens))[..., 0, :, :]
    second = of_filled.mT @ filled + of_left
    return share.sum((-2, -1)), of_filled.sum(-2), second, (density * live.flatten()).sum(-1)
