"""Whether a law that a program writes itself is a log-density: of one of the columns it moves with, or of two.

Sums over whole numbers and integrals are computed at several rows and draws of latents and parameters, column by column
(`factor_sums`), then pair by pair (`pair_sums`). Others stay unchecked.
"""

from __future__ import annotations

import math
from contextlib import suppress
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.arguments import spread_rows
from bayes_mpt.program.factor_laws import Cells, Column, frames_of, log_law, stacked
from bayes_mpt.program.factor_sums import Law, Total, adds_up, is_censored
from bayes_mpt.program.pair_sums import PairLaw, is_interval, pair_total
from bayes_mpt.program.program import ModelError
from bayes_mpt.program.run import FAILURES
from bayes_mpt.program.sites import plate_axis

__all__ = ["FactorSums", "Point", "Runs"]

MAX_SINGLE = 8  # columns that are tried
MAX_PAIRED = 4  # columns of which pairs are tried
FAR_FROM_ONE = 0.05  # of double integrals, to which jumps of a law do more harm
MAX_CODES = 4  # that say in which way a row is cut off


class Point(NamedTuple):
    """A run at one draw of the latents and parameters."""

    trace: Trace
    latents: dict[str, Tensor]
    k: int


class Runs(Protocol):
    """Runs of a program at other cells, latents and parameters."""

    args: tuple[Any, ...]
    points: list[Point]

    def at(self, args: tuple[Any, ...], latents: dict[str, Tensor], k: int) -> Trace | None:
        """A run at some latents and the k-th parameters; None where the program does not take them."""

    def factor_of(self, parts: tuple[str, ...]) -> str:
        """The factor by which a law is named."""

    def columns_of(self, asked: dict[str, Any], what: Any) -> dict[str, set[Column]]:
        """Which columns of which arguments something, by its name, moves with."""


class FactorSums:
    """Whether a law adds up to one along a cell."""

    def __init__(self, runs: Runs):
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
        for pair in combinations(columns[-MAX_PAIRED:], 2):
            if self._pair_adds_up(parts, pair, columns):
                return Cells(pair, tuple(c for c in columns if c not in pair), True)
        return Cells(tuple(columns), (), False)

    def _pair_adds_up(
        self, parts: tuple[str, ...], pair: tuple[Column, Column], columns: list[Column]
    ) -> bool:
        """Whether a law is a joint density of two columns, or that of a value between them.

        Refused where there are no others, no ties and no codes, and it adds up to something else.
        """
        laws: list[PairLaw] = [
            partial(self._values_of, parts, pair, k, row) for k, row in enumerate(self._rows())
        ]
        first, second = (self._values(c).double().numpy() for c in pair)
        values = first, second
        if is_interval(laws, *values) or is_interval([_turned(law) for law in laws], second, first):
            return True
        whole = bool((first == first.round()).all()), bool((second == second.round()).all())
        total = pair_total(laws, values, whole)
        if total is not None and total.is_one:
            return True
        ties = any(len(np.unique(v)) < len(v) and not w for v, w in zip(values, whole, strict=True))
        if total is not None and total.error > FAR_FROM_ONE and len(columns) == 2:
            if not ties and not any(map(self._is_code, pair)):
                raise self._no_density(parts, columns, total)
        return False

    def _no_density(self, parts: tuple[str, ...], columns: list[Column], total: Total | None) -> ModelError:
        """What is said of a law that does not add up to one, or of which that is not known."""
        said = "what it adds up to could not be computed"
        if total is not None:
            said = (
                f"it adds up to {', '.join(f'{v:.4g}' for v in total.values)} and not to 1, at {len(total.values)} "
                "rows and draws of latents and parameters"
            )
        name = self.runs.factor_of(parts)
        with_site = f" with site {parts[0]!r}" if len(parts) > 1 else ""
        which = (
            f"columns {columns[0][1]} and {columns[1][1]}"
            if len(columns) == 2
            else f"column {columns[-1][1]}"
        )
        return ModelError(
            f"pyro.factor {name!r}{with_site} is no log-density of {which}: {said}. Add its constant, "
            "such as -log(2 pi) / 2, and let it be -inf where the value is impossible: "
            f"pyro.factor({name!r}, torch.where(possible, log_prob, -math.inf))"
        )

    def _refuse_wrong(self, parts: tuple[str, ...], columns: list[Column], total: Total | None) -> None:
        """A law of one column of which the sum is known, or a site with a constant that has no bounds."""
        name, values = self.runs.factor_of(parts), self._values(columns[-1])
        ties = len(values.unique()) < len(values) and not bool((values == values.round()).all())
        constant = not self.runs.columns_of({name: (name,)}, log_law)[name]
        if (len(columns) > 1 or total is None or ties) and not constant:
            return
        raise self._no_density(parts, columns[-1:], total)

    def _values(self, column: Column) -> Tensor:
        return stacked(self.runs.args, (column,))[:, 0]

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

        def law(values: NDArray[np.float64]) -> NDArray[np.float64] | None:
            cells = {c: torch.as_tensor(values) if v is None else v for c, v in held.items()}
            return self._at(parts, cells, k, row, len(values))

        return law

    def _values_of(
        self,
        parts: tuple[str, ...],
        pair: tuple[Column, Column],
        k: int,
        row: int,
        *values: NDArray[np.float64],
    ) -> NDArray[np.float64] | None:
        """The law at these values of two cells."""
        cells = {column: torch.as_tensor(v) for column, v in zip(pair, values, strict=True)}
        return self._at(parts, cells, k, row, len(values[0]))

    def _at(
        self, parts: tuple[str, ...], cells: dict[Column, Any], k: int, row: int, n: int
    ) -> NDArray[np.float64] | None:
        """The law at so many values of some cells of a row, at the k-th draw."""
        point = self.runs.points[k % len(self.runs.points)]
        args = tuple(self._copies(i, arg, row, n, cells) for i, arg in enumerate(self.runs.args))
        trace = self.runs.at(args, self._latents_of(point, parts, row, n), point.k)
        if trace is None:
            return None
        with suppress(*FAILURES):
            found = log_law(trace, parts).reshape(-1)
            if len(found) == n:
                return np.asarray(found.nan_to_num(nan=-math.inf, neginf=-math.inf).double().numpy())
        return None

    def _copies(self, position: int, arg: Any, row: int, n: int, cells: dict[Column, Any]) -> Any:
        """So many copies of a row of an argument, with these cells."""
        if not isinstance(arg, Tensor) or not arg.ndim or len(arg) != len(self.runs.args[0]):
            return arg
        copies = arg[row : row + 1].expand(n, *arg.shape[1:]).clone()
        for (at, column), value in cells.items():
            if at == position:
                copies.reshape(n, -1)[:, column] = value.to(copies) if isinstance(value, Tensor) else value
        return copies

    def _latents_of(self, point: Point, parts: tuple[str, ...], row: int, n: int) -> dict[str, Tensor]:
        """The latents of a draw, those of the row as often as it is copied."""
        plate = frames_of(point.trace.nodes[parts[-1]])[0][0]
        held = {}
        for site, value in point.latents.items():
            axis = plate_axis(point.trace.nodes[site], plate)
            if axis is not None:
                value = value.narrow(axis, row, 1).expand(*value.shape[:axis], n, *value.shape[axis + 1 :])
            held[site] = value
        return held


def _turned(law: PairLaw) -> PairLaw:
    """A law of two cells, the second first."""
    return lambda a, b: law(b, a)
