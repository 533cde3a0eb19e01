"""Log posterior of factor models on rows with missing cells, the mean among its coordinates.

Coordinates theta = (V, e, nu), V and e as in `factor_posterior`, nu = (mu - m0) / u^1/2 (T,). A row that shows the
tokens o has the density of its observed cells, N(mu_o, C_oo). With V_o = V on o and zero elsewhere, M_o = I + V_o'V_o
and y = psi^-1/2 (x - mu) on o, zero elsewhere,

    log p(x_o) = -1/2 (|o| log 2 pi + sum_o (log u + e) + log |M_o| + y'r),    r = y - V_o M_o^-1 V_o'y = A_oo^-1 y

Rows of one pattern enter by the triangular root of their products, so that complete rows cost no more than T + 1 of
them: the squares of a root's rows l - c nu, c its column of ones, add up to those of the rows. The prior of the mean,
N(m0, C / kappa), is one more complete row with x = m0 and c = kappa^1/2.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from bayes_mpt.evidence.factor_posterior import FactorPosterior, information
from bayes_mpt.evidence.factor_prior import LOG_2PI, FactorPrior

__all__ = ["IncompletePosterior"]

Array = NDArray[np.float64]

CHUNK_CELLS = 2**17  # points x rows x tokens at a time: what stays in the cache


class IncompletePosterior(FactorPosterior):
    """Log joint density of the observed cells and (V, e, nu).

    Parameters
    ----------
    rows : array of shape (N, T)
        NaN where missing; rows without any cell are left out.
    n_latents : int
        K.
    prior : FactorPrior
    shape : array of shape (T,), optional
        As of `FactorPosterior`.
    """

    def __init__(self, rows: Array, n_latents: int, prior: FactorPrior, shape: Array | None = None):
        super().__init__(len(rows), n_latents, prior, shape)
        x = (rows - prior.center) / np.sqrt(self.units)
        seen = ~np.isnan(x)
        patterns, of_row = np.unique(seen[seen.any(1)], axis=0, return_inverse=True)
        x, of_row = np.where(seen, x, 0.0)[seen.any(1)], of_row.reshape(-1)
        parts, groups = [], []
        for g in range(len(patterns)):
            mine = x[of_row == g]
            both = np.concatenate([np.ones((len(mine), 1)), mine], 1)  # (n, 1 + T)
            if len(mine) > self.n_tokens + 1:
                both = np.asarray(np.linalg.qr(both, mode="r"))
            parts.append(both)
            groups.append(np.full(len(both), g))
        everything = np.ones((1, self.n_tokens), dtype=bool)
        mean_prior = np.concatenate([[[math.sqrt(prior.kappa)]], np.zeros((1, self.n_tokens))], 1)
        self.patterns = np.concatenate([patterns, everything])  # (G, T), the last the prior of the mean
        self.count = np.append(np.bincount(of_row, minlength=len(patterns)), 1.0)  # (G,)
        stacked = np.concatenate([*parts, mean_prior])
        self.ones, self.rows = stacked[:, 0], np.ascontiguousarray(stacked[:, 1:])  # (R,), (R, T)
        self.group = np.append(np.concatenate(groups), len(patterns)).astype(int)
        self.shown = self.patterns.astype(float)
        self.cells = seen.sum(0).astype(float)  # (T,)
        self.constant = 0.5 * self.n_tokens * (math.log(prior.kappa) - LOG_2PI)
        self.constant -= 0.5 * float((self.cells * (LOG_2PI + np.log(self.units))).sum())

    def _likelihood(self, v: Array, e: Array, rest: Array) -> tuple[Array, Array, Array, Array]:
        size = max(1, CHUNK_CELLS // self.rows.size)
        pieces = [
            self._of_some(v[i : i + size], e[i : i + size], rest[i : i + size])
            for i in range(0, len(v), size)
        ]
        value, slope_v, slope_e, slope_mean = (np.concatenate(p) for p in zip(*pieces, strict=True))
        return value, slope_v, slope_e, slope_mean

    def _of_some(self, v: Array, e: Array, nu: Array) -> tuple[Array, Array, Array, Array]:
        n_points, n_tokens, k = v.shape
        n_groups = len(self.shown)
        shown, root = self.shown[self.group], np.exp(-0.5 * e)  # (R, T), (B, T)
        y = (self.rows - self.ones[:, None] * nu[:, None]) * (shown * root[:, None])  # (B, R, T)
        # M of every pattern, with points and patterns as the last axes
        products = (v[:, :, :, None] * v[:, :, None, :]).transpose(2, 3, 0, 1)  # (K, K, B, T)
        m = (products.reshape(-1, n_tokens) @ self.shown.T).reshape(k, k, -1)
        m[np.arange(k), np.arange(k)] += 1
        inverse, log_det = _inverses(m)
        inverse, log_det = inverse.reshape(k, k, n_points, n_groups), log_det.reshape(n_points, n_groups)
        f = np.einsum("klbr,brl->brk", inverse[:, :, :, self.group], y @ v)  # (B, R, K) M^-1 V'y
        r = y - f @ v.transpose(0, 2, 1) * shown
        square = (r * y).sum(1)  # (B, T)
        cells = self.count @ self.shown
        value = self.constant - 0.5 * ((cells * e).sum(1) + log_det @ self.count + square.sum(1))
        # d/dV: sum_rows r f' - sum_patterns n V_o M_o^-1
        weighted = (inverse * self.count).reshape(-1, n_groups) @ self.shown  # (K K B, T)
        weighted = weighted.reshape(k, k, n_points, n_tokens)
        slope = r.transpose(0, 2, 1) @ f - np.einsum("btk,klbt->btl", v, weighted)
        return value, slope, -0.5 * (cells - square), root * np.einsum("r,brt->bt", self.ones, r)

    def information(self, theta: Array) -> Array:
        """Expected information (d, d) of the rows plus expected curvature of a normal prior, at one point (d,)."""
        v, e = (a[0] for a in self.split(theta[None]))
        fisher, _ = information(v, self.patterns, self.count)
        of_mean = self.count.copy()
        of_mean[-1] = self.prior.kappa
        root = np.exp(-0.5 * e)
        mean = root[:, None] * information(v, self.patterns, of_mean)[1] * root
        own = self._with_prior(fisher, e)
        result = np.zeros((len(own) + len(mean),) * 2)
        result[: len(own), : len(own)] = own
        result[len(own) :, len(own) :] = mean
        return result


def _inverses(m: Array) -> tuple[Array, Array]:
    """Inverses (K, K, B) of symmetric positive definite matrices side by side, and their log determinants (B,).

    Gauss and Jordan's elimination over K, with everything else in the batch.
    """
    m = m.copy()
    log_det = np.zeros(m.shape[2])
    for k in range(len(m)):
        pivot = m[k, k].copy()
        log_det += np.log(pivot)
        row, column = m[k] / pivot, m[:, k].copy()
        m -= column[:, None] * row[None]
        m[k], m[:, k] = row, -column / pivot
        m[k, k] = 1 / pivot
    return m, log_det
