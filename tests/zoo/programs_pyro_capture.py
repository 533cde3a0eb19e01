"""After Pyro's example of capture and recapture (Cormack-Jolly-Seber): animals seen or not on occasions."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from scipy.special import expit, logit, logsumexp
from scipy.stats import norm
from zoo.case import Array, Case


def capture_recapture_1(capture_history):
    n_animals, n_occasions = capture_history.shape
    phi = pyro.sample("phi", dist.Uniform(0.0, 1.0))  # survives
    rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))  # is seen if alive
    with pyro.plate("animals", n_animals, dim=-1):
        z = torch.ones(n_animals)
        first_capture_mask = torch.zeros(n_animals).bool()
        for t in pyro.markov(range(n_occasions)):
            with poutine.mask(mask=first_capture_mask):
                mu_z = first_capture_mask.float() * phi * z + (1 - first_capture_mask.float())
                z = pyro.sample(f"z_{t}", dist.Bernoulli(mu_z), infer={"enumerate": "parallel"})
                pyro.sample(f"y_{t}", dist.Bernoulli(rho * z), obs=capture_history[:, t])
            first_capture_mask = first_capture_mask | capture_history[:, t].bool()


def capture_recapture_2(capture_history):
    n_animals, n_occasions = capture_history.shape
    rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
    z = torch.ones(n_animals)
    first_capture_mask = torch.zeros(n_animals).bool()
    animals_plate = pyro.plate("animals", n_animals, dim=-1)
    for t in pyro.markov(range(n_occasions)):
        phi_t = pyro.sample(f"phi_{t}", dist.Uniform(0.0, 1.0)) if t > 0 else 1.0
        with animals_plate, poutine.mask(mask=first_capture_mask):
            mu_z = first_capture_mask.float() * phi_t * z + (1 - first_capture_mask.float())
            z = pyro.sample(f"z_{t}", dist.Bernoulli(mu_z), infer={"enumerate": "parallel"})
            pyro.sample(f"y_{t}", dist.Bernoulli(rho * z), obs=capture_history[:, t])
        first_capture_mask = first_capture_mask | capture_history[:, t].bool()


def capture_recapture_3(capture_history):
    n_animals, n_occasions = capture_history.shape
    phi_mean = pyro.sample("phi_mean", dist.Uniform(0.0, 1.0))
    phi_logit_mean = torch.log(phi_mean / (1 - phi_mean))
    phi_sigma = pyro.sample("phi_sigma", dist.Uniform(0.0, 10.0))
    rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
    z = torch.ones(n_animals)
    first_capture_mask = torch.zeros(n_animals).bool()
    animals_plate = pyro.plate("animals", n_animals, dim=-1)
    for t in pyro.markov(range(n_occasions)):
        if t > 0:
            phi_logit_t = pyro.sample(f"phi_logit_{t}", dist.Normal(phi_logit_mean, phi_sigma))
            phi_t = torch.sigmoid(phi_logit_t)
        else:
            phi_t = torch.tensor(1.0)
        with animals_plate, poutine.mask(mask=first_capture_mask):
            mu_z = first_capture_mask.float() * phi_t * z + (1 - first_capture_mask.float())
            z = pyro.sample(f"z_{t}", dist.Bernoulli(mu_z), infer={"enumerate": "parallel"})
            pyro.sample(f"y_{t}", dist.Bernoulli(rho * z), obs=capture_history[:, t])
        first_capture_mask = first_capture_mask | capture_history[:, t].bool()


def capture_recapture_5(capture_history, sex):
    n_animals, n_occasions = capture_history.shape
    phi_male = pyro.sample("phi_male", dist.Uniform(0.0, 1.0))
    phi_female = pyro.sample("phi_female", dist.Uniform(0.0, 1.0))
    rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
    with pyro.plate("animals", n_animals, dim=-1):
        phi = sex * phi_male + (1.0 - sex) * phi_female
        z = torch.ones(n_animals)
        first_capture_mask = torch.zeros(n_animals).bool()
        for t in pyro.markov(range(n_occasions)):
            with poutine.mask(mask=first_capture_mask):
                mu_z = first_capture_mask.float() * phi * z + (1 - first_capture_mask.float())
                z = pyro.sample(f"z_{t}", dist.Bernoulli(mu_z), infer={"enumerate": "parallel"})
                pyro.sample(f"y_{t}", dist.Bernoulli(rho * z), obs=capture_history[:, t])
            first_capture_mask = first_capture_mask | capture_history[:, t].bool()


def seen_or_not(rng: np.random.Generator) -> Array:
    """(20, 4); every animal is seen at least once."""
    alive = np.cumprod(rng.uniform(size=(200, 4)) < [1, 0.7, 0.7, 0.7], axis=1)
    seen = (alive * (rng.uniform(size=(200, 4)) < 0.6)).astype(float)
    return seen[seen.any(1)][:20]


def log_likelihood(history: Array, phi: list[Array], rho: Array) -> Array:
    """Log-probability of what follows each animal's first capture, by arrays of phi_1, .., phi_{T-1} and rho.

    Forwards over (alive, dead): the alive are seen with probability rho, the dead never.
    """
    total = 0.0
    pattern, count = np.unique(history, axis=0, return_counts=True)
    for row, n in zip(pattern, count, strict=True):
        first = int(np.argmax(row))
        alive, dead = 1.0, 0.0
        for t in range(first + 1, len(row)):
            alive, dead = alive * phi[t - 1], dead + alive * (1 - phi[t - 1])
            alive, dead = (alive * rho, 0.0) if row[t] else (alive * (1 - rho), dead)
        total = total + n * np.log(alive + dead)
    return total


def legendre(n: int) -> tuple[Array, Array]:
    """Nodes and log-weights on (0, 1): exact for the polynomials that these likelihoods are."""
    node, weight = np.polynomial.legendre.leggauss(n)
    return (node + 1) / 2, np.log(weight / 2)


def one_survival(params, history):
    u, w = legendre(60)
    phi, rho = np.meshgrid(u, u, indexing="ij")
    return logsumexp(log_likelihood(history, [phi] * 3, rho) + w[:, None] + w)


def survival_by_year(params, history):
    u, w = legendre(24)
    *phi, rho = np.meshgrid(u, u, u, u, indexing="ij")
    return logsumexp(log_likelihood(history, phi, rho) + sum(np.meshgrid(w, w, w, w, indexing="ij")))


def survival_by_sex(params, history, sex):
    u, w = legendre(40)
    log_p = 0.0
    grid = np.meshgrid(u, u, u, indexing="ij")  # male, female, rho
    for k, value in ((0, 1.0), (1, 0.0)):
        log_p = log_p + log_likelihood(history[sex == value], [grid[k]] * 3, grid[2])
    return logsumexp(log_p + sum(np.meshgrid(w, w, w, indexing="ij")))


def survival_with_effects(params, history):
    """The likelihood is a polynomial in each phi_t: its values at nodes, times means of Lagrange's polynomials.

    E[l_k(phi) | mean, sigma] by a fine grid of the effect; then Gauss-Legendre over phi_mean, sigma and rho.
    """
    u, w = legendre(24)
    *phi, rho = np.meshgrid(u, u, u, u, indexing="ij")
    log_p = log_likelihood(history, phi, rho) + w  # rho is the last axis
    shift = log_p.max()
    table = np.exp(log_p - shift).sum(-1)  # (24, 24, 24)
    m, log_m = legendre(60)
    s, log_s = legendre(60)
    z = np.linspace(-8, 8, 401)
    at = expit(logit(m)[:, None, None] + 10 * s[:, None] * z).reshape(-1, len(z))
    density = norm.pdf(z) * (z[1] - z[0])
    barycentric = np.array([1 / np.prod(np.delete(u[k] - u, k)) for k in range(len(u))])
    off = at[..., None] - u
    off = np.where(np.abs(off) < 1e-14, 1e-14, off)
    lagrange = barycentric / off
    lagrange /= lagrange.sum(-1, keepdims=True)
    mean = np.einsum("mzk,z->mk", lagrange, density)  # (3600, 24)
    inner = np.einsum("ijk,mi,mj,mk->m", table, mean, mean, mean, optimize=True)
    return shift + np.log((inner * np.exp((log_m[:, None] + log_s).ravel())).sum())


def history_and_sex(rng: np.random.Generator) -> tuple[Array, Array]:
    return seen_or_not(rng), rng.integers(2, size=20).astype(float)


CASES = [
    Case(
        "capture_recapture_1", capture_recapture_1, lambda rng: (seen_or_not(rng),), one_survival, slow=True
    ),
    Case(
        "capture_recapture_2",
        capture_recapture_2,
        lambda rng: (seen_or_not(rng),),
        survival_by_year,
        tolerance=1e-3,
        se=0.03,
        slow=True,
    ),
    Case(
        "capture_recapture_3",
        capture_recapture_3,
        lambda rng: (seen_or_not(rng),),
        survival_with_effects,
        tolerance=1e-2,
        slow=True,
    ),
    Case(
        "capture_recapture_5",
        capture_recapture_5,
        history_and_sex,
        survival_by_sex,
        tolerance=1e-3,
        slow=True,
    ),
]
