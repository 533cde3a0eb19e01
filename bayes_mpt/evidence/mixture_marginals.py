"""What rows with missing cells say of the components of a Gaussian mixture, in whitened coordinates.

With C = L L', a row that shows the columns o says of z = L^-1 (x - mu) that it is normal around y = W' e with the
covariance I - Pi, where R R' = L_o L_o', W = R^-1 L_o has orthonormal rows, Pi = W' W, and e = R^-1 (x_o - mu_o):

    log p(x_o) = -1/2 e'e - log det R - d/2 log 2 pi

Of a complete row y = e and Pi = I.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

__all__ = ["Mixture", "Pattern", "Seen", "patterns_of", "seen_of"]

Array = NDArray[np.float64]

LOG_2PI = math.log(2 * math.pi)


class Mixture(NamedTuple):
    """A point in the space of the parameters."""

    log_weights: Array
    """(K,)"""
    loc: Array
    """(K, T)"""
    root: Array
    """(K, T, T) L; any root of the covariance."""


class Pattern(NamedTuple):
    """Rows that show the same columns."""

    columns: NDArray[np.intp]
    """(d,)"""
    rows: Array
    """(n, d)"""


class Seen(NamedTuple):
    """What the rows of a pattern say of the components."""

    log_joint: Array
    """(n, K) log w + log p(x_o)."""
    share: Array
    """(n, K) responsibilities r."""
    y: Array
    """(n, K, T)"""
    known: Array
    """(K, T, T) Pi."""


def patterns_of(rows: Array) -> list[Pattern]:
    """Rows (N, T) that show something, by the columns that they show."""
    shown = ~np.isnan(rows)
    found, which = np.unique(shown, axis=0, return_inverse=True)
    parts = [
        (np.flatnonzero(columns), rows[which.reshape(-1) == i][:, columns]) for i, columns in enumerate(found)
    ]
    return [Pattern(columns, some) for columns, some in parts if len(columns)]


def seen_of(patterns: list[Pattern], mix: Mixture) -> Iterator[Seen]:
    """One pattern after the other."""
    for columns, rows in patterns:
        part = mix.root[:, columns]  # (K, d, T)
        r = np.linalg.cholesky(part @ part.swapaxes(1, 2))
        w = np.linalg.solve(r, part)
        off = rows - mix.loc[:, None, columns]  # (K, n, d)
        e = np.linalg.solve(r, off.swapaxes(1, 2))  # (K, d, n)
        log_det = np.log(np.diagonal(r, axis1=1, axis2=2)).sum(1)
        log_p = -0.5 * (e**2).sum(1) - (log_det + 0.5 * len(columns) * LOG_2PI)[:, None]
        log_joint = (log_p + mix.log_weights[:, None]).T
        share = np.exp(log_joint - logsumexp(log_joint, axis=1, keepdims=True))
        yield Seen(log_joint, share, np.einsum("kdt,kdn->nkt", w, e), w.swapaxes(1, 2) @ w)
