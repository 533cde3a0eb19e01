"""EM for mixtures of factor analysers, missing cells included, and the quasi-Newton steps that end it.

With w = [W, loc] of a token in a component, z~ = [z, 1], and sums over the rows in which the token is observed, each
with its share r of the component (Ghahramani & Hinton 1996):

    A = sum r E[z~ z~'],    b = sum r x E[z~],    c = sum r x^2,    n = sum r
    w = A^-1 b,             psi = (c - 2 w'b + w'A w + L) / (n + 1)

where E is of the latents given the observed cells of the row. Missing cells are no unknowns: they are left out of all
sums. L is the prior of the noise variances, as of one more cell; without it L and the 1 are absent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_mpt.models.left_out import Key
from bayes_mpt.models.mixture_breeding import Plan, bred, crossed, random_counts
from bayes_mpt.models.mixture_em import Table
from bayes_mpt.models.mixture_patterns import SMALL, invert
from bayes_mpt.models.quasi_newton import QuasiNewton, flat

__all__ = [
    "MIN_NOISE",
    "MIN_WEIGHT",
    "Analysers",
    "Cells",
    "best_start",
    "cells_of",
    "climb",
    "expect",
    "log_prior",
]

START_ROWS = 2048  # on which starts are compared
SHAKEN, CHILD = (
    8,
    4,
)  # steps of what is shaken, which leave no rows out as those of `mixture_starts` do; of children
JUDGED, SETTLED = 2, 4  # of what a round of breeding has made, until some are given up, and of the rest
PLAN = Plan(rounds=20, children=4, shaken=16, parents=2, kept=5, places=2, patience=5)
ROUND = 10  # steps of EM, after which the better half of the starts goes on
EM_STEPS = 20  # before L-BFGS
MIN_WEIGHT = 1e-6  # of a component: the logarithm of an empty one is infinite
MIN_CELLS = 1e-6  # of a token in a component: fewer say nothing of it
MIN_NOISE = 1e-6  # in units of the columns' variances
MIN_SHARE = 1e-3  # of the rows: what has fewer counts as that in the units of L-BFGS
MARGIN = 0.1  # of the slope at which the stopping rule of a training may be content, whose units are others
MAX_NUMBERS = 2**22  # that EM holds at a time beside the rows


class Analysers(NamedTuple):
    """Mixtures of factor analysers in the units of their cells: B of K components, one after the other in B K."""

    log_weights: Tensor
    """(B, K)"""
    loading: Tensor
    """(B K, T, F + 1), last the mean"""
    noise: Tensor
    """(B K, T)"""

    def pick(self, which: list[int]) -> Analysers:
        """Some of the mixtures."""
        n_mixtures = len(self.log_weights)
        loading, noise = (part.unflatten(0, (n_mixtures, -1))[which].flatten(0, 1) for part in self[1:])
        return Analysers(self.log_weights[which], loading, noise)


class Cells(NamedTuple):
    """Rows in units of their columns, and what is missing of them."""

    value: Tensor
    """(N, T), zero where missing"""
    seen: Tensor
    """(N, T), one where observed"""
    patterns: Tensor
    """(U, T) of the rows of `seen`, those that differ"""
    pattern: Tensor
    """(N,) which one a row has"""
    counts: Tensor
    """(1, N), how often each row counts in sums; (B, N) of mixtures side by side"""
    log_unit: float
    """By which the log-density of all rows is larger in these units"""

    def first(self, n_rows: int) -> Cells:
        """Some rows, evenly spread."""
        every = slice(None, None, max(1, len(self.value) // n_rows))
        return self._replace(
            value=self.value[every],
            seen=self.seen[every],
            pattern=self.pattern[every],
            counts=self.counts[:, every],
        )

    def parts(self, n_each: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Values, which are seen, patterns and counts, some rows after the other; a row needs ``n_each`` numbers."""
        step = max(1, MAX_NUMBERS // n_each)
        for start in range(0, len(self.value), step):
            some = slice(start, start + step)
            yield self.value[some], self.seen[some], self.pattern[some], self.counts[:, some]


class Sums(NamedTuple):
    """What EM sums over rows."""

    sizes: Tensor
    """(B, K) expected rows"""
    n: Tensor
    """(B K, T)"""
    a: Tensor
    """(B K, T, F + 1, F + 1)"""
    b: Tensor
    """(B K, T, F + 1)"""
    c: Tensor
    """(B K, T)"""

    def residual(self, loading: Tensor) -> Tensor:
        """Expected squares (B K, T) that this loading leaves: c - 2 w'b + w'A w."""
        product = (self.a @ loading[..., None])[..., 0]
        return self.c + ((product - 2 * self.b) * loading).sum(-1)


def cells_of(table: Table) -> Cells:
    """The rows of a table, NaN where missing."""
    seen = ~table.rows.isnan()
    patterns, pattern = seen.to(table.rows).unique(dim=0, return_inverse=True)
    log_unit = float((seen.to(table.rows) @ table.spread.log()).sum())
    value = torch.where(seen, table.rows, 0.0)
    return Cells(value, seen.to(value), patterns, pattern, value.new_ones(1, len(value)), log_unit)


def expect(
    cells: Cells,
    at: Analysers,
    *,
    given: Mapping[Key, Tensor] | None = None,
    told: dict[Key, Tensor] | None = None,
) -> tuple[Tensor, Sums]:
    """Log-density of all rows (B,) in the units of the cells, and the sums over them.

    With other shares (B, K, n) of rows than by the densities, if they are ``given``; the others are ``told``.
    """
    n_components, n_tokens, width = at.loading.shape
    n_factors, zero = width - 1, at.loading.new_zeros
    i, j = torch.tril_indices(width, width, device=at.loading.device)
    of_patterns = _Patterns.of(cells.patterns, at)
    mass = zero(n_components, len(cells.patterns))  # expected rows of each pattern
    sizes, total = torch.zeros_like(at.log_weights), zero(len(at.log_weights))
    b, c, second = zero(n_components, width, n_tokens), zero(n_components, n_tokens), zero(1)
    parts = cells.parts(n_components * (width * width + n_tokens))
    for part, (value, seen, pattern, count) in enumerate(parts):
        joint, latents = of_patterns.joint(at, value, seen, pattern)  # (B K, n), (B K, F, n)
        joint = joint.reshape(*at.log_weights.shape, -1)
        log_density = joint.logsumexp(1, keepdim=True)
        total += log_density.sum((1, 2))
        share = (joint - log_density).exp_()
        if told is not None:
            told["rows", part] = share
        if given is not None:
            share = given["rows", part]
        share = (share * count[:, None]).flatten(0, 1)
        sizes += share.sum(1).reshape(sizes.shape)
        mass.index_add_(1, pattern, share)
        z = torch.cat([latents, latents.new_ones(n_components, 1, latents.shape[2])], 1)  # (B K, F + 1, n)
        weighted = share[:, None] * z
        c += share @ value.square()
        b += weighted @ value
        second = second + (weighted[:, i] * z[:, j]) @ seen  # (B K, P, T)
    a = zero(n_components, n_tokens, width, width)
    a[..., i, j] = a[..., j, i] = second.mT
    cov = mass[:, None, None] * of_patterns.cov  # (B K, F, F, U)
    a[..., :n_factors, :n_factors].add_((cov @ cells.patterns).permute(0, 3, 1, 2))
    return total, Sums(sizes, a[..., -1, -1].clone(), a, b.mT, c)


class _Patterns(NamedTuple):
    """What rows with the same cells observed share."""

    cov: Tensor
    """(B K, F, F, U) of the latents given the row"""
    constant: Tensor
    """(B K, U) of the log-density"""

    @staticmethod
    def of(patterns: Tensor, at: Analysers) -> _Patterns:
        """log w - sum_o log(2 pi psi) / 2 - log det(M) / 2,  M = I + W_o' psi_o^-1 W_o,  cov = M^-1."""
        loading = at.loading[..., :-1]
        scaled = (loading / at.noise[..., None]).permute(2, 0, 1)  # (F, B K, T)
        inner = (scaled[:, None] * loading.permute(2, 0, 1)) @ patterns.mT  # (F, F, B K, U)
        inner.diagonal(dim1=0, dim2=1).add_(1.0)
        if loading.shape[-1] <= SMALL:  # their numbers side by side, which takes a fraction of the time
            log_det = invert(inner)
            cov = inner.permute(2, 0, 1, 3)
        else:
            root = torch.linalg.cholesky(inner.permute(2, 3, 0, 1))
            log_det = 2 * root.diagonal(dim1=2, dim2=3).log().sum(-1)
            cov = torch.cholesky_inverse(root).permute(0, 2, 3, 1)
        of_noise = (at.noise.log() + math.log(2 * math.pi)) @ patterns.mT
        return _Patterns(cov, at.log_weights.reshape(-1, 1) - 0.5 * (of_noise + log_det))

    def joint(self, at: Analysers, value: Tensor, seen: Tensor, pattern: Tensor) -> tuple[Tensor, Tensor]:
        """log w_k p(x_o | k) (B K, n), and the means (B K, F, n) of the latents given x_o and k."""
        # W'psi^-1 (x - m) and (x - m)'psi^-1 (x - m) of the observed cells, as sums of x, x^2 and 1
        scaled, loc = at.loading / at.noise[..., None], at.loading[..., -1]
        loading, by_noise = scaled[..., :-1].mT, scaled[..., -1]  # (B K, F, T), (B K, T)
        along = loading @ value.mT - (loading * loc[:, None]) @ seen.mT  # (B K, F, n)
        square = (
            value.square() @ at.noise.reciprocal().mT - 2 * value @ by_noise.mT + seen @ (by_noise * loc).mT
        )
        cov = self.cov
        if cov.shape[-1] == 1:
            mean = cov[..., 0] @ along
        else:
            mean = (cov[..., pattern] * along[:, None]).sum(2)
        return self.constant[:, pattern] - 0.5 * (square.mT - (along * mean).sum(1)), mean


def m_step(sums: Sums, before: Analysers, prior: Tensor | None) -> Analysers:
    """The mixture that these sums make likeliest; of a token without cells in a component all stays as it is."""
    unseen = sums.n <= MIN_CELLS
    a = torch.where(unseen[..., None, None], torch.eye(sums.a.shape[-1]).to(sums.a), sums.a)
    loading = torch.linalg.solve(a, sums.b[..., None])[..., 0]
    loading = torch.where(unseen[..., None], before.loading, loading)
    rest = sums.residual(loading).clamp(min=0)
    if prior is None:
        noise = torch.where(unseen, before.noise, rest / torch.where(unseen, 1.0, sums.n))
    else:
        noise = (rest + prior) / (sums.n + 1)
    share = (sums.sizes / sums.sizes.sum(1, keepdim=True)).clamp(min=MIN_WEIGHT)
    return Analysers((share / share.sum(1, keepdim=True)).log(), loading, noise.clamp(min=MIN_NOISE))


def log_prior(at: Analysers, prior: Tensor | None) -> Tensor:
    """Of the noise variances (B,), a constant left out: -1/2 sum (log psi + L / psi)."""
    if prior is None:
        return torch.zeros_like(at.log_weights[:, 0])
    return -0.5 * (at.noise.log() + prior / at.noise).sum(1).reshape(at.log_weights.shape).sum(1)


def best_start(cells: Cells, starts: list[Analysers], prior: Tensor | None, seed: int) -> Analysers:
    """The start from which a short EM comes furthest, at its end: after some steps the better half goes on.

    Where cells are missing and there is a prior, those that are left breed (`mixture_breeding`).
    """
    ways = _Climb(cells.first(START_ROWS), prior)
    at = ways.joined(starts)
    n_places = PLAN.places if prior is not None and len(cells.patterns) > 1 else 1
    while len(at.log_weights) > n_places:
        at, value = ways(at, ROUND)
        at = ways.taken(at, value.argsort(descending=True)[: len(value) // 2])
    if n_places > 1:
        at = bred(at, len(at.log_weights), ways, PLAN, torch.Generator().manual_seed(seed))
    return at.pick([0])


class _Climb:
    """Steps of several mixtures at once."""

    def __init__(self, cells: Cells, prior: Tensor | None):
        self.cells, self.prior = cells, prior

    def __call__(self, at: Analysers, n_steps: int, cells: Cells | None = None) -> tuple[Analysers, Tensor]:
        """Where mixtures come, and what they score (B,) before the last step."""
        for _ in range(n_steps):
            before, (total, sums) = at, expect(cells or self.cells, at)
            at = m_step(sums, at, self.prior)
        return at, total + log_prior(before, self.prior)

    def taken(self, at: Analysers, index: Tensor) -> Analysers:
        """As `bayes_mpt.models.mixture_breeding.Ways`, here and below."""
        return at.pick(index.tolist())

    def joined(self, parts: list[Analysers]) -> Analysers:
        return Analysers(*(torch.cat(each) for each in zip(*parts, strict=True)))

    def judged(self, at: Analysers) -> tuple[Analysers, Tensor]:
        return self(at, JUDGED)

    def settled(self, at: Analysers) -> tuple[Analysers, Tensor]:
        return self(at, SETTLED)

    def shaken(self, at: Analysers, generator: torch.Generator) -> Analysers:
        shape = len(at.log_weights), len(self.cells.value)
        counts = random_counts(shape, generator).to(self.cells.value)
        return self(at, SHAKEN, self.cells._replace(counts=counts))[0]

    def child(self, first: Analysers, second: Analysers, generator: torch.Generator) -> Analysers:
        shares: list[dict[Key, Tensor]] = [{}, {}]
        for parent, told in zip((first, second), shares, strict=True):
            expect(self.cells, parent, told=told)
        # what a child expects of the latents is as in the first parent
        sums = expect(self.cells, first, given=crossed(shares[0], shares[1], generator))[1]
        return self(m_step(sums, first, self.prior), CHILD)[0]


def climb(
    cells: Cells, start: Analysers, *, prior: Tensor | None = None, tol: float, max_iter: int
) -> Analysers:
    """A mixture whose score no longer slopes, from one start, by EM and then L-BFGS.

    Parameters
    ----------
    cells : Cells
        The rows.
    start : Analysers
        Where it begins.
    prior : Tensor of shape (T,), optional
        L.
    tol : float
        It ends where no step has more than this share of the mean score to gain.
    max_iter : int
        Most steps.

    Raises
    ------
    KeyboardInterrupt
        At Ctrl-C; after the first step its argument is the mixture as it is then.
    """
    at = start
    try:
        for _ in range(min(max_iter, EM_STEPS)):
            at = m_step(expect(cells, at)[1], at, prior)
        return at if max_iter <= EM_STEPS else _end(cells, at, prior, tol, max_iter - EM_STEPS)
    except KeyboardInterrupt as press:
        if at is start or press.args:
            raise
        raise KeyboardInterrupt(at) from press


def _end(cells: Cells, start: Analysers, prior: Tensor | None, tol: float, max_iter: int) -> Analysers:
    """Where L-BFGS ends, over steps phi of curvature one in EM's bound at the start.

    log weights + phi / (sizes / N)^1/2,   w + psi^1/2 (A / N)^-1/2 phi,   log psi + phi (2 N / n)^1/2
    """
    n_rows, log_unit = float(len(cells.value)), cells.log_unit
    sums = expect(cells, start)[1]
    of_weights = (sums.sizes / n_rows).clamp(min=MIN_SHARE).rsqrt()
    eye = torch.eye(start.loading.shape[-1]).to(start.loading)
    root = torch.linalg.cholesky(sums.a / n_rows + MIN_SHARE * eye)
    width = start.noise.sqrt()[..., None]
    of_noise = (2 / (sums.n / n_rows).clamp(min=MIN_SHARE)).sqrt()
    parts = [start.log_weights.numel(), start.loading.numel(), start.noise.numel()]
    low = math.log(MIN_NOISE)

    def place(phi: Tensor) -> Analysers:
        weights, loading, noise = phi.split(parts)
        step = torch.linalg.solve_triangular(
            root.mT, loading.reshape(start.loading.shape)[..., None], upper=True
        )
        log_noise = start.noise.log() + of_noise * noise.reshape(start.noise.shape)
        return Analysers(
            (start.log_weights + of_weights * weights.reshape(of_weights.shape)).log_softmax(1),
            start.loading + width * step[..., 0],
            log_noise.clamp(min=low).exp(),
        )

    def measure(at: Analysers) -> tuple[float, Tensor, bool]:
        total, sums = expect(cells, at)
        of_loading = (sums.b - (sums.a @ at.loading[..., None])[..., 0]) / at.noise[..., None]
        rest, n = sums.residual(at.loading), sums.n
        if prior is not None:
            rest, n = rest + prior, n + 1
        log_noise = 0.5 * (rest / at.noise - n)
        log_noise = torch.where(
            at.noise <= MIN_NOISE, log_noise.clamp(min=0), log_noise
        )  # as low as it may be
        slope = [
            of_weights * (sums.sizes - n_rows * at.log_weights.exp()),
            torch.linalg.solve_triangular(root, (width * of_loading)[..., None], upper=False),
            of_noise * log_noise,
        ]
        along = torch.cat([part.flatten() for part in slope]) / n_rows
        score = (float(total + log_prior(at, prior)) - log_unit) / n_rows
        return score, along, float(along.abs().max()) <= MARGIN * flat(tol, score)

    free = torch.full((parts[0] + parts[1],), -math.inf).to(start.noise)
    least = torch.cat([free, ((low - start.noise.log()) / of_noise).flatten()])
    return QuasiNewton(start, place, measure, least).run(sum(parts), start.noise, max_iter)
