"""Fits of a mixture of Gaussians to some rows of a table that score the others, all of them side by side.

The products of all rows are made once, in the units of the whole table; each step of EM reads them once for all fits.
What a fit starts from and its prior are of its own rows, in their own units, and only then put into the common ones:
hidden rows have no part in where it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from bayes_mpt.models.covariance_prior import CovariancePrior
from bayes_mpt.models.gaussians import Gaussians
from bayes_mpt.models.mixture_climb import Climb, Hill, climb_together
from bayes_mpt.models.mixture_em import REG_COVAR, START_STEPS, START_TOL, clusters_of, of_shares, prior_of
from bayes_mpt.models.mixture_steps import Table, chunks_of, expectation_of, table_of

__all__ = ["scores_of_others"]

MAX_NUMBERS = 2**22  # shares of rows that one step holds
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
    if bool(x.isnan().any()):
        return [None] * len(splits)
    together = max(1, MAX_NUMBERS // (n_components * len(x)))
    whole = table_of(x, covariance_type)
    at_once = max(1, CHUNK // (n_components * min(together, len(splits))))
    products = chunks_of(whole.rows, covariance_type, at_once=at_once)
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
            covariance_type,
            [(splits[key][0], starts[key]) for key in which],
            tol=tol,
            max_iter=max_iter,
        )
        for key, climb in zip(which, climbs, strict=True):
            if climb.settled and not climb.collapsed:
                score = climb.mix.log_prob(whole.rows[splits[key][1]]) - whole.spread.log().sum()
                found[key] = score if bool(torch.isfinite(score).all()) else None
    return found


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
        expectation_of(products),
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
