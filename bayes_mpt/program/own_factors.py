"""Log-densities that a program writes itself, by `pyro.factor`: of which cells, and whether they add up to one.

A factor that moves with cells of its own row, and of no other, is believed to be their log-density given the latents
and all else: one token of the row. Which cells these are is found by evaluation, column by column. Of a single cell,
and of one that another column says to be cut off, sums over whole numbers and integrals are computed at several rows
and draws of latents and parameters (`factor_sums`); a factor of a single cell that does not add up to one is refused.
Where more cells, or ties, stand in the way, it is said that nothing was checked.

Factors complete an observed site of the same rows where they are 0 in all rows that its mask shows (the mass of what is
cut off, beside the density of the rest), or move with no cell at all (the constant of a density between bounds). All of
them are one law of the row's cells then, and one token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.arguments import changes, fill_all, same_cells, spread_rows
from bayes_mpt.program.densities import CellDensity, log_density
from bayes_mpt.program.devices import own_random_state
from bayes_mpt.program.factor_sums import Law, Total, adds_up, is_censored
from bayes_mpt.program.program import Model, ModelError, list_names
from bayes_mpt.program.run import FAILURES, run
from bayes_mpt.program.sites import (
    base,
    factor_nodes,
    latent_nodes,
    observed_nodes,
    own_masks,
    own_shown,
    plate_axis,
)
from bayes_mpt.program.store import OwnStore, moved_parameters

__all__ = ["Cells", "FactorTokens", "find_cells"]

MOVED = (0.05, 0.2, 0.1, 0.4, 0.8)  # of the parameters, at each draw of the latents
MAX_SINGLE = 8  # columns that are tried
MAX_CODES = 4  # that say in which way a row is cut off


Column = tuple[int, int]
"""Position of an argument, and a column of it."""


class Cells(NamedTuple):
    """The cells of a row of which a factor is the log-density."""

    own: tuple[Column, ...]
    given: tuple[Column, ...]
    """Others that it moves with."""
    checked: bool
    """Whether the density was seen to add up to one."""
    parts: tuple[str, ...] = ()
    """Other sites, before it, that are parts of the density."""
    bounds: tuple[float, float] = (-math.inf, math.inf)
    """Between which it adds up to one, where the program does not say so itself."""

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
    """Let factors of a program be observed sites, with these cells as values.

    The parts of a law that stand before its last one are no sites of their own.
    """

    def __init__(self, cells: dict[str, Cells], args: tuple[Any, ...]):
        super().__init__()
        self.cells, self.args = cells, args
        self.part_of = {part: name for name, found in cells.items() for part in found.parts}
        self.known: dict[str, Tensor] = {}
        """What the parts so far add up to, by the last part."""

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.part_of:
            last = self.part_of[name]
            self.known[last] = self.known.get(last, torch.zeros(())) + _log_part(msg)
            value = torch.as_tensor(msg["value"])
            n_event = value.ndim - len(msg["fn"].batch_shape)
            msg["fn"] = dist.Delta(value, event_dim=max(0, n_event)).mask(False)
            msg["infer"] = {**(msg["infer"] or {}), "_deterministic": True}
            return
        cells = self.cells.get(name)
        if cells is None:
            return
        value, given = cells.of(self.args)
        frames = [f for f in msg["cond_indep_stack"] if f.vectorized]
        shape = [1] * max(-f.dim for f in frames)
        shape[frames[0].dim] = len(value)
        law = _log_factor(msg) if not cells.parts else self.known.pop(name) + _log_part(msg)
        if cells.parts:
            msg["mask"] = None
        msg["fn"] = CellDensity(law, given.reshape(shape), len(cells.own))
        msg["value"] = value.reshape(*shape, *value.shape[1:])


def find_cells(model: Model, args: tuple[Any, ...]) -> dict[str, Cells]:
    """The cells of every factor of a program, by the last site of their law.

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
        return _Search(model, args).cells()


class _Point(NamedTuple):
    """A run at one draw of the latents and parameters."""

    trace: Trace
    latents: dict[str, Tensor]
    k: int


class _Search:
    """The runs that show what factors move with."""

    def __init__(self, model: Model, args: tuple[Any, ...]):
        self.model, self.args = model, args
        self.points: list[_Point] = []
        for k, size in enumerate(MOVED):
            with own_random_state(k), moved_parameters(size, k), suppress(*(FAILURES if k > 1 else ())):
                trace = run(model, args)
                self.points.append(_Point(trace, {n["name"]: n["value"] for n in latent_nodes(trace)}, k))
        first = self.points[0].trace
        self.changed = [t for t in self._changed_runs() if t is not None]
        self.names = [n["name"] for n in factor_nodes(first)]
        self.others = [n["name"] for n in observed_nodes(first, factors_too=True, none_too=True)]

    def cells(self) -> dict[str, Cells]:
        """Of all factors."""
        laws = self._laws()
        found = {parts: self._columns(parts) for parts in laws}
        scored = self.columns_of({n: n for n in self.others}, lambda trace, name: trace.nodes[name]["value"])
        out: dict[str, Cells] = {}
        for parts, columns in found.items():
            out[parts[-1]] = _Sums(self).checked(parts, columns)._replace(parts=parts[:-1])
        for name, cells in out.items():
            for column in cells.own:
                also = [n for n in self.others if column in scored[n] and n not in (name, *cells.parts)]
                also += [n for n in out if n != name and column in out[n].own]
                if also:
                    raise ModelError(
                        f"cells of column {column[1]} are read by pyro.factor {name!r} and scored by site {also[0]!r} "
                        "too, so that they would count twice: leave one of them out"
                    )
        return out

    # ----------------------------------------------------------------------------------------- what makes up a law

    def _laws(self) -> list[tuple[str, ...]]:
        """The factors, each with the site that it completes and the other factors of that; in the program's order."""
        first = self.points[0].trace
        alone = {name: (name,) for name in self.names}
        laws = self.columns_of({n: (n,) for n in self.names}, _log_law)
        order = list(first.nodes)
        found: list[tuple[str, ...]] = []
        for site in self.others:
            node = first.nodes[site]
            if node["fn"].event_dim:
                continue
            more = [
                n
                for n in alone
                if _frames(first.nodes[n]) == _frames(node)
                and (self._fills(n, site) or (not laws[n] and self._only_site(site)))
            ]
            if more:
                found.append(tuple(sorted([site, *more], key=order.index)))
                alone = {n: parts for n, parts in alone.items() if n not in more}
        return [*found, *alone.values()]

    def _changed_runs(self) -> Iterator[Trace | None]:
        """Runs on other data, which may be cut off where these are not."""
        for position, arg in enumerate(self.args):
            if isinstance(arg, Tensor) and arg.ndim and len(arg) == len(self.args[0]):
                for changed in changes(arg, real=False):
                    yield self._run(position, changed, self.points[0])

    def _only_site(self, site: str) -> bool:
        """Whether no other observed site stands in its plate."""
        first = self.points[0].trace
        frames = _frames(first.nodes[site])
        return len(frames) == 1 and sum(_frames(first.nodes[n]) == frames for n in self.others) == 1

    def _fills(self, name: str, site: str) -> bool:
        """Whether a factor is 0 in all rows in which the mask of a site shows it, and not in all others."""
        hidden = False
        for trace in (*(point.trace for point in self.points), *self.changed):
            node = trace.nodes[site]
            if not own_masks(node, 0):
                return False
            shown, factor = own_shown(node), _log_part(trace.nodes[name])
            if factor.shape != shown.shape or bool((factor[shown] != 0).any()):
                return False
            hidden = hidden or bool((factor != 0).any())
        return hidden

    def _columns(self, parts: tuple[str, ...]) -> list[Column]:
        """Argument and column of the cells that a law moves with, all of its own row."""
        trace, name = self.points[0].trace, self.factor_of(parts)
        frames = _frames(trace.nodes[name])
        columns = sorted(self.columns_of({name: parts}, _log_law)[name])
        if not columns:
            latents = list_names(map(repr, self.points[0].latents))
            raise ModelError(
                f"site {name!r} is a pyro.factor that moves with no cell of the data: it tilts the prior of "
                f"{latents or 'the parameters'}, and what is left is no density. Give a latent that prior by its "
                "distribution in pyro.sample; of parameters, use a model's penalty. If it is the log-probability of "
                "bounds, or of rows that are cut off, write it inside of the rows plate as one number a row, with the "
                f"density: pyro.factor({name!r}, dist.Normal(mu, sigma).log_prob(y) - log_prob_of_bounds), or "
                f"pyro.factor({name!r}, torch.where(cut_off, log_prob_beyond, dist.Normal(mu, sigma).log_prob(y)))"
            )
        n_rows = len(self.args[0])
        if len(frames) != 1 or frames[0][1] != n_rows or _log_law(trace, parts).numel() != n_rows:
            raise ModelError(
                f"site {name!r} is a pyro.factor of cells of the data, which is not one number for each row: write it "
                'inside of pyro.plate("rows", len(x)) alone, the sum over the cells of a row'
            )
        self._refuse_other_rows(name, parts)
        return columns

    def factor_of(self, parts: tuple[str, ...]) -> str:
        """The factor by which a law is named."""
        return next(n for n in reversed(parts) if n in self.names)

    def _refuse_other_rows(self, name: str, parts: tuple[str, ...]) -> None:
        n_rows = len(self.args[0])
        for position, arg in enumerate(self.args):
            if not isinstance(arg, Tensor) or not arg.ndim or len(arg) != n_rows or n_rows < 2:
                continue
            keep = torch.arange(0, n_rows, 2)
            for changed in changes(arg, real=False):
                ran = self._run(position, changed.index_copy(0, keep, arg[keep]), self.points[0])
                if ran is None:
                    continue
                rows = [
                    t.reshape(-1)[keep] for t in (_log_law(self.points[0].trace, parts), _log_law(ran, parts))
                ]
                if not same_cells(*rows):
                    raise ModelError(
                        f"site {name!r} is a pyro.factor that moves in one row with cells of other rows: it is no "
                        "density of its own row's cells. Compute statistics of the data outside of the program"
                    )

    def columns_of(self, asked: dict[str, Any], what: Any) -> dict[str, set[Column]]:
        """Which columns of which arguments something, by its name, moves with."""
        moved: dict[str, set[Column]] = {name: set() for name in asked}
        for position, arg in enumerate(self.args):
            if not isinstance(arg, Tensor) or not arg.ndim or len(arg) != len(self.args[0]):
                continue
            flat = arg.reshape(len(arg), -1)
            for changed in changes(arg, real=False):
                for column in range(flat.shape[1]):
                    one = flat.clone()
                    one[:, column] = changed.reshape(flat.shape)[:, column]
                    for point in self.points[:2]:
                        ran = self._run(position, one.reshape(arg.shape), point)
                        for name, of in asked.items() if ran is not None else ():
                            if not same_cells(what(point.trace, of), what(ran, of)):
                                moved[name].add((position, column))
        return moved

    def _run(self, position: int, arg: Tensor, point: _Point) -> Trace | None:
        return self.at((*self.args[:position], arg, *self.args[position + 1 :]), point.latents, point.k)

    def at(self, args: tuple[Any, ...], latents: dict[str, Tensor], k: int) -> Trace | None:
        """A run at some latents and the k-th parameters; None where the program does not take them."""
        with suppress(*FAILURES), moved_parameters(MOVED[k], k):
            return run(self.model, args, latents)
        return None


class _Sums:
    """Whether a law adds up to one along a cell."""

    def __init__(self, runs: _Search):
        self.runs = runs

    def checked(self, parts: tuple[str, ...], columns: list[Column]) -> Cells:
        """A density of one of the columns given the others, if sums or integrals say so; else of all, unchecked.

        Refused where there is only one, or a site with a constant, and they say that it is none.
        """
        total = None
        for column in columns[: -MAX_SINGLE - 1 : -1]:  # a response stands behind its covariates
            values = self._values(column)
            whole = bool((values == values.round()).all())
            codes = self._codes(columns, column)
            for code in codes:
                if self._is_censored(parts, column, code, whole):
                    own = tuple(c for c in columns if c in (column, code))
                    return Cells(own, tuple(c for c in columns if c not in own), True)
            rows = self._rows(codes)
            laws = [self._law(parts, {column: None}, k, row) for k, row in enumerate(rows)]
            total = adds_up(laws, values.double().numpy(), whole)
            # of a row that is cut off there may be no integral
            every = total is not None and (not codes or len(total.values) == len(laws))
            if total is not None and total.is_one and every:
                given = tuple(c for c in columns if c != column)
                return Cells((column,), given, True, bounds=(total.low, total.high))
        self._refuse_wrong(parts, columns, total)
        return Cells(tuple(columns), (), False)

    def _refuse_wrong(self, parts: tuple[str, ...], columns: list[Column], total: Total | None) -> None:
        """A law of one column of which the sum is known, or a site with a constant that has no bounds."""
        name, values = self.runs.factor_of(parts), self._values(columns[-1])
        ties = len(values.unique()) < len(values) and not bool((values == values.round()).all())
        constant = not self.runs.columns_of({name: (name,)}, _log_law)[name]
        if (len(columns) > 1 or total is None or ties) and not constant:
            return
        said = "what it adds up to could not be computed"
        if total is not None:
            said = (
                f"it adds up to {', '.join(f'{v:.4g}' for v in total.values)} and not to 1, at {len(total.values)} "
                "rows and draws of latents and parameters"
            )
        with_site = f" with site {parts[0]!r}" if len(parts) > 1 else ""
        raise ModelError(
            f"pyro.factor {name!r}{with_site} is no log-density of column {columns[-1][1]}: {said}. Add its constant, "
            "such as -log(2 pi) / 2, and let it be -inf where the value is impossible: "
            f"pyro.factor({name!r}, torch.where(possible, log_prob, -math.inf))"
        )

    def _values(self, column: Column) -> Tensor:
        return _stacked(self.runs.args, (column,))[:, 0]

    def _codes(self, columns: list[Column], but: Column) -> list[Column]:
        """Columns of few whole numbers, which may say that the cell of another is a bound."""
        out = []
        for column in columns:
            if column != but and self._is_code(column) and len(self._values(column).unique()) > 1:
                out.append(column)
        return [] if self._is_code(but) else out

    def _is_code(self, column: Column) -> bool:
        found = self._values(column).unique()
        return len(found) <= MAX_CODES and bool((found == found.round()).all())

    def _rows(self, codes: tuple[Column, ...] | list[Column] = ()) -> list[int]:
        """Rows at which laws are looked at, one for each draw or more: with every code, then spread over all."""
        rows = [int((self._values(c) == v).nonzero()[0, 0]) for c in codes for v in self._values(c).unique()]
        more = spread_rows(len(self.runs.args[0]), len(self.runs.points)).tolist()
        rows += [more[k % len(more)] for k in range(max(0, len(self.runs.points) - len(rows)))]
        return rows

    def _is_censored(self, parts: tuple[str, ...], column: Column, code: Column, whole: bool) -> bool:
        codes, values = self._values(code), self._values(column)
        every = [float(c) for c in codes.unique()]
        rows = self._rows()
        laws = {
            c: [self._law(parts, {column: None, code: c}, k, row) for k, row in enumerate(rows)]
            for c in every
        }
        return is_censored(laws, {c: values[codes == c].double().numpy() for c in every}, whole)

    def _law(self, parts: tuple[str, ...], held: dict[Column, float | None], k: int, row: int) -> Law:
        """The law along the cell that is held at None, with others at their number, in one row at one draw."""
        point = self.runs.points[k % len(self.runs.points)]

        def law(values: NDArray[np.float64]) -> NDArray[np.float64] | None:
            cells = {c: torch.as_tensor(values) if v is None else v for c, v in held.items()}
            args = tuple(
                self._copies(i, arg, row, len(values), cells) for i, arg in enumerate(self.runs.args)
            )
            trace = self.runs.at(args, self._latents_of(point, parts, row, len(values)), point.k)
            if trace is None:
                return None
            with suppress(*FAILURES):
                found = _log_law(trace, parts).reshape(-1)
                if len(found) == len(values):
                    return np.asarray(found.nan_to_num(nan=-math.inf, neginf=-math.inf).double().numpy())
            return None

        return law

    def _copies(self, position: int, arg: Any, row: int, n: int, cells: dict[Column, Any]) -> Any:
        """So many copies of a row of an argument, with these cells."""
        if not isinstance(arg, Tensor) or not arg.ndim or len(arg) != len(self.runs.args[0]):
            return arg
        copies = arg[row : row + 1].expand(n, *arg.shape[1:]).clone()
        for (at, column), value in cells.items():
            if at == position:
                copies.reshape(n, -1)[:, column] = value.to(copies) if isinstance(value, Tensor) else value
        return copies

    def _latents_of(self, point: _Point, parts: tuple[str, ...], row: int, n: int) -> dict[str, Tensor]:
        """The latents of a draw, those of the row as often as it is copied."""
        plate = _frames(point.trace.nodes[parts[-1]])[0][0]
        held = {}
        for site, value in point.latents.items():
            axis = plate_axis(point.trace.nodes[site], plate)
            if axis is not None:
                value = value.narrow(axis, row, 1).expand(*value.shape[:axis], n, *value.shape[axis + 1 :])
            held[site] = value
        return held


def _frames(node: Any) -> list[tuple[str, int]]:
    """Names and sizes of the plates around a site."""
    return [(f.name, f.size) for f in node["cond_indep_stack"] if f.vectorized]


def _log_law(trace: Trace, parts: tuple[str, ...]) -> Tensor:
    """What the parts of a law add up to: one number a row."""
    if len(parts) == 1:
        return _log_factor(trace.nodes[parts[0]])
    return torch.stack(torch.broadcast_tensors(*[_log_part(trace.nodes[n]) for n in parts])).sum(0)


def _log_part(node: Any) -> Tensor:
    """What a site adds to a law, 0 where a mask hides it."""
    if hasattr(_innermost(node["fn"]), "log_factor"):
        log_prob = _log_factor(node)
    else:
        value = torch.as_tensor(node["value"]).to(torch.get_default_dtype())
        log_prob = log_density(base(node["fn"]), value)
    for mask, _ in own_masks(node, 0):
        log_prob = torch.where(mask, log_prob, torch.zeros_like(log_prob))
    return log_prob


def _log_factor(node: Any) -> Tensor:
    found: Tensor = _innermost(node["fn"]).log_factor
    return found


def _innermost(fn: Any) -> Any:
    """The distribution that masks and plates stand around, or that transforms make another one of."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn
