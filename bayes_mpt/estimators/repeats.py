"""Columns that are constant or repeat others, on which a density can rise without bound."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import qr, svd

__all__ = ["flat_direction", "repeated_columns"]

Array = NDArray[np.float64]

REPEATS = 1e-6  # of the largest spread: a column that adds less to others repeats them
FLAT = 1e-13  # of the largest spread, times rows or columns: rounding
ROWS = 2  # for each column, that are looked at


def repeated_columns(rows: NDArray[np.floating]) -> list[int]:
    """Columns of the complete rows (N, T) that are constant, or sums of multiples of others: the fewest to be dropped.

    Of columns that repeat each other one is left out, the first where they are alike.
    """
    x, _ = _standard(rows)
    if not x.size:
        return []
    r, order = qr(x, mode="r", pivoting=True, check_finite=False)
    size = np.zeros(x.shape[1])
    size[: min(x.shape)] = np.abs(np.diag(r))
    return sorted(int(i) for i in order[size <= REPEATS * max(size.max(), np.finfo(float).tiny)])


def flat_direction(rows: NDArray[np.floating]) -> Array | None:
    """A direction (T,) in which the complete rows (N, T) have no spread at all; None where there is none.

    In the units of the columns, as long as the least spread in other directions.
    """
    x, unit = _standard(rows)
    if not x.size or not x.any():
        return None
    n_rows, n_columns = x.shape
    # all directions, those beyond N rows included: of many columns a few more rows of zeros do
    padded = x if n_rows >= n_columns else np.vstack([x, np.zeros((1, n_columns))])
    _, spread, directions = svd(padded, full_matrices=False, check_finite=False)
    flat = spread <= FLAT * max(x.shape) * spread[0]
    if not flat.any():
        return None
    least = spread[~flat][-1] / np.sqrt(n_rows)
    return unit * least * directions[-1]


def _standard(rows: NDArray[np.floating]) -> tuple[Array, Array]:
    """Some complete rows in units of their columns' spread, and these units; a constant has that of the others."""
    x = np.asarray(rows, dtype=np.float64)
    complete = np.flatnonzero(~np.isnan(x.sum(1)))  # a memory map is not copied
    n_most = ROWS * x.shape[1] + 1
    if len(complete) > n_most:
        complete = complete[np.linspace(0, len(complete) - 1, n_most).round().astype(int)]
    x = x[complete]
    if len(x) < 2:
        return np.empty((0, 0)), np.empty(0)
    same = (x == x[0]).all(0)
    centred = np.where(same, 0.0, x - x.mean(0))
    unit = np.sqrt((centred**2).mean(0))
    unit[same] = np.median(unit[~same]) if not same.all() else 1.0
    return centred / unit, unit
