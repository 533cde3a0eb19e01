"""Where EM starts with missing cells: the likelihood has many maxima there, and short climbs tell good places.

Some starts climb side by side, and the better half goes on (short runs of EM: Biernacki, Celeux & Govaert 2003). What
wins is shaken: for some steps rows count as often as random numbers say (Elidan, Ninio, Friedman & Schuurmans 2002),
which leads out of maxima that hang on few rows and leaves good clusters as they are; the best of several such ways out
and of the place itself goes on, until none has been better for some time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayes_mpt.models.covariance_prior import CovariancePrior
from bayes_mpt.models.gaussians import Gaussians
from bayes_mpt.models.left_out import Key, LeftOut, Shares, plain_shares
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
ROUNDS = (8, 8, 8, 8)  # steps, after each of which the better half goes on
N_LEFT_OUT = 2  # rounds in which each row is judged as if it were left out
SHAKES = 16  # ways out of a place that are tried side by side
SHAKEN = 4  # steps with random counts of rows
JUDGED, SETTLED = 2, 4  # steps with all, until some are given up and of the rest
KEPT = 5  # of the ways out
PLACES = 2  # that are shaken
MOST_SHAKES, PATIENCE = 10, 5  # rounds of all that, and how many without success
SUCCESS = 0.01  # nats of all rows
N_STEPS = sum(ROUNDS) + MOST_SHAKES * (SHAKEN + JUDGED + SETTLED)
START_ROWS = 2048  # on which starts are compared


def best_start(
    table: Table, given: Gaussians, covariance_type: str, prior: CovariancePrior | None, max_iter: int
) -> tuple[Gaussians, int]:
    """A place from which EM comes far, and the steps that it took, those side by side counted once.

    In the first rounds components do not count a row when they judge it (`LeftOut`), so that few rows do not hold each
    other where a start has put them. One start is given; the others are clusters of the rows in whose gaps stand random
    cells of the same columns. Without a prior nothing is shaken, which would find where the likelihood has no bound.

    Parameters
    ----------
    table : Table
        Rows with missing cells.
    given : Gaussians
        A mixture.
    covariance_type : {"full", "tied", "diag", "spherical"}
    prior : CovariancePrior, optional
    max_iter : int
        With fewer steps than all need the given place is returned.
    """
    n_components, n_rows = len(given.weights), len(table.rows)
    if n_components == 1 or max_iter < N_STEPS:
        return given, 0
    seeds = torch.randint(2**31 - 1, (STARTS,), device="cpu").tolist()
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
        at = _best(at, value, max(PLACES, len(value) // 2))
    if prior is not None:
        at = climb.shaken(at, torch.Generator().manual_seed(seeds[0]))
    return Gaussians(*(part[0] for part in at)), climb.n_steps


class _Climb:
    """Steps of several mixtures at once."""

    def __init__(self, table: Table, covariance_type: str, prior: CovariancePrior | None):
        self.expect = expectation(table.rows, covariance_type)
        self.kind, self.prior = covariance_type, prior
        self.gaps = covariance_type not in DENSE
        self.n_steps = 0

    def __call__(self, at: Gaussians, n_steps: int, shares: Shares) -> tuple[Gaussians, Tensor]:
        """Where mixtures (B, ...) come, and what they score (B,) before the last step."""
        before, value = at, at.weights[:, 0]
        self.n_steps += n_steps
        for _ in range(n_steps):
            before = at
            sums, value = self.expect(at, coefficients_of(at, gaps=self.gaps), shares)
            if isinstance(shares, LeftOut):
                shares.told(sums[..., 0])
            at, collapsed = m_step(sums, at, self.kind, self.prior, 0.0)
            value = torch.where(collapsed.any(-1) | value.isnan(), -torch.inf, value)
        return at, value if self.prior is None else value + self.prior.log_prob(before.scale)

    def shaken(self, at: Gaussians, generator: torch.Generator) -> Gaussians:
        """The best places (PLACES, ...) that are found by shaking some."""
        waited = 0
        for _ in range(MOST_SHAKES):
            many = Gaussians(*(part.repeat_interleave(SHAKES // len(part), 0) for part in at))
            many, _ = self(many, SHAKEN, LeftOut(self.kind, _Counts(generator)))
            many, value = self(many, JUDGED, plain_shares)
            rest = _best(many, value, KEPT)
            both = Gaussians(*(torch.cat(parts) for parts in zip(at, rest, strict=True)))
            both, value = self(both, SETTLED, plain_shares)
            gain = float(value.max() - value[: len(at.weights)].max())
            at, waited = _best(both, value, PLACES), 0 if gain > SUCCESS else waited + 1
            if waited == PATIENCE:
                break
        return at


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


def random_counts(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """How often each row counts (B, n): exponential numbers, as in the Bayesian bootstrap (Rubin 1981)."""
    return torch.empty(shape, dtype=torch.float64, device="cpu").exponential_(generator=generator)


def _best(at: Gaussians, value: Tensor, n: int) -> Gaussians:
    order = value.argsort(descending=True)[:n]
    return Gaussians(*(part[order] for part in at))


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
