"""Modes that only a few visible tokens show.

The token that tells the sign of a latent may be hidden: a posterior with one mode given all tokens has two given some.
Modes are followed from one visible set to the next, which finds no more of them. So they are searched at a few small
sets once, where a grid or climbs say that there may be several, and what is found there are places that every visible
set is climbed from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayes_mpt.predictors.nodes.conjugacy import prior_draws
from bayes_mpt.predictors.nodes.mixture import Modes
from bayes_mpt.predictors.nodes.placing import Placing, RowDensity
from bayes_mpt.predictors.nodes.rules import MAX_HERMITE

if TYPE_CHECKING:
    from bayes_mpt.predictors.nodes.adaptive import AdaptiveNodes
    from bayes_mpt.program.arguments import Args

__all__ = ["apart", "beyond_valleys", "further_starts", "has_hills", "place_inside", "small_sets"]

MAX_ALONE = 8  # tokens, of which each is tried alone
MANY = 2**16  # cells, from which fewer sets are tried in all rows
N_GRID = {1: 129, 2: 33}  # points along each axis
BEYOND, NEARBY = 1.5, 5.0  # times the farthest draw, and standard deviations more, that a grid reaches
LOW = 12.0  # nats below the top, where a maximum is as good as none
N_DRAWS = 9  # of the prior
MATTERS = 1e-3  # share of the mass from which a mode is missed
APART = 0.5  # standard deviations, from which a mode is another
N_WAY = 17  # places on the way from one that few tokens show to a mode
VALLEY = 1e-6  # nats that a density falls on it, from which another mode may stand before


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
def beyond_valleys(log_prob: Callable[[Tensor], Tensor], places: Tensor, modes: Tensor) -> Tensor:
    """Which places (P, d) see a density (M, d) -> (M,) fall on the straight way to each of the modes (J, d).

    From the others a climb may end at a mode that is known, and each visible set would pay for it.

    Examples
    --------
    >>> two = lambda u: torch.logaddexp(-2 * (u - 3).square(), -2 * (u + 3).square())[:, 0]
    >>> beyond_valleys(two, torch.tensor([[-2.5], [1.0]]), torch.tensor([[3.0]]))
    tensor([ True, False])
    """
    share = torch.linspace(0, 1, N_WAY).to(modes)[:, None, None, None]
    way = places[:, None] + share * (modes - places[:, None])  # (W, P, J, d)
    value = log_prob(way.flatten(0, 2)).unflatten(0, way.shape[:3])
    return (value.diff(dim=0) < -VALLEY).any(0).all(1)


@torch.no_grad()
def has_hills(log_prob: Callable[[Tensor], Tensor], mode: Tensor, root: Tensor, draws: Tensor) -> bool:
    """Whether a density (M, N, d) -> (M, N) may have several modes, in any row: it has several maxima on a grid.

    Of one or two latents; steps of the grid grow outwards from a mode (N, d), by its root (N, d, d), to beyond draws
    (P, N, d) of the prior. Of more latents a grid is dearer than climbs, and the answer is yes.
    """
    width = mode.shape[-1]
    if width not in N_GRID:
        return True
    scale = root.norm(dim=-1).clamp(min=1e-8)  # (N, d)
    far = (BEYOND * ((draws - mode) / scale).abs().amax(0) + NEARBY).asinh()
    one = torch.linspace(-1, 1, N_GRID[width]).to(mode)
    at = torch.cartesian_prod(*[one] * width).reshape(-1, 1, width)
    value = log_prob(mode + scale * (far * at).sinh()).nan_to_num(-math.inf, -math.inf)
    value = (value - value.amax(0)).clamp(min=-LOW)
    grid = value.mT.reshape(-1, 1, *[N_GRID[width]] * width)
    around = torch.nn.functional.max_pool1d if width == 1 else torch.nn.functional.max_pool2d
    tops = (grid == around(grid, 3, 1, 1)) & (grid > -LOW)
    return bool((tops.flatten(1).sum(1) > 1).any())


@torch.no_grad()
def further_starts(at: AdaptiveNodes, args: Args, x: Tensor, near: Modes) -> Tensor | None:
    """Where climbs in every row begin (J, N, d) when few of its tokens are visible; None where one mode is all.

    ``near`` are the modes of the same rows for other visible tokens.
    """
    traces = prior_draws(at.model, args.filled, N_DRAWS)
    draws = torch.stack([at.within_reach(at.space.pack(t, len(x))[0]) for t in traces])
    parts = []
    for seen in small_sets(x.shape[1], halves=False)[: 4 if x.numel() <= MANY else 2]:
        visible = seen.to(x.device)
        density = at.row_density(args, x, visible, {})
        if has_hills(partial(_at_none, density), near.mode[0], near.root[0], draws):
            starts = at.row_starts(args, x, visible)
            parts += [] if starts is None else [starts]
    return torch.cat(parts) if parts else None


@torch.no_grad()
def place_inside(at: AdaptiveNodes, args: Args, x: Tensor, u: Tensor) -> None:
    """Let nodes in rows or groups stand around modes that few of their tokens show besides.

    They are looked for at one place u (1, 1, d) of the other latents.
    """
    rows = at.rows
    if rows is None or not rows.width:
        return
    held = {name: v[None] for name, v in at.space._replace(depth=0).values(u)[0].items()}
    found = [rows.starts(args, held, x, seen.to(x.device)) for seen in rows.small_sets(x.shape[1])]
    starts = [s for s in (rows.placing.starts, *found) if s is not None]
    if any(s is not None for s in found):
        at.rows = rows.placed(Placing(rows.width <= MAX_HERMITE, torch.cat(starts)))


def _at_none(density: RowDensity, u: Tensor) -> Tensor:
    """The density of rows beside which nothing is held."""
    return density(u, torch.zeros(len(u), dtype=torch.long, device=u.device))
