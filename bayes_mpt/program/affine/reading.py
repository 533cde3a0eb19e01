"""The linear-Gaussian form of a program, found once, and its map, read at every step of a training.

`affine_form` finds out how the program may be read; `read` does it at every step of a training, with gradients to the
program's parameters. Both take a `Way` of reading: `Dense`, one probe for every latent; where sites look at few latents
each, `bayes_mpt.program.affine.sparse.Sparse`.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from bayes_mpt.program.affine.dense import Dense
from bayes_mpt.program.affine.form import AffineForm, Way
from bayes_mpt.program.affine.normals import check_normal, normal, prior_means, scale_of
from bayes_mpt.program.affine.tokens import token_gaps
from bayes_mpt.program.affine.trial import (
    Tokens,
    Trial,
    compare_with_program,
    covariates,
    rows_alike,
    same_map,
    tokens_of_map,
    trial_of,
    trial_run,
)
from bayes_mpt.program.analysis import Analysis, look
from bayes_mpt.program.arguments import N_TRIAL_ROWS, cycle, fill_all, head
from bayes_mpt.program.layout import flat, token_values
from bayes_mpt.program.program import Model, split_events
from bayes_mpt.program.run import run
from bayes_mpt.program.trials import raise_moving

__all__ = ["affine_form", "first_reading", "read"]


@torch.enable_grad()
def affine_form(
    model: Model,
    args: tuple[Any, ...],
    way: Way | None = None,
    n_trial: int = N_TRIAL_ROWS,
    analysis: Analysis | None = None,
) -> AffineForm:
    """The linear-Gaussian form of a program.

    Parameters
    ----------
    model : callable
        A Pyro program with observed Normal sites and Normal latents.
    args : tuple
        What the program is called with; tensors have N rows. NaN cells are filled with column means.
    way : Way, optional
        How to read it; `Dense` by default.
    n_trial : int, default=8
        Rows on which a program is first read whose rows have maps of their own.
    analysis : Analysis, optional
        Of this program on these rows, where it has been made already.

    Raises
    ------
    NotAffine
        If the program is not linear-Gaussian given its parameters, with the reason.
    ModelError
        If it cannot be scored in any way. The site is named.
    """
    return first_reading(model, args, way, n_trial, analysis)[0]


@torch.enable_grad()
def first_reading(
    model: Model,
    args: tuple[Any, ...],
    way: Way | None = None,
    n_trial: int = N_TRIAL_ROWS,
    analysis: Analysis | None = None,
) -> tuple[AffineForm, Any]:
    """`affine_form`, and the map that it was found by."""
    way = Dense() if way is None else way
    analysis = look(model, args) if analysis is None else analysis
    check_normal(analysis.first, analysis.program)
    form = _draft(analysis)
    way.check_applicable(form)
    trial = trial_of(analysis.first, form)
    shared = _shared_map(model, analysis, form, trial, way)
    if shared is not None:
        (reading, tokens), rows = shared, analysis.args
        program = form.program._replace(per_row=False, scores_input=form.observed_argument is not None)
        form = form._replace(program=program)
    else:
        rows = analysis.args
        if form.by_row and form.program.scale == 1.0:
            few = head(rows, min(n_trial, max(1, len(rows[0]) - 1)))
            # A program that refuses fewer rows holds something for each, and is read on all of them.
            with suppress(RuntimeError, ValueError, IndexError):
                found = trial_run(model, few, form)
                if len(found.value) == len(few[0]):  # else it has rows of its own, whatever it is given
                    trial, rows = found, few
        form, reading = way.first_read_per_row(model, rows, form)
        tokens = tokens_of_map(reading, trial)
    compare_with_program(form, reading, trial, tokens)
    if isinstance(way, Dense):
        way.check_places(model, rows, form, reading, trial.value)
    return form, reading


def _draft(analysis: Analysis) -> AffineForm:
    """The form as if every row had a map of its own."""
    program = split_events(analysis.program)._replace(
        per_row=True, observed_argument=analysis.position, scores_input=False, affine=True
    )
    nodes = [analysis.first.nodes[name] for name in program.latent_names]
    spread = [
        flat(normal(n)[1].detach(), n["value"].shape, site.row_axis)[0, 0]
        for n, site in zip(nodes, program.latents, strict=True)
    ]
    return AffineForm(program, torch.cat(spread) if spread else analysis.args[0].new_zeros(0))


def _shared_map(
    model: Model, analysis: Analysis, form: AffineForm, trial: Trial, way: Way
) -> tuple[Any, Tokens] | None:
    """The map read from probe rows, and the tokens that it gives the real ones.

    None where the real rows do not have the same map, or would not at other parameters.
    """
    program = form.program
    if (
        not program.by_row
        or program.sub_rows is not None
        or program.scale != 1.0
        or program.order is not None
    ):
        return None
    # With covariates a map that rows share now (a slope of zero, sorted groups) need not stay shared.
    if covariates(analysis.args) or analysis.by_number or bool(trial.value.isnan().any()):
        return None
    if analysis.other is None or not rows_alike(analysis.other, form):
        return None
    try:
        reading = way.read_shared(model, analysis.args, form)
    except (RuntimeError, ValueError, IndexError):
        return None  # the program does not take K + 5 rows, or they differ
    if not torch.equal(
        reading.value, cycle(trial.value, len(reading.value))
    ):  # at latents far out in the prior
        rows = tuple(cycle(a, len(reading.value)) for a in analysis.args)
        with torch.no_grad():
            there = token_values(run(model, rows, prior_means(form, rows)), program)
        if not torch.equal(reading.value, there):
            raise_moving(program.observed, program.latent_names)
        return None
    tokens = tokens_of_map(reading, trial)
    return (reading, tokens) if same_map(tokens, trial) else None


def read(
    model: Model,
    args: tuple[Any, ...],
    structure: AffineForm,
    way: Way | None = None,
    known: Any = None,
) -> Any:
    """Read the program's map at its current parameters, with gradients to them.

    Dense: one run on K + 5 probe rows where all rows share the map. Elsewhere one run on the real batch for each probe,
    or one for all if the program broadcasts over a plate of probes. ``known`` is a map that all rows share and that was
    read at these parameters.
    """
    way = Dense() if way is None else way
    if structure.per_row:
        return way.read_per_row(model, args, structure)
    reading = way.read_shared(model, args, structure) if known is None else known
    if structure.scores_input:
        assert structure.observed_argument is not None
        return reading._replace(value=args[structure.observed_argument])
    sites = prior_means(structure, args)
    trace = run(model, fill_all(args), sites)
    value = token_gaps(model, args, structure, trace, sites)
    return reading._replace(value=value, scale=scale_of(trace.nodes[structure.site_names[0]]))
