"""Modes that only a few visible tokens show.

The token that tells the sign of a latent may be hidden: a posterior with one mode given all tokens has two given some.
Modes are followed from one visible set to the next, which finds no more of them. So they are searched at a few small
sets once, and what is found there are places that every visible set is climbed from.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bayes_mpt.predictors.nodes.adaptive import AdaptiveNodes
    from bayes_mpt.program.arguments import Args

__all__ = ["apart", "further_starts", "small_sets"]

MAX_ALONE = 8  # tokens, of which each is tried alone
MANY = 2**16  # cells, from which fewer sets are tried in all rows
MATTERS = 1e-3  # share of the mass from which a mode is missed
APART = 0.5  # standard deviations, from which a mode is another


def small_sets(n_tokens: int, halves: bool = True) -> list[Tensor]:
    """Visible sets (T,) that are small: single tokens where these are few, else quarters, and two halves.

    Examples
    --------
    >>> [int(s.sum()) for s in small_sets(4)], [int(s.sum()) for s in small_sets(20)]
    ([1, 1, 1, 1, 2, 2], [5, 5, 5, 5, 10, 10])
    """
    order = torch.randperm(n_tokens, generator=torch.Generator().manual_seed(0))
    alone = halves and n_tokens <= MAX_ALONE
    parts = [*order.tensor_split(n_tokens if alone else min(n_tokens, 4))]
    parts += [order[: n_tokens // 2], order[n_tokens // 2 :]] if halves else []
    sets = [torch.zeros(n_tokens, dtype=torch.bool).index_fill(0, some, True) for some in parts]
    return [seen for seen in sets if 0 < int(seen.sum()) < n_tokens]


def apart(mode: Tensor, root: Tensor, log_mass: Tensor, known: Tensor) -> Tensor:
    """Of modes (P, d) with roots (P, d, d) and masses (P,) those that matter and are none of the known ones (M, d)."""
    off = torch.linalg.solve(root[:, None], (mode[:, None] - known)[..., None])[..., 0]
    return mode[(off.norm(dim=-1).amin(1) > APART) & (log_mass.log_softmax(0) > math.log(MATTERS))]


@torch.no_grad()
def further_starts(at: AdaptiveNodes, args: Args, x: Tensor) -> Tensor | None:
    """Where climbs in every row begin (J, N, d) when few of its tokens are visible; None where one mode is all."""
    parts = [
        starts
        for seen in small_sets(x.shape[1], halves=False)[: 4 if x.numel() <= MANY else 2]
        if (starts := at.row_starts(args, x, seen.to(x.device))) is not None
    ]
    return torch.cat(parts) if parts else None
