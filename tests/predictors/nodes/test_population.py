"""Draws that are moved to the posterior before those that count: against dense grids."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.special import betaln, logsumexp
from tables import tensor

from bayes_mpt.diagnostics import pareto_k, weight_variance, widening_of
from bayes_mpt.predictors import Importance


def edges(x, y):
    """A density with a ridge at every observation: Laplace's approximation of it has no curvature to go by."""
    b = pyro.sample("b", dist.Normal(y.new_zeros(2), 3.0).to_event(1))
    s = pyro.sample("s", dist.HalfNormal(y.new_tensor(2.0)))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Laplace(b[..., :1] + b[..., 1:] * x, s[..., None]), obs=y)


def of_edges(x, y):
    a, b, v = np.linspace(-4, 5, 121), np.linspace(-4, 4, 121), np.linspace(-3, 2.5, 61)
    off = np.abs(y - a[:, None, None] - b[:, None] * x).sum(-1)[..., None]
    log_p = (
        -len(y) * (math.log(2) + v) - off * np.exp(-v) + math.log(2) + stats.norm.logpdf(np.exp(v), 0, 2) + v
    )
    log_p += stats.norm.logpdf(a, 0, 3)[:, None, None] + stats.norm.logpdf(b, 0, 3)[:, None]
    return logsumexp(log_p) + sum(math.log(grid[1] - grid[0]) for grid in (a, b, v))


def neck(y):
    v = pyro.sample("v", dist.Normal(y.new_zeros(()), 3.0))
    z = pyro.sample(
        "z", dist.StudentT(y.new_tensor(1e6), 0.0, (v / 2).exp()[..., None]).expand([2]).to_event(1)
    )
    pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)


def of_neck(y):
    v = np.linspace(-25, 25, 20001)
    log_p = stats.norm.logpdf(v, 0, 3) + stats.norm.logpdf(y[:, None], 0, np.sqrt(1 + np.exp(v))).sum(0)
    return logsumexp(log_p) + math.log(v[1] - v[0])


RNG = np.random.default_rng(0)
X = RNG.normal(size=12)
CASES = {
    "edges": (edges, of_edges, (X, 0.5 + X + RNG.laplace(size=12))),
    "neck": (neck, of_neck, (np.array([0.9, -0.3]),)),
}


def z_of(program, args, truth, n_reads, n_draws=1000):
    """What each of many numbers is off in units of its stated error, and these numbers."""
    args = tuple(tensor(a) for a in args)
    torch.manual_seed(0)
    bound = Importance(n_draws).bind(program, args)
    found = [bound.read(args).evidence() for _ in range(n_reads)]
    return np.array([(float(e.by_row.sum()) - truth) / e.se for e in found]), found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n_reads"), [("edges", 20), ("neck", 6)])
def test_the_error_is_small_and_covers_the_truth(name, n_reads):
    program, truth, data = CASES[name]
    z, found = z_of(program, data, truth(*data), n_reads)
    assert max(e.se for e in found) < 0.05
    assert np.median([e.se for e in found]) < 0.025
    # the mean square of n standard normals is between these but for two in a thousand
    low, high = stats.chi2(n_reads).ppf([0.001, 0.999]) / n_reads
    assert low < np.square(z).mean() < high
    assert abs(z.mean()) < 3.3 / math.sqrt(n_reads)
    assert max(e.diagnostics["pareto_k"] for e in found) < 0.7


@pytest.mark.slow
def test_draws_of_the_prior_are_no_noise():
    """A coin: nine tenths of the draws lie where the posterior is, and the others weigh nearly nothing."""
    x = np.array([1.0] * 50 + [0.0] * 50)

    def coin(x):
        p = pyro.sample("p", dist.Beta(x.new_tensor(1.0), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Bernoulli(p), obs=x)

    z, found = z_of(coin, (x,), betaln(51, 51), 40, 200)
    low, high = stats.chi2(40).ppf([0.001, 0.999]) / 40
    assert low < np.square(z).mean() < high
    plain = np.sqrt([1 / e.diagnostics["ess_min"] - 1 / 200 for e in found])  # as if all were of one law
    assert np.median([e.se for e in found] / plain) < 0.85


@pytest.mark.parametrize(("n_single", "most"), [(0, 1.06), (5, 1.25)])
def test_the_variance_of_a_mean_of_strata_is_that_of_many_such_means(n_single, most):
    """p = N(0, 1) by 60 draws of N(0, 1.2), 30 of N(3, 1), 10 of N(0, 20), and one of each of more."""
    rng, n = np.random.default_rng(0), np.array([60, 30, 10] + n_single * [1])
    loc, scale = np.r_[0, 3, 0, np.arange(n_single) - 2.0], np.r_[1.2, 1, 20, np.ones(n_single)]
    of = np.repeat(np.arange(len(n)), n)
    u = loc[of][:, None] + scale[of][:, None] * rng.normal(size=(len(of), 4000))
    q = sum(n[h] / len(of) * stats.norm.pdf(u, loc[h], scale[h]) for h in range(len(n)))
    w = stats.norm.pdf(u) / q
    share = torch.as_tensor(w / w.sum(0))
    stated, plain = (weight_variance(share, h).mean() for h in (torch.as_tensor(of), None))
    truth = np.log(w.mean(0)).var()
    assert w.mean() == pytest.approx(1, abs=4 * math.sqrt(truth / 4000))
    # of those that are taken together what lies between them counts too
    assert 0.94 < stated / truth < most
    assert plain > 1.5 * truth


@pytest.mark.parametrize(("k", "least"), [(0.2, 0.8), (0.5, 0.8), (0.6, 0.8)])
def test_the_error_of_weights_without_a_variance_is_widened(k, least):
    """Pareto weights u^-k, whose mean is 1 / (1 - k)."""
    w = np.random.default_rng(0).uniform(size=(1000, 2000)) ** -k
    share = w / w.sum(0)
    variance = np.square(share).sum(0) - 1 / 1000
    off = np.log(w.mean(0) * (1 - k)) + variance / 2
    widening = np.array([widening_of(found) for found in pareto_k(np.log(w))])
    plain, wide = (float(np.sqrt((off**2 / variance / f**2).mean())) for f in (1, widening))
    assert least < wide <= 1.25
    assert k < 0.6 or plain > 1.25
