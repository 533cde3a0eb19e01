"""Tables that are wide, of low rank, or far from zero: against closed forms, scikit-learn and the centred table."""

import math
import pickle
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from scipy.stats import multivariate_normal
from sklearn.decomposition import FactorAnalysis as SklearnFactorAnalysis
from sklearn.exceptions import ConvergenceWarning
from tables import with_holes
from truths import factor_covariance, log_density, ppca_maximum

from bayes_mpt import BayesMPT, MarginalLikelihoodSearch
from bayes_mpt.models import PPCA, FactorAnalysis, GaussianMixture, MixtureOfFactorAnalyzers


def factors(n, t, k, noise, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, k)) @ rng.normal(size=(k, t)) + noise * rng.normal(size=(n, t))


# ---------------------------------------------------------------------------------------------------------------- wide


@pytest.mark.slow
@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize(
    ("n", "t"), [(1000, 784), (40, 2000), (300, 500), (200, 190), (5, 500), (60, 61), (60, 60)]
)
def test_ppca_of_wide_tables_is_the_closed_form(n, t, standardise):
    X = factors(n, t, 3, 0.4)
    if standardise:
        X = (X - X.mean(0)) / X.std(0)
    model = BayesMPT(PPCA(3)).fit(X)
    assert model.log_marginal_likelihood_ == pytest.approx(ppca_maximum(X, 3), rel=1e-11)
    assert model.converged_


def test_rows_of_a_wide_table_are_scored_as_by_the_dense_covariance():
    X = factors(30, 250, 2, 0.4)
    for model in (PPCA(2), FactorAnalysis(2)):
        fitted = BayesMPT(model).fit(X)
        cov = factor_covariance(fitted.components_, fitted.noise_variance_)
        truth = log_density(X, fitted.mean_, cov)
        np.testing.assert_allclose(fitted.score_samples(X), truth, rtol=1e-9)
        assert fitted.log_marginal_likelihood_ == pytest.approx(truth.sum(), rel=1e-10)


@pytest.mark.parametrize(
    ("n", "t", "k", "noise"), [(40, 600, 3, 0.5), (40, 2000, 3, 0.5), (100, 300, 10, 1.0), (150, 201, 1, 2.0)]
)
def test_factor_analysis_of_wide_tables_is_at_least_as_likely_as_scikit_learn(n, t, k, noise):
    X = factors(n, t, k, noise)
    peer = SklearnFactorAnalysis(k, tol=1e-8, max_iter=5000, svd_method="lapack").fit(X).score(X) * n
    fit = BayesMPT(FactorAnalysis(k)).fit(X)
    assert fit.log_marginal_likelihood_ >= peer - 1e-9 * abs(peer)
    # and there in few steps: with the loadings at their best, a noise is what they leave of its column
    left = X.var(0) - np.square(fit.components_).sum(0)
    np.testing.assert_allclose(fit.noise_variance_, left, rtol=1e-5)
    assert fit.n_iter_ <= 10


@pytest.mark.parametrize(("n", "t", "k"), [(40, 205, 3), (100, 205, 5)])
def test_a_weak_signal_in_a_wide_table_is_found_as_by_the_dense_method(monkeypatch, n, t, k):
    X = factors(n, t, k, 3.0)
    by_rows = BayesMPT(FactorAnalysis(k)).fit(X)
    monkeypatch.setattr("bayes_mpt.predictors.gaussian.profile.MAX_DENSE", 1000)
    by_newton = BayesMPT(FactorAnalysis(k)).fit(X)
    assert by_rows.log_marginal_likelihood_ >= by_newton.log_marginal_likelihood_ - 1e-6
    # d log p / d log psi is zero at a maximum, but where a noise ends at zero
    precision = np.linalg.inv(by_rows.get_covariance())
    residual = precision @ (np.cov(X.T, bias=True) - by_rows.get_covariance()) @ precision
    slope = np.diag(residual) * by_rows.noise_variance_ / 2
    assert np.abs(slope[by_rows.noise_variance_ > 1e-6 * X.var(0)]).max() < 5e-5


def test_auto_of_a_wide_table_finds_the_dimension():
    found = BayesMPT().fit(factors(40, 2000, 5, 0.5))
    assert found.n_components_ == 5
    assert max(found.selection_) == 38


@pytest.mark.slow
def test_wide_tables_are_ranked_by_the_evidence_of_the_dense_formula(monkeypatch):
    # the determinant by latents, of more tokens than `evidence.MAX_DENSE`, against the one of all tokens
    def evidences():
        grid = {"model__n_components": [0, 1, 2, 3, 4]}
        return (
            MarginalLikelihoodSearch(BayesMPT(FactorAnalysis()), grid, evidence="laplace")
            .fit(X)
            .cv_results_["mean_test_score"]
        )

    X = factors(30, 60, 2, 0.5)
    want = evidences()
    monkeypatch.setattr("bayes_mpt.evidence.laplace.MAX_DENSE", 10)
    np.testing.assert_allclose(evidences(), want, rtol=1e-10)


def test_wide_tables_by_parts_are_those_at_once():
    X = factors(90, 60, 2, 0.5)
    parts = BayesMPT(PPCA(2))
    for start in range(0, 90, 15):  # fewer rows than columns, then more
        parts.partial_fit(X[start : start + 15])
    assert parts.log_marginal_likelihood_ == pytest.approx(ppca_maximum(X, 2), rel=1e-11)


def test_a_wide_table_with_missing_cells_is_scored_by_its_observed_cells():
    X = factors(25, 40, 2, 0.5)
    X = with_holes(X, 0.1, seed=1)
    model = BayesMPT(PPCA(2), random_state=0).fit(X)
    cov = model.get_covariance()
    want = log_density(X, model.mean_, cov)
    np.testing.assert_allclose(model.score_samples(X), want, rtol=1e-9)


# ---------------------------------------------------------------------------------------------------- close to singular


@pytest.mark.parametrize("condition", [1e8, 1e11, 1e12, 1e13, 1e16, 1e20])
@pytest.mark.parametrize(("n", "t"), [(200, 10), (60, 100)])
def test_ppca_reaches_its_closed_form_where_the_covariance_is_all_but_singular(n, t, condition):
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(t, t)))
    X = (rng.normal(size=(n, t)) * np.r_[np.ones(3), np.full(t - 3, condition**-0.5)]) @ q.T
    model = BayesMPT(PPCA(3)).fit(X)
    # rounding moves the least standard deviations by this share of themselves, in n (t - 3) numbers
    atol = n * (t - 3) * np.finfo(float).eps * condition**0.5
    assert model.log_marginal_likelihood_ == pytest.approx(ppca_maximum(X, 3), rel=1e-12, abs=atol)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [1e-3, 1e-5, 1e-6, 1e-7, 1e-10])
def test_auto_finds_one_dimension_under_little_noise(noise):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        X = rng.normal(size=(100, 1)) @ rng.normal(size=(1, 20)) + noise * rng.normal(size=(100, 20))
        assert BayesMPT().fit(X).n_components_ == 1, seed


def low_rank():
    rng = np.random.default_rng(0)
    yield 1, rng.normal(size=(100, 1)) @ rng.normal(size=(1, 20))
    X = rng.normal(size=(1000, 10))
    X[:, -1] = X[:, :-1].mean(1)
    yield 9, X
    yield 3, rng.normal(size=(40, 3)) @ rng.normal(size=(3, 60))


@pytest.mark.parametrize(("rank", "X"), list(low_rank()))
def test_auto_takes_the_rank_of_rows_without_noise_and_says_so(rank, X):
    most = min(X.shape[1] - 1, len(X) - 2)
    left_out = f"{rank + 1} to {most} are left out" if most > rank else "no larger number"
    with pytest.warns(ConvergenceWarning, match=f"have rank {rank}.*unbounded.*{left_out}"):
        model = BayesMPT().fit(X)
    assert model.n_components_ == rank and not model.converged_
    assert model.selection_[rank] == math.inf
    # what the latents say of the rows is exact
    np.testing.assert_allclose(model.inverse_transform(model.transform(X)), X, atol=1e-9)


def test_a_constant_column_is_no_low_rank():
    X = factors(60, 6, 2, 0.5)
    X[:, 3] = 0.1
    assert BayesMPT().fit(X).n_components_ < 5  # without a warning


# -------------------------------------------------------------------------------------------------------- far from zero


def far_tables():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(60, 2)) @ rng.normal(size=(2, 5)) + 0.5 * rng.normal(size=(60, 5))
    yield "1e9", base * 1e-5 + 1e9
    yield "seconds since 1970", base * 1e-3 + 1.7e9
    yield "3 +- 1e-13", np.column_stack([base, 3 + 1e-13 * rng.normal(size=60)])
    yield "far and near", base * [1, 1e-6, 1, 1e3, 1] + [0, 1e5, -4, 2e9, 1e7]


FAR = pytest.mark.parametrize("X", [pytest.param(X, id=name) for name, X in far_tables()])


@FAR
def test_a_shift_changes_no_closed_form(X):
    model = BayesMPT(PPCA(1)).fit(X)
    assert model.predictor_.name == "Exact"
    assert model.log_marginal_likelihood_ == pytest.approx(ppca_maximum(X, 1), rel=1e-12)
    np.testing.assert_allclose(model.mean_, X.mean(0), rtol=1e-15)
    np.testing.assert_array_equal(model.params_["loc"], model.mean_)


@FAR
def test_a_shift_changes_no_factor_analysis(X):
    far, near = BayesMPT(FactorAnalysis(1)).fit(X), BayesMPT(FactorAnalysis(1)).fit(X - X.mean(0))
    assert far.predictor_.name == "Exact"
    assert far.log_marginal_likelihood_ == pytest.approx(near.log_marginal_likelihood_, rel=1e-9)


@pytest.mark.parametrize("program", [GaussianMixture(2), MixtureOfFactorAnalyzers(2, 1)], ids=repr)
def test_a_shift_changes_no_mixture(program):
    rng = np.random.default_rng(0)
    near = np.vstack([rng.normal(size=(20, 2)), rng.normal(size=(20, 2)) + 6]) * 2**-20
    found = [BayesMPT(program, random_state=0).fit(rows) for rows in (near + 2**30, near - near.mean(0))]
    assert found[0].predictor_.name == "Exact"
    # of rows 2^30 + x the digits of x end at 2^-22, a quarter of the spread
    rounded = BayesMPT(program, random_state=0).fit((near + 2**30) - 2**30)
    assert found[0].log_marginal_likelihood_ == pytest.approx(rounded.log_marginal_likelihood_, rel=1e-7)


@FAR
def test_what_is_said_of_far_rows_lies_where_they_are(X):
    centre, sd = X.mean(0), X.std(0)
    far, near = BayesMPT(PPCA(2)).fit(X), BayesMPT(PPCA(2)).fit(X - centre)
    holes = with_holes(X, 0.2, seed=1)
    # the rows themselves are rounded to this share of their spread
    atol = 1e-9 + 8 * np.abs(centre / sd).max() * np.finfo(float).eps
    for a, b in (
        (far.impute(holes), near.impute(holes - centre)),
        (far.inverse_transform(np.eye(2)), near.inverse_transform(np.eye(2))),
        (far.sample(5), near.sample(5)),
    ):
        np.testing.assert_allclose((a - centre) / sd, b / sd, atol=atol)
    np.testing.assert_allclose(far.score_samples(X), near.score_samples(X - centre), rtol=1e-9)
    np.testing.assert_allclose(far.transform(X), near.transform(X - centre), atol=1e-9)
    again = pickle.loads(pickle.dumps(far))
    np.testing.assert_array_equal(again.score_samples(X), far.score_samples(X))
    assert far.estimate(X).lml.sum() == pytest.approx(float(near.estimate(X - centre).lml.sum()), rel=1e-9)


def test_far_rows_with_missing_cells_by_parts_and_started_again():
    X = next(X for name, X in far_tables() if name == "1e9")
    centre = X.mean(0)
    holes = with_holes(X, 0.1, seed=1)
    far, near = (BayesMPT(PPCA(1), random_state=0).fit(rows) for rows in (holes, holes - centre))
    assert far.log_marginal_likelihood_ == pytest.approx(near.log_marginal_likelihood_, rel=1e-9)
    parts = BayesMPT(PPCA(1)).partial_fit(X[:30]).partial_fit(X[30:])
    assert parts.log_marginal_likelihood_ == pytest.approx(ppca_maximum(X, 1), rel=1e-11)
    np.testing.assert_allclose(parts.mean_, centre, rtol=1e-15)
    warm = BayesMPT(PPCA(1), warm_start=True).fit(X).fit(X + 1e9)
    assert warm.log_marginal_likelihood_ == pytest.approx(ppca_maximum(X + 1e9, 1), rel=1e-11)


@pytest.mark.slow
def test_a_search_of_far_rows_is_that_of_centred_ones():
    X = next(X for name, X in far_tables() if name == "seconds since 1970")
    grid = {"model": [PPCA(), FactorAnalysis()], "model__n_components": [1, 2]}
    for evidence, tolerance in (
        ("laplace", 1e-9),
        ("integrated", 1e-8),
    ):  # a mean of 1.7e9 has an error of 1e-7
        far, near = (
            MarginalLikelihoodSearch(BayesMPT(PPCA()), grid, evidence=evidence, random_state=0).fit(rows)
            for rows in (X, X - X.mean(0))
        )
        for key in ("mean_test_score", "lml"):
            np.testing.assert_allclose(far.cv_results_[key], near.cv_results_[key], rtol=tolerance)
    held_out = MarginalLikelihoodSearch(BayesMPT(PPCA()), grid, evidence="heldout", random_state=0)
    far, near = (held_out.fit(rows).cv_results_["mean_test_score"] for rows in (X, X - X.mean(0)))
    np.testing.assert_allclose(far, near, rtol=1e-6)


def test_a_users_program_moves_too():
    def program(x):
        centre = pyro.param("centre", lambda: x.new_zeros(x.shape[1]))
        scale = pyro.param("scale", lambda: x.new_ones(x.shape[1]), constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(centre + z[..., None] * 1e-5, scale).to_event(1), obs=x)

    X = next(X for name, X in far_tables() if name == "1e9")
    model = BayesMPT(program).fit(X)
    assert model.predictor_.name == "Exact"
    np.testing.assert_allclose(model.params_["centre"], X.mean(0), rtol=1e-15)


@pytest.mark.parametrize(("centre", "sd"), [(1e6, 1.0), (1.7e9, 1.0), (2.0**30, 2.0**-13), (-3e11, 1.0)])
def test_a_program_with_a_prior_of_its_mean_is_not_moved(centre, sd):
    # x_n = m + e, m ~ N(centre, sd): the truth by the dense covariance of all rows less the centre, which is exact
    def program(x):
        m = pyro.sample("m", dist.Normal(x.new_tensor(centre), sd))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(m, sd / 2), obs=x[:, 0])

    rng = np.random.default_rng(0)
    X = centre + sd * (2 + 0.5 * rng.normal(size=40))
    model = BayesMPT(program).fit(X[:, None])
    want = multivariate_normal(np.zeros(40), sd**2 * (np.eye(40) / 4 + 1)).logpdf(X - centre)
    assert model.predictor_.name == "Exact"
    assert model.log_marginal_likelihood_ == pytest.approx(want, rel=1e-9)


def test_a_program_with_a_bound_on_its_mean_is_not_moved():
    def program(x):
        centre = pyro.param("centre", lambda: x.mean(0).clamp(min=1.0), constraints.positive)
        scale = pyro.param("scale", lambda: x.std(0), constraints.positive)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(centre, scale).to_event(1), obs=x)

    X = 1e5 + np.random.default_rng(0).normal(size=(40, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = BayesMPT(program).fit(X)
    want = -20 * (2 * np.log(2 * np.pi) + np.log(X.var(0)).sum() + 2)
    assert model.log_marginal_likelihood_ == pytest.approx(want, abs=1e-3)
    assert torch.as_tensor(model.params_["centre"]).min() > 0
