"""Rules of nodes: weights that are numbers however many nodes there are."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.special import betaln, gammaln, log_expit, logsumexp

from bayes_mpt.predictors import Quadrature
from bayes_mpt.predictors.nodes.rules import alone_rule, hermite, row_rule, stretched


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


def beta_odds(a, b):
    """Log-density of the log odds of Beta(a, b), in units of its mode and curvature there."""
    middle, root = math.log(a / b), math.sqrt((a + b) / (a * b))
    return lambda t: (
        a * log_expit(middle + root * t) + b * log_expit(-middle - root * t) - betaln(a, b) + math.log(root)
    )


@pytest.mark.parametrize(
    ("log_f", "ends", "most"),
    [
        (lambda t: stats.norm.logpdf(t), (8, 8), (1e-6, 1e-9)),
        (
            lambda t: np.logaddexp(stats.norm.logpdf(t), stats.norm.logpdf(t, 4)) - math.log(2),
            (8, 12),
            (1e-5, 1e-9),
        ),
        (lambda t: stats.t(3).logpdf(t), (1000, 1000), (1e-4, 1e-7)),
        (beta_odds(0.05, 0.05), (85, 85), (1e-6, 1e-9)),
        (beta_odds(0.1, 3.1), (90, 4), (1e-4, 1e-6)),
        (beta_odds(0.01, 3.01), (300, 1.5), (1e-3, 1e-4)),
    ],
    ids=["Gaussian", "two Gaussians", "Student-t", "Beta(.05, .05)", "Beta(.1, 3.1)", "Beta(.01, 3.01)"],
)
def test_nodes_that_reach_far(log_f, ends, most):
    """The usual ones in a row, and those of a row that no others stand beside."""
    for rule, error in zip((row_rule(1, "usual", far=True), alone_rule(1, fine=False)), most, strict=True):
        t, log_step = stretched(rule.t, torch.tensor([ends], dtype=torch.float64))
        assert abs(logsumexp((rule.log_weight + log_step).numpy() + log_f(t[:, 0].numpy()))) < error


@pytest.mark.slow
def test_shares_of_rows_whose_prior_sits_in_corners():
    """Two shares a row, Dirichlet(a, a) with a of a few hundredths: Hermite nodes miss a third of them."""
    x = np.array([[5, 0], [0, 5], [5, 0], [4, 1], [0, 5], [5, 0]], dtype=float)

    def program(x):
        a = pyro.sample("a", dist.LogNormal(x.new_tensor(-3.0), 0.3))
        with pyro.plate("rows", len(x)):
            shares = pyro.sample("shares", dist.Dirichlet(a[..., None].expand(*a.shape, 2)))
            pyro.sample("x", dist.Multinomial(5, probs=shares), obs=x)

    z = np.linspace(-8, 8, 2001)
    a = np.exp(-3 + 0.3 * z)
    log_p = stats.norm.logpdf(z) + math.log(z[1] - z[0])
    for row in x:
        ways = gammaln(6) - gammaln(row + 1).sum()
        log_p = log_p + ways + betaln(a + row[0], a + row[1]) - betaln(a, a)
    rows = torch.as_tensor(x)
    nodes = Quadrature().bind(program, (rows,)).read((rows,))
    found = nodes.evidence()
    assert "nodes that reach far" in nodes.source.adaptive.inside
    assert float(found.by_row) == pytest.approx(logsumexp(log_p), abs=3 * found.se + 1e-4)
    assert found.se < 0.01


def test_a_row_whose_density_is_a_step():
    """As a decoder without a bound on its weights: 64 Hermite nodes are tenths of a nat off."""
    cut = np.array([0.3, -0.7, 1.1])

    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            logits = 300 * (z[..., None] - torch.as_tensor(cut))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    x = (np.random.default_rng(0).normal(size=(12, 1)) > cut).astype(float)
    x[3], x[5, 1] = np.nan, np.nan
    z = np.linspace(-10, 10, 400001)
    logits = 300 * (z[:, None] - cut)
    log_p = [
        np.nansum(log_expit(np.where(row == 1, logits, -logits)) * np.where(np.isnan(row), np.nan, 1), 1)
        + stats.norm.logpdf(z)
        for row in x
    ]
    truth = logsumexp(np.array(log_p), axis=1).sum() + 12 * math.log(z[1] - z[0])
    args = (torch.as_tensor(x),)
    read = Quadrature().bind(program, args).read(args)
    found = read.evidence()
    assert float(read.score().sum()) == pytest.approx(truth, abs=1e-4)  # of the even steps of the truth
    assert 0 < found.se <= 0.01
    assert float(found.by_row.sum()) == pytest.approx(truth, abs=2 * found.se)
