"""Which tokens of a run are missing: those that are computed from missing cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from operator import itemgetter
from typing import Any

import pyro
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.arguments import cell_name, fill_all, fill_otherwise, has_missing
from bayes_mpt.program.layout import join_tokens, log_probs_under, rows_first, token_values
from bayes_mpt.program.other_latents import run_on_others
from bayes_mpt.program.program import MissingCovariate, Model, ModelError, Program
from bayes_mpt.program.run import FAILURES, FirstRun, run, values_of
from bayes_mpt.program.sites import base, latent_nodes, node_of, own_shown, sub_samples
from bayes_mpt.program.token_graph import looks_by_cell

__all__ = [
    "gaps_show",
    "holes_in",
    "looked_at",
    "nan_shows",
    "read_values",
    "refuse_seen_gaps",
    "same_but_for",
    "values_with_gaps",
]

MAX_NAMED = 64  # missing cells that are tried one by one to name one
AS_A_LATENT = (
    "To integrate over a missing covariate, say where cells are missing in a table of its own, holes = np.isnan(X) * "
    "1.0, fit((np.nan_to_num(X), holes), y), with torch.where(holes[:, j] > 0, latent, x[:, j]) in the program; where "
    "x[:, j] is observed too, put poutine.mask(mask=holes[:, j] == 0) around its site"
)


def read_values(
    model: Model, args: tuple[Any, ...], program: Program, trace: Trace, sites: dict[str, Tensor]
) -> Tensor:
    """Values of the tokens (N, T) of a run on filled arguments, NaN where computed from a missing cell.

    Where tokens look at each other, also where a mask of the program hides them: they are read, and not scored.
    """
    value = token_values(trace, program)
    if program.order is not None:
        masks = {s.name: own_shown(node_of(trace, s.name)).to(value.dtype) for s in program.sites}
        hidden = join_tokens(masks, program) == 0
    if not any(has_missing(a) for a in args):
        return value if program.order is None else torch.where(hidden, torch.nan, value)
    # Other values in the missing cells: the tokens that move are the missing ones, and no distribution may move.
    others = tuple(fill_otherwise(a) for a in args)
    with torch.no_grad(), pyro.validation_enabled(False):
        try:
            other = run(model, others, sites)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ModelError(
                f"the program does not run on other values in the missing cells: {error}. Drop constant columns, and "
                "make covariates complete"
            ) from error
        gone = {} if program.order is None else _gone(trace, other, program)
        moved = _moved_law(trace, other, program, gone)
    if moved is not None:
        parents = looked_at(token_values(other, program) != value, program)
        at = _missing_parent(model, args, program, trace, sites, parents, gone)
        raise MissingCovariate(
            f"missing cells reach the distribution of site {moved!r}: covariates must be complete, only what is "
            f"observed may be missing{at}. {AS_A_LATENT}"
        )
    shown = values_with_gaps(model, args, program.site_names, trace, other, sites)
    with_gaps = join_tokens(shown, program)
    parents = looked_at(with_gaps.isnan(), program)
    if bool(parents.any()) and not program.by_row:  # whose order may have been found by many cells at a time
        program = _by_cell(FirstRun(model, fill_all(args), program, trace))
        parents = looked_at(with_gaps.isnan(), program)
    if bool(parents.any()):  # whether or not these fillings make a difference
        raise MissingCovariate(
            f"missing cells reach the distribution of site {program.observed!r}, of which tokens look at others"
            f"{_missing_parent(model, args, program, trace, sites, parents, gone)}. {AS_A_LATENT}"
        )
    refuse_seen_gaps(model, args, program, trace, sites)
    missing = with_gaps.isnan() & ~value.isnan()
    for site in program.sites:
        if site.n_joint > 1 and bool(missing.any()):
            raise ModelError(
                f"site {site.name!r} ({site.kind}) has one density for a whole event of several axes, which a missing "
                "cell would drop with all its other cells. Write a series as a loop of Normal sites, one or two for "
                "each step: these are scored step by step, in time linear in the length"
            )
        lost = shown[site.name].isnan()
        if site.n_joint == 1 and bool((lost.any(-1) & ~lost.all(-1)).any()):
            raise ModelError(
                f"site {site.name!r} ({site.kind}) has one density for a whole event, and of some events a few cells "
                "alone are missing: the observed ones would be dropped with them. Leave these rows out, or make them "
                "missing whole; of a Gaussian process, use bayes_mpt.models.GaussianProcess, which takes missing "
                "observations"
            )
    n_cells = sum(int(a.isnan().sum()) for a in args if has_missing(a))
    if int(missing.sum()) > n_cells:
        raise ModelError(
            f"{n_cells} missing cells make {int(missing.sum())} tokens of observed site {program.observed!r} missing, "
            "since tokens are computed from several cells: observe the cells themselves, or fill them before"
        )
    return with_gaps if program.order is None else torch.where(hidden, torch.nan, with_gaps)


def refuse_seen_gaps(
    model: Model, args: tuple[Any, ...], program: Program, filled: Trace, sites: dict[str, Tensor]
) -> None:
    """Refuse a program whose distributions are others where cells are missing than on the filled cells it is run on.

    ``torch.where(x.isnan(), latent, x)`` in a mean, say; those of missing or masked tokens do not count.

    Parameters
    ----------
    model, args, program
        The program on rows with missing cells.
    filled : Trace
        A run on filled rows at these values of the latents, which should not be zero: they hide what they multiply.
    sites : dict of name to Tensor

    Raises
    ------
    MissingCovariate
        With the site and the remedy.
    """
    try:
        with torch.no_grad(), pyro.validation_enabled(False):
            raw = run(model, args, sites)
    except FAILURES:
        return  # the program does not take NaN: it has no view of its own
    _refuse_left_out(raw, filled, program.site_names)
    names = (*program.site_names, *program.latent_names)
    values = {n: filled.nodes[n]["value"] for n in names}
    laws = (log_probs_under(trace, values, program) for trace in (filled, raw))
    for (name, law), (_, now) in zip(*(found.items() for found in laws), strict=True):
        differs = law != now
        if name in program.site_names and bool(differs.any()):
            node = node_of(raw, name)
            gone = torch.as_tensor(node["value"]).isnan() | ~own_shown(node)
            gone = gone.reshape(*gone.shape[: differs.ndim], -1).any(-1)
            differs = differs & ~gone.expand(differs.shape)
        if bool(differs.any()):
            how = (
                "covariates must be complete, only what is observed may be missing"
                if bool(now.isnan().any())
                else "it is another one where a cell is NaN (by x.isnan(), say), and programs are run on filled cells"
            )
            raise MissingCovariate(
                f"missing cells reach the distribution of site {name!r}: {how}. {AS_A_LATENT}"
            )


def _refuse_left_out(raw: Trace, filled: Trace, names: Iterable[str]) -> None:
    """Refuse sites that have fewer numbers where cells are missing."""
    for name in names:
        if node_of(raw, name)["value"].shape != node_of(filled, name)["value"].shape:
            raise ModelError(
                f"the program leaves missing cells of site {name!r} out itself (x[~x.isnan()], say), so that it has "
                "other tokens on each table: write obs=x and leave the cells NaN. Missing cells are left out by the "
                "package"
            )


def looked_at(missing: Tensor, program: Program) -> Tensor:
    """Which missing tokens (N, T) are looked at by one that is not: a series that has ended goes on to miss."""
    found = torch.zeros_like(missing)
    for before, after in () if program.order is None else program.order.looks:
        first, later = list(before), list(after)
        found[:, first] |= missing[:, first] & ~missing[:, later].all(1, keepdim=True)
    return found


def _by_cell(first: FirstRun) -> Program:
    """The program of a first run, of which is known what looks at each cell alone, where it has few."""
    order, looks = first.program.order, None
    assert order is not None
    with suppress(*FAILURES):  # far out in a prior a program may break
        others = (run_on_others(first.model, first.args, first.trace, {}, seed) for seed in (1, 2))
        looks = looks_by_cell(first, [values_of(trace) for trace in others])
    return first.program if looks is None else first.program._replace(order=order._replace(looks=looks))


def _gone(before: Trace, after: Trace, program: Program) -> dict[str, Tensor]:
    """By site, which of its values are missing, as they are others in a run on other fillings, or hidden."""
    nodes = ((n, node_of(before, n), node_of(after, n)) for n in program.site_names)
    return {n: (a["value"] != b["value"]) | ~own_shown(a) for n, a, b in nodes}


def _moved_law(before: Trace, after: Trace, program: Program, gone: dict[str, Tensor]) -> str | None:
    """The first site whose distribution, or mask where tokens look at each other, is another one in a second run.

    That of values which are ``gone``, by site, does not count.
    """
    values = {n: before.nodes[n]["value"] for n in (*program.site_names, *program.latent_names)}
    laws = zip(*(log_probs_under(run, values, program).items() for run in (before, after)), strict=True)
    moved = None
    for (name, law), (_, now) in laws:
        differs = now != law
        if name in gone and bool(differs.any()):
            left = gone[name].reshape(*gone[name].shape[: differs.ndim], -1).all(-1)
            differs = differs & ~left.expand(differs.shape)
        if bool(differs.any()):
            moved = name
            break
    if moved is None and program.order is not None:
        shown = ((n, own_shown(node_of(before, n)), own_shown(node_of(after, n))) for n in program.site_names)
        moved = next((name for name, mask, now in shown if not torch.equal(mask, now)), None)
    return moved


def _missing_parent(
    model: Model,
    args: tuple[Any, ...],
    program: Program,
    trace: Trace,
    sites: dict[str, Tensor],
    parents: Tensor,
    gone: dict[str, Tensor],
) -> str:
    """Which missing cell a distribution looks at, in words: one of the ``parents`` (N, T), or another covariate."""
    filled, others = fill_all(args), tuple(fill_otherwise(a) for a in args)
    before = token_values(trace, program)
    for position, arg in enumerate(args):
        for index in arg.isnan().nonzero().tolist()[:MAX_NAMED] if has_missing(arg) else []:
            one = filled[position].clone()
            one[tuple(index)] = others[position][tuple(index)]
            with torch.no_grad(), pyro.validation_enabled(False):
                there = run(model, (*filled[:position], one, *filled[position + 1 :]), sites)
            parent = ((token_values(there, program) != before) & parents).any()
            if bool(parent) or _moved_law(trace, there, program, gone) is not None:
                return (
                    f". It looks at {cell_name(model, arg, position, index)}, which is missing: fill it before, leave "
                    "its row or series out, or make a series a latent that is observed with noise"
                )
    return ""


def values_with_gaps(
    model: Model,
    args: tuple[Any, ...],
    names: Iterable[str],
    filled: Trace,
    other: Trace,
    sites: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Values of the observed sites of a run on filled arguments, NaN where they are computed from a missing cell.

    A value is, if it moves with what is filled in (``other`` is a run with other fillings), or with NaN in place. A
    program that leaves missing cells out by a mask of its own is taken at its word; one that would hide more than
    these, or count what it fills in itself as observed, is refused.
    """
    names = tuple(names)
    try:
        with torch.no_grad(), pyro.validation_enabled(False):
            raw: Trace | None = run(model, args, sites)
    except FAILURES:
        raw = None  # the program does not take NaN: it has no view of its own
    if raw is not None:
        _refuse_left_out(raw, filled, names)
    out = {}
    for name in names:
        value, shown = node_of(filled, name)["value"], own_shown(node_of(filled, name))
        moves = node_of(other, name)["value"] != value
        if raw is not None:
            node = node_of(raw, name)
            moves = moves | (node["value"] != value)
            hidden = ~own_shown(node) & shown
            if bool((hidden & ~moves).any()):
                raise ModelError(
                    f"a mask of the program hides observed cells of site {name!r} where others are missing: take the "
                    "mask away and leave the cells NaN. Missing cells are left out by the package"
                )
            if bool((moves & own_shown(node) & _in_support(node)).any()):
                raise ModelError(
                    f"the program fills in missing cells of observed site {name!r} itself (nan_to_num, a comparison), "
                    "and they would be scored as observed: write obs=x and leave the cells NaN. Missing cells are "
                    "left out by the package"
                )
        out[name] = torch.where(moves | ~shown, torch.nan, value)
    return out


def _in_support(node: Any) -> Tensor:
    """Where a site's value is one that its distribution can take: NaN is none, nor what NaN becomes as an integer."""
    fn, value = base(node["fn"]), node["value"]
    number = ~value.isnan()
    try:
        fine = fn.support.check(value)
    except (NotImplementedError, AttributeError, RuntimeError):
        return number
    return number & fine[(...,) + (None,) * (value.ndim - fine.ndim)]


def holes_in(args: tuple[Any, ...], position: int | None) -> tuple[tuple[Any, ...], Tensor]:
    """Arguments with one cell of every second row of one of them missing; and which these are."""
    assert position is not None
    x = args[position]
    holes = torch.zeros(x.shape, dtype=torch.bool, device=x.device).reshape(len(x), -1)
    rows = torch.arange(0, len(x), 2, device=x.device)
    holes[rows, (rows // 2) % holes.shape[1]] = True
    holes = holes.reshape(x.shape)
    return (*args[:position], torch.where(holes, torch.nan, x), *args[position + 1 :]), holes


def gaps_show(first: Trace, other: Trace, holes: Tensor, program: Program) -> bool:
    """Whether the tokens of a run on rows with holes are missing there and only there, and no mask hides others."""
    missing = _cells(other, program, lambda node: node["value"].isnan())
    newly = _cells(first, program, own_shown) & ~_cells(other, program, own_shown)
    if missing.numel() != holes.numel():
        return False
    holes = holes.reshape(missing.shape)
    return torch.equal(missing, holes) and not bool((newly & ~holes).any())


def same_but_for(holes: Tensor, first: Trace, other: Trace, program: Program) -> bool:
    """Whether two runs observe the same values but in these cells."""
    before, now = (_cells(trace, program, itemgetter("value")) for trace in (first, other))
    if before.shape != now.shape or before.numel() != holes.numel():
        return False
    return bool(((before == now) | holes.reshape(before.shape)).all())


def _cells(trace: Trace, program: Program, what: Callable[[Any], Tensor]) -> Tensor:
    """What stands for each number that is observed, row by row: (N, ...)."""
    parts = [rows_first(what(node_of(trace, s.name)), s.row_axis) for s in program.sites]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def nan_shows(model: Model, args: tuple[Any, ...], position: int, program: Program, first: Trace) -> bool:
    """Whether NaN in the argument that is observed as it stands are NaN there too, and no mask hides other cells."""
    changed, holes = holes_in(args, position)
    latents = {n["name"]: n["value"] for n in latent_nodes(first)}
    try:
        with torch.no_grad(), pyro.validation_enabled(False):
            trace = run(model, changed, {**latents, **sub_samples(first)})
    except FAILURES:
        return True
    return gaps_show(first, trace, holes, program)
