"""Warped bridge sampling: the integral of a density from draws of it (Meng & Wong 1996; Meng & Schilling 2002).

Draws u of the density p / Z, Z unknown, are split into the halves of each chain. Mean m and root R of the covariance
are those of one half; the other half, and fresh draws of a Student-t q around m with root R, are scored. p is made
symmetric around m, as q is, which leaves its integral as it was:

    w(u) = 1/2 [p(u) + p(2 m - u)],    l = log w(u) - log q(u),    c = log Z + log(s2 / s1)

    Z = [1/n2 sum over draws of q: w / (s1 w + s2 Z q)] / [1/n1 sum over draws of p: q / (s1 w + s2 Z q)], which is
    s1 mean over p of sigma(c - l) = s2 mean over q of sigma(l - c),    sigma(x) = 1 / (1 + exp(-x))

with s1 : s2 the effective draws of p to those of q. Both terms are bounded, so that the error has a variance wherever
the two densities overlap; it is that of the two means (Fruehwirth-Schnatter 2004), the draws of p counted as their
autocorrelation allows. Then the halves change places, and the two numbers are averaged.

q is a Student-t, and no normal: what chains of a few effective draws have not yet seen of a tail is then told by the
draws of q. With an autocorrelation of 0.9 and a skewed posterior, the error fell by a fifth, and the standard deviation
of what is off in stated errors from 1.27 to 0.99.

Where p has symmetries over which the draws are not spread (`bayes_mpt.evidence.images`), q is fitted to the draws
moved to one image, and its mean over the group takes its place; p stands as it is, w = p. Since w / q is the same at
all images then, draws of p and q count wherever they are.
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
from bayes_mpt.evidence.images import Images, Located, located
from bayes_mpt.predictors.nodes.rules import degrees_of

__all__ = ["Bridge", "Warp", "bridge", "effective_draws"]

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
    by_proposal: float
    """Nats: log of the mean of w / q over the draws of q alone, which draws of p have no part in."""
    se_by_proposal: float
    """Its standard error, if the tail has a variance."""


def bridge(
    log_p: Callable[[Array], Array],
    draws: Array,
    at_draws: Array,
    rng: np.random.Generator,
    images: Images | None = None,
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
        Of the draws of q.
    images : Images, optional
        Changes that keep p, and over which q is spread.

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
    halves = draws[:, :half], draws[:, half:]
    warps = [
        Warp.of(u.reshape(-1, u.shape[-1]), at.ravel(), images)
        for u, at in zip(halves, (at_draws[:, :half], at_draws[:, half:]), strict=True)
    ]
    found = [
        _scored(log_p, warps[0], warps[1], halves[1], at_draws[:, half:], rng),
        _scored(log_p, warps[1], warps[0], halves[0], at_draws[:, :half], rng),
    ]
    by_half, by_q, shared = (np.array([getattr(f, name) for f in found]) for name in _Scored._fields[:3])
    terms = [f.terms for f in found]
    whole = np.concatenate(terms[::-1], 1)  # (C, S) in time, each half around 1
    n_eff = float(effective_draws(whole))
    fresh = np.concatenate([f.of_q for f in found])
    by_proposal = float(logsumexp(fresh)) - math.log(len(fresh))
    return Bridge(
        float(by_half.mean()),
        math.sqrt(whole.var() / n_eff + by_q.sum() / 4 + shared.mean() / 2),
        by_half,
        np.sqrt([t.var() / float(effective_draws(t)) for t in terms] + by_q),
        n_eff,
        float(np.mean([f.overlap for f in found])),
        float(max(f.pareto_k for f in found)),
        by_proposal,
        float(np.exp(fresh - by_proposal).std() / math.sqrt(len(fresh))),
    )


def effective_draws(values: Array) -> Array:
    """How many independent draws tell the mean of these (C, S, ...) as well: (...), no more than there are."""
    n = values.shape[0] * values.shape[1]
    found = effective_sample_size(torch.as_tensor(values)).numpy()
    return np.where(found > 0, np.clip(found, 1, n), n)  # of alternating draws more would be claimed


class Warp(NamedTuple):
    """Where q is laid over the density."""

    here: Located
    images: Images | None

    @classmethod
    def of(cls, u: Array, at: Array, images: Images | None) -> Warp:
        """Of draws (M, d), where log p is (M,)."""
        return cls(located(u if images is None else images.gathered(u, int(at.argmax()))[0]), images)

    def draws(self, n: int, rng: np.random.Generator) -> Array:
        """Of q, around one image: (n, d)."""
        d = len(self.here.mean)
        wide = np.sqrt(degrees_of(d) / rng.chisquare(degrees_of(d), size=(n, 1)))
        return self.here.mean + (rng.normal(size=(n, d)) * wide) @ self.here.root.T

    def log_q(self, u: Array) -> Array:
        """Log density of points (M, d)."""
        return self.here.log_q(u) if self.images is None else self.images.mean_density(self.here.log_q, u)

    def symmetric(self, log_p: Callable[[Array], Array], at: Array, here: Array) -> Array:
        """Log w at points (M, d) where log p is ``here`` (M,)."""
        if self.images is not None:
            return here
        return np.logaddexp(here, log_p(2 * self.here.mean - at)) - math.log(2)

    def counted(self, u: Array) -> tuple[Array, ...]:
        """The points, and those at which w counts them too."""
        return (u,) if self.images is not None else (u, 2 * self.here.mean - u)


class _Scored(NamedTuple):
    log_z: float
    by_q: float
    """Its variance from the draws of q."""
    shared: float
    """What the other half's number has in common, as its draws made this warp, and these draws made its."""
    terms: Array
    """(C, S) of the denominator, in units of their mean."""
    overlap: float
    pareto_k: float
    of_q: Array
    """log w / q (M,) at the draws of q."""


def _scored(
    log_p: Callable[[Array], Array],
    warp: Warp,
    other: Warp,
    draws: Array,
    at_draws: Array,
    rng: np.random.Generator,
) -> _Scored:
    """From draws (C, S, d) that the warp has not seen; ``other`` is made of them."""
    n_chains, n, d = draws.shape
    u = draws.reshape(-1, d)
    v = warp.draws(len(u), rng)

    def log_ratio(at: Array, here: Array) -> Array:
        """L at points (M, d) where log p is known."""
        return warp.symmetric(log_p, at, here) - warp.log_q(at)

    of_p, of_q = log_ratio(u, at_draws.ravel()), log_ratio(v, log_p(v))

    n1, n2 = float(effective_draws(of_p.reshape(n_chains, n))), len(of_q)

    def excess(c: float) -> float:
        return float(n1 * expit(c - of_p).mean() - n2 * expit(of_q - c).mean())

    finite = np.concatenate([of_p, of_q[np.isfinite(of_q)]])
    c = float(brentq(excess, finite.min() - 100, finite.max() + 100, xtol=1e-10))
    log_z = c + math.log(n1 / n2)
    by_p, by_q = expit(c - of_p), expit(of_q - c)
    terms = (by_p / by_p.mean()).reshape(n_chains, n)
    # What a warp errs by acts on the other half's draws as their warp's error acts on these: the same product, twice.
    # The two warps differ by twice the variance of either; what is odd around the mean is gone by a reflection.
    gap = np.mean([other.log_q(at) - warp.log_q(at) for at in warp.counted(u)], 0)
    common = terms * ((1 - by_p) * gap).reshape(n_chains, n)
    shared = min(0.5 * common.var() / effective_draws(common), terms.var() / effective_draws(terms))
    overlap = np.exp(np.minimum(log_z - of_p, 0)).mean() + np.exp(np.minimum(of_q - log_z, 0)).mean()
    k = float(pareto_k((of_q - logsumexp(of_q))[:, None])[0])
    return _Scored(
        log_z, float(by_q.var() / (by_q.mean() ** 2 * n2)), float(shared), terms, float(overlap / 2), k, of_q
    )
