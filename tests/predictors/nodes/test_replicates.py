"""Several latents that jump together: draws with an honest error, against closed forms."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import norm

from bayes_mpt import BayesMPT
from bayes_mpt.predictors.nodes.mixture import Modes
from bayes_mpt.predictors.nodes.newton import LaplaceApproximation
from bayes_mpt.predictors.nodes.replicates import by_replicates

F64 = torch.float64
CUT = 0.1


def truth(high, low):
    """Of a step from one log-likelihood to another where a + b, normal with variance 2, is greater than the cut."""
    z = CUT / np.sqrt(2)
    return np.logaddexp(norm.logsf(z) + high, norm.logcdf(z) + low)


def test_errors_cover_the_truth_of_twenty_densities_and_are_small():
    high, low = np.random.default_rng(0).normal(size=(2, 20))
    mode, root = torch.full((20, 2), 0.2, dtype=F64), 1.1 * torch.eye(2, dtype=F64).expand(20, 2, 2)

    def log_prob(u, nodes):
        up = torch.where(u.sum(-1) > CUT, torch.as_tensor(high), torch.as_tensor(low))
        return dist.Normal(0.0, 1.0).log_prob(u).sum(-1) + up

    found, k = by_replicates(log_prob, Modes.one(LaplaceApproximation(mode, root)), 50)
    assert k < 0.7
    off = (found.log_z.numpy() - truth(high, low)) / found.error.numpy()
    assert 0.6 < np.sqrt(np.mean(off**2)) < 1.25
    assert (found.error > 0).all() and (found.error < 0.02).all()


@pytest.mark.parametrize("by_row", [False, True])
def test_two_latents_that_jump_together(by_row):
    y = np.random.default_rng(0).normal(size=6)

    def model(x):
        def both():
            a = pyro.sample("a", dist.Normal(x.new_tensor(0.0), 1.0))
            b = pyro.sample("b", dist.Normal(x.new_tensor(0.0), 1.0))
            return torch.where(a + b > CUT, 1.0, -1.0).to(x)

        mean = None if by_row else both()
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(both() if by_row else mean, 1.0), obs=x[:, 0])

    high, low = norm.logpdf(y, 1), norm.logpdf(y, -1)
    want = truth(high, low).sum() if by_row else truth(high.sum(), low.sum())
    found = BayesMPT(model).fit(y[:, None])
    assert 0 < found.log_marginal_likelihood_se_ < 0.02
    assert abs(found.log_marginal_likelihood_ - want) < 3 * found.log_marginal_likelihood_se_


def test_weights_without_a_variance_are_told():
    mode, root = torch.zeros(1, 2, dtype=F64), 0.3 * torch.eye(2, dtype=F64)[None]

    def log_prob(u, nodes):
        return dist.StudentT(1.0, 0.0, 1.0).log_prob(u).sum(-1)

    assert by_replicates(log_prob, Modes.one(LaplaceApproximation(mode, root)), 50)[1] > 0.7
