"""Integrals over one latent whose density jumps or bends, by panels that are cut where the density is not smooth.

A rule of nodes does not see on which side of a jump, as of ``torch.where(z > c, a, b)``, a place between two nodes is:
two rules may agree and both be wrong. What tells are high differences of the log-density at the nodes (`roughness`),
which fall off fast where it is smooth. Then the axis is cut into panels, each with a Gauss-Lobatto rule whose last
coefficients in Legendre polynomials bound its error, and the panel of the greatest error is cut again (the way of
QUADPACK: Piessens, de Doncker-Kapenga, Ueberhuber & Kahaner 1983), in all rows side by side.
"""

from __future__ import annotations

import math
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor

from bayes_mpt.predictors.nodes.mixture import Modes
from bayes_mpt.predictors.nodes.placing import RowDensity

__all__ = [
    "MAX_NESTED",
    "MAX_ROUNDS",
    "PRECISE",
    "UNEVEN",
    "Integrals",
    "Panels",
    "by_panels",
    "laid",
    "roughness",
    "thinned",
]

UNEVEN = 1e-4  # nats by which jumps may move an integral, from which panels are worth their cost
FAINT = 1e-7  # nats of a row, below which differences are those of smooth densities too
ORDER = 10  # of the differences
BELOW = 40.0  # nats under the greatest part, where what is left is as good as nothing
N_PANELS = 16  # along each mode's reach, at first
N_NODES = 10  # of a panel
N_LAST = 2  # coefficients that bound its error
CUTS = 4  # parts of a panel that is cut
AT_ONCE = 4  # panels of each row that are cut side by side
MAX_ROUNDS = 60
PRECISE = 1e-9  # share of the integral: the error that is aimed at
CELLS = 2**20  # log-densities of tokens at a time
MAX_CELLS = 2**24  # of them in all
MAX_MERGES = 12  # rounds in which neighbours are tried as one
NO_PART = 1e-11  # share of an integral, below which a panel needs no nodes
MAX_NESTED = 2**26  # of them, for each of many values of other latents
SIDE_BY_SIDE = 2**13  # integrals
LONG = 32.0  # standard deviations, from which a tail is long, and panels grow outwards


class Panels(NamedTuple):
    """P panels of the axis of each of M densities; some may have no length."""

    low: Tensor
    """(P, M)"""
    length: Tensor
    """(P, M)"""
    log_z: Tensor
    """(P, M): log of the integral over each."""

    def nodes(self) -> tuple[Tensor, Tensor]:
        """Nodes u (Q, M, 1) of those panels that matter, and their log-weights (Q, M): int f du = sum_q w_q f(u_q)."""
        share = self.log_z.log_softmax(0)
        n = int((share > math.log(NO_PART)).sum(0).amax().clamp(min=1))
        most = share.topk(n, 0).indices
        low, length = self.low.gather(0, most), self.length.gather(0, most)
        at, weight, _ = (t.to(low) for t in _rule())
        u = low[:, None] + length[:, None] * at[:, None]
        log_weight = weight.log()[:, None] + length.log()[:, None]
        return u.flatten(0, 1)[..., None], log_weight.flatten(0, 1)


class Integrals(NamedTuple):
    """Of M densities."""

    log_z: Tensor
    """(M,)"""
    error: Tensor
    """(M,) nats, a bound as a rule."""
    n_evaluations: int
    """Of each density."""
    panels: Panels | None = None
    """Where these were found all at once."""


def roughness(log_part: Tensor) -> Tensor:
    """Nats (N,) by which jumps and bends between the nodes of a rule may move integrals.

    Parameters
    ----------
    log_part : Tensor
        (J, Q, N) log of what each node adds to the integral; J runs of Q nodes in ascending order.

    Notes
    -----
    Of a jump by d nats the differences of order 2 m, over binom(2 m, m), add up to 2 d in absolute value, of a bend to
    the change of slope from node to node; the integral moves by d / 2 of the node's share at the most, and by a twelfth
    of the bend's.

    Examples
    --------
    >>> t = torch.linspace(-5, 5, 51, dtype=torch.float64)
    >>> smooth, jump = -0.5 * t**2, -0.5 * t**2 + torch.where(t > 0.1, 1.0, 0.0)
    >>> [round(float(roughness(f[None, :, None])), 3) for f in (smooth, jump)]
    [0.0, 0.05]
    """
    n_nodes = log_part.shape[1]
    if n_nodes <= ORDER:
        return torch.zeros_like(log_part[0, 0])
    top = log_part.amax((0, 1))
    log_part = (log_part - top).nan_to_num(-math.inf).clamp(min=-BELOW)
    share = log_part.flatten(0, 1).softmax(0).unflatten(0, log_part.shape[:2])
    differs = log_part.diff(n=ORDER, dim=1).abs() / math.comb(ORDER, ORDER // 2)
    first, last = ORDER // 2 - 1, n_nodes - ORDER // 2 + 1
    beside = share[:, first:last].unfold(1, 3, 1).amax(-1)  # the greatest of three nodes in the middle
    moves = 0.25 * (differs.clamp(max=1.0) * beside).sum((0, 1))
    return torch.where(moves > FAINT, moves, 0.0)


@cache
def _rule() -> tuple[Tensor, Tensor, Tensor]:
    """Nodes (n,) from 0 to 1, weights (n,), and what gives the last coefficients (l, n): Gauss and Lobatto's.

    A node stands at both ends, since a jump beyond the outermost nodes of a panel would not be seen.
    """
    top = np.polynomial.Legendre.basis(N_NODES - 1)
    x = np.concatenate([[-1.0], top.deriv().roots().real, [1.0]])
    weight = 1 / (N_NODES * (N_NODES - 1) * top(x) ** 2)  # they add up to one
    last = np.linalg.inv(np.polynomial.legendre.legvander(x, N_NODES - 1))[-N_LAST:]
    return torch.as_tensor(0.5 * (x + 1)), torch.as_tensor(weight), torch.as_tensor(last)


@torch.no_grad()
def by_panels(
    log_prob: RowDensity,
    modes: Modes,
    n_nodes: int,
    n_tokens: int,
    max_cells: int = MAX_CELLS,
    start: Panels | None = None,
    precise: float = PRECISE,
    max_rounds: int = MAX_ROUNDS,
) -> Integrals:
    """Integrals of N rows at S values of all the rest, those of one value after the other: M = S N.

    Parameters
    ----------
    log_prob : callable
        `RowDensity` of one latent.
    modes : Modes
        (J, S N, 1) with how far the density reaches around each.
    n_nodes : int
        S.
    n_tokens : int
        T, of each row.
    max_cells : int
        Log-densities of tokens, after which panels are cut no more: what is missing stands in the error.
    start : Panels, optional
        Of densities that these are like: the first panels, with more where these densities reach further.
    max_rounds : int
        In which panels are cut.
    precise : float
        Share of an integral, the error that is aimed at.
    """
    n_rows = modes.mode.shape[1] // n_nodes
    some = max(1, SIDE_BY_SIDE // n_rows)  # of the S values
    if n_nodes > some:
        parts = []
        for first in range(0, n_nodes, some):
            n = min(some, n_nodes - first)
            these = modes.of_rows(slice(first * n_rows, (first + n) * n_rows))
            density = partial(_from, log_prob, first)
            parts.append(by_panels(density, these, n, n_tokens, max_cells * n // n_nodes, precise=precise))
        return Integrals(
            torch.cat([part.log_z for part in parts]),
            torch.cat([part.error for part in parts]),
            max(part.n_evaluations for part in parts),
        )

    of = partial(_in_parts, log_prob, n_nodes, n_tokens)
    with pyro.validation_enabled(False):
        low, length = _first(modes, start)
        log_z, log_error = of(low, length)
        n_evaluations = len(low) * N_NODES
        for _ in range(max_rounds):
            wrong = (log_error - log_z.logsumexp(0)).nan_to_num(-math.inf)
            left = wrong.logsumexp(0) > math.log(precise)
            if not bool(left.any()):
                break
            bad = (wrong[:, left] > math.log(precise / len(low))).sum(0)
            n = int(bad.amax().clamp(1, AT_ONCE))
            n_evaluations += n * CUTS * N_NODES
            if n_evaluations * low.shape[1] * n_tokens > max_cells:
                n_evaluations -= n * CUTS * N_NODES
                break
            worst = wrong.topk(n, 0).indices  # (n, M)
            part = length.gather(0, worst) / CUTS
            new_low = torch.cat([low.gather(0, worst) + k * part for k in range(CUTS)])
            new_z, new_error = of(new_low, part.repeat(CUTS, 1))
            # the first part takes the place of the whole
            low = torch.cat([low, new_low[n:]])
            length = torch.cat([length.scatter(0, worst, part), part.repeat(CUTS - 1, 1)])
            log_z = torch.cat([log_z.scatter(0, worst, new_z[:n]), new_z[n:]])
            log_error = torch.cat([log_error.scatter(0, worst, new_error[:n]), new_error[n:]])
    total = log_z.logsumexp(0)
    error = (log_error.logsumexp(0) - total).exp().nan_to_num(0.0, math.inf)
    return Integrals(total, error, n_evaluations, Panels(low, length, log_z))


@torch.no_grad()
def thinned(log_prob: RowDensity, panels: Panels, n_tokens: int, precise: float = PRECISE) -> Panels:
    """Fewer panels of N densities: neighbours become one where it is as good, those beside a jump above all."""
    low, length, log_z = panels
    total = log_z.logsumexp(0)
    with pyro.validation_enabled(False):
        for k in range(MAX_MERGES):
            # no length comes last
            order = torch.where(length > 0, low, math.inf).argsort(0)
            low, length, log_z = (t.gather(0, order) for t in (low, length, log_z))
            n = int((length > 0).sum(0).amax())
            low, length, log_z = low[:n], length[:n], log_z[:n]
            first = slice(k % 2, n - 1, 2)
            second = slice(k % 2 + 1, n, 2)
            both = length[first] + length[second]
            merged, error = _in_parts(log_prob, 1, n_tokens, low[first], both)
            apart = torch.logaddexp(log_z[first], log_z[second])
            off = (merged - total).exp() - (apart - total).exp()
            good = (error - total < math.log(precise / n)) & (off.abs() < precise / n) & (length[second] > 0)
            length[first] = torch.where(good, both, length[first])
            log_z[first] = torch.where(good, merged, log_z[first])
            length[second] = torch.where(good, 0.0, length[second])
            log_z[second] = torch.where(good, -math.inf, log_z[second])
            if k % 2 and not bool(good.any()):
                break
    return Panels(low, length, log_z)


def _in_parts(
    log_prob: RowDensity, n_nodes: int, n_tokens: int, low: Tensor, length: Tensor
) -> tuple[Tensor, Tensor]:
    """`_of_panels`, as many at a time as memory will bear."""
    step = max(1, CELLS // (low.shape[1] * N_NODES * n_tokens))
    parts = [
        _of_panels(log_prob, n_nodes, a, b) for a, b in zip(low.split(step), length.split(step), strict=True)
    ]
    return torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts])


def _from(log_prob: RowDensity, first: int, u: Tensor, nodes: Tensor) -> Tensor:
    """The density at values of all the rest that are counted from the first of some."""
    return log_prob(u, nodes + first)


def _of_panels(log_prob: RowDensity, n_nodes: int, low: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the integral over each panel (P, M), and of its error, from its lower end and length (P, M)."""
    at, weight, last = (t.to(low) for t in _rule())
    u = (low[:, None] + length[:, None] * at[:, None]).flatten(0, 1)  # (P n, S N)
    each = u.reshape(len(u) * n_nodes, -1, 1)
    value = log_prob(each, torch.arange(n_nodes, device=u.device).repeat(len(u)))
    value = value.expand(each.shape[:2]).reshape(len(low), N_NODES, -1)
    top = value.amax(1).nan_to_num(0.0, 0.0, 0.0)
    f = (value - top[:, None]).exp()
    log_unit = length.log() + top
    integral = (weight[:, None] * f).sum(1).log() + log_unit
    return integral, torch.einsum("ln,pnm->plm", last, f).abs().sum(1).log() + log_unit


def laid(modes: Modes, whole: Modes, n_nodes: int) -> Panels:
    """Panels over all that ``whole`` (1, M, 1) reaches, with so many nodes, and around modes besides."""
    edge = torch.cat([_edges(modes), _edges(whole, n_nodes // N_NODES)]).sort(0).values
    return Panels(edge[:-1], edge.diff(dim=0), torch.zeros_like(edge[:-1]))


def _first(modes: Modes, start: Panels | None) -> tuple[Tensor, Tensor]:
    """Lower ends and lengths (P, M) of the first panels."""
    edge = _edges(modes)
    if start is None:
        return edge[:-1], edge.diff(dim=0)
    low, high = start.low.amin(0), (start.low + start.length).amax(0)
    first, last = torch.minimum(edge[0], low), torch.maximum(edge[-1], high)
    return (
        torch.cat([start.low, first[None], high[None]]),
        torch.cat([start.length, (low - first)[None], (last - high)[None]]),
    )


def _edges(modes: Modes, n_panels: int = N_PANELS) -> Tensor:
    """Where the first panels begin and end (P + 1, M): even around each mode, wider along a long tail."""
    assert modes.reach is not None
    reach, root = modes.reach[:, :, 0], modes.root[:, :, 0, 0].abs()  # (J, M, 2), (J, M)
    c = (0.25 * reach.amax(-1)).clamp(max=LONG)  # where no tail is long nearly even
    end = (reach / c[..., None]).asinh()  # (J, M, 2)
    step = torch.arange(1, n_panels // 2 + 1).to(end) / (n_panels // 2)
    below = -(c * (step.flip(0)[:, None, None] * end[..., 0]).sinh())  # (P / 2, J, M)
    above = c * (step[:, None, None] * end[..., 1]).sinh()
    at = torch.cat([below, torch.zeros_like(c)[None], above])
    u = modes.mode[:, :, 0] + root * at  # (P + 1, J, M)
    return u.flatten(0, 1).sort(0).values
