"""The best factors of many tokens and few rows, each token with a noise of its own, by algebra of the rows.

With the loadings at their best for psi, d LML / d log psi_i = -1/2 (1 - s_i / psi_i), s_i what they leave of the
variance of token i. So psi = s at the maximum, and steps to psi = s, the faster the more tokens there are; what the
last of them left is taken off by Anderson's method, and a quasi-Newton method goes on where they are slow. A step costs
R^2 T, the products of the rows, and no matrix of tokens is made.

There may be several maxima, as with fewer tokens (`modes`). Where a noise is faint and the spectrum has no clear gap at
K, one latent more is taken and another left out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dsyevr
from scipy.optimize import minimize

from bayes_mpt.predictors.gaussian.factors import BOUNDS, FLOOR, LOG_2PI, Factors, Prior, least_noise
from bayes_mpt.predictors.gaussian.modes import CLEAR, FAINT, PASSED, ROUGH, rest_of

__all__ = ["maximise_by_rows"]

Array = NDArray[np.float64]

ENOUGH = 1e-4  # of the tolerance: what a next step may gain at the end, as its length tells
RIDGE = 1e-10  # of changes that are all but multiples of each other
MEMORY = 5  # steps that Anderson's method remembers
NEAR = 0.1  # of their mean square, in log psi: longer ones are far from linear, and each is to be so much shorter


def maximise_by_rows(
    rows: Array, n_latents: int, log_noise: Array | None, prior: Prior | None, max_iter: int, tol: float
) -> Factors:
    """The factors that are best for columns of unit variance, S = R' R.

    Parameters
    ----------
    rows : array of shape (R, T)
        R, fewer than tokens.
    n_latents : int
        K.
    log_noise : array of shape (T,), optional
        log psi to start from; by default what is best where all tokens have the same.
    prior : Prior, optional
        Maximise the posterior of log psi instead.
    max_iter, tol
        As in `bayes_mpt.predictors.gaussian.profile.diagonal`.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> rows = rng.normal(size=(20, 2)) @ rng.normal(size=(2, 300)) + rng.normal(size=(20, 300))
    >>> rows /= np.sqrt(np.square(rows).sum(0))
    >>> found = maximise_by_rows(rows, 2, None, None, 1000, 1e-10)
    >>> left = 1 - np.square(found.loading).sum(1)  # of the columns' variances
    >>> bool(np.allclose(found.noise, left, rtol=1e-5))
    True
    """
    if log_noise is not None:
        top, n_iter = _climbed(rows, _at_rows(rows, n_latents, log_noise, prior), max_iter, tol)
        return top.factors(n_iter)
    top, n_iter = _climbed(rows, _at_one_noise(rows, n_latents, prior), max_iter, tol)
    # under a prior one climb was enough, on all tables that were tried
    doubtful = prior is None and top.log_noise.min() < math.log(FAINT)
    if doubtful and 0 < n_latents < len(rows) - 1:
        beside, more_iter = _exchanged(rows, top, max_iter)
        n_iter += more_iter
        if beside is not None:
            top, more_iter = _climbed(rows, beside, max_iter, tol)
            n_iter += more_iter
    return top.factors(n_iter)


def _exchanged(rows: Array, top: _AtRows, max_iter: int) -> tuple[_AtRows | None, int]:
    """A place that is higher than a maximum, from the maximum of one latent more less one; None where there is none."""
    k = len(top.theta)
    wider = _at_rows(rows, k + 1, top.log_noise, top.prior)
    if wider.theta[k - 1] - 1 > CLEAR * (wider.theta[k] - 1):
        return None, 0
    start = _at_rows(rows, k + 1, rest_of(wider.communality().sum(1)), top.prior)
    more, n_iter = _climbed(rows, start, max_iter, PASSED)
    share = more.communality()  # (T, K + 1)
    least = share[:, share.sum(0).argmin()]
    start = _at_rows(rows, k, rest_of(share.sum(1) - least), top.prior)
    found, more_iter = _climbed(rows, start, max_iter, ROUGH)
    higher = found.loss < top.loss - ROUGH * (1 + abs(top.loss))
    return (found if higher else None), n_iter + more_iter


def _climbed(rows: Array, best: _AtRows, max_iter: int, tol: float) -> tuple[_AtRows, int]:
    """The maximum above a place, and the steps to it."""
    prior, n_latents = best.prior, len(best.theta)
    gain, n_iter, path = np.inf, 0, _Path()
    while n_iter < max_iter:
        step = best.fixed_point() - best.log_noise
        # the curvature in log psi is about 1/2, so that a step d gains d'd / 4
        if step @ step / 4 < ENOUGH * tol * (1 + abs(best.loss)):
            return best, n_iter
        new = _at_rows(rows, n_latents, np.clip(path.next(best.log_noise, step), *BOUNDS), prior)
        n_iter += 1
        before, gain = gain, best.loss - new.loss
        if gain > 0:
            best = new
        if abs(gain) < 1e-3 * tol * (1 + abs(best.loss)):
            return best, n_iter
        if gain < 0 or gain > before / 2:  # too long a step, or slow
            break

    def loss_and_slope(log_noise: Array) -> tuple[float, Array]:
        here = _at_rows(rows, n_latents, log_noise, prior)
        return here.loss, here.slope

    found = minimize(
        loss_and_slope,
        best.log_noise,
        jac=True,
        method="L-BFGS-B",
        bounds=[BOUNDS] * rows.shape[1],
        options={"maxiter": max(1, max_iter - n_iter), "maxfun": 10 * max_iter, "maxcor": 20}
        | {"ftol": 1e-4 * tol, "gtol": 1e-9},
    )
    last = _at_rows(rows, n_latents, found.x, prior)
    return (last if last.loss <= best.loss else best), n_iter + found.nit


class _Path:
    """Places and the steps from them, from which a next place is told (Anderson 1965; Walker & Ni 2011).

    Where steps f(x) are linear in x, the weights that take most off their sum name the place without a step. Of them

        x + f - sum_j g_j (dx_j + df_j),    g = arg min |f - sum_j g_j df_j|

    with dx_j and df_j what the last places and their steps have changed by.
    """

    def __init__(self) -> None:
        self.last: tuple[Array, Array] | None = None
        """A place and the step from it."""
        self.changes: list[tuple[Array, Array]] = []
        """df, and dx + df, in units of the size of df."""

    def next(self, place: Array, step: Array) -> Array:
        """The place after ``place`` (T,), from which the plain step is ``step`` (T,)."""
        before, self.last = self.last, (place, step)
        square = step @ step
        if before is not None and square < NEAR * (before[1] @ before[1]):
            changed, moved = step - before[1], place - before[0]
            size = math.sqrt(changed @ changed)
            self.changes = [*self.changes, (changed / size, (moved + changed) / size)][-MEMORY:]
        else:
            self.changes = []  # not linear there
        target = place + step
        if not self.changes or square > NEAR * len(step):
            return target
        changes = np.array([change for change, _ in self.changes])
        products = changes @ changes.T + RIDGE * np.eye(len(changes))
        weight = np.linalg.solve(products, changes @ step)
        for g, (_, move) in zip(weight, self.changes, strict=True):
            target -= g * move
        return target


class _AtRows(NamedTuple):
    """The profile at one noise."""

    log_noise: Array
    """(T,)"""
    loss: float
    """Minus the LML a row, less a row's share of the log prior."""
    lml: float
    left: Array
    """(T,) s: of each token's variance what the loadings leave."""
    theta: Array
    """(K,), at least 1."""
    u: Array
    """(T, K)"""
    prior: Prior | None

    @property
    def slope(self) -> Array:
        """(T,) of the loss in log psi: 1/2 (1 - s / psi) - (a - b psi) / N."""
        psi = np.exp(self.log_noise)
        slope = 0.5 * (1 - self.left / psi)
        return (
            slope
            if self.prior is None
            else slope - (self.prior.shape - self.prior.rate * psi) / self.prior.n_rows
        )

    def fixed_point(self) -> Array:
        """(T,) log psi where the slope would be zero, were s what it is."""
        if self.prior is None:
            psi = self.left
        else:
            a, b = 0.5 - self.prior.shape / self.prior.n_rows, self.prior.rate / self.prior.n_rows
            psi = least_noise(a, b, self.left)
        return np.clip(np.log(np.maximum(psi, FLOOR)), *BOUNDS)

    def communality(self) -> Array:
        """(T, K) what each latent takes of the variance of each token."""
        return np.exp(self.log_noise)[:, None] * self.u**2 * (self.theta - 1)

    def factors(self, n_iter: int) -> Factors:
        return Factors(self.lml, np.exp(self.log_noise), self.theta, self.u, n_iter)


def _at_rows(rows: Array, n_latents: int, log_noise: Array, prior: Prior | None) -> _AtRows:
    scaled = rows * np.exp(-0.5 * log_noise)  # (R, T)
    gram = scaled @ scaled.T  # numpy knows that this is symmetric
    value, vectors = _leading(gram, n_latents)
    u = scaled.T @ vectors / np.sqrt(np.maximum(value, FLOOR))  # (T, K)
    return _of_spectrum(value, u, float(np.trace(gram)), log_noise, prior)


def _at_one_noise(rows: Array, n_latents: int, prior: Prior | None) -> _AtRows:
    """With the noise that is best where all tokens have the same (`proportional`)."""
    gram = rows @ rows.T
    value, vectors = _leading(gram, n_latents)
    total, n_tokens = float(np.trace(gram)), rows.shape[1]
    c = max((total - value.sum()) / max(1, n_tokens - n_latents), FLOOR)
    u = rows.T @ vectors / np.sqrt(np.maximum(value, FLOOR))
    return _of_spectrum(value / c, u, total / c, np.full(n_tokens, math.log(c)), prior)


def _of_spectrum(value: Array, u: Array, trace: float, log_noise: Array, prior: Prior | None) -> _AtRows:
    """From the leading eigenvalues (K,), vectors (T, K) and trace of psi^-1/2 S psi^-1/2."""
    theta = np.maximum(value, 1.0)
    left = np.maximum(1 - np.exp(log_noise) * (u**2 @ (theta - 1)), 0.0)
    # as in `proportional`; a latent whose eigenvalue is below one has no loading
    lml = -0.5 * (
        len(log_noise) * LOG_2PI
        + log_noise.sum()
        + (np.log(theta) + value / theta).sum()
        + trace
        - value.sum()
    )
    loss = -lml
    if prior is not None:
        loss -= float((prior.shape * log_noise - prior.rate * np.exp(log_noise)).sum()) / prior.n_rows
    return _AtRows(log_noise, float(loss), float(lml), left, theta, u, prior)


def _leading(matrix: Array, n: int) -> tuple[Array, Array]:
    """The n greatest eigenvalues, the largest first, and their vectors, without the checks of a general routine."""
    size = len(matrix)
    n = min(n, size)
    if not n:
        return np.zeros(0), np.zeros((size, 0))
    if 8 * n > size:
        value, vectors = np.linalg.eigh(matrix)
        return value[::-1][:n], vectors[:, ::-1][:, :n]
    value, vectors, _, _, failed = dsyevr(
        matrix, range="I", il=size - n + 1, iu=size, lower=1, lwork=80 * size, liwork=10 * size
    )
    if failed:
        raise np.linalg.LinAlgError("the eigenvalues of the rows' products did not converge")
    return value[:n][::-1], vectors[:, :n][:, ::-1]
