"""Runs of a program at nodes, its discrete latents enumerated: what `Factors` are read from.

A program that broadcasts over leading batch dimensions runs once on a plate of S nodes; one that does not (``x @ w``,
``locs[z]``) once too, by `torch.vmap`. Log-densities come out as (enumerated..., S, plates..., event...) either way and
serve all questions.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.ops import packed
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.batched import Batched, MappedEnumeration, Tensors, run_mapped
from bayes_mpt.program.densities import log_density, unrepeated
from bayes_mpt.program.factors import Factors, Question, Tokens
from bayes_mpt.program.joint_values import JointValues, meeting_plates
from bayes_mpt.program.layout import check_shape, rows_axis, sum_by_row, token_values
from bayes_mpt.program.program import Model, ModelError, Observed, Program, n_rows_of
from bayes_mpt.program.run import FAILURES, NODES, SetLatents, nodes_plate, one_precision, run
from bayes_mpt.program.seen_labels import with_seen_labels
from bayes_mpt.program.sites import base, is_subsample, latent_nodes, node_of, own_masks
from bayes_mpt.program.store import own_random_state
from bayes_mpt.program.unconstrained import latent_density

__all__ = ["enumerated_log_probs", "plain_log_probs", "read_factors", "with_meeting_entries"]


def read_factors(
    model: Model,
    args: tuple[Any, ...],
    program: Program,
    values: dict[str, Tensor] | None = None,
    n_nodes: int = 1,
    batched: Batched = Batched.PLATE,
) -> Factors:
    """Run the program at these values of its continuous latents, discrete ones enumerated.

    Parameters
    ----------
    model : callable
        A Pyro program.
    args : tuple
        Filled: no NaN.
    program : Program
        What `analyze` found.
    values : dict of name to Tensor
        Of every continuous latent: its own shape where ``n_nodes`` is 1; with S nodes (S, 1..., batch..., event...),
        the S left of all plates.
    n_nodes : int, default=1
        S.
    batched : Batched, default=Batched.PLATE
        How the program takes them; by `torch.vmap` values are (S, batch..., event...).

    Raises
    ------
    ModelError
        If a discrete latent has too many values, or the program cannot run on enumerated values.
    """
    ran = _run_mapped if batched is Batched.VMAP and n_nodes > 1 else _run
    found = ran(model, args, program, values or {}, n_nodes)
    trace, log_probs, n_rows = found.trace, found.log_probs, n_rows_of(program, args)
    # those that are held have their density elsewhere
    hidden = [node for node in latent_nodes(trace) if node["name"] in program.latent_names]
    sums = any("_enumerate_dim" in node["infer"] for node in hidden)
    if sums:
        trace.symbolize_dims()
    own = tuple(node["infer"].get("_enumerate_symbol", "") for node in hidden)
    tokens = tuple(_tokens_of(found, site, sums) for site in program.sites)
    prior, latents, kept = None, [], ""
    sizes: dict[str, int] = {}
    if sums:
        kept, sizes = _plates(trace, program, n_nodes, n_rows)
        latents = [
            (_ordinal(trace, node), packed.pack(log_probs[node["name"]], node["infer"]["_dim_to_symbol"]))
            for node in hidden
        ]
    else:
        parts = [sum_by_row(log_probs[node["name"]], rows_axis(node, program), n_nodes) for node in hidden]
        prior = sum(parts[1:], parts[0]) if parts else tokens[0].log_prob.new_zeros(n_nodes, n_rows)
    return Factors(
        tokens,
        prior,
        tuple(latents),
        own,
        frozenset(own) - {""},
        kept,
        sizes,
        n_nodes,
        n_rows,
        float(trace.nodes[program.sites[-1].name]["scale"]),
        found.value,
        _together(trace, program) if sums else (),
    )


def _together(trace: Trace, program: Program) -> tuple[tuple[str, frozenset[str]], ...]:
    """Symbols of the sites of `Program.meeting` that are enumerated, and of their plates."""
    return tuple(
        (trace.nodes[name]["infer"]["_enumerate_symbol"], frozenset(trace.plate_to_symbol[p] for p in plates))
        for name, plates in program.meeting
        if "_enumerate_symbol" in trace.nodes[name]["infer"]
    )


def with_meeting_entries(model: Model, args: tuple[Any, ...], program: Program) -> Program:
    """The program, with the discrete latents of plates whose entries meet outside: their values go together.

    ``(x * included * w).sum(-1)`` over the plate of the weights looks at all of them at once.
    """
    rows = {program.rows_plate} if program.by_row else set()
    every = {s.name: frozenset(set(s.plates) - rows) for s in program.latents if s.discrete}
    every = {name: plates for name, plates in every.items() if plates}
    if not every:
        return program
    with own_random_state(), torch.no_grad():
        found = None
        with suppress(*FAILURES):
            found = _run(model, args, program, {}, 1)
        if found is not None:
            with suppress(*FAILURES):  # an axis is lost: where it is read, it says so
                found.trace.symbolize_dims()
                whole = {
                    name: t.sum(tuple(range(-n, 0))) if n else t
                    for name, (t, n) in _log_probs(found.trace, program).items()
                }
                return program._replace(meeting=tuple(meeting_plates(found.trace, whole).items()))
            return program
        with suppress(*FAILURES):  # entries that are looked up, z[..., index], have to be there
            together = program._replace(meeting=tuple(every.items()))
            _run(model, args, together, {}, 1)
            return together
    return program  # where it is read, it says why it cannot run


def enumerated_log_probs(
    model: Model, args: tuple[Any, ...], program: Program, values: dict[str, Tensor]
) -> tuple[Trace, Tensors]:
    """A run at these values of continuous latents on all of discrete ones: log-densities and their event axes."""
    trace = _enumerated(model, args, program, values, 1, False)
    return trace, _log_probs(trace, program)


def plain_log_probs(
    model: Model, args: tuple[Any, ...], program: Program, values: dict[str, Tensor]
) -> Tensors:
    """The same of a run at one value of each latent."""
    return _log_probs(run(model, args, values), program)


class _Found(NamedTuple):
    """What is taken out of a run."""

    trace: Trace
    log_probs: dict[str, Tensor]
    """Of tokens and latents by site: (enumerated..., S, plates..., event...)."""
    value: Tensor
    """(N, T)"""
    ask: Callable[[str, Question, int], Tensor]
    """Of a site's distribution."""


def _run(
    model: Model, args: tuple[Any, ...], program: Program, values: dict[str, Tensor], n_nodes: int
) -> _Found:
    """A run on nodes side by side."""
    trace = _enumerated(model, args, program, values, n_nodes, n_nodes > 1)
    if n_nodes > 1 and not program.discrete:
        _check_nodes(trace, program)
    log_probs = {name: t for name, (t, _) in _log_probs(trace, program).items()}

    def ask(name: str, question: Question, n_more: int) -> Tensor:
        return question(base(trace.nodes[name]["fn"]), log_probs[name].shape)

    return _Found(trace, log_probs, token_values(trace, program), ask)


def _check_nodes(trace: Trace, program: Program) -> None:
    """Refuse a run on nodes side by side whose nodes came to stand left of their plate, which repeats them all.

    ``(x * w[..., None, :]).sum(-1)`` gives (S, 1, N) of nodes (S, 1): numbers may be right, at S times the cost.
    """
    for site in program.sites:
        shape = trace.nodes[site.name]["fn"].batch_shape
        if len(shape) > 1 + program.depth:
            raise ModelError(
                f"observed site {site.name!r} has batch shape {tuple(shape)} in a run at many nodes, which has an axis "
                f"left of {NODES} and the {program.depth} of the program's plates"
            )


def _run_mapped(
    model: Model, args: tuple[Any, ...], program: Program, values: dict[str, Tensor], n_nodes: int
) -> _Found:
    """Runs on nodes one by one in one, of a program that does not broadcast."""
    read = partial(_enumerated, model, args, program, n_nodes=1, on_plate=True)

    def everything(node: dict[str, Tensor]) -> tuple[Trace, Tensors]:
        trace = read(node)
        value = token_values(trace, program)
        return trace, _log_probs(trace, program) | {"": (value, value.ndim)}

    trace, log_probs = run_mapped(everything, values, program.depth)
    value = log_probs.pop("")[(0,) * (1 + program.depth)]

    def ask(name: str, question: Question, n_more: int) -> Tensor:
        n_event = trace.nodes[name]["fn"].event_dim - next(s.n_joint for s in program.sites if s.name == name)
        shape = list(log_probs[name].shape)
        shape[len(shape) - program.depth - n_event - 1] = 1  # of one node

        def one(node: dict[str, Tensor]) -> tuple[Trace, Tensors]:
            again = read(node)
            said = question(base(again.nodes[name]["fn"]), torch.Size(shape))
            return again, {name: (said, n_event + n_more)}

        return run_mapped(one, values, program.depth)[1][name]

    return _Found(trace, log_probs, value, ask)


def _enumerated(
    model: Model,
    args: tuple[Any, ...],
    program: Program,
    values: dict[str, Tensor],
    n_nodes: int,
    on_plate: bool,
) -> Trace:
    """The run on nodes side by side, left of the program's plates, and left of them the values of discrete latents."""
    depth = program.depth
    with ExitStack() as stack:
        stack.enter_context(one_precision(args))
        # Outside of the enumeration, which must see a latent of whose mean a discrete one decides before it is set.
        stack.enter_context(SetLatents(values))
        if program.discrete:
            stack.enter_context(MappedEnumeration(first_available_dim=-1 - depth - on_plate))
            stack.enter_context(JointValues(dict(program.meeting)))
        if on_plate:
            stack.enter_context(nodes_plate(n_nodes, depth))
        if program.discrete:  # those of labels that are not seen too
            stack.enter_context(_Enumerate())
            model = with_seen_labels(model)
        return poutine.trace(model).get_trace(*args)


def _log_probs(trace: Trace, program: Program) -> Tensors:
    """Log-densities of tokens, 0 where masks of the program hide them, and latents; with their event axes."""
    dtype = node_of(trace, program.sites[0].name)["value"].dtype  # constants may be of another
    out: Tensors = {}
    for node in latent_nodes(trace):
        if node["name"] in program.latent_names:
            summed = "_enumerate_dim" in node["infer"]
            found = log_density(unrepeated(node["fn"]), node["value"]) if summed else latent_density(node)
            out[node["name"]] = found.to(dtype), 0
    for site in program.sites:
        node = node_of(trace, site.name)
        check_shape(node, site)
        fn = base(node["fn"])
        plain = unrepeated(fn)
        if plain is not fn and fn._validate_args:
            fn._validate_sample(node["value"])
        log_prob = log_density(plain, node["value"]).to(dtype)
        n_event = node["fn"].event_dim - site.n_joint
        for mask, n_outer in own_masks(node, n_event):
            log_prob = torch.where(mask[(...,) + (None,) * n_outer] if mask.ndim else mask, log_prob, 0.0)
        out[site.name] = log_prob, n_event
    return out


def _tokens_of(found: _Found, site: Observed, sums: bool) -> Tokens:
    """The tokens of one site of the run."""
    node = found.trace.nodes[site.name]
    ordinal = _ordinal(found.trace, node) if sums else frozenset()
    symbols = node["infer"]["_dim_to_symbol"] if sums else {}
    n_event = node["fn"].event_dim - site.n_joint
    return Tokens(site, found.log_probs[site.name], partial(found.ask, site.name), ordinal, symbols, n_event)


def _plates(trace: Trace, program: Program, n_nodes: int, n_rows: int) -> tuple[str, dict[str, int]]:
    """Symbols of nodes and rows, those that there are; and the sizes of all plates."""
    kept, sizes = "", {}
    for node in trace.nodes.values():
        if node["type"] != "sample" or is_subsample(node):
            continue
        for frame in node["cond_indep_stack"]:
            if frame.vectorized:
                sizes[trace.plate_to_symbol[frame.name]] = frame.size
    for name, size in ((NODES, n_nodes), (program.rows_plate if program.by_row else None, n_rows)):
        if name in trace.plate_to_symbol and size > 1:
            kept += trace.plate_to_symbol[name]
            sizes[trace.plate_to_symbol[name]] = size
    return kept, sizes


class _Enumerate(poutine.messenger.Messenger):
    """Mark discrete latents for parallel enumeration."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["done"] or is_subsample(msg):
            return
        if getattr(msg["fn"], "has_enumerate_support", False):
            msg["infer"]["enumerate"] = "parallel"


def _ordinal(trace: Any, node: Any) -> frozenset[str]:
    return frozenset(trace.plate_to_symbol[f.name] for f in node["cond_indep_stack"] if f.vectorized)
