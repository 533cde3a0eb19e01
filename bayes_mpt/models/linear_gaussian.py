"""Probabilistic PCA and factor analysis."""

from __future__ import annotations

from numbers import Integral
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from sklearn.base import BaseEstimator
from torch import Tensor

__all__ = ["PPCA", "FactorAnalysis"]


class PPCA(BaseEstimator):
    """Probabilistic principal component analysis (Tipping & Bishop 1999): x = loc + W z + e, e ~ N(0, v I).

    Sites "z" (N, K) and "x" (N, T); parameters "loc" (T,), "loading" (T, K), "noise_variance" ().

    Parameters
    ----------
    n_components : int or "auto", default="auto"
        K >= 0; from K = T on the covariance is saturated. `bayes_mpt.BayesMPT` ranks all K where it is "auto".

    Examples
    --------
    >>> from bayes_mpt import BayesMPT
    >>> from sklearn.datasets import load_iris
    >>> round(BayesMPT(PPCA(2)).fit(load_iris().data).score(load_iris().data), 6)
    -2.699752
    """

    rotations = True  # any rotation of z gives the same density: its orbit is integrated in the evidence

    def __init__(self, n_components: int | Literal["auto"] = "auto"):
        self.n_components = n_components

    def __call__(self, x: Tensor) -> None:
        """Run the program on rows x (N, T)."""
        noise = pyro.param("noise_variance", lambda: _spread(x).square().mean() / 2, constraints.positive)
        _factors(x, self.n_components, noise)


class FactorAnalysis(BaseEstimator):
    """Factor analysis: x = loc + W z + e, e ~ N(0, diag(psi)).

    Sites "z" (N, K) and "x" (N, T); parameters "loc" (T,), "loading" (T, K), "noise_variance" (T,).

    Parameters
    ----------
    n_components : int, default=2
        K >= 0.

    Examples
    --------
    >>> from bayes_mpt import BayesMPT
    >>> from sklearn.datasets import load_wine
    >>> X = load_wine().data
    >>> BayesMPT(FactorAnalysis(3)).fit(X).components_.shape
    (3, 13)
    """

    rotations = True

    def __init__(self, n_components: int = 2):
        self.n_components = n_components

    def __call__(self, x: Tensor) -> None:
        """Run the program on rows x (N, T)."""
        noise = pyro.param("noise_variance", lambda: _spread(x).square() / 2, constraints.positive)
        _factors(x, self.n_components, noise)


def _factors(x: Tensor, n_components: int | str, noise: Tensor) -> None:
    """The program of both: latents, then tokens."""
    if not isinstance(n_components, Integral) or isinstance(n_components, bool) or n_components < 0:
        raise ValueError(f"n_components must be an integer of at least 0, got {n_components!r}")
    n_components = int(n_components)
    n_rows, n_tokens = x.shape
    loc = pyro.param("loc", lambda: x.mean(0))
    loading = pyro.param("loading", lambda: _random_loading(x, n_components))
    with pyro.plate("rows", n_rows):
        z = pyro.sample("z", dist.Normal(x.new_zeros(n_components), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(loc + z @ loading.mT, noise.sqrt().expand(n_tokens)).to_event(1), obs=x)


def _random_loading(x: Tensor, n_components: int) -> Tensor:
    sd = _spread(x)[:, None] / max(1, n_components) ** 0.5
    return 0.5 * sd * torch.randn(x.shape[1], n_components, dtype=x.dtype, device="cpu").to(x)


def _spread(x: Tensor) -> Tensor:
    """Standard deviations (T,), one where a column is constant."""
    sd = x.std(0, correction=0)
    constant = (x == x[:1]).all(0)  # its mean need not be it, to the last digit
    return torch.where(constant, torch.ones_like(sd), sd)
