"""Rules of nodes: weights that are numbers however many nodes there are."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import betaln

from bayes_mpt.predictors import Quadrature
from bayes_mpt.predictors.nodes.rules import hermite


@pytest.mark.parametrize("n_nodes", [1, 2, 16, 64, 256, 512, 1024])
def test_a_rule_integrates_polynomials_under_a_gaussian(n_nodes):
    t, log_w = hermite(1, n_nodes)
    # E[t^(2k)] of a standard normal is 2^k Gamma(k + 1/2) / sqrt(pi)
    density = np.exp(log_w.numpy() - 0.5 * np.square(t[:, 0].numpy())) / math.sqrt(2 * math.pi)
    for k in range(min(n_nodes, 20)):
        moment = 2**k * math.gamma(k + 0.5) / math.sqrt(math.pi)
        assert float(density @ t[:, 0].numpy() ** (2 * k)) == pytest.approx(moment, rel=5e-13)


def test_a_rule_of_two_axes_is_a_product():
    t, log_w = hermite(2, 5)
    density = torch.exp(log_w - 0.5 * t.square().sum(1)) / (2 * math.pi)
    assert float(density.sum()) == pytest.approx(1, rel=1e-13)
    assert float(density @ (t[:, 0] ** 2 * t[:, 1] ** 4)) == pytest.approx(3, rel=1e-13)


@pytest.mark.parametrize("n_nodes", [128, 256, 500])
def test_many_nodes_give_the_closed_form(n_nodes):
    def coin(x):
        p = pyro.sample("p", dist.Beta(x.new_tensor(2.0), x.new_tensor(3.0)))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Bernoulli(p), obs=x)

    x = torch.tensor([1.0] * 5 + [0.0] * 15, dtype=torch.float64)
    found = Quadrature(n_nodes).bind(coin, (x,)).read((x,)).evidence()  # with twice as many for its error
    assert float(found.by_row) == pytest.approx(betaln(7, 18) - betaln(2, 3), abs=1e-11)
    assert 0 <= found.se < 1e-11
