"""A narrow window that holds the mass, where the density is flat elsewhere and no climb leads."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import norm

from bayes_mpt import BayesMPT
from bayes_mpt.predictors.choice import choose
from bayes_mpt.warnings import MissedModeWarning

Y = np.random.default_rng(0).normal(size=10)


def window(centre, height=3.0):
    def model(x):
        a = pyro.sample("a", dist.Normal(x.new_tensor(0.0), 1.0))
        mean = torch.where((a - centre).abs() < 0.01, 0.0, height + 0.1 * a.tanh())
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(mean.to(x), 1.0), obs=x[:, 0])

    return model


def dense(centre, y, height=3.0):
    """By Gauss and Legendre's rule between the ends of the window."""
    ends = np.unique(np.r_[np.linspace(-9, 9, 73), centre - 0.01, centre + 0.01])
    t, w = np.polynomial.legendre.leggauss(12)
    half = 0.5 * np.diff(ends)[:, None]
    a, w = (half * t + ends[:-1, None] + half).ravel(), (half * w).ravel()
    mean = np.where(abs(a - centre) < 0.01, 0.0, height + 0.1 * np.tanh(a))
    return logsumexp(norm.logpdf(y[:, None], mean).sum(0) + norm.logpdf(a) + np.log(w))


@pytest.mark.parametrize("centre", [0.37, -2.4])
def test_a_window_that_holds_the_mass_is_found(centre):
    found = BayesMPT(window(centre)).fit(Y[:, None])
    assert found.log_marginal_likelihood_ == pytest.approx(dense(centre, Y), abs=1e-8)
    assert 0 < found.log_marginal_likelihood_se_ < 1e-8


def test_conditionals_see_it_too():
    read = choose(window(0.37), (torch.as_tensor(Y[:, None]),)).read((torch.as_tensor(Y[:, None]),))
    read.score()  # of all tokens, for which it is looked for
    few = torch.arange(10) < 8
    with torch.no_grad():
        found = float(read.conditionals(few[None])[0, 0, 9])
    want = dense(0.37, np.r_[Y[:8], Y[9]]) - dense(0.37, Y[:8])
    assert found == pytest.approx(want, abs=1e-8)


def test_a_window_of_two_latents_is_warned_of():
    def model(x, width):
        a = pyro.sample("a", dist.Normal(x.new_tensor(0.0), 1.0))
        b = pyro.sample("b", dist.Normal(x.new_tensor(0.0), 1.0))
        mean = torch.where((a - 0.37).abs() < width, 0.0, 3.0 + 0.1 * (a + b).tanh())
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(mean.to(x), 1.0), obs=x[:, 0])

    with pytest.warns(MissedModeWarning, match="spread like the prior one is .* nats higher than all around"):
        found = BayesMPT(lambda x: model(x, 0.01)).fit(Y[:, None])
    assert np.isnan(found.log_marginal_likelihood_se_)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert BayesMPT(lambda x: model(x, 0.0)).fit(Y[:, None]).log_marginal_likelihood_se_ < 1e-3
