"""Where EM starts with missing cells: the likelihood has many maxima there, and a short climb tells good starts."""

from __future__ import annotations

import torch
from torch import Tensor

from bayes_mpt.models.covariance_prior import CovariancePrior
from bayes_mpt.models.gaussians import Gaussians
from bayes_mpt.models.left_out import LeftOut, Shares, plain_shares
from bayes_mpt.models.mixture_em import (
    DENSE,
    Table,
    coefficients_of,
    expectation,
    from_clusters,
    m_step,
)

__all__ = ["best_start", "filled"]

STARTS = 15  # beside the one that is given
STARTS_OF_CELLS = (
    23  # of diagonal covariances, which cost little: all rounds take 450 of the 500 steps that a fit has
)
ROUNDS = (10, 10, 10, 10)  # steps, after each of which the better half goes on
N_LEFT_OUT = 2  # rounds in which each row is judged as if it were left out
START_ROWS = 2048  # on which starts are compared


def best_start(
    table: Table, given: Gaussians, covariance_type: str, prior: CovariancePrior | None, max_iter: int
) -> tuple[Gaussians, int]:
    """The start from which a short EM comes furthest, at its end, and the steps that all took.

    In the first rounds components do not count a row when they judge it (`LeftOut`), so that few rows do not hold each
    other where a start has put them. One start is given; the others are clusters of the rows in whose gaps stand random
    cells of the same columns.

    Parameters
    ----------
    table : Table
        Rows with missing cells.
    given : Gaussians
        A mixture.
    covariance_type : {"full", "tied", "diag", "spherical"}
    prior : CovariancePrior, optional
    max_iter : int
        With fewer steps than all starts need the given one is returned.
    """
    n_components, n_rows = len(given.weights), len(table.rows)
    n_starts = STARTS if covariance_type in DENSE else STARTS_OF_CELLS
    n_steps = sum(-(-n * (n_starts + 1) // 2**i) for i, n in enumerate(ROUNDS))
    if n_components == 1 or max_iter < n_steps:
        return given, 0
    seeds = torch.randint(2**31 - 1, (n_starts,), device="cpu").tolist()
    some = table._replace(rows=table.rows[:: max(1, n_rows // START_ROWS)])
    places = [given]
    for i, seed in enumerate(seeds):
        whole = some._replace(rows=filled(some.rows, seed))
        n_tries = i % 2  # every other one is random rows and what is nearest to them
        places.append(
            from_clusters(whole, n_components, covariance_type, seed, prior, n_tries=n_tries, n_steps=0)
        )
    at = Gaussians(*(torch.stack(parts) for parts in zip(*places, strict=True)))
    climb = _Climb(some, covariance_type, prior)
    for i, n in enumerate(ROUNDS):
        at, value = climb(at, n, LeftOut(covariance_type) if i < N_LEFT_OUT else plain_shares)
        order = value.argsort(descending=True)[: max(1, len(value) // 2)]
        at = Gaussians(*(part[order] for part in at))
    return Gaussians(*(part[0] for part in at)), n_steps


class _Climb:
    """Steps of several mixtures at once."""

    def __init__(self, table: Table, covariance_type: str, prior: CovariancePrior | None):
        self.expect = expectation(table.rows, covariance_type)
        self.kind, self.prior = covariance_type, prior
        self.gaps = covariance_type not in DENSE

    def __call__(self, at: Gaussians, n_steps: int, shares: Shares) -> tuple[Gaussians, Tensor]:
        """Where mixtures (B, ...) come, and what they score (B,) with these shares before the last step."""
        before, value = at, at.weights[:, 0]
        for _ in range(n_steps):
            before = at
            sums, value = self.expect(at, coefficients_of(at, gaps=self.gaps), shares)
            if isinstance(shares, LeftOut):
                shares.told(sums[..., 0])
            at, collapsed = m_step(sums, at, self.kind, self.prior, 0.0)
            value = torch.where(collapsed.any(-1) | value.isnan(), -torch.inf, value)
        return at, value if self.prior is None else value + self.prior.log_prob(before.scale)


def filled(rows: Tensor, seed: int) -> Tensor:
    """Rows (N, T) with an observed cell of the same column, at random, in place of each that is missing."""
    generator = torch.Generator().manual_seed(seed)
    out = rows.clone()
    for column, cells in enumerate(rows.unbind(1)):
        gaps = cells.isnan()
        known = cells[~gaps]
        n_gaps = int(gaps.sum())
        if n_gaps:
            drawn = torch.randint(max(1, len(known)), (n_gaps,), generator=generator)
            out[gaps, column] = known[drawn.to(known.device)] if len(known) else 0.0
    return out
