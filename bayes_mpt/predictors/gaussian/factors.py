"""A maximum of the likelihood of Gaussian factors, and what it is sought under."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["BOUNDS", "FLOOR", "LOG_2PI", "Factors", "NoiseFloorError", "Prior", "least_noise"]

Array = NDArray[np.float64]

FLOOR = 1e-8  # least noise variance, of the column's variance
BOUNDS = (math.log(FLOOR), 10.0)  # of log psi
LOG_2PI = math.log(2 * math.pi)


class NoiseFloorError(ValueError):
    """The likelihood has no maximum: these columns can be reproduced without noise."""

    def __init__(self, columns: list[int]):
        self.columns = columns
        super().__init__(f"columns {columns} are reproduced without noise")


class Factors(NamedTuple):
    """A maximum over the loadings."""

    lml: float
    """Nats a row."""
    noise: Array
    """(T,) psi."""
    spectrum: Array
    """(K,) theta, the leading eigenvalues of psi^-1/2 S psi^-1/2, at least 1."""
    vectors: Array
    """(T, K) U."""
    n_iter: int

    @property
    def loading(self) -> Array:
        """(T, K) W."""
        return np.sqrt(self.noise)[:, None] * self.vectors * np.sqrt(self.spectrum - 1)


class Prior(NamedTuple):
    """psi_i ~ Gamma(shape, rate_i)."""

    shape: float
    rate: Array
    """(T,), or (1,) of one factor of all."""
    n_rows: int
    """N: how many rows' likelihood the prior stands against."""


def least_noise(a: Array | float, b: Array | float, left: Array) -> Array:
    """psi at which a log psi + left / (2 psi) + b psi is least: ((a^2 + 2 b left)^1/2 - a) / (2 b), b > 0."""
    root = np.sqrt(np.square(a) + 2 * b * left)
    # of a positive a without the difference, which loses digits where b is small
    return np.where(np.asarray(a) > 0, left / np.maximum(root + a, 1e-300), (root - a) / (2 * b))
