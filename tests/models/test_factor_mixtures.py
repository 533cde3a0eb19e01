"""Mixtures of factor analysers: EM against dense algebra row by row, with missing cells, and the end of the climb."""

import itertools

import numpy as np
import pyro
import pytest
import torch
from pyro.distributions import constraints
from scipy import stats
from scipy.special import logsumexp
from sklearn.datasets import load_wine
from tables import with_holes

from bayes_mpt import BayesMPT
from bayes_mpt.models import FactorAnalysis, GaussianMixture, MixtureOfFactorAnalyzers
from bayes_mpt.predictors import Exact

WINE = load_wine().data


def table(holes, n_rows=60, n_tokens=4):
    x = np.random.default_rng(0).normal(size=(n_rows, n_tokens)) @ np.diag([1.0, 2.0, 0.5, 3.0])
    x[: n_rows // 2] += [2.0, 0.0, 1.0, 5.0]
    x[:, 1] += x[:, 0]
    return with_holes(x, holes, 1) if holes else x


def start_of(x, n_components, n_factors, seed=0):
    rng, n_tokens = np.random.default_rng(seed), x.shape[1]
    spread = np.nanstd(x, 0)
    return {
        "weights": torch.as_tensor(rng.dirichlet(np.full(n_components, 5.0))),
        "loc": torch.as_tensor(np.nanmean(x, 0) + spread * rng.normal(size=(n_components, n_tokens))),
        "loading": torch.as_tensor(
            spread[:, None] * rng.normal(size=(n_components, n_tokens, n_factors)) / 2
        ),
        "noise_variance": torch.as_tensor(spread**2 * rng.uniform(0.3, 1, size=(n_components, n_tokens))),
    }


def numbers(params):
    names = ("weights", "loc", "loading", "noise_variance")
    return [np.asarray(params[name], dtype=float) for name in names]


def joint_of(row, params):
    """log p(component, observed cells) by dense covariances, and E[z | row], cov[z | row] in each component."""
    out, latents = [], []
    seen = ~np.isnan(row)
    for weight, loc, loading, noise in zip(*numbers(params), strict=True):
        cov = (loading @ loading.T + np.diag(noise))[np.ix_(seen, seen)]
        log_prob = stats.multivariate_normal(loc[seen], cov).logpdf(row[seen]) if seen.any() else 0.0
        out.append(np.log(weight) + log_prob)
        gain = loading[seen].T @ np.linalg.inv(cov) if seen.any() else loading[seen].T
        mean = gain @ (row - loc)[seen]
        latents.append((mean, np.eye(len(mean)) - gain @ loading[seen]))
    return np.array(out), latents


def score_of(x, params):
    return sum(logsumexp(joint_of(row, params)[0]) for row in x)


def prior_cell(x, n_components):
    """The variance (T,) of the one more cell that the prior stands for: 1 % of the column's over K^(2/T)."""
    return 0.01 * np.nanvar(x, 0) / n_components ** (2 / x.shape[1])


def log_prior(x, params):
    noise = np.asarray(params["noise_variance"], dtype=float)
    return -0.5 * (np.log(noise) + prior_cell(x, len(noise)) / noise).sum()


def em_row_by_row(x, params, n_steps, prior):
    """Ghahramani & Hinton's M-step of [W, loc] and psi for each token, over the rows in which it is observed."""
    params = {name: np.asarray(value, dtype=float) for name, value in params.items()}
    n_components, n_tokens, n_factors = params["loading"].shape
    for _ in range(n_steps):
        shares, moments = [], []
        for row in x:
            joint, latents = joint_of(row, params)
            shares.append(np.exp(joint - logsumexp(joint)))
            moments.append(latents)
        new = {name: value.copy() for name, value in params.items()}
        new["weights"] = np.mean([s for s, row in zip(shares, x, strict=True) if not np.isnan(row).all()], 0)
        for k, t in itertools.product(range(n_components), range(n_tokens)):
            a, b = np.zeros((n_factors + 1, n_factors + 1)), np.zeros(n_factors + 1)
            c = n = 0.0
            for row, share, latents in zip(x, shares, moments, strict=True):
                if np.isnan(row[t]):
                    continue
                mean, cov = latents[k]
                z = np.append(mean, 1.0)
                second = np.outer(z, z)
                second[:-1, :-1] += cov
                a, b = a + share[k] * second, b + share[k] * row[t] * z
                c, n = c + share[k] * row[t] ** 2, n + share[k]
            w = np.linalg.solve(a, b)
            new["loading"][k, t], new["loc"][k, t] = w[:-1], w[-1]
            rest = c - 2 * w @ b + w @ a @ w
            if prior is not None:
                rest, n = rest + prior_cell(x, n_components)[t], n + 1
            new["noise_variance"][k, t] = rest / n
        params = new
    return params


@pytest.mark.parametrize(
    ("holes", "n_factors", "prior"), [(0.0, 2, None), (0.3, 2, None), (0.3, 0, "auto"), (0.3, 1, "auto")]
)
def test_first_steps_are_those_of_em_row_by_row(holes, n_factors, prior):
    x = table(holes, n_rows=30)
    if holes:
        x[4] = np.nan  # says nothing
    start = start_of(x, 2, n_factors)
    model = MixtureOfFactorAnalyzers(2, n_factors, prior)
    found = model.maximize(torch.as_tensor(x), start, tol=0.0, max_iter=3)
    for name, value in em_row_by_row(x, start, 3, prior).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-8, atol=1e-10, err_msg=name)


@pytest.mark.parametrize(("holes", "prior"), [(0.0, "auto"), (0.3, "auto"), (0.3, None)])
def test_what_is_climbed_rises_with_every_step_and_the_score_is_that_of_the_program(holes, prior, own_store):
    x = table(holes, n_rows=40)
    model, start = MixtureOfFactorAnalyzers(2, 1, prior), start_of(x, 2, 1, seed=3)
    rows = torch.as_tensor(x)
    penalty = model.penalty(rows)
    climbed = []
    for k in [*range(8), 14, 20, 21, 22, 40]:  # beyond 20 of L-BFGS
        found = model.maximize(rows, start, tol=0.0, max_iter=k) if k else start
        score = score_of(x, found)
        held = log_prior(x, found) if prior else 0.0
        assert (0.0 if penalty is None else float(penalty(found))) == pytest.approx(held)
        climbed.append(score + held)
        if k % 10 == 1:
            pyro.clear_param_store()
            for name, value in found.items():
                bound = {"weights": constraints.simplex, "noise_variance": constraints.positive}.get(name)
                pyro.param(name, value, constraint=bound or constraints.real)
            program = Exact().bind(model, (rows,)).read((rows,)).score()
            assert float(program.sum().detach()) == pytest.approx(score, rel=1e-9)
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(climbed))
    assert climbed[-1] > climbed[0] + 5


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.1])
def test_the_fit_is_the_best_of_six_starts_and_leaves_lbfgs_nothing(share):
    x = with_holes(WINE, share, 2) if share else WINE
    model = MixtureOfFactorAnalyzers(2, 1)
    fitted = BayesMPT(model, random_state=0).fit(x)
    assert fitted.fit_method_ == "maximize, the model's own"
    assert fitted.converged_
    assert fitted.log_marginal_likelihood_ == pytest.approx(score_of(x, fitted.params_), abs=1e-6)
    rows = torch.as_tensor(x)
    ends = [model.maximize(rows, start_of(x, 2, 1, seed), tol=1e-10, max_iter=199) for seed in range(6)]
    held = model.penalty(rows)
    best = max(score_of(x, end) + float(held(end)) for end in ends)
    own = {name: torch.as_tensor(value) for name, value in fitted.params_.items()}
    assert fitted.log_marginal_likelihood_ + float(held(own)) > best - 0.1


def test_one_component_is_factor_analysis():
    x = with_holes(WINE[:80, :6], 0.1, 3)
    one = BayesMPT(MixtureOfFactorAnalyzers(1, 2, None), random_state=0).fit(x)
    analysis = BayesMPT(FactorAnalysis(2), random_state=0).fit(x)
    assert one.log_marginal_likelihood_ == pytest.approx(analysis.log_marginal_likelihood_, abs=0.01)


def test_without_factors_it_is_the_mixture_with_diagonal_covariances():
    x = table(0.2)
    bare = BayesMPT(MixtureOfFactorAnalyzers(2, 0), random_state=0).fit(x)
    diagonal = BayesMPT(GaussianMixture(2, "diag"), random_state=0).fit(x)
    assert bare.log_marginal_likelihood_ == pytest.approx(diagonal.log_marginal_likelihood_, abs=0.01)
    for fitted in (bare, diagonal):
        assert "inverse gamma prior" in fitted.explain()


@pytest.mark.filterwarnings("ignore:the training stopped")  # where a component has but one value
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:2],
        lambda x: x[:4],  # fewer than components
        lambda x: np.repeat(x[:3], 8, 0),
        lambda x: x[:, :1],
        lambda x: x.round(),
        lambda x: np.where(np.arange(len(x))[:, None] == 3, np.nan, x),
    ],
    ids=["two rows", "four", "repeated", "one column", "whole numbers", "empty row"],
)
def test_odd_tables_have_a_likelihood_with_a_bound_under_the_prior(change):
    x = change(table(0.0, n_rows=30))
    fitted = BayesMPT(MixtureOfFactorAnalyzers(5, 1), random_state=0).fit(x)
    assert np.isfinite(fitted.log_marginal_likelihood_)
    assert (fitted.params_["noise_variance"] > 1e-6 * np.nanvar(x, 0)).all()
    assert fitted.log_marginal_likelihood_ == pytest.approx(score_of(x, fitted.params_), abs=1e-6)


@pytest.mark.parametrize("prior", ["auto", None])
def test_constant_columns_are_refused_by_name(prior):
    x = np.c_[table(0.2), np.ones(60)]
    with pytest.raises(ValueError, match="columns that are constant.*Constant here: 4"):
        BayesMPT(MixtureOfFactorAnalyzers(2, 1, prior)).fit(x)


@pytest.mark.parametrize("holes", [False, True])
def test_columns_that_repeat_others_are_refused_by_name(holes):
    """One factor explains both without noise; without factors each has its own."""
    x = table(0.2 if holes else 0.0)
    x = np.c_[x, 3 - 2 * x[:, 1]]
    with pytest.raises(ValueError, match="columns that repeat others but for scale and shift"):
        BayesMPT(MixtureOfFactorAnalyzers(2, 1)).fit(x)
    assert np.isfinite(BayesMPT(MixtureOfFactorAnalyzers(2, 0)).fit(x).log_marginal_likelihood_)
    near = x.copy()
    near[:, -1] += 1e-3 * np.random.default_rng(0).normal(size=len(x))
    assert np.isfinite(BayesMPT(MixtureOfFactorAnalyzers(2, 1)).fit(near).log_marginal_likelihood_)


def test_a_token_that_a_component_never_sees_stays_as_it_is():
    x = torch.tensor(
        [[0.0, torch.nan], [1.0, torch.nan], [0.5, torch.nan], [9.0, 1.0], [9.5, 2.0], [8.0, 4.0]]
    )
    x = x.double()
    start = start_of(x.numpy(), 2, 1)
    start["loc"] = torch.tensor([[0.5, 0.7], [9.0, 2.0]], dtype=torch.float64)
    start["loading"] = torch.full((2, 2, 1), 0.1, dtype=torch.float64)
    start["noise_variance"] = torch.full((2, 2), 0.1, dtype=torch.float64)
    found = MixtureOfFactorAnalyzers(2, 1, None).maximize(x, start, tol=1e-9, max_iter=2)
    assert found["loc"][0, 1] == pytest.approx(0.7)
    assert all(bool(torch.isfinite(value).all()) for value in found.values())


def test_ctrl_c_in_a_climb_hands_over_the_best_so_far(monkeypatch):
    x = table(0.2)
    model, start = MixtureOfFactorAnalyzers(2, 1), start_of(x, 2, 1)
    before = score_of(x, model.maximize(torch.as_tensor(x), start, tol=0.0, max_iter=20))

    def press(*args, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr("bayes_mpt.models.quasi_newton.QuasiNewton._stop", press)
    with pytest.raises(KeyboardInterrupt) as pressed:
        model.maximize(torch.as_tensor(x), start, tol=0.0, max_iter=30)
    assert score_of(x, pressed.value.args[0]) >= before - 1e-9
