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
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular
from scipy.special import log_softmax, softmax

from bayes_mpt.diagnostics import replicate_error
from bayes_mpt.evidence.draws import FactorDraws

__all__ = ["Believed", "Expected", "expected_score", "weights"]

Array = NDArray[np.float64]


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


class Expected(NamedTuple):
    """Of each candidate (J,), nats of N new rows together."""

    score: Array
    """U."""
    se: Array
    """Monte Carlo error of its difference to the greatest; 0 there."""
    p_better: Array
    """Posterior probability that the fit predicts better than that of the greatest; NaN there."""


def weights(log_evidence: Array, kinds: list[str]) -> Array:
    """Posterior probabilities (..., J): equal prior odds for the kinds, and within a kind for the candidates.

    Examples
    --------
    >>> weights(np.log([0.2, 0.6, 0.2]), ["one", "one", "other"]).round(3).tolist()
    [0.2, 0.6, 0.2]
    >>> weights(np.zeros(3), ["one", "one", "other"]).round(3).tolist()
    [0.25, 0.25, 0.5]
    """
    n_of_kind = np.array([kinds.count(kind) for kind in kinds])
    return np.asarray(softmax(log_evidence - np.log(n_of_kind), axis=-1))


def expected_score(found: list[Believed], n_rows: int) -> Expected:
    """Expected log-density of N new complete rows under each candidate's fit.

    Parameters
    ----------
    found : list of Believed
        All candidates of a table, of as many islands.
    n_rows : int
        N.
    """
    kinds = [c.kind for c in found]
    islands = np.array([c.islands for c in found])  # (J, G)
    inside = softmax(islands, axis=1)
    weight = weights(np.array([_log_mean_exp(i) for i in islands]), kinds)
    inverses = [_inverse_root(c.fit_covariance) for c in found]
    # (K, J, G): -2 log-density of a row under the fit of K, its law that of candidate j, by island
    loss = np.array([[_loss(c, r, other) for other in found] for c, r in zip(found, inverses, strict=True)])
    score = -0.5 * n_rows * np.einsum("kjg,jg,j->k", loss, inside, weight)
    best = int(np.argmax(score))
    # each island as a search of its own, with weights of its own
    own = weights(islands.T, kinds)  # (G, J)
    replicates = -0.5 * n_rows * np.einsum("kjg,gj->kg", loss - loss[best], own)
    se = np.array([replicate_error(r) for r in replicates])
    by_draw = [
        np.array([_loss_by_draw(c, r, other.draws) for c, r in zip(found, inverses, strict=True)])
        for other in found
    ]  # of (K, S)
    better = np.array([(d < d[best]).mean(1) for d in by_draw])  # (J, K)
    p_better = weight @ better
    p_better[best] = math.nan
    return Expected(score, se, p_better)


def _log_mean_exp(x: Array) -> float:
    return float(x[0] - log_softmax(x)[0] - math.log(len(x)))


def _inverse_root(cov: Array) -> Array:
    """L^-1 (T, T) of cov = L L'."""
    root = cholesky(cov, lower=True)
    return np.asarray(solve_triangular(root, np.eye(len(root)), lower=True))


def _constant(inverse: Array) -> float:
    return len(inverse) * math.log(2 * math.pi) - 2 * float(np.log(np.diag(inverse)).sum())


def _loss(fit: Believed, inverse: Array, other: Believed) -> Array:
    """T log 2 pi + log |C_K| + tr C_K^-1 (E[C] + Cov[mu] + (E[mu] - m_K)(E[mu] - m_K)') (G,)."""
    off = other.draws.island_means - fit.fit_mean
    moment = other.draws.island_covariances + other.draws.island_mean_covariances
    trace = np.einsum("gij,ij->g", moment, inverse.T @ inverse)
    return np.asarray(_constant(inverse) + trace + np.square(off @ inverse.T).sum(1))


def _loss_by_draw(fit: Believed, inverse: Array, draws: FactorDraws) -> Array:
    """The same (S,) of each draw."""
    n_draws, n_tokens, k = draws.loadings.shape
    root = np.sqrt(draws.spread)
    white = [inverse, inverse * root]  # of C, and of s^1/2 C s^1/2
    trace = np.zeros(n_draws)
    for a in white:
        w = a @ draws.loadings.transpose(1, 0, 2).reshape(n_tokens, -1)  # (T, S K)
        trace += np.square(w).reshape(n_tokens, n_draws, k).sum((0, 2)) + draws.noise @ np.square(a).sum(0)
    return np.asarray(_constant(inverse) + trace + np.square((draws.means - fit.fit_mean) @ inverse.T).sum(1))
