"""Whether rows are as Gaussian as the evidence believes: Mardia's kurtosis, against what the posterior predicts.

The observed cells of row i, whitened by a draw of the posterior, have the square q_i = (x - mu)' C^-1 (x - mu), which
is chi-squared with n_i degrees of freedom if the model holds. Heavy tails and outliers raise sum_i q_i^2, which is
compared with its distribution under that draw, a Pearson III of the same first three moments. One outlier among few
rows moves that sum by less than its spread; it shows in the largest q, which is compared with that of as many rows of
the draw, P(no row is as unlikely) = (1 - p)^N, p the least of the rows' own probabilities.

Mardia (1970), Biometrika 57, 519; posterior predictive checks: Gelman, Meng and Stern (1996).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln
from scipy.stats import chi2, pearson3

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
    p_outlier: float
    """Probability that the most unlikely of as many rows of the model itself is as unlikely."""
    farthest: int
    """The row that is."""


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
    >>> [k.p_heavier < 0.001 for k in found], [k.p_outlier < 0.001 for k in found]
    ([False, True], [False, True])
    """
    rng = np.random.default_rng(seed)
    visible, pattern = np.unique(np.isfinite(rows), axis=0, return_inverse=True)
    pattern = pattern.reshape(-1)
    members = [np.flatnonzero(pattern == g) for g in range(len(visible))]
    groups: list[Array] = [
        rows[which][:, o].astype(np.float64) for which, o in zip(members, visible, strict=True)
    ]
    n_cells = visible.sum(1)  # (G,)
    n = n_cells[pattern].astype(float)
    n = n[n > 0]
    mean, variance, third = (float(m.sum()) for m in _central_moments(n))
    skewness = third / variance**1.5
    observed, outlier, farthest = [], [], np.zeros(len(rows))
    for s in np.linspace(0, len(draws.noise) - 1, min(N_DRAWS, len(draws.noise))).round().astype(int):
        w = draws.loadings[s]
        cov = w @ w.T + np.diag(draws.noise[s])
        mu = draws.means[s] + np.sqrt(draws.spread) * rng.multivariate_normal(np.zeros(len(cov)), cov)
        total, largest, place = _squares(groups, visible, mu, cov)
        observed.append(total)
        p = np.where(n_cells > 0, chi2.sf(largest, np.maximum(n_cells, 1)), 1.0)  # (G,)
        least = int(np.argmin(p))
        outlier.append(-math.expm1(len(n) * math.log1p(-min(p[least], 1 - 1e-16))))
        farthest[members[least][place[least]]] += 1
    law = pearson3(skewness, mean, math.sqrt(variance))
    return Kurtosis(
        float(np.mean(observed)) / mean,
        float(law.sf(observed).mean()),
        float(law.cdf(observed).mean()),
        float(np.mean(outlier)),
        int(np.argmax(farthest)),
    )


def _squares(
    groups: list[Array], visible: NDArray[np.bool_], mu: Array, cov: Array
) -> tuple[float, Array, NDArray[np.intp]]:
    """Sum of q^2 over rows, in groups (n_g, |o|) of those that show the same tokens, a row of ``visible`` each.

    And of each group its largest q (G,), and in which row that is.
    """
    t, total = len(mu), 0.0
    largest, place = np.zeros(len(groups)), np.zeros(len(groups), dtype=np.intp)
    size = max(1, CHUNK // t**2)
    for i in range(0, len(groups), size):
        shown = visible[i : i + size]
        # of one size for all: a token that is not shown has variance one and nothing to do with the others
        precision = np.linalg.inv(np.where(shown[:, :, None] & shown[:, None], cov, np.eye(t)))  # (G, T, T)
        for g, (cells, o, p) in enumerate(zip(groups[i : i + size], shown, precision, strict=True), i):
            r = cells - mu[o]
            q = ((r @ p[o][:, o]) * r).sum(1)
            total += float((q**2).sum())
            place[g] = np.argmax(q)
            largest[g] = q[place[g]]
    return total, largest, place


def _central_moments(n: Array) -> tuple[Array, Array, Array]:
    """Mean, variance and third central moment of q^2, q chi-squared with n degrees: E q^j = 2^j G(n/2 + j) / G(n/2)."""
    one, two, three = (np.exp(j * math.log(2) + gammaln(n / 2 + j) - gammaln(n / 2)) for j in (2, 4, 6))
    return one, two - one**2, three - 3 * one * two + 2 * one**3
