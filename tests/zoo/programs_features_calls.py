"""One feature each: how a program is called, what it reads, and what else stands in it."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample
from scipy.special import expit
from scipy.stats import bernoulli, norm
from torch import nn
from torch.distributions import constraints
from truths import log_density
from zoo.case import Array, Case
from zoo.programs_features_observed import column, common_mean


class Float32Network:
    """A plain network as torch makes it, in single precision, inside of a program that is called with rows."""

    def __init__(self):
        self.net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))

    def __call__(self, x, y):
        net = pyro.module("net", self.net)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=net(x).squeeze(-1)), obs=y)


class SampledWeights(PyroModule):
    def __init__(self):
        super().__init__()
        self.weight = PyroSample(dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        self.bias = PyroSample(lambda self: dist.Normal(self.weight[..., 0], 2.0))

    def forward(self, x, y=None):
        mean = x @ self.weight + self.bias
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


class DataInside:
    """A program with its data in a closure: it is called with nothing."""

    def __init__(self):
        data = torch.tensor([1.2, 0.7, 2.3])

        def model():
            mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
            with pyro.plate("rows", len(data)):
                pyro.sample("x", dist.Normal(mu, 1.0), obs=data)

        self.model = model

    def __call__(self):
        return self.model()


def two_inputs(x1, x2, y):
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(a * x1[:, 0] + (x2 * b).sum(-1), 0.5), obs=y)


def response_in_the_table(table):
    covariates, response = table[:, :2], table[:, 2]
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(table)):
        pyro.sample("y", dist.Normal(covariates @ w, s), obs=response)


def integer_column_as_index(table, y):
    group = table[:, 0]
    s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("groups", 3):
        theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(table)):
        pyro.sample("y", dist.Normal(theta[group], s), obs=y)


def optional_argument(x, y=None, intercept=True):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 5.0)) if intercept else 0.0
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(w * x[:, 0] + b, 0.5), obs=y)


def subsampled_plate(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(x), subsample_size=8) as batch:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[batch, 0])


def factor_density(x):
    mu = pyro.param("mu", torch.tensor(0.0))
    s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        standard = (x[:, 0] - mu) / s
        pyro.factor("density", -0.5 * standard**2 - s.log() - 0.5 * math.log(2 * math.pi))


def factor_penalty(x):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.factor("penalty", -w.abs().sum(-1))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(w.sum(-1), 1.0), obs=x[:, 0])


def branch_on_latent(x):
    fair = pyro.sample("fair", dist.Bernoulli(0.5))
    p = 0.5 if fair else 0.9
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Bernoulli(torch.tensor(p)), obs=x[:, 0])


def changing_sites(x):
    n = int(pyro.sample("n", dist.Geometric(0.4))) + 1
    total = sum(pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0)) for i in range(n))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(total, 1.0), obs=x[:, 0])


def choices(rng: np.random.Generator) -> tuple[Array, Array]:
    x = rng.normal(size=(60, 2))
    return x, (rng.uniform(size=60) < expit(1.5 * x[:, 0] * x[:, 1])).astype(float)


def line(rng: np.random.Generator) -> tuple[Array, Array]:
    x = rng.normal(size=(30, 2))
    return x, x @ [0.5, -1.0] + 1 + 0.5 * rng.normal(size=30)


def two_tables(rng: np.random.Generator) -> tuple[tuple[Array, Array], Array]:
    x1, x2 = rng.normal(size=(30, 1)), rng.normal(size=(30, 2))
    return (x1, x2), x1[:, 0] + x2 @ [0.3, -0.3] + 0.5 * rng.normal(size=30)


def one_table(rng: np.random.Generator) -> tuple[Array]:
    x, y = line(rng)
    return (np.column_stack([x, y]),)


def codes(rng: np.random.Generator):
    group = rng.integers(3, size=(30, 1))
    return group, np.array([-2.0, 0.0, 2.0])[group[:, 0]] + rng.normal(size=30)


def one_covariate(rng: np.random.Generator) -> tuple[Array, Array]:
    x = rng.normal(size=(30, 1))
    return x, 1 + 0.7 * x[:, 0] + 0.5 * rng.normal(size=30)


def coin(rng: np.random.Generator) -> tuple[Array]:
    return ((rng.uniform(size=(20, 1)) < 0.7).astype(float),)


def joint(y: Array, cov: Array) -> float:
    return float(log_density(y[None], np.zeros(len(y)), cov)[0])


def network_of_choices(params, x, y):
    p = {name.removeprefix("net$$$"): value for name, value in params.items()}
    hidden = np.tanh(x @ p["0.weight"].T + p["0.bias"])
    return bernoulli.logpmf(y, expit((hidden @ p["2.weight"].T + p["2.bias"])[:, 0])).sum()


def weights_and_bias(params, x, y):
    """bias = weight_0 + 2 e: the design of weight_0 is x_0 + 1."""
    design = x + np.array([1.0, 0.0])
    return joint(y, design @ design.T + 4.0 + 0.25 * np.eye(len(y)))


def group_means(params, table, y):
    same = table == table.T
    return joint(y, 4.0 * same + params["s"] ** 2 * np.eye(len(y)))


def normal_rows(params, x):
    assert np.isclose(params["mu"], x.mean(), atol=1e-4)
    return norm.logpdf(x, params["mu"], params["s"]).sum()


CASES = [
    Case("float32_network", Float32Network, choices, network_of_choices, tolerance=1e-4),
    Case("pyro_sample_weights", SampledWeights, line, weights_and_bias),
    Case("data_in_a_closure", DataInside, column, refused="argument"),
    Case(
        "two_inputs",
        two_inputs,
        two_tables,
        lambda _, x, y: joint(y, 4 * x[0] @ x[0].T + x[1] @ x[1].T + 0.25 * np.eye(len(y))),
    ),
    Case(
        "response_in_the_table",
        response_in_the_table,
        one_table,
        lambda p, x: joint(x[:, 2], x[:, :2] @ x[:, :2].T + p["s"] ** 2 * np.eye(len(x))),
    ),
    Case("integer_column_as_index", integer_column_as_index, codes, group_means),
    Case(
        "optional_argument",
        optional_argument,
        one_covariate,
        lambda _, x, y: joint(y, x @ x.T + 25.0 + 0.25 * np.eye(len(y))),
    ),
    Case(
        "subsampled_plate",
        subsampled_plate,
        column,
        lambda _, x: common_mean(x[:, 0], 3.0, 1.0),
        known="sub-sampling",
    ),
    Case("factor_density", factor_density, column, normal_rows),
    Case("factor_penalty", factor_penalty, column, refused="pyro.factor"),
    Case("branch_on_latent", branch_on_latent, coin, refused="fair"),
    Case("changing_sites", changing_sites, column, refused="first run|Geometric"),
]
