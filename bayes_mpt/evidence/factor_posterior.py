"""Log posteriors of factor models at many points side by side; of complete rows on their covariance alone.

Coordinates theta = (V, e) with V = psi^-1/2 W (T, K) and e = log psi / u (P,), P = T, or 1 of noises known up to a
factor. With R the covariance of the rows in units of u, R' = e^-1/2 R e^-1/2, M = I + V'V and A = I + V V',

    log p(rows | theta) = -N/2 (T log 2 pi + sum log u + sum e + log |M| + tr A^-1 R')

The mean is integrated, mu | C ~ N(m0, C / kappa): T/2 log(kappa / (N + kappa)) is added, and to the covariance
kappa / (N + kappa) (mean - m0)(mean - m0)'.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Self

import numpy as np
from numpy.typing import NDArray

from bayes_mpt.evidence.factor_prior import LOG_2PI, FactorPrior
from bayes_mpt.predictors.gaussian import patterns

__all__ = ["CompletePosterior", "FactorPosterior", "information"]

Array = NDArray[np.float64]


class FactorPosterior(ABC):
    """Log joint density of rows and theta = (V, e, whatever else a subclass integrates), invariant under V -> V O.

    Parameters
    ----------
    n_rows, n_latents : int
        N and K.
    prior : FactorPrior
    shape : array of shape (T,), optional
        Known ratios of the noise variances; by default each token has one of its own.
    """

    def __init__(self, n_rows: int, n_latents: int, prior: FactorPrior, shape: Array | None = None):
        self.n_rows, self.n_latents, self.prior, self.shape = n_rows, n_latents, prior, shape
        self.units = prior.units(shape)  # (T,)
        self.n_tokens = len(self.units)
        self.n_noise = self.n_tokens if shape is None else 1
        self.n_loadings = self.n_tokens * n_latents
        self.anchor: Array | None = None  # e0 (T,): theta holds U = exp((e - e0) / 2) V in place of V

    @abstractmethod
    def _likelihood(self, v: Array, e: Array, rest: Array, rough: bool) -> tuple[Array, Array, Array, Array]:
        """Log likelihood (B,) and its gradients in V (B, T, K), e (B, T) and the rest of theta."""

    @abstractmethod
    def means(self, theta: Array) -> tuple[Array, Array]:
        """Centres (B, T) of the mean at points (B, d), and s (T,): its covariance there is s^1/2 C s^1/2."""

    @abstractmethod
    def information(self, theta: Array) -> Array:
        """Expected information (d, d) of the rows plus expected curvature of a normal prior, at one point (d,)."""

    def with_prior(self, prior: FactorPrior) -> Self:
        """The same rows under another prior of the same table."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__, prior=prior)
        return new

    def anchored(self, theta: Array) -> Self:
        """The same in (U, e), U = exp((e - e0) / 2) V, e0 that of a point (d,), where U and V are the same.

        A noise variance that the rows leave open down to zero takes its row of V to infinity; U is the row of W but for
        a constant, and stays where it is.
        """
        new = self.with_prior(self.prior)
        new.anchor = self.split(theta[None])[1][0]
        return new

    def split(self, theta: Array) -> tuple[Array, Array]:
        """V (B, T, K) and e (B, T) of points (B, d)."""
        v = theta[:, : self.n_loadings].reshape(len(theta), self.n_tokens, self.n_latents)
        e = theta[:, self.n_loadings : self.n_loadings + self.n_noise]
        e = np.broadcast_to(e, (len(theta), self.n_tokens))
        return v if self.anchor is None else v * np.exp(-0.5 * (e - self.anchor))[:, :, None], e

    def log_density(self, theta: Array, rough: bool = False) -> tuple[Array, Array]:
        """Log joint density (B,) at points (B, d), and its gradient (B, d); ``rough``: of five digits."""
        v, e = self.split(theta)
        end = self.n_loadings + self.n_noise
        likelihood, slope_v, slope_e, slope_rest = self._likelihood(v, e, theta[:, end:], rough)
        noise, slope_noise = self.prior.log_noise(theta[:, self.n_loadings : end])
        loadings, prior_v, prior_e = self.prior.log_loadings(v, e)
        slope_v, slope_e = slope_v + prior_v, slope_e + prior_e
        value = likelihood + noise + loadings
        if self.anchor is not None:
            # dV = exp(-(e - e0) / 2) dU - V de / 2, and |dV / dU| = exp(-K sum (e - e0) / 2)
            value = value - 0.5 * self.n_latents * (e - self.anchor).sum(1)
            slope_e = slope_e - 0.5 * ((v * slope_v).sum(2) + self.n_latents)
            slope_v = slope_v * np.exp(-0.5 * (e - self.anchor))[:, :, None]
        if self.n_noise == 1:
            slope_e = slope_e.sum(1, keepdims=True)
        parts = [slope_v.reshape(len(v), -1), slope_e + slope_noise, slope_rest]
        return value, np.concatenate(parts, 1)

    def _with_prior(self, fisher: Array, v: Array, e: Array) -> Array:
        """Add the prior's curvature to an information of (V (T, K), e (T,)), and fold e where it is one number."""
        n, t = self.n_loadings, self.n_tokens
        result = fisher.copy()
        share = np.exp(e)
        loadings, noises = np.arange(n), n + np.arange(t)
        result[loadings, loadings] += np.repeat(share / self.prior.scale**2, self.n_latents)
        result[noises, noises] += 0.5 * self.n_latents
        if self.anchor is not None:
            by_theta = np.eye(n + t)  # of (V, e) in (U, e)
            by_theta[loadings, loadings] = np.repeat(np.exp(-0.5 * (e - self.anchor)), self.n_latents)
            by_theta[loadings, n + loadings // self.n_latents] = -0.5 * v.ravel()
            result = by_theta.T @ result @ by_theta
        if self.n_noise == 1:
            fold = np.zeros((n + t, n + 1))
            fold[loadings, loadings] = 1
            fold[n:, n] = 1
            result = fold.T @ result @ fold
        own = n + np.arange(self.n_noise)
        result[own, own] += self.prior.noise_shape * share[: self.n_noise]
        return result


class CompletePosterior(FactorPosterior):
    """Of complete rows, by their covariance (T, T), divided by N, and mean (T,); the mean of the model integrated."""

    def __init__(
        self,
        cov: Array,
        mean: Array,
        n_rows: int,
        n_latents: int,
        prior: FactorPrior,
        shape: Array | None = None,
    ):
        super().__init__(n_rows, n_latents, prior, shape)
        kappa, off = prior.kappa, mean - prior.center
        root = np.sqrt(self.units)
        self.cov = (cov + kappa / (n_rows + kappa) * np.outer(off, off)) / root / root[:, None]
        self.mean = prior.center + n_rows / (n_rows + kappa) * off
        self.constant = 0.5 * self.n_tokens * math.log(kappa / (n_rows + kappa))
        self.constant -= 0.5 * n_rows * (self.n_tokens * LOG_2PI + np.log(self.units).sum())

    def _likelihood(self, v: Array, e: Array, rest: Array, rough: bool) -> tuple[Array, Array, Array, Array]:
        n_points, n_tokens, k = v.shape
        root = np.exp(-0.5 * e)  # (B, T)
        # R' V, as one product of R with all columns side by side
        scaled = (root[:, :, None] * v).transpose(1, 0, 2).reshape(n_tokens, -1)
        rv = root[:, :, None] * (self.cov @ scaled).reshape(n_tokens, n_points, k).transpose(1, 0, 2)
        products = v.transpose(0, 2, 1) @ np.concatenate([v, rv], 2)  # (B, K, 2 K)
        inverse, log_det = patterns.inverse((np.eye(k) + products[:, :, :k]).transpose(1, 2, 0)[None])
        inverse = np.ascontiguousarray(inverse[0].transpose(2, 0, 1))
        rx = rv @ inverse
        # (A^-1 R')_ii
        quad = np.diag(self.cov) * root**2 - (v * rx).sum(2)
        value = self.constant - 0.5 * self.n_rows * (e.sum(1) + log_det[0] + quad.sum(1))
        # d/dV: -N (A^-1 V - A^-1 R' A^-1 V) = -N (V (M^-1 + M^-1 V'R'V M^-1) - R'V M^-1)
        slope = -self.n_rows * (v @ (inverse + inverse @ products[:, :, k:] @ inverse) - rx)
        return value, slope, -0.5 * self.n_rows * (1 - quad), rest

    def means(self, theta: Array) -> tuple[Array, Array]:
        """The mean given all else is N((kappa m0 + N mean) / (N + kappa), C / (N + kappa))."""
        spread = np.full(self.n_tokens, 1 / (self.n_rows + self.prior.kappa))
        return np.tile(self.mean, (len(theta), 1)), spread

    def information(self, theta: Array) -> Array:
        """Expected information (d, d) of the rows plus expected curvature of a normal prior, at one point (d,)."""
        v, e = (a[0] for a in self.split(theta[None]))
        everything = np.ones((self.n_tokens, 1))
        fisher, _ = information(v, everything, np.array([float(self.n_rows)]))
        return self._with_prior(fisher, v, e)


def information(v: Array, shown: Array, count: Array) -> tuple[Array, Array]:
    """Fisher information (T K + T, T K + T) of V (T, K) and log psi (T,), and that of the mean in units of psi^1/2.

    Of ``count`` (G,) rows for each pattern ``shown`` (T, G): that of W = psi^1/2 V and psi in units of psi^1/2, where
    W = V, psi = 1 and dW_ik = dV_ik + 1/2 V_ik de_i, dpsi_i = de_i.
    """
    t, k = v.shape
    found = patterns.information(v, np.ones(t), shown, count)
    half = 0.5 * v
    by_e = found.cross + np.einsum("ikjl,jl->ikj", found.loading, half)  # V_ik, e_j
    own = found.noise + np.einsum("jk,jki->ij", half, found.cross) + np.einsum("ik,ikj->ij", half, by_e)
    result = np.empty((t * k + t, t * k + t))
    result[: t * k, : t * k] = found.loading.reshape(t * k, t * k)
    result[: t * k, t * k :] = by_e.reshape(t * k, t)
    result[t * k :, : t * k] = result[: t * k, t * k :].T
    result[t * k :, t * k :] = own
    return result, found.mean
