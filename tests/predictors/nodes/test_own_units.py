"""Normal latents in units of their own distribution: the same density, and numbers held against grids."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import norm, poisson

from bayes_mpt.predictors import SequentialMonteCarlo
from bayes_mpt.predictors.nodes.adaptive import AdaptiveNodes
from bayes_mpt.predictors.nodes.own_units import InOwnUnits, in_own_units, own_values
from bayes_mpt.program.analysis import analyze
from bayes_mpt.program.arguments import Args
from bayes_mpt.program.factor_runs import read_factors


def walk(x):
    """Levels that wander by a scale of their own, each seen by one count."""
    spread = pyro.sample("spread", dist.Uniform(0.0, 3.0))
    h = pyro.sample("h_0", dist.Normal(0.0, 1.0))
    for t in range(x.shape[1]):
        if t:
            h = pyro.sample(f"h_{t}", dist.Normal(h, spread))
        pyro.sample(f"x_{t}", dist.Poisson(h.exp()), obs=x[0, t])


def vector(x):
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    w = pyro.sample("w", dist.Normal(torch.tensor([1.0, -1.0]), spread).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Laplace(w[..., :1] * w[..., 1:], 1.0), obs=x[:, 0])


def switched(x):
    """The scale is a discrete latent's: told in units of it, w would have one value for each."""
    fast = pyro.sample("fast", dist.Bernoulli(0.3))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    w = pyro.sample("w", dist.Normal(0.0, spread * (1 + fast)))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Laplace(w, 1.0), obs=x[:, 0])


COUNTS = torch.tensor([[1.0, 0.0, 2.0, 1.0, 3.0]], dtype=torch.float64)


def told_of(program, x, names=None):
    args, structure = Args((x,)), analyze(program, (x,))
    plain = AdaptiveNodes(program, args, structure)
    if names is None:
        return plain, in_own_units(plain, args, x.reshape(1, -1))
    return plain, AdaptiveNodes(InOwnUnits(program, names), args, structure)


@pytest.mark.parametrize(
    ("program", "x", "names"),
    [
        (walk, COUNTS, ("h_1", "h_2", "h_3", "h_4")),
        (vector, torch.zeros(3, 1).double(), ("w",)),
    ],
)
def test_the_density_is_that_of_the_program(program, x, names):
    """p(z, x) dz = p(e, x) de, at several points side by side and alone."""
    plain, told = told_of(program, x, names)
    torch.manual_seed(0)
    u = torch.randn(6, told.space.width, dtype=torch.float64)
    values = own_values(told, (x,), u)
    z = plain.space.pack_values(values, 6, 1)[:, 0]

    def log_joint(at, points):
        given, log_det, _ = at.at(Args((x,)), points[:, None])
        return (given.log_joint(x.reshape(1, -1), torch.ones(x.numel(), dtype=torch.bool)) + log_det)[:, 0]

    # of each number that is told, dz / de is the spread
    n_told = sum(told.space.columns[n].stop - told.space.columns[n].start for n in names)
    log_det = n_told * values["spread"].flatten().log()
    torch.testing.assert_close(log_joint(told, u), log_joint(plain, z) + log_det, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_joint(told, u[:1]), log_joint(told, u)[:1], rtol=1e-12, atol=1e-12)
    one = own_values(told, (x,), u[:1])
    assert all(torch.equal(one[n][0], values[n][0]) for n in values)


def test_what_gains_by_it_is_told_so():
    """Few counts: the prior decides of each level. Many: the data do, and levels stay as they are."""
    _, told = told_of(walk, COUNTS)
    assert isinstance(told.model, InOwnUnits)
    assert told.model.names == ("h_1", "h_2", "h_3", "h_4")
    plain, many = told_of(walk, 1e6 * (1 + COUNTS))
    assert many is plain
    plain, other = told_of(switched, torch.zeros(3, 1).double())
    assert other is plain


def test_the_prior_beside_discrete_latents_hides_nothing():
    """Values of a discrete latent add up to one, also where a mask hides its density."""

    def program(x):
        p = pyro.sample("p", dist.Beta(2.0, 3.0))
        with pyro.plate("rows", len(x)), pyro.poutine.mask(mask=torch.tensor([False, True, True])):
            z = pyro.sample("z", dist.Bernoulli(p), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    x = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    value = torch.tensor([0.2, 0.7], dtype=torch.float64)
    factors = read_factors(program, (x,), analyze(program, (x,)), {"p": value[:, None]}, 2)
    torch.testing.assert_close(
        factors.log_prior()[:, 0], dist.Beta(2.0, 3.0).log_prob(value), rtol=1e-6, atol=0
    )


def by_a_grid(counts):
    """log Z, E spread and E h_t of `walk`: forwards and backwards on a grid of levels, for each of many spreads."""
    h = np.linspace(-9, 9, 361)
    node, weight = np.polynomial.legendre.leggauss(40)
    spreads = 1.5 * (node + 1)
    log_z, means = [], []
    seen = poisson.pmf(counts[:, None], np.exp(h))  # five counts: no product of them underflows
    apart = (h[:, None] - h) ** 2  # [to, from]
    for spread in spreads:
        move = np.exp(-0.5 * apart / max(spread, 0.02) ** 2)
        move /= move.sum(0)  # a spread below the grid's step stays where it is
        forward = [norm.pdf(h) * (h[1] - h[0]) * seen[0]]
        for t in range(1, len(counts)):
            forward.append(move @ forward[-1] * seen[t])
        backward = [np.ones_like(h)]
        for t in range(len(counts) - 1, 0, -1):
            backward.insert(0, (seen[t] * backward[0]) @ move)
        log_z.append(np.log(forward[-1].sum()))
        means.append(np.array(forward) * backward @ h / forward[-1].sum())
    log_w = np.log(weight / 2) + log_z
    share = np.exp(log_w - logsumexp(log_w))
    return logsumexp(log_w), share @ spreads, share @ np.array(means)


@pytest.mark.slow
def test_a_funnel_of_levels():
    """Evidence, error and means of the program's own latents."""
    log_z, spread, levels = by_a_grid(COUNTS[0].numpy())
    found = []
    for seed in range(4):
        torch.manual_seed(seed)
        read = SequentialMonteCarlo(num_runs=4).bind(walk, (COUNTS,)).read((COUNTS,))
        evidence = read.evidence()
        found.append((float(evidence.by_row) - log_z, evidence.se))
        if not seed:
            mean = read.posterior().mean[0]
            np.testing.assert_allclose(mean, [spread, *levels], atol=0.15)
            values = read.posterior().shared()
            again = sum(w * float(v["h_4"]) for w, v in values) / sum(w for w, _ in values)
            assert abs(again - levels[4]) < 0.3
    off, se = np.array(found).T
    assert np.all(np.abs(off) < 4 * se)
    assert 0.4 < np.sqrt(np.mean((off / se) ** 2)) < 1.8
    assert se.max() < 0.08
