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

from bayes_mpt.models.covariance_prior import CovariancePrior
from bayes_mpt.models.gaussians import Gaussians
from bayes_mpt.models.left_out import Shares, plain_shares, shares_of
from bayes_mpt.models.mixture_climb import Climb, Hill, Seen, climb_together
from bayes_mpt.models.mixture_em import REG_COVAR, START_STEPS, START_TOL, clusters_of, of_shares, prior_of
from bayes_mpt.models.mixture_steps import Expect, Table, chunks_of, expectation_of, table_of

__all__ = ["scores_of_others"]

MAX_NUMBERS = 2**22  # shares of rows that one step holds
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
    starts: dict[int, _Start] = {}
    for key, (rows, _) in enumerate(splits):
        start = _Start.of(x[rows], n_components, covariance_type, seed, with_prior=with_prior)
        if start is not None:
            starts[key] = start
    for keys in torch.tensor(list(starts), dtype=torch.long).split(together):
        which = keys.tolist()
        climbs = _fit(
            whole,
            products,
            expect,
            covariance_type,
            [(place[splits[key][0]], starts[key]) for key in which],
            tol=tol,
            max_iter=max_iter,
        )
        for key, climb in zip(which, climbs, strict=True):
            if climb.settled and not climb.collapsed:
                score = climb.mix.log_prob(whole.rows[place[splits[key][1]]]) - whole.spread.log().sum()
                found[key] = score if bool(torch.isfinite(score).all()) else None
    return found


def _grouped(splits: Sequence[Split], n_rows: int) -> tuple[Tensor, list[int] | None]:
    """An order of the rows in which those that the same splits fit stand together, and the sizes of these groups.

    None where the groups would be small, as of folds that are drawn again and again: then rows stay as they are.
    """
    fitted = torch.zeros(n_rows, len(splits), dtype=torch.bool, device=splits[0][0].device)
    for key, (rows, _) in enumerate(splits):
        fitted[rows, key] = True
    _, group, count = torch.unique(fitted, dim=0, return_inverse=True, return_counts=True)
    if len(count) * MIN_GROUP > n_rows:
        return torch.arange(n_rows, device=group.device), None
    return group.argsort(stable=True), count.tolist()


def _expectation_of_seen(products: Callable[[], Iterable[Tensor]]) -> Expect:
    """The E-step of fits, of which each sees all rows of a chunk of these products, or none."""
    of_all = expectation_of(products)

    def expect(mix: Gaussians, coefficients: Tensor, shares: Shares = plain_shares) -> tuple[Tensor, Tensor]:
        if not isinstance(shares, Seen):  # who asks more of the shares gets them of all
            return of_all(mix, coefficients, shares)
        sums, total, start = torch.zeros_like(coefficients), coefficients.new_zeros(len(coefficients)), 0
        for part in products():
            fits = shares.visible[:, start].nonzero()[:, 0]
            share, density = shares_of(coefficients[fits] @ part)
            sums.index_add_(0, fits, share @ part.mT)
            total.index_add_(0, fits, density.sum(-1))
            start += part.shape[1]
        return sums, total

    return expect


class _Start:
    """Of one fit, from its rows alone."""

    def __init__(self, table: Table, share: Tensor, prior: CovariancePrior | None):
        self.table, self.share, self.prior = table, share, prior

    @classmethod
    def of(
        cls, x: Tensor, n_components: int, covariance_type: str, seed: int, *, with_prior: bool
    ) -> _Start | None:
        """None where rows are too few, or a direction has no spread, which is refused elsewhere."""
        table = table_of(x, covariance_type)
        if len(table.rows) < max(2, n_components):
            return None
        prior = prior_of(table, n_components, covariance_type) if with_prior else None
        if prior is not None and not prior.proper:
            return None
        return cls(table, clusters_of(table.rows, n_components, seed), prior)

    def scale_in(self, whole: Table) -> Tensor:
        """That of the prior in the units of another table: (1, T, T), (1, T) or (1, 1)."""
        assert self.prior is not None
        unit, scale = self.table.spread / whole.spread, self.prior.scale
        if self.prior.dense:
            return (unit[:, None] * scale * unit)[None]
        return (unit[: len(scale)].square() * scale)[None]


def _fit(
    whole: Table,
    products: Callable[[], Iterable[Tensor]],
    expect: Expect,
    covariance_type: str,
    fits: list[tuple[Tensor, _Start]],
    *,
    tol: float,
    max_iter: int,
) -> list[Climb]:
    """Side by side: the short EM of each start, and the climb."""
    rows = whole.rows
    visible = rows.new_zeros(len(fits), len(rows))
    for seen, (index, _) in zip(visible, fits, strict=True):
        seen[index] = 1.0
    prior: CovariancePrior | None = None
    if fits[0][1].prior is not None:
        prior = CovariancePrior(torch.stack([start.scale_in(whole) for _, start in fits]), rows.shape[1])
    mixes = []
    for b, (index, start) in enumerate(fits):
        share = rows.new_zeros(len(rows), start.share.shape[1])
        share[index] = start.share
        own = None if prior is None else prior._replace(scale=prior.scale[b, 0])
        mixes.append(of_shares(share, products(), rows[index[0]], covariance_type, own))
    mix = _together(mixes)
    hill = Hill(
        expect,
        covariance_type,
        visible.sum(1),
        float(whole.spread.log().sum()),
        prior=prior,
        visible=visible,
    )
    begun = climb_together(hill, mix, tol=START_TOL, max_iter=START_STEPS, reg_covar=REG_COVAR)
    return climb_together(
        hill, _together([climb.mix for climb in begun]), tol=tol, max_iter=max_iter, to_end=True
    )


def _together(mixes: list[Gaussians]) -> Gaussians:
    return Gaussians(*(torch.stack(parts) for parts in zip(*mixes, strict=True)))
