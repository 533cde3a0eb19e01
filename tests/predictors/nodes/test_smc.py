"""Sequential Monte Carlo: frozen runs, where they start, what they may miss, vague priors, bounds from both sides."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.special import digamma, logsumexp

from bayes_mpt.predictors import Importance, SequentialMonteCarlo, choose
from bayes_mpt.predictors.nodes import path as paths
from bayes_mpt.predictors.nodes import smc
from bayes_mpt.predictors.nodes.adaptive import AdaptiveNodes
from bayes_mpt.predictors.nodes.missed import Shares
from bayes_mpt.predictors.nodes.particles import Target
from bayes_mpt.predictors.nodes.path import Path
from bayes_mpt.predictors.nodes.prior import halved, prior_points
from bayes_mpt.predictors.nodes.reference import Reference
from bayes_mpt.predictors.nodes.two_sided import TwoSided
from bayes_mpt.program.analysis import analyze
from bayes_mpt.program.arguments import Args
from bayes_mpt.program.program import ModelError
from bayes_mpt.warnings import MissedModeWarning, VaguePriorWarning

F64 = torch.float64


def regression(x, y):
    """Latents that could be integrated in closed form, but are not: their plate of rows has a t of them."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal((x * w[..., None, :]).sum(-1), 0.5), obs=y)


def columns(n_rows, width):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n_rows, width, generator=g, dtype=F64) * 2 / math.sqrt(width)
    y = x @ torch.randn(width, generator=g, dtype=F64) + 0.5 * torch.randn(n_rows, generator=g, dtype=F64)
    cov = (x @ x.T + 0.25 * torch.eye(n_rows, dtype=F64)).numpy()
    return (x, y), float(stats.multivariate_normal(np.zeros(n_rows), cov).logpdf(y.numpy()))


def evidence(program, args, seed=0, **settings):
    torch.manual_seed(seed)
    return SequentialMonteCarlo(**settings).bind(program, args).read(args).evidence()


def a_path(program, args, *, modes=True):
    read = SequentialMonteCarlo().bind(program, args).read(args)
    shown = read._shown(~read.value.isnan()[0])
    reference = (
        read._reference(shown)[0] if modes else Reference.of_prior(read.value.new_zeros(1, read.space.width))
    )
    return Path(Target(shown, reference), 1)


# ------------------------------------------------------------------------------------------------------- frozen runs


@pytest.mark.slow
def test_seventy_latents_that_all_rows_share():
    args, truth = columns(30, 70)
    found = evidence(regression, args, num_particles=128)
    assert 0.005 < found.se < 0.1
    assert abs(float(found.by_row) - truth) < 3.5 * found.se


def test_from_the_prior_where_moves_matter(monkeypatch):
    """With moves that are all accepted, or none, the number is tens of errors off."""
    monkeypatch.setattr(smc, "MAX_LOCATED", 0)
    args, truth = columns(12, 10)
    found = evidence(regression, args, num_particles=64)
    assert found.diagnostics["levels"] > 5
    assert 0.02 < found.se < 0.5
    assert abs(float(found.by_row) - truth) < 3.5 * found.se


@pytest.mark.slow
def test_runs_are_unbiased_there_and_back():
    """E Z of few frozen particles is Z, and E 1/Z of runs back from an exact draw is 1/Z: 500 runs, from the prior."""
    args, truth = columns(4, 2)
    x, y = args
    path = a_path(regression, args, modes=False)
    torch.manual_seed(0)
    with torch.no_grad():
        stages, _ = path.pilot(8, 32)
        kept = [(s.temperature, s.step) for s in stages]
        there = path.run(stages, 500, 8).log_z - truth
        assert kept == [(s.temperature, s.step) for s in stages]
        root = torch.linalg.cholesky(torch.linalg.inv(torch.eye(2, dtype=F64) + 4 * x.T @ x))
        exact = 4 * root @ root.T @ x.T @ y + torch.randn(500, 2, dtype=F64) @ root.T
        back = truth - path.back(stages, exact[:, None].expand(-1, 8, -1).clone())
    for ratio in (there.exp(), back.exp()):
        se = float(ratio.std()) / math.sqrt(len(ratio))
        assert 0 < se < 0.2
        assert abs(float(ratio.mean()) - 1) < 3.5 * se


def test_too_many_levels_are_refused(monkeypatch):
    monkeypatch.setattr(smc, "MAX_LOCATED", 0)
    monkeypatch.setattr(paths, "MAX_LEVELS", 3)
    with pytest.raises(ModelError, match="more than 3 temperatures.*'w'"):
        evidence(regression, columns(12, 10)[0])


def test_auto_integrates_many_shared_latents():
    def logistic(x, y):
        w = pyro.sample("w", dist.Normal(x.new_zeros(5), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=(x * w[..., None, :]).sum(-1)), obs=y)

    def trained(x, y):
        shift = pyro.param("shift", x.new_zeros(()))
        w = pyro.sample("w", dist.Normal(x.new_zeros(5), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=shift + (x * w[..., None, :]).sum(-1)), obs=y)

    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    args = x, (x[:, 0] > 0).to(F64)
    assert choose(logistic, args).name == "SequentialMonteCarlo"
    with pyro.get_param_store().scope():
        assert choose(trained, args).name == Importance.__name__


# ------------------------------------------------------------------------------------------------------------- modes


def two_means(x):
    mu = pyro.sample("mu", dist.Normal(x.new_zeros(2), 5.0).to_event(1))
    with pyro.plate("rows", len(x)):
        parts = dist.Normal(mu[..., None, :], 1.0)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(x.new_tensor([0.5, 0.5])), parts), obs=x)


def of_two_means(x):
    grid = np.linspace(-10, 10, 401)
    density = stats.norm.pdf(x[:, None], grid)
    log_p = stats.norm.logpdf(grid, 0, 5)[:, None] + stats.norm.logpdf(grid, 0, 5)
    log_p = log_p + sum(np.log((d[:, None] + d) / 2) for d in density)
    return logsumexp(log_p) + 2 * math.log(grid[1] - grid[0])


APART = np.random.default_rng(0).normal(size=16) + np.repeat([-3.0, 3.0], 8)


@pytest.mark.parametrize("withheld", [False, True])
def test_both_modes_count(withheld, monkeypatch):
    """Also where the search is given one: the pilot's particles find the other."""
    if withheld:
        find = smc.ModeSearch.find

        def one(self, *args):
            found = find(self, *args)
            return found._replace(mode=found.mode[:1], root=found.root[:1], log_mass=found.log_mass[:1])

        monkeypatch.setattr(smc.ModeSearch, "find", one)
    x = torch.as_tensor(APART)
    found = evidence(two_means, (x,), num_particles=128)
    assert 0 < found.se < 0.1
    assert abs(float(found.by_row) - of_two_means(APART)) < 3.5 * found.se
    np.testing.assert_allclose(found.diagnostics["mode_mass"], [0.5, 0.5], atol=0.1)
    assert found.diagnostics["mode_share"].shape == (8, 2)


def test_a_mode_that_few_runs_find_leaves_no_error(monkeypatch):
    """As if three of the runs had found one of the modes, which holds a fifth."""

    def few(*args):
        share = np.array([[0.5, 0.5]] * 3 + [[1.0, 0.0]] * 5)
        return Shares(share, 30 * (share > 0), np.array([0.8, 0.2]))

    monkeypatch.setattr(smc, "shares_of", few)
    with pytest.warns(MissedModeWarning, match="holds 20% of it was found by 3 of 8 runs, from 90 first"):
        found = evidence(two_means, (torch.as_tensor(APART),), num_particles=32)
    assert math.isnan(found.se)


def test_what_counts_as_missed():
    share = np.array([[0.5, 0.5]] * 3 + [[1.0, 0.0]] * 5)
    many = np.full((8, 2), 30)
    few_runs = Shares(share, many * (share > 0), np.array([0.8, 0.2]))
    assert few_runs.missed == (1,) and "20% of it was found by 3 of 8 runs" in few_runs.why
    assert few_runs._replace(mass=np.array([0.97, 0.03])).missed == ()
    everywhere = Shares(np.full((8, 2), 0.5), many, np.array([0.5, 0.5]))
    assert everywhere.missed == ()
    one_ancestor = everywhere._replace(ancestors=np.ones((8, 2), dtype=int))
    assert one_ancestor.missed == (0, 1)
    small = one_ancestor._replace(mass=np.array([0.9, 0.1]))  # .1 / sqrt 8 nats
    assert small.missed == (0,)


def wave(top):
    def program(t, y):
        frequency = pyro.sample("frequency", dist.Uniform(y.new_tensor(0.0), top))
        with pyro.plate("rows", len(t)):
            pyro.sample("y", dist.Normal((2 * math.pi * frequency[..., None] * t).sin(), 0.5), obs=y)

    return program


def of_wave(top, t, y):
    grid = (np.arange(1000 * int(top)) + 0.5) / 1000
    means = (np.sin(2 * math.pi * part * t[:, None]) for part in np.array_split(grid, 50))
    log_p = np.concatenate([stats.norm.logpdf(y[:, None], mean, 0.5).sum(0) for mean in means])
    return logsumexp(log_p) - math.log(len(grid))


def waves(top, seed):
    rng = np.random.default_rng([seed, 7])
    t = np.sort(rng.uniform(0, 3, 40))
    return t, np.sin(2 * math.pi * rng.uniform(0.075 * top, 0.925 * top) * t) + 0.5 * rng.normal(size=40)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [7, 8])
def test_a_hundred_modes_are_all_started_for(seed):
    """A frequency, whose modes climbs find alone: of these data a fixed number of particles missed the heaviest."""
    t, y = waves(40.0, seed)
    found = evidence(wave(40.0), (torch.as_tensor(t), torch.as_tensor(y)), seed)
    assert 0 < found.se < 0.03
    assert abs(float(found.by_row) - of_wave(40.0, t, y)) < 3.5 * found.se


@pytest.mark.slow
def test_a_thousand_modes_are_too_many_to_start_for():
    t, y = waves(400.0, 2)
    with pytest.warns(
        MissedModeWarning, match="climbs have ended at so many places, .* particles that start"
    ):
        found = evidence(wave(400.0), (torch.as_tensor(t), torch.as_tensor(y)), 2)
    assert math.isnan(found.se) and float(found.by_row) < of_wave(400.0, t, y) - 10


# ------------------------------------------------------------------------------------------------------ vague priors


def test_a_gamma_of_shape_1e_4():
    x = np.random.default_rng(0).normal(3, 2, 25)

    def program(x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 10.0))
        tau = pyro.sample("tau", dist.Gamma(x.new_tensor(1e-4), x.new_tensor(1e-4)))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.StudentT(x.new_tensor(4.0), mu, tau.rsqrt()), obs=x)

    mu, log_tau = np.linspace(-5, 11, 401)[:, None], np.linspace(-8, 5, 651)
    log_p = sum(stats.t(4).logpdf((v - mu) * np.exp(log_tau / 2)) + log_tau / 2 for v in x)
    log_p = log_p + stats.norm(0, 10).logpdf(mu) + log_tau
    log_p = log_p + stats.gamma(1e-4, scale=1e4).logpdf(np.exp(log_tau))
    truth = logsumexp(log_p) + math.log((mu[1, 0] - mu[0, 0]) * (log_tau[1] - log_tau[0]))
    with pytest.warns(
        VaguePriorWarning, match="vague prior of latent 'tau': halving its scale changes lml by"
    ):
        found = evidence(program, (torch.as_tensor(x),), 1, num_particles=128)
    assert 0 < found.se < 0.1
    assert abs(float(found.by_row) - truth) < 3.5 * found.se
    # Gamma(1e-4, 2e-4) over Gamma(1e-4, 1e-4) is 2^1e-4 exp(-1e-4 tau)
    tau = float((np.exp(log_p - logsumexp(log_p)) * np.exp(log_tau)).sum())
    change = found.diagnostics["change with half the scale of a vague prior"]["tau"]
    assert change == pytest.approx(1e-4 * (math.log(2) - tau), abs=1e-6)


def test_the_logarithm_of_a_gamma_is_drawn_as_such():
    """Of shape .01, one draw in a thousand is below the smallest floating-point number."""

    def program(x):
        a = pyro.sample("a", dist.Gamma(x.new_tensor([0.01, 2.0]), 3.0).to_event(1))
        b = pyro.sample("b", dist.InverseGamma(x.new_tensor(0.02), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.StudentT(x.new_tensor(4.0), a.sum(-1), b), obs=x)

    x = torch.zeros(3, dtype=F64)
    torch.manual_seed(0)
    u = prior_points(AdaptiveNodes(program, Args((x,)), analyze(program, (x,))), (x,), 4000).numpy()
    want = [digamma(0.01) - math.log(3), digamma(2.0) - math.log(3), -digamma(0.02)]
    np.testing.assert_array_less(abs(u.mean(0) - want), 3.5 * u.std(0) / math.sqrt(len(u)))
    below = (u[:, 0] < -720).mean()  # P(log g < t) = exp(shape (t + log rate)) nearly, far below
    assert below == pytest.approx(math.exp(0.01 * (-720 + math.log(3))), abs=0.002)


# ------------------------------------------------------------------------------------------------- from both sides


def test_the_check_on_simulated_data():
    found = evidence(regression, columns(12, 6)[0], num_particles=64, check=2)
    checks = found.diagnostics["check"]
    assert len(checks) == 2 and found.se > 0
    for c in checks:
        assert 0 < c.lower_se < 0.5 and 0 < c.upper_se < 0.5
        assert abs(c.gap) < 3.5 * math.hypot(c.lower_se, c.upper_se) and not c.misses
    assert TwoSided(-10.0, 0.1, -7.0, 0.1).misses and not TwoSided(-10.0, 1.0, -7.0, 1.0).misses


@pytest.mark.slow
def test_the_check_where_observed_values_are_no_argument():
    def two_sites(x, y):
        a = pyro.sample("a", dist.Normal(x.new_zeros(5), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.StudentT(x.new_tensor(4.0), a[..., :1].sum(-1, keepdim=True), 1.0), obs=x)
            pyro.sample("y", dist.StudentT(x.new_tensor(4.0), a.sum(-1, keepdim=True), 1.0), obs=y.log())

    g = torch.Generator().manual_seed(0)
    args = torch.randn(8, generator=g, dtype=F64), torch.rand(8, generator=g, dtype=F64)
    (c,) = evidence(two_sites, args, num_particles=64, check=True).diagnostics["check"]
    assert abs(c.gap) < 3.5 * math.hypot(c.lower_se, c.upper_se) < 1


@pytest.mark.slow
def test_the_check_sees_a_mode_that_runs_and_climbs_miss(monkeypatch):
    """A frequency in a range of thousands of aliases, over which few particles start: the truth of the data that the
    check has simulated, on a grid, is between its bounds, and these are apart."""

    kept, made = [], smc.simulated

    def simulated(*args):
        kept.append(made(*args))
        return kept[-1]

    monkeypatch.setattr(smc, "simulated", simulated)
    rng = np.random.default_rng(0)
    t = np.sort(rng.uniform(0, 3, 40))
    y = np.sin(2 * math.pi * 311.3 * t) + 0.5 * rng.normal(size=40)
    with warnings.catch_warnings(record=True) as told:  # the runs on simulated data warn too
        warnings.simplefilter("always")
        found = evidence(
            wave(400.0), (torch.as_tensor(t), torch.as_tensor(y)), num_particles=32, num_runs=4, check=2
        )
    assert math.isnan(found.se)
    assert any("on data simulated from the prior the runs miss" in str(w.message) for w in told)
    checks = found.diagnostics["check"]
    assert any(c.misses for c in checks)
    for c, (data, _) in zip(checks, kept, strict=True):
        truth = of_wave(400.0, *(a.numpy() for a in data.args))
        assert c.lower - 3 * c.lower_se - 0.05 < truth < c.upper + 3 * c.upper_se + 0.05


def test_check_is_a_number_of_data_sets():
    with pytest.raises(ValueError, match="check must be True, False or a number of data sets, got -1"):
        SequentialMonteCarlo(check=-1).bind(regression, columns(4, 2)[0])


def test_half_the_scale_of_a_vector_is_told_as_that_of_its_numbers():
    """log E[p'(z) / p(z)], p' of half the scale, at a few points."""

    def program(x):
        z = pyro.sample("z", dist.MultivariateNormal(torch.ones(2), 9 * torch.eye(2)))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Laplace(z.sum(-1), 1.0), obs=x[:, 0])

    args = (torch.tensor([[0.4], [1.2]], dtype=torch.float64),)
    adaptive = AdaptiveNodes(program, Args(args), analyze(program, args))
    points = np.array([[0.3, 1.4], [2.0, -0.5]])
    ratio = (stats.norm.logpdf(points, 1, 1.5) - stats.norm.logpdf(points, 1, 3)).sum(1)
    found = halved(adaptive, args, torch.as_tensor(points), "z")
    assert found == pytest.approx(logsumexp(ratio) - np.log(2), abs=1e-12)
