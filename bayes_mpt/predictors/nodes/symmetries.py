"""Symmetries of a log joint density in its latents, found by evaluation.

A mixture's components may change names, a factor its sign: log p(z, x) = log p(g z, x) for all z. Permutations of the
elements along axes of sites, of sites of the same shape, and changes of sign are tried at random points; those under
which the density does not change tell where the other modes are. That is all they are used for: of equal or empty
groups, of overlapping components, images of a mode fall together or lie close, and a factor for them would be wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, combinations
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions.transforms import IndependentTransform

from bayes_mpt.program.latents import Space

__all__ = ["MAX_IMAGES", "Coordinates", "Moves", "Orbit", "Symmetry", "find_symmetries", "orbit"]

MAX_IMAGES = 720  # of a mode
MAX_CANDIDATES = 400
MAX_ELEMENTS = 30  # along an axis whose elements are tried
MAX_PAIRS = 28  # above it only neighbours along an axis change places
MAX_AXES = 4  # of one size, up to which all sets of them are tried
SAME = 1e-8  # of a log-density
REACH = 10.0  # standard deviations: further images of a mode add nothing to a proposal around it
IMAGE = 0.1  # standard deviations: images so close to a mode are that mode

Axis = tuple[tuple[int, ...], ...]
"""Elements that may change places: the coordinates of each."""


class Symmetry(NamedTuple):
    """Coordinates that change places, then signs: y -> sign * y[order]."""

    order: Tensor
    """(D,) long"""
    sign: Tensor
    """(D,)"""

    def after(self, first: Symmetry) -> Symmetry:
        """Another one, then this one."""
        return Symmetry(first.order[self.order], self.sign * first.sign[self.order])


class Moves(NamedTuple):
    """M symmetries side by side."""

    order: Tensor
    """(M, D) long"""
    sign: Tensor
    """(M, D)"""

    @classmethod
    def of(cls, each: Iterable[Symmetry]) -> Moves:
        order, sign = zip(*each, strict=True)
        return cls(torch.stack(order), torch.stack(sign))

    @property
    def nothing(self) -> bool:
        """Whether the first of them moves nothing."""
        at = torch.arange(self.order.shape[1], device=self.order.device)
        return bool((self.order[0] == at).all() & (self.sign[0] > 0).all())


class _Part(NamedTuple):
    """Coordinates of a site: unconstrained ones, or of the constrained value where its transform mixes these."""

    name: str
    at: slice
    """In u."""
    into: slice
    """In y."""
    transform: object
    """None where elements are transformed one by one."""
    raw: tuple[int, ...]
    shape: tuple[int, ...]
    kind: str
    """Sites of the same kind may change places."""


class Coordinates:
    """Vectors y on which symmetries act, of the unconstrained latents u of the data set.

    Elements of a site whose transform takes them one by one stand as they are; simplices and the like as constrained.
    """

    def __init__(self, space: Space):
        self.parts: list[_Part] = []
        start = into = 0
        for p in space.parts:
            transform = p.transform
            while isinstance(transform, IndependentTransform):
                transform = transform.base_transform
            single = transform.domain.event_dim == 0
            shape = tuple(p.latent.shape)
            size, width = _size(p.shape), _size(shape)
            kind = f"{type(transform).__name__}{transform if single else ''}"
            where = (slice(start, start + size), slice(into, into + width))
            part = _Part(p.latent.name, *where, None if single else p.transform, tuple(p.shape), shape, kind)
            self.parts.append(part)
            start, into = start + size, into + width
        self.width, self.size = start, into
        self.free = torch.zeros(into, dtype=torch.bool)
        """(D,) which may change sign."""
        for part in self.parts:
            self.free[part.into] = part.transform is None

    @property
    def linear(self) -> bool:
        """Whether y is u."""
        return all(part.transform is None for part in self.parts)

    def of(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """y (..., D) at u (..., d), and log |dy / du| (...)."""
        out, log_det = [], u.new_zeros(u.shape[:-1])
        for p in self.parts:
            raw = u[..., p.at]
            if p.transform is None:
                out.append(raw)
                continue
            raw = raw.reshape(*u.shape[:-1], *p.raw)
            value = p.transform(raw)  # type: ignore[operator]
            jacobian = p.transform.log_abs_det_jacobian(raw, value)  # type: ignore[attr-defined]
            log_det = log_det + jacobian.reshape(*u.shape[:-1], -1).sum(-1)
            out.append(value.reshape(*u.shape[:-1], -1))
        return torch.cat(out, -1), log_det

    def back(self, y: Tensor) -> Tensor:
        """u (..., d) at y (..., D)."""
        out = []
        for p in self.parts:
            value = y[..., p.into]
            if p.transform is not None:
                value = p.transform.inv(value.reshape(*y.shape[:-1], *p.shape))  # type: ignore[attr-defined]
                value = value.reshape(*y.shape[:-1], -1)
            out.append(value)
        return torch.cat(out, -1)

    def move(self, u: Tensor, by: Moves) -> tuple[Tensor, Tensor]:
        """Images (M, S, d) of u (S, d) or (M, S, d), and log |d image / du| (M, S)."""
        y, log_det = self.of(u)
        y = y.expand(len(by.order), *y.shape[-2:])
        moved = y.gather(-1, by.order[:, None].to(y.device).expand_as(y)) * by.sign[:, None].to(y)
        image = self.back(moved)
        if self.linear:
            return image, log_det.expand(len(by.order), -1)
        return image, log_det - self.of(image)[1]

    def images(self, u: Tensor, root: Tensor, by: Moves) -> tuple[Tensor, Tensor]:
        """Images (M, d) of one mode u (d,), and (M, d, d) of its root."""
        if self.linear:
            return u[by.order] * by.sign.to(u), root[by.order] * by.sign.to(u)[..., None]
        if len(by.order) == 1 and by.nothing:
            return u[None], root[None]
        with torch.enable_grad():
            each = u.detach().expand(len(by.order), 1, -1).clone().requires_grad_()
            image = self.move(each, by)[0]
            slopes = [torch.autograd.grad(t.sum(), each, retain_graph=True)[0] for t in image.unbind(-1)]
        return image.detach()[:, 0], torch.stack(slopes, 1)[:, :, 0] @ root


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


# ------------------------------------------------------------------------------------------------------- candidates


def _axes(where: Coordinates) -> dict[int, list[Axis]]:
    """By their number of elements: the axes of sites, and sites of the same kind and shape as elements of one."""
    found: dict[int, list[Axis]] = {}
    alike: dict[tuple[object, ...], list[_Part]] = {}
    for p in where.parts:
        index = torch.arange(p.into.start, p.into.stop).reshape(p.shape)
        for axis, n in enumerate(p.shape):
            if 1 < n <= MAX_ELEMENTS:
                blocks = tuple(tuple(b.flatten().tolist()) for b in index.unbind(axis))
                found.setdefault(n, []).append(blocks)
        stem = re.sub(r"\d+", "", p.name)
        for key in ((p.kind, p.shape), (p.kind, p.shape, stem)):
            alike.setdefault(key, []).append(p)
    for parts in alike.values():
        blocks = tuple(tuple(range(p.into.start, p.into.stop)) for p in parts)
        if 1 < len(blocks) <= MAX_ELEMENTS and blocks not in found.get(len(blocks), []):
            found.setdefault(len(blocks), []).append(blocks)
    return found


def _subsets(axes: list[Axis]) -> Iterator[tuple[Axis, ...]]:
    """Sets of axes of one size, all of them first."""
    if len(axes) > MAX_AXES:
        yield tuple(axes)
        yield from ((axis,) for axis in axes)
        return
    for n in range(len(axes), 0, -1):
        yield from combinations(axes, n)


def _flips(where: Coordinates) -> Iterator[frozenset[int]]:
    """Sets of coordinates that may change sign together."""
    free = where.free.tolist()
    sites = [frozenset(range(p.into.start, p.into.stop)) for p in where.parts if p.transform is None]
    if len(sites) <= MAX_AXES:
        for n in range(1, len(sites) + 1):
            yield from (frozenset(chain(*some)) for some in combinations(sites, n))
    else:
        yield from sites
    for size, axes in _axes(where).items():
        real = [axis for axis in axes if all(free[i] for block in axis for i in block)]
        for some in _subsets(real):
            yield from (frozenset(chain(*(axis[k] for axis in some))) for k in range(size))


def _candidates(where: Coordinates) -> list[Symmetry]:
    """Pairs that change places, in one or several axes at once and with or without signs; changes of sign alone."""
    same, plus = torch.arange(where.size), torch.ones(where.size)
    out: dict[tuple[object, ...], Symmetry] = {}

    def add(order: Tensor, flipped: Iterable[int]) -> None:
        sign = plus.clone()
        sign[list(flipped)] = -1
        key = (*order.tolist(), *sign.tolist())
        if len(out) < MAX_CANDIDATES:
            out.setdefault(key, Symmetry(order, sign))

    flips = list(dict.fromkeys(_flips(where)))
    for flipped in flips:
        add(same, flipped)
    numbers = [p.into.start for p in where.parts if p.transform is None and _size(p.shape) == 1]
    for size, axes in _axes(where).items():
        pairs = list(combinations(range(size), 2))
        if len(pairs) > MAX_PAIRS:
            pairs = [(i, i + 1) for i in range(size - 1)]
        for some in _subsets(axes):
            for i, j in pairs:
                order = same.clone()
                for axis in some:  # along two axes of one site one after the other
                    step = same.clone()
                    step[list(axis[i])], step[list(axis[j])] = same[list(axis[j])], same[list(axis[i])]
                    order = order[step]
                add(order, ())
                if size == 2:  # a weight w beside two components: 1 - w, a change of its logit's sign
                    for number in numbers:
                        add(order, (number,))
    return list(out.values())


# --------------------------------------------------------------------------------------------------------- the test


def find_symmetries(
    log_prob: Callable[[Tensor], Tensor], where: Coordinates, points: Tensor, few: int = 2
) -> list[Symmetry]:
    """Changes of the latents under which log_prob (M, d) -> (M,) of unconstrained latents keeps its mass.

    log p(g u) + log |dg / du| = log p(u)    at all points (P, d), of which a ``few`` are tried first
    """
    candidates = _candidates(where)
    if not candidates:
        return []
    before = log_prob(points)
    points, before = points[before.isfinite()], before[before.isfinite()]
    for some in (slice(None, None, max(1, len(points) // few)), slice(None)):
        if not candidates or not len(points):
            return []
        moves = Moves.of(candidates)
        image, log_det = where.move(points[some], moves)  # (M, P, d), (M, P)
        known = image.isfinite().all(-1)
        image = torch.where(known[..., None], image, points[some])
        after = log_prob(image.flatten(0, 1)).reshape(known.shape) + log_det
        wrong = (after - before[some]).abs() > SAME * (1 + before[some].abs())
        good = ~(wrong | after.isnan() | ~known).any(1)
        candidates = [c for c, fine in zip(candidates, good.tolist(), strict=True) if fine]
    return candidates


class Orbit(NamedTuple):
    """The images of a mode."""

    elements: list[Symmetry]
    """What leads to each of J of them; the first moves nothing."""
    images: Tensor
    """(J, d)"""
    n_images: int
    """Of all that there are: where they are more than 720, those listed are those within reach of the mode."""
    whole: bool
    """Whether all are listed that there are, or that are within reach."""


def orbit(where: Coordinates, symmetries: list[Symmetry], u: Tensor, root: Tensor) -> Orbit:
    """The distinct images of a mode u (d,) whose curvature has the inverse root root'."""
    count = 1
    if symmetries:
        here = where.images(u, root, Moves.of(symmetries))[0]
        still = _apart(torch.linalg.inv(root)[None], u[None], here)[0] < IMAGE
        keep = [g for g, same in zip(symmetries, still.tolist(), strict=True) if same]
        count = _order(symmetries) // _order(keep)
    found, images = _walk(where, symmetries, u, root, math.inf if count <= MAX_IMAGES else REACH)
    n_images = len(found) if count <= MAX_IMAGES else count
    return Orbit(found[:MAX_IMAGES], images[:MAX_IMAGES], n_images, len(found) <= MAX_IMAGES)


def _walk(
    where: Coordinates, symmetries: list[Symmetry], u: Tensor, root: Tensor, reach: float
) -> tuple[list[Symmetry], Tensor]:
    """Images that are led to by images not further than ``reach`` away, until these are too many."""
    found, images = [Symmetry(torch.arange(where.size), torch.ones(where.size))], u[None]
    inverse, at = torch.linalg.inv(root)[None], 0
    while symmetries and at < len(found) <= MAX_IMAGES:
        steps = [g.after(found[at]) for g in symmetries]
        at += 1
        new, its = where.images(u, root, Moves.of(steps))
        good = new.isfinite().all(-1) & (_apart(inverse[:1], u[None], new)[0] <= reach)
        good &= ~(_apart(inverse, images, new) < IMAGE).any(0)
        index = good.nonzero()[:, 0]
        if not len(index):
            continue
        own = torch.linalg.inv(its[index])
        same = _apart(own, new[index], new[index]) < IMAGE
        first = (same.to(torch.int8).argmax(1) == torch.arange(len(index), device=u.device)).nonzero()[:, 0]
        found += [steps[i] for i in index[first].tolist()]
        images, inverse = torch.cat([images, new[index[first]]]), torch.cat([inverse, own[first]])
    return found, images


def _apart(inverse: Tensor, images: Tensor, u: Tensor) -> Tensor:
    """How far points u (M, d) are from images (J, d), in units of the roots whose inverses are given: (J, M)."""
    return (inverse[:, None] @ (images[:, None] - u)[..., None])[..., 0].norm(dim=-1)


def _order(symmetries: list[Symmetry]) -> int:
    """How many changes these make together: the order of a group of permutations of coordinates with signs."""
    if not symmetries:
        return 1
    # half of all the time that importing the package takes
    from sympy.combinatorics import Permutation, PermutationGroup  # type: ignore[import-untyped]

    size = len(symmetries[0].order)
    each = []
    for order, sign in symmetries:
        turned = (sign < 0).long()
        points = torch.cat([order + size * turned, order + size * (1 - turned)])
        each.append(Permutation(points.tolist()))
    return int(PermutationGroup(each).order())
