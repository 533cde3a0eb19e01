"""Runs of a program at other latents and parameters than its first run: near, and far out in the prior."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import constraints

from bayes_mpt.program.program import Model
from bayes_mpt.program.run import FAILURES, run, values_of
from bayes_mpt.program.sites import latent_nodes, sub_samples
from bayes_mpt.program.store import moved_parameters, own_random_state
from bayes_mpt.program.supports import support_of

__all__ = ["Point", "other_points", "run_on_others"]

FAR = (1.0, 1.0, 1.0, 3.0, 10.0, 100.0, 1.0, 30.0)  # of the latents from the first run, in draws of the prior
MOVED = (0.05, 0.0, 0.5, 0.05, 0.05, 0.05, 1.0, 0.05)  # of the parameters


class Point(NamedTuple):
    """Latents and parameters of a run."""

    latents: dict[str, Tensor]
    size: float = 0.0
    """By which parameters are moved (`bayes_mpt.program.store.moved_parameters`),"""
    seed: int = 0
    """and the seed of that."""


def other_points(model: Model, args: tuple[Any, ...], first: Trace) -> Iterator[Point]:
    """Up to eight points at which the program runs, all latents and parameters others than in its first run."""
    held = values_of(first)
    for seed, (far, size) in enumerate(zip(FAR, MOVED, strict=True), 1):
        for moved in (size, 0.0) if size else (size,):
            with moved_parameters(moved, seed), suppress(*FAILURES):
                nodes = latent_nodes(run_on_others(model, args, first, {}, seed))
                point = Point({n["name"]: _further(n, held.get(n["name"]), far) for n in nodes}, moved, seed)
                if far != 1:  # there a program may break
                    with torch.no_grad(), pyro.validation_enabled(False):
                        run(model, args, {**point.latents, **sub_samples(first)})
                break
        else:
            continue
        yield point


def _further(node: Any, before: Tensor | None, far: float) -> Tensor:
    """A latent so many times as far from the first run's, if it may be anywhere."""
    value, support = node["value"].detach(), support_of(node["fn"])
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if far == 1 or support is not constraints.real or before is None:
        return value
    return before + far * (value - before)


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
