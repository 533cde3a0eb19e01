"""Nodes that are drawn from a guide."""

from __future__ import annotations

import math
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.distributions import constraints
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.diagnostics import BAD_K, pareto_k, weight_variance, widening_of
from bayes_mpt.masks import Policy
from bayes_mpt.predictors.base import Evidence, Guide
from bayes_mpt.predictors.nodes.adaptive import AdaptiveNodes
from bayes_mpt.predictors.nodes.given import Factorized, Given
from bayes_mpt.predictors.nodes.guide_runs import GuideRuns
from bayes_mpt.predictors.nodes.slopes import slopes_at, what_is_missed
from bayes_mpt.predictors.nodes.weighted import (
    Nodes,
    NodeSource,
    Read,
    nodes_first,
    objective_of_draws,
    program_values,
)
from bayes_mpt.predictors.objective import Batch, Objective
from bayes_mpt.program.arguments import Args, fill_all, filling
from bayes_mpt.program.batched import TOGETHER, Batched, found_out
from bayes_mpt.program.factor_runs import read_factors
from bayes_mpt.program.program import Latent, Model, ModelError, Program, n_rows_of
from bayes_mpt.program.run import SetLatents, run, takes_visible
from bayes_mpt.program.simulation import simulate
from bayes_mpt.program.sites import is_point, latent_nodes
from bayes_mpt.program.store import own_random_state
from bayes_mpt.program.trials import CLOSE

__all__ = ["Drawn", "GuideDraws", "evidence_of_draws"]

MIN_DRAWS = 100  # from which on the slope at them says what they miss
MAX_CELLS = 2**22  # log-densities of tokens, up to which it is looked at
GROWTH = 3  # of the number of draws from stage to stage of a training


def evidence_of_draws(nodes: Nodes) -> Evidence:
    """log Z of rows from random nodes, their bias and error from the spread of the weights."""
    with torch.no_grad():
        log_w, joint = nodes.log_weights(), nodes.score()  # (S, N), (N,)
    n_draws = len(log_w)
    # of a row that is impossible under every draw, all are worth the same
    log_w = torch.where(log_w.amax(0) == -math.inf, 0.0, log_w)
    share = log_w.softmax(0)
    ess = 1 / share.square().sum(0)
    variance = weight_variance(share, nodes.last.stratum)
    # E log Z^ = log Z - variance / 2: put back, so that rows do not add up their biases
    by_row = joint + variance / 2
    # where rows have nodes of their own inside: what more of these change
    with torch.no_grad():
        inside = nodes.gain_inside()
    k = pareto_k(log_w.double().cpu().numpy())
    worst = np.argsort(-np.nan_to_num(k, nan=-np.inf))[:5]
    diagnostics = {
        "num_particles": n_draws,
        "pareto_k": float(np.nanmax(k)) if not np.isnan(k).all() else math.nan,
        "rows_with_bad_k": int((k > BAD_K).sum()),
        "worst_rows": [(int(i), float(k[i])) for i in worst],
        "log_weight_sd": float(_spread_above(log_w).mean()),
        "ess_min": float(ess.min()),
        "ess_mean": float(ess.mean()),
    }
    if bool((inside != 0).any()):
        diagnostics["change with more nodes in each row"] = float(inside.sum())
    widening = widening_of(float(k[0])) if len(k) == 1 else 1.0
    se = math.hypot(widening * float(variance.sum().sqrt()), float(inside.sum()))
    return Evidence(by_row + inside, se, diagnostics, drawn=True)


def _spread_above(log_w: Tensor) -> Tensor:
    """Standard deviation (N,) of log weights (S, N), as those above their median tell it.

    A weight far below the others says nothing of those that were missed: draws of the prior in a mixture have such.
    """
    seen = torch.where(log_w.isfinite(), log_w, torch.nan)
    # of an even number the mean of both in the middle
    middle = 0.5 * (seen.nanmedian(0).values - (-seen).nanmedian(0).values)
    return (2 * (seen - middle).clamp(min=0).square().nanmean(0)).sqrt()


class GuideDraws(NodeSource):
    """Draws from a guide."""

    name = "Importance"

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
        self.runs = GuideRuns(guide, takes_visible(guide), program)
        self.takes_visible = self.relocates = self.runs.takes_visible
        self.away = args[0].device.type != "cpu"
        # the same whatever rows a step is given, and found once: a median costs as much as a third of a step
        self.fillings = tuple(filling(a) for a in args)
        rows = Args(args, self.fillings)
        with own_random_state():
            trace = self.runs.trace(rows.filled, None, 1)
        names = {node["name"] for node in latent_nodes(trace)}
        missing = [n for n in program.continuous if n not in names]
        self.adaptive: AdaptiveNodes | None = None
        if missing:  # those of each row may be left to nodes of their own
            found = AdaptiveNodes(model, rows, program)
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
        self.names = program.continuous if self.adaptive is None else self.adaptive.space.names
        _refuse_unlike(run(model, rows.filled), trace, self.names)
        self.has_points = bool(self.runs.points(rows.filled, trace, names))
        self.runs = self.runs.with_layout(trace, names)
        self.structure = self.runs.program
        self.guide_parameters = tuple(n for n, s in trace.nodes.items() if s["type"] == "param")
        self._find_out(rows, trace, doubly_reparameterized)
        seen = ", which sees what is visible" if self.takes_visible else ""
        self.why = f"{n_draws} draws of {', '.join(self.names)} from the guide{seen}"
        self.why += self.adaptive.inside if self.adaptive is not None else ""
        self.why += "; draw by draw" if self.batched is Batched.LOOP else ""

    def _find_out(self, args: Args, trace: Trace, twice: bool) -> None:
        """How several draws are run, and which gradient a chain of them has."""
        self.batched = Batched.LOOP
        self.batched = self._found_out(args)
        self.squared = (
            twice and self.batched is Batched.PLATE and self.runs.moves_by_draws(args.filled, trace)
        )

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.structure.parameters, *self.guide_parameters)))

    def dream(self, args: tuple[Any, ...], generator: torch.Generator) -> Tensor:
        """Log-density (N,) under the guide of the latents of rows that the program makes, given some of their tokens.

        Maximised by the guide, it is the sleep phase of Hinton, Dayan, Frey & Neal (1995): a guide as wide as the
        posterior, for every set of visible tokens.
        """
        conditioned_on_mask = self.takes_visible and self.adaptive is None and not self.has_points
        if (
            not conditioned_on_mask
            or not self.structure.by_row
            or self.structure.observed_argument != 0
            or self.structure.discrete
        ):
            raise ModelError(
                "dream=True needs a guide that draws all latents and is conditioned on the mask, and a program that "
                "observes its first argument, row by row"
            )
        filled = fill_all(args)
        tokens, latents = simulate(self.model, filled, self.structure)
        # every number of visible tokens is as likely as any other, for each row its own
        rank = torch.rand(tokens.shape, generator=generator).argsort(1)
        size = torch.randint(tokens.shape[1] + 1, (len(tokens), 1), generator=generator)
        with SetLatents(latents):
            trace = self.runs.trace((tokens.to(filled[0]), *filled[1:]), (rank < size).to(tokens.device), 1)
        return self.runs.log_q(trace, 1)[0]

    def schedule(self, whole: Batch, masks: Policy | None, seed: int = 0) -> list[Objective]:
        """Along chains from one draw to as many as asked: one costs least, and the last bring the bound nearest."""
        if masks is not None and not masks.chains:
            return [self._objective(whole, masks)]
        return [self._with(n)._objective(whole, masks) for n in self.rising()]

    def _objective(self, whole: Batch, masks: Policy | None) -> Objective:
        """The score at draws of the guide; where asked for, its dreams pull at its parameters too."""
        return objective_of_draws(self, whole, masks, partial(_pull, self) if self.dreams else None)

    def _alone(self, nodes: Nodes, mask: Tensor) -> Tensor:
        if not self.relocates:
            raise ModelError(
                "this guide has seen the hidden tokens, so single conditionals are meaningless and only the sum of a "
                "whole chain is valid: use PermutationChain, or give the guide an argument ``visible`` (N, T)"
            )
        return nodes.at_one_place(mask)

    def rising(self) -> list[int]:
        """Numbers of draws of a training, stage after stage; on a GPU all at once: one costs no less."""
        n, rising = self.n_training, []
        while n > 1 and self.takes_visible and not self.away:
            rising.append(n)
            n = n // GROWTH
        return [max(1, n), *reversed(rising)]

    def evidence(self, nodes: Nodes) -> Evidence:
        found = evidence_of_draws(nodes)
        n_draws = len(nodes.last.latents)
        few = n_draws < MIN_DRAWS or not nodes.last.names or self.batched is Batched.LOOP
        if (
            few or self.structure.by_row
        ):  # of each of many rows, errors of a guide are small, and hardly those of one
            return found
        if n_draws * nodes.value.numel() > MAX_CELLS:  # gradients keep what each of them was computed from
            return found
        log_w = nodes.log_weights().detach()
        missed = what_is_missed(*slopes_at(self, nodes), log_w.softmax(0)[..., None].double().cpu().numpy())
        if not missed:
            return found
        return found._replace(se=math.nan, diagnostics={**found.diagnostics, "missed": missed})

    def _forget(self) -> None:
        if self.adaptive is not None:
            self.adaptive.forget()

    def _with(self, n_draws: int) -> GuideDraws:
        new = copy(self)
        new.n_draws = n_draws
        return new

    def place(self, args: Args, visible: Tensor | None = None, near: Any = None) -> Read:
        missing = any(f is not a for f, a in zip(args.filled, args.given, strict=True))
        value = program_values(self.model, args, self.structure) if missing else None
        shown = None if value is None else ~value.isnan()
        if visible is not None:
            shown = visible if shown is None else visible & shown
        n = self.n_draws
        if self.batched is not Batched.LOOP or n == 1:
            # nodes for one visible set (of a mask) serve two sums at once, with other shares of the weights
            squared = self.squared and visible is None and torch.is_grad_enabled()
            log_q, values = self._draw(args.filled, shown, n, squared)
            given, part, scale, tokens = self._given(args, values, n)
            latents = self._numbers(values, args.filled, n)
        else:
            draws = [self._draw(args.filled, shown, 1) for _ in range(n)]
            log_q = torch.cat([log_q for log_q, _ in draws])
            given, part, scale, tokens = self._given_each(args, [values for _, values in draws])
            latents = torch.cat([self._numbers(values, args.filled, 1) for _, values in draws])
        if value is None:
            value = tokens if tokens is not None else program_values(self.model, args, self.structure)
        return Read(given, part - log_q - math.log(n), value, scale, latents.to(log_q), self.names)

    def drawn(self, args: Args, visible: Tensor | None) -> Drawn:
        """The rows, and what the guide sees of them."""
        value = program_values(self.model, args, self.structure)
        shown = ~value.isnan() if visible is None else visible & ~value.isnan()
        return Drawn(self, args, value, shown)

    def _draw(
        self, filled: tuple[Any, ...], shown: Tensor | None, n: int, squared: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """log q (n, N) of n draws, and the values of the program's latents."""
        if squared:
            log_q, values = self.runs.along(filled, shown, n)
        else:
            trace = self.runs.trace(filled, shown, n)
            log_q = self.runs.log_q(trace, n)
            values = {node["name"]: node["value"] for node in latent_nodes(trace)}
        return log_q, {name: v for name, v in values.items() if name in self.structure.latent_names}

    def _numbers(self, values: dict[str, Tensor], filled: tuple[Any, ...], n: int) -> Tensor:
        """Values of n draws side by side, (n, N, K)."""
        n_rows = n_rows_of(self.structure, filled)
        sites = [site for site in self.structure.latents if site.name in values]
        parts = [nodes_first(values[site.name].detach(), site, n, n_rows) for site in sites]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _given(
        self, args: Args, values: dict[str, Tensor], n: int
    ) -> tuple[Given, Tensor | float, float, Tensor | None]:
        """The inner model at n draws, what of their log-density it leaves out, the scale, and tokens if it has them."""
        if self.adaptive is not None:
            return *self.adaptive.given(args, self._plain(values, args.filled, n)), 1.0, None
        if self.batched is Batched.VMAP and n > 1:
            values = self._plain(values, args.filled, n)
        given = Factorized(read_factors(self.model, args.filled, self.structure, values, n, self.batched))
        return given, 0.0, given.first.scale, given.first.value

    def _given_each(
        self, args: Args, draws: list[dict[str, Tensor]]
    ) -> tuple[Given, Tensor | float, float, Tensor | None]:
        """The same of draws that the program takes one after the other."""
        if self.adaptive is not None:
            each = [self._plain(values, args.filled, 1) for values in draws]
            together = {name: torch.cat([values[name] for values in each]) for name in each[0]}
            return *self.adaptive.given(args, together), 1.0, None
        given = Factorized(*(read_factors(self.model, args.filled, self.structure, v, 1) for v in draws))
        return given, 0.0, given.first.scale, given.first.value

    def _plain(self, values: dict[str, Tensor], filled: tuple[Any, ...], n: int) -> dict[str, Tensor]:
        """Values of n draws, without the plate of nodes (n, ...)."""
        rows, plain = n_rows_of(self.structure, filled), {}
        for site in self.structure.latents:
            if site.name in values:
                v = values[site.name]
                v = v[None] if n == 1 else v
                plain[site.name] = v.expand(n, *v.shape[1:]).reshape(n, *_shape(site, rows))
        return plain

    def _found_out(self, args: Args) -> Batched:
        """How guide and program take several draws: whether two give together what they give apart."""
        n_rows = n_rows_of(self.structure, args.filled)

        def one_of(values: dict[str, Tensor], s: int) -> dict[str, Tensor]:
            sites = [site for site in self.structure.latents if site.name in values]
            both = {site.name: values[site.name].expand(2, *values[site.name].shape[1:]) for site in sites}
            return {site.name: both[site.name][s].reshape(_shape(site, n_rows)) for site in sites}

        def same(batched: Batched) -> bool:
            self.batched = batched
            trace = self.runs.trace(args.filled, None, 2)
            values = {
                n["name"]: n["value"] for n in latent_nodes(trace) if n["name"] in self.structure.latent_names
            }
            seen = args.filled[0].new_ones(n_rows, self.structure.n_tokens).bool()
            x = program_values(self.model, args, self.structure)
            both = self._given(args, values, 2)[0].log_joint(x, seen)
            alone = [self._given(args, one_of(values, s), 1)[0].log_joint(x, seen) for s in range(2)]
            # sums of many tokens in single precision: a GPU adds them up in another order
            rtol = max(1e-5, CLOSE[both.dtype])
            return bool(torch.allclose(both, torch.cat(alone), rtol=rtol, equal_nan=True))

        def by_itself(batched: Batched) -> bool:
            with own_random_state():
                return same(batched)

        with torch.no_grad():
            return found_out(by_itself, TOGETHER if self.adaptive is None else (Batched.PLATE,))


def _pull(draws: GuideDraws, args: tuple[Any, ...], generator: torch.Generator) -> Tensor:
    return draws.dream(args, generator).sum()


def _refuse_unlike(first: Trace, trace: Trace, names: tuple[str, ...]) -> None:
    """A guide whose sites have other shapes or supports than the program's."""
    for name in names:
        ours, theirs = first.nodes[name]["fn"].support, trace.nodes[name]["fn"].support
        shapes = [tuple(t.nodes[name]["value"].shape) for t in (first, trace)]
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"the guide draws latent {name!r} with shape {shapes[1]}, which has shape {shapes[0]} in the "
                "program: give the guide's site the same plates and events"
            )
        if not is_point(trace.nodes[name]) and _is_real(ours) and not _is_real(theirs):
            raise ModelError(
                f"the guide draws latent {name!r} from {theirs}, while the program lets it be any real number: "
                "what the guide cannot reach would be left out. Use a guide of the same support"
            )


class Drawn(NamedTuple):
    """A guide on some rows."""

    reader: GuideDraws
    args: Args
    value: Tensor
    """(N, T) tokens, NaN where missing."""
    shown: Tensor
    """(N, T) of them are visible."""

    def draw(self, n: int) -> dict[str, Tensor]:
        """Values of the latents at n draws."""
        trace = self.reader.runs.trace(self.args.filled, self.shown, n)
        return {k: trace.nodes[k]["value"].detach() for k in self.reader.names}

    def log_q(self, values: dict[str, Tensor], n: int) -> Tensor:
        """Log-density (n, N) of the guide at n values of the latents."""
        with SetLatents(values):
            trace = self.reader.runs.trace(self.args.filled, self.shown, n)
        return self.reader.runs.log_q(trace, n)

    def given(self, values: dict[str, Tensor], n: int) -> tuple[Given, Tensor | float, float, Tensor | None]:
        """The inner model at n values of the latents."""
        return self.reader._given(self.args, values, n)


def _shape(site: Latent, n_rows: int) -> list[int]:
    """Of one draw for so many rows."""
    shape = list(site.shape)
    if site.row_axis is not None:
        shape[site.row_axis] = n_rows
    return shape


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


def _auxiliary(node: Any) -> bool:
    return bool(node["infer"].get("is_auxiliary"))
