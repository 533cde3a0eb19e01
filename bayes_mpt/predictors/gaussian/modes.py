"""The highest of the maxima that the profile likelihood of Gaussian factors may have.

Where K latents are fewer than there are, or noises go to zero, the profile (`newton`) has several maxima, which differ
in which directions of the tokens have a latent; they may lie hundreds of nats apart, and one climb ends in a wrong one
in one of nine tables. So the posterior under a prior that keeps noises from zero is climbed first, whose maxima are
fewer, and of which the likelihood's is a few steps away:

1. two climbs, from starts that have little in common, the second given up where it comes to the end of the first or
   below it. One is enough where every column has noise and no direction is left that another latent would take;
2. where these end apart, or a noise is all but zero and the spectrum has no clear gap at K, or K is all but the number
   that a covariance determines, an exchange: from the maximum of one latent more one is left out, or to the maximum of
   one latent less the next direction is added, as in the selection of variables; not where a latent that is left out
   costs clearly more than a further one would gain.

The prior is that of the evidences (`bayes_mpt.evidence.laplace`), so that what a fit has found is where these begin.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dpotrf, dpotri

from bayes_mpt.predictors.gaussian.factors import LOG_2PI, Factors, Prior
from bayes_mpt.predictors.gaussian.newton import Climb, Profile

__all__ = ["CLEAR", "FAINT", "PASSED", "ROUGH", "highest", "rest_of"]

Array = NDArray[np.float64]

FAINT = 0.1  # of a column's variance: a noise below it may belong to a lower maximum
LEAST = 1e-3  # of a column's variance: noise to start from
LEFT_OUT = 2.0  # lambda_K+1 below which no latent is missing
CLEAR = 10.0  # (lambda_K - 1) / (lambda_K+1 - 1) from which on the spectrum has a gap at K
FEW = 1.5  # (T - K)^2 / (T + K), below 1 where K is more than a covariance determines
ZERO = 5e-3  # of a column's variance: noises that are zero leave a gap that says nothing
SOFT_SHAPE = 2.0  # psi_i ~ Gamma(2, 2 / variance)
N_MORE, N_LESS = 2, 1  # latents left out, of those that lose least
# A latent that is left out costs, before the others move, at most so much of what one more than K gains:
REGAINED = 0.7  # where a climb from there is to regain more
REPLACED = 1.25  # where the next direction is to take its place
SLACK = 20.0  # nats that it may cost besides, or T: the others regain about one for each number of it
ROUGH = 1e-5  # tolerance of a climb on the way
PASSED = 1e-4  # the same, where only the next start is wanted
GAIN = 1e-9  # relative, by which a maximum is higher


def highest(
    corr: Array,
    n_latents: int,
    prior: Prior | None,
    n_rows: int,
    max_iter: int,
    tol: float,
    found: dict[tuple[int, int], Any],
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
    n_rows : int
        N, against whose likelihood the prior stands under which the first climbs go.
    max_iter, tol
        Of each climb, as in `bayes_mpt.predictors.gaussian.newton.Climb`.
    found : dict
        By K and N, maxima of the posterior of these rows that were found before (`Profile`): they are where the first
        climbs would end, and save them. What is found is put there.

    Examples
    --------
    One latent in the first three columns, another in the last two, which are all but the same:

    >>> corr = np.eye(5)
    >>> corr[:3, :3] += 0.6 * (1 - np.eye(3))
    >>> corr[3, 4] = corr[4, 3] = 0.99
    >>> found = highest(corr, 1, None, 1000, 100, 1e-10, {})
    >>> np.abs(found.loading[:, 0]).argmax() > 2
    np.True_
    """
    soft = Prior(SOFT_SHAPE, np.full(len(corr), SOFT_SHAPE), n_rows)
    if prior is None or _is(prior, soft):
        way, key = Climb(corr, soft, max_iter, ROUGH), (n_latents, n_rows)
        start = found[key] if key in found else _softened(way, n_latents)
        found[key] = start
        prior = None if prior is None else soft
    else:
        way = Climb(corr, prior, max_iter, ROUGH)
        start = _softened(way, n_latents)
    last = Climb(corr, prior, max_iter, tol)
    return last.top(start).factors(way.n_iter + last.n_iter)


def _is(prior: Prior, soft: Prior) -> bool:
    """Whether two priors are the same but for rounding."""
    same = prior.shape == soft.shape and prior.n_rows == soft.n_rows
    return same and bool(np.allclose(prior.rate, soft.rate, rtol=1e-12, atol=0.0))


def _softened(way: Climb, n_latents: int) -> Profile:
    """The highest maximum that is found of the posterior."""
    start = way.at(n_latents, _by_regression(way.corr))
    # far from a maximum, where nothing is convex, a step of EM goes furthest, and never down
    moved = way.at(n_latents, start.left())
    first = second = way.top(min(start, moved, key=lambda p: p.loss))
    if not (_is_plain(first) and (first.value[n_latents:] < LEFT_OUT).all()):
        second = way.top(way.at(n_latents, _by_components(way.corr, n_latents)), first)
    top = min(first, second, key=lambda p: p.loss)
    if second is not first or not (_is_plain(top) or _is_clear(top)) or _is_few(top):
        return _exchanged(way, top)
    return top


def _is_plain(top: Profile) -> bool:
    """Whether every column has a noise worth the name."""
    return bool(top.log_noise.min() > math.log(FAINT))


def _is_clear(top: Profile) -> bool:
    """Whether the spectrum itself says that just K directions have a latent."""
    k = top.n_latents
    if not 0 < k < len(top.value) or top.log_noise.min() < math.log(ZERO):
        return False
    return bool(top.value[k - 1] - 1 > CLEAR * max(top.value[k] - 1, 0.0))


def _is_few(top: Profile) -> bool:
    """Whether K latents are all but as many as a covariance of so few tokens determines (Ledermann 1937), or more."""
    t, k = len(top.value), top.n_latents
    return (t - k) ** 2 <= FEW * (t + k)


def _exchanged(way: Climb, top: Profile) -> Profile:
    """A higher maximum that is reached by one latent more and one less, or the other way round; else this one."""
    k = top.n_latents
    if k + 1 >= len(way.corr):
        return _less_and_more(way, top, math.inf)
    more = _passed(way, k + 1, rest_of(top.communality(k + 1).sum(1)))
    higher = _more_and_less(way, top, more)
    return _less_and_more(way, top, top.loss - more.loss) if higher is top else higher


def _more_and_less(way: Climb, top: Profile, more: Profile) -> Profile:
    """``more``: the maximum of one latent more."""
    starts, costs = _without_one(way, more, top)
    for start, cost in zip(starts[:N_MORE], costs, strict=False):
        if cost > REGAINED * (top.loss - more.loss) + _slack(way):
            break
        found = way.top(way.at(top.n_latents, start), top)
        if _higher(found, top):
            return found
    return top


def _less_and_more(way: Climb, top: Profile, gain: float) -> Profile:
    """``gain``: of one latent more, about as much as the next direction brings in place of the one left out."""
    k = top.n_latents
    if k < 2 or k >= len(way.corr):
        return top
    starts, costs = _without_one(way, top, top)
    for start, cost in zip(starts[:N_LESS], costs, strict=False):
        if cost > REPLACED * gain + _slack(way):
            break
        less = _passed(way, k - 1, start)
        found = way.top(way.at(k, rest_of(less.communality(k).sum(1))), top)
        top = found if _higher(found, top) else top
    return top


def _slack(way: Climb) -> float:
    """Of a row."""
    assert way.prior is not None
    return max(SLACK, len(way.corr)) / way.prior.n_rows


def _passed(way: Climb, n_latents: int, log_noise: Array) -> Profile:
    """A maximum on the way, of which another start is made."""
    climb = Climb(way.corr, way.prior, way.max_iter, PASSED)
    top = climb.top(climb.at(n_latents, log_noise))
    way.n_iter += climb.n_iter
    return top


def _without_one(way: Climb, whole: Profile, than: Profile) -> tuple[Array, Array]:
    """log psi (n, T) where one of n latents is left out, whose share goes to the noise, and what it costs (n,).

    That is how much more is lost there than at the maximum ``than``, a row; those that cost least come first.

    With D the noise and W the latents that are left, A = D^-1 W and M = I + W' A, the loss is

        1/2 [T log 2 pi + log det D + log det M + sum_i 1 / D_i - tr(M^-1 A' S A)]
    """
    n = whole.n_latents
    share = whole.communality(n)  # (T, n), the squares of the loadings
    loading = np.sqrt(share) * np.sign(whole.vectors[:, :n])
    noise = np.exp(whole.log_noise) + share.T  # (n, T)
    each = np.arange(n)
    kept = np.repeat(loading[None], n, 0)
    kept[each, :, each] = 0.0
    a = kept / noise[:, :, None]
    inner = np.eye(n) + kept.transpose(0, 2, 1) @ a
    seen = a.transpose(0, 2, 1) @ (way.corr @ a)
    pulled = np.trace(np.linalg.solve(inner, seen), axis1=1, axis2=2)
    loss = np.log(noise).sum(1) + np.linalg.slogdet(inner)[1] + (1 / noise).sum(1) - pulled
    loss = (len(way.corr) * LOG_2PI + loss) / 2
    if way.prior is not None:
        loss -= (way.prior.shape * np.log(noise) - way.prior.rate * noise).sum(1) / way.prior.n_rows
    order = np.argsort(loss)
    return rest_of(share.sum(1)[:, None] - share).T[order], loss[order] - than.loss


def _higher(new: Profile, old: Profile) -> bool:
    return new.loss < old.loss - GAIN * (1 + abs(old.loss))


def rest_of(communality: Array) -> Array:
    """log psi of what latents leave of a unit variance."""
    return np.log(np.clip(1 - communality, LEAST, 1.0))


def _by_components(corr: Array, n_latents: int) -> Array:
    """What the latents leave that are best where all tokens have the same noise (PPCA)."""
    value, vectors = np.linalg.eigh(corr)
    value, vectors = value[::-1], vectors[:, ::-1]
    c = value[n_latents:].mean() if n_latents < len(value) else 0.0
    return rest_of(vectors[:, :n_latents] ** 2 @ np.maximum(value[:n_latents] - c, 0.0))


def _by_regression(corr: Array) -> Array:
    """What a regression on the other tokens leaves, 1 / diag(R^-1); a half where R is all but singular."""
    factor, failed = dpotrf(corr, lower=1)
    if failed or factor.diagonal().min() ** 2 < LEAST:
        return np.full(len(corr), math.log(0.5))
    return np.log(np.clip(1 / dpotri(factor, lower=1)[0].diagonal(), LEAST, 1.0))
