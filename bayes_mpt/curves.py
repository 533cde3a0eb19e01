"""The masked curve: what a hidden token costs on average, by how many are hidden. The area under it is the LML."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Curve", "RateCurve"]


class Curve(NamedTuple):
    """The masked curve S(x; m), averaged over rows: nats a row and token. The area under it is the LML."""

    size: NDArray[np.int64]
    """(T,) hidden tokens m = 1..T."""
    mean: NDArray[np.float64]
    """(T,) S(x; m); NaN for sizes that no mask had."""
    se: NDArray[np.float64]
    """(T,) standard errors over masks; NaN where a size was drawn once."""

    @property
    def labels(self) -> tuple[str, str]:
        """Of the axis of hidden tokens, and the unit of the area, in words."""
        return "hidden tokens m", "nats a row"

    @property
    def area(self) -> float:
        """Nats a row. A size that no mask had counts as the next that one had: of equal `Blocks` this is the score."""
        drawn = ~np.isnan(self.mean)
        ends = self.size[drawn]
        ends[-1] = self.size[-1]  # and the largest, if missing, as the last before it
        return float(self.mean[drawn] @ np.diff(ends, prepend=0))


class RateCurve(NamedTuple):
    """The masked curve of rows of different lengths: nats a hidden token against the share of tokens hidden."""

    rate: NDArray[np.float64]
    """(n_rates,) rising, in (0, 1]."""
    mean: NDArray[np.float64]
    """(n_rates,) averaged over rows, each weighed by its tokens."""
    se: NDArray[np.float64]
    """(n_rates,) standard errors over masks."""

    @property
    def labels(self) -> tuple[str, str]:
        """Of the axis of hidden tokens, and the unit of the area, in words."""
        return "share of tokens hidden", "nats a token"

    @property
    def area(self) -> float:
        """By trapezoids, the ends held at the outermost values: nats a token, about the score over the tokens."""
        ends = self.mean[0] * self.rate[0] + self.mean[-1] * (1 - self.rate[-1])
        return float(np.trapezoid(self.mean, self.rate) + ends)
