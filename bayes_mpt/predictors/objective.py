"""What a training maximises: the total score of some rows, as a function of the parameters in Pyro's store."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Generator, Tensor

from bayes_mpt.masks import Masks, Policy
from bayes_mpt.program.arguments import rows_of
from bayes_mpt.program.program import ModelError
from bayes_mpt.runtime.interrupts import check_stop

if TYPE_CHECKING:
    from bayes_mpt.predictors.base import Bound, Conditionals

__all__ = ["N_TRIAL_OUTPUTS", "Batch", "Objective", "Outputs"]

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


class Objective:
    """Total nats of a batch under one program scored one way, plate and `poutine.scale` factors included.

    This one is of rows under masks, whatever the way; ways that know better have their own.

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
    """

    def __init__(self, bound: Bound, whole: Batch, masks: Policy | None = None, *, noisy: bool | None = None):
        self.bound, self.whole, self.masks = bound, whole, masks
        self.noisy = masks is not None if noisy is None else noisy

    def __call__(self, batch: Batch | None = None, generator: Generator | None = None) -> Tensor:
        """Total nats of a batch, by default of all, on masks drawn by ``generator``; without one the log-density."""
        batch = self.whole if batch is None else batch
        return self.total(self.read(batch), batch, generator)

    @property
    def trial(self) -> Batch:
        """As much as tells whether it can be evaluated at all, cheaply."""
        return self.whole

    def read(self, batch: Batch | None = None) -> Conditionals:
        """The conditionals of a batch at the parameters in the store."""
        check_stop()
        batch = self.whole if batch is None else batch
        read = self.bound.read(batch.args)
        return read if batch.rows is None else read.at(batch.rows)

    def total(
        self, read: Conditionals, batch: Batch | None = None, generator: Generator | None = None
    ) -> Tensor:
        """As the call, of what has been read."""
        batch = self.whole if batch is None else batch
        by_row = self.by_row(read, generator)
        return read.scale * (by_row.sum() if batch.weight is None else batch.weight @ by_row)

    def by_row(self, read: Conditionals, generator: Generator | None = None) -> Tensor:
        """The score (R,) of each row that was read."""
        return read.score(self.draw(read.value, generator))

    def draw(self, rows: Tensor, generator: Generator | None) -> Masks | None:
        """Masks of these rows; None where they are chains, which add up to the density in whatever order."""
        if self.masks is None or generator is None or self.masks.chains:
            return None
        return self.masks.draw(rows.shape[1], generator)

    def sample(self, n: int, generator: Generator) -> Batch:
        """A random batch of n rows, whose total estimates that of all, times its share of the rows.

        Raises
        ------
        ModelError
            If all rows are one vector.
        """
        whole = self.whole
        if not self.bound.structure.by_row:
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

    def outputs(self, read: Conditionals | None = None) -> Outputs | None:
        """What a unit step should move by about one, of what has been read; None where no part of it is cheap.

        Here log-densities of rows, in units of sqrt N: with J their Jacobian J'J is the empirical Fisher information
        of a row.
        """
        read = self.read() if read is None else read
        value = read.value
        if self.bound.structure.scores_input:
            read = read.at(value[:: -(-len(value) // N_TRIAL_OUTPUTS)])
        if len(read.value) > 1:
            found = read.score()
        else:
            found = read.chain(torch.arange(value.shape[1], device=value.device)[None]).flatten()
        return Outputs(found / math.sqrt(len(found)))

    def refresh(self) -> bool:
        """Find anew what earlier calls have found to make later ones shorter; whether that has changed anything."""
        return False
