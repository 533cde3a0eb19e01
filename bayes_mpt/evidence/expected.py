"""How well the fit that is used will predict new rows, on average over what the table leaves open.

The evidence says how probable a candidate is; what is used afterwards is one fit of it, and a fit pays for surplus
columns that an integral hardly notices. So factor models are ranked by the expected log-density of N new complete rows
under their fits N(m_K, C_K), where the law of the rows, N(mu, C), is averaged over the posteriors of all candidates j:

    U_K = -N/2 sum_j w_j E_j[ T log 2 pi + log |C_K| + tr C_K^-1 C + (mu - m_K)' C_K^-1 (mu - m_K) ]

Its level is uncertain by tens of nats; differences between candidates are not. All of it believes that rows are
Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular
from scipy.special import logsumexp, softmax

from bayes_mpt.diagnostics import replicate_error
from bayes_mpt.evidence.draws import FactorDraws

__all__ = ["Believed", "Expected", "expected_score", "weights"]

Array = NDArray[np.float64]

MAX_CELLS = 2**22  # of covariances at a time


@dataclass(frozen=True, eq=False)
class Believed:
    """A candidate: the fit that is used, and the posterior that its evidence was computed with."""

    kind: str
    """Candidates of one kind differ in the number of latents alone."""
    islands: Array
    """(G,) log evidence by island."""
    draws: FactorDraws
    fit_mean: Array
    """(T,) m"""
    fit_covariance: Array
    """(T, T) C"""
    determined: bool = True
    """Whether all pairs of columns were observed together: the fit says nothing of complete rows otherwise."""


class Expected(NamedTuple):
    """Of each candidate (J,), nats of N new rows together."""

    score: Array
    """U."""
    se: Array
    """Monte Carlo error of its difference to the first; 0 there."""
    p_better: Array
    """Posterior probability that the fit predicts better than that of the first; NaN there."""


def weights(log_evidence: Array, kinds: list[str]) -> Array:
    """Posterior probabilities (..., J): equal prior odds for the kinds, and within a kind for the candidates.

    Examples
    --------
    >>> weights(np.log([0.2, 0.6, 0.2]), ["one", "one", "other"]).round(3).tolist()
    [0.167, 0.5, 0.333]
    >>> weights(np.zeros(3), ["one", "one", "other"]).round(3).tolist()
    [0.25, 0.25, 0.5]
    """
    n_of_kind = np.array([kinds.count(kind) for kind in kinds])
    return np.asarray(softmax(log_evidence - np.log(n_of_kind), axis=-1))


def expected_score(found: list[Believed], n_rows: int, first: int | None = None) -> Expected:
    """Expected log-density of N new complete rows under each candidate's fit.

    Parameters
    ----------
    found : list of Believed
        All candidates of a table, of as many islands.
    n_rows : int
        N.
    first : int, optional
        The place of the candidate that the others are compared with; by default that of the greatest.
    """
    fits = _Fits.of(found)
    kinds = [c.kind for c in found]
    islands = np.array([c.islands for c in found])  # (J, G)
    weight = weights(np.array([_log_mean_exp(i) for i in islands]), kinds)
    # (K, J, G): -2 log-density of a row under the fit of K, its law that of candidate j, by island
    loss = np.stack([fits.loss(*_moments(c.draws)) for c in found], 1)
    score = -0.5 * n_rows * np.einsum("kjg,jg,j->k", loss, softmax(islands, axis=1), weight)
    best = int(np.argmax(score)) if first is None else first
    # each island as a search of its own, with weights of its own
    own = weights(islands.T, kinds)  # (G, J)
    replicates = -0.5 * n_rows * np.einsum("kjg,gj->kg", loss - loss[best], own)
    se = np.array([replicate_error(r) for r in replicates])
    better = np.zeros(len(found))
    for c, w in zip(found, weight, strict=True):
        by_draw = np.concatenate([fits.loss(*part) for part in _laws(c.draws)], 1)  # (K, S)
        better += w * (by_draw < by_draw[best]).mean(1)
    better[best] = math.nan
    return Expected(score, se, better)


class _Fits(NamedTuple):
    """Of all candidates."""

    mean: Array
    """(K, T)"""
    precision: Array
    """(K, T, T)"""
    constant: Array
    """(K,) T log 2 pi + log |C_K|"""

    @classmethod
    def of(cls, found: list[Believed]) -> _Fits:
        precision, constant = [], []
        for c in found:
            root = cholesky(c.fit_covariance, lower=True)
            inverse = solve_triangular(root, np.eye(len(root)), lower=True)
            precision.append(inverse.T @ inverse)
            constant.append(len(root) * math.log(2 * math.pi) + 2 * np.log(np.diag(root)).sum())
        return cls(np.array([c.fit_mean for c in found]), np.array(precision), np.array(constant))

    def loss(self, mean: Array, cov: Array) -> Array:
        """T log 2 pi + log |C_K| + tr C_K^-1 (cov + (mean - m_K)(mean - m_K)') (K, B) of B laws of a row."""
        n_fits, n_tokens = self.mean.shape
        trace = self.precision.reshape(n_fits, -1) @ cov.reshape(-1, n_tokens**2).T
        off = mean - self.mean[:, None]  # (K, B, T)
        return np.asarray(self.constant[:, None] + trace + (off @ self.precision * off).sum(2))


def _moments(draws: FactorDraws) -> tuple[Array, Array]:
    """E[mu] (G, T) and E[C] + Cov[mu] (G, T, T) by island."""
    return draws.island_means, draws.island_covariances + draws.island_mean_covariances


def _laws(draws: FactorDraws) -> Iterator[tuple[Array, Array]]:
    """Means (B, T) and covariances (B, T, T) of all draws, some at a time."""
    n_draws, n_tokens, _ = draws.loadings.shape
    size = max(1, MAX_CELLS // n_tokens**2)
    root, diagonal = np.sqrt(draws.spread), np.arange(n_tokens)
    for i in range(0, n_draws, size):
        w = draws.loadings[i : i + size]
        cov = w @ w.transpose(0, 2, 1)
        cov[:, diagonal, diagonal] += draws.noise[i : i + size]
        yield draws.means[i : i + size], cov * (1 + np.outer(root, root))


def _log_mean_exp(x: Array) -> float:
    return float(logsumexp(x)) - math.log(len(x))
