"""The expected score of new rows under each candidate's fit, against loops over draws with scipy's densities."""

import math

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from bayes_mpt.evidence.draws import FactorDraws
from bayes_mpt.evidence.expected import Believed, expected_score

N, T, G, EACH = 40, 3, 4, 5


def believed(seed, k, kind, spread):
    """A candidate, and its draws in a list (island, mean, covariance, covariance of the mean) that counts alike."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(G * EACH, T, k))
    psi, means = rng.uniform(0.5, 2, (G * EACH, T)), 0.3 * rng.normal(size=(G * EACH, T))
    log_z = rng.normal(size=G)
    root = np.diag(np.sqrt(spread))
    draws = []
    for i in range(G * EACH):
        cov = w[i] @ w[i].T + np.diag(psi[i])
        draws.append((i // EACH, means[i], cov, root @ cov @ root))
    fit = rng.normal(size=(T, T))
    found = Believed(
        kind,
        log_z,
        FactorDraws.of(w, psi, means, spread, log_z),
        0.2 * rng.normal(size=T),
        fit @ fit.T + np.eye(T),
    )
    return found, draws


def mean_log_prob(fit, mean, cov):
    """E log N(x | m, C) of x ~ N(mean, cov)."""
    normal = multivariate_normal(fit.fit_mean, fit.fit_covariance)
    return normal.logpdf(mean) - 0.5 * np.trace(np.linalg.solve(fit.fit_covariance, cov))


@pytest.fixture(scope="module")
def candidates():
    return [
        believed(0, 0, "a", np.array([0.1, 0.2, 0.3])),
        believed(1, 1, "a", np.full(T, 0.02)),
        believed(2, 2, "b", np.zeros(T)),
    ]


def test_against_a_loop(candidates):
    found, draws = zip(*candidates, strict=True)
    log_z = np.array([logsumexp(c.islands) for c in found])
    odds = np.exp(log_z - log_z.max()) * [0.5, 0.5, 1.0]  # kinds are as likely as each other before
    odds /= odds.sum()
    want = np.zeros(3)
    for j in range(3):
        share = np.exp(found[j].islands - logsumexp(found[j].islands))
        for g, mean, cov, of_mean in draws[j]:
            each = [mean_log_prob(c, mean, cov + of_mean) for c in found]
            want += odds[j] * share[g] / EACH * np.array(each)
    got = expected_score(list(found), N)
    np.testing.assert_allclose(got.score, N * want, rtol=1e-12)
    best = int(np.argmax(want))
    assert got.se[best] == 0 and math.isnan(got.p_better[best])
    # each island as a search of its own
    replicates = np.zeros((G, 3))
    for g in range(G):
        own = np.array([np.exp(c.islands[g]) for c in found]) * [0.5, 0.5, 1.0]
        own /= own.sum()
        for j in range(3):
            for _, mean, cov, of_mean in draws[j][g * EACH : (g + 1) * EACH]:
                each = np.array([mean_log_prob(c, mean, cov + of_mean) for c in found])
                replicates[g] += own[j] / EACH * N * (each - each[best])
    spread = replicates.std(0, ddof=1) / math.sqrt(G)
    other = [i for i in range(3) if i != best]
    ratio = got.se[other] / spread[other]
    assert (
        ratio[0] == pytest.approx(ratio[1], rel=1e-9) and 1 <= ratio[0] < 1.7
    )  # the factor of a t with 3 degrees


def test_probability_of_predicting_better(candidates):
    """Over draws with their islands' shares, which the draws that are kept have in their numbers."""
    found, draws = zip(*candidates, strict=True)
    got = expected_score(list(found), N)
    best = int(np.nanargmax(got.score))
    log_z = np.array([logsumexp(c.islands) for c in found])
    odds = np.exp(log_z - log_z.max()) * [0.5, 0.5, 1.0]
    odds /= odds.sum()
    want = np.zeros(3)
    for j in range(3):
        share = np.exp(found[j].islands - logsumexp(found[j].islands))
        for g, mean, cov, of_mean in draws[j]:
            each = np.array([mean_log_prob(c, mean, cov + of_mean) for c in found])
            want += odds[j] * share[g] / EACH * (each > each[best])
    other = [i for i in range(3) if i != best]
    # of 20 draws resampled evenly each counts at most one in 20 too much or too little
    np.testing.assert_allclose(got.p_better[other], want[other], atol=0.1)
