"""Fits of a mixture of Gaussians to some rows of a table that score the others, all of them side by side.

The products of all rows are made once, in the units of the whole table; each step of EM reads them once for all fits.
What a fit starts from and its prior are of its own rows, in their own units, and only then put into the common ones:
hidden rows have no part in where it ends. Rows that the same fits see stand together, so that a step of EM leaves out
what a fit does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from bayes_mpt.models.gaussians import Gaussians
from bayes_mpt.models.left_out import Shares, plain_shares
from bayes_mpt.models.mixture_climb import Climb, Hill, Seen, climb_together
from bayes_mpt.models.mixture_clusters import centres_of, nearest
from bayes_mpt.models.mixture_em import REG_COVAR, START_STEPS, START_TOL, START_TRIES, around
from bayes_mpt.models.mixture_gain import Purity, squares_of
from bayes_mpt.models.mixture_own_rows import OwnRows, OwnTable
from bayes_mpt.models.mixture_steps import Expect, Table, chunks_of, expectation_of, m_step, table_of

__all__ = ["scores_of_others"]

MAX_NUMBERS = 2**22  # shares of rows that one step holds
MOST_SPLITS = 62  # of which a number says which see a row
MIN_GROUP = 256  # rows that are read together: fewer take longer than the fits that do not see them
CHUNK = 2**18  # of which so many at a time stay in the cache

Split = tuple[Tensor, Tensor]
"""Rows that are fitted, and rows that are scored."""


def scores_of_others(
    x: Tensor,
    splits: Sequence[Split],
    n_components: int,
    covariance_type: str,
    *,
    with_prior: bool,
    seed: int,
    tol: float,
    max_iter: int,
) -> list[Tensor | None]:
    """Log-densities of the other rows of each split by a fit to the first; None where it did not end by its rule.

    Parameters
    ----------
    x : Tensor of shape (N, T)
    splits : sequence of (Tensor, Tensor)
    n_components, covariance_type
        As of `bayes_mpt.models.GaussianMixture`; ``with_prior``: covariances have one.
    seed : int
        Of each start.
    tol, max_iter
        As of `climb_together`, to the end.
    """
    if not splits or bool(x.isnan().any()):
        return [None] * len(splits)
    together = max(1, MAX_NUMBERS // (n_components * len(x)))
    order, groups = _grouped(splits, len(x))
    place = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    whole = table_of(x[order], covariance_type)
    at_once = max(1, CHUNK // (n_components * min(together, len(splits))))
    products = chunks_of(whole.rows, covariance_type, at_once=at_once, groups=groups)
    expect = expectation_of(products) if groups is None else _expectation_of_seen(products)
    found: list[Tensor | None] = [None] * len(splits)
    for keys in torch.arange(len(splits)).split(together):
        places = {key: place[splits[key][0]] for key in keys.tolist()}
        own = OwnRows.by_one_pass(
            whole,
            expect,
            _visible(whole, places),
            list(places.values()),
            n_components,
            covariance_type,
            seed,
            with_prior=with_prior,
        )
        if own is None:
            tables = {
                key: OwnTable.of(x[splits[key][0]], n_components, covariance_type, with_prior=with_prior)
                for key in places
            }
            known = {key: table for key, table in tables.items() if table is not None}
            if not known:
                continue
            own, places = OwnRows.one_by_one(whole, list(known.values())), {key: places[key] for key in known}
        visible = _visible(whole, places)
        climbs = _fit(
            whole,
            expect,
            covariance_type,
            visible,
            own,
            n_components,
            seed,
            tol=tol,
            max_iter=max_iter,
        )
        for key, climb in zip(places, climbs, strict=True):
            if climb.settled and not climb.collapsed:
                score = climb.mix.log_prob(whole.rows[place[splits[key][1]]]) - whole.spread.log().sum()
                found[key] = score if bool(torch.isfinite(score).all()) else None
    return found


def _visible(whole: Table, places: dict[int, Tensor]) -> Tensor:
    """One (B, N) for the rows at these places, zero for the others."""
    visible = whole.rows.new_zeros(len(places), len(whole.rows))
    for seen, index in zip(visible, places.values(), strict=True):
        seen[index] = 1.0
    return visible


def _grouped(splits: Sequence[Split], n_rows: int) -> tuple[Tensor, list[int] | None]:
    """An order of the rows in which those that the same splits fit stand together, and the sizes of these groups.

    None where the groups would be small, as of folds that are drawn again and again: then rows stay as they are.
    """
    fitted = torch.zeros(n_rows, dtype=torch.long, device=splits[0][0].device)  # in binary
    for key, (rows, _) in enumerate(splits[:MOST_SPLITS]):
        fitted[rows] += 1 << key
    _, group, count = torch.unique(fitted, return_inverse=True, return_counts=True)
    if len(count) * MIN_GROUP > n_rows or len(splits) > MOST_SPLITS:
        return torch.arange(n_rows, device=group.device), None
    return group.argsort(stable=True), count.tolist()


def _expectation_of_seen(products: Callable[[], Iterable[Tensor]]) -> Expect:
    """The E-step of fits, of which each sees all rows of a chunk of these products, or none."""
    of_all = expectation_of(products)

    def expect(mix: Gaussians, coefficients: Tensor, shares: Shares = plain_shares) -> tuple[Tensor, Tensor]:
        purity = shares if isinstance(shares, Purity) else None
        seen = shares if purity is None else purity.of
        if not isinstance(seen, Seen):  # who asks more of the shares gets them of all
            return of_all(mix, coefficients, shares)
        sums, total, start = torch.zeros_like(coefficients), coefficients.new_zeros(len(coefficients)), 0
        squares = coefficients.new_zeros(coefficients.shape[:2])
        for part in products():
            fits = seen.visible[:, start].nonzero()[:, 0]
            share, density = seen.of(coefficients[fits] @ part)
            sums.index_add_(0, fits, share @ part.mT)
            total.index_add_(0, fits, density.sum(-1))
            if purity is not None:
                squares.index_add_(0, fits, squares_of(share))
            start += part.shape[1]
        if purity is not None:
            purity.squares = squares
        return sums, total

    return expect


def _fit(
    whole: Table,
    expect: Expect,
    covariance_type: str,
    visible: Tensor,
    own: OwnRows,
    n_components: int,
    seed: int,
    *,
    tol: float,
    max_iter: int,
) -> list[Climb]:
    """Side by side: the start of each, its short EM, and the climb."""
    unit = float(whole.spread.log().sum())
    hill = Hill(expect, covariance_type, visible.sum(1), unit, prior=own.prior, visible=visible)
    centres = centres_of(own.some, n_components, seed, START_TRIES)
    wide = around(own.centre[:, None] + own.unit[:, None] * centres, own.unit, covariance_type)
    sums, _ = expect(wide, hill.coefficients(wide), Seen(visible, nearest))
    mix, _ = m_step(sums, wide, covariance_type, own.prior, REG_COVAR)
    begun = climb_together(hill, mix, tol=START_TOL, max_iter=START_STEPS, reg_covar=REG_COVAR)
    mix = Gaussians(*(torch.stack(parts) for parts in zip(*(climb.mix for climb in begun), strict=True)))
    return climb_together(hill, mix, tol=tol, max_iter=max_iter, to_end=True)
