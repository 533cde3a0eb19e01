"""The analysis of a program: run it and find out what it is made of.

A program is read by evaluation, never by name or by source. Its tokens are the values of its observed sites: all
elements of them, site after site, where a site's distribution has a density for each element; a whole event (a
Multinomial count, say) where it has not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import constraints

from bayes_mpt.program.arguments import fill_all
from bayes_mpt.program.checks import check_sites, refuse_unregistered_parameters
from bayes_mpt.program.factor_runs import with_meeting_entries
from bayes_mpt.program.layout import rows_first
from bayes_mpt.program.mask_trials import refuse_other_rows, refuse_selection, refuse_unmoved
from bayes_mpt.program.program import Model, ModelError, Program, SubSampled, one_vector
from bayes_mpt.program.run import FirstRun, first_run
from bayes_mpt.program.scored_once import refuse_cells_twice
from bayes_mpt.program.shifts import shifts_of
from bayes_mpt.program.sites import (
    base,
    described,
    factor_nodes,
    latent_nodes,
    observed_nodes,
    own_masks,
    own_shown,
    sub_samples,
)
from bayes_mpt.program.supports import ends_move, support_of
from bayes_mpt.program.trials import Verdict, refuse_hidden, try_others

__all__ = ["Analysis", "analyze", "look"]

GAUSSIAN = ("Normal", "MultivariateNormal")


class Analysis(NamedTuple):
    """A program and the runs that it was found in, for those who ask more of it; not to be kept."""

    program: Program
    args: tuple[Any, ...]
    """Filled; the rows of these runs."""
    first: Trace
    other: Trace | None
    """A run at other latents; those of all rows are alike in a program of Normal sites."""
    position: int | None
    """Of the argument whose cells are the tokens, one by one."""
    by_number: bool
    """A distribution depends on how many rows there are."""

    def checked(self) -> Program:
        """The program, if it may be scored at given values of its latents or with latents summed out."""
        check_sites(self.first)
        nodes = (*observed_nodes(self.first), *latent_nodes(self.first))
        scales = {node["name"]: float(node["scale"]) for node in nodes}
        some = [
            n for n, rows in sub_samples(self.first).items() if len(rows) < self.first.nodes[n]["fn"].size
        ]
        if some and len(set(scales.values())) > 1:
            raise SubSampled(
                f"plate {some[0]!r} draws some of its rows beside latents of the data set. Train such a program by "
                "pyro.infer.SVI on the ELBO of one draw, loss=pyro.infer.Trace_ELBO() (with more draws inside of the "
                "log a sub-sampled likelihood is no bound), and ask bayes_mpt.evidence.from_guide for the log marginal "
                "likelihood of all rows; or leave the program to BayesMPT(model).fit(x), which takes all rows"
            )
        _refuse_scales(scales)
        return self.program


def analyze(model: Model, args: tuple[Any, ...], *, own_masks: bool = False) -> Program:
    """What a program is made of, if it may be scored at given values of its latents or with latents summed out.

    The first run also creates the parameters that the program initialises from ``x``.

    Parameters
    ----------
    model : callable
        A Pyro program.
    args : tuple
        What the program is called with; tensors have N rows. NaN cells are filled.
    own_masks : bool, default=False
        The program hides tokens itself, and its distributions look at the visible ones. It may have factors
        (`factor_nodes`), which train it and enter no score.

    Returns
    -------
    Program

    Raises
    ------
    ModelError
        If nothing is observed, a factor stands in the program, a token's distribution looks at the tokens, or
        trainable tensors are unknown to Pyro. The site is named.
    """
    if not own_masks:
        return look(model, args).checked()
    args = fill_all(args)
    first, init = first_run(model, args)
    program = described(first, len(init[0]), factors_too=True)
    check_sites(first, factors_too=True)
    try_others(FirstRun(model, init, program, first), values_only=True)
    nodes = (*observed_nodes(first, factors_too=True), *latent_nodes(first), *factor_nodes(first))
    _refuse_scales({node["name"]: float(node["scale"]) for node in nodes})
    refuse_unregistered_parameters(first)
    return program


@torch.enable_grad()
def look(model: Model, args: tuple[Any, ...]) -> Analysis:
    """What a program is made of, and the runs that have shown it.

    Raises
    ------
    ModelError
        As `analyze`, but for what only matters where latents are given or summed out.
    """
    args = fill_all(args)
    first, init = first_run(model, args)
    program = described(first, len(init[0]))._replace(shifts=shifts_of(model))
    nodes, latents = observed_nodes(first), latent_nodes(first)
    gaussian = all(type(base(n["fn"])).__name__ in GAUSSIAN for n in (*nodes, *latents))
    if not gaussian:
        check_sites(first)
    once = FirstRun(model, init, program, first)
    refuse_hidden(once)
    plain = len(nodes) == 1 and _is_argument(nodes[0]["value"], init)
    if not plain:
        refuse_cells_twice(once)
    refuse_unregistered_parameters(first)
    position = _observed_argument(program, first, init)
    real = all(_is_real(base(n["fn"])) for n in nodes)
    ordered = _steps_in_plate(once, real)
    if ordered is None:
        verdict = try_others(
            once,
            position=position,
            alike=gaussian and program.by_row,
            real=real,
            values_only=program.sub_rows is not None,
        )
    else:
        program, verdict = ordered
    program = _with_moving(program, first, verdict.other)
    once = once._replace(program=program)
    if not plain:
        refuse_unmoved(once)
    if any(own_masks(n, n["fn"].event_dim) or isinstance(n["scale"], Tensor) for n in (*nodes, *latents)):
        refuse_selection(once, by_tokens=verdict.order is None)
    if not plain:
        refuse_other_rows(once)
    if verdict.order is not None:
        # each row is read at its own values, and missing cells that others look at are refused there
        program = one_vector(program) if verdict.coupled else program
        program = program._replace(order=verdict.order)
        program = with_meeting_entries(model, init, program) if program.discrete else program
        return Analysis(program, init, first, verdict.other, None, verdict.by_number)
    hides = not all(bool(own_shown(node).all()) for node in nodes)
    position = position if verdict.gaps and not hides else None
    cells = position is not None and not any(site.n_joint for site in program.sites)
    program = program._replace(observed_argument=position if cells else None)
    program = with_meeting_entries(model, init, program) if program.discrete else program
    return Analysis(program, init, first, verdict.other, position, verdict.by_number)


def _is_argument(value: Tensor, args: tuple[Any, ...]) -> bool:
    """Whether an observed value is an argument itself: its cells as they stand, each once."""
    return any(value is a for a in args) and 0 not in value.stride()


def _with_moving(program: Program, first: Trace, other: Trace | None) -> Program:
    """The program, with which latents have ends that move."""
    there = first if other is None else other
    laws = {n["name"]: n["fn"] for n in latent_nodes(there)}
    found = [n["name"] for n in latent_nodes(first) if ends_move(n["fn"], laws[n["name"]])]
    latents = tuple(site._replace(moving=site.name in found) for site in program.latents)
    return program._replace(latents=latents) if found else program


def _steps_in_plate(first: FirstRun, real: bool) -> tuple[Program, Verdict] | None:
    """The vector in a plate of another length than x, whose steps look at earlier ones; None where they do not.

    A plate of the T - 1 steps of an autoregression, say: no rows, and nothing is drawn of them.
    """
    program, trace = first.program, first.trace
    drawn = any(len(rows) < trace.nodes[name]["fn"].size for name, rows in sub_samples(trace).items())
    if program.sub_rows is None or drawn:
        return None
    whole = one_vector(program)._replace(sub_rows=None)
    verdict = try_others(first._replace(program=whole), real=real)
    return None if verdict.order is None else (whole, verdict)


def _refuse_scales(scales: dict[str, float]) -> None:
    if len(set(scales.values())) > 1:
        raise ModelError(
            f"sites have different scales {scales}: a density to a power other than one is none. Leave poutine.scale "
            "away, or let the rows plate draw the rows that it stands for (subsample_size)"
        )


def _is_real(fn: Any) -> bool:
    """Whether a distribution has all real numbers, or vectors of them, as values."""
    try:
        support = support_of(fn)
    except NotImplementedError:
        return False
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support is constraints.real


def _observed_argument(program: Program, first: Trace, args: tuple[Any, ...]) -> int | None:
    """Which argument the tokens are, cell by cell."""
    values = [first.nodes[name]["value"] for name in program.site_names]
    if any(v.requires_grad for v in values) or program.sub_rows is not None:
        return None
    tokens: Tensor | None = None
    if all(v.ndim <= 2 for v in values):
        tokens = torch.cat([rows_first(v, s.row_axis) for v, s in zip(values, program.sites, strict=True)], 1)
    for i, a in enumerate(args):
        if not isinstance(a, Tensor) or not a.is_floating_point():
            continue
        if len(values) == 1 and values[0] is a:
            return i
        if tokens is not None and a.ndim == 2 and a.dtype == tokens.dtype and a.shape == tokens.shape:
            if torch.equal(a, tokens):
                return i
    return None
