"""Mardia's kurtosis and the farthest row against what the posterior predicts."""

import numpy as np
import pytest
from scipy.stats import chi2, kstest

from bayes_mpt.evidence.draws import FactorDraws
from bayes_mpt.evidence.misfit import kurtosis


def truth(w, psi, mu):
    """A posterior that knows the law of the rows."""
    one = np.ones((16, 1))
    return FactorDraws.of(np.tile(w, (16, 1, 1)), one * psi, one * mu, np.zeros(len(w)), np.zeros(8))


@pytest.fixture(scope="module")
def law():
    rng = np.random.default_rng(0)
    return rng.normal(size=(4, 2)), rng.uniform(0.5, 2, 4), rng.normal(size=4)


def rows(law, seed, n, holes):
    w, psi, mu = law
    rng = np.random.default_rng(seed)
    x = mu + rng.normal(size=(n, 2)) @ w.T + np.sqrt(psi) * rng.normal(size=(n, 4))
    x[rng.random(x.shape) < holes] = np.nan
    return x


@pytest.mark.parametrize("holes", [0.0, 0.4])
@pytest.mark.parametrize("n", [20, 300])
def test_its_probabilities_are_some(law, n, holes):
    """Where the law is known, p is uniform: the Pearson III has the right moments, also of rows with few cells."""
    found = [kurtosis(rows(law, seed, n, holes), truth(*law)) for seed in range(80)]
    assert kstest([k.p_heavier for k in found], "uniform").pvalue > 0.01
    assert kstest([k.p_outlier for k in found], "uniform").pvalue > 0.01


def test_against_whitened_complete_rows(law):
    w, psi, mu = law
    x = rows(law, 1, 50, 0.0)
    q = np.einsum("ni,ij,nj->n", x - mu, np.linalg.inv(w @ w.T + np.diag(psi)), x - mu)
    found = kurtosis(x, truth(*law))
    assert found.ratio == pytest.approx(np.mean(q**2) / (4 * 6), rel=1e-12)
    assert found.p_heavier + found.p_lighter == pytest.approx(1)
    assert found.p_outlier == pytest.approx(1 - chi2.cdf(q.max(), 4) ** 50, rel=1e-9)
    assert found.farthest == np.argmax(q)


@pytest.mark.parametrize("holes", [0.0, 0.3])
def test_outliers_and_bounded_rows_are_seen(law, holes):
    x = rows(law, 2, 200, holes)
    outliers = x.copy()
    outliers[:6] = law[2] + 3 * (outliers[:6] - law[2])
    assert kurtosis(outliers, truth(*law)).p_heavier < 1e-4
    signs = np.random.default_rng(4).choice([-1.0, 1.0], size=(200, 4))
    root = np.linalg.cholesky(law[0] @ law[0].T + np.diag(law[1]))
    bounded = np.where(np.isnan(x), np.nan, law[2] + signs @ root.T)
    assert kurtosis(bounded, truth(*law)).p_lighter < 1e-3


def test_one_outlier_among_few_rows(law):
    """It moves the mean of q^2 by less than the spread of that, and no Gaussian row lies there."""
    x = rows(law, 5, 200, 0.0)
    x[17] = law[2] + np.linalg.cholesky(law[0] @ law[0].T + np.diag(law[1])) @ np.full(4, 2.8)  # q = 31
    found = kurtosis(x, truth(*law))
    assert found.p_heavier > 0.01 and found.p_outlier < 0.001 and found.farthest == 17


def test_rows_without_any_cell_say_nothing(law):
    x = rows(law, 3, 50, 0.2)
    more = np.vstack([x, np.full((5, 4), np.nan)])
    assert kurtosis(more, truth(*law)) == pytest.approx(kurtosis(x, truth(*law)), rel=1e-12)
