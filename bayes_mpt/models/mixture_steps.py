"""The steps of EM for mixtures of Gaussians: what it sums over rows, and the mixture that follows from the sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bayes_mpt.models.covariance_prior import CovariancePrior
from bayes_mpt.models.gaussians import MIN_WEIGHT, Gaussians
from bayes_mpt.models.left_out import Shares, plain_shares
from bayes_mpt.models.mixture_patterns import Inverse, blocks_of, expect_block
from bayes_mpt.models.mixture_products import DENSE, n_products, products_of

__all__ = [
    "Expect",
    "Table",
    "chunks_of",
    "coefficients_of",
    "expectation",
    "expectation_of",
    "m_step",
    "table_of",
]

MIN_VARIANCE = 1e-10  # of a token given others, in units of its column's: below it a component has collapsed
MAX_PRODUCTS = 2**22  # numbers that EM holds beside the rows


class Table(NamedTuple):
    """Rows in units in which EM's thresholds suit all columns: (x - centre) / spread."""

    rows: Tensor
    """(N, T), float64, NaN where missing"""
    centre: Tensor
    """(T,)"""
    spread: Tensor
    """(T,)"""
    constant: Tensor
    """(T,) whether a column is"""


class Pairs(NamedTuple):
    """Where the products of two tokens stand: (i, j) and (j, i) are one of T (T + 1) / 2."""

    lower: Tensor
    """Their places in a matrix (T, T) in one row"""
    square: Tensor
    """For each place of the matrix, (T T,), which of them stands there"""
    factor: Tensor
    """Of a matrix A of which x'A x / -2 is a sum over them"""

    @classmethod
    @cache
    def of(cls, n_tokens: int) -> Pairs:
        """On the CPU."""
        i, j = torch.tril_indices(n_tokens, n_tokens, device="cpu")
        square = torch.empty(n_tokens, n_tokens, dtype=torch.long, device="cpu")
        square[i, j] = square[j, i] = torch.arange(len(i), device="cpu")
        factor = torch.where(i == j, -0.5, -1.0).double()
        return cls(i * n_tokens + j, square.flatten(), factor)

    def to(self, device: torch.device) -> Pairs:
        """On another device."""
        return self if device.type == "cpu" else Pairs(*(part.to(device) for part in self))


class Expect(Protocol):
    """Sums over rows of the expected products (..., K, P), and the log-density (...) of all rows.

    From Gaussians and their `coefficients_of`.
    """

    def __call__(
        self, mix: Gaussians, coefficients: Tensor, shares: Shares = plain_shares
    ) -> tuple[Tensor, Tensor]: ...


def table_of(x: Tensor, covariance_type: str) -> Table:
    """Rows x (N, T) in such units."""
    rows = x.detach().double()
    if has_gaps := bool(rows.isnan().any()):
        seen = ~rows.isnan()
        centre = rows.nanmean(0).nan_to_num(0.0)
        spread = (rows - centre).square().nanmean(0).nan_to_num(0.0).sqrt()
        first = rows.gather(0, seen.double().argmax(0)[None])
        constant = ((rows == first) | ~seen).all(0)
    else:
        centre = rows.mean(0)
        spread = (rows - centre).square().mean(0).sqrt()
        constant = (rows == rows[0]).all(0)
    spread = torch.where(constant, 0.0, spread)  # the mean of a constant need not be it
    if covariance_type == "spherical":  # columns share their unit, or one variance would mean something else
        spread = spread.square().mean().sqrt().expand(len(spread))
    spread = torch.where(spread == 0, 1.0, spread)
    rows = (rows - centre) / spread
    if has_gaps:  # a row of which nothing is seen says nothing
        rows = rows[~rows.isnan().all(1)]
    return Table(rows, centre, spread, constant)


# ------------------------------------------------------------------------------------------------------- the E-step


def chunks_of(
    rows: Tensor,
    covariance_type: str,
    *,
    gaps: bool = False,
    at_once: int | None = None,
    groups: Sequence[int] | None = None,
) -> Callable[[], Iterable[Tensor]]:
    """The products by chunks of rows, ``at_once`` in each: kept if they are few, made anew in each pass if not.

    No chunk has rows of two ``groups``, which are so many rows, one after the other.
    """
    most = max(1, MAX_PRODUCTS // (n_products(rows.shape[1], covariance_type) + rows.shape[1]))
    step = most if at_once is None else min(most, at_once)
    parts = [part for group in rows.split(groups or [len(rows)]) for part in group.split(step)]
    if len(rows) <= most:
        kept = [products_of(part, covariance_type, gaps=gaps) for part in parts]
        return lambda: kept
    return lambda: (products_of(part, covariance_type, gaps=gaps) for part in parts)


def coefficients_of(mix: Gaussians, *, gaps: bool = False) -> Tensor:
    """log w_k N(x; loc_k, S_k) is linear in the products of x: (..., K, P); ``gaps``: in those with missing cells."""
    # log w - log det S / 2 - T log(2 pi) / 2 - loc' S^-1 loc / 2  +  (S^-1 loc)' x  -  x' S^-1 x / 2
    n_tokens, shape = mix.loc.shape[-1], mix.loc.shape[:-1]
    if mix.dense:
        log_det = mix.scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        eye = torch.eye(n_tokens, dtype=mix.loc.dtype, device=mix.loc.device)
        root = torch.linalg.solve_triangular(mix.scale, eye, upper=False)
        precision = root.mT @ root
        linear = (precision @ mix.loc[..., None])[..., 0]
        pairs = Pairs.of(n_tokens).to(mix.loc.device)
        second = (precision.flatten(-2)[..., pairs.lower] * pairs.factor).expand(*shape, -1)
    else:
        linear = mix.loc / mix.scale.square()
        second = -0.5 / mix.scale.square()
        if gaps:
            of_cell = -mix.scale.log() - 0.5 * linear * mix.loc - 0.5 * math.log(2 * math.pi)
            return torch.cat([mix.weights.log()[..., None], linear, second, of_cell], -1)
        log_det = mix.scale.log().expand_as(mix.loc).sum(-1)
    constant = mix.weights.log() - log_det - 0.5 * (linear * mix.loc).sum(-1)
    return torch.cat([constant[..., None] - 0.5 * n_tokens * math.log(2 * math.pi), linear, second], -1)


def expectation(rows: Tensor, covariance_type: str) -> Expect:
    """The E-step for rows (N, T), NaN where missing."""
    gaps = rows.isnan().any(1)
    if not bool(gaps.any()):
        return expectation_of(chunks_of(rows, covariance_type))
    if covariance_type not in DENSE:
        return expectation_of(chunks_of(rows, covariance_type, gaps=True), gaps=True)
    complete, blocks = expectation(rows[~gaps], covariance_type), blocks_of(rows[gaps])
    i, j = torch.tril_indices(rows.shape[1], rows.shape[1], device=rows.device)

    def expect(mix: Gaussians, coefficients: Tensor, shares: Shares = plain_shares) -> tuple[Tensor, Tensor]:
        sums, total = complete(mix, coefficients, shares)
        log_weights, inverse = mix.weights.log(), Inverse.of(mix.scale)
        for key, block in enumerate(blocks):
            count, first, second, found = expect_block(
                block, log_weights, mix.loc, inverse, shares, ("block", key)
            )
            sums += torch.cat([count[..., None], first, second[..., i, j]], -1)
            total += found
        return sums, total

    return expect


def expectation_of(products: Callable[[], Iterable[Tensor]], *, gaps: bool = False) -> Expect:
    """The E-step for rows of which these are the products by chunks."""

    def expect(mix: Gaussians, coefficients: Tensor, shares: Shares = plain_shares) -> tuple[Tensor, Tensor]:
        sums, total = torch.zeros_like(coefficients), coefficients.new_zeros(coefficients.shape[:-2])
        n_tokens = mix.loc.shape[-1]
        start = 0
        for part in products():
            log_prob = coefficients @ part  # (..., K, n)
            seen = part[-n_tokens:] if gaps else part[:1].expand(n_tokens, -1)  # all of ones

            def square(log_prob: Tensor = log_prob, seen: Tensor = seen) -> Tensor:
                return -2 * (log_prob - mix.weights.log()[..., None]) - _normaliser(mix, seen)

            n_cells = seen.sum(0) if gaps else part[0].new_tensor(n_tokens).expand(part.shape[1])
            share, density = shares(("rows", start), log_prob, square, n_cells)
            sums += share @ part.mT
            total += density.sum(-1)
            start += part.shape[1]
        return sums, total

    return expect


def _normaliser(mix: Gaussians, seen: Tensor) -> Tensor:
    """log det(2 pi S_oo) (..., K, n) of rows that show these cells (T, n); all, if covariances are dense."""
    if mix.dense:
        each = (2 * mix.scale.diagonal(dim1=-2, dim2=-1).log()).expand_as(mix.loc)
    else:
        each = (2 * mix.scale.log()).expand_as(mix.loc)
    return (each + math.log(2 * math.pi)) @ seen


# ------------------------------------------------------------------------------------------------------- the M-step


def m_step(
    sums: Tensor, before: Gaussians, covariance_type: str, prior: CovariancePrior | None, reg_covar: float
) -> tuple[Gaussians, Tensor]:
    """The mixture whose expected products are these sums (..., K, P), and which components (..., K) have collapsed."""
    n_tokens = before.loc.shape[-1]
    count = sums[..., 0]
    weights = (count / count.sum(-1, keepdim=True)).clamp(min=MIN_WEIGHT)
    empty = weights <= MIN_WEIGHT  # says nothing of loc and scale, which stay
    if covariance_type in DENSE:
        loc, scale, least = _dense(sums, before, empty, covariance_type, prior, reg_covar)
    else:
        loc, scale = _diagonal(sums, before, covariance_type, prior, reg_covar)
        least = scale.square().amin(-1)
    # under a prior nothing collapses
    fine = least > (MIN_VARIANCE if prior is None else 0.0)
    collapsed = ~fine & ~empty  # NaN too
    if bool(collapsed.any()):  # begin again, empty and as wide as the table
        weights = torch.where(collapsed, MIN_WEIGHT, weights)
        loc[collapsed] = 0.0
        scale[~fine] = torch.eye(n_tokens).to(scale) if before.dense else 1.0
    if not bool(empty.any()):
        return Gaussians(weights / weights.sum(-1, keepdim=True), loc, scale), collapsed
    if covariance_type != "tied":
        stays = before.scale if prior is None else _mode(prior)
        scale = torch.where(empty.reshape(*empty.shape, *[1] * (scale.ndim - empty.ndim)), stays, scale)
    weights = weights / weights.sum(-1, keepdim=True)
    return Gaussians(weights, torch.where(empty[..., None], before.loc, loc), scale), collapsed


def _dense(
    sums: Tensor,
    before: Gaussians,
    empty: Tensor,
    covariance_type: str,
    prior: CovariancePrior | None,
    reg_covar: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Centres, Cholesky factors, and the least variance of a token given others."""
    n_tokens, count = before.loc.shape[-1], sums[..., 0]
    mean = sums[..., 1:] / torch.where(empty, 1.0, count)[..., None]
    loc, second = mean[..., :n_tokens], mean[..., n_tokens:]
    square = Pairs.of(n_tokens).to(loc.device).square
    cov = second[..., square].unflatten(-1, (n_tokens, n_tokens)) - loc[..., None] * loc[..., None, :]
    if covariance_type == "tied":
        cov = (torch.where(empty, 0.0, count)[..., None, None] * cov).sum(-3, keepdim=True)
        count = count.sum(-1, keepdim=True)
        cov, empty = cov / count[..., None, None], empty[..., :1] & False
    if prior is not None:
        n = count[..., None, None]
        cov = (n * cov + prior.scale) / (n + prior.n_rows)
    cov.diagonal(dim1=-2, dim2=-1).add_(reg_covar)
    eye = torch.eye(n_tokens).to(cov)
    scale, failed = torch.linalg.cholesky_ex(torch.where(empty[..., None, None], eye, cov))
    least = torch.where(failed > 0, 0.0, scale.diagonal(dim1=-2, dim2=-1).square().amin(-1))
    return loc, scale, least


def _diagonal(
    sums: Tensor, before: Gaussians, covariance_type: str, prior: CovariancePrior | None, reg_covar: float
) -> tuple[Tensor, Tensor]:
    """Centres and standard deviations; of missing cells the sums know nothing, and need to know nothing."""
    n_tokens = before.loc.shape[-1]
    n_second = n_tokens if covariance_type == "diag" else 1
    second = sums[..., n_tokens + 1 : n_tokens + 1 + n_second]
    cells = sums[..., n_tokens + 1 + n_second :]  # how many each token has, where some are missing
    if not cells.shape[-1]:
        cells = sums[..., :1].expand_as(before.loc)
    unseen = cells <= MIN_WEIGHT * MIN_WEIGHT
    loc = torch.where(unseen, before.loc, sums[..., 1 : n_tokens + 1] / torch.where(unseen, 1.0, cells))
    square = cells * loc.square()
    if covariance_type == "spherical":
        square, cells = square.sum(-1, keepdim=True), cells.sum(-1, keepdim=True)
        unseen = unseen.all(-1, keepdim=True)
    variance, own = (second - square).clamp(min=0), (1 if covariance_type == "diag" else n_tokens)
    if prior is not None:
        variance = (variance + own * prior.scale) / (cells + own)
    else:
        variance = torch.where(unseen, before.scale.square(), variance / torch.where(unseen, 1.0, cells))
    return loc, (variance + reg_covar).sqrt()


def _mode(prior: CovariancePrior) -> Tensor:
    """Scales of a component without rows."""
    scale = prior.scale / prior.n_rows
    return torch.linalg.cholesky(scale) if prior.dense else scale.sqrt()
