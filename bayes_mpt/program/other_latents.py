"""Runs of a program at other latents than its first run."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.devices import own_random_state
from bayes_mpt.program.program import Model
from bayes_mpt.program.run import run
from bayes_mpt.program.sites import sub_samples

__all__ = ["run_on_others"]


def run_on_others(
    model: Model,
    args: tuple[Any, ...],
    first: Trace,
    held: dict[str, Tensor],
    seed: int = 1,
    alike: dict[str, int | None] | None = None,
) -> Trace:
    """A run at other latents than the first, but for those that are held; plates keep the rows that they drew.

    Latents that are to be ``alike`` have one value for all rows, along the axis that is given.
    """
    with torch.no_grad(), pyro.validation_enabled(False), own_random_state(seed):
        with _OtherLatents(first, held, alike or {}):
            return run(model, args, {**held, **sub_samples(first)})


class _OtherLatents(poutine.messenger.Messenger):
    """Draw latents anew; of discrete ones take the next value wherever a draw repeats the first run's."""

    def __init__(self, first: Trace, held: dict[str, Tensor], alike: dict[str, int | None]):
        super().__init__()
        self.first, self.held, self.alike = first, held, alike

    def _pyro_post_sample(self, msg: Any) -> None:
        fn, name = msg["fn"], msg["name"]
        if msg["is_observed"] or name in self.held or name not in self.first.nodes:
            return
        before, value = self.first.nodes[name]["value"], msg["value"]
        axis = self.alike.get(name)
        if axis is not None and value.shape[axis]:
            msg["value"] = value.narrow(axis, 0, 1).expand_as(value).contiguous()
        if not getattr(fn, "has_enumerate_support", False) or before.shape != value.shape:
            return
        with suppress(NotImplementedError):
            low, *others = fn.enumerate_support(expand=False)[:2]
            if others:
                swapped = torch.where(value == low, others[0], low).to(value)
                msg["value"] = torch.where(value == before, swapped, value)
