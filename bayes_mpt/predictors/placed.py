"""Where nodes go: the mode and curvature of each row's latents given what is visible of it.

The posterior of the unconstrained latents u of a row is located by Newton's method on log p(u, x_R), all rows side by
side, and nodes are placed around it: Gauss-Hermite nodes (Liu & Pierce 1994), or draws from a wider distribution.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from bayes_mpt.affine import NotAffine, Reading, read_side_by_side
from bayes_mpt.factors import read_factors
from bayes_mpt.latents import Space, space
from bayes_mpt.predictors.linear_gaussian import LinearGaussian
from bayes_mpt.predictors.nodes import (
    FactorsGiven,
    FixedSites,
    Given,
    Mapped,
    MapsGiven,
    SideBySide,
    Stacked,
    program_values,
)
from bayes_mpt.tracing import (
    NODES,
    Model,
    ModelError,
    Program,
    SetLatents,
    fill,
    is_subsample,
    n_rows_of,
    node_of,
    rows_first,
    run,
    split_events,
)

__all__ = ["Located", "Placement", "check_width"]

MAX_STEPS = 100
LONGEST_STEP = 5.0
N_START_DRAWS = 9


class Located(NamedTuple):
    """A Gaussian approximation of each row's posterior."""

    mode: Tensor
    """(N, d)"""
    root: Tensor
    """(N, d, d): covariance = root root'."""


class Placement:
    """A program at chosen values of some of its continuous latents, the rest of them integrated given these.

    Parameters
    ----------
    model : callable
        A Pyro program.
    args : tuple
        What it is called with.
    program : Program
        Its `survey`.

    Attributes
    ----------
    space : Space
        Of the latents that take nodes.
    gaussian : tuple of str
        Names of those that are integrated in closed form given the nodes.
    """

    def __init__(self, model: Model, args: tuple[Any, ...], program: Program):
        filled = tuple(fill(a) for a in args)
        trace = run(model, filled)
        self._template: LinearGaussian | None = None
        self._last: Tensor | None = None
        names = _awkward(model, args, program)
        if set(names) != set(program.continuous):
            fixed = FixedSites(model, {n: trace.nodes[n]["value"] for n in names})
            self._template = LinearGaussian(fixed, args)
            program = split_events(program)
        self.model, self.program = model, program
        self.space: Space = space(program, trace, names)
        self.gaussian = tuple(n for n in program.continuous if n not in names)
        self.mapped = False
        if self._template is None:
            self.vectorised = self._runs_together(filled, mapped=False)
            self.mapped = (
                not self.vectorised and not program.discrete and self._runs_together(filled, mapped=True)
            )
        else:
            self.vectorised = not program.by_row and self._reads_side_by_side(args, filled)

    @property
    def one_by_one(self) -> bool:
        """Whether every node needs runs of its own."""
        return not (self.vectorised or self.mapped)

    @property
    def inside(self) -> str:
        """What is integrated without nodes, and how nodes are run, in words."""
        out = f"; given them {', '.join(self.gaussian)} in closed form" if self.gaussian else ""
        out += f"; {', '.join(self.program.discrete)} summed out" if self.program.discrete else ""
        return out + ("; node by node" if self.one_by_one else "")

    def at(self, args: tuple[Any, ...], filled: tuple[Any, ...], u: Tensor) -> tuple[Given, Tensor, float]:
        """The inner model at nodes u (S, N, d), the weights' part (S, N) that it leaves out, and the scale."""
        if self._template is None:
            if self.vectorised or len(u) == 1:
                values, log_det = self.space.values(u)
                factors = read_factors(self.model, filled, self.program, values, len(u))
                return FactorsGiven(factors), log_det, factors.scale
            if self.mapped:
                return self._mapped(filled, u)
            parts = [self.at(args, filled, v[None]) for v in u]
            given = Stacked(tuple(p[0] for p in parts))
            return given, torch.cat([p[1] for p in parts]), parts[0][2]
        if self.vectorised:
            return self._side_by_side(args, filled, u)
        maps, log_weight = [], []
        scale = 1.0
        for node in u:
            values, log_det = self.space.values(node[None])
            reading = self._template.with_model(FixedSites(self.model, values)).read(args)
            maps.append(reading)
            log_weight.append(log_det[0] + self._log_prior(filled, values, len(node)))
            scale = reading.scale
        return MapsGiven(tuple(maps)), torch.stack(log_weight), scale

    def _mapped(self, filled: tuple[Any, ...], u: Tensor) -> tuple[Given, Tensor, float]:
        """`at` for programs that take no further axes."""
        values, log_det = self.space._replace(depth=0).values(u)
        if len(u) == 1:
            values = {name: v[None] for name, v in values.items()}
        given = Mapped(partial(read_factors, self.model, filled, self.program), values)
        return given, log_det, given.factors({name: v[0] for name, v in values.items()}).scale

    def _side_by_side(
        self, args: tuple[Any, ...], filled: tuple[Any, ...], u: Tensor
    ) -> tuple[Given, Tensor, float]:
        """`at` for linear-Gaussian maps of one vector: all nodes in one run."""
        assert self._template is not None
        n_nodes = max(2, len(u))  # one node alone would have no axis
        values, log_det = self.space.values(u.expand(n_nodes, -1, -1))
        structure = self._template.structure
        reading = read_side_by_side(self.model, args, structure, values, n_nodes, self.program.depth)
        prior = u.new_zeros(n_nodes, 1)
        with pyro.plate(NODES, n_nodes, dim=-1 - self.program.depth):
            trace = run(self.model, filled, {**values, **self._at_zero(n_nodes, u)})
        for part in self.space.parts:
            node = trace.nodes[part.latent.name]
            prior = prior + node["fn"].log_prob(node["value"]).reshape(n_nodes, -1).sum(-1, keepdim=True)
        kept = [t[: len(u)] for t in reading[:5]]
        reading = Reading(kept[0], kept[1], kept[2], kept[3], kept[4], reading.scale, reading.value)
        given = SideBySide(self._template.with_reading(reading))
        return given, (log_det + prior)[: len(u)], 1.0

    def _at_zero(self, n_nodes: int, like: Tensor) -> dict[str, Tensor]:
        """Any values of the latents that are integrated in closed form."""
        assert self._template is not None
        return {
            site.name: like.new_zeros(n_nodes, *([1] * (self.program.depth - site.n_batch)), *site.shape)
            for site in self._template.structure.latents
        }

    def _reads_side_by_side(self, args: tuple[Any, ...], filled: tuple[Any, ...]) -> bool:
        """Whether two nodes side by side have the maps that each has alone."""
        assert self._template is not None
        start = self.start(filled)
        u = torch.stack([start, start + 0.3])
        x = program_values(self.model, args, filled, self.program)
        everything = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)

        def log_joint() -> Tensor:
            given, part, _ = self.at(args, filled, u)
            return part + given.log_joint(x, everything)

        with torch.no_grad():
            self.vectorised = False
            apart = log_joint()
            self.vectorised = True
            try:
                together = log_joint()
            except (RuntimeError, ValueError, IndexError, AssertionError):
                return False
        return bool(torch.allclose(together, apart, rtol=1e-8))

    def _runs_together(self, filled: tuple[Any, ...], mapped: bool) -> bool:
        """Whether the program gives at two nodes in one run what it gives at each alone."""
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            n_rows = n_rows_of(self.program, filled)
            first = run(self.model, filled)
            drawn_rows = {name: node["value"] for name, node in first.nodes.items() if is_subsample(node)}
            u = torch.cat([self.space.pack(run(self.model, filled), n_rows) for _ in range(2)])
            seen = torch.ones(n_rows, self.program.n_tokens, dtype=torch.bool, device=u.device)
            x = u.new_zeros(seen.shape)

            def log_joint(u: Tensor) -> Tensor:
                values, _ = self.space.values(u)
                factors = read_factors(self.model, filled, self.program, values, len(u))
                return factors.log_joint(seen)

            with SetLatents(drawn_rows):
                apart = torch.cat([log_joint(u[:1]), log_joint(u[1:])])
                try:
                    together = self._mapped(filled, u)[0].log_joint(x, seen) if mapped else log_joint(u)
                except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
                    return False
        return bool(torch.allclose(together, apart, rtol=1e-6, equal_nan=True))

    def start(self, filled: tuple[Any, ...]) -> Tensor:
        """(N, d): medians of a few draws from the prior."""
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            n_rows = n_rows_of(self.program, filled)
            draws = [self.space.pack(run(self.model, filled), n_rows)[0] for _ in range(N_START_DRAWS)]
        return torch.stack(draws).median(0).values

    @torch.enable_grad()
    def locate(self, args: tuple[Any, ...], x: Tensor, visible: Tensor) -> Located:
        """The mode of each row's latents given its visible tokens: Newton's method, saddles turned into descents."""
        filled = tuple(fill(a) for a in args)
        u = self.start(filled)
        if self._last is not None and self._last.shape == u.shape:
            u = self._last  # a training asks again and again, with little change
        for _ in range(MAX_STEPS):
            u = u.detach().requires_grad_()
            log_prob = self._log_prob(args, filled, x, visible, u)
            (slope,) = torch.autograd.grad(log_prob.sum(), u, create_graph=True)
            curvature = torch.stack(
                [
                    torch.autograd.grad(slope[:, j].sum(), u, retain_graph=True, materialize_grads=True)[0]
                    for j in range(u.shape[1])
                ],
                -1,
            )
            slope = slope.detach()
            value, vector = torch.linalg.eigh(-0.5 * (curvature + curvature.mT))
            size = value.abs().clamp(min=1e-10)
            step = (vector @ ((vector.mT @ slope[..., None]) / size[..., None]))[..., 0]
            gain = (slope * step).sum(-1)  # (N,)
            longest = step.abs().amax(-1, keepdim=True)
            step = step * (LONGEST_STEP / longest.clamp(min=LONGEST_STEP))
            if not bool((gain > 1e-12).any()):
                break
            with torch.no_grad():
                there = gain <= 1e-12 * (1 + log_prob.detach().abs())
                u, moved = self._walk(args, filled, x, visible, u, step, log_prob.detach(), there)
            if not moved:
                break
        self._last = u.detach()
        covariance_root = vector * size.rsqrt()[..., None, :]
        return Located(u.detach(), covariance_root.detach())

    def _walk(
        self,
        args: tuple[Any, ...],
        filled: tuple[Any, ...],
        x: Tensor,
        visible: Tensor,
        u: Tensor,
        step: Tensor,
        before: Tensor,
        there: Tensor,
    ) -> tuple[Tensor, bool]:
        """Halve the step of each row until it climbs, of those that are not there yet."""
        share = torch.ones_like(before)
        best, better = u.detach().clone(), there.clone()
        for _ in range(20):
            trial = u + share[:, None] * step
            try:
                log_prob = self._log_prob(args, filled, x, visible, trial)
            except ValueError:  # so far away that the program refuses: all rows shorter
                share = share / 2
                continue
            good = (log_prob > before) & torch.isfinite(log_prob) & ~better
            best[good] = trial[good]
            better |= good
            if bool(better.all()):
                break
            share = torch.where(better, share, share / 2)
        return best, bool((better & ~there).any())

    def _log_prob(
        self, args: tuple[Any, ...], filled: tuple[Any, ...], x: Tensor, visible: Tensor, u: Tensor
    ) -> Tensor:
        """log p(u, x_R) (N,)."""
        given, part, _ = self.at(args, filled, u[None])
        return (part + given.log_joint(x, visible))[0]

    def _log_prior(self, filled: tuple[Any, ...], values: dict[str, Tensor], n_rows: int) -> Tensor:
        """log p of the sites that take nodes, (N,)."""
        trace = run(FixedSites(self.model, values, hide=False), filled)
        total = filled[0].new_zeros(n_rows)
        for part in self.space.parts:
            node = trace.nodes[part.latent.name]
            total = total + rows_first(node["fn"].log_prob(node["value"]), part.latent.row_axis).sum(-1)
        return total


def _awkward(model: Model, args: tuple[Any, ...], program: Program) -> tuple[str, ...]:
    """The continuous latents that a linear-Gaussian map leaves over: all of them where there is no such map."""
    everything = program.continuous
    if program.discrete or {s.kind for s in program.sites} - {"Normal", "MultivariateNormal"}:
        return everything
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trace = run(model, tuple(fill(a) for a in args))
    drawn = {n: node_of(trace, n)["value"].detach() for n in everything}
    kept = []
    for name in everything:
        others = {n: v for n, v in drawn.items() if n != name}
        try:
            LinearGaussian(FixedSites(model, others), args)
            kept.append(name)
        except NotAffine:
            continue
    rest = tuple(n for n in everything if n not in kept)
    if not kept or not rest:  # all of them could be integrated, but nodes were asked for
        return everything
    try:  # one by one they are; all together?
        LinearGaussian(FixedSites(model, {n: drawn[n] for n in rest}), args)
    except NotAffine:
        return everything
    return rest


def check_width(width: int, most: int, what: str, program: Program) -> None:
    """Refuse more latents than a way of placing nodes can serve."""
    if width > most:
        where = "a row" if program.by_row else "in all"
        raise ModelError(
            f"{what} takes at most {most} continuous latents, got {width} {where} at sites "
            f"{list(program.continuous)}: use Importance() with a guide, or SequentialMonteCarlo() for latents that "
            "all rows share"
        )
