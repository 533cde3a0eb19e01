"""Continuous latents as real vectors: unconstrained, one vector a row or one for the whole data set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import ComposeTransform, IndependentTransform

from bayes_mpt.program.layout import from_rows, to_rows
from bayes_mpt.program.program import Latent, ModelError, Program
from bayes_mpt.program.sites import node_of
from bayes_mpt.program.supports import stripped, support_of
from bayes_mpt.program.transforms import carried, exact_transform
from bayes_mpt.program.unconstrained import UNCONSTRAINED, keeps_ends

__all__ = ["Space", "refuse_moving", "space"]


class _Part(NamedTuple):
    latent: Latent
    transform: Any
    """From the real numbers to the site's support."""
    shape: tuple[int, ...]
    """Of the unconstrained value."""
    n_batch: int
    """Batch axes of the site."""
    keeps_ends: bool
    """Its law has all digits at the unconstrained value."""

    @property
    def each(self) -> Any:
        """The transform of one event: of one number, where events are of independent numbers."""
        transform = self.transform
        while isinstance(transform, IndependentTransform):
            transform = transform.base_transform
        return transform

    @property
    def n_event(self) -> int:
        """Axes, on the right of ``shape``, whose numbers are transformed together."""
        return int(self.each.domain.event_dim)


class Space(NamedTuple):
    """The unconstrained space of some latents."""

    parts: tuple[_Part, ...]
    depth: int
    """Plate axes of the program."""
    by_row: bool

    @property
    def width(self) -> int:
        """d, numbers a row (or in all)."""
        return sum(self._size(p) for p in self.parts)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sites."""
        return tuple(p.latent.name for p in self.parts)

    @property
    def columns(self) -> dict[str, slice]:
        """Which of the d numbers are of a site."""
        out, start = {}, 0
        for p in self.parts:
            out[p.latent.name] = slice(start, start + self._size(p))
            start += self._size(p)
        return out

    @property
    def bounded(self) -> list[bool]:
        """(d,) whether a number stands for a value that is not free: positive, a share, a correlation."""
        return [not _is_identity(p.transform) for p in self.parts for _ in range(self._size(p))]

    def values(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Values of the sites at u (S, N, d), and log |d value / d u| (S, N); S = 1 has no axis of its own."""
        n_nodes = len(u)
        values, jacobians = self.jacobians(u)
        log_det = u.new_zeros(u.shape[:2])
        for p, jacobian in zip(self.parts, jacobians, strict=True):
            value = values[p.latent.name]
            log_det = log_det + to_rows(jacobian, p.latent.row_axis, 1).sum(-1)
            if n_nodes == 1:
                values[p.latent.name] = value[0]
            else:
                pad = (1,) * (self.depth - p.n_batch)
                values[p.latent.name] = value.reshape(n_nodes, *pad, *value.shape[1:])
        return values, log_det

    def carried(self, u: Tensor) -> dict[str, Tensor]:
        """What values at u (S, N, d) or (S, 1, d) carry: (S, ...), by names that `UNCONSTRAINED` begins."""
        return {
            UNCONSTRAINED + p.latent.name: carried(
                p.each, from_rows(u[..., self.columns[p.latent.name]], p.shape, p.latent.row_axis)
            )
            for p in self.parts
            if p.keeps_ends
        }

    def jacobians(self, u: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Values (S, ...) of the sites at u (S, N, d), and of each site log |d value / d u| event by event (S, ...)."""
        values, out, start = {}, [], 0
        for p in self.parts:
            size = self._size(p)
            raw = from_rows(u[..., start : start + size], p.shape, p.latent.row_axis)
            start += size
            values[p.latent.name] = value = p.transform(raw)
            out.append(p.each.log_abs_det_jacobian(raw, value))
        return values, out

    def pack(self, trace: Trace, n_rows: int) -> Tensor:
        """u (1, N, d) of a run's values."""
        values = {n: node_of(trace, n)["value"] for n in self.names}
        for p in self.parts:
            shape, got = list(p.latent.shape), values[p.latent.name].shape
            if p.latent.row_axis is not None:
                shape[p.latent.row_axis] = n_rows
            if list(got) != shape:
                raise ModelError(
                    f"latent site {p.latent.name!r} had shape {p.latent.shape} when the program was first run and has "
                    f"{tuple(got)} now: without a rows plate around it, the number of rows may not change"
                )
        return self.pack_values(values, 1, n_rows)

    def pack_values(self, values: dict[str, Tensor], n_nodes: int, n_rows: int) -> Tensor:
        """The inverse of `values`: (S, N, d)."""
        out = []
        for p in self.parts:
            value = values[p.latent.name]
            shape = list(p.latent.shape)
            if p.latent.row_axis is not None:
                shape[p.latent.row_axis] = n_rows
            raw = p.transform.inv(value.expand(n_nodes, *([1] * max(0, value.ndim - 1 - len(shape))), *shape)
                                  .reshape(n_nodes, *shape))  # fmt: skip
            part = to_rows(raw, p.latent.row_axis, 1)
            out.append(part.expand(-1, n_rows if self.by_row else 1, -1))
        return torch.cat(out, -1)

    def _size(self, p: _Part) -> int:
        size = 1
        for axis, n in enumerate(p.shape):
            size *= 1 if axis == p.latent.row_axis else n
        return size


def _is_identity(transform: Any) -> bool:
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return isinstance(transform, ComposeTransform) and not transform.parts


def space(program: Program, trace: Trace, names: Iterable[str]) -> Space:
    """The unconstrained space of these continuous latents, as they stood in a run."""
    parts = []
    refuse_moving(program, trace)
    for latent in program.latents:
        if latent.name not in set(names):
            continue
        node = node_of(trace, latent.name)
        fn, value = node["fn"], node["value"]
        try:
            transform = exact_transform(biject_to(support_of(fn)))
        except NotImplementedError as error:
            raise ModelError(
                f"latent site {latent.name!r} ({type(fn).__name__}) has no transform to real numbers: for a "
                "covariance, write LKJCholesky for the correlations and a positive scale for each column"
            ) from error
        shape = tuple(transform.inverse_shape(value.shape))
        parts.append(_Part(latent, transform, shape, len(fn.batch_shape), keeps_ends(fn)))
    return Space(tuple(parts), program.depth, program.by_row)


def refuse_moving(program: Program, trace: Trace) -> None:
    """Refuse latents whose ends move, with a program that draws the same."""
    name = next((site.name for site in program.latents if site.moving), None)
    if name is None:
        return
    law = stripped(node_of(trace, name)["fn"])
    kind = type(law).__name__
    if isinstance(law, torch.distributions.Uniform):
        of, value = "dist.Uniform(0.0, 1.0)", "low + (high - low) * share"
    elif isinstance(law, torch.distributions.Pareto):
        of, value = "dist.Pareto(1.0, alpha)", "scale * share"
    elif hasattr(law, "transforms"):
        inner = type(stripped(law.base_dist)).__name__
        of, value = f"dist.{inner}(...)", "loc + scale * share"
    else:
        of, value = "of a law with fixed ends", "its image between the ends"
    raise ModelError(
        f"the ends of the support of latent site {name!r} ({kind}) move with other latents or with parameters, so that "
        f"no one map leads to it from the real numbers. Draw what has fixed ends, and compute the latent: share = "
        f"pyro.sample({name + '_share'!r}, {of}); {name} = {value}"
    )
