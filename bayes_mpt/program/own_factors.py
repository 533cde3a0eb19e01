"""Log-densities that a program writes itself, by `pyro.factor`: of which cells, and whether they add up to one.

A factor that moves with cells of its own row, and of no other, is believed to be their log-density given the latents
and all else: one token of the row. Which cells these are is found by evaluation, column by column. Of one cell or two,
and of one that another column says to be cut off, sums over whole numbers and integrals are computed
(`factor_checks`): where they are not one it is refused. Where more cells, or ties, stand in the way, it is said that
nothing was checked.

Factors complete an observed site of the same rows where they are 0 in all rows that its mask shows (the mass of what is
cut off, beside the density of the rest), or move with no cell at all (the constant of a density between bounds). All of
them are one law of the row's cells then, and one token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.arguments import changes, fill_all, same_cells
from bayes_mpt.program.densities import CellDensity
from bayes_mpt.program.factor_checks import FactorSums, Point
from bayes_mpt.program.factor_laws import Cells, Column, frames_of, log_factor_of, log_law, log_part
from bayes_mpt.program.program import Model, ModelError, list_names
from bayes_mpt.program.run import FAILURES, run
from bayes_mpt.program.sites import (
    factor_nodes,
    latent_nodes,
    observed_nodes,
    own_masks,
    own_shown,
)
from bayes_mpt.program.store import OwnStore, moved_parameters, own_random_state

__all__ = ["Cells", "FactorTokens", "find_cells"]

MOVED = (0.05, 0.2, 0.1, 0.4, 0.8)  # of the parameters, at each draw of the latents


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
            self.known[last] = self.known.get(last, torch.zeros(())) + log_part(msg)
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
        law = log_factor_of(msg) if not cells.parts else self.known.pop(name) + log_part(msg)
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


class _Search:
    """The runs that show what factors move with."""

    def __init__(self, model: Model, args: tuple[Any, ...]):
        self.model, self.args = model, args
        self.points: list[Point] = []
        for k, size in enumerate(MOVED):
            with own_random_state(k), moved_parameters(size, k), suppress(*(FAILURES if k > 1 else ())):
                trace = run(model, args)
                self.points.append(Point(trace, {n["name"]: n["value"] for n in latent_nodes(trace)}, k))
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
            out[parts[-1]] = FactorSums(self).checked(parts, columns)._replace(parts=parts[:-1])
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
        laws = self.columns_of({n: (n,) for n in self.names}, log_law)
        order = list(first.nodes)
        found: list[tuple[str, ...]] = []
        for site in self.others:
            node = first.nodes[site]
            if node["fn"].event_dim:
                continue
            more = [
                n
                for n in alone
                if frames_of(first.nodes[n]) == frames_of(node)
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
        frames = frames_of(first.nodes[site])
        return len(frames) == 1 and sum(frames_of(first.nodes[n]) == frames for n in self.others) == 1

    def _fills(self, name: str, site: str) -> bool:
        """Whether a factor is 0 in all rows in which the mask of a site shows it, and not in all others."""
        hidden = False
        for trace in (*(point.trace for point in self.points), *self.changed):
            node = trace.nodes[site]
            if not own_masks(node, 0):
                return False
            shown, factor = own_shown(node), log_part(trace.nodes[name])
            if factor.shape != shown.shape or bool((factor[shown] != 0).any()):
                return False
            hidden = hidden or bool((factor != 0).any())
        return hidden

    def _columns(self, parts: tuple[str, ...]) -> list[Column]:
        """Argument and column of the cells that a law moves with, all of its own row."""
        trace, name = self.points[0].trace, self.factor_of(parts)
        frames = frames_of(trace.nodes[name])
        columns = sorted(self.columns_of({name: parts}, log_law)[name])
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
        if len(frames) != 1 or frames[0][1] != n_rows or log_law(trace, parts).numel() != n_rows:
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
                    t.reshape(-1)[keep] for t in (log_law(self.points[0].trace, parts), log_law(ran, parts))
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

    def _run(self, position: int, arg: Tensor, point: Point) -> Trace | None:
        return self.at((*self.args[:position], arg, *self.args[position + 1 :]), point.latents, point.k)

    def at(self, args: tuple[Any, ...], latents: dict[str, Tensor], k: int) -> Trace | None:
        """A run at some latents and the k-th parameters; None where the program does not take them."""
        with suppress(*FAILURES), moved_parameters(MOVED[k], k):
            return run(self.model, args, latents)
        return None
