"""Checks of a map against runs of the program on real rows."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.affine.form import AffineForm, NotAffine
from bayes_mpt.program.affine.maps import DenseMap, Map
from bayes_mpt.program.affine.normals import (
    batch,
    latent_parts,
    latent_values,
    scale_of,
    token_normal,
)
from bayes_mpt.program.affine.probes import close, probes_of, tolerance
from bayes_mpt.program.arguments import fill_all
from bayes_mpt.program.layout import flat, token_values
from bayes_mpt.program.program import Model
from bayes_mpt.program.run import run
from bayes_mpt.program.sites import base, is_subsample, own_shown

__all__ = [
    "Tokens",
    "Trial",
    "compare_with_program",
    "covariates",
    "rows_alike",
    "same_by_label",
    "same_map",
    "tokens_of_map",
    "trial_of",
    "trial_run",
]

Tokens = tuple[Tensor, Tensor, Tensor]
"""Means (N, T), variances (N, T) and, of the means, the sizes (N, T) of what they are sums of."""


class Trial(NamedTuple):
    """One run on real rows, each with random latents of its own, that all checks compare with."""

    trace: Trace
    z: Tensor
    """(N, K)"""
    loc: Tensor
    """(N, T), as the others."""
    scale: Tensor
    value: Tensor
    prior: Tensor
    """Means and roots of the latents given the earlier ones."""


@torch.no_grad()
def trial_run(model: Model, args: tuple[Any, ...], structure: AffineForm) -> Trial:
    """The program on these rows at latents one standard deviation away, no two rows alike."""
    n_rows = batch(structure, args)
    factor = 0.5 + torch.arange(n_rows, dtype=args[0].dtype, device=args[0].device)[:, None] / n_rows
    z = factor * probes_of(structure, args[0])[structure.n_latents + 1]
    return trial_of(run(model, args, latent_values(structure.program, z)), structure)


@torch.no_grad()
def trial_of(trace: Trace, structure: AffineForm) -> Trial:
    """What a run on real rows shows of the map."""
    loc, scale = (t[0] for t in token_normal(trace, structure))
    latent_loc, roots = latent_parts(trace, structure)
    prior = torch.cat([latent_loc[0], *[r[0].flatten(1) for r in roots]], 1)
    nodes = [trace.nodes[site.name]["value"] for site in structure.latents]
    parts = [flat(v, v.shape, s.row_axis)[0] for v, s in zip(nodes, structure.latents, strict=True)]
    z = torch.cat(parts, 1) if parts else loc.new_zeros(len(loc), 0)
    return Trial(trace, z.to(loc), loc, scale, token_values(trace, structure.program), prior)


def rows_alike(trace: Trace, structure: AffineForm) -> bool:
    """Whether rows have one map, in a run in which their latents are alike."""
    found = trial_of(trace, structure)
    missing = found.value.isnan()
    if structure.program.shifts and bool(missing.any()):
        # what shifts a missing cell is not seen in this run
        complete = (~missing).all(1).nonzero()[:, 0]
        if not len(complete):
            return False
        loc = torch.where(missing, found.loc[complete[0]], found.loc)
        found = found._replace(loc=loc)
    return all(close(t, t[:1].expand_as(t)) for t in (found.loc, found.scale, found.prior))


def covariates(args: tuple[Any, ...]) -> bool:
    """Whether rows come with more than their tokens."""
    n_rows = len(args[0])
    with_rows = [a for a in args if isinstance(a, Tensor) and a.ndim and len(a) == n_rows]
    return len(with_rows) > 1


def same_by_label(
    model: Model, args: tuple[Any, ...], structure: AffineForm, reading: DenseMap, label: Tensor
) -> bool:
    """Whether each of these rows has the map that its label (N,) numbers among the B of the reading."""
    filled = fill_all(args)
    loc, loading, noise, latent_loc, root = (t[label] for t in reading[:5])
    of_rows = DenseMap(loc, loading, noise, latent_loc, root, reading.scale, reading.value)
    trial = trial_run(model, filled, structure)
    return same_map(tokens_of_map(of_rows, trial), trial)


@torch.no_grad()
def tokens_of_map(reading: Map, before: Trial) -> Tokens:
    """Means, variances and sizes of the tokens that the map gives at the latents of a run."""
    return reading.tokens_at(before.z)


def same_map(tokens: Tokens, before: Trial) -> bool:
    """Whether these rows have the one map that gives these tokens."""
    mean, variance, size = tokens
    same = (before.loc - mean).abs() <= tolerance(before.loc) * size
    return bool(same.all()) and close(before.scale.square(), variance)


@torch.no_grad()
def compare_with_program(structure: AffineForm, reading: Map, before: Trial, tokens: Tokens) -> None:
    """The map must give the very log-density that the program gives itself."""
    if structure.sub_rows is not None:
        return
    trace, z = before.trace, before.z
    trace.compute_log_prob()
    want = sum(_log_prob(node) for node in trace.nodes.values() if node["type"] == "sample")
    mean, variance, size = tokens
    hidden = (
        before.value.isnan()
    )  # by a mask of the program, which scores nothing there: log N(m; m, v) is too much
    value = torch.where(hidden, mean, before.value)
    most = -0.5 * (2 * math.pi * variance.expand(value.shape)[hidden]).log().sum()
    log_joint = float(reading.log_joint(z, value, mean, variance) - most)
    got = scale_of(trace.nodes[structure.site_names[0]]) * log_joint
    if abs(got - want) <= tolerance(z) * 1e3 * (1 + abs(want)):
        return
    # A mean that is large beside its noise is rounded: d log N(x; m, v) = (x - m) / v dm,  dm = eps (|x| + |m|)
    rounded = torch.finfo(z.dtype).eps * (value.abs() + size)
    rounding = 8 * float(((value - mean).abs() / variance * rounded).sum())
    if not abs(got - want) <= tolerance(z) * 1e3 * (1 + abs(want)) + rounding:
        raise NotAffine(
            f"read as a linear-Gaussian program its log-density is {got:.8g}, but the program's own is {want:.8g} "
            f"(observed site {structure.observed!r}): it contains a mask, a scale on one site or a factor"
        )


def _log_prob(node: Any) -> float:
    """Of a site, in all; that of a latent whole, also where a mask of the program hides it.

    No visible value depends on it there, so that its density integrates to 1.
    """
    if node["is_observed"] or is_subsample(node) or bool(own_shown(node).all()):
        return float(node["log_prob_sum"])
    return scale_of(node) * float(base(node["fn"]).log_prob(node["value"]).sum())
