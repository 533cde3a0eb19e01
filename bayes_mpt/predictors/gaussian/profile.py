"""The profile likelihood of Gaussian factors: mean and loadings are maximised out.

With S the covariance (T, T) of the rows, x ~ N(mean, W W' + diag(psi)) and psi fixed, the best loadings follow from
one eigendecomposition (Joreskog 1967; Tipping & Bishop 1999 for psi = v I):

    psi^-1/2 S psi^-1/2 = sum_i lambda_i u_i u_i',    theta_k = max(lambda_k, 1),    W = psi^1/2 U (theta - 1)^1/2

    LML / N = -1/2 [ T log 2 pi + sum_i log psi_i + sum_{k<=K} (log theta_k + lambda_k / theta_k) + sum_{k>K} lambda_k ]

so that only the noise is left to be searched. Where S is given as R' R with fewer rows R than columns, all of it is
algebra of the rows: the eigenvectors are u = psi^-1/2 R' e / lambda^1/2 with e those of R psi^-1 R', and S is not made.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh, svd
from scipy.linalg.lapack import dpotrf, dpotrs, dsyevr
from scipy.optimize import minimize

from bayes_mpt.program.statistics import Covariance

__all__ = [
    "Factors",
    "NoiseFloorError",
    "Prior",
    "Spectrum",
    "diagonal",
    "least_noise",
    "proportional",
    "spectrum",
]

Array = NDArray[np.float64]

FLOOR = 1e-8  # least noise variance, of the column's variance
BOUNDS = (math.log(FLOOR), 10.0)  # of log psi
LONGEST_STEP = 3.0
LOG_2PI = math.log(2 * math.pi)
ROUNDING = float(np.finfo(np.float64).eps)
MIN_EIGENVALUE_RATIO = (
    1e-9  # of the largest eigenvalue of a squared matrix: smaller ones have lost too many digits
)
ENOUGH = 1e-5  # of the tolerance: what a next step may gain at the end, as its length tells
RIDGE = 1e-10  # of changes that are all but multiples of each other
MEMORY = 5  # steps that Anderson's method remembers
NEAR = 0.1  # of their mean square, in log psi: longer ones are far from linear, and each is to be so much shorter
MAX_DENSE = 200  # tokens up to which Newton's method on their covariance costs less than steps by rows


class NoiseFloorError(ValueError):
    """The likelihood has no maximum: these columns can be reproduced without noise."""

    def __init__(self, columns: list[int]):
        self.columns = columns
        super().__init__(f"columns {columns} are reproduced without noise")


class Factors(NamedTuple):
    """A maximum over the loadings."""

    lml: float
    """Nats a row."""
    noise: Array
    """(T,) psi."""
    spectrum: Array
    """(K,) theta, the leading eigenvalues of psi^-1/2 S psi^-1/2, at least 1."""
    vectors: Array
    """(T, K) U."""
    n_iter: int

    @property
    def loading(self) -> Array:
        """(T, K) W."""
        return np.sqrt(self.noise)[:, None] * self.vectors * np.sqrt(self.spectrum - 1)


class Prior(NamedTuple):
    """psi_i ~ Gamma(shape, rate_i)."""

    shape: float
    rate: Array
    """(T,), or (1,) of one factor of all."""
    n_rows: int
    """N: how many rows' likelihood the prior stands against."""


def least_noise(a: Array | float, b: Array | float, left: Array) -> Array:
    """psi at which a log psi + left / (2 psi) + b psi is least: ((a^2 + 2 b left)^1/2 - a) / (2 b), b > 0."""
    root = np.sqrt(np.square(a) + 2 * b * left)
    # of a positive a without the difference, which loses digits where b is small
    return np.where(np.asarray(a) > 0, left / np.maximum(root + a, 1e-300), (root - a) / (2 * b))


class Spectrum(NamedTuple):
    """Eigenvalues, the largest first, and vectors of shape^-1/2 S shape^-1/2."""

    value: Array
    """(R,), R <= T: the others are zero."""
    vectors: Array
    """(T, n), of the n largest."""
    rank: int
    """Directions in which the rows differ, whatever the columns' scales."""


def spectrum(cov: Covariance, shape: Array, n_vectors: int | None = None) -> Spectrum:
    """Decompose the covariance in units of a known noise shape (T,); serves every number of latents up to n_vectors."""
    if cov.rows is not None:
        return _spectrum_of_root(cov.rows, shape, n_vectors)
    root, rank = _root(cov.dense())
    # singular values of shape^-1/2 root, not eigenvalues of its square: half the digits would go
    vectors, singular, _ = svd(root / np.sqrt(shape)[:, None], full_matrices=False)
    return Spectrum(singular**2, vectors, rank)


def _spectrum_of_root(rows: Array, shape: Array, n_vectors: int | None) -> Spectrum:
    scaled = rows / np.sqrt(shape)  # (R, T)
    n_rows, n_tokens = rows.shape
    if n_rows < n_tokens:
        value, vectors = eigh(scaled @ scaled.T, driver="evd", check_finite=False)
        if n_rows and value[0] > MIN_EIGENVALUE_RATIO * value[-1]:
            value = value[::-1]
            vectors = scaled.T @ vectors[:, ::-1][:, :n_vectors] / np.sqrt(value[:n_vectors])
            return Spectrum(value, vectors, n_rows)
    vectors, singular, _ = svd(scaled.T, full_matrices=False, check_finite=False)
    sd = np.sqrt(np.square(rows).sum(0))
    alike = singular
    if not (shape == sd**2).all():
        alike = svd(rows / np.where(sd > 0, sd, 1.0), compute_uv=False, check_finite=False)
    rank = int((alike > ROUNDING * max(100, n_tokens) * alike.max(initial=0.0)).sum())
    return Spectrum(singular**2, vectors[:, :n_vectors], rank)


def proportional(
    cov: Covariance,
    n_latents: int,
    shape: Array,
    known: Spectrum | None = None,
    *,
    prior: Prior | None = None,
    at_floor: bool = False,
) -> Factors:
    """Maximise over noise = c * shape, c > 0: one eigendecomposition (Tipping & Bishop 1999, eq. 8).

    Parameters
    ----------
    cov : Covariance
        Of the rows, divided by N.
    n_latents : int
        K < T.
    shape : array of shape (T,)
        Positive.
    known : Spectrum, optional
        ``spectrum(cov, shape)``, where several numbers of latents are tried.
    prior : Prior, optional
        Of c, its rate of shape (1,): maximise the posterior of log c instead.
    at_floor : bool, default=False
        Where K latents reproduce the covariance, take a noise of the size of rounding errors.

    Raises
    ------
    NoiseFloorError
        If K latents reproduce the covariance without noise.
    """
    n_tokens = len(shape)
    value, vector, rank = spectrum(cov, shape, n_latents) if known is None else known
    largest = value[0] if len(value) else 0.0
    c = _factor(value, n_latents, n_tokens, prior)
    if n_latents >= rank:  # no direction is left for the noise
        if not at_floor or not largest:
            raise NoiseFloorError(list(range(n_tokens)))
        c = max(c, largest * (10 * ROUNDING * max(100, n_tokens)) ** 2)
    theta = np.maximum(value[:n_latents] / c, 1.0)
    lml = -0.5 * (
        n_tokens * LOG_2PI
        + np.log(c * shape).sum()
        + (np.log(theta) + value[:n_latents] / c / theta).sum()
        + value[n_latents:].sum() / c
    )
    return Factors(float(lml), c * shape, theta, vector[:, :n_latents], 1)


def _factor(value: Array, n_latents: int, n_tokens: int, prior: Prior | None) -> float:
    """The best c for these eigenvalues: the mean of what no latent takes up, or where the posterior is highest.

    A latent is used where its eigenvalue is above c. As a function of log c minus the posterior is convex, so that the
    number of latents for which its lowest point uses just these is the one.
    """
    if prior is None:
        return float(value[n_latents:].sum() / (n_tokens - n_latents))
    b = float(prior.rate[0]) / prior.n_rows
    for n_used in range(min(n_latents, len(value)), -1, -1):
        a = (n_tokens - n_used) / 2 - prior.shape / prior.n_rows
        c = float(least_noise(a, b, value[n_used:].sum()))
        if not n_used or c <= value[n_used - 1]:
            break
    return c


def diagonal(
    cov: Covariance,
    n_latents: int,
    *,
    start: Array | None = None,
    prior: Prior | None = None,
    max_iter: int = 1000,
    tol: float = 1e-10,
    refuse: bool = True,
) -> Factors:
    """Maximise over a noise variance of each token: by Newton's method with the exact Hessian, damped.

    Of many tokens and fewer rows by steps that cost as much as the rows have numbers.

    Parameters
    ----------
    cov : Covariance
        Of the rows, divided by N.
    n_latents : int
        K.
    start : array of shape (T,), optional
        Noise variances to start from; 1 / diag(cov^-1) by default, what the other tokens leave unexplained.
    prior : Prior, optional
        Maximise the posterior of log psi instead.
    max_iter : int, default=1000
        Of either.
    tol : float, default=1e-10
        Relative change of the objective at which it stops.
    refuse : bool, default=True
        Whether a likelihood without bound is an error; else the noise ends at its floor.

    Raises
    ------
    NoiseFloorError
        If the likelihood grows without bound: columns that are duplicates, constant, or linear combinations of
        K others.
    """
    sd = np.sqrt(cov.variances)
    if not (sd > 0).all():
        raise NoiseFloorError(list(np.flatnonzero(~(sd > 0))))
    # in units of the columns: the same path at every scale
    scaled = None if prior is None else prior._replace(rate=prior.rate * sd**2)
    given = None if start is None else np.clip(np.log(start / sd**2), *BOUNDS)
    if cov.rows is not None and len(cov.rows) < len(sd) > MAX_DENSE:
        rows = cov.rows / sd
        if prior is None and n_latents >= len(rows):
            raise NoiseFloorError(list(range(len(sd))))
        factors = _by_rows(rows, n_latents, given, scaled, max_iter, tol)
    else:
        corr = cov.dense() / sd / sd[:, None]
        log_start = np.log(_unexplained(corr)) if given is None else given
        log_noise, n_iter = _newton(corr, n_latents, log_start, scaled, max_iter, tol)
        top = _Profile(corr, n_latents, log_noise)
        value, vectors, _ = top.spectrum
        theta, vectors = np.maximum(value[:n_latents], 1.0), vectors[:, :n_latents]
        factors = Factors(float(top.lml), np.exp(log_noise), theta, vectors, n_iter)
    floor = np.flatnonzero(np.log(factors.noise) <= BOUNDS[0] + 1e-3)
    if prior is None and refuse and len(floor):
        if np.linalg.eigvalsh(cov.among(floor) / sd[floor] / sd[floor, None])[0] < 1e-7:
            raise NoiseFloorError(list(floor))
    return factors._replace(lml=float(factors.lml - np.log(sd).sum()), noise=factors.noise * sd**2)


def _by_rows(
    rows: Array, n_latents: int, log_noise: Array | None, prior: Prior | None, max_iter: int, tol: float
) -> Factors:
    """`diagonal` of columns of unit variance from fewer rows (R, T) than columns.

    With the loadings at their best for psi, d LML / d log psi_i = -1/2 (1 - s_i / psi_i), s_i what they leave of the
    variance of token i. So psi = s at the maximum, and steps to psi = s, the faster the more tokens there are; what the
    last of them left is taken off by Anderson's method, and a quasi-Newton method goes on where they are slow.
    """
    n_tokens = rows.shape[1]
    best = _at_one_noise(rows, n_latents, prior)
    if log_noise is not None:
        best = _at_rows(rows, n_latents, log_noise, prior)
    gain, n_iter, path = np.inf, 0, _Path()
    while n_iter < max_iter:
        step = best.fixed_point() - best.log_noise
        # the curvature in log psi is about 1/2, so that a step d gains d'd / 4
        if step @ step / 4 < ENOUGH * tol * (1 + abs(best.loss)):
            return best.factors(n_iter)
        new = _at_rows(rows, n_latents, np.clip(path.next(best.log_noise, step), *BOUNDS), prior)
        n_iter += 1
        before, gain = gain, best.loss - new.loss
        if gain > 0:
            best = new
        if abs(gain) < 1e-3 * tol * (1 + abs(best.loss)):
            return best.factors(n_iter)
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
        bounds=[BOUNDS] * n_tokens,
        options={"maxiter": max(1, max_iter - n_iter), "maxfun": 10 * max_iter, "maxcor": 20}
        | {"ftol": 1e-4 * tol, "gtol": 1e-9},
    )
    last = _at_rows(rows, n_latents, found.x, prior)
    return (last if last.loss <= best.loss else best).factors(n_iter + found.nit)


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
    """The profile of `_by_rows` at one noise."""

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


class _Profile:
    """LML a row at the best loadings as a function of log psi, with its derivatives."""

    def __init__(self, corr: Array, n_latents: int, log_noise: Array):
        root = np.exp(0.5 * log_noise)
        value, vectors = np.linalg.eigh(corr / root / root[:, None])  # the smallest first
        self.spectrum = Spectrum(value[::-1], vectors[:, ::-1], len(corr))
        # theta_k = lambda_k for the latents that are used, 1 for all other directions
        n_used = int((self.spectrum.value[:n_latents] > 1).sum())
        self.rest, self.used = np.split(value, [len(corr) - n_used])  # lambda_m, lambda_k
        self.v, self.u = np.split(vectors, [len(corr) - n_used], axis=1)
        self.lml = -0.5 * (
            len(corr) * LOG_2PI + log_noise.sum() + np.log(self.used).sum() + n_used + self.rest.sum()
        )

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
            weight = (used[:, None] + rest) * (1 - rest) / gap  # (K, T - K)
            pairs = (u[:, :, None] * v[:, None, :]).reshape(len(u), -1)
            hessian += 0.5 * (pairs * weight.ravel()) @ pairs.T
        return hessian


def _newton(
    corr: Array, n_latents: int, log_noise: Array, prior: Prior | None, max_iter: int, tol: float
) -> tuple[Array, int]:
    """Maximise the profile within bounds by Newton steps, damped as by Levenberg and Marquardt.

    Steps are taken in psi^1/2, where a maximum at zero variance (Heywood) is one step away and not infinitely far;
    with a prior, which keeps away from zero, in log psi.
    """
    low, high = BOUNDS

    def loss_at(log_noise: Array) -> tuple[float, _Profile]:
        profile = _Profile(corr, n_latents, log_noise)
        loss = -profile.lml
        if prior is not None:
            # log p(log psi) = a log psi - b psi + const, a row's share of it
            loss -= float((prior.shape * log_noise - prior.rate * np.exp(log_noise)).sum()) / prior.n_rows
        return loss, profile

    damping = 1e-2
    loss, profile = loss_at(log_noise)
    for iteration in range(1, max_iter + 1):
        slope, curvature = -profile.slope(), profile.curvature()
        if prior is not None:
            ratio = prior.rate * np.exp(log_noise)
            slope -= (prior.shape - ratio) / prior.n_rows
            curvature[np.diag_indices_from(curvature)] += ratio / prior.n_rows
        else:  # d = 2 (change of psi^1/2) / psi^1/2 has the slope of log psi and half of it less curvature
            curvature[np.diag_indices_from(curvature)] -= slope / 2
        free = ~((log_noise <= low) & (slope > 0) | (log_noise >= high) & (slope < 0))
        if not free.any() or np.abs(slope[free]).max() < 1e-8:
            return log_noise, iteration
        curvature, slope = curvature[np.ix_(free, free)], slope[free]
        unit = np.maximum(np.abs(np.diag(curvature)), 1e-8)
        while True:
            factor, not_positive = dpotrf(curvature + np.diag(damping * unit), lower=1)
            step = np.zeros_like(log_noise)
            if not not_positive:
                step[free] = -dpotrs(factor, slope, lower=1)[0]
            if not_positive or np.abs(step).max() > LONGEST_STEP:
                damping = max(4 * damping, 1e-3)
                continue
            moved = step if prior is not None else 2 * np.log(np.maximum(1 + step / 2, 1e-6))
            trial = np.clip(log_noise + moved, low, high)
            change = (trial - log_noise)[free]
            if prior is None:
                change = 2 * np.expm1(change / 2)
            expected = -float(slope @ change + change @ curvature @ change / 2)
            if expected < 1e-3 * tol * (1 + abs(loss)):  # nothing left that could be told from rounding
                return log_noise, iteration
            new_loss, new_profile = loss_at(trial)
            gain = loss - new_loss
            if gain > 1e-4 * expected:
                break
            damping *= 8
        if gain > 0.75 * expected:
            damping /= 10
        elif gain < 0.25 * expected:
            damping *= 4
        log_noise, loss, profile = trial, new_loss, new_profile
        if gain < tol * (1 + abs(loss)):
            return log_noise, iteration
    return log_noise, max_iter


def _root(cov: Array) -> tuple[Array, int]:
    """A root of the covariance, taken in correlation units (scales of 1e-8 to 1e8 keep their digits), and its rank."""
    sd = np.sqrt(np.diag(cov))
    unit = np.where(sd > 0, sd, 1.0)
    value, vector = eigh(cov / unit / unit[:, None], driver="evd", check_finite=False)
    kept = value > 1e-13 * len(cov) * max(value[-1], 0.0)
    return unit[:, None] * vector * np.sqrt(np.where(kept, value, 0.0)), int(kept.sum())


def _unexplained(corr: Array) -> Array:
    """1 / diag(R^-1): the variance that a regression on the other tokens leaves; a ridge where R is singular."""
    value, vector = eigh(corr)
    value = np.maximum(value, 1e-3)
    return np.clip(1 / (vector**2 @ (1 / value)), 1e-3, 1.0)
