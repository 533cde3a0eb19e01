"""Conditionals of a long Gaussian vector, each token predicted from its nearest neighbours alone (Vecchia 1988).

    log p(y) = sum_i log p(y_i | y_N(i)),    N(i) at least the m nearest of those that come before i in an ordering

A few tokens close together share one set, the union of their m nearest and of themselves, in their order: each is
given all before it in the set, more than its own m, for no more work (Guinness 2018). With K the covariance (k, k) of
the set, L its Cholesky factor, r the residuals, z = L^-1 r, and for the place i in it v = L^-T e_i, a = L^-T [z_<i, 0]:

    log p(y_i | y_N) = -log L_ii - z_i^2 / 2 - log(2 pi) / 2
    d/dK = 1/2 [z_i (v a' + a v') + (z_i^2 - 1) v v'],    d/dr = -z_i v

The program itself is run on batches of such sets of rows, (B, k, P), so that no matrix of N x N is ever made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from bayes_mpt.masks import Policy
from bayes_mpt.predictors.base import (
    Bound,
    Conditionals,
    Evidence,
    Guide,
    Leaves,
    Posterior,
    Predictive,
    Predictor,
    along_orders,
)
from bayes_mpt.predictors.gaussian.column_units import (
    column_units,
)
from bayes_mpt.predictors.gaussian.near_objective import coarse_to_fine
from bayes_mpt.predictors.gaussian.neighborhoods import (
    Groups,
    Points,
    alone,
    grouped,
    maxmin,
    predecessors,
    united,
)
from bayes_mpt.predictors.gaussian.process import (
    JointGaussian,
    gaussian_program,
    missing_of,
)
from bayes_mpt.predictors.gaussian.row_sets import RowSets, is_rows
from bayes_mpt.predictors.gaussian.vecchia import LogProbGiven, SumOfParts, whitened
from bayes_mpt.predictors.objective import Batch, Objective
from bayes_mpt.program.arguments import fill_all, rows_of
from bayes_mpt.program.devices import at_once
from bayes_mpt.program.program import Model, ModelError, Program

__all__ = ["NearestNeighbors"]

GPU_TIMES = 64  # as many on a GPU
CHUNK = 2**18  # numbers of (B, k, k) at once: what a cache holds
N_ERROR_TERMS = 4096  # whose change on doubling m stands for that of all
MAX_FULL = 4096  # rows of a dense covariance


class NearestNeighbors(Predictor):
    """Gaussian vectors of any length: each token given the m nearest before it, in time and memory linear in N.

    For programs ``model(x, y)`` that observe all rows as one MultivariateNormal and give any subset of the rows the
    covariance that it has among all: a Gaussian process, ours or one's own. Near is what is highly correlated: each
    column of x is scaled by the displacement at which the covariance has fallen by half, found by running the program.
    With m = N - 1 nothing is left out, and the score is exact.

    Parameters
    ----------
    m : int, default=30
        Neighbours of each token, at least: a few tokens close together are given those of all of them, where this costs
        no more.
    ordering : {"maxmin", "random", "given"}, default="maxmin"
        The order of the tokens. "maxmin" takes the point furthest from those before it: coarse to fine, so that
        neighbours lie around and not on one side.
    random_state : int, default=0
        Of a random order, and of the samples that errors and units are taken from.

    Examples
    --------
    >>> import pyro.distributions as dist
    >>> def model(x, y):
    ...     cov = torch.exp(-torch.cdist(x, x)) + 0.1 * torch.eye(x.shape[-2], dtype=x.dtype)
    ...     pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(y), cov), obs=y)
    >>> x = torch.linspace(0, 50, 200, dtype=torch.float64)[:, None]
    >>> args = x, x.sin()[:, 0]
    >>> near, exact = (p.bind(model, args).read(args) for p in (NearestNeighbors(20), NearestNeighbors(199)))
    >>> bool(abs(near.score() - exact.score()) < 0.01)
    True
    """

    def __init__(self, m: int = 30, *, ordering: str = "maxmin", random_state: int = 0):
        self.m = m
        self.ordering = ordering
        self.random_state = random_state

    def bind(self, model: Model, args: tuple[Any, ...], guide: Guide | None = None) -> Bound:
        if not isinstance(self.m, Integral) or isinstance(self.m, bool) or self.m < 1:
            raise ValueError(f"m must be an integer of at least 1, got {self.m!r}")
        if self.ordering not in ("maxmin", "random", "given"):
            raise ValueError(f"ordering must be 'maxmin', 'random' or 'given', got {self.ordering!r}")
        program = gaussian_program(model, args)
        if program is None:
            raise ModelError(
                "NearestNeighbors needs a program model(x, y) without latents that observes y (N,) as one "
                "MultivariateNormal over all rows, such as GaussianProcess: choose another predictor"
            )
        return near_conditionals(self, model, args, program)


def near_conditionals(
    settings: NearestNeighbors, model: Model, args: tuple[Any, ...], program: Program
) -> Bound:
    """A program known to be a Gaussian vector, scored by nearest neighbours."""
    return BoundNeighbors(settings, RowSets(model, program, args), program)


# -------------------------------------------------------------------------------------------------- the conditionals


class _Layout(NamedTuple):
    """Which tokens each observed one is predicted from."""

    seen: Tensor
    """(T,) bool: the observed tokens."""
    unit: Points
    """(P,) of each column of x."""
    groups: Groups
    """The sets of tokens in their order."""
    home: Tensor
    """(T,) the set that predicts each token."""
    order: Tensor
    """(n,) the observed tokens."""


class _Memory:
    """What is found out once about the rows, and shared by the copies that `NearRows.again` makes."""

    def __init__(self, source: tuple[Any, ...], args: tuple[Any, ...], value: Tensor):
        self.source, self.versions = source, _versions(source)
        self.args, self.value = args, value  # without missing cells; with them NaN
        self.unit: Points | None = None
        self.layout: _Layout | None = None


def _versions(args: tuple[Any, ...]) -> list[int]:
    """Changes when a tensor is written into."""
    return [a._version for a in args if isinstance(a, Tensor)]


class BoundNeighbors(Bound):
    """See `NearestNeighbors`."""

    model: Model
    structure: Program

    def __init__(self, settings: NearestNeighbors, blocks: RowSets, program: Program):
        self.settings, self.blocks, self.model, self.structure = settings, blocks, blocks.model, program
        self.whole = settings.m >= program.n_tokens - 1
        """Whether no neighbour is left out."""
        self.name = f"NearestNeighbors({settings.m}, ordering={settings.ordering!r})"
        self.why = (
            f"the observations are one Gaussian vector of {program.n_tokens} tokens, each predicted from at least "
            f"its {min(settings.m, program.n_tokens - 1)} nearest predecessors; no covariance of all of them is made"
        )

    def schedule(self, whole: Batch, masks: Policy | None, seed: int = 0) -> list[Objective]:
        return coarse_to_fine(self, whole, masks, seed)

    def read(self, args: tuple[Any, ...]) -> NearRows:
        """Take the tokens of these rows; the program itself is run where they are scored."""
        filled = fill_all(args)
        rows = torch.arange(len(args[0]), device=args[0].device)
        width = 1 + min(self.settings.m, len(rows) - 1)
        whole = len(rows) // width * width
        with torch.no_grad():
            step = max(1, at_once(CHUNK, rows.device, GPU_TIMES) // width**2)
            sets = [*rows[:whole].reshape(-1, width).split(step), rows[None, whole:]]
            value = torch.cat([self.blocks(filled, part)[2].flatten() for part in sets if part.numel()])
        missing = missing_of(args, self.structure).reshape(value.shape)
        memory = _Memory(args, filled, torch.where(missing, torch.nan, value)[None])
        site = self.structure.sites[0]._replace(shape=(len(args[0]),))
        return NearRows(self.settings, self.blocks, self.structure._replace(sites=(site,)), memory)


class NearRows(Conditionals):
    """The tokens of one vector, each given its nearest neighbours."""

    structure: Program

    def __init__(self, settings: NearestNeighbors, blocks: RowSets, program: Program, memory: _Memory):
        self.settings, self.structure, self._blocks, self._memory = settings, program, blocks, memory
        self._exact = settings.m >= program.n_tokens - 1
        self.value, self.scale = memory.value, program.scale
        self._leaves = Leaves(program.parameters)

    def is_of(self, args: tuple[Any, ...]) -> bool:
        """Whether these are the very rows, as they were."""
        kept = self._memory
        return (
            len(kept.source) == len(args)
            and all(a is b for a, b in zip(args, kept.source, strict=True))
            and kept.versions == _versions(args)
        )

    def again(self) -> NearRows:
        """The same rows and neighbours at the parameters that are in the store now."""
        return NearRows(self.settings, self._blocks, self.structure, self._memory)

    def settle(self) -> bool:
        """Find the units of the columns anew, at the current parameters; whether they have changed."""
        if self._memory.unit is None:
            return False  # nothing found out yet
        before = self._memory.unit
        self._memory.unit = now = column_units(self._blocks, self._memory.args, self.settings.random_state)
        same = np.isfinite(before) & np.isfinite(now)
        return not (
            np.array_equal(np.isfinite(before), np.isfinite(now))
            and bool((np.abs(np.log2(before[same] / now[same])) < 0.25).all())
        )

    def _joint(self) -> Tensor:
        return torch.stack([self._total(row, self._layout(row)) for row in self.value])

    def _along(self, order: Tensor, weight: Tensor) -> Tensor:
        # neighbours are those that come before a token, so that orders differ
        return self._joint() if self._exact else torch.einsum("cnt,ct->n", self.chain(order), weight)

    def sample(self, n_tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random tokens (B,) and weights (B,) with which their terms add up to the score in expectation."""
        # Whole groups. A quarter are the first in the order, always: the few far apart, and alone in telling of long
        # distances.
        layout = self._layout(self.value[0])
        groups, order = layout.groups, layout.order
        first = layout.home[order[: n_tokens // 4 + 1]].unique()
        others = torch.ones(len(groups.own), dtype=torch.bool, device=first.device)
        others[first] = False
        rest = others.nonzero()[:, 0]
        rest = rest[torch.randperm(len(rest), generator=generator).to(rest.device)]
        n_first = int((groups.own[first] >= 0).sum())
        n_left = len(order) - n_first
        n_drawn = math.ceil(len(rest) * min(1.0, max(0, n_tokens - n_first) / max(1, n_left)))
        which = torch.cat([first, rest[:n_drawn]])
        weight = torch.ones(groups.own[which].shape).to(self.value)
        weight[len(first) :] = len(rest) / max(1, n_drawn)
        mine = groups.own[which] >= 0
        return groups.predicted[which][mine], weight[mine]

    def partial(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """A weighted sum of the terms of these tokens: (B,), (B,) -> (N,) nats."""
        x = self.value
        by_token = torch.zeros_like(x[0]).index_add(0, tokens, weight)
        return torch.stack([self._total(row, self._layout(row), tokens, by_token) for row in x])

    def predicted(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of tokens (B,), each given those before it."""
        x = self.value
        layout = self._layout(x[0])
        tokens = tokens[layout.seen[tokens]]
        groups = layout.groups.only(layout.home[tokens].unique())
        mine = groups.own >= 0
        mean, var = (
            torch.zeros_like(x[0]).index_copy(0, groups.predicted[mine], part[mine])[tokens]
            for part in self._moments(self._memory.args, x[0], groups)
        )
        return mean, var

    def chain(self, order: Tensor, stops: list[int] | None = None) -> Tensor:
        return torch.stack(
            [torch.stack([self._chain(row, tokens) for row in self.value]) for tokens in order]
        )

    def conditionals(self, visible: Tensor) -> Tensor:
        x = self.value
        out = x.new_zeros(len(visible), *x.shape)
        for s, mask in enumerate(visible):
            for n, row in enumerate(x):
                hidden = (~mask & ~row.isnan()).nonzero()[:, 0]
                groups = self._given(mask & ~row.isnan(), hidden)
                out[s, n] = torch.zeros_like(row).index_copy(0, hidden, self._log_probs(row, groups)[:, 0])
        return out

    def posterior(self, visible: Tensor | None = None) -> Posterior:
        x = self.value
        shown = ~x.isnan() if visible is None else ~x.isnan() & visible
        rows = []
        for row, seen in zip(x, shown, strict=True):
            hidden = (~seen).nonzero()[:, 0]
            mean, _ = self._moments(self._memory.args, row, self._given(seen, hidden))
            rows.append(torch.where(seen, row, 0.0).index_copy(0, hidden, mean[:, 0]))
        return Posterior(x.new_zeros(len(x), 0), torch.stack(rows))

    def predict(self, new: tuple[Any, ...], *, full: bool = False) -> Predictive:
        """Each new row given its m nearest rows seen; with ``full`` all of them given the neighbours of any."""
        seen = self._memory.source
        args = tuple(
            torch.cat([a, b]) if is_rows(a) else a for a, b in zip(self._memory.args, new, strict=True)
        )
        hidden = torch.arange(len(seen[0]), len(args[0]), device=args[0].device)
        row = torch.cat([self.value[0], self.value.new_full((len(hidden),), torch.nan)])
        groups = self._given(~row.isnan(), hidden, args)
        if not full:
            mean, var = self._moments(args, row, groups)
            return Predictive(mean[:, 0], var[:, 0], None)
        rows = groups.tokens[groups.tokens < len(seen[0])].unique()
        if len(rows) + len(hidden) > MAX_FULL:
            raise ValueError(
                f"the covariance among {len(hidden)} new rows and their {len(rows)} neighbours would be of more than "
                f"{MAX_FULL} rows: ask for fewer rows at a time, or for standard deviations"
            )
        exact = JointGaussian(self._program().model, self.structure)
        return exact.read(rows_of(seen, rows)).predict(new, full=True)

    def evidence(self, orders: Tensor | None = None) -> Evidence:
        """The score, and its error from the change that twice the neighbours make to a sample of the tokens.

        Twice that change, as if the error fell like 1/m. Along ``orders``, where neighbours are left out, their mean.
        """
        diagnostics = {"m": self.settings.m, "ordering": self.settings.ordering}
        if self._exact:
            return Evidence(self._joint(), 0.0, diagnostics, exact=True)
        if orders is not None:
            return along_orders(self.chain(orders))
        lml, x = self._joint(), self.value
        changes: list[tuple[float, float]] = []
        rng = np.random.default_rng(self.settings.random_state)
        for row in x:
            layout = self._layout(row)
            order = layout.order.cpu().numpy()
            n_groups = len(layout.groups.own)
            n_some = min(n_groups, math.ceil(n_groups * N_ERROR_TERMS / len(order)))
            which = torch.from_numpy(np.sort(rng.choice(n_groups, n_some, replace=False))).to(row.device)
            home = layout.home[layout.order]
            places = torch.isin(home, which).nonzero()[:, 0].cpu().numpy()
            points = _in_units(self._memory.args, layout.unit)[order]
            near = predecessors(points, min(2 * self.settings.m, len(order) - 1), places)
            label = torch.searchsorted(which, home[places]).cpu().numpy()
            wider, rank = united(near, places, label)
            by_group = self._log_probs(row, wider.of(layout.order)).sum(1)[
                torch.from_numpy(rank).to(row.device)
            ]
            by_group = by_group - self._log_probs(row, layout.groups.only(which)).sum(1)
            sampling = 0.0 if n_some == n_groups else float(by_group.std()) / math.sqrt(n_some)
            changes.append((n_groups * float(by_group.mean()), n_groups * sampling))
        change, sampling = np.sum(changes, axis=0).tolist()
        return Evidence(
            lml, 2 * math.hypot(change, sampling), {**diagnostics, "change_on_doubling_m": change}
        )

    # ------------------------------------------------------------------------------------------------- the neighbours

    def _program(self) -> RowSets:
        self._leaves.refuse_others()
        return self._blocks

    def _unit(self) -> Points:
        """Of the columns of x, at the parameters at which they were first asked for."""
        if self._memory.unit is None:
            self._memory.unit = column_units(self._program(), self._memory.args, self.settings.random_state)
        return self._memory.unit

    def _layout(self, row: Tensor) -> _Layout:
        """Order and neighbours of the observed tokens of a row, found anew only where the units have changed."""
        memory, unit = self._memory, self._unit()
        kept, seen = memory.layout, ~row.isnan()
        if kept is not None and torch.equal(kept.seen, seen) and np.array_equal(kept.unit, unit):
            return kept
        tokens = seen.nonzero()[:, 0]
        points = _in_units(memory.args, unit)[tokens.cpu().numpy()]
        if self.settings.ordering == "given":
            order = np.arange(len(points))
        elif self.settings.ordering == "random":
            order = np.random.default_rng(self.settings.random_state).permutation(len(points))
        else:
            order = maxmin(points, self.settings.random_state)
        ordered = tokens[torch.from_numpy(order).to(tokens.device)]
        groups, home = self._behind(ordered, points[order])
        memory.layout = _Layout(seen, unit, groups, home, ordered)
        return memory.layout

    def _behind(self, ordered: Tensor, points: Points) -> tuple[Groups, Tensor]:
        """Sets of tokens in their order, and of each token (T,) the set that predicts it."""
        groups, home = grouped(points, min(self.settings.m, len(points) - 1))
        homes = torch.from_numpy(home).to(ordered.device)
        return groups.of(ordered), homes.new_zeros(self.structure.n_tokens).index_copy(0, ordered, homes)

    def _given(self, seen: Tensor, hidden: Tensor, args: tuple[Any, ...] | None = None) -> Groups:
        """Hidden tokens (H,), each behind the m nearest of those seen."""
        tokens = seen.nonzero()[:, 0]
        m = min(self.settings.m, len(tokens))
        near = tokens.new_zeros(len(hidden), 0)
        if m and len(hidden):
            points = _in_units(self._memory.args if args is None else args, self._unit())
            tree = cKDTree(points[tokens.cpu().numpy()], balanced_tree=False, compact_nodes=False)
            found = tree.query(
                points[hidden.cpu().numpy()], k=np.arange(1, m + 1), workers=torch.get_num_threads()
            )[1]
            near = tokens[torch.from_numpy(found).to(tokens.device)]
        return alone(torch.cat([near, hidden[:, None]], 1))

    # --------------------------------------------------------------------------------------------------- the algebra

    def _chunks(
        self, args: tuple[Any, ...], row: Tensor, groups: Groups
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """By chunks: places (B, b) of the predicted in sets of k; means, residuals (B, k), covariances (B, k, k)."""
        width = groups.start.diff()
        done = 0
        while done < len(width):
            k = int(width[done])  # of the widest
            part = slice(done, done + max(1, at_once(CHUNK, width.device, GPU_TIMES) // k**2))
            done = part.stop
            here = torch.arange(k, device=width.device)
            beyond = here >= width[part, None]
            sets = groups.tokens[(groups.start[:-1][part, None] + here).clamp(max=len(groups.tokens) - 1)]
            loc, cov, _ = self._program()(args, sets)
            residual = (row[sets] - loc).nan_to_num(0.0)  # of a hidden one, which stands last
            if bool(beyond.any()):
                # beyond the end of a set: rows of the identity, whose residuals are 0
                outside = beyond[:, :, None] | beyond[:, None, :]
                cov = torch.where(outside, torch.eye(k, dtype=cov.dtype, device=cov.device), cov)
                residual = torch.where(beyond, 0.0, residual)
            yield groups.own[part], loc, residual, cov

    def _log_probs(self, row: Tensor, groups: Groups) -> Tensor:
        """Log-densities (G, b) of the predicted of each set, 0 where they are fewer."""
        parts = [
            LogProbGiven.apply(r, cov, own) for own, _, r, cov in self._chunks(self._memory.args, row, groups)
        ]
        return torch.cat(parts) if parts else row.new_zeros(groups.own.shape)

    def _moments(self, args: tuple[Any, ...], row: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
        """Means and variances (G, b) of the predicted of each set."""
        empty = row.new_zeros(0, groups.own.shape[1])
        means, variances = [empty], [empty]
        for own, loc, residual, cov in self._chunks(args, row, groups):
            # r_i = L_i. z,  of which L_i,<i z_<i is predicted:  mean = loc + r_i - L_ii z_i,  variance = L_ii^2
            root, white, at = whitened(residual, cov, own)
            scale = root.diagonal(dim1=1, dim2=2).gather(1, at)
            means.append(loc.gather(1, at) + residual.gather(1, at) - scale * white[..., 0].gather(1, at))
            variances.append(scale.square())
        return torch.cat(means), torch.cat(variances)

    def _chain(self, row: Tensor, tokens: Tensor) -> Tensor:
        """log p(y_t | nearest of y_<t) by token (T,)."""
        ordered = tokens[~row[tokens].isnan()]
        groups, _ = self._behind(ordered, _in_units(self._memory.args, self._unit())[ordered.cpu().numpy()])
        mine = groups.own >= 0
        return torch.zeros_like(row).index_copy(0, groups.predicted[mine], self._log_probs(row, groups)[mine])

    def _total(
        self, row: Tensor, layout: _Layout, tokens: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """The sum over all observed tokens, or over some, with weights (T,)."""
        groups = layout.groups
        if tokens is not None:
            groups = groups.only(layout.home[tokens[layout.seen[tokens]]].unique())
        by_set = None if weight is None else weight[groups.predicted]
        self._leaves.refuse_others()
        leaves = dict(pyro.get_param_store().named_parameters())
        moving = [leaves[n] for n in self.structure.parameters if leaves[n].requires_grad]

        def parts() -> Iterator[Tensor]:
            done = 0
            for own, _, residual, cov in self._chunks(self._memory.args, row, groups):
                terms = LogProbGiven.apply(residual, cov, own)
                yield terms.sum() if by_set is None else (by_set[done : done + len(terms)] * terms).sum()
                done += len(terms)

        if not torch.is_grad_enabled() or not moving:
            return torch.stack([row.new_zeros(()), *parts()]).sum()
        return SumOfParts.apply(parts, *moving)


def _in_units(args: tuple[Any, ...], unit: Points) -> Points:
    """The rows (N, P) of the first argument in these units, without what makes no difference."""
    x = args[0]
    points = x.reshape(len(x), -1).cpu().numpy().astype(np.float64)
    matters = np.isfinite(unit)
    return points[:, matters] / unit[matters] if matters.any() else points
