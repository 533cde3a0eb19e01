"""Nodes in each row, given latents of the data set."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from bayes_mpt.predictors.nodes.conjugacy import log_prior_of, node_values
from bayes_mpt.predictors.nodes.few_visible import small_sets
from bayes_mpt.predictors.nodes.given import (
    NestedRows,
    PlacedRows,
)
from bayes_mpt.predictors.nodes.nearby import Nearby
from bayes_mpt.predictors.nodes.panels import MAX_NESTED, Integrals, by_panels
from bayes_mpt.predictors.nodes.placing import Placing, reaching
from bayes_mpt.predictors.nodes.row_draws import RowDraws, learned, upright
from bayes_mpt.predictors.nodes.rules import (
    CUT,
    MAX_HERMITE,
    ROW_DRAWS,
    ROW_NODES,
    Detail,
    Rule,
    row_rule,
)
from bayes_mpt.predictors.nodes.weighted import constrained
from bayes_mpt.program.arguments import Args
from bayes_mpt.program.batched import Batched, found_out, vmapped
from bayes_mpt.program.layout import rows_first
from bayes_mpt.program.program import Latent, Model, list_names
from bayes_mpt.program.run import run

if TYPE_CHECKING:
    from bayes_mpt.predictors.nodes.adaptive import AdaptiveNodes

__all__ = ["RowNodes", "SharedPrior"]

CELLS = 2**18  # log-densities of tokens at a time
MIN_DRAWN = 3  # latents of a row, from which far nodes are so many that draws may be fewer


@dataclass(frozen=True)
class SharedPrior:
    """log p of the latents of the data set, at many values of them."""

    model: Model
    latents: tuple[Latent, ...]
    held: dict[str, Tensor]
    """Any values of all other latents."""
    batched: Batched = Batched.VMAP
    """How the program takes several."""

    @classmethod
    def of(
        cls, model: Model, latents: tuple[Latent, ...], rows: RowNodes, filled: tuple[Any, ...]
    ) -> SharedPrior:
        found = cls(model, latents, rows.values)

        def runs(batched: Batched) -> bool:
            found.log_prob(filled, rows.adaptive._held.draws)
            return True

        with torch.no_grad():
            return replace(found, batched=found_out(runs, (Batched.VMAP,)))

    def log_prob(self, filled: tuple[Any, ...], values: dict[str, Tensor]) -> Tensor:
        """At S values (S, ...) of each: (S, 1)."""

        def alone(node: dict[str, Tensor]) -> Tensor:
            trace = run(self.model, filled, {**self.held, **node})
            return log_prior_of(trace, self.latents, filled[0])

        if self.batched is Batched.VMAP:
            return cast(Tensor, vmapped(alone)(values))
        n_nodes = len(next(iter(values.values())))
        return torch.stack([alone(node_values(values, s)) for s in range(n_nodes)])


@dataclass(frozen=True)
class RowNodes:
    """How each row is integrated given latents of the data set."""

    adaptive: AdaptiveNodes
    """Of the program of the rows alone."""
    values: dict[str, Tensor]
    """Any values of the rows' latents."""
    cells: Tensor
    """(N, T): where each row's tokens stand in the one vector of all observations."""
    placing: Placing = Placing()  # noqa: RUF009
    """How nodes stand in each row."""

    @classmethod
    def of(cls, adaptive: AdaptiveNodes, values: dict[str, Tensor]) -> RowNodes:
        parts, start = [], 0
        for site in adaptive.program.sites:
            kept = site.shape[: len(site.shape) - site.n_joint]
            size = math.prod(kept)
            parts.append(rows_first(torch.arange(start, start + size).reshape(kept), site.row_axis))
            start += size
        return cls(adaptive, values, torch.cat(parts, 1))

    @property
    def own(self) -> tuple[str, ...]:
        """The sites that are integrated so."""
        return self.adaptive.program.latent_names

    @property
    def batched(self) -> Batched:
        """How the program takes several nodes."""
        return self.adaptive.batched

    @property
    def n_evaluations(self) -> int:
        """How often a node costs the log-densities of all tokens, at the most."""
        return self.n_nodes * self.adaptive.n_evaluations

    @property
    def inside(self) -> str:
        """How, after what is said of the latents of the data set."""
        return f"; given each of them, rows by themselves: {self.why}"

    @property
    def width(self) -> int:
        """d, numbers of a row."""
        return self.adaptive.space.width

    @property
    def n_nodes(self) -> int:
        """Q, of each row."""
        if self.placing.draws is not None:
            return self.placing.draws.n_points
        return len(self.rule("usual").t) * self.placing.n_modes

    @property
    def why(self) -> str:
        names, width = list_names(self.adaptive.space.names), self.adaptive.space.width
        how = []
        where = "the mode" if self.placing.starts is None else "each mode"
        if self.placing.draws is not None:
            how.append(f"{names} with {self.n_nodes} draws of a shape that is learned of each row")
        elif 0 < width <= MAX_HERMITE and self.placing.far:
            how.append(f"{names} with {self.n_nodes} nodes that reach far, around {where}")
        elif 0 < width <= MAX_HERMITE:
            how.append(
                f"{names} with {ROW_NODES[width]} Gauss-Hermite nodes along each of {width} axes, around {where}"
            )
        elif width:
            how.append(f"{names} with {ROW_DRAWS} points around {where}")
        if self.adaptive.gaussian:
            how.append(f"{list_names(self.adaptive.gaussian)} in closed form")
        if self.adaptive.program.discrete:
            how.append(f"{list_names(self.adaptive.program.discrete)} summed out")
        return "; ".join(how) + ("; node by node" if self.batched is Batched.LOOP else "")

    def given(self, args: Args, held: dict[str, Tensor]) -> NestedRows:
        """The rows at S values (S, ...) of the latents of the data set."""
        panels = partial(self._panels, args) if self.width == 1 else None
        cells = self.cells.to(args.filled[0].device)
        return NestedRows(
            partial(self._place, args), cells, held, panels, fair=self.placing.draws is not None
        )

    def prior_left(
        self, model: Model, latents: tuple[Latent, ...], filled: tuple[Any, ...]
    ) -> SharedPrior | None:
        """The prior of the latents of the data set, which `given` leaves out."""
        return SharedPrior.of(model, latents, self, filled)

    def rule(self, detail: Detail) -> Rule:
        """Points (Q, d) and log-weights (Q,) inside a row."""
        return row_rule(self.width, detail, self.placing.far)

    def placed(self, placing: Placing) -> RowNodes:
        """The same with nodes that stand so."""
        return replace(self, placing=placing)

    def learned(self, args: Args, held: dict[str, Tensor], x: Tensor, visible: Tensor) -> RowNodes:
        """The same with draws of shapes learned at S values (S, ...) of the latents of the data set, where these serve.

        Of rows with one mode each.
        """
        if not MIN_DRAWN <= self.width <= MAX_HERMITE or self.placing.starts is not None:
            return self
        rows, shown = NestedRows.in_rows(x, visible, self.cells.to(x.device))
        rule, n_nodes = row_rule(self.width, "usual", far=True), len(next(iter(held.values())))
        with self.nearby.unmoved():
            modes = upright(self.adaptive.locate(args, rows, shown, Placing(), None, held))
        density = self.adaptive.row_density(args, rows, shown, held)
        assert rule.cut is not None
        modes = reaching(density, modes, n_nodes, rule.cut)
        return self.placed(self.placing._replace(draws=learned(density, modes, n_nodes, rule, shown)))

    def starts(
        self,
        args: Args,
        held: dict[str, Tensor],
        x: Tensor,
        visible: Tensor,
    ) -> Tensor | None:
        """Where climbs to several modes of each row begin, at one value (1, ...) of the latents of the data set."""
        rows, shown = NestedRows.in_rows(x, visible, self.cells.to(x.device))
        return self.adaptive.row_starts(args, rows, shown, held)

    def small_sets(self, n_tokens: int) -> list[Tensor]:
        """Visible sets (N T,) of the one vector, of which each row shows the same few tokens."""
        shown = torch.zeros(n_tokens, dtype=torch.bool)
        cells = self.cells.cpu()
        return [
            shown.index_fill(0, cells[:, seen].flatten(), True)
            for seen in small_sets(cells.shape[1], halves=False)
        ]

    @property
    def nearby(self) -> Nearby:
        """The modes that were found last."""
        return self.adaptive.nearby

    def forget(self) -> None:
        """Look for the next modes from the start, not from the last ones."""
        self.adaptive.forget()

    def _place(
        self,
        args: Args,
        held: dict[str, Tensor],
        detail: Detail,
        x: Tensor,
        visible: Tensor,
    ) -> Iterator[PlacedRows]:
        """Q nodes for each of S nodes of the data set and each row, for what is visible (N, T) of it.

        The modes of all S at once, their nodes by as many as memory will bear.
        """
        at, width = self.adaptive, self.adaptive.space.width
        n_nodes, n_rows = len(next(iter(held.values()))), len(x)
        rule = self.rule(detail)
        if not width:
            u = x.new_zeros(n_nodes, n_rows, 0)
            given, part, _ = at.at(args, u, held)
            yield PlacedRows(given, part[:, None], lambda: u)
            return
        draws = self.placing.draws
        if draws is not None and detail in ("rough", "usual") and draws.serves(visible):
            yield from self._drawn(args, held, detail, x, visible, draws)
            return
        modes = at.locate(args, x, visible, self.placing, rule.cut, held)
        for some in self._parts(n_nodes, x.numel() * len(rule.t) * len(modes.mode)):
            u, log_w = modes.of_rows(slice(some.start * n_rows, some.stop * n_rows)).nodes(rule)
            u = u.flatten(0, 1).unflatten(1, (-1, n_rows)).movedim(1, 0)  # (s, J Q, N, d)
            log_w = log_w.flatten(0, 1).unflatten(1, (-1, n_rows)).movedim(1, 0)
            # beside a scale of 1e150 a climb leaves the floating-point numbers: that integral is no number
            lost = ~u.isfinite().all(-1)
            u = torch.where(lost[..., None], 0.0, u)
            each = {name: v[some].repeat_interleave(u.shape[1], 0) for name, v in held.items()}
            given, part, _ = at.at(args, u.flatten(0, 1), each)
            log_weight = torch.where(lost, math.nan, part.unflatten(0, u.shape[:2]) + log_w)
            latents = partial(constrained, at.space, u.flatten(0, 1))
            yield PlacedRows(given, log_weight, latents, len(modes.mode))

    def _drawn(
        self,
        args: Args,
        held: dict[str, Tensor],
        detail: Detail,
        x: Tensor,
        visible: Tensor,
        draws: RowDraws,
    ) -> Iterator[PlacedRows]:
        """`_place` with draws of the shapes of rows: rough ones are alike at all S."""
        at, n_nodes = self.adaptive, len(next(iter(held.values())))
        modes = upright(at.locate(args, x, visible, Placing(), None, held))
        whole, log_weight = draws.nodes(modes, n_nodes, alike=detail == "rough")
        lost = ~whole.isfinite().all(-1)
        whole = torch.where(lost[..., None], 0.0, whole)
        for some in self._parts(n_nodes, x.numel() * whole.shape[1]):
            u = whole[some].flatten(0, 1)
            each = {name: v[some].repeat_interleave(whole.shape[1], 0) for name, v in held.items()}
            given, part, _ = at.at(args, u, each)
            weight = torch.where(
                lost[some], math.nan, part.unflatten(0, (-1, whole.shape[1])) + log_weight[some]
            )
            yield PlacedRows(given, weight, partial(constrained, at.space, u))

    def _parts(self, n_nodes: int, n_cells: int) -> Iterator[slice]:
        """As many of S nodes of the data set at a time as memory will bear, where each has so many cells."""
        step = max(1, CELLS // (n_cells * self.adaptive.n_evaluations))
        return (slice(i, min(i + step, n_nodes)) for i in range(0, n_nodes, step))

    def _panels(self, args: Args, held: dict[str, Tensor], x: Tensor, visible: Tensor) -> Integrals:
        """The integral of each row at each of S nodes of the data set: of S N."""
        fixed = {name: v.detach() for name, v in held.items()}
        n_nodes = len(next(iter(fixed.values())))
        modes = self.adaptive.locate(args, x, visible, self.placing, CUT["panels"], fixed)
        density = self.adaptive.row_density(args, x, visible, fixed)
        return by_panels(density, modes, n_nodes, x.shape[1], MAX_NESTED)
