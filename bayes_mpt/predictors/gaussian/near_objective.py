"""What a training maximises of a long Gaussian vector: the sum over tokens given their neighbours, or terms of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Generator, Tensor

from bayes_mpt.masks import Masks, Policy, torch_generator
from bayes_mpt.predictors.base import Conditionals
from bayes_mpt.predictors.gaussian.process import coarse, outputs_of_tokens, shuffled
from bayes_mpt.predictors.objective import N_TRIAL_OUTPUTS, Batch, Objective, Outputs, draw_shared

if TYPE_CHECKING:
    from bayes_mpt.predictors.gaussian.nearest_neighbors import BoundNeighbors, NearRows

__all__ = ["coarse_to_fine"]

N_MIDDLE = 4096  # terms of a longer sum fitted next


def coarse_to_fine(bound: BoundNeighbors, whole: Batch, masks: Policy | None, seed: int) -> list[Objective]:
    """The objective, behind smaller ones that lead to its maximum: a few rows exactly, then a sample of terms."""
    neighbors = _Neighbors(bound)
    last = _objective(neighbors, whole, masks)
    if masks is not None:
        return [last]
    found = coarse(bound, whole, seed)
    if len(shuffled(whole.args, seed)) >= 4 * N_MIDDLE:
        found.append(_objective(neighbors, last.sample(N_MIDDLE, torch_generator(seed)), masks))
    return [*found, last]


class _Neighbors:
    """The neighbours, which belong to the rows and the parameters together, of all objectives of one training."""

    def __init__(self, bound: BoundNeighbors):
        self.bound = bound
        self._kept: NearRows | None = None
        """The rows that were read first, with their neighbours."""

    def read(self, args: tuple[Any, ...]) -> NearRows:
        """The rows with the neighbours that were found first."""
        if self._kept is not None and self._kept.is_of(args):
            return self._kept.again()
        read = self.bound.read(args)
        if self._kept is None:
            self._kept = read
        return read

    def refresh(self) -> bool:
        """Units of the columns at the current parameters: whether neighbours are others by these."""
        return self._kept is not None and self._kept.settle()


def _objective(neighbors: _Neighbors, whole: Batch, masks: Policy | None) -> Objective:
    """The sum over tokens given their neighbours."""
    return Objective(
        neighbors.bound,
        whole,
        masks,
        read=neighbors.read,
        # neighbours come before a token, so that chains differ
        draw=draw_shared if neighbors.bound.whole else _draw_chains,
        sample=_sample,
        trial=_trial,
        outputs=_outputs,
        refresh=neighbors.refresh,
    )


def _draw_chains(masks: Policy | None, rows: Tensor, generator: Generator | None) -> Masks | None:
    """Masks that all rows share, chains among them."""
    return None if masks is None or generator is None else masks.draw(rows.shape[1], generator)


def _sample(objective: Objective, n: int, generator: Generator) -> Batch:
    """Random tokens and weights with which their terms add up to the score in expectation."""
    near = cast("NearRows", objective.read())
    return Batch(objective.whole.args, 1, terms=near.sample(n, generator))


def _trial(objective: Objective) -> Batch:
    return objective.sample(N_TRIAL_OUTPUTS, torch_generator(0))


def _outputs(objective: Objective, read: Conditionals | None) -> Outputs:
    near = cast("NearRows", objective.read())
    tokens, weight = near.sample(N_TRIAL_OUTPUTS, torch_generator(0))
    return outputs_of_tokens(*near.predicted(tokens), weight)
