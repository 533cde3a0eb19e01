"""Importance sampling: nodes drawn from a guide, or around the mode of each row's posterior."""

from __future__ import annotations

import inspect
import math
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro import poutine
from pyro.distributions import constraints
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.factors import read_factors
from bayes_mpt.predictors.base import Evidence, Guide, Predictor
from bayes_mpt.predictors.nodes import (
    FactorsGiven,
    Given,
    Mapped,
    Nodes,
    Read,
    Reader,
    Stacked,
    constrained,
    nodes_first,
    program_values,
)
from bayes_mpt.predictors.placed import DEGREES, Placement, log_t
from bayes_mpt.tracing import (
    NODES,
    Model,
    ModelError,
    Program,
    base,
    fill,
    has_missing,
    latent_nodes,
    n_rows_of,
    one_precision,
    one_vector,
    rows_first,
    run,
    survey,
)

__all__ = ["Importance", "pareto_k"]

LEAST_TAIL = 20  # weights to fit a tail to
BAD_K = 0.7  # above it the error is not to be believed (Vehtari et al. 2024)


class Importance(Predictor):
    """Weighted draws: w_s = p(u_s, x) / q(u_s), shared along a chain, so that the score is the importance bound.

    Parameters
    ----------
    num_particles : int, default=100
        S draws for each row.

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

    def __init__(self, num_particles: int = 100):
        self.num_particles = num_particles

    def bind(self, model: Model, args: tuple[Any, ...], guide: Guide | None = None) -> Nodes:
        if not isinstance(self.num_particles, int) or self.num_particles < 1:
            raise ValueError(f"num_particles must be an integer of at least 1, got {self.num_particles!r}")
        program = survey(model, args)
        if not program.continuous:
            raise ModelError("the program has no continuous latent, so nothing to draw: use Exact()")
        if guide is None:
            return Nodes(_AroundMode(Placement(model, args, program), self.num_particles))
        return Nodes(_Guided(model, guide, args, program, self.num_particles))


class _Sampled(Reader):
    """What draws have in common: their error."""

    sampled = True
    name = "Importance"

    def evidence(self, nodes: Nodes, x: Tensor) -> Evidence:
        everything = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
        with torch.no_grad():
            log_w = nodes.last.log_weight + nodes.last.given.log_joint(x, everything)  # (S, N)
        n_draws = len(log_w)
        share = log_w.softmax(0)
        ess = 1 / share.square().sum(0)
        # relative variance of the mean weight: (sum_s share^2 - 1/S) S / (S - 1)
        variance = (share.square().sum(0) - 1 / n_draws).clamp(min=0) * n_draws / max(1, n_draws - 1)
        # E log Z^ = log Z - variance / 2: put back, so that rows do not add up their biases
        by_row = nodes.joint(x).detach() + variance / 2
        # where rows have nodes of their own inside: what more of these change
        inside = nodes.joint_refined(x).detach() - nodes.joint(x).detach()
        k = pareto_k(log_w.double().cpu().numpy())
        worst = np.argsort(-np.nan_to_num(k, nan=-np.inf))[:5]
        diagnostics = {
            "num_particles": n_draws,
            "pareto_k": float(np.nanmax(k)) if not np.isnan(k).all() else math.nan,
            "rows_with_bad_k": int((k > BAD_K).sum()),
            "worst_rows": [(int(i), float(k[i])) for i in worst],
            "ess_min": float(ess.min()),
            "ess_mean": float(ess.mean()),
        }
        if bool((inside != 0).any()):
            diagnostics["change with more nodes in each row"] = float(inside.sum())
        se = math.hypot(float(variance.sum().sqrt()), float(inside.sum()))
        return Evidence(by_row + inside, se, diagnostics)


class _AroundMode(_Sampled):
    """Student-t draws around the mode of each row's posterior."""

    located = True

    def __init__(self, placement: Placement, n_draws: int):
        self.placement, self.n_draws = placement, n_draws
        self.model, self.program = placement.model, placement.program
        self.one_by_one = placement.one_by_one
        self.why = (
            f"{n_draws} Student-t draws of {', '.join(placement.space.names)} around the mode of each row's "
            f"posterior{placement.inside}"
        )

    def read(self, args: tuple[Any, ...], visible: Tensor | None = None) -> Read:
        filled = tuple(fill(a) for a in args)
        value = program_values(self.model, args, filled, self.program)
        if visible is None:
            visible = torch.ones(value.shape[1], dtype=torch.bool, device=value.device)
        mode, root = self.placement.locate(args, value, visible)
        n_rows, width = mode.shape
        # multivariate t: a normal vector over the root of a chi-square that its axes share
        normal = torch.randn(self.n_draws, n_rows, width, dtype=mode.dtype).to(mode)
        chi = torch.distributions.Chi2(torch.tensor(DEGREES, dtype=mode.dtype))
        t = normal * (DEGREES / chi.sample((self.n_draws, n_rows)).to(mode))[..., None].sqrt()
        u = mode + (root @ t[..., None])[..., 0]
        log_q = log_t(t) - torch.linalg.slogdet(root)[1]
        given, part, scale = self.placement.at(args, filled, u)
        log_weight = part - log_q - math.log(self.n_draws)
        latents = constrained(self.placement.space, u)
        return Read(given, log_weight, value, scale, latents, self.placement.space.names)


class _Guided(_Sampled):
    """Draws from a guide."""

    def __init__(self, model: Model, guide: Guide, args: tuple[Any, ...], program: Program, n_draws: int):
        self.model, self.guide, self.n_draws = model, guide, n_draws
        self.depth = program.depth
        self.takes_visible = _takes_visible(guide)
        self.located = self.takes_visible
        filled = tuple(fill(a) for a in args)
        with torch.random.fork_rng():
            trace = self._guide_trace(filled, None, 1)
        names = {node["name"] for node in latent_nodes(trace)}
        missing = [n for n in program.continuous if n not in names]
        self.placement: Placement | None = None
        if missing:  # those of each row may be left to nodes of their own
            found = Placement(model, args, program)
            if found.rows is not None and not set(found.space.names) & set(missing):
                self.placement, missing = found, []
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
        drawn = program.continuous if self.placement is None else self.placement.space.names
        for name in drawn:
            ours, theirs = first.nodes[name]["fn"].support, trace.nodes[name]["fn"].support
            shapes = [tuple(t.nodes[name]["value"].shape) for t in (first, trace)]
            if shapes[0] != shapes[1]:
                raise ModelError(
                    f"the guide draws latent {name!r} with shape {shapes[1]}, which has shape {shapes[0]} in the "
                    "program: give the guide's site the same plates and events"
                )
            point = isinstance(base(trace.nodes[name]["fn"]), pyro.distributions.Delta)
            if not point and _is_real(ours) and not _is_real(theirs):
                raise ModelError(
                    f"the guide draws latent {name!r} from {theirs}, while the program lets it be any real number: "
                    "what the guide cannot reach would be left out. Use a guide of the same support"
                )
        random = [n for n in names if not isinstance(trace.nodes[n]["fn"], pyro.distributions.Delta)]
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
        if not self.vectorised and not program.discrete and self.placement is None:
            self.mapped = True
            self.vectorised = self.mapped = self._try_together(args, filled)
        self.one_by_one = not self.vectorised
        seen = ", which sees what is visible" if self.takes_visible else ""
        self.why = f"{n_draws} draws of {', '.join(drawn)} from the guide{seen}"
        self.why += self.placement.inside if self.placement is not None else ""
        self.names = drawn
        self.why += "; draw by draw" if self.one_by_one else ""

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.program.parameters, *self.guide_parameters)))

    def read(self, args: tuple[Any, ...], visible: Tensor | None = None) -> Read:
        filled = tuple(fill(a) for a in args)
        missing = any(has_missing(a) for a in args)
        value = program_values(self.model, args, filled, self.program) if missing else None
        shown = None if value is None else ~value.isnan()
        if visible is not None:
            shown = visible if shown is None else visible & shown
        if self.vectorised or self.n_draws == 1:
            draws = [self._draw(args, filled, shown, self.n_draws)]
        else:
            draws = [self._draw(args, filled, shown, 1) for _ in range(self.n_draws)]
        given = draws[0][0] if len(draws) == 1 else Stacked(tuple(d[0] for d in draws))
        log_weight, latents = torch.cat([d[1] for d in draws]), torch.cat([d[3] for d in draws])
        scale = draws[0][2]
        value = program_values(self.model, args, filled, self.program) if value is None else value
        return Read(given, log_weight - math.log(self.n_draws), value, scale, latents, self.names)

    def _draw(
        self, args: tuple[Any, ...], filled: tuple[Any, ...], shown: Tensor | None, n: int
    ) -> tuple[Given, Tensor, float, Tensor]:
        """The inner model at n draws, - log q and what the inner model leaves out (n, N), the scale and the draws."""
        guide_trace = self._guide_trace(filled, shown, n)
        n_rows = n_rows_of(self.program, filled)
        log_q = filled[0].new_zeros(n, n_rows)
        values = {}
        for node in latent_nodes(guide_trace):
            if node["name"] in self.program.latent_names:
                values[node["name"]] = node["value"]
            log_q = log_q + self._by_row(node, n, n_rows)
            if not bool(torch.isfinite(log_q.detach()).all()):
                raise ModelError(
                    f"the guide's density of site {node['name']!r} is not finite: check its parameters, and the "
                    "learning rate if they were trained"
                )
        given, part, scale = self._given(args, filled, values, n)
        latents = [
            nodes_first(values[site.name].detach(), site, n, n_rows)
            for site in self.program.latents
            if site.name in values
        ]
        return given, part - log_q, scale, torch.cat(latents, -1).to(log_q)

    def _given(
        self, args: tuple[Any, ...], filled: tuple[Any, ...], values: dict[str, Tensor], n: int
    ) -> tuple[Given, Tensor | float, float]:
        """The inner model at n draws, what of their log-density it leaves out, and the scale."""
        if self.placement is None and (n == 1 or not self.mapped):
            factors = read_factors(self.model, filled, self.program, values, n)
            return FactorsGiven(factors), 0.0, factors.scale
        rows = n_rows_of(self.program, filled)
        plain = {}
        for site in self.program.latents:
            if site.name in values:
                shape = list(site.shape)
                if site.row_axis is not None:
                    shape[site.row_axis] = rows
                v = values[site.name]
                v = v[None] if n == 1 else v
                plain[site.name] = v.expand(n, *v.shape[1:]).reshape(n, *shape)
        if self.placement is not None:
            return *self.placement.given(args, filled, plain), 1.0
        given = Mapped(partial(read_factors, self.model, filled, self.program), plain)
        return given, 0.0, given.factors({name: v[0] for name, v in plain.items()}).scale

    def _by_row(self, node: Any, n: int, n_rows: int) -> Tensor:
        """A guide site's log-density: (n, N)."""
        log_prob = node["fn"].log_prob(node["value"])
        frames = [f for f in node["cond_indep_stack"] if f.name == self.program.rows_plate and f.vectorized]
        if not self.program.by_row or not frames:
            return (
                log_prob.expand(n, *log_prob.shape[log_prob.ndim > 0 and n > 1 :])
                .reshape(n, -1)
                .sum(-1)[:, None]
            )
        axis = frames[0].dim + log_prob.ndim
        if n == 1:
            return rows_first(log_prob, axis).sum(-1)[None]
        return log_prob.movedim(axis, 1).reshape(n, n_rows, -1).sum(-1)

    def _guide_trace(self, filled: tuple[Any, ...], shown: Tensor | None, n: int) -> Trace:
        kwargs: dict[str, Any] = {}
        args = filled
        if self.takes_visible:
            first = filled[0]
            if shown is None:
                shown = torch.ones((), dtype=torch.bool, device=first.device)
            if (
                shown.ndim
                and shown.shape != first.shape
                and shown.numel() == first.numel()
                and not self.program.by_row
            ):
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
        with torch.random.fork_rng(), torch.no_grad():
            try:
                trace = self._guide_trace(filled, None, 2)
                values = {
                    n["name"]: n["value"]
                    for n in latent_nodes(trace)
                    if n["name"] in self.program.latent_names
                }
                together = self._given(args, filled, values, 2)[0]
                seen = filled[0].new_ones(n_rows_of(self.program, filled), self.program.n_tokens).bool()
                x = program_values(self.model, args, filled, self.program)
                both = together.log_joint(x, seen)
                alone = []
                for s in range(2):
                    one = {}
                    for site in self.program.latents:
                        if site.name in values:
                            v = values[site.name]
                            v = v.expand(2, *v.shape[1:])[s]
                            one[site.name] = v.reshape(site.shape)
                    given = self._given(args, filled, one, 1)[0]
                    alone.append(given.log_joint(x, seen))
            except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
                return False
        return bool(torch.allclose(both, torch.cat(alone), rtol=1e-5, equal_nan=True))


def _takes_visible(guide: Any) -> bool:
    target = guide.forward if isinstance(guide, torch.nn.Module) else guide
    try:
        return "visible" in inspect.signature(target).parameters
    except (TypeError, ValueError):
        return False


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


def _auxiliary(node: Any) -> bool:
    return bool(node["infer"].get("is_auxiliary"))


def pareto_k(log_weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shape of the generalised Pareto tail of each row's weights (Zhang & Stephens 2009): (S, N) -> (N,).

    Its largest min(S / 5, 3 sqrt(S)) weights are fitted; NaN with fewer than 100 draws, of which too few are tail.
    """
    n_draws, n_rows = log_weight.shape
    n_tail = int(min(n_draws / 5, 3 * math.sqrt(n_draws)))
    if n_tail < LEAST_TAIL:
        return np.full(n_rows, np.nan)
    ordered = np.sort(log_weight - log_weight.max(0), axis=0)
    cut = np.exp(ordered[-n_tail - 1])
    tail = np.exp(ordered[-n_tail:]) - cut  # (M, N), exceedances
    tail = np.maximum(tail, np.finfo(float).tiny)
    m = 30 + int(math.sqrt(n_tail))
    grid = np.arange(1, m + 1)[:, None]
    quartile = tail[int(n_tail / 4 + 0.5) - 1]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        theta = 1 / tail[-1] + (1 - np.sqrt(m / (grid - 0.5))) / (3 * quartile)  # (m, N)
        k = np.log1p(-theta[:, None] * tail).mean(1)
        profile = n_tail * (np.log(-theta / k) - k - 1)
        weight = 1 / np.exp(profile[:, None] - profile).sum(0)
        weight = np.where(weight >= 10 * np.finfo(float).eps, weight, 0.0)
        best = (theta * weight).sum(0) / weight.sum(0)
        shape = np.log1p(-best * tail).mean(0)
    # a prior of ten observations at 1/2
    return shape * n_tail / (n_tail + 10) + 0.5 * 10 / (n_tail + 10)
