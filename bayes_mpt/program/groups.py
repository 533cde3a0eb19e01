"""Latents of groups: vectors outside the rows plate whose entries are independent given all the rest.

Random effects are usually written ``theta ~ Normal(mu, tau)`` in a plate of groups, and rows then use ``theta[group]``.
Given mu and tau the log joint is a sum in which no term looks at the effects of two groups:

    log p(x, theta, mu, tau) = r(mu, tau) + sum_b f_b(theta_b, mu, tau)

so that its second differences in theta_b and theta_c vanish, and each group can be integrated by itself. Which term
looks at which effect is found by evaluation: at eight points, near and far, half of the effects are moved at a time by
steps of several sizes, and what moves is seen term by term. A term that moves with two effects (a random walk, a
conditional autoregression, effects that add up to zero, the weights of a regression) makes them one. At last the
effects of two points are mixed, half of them from each: every term must be that of the point which its group is from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from bayes_mpt.program.latents import Space, space
from bayes_mpt.program.layout import check_shape
from bayes_mpt.program.program import Model, Program
from bayes_mpt.program.run import FAILURES, run
from bayes_mpt.program.sites import base, latent_nodes, node_of, own_masks
from bayes_mpt.program.store import moved_parameters
from bayes_mpt.program.unconstrained import latent_density

__all__ = ["N_DRAWS", "Groups", "Terms", "find_groups", "log_terms"]

MAX_WIDTH = 10  # numbers of one group
N_DRAWS = 8  # of all latents from the prior, from which the points are made
STEPS = (
    (0.3, -1.0),
    (-3.0, 0.1),
    (1.0, 3.0),
    (-0.1, -0.3),
)  # in turn: as they are, in units of the prior's spread
ROUNDING = 1e-10  # of a term, by which it may move without being looked at
MOVED = 0.05  # of the parameters
FAR = 50.0
CELLS = 2**20  # log-densities at a time


class Terms(NamedTuple):
    """Log-densities of one run, element by element; their sum is the log joint."""

    tokens: Tensor
    """(T,)"""
    latents: Tensor
    """(M,), site after site."""


class Groups(NamedTuple):
    """B groups, integrated each by itself, and who belongs to which; B itself stands for nobody's."""

    space: Space
    """Of the effects: W numbers, sites in the program's order."""
    number: Tensor
    """(W,) the group of each number."""
    slot: Tensor
    """(W,) its place among the numbers of the group."""
    value: Tensor
    """(V,) the group of each element of the sites' values, site after site."""
    jacobian: Tensor
    """(J,) the group of each term of the transforms' log-determinants, site after site."""
    token: Tensor
    """(T,) the group of each token."""
    latent: Tensor
    """(M,) the group of each term of `Terms.latents`."""
    normalised: Tensor
    """(B,) whether a group without tokens integrates to one: no other latent's density looks at it."""

    @property
    def n_groups(self) -> int:
        """B."""
        return len(self.normalised)

    @property
    def width(self) -> int:
        """d, numbers of the widest group."""
        return int(self.slot.max()) + 1

    @property
    def names(self) -> tuple[str, ...]:
        """The sites."""
        return self.space.names


def log_terms(model: Model, filled: tuple[Any, ...], program: Program, values: dict[str, Tensor]) -> Terms:
    """Log-densities of a run at these values of all latents, those of events that are a sum one by one."""
    trace = run(model, filled, values)
    tokens = []
    for site in program.sites:
        check_shape(node_of(trace, site.name), site)
        tokens.append(_elements(trace.nodes[site.name]))
    latents = [_elements(node) for node in latent_nodes(trace)]
    return Terms(torch.cat(tokens), torch.cat(latents))


def _elements(node: Any) -> Tensor:
    """Log-densities of a site, 0 where masks of the program hide them."""
    fn = base(node["fn"])
    log_prob = latent_density({**node, "fn": fn}).to(node["value"])
    for mask, n_outer in own_masks(node, node["fn"].event_dim - fn.event_dim):
        log_prob = torch.where(mask[(...,) + (None,) * n_outer] if mask.ndim else mask, log_prob, 0.0)
    return log_prob.reshape(-1)


def find_groups(
    model: Model, filled: tuple[Any, ...], program: Program, traces: list[Any], names: tuple[str, ...] = ()
) -> Groups | None:
    """The groups of a program's latents; None where there are none, or where it cannot be decided.

    Parameters
    ----------
    model : callable
        A Pyro program.
    filled : tuple
        What it is called with, without missing cells.
    program : Program
        What `analyze` found.
    traces : list of Trace
        Eight runs at latents drawn from the prior.
    names : tuple of str, optional
        The sites that may be effects, by default all.
    """
    if program.by_row or program.discrete or program.scale != 1.0 or program.sub_rows is not None:
        return None
    everything = space(program, traces[0], program.continuous)._replace(depth=0)
    candidates = [
        p.latent.name for p in everything.parts if p.latent.shape and (not names or p.latent.name in names)
    ]
    if not candidates:
        return None
    with torch.no_grad(), pyro.validation_enabled(False), moved_parameters(MOVED):
        try:
            return _Search(model, filled, program, everything, traces).groups(candidates)
        except FAILURES:
            return None


class _Unit(NamedTuple):
    """A site cut into parts that no term looks at two of."""

    name: str
    part: Tensor
    """(width,) the part of each of its numbers."""
    axis: int | None
    """The axis along which it is cut; None: every number is a part."""
    seen: Tensor
    """(terms,) the part that each term looks at, -1 where it looks at none."""


class _Search:
    """Runs at points in the unconstrained space, and at others nearby."""

    def __init__(
        self, model: Model, filled: tuple[Any, ...], program: Program, everything: Space, traces: list[Any]
    ):
        self.space, self.program = everything, program
        self.latents = latent_nodes(traces[0])

        def alone(values: dict[str, Tensor]) -> Terms:
            return log_terms(model, filled, program, values)

        self._alone: Callable[[dict[str, Tensor]], Terms] = alone
        draws = torch.cat([everything.pack(t, 1) for t in traces])[:, 0].detach()  # (P, K)
        draws = draws.nan_to_num(0.0, FAR, -FAR)  # of a draw that underflows
        middle = draws.median(0).values
        share = torch.tensor([1.0, 1.0, 1.0, 0.3, 0.1, 0.01, 0.1, 0.01]).to(draws)[: len(draws), None]
        around = torch.where(torch.arange(len(draws), device=draws.device)[:, None] < 6, middle, 0.0)
        self.points = around + share * (draws - around)
        self.spread = draws.std(0).nan_to_num(1.0, 1.0, 1.0).clamp(1e-6, 1e6)
        self.start: dict[str, slice] = {}
        at = 0
        for p in everything.parts:
            size = math.prod(p.shape)
            self.start[p.latent.name] = slice(at, at + size)
            at += size
        first = self._terms(self.points)
        self.n_tokens, self.before = first.tokens.shape[1], torch.cat(first, 1)
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(at, generator=generator, dtype=torch.float64).to(draws)
        self.noise = 0.5 + noise  # no two numbers move alike

    def _terms(self, u: Tensor) -> Terms:
        """At points u (S, K): (S, T), (S, M)."""
        per_run = self.program.n_tokens + u.shape[1]
        found = []
        for part in u.split(max(1, CELLS // per_run)):
            values, _ = self.space.jacobians(part[:, None])
            found.append(torch.vmap(self._alone)(values))
        tokens, latents = zip(*found, strict=True)
        return Terms(torch.cat(tokens), torch.cat(latents))

    def _looks(self, moves: Tensor) -> Tensor:
        """Which terms look at any of the numbers that are moved: (R, K) bool -> (R, terms)."""
        steps = torch.tensor(STEPS).to(self.points)[torch.arange(len(self.points)) % len(STEPS)]
        units = torch.stack([torch.ones_like(self.spread), self.spread])  # (2, K)
        far = steps.to(units)[..., None] * units * self.noise  # (P, 2, K)
        there = self.points[:, None, None] + far[:, :, None] * moves.to(far)  # (P, 2, R, K)
        found = torch.cat(self._terms(there.flatten(0, 2)), 1).unflatten(0, there.shape[:3])
        before = self.before[:, None, None]
        return (~before.isnan() & ~_same(found, before)).flatten(0, 1).any(0)

    def groups(self, candidates: list[str]) -> Groups | None:
        """See `find_groups`."""
        found = [unit for name in candidates if (unit := self._cut(name)) is not None]
        while found:
            group, n_groups = _connected(found)
            crowded = self._crowded(found, group, n_groups)
            if not crowded:
                groups = self._described(found, group, n_groups)
                return groups if self._holds(groups) else None
            fewest = min(crowded, key=lambda unit: len(unit.part.unique()))
            found = [unit for unit in found if unit is not fewest]
        return None

    def _cut(self, name: str) -> _Unit | None:
        """A site in as many parts as no term looks at two of."""
        part = next(p for p in self.space.parts if p.latent.name == name)
        axes: list[int | None] = list(range(len(part.shape) - part.n_event)) if len(part.shape) > 1 else []
        for axis in [*([None] if not part.n_event else []), *axes]:
            of_number = _along(part.shape, axis).to(self.points.device)
            n_parts = int(of_number.max()) + 1
            one = n_parts == 1 and bool(part.latent.plates) and axis in (None, 0)  # a plate of one group
            if n_parts < 2 and not one:
                continue
            seen = self._decoded(name, of_number, n_parts)
            if seen is not None:
                return _Unit(name, of_number, axis, seen)
        return None

    def _decoded(self, name: str, part: Tensor, n_parts: int) -> Tensor | None:
        """The one part that each term looks at (terms,), from moving those whose number has a bit set, or not set."""
        n_bits = max(1, (n_parts - 1).bit_length())
        seen = torch.zeros(self.before.shape[1], dtype=torch.long, device=part.device)
        looks = torch.zeros_like(seen, dtype=torch.bool)
        for bits in (range(1), range(1, n_bits)):  # most sites that are none show it at once
            moves = torch.zeros(2 * len(bits), self.points.shape[1], dtype=torch.bool, device=part.device)
            for i, bit in enumerate(bits):
                has = (part >> bit) & 1 == 1
                moves[2 * i, self.start[name]], moves[2 * i + 1, self.start[name]] = has, ~has
            if not len(moves):
                continue
            with_bit, without = self._looks(moves).unflatten(0, (-1, 2)).unbind(1)
            if bool((with_bit & without).any()):
                return None
            for bit, moved in zip(bits, with_bit, strict=True):
                seen += moved.long() << bit
            looks |= (with_bit | without).any(0)
        return torch.where(looks, seen, -1)

    def _crowded(self, found: list[_Unit], group: list[Tensor], n_groups: int) -> list[_Unit]:
        """Sites of which two parts fall into one group, or which make it too wide."""
        width = torch.zeros(n_groups, dtype=torch.long)
        crowded: list[_Unit] = []
        for unit, of_part in zip(found, group, strict=True):
            width.index_add_(0, of_part[unit.part.cpu()], torch.ones(len(unit.part), dtype=torch.long))
            if len(of_part.unique()) < len(of_part):
                groups, count = of_part.unique(return_counts=True)
                twice = set(groups[count > 1].tolist())
                crowded += [u for u, other in zip(found, group, strict=True) if twice & set(other.tolist())]
        wide = set((width > MAX_WIDTH).nonzero()[:, 0].tolist())
        crowded += [u for u, other in zip(found, group, strict=True) if wide & set(other.tolist())]
        return crowded

    def _described(self, found: list[_Unit], group: list[Tensor], n_groups: int) -> Groups:
        """The groups in the order of the program's sites, numbers and terms."""
        device = self.points.device
        units = {unit.name: (unit, of_part.to(device)) for unit, of_part in zip(found, group, strict=True)}
        parts = tuple(p for p in self.space.parts if p.latent.name in units)
        number, value, jacobian = [], [], []
        for p in parts:
            unit, of_part = units[p.latent.name]
            number.append(of_part[unit.part])
            value.append(of_part[_along(p.latent.shape, unit.axis).to(device)])
            jacobian.append(of_part[_along(p.shape[: len(p.shape) - p.n_event], unit.axis).to(device)])
        numbers = torch.cat(number)
        slot = torch.zeros_like(numbers)
        for b in numbers.unique():
            slot[numbers == b] = torch.arange(int((numbers == b).sum()), device=device)
        of_term = torch.full((self.before.shape[1],), n_groups, dtype=torch.long, device=device)
        for unit, of_part in units.values():
            looks = unit.seen >= 0
            of_term[looks] = of_part[unit.seen[looks]]
        normalised = torch.ones(n_groups + 1, dtype=torch.bool, device=device)
        start = self.n_tokens
        for node in self.latents:
            here = slice(start, start := start + _elements(node).numel())
            if node["name"] in units:  # its own prior, also where that is flat
                unit, of_part = units[node["name"]]
                shape = tuple(node["value"].shape)[: node["value"].ndim - base(node["fn"]).event_dim]
                of_term[here] = of_part[_along(shape, unit.axis).to(device)]
            else:
                normalised[of_term[here]] = False
        latent = of_term[self.n_tokens :]
        return Groups(
            Space(parts, 0, False), numbers, slot, torch.cat(value), torch.cat(jacobian),
            of_term[: self.n_tokens], latent, normalised[:n_groups],
        )  # fmt: skip

    def _holds(self, groups: Groups) -> bool:
        """Whether every term is that of its own group's point, where half of the groups are from another point."""
        of_number = torch.full((self.points.shape[1],), groups.n_groups, device=self.points.device)
        start = 0
        for name in groups.names:
            here = self.start[name]
            of_number[here] = groups.number[start : start + here.stop - here.start]
            start += here.stop - here.start
        effects = of_number < groups.n_groups
        of_term = torch.cat([groups.token, groups.latent])
        other = torch.where(effects, self.points.roll(1, 0), self.points)
        there = torch.cat(self._terms(other), 1)
        for bit in range(max(1, groups.n_groups.bit_length())):
            has = (of_number >> bit) & 1 == 1
            mixed = torch.cat(self._terms(torch.where(has & effects, other, self.points)), 1)
            want = torch.where((of_term >> bit) & 1 == 1, there, self.before)
            want = torch.where(of_term < groups.n_groups, want, self.before)
            if not bool((_same(mixed, want) | want.isnan()).all()):
                return False
        return True


def _same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | ((a - b).abs() <= ROUNDING * (1 + b.abs()))


def _along(shape: tuple[int, ...], axis: int | None) -> Tensor:
    """The place of each number of this shape along an axis, or of each by itself: flat."""
    n = math.prod(shape)
    if axis is None:
        return torch.arange(n)
    index = torch.arange(shape[axis]).reshape(-1, *[1] * (len(shape) - axis - 1))
    return index.expand(shape).reshape(-1)


def _connected(units: list[_Unit]) -> tuple[list[Tensor], int]:
    """Groups of parts that any term looks at together: of each site the group of each part, and their number."""
    start, n = [], 0
    for unit in units:
        start.append(n)
        n += int(unit.part.max()) + 1
    parent = list(range(n))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    looked = torch.stack(
        [torch.where(u.seen >= 0, u.seen + s, -1) for u, s in zip(units, start, strict=True)]
    )
    for together in {tuple(i for i in column if i >= 0) for column in looked.T.tolist()}:
        for i in together[1:]:
            parent[root(i)] = root(together[0])
    number = {r: b for b, r in enumerate(dict.fromkeys(root(i) for i in range(n)))}
    group = torch.tensor([number[root(i)] for i in range(n)], dtype=torch.long)
    return list(group.tensor_split(start[1:])), len(number)
