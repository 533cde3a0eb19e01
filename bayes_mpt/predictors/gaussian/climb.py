"""Climbs of the likelihood of rows with missing cells, side by side, by a quasi-Newton method in whitened units.

What moves is W, the noises' standard deviations and the mean (`Coordinates`): in standard deviations a noise may go to
zero in a few steps, where its logarithm would go on for ever, and whether it stays there is told by the sign of the
curvature, which is that of the likelihood's slope in the variance. Steps are taken in units of the Fisher information
of the place, in which the curvature is about one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bayes_mpt.predictors.gaussian.patterns import Maps, Patterns
from bayes_mpt.runtime.interrupts import check

__all__ = ["Climb", "Coordinates"]

Array = NDArray[np.float64]

MIN_NOISE = 1e-8  # noise, of the column's variance, that stands for none: a density needs a width
MIN_SHARED_NOISE = 1e-14  # as one factor for all columns
FEW = 0.01  # standard deviation of a noise that may be on its way to none, and
NONE = 1e-6  # that of one which is there: its slope still tells the curvature
RIDGE = 0.02  # of a token's information, added where loadings or noises have none
MAX_WHOLE = 800  # coordinates up to which their information is taken whole, and not each by itself
MEMORY = 20  # pairs of steps and slopes
TRIES = 12  # of a step, ever shorter
RENEWED = 30  # steps after which the units are those of the place
ROUNDING = 1e-12  # of the total, which its last digits may be off by
FEW_DIGITS = 1e-9  # the same where a noise is next to none, so that a covariance is all but singular
LANCZOS = 16  # products with the Hessian, from which its least eigenvalue is told
NEGATIVE = -1e-3  # curvature in units of the information: what is less is a saddle
AWAY = np.array([0.3, 1.0, 3.0, 10.0])  # steps away from it


class Coordinates:
    """Maps as vectors (B, d): loadings (T K), standard deviations (T, or 1), mean (T); and what is climbed there.

    ``shape`` (T,) are noise variances up to one factor, None where each is free. ``prior`` (a, b) adds the log density
    of log psi under Gamma(a, b), sum_i a log psi_i - b_i psi_i, of each noise or of the one factor.
    """

    def __init__(
        self, cells: Patterns, n_latents: int, shape: Array | None, prior: tuple[float, Array] | None = None
    ):
        self.cells, self.n_latents, self.shape, self.prior = cells, n_latents, shape, prior
        self.n_tokens = len(cells.shown)
        self.n_noise = self.n_tokens if shape is None else 1
        self.least = MIN_NOISE if shape is None else MIN_SHARED_NOISE
        self.unit = np.ones(self.n_tokens) if shape is None else shape
        self.size = self.n_tokens * n_latents + self.n_noise + self.n_tokens

    def of(self, maps: Maps) -> Array:
        """The vectors of some maps."""
        sd = np.sqrt(np.maximum(maps.noise / self.unit - self.least, 0.0))[:, : self.n_noise]
        return np.concatenate([maps.loading.reshape(len(sd), -1), sd, maps.mean], 1)

    def maps(self, theta: Array) -> Maps:
        """The maps of some vectors."""
        loading, sd, mean = self._split(theta)
        noise = self.unit * (self.least + sd**2)
        return Maps(mean, loading.reshape(len(theta), self.n_tokens, self.n_latents), noise)

    def _split(self, theta: Array) -> list[Array]:
        n = self.n_tokens * self.n_latents
        return np.split(theta, [n, n + self.n_noise], axis=1)

    def _factor(self, maps: Maps) -> Array:
        """(B, P) what the prior is of."""
        return (maps.noise / self.unit)[:, : self.n_noise]

    def value(self, maps: Maps, total: Array) -> Array:
        """A score with the log prior."""
        if self.prior is None:
            return total
        (a, b), psi = self.prior, self._factor(maps)
        return total + (a * np.log(psi) - b * psi).sum(1)

    def slopes(self, theta: Array) -> tuple[Array, Array]:
        """Value (B,) and slopes (B, d)."""
        maps = self.maps(theta)
        found = self.cells.slopes(maps)
        of_factor = found.noise * self.unit
        if self.shape is not None:
            of_factor = of_factor.sum(1, keepdims=True)
        if self.prior is not None:
            a, b = self.prior
            of_factor = of_factor + a / self._factor(maps) - b
        sd = self._split(theta)[1]
        slope = np.concatenate(
            [found.loading.reshape(len(theta), -1), 2 * sd * of_factor, found.mean], axis=1
        )
        return self.value(maps, found.total), slope

    def without(self, theta: Array, slope: Array) -> Array:
        """The vectors with no noise where it is all but zero, and where the value falls as it grows from there."""
        n = self.n_tokens * self.n_latents
        sd, of_sd = theta[:, n : n + self.n_noise], slope[:, n : n + self.n_noise]
        moved = theta.copy()
        if self.shape is None:
            moved[:, n : n + self.n_noise] = np.where((np.abs(sd) < FEW) & (of_sd * sd < 0), NONE, sd)
        return moved

    def whitening(self, theta: Array, slope: Array) -> Array:
        """(d, d) A of one vector (d,), with A A' the inverse of the information, or (d,) its diagonal where d is large.

        The likelihood's ``slope`` (d,) there tells how it curves in the deviation of a noise that goes to zero.
        """
        maps = self.maps(theta[None])
        t, k, p = self.n_tokens, self.n_latents, self.n_noise
        sd = self._split(theta[None])[1][0]
        moved = 2 * sd * (self.unit[:, None] if p == 1 else np.diag(self.unit))  # (T, P) of psi
        own, own_loading, own_noise = self.cells.own_information(maps)
        ridge_loading = RIDGE * np.repeat(own, k)
        ridge_noise = RIDGE * (own if p == t else np.array([self.unit @ own]))
        of_sd = self._split(slope[None])[1][0]
        ridge_noise = ridge_noise + np.maximum(-of_sd, 0.0) / np.maximum(sd, 1e-12)
        if self.size > MAX_WHOLE:
            parts = [own_loading.ravel() + ridge_loading, own_noise @ moved**2 + ridge_noise, own]
            return 1 / np.sqrt(np.abs(np.concatenate(parts)))
        info = self.cells.information(maps)
        noise = moved.T @ info.noise @ moved
        cross = info.cross.reshape(t * k, t) @ moved
        loading = info.loading.reshape(t * k, t * k)
        first = t * k + p
        matrix = np.zeros((self.size, self.size))
        matrix[: t * k, : t * k] = loading + np.diag(ridge_loading)
        matrix[: t * k, t * k : first] = cross
        matrix[t * k : first, : t * k] = cross.T
        matrix[t * k : first, t * k : first] = noise + np.diag(ridge_noise)
        matrix[first:, first:] = info.mean
        unit = 1 / np.sqrt(np.abs(np.diag(matrix)))  # rounding, where all but no noise is left
        return unit[:, None] * np.linalg.inv(_root(matrix * unit * unit[:, None])).T


class _Places(NamedTuple):
    """Where climbs are."""

    theta: Array
    """(B, d)"""
    value: Array
    """(B,) nats of all rows."""
    slope: Array
    """(B, d) in theta."""

    def some(self, which: NDArray[np.intp] | NDArray[np.bool_]) -> _Places:
        return _Places(*(part[which] for part in self))


class Climb:
    """Climbs from several places (B, d), side by side."""

    def __init__(self, coordinates: Coordinates, theta: Array, n_iter: int = 0):
        self.coordinates = coordinates
        self.at = _Places(theta, *coordinates.slopes(theta))
        self.n_iter = n_iter
        self.left = np.full(len(theta), np.inf)
        """(B,) nats that a step of Newton's method would gain, by the information."""

    def keep(self, which: NDArray[np.intp]) -> None:
        """Go on from some of the places only."""
        self.at, self.left = self.at.some(which), self.left[which]

    @property
    def best(self) -> int:
        return int(np.argmax(self.at.value))

    def run(self, tol: float, max_iter: int) -> None:
        """Climb until no more than ``tol`` nats are left, or no step gains anything."""
        while self.n_iter < max_iter:
            white = self._white()
            moving = np.flatnonzero(self._decrement(white) > tol)
            if not len(moving):
                return
            before = self.at.value.copy()
            self._rounds([white[b] for b in moving], moving, tol, min(RENEWED, max_iter - self.n_iter))
            if (self.at.value - before <= ROUNDING * np.abs(before))[moving].all():
                self._decrement(self._white())
                return

    def _white(self) -> list[Array]:
        return [self.coordinates.whitening(*at) for at in zip(self.at.theta, self.at.slope, strict=True)]

    def _decrement(self, white: list[Array]) -> Array:
        slopes = [_times(w, s, transposed=True) for w, s in zip(white, self.at.slope, strict=True)]
        self.left = np.array([0.5 * s @ s for s in slopes])
        return self.left

    def _rounds(self, white: list[Array], moving: NDArray[np.intp], tol: float, n_steps: int) -> None:
        """L-BFGS in fixed units."""
        stacked = np.stack(white)
        at = self.at.some(moving)
        slope = _times(stacked, at.slope, transposed=True)
        steps, changes = np.zeros((0, *slope.shape)), np.zeros((0, *slope.shape))
        going = np.arange(len(moving))
        for _ in range(n_steps):
            check()
            direction = _direction(slope, steps, changes)
            rise = (direction * slope).sum(1)
            direction = np.where(rise[:, None] > 0, direction, slope)
            rise = np.where(rise > 0, rise, (slope**2).sum(1))
            new, length = self._search(at, _times(stacked, direction), rise)
            self.n_iter += 1
            new_slope = _times(stacked, new.slope, transposed=True)
            gain = new.value - at.value
            steps = np.concatenate([steps, (length[:, None] * direction)[None]])[-MEMORY:]
            changes = np.concatenate([changes, (slope - new_slope)[None]])[-MEMORY:]
            at, slope = new, new_slope
            for places, part in zip(self.at, at, strict=True):
                places[moving[going]] = part
            on = (0.5 * (slope**2).sum(1) > tol / 10) & (gain > ROUNDING * np.abs(at.value))
            if not on.all():
                going, at, slope, stacked = going[on], at.some(on), slope[on], stacked[on]
                steps, changes = steps[:, on], changes[:, on]
            if not len(going):
                return

    def _search(self, at: _Places, direction: Array, rise: Array) -> tuple[_Places, Array]:
        """New places along directions (B, d), with steps shortened until they gain; 0 where none does."""
        length, found = np.ones(len(rise)), _Places(*(part.copy() for part in at))
        open_ = np.arange(len(rise))
        for _ in range(TRIES):
            theta = at.theta[open_] + length[open_, None] * direction[open_]
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                value, slope = self.coordinates.slopes(theta)
            gain = value - at.value[open_]
            good = (gain >= 1e-4 * length[open_] * rise[open_]) & np.isfinite(slope).all(1)
            done = open_[good]
            for part, new in zip(found, (theta, value, slope), strict=True):
                part[done] = new[good]
            if good.all():
                return found, length
            open_, gain = open_[~good], gain[~good]
            # the top of the parabola through both ends
            curve = rise[open_] * length[open_] - gain
            with np.errstate(invalid="ignore", divide="ignore"):
                share = np.where(np.isfinite(curve), 0.5 * rise[open_] * length[open_] / curve, 0.1)
            length[open_] *= np.clip(np.nan_to_num(share, nan=0.1), 0.1, 0.5)
        length[open_] = 0.0
        return found, length

    def settle(self, tol: float) -> bool:
        """Take away noises that the slope drives to zero, if that loses less than ``tol``; whether there are some."""
        theta = self.coordinates.without(self.at.theta, self.at.slope)
        if (theta == self.at.theta).all():
            return False
        new = _Places(theta, *self.coordinates.slopes(theta))
        if (new.value < self.at.value - np.maximum(tol, FEW_DIGITS * np.abs(self.at.value))).any():
            return False
        self.at = new
        return True

    def leave_saddle(self, rng: np.random.Generator) -> bool:
        """Move the only place along a direction in which the likelihood curves upwards; whether one gains."""
        theta, white = self.at.theta[0], self._white()[0]
        value, vector = self._least_curvature(theta, white, rng)
        if value > NEGATIVE:
            return False
        step = np.concatenate([AWAY, -AWAY])[:, None] * _times(white, vector)
        places = theta + step
        values, slopes = self.coordinates.slopes(places)
        best = int(np.nanargmax(values))
        if not values[best] > self.at.value[0] + ROUNDING * abs(self.at.value[0]):
            return False
        self.at = _Places(places[[best]], values[[best]], slopes[[best]])
        return True

    def _least_curvature(self, theta: Array, white: Array, rng: np.random.Generator) -> tuple[float, Array]:
        """The least eigenvalue of minus the Hessian in whitened units, by Lanczos on differences of slopes."""
        step = 1e-4
        n = min(LANCZOS, len(theta))
        basis, alpha, beta = np.zeros((n, len(theta))), np.zeros(n), np.zeros(n)
        v = rng.normal(size=len(theta))
        v /= np.linalg.norm(v)
        for i in range(n):
            check()
            basis[i] = v
            moved = step * _times(white, v)
            _, slopes = self.coordinates.slopes(np.stack([theta + moved, theta - moved]))
            product = _times(white, (slopes[1] - slopes[0]) / (2 * step), transposed=True)
            alpha[i] = product @ v
            product -= basis[: i + 1].T @ (basis[: i + 1] @ product)
            product -= basis[: i + 1].T @ (basis[: i + 1] @ product)
            beta[i] = np.linalg.norm(product)
            if beta[i] < 1e-6:
                n = i + 1
                break
            v = product / beta[i]
        values, vectors = np.linalg.eigh(
            np.diag(alpha[:n]) + np.diag(beta[: n - 1], 1) + np.diag(beta[: n - 1], -1)
        )
        return float(values[0]), basis[:n].T @ vectors[:, 0]


def _root(matrix: Array) -> Array:
    """Cholesky factor of a matrix with ones on its diagonal, with as much of these added as its rounding needs.

    Without noise in some columns the information of the rest is a difference of large numbers.
    """
    for ridge in (1e-9, 1e-6, 1e-3):
        try:
            return np.asarray(np.linalg.cholesky(matrix + ridge * np.eye(len(matrix))))
        except np.linalg.LinAlgError:
            continue
    return np.eye(len(matrix))


def _times(white: Array, vector: Array, *, transposed: bool = False) -> Array:
    """A v, or A' v, of one or of several; of a diagonal A too."""
    if white.ndim == vector.ndim:
        return white * vector
    if transposed:
        white = white.swapaxes(-1, -2)
    return (white @ vector[..., None])[..., 0]


def _direction(slope: Array, steps: Array, changes: Array) -> Array:
    """Two loops over the pairs (M, B, d) of steps and changes of the (downward) slope, each climb with its own."""
    direction = slope.copy()
    curve = (steps * changes).sum(-1)  # (M, B)
    size = (changes**2).sum(-1)
    valid = curve > 1e-10 * np.sqrt(size * (steps**2).sum(-1))
    rho = np.where(valid, 1 / np.where(valid, curve, 1.0), 0.0)
    alphas = []
    for s, y, r in zip(steps[::-1], changes[::-1], rho[::-1], strict=True):
        alpha = r * (s * direction).sum(1)
        direction -= alpha[:, None] * y
        alphas.append(alpha)
    if len(steps):
        last = valid[-1]
        scale = np.where(last, curve[-1] / np.where(last, size[-1], 1.0), 1.0)
        direction *= scale[:, None]
    for s, y, r, alpha in zip(steps, changes, rho, alphas[::-1], strict=True):
        direction += (alpha - r * (y * direction).sum(1))[:, None] * s
    return direction
