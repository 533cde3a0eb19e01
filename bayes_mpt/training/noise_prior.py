"""The prior of noise variances that a maximum a posteriori of a factor model stands under."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayes_mpt.predictors.gaussian.profile import Prior

__all__ = ["NoisePrior"]


@dataclass(frozen=True, eq=False)
class NoisePrior:
    """Log density of log psi, psi_i ~ Gamma(shape, rate_i): one noise variance of each column, or one of all (P = 1).

    Parameters
    ----------
    name : str
        Of the parameter in Pyro's store that is psi.
    shape : float
    rate : array of shape (P,)
    """

    name: str
    shape: float
    rate: NDArray[np.float64]

    def __call__(self) -> Tensor:
        """At the present parameters: nats, with gradients."""
        return self._density(pyro.get_param_store()[self.name])

    def of_map(self, noise: Tensor) -> Tensor:
        """At the noise variances (T,) of a map."""
        return self._density(noise if len(self.rate) > 1 else noise[:1])

    def given(self, n_rows: float) -> Prior:
        """As what stands against the likelihood of so many rows."""
        return Prior(self.shape, self.rate, int(n_rows))

    def _density(self, psi: Tensor) -> Tensor:
        a, rate = self.shape, torch.as_tensor(self.rate).to(psi)
        share = rate * psi.reshape(-1)
        return (a * share.log() - share).sum() - len(self.rate) * math.lgamma(a)
