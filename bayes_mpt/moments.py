"""A table as a few weighted rows.

A linear-Gaussian map that all rows share sees complete rows only through their mean and covariance. So the 2T rows
mean +- sqrt(T) r_j, with r_j the columns of a root of the covariance, stand for a table of any length: every mask
policy, chain and gradient sums over them exactly. Rows with missing cells are kept as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayes_mpt.devices import at_once

__all__ = ["Table"]

CHUNK_CELLS = 2**17  # 1 MiB of float64: a chunk is read from memory once and stays in the cache


class Table:
    """Count, mean and covariance of the complete rows, and the incomplete rows themselves.

    Parameters
    ----------
    x : array or tensor of shape (N, T)
        NaN where missing. Read once, by chunks, so that a memory map is never copied.
    device : str, default="cpu"
        Where the sums are taken.

    Attributes
    ----------
    n : int
        Complete rows.
    mean : Tensor of shape (T,)
        Their mean, float64.
    cov : Tensor of shape (T, T)
        Their covariance (divided by n), float64.
    incomplete : Tensor of shape (M, T)
        Rows with missing cells.

    Examples
    --------
    >>> x = torch.arange(20.0, dtype=torch.float64).reshape(10, 2) ** 2
    >>> rows, weights = Table(x).rows()
    >>> rows.shape, float(weights.sum())
    (torch.Size([4, 2]), 10.0)
    """

    def __init__(self, x: NDArray[np.floating] | Tensor, device: str = "cpu"):
        n_tokens = x.shape[1]
        self.n = 0
        self.mean = torch.zeros(n_tokens, dtype=torch.float64, device=device)
        self.cov = torch.zeros(n_tokens, n_tokens, dtype=torch.float64, device=device)
        incomplete = []
        for chunk in _chunks(x, device):
            mean = chunk.mean(0)
            if (mean != mean).any():  # NaN, in numpy and torch alike
                missing = (chunk != chunk).any(1)
                incomplete.append(torch.as_tensor(chunk[missing]))
                chunk = chunk[~missing]
                if not len(chunk):
                    continue
                mean = chunk.mean(0)
            centred = chunk - mean
            with np.errstate(
                over="ignore", invalid="ignore"
            ):  # an infinite covariance is for the caller to refuse
                product = centred.T @ centred  # numpy knows that this is symmetric, which halves the work
            self._merge(len(chunk), torch.as_tensor(mean), torch.as_tensor(product) / len(chunk))
        self.incomplete = torch.cat(incomplete) if incomplete else self.mean.new_zeros(0, n_tokens)

    def update(self, other: Table) -> Self:
        """Add another table's rows."""
        self._merge(other.n, other.mean, other.cov)
        self.incomplete = torch.cat([self.incomplete, other.incomplete])
        return self

    def available(self) -> Table:
        """Moments of the pairs of cells that were observed together: a start, not an estimate.

        Each covariance is the mean over the rows that show both tokens, which is consistent where cells are missing at
        random; what makes the matrix indefinite is cut off. ``n`` becomes the mean number of such rows.
        """
        cells = self.incomplete
        seen = (~cells.isnan()).to(cells)
        count = self.n + seen.mT @ seen  # (T, T)
        single = count.diagonal()
        mean = (self.n * self.mean + cells.nan_to_num(0.0).sum(0)) / single
        centred = torch.where(cells.isnan(), 0.0, cells - mean)
        shift = self.mean - mean
        product = self.n * (self.cov + torch.outer(shift, shift)) + centred.mT @ centred
        sd = (product.diagonal() / single).sqrt()
        unit = torch.where(sd > 0, sd, torch.ones_like(sd))
        value, vector = torch.linalg.eigh(product / count.clamp(min=1) / unit / unit[:, None])
        result = Table(cells[:0], device=str(cells.device))
        result.mean = mean
        result.cov = unit * unit[:, None] * ((vector * value.clamp(min=1e-3)) @ vector.mT)
        result.n = max(1, int(count.mean()))
        return result

    @property
    def n_rows(self) -> int:
        """N, complete rows and others."""
        return self.n + len(self.incomplete)

    @property
    def complete(self) -> bool:
        """Whether no cell is missing."""
        return not len(self.incomplete)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Weighted rows (R, T), (R,) that stand for the table; the weights add up to N."""
        n_tokens = len(self.mean)
        if not self.n:
            return self.incomplete, self.mean.new_ones(len(self.incomplete))
        # In units of the standard deviations: with mixed scales (1e-8 .. 1e8) a root of the covariance itself
        # would lose the small columns.
        sd = self.cov.diagonal().sqrt()
        unit = torch.where(sd > 0, sd, torch.ones_like(sd))
        value, vector = torch.linalg.eigh(self.cov / unit / unit[:, None])
        value = torch.where(value > 1e-13 * n_tokens * value[-1], value, 0.0)  # no variation out of rounding
        root = sd * (vector * value.sqrt()).mT  # rows r_j with sum_j r_j' r_j = cov
        step = math.sqrt(n_tokens) * root
        rows = torch.cat([self.mean + step, self.mean - step, self.incomplete])
        weight = torch.full((2 * n_tokens,), self.n / (2 * n_tokens), dtype=rows.dtype, device=rows.device)
        return rows, torch.cat([weight, weight.new_ones(len(self.incomplete))])

    def _merge(self, n: int, mean: Tensor, cov: Tensor) -> None:
        """Chan, Golub & LeVeque (1983): pool two groups' moments without cancellation."""
        if not n:
            return
        total = self.n + n
        share = n / total
        shift = mean - self.mean
        self.cov = (1 - share) * self.cov + share * cov + share * (1 - share) * torch.outer(shift, shift)
        self.mean = self.mean + share * shift
        self.n = total


def _chunks(x: NDArray[np.floating] | Tensor, device: str) -> Iterator[Any]:
    """Blocks of rows in float64: numpy arrays on the CPU, tensors elsewhere."""
    step = max(1, at_once(CHUNK_CELLS, torch.device(device)) // max(1, x.shape[1]))
    for start in range(0, len(x), step):
        chunk = x[start : start + step]
        if device == "cpu":
            yield np.asarray(chunk, dtype=np.float64)
        else:
            chunk = chunk if isinstance(chunk, Tensor) else torch.from_numpy(np.array(chunk))
            yield chunk.to(device=device, dtype=torch.float64)
