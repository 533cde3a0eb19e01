"""Clusters of rows for the starts of mixtures: k-means of several tables and tries, all of them side by side.

Centres are drawn from the rows, one after the other, each the best of some with a probability in proportion to the
squared distance from those that are there (Arthur & Vassilvitskii 2007); then rows go to the nearest centre and centres
to the mean of their rows, until they stay (Lloyd 1982). One call for many small tables takes a fraction of the time of
as many calls. What is found of a table does not depend on the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["centres_of", "nearest", "places_of"]

ROWS = 512  # of a table, on which k-means runs
STEPS = 100
STAYS = 1e-4  # of the mean variance of the columns: the squared way of all centres below which they stay


def centres_of(tables: Sequence[Tensor], n_centres: int, seed: int, n_tries: int) -> Tensor:
    """The centres (B, K, T) of k-means on some rows of each of B tables.

    Parameters
    ----------
    tables : sequence of B Tensors of shape (N_b, T)
        In units in which columns can be compared, each about its mean; at least K rows, of which no cell is missing.
        Of more than `ROWS` those at `places_of` are read.
    n_centres : int
        K. A centre whose rows have all gone to others stays where it is.
    seed : int
        Of the rows and of the draws, which are the same for each table.
    n_tries : int
        Of which the one with the least sum of squares is taken; none: random rows, and one step from there.

    Examples
    --------
    >>> rows = torch.tensor([[0.0], [2.0], [10.0], [12.0]], dtype=torch.float64)
    >>> centres_of([rows], 2, seed=0, n_tries=3).sort(1).values.flatten()
    tensor([ 1., 11.], dtype=torch.float64)
    """
    which = {n: places_of(n, seed) for n in {len(table) for table in tables}}
    some = [table[which[len(table)].to(table.device)] for table in tables]
    n_rows = max(map(len, some))
    rows = some[0].new_zeros(len(some), n_rows, some[0].shape[1])
    count = rows.new_zeros(len(some), n_rows)  # of the rows of smaller tables: none
    for place, shown, table in zip(rows, count, some, strict=True):
        place[: len(table)], shown[: len(table)] = table, 1.0
    problem = torch.arange(len(some), device=rows.device).repeat_interleave(max(1, n_tries))
    rows, count = rows[problem], count[problem]
    if n_tries:
        draws = np.random.RandomState(seed).random_sample((n_tries, n_centres, 2 + int(math.log(n_centres))))
        start = _drawn(rows, count, torch.from_numpy(draws).to(rows).repeat(len(some), 1, 1))
    else:
        picks = [np.random.RandomState(seed).choice(len(table), n_centres, replace=False) for table in some]
        start = torch.stack([table[pick] for table, pick in zip(some, picks, strict=True)])
    centres, squares = _settled(rows, count, start, STEPS if n_tries else 1)
    best = squares.view(len(some), -1).argmin(1)
    return centres.view(len(some), -1, *centres.shape[1:])[torch.arange(len(some)), best]


def nearest(log_prob: Tensor) -> tuple[Tensor, Tensor]:
    """Shares (..., K, n) of rows that are wholly of the likeliest component, by log w + log p (..., K, n); and that."""
    most, which = log_prob.max(-2, keepdim=True)
    return torch.zeros_like(log_prob).scatter_(-2, which, 1.0), most[..., 0, :]


def places_of(n_rows: int, seed: int) -> Tensor:
    """Of the rows of a table that k-means reads."""
    if n_rows <= ROWS:
        return torch.arange(n_rows)
    own = np.random.RandomState(seed).randint(2**31 - 1)  # draws of centres do not go with those of rows
    return torch.from_numpy(np.sort(np.random.RandomState(own).choice(n_rows, ROWS, replace=False)))


def _drawn(rows: Tensor, count: Tensor, draws: Tensor) -> Tensor:
    """Centres (P, K, T) among rows (P, n, T), of which each is there so often (P, n), by uniform draws (P, K, L)."""
    square = rows.square().sum(-1)
    last = (count > 0).sum(-1, keepdim=True) - 1
    far = torch.full_like(square, math.inf)  # from the nearest centre, squared
    found = []
    for k in range(draws.shape[1]):
        chance = (count if k == 0 else count * far).cumsum(-1)
        tried = draws[:, k] if k else draws[:, 0, :1]
        which = torch.searchsorted(chance, tried * chance[:, -1:]).minimum(last)  # (P, L)
        centre = rows.gather(1, which[..., None].expand(-1, -1, rows.shape[2]))
        # |x - m|^2 = |x|^2 - 2 m' x + |m|^2
        to_each = square[:, None] - 2 * centre @ rows.mT + centre.square().sum(-1, keepdim=True)
        left = far[:, None].minimum(to_each.clamp_(min=0))
        best = (left * count[:, None]).sum(-1).argmin(-1)
        problem = torch.arange(len(rows), device=rows.device)
        far = left[problem, best]
        found.append(centre[problem, best])
    return torch.stack(found, 1)


def _settled(rows: Tensor, count: Tensor, start: Tensor, n_steps: int) -> tuple[Tensor, Tensor]:
    """Where centres (P, K, T) come to stay, and the sums of squares (P,) before their last step."""
    square = (count * rows.square().sum(-1)).sum(-1)
    stays = STAYS * square / count.sum(-1) / rows.shape[2]
    end, squares = start.clone(), square.clone()
    under_way, centres = torch.arange(len(rows), device=rows.device), start
    for _ in range(n_steps):
        # |x - m|^2 is least where m' x - |m|^2 / 2 is largest
        near = torch.baddbmm(-0.5 * centres.square().sum(-1, keepdim=True), centres, rows.mT)
        most = near.amax(1, keepdim=True)
        squares[under_way] = square - 2 * (count * most[:, 0]).sum(-1)
        share = (near == most).to(rows) * count[:, None]  # a row between two centres goes to both
        n = share.sum(-1, keepdim=True)
        moved = torch.where(n > 0, share @ rows / n.clamp(min=1.0), centres)
        goes = (moved - centres).square().sum((1, 2)) > stays
        end[under_way], centres = moved, moved
        if not bool(goes.all()):
            under_way = under_way[goes]
            if not len(under_way):
                break
            rows, count, centres, square, stays = (a[goes] for a in (rows, count, centres, square, stays))
    return end, squares
