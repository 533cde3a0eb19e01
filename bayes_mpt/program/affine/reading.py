"""The linear-Gaussian form of a program, found once, and its map, read at every step of a training.

`affine_form` finds out how the program may be read; `read` does it at every step of a training, with gradients to the
program's parameters. Both take a `Way` of reading: `Dense`, one probe for every latent; where sites look at few latents
each, `bayes_mpt.program.affine.sparse.Sparse`.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.affine.dense import Dense
from bayes_mpt.program.affine.form import AffineForm, NotAffine, Outline, Way
from bayes_mpt.program.affine.normals import (
    join_values,
    normal,
    observed_layout,
    prior_means,
    scale_of,
    tokens_of,
)
from bayes_mpt.program.affine.tokens import token_gaps
from bayes_mpt.program.affine.trial import (
    compare_with_program,
    covariates,
    refuse_dependence,
    same_map,
    shared_map,
    trial_run,
)
from bayes_mpt.program.arguments import N_TRIAL_ROWS, fill, head
from bayes_mpt.program.checks import check_observed, refuse_unregistered
from bayes_mpt.program.layout import flat
from bayes_mpt.program.missing import run_with_holes
from bayes_mpt.program.program import Model, list_names
from bayes_mpt.program.run import first_run, run
from bayes_mpt.program.sites import describe_latent, latent_nodes, observed_nodes, own_shown, plate_depth

__all__ = [
    "affine_form",
    "first_look",
    "read",
]


@torch.enable_grad()
def first_look(model: Model, args: tuple[Any, ...]) -> Outline:
    """Run the program for the first time, which creates the parameters that it initialises from ``x``.

    Raises
    ------
    ModelError
        If what it observes or its latents are not Normal, or observed values are computed with parameters.
    """
    first, init = first_run(model, tuple(fill(a) for a in args))
    sites, rows_plate, by_row, row_axes = observed_layout(first, len(init[0]))
    values = [first.nodes[name]["value"] for name in sites]
    if any(v.requires_grad for v in values):
        raise NotAffine(
            f"observed values of site {list_names(sites)!r} are computed with parameters, so that they are not read as "
            "data with one linear-Gaussian map"
        )
    value = join_values(values, row_axes)
    n_rows = len(value)
    nodes = latent_nodes(first)
    latents = tuple(describe_latent(latent, rows_plate if by_row else None) for latent in nodes)
    spread = [
        flat(normal(n)[1].detach(), n["value"].shape, site.row_axis)[0, 0]
        for n, site in zip(nodes, latents, strict=True)
    ]
    draft = AffineForm(
        sites,
        latents,
        tuple(n for n, site in first.nodes.items() if site["type"] == "param"),
        rows_plate,
        by_row,
        per_row=True,
        observed_argument=_find_observed_argument(value, init, first.nodes[sites[0]]["value"].ndim),
        scores_input=False,
        sub_rows=n_rows if by_row and n_rows != len(init[0]) else None,
        width=value.shape[1],
        spread=torch.cat(spread) if spread else init[0].new_zeros(0),
        depth=plate_depth((*observed_nodes(first), *nodes)),
        row_axes=row_axes,
    )
    return Outline(first, init, draft)


@torch.enable_grad()
def affine_form(
    model: Model,
    args: tuple[Any, ...],
    way: Way | None = None,
    n_trial: int = N_TRIAL_ROWS,
    outline: Outline | None = None,
) -> AffineForm:
    """Run the program on real rows and find out what it is made of.

    Parameters
    ----------
    model : callable
        A Pyro program with one observed Normal site and Normal latents.
    args : tuple
        What the program is called with; tensors have N rows. NaN cells are filled with column means.
    way : Way, optional
        How to read it; `Dense` by default.
    n_trial : int, default=8
        Rows on which what one run can show is checked.
    outline : Outline, optional
        What `first_look` found out on these rows, where it has been asked already.

    Returns
    -------
    AffineForm

    Raises
    ------
    ModelError
        If the program is not linear-Gaussian given its parameters, sub-samples, uses other rows of ``x``, or
        holds trainable tensors that Pyro does not know of. The site is named.
    """
    way = Dense() if way is None else way
    first, init, draft = first_look(model, args) if outline is None else outline
    nodes, node = latent_nodes(first), first.nodes[draft.sites[0]]
    by_row = draft.by_row
    way.check_applicable(draft)
    check_observed(model, init, first)
    draft = _without_false_argument(model, init, draft, first)
    trial, before, whole, reading = init, None, None, None
    if by_row and scale_of(node) == 1.0:
        few = head(init, min(n_trial, max(1, len(init[0]) - 1)))
        # A program that refuses fewer rows holds something for each, and is checked on all of them.
        with suppress(RuntimeError, ValueError, IndexError):
            trial, before = few, trial_run(model, few, draft)
            if len(before.value) != len(few[0]):  # rows of its own, whatever it is given
                trial, before = init, None
        # With covariates a map that rows share now (a slope of zero, sorted groups) need not stay shared.
        if before is not None and not covariates(init):
            reading = shared_map(model, trial, draft, before, way)
        if reading is not None and len(init[0]) > len(trial[0]):
            whole = trial_run(model, init, draft)  # what holds for a few rows need not hold for all
            if not same_map(reading, whole):
                reading, trial, before = None, init, whole
    if before is None:
        trial, before = init, trial_run(model, init, draft)
    if reading is not None:
        draft = draft._replace(per_row=False, scores_input=draft.observed_argument is not None)
    else:
        draft, reading = way.first_read_per_row(model, trial, draft)
    refuse_unregistered([t for n in (*observed_nodes(first), *nodes) for t in normal(n)])
    refuse_dependence(model, trial, draft, before)
    compare_with_program(draft, reading, before if whole is None or reading.loc.shape[0] > 1 else whole)
    return draft


def read(model: Model, args: tuple[Any, ...], structure: AffineForm, way: Way | None = None) -> Any:
    """Read the program's map at its current parameters, with gradients to them.

    Dense: one run on K + 4 probe rows where all rows share the map. Elsewhere one run on the real batch for each probe,
    or one for all if the program broadcasts over a plate of probes.
    """
    way = Dense() if way is None else way
    if structure.per_row:
        return way.read_per_row(model, args, structure)
    reading = way.read_shared(model, args, structure)
    if structure.scores_input:
        assert structure.observed_argument is not None
        return reading._replace(value=args[structure.observed_argument])
    sites = prior_means(structure, args)
    trace = run(model, tuple(fill(a) for a in args), sites)
    value = token_gaps(model, args, structure, trace, sites)
    return reading._replace(value=value, scale=scale_of(trace.nodes[structure.sites[0]]))


def _find_observed_argument(value: Tensor, args: tuple[Any, ...], ndim: int) -> int | None:
    """Which argument the tokens are; ``ndim`` of the first site's value tells a table from a vector."""
    for i, a in enumerate(args):
        if (
            isinstance(a, Tensor)
            and a.ndim == 2
            and ndim <= 2
            and a.shape == value.shape
            and a.dtype == value.dtype
            and torch.equal(a, value)
        ):
            return i
    return None


def _without_false_argument(
    model: Model, args: tuple[Any, ...], structure: AffineForm, first: Trace
) -> AffineForm:
    """Missing cells of the argument that the tokens are must be missing there too, or the tokens are not it."""
    if structure.observed_argument is None:
        return structure
    trace, holes = run_with_holes(model, args, structure.observed_argument, first)
    if trace is None:
        return structure
    shown = join_values([own_shown(trace.nodes[name]) for name in structure.sites], structure.row_axes)
    if torch.equal(tokens_of(trace, structure).isnan(), holes) and bool((shown | holes).all()):
        return structure
    return structure._replace(observed_argument=None)
