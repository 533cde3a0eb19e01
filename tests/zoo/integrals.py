"""Integrals over the latents that a program's rows share, by numpy and scipy alone: truths of the zoo.

Coordinates run over the whole line: `exp` of one for a positive latent, `expit` for one between 0 and 1, with the
logarithm of the derivative added to the log joint (`log_positive`, `log_unit`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logsumexp
from scipy.stats import multivariate_t
from zoo.case import Array

LogJoint = Callable[[Array], Array]
"""(M, D) points to their (M,) log joint densities."""

CHUNK = 20_000


def log_unit(u: Array) -> tuple[Array, Array]:
    """p = expit(u) and log dp/du = log p + log(1 - p)."""
    return expit(u), -np.logaddexp(0, -u) - np.logaddexp(0, u)


def mode_and_root(log_joint: LogJoint, start: Sequence[float]) -> tuple[Array, Array]:
    """The mode (D,) and a root R of the inverse negative Hessian there, R R' = H^-1, by central differences."""
    start = np.asarray(start, dtype=float)

    def loss(u: Array) -> float:
        return -float(log_joint(u[None])[0])

    best = minimize(loss, start, method="BFGS").x
    best = minimize(
        loss, best, method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-9, "maxiter": 4000}
    ).x
    d, step = len(best), 1e-3
    shifts = step * np.eye(d)
    pairs = np.array(
        [a * shifts[i] + b * shifts[j] for i in range(d) for j in range(d) for a in (1, -1) for b in (1, -1)]
    )
    value = log_joint(best + pairs).reshape(d, d, 4)
    curvature = (value[..., 0] - value[..., 1] - value[..., 2] + value[..., 3]) / (4 * step**2)
    return best, np.linalg.cholesky(np.linalg.inv(-(curvature + curvature.T) / 2))


def log_integral(log_joint: LogJoint, start: Sequence[float], n: int, width: float = 14.0) -> float:
    """log of the integral over R^D by the rectangle rule, n nodes an axis, `width` posterior sd to each side.

    Nodes are equal steps of t, z = sinh(t / 3) * 3: dense around the mode, few in the tails, dz = cosh(t / 3) dt. The
    rule converges faster than any power of n for a smooth integrand that is gone at the borders.
    """
    mode, root = mode_and_root(log_joint, start)
    end = 3 * float(np.arcsinh(width / 3))

    def stretched(t: Array) -> Array:
        z = 3 * np.sinh(t / 3)
        return log_joint(mode + z @ root.T) + np.log(np.cosh(t / 3)).sum(1)

    return log_rectangles(stretched, [(-end, end)] * len(mode), n) + float(np.log(np.diag(root)).sum())


def log_rectangles(log_joint: LogJoint, box: Sequence[tuple[float, float]], n: int) -> float:
    """log of the integral over a box, the rectangle rule with n nodes an axis."""
    axes = [np.linspace(low, high, n) for low, high in box]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))  # (n^D, D)
    parts = [logsumexp(log_joint(grid[i : i + CHUNK])) for i in range(0, len(grid), CHUNK)]
    return float(logsumexp(parts)) + sum(float(np.log(a[1] - a[0])) for a in axes)


def bounds_by_draws(
    log_joint: LogJoint, start: Sequence[float], n: int = 4000, rounds: int = 3, seed: int = 0
) -> tuple[float, float]:
    """The evidence less and more four standard errors, from draws of a Student t whose moments follow the posterior's.

    The last round's draws are fresh: their mean weight is unbiased. A tenth of them must count as equal draws.
    """
    mode, root = mode_and_root(log_joint, start)
    cov = root @ root.T
    rng = np.random.default_rng(seed)
    for last in np.arange(rounds) == rounds - 1:
        q = multivariate_t(mode, 1.2 * cov, df=6)
        u = q.rvs(n, random_state=rng).reshape(n, -1)
        target = np.concatenate([log_joint(u[i : i + CHUNK]) for i in range(0, n, CHUNK)])
        w = target - q.logpdf(u)
        share = np.exp(w - logsumexp(w))
        if not last:
            mode, cov = share @ u, np.cov(u.T, aweights=share).reshape(cov.shape)
    assert 1 / (share**2).sum() > n / 10
    value, se = logsumexp(w) - np.log(n), np.sqrt((share**2).sum() - 1 / n)
    return float(value - 4 * se), float(value + 4 * se)


def normal_vector(y: Array, mean: Array, cov: Array) -> Array:
    """(M,) log N(y; mean, cov) of one vector y (N,) under means (..., N) and covariances (M, N, N)."""
    root = np.linalg.cholesky(cov)
    z = np.linalg.solve(root, np.broadcast_to(y - mean, root.shape[:-1])[..., None])[..., 0]
    log_det = np.log(np.diagonal(root, axis1=-2, axis2=-1)).sum(-1)
    return -0.5 * (z**2).sum(-1) - log_det - len(y) / 2 * np.log(2 * np.pi)


def maximum(log_likelihood: Callable[[Array], float], start: Sequence[float]) -> float:
    """The greatest value of a smooth function, from several starts around one."""
    rng = np.random.default_rng(0)
    best = -np.inf
    for k in range(4):
        u = np.asarray(start, dtype=float) + 0.3 * k * rng.normal(size=len(start))
        for method in ("Nelder-Mead", "BFGS"):
            u = minimize(lambda v: -log_likelihood(v), u, method=method, options={"maxiter": 4000}).x
        best = max(best, log_likelihood(u))
    return float(best)
