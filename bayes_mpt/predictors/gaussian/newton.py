"""Newton's method on the profile likelihood of Gaussian factors, a noise variance for each token.

With the loadings at their best for psi (`profile`), LML / N is a function of log psi alone, whose slope and curvature
follow from one eigendecomposition of psi^-1/2 S psi^-1/2.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dpotrf, dpotrs

from bayes_mpt.predictors.gaussian.factors import BOUNDS, LOG_2PI, Factors, Prior

__all__ = ["Profile", "newton"]

Array = NDArray[np.float64]

LONGEST_STEP = 3.0
NEAR_FLOOR = 3.0  # of log psi
ROUNDING = float(np.finfo(np.float64).eps)
SAME = 0.2  # of log psi, where psi is above LEAST_TOLD: two climbs that are as near end at one maximum
LEAST_TOLD = 1e-3
LAST = 1e-2  # times the root of the tolerance, relative: a step that gains less is the last, if it keeps its promise
GIVE_UP = 12  # steps after which a climb that is still below a known maximum ends


class Profile:
    """LML a row at the best loadings as a function of log psi, with its derivatives.

    Parameters
    ----------
    corr : array of shape (T, T)
        S, of columns of unit variance.
    n_latents : int
        K.
    log_noise : array of shape (T,)
        log psi.
    prior : Prior, optional
        Of psi, of which a row has its share in the loss.

    Examples
    --------
    >>> corr = np.array([[1.0, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 1.0]])
    >>> np.abs(Profile(corr, 1, np.log([0.5, 0.5, 0.5])).slope()).max() < 1e-12
    np.True_
    """

    def __init__(self, corr: Array, n_latents: int, log_noise: Array, prior: Prior | None = None):
        root = np.exp(-0.5 * log_noise)
        value, vectors = np.linalg.eigh(corr * root * root[:, None])  # the smallest first
        self.log_noise, self.prior, self.n_latents = log_noise, prior, n_latents
        self.value, self.vectors = value[::-1], vectors[:, ::-1]  # lambda (T,), the largest first, u (T, T)
        # theta_k = lambda_k for the latents that are used, 1 for all other directions
        n_used = int((self.value[:n_latents] > 1).sum())
        n_rest = len(corr) - n_used
        self.rest, self.used = value[:n_rest], value[n_rest:]  # lambda_m, lambda_k
        self.v, self.u = vectors[:, :n_rest], vectors[:, n_rest:]
        self.lml = -0.5 * (
            len(corr) * LOG_2PI + log_noise.sum() + np.log(self.used).sum() + n_used + self.rest.sum()
        )
        self.loss = -self.lml
        """Minus the LML a row, less a row's share of the log prior."""
        if prior is not None:
            # log p(log psi) = a log psi - b psi + const
            share = prior.shape * log_noise - prior.rate * np.exp(log_noise)
            self.loss -= float(share.sum()) / prior.n_rows

    def slope(self) -> Array:
        """(T,) d LML / d log psi_i = -1/2 sum_m (1 - lambda_m) v_im^2, m over the unused directions."""
        return -0.5 * self.v**2 @ (1 - self.rest)

    def curvature(self) -> Array:
        """Minus the Hessian (T, T) in log psi (Jennrich & Robinson 1969), k over the used directions.

        1/2 (sum_m lambda_m v_im v_jm) (sum_m v_im v_jm)
            + 1/2 sum_{k, m} (lambda_k + lambda_m)(1 - lambda_m) / (lambda_k - lambda_m) u_ik u_jk v_im v_jm
        """
        used, rest, u, v = self.used, self.rest, self.u, self.v
        hessian = 0.5 * ((v * rest) @ v.T) * (v @ v.T)
        if len(used):
            gap = np.maximum(used[:, None] - rest, 1e-12)
            weight = 0.5 * (used[:, None] + rest) * (1 - rest) / gap  # (K, T - K)
            pairs = (u[:, :, None] * v[:, None, :]).reshape(len(u), -1)
            hessian += (pairs * weight.ravel()) @ pairs.T
        return hessian

    def communality(self, n: int) -> Array:
        """(T, n) what each of the n leading directions takes of the variance of each token."""
        psi = np.exp(self.log_noise)[:, None]
        return psi * self.vectors[:, :n] ** 2 * np.maximum(self.value[:n] - 1, 0.0)

    def factors(self, n_iter: int) -> Factors:
        """The maximum, if this is one."""
        k = self.n_latents
        theta = np.maximum(self.value[:k], 1.0)
        return Factors(float(self.lml), np.exp(self.log_noise), theta, self.vectors[:, :k], n_iter)


def newton(
    corr: Array,
    n_latents: int,
    log_noise: Array,
    prior: Prior | None,
    max_iter: int,
    tol: float,
    known: Profile | None = None,
) -> tuple[Profile, int]:
    """Maximise the profile within bounds by Newton steps, damped as by Levenberg and Marquardt.

    Steps are taken in psi^1/2, where a maximum at zero variance (Heywood) is one step away and not infinitely far;
    with a prior, which keeps away from zero, in log psi.

    Parameters
    ----------
    corr : array of shape (T, T)
        S, of columns of unit variance.
    n_latents : int
        K.
    log_noise : array of shape (T,)
        log psi to start from.
    prior : Prior, optional
        Maximise the posterior of log psi instead.
    max_iter : int
    tol : float
        Relative change of the objective at which it stops.
    known : Profile, optional
        A maximum: a climb that comes close to it ends there.

    Examples
    --------
    >>> corr = np.full((4, 4), 0.5) + 0.5 * np.eye(4)
    >>> top, _ = newton(corr, 1, np.zeros(4), None, 100, 1e-12)
    >>> np.exp(top.log_noise).round(6)
    array([0.5, 0.5, 0.5, 0.5])
    """
    top, n_iter = _climb(corr, n_latents, log_noise, prior, max_iter, tol, known)
    if prior is None and top is not known:
        top = _at_bounds(corr, top, tol)
    return top, n_iter


def _climb(
    corr: Array,
    n_latents: int,
    log_noise: Array,
    prior: Prior | None,
    max_iter: int,
    tol: float,
    known: Profile | None,
) -> tuple[Profile, int]:
    (low, high), damping = BOUNDS, 1e-2
    here = Profile(corr, n_latents, log_noise, prior)
    for iteration in range(1, max_iter + 1):
        if known is not None and (_same(here, known) or (iteration > GIVE_UP and here.loss > known.loss)):
            return known, iteration
        log_noise, loss = here.log_noise, here.loss
        slope, curvature = -here.slope(), here.curvature()
        if prior is not None:
            ratio = prior.rate * np.exp(log_noise)
            slope -= (prior.shape - ratio) / prior.n_rows
            curvature.flat[:: len(slope) + 1] += ratio / prior.n_rows
        else:  # d = 2 (change of psi^1/2) / psi^1/2 has the slope of log psi and half of it less curvature
            curvature.flat[:: len(slope) + 1] -= slope / 2
        free = ~((log_noise <= low) & (slope > 0) | (log_noise >= high) & (slope < 0))
        if not free.any() or np.abs(slope[free]).max() < 1e-8:
            return here, iteration
        if not free.all():
            curvature, slope = curvature[np.ix_(free, free)], slope[free]
        unit = np.maximum(np.abs(curvature.diagonal()), 1e-8)
        while True:
            damped = curvature.copy()
            damped.flat[:: len(unit) + 1] += damping * unit
            factor, not_positive = dpotrf(damped, lower=1)
            step = np.zeros_like(log_noise)
            if not not_positive:
                step[free] = -dpotrs(factor, slope, lower=1)[0]
            if not_positive or np.abs(step).max() > LONGEST_STEP:
                damping = max(4 * damping, 1e-3)
                continue
            moved = step if prior is not None else 2 * np.log(np.maximum(1 + step / 2, 1e-6))
            trial = np.minimum(np.maximum(log_noise + moved, low), high)
            change = (trial - log_noise)[free]
            if prior is None:
                change = 2 * np.expm1(change / 2)
            expected = -float(slope @ change + change @ curvature @ change / 2)
            if expected < 1e-3 * tol * (1 + abs(loss)):  # nothing left that could be told from rounding
                return here, iteration
            there = Profile(corr, n_latents, trial, prior)
            gain = loss - there.loss
            if gain > 1e-4 * expected:
                break
            damping *= 8
        if gain > 0.75 * expected:
            damping /= 10
        elif gain < 0.25 * expected:
            damping *= 4
        here = there
        # where a step gains what was expected, the next is to gain about its square
        done = expected < LAST * math.sqrt(tol) * (1 + abs(loss)) and abs(gain / expected - 1) < 0.1
        if gain < tol * (1 + abs(loss)) or (done and damping < 1e-3):
            return here, iteration
    return here, max_iter


def _same(here: Profile, known: Profile) -> bool:
    """Whether a climb has come to where a known maximum is."""
    if here.loss > known.loss + SAME:
        return False
    low = math.log(LEAST_TOLD)
    return bool(np.abs(np.maximum(here.log_noise, low) - np.maximum(known.log_noise, low)).max() < SAME)


def _at_bounds(corr: Array, top: Profile, tol: float) -> Profile:
    """Noises that go to their floor, there: on the last way to it no step gains what could be told from rounding."""
    near = (top.log_noise > BOUNDS[0]) & (top.log_noise < BOUNDS[0] + NEAR_FLOOR) & (top.slope() < 0)
    if not near.any():
        return top
    there = Profile(corr, top.n_latents, np.where(near, BOUNDS[0], top.log_noise))
    # the slope tells that it gains; of the greatest eigenvalue, about 1 / psi, the LML has its rounding
    lost = tol * (1 + abs(top.lml)) + ROUNDING * len(corr) * there.value[0]
    return there if there.lml > top.lml - lost else top
