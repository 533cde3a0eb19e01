"""Coordinates for loadings that are known up to a rotation: the Procrustes slice, and its exact Jacobian.

Take a reference A (T, K) with A'A = diag(a^2). Every V with A'V non-singular has exactly one rotation for which
S = A'V is symmetric positive definite, and these V form a linear space, A + Q z, Q orthonormal and normal to the orbit
of A. With s the eigenvalues of S, exactly

    int f(V) dV = vol O(K) int f(A + Q z) prod_{i<j} (s_i + s_j) / (a_i^2 + a_j^2)^1/2 dz,    over all z with s > 0

for every f that no rotation changes. On the slice theta = center + basis y, y (m,) of about unit spread.

Where a column is weak, points lie close to the border of the slice and a move ends outside. There the slice is left on
purpose: V turned by E diag(+-1) E', S = E diag(s) E', is the same covariance, and the measure with |s_i + s_j| is that
of the orbit at each of these images; so signs of the weakest eigenvalues are turned at random before a move, and turned
back afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.optimize import minimize

from bayes_mpt.evidence.factor_posterior import FactorPosterior
from bayes_mpt.evidence.laplace import log_volume

__all__ = ["AtPoints", "Slice", "climb"]

Array = NDArray[np.float64]

MIN_SINGULAR = 1e-3  # of the reference: a column of zeros has no orbit
WEAK = 4.0  # standard deviations from zero, below which the sign of a column is turned
FARTHEST = 40.0  # of a coordinate, beyond which a trajectory has diverged
N_CLIMBS, MAX_ITER = 2, 30
CURVATURE_STEP = 1e-3
MIN_CURVATURE = 0.1  # of what is expected
EFFECTIVE = 0.5  # share of a pilot's points that count as independent


class AtPoints(NamedTuple):
    """What is known of points of a slice."""

    log_density: Array
    """(B,) of the posterior, with all constants but the Jacobian."""
    log_gauge: Array
    """(B,) logarithm of prod |s_i + s_j| / (a_i^2 + a_j^2)^1/2; -inf outside, the weak signs aside."""
    force: Array
    """(B, m) what moves points: the gradient of both in y, or near it."""
    start_force: Array
    """(B, m) gradient of the density of the start, at the points turned back."""
    inside: NDArray[np.bool_]
    """(B,) whether all s are positive."""


@dataclass(frozen=True, eq=False)
class Slice:
    """A slice of a posterior through a point, in units of the curvature there."""

    posterior: FactorPosterior
    reference: Array
    """A (T, K)"""
    center: Array
    """(d,)"""
    basis: Array
    """(d, m)"""
    back: Array
    """(m, d) y = back (theta - center)"""
    polar: Array
    """(m, K K): S = S0 + y polar, symmetric by the choice of the slice"""
    polar_center: Array
    """S0 (K, K), of the center; A'A where the reference is the center"""
    log_jacobian: float
    """Of y -> theta on the slice, and the volume of the orbit."""
    pull: Array
    """(m,) gradient of the gauge at the center."""
    n_weak: int
    """Columns whose sign is not settled."""

    @classmethod
    def through(cls, posterior: FactorPosterior, theta: Array) -> Self:
        """The slice whose reference is V at theta (d,), rotated so that its columns are orthogonal."""
        t, k = posterior.n_tokens, posterior.n_latents
        n = t * k
        u, a, _ = np.linalg.svd(theta[:n].reshape(t, k), full_matrices=False)
        a = np.maximum(a, MIN_SINGULAR)
        reference = u * a
        center = np.concatenate([reference.ravel(), theta[n:]])
        # tangents of the orbit: A turned in the plane of two columns
        low, high = np.triu_indices(k, 1)
        tangents = np.zeros((t, k, len(low)))
        pair = np.arange(len(low))
        tangents[:, low, pair] = -reference[:, high]
        tangents[:, high, pair] = reference[:, low]
        free = np.linalg.qr(tangents.reshape(n, -1), mode="complete")[0][:, len(low) :]
        normal = np.zeros((len(center), len(center) - len(low)))  # Q
        normal[:n, : n - len(low)] = free
        normal[n:, n - len(low) :] = np.eye(len(center) - n)
        # y = L'z, L L' = Q'H Q
        root = np.linalg.cholesky(normal.T @ posterior.information(center) @ normal)
        basis = solve_triangular(root, normal.T, lower=True).T
        log_jacobian = log_volume(k) - float(np.log(np.diag(root)).sum())
        log_jacobian -= 0.5 * float(np.log(a[low] ** 2 + a[high] ** 2).sum())
        spread = 2 * posterior.n_rows * a**2 / (1 + a**2) ** 2 + 3.0  # curvature along a column
        n_weak = int((a * np.sqrt(spread) < WEAK).sum())
        polar = np.einsum("tk,tlm->mkl", reference, basis[:n].reshape(t, k, -1))
        polar = 0.5 * (polar + polar.transpose(0, 2, 1)).reshape(-1, k * k)
        back = root.T @ normal.T
        at_center = np.diag(a**2)
        pull = _pull(at_center, polar)
        return cls(posterior, reference, center, basis, back, polar, at_center, log_jacobian, pull, n_weak)

    def widened(self) -> Slice:
        """The same in units of the curvature that the rows show, where that is less than what was expected.

        The direction of a surplus column is hardly determined: its expected curvature is that of a column among noise
        of one variance, and the rows' noise has other directions that are nearly as good. With H = E diag(h) E' the
        curvature in y at the center, y = E diag(c) y', c = min(max(h, MIN_CURVATURE), 1)^-1/2.
        """
        m = self.n_free
        steps = CURVATURE_STEP * np.concatenate([np.eye(m), -np.eye(m)])
        gradient = self._density(steps)[1]
        h = (gradient[m:] - gradient[:m]) / (2 * CURVATURE_STEP)
        h, e = np.linalg.eigh(0.5 * (h + h.T))
        c = np.clip(h, MIN_CURVATURE, 1.0) ** -0.5
        return self._moved(np.zeros(m), e * c, (e / c).T, float(np.log(c).sum()))

    def fitted(self, y: Array) -> Slice:
        """The same in units of the mean and the spread of points y (n, m) of the posterior, both shrunk.

        Mean and covariance are estimated from few points: the mean is drawn to the old center by James and Stein's
        factor, the covariance to the identity by the share ``rho`` that Ledoit and Wolf estimate.
        """
        m, n_effective = self.n_free, EFFECTIVE * len(y)
        mean = y.mean(0)
        off = y - mean
        cov = off.T @ off / len(y)
        length = float(mean @ mean)
        mean = mean * max(0.0, 1 - float(np.trace(cov)) / n_effective / length)
        # |cov - I|^2 = truth's distance + noise; noise of an entry by the points' own fourth moments
        distance = float(np.square(cov - np.eye(m)).sum())
        noise = float(np.square(np.square(off).sum(1)).mean() - np.square(cov).sum()) / n_effective
        rho = min(1.0, max(0.0, noise / distance))
        cov = (1 - rho) * cov + rho * np.eye(m)
        root = np.linalg.cholesky(cov)
        inverse = solve_triangular(root, np.eye(m), lower=True)
        return self._moved(mean, root, inverse, float(np.log(np.diag(root)).sum()))

    def _moved(self, center: Array, root: Array, inverse: Array, log_det: float) -> Slice:
        """The same by coordinates y', y = center + root y'."""
        k = self.posterior.n_latents
        polar = root.T @ self.polar
        at_center = self.polar_center + (center @ self.polar).reshape(k, k)
        return replace(
            self,
            center=self.center + self.basis @ center,
            basis=self.basis @ root,
            back=inverse @ self.back,
            polar=polar,
            polar_center=at_center,
            log_jacobian=self.log_jacobian + log_det,
            pull=_pull(at_center, polar),
        )

    @property
    def n_free(self) -> int:
        """How many coordinates, m."""
        return self.basis.shape[1]

    def coordinates(self, theta: Array) -> Array:
        """Points (B, m) of any theta (B, d), turned into the slice: V O with A'V O symmetric and positive."""
        n = self.reference.size
        v = theta[:, :n].reshape(-1, *self.reference.shape)
        left, _, right = np.linalg.svd(self.reference.T @ v)
        turned = v @ (left @ right).transpose(0, 2, 1)
        return (np.concatenate([turned.reshape(len(v), n), theta[:, n:]], 1) - self.center) @ self.back.T

    def theta(self, y: Array) -> Array:
        """Points (B, m) as theta (B, d)."""
        return self.center + y @ self.basis.T

    def read(self, y: Array, start: Callable[[Array], Array]) -> AtPoints:
        """Density, gauge and forces at points (B, m); ``start`` is the gradient of the start's density inside."""
        value, gradient, diverged = self._density(y)
        k = self.posterior.n_latents
        s, e = self._polar(y)
        positive = s > 0
        inside = positive.all(1)
        # only the signs of the n_weak smallest may be turned
        allowed = inside
        if self.n_weak:
            rank = np.argsort(np.argsort(np.abs(s), axis=1), axis=1)
            allowed = (positive | (rank < self.n_weak)).all(1)
        allowed = allowed & ~diverged & np.isfinite(value)
        gauge = np.full(len(y), self.log_jacobian)
        if k > 1:
            low, high = np.triu_indices(k, 1)
            with np.errstate(divide="ignore"):
                gauge += np.log(np.abs(s[:, low] + s[:, high])).sum(1)
        return AtPoints(
            np.where(allowed, value, -np.inf),
            np.where(allowed, gauge, -np.inf),
            gradient + self._gauge_force(s, e),
            self._start_force(y, s, e, start),
            inside & allowed,
        )

    def forces(self, y: Array, start: Callable[[Array], Array]) -> tuple[Array, Array]:
        """Both forces at points (B, m) on the way, of few digits: they need only depend on nothing but the point."""
        gradient = self._density(y, rough=True)[1]
        if not self.n_weak:  # no eigenvalues are needed
            return gradient + self.pull, start(y)
        s, e = self._polar(y)
        return gradient + self._gauge_force(s, e), self._start_force(y, s, e, start)

    def _density(self, y: Array, rough: bool = False) -> tuple[Array, Array, NDArray[np.bool_]]:
        """Log density (B,) of the posterior at points (B, m), its gradient (B, m), and which points have diverged."""
        theta = self.theta(y)
        diverged = ~(np.abs(y).max(1) < FARTHEST)
        theta[diverged] = self.center
        value, gradient = self.posterior.log_density(theta, rough)
        return value, gradient @ self.basis, diverged

    def _gauge_force(self, s: Array, e: Array) -> Array:
        """Gradient (B, m) of the gauge: of strong columns that at the center, which any trajectory may follow.

        d/dS sum_{i<j} log |s_i + s_j| = E diag(g) E'; of weak signs it is the mirror's, which stays finite.
        """
        if not self.n_weak:
            return self.pull
        size = np.abs(s)
        inverse = 1 / np.maximum(size[:, :, None] + size[:, None, :], 1e-6)
        g = (inverse.sum(2) - 0.5 / np.maximum(size, 5e-7)) * np.where(s > 0, 1.0, -1.0)
        return ((e * g[:, None, :]) @ e.transpose(0, 2, 1)).reshape(len(s), -1) @ self.polar.T

    def _start_force(self, y: Array, s: Array, e: Array, start: Callable[[Array], Array]) -> Array:
        """Gradient (B, m) of the start's density at the points turned back, V sign(S) with sign(S) = E diag(+-1) E'.

        d sign(S) = E (F o E' dS E) E', F_ij = 2 / (|s_i| + |s_j|) where the signs differ and 0 elsewhere.
        """
        slope, outside = start(y), (s < 0).any(1)
        if not outside.any():
            return slope
        s, e, theta = s[outside], e[outside], self.theta(y[outside])
        n, sign = self.reference.size, np.where(s < 0, -1.0, 1.0)
        turn = (e * sign[:, None, :]) @ e.transpose(0, 2, 1)
        v = theta[:, :n].reshape(-1, *self.reference.shape).copy()
        theta[:, :n] = (v @ turn).reshape(len(theta), -1)
        of_theta = start((theta - self.center) @ self.back.T) @ self.back  # (B, d)
        of_v = of_theta[:, :n].reshape(v.shape)
        product = v.transpose(0, 2, 1) @ of_v
        size = np.abs(s)
        f = np.abs(sign[:, :, None] - sign[:, None, :]) / np.maximum(
            size[:, :, None] + size[:, None, :], 1e-6
        )
        inner = e.transpose(0, 2, 1) @ (0.5 * (product + product.transpose(0, 2, 1))) @ e
        of_s = e @ (f * inner) @ e.transpose(0, 2, 1)
        of_theta[:, :n] = (of_v @ turn).reshape(len(theta), -1)
        slope[outside] = of_theta @ self.basis + of_s.reshape(len(theta), -1) @ self.polar.T
        return slope

    def turned(self, y: Array, signs: Array | None = None) -> tuple[Array, NDArray[np.bool_]]:
        """Points (B, m) with these signs (B, n_weak) of the weakest, or (None) turned back inside; and which moved."""
        theta = self.theta(y)
        s, e = self._polar(y)
        if signs is None:
            turn = np.where(s < 0, -1.0, 1.0)
        else:
            turn = np.ones_like(s)
            np.put_along_axis(turn, np.argsort(np.abs(s), axis=1)[:, : self.n_weak], signs, 1)
        moved = np.any(turn < 0, axis=1)
        rotation = (e * turn[:, None, :]) @ e.transpose(0, 2, 1)
        v = theta[:, : self.reference.size].reshape(-1, *self.reference.shape) @ rotation
        theta[:, : self.reference.size] = v.reshape(len(y), -1)
        return np.where(moved[:, None], (theta - self.center) @ self.back.T, y), moved

    def contains(self, y: Array) -> NDArray[np.bool_]:
        """(B,) whether points are inside, all s positive."""
        return np.all(self._polar(y)[0] > 0, axis=1)

    def _polar(self, y: Array) -> tuple[Array, Array]:
        """Eigenvalues (B, K) and vectors (B, K, K) of S = A'V."""
        k = self.posterior.n_latents
        s = self.polar_center + (y @ self.polar).reshape(-1, k, k)
        if k == 1:
            return s[:, :, 0], np.ones_like(s)
        s[~(np.abs(y).max(1) < FARTHEST)] = np.eye(k)
        return np.linalg.eigh(s)


def _pull(at_center: Array, polar: Array) -> Array:
    """Gradient (m,) of the gauge where S is ``at_center``."""
    s, e = np.linalg.eigh(at_center)
    s = np.maximum(s, MIN_SINGULAR**2)
    slope = (e * ((1 / (s[:, None] + s)).sum(1) - 0.5 / s)) @ e.T
    pull: Array = slope.ravel() @ polar.T
    return pull


def climb(posterior: FactorPosterior, theta: Array, max_iter: int = MAX_ITER) -> Slice:
    """The slice through a maximum of the posterior, found by quasi-Newton steps in whitened units."""
    here = Slice.through(posterior, theta)
    for _ in range(N_CLIMBS):

        def loss(y: Array, here: Slice = here) -> tuple[float, Array]:
            value, gradient = posterior.log_density(here.theta(y[None]))
            if not math.isfinite(value[0]):
                return math.inf, np.zeros_like(y)
            return -float(value[0]), -(gradient[0] @ here.basis)

        found = minimize(
            loss, np.zeros(here.n_free), jac=True, method="L-BFGS-B", options={"maxiter": max_iter}
        )
        here = Slice.through(posterior, here.theta(found.x[None])[0])
    return here
