"""Newton's method on log-densities of all rows side by side, and Gaussians at their modes."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_mpt.predictors.nodes.resampling import by_halves

__all__ = [
    "MET",
    "LaplaceApproximation",
    "Peaks",
    "climb",
    "curvature",
    "distances",
    "newton",
    "root_of",
    "times_covariance",
]

LAST_GAIN = 1e-9  # nats: the next step would move the nodes by 1e-9 standard deviations
SETTLED = 1e-13  # nats: the same of rows at the least
EXACT = 1e-16  # nats: a root of one step before is that of the mode to 1e-8
LONGEST_STEP = 5.0
MAX_DOUBLINGS = 30
N_LONGEST = 3  # steps of that length one after the other, after which a row takes twice as long ones
MAX_HALVINGS = 12
AT_ONCE = 4  # halvings that are tried side by side: a run costs hardly more for several
MAX_SHORTER = 19  # the same of rows
PATIENCE, HOPELESS = 10, 50.0  # steps, and nats below the best top, after which a climb is given up
FLAT = 1e-10  # of the largest curvature, up to 1: those of a saddle are no smaller
FLATTEST = 1e-18  # of latents of size 1e9
MET = 1e-2  # standard deviations and nats: places so near go on as one


class LaplaceApproximation(NamedTuple):
    """A Gaussian approximation of each row's posterior."""

    mode: Tensor
    """(..., N, d)"""
    root: Tensor
    """(..., N, d, d): covariance = root root'."""


@torch.enable_grad()
def newton(
    log_prob: Callable[[Tensor, Tensor], Tensor],
    u: Tensor,
    max_steps: int,
    sure: float,
    root_at_mode: bool = True,
    lost: Callable[[], Tensor] | None = None,
) -> LaplaceApproximation:
    """Newton's method on (S, N, d) -> (S, N), all rows side by side, and the curvature at the last step but one.

    ``log_prob(u, nodes)`` is asked for some of the S, by their numbers: a node whose rows have all come to rest is
    left alone. Of a log-density no more than the share ``sure`` is to be gained by a step that need not climb, of which
    one more is taken where the curvature moves with it; not without ``root_at_mode``, for nodes, which any root near
    that one places well. Where the density at u is not finite, climbs begin at ``lost()``. Kept by hand: scipy's
    optimisers climb one row at a time, and not within torch's graph.
    """
    nodes = torch.arange(len(u), device=u.device)
    here, before = _begin(log_prob, u.detach(), nodes, lost)
    mode = here.detach().clone()
    roots = mode.new_zeros(*mode.shape, mode.shape[-1])
    stuck = torch.zeros(mode.shape[:-1], dtype=torch.bool, device=mode.device)  # no step of theirs climbs
    settled = stuck.clone()  # a step ago
    n_longest = stuck.to(mode)  # steps that the bound has cut, up to the last one
    for n_steps in range(1, max_steps + 1):
        (slope,) = torch.autograd.grad(before.sum(), here, create_graph=True)
        root = root_of(curvature(slope, here))
        slope, before, here = slope.detach(), before.detach(), here.detach()
        roots[nodes] = root
        step = times_covariance(root, slope)
        gain = (slope * step).sum(-1)  # (S, N)
        step, bound = _bounded(step, n_longest[nodes])
        step = torch.where(stuck[nodes][..., None], 0.0, step)
        there = (gain <= torch.clamp(sure * (1 + before.abs()), min=SETTLED)) | stuck[nodes]
        enough = there & (settled[nodes] | stuck[nodes] | (gain <= EXACT)) if root_at_mode else there
        settled[nodes] = there
        going = (~enough & gain.isfinite()).any(-1)  # (S,)
        last = (~going).nonzero()[:, 0]
        if len(last):  # Newton's last step squares what is left
            mode[nodes[last]] = (here + step)[last]
        at = going.nonzero()[:, 0]
        if not len(at):
            break
        nodes, start = nodes[at], here[at]
        here, before, better = _walk(log_prob, nodes, start, step[at], before[at], there[at])
        mode[nodes] = here.detach()
        n_longest[nodes] = _n_longest(mode[nodes] - start, bound[at], n_longest[nodes])
        stuck[nodes] |= ~better
        if n_steps == max_steps:
            break
    return LaplaceApproximation(mode, roots)


def _begin(
    log_prob: Callable[[Tensor, Tensor], Tensor],
    u: Tensor,
    nodes: Tensor,
    lost: Callable[[], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """A place to climb from, and log p there."""
    here = u.clone().requires_grad_()
    if lost is None:
        return here, log_prob(here, nodes)
    with suppress(ValueError):  # so far away that the program refuses
        before = log_prob(here, nodes)
        if bool(before.isfinite().all()):
            return here, before
    return _begin(log_prob, lost(), nodes, None)


def _bounded(step: Tensor, n_longest: Tensor) -> tuple[Tensor, Tensor]:
    """Steps (..., d) within bounds (...), which double while a climb has taken none but steps of that length."""
    bound = LONGEST_STEP * 2.0 ** (n_longest - N_LONGEST).clamp(0, MAX_DOUBLINGS)
    return step * (bound / step.abs().amax(-1).clamp(min=bound))[..., None], bound


def _n_longest(step: Tensor, bound: Tensor, before: Tensor) -> Tensor:
    """How many steps (...) of the length of their bounds were taken, one after the other.

    After a shorter one (..., d) bounds fall to its length: where latents are of size 1e6 a step that was halved is
    still long, and bounds that began anew would use up all steps that a climb may take.
    """
    length = step.abs().amax(-1)
    fallen = N_LONGEST + (length / LONGEST_STEP).log2()
    return torch.where(length > 0.999 * bound, before + 1, torch.where(length > LONGEST_STEP, fallen, 0.0))


def _walk(
    log_prob: Callable[[Tensor, Tensor], Tensor],
    nodes: Tensor,
    u: Tensor,
    step: Tensor,
    before: Tensor,
    there: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Halve the step of each row until it climbs, of those that are not there yet; log p there, and which have."""
    trial = (u + step).requires_grad_()
    try:
        found = log_prob(trial, nodes)
        value = found.detach()
    except ValueError:  # so far away that the program refuses
        found, value = None, torch.full_like(before, -torch.inf)
    better = there | (value > before) & value.isfinite()
    if found is not None and bool(better.all()):
        return trial, found, better
    best = torch.where(better[..., None], trial.detach(), u)
    at_once = AT_ONCE if len(u) > 1 else 1  # one node may take none beside it
    for first in range(1, MAX_SHORTER + 1, at_once):
        low = (~better).any(-1).nonzero()[:, 0]  # nodes with rows that have not climbed
        if not len(low):
            break
        share = 0.5 ** torch.arange(first, min(first + at_once, MAX_SHORTER + 1)).to(u)
        trial = u[low] + share[:, None, None, None] * step[low]  # (H, S, N, d)
        trial = torch.where(better[low][..., None], best[low], trial)
        value = _tried(log_prob, trial, nodes[low])
        good = (value > before[low]) & value.isfinite() & ~better[low]
        longest, some = good.to(torch.int8).argmax(0), good.any(0)  # of each row the longest step that climbs
        found_there = trial.gather(0, longest[None, ..., None].expand(1, *trial.shape[1:]))[0]
        best[low] = torch.where(some[..., None], found_there, best[low])
        better[low] |= some
    best.requires_grad_()
    return best, log_prob(best, nodes), better


@torch.no_grad()
def _tried(log_prob: Callable[[Tensor, Tensor], Tensor], u: Tensor, nodes: Tensor) -> Tensor:
    """log p (H, S, N) at H places u (H, S, N, d) for each node; -inf where the program refuses them."""
    try:
        return log_prob(u.flatten(0, 1), nodes.repeat(len(u))).unflatten(0, u.shape[:2])
    except ValueError:
        if len(u) == 1:
            return u.new_full(u.shape[:-1], -torch.inf)
        return torch.cat([_tried(log_prob, part, nodes) for part in u.split(1)])


def curvature(slope: Tensor, u: Tensor) -> Tensor:
    """-d slope / du of each row: (..., N, d), (..., N, d) -> (..., N, d, d)."""
    width = u.shape[-1]
    if width == 1:  # without vmap two thirds of the time
        (rows,) = torch.autograd.grad(slope, u, torch.ones_like(u), retain_graph=True, materialize_grads=True)
        return -rows[..., None]
    one = torch.eye(width, dtype=u.dtype, device=u.device)
    one = one.reshape(width, *[1] * (u.ndim - 1), width).expand(-1, *u.shape)  # (d, ..., N, d)
    (rows,) = torch.autograd.grad(
        slope, u, one, retain_graph=True, is_grads_batched=True, materialize_grads=True
    )
    rows = rows.movedim(0, -2)
    return -0.5 * (rows + rows.mT)


def root_of(curvature: Tensor) -> Tensor:
    """R with R R' = |H|^-1, (..., N, d, d); of a saddle the signs of its axes are dropped."""
    lower, info = torch.linalg.cholesky_ex(curvature)
    if not bool(info.any()):
        one = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, one.expand_as(lower), upper=False).mT.detach()
    one = torch.eye(curvature.shape[-1], dtype=curvature.dtype, device=curvature.device)
    known = torch.isfinite(curvature).all(-1).all(-1)[..., None, None]
    value, vector = torch.linalg.eigh(torch.where(known, curvature, one))  # else a step along the slope
    size = value.abs()
    # a curvature of 1e-12 is flat beside others of 1, and an ordinary one where latents are of size 1e6
    flat = (FLAT * size.amax(-1, keepdim=True).clamp(max=1.0)).clamp(min=FLATTEST)
    flat = torch.where(info[..., None] == 0, FLATTEST, flat)  # a maximum is as wide as it is
    return (vector * size.maximum(flat).rsqrt()[..., None, :]).detach()


def times_covariance(root: Tensor, slope: Tensor) -> Tensor:
    """Root root' slope, (..., d)."""
    return (root @ (root.mT @ slope[..., None]))[..., 0]


class Peaks(NamedTuple):
    """Where a climb from M places ended."""

    u: Tensor
    """(M, d)"""
    value: Tensor
    """(M,) log-density there."""
    root: Tensor
    """(M, d, d): root root' is the inverse of the curvature."""
    top: Tensor
    """(M,) bool: a maximum was reached, and no saddle."""
    same: Tensor
    """(M,) long: the first of those that end in the same place."""


def climb(
    log_prob: Callable[[Tensor], Tensor], u: Tensor, max_steps: int, sure: float, met: float = MET
) -> Peaks:
    """Newton's method on (M, d) -> (M,) from many places, each of which stops by itself.

    Places that have met, ``met`` standard deviations and nats apart, go on as one. What has no finite density is left
    where it is, and so is, after ten steps, what looks like fifty nats less mass than a top that was reached.
    """
    u = u.detach().clone()
    value, slope, curved = _expand(log_prob, u)
    same, n_longest, best = torch.arange(len(u), device=u.device), torch.zeros_like(value), -math.inf
    going, there = (
        value.isfinite() & curved.isfinite().all(-1).all(-1),
        torch.zeros_like(same, dtype=torch.bool),
    )
    for n_steps in range(max_steps + 1):
        at = going.nonzero()[:, 0]
        if not len(at):
            break
        root = root_of(curved[at])
        step = times_covariance(root, slope[at])
        gain = (slope[at] * step).sum(-1)
        mass = value[at] + torch.linalg.slogdet(root)[1]
        step, bound = _bounded(step, n_longest[at])
        enough = gain <= torch.clamp(sure * (1 + value[at].abs()), min=LAST_GAIN)
        there[at[enough]] = True
        u[at[enough]] += step[enough]  # Newton's last step squares what is left
        best = max(best, float(mass[enough].max())) if bool(enough.any()) else best
        lost = (mass + gain < best - HOPELESS) & (n_steps >= PATIENCE)
        going[at[enough | lost]] = False
        if n_steps == max_steps:
            break
        at, step, bound = at[~enough & ~lost], step[~enough & ~lost], bound[~enough & ~lost]
        if not len(at):
            break
        found = _shorten(log_prob, u[at], step, value[at])
        n_longest[at] = _n_longest(found.u - u[at], bound, n_longest[at])
        going[at[~found.climbed]] = False
        at, found = at[found.climbed], _Walked(*(t[found.climbed] for t in found))
        u[at], value[at], slope[at], curved[at] = found[:4]
        _merge(u, value, curved, same, going, met)
    usable = curved.isfinite().all(-1).all(-1)
    curved = torch.where(usable[:, None, None], curved, torch.eye(u.shape[1]).to(u))
    info = torch.linalg.cholesky_ex(curved)[1]
    return Peaks(u, value, root_of(curved), there & usable & (info == 0), same)


class _Walked(NamedTuple):
    """Where a step ended, and what was found there."""

    u: Tensor
    value: Tensor
    slope: Tensor
    curved: Tensor
    climbed: Tensor


@torch.enable_grad()
def _expand(log_prob: Callable[[Tensor], Tensor], u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value (M,), slope (M, d) and curvature (M, d, d) at u (M, d)."""

    def of(part: Tensor) -> tuple[Tensor, ...]:
        leaf = part.detach().requires_grad_()
        value = log_prob(leaf)
        (slope,) = torch.autograd.grad(value.sum(), leaf, create_graph=True, materialize_grads=True)
        curved = (
            curvature(slope, leaf) if slope.requires_grad else slope.new_zeros(*slope.shape, slope.shape[-1])
        )
        return value.detach(), slope.detach()[None], curved.detach()[None]

    width = u.shape[1]
    none = (u.new_full((1,), -torch.inf), u.new_zeros(1, 1, width), u.new_zeros(1, 1, width, width))
    value, slope, curved = by_halves(of, u, none)
    return value, slope[0], curved[0]


def _shorten(
    log_prob: Callable[[Tensor], Tensor],
    u: Tensor,
    step: Tensor,
    before: Tensor,
    n_halvings: int = MAX_HALVINGS,
) -> _Walked:
    """Each place after its step, halved until it climbs: only there are slope and curvature worth their cost."""
    now, value = u + step, torch.full_like(before, -torch.inf)
    halved, climbed = torch.zeros_like(before), torch.zeros_like(before, dtype=torch.bool)
    for first in (0, *range(1, n_halvings + 1, AT_ONCE)):
        low = (~climbed).nonzero()[:, 0]
        if not len(low):
            break
        last = min(first + AT_ONCE, n_halvings + 1) if first else 1
        tried = torch.arange(first, last, device=u.device)
        trial = u[low] + step[low] * (0.5 ** tried.to(u))[:, None, None]  # (H, M, d)
        with torch.no_grad():
            (found,) = by_halves(
                lambda part: (log_prob(part),), trial.flatten(0, 1), (u.new_full((1,), -torch.inf),)
            )
        found = found.unflatten(0, trial.shape[:2])
        better = (found > before[low]) & found.isfinite()
        longest, some = better.to(torch.int8).argmax(0), better.any(0)
        low, longest = low[some], longest[some]
        now[low], value[low] = trial[longest, some.nonzero()[:, 0]], found[longest, some.nonzero()[:, 0]]
        halved[low], climbed[low] = tried[longest].to(halved), True
    slope, curved = torch.zeros_like(u), u.new_zeros(*u.shape, u.shape[-1])
    at = climbed.nonzero()[:, 0]
    if len(at):
        value[at], slope[at], curved[at] = _expand(log_prob, now[at])
    walked = _Walked(now, value, slope, curved, climbed)
    flat = climbed & ~curved.isfinite().all(-1).all(-1)
    more = int(n_halvings - halved[flat].min()) - 1 if bool(flat.any()) else -1
    if more >= 0:  # no curvature there: nearer
        shorter = step[flat] * 0.5 ** (halved[flat] + 1)[:, None]
        again = _shorten(log_prob, u[flat], shorter, before[flat], more)
        for all_of, own in zip(walked, again, strict=True):
            all_of[flat] = own
    return walked


def _merge(u: Tensor, value: Tensor, curved: Tensor, same: Tensor, going: Tensor, near: float) -> None:
    """Let places that have met go on as one."""
    alive = going.nonzero()[:, 0]
    if len(alive) < 2:
        return
    apart = distances(u[alive], curved[alive])
    met = (apart < near) & ((value[alive][:, None] - value[alive]).abs() < near)
    first = met.to(torch.int8).argmax(1)  # of those that have met, the first
    for place, other in enumerate(first.tolist()):
        if other < place and bool(going[alive[other]]):
            going[alive[place]] = False
            same[same == alive[place]] = alive[other]


def distances(u: Tensor, curved: Tensor) -> Tensor:
    """How far places (M, d) are apart in units of their curvature (M, d, d), by that of the narrower: (M, M)."""
    apart = u[:, None] - u
    one = torch.einsum("ijd,ide,ije->ij", apart, curved, apart).abs().sqrt()
    return torch.maximum(one, one.mT)
