"""After BUGS, volumes I and II: growth, tables of two by two, many categories, one change, repeated counts."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.special import expit, gammaln, logsumexp
from scipy.stats import halfnorm, multivariate_normal, norm
from torch.distributions import constraints
from zoo.case import Case
from zoo.integrals import bounds_by_draws, log_integral, log_rectangles, log_unit, normal_vector
from zoo.programs_bugs_one import normal_vector_with_fixed, steps, two_binomials

# ------------------------------------------------------------------------------------------------------ growth


def jaws(y):
    """Heights of a bone at four ages: a line of age, a covariance without form."""
    beta0 = pyro.param("beta0", torch.tensor(48.0))
    beta1 = pyro.param("beta1", torch.tensor(1.0))
    root = pyro.param("root", 2 * torch.eye(4), constraint=constraints.lower_cholesky)
    age = torch.tensor([8.0, 8.5, 9.0, 9.5])
    with pyro.plate("boys", len(y)):
        pyro.sample("Y", dist.MultivariateNormal(beta0 + beta1 * (age - 8.75), scale_tril=root), obs=y)


def twenty_boys(rng):
    level = 50 + 2.5 * rng.normal(size=(20, 1))
    return (level + 1.9 * (np.array([8.0, 8.5, 9.0, 9.5]) - 8.75) + 0.7 * rng.normal(size=(20, 4)),)


def jaws_truth(params, y):
    """The maximum of a growth curve (Khatri 1966): generalised least squares by the rows' own covariance."""
    design = np.c_[np.ones(4), np.array([8.0, 8.5, 9.0, 9.5]) - 8.75]
    cov, centre = np.cov(y.T, bias=True), y.mean(0)
    weight = np.linalg.solve(cov, design)
    mean = design @ np.linalg.solve(design.T @ weight, weight.T @ centre)
    return multivariate_normal(mean, cov + np.outer(centre - mean, centre - mean)).logpdf(y).sum()


def birats(weight):
    mu = pyro.sample("mu", dist.Normal(torch.tensor([240.0, 6.0]), torch.tensor([100.0, 10.0])).to_event(1))
    scales = pyro.sample("scales", dist.LogNormal(torch.tensor([2.5, -0.5]), 0.5).to_event(1))
    corr = pyro.sample("corr", dist.LKJCholesky(2, 1.0))
    sigma = pyro.sample("sigma", dist.LogNormal(1.8, 0.5))
    root = torch.diag_embed(scales) @ corr
    age = torch.tensor([8.0, 15.0, 22.0, 29.0, 36.0]) - 22
    with pyro.plate("rats", len(weight)):
        line = pyro.sample("line", dist.MultivariateNormal(mu, scale_tril=root))
        pyro.sample("Y", dist.Normal(line[..., :1] + line[..., 1:] * age, sigma).to_event(1), obs=weight)


def eight_rats(rng):
    line = np.array([240, 6]) + rng.normal(size=(8, 2)) @ np.array([[14, 0.4], [0, 0.6]])
    return (line[:, :1] + line[:, 1:] * np.arange(-14, 15, 7) + 6 * rng.normal(size=(8, 5)),)


def birats_truth(params, y):
    """Normal given two scales, the correlation, uniform between -1 and 1, and the noise."""
    n, design = len(y), np.c_[np.ones(5), np.arange(-14.0, 15, 7)]
    prior_cov = design @ np.diag([100.0**2, 10.0**2]) @ design.T
    centre = y.mean(0)
    spread = (y - centre).T @ (y - centre)
    prior_mean = design @ [240, 6]

    def log_joint(u):
        s = np.exp(u[:, :2])
        share, jacobian = log_unit(u[:, 2])
        rho = 2 * share - 1
        inner = np.stack([s[:, 0] ** 2, rho * s[:, 0] * s[:, 1], rho * s[:, 0] * s[:, 1], s[:, 1] ** 2], -1)
        one = design @ inner.reshape(-1, 2, 2) @ design.T + np.exp(2 * u[:, 3])[:, None, None] * np.eye(5)
        inverse = np.linalg.inv(one)
        off = np.einsum("mij,ij->m", inverse, spread) + (n - 1) * (
            np.linalg.slogdet(one)[1] + 5 * np.log(2 * np.pi)
        )
        mean = normal_vector(np.sqrt(n) * (centre - prior_mean), 0.0, one + n * prior_cov)
        prior = norm.logpdf(u[:, [0, 1, 3]], [2.5, -0.5, 1.8], 0.5).sum(1) + jacobian
        return mean - 0.5 * off + prior

    return log_integral(log_joint, [2.5, -0.5, 0.0, 1.8], 17)


# ----------------------------------------------------------------------------------------- tables of two by two


def oxford(x, r):
    """Cases and controls that were exposed, in strata of birth years: the log odds ratio moves with time."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    year, n0, n1 = x.unbind(-1)
    with pyro.plate("strata", len(x)):
        mu = pyro.sample("mu", dist.Normal(0.0, 100.0))
        b = pyro.sample("b", dist.Normal(0.0, sigma))
        pyro.sample("r0", dist.Binomial(n0, logits=mu), obs=r[:, 0])
        pyro.sample("r1", dist.Binomial(n1, logits=mu + alpha + slope * year + b), obs=r[:, 1])


def eight_strata(rng):
    year, n = np.arange(-4.0, 4) / 4, rng.integers(40, 120, size=(8, 2)).astype(float)
    mu = -1 + 0.3 * rng.normal(size=8)
    logits = np.c_[mu, mu + 0.6 - 0.3 * year + 0.3 * rng.normal(size=8)]
    return np.c_[year, n], rng.binomial(n.astype(int), expit(logits)).astype(float)


def oxford_truth(params, x, r):
    e, log_w = steps(-6, 6, 25)

    def log_joint(u):
        sd, mean = np.exp(u[:, 2:]), u[:, :1] + u[:, 1:2] * x[:, 0]
        inner = np.concatenate(
            [
                two_binomials(
                    x[[g], 1:], r[[g]], e, log_w, mean[:, [g]], sd, lambda mu: norm.logpdf(mu, 0, 100)
                )
                for g in range(len(x))
            ],
            1,
        )
        prior = norm.logpdf(u[:, :2], 0, 10).sum(1) + halfnorm.logpdf(sd[:, 0]) + u[:, 2]
        return inner.sum(1) + prior

    return bounds_by_draws(log_joint, [0.5, 0.0, -1.0], n=1500, rounds=3)


MAGNESIUM = np.array(
    [
        [36, 135, 200, 46, 148, 56, 23, 1157],
        [2, 23, 7, 1, 8, 9, 3, 118],
        [40, 135, 200, 48, 150, 59, 25, 1159],
        [1, 9, 2, 1, 10, 1, 1, 90],
    ],
    dtype=float,
)
"""Patients and deaths without and with magnesium, eight trials (Sutton and others 2000)."""


def magnesium(n, r):
    mu = pyro.sample("mu", dist.Uniform(-10.0, 10.0))
    tau = pyro.sample("tau", dist.Uniform(0.0, 50.0))
    with pyro.plate("trials", len(n)):
        pc = pyro.sample("pc", dist.Uniform(0.0, 1.0))
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("rc", dist.Binomial(n[:, 0], pc), obs=r[:, 0])
        pyro.sample("rt", dist.Binomial(n[:, 1], logits=theta + pc.log() - (1 - pc).log()), obs=r[:, 1])


def magnesium_trials(rng):
    return MAGNESIUM[[0, 2]].T, MAGNESIUM[[1, 3]].T


def magnesium_truth(params, n, r):
    e, log_w = steps(-7, 7, 41)

    def log_joint(u):
        sd = np.exp(u[:, 1:])
        inner = two_binomials(n, r, e, log_w, u[:, :1], sd, lambda mu: log_unit(mu)[1]).sum(1)
        return np.where(sd[:, 0] < 50, inner - np.log(20) - np.log(50) + u[:, 1], -np.inf)

    return log_rectangles(log_joint, [(-5.0, 3.0), (-9.0, 2.5)], 41)


# ------------------------------------------------------------------------------------ many categories, one change


def alligators(x, food):
    """Main food, one of three, of alligators of two sizes in three lakes."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    beta = pyro.sample("beta", dist.Normal(0.0, 3.0).expand([2, 2]).to_event(2))
    gamma_ = pyro.sample("gamma", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    zero = torch.zeros(1, 2)
    lake, size = x[:, 0].long(), x[:, 1]
    eta = alpha + torch.cat([zero, beta])[lake] + gamma_ * size[:, None]
    logits = torch.cat([torch.zeros(len(x), 1), eta], -1)
    with pyro.plate("alligators", len(x)):
        pyro.sample("food", dist.Categorical(logits=logits), obs=food)


def eighty_alligators(rng):
    lake, size = rng.integers(0, 3, size=80), rng.integers(0, 2, size=80)
    beta, gamma_ = np.array([[0, 0], [1.0, -1.0], [-0.5, 0.5]]), np.array([-1.0, 0.3])
    eta = np.c_[np.zeros(80), beta[lake] + gamma_ * size[:, None]]
    return np.c_[lake, size].astype(float), (eta + rng.gumbel(size=(80, 3))).argmax(1).astype(float)


def stagnant(x, y):
    """Two lines that meet at one of the points."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    k = pyro.sample("k", dist.Categorical(torch.ones(len(x)) / len(x)), infer={"enumerate": "parallel"})
    t = x[:, 0]
    change = t[k]
    after = torch.arange(len(x)) > k
    mu = alpha + torch.where(after, beta[1], beta[0]) * (t - change)
    with pyro.plate("N", len(x)):
        pyro.sample("Y", dist.Normal(mu, sigma), obs=y)


def flow_over_a_weir(rng):
    t = np.linspace(-1.4, 1.1, 20)
    return t[:, None], 0.55 - np.where(t > 0.1, 1.0, 0.4) * (t - 0.1) + 0.05 * rng.normal(size=20)


def stagnant_truth(params, x, y):
    """Normal given the change point and the noise: one variable by quadrature for each point."""
    n, t = len(y), x[:, 0]
    parts = []
    for k in range(n):
        after = np.arange(n) > k
        design = 10 * np.c_[np.ones(n), (t - t[k]) * ~after, (t - t[k]) * after]

        def log_joint(u, design=design):
            cov = np.exp(2 * u)[..., None] * np.eye(n)
            return normal_vector_with_fixed(y, cov, design) + halfnorm.logpdf(np.exp(u[:, 0])) + u[:, 0]

        parts.append(log_rectangles(log_joint, [(-5.0, 1.5)], 161))
    return logsumexp(parts) - np.log(n)


# ------------------------------------------------------------------------------------------------ repeated counts


def epil(x, y):
    """Seizures in four periods, with effects of patients and of periods within patients."""
    a0 = pyro.sample("a0", dist.Normal(0.0, 10.0))
    a_base = pyro.sample("a_base", dist.Normal(0.0, 10.0))
    a_trt = pyro.sample("a_trt", dist.Normal(0.0, 10.0))
    a_v4 = pyro.sample("a_v4", dist.Normal(0.0, 10.0))
    sigma_b1 = pyro.sample("sigma_b1", dist.HalfNormal(1.0))
    sigma_b = pyro.sample("sigma_b", dist.HalfNormal(1.0))
    log_base, trt = x.unbind(-1)
    v4 = torch.tensor([0.0, 0.0, 0.0, 1.0])
    with pyro.plate("patients", len(x)):
        b1 = pyro.sample("b1", dist.Normal(0.0, sigma_b1))
        b = pyro.sample("b", dist.Normal(torch.zeros(4), sigma_b[..., None]).to_event(1))
        mu = (a0 + a_base * log_base + a_trt * trt + b1)[..., None] + a_v4 * v4 + b
        pyro.sample("y", dist.Poisson(mu.exp()).to_event(1), obs=y)


def twelve_records(rng):
    log_base, trt = 0.6 * rng.normal(size=12), np.arange(12.0) % 2
    mu = 1.8 + 0.9 * log_base - 0.3 * trt + 0.4 * rng.normal(size=12)
    mu = mu[:, None] - 0.1 * np.array([0, 0, 0, 1]) + 0.3 * rng.normal(size=(12, 4))
    return np.c_[log_base, trt], rng.poisson(np.exp(mu)).astype(float)


def epil_truth(params, x, y):
    """Given b1 the four periods are independent: a grid within a grid."""
    e1, log_w1 = steps(-6, 6, 25)
    e, log_w = steps(-6, 6, 25)

    def log_joint(u):
        out = np.zeros(len(u))
        s1, s = np.exp(u[:, 4]), np.exp(u[:, 5])
        for (base, trt), counts in zip(x, y, strict=True):
            mean = (u[:, 0] + u[:, 1] * base + u[:, 2] * trt)[:, None] + s1[:, None] * e1  # (M, E1)
            inner = np.zeros_like(mean)
            for late, group in ((0, counts[:3]), (1, counts[3:])):
                eta = (mean + u[:, 3:4] * late)[..., None] + s[:, None, None] * e  # (M, E1, E)
                with np.errstate(over="ignore", divide="ignore"):  # a rate beyond all floats: no mass
                    rate = np.exp(eta)
                    for count in group:
                        inner += np.log((np.exp(count * eta - rate + log_w)).sum(-1)) - gammaln(1 + count)
            out += np.logaddexp.reduce(inner + log_w1, -1)
        prior = norm.logpdf(u[:, :4], 0, 10).sum(1) + (halfnorm.logpdf(np.exp(u[:, 4:])) + u[:, 4:]).sum(1)
        return out + prior

    return bounds_by_draws(log_joint, [1.8, 0.9, -0.3, -0.1, -0.9, -1.2], n=1500, rounds=3)


CASES = [
    Case("bugs_jaws", jaws, twenty_boys, jaws_truth),
    Case("bugs_birats", birats, eight_rats, birats_truth, tolerance=1e-4, slow=True),
    Case("bugs_oxford", oxford, eight_strata, oxford_truth, slow=True),
    Case("bugs_magnesium", magnesium, magnesium_trials, magnesium_truth, slow=True),
    Case("bugs_alligators", alligators, eighty_alligators, slow=True),
    Case(
        "bugs_stagnant",
        stagnant,
        flow_over_a_weir,
        stagnant_truth,
        slow=True,
    ),
    Case("bugs_epil", epil, twelve_records, epil_truth, warns="tail so heavy", slow=True),
]
