"""Laplace evidence of Gaussian mixtures: against conjugate evidence in closed form; units and names."""

import math

import numpy as np
import pytest
from scipy.special import gammaln, multigammaln

from bayes_mpt import BayesMPT, MarginalLikelihoodSearch
from bayes_mpt.evidence import laplace_mixture, mixture_prior
from bayes_mpt.models import PPCA, GaussianMixture

RNG = np.random.default_rng(3)


def scale_of(prior, k):
    """Scale of the inverse Wishart law in the units of the table."""
    unit = prior.units("full")
    return prior.scale("full", k) * unit * unit[:, None]


def conjugate(x, prior, k=1):
    """Log evidence of rows of one component (N, T): normal-inverse-Wishart, in closed form."""
    n, t = x.shape
    nu, scale = prior.degrees + t - 1, scale_of(prior, k)
    off = x.mean(0) - prior.center
    shrunk = prior.kappa * n / (prior.kappa + n)
    after = scale + n * np.cov(x.T, bias=True).reshape(t, t) + shrunk * np.outer(off, off)
    found = multigammaln((nu + n) / 2, t) - multigammaln(nu / 2, t) - n * t / 2 * math.log(math.pi)
    found += nu / 2 * np.linalg.slogdet(scale)[1] - (nu + n) / 2 * np.linalg.slogdet(after)[1]
    return found + t / 2 * math.log(prior.kappa / (prior.kappa + n))


def regression(y, z, mean, precision, degrees, scale):
    """Log evidence of y (n,) on z (n, p): coefficients N(mean, v / precision), v inverse gamma(degrees/2, scale/2)."""
    n = len(y)
    after = precision + z.T @ z
    b = np.linalg.solve(after, precision @ mean + z.T @ y)
    rest = scale + y @ y + mean @ precision @ mean - b @ after @ b
    found = gammaln((degrees + n) / 2) - gammaln(degrees / 2) - n / 2 * math.log(math.pi)
    found += 0.5 * (np.linalg.slogdet(precision)[1] - np.linalg.slogdet(after)[1])
    return found + degrees / 2 * math.log(scale) - (degrees + n) / 2 * math.log(rest)


def at(x, k, labels=None):
    """A fit to start from."""
    labels = np.zeros(len(x), dtype=int) if labels is None else labels
    parts = [x[labels == c] for c in range(k)]
    loc = np.stack([np.nanmean(part, 0) for part in parts])
    return (
        np.array([len(p) for p in parts]) / len(x),
        loc,
        np.stack([np.diag(np.nanvar(p, 0)) for p in parts]),
    )


@pytest.mark.parametrize("t", [1, 2, 3])
def test_one_component_is_conjugate(t):
    """The error of Laplace's approximation falls as 1/N."""
    root = RNG.normal(size=(t, t))
    errors = []
    for n in (200, 2000):
        x = RNG.normal(size=(n, t)) @ root + 5
        prior = mixture_prior(x)
        found = laplace_mixture(x, prior, *at(x, 1))
        errors.append(found.log_evidence - conjugate(x, prior))
        assert not found.overlapping
    assert abs(errors[0]) < 0.05 and errors[1] == pytest.approx(errors[0] / 10, rel=0.1)


def test_missing_cells_are_integrated():
    """Where only the second column has holes, it is a conjugate regression on the first."""
    n = 1500
    x = RNG.normal(size=(n, 2)) @ np.array([[1.0, 0.8], [0.0, 0.7]]) + [1.0, -2.0]
    x[: n // 3, 1] = np.nan
    prior = mixture_prior(x)
    scale, m = scale_of(prior, 1), prior.center
    # C_11 has nu - 1 degrees; given the slope b and the rest's variance v, the intercept has variance v / kappa
    first = conjugate(x[:, :1], type(prior)(m[:1], scale[:1, :1], prior.kappa, prior.degrees))
    b = scale[1, 0] / scale[0, 0]
    z = np.column_stack([np.ones(n - n // 3), x[n // 3 :, 0] - m[0]])
    # the slope's prior is N(b, v / scale_11); the intercept, at m_1, has N(m_2, v / kappa)
    precision = np.diag([prior.kappa, scale[0, 0]])
    rest = scale[1, 1] - b * scale[0, 1]
    second = regression(x[n // 3 :, 1], z, np.array([m[1], b]), precision, prior.degrees + 1, rest)
    found = laplace_mixture(x, prior, *at(x, 1)).log_evidence
    assert found == pytest.approx(first + second, abs=0.01)


@pytest.mark.parametrize("t", [1, 2])
def test_components_far_apart(t):
    """Then only the K! ways to name the true allocation count, each of them conjugate."""
    labels = np.repeat([0, 1, 2], [300, 400, 500])
    x = RNG.normal(size=(1200, t)) + 200.0 * labels[:, None] * np.where(np.arange(t) == 0, 1, -1)
    prior = mixture_prior(x)
    alpha, count = prior.concentration, np.bincount(labels)
    want = gammaln(4) + gammaln(3 * alpha) - gammaln(3 * alpha + 1200)
    want += (gammaln(alpha + count) - gammaln(alpha)).sum()
    want += sum(conjugate(x[labels == c], prior, 3) for c in range(3))
    found = laplace_mixture(x, prior, *at(x, 3, labels))
    assert found.log_evidence == pytest.approx(want, abs=0.1) and not found.overlapping
    np.testing.assert_allclose(found.weights, (count + alpha) / (1200 + 3 * alpha), rtol=1e-6)


def test_units_names_and_overlap():
    labels = np.repeat([0, 1], [60, 80])
    x = RNG.normal(size=(140, 2)) + 4.0 * labels[:, None]
    x[RNG.random(x.shape) < 0.1] = np.nan
    x = x[~np.isnan(x).all(1)]
    labels = (np.nan_to_num(x).sum(1) > 4).astype(int)
    found = laplace_mixture(x, mixture_prior(x), *at(x, 2, labels))
    renamed = laplace_mixture(x, mixture_prior(x), *at(x, 2, 1 - labels))
    assert renamed.log_evidence == pytest.approx(found.log_evidence, abs=1e-5)
    units = np.array([1e-6, 1e3])
    z = 7.0 + x * units
    other = laplace_mixture(z, mixture_prior(z), *at(z, 2, labels))
    lost = (~np.isnan(x)).sum(0) @ np.log(units)
    assert other.log_evidence == pytest.approx(found.log_evidence - lost, abs=1e-3)
    one = RNG.normal(size=(100, 1))
    assert laplace_mixture(one, mixture_prior(one), *at(one, 2, (one[:, 0] > 0).astype(int))).overlapping == (
        (1, 0),
    )


# ------------------------------------------------------------------------------------------------- as a user asks


X = np.concatenate([RNG.normal(size=(60, 2)), RNG.normal(size=(50, 2)) * 0.6 + 5])


def search(grid, **more):
    return MarginalLikelihoodSearch(BayesMPT(), grid, evidence="laplace", random_state=0, **more)


def test_a_search_by_it():
    """Under one prior for all candidates, whatever fit each of them starts from."""
    found = search({"model": [GaussianMixture()], "model__n_components": [1, 2]}, error_score="raise").fit(X)
    assert found.best_params_["model__n_components"] == 2 and found.evidence_ == "laplace"
    labels = (X.sum(1) > 5).astype(int)
    want = [
        laplace_mixture(X, mixture_prior(X), *at(X, 1)).log_evidence,
        laplace_mixture(X, mixture_prior(X), *at(X, 2, labels)).log_evidence,
    ]
    np.testing.assert_allclose(found.cv_results_["lml"], want, atol=1e-4)
    assert found.comparison_[["weight", "se"]].isna().all(axis=None)


def test_what_is_refused():
    with pytest.raises(ValueError, match="needs covariance_type='full', got 'diag'"):
        BayesMPT(GaussianMixture(1, "diag")).fit(X).laplace(X)
    with pytest.raises(ValueError, match=r"under the prior .*weights: Dirichlet"):
        search({"model": [GaussianMixture(1), PPCA(1)]}).fit(X)
    flat = np.column_stack([X, X[:, 0]])
    with pytest.raises(ValueError, match="not singular: drop columns"):
        laplace_mixture(flat, mixture_prior(flat), *at(flat, 1))
