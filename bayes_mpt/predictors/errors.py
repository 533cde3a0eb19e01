"""Standard errors from independent replicates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student_t
from torch import Tensor

__all__ = ["disagreement", "replicate_error"]


def replicate_error(totals: NDArray[np.float64]) -> float:
    """Standard error of the mean of R replicates, widened so that +- 2 of it cover 95 % also for a small R.

    sd / sqrt(R) times t(R - 1, 0.977) / 2; NaN for one replicate.
    """
    n = len(totals)
    if n < 2:
        return math.nan
    return float(totals.std(ddof=1) / math.sqrt(n) * student_t.ppf(norm.cdf(2), n - 1) / 2)


def disagreement(by_order: Tensor) -> dict[str, Any]:
    """Scores (R, N) of rows along R chains: totals, their spread, and the log-density of the chains' mixture."""
    by_order, n = by_order.detach(), len(by_order)
    sd = by_order.std(0).square().mean().sqrt() if n > 1 else by_order.new_tensor(math.nan)
    return {
        "totals": by_order.sum(1).double().cpu().numpy(),
        "order_sd": float(sd),
        "log_mean_exp": float((by_order.logsumexp(0) - math.log(n)).sum()),
    }
