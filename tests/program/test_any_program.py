"""A stranger's Pyro programs through the estimator: fitted, scored and explained, against truths worked out here.

Truths are enumerations, dense grids and Gaussian densities by numpy and scipy; trained programs must reach what scipy's
own optimiser makes of the same truth.
"""

import pickle
import warnings

import cloudpickle
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from scipy import stats
from scipy.optimize import minimize
from scipy.special import expit, gammaln, logsumexp
from sklearn import mixture
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from tables import tensor, with_holes
from truths import mixture_log_terms, normal_grid

from bayes_mpt import Auto, BayesMPT, MarginalLikelihoodSearch, compare
from bayes_mpt.masks import PermutationChain, UniformSize
from bayes_mpt.models import PPCA, GaussianMixture, LatentClass
from bayes_mpt.predictors import Exact, Importance, Quadrature, SequentialMonteCarlo
from bayes_mpt.predictors.nodes.adaptive import AdaptiveNodes
from bayes_mpt.program.analysis import analyze
from bayes_mpt.program.arguments import Args
from bayes_mpt.program.batched import Batched
from bayes_mpt.program.program import one_vector
from bayes_mpt.score import CumulativeMaskedScore
from bayes_mpt.training import Ascent, Steps

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

SEED = 1991
SMALL_SMC = SequentialMonteCarlo(32, 4, 1)
NORMAL_GRID, LOG_NORMAL_GRID = normal_grid(8, 2001)


def rng(seed=SEED):
    return np.random.default_rng(seed)


def param(name, value, constraint=constraints.real):
    return pyro.param(name, tensor(value), constraint=constraint)


def fitted(program, x, y=None, **settings):
    return BayesMPT(program, random_state=0, **settings).fit(x, y)


def refused(program, x, y=None, *, match, error=ValueError, **settings):
    with pytest.raises(error, match=match):
        fitted(program, x, y, **settings)


def reaches(model, truth, start, x, y=None):
    """At least what BFGS makes of the true mean score a row, and no more than rounding above."""
    best = -minimize(lambda theta: -truth(theta).mean(), start, options={"maxiter": 500}).fun
    assert model.score(x, y) > best - 1e-4


def check_all_methods(model, x, y=None, *, exact=True):
    """What every fitted estimator offers."""
    given = () if y is None else (y,)
    rows = model.score_samples(x, *given)
    assert np.isfinite(rows).all() and rows.sum() == pytest.approx(model.log_marginal_likelihood_, rel=1e-9)
    assert model.score(x, *given) == pytest.approx(rows.mean())
    found = model.estimate(x, *given, n_replicates=2)
    assert found.lml == pytest.approx(rows, rel=1e-9) and found.exact == exact
    assert (found.se == 0) == exact or found.se < 1e-3
    assert found.diagnostics["n_replicates"] == 2
    if exact:
        assert found.by_size.mean.sum() * len(rows) == pytest.approx(found.total)
    text = model.explain()
    for name in (*found.integrated, *found.point_estimated, model.predictor_.name):
        assert name in text
    latents = model.transform(x, *given)
    assert len(latents) == len(rows) and np.isfinite(latents).all()
    for copy in (cloudpickle.loads(cloudpickle.dumps(model)), pickle.loads(cloudpickle.dumps(model))):
        np.testing.assert_array_equal(copy.score_samples(x, *given), rows)
    assert not hasattr(clone(model), "predictor_")
    again = clone(model).fit(x, *given)
    assert again.log_marginal_likelihood_ == model.log_marginal_likelihood_
    return found


# ------------------------------------------------------------------------------------------- discrete latents


def latent_class(x):
    weights = param("weights", [0.4, 0.6], constraints.simplex)
    probs = pyro.param(
        "probs",
        lambda: dist.Dirichlet(5 * x.new_ones(2, x.shape[1], 3)).sample(),
        constraint=constraints.simplex,
    )
    with pyro.plate("rows", len(x)):
        c = pyro.sample("class", dist.Categorical(weights))
        pyro.sample("x", dist.Categorical(probs[c]).to_event(1), obs=x)


def codes(n=60, t=4, gaps=0.1):
    draw = rng(1)
    probs = draw.dirichlet(np.ones(3), size=(2, t))
    group = draw.integers(2, size=n)
    x = np.array([[draw.choice(3, p=probs[g, j]) for j in range(t)] for g in group], dtype=float)
    return with_holes(x, gaps)


def class_lml(weights, probs, x):
    """By enumeration, missing cells left out: (N,)."""
    seen, code = ~np.isnan(x), np.nan_to_num(x).astype(int)
    token = np.log(probs)[:, np.arange(x.shape[1]), code]  # (C, N, T)
    return logsumexp(np.log(weights)[:, None] + np.where(seen, token, 0.0).sum(-1), axis=0)


@pytest.mark.slow
def test_latent_class_with_missing_cells():
    x = codes()
    model = fitted(latent_class, x)
    found = check_all_methods(model, x)
    np.testing.assert_allclose(
        found.lml, class_lml(model.params_["weights"], model.params_["probs"], x), atol=1e-12
    )
    assert found.integrated == ("class",) and found.point_estimated == ("weights", "probs")
    assert "class (discrete a row)" in model.explain() and "summed out" in model.explain()
    np.testing.assert_allclose(model.transform(x).sum(1), 1.0)
    filled = model.impute(x)
    np.testing.assert_array_equal(filled[~np.isnan(x)], x[~np.isnan(x)])


def test_imputed_codes():
    x = codes(40)
    model = fitted(latent_class, x)
    filled, classes = model.impute(x), model.transform(x)
    for n, t in np.argwhere(np.isnan(x)):
        share = classes[n] @ model.params_["probs"][:, t]  # of each level
        assert filled[n, t] in (pytest.approx(share @ np.arange(3)), pytest.approx(share.argmax()))


@pytest.mark.slow
def test_more_starts_are_no_worse_and_warm_start_ends_at_once():
    x = codes(40)
    model = fitted(latent_class, x, warm_start=True)
    before = model.log_marginal_likelihood_
    several = fitted(latent_class, x, n_init=2)
    assert several.log_marginal_likelihood_ >= before - 1e-9
    assert model.fit(x).n_iter_ < 5 and model.log_marginal_likelihood_ == pytest.approx(before, abs=1e-5)
    with pytest.raises(ValueError, match="partial_fit needs a program whose rows share one map"):
        model.partial_fit(x)


@pytest.mark.slow
def test_training_on_masks_and_minibatches_climbs():
    x = codes(40, gaps=0.05)
    settings = {"masks": UniformSize(2), "training": Steps(max_iter=30, batch_size=20)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # thirty steps are not meant to
        model, again = (fitted(latent_class, x, **settings) for _ in range(2))
    best = fitted(latent_class, x).log_marginal_likelihood_
    assert model.log_marginal_likelihood_ == again.log_marginal_likelihood_
    assert class_lml([0.4, 0.6], np.full((2, 4, 3), 1 / 3), x).sum() < model.log_marginal_likelihood_ <= best


def test_ready_mixture_reaches_sklearn():
    x = load_iris().data
    for kind in ("diag", "spherical"):
        truth = mixture.GaussianMixture(
            3, covariance_type=kind, n_init=3, random_state=0, tol=1e-7, max_iter=500
        )
        model = fitted(GaussianMixture(3, kind, covariance_prior=None), x)
        assert model.score(x) > truth.fit(x).score(x) - 1e-4
    full = fitted(GaussianMixture(2, "full"), x)
    p = full.params_
    truth = mixture_log_terms(x, p["weights"], p["loc"], p["scale_tril"] @ p["scale_tril"].mT)
    np.testing.assert_allclose(full.score_samples(x), logsumexp(truth, axis=0), atol=1e-9)


def test_collapsing_covariances_are_explained():
    x = load_iris().data[::3, [0, 1, 0]]
    x[:, 2] += 1e-7 * rng(0).normal(size=len(x))
    try:
        model = fitted(GaussianMixture(2, "full"), x)
    except ValueError as error:
        assert "component" in str(error) or "column" in str(error)
    else:
        assert np.isfinite(model.log_marginal_likelihood_)


def hmm(x):
    first = param("first", [0.5, 0.5], constraints.simplex)
    step = param("step", [[0.8, 0.2], [0.3, 0.7]], constraints.simplex)
    loc, scale = param("loc", [-1.0, 1.0]), param("scale", 1.0, constraints.positive)
    with pyro.plate("rows", len(x)):
        z = None
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z{t}", dist.Categorical(first if z is None else step[z]))
            pyro.sample(f"x{t}", dist.Normal(loc[z], scale), obs=x[:, t])


def forward(theta, x):
    """The forward algorithm (N,)."""
    log_a = np.log([[expit(theta[1]), expit(-theta[1])], [expit(theta[2]), expit(-theta[2])]])
    token = stats.norm(theta[3:5], np.exp(theta[5])).logpdf(np.nan_to_num(x)[..., None])
    token = np.where(np.isnan(x)[..., None], 0.0, token)  # (N, T, 2)
    a = np.log([expit(theta[0]), expit(-theta[0])]) + token[:, 0]
    for t in range(1, x.shape[1]):
        a = logsumexp(a[:, :, None] + log_a, axis=1) + token[:, t]
    return logsumexp(a, axis=1)


@pytest.mark.slow
def test_hidden_markov_model():
    draw = rng(0)
    z = np.cumsum(draw.uniform(size=(25, 6)) < 0.2, axis=1) % 2
    x = with_holes(np.array([-1.5, 1.5])[z] + 0.8 * draw.normal(size=z.shape), 0.1)
    model = fitted(hmm, x)
    p = model.params_
    logit = lambda q: np.log(q[..., 0] / q[..., 1])  # noqa: E731
    theta = np.r_[logit(p["first"]), logit(p["step"]), p["loc"], np.log(p["scale"])]
    found = check_all_methods(model, x)
    np.testing.assert_allclose(found.lml, forward(theta, x), atol=1e-10)
    reaches(model, lambda t: forward(t, x), [0, 1, -1, -1, 1, 0], x)
    assert model.transform(x).shape == (25, 12)


def mixed_columns(x):
    weights = param("weights", [0.3, 0.7], constraints.simplex)
    loc, scale = param("loc", [-1.0, 1.0]), param("scale", [1.0, 1.5], constraints.positive)
    share = param("share", [0.3, 0.6], constraints.unit_interval)
    rate = param("rate", [1.0, 4.0], constraints.positive)
    with pyro.plate("people", len(x)):
        c = pyro.sample("kind", dist.Categorical(weights))
        pyro.sample("height", dist.Normal(loc[c], scale[c]), obs=x[:, 0])
        pyro.sample("smoker", dist.Bernoulli(share[c]), obs=x[:, 1])
        pyro.sample("visits", dist.Poisson(rate[c]), obs=x[:, 2])


def mixed_lml(theta, x):
    out = np.log([expit(theta[0]), expit(-theta[0])]) + np.zeros((len(x), 2))
    seen, x = ~np.isnan(x), np.nan_to_num(x)
    for j, fn in enumerate(
        [
            stats.norm(theta[1:3], np.exp(theta[3:5])).logpdf,
            stats.bernoulli(expit(theta[5:7])).logpmf,
            stats.poisson(np.exp(theta[7:9])).logpmf,
        ]
    ):
        out = out + np.where(seen[:, [j]], fn(x[:, [j]]), 0.0)
    return logsumexp(out, axis=1)


@pytest.mark.slow
def test_columns_of_different_kinds_in_a_data_frame():
    draw = rng(6)
    c = draw.integers(2, size=120)
    smoker = draw.uniform(size=120) < np.array([0.2, 0.8])[c]
    x = np.column_stack([np.array([-2, 2])[c] + draw.normal(size=120), smoker, draw.poisson(1 + 4 * c)])
    frame = pd.DataFrame(with_holes(x.astype(float), 0.08), columns=["height", "smoker", "visits"])
    model = fitted(mixed_columns, frame)
    found = check_all_methods(model, frame)
    p = model.params_
    theta = np.r_[
        np.log(p["weights"][0] / p["weights"][1]),
        p["loc"],
        np.log(p["scale"]),
        np.log(p["share"] / (1 - p["share"])),
        np.log(p["rate"]),
    ]
    np.testing.assert_allclose(found.lml, mixed_lml(theta, frame.to_numpy()), atol=1e-10)
    reaches(model, lambda t: mixed_lml(t, frame.to_numpy()), [0, -1, 1, 0, 0, -1, 1, 0, 1.5], frame)
    assert list(model.feature_names_in_) == list(frame.columns)
    with pytest.raises(ValueError, match="feature names should match"):
        model.score(frame.rename(columns={"height": "weight"}))


# ----------------------------------------------------------------------------------------- continuous latents


def poisson_factors(width):
    def program(x):
        bias = pyro.param("bias", lambda: x.mean(0).clamp(min=0.1).log())
        loading = pyro.param("loading", lambda: 0.3 * torch.randn(x.shape[1], width, dtype=x.dtype))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(width), 1.0).to_event(1))
            pyro.sample("x", dist.Poisson((bias + z @ loading.mT).exp()).to_event(1), obs=x)

    return program


def counts(n=20, t=3, width=1, top=6):
    draw = rng(3)
    eta = 0.5 + draw.normal(size=(n, width)) @ (0.6 * draw.normal(size=(width, t)))
    return np.minimum(draw.poisson(np.exp(eta)), top).astype(float)


def poisson_lml(bias, loading, x):
    """On a dense grid of one or two latents (N,)."""
    width = loading.shape[1]
    grid = NORMAL_GRID if width == 1 else NORMAL_GRID[::20]
    log_p = stats.norm.logpdf(grid) + np.log(grid[1] - grid[0])
    z = np.stack(np.meshgrid(*[grid] * width, indexing="ij"), -1).reshape(-1, width)
    log_p = sum(np.meshgrid(*[log_p] * width, indexing="ij")).ravel()
    eta = bias + z @ loading.T  # (G, T)
    seen, x = ~np.isnan(x), np.nan_to_num(x)
    by_row = (x * seen) @ eta.T - seen @ np.exp(eta).T - (gammaln(x + 1) * seen).sum(1)[:, None]
    return logsumexp(by_row + log_p, axis=1)


@pytest.mark.slow
def test_poisson_factors_by_quadrature():
    x = with_holes(counts(), 0.05)
    model = fitted(poisson_factors(1), x)
    rows = model.score_samples(x)
    p = model.params_
    np.testing.assert_allclose(rows, poisson_lml(p["bias"], p["loading"], x), atol=1e-7)
    reaches(
        model, lambda t: poisson_lml(t[:3], t[3:, None], x), np.r_[p["bias"], p["loading"][:, 0] + 0.1], x
    )
    assert isinstance(model.predictor, str) and "Quadrature: 64 Gauss-Hermite nodes" in model.explain()
    found = model.estimate(x, n_replicates=1)
    assert not found.exact and found.se < 1e-6 and found.diagnostics["n_nodes"] == 128
    assert found.point_estimated == ("bias", "loading")
    filled = model.impute(x)
    assert np.isfinite(filled).all() and (filled[~np.isnan(x)] == x[~np.isnan(x)]).all()
    copy = cloudpickle.loads(cloudpickle.dumps(model))
    np.testing.assert_array_equal(copy.score_samples(x), rows)


def test_two_poisson_factors():
    x = counts(12, 3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the score is what is tested
        model = fitted(poisson_factors(2), x, training=Ascent(max_iter=5))
    truth = poisson_lml(model.params_["bias"], model.params_["loading"], x)
    np.testing.assert_allclose(model.score_samples(x), truth, atol=1e-4)
    assert model.transform(x).shape == (12, 2)


def test_chain_by_quadrature_adds_up():
    """Counts of some hundred say far more about z than the prior, for which the first nodes are placed."""
    x = np.array([[150.0, 90.0], [2.0, 3.0], [40.0, 10.0]])

    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample(
                "x", dist.Poisson((2 + 1.5 * z[..., None].expand(*z.shape, 2)).exp()).to_event(1), obs=x
            )

    model = fitted(program, x)
    found = model.estimate(x, n_replicates=1)
    np.testing.assert_allclose(found.lml, poisson_lml(np.full(2, 2.0), np.full((2, 1), 1.5), x), atol=1e-7)
    assert found.by_size.mean.sum() * 3 == pytest.approx(found.total, abs=1e-3)


def item_response(x):
    slope = pyro.param("slope", lambda: x.new_ones(x.shape[1]), constraint=constraints.positive)
    level = pyro.param("level", lambda: x.new_zeros(x.shape[1]))
    with pyro.plate("rows", len(x)):
        skill = pyro.sample("skill", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Bernoulli(logits=slope * (skill[..., None] - level)).to_event(1), obs=x)


def item_lml(slope, level, x):
    eta = slope * (NORMAL_GRID[:, None] - level)
    seen, x = ~np.isnan(x), np.nan_to_num(x)
    by_row = (x * seen) @ eta.T - seen @ np.logaddexp(0, eta).T
    return logsumexp(by_row + LOG_NORMAL_GRID, axis=1)


@pytest.mark.slow
def test_item_response_model():
    draw = rng(5)
    p = expit(draw.uniform(0.8, 2, 4) * (draw.normal(size=(60, 1)) - draw.normal(size=4)))
    x = with_holes((draw.uniform(size=(60, 4)) < p).astype(float), 0.05)
    model = fitted(item_response, x)
    truth = item_lml(model.params_["slope"], model.params_["level"], x)
    np.testing.assert_allclose(model.score_samples(x), truth, atol=1e-5)
    start = np.r_[np.log(model.params_["slope"]), model.params_["level"]]
    reaches(model, lambda t: item_lml(np.exp(t[:4]), t[4:], x), start + 0.1, x)
    assert np.corrcoef(model.transform(x)[:, 0], np.nanmean(x, 1))[0, 1] > 0.8


class Encoder(torch.nn.Module):
    def __init__(self, n_tokens, width):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(n_tokens, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2 * width)
        ).double()
        self.width = width

    def forward(self, x):
        h = self.layers((x + 1).log())
        return h[..., : self.width], (h[..., self.width :] - 0.5).exp()


@pytest.mark.slow
def test_six_latents_with_an_amortised_guide():
    with torch.random.fork_rng():
        encoder = Encoder(5, 6)
    before = [p.detach().clone() for p in encoder.parameters()]

    def guide(x):
        pyro.module("encoder", encoder)
        loc, scale = encoder(x)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    x, program = counts(40, 5, 6), poisson_factors(6)
    settings = {"guide": guide, "predictor": Importance(30), "training": Steps(max_iter=150)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few steps and few draws: neither converged nor beyond doubt
        model, again = (fitted(program, x, **settings) for _ in range(2))
    assert model.log_marginal_likelihood_ == again.log_marginal_likelihood_
    assert all(torch.equal(a, b) for a, b in zip(before, encoder.parameters(), strict=True))
    assert np.mean(model.history_[-20:]) > np.mean(model.history_[:5]) + 0.2
    draw = rng(0).normal(size=(100_000, 6))  # from the prior
    eta = model.params_["bias"] + draw @ model.params_["loading"].T
    rate = np.exp(eta).sum(1)
    truth = [logsumexp(eta @ row - rate) - np.log(len(draw)) - gammaln(row + 1).sum() for row in x]
    assert model.log_marginal_likelihood_ == pytest.approx(
        np.sum(truth), abs=5 * model.log_marginal_likelihood_se_
    )
    assert "Importance: 30 draws of z from the guide" in model.explain()
    assert {"pareto_k", "ess_min"} <= set(model.estimate(x, n_replicates=1).diagnostics)
    copy = cloudpickle.loads(cloudpickle.dumps(model))
    np.testing.assert_array_equal(copy.score_samples(x), model.score_samples(x))


# ------------------------------------------------------------------------------------------------ regressions


class Regression(PyroModule):
    def __init__(self, n_covariates):
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](n_covariates, 1)
        zero = torch.zeros(1, n_covariates, dtype=torch.float64)
        self.linear.weight = PyroSample(dist.Normal(zero, 2.0).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(zero[0, :1], 2.0).to_event(1))
        self.noise = PyroParam(torch.tensor(1.0, dtype=torch.float64), constraint=constraints.positive)

    def forward(self, x, y=None):
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(mean, self.noise), obs=y)


def covariates(n=25, p=2):
    draw = rng(8)
    x = draw.normal(size=(n, p))
    return x, x @ np.array([1.0, -1.5])[:p] + 0.3 + 0.4 * draw.normal(size=n)


@pytest.mark.slow
def test_weights_with_priors_in_a_pyro_module():
    x, y = covariates()
    with torch.random.fork_rng():
        program = Regression(2)
    model = fitted(program, x, y)
    design = np.column_stack([x, np.ones(len(x))])

    def lml(log_noise):
        cov = 4 * design @ design.T + np.exp(2 * log_noise[0]) * np.eye(len(x))
        return np.array([stats.multivariate_normal(np.zeros(len(x)), cov).logpdf(y)])

    found = check_all_methods(model, x, y)
    noise = float(model.params_["noise"])
    assert found.total == pytest.approx(lml([np.log(noise)])[0], abs=1e-9)
    reaches(model, lml, [0.0], x, y)
    assert set(found.integrated) == {"linear.weight", "linear.bias"} and found.point_estimated == ("noise",)
    assert float(program.noise.detach()) == 1.0, "the caller's module is not trained"
    weight = np.linalg.solve(design.T @ design + noise**2 / 4 * np.eye(3), design.T @ y)
    new = rng(2).normal(size=(7, 2))
    np.testing.assert_allclose(model.predict(new), np.column_stack([new, np.ones(7)]) @ weight, atol=1e-10)


def logistic(x, y):
    weight = pyro.sample("weight", dist.Normal(x.new_zeros(x.shape[1]), 2.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=(x * weight).sum(-1)), obs=y)


def logistic_truth(x, y):
    """Evidence, and the weights' posterior on a grid of two."""
    grid = np.linspace(-10, 10, 401)
    weight = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2)
    eta = weight @ x.T
    log_p = (y * eta - np.logaddexp(0, eta)).sum(1) + stats.norm(0, 2).logpdf(weight).sum(1)
    return logsumexp(log_p) + 2 * np.log(grid[1] - grid[0]), weight, np.exp(log_p - logsumexp(log_p))


def logistic_data(n=25):
    x, _ = covariates(n)
    return x, (rng(9).uniform(size=n) < expit(x @ [1.0, -1.5])).astype(float)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("predictor", "n_errors"),
    [("auto", 10), (Quadrature(20), 10), (Importance(200), 3), (SMALL_SMC, 6)],
    ids=repr,
)
def test_logistic_regression_with_priors(predictor, n_errors):
    x, y = logistic_data()
    truth, weight, posterior = logistic_truth(x, y)
    model = fitted(logistic, x, y, predictor=predictor)
    se = model.log_marginal_likelihood_se_
    assert model.log_marginal_likelihood_ == pytest.approx(truth, abs=n_errors * se + 1e-6) and se < 0.5
    new = rng(2).normal(size=(5, 2))
    tolerance = 0.12 if predictor is SMALL_SMC else 0.02
    np.testing.assert_allclose(model.predict(new), posterior @ expit(weight @ new.T), atol=tolerance)
    assert "point-estimated: nothing" in model.explain() and "weight (2 in all)" in model.explain()
    assert model.score_samples(x, y).shape == (1,)


@pytest.mark.parametrize("dtype", [int, bool])
def test_targets_need_not_be_floats(dtype):
    x, y = logistic_data()
    model = fitted(logistic, x, y.astype(dtype))
    assert model.log_marginal_likelihood_ == pytest.approx(logistic_truth(x, y)[0], abs=1e-4)


@pytest.mark.parametrize("kind", ["Poisson", "Categorical", "Normal", "group"])
def test_whole_numbers_as_targets(kind):
    x, _ = covariates()
    y = rng(4).integers(3, size=25)

    def program(x, y):
        shift = param("shift", np.zeros(3))
        with pyro.plate("rows", len(x)):
            if kind == "group":  # an index, and no target
                pyro.sample("x", dist.Normal(shift[y][:, None].expand(-1, 2), 1.0).to_event(1), obs=x)
                return
            token = {
                "Poisson": lambda: dist.Poisson(shift[0].exp().expand(len(x))),
                "Categorical": lambda: dist.Categorical(logits=shift.expand(len(x), 3)),
                "Normal": lambda: dist.Normal(shift[0].expand(len(x)), 1.0),
            }[kind]
            pyro.sample("y", token(), obs=y)

    share = np.bincount(y, minlength=3) / 25
    best = {
        "Poisson": lambda: stats.poisson(y.mean()).logpmf(y).sum(),
        "Categorical": lambda: 25 * (share * np.log(share)).sum(),
        "Normal": lambda: stats.norm(y.mean(), 1).logpdf(y).sum(),
        "group": lambda: sum(stats.norm(x[y == g].mean(), 1).logpdf(x[y == g]).sum() for g in range(3)),
    }[kind]()
    assert fitted(program, x, y).log_marginal_likelihood_ == pytest.approx(best, abs=1e-6)


def test_whole_numbers_may_not_explain_themselves():
    def program(x, y):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Poisson(1.0 + y), obs=y)

    refused(program, X, np.arange(30), match="site 'y' changes with the observed x itself")


def test_missing_targets_are_left_out():
    x, y = logistic_data()
    truth = logistic_truth(x[3:], y[3:])[0]
    y[:3] = np.nan
    assert fitted(logistic, x, y).log_marginal_likelihood_ == pytest.approx(truth, abs=1e-4)


@pytest.mark.slow
def test_automatic_guide():
    x, y = logistic_data()
    with torch.random.fork_rng():
        guide = AutoNormal(logistic)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # few steps
        model = fitted(logistic, x, y, guide=guide, training=Steps(max_iter=200))
    assert model.predictor_.name == "Importance"
    assert model.log_marginal_likelihood_ == pytest.approx(logistic_truth(x, y)[0], abs=0.3)


def random_intercepts(x, y):
    group = x[:, 1].long()
    spread, noise = param("spread", 1.0, constraints.positive), param("noise", 1.0, constraints.positive)
    slope = param("slope", [0.0, 0.0])
    with pyro.plate("groups", 4):
        a = pyro.sample("a", dist.Normal(x.new_zeros(()), spread))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(slope[0] + slope[1] * x[:, 0] + a[..., group], noise), obs=y)


def test_random_intercepts_by_an_integer_column():
    draw = rng(2)
    group, u = draw.integers(4, size=40), draw.normal(size=40)
    x, y = np.column_stack([u, group]), 1 + 0.5 * u + draw.normal(size=4)[group] + 0.6 * draw.normal(size=40)
    model = fitted(random_intercepts, x, y)
    indicator = np.eye(4)[group]

    def lml(t):
        cov = np.exp(2 * t[0]) * indicator @ indicator.T + np.exp(2 * t[1]) * np.eye(40)
        return np.array([stats.multivariate_normal(t[2] + t[3] * u, cov).logpdf(y)])

    p = model.params_
    found = check_all_methods(model, x, y)
    assert found.total == pytest.approx(lml(np.r_[np.log(p["spread"]), np.log(p["noise"]), p["slope"]])[0])
    reaches(model, lml, np.zeros(4), x, y)
    assert "a (4 in all)" in model.explain()


def extra_arguments(x, y, **settings):
    slope, noise = param("slope", np.zeros(2)), param("noise", 1.0, constraints.positive)
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ slope, noise), obs=y)


def keyword_only(x, y=None, *, power=1.0):
    return extra_arguments(x, y)


@pytest.mark.parametrize("program", [extra_arguments, keyword_only])
def test_programs_with_further_arguments(program):
    x, y = covariates()
    model = fitted(program, x, y)
    best = np.linalg.lstsq(x, y, rcond=None)[0]
    np.testing.assert_allclose(model.params_["slope"], best, atol=1e-4)
    np.testing.assert_allclose(model.predict(x), x @ best, atol=1e-3)
    sd = np.sqrt(np.square(y - x @ best).mean())
    assert model.log_marginal_likelihood_ == pytest.approx(stats.norm(x @ best, sd).logpdf(y).sum(), abs=1e-5)


def matmul(x, y):
    weight = pyro.sample("weight", dist.Normal(x.new_zeros(x.shape[1]), 2.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ weight), obs=y)


def branching(x, y):
    weight = pyro.sample("weight", dist.Normal(x.new_zeros(x.shape[1]), 2.0).to_event(1))
    sign = 1.0 if bool((weight == weight).all()) else -1.0
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=sign * x @ weight), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize("predictor", [Quadrature(20), Importance(100), SMALL_SMC], ids=repr)
def test_programs_for_one_node_at_a_time_run_on_many(predictor):
    """``x @ w`` does not broadcast over leading batch dimensions; torch.vmap runs it, to the same numbers."""
    x, y = logistic_data()
    model = fitted(matmul, x, y, predictor=predictor)
    assert "node by node" not in model.explain() and "draw by draw" not in model.explain()
    if predictor is SMALL_SMC:
        truth, weight, posterior = logistic_truth(x, y)
        assert model.log_marginal_likelihood_ == pytest.approx(
            truth, abs=6 * model.log_marginal_likelihood_se_
        )
        np.testing.assert_allclose(model.predict(x), posterior @ expit(weight @ x.T), atol=0.12)
        return
    other = fitted(logistic, x, y, predictor=predictor)
    if isinstance(predictor, Importance):  # the draws of the prior are others from either program
        one, two = model.log_marginal_likelihood_se_, other.log_marginal_likelihood_se_
        assert 0.005 < min(one, two) and max(one, two) < 0.1
        gap = abs(model.log_marginal_likelihood_ - other.log_marginal_likelihood_)
        assert gap < 3 * np.hypot(one, two)
        np.testing.assert_allclose(model.predict(x), other.predict(x), atol=0.03)
        return
    assert model.log_marginal_likelihood_ == pytest.approx(other.log_marginal_likelihood_, abs=1e-10)
    np.testing.assert_allclose(model.predict(x), other.predict(x), atol=1e-10)
    assert model.estimate(x, y, n_replicates=1).by_size.mean == pytest.approx(
        other.estimate(x, y, n_replicates=1).by_size.mean, abs=1e-10
    )


def test_an_axis_left_of_the_nodes_is_not_repeated_for_each_of_them():
    """``w[..., None, :]`` of nodes (S, 1, K) gives (S, 1, N): on a plate of S nodes Pyro repeats it S times."""

    def program(x, y):
        w = pyro.sample("w", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=(x * w[..., None, :]).sum(-1)), obs=y)

    x, y = map(tensor, logistic_data())
    nodes = AdaptiveNodes(program, Args((x, y)), one_vector(analyze(program, (x, y))))
    assert nodes.batched is Batched.VMAP
    u = tensor(rng().normal(size=(500, 1, x.shape[1]))).requires_grad_()
    given, part, _ = nodes.at(Args((x, y)), u)
    (tokens,) = given.first.tokens
    assert tokens.log_prob.shape == (500, len(x))
    seen = torch.ones(1, len(x), dtype=torch.bool)
    logits = x @ u[:, 0].mT
    want = (y[:, None] * logits - torch.nn.functional.softplus(logits)).sum(0)
    want = want + dist.Normal(0.0, 1.0).log_prob(u[:, 0]).sum(1)
    torch.testing.assert_close((given.log_joint(y[None], seen) + part)[:, 0], want)


def test_codes_of_a_program_for_one_node_at_a_time():
    draw = rng(7)
    x = draw.integers(3, size=(20, 4)).astype(float)

    def program(x):
        level = tensor(rng(1).normal(size=(4, 3)))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Categorical(logits=level * z[:, None, None]).to_event(1), obs=x)

    def left(x):
        level = tensor(rng(1).normal(size=(4, 3)))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Categorical(logits=level * z[..., None, None]).to_event(1), obs=x)

    one, other = (fitted(f, x, predictor=Quadrature(24)) for f in (program, left))
    assert "node by node" not in one.explain()
    np.testing.assert_allclose(one.score_samples(x), other.score_samples(x), atol=1e-8)
    gaps = with_holes(x, 0.1)
    np.testing.assert_array_equal(one.impute(gaps), other.impute(gaps))


def test_programs_that_cannot_run_on_many_nodes_say_so():
    x, y = logistic_data()
    with pytest.warns(UserWarning, match=r"not run on several nodes at once.*weight.*\(x \* w\)\.sum\(-1\)"):
        model = fitted(branching, x, y, predictor=Quadrature(8))
    other = fitted(logistic, x, y, predictor=Quadrature(8))
    assert "node by node" in model.explain() and "node by node" not in other.explain()
    assert model.log_marginal_likelihood_ == pytest.approx(other.log_marginal_likelihood_, abs=1e-10)


def test_automatic_guide_of_a_program_for_one_draw_at_a_time():
    x, y = logistic_data()
    found = []
    for program in (matmul, logistic):
        with torch.random.fork_rng():
            guide = AutoNormal(program)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few steps, and a guide that is no good yet
            found.append(fitted(program, x, y, guide=guide, training=Steps(max_iter=20)))
    assert "draw by draw" not in found[0].explain()
    assert found[0].log_marginal_likelihood_ == pytest.approx(found[1].log_marginal_likelihood_, abs=1e-8)


def test_targets_of_another_length_or_none():
    x, y = covariates()
    refused(extra_arguments, x, y[:5], match="y must have a row for each of the 25 rows of X, got 5")
    refused(extra_arguments, x, match="the program extra_arguments takes a second argument: pass y")


# --------------------------------------------------------------------------------------- shapes and transformations

X = rng(0).normal(size=(30, 4)) + np.arange(1, 5)


def coin_mixture(x, event=(4,), value=lambda x: x):
    """N(loc + c, 1) with a fair coin c."""
    loc = param("loc", np.zeros(event))
    with pyro.plate("rows", len(x)):
        c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.5)))
        mean = loc + c[(...,) + (None,) * len(event)]
        pyro.sample("x", dist.Normal(mean, 1.0).to_event(len(event)), obs=value(x))


def coin_lml(loc, x):
    token = [stats.norm(loc + c, 1.0).logpdf(x) for c in (0, 1)]
    return logsumexp([np.where(np.isnan(x), 0.0, t).sum(-1) for t in token], axis=0) - np.log(2)


def test_rows_that_are_images():
    model = fitted(lambda x: coin_mixture(x, (2, 2), lambda x: x.reshape(-1, 2, 2)), X)
    np.testing.assert_allclose(model.score_samples(X), coin_lml(model.params_["loc"].ravel(), X), atol=1e-10)
    gaps = with_holes(X, 0.1)
    np.testing.assert_array_equal(model.impute(gaps)[~np.isnan(gaps)], X[~np.isnan(gaps)])


def test_a_plate_of_columns():
    def program(x):
        loc = param("loc", np.zeros(4))
        with pyro.plate("rows", len(x), dim=-2):
            c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.5)))
            with pyro.plate("columns", x.shape[1], dim=-1):
                pyro.sample("x", dist.Normal(loc + c, 1.0), obs=x)

    model = fitted(program, X)
    np.testing.assert_allclose(model.score_samples(X), coin_lml(model.params_["loc"], X), atol=1e-10)


@pytest.mark.parametrize("value", [torch.log, lambda x: 2 * x], ids=["log", "twice"])
def test_transformed_values_are_scored_as_observed(value):
    x = with_holes(np.exp(0.3 * X), 0.1)
    model = fitted(lambda x: coin_mixture(x, (4,), value), x)
    seen = value(tensor(x)).numpy()
    np.testing.assert_allclose(model.score_samples(x), coin_lml(model.params_["loc"], seen), atol=1e-10)


def test_impute_refuses_transformed_values():
    x = with_holes(np.exp(0.3 * X), 0.1)
    model = fitted(lambda x: coin_mixture(x, (4,), torch.log), x)
    with pytest.raises(ValueError, match="not every token of site 'x' is one of them.*transformed"):
        model.impute(x)


def backwards_sites(x):
    loc = param("loc", [0.0, 0.0])
    with pyro.plate("rows", len(x)):
        c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.5)))
        pyro.sample("second", dist.Normal(loc[1] + 2 * c, 1.0), obs=x[:, 1])
        pyro.sample("first", dist.Normal(loc[0] - 3 * c, 1.0), obs=x[:, 0])


def backwards_columns(x):
    loc, coin = param("loc", [0.0, 0.0]), x.new_tensor([2.0, -3.0])
    with pyro.plate("rows", len(x)):
        c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.5)))
        pyro.sample("x", dist.Normal(loc.flip(0) + coin * c[..., None], 1.0).to_event(1), obs=x[:, [1, 0]])


def backwards_linear(x):
    loc = param("loc", [0.0, 0.0])
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(loc.flip(0) + z[..., None], 1.0).to_event(1), obs=x[:, [1, 0]])


@pytest.mark.parametrize("program", [backwards_sites, backwards_columns, backwards_linear])
def test_impute_keeps_the_order_of_columns(program):
    x = with_holes(X[:, :2], 0.1)
    model = fitted(program, x)
    filled = model.impute(x)
    np.testing.assert_array_equal(filled[~np.isnan(x)], x[~np.isnan(x)])
    loc = model.params_["loc"]
    for n, t in np.argwhere(np.isnan(x) & ~np.isnan(x[:, ::-1])):
        seen = x[n, 1 - t] - loc[1 - t]
        if program is backwards_linear:
            want = loc[t] + seen / 2
        else:
            step = np.array([-3.0, 2.0])
            chance = expit(stats.norm.logpdf(seen - step[1 - t]) - stats.norm.logpdf(seen))
            want = loc[t] + step[t] * chance
        assert filled[n, t] == pytest.approx(want, abs=1e-9)


def test_impute_beside_a_column_that_is_an_index():
    """Groups stand in the first column of X, which is no token; the third is observed before the second."""

    def program(x):
        level = param("level", np.zeros((2, 2)))[x[:, 0].long()]
        with pyro.plate("rows", len(x)):
            c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.5)))
            pyro.sample("x", dist.Normal(level + c[..., None], 1.0).to_event(1), obs=x[:, [2, 1]])

    x = np.column_stack([np.arange(30) % 2, with_holes(X[:, :2], 0.1)])
    filled = fitted(program, x).impute(x)
    np.testing.assert_array_equal(filled[~np.isnan(x)], x[~np.isnan(x)])
    assert np.isfinite(filled).all()


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_units_do_not_matter(scale):
    def program(x):
        loc = pyro.param("loc", lambda: x.mean(0) + x.std(0) * tensor([[-1.0], [1.0]]))
        spread = pyro.param("spread", lambda: x.std(0).clone(), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            c = pyro.sample("c", dist.Categorical(x.new_tensor([0.5, 0.5])))
            pyro.sample("x", dist.Normal(loc[c], spread).to_event(1), obs=x)

    score = fitted(program, scale * X).score(scale * X) + 4 * np.log(scale)
    assert score == pytest.approx(fitted(program, X).score(X), abs=1e-6)


@pytest.mark.parametrize("gaps", [0.0, 0.1])
def test_no_latents_and_no_normal_tokens(gaps):
    def program(x):
        rate = param("rate", np.ones(3), constraints.positive)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)

    x = with_holes(counts(), gaps)
    model = fitted(program, x)
    best = np.nanmean(x, 0)
    np.testing.assert_allclose(model.params_["rate"], best, rtol=1e-4)
    truth = np.nansum(stats.poisson(best).logpmf(np.nan_to_num(x)) * ~np.isnan(x))
    assert model.log_marginal_likelihood_ == pytest.approx(truth)


@pytest.mark.parametrize("how", ["mask", "offset"])
def test_what_the_first_rows_do_not_show(how):
    """A linear-Gaussian program in which rows from the twentieth on differ."""

    def program(x):
        loc, late = param("loc", np.zeros(4)), torch.arange(len(x)) >= 20
        if how == "offset":
            loc = loc + 5.0 * late[:, None]
        with pyro.plate("rows", len(x)), poutine.mask(mask=~late if how == "mask" else True):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    try:
        model = fitted(program, X)
    except ValueError:
        return  # a refusal is as good
    want = X[:20].mean(0) if how == "mask" else X.mean(0) - 5 / 3
    np.testing.assert_allclose(model.params_["loc"], want, atol=1e-4)


@pytest.mark.parametrize(
    "rows",
    [
        slice(20),
        slice(20, None),
    ],
    ids=["shown", "masked"],
)
def test_masked_rows(rows):
    def program(x):
        with poutine.mask(mask=torch.arange(len(x)) < 20):
            coin_mixture(x)

    model = fitted(program, X)
    truth = coin_lml(model.params_["loc"], np.where(np.arange(30)[:, None] < 20, X, np.nan)) * (
        np.arange(30) < 20
    )
    np.testing.assert_allclose(model.score_samples(X)[rows], truth[rows], atol=1e-9)


@pytest.mark.parametrize("latent", [False, True])
def test_masked_columns(latent):
    keep = torch.tensor([True, True, False, True])

    def program(x):
        loc = torch.nn.functional.pad(param("loc", np.zeros(2)), (0, 2))
        with pyro.plate("rows", len(x)):
            if latent:
                loc = loc + pyro.sample("c", dist.Bernoulli(x.new_tensor(0.5)))[..., None]
            pyro.sample("x", dist.Normal(loc, 1.0).mask(keep).to_event(1), obs=x)

    model = fitted(program, X)
    loc, x = np.r_[model.params_["loc"], 0, 0], np.where(keep.numpy(), X, np.nan)
    truth = coin_lml(loc, x) if latent else np.nansum(stats.norm(loc, 1).logpdf(x), 1)
    np.testing.assert_allclose(model.score_samples(X), truth, atol=1e-10)


# ------------------------------------------------------------------------------------------------- refusals


def student(x, loc=0.0):
    """Not linear-Gaussian: one latent a row, by quadrature."""
    shift = param("shift", np.zeros(x.shape[1]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.StudentT(5.0, shift + loc + z[..., None], 1.0).to_event(1), obs=x)


def linear(x, loc=0.0):
    shift = param("shift", np.zeros(x.shape[1]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(shift + loc + z[..., None], 1.0).to_event(1), obs=x)


def coin(x, loc=0.0):
    shift = param("shift", np.zeros(x.shape[1]))
    with pyro.plate("rows", len(x)):
        c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.5)))
        pyro.sample("x", dist.Normal(shift + loc + c[..., None], 1.0).to_event(1), obs=x)


KINDS = pytest.mark.parametrize("program", [linear, coin, student])


@KINDS
def test_statistics_of_x_are_refused(program):
    refused(lambda x: program(x, x.mean(0)), X, match="site 'x'")


def coin_by_x(x):
    with pyro.plate("rows", len(x)):
        c = pyro.sample("c", dist.Bernoulli(logits=x[:, 0]))
        pyro.sample("x", dist.Normal(param("loc", np.zeros(4)) + c[..., None], 1.0).to_event(1), obs=x)


def normal_by_x(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x[:, 0], 1.0))
        pyro.sample("x", dist.Normal(param("loc", np.zeros(4)) + z[..., None], 1.0).to_event(1), obs=x)


def student_by_x(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.mean(), 1.0))
        pyro.sample("x", dist.StudentT(5.0, param("loc", np.zeros(4)) + z[..., None], 1.0).to_event(1), obs=x)


@pytest.mark.parametrize(
    "program",
    [
        coin_by_x,
        student_by_x,
        normal_by_x,
    ],
)
def test_latents_that_look_at_x_are_refused(program):
    refused(program, X, match="site '[cz]'")


@pytest.mark.parametrize("program", [coin, student])
def test_networks_that_pyro_does_not_know_are_refused(program):
    with torch.random.fork_rng():
        network = torch.nn.Linear(1, 4).double()
    refused(lambda x: program(x, network(x.new_ones(1))), X, match=r"shape \(4(, 1)?,?\).*pyro.module")

    def registered(x):
        pyro.module("network", network)
        coin(x, network(x.new_ones(1)))

    if program is coin:
        model = fitted(registered, X)
        assert "network$$$weight" in model.params_


@KINDS
@pytest.mark.parametrize("settings", [{}, {"masks": UniformSize(2)}], ids=["exact", "masks"])
def test_parameters_that_touch_nothing_are_named(program, settings):
    def useless(x):
        param("idle", 0.0)
        program(x)

    refused(useless, X, match="parameter 'idle' has no effect on the score", **settings)
    detached = lambda x: program(x, param("idle", 0.0).detach())  # noqa: E731
    refused(detached, X, match="parameter 'idle' has no effect on the score", **settings)


def test_parameters_of_a_guide_that_touch_nothing_are_named():
    def guide(x):
        param("idle", 0.0)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(param("m", 0.0), 1.0))

    refused(student, X, match="parameter 'idle' has no effect", guide=guide, predictor=Importance(5))


@KINDS
@pytest.mark.parametrize(
    "settings", [{"subsample_size": 10}, {"subsample": torch.arange(10)}], ids=["size", "set"]
)
def test_sub_sampling_is_refused_with_the_name_of_the_plate(program, settings):
    def minibatch(x):
        with pyro.plate("patients", len(x), **settings) as i:
            shift = param("shift", np.zeros(4))
            if program is coin:
                shift = shift + pyro.sample("c", dist.Bernoulli(x.new_tensor(0.5)))[..., None]
            else:
                shift = shift + pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))[..., None]
            token = dist.StudentT(5.0, shift, 1.0) if program is student else dist.Normal(shift, 1.0)
            pyro.sample("x", token.to_event(1), obs=x[i])

    refused(minibatch, X, match=r"plate 'patients' sub-samples its rows \(scale 3\)")


def test_one_site_of_another_scale_is_refused():
    def program(x):
        with pyro.plate("rows", len(x)):
            with poutine.scale(scale=0.1):
                c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.5)))
            pyro.sample("x", dist.Normal(c[..., None].expand(*c.shape, 4), 1.0).to_event(1), obs=x)

    refused(program, X, match="sites have different scales.*'c': 0.1")


def test_a_scale_around_the_whole_program_is_named_as_such():
    refused(lambda x: poutine.scale(coin, scale=0.1)(x), X, match=r"poutine\.scale")


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("outside", [False, True])
def test_single_precision(program, outside):
    """As most Pyro programs are written: torch.zeros(4), inside the program or before it."""
    constants = torch.zeros(4), torch.tensor(0.5), torch.tensor(1.0)

    def single(x):
        zeros, half, one = constants if outside else (torch.zeros(4), torch.tensor(0.5), torch.tensor(1.0))
        shift = pyro.param("shift", zeros)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(half) if program is coin else dist.Normal(0 * one, 1.0))
            loc = shift + z[..., None]
            token = dist.StudentT(5.0, loc, one) if program is student else dist.Normal(loc, one)
            pyro.sample("x", token.to_event(1), obs=x)

    model, double = fitted(single, X), fitted(program, X)
    assert model.params_["shift"].dtype == np.float64
    same = 1e-5 if outside else 1e-9  # log(0.5) has only seven digits there
    assert model.log_marginal_likelihood_ == pytest.approx(double.log_marginal_likelihood_, abs=same)
    assert torch.get_default_dtype() == torch.float32


def test_modules_in_single_precision():
    class Single(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[torch.nn.Linear](2, 1)
            self.linear.weight = PyroSample(dist.Normal(torch.zeros(1, 2), 2.0).to_event(2))
            self.noise = PyroParam(torch.tensor(0.7), constraint=constraints.positive)

        def forward(self, x, y=None):
            mean = self.linear(x).squeeze(-1)
            with pyro.plate("rows", len(x)):
                return pyro.sample("y", dist.Normal(mean, self.noise), obs=y)

    x, y = covariates()
    with torch.random.fork_rng():
        program = Single()
    model = fitted(program, x, y)
    noise, bias = float(model.params_["noise"]), float(model.params_["linear.bias"][0])
    truth = stats.multivariate_normal(np.full(25, bias), 4 * x @ x.T + noise**2 * np.eye(25)).logpdf(y)
    assert model.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-9)
    assert program.linear.bias.dtype == torch.float32, "the caller's module is not touched"


def test_constants_in_single_precision_are_named():
    with torch.random.fork_rng():
        network = torch.nn.Linear(2, 1)

    def constant(x, y):
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(weight * (x @ network.weight[0].detach()), 1.0), obs=y)

    refused(constant, *covariates(), match=r"mixes precisions after site 'weight'.*dtype=x.dtype")


@KINDS
def test_deterministic_sites_are_no_tokens(program):
    def noted(x):
        pyro.deterministic("double", 2 * x)
        program(x)

    model = fitted(noted, X)
    assert "double" not in model.explain()
    assert model.log_marginal_likelihood_ == pytest.approx(
        fitted(program, X).log_marginal_likelihood_, abs=1e-9
    )


def two_students(x, second="w", where=1.0):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0)) + pyro.sample(second, dist.Normal(0.0, 1.0))
        loc = (z[..., None] / where).expand(*z.shape, x.shape[1])
        pyro.sample("x", dist.StudentT(5.0, loc, 1.0).to_event(1), obs=x)


def wide_guide(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("w", dist.Normal(0.0, 1.0))


def half_a_guide(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def four_large_codes(x):
    with pyro.plate("rows", len(x)):
        code = [pyro.sample(f"c{i}", dist.Categorical(torch.ones(4000))) for i in range(4)]
        shift = (code[0] + code[1] + code[2] + code[3])[..., None].double()
        pyro.sample("x", dist.Normal(shift.expand(*shift.shape[:-1], 4), 1.0).to_event(1), obs=x)


def never_observed(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.StudentT(5.0, 0.0, 1.0))
        if bool((z > 0).all()):
            pyro.sample("x", dist.Normal(z[..., None].expand(len(x), 4), 1.0).to_event(1), obs=x)


def axes_without_a_plate(x):
    z = pyro.sample("z", dist.StudentT(5.0, x.new_zeros(len(x)), 1.0))
    pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 4), 1.0).to_event(2), obs=x)


def columns_only(x):
    with pyro.plate("columns", x.shape[1]):
        z = pyro.sample("z", dist.StudentT(5.0, 0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, len(x)), 1.0).to_event(1), obs=x.mT)


def too_large_a_plate(x):
    with pyro.plate("rows", len(x) + 1):
        pyro.sample("x", dist.Normal(x.new_zeros(4), 1.0).to_event(1), obs=x)


def no_event(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(param("loc", np.zeros(4)), 1.0), obs=x)


def negative_gamma(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Gamma(param("a", np.ones(4), constraints.positive), 1.0).to_event(1), obs=x)


def impossible(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        rate = (z - 50).clamp(min=0)[..., None].expand(*z.shape, 4)
        pyro.sample("x", dist.Exponential(rate, validate_args=False).to_event(1), obs=x.abs())


def certain(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Delta(x.new_ones(())))
        pyro.sample("x", dist.StudentT(5.0, z[..., None].expand(*z.shape, 4), 1.0).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("program", "settings", "match"),
    [
        (two_students, {"guide": half_a_guide}, r"no site for latent 'w'.*add pyro.sample\('w'"),
        (two_students, {"guide": wide_guide}, r"guide draws latent 'z' with shape \(30, 2\).*shape \(30,\)"),
        (lambda x: two_students(x, where=0.0), {}, r"a distribution after site 'w'.*loc.*StudentT"),
        (four_large_codes, {}, r"summing out \['c0', 'c1', 'c2', 'c3'\].*more memory.*markov"),
        (never_observed, {}, r"one observed site, got none \(it reached \['rows', 'z'\]\)"),
        (axes_without_a_plate, {}, r"site 'z' has an axis of size 30.*pyro.plate.*to_event"),
        (
            columns_only,
            {},
            r"no plate of the 30 rows.*plate 'columns' has 4.*pyro.plate\(\"rows\", len\(x\)\)",
        ),
        (too_large_a_plate, {}, r"site 'x' has values of shape \(30, 4\).*\(31, 4\).*len\(x\)"),
        (no_event, {}, r"at site x dim -1, 30 vs 4: append .to_event\(1\)"),
        (negative_gamma, {}, r"site 'x' has values outside the support of its Gamma, such as -"),
        (
            impossible,
            {"predictor": Importance(5)},
            r"is -inf.*density 0 at every draw.*log-density of site 'x' is -inf",
        ),
        (certain, {}, r"latent 'z' is a Delta.*deterministic"),
    ],
)
def test_errors_name_the_site_and_what_to_do(program, settings, match):
    refused(program, X, match=match, **settings)


def test_sites_that_come_and_go_are_named():
    runs = []

    def renamed(x):
        runs.append(1)
        two_students(x, "w" if len(runs) % 2 else "v")

    refused(renamed, X, match="site '[vw]' was there when the program was first run, and is not now.*'[vw]'")


@pytest.mark.usefixtures("own_store")
@pytest.mark.parametrize("latent", ["event", "plate"])
def test_numbers_of_rows_that_change_without_a_rows_plate(latent):
    def program(x):
        if latent == "event":
            z = pyro.sample("z", dist.StudentT(5.0, x.new_zeros(len(x)), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 4), 1.0).to_event(2), obs=x)
        else:
            z = pyro.sample("z", dist.StudentT(5.0, 0.0, 1.0))
            with pyro.plate("rows", len(x)):
                pyro.sample("x", dist.Normal(z[..., None].expand(len(x), 4), 1.0).to_event(1), obs=x)

    loss = CumulativeMaskedScore(predictor=Importance(5), random_state=0)
    loss.loss(program, None, tensor(X))
    with pytest.raises(ValueError, match=r"site '[xz]' had shape \(30.*first run and has \(5"):
        loss.loss(program, None, tensor(X[:5]))


@pytest.mark.slow
def test_coarse_quadrature_is_named_by_the_warning():
    with pytest.warns(
        ConvergenceWarning, match="the score is not smooth.*2 Gauss-Hermite nodes.*larger n_nodes"
    ):
        fitted(poisson_factors(1), counts(), predictor=Quadrature(2))


@KINDS
def test_wrong_predictors(program):
    refused(program, X, match="'predictor' parameter of BayesMPT must be", predictor="nonsense")
    refused(program, X, match="'predictor' parameter of BayesMPT must be", predictor=Exact)
    if program is student:
        refused(program, X, match="'z'.*cannot be integrated exactly.*Quadrature", predictor=Exact())
    if program is coin:
        for predictor in (Quadrature(), Importance()):
            refused(program, X, match="no continuous latent.*Exact", predictor=predictor)
    else:
        refused(program, X, match="inside the rows plate 'rows'", predictor=SequentialMonteCarlo())


@pytest.mark.parametrize(
    ("predictor", "training"), [(Quadrature(8), Ascent(10)), (Importance(20), Steps(max_iter=10))], ids=repr
)
def test_nodes_where_none_are_needed(predictor, training):
    """The program is linear-Gaussian: a closed form would do, nodes do too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # few steps: the score is what is tested
        model = fitted(linear, X, predictor=predictor, training=training)
    truth = stats.multivariate_normal(model.params_["shift"], np.eye(4) + 1).logpdf(X)
    atol = 1e-8 if isinstance(predictor, Quadrature) else 0.4
    np.testing.assert_allclose(model.score_samples(X), truth, atol=atol)


def test_guide_of_another_program():
    def other(x):
        pyro.sample("q", dist.Normal(0.0, 1.0))

    refused(student, X, match="no site for latent 'z'.*'q'", guide=other)

    def wide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("q", dist.Normal(x.new_zeros(()), 1.0))

    refused(student, X, match="guide samples 'q', which the program does not have", guide=wide)


def test_guide_that_misses_half_of_the_support():
    def positive(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Exponential(x.new_tensor(1.0)))

    x = X - X.mean(0)

    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 4), 1.0).to_event(1), obs=x)

    refused(program, x, match="'z'.*support", guide=positive, predictor=Importance(100))


def mixture_of_regressions(start):
    def program(x, y):
        slope = param("slope", np.full(2, start))
        with pyro.plate("rows", len(x)):
            c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.5)))
            pyro.sample("y", dist.Normal(x @ slope + 2 * c, 1.0), obs=y)

    return program


def mixed_by_covariates(x, y):
    with pyro.plate("rows", len(x)):
        c = pyro.sample("c", dist.Bernoulli(logits=x @ param("slope", np.full(2, 0.5))))
        pyro.sample("y", dist.Normal(2 * c, 1.0), obs=y)


ZERO_SLOPE = pytest.param(
    mixture_of_regressions(0.0),
    id="zero slope",
)


@pytest.mark.parametrize(
    "program", [extra_arguments, mixture_of_regressions(0.5), ZERO_SLOPE, mixed_by_covariates]
)
def test_missing_covariates_are_refused(program):
    x, y = covariates()
    x[0, 0] = np.nan
    refused(program, x, y, match="covariates must be complete")


# --------------------------------------------------------------------------------------------- search, compare


def two_blobs():
    draw = rng(1)
    return np.concatenate([draw.normal(size=(25, 2)) - 3, draw.normal(size=(30, 2)) + np.array([3, 0])])


@pytest.mark.slow
def test_search_over_components_and_over_programs():
    x = two_blobs()
    grid = {"model__n_components": [1, 2, 3]}
    search = MarginalLikelihoodSearch(
        BayesMPT(GaussianMixture(1, "diag"), random_state=0), grid, evidence=Auto(cv=3), random_state=0
    )
    search.fit(x)
    assert search.best_params_ == {"model__n_components": 2} and search.evidence_ == "heldout"
    programs = {"model": [GaussianMixture(2, "diag"), PPCA(1), coin]}
    search = MarginalLikelihoodSearch(
        BayesMPT(random_state=0), programs, evidence=Auto(cv=3), random_state=0
    ).fit(x)
    assert search.comparison_.index[0] == "GaussianMixture" and "coin" in search.comparison_.index
    assert (search.comparison_["lml_diff"] <= 0).all()
    models = {
        "two": fitted(GaussianMixture(2, "diag"), x),
        "coin": fitted(coin, x),
        "ppca": BayesMPT(PPCA(1)).fit(x),
    }
    table = compare(models, x, evidence="train")
    assert table.index[0] == "two"
    for name, model in models.items():
        assert table.loc[name, "lml"] == pytest.approx(model.log_marginal_likelihood_)


@pytest.mark.slow
def test_search_over_classes_of_codes():
    search = MarginalLikelihoodSearch(
        BayesMPT(LatentClass(1, 3), random_state=0),
        {"model__n_classes": [1, 2]},
        evidence=Auto(cv=2),
        random_state=0,
    ).fit(codes(40, gaps=0.05))
    assert np.isfinite(search.comparison_["lml"]).all()


def test_bayes_factor_of_two_regressions():
    x, y = logistic_data()

    def first_only(x, y):
        logistic(x[:, :1], y)

    search = MarginalLikelihoodSearch(BayesMPT(random_state=0), {"model": [first_only, logistic]}).fit(x, y)
    assert search.evidence_ == "train" and "nothing is point-estimated" in search.evidence_reason_
    grid = np.linspace(-12, 12, 2001)
    eta = np.outer(grid, x[:, 0])
    one = (y * eta - np.logaddexp(0, eta)).sum(1) + stats.norm(0, 2).logpdf(grid)
    one = logsumexp(one) + np.log(grid[1] - grid[0])
    two = logistic_truth(x, y)[0]
    table = search.comparison_
    assert table.loc["first_only", "lml"] == pytest.approx(one, abs=1e-4)
    assert table.loc["logistic", "lml"] == pytest.approx(two, abs=1e-4)
    assert table.loc["first_only", "weight"] == pytest.approx(expit(one - two), abs=1e-4)


# ------------------------------------------------------------------------------------- the loss, in Pyro's own hands


@pytest.mark.usefixtures("own_store")
def test_loss_is_the_negative_joint():
    for predictor in ("auto", Exact()):
        loss = CumulativeMaskedScore(PermutationChain(3), predictor, random_state=0)
        x = with_holes(X, 0.1)
        assert loss.loss(coin, None, tensor(x)) == pytest.approx(-coin_lml(np.zeros(4), x).sum(), rel=1e-12)
    module = CumulativeMaskedScore(predictor=Exact())(coin, None, tensor(X))
    optimiser = torch.optim.LBFGS(module.parameters(), max_iter=50)

    def closure():
        optimiser.zero_grad()
        loss = module(tensor(X))
        loss.backward()
        return loss

    optimiser.step(closure)
    assert float(module(tensor(X)).detach()) == pytest.approx(
        -fitted(coin, X).log_marginal_likelihood_, abs=1e-4
    )


def two_of_four(by_row):
    """Losses that a sub-sample of two rows in four can have."""
    return np.array([2 * (by_row[a] + by_row[b]) for a in range(4) for b in range(a)])


@pytest.mark.usefixtures("own_store")
@pytest.mark.parametrize(
    "gaps",
    [
        False,
        True,
    ],
)
def test_minibatches_of_svi_are_scaled_up(gaps):
    x = X[:4].copy()
    if gaps:
        x[[0, 1], 1:] = np.nan

    def program(x):
        with pyro.plate("rows", len(x), subsample_size=2) as i:
            c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.5)))
            pyro.sample("x", dist.Normal(c[..., None].expand(*c.shape, 4), 1.0).to_event(1), obs=x[i])

    loss, possible = CumulativeMaskedScore(random_state=0), two_of_four(-coin_lml(np.zeros(4), x))
    for _ in range(12):
        assert np.abs(possible - loss.loss(program, None, tensor(x))).min() < 1e-9


@pytest.mark.usefixtures("own_store")
@pytest.mark.parametrize("predictor", [Importance(5), Quadrature(16)], ids=repr)
def test_minibatches_see_the_rows_that_the_guide_saw(predictor):
    """Two of four rows: the loss is one of six numbers, with an exact guide as with nodes around the mode."""
    placed = isinstance(predictor, Quadrature)
    x = np.array([[-6.0], [-2.0], [2.0], [7.0]]) + np.zeros(3)

    def program(x):
        with pyro.plate("rows", len(x), subsample_size=2) as i:
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            mean = z[..., None].expand(*z.shape, 3)
            token = dist.StudentT(30.0, mean, 1.0) if placed else dist.Normal(mean, 1.0)
            pyro.sample("x", token.to_event(1), obs=x[i])

    def guide(x):
        with pyro.plate("rows", len(x), subsample_size=2) as i:
            pyro.sample("z", dist.Normal(x[i].sum(-1) / 4, 0.5))

    given = stats.t(30, loc=NORMAL_GRID[:, None]) if placed else stats.norm(NORMAL_GRID[:, None])
    by_row = -logsumexp(given.logpdf(x[:, None]).sum(-1) + LOG_NORMAL_GRID, axis=1)
    possible = two_of_four(by_row)
    loss = CumulativeMaskedScore(predictor=predictor, random_state=0)
    for _ in range(4):
        got = loss.loss(program, None if placed else guide, tensor(x))
        assert np.abs(possible - got).min() < 1e-2


@pytest.mark.slow
@pytest.mark.usefixtures("own_store")
def test_svi_with_a_guide_raises_the_heldout_likelihood():
    draw = rng(9)
    x = 1 + draw.normal(size=(120, 1)) * [1.5, 1, -1, 0.5] + draw.standard_t(5, size=(120, 4))
    train, new = x[:60], x[60:]

    def program(x):
        loc, loading = param("loc", np.zeros(4)), param("loading", np.full(4, 0.1))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.StudentT(5.0, loc + loading * z[..., None], 1.0).to_event(1), obs=x)

    def guide(x):
        mean = (x - param("centre", np.zeros(4))) @ param("slope", np.full(4, 0.1))
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(mean, param("spread", 1.0, constraints.positive)))

    def heldout():
        loc, loading = (pyro.param(n).detach().numpy() for n in ("loc", "loading"))
        token = stats.t(5, loc=loc + loading * NORMAL_GRID[::5, None]).logpdf(new[:, None]).sum(-1)
        return logsumexp(token + LOG_NORMAL_GRID[::5] + np.log(5), axis=1).mean()

    loss = CumulativeMaskedScore(predictor=Importance(10), random_state=0)
    svi = pyro.infer.SVI(program, guide, pyro.optim.Adam({"lr": 0.05}), loss)
    svi.step(tensor(train))
    before = heldout()
    for _ in range(80):
        svi.step(tensor(train))
    model = fitted(program, train)
    assert heldout() > before + 1
    best = model.score(new)
    assert heldout() == pytest.approx(best, abs=0.05)
