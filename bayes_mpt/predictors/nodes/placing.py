"""Where the nodes of every row or group stand: around one mode or several, as far as the density reaches.

Rows are independent given all the rest, so that each has nodes of its own, and all are found side by side. Whether the
usual ones serve is decided by evaluation (`decided`): climbs from draws of the prior say whether a row has several
modes, as one with a discrete latent beside a continuous one may, and nodes that reach as far as the density does
say whether its tails fall slowly, as those of the log odds of a Beta(0.1, 0.1) do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from bayes_mpt.predictors.nodes.mixture import Modes
from bayes_mpt.predictors.nodes.newton import newton
from bayes_mpt.predictors.nodes.row_draws import RowDraws
from bayes_mpt.predictors.nodes.rules import Rule

__all__ = ["SHARPER", "Placing", "RowDensity", "integral", "located", "reaching", "several"]

RowDensity = Callable[[Tensor, Tensor], Tensor]
"""log p of every row at u (M, N, d), each at one of S values of all the rest, by their numbers (M,): (M, N)."""

MAX_MODES = 4  # of a row
SHARPER = 16.0  # times what tokens say of a row, in a density that leads from the prior to them
ROUGHLY = 1e-4  # of a log-density: to be gained where such a climb ends
APART = 2.0  # standard deviations of the narrower, from which a mode is another
MATTERS = 12.0  # nats below the first: 6e-6 of its mass
ENDED = 1e-3  # nats: what another step of a climb would gain where it has ended
NEAR = (1.0, 2.0, 4.0, 8.0)  # standard deviations at which the density is looked at first
DOUBLINGS = 10  # beyond the last of these, while it reaches so far
LEAST_DROP, MOST_DROP = 0.5, 1e6  # nats
MARGIN = 1.1
CELLS = 2**22  # log-densities of rows at a time


class Placing(NamedTuple):
    """How nodes are placed in the rows or groups of a table."""

    far: bool = False
    """They reach as far as the density, of up to four latents."""
    starts: Tensor | None = None
    """(J, N, d) where climbs to the J modes of each row begin; None where every row has one."""
    draws: RowDraws | None = None
    """Draws in place of these nodes, where shared latents are drawn too and a rule would take many."""

    @property
    def n_modes(self) -> int:
        """J."""
        return 1 if self.starts is None else len(self.starts)

    def serves(self, n_rows: int) -> Placing:
        """For as many rows: starts are those of rows that were looked at."""
        known = self.starts is not None and self.starts.shape[1] == n_rows
        return self if known else self._replace(starts=None)


def located(
    log_prob: RowDensity,
    start: Tensor,
    placing: Placing,
    cut: float | None,
    max_steps: int,
    sure: float,
    root_at_mode: bool = False,
    lost: Callable[[], Tensor] | None = None,
) -> Modes:
    """Modes of the N rows at S values of all the rest, those of one value after the other: (J, S N, d).

    Parameters
    ----------
    log_prob : callable
        `RowDensity`.
    start : Tensor
        (S, N, d) where the climb of a row with one mode begins.
    placing : Placing
        Where climbs of rows with several begin.
    cut : float, optional
        Nats below the mode to which the density is followed: `Modes.reach`.
    max_steps, sure, root_at_mode, lost
        As of `newton`.
    """
    n_nodes, n_rows, _ = start.shape
    starts = placing.serves(n_rows).starts
    if starts is None:
        found = newton(log_prob, start, max_steps, sure, root_at_mode, lost)
        modes = Modes.one(found._replace(mode=found.mode.flatten(0, 1), root=found.root.flatten(0, 1)))
    else:
        n_modes = len(starts)
        of = torch.arange(n_nodes, device=start.device).repeat(n_modes)
        found = newton(
            lambda u, nodes: log_prob(u, of[nodes]),
            starts[:, None].expand(-1, n_nodes, -1, -1).flatten(0, 1),
            max_steps,
            sure,
            root_at_mode,
        )
        mass = _log_mass(lambda u: log_prob(u, of), found.mode, found.root)
        mode, root, mass = (
            t.unflatten(0, (n_modes, n_nodes)).flatten(1, 2) for t in (found.mode, found.root, mass)
        )
        gone = ~mass.isfinite()  # a climb that has left the floats
        first = (~gone).to(torch.int8).argmax(0)
        row = torch.arange(mode.shape[1], device=mode.device)
        mode = torch.where(gone[..., None], mode[first, row], mode)
        root = torch.where(gone[..., None, None], root[first, row], root)
        modes = Modes(mode, root, torch.where(gone, mass[first, row], mass))
    return modes if cut is None else reaching(log_prob, modes, n_nodes, cut)


def _log_mass(log_prob: Callable[[Tensor], Tensor], mode: Tensor, root: Tensor) -> Tensor:
    """Log of the integral (M, N) around modes (M, N, d), up to a constant."""
    with torch.no_grad(), pyro.validation_enabled(False):
        return log_prob(mode) + torch.linalg.slogdet(root)[1]


@torch.no_grad()
def reaching(log_prob: RowDensity, modes: Modes, n_nodes: int, cut: float) -> Modes:
    """With how far along each axis of the roots, to both sides, the density is above exp(-cut) of that at the mode.

    Between places where it was looked at its fall is taken for a power of the distance, which it is of a
    Gaussian and of an exponential tail, and where it falls to zero it may reach to the next place. The outermost of
    several places counts, so that nodes pass over a valley.
    """
    parts = modes._replace(reach=modes.mode[..., None].expand(*modes.mode.shape, 2))  # by which they share

    def of(u: Tensor) -> Tensor:  # (J, M, S N, d) -> (J, M, S N)
        n_modes, n = u.shape[:2]
        each = torch.arange(n_nodes, device=u.device).repeat(n_modes * n)
        value = log_prob(u.unflatten(2, (n_nodes, -1)).flatten(0, 2), each)
        value = value.unflatten(0, (n_modes, n, n_nodes)).flatten(2, 3)
        return value if n_modes == 1 else value + parts.log_part(u)

    def reached(
        middle: Tensor, axes: Tensor
    ) -> Tensor:  # (J, B, S N, d), (J, A, S N, d) -> (J, B, A, 2, S N)
        places = list(NEAR)

        def drops(at: list[float]) -> Tensor:  # (J, D, B, A, 2, S N)
            to = torch.tensor(at, dtype=axes.dtype, device=axes.device)[:, None, None, None, None, None]
            sides = torch.tensor([-1.0, 1.0], dtype=axes.dtype, device=axes.device)[:, None, None]
            u = middle[:, None, :, None, None] + to * sides * axes[:, None, None, :, None]
            value = of(u.flatten(1, 4)).unflatten(1, u.shape[1:5])
            return (top[:, None, None, None, None] - value).nan_to_num(math.inf, math.inf)

        drop = drops(places)
        for _ in range(DOUBLINGS):
            if not bool((drop[:, -1] < cut).any()):
                break
            places.append(2 * places[-1])
            drop = torch.cat([drop, drops(places[-1:])], 1)
        n_places = len(places)
        number = torch.arange(n_places, device=drop.device)[:, None, None, None, None]
        last = torch.where(drop < cut, number, -1).amax(1)
        low = drop.gather(1, last.clamp(min=0)[:, None])[:, 0].clamp(LEAST_DROP, 0.9 * cut)
        high = drop.gather(1, (last + 1).clamp(max=n_places - 1)[:, None])[:, 0].clamp(min=cut)
        share = (cut / low).log() / (high.clamp(max=MOST_DROP) / low).log()
        share = torch.where(high.isinf(), 1.0, share)  # an edge may be anywhere between
        end = torch.tensor(places, dtype=drop.dtype, device=drop.device)[last.clamp(min=0)] * 2**share
        return torch.where(last < 0, places[0], (MARGIN * end).clamp(max=places[-1]))

    width = modes.mode.shape[-1]
    axes = modes.root.movedim(-1, 1)  # (J, d, S N, d)
    with pyro.validation_enabled(False):
        top = of(modes.mode[:, None])[:, 0]
        found = reached(modes.mode[:, None], axes)[:, 0]  # (J, d, 2, S N)
        if width > 1:  # a funnel is wider on one side of its mode
            half = 0.5 * torch.tensor([-1.0, 1.0], dtype=axes.dtype, device=axes.device)[:, None] * found
            aside = modes.mode[:, None, None] + half[..., None] * axes[:, :, None]  # (J, d, 2, S N, d)
            further = [
                reached(torch.cat([aside[:, :i], aside[:, i + 1 :]], 1).flatten(1, 2), axes[:, i : i + 1])
                for i in range(width)
            ]
            further = [ends[:, :, 0].amax(1) for ends in further]
            found = torch.maximum(found, torch.stack(further, 1))
    return modes._replace(reach=found.movedim(-1, 1))


@torch.no_grad()
def integral(log_prob: RowDensity, modes: Modes, rule: Rule, n_tokens: int) -> Tensor:
    """log of the integral of each row (N,), at one value of all the rest."""
    u, log_weight = modes.nodes(rule)
    u, log_weight = u.flatten(0, 1), log_weight.expand(u.shape[:-1]).flatten(0, 1)
    step = max(1, CELLS // max(1, u.shape[1] * n_tokens))
    with pyro.validation_enabled(False):
        parts = [
            (log_prob(part, torch.zeros(len(part), dtype=torch.long, device=u.device)) + w).logsumexp(0)
            for part, w in zip(u.split(step), log_weight.split(step), strict=True)
        ]
    return torch.stack(parts).logsumexp(0)


def several(
    log_prob: RowDensity, sharper: RowDensity, main: Modes, draws: Tensor, max_steps: int, sure: float
) -> Tensor | None:
    """Where climbs to several modes (J, N, d) of each row begin, at one value of all the rest; None if all have one.

    Climbs begin at ``draws`` (P, N, d) of the prior, and where these lead by ``sharper``, the density with as much more
    of what its tokens say: a row that contradicts the prior may have one mode near the prior and one near its tokens. A
    row of fewer than J modes has its first one more often.
    """
    with pyro.validation_enabled(False):
        nearer = newton(lambda u, nodes: sharper(u, torch.zeros_like(nodes)), draws, max_steps, ROUGHLY).mode
        starts = torch.cat([draws, torch.where(nearer.isfinite(), nearer, draws)])
        found = newton(lambda u, nodes: log_prob(u, torch.zeros_like(nodes)), starts, max_steps, sure)
        mode = torch.cat([main.mode, found.mode])  # (P, N, d)
        root = torch.cat([main.root, found.root])
        at = mode.nan_to_num().requires_grad_()
        with torch.enable_grad():
            value = log_prob(at, torch.zeros(len(at), dtype=torch.long, device=at.device))
            (slope,) = torch.autograd.grad(value.sum(), at)
    left = (root.mT @ slope[..., None])[..., 0].square().sum(-1)
    mass = value.detach() + torch.linalg.slogdet(root)[1]
    usable = mode.isfinite().all(-1) & mass.isfinite() & (left < ENDED)
    mass = torch.where(usable, mass, -math.inf)
    inverse = torch.linalg.inv(root)
    row = torch.arange(mode.shape[1], device=mode.device)
    best = mass.argmax(0)
    chosen, free = [mode[best, row]], usable & (mass > mass.amax(0) - MATTERS)
    by = [inverse[best, row]]
    while len(chosen) < MAX_MODES:
        off = (mode - chosen[-1])[..., None]
        apart = torch.maximum((by[-1] @ off)[..., 0].norm(dim=-1), (inverse @ off)[..., 0].norm(dim=-1))
        free = free & (apart > APART)
        if not bool(free.any()):
            break
        other = torch.where(free, mass, -math.inf).argmax(0)
        other = torch.where(free.any(0), other, best)
        chosen.append(mode[other, row])
        by.append(inverse[other, row])
    return torch.stack(chosen) if len(chosen) > 1 else None
