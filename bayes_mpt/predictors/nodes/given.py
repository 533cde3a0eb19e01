"""What a model says of tokens given weighted nodes, all nodes at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast

import pyro
import torch
from torch import Tensor

from bayes_mpt.predictors.gaussian.linear import LinearRows
from bayes_mpt.program.affine import latent_values
from bayes_mpt.program.factors import Factors
from bayes_mpt.program.tracing import has_missing

__all__ = [
    "AffineBatch",
    "Factorized",
    "Given",
    "Mapped",
    "NestedRows",
    "PlacedRows",
    "SideBySide",
    "Stacked",
]


class Given(ABC):
    """The inner model of S nodes. A mask ``visible`` (T,) holds for all rows, NaN in x are missing.

    All but `NestedRows` are exact. For `log_joint` and what follows from it a mask may also be each row's own, (N, T).
    """

    @abstractmethod
    def log_joint(self, x: Tensor, visible: Tensor) -> Tensor:
        """log p(u_s, x_R), up to what stands in the weights: (N, T), (T,) -> (S, N)."""

    def refined(self) -> Given:
        """The same with less error, to see it; itself where there is none."""
        return self

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
    def means(self, x: Tensor, visible: Tensor) -> Tensor:
        """E[x_i | x_R, u_s]: (S, N, T)."""

    def latents(self, x: Tensor) -> list[dict[str, Tensor]]:
        """Posterior means of latents that are integrated inside, of each node; for one vector."""
        return []

    def inner(self, x: Tensor, visible: Tensor) -> Tensor:
        """Posterior means of latents that are integrated inside: (S, N, K)."""
        return x.new_zeros(1, len(x), 0)

    def levels(self, x: Tensor, visible: Tensor) -> Tensor | None:
        """Probabilities of the categories of categorical tokens, 0 for others: (S, N, T, L); None without any."""
        return None

    def draw(self) -> Tensor | None:
        """Tokens drawn at each node, independent given it: (S, N, T); None where they are not."""
        return None

    def responsibilities(self, x: Tensor, visible: Tensor) -> Tensor:
        """Probabilities of the values of what is summed out inside: (S, N, L)."""
        return x.new_zeros(1, len(x), 0)

    def freeze(self) -> Given | None:
        """Plain tensors that serve for any rows; None where the model was read on its own."""
        return None


@dataclass(frozen=True)
class Factorized(Given):
    """Tokens are independent given nodes and discrete latents."""

    factors: Factors

    def log_prior(self, x: Tensor) -> Tensor:
        return self.factors.log_prior()

    def log_joint(self, x: Tensor, visible: Tensor) -> Tensor:
        return self.factors.log_joint(visible & ~x.isnan() if has_missing(x) else visible.expand(x.shape))

    def predictive(self, x: Tensor, visible: Tensor) -> Tensor:
        return self.factors.predictive(visible & ~x.isnan(), create_graph=torch.is_grad_enabled())

    def chain(self, x: Tensor, order: Tensor) -> Tensor:
        return self.factors.chain(~x.isnan(), order)

    def means(self, x: Tensor, visible: Tensor) -> Tensor:
        return self.factors.means(visible & ~x.isnan())

    def responsibilities(self, x: Tensor, visible: Tensor) -> Tensor:
        return self.factors.responsibilities(visible & ~x.isnan())

    def levels(self, x: Tensor, visible: Tensor) -> Tensor | None:
        return self.factors.levels(visible & ~x.isnan())

    def draw(self) -> Tensor | None:
        return self.factors.draw()


@dataclass(frozen=True)
class AffineBatch(Given):
    """Every node has a linear-Gaussian map."""

    each: tuple[LinearRows, ...] = ()
    together: LinearRows | None = None
    """The maps in one reading instead, where all rows share them."""

    @property
    def maps(self) -> tuple[LinearRows, ...]:
        """One by one."""
        if self.together is None:
            return self.each
        reading = self.together.reading
        parts = [t.split(1) for t in reading[:5]]
        names = reading._fields[:5]
        return tuple(
            LinearRows(self.together.structure, reading._replace(**dict(zip(names, part, strict=True))))
            for part in zip(*parts, strict=True)
        )

    def log_prior(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(self.maps), 1)

    def log_joint(self, x: Tensor, visible: Tensor) -> Tensor:
        shown = torch.where(visible, x, torch.nan)
        if self.together is not None and self.together.dense and not bool(shown.isnan().any()):
            return self.together.at(x).score_under_each()
        return torch.stack([m.at(shown).score() for m in self.maps])

    def freeze(self) -> AffineBatch | None:
        if self.together is None:
            return None
        return AffineBatch(together=self.together.detached())

    def predictive(self, x: Tensor, visible: Tensor) -> Tensor:
        return torch.stack([m.at(x).conditionals(visible[None])[0] for m in self.maps])

    def chain(self, x: Tensor, order: Tensor) -> Tensor:
        steps = torch.stack([m.at(x).chain(order[None])[0][:, order] for m in self.maps]).cumsum(-1)
        return torch.cat([torch.zeros_like(steps[..., :1]), steps], -1)

    def means(self, x: Tensor, visible: Tensor) -> Tensor:
        shown = torch.where(visible, x, torch.nan)
        return torch.stack([m.at(shown).posterior().tokens for m in self.maps])

    def inner(self, x: Tensor, visible: Tensor) -> Tensor:
        shown = torch.where(visible, x, torch.nan)
        return torch.stack([m.at(shown).posterior().mean for m in self.maps])

    def latents(self, x: Tensor) -> list[dict[str, Tensor]]:
        return [latent_values(m.structure, m.at(x).posterior().mean) for m in self.maps]


@dataclass(frozen=True)
class SideBySide(Given):
    """N rows (or one vector) under S linear-Gaussian maps each, which stand where the maps of S N rows would."""

    maps: LinearRows
    n_nodes: int

    def log_prior(self, x: Tensor) -> Tensor:
        return x.new_zeros(self.n_nodes, 1)

    def log_joint(self, x: Tensor, visible: Tensor) -> Tensor:
        return self._nodes_first(self._rows(x, visible).score())

    def predictive(self, x: Tensor, visible: Tensor) -> Tensor:
        return self._nodes_first(self._rows(x).conditionals(visible[None])[0])

    def chain(self, x: Tensor, order: Tensor) -> Tensor:
        steps = self._nodes_first(self._rows(x).chain(order[None])[0][:, order].cumsum(-1))
        return torch.cat([torch.zeros_like(steps[..., :1]), steps], -1)

    def means(self, x: Tensor, visible: Tensor) -> Tensor:
        return self._nodes_first(self._rows(x, visible).posterior().tokens)

    def inner(self, x: Tensor, visible: Tensor) -> Tensor:
        return self._nodes_first(self._rows(x, visible).posterior().mean)

    def latents(self, x: Tensor) -> list[dict[str, Tensor]]:
        if len(x) != 1:
            return []
        means = self._rows(x).posterior().mean
        return [latent_values(self.maps.structure, mean[None]) for mean in means]

    def _rows(self, x: Tensor, visible: Tensor | None = None) -> LinearRows:
        shown = x if visible is None else torch.where(visible, x, torch.nan)
        return self.maps.at(shown.expand(self.n_nodes, *shown.shape).flatten(0, 1))

    def _nodes_first(self, t: Tensor) -> Tensor:
        return t.unflatten(0, (self.n_nodes, -1))


@dataclass(frozen=True)
class Mapped(Given):
    """`Factorized` of a program that does not broadcast over leading batch dimensions (``x @ w``): by `torch.vmap`."""

    factors: Callable[[dict[str, Tensor]], Factors]
    """Of one node."""
    values: dict[str, Tensor]
    """(S, ...) of the continuous latents."""

    def log_prior(self, x: Tensor) -> Tensor:
        return self._each(lambda given: given.log_prior(x))

    def log_joint(self, x: Tensor, visible: Tensor) -> Tensor:
        return self._each(lambda given: given.log_joint(x, visible))

    def predictive(self, x: Tensor, visible: Tensor) -> Tensor:
        return self._each(lambda given: given.predictive(x, visible))

    def chain(self, x: Tensor, order: Tensor) -> Tensor:
        return self._each(lambda given: given.chain(x, order))

    def means(self, x: Tensor, visible: Tensor) -> Tensor:
        return self._each(lambda given: given.means(x, visible))

    def levels(self, x: Tensor, visible: Tensor) -> Tensor | None:
        first = Factorized(self.factors({name: v[0] for name, v in self.values.items()}))
        if first.levels(x, visible) is None:
            return None
        return self._each(lambda given: cast(Tensor, given.levels(x, visible)))

    def _each(self, question: Callable[[Factorized], Tensor]) -> Tensor:
        with pyro.validation_enabled(False):  # a check would have to branch on its node
            return torch.vmap(lambda v: question(Factorized(self.factors(v))))(self.values)[:, 0]


class Stacked(Given):
    """Nodes that had to be read one by one."""

    def __init__(self, parts: tuple[Given, ...]):
        self.parts = parts

    def log_prior(self, x: Tensor) -> Tensor:
        return torch.cat([p.log_prior(x) for p in self.parts])

    def log_joint(self, x: Tensor, visible: Tensor) -> Tensor:
        return torch.cat([p.log_joint(x, visible) for p in self.parts])

    def predictive(self, x: Tensor, visible: Tensor) -> Tensor:
        return torch.cat([p.predictive(x, visible) for p in self.parts])

    def chain(self, x: Tensor, order: Tensor) -> Tensor:
        return torch.cat([p.chain(x, order) for p in self.parts])

    def means(self, x: Tensor, visible: Tensor) -> Tensor:
        return torch.cat([p.means(x, visible) for p in self.parts])

    def responsibilities(self, x: Tensor, visible: Tensor) -> Tensor:
        return torch.cat([p.responsibilities(x, visible) for p in self.parts])

    def levels(self, x: Tensor, visible: Tensor) -> Tensor | None:
        parts = [p.levels(x, visible) for p in self.parts]
        known = [p for p in parts if p is not None]
        return torch.cat(known) if known else None


class PlacedRows(NamedTuple):
    """Q nodes in each of N rows, for each of S nodes of the data set."""

    given: Given
    """The rows at S Q nodes."""
    log_weight: Tensor
    """(S, Q, N)"""
    latents: Tensor
    """(S, Q, N, d): values of the rows' latents there."""


class NestedRows(Given):
    """One vector of observations in rows that are independent given each node, with latents of their own.

        log p(x_R | u_s) = sum_n log sum_q w_nq p(x_nR | z_nq, u_s)

    Every row's nodes are placed for what is visible of it. ``cells`` (N, T) tells where a row's tokens stand.
    """

    def __init__(
        self,
        place: Callable[[bool, Tensor, Tensor], PlacedRows],
        cells: Tensor,
        n_nodes: int,
        fine: bool = False,
    ):
        self.place, self.cells, self.n_nodes, self.fine = place, cells, n_nodes, fine

    def refined(self) -> Given:
        return NestedRows(self.place, self.cells, self.n_nodes, fine=True)

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

    def means(self, x: Tensor, visible: Tensor) -> Tensor:
        return self._in_line(self._average(x, visible, lambda p, *seen: p.given.means(*seen)))

    def inner(self, x: Tensor, visible: Tensor) -> Tensor:
        def latents(placed: PlacedRows, rows: Tensor, shown: Tensor) -> Tensor:
            more = placed.given.inner(rows, shown)
            nodes = placed.latents.flatten(0, 1)
            parts = [nodes] + [t for t in (more, placed.given.responsibilities(rows, shown)) if t.shape[-1]]
            return torch.cat(parts, -1)

        return self._average(x, visible, latents).flatten(1)[:, None]

    def levels(self, x: Tensor, visible: Tensor) -> Tensor | None:
        rows, shown = self._in_rows(x, visible)
        if self.place(self.fine, rows, shown).given.levels(rows, shown) is None:
            return None
        found = self._average(x, visible, lambda p, *seen: cast(Tensor, p.given.levels(*seen)))
        return torch.stack([self._in_line(t) for t in found.unbind(-1)], -1)

    def _by_row(self, rows: Tensor, shown: Tensor) -> Tensor:
        """log p(x_nR | u_s) (S, N)."""
        log_prob = self._log_joint(self.place(self.fine, rows, shown), rows, shown)
        return torch.where(shown.any(1), log_prob.logsumexp(1), 0.0)  # Z(nothing) is 1

    def _log_joint(self, placed: PlacedRows, rows: Tensor, shown: Tensor) -> Tensor:
        """Log p of what is shown of each row and its nodes (S, Q, N)."""
        log_prob = placed.given.log_joint(rows, shown)
        return placed.log_weight + log_prob.unflatten(0, placed.log_weight.shape[:2])

    def _average(
        self, x: Tensor, visible: Tensor, what: Callable[[PlacedRows, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Posterior mean over the nodes of every row of something (S Q, N, ...): (S, N, ...)."""
        rows, shown = self._in_rows(x, visible)
        placed = self.place(self.fine, rows, shown)
        share = self._log_joint(placed, rows, shown).softmax(1)
        value = what(placed, rows, shown)
        value = value.expand(share.shape[0] * share.shape[1], *value.shape[1:]).unflatten(0, share.shape[:2])
        return (share.reshape(*share.shape, *(1,) * (value.ndim - 3)) * value).sum(1)

    def _in_rows(self, x: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """The one vector as rows (N, T), and what is shown of them."""
        return x[0, self.cells], (visible & ~x.isnan())[0, self.cells]

    def _in_line(self, by_row: Tensor) -> Tensor:
        """(S, N, T) as one vector: (S, 1, N T)."""
        line = by_row.new_zeros(len(by_row), self.cells.numel())
        return line.index_copy(1, self.cells.flatten(), by_row.flatten(1))[:, None]
