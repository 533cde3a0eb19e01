"""Laws of new rows, against scikit-learn's mixture and dense conditionals."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal
from sklearn.mixture import GaussianMixture
from truths import mixture_log_terms

from bayes_mpt.evidence.predictive import GaussianRows

M, T = 3, 4


@pytest.fixture(scope="module")
def law():
    rng = np.random.default_rng(0)
    roots = rng.normal(size=(M, T, T))
    covariances = roots @ roots.transpose(0, 2, 1) + np.eye(T)
    return GaussianRows(np.array([0.5, 0.2, 0.3]), 3 * rng.normal(size=(M, T)), covariances)


def rows(n=30):
    rng = np.random.default_rng(1)
    x = 3 * rng.normal(size=(n, T))
    x[rng.random(x.shape) < 0.3] = np.nan
    x[0], x[1] = np.nan, 1.0
    return x


def test_densities(law):
    theirs = GaussianMixture(M)
    theirs.weights_, theirs.means_ = law.share, law.means
    theirs.precisions_cholesky_ = np.linalg.cholesky(np.linalg.inv(law.covariances))
    complete = np.nan_to_num(rows(), nan=0.5)
    np.testing.assert_allclose(law.log_prob(complete), theirs.score_samples(complete), atol=1e-9)
    holes = rows()
    want = np.logaddexp.reduce(mixture_log_terms(holes, law.share, law.means, law.covariances))
    np.testing.assert_allclose(law.log_prob(holes), want, atol=1e-9)
    assert law.log_prob(holes)[0] == pytest.approx(0, abs=1e-12)


def test_cells_given_the_others(law):
    holes = rows()
    mean, var = law.fill(holes)
    for row, m, v in zip(holes, mean, var, strict=True):
        o = ~np.isnan(row)
        means, variances, share = [], [], []
        for w, loc, cov in zip(law.share, law.means, law.covariances, strict=True):
            inverse = np.linalg.inv(cov[np.ix_(o, o)])
            means.append(loc[~o] + cov[np.ix_(~o, o)] @ inverse @ (row - loc)[o])
            variances.append(np.diag(cov[np.ix_(~o, ~o)] - cov[np.ix_(~o, o)] @ inverse @ cov[np.ix_(o, ~o)]))
            share.append(w * (multivariate_normal(loc[o], cov[np.ix_(o, o)]).pdf(row[o]) if o.any() else 1.0))
        share = np.array(share) / np.sum(share)
        want = share @ np.array(means)
        np.testing.assert_allclose(m[~o], want, atol=1e-9)
        np.testing.assert_allclose(
            v[~o], share @ (np.array(variances) + np.array(means) ** 2) - want**2, atol=1e-8
        )
        np.testing.assert_array_equal(m[o], row[o])
        np.testing.assert_array_equal(v[o], 0)


def test_draws(law):
    drawn = law.sample(40_000, np.random.default_rng(0))
    mean = law.share @ law.means
    second = np.einsum("m,mij->ij", law.share, law.covariances + law.means[:, :, None] * law.means[:, None])
    np.testing.assert_allclose(drawn.mean(0), mean, atol=0.1)
    np.testing.assert_allclose(np.cov(drawn.T), second - np.outer(mean, mean), atol=0.6)
    np.testing.assert_array_equal(
        law.sample(3, np.random.default_rng(2)), law.sample(3, np.random.default_rng(2))
    )
