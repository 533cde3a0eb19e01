"""Means and scales of the Normal sites of a run, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.affine.form import AffineForm, NotAffine
from bayes_mpt.program.layout import flat, from_rows
from bayes_mpt.program.program import Program
from bayes_mpt.program.sites import base, own_shown

__all__ = [
    "batch",
    "check_normal",
    "correlated_noise",
    "latent_parts",
    "latent_values",
    "normal",
    "prior_means",
    "root_of_parts",
    "scale_of",
    "token_normal",
]


def check_normal(trace: Trace, program: Program) -> None:
    """Refuse a program whose sites cannot be those of a linear-Gaussian one.

    Raises
    ------
    NotAffine
        With the site and the reason.
    """
    observed = [trace.nodes[name] for name in program.site_names]
    for node in observed:
        if not node["value"].is_floating_point():
            raise NotAffine(
                f"observed site {node['name']!r} holds {node['value'].dtype}: pass it as floating point numbers"
            )
        normal(node)
        if len(observed) > 1 and node["fn"].event_dim > base(node["fn"]).event_dim + 1:
            raise NotAffine(f"observed site {node['name']!r} has an event of several axes beside other sites")
        if len(observed) > 1 and isinstance(base(node["fn"]), torch.distributions.MultivariateNormal):
            raise NotAffine(
                f"observed site {node['name']!r} is MultivariateNormal beside other observed sites"
            )
    for name in program.latent_names:
        normal(trace.nodes[name])
    if len({float(n["scale"]) for n in observed}) > 1:
        raise NotAffine("observed sites have different scales")
    for node in observed:
        vector = isinstance(base(node["fn"]), torch.distributions.MultivariateNormal)
        if vector and not bool(own_shown(node).all()):
            raise NotAffine(f"a mask hides values of observed site {node['name']!r}")
    if any(node["value"].requires_grad for node in observed):
        raise NotAffine(
            f"observed values of site {program.observed!r} are computed with parameters, so that they are not read as "
            "data with one linear-Gaussian map"
        )


def batch(structure: AffineForm, args: tuple[Any, ...]) -> int:
    """Rows that a run on these arguments has."""
    if not structure.by_row:
        return 1
    return structure.sub_rows or len(args[0])


def latent_values(program: Program, z: Tensor) -> dict[str, Tensor]:
    """z (n_rows, K) as values of the latent sites."""
    values, start = {}, 0
    for site in program.latents:
        part = z[:, start : start + site.width]
        start += site.width
        values[site.name] = from_rows(part, site.shape, site.row_axis)
    return values


def prior_means(structure: AffineForm, args: tuple[Any, ...]) -> dict[str, Tensor]:
    """Zero for every latent."""
    like = args[0]
    return latent_values(structure.program, like.new_zeros(batch(structure, args), structure.n_latents))


def normal(node: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a Normal or MultivariateNormal site, which broadcast to its value."""
    fn, value = base(node["fn"]), node["value"]
    if isinstance(fn, torch.distributions.Normal):
        return fn.loc.to(value), fn.scale.to(value)
    if isinstance(fn, torch.distributions.MultivariateNormal):
        return fn.loc.to(value), fn.stddev.to(value)
    kind = "observed" if node["is_observed"] else "latent"
    raise NotAffine(
        f"{kind} site {node['name']!r} is {type(fn).__name__}: only Normal or MultivariateNormal tokens and latents "
        "are linear-Gaussian"
    )


def correlated_noise(trace: Trace, structure: AffineForm, n_copies: int = 1) -> Tensor | None:
    """Lower factors (P, B, T, T) of the covariance of tokens that are one MultivariateNormal; None of others."""
    node = trace.nodes[structure.site_names[0]]
    fn, value = base(node["fn"]), node["value"]
    if not isinstance(fn, torch.distributions.MultivariateNormal):
        return None
    n_tokens = fn.event_shape[0]
    axis = structure.sites[0].row_axis
    n_rows = 1 if axis is None else value.shape[axis]
    if value.numel() != n_rows * n_tokens:
        raise NotAffine(
            f"observed site {node['name']!r} has several MultivariateNormal events a row: noise that is correlated in "
            "blocks is not supported"
        )
    tril = flat(fn.scale_tril.to(value), torch.Size((*value.shape, n_tokens)), None, n_copies)
    return tril.reshape(n_copies, n_rows, n_tokens, n_tokens)


def token_normal(trace: Trace, structure: AffineForm, n_copies: int = 1) -> tuple[Tensor, Tensor]:
    """Means and scales of the tokens (P, B, T)."""
    locs: list[Tensor] = []
    scales: list[Tensor] = []
    for site in structure.sites:
        node, axis = trace.nodes[site.name], site.row_axis
        for t, out in zip(normal(node), (locs, scales), strict=True):
            out.append(flat(t, node["value"].shape, axis, n_copies))
    return torch.cat(locs, -1), torch.cat(scales, -1)


def latent_parts(trace: Trace, structure: AffineForm, n_copies: int = 1) -> tuple[Tensor, list[Tensor]]:
    """Of the latents given the earlier ones: means (P, B, K), and a root of each site's covariance.

    Standard deviations (P, B, width) of independent ones, lower factors (P, B, events, D, D) of others.
    """
    value, axis = trace.nodes[structure.site_names[0]]["value"], structure.sites[0].row_axis
    lead = (n_copies, 1 if axis is None else value.shape[axis])
    locs: list[Tensor] = []
    roots: list[Tensor] = []
    for site in structure.latents:
        node = trace.nodes[site.name]
        shape = node["value"].shape[node["value"].ndim - len(site.shape) :]
        loc, scale = (flat(t, shape, site.row_axis, n_copies) for t in normal(node))
        locs.append(loc)
        fn = base(node["fn"])
        if isinstance(fn, torch.distributions.MultivariateNormal):
            width = fn.event_shape[0]
            tril = flat(fn.scale_tril.to(loc), torch.Size((*shape, width)), site.row_axis, n_copies)
            roots.append(tril.reshape(*lead, -1, width, width))
        else:
            roots.append(scale)
    return torch.cat(locs, -1) if locs else value.new_zeros(*lead, 0), roots


def root_of_parts(loc: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Block-diagonal root (..., K, K) of the latents' covariance, from their means (..., K) and `latent_parts`."""
    blocks: list[Tensor] = []
    for part in parts:
        blocks.extend([torch.diag_embed(part)] if part.ndim == loc.ndim else part.unbind(-3))
    if len(blocks) == 1:
        return blocks[0]
    # block-diagonal by cat, not by writing into zeros: under `torch.vmap` only some of the blocks may have copies
    rows, start = [], 0
    for block in blocks:
        end = start + block.shape[-1]
        rows.append(torch.nn.functional.pad(block, (start, loc.shape[-1] - end)))
        start = end
    return torch.cat(rows, -2) if rows else loc.new_zeros(*loc.shape, 0)


def scale_of(node: dict[str, Any]) -> float:
    """Plate or `poutine.scale` factor of a site."""
    return float(node["scale"])
