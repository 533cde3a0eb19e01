"""Climbs by EM of mixtures of Gaussians, one or several side by side, and where they end."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_mpt.models.covariance_prior import CovariancePrior
from bayes_mpt.models.gaussians import Gaussians, Longer
from bayes_mpt.models.left_out import Key, Shares, shares_in_place
from bayes_mpt.models.mixture_gain import Purity, left_to_gain
from bayes_mpt.models.mixture_products import DENSE
from bayes_mpt.models.mixture_steps import Expect, Table, coefficients_of, m_step

__all__ = ["Climb", "Hill", "Seen", "climb_together", "run_em"]


COLLAPSED, HOPELESS = 1, 2  # what may have come of a mixture's components in a step


class Climb(NamedTuple):
    """Where EM has ended."""

    mix: Gaussians
    collapsed: dict[int, float]
    """The rows of components that have collapsed and begun again"""
    hopeless: bool
    """Whether that was in vain: all have, or one has twice"""
    settled: bool
    """Whether it ended by its rule, and not for want of steps"""
    value: float
    """Log-density of all rows, in the units of the table, and log prior, at the place before the last step"""
    n_steps: int
    left: float = math.inf
    """What a parameter by itself had to gain at most, nats a row, before the last step; infinite if not looked at"""


class Hill(NamedTuple):
    """What B mixtures climb side by side: the scores of rows that they see, and the log priors of their covariances."""

    expect: Expect
    """Of all rows"""
    kind: str
    """Covariance type"""
    n_rows: Tensor
    """(B,)"""
    unit: float
    """The sum of log spreads of the columns, by which a row's score is less in their own units"""
    gaps: bool = False
    """Whether cells are missing, and covariances have no products of different tokens"""
    prior: CovariancePrior | None = None
    """Of one table, or of each of B"""
    visible: Tensor | None = None
    """(B, N) one for the rows that each sees; None: all"""

    @classmethod
    def of(cls, table: Table, expect: Expect, kind: str, prior: CovariancePrior | None = None) -> Hill:
        """Of one mixture and all rows of a table."""
        gaps = kind not in DENSE and bool(table.rows.isnan().any())
        n_rows = table.rows.new_tensor([len(table.rows)])
        return cls(expect, kind, n_rows, float(table.spread.log().sum()), gaps, prior)

    def take(self, index: Tensor) -> Hill:
        """That of some of the mixtures."""
        prior, visible = self.prior, self.visible
        if prior is not None and prior.scale.ndim > 2:
            prior = prior._replace(scale=prior.scale[index])
        return self._replace(
            n_rows=self.n_rows[index], prior=prior, visible=None if visible is None else visible[index]
        )

    def coefficients(self, mix: Gaussians) -> Tensor:
        """As `coefficients_of`."""
        return coefficients_of(mix, gaps=self.gaps)

    def log_prior(self, mix: Gaussians) -> Tensor:
        """Of the covariances (B,)."""
        return torch.zeros_like(self.n_rows) if self.prior is None else self.prior.log_prob(mix.scale)

    @property
    def shares(self) -> Shares:
        """How components share the rows that are seen."""
        return _of_all if self.visible is None else Seen(self.visible)


def _of_all(
    key: Key, log_prob: Tensor, square: Callable[[], Tensor], n_cells: Tensor
) -> tuple[Tensor, Tensor]:
    """By the densities, in whose place they stand; as `bayes_mpt.models.left_out.Shares`."""
    return shares_in_place(log_prob)


class Seen:
    """Shares of the rows that each of B mixtures sees, by log w + log p as ``of`` says; none of the others."""

    def __init__(self, visible: Tensor, of: Callable[[Tensor], tuple[Tensor, Tensor]] = shares_in_place):
        self.visible, self.of = visible, of

    def __call__(
        self, key: Key, log_prob: Tensor, square: Callable[[], Tensor], n_cells: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `bayes_mpt.models.left_out.Shares`."""
        share, density = self.of(log_prob)
        start = int(key[1])
        seen = self.visible[:, start : start + log_prob.shape[-1]]
        return share.mul_(seen[:, None]), density.mul_(seen)


def run_em(
    table: Table,
    expect: Expect,
    mix: Gaussians,
    covariance_type: str,
    *,
    tol: float,
    max_iter: int,
    prior: CovariancePrior | None = None,
    to_end: bool = False,
    reg_covar: float = 0.0,
) -> Climb:
    """EM of one mixture and all rows, as `climb_together`."""
    hill = Hill.of(table, expect, covariance_type, prior)
    one = Gaussians(*(a[None] for a in mix))
    try:
        return climb_together(hill, one, tol=tol, max_iter=max_iter, to_end=to_end, reg_covar=reg_covar)[0]
    except KeyboardInterrupt as press:
        if not press.args:
            raise
        raise KeyboardInterrupt(press.args[0].take(0)) from press


def climb_together(
    hill: Hill, mix: Gaussians, *, tol: float, max_iter: int, to_end: bool = False, reg_covar: float = 0.0
) -> list[Climb]:
    """EM of B mixtures until a step gains about ``tol`` nats a row.

    ``to_end``: until no step and no parameter by itself (`left_to_gain`) has that share of a score beyond 1 to gain.

    Where EM creeps, steps are made longer (`Longer`); one that does not rise by what EM's own step does is taken
    back. Sums of products about the centre of the table cost digits, a share of 1e-16 T / v where v is the least
    variance: little enough for the steps of a climb, whose end is judged elsewhere.
    """
    climb = _Together(hill, mix, tol, to_end, reg_covar)
    try:
        for _ in range(max_iter):
            climb.step()
            if not len(climb.which):
                break
    except KeyboardInterrupt as press:
        if climb.n_steps < 1:
            raise
        raise KeyboardInterrupt(climb.end) from press
    climb.leave(torch.arange(len(climb.which), device="cpu"), settled=False)
    return [climb.ended[b] for b in range(len(mix.weights))]


class _Together:
    """Mixtures under way."""

    def __init__(self, hill: Hill, mix: Gaussians, tol: float, to_end: bool, reg_covar: float):
        self.hill, self.tol, self.to_end, self.reg_covar = hill, tol, to_end, reg_covar
        n = len(mix.weights)
        self.which = list(range(n))
        """Those that are not at their end."""
        self.collapsed: list[dict[int, float]] = [{} for _ in range(n)]
        self.ended: dict[int, Climb] = {}
        self.n_steps = 0
        self.mix, self.end = mix, mix
        """Where they are, and where EM's own steps lead from the best places so far."""
        self.plain = torch.ones(n, dtype=torch.bool, device="cpu")
        """Which are where such a step led."""
        self.best = torch.full_like(hill.n_rows, -math.inf)
        self.longer = Longer(n)
        self.coefficients, self.log_prior = hill.coefficients(mix), hill.log_prior(mix)

    def step(self) -> None:
        """One of each."""
        hill, mix = self.hill, self.mix
        shares = Purity(hill.shares) if self.to_end else hill.shares
        try:
            sums, total = hill.expect(mix, self.coefficients, shares)
        except torch.linalg.LinAlgError:  # of missing cells, whose mixtures climb one by one
            if bool(self.plain.any()):
                raise
            self._go_on(torch.ones_like(self.plain))
            return
        self.n_steps += 1
        value = total + self.log_prior
        back = ~self.plain & ~(value >= self.best).cpu()  # a longer step was too long
        if bool(back.all()):
            self.best = torch.full_like(self.best, -math.inf)
            self._go_on(back)
            return
        new, fallen = m_step(sums, mix, hill.kind, hill.prior, self.reg_covar)
        # The score gains what the expected log-density does, and the divergence between the shares before and
        # after, which is about as large where the steps are small and slow, and less elsewhere.
        after, prior_after = hill.coefficients(new), hill.log_prior(new)
        gain = ((after - self.coefficients) * sums).sum((-2, -1)) + prior_after - self.log_prior
        fell = self._note(fallen.cpu(), back, sums[..., 0])
        at, hopeless = self.best.device, fell == HOPELESS
        self.best, self.end = value + gain, new if not bool(back.any()) else self.end.where(back.to(at), new)
        if bool((back | (fell > 0)).any()):
            known = torch.where((fell > 0).to(at), value, value + gain)
            self.best = torch.where(back.to(at), -math.inf, known)
        score = total / hill.n_rows - hill.unit
        small = self.tol * score.abs().clamp(min=1.0) if self.to_end else torch.full_like(score, self.tol)
        stop = ~back & (fell == 0) & ~(2 * gain / hill.n_rows > small).cpu()
        left = torch.full_like(self.best, math.inf)
        if isinstance(shares, Purity) and bool(stop.any()):
            left = left_to_gain(mix, new, shares.squares, hill.n_rows)
            stop &= (left <= small).cpu()
        rest = torch.arange(len(stop), device="cpu")
        if bool((stop | hopeless).any()):
            self.leave(stop.nonzero()[:, 0], settled=True, left=left)
            self.leave((hopeless & ~stop).nonzero()[:, 0], settled=False, hopeless=True)
            rest = (~stop & ~hopeless).nonzero()[:, 0]
            self._keep(rest)
        if not len(rest):
            return
        if self.reg_covar:  # which the score does not know: no step is longer
            self.mix, self.plain = self.end, torch.ones_like(rest, dtype=torch.bool)
            self.coefficients, self.log_prior = after[rest.to(at)], prior_after[rest.to(at)]
        else:
            self._go_on((back | (fell > 0))[rest])

    def _go_on(self, plain: Tensor) -> None:
        """To EM's own end where ``plain``, or further."""
        self.mix, self.plain = self.longer(self.mix, self.end, plain)
        self.coefficients, self.log_prior = self.hill.coefficients(self.mix), self.hill.log_prior(self.mix)

    def _note(self, fallen: Tensor, back: Tensor, counts: Tensor) -> Tensor:
        """Write down which components (B, K) have collapsed; whether any has (B,), and whether that is hopeless."""
        found = torch.zeros(len(fallen), dtype=torch.long, device="cpu")
        if not bool(fallen.any()):
            return found
        for b in (fallen.any(1) & ~back).nonzero()[:, 0].tolist():
            here = {c: float(counts[b, c]) for c in fallen[b].nonzero()[:, 0].tolist()}
            before = self.collapsed[self.which[b]]
            hopeless = len(here) == fallen.shape[1] or not here.keys().isdisjoint(before)
            found[b] = HOPELESS if hopeless else COLLAPSED
            before |= here
        return found

    def leave(
        self, index: Tensor, *, settled: bool, hopeless: bool = False, left: Tensor | None = None
    ) -> None:
        """These have ended, with so much left to gain (B,)."""
        for b in index.tolist():
            which = self.which[b]
            found = self.collapsed[which], hopeless, settled, float(self.best[b]), self.n_steps
            rest = math.inf if left is None else float(left[b])
            self.ended[which] = Climb(self.end.take(b), *found, rest)

    def _keep(self, index: Tensor) -> None:
        """Only these go on."""
        self.which = [self.which[b] for b in index.tolist()]
        self.longer.keep(index)
        here = index.to(self.best.device)
        self.mix, self.end, self.hill = self.mix.take(here), self.end.take(here), self.hill.take(here)
        self.best, self.plain = self.best[here], self.plain[index]
