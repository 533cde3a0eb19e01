"""Whether rows are as Gaussian as the evidence believes: Mardia's kurtosis, against what the posterior predicts.

The observed cells of row i, whitened by a draw of the posterior, have the square q_i = (x - mu)' C^-1 (x - mu), which
is chi-squared with n_i degrees of freedom if the model holds. Heavy tails and outliers raise sum_i q_i^2, which is
compared with its distribution under that draw, a Pearson III of the same first three moments.

Mardia (1970), Biometrika 57, 519; posterior predictive checks: Gelman, Meng and Stern (1996).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln
from scipy.stats import pearson3

from bayes_mpt.evidence.draws import FactorDraws

__all__ = ["Kurtosis", "kurtosis"]

Array = NDArray[np.float64]

N_DRAWS = 64
CHUNK = 2**20  # numbers in one temporary


class Kurtosis(NamedTuple):
    """Of rows under a posterior."""

    ratio: float
    """Of the mean of q^2 to what is expected: above one, tails are heavier than Gaussian."""
    p_heavier: float
    """Probability that rows of the model itself have heavier tails."""
    p_lighter: float


def kurtosis(rows: NDArray[np.floating], draws: FactorDraws, seed: int = 0) -> Kurtosis:
    """Mardia's kurtosis of the observed cells of rows (N, T), averaged over draws of the posterior.

    Examples
    --------
    >>> from bayes_mpt.evidence import factor_prior, sample_evidence
    >>> from bayes_mpt.program.statistics import SufficientStatistics
    >>> rng = np.random.default_rng(0)
    >>> normal, heavy = rng.normal(size=(200, 4)), rng.standard_t(3, size=(200, 4))
    >>> found = [
    ...     kurtosis(x, sample_evidence(SufficientStatistics(x), 0, factor_prior(x)).draws)
    ...     for x in (normal, heavy)
    ... ]
    >>> [k.p_heavier < 0.001 for k in found]
    [False, True]
    """
    rng = np.random.default_rng(seed)
    visible, pattern = np.unique(np.isfinite(rows), axis=0, return_inverse=True)
    pattern = pattern.reshape(-1)
    n = visible.sum(1)[pattern].astype(float)
    n = n[n > 0]
    groups = [rows[pattern == g][:, o] for g, o in enumerate(visible)]
    mean, variance, third = (float(m.sum()) for m in _central_moments(n))
    skewness = third / variance**1.5
    observed = []
    for s in np.linspace(0, len(draws.noise) - 1, min(N_DRAWS, len(draws.noise))).round().astype(int):
        w = draws.loadings[s]
        cov = w @ w.T + np.diag(draws.noise[s])
        mu = draws.means[s] + np.sqrt(draws.spread) * rng.multivariate_normal(np.zeros(len(cov)), cov)
        observed.append(_squares(groups, visible, mu, cov))
    law = pearson3(skewness, mean, math.sqrt(variance))
    return Kurtosis(
        float(np.mean(observed)) / mean, float(law.sf(observed).mean()), float(law.cdf(observed).mean())
    )


def _squares(groups: list[Array], visible: NDArray[np.bool_], mu: Array, cov: Array) -> float:
    """Sum of q^2 over rows, in groups (n_g, |o|) of those that show the same tokens, a row of ``visible`` each."""
    t, total = len(mu), 0.0
    size = max(1, CHUNK // t**2)
    for i in range(0, len(groups), size):
        shown = visible[i : i + size]
        # of one size for all: a token that is not shown has variance one and nothing to do with the others
        precision = np.linalg.inv(np.where(shown[:, :, None] & shown[:, None], cov, np.eye(t)))  # (G, T, T)
        for cells, o, p in zip(groups[i : i + size], shown, precision, strict=True):
            r = cells - mu[o]
            total += float((((r @ p[o][:, o]) * r).sum(1) ** 2).sum())
    return total


def _central_moments(n: Array) -> tuple[Array, Array, Array]:
    """Mean, variance and third central moment of q^2, q chi-squared with n degrees: E q^j = 2^j G(n/2 + j) / G(n/2)."""
    one, two, three = (np.exp(j * math.log(2) + gammaln(n / 2 + j) - gammaln(n / 2)) for j in (2, 4, 6))
    return one, two - one**2, three - 3 * one * two + 2 * one**3
