"""Mixtures of Gaussians."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from bayes_mpt.models.checks import CheckedModel, IntegersFrom, OneOf, check_memory
from bayes_mpt.models.covariance_prior import CovariancePrior
from bayes_mpt.models.gaussians import Gaussians
from bayes_mpt.models.mixture_em import (
    DENSE,
    Climb,
    Table,
    expectation,
    from_clusters,
    n_products,
    prior_of,
    run_em,
    table_of,
    within,
)
from bayes_mpt.models.mixture_exchange import STEPS as EXCHANGE_STEPS
from bayes_mpt.models.mixture_exchange import exchanged
from bayes_mpt.models.mixture_folds import scores_of_others
from bayes_mpt.models.mixture_starts import START_ROWS, best_start

__all__ = ["GaussianMixture"]

PARTS = {"weights": "weights", "loc": "loc", "scale_tril": "scale_tril"}
COVARIANCE_TYPES = ("full", "tied", "diag", "spherical")


class CollapseError(ValueError):
    """The likelihood has no bound: a component shrinks onto rows without spread."""

    def __init__(self, message: str, constant: list[int]):
        super().__init__(message)
        self.constant = constant
        """Columns of which one value alone is observed."""


class GaussianMixture(CheckedModel):
    """Mixture of Gaussians: x ~ N(loc_c, S_c) in component c, which has the probability weights_c.

    Sites "component" (N,) and "x" (N, T); parameters "weights" (K,), "loc" (K, T), and "scale_tril", the Cholesky
    factors (K, T, T) of the covariances if these are full, one (T, T) if they are tied, or else the standard deviations
    "scale", (K, T) or (K, 1). They start at the end of a short EM from a k-means.

    A fit (`bayes_mpt.BayesMPT`) climbs by EM, also where cells are missing (Ghahramani & Jordan 1994). The likelihood
    of a mixture has no bound where a component can shrink onto a few rows, so that the fit adds the log prior of the
    covariances to what it climbs. What is reported (LML, scores, AIC, BIC) never includes that prior; it is taken at
    the parameters that the prior leads to. Without the prior a component whose variance in some direction falls below
    1e-10 of the columns' begins again, empty and as wide as the table, with a warning that names it; if it collapses
    again, or all do, that is an error.

    Parameters
    ----------
    n_components : int, default=2
        K >= 1.
    covariance_type : {"full", "tied", "diag", "spherical"}, default="full"
        What is free in the covariance of each component: all, all but the same in all components, the diagonal, one
        variance.
    covariance_prior : {"auto", None}, default="auto"
        The prior of the covariances. "auto" takes it from the table that is fitted, of a fold from the rows of the
        fold: precisions have a Wishart prior (variances an inverse gamma). The fit is the mode of the precisions, at
        which each component has, in effect, one more row with 1 % of the table's covariance over K^(2/T), or 0.3 rows
        with 1e-5 of it in all where a direction between columns may be thin (full or tied, T > 1). Where a column is
        rounded to multiples of h, N h^2 / (2 pi K) is added to that, so that no component thrives on a repeated value.
        None: the plain likelihood.

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
        "covariance_prior": [OneOf("auto"), None],
    }
    maximizes_missing: ClassVar[bool] = True

    def __init__(
        self,
        n_components: int = 2,
        covariance_type: Literal["full", "tied", "diag", "spherical"] = "full",
        covariance_prior: Literal["auto"] | None = "auto",
    ):
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.covariance_prior = covariance_prior

    def __call__(self, x: Tensor) -> None:
        """Run the program on rows x (N, T)."""
        self._validate_params()
        n_components, kind = int(self.n_components), self.covariance_type
        n_numbers = n_components * (n_products(x.shape[1], kind) + max(0, n_components - len(x)))
        check_memory(f"components for n_components={n_components}", n_numbers, x, "use fewer")
        start = cache(lambda: self._start(x))  # one EM for all parameters
        weights = pyro.param("weights", lambda: start()["weights"], constraints.simplex)
        loc = pyro.param("loc", lambda: start()["loc"])
        if kind in DENSE:
            scale = pyro.param("scale_tril", lambda: start()["scale_tril"], constraints.lower_cholesky)
        else:
            scale = pyro.param("scale", lambda: start()["scale"], constraints.positive)
        with pyro.plate("rows", len(x)):
            c = pyro.sample("component", dist.Categorical(weights))
            if kind in DENSE:
                # the parameter's constraint has been checked; checking it for each row takes longer than the density
                tokens = dist.MultivariateNormal(
                    loc[c], scale_tril=scale[c] if kind == "full" else scale, validate_args=False
                )
            else:
                tokens = dist.Normal(loc[c], scale[c]).to_event(1)
            pyro.sample("x", tokens, obs=x)

    def maximize(
        self, x: Tensor, params: dict[str, Tensor], *, tol: float, max_iter: int
    ) -> dict[str, Tensor]:
        """Climb from ``params`` by EM.

        As `bayes_mpt.program.offers.Offers.maximize`, for rows that may have NaN.

        Raises
        ------
        ValueError
            If the table has no spread in some direction, if all components collapse, or if one does twice; they are
            named. Of one that began again a warning says so.

        Examples
        --------
        >>> pyro.clear_param_store()
        >>> x = torch.tensor([[0.0], [2.0], [10.0], [12.0]], dtype=torch.float64)
        >>> wide = {"weights": x.new_tensor([0.5, 0.5]), "loc": x[[0, 3]], "scale": x.new_ones(2, 1)}
        >>> better = GaussianMixture(2, "diag").maximize(x, wide, tol=1e-9, max_iter=100)
        >>> better["loc"].flatten().round(decimals=6)
        tensor([ 1., 11.], dtype=torch.float64)
        """
        return self.climb(x, params, tol=tol, max_iter=max_iter)[0]

    def climb(
        self, x: Tensor, params: Mapping[str, Tensor], *, tol: float, max_iter: int
    ) -> tuple[dict[str, Tensor], float]:
        """As `maximize`, and what a parameter by itself has to gain at most there, nats a row; infinite if not known.

        Examples
        --------
        >>> x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
        >>> aside = {
        ...     "weights": x.new_ones(1),
        ...     "loc": x.new_tensor([[0.5]]),
        ...     "scale_tril": x.new_ones(1, 1, 1),
        ... }
        >>> GaussianMixture(1, covariance_prior=None).climb(x, aside, tol=1e-9, max_iter=9)[
        ...     1
        ... ]  # one step is enough
        0.0
        """
        kind = self.covariance_type
        table, start = self._read(x, params)
        prior = self._prior(table)
        self._refuse_singular(table, prior)
        expect = expectation(table.rows, kind)
        holes, many = bool(table.rows.isnan().any()), len(table.rows) > START_ROWS
        # of many complete rows k-means finds good places, and all of a search would take longer than the climb
        try:
            if holes or (prior is not None and not many):
                start, used = best_start(table, start, kind, prior, max_iter // 2)
                max_iter -= used
                if used and many and prior is not None:
                    start = exchanged(expect, start, kind, prior, gaps=kind not in DENSE)
                    max_iter -= EXCHANGE_STEPS
            climb = run_em(table, expect, start, kind, tol=tol, max_iter=max_iter, prior=prior, to_end=True)
        except KeyboardInterrupt as press:  # in the search of starts the one that there was is kept
            best = press.args[0] if press.args else start
            raise KeyboardInterrupt(_in_units_of_x(table, best, x, kind)) from press
        if climb.collapsed:
            self._tell_of_collapse(climb, table)
        return _in_units_of_x(table, climb.mix, x, kind), climb.left

    def held_out(
        self, x: Tensor, splits: Sequence[tuple[Tensor, Tensor]], *, tol: float, max_iter: int
    ) -> list[Tensor | None]:
        """Scores of rows by fits to others, as `bayes_mpt.program.offers.Offers.held_out`.

        All fits have one random state, and each its own start and prior, which have seen its rows alone.

        Examples
        --------
        >>> x = torch.tensor([[0.0], [2.0], [10.0], [12.0], [1.0], [11.0]], dtype=torch.float64)
        >>> split = torch.arange(4), torch.arange(4, 6)
        >>> model = GaussianMixture(1, covariance_prior=None)
        >>> [found] = model.held_out(x, [split], tol=1e-9, max_iter=100)
        >>> found  # of N(6, 26)
        tensor([-3.0288, -3.0288], dtype=torch.float64)
        """
        self._validate_params()
        seed = int(torch.randint(2**31 - 1, (), device="cpu"))
        with torch.no_grad():
            return scores_of_others(
                x.double(),
                splits,
                int(self.n_components),
                self.covariance_type,
                with_prior=self.covariance_prior is not None,
                seed=seed,
                tol=tol,
                max_iter=max_iter,
            )

    def penalty(self, x: Tensor) -> Callable[[Mapping[str, Tensor]], Tensor] | None:
        """The log prior of the covariances, a function of the parameters by name, from rows x (N, T); or None."""
        if self.covariance_prior is None:
            return None
        table = table_of(x, self.covariance_type)
        prior, spread = self._prior(table), table.spread
        assert prior is not None
        if self.covariance_type in DENSE:
            scale = spread[:, None] * prior.scale * spread
        else:
            scale = spread[: len(prior.scale)].square() * prior.scale
        return CovariancePrior(scale.to(x), prior.n_tokens).of_params

    @property
    def mixture_map(self) -> dict[str, str] | None:
        """The parameters that are all of the program, of full and tied covariances (`Offers.mixture_map`)."""
        return PARTS if self.covariance_type in DENSE else None

    @property
    def penalised(self) -> str | None:
        """The prior that fits add, in words."""
        if self.covariance_prior is None:
            return None
        dense = self.covariance_type in DENSE
        what, share = ("inverse Wishart", "1e-5") if dense else ("inverse gamma", "1 %")
        rows = "0.3 more rows" if dense else "one more row"
        alone = "; one row and 1 % where T = 1" if dense else ""
        return (
            f"the mode under an {what} prior of the covariances, in effect {rows} for each component, of {share} "
            f"of the table's covariance over K^(2/T) (covariance_prior='auto'{alone}), which no score includes"
        )

    def _prior(self, table: Table) -> CovariancePrior | None:
        """In the units of a table."""
        if self.covariance_prior is None:
            return None
        return prior_of(table, int(self.n_components), self.covariance_type)

    def _start(self, x: Tensor) -> dict[str, Tensor]:
        """Initial values, of complete rows."""
        table = table_of(x, self.covariance_type)
        seed = int(torch.randint(2**31 - 1, (), device="cpu"))
        prior = self._prior(table)
        prior = prior if prior is not None and prior.proper else None  # the fit refuses such a table
        mix = from_clusters(table, int(self.n_components), self.covariance_type, seed, prior)
        return _in_units_of_x(table, mix, x, self.covariance_type)

    def _read(self, x: Tensor, params: Mapping[str, Tensor]) -> tuple[Table, Gaussians]:
        """A table, and parameters in its units."""
        table = table_of(x, self.covariance_type)
        if self.covariance_type in DENSE:
            scale = params["scale_tril"].double() / table.spread[:, None]
            scale = scale if scale.ndim == 3 else scale[None]
        else:
            scale = params["scale"].double()
            scale = scale / table.spread[: scale.shape[1]]
        loc = within(table, (params["loc"].double() - table.centre) / table.spread)
        return table, Gaussians(params["weights"].double(), loc, scale)

    def _refuse_singular(self, table: Table, prior: CovariancePrior | None) -> None:
        """Tables in whose directions without spread a density can be as narrow as it likes."""
        if prior is not None and not prior.proper:
            raise CollapseError(
                "the table has no spread in some direction, where the likelihood grows without bound: "
                f"{self._repeats()}. Use {self._remedy()}",
                table.constant.nonzero()[:, 0].tolist(),
            )

    def _repeats(self) -> str:
        if self.covariance_type in DENSE:
            return (
                "no more rows than columns, columns that are constant or repeat others, or rows so far out that "
                "beside them all others are one place"
            )
        return "columns that are constant"

    def _remedy(self) -> str:
        if self.covariance_type in DENSE:
            return (
                "more rows, drop what repeats, or set covariance_type to 'diag' or 'spherical' "
                f"(now {self.covariance_type!r})"
            )
        return "the other columns, without those that are constant"

    def _tell_of_collapse(self, climb: Climb, table: Table) -> None:
        """Only without a prior."""
        which = ", ".join(f"{c} ({n:.4g} rows)" for c, n in climb.collapsed.items())
        what = (
            f"component {which} has collapsed onto rows without spread in some direction, where the likelihood "
            f"grows without bound: repeated rows, {self._repeats()}"
        )
        remedy = self._remedy()
        if prior_of(
            table, int(self.n_components), self.covariance_type
        ).proper:  # else it is refused with a prior too
            remedy = f"covariance_prior='auto', which keeps components wide, fewer components, or {remedy}"
        if climb.hopeless:
            raise CollapseError(f"{what}. Use {remedy}", table.constant.nonzero()[:, 0].tolist())
        warnings.warn(
            f"{what}. It was reset to an empty, wide component. Better use {remedy}",
            UserWarning,
            stacklevel=3,
        )


def _in_units_of_x(table: Table, mix: Gaussians, x: Tensor, kind: str) -> dict[str, Tensor]:
    if mix.scale.ndim == 3:
        scale = {"scale_tril": table.spread[:, None] * (mix.scale[0] if kind == "tied" else mix.scale)}
    else:
        scale = {"scale": table.spread[: mix.scale.shape[1]] * mix.scale}
    values = {"weights": mix.weights, "loc": table.centre + table.spread * mix.loc, **scale}
    return {name: value.to(x) for name, value in values.items()}
