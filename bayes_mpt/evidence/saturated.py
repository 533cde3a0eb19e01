"""The normal with any mean and covariance that fits the observed cells of a table: the units of priors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["saturated"]

Array = NDArray[np.float64]

MAX_EM = 500
EM_TOL = 1e-4  # of the change of means and covariances, in observed standard deviations
PSEUDO_ROWS = 1.0  # rows of independent columns that keep a saturated covariance definite


def saturated(rows: Array, weight: Array) -> tuple[Array, Array]:
    """Mean (T,) and covariance (T, T) of the normal that fits the observed cells of weighted rows, by EM.

    A row's worth of independent columns with the observed variances keeps the covariance definite.
    """
    seen, share = ~np.isnan(rows), weight[:, None]
    n_seen = (share * seen).sum(0)
    center = np.nansum(share * rows, 0) / n_seen
    sd = np.sqrt(np.nansum(share * (rows - center) ** 2, 0) / n_seen)
    sd = np.where(sd > 0, sd, 1.0)
    x = np.where(np.isnan(rows), 0.0, (rows - center) / sd)
    visible, pattern = np.unique(seen, axis=0, return_inverse=True)
    pattern = pattern.reshape(-1)
    count = np.bincount(pattern, weight).astype(float)
    n, n_tokens = float(weight.sum()), rows.shape[1]
    mean, cov = np.zeros(n_tokens), np.eye(n_tokens)
    for _ in range(MAX_EM):
        # E[x | x_o] = mean + C_.o C_oo^-1 (x_o - mean_o); with ones on the hidden diagonal C_oo^-1 is one batch
        shown = visible[:, :, None] & visible[:, None, :]  # (G, T, T)
        inner = np.where(shown, cov, 0.0) + np.eye(n_tokens) * ~visible[:, :, None]
        gain = np.linalg.inv(inner) * visible[:, None, :] @ cov  # (G, T, T), C_oo^-1 C_o.
        left = cov - (cov * visible[:, None, :]) @ (
            gain * visible[:, :, None]
        )  # (G, T, T) variance of the hidden
        residual = np.where(visible[pattern], x - mean, 0.0)
        full = np.einsum("rt,rts->rs", residual, (gain * visible[:, :, None])[pattern])
        step = weight @ full / n
        centred = full - step
        new = (
            (share * centred).T @ centred
            + np.einsum("g,gts->ts", count, left)
            + PSEUDO_ROWS * np.eye(n_tokens)
        )
        new /= n + PSEUDO_ROWS
        change = np.abs(new - cov).max() + np.abs(step).max()
        mean, cov = mean + step, new
        if change < EM_TOL:
            break
    return center + sd * mean, sd * sd[:, None] * cov
