"""Means that are affine in a latent on one side alone, or outside of a narrow window: no closed form in silence."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.integrate import quad
from scipy.special import logsumexp
from scipy.stats import norm

from bayes_mpt import BayesMPT

KINKS = {
    "clamped above": (lambda a: a.clamp(max=2.0), lambda a: np.minimum(a, 2.0)),
    "clamped below": (lambda a: a.clamp(min=-2.0), lambda a: np.maximum(a, -2.0)),
    "saturated": (lambda a: a - torch.relu(a - 1.6), lambda a: np.minimum(a, 1.6)),
}


@pytest.mark.parametrize("kink", KINKS)
@pytest.mark.parametrize("side", [-1, 1])
def test_a_kink_on_either_side_is_seen(kink, side):
    of_tensor, of_array = KINKS[kink]
    y = side * np.array([3.0, 3.2])

    def program(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(of_tensor(a), 0.5), obs=x[:, 0])

    def joint(a):
        return norm.pdf(a) * np.exp(norm.logpdf(y, of_array(a), 0.5).sum() + 10)

    truth = np.log(quad(joint, -9, 9, points=[-2, 1.6, 2], epsabs=0, limit=200)[0]) - 10
    fitted = BayesMPT(program).fit(y[:, None])
    assert 0 < fitted.log_marginal_likelihood_se_ < 0.05
    assert fitted.log_marginal_likelihood_ == pytest.approx(truth, abs=3 * fitted.log_marginal_likelihood_se_)


NARROW = 0.01  # to both sides, between the probes that show an affine map
WINDOWS = {
    "a mean of all rows": (0.37, 3.0, 1.0, 0.0),
    "of each row": (0.37, 6.0, 1.0, 0.0),
    "a scale": (-1.2, 0.0, 9.0, 0.0),
    "a hole in the posterior, where a wide prior has few points": (5.1, -5.0, 1.0, 1.0),
}


@pytest.mark.parametrize("window", WINDOWS)
def test_a_narrow_window_of_another_mean_or_scale_is_seen(window):
    """Outside of it rows have the mean ``slope a + there`` and the scale ``wide``, inside ``slope a`` and 1."""
    middle, there, wide, slope = WINDOWS[window]
    spread = 100.0 if slope else 1.0
    y = np.random.default_rng(0).normal(size=10)

    def program(x):
        a = None if window == "of each row" else pyro.sample("a", dist.Normal(x.new_tensor(0.0), spread))
        with pyro.plate("rows", len(x)):
            a = pyro.sample("a", dist.Normal(x.new_tensor(0.0), spread)) if a is None else a
            outside = ((a - middle).abs() >= NARROW).to(x)
            mean, scale = slope * a + there * outside, 1 + (wide - 1) * outside
            pyro.sample("x", dist.Normal(mean, scale), obs=x[:, 0])

    ends = np.unique(np.r_[np.linspace(-12, 12, 400), middle - NARROW, middle + NARROW])
    at, weight = np.polynomial.legendre.leggauss(12)
    half = 0.5 * np.diff(ends)[:, None]
    a, log_w = (half * (at + 1) + ends[:-1, None]).ravel(), np.log(half * weight).ravel()
    outside = np.abs(a - middle) >= NARROW
    each = norm.logpdf(y[:, None], slope * a + there * outside, np.where(outside, wide, 1.0))
    each = each if window == "of each row" else each.sum(0, keepdims=True)
    truth = logsumexp(each + norm.logpdf(a, scale=spread) + log_w, axis=1).sum()
    fitted = BayesMPT(program).fit(y[:, None])
    assert 0 < fitted.log_marginal_likelihood_se_ < 1e-6
    assert fitted.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-8)
