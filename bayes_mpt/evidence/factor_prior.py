"""The stated prior of factor models: proper, free of units, invariant under rotations, and one for all candidates.

In units of u_i, rows x ~ N(mu, C), C = psi + W W',

    W_ik / u_i^1/2   ~ one multivariate t of all T K entries: 3 degrees of freedom, scale 0.3
    psi_i / u_i      ~ Gamma(2, 2): mean 1, no weight at zero
    mu | C           ~ N(m0, C / kappa), kappa = 0.01

With a noise variance for each token u_i is the variance of token i. Where all share one up to known ratios,
psi = c shape (PPCA: ones), there is one such draw, and u_i is shape_i times the mean of variance_i / shape_i: PPCA
treats all directions alike, so that its prior knows the mean variance alone.

m0 and the variances are read from the table. So a number under this prior compares candidates of one table; it is not
the probability of the rows under a model that was stated before they were seen.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from bayes_mpt.evidence.saturated import saturated

__all__ = ["FactorPrior", "factor_prior"]

Array = NDArray[np.float64]

LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class FactorPrior:
    """Prior of loadings, noise variances and mean, common to all factor models of a table.

    Parameters
    ----------
    center : array of shape (T,)
        m0, where the mean is centred.
    variances : array of shape (T,)
        Of the columns: the units.
    scale : float, default=0.3
        Of the loadings.
    degrees : float, default=3.0
        Of freedom of the loadings' t; infinite: normal with standard deviation ``scale``.
    noise_shape : float, default=2.0
        a of psi_i / u_i ~ Gamma(a, a).
    kappa : float, default=0.01
        Rows that the prior of the mean is worth.

    Examples
    --------
    >>> print(factor_prior(np.array([[0.0, 1.0], [2.0, 5.0], [4.0, 3.0]])).describe())
    loadings: t_3, scale 0.3; noise variances: Gamma(2, 2); mean: N(m0, C/0.01); units: m0 and variances 687ff2f6
    """

    center: Array
    variances: Array
    scale: float = 0.3
    degrees: float = 3.0
    noise_shape: float = 2.0
    kappa: float = 0.01

    def describe(self) -> str:
        """One line that is the same for two priors if and only if they are, with a fingerprint of m0 and variances."""
        table = np.concatenate([self.center, self.variances]).astype(float)
        loadings = "normal" if math.isinf(self.degrees) else f"t_{self.degrees:g}"
        return (
            f"loadings: {loadings}, scale {self.scale:g}; noise variances: Gamma({self.noise_shape:g}, "
            f"{self.noise_shape:g}); mean: N(m0, C/{self.kappa:g}); units: m0 and variances "
            f"{hashlib.sha256(table.tobytes()).hexdigest()[:8]}"
        )

    def scaled(self, factor: float) -> FactorPrior:
        """The same with the scale of the loadings multiplied."""
        return replace(self, scale=self.scale * factor)

    def normal(self, variance: float) -> FactorPrior:
        """The same with loadings normal with this variance, in units."""
        return replace(self, scale=math.sqrt(variance), degrees=math.inf)

    def units(self, shape: Array | None) -> Array:
        """u (T,) of a noise variance for each token (None), or of noises that are known up to a common factor."""
        return self.variances if shape is None else shape * (self.variances / shape).mean()

    def log_noise(self, log_share: Array) -> tuple[Array, Array]:
        """Log density (B,) of log psi / u (B, P), and its gradient."""
        a, share = self.noise_shape, np.exp(log_share)
        value = (a * log_share - a * share).sum(1) + log_share.shape[1] * (a * math.log(a) - gammaln(a))
        return value, a - a * share

    def log_loadings(self, v: Array, log_share: Array) -> tuple[Array, Array, Array]:
        """Log density (B,) of V = psi^-1/2 W (B, T, K) given log psi / u (B, T), and both gradients.

        V_ik / r_i of scale one, r_i^2 = scale^2 / share_i. With q = sum_ik V_ik^2 / r_i^2, n = T K and v degrees,

            -sum_ik log r_i - (v + n)/2 log(1 + q / v) + constant,    or -q/2 of normal loadings
        """
        n_tokens, n_latents = v.shape[1:]
        precision = np.exp(log_share) / self.scale**2  # (B, T)
        q = np.square(v).sum(2) * precision  # (B, T)
        value, weight = self._radial(q.sum(1), n_tokens * n_latents)
        value = value + n_latents * (0.5 * log_share.sum(1) - n_tokens * math.log(self.scale))
        slope = -(precision * weight[:, None])[:, :, None] * v
        return value, slope, 0.5 * n_latents - 0.5 * q * weight[:, None]

    def log_ratio(self, other: FactorPrior, q: Array, n: int) -> Array:
        """log other / self (B,) of n loadings whose squares in units of this scale add up to q (B,)."""
        ratio = other.scale / self.scale
        return other._radial(q / ratio**2, n)[0] - n * math.log(ratio) - self._radial(q, n)[0]

    def _radial(self, q: Array, n: int) -> tuple[Array, Array]:
        """Log density (B,) of n entries of scale one by their squared length, and -2 times its derivative."""
        v = self.degrees
        if math.isinf(v):
            return -0.5 * n * LOG_2PI - 0.5 * q, np.ones_like(q)
        constant = gammaln((v + n) / 2) - gammaln(v / 2) - 0.5 * n * math.log(v * math.pi)
        return constant - 0.5 * (v + n) * np.log1p(q / v), (v + n) / (v + q)


def factor_prior(rows: NDArray[np.floating], weight: Array | None = None) -> FactorPrior:
    """The prior of a table: centred at its mean, in units of its variances.

    Parameters
    ----------
    rows : array of shape (N, T)
        NaN where missing. With missing cells mean and variances are those of a normal with any covariance, fitted
        to the observed cells, and not those of the observed cells, which holes that follow other columns move.
    weight : array of shape (N,), optional
        How many rows each stands for.
    """
    if weight is not None or np.isnan(rows).any():
        center, cov = saturated(rows.astype(float), np.ones(len(rows)) if weight is None else weight)
        return FactorPrior(center, np.diag(cov))
    return FactorPrior(rows.mean(0, dtype=float), rows.var(0, dtype=float))
