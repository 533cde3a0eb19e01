"""Candidates averaged: weights, densities, cells and predictions against dense algebra, scikit-learn, brute force."""

import copy
import pickle
from itertools import product

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from gpytorch.kernels import LinearKernel, RBFKernel, ScaleKernel
from joblib import parallel_backend
from scipy.special import logsumexp, softmax
from scipy.stats import multivariate_normal, norm
from sklearn.base import clone
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.model_selection import KFold, ShuffleSplit
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from truths import log_density

from bayes_mpt import BayesMPT, HeldOut, MarginalLikelihoodSearch
from bayes_mpt.estimators.average import ModelAverage
from bayes_mpt.estimators.stacking import stacked_weights
from bayes_mpt.evidence import factor_prior, sample_evidence
from bayes_mpt.models import PPCA, FactorAnalysis, GaussianMixture, GaussianProcess
from bayes_mpt.program.statistics import SufficientStatistics
from bayes_mpt.warnings import DrawsWarning, LeftOutWarning, PrecisionWarning

N, T = 60, 4
GRID = {"model": [PPCA(0), PPCA(1), PPCA(2), FactorAnalysis(1)]}
SHAPES = [np.ones(T), np.ones(T), np.ones(T), None]
ODDS = np.array([1 / 6, 1 / 6, 1 / 6, 1 / 2])  # a half for each class, a third of it for each K


def table(holes=0.0, seed=0):
    rng = np.random.default_rng(seed)
    x = 3.0 + rng.normal(size=(N, 1)) * [0.9, -0.9, 0.7, 0.9] + rng.normal(size=(N, T))
    x[rng.random(x.shape) < holes] = np.nan
    return x


def new_rows():
    x = table(0.2, seed=1)[:20]
    x[0] = np.nan
    return x


def factor_search(x, **how):
    return MarginalLikelihoodSearch(BayesMPT(), GRID, random_state=0, **how).fit(x)


@pytest.fixture(scope="module", params=[0.0, 0.1], ids=["complete", "holes"])
def factors(request):
    """A search, and by other means the posterior of each of its candidates."""
    x = table(request.param)
    prior, statistics = factor_prior(x), SufficientStatistics(x)
    truths = [
        sample_evidence(statistics, m.n_components, prior, shape=shape, seed=0)
        for m, shape in zip(GRID["model"], SHAPES, strict=True)
    ]
    return x, factor_search(x), truths


# ------------------------------------------------------------------------------------------------------ factor models


def test_weights_and_densities(factors):
    _, search, truths = factors
    average = search.average()
    assert average.candidate_names_ == search.candidate_names_ and average.left_out_ == {}
    np.testing.assert_allclose(average.prior_weights_, ODDS)
    want = softmax([t.log_evidence for t in truths] + np.log(ODDS))
    np.testing.assert_allclose(average.weights_, want, rtol=1e-5)
    new = new_rows()
    each = np.array([log_density(new, t.mean, t.covariance) for t in truths])
    mixed = logsumexp(each + np.log(want)[:, None], axis=0)
    np.testing.assert_allclose(average.score_samples(new), mixed, atol=1e-5)
    assert average.score_samples(new)[0] == pytest.approx(0, abs=1e-12)
    assert average.score(new) == pytest.approx(mixed.mean(), abs=1e-5)


def test_a_candidate_is_the_model_averaged_over_its_posterior(factors):
    x, search, _ = factors
    average, new = search.average(), new_rows()
    for model, member in zip(GRID["model"], average.members_, strict=True):
        fitted = BayesMPT(clone(model), average="posterior", random_state=0).fit(x)
        np.testing.assert_allclose(member.log_prob(new), fitted.score_samples(new), atol=1e-6)


def test_cells_given_the_others(factors):
    _, search, truths = factors
    average, new = search.average(), new_rows()
    filled, sd = average.impute(new, return_std=True)
    for row, cells, spread in zip(new, filled, sd, strict=True):
        o = ~np.isnan(row)
        means, variances, log_prob = [], [], []
        for truth in truths:
            gain = truth.covariance[np.ix_(~o, o)] @ np.linalg.inv(truth.covariance[np.ix_(o, o)])
            means.append(truth.mean[~o] + gain @ (row - truth.mean)[o])
            variances.append(
                np.diag(truth.covariance[np.ix_(~o, ~o)] - gain @ truth.covariance[np.ix_(o, ~o)])
            )
            law = multivariate_normal(truth.mean[o], truth.covariance[np.ix_(o, o)]) if o.any() else None
            log_prob.append(law.logpdf(row[o]) if law else 0.0)
        share = softmax(np.log(average.weights_) + log_prob)
        mean = share @ np.array(means)
        var = share @ (np.array(variances) + np.array(means) ** 2) - mean**2
        np.testing.assert_array_equal(cells[o], row[o])
        np.testing.assert_allclose(cells[~o], mean, atol=1e-5)
        np.testing.assert_array_equal(spread[o], 0)
        np.testing.assert_allclose(spread[~o], np.sqrt(var), rtol=1e-5)


def test_rows_are_drawn_from_the_mixture(factors):
    _, search, truths = factors
    average = search.average()
    drawn = average.sample(20_000, random_state=3)
    share = average.weights_
    mean = share @ np.array([t.mean for t in truths])
    second = sum(w * (t.covariance + np.outer(t.mean, t.mean)) for w, t in zip(share, truths, strict=True))
    np.testing.assert_allclose(drawn.mean(0), mean, atol=0.05)
    np.testing.assert_allclose(np.cov(drawn.T), second - np.outer(mean, mean), atol=0.12)
    np.testing.assert_array_equal(average.sample(7, random_state=3), average.sample(7, random_state=3))
    assert not np.array_equal(average.sample(7, random_state=3), average.sample(7, random_state=4))
    with pytest.raises(ValueError, match="n_samples must be an integer of at least 1, got 0"):
        average.sample(0)


def test_prior_odds_by_name_and_by_place(factors):
    _, search, truths = factors
    names, given = search.candidate_names_, np.array([1.0, 0.0, 2.0, 5.0])
    for asked in (given, dict(zip(names, given, strict=True))):
        average = search.average(prior_weights=asked)
        np.testing.assert_allclose(average.prior_weights_, given / 8)
        with np.errstate(divide="ignore"):
            want = softmax([t.log_evidence for t in truths] + np.log(given))
        np.testing.assert_allclose(average.weights_, want, rtol=1e-5)
        assert average.weights_[1] == 0 and np.isfinite(average.score_samples(new_rows())).all()
    for wrong, message in (
        ({"PPCA": 1.0}, "has no 'PPCA.n_components=0.', .* names 'PPCA', which is no candidate"),
        ([1.0, 2.0], r"one number for each of the 4 candidates.*got shape \(2,\)"),
        ([1.0, -1.0, 1.0, 1.0], "none negative"),
        ([0.0] * 4, "not all zero"),
        (["a", "b", "c", "d"], "must be numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            search.average(prior_weights=wrong)


@pytest.mark.slow
def test_equal_odds_for_one_mixture_and_many_sizes():
    x = table()
    one = MarginalLikelihoodSearch(
        BayesMPT(random_state=0),
        {"model": [GaussianMixture(2), *(PPCA(k) for k in range(3)), PPCA(1)]},
        evidence="heldout",
        random_state=0,
    ).fit(x)
    with pytest.raises(ValueError, match="prior_weights go with weights='evidence'"):
        one.average("stacking", prior_weights=[1.0] * 5)
    both = MarginalLikelihoodSearch(BayesMPT(), {"model": [PPCA(0), PPCA(1), PPCA(1), FactorAnalysis(0)]})
    np.testing.assert_allclose(both.fit(x).average().prior_weights_, [1 / 4, 1 / 8, 1 / 8, 1 / 2])


# -------------------------------------------------------------------------------------------------------------- kernels


def curve(n=30):
    rng = np.random.default_rng(2)
    x = np.sort(rng.uniform(0, 4, n))[:, None]
    return x, np.sin(2 * x[:, 0]) + 0.3 * rng.normal(size=n)


@pytest.fixture(scope="module")
def kernels():
    x, y = curve()
    models = [
        GaussianProcess(ScaleKernel(RBFKernel()), mean="zero", noise=0.09),
        GaussianProcess(RBFKernel(), mean="zero", noise=0.09),
        GaussianProcess(LinearKernel()),
    ]
    return x, y, MarginalLikelihoodSearch(BayesMPT(), {"model": models}, random_state=0).fit(x, y)


@pytest.mark.slow
def test_kernels_at_their_nodes(kernels):
    """Each node by scikit-learn, at its hyper-parameters."""
    x, y, search = kernels
    average = search.average()
    new = np.linspace(-1, 6, 9)[:, None]
    y_new = np.sin(2 * new[:, 0])
    nodes = average.members_[0].nodes
    assert nodes.share.sum() == pytest.approx(1) and len(nodes.share) > 100
    means, sds = [], []
    for variance, length in np.exp(nodes.theta):
        kernel = ConstantKernel(variance) * RBF(length) + WhiteKernel(0.09)
        there = GaussianProcessRegressor(kernel, alpha=0, optimizer=None).fit(x, y)
        mean, sd = there.predict(new, return_std=True)
        means.append(mean)
        sds.append(sd)
    means, sds = np.array(means), np.array(sds)
    mean = nodes.share @ means
    var = nodes.share @ (sds**2 + means**2) - mean**2
    got_mean, got_var = average.members_[0].moments(new)
    np.testing.assert_allclose(got_mean, mean, atol=1e-6)
    np.testing.assert_allclose(got_var, var, rtol=1e-5)
    want = logsumexp(np.log(nodes.share)[:, None] + norm(means, sds).logpdf(y_new), axis=0)
    np.testing.assert_allclose(average.members_[0].log_prob(new, y_new), want, atol=1e-5)


def test_a_kernel_against_quadrature(kernels):
    """One hyper-parameter, the length-scale, on a grid under the model's prior."""
    x, y, search = kernels
    average = search.average()
    new = np.linspace(0.1, 5, 12)[:, None]
    y_new = np.sin(2 * new[:, 0])
    model = search.param_grid["model"][1]
    with pyro.get_param_store().scope():
        (loc, scale), *rest = model.hyperprior(torch.as_tensor(x), torch.as_tensor(y)).values()
    assert not rest
    grid = float(loc) + float(scale) * np.linspace(-5, 5, 300)

    def cov(a, b, length):
        return np.exp(-0.5 * (a - b.T) ** 2 / length**2)

    log_post, means, sds = [], [], []
    for theta in grid:
        own = cov(x, x, np.exp(theta)) + 0.09 * np.eye(len(x))
        across = cov(new, x, np.exp(theta))
        log_post.append(
            multivariate_normal(np.zeros(len(x)), own).logpdf(y)
            + norm(float(loc), float(scale)).logpdf(theta)
        )
        means.append(across @ np.linalg.solve(own, y))
        sds.append(np.sqrt(1.09 - np.einsum("ij,ji->i", across, np.linalg.solve(own, across.T))))
    log_z = logsumexp(log_post) + np.log(grid[1] - grid[0])
    share, means, sds = softmax(log_post), np.array(means), np.array(sds)
    assert search.cv_results_["lml"][1] == pytest.approx(log_z, abs=0.2)
    mean = share @ means
    var = share @ (sds**2 + means**2) - mean**2
    got_mean, got_var = average.members_[1].moments(new)
    np.testing.assert_allclose(got_mean, mean, atol=0.01)
    np.testing.assert_allclose(np.sqrt(got_var), np.sqrt(var), rtol=0.01)
    want = logsumexp(np.log(share)[:, None] + norm(means, sds).logpdf(y_new), axis=0)
    np.testing.assert_allclose(average.members_[1].log_prob(new, y_new), want, atol=0.02)


class Steps:
    """A walk of unknown variance, which runs at one value of it at a time."""

    def __init__(self, slope=0.0):
        self.slope = slope

    def __call__(self, x, y):
        variance = pyro.param("variance", torch.ones((), dtype=x.dtype), dist.constraints.positive)
        cov = variance.reshape(()) * torch.minimum(x, x.mT) + 0.1 * torch.eye(len(x), dtype=x.dtype)
        pyro.sample("y", dist.MultivariateNormal(self.slope * x[:, 0], cov), obs=y)

    def hyperprior(self, x, y):
        return {"variance": (torch.tensor(0.0), torch.tensor(1.0))}


@pytest.mark.slow
def test_a_program_that_runs_at_one_value_at_a_time():
    x, y = curve(20)
    y[5] = np.nan
    models = [Steps(), Steps(1.0)]
    search = MarginalLikelihoodSearch(BayesMPT(), {"model": models}, evidence="integrated", random_state=0)
    average, new = search.fit(x, y).average(), np.array([[0.5], [2.0], [4.5]])
    o = ~np.isnan(y)
    theta = np.linspace(-5, 5, 100)  # the rule of a smooth density: exact
    laws, log_z = [], []
    for slope in (0.0, 1.0):
        log_post, means, variances = [], [], []
        for v in np.exp(theta):
            own = v * np.minimum(x, x.T)[np.ix_(o, o)] + 0.1 * np.eye(o.sum())
            across = v * np.minimum(new, x.T)[:, o]
            log_post.append(multivariate_normal(slope * x[o, 0], own).logpdf(y[o]))
            means.append(slope * new[:, 0] + across @ np.linalg.solve(own, y[o] - slope * x[o, 0]))
            variances.append(
                v * new[:, 0] + 0.1 - np.einsum("ij,ji->i", across, np.linalg.solve(own, across.T))
            )
        log_post += norm.logpdf(theta)
        share, means = softmax(log_post), np.array(means)
        mean = share @ means
        laws.append((mean, share @ (np.array(variances) + means**2) - mean**2))
        log_z.append(logsumexp(log_post) + np.log(theta[1] - theta[0]))
    w = softmax(log_z)
    np.testing.assert_allclose(average.weights_, w, atol=0.03)
    mean = sum(s * m for s, (m, _) in zip(w, laws, strict=True))
    second = sum(s * (v + m**2) for s, (m, v) in zip(w, laws, strict=True))
    got = average.predict(new, return_std=True)
    np.testing.assert_allclose(got[0], mean, atol=0.02)
    np.testing.assert_allclose(got[1], np.sqrt(second - mean**2), rtol=0.02)


def test_kernels_mixed(kernels):
    *_, search = kernels
    average = search.average()
    np.testing.assert_allclose(average.weights_, softmax(search.cv_results_["lml"]), rtol=1e-9)
    new = np.linspace(-1, 6, 9)[:, None]
    y_new = np.sin(2 * new[:, 0])
    y_new[4] = np.nan
    mean, sd = average.predict(new, return_std=True)
    np.testing.assert_array_equal(average.predict(new), mean)
    each = [m.moments(new) for m in average.members_]
    want = sum(w * m for w, (m, _) in zip(average.weights_, each, strict=True))
    second = sum(w * (v + m**2) for w, (m, v) in zip(average.weights_, each, strict=True))
    np.testing.assert_allclose(mean, want, atol=1e-12)
    np.testing.assert_allclose(sd, np.sqrt(second - want**2), rtol=1e-8)
    nats = average.score_samples(new, y_new)
    log_prob = np.array([m.log_prob(new, y_new) for m in average.members_])
    np.testing.assert_allclose(nats, logsumexp(log_prob + np.log(average.weights_)[:, None], axis=0))
    assert np.isnan(nats[4]) and np.isfinite(np.delete(nats, 4)).all()
    assert not hasattr(average, "sample") and not hasattr(average, "impute")
    with pytest.raises(ValueError, match="the candidates score y given X: pass y"):
        average.score_samples(new)


def test_nothing_estimated_is_its_own_posterior():
    """Kernels without a free parameter: the mixture of two exact posteriors."""
    x, y = curve()
    fixed = []
    for length in (0.5, 1.0):
        kernel = RBFKernel()
        kernel.lengthscale = length
        for p in kernel.parameters():
            p.requires_grad_(False)
        fixed.append(GaussianProcess(kernel, mean="zero", noise=0.09))
    search = MarginalLikelihoodSearch(BayesMPT(), {"model": fixed}).fit(x, y)
    average, new = search.average(), np.linspace(0, 4, 5)[:, None]
    there = [
        GaussianProcessRegressor(RBF(s) + WhiteKernel(0.09), alpha=0, optimizer=None).fit(x, y)
        for s in (0.5, 1)
    ]
    lml = [g.log_marginal_likelihood_value_ for g in there]
    np.testing.assert_allclose(average.weights_, softmax(lml), rtol=1e-6)
    means, sds = zip(*(g.predict(new, return_std=True) for g in there), strict=True)
    mean, sd = average.predict(new, return_std=True)
    np.testing.assert_allclose(mean, softmax(lml) @ np.array(means), atol=1e-8)
    second = softmax(lml) @ (np.square(sds) + np.square(means))
    np.testing.assert_allclose(sd, np.sqrt(second - mean**2), rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------- stacking


def simplex(n_candidates, step):
    places = [
        w for w in product(np.arange(0, 1 + step / 2, step), repeat=n_candidates - 1) if sum(w) < 1 + 1e-9
    ]
    return np.array([[*w, max(0.0, 1 - sum(w))] for w in places])


def best_on_simplex(log_prob, step=0.01):
    """Weights and mean log score by brute force."""
    grid = simplex(log_prob.shape[1], step)
    with np.errstate(divide="ignore"):
        value = logsumexp(log_prob[None] + np.log(grid)[:, None], axis=2).mean(1)
    return grid[np.argmax(value)], value.max()


@pytest.mark.parametrize("seed", range(4))
def test_stacked_weights_are_the_best_on_the_simplex(seed):
    rng = np.random.default_rng(seed)
    log_prob = 2 * rng.normal(size=(40, 3)) - [0.0, 0.3 * seed, 800.0 if seed == 3 else 0.5]
    weights = stacked_weights(log_prob)
    assert weights.sum() == pytest.approx(1) and (weights >= 0).all()
    with np.errstate(divide="ignore"):
        value = logsumexp(log_prob + np.log(weights), axis=1).mean()
    best, top = best_on_simplex(log_prob)
    assert value > top - 1e-8
    np.testing.assert_allclose(weights, best, atol=0.011)


def test_stacking_bears_any_level_and_impossible_rows():
    rng = np.random.default_rng(0)
    log_prob = rng.normal(size=(30, 3))
    want = stacked_weights(log_prob)
    np.testing.assert_allclose(stacked_weights(log_prob - 1e4 * rng.random((30, 1))), want, atol=1e-5)
    impossible = np.vstack([log_prob, np.full((1, 3), -np.inf)])
    np.testing.assert_allclose(stacked_weights(impossible), want, atol=1e-9)
    log_prob[0, 0] = -np.inf
    assert np.isfinite(stacked_weights(log_prob)).all()


CV = KFold(4, shuffle=True, random_state=0)
STACKED = {"model__n_components": [0, 1, 3]}


@pytest.fixture(scope="module")
def stacked():
    x = table()
    x[::7] *= 2.5  # two kinds of rows, so that one candidate is not all
    search = MarginalLikelihoodSearch(BayesMPT(PPCA()), STACKED, evidence=HeldOut(cv=CV), random_state=0)
    return x, search.fit(x)


def hidden_scores(x):
    scores, fold = np.empty((len(x), 3)), np.empty(len(x), int)
    for f, (train, test) in enumerate(CV.split(x)):
        fold[test] = f
        for j, k in enumerate(STACKED["model__n_components"]):
            scores[test, j] = BayesMPT(PPCA(k)).fit(x[train]).score_samples(x[test])
    return scores, fold


@pytest.mark.slow
def test_stacking_against_a_loop(stacked):
    x, search = stacked
    average, (scores, fold) = search.average("stacking"), hidden_scores(x)
    best, _ = best_on_simplex(scores)
    np.testing.assert_allclose(average.weights_, best, atol=0.011)
    assert average.prior_weights_ is None
    # weights of other folds, by brute force, score each fold
    mixed, chosen = np.empty(len(x)), np.empty(len(x))
    for f in range(4):
        others = fold != f
        w, _ = best_on_simplex(scores[others], 0.005)
        with np.errstate(divide="ignore"):
            mixed[~others] = logsumexp(scores[~others] + np.log(w), axis=1)
        chosen[~others] = scores[~others, np.argmax(scores[others].sum(0))]
    assert average.heldout_score_ == pytest.approx(mixed.mean(), abs=2e-3)
    assert average.heldout_se_ == pytest.approx(mixed.std(ddof=1) / np.sqrt(len(x)), rel=0.02)
    assert average.heldout_gain_ == pytest.approx((mixed - chosen).mean(), abs=2e-3)
    gain_se = (mixed - chosen).std(ddof=1) / np.sqrt(len(x))
    assert average.heldout_gain_se_ == pytest.approx(gain_se, rel=0.05, abs=1e-3)


def test_stacked_fits_predict_rows(stacked):
    x, search = stacked
    average, new = search.average("stacking"), new_rows()
    fits = [BayesMPT(PPCA(k)).fit(x) for k in STACKED["model__n_components"]]
    each = np.array([log_density(new, f.mean_, f.get_covariance()) for f in fits])
    with np.errstate(divide="ignore"):
        want = logsumexp(each + np.log(average.weights_)[:, None], axis=0)
        share = softmax(each + np.log(average.weights_)[:, None], axis=0)
    np.testing.assert_allclose(average.score_samples(new), want, atol=1e-8)
    cells = sum(s[:, None] * f.impute(new) for s, f in zip(share, fits, strict=True))
    filled, sd = average.impute(new, return_std=True)
    np.testing.assert_allclose(filled, cells, atol=1e-8)
    var = sum(
        s[:, None] * (f.impute(new, return_std=True)[1] ** 2 + (f.impute(new) - cells) ** 2)
        for s, f in zip(share, fits, strict=True)
    )
    np.testing.assert_allclose(sd, np.sqrt(var), atol=1e-8)
    assert average.sample(5).shape == (5, T)
    np.testing.assert_array_equal(average.sample(5, random_state=1), average.sample(5, random_state=1))


@pytest.mark.slow
def test_repeats_and_kernels_are_stacked():
    x, y = curve(20)
    y[3] = np.nan
    models = [GaussianProcess(RBFKernel(), noise=0.1), GaussianProcess(LinearKernel(), noise=0.1)]
    rule = HeldOut(cv=3, n_repeats=2)
    search = MarginalLikelihoodSearch(BayesMPT(), {"model": models}, evidence=rule, random_state=0).fit(x, y)
    average = search.average("stacking")
    assert average.weights_[0] > 0.9 and np.isfinite(average.heldout_score_)
    mean, sd = average.predict(x, return_std=True)
    fits = [BayesMPT(clone(m)).fit(x, y).predict(x, return_std=True) for m in models]
    want = sum(w * m for w, (m, _) in zip(average.weights_, fits, strict=True))
    np.testing.assert_allclose(mean, want, atol=1e-8)
    second = sum(w * (s**2 + m**2) for w, (m, s) in zip(average.weights_, fits, strict=True))
    np.testing.assert_allclose(sd, np.sqrt(second - want**2), rtol=1e-6)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "evidence, weights, message",
    [
        (
            "laplace",
            "evidence",
            "evidence='laplace' leaves of .* a fit at its maximum.*evidence='integrated'",
        ),
        ("train", "evidence", "evidence='train' leaves of 'n_components=1', 'n_components=2' a fit"),
        ("heldout", "evidence", "evidence='heldout' leaves of .*: use weights='stacking'"),
        ("cumulative", "evidence", "evidence='cumulative' leaves of"),
        ("laplace", "stacking", "evidence='laplace' hides none: search with evidence='heldout'"),
        ("train", "stacking", "evidence='train' hides none"),
        ("integrated", "stacking", "evidence='integrated' hides none"),
        ("integrated", "equal", "weights must be 'evidence' or 'stacking', got 'equal'"),
    ],
)
def test_weights_that_a_rule_does_not_give(evidence, weights, message):
    grid = {"model__n_components": [1, 2]}
    search = MarginalLikelihoodSearch(BayesMPT(PPCA()), grid, evidence=evidence, random_state=0).fit(table())
    with pytest.raises(ValueError, match=message):
        search.average(weights)


def test_one_candidate_and_none():
    x = table()
    one = MarginalLikelihoodSearch(BayesMPT(PPCA()), {"model__n_components": [1]}).fit(x)
    with pytest.raises(ValueError, match="an average needs two candidates, got 'n_components=1' alone"):
        one.average()
    rest = MarginalLikelihoodSearch(BayesMPT(PPCA()), {"model__n_components": [1, T]}).fit(x)
    with pytest.raises(ValueError, match="'n_components=1' alone; left out: 'n_components=4' "):
        rest.average()
    kept = MarginalLikelihoodSearch(BayesMPT(PPCA()), {"model__n_components": [1, 2]}, refit=False).fit(x)
    with pytest.raises(ValueError, match="refit=False keeps no candidates"):
        kept.average()
    with pytest.raises(ValueError, match="not fitted"):
        MarginalLikelihoodSearch(BayesMPT(PPCA()), {"model__n_components": [1, 2]}).average()


def test_failed_candidates_are_left_out_and_said():
    x = table()
    search = MarginalLikelihoodSearch(BayesMPT(PPCA()), {"model__n_components": [0, T, 1]}).fit(x)
    with pytest.warns(LeftOutWarning, match="left out of the average: 'n_components=4' .ValueError"):
        average = search.average()
    assert average.candidate_names_ == ["n_components=0", "n_components=1"]
    assert (
        list(average.left_out_) == ["n_components=4"] and "ValueError" in average.left_out_["n_components=4"]
    )
    np.testing.assert_allclose(average.prior_weights_, [0.5, 0.5])
    few = MarginalLikelihoodSearch(BayesMPT(PPCA()), {"model__n_components": [0, 1]}).fit(x).average()
    np.testing.assert_allclose(average.score_samples(x), few.score_samples(x), atol=1e-9)
    for given in ([1.0, 7.0, 3.0], {"n_components=0": 1, "n_components=1": 3}):
        with pytest.warns(LeftOutWarning):
            np.testing.assert_allclose(search.average(prior_weights=given).prior_weights_, [0.25, 0.75])


def test_other_tokens_are_refused_by_the_search():
    piped = Pipeline([("scale", StandardScaler()), ("model", BayesMPT(PPCA(1)))])
    grid = {"scale": [StandardScaler(), "passthrough"]}
    with pytest.raises(ValueError, match="not comparable.*tokens"):
        MarginalLikelihoodSearch(piped, grid).fit(table())


def with_errors(search, lml, se):
    """What a search would hold, had its evidences these values and errors."""
    other = copy.copy(search)
    other._found = [copy.copy(c) for c in search._found]
    for c, value, error in zip(other._found, lml, se, strict=True):
        c.evidence, c.se = value, error
    return other


def test_errors_that_leave_weights_open_are_said(factors):
    """A weight's standard error over draws of the evidences is above .1 where it warns, and below where it does not."""
    _, search, _ = factors
    rng, odds = np.random.default_rng(0), np.full(4, 0.25)
    for lml, se, said in (
        ([0.0, 0.0, -60.0, -60.0], [0.5, 0.5, 0.1, 0.1], True),
        ([0.0, -4.0, -60.0, -60.0], [4.0, 0.1, 0.1, 0.1], True),
        ([0.0, 0.0, -1.0, -2.0], [0.1, 0.1, 0.1, 0.1], False),
        ([0.0, -30.0, -60.0, -60.0], [2.0, 2.0, 2.0, 2.0], False),
    ):
        drawn = softmax(np.array(lml) + np.array(se) * rng.normal(size=(4000, 4)), axis=1)
        assert (drawn.std(0).max() > 0.1) == said
        other = with_errors(search, lml, se)
        if said:
            words = rf"'PPCA.n_components=0.' \(se {se[0]:g} nats, weight 0\.\d+ to \S+\).*weights='stacking'"
            with pytest.warns(DrawsWarning, match=words):
                other.average(prior_weights=odds)
        else:
            other.average(prior_weights=odds)  # warnings are errors here
    with pytest.warns(DrawsWarning, match="se nan nats, weight 0.00 to 1.00"):
        with_errors(search, [0.0, 0.0, 0.0, 0.0], [np.nan, 0.1, 0.1, 0.1]).average(prior_weights=odds)


def test_a_cell_too_far_to_square_is_named_by_an_average(factors):
    _, search, _ = factors
    new = np.array([[1.0, 2.0, np.nan, 1.0], [1.0, 1e200, np.nan, 1.0]])
    with pytest.raises(ValueError, match=r"row 1 holds 1e\+200 in column 1, whose square no float holds"):
        search.average().impute(new)
    with pytest.warns(PrecisionWarning, match=r"row 1 holds 1e\+200 in column 1: the log-density"):
        assert search.average().score_samples(new)[1] == -np.inf


def test_another_prior_is_refused(factors):
    """The search refuses it; so does an average of what a search holds."""
    _, search, _ = factors
    other = copy.copy(search)
    other._found = [copy.copy(c) for c in search._found]
    other._found[1].prior = "another"
    with pytest.raises(
        ValueError, match="not comparable: the evidence of 'PPCA.n_components=0.' is under the prior"
    ):
        other.average()


@pytest.mark.slow
def test_other_steps_before_the_models_are_refused():
    x, y = curve()
    piped = Pipeline([("scale", StandardScaler()), ("model", BayesMPT())])
    models = [GaussianProcess(RBFKernel(), noise=0.1), GaussianProcess(LinearKernel(), noise=0.1)]
    grid = [
        {"model__model": models[:1]},
        {"model__model": models[1:], "scale": [StandardScaler(with_std=False)]},
    ]
    search = MarginalLikelihoodSearch(piped, grid).fit(x, y)
    with pytest.raises(
        ValueError, match="'GaussianProcess' and 'GaussianProcess StandardScaler' see rows through"
    ):
        search.average()
    same = MarginalLikelihoodSearch(piped, {"model__model": models}).fit(x, y).average()
    bare = MarginalLikelihoodSearch(BayesMPT(), {"model": models}).fit(StandardScaler().fit_transform(x), y)
    got, want = (
        same.predict(x, return_std=True),
        bare.average().predict(StandardScaler().fit_transform(x), return_std=True),
    )
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_scaler_for_all_candidates():
    x = table()
    piped = Pipeline([("scale", StandardScaler()), ("model", BayesMPT(PPCA()))])
    grid = {"model__model__n_components": [0, 1]}
    average = MarginalLikelihoodSearch(piped, grid).fit(x).average()
    z = StandardScaler().fit(x)
    bare = MarginalLikelihoodSearch(BayesMPT(PPCA()), {"model__n_components": [0, 1]}).fit(z.transform(x))
    new = new_rows()
    np.testing.assert_allclose(
        average.score_samples(new), bare.average().score_samples(z.transform(new)), atol=1e-6
    )
    assert not hasattr(average, "sample") and not hasattr(average, "impute")
    hidden = MarginalLikelihoodSearch(piped, grid, evidence="heldout", random_state=0).fit(x)
    with pytest.raises(ValueError, match="StandardScaler.* before the model of .* has learnt from all rows"):
        hidden.average("stacking")
    plain = Pipeline([("double", FunctionTransformer(np.negative)), ("model", BayesMPT(PPCA()))])
    fixed = (
        MarginalLikelihoodSearch(plain, grid, evidence="heldout", random_state=0).fit(x).average("stacking")
    )
    assert np.isfinite(fixed.score(x))


def test_folds_that_cannot_be_stacked():
    x, grid = table(), {"model__n_components": [0, 1]}
    for cv, message in (
        (ShuffleSplit(3, random_state=0), "hides some more than once"),
        (KFold(2), None),
        ([(np.arange(30), np.arange(30, 60))], "this splitter makes one"),
    ):
        if isinstance(cv, list):
            cv = one_split(cv)
        search = MarginalLikelihoodSearch(BayesMPT(PPCA()), grid, evidence=HeldOut(cv=cv)).fit(x)
        if message is None:
            assert search.average("stacking").weights_.sum() == pytest.approx(1)
            continue
        with pytest.raises(ValueError, match=message):
            search.average("stacking")


def one_split(splits):
    class One(KFold):
        def split(self, X, y=None, groups=None):
            return iter(splits)

    return One(2)


def shared_level(x, y):
    """Nothing estimated; rows share a level."""
    level = pyro.sample("level", dist.Normal(x.new_tensor(0.0), 10.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(level, 1.0), obs=y)


def shared_slope(x, y):
    slope = pyro.sample("slope", dist.Normal(x.new_tensor(0.0), 10.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(slope * x[:, 0], 1.0), obs=y)


def test_regressions_without_a_density_of_one_row():
    x, y = curve()
    search = MarginalLikelihoodSearch(BayesMPT(), {"model": [shared_level, shared_slope]}).fit(x, y)
    average = search.average()
    np.testing.assert_allclose(average.prior_weights_, [0.5, 0.5])
    # level and slope: normal posteriors
    level = y.sum() / (len(y) + 0.01)
    slope = (x[:, 0] @ y) / (np.square(x).sum() + 0.01)
    want = average.weights_ @ np.array([np.full(len(x), level), slope * x[:, 0]])
    np.testing.assert_allclose(average.predict(x), want, atol=1e-5)
    lml = [
        multivariate_normal(np.zeros(len(y)), np.eye(len(y)) + 100 * np.outer(v, v)).logpdf(y)
        for v in (np.ones(len(y)), x[:, 0])
    ]
    np.testing.assert_allclose(average.weights_, softmax(lml), rtol=1e-4)
    with pytest.raises(ValueError, match="return_std needs a standard deviation of every candidate"):
        average.predict(x, return_std=True)
    with pytest.raises(ValueError, match="no density of one new y alone"):
        average.score_samples(x, y)


# ----------------------------------------------------------------------------- as an estimator, and where it is from


def test_it_is_an_estimator():
    x = table()
    search = MarginalLikelihoodSearch(BayesMPT(PPCA()), {"model__n_components": [0, 1]}, random_state=0)
    average = ModelAverage(search).fit(x)
    assert not hasattr(search, "comparison_")
    want = clone(search).fit(x).average()
    np.testing.assert_array_equal(average.score_samples(x), want.score_samples(x))
    np.testing.assert_array_equal(clone(want).fit(x).weights_, want.weights_)
    twin = pickle.loads(pickle.dumps(average))
    np.testing.assert_array_equal(twin.score_samples(x), average.score_samples(x))
    np.testing.assert_array_equal(twin.sample(3), average.sample(3))
    with pytest.raises(ValueError, match="weights must be"):
        ModelAverage(search, weights="mine").fit(x)
    with pytest.raises(ValueError, match="search must be a MarginalLikelihoodSearch.*got BayesMPT"):
        ModelAverage(BayesMPT()).fit(x)
    with pytest.raises(ValueError, match="expecting 4 features"):
        average.score_samples(x[:, :3])


def test_names_of_columns():
    frame = pd.DataFrame(table(), columns=list("abcd"))
    search = MarginalLikelihoodSearch(BayesMPT(PPCA()), {"model__n_components": [0, 1]})
    average = search.fit(frame).average()
    assert list(average.feature_names_in_) == list("abcd") and average.n_features_in_ == T
    plain = clone(search).fit(table()).average()
    np.testing.assert_allclose(average.score_samples(frame), plain.score_samples(table()), atol=1e-9)
    with pytest.raises(ValueError, match="feature names"):
        average.score_samples(frame[list("badc")])
    single = average.impute(frame.astype(np.float32))
    assert set(single.dtypes) == {np.dtype(np.float32)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["factors", "kernels", "stacked"])
def test_pickled_stored_and_side_by_side(kind, tmp_path):
    """Searches that were pickled, taken up from files, or done in threads give the same average."""
    if kind == "kernels":
        data, evidence, estimator = curve(12), "auto", BayesMPT()
        grid = {"model": [GaussianProcess(k(), mean="zero", noise=0.1) for k in (RBFKernel, LinearKernel)]}
    else:
        data, estimator = (table(),), BayesMPT(PPCA())
        grid, evidence = STACKED, "integrated" if kind == "factors" else "heldout"
    weights = "stacking" if kind == "stacked" else "evidence"

    def search(**how):
        return MarginalLikelihoodSearch(estimator, grid, evidence=evidence, random_state=0, **how)

    def same(other, **tolerance):
        np.testing.assert_allclose(other.weights_, first.weights_, **tolerance)
        np.testing.assert_allclose(other.score_samples(*data), first.score_samples(*data), **tolerance)

    fitted = search().fit(*data)
    first = fitted.average(weights)
    same(fitted.average(weights), rtol=0)
    same(pickle.loads(pickle.dumps(fitted)).average(weights), rtol=0)
    search(checkpoint_dir=tmp_path).fit(*data)
    again = search(checkpoint_dir=tmp_path).fit(*data)
    assert all(c.taken_up for c in again._found)
    stored = pickle.dumps(again)
    same(again.average(weights), rtol=1e-6, atol=1e-9)
    same(pickle.loads(stored).average(weights), rtol=1e-6, atol=1e-9)
    with parallel_backend("threading", n_jobs=2):
        same(search(n_jobs=2).fit(*data).average(weights), rtol=0)


def test_rows_changed_since_the_fit(tmp_path):
    x, grid = table(), {"model__n_components": [0, 1]}
    how = {"evidence": "heldout", "random_state": 0, "checkpoint_dir": tmp_path}
    MarginalLikelihoodSearch(BayesMPT(PPCA()), grid, **how).fit(x)
    search = MarginalLikelihoodSearch(BayesMPT(PPCA()), grid, **how).fit(x)
    x[:] = 0  # the search has a copy
    assert np.isfinite(search.average("stacking").score(table()))
