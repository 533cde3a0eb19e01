"""Importance sampling: nodes drawn from a guide, or around the mode of each row's posterior."""

from __future__ import annotations

import math
from contextlib import ExitStack
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.autograd.function import once_differentiable

from bayes_mpt.diagnostics import BAD_K, pareto_k
from bayes_mpt.predictors.base import Evidence, Guide, Predictor
from bayes_mpt.predictors.nodes.adaptive import AdaptiveNodes, degrees_of, log_t
from bayes_mpt.predictors.nodes.given import Factorized, Given, Mapped, Stacked
from bayes_mpt.predictors.nodes.weighted import Nodes, Read, Reader, constrained, nodes_first, program_values
from bayes_mpt.program.analysis import analyze
from bayes_mpt.program.arguments import fill, filling
from bayes_mpt.program.devices import own_random_state
from bayes_mpt.program.factors import read_factors
from bayes_mpt.program.layout import rows_axis, sum_by_row
from bayes_mpt.program.program import Latent, Model, ModelError, Program, n_rows_of, one_vector
from bayes_mpt.program.run import NODES, SetLatents, one_precision, run, takes_visible
from bayes_mpt.program.simulation import simulate
from bayes_mpt.program.sites import base, is_subsample, latent_nodes
from bayes_mpt.program.trials import CLOSE

__all__ = ["Drawn", "GuideDraws", "Importance", "Sampled"]

N_WIDENINGS = 6  # steps from Laplace's Gaussian towards the closest one
WIDENING_COST = 200_000_000
GROWTH = 3  # of the number of draws from stage to stage of a training
MAX_CONDITIONED_DRAWS = 10  # draws of a step of the training, from a guide that is conditioned on the mask


class Importance(Predictor):
    """Weighted draws: w_s = p(u_s, x) / q(u_s), shared along a chain, so that the score is the importance bound.

    Parameters
    ----------
    num_particles : int, default=100
        S draws for each row.
    training_particles : int, optional
        As many of a step of the training. None: as many as ``num_particles``, but at most 10 of a guide that is
        conditioned on the mask, whose draws hardly cost less than the program at each of them.
    doubly_reparameterized : bool, optional
        Whether a chain's gradient in a guide's parameters is that of Tucker, Lawson, Gu & Maddison (2019): the same
        expectation with less noise from the draws, for a step that takes a little longer.
        False gives the gradient of the bound itself, that of `pyro.infer.RenyiELBO`. None: where the guide is
        conditioned on the mask. Guides whose draws have no ``rsample``, or that cannot be drawn side by side, have the
        latter in any case.
    dream : bool, default=False
        Whether a guide that is conditioned on the mask is trained also on rows that the program makes, random tokens of
        them hidden (the sleep phase of Hinton, Dayan, Frey & Neal 1995): single conditionals of complete rows get
        nearer, while the program itself learns more slowly. For trainings by epochs.

    Notes
    -----
    With a guide (hand-written or from `pyro.infer.autoguide`) its parameters are trained with the program's. A guide
    that takes an argument ``visible`` is called as ``guide(x, ..., visible=visible)``, x zero and ``visible`` (N, T)
    False where a token is hidden: then single conditionals can be asked for too. Without a guide the draws are
    Student-t (5 degrees of freedom) around the mode of each row's posterior, which is located afresh for every
    visible set.

    Of the whole-row weights Pareto's k and the effective sample size are reported (Vehtari, Simpson, Gelman, Yao &
    Gabry 2024), the worst rows by name; k above 0.7 warns.
    """

    def __init__(
        self,
        num_particles: int = 100,
        training_particles: int | None = None,
        doubly_reparameterized: bool | None = None,
        dream: bool = False,
    ):
        self.num_particles = num_particles
        self.training_particles = training_particles
        self.dream = dream
        self.doubly_reparameterized = doubly_reparameterized

    def bind(self, model: Model, args: tuple[Any, ...], guide: Guide | None = None) -> Nodes:
        for name in ("num_particles", "training_particles"):
            value = getattr(self, name)
            if (value is not None or name == "num_particles") and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        program = analyze(model, args)
        if not program.continuous:
            raise ModelError("the program has no continuous latent, so nothing to draw: use Exact()")
        if guide is None:
            return Nodes(_AroundMode(AdaptiveNodes(model, args, program), self.num_particles))
        conditioned_on_mask = takes_visible(guide)
        n_training = self.training_particles
        if n_training is None:
            n_training = min(
                self.num_particles, MAX_CONDITIONED_DRAWS if conditioned_on_mask else self.num_particles
            )
        twice = conditioned_on_mask if self.doubly_reparameterized is None else self.doubly_reparameterized
        return Nodes(
            GuideDraws(model, guide, args, program, self.num_particles, n_training, twice, self.dream)
        )


class Sampled(Reader):
    """What draws have in common: their error."""

    sampled = True
    name = "Importance"

    def evidence(self, nodes: Nodes, x: Tensor) -> Evidence:
        everything = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
        with torch.no_grad():
            log_w = nodes.last.log_weight + nodes.last.given.log_joint(x, everything)  # (S, N)
        n_draws = len(log_w)
        # of a row that is impossible under every draw, all are worth the same
        log_w = torch.where(log_w.amax(0) == -math.inf, 0.0, log_w)
        share = log_w.softmax(0)
        ess = 1 / share.square().sum(0)
        # relative variance of the mean weight: (sum_s share^2 - 1/S) S / (S - 1)
        variance = (share.square().sum(0) - 1 / n_draws).clamp(min=0) * n_draws / max(1, n_draws - 1)
        # E log Z^ = log Z - variance / 2: put back, so that rows do not add up their biases
        joint = nodes.joint(x).detach()
        by_row = joint + variance / 2
        # where rows have nodes of their own inside: what more of these change
        finer = nodes.refined()
        inside = torch.zeros_like(joint) if finer is nodes else finer.joint(x).detach() - joint
        k = pareto_k(log_w.double().cpu().numpy())
        worst = np.argsort(-np.nan_to_num(k, nan=-np.inf))[:5]
        diagnostics = {
            "num_particles": n_draws,
            "pareto_k": float(np.nanmax(k)) if not np.isnan(k).all() else math.nan,
            "rows_with_bad_k": int((k > BAD_K).sum()),
            "worst_rows": [(int(i), float(k[i])) for i in worst],
            "log_weight_sd": float(log_w.std(0, correction=1 if n_draws > 1 else 0).mean()),
            "ess_min": float(ess.min()),
            "ess_mean": float(ess.mean()),
        }
        if bool((inside != 0).any()):
            diagnostics["change with more nodes in each row"] = float(inside.sum())
        se = math.hypot(float(variance.sum().sqrt()), float(inside.sum()))
        return Evidence(by_row + inside, se, diagnostics)


class _AroundMode(Sampled):
    """Student-t draws around the mode of each row's posterior."""

    located = True

    def __init__(self, adaptive: AdaptiveNodes, n_draws: int):
        self.adaptive, self.n_draws = adaptive, n_draws
        self.climbs = not adaptive.program.by_row
        self.model, self.program = adaptive.model, adaptive.program
        self.one_by_one = adaptive.one_by_one
        self.why = (
            f"{n_draws} Student-t draws of {', '.join(adaptive.space.names)} around the mode of each row's "
            f"posterior{adaptive.inside}"
        )

    def read(self, args: tuple[Any, ...], visible: Tensor | None = None) -> Read:
        filled = tuple(fill(a) for a in args)
        value = program_values(self.model, args, filled, self.program)
        if visible is None:
            visible = torch.ones(value.shape[1], dtype=torch.bool, device=value.device)
        near = self.adaptive.locate(args, value, visible)
        if self.climbs:
            # each draw costs a curvature, d^3 operations
            n_pairs = max(4, min(64, WIDENING_COST // near.mode.shape[1] ** 3))
            for _ in range(N_WIDENINGS):
                half = torch.randn(n_pairs, *near.mode.shape, dtype=near.mode.dtype).to(near.mode)
                near = self.adaptive.refine_gaussian(args, value, visible, near, torch.cat([half, -half]))
        mode, root = near
        n_rows, width = mode.shape
        # multivariate t: a normal vector over the root of a chi-square that its axes share
        normal = torch.randn(self.n_draws, n_rows, width, dtype=mode.dtype).to(mode)
        degrees = degrees_of(width)
        chi = torch.distributions.Chi2(torch.tensor(degrees, dtype=mode.dtype))
        t = normal * (degrees / chi.sample((self.n_draws, n_rows)).to(mode))[..., None].sqrt()
        u = mode + (root @ t[..., None])[..., 0]
        log_q = log_t(t, degrees) - torch.linalg.slogdet(root)[1]
        given, part, scale = self.adaptive.at(args, filled, u)
        log_weight = part - log_q - math.log(self.n_draws)
        latents = constrained(self.adaptive.space, u)
        return Read(given, log_weight, value, scale, latents, self.adaptive.space.names)

    def objective(self, args: tuple[Any, ...]) -> Tensor:
        value = program_values(self.model, args, tuple(fill(a) for a in args), self.program)
        visible = torch.ones(value.shape[1], dtype=torch.bool, device=value.device)
        return self.adaptive.laplace(args, value, visible)


class _Along(torch.autograd.Function):
    """log q of draws, the draws and what else the guide made of them; the gradient doubly reparameterised.

    With shares v_s of the weights w_s = p(x, z_s) / q(z_s), z_s = z(noise, phi), both of

        d/d phi log mean w = sum_s v_s   (d log w_s / d z_s  d z_s / d phi  -  d log q(z_s) / d phi)
                             sum_s v_s^2  d log w_s / d z_s  d z_s / d phi

    have the same expectation. What arrives for log q is -v_s times something that the draws of a row share, so that v
    can be read off it.
    """

    @staticmethod
    def forward(ctx: Any, drawn: _Leaves, found: list[Tensor], *raw: Tensor) -> Any:
        ctx.drawn, ctx.found = drawn, found
        return tuple(t.detach() for t in (*found, *drawn.leaves))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        drawn, found, leaves = ctx.drawn, ctx.found, ctx.drawn.leaves
        total = grads[0].sum(0)
        share = torch.where(total == 0, 0.0, grads[0] / total)  # 0: a row without any visible token
        moving = [i for i, f in enumerate(found) if f.requires_grad]
        inner = torch.autograd.grad(
            [found[i] for i in moving],
            leaves,
            [grads[i] for i in moving],
            retain_graph=True,
            materialize_grads=True,
        )
        back = [
            share.reshape(layout) * (a + b)
            for layout, a, b in zip(drawn.layouts, inner, grads[len(found) :], strict=True)
        ]
        for i in range(len(leaves) - 1, 0, -1):  # later draws that were made from earlier ones
            if drawn.raw[i].requires_grad:
                more = torch.autograd.grad(
                    drawn.raw[i], leaves[:i], back[i], retain_graph=True, allow_unused=True
                )
                back[:i] = [a if b is None else a + b for a, b in zip(back, more, strict=False)]
        return None, None, *back


class _Leaves(poutine.messenger.Messenger):
    """Hands a guide's draws on as leaves, so that its later sites look at them apart from its parameters."""

    def __init__(self, program: Program, n: int):
        super().__init__()
        self.program, self.n = program, n
        self.names: list[str] = []
        self.raw: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self.layouts: list[list[int]] = []
        """Shapes that bring (S, N) beside each draw."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_subsample(msg) or _is_point(msg):
            return
        value, axis = msg["value"], rows_axis(msg, self.program)
        layout = [1] * value.ndim
        if self.n > 1:
            layout[0] = self.n
        if axis is not None:
            layout[axis - msg["fn"].event_dim] = -1
        msg["value"] = value.detach().requires_grad_()
        self.names.append(msg["name"])
        self.raw.append(value)
        self.leaves.append(msg["value"])
        self.layouts.append(layout)


class GuideDraws(Sampled):
    """Draws from a guide."""

    def __init__(
        self,
        model: Model,
        guide: Guide,
        args: tuple[Any, ...],
        program: Program,
        n_draws: int,
        n_training: int,
        doubly_reparameterized: bool = False,
        dreams: bool = False,
    ):
        self.model, self.guide, self.n_draws, self.n_training = model, guide, n_draws, n_training
        self.dreams = dreams
        self.depth = program.depth
        self.takes_visible = takes_visible(guide)
        self.located = self.takes_visible
        self.away = args[0].device.type != "cpu"
        # the same whatever rows a step is given, and found once: a median costs as much as a third of a step
        self.fillings = tuple(filling(a) for a in args)
        filled = tuple(fill(a) for a in args)
        with own_random_state():
            trace = self._guide_trace(filled, None, 1)
        names = {node["name"] for node in latent_nodes(trace)}
        missing = [n for n in program.continuous if n not in names]
        self.adaptive: AdaptiveNodes | None = None
        if missing:  # those of each row may be left to nodes of their own
            found = AdaptiveNodes(model, args, program)
            if found.rows is not None and not set(found.space.names) & set(missing):
                self.adaptive, missing = found, []
        if missing:
            raise ModelError(
                f"the guide has no site for latent {missing[0]!r} of the program (it has {sorted(names)}): add "
                f"pyro.sample({missing[0]!r}, ...) to the guide"
            )
        extra = [n for n in names if n not in program.latent_names and not _auxiliary(trace.nodes[n])]
        if extra:
            raise ModelError(
                f"the guide samples {extra[0]!r}, which the program does not have: remove it, or mark it "
                'infer={"is_auxiliary": True}'
            )
        first = run(model, filled)
        drawn = program.continuous if self.adaptive is None else self.adaptive.space.names
        for name in drawn:
            ours, theirs = first.nodes[name]["fn"].support, trace.nodes[name]["fn"].support
            shapes = [tuple(t.nodes[name]["value"].shape) for t in (first, trace)]
            if shapes[0] != shapes[1]:
                raise ModelError(
                    f"the guide draws latent {name!r} with shape {shapes[1]}, which has shape {shapes[0]} in the "
                    "program: give the guide's site the same plates and events"
                )
            if not _is_point(trace.nodes[name]) and _is_real(ours) and not _is_real(theirs):
                raise ModelError(
                    f"the guide draws latent {name!r} from {theirs}, while the program lets it be any real number: "
                    "what the guide cannot reach would be left out. Use a guide of the same support"
                )
        random = [n for n in names if not isinstance(trace.nodes[n]["fn"], pyro.distributions.Delta)]
        self.has_points = len(random) < len(names)
        if not random:
            raise ModelError(
                f"the guide puts latent {program.continuous[0]!r} on a single point (Delta): nothing is drawn, so that "
                "nothing can be integrated. Use a guide with a density, such as AutoNormal"
            )
        # Where the guide couples rows, their weights cannot be told apart: one vector.
        coupled = program.by_row and any(
            all(f.name != program.rows_plate for f in trace.nodes[n]["cond_indep_stack"])
            for n in names
            if not isinstance(trace.nodes[n]["fn"], pyro.distributions.Delta)
        )
        frames = [f for n in names for f in trace.nodes[n]["cond_indep_stack"] if f.vectorized]
        self.depth = max([program.depth, *(-f.dim for f in frames)])
        program = one_vector(program) if coupled else program
        self.program = program._replace(depth=self.depth)
        self.guide_parameters = tuple(n for n, s in trace.nodes.items() if s["type"] == "param")
        self.mapped = False
        self.vectorised = self._try_together(args, filled)
        if not self.vectorised and not program.discrete and self.adaptive is None:
            self.mapped = True
            self.vectorised = self.mapped = self._try_together(args, filled)
        self.squared = (
            doubly_reparameterized
            and self.vectorised
            and not self.mapped
            and self._moves_by_draws(filled, trace)
        )
        self.one_by_one = not self.vectorised
        seen = ", which sees what is visible" if self.takes_visible else ""
        self.why = f"{n_draws} draws of {', '.join(drawn)} from the guide{seen}"
        self.why += self.adaptive.inside if self.adaptive is not None else ""
        self.names = drawn
        self.why += "; draw by draw" if self.one_by_one else ""

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.program.parameters, *self.guide_parameters)))

    def dream(self, args: tuple[Any, ...], generator: torch.Generator) -> Tensor | None:
        """Log-density (N,) under the guide of the latents of rows that the program makes, given some of their tokens.

        Maximised by the guide, it is the sleep phase of Hinton, Dayan, Frey & Neal (1995): a guide as wide as the
        posterior, for every set of visible tokens. None where that was not asked for.
        """
        if not self.dreams:
            return None
        conditioned_on_mask = self.takes_visible and self.adaptive is None and not self.has_points
        if (
            not conditioned_on_mask
            or not self.program.by_row
            or self.program.observed_argument != 0
            or self.program.discrete
        ):
            raise ModelError(
                "dream=True needs a guide that draws all latents and is conditioned on the mask, and a program that "
                "observes its first argument, row by row"
            )
        filled = tuple(fill(a) for a in args)
        tokens, latents = simulate(self.model, filled, self.program)
        # every number of visible tokens is as likely as any other, for each row its own
        rank = torch.rand(tokens.shape, generator=generator).argsort(1)
        size = torch.randint(tokens.shape[1] + 1, (len(tokens), 1), generator=generator)
        with SetLatents(latents):
            trace = self._guide_trace((tokens.to(filled[0]), *filled[1:]), (rank < size).to(tokens.device), 1)
        return self._log_q(trace, 1)[0]

    def in_training(self) -> tuple[GuideDraws, ...]:
        """From one draw to as many as asked: with one a step costs least, and the last bring the bound nearest.

        On a GPU all at once: until they fill it they cost what one does.
        """
        n, rising = self.n_training, []
        while n > 1 and self.takes_visible and not self.away:
            rising.append(n)
            n = n // GROWTH
        return tuple(self._with(k) for k in (max(1, n), *reversed(rising)))

    def _with(self, n_draws: int) -> GuideDraws:
        new = copy(self)
        new.n_draws = n_draws
        return new

    def read(self, args: tuple[Any, ...], visible: Tensor | None = None) -> Read:
        filled = tuple(fill(a, v) for a, v in zip(args, self.fillings, strict=True))
        missing = any(f is not a for f, a in zip(filled, args, strict=True))
        value = program_values(self.model, args, filled, self.program) if missing else None
        shown = None if value is None else ~value.isnan()
        if visible is not None:
            shown = visible if shown is None else visible & shown
        if self.vectorised or self.n_draws == 1:
            # nodes for one visible set (of a mask) serve two sums at once, with other shares of the weights
            squared = self.squared and visible is None and torch.is_grad_enabled()
            given, log_weight, scale, latents, tokens = self._draw(args, filled, shown, self.n_draws, squared)
        else:
            draws = [self._draw(args, filled, shown, 1) for _ in range(self.n_draws)]
            given, log_weight = Stacked(tuple(d[0] for d in draws)), torch.cat([d[1] for d in draws])
            latents = torch.cat([d[3] for d in draws])
            scale, tokens = draws[0][2], draws[0][4]
        if value is None:
            value = tokens if tokens is not None else program_values(self.model, args, filled, self.program)
        return Read(given, log_weight - math.log(self.n_draws), value, scale, latents, self.names)

    def drawn(self, args: tuple[Any, ...], visible: Tensor | None) -> Drawn:
        """The rows, and what the guide sees of them."""
        filled = tuple(fill(a, v) for a, v in zip(args, self.fillings, strict=True))
        value = program_values(self.model, args, filled, self.program)
        shown = ~value.isnan() if visible is None else visible & ~value.isnan()
        return Drawn(self, args, filled, value, shown)

    def _draw(
        self,
        args: tuple[Any, ...],
        filled: tuple[Any, ...],
        shown: Tensor | None,
        n: int,
        squared: bool = False,
    ) -> tuple[Given, Tensor, float, Tensor, Tensor | None]:
        """The inner model at n draws, the weights' part (n, N) that it leaves out, scale, latents, and tokens."""
        n_rows = n_rows_of(self.program, filled)
        if squared:
            log_q, values = self._along(filled, shown, n)
        else:
            trace = self._guide_trace(filled, shown, n)
            log_q = self._log_q(trace, n)
            values = {node["name"]: node["value"] for node in latent_nodes(trace)}
        values = {name: value for name, value in values.items() if name in self.program.latent_names}
        given, part, scale, tokens = self._given(args, filled, values, n)
        latents = [
            nodes_first(values[site.name].detach(), site, n, n_rows)
            for site in self.program.latents
            if site.name in values
        ]
        return given, part - log_q, scale, torch.cat(latents, -1).to(log_q), tokens

    def _given(
        self, args: tuple[Any, ...], filled: tuple[Any, ...], values: dict[str, Tensor], n: int
    ) -> tuple[Given, Tensor | float, float, Tensor | None]:
        """The inner model at n draws, what of their log-density it leaves out, the scale, and tokens if it has them."""
        if self.adaptive is None and (n == 1 or not self.mapped):
            factors = read_factors(self.model, filled, self.program, values, n)
            return Factorized(factors), 0.0, factors.scale, factors.value
        rows = n_rows_of(self.program, filled)
        plain = {}
        for site in self.program.latents:
            if site.name in values:
                v = values[site.name]
                v = v[None] if n == 1 else v
                plain[site.name] = v.expand(n, *v.shape[1:]).reshape(n, *_shape(site, rows))
        if self.adaptive is not None:
            return *self.adaptive.given(args, filled, plain), 1.0, None
        given = Mapped(partial(read_factors, self.model, filled, self.program), plain)
        first = given.factors({name: v[0] for name, v in plain.items()})
        return given, 0.0, first.scale, first.value

    def _log_q(self, guide_trace: Trace, n: int) -> Tensor:
        """Of the draws of this trace: (n, N)."""
        parts = [
            sum_by_row(node["fn"].log_prob(node["value"]), rows_axis(node, self.program), n)
            for node in latent_nodes(guide_trace)
        ]
        log_q = sum(parts[1:], parts[0])
        if not math.isfinite(float(log_q.detach().sum())):
            _refuse_infinite(guide_trace)
        return log_q

    def _along(
        self, filled: tuple[Any, ...], shown: Tensor | None, n: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """log q (n, N) and the values of n draws, with the doubly reparameterised gradient."""
        drawn = _Leaves(self.program, n)
        with drawn:
            trace = self._guide_trace(filled, shown, n)
        points = {node["name"]: node["value"] for node in latent_nodes(trace) if _is_point(node)}
        log_q, *values = _Along.apply(drawn, [self._log_q(trace, n), *points.values()], *drawn.raw)
        return log_q, dict(zip((*points, *drawn.names), values, strict=True))

    def _moves_by_draws(self, filled: tuple[Any, ...], trace: Trace) -> bool:
        """Whether all that is random is reparameterised, and points (Delta) move with the draws alone."""
        drawn = {n["name"]: n for n in latent_nodes(trace) if not _is_point(n)}
        if not all(node["fn"].has_rsample for node in drawn.values()):
            return False
        with torch.enable_grad(), SetLatents({name: node["value"].detach() for name, node in drawn.items()}):
            again = self._guide_trace(filled, None, 1)
        return not any(node["value"].requires_grad for node in latent_nodes(again) if _is_point(node))

    def _guide_trace(self, filled: tuple[Any, ...], shown: Tensor | None, n: int) -> Trace:
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
                stack.enter_context(pyro.plate(NODES, n, dim=-1 - self.depth))
            return poutine.trace(self.guide).get_trace(*args, **kwargs)

    def _try_together(self, args: tuple[Any, ...], filled: tuple[Any, ...]) -> bool:
        """Whether guide and program run on several draws side by side."""
        n_rows = n_rows_of(self.program, filled)
        with own_random_state(), torch.no_grad():
            try:
                trace = self._guide_trace(filled, None, 2)
                values = {
                    n["name"]: n["value"]
                    for n in latent_nodes(trace)
                    if n["name"] in self.program.latent_names
                }
                together = self._given(args, filled, values, 2)[0]
                seen = filled[0].new_ones(n_rows, self.program.n_tokens).bool()
                x = program_values(self.model, args, filled, self.program)
                both = together.log_joint(x, seen)
                alone = []
                for s in range(2):
                    one = {}
                    for site in self.program.latents:
                        if site.name in values:
                            v = values[site.name]
                            one[site.name] = v.expand(2, *v.shape[1:])[s].reshape(_shape(site, n_rows))
                    given = self._given(args, filled, one, 1)[0]
                    alone.append(given.log_joint(x, seen))
            except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
                return False
        # sums of many tokens in single precision: a GPU adds them up in another order
        rtol = max(1e-5, CLOSE[both.dtype])
        return bool(torch.allclose(both, torch.cat(alone), rtol=rtol, equal_nan=True))


class Drawn(NamedTuple):
    """A guide on some rows."""

    reader: GuideDraws
    args: tuple[Any, ...]
    filled: tuple[Any, ...]
    value: Tensor
    """(N, T) tokens, NaN where missing."""
    shown: Tensor
    """(N, T) of them are visible."""

    def draw(self, n: int) -> dict[str, Tensor]:
        """Values of the latents at n draws."""
        trace = self.reader._guide_trace(self.filled, self.shown, n)
        return {k: trace.nodes[k]["value"].detach() for k in self.reader.names}

    def log_q(self, values: dict[str, Tensor], n: int) -> Tensor:
        """Log-density (n, N) of the guide at n values of the latents."""
        with SetLatents(values):
            trace = self.reader._guide_trace(self.filled, self.shown, n)
        return self.reader._log_q(trace, n)

    def given(self, values: dict[str, Tensor], n: int) -> tuple[Given, Tensor | float, float, Tensor | None]:
        """The inner model at n values of the latents."""
        return self.reader._given(self.args, self.filled, values, n)


def _shape(site: Latent, n_rows: int) -> list[int]:
    """Of one draw for so many rows."""
    shape = list(site.shape)
    if site.row_axis is not None:
        shape[site.row_axis] = n_rows
    return shape


def _is_point(node: Any) -> bool:
    return isinstance(base(node["fn"]), pyro.distributions.Delta)


def _refuse_infinite(guide_trace: Trace) -> None:
    for node in latent_nodes(guide_trace):
        if not bool(torch.isfinite(node["fn"].log_prob(node["value"])).all()):
            raise ModelError(
                f"the guide's density of site {node['name']!r} is not finite: check its parameters, and the "
                "learning rate if they were trained"
            )


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


def _auxiliary(node: Any) -> bool:
    return bool(node["infer"].get("is_auxiliary"))
