"""Newton's method on the profile likelihood of Gaussian factors, a noise variance for each token.

With the loadings at their best for psi (`profile`), LML / N is a function of log psi alone, whose slope and curvature
follow from one eigendecomposition of psi^-1/2 S psi^-1/2.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dpotrf, dpotrs, dsyevd

from bayes_mpt.predictors.gaussian.factors import BOUNDS, FLOOR, LOG_2PI, Factors, Prior, least_noise

__all__ = ["Climb", "Profile"]

Array = NDArray[np.float64]

LONGEST_STEP = 3.0
NEAR_FLOOR = 3.0  # of log psi
ROUNDING = float(np.finfo(np.float64).eps)
SAME = 0.2  # of log psi, where psi is above LEAST_TOLD: two climbs that are as near end at one maximum
LEAST_TOLD = 1e-3
LAST = 1e-2  # times the root of the tolerance, relative: a step that gains less is the last, if it keeps its promise
DAMPING = 1e-2  # of the first step; up to it a step is one of Newton's, which tells where a climb ends
BEHIND = 5.0  # times what a step is to gain: what a climb that ends above a known maximum may lack
AGREED = 0.15  # of what a climb lacks: what a step is to gain less or more, if it leads to a known maximum
MANY_PAIRS = 2**13  # T K (T - K), from which on sums over them take long
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
    likely_passed : bool, default=False
        Whether its loss is likely to be all that is asked for: the eigenvectors, which take longer than the
        eigenvalues, are found when they are asked for.

    Examples
    --------
    >>> corr = np.array([[1.0, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 1.0]])
    >>> np.abs(Profile(corr, 1, np.log([0.5, 0.5, 0.5])).slope()).max() < 1e-12
    np.True_
    """

    def __init__(
        self,
        corr: Array,
        n_latents: int,
        log_noise: Array,
        prior: Prior | None = None,
        *,
        likely_passed: bool = False,
    ):
        self.corr, self.log_noise, self.prior, self.n_latents = corr, log_noise, prior, n_latents
        self._curvature: list[Array] = []  # once it was asked for, under whichever prior
        value, vectors = self._decomposed(vectors=not likely_passed)
        self._vectors = None if likely_passed else vectors
        self.value = value[::-1]  # lambda (T,), the largest first
        # theta_k = lambda_k for the latents that are used, 1 for all other directions
        n_used = int((self.value[:n_latents] > 1).sum())
        self.n_rest = len(corr) - n_used
        self.rest, self.used = value[: self.n_rest], value[self.n_rest :]  # lambda_m, lambda_k
        self.lml = -0.5 * float(
            len(corr) * LOG_2PI + log_noise.sum() + np.log(self.used).sum() + n_used + self.rest.sum()
        )
        self.loss = self._loss()
        """Minus the LML a row, less a row's share of the log prior."""

    def _decomposed(self, *, vectors: bool) -> tuple[Array, Array]:
        """Eigenvalues (T,), the least first, and vectors (T, T), if asked for, of psi^-1/2 S psi^-1/2."""
        root = np.exp(-0.5 * self.log_noise)
        scaled = (self.corr * root * root[:, None]).T
        # numpy's has the same routine, and checks that cost as much as a decomposition of few tokens
        value, found, failed = dsyevd(scaled, compute_v=int(vectors), lower=1, overwrite_a=1)
        if failed:
            raise np.linalg.LinAlgError("the eigenvalues of the tokens' covariance did not converge")
        return value, found

    def _directions(self) -> Array:
        """(T, T) eigenvectors, those of the least eigenvalues first."""
        if self._vectors is None:
            self._vectors = self._decomposed(vectors=True)[1]
        return self._vectors

    @property
    def vectors(self) -> Array:
        """(T, T) u, those of the largest eigenvalues first."""
        return self._directions()[:, ::-1]

    def _loss(self) -> float:
        if self.prior is None:
            return -self.lml
        # log p(log psi) = a log psi - b psi + const
        share = self.prior.shape * self.log_noise - self.prior.rate * np.exp(self.log_noise)
        return -self.lml - float(share.sum()) / self.prior.n_rows

    def under(self, prior: Prior | None) -> Self:
        """The same place under another prior, for which nothing need be decomposed."""
        new = object.__new__(type(self))
        vars(new).update(vars(self))
        new.prior = prior
        new.loss = new._loss()
        return new

    def slope(self) -> Array:
        """(T,) d LML / d log psi_i = -1/2 sum_m (1 - lambda_m) v_im^2, m over the unused directions."""
        return -0.5 * self._directions()[:, : self.n_rest] ** 2 @ (1 - self.rest)

    def curvature(self) -> Array:
        """Minus the Hessian (T, T) in log psi (Jennrich & Robinson 1969), k over the used directions.

        1/2 (sum_m lambda_m v_im v_jm) (sum_m v_im v_jm)
            + 1/2 sum_{k, m} (lambda_k + lambda_m)(1 - lambda_m) / (lambda_k - lambda_m) u_ik u_jk v_im v_jm

        Of many tokens the second sum is in single precision, which takes two thirds of the time: nothing is read off
        it but which way steps go, and the slope says where they end.
        """
        if self._curvature:
            return self._curvature[0].copy()
        used, rest, n = self.used, self.rest, self.n_rest
        u, v = self._directions()[:, n:], self._directions()[:, :n]
        hessian = 0.5 * ((v * rest) @ v.T) * (v @ v.T)
        if len(used):
            gap = np.maximum(used[:, None] - rest, 1e-12)
            weight = 0.5 * (used[:, None] + rest) * (1 - rest) / gap  # (K, T - K)
            if u.size * n > MANY_PAIRS:
                u, v, weight = u.astype(np.float32), v.astype(np.float32), weight.astype(np.float32)
            pairs = (u[:, :, None] * v[:, None, :]).reshape(len(u), -1)
            hessian += (pairs * weight.ravel()) @ pairs.T
        self._curvature.append(hessian)
        return hessian.copy()

    def communality(self, n: int) -> Array:
        """(T, n) what each of the n leading directions takes of the variance of each token."""
        psi = np.exp(self.log_noise)[:, None]
        return psi * self.vectors[:, :n] ** 2 * np.maximum(self.value[:n] - 1, 0.0)

    def left(self) -> Array:
        """(T,) log psi to which a step of EM goes: what the loadings leave of each token's variance is its noise."""
        left = np.maximum(1 - self.communality(self.n_latents).sum(1), FLOOR)
        if self.prior is not None:
            n = self.prior.n_rows
            left = least_noise(0.5 - self.prior.shape / n, self.prior.rate / n, left)
        return np.clip(np.log(np.maximum(left, FLOOR)), *BOUNDS)

    def factors(self, n_iter: int) -> Factors:
        """The maximum, if this is one."""
        k = self.n_latents
        theta = np.maximum(self.value[:k], 1.0)
        return Factors(self.lml, np.exp(self.log_noise), theta, self.vectors[:, :k], n_iter)


class Climb:
    """Climbs of the profile within bounds by Newton steps, damped as by Levenberg and Marquardt.

    Steps are taken in psi^1/2, where a maximum at zero variance (Heywood) is one step away and not infinitely far;
    with a prior, which keeps away from zero, in log psi.

    Parameters
    ----------
    corr : array of shape (T, T)
        S, of columns of unit variance.
    prior : Prior, optional
        Maximise the posterior of log psi instead.
    max_iter : int
        Of each climb.
    tol : float
        Relative change of the objective at which it stops.

    Examples
    --------
    >>> corr = np.full((4, 4), 0.5) + 0.5 * np.eye(4)
    >>> climb = Climb(corr, None, 100, 1e-12)
    >>> np.exp(climb.top(climb.at(1, np.zeros(4))).log_noise).round(6)
    array([0.5, 0.5, 0.5, 0.5])
    """

    def __init__(self, corr: Array, prior: Prior | None, max_iter: int, tol: float):
        self.corr, self.prior, self.max_iter, self.tol = corr, prior, max_iter, tol
        self.n_iter = 0
        """Steps of all climbs."""

    def at(self, n_latents: int, log_noise: Array, *, likely_passed: bool = False) -> Profile:
        """A place to start from, or on the way (`Profile`)."""
        return Profile(self.corr, n_latents, log_noise, self.prior, likely_passed=likely_passed)

    def top(self, start: Profile, known: Profile | None = None) -> Profile:
        """The maximum above a place.

        ``known``: another maximum, which is given back where the climb comes to it, or to a lower one: as Newton's
        steps tell, before it is there.
        """
        here = self._climb(start.under(self.prior), known)
        return _at_bounds(self.corr, here, self.tol) if self.prior is None and here is not known else here

    def _climb(self, here: Profile, known: Profile | None) -> Profile:
        damping, tol = DAMPING, self.tol
        for step in range(1, self.max_iter + 1):
            self.n_iter += 1
            if known is not None and (_same(here, known) or (step > GIVE_UP and here.loss > known.loss)):
                return known
            local, loss = _Local.at(here), here.loss
            if local is None:
                return here
            while True:
                move = local.step(damping)
                if move is None:
                    damping = max(4 * damping, 1e-3)
                    continue
                trial, expected = move
                if expected < 1e-3 * tol * (1 + abs(loss)):  # nothing left that could be told from rounding
                    return here
                if known is not None and damping <= DAMPING and _leads_to(known, here, trial, expected):
                    return known
                # a climb that has come to a known maximum is over
                passed = known is not None and _near(trial, known.log_noise)
                there = self.at(here.n_latents, trial, likely_passed=passed)
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
                return here
        return here


class _Local(NamedTuple):
    """The objective around a place up to second order, in log psi or, without a prior, in 2 psi^1/2 relative."""

    here: Profile
    slope: Array
    """(F,) of the loss, of what is free to move."""
    curvature: Array
    """(F, F)"""
    free: NDArray[np.bool_] | None
    """(T,); None where all is."""

    @classmethod
    def at(cls, here: Profile) -> _Local | None:
        """None where nothing is free to move, or all is flat."""
        (low, high), log_noise, prior = BOUNDS, here.log_noise, here.prior
        slope, curvature = -here.slope(), here.curvature()
        if prior is not None:
            ratio = prior.rate * np.exp(log_noise)
            slope -= (prior.shape - ratio) / prior.n_rows
            curvature.flat[:: len(slope) + 1] += ratio / prior.n_rows
        else:  # d = 2 (change of psi^1/2) / psi^1/2 has the slope of log psi and half of it less curvature
            curvature.flat[:: len(slope) + 1] -= slope / 2
        free = None
        if log_noise.min() <= low or log_noise.max() >= high:
            free = ~((log_noise <= low) & (slope > 0) | (log_noise >= high) & (slope < 0))
            curvature, slope = curvature[np.ix_(free, free)], slope[free]
        if not len(slope) or np.abs(slope).max() < 1e-8:
            return None
        return cls(here, slope, curvature, free)

    def step(self, damping: float) -> tuple[Array, float] | None:
        """Where a damped step goes (T,), and what it is to gain; None where it would be too long, or lead down."""
        damped = self.curvature.copy()
        damped.flat[:: len(damped) + 1] += damping * np.maximum(np.abs(damped.diagonal()), 1e-8)
        factor, not_positive = dpotrf(damped, lower=1)
        if not_positive:
            return None
        log_noise, prior = self.here.log_noise, self.here.prior
        step = -dpotrs(factor, self.slope, lower=1)[0]
        if np.abs(step).max() > LONGEST_STEP:
            return None
        moved = step if prior is not None else 2 * np.log(np.maximum(1 + step / 2, 1e-6))
        before = log_noise if self.free is None else log_noise[self.free]
        after = np.minimum(np.maximum(before + moved, BOUNDS[0]), BOUNDS[1])
        change, trial = after - before, after
        if self.free is not None:
            trial = log_noise.copy()
            trial[self.free] = after
        if prior is None:
            change = 2 * np.expm1(change / 2)
        return trial, -float(self.slope @ change + change @ self.curvature @ change / 2)


def _same(here: Profile, known: Profile) -> bool:
    """Whether a climb has come to where a known maximum is."""
    return here.loss <= known.loss + SAME and _near(here.log_noise, known.log_noise)


def _leads_to(known: Profile, here: Profile, trial: Array, expected: float) -> bool:
    """Whether a climb goes to a known maximum, or to one that is lower, as a step to ``trial`` tells."""
    lacks = here.loss - known.loss
    return lacks > BEHIND * expected or (
        abs(lacks - expected) <= AGREED * lacks and _near(trial, known.log_noise)
    )


def _near(log_noise: Array, other: Array) -> bool:
    low = math.log(LEAST_TOLD)
    return bool(np.abs(np.maximum(log_noise, low) - np.maximum(other, low)).max() < SAME)


def _at_bounds(corr: Array, top: Profile, tol: float) -> Profile:
    """Noises that go to their floor, there: on the last way to it no step gains what could be told from rounding."""
    near = (top.log_noise > BOUNDS[0]) & (top.log_noise < BOUNDS[0] + NEAR_FLOOR) & (top.slope() < 0)
    if not near.any():
        return top
    there = Profile(corr, top.n_latents, np.where(near, BOUNDS[0], top.log_noise))
    # the slope tells that it gains; of the greatest eigenvalue, about 1 / psi, the LML has its rounding
    lost = tol * (1 + abs(top.lml)) + ROUNDING * len(corr) * there.value[0]
    return there if there.lml > top.lml - lost else top
