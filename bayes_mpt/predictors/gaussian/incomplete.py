"""The Gaussian factor likelihood of rows with missing cells, maximised by EM.

What EM fills in is the cells, not the latents. At x ~ N(m, W W' + diag(psi)) a row that shows the tokens o is
expected to be m + W f where a cell is missing, with f the posterior mean of its latents; its missing cells have the
covariance

    diag(psi) + W C W',    C = (I + W_o' diag(psi_o)^-1 W_o)^-1,    f = C W_o' diag(psi_o)^-1 (x_o - m_o)

Summed over the rows this is the mean and covariance of a complete table, for which the best loadings and noise are
known (`profile`). So each step solves a complete problem: few steps are needed, and a noise that goes to
zero does not hold them up as it does a climb in its logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bayes_mpt.predictors.gaussian.profile import Factors, NoiseFloorError, proportional
from bayes_mpt.program.statistics import Covariance, SufficientStatistics
from bayes_mpt.runtime.interrupts import check

__all__ = ["FewCellsError", "Maximum", "maximise", "refuse_constant_columns", "too_few"]

Array = NDArray[np.float64]
Step = Callable[[Covariance, Array], Factors]

LOG_2PI = math.log(2 * math.pi)
TRIAL_ROWS = 4096  # incomplete rows on which starts are compared
MIN_SHOWN = 64  # of them that show a column, where there are so many
TRIAL_STEPS, TRIAL_TOL = 100, 1e-8  # of a start; the best goes on
MAX_STEPS = 300  # what is slower than that is left to L-BFGS
MIN_SHARE = 0.01  # of a column's variance that is noise at a start, where it is random
PUSH = 0.05  # of a standard deviation, by which the first start is moved away from a saddle
ALIKE = (
    0.01  # largest difference of two correlations, below which two starts are on the way to the same place
)
CHUNK = 2**21  # numbers in one temporary


class FewCellsError(ValueError):
    """The likelihood has no maximum: all cells of these columns are reproduced without noise."""

    def __init__(self, columns: list[int], n_cells: list[int], n_latents: int):
        self.columns, self.n_cells, self.n_latents = columns, n_cells, n_latents
        super().__init__(f"columns {columns} have {n_cells} observed cells")


class Maximum(NamedTuple):
    """Where EM ended, or is on its way."""

    lml: float
    """Nats a row."""
    mean: Array
    """(T,) m."""
    loading: Array
    """(T, K) W."""
    noise: Array
    """(T,) psi."""
    n_iter: int = 0
    interrupted: bool = False
    """By Ctrl-C, on the way."""


def too_few(statistics: SufficientStatistics, n_latents: int) -> FewCellsError | None:
    """What is wrong where a column's own noise may go to zero because it shows too few cells.

    Take K columns that one row shows beside column t, and their noise to zero: where they are observed the latents are
    known, at a finite likelihood. A mean and K loadings, K + 1 numbers, then reproduce K + 1 cells of column t without
    noise, and the likelihood grows without bound as its noise goes to zero. Fewer columns beside it tell fewer latents.
    """
    seen = ~statistics.incomplete.isnan()
    count = statistics.n + seen.sum(0)
    beside = torch.where(seen, seen.sum(1, keepdim=True) - 1, 0)
    most = beside.amax(0) if len(beside) else count * 0
    most = most.clamp(min=seen.shape[1] - 1 if statistics.n else 0)  # columns beside it in one row
    few = (count <= most.clamp(max=n_latents) + 1).nonzero()[:, 0].tolist()
    return FewCellsError(few, count[few].tolist(), n_latents) if few else None


def refuse_constant_columns(statistics: SufficientStatistics) -> None:
    """Refuse columns whose observed cells are equal: their own noise goes to zero.

    Raises
    ------
    NoiseFloorError
    """
    count, mean, square = statistics.of_cells()
    # one cell is that of a column of too few
    constant = ((square / count).sqrt() <= 1e-15 * mean.abs()) & (count > 1)
    if bool(constant.any()):
        raise NoiseFloorError(constant.nonzero()[:, 0].tolist())


def maximise(
    statistics: SufficientStatistics,
    n_latents: int,
    m_step: Step,
    shape: Array | None,
    *,
    n_init: int,
    seed: int,
    max_iter: int,
    tol: float,
) -> Maximum:
    """Climb by EM from several starts, and from the best of them to the end, or from the first step on to Ctrl-C.

    Parameters
    ----------
    statistics : SufficientStatistics
        Complete rows as moments, and incomplete ones.
    n_latents : int
        K.
    m_step : callable
        The best loadings and noise for a covariance (T, T), from a noise (T,) that is near.
    shape : array of shape (T,), optional
        Noise variances up to one factor; None: each is free.
    n_init : int
        Starts: one from the pairs of cells that are observed together, the others random.
    seed : int
        Of these.
    max_iter : int
        Most steps.
    tol : float
        EM ends with a step that gains no more than this share of the score.
    """
    rows, weight = (t.cpu().numpy() for t in statistics.rows())
    available = statistics.available()
    mean, cov = available.mean.cpu().numpy(), available.cov.cpu().numpy()
    rng = np.random.default_rng(seed)
    starts = _starts(mean, cov, n_latents, shape, n_init, rng)
    some = _some(rows, weight, rng)
    best = _best(_Cells(*some), starts, m_step, min(max_iter, TRIAL_STEPS))
    cells = _Cells(rows, weight)
    if best.interrupted:
        return best._replace(lml=cells.expect(best)[0])
    found = _maximize_em(cells, best, m_step, min(max_iter, MAX_STEPS), tol)
    return found._replace(n_iter=best.n_iter + found.n_iter)


def _starts(
    mean: Array, cov: Array, n_latents: int, shape: Array | None, n_init: int, rng: np.random.Generator
) -> list[Maximum]:
    """Principal components of the available pairs, random loadings, and then random shares of noise as well.

    Where noises are free there may be one maximum for each column whose noise can go to zero, and a climb from noises
    that are all large ends in the same one again and again.
    """
    n_tokens, variance = len(cov), np.diag(cov)
    free, shape = shape is None, variance if shape is None else shape
    first = proportional(Covariance(cov), min(n_latents, n_tokens - 1), shape)
    loading = np.zeros((n_tokens, n_latents))
    loading[:, : first.loading.shape[1]] = first.loading
    # Columns that are never seen together have no covariance there, and would keep to none: a saddle.
    loading += PUSH * np.sqrt(variance)[:, None] * rng.normal(size=loading.shape)
    found = [Maximum(-math.inf, mean, loading, first.noise)]
    for start in range(1, n_init):
        noise = shape * (variance / shape).mean() / 2
        if free and start > 1:
            noise = variance * MIN_SHARE ** rng.uniform(size=n_tokens)
        explained = np.maximum(variance - noise, variance * MIN_SHARE)
        random = rng.normal(size=(n_tokens, n_latents)) * np.sqrt(explained / max(1, n_latents))[:, None]
        found.append(Maximum(-math.inf, mean, random, noise))
    return found


def _some(rows: Array, weight: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Not too many of the incomplete rows, at random, and with them rows that show columns of few cells."""
    holes = np.flatnonzero(np.isnan(rows).any(1))
    if len(holes) <= TRIAL_ROWS:
        return rows, weight
    order = rng.permutation(holes)
    shown = ~np.isnan(rows[order])
    kept = (shown & (shown.cumsum(0) <= MIN_SHOWN)).any(1)
    kept[:TRIAL_ROWS] = True
    index = order[kept]
    # the complete rows are a few that stand for all of them
    rest = np.setdiff1d(np.arange(len(rows)), holes)
    share = np.full(len(index), len(holes) / len(index))
    return rows[np.concatenate([rest, index])], np.concatenate([weight[rest], share])


def _best(cells: _Cells, starts: list[Maximum], m_step: Step, max_iter: int) -> Maximum:
    """The best end of the starts, all climbing side by side; those on the way to one place go on as one."""
    climbing, ended, moved = starts, list[Maximum](), list[Maximum]()
    try:
        for _ in range(max_iter):
            moved = []
            for at in climbing:
                check()
                new = cells.step(at, m_step)
                (moved if new.lml - at.lml > TRIAL_TOL * (1 + abs(new.lml)) else ended).append(new)
            climbing = []
            for new in sorted(moved, key=lambda m: -m.lml):
                if not any(_alike(new, better) for better in [*climbing, *ended] if better.lml >= new.lml):
                    climbing.append(new)
            if not climbing:
                break
    except KeyboardInterrupt:
        best = max([*climbing, *ended, *moved], key=lambda m: m.lml)
        if not best.n_iter:
            raise
        return best._replace(interrupted=True)
    return max([*climbing, *ended], key=lambda m: m.lml)


def _alike(one: Maximum, other: Maximum) -> bool:
    """Whether two maps have about the same covariances, in units of the standard deviations of one."""
    var = np.square(one.loading).sum(1) + one.noise
    unit = 1 / np.sqrt(var)
    difference = one.loading @ one.loading.T - other.loading @ other.loading.T
    difference[np.diag_indices_from(difference)] += one.noise - other.noise
    noise = np.abs(one.noise - other.noise) / var
    return bool(max(np.abs(difference * unit * unit[:, None]).max(), noise.max()) < ALIKE)


def _maximize_em(cells: _Cells, at: Maximum, m_step: Step, max_iter: int, tol: float) -> Maximum:
    lml, interrupted = -math.inf, False
    try:
        for _ in range(max_iter):
            check()
            new = cells.step(at, m_step)
            if not new.lml - lml > tol * (1 + abs(new.lml)):
                return at._replace(lml=new.lml)
            lml, at = new.lml, new
    except KeyboardInterrupt:
        if not at.n_iter:
            raise
        interrupted = True
    return at._replace(lml=cells.expect(at)[0], interrupted=interrupted)


class _Cells:
    """Weighted rows (R, T), sorted by which cells they show."""

    def __init__(self, rows: Array, weight: Array):
        seen = ~np.isnan(rows)
        patterns, index = np.unique(seen, axis=0, return_inverse=True)
        order = np.argsort(index.ravel(), kind="stable")
        self.shown = patterns.astype(np.float64)
        """(G, T)"""
        self.index = index.ravel()[order]
        self.rows, self.seen, self.weight = rows[order], seen[order], weight[order]
        self.count = np.bincount(self.index, self.weight)
        self.n_rows = float(weight.sum())

    def step(self, at: Maximum, m_step: Step) -> Maximum:
        """The next step of EM; its ``lml`` is that of the map before, which comes for nothing."""
        lml, mean, cov = self.expect(at)
        factors = m_step(Covariance(cov), at.noise)
        loading = np.zeros_like(at.loading)
        loading[:, : factors.loading.shape[1]] = factors.loading
        return Maximum(lml, mean, loading, factors.noise, at.n_iter + 1)

    def expect(self, at: Maximum) -> tuple[float, Array, Array]:
        """Nats a row at a map; mean and covariance that the rows are expected to have under it."""
        loading, noise = at.loading, at.noise
        n_tokens, n_latents = loading.shape
        scaled = loading / noise[:, None]
        outer = (scaled[:, :, None] * loading[:, None, :]).reshape(n_tokens, -1)
        total, first, second = 0.0, np.zeros(n_tokens), np.zeros((n_tokens, n_tokens))
        step = max(1, CHUNK // max(1, n_latents * (n_latents + n_tokens)))
        edges = np.searchsorted(self.index, np.arange(0, len(self.shown) + step, step))
        for g, (start, end) in enumerate(pairwise(edges)):
            groups = slice(g * step, (g + 1) * step)
            shown, count = self.shown[groups], self.count[groups]
            precision = (shown @ outer).reshape(len(shown), n_latents, n_latents) + np.eye(n_latents)
            factor = np.linalg.cholesky(precision)
            log_det = shown @ np.log(noise) + 2 * np.log(np.diagonal(factor, axis1=1, axis2=2)).sum(1)
            root = np.linalg.inv(factor)  # C = root' root
            total += count @ (log_det + shown.sum(1) * LOG_2PI)
            # the covariance of the missing cells
            hidden = 1 - shown
            part = ((root @ loading.T) * (np.sqrt(count)[:, None] * hidden)[:, None, :]).reshape(-1, n_tokens)
            second += part.T @ part
            second[np.diag_indices(n_tokens)] += (count @ hidden) * noise
            for rows in _slices(start, end, max(1, CHUNK // (n_tokens + n_latents**2))):
                seen, weight = self.seen[rows], self.weight[rows]
                of_group = root[self.index[rows] - g * step]
                apart = np.where(seen, self.rows[rows] - at.mean, 0.0)
                f = (of_group @ (apart @ scaled)[..., None])[..., 0]
                f = (of_group.swapaxes(1, 2) @ f[..., None])[..., 0]
                fitted = f @ loading.T
                rest = np.where(seen, apart - fitted, 0.0)
                # sums of squares: nothing cancels where a noise is all but zero
                total += weight @ ((rest**2 / noise).sum(1) + (f**2).sum(1))
                filled = np.where(seen, apart, fitted)
                first += weight @ filled
                second += (weight[:, None] * filled).T @ filled
        first, second = first / self.n_rows, second / self.n_rows
        return -0.5 * total / self.n_rows, at.mean + first, second - np.outer(first, first)


def _slices(start: int, end: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, end)) for i in range(start, end, step)]
