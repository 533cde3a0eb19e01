"""Log-densities that a program writes itself, by `pyro.factor`: of which cells, and whether they add up to one.

A factor that moves with cells of its own row, and of no other, is believed to be their log-density given the latents
and all else: one token of the row. Which cells these are is found by evaluation, column by column. Of a single cell the
sum over whole numbers, or the integral, is computed at three rows and draws of the latents; where it is not one the
factor is refused. Where several cells, or ties, stand in the way, it is said that nothing was checked.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.arguments import changes, fill_all, same_cells
from bayes_mpt.program.densities import CellDensity
from bayes_mpt.program.devices import own_random_state
from bayes_mpt.program.program import Model, ModelError, list_names
from bayes_mpt.program.run import FAILURES, run
from bayes_mpt.program.sites import factor_nodes, latent_nodes, observed_nodes, plate_axis
from bayes_mpt.program.store import OwnStore, moved_parameters

__all__ = ["Cells", "FactorTokens", "find_cells"]

N_POINTS = 3  # rows and draws of latents at which a density is summed or integrated
N_GRID = 4001
MAX_SINGLE = 8  # columns that are tried
FAR = 1000  # whole numbers beyond those of the data that a sum takes
NEAR_ONE = 1e-3
MOVED = 0.05  # of the parameters


Column = tuple[int, int]
"""Position of an argument, and a column of it."""


class Cells(NamedTuple):
    """The cells of a row of which a factor is the log-density."""

    own: tuple[Column, ...]
    given: tuple[Column, ...]
    """Others that it moves with."""
    checked: bool
    """Whether the density was seen to add up to one."""

    def of(self, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Its own cells, (N,) of one column, else (N, columns); and a number (N,) that moves with each other cell."""
        own = _stacked(args, self.own)
        weight = torch.arange(1.0, len(self.given) + 1).sqrt()
        given = _stacked(args, self.given) @ weight.to(own) if self.given else torch.zeros_like(own[:, 0])
        return (own[:, 0] if len(self.own) == 1 else own), given


def _stacked(args: tuple[Any, ...], columns: tuple[Column, ...]) -> Tensor:
    parts = [args[position].reshape(len(args[position]), -1)[:, column] for position, column in columns]
    return torch.stack([p.to(torch.promote_types(p.dtype, torch.get_default_dtype())) for p in parts], -1)


class FactorTokens(poutine.messenger.Messenger):
    """Let factors of a program be observed sites, with these cells as values."""

    def __init__(self, cells: dict[str, Cells], args: tuple[Any, ...]):
        super().__init__()
        self.cells, self.args = cells, args

    def _pyro_sample(self, msg: Any) -> None:
        cells = self.cells.get(msg["name"])
        if cells is None or not isinstance(msg["fn"], dist.Unit):
            return
        value, given = cells.of(self.args)
        frames = [f for f in msg["cond_indep_stack"] if f.vectorized]
        shape = [1] * max(-f.dim for f in frames)
        shape[frames[0].dim] = len(value)
        msg["fn"] = CellDensity(msg["fn"].log_factor, given.reshape(shape), len(cells.own))
        msg["value"] = value.reshape(*shape, *value.shape[1:])


def find_cells(model: Model, args: tuple[Any, ...]) -> dict[str, Cells]:
    """The cells of every factor of a program.

    Parameters
    ----------
    model : callable
        A Pyro program.
    args : tuple
        What it is called with.

    Raises
    ------
    ModelError
        If a factor moves with no cell of its row, with cells of other rows, or with cells that another site scores; if
        it does not add up to one where that was computed. The site is named.
    """
    args = fill_all(args)
    with OwnStore(), torch.no_grad(), pyro.validation_enabled(False):
        run(model, args)  # makes the parameters: one that is zero hides what it multiplies
        with moved_parameters(MOVED):
            return _Search(model, args).cells()


class _Search:
    """The runs that show what factors move with."""

    def __init__(self, model: Model, args: tuple[Any, ...]):
        self.model, self.args = model, args
        self.points = []
        for seed in range(N_POINTS):
            with own_random_state(seed):
                trace = run(model, args)
            self.points.append((trace, {n["name"]: n["value"] for n in latent_nodes(trace)}))
        self.names = [n["name"] for n in factor_nodes(self.points[0][0])]
        self.others = [n["name"] for n in observed_nodes(self.points[0][0], factors_too=True, none_too=True)]

    def cells(self) -> dict[str, Cells]:
        """Of all factors."""
        found = {name: self._columns(name) for name in self.names}
        scored = self._columns_of(self.others, lambda trace, name: trace.nodes[name]["value"])
        out: dict[str, Cells] = {}
        for name, columns in found.items():
            out[name] = self._checked(name, columns)
        for name, cells in out.items():
            for column in cells.own:
                also = [*(n for n in self.others if column in scored[n])]
                also += [n for n in out if n != name and column in out[n].own]
                if also:
                    raise ModelError(
                        f"cells of column {column[1]} are read by pyro.factor {name!r} and scored by site {also[0]!r} "
                        "too, so that they would count twice: leave one of them out"
                    )
        return out

    def _columns(self, name: str) -> list[Column]:
        """Argument and column of the cells that a factor moves with, all of its own row."""
        trace = self.points[0][0]
        frames = [f for f in trace.nodes[name]["cond_indep_stack"] if f.vectorized]
        columns = sorted(self._columns_of([name], _log_factor)[name])
        if not columns:
            latents = list_names(map(repr, self.points[0][1]))
            raise ModelError(
                f"site {name!r} is a pyro.factor that moves with no cell of the data: it tilts the prior of "
                f"{latents or 'the parameters'}, and what is left is no density. Give a latent that prior by its "
                "distribution in pyro.sample; of parameters, use a model's penalty"
            )
        n_rows = len(self.args[0])
        if len(frames) != 1 or frames[0].size != n_rows or _log_factor(trace, name).numel() != n_rows:
            raise ModelError(
                f"site {name!r} is a pyro.factor of cells of the data, which is not one number for each row: write it "
                'inside of pyro.plate("rows", len(x)) alone, the sum over the cells of a row'
            )
        for position, arg in enumerate(self.args):
            if not isinstance(arg, Tensor) or not arg.ndim or len(arg) != n_rows or n_rows < 2:
                continue
            keep = torch.arange(0, n_rows, 2)
            for changed in changes(arg, real=False):
                ran = self._run(position, changed.index_copy(0, keep, arg[keep]), 0)
                if ran is None:
                    continue
                rows = [t.reshape(-1)[keep] for t in (_log_factor(trace, name), _log_factor(ran, name))]
                if not same_cells(*rows):
                    raise ModelError(
                        f"site {name!r} is a pyro.factor that moves in one row with cells of other rows: it is no "
                        "density of its own row's cells. Compute statistics of the data outside of the program"
                    )
        return columns

    def _columns_of(self, names: list[str], what: Any) -> dict[str, set[Column]]:
        """Which columns of which arguments something about sites moves with."""
        moved: dict[str, set[Column]] = {name: set() for name in names}
        for position, arg in enumerate(self.args):
            if not isinstance(arg, Tensor) or not arg.ndim or len(arg) != len(self.args[0]):
                continue
            flat = arg.reshape(len(arg), -1)
            for changed in changes(arg, real=False):
                for column in range(flat.shape[1]):
                    one = flat.clone()
                    one[:, column] = changed.reshape(flat.shape)[:, column]
                    for point in range(2):
                        ran = self._run(position, one.reshape(arg.shape), point)
                        for name in names if ran is not None else ():
                            if not same_cells(what(self.points[point][0], name), what(ran, name)):
                                moved[name].add((position, column))
        return moved

    def _run(self, position: int, arg: Tensor, point: int) -> Trace | None:
        args = (*self.args[:position], arg, *self.args[position + 1 :])
        with suppress(*FAILURES):
            return run(self.model, args, self.points[point][1])
        return None

    # -------------------------------------------------------------------------------------------------- sums to one

    def _checked(self, name: str, columns: list[Column]) -> Cells:
        """A density of one of the columns given the others, if sums or integrals say so; else of all, unchecked.

        Refused where there is only one, and they say that it is none.
        """
        for column in columns[: -MAX_SINGLE - 1 : -1]:  # a response stands behind its covariates
            values = _stacked(self.args, (column,))[:, 0]
            whole = bool((values == values.round()).all())
            if not whole and len(values.unique()) < len(values):
                continue  # ties may have a mass of their own, as where waiting times are censored
            rows = [point * (len(values) - 1) // (N_POINTS - 1) for point in range(N_POINTS)]
            totals = [self._totals(name, column, values, row, i, whole) for i, row in enumerate(rows)]
            if any(t is None for t in totals):
                continue
            best = min(zip(*totals, strict=True), key=lambda each: max(abs(t - 1) for t in each))
            if max(abs(t - 1) for t in best) < NEAR_ONE:
                return Cells((column,), tuple(c for c in columns if c != column), True)
            if len(columns) == 1:
                raise ModelError(
                    f"pyro.factor {name!r} is no log-density of column {column[1]}: it adds up to "
                    f"{', '.join(f'{t:.4g}' for t in best)} and not to 1, at {N_POINTS} rows and draws of the latents. "
                    "Add its constant, such as -log(2 pi) / 2, and let it be -inf where the value is impossible"
                )
        return Cells(tuple(columns), (), False)

    def _totals(
        self, name: str, cell: Column, column: Tensor, row: int, point: int, whole: bool
    ) -> list[float] | None:
        """Its sum over whole numbers, or integrals over the domains that the data allow; None where that fails."""
        low, high = float(column.min()), float(column.max())
        if whole:
            grids = [(torch.arange(low - FAR, high + FAR + 1), torch.ones(()))]
            grids += [(torch.arange(0.0, high + FAR + 1), torch.ones(()))] if low >= 0 else []
        else:
            t = (torch.arange(N_GRID, dtype=torch.float64) + 0.5) / N_GRID
            centre, size = float(column.median()), float(column.std()) + 1e-300
            step = size * math.pi / torch.sin(math.pi * t) ** 2 / N_GRID
            grids = [(centre + size * torch.tan(math.pi * (t - 0.5)), step)]
            grids += [(size * t / (1 - t), size / (1 - t) ** 2 / N_GRID)] if low > 0 else []
            grids += [(t, torch.ones_like(t) / N_GRID)] if low > 0 and high < 1 else []
        out = []
        for grid, weight in grids:
            density = self._density(name, cell, grid.to(column), row, point)
            if density is None:
                return None
            total = float((density * weight.to(density)).sum())
            # every second point tells whether the grid is fine enough
            half = total if whole else 2 * float((density * weight.to(density))[::2].sum())
            out.append(
                total if math.isfinite(total) and abs(total - half) < NEAR_ONE * max(1.0, total) else math.inf
            )
        return None if all(math.isinf(t) for t in out) else out

    def _density(self, name: str, cell: Column, grid: Tensor, row: int, point: int) -> Tensor | None:
        """Of one row with these values in its cell, the rest as it is: as many rows as values."""
        args = []
        for position, arg in enumerate(self.args):
            if not isinstance(arg, Tensor) or not arg.ndim or len(arg) != len(self.args[0]):
                args.append(arg)
                continue
            copies = arg[row : row + 1].expand(len(grid), *arg.shape[1:]).clone()
            if position == cell[0]:
                copies.reshape(len(grid), -1)[:, cell[1]] = grid.to(copies)
            args.append(copies)
        trace, latents = self.points[point]
        plate = next(f.name for f in trace.nodes[name]["cond_indep_stack"] if f.vectorized)
        held = {}
        for site, value in latents.items():
            axis = plate_axis(trace.nodes[site], plate)
            if axis is not None:
                value = value.narrow(axis, row, 1).expand(
                    *value.shape[:axis], len(grid), *value.shape[axis + 1 :]
                )
            held[site] = value
        with suppress(*FAILURES):
            found = _log_factor(run(self.model, tuple(args), held), name).reshape(-1)
            return found.nan_to_num(nan=-math.inf).exp() if len(found) == len(grid) else None
        return None


def _log_factor(trace: Trace, name: str) -> Tensor:
    fn = trace.nodes[name]["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    found: Tensor = fn.log_factor
    return found
