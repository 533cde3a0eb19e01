"""After BUGS, volume I: groups, counts, rates and tests, with the vague priors that its programs have."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.special import expit, gammaln
from scipy.stats import gamma, halfnorm, nbinom, norm, weibull_min
from torch.distributions import constraints
from zoo.case import Case
from zoo.integrals import bounds_by_draws, log_integral, log_rectangles, maximum, normal_vector

VAGUE = 0.001


def log_vague(u):
    """log density of log tau where tau is Gamma(0.001, 0.001)."""
    return gamma.logpdf(np.exp(u), VAGUE, scale=1 / VAGUE) + u


def steps(low, high, n):
    """Nodes and log-weights of the rectangle rule under N(0, 1)."""
    e = np.linspace(low, high, n)
    return e, norm.logpdf(e) + np.log(e[1] - e[0])


# ---------------------------------------------------------------------------------------------------- normal groups

DAYS = np.array([8.0, 15.0, 22.0, 29.0, 36.0])


def rats(weight):
    alpha_c = pyro.sample("alpha_c", dist.Normal(0.0, 1000.0))
    beta_c = pyro.sample("beta_c", dist.Normal(0.0, 1000.0))
    tau_c = pyro.sample("tau_c", dist.Gamma(0.001, 0.001))
    tau_alpha = pyro.sample("tau_alpha", dist.Gamma(0.001, 0.001))
    tau_beta = pyro.sample("tau_beta", dist.Gamma(0.001, 0.001))
    age = torch.tensor([8.0, 15.0, 22.0, 29.0, 36.0]) - 22
    with pyro.plate("rats", len(weight)):
        alpha = pyro.sample("alpha", dist.Normal(alpha_c, tau_alpha**-0.5))
        beta = pyro.sample("beta", dist.Normal(beta_c, tau_beta**-0.5))
        mean = alpha[:, None] + beta[:, None] * age
        pyro.sample("Y", dist.Normal(mean, tau_c**-0.5).to_event(1), obs=weight)


def ten_rats(rng):
    alpha, beta = 240 + 14 * rng.normal(size=(10, 1)), 6 + 0.9 * rng.normal(size=(10, 1))
    return (np.round(alpha + beta * (DAYS - 22) + 6 * rng.normal(size=(10, 5))),)


def rats_truth(params, y):
    """Normal given the three precisions: the mean of the rats and their deviations from it are independent."""
    n, design = len(y), np.c_[np.ones(5), DAYS - 22]
    centre = y.mean(0)
    spread = (y - centre).T @ (y - centre)

    def log_joint(u):
        var = np.exp(-u)  # noise, alpha, beta
        one = var[:, 0, None, None] * np.eye(5)
        one = one + np.einsum("ij,mj,kj->mik", design, var[:, 1:], design)
        inverse = np.linalg.inv(one)
        _, log_det = np.linalg.slogdet(one)
        # n - 1 independent deviations of law N(0, one), and the mean, n^(1/2) times N(0, one + n 1000^2 X X')
        off = -0.5 * np.einsum("mij,ij->m", inverse, spread) - (n - 1) / 2 * (log_det + 5 * np.log(2 * np.pi))
        wide = one + n * 1e6 * design @ design.T
        return off + normal_vector(np.sqrt(n) * centre, 0.0, wide) + log_vague(u).sum(1)

    return log_integral(log_joint, [-3.6, -5.0, 0.0], 41)


def dyes(x, y):
    theta = pyro.sample("theta", dist.Normal(0.0, 1e5))
    tau_with = pyro.sample("tau_with", dist.Gamma(0.001, 0.001))
    tau_btw = pyro.sample("tau_btw", dist.Gamma(0.001, 0.001))
    with pyro.plate("batches", 6):
        mu = pyro.sample("mu", dist.Normal(theta, tau_btw**-0.5))
    batch = x[:, 0].long()
    with pyro.plate("samples", len(x)):
        pyro.sample("y", dist.Normal(mu[batch], tau_with**-0.5), obs=y)


DYES = """1545 1440 1440 1520 1580  1540 1555 1490 1560 1495  1595 1550 1605 1510 1560
          1445 1440 1595 1465 1545  1595 1630 1515 1635 1625  1520 1455 1450 1480 1445"""
"""Yield of dyestuff in grams, six batches of five samples (Davies 1967; Box and Tiao 1973)."""


def six_batches(rng):
    return np.repeat(np.arange(6.0), 5)[:, None], np.array(DYES.split(), dtype=float)


def dyes_truth(params, x, y):
    same = (x == x.T).astype(float)

    def log_joint(u):
        var = np.exp(-u)[..., None, None]
        cov = var[:, 0] * np.eye(30) + var[:, 1] * same + 1e10
        return normal_vector(y, 0.0, cov) + log_vague(u).sum(1)

    return log_rectangles(log_joint, [(-11.0, -5.0), (-14.0, 12.0)], 101)


def equiv(x, y):
    """Two formulations in two periods: x is the order, 1 or -1; y has the logarithms of both periods."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1000.0))
    phi = pyro.sample("phi", dist.Normal(0.0, 1000.0))
    period = pyro.sample("period", dist.Normal(0.0, 1000.0))
    tau = pyro.sample("tau", dist.Gamma(0.001, 0.001).expand([2]).to_event(1))
    sign = torch.tensor([1.0, -1.0])
    with pyro.plate("subjects", len(x)):
        delta = pyro.sample("delta", dist.Normal(0.0, tau[1] ** -0.5))
        m = mu + x * sign * phi / 2 + sign * period / 2 + delta[:, None]
        pyro.sample("Y", dist.Normal(m, tau[0] ** -0.5).to_event(1), obs=y)


def ten_subjects(rng):
    x = np.array([1.0, -1, -1, 1, 1, -1, -1, 1, -1, 1])[:, None]
    m = 1.4 + 0.15 * rng.normal(size=(10, 1)) + np.array([1, -1]) * (-0.09 + 0.01 * x)
    return x, m + 0.11 * rng.normal(size=(10, 2))


def equiv_truth(params, x, y):
    sign = np.tile([1.0, -1.0], len(x))
    design = np.c_[np.ones(20), np.repeat(x[:, 0], 2) * sign / 2, sign / 2] * 1000
    same = np.kron(np.eye(len(x)), np.ones((2, 2)))

    def log_joint(u):
        var = np.exp(-u)[..., None, None]
        cov = var[:, 0] * np.eye(20) + var[:, 1] * same
        return normal_vector_with_fixed(y.ravel(), cov, design) + log_vague(u).sum(1)

    return log_rectangles(log_joint, [(0.0, 10.0), (-2.0, 16.0)], 161)


def normal_vector_with_fixed(y, cov, design):
    """log N(y; 0, C + D D') of wide D, by the inverse of C: no digits are lost to the width."""
    inverse = np.linalg.inv(cov)
    inner = np.eye(design.shape[1]) + design.T @ inverse @ design
    right = design.T @ inverse @ y
    log_det = np.linalg.slogdet(cov)[1] + np.linalg.slogdet(inner)[1]
    fit = np.einsum("mi,mi->m", right, np.linalg.solve(inner, right[..., None])[..., 0])
    return -0.5 * (np.einsum("i,mij,j->m", y, inverse, y) - fit + log_det + len(y) * np.log(2 * np.pi))


# ----------------------------------------------------------------------------------------------------------- counts

PUMPS = np.array(
    [[94.3, 15.7, 62.9, 126, 5.24, 31.4, 1.05, 1.05, 2.1, 10.5], [5, 1, 5, 14, 3, 19, 1, 1, 4, 22]]
)
"""Thousands of hours and failures of ten pumps of a power plant (Gaver and O'Muircheartaigh 1987)."""


def pumps(t, x):
    alpha = pyro.sample("alpha", dist.Exponential(1.0))
    beta = pyro.sample("beta", dist.Gamma(0.1, 1.0))
    with pyro.plate("pumps", len(t)):
        theta = pyro.sample("theta", dist.Gamma(alpha, beta))
        pyro.sample("x", dist.Poisson(theta * t[:, 0]), obs=x)


def ten_pumps(rng):
    return PUMPS[0][:, None], PUMPS[1]


def pumps_truth(params, t, x):
    def log_joint(u):
        alpha, beta = np.exp(u[:, :1]), np.exp(u[:, 1:])
        inner = nbinom.logpmf(x, alpha, beta / (beta + t[:, 0])).sum(1)
        return inner - alpha[:, 0] + gamma.logpdf(beta[:, 0], 0.1) + u.sum(1)

    return log_integral(log_joint, [-0.3, 0.0], 61)


SEEDS = np.array(
    [
        [10, 23, 23, 26, 17, 5, 53, 55, 32, 46, 10, 8, 10, 8, 23, 0, 3, 22, 15, 32, 3],
        [39, 62, 81, 51, 39, 6, 74, 72, 51, 79, 13, 16, 30, 28, 45, 4, 12, 41, 30, 51, 7],
        [0] * 11 + [1] * 10,
        [0] * 5 + [1] * 6 + [0] * 5 + [1] * 5,
    ],
    dtype=float,
)
"""Seeds that germinated, seeds, type of seed and root extract of 21 plates (Crowder 1978)."""


def seeds(x, r):
    alpha0 = pyro.sample("alpha0", dist.Normal(0.0, 1000.0))
    alpha1 = pyro.sample("alpha1", dist.Normal(0.0, 1000.0))
    alpha2 = pyro.sample("alpha2", dist.Normal(0.0, 1000.0))
    alpha12 = pyro.sample("alpha12", dist.Normal(0.0, 1000.0))
    tau = pyro.sample("tau", dist.Gamma(0.001, 0.001))
    n, x1, x2 = x.unbind(-1)
    with pyro.plate("plates", len(x)):
        b = pyro.sample("b", dist.Normal(0.0, tau**-0.5))
        logits = alpha0 + alpha1 * x1 + alpha2 * x2 + alpha12 * x1 * x2 + b
        pyro.sample("r", dist.Binomial(n, logits=logits), obs=r)


def seed_plates(rng):
    return SEEDS[1:].T, SEEDS[0]


def seeds_truth(params, x, r):
    n, design = x[:, 0], np.c_[np.ones(21), x[:, 1:], x[:, 1] * x[:, 2]]
    constant = (gammaln(1 + n) - gammaln(1 + r) - gammaln(1 + n - r)).sum()
    e, log_w = steps(-8, 8, 41)

    def log_joint(u):
        eta = (u[:, :4] @ design.T)[..., None] + np.exp(-u[:, 4] / 2)[:, None, None] * e
        inner = r[:, None] * eta - n[:, None] * np.logaddexp(0, eta) + log_w
        return (
            constant
            + np.logaddexp.reduce(inner, -1).sum(1)
            + norm.logpdf(u[:, :4], 0, 1000).sum(1)
            + log_vague(u[:, 4])
        )

    return bounds_by_draws(log_joint, [-0.5, 0.1, 1.3, -0.8, 2.3], n=3000, rounds=4)


SURGICAL = np.array(
    [[47, 148, 119, 810, 211, 196, 148, 215, 207, 97, 256, 360], [0, 18, 8, 46, 8, 13, 9, 31, 14, 8, 29, 24]],
    dtype=float,
)
"""Operations and deaths of twelve hospitals (Spiegelhalter and others 1996)."""


def surgical(n, r):
    mu = pyro.sample("mu", dist.Normal(0.0, 1000.0))
    tau = pyro.sample("tau", dist.Gamma(0.001, 0.001))
    with pyro.plate("hospitals", len(n)):
        b = pyro.sample("b", dist.Normal(mu, tau**-0.5))
        pyro.sample("r", dist.Binomial(n[:, 0], logits=b), obs=r)


def hospitals(rng):
    return SURGICAL[0][:, None], SURGICAL[1]


def surgical_truth(params, n, r):
    e, log_w = steps(-8, 8, 161)

    def log_joint(u):
        b = u[:, 0, None, None] + np.exp(-u[:, 1] / 2)[:, None, None] * e
        inner = r[:, None] * b - n * np.logaddexp(0, b) + log_w
        constant = (gammaln(1 + n[:, 0]) - gammaln(1 + r) - gammaln(1 + n[:, 0] - r)).sum()
        return (
            constant
            + np.logaddexp.reduce(inner, -1).sum(1)
            + norm.logpdf(u[:, 0], 0, 1000)
            + log_vague(u[:, 1])
        )

    return log_rectangles(log_joint, [(-4.0, -1.2), (-2.0, 14.0)], 61)


SALM = """15 21 29  16 18 21  16 26 33  27 41 60  33 38 41  20 27 42"""
"""Revertant colonies of TA98 Salmonella at doses 0, 10, 33, 100, 333 and 1000 of quinoline (Breslow 1984)."""


def salm(x, y):
    alpha = pyro.sample("alpha", dist.Normal(0.0, 1000.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 1000.0))
    gamma_ = pyro.sample("gamma", dist.Normal(0.0, 1000.0))
    tau = pyro.sample("tau", dist.Gamma(0.001, 0.001))
    dose = x[:, 0]
    with pyro.plate("plates", len(x)):
        lam = pyro.sample("lambda", dist.Normal(0.0, tau**-0.5))
        log_mu = alpha + beta * (dose + 10).log() + gamma_ * dose + lam
        pyro.sample("y", dist.Poisson(log_mu.exp()), obs=y)


def salmonella(rng):
    return np.repeat([0.0, 10, 33, 100, 333, 1000], 3)[:, None], np.array(SALM.split(), dtype=float)


def salm_truth(params, x, y):
    design = np.c_[np.ones(18), np.log(x + 10), x / 1000]  # gamma in thousandths
    e, log_w = steps(-8, 8, 61)

    def log_joint(u):
        eta = (u[:, :3] @ design.T)[..., None] + np.exp(-u[:, 3] / 2)[:, None, None] * e
        inner = np.logaddexp.reduce(y[:, None] * eta - np.exp(eta) + log_w, -1).sum(1) - gammaln(1 + y).sum()
        return inner + norm.logpdf(u[:, :3], 0, [1000, 1000, 1e6]).sum(1) + log_vague(u[:, 3])

    return bounds_by_draws(log_joint, [2.2, 0.3, -1.0, 2.6], n=3000, rounds=4)


# ------------------------------------------------------------------------------------------------------ clinical work

BLOCKER = np.array(
    [
        [39, 116, 93, 1520, 365, 52, 939, 471],
        [3, 14, 11, 127, 27, 6, 152, 48],
        [38, 114, 69, 1533, 355, 59, 945, 632],
        [3, 7, 5, 102, 28, 4, 98, 60],
    ],
    dtype=float,
)
"""Patients and deaths under control and under beta-blockers, the first eight trials (Yusuf and others 1985)."""


def blocker(n, r):
    d = pyro.sample("d", dist.Normal(0.0, 1000.0))
    tau = pyro.sample("tau", dist.Gamma(0.001, 0.001))
    with pyro.plate("trials", len(n)):
        mu = pyro.sample("mu", dist.Normal(0.0, 300.0))
        delta = pyro.sample("delta", dist.Normal(d, tau**-0.5))
        pyro.sample("rc", dist.Binomial(n[:, 0], logits=mu), obs=r[:, 0])
        pyro.sample("rt", dist.Binomial(n[:, 1], logits=mu + delta), obs=r[:, 1])


def eight_trials(rng):
    return BLOCKER[[0, 2]].T, BLOCKER[[1, 3]].T


def two_binomials(n, r, e, log_w, mean, sd, log_prior_mu):
    """(M, G) log of the integral over mu and delta = mean + sd e of two binomials, mu on a grid about its estimate.

    mean and sd are (M, 1); the grid of mu reaches 8 sd of logit (rc + 1/2) / (nc + 1) to each side.
    """
    centre = np.log((r[:, 0] + 0.5) / (n[:, 0] - r[:, 0] + 0.5))
    width = 8 * np.sqrt(1 / (r[:, 0] + 0.5) + 1 / (n[:, 0] - r[:, 0] + 0.5))
    mu = centre[:, None] + width[:, None] * np.linspace(-1, 1, 81)  # (G, Q)
    control = (
        r[:, :1] * mu - n[:, :1] * np.logaddexp(0, mu) + log_prior_mu(mu) + np.log(mu[:, 1:2] - mu[:, :1])
    )
    constant = (gammaln(1 + n) - gammaln(1 + r) - gammaln(1 + n - r)).sum(1)
    out = np.empty((len(mean), len(n)))
    for g in range(len(n)):
        delta = mean + sd * e  # (M, E)
        eta = mu[g][:, None] + delta[:, None]  # (M, Q, E)
        inner = np.logaddexp.reduce(r[g, 1] * eta - n[g, 1] * np.logaddexp(0, eta) + log_w, -1)
        out[:, g] = np.logaddexp.reduce(inner + control[g], -1) + constant[g]
    return out


def blocker_truth(params, n, r):
    e, log_w = steps(-7, 7, 31)

    def log_joint(u):
        sd = np.exp(-u[:, 1:] / 2)
        inner = two_binomials(n, r, e, log_w, u[:, :1], sd, lambda mu: norm.logpdf(mu, 0, 300)).sum(1)
        return inner + norm.logpdf(u[:, 0], 0, 1000) + log_vague(u[:, 1])

    return log_rectangles(log_joint, [(-1.2, 0.8), (-2.0, 14.0)], 31)


def lsat(x):
    beta = pyro.sample("beta", dist.HalfNormal(2.0))
    with pyro.plate("items", x.shape[1]):
        alpha = pyro.sample("alpha", dist.Normal(0.0, 100.0))
    with pyro.plate("students", len(x)):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("r", dist.Bernoulli(logits=beta * theta[:, None] - alpha).to_event(1), obs=x)


def sixty_students(rng):
    easy = np.array([1.5, 0.0, 0.8])
    return ((rng.uniform(size=(60, 3)) < expit(rng.normal(size=(60, 1)) + easy)).astype(float),)


def lsat_truth(params, x):
    pattern, n = np.unique(x, axis=0, return_counts=True)
    e, log_w = steps(-7, 7, 41)

    def log_joint(u):
        beta = np.exp(u[:, 0])
        eta = beta[:, None, None] * e[:, None] - u[:, None, 1:]
        inner = -np.logaddexp(0, -eta) @ pattern.T - np.logaddexp(0, eta) @ (1 - pattern).T + log_w[:, None]
        prior = halfnorm.logpdf(beta, scale=2) + u[:, 0] + norm.logpdf(u[:, 1:], 0, 100).sum(1)
        return np.logaddexp.reduce(inner, 1) @ n + prior

    return bounds_by_draws(log_joint, [0.0, -1.5, 0.0, -0.8], n=6000, rounds=3)


def mice(x, t):
    """Days to death in four groups; x is the group and whether the mouse outlived the trial."""
    r = pyro.param("r", torch.tensor(2.0), constraint=constraints.positive)
    scale = pyro.param("scale", torch.full((4,), 25.0), constraint=constraints.positive)
    group, alive = x[:, 0].long(), x[:, 1] > 0
    with pyro.plate("mice", len(x)):
        log_survival = -((t / scale[group]) ** r)
        log_hazard = r.log() - r * scale[group].log() + (r - 1) * t.log()
        pyro.factor("t", torch.where(alive, log_survival, log_survival + log_hazard))


def sixty_mice(rng):
    group = np.repeat(np.arange(4), 15)
    t = np.array([24.0, 33, 26, 22])[group] * rng.weibull(2.5, size=60)
    return np.c_[group, t > 35].astype(float), np.minimum(t, 35)


def mice_truth(params, x, t):
    group, alive = x[:, 0].astype(int), x[:, 1] > 0

    def log_likelihood(u):
        r, scale = np.exp(u[0]), np.exp(u[1:])[group]
        return np.where(
            alive, weibull_min.logsf(t, r, scale=scale), weibull_min.logpdf(t, r, scale=scale)
        ).sum()

    return maximum(log_likelihood, [0.9, 3.2, 3.5, 3.2, 3.1])


CASES = [
    Case("bugs_rats", rats, ten_rats, rats_truth, tolerance=1e-4, slow=True),
    Case("bugs_dyes", dyes, six_batches, dyes_truth, slow=True),
    Case("bugs_equiv", equiv, ten_subjects, equiv_truth, warns="several nodes at once", slow=True),
    Case("bugs_pumps", pumps, ten_pumps, pumps_truth, slow=True),
    Case("bugs_seeds", seeds, seed_plates, seeds_truth, slow=True, warns="vague prior"),
    Case("bugs_surgical", surgical, hospitals, surgical_truth, slow=True),
    Case("bugs_salm", salm, salmonella, salm_truth, slow=True),
    Case("bugs_blocker", blocker, eight_trials, blocker_truth, slow=True),
    Case("bugs_lsat", lsat, sixty_students, lsat_truth, slow=True),
    Case("bugs_mice", mice, sixty_mice, mice_truth),
]
