"""A table as a few weighted rows, and what else is found of it once.

A linear-Gaussian map that all rows share sees complete rows only through their mean and covariance S = R' R. So the
rows mean +- sqrt(r) R_j, with R_j the r <= T rows of a root R, stand for a table of any length: every mask policy,
chain and gradient sums over them exactly. Rows with missing cells are kept as they are.

Squaring costs half of the digits. So where there are no more rows than columns, or where columns all but repeat each
other, the root is made of the rows themselves, by reflections, and S never; elsewhere S is what is summed up.

A search fits one table many times: what one fit has found of it the next ones know (`unchanged`).
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg.lapack import dpocon, dpotrf
from torch import Tensor

from bayes_mpt.inputs import tensor_of
from bayes_mpt.program.devices import at_once

__all__ = ["Covariance", "SufficientStatistics", "digest_of_rows", "far_means", "known_of", "unchanged"]

CHUNK_CELLS = 2**17  # 1 MiB of float64: a chunk is read from memory once and stays in the cache
MIN_PIVOT = 1e-4  # of a factor of the correlations; below it their rank is told by eigenvalues
MIN_CONDITION = 1e-6  # of the correlations; below it less than ten digits are left of the least variances
FAR = 1e3  # standard deviations: means farther from zero cost the spread three digits and more


class Covariance(NamedTuple):
    """A covariance (T, T): as a matrix, or as the products S = R' R of the columns of fewer rows, never squared."""

    matrix: NDArray[np.float64] | None = None
    """(T, T); None where there are rows."""
    rows: NDArray[np.float64] | None = None
    """(R, T), R <= T."""
    maxima: dict[tuple[int, int], Any] | None = None
    """Where maxima of factors were found before (`bayes_mpt.predictors.gaussian.modes`): what is found is put there,
    and is the same without it."""

    @property
    def variances(self) -> NDArray[np.float64]:
        """(T,) the diagonal."""
        if self.rows is not None:
            return np.square(self.rows).sum(0)
        assert self.matrix is not None
        return np.diag(self.matrix)

    def dense(self) -> NDArray[np.float64]:
        """The matrix (T, T)."""
        if self.rows is not None:
            return self.rows.T @ self.rows
        assert self.matrix is not None
        return self.matrix

    def among(self, columns: NDArray[np.intp]) -> NDArray[np.float64]:
        """The matrix of some of the columns."""
        if self.rows is not None:
            return self.rows[:, columns].T @ self.rows[:, columns]
        return self.dense()[np.ix_(columns, columns)]


class SufficientStatistics:
    """Count, mean and covariance of the complete rows, and the incomplete rows themselves.

    Parameters
    ----------
    x : array or tensor of shape (N, T)
        NaN where missing. Read once, by chunks, so that a memory map is never copied; three times where columns all but
        repeat each other.
    device : str, default="cpu"
        Where the sums are taken.
    shift : array of shape (T,), optional
        Subtracted from every row before anything is computed.

    Attributes
    ----------
    n : int
        Complete rows.
    mean : Tensor of shape (T,)
        Their mean, float64, less the shift.
    incomplete : Tensor of shape (M, T)
        Rows with missing cells, less the shift.

    Examples
    --------
    >>> x = torch.arange(20.0, dtype=torch.float64).reshape(10, 2) ** 2
    >>> rows, weights = SufficientStatistics(x).rows()
    >>> rows.shape, float(weights.sum())
    (torch.Size([4, 2]), 10.0)
    """

    def __init__(
        self,
        x: NDArray[np.floating] | Tensor,
        device: str = "cpu",
        shift: NDArray[np.float64] | None = None,
    ):
        n_rows, n_tokens = x.shape
        self.n = 0
        self.mean = torch.zeros(n_tokens, dtype=torch.float64, device=device)
        self._cov: Tensor | None = None
        self._root: Tensor | None = None
        self._maxima: dict[tuple[int, int], Any] = {}
        self._rows: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        wide = n_rows <= n_tokens
        if not wide:
            self._cov = torch.zeros(n_tokens, n_tokens, dtype=torch.float64, device=device)
        complete, incomplete = [], []
        for chunk in _chunks(x, device, shift):
            mean = chunk.mean(0)
            if (mean != mean).any():  # NaN, in numpy and torch alike
                missing = (chunk != chunk).any(1)
                incomplete.append(torch.as_tensor(chunk[missing]))
                chunk = chunk[~missing]
                if not len(chunk):
                    continue
                mean = chunk.mean(0)
            if wide:
                complete.append(tensor_of(chunk) if isinstance(chunk, np.ndarray) else chunk)
                continue
            centred = chunk - mean
            with np.errstate(
                over="ignore", invalid="ignore"
            ):  # an infinite covariance is for the caller to refuse
                product = centred.T @ centred  # numpy knows that this is symmetric, which halves the work
            self._merge(len(chunk), torch.as_tensor(mean), torch.as_tensor(product) / len(chunk), None)
        self.incomplete = torch.cat(incomplete) if incomplete else self.mean.new_zeros(0, n_tokens)
        if wide:
            rows = torch.cat(complete) if complete else self.mean.new_zeros(0, n_tokens)
            self._merge(*_moments_of_few(rows))
        elif self.n and _ill_conditioned(self.cov):
            self._take_root(x, device, shift)

    def _take_root(
        self, x: NDArray[np.floating] | Tensor, device: str, shift: NDArray[np.float64] | None
    ) -> None:
        """Two more passes over the complete rows: what the mean missed, then a root without squaring."""
        missed = torch.zeros_like(self.mean)
        for chunk in _chunks(x, device, shift):
            missed += _complete(chunk - _same_kind(self.mean, chunk)).sum(0)
        self.mean = self.mean + missed / self.n
        root = self.mean.new_zeros(0, len(self.mean))
        waiting: list[Tensor] = []
        for chunk in _chunks(x, device, shift):
            waiting.append(_complete(chunk - _same_kind(self.mean, chunk)))
            # a factorisation of few rows more than columns would do the work of the columns again and again
            if sum(map(len, waiting)) >= 4 * len(self.mean):
                root, waiting = _triangular(torch.cat([root, *waiting])), []
        self._root = _triangular(torch.cat([root, *waiting])) / math.sqrt(self.n)
        self._cov = None

    @property
    def cov(self) -> Tensor:
        """(T, T) covariance of the complete rows, divided by n."""
        if self._cov is not None:
            return self._cov
        assert self._root is not None
        return self._root.mT @ self._root

    @property
    def variance(self) -> Tensor:
        """(T,) variances of the complete rows, divided by n."""
        if self._cov is not None:
            return self._cov.diagonal()
        assert self._root is not None
        return self._root.square().sum(0)

    @property
    def covariance(self) -> Covariance:
        """Covariance of the complete rows (divided by n) as it is held: (T, T), or a root that was never squared."""
        if self._root is None:
            return Covariance(self.cov.cpu().numpy(), maxima=self._maxima)
        return Covariance(rows=self._root.cpu().numpy(), maxima=self._maxima)

    @property
    def n_cells(self) -> int:
        """Numbers in what stands for the complete rows."""
        held = self._root if self._cov is None else self._cov
        assert held is not None
        return held.numel()

    def update(self, other: SufficientStatistics) -> Self:
        """Add the rows of others."""
        self._merge(other.n, other.mean, other._cov, other._root)
        self.incomplete = torch.cat([self.incomplete, other.incomplete])
        return self

    def of_cells(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the observed cells of each column: how many, their mean, and their squares around it summed, (T,) each."""
        cells = self.incomplete
        if not len(cells):
            return torch.full_like(self.mean, self.n), self.mean, self.n * self.variance
        count = self.n + (~cells.isnan()).sum(0)
        mean = (self.n * self.mean + cells.nan_to_num(0.0).sum(0)) / count
        around = torch.where(cells.isnan(), 0.0, cells - mean).square().sum(0)
        return count, mean, self.n * (self.variance + (self.mean - mean).square()) + around

    def available(self) -> SufficientStatistics:
        """Moments of the pairs of cells that were observed together: a start, not an estimate.

        Each covariance is the mean over the rows that show both tokens, which is consistent where cells are missing at
        random; what makes the matrix indefinite is cut off. ``n`` becomes the mean number of such rows.
        """
        cells = self.incomplete
        seen = (~cells.isnan()).to(cells)
        count = self.n + seen.mT @ seen  # (T, T)
        single, mean, _ = self.of_cells()
        centred = torch.where(cells.isnan(), 0.0, cells - mean)
        shift = self.mean - mean
        product = self.n * (self.cov + torch.outer(shift, shift)) + centred.mT @ centred
        sd = (product.diagonal() / single).sqrt()
        unit = torch.where(sd > 0, sd, torch.ones_like(sd))
        value, vector = torch.linalg.eigh(product / count.clamp(min=1) / unit / unit[:, None])
        result = SufficientStatistics(cells[:0], device=str(cells.device))
        result.mean = mean
        result._root = None
        result._cov = unit * unit[:, None] * ((vector * value.clamp(min=1e-3)) @ vector.mT)
        result.n = max(1, int(count.mean()))
        return result

    @property
    def full_rank(self) -> bool:
        """Whether there are complete rows, and they are known to differ in all directions by more than rounding."""
        return self._cov is not None and self.n > len(self.mean) and bool((self.variance > 0).all())

    @property
    def n_rows(self) -> int:
        """N, complete rows and others."""
        return self.n + len(self.incomplete)

    @property
    def complete(self) -> bool:
        """Whether no cell is missing."""
        return not len(self.incomplete)

    def rows(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Weighted rows (R, T), (R,) that stand for the table, for a program of this dtype; the weights add up to N."""
        if not self.n:
            return self.incomplete.to(dtype), self.mean.new_ones(len(self.incomplete), dtype=dtype)
        if dtype in self._rows:
            return self._rows[dtype]
        root = _some_root(self._cov, self._root)
        if not len(root):  # of a single row
            root = root.new_zeros(1, len(self.mean))
        step = math.sqrt(len(root)) * root
        rows = torch.cat([self.mean + step, self.mean - step, self.incomplete])
        weight = torch.full((2 * len(root),), self.n / (2 * len(root)), dtype=rows.dtype, device=rows.device)
        weight = torch.cat([weight, weight.new_ones(len(self.incomplete))])
        self._rows[dtype] = rows.to(dtype), weight.to(dtype)
        return self._rows[dtype]

    def moved(self, by: Tensor) -> SufficientStatistics:
        """The table of the same rows with ``by`` (T,) added to each."""
        new = object.__new__(SufficientStatistics)
        new.n, new._cov, new._root, new._maxima, new._rows = self.n, self._cov, self._root, self._maxima, {}
        new.mean, new.incomplete = self.mean + by, self.incomplete + by
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_maxima": {}, "_rows": {}}  # which only save time

    def _merge(self, n: int, mean: Tensor, cov: Tensor | None, root: Tensor | None) -> None:
        """Chan, Golub & LeVeque (1983): pool two groups' moments without cancellation."""
        self._maxima, self._rows = {}, {}
        if not n:
            if self._cov is None and self._root is None:
                self._cov, self._root = cov, root
            return
        if not self.n:
            self.n, self.mean, self._cov, self._root = n, mean, cov, root
            return
        total = self.n + n
        share = n / total
        shift = mean - self.mean
        if self._cov is not None and cov is not None:
            cov = (1 - share) * self._cov + share * cov + share * (1 - share) * torch.outer(shift, shift)
            self._cov = cov
        else:
            # R' R = (1 - s) R_1' R_1 + s R_2' R_2 + s (1 - s) d d'
            mine, other = _some_root(self._cov, self._root), _some_root(cov, root)
            parts = [
                (1 - share) ** 0.5 * mine,
                share**0.5 * other,
                (share * (1 - share)) ** 0.5 * shift[None],
            ]
            stacked = torch.cat(parts)
            self._cov, self._root = None, stacked if len(stacked) <= len(shift) else _triangular(stacked)
        self.mean = self.mean + share * shift
        self.n = total


def far_means(statistics: SufficientStatistics) -> NDArray[np.float64] | None:
    """The means (T,) of the observed cells of columns whose mean is far from zero beside their spread; 0 of others.

    None where there is no such column. Less these, a column keeps the digits of its spread.
    """
    count, mean, square = statistics.of_cells()
    sd = (square / count).sqrt()
    far = torch.isfinite(mean) & (sd > 0) & (mean.abs() > FAR * sd)
    return torch.where(far, mean, 0.0).cpu().numpy() if bool(far.any()) else None


def digest_of_rows(X: NDArray[np.floating]) -> str:
    """A fingerprint of rows, features and scaling: of each block of rows the checksum and sums by column, hashed.

    A checksum tells orders apart and takes half the time of a cryptographic hash; the sums make it longer.
    """
    known = known_of(X)
    if "digest" in known:
        return str(known["digest"])
    h = hashlib.sha256(repr(X.shape).encode())
    step = max(1, 2**17 // max(1, X.shape[1]))
    for start in range(0, len(X), step):
        bits = np.ascontiguousarray(X[start : start + step], dtype=np.float64).view(np.uint64)
        h.update(zlib.crc32(bits.data).to_bytes(4))
        h.update(np.add.reduce(bits, axis=0, dtype=np.uint64).tobytes())
    known["digest"] = h.hexdigest()[:16]
    return str(known["digest"])


_HELD: ContextVar[tuple[Any, dict[Hashable, Any]] | None] = ContextVar("held", default=None)


@contextmanager
def unchanged(table: Any) -> Iterator[None]:
    """Inside ``with``, in this thread, a table stays as it is: what is put into `known_of` it is there the next time.

    Other threads and processes look for themselves.
    """
    token = _HELD.set((table, {}))
    try:
        yield
    finally:
        _HELD.reset(token)


def known_of(table: Any) -> dict[Hashable, Any]:
    """What has been found of a table, which nobody changes, to be added to; forgotten where no `unchanged` holds it.

    Examples
    --------
    >>> with unchanged(table := [1, 2]):
    ...     known_of(table)["sum"] = 3
    ...     known_of(table), known_of([1, 2])
    ({'sum': 3}, {})
    """
    held = _HELD.get()
    return held[1] if held is not None and held[0] is table else {}


def _moments_of_few(rows: Tensor) -> tuple[int, Tensor, None, Tensor]:
    """Count, mean and a root (n - 1, T) of no more rows than columns."""
    n = len(rows)
    if n < 2:
        mean = rows.sum(0)
        return n, mean, None, rows.new_zeros(0, rows.shape[1])
    mean = rows.mean(0)
    mean = mean + (rows - mean).mean(0)
    centred = (rows - mean) / math.sqrt(n)
    # H = I - 2 v v' takes the direction (1, ..., 1), along which centred rows are zero, to the first axis
    v = rows.new_full((n,), n**-0.5)
    v[0] -= 1
    v = v / v.norm()
    return n, mean, None, (centred - 2 * torch.outer(v, v @ centred))[1:]


def _triangular(rows: Tensor) -> Tensor:
    """(n, T) -> (min(n, T), T) with the same products of columns."""
    return torch.linalg.qr(rows, mode="r")[1]


def _some_root(cov: Tensor | None, root: Tensor | None) -> Tensor:
    """(r, T), R' R = S, of moments that are held as one or the other.

    In units of the standard deviations: with mixed scales (1e-8 .. 1e8) a root of the covariance itself would lose the
    small columns.
    """
    if root is not None:
        return root
    assert cov is not None
    sd = cov.diagonal().sqrt()
    unit = torch.where(sd > 0, sd, torch.ones_like(sd))
    corr = cov / unit / unit[:, None]
    lower, failed = torch.linalg.cholesky_ex(corr)
    if not failed and bool(lower.diagonal().min() > MIN_PIVOT):
        return sd * lower.mT
    value, vector = torch.linalg.eigh(corr)
    value = torch.where(value > 1e-13 * len(cov) * value[-1], value, 0.0)  # no variation out of rounding
    return sd * (vector * value.sqrt()).mT


def _ill_conditioned(cov: Tensor) -> bool:
    """Whether the correlations of the columns that vary have so small an eigenvalue that squaring lost its digits."""
    s = cov.cpu().numpy()
    sd = np.sqrt(np.diag(s))
    varies = sd > 0
    if not np.isfinite(sd).all() or not varies.any():
        return False
    corr = s[np.ix_(varies, varies)] / sd[varies] / sd[varies, None]
    factor, failed = dpotrf(corr, lower=1)
    if failed:
        return True
    # |R|_1 <= T
    rcond, _ = dpocon(factor, np.abs(corr).sum(0).max(), uplo="L")
    return bool(rcond < MIN_CONDITION)


def _complete(chunk: Any) -> Tensor:
    """Rows of a chunk without NaN."""
    rows = torch.as_tensor(chunk)
    return rows[~rows.isnan().any(1)]


def _same_kind(values: Tensor, chunk: Any) -> Any:
    """A tensor as an array where the chunk is one."""
    return values if isinstance(chunk, Tensor) else values.cpu().numpy()


def _chunks(
    x: NDArray[np.floating] | Tensor, device: str, shift: NDArray[np.float64] | None
) -> Iterator[Any]:
    """Blocks of rows in float64, less the shift: numpy arrays on the CPU, tensors elsewhere."""
    n_cells = CHUNK_CELLS if device == "cpu" else at_once(CHUNK_CELLS, torch.device(device))
    step = max(1, n_cells // max(1, x.shape[1]))
    for start in range(0, len(x), step):
        chunk = x[start : start + step]
        if device == "cpu":
            rows = np.asarray(chunk, dtype=np.float64)
            yield rows if shift is None else rows - shift
        else:
            chunk = chunk if isinstance(chunk, Tensor) else torch.from_numpy(np.array(chunk))
            chunk = chunk.to(device=device, dtype=torch.float64)
            yield chunk if shift is None else chunk - torch.as_tensor(shift).to(chunk)
