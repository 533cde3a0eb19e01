"""Adaptive Gauss-Hermite quadrature over a few continuous latents, the rest exact inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayes_mpt.predictors.base import Evidence, Guide, Predictor
from bayes_mpt.predictors.nodes.adaptive import AdaptiveNodes, check_width
from bayes_mpt.predictors.nodes.newton import LaplaceApproximation
from bayes_mpt.predictors.nodes.rules import hermite
from bayes_mpt.predictors.nodes.weighted import (
    Nodes,
    NodeSource,
    Read,
    constrained,
    program_values,
    warn_if_slow,
)
from bayes_mpt.program.analysis import analyze
from bayes_mpt.program.arguments import fill
from bayes_mpt.program.program import Model, ModelError, Program

__all__ = ["Quadrature"]

MAX_WIDTH = 4
NODES = {1: 64, 2: 16, 3: 10, 4: 8}  # along each axis, by the number of latents


class Quadrature(Predictor):
    """Gauss-Hermite nodes around the mode of each row's posterior (Liu & Pierce 1994).

    Takes up to four continuous latents, of a row or shared by all rows. Discrete latents are summed out inside, and
    latents that are linear-Gaussian given the others integrated in closed form: a regression with an unknown noise
    variance needs nodes over that variance alone.

    Parameters
    ----------
    n_nodes : int, optional
        Along each axis; by default 64, 16, 10, 8 for one to four latents.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist, torch
    >>> def coin(x):
    ...     p = pyro.sample("p", dist.Beta(x.new_tensor(1.0), x.new_tensor(1.0)))
    ...     with pyro.plate("rows", len(x)):
    ...         pyro.sample("x", dist.Bernoulli(p), obs=x)
    >>> x = torch.tensor([1.0] * 50 + [0.0] * 50, dtype=torch.float64)
    >>> float(Quadrature().bind(coin, (x,)).read((x,)).score())  # log B(51, 51) = -71.39896...
    -71.39896...
    """

    def __init__(self, n_nodes: int | None = None):
        self.n_nodes = n_nodes

    def bind(self, model: Model, args: tuple[Any, ...], guide: Guide | None = None) -> NodeSource:
        return self.bind_program(model, args, analyze(model, args))

    def bind_program(self, model: Model, args: tuple[Any, ...], program: Program) -> NodeSource:
        """`bind` where it is known what `analyze` finds."""
        if self.n_nodes is not None and (not isinstance(self.n_nodes, int) or self.n_nodes < 2):
            raise ValueError(f"n_nodes must be an integer of at least 2, got {self.n_nodes!r}")
        if not program.continuous:
            raise ModelError("the program has no continuous latent: use Exact()")
        adaptive = AdaptiveNodes(model, args, program)
        width = adaptive.space.width
        check_width(width, MAX_WIDTH, "Quadrature", program)
        bound = _Hermite(adaptive, self.n_nodes or NODES[max(1, width)])
        warn_if_slow(adaptive.one_by_one, bound)
        return bound


class _Hermite(NodeSource):
    """Nodes around the mode, in units of the posterior's root."""

    relocates = True
    name = "Quadrature"

    def __init__(self, adaptive: AdaptiveNodes, n_nodes: int):
        self.adaptive, self.n_nodes = adaptive, n_nodes
        self.model, self.structure = adaptive.model, adaptive.program
        outside = (
            f"{n_nodes} Gauss-Hermite nodes along each of {adaptive.space.width} axes "
            f"({', '.join(adaptive.space.names)}), around the mode"
        )
        self.why = (outside if adaptive.space.parts else "") + adaptive.inside

    def _forget(self) -> None:
        self.adaptive.forget()

    def place(self, args: tuple[Any, ...], visible: Tensor | None = None, near: Any = None) -> Read:
        filled = tuple(fill(a) for a in args)
        value = program_values(self.model, args, filled, self.structure)
        if visible is None:
            visible = torch.ones(value.shape[1], dtype=torch.bool, device=value.device)
        located = self.adaptive.locate(args, value, visible, near)
        return self.around(args, filled, value, located)

    def around(
        self, args: tuple[Any, ...], filled: tuple[Any, ...], value: Tensor, located: LaplaceApproximation
    ) -> Read:
        """Nodes for rows whose posteriors are located."""
        mode, root = located
        t, log_w = (a.to(mode) for a in hermite(mode.shape[1], self.n_nodes))  # (S, d), (S,)
        u = mode + (root @ t[:, None, :, None])[..., 0]  # (S, N, d)
        log_weight = log_w[:, None] + torch.linalg.slogdet(root)[1]
        given, part, scale = self.adaptive.at(args, filled, u)
        return Read(
            given,
            log_weight + part,
            value,
            scale,
            constrained(self.adaptive.space, u),
            self.adaptive.space.names,
            located,
        )

    @torch.no_grad()
    def evidence(self, nodes: Nodes) -> Evidence:
        width = self.adaptive.space.width
        more = 2 * self.n_nodes if width <= 2 else self.n_nodes + 3
        few = nodes.score()
        filled = tuple(fill(a) for a in nodes.args)
        finer = _Hermite(self.adaptive, more).around(nodes.args, filled, nodes.value, nodes.last.located)
        many = (
            nodes.at_nodes(finer).refined().score()
        )  # with more nodes in every row too, where rows have their own
        change = float((many - few).sum())
        return Evidence(many, abs(change), {"n_nodes": more, f"change from {self.n_nodes} nodes": change})
