"""Mixtures of factor analysers."""

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
from bayes_mpt.models.covariance_prior import SINGULAR, CovariancePrior
from bayes_mpt.models.factor_mixture_em import MIN_NOISE, MIN_WEIGHT, Analysers, best_start, cells_of, climb
from bayes_mpt.models.linear_gaussian import n_free_of_factors, surplus_latents
from bayes_mpt.models.mixture_em import (
    Table,
    coefficients_of,
    from_clusters,
    prior_of,
    products_of,
    table_of,
    within,
)
from bayes_mpt.models.mixture_starts import filled
from bayes_mpt.models.mixtures import CollapseError

__all__ = ["MixtureOfFactorAnalyzers"]

STARTS, STARTS_WITH_HOLES = 7, 15  # of `maximize`, beside the one that it is given
MIN_STEPS = 200  # that it must have for them
BLOCK = 256  # columns that are compared with all others at a time
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
    covariance_prior : {"auto", None}, default="auto"
        The prior of the noise variances, by which no component shrinks onto a few rows: that of `GaussianMixture` with
        diagonal covariances, which this is without factors. No score includes it. None: the plain likelihood, each
        noise variance at least 1e-6 of the column's.

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
        "covariance_prior": [OneOf("auto"), None],
    }

    def __init__(
        self,
        n_components: int = 2,
        n_factors: int = 1,
        covariance_prior: Literal["auto"] | None = "auto",
    ):
        self.n_components = n_components
        self.n_factors = n_factors
        self.covariance_prior = covariance_prior

    def __call__(self, x: Tensor) -> None:
        """Run the program on rows x (N, T)."""
        self._validate_params()
        n_components, n_factors = int(self.n_components), int(self.n_factors)
        n_numbers = n_components * (
            (n_factors + 1) * (x.shape[1] + n_factors) + max(0, n_components - len(x))
        )
        what = f"components for n_components={n_components}, n_factors={n_factors}"
        check_memory(what, n_numbers, x, "use fewer")
        start = cache(lambda: self._start(x))
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

        As `bayes_mpt.program.offers.Offers.maximize`, for rows that may have NaN. With ``max_iter`` below 200 it has no
        starts of its own.

        Raises
        ------
        ValueError
            If columns are constant.

        Examples
        --------
        >>> pyro.clear_param_store()
        >>> x = torch.tensor([[0.0], [2.0], [10.0], [12.0]], dtype=torch.float64)
        >>> model = MixtureOfFactorAnalyzers(2, n_factors=0, covariance_prior=None)
        >>> start = {"weights": x.new_tensor([0.5, 0.5]), "loc": x[[0, 3]], "loading": x.new_zeros(2, 1, 0)}
        >>> better = model.maximize(x, start | {"noise_variance": x.new_ones(2, 1)}, tol=1e-9, max_iter=20)
        >>> better["loc"].flatten().round(decimals=6)
        tensor([ 1., 11.], dtype=torch.float64)
        """
        table = table_of(x, "diag")
        if bool(table.constant.any()):
            raise CollapseError(
                "the table has columns that are constant, where the likelihood grows without bound: use the others",
                table.constant.nonzero()[:, 0].tolist(),
            )
        if int(self.n_factors) and _repeats(table.rows):
            raise CollapseError(
                "the table has columns that repeat others but for scale and shift: a factor explains them without "
                "noise, where the likelihood grows without bound. Drop what repeats, or rows so far out that beside "
                "them all others are one place, or use n_factors=0",
                [],
            )
        prior, start, cells = self._prior(table), _in_units(params, table), cells_of(table)
        scale = None if prior is None else prior.scale
        try:
            if max_iter >= MIN_STEPS and int(self.n_components) > 1:
                n_starts = STARTS if len(cells.patterns) == 1 else STARTS_WITH_HOLES
                places = [start, *self._starts(table, prior, n_starts)]
                start = best_start(cells, places, scale, int(torch.randint(2**31 - 1, (), device="cpu")))
            return _in_units_of_x(climb(cells, start, prior=scale, tol=tol, max_iter=max_iter), table, x)
        except KeyboardInterrupt as press:
            if not press.args:
                raise
            raise KeyboardInterrupt(_in_units_of_x(press.args[0], table, x)) from press

    def penalty(self, x: Tensor) -> Callable[[Mapping[str, Tensor]], Tensor] | None:
        """The log prior of the noise variances, a function of the parameters by name, from rows x (N, T); or None."""
        table = table_of(x, "diag")
        prior = self._prior(table)
        if prior is None:
            return None
        prior = prior._replace(scale=(table.spread.square() * prior.scale).to(x))
        return lambda params: prior.log_prob(params["noise_variance"].sqrt())

    @property
    def penalised(self) -> str | None:
        """The prior that fits add, in words."""
        if self.covariance_prior is None:
            return None
        return (
            "the mode under an inverse gamma prior of the noise variances, in effect one more cell for each, of 1 % of "
            "the column's variance over K^(2/T) (covariance_prior='auto'), which no score includes"
        )

    def _prior(self, table: Table) -> CovariancePrior | None:
        """In the units of a table."""
        return None if self.covariance_prior is None else prior_of(table, int(self.n_components), "diag")

    def _start(self, x: Tensor) -> dict[str, Tensor]:
        """Initial values, of complete rows."""
        table = table_of(x, "diag")
        prior = self._prior(table)
        prior = prior if prior is not None and prior.proper else None  # the fit refuses such a table
        return _in_units_of_x(self._starts(table, prior, 1)[0], table, x)

    def _starts(self, table: Table, prior: CovariancePrior | None, n_starts: int) -> list[Analysers]:
        """Some, in whose missing cells stand others of the same columns, at random."""
        seeds = torch.randint(2**31 - 1, (n_starts,), device="cpu").tolist()
        size = int(self.n_components), int(self.n_factors)
        return [_first(table._replace(rows=filled(table.rows, seed)), *size, seed, prior) for seed in seeds]

    def advice(self, X: NDArray[np.floating]) -> list[str]:
        return surplus_latents("n_factors", self.n_factors, X)

    def n_free_parameters(self, params: Mapping[str, NDArray[Any]]) -> int:
        """How many numbers of the fitted density are free."""
        n_components, n_tokens, n_factors = params["loading"].shape
        of_each = n_tokens + n_free_of_factors(n_tokens, n_factors, n_tokens)
        return n_components - 1 + n_components * of_each


def _repeats(rows: Tensor) -> bool:
    """Whether two columns of rows (N, T), NaN where missing, are in proportion wherever both are observed."""
    seen = (~rows.isnan()).to(rows)  # (N, T)
    x = rows.nan_to_num(0.0)
    for first in range(0, rows.shape[1], BLOCK):
        some, a = seen[:, first : first + BLOCK], x[:, first : first + BLOCK]
        # over the rows in which column i of the block and j of all are observed, (B, T) each:
        # n, sum x_i, sum x_j, and sums of squares and products about the means
        n = some.mT @ seen
        of_i, of_j = a.mT @ seen, some.mT @ x
        spread_i = a.square().mT @ seen - of_i.square() / n.clamp(min=1)
        spread_j = some.mT @ x.square() - of_j.square() / n.clamp(min=1)
        common = a.mT @ x - of_i * of_j / n.clamp(min=1)
        # squared correlation beyond 1 - 1e-10; of three rows or more, as two are always in proportion
        alike = common.square() >= (1 - SINGULAR) * spread_i * spread_j
        vary = (n > 2) & (spread_i > SINGULAR * n) & (spread_j > SINGULAR * n)
        if bool((alike & vary).triu(first + 1).any()):
            return True
    return False


def _first(
    table: Table, n_components: int, n_factors: int, seed: int, prior: CovariancePrior | None
) -> Analysers:
    """Clusters of complete rows with diagonal covariances, then probabilistic PCA in each."""
    mix = from_clusters(table, n_components, "diag", seed, prior, n_tries=1)
    rows, loc = table.rows, mix.loc
    share = (coefficients_of(mix) @ products_of(rows, "diag")).softmax(0)  # (K, N)
    share = share / share.sum(1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
    cov = torch.stack([((p[:, None] * (rows - m)).mT @ (rows - m)) for p, m in zip(share, loc, strict=True)])
    value, vector = torch.linalg.eigh(cov)  # ascending
    n_tokens = rows.shape[1]
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
    return Analysers(mix.weights.log()[None], torch.cat([loading, loc[..., None]], -1), noise)


def _in_units(params: Mapping[str, Tensor], table: Table) -> Analysers:
    """Parameters in the units of a table."""
    loc = within(table, (params["loc"].detach().double() - table.centre) / table.spread)
    loading = params["loading"].detach().double() / table.spread[:, None]
    noise = params["noise_variance"].detach().double() / table.spread.square()
    weights = params["weights"].detach().double().clamp(min=MIN_WEIGHT)
    return Analysers(
        (weights / weights.sum()).log()[None],
        torch.cat([loading, loc[..., None]], -1),
        noise.clamp(min=MIN_NOISE),
    )


def _in_units_of_x(at: Analysers, table: Table, x: Tensor) -> dict[str, Tensor]:
    values = {
        "weights": at.log_weights[0].exp(),
        "loc": table.centre + table.spread * at.loading[..., -1],
        "loading": table.spread[:, None] * at.loading[..., :-1],
        "noise_variance": table.spread.square() * at.noise,
    }
    return {name: value.to(x) for name, value in values.items()}
