"""After Stan's example models: series, Gaussian processes, states, an ordinary differential equation."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.linalg import cho_solve, cholesky
from scipy.special import expit, gammaln, logsumexp
from scipy.stats import gamma, halfcauchy, halfnorm, norm, poisson
from torch.distributions import constraints
from zoo.case import Case
from zoo.integrals import bounds_by_draws, log_integral, log_unit, maximum, normal_vector

# ------------------------------------------------------------------------------------------------ the series' own past


def arma11(x):
    y = x[:, 0]
    mu = pyro.param("mu", torch.tensor(0.0))
    phi = pyro.param("phi", torch.tensor(0.1))
    theta = pyro.param("theta", torch.tensor(0.1))
    sigma = pyro.param("sigma", torch.tensor(1.0), constraint=constraints.positive)
    nu = [mu + phi * mu]
    err = y[0] - nu[0]
    for t in range(1, len(y)):
        nu.append(mu + phi * y[t - 1] + theta * err)
        err = y[t] - nu[t]
    with pyro.plate("T", len(y)):
        pyro.sample("y", dist.Normal(torch.stack(nu), sigma), obs=y)


def arma_series(rng):
    e, y = rng.normal(size=60), np.zeros(60)
    for t in range(1, 60):
        y[t] = 0.3 + 0.6 * y[t - 1] + 0.4 * e[t - 1] + e[t]
    return (y[:, None],)


def arma_truth(params, x):
    y = x[:, 0]

    def log_likelihood(u):
        mu, phi, theta, log_sigma = u
        nu = np.empty(len(y))
        nu[0] = mu + phi * mu
        for t in range(1, len(y)):
            nu[t] = mu + phi * y[t - 1] + theta * (y[t - 1] - nu[t - 1])
        return norm.logpdf(y, nu, np.exp(log_sigma)).sum()

    return maximum(log_likelihood, [0.3, 0.6, 0.3, 0.0])


def ar2(x):
    y = x[:, 0]
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(5.0))
    mean = alpha + beta[0] * y[1:-1] + beta[1] * y[:-2]
    with pyro.plate("T", len(y) - 2):
        pyro.sample("y", dist.Normal(mean, sigma), obs=y[2:])


def ar2_series(rng):
    y = np.zeros(50)
    for t in range(2, 50):
        y[t] = 1 + 0.5 * y[t - 1] - 0.4 * y[t - 2] + rng.normal()
    return (y[10:, None],)


def ar2_truth(params, x):
    y = x[:, 0]
    design = np.c_[10 * np.ones(len(y) - 2), y[1:-1], y[:-2]]

    def log_joint(u):
        sigma = np.exp(u[:, 0])
        cov = design @ design.T + sigma[:, None, None] ** 2 * np.eye(len(y) - 2)
        return normal_vector(y[2:], 0.0, cov) + halfcauchy.logpdf(sigma, scale=5) + u[:, 0]

    return log_integral(log_joint, [0.0], 101)


def garch11(x):
    y = x[:, 0]
    mu = pyro.param("mu", torch.tensor(0.0))
    alpha0 = pyro.param("alpha0", torch.tensor(0.5), constraint=constraints.positive)
    alpha1 = pyro.param("alpha1", torch.tensor(0.2), constraint=constraints.unit_interval)
    beta1 = pyro.param("beta1", torch.tensor(0.2), constraint=constraints.unit_interval)
    sigma = torch.tensor(1.0)
    for t in range(len(y)):
        if t > 0:
            sigma = (alpha0 + alpha1 * (y[t - 1] - mu) ** 2 + beta1 * sigma**2).sqrt()
        pyro.sample(f"y_{t}", dist.Normal(mu, sigma), obs=y[t])


def garch_series(rng):
    y, s = np.zeros(120), 1.0
    for t in range(120):
        s = np.sqrt(0.3 + 0.4 * (y[t - 1] if t else 0) ** 2 + 0.4 * s**2)
        y[t] = s * rng.normal()
    return (y[:, None],)


def garch_truth(params, x):
    y = x[:, 0]

    def log_likelihood(u):
        mu, alpha0, (alpha1, beta1) = u[0], np.exp(u[1]), expit(u[2:])
        variance = np.ones(len(y))
        for t in range(1, len(y)):
            variance[t] = alpha0 + alpha1 * (y[t - 1] - mu) ** 2 + beta1 * variance[t - 1]
        return norm.logpdf(y, mu, np.sqrt(variance)).sum()

    return maximum(log_likelihood, [0.0, -1.0, 0.0, 0.0])


def arch1(x):
    y = x[:, 0]
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    alpha0 = pyro.sample("alpha0", dist.LogNormal(0.0, 1.0))
    alpha1 = pyro.sample("alpha1", dist.Beta(2.0, 2.0))
    sigma = (alpha0 + alpha1 * (y[:-1] - mu) ** 2).sqrt()
    with pyro.plate("T", len(y) - 1):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y[1:])


def arch_series(rng):
    y = np.zeros(60)
    for t in range(1, 60):
        y[t] = 0.2 + np.sqrt(0.5 + 0.5 * (y[t - 1] - 0.2) ** 2) * rng.normal()
    return (y[:, None],)


def arch_truth(params, x):
    y = x[:, 0]

    def log_joint(u):
        alpha1, jacobian = log_unit(u[:, 2])
        sigma = np.sqrt(np.exp(u[:, 1:2]) + alpha1[:, None] * (y[:-1] - u[:, :1]) ** 2)
        prior = norm.logpdf(u[:, :2]).sum(1) + np.log(6 * alpha1 * (1 - alpha1)) + jacobian
        return norm.logpdf(y[1:], u[:, :1], sigma).sum(1) + prior

    return log_integral(log_joint, [0.2, -0.5, 0.0], 31)


def stochastic_volatility(x):
    y = x[:, 0]
    mu = pyro.sample("mu", dist.Cauchy(0.0, 2.0))
    phi = pyro.sample("phi", dist.Uniform(-1.0, 1.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
    h = pyro.sample("h_0", dist.Normal(mu, sigma / (1 - phi**2).sqrt()))
    for t in range(len(y)):
        if t > 0:
            h = pyro.sample(f"h_{t}", dist.Normal(mu + phi * (h - mu), sigma))
        pyro.sample(f"y_{t}", dist.Normal(0.0, (h / 2).exp()), obs=y[t])


def returns(rng):
    h = np.zeros(15)
    for t in range(1, 15):
        h[t] = 0.8 * h[t - 1] + 0.5 * rng.normal()
    return ((np.exp(h / 2) * rng.normal(size=15))[:, None],)


# ----------------------------------------------------------------------------------------------- Gaussian processes


def kernel(x, alpha, rho):
    return alpha**2 * torch.exp(-0.5 * ((x[:, None] - x) / rho) ** 2)


def gp_regression(x, y):
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    cov = kernel(x[:, 0], alpha, rho) + sigma**2 * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), cov), obs=y)


def smooth_curve(rng):
    x = np.linspace(-10, 10, 11)
    return x[:, None], 1.5 * np.sin(x / 4) + 0.4 * rng.normal(size=11)


def rbf(x, u):
    """(M, N, N) kernels at u = log rho, log alpha."""
    rho, alpha = np.exp(u[:, 0, None, None]), np.exp(u[:, 1, None, None])
    return alpha**2 * np.exp(-0.5 * ((x[:, None] - x) / rho) ** 2)


def gp_prior(u):
    return (
        gamma.logpdf(np.exp(u[:, 0]), 25, scale=1 / 4)
        + halfnorm.logpdf(np.exp(u[:, 1]), scale=2)
        + u[:, :2].sum(1)
    )


def gp_truth(params, x, y):
    def log_joint(u):
        sigma = np.exp(u[:, 2])
        cov = rbf(x[:, 0], u) + sigma[:, None, None] ** 2 * np.eye(len(y))
        return normal_vector(y, 0.0, cov) + gp_prior(u) + halfnorm.logpdf(sigma) + u[:, 2]

    return log_integral(log_joint, [1.8, 0.3, -1.0], 25)


def gp_poisson(x, k):
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    root = torch.linalg.cholesky(kernel(x[:, 0], alpha, rho) + 1e-6 * torch.eye(len(x)))
    with pyro.plate("points", len(x)):
        f_tilde = pyro.sample("f_tilde", dist.Normal(0.0, 1.0))
    f = root @ f_tilde
    with pyro.plate("N", len(x)):
        pyro.sample("k", dist.Poisson(f.exp()), obs=k)


def counts_along_a_line(rng):
    x = np.linspace(-10, 10, 11)
    return x[:, None], rng.poisson(np.exp(1 + np.sin(x / 4))).astype(float)


def gp_poisson_truth(params, x, k):
    """Draws of the two hyper-parameters and, given each, of f around its own mode by Newton's steps."""
    n = len(k)

    def log_joint(u):
        out = np.empty(len(u))
        rng = np.random.default_rng(1)
        e = rng.standard_normal((64, n))
        e = np.concatenate([e, -e])
        for m, cov in enumerate(rbf(x[:, 0], u) + 1e-6 * np.eye(n)):
            precision = cho_solve((cholesky(cov, lower=True), True), np.eye(n))
            f = np.log(k + 1)
            for _ in range(12):
                f = f + np.linalg.solve(precision + np.diag(np.exp(f)), k - np.exp(f) - precision @ f)
            root = np.linalg.cholesky(np.linalg.inv(precision + np.diag(np.exp(f))))
            g = f + 1.05 * e @ root.T
            target = poisson.logpmf(k, np.exp(g)).sum(1) - 0.5 * np.einsum("si,ij,sj->s", g, precision, g)
            log_q = -0.5 * (e**2).sum(1) - np.log(1.05 * np.diag(root)).sum()
            out[m] = logsumexp(target - log_q) - np.log(len(e)) + 0.5 * np.linalg.slogdet(precision)[1]
        return out + gp_prior(u)

    return bounds_by_draws(log_joint, [1.8, 0.3], n=600, rounds=2)


# ----------------------------------------------------------------------------------------------------- hidden states


def hmm_example(x):
    y = x[:, 0]
    theta = pyro.sample("theta", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    low = pyro.sample("low", dist.Normal(3.0, 1.0))
    high = pyro.sample("high", dist.Normal(10.0, 1.0))
    mu = torch.stack([low, high], -1)
    z = 0
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(theta[z]), infer={"enumerate": "parallel"})
        pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[t])


def two_states(rng):
    z = (np.arange(20) // 6) % 2
    return ((np.where(z, 10.0, 3.0) + rng.normal(size=20))[:, None],)


def hmm_truth(params, x):
    """Each of the two rows of theta has a uniform prior; the chain starts in state 0."""
    y = x[:, 0]

    def log_joint(u):
        p, jacobian = log_unit(u[:, 2:])  # (M, 2): theta[0, 0], theta[1, 0]
        move = np.log(np.stack([p, 1 - p], -1))  # (M, 2, 2)
        see = norm.logpdf(y[:, None, None], u[:, :2], 1.0)  # (T, M, 2)
        state = move[:, 0] + see[0]
        for t in range(1, len(y)):
            state = logsumexp(state[:, :, None] + move, axis=1) + see[t]
        prior = norm.logpdf(u[:, 0], 3, 1) + norm.logpdf(u[:, 1], 10, 1)
        return logsumexp(state, axis=1) + prior + jacobian.sum(1)

    return log_integral(log_joint, [3.0, 10.0, 1.0, -1.0], 17)


COAL = [4, 5, 4, 0, 1, 4, 3, 4, 0, 6, 3, 3, 4, 0, 2, 6, 3, 3, 5, 4, 5, 3, 1, 4, 4, 1, 5, 5, 3, 4]
COAL += [2, 5, 2, 2, 3, 4, 2, 1, 3, 2, 2, 1, 1, 1, 1, 3, 0, 0, 1, 0, 1, 1, 0, 0, 3, 1, 0, 3, 2, 2]
"""Disasters in British coal mines a year, the first sixty years from 1851 on (Jarrett, Biometrika 1979)."""


def change_point(x):
    D = x[:, 0]
    T = len(D)
    early = pyro.sample("early", dist.Exponential(1.0))
    late = pyro.sample("late", dist.Exponential(1.0))
    s = pyro.sample("s", dist.Categorical(torch.ones(T) / T), infer={"enumerate": "parallel"})
    rate = torch.where(torch.arange(T) < s, early, late)
    with pyro.plate("T", T):
        pyro.sample("D", dist.Poisson(rate), obs=D)


def coal(rng):
    return (np.array(COAL, dtype=float)[:, None],)


def change_point_truth(params, x):
    """Given s, two Gamma integrals of e^-r r^n e^(-t r): n! / (1 + t)^(n + 1)."""
    d = x[:, 0]
    seen = np.concatenate([[0.0], d.cumsum()])[:-1]  # in the s years before the change
    s = np.arange(len(d))
    early = gammaln(1 + seen) - (1 + seen) * np.log1p(s)
    rest = d.sum() - seen
    late = gammaln(1 + rest) - (1 + rest) * np.log1p(len(d) - s)
    return logsumexp(early + late) - np.log(len(d)) - gammaln(1 + d).sum()


# --------------------------------------------------------------------------------------------- hares and lynxes

HARE = [30, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1, 21.4, 22, 25.4, 27.1]
LYNX = [4, 6.1, 9.8, 35.2, 59.4, 41.7, 19, 13, 8.3, 9.1, 7.4]
"""Pelts in thousands, 1900 to 1910 (Hudson's Bay Company)."""


def lotka_volterra(pelts):
    theta = pyro.sample(
        "theta", dist.LogNormal(torch.tensor([0.55, 0.028, 0.8, 0.024]).log(), 0.3).to_event(1)
    )
    z_init = pyro.sample("z_init", dist.LogNormal(torch.tensor([3.4, 1.4]), 0.5).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 1.0))
    alpha, beta, gamma, delta = theta.unbind(-1)

    def slope(u, v):
        return (alpha - beta * v) * u, (-gamma + delta * u) * v

    u, v = z_init.unbind(-1)
    path = []
    for _ in range(len(pelts)):
        path.append(torch.stack([u, v], -1))
        for _ in range(4):  # Heun's rule, a quarter of a year a step
            du, dv = slope(u, v)
            eu, ev = slope(u + du / 4, v + dv / 4)
            u, v = u + (du + eu) / 8, v + (dv + ev) / 8
    z = torch.stack(path, -2)
    with pyro.plate("years", len(pelts)):
        pyro.sample("y", dist.LogNormal(z.log(), sigma).to_event(1), obs=pelts)


def pelts(rng):
    return (np.c_[HARE, LYNX][:8],)


CASES = [
    Case("stan_arma11", arma11, arma_series, arma_truth),
    Case("stan_ar2", ar2, ar2_series, ar2_truth, slow=True),
    Case("stan_garch11", garch11, garch_series, garch_truth, slow=True),
    Case("stan_arch1", arch1, arch_series, arch_truth),
    Case("stan_stochastic_volatility", stochastic_volatility, returns, slow=True),
    Case("stan_gp_regression", gp_regression, smooth_curve, gp_truth, tolerance=3e-4),
    Case(
        "stan_gp_poisson",
        gp_poisson,
        counts_along_a_line,
        gp_poisson_truth,
        slow=True,
    ),
    Case("stan_hmm_example", hmm_example, two_states, hmm_truth, tolerance=1e-4, slow=True),
    Case("stan_change_point", change_point, coal, change_point_truth, tolerance=1e-5, slow=True),
    Case("stan_lotka_volterra", lotka_volterra, pelts, slow=True),
]
