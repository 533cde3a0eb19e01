"""Observed values that move with latents or parameters: found to be shifted cells by evaluation, or refused.

With x the arguments, z latents and parameters, z0 and x0 those of the first run, v(x, z) is a shift of cells if

    v(x, z0) - v(x0, z0) = c (x - x0) of one cell of one argument, another one for each number, with one factor c
    v(x, z) - c x = v(x0, z) - c x0     for z and x far away as well

Or, of a value of one number, a shift of one cell by what earlier cells are (residuals x_t - theta e_(t-1)): the slopes
of all values are a triangle then. Its Jacobian |dv/dx| is |c|, and the density of the values is that of the cells
|c| x. A scale that moves, lags in a vector and statistics of other rows have other Jacobians, or none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

import pyro
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.arguments import fill_all
from bayes_mpt.program.other_latents import Point, other_points
from bayes_mpt.program.program import Model, ModelError, Shift
from bayes_mpt.program.run import FAILURES, first_run, run, values_of
from bayes_mpt.program.sites import node_of, observed_nodes, sub_samples
from bayes_mpt.program.store import moved_parameters

__all__ = ["find_shifts"]

STEPS = (1.0, 10.0, 0.1, 100.0, 1.0, 10.0, 1000.0, 1.0)  # of the cells, in their spread
MIN_PAIRS = 2
MAX_SITES = 512  # of one number, whose slopes in all cells are looked at
MAX_COLUMNS = 256  # of an argument whose columns are not all observed
TOL = {torch.float64: 1e-9, torch.float32: 1e-4}


class _Pair(NamedTuple):
    """A run at other latents and parameters."""

    at: Point
    values: dict[str, Tensor]


@torch.enable_grad()
def find_shifts(model: Model, args: tuple[Any, ...]) -> tuple[Shift, ...]:
    """Of all observed sites whose values move with latents or parameters, in the order of the program.

    Parameters
    ----------
    model : callable
        A Pyro program.
    args : tuple
        What it is called with; tensors have N rows. NaN cells are filled.

    Raises
    ------
    ModelError
        If one of them moves otherwise than by a shift. The site is named.
    """
    args = fill_all(args)
    first, init = first_run(model, args)
    finder = _Finder(model, init, first)
    found = []
    for node in observed_nodes(first):
        name, value = node["name"], node["value"]
        moving = [pair for pair in finder.pairs if not torch.equal(pair.values[name], value)]
        if moving or value.requires_grad or name in finder.holding:
            try:
                found.append(finder.shift_of(name, moving or finder.pairs[:1]))
            except ModelError:
                own = finder.own_cell(name)
                if own is None:
                    raise
                found.append(own)
    _refuse_repeated(found)
    return tuple(found)


def _refuse_repeated(shifts: list[Shift]) -> None:
    """Every cell is observed once."""
    for i, shift in enumerate(shifts):
        cells = [(s.position, s.row_axis is None, c) for s in shifts[: i + 1] for c in s.cells]
        if len(set(cells)) < len(cells):
            _refuse(shift.site, "and one cell of the data stands in several of them")


class _Finder:
    """The runs of one program, and what they are compared with."""

    def __init__(self, model: Model, args: tuple[Any, ...], first: Trace):
        self.model, self.args, self.first = model, args, first
        self.here = Point(values_of(first))
        self.names = tuple(n["name"] for n in observed_nodes(first))
        self.slopes: list[dict[tuple[str, int], Tensor]] = []
        """Of all sites, at three points; looked for where they are asked for."""
        self.holding = self._holding()
        self.pairs = list(self._pairs())
        if len(self.pairs) < MIN_PAIRS:
            _refuse(
                self.names[0],
                "and the program breaks at other latents and parameters, where that could be seen",
            )

    # --------------------------------------------------------------------------------------------------------- runs

    def _holding(self) -> set[str]:
        """Sites whose values are computed from latents, whether these move them here or not."""
        held = {n: v.clone().requires_grad_() for n, v in self.here.latents.items() if v.is_floating_point()}
        with pyro.validation_enabled(False):
            trace = run(self.model, self.args, {**self.here.latents, **held, **sub_samples(self.first)})
        return {name for name in self.names if node_of(trace, name)["value"].requires_grad}

    def _pairs(self) -> Iterator[_Pair]:
        for point in other_points(self.model, self.args, self.first):
            found = self._values(self.args, point)
            if found is not None:
                yield _Pair(point, found)

    def _values(self, args: tuple[Any, ...], at: Point) -> dict[str, Tensor] | None:
        """Observed values of a run; None where the program does not take it."""
        try:
            with torch.no_grad(), pyro.validation_enabled(False), moved_parameters(at.size, at.seed):
                trace = run(self.model, args, {**at.latents, **sub_samples(self.first)})
                # a value may be a view of a parameter
                found = {name: node_of(trace, name)["value"].clone() for name in self.names}
        except FAILURES:
            return None
        here = {name: self.first.nodes[name]["value"].shape for name in self.names}
        return found if all(found[name].shape == here[name] for name in self.names) else None

    def _with(self, position: int, step: Tensor) -> tuple[Any, ...]:
        return (*self.args[:position], self.args[position] + step, *self.args[position + 1 :])

    # -------------------------------------------------------------------------------------------------- what they show

    def shift_of(self, name: str, moving: list[_Pair]) -> Shift:
        """The shift of one site, whose value these pairs move."""
        for position in reversed(range(len(self.args))):
            columns = self._columns(name, position, moving[0])
            if columns is not None:
                cells, factor = self._cells(name, position, columns)
                self._refuse_others(name, position, columns, cells, factor)
                return self._described(name, position, cells, factor)
        _refuse(name, "and not by a shift alone")

    def own_cell(self, name: str) -> Shift | None:
        """The cell x_t of a value of one number x_t - f(earlier cells, z), as residuals of a moving average have it.

        Its slope is the same at all latents and parameters, and no site before moves with it. All slopes together are
        triangular then. That f moves with earlier cells alone is for `bayes_mpt.program.token_graph` to see.
        """
        if self.first.nodes[name]["value"].numel() != 1 or len(self.names) > MAX_SITES:
            return None
        self.slopes = self.slopes or [
            self._slopes(self.args, self.here),
            self._slopes(self.args, self.pairs[0].at),
            self._slopes(tuple(map(_elsewhere, self.args)), self.pairs[1].at),
        ]
        before = self.names[: self.names.index(name)]
        for position in reversed(range(len(self.args))):
            found = [slopes[name, position] for slopes in self.slopes if (name, position) in slopes]
            if len(found) < len(self.slopes):
                continue
            same = found[0] != 0
            for other in found[1:]:
                same = same & ((found[0] - other).abs() <= TOL.get(other.dtype, 1e-4) * found[0].abs())
            for slopes in self.slopes:
                for earlier in before:
                    same = same & (slopes.get((earlier, position), torch.zeros_like(found[0])) == 0)
            if bool(same.any()):
                cell = same.nonzero()[-1, 0]
                shape = self.first.nodes[name]["value"].shape
                return self._described(name, position, cell.reshape(shape), _whole(float(found[0][cell])))
        return None

    @torch.enable_grad()
    def _slopes(self, args: tuple[Any, ...], at: Point) -> dict[tuple[str, int], Tensor]:
        """Slopes of each site's value in the cells of each argument, by site and argument."""
        positions = [
            i
            for i, a in enumerate(args)
            if isinstance(a, Tensor) and a.is_floating_point() and a.ndim and a.numel()
        ]
        own = list(args)
        for i in positions:
            own[i] = own[i].detach().clone().requires_grad_()
        out: dict[tuple[str, int], Tensor] = {}
        with pyro.validation_enabled(False), moved_parameters(at.size, at.seed), suppress(*FAILURES):
            trace = run(self.model, tuple(own), {**at.latents, **sub_samples(self.first)})
            for name in self.names:
                value = node_of(trace, name)["value"]
                if value.requires_grad:
                    cells = [own[i] for i in positions]
                    found = torch.autograd.grad(value.sum(), cells, retain_graph=True, materialize_grads=True)
                    out |= {(name, i): g.flatten() for i, g in zip(positions, found, strict=True)}
        return out

    def _columns(self, name: str, position: int, pair: _Pair) -> Tensor | None:
        """Which cells of a row of this argument move the value by the same at other latents (bool); None for none."""
        arg = self.args[position]
        if not isinstance(arg, Tensor) or not arg.is_floating_point() or not arg.ndim or not arg.numel():
            return None
        every = torch.ones(arg.shape[1:], dtype=torch.bool, device=arg.device)
        if self._adds(name, position, every, pair):
            return every
        if 1 < every.numel() <= MAX_COLUMNS:
            found = torch.zeros_like(every).flatten()
            for column in range(every.numel()):
                one = torch.zeros_like(found)
                one[column] = True
                found[column] = self._adds(name, position, one.reshape(every.shape), pair)
            if bool(found.any()):
                return found.reshape(every.shape)
        return None

    def _adds(self, name: str, position: int, columns: Tensor, pair: _Pair) -> bool:
        """Whether these columns move the value, and by the same at other latents and parameters."""
        step = columns * _unit(self.args[position])
        args = self._with(position, step.expand_as(self.args[position]))
        here, there = self._values(args, self.here), self._values(args, pair.at)
        if here is None or there is None:
            return False
        before = self.first.nodes[name]["value"].detach()
        moved, other = here[name] - before, there[name] - pair.values[name]
        size = here[name].abs() + before.abs() + there[name].abs() + pair.values[name].abs()
        return bool((moved != 0).any()) and _near(moved, other, size)

    def _cells(self, name: str, position: int, columns: Tensor) -> tuple[Tensor, float]:
        """Which cell of the argument, in reading order, each number of the value is, and its factor.

        Two steps of each cell, 1 and 1 + (its number) / (their number), times a unit: their ratio gives it away.
        """
        arg, value = self.args[position], self.first.nodes[name]["value"].detach()
        number = torch.arange(arg.numel(), dtype=torch.float64, device=arg.device).reshape(arg.shape)
        code = (1 + number / arg.numel()).to(arg)
        unit = columns * _unit(arg)
        found = [
            self._values(self._with(position, unit * c), self.here) for c in (torch.ones_like(code), code)
        ]
        if any(f is None for f in found):
            _refuse(name, "and the program breaks where its data are moved to find out how")
        one, coded = (f[name] - value for f in found if f is not None)
        cells = ((coded / one - 1) * arg.numel()).round()
        fine = torch.isfinite(cells) & (cells >= 0) & (cells < arg.numel())
        if not bool(fine.all()):
            data = bool(((one != 0) | (coded != 0)).all())
            _refuse(name, _SEVERAL if data else "and not all of them are data")
        cells = cells.long()
        step = unit.expand_as(arg).flatten()[cells]
        factors = one / step
        factor = float(factors.flatten()[0])
        size = (one.abs() + 2 * value.abs()) / step.abs()
        if not _near(factors, torch.full_like(factors, factor), size):
            _refuse(name, _SEVERAL)
        return cells, _whole(factor)

    def _refuse_others(self, name: str, position: int, columns: Tensor, cells: Tensor, factor: float) -> None:
        """The value must be these cells times the factor and the same whatever they are, at all pairs."""
        arg, first = self.args[position], self.first.nodes[name]["value"].detach()
        generator = torch.Generator().manual_seed(0)
        for k, pair in enumerate((_Pair(self.here, {name: first}), *self.pairs)):
            random = 1 + torch.rand(arg.shape, generator=generator, dtype=torch.float64).to(arg)
            step = columns * _unit(arg) * random * STEPS[k % len(STEPS)] * (1 - 2 * (k % 2))
            found = None
            for shrink in (1.0, 0.1, -0.1):  # far out a program may break
                found = self._values(self._with(position, step * shrink), pair.at)
                if found is not None:
                    step = step * shrink
                    break
            if found is None:
                continue
            moved, want = found[name] - pair.values[name], factor * step.flatten()[cells]
            size = (
                found[name].abs()
                + pair.values[name].abs()
                + (factor * arg.flatten()[cells]).abs()
                + want.abs()
            )
            if not _near(moved, want, size):
                _refuse(name, "and not by a shift alone")

    def _described(self, name: str, position: int, cells: Tensor, factor: float) -> Shift:
        """With the axis of its rows, if the value has the rows of the argument along one."""
        node, arg = self.first.nodes[name], self.args[position]
        shape, n_rows = tuple(cells.shape), len(arg)
        width = arg.numel() // n_rows
        n_batch = cells.ndim - node["fn"].event_dim
        frames = {
            n_batch + f.dim: f for f in node["cond_indep_stack"] if f.vectorized and n_batch + f.dim >= 0
        }
        axes = sorted(range(cells.ndim), key=lambda axis: axis not in frames)
        for axis in axes:
            frame = frames.get(axis)
            rows = None if frame is None else sub_samples(self.first).get(frame.name)
            rows = torch.arange(n_rows) if rows is None else rows
            by_row = cells.movedim(axis, 0).reshape(shape[axis], -1)
            if len(rows) == len(by_row) and torch.equal(
                by_row, rows.to(cells)[:, None] * width + by_row[:1] % width
            ):
                columns = tuple((by_row[0] % width).tolist())
                plate = None if frame is None else frame.name
                return Shift(name, position, columns, shape, axis, plate, arg.ndim, factor)
        return Shift(name, position, tuple(cells.flatten().tolist()), shape, None, None, arg.ndim, factor)


_SEVERAL = "and a number of them moves with several cells of the data (lags, a statistic of rows) or by another factor"


def _unit(arg: Tensor) -> Tensor:
    """What a cell of each column is moved by: its spread and size."""
    size = arg.abs().mean(0) + arg.std(0, correction=0)
    return torch.where(size > 0, size, torch.ones_like(size))


def _elsewhere(arg: Any) -> Any:
    """Other values for the cells of an argument."""
    if not isinstance(arg, Tensor) or not arg.is_floating_point() or not arg.ndim:
        return arg
    generator = torch.Generator().manual_seed(1)
    return arg + _unit(arg) * torch.rand(arg.shape, generator=generator, dtype=torch.float64).to(arg)


def _whole(factor: float) -> float:
    """That of x - f exactly, up to rounding."""
    nearest = round(factor)
    return float(nearest) if nearest and abs(factor - nearest) <= 1e-6 * abs(factor) else factor


def _near(a: Tensor, b: Tensor, size: Tensor) -> bool:
    """Whether two differences of numbers of this size are the same, up to rounding."""
    near = (a - b).abs() <= TOL.get(a.dtype, 1e-4) * size
    return bool((near & torch.isfinite(a) & torch.isfinite(b)).all())


def _refuse(name: str, how: str) -> NoReturn:
    raise ModelError(
        f"observed values of site {name!r} are computed from latents or parameters, {how}: their density is not that "
        "of the data, which has a Jacobian besides; only a shift of cells has none, obs=x - mu. Observe the data, "
        f"obs=x, and put the rest into the distribution: of obs=(x - m) / s under dist.Normal(0, 1), write "
        f"pyro.sample({name!r}, dist.Normal(m, s), obs=x). What needs no latents, such as x - x.mean(0), compute "
        "outside the program"
    )
