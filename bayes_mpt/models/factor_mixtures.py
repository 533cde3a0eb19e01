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
from bayes_mpt.models.factor_mixture_em import (
    MIN_NOISE,
    MIN_WEIGHT,
    Analysers,
    Cells,
    best_start,
    cells_of,
    climb,
)
from bayes_mpt.models.linear_gaussian import n_free_of_factors, surplus_latents
from bayes_mpt.models.mixture_em import coefficients_of, from_clusters, products_of, table_of

__all__ = ["MixtureOfFactorAnalyzers"]

STARTS = 3  # of `maximize`, beside the one that it is given
MIN_STEPS = 100  # that it must have for them
FIRST_NOISE = 1e-3  # of a factor analyser at the start, in units of the columns' variances


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

    maximizes_missing: ClassVar[bool] = True
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

    def maximize(
        self, x: Tensor, params: Mapping[str, Tensor], *, tol: float, max_iter: int
    ) -> dict[str, Tensor]:
        """Climb from ``params``, or the best of some starts of its own, by EM, and later by L-BFGS in its units.

        Parameters
        ----------
        x : Tensor of shape (N, T)
            Rows, NaN where a cell is missing.
        params : dict of Tensor
            Values of the parameters, by name.
        tol : float
            It ends where no step has more than this share of the score to gain, or nats a row where that is small.
        max_iter : int
            Most steps; 10 of L-BFGS count as one. With less than 100 it has no starts of its own.

        Returns
        -------
        dict of Tensor
            Better ones.

        Raises
        ------
        KeyboardInterrupt
            At Ctrl-C; after the first step its argument is the parameters as they are then.

        Examples
        --------
        >>> pyro.clear_param_store()
        >>> x = torch.tensor([[0.0], [2.0], [10.0], [12.0]], dtype=torch.float64)
        >>> model = MixtureOfFactorAnalyzers(2, n_factors=0)
        >>> start = {"weights": x.new_tensor([0.5, 0.5]), "loc": x[[0, 3]], "loading": x.new_zeros(2, 1, 0)}
        >>> better = model.maximize(x, start | {"noise_variance": x.new_ones(2, 1)}, tol=1e-9, max_iter=20)
        >>> better["loc"].flatten().round(decimals=6)
        tensor([ 1., 11.], dtype=torch.float64)
        """
        cells = cells_of(x)
        start = _in_units(params, cells)
        try:
            if max_iter >= MIN_STEPS and int(self.n_components) > 1:
                start = best_start(cells, [start, *self._starts(x, cells)])
            return _in_units_of_x(climb(cells, start, tol=tol, max_iter=max_iter), cells, x)
        except KeyboardInterrupt as press:
            if not press.args:
                raise
            raise KeyboardInterrupt(_in_units_of_x(press.args[0], cells, x)) from press

    def _starts(self, x: Tensor, cells: Cells) -> list[Analysers]:
        """Further ones, in whose missing cells stand others of the same columns, at random."""
        found = []
        for _ in range(STARTS):
            start = _factor_start(filled_at_random(x.detach()), int(self.n_components), int(self.n_factors))
            found.append(_in_units(start, cells))
        return found

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
    root = (value[:, first:] - rest).clamp(min=FIRST_NOISE).sqrt()  # (K, n_leading)
    random = np.random.default_rng(seed).normal(size=(n_components, n_tokens, n_factors))
    loading = torch.from_numpy(0.1 * random).to(cov)  # factors beyond T, if any
    loading[..., :n_leading] = (vector[..., first:] * root[:, None]).flip(-1)
    variance = cov.diagonal(dim1=1, dim2=2)
    noise = torch.maximum(variance - loading.square().sum(-1), (0.1 * variance).clamp(min=FIRST_NOISE))
    start = {
        "weights": mix.weights,
        "loc": table.centre + spread * loc,
        "loading": spread[:, None] * loading,
        "noise_variance": spread.square() * noise,
    }
    return {name: value.to(x) for name, value in start.items()}


def filled_at_random(x: Tensor) -> Tensor:
    """Rows (N, T) with an observed cell of the same column, at random, in place of each that is missing."""
    missing = x.isnan()
    if not bool(missing.any()):
        return x
    out = x.clone()
    for column, (cells, gaps) in enumerate(zip(x.unbind(1), missing.unbind(1), strict=True)):
        known, n_gaps = cells[~gaps], int(gaps.sum())
        if n_gaps:
            drawn = torch.randint(max(1, len(known)), (n_gaps,), device="cpu").to(x.device)
            out[gaps, column] = known[drawn] if len(known) else 0.0
    return out


def _in_units(params: Mapping[str, Tensor], cells: Cells) -> Analysers:
    """Parameters in the units of cells."""
    loc = (params["loc"].detach().double() - cells.centre) / cells.spread
    loading = params["loading"].detach().double() / cells.spread[:, None]
    noise = params["noise_variance"].detach().double() / cells.spread.square()
    weights = params["weights"].detach().double().clamp(min=MIN_WEIGHT)
    return Analysers(
        (weights / weights.sum()).log()[None],
        torch.cat([loading, loc[..., None]], -1),
        noise.clamp(min=MIN_NOISE),
    )


def _in_units_of_x(at: Analysers, cells: Cells, x: Tensor) -> dict[str, Tensor]:
    values = {
        "weights": at.log_weights[0].exp(),
        "loc": cells.centre + cells.spread * at.loading[..., -1],
        "loading": cells.spread[:, None] * at.loading[..., :-1],
        "noise_variance": cells.spread.square() * at.noise,
    }
    return {name: value.to(x) for name, value in values.items()}
