"""After Stan's example models and user's guide: mixtures, ability tests, animals, data seen in part, the funnel."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from scipy.special import betaln, comb, expit, gammaln, logsumexp
from scipy.stats import binom, halfnorm, norm
from torch.distributions import constraints
from zoo.case import Case
from zoo.integrals import bounds_by_draws, log_integral, log_rectangles, log_unit, maximum

# --------------------------------------------------------------------------------------------------- two normals


def two_normals(x):
    low = pyro.sample("low", dist.Normal(0.0, 2.0))
    gap = pyro.sample("gap", dist.LogNormal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    mu = torch.stack([low, low + gap], -1)
    mixing = dist.Categorical(torch.stack([theta, 1 - theta], -1))
    with pyro.plate("N", len(x)):
        pyro.sample("y", dist.MixtureSameFamily(mixing, dist.Normal(mu, sigma)), obs=x[:, 0])


def two_normals_collapse(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    with pyro.plate("N", len(x)):
        first = dist.Normal(mu[0], sigma[0]).log_prob(x[:, 0]) + theta.log()
        second = dist.Normal(mu[1], sigma[1]).log_prob(x[:, 0]) + (1 - theta).log()
        pyro.factor("y", torch.logaddexp(first, second))


def two_heaps(rng):
    return (np.r_[-2 + rng.normal(size=12), 2 + 0.7 * rng.normal(size=18)][:, None],)


def two_normals_truth(ordered):
    def truth(params, x):
        """Over mu_1 < mu_2 = mu_1 + gap; without an order twice that, by exchange."""
        y = x[:, 0]

        def log_joint(u):
            low, gap, (theta, jacobian) = u[:, :1], np.exp(u[:, 1:2]), log_unit(u[:, 4:])
            sigma = np.exp(u[:, 2:4])
            if ordered:
                prior = norm.logpdf(low[:, 0], 0, 2) + norm.logpdf(u[:, 1])  # LogNormal(0, 1) in log gap
            else:
                prior = (
                    norm.logpdf(low[:, 0], 0, 2) + norm.logpdf((low + gap)[:, 0], 0, 2) + u[:, 1] + np.log(2)
                )
            prior = prior + halfnorm.logpdf(sigma, scale=2).sum(1) + u[:, 2:4].sum(1)
            prior = prior + (4 * np.log(theta * (1 - theta)) - betaln(5, 5) + jacobian)[:, 0]
            z = (y - low) / sigma[:, :1]
            first = np.exp(-0.5 * z**2) * (theta / sigma[:, :1])
            z = (y - low - gap) / sigma[:, 1:]
            second = np.exp(-0.5 * z**2) * ((1 - theta) / sigma[:, 1:])
            return np.log(first + second + 1e-300).sum(1) + prior - len(y) / 2 * np.log(2 * np.pi)

        return log_integral(log_joint, [-2.0, 1.4, 0.0, -0.3, -0.4], 13)

    return truth


# ------------------------------------------------------------------------------------------------------ an exam


def irt_2pl(x):
    mu_b = pyro.sample("mu_b", dist.Normal(0.0, 2.0))
    sigma_b = pyro.sample("sigma_b", dist.LogNormal(0.0, 0.5))
    with pyro.plate("items", x.shape[1]):
        a = pyro.sample("a", dist.LogNormal(0.0, 0.5))
        b = pyro.sample("b", dist.Normal(mu_b, sigma_b))
    with pyro.plate("students", len(x)):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Bernoulli(logits=a * (theta[:, None] - b)).to_event(1), obs=x)


def exam(rng):
    a, b = np.exp(0.5 * rng.normal(size=4)), rng.normal(size=4)
    return ((rng.uniform(size=(40, 4)) < expit(a * (rng.normal(size=(40, 1)) - b))).astype(float),)


def irt_truth(params, x):
    pattern, n = np.unique(x, axis=0, return_counts=True)
    e = np.linspace(-6, 6, 41)
    log_w = norm.logpdf(e) + np.log(e[1] - e[0])

    def log_joint(u):
        mu, sigma, a, b = u[:, 0], np.exp(u[:, 1]), np.exp(u[:, 2:6]), u[:, 6:]
        eta = a[:, None] * (e[:, None] - b[:, None])  # (M, Q, T)
        log_p, log_1 = -np.logaddexp(0, -eta), -np.logaddexp(0, eta)
        inner = logsumexp(log_p @ pattern.T + log_1 @ (1 - pattern).T + log_w[:, None], axis=1) @ n
        prior = norm.logpdf(mu, 0, 2) + norm.logpdf(u[:, 1], 0, 0.5) + norm.logpdf(u[:, 2:6], 0, 0.5).sum(1)
        return inner + prior + norm.logpdf(b, mu[:, None], sigma[:, None]).sum(1)

    return bounds_by_draws(log_joint, np.zeros(10), n=3000)


# ------------------------------------------------------------------------------------------------ dogs, other animals


def dogs(y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 5.0).to_event(1))
    avoided = torch.zeros(len(y))
    shocked = torch.zeros(len(y))
    with pyro.plate("dogs", len(y)):
        for t in range(y.shape[1]):
            logits = beta[0] + beta[1] * avoided + beta[2] * shocked
            pyro.sample(f"y_{t}", dist.Bernoulli(logits=logits), obs=y[:, t])
            avoided = avoided + 1 - y[:, t]
            shocked = shocked + y[:, t]


def dogs_log(y):
    """1 is a shock: the probability falls with every trial that went before."""
    a = pyro.sample("a", dist.Exponential(1.0))
    b = pyro.sample("b", dist.Exponential(1.0))
    before = y.cumsum(-1) - y
    trial = torch.arange(y.shape[1])
    with pyro.plate("dogs", len(y)):
        p = torch.exp(-a * (trial - before) - b * before - 0.01)
        pyro.sample("y", dist.Bernoulli(p).to_event(1), obs=y)


def ten_dogs(rng):
    y = np.zeros((10, 12))
    for t in range(12):
        before = y[:, :t].sum(1)
        y[:, t] = rng.uniform(size=10) < np.exp(-0.25 * (t - before) - 0.08 * before - 0.01)
    return (y,)


def dogs_truth(log_link):
    def truth(params, y):
        before = y.cumsum(1) - y
        avoided = np.arange(y.shape[1]) - before

        def log_joint(u):
            if log_link:
                rate = np.exp(u)
                log_p = -rate[:, 0, None, None] * avoided - rate[:, 1, None, None] * before - 0.01
                prior = (u - rate).sum(1)
                return np.where(y == 1, log_p, np.log(-np.expm1(log_p))).sum((1, 2)) + prior
            eta = u[:, 0, None, None] + u[:, 1, None, None] * avoided + u[:, 2, None, None] * before
            return -np.logaddexp(0, np.where(y == 1, -eta, eta)).sum((1, 2)) + norm.logpdf(u, 0, 5).sum(1)

        return log_integral(log_joint, [-1.4, -2.5] if log_link else [1.0, -0.5, -0.2], 31)

    return truth


N_OCCASIONS = 5


def capture_m0(caught):
    omega = pyro.sample("omega", dist.Uniform(0.0, 1.0))
    p = pyro.sample("p", dist.Uniform(0.0, 1.0))
    with pyro.plate("M", len(caught)):
        z = pyro.sample("z", dist.Bernoulli(omega), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Binomial(N_OCCASIONS, p * z), obs=caught[:, 0])


def capture_mb(y):
    omega = pyro.sample("omega", dist.Uniform(0.0, 1.0))
    p = pyro.sample("p", dist.Uniform(0.0, 1.0))
    c = pyro.sample("c", dist.Uniform(0.0, 1.0))
    with pyro.plate("M", len(y)):
        z = pyro.sample("z", dist.Bernoulli(omega), infer={"enumerate": "parallel"})
        before = torch.zeros(len(y))
        for t in range(y.shape[1]):
            pyro.sample(f"y_{t}", dist.Bernoulli(z * torch.where(before > 0, c, p)), obs=y[:, t])
            before = before + y[:, t]


def captures(rng):
    """Forty animals, then twenty rows of nothing that may stand for animals never caught."""
    y = np.zeros((60, N_OCCASIONS))
    for t in range(N_OCCASIONS):
        before = y[:40, :t].any(1)
        y[:40, t] = rng.uniform(size=40) < np.where(before, 0.5, 0.3)
    return y


def how_often_caught(rng):
    return (captures(rng).sum(1, keepdims=True),)


def m0_truth(params, caught):
    count = caught[:, 0]

    def log_joint(u):
        (omega, p), jacobian = log_unit(u.T)
        there = np.log(omega[:, None]) + binom.logpmf(count, N_OCCASIONS, p[:, None])
        absent = np.where(count == 0, np.log1p(-omega[:, None]), -np.inf)
        return np.logaddexp(there, absent).sum(1) + jacobian.sum(0)

    return log_integral(log_joint, [0.5, -0.5], 81)


def mb_truth(params, y):
    before = (y.cumsum(1) - y) > 0
    new = [(y * ~before).sum(), ((1 - y) * ~before).sum()]  # counts of all rows
    again = [(y * before).sum(), ((1 - y) * before).sum()]
    never = (y.sum(1) == 0).sum()

    def log_joint(u):
        (omega, p, c), jacobian = log_unit(u.T)
        caught = (
            np.log(omega) * (len(y) - never)
            + new[0] * np.log(p)
            + again[0] * np.log(c)
            + again[1] * np.log1p(-c)
        )
        caught = caught + (new[1] - never * N_OCCASIONS) * np.log1p(-p)
        none = np.logaddexp(np.log(omega) + N_OCCASIONS * np.log1p(-p), np.log1p(-omega))
        return caught + never * none + jacobian.sum(0)

    return log_integral(log_joint, [0.5, -0.5, 0.0], 61)


# ------------------------------------------------------------------------------------------------ data seen in part


def censored(x, y):
    """y is known below 4 only; x tells which rows stand above."""
    mu = pyro.param("mu", torch.tensor(2.0))
    sigma = pyro.param("sigma", torch.tensor(1.0), constraint=constraints.positive)
    above = x[:, 0] > 0
    with pyro.plate("N", len(y)):
        with poutine.mask(mask=~above):
            pyro.sample("y", dist.Normal(mu, sigma), obs=y)
        tail = torch.special.log_ndtr((mu - 4) / sigma)
        pyro.factor("censored", torch.where(above, tail, torch.zeros(())))


def some_above(rng):
    y = 3 + 1.5 * rng.normal(size=60)
    above = y > 4
    return above[:, None].astype(float), np.where(above, 4.0, y)


def censored_truth(params, x, y):
    above = x[:, 0] > 0

    def log_likelihood(u):
        sigma = np.exp(u[1])
        return norm.logpdf(y[~above], u[0], sigma).sum() + above.sum() * norm.logsf(4, u[0], sigma)

    return maximum(log_likelihood, [3.0, 0.4])


def truncated(x):
    """Only values above 1 are recorded."""
    mu = pyro.param("mu", torch.tensor(2.0))
    sigma = pyro.param("sigma", torch.tensor(1.0), constraint=constraints.positive)
    y = x[:, 0]
    with pyro.plate("N", len(x)):
        log_p = dist.Normal(mu, sigma).log_prob(y) - torch.special.log_ndtr((mu - 1) / sigma)
        pyro.factor("y", log_p)


def above_one(rng):
    y = 2 + rng.normal(size=120)
    return (y[y > 1][:, None],)


def truncated_truth(params, x):
    return maximum(
        lambda u: (norm.logpdf(x[:, 0], u[0], np.exp(u[1])) - norm.logsf(1, u[0], np.exp(u[1]))).sum(),
        [2.0, 0.0],
    )


def rounding(x):
    mu = pyro.param("mu", torch.tensor(10.0))
    sigma = pyro.param("sigma", torch.tensor(1.0), constraint=constraints.positive)
    y = x[:, 0]
    with pyro.plate("N", len(x)):
        exact = dist.Normal(mu, sigma)
        pyro.factor("y", (exact.cdf(y + 0.5) - exact.cdf(y - 0.5)).log())


def rounded(rng):
    return (np.round(10 + 1.2 * rng.normal(size=40))[:, None],)


def rounding_truth(params, x):
    def log_likelihood(u):
        sigma = np.exp(u[1])
        return np.log(norm.cdf(x + 0.5, u[0], sigma) - norm.cdf(x - 0.5, u[0], sigma)).sum()

    return maximum(log_likelihood, [10.0, 0.2])


def zero_inflated(x):
    theta = pyro.sample("theta", dist.Beta(1.0, 1.0))
    rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
    with pyro.plate("N", len(x)):
        pyro.sample("y", dist.ZeroInflatedPoisson(rate, gate=theta), obs=x[:, 0])


def counts_with_zeros(rng):
    return (np.where(rng.uniform(size=30) < 0.3, 0, rng.poisson(3, size=30)).astype(float)[:, None],)


def zero_inflated_truth(params, x):
    """(theta + (1 - theta) e^-r)^n0 by the binomial theorem, each term a Beta and a Gamma integral."""
    y = x[:, 0]
    n0, n, total = int((y == 0).sum()), len(y), y.sum()
    j = np.arange(n0 + 1)  # zeros that are of the Poisson
    beta = betaln(1 + n0 - j, 1 + n - n0 + j)
    poisson = gammaln(2 + total) - (2 + total) * np.log(0.5 + n - n0 + j) + 2 * np.log(0.5)
    return logsumexp(np.log(comb(n0, j)) + beta + poisson) - gammaln(1 + y).sum()


# ----------------------------------------------------------------------------------------------------- the funnel


def funnel(x):
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("N", len(x)):
        theta = pyro.sample("theta", dist.Normal(0.0, (v / 2).exp()))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=x[:, 0])


def nine_values(rng):
    return (1.5 * rng.normal(size=(9, 1)),)


def funnel_truth(params, x):
    def log_joint(u):
        return norm.logpdf(x[:, 0], 0, np.sqrt(1 + np.exp(u))).sum(1) + norm.logpdf(u[:, 0], 0, 3)

    return log_rectangles(log_joint, [(-40.0, 30.0)], 4001)


CASES = [
    Case(
        "stan_two_normals", two_normals, two_heaps, two_normals_truth(ordered=True), tolerance=1e-3, slow=True
    ),
    Case(
        "stan_two_normals_collapse",
        two_normals_collapse,
        two_heaps,
        two_normals_truth(ordered=False),
        tolerance=1e-3,
        slow=True,
    ),
    Case("stan_irt_2pl", irt_2pl, exam, irt_truth, slow=True),
    Case("stan_dogs", dogs, ten_dogs, dogs_truth(log_link=False), slow=True),
    Case(
        "stan_dogs_log",
        dogs_log,
        ten_dogs,
        dogs_truth(log_link=True),
        tolerance=1e-5,
    ),
    Case("stan_capture_m0", capture_m0, how_often_caught, m0_truth),
    Case("stan_capture_mb", capture_mb, lambda rng: (captures(rng),), mb_truth, tolerance=3e-4, slow=True),
    Case("stan_censored", censored, some_above, censored_truth),
    Case("stan_truncated", truncated, above_one, truncated_truth),
    Case("stan_rounding", rounding, rounded, rounding_truth),
    Case("stan_zero_inflated", zero_inflated, counts_with_zeros, zero_inflated_truth),
    Case("stan_funnel", funnel, nine_values, funnel_truth),
]
