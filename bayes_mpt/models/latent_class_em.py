"""EM for latent classes, rows with missing codes included, and the quasi-Newton steps that end it.

With h_n the one-hot code (T L,) of row n, zero where a code is missing, and shares r_nc = p(class c | row n):

    counts_c = sum_n r_nc h_n,    weights_c = sum_n r_nc / N,    probs_ctl = counts_ctl / sum_l counts_ctl

EM creeps where classes overlap. Past its first steps L-BFGS climbs in the logarithms of the parameters, in units in
which the curvature of EM's own bound is about one; there the slope is what EM's next step would change, counts - probs
sum_l counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_mpt.models.quasi_newton import QuasiNewton, flat

__all__ = ["MIN_PROB", "Classes", "Codes", "climb", "codes_of", "short_runs"]

START_ROWS = 16  # rows that a class starts from: averages over many more would be the same in all classes
START_SHARE = 0.2  # of the frequencies in all rows, in those that a class starts from
STARTS = 8  # side by side
START_STEPS = 20  # of EM, after which the best of them goes on
START_MOST = 4096  # rows that they are tried on
EM_STEPS = 20  # before L-BFGS
MIN_PROB = 1e-10  # of a level in a class, and of a class: zero has no logarithm
MIN_SHARE = 1e-3  # of all cells: what a level has less of counts as that in the units of L-BFGS
MARGIN = 0.5  # of the slope at which the stopping rule of a training is content
MAX_CELLS = 2**22  # of one-hot codes held at a time


class Codes(NamedTuple):
    """Distinct rows and how often each of them is there."""

    levels: Tensor
    """(R, T) long; L where missing."""
    weight: Tensor
    """(R,) float64"""
    n_levels: int
    """L"""
    whole: Tensor | None
    """(R, T L) one-hot codes, where they are few"""

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One-hot codes (R, T L) and counts (R,), some rows after the other."""
        if self.whole is not None:
            yield self.whole, self.weight
            return
        step = max(1, MAX_CELLS // (self.levels.shape[1] * self.n_levels))
        for start in range(0, len(self.levels), step):
            some = slice(start, start + step)
            yield _one_hot(self.levels[some], self.n_levels).flatten(1), self.weight[some]


class Classes(NamedTuple):
    """Parameters of B fits side by side."""

    log_weights: Tensor
    """(B, C)"""
    log_probs: Tensor
    """(B, C, T, L)"""


def codes_of(x: Tensor, n_levels: int) -> Codes:
    """Rows x (N, T) of codes, NaN where missing; what is no code counts as the nearest."""
    levels, weight = _levels(x, n_levels), torch.ones(len(x), dtype=torch.float64, device=x.device)
    if x.shape[1] * math.log(n_levels + 1) < math.log(2.0**62):  # rows as numbers, which sort fast
        place = (n_levels + 1) ** torch.arange(x.shape[1], device=x.device)
        number, inverse, count = (levels * place).sum(1).unique(return_inverse=True, return_counts=True)
        first = number.new_empty(len(number)).scatter_(0, inverse, torch.arange(len(x), device=x.device))
        levels, weight = levels[first], count.double()
    few = levels.numel() * n_levels <= MAX_CELLS
    return Codes(levels, weight, n_levels, _one_hot(levels, n_levels).flatten(1) if few else None)


def _expect(codes: Codes, at: Classes) -> tuple[Tensor, Tensor, Tensor]:
    """Log-density of all rows (B,), expected rows of the classes (B, C), and of their levels (B, C, T, L)."""
    n_starts, n_classes = at.log_weights.shape
    total, sizes = at.log_weights.new_zeros(n_starts), torch.zeros_like(at.log_weights)
    log_probs = at.log_probs.flatten(0, 1).flatten(1)  # (B C, T L)
    counts = torch.zeros_like(log_probs)
    for one_hot, n in codes.parts():
        joint = (one_hot @ log_probs.mT).reshape(-1, n_starts, n_classes) + at.log_weights
        log_density = joint.logsumexp(-1, keepdim=True)
        share = (joint - log_density).exp_() * n[:, None, None]
        total += n @ log_density[..., 0]
        sizes += share.sum(0)
        counts += share.flatten(1).mT @ one_hot
    return total, sizes, counts.reshape(at.log_probs.shape)


def _m_step(sizes: Tensor, counts: Tensor, before: Classes) -> Classes:
    """The classes that these expectations make likeliest; of a class without rows the levels stay as they are."""
    cells = counts.sum(-1, keepdim=True)
    probs = (counts / cells).clamp(min=MIN_PROB)
    log_probs = (probs / probs.sum(-1, keepdim=True)).log()
    return Classes(_log(sizes), torch.where(cells > 0, log_probs, before.log_probs))


def _log(sizes: Tensor) -> Tensor:
    """Logarithms of shares, none of which is zero."""
    share = (sizes / sizes.sum(-1, keepdim=True)).clamp(min=MIN_PROB)
    return (share / share.sum(-1, keepdim=True)).log()


def short_runs(x: Tensor, n_classes: int, n_levels: int) -> Classes:
    """The best of some short runs of EM on complete rows x (N, T), or some of them; a class starts from a few rows."""
    n_rows, n_tokens = x.shape
    some = x if n_rows <= START_MOST else x[torch.randperm(n_rows, device="cpu")[:START_MOST].to(x.device)]
    codes = codes_of(some, n_levels)
    total = torch.stack([n @ one_hot for one_hot, n in codes.parts()]).sum(0).reshape(n_tokens, n_levels)
    everywhere = (total + 1 / n_levels) / (len(some) + 1)
    n_starts = STARTS if n_classes > 1 else 1
    drawn = torch.randint(n_rows, (n_starts, n_classes, START_ROWS), device="cpu").to(x.device)
    # frequencies (T, L) in the rows of one class after the other, without a one-hot table of all
    own = torch.stack(
        [_one_hot(_levels(x[rows], n_levels), n_levels).mean(0) for rows in drawn.flatten(0, 1)]
    )
    probs = (1 - START_SHARE) * own + START_SHARE * everywhere
    equal = probs.new_full((n_starts, n_classes), -math.log(n_classes))
    at = Classes(equal, probs.log().reshape(n_starts, n_classes, n_tokens, n_levels))
    for _ in range(START_STEPS):
        score, sizes, counts = _expect(codes, at)
        at = _m_step(sizes, counts, at)
    best = int(score.argmax())
    return Classes(at.log_weights[best : best + 1], at.log_probs[best : best + 1])


def climb(codes: Codes, start: Classes, *, tol: float, max_iter: int) -> Classes:
    """Classes whose score no longer slopes, from one start, by EM and then L-BFGS; ``max_iter`` steps of both at most.

    It ends where a step of one in the logarithm of any parameter has less than ``tol`` of the mean score to gain.

    Raises
    ------
    KeyboardInterrupt
        At Ctrl-C; after the first step its argument is the classes as they are then.
    """
    n_rows, at = float(codes.weight.sum()), start
    try:
        for _ in range(min(max_iter, EM_STEPS)):
            score, sizes, counts = _expect(codes, at)
            if (
                float(_slope(sizes, counts, at).abs().max())
                <= MARGIN * flat(tol, float(score) / n_rows) * n_rows
            ):
                return at
            at = _m_step(sizes, counts, at)
        return at if max_iter <= EM_STEPS else _end(codes, at, tol, max_iter - EM_STEPS)
    except KeyboardInterrupt as press:
        if at is start or press.args:
            raise
        raise KeyboardInterrupt(at) from press


def _slope(sizes: Tensor, counts: Tensor, at: Classes) -> Tensor:
    """Of the score of all rows along the logarithms of weights and probabilities, side by side."""
    of_weights = sizes - sizes.sum() * at.log_weights.exp()
    of_probs = counts - counts.sum(-1, keepdim=True) * at.log_probs.exp()
    return torch.cat([of_weights.flatten(), of_probs.flatten()])


def _end(codes: Codes, start: Classes, tol: float, max_iter: int) -> Classes:
    """Where L-BFGS ends: log theta = log theta_0 + phi / sqrt(share of all cells that theta_0 expects)."""
    n_rows, split = float(codes.weight.sum()), start.log_weights.numel()
    weights = start.log_weights.exp()
    share = torch.cat([weights.flatten(), (weights[..., None, None] * start.log_probs.exp()).flatten()])
    unit = share.clamp(min=MIN_SHARE).rsqrt()
    theta = torch.cat([start.log_weights.flatten(), start.log_probs.flatten()])

    def place(phi: Tensor) -> Classes:
        moved = theta + unit * phi
        weights = _log(moved[:split].reshape(start.log_weights.shape).softmax(-1))
        return Classes(weights, _log(moved[split:].reshape(start.log_probs.shape).softmax(-1)))

    def measure(at: Classes) -> tuple[float, Tensor, bool]:
        total, sizes, counts = _expect(codes, at)
        score, slope = float(total) / n_rows, _slope(sizes, counts, at) / n_rows
        return score, unit * slope, float(slope.abs().max()) <= MARGIN * flat(tol, score)

    return QuasiNewton(start, place, measure).run(len(theta), theta, max_iter)


def _levels(x: Tensor, n_levels: int) -> Tensor:
    """Codes (N, T) of rows, L where missing; what is no code counts as the nearest."""
    return x.detach().double().round().clamp(0, n_levels - 1).nan_to_num(n_levels).long()


def _one_hot(levels: Tensor, n_levels: int) -> Tensor:
    """(N, T, L), zero where missing."""
    return torch.nn.functional.one_hot(levels, n_levels + 1)[..., :n_levels].double()
