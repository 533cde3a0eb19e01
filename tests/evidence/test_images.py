"""Evidences from draws or a guide in one of several images of a posterior, against quadrature on a dense grid."""

import math
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_value
from scipy.special import logsumexp
from scipy.stats import norm
from scipy.stats import t as t_law

from bayes_mpt.evidence import from_draws, from_guide
from bayes_mpt.evidence.images import group_of
from bayes_mpt.predictors.nodes.symmetries import Symmetry
from bayes_mpt.warnings import DrawsWarning

AXIS = np.linspace(-6, 6, 301)
STEP = AXIS[1] - AXIS[0]
A, B = np.meshgrid(AXIS, AXIS, indexing="ij")
APART = np.random.default_rng(0).normal(np.repeat([-2.0, 2.0], 15), 1)
TOUCHING = np.random.default_rng(1).normal(np.repeat([-0.5, 0.5], 15), 1)
DATA = {"apart": APART, "touching": TOUCHING}


def two_means(x):
    mu = pyro.sample("mu", dist.Normal(x.new_zeros(2), 2.0).to_event(1))
    with pyro.plate("rows", len(x)):
        parts = dist.Normal(mu[..., None, :], 1.0)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(x.new_full((2,), 0.5)), parts), obs=x)


def two_named_means(x):
    """Means of which the first is drawn nearer to zero: no names may change."""
    mu = pyro.sample("mu", dist.Normal(x.new_zeros(2), x.new_tensor([2.0, 2.1])).to_event(1))
    with pyro.plate("rows", len(x)):
        parts = dist.Normal(mu[..., None, :], 1.0)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(x.new_full((2,), 0.5)), parts), obs=x)


def loadings(x):
    """One factor: the loadings may change their sign."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        cov = w[..., None, :, None] * w[..., None, None, :] + 0.5 * torch.eye(2, dtype=x.dtype)
        pyro.sample("x", dist.MultivariateNormal(x.new_zeros(2), cov), obs=x)


PAIRS = np.random.default_rng(2).multivariate_normal(np.zeros(2), [[1.5, 1.0], [1.0, 1.5]], size=20)


def of_means(x, scales=(2, 2)):
    """The log joint of both means on the grid."""
    log_p = norm(0, scales[0]).logpdf(A) + norm(0, scales[1]).logpdf(B)
    for value in x:
        log_p += np.logaddexp(norm(value, 1).logpdf(A), norm(value, 1).logpdf(B)) - math.log(2)
    return log_p


def of_loadings():
    det = 0.25 + 0.5 * (A**2 + B**2)
    square = 2 * np.square(PAIRS).sum()
    cross = sum((A * x + B * y) ** 2 for x, y in PAIRS)
    inverse = square - 4 * cross / (1 + 2 * (A**2 + B**2))  # Sherman and Morrison, noise 1/2
    n = len(PAIRS)
    return norm.logpdf(A) + norm.logpdf(B) - n * math.log(2 * math.pi) - 0.5 * n * np.log(det) - 0.5 * inverse


def truth_of(log_p):
    return logsumexp(log_p) + 2 * math.log(STEP)


def draws_of(rng, log_p, size=(2, 150)):
    """Draws (C, S, 2) of a density on the grid; of a part of it where it is -inf elsewhere."""
    p = np.exp(log_p - logsumexp(log_p)).ravel()
    at = rng.choice(p.size, size=size, p=p)
    return np.stack([A.ravel()[at], B.ravel()[at]], -1) + rng.uniform(-0.5, 0.5, (*size, 2)) * STEP


def in_one(log_p, first=True):
    return np.where((A < B) == first, log_p, -np.inf)


@pytest.mark.parametrize("data", DATA)
def test_draws_in_one_labelling(data):
    log_p, z = of_means(DATA[data]), []
    for seed in range(10):
        # sorted draws of all: a grid cut along its diagonal would leave out the cells on it
        mu = np.sort(draws_of(np.random.default_rng(100 + seed), log_p), -1)
        found = from_draws(two_means, {"mu": mu}, DATA[data], log_joint=False, random_state=seed)
        assert found.n_images == 2 and 0 < found.se < 0.05
        z.append((found.log_evidence - truth_of(log_p)) / found.se)
    assert abs(np.mean(z)) < 0.6 and 0.5 < np.std(z) < 1.4 and np.max(np.abs(z)) < 3


def test_each_chain_in_its_own_labelling():
    log_p, rng = of_means(APART), np.random.default_rng(3)
    mu = np.concatenate([draws_of(rng, in_one(log_p, first), (1, 200)) for first in (True, False)])
    found = from_draws(two_means, {"mu": mu}, APART)
    assert found.n_images == 2 and not found.flags and 0 < found.se < 0.05
    assert found.log_evidence == pytest.approx(truth_of(log_p), abs=3 * found.se)


@pytest.mark.parametrize("data", DATA)
def test_draws_that_are_spread_over_both_labellings(data):
    log_p = of_means(DATA[data])
    found = from_draws(two_means, {"mu": draws_of(np.random.default_rng(4), log_p)}, DATA[data])
    assert found.n_images == 1 and not found.flags and 0 < found.se < 0.1
    assert found.log_evidence == pytest.approx(truth_of(log_p), abs=3 * found.se)


def test_names_that_may_not_change_have_no_image():
    log_p = of_means(TOUCHING, (2, 2.1))
    found = from_draws(two_named_means, {"mu": draws_of(np.random.default_rng(5), log_p)}, TOUCHING)
    assert found.n_images == 1 and 0 < found.se < 0.1
    assert found.log_evidence == pytest.approx(truth_of(log_p), abs=3 * found.se)


def test_draws_of_loadings_of_one_sign():
    log_p = of_loadings()
    w = draws_of(np.random.default_rng(6), np.where(A + B > 0, log_p, -np.inf))
    found = from_draws(loadings, {"w": w}, PAIRS)
    assert found.n_images == 2 and not found.flags and 0 < found.se < 0.05
    assert found.log_evidence == pytest.approx(truth_of(log_p), abs=3 * found.se)


def test_draws_of_other_data_in_one_labelling_have_no_error():
    mu = draws_of(np.random.default_rng(7), in_one(of_means(APART + 0.5)), (2, 300))
    with pytest.warns(DrawsWarning, match="draws of other data, of another prior"):
        assert math.isnan(from_draws(two_means, {"mu": mu}, APART).se)


def test_more_changes_than_can_be_tried_make_no_group():
    signs = [Symmetry(torch.arange(12), 1 - 2 * torch.eye(12)[i]) for i in range(12)]
    assert len(group_of(SimpleNamespace(size=12), signs[:5])) == 32
    assert group_of(SimpleNamespace(size=12), signs) is None


def guide_of(name, loc, scale):
    def guide(x):
        pyro.sample(name, dist.StudentT(8.0, x.new_tensor(loc), scale).to_event(1))

    return guide


GUIDES = {
    "apart": (two_means, guide_of("mu", [-2.0, 2.0], 0.4), APART, of_means(APART), 2),
    "touching": (two_means, guide_of("mu", [-0.3, 0.7], 0.6), TOUCHING, of_means(TOUCHING), 2),
    "over both": (two_means, guide_of("mu", [0.2, 0.2], 0.8), TOUCHING, of_means(TOUCHING), 1),
    "named": (two_named_means, guide_of("mu", [-0.3, 0.7], 0.8), TOUCHING, of_means(TOUCHING, (2, 2.1)), 1),
    "a sign": (loadings, guide_of("w", [0.9, 0.9], 0.3), PAIRS, of_loadings(), 2),
}


def errors_hold(truth, estimate, n_images, seeds=8):
    z = []
    for seed in range(seeds):
        found = estimate(seed)
        assert found.n_images == n_images and not found.flags and 0 < found.se < 0.2
        z.append((found.log_evidence - truth) / found.se)
    assert abs(np.mean(z)) < 0.9 and 0.5 < np.std(z) < 1.6 and np.max(np.abs(z)) < 3.5


@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_in_one_image(name):
    program, guide, x, log_p, n_images = GUIDES[name]

    def estimate(seed):
        return from_guide(program, guide, x, n_draws=500, random_state=seed)

    errors_hold(truth_of(log_p), estimate, n_images)


@pytest.mark.parametrize("auto", [AutoNormal, AutoMultivariateNormal])
def test_an_autoguide_in_one_image(auto):
    """Whose draws are of an auxiliary site, from which those of the program's names are computed."""
    pyro.clear_param_store()
    start = init_to_value(values={"mu": torch.tensor([-2.0, 2.0], dtype=torch.float64)})
    guide = auto(two_means, init_loc_fn=start, init_scale=0.3)
    guide(torch.as_tensor(APART))
    errors_hold(
        truth_of(of_means(APART)), lambda seed: from_guide(two_means, guide, APART, random_state=seed), 2, 6
    )


def test_effects_of_equal_groups_have_one_mode_and_no_factor():
    """Names of groups with equal data may change: the number is that of the one mode, whatever the guide."""

    def effects(y):
        theta = pyro.sample("theta", dist.Normal(y.new_zeros(3), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.StudentT(4.0, theta[..., None, :], 1.0).to_event(1), obs=y)

    y = np.array([[0.3, 0.3, 0.3], [1.0, 1.0, 1.0]])
    grid = np.linspace(-12, 12, 4001)
    one = logsumexp(norm.logpdf(grid) + t_law.logpdf(0.3 - grid, 4) + t_law.logpdf(1 - grid, 4))
    truth = 3 * (one + math.log(grid[1] - grid[0]))
    for loc, n_images in (([0.5, 0.5, 0.5], 1), ([-0.4, 0.5, 1.4], 6)):
        guide = guide_of("theta", loc, 0.8)
        errors_hold(
            truth, lambda seed, guide=guide: from_guide(effects, guide, y, random_state=seed), n_images, 6
        )


def test_a_guide_whose_density_is_not_known_at_other_images_has_no_error():
    def guide(x):
        shift = pyro.sample(
            "shift", dist.Normal(x.new_zeros(2), 0.4).to_event(1), infer={"is_auxiliary": True}
        )
        pyro.sample("mu", dist.Delta(x.new_tensor([-2.0, 2.0]) + shift).to_event(1))

    with pytest.warns(DrawsWarning, match="its density at the others is not known"):
        assert math.isnan(from_guide(two_means, guide, APART).se)
