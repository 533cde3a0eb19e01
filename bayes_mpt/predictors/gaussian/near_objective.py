"""What a training maximises of a long Gaussian vector: the sum over tokens given their neighbours, or terms of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import Generator, Tensor

from bayes_mpt.masks import Masks, Policy, torch_generator
from bayes_mpt.predictors.base import Conditionals
from bayes_mpt.predictors.gaussian.process import coarse, outputs_of_tokens, shuffled
from bayes_mpt.predictors.objective import N_TRIAL_OUTPUTS, Batch, Objective, Outputs
from bayes_mpt.runtime.interrupts import check_stop

if TYPE_CHECKING:
    from bayes_mpt.predictors.gaussian.nearest_neighbors import BoundNeighbors, NearRows

__all__ = ["coarse_to_fine"]

N_MIDDLE = 4096  # terms of a longer sum fitted next


def coarse_to_fine(bound: BoundNeighbors, whole: Batch, masks: Policy | None, seed: int) -> list[Objective]:
    """The objective, behind smaller ones that lead to its maximum: a few rows exactly, then a sample of terms."""
    last = _NearObjective(bound, whole, masks)
    if masks is not None:
        return [last]
    found = coarse(bound, whole, seed)
    if len(shuffled(whole.args, seed)) >= 4 * N_MIDDLE:
        found.append(last.of(last.sample(N_MIDDLE, torch_generator(seed))))
    return [*found, last]


class _NearObjective(Objective):
    """The sum over tokens. It owns the neighbours, which belong to the rows and the parameters together."""

    bound: BoundNeighbors

    def __init__(self, bound: BoundNeighbors, whole: Batch, masks: Policy | None):
        super().__init__(bound, whole, masks)
        self._kept: list[NearRows] = []
        """The rows that were read first, with their neighbours; shared by all that are `of` one."""

    def of(self, batch: Batch) -> _NearObjective:
        """The same of a part, with the same neighbours."""
        other = _NearObjective(self.bound, batch, self.masks)
        other._kept = self._kept
        return other

    def read(self, batch: Batch | None = None) -> NearRows:
        check_stop()
        args = (self.whole if batch is None else batch).args
        if self._kept and self._kept[0].is_of(args):
            return self._kept[0].again()
        read = self.bound.read(args)
        if not self._kept:
            self._kept.append(read)
        return read

    @property
    def trial(self) -> Batch:
        return self.sample(N_TRIAL_OUTPUTS, torch_generator(0))

    def total(
        self, read: Conditionals, batch: Batch | None = None, generator: Generator | None = None
    ) -> Tensor:
        terms = (self.whole if batch is None else batch).terms
        if terms is None:
            return super().total(read, batch, generator)
        return read.scale * cast("NearRows", read).partial(*terms).sum()

    def draw(self, rows: Tensor, generator: Generator | None) -> Masks | None:
        if self.masks is None or generator is None or (self.masks.chains and self.bound.whole):
            return None
        # neighbours come before a token, so that chains differ
        return self.masks.draw(rows.shape[1], generator)

    def sample(self, n: int, generator: Generator) -> Batch:
        """Random tokens and weights with which their terms add up to the score in expectation."""
        return Batch(self.whole.args, 1, terms=self.read().sample(n, generator))

    def outputs(self, read: Conditionals | None = None) -> Outputs:
        near = self.read()
        tokens, weight = near.sample(N_TRIAL_OUTPUTS, torch_generator(0))
        return outputs_of_tokens(*near.predicted(tokens), weight)

    def refresh(self) -> bool:
        """Units of the columns at the current parameters: whether neighbours are others by these."""
        return bool(self._kept) and self._kept[0].settle()
