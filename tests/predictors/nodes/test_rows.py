"""Rows with one to four latents whose posteriors reach far or have several modes, against closed forms and grids.

Of each program there is a table of parameter values, from harmless ones to those at which Gauss-Hermite nodes around
one mode are tenths of a nat a row too low. An error bar has to cover the truth and must not be much wider than it.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.special import betaln, gammaln, log_expit, logsumexp
from tables import tensor

from bayes_mpt.predictors import Importance, Quadrature

GRID = np.linspace(-12, 12, 4801)
LOG_GRID = stats.norm.logpdf(GRID) + math.log(GRID[1] - GRID[0])


def found(program, x, predictor=None):
    """The score of a program without parameters, its evidence, and how it was found."""
    args = (tensor(x),)
    source = (predictor or Quadrature()).bind(program, args)
    nodes = source.read(args)
    evidence = nodes.evidence()
    return float(nodes.score().sum()), float(evidence.by_row.sum()), evidence.se, source.why


def holds(program, x, truth, most, widest):
    """Score and evidence are right to ``most`` nats, and the error covers the truth and is no wider than ``widest``."""
    score, evidence, se, why = found(program, x)
    assert score == pytest.approx(truth, abs=10 * most)
    assert evidence == pytest.approx(truth, abs=most)
    assert abs(evidence - truth) <= 3 * se + 1e-9
    assert se <= widest
    return why


# ------------------------------------------------------------------------------------------- one latent: both corners


def shares(a, x):
    """A share Beta(a, a) of each row of three cells; with the log-density of rows x."""

    def program(x):
        with pyro.plate("rows", len(x)):
            p = pyro.sample("p", dist.Beta(tensor(a), tensor(a)))
            pyro.sample("x", dist.Bernoulli(p[..., None].expand(*p.shape, 3)).to_event(1), obs=x)

    k = x.sum(1)
    return program, (betaln(a + k, a + 3 - k) - betaln(a, a)).sum()


@pytest.mark.parametrize("a", [2.0, 0.5, 0.1, 0.05, 0.01])
def test_a_share_of_each_row(a):
    x = np.array([[0, 0, 0], [1, 1, 1], [1, 1, 1], [0, 1, 0], [1, 1, 0]], dtype=float)
    program, truth = shares(a, x)
    why = holds(program, x, truth, 1e-7, 1e-4)
    assert ("as far as the density" in why) == (a < 2)


def test_a_share_of_each_row_under_kumaraswamy():
    a, b = 0.2, 0.05
    x = np.array([[0.0], [1.0], [1.0]])

    def program(x):
        with pyro.plate("rows", len(x)):
            p = pyro.sample("p", dist.Kumaraswamy(tensor(a), tensor(b)))
            pyro.sample("x", dist.Bernoulli(p[..., None]).to_event(1), obs=x)

    mean = b * math.exp(betaln(1 + 1 / a, b))
    holds(program, x, 2 * math.log(mean) + math.log1p(-mean), 1e-7, 1e-4)


def test_a_relaxed_bernoulli_in_its_corners():
    """Its log odds are logistic, of scale 20, so that a third of it is nearer to 0 or 1 than 1e-16."""
    x = np.array([[0.0, 0], [1, 1], [0, 1]])

    def program(x):
        with pyro.plate("rows", len(x)):
            p = pyro.sample("p", dist.RelaxedBernoulli(tensor(0.05), probs=tensor(0.5)))
            pyro.sample("x", dist.Bernoulli(p[..., None].expand(*p.shape, 2)).to_event(1), obs=x)

    u = np.linspace(-1500, 1500, 300001)
    log_p = stats.logistic.logpdf(u, scale=20) + math.log(u[1] - u[0])
    ends, k = np.stack([log_expit(u), log_expit(-u)], 1), x.sum(1)
    truth = sum(logsumexp(log_p + n * ends[:, 0] + (2 - n) * ends[:, 1]) for n in k)
    holds(program, x, truth, 1e-6, 1e-3)


@pytest.mark.slow
def test_shares_inside_a_shared_latent():
    """Beta(a, a) in every row, and a of all rows: its prior is a lognormal one."""
    x = np.array([[0, 0], [1, 1], [1, 1], [0, 0], [1, 1], [0, 1]], dtype=float)

    def program(x):
        a = pyro.sample("a", dist.LogNormal(tensor(-3.0), 0.5))
        with pyro.plate("rows", len(x)):
            p = pyro.sample("p", dist.Beta(a, a))
            pyro.sample("x", dist.Bernoulli(p[..., None].expand(*p.shape, 2)).to_event(1), obs=x)

    z = np.linspace(-8, 8, 1601)
    a, k = np.exp(-3 + 0.5 * z)[:, None], x.sum(1)
    log_p = stats.norm.logpdf(z) + math.log(z[1] - z[0]) + (betaln(a + k, a + 2 - k) - betaln(a, a)).sum(1)
    holds(program, x, logsumexp(log_p), 1e-5, 1e-2)


def test_a_number_of_nodes_that_was_asked_for_states_its_error():
    x = np.array([[0.0, 0, 0], [1, 1, 1], [0, 1, 0]])
    program, truth = shares(0.05, x)
    score, evidence, se, _ = found(program, x, Quadrature(12))
    assert abs(score - truth) > 0.1  # so few
    assert abs(evidence - truth) < 1e-5
    assert abs(evidence - truth) <= 3 * se + 1e-9


# --------------------------------------------------------------------------------------------------- several modes


@pytest.mark.parametrize("noise", [0.5, 0.1, 0.02])
def test_rows_of_which_the_square_is_seen(noise):
    x = np.array([[4.0], [1.0], [-0.2], [0.3]])

    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z.square()[..., None], noise).to_event(1), obs=x)

    z = np.linspace(-6, 6, 60001)
    prior = stats.norm.logpdf(z) + math.log(z[1] - z[0])
    truth = sum(logsumexp(prior + stats.norm.logpdf(row[0], z**2, noise)) for row in x)
    assert "around each mode" in holds(program, x, truth, 1e-6, 1e-3)


@pytest.mark.parametrize("slope", [0.3, 3.0, 8.0])
def test_a_discrete_latent_beside_a_continuous_one(slope):
    """The sign of the slope is summed out, so that a row may have a mode on either side."""
    x = np.array([[3.0, 4.0], [2.0, 1.0], [0.0, 0.0], [9.0, 5.0]])

    def program(x):
        with pyro.plate("rows", len(x)):
            sign = pyro.sample("sign", dist.Bernoulli(tensor(0.3)))
            z = pyro.sample("z", dist.Normal(tensor(0.0), 1.0))
            eta = (0.3 * z + slope * (1 - 2 * sign) * z).clamp(max=8.0)
            pyro.sample("x", dist.Poisson(eta[..., None].exp().expand(*eta.shape, 2)).to_event(1), obs=x)

    truth = 0.0
    for row in x:
        eta = (0.3 + slope * np.array([[1.0], [-1.0]])) * GRID
        token = stats.poisson.logpmf(row[:, None, None], np.exp(np.minimum(eta, 8.0))).sum(0)
        truth += logsumexp(token + np.log([[0.7], [0.3]]) + LOG_GRID)
    holds(program, x, truth, 1e-6, 1e-3)


def test_draws_around_every_mode_of_a_row():
    x = np.array([[4.0], [1.0]])

    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z.square()[..., None], 0.1).to_event(1), obs=x)

    truth = sum(logsumexp(LOG_GRID + stats.norm.logpdf(row[0], GRID**2, 0.1)) for row in x)
    torch.manual_seed(0)
    _, evidence, se, _ = found(program, x, Importance(2000))
    assert 0 < se < 0.1
    assert abs(evidence - truth) < 3 * se


# -------------------------------------------------------------------------------------------------- more latents


@pytest.mark.parametrize(("a", "most", "widest"), [(2.0, 1e-5, 1e-3), (0.1, 1e-4, 5e-3), (0.03, 1e-3, 3e-2)])
def test_two_shares_of_each_row(a, most, widest):
    x = np.array([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 0, 0]], dtype=float)

    def program(x):
        with pyro.plate("rows", len(x)):
            p = pyro.sample("p", dist.Beta(tensor(a), tensor(a)))
            q = pyro.sample("q", dist.Beta(tensor(a), tensor(a)))
            pyro.sample("x", dist.Bernoulli(torch.stack([p, p, q, q], -1)).to_event(1), obs=x)

    k = x.reshape(3, 2, 2).sum(-1)
    truth = (betaln(a + k, a + 2 - k) - betaln(a, a)).sum()
    holds(program, x, truth, most, widest)


@pytest.mark.parametrize(
    ("n_levels", "most"),
    [(3, 1e-3), (5, 0.1)],
)
def test_categories_under_a_dirichlet_in_its_corners(n_levels, most):
    a, x = 0.1, np.array([[0.0, 0, 0, 0], [1, 1, 2, 1], [2, 2, 2, 2]])

    def program(x):
        with pyro.plate("rows", len(x)):
            share = pyro.sample("share", dist.Dirichlet(tensor(np.full(n_levels, a))))
            each = share.unsqueeze(-2).expand(*share.shape[:-1], 4, n_levels)
            pyro.sample("x", dist.Categorical(each).to_event(1), obs=x)

    n = (x[:, :, None] == np.arange(n_levels)).sum(1)
    whole = gammaln(n_levels * a) - gammaln(n_levels * a + 4)
    truth = (whole + (gammaln(a + n) - gammaln(a)).sum(1)).sum()
    holds(program, x, truth, most, 10 * most)


def test_a_row_that_contradicts_its_prior():
    """Three tokens near 14 under a Student-t prior near 0: a narrow mode there beside a wide one at the prior."""
    x = np.array([[14.3, 14.5, 14.2], [0.4, -0.5, 0.1]])

    def program(x):
        with pyro.plate("rows", len(x)):
            m = pyro.sample("m", dist.StudentT(tensor(2.0), 0.0, 1.0))
            s = pyro.sample("s", dist.LogNormal(tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(m[..., None], s[..., None]).expand([*m.shape, 3]).to_event(1), obs=x)

    truth = 0.0
    log_s = np.linspace(-6, 7, 521)
    for row in x:
        m = row.mean() + np.sinh(np.linspace(-8, 8, 2001))
        log_p = stats.t.logpdf(m, 2)[:, None] + np.log(np.gradient(m))[:, None] + stats.norm.logpdf(log_s)
        for cell in row:
            log_p = log_p + stats.norm.logpdf(cell, m[:, None], np.exp(log_s))
        truth += logsumexp(log_p) + math.log(log_s[1] - log_s[0])
    _, evidence, se, why = found(program, x)
    assert "around each mode" in why
    assert evidence == pytest.approx(truth, abs=2e-3)
    assert 0 < se < 1e-2


# ------------------------------------------------------------------------------------------- mass at the corners


def corners(share, width):
    """Documents of three words, whose topics' shares are drawn at the corners of a simplex, and the truth of each."""
    topics, n_words = np.random.default_rng(1).dirichlet(np.ones(4), width), 3
    words = np.random.default_rng(0).integers(0, 4, (4, n_words)).astype(float)

    def program(x):
        with pyro.plate("documents", len(x)):
            p = pyro.sample("p", dist.Dirichlet(x.new_full((width,), share)))
            with pyro.plate("words", n_words):
                z = pyro.sample("z", dist.Categorical(p))
                pyro.sample("w", dist.Categorical(tensor(topics)[z]), obs=x.T)

    def of(row, z):  # Dirichlet and multinomial, for one assignment of topics to words
        a = np.bincount(z, minlength=width) + share
        prior = gammaln(width * share) - gammaln(a.sum()) + (gammaln(a) - gammaln(share)).sum()
        return prior + np.log(topics[list(z), row.astype(int)]).sum()

    truth = [logsumexp([of(row, z) for z in product(range(width), repeat=n_words)]) for row in words]
    return program, words, np.array(truth)


@pytest.mark.slow
@pytest.mark.parametrize("share, width, most", [(0.02, 3, 2e-3), (0.02, 4, 0.1)])
def test_mass_at_the_corners_of_a_simplex(share, width, most):
    """Two rules of nearly as many nodes are wrong alike there: 5e-3 nats, at a change of 1.7e-3."""
    program, words, truth = corners(share, width)
    found = Quadrature().bind(program, (tensor(words),)).read((tensor(words),)).evidence()
    off = found.by_row.numpy() - truth
    assert np.abs(off).max() <= found.se + 1e-7 and abs(off.sum()) <= found.se + 1e-7
    assert 0 < found.se < most
