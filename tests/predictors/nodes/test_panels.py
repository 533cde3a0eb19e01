"""Densities that jump or bend: integrals against scipy's with the places named, and what smooth ones do not pay."""

import math
from itertools import pairwise

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from bayes_mpt import BayesMPT
from bayes_mpt.predictors.nodes import panel_nodes
from bayes_mpt.predictors.nodes.panels import roughness

F64 = torch.float64
Y = np.random.default_rng(0).normal(size=10)
MEANS = {  # of a latent for torch and numpy, and where they jump or bend
    "step in the middle": (lambda a: torch.where(a > 0.02, 1.0, -1.0), lambda a: 1 - 2 * (a <= 0.02), [0.02]),
    "step between nodes": (lambda a: torch.where(a > 0.1, 1.0, -1.0), lambda a: 1 - 2 * (a <= 0.1), [0.1]),
    "step far out": (lambda a: torch.where(a > 2.5, 1.0, -1.0), lambda a: 1 - 2 * (a <= 2.5), [2.5]),
    "round": (torch.round, np.round, np.arange(-8, 8) + 0.5),
    "abs": (lambda a: (a - 0.3).abs(), lambda a: abs(a - 0.3), [0.3]),
    "relu": (lambda a: (a - 0.1).relu(), lambda a: max(a - 0.1, 0.0), [0.1]),
    "clamp": (lambda a: a.clamp(-0.2, 0.2), lambda a: min(max(a, -0.2), 0.2), [-0.2, 0.2]),
    "steep": (lambda a: (20 * (a - 0.1)).tanh(), lambda a: math.tanh(20 * (a - 0.1)), [0.0, 0.1, 0.2]),
}
ROOT = math.sqrt(2 * math.pi)


def log_normal(x, mean=0.0, scale=1.0):
    return -0.5 * ((x - mean) / scale) ** 2 - np.log(scale * ROOT)


def log_integral(log_f, places, reach=9.0):
    places = [p for p in sorted(places) if abs(p) < reach]
    top = max(log_f(z) for z in [*np.linspace(-2, 2, 21), *places])
    ends = [-reach, *places, reach]
    parts = [
        quad(lambda z: math.exp(log_f(z) - top), low, high, epsabs=1e-13, epsrel=1e-12, limit=200)[0]
        for low, high in pairwise(ends)
    ]
    return top + math.log(sum(parts))


def check(model, want, most=1e-6, y=Y):
    found = BayesMPT(model).fit(y[:, None])
    error = abs(found.log_marginal_likelihood_ - want)
    assert error < 3 * found.log_marginal_likelihood_se_ + 1e-12 * abs(want)
    assert 0 < found.log_marginal_likelihood_se_ < most
    return found


@pytest.mark.parametrize("kind", MEANS)
def test_a_shared_latent_that_jumps_or_bends(kind):
    mean, same, places = MEANS[kind]

    def model(x):
        a = pyro.sample("a", dist.Normal(x.new_tensor(0.0), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(mean(a).to(x), 1.0), obs=x[:, 0])

    check(model, log_integral(lambda a: log_normal(a) + log_normal(Y, same(a)).sum(), places))


@pytest.mark.parametrize("kind", ["step between nodes", "abs", "steep"])
def test_a_latent_of_every_row(kind):
    mean, same, places = MEANS[kind]

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.sample("y", dist.Normal(mean(z).to(x), 1.0), obs=x[:, 0])

    y = Y[:4]

    def of_row(v):
        return log_integral(lambda z: log_normal(z) + log_normal(v, same(z)), places)

    want = [of_row(v) for v in y]
    found = check(model, sum(want), y=y)
    np.testing.assert_allclose(found.score_samples(y[:, None]), want, atol=1e-8)


def test_rows_whose_densities_end_at_edges():
    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.sample("y", dist.Uniform(z - 1, z + 1, validate_args=False), obs=x[:, 0])

    y = 0.5 * Y
    check(model, np.log((norm.cdf(y + 1) - norm.cdf(y - 1)) / 2).sum(), y=y)


def step_inside(x):
    scale = pyro.sample("scale", dist.LogNormal(x.new_tensor(0.0), 0.5))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
        pyro.sample("y", dist.Normal(2 * (z > 0.1).to(x), scale), obs=x[:, 0])


def step_in_groups(x):
    scale = pyro.sample("scale", dist.LogNormal(x.new_tensor(0.0), 0.5))
    with pyro.plate("groups", 3):
        z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(2 * (z[torch.arange(6) // 2] > 0.1).to(x), scale), obs=x[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize(("model", "size"), [(step_inside, 1), (step_in_groups, 2)])
def test_latents_of_rows_and_groups_inside_shared_ones(model, size):
    y, up = Y[:6], norm.sf(0.1)

    def log_f(log_scale):
        high, low = (log_normal(y, m, math.exp(log_scale)).reshape(-1, size).sum(1) for m in (2, 0))
        rows = np.logaddexp(math.log(up) + high, math.log1p(-up) + low)
        return log_normal(log_scale, 0, 0.5) + rows.sum()

    # the rule of the shared latent has an error of its own
    check(model, log_integral(log_f, [], 4.0), most=5e-3, y=y)


def test_a_sharp_likelihood_and_an_edge():
    y = Y[:3]

    def sharp(x):
        a = pyro.sample("a", dist.Normal(x.new_tensor(0.0), 10.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Laplace(a, 0.1), obs=x[:, 0])

    def edge(x):
        a = pyro.sample("a", dist.Normal(x.new_tensor(0.0), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Uniform(a - 1, a + 1, validate_args=False), obs=x[:, 0])

    check(
        sharp, log_integral(lambda a: log_normal(a, 0, 10) - (10 * abs(y - a) + math.log(0.2)).sum(), y), y=y
    )
    inside = norm.cdf(y.min() + 1) - norm.cdf(y.max() - 1)
    check(edge, math.log(inside) - 3 * math.log(2), y=y)


def test_smooth_densities_take_no_panels(monkeypatch):
    def never(*args):
        raise AssertionError("panels of a smooth density")

    def model(x):
        scale = pyro.sample("scale", dist.LogNormal(x.new_tensor(0.0), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.StudentT(x.new_tensor(3.0), 0.0, scale), obs=x[:, 0])

    monkeypatch.setattr(panel_nodes.PanelNodes, "find", never)
    assert BayesMPT(model).fit(Y[:, None]).log_marginal_likelihood_se_ < 1e-6


def test_roughness_tells_jumps_and_bends_from_what_is_smooth():
    t = torch.linspace(-5, 5, 51, dtype=F64)
    kinds = [torch.zeros_like(t), torch.sigmoid(2 * t), torch.where(t > 0.1, 0.5, 0.0), -(t - 0.3).abs()]
    found = roughness(torch.stack([-0.5 * t**2 + k for k in kinds], 1)[None])
    assert (found[:2] < 1e-4).all() and (found[2:] > 1e-3).all()
    for k, places, moves in zip(kinds[2:], ([0.1], [0.3]), found[2:], strict=True):
        f = dict(zip(t.tolist(), (-0.5 * t**2 + k).tolist(), strict=True))
        by_rule = math.log(sum(map(math.exp, f.values())) * 0.2)
        jump = places == [0.1]

        def log_f(z, jump=jump):
            return -0.5 * z * z + (0.5 * (z > 0.1) if jump else -abs(z - 0.3))

        assert abs(by_rule - log_integral(log_f, places)) <= float(moves) + 1e-6
