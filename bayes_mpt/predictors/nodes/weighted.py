"""Weighted nodes over what cannot be integrated exactly, an inner model given each node that is exact, or nodes again.

    Z(R) = sum_s w_s p(x_R | u_s),    log p(x_i | x_R) = log Z(R + i) - log Z(R),    Z(nothing) = 1

The inner model answers for all nodes at once: `Factorized` from the program's own log-densities, discrete latents
summed out; `AffineBatch` from one linear-Gaussian map a node; `NestedRows` from nodes in each row. Nodes are shared
along a chain, so that it telescopes: its sum is log Z of all tokens, the importance-weighted bound where the nodes are
sampled.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from pyro import poutine
from torch import Generator, Tensor

from bayes_mpt.masks import Policy
from bayes_mpt.predictors.base import Bound, Conditionals, Evidence, Leaves, Posterior
from bayes_mpt.predictors.nodes.given import Given, NodePosterior
from bayes_mpt.predictors.nodes.resampling import in_proportion
from bayes_mpt.predictors.nodes.rules import Detail
from bayes_mpt.predictors.objective import Batch, Objective, Outputs, outputs_of_rows
from bayes_mpt.predictors.own_order import own_order
from bayes_mpt.program.affine import DenseMap
from bayes_mpt.program.arguments import Args, has_missing
from bayes_mpt.program.batched import Batched
from bayes_mpt.program.latents import Space
from bayes_mpt.program.layout import to_rows
from bayes_mpt.program.missing import read_values
from bayes_mpt.program.program import Latent, Model, Program, n_rows_of
from bayes_mpt.program.run import SetLatents, run
from bayes_mpt.program.seen_labels import with_seen_labels
from bayes_mpt.program.sites import is_subsample
from bayes_mpt.program.unconstrained import UNCONSTRAINED
from bayes_mpt.warnings import NoBoundWarning, SlowProgramWarning, warn

__all__ = [
    "FixedSites",
    "NodeSource",
    "Nodes",
    "Read",
    "constrained",
    "nodes_first",
    "nodes_objective",
    "objective_of_draws",
    "program_values",
    "warn_if_slow",
    "warn_of_ratios",
]

N_STRETCHES = 16  # of one vector's tokens, whose log-densities tell the units of parameters
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
    error: Tensor | None = None
    """(N,) nats of Z, where the nodes were placed for the error that they leave."""
    stratum: Tensor | None = None
    """(S,) what part of a mixture each was drawn of, where the number of draws of each part was fixed."""


class NodeSource(Bound):
    """A program scored by a weighted sum over nodes: where these come from."""

    model: Model
    structure: Program
    relocates: bool = False
    """Whether every visible set has nodes of its own, and so costs a run of the program."""
    fillings: tuple[Tensor | None, ...] | None = None
    """What stands for missing cells of each argument; None: what `filling` has for the rows that are read."""

    @abstractmethod
    def place(self, args: Args, visible: Tensor | None = None, near: Any = None) -> Read:
        """Run the program; place the nodes for the visible (T,) tokens, by default all.

        ``near`` is what those of other visible tokens of these rows were placed by (`Read.located`).
        """

    def read(self, args: tuple[Any, ...]) -> Nodes:
        rows = Args(args, self.fillings)
        fixed = self._sub_sample(rows)
        with SetLatents(fixed):
            return Nodes(self, rows, fixed, self.place(rows))

    def evidence(self, nodes: Nodes) -> Evidence:
        """log Z of each row with its error."""
        return Evidence(nodes.score(), 0.0, {}, exact=True)

    def schedule(self, whole: Batch, masks: Policy | None, seed: int = 0) -> list[Objective]:
        return [nodes_objective(self, whole, masks)]

    def settled(self, nodes: Nodes, read: Read, log_part: Tensor, visible: Tensor) -> tuple[Read, Tensor]:
        """Nodes, and log of each one's part (S, N) of Z; in place of those that do not serve others that do."""
        return read, log_part

    def _alone(self, nodes: Nodes, mask: Tensor) -> Tensor:
        """Log-densities (N, T) of tokens alone, given the visible ones of a mask (T,)."""
        return nodes.at_one_place(mask)

    def _forget(self) -> None:
        """Leave what earlier readings have found to make the next one shorter: that gives what a first one would."""
        return

    def _sub_sample(self, args: Args) -> dict[str, Tensor]:
        """The rows that sub-sampling plates draw: once for all runs of a reading, of program and guide alike."""
        if self.structure.sub_rows is None and self.structure.scale == 1.0:
            return {}
        trace = run(self.model, args.filled)
        return {name: node["value"] for name, node in trace.nodes.items() if is_subsample(node)}


def nodes_objective(bound: NodeSource, whole: Batch, masks: Policy | None) -> Objective:
    """The score of rows at weighted nodes, which are the same whenever they are placed for the same tokens."""
    return Objective(bound, whole, masks, outputs=partial(_outputs, few_rows=False), refresh=bound._forget)


def objective_of_draws(
    bound: NodeSource,
    whole: Batch,
    masks: Policy | None,
    pull: Callable[[tuple[Any, ...], Generator], Tensor] | None = None,
) -> Objective:
    """The same of nodes that are drawn."""
    warn_of_ratios(bound, masks)
    return Objective(
        bound,
        whole,
        masks,
        noisy=True,
        outputs=partial(_outputs, few_rows=True),  # of a guide some numbers may be of a single row
        refresh=bound._forget,
        pull=pull,
    )


def warn_of_ratios(bound: NodeSource, masks: Policy | None) -> None:
    """Say so where a training takes nodes that are drawn anew for every mask."""
    if masks is not None and not masks.chains and bound.relocates:
        warn(
            "nodes that a guide draws anew for every mask make a ratio of two estimates, which is no bound "
            "on the log marginal likelihood: with few of them it rises while the guide leaves the posterior. "
            "Leave masks=None, which shares them along a chain, or take many: Importance(100)",
            NoBoundWarning,
        )


def _outputs(objective: Objective, read: Conditionals | None, *, few_rows: bool) -> Outputs:
    """`outputs_of_rows`; of one vector in stretches, where each token would cost a sum over latents or nodes.

    What the tokens of a stretch add are increments of a martingale: the square of their sum tells as much of a
    parameter as the sum of their squares.
    """
    nodes = cast(Nodes, objective.read() if read is None else read)
    n_tokens = nodes.value.shape[1]
    if len(nodes.value) > 1 or n_tokens <= N_STRETCHES:
        return outputs_of_rows(objective, nodes, few_rows=few_rows)
    ends = [n_tokens * i // N_STRETCHES for i in range(N_STRETCHES + 1)]
    found = nodes.stretches(own_order(nodes)[0], ends)
    return Outputs(found / math.sqrt(n_tokens), few_rows=few_rows)


def warn_if_slow(batched: Batched, bound: Bound) -> None:
    """Say so where nodes are run one by one, because the program does not take several at once."""
    # sub-sampled rows differ from run to run in any case
    if batched is Batched.LOOP and bound.structure.sub_rows is None:
        warn(
            "the program does not run on several nodes at once, so each is run by itself, which is slow "
            f"({bound.name}: {bound.why}). Write it without Python's if on latents, and with operations that "
            "broadcast over leading batch dimensions: (x * w).sum(-1) for x @ w, z[..., None] for z[:, None]",
            SlowProgramWarning,
        )


class Nodes(Conditionals):
    """The weighted sum over the nodes of rows; without a source where these are maps that all rows share."""

    structure: Program

    def __init__(
        self, source: NodeSource | None, args: Args, fixed: dict[str, Tensor], read: Read,
        structure: Program | None = None,
    ):  # fmt: skip
        self.source, self.args, self.last = source, args, read
        structure = structure if source is None else source.structure
        assert structure is not None
        self.structure, self.value, self.scale = structure, read.value, read.scale
        self._fixed, self._whole = fixed, cast(tuple[Read, Tensor] | None, None)
        # to run the program again, at other nodes
        self.leaves = Leaves(source.parameters) if source is not None and source.relocates else None

    def at_nodes(self, read: Read) -> Nodes:
        """The same rows at other nodes."""
        return Nodes(self.source, self.args, self._fixed, read, self.structure)

    def at(self, tokens: Tensor) -> Conditionals:
        if not self.structure.scores_input:
            return super().at(tokens)
        return self.at_nodes(self.last._replace(value=tokens))

    def linear_map(self) -> DenseMap | None:
        return self.last.given.maps

    def detached(self) -> Nodes | None:
        given = self.last.given.freeze() if self.structure.scores_input else None
        if given is None:
            return None
        weight, latents = self.last.log_weight.detach().clone(), self.last.latents.detach().clone()
        read = self.last._replace(
            given=given, log_weight=weight, latents=latents, value=self.value.detach()[:0].clone()
        )
        return Nodes(None, Args(()), {}, read, self.structure)

    def evidence(self, orders: Tensor | None = None) -> Evidence:
        # what serves for any rows is exact
        return super().evidence() if self.source is None else self.source.evidence(self)

    def conditionals(self, visible: Tensor) -> Tensor:
        alone = self.at_one_place if self.source is None else partial(self.source._alone, self)
        hidden = ~visible[:, None] & ~self.value.isnan()
        return torch.where(hidden, torch.stack([alone(mask) for mask in visible]), 0.0)

    def at_one_place(self, mask: Tensor) -> Tensor:
        """log Z(R + i) - log Z(R) (N, T), both at the nodes for R."""
        read, log_prob = self._at(mask)
        step = (log_prob[..., None] + read.given.predictive(self.value, mask)).logsumexp(0)
        return _gain(step, self._log_z(log_prob, mask)[:, None])

    def each_at_its_own(self, mask: Tensor) -> Tensor:
        """The same, with nodes for every R + i: a token can move the posterior away from those placed without it."""
        read, log_prob = self._at(mask)
        before = self._log_z(log_prob, mask)
        out = torch.zeros_like(self.value)
        for token in (~mask).nonzero()[:, 0]:
            more = mask.clone()
            more[token] = True
            out[:, token] = _gain(self._log_z(self._at(more, read)[1], more), before)
        return out

    def chain(self, order: Tensor, stops: list[int] | None = None) -> Tensor:
        if self.leaves is not None:
            stretches = list(pairwise(stops or range(order.shape[1] + 1)))
            return torch.stack([self._relocated_chain(tokens, stretches) for tokens in order])
        seen, out, read = ~self.value.isnan(), [], self.last
        for tokens in order:
            log_z = (read.log_weight[..., None] + read.given.chain(self.value, tokens)).logsumexp(0)
            # Z(nothing) is 1, and not the mean of the weights; rows start at their first observed token
            none_yet = torch.cat([torch.zeros_like(seen[:, :1]), seen[:, tokens]], 1).cumsum(1) == 0
            log_z = torch.where(none_yet, 0.0, log_z)  # (N, T + 1)
            steps = _gain(log_z[:, 1:], log_z[:, :-1])
            out.append(torch.empty_like(steps).index_copy(1, tokens, steps))
        return torch.stack(out)

    def stretches(self, tokens: Tensor, ends: list[int]) -> Tensor:
        """What each stretch of one vector's tokens (T,), between two ``ends``, adds to log p: (stretches,)."""
        found = self._relocated_chain(tokens, list(pairwise(ends)))[0, tokens].cumsum(0)
        return torch.nn.functional.pad(found, (1, 0))[ends].diff()

    def gain_inside(self, detail: Detail = "fine") -> Tensor:
        """How log Z (N,) grows by finer nodes in every row or group, seen at nodes by their shares of it."""
        before, given = self.log_weights(), self.last.given
        if given.fair or given.with_detail(detail) is given or not bool(before.isfinite().any()):
            return torch.zeros_like(before[0])
        some, share = in_proportion(before[:, 0])  # rows of one vector: N is 1
        weight = self.last.log_weight.expand(before.shape)[some] - before[some]
        finer = self.at_nodes(self.last._replace(given=given.with_detail(detail, some), log_weight=weight))
        return (finer.log_weights() + share.log()[:, None]).logsumexp(0)

    @torch.no_grad()
    def uneven_inside(self) -> tuple[float, float]:
        """`Given.uneven` at the node of the greatest weight."""
        best = self.log_weights()[:, 0].nan_to_num(-math.inf).argmax()[None]
        return self.last.given.with_detail("fine", best).uneven(self.value)

    @torch.no_grad()
    def doubt_inside(self) -> str:
        """What speaks against the nodes in every row or group, in words; empty where there are none."""
        return self.last.given.doubt(self.value, self.log_weights()[:, 0])

    def posterior(self, visible: Tensor | None = None) -> Posterior:
        x, mask = self.value, self._everything() if visible is None else visible
        read, log_part = self._at(mask)
        share = log_part.softmax(0)  # (S, N)
        inner = read.given.posterior(x, mask)

        def mean_of(part: Tensor) -> Tensor:
            return (share[..., None] * part).sum(0)

        def beside(*parts: Callable[[], Tensor] | None) -> Tensor:
            return torch.cat([mean_of(part()) for part in parts if part is not None], -1)

        def tokens() -> Tensor:
            out = mean_of(inner.tokens())
            levels = inner.levels()  # of categorical tokens: the likeliest, and not the mean of codes
            if levels is None:
                return out
            likely = (share[..., None, None] * levels).sum(0)  # (N, T, L)
            return torch.where(likely.sum(-1) > 0, likely.argmax(-1).to(out), out)

        def at_nodes() -> Tensor:
            # without names each node stands for values of discrete latents, and what is continuous is inside
            return read.latents[..., :0] if read.names else read.latents

        return Posterior(
            lambda: beside(lambda: read.latents, inner.latents, inner.labels),
            tokens,
            of_labels=lambda: beside(at_nodes, inner.labels),
            of_draws=lambda n: self._draws(inner, share, mask, n),
            of_shared=lambda: self._shared(read, inner, share),
        )

    def _draws(self, inner: NodePosterior, share: Tensor, mask: Tensor, n_draws: int) -> Tensor:
        """Tokens (D, N, T), of which those visible are as they are."""
        out = []
        for node in torch.multinomial(share.mT, n_draws, replacement=True).mT:  # (N,) of each draw
            tokens = inner.draws()
            if tokens is None:
                raise NotImplementedError("this way of scoring has no draws of missing tokens")
            picked = tokens.gather(0, node[None, :, None].expand(1, *tokens.shape[1:]))[0]
            out.append(torch.where(mask & ~self.value.isnan(), self.value, picked))
        return torch.stack(out)

    def _shared(
        self, read: Read, inner: NodePosterior, share: Tensor
    ) -> list[tuple[float, dict[str, Tensor]]]:
        """Weighted values of the latents, where all rows share them."""
        if self.structure.by_row or len(read.latents[0]) != 1:
            return []
        inside = inner.values(share[:, 0])
        out = []
        for s, weight in enumerate(share[:, 0].tolist()):
            if weight < MIN_SHARE:
                continue
            values, start = {}, 0
            for site in self.structure.latents:
                if site.name in read.names:
                    part = read.latents[s, 0, start : start + site.width]
                    start += site.width
                    values[site.name] = part.reshape(site.shape)
            each = inside[s] if inside else [{}]
            out += [(weight / len(each), {**more, **values}) for more in each]
        return out

    def _joint(self) -> Tensor:
        return self._log_z(self.log_weights(), self._everything())

    def log_weights(self) -> Tensor:
        """Log of each node's part of the score (S, N)."""
        return self.whole()[1]

    def whole(self) -> tuple[Read, Tensor]:
        """The nodes for all tokens, and log of each one's part of the score (S, N)."""
        return self._at(self._everything())

    @cached_property
    def _has_holes(self) -> bool:
        """Whether tokens are missing."""
        return has_missing(self.value)

    def _everything(self) -> Tensor:
        return torch.ones(self.value.shape[1], dtype=torch.bool, device=self.value.device)

    def _at(self, mask: Tensor, near: Read | None = None) -> tuple[Read, Tensor]:
        """Nodes for this visible set, looked for from another's, and log of each one's part (S, N) of Z."""
        read, kept = self.last, bool(mask.all()) and not torch.is_grad_enabled()
        if kept and self._whole is not None:
            return self._whole
        source = self.source
        with SetLatents(self._fixed):
            if source is not None and self.leaves is not None and not bool(mask.all()):
                self.leaves.refuse_others()
                read = source.place(self.args, mask, (near or read).located)
            found = read.log_weight + read.given.log_joint(self.value, mask)
            read, found = (read, found) if source is None else source.settled(self, read, found, mask)
        self._whole = (read, found) if kept else self._whole
        return read, found

    def _relocated_chain(self, tokens: Tensor, stretches: list[tuple[int, int]]) -> Tensor:
        """Every Z at nodes of its own, so that the sum is that of all tokens; the mean of each stretch."""
        visible = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        out, before = torch.zeros_like(self.value), self.value.new_zeros(len(self.value))
        read = self.last
        for start, end in stretches:
            visible = visible.clone()
            visible[tokens[start:end]] = True
            read, log_prob = self._at(visible, read)
            now = self._log_z(log_prob, visible)
            out[:, tokens[start:end]] = _gain(now, before)[:, None] / (end - start)
            before = now
        return out

    def _log_z(self, log_prob: Tensor, mask: Tensor) -> Tensor:
        """(S, N) -> (N,); 0 for rows of which nothing is visible."""
        log_z = log_prob.logsumexp(0)
        if not self._has_holes and bool(mask.any()):
            return log_z
        none = ~(mask & ~self.value.isnan()).any(1)
        return torch.where(none, 0.0, log_z) if bool(none.any()) else log_z


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
            return with_seen_labels(self.model)(*args)


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
            told = self.values.get(UNCONSTRAINED + msg["name"])
            if told is not None:
                msg["infer"] = {**msg["infer"], UNCONSTRAINED: told.expand(shape)}


def program_values(model: Model, args: Args, program: Program) -> Tensor:
    """The tokens (N, T) of these rows, NaN where missing: of the argument itself, or of more runs, latents drawn."""
    position = program.observed_argument
    others = [f is a for i, (f, a) in enumerate(zip(args.filled, args.given, strict=True)) if i != position]
    if position is not None and all(others):  # complete, so that no distribution has seen a missing cell
        return args.given[position].reshape(n_rows_of(program, args.given), -1)
    with torch.no_grad():
        trace = run(model, args.filled)
        sites = {s.name: trace.nodes[s.name]["value"] for s in program.latents}
        return read_values(model, args.given, program, trace, sites)


def constrained(where: Space, u: Tensor) -> Tensor:
    """Values of the latents at nodes u (S, N, d), side by side: (S, N, K)."""
    return side_by_side(where, where.values(u.detach())[0], *u.shape[:2])


def side_by_side(where: Space, values: dict[str, Tensor], n_nodes: int, n_rows: int) -> Tensor:
    """Values of the latents of a space at S nodes, as `nodes_first` takes them, side by side: (S, N, K)."""
    parts = [nodes_first(values[p.latent.name], p.latent, n_nodes, n_rows) for p in where.parts]
    return torch.cat(parts, -1) if parts else torch.zeros(n_nodes, n_rows, 0)


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
