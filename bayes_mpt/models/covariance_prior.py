"""The prior that keeps the covariances of a mixture away from zero, in the units of the table.

The precision of each component has a Wishart prior of T + 1 + q degrees of freedom (its covariance an inverse
Wishart, a single variance an inverse gamma) under which the mean of its covariance is L / q, where L is a hundredth of
the covariance of the table over K^(2/T) and q = 1, or 1e-5 of it and q = 0.3 where covariances are full or tied and
T > 1. The fit is the mode of the precisions:

    log prior = -1/2 sum_k (q log det S_k + tr(L S_k^-1)),      S_k = (W_k + L) / (n_k + q)    in the M-step:

each component has q more rows, at its centre, of scatter L. On n new rows of a component the q in the divisor loses
about q T (T + 3) / (2 n) + q^2 T / (4 n) nats, nearly in proportion to q. It cannot be zero: of a direction in which a
component shows no cell the likelihood says nothing, there EM's step is S = (n S + L) / (n + q), and the mode L / q, to
which it comes nearer by q / n a step and at which the score curves by q / 2. With q = 0 the prior is still proper, but
its mode is where the variance is infinite; with q = 0.1 such fits take ten times as long, with 0.3 no longer than with
one. Where a column is rounded to multiples of a step h, L
has N h^2 / (2 pi K) more on its diagonal: the density of a component of N / K rows is nowhere above 1 / h, at which a
single value has all the probability.

Fraley & Raftery (2007) take the whole covariance of the table, and the mode of the covariances, which divides by
n_k + 2 T + 3. Where components lie apart, or are narrow in some direction, that makes them far too wide: on 10 000 rows
of five components with thin directions a hundredth of it still loses hundreds to thousands of nats on as many new rows
against the plain likelihood, 1e-5 less than one (``benchmarks/accuracy/covariance_prior.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["FEW_CELLS", "SINGULAR", "CovariancePrior", "may_be_rounded", "steps_of"]

DENSE_ROWS = 0.3  # q of full and tied covariances, T > 1
ON_STEPS = 2e-5  # of a step: so far off its multiples are rounded values, single precision too
SINGULAR = 1e-10  # of a column's variance: less, given others, is none
FEW_CELLS = 256  # that tell most columns that are not rounded
MIN_STEP = 1e-3  # of a column's standard deviation: finer rounding shows in no component


class CovariancePrior(NamedTuple):
    """The log prior of the covariances of a mixture, a constant left out."""

    scale: Tensor
    """L: (T, T) of full covariances, (T,) of diagonal ones, (1,) of a single variance; of B tables (B, 1, T, T) and
    (B, 1, T) or (B, 1, 1)"""
    n_tokens: int
    """T"""

    @property
    def dense(self) -> bool:
        """Whether it is one of full covariances."""
        return self.scale.ndim in (2, 4)

    @property
    def n_rows(self) -> float:
        """q, rows that it is worth."""
        return DENSE_ROWS if self.dense and self.n_tokens > 1 else 1.0

    @property
    def proper(self) -> bool:
        """Whether it has a mean covariance with spread in all directions."""
        if self.scale.ndim == 1:
            return bool((self.scale > 0).all())
        root, failed = torch.linalg.cholesky_ex(self.scale)
        return not failed and bool((root.diagonal().square() > SINGULAR * self.scale.diagonal()).all())

    def log_prob(self, scale: Tensor) -> Tensor:
        """Of Cholesky factors (..., C, T, T), or standard deviations (..., C, T) or (..., C, 1)."""
        if self.dense:
            log_det = 2 * scale.diagonal(dim1=-2, dim2=-1).log().sum((-2, -1))
            return -0.5 * (
                self.n_rows * log_det + (self.scale * torch.cholesky_inverse(scale)).sum((-3, -2, -1))
            )
        each = 2 * scale.log() + self.scale / scale.square()
        return -0.5 * (self.n_tokens / scale.shape[-1]) * each.sum((-2, -1))

    def of_params(self, params: Mapping[str, Tensor]) -> Tensor:
        """Of the parameters of a mixture, by name."""
        if "scale" in params:
            return self.log_prob(params["scale"])
        scale = params["scale_tril"]
        return self.log_prob(scale if scale.ndim == 3 else scale[None])


def steps_of(rows: Tensor) -> Tensor:
    """The steps h (T,) of whose multiples columns are made, rows (N, T) in units of their spread; zero without any."""
    steps = rows.new_zeros(rows.shape[1])
    for column in may_be_rounded(rows[:FEW_CELLS]).nonzero()[:, 0].tolist():
        steps[column] = _step(rows[:, column]) or 0.0
    return steps


def may_be_rounded(rows: Tensor) -> Tensor:
    """Of which columns (T,) a few cells do not show that they are not rounded."""
    value = rows.sort(0).values
    gap = value.diff(dim=0)
    step = torch.where(gap > ON_STEPS * MIN_STEP, gap, torch.inf).amin(0) if len(gap) else rows[0] + torch.inf
    multiple = (value - value[0]) / step
    on = ((multiple - multiple.round()).abs() < ON_STEPS * multiple.clamp(min=1.0)).all(0)
    return (on & (step >= MIN_STEP)) | step.isinf() | rows.isnan().any(0)


def _step(cells: Tensor) -> float | None:
    """The least difference of cells (N,), zero if there is none; None where they are no multiples of it."""
    value = cells[~cells.isnan()].unique()  # sorted
    gap = value.diff()
    gap = gap[gap > ON_STEPS * MIN_STEP]  # what was one value need not be one in units of the spread
    if not len(gap):
        return 0.0
    step = gap.min()
    multiple = (value - value[0]) / step
    on = (multiple - multiple.round()).abs() < ON_STEPS * multiple.clamp(min=1.0)
    return float(step) if step >= MIN_STEP and bool(on.all()) else None
