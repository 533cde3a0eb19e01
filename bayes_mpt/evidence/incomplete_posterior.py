"""Log posterior of factor models on rows with missing cells, the mean among its coordinates.

Coordinates theta = (V, e, nu), V and e as in `factor_posterior`, nu = (mu - m0) / u^1/2 (T,). A row that shows the
tokens o has the density of its observed cells, N(mu_o, C_oo): `bayes_mpt.predictors.gaussian.patterns`, in W and psi.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from bayes_mpt.evidence.factor_posterior import FactorPosterior, information
from bayes_mpt.evidence.factor_prior import LOG_2PI, FactorPrior
from bayes_mpt.predictors.gaussian.patterns import Maps, Patterns
from bayes_mpt.program.statistics import SufficientStatistics

__all__ = ["IncompletePosterior"]

Array = NDArray[np.float64]

CHUNK_CELLS = 2**16  # points x rows x tokens at a time: what stays in the cache


class IncompletePosterior(FactorPosterior):
    """Log joint density of the observed cells and (V, e, nu).

    Parameters
    ----------
    statistics : SufficientStatistics
        Complete rows by their moments, and incomplete ones.
    n_latents : int
        K.
    prior : FactorPrior
    shape : array of shape (T,), optional
        As of `FactorPosterior`.
    """

    def __init__(
        self,
        statistics: SufficientStatistics,
        n_latents: int,
        prior: FactorPrior,
        shape: Array | None = None,
    ):
        super().__init__(statistics.n_rows, n_latents, prior, shape)
        rows, weight = (a.cpu().numpy() for a in statistics.rows())
        self.patterns = Patterns((rows - prior.center) / np.sqrt(self.units), weight)
        self.size = max(1, CHUNK_CELLS // rows.size)
        self.constant = 0.5 * self.n_tokens * (math.log(prior.kappa) - LOG_2PI)
        self.constant -= 0.5 * float(self.patterns.n_seen @ np.log(self.units))

    def _likelihood(self, v: Array, e: Array, rest: Array, rough: bool) -> tuple[Array, Array, Array, Array]:
        root = np.exp(0.5 * e)
        w, psi = root[:, :, None] * v, np.exp(e)
        chunks = [slice(i, i + self.size) for i in range(0, len(v), self.size)]
        parts = [self.patterns.quick_slopes(Maps(rest[i], w[i], psi[i]), rough) for i in chunks]
        total, by_mean, by_w, by_psi = (np.concatenate(part) for part in zip(*parts, strict=True))
        own, own_v, own_e, own_mean = self._mean_prior(v, e, rest)
        # W = exp(e/2) V, psi = exp e
        slope_e = 0.5 * (by_w * w).sum(2) + by_psi * psi
        return total + own, root[:, :, None] * by_w + own_v, slope_e + own_e, by_mean + own_mean

    def _mean_prior(self, v: Array, e: Array, nu: Array) -> tuple[Array, Array, Array, Array]:
        """Log density of the mean, N(m0, C / kappa), and all constants (B,); its slopes in V, e and nu.

        With y = kappa^1/2 exp(-e/2) nu, f = M^-1 V'y and r = y - V f = A^-1 y: T/2 log(kappa / 2 pi) - 1/2 (sum e +
        log |M| + y'r).
        """
        scale = math.sqrt(self.prior.kappa) * np.exp(-0.5 * e)
        y = scale * nu  # (B, T)
        m = np.eye(self.n_latents) + v.transpose(0, 2, 1) @ v
        inverse = np.linalg.inv(m)
        f = inverse @ (v.transpose(0, 2, 1) @ y[:, :, None])  # (B, K, 1)
        r = y - (v @ f)[:, :, 0]
        square = r * y
        value = self.constant - 0.5 * (e.sum(1) + np.linalg.slogdet(m)[1] + square.sum(1))
        return value, r[:, :, None] * f.transpose(0, 2, 1) - v @ inverse, -0.5 * (1 - square), -scale * r

    def means(self, theta: Array) -> tuple[Array, Array]:
        """The mean is a coordinate, mu = m0 + u^1/2 nu."""
        nu = theta[:, self.n_loadings + self.n_noise :]
        return self.prior.center + np.sqrt(self.units) * nu, np.zeros(self.n_tokens)

    def information(self, theta: Array) -> Array:
        """Expected information (d, d) of the rows plus expected curvature of a normal prior, at one point (d,)."""
        v, e = (a[0] for a in self.split(theta[None]))
        shown = np.column_stack([self.patterns.shown, np.ones(self.n_tokens)])
        fisher, _ = information(v, shown, np.append(self.patterns.count, 1.0))
        _, mean = information(v, shown, np.append(self.patterns.count, self.prior.kappa))
        root = np.exp(-0.5 * e)
        own = self._with_prior(fisher, v, e)
        result = np.zeros((len(own) + len(mean),) * 2)
        result[: len(own), : len(own)] = own
        result[len(own) :, len(own) :] = root[:, None] * mean * root
        return result
