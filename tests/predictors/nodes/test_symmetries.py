"""Symmetries that are found by evaluation, and the images of a mode under them."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from tables import tensor

from bayes_mpt.predictors import Quadrature
from bayes_mpt.predictors.nodes.adaptive import AdaptiveNodes
from bayes_mpt.predictors.nodes.modes import ModeSearch
from bayes_mpt.predictors.nodes.symmetries import Coordinates, Moves, Symmetry, orbit
from bayes_mpt.program.analysis import analyze
from bayes_mpt.program.arguments import Args


def modes(program, *args):
    rows = Args(args)
    adaptive = AdaptiveNodes(program, rows, analyze(program, args))
    x = torch.cat([a.reshape(-1) for a in args])[None]
    return ModeSearch(adaptive).find(rows, x, torch.ones(x.shape[1], dtype=torch.bool)), adaptive


def weights_and_means(x):
    weight = pyro.sample("weight", dist.Dirichlet(x.new_full((2,), 2.0)))
    mu = pyro.sample("mu", dist.Normal(x.new_zeros(2), 5.0).to_event(1))
    with pyro.plate("rows", len(x)):
        each = dist.Normal(mu[..., None, :], 1.0)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weight[..., None, :]), each), obs=x)


def one_weight(x):
    weight = pyro.sample("weight", dist.Beta(x.new_tensor(2.0), 2.0))
    first = pyro.sample("first", dist.Normal(x.new_zeros(()), 5.0))
    second = pyro.sample("second", dist.Normal(x.new_zeros(()), 5.0))
    with pyro.plate("rows", len(x)):
        both = torch.stack([weight, 1 - weight], -1)[..., None, :]
        each = dist.Normal(torch.stack([first, second], -1)[..., None, :], 1.0)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(both), each), obs=x)


@pytest.mark.parametrize("program", [weights_and_means, one_weight])
def test_components_change_places_with_their_weights(program):
    """Of a simplex two entries; of a single weight w and 1 - w, with the means of two sites."""
    rng = np.random.default_rng(0)
    x = tensor(np.concatenate([rng.normal(-3, 1, 6), rng.normal(3, 1, 14)]))
    found, adaptive = modes(program, x)
    assert len(found.mode) == 2
    assert len(found.orbits.moves[0].order) == 2  # the second is the first one's image
    values, _ = adaptive.space.values(found.mode)
    names = ("mu",) if program is weights_and_means else ("first", "second")
    means = torch.cat([values[n].reshape(2, -1) for n in names], -1)
    torch.testing.assert_close(means[0], means[1].flip(0), atol=1e-6, rtol=0)
    share = values["weight"].reshape(2, -1)
    torch.testing.assert_close(share[0, 0], 1 - share[1, 0], atol=1e-6, rtol=0)
    # roots and masses are those of the images: the log joint falls alike around both
    u = found.mode[:, 0] + 0.1 * found.root[:, 0, :, 0]
    data = x[None]
    everything = torch.ones(data.shape[1], dtype=torch.bool)
    at = adaptive.log_prob(Args((x,)), data, everything, u[:, None])[:, 0]
    log_det = adaptive.space.values(u[:, None])[1][:, 0] - adaptive.space.values(found.mode)[1][:, 0]
    top = adaptive.log_prob(Args((x,)), data, everything, found.mode)[:, 0]
    fall = at - log_det - top
    assert float(fall[0]) == pytest.approx(float(fall[1]), abs=1e-3)


def test_images_are_mapped_through_the_simplex():
    """Roots of images are the map's slope times the root, by finite differences."""
    x = tensor(np.random.default_rng(0).normal(size=5))
    _, adaptive = modes(weights_and_means, x)
    where = Coordinates(adaptive.space)
    assert not where.linear
    swap = Moves.of([Symmetry(torch.tensor([1, 0, 3, 2]), torch.ones(4))])
    u, step = tensor([0.3, -1.0, 2.0]), 1e-6
    _, slope = where.images(u, torch.eye(3, dtype=u.dtype), swap)
    for axis in range(3):
        e = torch.zeros(3, dtype=u.dtype)
        e[axis] = step
        wanted = (where.move((u + e)[None], swap)[0] - where.move((u - e)[None], swap)[0])[0, 0] / (2 * step)
        torch.testing.assert_close(slope[0, :, axis], wanted, atol=1e-6, rtol=0)
    _, log_det = where.move(u[None], swap)
    assert float(log_det) == pytest.approx(float(torch.linalg.slogdet(slope[0])[1]), abs=1e-9)


def test_signs_of_columns():
    """Two columns of loadings with free signs, in one order alone by different priors: four images of one mode."""
    rng = np.random.default_rng(0)
    w = np.array([[1.5, 0.0], [0.0, 1.0]])
    x = tensor(rng.normal(size=(30, 2)) @ w.T + 0.3 * rng.normal(size=(30, 2)))

    def program(x):
        w = pyro.sample("w", dist.Normal(x.new_zeros(2, 2), x.new_tensor([2.0, 1.0])).to_event(2))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample(
                "x", dist.Normal((w[..., None, :, :] * z[..., None, :]).sum(-1), 0.3).to_event(1), obs=x
            )

    read = Quadrature(4).bind(program, (x,)).read((x,))
    found = read.last.located
    assert len(found.mode) % 4 == 0
    signs = {tuple(m.sign().int().tolist()) for m in found.mode[:4, 0]}
    assert len(signs) == 4


def test_no_symmetry_where_priors_differ():
    x = tensor(np.random.default_rng(0).normal(size=10) * 3)

    def program(x):
        mu = pyro.sample("mu", dist.Normal(x.new_tensor([-1.0, 1.0]), 5.0).to_event(1))
        with pyro.plate("rows", len(x)):
            each = dist.Normal(mu[..., None, :], 1.0)
            pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(x.new_ones(2)), each), obs=x)

    found, _ = modes(program, x)
    assert all(len(by.order) == 1 for by in found.orbits.moves)


def test_orbits_hold_distinct_images_alone():
    """Six numbers in any order: 720 images; of equal numbers one, of two values 15; and no more than 720."""
    where = object.__new__(Coordinates)
    where.parts, where.width, where.size, where.free = [], 6, 6, torch.ones(6, dtype=torch.bool)
    swaps = []
    for i in range(6):
        for j in range(i):
            order = torch.arange(6)
            order[i], order[j] = j, i
            swaps.append(Symmetry(order, torch.ones(6)))
    root = 0.1 * torch.eye(6, dtype=torch.float64)
    for mode, n in (
        (torch.arange(6.0), 720),
        (torch.ones(6), 1),
        (tensor([0, 0, 1, 1, 1, 1]), math.comb(6, 2)),
    ):
        found = orbit(where, swaps, mode.double(), root)
        assert len(found.elements) == len(found.images) == found.n_images == n
        assert found.whole
    # with signs 2^6 6! images, of which few are within 10 standard deviations; of two equal numbers half as many
    flip = Symmetry(torch.arange(6), torch.tensor([-1.0, 1, 1, 1, 1, 1]))
    found = orbit(where, [*swaps, flip], torch.arange(6.0).double() + 1, 2 * root)
    assert found.n_images == 64 * 720
    assert found.whole
    assert 5 < len(found.images) < 100
    assert orbit(where, [*swaps, flip], tensor([1, 1, 2, 3, 4, 5]), root).n_images == 32 * 720
