"""The law of a new row given the rows of a table, what was estimated integrated: of such laws an average is a mixture.

Each kind of evidence has its own, and all can be asked the same (`RowPredictive`). Of a factor model it is the Gaussian
with the posterior means of its mean and covariance (`GaussianRows`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular

__all__ = ["GaussianRows", "RowPredictive", "patterns"]

Array = NDArray[np.float64]

LOG_2PI = math.log(2 * math.pi)


class RowPredictive(Protocol):
    """The law of one new row; cells that are NaN are hidden, and rows are asked about one by one."""

    def log_prob(self, rows: Array) -> Array:
        """Nats of the observed cells of each row: (N, T) -> (N,); 0 of a row without any."""
        ...

    def sample(self, n_rows: int, rng: np.random.Generator) -> Array:
        """Independent rows (n_rows, T)."""
        ...

    def fill(self, rows: Array) -> tuple[Array, Array | None]:
        """Means and variances (N, T) of all cells given the observed ones of the row; of these themselves, and 0.

        No variances where they are not told.
        """
        ...


@dataclass(frozen=True, eq=False)
class GaussianRows:
    """Rows x ~ N(mean, covariance).

    Examples
    --------
    >>> law = GaussianRows(np.zeros(2), np.array([[1.0, 0.6], [0.6, 1.0]]))
    >>> law.log_prob(np.array([[0.0, np.nan], [np.nan, np.nan]])).round(4).tolist()
    [-0.9189, 0.0]
    >>> [cells.round(4).tolist() for cells in law.fill(np.array([[2.0, np.nan]]))]
    [[[2.0, 1.2]], [[0.0, 0.64]]]
    """

    mean: Array
    """(T,)"""
    covariance: Array
    """(T, T)"""

    def log_prob(self, rows: Array) -> Array:
        """As `RowPredictive.log_prob`."""
        out = np.zeros(len(rows))
        for index, seen in patterns(rows):
            root = cholesky(self.covariance[np.ix_(seen, seen)], lower=True)
            off = (rows[np.ix_(index, seen)] - self.mean[seen]).T
            white = solve_triangular(root, off, lower=True)  # (O, n)
            constant = len(root) * LOG_2PI + 2 * np.log(np.diag(root)).sum()
            out[index] -= 0.5 * (np.square(white).sum(0) + constant)
        return out

    def sample(self, n_rows: int, rng: np.random.Generator) -> Array:
        """As `RowPredictive.sample`."""
        root = cholesky(self.covariance, lower=True)
        return np.asarray(self.mean + rng.standard_normal((n_rows, len(self.mean))) @ root.T)

    def fill(self, rows: Array) -> tuple[Array, Array]:
        """As `RowPredictive.fill`: m_h + C_ho C_oo^-1 (x_o - m_o), and the diagonal of C_hh - C_ho C_oo^-1 C_oh."""
        mean, var = rows.astype(np.float64), np.zeros(rows.shape)
        for index, seen in patterns(rows):
            hidden = ~seen
            root = cholesky(self.covariance[np.ix_(seen, seen)], lower=True)
            across = solve_triangular(root, self.covariance[np.ix_(seen, hidden)], lower=True)  # (O, H)
            off = (rows[np.ix_(index, seen)] - self.mean[seen]).T
            white = solve_triangular(root, off, lower=True)  # (O, n)
            mean[np.ix_(index, hidden)] = self.mean[hidden] + white.T @ across
            rest = np.diag(self.covariance)[hidden] - np.square(across).sum(0)
            var[np.ix_(index, hidden)] = np.maximum(rest, 0.0)
        return mean, var


def patterns(rows: Array) -> Iterator[tuple[NDArray[np.intp], NDArray[np.bool_]]]:
    """Rows that show the same cells together: their places, and which columns (T,) those are.

    Examples
    --------
    >>> [(i.tolist(), s.tolist()) for i, s in patterns(np.array([[1.0, np.nan], [2.0, 3.0], [4.0, np.nan]]))]
    [([0, 2], [True, False]), ([1], [True, True])]
    """
    shown, group = np.unique(~np.isnan(rows), axis=0, return_inverse=True)
    group = group.reshape(-1)
    for g, seen in enumerate(shown):
        yield (group == g).nonzero()[0], seen
