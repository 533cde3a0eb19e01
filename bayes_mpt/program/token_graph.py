"""Which tokens look at which others: the order in which a program's tokens may be chained, found by evaluation.

Where token i's distribution looks at tokens of other cells, as in an autoregression, the product of all factors is a
joint density only if the tokens have an order in which each looks at earlier ones alone:

    log p(x | z) = sum_i log p(x_i | x_earlier, z)

A cycle (``Normal(a * x.flip(-1), s)``, ``obs=x``) integrates to another number than one, without bound as a grows.

    J_ij = whether the law of token i (mean, scale, probabilities, own mask) moves with the cell of token j

is found by changing cells, at up to 8 random points (rows, and latents drawn from the prior) and by steps of two sizes:
a thousandth of a value, and to the value of another cell. Cells are changed in blocks first, the slices of an argument
along one axis (columns of independent rows, steps of a loop over time), and cell by cell only where blocks do not have
an order. All changes of a block are copies of the program that run side by side under `torch.vmap`; a program that does
not take that (Python's ``if`` on a cell, in-place operations) is run copy by copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.arguments import cell_name, resampled, rows_of, spread_rows
from bayes_mpt.program.layout import rows_first, to_rows
from bayes_mpt.program.program import Looks, ModelError, Order, list_names
from bayes_mpt.program.run import FAILURES, FirstRun, run
from bayes_mpt.program.sites import base, node_of, own_shown
from bayes_mpt.program.token_order import Moved, cycle_of, reached, sorted_tokens

__all__ = ["find_order", "looks_by_cell"]

MAX_POINTS = 8
MAX_ROWS = 32  # that are independent, on which the graph is looked for
MAX_CELLS = 4096  # that are changed one by one
MAX_FEW = 600  # of one vector, that are changed again for a table with missing ones
N_NUMBERS = 2**25  # cells of all copies together: fewer points where one takes more
CHUNK = 2**21  # cells of the copies that run side by side
N_SECONDS = 4.0  # for copies that run one after the other
SMALL = 1e-3  # of a value: the smaller step
TOL = {torch.float64: 1e-9, torch.float32: 1e-4}

Values = dict[str, Tensor]


class _Laws(NamedTuple):
    """What one run says of its tokens."""

    value: Tensor
    """(..., N, T)"""
    law: Tensor
    """(..., 3, N, T): mean, scale and own mask of Normal tokens; of others the log-density of given values."""
    latents: Tensor
    """(..., L): one number that moves with the prior of each latent site."""


class _Block(NamedTuple):
    """Cells of one argument that are changed together."""

    position: int
    at: tuple[int | slice, ...]


class _Point(NamedTuple):
    """Arguments, latents, and what the program says there."""

    args: tuple[Any, ...]
    latents: Values
    values: Values
    laws: _Laws


# ------------------------------------------------------------------------------------------------ what is asked for


@torch.no_grad()
def find_order(first: FirstRun, latents: list[Values]) -> Order:
    """The order of a program's tokens in which each looks at earlier ones alone.

    Parameters
    ----------
    first : FirstRun
        A program of independent rows, of which each has this order; or of one vector.
    latents : list of dict of name to Tensor
        Draws of all latents on these arguments.

    Returns
    -------
    Order

    Raises
    ------
    ModelError
        If there is none: the message names the cells of a cycle. If a program is too large for it to be found.
    """
    with pyro.validation_enabled(False):
        search = _Search(first, latents)
        for blocks in search.partitions():
            moved = search.moved(blocks)
            found = sorted_tokens(moved, search.after)
            if found is not None:
                given = [
                    search.name(b)
                    for b, v, w, z in zip(blocks, *moved, strict=True)
                    if not v.any() and (w.any() or z.any())
                ]
                masked = search.masked()
                names = [
                    search.name(b) for b, v in zip(blocks, moved.value, strict=True) if (v & masked).any()
                ]
                given += [f"masked cells of {list_names(names)}"] if names else []
                return Order(tuple(found), _looks(moved, search.after[0]), tuple(given), search.how)
        search.refuse(blocks, moved, cycle_of(moved, search.after))
    raise AssertionError("a search ends in an order or a cycle")


@torch.no_grad()
def looks_by_cell(first: FirstRun, latents: list[Values]) -> Looks | None:
    """Which tokens look at each cell alone, at draws of latents; None of too many cells. See `Order.looks`."""
    with pyro.validation_enabled(False):
        search = _Search(first, latents)
        shapes = {i: search.args[i].shape for i in search.observed_arguments}
        if sum(shape.numel() for shape in shapes.values()) > MAX_FEW:
            return None
        blocks = [_Block(i, cell) for i, shape in shapes.items() for cell in product(*map(range, shape))]
        return _looks(search.moved(blocks), search.after[0])


def _looks(moved: Moved, after: NDArray[np.bool_]) -> Looks:
    """By block, tokens that others look at, and these: also those drawn ``after`` (L, T) a latent that looks."""
    law = moved.law | (moved.latents @ after if moved.latents.any() else False)
    both = (
        (np.flatnonzero(v).tolist(), np.flatnonzero(w).tolist())
        for v, w in zip(moved.value, law, strict=True)
    )
    return tuple((tuple(first), tuple(later)) for first, later in both if first and later)


# ------------------------------------------------------------------------------------------------------- the search


class _Search:
    """A program, the points at which it is looked at, and the cells that its tokens are made of."""

    def __init__(self, first: FirstRun, latents: list[Values]):
        self.model, args, program, trace = first
        self.program = program
        places = {name: i for i, name in enumerate(trace.nodes)}
        after = [
            [places[s.name] > places[z.name] for s in program.sites for _ in range(s.n_tokens)]
            for z in program.latents
        ]
        later = [[places[y.name] > places[z.name] for y in program.latents] for z in program.latents]
        n_latents = len(program.latents)
        self.after = (
            np.array(after, bool).reshape(n_latents, program.n_tokens),
            np.array(later, bool).reshape(n_latents, n_latents),
        )
        """Which tokens (L, T) and latents (L, L) are drawn after each latent, and so may depend on it."""
        self.args, latents = self._few_rows(args, latents)
        self.how = ""
        self.points = self._points(latents)
        self.observed_arguments = [i for i in range(len(args)) if self._is_observed(i)]
        """Arguments with cells that are tokens."""

    # ------------------------------------------------------------------------------------------------ the points

    def _few_rows(self, args: tuple[Any, ...], latents: list[Values]) -> tuple[tuple[Any, ...], list[Values]]:
        """Some of the rows, where they are independent and the program takes fewer."""
        if not self.program.by_row or len(args[0]) <= MAX_ROWS:
            return args, latents
        index = spread_rows(len(args[0]), MAX_ROWS).to(args[0].device)
        axes = {s.name: s.row_axis for s in self.program.latents}
        few = [
            {
                n: v if (axis := axes.get(n)) is None else v.index_select(axis, index)
                for n, v in values.items()
            }
            for values in latents
        ]
        rows = rows_of(args, index)
        with suppress(*FAILURES):
            run(self.model, rows, few[0])
            return rows, few
        return args, latents

    def _points(self, latents: list[Values]) -> list[_Point]:
        """The rows themselves, and others made of their values, each with a draw of the latents."""
        out = []
        for k in range(MAX_POINTS):
            args = self.args if not k else tuple(self._other(a, k) for a in self.args)
            values = latents[k % len(latents)]
            with suppress(*FAILURES):
                trace = run(self.model, args, values)
                tokens = {s.name: node_of(trace, s.name)["value"] for s in self.program.sites}
                at = {s.name: node_of(trace, s.name)["value"] for s in self.program.latents}
                laws = self._laws(trace, {**tokens, **at})
                if not bool(laws.law.isnan().any()):
                    out.append(_Point(args, at, tokens, laws))
        if not out:
            raise ModelError(
                f"the distribution of site {self.program.site_names[0]!r} changes with the observed x itself, and is "
                "not a number at its own values: whether its tokens have an order cannot be seen"
            )
        return out

    def _other(self, arg: Any, seed: int) -> Any:
        """Other values for an argument: those of other cells, a little moved where they are no whole numbers."""
        if not isinstance(arg, Tensor) or not arg.ndim or not arg.is_floating_point():
            return arg
        generator = torch.Generator().manual_seed(seed)
        index = torch.randint(len(arg), arg.shape, generator=generator).to(arg.device)
        value = torch.gather(arg, 0, index)
        jitter = 1 + 0.2 * torch.randn(arg.shape, generator=generator, dtype=torch.float64).to(arg)
        return torch.where(_whole(arg), value, value * jitter)

    def _is_observed(self, position: int) -> bool:
        """Whether tokens move with the cells of an argument."""
        arg = self.args[position]
        if not isinstance(arg, Tensor) or not arg.ndim or not arg.numel():
            return False
        point = self.points[0]
        for step in _steps(arg, arg):
            with suppress(*FAILURES):
                trace = run(self.model, _with(point.args, position, step), point.latents)
                return any(not torch.equal(node_of(trace, n)["value"], v) for n, v in point.values.items())
        return False

    # ------------------------------------------------------------------------------------------------ the blocks

    def partitions(self) -> Iterator[list[_Block]]:
        """Blocks of cells: slices along one axis, the fewest first; then single cells."""
        skip = 1 if self.program.by_row else 0  # all rows at once: they are independent
        shapes = {i: tuple(self.args[i].shape) for i in self.observed_arguments}
        depth = max((len(s) for s in shapes.values()), default=0)
        axes = sorted(range(skip, depth), key=lambda k: sum(s[k] for s in shapes.values() if k < len(s)))
        n_cells = sum(int(np.prod(s[skip:])) for s in shapes.values())
        self._refuse_single(shapes, skip)
        for axis in axes:
            blocks = [
                _Block(i, (*[slice(None)] * axis, c)[: len(s)])
                for i, s in shapes.items()
                for c in (range(s[axis]) if axis < len(s) else [slice(None)])
            ]
            if 1 < len(blocks) <= MAX_CELLS and len(blocks) < n_cells:
                yield blocks
        if n_cells > MAX_CELLS:
            raise ModelError(
                f"the distribution of site {self.program.site_names[0]!r} changes with the observed x itself. Tokens "
                f"that look at earlier ones have a density, but of {n_cells} cells no order was found along one axis "
                f"of x, and more than {MAX_CELLS} are not tried one by one: let each step look at earlier steps only, "
                "or give fewer"
            )
        yield [
            _Block(i, (*[slice(None)] * min(skip, len(s)), *cell))
            for i, s in shapes.items()
            for cell in product(*map(range, s[skip:]))
        ]

    def _refuse_single(self, shapes: dict[int, tuple[int, ...]], skip: int) -> None:
        """Refuse at once what is most common: a token that looks at its own cell, as by a mean over all of them."""
        some = []
        for i, shape in shapes.items():
            n = int(np.prod(shape[skip:]))
            for c in sorted({0, n // 2, n - 1}):
                some.append(_Block(i, (*[slice(None)] * skip, *map(int, np.unravel_index(c, shape[skip:])))))
        moved = self.moved(some, n_points=2)
        both = (moved.value & reached(moved, self.after)).any(1)
        if both.any():
            self.refuse(some, moved, np.flatnonzero(both)[:1].tolist())

    def name(self, block: _Block) -> str:
        """A block as one writes it: x[3], or x[:, 2]."""
        return cell_name(self.model, self.args[block.position], block.position, block.at)

    # ------------------------------------------------------------------------------------------- what moves with what

    def moved(self, blocks: list[_Block], n_points: int = MAX_POINTS) -> Moved:
        """What moves with the cells of each block at any of the points, by steps of either size."""
        n_numbers = len(blocks) * 2 * sum(self.args[i].numel() for i in self.observed_arguments)
        points = self.points[: max(1, min(n_points, N_NUMBERS // max(1, n_numbers)))]
        try:
            found = [self._at_once(blocks, point) for point in points]
            self.how = f"by {2 * len(points)} changes of each cell"
        except FAILURES:
            found = list(self._one_by_one(blocks, points))
            self.how = f"by {2 * min(len(found), len(points))} changes of each cell"
        return Moved(*(np.logical_or.reduce(part) for part in zip(*found, strict=True)))

    def _changed(self, point: _Point) -> list[tuple[Tensor, ...]]:
        """The arguments that tokens are made of with all cells changed, by steps of either size."""
        steps = (_steps(point.args[i], self.args[i]) for i in self.observed_arguments)
        return list(zip(*steps, strict=True))

    def _at_once(self, blocks: list[_Block], point: _Point) -> Moved:
        """All blocks changed side by side."""
        out: list[Moved] = []
        n_cells = sum(point.args[i].numel() for i in self.observed_arguments)
        size = max(1, CHUNK // max(1, n_cells))
        for start in range(0, len(blocks), size):
            part = blocks[start : start + size]
            both = []
            for step in self._changed(point):
                copies = tuple(
                    _copies(point.args[i], other, i, part)
                    for i, other in zip(self.observed_arguments, step, strict=True)
                )
                both.append(self._compare(torch.vmap(self._of_copy(point))(*copies), point))
            out.append(Moved(*(np.logical_or(*p) for p in zip(*both, strict=True))))
        return Moved(*(np.concatenate(p) for p in zip(*out, strict=True)))

    def _one_by_one(self, blocks: list[_Block], points: list[_Point]) -> Iterator[Moved]:
        """The same, copy by copy, at as many points as time allows."""
        began = time.process_time()
        taken = np.zeros(len(blocks), bool)
        nothing = Moved(
            *(np.zeros((1, n), bool) for n in (self.program.n_tokens,) * 2 + self.after[1].shape[:1])
        )
        for k, point in enumerate(points):
            both = []
            for step in self._changed(point):
                found = []
                for b, block in enumerate(blocks):
                    copies = tuple(
                        _copies(point.args[i], other, i, [block])[0]
                        for i, other in zip(self.observed_arguments, step, strict=True)
                    )
                    try:
                        laws = self._of_copy(point)(*copies)
                    except FAILURES:  # the program does not take such a value
                        found.append(nothing)
                    else:
                        taken[b] = True
                        found.append(self._compare(_Laws(*(t[None] for t in laws)), point))
                    if not k and b == 3:
                        self._refuse_slow((time.process_time() - began) / 2 * len(blocks), len(blocks))
                both.append(Moved(*(np.concatenate(p) for p in zip(*found, strict=True))))
            yield Moved(*(np.logical_or(*p) for p in zip(*both, strict=True)))
            if (time.process_time() - began) * (k + 2) / (k + 1) > N_SECONDS:
                break
        if not taken.all():  # what could not be tried may move anything
            yield Moved(*(np.repeat(~taken[:, None], part.shape[1], 1) for part in nothing))

    def _refuse_slow(self, seconds: float, n: int) -> None:
        """Refuse what would take so long."""
        if seconds > 3 * N_SECONDS:
            raise ModelError(
                f"the distribution of site {self.program.site_names[0]!r} changes with the observed x itself. Tokens "
                f"that look at earlier ones have a density, but for {n} cells to be tried the program must run under "
                "torch.vmap over its arguments: write it without Python's if on values, .item() and in-place "
                "operations"
            )

    def _of_copy(self, point: _Point) -> Callable[..., _Laws]:
        """The laws of a run on other values of the arguments that tokens are made of."""

        def laws(*changed: Tensor) -> _Laws:
            args = list(point.args)
            for i, arg in zip(self.observed_arguments, changed, strict=True):
                args[i] = arg
            trace = run(self.model, tuple(args), point.latents)
            return self._laws(trace, {**point.values, **point.latents})

        return laws

    def _laws(self, trace: Trace, values: Values) -> _Laws:
        """The laws of a run, by these values of tokens and latents."""
        value, law, latents = [], [], []
        for site in self.program.sites:
            node = node_of(trace, site.name)
            fn, at = base(node["fn"]), values[site.name]
            if type(fn) is dist.Normal:
                parts = [fn.loc.expand(at.shape), fn.scale.expand(at.shape)]
            else:
                log_prob = fn.log_prob(at)
                parts = [log_prob, torch.ones_like(log_prob)]
            n_joint = site.n_joint if type(fn) is not dist.Normal else 0
            mask = own_shown(node).to(torch.get_default_dtype())
            law.append(
                torch.stack(
                    [
                        *(rows_first(p, site.row_axis) for p in parts),
                        rows_first(mask, site.row_axis, n_joint),
                    ]
                )
            )
            value.append(rows_first(node["value"], site.row_axis, site.n_joint).to(law[-1]))
        for latent in self.program.latents:
            fn = node_of(trace, latent.name)["fn"]
            log_prob = to_rows(fn.log_prob(values[latent.name]), None).flatten()
            weight = torch.linspace(1, 2, len(log_prob), dtype=log_prob.dtype, device=log_prob.device)
            latents.append((weight * log_prob).sum())
        first = law[0]
        return _Laws(
            torch.cat(value, -1),
            torch.cat(law, -1),
            torch.stack(latents) if latents else first.new_zeros(0),
        )

    def _compare(self, laws: _Laws, point: _Point) -> Moved:
        """What is not as it was, of B copies; NaN is not what a number was."""
        before, tol = point.laws, TOL.get(point.laws.law.dtype, 1e-4)
        value = (laws.value != before.value).any(-2)
        # of a mean, the scale is the unit; of a log-density, one
        scale = before.law[1].abs()
        unit = torch.stack([scale, scale, torch.zeros_like(scale)]) + before.law.abs()
        same = (laws.law - before.law).abs() <= tol * unit
        same = same | (laws.law == before.law)
        law = (~same).any(-3).any(-2)
        near = (laws.latents - before.latents).abs() <= tol * (1 + before.latents.abs())
        latents = ~(near | (laws.latents == before.latents))
        return Moved(*(t.cpu().numpy() for t in (value, law, latents)))

    def masked(self) -> NDArray[np.bool_]:
        """Tokens (T,) that a mask of the program hides in some row."""
        return np.asarray((self.points[0].laws.law[2] == 0).any(0).cpu().numpy())

    def refuse(self, blocks: list[_Block], moved: Moved, cycle: list[int]) -> NoReturn:
        """The error of blocks of which each looks at the next, and the last at the first."""
        names = [self.name(blocks[b]) for b in cycle]
        last, first = cycle[0], cycle[min(1, len(cycle) - 1)]  # the law of the last token looks at the first
        direct = np.flatnonzero(moved.law[first] & moved.value[last])
        if len(direct):
            sites = [s.name for s in self.program.sites for _ in range(s.n_tokens)]
            site = sites[int(direct[0])]
            where = f"that of {names[0]} looks at {names[0]} itself"
            if len(names) > 1:
                where = f"that of {names[0]} looks at {', which looks at '.join([*names[1:], names[0]])}"
        else:
            by = moved.latents[first] & (self.after[0] & moved.value[last]).any(1)
            site = self.program.latents[int(np.flatnonzero(by)[0])].name
            where = (
                f"the latent's prior looks at {self.name(blocks[first])}, and {names[0]} is drawn after it"
            )
        raise ModelError(
            f"the distribution of site {site!r} changes with the observed x itself: {where} (a statistic of x inside "
            "the program, x as its own covariate, or neighbours that look at each other). So no order of the tokens "
            "has each look at earlier ones alone, and their product would be a pseudo-likelihood and no density. "
            "Compute the statistic outside, make it a pyro.param, pass covariates as a further argument, or let each "
            "token look at the past only"
        )


# ------------------------------------------------------------------------------------------------------- the changes


def _whole(arg: Tensor) -> Tensor:
    """Which columns hold whole numbers."""
    return (arg == arg.round()).all(0)


def _steps(arg: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
    """An argument with every cell changed a little, and a lot; whole numbers to others that the data have."""
    low, high = data.amin(0), data.amax(0)
    if data.ndim > 1:  # of a column that is constant those of others
        same = low == high
        low, high = torch.where(same, data.amin(), low), torch.where(same, data.amax(), high)
    swapped = torch.where(arg == low, high, low).to(arg)
    far = ~arg if arg.dtype == torch.bool else arg + 1
    swapped = torch.where(swapped == arg, far, swapped)
    drawn = resampled(data)
    drawn = torch.where(drawn == arg, swapped, drawn)
    if not arg.is_floating_point():
        return swapped, drawn
    whole, size = _whole(data), data.abs().mean() + data.std(correction=0)
    size = torch.where(size > 0, size, torch.ones_like(size))
    sign = torch.where(arg < 0, -1.0, 1.0).to(arg)  # away from zero: what is positive stays so
    small = arg + sign * SMALL * (arg.abs() + size * 0.1)
    generator = torch.Generator().manual_seed(3)
    factor = 1 + 0.5 * torch.rand(arg.shape, generator=generator, dtype=torch.float64).to(arg)
    large = resampled(data) * factor
    large = torch.where(large == arg, arg + sign * size, large)
    return torch.where(whole, swapped, small), torch.where(whole, drawn, large)


def _copies(arg: Tensor, other: Tensor, position: int, blocks: list[_Block]) -> Tensor:
    """Copies (B, ...) of an argument, in each of which the cells of a block are others."""
    out = arg[None].repeat(len(blocks), *[1] * arg.ndim)
    for b, block in enumerate(blocks):
        if block.position == position:
            out[b][block.at] = other[block.at]
    return out


def _with(args: tuple[Any, ...], position: int, arg: Tensor) -> tuple[Any, ...]:
    return (*args[:position], arg, *args[position + 1 :])
