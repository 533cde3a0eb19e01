"""Where nodes go: the mode and curvature of each row's latents given what is visible of it.

The posterior of the unconstrained latents u of a row is located by Newton's method on log p(u, x_R), all rows side by
side, and nodes are placed around it: Gauss-Hermite nodes (Liu & Pierce 1994), or draws from a wider distribution.

Where latents of the data set stand beside latents of each row, the first take these nodes. Given each of them rows are
independent, and each is integrated by itself: in closed form, or with nodes around its own mode.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.predictors.gaussian.linear import LinearRows
from bayes_mpt.predictors.nodes.conjugacy import log_prior_of, node_values, non_conjugate, prior_draws
from bayes_mpt.predictors.nodes.given import AffineBatch, Factorized, Given
from bayes_mpt.predictors.nodes.group_nodes import GroupNodes
from bayes_mpt.predictors.nodes.mixture import Modes
from bayes_mpt.predictors.nodes.nearby import Nearby
from bayes_mpt.predictors.nodes.newton import (
    LaplaceApproximation,
    curvature,
    newton,
    root_of,
    times_covariance,
)
from bayes_mpt.predictors.nodes.placing import SHARPER, Placing, RowDensity, located, several
from bayes_mpt.predictors.nodes.row_nodes import RowNodes
from bayes_mpt.predictors.nodes.rules import MAX_HERMITE, Detail, degrees_of, hermite, log_t
from bayes_mpt.predictors.nodes.weighted import FixedSites, program_values
from bayes_mpt.program.affine import read_side_by_side
from bayes_mpt.program.arguments import Args
from bayes_mpt.program.batched import Batched, found_out
from bayes_mpt.program.factor_runs import read_factors
from bayes_mpt.program.latents import Space, refuse_moving, space
from bayes_mpt.program.program import Latent, Model, ModelError, Program, list_names, n_rows_of, split_events
from bayes_mpt.program.run import SetLatents, run
from bayes_mpt.program.sites import is_subsample, node_of, rows_given_shared
from bayes_mpt.program.store import own_random_state
from bayes_mpt.program.unconstrained import UNCONSTRAINED
from bayes_mpt.program.value_checks import check_values

__all__ = ["AdaptiveNodes", "LaplaceApproximation", "degrees_of", "hermite", "log_t"]

SURE = 1e-12  # of a log-density: what its last digits say
SURE_INSIDE = 1e-6  # the same given nodes of other latents: the last step squares what is left
SURE_OF_NODES = 1e-9  # the same where rows are integrated by nodes that move
SURE_OF_DRAWS = 1e-4  # and where these are draws: slopes leave out that they move
MAX_STEPS = 100
N_START_DRAWS = 9
ONE_MODE = Placing()
FARTHEST_START = 20.0  # of a latent that is not free: half of Gamma(0.001, 0.001) lies below e^-700


class _Held(NamedTuple):
    """Latents of the data set beside a program of the rows alone."""

    latents: tuple[Latent, ...]
    draws: dict[str, Tensor]
    """(2, ...) two values of each, to find out with what the program is."""


class AdaptiveNodes:
    """A program at chosen values of some of its continuous latents, the rest of them integrated given these.

    Parameters
    ----------
    model : callable
        A Pyro program.
    args : Args
        What it is called with.
    program : Program
        What `analyze` found.
    held : _Held, optional
        Latents that are no part of ``program``: every evaluation is given values of them.

    Attributes
    ----------
    space : Space
        Of the latents that take nodes.
    gaussian : tuple of str
        Names of those that are integrated in closed form given the nodes.
    rows : RowNodes or GroupNodes, optional
        How latents of each row, or of each group, are integrated given nodes of those of the data set.
    """

    def __init__(self, model: Model, args: Args, program: Program, held: _Held | None = None):
        self._held = held or _Held((), {})
        first = node_values(self._held.draws, 0)
        with own_random_state():
            trace = run(model, args.filled, first)
        refuse_moving(program, trace)
        self._last: tuple[torch.Size, Tensor] | None = None
        self.nearby, self.model, self.program = Nearby(), model, program
        names, self._template = non_conjugate(model, args, program, first)
        self.rows = self._nested(args, trace, names)
        if self.rows is not None:
            own = self.rows.own
            names, self._template = tuple(n for n in program.continuous if n not in own), None
        elif self._template is not None:
            self.program = split_events(program)
        self.space: Space = space(self.program, trace, names)
        inside = program.continuous if self.rows is None else ()
        self.gaussian = tuple(n for n in inside if n not in names)
        check_values(model, args.filled, self.program)
        if self.rows is not None:
            self.batched = self.rows.batched
            self._prior = self.rows.prior_left(model, tuple(p.latent for p in self.space.parts), args.filled)
        else:
            self.batched = Batched.LOOP
            self.batched = self._found_out(args)

    @property
    def sure(self) -> float:
        """Of a log-density: what its last digits say."""
        if self.rows is None:
            return SURE
        return SURE_OF_NODES if self.rows.width <= MAX_HERMITE else SURE_OF_DRAWS

    @property
    def inside(self) -> str:
        """What is integrated without nodes, and how nodes are run, in words."""
        if self.rows is not None:
            return self.rows.inside
        out = f"; given them {list_names(self.gaussian)} in closed form" if self.gaussian else ""
        out += f"; {list_names(self.program.discrete)} summed out" if self.program.discrete else ""
        return out + ("; node by node" if self.batched is Batched.LOOP else "")

    @property
    def n_evaluations(self) -> int:
        """How often a node costs the log-densities of all tokens, at the most."""
        if self.rows is not None:
            return self.rows.n_evaluations
        return 1 if self._template is None else self._template.structure.n_latents + 4

    def at(self, args: Args, u: Tensor, held: dict[str, Tensor] | None = None) -> tuple[Given, Tensor, float]:
        """The inner model at nodes u (S, N, d), the weights' part (S, N) that it leaves out, and the scale.

        ``held`` are values (S, ...) of the latents that are no part of the program.
        """
        values, log_det = self.space._replace(depth=0).values(u)
        if len(u) == 1:
            values = {name: v[None] for name, v in values.items()}
        values = {**(held or {}), **values, **self.space.carried(u)}
        if self.rows is not None:
            rows, prior = self.given(args, values)
            return rows, log_det + prior, 1.0
        if self._template is not None:
            return self._by_maps(args, values, log_det)
        if self.batched is Batched.PLATE or len(u) == 1:
            nodes = self._on_plate(values) if len(u) > 1 else node_values(values, 0)
            factors = read_factors(self.model, args.filled, self.program, nodes, len(u))
            return Factorized(factors), log_det, factors.scale
        alone = partial(read_factors, self.model, args.filled, self.program)
        if self.batched is Batched.VMAP:
            factors = alone(values, len(u), self.batched)
            return Factorized(factors), log_det, factors.scale
        parts = [alone(node_values(values, s)) for s in range(len(u))]
        return Factorized(*parts), log_det, parts[0].scale

    def given(self, args: Args, values: dict[str, Tensor]) -> tuple[Given, Tensor]:
        """The rows or groups at values (S, ...) of the other latents, and what of log p they leave out (S, 1)."""
        assert self.rows is not None
        given = self.rows.given(args, values)
        left = (
            args.filled[0].new_zeros(1, 1)
            if self._prior is None
            else self._prior.log_prob(args.filled, values)
        )
        return given, left

    def _by_maps(self, args: Args, values: dict[str, Tensor], log_det: Tensor) -> tuple[Given, Tensor, float]:
        """`at` where the rest is linear-Gaussian."""
        assert self._template is not None
        latents = tuple(p.latent for p in self.space.parts)
        if self.batched is not Batched.LOOP:
            mapped = self.batched is Batched.VMAP
            depth = None if mapped else self.program.depth
            nodes = values if mapped else self._on_plate(values)
            form = self._template.form
            reading, prior = read_side_by_side(self.model, args.given, form, nodes, latents, depth)
            log_weight = log_det + prior
            silent = ~(reading.noise > 0).all(-1)  # (S N,)
            if bool(silent.any()) and not bool(silent.all()):  # without noise no density: others have theirs
                reading = reading._replace(noise=torch.where(silent[:, None], 1.0, reading.noise))
                log_weight = torch.where(silent.unflatten(0, (len(log_det), -1)), -math.inf, log_weight)
            given = AffineBatch(beside=(LinearRows(form.program, reading), len(log_det)))
            return given, log_weight, reading.scale
        maps, priors = [], []
        for s in range(len(log_det)):
            node = node_values(values, s)
            maps.append(self._template.with_model(FixedSites(self.model, node)).read(args.given))
            with own_random_state():  # the others are drawn, and do not matter
                trace = run(FixedSites(self.model, node, hide=False), args.filled)
            priors.append(log_prior_of(trace, latents, args.filled[0]))
        return AffineBatch(maps), log_det + torch.stack(priors), maps[0].scale

    def _on_plate(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Values (S, ...) for a run on a plate of nodes, left of all plates."""
        n_batch = {s.name: s.n_batch for s in (*self._held.latents, *(p.latent for p in self.space.parts))}
        return {
            name: v.reshape(
                len(v), *(1,) * (self.program.depth - n_batch[name.removeprefix(UNCONSTRAINED)]), *v.shape[1:]
            )
            for name, v in values.items()
        }

    # ----------------------------------------------------------------------------------- latents of the data set alone

    def _nested(self, args: Args, trace: Trace, names: tuple[str, ...]) -> RowNodes | GroupNodes | None:
        """What is integrated piece by piece given the other latents: rows, or else groups.

        Groups where nothing has a closed form, or where what that leaves over is too much for a rule of nodes.
        """
        rows = self._rows(args, trace, names)
        if rows is not None or self._held.latents:
            return rows
        width = space(self.program, trace, names).width
        if self._template is not None and width <= MAX_HERMITE:
            return None
        groups = GroupNodes.of(self.model, args.filled, self.program)
        if groups is None or self._template is None:
            return groups
        others = (n for n in self.program.continuous if n not in groups.own)
        return groups if space(self.program, trace, others).width < width else None

    def _rows(self, args: Args, trace: Trace, names: tuple[str, ...]) -> RowNodes | None:
        """The rows given the latents of the data set: where nodes would be needed in every row besides."""
        own = rows_given_shared(self.program, trace)
        if own is None or not set(names) & set(own.latent_names):
            return None
        shared = tuple(s for s in self.program.latents if s.name not in own.latent_names)
        if any(s.discrete for s in shared) or not shared or self.program.scale != 1.0:
            return None
        traces = prior_draws(self.model, args.filled, 2)
        draws = [{s.name: node_of(t, s.name)["value"].detach() for s in shared} for t in traces]
        held = _Held(shared, {s.name: torch.stack([d[s.name] for d in draws]) for s in shared})
        try:
            adaptive = AdaptiveNodes(self.model, args, own, held)
        except ModelError:
            return None
        rows = RowNodes.of(adaptive, {n: node_of(trace, n)["value"].detach() for n in own.latent_names})
        others = {n: node_of(traces[0], n)["value"].detach() for n in own.latent_names}
        return rows if self._separates(args, rows, others) else None

    def _separates(self, args: Args, rows: RowNodes, others: dict[str, Tensor]) -> bool:
        """Whether each row looks at its own latents only, and the latents of the data set at no row's."""
        at = rows.adaptive
        latents, node = at._held.latents, node_values(at._held.draws, 0)
        x = program_values(self.model, args, at.program)
        with torch.no_grad():
            prior = [
                log_prior_of(run(self.model, args.filled, {**v, **node}), latents, x)
                for v in (rows.values, others)
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
                given, part, _ = at.at(args, u, one)
                return (part + given.log_joint(x, torch.ones_like(x, dtype=torch.bool)))[0]

            want = torch.where(half[:, 0], by_row(a), by_row(b))
            return bool(torch.allclose(by_row(torch.where(half, a, b)), want, rtol=1e-9, equal_nan=True))

    # ------------------------------------------------------------------------------------------------------- checks

    @torch.no_grad()
    def _found_out(self, args: Args) -> Batched:
        """How the program takes several nodes: whether two give together what they give apart."""
        n_rows, drawn_rows, rtol = n_rows_of(self.program, args.filled), dict[str, Tensor](), 1e-6
        if self._template is None:
            traces = prior_draws(self.model, args.filled, 2)
            drawn_rows = {name: node["value"] for name, node in traces[0].nodes.items() if is_subsample(node)}
            u = torch.cat([self.space.pack(trace, n_rows) for trace in traces])
            x = u.new_zeros(n_rows, self.program.n_tokens)
        else:
            start, rtol = self.start(args), 1e-8
            u = torch.stack([start, start + 0.3])
            x = program_values(self.model, args, self.program)
        everything = torch.ones_like(x, dtype=torch.bool)

        def log_joint(s: slice) -> Tensor:
            held = {name: v[s] for name, v in self._held.draws.items()}
            given, part, _ = self.at(args, u[s], held)
            return part + given.log_joint(x, everything)

        def same(batched: Batched) -> bool:
            self.batched = batched
            return bool(torch.allclose(log_joint(slice(2)), apart, rtol=rtol, equal_nan=True))

        with SetLatents(drawn_rows):
            apart = torch.cat([log_joint(slice(s, s + 1)) for s in range(2)])
            return found_out(same)

    # ---------------------------------------------------------------------------------------------------- the mode

    def start(self, args: Args) -> Tensor:
        """(N, d): medians of a few draws from the prior."""
        with torch.no_grad():
            n_rows = n_rows_of(self.program, args.filled)
            if not self.space.parts:
                return args.filled[0].new_zeros(n_rows, 0)
            draws = [
                self.space.pack(t, n_rows)[0] for t in prior_draws(self.model, args.filled, N_START_DRAWS)
            ]
        return self.within_reach(torch.stack(draws).median(0).values)

    def within_reach(self, u: Tensor) -> Tensor:
        """u (..., d) with 0 for scales and shares that a vague prior puts where no climb comes back from."""
        far = torch.tensor(self.space.bounded, device=u.device) & ~(u.abs() < FARTHEST_START)
        return torch.where(far, 0.0, u)

    def forget(self) -> None:
        """Look for the next modes from the start, not from the last ones."""
        self._last = None
        self.nearby.forget()
        if self.rows is not None:
            self.rows.forget()

    def locate(
        self,
        args: Args,
        x: Tensor,
        visible: Tensor,
        placing: Placing = ONE_MODE,
        cut: float | None = None,
        held: dict[str, Tensor] | None = None,
        near: Modes | None = None,
    ) -> Modes:
        """The modes of each row's latents given its visible tokens: Newton's method, saddles turned into descents.

        From ``near``, that of other visible tokens of the same rows; else from where the last search has ended, or
        where rows with several modes begin. With values (S, ...) of the latents that are held, of S N rows.
        """
        fixed = {name: v.detach() for name, v in (held or {}).items()}
        n_nodes = len(next(iter(fixed.values()))) if fixed else 1
        if not self.space.parts:  # all latents are integrated inside
            n = n_nodes * len(x)
            return Modes.one(LaplaceApproximation(x.new_zeros(n, 0), x.new_zeros(n, 0, 0)))
        log_prob = self.row_density(args, x, visible, fixed)
        placing = placing.serves(len(x))
        u = None if near is None or len(near.mode) > 1 else near.mode
        stands = partial(self._stands, log_prob, args, n_nodes)
        if placing.starts is not None:
            u = x.new_zeros(1, len(x), self.space.width)  # they begin elsewhere
        elif u is None and fixed:
            u = self.nearby.start(fixed, (len(x), self.space.width))
        elif u is None and self._last is not None and self._last[0] == x.shape:
            u = self._last[1]  # a training asks again and again, with little change
        start = (stands() if u is None else u).expand(n_nodes, *x.shape[:1], self.space.width)
        sure = max(self.sure, SURE_INSIDE) if fixed else self.sure
        # values that are held may have moved far since the nearest mode was found
        lost = partial(stands, u) if fixed and u is not None else None
        found = located(log_prob, start, placing, cut, MAX_STEPS, sure, not fixed, lost)
        good = torch.isfinite(found.mode).all(-1).all(-1)  # (J,)
        if placing.starts is not None:
            return found
        if fixed:
            self.nearby.keep(fixed, found.mode.unflatten(1, (n_nodes, -1))[0])
        elif near is None and bool(good.any()):
            self._last = x.shape, found.mode[good].mean(0)
        return found

    def row_density(
        self,
        args: Args,
        x: Tensor,
        visible: Tensor,
        held: dict[str, Tensor],
        power: float = 1.0,
    ) -> RowDensity:
        """log p(u, x_R) of every row, at values (S, ...) of the latents that are held; p(x_R | u) to a power."""
        n_nodes = len(next(iter(held.values()))) if held else 1

        def log_prob(u: Tensor, nodes: Tensor) -> Tensor:
            whole = len(nodes) == n_nodes and bool(
                (nodes == torch.arange(n_nodes, device=nodes.device)).all()
            )
            some = held if whole else {name: v[nodes] for name, v in held.items()}
            given, part, _ = self.at(args, u, some)
            joint = given.log_joint(x, visible)
            more = 0.0 if power == 1.0 else (power - 1) * (joint - given.log_prior(x))
            return part + joint + more

        return log_prob

    @torch.no_grad()
    def row_starts(
        self,
        args: Args,
        x: Tensor,
        visible: Tensor,
        held: dict[str, Tensor] | None = None,
    ) -> Tensor | None:
        """Where climbs to several modes (J, N, d) of each row begin, at one value of what is held.

        None where every row has one.
        """
        filled, n_rows = args.filled, len(x)
        main = self.locate(args, x, visible, held=held)
        traces = prior_draws(self.model, filled, N_START_DRAWS)
        draws = torch.stack([self.within_reach(self.space.pack(t, n_rows)[0]) for t in traces])
        log_prob = self.row_density(args, x, visible, held or {})
        sharper = self.row_density(args, x, visible, held or {}, SHARPER)
        return several(log_prob, sharper, main, draws.detach(), MAX_STEPS, self.sure)

    @torch.no_grad()
    def _stands(self, log_prob: RowDensity, args: Args, n_nodes: int, last: Tensor | None = None) -> Tensor:
        """(..., N, d) where to begin: where log p is greatest, at the last mode or else the middle of the prior, or 0.

        A middle drawn of a wide prior may be where every density is 0, or so far from the rows that none has a slope.
        """
        middle = self.start(args) if last is None else last
        if not middle.numel():
            return middle
        best, most = middle.expand(n_nodes, *middle.shape[-2:]), None
        nodes = torch.arange(n_nodes, device=middle.device)
        for u in (middle, torch.zeros_like(middle)):
            try:
                value = log_prob(u.expand_as(best), nodes)
                value = torch.where(value.isfinite(), value, -math.inf)
            except ValueError:  # no distribution there
                continue
            best = u.expand_as(best) if most is None else torch.where((value > most)[..., None], u, best)
            most = value if most is None else torch.maximum(most, value)
        return best

    def refine_gaussian(
        self, args: Args, x: Tensor, visible: Tensor, near: LaplaceApproximation, draws: Tensor
    ) -> LaplaceApproximation:
        """Newton's step of the mean log-density over draws (S, N, d) of a Gaussian, and the mean curvature there.

        Both end at the Gaussian closest to the posterior (Opper & Archambeau 2009), where Laplace's sees a point.
        """
        offsets = (near.root @ draws[..., None])[..., 0]
        detail: Detail = "rough" if self.rows is not None and self.rows.width <= MAX_HERMITE else "usual"

        def log_prob(u: Tensor, nodes: Tensor) -> Tensor:
            given, part, _ = self.at(args, u[0] + offsets)
            # a proposal is made of it, and each draw costs a curvature through the nodes of all rows or groups
            return (part + given.with_detail(detail).log_joint(x, visible)).mean(0, keepdim=True)

        found = newton(log_prob, near.mode[None], 1, SURE)
        return LaplaceApproximation(found.mode[0], found.root[0])

    @torch.enable_grad()
    def laplace(self, args: Args, x: Tensor, visible: Tensor) -> Tensor:
        """Laplace's approximation of log Z of each row (N,), with its gradient to the program's parameters.

        log p(u, x) + log |root| + d/2 log 2 pi,    root root' = (-d^2 log p / du^2)^-1,    at the mode u
        """
        mode = self.locate(args, x, visible).mode[0].requires_grad_()
        log_prob = self.log_prob(args, x, visible, mode[None], {})[0]
        (slope,) = torch.autograd.grad(log_prob.sum(), mode, create_graph=True)
        root = root_of(curvature(slope, mode))
        # The mode moves with the parameters as Newton's next step does, whose length is zero.
        u = mode.detach() + times_covariance(root, slope)
        # d log |root| = 1/2 sum_s d (r_s' H r_s), H the second derivative, along the columns r_s of the root
        along = u.new_zeros(u.shape[1], len(u), requires_grad=True)  # (d, N)
        log_prob = self.log_prob(args, x, visible, u + along[..., None] * root.permute(2, 0, 1), {})
        (first,) = torch.autograd.grad(log_prob.sum(), along, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), along, create_graph=True)
        bend = 0.5 * second.sum(0)
        log_root = torch.linalg.slogdet(root)[1] + bend - bend.detach()
        return log_prob[0] + log_root + 0.5 * u.shape[1] * math.log(2 * math.pi)

    def log_prob(
        self,
        args: Args,
        x: Tensor,
        visible: Tensor,
        u: Tensor,
        held: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """log p(u, x_R) of nodes u (S, N, d): (S, N)."""
        given, part, _ = self.at(args, u, held)
        return part + given.log_joint(x, visible)
