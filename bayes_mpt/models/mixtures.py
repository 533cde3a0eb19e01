"""Mixtures of Gaussians and of factor analysers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
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
from bayes_mpt.models.linear_gaussian import n_free_of_factors, surplus_latents
from bayes_mpt.models.mixture_em import (
    Gaussians,
    Table,
    chunks_of,
    coefficients_of,
    from_clusters,
    n_products,
    products_of,
    run_em,
    table_of,
)

__all__ = ["GaussianMixture", "MixtureOfFactorAnalyzers"]

COVARIANCE_TYPES = ("full", "diag", "spherical")
MIN_NOISE = 1e-3  # of a factor analyser at the start, in units of the columns' variances


class CollapseError(ValueError):
    """The likelihood has no bound: a component shrinks onto rows without spread."""


class GaussianMixture(CheckedModel):
    """Mixture of Gaussians: x ~ N(loc_c, S_c) in component c, which has the probability weights_c.

    Sites "component" (N,) and "x" (N, T); parameters "weights" (K,), "loc" (K, T), and "scale_tril"
    (K, T, T), the Cholesky factors of the covariances, if these are full, or else the standard deviations
    "scale", (K, T) or (K, 1). They start at the end of a short EM from a k-means, variances raised by 1e-6 of the
    columns'.

    The likelihood of a mixture has no bound where a component can shrink onto a few rows. `maximize` adds nothing to
    variances; instead, a component whose variance in some direction falls below 1e-10 of the columns' begins again,
    empty and as wide as the table, with a warning that names it; if it collapses again, or all do, that is an error.

    Parameters
    ----------
    n_components : int, default=2
        K >= 1.
    covariance_type : {"full", "diag", "spherical"}, default="full"
        What is free in the covariance of each component: all, the diagonal, one variance.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> pyro.clear_param_store()
    >>> x = torch.as_tensor(load_iris().data)
    >>> trace = pyro.poutine.trace(GaussianMixture(3)).get_trace(x)
    >>> trace.nodes["component"]["value"].shape, trace.nodes["scale_tril"]["value"].shape
    (torch.Size([150]), torch.Size([3, 4, 4]))
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "n_components": [IntegersFrom(1)],
        "covariance_type": [OneOf(*COVARIANCE_TYPES)],
    }

    def __init__(self, n_components: int = 2, covariance_type: Literal["full", "diag", "spherical"] = "full"):
        self.n_components = n_components
        self.covariance_type = covariance_type

    def __call__(self, x: Tensor) -> None:
        """Run the program on rows x (N, T)."""
        self._validate_params()
        n_components, kind = int(self.n_components), self.covariance_type
        n_numbers = n_components * (n_products(x.shape[1], kind) + max(0, n_components - len(x)))
        check_memory(f"components for n_components={n_components}", n_numbers, x, "use fewer")
        start = cache(lambda: _gaussian_start(x, n_components, kind))  # one EM for all parameters
        weights = pyro.param("weights", lambda: start()["weights"], constraints.simplex)
        loc = pyro.param("loc", lambda: start()["loc"])
        if kind == "full":
            scale = pyro.param("scale_tril", lambda: start()["scale_tril"], constraints.lower_cholesky)
        else:
            scale = pyro.param("scale", lambda: start()["scale"], constraints.positive)
        with pyro.plate("rows", len(x)):
            c = pyro.sample("component", dist.Categorical(weights))
            if kind == "full":
                # the parameter's constraint has been checked; checking it for each row takes longer than the density
                tokens = dist.MultivariateNormal(loc[c], scale_tril=scale[c], validate_args=False)
            else:
                tokens = dist.Normal(loc[c], scale[c]).to_event(1)
            pyro.sample("x", tokens, obs=x)

    def maximize(
        self, x: Tensor, params: dict[str, Tensor], *, tol: float, max_iter: int
    ) -> dict[str, Tensor]:
        """Climb from ``params`` by EM.

        Parameters
        ----------
        x : Tensor of shape (N, T)
            Complete rows.
        params : dict of Tensor
            Values of the parameters, by name.
        tol : float
            EM ends with a step that gains no more than this share of the score, or nats a row where the score is small.
        max_iter : int
            Most steps.

        Returns
        -------
        dict of Tensor
            Better ones.

        Raises
        ------
        ValueError
            If all components collapse, or one does twice; they are named. Of one that began again a warning says so.
        KeyboardInterrupt
            At Ctrl-C; after the first step its argument is the parameters as they are then.

        Examples
        --------
        >>> pyro.clear_param_store()
        >>> x = torch.tensor([[0.0], [2.0], [10.0], [12.0]], dtype=torch.float64)
        >>> wide = {"weights": x.new_tensor([0.5, 0.5]), "loc": x[[0, 3]], "scale": x.new_ones(2, 1)}
        >>> better = GaussianMixture(2, "diag").maximize(x, wide, tol=1e-9, max_iter=100)
        >>> better["loc"].flatten()
        tensor([ 1., 11.], dtype=torch.float64)
        """
        kind = self.covariance_type
        table = table_of(x, kind)
        if kind == "full":
            scale = params["scale_tril"].double() / table.spread[:, None]
        else:
            scale = params["scale"].double()
            scale = scale / table.spread[: scale.shape[1]]
        loc = (params["loc"].double() - table.centre) / table.spread
        start = Gaussians(params["weights"].double(), loc, scale)
        try:
            mix, collapsed, hopeless = run_em(
                table, chunks_of(table.rows, kind), start, kind, tol=tol, max_iter=max_iter, relative=True
            )
        except KeyboardInterrupt as press:
            if not press.args:
                raise
            raise KeyboardInterrupt(_in_units_of_x(table, press.args[0], x)) from press
        if collapsed:
            which = ", ".join(f"{c} ({n:.4g} rows)" for c, n in collapsed.items())
            what = (
                f"component {which} has collapsed onto rows without spread in some direction, where the likelihood "
                "grows without bound: repeated rows, no more rows than columns, or columns that are constant or "
                "repeat others"
            )
            remedy = (
                "fewer components or more rows, drop what repeats, or set covariance_type to 'diag' or 'spherical' "
                f"(now {kind!r})"
            )
            if hopeless:
                raise CollapseError(f"{what}. Use {remedy}")
            warnings.warn(
                f"{what}. It was reset to an empty, wide component. Better use {remedy}",
                UserWarning,
                stacklevel=2,
            )
        return _in_units_of_x(table, mix, x)


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


# ------------------------------------------------------------------------------------------------- initial values


def _gaussian_start(x: Tensor, n_components: int, covariance_type: str) -> dict[str, Tensor]:
    table = table_of(x, covariance_type)
    seed = int(torch.randint(2**31 - 1, (), device="cpu"))
    return _in_units_of_x(table, from_clusters(table, n_components, covariance_type, seed), x)


def _in_units_of_x(table: Table, mix: Gaussians, x: Tensor) -> dict[str, Tensor]:
    if mix.scale.ndim == 3:
        scale = {"scale_tril": table.spread[:, None] * mix.scale}
    else:
        scale = {"scale": table.spread[: mix.scale.shape[1]] * mix.scale}
    values = {"weights": mix.weights, "loc": table.centre + table.spread * mix.loc, **scale}
    return {name: value.to(x) for name, value in values.items()}


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
