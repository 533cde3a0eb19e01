"""Warped bridge sampling: the integral of a density from draws of it (Meng & Wong 1996; Meng & Schilling 2002).

Draws u of the density p / Z, Z unknown, are split into the halves of each chain. Mean m and root R of the covariance
are those of one half; the other half and fresh draws e of a standard normal q are scored. p is warped so that its mean,
covariance and skewness are those of q:

    w(e) = |R| / 2 [p(m + R e) + p(m - R e)],    l = log w(e) - log q(e)

    Z = [1/n2 sum over draws of q w / (s1 w + s2 Z q)] / [1/n1 sum over draws of p q / (s1 w + s2 Z q)]

with s1 : s2 the effective draws of p to those of q. Both terms are bounded, so that the error has a variance wherever
the two densities overlap; it is that of the two means (Fruehwirth-Schnatter 2004), the draws of p counted as their
autocorrelation allows. Then the halves change places, and the two numbers are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.ops.stats import effective_sample_size
from scipy.optimize import brentq
from scipy.special import expit, logsumexp

from bayes_mpt.diagnostics import pareto_k
from bayes_mpt.predictors.nodes.resampling import weighted_root

__all__ = ["Bridge", "bridge", "effective_draws"]

Array = NDArray[np.float64]

LOG_2PI = math.log(2 * math.pi)


class Bridge(NamedTuple):
    """The integral, its error, and how far to trust it."""

    log_z: float
    """Nats: the mean of ``by_half``."""
    se: float
    by_half: Array
    """(2,) nats, of the second half of each chain and of the first."""
    se_by_half: Array
    """(2,)"""
    n_eff: float
    """Effective draws of p, for this number."""
    overlap: float
    """The integral of the lesser of the two densities, w / Z and q."""
    pareto_k: float
    """Tail of w / q at the draws of q."""


def bridge(
    log_p: Callable[[Array], Array], draws: Array, at_draws: Array, rng: np.random.Generator
) -> Bridge:
    """The integral of a density from draws of it.

    Parameters
    ----------
    log_p : callable
        Points (M, d) -> log density (M,), not normalised; -inf where there is none.
    draws : array of shape (C, S, d)
        C chains.
    at_draws : array of shape (C, S)
        log_p at these.
    rng : numpy.random.Generator
        Of the draws of the normal.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> def log_p(u):  # exp(-u^2 / 2)
    ...     return -0.5 * np.square(u).sum(1)
    >>> u = rng.normal(size=(4, 500, 1))
    >>> found = bridge(log_p, u, log_p(u.reshape(-1, 1)).reshape(4, 500), rng)
    >>> bool(abs(found.log_z - 0.5 * LOG_2PI) < 3 * found.se < 0.1)
    True
    """
    half = draws.shape[1] // 2
    first, second = slice(0, half), slice(half, None)
    found = [
        _scored(log_p, draws[:, fit], draws[:, score], at_draws[:, score], rng)
        for fit, score in ((first, second), (second, first))
    ]
    by_half, errors = (np.array([f[i] for f in found]) for i in (0, 1))
    return Bridge(
        float(by_half.mean()),
        float(np.hypot(*errors) / 2),
        by_half,
        errors,
        float(sum(f[2] for f in found)),
        float(np.mean([f[3] for f in found])),
        float(max(f[4] for f in found)),
    )


def effective_draws(values: Array) -> Array:
    """How many independent draws tell the mean of these (C, S, ...) as well: (...), no more than there are."""
    n = values.shape[0] * values.shape[1]
    found = effective_sample_size(torch.as_tensor(values)).numpy()
    return np.where(found > 0, np.clip(found, 1, n), n)  # of alternating draws more would be claimed


def _scored(
    log_p: Callable[[Array], Array], fit: Array, scored: Array, at_scored: Array, rng: np.random.Generator
) -> tuple[float, float, float, float, float]:
    """log Z, its error, effective draws, overlap and tail, warped by the draws ``fit``."""
    n_chains, n, d = scored.shape
    flat = torch.as_tensor(fit.reshape(-1, d))
    root = weighted_root(flat, torch.full((len(flat),), 1 / len(flat), dtype=flat.dtype)).numpy()
    mean, log_det = fit.reshape(-1, d).mean(0), np.log(np.diag(root)).sum()

    def log_ratio(e: Array, at_plus: Array) -> Array:
        """L at e (M, d), where log p(m + R e) is known."""
        log_w = np.logaddexp(at_plus, log_p(mean - e @ root.T)) - math.log(2) + log_det
        return log_w + 0.5 * np.square(e).sum(1) + 0.5 * d * LOG_2PI

    of_p = log_ratio(np.linalg.solve(root, (scored.reshape(-1, d) - mean).T).T, at_scored.ravel())
    e = rng.normal(size=(n_chains * n, d))
    of_q = log_ratio(e, log_p(mean + e @ root.T))

    # With c = log Z + log(s2 / s1), Z's equation is s1 mean sigma(c - l of p) = s2 mean sigma(l of q - c): one root.
    n1 = float(effective_draws(of_p.reshape(n_chains, n)))
    n2 = len(of_q)

    def excess(c: float) -> float:
        return float(n1 * expit(c - of_p).mean() - n2 * expit(of_q - c).mean())

    finite = np.concatenate([of_p, of_q[np.isfinite(of_q)]])
    c = float(brentq(excess, finite.min() - 100, finite.max() + 100, xtol=1e-10))
    log_z = c + math.log(n1 / n2)
    by_p, by_q = expit(c - of_p), expit(of_q - c)
    n_eff = float(effective_draws(by_p.reshape(n_chains, n)))
    variance = by_p.var() / (by_p.mean() ** 2 * n_eff) + by_q.var() / (by_q.mean() ** 2 * n2)
    overlap = np.exp(np.minimum(log_z - of_p, 0)).mean() + np.exp(np.minimum(of_q - log_z, 0)).mean()
    k = float(pareto_k((of_q - logsumexp(of_q))[:, None])[0])
    return log_z, math.sqrt(variance), n_eff, float(overlap / 2), k
