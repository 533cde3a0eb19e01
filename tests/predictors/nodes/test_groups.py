"""Latents of groups outside the rows plate, integrated group by group, against dense grids and closed forms."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from scipy import stats
from scipy.special import betaln, expit, gammaln, logsumexp
from tables import tensor
from truths import normal_grid

from bayes_mpt import BayesMPT
from bayes_mpt.predictors import Importance, Quadrature, SequentialMonteCarlo
from bayes_mpt.predictors.nodes.conjugacy import prior_draws
from bayes_mpt.predictors.nodes.resampling import evenly
from bayes_mpt.program.analysis import analyze
from bayes_mpt.program.groups import find_groups
from bayes_mpt.program.program import ModelError
from bayes_mpt.score import CumulativeMaskedScore

GRID, LOG_GRID = normal_grid(9, 181)  # of a standard normal latent


def fitted(program, x, y=None, **settings):
    return BayesMPT(program, random_state=0, **settings).fit(x, y)


# ------------------------------------------------------------------------------------------- probit with six groups

DRAW = np.random.default_rng(0)
N_GROUPS, PER_GROUP = 6, 5
GROUP = np.repeat(np.arange(N_GROUPS), PER_GROUP)
MIXED = DRAW.permutation(len(GROUP))
EFFECT = DRAW.normal(0.3, 0.8, size=N_GROUPS)
BITS = (DRAW.uniform(size=len(GROUP)) < stats.norm.cdf(EFFECT[GROUP])).astype(float)
FLAT = GROUP[MIXED][:, None].astype(float), BITS[MIXED]


def probit(x, y, n_groups=N_GROUPS):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", n_groups):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(dist.Normal(0.0, 1.0).cdf(theta[x[:, 0].long()])), obs=y)


def probit_by_rows(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", len(x)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        chance = dist.Normal(0.0, 1.0).cdf(theta[..., None])
        pyro.sample("y", dist.Bernoulli(chance.expand(*theta.shape, PER_GROUP)).to_event(1), obs=x)


def probit_truth(group, y):
    """By a grid over mu, log tau and each group's effect; NaN is left out."""
    mu, log_tau = np.linspace(-4, 4, 41), np.linspace(-9, 2, 67)
    effect = mu[:, None, None] + np.exp(log_tau)[:, None] * GRID[::2]  # (mu, tau, effect)
    log_p, log_q = stats.norm.logcdf(effect), stats.norm.logcdf(-effect)
    total = stats.norm.logpdf(mu)[:, None] + stats.halfnorm.logpdf(np.exp(log_tau)) + log_tau
    for g in range(N_GROUPS):
        one, zero = (y[group == g] == 1).sum(), (y[group == g] == 0).sum()
        total = total + logsumexp(one * log_p + zero * log_q + LOG_GRID[::2] + np.log(2), axis=-1)
    return logsumexp(total) + np.log(mu[1] - mu[0]) + np.log(log_tau[1] - log_tau[0])


@pytest.mark.slow
def test_groups_written_flat_and_by_rows_are_one():
    flat = fitted(probit, *FLAT)
    rows = fitted(probit_by_rows, BITS.reshape(N_GROUPS, PER_GROUP))
    found, se = flat.log_marginal_likelihood_, flat.log_marginal_likelihood_se_
    assert found == pytest.approx(rows.log_marginal_likelihood_, abs=1e-9)
    assert abs(found - probit_truth(GROUP, BITS)) < 2 * se and 0 < se < 1e-2
    text = flat.explain()
    assert "16 Gauss-Hermite nodes along each of 2 axes (mu, tau)" in text and "node by node" not in text
    assert "given each of them, theta in 6 groups, each by itself, with 16 Gauss-Hermite nodes" in text
    assert "integrated:      mu, tau, theta" in text
    np.testing.assert_allclose(
        flat.transform(*FLAT)[0], rows.transform(BITS.reshape(N_GROUPS, PER_GROUP))[0], atol=1e-8
    )


@pytest.mark.slow
def test_missing_cells_and_empty_groups():
    y = BITS.copy()
    y[:PER_GROUP], y[12] = np.nan, np.nan  # of the first group nothing is seen
    x = GROUP[:, None].astype(float)
    keep = ~np.isnan(y)
    few = Quadrature(10)
    found = fitted(probit, x, y, predictor=few)
    assert found.log_marginal_likelihood_ == pytest.approx(probit_truth(GROUP, y), abs=5e-3)
    left_out = fitted(probit, x[keep], y[keep], predictor=few)  # its plate is as large as before
    assert left_out.log_marginal_likelihood_ == pytest.approx(found.log_marginal_likelihood_, abs=1e-9)


@pytest.mark.slow
def test_conditionals_and_chains():
    x, y = tensor(FLAT[0][:12]), tensor(FLAT[1][:12])
    read = Quadrature(8).bind(probit, (x, y)).read((x, y))
    visible = torch.arange(12) % 2 == 0
    group, values = FLAT[0][:12, 0], np.where(visible, FLAT[1][:12], np.nan)
    before = probit_truth(group, values)
    want = np.zeros(12)
    for i in np.flatnonzero(~visible.numpy())[:2]:
        more = values.copy()
        more[i] = FLAT[1][i]
        want[i] = probit_truth(group, more) - before
    got = read.conditionals(visible[None])[0, 0]
    np.testing.assert_allclose(got[:4], want[:4], atol=5e-3)
    # the inner model alone: its chain and single steps are differences of its log joint
    given, order = read.last.given.with_detail("fine"), torch.tensor([4, 0, 8, 3, 1, 2, 7, 5, 6, 11, 10, 9])
    chain = given.chain(read.value, order)[:, 0]
    for n in (0, 1, 5, 12):
        shown = torch.zeros(12, dtype=torch.bool).index_fill(0, order[:n], True)
        np.testing.assert_allclose(chain[:, n], given.log_joint(read.value, shown)[:, 0], rtol=1e-9)
    step = given.predictive(read.value, visible)[:, 0]
    for i in (1, 3, 11):
        more = visible.clone().index_fill(0, torch.tensor([i]), True)
        difference = given.log_joint(read.value, more) - given.log_joint(read.value, visible)
        np.testing.assert_allclose(step[:, i], difference[:, 0], rtol=1e-5, atol=1e-8)
    joint = (read.last.log_weight + given.log_joint(read.value, visible))[:, 0]
    matters = joint > joint.max() - 6  # far out in tau the few nodes of a group are too few
    means = given.posterior(read.value, visible).tokens()[matters, 0, 1]
    chance = step[matters, 1].exp()
    np.testing.assert_allclose(means, torch.where(read.value[0, 1] == 1, chance, 1 - chance), atol=2e-3)


# -------------------------------------------------------------------------------------- nothing but groups: exact


@pytest.mark.slow
def test_groups_alone_and_parameters_above_them():
    """Beta-binomial groups: no other latent, and the parameters of their prior are trained through the integral."""
    n, k = np.array([12.0, 7, 30, 4, 9]), np.array([3.0, 6, 4, 0, 5])

    def program(x, y):
        a = pyro.param("a", tensor(1.5), constraint=dist.constraints.positive)
        b = pyro.param("b", tensor(2.0), constraint=dist.constraints.positive)
        with pyro.plate("groups", 5):
            share = pyro.sample("share", dist.Beta(a, b))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Binomial(x[:, 0], share[torch.arange(5)]), obs=y)

    def truth(a, b):
        choose = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
        return (choose + betaln(a + k, b + n - k) - betaln(a, b)).sum()

    x, y = tensor(n[:, None]), tensor(k)
    with pyro.get_param_store().scope():
        loss = CumulativeMaskedScore(predictor=Quadrature(), random_state=0)
        svi = SVI(program, lambda x, y: None, Adam({"lr": 0.05}), loss=loss)
        first = svi.step(x, y)
        assert first == pytest.approx(-truth(1.5, 2.0), abs=1e-6)
        for _ in range(2):
            last = svi.step(x, y)
        assert last < first
    with pyro.get_param_store().scope():
        loss.loss_and_grads(program, None, x, y)
        slope = (truth(1.5 * np.exp(1e-4), 2.0) - truth(1.5 * np.exp(-1e-4), 2.0)) / 2e-4
        assert float(pyro.param("a").unconstrained().grad) == pytest.approx(-slope, abs=1e-5)
    model = fitted(program, n[:, None], k)
    a, b = (float(model.params_[name]) for name in "ab")
    assert model.log_marginal_likelihood_ == pytest.approx(truth(a, b), abs=1e-5)
    around = [truth(a * s, b * t) for s, t in ((1.05, 1), (0.95, 1), (1, 1.05), (1, 0.95))]
    assert max(around) < truth(a, b)
    assert "predictor:       Quadrature: share in 5 groups, each by itself, with 64" in model.explain()
    with pytest.raises(ModelError, match="integrated group by group.*nothing left for particles"):
        SequentialMonteCarlo().bind(lambda x, y: program_of_priors(x, y), (x, y))


def program_of_priors(x, y):
    with pyro.plate("groups", 5):
        share = pyro.sample("share", dist.Beta(1.0, 2.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Binomial(x[:, 0], share[torch.arange(5)]), obs=y)


@pytest.mark.parametrize("n_groups", [1, 3])
def test_flat_priors_and_groups_without_rows(n_groups):
    """Of a uniform prior no log-density moves, and its constant belongs to each group all the same."""
    k = np.array([1.0, 0, 1, 1, 0, 1])

    def program(x, y):
        with pyro.plate("groups", n_groups):
            p = pyro.sample("p", dist.Uniform(0.0, 0.8))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Bernoulli(p[x[:, 0].long()]), obs=y)

    truth = betaln(5, 3) + stats.beta(5, 3).logcdf(0.8) - np.log(0.8)
    model = fitted(program, np.zeros((6, 1)), k)
    assert model.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-6)
    assert f"p in {n_groups} groups" in model.explain()


# -------------------------------------------------------------------------------------------- several effects, sites


@pytest.mark.parametrize("written", ["one site", "two sites"])
def test_intercept_and_slope_of_a_group_are_one_block(written):
    draw = np.random.default_rng(1)
    group, z = np.repeat(np.arange(3), 4), np.tile([-1.0, -0.3, 0.4, 1.0], 3)
    y = draw.poisson(np.exp(0.5 + 0.6 * z)).astype(float)

    def program(x, y):
        g, z = x[:, 0].long(), x[:, 1]
        width = pyro.sample("width", dist.HalfNormal(1.0))
        with pyro.plate("groups", 3):
            if written == "one site":
                both = pyro.sample("both", dist.Normal(torch.zeros(2), width).to_event(1))
                level, slope = both[:, 0], both[:, 1]
            else:
                level = pyro.sample("level", dist.Normal(0.0, width))
                slope = pyro.sample("slope", dist.Normal(level * 0.0, width))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Poisson((level[g] + slope[g] * z).exp()), obs=y)

    log_width = np.linspace(-8, 2, 161)
    total = stats.halfnorm.logpdf(np.exp(log_width)) + log_width + np.log(log_width[1] - log_width[0])
    level = np.exp(log_width)[:, None, None] * GRID[::2][:, None]  # every second point: a step of 0.2
    slope = np.exp(log_width)[:, None, None] * GRID[::2]
    weight = LOG_GRID[::2] + np.log(2)
    for g in range(3):
        part = 0.0
        for value, at in zip(y[group == g], z[group == g], strict=True):
            eta = level + slope * at
            part = part + value * eta - np.exp(eta) - gammaln(value + 1)
        total = total + logsumexp(part + weight[:, None] + weight, axis=(1, 2))
    model = fitted(program, np.c_[group, z], y)
    assert model.log_marginal_likelihood_ == pytest.approx(logsumexp(total), abs=2e-5)
    assert "in 3 groups, each by itself, with 8 Gauss-Hermite nodes along each of 2 axes" in model.explain()


def test_tokens_of_rows_and_new_rows():
    """Three tokens a row, groups over columns of a wider table; predictions average over each group's posterior."""
    y = np.random.default_rng(2).poisson(2.0, size=(6, 3)).astype(float)
    group = np.array([0, 0, 1, 1, 1, 2])

    def program(x, y=None):
        with pyro.plate("groups", 3):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Poisson(rate[x[:, 0].long()][:, None].expand(-1, 3)).to_event(1), obs=y)

    model = fitted(program, group[:, None].astype(float), y)
    total = -gammaln(y + 1).sum()
    for g in range(3):
        a, b = 2 + y[group == g].sum(), 1 + 3 * (group == g).sum()
        total += gammaln(a) - a * np.log(b)
    assert model.log_marginal_likelihood_ == pytest.approx(total, abs=1e-7)
    posterior = [(2 + y[group == g].sum()) / (1 + 3 * (group == g).sum()) for g in range(3)]
    np.testing.assert_allclose(model.transform(group[:, None].astype(float), y)[0], posterior, rtol=1e-6)
    np.testing.assert_allclose(
        np.asarray(model.predict(np.array([[1.0], [2.0]])))[:, 0], [posterior[1], posterior[2]], rtol=0.02
    )


# ------------------------------------------------------------------------------------------------ what is no group


def groups_of(program, *args):
    args = tuple(tensor(a) for a in args)
    return find_groups(program, args, analyze(program, args), prior_draws(program, args, 8))


def effects(kind, wide=1.0):
    def program(x, y):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        if kind == "car":
            near = torch.diag(torch.ones(4), 1) + torch.diag(torch.ones(4), -1)
            precision = torch.diag(near.sum(0)) - 0.9 * near
            theta = pyro.sample("theta", dist.MultivariateNormal(torch.zeros(5), precision_matrix=precision))
        else:
            theta = pyro.sample("theta", dist.Normal(torch.zeros(5), wide).to_event(1))
        theta = scale * theta
        if kind == "walk":
            theta = theta.cumsum(-1)
        elif kind == "zero sum":
            theta = theta - theta.mean(-1, keepdim=True)
        elif kind == "last is minus the others":
            theta = torch.cat([theta[:4], -theta[:4].sum(-1, keepdim=True)])
        elif kind == "nearly apart":
            theta = theta + 1e-4 * theta.roll(1)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Bernoulli(dist.Normal(0.0, 1.0).cdf(theta[x[:, 0].long()])), obs=y)

    return program


FIVE = np.arange(10)[:, None] % 5.0, (np.arange(10) % 3 == 0).astype(float)


@pytest.mark.parametrize("kind", ["walk", "car", "zero sum", "last is minus the others", "nearly apart"])
@pytest.mark.parametrize("wide", [1.0, 30.0])
def test_effects_that_hang_together_are_no_groups(kind, wide):
    """Also where a wide prior puts almost all points where the probit is flat."""
    assert groups_of(effects(kind, wide), *FIVE) is None
    found = groups_of(effects("apart", wide), *FIVE)
    assert found is not None and found.n_groups == 5 and found.token.tolist() == list(range(5)) * 2


def test_a_walk_over_sites_and_weights_of_a_regression_are_no_groups():
    def walk(x, y):
        level = x.new_tensor(0.0)
        for t in range(6):
            level = pyro.sample(f"level_{t}", dist.Normal(level, 1.0))
            pyro.sample(f"y_{t}", dist.Poisson(level.exp()), obs=y[t])

    def regression(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    assert groups_of(walk, np.zeros((6, 1)), np.arange(6.0)) is None
    assert groups_of(regression, DRAW.normal(size=(6, 3)), np.arange(6.0) % 2) is None


def test_of_crossed_effects_the_fewer_keep_nodes():
    def program(x, y):
        with pyro.plate("A", 6):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("B", 2):
            b = pyro.sample("b", dist.Normal(0.0, 0.5))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=a[x[:, 0].long()] + b[x[:, 1].long()]), obs=y)

    x = np.array([[i, j] for i in range(6) for j in range(2)], dtype=float)
    y = (np.arange(12) % 3 == 0).astype(float)
    grid, log_grid = GRID[::2], LOG_GRID[::2] + np.log(2)
    total = log_grid[:, None] + log_grid
    for i in range(6):
        eta = grid + 0.5 * np.stack(np.meshgrid(grid, grid, indexing="ij"))[..., None]  # (2, b_0, b_1, a)
        part = sum(y[2 * i + j] * eta[j] - np.logaddexp(0, eta[j]) for j in range(2))
        total = total + logsumexp(part + log_grid, axis=-1)
    model = fitted(program, x, y)
    assert model.log_marginal_likelihood_ == pytest.approx(logsumexp(total), abs=1e-7)
    assert "along each of 2 axes (b), around each mode; given each of them, a in 6 groups" in model.explain()


def test_groups_of_two_modes():
    """Only the square of an effect is seen: its posterior has two modes, and nodes stand around both."""

    def program(x, y):
        with pyro.plate("groups", 2):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(theta[x[:, 0].long()].square(), 0.2), obs=y)

    y = np.array([[2.1, 1.8], [3.0, 2.7]])
    model = fitted(program, np.array([[0.0], [0.0], [1.0], [1.0]]), y.ravel())
    theta = np.linspace(-4, 4, 8001)
    log_p = stats.norm.logpdf(theta) + math.log(theta[1] - theta[0])
    log_p = log_p + stats.norm.logpdf(y[:, :, None], theta**2, 0.2).sum(1)
    truth = logsumexp(log_p, axis=1).sum()
    assert model.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-8)
    assert model.log_marginal_likelihood_se_ < 1e-6
    assert "around each mode" in model.explain()


# --------------------------------------------------------------------------------------------------- other ways


@pytest.mark.slow
@pytest.mark.parametrize("predictor", [Importance(200), SequentialMonteCarlo(32, 4, 1)], ids=repr)
def test_groups_inside_draws_and_particles(predictor):
    model = fitted(probit, *FLAT, predictor=predictor)
    se = model.log_marginal_likelihood_se_
    assert abs(model.log_marginal_likelihood_ - probit_truth(GROUP, BITS)) < 4 * se and 0 < se < 0.2
    assert "theta in 6 groups" in model.explain()


@pytest.mark.slow
def test_a_wide_group_variance_is_no_funnel():
    """Thirty groups of five tokens: nodes around the joint mode of all 32 numbers are nats off."""
    draw = np.random.default_rng(5)
    group = np.repeat(np.arange(30), 5)
    y = (draw.uniform(size=150) < expit(3 * draw.normal(size=30))[group]).astype(float)

    def program(x, y):
        tau = pyro.sample("tau", dist.HalfCauchy(1.0))
        with pyro.plate("groups", 30):
            theta = pyro.sample("theta", dist.Normal(0.0, tau))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=theta[x[:, 0].long()]), obs=y)

    log_tau = np.linspace(-9, 9, 361)
    effect = np.exp(log_tau)[:, None] * GRID
    total = stats.halfcauchy.logpdf(np.exp(log_tau)) + log_tau + np.log(log_tau[1] - log_tau[0])
    for ones, count in zip(*np.unique(y.reshape(30, 5).sum(1), return_counts=True), strict=True):
        part = ones * effect - 5 * np.logaddexp(0, effect)
        total = total + count * logsumexp(part + LOG_GRID, axis=-1)
    model = fitted(program, group[:, None].astype(float), y)
    assert model.log_marginal_likelihood_ == pytest.approx(logsumexp(total), abs=1e-3)


# ------------------------------------------------------------------------------------------------------ predictions


@pytest.mark.slow
def test_predictions_of_rows_in_known_groups():
    """E[y | all y] of a row in each group, by nested quadrature: a few values stand for the effects of each group."""

    def program(x, y):
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("groups", 3):
            theta = pyro.sample("theta", dist.Normal(0.0, tau))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=theta[x[:, 0].long()]), obs=y)

    successes, n = np.array([1, 2, 4]), 4
    y = (np.arange(12) % n < np.repeat(successes, n)).astype(float)
    x = np.repeat(np.arange(3.0), n)[:, None]
    node, weight = np.polynomial.legendre.leggauss(200)
    tau = 4 * (node + 1)[:, None, None]
    log_tau = np.log(8 * weight) + stats.norm.logpdf(tau[:, 0, 0])
    log_on, log_off = -np.logaddexp(0, -tau * GRID), -np.logaddexp(0, tau * GRID)  # (tau, 1, theta)
    each = successes[:, None] * log_on + (n - successes[:, None]) * log_off + LOG_GRID
    total = logsumexp(each, axis=-1)  # (tau, groups)
    of_tau = log_tau + total.sum(1)
    mean = np.exp(logsumexp(each + log_on, axis=-1) - total)
    truth = (np.exp(of_tau - logsumexp(of_tau))[:, None] * mean).sum(0)
    found = fitted(program, x, y).predict(np.arange(3.0)[:, None])
    np.testing.assert_allclose(found, truth, atol=4e-4)


def test_values_of_equal_shares_have_the_moments_of_the_nodes():
    generator = torch.Generator().manual_seed(0)
    for d, n in ((1, 2), (1, 7), (2, 5)):
        u = torch.randn(2, 64, 3, d, generator=generator, dtype=torch.float64)
        share = torch.rand(2, 64, 3, generator=generator, dtype=torch.float64).softmax(1)
        found = evenly(u, share, n)
        mean = (share[..., None] * u).sum(1)
        second = torch.einsum("sqb,sqbi,sqbj->sbij", share, u, u)
        torch.testing.assert_close(found.mean(1), mean, atol=1e-12, rtol=0)
        torch.testing.assert_close(
            torch.einsum("snbi,snbj->sbij", found, found) / n, second, atol=1e-10, rtol=0
        )
