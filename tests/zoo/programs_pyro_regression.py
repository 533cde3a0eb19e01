"""After Pyro's tutorials on regression: linear, an interaction, a module, logistic; an inclined plane; test items."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam, PyroSample
from scipy.special import expit, logsumexp
from scipy.stats import norm
from torch import nn
from torch.distributions import constraints
from truths import log_density, normal_grid
from zoo.case import Array, Case


def linear_regression(x, log_gdp):
    a = pyro.sample("a", dist.Normal(0.0, 10.0))
    b_a = pyro.sample("bA", dist.Normal(0.0, 1.0))
    b_r = pyro.sample("bR", dist.Normal(0.0, 1.0))
    sigma = pyro.param("sigma", lambda: torch.ones(()), constraint=constraints.positive)
    mean = a + b_a * x[:, 0] + b_r * x[:, 1]
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(mean, sigma), obs=log_gdp)


def regression_interaction(x, log_gdp):
    is_cont_africa, ruggedness = x[:, 0], x[:, 1]
    a = pyro.sample("a", dist.Normal(0.0, 10.0))
    b_a = pyro.sample("bA", dist.Normal(0.0, 1.0))
    b_r = pyro.sample("bR", dist.Normal(0.0, 1.0))
    b_ar = pyro.sample("bAR", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
    mean = a + b_a * is_cont_africa + b_r * ruggedness + b_ar * is_cont_africa * ruggedness
    with pyro.plate("data", len(ruggedness)):
        pyro.sample("obs", dist.Normal(mean, sigma), obs=log_gdp)


class RegressionModule(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))
        self.obs_scale = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

    def forward(self, x, y=None):
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(mean, self.obs_scale), obs=y)
        return mean


def logistic_regression(data, labels):
    dim = data.shape[1]
    coefs = pyro.sample("coefs", dist.MultivariateNormal(torch.zeros(dim), torch.eye(dim)))
    with pyro.plate("data", len(data)):
        pyro.sample("obs", dist.Bernoulli(logits=torch.matmul(data, coefs)), obs=labels)


LENGTH, GRAVITY, SLOPE = 2.0, 9.8, math.pi / 6


def inclined_plane(times):
    mu = pyro.sample("mu", dist.Uniform(0.0, 1.0))
    acceleration = GRAVITY * (math.sin(SLOPE) - math.cos(SLOPE) * mu)
    moves = acceleration > 0
    expected = torch.where(
        moves, (2 * LENGTH / torch.where(moves, acceleration, 1.0)).sqrt(), torch.tensor(1e5)
    )
    for i in range(len(times)):
        pyro.sample(f"obs_{i}", dist.Normal(expected, 0.02), obs=times[i, 0])


def item_response_1(table, response):
    subject, item = table[:, 0].long(), table[:, 1].long()
    with pyro.plate("subjects", int(subject.max()) + 1):
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
    with pyro.plate("items", int(item.max()) + 1):
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(response)):
        pyro.sample("obs", dist.Bernoulli(logits=ability[subject] - difficulty[item]), obs=response)


def item_response_2(answers):
    n_people, n_items = answers.shape
    with pyro.plate("items", n_items, dim=-1):
        slope = pyro.sample("slope", dist.LogNormal(0.0, 0.5))
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.0))
    with pyro.plate("people", n_people, dim=-2):
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
        with pyro.plate("answers", n_items, dim=-1):
            pyro.sample("obs", dist.Bernoulli(logits=slope * (ability - difficulty)), obs=answers)


def rugged(rng: np.random.Generator) -> tuple[Array, Array]:
    africa = (rng.uniform(size=30) < 0.4).astype(float)
    ruggedness = rng.exponential(size=30)
    y = 9 - 1.5 * africa - 0.2 * ruggedness + 0.4 * africa * ruggedness + 0.8 * rng.normal(size=30)
    return np.column_stack([africa, ruggedness]), y


def covers(rng: np.random.Generator) -> tuple[Array, Array]:
    x = rng.normal(size=(40, 2))
    return x, (rng.uniform(size=40) < expit(x @ [1.0, -0.7])).astype(float)


def sliding_times(rng: np.random.Generator) -> tuple[Array]:
    expected = math.sqrt(2 * LENGTH / (GRAVITY * (math.sin(SLOPE) - math.cos(SLOPE) * 0.12)))
    return (expected + 0.02 * rng.normal(size=(20, 1)),)


def right_or_wrong(rng: np.random.Generator, n_people: int, n_items: int) -> Array:
    ability = rng.normal(size=(n_people, 1))
    return (rng.uniform(size=(n_people, n_items)) < expit(ability - np.linspace(-1, 1, n_items))).astype(
        float
    )


def long_answers(rng: np.random.Generator) -> tuple[Array, Array]:
    answers = right_or_wrong(rng, 12, 3)
    subject, item = np.indices(answers.shape)
    return np.column_stack([subject.ravel(), item.ravel()]).astype(float), answers.ravel()


def gaussian_evidence(y: Array, design: Array, prior_sd: Array, noise_sd: float) -> float:
    """log N(y; 0, A P A' + s^2 I) of a linear model with independent normal coefficients."""
    cov = (design * prior_sd**2) @ design.T + noise_sd**2 * np.eye(len(y))
    return float(log_density(y[None], np.zeros(len(y)), cov)[0])


def three_coefficients(params, x, y):
    design = np.column_stack([np.ones(len(y)), x])
    return gaussian_evidence(y, design, np.array([10.0, 1.0, 1.0]), params["sigma"])


def module_coefficients(params, x, y):
    design = np.column_stack([np.ones(len(y)), x])
    return gaussian_evidence(y, design, np.array([10.0, 1.0, 1.0]), params["obs_scale"])


def interaction(params, x, y):
    """Over sigma by Gauss-Legendre in its logarithm, from 0.1 to 10: p(y) = int N(y | sigma) / 10 d sigma."""
    design = np.column_stack([np.ones(len(y)), x, x.prod(1)])
    node, weight = np.polynomial.legendre.leggauss(120)
    low, high = math.log(0.1), math.log(10)
    at = low + (node + 1) / 2 * (high - low)
    of_sigma = [gaussian_evidence(y, design, np.array([10.0, 1, 1, 1]), math.exp(a)) for a in at]
    return logsumexp(np.array(of_sigma) + at + np.log(weight * (high - low) / 2) - math.log(10))


def logistic_grid(params, x, y):
    node, log_weight = normal_grid(8, 401)
    coefs = np.stack(np.meshgrid(node, node, indexing="ij"), -1).reshape(-1, 2)
    log_prior = (log_weight[:, None] + log_weight).ravel()
    logits = x @ coefs.T  # (N, nodes)
    return logsumexp(log_prior - np.logaddexp(0, -np.where(y[:, None] == 1, logits, -logits)).sum(0))


def friction(params, times):
    """Below the friction at which nothing slides; above it a time of 1e5 s has no density worth a nat."""
    node, weight = np.polynomial.legendre.leggauss(2000)
    mu = (node + 1) / 2 * math.tan(SLOPE)
    expected = np.sqrt(2 * LENGTH / (GRAVITY * (math.sin(SLOPE) - math.cos(SLOPE) * mu)))
    terms = norm.logpdf(times, expected, 0.02).sum(0)
    return logsumexp(terms + np.log(weight / 2 * math.tan(SLOPE)))


def of_patterns(answers: Array, log_p: Array, log_weight: Array) -> Array:
    """(nodes,) sum over people of log int prod_i p(answer_i | ability) by nodes of ability.

    log_p (2, nodes, items, abilities) of each answer, log_weight (abilities,).
    """
    pattern, count = np.unique(answers, axis=0, return_counts=True)
    total = np.zeros(log_p.shape[1])
    for row, n in zip(pattern.astype(int), count, strict=True):
        chosen = sum(log_p[a, :, i] for i, a in enumerate(row))  # (nodes, abilities)
        total += n * logsumexp(chosen + log_weight, axis=-1)
    return total


def hermite(n: int) -> tuple[Array, Array]:
    """Nodes and log-weights of Gauss-Hermite under N(0, 1)."""
    node, weight = np.polynomial.hermite_e.hermegauss(n)
    return node, np.log(weight) - math.log(math.sqrt(2 * math.pi))


def product_rule(node: Array, log_weight: Array, n_axes: int) -> tuple[Array, Array]:
    """(n^axes, axes) nodes of the product rule and their log-weights."""
    grid = np.stack(np.meshgrid(*[node] * n_axes, indexing="ij"), -1).reshape(-1, n_axes)
    log_w = sum(np.meshgrid(*[log_weight] * n_axes, indexing="ij")).ravel()
    return grid, log_w


def one_parameter(params, table, response):
    answers = response.reshape(12, 3)
    unit, log_weight = hermite(40)
    difficulty, log_prior = product_rule(2 * unit, log_weight, 3)
    ability, log_ability = normal_grid(7, 60)
    logits = ability - difficulty[..., None]  # (nodes, 3, abilities)
    log_p = -np.logaddexp(0, np.stack([logits, -logits]))
    return logsumexp(of_patterns(answers, log_p, log_ability) + log_prior)


def two_parameters(params, answers):
    """P(a_1, a_2 | items 1 and 2) = sum over abilities of w p(a_1 | item 1) p(a_2 | item 2): a product of matrices."""
    axis, log_weight = normal_grid(6, 34)
    item, log_prior = product_rule(axis, log_weight, 2)  # (nodes, 2)
    ability, log_ability = normal_grid(7, 60)
    logits = np.exp(0.5 * item[:, :1]) * (ability - item[:, 1:])  # (nodes, abilities)
    p = expit(np.stack([-logits, logits]))
    total = log_prior[:, None] + log_prior
    pattern, count = np.unique(answers, axis=0, return_counts=True)
    for (first, second), n in zip(pattern.astype(int), count, strict=True):
        total = total + n * np.log((p[first] * np.exp(log_ability)) @ p[second].T)
    return logsumexp(total)


CASES = [
    Case("linear_regression", linear_regression, rugged, three_coefficients),
    Case("regression_interaction", regression_interaction, rugged, interaction, tolerance=1e-4, slow=True),
    Case("regression_pyro_module", RegressionModule, rugged, module_coefficients),
    Case("logistic_regression", logistic_regression, covers, logistic_grid, tolerance=1e-4, slow=True),
    Case("inclined_plane", inclined_plane, sliding_times, friction, tolerance=1e-4, slow=True),
    Case("item_response_1", item_response_1, long_answers, one_parameter, tolerance=1e-3, slow=True),
    Case(
        "item_response_2",
        item_response_2,
        lambda rng: (right_or_wrong(rng, 12, 2),),
        two_parameters,
        tolerance=1e-3,
        slow=True,
    ),
]
