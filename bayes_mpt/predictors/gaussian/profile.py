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

from bayes_mpt.predictors.gaussian.by_rows import maximise_by_rows
from bayes_mpt.predictors.gaussian.factors import (
    BOUNDS,
    LOG_2PI,
    Factors,
    NoiseFloorError,
    Prior,
    least_noise,
)
from bayes_mpt.predictors.gaussian.modes import highest
from bayes_mpt.predictors.gaussian.newton import Climb
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

ROUNDING = float(np.finfo(np.float64).eps)
MIN_EIGENVALUE_RATIO = (
    1e-9  # of the largest eigenvalue of a squared matrix: smaller ones have lost too many digits
)
USUAL_ROWS = 1000  # N of rows of which only the covariance is known
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
    n_rows: int = USUAL_ROWS,
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
    n_rows : int, default=1000
        N: how many rows' likelihood stands against the prior under which the first climbs go
        (`bayes_mpt.predictors.gaussian.modes`).
    start : array of shape (T,), optional
        Noise variances to climb from, once; by default the highest maximum is looked for.
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
        if given is None:
            n_rows = n_rows if scaled is None else scaled.n_rows
            found = {} if cov.maxima is None else cov.maxima
            factors = highest(corr, n_latents, scaled, n_rows, max_iter, tol, found)
        else:
            climb = Climb(corr, scaled, max_iter, tol)
            factors = climb.top(climb.at(n_latents, given)).factors(climb.n_iter)
    floor = np.flatnonzero(np.log(factors.noise) <= BOUNDS[0] + 1e-3)
    if prior is None and refuse and len(floor):
        if np.linalg.eigvalsh(cov.among(floor) / sd[floor] / sd[floor, None])[0] < 1e-7:
            raise NoiseFloorError(list(floor))
    return factors._replace(lml=float(factors.lml - np.log(sd).sum()), noise=factors.noise * sd**2)


def _root(cov: Array) -> tuple[Array, int]:
    """A root of the covariance, taken in correlation units (scales of 1e-8 to 1e8 keep their digits), and its rank."""
    sd = np.sqrt(np.diag(cov))
    unit = np.where(sd > 0, sd, 1.0)
    value, vector = eigh(cov / unit / unit[:, None], driver="evd", check_finite=False)
    kept = value > 1e-13 * len(cov) * max(value[-1], 0.0)
    return unit[:, None] * vector * np.sqrt(np.where(kept, value, 0.0)), int(kept.sum())
