"""After Stan's example models: regressions, groups and votes."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from scipy.special import betaln, expit
from scipy.stats import bernoulli, gamma, halfcauchy, halfnorm, multivariate_normal, norm, poisson, t
from zoo.case import Case
from zoo.integrals import log_integral, maximum, normal_vector

# ------------------------------------------------------------------------------------------------------- one coin


def bernoulli_model(y):
    theta = pyro.sample("theta", dist.Beta(1.0, 1.0))
    with pyro.plate("N", len(y)):
        pyro.sample("y", dist.Bernoulli(theta), obs=y[:, 0])


def ten_flips(rng):
    return (np.array([[0, 1, 0, 0, 0, 0, 0, 0, 0, 1]], dtype=float).T,)  # two of ten


def bernoulli_truth(params, y):
    return betaln(1 + y.sum(), 1 + len(y) - y.sum())


# ---------------------------------------------------------------------------------------------- normal regressions


def kidiq(x, kid_score):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), torch.tensor([100.0, 20.0, 5.0])).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    mean = beta[0] + beta[1] * x[:, 0] + beta[2] * (x[:, 1] - 100)
    with pyro.plate("N", len(x)):
        pyro.sample("kid_score", dist.Normal(mean, sigma), obs=kid_score)


def children(rng):
    x = np.c_[rng.uniform(size=40) < 0.8, rng.normal(100, 15, size=40)].astype(float)
    return x, 80 + 6 * x[:, 0] + 0.6 * (x[:, 1] - 100) + 18 * rng.normal(size=40)


def kidiq_truth(params, x, y):
    design = np.c_[np.ones(len(x)), x[:, 0], x[:, 1] - 100] * [100, 20, 5]

    def log_joint(u):
        sigma = np.exp(u[:, 0])
        cov = design @ design.T + sigma[:, None, None] ** 2 * np.eye(len(y))
        return normal_vector(y, 0.0, cov) + halfcauchy.logpdf(sigma, scale=2.5) + u[:, 0]

    return log_integral(log_joint, [3.0], 101)


def mesquite_log(x, weight):
    beta = pyro.param("beta", torch.zeros(6))
    sigma = pyro.param("sigma", torch.tensor(1.0), constraint=constraints.positive)
    log_size = x[:, :4].log()
    mean = beta[0] + log_size @ beta[1:5] + beta[5] * x[:, 4]
    with pyro.plate("N", len(x)):
        pyro.sample("log_weight", dist.Normal(mean, sigma), obs=weight.log())


def bushes(rng):
    x = np.c_[np.exp(rng.normal(0, 0.4, size=(46, 4))), rng.uniform(size=46) < 0.5]
    return x, np.exp(5 + np.log(x[:, :4]) @ [0.5, 0.4, 0.3, 0.1] + 0.6 * x[:, 4] + 0.3 * rng.normal(size=46))


def mesquite_truth(params, x, weight):
    """The least squares of log weights: -N/2 (1 + log 2 pi s^2)."""
    design = np.c_[np.ones(len(x)), np.log(x[:, :4]), x[:, 4]]
    left = np.linalg.lstsq(design, np.log(weight), rcond=None)[1][0] / len(x)
    return -len(x) / 2 * (1 + np.log(2 * np.pi * left))


# ---------------------------------------------------------------------------------------------------------- radon

N_COUNTIES = 8


def radon_pooled(x, log_radon):
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("houses", len(x)):
        pyro.sample("y", dist.Normal(alpha + beta * x[:, 0], sigma), obs=log_radon)


def radon_unpooled(x, log_radon):
    with pyro.plate("counties", N_COUNTIES):
        alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    county = x[:, 1].long()
    with pyro.plate("houses", len(x)):
        pyro.sample("y", dist.Normal(alpha[county] + beta * x[:, 0], sigma), obs=log_radon)


def radon_groups(x, log_radon):
    mu_alpha = pyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    sigma_alpha = pyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    with pyro.plate("counties", N_COUNTIES):
        alpha = pyro.sample("alpha", dist.Normal(mu_alpha, sigma_alpha))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    county = x[:, 1].long()
    with pyro.plate("houses", len(x)):
        pyro.sample("y", dist.Normal(alpha[county] + beta * x[:, 0], sigma), obs=log_radon)


def houses(rng):
    county = rng.integers(0, N_COUNTIES, size=50)
    floor = (rng.uniform(size=50) < 0.3).astype(float)
    alpha = 1.4 + 0.4 * rng.normal(size=N_COUNTIES)
    return np.c_[floor, county], alpha[county] - 0.7 * floor + 0.6 * rng.normal(size=50)


def radon_truth(grouped):
    """Normal given the scales; `grouped`: "pooled", "unpooled" or "groups"."""

    def truth(params, x, y):
        member = np.eye(N_COUNTIES)[x[:, 1].astype(int)]
        same, floor, unit = member @ member.T, np.outer(x[:, 0], x[:, 0]), np.eye(len(y))
        known = 100 * floor + 100 * (same if grouped == "unpooled" else np.ones_like(same))

        def log_joint(u):
            scale = np.exp(u)
            cov = known + scale[:, 0, None, None] ** 2 * unit
            if grouped == "groups":
                cov = cov + scale[:, 1, None, None] ** 2 * same
            return normal_vector(y, 0.0, cov) + (halfnorm.logpdf(scale) + u).sum(1)

        if grouped == "groups":  # a scale of zero is not excluded: wide to the left
            return log_integral_of_two_scales(log_joint)
        return log_integral(log_joint, [-0.5], 81)

    return truth


def log_integral_of_two_scales(log_joint):
    from zoo.integrals import log_rectangles

    return log_rectangles(log_joint, [(-2.0, 1.0), (-14.0, 2.0)], 129)


# ------------------------------------------------------------------------------------------------- binary outcomes


def wells(x, switched):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    logits = beta[0] + beta[1] * x[:, 0] + beta[2] * x[:, 1]
    with pyro.plate("N", len(x)):
        pyro.sample("switched", dist.Bernoulli(logits=logits), obs=switched)


def households(rng):
    x = np.c_[rng.gamma(2, 0.25, size=100), rng.gamma(2, 0.8, size=100)]  # distance / 100 m, arsenic
    return x, (rng.uniform(size=100) < expit(-0.9 * x[:, 0] + 0.5 * x[:, 1])).astype(float)


def nes_logit(x, vote):
    a = pyro.sample("a", dist.Normal(0.0, 5.0))
    b = pyro.sample("b", dist.Normal(0.0, 5.0))
    for i in pyro.plate("N", len(x)):
        pyro.sample(f"vote_{i}", dist.Bernoulli(logits=a + b * x[i, 0]), obs=vote[i])


def votes(rng):
    income = rng.integers(1, 6, size=40).astype(float)
    return income[:, None], (rng.uniform(size=40) < expit(-1.4 + 0.33 * income)).astype(float)


def logistic_truth(scale):
    def truth(params, x, y):
        design = np.c_[np.ones(len(x)), x]

        def log_joint(u):
            return bernoulli.logpmf(y, expit(u @ design.T)).sum(1) + norm.logpdf(u, 0, scale).sum(1)

        return log_integral(log_joint, np.zeros(design.shape[1]), 31)

    return truth


# ------------------------------------------------------------------------------------------- counts with years' effects

N_YEARS = 9


def glmm_poisson(x, count):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
    sd = pyro.sample("sd", dist.Uniform(0.0, 5.0))
    with pyro.plate("years", N_YEARS):
        eps = pyro.sample("eps", dist.Normal(0.0, sd))
    year = x[:, 0].long()
    log_lambda = mu + slope * (x[:, 0] - 4) / 4 + eps[year]
    with pyro.plate("N", len(x)):
        pyro.sample("C", dist.Poisson(log_lambda.exp()), obs=count)


def counts_of_years(rng):
    year = np.repeat(np.arange(N_YEARS), 5)
    rate = np.exp(2 + 0.3 * (year - 4) / 4 + 0.4 * rng.normal(size=N_YEARS)[year])
    return year[:, None].astype(float), rng.poisson(rate).astype(float)


def glmm_truth(params, x, count):
    year = x[:, 0].astype(int)
    total = np.bincount(year, count)  # (G,)
    constant = poisson.logpmf(count, 1.0).sum() + len(count)
    e = np.linspace(-8, 8, 121)
    log_w = norm.logpdf(e) + np.log(e[1] - e[0])

    def log_joint(u):
        sd = 5 * expit(u[:, 2])
        eta = u[:, 0, None] + u[:, 1, None] * (np.arange(N_YEARS) - 4) / 4  # (M, G)
        eta = eta[..., None] + sd[:, None, None] * e
        inner = np.logaddexp.reduce(total[:, None] * eta - 5 * np.exp(eta) + log_w, axis=-1).sum(1)
        jacobian = -np.logaddexp(0, -u[:, 2]) - np.logaddexp(0, u[:, 2])  # of sd / 5, whose prior is uniform
        return constant + inner + norm.logpdf(u[:, :2], 0, 10).sum(1) + jacobian

    return log_integral(log_joint, [2.0, 0.3, -2.3], 21)


# ------------------------------------------------------------------------------------------------------- the guide


def meta_analysis(standard_error, effect):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("trials", len(effect)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, standard_error[:, 0]), obs=effect)


def trials(rng):
    se = rng.uniform(0.2, 0.8, size=12)
    return se[:, None], 0.3 + 0.5 * rng.normal(size=12) + se * rng.normal(size=12)


def meta_truth(params, se, y):
    def log_joint(u):
        tau = np.exp(u[:, 1])
        inner = norm.logpdf(y, u[:, :1], np.hypot(tau[:, None], se[:, 0])).sum(1)
        return inner + norm.logpdf(u[:, 0], 0, 5) + halfcauchy.logpdf(tau, scale=5) + u[:, 1]

    from zoo.integrals import log_rectangles

    return log_rectangles(log_joint, [(-3.0, 4.0), (-16.0, 3.0)], 301)


def robust_student(x, y):
    alpha = pyro.sample("alpha", dist.Normal(0.0, 5.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 5.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    nu = pyro.sample("nu", dist.Gamma(2.0, 0.1))
    with pyro.plate("N", len(x)):
        pyro.sample("y", dist.StudentT(nu, alpha + beta * x[:, 0], sigma), obs=y)


def heavy_tails(rng):
    x = rng.normal(size=(40, 1))
    return x, 1 + 2 * x[:, 0] + 0.5 * rng.standard_t(3, size=40)


def robust_truth(params, x, y):
    def log_joint(u):
        sigma, nu = np.exp(u[:, 2]), np.exp(u[:, 3])
        prior = (
            norm.logpdf(u[:, :2], 0, 5).sum(1)
            + halfnorm.logpdf(sigma, scale=2)
            + gamma.logpdf(nu, 2, scale=10)
        )
        mean = u[:, :1] + u[:, 1:2] * x[:, 0]
        return t.logpdf(y, nu[:, None], mean, sigma[:, None]).sum(1) + prior + u[:, 2] + u[:, 3]

    return log_integral(log_joint, [1.0, 2.0, -0.7, 1.0], 21)


def measurement_error(table):
    alpha = pyro.param("alpha", torch.tensor(0.0))
    beta = pyro.param("beta", torch.tensor(1.0))
    sigma = pyro.param("sigma", torch.tensor(1.0), constraint=constraints.positive)
    mu_x = pyro.param("mu_x", torch.tensor(0.0))
    sigma_x = pyro.param("sigma_x", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("N", len(table)):
        x = pyro.sample("x", dist.Normal(mu_x, sigma_x))
        pyro.sample("x_meas", dist.Normal(x, 0.5), obs=table[:, 0])
        pyro.sample("y", dist.Normal(alpha + beta * x, sigma), obs=table[:, 1])


def measured(rng):
    x = 3 + rng.normal(size=60)
    return (np.c_[x + 0.5 * rng.normal(size=60), 1 + 1.5 * x + 0.4 * rng.normal(size=60)],)


def measurement_truth(params, table):
    """Five parameters match the five moments: the maximum is that of a free bivariate normal."""
    return multivariate_normal(table.mean(0), np.cov(table.T, bias=True)).logpdf(table).sum()


def ordered_logistic(x, y):
    beta = pyro.param("beta", torch.tensor(0.0))
    cuts = pyro.param("cuts", torch.tensor([-1.0, 1.0]), constraint=constraints.ordered_vector)
    with pyro.plate("N", len(x)):
        pyro.sample("y", dist.OrderedLogistic(beta * x[:, 0], cuts), obs=y)


def ratings(rng):
    x = rng.normal(size=(80, 1))
    return x, ((x[:, 0] + rng.logistic(size=80))[:, None] > [-0.5, 1.5]).sum(1).astype(float)


def ordered_truth(params, x, y):
    def log_likelihood(u):
        cut = np.array([-np.inf, u[1], u[1] + np.exp(u[2]), np.inf])
        code = y.astype(int)
        p = expit(cut[code + 1] - u[0] * x[:, 0]) - expit(cut[code] - u[0] * x[:, 0])
        return np.log(p).sum()

    return maximum(log_likelihood, [1.0, -0.5, 0.7])


CASES = [
    Case("stan_bernoulli", bernoulli_model, ten_flips, bernoulli_truth),
    Case("stan_kidiq", kidiq, children, kidiq_truth, slow=True),
    Case("stan_mesquite_log", mesquite_log, bushes, mesquite_truth),
    Case("stan_radon_pooled", radon_pooled, houses, radon_truth("pooled")),
    Case("stan_radon_unpooled", radon_unpooled, houses, radon_truth("unpooled")),
    Case("stan_radon_groups", radon_groups, houses, radon_truth("groups"), slow=True),
    Case("stan_wells", wells, households, logistic_truth(2.0)),
    Case("stan_nes_logit", nes_logit, votes, logistic_truth(5.0)),
    Case("stan_glmm_poisson", glmm_poisson, counts_of_years, glmm_truth, tolerance=1e-4, slow=True),
    Case("stan_meta_analysis", meta_analysis, trials, meta_truth),
    Case("stan_robust_student", robust_student, heavy_tails, robust_truth, slow=True),
    Case("stan_measurement_error", measurement_error, measured, measurement_truth),
    Case("stan_ordered_logistic", ordered_logistic, ratings, ordered_truth),
]
