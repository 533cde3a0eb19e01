"""Weights of candidates that predict hidden rows best together: stacking.

    w = argmax over the simplex of  mean_i log sum_j w_j p_j(x_i),    p_j(x_i) by a fit that has not seen row i

(Yao, Vehtari, Simpson & Gelman 2018). Candidates that say the same share a weight, and one that is worse everywhere
gets none. The maximum flatters itself, so that what it reaches is reported on rows that its weights have not seen.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp

__all__ = ["CrossFitted", "cross_fitted", "log_mixture", "stacked_weights"]

Array = NDArray[np.float64]

TOL = 1e-10  # nats a row
MAX_EM = 10_000


class CrossFitted(NamedTuple):
    """Scores of hidden rows (N,), nats, by weights that have seen other folds only, averaged over repeats."""

    mixture: Array
    chosen: Array
    """Of the one candidate that is best on those other folds."""


def stacked_weights(log_prob: Array) -> Array:
    """The weights (J,) on the simplex by which the mixture scores hidden rows best, from log scores (N, J).

    The problem is concave, so there is one maximum.

    Examples
    --------
    >>> log_prob = np.log([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.9, 0.1]])
    >>> stacked_weights(log_prob).round(4).tolist()  # (w - 1/10) / (8/10) is 3 of 4 rows less what both say
    [0.8125, 0.1875]
    """
    log_prob = log_prob[np.isfinite(log_prob.max(1))]  # a row that no candidate allows says nothing
    n_candidates = log_prob.shape[1]
    if not len(log_prob) or n_candidates == 1:
        return np.full(n_candidates, 1 / n_candidates)
    # p_ij up to a factor of the row, at most one: the greatest of a row is one, so that no sum is zero
    p = np.exp(log_prob - log_prob.max(1, keepdims=True))

    def loss(w: Array) -> tuple[float, Array]:
        mixed = np.maximum(p @ w, np.finfo(float).tiny)
        return -float(np.log(mixed).mean()), -(p / mixed[:, None]).mean(0)

    found = minimize(
        loss,
        np.full(n_candidates, 1 / n_candidates),
        jac=True,
        method="SLSQP",
        bounds=[(0.0, 1.0)] * n_candidates,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        options={"ftol": TOL, "maxiter": 1000},
    )
    w = np.clip(found.x, 0, 1)
    if not np.isfinite(w).all() or not w.sum() > 0:
        w = np.ones(n_candidates)
    return _climbed(p, w / w.sum())


def _climbed(p: Array, w: Array) -> Array:
    """The weights after steps of EM, w_j <- w_j mean_i p_ij / sum_k w_k p_ik, until no more is to be gained.

    By concavity the maximum is above the present by at most max_j mean_i p_ij / sum_k w_k p_ik - 1 nats a row.
    """
    w = np.where(w > 0, w, TOL)
    for _ in range(MAX_EM):
        slope = (p / (p @ w)[:, None]).mean(0)
        if slope.max() - 1 < 1e-8:
            break
        w = w * slope
    w = np.where(w > 1e-7, w, 0.0)
    return np.asarray(w / w.sum())


def log_mixture(log_prob: Array, weights: Array) -> Array:
    """log sum_j w_j p_j (N,), from log p (N, J)."""
    with np.errstate(divide="ignore"):
        return np.asarray(logsumexp(log_prob + np.log(weights), axis=1))


def cross_fitted(log_prob: Array, split: Array) -> CrossFitted:
    """Scores of hidden rows by weights that were fitted to the other folds.

    Parameters
    ----------
    log_prob : array of shape (R, N, J)
        Scores of hidden rows by repeat; NaN of a row that was not hidden.
    split : array of shape (R, N)
        The fold of each row; NaN of one that was not hidden.
    """
    mixture, chosen = (np.full(split.shape, math.nan) for _ in range(2))
    for r, (scores, fold) in enumerate(zip(log_prob, split, strict=True)):
        known = ~np.isnan(scores).any(1) & ~np.isnan(fold)
        for f in np.unique(fold[known]):
            here, others = known & (fold == f), known & (fold != f)
            if others.any():
                mixture[r, here] = log_mixture(scores[here], stacked_weights(scores[others]))
                chosen[r, here] = scores[here, int(np.argmax(scores[others].sum(0)))]
    seen = ~np.isnan(mixture).all(0)
    return CrossFitted(np.nanmean(mixture[:, seen], axis=0), np.nanmean(chosen[:, seen], axis=0))
