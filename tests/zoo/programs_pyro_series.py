"""After Pyro's tutorials on series and processes: forecasting, tracking, Gaussian processes, epidemics."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from pyro.ops.tensor_utils import periodic_repeat
from torch.distributions import constraints
from truths import log_density
from zoo.case import Array, Case


def forecast_local_level(data):
    duration = len(data)
    bias = pyro.sample("bias", dist.Normal(0.0, 10.0))
    drift_scale = pyro.param("drift_scale", torch.tensor(0.5), constraint=constraints.positive)
    noise_scale = pyro.param("noise_scale", torch.tensor(0.5), constraint=constraints.positive)
    with pyro.plate("time", duration):
        drift = pyro.sample("drift", dist.Normal(0.0, drift_scale))
    prediction = bias + drift.cumsum(-1)
    with pyro.plate("observed", duration):
        pyro.sample("residual", dist.Normal(prediction, noise_scale), obs=data[:, 0])


def forecast_seasonal(data, covariates):
    duration = len(data)
    bias = pyro.sample("bias", dist.Normal(0.0, 10.0))
    weight = pyro.sample("weight", dist.Normal(0.0, 0.5))
    with pyro.plate("day_of_week", 7):
        seasonal = pyro.sample("seasonal", dist.Normal(0.0, 5.0))
    noise_scale = pyro.param("noise_scale", torch.tensor(0.5), constraint=constraints.positive)
    prediction = bias + weight * covariates + periodic_repeat(seasonal, duration, dim=-1)
    with pyro.plate("time", duration):
        pyro.sample("y", dist.Normal(prediction, noise_scale), obs=data[:, 0])


def forecast_student_noise(data):
    duration = len(data)
    bias = pyro.sample("bias", dist.Normal(0.0, 10.0))
    drift_scale = pyro.sample("drift_scale", dist.LogNormal(-1.0, 0.5))
    noise_scale = pyro.sample("noise_scale", dist.LogNormal(-1.0, 0.5))
    nu = pyro.sample("nu", dist.Gamma(10.0, 2.0))
    with pyro.plate("time", duration):
        drift = pyro.sample("drift", dist.Normal(0.0, drift_scale))
        prediction = bias + drift.cumsum(-1)
        pyro.sample("y", dist.StudentT(nu, prediction, noise_scale), obs=data[:, 0])


STEP = torch.tensor([[1.0, 1.0], [0.0, 1.0]])


def kalman_tracking(measured):
    force = pyro.param("force", torch.tensor(0.3), constraint=constraints.positive)
    noise = pyro.param("noise", torch.tensor(1.0), constraint=constraints.positive)
    state = torch.zeros(2)
    kick = torch.eye(2) * force**2 + 0.01 * torch.eye(2)
    for t in pyro.markov(range(len(measured))):
        state = pyro.sample(f"state_{t}", dist.MultivariateNormal(STEP.to(state.dtype) @ state, kick))
        pyro.sample(f"position_{t}", dist.Normal(state[..., 0], noise), obs=measured[t, 0])


class Process(PyroModule):
    """Pyro's own regression by a Gaussian process, given new data at each call."""

    def __init__(self):
        super().__init__()
        kernel = gp.kernels.RBF(input_dim=1, variance=torch.tensor(1.0), lengthscale=torch.tensor(1.0))
        self.regression = gp.models.GPRegression(
            torch.zeros(2, 1), torch.zeros(2), kernel, noise=torch.tensor(0.5)
        )

    def forward(self, x, y):
        self.regression.set_data(x, y)
        return self.regression.model()


def gplvm_linear(y):
    """Outputs are rows, as in `pyro.contrib.gp`; each is a process over the positions of the columns."""
    n_outputs, n = y.shape
    positions = pyro.param("X", lambda: torch.randn(n, 1))
    noise = pyro.param("noise", torch.tensor(0.5), constraint=constraints.positive)
    cov = positions @ positions.T + noise * torch.eye(n)
    with pyro.plate("outputs", n_outputs):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(n), cov), obs=y)


def sir_with_poisson(cases):
    population = 1000.0
    rate_s = pyro.sample("rate_s", dist.LogNormal(0.0, 1.0))
    prob_i = pyro.sample("prob_i", dist.Beta(2.0, 2.0))
    rho = pyro.sample("rho", dist.Beta(2.0, 2.0))
    susceptible, infected = torch.tensor(population - 5), torch.tensor(5.0)
    for t in pyro.markov(range(len(cases))):
        infections = pyro.sample(f"S2I_{t}", dist.Poisson(rate_s * susceptible * infected / population))
        recoveries = prob_i * infected
        susceptible = (susceptible - infections).clamp(min=0)
        infected = infected + infections - recoveries
        pyro.sample(f"obs_{t}", dist.Poisson(rho * infections + 0.1), obs=cases[t, 0])


def level(rng: np.random.Generator) -> tuple[Array]:
    return ((2 + np.cumsum(0.4 * rng.normal(size=(20, 1)), axis=0)) + 0.6 * rng.normal(size=(20, 1)),)


def heavy_tails(rng: np.random.Generator) -> tuple[Array]:
    return (1 + np.cumsum(0.3 * rng.normal(size=(12, 1)), axis=0) + 0.3 * rng.standard_t(4, size=(12, 1)),)


def weeks(rng: np.random.Generator) -> tuple[Array, Array]:
    t = np.arange(28)
    covariate = rng.normal(size=28)
    y = 3 + 2 * np.sin(2 * np.pi * t / 7) + 0.4 * covariate + 0.5 * rng.normal(size=28)
    return y[:, None], covariate


def tracked(rng: np.random.Generator) -> tuple[Array]:
    speed = 1 + np.cumsum(0.3 * rng.normal(size=15))
    return (np.cumsum(speed)[:, None] + rng.normal(size=(15, 1)),)


def wave(rng: np.random.Generator) -> tuple[Array, Array]:
    x = np.sort(rng.uniform(0, 5, size=25))
    return x[:, None], 0.5 * np.sin(3 * x) + 0.2 * rng.normal(size=25)


def one_factor(rng: np.random.Generator) -> tuple[Array]:
    return (rng.normal(size=(12, 1)) @ rng.normal(size=(1, 6)) + 0.5 * rng.normal(size=(12, 6)),)


def outbreak(rng: np.random.Generator) -> tuple[Array]:
    return (np.array([[2.0], [3.0], [6.0], [8.0]]),)


def joint(y: Array, cov: Array) -> float:
    return float(log_density(y[None], np.zeros(len(y)), cov)[0])


def random_walk(params, y):
    n = len(y)
    t = np.arange(1, n + 1)
    cov = 100 + params["drift_scale"] ** 2 * np.minimum.outer(t, t) + params["noise_scale"] ** 2 * np.eye(n)
    return joint(y[:, 0], cov)


def seasons(params, y, covariate):
    t = np.arange(len(y))
    cov = 100 + 0.25 * np.outer(covariate, covariate) + 25.0 * (t[:, None] % 7 == t % 7)
    return joint(y[:, 0], cov + params["noise_scale"] ** 2 * np.eye(len(y)))


def constant_velocity(params, y):
    """Covariance of positions: state_t = sum_s F^(t - s) kick_s, one more factor F for the start at zero."""
    n = len(y)
    step = np.array([[1.0, 1.0], [0.0, 1.0]])
    q = (params["force"] ** 2 + 0.01) * np.eye(2)
    power = [np.linalg.matrix_power(step, k) for k in range(n)]
    cov = np.zeros((n, n))
    for a in range(n):
        for b in range(n):
            cov[a, b] = sum((power[a - s] @ q @ power[b - s].T)[0, 0] for s in range(min(a, b) + 1))
    return joint(y[:, 0], cov + params["noise"] ** 2 * np.eye(n))


def squared_exponential(params, x, y):
    p = {name.rsplit(".", 1)[-1]: float(np.asarray(value).reshape(())) for name, value in params.items()}
    squared = (x - x.T) ** 2
    cov = p["variance"] * np.exp(-0.5 * squared / p["lengthscale"] ** 2)
    return joint(y, cov + (p["noise"] + 1e-6) * np.eye(len(y)))  # Pyro's jitter is 1e-6


def dual_ppca(params, y):
    """Rows are N(0, X X' + s I); at the maximum one eigenvalue of Y' Y / D is kept, the others are averaged."""
    d, n = y.shape
    value = np.linalg.eigvalsh(y.T @ y / d)[::-1]
    noise = value[1:].sum() / (n - 1)
    best = -d / 2 * (n * np.log(2 * np.pi) + np.log(value[0]) + (n - 1) * np.log(noise) + n)
    cov = params["X"] @ params["X"].T + params["noise"] * np.eye(n)
    here = float(log_density(y, np.zeros(n), cov).sum())
    assert best - 1e-3 < here < best + 1e-6
    return here


CASES = [
    Case("forecast_local_level", forecast_local_level, level, random_walk),
    Case("forecast_seasonal", forecast_seasonal, weeks, seasons),
    Case("forecast_student_noise", forecast_student_noise, heavy_tails, slow=True),
    Case("kalman_tracking", kalman_tracking, tracked, constant_velocity, slow=True),
    Case("gaussian_process", Process, wave, squared_exponential),
    Case("gplvm_linear", gplvm_linear, one_factor, dual_ppca),
    Case("sir_with_poisson", sir_with_poisson, outbreak, refused="has infinite support"),
]
