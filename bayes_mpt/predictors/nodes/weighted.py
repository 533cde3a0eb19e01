"""Weighted nodes over what cannot be integrated exactly, an inner model given each node that is exact, or nodes again.

    Z(R) = sum_s w_s p(x_R | u_s),    log p(x_i | x_R) = log Z(R + i) - log Z(R),    Z(nothing) = 1

The inner model answers for all nodes at once: `Factorized` from the program's own log-densities, discrete latents
summed out; `AffineBatch` from one linear-Gaussian map a node; `NestedRows` from nodes in each row. Nodes are shared
along a chain, so that it telescopes: its sum is log Z of all tokens, the importance-weighted bound where the nodes are
sampled.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from bayes_mpt.predictors.base import Conditionals, Evidence, Guide, Posterior, refuse_other_rows
from bayes_mpt.predictors.nodes.given import Given
from bayes_mpt.program.arguments import fill, has_missing
from bayes_mpt.program.latents import Space
from bayes_mpt.program.layout import to_rows
from bayes_mpt.program.missing import read_values
from bayes_mpt.program.program import Latent, Model, ModelError, Program, n_rows_of
from bayes_mpt.program.run import SetLatents, run
from bayes_mpt.program.sites import is_subsample

__all__ = ["FixedSites", "Nodes", "Read", "Reader", "constrained", "nodes_first", "program_values"]

MIN_SHARE = 1e-6  # of a node's weight that a prediction takes into account


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

    def forget(self) -> None:
        adaptive = getattr(self.reader, "adaptive", None)
        if adaptive is not None:
            adaptive.forget()

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
        self._check(x)
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
                "this guide has seen the hidden tokens, so single conditionals are meaningless and only the sum of a "
                "whole chain is valid: use PermutationChain, or give the guide an argument ``visible`` (N, T)"
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
            out.append(_gain(step, self._log_z(log_prob, x, mask)[:, None]))
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
            log_z = torch.where(none_yet, 0.0, log_z)
            steps = _gain(log_z[:, 1:], log_z[:, :-1])
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

    def label_probabilities(self, x: Tensor) -> Tensor:
        self._check(x)
        read = self.last
        everything = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
        share = (read.log_weight + read.given.log_joint(x, everything)).softmax(0)[..., None]  # (S, N, 1)
        found = (share * read.given.responsibilities(x, everything)).sum(0)  # (N, L)
        if (
            not read.names
        ):  # each node stands for values of discrete latents, and what is continuous is inside
            found = torch.cat([(share * read.latents).sum(0), found], -1)
        return found

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
        self._check(x)
        read = self.last
        everything = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
        share = (read.log_weight + read.given.log_joint(x, everything)).softmax(0)[:, 0]
        inner = read.given.latents(x)
        out = []
        for s in range(len(share)):
            if float(share[s]) < MIN_SHARE:
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
            out[:, token], before = _gain(now, before), now
        return out

    def _each_at_its_own(self, x: Tensor, mask: Tensor) -> Tensor:
        """log Z(R + i) - log Z(R) (N, T): a single token can move the posterior away from nodes placed without it."""
        before = self._z_at(x, mask)
        out = torch.zeros_like(x)
        for token in (~mask).nonzero()[:, 0]:
            more = mask.clone()
            more[token] = True
            out[:, token] = _gain(self._z_at(x, more), before)
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
        """Maps that all rows share answer for any rows; whatever else was read answers for the rows read."""
        value = self.last.value
        if not self.structure.scores_input:
            refuse_other_rows(x, value)
        elif x.shape[1:] != value.shape[1:]:
            raise ModelError(f"rows have {value.shape[1]} tokens, got x of shape {tuple(x.shape)}")


def _gain(now: Tensor, before: Tensor) -> Tensor:
    """log Z(R + i) - log Z(R); -inf too of what follows something impossible."""
    return torch.where(before == -math.inf, before, now - before)


# ------------------------------------------------------------------------------------------------- values at nodes


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
    position = program.observed_argument
    others = [f is a for i, (f, a) in enumerate(zip(filled, args, strict=True)) if i != position]
    if position is not None and all(others):  # complete, so that no distribution has seen a missing cell
        return args[position].reshape(n_rows_of(program, args), -1)
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
    return to_rows(value, latent.row_axis, 1)
