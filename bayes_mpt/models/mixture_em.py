"""EM for mixtures of Gaussians, from the clusters of a k-means: what sums over rows it needs, and its steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

__all__ = [
    "Gaussians",
    "Table",
    "chunks_of",
    "coefficients_of",
    "from_clusters",
    "n_products",
    "products_of",
    "run_em",
    "table_of",
]

START_ROWS = 512  # on which the k-means of the start runs; EM sees them all
START_TRIES = 3  # of that k-means
START_TOL = 1e-3  # nats a row, of the EM of the start
START_STEPS = 100
REG_COVAR = 1e-6  # added to variances by the EM of the start, in units of the columns' variances
MIN_WEIGHT = 1e-6  # of a component: the logarithm of an empty one is infinite
MIN_VARIANCE = 1e-10  # of a token given others, in units of its column's: below it a component has collapsed
MAX_PRODUCTS = 2**22  # numbers that EM holds beside the rows


class Table(NamedTuple):
    """Rows in units in which EM's thresholds suit all columns: (x - centre) / spread."""

    rows: Tensor
    """(N, T), float64"""
    centre: Tensor
    """(T,)"""
    spread: Tensor
    """(T,)"""


class Gaussians(NamedTuple):
    """Gaussians in the units of a table."""

    weights: Tensor
    """(K,), none of them zero"""
    loc: Tensor
    """(K, T)"""
    scale: Tensor
    """Cholesky factors (K, T, T) of the covariances, or standard deviations (K, T) or (K, 1)"""


def table_of(x: Tensor, covariance_type: str) -> Table:
    """Rows x (N, T) in such units."""
    rows = x.detach().double()
    centre, spread = rows.mean(0), rows.std(0, correction=0)
    spread = torch.where((rows == rows[0]).all(0), 0.0, spread)  # the mean of a constant need not be it
    if covariance_type == "spherical":  # columns share their unit, or one variance would mean something else
        spread = spread.square().mean().sqrt().expand(len(spread))
    spread = torch.where(spread == 0, 1.0, spread)
    return Table((rows - centre) / spread, centre, spread)


def products_of(rows: Tensor, covariance_type: str) -> Tensor:
    """What EM sums over rows (N, T): 1, x and the products of tokens that the covariances are made of, (P, N)."""
    x = rows.mT.contiguous()
    n_tokens = len(x)
    if covariance_type != "full":
        second = x.square() if covariance_type == "diag" else x.square().sum(0, keepdim=True)
        return torch.cat([x.new_ones(1, x.shape[1]), x, second])
    out = x.new_empty(n_products(n_tokens, covariance_type), x.shape[1])
    out[0], out[1 : n_tokens + 1] = 1.0, x
    end = n_tokens + 1
    for i in range(n_tokens):  # in the order of tril_indices
        torch.mul(x[: i + 1], x[i], out=out[end : end + i + 1])
        end += i + 1
    return out


def n_products(n_tokens: int, covariance_type: str) -> int:
    """P of the products."""
    second = {"full": n_tokens * (n_tokens + 1) // 2, "diag": n_tokens, "spherical": 1}
    return 1 + n_tokens + second[covariance_type]


def chunks_of(rows: Tensor, covariance_type: str) -> Callable[[], Iterable[Tensor]]:
    """The products by chunks of rows: kept if they are few, made anew in each pass if not."""
    parts = rows.split(max(1, MAX_PRODUCTS // n_products(rows.shape[1], covariance_type)))
    if len(parts) == 1:
        kept = [products_of(rows, covariance_type)]
        return lambda: kept
    return lambda: (products_of(part, covariance_type) for part in parts)


def coefficients_of(mix: Gaussians) -> Tensor:
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
    sums: Tensor, before: Gaussians, covariance_type: str, reg_covar: float
) -> tuple[Gaussians, dict[int, float]]:
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
    mix = Gaussians(
        weights / weights.sum(),
        torch.where(empty[:, None], before.loc, loc),
        torch.where(keep, before.scale, scale),
    )
    return mix, found


def run_em(
    table: Table,
    products: Callable[[], Iterable[Tensor]],
    mix: Gaussians,
    covariance_type: str,
    *,
    tol: float,
    max_iter: int,
    relative: bool = False,
    reg_covar: float = 0.0,
) -> tuple[Gaussians, dict[int, float], bool]:
    """EM until a step gains about ``tol`` nats a row; ``relative``: that share of a score beyond 1.

    Sums of products about the centre of the table cost digits, a share of 1e-16 T / v where v is the least variance:
    little enough for the steps of a climb, whose end is judged elsewhere. Comes with the rows of components that have
    collapsed and begun again, and whether that was in vain: all have, or one has twice.
    """
    n_rows, unit = len(table.rows), float(table.spread.log().sum())
    collapsed: dict[int, float] = {}
    hopeless = False
    coefficients = coefficients_of(mix)
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
            before, coefficients = coefficients, coefficients_of(mix)
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


def from_clusters(table: Table, n_components: int, covariance_type: str, seed: int) -> Gaussians:
    """Gaussians found by EM from the clusters of a k-means on some of the rows."""
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
    nothing = Gaussians(
        rows.new_full((n_components,), 1 / n_components),
        rows[:1].expand(n_components, -1),
        wide.expand(n_components, *shape),
    )
    products, start = chunks_of(rows, covariance_type), 0
    sums = rows.new_zeros(n_components, n_products(rows.shape[1], covariance_type))
    for part in products():
        sums += share[start : start + part.shape[1]].mT @ part.mT
        start += part.shape[1]
    mix = _m_step(sums, nothing, covariance_type, REG_COVAR)[0]
    return run_em(
        table._replace(rows=rows),
        products,
        mix,
        covariance_type,
        tol=START_TOL,
        max_iter=START_STEPS,
        reg_covar=REG_COVAR,
    )[0]
