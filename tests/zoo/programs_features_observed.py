"""One feature each: what a program observes, and what it masks."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from scipy.stats import norm
from torch.distributions import constraints
from truths import log_density
from zoo.case import Array, Case


def observed_less_latent(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("residual", dist.Normal(0.0, 1.0), obs=x[:, 0] - (2 * mu + 1))


def observed_less_row_latent(x):
    sigma = pyro.param("sigma", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        pyro.sample("residual", dist.Normal(0.0, sigma).expand([2]).to_event(1), obs=x - z.unsqueeze(-1))


def observed_less_parameter(x):
    mu = pyro.param("mu", torch.zeros(2))
    with pyro.plate("rows", len(x)):
        pyro.sample("residual", dist.Normal(0.0, 1.0).expand([2]).to_event(1), obs=x - mu)


def observed_scaled(x):
    m = pyro.param("m", torch.zeros(2))
    s = pyro.param("s", torch.ones(2), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        pyro.sample("standard", dist.Normal(0.0, 1.0).expand([2]).to_event(1), obs=(x - m) / s)


def observed_log(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("log_x", dist.Normal(mu, 0.5), obs=x[:, 0].log())


def observed_less_mean(x):
    sigma = pyro.param("sigma", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        pyro.sample("centred", dist.Normal(0.0, sigma).expand([2]).to_event(1), obs=x - x.mean(0))


def own_missing_mask(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    seen = ~x[:, 0].isnan()
    with pyro.plate("rows", len(x)), poutine.mask(mask=seen):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[:, 0].nan_to_num(0.0))


def mask_of_argument(x, valid):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(x)), poutine.mask(mask=valid.bool()):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[:, 0])


def mask_of_values(x):
    mu = pyro.param("mu", torch.tensor(0.0))
    with pyro.plate("rows", len(x)), poutine.mask(mask=x[:, 0] > 0):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[:, 0])


def factor_model(x):
    w = pyro.param("w", torch.ones(3))
    s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None] * w, s).to_event(1), obs=x)


delta_tokens = poutine.reparam(factor_model, {"z": LocScaleReparam(0.0)})


def literal_plate(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", 20):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[:, 0])


def improper_prior(x):
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, torch.Size(), torch.Size()))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[:, 0])


def column(rng: np.random.Generator) -> tuple[Array]:
    return (2 + rng.normal(size=(20, 1)),)


def positive_column(rng: np.random.Generator) -> tuple[Array]:
    return (np.exp(1 + 0.5 * rng.normal(size=(20, 1))),)


def two_columns(rng: np.random.Generator) -> tuple[Array]:
    return (rng.normal(size=(30, 1)) + 0.7 * rng.normal(size=(30, 2)),)


def three_columns(rng: np.random.Generator) -> tuple[Array]:
    return (rng.normal(size=(50, 1)) * [1.0, 0.8, 1.2] + 0.5 * rng.normal(size=(50, 3)),)


def with_holes(rng: np.random.Generator) -> tuple[Array]:
    x = 2 + rng.normal(size=(30, 1))
    x[::3] = np.nan
    return (x,)


def with_flags(rng: np.random.Generator) -> tuple[Array, Array]:
    return 2 + rng.normal(size=(30, 1)), (rng.uniform(size=30) < 0.7).astype(float)


def common_mean(y: Array, prior_sd: float, noise_sd: float, mean: float = 0.0) -> float:
    """log N(y; mean, noise^2 I + prior^2 11')."""
    n = len(y)
    cov = noise_sd**2 * np.eye(n) + prior_sd**2
    return float(log_density(y[None], np.full(n, mean), cov)[0])


def rows_share_a_latent(params, x):
    return float(log_density(x, np.zeros(2), params["sigma"] ** 2 * np.eye(2) + 4.0).sum())


def at_the_mean(params, x):
    assert np.allclose(params["mu"], x.mean(0), atol=1e-4)
    return norm.logpdf(x, params["mu"]).sum()


def one_factor(params, x):
    cov = np.outer(params["w"], params["w"]) + params["s"] ** 2 * np.eye(3)
    return float(log_density(x, np.zeros(3), cov).sum())


CASES = [
    Case(
        "observed_less_latent", observed_less_latent, column, lambda _, x: common_mean(x[:, 0], 6.0, 1.0, 1.0)
    ),
    Case("observed_less_row_latent", observed_less_row_latent, two_columns, rows_share_a_latent),
    Case("observed_less_parameter", observed_less_parameter, two_columns, at_the_mean),
    Case("observed_scaled", observed_scaled, two_columns, refused="not by a shift alone"),
    Case("observed_log", observed_log, positive_column, lambda _, x: common_mean(np.log(x[:, 0]), 3.0, 0.5)),
    Case("observed_less_mean", observed_less_mean, two_columns, refused="depends on other rows"),
    Case(
        "own_missing_mask", own_missing_mask, with_holes, lambda _, x: common_mean(x[~np.isnan(x)], 10.0, 1.0)
    ),
    Case(
        "mask_of_argument", mask_of_argument, with_flags, lambda _, x, v: common_mean(x[v == 1, 0], 10.0, 1.0)
    ),
    Case("mask_of_values", mask_of_values, column, refused="mask"),
    Case("delta_tokens", delta_tokens, three_columns, one_factor),
    Case("literal_plate", literal_plate, column, lambda _, x: common_mean(x[:, 0], 3.0, 1.0)),
    Case("improper_prior", improper_prior, column, refused="ImproperUniform|improper|density"),
]
