"""Means that are affine in a latent on one side alone, as far as the posterior is: no closed form in silence."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.integrate import quad
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
