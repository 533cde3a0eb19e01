"""Latents of the data set beside latents of each row: the rows integrated inside, against grids and closed forms."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from scipy import stats
from scipy.special import expit, gammaln, logsumexp
from tables import tensor
from truths import normal_grid

from bayes_mpt import BayesMPT
from bayes_mpt.predictors import Importance, Quadrature, SequentialMonteCarlo
from bayes_mpt.score import CumulativeMaskedScore
from bayes_mpt.training import Steps

GRID, LOG_GRID = normal_grid(8, 321)  # of a standard normal latent


def fitted(program, x, y=None, **settings):
    return BayesMPT(program, random_state=0, **settings).fit(x, y)


def bound(predictor, program, *args):
    """The conditionals of a program without parameters, and its tokens."""
    read = predictor.bind(program, args).read(args)
    return read, read.value


# -------------------------------------------------------------------- a logistic regression with random intercepts

DRAW = np.random.default_rng(3)
X = DRAW.normal(size=(6, 3))
Y = (DRAW.uniform(size=(6, 3)) < expit(0.8 * X + 0.7 * DRAW.normal(size=(6, 1)))).astype(float)
MEAN, SPREAD = 0.5, 0.8  # of the slope


def logistic(x, y):
    slope = pyro.sample("slope", dist.Normal(MEAN, SPREAD))
    with pyro.plate("people", len(x)):
        level = pyro.sample("level", dist.Normal(0.0, 1.5))
        eta = slope[..., None, None] * x + level[..., None]
        pyro.sample("y", dist.Bernoulli(logits=eta).to_event(1), obs=y)


def logistic_one_node(x, y):
    """The same, written for one node at a time."""
    slope = pyro.sample("slope", dist.Normal(MEAN, SPREAD))
    with pyro.plate("people", len(x)):
        level = pyro.sample("level", dist.Normal(0.0, 1.5))
        pyro.sample("y", dist.Bernoulli(logits=slope * x + level[:, None]).to_event(1), obs=y)


SLOPES = MEAN + SPREAD * GRID


def logistic_by_row(y, x=X):
    """log p(y_n | slope) on the grid of slopes: (G, N); NaN cells are left out."""
    eta = SLOPES[:, None, None, None] * x + 1.5 * GRID[:, None, None]  # (slope, level, N, T)
    seen = ~np.isnan(y)
    token = np.where(seen, np.nan_to_num(y) * eta - np.logaddexp(0, eta), 0.0)
    return logsumexp(token.sum(-1) + LOG_GRID[:, None], axis=1)


def logistic_lml(y):
    return logsumexp(logistic_by_row(y).sum(1) + LOG_GRID)


@pytest.mark.slow
@pytest.mark.parametrize("program", [logistic, logistic_one_node])
def test_random_intercepts_by_nested_quadrature(program):
    model = fitted(program, X, Y)
    assert model.log_marginal_likelihood_ == pytest.approx(logistic_lml(Y), abs=1e-7)
    assert 0 < model.log_marginal_likelihood_se_ < 1e-5
    text = model.explain()
    assert "Quadrature: 64 Gauss-Hermite nodes along each of 1 axes (slope)" in text
    assert "rows by themselves: level with 16 Gauss-Hermite nodes" in text and "node by node" not in text
    assert "integrated:      slope, level" in text
    by_row = logistic_by_row(Y)
    share = np.exp(by_row.sum(1) + LOG_GRID - logistic_lml(Y))
    latents = model.transform(X, Y)
    assert latents.shape == (1, 1 + len(X))
    assert latents[0, 0] == pytest.approx(share @ SLOPES, abs=1e-6)
    eta = SLOPES[:, None, None, None] * X + 1.5 * GRID[:, None, None]
    log_prob = (Y * eta - np.logaddexp(0, eta)).sum(-1) + LOG_GRID[:, None]  # (slope, level, N)
    levels = np.exp(log_prob - by_row[:, None])
    np.testing.assert_allclose(latents[0, 1:], share @ (1.5 * GRID[:, None] * levels).sum(1), atol=1e-6)


def test_missing_tokens_and_rows():
    y = Y.copy()
    y[0], y[1, 1:], y[4, 0] = np.nan, np.nan, np.nan
    assert fitted(logistic, X, y).log_marginal_likelihood_ == pytest.approx(logistic_lml(y), abs=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("predictor", [Importance(400), SequentialMonteCarlo(64, 4)], ids=repr)
def test_random_intercepts_by_draws(predictor):
    model = fitted(logistic, X, Y, predictor=predictor)
    se = model.log_marginal_likelihood_se_
    assert model.log_marginal_likelihood_ == pytest.approx(logistic_lml(Y), abs=4 * se) and se < 0.15
    if isinstance(predictor, SequentialMonteCarlo):
        assert "particles over the 1 numbers of slope," in model.explain()


@pytest.mark.slow
def test_conditionals_and_chains():
    y = tensor(Y[:3])
    read, value = bound(Quadrature(20), logistic, tensor(X[:3]), y)
    visible = torch.tensor([True, False, True, False, False, False, True, True, False])

    def lml(shown):
        cells = np.where(shown.reshape(3, 3), Y[:3], np.nan)
        return logsumexp(logistic_by_row(cells, X[:3]).sum(1) + LOG_GRID)

    want = np.zeros(9)
    for token in np.flatnonzero(~visible.numpy()):
        more = visible.numpy().copy()
        more[token] = True
        want[token] = lml(more) - lml(visible.numpy())
    np.testing.assert_allclose(read.conditionals(visible[None])[0, 0], want, atol=1e-6)
    order = torch.tensor([4, 0, 8, 3, 1, 2, 7, 5, 6])
    shown, before, want = np.zeros(9, dtype=bool), 0.0, np.zeros(9)
    for token in order.numpy():
        shown[token] = True
        want[token], before = lml(shown) - before, lml(shown)
    np.testing.assert_allclose(read.chain(order[None])[0, 0], want, atol=1e-6)
    # the same of the inner model alone, which takes one step in every row at once
    given, log_weight = read.last.given, read.last.log_weight
    chain = (log_weight[..., None] + given.chain(value, order)).logsumexp(0)[0]
    joint = []
    for n in range(10):
        shown = torch.zeros(9, dtype=torch.bool)
        shown[order[:n]] = True
        joint.append((log_weight + given.log_joint(value, shown)).logsumexp(0))
    np.testing.assert_allclose(chain, torch.cat(joint), atol=1e-9)
    step = given.predictive(value, visible)[:, 0]
    for token in torch.nonzero(~visible)[:, 0]:
        more = visible.clone()
        more[token] = True
        difference = given.log_joint(value, more) - given.log_joint(value, visible)
        np.testing.assert_allclose(step[:, token], difference[:, 0], atol=1e-9)
    means = given.posterior(value, visible).tokens()[:, 0]
    chance = torch.where(value == 1, step, torch.log1p(-step.exp())).exp()[0, ~visible]
    np.testing.assert_allclose(means[0, ~visible], chance, atol=1e-6)


@pytest.mark.slow
def test_guide_of_the_latents_of_the_data_set_alone():
    """Row latents that the guide does not draw are integrated inside."""
    with torch.random.fork_rng():
        guide = AutoNormal(pyro.poutine.block(logistic, hide=["level"]), init_scale=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few steps
        model = fitted(logistic, X, Y, guide=guide, predictor=Importance(20), training=Steps(max_iter=25))
    text = model.explain()
    assert "20 draws of slope from the guide" in text and "rows by themselves: level" in text
    se = model.log_marginal_likelihood_se_
    assert model.log_marginal_likelihood_ == pytest.approx(logistic_lml(Y), abs=4 * se) and se < 0.5


def test_parameters_are_trained_through_both_integrals():
    def program(x, y):
        width = pyro.param("width", tensor(1.0), constraint=dist.constraints.positive)
        slope = pyro.sample("slope", dist.Normal(MEAN, SPREAD))
        with pyro.plate("people", len(x)):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
            eta = slope[..., None, None] * x + width * level[..., None]
            pyro.sample("y", dist.Bernoulli(logits=eta).to_event(1), obs=y)

    with pyro.get_param_store().scope():
        loss = CumulativeMaskedScore(predictor=Quadrature(24), random_state=0)

        def at(width):
            with torch.no_grad():
                pyro.param("width").unconstrained().copy_(tensor(width).log())
            return loss.loss(program, None, tensor(X), tensor(Y))

        loss.loss(program, None, tensor(X), tensor(Y))
        assert at(1.5) == pytest.approx(-logistic_lml(Y), abs=1e-7)
        leaf = pyro.param("width").unconstrained()
        loss.loss_and_grads(program, None, tensor(X), tensor(Y))
        slope = (at(1.5 * np.exp(1e-4)) - at(1.5 * np.exp(-1e-4))) / 2e-4
        assert float(leaf.grad) == pytest.approx(slope, abs=1e-5)


# ------------------------------------------------------------------------------------------- other kinds of rows


@pytest.mark.slow
def test_linear_gaussian_rows_in_closed_form():
    """Everything has a closed form here; asked for quadrature, only the mean of the data set takes nodes."""
    x = np.random.default_rng(0).normal(size=(5, 2)) + 1

    def program(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.5))
            w = pyro.sample("w", dist.Normal(torch.zeros(2), 0.5).to_event(1))
            pyro.sample("x", dist.Normal(z[..., None] + w, 1.0).to_event(1), obs=x)

    row = 1.25 * np.eye(2) + 1.5**2
    truth = stats.multivariate_normal(np.zeros(10), np.kron(np.eye(5), row) + 4).logpdf(x.ravel())
    assert fitted(program, x).log_marginal_likelihood_ == pytest.approx(truth, abs=1e-9)
    model = fitted(program, x, predictor=Quadrature(12))
    assert model.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-9)
    assert (
        "(mean), around each mode; given each of them, rows by themselves: z, w in closed form"
        in model.explain()
    )
    cov = np.kron(np.eye(5), row) + 4
    every = np.kron(np.eye(5), np.full((1, 2), 1.5**2)) + 4  # of z with x
    np.testing.assert_allclose(
        model.transform(x)[0, 0], 4 * np.ones(10) @ np.linalg.solve(cov, x.ravel()), atol=1e-8
    )
    z = model.transform(x)[0, 1:].reshape(5, 3)[:, 0]
    np.testing.assert_allclose(z, every @ np.linalg.solve(cov, x.ravel()), atol=1e-8)


def test_linear_gaussian_rows_under_a_shared_width():
    """Given the width nothing is left but latents of rows: these are integrated row by row, not as one vector."""
    x = np.random.default_rng(7).normal(1, 1, size=(6, 2))

    def program(x):
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, tau))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).expand((*z.shape, 2)).to_event(1), obs=x)

    log_tau = np.linspace(-12, 3, 601)
    total = stats.halfnorm.logpdf(np.exp(log_tau)) + log_tau + np.log(log_tau[1] - log_tau[0])
    total += [
        stats.multivariate_normal(np.zeros(2), np.eye(2) + v).logpdf(x).sum() for v in np.exp(2 * log_tau)
    ]
    model = fitted(program, x)
    assert model.log_marginal_likelihood_ == pytest.approx(logsumexp(total), abs=1e-4)
    assert (
        "axes (tau), around each mode; given each of them, rows by themselves: z in closed form"
        in model.explain()
    )


def bayesian_factor(x):
    loading = pyro.sample("loading", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ loading[None, :], 0.7).to_event(1), obs=x)


@pytest.mark.slow
def test_factor_analysis_with_sampled_loadings():
    """The loadings' posterior has two modes, of either sign; the factors are integrated in closed form."""
    draw = np.random.default_rng(1)
    x = draw.normal(size=(12, 1)) * [1.0, 0.8] + 0.7 * draw.normal(size=(12, 2))
    grid = np.linspace(-5, 5, 201)
    w = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2)
    cov = w[:, :, None] * w[:, None, :] + 0.49 * np.eye(2)
    quadratic = np.einsum("ni,gij,nj->g", x, np.linalg.inv(cov), x)
    log_prob = -0.5 * (quadratic + 12 * (np.linalg.slogdet(cov)[1] + 2 * np.log(2 * np.pi)))
    truth = logsumexp(log_prob + stats.norm.logpdf(w).sum(1)) + 2 * np.log(grid[1] - grid[0])
    model = fitted(bayesian_factor, x, predictor=SequentialMonteCarlo(64, 6))
    se = model.log_marginal_likelihood_se_
    assert model.log_marginal_likelihood_ == pytest.approx(truth, abs=4 * se) and se < 0.15
    assert "2 numbers of loading," in model.explain() and "z in closed form" in model.explain()


def test_item_response_with_sampled_difficulties():
    y = (np.random.default_rng(2).uniform(size=(10, 2)) < [0.7, 0.4]).astype(float)

    def program(x):
        difficulty = pyro.sample("difficulty", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("people", len(x)):
            ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(logits=ability[:, None] - difficulty).to_event(1), obs=x)

    grid = np.linspace(-6, 6, 81)
    item = [[y_t * (GRID[:, None] - grid) - np.logaddexp(0, GRID[:, None] - grid) for y_t in (0, 1)]] * 2
    kinds, count = np.unique(y, axis=0, return_counts=True)
    log_prob = 0.0
    for kind, n in zip(kinds.astype(int), count, strict=True):
        both = item[0][kind[0]][:, :, None] + item[1][kind[1]][:, None, :]  # (ability, b_1, b_2)
        log_prob = log_prob + n * logsumexp(both + LOG_GRID[:, None, None], axis=0)
    prior = stats.norm.logpdf(grid) + np.log(grid[1] - grid[0])
    truth = logsumexp(log_prob + prior[:, None] + prior)
    model = fitted(program, y, predictor=Quadrature(12))
    assert model.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-6)


@pytest.mark.slow
def test_counts_with_discrete_and_continuous_latents_in_a_row():
    x = np.random.default_rng(4).poisson([2.0, 5.0], size=(6, 2)).astype(float)

    def program(x):
        rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
        with pyro.plate("rows", len(x)):
            kind = pyro.sample("kind", dist.Bernoulli(0.3))
            z = pyro.sample("z", dist.Normal(0.0, 0.5))
            eta = (z + kind)[..., None] + torch.tensor([0.0, 0.5])
            pyro.sample("x", dist.Poisson(rate[..., None] * eta.exp()).to_event(1), obs=x)

    rates = np.linspace(0, 12, 2001)[1:]
    eta = 0.5 * GRID[:, None, None] + np.array([0.0, 1.0])[:, None] + [0.0, 0.5]  # (z, kind, T)
    mean = rates[:, None, None, None] * np.exp(eta)
    total = stats.gamma(3, scale=0.5).logpdf(rates) + np.log(rates[1] - rates[0])
    for row in x:
        token = (row * np.log(mean) - mean - gammaln(row + 1)).sum(-1)  # (rate, z, kind)
        token = logsumexp(token + np.log([0.7, 0.3]), axis=-1)
        total = total + logsumexp(token + LOG_GRID, axis=-1)
    model = fitted(program, x)
    se = model.log_marginal_likelihood_se_
    assert 0 < se < 1e-3
    assert model.log_marginal_likelihood_ == pytest.approx(logsumexp(total), abs=1e-5)
    assert "kind summed out" in model.explain()


@pytest.mark.slow
def test_more_latents_of_a_row_than_a_product_rule_takes():
    """Five, at Sobol points; they enter through their sum only, so that one integral is the truth."""

    def program(x):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(5), 0.3).to_event(1))
            eta = (level[..., None] + z.sum(-1))[..., None].expand(*z.shape[:-1], 3)
            pyro.sample("x", dist.Poisson(eta.exp()).to_event(1), obs=x)

    x = np.random.default_rng(5).poisson(2.0, size=(4, 3)).astype(float)
    eta = GRID[:, None] + 0.3 * np.sqrt(5) * GRID  # (level, sum)
    total = LOG_GRID.copy()
    for row in x:
        token = row.sum() * eta - 3 * np.exp(eta) - gammaln(row + 1).sum()
        total = total + logsumexp(token + LOG_GRID, axis=-1)
    model = fitted(program, x)
    se = model.log_marginal_likelihood_se_
    assert "z with 128 points" in model.explain()
    assert model.log_marginal_likelihood_ == pytest.approx(logsumexp(total), abs=2 * se) and se < 0.05


def test_rows_that_look_at_other_rows_are_no_rows():
    """A random walk over rows: one vector of five latents, as it is written."""

    def program(x):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            step = pyro.sample("step", dist.Normal(0.0, 0.5))
            eta = (level[..., None] + step.cumsum(-1))[..., None]
            pyro.sample("x", dist.Poisson(eta.exp()).to_event(1), obs=x)

    x = np.array([[1.0], [2.0], [1.0]])
    model = fitted(program, x)
    assert "rows by themselves" not in model.explain()
    z = np.random.default_rng(0).normal(size=(400_000, 4)) * [1, 0.5, 0.5, 0.5]
    eta = z[:, :1] + z[:, 1:].cumsum(1)
    token = (x[:, 0] * eta - np.exp(eta) - gammaln(x[:, 0] + 1)).sum(1)
    share = np.exp(token - token.max())
    truth, se = token.max() + np.log(share.mean()), share.std() / share.mean() / np.sqrt(len(z))
    assert model.log_marginal_likelihood_ == pytest.approx(truth, abs=5 * se + 1e-3)


def counts_of_two_levels(x):
    with pyro.plate("rows", len(x)):
        k = pyro.sample("k", dist.Categorical(tensor([0.3, 0.7])))
        z = pyro.sample("z", dist.Normal(tensor([-1.0, 1.5])[k], tensor([0.5, 0.8])[k]))
        pyro.sample("x", dist.Poisson(z.exp()[..., None].expand(*z.shape, 3)).to_event(1), obs=x)


@pytest.mark.parametrize("predictor", [Quadrature(40), Importance(2000), "auto"], ids=str)
def test_a_discrete_latent_decides_about_the_mean_of_a_continuous_one(predictor):
    """p(x) = sum_k w_k int N(z; m_k, s_k) prod_i Poisson(x_i; e^z) dz, by a fine grid; a cell is missing."""
    x = np.array([[0, 1, 0], [3, 7, 4], [2, np.nan, 1]])
    z = np.linspace(-12, 12, 20001)
    prior = 0.3 * stats.norm.pdf(z, -1.0, 0.5) + 0.7 * stats.norm.pdf(z, 1.5, 0.8)
    likelihood = [np.prod([stats.poisson.pmf(c, np.exp(z)) for c in row if np.isfinite(c)], 0) for row in x]
    want = np.log([np.trapezoid(prior * values, z) for values in likelihood])
    model = BayesMPT(counts_of_two_levels, predictor=predictor, random_state=0).fit(x)
    if isinstance(predictor, Importance):
        assert 0 < model.log_marginal_likelihood_se_ < 0.2
        assert abs(model.log_marginal_likelihood_ - want.sum()) < 4 * model.log_marginal_likelihood_se_
    else:
        np.testing.assert_allclose(model.score_samples(x), want, atol=1e-7)
