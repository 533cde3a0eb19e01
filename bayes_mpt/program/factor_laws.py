"""What a law that a program writes itself is: of which cells, and its log-density in a run, a number a row."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.densities import log_density
from bayes_mpt.program.sites import base, own_masks

__all__ = ["Cells", "Column", "frames_of", "log_factor_of", "log_law", "log_part", "stacked"]

Column = tuple[int, int]
"""Position of an argument, and a column of it."""


class Cells(NamedTuple):
    """The cells of a row of which a factor is the log-density."""

    own: tuple[Column, ...]
    given: tuple[Column, ...]
    """Others that it moves with."""
    checked: bool
    """Whether the density was seen to add up to one."""
    parts: tuple[str, ...] = ()
    """Other sites, before it, that are parts of the density."""
    bounds: tuple[float, float] = (-math.inf, math.inf)
    """Between which it adds up to one, where the program does not say so itself."""

    def of(self, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Its own cells, (N,) of one column, else (N, columns); and a number (N,) that moves with each other cell."""
        own = stacked(args, self.own)
        weight = torch.arange(1.0, len(self.given) + 1).sqrt()
        given = stacked(args, self.given) @ weight.to(own) if self.given else torch.zeros_like(own[:, 0])
        return (own[:, 0] if len(self.own) == 1 else own), given


def stacked(args: tuple[Any, ...], columns: tuple[Column, ...]) -> Tensor:
    """Columns of arguments side by side, in floating point: (N, columns)."""
    parts = [args[position].reshape(len(args[position]), -1)[:, column] for position, column in columns]
    return torch.stack([p.to(torch.promote_types(p.dtype, torch.get_default_dtype())) for p in parts], -1)


def frames_of(node: Any) -> list[tuple[str, int]]:
    """Names and sizes of the plates around a site."""
    return [(f.name, f.size) for f in node["cond_indep_stack"] if f.vectorized]


def log_law(trace: Trace, parts: tuple[str, ...]) -> Tensor:
    """What the parts of a law add up to: one number a row."""
    if len(parts) == 1:
        return log_factor_of(trace.nodes[parts[0]])
    return torch.stack(torch.broadcast_tensors(*[log_part(trace.nodes[n]) for n in parts])).sum(0)


def log_part(node: Any) -> Tensor:
    """What a site adds to a law, 0 where a mask hides it."""
    if hasattr(_innermost(node["fn"]), "log_factor"):
        log_prob = log_factor_of(node)
    else:
        value = torch.as_tensor(node["value"]).to(torch.get_default_dtype())
        log_prob = log_density(base(node["fn"]), value)
    for mask, _ in own_masks(node, 0):
        log_prob = torch.where(mask, log_prob, torch.zeros_like(log_prob))
    return log_prob


def log_factor_of(node: Any) -> Tensor:
    """What a factor adds, whatever masks and plates stand around it."""
    found: Tensor = _innermost(node["fn"]).log_factor
    return found


def _innermost(fn: Any) -> Any:
    """The distribution that masks and plates stand around, or that transforms make another one of."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn
