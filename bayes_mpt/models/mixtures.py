"""Mixtures of Gaussians and of factor analysers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.distributions import constraints
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from bayes_mpt.models.checks import CheckedModel, IntegersFrom, OneOf, check_memory
from bayes_mpt.models.linear_gaussian import n_free_of_factors, surplus_latents

__all__ = ["GaussianMixture", "MixtureOfFactorAnalyzers"]

COVARIANCE_TYPES = ("full", "diag", "spherical")
START_ROWS = 512  # on which the k-means of the start runs; EM sees them all
START_TRIES = 3  # of that k-means
START_TOL = 1e-3  # nats a row, of the EM of the start
START_STEPS = 100
REG_COVAR = 1e-6  # added to variances by the EM of the start, in units of the columns' variances
MIN_WEIGHT = 1e-6  # of a component: the logarithm of an empty one is infinite
MIN_VARIANCE = 1e-10  # of a token given others, in units of its column's: below it a component has collapsed
MAX_PRODUCTS = 2**22  # numbers that EM holds beside the rows
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
        n_numbers = n_components * (_width(x.shape[1], kind) + max(0, n_components - len(x)))
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
        table = _table(x, kind)
        if kind == "full":
            scale = params["scale_tril"].double() / table.spread[:, None]
        else:
            scale = params["scale"].double()
            scale = scale / table.spread[: scale.shape[1]]
        loc = (params["loc"].double() - table.centre) / table.spread
        start = _Mixture(params["weights"].double(), loc, scale)
        try:
            mix, collapsed, hopeless = _em(
                table, _chunks(table.rows, kind), start, kind, tol=tol, max_iter=max_iter, relative=True
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


# ------------------------------------------------------------------------------------------------------- EM


class _Table(NamedTuple):
    """Rows in units in which EM's thresholds suit all columns: (x - centre) / spread."""

    rows: Tensor
    """(N, T), float64"""
    centre: Tensor
    """(T,)"""
    spread: Tensor
    """(T,)"""


class _Mixture(NamedTuple):
    """Gaussians in the units of a table."""

    weights: Tensor
    """(K,), none of them zero"""
    loc: Tensor
    """(K, T)"""
    scale: Tensor
    """Cholesky factors (K, T, T) of the covariances, or standard deviations (K, T) or (K, 1)"""


def _table(x: Tensor, covariance_type: str) -> _Table:
    rows = x.detach().double()
    centre, spread = rows.mean(0), rows.std(0, correction=0)
    spread = torch.where((rows == rows[0]).all(0), 0.0, spread)  # the mean of a constant need not be it
    if covariance_type == "spherical":  # columns share their unit, or one variance would mean something else
        spread = spread.square().mean().sqrt().expand(len(spread))
    spread = torch.where(spread == 0, 1.0, spread)
    return _Table((rows - centre) / spread, centre, spread)


def _products(rows: Tensor, covariance_type: str) -> Tensor:
    """What EM sums over rows (N, T): 1, x and the products of tokens that the covariances are made of, (P, N)."""
    x = rows.mT.contiguous()
    n_tokens = len(x)
    if covariance_type != "full":
        second = x.square() if covariance_type == "diag" else x.square().sum(0, keepdim=True)
        return torch.cat([x.new_ones(1, x.shape[1]), x, second])
    out = x.new_empty(_width(n_tokens, covariance_type), x.shape[1])
    out[0], out[1 : n_tokens + 1] = 1.0, x
    end = n_tokens + 1
    for i in range(n_tokens):  # in the order of tril_indices
        torch.mul(x[: i + 1], x[i], out=out[end : end + i + 1])
        end += i + 1
    return out


def _width(n_tokens: int, covariance_type: str) -> int:
    """P of the products."""
    second = {"full": n_tokens * (n_tokens + 1) // 2, "diag": n_tokens, "spherical": 1}
    return 1 + n_tokens + second[covariance_type]


def _chunks(rows: Tensor, covariance_type: str) -> Callable[[], Iterable[Tensor]]:
    """The products by chunks of rows: kept if they are few, made anew in each pass if not."""
    parts = rows.split(max(1, MAX_PRODUCTS // _width(rows.shape[1], covariance_type)))
    if len(parts) == 1:
        kept = [_products(rows, covariance_type)]
        return lambda: kept
    return lambda: (_products(part, covariance_type) for part in parts)


def _coefficients(mix: _Mixture) -> Tensor:
    """log w_k N(x; loc_k, S_k) is linear in the products of x: (K, P)."""
    # log w - log det S / 2 - T log(2 pi) / 2 - loc' S^-1 loc / 2  +  (S^-1 loc)' x  -  x' S^-1 x / 2
    n_tokens = mix.loc.shape[1]
    if mix.scale.ndim == 3:
        log_det = mix.scale.diagonal(dim1=1, dim2=2).log().sum(1)
        eye = torch.eye(n_tokens, dtype=mix.loc.dtype, device=mix.loc.device)
        root = torch.linalg.solve_triangular(mix.scale, eye, upper=False)
        precision = root.mT @ root
        linear = (precision @ mix.loc[..., None])[..., 0]
        i, j = torch.tril_indices(n_tokens, n_tokens, device=mix.loc.device)
        second = precision[:, i, j] * torch.where(
            i == j, -0.5, -1.0
        )  # one product stands for (i, j) and (j, i)
    else:
        log_det = mix.scale.log().expand_as(mix.loc).sum(1)
        linear = mix.loc / mix.scale.square()
        second = -0.5 / mix.scale.square()
    constant = mix.weights.log() - log_det - 0.5 * (linear * mix.loc).sum(1)
    return torch.cat([constant[:, None] - 0.5 * n_tokens * math.log(2 * math.pi), linear, second], 1)


def _m_step(
    sums: Tensor, before: _Mixture, covariance_type: str, reg_covar: float
) -> tuple[_Mixture, dict[int, float]]:
    """The mixture whose expected products are these sums (K, P), and the rows of components that have collapsed."""
    n_tokens = before.loc.shape[1]
    count = sums[:, 0]
    weights = (count / count.sum()).clamp(min=MIN_WEIGHT)
    empty = weights <= MIN_WEIGHT  # says nothing of loc and scale, which stay
    mean = sums / torch.where(empty, 1.0, count)[:, None]
    loc, second = mean[:, 1 : n_tokens + 1], mean[:, n_tokens + 1 :]
    if covariance_type == "full":
        i, j = torch.tril_indices(n_tokens, n_tokens, device=loc.device)
        cov = loc.new_zeros(len(loc), n_tokens, n_tokens)
        cov[:, i, j] = second - loc[:, i] * loc[:, j]
        cov.diagonal(dim1=1, dim2=2).add_(reg_covar)
        scale, failed = torch.linalg.cholesky_ex(
            torch.where(empty[:, None, None], torch.eye(n_tokens).to(cov), cov)
        )
        least = torch.where(failed > 0, 0.0, scale.diagonal(dim1=1, dim2=2).square().amin(1))
    else:
        if covariance_type == "diag":
            variance = second - loc.square()
        else:
            variance = (second - loc.square().sum(1, keepdim=True)) / n_tokens
        scale = (variance + reg_covar).clamp(min=0).sqrt()
        least = scale.square().amin(1)
    collapsed = ~(least > MIN_VARIANCE) & ~empty  # NaN too
    found = dict(zip(collapsed.nonzero()[:, 0].tolist(), count[collapsed].tolist(), strict=True))
    if found:  # begin again, empty and as wide as the table
        weights = torch.where(collapsed, MIN_WEIGHT, weights)
        loc[collapsed] = 0.0
        scale[collapsed] = torch.eye(n_tokens).to(scale) if scale.ndim == 3 else 1.0
    keep = empty.reshape(-1, *[1] * (scale.ndim - 1))
    mix = _Mixture(
        weights / weights.sum(),
        torch.where(empty[:, None], before.loc, loc),
        torch.where(keep, before.scale, scale),
    )
    return mix, found


def _em(
    table: _Table,
    products: Callable[[], Iterable[Tensor]],
    mix: _Mixture,
    covariance_type: str,
    *,
    tol: float,
    max_iter: int,
    relative: bool = False,
    reg_covar: float = 0.0,
) -> tuple[_Mixture, dict[int, float], bool]:
    """EM until a step gains about ``tol`` nats a row; ``relative``: that share of a score beyond 1.

    Sums of products about the centre of the table cost digits, a share of 1e-16 T / v where v is the least variance:
    little enough for the steps of a climb, whose end is judged elsewhere. Comes with the rows of components that have
    collapsed and begun again, and whether that was in vain: all have, or one has twice.
    """
    n_rows, unit = len(table.rows), float(table.spread.log().sum())
    collapsed: dict[int, float] = {}
    hopeless = False
    coefficients = _coefficients(mix)
    first = mix
    try:
        for _ in range(max_iter):
            sums, total = torch.zeros_like(coefficients), 0.0
            for part in products():
                log_prob = coefficients @ part  # (K, n)
                top = log_prob.amax(0)
                share = (log_prob - top).exp_()
                sum_ = share.sum(0)
                sums += (share / sum_) @ part.mT
                total += float(top.sum() + sum_.log().sum())
            mix, found = _m_step(sums, mix, covariance_type, reg_covar)
            hopeless = len(found) == len(sums) or not found.keys().isdisjoint(collapsed)
            collapsed |= found
            if hopeless:
                break
            before, coefficients = coefficients, _coefficients(mix)
            # The score gains what the expected log-density does, and the divergence between the shares before and
            # after, which is about as large where the steps are small and slow, and less elsewhere.
            gain = 2 * float(((coefficients - before) * sums).sum()) / n_rows
            score = total / n_rows - unit
            if not found and not gain > tol * (max(1.0, abs(score)) if relative else 1.0):
                break
    except KeyboardInterrupt as press:
        if mix is first:
            raise
        raise KeyboardInterrupt(mix) from press
    return mix, collapsed, hopeless


def _start(table: _Table, n_components: int, covariance_type: str, seed: int) -> _Mixture:
    """EM from the clusters of a k-means on some of the rows."""
    from sklearn.cluster import KMeans  # slow to import

    rows = table.rows
    n_least = max(2, n_components)  # a row given twice changes no frequency
    if len(rows) < n_least:
        rows = rows.repeat(-(-n_least // len(rows)), 1)
    rng = np.random.RandomState(seed)
    some = rows.cpu().numpy()
    if len(some) > START_ROWS:
        some = some[np.sort(rng.choice(len(some), START_ROWS, replace=False))]
    with warnings.catch_warnings():  # fewer distinct rows than clusters
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = KMeans(n_components, n_init=START_TRIES, random_state=rng).fit(some)
    centre = torch.from_numpy(found.cluster_centers_).to(rows)
    # |x - m|^2 is least where m' x - |m|^2 / 2 is largest
    nearest = (rows @ centre.mT - 0.5 * centre.square().sum(1)).argmax(1)
    share = torch.nn.functional.one_hot(nearest, n_components).to(rows)  # (N, K)
    shape = {"full": (rows.shape[1],) * 2, "diag": (rows.shape[1],), "spherical": (1,)}[covariance_type]
    wide = torch.eye(rows.shape[1]).to(rows) if covariance_type == "full" else rows.new_ones(shape)
    nothing = _Mixture(
        rows.new_full((n_components,), 1 / n_components),
        rows[:1].expand(n_components, -1),
        wide.expand(n_components, *shape),
    )
    products, start = _chunks(rows, covariance_type), 0
    sums = rows.new_zeros(n_components, _width(rows.shape[1], covariance_type))
    for part in products():
        sums += share[start : start + part.shape[1]].mT @ part.mT
        start += part.shape[1]
    mix = _m_step(sums, nothing, covariance_type, REG_COVAR)[0]
    return _em(
        table._replace(rows=rows),
        products,
        mix,
        covariance_type,
        tol=START_TOL,
        max_iter=START_STEPS,
        reg_covar=REG_COVAR,
    )[0]


def _gaussian_start(x: Tensor, n_components: int, covariance_type: str) -> dict[str, Tensor]:
    table = _table(x, covariance_type)
    seed = int(torch.randint(2**31 - 1, (), device="cpu"))
    return _in_units_of_x(table, _start(table, n_components, covariance_type, seed), x)


def _in_units_of_x(table: _Table, mix: _Mixture, x: Tensor) -> dict[str, Tensor]:
    if mix.scale.ndim == 3:
        scale = {"scale_tril": table.spread[:, None] * mix.scale}
    else:
        scale = {"scale": table.spread[: mix.scale.shape[1]] * mix.scale}
    values = {"weights": mix.weights, "loc": table.centre + table.spread * mix.loc, **scale}
    return {name: value.to(x) for name, value in values.items()}


def _factor_start(x: Tensor, n_components: int, n_factors: int) -> dict[str, Tensor]:
    """Clusters with diagonal covariances, then probabilistic PCA in each."""
    seed = int(torch.randint(2**31 - 1, (), device="cpu"))
    table = _table(x, "diag")
    mix = _start(table, n_components, "diag", seed)
    rows, loc, spread = table.rows, mix.loc, table.spread
    share = (_coefficients(mix) @ _products(rows, "diag")).softmax(0)  # (K, N)
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
