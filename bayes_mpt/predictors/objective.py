"""What a training maximises: the total score of some rows, as a function of the parameters in Pyro's store."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast, final

import torch
from torch import Generator, Tensor

from bayes_mpt.masks import Masks, PermutationChain, Policy
from bayes_mpt.predictors.own_order import own_order
from bayes_mpt.program.arguments import rows_of
from bayes_mpt.program.program import ModelError
from bayes_mpt.runtime.interrupts import check_stop

if TYPE_CHECKING:
    from bayes_mpt.predictors.base import Bound, Conditionals
    from bayes_mpt.predictors.gaussian.nearest_neighbors import NearRows

__all__ = [
    "N_TRIAL_OUTPUTS",
    "Batch",
    "Objective",
    "Outputs",
    "chains_unless_own",
    "draw_shared",
    "outputs_of_rows",
]

CHAINS = PermutationChain()  # where no masks are named; nobody changes them
N_TRIAL_OUTPUTS = 512  # rows, or tokens of one vector, that tell the units of a training


class Batch(NamedTuple):
    """What one evaluation of an objective sees."""

    args: tuple[Any, ...]
    """What the program is called with when it is read."""
    n_rows: float
    """Rows for which the batch stands, 1 for one vector: a training divides by it."""
    rows: Tensor | None = None
    """(R, T) rows to score, of a map that all rows share; None: those of the arguments."""
    weight: Tensor | None = None
    """(R,) of the rows; None: all one."""
    terms: tuple[Tensor, Tensor] | None = None
    """Tokens (B,) of one vector and weights (B,), from which its score is estimated; None: all of them."""

    def take(self, index: Tensor) -> Batch:
        """Some rows of the arguments."""
        return Batch(rows_of(self.args, index.to(self.args[0].device)), len(index))


Draw = Callable[[Policy | None, Tensor, Generator | None], Masks | None]
"""Masks of rows (N, T) by policy and generator; None for the log-density."""


class Outputs(NamedTuple):
    """Numbers that a step of one in a parameter should move by about one."""

    value: Tensor
    """(n,), with gradients."""
    whole: bool = False
    """Whether the score depends on nothing else: a parameter that moves none of them has no effect."""
    few_rows: bool = False
    """Whether a parameter may move few of them only, and look flat for that: it goes no further than its size."""
    spread: Tensor | None = None
    """(n,) Of one vector: the values are means and log variances of tokens, to be divided by this."""
    weight: Tensor | None = None
    """(n,) And how many tokens each stands for."""


def chains_unless_own(bound: Bound) -> Policy | None:
    """Masks of steps where none are named: chains; None, its own, of a network."""
    return None if bound.structure.takes_visible else CHAINS


def draw_shared(masks: Policy | None, rows: Tensor, generator: Generator | None) -> Masks | None:
    """Masks that all rows share; None where they are chains, which add up to the density in whatever order."""
    if masks is None or generator is None or masks.chains:
        return None
    return masks.draw(rows.shape[1], generator)


def sample_rows(objective: Objective, n: int, generator: Generator) -> Batch:
    """A random batch of n rows."""
    whole = objective.whole
    if not objective.bound.structure.by_row:
        raise ModelError(
            f"batch_size={n} needs independent rows, but a latent outside the rows plate makes all rows one "
            "vector: leave batch_size=None"
        )
    if whole.rows is None:
        return whole.take(torch.randperm(len(whole.args[0]), generator=generator)[:n])
    if whole.weight is None:
        index = torch.randperm(len(whole.rows), generator=generator)[:n]
    else:
        index = torch.multinomial(whole.weight.cpu(), n, replacement=True, generator=generator)
    return Batch(whole.args, len(index), whole.rows[index.to(whole.rows.device)])


def outputs_of_rows(objective: Objective, read: Conditionals | None, *, few_rows: bool = False) -> Outputs:
    """Log-densities of rows, in units of sqrt N.

    With J their Jacobian J'J is the empirical Fisher information of a row.
    """
    read = objective.read() if read is None else read
    value = read.value
    if objective.bound.structure.scores_input:
        read = read.at(value[:: -(-len(value) // N_TRIAL_OUTPUTS)])
    if len(read.value) > 1:
        found = read.score()
    else:
        found = read.chain(own_order(read)).flatten()
    return Outputs(found / math.sqrt(len(found)), few_rows=few_rows)


@final
class Objective:
    """Total nats of a batch under one program scored one way, plate and `poutine.scale` factors included.

    Without the parts after ``noisy`` it is of rows under masks, whatever the way. A way that knows better gives its own
    function of a part, and nothing inherits from this.

    Parameters
    ----------
    bound : Bound
        The program, and how it is scored.
    whole : Batch
        All that a training is of.
    masks : Policy or None
        What is hidden; None for the log-density.
    noisy : bool, optional
        Whether two evaluations differ, since masks or nodes are drawn: it takes steps then, and is not climbed. By
        default where there are masks.
    read : callable, optional
        The conditionals of a batch's arguments, by default ``bound.read``.
    draw : callable, optional
        Masks of rows (N, T) by policy and generator.
    sample : callable, optional
        A random batch of this objective.
    trial : callable, optional
        As much of this objective as tells whether it can be evaluated at all; by default all.
    outputs : callable, optional
        `Outputs` of this objective, from what has been read or from nothing.
    refresh : callable, optional
        Finds anew what earlier calls have found to make later ones shorter, and says whether that has changed
        anything (None: no).
    smooth : callable, optional
        An approximation (N,) of the log-density of some arguments, which can be climbed in its place.
    pull : callable, optional
        A number of some arguments and a generator whose gradient is added to that of the score in training.
    """

    def __init__(
        self,
        bound: Bound,
        whole: Batch,
        masks: Policy | None = None,
        *,
        noisy: bool | None = None,
        read: Callable[[tuple[Any, ...]], Conditionals] | None = None,
        draw: Draw = draw_shared,
        sample: Callable[[Objective, int, Generator], Batch] = sample_rows,
        trial: Callable[[Objective], Batch] | None = None,
        outputs: Callable[[Objective, Conditionals | None], Outputs | None] = outputs_of_rows,
        refresh: Callable[[], bool | None] | None = None,
        smooth: Callable[[tuple[Any, ...]], Tensor] | None = None,
        pull: Callable[[tuple[Any, ...], Generator], Tensor] | None = None,
    ):
        self.bound, self.whole, self.masks = bound, whole, masks
        self.noisy = masks is not None if noisy is None else noisy
        self._read = bound.read if read is None else read
        self._draw, self._sample, self._trial, self._outputs = draw, sample, trial, outputs
        self._refresh, self._smooth, self._pull = refresh, smooth, pull

    def __call__(self, batch: Batch | None = None, generator: Generator | None = None) -> Tensor:
        """Total nats of a batch, by default of all, on masks drawn by ``generator``; without one the log-density."""
        batch = self.whole if batch is None else batch
        if self._smooth is None or generator is not None:
            return self.total(self.read(batch), batch, generator)
        check_stop()
        return self._smooth(batch.args).sum()

    @property
    def trial(self) -> Batch:
        """As much as tells whether it can be evaluated at all, cheaply."""
        return self.whole if self._trial is None else self._trial(self)

    def read(self, batch: Batch | None = None) -> Conditionals:
        """The conditionals of a batch at the parameters in the store."""
        check_stop()
        batch = self.whole if batch is None else batch
        read = self._read(batch.args)
        return read if batch.rows is None else read.at(batch.rows)

    def total(
        self, read: Conditionals, batch: Batch | None = None, generator: Generator | None = None
    ) -> Tensor:
        """As the call, of what has been read."""
        batch = self.whole if batch is None else batch
        if batch.terms is not None:
            return read.scale * cast("NearRows", read).partial(*batch.terms).sum()
        by_row = self.by_row(read, generator)
        total = read.scale * (by_row.sum() if batch.weight is None else batch.weight @ by_row)
        if self._pull is None or generator is None or not torch.is_grad_enabled():
            return total
        pull = self._pull(batch.args, generator)
        return total + (pull - pull.detach())  # the score itself stays as it is

    def by_row(self, read: Conditionals, generator: Generator | None = None) -> Tensor:
        """The score (R,) of each row that was read."""
        return read.score(self._draw(self.masks, read.value, generator))

    def sample(self, n: int, generator: Generator) -> Batch:
        """A random batch of n rows, whose total estimates that of all, times its share of the rows.

        Raises
        ------
        ModelError
            If all rows are one vector.
        """
        return self._sample(self, n, generator)

    def outputs(self, read: Conditionals | None = None) -> Outputs | None:
        """What a unit step should move by about one, of what has been read; None where no part of it is cheap."""
        return self._outputs(self, read)

    def refresh(self) -> bool:
        """Find anew what earlier calls have found to make later ones shorter; whether that has changed anything."""
        return self._refresh is not None and bool(self._refresh())
