"""Where nodes go: the mode and curvature of each row's latents given what is visible of it.

The posterior of the unconstrained latents u of a row is located by Newton's method on log p(u, x_R), all rows side by
side, and nodes are placed around it: Gauss-Hermite nodes (Liu & Pierce 1994), or draws from a wider distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayes_mpt.affine import NotAffine, read_side_by_side
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
    Model,
    ModelError,
    Program,
    SetLatents,
    base,
    fill,
    is_subsample,
    n_rows_of,
    node_of,
    rows_first,
    run,
    split_events,
)

__all__ = ["Located", "Placement", "check_width"]

GAUSSIAN = {"Normal", "MultivariateNormal"}
LAST_GAIN = 1e-9  # nats: the next step would move the nodes by 1e-9 standard deviations
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
        self._last: Tensor | None = None
        names, self._template = _awkward(model, args, program)
        if self._template is not None:
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
            self.vectorised = not program.by_row and self._reads_side_by_side(
                args, filled, self.space.pack(trace, 1)[0].detach()
            )

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
            return self._side_by_side(args, u)
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

    def _side_by_side(self, args: tuple[Any, ...], u: Tensor) -> tuple[Given, Tensor, float]:
        """`at` for linear-Gaussian maps of one vector: all nodes in one run."""
        assert self._template is not None
        n_nodes = len(u)
        values, log_det = self.space.values(u.expand(max(2, n_nodes), -1, -1))  # one alone would have no axis
        values = {name: value[:n_nodes] for name, value in values.items()}
        structure = self._template.structure
        reading, prior = read_side_by_side(self.model, args, structure, values, n_nodes, self.program.depth)
        return SideBySide(self._template.with_reading(reading)), log_det[:n_nodes] + prior[:, None], 1.0

    def _reads_side_by_side(self, args: tuple[Any, ...], filled: tuple[Any, ...], drawn: Tensor) -> bool:
        """Whether a node between two others has the map that it has alone."""
        assert self._template is not None
        u = torch.stack([drawn - 0.3, drawn, drawn + 0.3])
        x = program_values(self.model, args, filled, self.program)
        everything = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)

        def log_joint(u: Tensor) -> Tensor:
            given, part, _ = self.at(args, filled, u)
            return part + given.log_joint(x, everything)

        with torch.no_grad():
            self.vectorised = False
            apart = log_joint(u[1:2])
            self.vectorised = True
            try:
                together = log_joint(u)
            except (RuntimeError, ValueError, IndexError, AssertionError):
                return False
        return bool(torch.allclose(together[1:2], apart, rtol=1e-8))

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

    def locate(self, args: tuple[Any, ...], x: Tensor, visible: Tensor) -> Located:
        """The mode of each row's latents given its visible tokens: Newton's method, saddles turned into descents."""
        filled = tuple(fill(a) for a in args)
        u = self._last  # a training asks again and again, with little change
        if u is None or u.shape != (n_rows_of(self.program, filled), self.space.width):
            u = self.start(filled)
        found = _climb(lambda u: self._log_prob(args, filled, x, visible, u[None])[0], u, MAX_STEPS)
        self._last = found.mode
        return found

    def widen(
        self, args: tuple[Any, ...], x: Tensor, visible: Tensor, near: Located, draws: Tensor
    ) -> Located:
        """Newton's step of the mean log-density over draws (S, N, d) of a Gaussian, and the mean curvature there.

        Both end at the Gaussian closest to the posterior (Opper & Archambeau 2009), where Laplace's sees a point.
        """
        filled = tuple(fill(a) for a in args)
        offsets = (near.root @ draws[..., None])[..., 0]
        return _climb(lambda u: self._log_prob(args, filled, x, visible, u + offsets).mean(0), near.mode, 1)

    @torch.enable_grad()
    def laplace(self, args: tuple[Any, ...], x: Tensor, visible: Tensor) -> Tensor:
        """Laplace's approximation of log Z of each row (N,), with its gradient to the program's parameters.

        log p(u, x) + log |root| + d/2 log 2 pi,    root root' = (-d^2 log p / du^2)^-1,    at the mode u
        """
        filled = tuple(fill(a) for a in args)
        mode = self.locate(args, x, visible).mode.requires_grad_()
        log_prob = self._log_prob(args, filled, x, visible, mode[None])[0]
        (slope,) = torch.autograd.grad(log_prob.sum(), mode, create_graph=True)
        root = _root(_curvature(slope, mode))
        # The mode moves with the parameters as Newton's next step does, whose length is zero.
        u = mode.detach() + _times_covariance(root, slope)
        # d log |root| = 1/2 sum_s d (r_s' H r_s), H the second derivative, along the columns r_s of the root
        along = u.new_zeros(u.shape[1], len(u), requires_grad=True)  # (d, N)
        log_prob = self._log_prob(args, filled, x, visible, u + along[..., None] * root.permute(2, 0, 1))
        (first,) = torch.autograd.grad(log_prob.sum(), along, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), along, create_graph=True)
        bend = 0.5 * second.sum(0)
        log_root = torch.linalg.slogdet(root)[1] + bend - bend.detach()
        return log_prob[0] + log_root + 0.5 * u.shape[1] * math.log(2 * math.pi)

    def _log_prob(
        self, args: tuple[Any, ...], filled: tuple[Any, ...], x: Tensor, visible: Tensor, u: Tensor
    ) -> Tensor:
        """log p(u, x_R) of nodes u (S, N, d): (S, N)."""
        given, part, _ = self.at(args, filled, u)
        return part + given.log_joint(x, visible)

    def _log_prior(self, filled: tuple[Any, ...], values: dict[str, Tensor], n_rows: int) -> Tensor:
        """log p of the sites that take nodes, (N,)."""
        trace = run(FixedSites(self.model, values, hide=False), filled)
        total = filled[0].new_zeros(n_rows)
        for part in self.space.parts:
            node = trace.nodes[part.latent.name]
            total = total + rows_first(node["fn"].log_prob(node["value"]), part.latent.row_axis).sum(-1)
        return total


@torch.enable_grad()
def _climb(log_prob: Callable[[Tensor], Tensor], u: Tensor, max_steps: int) -> Located:
    """Newton's method on (N, d) -> (N,), all rows side by side, and the curvature at the last step but one."""
    u = u.detach().requires_grad_()
    before = log_prob(u)
    for _ in range(max_steps):
        (slope,) = torch.autograd.grad(before.sum(), u, create_graph=True)
        root = _root(_curvature(slope, u))
        slope = slope.detach()
        step = _times_covariance(root, slope)
        gain = (slope * step).sum(-1)  # (N,)
        longest = step.abs().amax(-1, keepdim=True)
        step = step * (LONGEST_STEP / longest.clamp(min=LONGEST_STEP))
        if not bool((gain > LAST_GAIN).any()):  # Newton's last step squares what is left
            u = u + step
            break
        there = gain <= 1e-12 * (1 + before.detach().abs())
        u, before, moved = _walk(log_prob, u.detach(), step, before.detach(), there)
        if not moved:
            break
    return Located(u.detach(), root)


def _walk(
    log_prob: Callable[[Tensor], Tensor], u: Tensor, step: Tensor, before: Tensor, there: Tensor
) -> tuple[Tensor, Tensor, bool]:
    """Halve the step of each row until it climbs, of those that are not there yet; log p there, and if any did."""
    share = torch.ones_like(before)
    best, better = u, there.clone()
    for _ in range(20):
        trial = (u + share[:, None] * step).requires_grad_()
        try:
            found = log_prob(trial)
        except ValueError:  # so far away that the program refuses: all rows shorter
            share = share / 2
            continue
        good = (found.detach() > before) & torch.isfinite(found.detach()) & ~better
        if bool(good.all()):
            return trial, found, True
        best = torch.where(good[:, None], trial.detach(), best)
        better |= good
        if bool(better.all()):
            break
        share = torch.where(better, share, share / 2)
    best.requires_grad_()
    return best, log_prob(best), bool((better & ~there).any())


def _curvature(slope: Tensor, u: Tensor) -> Tensor:
    """-d slope / du of each row: (N, d), (N, d) -> (N, d, d)."""
    n_rows, width = u.shape
    one = torch.eye(width, dtype=u.dtype, device=u.device)[:, None].expand(-1, n_rows, -1)  # (d, N, d)
    (rows,) = torch.autograd.grad(
        slope, u, one, retain_graph=True, is_grads_batched=True, materialize_grads=True
    )
    return -0.5 * (rows.movedim(0, 1) + rows.permute(1, 2, 0))


def _root(curvature: Tensor) -> Tensor:
    """R with R R' = |H|^-1, (N, d, d); of a saddle the signs of its axes are dropped."""
    lower, info = torch.linalg.cholesky_ex(curvature)
    if not bool(info.any()):
        one = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, one.expand_as(lower), upper=False).mT.detach()
    value, vector = torch.linalg.eigh(curvature)
    return (vector * value.abs().clamp(min=1e-10).rsqrt()[..., None, :]).detach()


def _times_covariance(root: Tensor, slope: Tensor) -> Tensor:
    return (root @ (root.mT @ slope[..., None]))[..., 0]


def _awkward(
    model: Model, args: tuple[Any, ...], program: Program
) -> tuple[tuple[str, ...], LinearGaussian | None]:
    """The continuous latents that a linear-Gaussian map leaves over, with the map; all where there is none."""
    everything = program.continuous
    if program.discrete or {s.kind for s in program.sites} - GAUSSIAN:
        return everything, None
    filled = tuple(fill(a) for a in args)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trace = run(model, filled)
    drawn = {n: node_of(trace, n)["value"].detach() for n in everything}

    def given(names: Iterable[str]) -> LinearGaussian | None:
        with suppress(NotAffine):
            return LinearGaussian(FixedSites(model, {n: drawn[n] for n in names}), args)
        return None

    normal = [n for n in everything if type(base(node_of(trace, n)["fn"])).__name__ in GAUSSIAN]
    alone = {n: given(m for m in everything if m != n) for n in normal}
    kept = [n for n, template in alone.items() if template is not None]
    rest = tuple(n for n in everything if n not in kept)

    def stirs(name: str) -> bool:
        """Whether the density of a latent that takes nodes depends on this one."""
        moved = run(model, filled, {**drawn, name: drawn[name] + 1})
        return any(
            not torch.equal(*(t.nodes[n]["fn"].log_prob(drawn[n]) for t in (trace, moved))) for n in rest
        )

    while stirring := [n for n in kept if stirs(n)]:
        kept = [n for n in kept if n not in stirring]
        rest = tuple(n for n in everything if n not in kept)
    if not kept or not rest:  # all of them could be integrated, but nodes were asked for
        return everything, None
    # one by one they are; all together?
    template = alone[kept[0]] if len(kept) == 1 else given(rest)
    return (everything if template is None else rest), template


def check_width(width: int, most: int, what: str, program: Program) -> None:
    """Refuse more latents than a way of placing nodes can serve."""
    if width > most:
        where = "a row" if program.by_row else "in all"
        raise ModelError(
            f"{what} takes at most {most} continuous latents, got {width} {where} at sites "
            f"{list(program.continuous)}: use Importance() with a guide, or SequentialMonteCarlo() for latents that "
            "all rows share"
        )
