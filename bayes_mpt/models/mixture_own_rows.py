"""What fits to some rows of a table start from, each known from its own rows alone: units, prior, rows of k-means.

Where the rows are many and plain, one pass over the products of the whole table has means and covariances of all fits:
those of a mixture of one component. Sums about the centre of the whole table lose digits where own rows are narrow
in some column, so that there each fit's rows are read by themselves; also where a column may be rounded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayes_mpt.models.covariance_prior import FEW_CELLS, SINGULAR, CovariancePrior, may_be_rounded
from bayes_mpt.models.mixture_climb import Seen
from bayes_mpt.models.mixture_clusters import places_of
from bayes_mpt.models.mixture_em import around, prior_of, share_of_table
from bayes_mpt.models.mixture_products import n_products
from bayes_mpt.models.mixture_steps import Expect, Table, m_step, table_of

__all__ = ["OwnRows", "OwnTable"]

NARROW = 1e-4  # of the variance of a column in the whole table: own rows with less are read by themselves


class OwnRows(NamedTuple):
    """Of B fits, in the units of the whole table."""

    centre: Tensor
    """(B, T)"""
    unit: Tensor
    """(B, T) of the own rows, as `table_of` takes it"""
    prior: CovariancePrior | None
    """Of B tables"""
    some: list[Tensor]
    """For k-means, in own units"""

    @classmethod
    def by_one_pass(
        cls,
        whole: Table,
        expect: Expect,
        visible: Tensor,
        places: list[Tensor],
        n_components: int,
        covariance_type: str,
        seed: int,
        *,
        with_prior: bool,
    ) -> OwnRows | None:
        """From the sums over the rows that each sees (B, N), at these places; None where that is not good enough."""
        rows, n_tokens = whole.rows, whole.rows.shape[1]
        if min(map(len, places)) < max(FEW_CELLS, n_components):
            return None
        ones = rows.new_ones(len(places), n_tokens)
        one = around(torch.zeros_like(ones)[:, None], ones, covariance_type)
        sums, _ = expect(
            one, rows.new_zeros(len(places), 1, n_products(n_tokens, covariance_type)), Seen(visible)
        )
        own, collapsed = m_step(sums, one, covariance_type, None, 0.0)
        if bool(collapsed.any()):
            return None
        cov = own.scale @ own.scale.mT if own.dense else own.scale.square()  # (B, 1, ...)
        variance = (cov.diagonal(dim1=-2, dim2=-1) if own.dense else cov)[:, 0].expand(-1, n_tokens)
        unit = variance.sqrt()
        if own.dense:
            thin = own.scale.diagonal(dim1=-2, dim2=-1)[:, 0].square() <= SINGULAR * variance
            if bool(thin.any()):
                return None
        few = torch.stack([rows[place[:FEW_CELLS]] for place in places], 1) / unit  # (n, B, T)
        if bool((variance < NARROW).any()) or bool(may_be_rounded(few.flatten(1)).any()):
            return None
        some = [
            (rows[place[places_of(len(place), seed).to(place.device)]] - centre) / width
            for place, centre, width in zip(places, own.loc[:, 0], unit, strict=True)
        ]
        share = share_of_table(n_tokens, n_components, covariance_type)
        prior = CovariancePrior(share * cov, n_tokens) if with_prior else None
        return cls(own.loc[:, 0], unit, prior, some)

    @classmethod
    def one_by_one(cls, whole: Table, starts: list[OwnTable]) -> OwnRows:
        """From the tables of the own rows."""
        centre = (torch.stack([start.table.centre for start in starts]) - whole.centre) / whole.spread
        unit = torch.stack([start.table.spread for start in starts]) / whole.spread
        prior: CovariancePrior | None = None
        if starts[0].prior is not None:
            prior = CovariancePrior(torch.stack([start.scale_in(whole) for start in starts]), unit.shape[1])
        return cls(centre, unit, prior, [start.table.rows for start in starts])


class OwnTable(NamedTuple):
    """Of one fit."""

    table: Table
    prior: CovariancePrior | None

    @classmethod
    def of(cls, x: Tensor, n_components: int, covariance_type: str, *, with_prior: bool) -> OwnTable | None:
        """None where rows are too few, or a direction has no spread, which is refused elsewhere."""
        table = table_of(x, covariance_type)
        if len(table.rows) < max(2, n_components):
            return None
        prior = prior_of(table, n_components, covariance_type) if with_prior else None
        if prior is not None and not prior.proper:
            return None
        return cls(table, prior)

    def scale_in(self, whole: Table) -> Tensor:
        """That of the prior in the units of another table: (1, T, T), (1, T) or (1, 1)."""
        assert self.prior is not None
        unit, scale = self.table.spread / whole.spread, self.prior.scale
        if self.prior.dense:
            return (unit[:, None] * scale * unit)[None]
        return (unit[: len(scale)].square() * scale)[None]
