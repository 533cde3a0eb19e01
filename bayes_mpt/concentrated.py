"""The Gaussian factor likelihood with mean and loadings maximised out.

With S the covariance (T, T) of the rows, x ~ N(mean, W W' + diag(psi)) and psi fixed, the best loadings follow from
one eigendecomposition (Joreskog 1967; Tipping & Bishop 1999 for psi = v I):

    psi^-1/2 S psi^-1/2 = sum_i lambda_i u_i u_i',    theta_k = max(lambda_k, 1),    W = psi^1/2 U (theta - 1)^1/2

    LML / N = -1/2 [ T log 2 pi + sum_i log psi_i + sum_{k<=K} (log theta_k + lambda_k / theta_k) + sum_{k>K} lambda_k ]

so that only the noise is left to be searched.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh, svd
from scipy.optimize import minimize

__all__ = ["Factors", "NoiseFloorError", "Prior", "Spectrum", "diagonal", "proportional", "spectrum"]

Array = NDArray[np.float64]

FLOOR = 1e-8  # least noise variance, of the column's variance
LOG_2PI = math.log(2 * math.pi)


class NoiseFloorError(ValueError):
    """The likelihood has no maximum: these columns can be reproduced without noise."""

    def __init__(self, columns: list[int]):
        self.columns = columns
        super().__init__(f"columns {columns} are reproduced without noise")


class Factors(NamedTuple):
    """A maximum over the loadings."""

    lml: float
    """Nats a row."""
    noise: Array
    """(T,) psi."""
    spectrum: Array
    """(K,) theta, the leading eigenvalues of psi^-1/2 S psi^-1/2, at least 1."""
    vectors: Array
    """(T, K) U."""
    n_iter: int

    @property
    def loading(self) -> Array:
        """(T, K) W."""
        return np.sqrt(self.noise)[:, None] * self.vectors * np.sqrt(self.spectrum - 1)


class Prior(NamedTuple):
    """psi_i ~ Gamma(shape, rate_i)."""

    shape: float
    rate: Array
    """(T,)"""
    n_rows: int
    """N: how many rows' likelihood the prior stands against."""


class Spectrum(NamedTuple):
    """Eigenvalues, the largest first, and vectors of shape^-1/2 S shape^-1/2."""

    value: Array
    """(T,)"""
    vectors: Array
    """(T, T)"""
    rank: int
    """Directions in which the rows differ, whatever the columns' scales."""


def spectrum(cov: Array, shape: Array) -> Spectrum:
    """Decompose the covariance in units of a known noise shape (T,); serves every number of latents."""
    root, rank = _root(cov)
    # singular values of shape^-1/2 root, not eigenvalues of its square: half the digits would go
    vectors, singular, _ = svd(root / np.sqrt(shape)[:, None], full_matrices=False)
    return Spectrum(singular**2, vectors, rank)


def proportional(cov: Array, n_latents: int, shape: Array, known: Spectrum | None = None) -> Factors:
    """Maximise over noise = c * shape, c > 0: one eigendecomposition (Tipping & Bishop 1999, eq. 8).

    Parameters
    ----------
    cov : array of shape (T, T)
        Covariance, divided by N.
    n_latents : int
        K < T.
    shape : array of shape (T,)
        Positive.
    known : Spectrum, optional
        ``spectrum(cov, shape)``, where several numbers of latents are tried.

    Raises
    ------
    NoiseFloorError
        If K latents reproduce the covariance without noise.
    """
    n_tokens = len(cov)
    value, vector, rank = spectrum(cov, shape) if known is None else known
    if n_latents >= rank:  # no direction is left for the noise
        raise NoiseFloorError(list(range(n_tokens)))
    c = value[n_latents:].mean()
    theta = np.maximum(value[:n_latents] / c, 1.0)
    lml = -0.5 * (
        n_tokens * LOG_2PI
        + np.log(c * shape).sum()
        + (np.log(theta) + value[:n_latents] / c / theta).sum()
        + value[n_latents:].sum() / c
    )
    return Factors(float(lml), c * shape, theta, vector[:, :n_latents], 1)


def diagonal(
    cov: Array,
    n_latents: int,
    *,
    start: Array | None = None,
    prior: Prior | None = None,
    max_iter: int = 1000,
    tol: float = 1e-10,
) -> Factors:
    """Maximise over a noise variance of each token by L-BFGS on their logarithms.

    Parameters
    ----------
    cov : array of shape (T, T)
        Covariance, divided by N.
    n_latents : int
        K.
    start : array of shape (T,), optional
        Noise variances to start from; 1 / diag(cov^-1) by default, what the other tokens leave unexplained.
    prior : Prior, optional
        Maximise the posterior of log psi instead.
    max_iter : int, default=1000
        Of L-BFGS.
    tol : float, default=1e-10
        Relative change of the objective at which L-BFGS stops.

    Raises
    ------
    NoiseFloorError
        If the likelihood grows without bound: columns that are duplicates, constant, or linear combinations of
        K others.
    """
    sd = np.sqrt(np.diag(cov))
    if not (sd > 0).all():
        raise NoiseFloorError(list(np.flatnonzero(~(sd > 0))))
    corr = cov / sd / sd[:, None]  # in units of the columns: the same path at every scale
    log_start = np.log(_unexplained(corr) if start is None else start / sd**2)
    bounds = [(math.log(FLOOR), 10.0)] * len(cov)
    scaled = None if prior is None else prior._replace(rate=prior.rate * sd**2)

    def loss(log_noise: Array) -> tuple[float, Array]:
        value, grad, _, _ = _profile(corr, n_latents, log_noise)
        if scaled is not None:
            # log p(log psi) = a log psi - b psi + const, a row's share of it
            ratio = scaled.rate * np.exp(log_noise)
            value += (scaled.shape * log_noise - ratio).sum() / scaled.n_rows
            grad = grad + (scaled.shape - ratio) / scaled.n_rows
        return -value, -grad

    result = minimize(
        loss,
        np.clip(log_start, bounds[0][0], bounds[0][1]),
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"maxiter": max_iter, "maxfun": 2 * max_iter, "maxcor": 30, "ftol": tol, "gtol": 1e-6},
    )
    log_noise = np.asarray(result.x)
    floor = np.flatnonzero(log_noise <= bounds[0][0] + 1e-3)
    if prior is None and len(floor):
        least = np.linalg.eigvalsh(corr[np.ix_(floor, floor)])[0]
        if least < 1e-7:
            raise NoiseFloorError(list(floor))
    value, _, theta, vectors = _profile(corr, n_latents, log_noise)
    lml = value - np.log(sd).sum()
    return Factors(float(lml), np.exp(log_noise) * sd**2, theta, vectors, int(result.nit))


def _profile(corr: Array, n_latents: int, log_noise: Array) -> tuple[float, Array, Array, Array]:
    """LML a row at the best loadings, its gradient in log psi, theta and U."""
    value, vector = _eigh(corr, np.exp(log_noise))
    kept = value[:n_latents]
    theta = np.maximum(kept, 1.0)
    lml = -0.5 * (
        len(corr) * LOG_2PI + log_noise.sum() + (np.log(theta) + kept / theta).sum() + value[n_latents:].sum()
    )
    # d LML / d log psi_i = -1/2 sum_k u_ik^2 (1/theta_k - lambda_k / theta_k^2), theta = 1 beyond K; 0 where kept
    all_theta = np.concatenate([theta, np.ones(len(corr) - len(kept))])
    grad = -0.5 * vector**2 @ (1 / all_theta - value / all_theta**2)
    return float(lml), grad, theta, vector[:, :n_latents]


def _root(cov: Array) -> tuple[Array, int]:
    """A root of the covariance, taken in correlation units (scales of 1e-8 to 1e8 keep their digits), and its rank."""
    sd = np.sqrt(np.diag(cov))
    unit = np.where(sd > 0, sd, 1.0)
    value, vector = eigh(cov / unit / unit[:, None], driver="evd", check_finite=False)
    kept = value > 1e-13 * len(cov) * max(value[-1], 0.0)
    return unit[:, None] * vector * np.sqrt(np.where(kept, value, 0.0)), int(kept.sum())


def _eigh(cov: Array, noise: Array) -> tuple[Array, Array]:
    """Eigenvalues, the largest first, and vectors of psi^-1/2 S psi^-1/2."""
    root = np.sqrt(noise)
    value, vector = eigh(cov / root / root[:, None], driver="evd", check_finite=False)
    return value[::-1], vector[:, ::-1]


def _unexplained(corr: Array) -> Array:
    """1 / diag(R^-1): the variance that a regression on the other tokens leaves; a ridge where R is singular."""
    value, vector = eigh(corr)
    value = np.maximum(value, 1e-3)
    return np.clip(1 / (vector**2 @ (1 / value)), 1e-3, 1.0)
