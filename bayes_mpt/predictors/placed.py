"""Where nodes go: the mode and curvature of each row's latents given what is visible of it.

The posterior of the unconstrained latents u of a row is located by Newton's method on log p(u, x_R), all rows side by
side, and nodes are placed around it: Gauss-Hermite nodes (Liu & Pierce 1994), or draws from a wider distribution.

Where latents of the data set stand beside latents of each row, the first take these nodes. Given each of them rows are
independent, and each is integrated by itself: in closed form, or with nodes around its own mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro.poutine.trace_struct import Trace
from scipy.stats import chi2, norm, qmc
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
    PlacedRows,
    RowsGiven,
    SideBySide,
    Stacked,
    constrained,
    program_values,
)
from bayes_mpt.tracing import (
    Latent,
    Model,
    ModelError,
    Program,
    SetLatents,
    fill,
    is_subsample,
    n_rows_of,
    node_of,
    rows_first,
    rows_given_shared,
    run,
    split_events,
)

__all__ = ["Located", "Placement", "check_width", "hermite", "log_t"]

MAX_STEPS = 100
LONGEST_STEP = 5.0
N_START_DRAWS = 9
DEGREES = 5.0  # of freedom of draws around a mode
MAX_HERMITE = 4  # latents of a row, given those of the data set, up to which a product rule integrates them
ROW_NODES = {0: 1, 1: 16, 2: 8, 3: 6, 4: 5}  # of that rule along each axis
ROW_DRAWS = 128  # points where there are more
CANNOT = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)


class Located(NamedTuple):
    """A Gaussian approximation of each row's posterior."""

    mode: Tensor
    """(..., N, d)"""
    root: Tensor
    """(..., N, d, d): covariance = root root'."""


class _Held(NamedTuple):
    """Latents of the data set beside a program of the rows alone."""

    latents: tuple[Latent, ...]
    draws: dict[str, Tensor]
    """(2, ...) two values of each, to find out with what the program is."""


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
    held : _Held, optional
        Latents that are no part of ``program``: every evaluation is given values of them.

    Attributes
    ----------
    space : Space
        Of the latents that take nodes.
    gaussian : tuple of str
        Names of those that are integrated in closed form given the nodes.
    rows : _Rows, optional
        How the latents of each row are integrated given the nodes, where some are of a row and some of the data set.
    """

    def __init__(self, model: Model, args: tuple[Any, ...], program: Program, held: _Held | None = None):
        filled = tuple(fill(a) for a in args)
        self._held = held or _Held((), {})
        first = _node(self._held.draws, 0)
        with torch.random.fork_rng():
            trace = run(model, filled, first)
        self._template: LinearGaussian | None = None
        self._last: Tensor | None = None
        self._prior_mapped = True
        names = _awkward(model, args, program, first)
        rest = set(program.continuous) - set(names)
        self.model, self.program = model, program
        self.rows = self._rows(args, filled, trace, names)
        if self.rows is not None:
            names = tuple(n for n in program.continuous if n not in self.rows.placement.program.latent_names)
        elif rest:
            fixed = {n: node_of(trace, n)["value"] for n in names}
            self._template = LinearGaussian(FixedSites(model, {**first, **fixed}), args)
            self.program = split_events(program)
        self.space: Space = space(self.program, trace, names)
        self.gaussian = () if self.rows is not None else tuple(n for n in program.continuous if n in rest)
        self.vectorised = self.mapped = False
        if self.rows is not None:
            self.vectorised = not self.rows.placement.one_by_one
            self._prior_mapped = self._maps_prior(filled)
        elif self._template is not None:
            self.vectorised = self._reads_side_by_side(args, filled)
        else:
            self.vectorised = self._runs_together(filled)
            if not self.vectorised and not program.discrete:
                self.mapped = True
                self.mapped = self._runs_together(filled)

    @property
    def one_by_one(self) -> bool:
        """Whether every node needs runs of its own."""
        return not (self.vectorised or self.mapped)

    @property
    def inside(self) -> str:
        """What is integrated without nodes, and how nodes are run, in words."""
        if self.rows is not None:
            return f"; given each of them, rows by themselves: {self.rows.why}"
        out = f"; given them {', '.join(self.gaussian)} in closed form" if self.gaussian else ""
        out += f"; {', '.join(self.program.discrete)} summed out" if self.program.discrete else ""
        return out + ("; node by node" if self.one_by_one else "")

    @property
    def n_evaluations(self) -> int:
        """How often a node costs the log-densities of all tokens, at the most."""
        if self.rows is not None:
            return self.rows.n_nodes * self.rows.placement.n_evaluations
        return 1 if self._template is None else self._template.structure.n_latents + 4

    def at(
        self, args: tuple[Any, ...], filled: tuple[Any, ...], u: Tensor, held: dict[str, Tensor] | None = None
    ) -> tuple[Given, Tensor, float]:
        """The inner model at nodes u (S, N, d), the weights' part (S, N) that it leaves out, and the scale.

        ``held`` are values (S, ...) of the latents that are no part of the program.
        """
        values, log_det = self.space._replace(depth=0).values(u)
        if len(u) == 1:
            values = {name: v[None] for name, v in values.items()}
        values = {**(held or {}), **values}
        if self.rows is not None:
            rows, prior = self.given(args, filled, values)
            return rows, log_det + prior, 1.0
        if self._template is not None:
            return self._by_maps(args, filled, values, log_det)
        if self.vectorised or len(u) == 1:
            factors = read_factors(self.model, filled, self.program, self._on_plate(values), len(u))
            return FactorsGiven(factors), log_det, factors.scale
        alone = partial(read_factors, self.model, filled, self.program)
        if self.mapped:
            return Mapped(alone, values), log_det, alone(_node(values, 0)).scale
        parts = [alone(_node(values, s)) for s in range(len(u))]
        return Stacked(tuple(FactorsGiven(f) for f in parts)), log_det, parts[0].scale

    def given(
        self, args: tuple[Any, ...], filled: tuple[Any, ...], values: dict[str, Tensor]
    ) -> tuple[Given, Tensor]:
        """The rows at values (S, ...) of the latents of the data set, and log p of these (S, 1)."""
        assert self.rows is not None
        return self.rows.given(args, filled, values), self._log_prior(filled, values)

    def _by_maps(
        self, args: tuple[Any, ...], filled: tuple[Any, ...], values: dict[str, Tensor], log_det: Tensor
    ) -> tuple[Given, Tensor, float]:
        """`at` where the rest is linear-Gaussian."""
        assert self._template is not None
        latents = tuple(p.latent for p in self.space.parts)
        if self.vectorised:
            reading, prior = read_side_by_side(self.model, args, self._template.structure, values, latents)
            given = SideBySide(self._template.with_reading(reading), len(log_det))
            return given, log_det + prior, 1.0
        maps, priors = [], []
        for s in range(len(log_det)):
            node = _node(values, s)
            maps.append(self._template.with_model(FixedSites(self.model, node)).read(args))
            with torch.random.fork_rng():  # the others are drawn, and do not matter
                trace = run(FixedSites(self.model, node, hide=False), filled)
            priors.append(_log_prior(trace, latents, filled[0]))
        return MapsGiven(tuple(maps)), log_det + torch.stack(priors), maps[0].scale

    def _on_plate(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Values (S, ...) for a run on a plate of nodes, left of all plates; S = 1 has no axis of its own."""
        n_batch = {s.name: s.n_batch for s in (*self._held.latents, *(p.latent for p in self.space.parts))}
        return {
            name: v[0]
            if len(v) == 1
            else v.reshape(len(v), *(1,) * (self.program.depth - n_batch[name]), *v.shape[1:])
            for name, v in values.items()
        }

    # ----------------------------------------------------------------------------------- latents of the data set alone

    def _rows(
        self, args: tuple[Any, ...], filled: tuple[Any, ...], trace: Trace, names: tuple[str, ...]
    ) -> _Rows | None:
        """The rows given the latents of the data set: where nodes would be needed in every row besides."""
        own = rows_given_shared(self.program, trace)
        if own is None or not set(names) & set(own.latent_names):
            return None
        shared = tuple(s for s in self.program.latents if s.name not in own.latent_names)
        if any(s.discrete for s in shared) or not shared or self.program.scale != 1.0:
            return None
        traces = _draws(self.model, filled, 2)
        draws = [{s.name: node_of(t, s.name)["value"].detach() for s in shared} for t in traces]
        held = _Held(shared, {s.name: torch.stack([d[s.name] for d in draws]) for s in shared})
        try:
            placement = Placement(self.model, args, own, held)
        except ModelError:
            return None
        rows = _Rows.of(placement, {n: node_of(trace, n)["value"].detach() for n in own.latent_names})
        others = {n: node_of(traces[0], n)["value"].detach() for n in own.latent_names}
        return rows if self._separates(args, filled, rows, others) else None

    def _separates(
        self, args: tuple[Any, ...], filled: tuple[Any, ...], rows: _Rows, others: dict[str, Tensor]
    ) -> bool:
        """Whether each row looks at its own latents only, and the latents of the data set at no row's."""
        at = rows.placement
        latents, node = at._held.latents, _node(at._held.draws, 0)
        x = program_values(self.model, args, filled, at.program)
        with torch.no_grad():
            prior = [
                _log_prior(run(self.model, filled, {**v, **node}), latents, x) for v in (rows.values, others)
            ]
            if not bool(torch.equal(prior[0], prior[1])):
                return False
            if len(x) < 2 or not at.space.width:
                return True
            a, b = (
                at.space.pack_values({n: v[n] for n in at.space.names}, 1, len(x))
                for v in (rows.values, others)
            )
            half = torch.arange(len(x), device=x.device)[:, None] < len(x) // 2
            one = {name: v[:1] for name, v in at._held.draws.items()}

            def by_row(u: Tensor) -> Tensor:
                given, part, _ = at.at(args, filled, u, one)
                return (part + given.log_joint(x, torch.ones_like(x, dtype=torch.bool)))[0]

            want = torch.where(half[:, 0], by_row(a), by_row(b))
            return bool(torch.allclose(by_row(torch.where(half, a, b)), want, rtol=1e-9, equal_nan=True))

    def _log_prior(self, filled: tuple[Any, ...], values: dict[str, Tensor]) -> Tensor:
        """log p of the latents of the data set at S nodes: (S, 1)."""
        assert self.rows is not None
        latents, held = tuple(p.latent for p in self.space.parts), self.rows.values

        def alone(node: dict[str, Tensor]) -> Tensor:
            return _log_prior(run(self.model, filled, {**held, **node}), latents, filled[0])

        if self._prior_mapped:
            with pyro.validation_enabled(False):  # a check would have to branch on its node
                return torch.vmap(alone)(values)
        n_nodes = len(next(iter(values.values())))
        return torch.stack([alone(_node(values, s)) for s in range(n_nodes)])

    def _maps_prior(self, filled: tuple[Any, ...]) -> bool:
        assert self.rows is not None
        with torch.no_grad():
            try:
                self._log_prior(filled, self.rows.placement._held.draws)
            except CANNOT:
                return False
        return True

    # ------------------------------------------------------------------------------------------------------- checks

    def _reads_side_by_side(self, args: tuple[Any, ...], filled: tuple[Any, ...]) -> bool:
        """Whether two nodes side by side have the maps that each has alone."""
        start = self.start(filled)
        u = torch.stack([start, start + 0.3])
        x = program_values(self.model, args, filled, self.program)
        everything = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)

        def log_joint() -> Tensor:
            given, part, _ = self.at(args, filled, u, self._held.draws)
            return part + given.log_joint(x, everything)

        with torch.no_grad():
            self.vectorised = False
            apart = log_joint()
            self.vectorised = True
            try:
                together = log_joint()
            except CANNOT:
                return False
        return bool(torch.allclose(together, apart, rtol=1e-8))

    def _runs_together(self, filled: tuple[Any, ...]) -> bool:
        """Whether the program gives at two nodes in one run what it gives at each alone."""
        with torch.no_grad():
            n_rows = n_rows_of(self.program, filled)
            traces = _draws(self.model, filled, 2)
            drawn_rows = {name: node["value"] for name, node in traces[0].nodes.items() if is_subsample(node)}
            u = torch.cat([self.space.pack(trace, n_rows) for trace in traces])
            seen = torch.ones(n_rows, self.program.n_tokens, dtype=torch.bool, device=u.device)
            x = u.new_zeros(seen.shape)

            def log_joint(u: Tensor, held: dict[str, Tensor]) -> Tensor:
                return self.at((), filled, u, held)[0].log_joint(x, seen)

            with SetLatents(drawn_rows):
                draws = self._held.draws
                halves = [{name: v[s : s + 1] for name, v in draws.items()} for s in range(2)]
                apart = torch.cat([log_joint(u[s : s + 1], halves[s]) for s in range(2)])
                before, self.vectorised = self.vectorised, not self.mapped
                try:
                    together = log_joint(u, draws)
                except CANNOT:
                    return False
                finally:
                    self.vectorised = before
        return bool(torch.allclose(together, apart, rtol=1e-6, equal_nan=True))

    # ---------------------------------------------------------------------------------------------------- the mode

    def start(self, filled: tuple[Any, ...]) -> Tensor:
        """(N, d): medians of a few draws from the prior."""
        with torch.no_grad():
            n_rows = n_rows_of(self.program, filled)
            if not self.space.parts:
                return filled[0].new_zeros(n_rows, 0)
            draws = [self.space.pack(t, n_rows)[0] for t in _draws(self.model, filled, N_START_DRAWS)]
        return torch.stack(draws).median(0).values

    def locate(self, args: tuple[Any, ...], x: Tensor, visible: Tensor) -> Located:
        """The mode of each row's latents given its visible tokens."""
        # what is integrated by nodes of its own has noise in its last digits
        return self._locate(args, x, visible, None, 1e-12 if self.rows is None else 1e-9)

    def locate_rows(
        self, args: tuple[Any, ...], x: Tensor, visible: Tensor, held: dict[str, Tensor]
    ) -> Located:
        """The same at each of S values of the latents that are held: (S, N, d), (S, N, d, d)."""
        detached = {name: v.detach() for name, v in held.items()}
        return self._locate(args, x, visible, detached, 1e-10)

    def _locate(
        self,
        args: tuple[Any, ...],
        x: Tensor,
        visible: Tensor,
        held: dict[str, Tensor] | None,
        enough: float,
    ) -> Located:
        filled = tuple(fill(a) for a in args)
        u = self._last  # a training asks again and again, with little change
        if u is None or u.shape != (n_rows_of(self.program, filled), self.space.width):
            u = self.start(filled)
        n_nodes = 1 if held is None else len(next(iter(held.values())))

        def log_prob(u: Tensor) -> Tensor:
            """log p(u, x_R)."""
            given, part, _ = self.at(args, filled, u, held)
            return part + given.log_joint(x, visible)

        mode, root = _climb(log_prob, u.expand(n_nodes, *u.shape), enough)
        self._last = mode.mean(0)
        return Located(mode[0], root[0]) if held is None else Located(mode, root)


@torch.enable_grad()
def _climb(log_prob: Callable[[Tensor], Tensor], u: Tensor, enough: float) -> Located:
    """The mode of each of S x N log-densities u (S, N, d) -> (S, N): Newton's method, saddles turned into descents.

    Until a step would gain no more than ``enough`` anywhere.
    """
    for _ in range(MAX_STEPS):
        u = u.detach().requires_grad_()
        value = log_prob(u)
        (slope,) = torch.autograd.grad(value.sum(), u, create_graph=True)
        curvature = torch.stack(
            [
                torch.autograd.grad(slope[..., j].sum(), u, retain_graph=True, materialize_grads=True)[0]
                for j in range(u.shape[-1])
            ],
            -1,
        )
        slope, before = slope.detach(), value.detach()
        size, vector = torch.linalg.eigh(-0.5 * (curvature + curvature.mT))
        size = size.abs().clamp(min=1e-10)
        step = (vector @ ((vector.mT @ slope[..., None]) / size[..., None]))[..., 0]
        gain = (slope * step).sum(-1)  # (S, N)
        longest = step.abs().amax(-1, keepdim=True)
        step = step * (LONGEST_STEP / longest.clamp(min=LONGEST_STEP))
        if not bool((gain > enough).any()):
            break
        with torch.no_grad():
            there = gain <= enough * (1 + before.abs())
            u, moved = _walk(log_prob, u, step, before, there)
        if not moved:
            break
    return Located(u.detach(), (vector * size.rsqrt()[..., None, :]).detach())


def _walk(
    log_prob: Callable[[Tensor], Tensor], u: Tensor, step: Tensor, before: Tensor, there: Tensor
) -> tuple[Tensor, bool]:
    """Halve the step of each row until it climbs, of those that are not there yet."""
    share = torch.ones_like(before)
    best, better = u.detach().clone(), there.clone()
    for _ in range(20):
        trial = u + share[..., None] * step
        try:
            now = log_prob(trial)
        except ValueError:  # so far away that the program refuses: all rows shorter
            share = share / 2
            continue
        good = (now > before) & torch.isfinite(now) & ~better
        best[good] = trial[good]
        better |= good
        if bool(better.all()):
            break
        share = torch.where(better, share, share / 2)
    return best, bool((better & ~there).any())


# --------------------------------------------------------------------------------------------------------- the rows


@dataclass(frozen=True)
class _Rows:
    """How each row is integrated given latents of the data set."""

    placement: Placement
    """Of the program of the rows alone."""
    values: dict[str, Tensor]
    """Any values of the rows' latents."""
    cells: Tensor
    """(N, T): where each row's tokens stand in the one vector of all observations."""

    @classmethod
    def of(cls, placement: Placement, values: dict[str, Tensor]) -> _Rows:
        parts, start = [], 0
        for site in placement.program.sites:
            kept = site.shape[: len(site.shape) - site.n_joint]
            size = math.prod(kept)
            parts.append(rows_first(torch.arange(start, start + size).reshape(kept), site.row_axis))
            start += size
        return cls(placement, values, torch.cat(parts, 1))

    @property
    def n_nodes(self) -> int:
        """Q, of each row."""
        width = self.placement.space.width
        return ROW_NODES[width] ** width if width <= MAX_HERMITE else ROW_DRAWS

    @property
    def why(self) -> str:
        names, width = ", ".join(self.placement.space.names), self.placement.space.width
        how = []
        if 0 < width <= MAX_HERMITE:
            how.append(
                f"{names} with {ROW_NODES[width]} Gauss-Hermite nodes along each of {width} axes, around the mode"
            )
        elif width:
            how.append(f"{names} with {ROW_DRAWS} points around the mode")
        if self.placement.gaussian:
            how.append(f"{', '.join(self.placement.gaussian)} in closed form")
        if self.placement.program.discrete:
            how.append(f"{', '.join(self.placement.program.discrete)} summed out")
        return "; ".join(how) + ("; node by node" if self.placement.one_by_one else "")

    def given(self, args: tuple[Any, ...], filled: tuple[Any, ...], held: dict[str, Tensor]) -> RowsGiven:
        """The rows at S values (S, ...) of the latents of the data set."""
        place = partial(self._place, args, filled, held)
        n_nodes = len(next(iter(held.values())))
        return RowsGiven(place, self.cells.to(filled[0].device), n_nodes)

    def _place(
        self,
        args: tuple[Any, ...],
        filled: tuple[Any, ...],
        held: dict[str, Tensor],
        fine: bool,
        x: Tensor,
        visible: Tensor,
    ) -> PlacedRows:
        """Q nodes for each of S nodes of the data set and each row, for what is visible (N, T) of it."""
        at, width = self.placement, self.placement.space.width
        n_nodes, n_rows = len(next(iter(held.values()))), len(x)
        t, log_w = _rule(width, fine)
        t, log_w = t.to(x), log_w.to(x)  # (Q, d), (Q,)
        if not width:
            u = x.new_zeros(n_nodes, n_rows, 0)
            given, part, _ = at.at(args, filled, u, held)
            return PlacedRows(given, part[:, None], u[:, None])
        mode, root = at.locate_rows(args, x, visible, held)
        u = (mode[:, None] + (root[:, None] @ t[:, None, :, None])[..., 0]).flatten(0, 1)  # (S Q, N, d)
        each = {name: v.repeat_interleave(len(t), 0) for name, v in held.items()}
        given, part, _ = at.at(args, filled, u, each)
        log_det = torch.linalg.slogdet(root)[1][:, None]  # (S, 1, N)
        log_weight = part.unflatten(0, (n_nodes, len(t))) + log_w[:, None] + log_det
        return PlacedRows(given, log_weight, constrained(at.space, u).unflatten(0, (n_nodes, len(t))))


def hermite(width: int, n_nodes: int) -> tuple[Tensor, Tensor]:
    """Points t (Q, d) in units of the posterior's root, and log-weights (Q,) of a density there.

    The integral of f is sum_q exp(log_weight_q) |root| f(mode + root t_q), exact where f is the Gaussian times a
    polynomial of degree 2 n - 1 along each axis.
    """
    one, weight = np.polynomial.hermite.hermgauss(n_nodes)
    t = np.array(list(product(one, repeat=width))).reshape(n_nodes**width, width)
    log_w = np.array([sum(c) for c in product(np.log(weight), repeat=width)])
    log_weight = log_w + np.square(t).sum(-1) + 0.5 * width * math.log(2)
    return torch.as_tensor(math.sqrt(2) * t), torch.as_tensor(log_weight)


def log_t(t: Tensor) -> Tensor:
    """Log-density of a multivariate Student-t of unit scale: (..., d) -> (...)."""
    width = t.shape[-1]
    return (
        math.lgamma((DEGREES + width) / 2)
        - math.lgamma(DEGREES / 2)
        - width / 2 * math.log(DEGREES * math.pi)
        - (DEGREES + width) / 2 * torch.log1p(t.square().sum(-1) / DEGREES)
    )


def _rule(width: int, fine: bool) -> tuple[Tensor, Tensor]:
    """Points and log-weights inside a row, as `hermite`; ``fine`` to see the error of the others."""
    if width <= MAX_HERMITE:
        n_nodes = ROW_NODES[width]
        return hermite(width, (2 * n_nodes if width <= 2 else n_nodes + 3) if fine else n_nodes)
    # the same Sobol points for all rows and nodes, so that what they give is smooth in the latents of the data set
    n_points = 8 * ROW_DRAWS if fine else ROW_DRAWS
    point = qmc.Sobol(width + 1, seed=0).random(n_points)
    t = norm.ppf(point[:, :-1]) * np.sqrt(DEGREES / chi2.ppf(point[:, -1:], DEGREES))
    t = torch.as_tensor(t)
    return t, -log_t(t) - math.log(n_points)


# ----------------------------------------------------------------------------------------------------------- helpers


def _draws(model: Model, filled: tuple[Any, ...], n: int) -> list[Trace]:
    """Runs that differ, always the same ones."""
    traces = []
    with torch.random.fork_rng():
        for seed in range(n):
            torch.manual_seed(seed)
            traces.append(run(model, filled))  # which leaves the random state as it was
    return traces


def _node(values: dict[str, Tensor], s: int) -> dict[str, Tensor]:
    return {name: v[s] for name, v in values.items()}


def _log_prior(trace: Trace, latents: tuple[Latent, ...], like: Tensor) -> Tensor:
    """log p of these sites of a run: (N,), or (1,) of the data set."""
    total = like.new_zeros(1)
    for latent in latents:
        node = node_of(trace, latent.name)
        total = total + rows_first(node["fn"].log_prob(node["value"]), latent.row_axis).sum(-1)
    return total


def _awkward(
    model: Model, args: tuple[Any, ...], program: Program, held: dict[str, Tensor]
) -> tuple[str, ...]:
    """The continuous latents that a linear-Gaussian map leaves over: all of them where there is no such map."""
    everything = program.continuous
    if program.discrete or {s.kind for s in program.sites} - {"Normal", "MultivariateNormal"}:
        return everything
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trace = run(model, tuple(fill(a) for a in args))
    drawn = {n: node_of(trace, n)["value"].detach() for n in everything}
    if held:  # of a row: are they, all together?
        try:
            LinearGaussian(FixedSites(model, held), args)
            return ()
        except NotAffine:
            pass
    kept = []
    for name in everything:
        others = {n: v for n, v in drawn.items() if n != name}
        try:
            LinearGaussian(FixedSites(model, {**held, **others}), args)
            kept.append(name)
        except NotAffine:
            continue
    rest = tuple(n for n in everything if n not in kept)
    if not kept or not rest:  # all of them could be integrated, but nodes were asked for
        return everything
    try:  # one by one they are; all together?
        LinearGaussian(FixedSites(model, {**held, **{n: drawn[n] for n in rest}}), args)
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
