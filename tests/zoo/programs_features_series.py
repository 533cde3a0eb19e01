"""One feature each: series and fields."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.special import gammaln, logsumexp
from scipy.stats import norm, poisson
from torch.distributions import constraints
from zoo.case import Array, Case

WEEKS, AREAS = 20, 12


def random_walk(counts):
    level = pyro.sample("level", dist.Normal(1.0, 1.0))
    with pyro.plate("weeks", len(counts)):
        step = pyro.sample("step", dist.Normal(0.0, 0.3))
        rate = (level + step.cumsum(-1)).exp()
        pyro.sample("x", dist.Poisson(rate), obs=counts[:, 0])


def neighbours():
    near = torch.zeros(AREAS, AREAS)
    at = torch.arange(AREAS - 1)
    near[at, at + 1] = near[at + 1, at] = 1.0
    return near


def spatial_car(counts):
    near = neighbours()
    precision = 4 * (torch.diag(near.sum(1)) - 0.9 * near)
    phi = pyro.sample("phi", dist.MultivariateNormal(torch.zeros(AREAS), precision_matrix=precision))
    with pyro.plate("areas", AREAS):
        pyro.sample("x", dist.Poisson((1 + phi).exp()), obs=counts[:, 0])


def autoregression_backwards(x):
    a = pyro.param("a", torch.tensor(0.1), constraint=constraints.interval(-1, 1))
    s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(a * x.flip(-1), s).to_event(1), obs=x)


def autoregression_1(series):
    a = pyro.param("a", torch.tensor(0.1))
    s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("series", len(series)):
        for t in range(1, series.shape[1]):
            pyro.sample(f"x_{t}", dist.Normal(a * series[:, t - 1], s), obs=series[:, t])


def markov_switching(series):
    stay = pyro.param("stay", torch.tensor([0.8, 0.8]), constraint=constraints.unit_interval)
    a = pyro.param("a", torch.tensor([0.2, 0.8]))
    s = pyro.param("s", torch.tensor([0.5, 1.5]), constraint=constraints.positive)
    y = series[:, 0]
    z, last = 0, torch.tensor(0.0)
    for t in pyro.markov(range(len(y))):
        move = torch.stack([torch.stack([stay[0], 1 - stay[0]]), torch.stack([1 - stay[1], stay[1]])])
        z = pyro.sample(f"z_{t}", dist.Categorical(move[z]), infer={"enumerate": "parallel"})
        last = pyro.sample(f"y_{t}", dist.Normal(a[z] * last, s[z]), obs=y[t])


def weekly_counts(rng: np.random.Generator) -> tuple[Array]:
    rate = np.exp(1 + np.cumsum(0.3 * rng.normal(size=WEEKS)))
    return (rng.poisson(rate)[:, None].astype(float),)


def counts_of_areas(rng: np.random.Generator) -> tuple[Array]:
    near = neighbours().numpy()
    cov = np.linalg.inv(4 * (np.diag(near.sum(1)) - 0.9 * near))
    return (rng.poisson(np.exp(1 + rng.multivariate_normal(np.zeros(AREAS), cov)))[:, None].astype(float),)


def two_columns(rng: np.random.Generator) -> tuple[Array]:
    return (rng.normal(size=(30, 2)),)


def six_series(rng: np.random.Generator) -> tuple[Array]:
    x = rng.normal(size=(6, 8))
    for t in range(1, 8):
        x[:, t] += 0.7 * x[:, t - 1]
    return (x,)


def switching(rng: np.random.Generator) -> tuple[Array]:
    y, state = [], 0
    for _ in range(30):
        state = state if rng.uniform() < 0.85 else 1 - state
        y.append([0.1, 0.9][state] * (y[-1] if y else 0) + [0.4, 1.5][state] * rng.normal())
    return (np.array(y)[:, None],)


def chain_by_grid(log_first: Array, log_move: Array, emit) -> float:
    """Forwards along a chain whose states lie on a grid: log_first (G,), log_move (G, G), emit(t) (G,)."""
    forward, t = log_first, 0
    while (log_p := emit(t)) is not None:
        if t:
            forward = logsumexp(forward[:, None] + log_move, axis=0)
        forward, t = forward + log_p, t + 1
    return float(logsumexp(forward))


def walk_on_a_grid(params, counts):
    grid = np.linspace(-4, 6, 401)
    width = math.log(grid[1] - grid[0])
    first = norm.logpdf(grid, 1, math.hypot(1, 0.3)) + width
    move = norm.logpdf(grid[:, None], grid, 0.3) + width
    exact = chain_by_grid(
        first, move, lambda t: poisson.logpmf(counts[t, 0], np.exp(grid)) if t < len(counts) else None
    )
    return exact, exact


def field_on_a_grid(params, counts):
    """Areas in a line: the density is prod_i exp(-2 d_i phi_i^2) prod exp(3.6 phi_i phi_i+1), a chain."""
    near = neighbours().numpy()
    precision = 4 * (np.diag(near.sum(1)) - 0.9 * near)
    grid = np.linspace(-5, 5, 401)
    log_width = math.log(grid[1] - grid[0])
    move = 3.6 * np.outer(grid, grid) + log_width

    def emit(t):
        if t == AREAS:
            return None
        log_rate = 1 + grid
        of_count = counts[t, 0] * log_rate - np.exp(log_rate) - gammaln(counts[t, 0] + 1)
        return of_count - 0.5 * precision[t, t] * grid**2

    constant = 0.5 * np.linalg.slogdet(precision)[1] - AREAS / 2 * math.log(2 * math.pi)
    exact = chain_by_grid(np.full(len(grid), log_width), move, emit) + constant
    return exact, exact


def autoregressions(params, x):
    return norm.logpdf(x[:, 1:], params["a"] * x[:, :-1], params["s"]).sum()


def regimes(params, series):
    y = series[:, 0]
    before = np.concatenate([[0.0], y[:-1]])
    p = params["stay"]
    move = np.log(np.array([[p[0], 1 - p[0]], [1 - p[1], p[1]]]))
    log_p = norm.logpdf(y[:, None], params["a"] * before[:, None], params["s"])
    return chain_by_grid(move[0], move, lambda t: log_p[t] if t < len(y) else None)


CASES = [
    Case("random_walk", random_walk, weekly_counts, walk_on_a_grid, tolerance=1e-2),
    Case("spatial_car", spatial_car, counts_of_areas, field_on_a_grid, tolerance=1e-2, slow=True),
    Case(
        "autoregression_backwards",
        autoregression_backwards,
        two_columns,
        refused="no order of the tokens has each look at earlier ones alone",
    ),
    Case("autoregression_1", autoregression_1, six_series, autoregressions),
    Case("markov_switching", markov_switching, switching, regimes, slow=True),
]
