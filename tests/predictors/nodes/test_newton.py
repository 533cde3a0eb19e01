"""Newton's method of many rows and from many places, and what may be left out of a run at many nodes."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import optimize, special, stats
from tables import tensor

from bayes_mpt.predictors import Quadrature
from bayes_mpt.predictors.nodes import row_nodes
from bayes_mpt.predictors.nodes.adaptive import AdaptiveNodes
from bayes_mpt.predictors.nodes.nearby import Nearby
from bayes_mpt.predictors.nodes.newton import climb, newton
from bayes_mpt.program.analysis import analyze
from bayes_mpt.program.arguments import Args
from bayes_mpt.program.program import NotPositiveDefinite


@pytest.mark.parametrize("away", [1e2, 1e4, -1e5])
def test_rows_far_from_their_modes_arrive(away):
    """log p = -sqrt(1 + (u - m)^2) is nearly straight far out, where steps are as long as they may be."""
    mode = tensor([[3.0], [-2.0]])

    def log_prob(u, nodes):
        return -(1 + (u - mode).square().sum(-1)).sqrt()

    found = newton(log_prob, tensor([[[away], [-2.0]]]), 100, 1e-12)
    np.testing.assert_allclose(found.mode[0], mode, atol=1e-8)


def test_a_row_whose_first_steps_are_too_long_takes_the_longest_that_climbs():
    """log p = u - exp(u), from far below its mode 0, where a step of Newton goes a long way beyond it."""
    found = newton(
        lambda u, nodes: (u - u.exp()).sum(-1), tensor([[[-30.0], [0.1]], [[2.0], [-3.0]]]), 100, 1e-12
    )
    np.testing.assert_allclose(found.mode, 0.0, atol=1e-8)
    np.testing.assert_allclose(found.root, 1.0, atol=1e-6)


def test_a_far_top_is_climbed_and_a_far_ridge_given_up():
    """Two tops of equal mass 2000 apart, from half way to each; and a shelf 400 nats below that rises for ever."""
    tops, asked = tensor([[0.0], [2000.0]]), []

    def log_prob(u):
        asked.append(len(u))
        near = torch.stack([-0.5 * (u - top).square().sum(-1) for top in tops])
        shelf = -400 + 1e-3 * (1 + (u + 9e5).square().sum(-1)).log()
        return torch.cat([near, shelf[None]]).logsumexp(0)

    peaks = climb(log_prob, tensor([[20.0], [1980.0], [-5e4]]), 60, 1e-12)
    assert peaks.top.tolist() == [True, True, False]
    np.testing.assert_allclose(peaks.u[:2], tops, atol=1e-6)
    assert sum(asked) < 200


@pytest.mark.parametrize("size", [1.0, 1e6])
def test_tops_beside_a_saddle_are_as_wide_as_latents_are_large(size):
    """Two Gaussians at -2 and 2 of one axis have tops at u = 2 tanh(2 u), between them a saddle at 0."""

    def log_prob(u):
        z, centre = u / size, u.new_tensor([2.0, 0.0])
        return torch.stack([-0.5 * (z - s * centre).square().sum(-1) for s in (-1, 1)]).logsumexp(0)

    at = optimize.brentq(lambda u: u - 2 * np.tanh(2 * u), 1.0, 3.0)
    peaks = climb(log_prob, size * tensor([[0.0, 0.1], [1.0, 40.0], [-30.0, -3.0]]), 60, 1e-14)
    assert peaks.top.tolist() == [False, True, True]
    np.testing.assert_allclose(peaks.u / size, [[0, 0], [at, 0], [-at, 0]], atol=1e-6)
    along = [3.0, *[1 - 4 / np.cosh(2 * at) ** 2] * 2]  # curvatures, of the saddle without its sign
    width = (peaks.root / size) @ (peaks.root / size).mT
    np.testing.assert_allclose(width, [np.diag([1 / c, 1.0]) for c in along], atol=1e-5)


def test_components_at_a_million_have_the_evidence_of_those_at_one():
    """Of two equal components p(x) = integral of prod mixture(x_n) over both means, by a grid, at 1e6 times less."""
    size, x = 1e6, np.array([-2.7, -2.0, -1.2, -0.4, 0.8, 1.1, 1.9, 2.5])

    def two(x):
        with pyro.plate("components", 2):
            mean = pyro.sample("mean", dist.Normal(x.new_zeros(()), 3 * size))
        with pyro.plate("rows", len(x)):
            k = pyro.sample("k", dist.Categorical(x.new_ones(2)))
            pyro.sample("x", dist.Normal(mean[k], size), obs=x[:, 0])

    u = np.linspace(-12, 12, 241)
    by_mean = stats.norm.pdf(x, u[:, None], 1.0)  # (U, N)
    joint = np.log(0.5 * (by_mean[:, None] + by_mean)).sum(-1)  # (U, U)
    prior = stats.norm.logpdf(u, 0.0, 3.0) + np.log(u[1] - u[0])
    truth = special.logsumexp(joint + prior[:, None] + prior) - len(x) * np.log(size)
    found = Quadrature().bind(two, (tensor(size * x[:, None]),)).read((tensor(size * x[:, None]),)).evidence()
    np.testing.assert_allclose(float(found.by_row.sum()), truth, atol=1e-5)
    assert found.se < 1e-4


def without_noise(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(z, s), obs=x)


def test_a_node_without_noise_has_no_density_and_leaves_the_others_alone():
    x = tensor([0.3, -0.2, 0.9])
    adaptive, args = AdaptiveNodes(without_noise, Args((x,)), analyze(without_noise, (x,))), Args((x,))
    everything = torch.ones(3, dtype=torch.bool)

    def log_joint(log_s):
        given, part, _ = adaptive.at(args, tensor(log_s)[:, None, None])
        return (given.log_joint(x[None], everything) + part)[:, 0]

    with torch.no_grad(), pyro.validation_enabled(False):
        found = log_joint([0.2, -800.0, -0.5])
        with pytest.raises(NotPositiveDefinite, match="every token needs noise"):
            log_joint([-800.0])
    for value, log_s in zip(found[[0, 2]], (0.2, -0.5), strict=True):
        cov = 1 + np.exp(2 * log_s) * np.eye(3)
        want = (
            stats.multivariate_normal(np.zeros(3), cov).logpdf(x)
            + stats.halfnorm.logpdf(np.exp(log_s))
            + log_s
        )
        assert float(value) == pytest.approx(want, abs=1e-12)
    assert float(found[1]) == -np.inf


@pytest.mark.slow
def test_rows_go_by_parts_of_the_nodes(monkeypatch):
    def program(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            level = pyro.sample("level", dist.Normal(mean[..., None], 1.0))
            pyro.sample("x", dist.Poisson(level.exp()), obs=x)

    x = tensor([0.0, 2.0, 1.0])
    found = []
    for cells in (row_nodes.CELLS, 1):
        monkeypatch.setattr(row_nodes, "CELLS", cells)
        read = Quadrature(8).bind(program, (x,)).read((x,))
        posterior = read.posterior()
        found.append(
            [float(read.score()), *posterior.mean.flatten().tolist(), *posterior.tokens.flatten().tolist()]
        )
    assert found[1] == pytest.approx(found[0], abs=1e-12)


def test_climbs_begin_where_modes_move_to():
    """Modes on a plane are told exactly at other values, and no farther out than these have moved."""
    generator = torch.Generator().manual_seed(0)
    known, new = (torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in (40, 10))
    plane = torch.randn(2, 6, generator=generator, dtype=torch.float64)

    def modes(v):
        return ((v.sign() * v.abs().log1p()) @ plane).unflatten(1, (3, 2))

    nearby = Nearby()
    nearby.keep({"v": known}, modes(known))
    torch.testing.assert_close(nearby.start({"v": new}, (3, 2)), modes(new), rtol=0, atol=1e-12)
    far = nearby.start({"v": 1e9 * new}, (3, 2))
    assert bool((far.abs() <= 3 * modes(known).abs().amax(0)).all())
