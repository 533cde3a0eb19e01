"""What a model says of tokens given weighted nodes, all nodes at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

from bayes_mpt.predictors.gaussian.linear import LinearRows
from bayes_mpt.predictors.nodes.panels import UNEVEN, Integrals, roughness
from bayes_mpt.predictors.nodes.rules import Detail
from bayes_mpt.program.affine import DenseMap, latent_values
from bayes_mpt.program.arguments import has_missing
from bayes_mpt.program.factors import Factors

__all__ = ["AffineBatch", "Factorized", "Given", "NestedRows", "NodePosterior", "PlacedRows"]

Question = Callable[[Factors], Tensor]


def _no_values(share: Tensor) -> list[list[dict[str, Tensor]]]:
    return []


@dataclass(frozen=True)
class NodePosterior:
    """Tokens and latents of rows given what is visible of them, at each of S nodes: functions that find them.

    What an inner model does not have is None. `Posterior` is their average over the nodes.
    """

    tokens: Callable[[], Tensor]
    """E[x_i | x_R, u_s]: (S, N, T)."""
    latents: Callable[[], Tensor] | None = None
    """Means of latents that are integrated inside: (S, N, K)."""
    labels: Callable[[], Tensor] | None = None
    """Probabilities of the values of what is summed out inside: (S, N, L)."""
    levels: Callable[[], Tensor | None] = lambda: None
    """Probabilities of the categories of categorical tokens, 0 for others: (S, N, T, L); None without any."""
    draws: Callable[[], Tensor | None] = lambda: None
    """Tokens drawn at each node, independent given it: (S, N, T); None where they are not."""
    values: Callable[[Tensor], list[list[dict[str, Tensor]]]] = _no_values
    """Of one vector: values of latents that are integrated inside, equally likely ones (or a mean) at each node.

    More of them at nodes of a greater share (S,) of the posterior.
    """


class Given(ABC):
    """The inner model of S nodes. A mask ``visible`` (T,) holds for all rows, NaN in x are missing.

    All but `NestedRows` are exact. For `log_joint` and what follows from it a mask may also be each row's own, (N, T).
    """

    maps: DenseMap | None = None
    """The S linear-Gaussian maps, where all rows share them."""
    detail: Detail = "usual"
    """Of nodes inside rows or groups, where there are any."""
    fair: bool = False
    """Whether what is said of nodes is right on the average alone: how far their weights differ holds the error."""

    @abstractmethod
    def log_joint(self, x: Tensor, visible: Tensor) -> Tensor:
        """log p(u_s, x_R), up to what stands in the weights: (N, T), (T,) -> (S, N)."""

    def with_detail(self, detail: Detail, some: Tensor | slice = slice(None)) -> Given:
        """The same at ``some`` nodes with more or less error; itself, at all of them, where there is none."""
        return self

    def uneven(self, x: Tensor) -> tuple[float, float]:
        """By how many nats jumps inside rows may move the integral at one node, and the error that panels would leave.

        Zeros where there are no nodes inside, or none that panels could replace.
        """
        return 0.0, 0.0

    def log_prior(self, x: Tensor) -> Tensor:
        """What of `log_joint` is there without any token: (S, 1) or (S, N)."""
        nothing = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
        return self.log_joint(x, nothing)

    @abstractmethod
    def predictive(self, x: Tensor, visible: Tensor) -> Tensor:
        """log p(x_i | x_R, u_s) of the hidden tokens: (N, T), (T,) -> (S, N, T)."""

    @abstractmethod
    def chain(self, x: Tensor, order: Tensor) -> Tensor:
        """`log_joint` of order[:t], t = 0..T: (N, T), (T,) -> (S, N, T + 1)."""

    @abstractmethod
    def posterior(self, x: Tensor, visible: Tensor) -> NodePosterior:
        """What is known of hidden tokens and of latents inside given x_R and u_s: (N, T), (T,)."""

    def doubt(self, x: Tensor, weight: Tensor) -> str:
        """What speaks against nodes inside, in words, at the node of the greatest log weight (S,); empty: nothing."""
        return ""

    def freeze(self) -> Given | None:
        """Plain tensors that serve for any rows; None where the model was read on its own."""
        return None


class Factorized(Given):
    """Tokens are independent given nodes and discrete latents: the program's own log-densities.

    Parameters
    ----------
    factors : Factors
        Of runs on all nodes at once, or on one node after the other.
    """

    def __init__(self, *factors: Factors):
        self.factors = factors

    @property
    def first(self) -> Factors:
        """Of all nodes, or of the first."""
        return self.factors[0]

    def _ask(self, question: Question) -> Tensor:
        """What is said at all nodes, these first."""
        if len(self.factors) == 1:
            return question(self.factors[0])
        return torch.cat([question(f) for f in self.factors])

    def log_prior(self, x: Tensor) -> Tensor:
        return self._ask(lambda factors: factors.log_prior())

    def log_joint(self, x: Tensor, visible: Tensor) -> Tensor:
        seen = visible & ~x.isnan() if has_missing(x) else visible
        return self._ask(lambda factors: factors.log_joint(seen))

    def predictive(self, x: Tensor, visible: Tensor) -> Tensor:
        seen, track = visible & ~x.isnan(), torch.is_grad_enabled()
        return self._ask(lambda factors: factors.predictive(seen, create_graph=track))

    def chain(self, x: Tensor, order: Tensor) -> Tensor:
        seen = ~x.isnan()
        return self._ask(lambda factors: factors.chain(seen, order))

    def posterior(self, x: Tensor, visible: Tensor) -> NodePosterior:
        seen = visible & ~x.isnan()
        return NodePosterior(
            tokens=lambda: self._ask(lambda factors: factors.means(seen)),
            labels=lambda: self._ask(lambda factors: factors.responsibilities(seen)),
            levels=lambda: self._levels(seen),
            draws=self._draws,
        )

    def _levels(self, seen: Tensor) -> Tensor | None:
        if self.first.levels(seen) is None:
            return None
        return self._ask(lambda factors: cast(Tensor, factors.levels(seen)))

    def _draws(self) -> Tensor | None:
        parts = [factors.draw() for factors in self.factors]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if known else None


class AffineBatch(Given):
    """Every node has a linear-Gaussian map: one that all rows share, or one for each row.

    Parameters
    ----------
    each : sequence of LinearRows
        Of one node after the other.
    beside : (LinearRows, int), optional
        In place of these the maps of S N rows in one: N rows (or one vector) under S maps each.
    shared : LinearRows, optional
        In place of these S maps in one, each of which all rows share: serves any rows.
    """

    def __init__(
        self,
        each: Sequence[LinearRows] = (),
        beside: tuple[LinearRows, int] | None = None,
        shared: LinearRows | None = None,
    ):
        self.shared, self._beside, self._each = shared, beside, each
        if shared is not None:
            reading = self.maps = shared.reading
            names, parts = reading._fields[:5], [t.split(1) for t in reading[:5]]
            self._each = [
                LinearRows(shared.structure, reading._replace(**dict(zip(names, part, strict=True))))
                for part in zip(*parts, strict=True)
            ]

    def _ask(self, x: Tensor, question: Callable[[LinearRows], Tensor]) -> Tensor:
        """What is said of rows (N, T) under the maps of all nodes (S, N, ...)."""
        if self._beside is None:
            return torch.stack([question(maps.at(x)) for maps in self._each])
        maps, n_nodes = self._beside
        found = question(maps.at(x.expand(n_nodes, *x.shape).flatten(0, 1)))
        return found.unflatten(0, (n_nodes, -1))

    def log_prior(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(self._each) if self._beside is None else self._beside[1], 1)

    def log_joint(self, x: Tensor, visible: Tensor) -> Tensor:
        shown = torch.where(visible, x, torch.nan)
        if self.shared is not None and self.shared.dense and not bool(shown.isnan().any()):
            return self.shared.at(x).score_under_each()
        return self._ask(shown, lambda maps: maps.score())

    def freeze(self) -> AffineBatch | None:
        return None if self.shared is None else AffineBatch(shared=self.shared.detached())

    def predictive(self, x: Tensor, visible: Tensor) -> Tensor:
        return self._ask(x, lambda maps: maps.conditionals(visible[None])[0])

    def chain(self, x: Tensor, order: Tensor) -> Tensor:
        steps = self._ask(x, lambda maps: maps.chain(order[None])[0][:, order]).cumsum(-1)
        return torch.cat([torch.zeros_like(steps[..., :1]), steps], -1)

    def posterior(self, x: Tensor, visible: Tensor) -> NodePosterior:
        shown = torch.where(visible, x, torch.nan)

        def latents() -> Tensor:
            return self._ask(shown, lambda maps: maps.posterior().mean)

        def values(share: Tensor) -> list[list[dict[str, Tensor]]]:
            if len(x) != 1:
                return []
            maps = self._each[0] if self._beside is None else self._beside[0]
            return [[latent_values(maps.structure, mean)] for mean in latents()]

        return NodePosterior(
            tokens=lambda: self._ask(shown, lambda maps: maps.posterior().tokens),
            latents=latents,
            values=values,
        )


class PlacedRows(NamedTuple):
    """Q nodes in each of N rows, for each of S of the nodes of the data set."""

    given: Given
    """The rows at S Q nodes."""
    log_weight: Tensor
    """(S, Q, N)"""
    latents: Callable[[], Tensor]
    """(S Q, N, d): values of the rows' latents there."""
    n_modes: int = 1
    """Around which the Q nodes stand, as many around each."""


class NestedRows(Given):
    """One vector of observations in rows that are independent given each node, with latents of their own.

        log p(x_R | u_s) = sum_n log sum_q w_nq p(x_nR | z_nq, u_s)

    Every row's nodes are placed for what is visible of it, some of the S at a time, or panels in their place.
    ``cells`` (N, T) tells where a row's tokens stand.
    """

    def __init__(
        self,
        place: Callable[[dict[str, Tensor], Detail, Tensor, Tensor], Iterator[PlacedRows]],
        cells: Tensor,
        held: dict[str, Tensor],
        panels: Callable[[dict[str, Tensor], Tensor, Tensor], Integrals] | None = None,
        detail: Detail = "usual",
        fair: bool = False,
    ):
        self.place, self.cells, self.held, self.detail = partial(place, held), cells, held, detail
        self.fair = fair
        self.n_nodes, self._at, self._panels = len(next(iter(held.values()))), place, panels

    def with_detail(self, detail: Detail, some: Tensor | slice = slice(None)) -> Given:
        held = {name: v[some] for name, v in self.held.items()}
        return NestedRows(self._at, self.cells, held, self._panels, detail, self.fair)

    def uneven(self, x: Tensor) -> tuple[float, float]:
        if self._panels is None:
            return 0.0, 0.0
        rows, shown = self._in_rows(x, torch.ones_like(x, dtype=torch.bool))
        placed = next(self.place("fine", rows, shown))
        of_each = self._log_joint(placed, rows, shown)[0].unflatten(0, (placed.n_modes, -1))
        empty = ~shown.any(1)
        moves = torch.where(empty, 0.0, roughness(of_each)).sum()
        if moves <= UNEVEN:
            return float(moves), 0.0
        error = self._panels(self.held, rows, shown).error
        return float(moves), float(torch.where(empty, 0.0, error).sum())

    def log_prior(self, x: Tensor) -> Tensor:
        return x.new_zeros(self.n_nodes, 1)

    def log_joint(self, x: Tensor, visible: Tensor) -> Tensor:
        return self._by_row(*self._in_rows(x, visible)).sum(-1, keepdim=True)

    def predictive(self, x: Tensor, visible: Tensor) -> Tensor:
        rows, shown = self._in_rows(x, visible)
        before = self._by_row(rows, shown)
        steps = []
        for token in range(rows.shape[1]):  # one more in every row at once, each at nodes of its own
            more = shown.clone()
            more[:, token] = ~rows[:, token].isnan()
            steps.append(self._by_row(rows, more) - before)
        return self._in_line(torch.stack(steps, -1))

    def chain(self, x: Tensor, order: Tensor) -> Tensor:
        rows, seen = self._in_rows(x, torch.ones_like(x, dtype=torch.bool))
        place = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
        turn = place[self.cells].sort(1)  # of each row's tokens: when they come, and which
        shown, by_row = torch.zeros_like(seen), [x.new_zeros(self.n_nodes, len(rows))]
        for token in turn.indices.T:  # the next one of every row at once
            shown = shown.scatter(1, token[:, None], seen.gather(1, token[:, None]))
            by_row.append(self._by_row(rows, shown))
        steps = torch.stack(by_row, -1).diff(dim=-1)  # (S, N, T)
        in_turn = torch.zeros_like(steps.flatten(1)).index_copy(1, turn.values.flatten(), steps.flatten(1))
        return torch.nn.functional.pad(in_turn.cumsum(-1), (1, 0))[:, None]

    def posterior(self, x: Tensor, visible: Tensor) -> NodePosterior:
        rows, shown = self._in_rows(x, visible)
        at = partial(self._average, rows, shown)
        return NodePosterior(
            tokens=lambda: self._in_line(at(lambda placed, inner: inner.tokens())),
            latents=lambda: at(_latents).flatten(1)[:, None],
            levels=lambda: self._levels(rows, shown),
        )

    def _levels(self, rows: Tensor, shown: Tensor) -> Tensor | None:
        if next(self.place(self.detail, rows, shown)).given.posterior(rows, shown).levels() is None:
            return None
        found = self._average(rows, shown, lambda placed, inner: cast(Tensor, inner.levels()))
        return torch.stack([self._in_line(t) for t in found.unbind(-1)], -1)

    def _by_row(self, rows: Tensor, shown: Tensor) -> Tensor:
        """log p(x_nR | u_s) (S, N)."""
        if self.detail == "panels" and self._panels is not None:
            log_z = self._panels(self.held, rows, shown).log_z.unflatten(0, (self.n_nodes, -1))
            return torch.where(shown.any(1), log_z, 0.0)
        parts = [
            self._log_joint(placed, rows, shown).logsumexp(1)
            for placed in self.place(self.detail, rows, shown)
        ]
        return torch.where(shown.any(1), torch.cat(parts), 0.0)  # Z(nothing) is 1

    def _log_joint(self, placed: PlacedRows, rows: Tensor, shown: Tensor) -> Tensor:
        """Log p of what is shown of each row and its nodes (S, Q, N)."""
        log_prob = placed.given.log_joint(rows, shown)
        return placed.log_weight + log_prob.unflatten(0, placed.log_weight.shape[:2])

    def _average(
        self, rows: Tensor, shown: Tensor, what: Callable[[PlacedRows, NodePosterior], Tensor]
    ) -> Tensor:
        """Posterior mean over the nodes of every row of something (S Q, N, ...): (S, N, ...)."""
        parts = []
        for placed in self.place(self.detail, rows, shown):
            share = self._log_joint(placed, rows, shown).softmax(1)
            value = what(placed, placed.given.posterior(rows, shown))
            value = value.expand(share.shape[0] * share.shape[1], *value.shape[1:])
            value = value.unflatten(0, share.shape[:2])
            parts.append((share.reshape(*share.shape, *(1,) * (value.ndim - 3)) * value).sum(1))
        return torch.cat(parts)

    def _in_rows(self, x: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        return self.in_rows(x, visible, self.cells)

    @staticmethod
    def in_rows(x: Tensor, visible: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """The one vector as rows (N, T), and what is shown of them."""
        return x[0, cells], (visible & ~x.isnan())[0, cells]

    def _in_line(self, by_row: Tensor) -> Tensor:
        """(S, N, T) as one vector: (S, 1, N T)."""
        line = by_row.new_zeros(len(by_row), self.cells.numel())
        return line.index_copy(1, self.cells.flatten(), by_row.flatten(1))[:, None]


def _latents(placed: PlacedRows, inner: NodePosterior) -> Tensor:
    """Latents of rows at their nodes, those at nodes first: (S Q, N, K)."""
    inside = [find() for find in (inner.latents, inner.labels) if find is not None]
    return torch.cat([placed.latents(), *(t for t in inside if t.shape[-1])], -1)
