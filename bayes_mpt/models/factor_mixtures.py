"""Mixtures of factor analysers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.distributions import constraints
from torch import Tensor

from bayes_mpt.models.checks import CheckedModel, IntegersFrom, check_memory
from bayes_mpt.models.linear_gaussian import n_free_of_factors, surplus_latents
from bayes_mpt.models.mixture_em import coefficients_of, from_clusters, products_of, table_of

__all__ = ["MixtureOfFactorAnalyzers"]

MIN_NOISE = 1e-3  # of a factor analyser at the start, in units of the columns' variances


class MixtureOfFactorAnalyzers(CheckedModel):
    """Mixture of factor analysers (Ghahramani & Hinton 1996): x = loc_c + W_c z + e, e ~ N(0, diag(psi_c)).

    Sites "component" (N,), "z" (N, F) and "x" (N, T); parameters "weights" (K,), "loc" (K, T), "loading"
    (K, T, F) and "noise_variance" (K, T).

    Parameters
    ----------
    n_components : int, default=2
        K >= 1.
    n_factors : int, default=1
        F >= 0, the same in all components.

    Examples
    --------
    >>> from sklearn.datasets import load_wine
    >>> pyro.clear_param_store()
    >>> x = torch.as_tensor(load_wine().data)
    >>> trace = pyro.poutine.trace(MixtureOfFactorAnalyzers(3, n_factors=2)).get_trace(x)
    >>> trace.nodes["z"]["value"].shape, trace.nodes["loading"]["value"].shape
    (torch.Size([178, 2]), torch.Size([3, 13, 2]))
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "n_components": [IntegersFrom(1)],
        "n_factors": [IntegersFrom(0)],
    }

    def __init__(self, n_components: int = 2, n_factors: int = 1):
        self.n_components = n_components
        self.n_factors = n_factors

    def __call__(self, x: Tensor) -> None:
        """Run the program on rows x (N, T)."""
        self._validate_params()
        n_components, n_factors = int(self.n_components), int(self.n_factors)
        n_numbers = n_components * (
            (n_factors + 1) * (x.shape[1] + n_factors) + max(0, n_components - len(x))
        )
        what = f"components for n_components={n_components}, n_factors={n_factors}"
        check_memory(what, n_numbers, x, "use fewer")
        start = cache(lambda: _factor_start(x, n_components, n_factors))
        weights = pyro.param("weights", lambda: start()["weights"], constraints.simplex)
        loc = pyro.param("loc", lambda: start()["loc"])
        loading = pyro.param("loading", lambda: start()["loading"])
        noise = pyro.param("noise_variance", lambda: start()["noise_variance"], constraints.positive)
        with pyro.plate("rows", len(x)):
            c = pyro.sample("component", dist.Categorical(weights))
            z = pyro.sample("z", dist.Normal(x.new_zeros(n_factors), 1.0).to_event(1))
            mean = loc[c] + (loading[c] @ z[..., None])[..., 0]
            pyro.sample("x", dist.Normal(mean, noise[c].sqrt()).to_event(1), obs=x)

    def advice(self, X: NDArray[np.floating]) -> list[str]:
        return surplus_latents("n_factors", self.n_factors, X)

    def n_free_parameters(self, params: Mapping[str, NDArray[Any]]) -> int:
        """How many numbers of the fitted density are free."""
        n_components, n_tokens, n_factors = params["loading"].shape
        of_each = n_tokens + n_free_of_factors(n_tokens, n_factors, n_tokens)
        return n_components - 1 + n_components * of_each


def _factor_start(x: Tensor, n_components: int, n_factors: int) -> dict[str, Tensor]:
    """Clusters with diagonal covariances, then probabilistic PCA in each."""
    seed = int(torch.randint(2**31 - 1, (), device="cpu"))
    table = table_of(x, "diag")
    mix = from_clusters(table, n_components, "diag", seed)
    rows, loc, spread = table.rows, mix.loc, table.spread
    share = (coefficients_of(mix) @ products_of(rows, "diag")).softmax(0)  # (K, N)
    share = share / share.sum(1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
    cov = torch.stack([((p[:, None] * (rows - m)).mT @ (rows - m)) for p, m in zip(share, loc, strict=True)])
    value, vector = torch.linalg.eigh(cov)  # ascending
    n_tokens = x.shape[1]
    n_leading = min(n_factors, n_tokens)
    first = n_tokens - n_leading
    rest = value[:, :first].mean(1, keepdim=True) if first else value.new_zeros(n_components, 1)
    # W = U (L - rest)^1/2; not zero, which would be a saddle point
    root = (value[:, first:] - rest).clamp(min=MIN_NOISE).sqrt()  # (K, n_leading)
    random = np.random.default_rng(seed).normal(size=(n_components, n_tokens, n_factors))
    loading = torch.from_numpy(0.1 * random).to(cov)  # factors beyond T, if any
    loading[..., :n_leading] = (vector[..., first:] * root[:, None]).flip(-1)
    variance = cov.diagonal(dim1=1, dim2=2)
    noise = torch.maximum(variance - loading.square().sum(-1), (0.1 * variance).clamp(min=MIN_NOISE))
    start = {
        "weights": mix.weights,
        "loc": table.centre + spread * loc,
        "loading": spread[:, None] * loading,
        "noise_variance": spread.square() * noise,
    }
    return {name: value.to(x) for name, value in start.items()}
