"""Points in space: an order coarse to fine, the nearest that come before each, and sets that neighbours share."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

__all__ = ["Groups", "Index", "Points", "alone", "grouped", "maxmin", "predecessors", "united"]

Points = NDArray[np.float64]
Index = NDArray[np.int64]

MAX_GROUP = 8  # tokens that share one set
N_EXACT_ORDER = 2048  # points up to which the maxmin ordering is exact
POOL = 4  # candidates for each place of a level of the ordering
GROWTH = 1.3  # of the prefixes that the neighbours are searched in


def maxmin(points: Points, seed: int = 0) -> Index:
    """Order points coarse to fine: each about the furthest from those before it.

    Exact up to 2048 points. Beyond, level by level: of a random pool of candidates, those further from all points
    taken so far, and from each other, than a distance that shrinks from level to level.

    Parameters
    ----------
    points : array of shape (n, P)
    seed : int, default=0
        For the pools.

    Returns
    -------
    array of shape (n,)
        A permutation.

    Examples
    --------
    >>> maxmin(np.array([[0.0], [1.0], [2.0], [8.0]]))
    array([2, 3, 0, 1])
    """
    n = len(points)
    if n <= N_EXACT_ORDER:
        return _furthest_first(points)
    pool = np.random.default_rng(seed).permutation(n)
    first = pool[:N_EXACT_ORDER]
    kept = _furthest_first(points[first])[: N_EXACT_ORDER // 2]
    order = first[kept]
    taken = np.zeros(n, dtype=bool)
    taken[order] = True
    while len(order) < n:
        candidates = pool[: min(n, POOL * len(order))]
        candidates = candidates[~taken[candidates]]
        distance = cKDTree(points[order], balanced_tree=False, compact_nodes=False).query(points[candidates])[
            0
        ]
        by_distance = np.argsort(-distance, kind="stable")
        candidates, distance = candidates[by_distance], distance[by_distance]
        n_new = min(len(candidates), len(order))
        if n_new == len(candidates):
            new = candidates  # the last: in the order of their distance
        else:
            new = candidates[_separated(points[candidates], distance, distance[n_new - 1])]
        order = np.concatenate([order, new])
        taken[new] = True
    return order


def _furthest_first(points: Points) -> Index:
    """The exact ordering, from the point nearest to the mean."""
    n = len(points)
    order = np.empty(n, dtype=np.int64)
    gap = np.full(n, np.inf)
    last = int(((points - points.mean(0)) ** 2).sum(1).argmin())
    for i in range(n):
        order[i] = last
        np.minimum(gap, ((points - points[last]) ** 2).sum(1), out=gap)
        gap[last] = -1.0
        last = int(gap.argmax())
    return order


def _separated(points: Points, distance: NDArray[np.float64], least: float) -> Index:
    """Of candidates in order of distance, those further than ``least`` from all before them that are kept."""
    n = int((distance >= least).sum())
    pairs = cKDTree(points[:n]).query_pairs(least * (1 - 1e-9), output_type="ndarray")
    first, second = pairs.min(1), pairs.max(1)
    undecided, kept = np.ones(n, dtype=bool), np.zeros(n, dtype=bool)
    while undecided.any():
        # kept: no undecided one before it is near; and whatever is near a kept one is not
        blocked = np.zeros(n, dtype=bool)
        blocked[second] = True
        new = undecided & ~blocked
        kept |= new
        undecided &= ~new
        undecided[second[new[first]]] = False
        left = undecided[first] & undecided[second]
        first, second = first[left], second[left]
    return np.flatnonzero(kept)


def predecessors(points: Points, m: int, places: Index | None = None) -> Index:
    """The m nearest of the points before each, which are in their order.

    Parameters
    ----------
    points : array of shape (n, P)
    m : int
        Less than n.
    places : array of shape (B,), optional
        Of which points; all by default.

    Returns
    -------
    array of shape (B, m)
        Places of the neighbours. For the first m points, which have fewer before them, all of the first m + 1 but
        itself: also some that come after it.

    Examples
    --------
    >>> predecessors(np.array([[0.0], [5.0], [1.0], [4.0]]), 2)
    array([[1, 2],
           [0, 2],
           [0, 1],
           [1, 2]])
    """
    n = len(points)
    places = np.arange(n) if places is None else places
    near = np.empty((len(places), m), dtype=np.int64)
    early = places <= m
    first = np.arange(m)[None]
    near[early] = first + (first >= places[early, None])
    low = m + 1
    while low < n:
        high = min(n, max(low + 1, int(low * GROWTH)))
        mine = np.flatnonzero((places >= low) & (places < high))
        if len(mine):
            tree = cKDTree(points[:high], balanced_tree=False, compact_nodes=False)
            ask = min(high, int(m * GROWTH) + 8)
            while len(mine):
                mine, ask = _search(tree, points, places, mine, m, ask, near), min(high, 2 * ask)
        low = high
    return near


def _search(
    tree: cKDTree, points: Points, places: Index, mine: Index, m: int, ask: int, near: Index
) -> Index:
    """Fill in what `ask` neighbours decide; those left for which too few of them come before."""
    left = []
    step = max(1, 2**22 // ask)
    for start in range(0, len(mine), step):
        part = mine[start : start + step]
        found = tree.query(points[places[part]], k=ask, workers=torch.get_num_threads())[1]
        before = found < places[part, None]
        count = before.cumsum(1)
        enough = count[:, -1] >= m
        near[part[enough]] = found[enough][(before & (count <= m))[enough]].reshape(-1, m)
        left.append(part[~enough])
    return np.concatenate(left)


# -------------------------------------------------------------------------------------------------- shared neighbours


class Groups(NamedTuple):
    """Sets of tokens, in each of which some are predicted, each from all that stand before it."""

    tokens: Tensor
    """The sets one behind another, the widest first."""
    start: Tensor
    """(G + 1,) where each begins in ``tokens``."""
    own: Tensor
    """(G, b) the places within its set of those that are predicted; -1 where they are fewer."""

    @property
    def predicted(self) -> Tensor:
        """(G, b) the tokens that are predicted; of no meaning where ``own`` is -1."""
        return self.tokens[self.start[:-1, None] + self.own.clamp(min=0)]

    def of(self, order: Tensor) -> Groups:
        """Sets of places as sets of the tokens there."""
        device = order.device
        return Groups(order[self.tokens.to(device)], self.start.to(device), self.own.to(device))

    def only(self, which: Tensor) -> Groups:
        """Some of the sets, by their places in ascending order."""
        width = self.start.diff()[which]
        start = torch.cat([width.new_zeros(1), width.cumsum(0)])
        shift = (self.start[which] - start[:-1]).repeat_interleave(width)
        return Groups(
            self.tokens[torch.arange(len(shift), device=shift.device) + shift], start, self.own[which]
        )


def alone(sets: Tensor) -> Groups:
    """Sets (B, k), of each of which the last is predicted."""
    n, k = sets.shape
    start = torch.arange(n + 1, device=sets.device) * k
    return Groups(sets.flatten(), start, start.new_full((n, 1), k - 1))


def grouped(points: Points, m: int) -> tuple[Groups, Index]:
    """Of points in their order, the sets that give each at least its m nearest predecessors; and the set of each.

    Groups are as large as they may be without more entries in the covariances than if each point stood alone.
    """
    n = len(points)
    near = predecessors(points, m)
    size = MAX_GROUP
    while True:
        label = _neighbourhoods(points, size)
        groups, rank = united(near, np.arange(n), label)
        if size == 1 or float(groups.start.diff().double().square().sum()) <= n * (m + 1) ** 2:
            return groups, rank[label]
        size //= 2


def _neighbourhoods(points: Points, size: int) -> Index:
    """Labels of groups of at most ``size`` points, close to each other in space and in the order.

    Places [size, 2 size), [2 size, 4 size) and so on are each halved across their widest side, and these again.
    """
    n = len(points)
    if size == 1:
        return np.arange(n)
    label = np.zeros(n, dtype=np.int64)
    low = size
    while low < n:
        part = points[low : 2 * low]
        side = np.zeros(len(part), dtype=np.int64)
        for _ in range(math.ceil(math.log2(len(part) / size))):
            order = np.argsort(side, kind="stable")
            begin = np.flatnonzero(np.diff(side[order], prepend=-1))
            extent = np.maximum.reduceat(part[order], begin) - np.minimum.reduceat(part[order], begin)
            order = np.lexsort((part[np.arange(len(part)), extent.argmax(1)[side]], side))
            count = np.diff(begin, append=len(part))
            side[order] = 2 * side[order] + (
                np.arange(len(part)) >= np.repeat(begin + (count + 1) // 2, count)
            )
        label[low : 2 * low] = label[:low].max() + 1 + side
        low *= 2
    return label


def united(near: Index, places: Index, label: Index) -> tuple[Groups, Index]:
    """Of each label, the union of its places and of those near that come before; and its rank among the sets."""
    n = 1 + int(places.max(initial=0))
    mine = label * n + places
    keys = np.sort(np.concatenate([mine, (label[:, None] * n + near)[near < places[:, None]]]))
    keys = keys[np.diff(keys, prepend=-1) > 0]
    width = np.bincount(keys // n)
    rank = np.empty(len(width), dtype=np.int64)
    rank[np.argsort(-width, kind="stable")] = np.arange(len(width))
    keys = np.sort(rank[keys // n] * n + keys % n)
    start = np.concatenate([[0], np.cumsum(np.sort(width)[::-1])])
    mine = np.sort(rank[label] * n + places)
    count = np.bincount(mine // n)
    own = np.full((len(width), count.max(initial=1)), -1)
    nth = np.arange(len(mine)) - np.repeat(np.cumsum(count) - count, count)
    own[mine // n, nth] = np.searchsorted(keys, mine) - start[mine // n]
    return Groups(*map(torch.from_numpy, (keys % n, start, own))), rank
