"""After Pyro's examples of groups: eight schools in all forms, and hits of eighteen baseball players."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from scipy.special import betaln, gammaln, logsumexp
from scipy.stats import norm
from truths import log_density
from zoo.case import Array, Case

J = 8


def eight_schools_centered(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", J):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
    with pyro.plate("data", J):
        pyro.sample("obs", dist.Normal(theta, sigma[:, 0]), obs=y)


def eight_schools_noncentered(sigma, y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(1), 5 * torch.ones(1)))
    tau = pyro.sample("tau", dist.HalfCauchy(5 * torch.ones(1)))
    eta = pyro.sample("eta", dist.Normal(torch.zeros(J), torch.ones(J)).to_event(1))
    theta = mu + tau * eta
    pyro.sample("obs", dist.Normal(theta, sigma.squeeze(-1)).to_event(1), obs=y)


@poutine.reparam(config={"theta": LocScaleReparam(centered=0.0)})
def eight_schools_reparam(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", J):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("obs", dist.Normal(theta, sigma[:, 0]), obs=y)


def eight_schools_rows(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("obs", dist.Normal(theta, sigma[:, 0]), obs=y)


def fully_pooled(at_bats, hits):
    phi = pyro.sample("phi", dist.Uniform(0.0, 1.0))
    with pyro.plate("players", len(at_bats)):
        pyro.sample("obs", dist.Binomial(at_bats[:, 0], phi), obs=hits)


def not_pooled(at_bats, hits):
    with pyro.plate("players", len(at_bats)):
        phi = pyro.sample("phi", dist.Uniform(0.0, 1.0))
        pyro.sample("obs", dist.Binomial(at_bats[:, 0], phi), obs=hits)


def partially_pooled(at_bats, hits):
    m = pyro.sample("m", dist.Uniform(0.0, 1.0))
    kappa = pyro.sample("kappa", dist.Pareto(1.0, 1.5))
    with pyro.plate("players", len(at_bats)):
        phi = pyro.sample("phi", dist.Beta(m * kappa, (1 - m) * kappa))
        pyro.sample("obs", dist.Binomial(at_bats[:, 0], phi), obs=hits)


def partially_pooled_with_logit(at_bats, hits):
    loc = pyro.sample("loc", dist.Normal(-1.0, 1.0))
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    with pyro.plate("players", len(at_bats)):
        alpha = pyro.sample("alpha", dist.Normal(loc, scale))
        pyro.sample("obs", dist.Binomial(at_bats[:, 0], logits=alpha), obs=hits)


def schools(rng: np.random.Generator) -> tuple[Array, Array]:
    sigma = rng.integers(9, 19, size=J).astype(float)
    return sigma[:, None], np.round(8 + 6 * rng.normal(size=J) + sigma * rng.normal(size=J))


def players(rng: np.random.Generator) -> tuple[Array, Array]:
    at_bats = rng.integers(40, 50, size=18).astype(float)
    hits = rng.binomial(at_bats.astype(int), rng.beta(0.27 * 60, 0.73 * 60, size=18))
    return at_bats[:, None], hits.astype(float)


def over_tau(params, sigma, y):
    """mu and theta in closed form; tau by a fine grid of its logarithm."""
    at = np.linspace(-14, 16, 3001)
    of_tau = np.array(
        [
            log_density(y[None], np.zeros(J), np.diag(sigma[:, 0] ** 2 + math.exp(2 * a)) + 25.0)[0]
            if a < 8
            else -0.5 * J * (math.log(2 * math.pi) + 2 * a) - 0.5 * (y**2).sum() * math.exp(-2 * a)
            for a in at
        ]
    )
    prior = math.log(2 / (math.pi * 5)) - np.log1p(np.exp(2 * at) / 25) + at  # of log tau
    return logsumexp(of_tau + prior) + math.log(at[1] - at[0])


def log_choose(at_bats: Array, hits: Array) -> Array:
    return gammaln(at_bats + 1) - gammaln(hits + 1) - gammaln(at_bats - hits + 1)


def pooled_beta(params, at_bats, hits):
    n = at_bats[:, 0]
    return log_choose(n, hits).sum() + betaln(1 + hits.sum(), 1 + (n - hits).sum())


def unpooled_beta(params, at_bats, hits):
    return -np.log(at_bats[:, 0] + 1).sum()  # every number of hits is as likely


def beta_binomials(params, at_bats, hits):
    """m by Gauss-Legendre, kappa = exp(e) with e exponential of rate 1.5 by a fine grid."""
    n = at_bats[:, 0]
    node, weight = np.polynomial.legendre.leggauss(300)
    m, log_m = (node + 1) / 2, np.log(weight / 2)
    edge = np.linspace(0, 16, 801)
    e = (edge[1:] + edge[:-1]) / 2
    log_e = np.log(1.5) - 1.5 * e + np.log(edge[1] - edge[0])
    a, b = m[:, None] * np.exp(e), (1 - m[:, None]) * np.exp(e)
    log_p = sum(betaln(a + h, b + k - h) - betaln(a, b) for h, k in zip(hits, n, strict=True))
    return logsumexp(log_p + log_m[:, None] + log_e) + log_choose(n, hits).sum()


def logit_binomials(params, at_bats, hits):
    """Each player's effect by a grid of 81 in units of its spread; location and log-spread by grids."""
    n = at_bats[:, 0]
    z = np.linspace(-7, 7, 81)
    log_z = norm.logpdf(z) + math.log(z[1] - z[0])
    loc = np.linspace(-2.0, 0.0, 61)  # the posterior's sd is below 0.15
    at = np.linspace(-12, 3, 121)
    alpha = loc[:, None, None] + np.exp(at)[:, None] * z
    log_on, log_off = -np.logaddexp(0, -alpha), -np.logaddexp(0, alpha)
    total = norm.logpdf(loc, -1, 1)[:, None] + math.log(2 / math.pi) - np.log1p(np.exp(2 * at)) + at
    for h, k in zip(hits, n, strict=True):
        total = total + logsumexp(h * log_on + (k - h) * log_off + log_z, axis=-1)
    return logsumexp(total) + math.log((loc[1] - loc[0]) * (at[1] - at[0])) + log_choose(n, hits).sum()


CASES = [
    Case("eight_schools_centered", eight_schools_centered, schools, over_tau, tolerance=1e-3),
    Case("eight_schools_noncentered", eight_schools_noncentered, schools, over_tau, tolerance=1e-3),
    Case("eight_schools_reparam", eight_schools_reparam, schools, over_tau, tolerance=1e-3),
    Case("eight_schools_rows", eight_schools_rows, schools, over_tau, tolerance=1e-3),
    Case("baseball_fully_pooled", fully_pooled, players, pooled_beta),
    Case("baseball_not_pooled", not_pooled, players, unpooled_beta, tolerance=1e-4),
    Case("baseball_partially_pooled", partially_pooled, players, beta_binomials, tolerance=1e-2, slow=True),
    Case("baseball_logit", partially_pooled_with_logit, players, logit_binomials, tolerance=1e-2, slow=True),
]
