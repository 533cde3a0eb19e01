"""Observed sites that are single numbers: a site a datum in a Python loop, a series step by step, one beside a plate.

Truths: conjugate posteriors, the forward algorithm, dense Gaussian algebra, and scipy's quadrature over them.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, stats
from scipy.special import betaln, gammaln, logsumexp
from truths import log_density

from bayes_mpt import BayesMPT
from bayes_mpt.masks import PermutationChain
from bayes_mpt.predictors import Importance, Quadrature, SequentialMonteCarlo
from bayes_mpt.program.program import ModelError


def column(values):
    return np.asarray(values, dtype=float)[:, None]


def without(values, *where):
    out = np.array(values, dtype=float)
    out[list(where)] = np.nan
    return out


def seen(values):
    return values[~np.isnan(values)]


def gaussian(y, cov):
    """Log-density of the observed of y under N(0, cov)."""
    return log_density(y[None], np.zeros(len(y)), cov)[0]


def averaged(log_likelihood, log_prior, low, high):
    """log of the integral of a likelihood over a prior, by scipy."""
    grid = np.linspace(low, high, 61)
    top = max(log_likelihood(t) + log_prior(t) for t in grid)
    found = integrate.quad(
        lambda t: np.exp(log_likelihood(t) + log_prior(t) - top),
        low,
        high,
        epsabs=1e-11,
        epsrel=1e-11,
        limit=400,
    )
    return top + np.log(found[0])


# --------------------------------------------------------------------------------------- a site for every datum


def coin(data):
    """Pyro's first tutorial of SVI."""
    f = pyro.sample("latent_fairness", dist.Beta(10.0, 10.0))
    for i in range(len(data)):
        pyro.sample(f"obs_{i}", dist.Bernoulli(f), obs=data[i, 0])


def events(data):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    for i in range(len(data)):
        pyro.sample(f"obs_{i}", dist.Poisson(rate), obs=data[i, 0])


def weights(data):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    for i in range(len(data)):
        pyro.sample(f"obs_{i}", dist.Normal(mu, 1.0), obs=data[i, 0])


def coin_truth(k):
    k = seen(k)
    return betaln(10 + k.sum(), 10 + len(k) - k.sum()) - betaln(10, 10)


def events_truth(k):
    k = seen(k)
    total = 2 + k.sum()
    return gammaln(total) - gammaln(2) - total * np.log1p(len(k)) - gammaln(k + 1).sum()


COIN, EVENTS = np.r_[np.ones(4), np.zeros(2)], np.array([3.0, 1, 5, 2, 0, 4])
WEIGHTS = np.array([0.3, 1.9, 1.1, -0.4, 2.2])
LOOPS = pytest.mark.parametrize(
    ("program", "data", "truth"),
    [
        (coin, COIN, coin_truth),
        (events, EVENTS, events_truth),
        (weights, WEIGHTS, lambda y: gaussian(y, np.eye(5) + 9)),
    ],
    ids=["coin", "events", "weights"],
)


@LOOPS
def test_a_site_for_every_datum(program, data, truth):
    model = BayesMPT(program).fit(column(data))
    assert model.log_marginal_likelihood_ == pytest.approx(truth(data), abs=1e-10)
    holed = without(data, 1, 4)
    assert model.score_samples(column(holed))[0] == pytest.approx(truth(holed), abs=1e-10)
    found = model.estimate(column(data), masks=PermutationChain(), n_replicates=1)
    assert found.by_size.area == pytest.approx(truth(data), abs=1e-7)
    assert len(found.by_size.size) == len(data)


@pytest.mark.parametrize("predictor", [Quadrature(), Importance(500), SequentialMonteCarlo(64, 4)], ids=str)
def test_other_ways_take_them_too(predictor):
    model = BayesMPT(events, predictor=predictor, random_state=0).fit(column(EVENTS))
    error = max(1e-9, 4 * model.log_marginal_likelihood_se_)
    assert error < 0.5 and model.log_marginal_likelihood_ == pytest.approx(events_truth(EVENTS), abs=error)


def test_a_parameter_behind_a_site_for_every_datum():
    def program(data):
        p = pyro.param("p", torch.tensor(0.3), constraint=dist.constraints.unit_interval)
        for i in range(len(data)):
            pyro.sample(f"obs_{i}", dist.Bernoulli(p), obs=data[i, 0])

    model = BayesMPT(program).fit(column(COIN))
    assert model.log_marginal_likelihood_ == pytest.approx(4 * np.log(4 / 6) + 2 * np.log(2 / 6), abs=1e-8)


def test_a_scalar_measurement_beside_a_plate():
    x = np.random.default_rng(0).normal(size=12)

    def program(x):
        mu, s = pyro.sample("mu", dist.Normal(0.0, 10.0)), pyro.sample("s", dist.HalfNormal(1.0))
        pyro.sample("m", dist.Normal(mu, s), obs=torch.tensor(1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(mu, s), obs=x[:, 0])

    values = np.r_[1.0, x]
    truth = averaged(
        lambda s: gaussian(values, 100 + s**2 * np.eye(13)), lambda s: stats.halfnorm.logpdf(s), 0.3, 6.0
    )
    model = BayesMPT(program).fit(column(x))
    assert model.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-7)


# --------------------------------------------------------------------------------------------- one series

STEP, LOC = np.array([[0.9, 0.1], [0.3, 0.7]]), np.array([-1.0, 1.5])
SERIES = np.array([-1.2, -0.3, 1.6, 2.2, 0.9, -1.5, -0.7, 0.2, 1.4, 1.1])


def forward(y, scale):
    """The forward algorithm, from even odds."""
    log_p = np.log([0.5, 0.5])
    for t, value in enumerate(y):
        if t:
            log_p = logsumexp(log_p[:, None] + np.log(STEP), 0)
        if not np.isnan(value):
            log_p = log_p + stats.norm.logpdf(value, LOC, scale)
    return logsumexp(log_p)


def chain(x, scale):
    step, loc, state = torch.from_numpy(STEP), torch.from_numpy(LOC), None
    for t in pyro.markov(range(len(x))):
        p = torch.full((2,), 0.5) if state is None else step[state]
        state = pyro.sample(f"z_{t}", dist.Categorical(p))
        pyro.sample(f"x_{t}", dist.Normal(loc[state], scale), obs=x[t, 0])


def test_a_hidden_markov_chain_over_one_series():
    model = BayesMPT(lambda x: chain(x, 0.8)).fit(column(SERIES))
    assert model.log_marginal_likelihood_ == pytest.approx(forward(SERIES, 0.8), abs=1e-10)
    assert model.log_marginal_likelihood_se_ == 0
    holed = without(SERIES, 2, 3, 7)
    assert model.score_samples(column(holed))[0] == pytest.approx(forward(holed, 0.8), abs=1e-10)


def test_a_hidden_markov_chain_of_unknown_noise():
    model = BayesMPT(lambda x: chain(x, pyro.sample("s", dist.LogNormal(0.0, 0.5)))).fit(column(SERIES[:5]))
    truth = averaged(
        lambda u: forward(SERIES[:5], np.exp(u)),
        lambda u: stats.norm.logpdf(u, 0, 0.5),
        np.log(0.1),
        np.log(10),
    )
    error = max(1e-7, 4 * model.log_marginal_likelihood_se_)
    assert error < 1e-4 and model.log_marginal_likelihood_ == pytest.approx(truth, abs=error)


def level(x, noise):
    """z_0 ~ N(0, 1), z_t = 0.9 z_(t-1) + N(0, 0.5), x_t = z_t + N(0, noise), t = 1..T."""
    one = torch.eye(1)
    start, step = (
        dist.MultivariateNormal(torch.zeros(1), one),
        dist.MultivariateNormal(torch.zeros(1), 0.5 * one),
    )
    error = dist.MultivariateNormal(torch.zeros(1), noise * one)
    pyro.sample("x", dist.GaussianHMM(start, 0.9 * one, step, one, error, duration=len(x)), obs=x)


def level_cov(n, noise):
    variance = [1.0]
    for _ in range(n):
        variance.append(0.81 * variance[-1] + 0.5)
    t = np.arange(1, n + 1)
    cov = 0.9 ** np.abs(t[:, None] - t) * np.array(variance)[np.minimum(t[:, None], t)]
    return cov + noise * np.eye(n)


def test_a_series_that_is_one_event():
    model = BayesMPT(lambda x: level(x, 0.3)).fit(column(SERIES))
    truth = gaussian(SERIES, level_cov(10, 0.3))
    assert model.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-9)
    with pytest.raises(ModelError, match="site 'x' .GaussianHMM. has one density for a whole event"):
        model.score_samples(column(without(SERIES, 3)))


def test_a_series_that_is_one_event_of_unknown_noise():
    model = BayesMPT(lambda x: level(x, pyro.sample("v", dist.LogNormal(0.0, 0.5)))).fit(column(SERIES))
    truth = averaged(
        lambda u: gaussian(SERIES, level_cov(10, np.exp(u))), lambda u: stats.norm.logpdf(u, 0, 0.5), -4, 4
    )
    assert model.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-7)


def test_a_gaussian_process_with_a_prior_on_its_length_scale():
    t = np.arange(10) / 4

    def process(x):
        length, t = (
            pyro.sample("length", dist.LogNormal(0.0, 0.5)),
            torch.arange(len(x)).double()[:, None] / 4,
        )
        cov = torch.exp(-0.5 * ((t - t.T) / length) ** 2) + 0.2 * torch.eye(len(x))
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(len(x)), cov), obs=x[:, 0])

    def given(u, y):
        return gaussian(y, np.exp(-0.5 * ((t[:, None] - t) / np.exp(u)) ** 2) + 0.2 * np.eye(10))

    model = BayesMPT(process).fit(column(SERIES))
    truth = averaged(lambda u: given(u, SERIES), lambda u: stats.norm.logpdf(u, 0, 0.5), -4, 4)
    error = max(1e-7, 4 * model.log_marginal_likelihood_se_)
    assert error < 1e-3 and model.log_marginal_likelihood_ == pytest.approx(truth, abs=error)
    with pytest.raises(ModelError, match="site 'x' .MultivariateNormal. has one density for a whole event"):
        model.score_samples(column(without(SERIES, 3)))
