"""One feature each: plates of rows and columns, groups, crossed effects, sums of zero."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from scipy.special import gammaln, logsumexp
from scipy.stats import norm
from torch.distributions import constraints
from truths import log_density, normal_grid
from zoo.case import Array, Case


def plate_of_columns(x):
    s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
    columns = pyro.plate("columns", x.shape[1], dim=-1)
    rows = pyro.plate("rows", x.shape[0], dim=-2)
    with columns:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with rows, columns:
        pyro.sample("x", dist.Normal(mu, s), obs=x)


def rows_last(x):
    w = pyro.param("w", lambda: torch.ones(3))
    s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
    rows = pyro.plate("rows", x.shape[0], dim=-1)
    with rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("columns", 3, dim=-2), rows:
        pyro.sample("x", dist.Normal(w.unsqueeze(-1) * z, s), obs=x.T)


def nested_groups(table, y):
    hospital_of, patient = table[:, 0].long(), table[:, 1].long()
    patients_hospital = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    omega = pyro.sample("omega", dist.HalfNormal(1.0))
    with pyro.plate("hospitals", 4):
        hospital = pyro.sample("hospital", dist.Normal(mu, tau))
    with pyro.plate("patients", 12):
        effect = pyro.sample("effect", dist.Normal(hospital[patients_hospital], omega))
    with pyro.plate("visits", len(y)):
        pyro.sample("y", dist.Normal(effect[patient], 0.5), obs=y)
    pyro.deterministic("hospitals_seen", hospital_of.max())


def crossed_effects(x, y):
    i, j = x[:, 0].long(), x[:, 1].long()
    with pyro.plate("A", 5):
        ua = pyro.sample("ua", dist.Normal(0.0, 1.0))
    with pyro.plate("B", 4):
        ub = pyro.sample("ub", dist.Normal(0.0, 0.7))
    s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("N", len(x)):
        pyro.sample("y", dist.Normal(ua[i] + ub[j], s), obs=y)


def scaled_plate(x):
    """A likelihood to the power of two: it integrates to .28 and is no density, so that it is refused."""
    mu = pyro.param("mu", torch.tensor(0.0))
    with poutine.scale(scale=2.0), pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[:, 0])


def deterministic_sites(x):
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    mean = pyro.deterministic("mean", 2 * a + 1)
    with pyro.plate("rows", len(x)):
        error = pyro.deterministic("error", x[:, 0] - mean)
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x[:, 0])
        pyro.deterministic("squared", error**2)


def equal_groups(table, y):
    group = table[:, 0].long()
    with pyro.plate("groups", 2):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Poisson(theta[group].exp()), obs=y)


def probit_groups(table, y):
    group = table[:, 0].long()
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", 30):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
    with pyro.plate("rows", len(y)):
        p = dist.Normal(0.0, 1.0).cdf(theta[group])
        pyro.sample("y", dist.Bernoulli(p), obs=y)


def sum_to_zero(table, y):
    group = table[:, 0].long()
    with pyro.plate("free_effects", 3):
        free = pyro.sample("free", dist.Normal(0.0, 1.0))
    effect = torch.cat([free, -free.sum(-1, keepdim=True)], -1)
    s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(effect[group], s), obs=y)


def table_of_columns(rng: np.random.Generator) -> tuple[Array]:
    return (np.array([1.0, -2.0, 4.0]) + rng.normal(size=(30, 3)),)


def factor_rows(rng: np.random.Generator) -> tuple[Array]:
    return (rng.normal(size=(40, 1)) * [1.0, 0.6, -0.8] + 0.5 * rng.normal(size=(40, 3)),)


def visits(rng: np.random.Generator) -> tuple[Array, Array]:
    patient = np.repeat(np.arange(12), 3)
    hospital = patient // 3
    mean = 1 + 0.7 * rng.normal(size=4)[hospital] + 0.5 * rng.normal(size=12)[patient]
    return np.column_stack([hospital, patient]).astype(float), mean + 0.5 * rng.normal(size=36)


def crossed(rng: np.random.Generator) -> tuple[Array, Array]:
    a, b = rng.integers(0, 5, 80), rng.integers(0, 4, 80)
    y = rng.normal(size=5)[a] + 0.7 * rng.normal(size=4)[b] + 0.3 * rng.normal(size=80)
    return np.c_[a, b].astype(float), y


def column(rng: np.random.Generator) -> tuple[Array]:
    return (2 + rng.normal(size=(20, 1)),)


def two_equal_groups(rng: np.random.Generator) -> tuple[Array, Array]:
    return np.array([[0.0], [0], [0], [1], [1], [1]]), np.array([0.0, 2, 1, 1, 1, 1])


def thirty_groups(rng: np.random.Generator) -> tuple[Array, Array]:
    group = np.repeat(np.arange(30), 4)
    y = rng.uniform(size=120) < norm.cdf(0.3 + 0.8 * rng.normal(size=30)[group])
    return group[:, None].astype(float), y.astype(float)


def four_groups(rng: np.random.Generator) -> tuple[Array, Array]:
    group = np.repeat(np.arange(4), 6)
    return group[:, None].astype(float), np.array([1.0, -0.5, 0.2, -0.7])[group] + 0.5 * rng.normal(size=24)


def joint(y: Array, cov: Array) -> float:
    return float(log_density(y[None], np.zeros(len(y)), cov)[0])


def columns_with_means(params, x):
    """Each column is N(0, s^2 I + 25 11')."""
    cov = params["s"] ** 2 * np.eye(len(x)) + 25.0
    return float(log_density(x.T, np.zeros(len(x)), cov).sum())


def one_factor(params, x):
    return float(
        log_density(x, np.zeros(3), np.outer(params["w"], params["w"]) + params["s"] ** 2 * np.eye(3)).sum()
    )


def hospitals_and_patients(params, table, y):
    """mu and effects in closed form; both scales by Gauss-Legendre on (0, 8) of the half-normal."""
    node, weight = np.polynomial.legendre.leggauss(60)
    scale, log_w = 3 * (node + 1), np.log(3 * weight) + math.log(2)
    same_hospital, same_patient = (table[:, k : k + 1] == table[:, k] for k in range(2))
    terms = [
        joint(y, 9.0 + t**2 * same_hospital + o**2 * same_patient + 0.25 * np.eye(len(y)))
        + (norm.logpdf(t) + norm.logpdf(o) + a + b)
        for t, a in zip(scale, log_w, strict=True)
        for o, b in zip(scale, log_w, strict=True)
    ]
    return logsumexp(terms)


def crossed_normal(params, x, y):
    same_a, same_b = (x[:, k : k + 1] == x[:, k] for k in range(2))
    return joint(y, 1.0 * same_a + 0.49 * same_b + params["s"] ** 2 * np.eye(len(y)))


def deterministic_mean(params, x):
    return joint(x[:, 0] - 1, 16.0 + np.eye(len(x)))


def two_poisson_rates(params, table, y):
    node, log_w = normal_grid(8, 801)
    return (
        sum(
            logsumexp(y[table[:, 0] == g].sum() * node - (table[:, 0] == g).sum() * np.exp(node) + log_w)
            for g in range(2)
        )
        - gammaln(y + 1).sum()
    )


def probit_effects(params, table, y):
    """Each group by Gauss-Hermite of its effect, as many successes of four; mu and tau by Gauss-Legendre."""
    success = np.bincount(table[:, 0].astype(int), weights=y)
    count = np.bincount(success.astype(int), minlength=5)
    z, log_z = normal_grid(7, 121)
    mu, log_mu = normal_grid(4, 81)
    node, weight = np.polynomial.legendre.leggauss(60)
    tau, log_tau = 2.5 * (node + 1), np.log(2.5 * weight) + math.log(2) + norm.logpdf(2.5 * (node + 1))
    theta = mu[:, None, None] + tau[:, None] * z
    on, off = norm.logcdf(theta), norm.logcdf(-theta)
    total = log_mu[:, None] + log_tau
    for k, n in enumerate(count):
        total = total + n * logsumexp(k * on + (4 - k) * off + log_z, axis=-1)
    return logsumexp(total)


def zero_sum(params, table, y):
    design = np.vstack([np.eye(3), -np.ones(3)])[table[:, 0].astype(int)]
    return joint(y, design @ design.T + params["s"] ** 2 * np.eye(len(y)))


CASES = [
    Case("plate_of_columns", plate_of_columns, table_of_columns, columns_with_means),
    Case("rows_last", rows_last, factor_rows, one_factor),
    Case("nested_groups", nested_groups, visits, hospitals_and_patients, tolerance=1e-4, slow=True),
    Case("crossed_effects", crossed_effects, crossed, crossed_normal),
    Case(
        "scaled_plate",
        scaled_plate,
        column,
        lambda p, x: 2 * norm.logpdf(x, p["mu"]).sum(),
        known="refused: a density to the power of two is none",
    ),
    Case("deterministic_sites", deterministic_sites, column, deterministic_mean),
    Case("equal_groups", equal_groups, two_equal_groups, two_poisson_rates, tolerance=1e-4),
    Case(
        "probit_groups",
        probit_groups,
        thirty_groups,
        probit_effects,
        tolerance=1e-2,
        slow=True,
    ),
    Case("sum_to_zero", sum_to_zero, four_groups, zero_sum),
]
