"""Whether each cell of the data is observed once: two densities of one cell multiply to none.

Cells that stand at two sites as they are share memory. Copies of them (``x[:, [0, 0]]``, ``torch.cat([x, x])``,
``x * 1.0``) do not: their values are equal, and move with the same cell. Where observed values are equal, the slopes
a_k of all of them by a cell, with any weights s_k, tell how many move with it: of one alone

    sum_k a_k sum_k s_k^2 a_k = (sum_k s_k a_k)^2

Values without slopes, as of categories, are held against runs in which one column has other values.
"""

from __future__ import annotations

import warnings
from typing import Any

import pyro
import torch
from torch import Tensor

from bayes_mpt.program.arguments import cell_name, stands_in
from bayes_mpt.program.program import ModelError, list_names
from bayes_mpt.program.run import FAILURES, FirstRun, run
from bayes_mpt.program.sites import node_of, own_shown, sub_samples

__all__ = ["refuse_cells_twice"]

EQUAL = 1e-9  # of columns in one number
ALONE = 1e-4  # share of slopes, up to which they are those of one value, in single precision too
MAX_PAIRS = 8  # of equal columns without slopes that are tried


def refuse_cells_twice(first: FirstRun) -> None:
    """Refuse cells that are observed at two places, as they stand, shifted, or as copies.

    Parameters
    ----------
    first : FirstRun
        The program.

    Raises
    ------
    ModelError
        With the cell and the sites.
    """
    nodes = [node_of(first.trace, name) for name in first.program.site_names]
    _refuse_views(first, nodes)
    if _some_equal(first, nodes):
        slopeless = _refuse_moving_together(first)
        _refuse_equal_columns(first, [n for n in nodes if n["name"] in slopeless])


def _refuse(first: FirstRun, position: int, index: list[int | slice], names: list[str]) -> None:
    cell = cell_name(first.model, first.args[position], position, index)
    raise ModelError(
        f"cell {cell} is observed more than once, by site {list_names(map(repr, names))}: it would count twice, and "
        "the product of its densities is none. Observe each cell at one site"
    )


def _refuse_views(first: FirstRun, nodes: list[Any]) -> None:
    """Cells that stand at two places, seen by the memory that they share."""
    for position, arg in enumerate(first.args):
        if not isinstance(arg, Tensor) or not arg.numel():
            continue
        views = [n for n in nodes if stands_in(n["value"], arg)]
        if len(views) < 2 and not any(0 in n["value"].stride() for n in views):
            continue
        places = torch.arange(arg.untyped_storage().nbytes() // arg.element_size())
        scored = [_place(places, n["value"])[own_shown(n).cpu()] for n in views]
        twice = int(torch.cat(scored).mode().values) if any(len(s) for s in scored) else -1
        if sum(int((s == twice).sum()) for s in scored) > 1:
            index = (_place(places, arg) == twice).nonzero()[0].tolist()
            names = [n["name"] for n, some in zip(views, scored, strict=True) if bool((some == twice).any())]
            _refuse(first, position, index, names)


def _place(places: Tensor, view: Tensor) -> Tensor:
    """Where in its memory each number of a view stands."""
    return places.as_strided(view.shape, view.stride(), view.storage_offset())


@torch.no_grad()
def _some_equal(first: FirstRun, nodes: list[Any]) -> bool:
    """Whether any two observed values, or of rows by themselves columns of them, are equal."""
    parts = [c for n in nodes for c in _columns(first, n)]
    if first.program.by_row and len(parts) == len(nodes):
        columns = torch.cat(parts, 1)
        generator = torch.Generator().manual_seed(0)
        weight = torch.rand(len(columns), generator=generator, dtype=torch.float64).to(columns.device)
        each = columns.double().mT @ weight
    else:
        each = torch.cat([n["value"].flatten().double() for n in nodes])
    each = each.sort().values
    return bool((each.diff() <= EQUAL * each[1:].abs()).any())


def _columns(first: FirstRun, node: Any) -> list[Tensor]:
    """The values of a site as rows (N, w), as many as the data have; nothing where no axis is as long."""
    value, n_rows = node["value"], len(first.args[0])
    long = [axis for axis, size in enumerate(value.shape) if size == n_rows]
    return [value.movedim(long[0], 0).reshape(n_rows, -1)] if long else []


def _refuse_moving_together(first: FirstRun) -> set[str]:
    """Cells with which several observed values move; the names of sites whose values have no slopes."""
    tracked = [
        a.detach().clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in first.args
    ]
    names = first.program.site_names
    try:
        with torch.enable_grad(), pyro.validation_enabled(False), warnings.catch_warnings():
            # a program may look at its rows, `float(x.min())`, which is no concern of theirs where they have slopes
            warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad")
            trace = run(first.model, tuple(tracked), {**first.latents, **sub_samples(first.trace)})
            nodes = [node_of(trace, name) for name in names]
            values = [torch.where(own_shown(n), n["value"], 0) for n in nodes]
    except FAILURES:
        return set(names)
    moving = [(n["name"], v) for n, v in zip(nodes, values, strict=True) if v.requires_grad]
    leaves = {i: a for i, a in enumerate(tracked) if isinstance(a, Tensor) and a.requires_grad}
    generator = torch.Generator().manual_seed(0)
    weights = [torch.rand(v.shape, generator=generator, dtype=v.dtype).to(v.device) for _, v in moving]

    def slopes(power: int) -> tuple[Tensor, ...]:
        parts = [(w**power * v).sum() for w, (_, v) in zip(weights, moving, strict=True)]
        return torch.autograd.grad(
            torch.stack(parts).sum(),
            tuple(leaves.values()),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )

    if moving and leaves:
        for position, plain, once, square in zip(leaves, *map(slopes, range(3)), strict=True):
            several = plain * square - once**2 > ALONE * plain**2
            if bool(several.any()):
                index = several.nonzero()[0].tolist()
                of_it = [name for name, v in moving if _slope(v.sum(), leaves[position])[tuple(index)] != 0]
                _refuse(first, position, index, of_it)
    return set(names) - {name for name, _ in moving}


def _slope(total: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(total, leaf, retain_graph=True, allow_unused=True, materialize_grads=True)[0]


def _refuse_equal_columns(first: FirstRun, nodes: list[Any]) -> None:
    """The same of values without slopes: of two equal columns both follow one of the data."""
    columns = {(n["name"], j): c for n in nodes for part in _columns(first, n) for j, c in enumerate(part.mT)}
    shown = {
        (n["name"], j): c
        for n in nodes
        for part in _columns(first, {**n, "value": own_shown(n)})
        for j, c in enumerate(part.mT)
    }
    keys, n_tried = list(columns), 0
    for i, key in enumerate(keys):
        for other in keys[:i]:
            both = shown[key] & shown[other]
            if n_tried >= MAX_PAIRS or not torch.equal(columns[key], columns[other]) or not bool(both.any()):
                continue
            n_tried += 1
            for position, place in _like(first, columns[key]):
                arg = first.args[position].clone()
                arg[place] = arg[place].roll(1, 0)
                trace = first.taken(first.with_argument(position, arg), first.latents)
                if trace is None or torch.equal(arg[place], first.args[position][place]):
                    continue
                found = [_columns(first, node_of(trace, name))[0][:, j] for name, j in (key, other)]
                if all(torch.equal(f.double(), arg[place].double()) for f in found):
                    _refuse(first, position, list(place), sorted({key[0], other[0]}))


def _like(first: FirstRun, column: Tensor) -> list[tuple[int, tuple[Any, ...]]]:
    """The columns of arguments that have these values (N,): which argument, and where in it."""
    found: list[tuple[int, tuple[Any, ...]]] = []
    for position, arg in enumerate(first.args):
        if not isinstance(arg, Tensor) or arg.ndim not in (1, 2) or len(arg) != len(column):
            continue
        by_column = arg[:, None] if arg.ndim == 1 else arg
        same = (by_column.double() == column.double()[:, None]).all(0).nonzero()[:, 0].tolist()
        found += [(position, (slice(None),) if arg.ndim == 1 else (slice(None), j)) for j in same]
    return found
