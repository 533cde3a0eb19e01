"""Where the rows and the tokens are in the value of a site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.densities import CellDensity, uncached
from bayes_mpt.program.program import ModelError, Observed, Program
from bayes_mpt.program.sites import base, node_of, own_masks, own_shown

__all__ = [
    "check_shape",
    "flat",
    "from_rows",
    "join_tokens",
    "laws_of",
    "log_probs_under",
    "rows_axis",
    "rows_first",
    "sum_by_row",
    "to_rows",
    "token_values",
]


def to_rows(value: Tensor, row_axis: int | None, n_lead: int = 0) -> Tensor:
    """What stands for a site, row by row: (lead..., axes...) -> (lead..., N, width), N of 1 without a rows plate."""
    lead = value.shape[:n_lead]
    if row_axis is None:
        return value.reshape(*lead, 1, -1)
    value = value.movedim(n_lead + row_axis, n_lead)
    return value.reshape(*lead, value.shape[n_lead], -1)


def from_rows(part: Tensor, shape: Sequence[int], row_axis: int | None) -> Tensor:
    """The inverse of `to_rows`, for a site whose value has this shape but for the number of rows."""
    lead = part.shape[:-2]
    if row_axis is None:
        return part.reshape((*lead, *shape))  # of a scalar site no axis may be left
    rest = (*shape[:row_axis], *shape[row_axis + 1 :])
    return part.reshape(*lead, part.shape[-2], *rest).movedim(len(lead), len(lead) + row_axis)


def rows_first(value: Tensor, row_axis: int | None, n_joint: int = 0) -> Tensor:
    """A site's value (or anything of that layout) as (N, tokens of the site)."""
    if n_joint:  # a token of several numbers: NaN if one of them is
        value = value.flatten(value.ndim - n_joint).sum(-1)
    return to_rows(value, row_axis)


def rows_axis(node: Any, program: Program) -> int | None:
    """Where the rows are in the log-density of a site, counted from the right; None where they are one vector."""
    if not program.by_row:
        return None
    return next(
        (f.dim for f in node["cond_indep_stack"] if f.name == program.rows_plate and f.vectorized), None
    )


def sum_by_row(log_prob: Tensor, axis: int | None, n: int) -> Tensor:
    """Log-densities of one site in a run on n nodes, summed over all axes but nodes and rows: (n, N)."""
    kept = {0} if n > 1 else set()
    if axis is not None:
        kept.add(axis % log_prob.ndim)
    away = [i for i in range(log_prob.ndim) if i not in kept]
    total = log_prob.sum(away) if away else log_prob
    return total if total.ndim == 2 else total.reshape(-1, 1) if axis is None else total[None]


def token_values(trace: Trace, program: Program) -> Tensor:
    """Values of the tokens of a run: (N, T) in floating point; a token of several numbers is their sum.

    NaN, which is missing, where a mask of the program hides them.
    """
    values = {}
    for site in program.sites:
        node = node_of(trace, site.name)
        check_shape(node, site)
        values[site.name] = node["value"]
        if own_masks(node, node["fn"].event_dim):
            values[site.name] = hidden(node["value"], own_shown(node))
    return join_tokens(values, program)


def hidden(value: Tensor, shown: Tensor) -> Tensor:
    """A value of a site, NaN where it is not shown."""
    value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
    return torch.where(shown, value, torch.nan)


def join_tokens(values: dict[str, Tensor], program: Program) -> Tensor:
    """Values of the observed sites by name as tokens, site after site: (N, T)."""
    parts = [rows_first(values[s.name], s.row_axis, s.n_joint) for s in program.sites]
    dtype = next((p.dtype for p in parts if p.is_floating_point()), torch.get_default_dtype())
    return parts[0].to(dtype) if len(parts) == 1 else torch.cat([p.to(dtype) for p in parts], 1)


def check_shape(node: Any, site: Observed) -> None:
    """A site's value must have the shape that it had when the program was first run, but for the number of rows."""
    got = tuple(node["value"].shape)
    same = [a == b or axis == site.row_axis for axis, (a, b) in enumerate(zip(got, site.shape, strict=False))]
    if len(got) != len(site.shape) or not all(same):
        raise ModelError(
            f"observed site {site.name!r} had shape {site.shape} when the program was first run and has {got} now: "
            "tokens may not change between calls, nor may rows without a rows plate around them"
        )


def log_probs_under(trace: Trace, values: dict[str, Tensor], program: Program) -> dict[str, Tensor]:
    """Log-densities of these values of tokens and latents under the distributions of a run, by site."""
    with pyro.validation_enabled(False):
        tokens = {}
        for n in program.site_names:
            fn = uncached(base(node_of(trace, n)["fn"]))
            # a factor is of the cells of its own run: what it moves with was found before
            own = isinstance(fn, CellDensity)
            tokens[n] = fn.given if own else fn.log_prob(values[n])
        return tokens | {
            n: uncached(node_of(trace, n)["fn"]).log_prob(values[n]) for n in program.latent_names
        }


def laws_of(trace: Trace, values: dict[str, Tensor], program: Program) -> dict[str, tuple[Tensor, ...]]:
    """What tells the distributions of tokens and latents in one run from those in another, by site.

    Mean and scale of a Normal site; else the log-densities of these values.
    """
    out: dict[str, tuple[Tensor, ...]] = {}
    others = {}
    for name in (*program.site_names, *program.latent_names):
        fn = base(node_of(trace, name)["fn"])
        if type(fn) is dist.Normal:
            out[name] = fn.loc.expand(values[name].shape), fn.scale.expand(values[name].shape)
        else:
            others[name] = values[name]
    if others:
        sites = tuple(s for s in program.sites if s.name in others)
        latents = tuple(s for s in program.latents if s.name in others)
        found = log_probs_under(trace, others, program._replace(sites=sites, latents=latents))
        out |= {name: (log_prob,) for name, log_prob in found.items()}
    return out


def flat(t: Tensor, shape: torch.Size, row_axis: int | None, n_copies: int = 1) -> Tensor:
    """What stands for each number of a site's value of this shape, row by row of each copy: (P, B, width)."""
    lead = t.shape[1 : max(1, t.ndim - len(shape))]
    t = t.expand(n_copies, *lead, *shape).reshape(n_copies, *shape)
    return to_rows(t, row_axis, 1)
