"""Evidences from draws or a guide in one of several images of a posterior, against quadrature on a dense grid."""

import math
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import norm

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


def test_a_guide_in_one_labelling_has_no_error():
    def guide(x):
        pyro.sample("mu", dist.Normal(x.new_tensor([-2.0, 2.0]), 0.4).to_event(1))

    with pytest.warns(DrawsWarning, match="the guide draws one of the images alone"):
        assert math.isnan(from_guide(two_means, guide, APART).se)


def test_a_guide_over_both_labellings_keeps_its_error():
    def guide(x):
        pyro.sample("mu", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    found = from_guide(two_means, guide, TOUCHING, n_draws=2000)
    assert 0 < found.se < 0.1
    assert found.log_evidence == pytest.approx(truth_of(of_means(TOUCHING)), abs=3 * found.se)
