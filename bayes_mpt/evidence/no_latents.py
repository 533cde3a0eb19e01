"""Evidence of independent columns, the factor model without latents: one-dimensional integrals, each on a grid.

With e = log psi / u, and for each noise variance n cells and their scatter s in units of u,

    int N(cells | psi) p(e) de,
    log N = -n/2 (log 2 pi + log u + e) - s / (2 exp e) + 1/2 sum_i log(kappa / (n_i + kappa))

where the means, mu_i | psi_i ~ N(m0_i, psi_i / kappa), are integrated: s = sum_i scatter_i + n_i kappa / (n_i + kappa)
(mean_i - m0_i)^2. The integrand is smooth and falls off on both sides, so sums over equal steps are exact to rounding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from bayes_mpt.evidence.factor_prior import LOG_2PI, FactorPrior

__all__ = ["Cells", "independent_columns"]

Array = NDArray[np.float64]

N_POINTS = 801
REACH = 12.0  # standard deviations of the integrand to both sides


class Cells(NamedTuple):
    """Of the observed cells of each column."""

    n: Array
    """(T,)"""
    mean: Array
    """(T,)"""
    scatter: Array
    """(T,) squares around the mean, summed."""


def independent_columns(
    cells: Cells, prior: FactorPrior, shape: Array | None = None
) -> tuple[float, Array, Array]:
    """Log evidence, points e (P, S) and their posterior weights (P, S).

    ``shape`` (T,) as everywhere: known ratios of the noise variances, or None where each token has its own.
    """
    units = prior.units(shape)
    n = cells.n
    off = n * prior.kappa / (n + prior.kappa) * np.square(cells.mean - prior.center)
    scatter = (cells.scatter + off) / units
    constant = 0.5 * float(
        np.log(prior.kappa / (n + prior.kappa)).sum() - (n * (LOG_2PI + np.log(units))).sum()
    )
    if shape is not None:
        n, scatter = n.sum(keepdims=True), scatter.sum(keepdims=True)
    # mode of (a - n/2) e - a exp e - s/2 exp -e: a positive root of a x^2 - (a - n/2) x - s/2 = 0, x = exp e
    a = prior.noise_shape
    half = (a - 0.5 * n) / 2
    root = np.sqrt(half**2 + 0.5 * a * scatter)
    x = np.where(half > 0, (half + root) / a, 0.5 * scatter / (root - half))
    if not (x > 0).all():
        return math.inf, np.zeros((len(x), 1)), np.ones((len(x), 1))
    sd = 1 / np.sqrt(a * x + 0.5 * scatter / x)
    e = np.log(x)[:, None] + sd[:, None] * np.linspace(-REACH, REACH, N_POINTS)  # (P, S)
    own = prior.log_noise(e.T[:, :, None].reshape(-1, 1))[0].reshape(N_POINTS, -1).T
    log_integrand = own - 0.5 * n[:, None] * e - 0.5 * scatter[:, None] * np.exp(-e)
    total = logsumexp(log_integrand, axis=1)
    step = sd * 2 * REACH / (N_POINTS - 1)
    weight = np.exp(log_integrand - total[:, None])
    return constant + float((total + np.log(step)).sum()), e, weight
