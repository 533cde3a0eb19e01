"""What EM expects of rows with missing cells under Gaussians: rows with the same cells observed are taken together.

Of a row with cells o observed and h hidden, in component k (Ghahramani & Jordan 1994), with Q = S^-1:

    cov x_h = Q_hh^-1,    E x_h = loc_h - Q_hh^-1 Q_ho (x_o - loc_o),    log det S_oo = log det S + log det Q_hh,

and the squared distance of x_o is that of the row whose hidden cells stand at their expectations. All matrices of a
pattern are as large as its hidden cells are many.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_mpt.models.left_out import Key, Shares, plain_shares

__all__ = ["SMALL", "Block", "Inverse", "blocks_of", "expect_block", "invert"]

MAX_ROWS = 1024  # of a pattern that stand in one block
FEW_ROWS = 4  # of a pattern, which then stand each by itself
MANY, SMALL = 256, 8  # matrices, and their size, from where and up to which they are inverted side by side
MAX_NUMBERS = 2**22  # that the algebra of a block holds at once


class Block(NamedTuple):
    """Patterns that have about as many rows each, and about as many hidden cells."""

    x: Tensor
    """(P, R, T), zero where missing"""
    seen: Tensor
    """(P, T), one where observed"""
    live: Tensor
    """(P, R), one for a row, zero where a pattern has fewer rows"""
    hidden: Tensor
    """(P, M) columns of the hidden cells, 0 where a pattern has fewer"""
    hides: Tensor
    """(P, M), one for a hidden cell, zero where a pattern has fewer"""


class Inverse(NamedTuple):
    """Inverses of covariances S (..., K or 1, T, T)."""

    root: Tensor
    """L^-1, where S = L L'"""
    precision: Tensor
    """S^-1"""
    log_det: Tensor
    """log det S (..., K or 1)"""

    @staticmethod
    def of(scale: Tensor) -> Inverse:
        """Of Cholesky factors."""
        eye = torch.eye(scale.shape[-1]).to(scale)
        root = torch.linalg.solve_triangular(scale, eye, upper=False)
        return Inverse(root, root.mT @ root, 2 * scale.diagonal(dim1=-2, dim2=-1).log().sum(-1))


def blocks_of(rows: Tensor) -> list[Block]:
    """Rows (N, T), NaN where missing, in blocks of patterns.

    Those of a block have up to four times as many rows, and up to twice as many hidden cells.
    """
    seen, which = torch.unique(~rows.isnan(), dim=0, return_inverse=True)
    by_size: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    order = which.argsort(stable=True)
    for pattern, index in zip(seen, order.split(which.bincount().tolist()), strict=True):
        hidden = (~pattern).nonzero()[:, 0]
        # few blocks and no room for rows that are not there cost less than a matrix saved
        for part in index.split(MAX_ROWS if len(index) > FEW_ROWS else 1):
            size = ((len(part) - 1).bit_length() + 1) // 2, max(1, (len(hidden) - 1).bit_length())
            by_size.setdefault(size, []).append((hidden, part))
    blocks = []
    for found in by_size.values():
        n_rows, n_hidden = (max(len(a) for a in of) for of in list(zip(*found, strict=True))[::-1])
        x = rows.new_zeros(len(found), n_rows, rows.shape[1])
        live, hides = rows.new_zeros(len(found), n_rows), rows.new_zeros(len(found), n_hidden)
        columns = torch.zeros(len(found), n_hidden, dtype=torch.long, device=rows.device)
        of_cells = rows.new_ones(len(found), rows.shape[1])
        for p, (hidden, index) in enumerate(found):
            x[p, : len(index)] = rows[index].nan_to_num(0.0)
            live[p, : len(index)] = 1.0
            columns[p, : len(hidden)], hides[p, : len(hidden)] = hidden, 1.0
            of_cells[p, hidden] = 0.0
        blocks.append(Block(x, of_cells, live, columns, hides))
    return blocks


def expect_block(
    block: Block,
    log_weights: Tensor,
    loc: Tensor,
    inverse: Inverse,
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
    inverse : Inverse
        Of their covariances, or of that of all.
    shares : Shares
        How rows are shared by the components, and under which name a stateful rule knows those of this block.

    Returns
    -------
    count, first, second : Tensor of shapes (..., K), (..., K, T), (..., K, T, T)
        Sums of 1, x and x x'.
    total : Tensor of shape (...)
        Nats of all rows.
    """
    n_tokens, n_hidden = loc.shape[-1], block.hidden.shape[1]
    of_pattern = loc[..., 0].numel() * (3 * n_hidden * n_hidden + 5 * n_tokens * block.x.shape[1])
    step = max(1, MAX_NUMBERS // of_pattern)
    if step < len(block.x):
        parts = [Block(*part) for part in zip(*(a.split(step) for a in block), strict=True)]
        found = [
            expect_block(part, log_weights, loc, inverse, shares, (*key, i)) for i, part in enumerate(parts)
        ]
        count, first, second, total = (torch.stack(a).sum(0) for a in zip(*found, strict=True))
        return count, first, second, total
    x, seen, live, hidden, hides = block
    cov, log_det_hidden = _given_observed(inverse.precision, hidden, hides)
    log_det = inverse.log_det[..., None] + log_det_hidden
    off = (x - loc[..., None, None, :]) * seen[:, None]  # (..., K, P, R, T)
    index = hidden[:, None].expand(*off.shape[:-1], n_hidden)
    along = (off.flatten(-3, -2) @ inverse.precision).view_as(off).gather(-1, index)  # Q_ho (x_o - loc_o)
    off.scatter_add_(-1, index, -(along @ cov))
    off = off.flatten(-3, -2)  # (..., K, P R, T)
    square = (off @ inverse.root.mT).square().sum(-1).unflatten(-1, live.shape)  # (..., K, P, R)
    norm = log_det + math.log(2 * math.pi) * seen.sum(1)
    log_prob = log_weights[..., None, None] - 0.5 * (norm[..., None] + square)
    n_cells = seen.sum(1, keepdim=True).expand_as(live).flatten()
    share, density = shares(key, log_prob.flatten(-2), lambda: square.flatten(-2), n_cells)
    share = share.unflatten(-1, live.shape) * live
    filled = loc[..., None, :] + off
    of_filled = share.flatten(-2)[..., None] * filled
    left = (share.sum(-1)[..., None, None] * cov).flatten(-3)  # (..., K, P M M)
    cells = (n_tokens * hidden[:, :, None] + hidden[:, None, :]).flatten()
    of_left = left.new_zeros(*left.shape[:-1], n_tokens * n_tokens).index_add_(-1, cells, left)
    second = of_filled.mT @ filled + of_left.unflatten(-1, (n_tokens, n_tokens))
    return share.sum((-2, -1)), of_filled.sum(-2), second, (density * live.flatten()).sum(-1)


def _given_observed(precision: Tensor, hidden: Tensor, hides: Tensor) -> tuple[Tensor, Tensor]:
    """Q_hh^-1 (..., P, M, M), zero where a pattern hides fewer cells, and log det Q_hh (..., P), of Q (..., T, T)."""
    of_hidden = hides[:, :, None] * hides[:, None, :]
    if len(hidden) * precision[..., 0, 0].numel() < MANY or hidden.shape[1] > SMALL:
        found = precision[..., hidden[:, :, None], hidden[:, None, :]] * of_hidden
        root = torch.linalg.cholesky(found + torch.diag_embed(1 - hides))  # ones for cells that are not there
        return torch.cholesky_inverse(root) * of_hidden, 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    # the numbers of all matrices stand side by side: (M, M, P, ...)
    n_tokens, shape = precision.shape[-1], (*precision.shape[:-2], *hidden.shape)
    index = (n_tokens * hidden.mT[:, None] + hidden.mT).flatten()
    a = precision.reshape(-1, n_tokens * n_tokens).mT[index].reshape(*of_hidden.mT.shape[1:], len(hidden), -1)
    a = a * of_hidden.permute(1, 2, 0)[..., None]
    a.diagonal(dim1=0, dim2=1).add_((1 - hides)[:, None])
    log_det = invert(a)
    cov = (a * of_hidden.permute(1, 2, 0)[..., None]).permute(3, 2, 0, 1)
    return cov.reshape(*shape, shape[-1]), log_det.mT.reshape(shape[:-1])


def invert(a: Tensor) -> Tensor:
    """Positive definite matrices (M, M, ...) become their inverses, in place; their log-determinants (...)."""
    log_det = a.new_zeros(a.shape[2:])
    for i in range(len(a)):  # Gauss and Jordan: without exchanges safe, as the pivots are those of Cholesky
        pivot, column = a[i, i].clone(), a[:, i].clone()
        row = a[i] / pivot
        log_det += pivot.log()
        a.addcmul_(column[:, None], row, value=-1)
        a[i], a[:, i] = row, -column / pivot
        a[i, i] = 1 / pivot
    return log_det
