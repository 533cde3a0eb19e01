"""EM for mixtures of Gaussians: what it sums over rows, its steps, and how they are made longer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from bayes_mpt.models.covariance_prior import CovariancePrior, steps_of
from bayes_mpt.models.gaussians import MIN_WEIGHT, Gaussians, Longer
from bayes_mpt.models.left_out import Shares, plain_shares
from bayes_mpt.models.mixture_patterns import Inverse, blocks_of, expect_block

__all__ = [
    "Climb",
    "Expect",
    "Gaussians",
    "Table",
    "chunks_of",
    "coefficients_of",
    "expectation",
    "from_clusters",
    "m_step",
    "n_products",
    "prior_of",
    "products_of",
    "run_em",
    "table_of",
    "within",
]

START_ROWS = 512  # on which the k-means of the start runs; EM sees them all
START_TRIES = 3  # of that k-means
START_TOL = 1e-3  # nats a row, of the EM of the start
START_STEPS = 100
REG_COVAR = 1e-6  # added to variances by the EM of the start, in units of the columns' variances
MIN_VARIANCE = 1e-10  # of a token given others, in units of its column's: below it a component has collapsed
MAX_PRODUCTS = 2**22  # numbers that EM holds beside the rows
SHARE = 1e-2  # of the covariance of the table, in the prior of the covariances
THIN = 1e-5  # the same of full and tied ones, in which a direction between columns may be thin
DENSE = ("full", "tied")  # covariances with products of different tokens


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
        centre, spread = rows.mean(0), rows.std(0, correction=0)
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


def products_of(rows: Tensor, covariance_type: str, *, gaps: bool = False) -> Tensor:
    """What EM sums over rows (N, T): 1, x and the products of tokens that the covariances are made of, (P, N).

    With ``gaps``, of diagonal and spherical covariances alone: zeros for the missing cells, and last which cells are
    observed.
    """
    x = rows.mT.contiguous()
    n_tokens = len(x)
    if covariance_type not in DENSE:
        observed = [(~x.isnan()).to(x)] if gaps else []
        x = x.nan_to_num(0.0) if gaps else x
        second = x.square() if covariance_type == "diag" else x.square().sum(0, keepdim=True)
        return torch.cat([x.new_ones(1, x.shape[1]), x, second, *observed])
    out = x.new_empty(n_products(n_tokens, covariance_type), x.shape[1])
    out[0], out[1 : n_tokens + 1] = 1.0, x
    end = n_tokens + 1
    for i in range(n_tokens):  # in the order of tril_indices
        torch.mul(x[: i + 1], x[i], out=out[end : end + i + 1])
        end += i + 1
    return out


def n_products(n_tokens: int, covariance_type: str) -> int:
    """P of the products, where no cell is missing."""
    second = {"diag": n_tokens, "spherical": 1}.get(covariance_type, n_tokens * (n_tokens + 1) // 2)
    return 1 + n_tokens + second


def chunks_of(rows: Tensor, covariance_type: str, *, gaps: bool = False) -> Callable[[], Iterable[Tensor]]:
    """The products by chunks of rows: kept if they are few, made anew in each pass if not."""
    parts = rows.split(max(1, MAX_PRODUCTS // (n_products(rows.shape[1], covariance_type) + rows.shape[1])))
    if len(parts) == 1:
        kept = [products_of(rows, covariance_type, gaps=gaps)]
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
        i, j = torch.tril_indices(n_tokens, n_tokens, device=mix.loc.device)
        # one product stands for (i, j) and (j, i)
        second = (precision[..., i, j] * torch.where(i == j, -0.5, -1.0)).expand(*shape, -1)
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
        return _of_products(chunks_of(rows, covariance_type))
    if covariance_type not in DENSE:
        return _of_products(chunks_of(rows, covariance_type, gaps=True), gaps=True)
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


def _of_products(products: Callable[[], Iterable[Tensor]], *, gaps: bool = False) -> Expect:
    def expect(mix: Gaussians, coefficients: Tensor, shares: Shares = plain_shares) -> tuple[Tensor, Tensor]:
        sums, total = torch.zeros_like(coefficients), coefficients.new_zeros(coefficients.shape[:-2])
        n_tokens = mix.loc.shape[-1]
        for key, part in enumerate(products()):
            log_prob = coefficients @ part  # (..., K, n)
            seen = part[-n_tokens:] if gaps else torch.ones_like(part[:n_tokens])

            def square(log_prob: Tensor = log_prob, seen: Tensor = seen) -> Tensor:
                return -2 * (log_prob - mix.weights.log()[..., None]) - _normaliser(mix, seen)

            share, density = shares(("rows", key), log_prob, square, seen.sum(0))
            sums += share @ part.mT
            total += density.sum(-1)
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
    i, j = torch.tril_indices(n_tokens, n_tokens, device=loc.device)
    cov = loc.new_zeros(*loc.shape, n_tokens)  # the lower half
    cov[..., i, j] = second - loc[..., i] * loc[..., j]
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
    return torch.linalg.cholesky(scale) if scale.ndim == 2 else scale.sqrt()


def within(table: Table, loc: Tensor) -> Tensor:
    """Centres (K, T) no further from the cells of a table than these from each other: beyond, the score is flat."""
    rows = table.rows
    high = rows.nan_to_num(-math.inf).amax(0)
    low = rows.nan_to_num(math.inf).amin(0)
    room = high - low
    return torch.where(room >= 0, loc.clamp(low - room, high + room), loc)


def prior_of(table: Table, n_components: int, covariance_type: str) -> CovariancePrior:
    """The prior of the covariances in the units of a table; zero where that has no spread in some direction."""
    n_rows, n_tokens = table.rows.shape
    share = THIN if covariance_type in DENSE and n_tokens > 1 else SHARE
    if covariance_type in DENSE:
        scale = _covariance(table) * (~table.constant)
    elif covariance_type == "diag":
        scale = (~table.constant).to(table.rows)
    else:  # the columns' mean variance is one
        scale = (~table.constant).any()[None].to(table.rows)
    prior = CovariancePrior(share * scale / n_components ** (2 / n_tokens), n_tokens)
    if not prior.proper:
        return prior._replace(scale=torch.zeros_like(scale))
    # a density of at most 1 / h for N / K rows: no cell has more than all of the probability
    rounding = n_rows / n_components * steps_of(table.rows).square() / (2 * math.pi)
    if covariance_type == "spherical":
        rounding = rounding.mean(0, keepdim=True)
    return prior._replace(scale=prior.scale + (torch.diag(rounding) if scale.ndim == 2 else rounding))


def _covariance(table: Table) -> Tensor:
    """Of the table, by EM where cells are missing."""
    rows = table.rows
    gaps = rows.isnan()
    if not bool(gaps.any()):
        return rows.mT @ rows / len(rows)
    eye = torch.eye(rows.shape[1]).to(rows)
    whole = Gaussians(rows.new_ones(1), rows.new_zeros(1, rows.shape[1]), eye[None])
    climb = run_em(table, expectation(rows, "full"), whole, "full", tol=START_TOL, max_iter=START_STEPS)
    if climb.hopeless:
        return torch.zeros_like(eye)
    return (climb.mix.scale @ climb.mix.scale.mT)[0]


# ---------------------------------------------------------------------------------------------------------- the climb


class Climb(NamedTuple):
    """Where EM has ended."""

    mix: Gaussians
    collapsed: dict[int, float]
    """The rows of components that have collapsed and begun again"""
    hopeless: bool
    """Whether that was in vain: all have, or one has twice"""
    value: float
    """Log-density of all rows, in the units of the table, and log prior, at the place before the last step"""
    n_steps: int


def run_em(
    table: Table,
    expect: Expect,
    mix: Gaussians,
    covariance_type: str,
    *,
    tol: float,
    max_iter: int,
    prior: CovariancePrior | None = None,
    relative: bool = False,
    reg_covar: float = 0.0,
) -> Climb:
    """EM until a step gains about ``tol`` nats a row; ``relative``: that share of a score beyond 1.

    Where EM creeps, steps are made longer (`Longer`); one that does not rise by what EM's own step does is taken
    back. Sums of products about the centre of the table cost digits, a share of 1e-16 T / v where v is the least
    variance: little enough for the steps of a climb, whose end is judged elsewhere.
    """
    n_rows, unit = len(table.rows), float(table.spread.log().sum())
    collapsed: dict[int, float] = {}
    hopeless, n_steps, best, longer = False, 0, -math.inf, Longer()
    end = mix  # of EM's own step from the best place so far
    gaps = covariance_type not in DENSE and bool(table.rows.isnan().any())
    coefficients = after = coefficients_of(mix, gaps=gaps)
    try:
        for step in range(max_iter):
            n_steps = step + 1
            try:
                sums, total = expect(mix, coefficients)
                value = float(total) + _log_prior(prior, mix)
            except torch.linalg.LinAlgError:
                value = math.nan
            if mix is not end and not value >= best:  # a longer step was too long
                mix, coefficients, best = end, after, -math.inf
                longer.forget()
                continue
            new, fallen = m_step(sums, mix, covariance_type, prior, reg_covar)
            found = {c: float(sums[c, 0]) for c in fallen.nonzero()[:, 0].tolist()}
            hopeless = len(found) == len(sums) or not found.keys().isdisjoint(collapsed)
            collapsed |= found
            # The score gains what the expected log-density does, and the divergence between the shares before and
            # after, which is about as large where the steps are small and slow, and less elsewhere.
            after = coefficients_of(new, gaps=gaps)
            gain = float(((after - coefficients) * sums).sum())
            gain += _log_prior(prior, new) - _log_prior(prior, mix)
            end, best = new, value + (0.0 if found else gain)
            if hopeless:
                break
            score = float(total) / n_rows - unit
            small = tol * (max(1.0, abs(score)) if relative else 1.0)
            if not found and not 2 * gain / n_rows > small:
                break
            mix = new if found or reg_covar else longer(mix, new)
            coefficients = after if mix is new else coefficients_of(mix, gaps=gaps)
    except KeyboardInterrupt as press:
        if end is mix and n_steps < 2:
            raise
        raise KeyboardInterrupt(end) from press
    return Climb(end, collapsed, hopeless, best, n_steps)


def _log_prior(prior: CovariancePrior | None, mix: Gaussians) -> float:
    return 0.0 if prior is None else float(prior.log_prob(mix.scale))


# ---------------------------------------------------------------------------------------------------------- the start


def from_clusters(
    table: Table,
    n_components: int,
    covariance_type: str,
    seed: int,
    prior: CovariancePrior | None = None,
    n_tries: int = START_TRIES,
    n_steps: int = START_STEPS,
) -> Gaussians:
    """Gaussians found by EM from the clusters of a k-means on some of the rows, none of whose cells is missing.

    The best of ``n_tries`` k-means; with none, of random rows and what is nearest to them.
    """
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
        how = {"n_init": n_tries} if n_tries else {"n_init": 1, "init": "random", "max_iter": 1}
        found = KMeans(n_components, random_state=rng, **how).fit(some)
    centre = torch.from_numpy(found.cluster_centers_).to(rows)
    # |x - m|^2 is least where m' x - |m|^2 / 2 is largest
    nearest = (rows @ centre.mT - 0.5 * centre.square().sum(1)).argmax(1)
    share = torch.nn.functional.one_hot(nearest, n_components).to(rows)  # (N, K)
    products, start = chunks_of(rows, covariance_type), 0
    sums = rows.new_zeros(n_components, n_products(rows.shape[1], covariance_type))
    for part in products():
        sums += share[start : start + part.shape[1]].mT @ part.mT
        start += part.shape[1]
    wide = _wide(rows, n_components, covariance_type)
    mix = m_step(sums, wide, covariance_type, prior, REG_COVAR)[0]
    if not n_steps:
        return mix
    climb = run_em(
        table._replace(rows=rows),
        _of_products(products),
        mix,
        covariance_type,
        tol=START_TOL,
        max_iter=n_steps,
        prior=prior,
        reg_covar=REG_COVAR,
    )
    return climb.mix


def _wide(rows: Tensor, n_components: int, covariance_type: str) -> Gaussians:
    """Components without rows, as wide as the table."""
    n_tokens = rows.shape[1]
    eye = torch.eye(n_tokens).to(rows)
    scale = {
        "full": eye.expand(n_components, -1, -1),
        "tied": eye[None],
        "diag": rows.new_ones(n_components, n_tokens),
        "spherical": rows.new_ones(n_components, 1),
    }[covariance_type]
    weights = rows.new_full((n_components,), 1 / n_components)
    return Gaussians(weights, rows[:1].expand(n_components, -1), scale)
