"""Tables and small programs that many tests use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


def tensor(a: Any) -> Tensor:
    """The numbers in double precision."""
    return torch.as_tensor(np.asarray(a, dtype=np.float64))


def with_holes(x: np.ndarray, share: float, seed: int = 0) -> np.ndarray:
    """The table with this share of its cells missing, at random; as precise as it was."""
    return np.where(np.random.default_rng(seed).random(x.shape) < share, np.nan, x).astype(x.dtype)


def known_factors(loc: np.ndarray, loading: np.ndarray, noise: np.ndarray) -> Callable[[Tensor], None]:
    """Factor analysis with nothing to train: x ~ N(loc + loading z, diag(noise)), loading (T, K)."""

    def program(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(loading.shape[1]), 1.0).to_event(1))
            mean = tensor(loc) + z @ tensor(loading).T
            pyro.sample("x", dist.Normal(mean, tensor(noise).sqrt()).to_event(1), obs=x)

    return program
