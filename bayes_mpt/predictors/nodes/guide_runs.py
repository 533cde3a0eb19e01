"""Runs of a guide: for what it is shown, at several draws at once, with their densities."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.predictors.base import Guide
from bayes_mpt.predictors.nodes.reparameterized import AlongDraws, DrawsAsLeaves
from bayes_mpt.program.layout import rows_axis, sum_by_row
from bayes_mpt.program.program import ModelError, Program, one_vector
from bayes_mpt.program.run import SetLatents, nodes_plate, one_precision
from bayes_mpt.program.sites import is_point, latent_nodes
from bayes_mpt.program.store import own_random_state

__all__ = ["GuideRuns"]


class GuideRuns(NamedTuple):
    """A guide, and the program whose latents it draws."""

    guide: Guide
    takes_visible: bool
    """It is told which tokens it sees."""
    program: Program
    """With the rows and plates of the draws, once they are known (`with_layout`)."""

    def trace(self, filled: tuple[Any, ...], shown: Tensor | None, n: int) -> Trace:
        """A run at n draws for what is ``shown`` (N, T); everything by default."""
        kwargs: dict[str, Any] = {}
        args = filled
        if self.takes_visible:
            first = filled[0]
            if shown is None:
                shown = torch.ones((), dtype=torch.bool, device=first.device).expand(first.shape)
            else:
                if shown.numel() == first.numel() and not self.program.by_row:
                    shown = shown.reshape(first.shape)  # rows that are one vector
                shown = shown.expand(first.shape)
                args = (torch.where(shown, first, 0.0), *filled[1:])
            kwargs["visible"] = shown
        with ExitStack() as stack:
            stack.enter_context(one_precision(filled))
            if n > 1:
                stack.enter_context(nodes_plate(n, self.program.depth))
            return poutine.trace(self.guide).get_trace(*args, **kwargs)

    def log_q(self, guide_trace: Trace, n: int) -> Tensor:
        """Log-densities (n, N) of the draws of a run."""
        parts = [
            sum_by_row(node["fn"].log_prob(node["value"]), rows_axis(node, self.program), n)
            for node in latent_nodes(guide_trace)
        ]
        log_q = sum(parts[1:], parts[0])
        if not math.isfinite(float(log_q.detach().sum())):
            _refuse_infinite(guide_trace)
        return log_q

    def along(
        self, filled: tuple[Any, ...], shown: Tensor | None, n: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """log q (n, N) and the values of n draws, with the doubly reparameterised gradient."""
        drawn = DrawsAsLeaves(self.program, n)
        with drawn:
            trace = self.trace(filled, shown, n)
        points = {node["name"]: node["value"] for node in latent_nodes(trace) if is_point(node)}
        log_q, *values = AlongDraws.apply(drawn, [self.log_q(trace, n), *points.values()], *drawn.raw)
        return log_q, dict(zip((*points, *drawn.names), values, strict=True))

    def moves_by_draws(self, filled: tuple[Any, ...], trace: Trace) -> bool:
        """Whether all that is random is reparameterised, and points (Delta) move with the draws alone."""
        drawn = {n["name"]: n for n in latent_nodes(trace) if not is_point(n)}
        if not all(node["fn"].has_rsample for node in drawn.values()):
            return False
        with torch.enable_grad(), SetLatents({name: node["value"].detach() for name, node in drawn.items()}):
            again = self.trace(filled, None, 1)
        return not any(node["value"].requires_grad for node in latent_nodes(again) if is_point(node))

    def points(self, filled: tuple[Any, ...], trace: Trace, names: set[str]) -> list[str]:
        """Latents of the program that stand on points; refused where these stay where they are.

        An autoguide puts them where its draws of an auxiliary site lead: others at every run, with a log-density.
        """
        points = [n for n in self.program.continuous if n in names and is_point(trace.nodes[n])]
        if not points:
            return points
        nothing_drawn = all(is_point(trace.nodes[n]) for n in names)
        with own_random_state():  # one state for both: each on its own would draw the same
            first, again = (self.trace(filled, None, 1) for _ in range(2))

        def stays(name: str) -> bool:
            return torch.equal(first.nodes[name]["value"], again.nodes[name]["value"])

        moved = not all(stays(n) for n in names if not is_point(trace.nodes[n]))
        for n in points:
            if nothing_drawn or (moved and stays(n)):
                raise ModelError(
                    f"the guide puts latent {n!r} on a single point (Delta): nothing is drawn, so that nothing can be "
                    "integrated. Use a guide with a density, such as AutoNormal, or, of a trained "
                    "AutoLaplaceApproximation, what its laplace_approximation(...) returns"
                )
        return points

    def with_layout(self, trace: Trace, names: set[str]) -> GuideRuns:
        """The same with the rows and plates of the draws."""
        # Where the guide couples rows, their weights cannot be told apart: one vector.
        program = self.program
        coupled = program.by_row and any(
            all(f.name != program.rows_plate for f in trace.nodes[n]["cond_indep_stack"])
            for n in names
            if not is_point(trace.nodes[n])
        )
        frames = [f for n in names for f in trace.nodes[n]["cond_indep_stack"] if f.vectorized]
        depth = max([program.depth, *(-f.dim for f in frames)])
        program = one_vector(program) if coupled else program
        return self._replace(program=program._replace(depth=depth))


def _refuse_infinite(guide_trace: Trace) -> None:
    for node in latent_nodes(guide_trace):
        if not bool(torch.isfinite(node["fn"].log_prob(node["value"])).all()):
            raise ModelError(
                f"the guide's density of site {node['name']!r} is not finite: check its parameters, and the "
                "learning rate if they were trained"
            )
