"""Where EM starts: the likelihood has many maxima, most with missing cells, and short climbs tell good places.

Some starts climb side by side, and the better half goes on (short runs of EM: Biernacki, Celeux & Govaert 2003). Those
that are left breed (`mixture_breeding`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_mpt.models.covariance_prior import CovariancePrior
from bayes_mpt.models.gaussians import Gaussians
from bayes_mpt.models.left_out import Key, LeftOut, Shares, plain_shares, shares_of
from bayes_mpt.models.mixture_breeding import Plan, bred, crossed, random_counts
from bayes_mpt.models.mixture_em import (
    DENSE,
    Table,
    coefficients_of,
    expectation,
    from_clusters,
    m_step,
)

__all__ = ["START_ROWS", "best_start", "filled"]

N_LEFT_OUT = 2  # rounds in which half of them judge each row as if it were left out
MADE = 4  # steps of children by themselves, and of what is shaken
PLAN = Plan(rounds=10, children=8, shaken=12, parents=4, kept=6, places=8, patience=3)
START_ROWS = 2048  # on which starts are compared


class Steps(NamedTuple):
    """Of EM."""

    starts: int
    """Beside the one that is given"""
    rounds: tuple[int, ...]
    """After each of which the better half of the starts goes on"""
    judged: int
    """Of what a round has made, until some are given up"""
    settled: int
    """Of the rest, and of the population"""

    @property
    def most(self) -> int:
        """All in all."""
        return sum(self.rounds) + PLAN.rounds * (MADE + self.judged + self.settled + 1)


DENSE_STEPS = Steps(31, (8, 8, 8, 8), 2, 4)
STEPS = Steps(63, (20, 20, 20), 4, 10)  # of diagonal covariances, which take a tenth of the time
COMPLETE_STEPS = Steps(15, (8, 8, 8), 0, 0)  # of complete rows, of which fewer places hold EM


def best_start(
    table: Table, given: Gaussians, covariance_type: str, prior: CovariancePrior | None, max_iter: int
) -> tuple[Gaussians, int]:
    """A place from which EM comes far, and the steps that it took, those side by side counted once.

    In the first rounds the components of half of the starts do not count a row when they judge it (`LeftOut`), so that
    few rows do not hold each other where a start has put them. One start is given; the others are clusters of the rows
    in whose gaps stand random cells of the same columns. Without a prior nothing is crossed or shaken, which would find
    where the likelihood has no bound.

    Parameters
    ----------
    table : Table
        Rows; of complete ones nothing is crossed or shaken.
    given : Gaussians
        A mixture.
    covariance_type : {"full", "tied", "diag", "spherical"}
    prior : CovariancePrior, optional
    max_iter : int
        With fewer steps than all need the given place is returned.
    """
    n_components, n_rows = len(given.weights), len(table.rows)
    holes = bool(table.rows.isnan().any())
    steps = (DENSE_STEPS if covariance_type in DENSE else STEPS) if holes else COMPLETE_STEPS
    if n_components == 1 or max_iter < steps.most:
        return given, 0
    seeds = torch.randint(2**31 - 1, (steps.starts,), device="cpu").tolist()
    some = table._replace(rows=table.rows[:: max(1, n_rows // START_ROWS)])
    places = [given]
    for i, seed in enumerate(seeds):
        whole = some._replace(rows=filled(some.rows, seed))
        n_tries = i % 2  # every other one is random rows and what is nearest to them
        places.append(
            from_clusters(whole, n_components, covariance_type, seed, prior, n_tries=n_tries, n_steps=0)
        )
    climb = _Climb(some, covariance_type, prior, steps)
    at = climb.halved(places)
    if prior is not None and holes:
        at = bred(at, len(at.weights), climb, PLAN, torch.Generator().manual_seed(seeds[0]))
    return at.take(0), climb.n_steps


class _Climb:
    """Steps of several mixtures at once."""

    def __init__(self, table: Table, covariance_type: str, prior: CovariancePrior | None, steps: Steps):
        self.expect = expectation(table.rows, covariance_type)
        self.kind, self.prior = covariance_type, prior
        self.gaps = covariance_type not in DENSE and bool(table.rows.isnan().any())
        self.steps, self.n_steps = steps, 0

    def __call__(self, at: Gaussians, n_steps: int, shares: Shares) -> tuple[Gaussians, Tensor]:
        """Where mixtures (B, ...) come, and what they score (B,) before the last step."""
        before, value = at, at.weights[:, 0]
        for _ in range(n_steps):
            before = at
            sums, value = self.expect(at, coefficients_of(at, gaps=self.gaps), shares)
            if isinstance(shares, LeftOut):
                shares.told(sums[..., 0])
            at, collapsed = m_step(sums, at, self.kind, self.prior, 0.0)
            value = torch.where(collapsed.any(-1) | value.isnan(), -torch.inf, value)
        return at, value if self.prior is None else value + self.prior.log_prob(before.scale)

    def halved(self, places: list[Gaussians]) -> Gaussians:
        """What is left of starts, best first."""
        at = Gaussians(*(torch.stack(parts) for parts in zip(*places, strict=True)))
        value = at.weights[:, 0]
        # two by two, so that both kinds of starts climb both ways
        free = torch.arange(len(places), device=value.device) // 2 % 2 == 1
        for i, n in enumerate(self.steps.rounds):
            self.n_steps += n
            if i < N_LEFT_OUT:
                ways = ((~free, plain_shares), (free, LeftOut(self.kind)))
                found = [self(at.take(which), n, way) for which, way in ways if bool(which.any())]
                at, value = self.joined([each for each, _ in found]), torch.cat([each for _, each in found])
                free = free.sort().values
            else:
                at, value = self(at, n, plain_shares)
            order = value.argsort(descending=True)[: max(PLAN.places, len(value) // 2)]
            at, value, free = at.take(order), value[order], free[order]
        return at

    def taken(self, at: Gaussians, index: Tensor) -> Gaussians:
        """As `Ways`, here and below."""
        return at.take(index.to(at.weights.device))

    def joined(self, parts: list[Gaussians]) -> Gaussians:
        return Gaussians(*(torch.cat(each) for each in zip(*parts, strict=True)))

    def judged(self, at: Gaussians) -> tuple[Gaussians, Tensor]:
        self.n_steps += self.steps.judged
        return self(at, self.steps.judged, plain_shares)

    def settled(self, at: Gaussians) -> tuple[Gaussians, Tensor]:
        self.n_steps += self.steps.settled
        return self(at, self.steps.settled, plain_shares)

    def shaken(self, at: Gaussians, generator: torch.Generator) -> Gaussians:
        self.n_steps += MADE
        return self(at, MADE, LeftOut(self.kind, _Counts(generator)))[0]

    def child(self, first: Gaussians, second: Gaussians, generator: torch.Generator) -> Gaussians:
        self.n_steps += 1
        shares = []
        for parent in (first, second):
            told = _Told()
            self.expect(parent, coefficients_of(parent, gaps=self.gaps), told)
            shares.append(told.shares)
        given = _Given(crossed(shares[0], shares[1], generator))
        # what a child expects of missing cells is as in the first parent
        sums, _ = self.expect(first, coefficients_of(first, gaps=self.gaps), given)
        return self(m_step(sums, first, self.kind, self.prior, 0.0)[0], MADE, plain_shares)[0]


class _Told:
    """Shares by the densities, kept."""

    def __init__(self) -> None:
        self.shares: dict[Key, Tensor] = {}

    def __call__(
        self, key: Key, log_prob: Tensor, square: Callable[[], Tensor], n_cells: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `Shares`."""
        self.shares[key], density = shares_of(log_prob)
        return self.shares[key], density


class _Given:
    """Shares that are known."""

    def __init__(self, shares: dict[Key, Tensor]):
        self.shares = shares

    def __call__(
        self, key: Key, log_prob: Tensor, square: Callable[[], Tensor], n_cells: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `Shares`."""
        return self.shares[key], shares_of(log_prob)[1]


class _Counts:
    """How often rows count in mixtures side by side: random numbers, the same each time it is asked."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self.known: dict[Key, Tensor] = {}

    def __call__(self, key: Key, log_prob: Tensor) -> Tensor:
        """(B, 1, n) of log-densities (B, K, n)."""
        if key not in self.known:
            shape = len(log_prob), log_prob.shape[-1]
            self.known[key] = random_counts(shape, self.generator).to(log_prob)[:, None]
        return self.known[key]


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
