"""One feature each: priors and latents of many kinds, and posteriors with several modes."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.special import expit, gammaln, logsumexp
from scipy.stats import binom, norm
from torch.distributions import constraints
from truths import log_density, normal_grid
from zoo.case import Array, Case


def binomial_latent(x):
    p = pyro.param("p", torch.tensor(0.5), constraint=constraints.unit_interval)
    with pyro.plate("rows", len(x)):
        n = pyro.sample("n", dist.Binomial(5, p))
        pyro.sample("x", dist.Normal(n, 0.5), obs=x[:, 0])


def poisson_latent(x):
    with pyro.plate("rows", len(x)):
        n = pyro.sample("n", dist.Poisson(2.0))
        pyro.sample("x", dist.Normal(n, 0.5), obs=x[:, 0])


def vague_gammas(x):
    tau = pyro.sample("tau", dist.Gamma(1e-4, 1e-4))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1 / tau.sqrt()), obs=x[:, 0])


def half_cauchy(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mu, scale), obs=x[:, 0])


def lkj_covariance(x):
    theta = pyro.sample("theta", dist.HalfNormal(2 * torch.ones(2)).to_event(1))
    root = pyro.sample("L_omega", dist.LKJCholesky(2, 2.0))
    scale_tril = theta.unsqueeze(-1) * root
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), scale_tril=scale_tril), obs=x)


def horseshoe(x, y):
    tau = pyro.sample("tau", dist.HalfCauchy(0.5))
    with pyro.plate("weights", 3):
        lam = pyro.sample("lambda", dist.HalfCauchy(1.0))
        w = pyro.sample("w", dist.Normal(0.0, tau * lam))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def spike_and_slab(x, y):
    with pyro.plate("weights", 3):
        included = pyro.sample("included", dist.Bernoulli(0.5))
        w = pyro.sample("w", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal((x * (included * w).unsqueeze(-2)).sum(-1), 1.0), obs=y)


def exchangeable(n_means):
    def means(x):
        with pyro.plate("components", n_means):
            mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(n_means) / n_means))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x[:, 0])

    return means


def sign_symmetric_factor(x):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1) * w, 0.7).to_event(1), obs=x)


def sign_constrained_factor(x):
    first = pyro.sample("first", dist.HalfNormal(1.0))
    others = pyro.sample("others", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    w = torch.cat([first.unsqueeze(-1), others], -1)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1) * w, 0.7).to_event(1), obs=x)


def many_shared_latents(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(70), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=1 + x @ w), obs=y)


def whole_numbers_and_noise(rng: np.random.Generator) -> tuple[Array]:
    return (rng.binomial(5, 0.4, size=(40, 1)) + 0.5 * rng.normal(size=(40, 1)),)


def column(rng: np.random.Generator) -> tuple[Array]:
    return (1.5 * rng.normal(size=(25, 1)),)


def correlated(rng: np.random.Generator) -> tuple[Array]:
    return (rng.normal(size=(40, 1)) * [1.0, 1.5] + rng.normal(size=(40, 2)),)


def orthogonal(rng: np.random.Generator) -> tuple[Array, Array]:
    """Columns that are orthogonal, with squares that add up to 30: weights are independent given their scales."""
    x = np.linalg.qr(rng.normal(size=(30, 3)))[0] * math.sqrt(30)
    return x, x @ [1.0, 0.1, 0.0] + rng.normal(size=30)


def heaps(*centres: float, n: int = 30):
    def draw(rng: np.random.Generator) -> tuple[Array]:
        return (np.array(centres)[rng.integers(len(centres), size=n)][:, None] + rng.normal(size=(n, 1)),)

    return draw


def factor_rows(rng: np.random.Generator) -> tuple[Array]:
    return (rng.normal(size=(25, 1)) * [1.0, 0.8, -0.6] + 0.7 * rng.normal(size=(25, 3)),)


def wide_votes(rng: np.random.Generator) -> tuple[Array, Array]:
    """Rows that are orthogonal: their logits are independent of each other under the prior."""
    x = 2 * np.linalg.qr(rng.normal(size=(70, 30)))[0].T
    return x, (rng.uniform(size=30) < expit(1 + x @ rng.normal(size=70))).astype(float)


def binomials(params, x):
    n = np.arange(6)
    return logsumexp(binom.logpmf(n, 5, params["p"]) + norm.logpdf(x, n, 0.5), axis=1).sum()


def gamma_precision(params, x):
    """b^a / G(a) G(a + N/2) / (b + S/2)^(a + N/2) (2 pi)^(-N/2)."""
    a, n, s = 1e-4, len(x), (x**2).sum()
    return (
        a * math.log(a)
        - gammaln(a)
        + gammaln(a + n / 2)
        - (a + n / 2) * math.log(a + s / 2)
        - n / 2 * math.log(2 * math.pi)
    )


def cauchy_scale(params, x):
    """Over the logarithm of the scale by a fine grid; the mean in closed form."""
    at = np.linspace(-4, 8, 4001)
    v = np.exp(2 * at)
    n, total, squares = len(x), x.sum(), (x**2).sum()
    wide = v + 25 * n
    log_p = -0.5 * ((n - 1) * np.log(v) + np.log(wide) + (squares - total**2 / n) / v + total**2 / n / wide)
    prior = math.log(2 / math.pi) - np.log1p(v) + at
    return logsumexp(log_p + prior) + math.log(at[1] - at[0]) - n / 2 * math.log(2 * math.pi)


def lkj_grid(params, x):
    """LKJ(2) of two columns: the density of the correlation r is 3/4 (1 - r^2)."""
    node, weight = np.polynomial.legendre.leggauss(60)
    r, log_r = node, np.log(weight) + np.log(0.75 * (1 - node**2))
    at = np.linspace(-3, 2.5, 101)
    log_s = math.log(2) + norm.logpdf(np.exp(at), 0, 2) + at + math.log(at[1] - at[0])
    a, b, c = np.exp(at)[:, None, None], np.exp(at)[:, None], r
    n = len(x)
    (s11, s12), (_, s22) = x.T @ x
    quadratic = (s11 / a**2 - 2 * c * s12 / (a * b) + s22 / b**2) / (1 - c**2)
    log_det = 2 * np.log(a) + 2 * np.log(b) + np.log(1 - c**2)
    log_p = -0.5 * quadratic - n / 2 * log_det - n * math.log(2 * math.pi)
    return logsumexp(log_p + log_s[:, None, None] + log_s[:, None] + log_r)


def horseshoe_grid(params, x, y):
    """X'X = 30 I: given tau each weight's estimate is N(0, 1/30 + tau^2 lambda^2), by itself; exact bounds."""
    n = len(y)
    estimate = x.T @ y / n
    at = np.linspace(-12, 12, 1201)
    step = math.log(at[1] - at[0])
    log_lambda = math.log(2 / math.pi) - np.log1p(np.exp(2 * at)) + at + step
    log_tau = math.log(2 / (math.pi * 0.5)) - np.log1p(np.exp(2 * at) / 0.25) + at + step
    spread = np.exp(at[:, None] + at)  # (tau, lambda)
    total = log_tau
    for w in estimate:
        total = total + logsumexp(norm.logpdf(w, 0, np.sqrt(1 / n + spread**2)) + log_lambda, axis=1)
    constant = norm.logpdf(y).sum() - (norm.logpdf(estimate, 0, 1 / math.sqrt(n)).sum() - 0)
    exact = float(logsumexp(total) + constant)
    return exact, exact


def eight_subsets(params, x, y):
    terms = []
    for subset in range(8):
        inside = [j for j in range(3) if subset >> j & 1]
        cov = np.eye(len(y)) + 4 * x[:, inside] @ x[:, inside].T
        terms.append(log_density(y[None], np.zeros(len(y)), cov)[0] - 3 * math.log(2))
    return logsumexp(terms)


def grid_of_means(n_means: int, n_nodes: int):
    def truth(params, x):
        node, log_w = normal_grid(4, n_nodes)
        axes = np.meshgrid(*[3 * node] * n_means, indexing="ij")
        total = sum(np.meshgrid(*[log_w] * n_means, indexing="ij"))
        for value in x[:, 0]:
            total = total + np.log(sum(norm.pdf(value - a) for a in axes) / n_means)
        exact = float(logsumexp(total))
        return (exact, exact) if n_means > 2 else exact

    return truth


def loadings_grid(params, x):
    """N(0, w w' + 0.49 I) by its one eigenvalue that depends on w; loadings by a grid.

    With a sign fixed the evidence is the same: a half-normal has twice the density on half of the line.
    """
    node, log_w = normal_grid(4.5, 91)
    w = np.stack(np.meshgrid(node, node, node, indexing="ij"), -1).reshape(-1, 3)
    log_prior = (log_w[:, None, None] + log_w[:, None] + log_w).ravel()
    n, noise = len(x), 0.49
    second = x.T @ x
    size = (w**2).sum(1)
    along = np.einsum("gi,ij,gj->g", w, second, w)
    quadratic = np.trace(second) / noise - along / (noise * (noise + size))
    log_det = 2 * math.log(noise) + np.log(noise + size)
    return logsumexp(log_prior - 0.5 * quadratic - n / 2 * log_det) - 1.5 * n * math.log(2 * math.pi)


def independent_votes(params, x, y):
    """Logits are N(1, 4), each by itself."""
    node, log_w = normal_grid(8, 401)
    logits = 1 + 2 * node
    exact = sum(logsumexp(-np.logaddexp(0, -logits if vote else logits) + log_w) for vote in y)
    return exact, exact


CASES = [
    Case("binomial_latent", binomial_latent, whole_numbers_and_noise, binomials),
    Case("poisson_latent", poisson_latent, whole_numbers_and_noise, refused="infinite support"),
    Case("vague_gammas", vague_gammas, column, gamma_precision, tolerance=1e-4),
    Case("half_cauchy", half_cauchy, column, cauchy_scale, tolerance=1e-5, slow=True),
    Case("lkj_covariance", lkj_covariance, correlated, lkj_grid, tolerance=1e-3),
    Case("horseshoe", horseshoe, orthogonal, horseshoe_grid, tolerance=1e-2, slow=True),
    Case("spike_and_slab", spike_and_slab, orthogonal, eight_subsets),
    Case(
        "exchangeable_means",
        exchangeable(2),
        heaps(-2.0, 2.0),
        grid_of_means(2, 401),
        tolerance=1e-3,
        slow=True,
    ),
    Case(
        "exchangeable_three",
        exchangeable(3),
        heaps(-1.0, 0.5, 2.0),
        grid_of_means(3, 81),
        tolerance=1e-2,
        slow=True,
    ),
    Case(
        "sign_symmetric_factor", sign_symmetric_factor, factor_rows, loadings_grid, tolerance=1e-3, slow=True
    ),
    Case(
        "sign_constrained_factor",
        sign_constrained_factor,
        factor_rows,
        loadings_grid,
        tolerance=1e-2,
        slow=True,
    ),
    Case("many_shared_latents", many_shared_latents, wide_votes, independent_votes, tolerance=0.05),
]
