"""After BUGS, volumes I and II: lines and curves, mixtures, nets with unseen nodes."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.special import expit, gammaln
from scipy.stats import binom, halfnorm, norm
from torch.distributions import constraints
from zoo.case import Case
from zoo.integrals import log_integral, log_rectangles, log_unit, maximum
from zoo.programs_bugs_one import log_vague, normal_vector_with_fixed

# ------------------------------------------------------------------------------------------------ lines and curves


def line(x, y):
    tau = pyro.sample("tau", dist.Gamma(0.001, 0.001))
    alpha = pyro.sample("alpha", dist.Normal(0.0, 100.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 100.0))
    for i in pyro.plate("N", len(x)):
        pyro.sample(f"Y_{i}", dist.Normal(alpha + beta * (x[i, 0] - 3), tau**-0.5), obs=y[i])


def five_points(rng):
    return np.arange(1.0, 6)[:, None], np.array([1.0, 3, 3, 3, 5])


def line_truth(params, x, y):
    design = np.c_[np.ones(5), x - 3] * 100

    def log_joint(u):
        cov = np.exp(-u)[..., None] * np.eye(5)
        return normal_vector_with_fixed(y, cov, design) + log_vague(u[:, 0])

    return log_rectangles(log_joint, [(-12.0, 12.0)], 1001)


STACKS = np.array(
    [
        [80, 80, 75, 62, 62, 62, 62, 62, 58, 58, 58, 58, 58, 58, 50, 50, 50, 50, 50, 56, 70],
        [27, 27, 25, 24, 22, 23, 24, 24, 23, 18, 18, 17, 18, 19, 18, 18, 19, 19, 20, 20, 20],
        [89, 88, 90, 87, 87, 87, 93, 93, 87, 80, 89, 88, 82, 93, 89, 86, 72, 79, 80, 82, 91],
        [42, 37, 37, 28, 18, 18, 19, 20, 15, 14, 14, 13, 11, 12, 8, 7, 8, 8, 9, 15, 15],
    ],
    dtype=float,
)
"""Air flow, temperature, acid and loss of ammonia of a plant over 21 days (Brownlee 1965)."""


def stacks(x, loss):
    z = (x - x.mean(0)) / x.std(0)
    beta0 = pyro.sample("beta0", dist.Normal(0.0, 100.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 100.0).expand([3]).to_event(1))
    tau = pyro.sample("tau", dist.Gamma(0.001, 0.001))
    with pyro.plate("days", len(x)):
        pyro.sample("Y", dist.Laplace(beta0 + z @ beta, 1 / tau), obs=loss)


def plant(rng):
    return STACKS[:3].T, STACKS[3]


DOSES = [1.6907, 1.7242, 1.7552, 1.7842, 1.8113, 1.8369, 1.8610, 1.8839]
BEETLES = [59.0, 60, 62, 56, 63, 59, 62, 60]
KILLED = [6.0, 13, 18, 28, 52, 53, 61, 60]
"""Log dose, beetles, and those killed (Bliss 1935)."""


def beetles(x, r):
    """The complementary log-log link, which fits best of three."""
    alpha_star = pyro.sample("alpha_star", dist.Normal(0.0, 100.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 100.0))
    p = 1 - torch.exp(-torch.exp(alpha_star + beta * (x[:, 0] - x[:, 0].mean())))
    with pyro.plate("doses", len(x)):
        pyro.sample("r", dist.Binomial(x[:, 1], p), obs=r)


def eight_doses(rng):
    return np.c_[DOSES, BEETLES], np.array(KILLED)


def beetles_truth(params, x, r):
    dose, n = x[:, 0] - x[:, 0].mean(), x[:, 1]

    def log_joint(u):
        rate = np.exp(u[:, :1] + u[:, 1:] * dose)
        inner = r * np.log(-np.expm1(-rate)) - (n - r) * rate
        constant = (gammaln(1 + n) - gammaln(1 + r) - gammaln(1 + n - r)).sum()
        return constant + inner.sum(1) + norm.logpdf(u, 0, 100).sum(1)

    return log_integral(log_joint, [0.0, 20.0], 61)


AGES = "1 1.5 1.5 1.5 2.5 4 5 5 7 8 8.5 9 9.5 9.5 10 12 12 13 13 14.5 15.5 15.5 16.5 17 22.5 29 31.5"
LENGTHS = """1.80 1.85 1.87 1.77 2.02 2.27 2.15 2.26 2.47 2.19 2.26 2.40 2.39 2.41 2.50 2.32 2.32 2.43 2.47 2.56 2.65
2.47 2.64 2.56 2.70 2.72 2.57"""
"""Age and length of 27 sea cows (Carlin and Gelfand 1991)."""


def dugongs(x, y):
    alpha = pyro.sample("alpha", dist.Normal(0.0, 100.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 100.0))
    gamma_ = pyro.sample("gamma", dist.Uniform(0.5, 1.0))
    tau = pyro.sample("tau", dist.Gamma(0.001, 0.001))
    mu = alpha - beta * gamma_ ** x[:, 0]
    with pyro.plate("N", len(x)):
        pyro.sample("Y", dist.Normal(mu, 1 / tau.sqrt()), obs=y)


def sea_cows(rng):
    return np.array(AGES.split(), dtype=float)[:, None], np.array(LENGTHS.split(), dtype=float)


def dugongs_truth(params, x, y):
    """Normal in alpha and beta given the other two."""

    def log_joint(u):
        share, jacobian = log_unit(u[:, 0])
        design = 100 * np.stack([np.ones((len(u), len(y))), -((0.5 + share[:, None] / 2) ** x[:, 0])], -1)
        inner = np.exp(-u[:, 1])[:, None, None] * np.eye(2) + np.einsum("mni,mnj->mij", design, design)
        right = design.transpose(0, 2, 1) @ y
        left = y @ y - np.einsum("mi,mi->m", right, np.linalg.solve(inner, right[..., None])[..., 0])
        log_det = (len(y) - 2) * -u[:, 1] + np.linalg.slogdet(inner)[1]
        density = -0.5 * (left * np.exp(u[:, 1]) + log_det + len(y) * np.log(2 * np.pi))
        return density + jacobian + log_vague(u[:, 1])

    return log_integral(log_joint, [1.0, 4.6], 121)


# ------------------------------------------------------------------------------------------------------ mixtures


def eyes(x):
    P = pyro.sample("P", dist.Dirichlet(torch.ones(2)))
    theta = pyro.sample("theta", dist.HalfNormal(100.0))
    lambda1 = pyro.sample("lambda1", dist.Normal(500.0, 100.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(20.0))
    means = torch.stack([lambda1, lambda1 + theta])
    with pyro.plate("N", len(x)):
        T = pyro.sample("T", dist.Categorical(P), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(means[T], sigma), obs=x[:, 0])


def peaks(rng):
    return (np.r_[537 + 3.5 * rng.normal(size=18), 556 + 3.5 * rng.normal(size=12)][:, None],)


def eyes_truth(params, x):
    y = x[:, 0]

    def log_joint(u):
        p, jacobian = log_unit(u[:, :1])
        theta, sigma = np.exp(u[:, 1:2]), np.exp(u[:, 3:])
        terms = (
            norm.logpdf(y, u[:, 2:3], sigma) + np.log(p),
            norm.logpdf(y, u[:, 2:3] + theta, sigma) + np.log1p(-p),
        )
        prior = (
            halfnorm.logpdf(theta, scale=100)
            + norm.logpdf(u[:, 2:3], 500, 100)
            + halfnorm.logpdf(sigma, scale=20)
        )
        return np.logaddexp(*terms).sum(1) + (prior + jacobian + u[:, 1:2] + u[:, 3:])[:, 0]

    return log_integral(log_joint, [0.4, 2.5, 537.0, 1.3], 21)


HEARTS = np.array(
    [[6, 9, 17, 22, 7, 5, 5, 14, 9, 7, 9, 51], [5, 2, 0, 0, 2, 1, 0, 0, 0, 0, 13, 0]], dtype=float
)
"""Premature beats a minute before and after a drug, twelve patients (Berry 1987)."""


def hearts(total, after):
    theta = pyro.sample("theta", dist.Beta(1.0, 1.0))
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    with pyro.plate("patients", len(total)):
        cured = pyro.sample("cured", dist.Bernoulli(theta), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Binomial(total[:, 0], p * (1 - cured)), obs=after)


def twelve_patients(rng):
    return HEARTS.sum(0)[:, None], HEARTS[1]


def hearts_truth(params, total, y):
    def log_joint(u):
        (theta, p), jacobian = log_unit(u.T)
        ill = np.log1p(-theta[:, None]) + binom.logpmf(y, total[:, 0], p[:, None])
        return np.logaddexp(ill, np.where(y == 0, np.log(theta[:, None]), -np.inf)).sum(1) + jacobian.sum(0)

    return log_integral(log_joint, [0.3, -0.5], 81)


# ----------------------------------------------------------------------------------------------------- Bayes nets


def asia(x):
    """Visit to Asia, smoking, x-ray and breathlessness are seen; three diseases are not."""
    with pyro.plate("patients", len(x)):
        a = pyro.sample("asia", dist.Bernoulli(0.01), obs=x[:, 0])
        s = pyro.sample("smoking", dist.Bernoulli(0.5), obs=x[:, 1])
        tub = pyro.sample("tuberculosis", dist.Bernoulli(0.01 + 0.04 * a), infer={"enumerate": "parallel"})
        lung = pyro.sample("lung", dist.Bernoulli(0.01 + 0.09 * s), infer={"enumerate": "parallel"})
        bronc = pyro.sample("bronchitis", dist.Bernoulli(0.3 + 0.3 * s), infer={"enumerate": "parallel"})
        either = tub + lung - tub * lung
        pyro.sample("xray", dist.Bernoulli(0.05 + 0.93 * either), obs=x[:, 2])
        table = torch.tensor([[0.1, 0.8], [0.7, 0.9]])
        pyro.sample("dyspnoea", dist.Bernoulli(table[either.long(), bronc.long()]), obs=x[:, 3])


def patients(rng):
    return ((rng.uniform(size=(30, 4)) < [0.1, 0.5, 0.2, 0.4]).astype(float),)


def asia_truth(params, x):
    def law(p, value):
        return p if value else 1 - p

    table = [[0.1, 0.8], [0.7, 0.9]]
    total = 0.0
    for a, s, ray, breath in x:
        states = [(t, c, b) for t in (0, 1) for c in (0, 1) for b in (0, 1)]
        total += np.log(law(0.01, a) * law(0.5, s)) + np.log(
            sum(
                law(0.01 + 0.04 * a, t)
                * law(0.01 + 0.09 * s, c)
                * law(0.3 + 0.3 * s, b)
                * law(0.98 if t or c else 0.05, ray)
                * law(table[t or c][b], breath)
                for t, c, b in states
            )
        )
    return total


def cervix(x):
    """Disease d, true exposure e, known in the first rows alone (NaN elsewhere), and its measurement w."""
    q = pyro.param("q", torch.tensor(0.5), constraint=constraints.unit_interval)
    beta0 = pyro.param("beta0", torch.tensor(0.0))
    beta = pyro.param("beta", torch.tensor(0.0))
    phi = pyro.param("phi", torch.tensor([[0.3, 0.3], [0.7, 0.7]]), constraint=constraints.unit_interval)
    d, w = x[:, 0], x[:, 2]
    known = ~x[:, 1].isnan()
    with pyro.plate("women", len(x)):
        e = pyro.sample(
            "e", dist.Bernoulli(q), obs=x[:, 1].nan_to_num(), obs_mask=known, infer={"enumerate": "parallel"}
        )
        pyro.sample("d", dist.Bernoulli(logits=beta0 + beta * e), obs=d)
        pyro.sample("w", dist.Bernoulli(phi[e.long(), d.long()]), obs=w)


def women(rng):
    e = (rng.uniform(size=120) < 0.45).astype(float)
    d = (rng.uniform(size=120) < expit(-0.6 + 0.8 * e)).astype(float)
    w = (rng.uniform(size=120) < np.where(e == 1, 0.75, 0.25)).astype(float)
    return (np.c_[d, np.where(np.arange(120) < 40, e, np.nan), w],)


def cervix_truth(params, x):
    d, e, w = x[:, 0].astype(int), x[:, 1], x[:, 2]

    def log_likelihood(u):
        q, phi = expit(u[0]), expit(u[3:]).reshape(2, 2)
        terms = []
        for value in (0, 1):
            p = np.log(q if value else 1 - q) - np.logaddexp(
                0, np.where(d == 1, -1, 1) * (u[1] + u[2] * value)
            )
            p = p + np.log(np.where(w == 1, phi[value, d], 1 - phi[value, d]))
            terms.append(np.where(e == 1 - value, -np.inf, p))
        return np.logaddexp(*terms).sum()

    return maximum(log_likelihood, [-0.2, -0.6, 0.8, -1.0, -1.0, 1.0, 1.0])


CASES = [
    Case("bugs_line", line, five_points, line_truth),
    Case("bugs_stacks", stacks, plant, warns="vague prior|tail so heavy", slow=True),
    Case("bugs_beetles", beetles, eight_doses, beetles_truth),
    Case("bugs_dugongs", dugongs, sea_cows, dugongs_truth, tolerance=1e-4, slow=True),
    Case("bugs_eyes", eyes, peaks, eyes_truth, tolerance=1e-2, slow=True),
    Case("bugs_hearts", hearts, twelve_patients, hearts_truth),
    Case("bugs_asia", asia, patients, asia_truth),
    Case("bugs_cervix", cervix, women, cervix_truth, slow=True),
]
