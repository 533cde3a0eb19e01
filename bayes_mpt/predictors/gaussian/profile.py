"""The profile likelihood of Gaussian factors: mean and loadings are maximised out.

With S the covariance (T, T) of the rows, x ~ N(mean, W W' + diag(psi)) and psi fixed, the best loadings follow from
one eigendecomposition (Joreskog 1967; Tipping & Bishop 1999 for psi = v I):

    psi^-1/2 S psi^-1/2 = sum_i lambda_i u_i u_i',    theta_k = max(lambda_k, 1),    W = psi^1/2 U (theta - 1)^1/2

    LML / N = -1/2 [ T log 2 pi + sum_i log psi_i + sum_{k<=K} (log theta_k + lambda_k / theta_k) + sum_{k>K} lambda_k ]

so that only the noise is left to be searched. Where S is given as R' R with fewer rows R than columns, all of it is
algebra of the rows: the eigenvectors are u = psi^-1/2 R' e / lambda^1/2 with e those of R psi^-1 R', and S is not made.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh, svd
from scipy.linalg.lapack import dpotrf, dpotrs

from bayes_mpt.predictors.gaussian.by_rows import maximise_by_rows
from bayes_mpt.predictors.gaussian.factors import (
    BOUNDS,
    LOG_2PI,
    Factors,
    NoiseFloorError,
    Prior,
    least_noise,
)
from bayes_mpt.program.statistics import Covariance

__all__ = [
    "Factors",
    "NoiseFloorError",
    "Prior",
    "Spectrum",
    "diagonal",
    "least_noise",
    "proportional",
    "spectrum",
]

Array = NDArray[np.float64]

LONGEST_STEP = 3.0
NEAR_FLOOR = 3.0  # of log psi
ROUNDING = float(np.finfo(np.float64).eps)
MIN_EIGENVALUE_RATIO = (
    1e-9  # of the largest eigenvalue of a squared matrix: smaller ones have lost too many digits
)
MAX_DENSE = 200  # tokens up to which Newton's method on their covariance costs less than steps by rows


class Spectrum(NamedTuple):
    """Eigenvalues, the largest first, and vectors of shape^-1/2 S shape^-1/2."""

    value: Array
    """(R,), R <= T: the others are zero."""
    vectors: Array
    """(T, n), of the n largest."""
    rank: int
    """Directions in which the rows differ, whatever the columns' scales."""


def spectrum(cov: Covariance, shape: Array, n_vectors: int | None = None) -> Spectrum:
    """Decompose the covariance in units of a known noise shape (T,); serves every number of latents up to n_vectors."""
    if cov.rows is not None:
        return _spectrum_of_root(cov.rows, shape, n_vectors)
    root, rank = _root(cov.dense())
    # singular values of shape^-1/2 root, not eigenvalues of its square: half the digits would go
    vectors, singular, _ = svd(root / np.sqrt(shape)[:, None], full_matrices=False)
    return Spectrum(singular**2, vectors, rank)


def _spectrum_of_root(rows: Array, shape: Array, n_vectors: int | None) -> Spectrum:
    scaled = rows / np.sqrt(shape)  # (R, T)
    n_rows, n_tokens = rows.shape
    if n_rows < n_tokens:
        value, vectors = eigh(scaled @ scaled.T, driver="evd", check_finite=False)
        if n_rows and value[0] > MIN_EIGENVALUE_RATIO * value[-1]:
            value = value[::-1]
            vectors = scaled.T @ vectors[:, ::-1][:, :n_vectors] / np.sqrt(value[:n_vectors])
            return Spectrum(value, vectors, n_rows)
    vectors, singular, _ = svd(scaled.T, full_matrices=False, check_finite=False)
    sd = np.sqrt(np.square(rows).sum(0))
    alike = singular
    if not (shape == sd**2).all():
        alike = svd(rows / np.where(sd > 0, sd, 1.0), compute_uv=False, check_finite=False)
    rank = int((alike > ROUNDING * max(100, n_tokens) * alike.max(initial=0.0)).sum())
    return Spectrum(singular**2, vectors[:, :n_vectors], rank)


def proportional(
    cov: Covariance,
    n_latents: int,
    shape: Array,
    known: Spectrum | None = None,
    *,
    prior: Prior | None = None,
    at_floor: bool = False,
) -> Factors:
    """Maximise over noise = c * shape, c > 0: one eigendecomposition (Tipping & Bishop 1999, eq. 8).

    Parameters
    ----------
    cov : Covariance
        Of the rows, divided by N.
    n_latents : int
        K < T.
    shape : array of shape (T,)
        Positive.
    known : Spectrum, optional
        ``spectrum(cov, shape)``, where several numbers of latents are tried.
    prior : Prior, optional
        Of c, its rate of shape (1,): maximise the posterior of log c instead.
    at_floor : bool, default=False
        Where K latents reproduce the covariance, take a noise of the size of rounding errors.

    Raises
    ------
    NoiseFloorError
        If K latents reproduce the covariance without noise.
    """
    n_tokens = len(shape)
    value, vector, rank = spectrum(cov, shape, n_latents) if known is None else known
    largest = value[0] if len(value) else 0.0
    c = _factor(value, n_latents, n_tokens, prior)
    if n_latents >= rank:  # no direction is left for the noise
        if not at_floor or not largest:
            raise NoiseFloorError(list(range(n_tokens)))
        c = max(c, largest * (10 * ROUNDING * max(100, n_tokens)) ** 2)
    theta = np.maximum(value[:n_latents] / c, 1.0)
    lml = -0.5 * (
        n_tokens * LOG_2PI
        + np.log(c * shape).sum()
        + (np.log(theta) + value[:n_latents] / c / theta).sum()
        + value[n_latents:].sum() / c
    )
    return Factors(float(lml), c * shape, theta, vector[:, :n_latents], 1)


def _factor(value: Array, n_latents: int, n_tokens: int, prior: Prior | None) -> float:
    """The best c for these eigenvalues: the mean of what no latent takes up, or where the posterior is highest.

    A latent is used where its eigenvalue is above c. As a function of log c minus the posterior is convex, so that the
    number of latents for which its lowest point uses just these is the one.
    """
    if prior is None:
        return float(value[n_latents:].sum() / (n_tokens - n_latents))
    b = float(prior.rate[0]) / prior.n_rows
    for n_used in range(min(n_latents, len(value)), -1, -1):
        a = (n_tokens - n_used) / 2 - prior.shape / prior.n_rows
        c = float(least_noise(a, b, value[n_used:].sum()))
        if not n_used or c <= value[n_used - 1]:
            break
    return c


def diagonal(
    cov: Covariance,
    n_latents: int,
    *,
    start: Array | None = None,
    prior: Prior | None = None,
    max_iter: int = 1000,
    tol: float = 1e-10,
    refuse: bool = True,
) -> Factors:
    """Maximise over a noise variance of each token: by Newton's method with the exact Hessian, damped.

    Of many tokens and fewer rows by steps that cost as much as the rows have numbers.

    Parameters
    ----------
    cov : Covariance
        Of the rows, divided by N.
    n_latents : int
        K.
    start : array of shape (T,), optional
        Noise variances to start from; 1 / diag(cov^-1) by default, what the other tokens leave unexplained.
    prior : Prior, optional
        Maximise the posterior of log psi instead.
    max_iter : int, default=1000
        Of either.
    tol : float, default=1e-10
        Relative change of the objective at which it stops.
    refuse : bool, default=True
        Whether a likelihood without bound is an error; else the noise ends at its floor.

    Raises
    ------
    NoiseFloorError
        If the likelihood grows without bound: columns that are duplicates, constant, or linear combinations of
        K others.
    """
    sd = np.sqrt(cov.variances)
    if not (sd > 0).all():
        raise NoiseFloorError(list(np.flatnonzero(~(sd > 0))))
    # in units of the columns: the same path at every scale
    scaled = None if prior is None else prior._replace(rate=prior.rate * sd**2)
    given = None if start is None else np.clip(np.log(start / sd**2), *BOUNDS)
    if cov.rows is not None and len(cov.rows) < len(sd) > MAX_DENSE:
        rows = cov.rows / sd
        if prior is None and n_latents >= len(rows):
            raise NoiseFloorError(list(range(len(sd))))
        factors = maximise_by_rows(rows, n_latents, given, scaled, max_iter, tol)
    else:
        corr = cov.dense() / sd / sd[:, None]
        log_start = np.log(_unexplained(corr)) if given is None else given
        log_noise, top, n_iter = _newton(corr, n_latents, log_start, scaled, max_iter, tol)
        if prior is None:
            log_noise, top = _at_bounds(corr, n_latents, log_noise, top, tol)
        value, vectors, _ = top.spectrum
        theta, vectors = np.maximum(value[:n_latents], 1.0), vectors[:, :n_latents]
        factors = Factors(float(top.lml), np.exp(log_noise), theta, vectors, n_iter)
    floor = np.flatnonzero(np.log(factors.noise) <= BOUNDS[0] + 1e-3)
    if prior is None and refuse and len(floor):
        if np.linalg.eigvalsh(cov.among(floor) / sd[floor] / sd[floor, None])[0] < 1e-7:
            raise NoiseFloorError(list(floor))
    return factors._replace(lml=float(factors.lml - np.log(sd).sum()), noise=factors.noise * sd**2)


class _Profile:
    """LML a row at the best loadings as a function of log psi, with its derivatives."""

    def __init__(self, corr: Array, n_latents: int, log_noise: Array):
        root = np.exp(-0.5 * log_noise)
        value, vectors = np.linalg.eigh(corr * root * root[:, None])  # the smallest first
        self.spectrum = Spectrum(value[::-1], vectors[:, ::-1], len(corr))
        # theta_k = lambda_k for the latents that are used, 1 for all other directions
        n_used = int((self.spectrum.value[:n_latents] > 1).sum())
        n_rest = len(corr) - n_used
        self.rest, self.used = value[:n_rest], value[n_rest:]  # lambda_m, lambda_k
        self.v, self.u = vectors[:, :n_rest], vectors[:, n_rest:]
        self.lml = -0.5 * (
            len(corr) * LOG_2PI + log_noise.sum() + np.log(self.used).sum() + n_used + self.rest.sum()
        )

    def slope(self) -> Array:
        """(T,) d LML / d log psi_i = -1/2 sum_m (1 - lambda_m) v_im^2, m over the unused directions."""
        return -0.5 * self.v**2 @ (1 - self.rest)

    def curvature(self) -> Array:
        """Minus the Hessian (T, T) in log psi (Jennrich & Robinson 1969), k over the used directions.

        1/2 (sum_m lambda_m v_im v_jm) (sum_m v_im v_jm)
            + 1/2 sum_{k, m} (lambda_k + lambda_m)(1 - lambda_m) / (lambda_k - lambda_m) u_ik u_jk v_im v_jm
        """
        used, rest, u, v = self.used, self.rest, self.u, self.v
        hessian = 0.5 * ((v * rest) @ v.T) * (v @ v.T)
        if len(used):
            gap = np.maximum(used[:, None] - rest, 1e-12)
            weight = 0.5 * (used[:, None] + rest) * (1 - rest) / gap  # (K, T - K)
            pairs = (u[:, :, None] * v[:, None, :]).reshape(len(u), -1)
            hessian += (pairs * weight.ravel()) @ pairs.T
        return hessian


def _newton(
    corr: Array, n_latents: int, log_noise: Array, prior: Prior | None, max_iter: int, tol: float
) -> tuple[Array, _Profile, int]:
    """Maximise the profile within bounds by Newton steps, damped as by Levenberg and Marquardt.

    Steps are taken in psi^1/2, where a maximum at zero variance (Heywood) is one step away and not infinitely far;
    with a prior, which keeps away from zero, in log psi.
    """
    low, high = BOUNDS

    def loss_at(log_noise: Array) -> tuple[float, _Profile]:
        profile = _Profile(corr, n_latents, log_noise)
        loss = -profile.lml
        if prior is not None:
            # log p(log psi) = a log psi - b psi + const, a row's share of it
            loss -= float((prior.shape * log_noise - prior.rate * np.exp(log_noise)).sum()) / prior.n_rows
        return loss, profile

    damping = 1e-2
    loss, profile = loss_at(log_noise)
    for iteration in range(1, max_iter + 1):
        slope, curvature = -profile.slope(), profile.curvature()
        if prior is not None:
            ratio = prior.rate * np.exp(log_noise)
            slope -= (prior.shape - ratio) / prior.n_rows
            curvature.flat[:: len(slope) + 1] += ratio / prior.n_rows
        else:  # d = 2 (change of psi^1/2) / psi^1/2 has the slope of log psi and half of it less curvature
            curvature.flat[:: len(slope) + 1] -= slope / 2
        free = ~((log_noise <= low) & (slope > 0) | (log_noise >= high) & (slope < 0))
        if not free.any() or np.abs(slope[free]).max() < 1e-8:
            return log_noise, profile, iteration
        if not free.all():
            curvature, slope = curvature[np.ix_(free, free)], slope[free]
        unit = np.maximum(np.abs(curvature.diagonal()), 1e-8)
        while True:
            damped = curvature.copy()
            damped.flat[:: len(unit) + 1] += damping * unit
            factor, not_positive = dpotrf(damped, lower=1)
            step = np.zeros_like(log_noise)
            if not not_positive:
                step[free] = -dpotrs(factor, slope, lower=1)[0]
            if not_positive or np.abs(step).max() > LONGEST_STEP:
                damping = max(4 * damping, 1e-3)
                continue
            moved = step if prior is not None else 2 * np.log(np.maximum(1 + step / 2, 1e-6))
            trial = np.minimum(np.maximum(log_noise + moved, low), high)
            change = (trial - log_noise)[free]
            if prior is None:
                change = 2 * np.expm1(change / 2)
            expected = -float(slope @ change + change @ curvature @ change / 2)
            if expected < 1e-3 * tol * (1 + abs(loss)):  # nothing left that could be told from rounding
                return log_noise, profile, iteration
            new_loss, new_profile = loss_at(trial)
            gain = loss - new_loss
            if gain > 1e-4 * expected:
                break
            damping *= 8
        if gain > 0.75 * expected:
            damping /= 10
        elif gain < 0.25 * expected:
            damping *= 4
        log_noise, loss, profile = trial, new_loss, new_profile
        if gain < tol * (1 + abs(loss)):
            return log_noise, profile, iteration
    return log_noise, profile, max_iter


def _at_bounds(
    corr: Array, n_latents: int, log_noise: Array, top: _Profile, tol: float
) -> tuple[Array, _Profile]:
    """Noises that go to their floor, there: on the last way to it no step gains what could be told from rounding."""
    near = (log_noise > BOUNDS[0]) & (log_noise < BOUNDS[0] + NEAR_FLOOR) & (top.slope() < 0)
    if not near.any():
        return log_noise, top
    moved = np.where(near, BOUNDS[0], log_noise)
    there = _Profile(corr, n_latents, moved)
    # the slope tells that it gains; of the greatest eigenvalue, about 1 / psi, the LML has its rounding
    lost = tol * (1 + abs(top.lml)) + ROUNDING * len(corr) * there.spectrum.value[0]
    return (moved, there) if there.lml > top.lml - lost else (log_noise, top)


def _root(cov: Array) -> tuple[Array, int]:
    """A root of the covariance, taken in correlation units (scales of 1e-8 to 1e8 keep their digits), and its rank."""
    sd = np.sqrt(np.diag(cov))
    unit = np.where(sd > 0, sd, 1.0)
    value, vector = eigh(cov / unit / unit[:, None], driver="evd", check_finite=False)
    kept = value > 1e-13 * len(cov) * max(value[-1], 0.0)
    return unit[:, None] * vector * np.sqrt(np.where(kept, value, 0.0)), int(kept.sum())


def _unexplained(corr: Array) -> Array:
    """1 / diag(R^-1): the variance that a regression on the other tokens leaves; a ridge where R is singular."""
    value, vector = np.linalg.eigh(corr)
    value = np.maximum(value, 1e-3)
    return np.clip(1 / (vector**2 @ (1 / value)), 1e-3, 1.0)
