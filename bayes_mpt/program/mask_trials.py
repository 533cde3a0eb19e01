"""Masks and scales of a program, and what it observes in one row, at other data: none of it may move with the tokens.

A mask may say which cells are missing, so it may look at isnan(x) and at arguments that are no tokens. One that looks
at the values of tokens (x > 0) makes the likelihood no density: what it leaves out has a probability, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pyro
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.arguments import resampled, stands_in
from bayes_mpt.program.other_latents import other_points
from bayes_mpt.program.program import ModelError, Program
from bayes_mpt.program.run import FirstRun, run
from bayes_mpt.program.sites import (
    node_of,
    observed_nodes,
    own_shown,
    plate_axis,
    sub_samples,
)
from bayes_mpt.program.store import moved_parameters
from bayes_mpt.program.trials import raise_moving

__all__ = ["refuse_other_rows", "refuse_selection", "refuse_unmoved"]

N_TABLES = 8  # of other data
MAX_COLUMNS = 256  # of an argument


class _View(NamedTuple):
    """What a run shows of the data, by site."""

    shown: dict[str, Tensor]
    scale: dict[str, Tensor]
    values: dict[str, Tensor]


def refuse_selection(first: FirstRun, *, by_tokens: bool = True) -> None:
    """Refuse masks and scales that move with the values of tokens, with latents or with parameters.

    Parameters
    ----------
    first : FirstRun
        The program.
    by_tokens : bool, default=True
        Whether they may not move with the values of tokens. Where tokens have an order, masks may look at earlier ones,
        which `bayes_mpt.program.token_graph` has seen to.

    Raises
    ------
    ModelError
        With the site and what to do.
    """
    program, held = first.program, first.latents
    before = _view(first.trace, program)
    for at in other_points(first.model, first.args, first.trace):
        with torch.no_grad(), pyro.validation_enabled(False), moved_parameters(at.size, at.seed):
            now = _view(run(first.model, first.args, {**at.latents, **sub_samples(first.trace)}), program)
        name = _moved(before, now)
        if name is not None:
            raise ModelError(
                f"a mask or scale of the program at site {name!r} moves with latents or parameters, so that what it "
                "leaves out is no missing cell: let it depend on arguments alone, and write a choice between "
                "distributions as a mixture"
            )
    for position, arg in enumerate(first.args if by_tokens else ()):
        for other in _tables(arg):
            trace = first.taken(first.with_argument(position, other), held)
            if trace is None or _moved(before, _view(trace, program)) is None:
                continue
            only = _tokens_alone(first, position, other)
            trace = None if only is None else first.taken(first.with_argument(position, only), held)
            name = None if trace is None else _moved(before, _view(trace, program))
            if name is not None:
                raise ModelError(
                    f"a mask or scale of the program at site {name!r} moves with observed values (x > 0, say): the "
                    "cells that it leaves would be scored by no density. A mask may depend on isnan(x), of missing "
                    "cells, and on arguments that are not observed. Of values that are cut off, write a truncated or "
                    "censored distribution"
                )


def refuse_unmoved(first: FirstRun) -> None:
    """Refuse observed values that are computed from latents which do not move them at these data.

    ``obs=x - a * (x > 50)`` is x where no x is so large, and no shift of cells elsewhere.

    Raises
    ------
    ValuesMove
        With the site; where it is a shift of cells, `bayes_mpt.program.shift_trials` finds it.
    """
    nodes = observed_nodes(first.trace)
    if all(any(stands_in(n["value"], a) for a in first.args) for n in nodes):
        return
    held = first.latents
    held = {n: v.requires_grad_() if v.is_floating_point() else v for n, v in held.items()}
    if not held:
        return
    with torch.enable_grad(), pyro.validation_enabled(False):
        trace = run(first.model, first.args, {**held, **sub_samples(first.trace)})
    for node in nodes:
        if node_of(trace, node["name"])["value"].requires_grad and not node["value"].requires_grad:
            raise_moving(node["name"], tuple(held))


def refuse_other_rows(first: FirstRun) -> None:
    """Refuse observed values that are computed from other rows, where latents of the data set make rows one vector.

    In the rows plate each value is of one row: x - x.mean(0) has fewer numbers than it has entries, and no density.
    Where rows are independent, `bayes_mpt.program.trials` sees more.

    Parameters
    ----------
    first : FirstRun
        The program.

    Raises
    ------
    ModelError
        With the site and what to do.
    """
    program, args = first.program, first.args
    if program.by_row or program.rows_plate is None:
        return
    for name in program.site_names:
        node = node_of(first.trace, name)
        value, axis = node["value"], plate_axis(node, program.rows_plate)
        if axis is None or any(stands_in(value, a) for a in args):
            continue  # cells as they stand
        for position, arg in enumerate(args):
            if not isinstance(arg, Tensor) or not arg.ndim or len(arg) != value.shape[axis] or len(arg) < 2:
                continue
            for row in {0, len(arg) // 2, len(arg) - 1}:
                if _n_moved(first, position, row, name, axis) > 1:
                    raise ModelError(
                        f"the value of observed site {name!r} in one row depends on other rows of plate "
                        f"{program.rows_plate!r} (x - x.mean(0), lags), so that their density is not that of the data: "
                        "compute it outside the program, or make the statistic a pyro.param in the distribution"
                    )


def _n_moved(first: FirstRun, position: int, row: int, name: str, axis: int) -> int:
    """In how many rows a value moves where one row of an argument does."""
    arg, value = first.args[position], node_of(first.trace, name)["value"]
    for other in _tables(arg):
        changed = arg.clone()
        changed[row] = other[row]
        if torch.equal(changed, arg):
            continue
        trace = first.taken(first.with_argument(position, changed), first.latents)
        if trace is not None:
            now = node_of(trace, name)["value"]
            if now.shape != value.shape:
                return 0
            return int((now != value).movedim(axis, 0).reshape(value.shape[axis], -1).any(1).sum())
    return 0


def _view(trace: Trace, program: Program) -> _View:
    nodes = [node_of(trace, name) for name in (*program.site_names, *program.latent_names)]
    return _View(
        {n["name"]: own_shown(n) for n in nodes},
        {n["name"]: torch.as_tensor(n["scale"]).detach() for n in nodes},
        {name: node_of(trace, name)["value"].detach() for name in program.site_names},
    )


def _moved(before: _View, now: _View) -> str | None:
    """The first site whose mask or scale is another."""
    for name in before.shown:
        if not torch.equal(before.shown[name], now.shown[name]):
            return name
        if not torch.equal(before.scale[name], now.scale[name]):
            return name
    return None


def _tables(arg: Any) -> Iterator[Tensor]:
    """Other values for an argument: near and far, to either side; and its own, elsewhere."""
    if not isinstance(arg, Tensor) or not arg.ndim or not arg.numel():
        return
    if len(arg) > 1:
        yield resampled(arg)
    if not arg.is_floating_point():
        return
    size = arg.abs().mean(0) + arg.std(0, correction=0)
    size = torch.where(size > 0, size, torch.ones_like(size))
    generator = torch.Generator().manual_seed(2)
    for k in range(1, N_TABLES):
        step = torch.rand(arg.shape, generator=generator, dtype=torch.float64).to(arg) - (k % 2)
        yield arg + 3.0 ** (k - 3) * size * step


def _tokens_alone(first: FirstRun, position: int, other: Tensor) -> Tensor | None:
    """The argument with other values in those columns alone that are observed; None where none is."""
    arg = first.args[position]
    width = arg[0].numel()
    if width > MAX_COLUMNS:
        return other
    before, only = _view(first.trace, first.program).values, arg
    for column in range(width):
        one = arg.reshape(len(arg), -1).clone()
        one[:, column] = other.reshape(one.shape)[:, column]
        one = one.reshape(arg.shape)
        trace = first.taken(first.with_argument(position, one), first.latents)
        if trace is None:
            continue
        now = _view(trace, first.program).values
        if any(not torch.equal(before[name], now[name]) for name in before):
            only = torch.where(one != arg, other, only)
    return None if only is arg else only
