"""Probabilistic PCA and factor analysis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.distributions import constraints
from torch import Tensor

from bayes_mpt.models.checks import CheckedModel, IntegersFrom, OneOf, check_memory

__all__ = ["PPCA", "FactorAnalysis", "surplus_latents"]

CLOSE = 1e-3  # of its mean: a spread below it may be rounding, in single precision too
MAP = {"loc": "loc", "loading": "loading", "noise": "noise_variance"}  # of both, by names of parameters


class PPCA(CheckedModel):
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

    # any rotation of z gives the same density: its orbit is integrated in the evidence
    symmetries: ClassVar[dict[str, str]] = {"rotations": "noise_variance"}
    linear_map: ClassVar[dict[str, str]] = MAP
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "n_components": [IntegersFrom(0), OneOf("auto")]
    }

    def __init__(self, n_components: int | Literal["auto"] = "auto"):
        self.n_components = n_components

    def __call__(self, x: Tensor) -> None:
        """Run the program on rows x (N, T)."""
        self._validate_params()
        if self.n_components == "auto":
            raise ValueError(
                "PPCA: n_components must be an integer of at least 0 where the program is run, got 'auto': "
                "BayesMPT(PPCA()) chooses it"
            )
        spread = cache(lambda: _spread(x))
        noise = pyro.param("noise_variance", lambda: spread().square().mean() / 2, constraints.positive)
        _factors(x, self.n_components, noise, spread)

    def advice(self, X: NDArray[np.floating]) -> list[str]:
        return surplus_latents("n_components", self.n_components, X)

    def n_free_parameters(self, params: Mapping[str, NDArray[Any]]) -> int:
        """How many numbers of the fitted density are free."""
        return _n_free(params)


class FactorAnalysis(CheckedModel):
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

    symmetries: ClassVar[dict[str, str]] = {"rotations": "noise_variance"}
    linear_map: ClassVar[dict[str, str]] = MAP
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {"n_components": [IntegersFrom(0)]}

    def __init__(self, n_components: int = 2):
        self.n_components = n_components

    def __call__(self, x: Tensor) -> None:
        """Run the program on rows x (N, T)."""
        self._validate_params()
        spread = cache(lambda: _spread(x))
        noise = pyro.param("noise_variance", lambda: spread().square() / 2, constraints.positive)
        _factors(x, self.n_components, noise, spread)

    def advice(self, X: NDArray[np.floating]) -> list[str]:
        return surplus_latents("n_components", self.n_components, X)

    def n_free_parameters(self, params: Mapping[str, NDArray[Any]]) -> int:
        """How many numbers of the fitted density are free."""
        return _n_free(params)


def _n_free(params: Mapping[str, NDArray[Any]]) -> int:
    """Means, loadings up to a rotation, and noise variances."""
    n_tokens, n_latents = params["loading"].shape
    return n_tokens + n_free_of_factors(n_tokens, n_latents, params["noise_variance"].size)


def n_free_of_factors(n_tokens: int, n_latents: int, n_noise: int) -> int:
    """Free numbers of W W' + diag(psi): rotations of W change nothing, and no covariance has more than its own."""
    rank = min(n_tokens, n_latents)
    loading = n_tokens * rank - rank * (rank - 1) // 2
    return min(loading + n_noise, n_tokens * (n_tokens + 1) // 2)


def surplus_latents(name: str, n_latents: Any, X: NDArray[np.floating]) -> list[str]:
    """A sentence where there are more latents than columns."""
    n_tokens = X.shape[1]
    if n_latents == "auto" or n_latents <= n_tokens:
        return []
    return [
        f"{name}={n_latents} is more than the {n_tokens} columns of X: so many latents as columns give any covariance, "
        "and further ones change nothing but take time"
    ]


def _factors(x: Tensor, n_components: Any, noise: Tensor, spread: Callable[[], Tensor]) -> None:
    """The program of both: latents, then tokens; ``spread`` gives `_spread`, once."""
    n_components = int(n_components)
    n_rows, n_tokens = x.shape
    # loadings, and covariances of the latents
    check_memory(
        f"loadings for n_components={n_components}", n_components * (n_tokens + n_components), x, "use fewer"
    )
    loc = pyro.param("loc", lambda: x.mean(0))
    loading = pyro.param("loading", lambda: _random_loading(x, n_components, spread()))
    with pyro.plate("rows", n_rows):
        z = pyro.sample("z", dist.Normal(x.new_zeros(n_components), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(loc + z @ loading.mT, noise.sqrt().expand(n_tokens)).to_event(1), obs=x)


def _random_loading(x: Tensor, n_components: int, spread: Tensor) -> Tensor:
    sd = spread[:, None] / max(1, n_components) ** 0.5
    return 0.5 * sd * torch.randn(x.shape[1], n_components, dtype=x.dtype, device="cpu").to(x)


def _spread(x: Tensor) -> Tensor:
    """Standard deviations (T,), one where a column is constant."""
    mean = x.mean(0)
    sd = (x - mean).square().mean(0).sqrt()  # ten times as fast as x.std(0)
    near = (sd <= CLOSE * mean.abs()).nonzero()[:, 0]
    if len(near):  # the mean of a constant column need not be it, to the last digit
        constant = near[(x[:, near] == x[:1, near]).all(0)]
        sd = sd.index_fill(0, constant, 1.0)
    return sd
