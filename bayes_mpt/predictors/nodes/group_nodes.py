"""Nodes in each group of latents that are independent of each other given all the rest.

    log p(x_R | u_s) = r(u_s) + sum_b log sum_q w_bq exp f_b(theta_bq, u_s)

Every group has nodes around its own mode, found for all groups and all nodes u_s of the other latents at once; the q-th
nodes of all groups are one run of the program.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.predictors.nodes.conjugacy import prior_draws
from bayes_mpt.predictors.nodes.few_visible import small_sets
from bayes_mpt.predictors.nodes.given import Given, NodePosterior
from bayes_mpt.predictors.nodes.mixture import Modes
from bayes_mpt.predictors.nodes.nearby import Nearby
from bayes_mpt.predictors.nodes.panels import MAX_NESTED, UNEVEN, Integrals, by_panels, roughness
from bayes_mpt.predictors.nodes.placing import SHARPER, Placing, RowDensity, located, several
from bayes_mpt.predictors.nodes.resampling import evenly
from bayes_mpt.predictors.nodes.rules import (
    CUT,
    MAX_HERMITE,
    ROW_DRAWS,
    ROW_NODES,
    Detail,
    Rule,
    alone_rule,
    hermite,
    row_rule,
)
from bayes_mpt.predictors.nodes.weighted import MIN_SHARE
from bayes_mpt.program.arguments import Args
from bayes_mpt.program.batched import Batched, vmapped
from bayes_mpt.program.factor_runs import read_factors
from bayes_mpt.program.factors import Factors
from bayes_mpt.program.groups import N_DRAWS, Groups, Terms, find_groups, log_terms
from bayes_mpt.program.layout import token_values
from bayes_mpt.program.program import Latent, Model, ModelError, Program, list_names

__all__ = ["GroupNodes", "NestedGroups"]

ALONE = {1: 64, 2: 16, 3: 10, 4: 8}  # nodes along each axis of a group where no other latent takes nodes
MAX_STEPS = 100
FAR = 50.0  # of draws that underflow
SURE = 1e-6  # of a log-density: the last step squares what is left
CELLS = 2**20  # log-densities of tokens at a time, where no gradient needs them all
N_VALUES = 256  # of the effects, over all nodes of the others, for predictions
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class GroupNodes:
    """How latents of groups are integrated given all others."""

    model: Model
    program: Program
    groups: Groups
    alone: bool
    """There are no others."""
    start: Tensor
    """(B, d) where each group's mode is looked for."""
    draws: Tensor
    """(P, B, d) of the prior."""
    filled: tuple[Any, ...]
    """The rows that the groups were found on."""
    placing: Placing = Placing()  # noqa: RUF009
    """How nodes stand in each group."""
    _others: list[GroupNodes] = field(default_factory=list)
    """The same for other rows, asked for last."""
    nearby: Nearby = field(default_factory=Nearby)
    """The modes (S, B, d) that were found last."""

    batched = Batched.VMAP

    @classmethod
    def of(
        cls, model: Model, filled: tuple[Any, ...], program: Program, traces: list[Trace] | None = None
    ) -> GroupNodes | None:
        """What `find_groups` finds; None where that is nothing."""
        traces = prior_draws(model, filled, N_DRAWS) if traces is None else traces
        groups = find_groups(model, filled, program, traces)
        if groups is None:
            return None
        draws = torch.cat([groups.space.pack(t, 1) for t in traces])[:, 0].detach()  # (P, W)
        each = draws.new_zeros(len(draws), groups.n_groups, groups.width)
        each[:, groups.number, groups.slot] = draws.clamp(-FAR, FAR)
        alone = set(groups.names) == set(program.continuous)
        return cls(model, program, groups, alone, each.median(0).values, each, filled)

    @property
    def own(self) -> tuple[str, ...]:
        """The sites that are integrated so."""
        return self.groups.names

    @property
    def width(self) -> int:
        """d, numbers of the widest group."""
        return self.groups.width

    @property
    def n_nodes(self) -> int:
        """Q, of each group."""
        return len(self.rule("usual").t) * self.placing.n_modes

    @property
    def n_evaluations(self) -> int:
        """How often a node costs the log-densities of all tokens, at the most."""
        return self.n_nodes

    @property
    def why(self) -> str:
        names, width = list_names(self.own), self.groups.width
        n = (ALONE if self.alone else ROW_NODES).get(width, ROW_DRAWS)
        where = "the mode" if self.placing.starts is None else "each mode"
        if self.placing.far:
            nodes = f"{self.n_nodes} nodes that reach far, around {where}"
        elif width <= MAX_HERMITE:
            nodes = f"{n} Gauss-Hermite nodes along each of {width} axes, around {where}"
        else:
            nodes = f"{n} points around {where}"
        return f"{names} in {self.groups.n_groups} groups, each by itself, with {nodes}"

    @property
    def inside(self) -> str:
        """The same after what is said of the other latents."""
        return self.why if self.alone else f"; given each of them, {self.why}"

    def rule(self, detail: Detail) -> Rule:
        """Points (Q, d) and log-weights (Q,) inside a group."""
        width = self.groups.width
        if not self.alone or width > MAX_HERMITE:
            return row_rule(width, detail, self.placing.far)
        if self.placing.far or detail == "fine":
            return alone_rule(width, fine=detail == "fine")
        return Rule(*hermite(width, ALONE[width]))

    def on(self, filled: tuple[Any, ...]) -> GroupNodes:
        """The same for these rows, which may belong to other groups."""
        for known in (self, *self._others):
            if all(_equal(a, b) for a, b in zip(filled, known.filled, strict=True)):
                return known
        traces = prior_draws(self.model, filled, N_DRAWS)
        self.groups.space.pack(traces[0], 1)  # which names a site that has another shape now
        token_values(traces[0], self.program)
        found = self.of(self.model, filled, self.program, traces)
        if found is None or found.own != self.own:
            raise ModelError(
                f"on these rows the latents {list(self.own)} are no longer independent of each other given the rest, "
                "as they were where the program was bound: bind it to these rows"
            )
        found = replace(found, placing=self.placing.serves(found.groups.n_groups))
        self._others[:] = [found]
        return found

    def prior_left(self, model: Model, latents: tuple[Latent, ...], filled: tuple[Any, ...]) -> None:
        """No prior is left out by `given`."""

    def placed(self, placing: Placing) -> GroupNodes:
        """The same with nodes that stand so."""
        return replace(self, placing=placing, _others=[])

    def starts(self, args: Args, held: dict[str, Tensor], x: Tensor, visible: Tensor) -> Tensor | None:
        """Where climbs to several modes of each group begin, at one value (1, ...) of the other latents."""
        filled = args.filled
        here, seen = self.on(filled), (visible & ~x.isnan())[0]
        main = here.placed(Placing()).locate(filled, held, 1, seen, None)
        fixed = {name: v.detach() for name, v in held.items()}
        density = here.density(filled, fixed, seen)

        def sharper(u: Tensor, nodes: Tensor) -> Tensor:
            prior = here.density(filled, fixed, torch.zeros_like(seen))(u, nodes)
            return SHARPER * density(u, nodes) - (SHARPER - 1) * prior

        return several(density, sharper, main, here.draws, MAX_STEPS, SURE)

    def small_sets(self, n_tokens: int) -> list[Tensor]:
        """Visible sets (T,) that are small."""
        return small_sets(n_tokens, halves=False)

    def forget(self) -> None:
        """Look for the next modes from the start, not from the last ones."""
        self.nearby.forget()

    def given(self, args: Args, held: dict[str, Tensor]) -> NestedGroups:
        """The groups at S values (S, ...) of the other latents."""
        return NestedGroups(self, args.filled, held)

    # ------------------------------------------------------------------------------------------------- at nodes

    @cached_property
    def unused(self) -> Tensor:
        """(B, d) places that a group leaves free: a standard normal number stands there, which integrates to one."""
        free = torch.ones(self.groups.n_groups, self.groups.width, dtype=torch.bool, device=self.start.device)
        free[self.groups.number, self.groups.slot] = False
        return free

    def values(self, u: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Values of the sites at u (M, B, d), and the log-determinants of their transforms."""
        return self.groups.space.jacobians(u[:, self.groups.number, self.groups.slot][:, None])

    def log_joint(
        self, filled: tuple[Any, ...], held: dict[str, Tensor], u: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """log p of all that belongs to each group (M, B), and of the rest (M,), at u (M, B, d) and held (M, ...)."""
        groups = self.groups
        values, jacobians = self.values(u)

        def alone(node: dict[str, Tensor]) -> Terms:
            return log_terms(self.model, filled, self.program, node)

        odds = groups.space.carried(u[:, groups.number, groups.slot][:, None])
        terms = vmapped(alone)({**held, **values, **odds})
        parts = [torch.where(seen, terms.tokens, 0.0), terms.latents, *(j.flatten(1) for j in jacobians)]
        owner = torch.cat([groups.token, groups.latent, groups.jacobian])
        out = u.new_zeros(len(u), groups.n_groups + 1).index_add(1, owner, torch.cat(parts, 1))
        free = torch.where(self.unused, 0.5 * u.square() + HALF_LOG_2PI, 0.0).sum(-1)
        return out[:, :-1] - free, out[:, -1]

    def locate(
        self,
        filled: tuple[Any, ...],
        held: dict[str, Tensor],
        n_nodes: int,
        seen: Tensor,
        cut: float | None,
    ) -> Modes:
        """The modes of each group at each of S values of the others: of S B groups."""
        fixed = {name: v.detach() for name, v in held.items()}
        one = self.placing.starts is None
        near = self.nearby.start(fixed, tuple(self.start.shape)) if held and one else None
        start = self.start.expand(n_nodes, -1, -1) if near is None else near
        density = self.density(filled, fixed, seen)
        found = located(density, start, self.placing, cut, MAX_STEPS, SURE)
        if held and one:
            self.nearby.keep(fixed, found.mode[0].unflatten(0, (n_nodes, -1)))
        return found

    def panels(
        self, filled: tuple[Any, ...], held: dict[str, Tensor], n_nodes: int, seen: Tensor
    ) -> Integrals:
        """The integral of each group of one latent at each of S values of the others: of S B."""
        fixed = {name: v.detach() for name, v in held.items()}
        modes = self.locate(filled, held, n_nodes, seen, CUT["panels"])
        n_tokens = -(-len(seen) // self.groups.n_groups)
        return by_panels(self.density(filled, fixed, seen), modes, n_nodes, n_tokens, MAX_NESTED)

    def density(self, filled: tuple[Any, ...], held: dict[str, Tensor], seen: Tensor) -> RowDensity:
        """log p of all that belongs to each group, at values (S, ...) of the others."""

        def log_prob(u: Tensor, nodes: Tensor) -> Tensor:
            return self.log_joint(filled, {name: v[nodes] for name, v in held.items()}, u, seen)[0]

        return log_prob


class NestedGroups(Given):
    """One vector of observations whose latents fall into groups that are independent given each node."""

    def __init__(
        self, nodes: GroupNodes, filled: tuple[Any, ...], held: dict[str, Tensor], detail: Detail = "usual"
    ):
        self.nodes, self.filled, self.held, self.detail = nodes.on(filled), filled, held, detail
        self.n_nodes = len(next(iter(held.values()))) if held else 1
        self._last: Any = None

    def with_detail(self, detail: Detail, some: Tensor | slice = slice(None)) -> Given:
        held = {name: v[some] for name, v in self.held.items()}
        return NestedGroups(self.nodes, self.filled, held, detail)

    def uneven(self, x: Tensor) -> tuple[float, float]:
        if self.nodes.width != 1:
            return 0.0, 0.0
        seen = self._seen(x, torch.ones_like(x, dtype=torch.bool))
        of_each = self._at(seen)[1][0].unflatten(0, (self.nodes.placing.n_modes, -1))
        moves = float(roughness(of_each).sum())
        if moves <= UNEVEN:
            return moves, 0.0
        return moves, float(self.nodes.panels(self.filled, self.held, 1, seen).error.sum())

    def log_prior(self, x: Tensor) -> Tensor:
        if not bool(self.nodes.groups.normalised.all()):
            return super().log_prior(x)
        nothing = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
        anywhere = self.nodes.start.expand(self.n_nodes, -1, -1)  # all groups integrate to one
        return self.nodes.log_joint(self.filled, self.held, anywhere, nothing)[1][:, None]

    def log_joint(self, x: Tensor, visible: Tensor) -> Tensor:
        by_group, rest = self._by_group(self._seen(x, visible))
        return (rest + by_group.sum(-1))[:, None]

    def predictive(self, x: Tensor, visible: Tensor) -> Tensor:
        shown = self._seen(x, visible)
        before, rest = self._by_group(shown)
        out = x.new_zeros(self.n_nodes, x.shape[1])
        for tokens in self._in_turn((~shown).nonzero()[:, 0]):  # one more in every group at once
            by_group, more = self._by_group(shown.index_fill(0, tokens, True))
            out[:, tokens] = self._steps(by_group - before, more - rest, tokens)
        return out[:, None]

    def chain(self, x: Tensor, order: Tensor) -> Tensor:
        seen = self._seen(x, torch.ones_like(x, dtype=torch.bool))
        shown = torch.zeros_like(seen)
        before, rest = self._by_group(shown)
        start = rest + before.sum(-1)
        steps = x.new_zeros(self.n_nodes, x.shape[1])
        for tokens in self._in_turn(order[seen[order]]):
            shown = shown.index_fill(0, tokens, True)
            by_group, more = self._by_group(shown)
            steps[:, tokens] = self._steps(by_group - before, more - rest, tokens)
            before, rest = by_group, more
        steps = steps[:, order].cumsum(-1)
        return (start[:, None] + torch.nn.functional.pad(steps, (1, 0)))[:, None]

    def posterior(self, x: Tensor, visible: Tensor) -> NodePosterior:
        everything, seen = torch.ones_like(x, dtype=torch.bool), self._seen(x, visible)

        def effects() -> Tensor:
            u, share = self._posterior(seen)
            return (self._of(share, self.nodes.groups.value) * self._flat(u)).sum(1)[:, None]

        return NodePosterior(
            tokens=lambda: cast(Tensor, self._average(seen, lambda factors: factors.means(everything))),
            latents=effects,
            levels=lambda: self._average(seen, lambda factors: factors.levels(everything)),
            values=lambda share: self._values(seen, share) if len(x) == 1 else [],
        )

    def _values(self, seen: Tensor, share: Tensor) -> list[list[dict[str, Tensor]]]:
        """Values of equal shares at each node, with mean and covariance of each group's posterior.

        The groups' values are paired at random.
        """
        u, within = self._posterior(seen)
        part = share.sqrt()  # where values are the n-th part of a node, their error falls with n^2 or faster
        n_values = (N_VALUES * part / part.sum()).round().clamp(min=1).long().tolist()
        counts = [
            n if share[s] >= MIN_SHARE else 0 for s, n in enumerate(n_values)
        ]  # of the others nobody asks
        generator = torch.Generator().manual_seed(0)
        out: list[list[dict[str, Tensor]]] = [[] for _ in counts]
        for n in sorted(set(counts) - {0}):
            some = [s for s, count in enumerate(counts) if count == n]
            spread = evenly(u[some], within[some], n)  # (M, D, B, d)
            rank = torch.rand(*spread.shape[:3], generator=generator, dtype=torch.float64).argsort(1)
            spread = spread.gather(1, rank[..., None].expand_as(spread).to(u.device))
            values = {
                name: v.unflatten(0, (-1, n))
                for name, v in self.nodes.values(spread.flatten(0, 1))[0].items()
            }
            for i, s in enumerate(some):
                out[s] = [{name: v[i, j] for name, v in values.items()} for j in range(n)]
        return out

    def doubt(self, x: Tensor, weight: Tensor) -> str:
        if self.nodes.placing.starts is not None:
            return ""
        best = int(weight.argmax())
        held = {name: v[best : best + 1] for name, v in self.held.items()}
        starts = self.nodes.starts(Args(self.filled), held, x, torch.ones_like(x, dtype=torch.bool))
        if starts is None:
            return ""
        n = int((starts != starts[0]).any(-1).any(0).sum())
        return (
            f"given the other latents, {n} of {starts.shape[1]} groups of {list_names(self.nodes.own)} "
            "have several modes, and nodes stand around one"
        )

    # --------------------------------------------------------------------------------------------------- the nodes

    def _seen(self, x: Tensor, visible: Tensor) -> Tensor:
        """Which tokens are visible and not missing: (T,)."""
        return (visible & ~x.isnan())[0]

    def _chunks(self) -> list[slice]:
        """Of the S nodes, as many as memory will bear at a time."""
        per_node = len(self.nodes.groups.token) + len(self.nodes.groups.latent)
        step = max(1, CELLS // (per_node * len(self.nodes.rule(self.detail).t) * self.nodes.placing.n_modes))
        return [slice(i, i + step) for i in range(0, self.n_nodes, step)]

    def _placed(self, seen: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Nodes u (S, Q, B, d), what they add to each group's integral (S, Q, B), and log p of the rest (S,)."""
        held = {name: v[part] for name, v in self.held.items()}
        n_nodes = len(range(*part.indices(self.n_nodes)))
        rule = self.nodes.rule(self.detail)
        modes = self.nodes.locate(self.filled, held, n_nodes, seen, rule.cut)
        u, log_w = modes.nodes(rule)  # (J, Q, S B, d), (J, Q, S B)
        u = u.flatten(0, 1).unflatten(1, (n_nodes, -1)).movedim(1, 0)  # (S, J Q, B, d)
        log_w = log_w.flatten(0, 1).unflatten(1, (n_nodes, -1)).movedim(1, 0)
        each = {name: v.repeat_interleave(u.shape[1], 0) for name, v in held.items()}
        by_group, rest = self.nodes.log_joint(self.filled, each, u.flatten(0, 1), seen)
        return u, by_group.unflatten(0, u.shape[:2]) + log_w, rest.unflatten(0, u.shape[:2])[:, 0]

    def _by_group(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The log-integral of each group (S, B), and log p of the rest (S,)."""
        groups = self.nodes.groups
        empty = torch.ones(groups.n_groups + 1, dtype=torch.bool, device=seen.device)
        empty[groups.token[seen]] = False
        nothing = empty[:-1] & groups.normalised  # Z(nothing) is 1
        if self.detail == "panels":
            nodes, anywhere = self.nodes, self.nodes.start.expand(self.n_nodes, -1, -1)
            log_z = nodes.panels(self.filled, self.held, self.n_nodes, seen).log_z.unflatten(
                0, (self.n_nodes, -1)
            )
            return torch.where(nothing, 0.0, log_z), nodes.log_joint(self.filled, self.held, anywhere, seen)[
                1
            ]
        _, log_prob, rest = self._at(seen)
        return torch.where(nothing, 0.0, log_prob.logsumexp(1)), rest

    def _posterior(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Nodes u (S, Q, B, d), and the share of each in its group's posterior (S, Q, B)."""
        u, log_prob, _ = self._at(seen)
        return u, log_prob.softmax(1)

    def _at(self, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`_placed` of all S nodes; what was asked last, without gradients, is kept."""
        known = self._last
        if known is not None and not torch.is_grad_enabled() and torch.equal(known[0], seen):
            return known[1]
        parts = [self._placed(seen, part) for part in self._chunks()]
        found = parts[0] if len(parts) == 1 else tuple(torch.cat(t) for t in zip(*parts, strict=True))
        if not torch.is_grad_enabled():
            self._last = seen, found
        return found  # type: ignore[return-value]

    def _of(self, share: Tensor, group: Tensor) -> Tensor:
        """What stands for a group (S, Q, B), for each of its members: (S, Q, members); even for nobody's."""
        nobody = torch.full_like(share[..., :1], 1 / share.shape[1])
        return torch.cat([share, nobody], -1)[..., group]

    def _flat(self, u: Tensor) -> Tensor:
        """Values of the effects at nodes u (S, Q, B, d), site after site: (S, Q, V)."""
        values, _ = self.nodes.values(u.flatten(0, 1))
        return torch.cat([v.flatten(1) for v in values.values()], 1).unflatten(0, u.shape[:2])

    def _average(self, seen: Tensor, of: Callable[[Factors], Tensor | None]) -> Tensor | None:
        """Posterior mean of something of each token (M, 1, T, ...) at M nodes: (S, 1, T, ...)."""
        u, share = self._posterior(seen)
        nodes, out = self.nodes, []
        for part in self._chunks():
            held = {name: v[part].repeat_interleave(u.shape[1], 0) for name, v in self.held.items()}
            values = {**held, **nodes.values(u[part].flatten(0, 1))[0]}
            n = len(next(iter(values.values())))
            found = of(read_factors(nodes.model, self.filled, nodes.program, values, n, Batched.VMAP))
            if found is None:
                return None
            found = found[:, 0].expand(n, *found.shape[2:]).unflatten(0, (-1, u.shape[1]))  # (S, Q, T, ...)
            weight = self._of(share[part], nodes.groups.token)
            out.append((weight.reshape(*weight.shape, *[1] * (found.ndim - 3)) * found).sum(1))
        return torch.cat(out)[:, None]

    def _in_turn(self, tokens: Tensor) -> list[Tensor]:
        """Tokens in this order, one of each group at a time; those that are nobody's one by one beside them."""
        turns: list[list[int]] = []
        count: dict[int, int] = {}
        for token, group in zip(tokens.tolist(), self.nodes.groups.token[tokens].tolist(), strict=True):
            turn = count.get(group, 0)
            count[group] = turn + 1
            turns.extend([] for _ in range(turn + 1 - len(turns)))
            turns[turn].append(token)
        return [torch.tensor(turn, device=tokens.device) for turn in turns]

    def _steps(self, by_group: Tensor, rest: Tensor, tokens: Tensor) -> Tensor:
        """What each token has added, at most one of each group and one of nobody's: (S, tokens)."""
        return torch.cat([by_group, rest[:, None]], 1)[:, self.nodes.groups.token[tokens]]


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b))
    return bool(a == b)
