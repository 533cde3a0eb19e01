"""Labels, their probabilities, AIC and BIC: against scikit-learn, dense densities, and ranks of Jacobians."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from scipy.stats import norm, poisson
from sklearn.mixture import GaussianMixture as TheirMixture
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from truths import mixture_log_terms, responsibilities

from bayes_mpt import Auto, BayesMPT, MarginalLikelihoodSearch
from bayes_mpt.models import (
    PPCA,
    BayesianRegression,
    FactorAnalysis,
    GaussianMixture,
    GaussianProcess,
    LatentClass,
    MixtureOfFactorAnalyzers,
)
from bayes_mpt.training import Ascent

RNG = np.random.default_rng(17)
T = 3
X = np.concatenate([RNG.normal(size=(25, T)), RNG.normal(size=(30, T)) + 2]) @ RNG.normal(size=(T, T))
HOLES = np.where(RNG.random(X.shape) < 0.2, np.nan, X)
HOLES[3], HOLES[7] = np.nan, X[7]


def fit(model, x=X, *, seed=0):
    return BayesMPT(model, random_state=seed).fit(x)


def theirs(model):
    """scikit-learn's mixture at our parameters."""
    p, kind = model.params_, model.model.covariance_type
    mixture = TheirMixture(len(p["weights"]), covariance_type=kind)
    mixture.weights_, mixture.means_ = p["weights"], p["loc"]
    if kind == "full":
        mixture.covariances_ = p["scale_tril"] @ p["scale_tril"].transpose(0, 2, 1)
        mixture.precisions_cholesky_ = np.linalg.inv(p["scale_tril"]).transpose(0, 2, 1)
    else:
        scale = p["scale"] if kind == "diag" else p["scale"][:, 0]
        mixture.covariances_, mixture.precisions_cholesky_ = scale**2, 1 / scale
    return mixture


def n_free(model, x):
    """What the criteria charge for: bic - aic = P (log N - 2)."""
    return (model.bic(x) - model.aic(x)) / (math.log(len(x)) - 2)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", ["full", "diag", "spherical"])
def test_a_mixture_answers_as_that_of_sklearn(kind, k):
    ours = fit(GaussianMixture(k, kind))
    want = theirs(ours)
    np.testing.assert_allclose(ours.predict_proba(X), want.predict_proba(X), rtol=0, atol=1e-13)
    labels = ours.predict(X)
    np.testing.assert_array_equal(labels, want.predict(X))
    assert labels.dtype.kind == "i" and labels.shape == (len(X),)
    assert ours.bic(X) == pytest.approx(want.bic(X), rel=1e-13)
    assert ours.aic(X) == pytest.approx(want.aic(X), rel=1e-13)
    assert ours.bic(X[:10]) == pytest.approx(want.bic(X[:10]), rel=1e-13)


def test_labels_of_rows_with_missing_cells():
    ours = fit(GaussianMixture(2))
    p = ours.params_
    want = responsibilities(
        mixture_log_terms(HOLES, p["weights"], p["loc"], p["scale_tril"] @ p["scale_tril"].transpose(0, 2, 1))
    )
    np.testing.assert_allclose(ours.predict_proba(HOLES), want, rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        ours.predict_proba(HOLES)[3], p["weights"], atol=1e-14
    )  # nothing is seen of it
    np.testing.assert_array_equal(ours.predict(HOLES), want.argmax(1))
    lml = ours.score_samples(HOLES).sum()
    assert ours.aic(HOLES) == pytest.approx(-2 * lml + 2 * n_free(ours, X), rel=1e-12)


def test_labels_beside_factors():
    ours = fit(MixtureOfFactorAnalyzers(2, 1))
    p = ours.params_
    covs = p["loading"] @ p["loading"].transpose(0, 2, 1) + np.stack(
        [np.diag(v) for v in p["noise_variance"]]
    )
    want = responsibilities(mixture_log_terms(HOLES, p["weights"], p["loc"], covs))
    np.testing.assert_allclose(ours.predict_proba(HOLES), want, rtol=0, atol=1e-11)


def test_classes_of_codes():
    codes = RNG.integers(0, 3, size=(40, 4)).astype(float)
    codes[:20, :2] = 0
    codes[RNG.random(codes.shape) < 0.1] = np.nan
    ours = fit(LatentClass(2, 3), codes)
    log_prob = np.tile(np.log(ours.params_["weights"]), (len(codes), 1))
    for n, t in np.argwhere(~np.isnan(codes)):
        log_prob[n] += np.log(ours.params_["probs"][:, t, int(codes[n, t])])
    want = responsibilities(log_prob.T)
    np.testing.assert_allclose(ours.predict_proba(codes), want, rtol=0, atol=1e-12)
    assert n_free(ours, codes) == pytest.approx(1 + 2 * 4 * 2, rel=1e-9)


def test_labels_beside_a_latent_on_nodes():
    """Counts whose logarithms shift together: the shift is integrated by quadrature, here and in the truth."""
    rate = torch.tensor([[0.2, 0.5], [1.5, 1.0]], dtype=torch.float64)
    prior = torch.tensor([0.3, 0.7], dtype=torch.float64)

    def program(x):
        with pyro.plate("rows", len(x)):
            c = pyro.sample("c", dist.Categorical(prior))
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 0.5))
            pyro.sample("x", dist.Poisson((rate.to(x)[c] + z[..., None]).exp()).to_event(1), obs=x)

    counts = RNG.poisson(2.0, size=(12, 2)).astype(float)
    grid = np.linspace(-5, 5, 4001)
    joint = np.stack(
        [
            norm(0, 0.5).pdf(grid)
            * poisson.pmf(counts[:, None, :], np.exp(rate[c].numpy() + grid[:, None])).prod(-1)
            for c in range(2)
        ]
    )  # (K, N, nodes)
    share = prior.numpy()[:, None] * joint.sum(-1)
    np.testing.assert_allclose(
        fit(program, counts).predict_proba(counts), (share / share.sum(0)).T, atol=1e-6
    )


# ------------------------------------------------------------------------------------------------ free parameters


def rank(moments, *shapes):
    """Dimensions that a density's mean and covariance move in, from a Jacobian at random values."""
    torch.manual_seed(0)
    values = tuple(torch.rand(*s, dtype=torch.float64) + 0.5 for s in shapes)
    parts = torch.autograd.functional.jacobian(lambda *v: moments(*v).flatten(), values)
    return int(torch.linalg.matrix_rank(torch.cat([p.flatten(1) for p in parts], 1), rtol=1e-9))


def factors(loc, loading, noise):
    return torch.cat([loc[:, None], loading @ loading.mT + torch.diag(noise.expand(len(loc)))], 1)


@pytest.mark.parametrize("k", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("kind, n_noise", [(PPCA, 1), (FactorAnalysis, 5)])
def test_rotations_of_loadings_are_not_free(kind, n_noise, k):
    x = np.random.default_rng(k).normal(size=(30, 5))
    want = rank(factors, (5,), (5, k), (n_noise,))
    assert n_free(fit(kind(k), x), x) == pytest.approx(want, rel=1e-9)


def test_each_factor_analyser_has_rotations_of_its_own():
    x = np.random.default_rng(0).normal(size=(60, 5))
    want = 1 + 2 * rank(factors, (5,), (5, 2), (5,))
    assert n_free(
        BayesMPT(MixtureOfFactorAnalyzers(2, 2), training=Ascent(max_iter=3, tol=1.0)).fit(x), x
    ) == pytest.approx(want)


def test_constraints_take_freedom_away():
    """A mixture with one covariance for all, in other parameters than a Cholesky factor."""

    def tied(x):
        root = pyro.param("root", lambda: torch.eye(x.shape[1], dtype=x.dtype), constraints.corr_cholesky)
        scale = pyro.param("scale", lambda: x.std(0), constraints.positive)
        loc = pyro.param("loc", lambda: x[[0, -1]])
        weights = pyro.param("weights", lambda: x.new_tensor([0.5, 0.5]), constraints.simplex)
        with pyro.plate("rows", len(x)):
            c = pyro.sample("c", dist.Categorical(weights))
            pyro.sample("x", dist.MultivariateNormal(loc[c], scale_tril=scale[:, None] * root), obs=x)

    ours, want = fit(tied), TheirMixture(2, covariance_type="tied", tol=1e-12, max_iter=10000, random_state=0)
    want.fit(X)
    assert ours.bic(X) - ours.aic(X) == pytest.approx(want.bic(X) - want.aic(X), rel=1e-12)


# -------------------------------------------------------------------------------------------- who answers, and who not


def fixed(x):
    with pyro.plate("rows", len(x)):
        c = pyro.sample("c", dist.Bernoulli(x.new_full((), 0.25)))
        pyro.sample("x", dist.Normal(2 * c[..., None].expand(*c.shape, x.shape[1]), 1.0).to_event(1), obs=x)


def two_labels(x):
    with pyro.plate("rows", len(x)):
        c = pyro.sample("c", dist.Categorical(x.new_tensor([0.5, 0.5])))
        d = pyro.sample("d", dist.Categorical(x.new_tensor([0.5, 0.5])))
        loc = pyro.param("loc", lambda: x.new_tensor([0.0, 1.0]))
        mean = (loc[c] + 2 * d)[..., None]
        pyro.sample("x", dist.Normal(mean.expand(*mean.shape[:-1], x.shape[1]), 1.0).to_event(1), obs=x)


def answers(estimator):
    return {name for name in ("predict", "predict_proba", "aic", "bic") if hasattr(estimator, name)}


@pytest.mark.slow
def test_only_those_answer_that_can():
    labels, criteria = {"predict", "predict_proba"}, {"aic", "bic"}
    assert answers(BayesMPT(GaussianMixture())) == criteria  # which say that it is not fitted
    assert answers(fit(GaussianMixture(2))) == labels | criteria
    assert answers(fit(PPCA(1))) == criteria
    assert answers(fit(two_labels)) == criteria  # which of the two would it be?
    bernoulli = fit(fixed)
    assert answers(bernoulli) == labels  # nothing was estimated
    half = np.stack([0.75 * norm.pdf(X).prod(1), 0.25 * norm.pdf(X - 2).prod(1)], 1)
    np.testing.assert_allclose(bernoulli.predict_proba(X), half / half.sum(1, keepdims=True), atol=1e-13)
    y = X[:, 0] + 0.1 * RNG.normal(size=len(X))
    assert answers(BayesMPT(BayesianRegression()).fit(X, y)) == {"predict"}
    process = BayesMPT(GaussianProcess(), penalty=True).fit(X[:20, :1], y[:20])
    assert answers(process) == {"predict"}
    with pytest.raises(ValueError, match="predict_proba"):
        fit(GaussianMixture(2)).predict(X, return_std=True)


@pytest.mark.parametrize("in_pipeline", [False, True])
def test_a_search_asks_its_best_candidate(in_pipeline):
    z = (X - X.mean(0)) / X.std(0)
    estimator = BayesMPT(GaussianMixture(), random_state=0)
    grid = {"model__n_components": [1, 2]}
    if in_pipeline:
        estimator = make_pipeline(StandardScaler(), estimator)
        grid = {"bayesmpt__model__n_components": [1, 2]}
    x = X if in_pipeline else z
    s = MarginalLikelihoodSearch(estimator, grid, evidence=Auto(cv=2), random_state=0)
    last = estimator[-1] if in_pipeline else estimator
    assert answers(s) == answers(last)  # as long as there is no best candidate
    s.fit(x)
    model = fit(GaussianMixture(s.best_estimator_.get_params()[next(iter(grid))]), z)
    np.testing.assert_allclose(s.predict_proba(x), model.predict_proba(z), atol=1e-9)
    np.testing.assert_array_equal(s.predict(x), model.predict(z))
    assert s.bic(x) == pytest.approx(model.bic(z), rel=1e-12)
    assert s.aic(x) == pytest.approx(model.aic(z), rel=1e-12)
    assert s.fit_transform(x, np.zeros(len(x))).shape == (
        len(x),
        model.n_components_ or len(model.params_["weights"]),
    )
