"""The highest of the maxima that the profile likelihood of Gaussian factors may have.

Where K latents are fewer than there are, or noises go to zero, the profile (`newton`) has several maxima, which differ
in which directions of the tokens have a latent; they may lie hundreds of nats apart, and one climb ends in a wrong one
in one of nine tables. So

1. two climbs, from starts that have little in common, the second given up where it comes to the end of the first or is
   behind it after some steps. They climb the posterior under a prior that keeps noises from zero, whose maxima are
   fewer, and of which the likelihood's is a few steps away. One is enough where every column has noise and no
   direction is left that another latent would take;
2. where these end apart, or a noise is all but zero and the spectrum has no clear gap at K, an exchange: from the
   maximum of one latent more one is left out, or to the maximum of one latent less the next direction is added, as in
   the selection of variables.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dpotrf, dpotri

from bayes_mpt.predictors.gaussian.factors import Factors, Prior
from bayes_mpt.predictors.gaussian.newton import Profile, newton

__all__ = ["highest"]

Array = NDArray[np.float64]

FAINT = 0.1  # of a column's variance: a noise below it may belong to a lower maximum
LEAST = 1e-3  # of a column's variance: noise to start from
LEAST_NEAR = 0.02  # as above, of the start near a given maximum
LEFT_OUT = 2.0  # lambda_K+1 below which no latent is missing
CLEAR = 10.0  # (lambda_K - 1) / (lambda_K+1 - 1) from which on the spectrum has a gap at K
ZERO = 5e-3  # of a column's variance: noises that are zero leave a gap that says nothing
SOFT_SHAPE, SOFT_ROWS = 2.0, 1000  # psi_i ~ Gamma(2, 2), as if the table had so many rows
N_MORE, N_LESS = 2, 1  # latents left out, of those that lose least
ROUGH = 1e-6  # tolerance of a climb on the way
GAIN = 1e-9  # relative, by which a maximum is higher


def highest(
    corr: Array, n_latents: int, prior: Prior | None, max_iter: int, tol: float, near: Array | None = None
) -> Factors:
    """The highest maximum that is found over the noise variances.

    Parameters
    ----------
    corr : array of shape (T, T)
        Covariance of the rows, of columns of unit variance.
    n_latents : int
        K.
    prior : Prior, optional
        Maximise the posterior of log psi instead.
    max_iter, tol
        Of each climb, as in `bayes_mpt.predictors.gaussian.newton.newton`.
    near : array of shape (T,), optional
        log psi where the likelihood of the same rows is highest: then that of the posterior is sought from there, and
        by more than one climb only where a noise is all but zero.

    Examples
    --------
    One latent in the first three columns, another in the last two, which are all but the same:

    >>> corr = np.eye(5)
    >>> corr[:3, :3] += 0.6 * (1 - np.eye(3))
    >>> corr[3, 4] = corr[4, 3] = 0.99
    >>> found = highest(corr, 1, None, 100, 1e-10)
    >>> np.abs(found.loading[:, 0]).argmax() > 2
    np.True_
    """
    climbs = _Climbs(corr, prior, max_iter, tol)
    if near is None:
        top, doubtful = _of_two(climbs, n_latents)
    else:
        top, doubtful = _of_near(climbs, n_latents, near)
    if doubtful:
        top = _exchanged(climbs, top)
    return top.factors(climbs.n_iter)


class _Climbs:
    """Climbs on one covariance, which count their steps."""

    def __init__(self, corr: Array, prior: Prior | None, max_iter: int, tol: float):
        self.corr, self.prior, self.max_iter, self.tol = corr, prior, max_iter, tol
        self.n_iter = 0

    def to(
        self, n_latents: int, log_noise: Array, known: Profile | None = None, tol: float | None = None
    ) -> Profile:
        tol = self.tol if tol is None else tol
        top, n_iter = newton(self.corr, n_latents, log_noise, self.prior, self.max_iter, tol, known)
        self.n_iter += n_iter
        return top

    def least_first(self, n_latents: int, starts: Array) -> Array:
        """Starts (B, T), log psi, those at which the loss is least first."""
        root = np.exp(-0.5 * starts)
        value = np.linalg.eigvalsh(self.corr * root[:, :, None] * root[:, None, :])[:, ::-1]
        theta = np.maximum(value[:, :n_latents], 1.0)
        loss = starts.sum(1) + (np.log(theta) + value[:, :n_latents] / theta).sum(1)
        loss += value[:, n_latents:].sum(1)
        loss /= 2
        if self.prior is not None:
            share = self.prior.shape * starts - self.prior.rate * np.exp(starts)
            loss -= share.sum(1) / self.prior.n_rows
        return starts[np.argsort(loss)]


def _of_two(climbs: _Climbs, n_latents: int) -> tuple[Profile, bool]:
    """The higher end of two climbs, and whether there may be a higher one."""
    corr, soft = climbs.corr, climbs
    if climbs.prior is None:
        prior = Prior(SOFT_SHAPE, np.full(len(corr), SOFT_SHAPE), SOFT_ROWS)
        soft = _Climbs(corr, prior, climbs.max_iter, ROUGH)
    first = second = soft.to(n_latents, _by_regression(corr))
    if not (_is_plain(first.log_noise) and (first.value[n_latents:] < LEFT_OUT).all()):
        second = soft.to(n_latents, _by_components(corr, n_latents), first)
    top = min(first, second, key=lambda p: p.loss)
    faint = not _is_plain(top.log_noise)
    if soft is not climbs:
        top = climbs.to(n_latents, top.log_noise)
        climbs.n_iter += soft.n_iter
    return top, second is not first or (faint and not _is_clear(top))


def _of_near(climbs: _Climbs, n_latents: int, near: Array) -> tuple[Profile, bool]:
    """The maximum near another one, and whether there may be a higher one."""
    top = climbs.to(n_latents, np.maximum(near, math.log(LEAST_NEAR)))
    if _is_plain(near) and _is_plain(top.log_noise):
        return top, False
    other = climbs.to(n_latents, _by_regression(climbs.corr), top)
    return (other, True) if _higher(other, top) else (top, False)


def _is_plain(log_noise: Array) -> bool:
    """Whether every column has a noise worth the name."""
    return bool(log_noise.min() > math.log(FAINT))


def _is_clear(top: Profile) -> bool:
    """Whether the spectrum itself says that just K directions have a latent."""
    k = top.n_latents
    if not 0 < k < len(top.value) or top.log_noise.min() < math.log(ZERO):
        return False
    return bool(top.value[k - 1] - 1 > CLEAR * max(top.value[k] - 1, 0.0))


def _exchanged(climbs: _Climbs, top: Profile) -> Profile:
    """A higher maximum that is reached by one latent more and one less, or the other way round; else this one."""
    higher = _more_and_less(climbs, top)
    return _less_and_more(climbs, top) if higher is top else higher


def _more_and_less(climbs: _Climbs, top: Profile) -> Profile:
    k = top.n_latents
    if k + 1 >= len(climbs.corr):
        return top
    more = climbs.to(k + 1, _rest(top.communality(k + 1).sum(1)), tol=ROUGH)
    for start in climbs.least_first(k, _without_each(more, k + 1))[:N_MORE]:
        found = climbs.to(k, start, top)
        if _higher(found, top):
            return found
    return top


def _less_and_more(climbs: _Climbs, top: Profile) -> Profile:
    k = top.n_latents
    if k < 2:
        return top
    for start in climbs.least_first(k - 1, _without_each(top, k))[:N_LESS]:
        less = climbs.to(k - 1, start, tol=ROUGH)
        found = climbs.to(k, _rest(less.communality(k).sum(1)), top)
        top = found if _higher(found, top) else top
    return top


def _without_each(top: Profile, n: int) -> Array:
    """log psi (n, T) where one of n latents is left out, whose share goes to the noise."""
    share = top.communality(n)
    return _rest(share.sum(1)[:, None] - share).T


def _higher(new: Profile, old: Profile) -> bool:
    return new.loss < old.loss - GAIN * (1 + abs(old.loss))


def _rest(communality: Array) -> Array:
    """log psi of what latents leave of a unit variance."""
    return np.log(np.clip(1 - communality, LEAST, 1.0))


def _by_components(corr: Array, n_latents: int) -> Array:
    """What the latents leave that are best where all tokens have the same noise (PPCA)."""
    value, vectors = np.linalg.eigh(corr)
    value, vectors = value[::-1], vectors[:, ::-1]
    c = value[n_latents:].mean() if n_latents < len(value) else 0.0
    return _rest(vectors[:, :n_latents] ** 2 @ np.maximum(value[:n_latents] - c, 0.0))


def _by_regression(corr: Array) -> Array:
    """What a regression on the other tokens leaves, 1 / diag(R^-1); a half where R is all but singular."""
    factor, failed = dpotrf(corr, lower=1)
    if failed or factor.diagonal().min() ** 2 < LEAST:
        return np.full(len(corr), math.log(0.5))
    return np.log(np.clip(1 / dpotri(factor, lower=1)[0].diagonal(), LEAST, 1.0))
