"""A program with its first run: what the runs of all trials are compared with."""

from __future__ import annotations

from typing import Any, NamedTuple

import pyro
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.program import Model, Program
from bayes_mpt.program.run import FAILURES, run
from bayes_mpt.program.sites import latent_nodes, sub_samples

__all__ = ["FirstRun", "values_of"]


class FirstRun(NamedTuple):
    """A program that has been run once, before it is known whether it may be scored."""

    model: Model
    args: tuple[Any, ...]
    """Filled: what it was run on."""
    program: Program
    """What was found out about it."""
    trace: Trace
    """That run."""

    @property
    def latents(self) -> dict[str, Tensor]:
        """Values of the latents in that run."""
        return values_of(self.trace)

    def with_argument(self, position: int, other: Tensor) -> tuple[Any, ...]:
        """The arguments with another one in a place."""
        return (*self.args[:position], other, *self.args[position + 1 :])

    def taken(self, args: tuple[Any, ...], latents: dict[str, Tensor]) -> Trace | None:
        """A run on other arguments, at these latents; None where the program does not take them."""
        try:
            with torch.no_grad(), pyro.validation_enabled(False):
                return run(self.model, args, {**latents, **sub_samples(self.trace)})
        except FAILURES:
            return None


def values_of(trace: Trace) -> dict[str, Tensor]:
    """Values of the latents in a run."""
    return {node["name"]: node["value"].detach() for node in latent_nodes(trace)}
