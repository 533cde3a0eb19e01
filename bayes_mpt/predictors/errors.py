"""Standard errors from independent replicates."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student_t

__all__ = ["replicate_error"]


def replicate_error(totals: NDArray[np.float64]) -> float:
    """Standard error of the mean of R replicates, widened so that +- 2 of it cover 95 % also for a small R.

    sd / sqrt(R) times t(R - 1, 0.977) / 2; NaN for one replicate.
    """
    n = len(totals)
    if n < 2:
        return math.nan
    return float(totals.std(ddof=1) / math.sqrt(n) * student_t.ppf(norm.cdf(2), n - 1) / 2)
