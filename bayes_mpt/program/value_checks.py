"""Whether a run on all values of discrete latents says what runs on single values say.

Enumerated values stand on an axis left of all plates. A program that does not broadcast over it (``(x * z).sum(-1)``
with x (N, K) and z (L, 1)) may run all the same where L happens to be N, and then row n sees value n. So the
log-density of every site is compared with that of a plain run whose discrete latents are held at some values:

    log p(site | z = v) of the plain run  =  entry v of the enumerated one
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.ops import packed
from torch import Tensor

from bayes_mpt.program.factor_runs import enumerated_log_probs, plain_log_probs, read_factors
from bayes_mpt.program.program import Model, ModelError, Program
from bayes_mpt.program.run import FAILURES, run
from bayes_mpt.program.sites import latent_nodes, sub_samples
from bayes_mpt.program.store import own_random_state

__all__ = ["check_values"]

N_CHOICES = 2  # values of all discrete latents that are tried
RTOL = {torch.float64: 1e-8, torch.float32: 1e-3}
BROADCAST = (
    "write operations that broadcast over leading batch dimensions (probs[z], (x * z[..., None]).sum(-1), "
    "z[..., group] of the entries of a plate), without Python's if"
)


def check_values(model: Model, args: tuple[Any, ...], program: Program) -> None:
    """Refuse a program whose run on all values of its discrete latents is not made of its runs on single ones.

    Parameters
    ----------
    model : callable
        A Pyro program.
    args : tuple
        Filled: no NaN.
    program : Program
        What `analyze` found; nothing is done where it has continuous latents and no discrete ones.

    Raises
    ------
    ModelError
        Which names the site; also where the program does not run on all values at all.
    """
    if program.continuous and not program.discrete:
        return
    with own_random_state(), torch.no_grad():
        first = run(model, args)
    latents = {n["name"]: n["value"] for n in latent_nodes(first) if n["name"] not in program.discrete}
    fixed = latents | sub_samples(first)
    try:
        read_factors(model, args, program, fixed)
    except ModelError as error:
        said, _, _ = str(error).partition(":")  # what it advises is for runs on single values
        if not said.startswith("Shape mismatch"):
            raise
        raise _not_at_once(program, said) from error
    except FAILURES as error:
        raise _not_at_once(program, str(error)) from error
    with torch.no_grad(), pyro.validation_enabled(False):
        trace, log_probs = enumerated_log_probs(model, args, program, fixed)
        if not any("_enumerate_dim" in node["infer"] for node in trace.nodes.values() if "infer" in node):
            return
        trace.symbolize_dims()
        for choice in range(N_CHOICES):
            picked, values = _picked(trace, first, program, choice)
            alone = None
            with suppress(*FAILURES):  # values that the program does not take alone
                alone = plain_log_probs(model, args, program, {**fixed, **values})
            if alone is not None:
                _compare(trace, log_probs, alone, picked, program)


def _not_at_once(program: Program, said: str) -> ModelError:
    """What is said where a run on all values fails."""
    if "alloc" in said or "memory" in said:
        return ModelError(
            f"summing out {list(program.discrete)} at once needs more memory than there is: each adds an axis to "
            "what depends on it. Use fewer values, or pyro.markov where only neighbours depend on each other"
        )
    outside = {program.rows_plate} if program.by_row else set()
    entries = [s.name for s in program.latents if s.discrete and set(s.plates) - outside]
    if "out of bounds for dimension 0" in said and entries:
        return ModelError(
            f"the program looks up entries of {entries} along the first axis, where all their values stand when they "
            f"are summed out ({said}): write {entries[0]}[..., group] in place of {entries[0]}[group]"
        )
    return ModelError(
        f"the program cannot run on all values of {list(program.discrete)} at once ({said}): {BROADCAST}"
    )


def _picked(
    trace: poutine.Trace, first: poutine.Trace, program: Program, choice: int
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """A number for the axis of each discrete latent, by symbol; and the values that stand there, by site."""
    generator = torch.Generator().manual_seed(choice)
    picked, values = {}, {}
    for name in program.discrete:
        node = trace.nodes[name]
        if "_enumerate_symbol" not in node["infer"]:
            continue
        axis = node["infer"]["_enumerate_dim"] - node["fn"].event_dim
        value, shape = node["value"], first.nodes[name]["value"].shape
        k = int(torch.randint(value.shape[axis], (), generator=generator))
        one = value.narrow(axis % value.ndim, k, 1)
        picked[node["infer"]["_enumerate_symbol"]] = k
        values[name] = one.reshape(one.shape[one.ndim - len(shape) :] if one.ndim > len(shape) else one.shape)
        values[name] = values[name].expand(shape).clone()
    return picked, values


def _compare(
    trace: poutine.Trace,
    log_probs: dict[str, tuple[Tensor, int]],
    alone: dict[str, tuple[Tensor, int]],
    picked: dict[str, int],
    program: Program,
) -> None:
    """Raise where a site's log-density among all values is not that of the plain run."""
    for name, (together, n_event) in log_probs.items():
        single = alone[name][0]
        symbols = trace.nodes[name]["infer"]["_dim_to_symbol"]
        if n_event:  # the axes of an event have no symbol
            event = torch.broadcast_shapes(together.shape[-n_event:], single.shape[-n_event:])
            together = together.expand(*together.shape[:-n_event], *event).flatten(-n_event).sum(-1)
            single = single.expand(*single.shape[:-n_event], *event).flatten(-n_event).sum(-1)
        try:
            found, other = packed.pack(together, symbols), packed.pack(single, symbols)
        except ValueError:  # an axis that is neither a plate nor that of a latent's values
            found = None
        if found is not None:
            dims = found._pyro_dims
            for symbol, k in picked.items():
                if symbol in dims:
                    found, dims = found.select(dims.index(symbol), k), dims.replace(symbol, "")
            found._pyro_dims = dims
            found, other = packed.broadcast_all(found, other)
            rtol = RTOL.get(found.dtype, 1e-3)
        if found is None or not torch.allclose(found, other, rtol=rtol, atol=rtol, equal_nan=True):
            raise ModelError(
                f"the program cannot run on all values of {list(program.discrete)} at once: site {name!r} has another "
                f"log-density there than with these values alone. Their axis is left of all plates: "
                f"{_outside(program)}{BROADCAST}"
            )


def _outside(program: Program) -> str:
    """How a discrete latent outside of the plates is written beside their entries; nothing where there is none."""
    z = next((s.name for s in program.latents if s.discrete and not s.plates), None)
    if z is None or not program.depth:
        return ""
    return f"{z!r} stands outside of them and meets their entries as it is, {z} and not {z}[..., None]; "
