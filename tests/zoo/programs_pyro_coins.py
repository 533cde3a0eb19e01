"""After Pyro's first tutorials: a coin, and a scale that measures a weight."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.special import betaln
from scipy.stats import bernoulli, norm
from torch.distributions import constraints
from zoo.case import Array, Case


def coin_parameter(data):
    fairness = pyro.param("fairness", torch.tensor(0.5), constraint=constraints.unit_interval)
    with pyro.plate("flips", len(data)):
        pyro.sample("obs", dist.Bernoulli(fairness), obs=data[:, 0])


def coin_beta(data):
    fairness = pyro.sample("fairness", dist.Beta(torch.tensor(10.0), torch.tensor(10.0)))
    with pyro.plate("flips", len(data)):
        pyro.sample("obs", dist.Bernoulli(fairness), obs=data[:, 0])


def coin_loop_of_sites(data):
    alpha0, beta0 = torch.tensor(10.0), torch.tensor(10.0)
    f = pyro.sample("latent_fairness", dist.Beta(alpha0, beta0))
    for i in range(len(data)):
        pyro.sample(f"obs_{i}", dist.Bernoulli(f), obs=data[i, 0])


def scale_weight_measurement(measured):
    weight = pyro.sample("weight", dist.Normal(8.5, 1.0))
    return pyro.sample("measurement", dist.Normal(weight, 0.75), obs=measured[0, 0])


def flips(rng: np.random.Generator) -> tuple[Array]:
    return ((rng.uniform(size=(20, 1)) < 0.7).astype(float),)


def one_measurement(rng: np.random.Generator) -> tuple[Array]:
    return (np.array([[9.5]]),)


def independent_flips(params, x):
    fairness = params["fairness"]
    assert abs(fairness - x.mean()) < 1e-4  # the maximum
    return bernoulli.logpmf(x, fairness).sum()


def beta_flips(params, x):
    heads = x.sum()
    return betaln(10 + heads, 10 + len(x) - heads) - betaln(10, 10)


def normal_measurement(params, x):
    return norm.logpdf(x[0, 0], 8.5, np.sqrt(1 + 0.75**2))


CASES = [
    Case("coin_parameter", coin_parameter, flips, independent_flips),
    Case("coin_beta", coin_beta, flips, beta_flips),
    Case("coin_loop_of_sites", coin_loop_of_sites, flips, beta_flips),
    Case("scale_weight_measurement", scale_weight_measurement, one_measurement, normal_measurement),
]
