"""Posteriors with several modes, or with one where symmetries suggest several: nodes and draws against dense grids."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from scipy import stats
from scipy.special import gammaln, log_expit, logsumexp
from tables import tensor

from bayes_mpt import BayesMPT
from bayes_mpt.predictors import Importance, Quadrature
from bayes_mpt.predictors.nodes import modes as modes_of
from bayes_mpt.predictors.nodes import symmetries
from bayes_mpt.predictors.nodes.unseen import crowd_of, missed_mass
from bayes_mpt.warnings import MissedModeWarning


def evidence(way, program, *args):
    return way.bind(program, args).read(args).evidence()


def within(found, truth, most):
    """The truth is within the error, and the error is what it should be."""
    assert found.se <= most
    assert float(found.by_row.sum()) == pytest.approx(truth, abs=3 * found.se + 1e-6)


# ------------------------------------------------------------------------------------------------ exchangeable means


def means(n):
    def program(x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(n), 5.0).to_event(1))
        with pyro.plate("rows", len(x)):
            each = dist.Normal(mu[..., None, :], 1.0)
            pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(x.new_ones(n)), each), obs=x)

    return program


def of_means(x, n, points):
    grid = np.linspace(-25, 25, points)
    axes = [[-1 if a == b else 1 for b in range(n)] for a in range(n)]
    log_p = sum(stats.norm.logpdf(grid, 0, 5).reshape(shape) for shape in axes)
    for row in stats.norm.pdf(x[:, None], grid):
        log_p = log_p + np.log(sum(row.reshape(shape) for shape in axes) / n)
    return logsumexp(log_p) + n * math.log(grid[1] - grid[0])


def separated(n, sep, n_rows=30, seed=0):
    return np.random.default_rng(seed).normal(sep * (np.arange(n_rows) % n - (n - 1) / 2), 1)


@pytest.mark.parametrize(("sep", "most"), [(0, 1e-3), (1, 0.1), (2, 1e-3), (5, 1e-9)])
def test_two_means_apart_or_overlapping(sep, most):
    x = separated(2, sep)
    truth = of_means(x, 2, 500)
    within(evidence(Quadrature(), means(2), tensor(x)), truth, most)
    torch.manual_seed(0)
    within(evidence(Importance(500), means(2), tensor(x)), truth, 0.05)


def test_three_means_have_six_modes():
    x = separated(3, 4.0, 24)
    found = evidence(Quadrature(), means(3), tensor(x))
    assert found.diagnostics["n_modes"] == 6
    assert found.by_row.item() == pytest.approx(of_means(x, 3, 160), abs=1e-3)
    assert found.se < 1e-3


def test_more_images_than_are_listed(monkeypatch):
    """As with seven components: images out of reach are counted, and not listed."""
    monkeypatch.setattr(symmetries, "MAX_IMAGES", 3)
    x = separated(3, 4.0, 24)
    torch.manual_seed(0)
    read = Importance(500).bind(means(3), (tensor(x),)).read((tensor(x),))
    assert len(read.last.located.mode) == 1
    within(read.evidence(), of_means(x, 3, 144), 0.05)


def test_scores_add_up_where_modes_are_two():
    """Chains, single conditionals and posterior means are those of both modes."""
    x = tensor(separated(2, 5.0, 6))
    read = Quadrature().bind(means(2), (x,)).read((x,))
    assert float(read.chain(torch.arange(6)[None]).sum()) == pytest.approx(
        of_means(x.numpy(), 2, 500), abs=1e-6
    )
    hidden = torch.ones(6, dtype=torch.bool)
    hidden[2] = False
    alone = float(read.conditionals(hidden[None])[0, 0, 2])
    rest = of_means(np.delete(x.numpy(), 2), 2, 500)
    assert alone == pytest.approx(of_means(x.numpy(), 2, 500) - rest, abs=1e-6)
    mean = read.posterior().mean[0]
    assert float(mean[0]) == pytest.approx(float(mean[1]), abs=1e-6)  # either component has either name


# ------------------------------------------------------------------------------------------- one mode, and symmetries


def groups(y, n):
    theta = pyro.sample("theta", dist.Normal(y.new_zeros(len(y)), 1.5).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Binomial(n, logits=theta), obs=y)


def of_groups(y, n):
    grid, total = np.linspace(-15, 15, 6001), 0.0
    for successes, trials in zip(y, n, strict=True):
        log_p = successes * log_expit(grid) + (trials - successes) * log_expit(-grid)
        choose = gammaln(trials + 1) - gammaln(successes + 1) - gammaln(trials - successes + 1)
        total += choose + logsumexp(log_p + stats.norm.logpdf(grid, 0, 1.5)) + math.log(grid[1] - grid[0])
    return total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("y", "n"),
    [((7.0, 7.0, 1.0), (10.0, 10.0, 6.0)), ((7.0, 0.0, 0.0), (10.0, 0.0, 0.0))],
    ids=["equal", "empty"],
)
def test_equal_and_empty_groups_are_no_further_modes(y, n):
    found = evidence(Quadrature(), groups, tensor(y), tensor(n))
    assert found.diagnostics["n_modes"] == 1
    within(found, of_groups(y, n), 1e-3)


def test_equal_binary_rows_are_no_further_modes():
    """A score of each of three rows, one vector; two rows are equal."""
    y = np.array([1.0, 1.0, 0.0])

    def program(y):
        z = pyro.sample("z", dist.Normal(y.new_zeros(3), 1.0).to_event(1))
        shift = pyro.sample("shift", dist.Normal(y.new_zeros(()), 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=2 * z + shift[..., None]), obs=y)

    grid = np.linspace(-8, 8, 401)
    weight = stats.norm.logpdf(grid) + math.log(grid[1] - grid[0])
    one = [logsumexp(log_expit(s * (2 * grid + grid[:, None])) + weight, axis=1) for s in (1, -1)]
    truth = logsumexp(weight + 2 * one[0] + one[1])
    found = evidence(Quadrature(), program, tensor(y))
    assert found.diagnostics["n_modes"] == 1
    within(found, truth, 1e-2)


# --------------------------------------------------------------------------------------------------- factors and signs


@pytest.mark.parametrize("sign", [False, True])
def test_a_factor_that_may_change_its_sign_and_one_that_may_not(sign):
    """A half-normal loading has the integral of a normal one."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 1)) * [1.0, -0.8] + 0.7 * rng.normal(size=(20, 2))

    def program(x):
        if sign:
            first = pyro.sample("first", dist.HalfNormal(x.new_tensor(1.0)))
            w = torch.stack([first, pyro.sample("second", dist.Normal(x.new_zeros(()), 1.0))], -1)
        else:
            w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(w[..., None, :] * z[..., None], 0.7).to_event(1), obs=x)

    grid = np.linspace(-6, 6, 241)
    w = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2)
    size = 1 + np.square(w).sum(1) / 0.49
    along = ((w @ (x.T @ x)) * w).sum(1) / 0.49**2 / size
    log_p = -10 * (2 * math.log(2 * math.pi * 0.49) + np.log(size)) - 0.5 * (
        np.square(x).sum() / 0.49 - along
    )
    truth = logsumexp(log_p + stats.norm.logpdf(w).sum(1)) + 2 * math.log(grid[1] - grid[0])
    found = evidence(Quadrature(), program, tensor(x))
    assert sign or found.diagnostics["n_modes"] == 2
    within(found, truth, 1e-3)


# ----------------------------------------------------------------------------------------- shapes that are not Gaussian


def test_a_funnel_takes_more_pieces():
    """Neal's: the mode is at the end of its neck, 2.7 nats of the mass elsewhere."""
    y = np.random.default_rng(1).normal(0, 0.8, 2)

    def funnel(y):
        v = pyro.sample("v", dist.Normal(y.new_zeros(()), 3.0))
        z = dist.StudentT(y.new_tensor(1e6), 0.0, (v / 2).exp()[..., None]).expand([2])  # normal, but for us
        pyro.sample("y", dist.Normal(pyro.sample("z", z.to_event(1)), 1.0).to_event(1), obs=y)

    v = np.linspace(-25, 25, 20001)
    log_p = stats.norm.logpdf(v, 0, 3) + stats.norm.logpdf(y[:, None], 0, np.sqrt(1 + np.exp(v))).sum(0)
    found = evidence(Quadrature(), funnel, tensor(y))
    within(found, logsumexp(log_p) + math.log(v[1] - v[0]), 0.3)


# ---------------------------------------------------------------------------------------------------- what was missed


def wave(t, y):
    frequency = pyro.sample("frequency", dist.Uniform(y.new_tensor(0.0), 400.0))
    with pyro.plate("rows", len(t)):
        pyro.sample("y", dist.Normal((2 * math.pi * frequency[..., None] * t).sin(), 0.5), obs=y)


def test_a_mode_that_few_climbs_find_is_warned_of():
    rng = np.random.default_rng(0)
    t = np.sort(rng.uniform(0, 3, 40))
    y = np.sin(2 * math.pi * 311.3 * t) + 0.5 * rng.normal(size=40)
    with pytest.warns(MissedModeWarning, match="found by one of"):
        found = evidence(Quadrature(), wave, tensor(t), tensor(y))
    assert math.isnan(found.se)


def searches(n_modes, n_climbs, even, tied, n=400):
    """Told and true mass that was missed, (n,) each; ``tied`` where climbs find great modes more often."""
    rng, told, true = np.random.default_rng(0), [], []
    for _ in range(n):
        chance, mass = rng.dirichlet(np.full(n_modes, even)), rng.dirichlet(np.full(n_modes, 0.5))
        mass = mass * chance if tied else mass
        mass, hits = mass / mass.sum(), rng.multinomial(n_climbs, chance)
        seen = hits > 0
        told.append(missed_mass(mass[seen] / mass[seen].sum(), hits[seen]))
        true.append(1 / mass[seen].sum() - 1)
    return np.array(told), np.minimum(true, 5)


@pytest.mark.parametrize("tied", [False, True], ids=["free", "tied"])
@pytest.mark.parametrize(
    ("n_modes", "n_climbs", "even"), [(20, 24, 1), (20, 64, 1), (10, 24, 5), (50, 64, 1)]
)
def test_the_mass_that_is_missed_is_told_by_how_often_modes_were_found(n_modes, n_climbs, even, tied):
    told, true = searches(n_modes, n_climbs, even, tied)
    assert 0.4 < told.mean() / true.mean() < 2.5
    # more than a tenth is missed in silence in one of 30 searches at most
    assert np.mean((true > 0.1) & (told < modes_of.UNSEEN_MASS)) < 1 / 30


@pytest.mark.parametrize("tied", [False, True], ids=["free", "tied"])
def test_nothing_is_doubted_where_all_modes_are_found_often(tied):
    told, true = searches(5, 64, 5, tied)
    assert np.mean(true < 0.01) > 0.95 and np.mean(told >= modes_of.UNSEEN_MASS) < 0.06


@pytest.mark.parametrize(
    ("n_modes", "n_climbs", "widest"), [(5, 24, 6), (30, 24, 25), (100, 72, 2), (1000, 72, 20)]
)
def test_how_many_modes_there_may_be(n_modes, n_climbs, widest):
    """Of modes that climbs find alike: seldom fewer than there are, and mostly not many times as many."""
    rng = np.random.default_rng(0)
    told = np.array([crowd_of(rng.multinomial(n_climbs, [1 / n_modes] * n_modes)) for _ in range(1000)])
    assert (told < n_modes).mean() < 0.07
    assert np.median(told) < widest * n_modes
    assert crowd_of([1] * n_climbs) == math.inf


def test_one_mode_is_not_warned_of():
    rng = np.random.default_rng(0)
    x = tensor(rng.normal(size=(40, 2)))
    y = tensor((rng.uniform(size=40) < 0.5).astype(float))

    def logistic(x, y):
        w = pyro.sample("w", dist.Normal(x.new_zeros(2), 10.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=(x * w[..., None, :]).sum(-1)), obs=y)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = evidence(Quadrature(), logistic, x, y)
    assert found.diagnostics["n_modes"] == 1


def test_half_of_a_prior_may_be_flat():
    """The middle of the prior is no place to climb from where the likelihood does not move there."""
    y = np.array([3.1, 2.9, 3.0])

    def program(y):
        mu = pyro.sample("mu", dist.Uniform(y.new_tensor(0.0), 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(30 * (0.3 - mu).clamp(min=0.0), 0.1), obs=y)

    grid = (np.arange(200000) + 0.5) / 200000
    log_p = stats.norm.logpdf(y[:, None], 30 * np.maximum(0.3 - grid, 0), 0.1).sum(0)
    found = evidence(Quadrature(), program, tensor(y))
    assert found.by_row.item() == pytest.approx(logsumexp(log_p) - math.log(len(grid)), abs=1e-4)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.slow
def test_a_training_searches_once_and_then_follows(monkeypatch):
    """The spread of two components is a parameter: modes are looked for at its start and at its end alone."""
    searches = []
    search = modes_of._Climbs.search

    def counted(self):
        searches.append(1)
        return search(self)

    monkeypatch.setattr(modes_of._Climbs, "search", counted)

    def program(x):
        spread = pyro.param("spread", x.new_tensor(2.0), constraint=constraints.positive)
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(2), 5.0).to_event(1))
        with pyro.plate("rows", len(x)):
            each = dist.Normal(mu[..., None, :], spread)
            pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(x.new_ones(2)), each), obs=x[:, 0])

    x = separated(2, 6.0, 20)
    model = BayesMPT(program, predictor=Quadrature(12), random_state=0).fit(x[:, None])
    assert len(searches) <= 4

    def at(spread):
        grid = np.linspace(-20, 20, 300)
        log_p = stats.norm.logpdf(grid, 0, 5)[:, None] + stats.norm.logpdf(grid, 0, 5)
        for row in stats.norm.pdf(x[:, None], grid, spread):
            log_p = log_p + np.log((row[:, None] + row) / 2)
        return logsumexp(log_p) + 2 * math.log(grid[1] - grid[0])

    best = float(model.params_["spread"])
    assert model.log_marginal_likelihood_ == pytest.approx(at(best), abs=1e-4)
    assert at(best) >= max(at(best * 1.02), at(best / 1.02))
