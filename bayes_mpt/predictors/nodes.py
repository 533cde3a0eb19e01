"""Weighted nodes over what cannot be integrated exactly, an inner model given each node that is exact, or nodes again.

    Z(R) = sum_s w_s p(x_R | u_s),    log p(x_i | x_R) = log Z(R + i) - log Z(R),    Z(nothing) = 1

The inner model answers for all nodes at once: `FactorsGiven` from the program's own log-densities, discrete latents
summed out; `MapsGiven` from one linear-Gaussian map a node; `RowsGiven` from nodes in each row. Nodes are shared along
a chain, so that it telescopes: its sum is log Z of all tokens, the importance-weighted bound where the nodes are
sampled.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple, cast

import pyro
import torch
from pyro import poutine
from torch import Tensor

from bayes_mpt.affine import cycle, latent_values, same_by_label
from bayes_mpt.factors import Factors, read_factors
from bayes_mpt.latents import Space
from bayes_mpt.predictors.base import Conditionals, Evidence, Guide, Posterior
from bayes_mpt.predictors.linear_gaussian import LinearGaussian
from bayes_mpt.tracing import (
    N_TRIAL_ROWS,
    Latent,
    Model,
    ModelError,
    Program,
    SetLatents,
    fill,
    has_missing,
    head,
    is_subsample,
    read_values,
    rows_first,
    run,
    split_events,
    survey,
)

__all__ = [
    "FactorsGiven",
    "FixedSites",
    "Given",
    "Mapped",
    "MapsGiven",
    "Nodes",
    "PlacedRows",
    "Read",
    "Reader",
    "RowsGiven",
    "SideBySide",
    "Stacked",
    "constrained",
    "enumerated",
    "growing",
    "means_of_new",
    "mixture_of_maps",
    "nodes_first",
    "program_values",
]

LEAST_SHARE = 1e-6  # of a node's weight that a prediction takes into account
N_DRAWS = 1000  # of the latents of new rows
MAX_MAPS = 256  # joint values of a row's discrete latents, each with a map of its own


# ------------------------------------------------------------------------------------------------- given the nodes


class Given(ABC):
    """The inner model of S nodes. A mask ``visible`` (T,) holds for all rows, NaN in x are missing.

    All but `RowsGiven` are exact. For `log_joint` and what follows from it a mask may also be each row's own, (N, T).
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
class FactorsGiven(Given):
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
class MapsGiven(Given):
    """Every node has a linear-Gaussian map."""

    each: tuple[LinearGaussian, ...] = ()
    together: LinearGaussian | None = None
    """The maps in one reading instead, where all rows share them."""

    @property
    def maps(self) -> tuple[LinearGaussian, ...]:
        """One by one."""
        if self.together is None:
            return self.each
        reading = self.together.reading
        parts = [t.split(1) for t in reading[:5]]
        names = reading._fields[:5]
        return tuple(
            self.together.with_reading(reading._replace(**dict(zip(names, part, strict=True))))
            for part in zip(*parts, strict=True)
        )

    def log_prior(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(self.maps), 1)

    def log_joint(self, x: Tensor, visible: Tensor) -> Tensor:
        shown = torch.where(visible, x, torch.nan)
        if self.together is not None and self.together.dense and not bool(shown.isnan().any()):
            return self.together.joint_under_each(x)
        return torch.stack([m.joint(shown) for m in self.maps])

    def freeze(self) -> MapsGiven | None:
        if self.together is None:
            return None
        return MapsGiven(together=self.together.freeze())

    def predictive(self, x: Tensor, visible: Tensor) -> Tensor:
        return torch.stack([m.conditionals(x, visible[None])[0] for m in self.maps])

    def chain(self, x: Tensor, order: Tensor) -> Tensor:
        steps = torch.stack([m.chain(x, order[None])[0][:, order] for m in self.maps]).cumsum(-1)
        return torch.cat([torch.zeros_like(steps[..., :1]), steps], -1)

    def means(self, x: Tensor, visible: Tensor) -> Tensor:
        shown = torch.where(visible, x, torch.nan)
        return torch.stack([m.posterior(shown).tokens for m in self.maps])

    def inner(self, x: Tensor, visible: Tensor) -> Tensor:
        shown = torch.where(visible, x, torch.nan)
        return torch.stack([m.posterior(shown).mean for m in self.maps])

    def latents(self, x: Tensor) -> list[dict[str, Tensor]]:
        return [latent_values(m.structure, m.posterior(x).mean) for m in self.maps]


@dataclass(frozen=True)
class SideBySide(Given):
    """N rows (or one vector) under S linear-Gaussian maps each, which stand where the maps of S N rows would."""

    maps: LinearGaussian
    n_nodes: int

    def log_prior(self, x: Tensor) -> Tensor:
        return x.new_zeros(self.n_nodes, 1)

    def log_joint(self, x: Tensor, visible: Tensor) -> Tensor:
        return self._nodes_first(self.maps.joint(self._rows(x, visible)))

    def predictive(self, x: Tensor, visible: Tensor) -> Tensor:
        return self._nodes_first(self.maps.conditionals(self._rows(x), visible[None])[0])

    def chain(self, x: Tensor, order: Tensor) -> Tensor:
        steps = self._nodes_first(self.maps.chain(self._rows(x), order[None])[0][:, order].cumsum(-1))
        return torch.cat([torch.zeros_like(steps[..., :1]), steps], -1)

    def means(self, x: Tensor, visible: Tensor) -> Tensor:
        return self._nodes_first(self.maps.posterior(self._rows(x, visible)).tokens)

    def inner(self, x: Tensor, visible: Tensor) -> Tensor:
        return self._nodes_first(self.maps.posterior(self._rows(x, visible)).mean)

    def latents(self, x: Tensor) -> list[dict[str, Tensor]]:
        if len(x) != 1:
            return []
        means = self.maps.posterior(self._rows(x)).mean
        return [latent_values(self.maps.structure, mean[None]) for mean in means]

    def _rows(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        shown = x if visible is None else torch.where(visible, x, torch.nan)
        return shown.expand(self.n_nodes, *shown.shape).flatten(0, 1)

    def _nodes_first(self, t: Tensor) -> Tensor:
        return t.unflatten(0, (self.n_nodes, -1))


@dataclass(frozen=True)
class Mapped(Given):
    """`FactorsGiven` of a program that takes no further axes (``x @ w``): every node as if alone, all in one pass."""

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
        first = FactorsGiven(self.factors({name: v[0] for name, v in self.values.items()}))
        if first.levels(x, visible) is None:
            return None
        return self._each(lambda given: cast(Tensor, given.levels(x, visible)))

    def _each(self, question: Callable[[FactorsGiven], Tensor]) -> Tensor:
        with pyro.validation_enabled(False):  # a check would have to branch on its node
            return torch.vmap(lambda v: question(FactorsGiven(self.factors(v))))(self.values)[:, 0]


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


class RowsGiven(Given):
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
        return RowsGiven(self.place, self.cells, self.n_nodes, fine=True)

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


# ------------------------------------------------------------------------------------------------------- the nodes


class Read(NamedTuple):
    """What reading a program at its nodes gives."""

    given: Given
    log_weight: Tensor
    """(S, N)"""
    value: Tensor
    """(N, T) tokens, NaN where missing."""
    scale: float
    latents: Tensor
    """(S, N, K): values of the latents at the nodes, site after site."""
    names: tuple[str, ...]
    """Of those sites."""
    located: Any = None
    """What the nodes were placed by, so that others can be placed alike."""


class Reader(ABC):
    """Where the nodes come from."""

    program: Program
    model: Model
    exact: bool = False
    located: bool = False
    """Nodes are placed for the visible set they are used with, without error or almost."""
    sampled: bool = False
    """Nodes are random."""
    one_by_one: bool = False
    """Every node needs runs of its own."""
    climbs: bool = False
    """There is an `objective`."""
    guide: Guide | None = None
    name: str
    why: str

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of what a training moves."""
        return self.program.parameters

    @abstractmethod
    def read(self, args: tuple[Any, ...], visible: Tensor | None = None) -> Read:
        """Run the program; place the nodes for the visible (T,) tokens, by default all."""

    def dream(self, args: tuple[Any, ...], generator: torch.Generator) -> Tensor | None:
        """What a guide makes of latents whose rows were simulated (N,), to train it on; None if not asked for."""
        return None

    def in_training(self) -> tuple[Reader, ...]:
        """Readers whose nodes the steps of a training take, one after the other: by default the same."""
        return (self,)

    def objective(self, args: tuple[Any, ...]) -> Tensor:
        """A smooth approximation of log Z (N,), to train on in place of random nodes."""
        raise NotImplementedError

    def evidence(self, nodes: Nodes, x: Tensor) -> Evidence:
        """log Z of each row with its error."""
        return Evidence(nodes.joint(x), 0.0, {})


class Nodes(Conditionals):
    """The weighted sum over the nodes of a reader."""

    def __init__(self, reader: Reader):
        self.reader: Reader | None = reader
        self.model = reader.model
        self.structure = reader.program
        self.why = reader.why
        self.exact = reader.exact
        self.sampled = reader.sampled
        self.one_by_one = reader.one_by_one
        self.climbs = reader.climbs
        self.relocates = reader.located
        self.name = reader.name
        self.guide = reader.guide
        self.args: tuple[Any, ...] = ()
        self._read: Read | None = None
        self._fixed: dict[str, Tensor] = {}

    @property
    def parameters(self) -> tuple[str, ...]:
        return self.structure.parameters if self.reader is None else self.reader.parameters

    @property
    def last(self) -> Read:
        """What was last read."""
        if self._read is None:
            raise RuntimeError("call read(args) first: this predictor has not read the program yet")
        return self._read

    @property
    def value(self) -> Tensor:
        return self.last.value

    @property
    def scale(self) -> float:
        return self.last.scale

    def read(self, args: tuple[Any, ...]) -> Nodes:
        new = Nodes(self._thawed)
        new.args, new._fixed = args, self._sub_sample(args)
        return new.rerun(lambda: self._thawed.read(args))

    def dream(self, args: tuple[Any, ...], generator: torch.Generator) -> Tensor | None:
        return self._thawed.dream(args, generator)

    def in_training(self) -> tuple[Nodes, ...]:
        return tuple(Nodes(reader) for reader in self._thawed.in_training())

    def rerun(self, read: Callable[[], Read]) -> Nodes:
        """The same rows at other nodes."""
        new = Nodes(self._thawed)
        new.args, new._fixed = self.args, self._fixed
        with SetLatents(new._fixed):
            new._read = read()
        return new

    def _sub_sample(self, args: tuple[Any, ...]) -> dict[str, Tensor]:
        """The rows that sub-sampling plates draw: once for all runs of a reading, of program and guide alike."""
        if not isinstance(self.structure, Program) or (
            self.structure.sub_rows is None and self.structure.scale == 1.0
        ):
            return {}
        trace = run(self._thawed.model, tuple(fill(a) for a in args))
        return {name: node["value"] for name, node in trace.nodes.items() if is_subsample(node)}

    def freeze(self) -> Nodes:
        new = Nodes(self._thawed)
        new.reader = new.model = new.guide = None
        given = None if self._read is None else self._read.given.freeze()
        if self._read is not None and given is not None:
            weight, latents = self._read.log_weight.detach().clone(), self._read.latents.detach().clone()
            new._read = self._read._replace(
                given=given, log_weight=weight, latents=latents, value=self.value[:0]
            )
        return new

    def objective(self, args: tuple[Any, ...]) -> Tensor:
        return self._thawed.objective(args)

    def evidence(self, x: Tensor) -> Evidence:
        if self.reader is None:  # what is frozen and yet scores is exact
            return Evidence(self.joint(x), 0.0, {})
        return self.reader.evidence(self, x)

    @property
    def _thawed(self) -> Reader:
        if self.reader is None:
            raise RuntimeError("this predictor is frozen: it has no program to read")
        return self.reader

    def conditionals(self, x: Tensor, visible: Tensor) -> Tensor:
        self._check(x)
        if self.sampled and self.reader is not None and not self.reader.located:
            raise ModelError(
                "nodes from this guide have seen the hidden tokens, so single conditionals mean nothing, only the sum "
                "of a whole chain: use PermutationChain, or give the guide an argument ``visible`` (N, T)"
            )
        out = []
        for mask in visible:
            read = self._at(mask)
            # log Z(R + i) - log Z(R)
            if self.reader is not None and self.reader.located and not self.sampled:
                out.append(self._each_at_its_own(x, mask))
                continue
            log_prob = read.log_weight + read.given.log_joint(x, mask)  # (S, N)
            step = (log_prob[..., None] + read.given.predictive(x, mask)).logsumexp(0)
            out.append(step - self._log_z(log_prob, x, mask)[:, None])
        hidden = ~visible[:, None] & ~x.isnan()
        return torch.where(hidden, torch.stack(out), 0.0)

    def chain(self, x: Tensor, order: Tensor) -> Tensor:
        self._check(x)
        seen = ~x.isnan()
        out = []
        for tokens in order:
            if self.reader is not None and self.reader.located:
                out.append(self._relocated_chain(x, tokens))
                continue
            read = self.last
            log_z = (read.log_weight[..., None] + read.given.chain(x, tokens)).logsumexp(0)  # (N, T + 1)
            # Z(nothing) is 1, and not the mean of the weights; rows start at their first observed token
            none_yet = torch.cat([torch.zeros_like(seen[:, :1]), seen[:, tokens]], 1).cumsum(1) == 0
            steps = torch.where(none_yet, 0.0, log_z).diff(dim=1)
            out.append(torch.empty_like(steps).index_copy(1, tokens, steps))
        return torch.stack(out)

    def revealed(self, x: Tensor, order: Tensor, sizes: list[int]) -> Tensor:
        self._check(x)
        visible = torch.zeros(len(sizes), x.shape[1], dtype=torch.bool, device=x.device)
        for mask, size in zip(visible, sizes, strict=True):
            mask[order[:size]] = True
        nothing = x.new_zeros(len(x))
        return torch.stack([self._z_at(x, mask) if mask.any() else nothing for mask in visible])

    def joint(self, x: Tensor) -> Tensor:
        self._check(x)
        read = self.last
        everything = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
        log_prob = read.log_weight + read.given.log_joint(x, everything)
        return self._log_z(log_prob, x, everything)

    def refined(self) -> Nodes:
        """The same with less error of the inner model, to see it; itself where there is none."""
        given = self.last.given.refined()
        return self if given is self.last.given else self.rerun(lambda: self.last._replace(given=given))

    def posterior(self, x: Tensor, visible: Tensor | None = None) -> Posterior:
        self._check(x)
        mask = torch.ones(x.shape[1], dtype=torch.bool, device=x.device) if visible is None else visible
        read = self._at(mask) if visible is not None else self.last
        share = (read.log_weight + read.given.log_joint(x, mask)).softmax(0)[..., None]  # (S, N, 1)
        parts = (read.latents, read.given.inner(x, mask), read.given.responsibilities(x, mask))
        latents = torch.cat([(share * part).sum(0) for part in parts], -1)
        tokens = (share * read.given.means(x, mask)).sum(0)
        levels = read.given.levels(x, mask)  # of categorical tokens: the likeliest, and not the mean of codes
        if levels is not None:
            chance = (share[..., None] * levels).sum(0)  # (N, T, L)
            tokens = torch.where(chance.sum(-1) > 0, chance.argmax(-1).to(tokens), tokens)
        return Posterior(latents, tokens)

    def draw(self, x: Tensor, n_draws: int) -> Tensor:
        self._check(x)
        read = self.last
        everything = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
        share = (read.log_weight + read.given.log_joint(x, everything)).softmax(0)  # (S, N)
        out = []
        for node in torch.multinomial(share.mT, n_draws, replacement=True).mT:  # (N,) of each draw
            tokens = read.given.draw()
            if tokens is None:
                return super().draw(x, n_draws)
            picked = tokens.gather(0, node[None, :, None].expand(1, *tokens.shape[1:]))[0]
            out.append(torch.where(x.isnan(), picked, x))
        return torch.stack(out)

    def shared_latents(self, x: Tensor) -> list[tuple[float, dict[str, Tensor]]]:
        if self.structure.by_row or len(self.last.latents[0]) != 1:
            return []
        read = self.last
        everything = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
        share = (read.log_weight + read.given.log_joint(x, everything)).softmax(0)[:, 0]
        inner = read.given.latents(x)
        out = []
        for s in range(len(share)):
            if float(share[s]) < LEAST_SHARE:
                continue
            values, start = dict(inner[s]) if inner else {}, 0
            for site in self.structure.latents:
                if site.name in read.names:
                    part = read.latents[s, 0, start : start + site.width]
                    start += site.width
                    values[site.name] = part.reshape(site.shape)
            out.append((float(share[s]), values))
        return out

    def _at(self, mask: Tensor) -> Read:
        """Nodes for this visible set."""
        if self.reader is not None and self.reader.located and not bool(mask.all()):
            with SetLatents(self._fixed):
                return self.reader.read(self.args, mask)
        return self.last

    def _relocated_chain(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Every Z at nodes of its own, so that the sum is that of all tokens."""
        visible = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
        out, before = torch.zeros_like(x), x.new_zeros(len(x))
        for token in tokens:
            visible = visible.clone()
            visible[token] = True
            now = self._z_at(x, visible)
            out[:, token], before = now - before, now
        return out

    def _each_at_its_own(self, x: Tensor, mask: Tensor) -> Tensor:
        """log Z(R + i) - log Z(R) (N, T): a single token can move the posterior away from nodes placed without it."""
        before = self._z_at(x, mask)
        out = torch.zeros_like(x)
        for token in (~mask).nonzero()[:, 0]:
            more = mask.clone()
            more[token] = True
            out[:, token] = self._z_at(x, more) - before
        return out

    def _z_at(self, x: Tensor, mask: Tensor) -> Tensor:
        """log Z (N,) of these tokens, nodes placed for them."""
        read = self._at(mask)
        return self._log_z(read.log_weight + read.given.log_joint(x, mask), x, mask)

    def _log_z(self, log_prob: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        """(S, N) -> (N,); 0 for rows of which nothing is visible."""
        log_z = log_prob.logsumexp(0)
        if bool(mask.any()) and not has_missing(x):
            return log_z
        none = ~(mask & ~x.isnan()).any(1)
        return torch.where(none, 0.0, log_z) if bool(none.any()) else log_z

    def _check(self, x: Tensor) -> None:
        got, want = x.shape, self.last.value.shape
        if got[1:] != want[1:] or (not self.structure.plain and len(x) != want[0]):
            raise ModelError(
                f"these conditionals were read on rows of shape {tuple(self.last.value.shape)}, got "
                f"{tuple(x.shape)}: call read(args) with the rows to be scored"
            )


# ------------------------------------------------------------------------------------ all values of discrete latents


class _Enumerated(Reader):
    """No nodes at all: every latent is discrete, and summed out."""

    exact = True
    name = "Exact"

    def __init__(self, model: Model, program: Program):
        self.model, self.program = model, program
        names = ", ".join(program.discrete)
        self.why = f"the values of {names} are summed out" if names else "no latent stands in the program"

    def read(self, args: tuple[Any, ...], visible: Tensor | None = None) -> Read:
        filled = tuple(fill(a) for a in args)
        factors = read_factors(self.model, filled, self.program)
        value = program_values(self.model, args, filled, self.program)
        zero = value.new_zeros(1, factors.n_rows)
        return Read(
            FactorsGiven(factors), zero, value, factors.scale, value.new_zeros(1, factors.n_rows, 0), ()
        )


def enumerated(model: Model, args: tuple[Any, ...], program: Program) -> Nodes:
    """Programs whose latents are all discrete."""
    reader = _Enumerated(model, program)
    try:
        read_factors(model, tuple(fill(a) for a in args), program)
    except ModelError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        if "alloc" in str(error) or "memory" in str(error):
            raise ModelError(
                f"summing out {list(program.discrete)} at once needs more memory than there is: each adds an axis to "
                "what depends on it. Use fewer values, or pyro.markov where only neighbours depend on each other"
            ) from error
        raise ModelError(
            f"the program cannot run on all values of {list(program.discrete)} at once ({error}): index with them as "
            "tensors that may have more axes on the left (probs[z]), without Python's if"
        ) from error
    return Nodes(reader)


class _Maps(Reader):
    """One node for each joint value of a row's discrete latents, with a linear-Gaussian map of its own.

    The number of that value in each row is a covariate of a linear-Gaussian program, so that one program is found out
    about, and not one for each value.
    """

    exact = True
    name = "Exact"

    def __init__(self, model: Model, args: tuple[Any, ...], program: Program):
        self.model = model
        self.values = _joint_values(model, args, program)  # (S,) of each site
        self.n_nodes = len(next(iter(self.values.values())))
        names = ", ".join(program.discrete)
        self.why = (
            f"the values of {names} are summed out, and given them every mean is affine in the other latents"
        )
        self.program = program
        label = torch.arange(len(args[0]), device=args[0].device) % self.n_nodes
        self.maps = LinearGaussian(self._labelled(), (*args, label), max(N_TRIAL_ROWS, 2 * self.n_nodes))
        self.shared = len(args) == 1 and program.sub_rows is None and self._same_for_all_rows(args, label)
        plain = self.shared and self.maps.structure.observed_arg == 0 and program.scale == 1.0
        self.program = program._replace(own_rows=not plain, plain=plain)
        if program.continuous:
            filled = tuple(fill(a) for a in args)
            first, second = (self._log_prior(filled, label, seed) for seed in range(2))
            if not torch.allclose(first, second, rtol=1e-9, atol=1e-12):
                raise ModelError(
                    f"the distribution of {list(program.discrete)} depends on {list(program.continuous)}: given the "
                    "discrete values the others are not Gaussian. Use Importance() with a guide"
                )

    def read(self, args: tuple[Any, ...], visible: Tensor | None = None) -> Read:
        filled = tuple(fill(a) for a in args)
        if self.shared:
            together, log_weight = self._read_shared(filled)
            value = args[0] if self.program.plain else program_values(self.model, args, filled, self.program)
            given, scale = MapsGiven(together=together), together.scale
        else:
            labels = [torch.full((len(args[0]),), s, device=args[0].device) for s in range(self.n_nodes)]
            maps = tuple(self.maps.read((*args, label)) for label in labels)
            log_weight = torch.stack([self._log_prior(filled, label) for label in labels])  # (S, N)
            value, given, scale = maps[0].value, MapsGiven(maps), maps[0].scale
        # which value each site has at each node, a block of columns for each site
        blocks = [v.unique(return_inverse=True)[1] for v in self.values.values()]
        one_hot = torch.cat([torch.nn.functional.one_hot(b) for b in blocks], -1).to(log_weight)
        latents = one_hot[:, None].expand(-1, log_weight.shape[1], -1)
        return Read(given, log_weight, value, scale, latents, ())

    def _labelled(self, hide: bool = True) -> _Labelled:
        return _Labelled(self.model, self.program, self.values, hide)

    def _read_shared(self, filled: tuple[Any, ...]) -> tuple[LinearGaussian, Tensor]:
        """The S maps, and the logarithms (S, 1) of their weights, from a row for each."""
        label = torch.arange(self.n_nodes, device=filled[0].device)
        rows = tuple(cycle(a, self.n_nodes) for a in filled)
        return self.maps.read((*rows, label)), self._log_prior(rows, label)[:, None]

    def _same_for_all_rows(self, args: tuple[Any, ...], label: Tensor) -> bool:
        """Whether maps and weights that are read from S rows are those of all rows; each row shows it for one value."""
        filled = tuple(fill(a) for a in args)
        try:
            together, log_weight = self._read_shared(filled)
        except (RuntimeError, ValueError, IndexError):
            return False  # the program does not take S rows, or they differ
        prior = self._log_prior(filled, label)
        return bool((prior == log_weight[label, 0]).all()) and same_by_label(
            self._labelled(), (*args, label), self.maps.structure, together.reading, label
        )

    def _log_prior(self, filled: tuple[Any, ...], label: Tensor, seed: int = 0) -> Tensor:
        """log p(discrete values) of each row (N,); the other latents are drawn, and must not matter."""
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(seed)
            trace = run(self._labelled(hide=False), (*filled, label))
        parts = []
        for site in self.program.latents:
            if site.discrete:
                node = trace.nodes[site.name]
                parts.append(rows_first(node["fn"].log_prob(node["value"]), site.row_axis).sum(-1))
        return torch.stack(parts).sum(0)


def mixture_of_maps(model: Model, args: tuple[Any, ...], program: Program) -> Nodes:
    """Programs that are linear-Gaussian given the discrete latents of each row."""
    return Nodes(_Maps(model, args, split_events(program)))


def _joint_values(model: Model, args: tuple[Any, ...], program: Program) -> dict[str, Tensor]:
    """All joint values of a row's discrete latents: (S,) of each site."""
    trace = run(model, tuple(fill(a) for a in args))
    supports, sites = [], []
    for site in program.latents:
        if not site.discrete:
            continue
        if site.row_axis is None and program.by_row:
            raise ModelError(f"discrete latent {site.name!r} stands outside the rows plate")
        support = trace.nodes[site.name]["fn"].enumerate_support(expand=False)
        event = trace.nodes[site.name]["fn"].event_dim
        if site.row_axis is None or site.width != 1 or event:
            raise ModelError(
                f"discrete latent {site.name!r} has {site.width} values a row beside Gaussian tokens: only one value "
                "a row and site can be summed together with linear-Gaussian maps. Write tokens that are independent "
                "given the discrete latents, or use Importance() with a guide"
            )
        supports.append(support.reshape(-1))
        sites.append(site)
    n_maps = 1
    for s in supports:
        n_maps *= len(s)
    if n_maps > MAX_MAPS:
        raise ModelError(
            f"discrete latents {[s.name for s in sites]} have {n_maps} joint values, more than {MAX_MAPS} "
            "linear-Gaussian maps: use fewer values"
        )
    columns = zip(*product(*supports), strict=True)
    return {site.name: torch.stack(column) for site, column in zip(sites, columns, strict=True)}


class _Labelled:
    """A program in which a further argument (N,) numbers the joint value of each row's discrete latents."""

    def __init__(self, model: Model, program: Program, values: dict[str, Tensor], hide: bool):
        self.model, self.values, self.hide = model, values, hide
        self.n_rows = program.sub_rows
        self.axes = {
            s.name: (s.row_axis or 0, s.n_batch) for s in program.latents if s.discrete
        }  # all in the plate

    def __call__(self, *args: Any) -> Any:
        """Run it."""
        *rest, label = args
        sites = {}
        for name, value in self.values.items():
            axis, n_batch = self.axes[name]
            shape = [1] * n_batch
            shape[axis] = -1
            sites[name] = value[label[: self.n_rows]].reshape(shape)
        return FixedSites(self.model, sites, self.hide)(*rest)


def growing(model: Model, args: tuple[Any, ...], program: Program) -> tuple[str, ...]:
    """Latents of one vector that have a number for each row: function values, say."""
    n_rows = len(args[0])
    if program.by_row or n_rows < 2 or not any(n_rows in site.shape for site in program.latents):
        return ()
    trace = run(model, tuple(fill(a) for a in head(args, n_rows - 1)))
    return tuple(
        site.name
        for site in program.latents
        if site.shape == (n_rows,) and trace.nodes[site.name]["value"].shape == (n_rows - 1,)
    )


def means_of_new(
    model: Model,
    seen: tuple[Any, ...],
    new: tuple[Any, ...],
    names: tuple[str, ...],
    draws: list[tuple[float, dict[str, Tensor]]],
) -> Tensor:
    """Means of the tokens of M new rows given the rows seen, where the latents ``names`` grow with the rows: (M,).

    Latents of new rows are standard normal whatever those of the rows seen are (f = L u, L lower triangular): they are
    drawn, evenly for each row.

    Parameters
    ----------
    model : callable
        A Pyro program.
    seen, new : tuple
        Its arguments.
    names : tuple of str
        From `growing`.
    draws : list of (share, values)
        Weighted posterior values of all latents given the rows seen.
    """
    n_seen, n_new = len(seen[0]), len(new[0])
    share = torch.tensor([s for s, _ in draws], dtype=torch.float64)
    place = (torch.arange(N_DRAWS) + 0.5) / N_DRAWS * share.sum()
    picked = torch.searchsorted(share.cumsum(0), place).clamp(max=len(draws) - 1)
    values = {name: torch.stack([v[name] for _, v in draws])[picked] for name in draws[0][1]}
    even = torch.special.ndtri((torch.arange(N_DRAWS, dtype=torch.float64) + 0.5) / N_DRAWS)
    both = tuple(
        torch.cat([fill(a), b]) if isinstance(a, Tensor) else a for a, b in zip(seen, new, strict=True)
    )
    program = survey(model, both)
    longer = dict(values)
    for name in names:
        fresh = torch.stack([even[torch.randperm(N_DRAWS)] for _ in range(n_new)], -1)
        longer[name] = torch.cat([values[name], fresh.to(values[name])], -1)
    everything = torch.ones(1, n_seen + n_new, dtype=torch.bool)

    def means(args: tuple[Any, ...], program: Program, at: dict[str, Tensor]) -> Tensor:
        n = len(next(iter(at.values())))
        pads = {s.name: (1,) * (program.depth - s.n_batch) for s in program.latents}
        at = {name: v.reshape(n, *pads[name], *v.shape[1:]) for name, v in at.items()}
        return read_factors(model, args, program, at, n).means(everything[:, : program.n_tokens])[:, 0]

    found = means(both, program, longer)  # (S, N + M)
    old = tuple(fill(a) for a in seen)
    few = means(old, survey(model, old), {n: v[:2] for n, v in values.items()})
    if not torch.allclose(few, found[:2, :n_seen], rtol=1e-5, atol=1e-8):
        raise ModelError(
            f"new rows change what latents {list(names)} mean for the old ones, so that they cannot be predicted: map "
            "them by a lower triangular matrix, as a Cholesky factor is"
        )
    return found[:, n_seen:].mean(0)


class FixedSites:
    """A program with some latents fixed, and by default no longer among its sites."""

    def __init__(self, model: Model, values: dict[str, Tensor], hide: bool = True):
        self.model, self.values, self.hide = model, values, hide

    def __call__(self, *args: Any) -> Any:
        """Run it."""
        with ExitStack() as stack:
            if self.hide:
                stack.enter_context(poutine.block(hide=list(self.values)))
            stack.enter_context(_Fix(self.values))
            return self.model(*args)


class _Fix(poutine.messenger.Messenger):
    """Give sites a value that all their rows share, or one for each row, or one of their own shape."""

    def __init__(self, values: dict[str, Tensor]):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not is_subsample(msg):
            shape = msg["fn"].batch_shape + msg["fn"].event_shape
            msg["value"] = self.values[msg["name"]].expand(shape)
            msg["done"] = True


def program_values(model: Model, args: tuple[Any, ...], filled: tuple[Any, ...], program: Program) -> Tensor:
    """The tokens (N, T) of these rows, NaN where missing: of the argument itself, or of more runs, latents drawn."""
    position = program.tokens_from
    others = [f is a for i, (f, a) in enumerate(zip(filled, args, strict=True)) if i != position]
    if position is not None and all(others):  # complete, so that no distribution has seen a missing cell
        return rows_first(args[position], program.sites[0].row_axis)
    with torch.no_grad():
        trace = run(model, filled)
        sites = {s.name: trace.nodes[s.name]["value"] for s in program.latents}
        return read_values(model, args, program, trace, sites)


def constrained(where: Space, u: Tensor) -> Tensor:
    """Values of the latents at nodes u (S, N, d), side by side: (S, N, K)."""
    values, _ = where.values(u.detach())
    return torch.cat([nodes_first(values[p.latent.name], p.latent, *u.shape[:2]) for p in where.parts], -1)


def nodes_first(value: Tensor, latent: Latent, n_nodes: int, n_rows: int) -> Tensor:
    """A latent site's values at S nodes, (S, plates..., event...) or without S where it is 1, as (S, N, width)."""
    shape = list(latent.shape)
    if latent.row_axis is None:
        return (
            value.expand(n_nodes, *value.shape[n_nodes > 1 :]).reshape(n_nodes, 1, -1).expand(-1, n_rows, -1)
        )
    shape[latent.row_axis] = n_rows
    value = (
        value.reshape(n_nodes, *shape)
        if value.numel() == n_nodes * math.prod(shape)
        else value.expand(n_nodes, *shape)
    )
    return value.movedim(latent.row_axis + 1, 1).reshape(n_nodes, n_rows, -1)
