"""The Gaussian factor likelihood of rows with missing cells, maximised from several starts.

A few steps of EM (`patterns`) bring the starts into sight of their maxima, and a quasi-Newton method to these
(`climb`), all side by side; those on the way to one place go on as one. The best of them is climbed to the end, and
tried for directions in which the likelihood curves upwards: it has saddles, where columns are never seen together.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bayes_mpt.predictors.gaussian.climb import Climb, Coordinates
from bayes_mpt.predictors.gaussian.patterns import Maps, Patterns
from bayes_mpt.predictors.gaussian.profile import (
    NoiseFloorError,
    Prior,
    Spectrum,
    least_noise,
    proportional,
    spectrum,
)
from bayes_mpt.program.statistics import Covariance, SufficientStatistics
from bayes_mpt.runtime.interrupts import check

__all__ = [
    "FewCellsError",
    "Maximum",
    "Pairs",
    "constant_columns",
    "maximise",
    "pairs_of",
    "refuse_constant_columns",
    "too_few",
]

Array = NDArray[np.float64]
TRIAL_ROWS = 4096  # incomplete rows on which starts are compared
MIN_SHOWN = 64  # of them that show a column, where there are so many
EM_STEPS = 15  # of each start
NEAR = 0.02  # nats of all rows, to which all starts climb; the best goes on
ENDED = 1e-5  # nats of all rows that may be left at the end of a climb whose last digits give out
MIN_SHARE = 0.01  # of a column's variance that is noise at a start, where it is random
PUSH = 0.05  # of a standard deviation, by which the first start is moved away from a saddle
ALIKE = (
    0.01  # largest difference of two correlations, below which two starts are on the way to the same place
)
MAX_SADDLES = 4  # that are left


class FewCellsError(ValueError):
    """The likelihood has no maximum: all cells of these columns are reproduced without noise."""

    def __init__(self, columns: list[int], n_cells: list[int], n_latents: int):
        self.columns, self.n_cells, self.n_latents = columns, n_cells, n_latents
        super().__init__(f"columns {columns} have {n_cells} observed cells")


class Maximum(NamedTuple):
    """Where a climb has ended, or is on its way."""

    lml: float
    """Nats a row."""
    mean: Array
    """(T,) m."""
    loading: Array
    """(T, K) W."""
    noise: Array
    """(T,) psi."""
    n_iter: int = 0
    converged: bool = False
    interrupted: bool = False
    """By Ctrl-C, on the way."""


class Pairs(NamedTuple):
    """What the cells that are observed together say of all columns: where climbs start."""

    mean: Array
    """(T,)"""
    sd: Array
    """(T,)"""
    corr: Array
    """(T, T)"""
    known: Spectrum
    """Of the correlations, in units of the noise variances in standard units."""


def pairs_of(statistics: SufficientStatistics, shape: Array | None) -> Pairs:
    """The pairs of cells; of use for all numbers of latents. ``shape`` as of `maximise`."""
    available = statistics.available()
    mean, cov = available.mean.cpu().numpy(), available.cov.cpu().numpy()
    sd = np.sqrt(np.diag(cov))
    sd = np.where(sd > 0, sd, 1.0)
    corr = cov / sd / sd[:, None]
    unit = np.ones(len(sd)) if shape is None else _in_units(shape, sd)
    return Pairs(mean, sd, corr, spectrum(Covariance(corr), unit))


def _in_units(shape: Array, sd: Array) -> Array:
    """Noise variances in units of the variances, such that their common factor is a share of these."""
    scaled = shape / sd**2
    return scaled * (1 / scaled).mean()


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


def constant_columns(statistics: SufficientStatistics, *, of_one_cell: bool = False) -> torch.Tensor:
    """Which columns (T,) have observed cells that are equal; those of one cell too, if asked for."""
    count, mean, square = statistics.of_cells()
    return ((square / count).sqrt() <= 1e-15 * mean.abs()) & (count > (0 if of_one_cell else 1))


def refuse_constant_columns(statistics: SufficientStatistics) -> None:
    """Refuse columns whose observed cells are equal: their own noise goes to zero.

    Raises
    ------
    NoiseFloorError
    """
    constant = constant_columns(statistics)  # one cell is that of a column of too few
    if bool(constant.any()):
        raise NoiseFloorError(constant.nonzero()[:, 0].tolist())


def maximise(
    statistics: SufficientStatistics,
    n_latents: int,
    shape: Array | None,
    *,
    prior: Prior | None = None,
    pairs: Pairs | None = None,
    n_init: int = 8,
    seed: int = 0,
    max_iter: int = 2000,
    tol: float = 1e-10,
) -> Maximum:
    """Climb from several starts, and from the best of them to the end, or from the first step on to Ctrl-C.

    Parameters
    ----------
    statistics : SufficientStatistics
        Complete rows as moments, and incomplete ones.
    n_latents : int
        K.
    shape : array of shape (T,), optional
        Noise variances up to one factor; None: each is free.
    prior : Prior, optional
        Maximise the posterior of the logarithms of the noises instead, or of that factor (a rate of shape (1,)).
    pairs : Pairs, optional
        ``pairs_of(statistics, shape)``, where several numbers of latents are tried.
    n_init : int
        Starts: from the pairs of cells that are observed together, with the noise that these leave and with half of the
        variances, and random ones.
    seed : int
        Of these.
    max_iter : int
        Most steps.
    tol : float
        The climb ends where a step would gain no more than this share of the score.
    """
    rows, weight = (t.cpu().numpy() for t in statistics.rows())
    pairs = pairs_of(statistics, shape) if pairs is None else pairs
    mean, sd = pairs.mean, pairs.sd
    table = _Standardised((rows - mean) / sd, weight, pairs, n_latents, shape, prior)
    found = table.maximise(n_init, np.random.default_rng(seed), max_iter, tol)
    n_cells = (~np.isnan(rows)).T @ weight
    return found._replace(
        lml=found.lml - float(n_cells @ np.log(sd)) / float(weight.sum()),
        mean=mean + sd * found.mean,
        loading=sd[:, None] * found.loading,
        noise=sd**2 * found.noise,
    )


class _Standardised:
    """Rows in units of their columns' standard deviations, and what is to be maximised over them."""

    def __init__(
        self,
        rows: Array,
        weight: Array,
        pairs: Pairs,
        n_latents: int,
        shape: Array | None,
        prior: Prior | None,
    ):
        self.rows, self.weight, self.pairs = rows, weight, pairs
        sd = pairs.sd
        self.n_latents = min(n_latents, len(sd) - (shape is not None))
        self.shape = None if shape is None else _in_units(shape, sd)
        unit = sd**2 if shape is None else (sd**2 / shape).mean()
        self.prior = None if prior is None else (prior.shape, prior.rate * unit)

    def maximise(self, n_init: int, rng: np.random.Generator, max_iter: int, tol: float) -> Maximum:
        self.best: tuple[Maps, int] | None = None  # for Ctrl-C
        cells = Patterns(self.rows, self.weight)
        try:
            starts = self._starts(n_init if self.n_latents else 1, rng)
            some, share = _some(self.rows, self.weight, rng)
            climb = self._side_by_side(Patterns(some, share), starts, max_iter)
            if share is not self.weight:
                climb = Climb(self._coordinates(cells), climb.at.theta, climb.n_iter)
            climb = self._to_the_end(climb, cells, rng, max_iter, tol)
        except KeyboardInterrupt:
            if self.best is None:
                raise
            maps, n_iter = self.best
            return _maximum(maps, cells, n_iter)._replace(interrupted=True)
        maps = climb.coordinates.maps(climb.at.theta)
        left = max(tol * (cells.n_rows + abs(float(climb.at.value[0]))), ENDED)
        return _maximum(maps, cells, climb.n_iter)._replace(converged=bool(climb.left[0] <= left))

    def _coordinates(self, cells: Patterns) -> Coordinates:
        return Coordinates(cells, self.n_latents, self.shape, self.prior)

    def _side_by_side(self, cells: Patterns, maps: Maps, max_iter: int) -> Climb:
        """All starts to near their maxima; the best is left."""
        coordinates, n_iter = self._coordinates(cells), 0
        for _ in range(min(EM_STEPS, max_iter)):
            check()
            total, moved, left = cells.em(maps)
            maps = moved._replace(noise=self._noise(cells, left))
            n_iter += 1
            self.best = maps.some(np.array([int(np.argmax(coordinates.value(maps, total)))])), n_iter
        climb = Climb(coordinates, coordinates.of(maps), n_iter)
        climb.keep(self._apart(climb))
        self._run(climb, NEAR, max_iter)
        climb.keep(np.array([climb.best]))
        return climb

    def _to_the_end(
        self, climb: Climb, cells: Patterns, rng: np.random.Generator, max_iter: int, tol: float
    ) -> Climb:
        for _ in range(MAX_SADDLES):
            left = tol * (cells.n_rows + abs(float(climb.at.value[0])))
            self._run(climb, left, max_iter)
            if climb.settle(left):
                self._run(climb, left, max_iter)
            if climb.n_iter >= max_iter or not self.n_latents or not climb.leave_saddle(rng):
                break
        if climb.settle(
            left
        ):  # steps of other coordinates, in common units, take a noise a little away from zero
            self.best = climb.coordinates.maps(climb.at.theta[[climb.best]]), climb.n_iter
        return climb

    def _run(self, climb: Climb, tol: float, max_iter: int) -> None:
        try:
            climb.run(tol, max_iter)
        finally:
            self.best = climb.coordinates.maps(climb.at.theta[[climb.best]]), climb.n_iter

    def _noise(self, cells: Patterns, left: Array) -> Array:
        """(B, T) noises for the squares that are left, under the prior: A log psi + S / (2 psi) + b psi is least."""
        n = cells.n_seen
        if self.shape is not None:
            n, left = np.array([n.sum()]), (left / self.shape).sum(1, keepdims=True)
        if self.prior is None:
            factor = left / n
        else:
            factor = least_noise(n / 2 - self.prior[0], self.prior[1], left)
        least = 1e-6 if self.shape is None else 0.0
        return np.maximum(factor, least) * (1.0 if self.shape is None else self.shape)

    def _apart(self, climb: Climb) -> NDArray[np.intp]:
        """Which of the climbs to go on with: of those on the way to one place the best."""
        maps, kept = climb.coordinates.maps(climb.at.theta), list[int]()
        cov = maps.loading @ maps.loading.swapaxes(1, 2) + maps.noise[:, :, None] * np.eye(len(self.pairs.sd))
        for b in np.argsort(-climb.at.value, kind="stable"):
            unit = 1 / np.sqrt(np.diagonal(cov[b]))
            if not any(
                (np.abs(cov[b] - cov[a]) * unit * unit[:, None]).max() < ALIKE
                and (np.abs(maps.noise[b] - maps.noise[a]) * unit**2).max() < ALIKE
                for a in kept
            ):
                kept.append(int(b))
        return np.array(kept)

    def _starts(self, n_init: int, rng: np.random.Generator) -> Maps:
        """Principal components of the available pairs, random loadings, and then random shares of noise as well.

        The components are taken with the noise that they leave, and with half of the variances.
        Where noises are free there may be one maximum for each column whose noise can go to zero, and a climb from
        noises that are all large ends in the same one again and again.
        """
        t, k, known = len(self.pairs.sd), self.n_latents, self.pairs.known
        free, shape = self.shape is None, np.ones(t) if self.shape is None else self.shape
        loading, noise = np.zeros((n_init, t, k)), np.tile(0.5 * shape * (1 / shape).mean(), (n_init, 1))
        first = proportional(Covariance(self.pairs.corr), min(k, t - 1), shape, known)
        loading[0, :, : first.loading.shape[1]] = first.loading
        # Columns that are never seen together have no covariance there, and would keep to none: a saddle.
        loading[0] += PUSH * rng.normal(size=(t, k))
        noise[0] = first.noise
        for start in range(1, n_init):
            if start == 1:
                half = 0.5 * (1 / shape).mean()
                size = np.sqrt(np.maximum(known.value[:k] / half - 1, PUSH))
                loading[1] = np.sqrt(noise[1])[:, None] * known.vectors[:, :k] * size
                continue
            if free and start > 2:
                noise[start] = MIN_SHARE ** rng.uniform(size=t)
            explained = np.maximum(1 - noise[start], MIN_SHARE)
            loading[start] = rng.normal(size=(t, k)) * np.sqrt(explained / max(1, k))[:, None]
        return Maps(np.zeros((n_init, t)), loading, noise)


def _maximum(maps: Maps, cells: Patterns, n_iter: int) -> Maximum:
    lml = float(cells.score(maps)[0]) / cells.n_rows
    return Maximum(lml, maps.mean[0], maps.loading[0], maps.noise[0], n_iter)


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
