"""The law of a new row given the rows of a table, what was estimated integrated: of such laws an average is a mixture.

Each kind of evidence has its own, and all can be asked the same (`RowPredictive`). Of a factor model it is the normal
with the posterior means of its mean and covariance, of draws of mixtures the mixture of all (`GaussianRows`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, softmax

__all__ = ["GaussianRows", "RowPredictive", "patterns"]

Array = NDArray[np.float64]

LOG_2PI = math.log(2 * math.pi)
MAX_CELLS = 2**22  # of rows under all parts, at a time


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
    """Rows of one normal or of a mixture of M: x ~ sum_m share_m N(mean_m, covariance_m).

    A posterior that is told by draws of weights, means and covariances is such a mixture of all of them together.

    Examples
    --------
    >>> law = GaussianRows.of(np.zeros(2), np.array([[1.0, 0.6], [0.6, 1.0]]))
    >>> law.log_prob(np.array([[0.0, np.nan], [np.nan, np.nan]])).round(4).tolist()
    [-0.9189, 0.0]
    >>> [cells.round(4).tolist() for cells in law.fill(np.array([[2.0, np.nan]]))]
    [[[2.0, 1.2]], [[0.0, 0.64]]]
    """

    share: Array
    """(M,) adding up to one."""
    means: Array
    """(M, T)"""
    covariances: Array
    """(M, T, T)"""

    @classmethod
    def of(cls, mean: Array, covariance: Array) -> Self:
        """One normal."""
        return cls(np.ones(1), mean[None], covariance[None])

    def log_prob(self, rows: Array) -> Array:
        """As `RowPredictive.log_prob`."""
        out = np.zeros(len(rows))
        for index, seen in self._parts(rows):
            if seen.any():
                out[index] = logsumexp(self._log_joint(rows[index], seen), axis=0)
        return out

    def sample(self, n_rows: int, rng: np.random.Generator) -> Array:
        """As `RowPredictive.sample`."""
        part = rng.choice(len(self.share), size=n_rows, p=self.share)
        z = rng.standard_normal((n_rows, self.means.shape[1]))
        roots = np.linalg.cholesky(self.covariances)
        if len(self.share) == 1:
            return np.asarray(self.means[0] + z @ roots[0].T)
        return np.asarray(self.means[part] + np.einsum("nij,nj->ni", roots[part], z))

    def fill(self, rows: Array) -> tuple[Array, Array]:
        """As `RowPredictive.fill`; of one part m_h + C_ho C_oo^-1 (x_o - m_o), and diag(C_hh - C_ho C_oo^-1 C_oh)."""
        mean, var = rows.astype(np.float64), np.zeros(rows.shape)
        for index, seen in self._parts(rows):
            hidden = ~seen
            if not hidden.any():
                continue
            some = rows[index]
            with np.errstate(invalid="ignore"):  # NaN of a cell that is as good as infinite
                weight = softmax(self._log_joint(some, seen), axis=0)[:, :, None]  # (M, n, 1)
            across = self.covariances[:, seen][:, :, hidden]  # (M, O, H)
            gain = np.linalg.solve(self.covariances[:, seen][:, :, seen], across)
            own = self.covariances[:, hidden, hidden] - (gain * across).sum(1)  # (M, H)
            each = (
                self.means[:, None, hidden] + (some[:, seen] - self.means[:, None, seen]) @ gain
            )  # (M, n, H)
            whole = (weight * each).sum(0)
            mean[np.ix_(index, hidden)] = whole
            with np.errstate(over="ignore", invalid="ignore"):
                between = np.square(each - whole)
            var[np.ix_(index, hidden)] = (weight * (np.maximum(own, 0)[:, None] + between)).sum(0)
        return mean, var

    def _log_joint(self, rows: Array, seen: NDArray[np.bool_]) -> Array:
        """log share + log density (M, n) of the cells that all of the rows show."""
        root = np.linalg.cholesky(self.covariances[:, seen][:, :, seen])  # (M, O, O)
        off = (rows[:, seen] - self.means[:, None, seen]).swapaxes(1, 2)  # (M, O, n)
        white = np.linalg.solve(root, off)
        log_det = 2 * np.log(np.diagonal(root, axis1=1, axis2=2)).sum(1)
        with np.errstate(divide="ignore"):
            constant = np.log(self.share) - 0.5 * (log_det + int(seen.sum()) * LOG_2PI)
        with np.errstate(over="ignore"):  # -inf is the nearest number
            return np.asarray(constant[:, None] - 0.5 * np.square(white).sum(1))

    def _parts(self, rows: Array) -> Iterator[tuple[NDArray[np.intp], NDArray[np.bool_]]]:
        """As `patterns`, some rows at a time."""
        size = max(1, MAX_CELLS // self.means.size)
        for index, seen in patterns(rows):
            for i in range(0, len(index), size):
                yield index[i : i + size], seen


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
