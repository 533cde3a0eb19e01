"""Bounds on log Z from both sides, of data that were simulated from a draw of the prior.

The latents that made the data are an exact draw of their posterior. Runs from the reference to the posterior give a
log Z that is too low on the average, runs back from that draw one that is too high (Grosse, Ghahramani & Adams 2015).
A gap between them sees posterior mass that runs from the reference do not reach, which independent runs that all miss
it do not.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor

from bayes_mpt.diagnostics import log_mean
from bayes_mpt.program.latents import Space
from bayes_mpt.program.layout import token_values
from bayes_mpt.program.program import Model, ModelError, Program
from bayes_mpt.program.run import one_precision
from bayes_mpt.program.sites import node_of

__all__ = ["Simulated", "TwoSided", "simulated"]

GAP = 1.0  # nats, as much as one draw may fall into a mode that holds more of the posterior than of the reference


class TwoSided(NamedTuple):
    """log Z of simulated data; nats."""

    lower: float
    """By runs to the posterior: at most the truth in expectation, but for a bias that is taken off."""
    lower_se: float
    upper: float
    """By runs back from the latents that made the data: at least the truth in expectation, likewise."""
    upper_se: float

    @classmethod
    def of(cls, forward: NDArray[np.float64], back: NDArray[np.float64]) -> TwoSided:
        """Of the log Z (R,) of runs to the posterior, and back."""
        lower, lower_se = log_mean(forward)
        upper, upper_se = log_mean(-back)
        return cls(lower, lower_se, -upper, upper_se)

    @property
    def gap(self) -> float:
        """Upper less lower."""
        return self.upper - self.lower

    @property
    def misses(self) -> bool:
        """Whether the runs do not reach all of the posterior."""
        return self.gap > GAP + 3 * math.hypot(self.lower_se, self.upper_se)


class Simulated(NamedTuple):
    """A program that observes data which it has made."""

    model: Model
    args: tuple[Any, ...]
    program: Program


class _Observing:
    """A program whose observed sites have other values."""

    def __init__(self, model: Model, values: dict[str, Tensor]):
        self.model, self.values = model, values

    def __call__(self, *args: Any) -> Any:
        """Run it."""
        with _Observe(self.values):
            return self.model(*args)


class _Observe(poutine.messenger.Messenger):
    def __init__(self, values: dict[str, Tensor]):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]


def simulated(
    model: Model, filled: tuple[Any, ...], program: Program, space: Space
) -> tuple[Simulated, Tensor]:
    """Data from a draw of the prior, without missing cells, and that draw (d,) of the latents that take nodes.

    Raises
    ------
    ModelError
        If the prior is so vague that the data are not finite.
    """
    with torch.no_grad(), one_precision(filled):
        trace = poutine.trace(poutine.uncondition(model)).get_trace(*filled)
    values = {name: node_of(trace, name)["value"][None] for name in space.names}
    u = space._replace(depth=0).pack_values(values, 1, 1)[0, 0]
    tokens = token_values(trace, program)
    if not bool(torch.isfinite(u).all() & torch.isfinite(tokens).all()):
        raise ModelError(
            "check simulates data from the prior, and a draw of it is not finite: write narrower priors, in units of "
            "the data, or leave check=False"
        )
    position = program.observed_argument
    if position is not None:
        made = tokens.reshape(filled[position].shape).to(filled[position])
        data = tuple(made if i == position else a for i, a in enumerate(filled))
        return Simulated(model, data, program), u
    observed = {name: trace.nodes[name]["value"] for name in program.site_names}
    return Simulated(_Observing(model, observed), filled, program), u
