"""Mixtures of Gaussians."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, ClassVar, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from bayes_mpt.models.checks import CheckedModel, IntegersFrom, OneOf, check_memory
from bayes_mpt.models.mixture_em import (
    Gaussians,
    Table,
    chunks_of,
    from_clusters,
    n_products,
    run_em,
    table_of,
)

__all__ = ["GaussianMixture"]

COVARIANCE_TYPES = ("full", "diag", "spherical")


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
