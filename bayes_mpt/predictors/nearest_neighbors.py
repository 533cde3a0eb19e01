"""Conditionals of a long Gaussian vector, each token predicted from its nearest neighbours alone (Vecchia 1988).

    log p(y) = sum_i log p(y_i | y_N(i)),    N(i) the m nearest of those that come before i in an ordering

With K the covariance (m + 1, m + 1) of [N(i), i], L its Cholesky factor, r the residuals, v = L^-T e_last, z = v' r and
a = K_N^-1 r_N (0 at i):

    log p(y_i | y_N) = log v_last - z^2 / 2 - log(2 pi) / 2
    d/dK = 1/2 [z (v a' + a v') + (z^2 - 1) v v'],    d/dr = -z v

The program itself is run on batches of such sets of rows, (B, m + 1, P), so that no matrix of N x N is ever made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor
from torch.autograd.function import once_differentiable

from bayes_mpt.predictors.base import Conditionals, Evidence, Guide, Posterior, Predictive, Predictor
from bayes_mpt.predictors.joint_gaussian import LOG_2PI, JointGaussian, cholesky, gaussian_program
from bayes_mpt.tracing import Model, ModelError, Program, base, fill, rows_of, run, spread_rows

__all__ = ["NearestNeighbors", "maxmin", "predecessors"]

Points = NDArray[np.float64]
Index = NDArray[np.int64]

CHUNK = 2**19  # numbers of (B, m + 1, m + 1) at once: what a cache holds
N_EXACT_ORDER = 2048  # points up to which the maxmin ordering is exact
POOL = 4  # candidates for each place of a level of the ordering
GROWTH = 1.3  # of the prefixes that the neighbours are searched in
N_TRIAL_ROWS = 16  # on which it is found out how the program takes batches
N_BASE_ROWS = 4  # around which the correlation is followed
FALLEN = 0.5  # the share of the covariance at which a displacement counts as one unit
N_ERROR_TERMS = 4096  # whose change on doubling m stands for that of all
MAX_FULL = 4096  # rows of a dense covariance
CLOSE = 1e-9


class NearestNeighbors(Predictor):
    """Gaussian vectors of any length: each token given the m nearest before it, in time and memory linear in N.

    For programs ``model(x, y)`` that observe all rows as one MultivariateNormal and give any subset of the rows the
    covariance that it has among all: a Gaussian process, ours or one's own. Near is what is highly correlated: each
    column of x is scaled by the displacement at which the covariance has fallen by half, found by running the program.
    With m = N - 1 nothing is left out, and the score is exact.

    Parameters
    ----------
    m : int, default=30
        Neighbours of each token.
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
    >>> near.exact, exact.exact, bool(abs(near.joint(near.value) - exact.joint(exact.value)) < 0.01)
    (False, True, True)
    """

    def __init__(self, m: int = 30, *, ordering: str = "maxmin", random_state: int = 0):
        self.m = m
        self.ordering = ordering
        self.random_state = random_state

    def bind(self, model: Model, args: tuple[Any, ...], guide: Guide | None = None) -> Conditionals:
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
) -> Conditionals:
    """The conditionals of a program known to be a Gaussian vector."""
    return _Neighbours(settings, _Blocks(model, program, args), program)


# --------------------------------------------------------------------------------------------------- the program


class _Blocks:
    """The program on many sets of rows at once."""

    def __init__(self, model: Model, program: Program, args: tuple[Any, ...]):
        self.model = model
        self.site = program.sites[0].name
        self.together: Callable[..., tuple[Tensor, Tensor, Tensor]] = self._find_out(args)

    def __call__(self, args: tuple[Any, ...], sets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means (B, k), covariances (B, k, k) and values (B, k) of sets (B, k) of rows, with gradients."""
        return self.together(*rows_of(args, sets))

    def _one(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        """A single run: on one set (k, ...), or on all sets (B, k, ...) where the program broadcasts."""
        node = run(self.model, args).nodes[self.site]
        fn = base(node["fn"])
        return fn.loc, fn.covariance_matrix, node["value"].to(fn.loc)

    def _mapped(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        dims = tuple(0 if _is_rows(a) else None for a in args)
        with pyro.validation_enabled(False):  # a check of values has no place under vmap
            return torch.func.vmap(self._one, in_dims=dims)(*args)

    def _in_turn(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        n = len(args[0])
        parts = [self._one(*(a[b] if _is_rows(a) else a for a in args)) for b in range(n)]
        loc, cov, value = zip(*parts, strict=True)
        return torch.stack(loc), torch.stack(cov), torch.stack(value)

    def _find_out(self, args: tuple[Any, ...]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        """How the program takes batches; refuse one whose rows depend on which others are there."""
        rows = spread_rows(len(args[0]), N_TRIAL_ROWS).to(args[0].device)
        half = len(rows) // 2 or 1
        places = torch.stack(
            [torch.arange(half) * 2 % len(rows), torch.arange(half), torch.arange(half).flip(0)]
        )
        few = tuple(fill(a) for a in rows_of(args, rows))
        with torch.no_grad():
            loc, cov, _ = self._one(*few)
            alone = rows_of(few, places.to(rows.device))
            truth = self._in_turn(*alone)
            whole = loc[places], cov[places[:, :, None], places[:, None, :]]
            if not all(_close(a, b) for a, b in zip(truth[:2], whole, strict=True)):
                raise ModelError(
                    f"the distribution of site {self.site!r} over some rows changes with the other rows there are (a "
                    "statistic of all rows inside the program, or their number), so that rows cannot be predicted from "
                    "neighbours alone: compute it outside the program, or use predictor=Exact()"
                )
            for way in (self._one, self._mapped):
                try:
                    found = way(*alone)
                except Exception:
                    continue  # whatever a program that was written for one set of rows does with several
                if all(a.shape == b.shape and _close(a, b) for a, b in zip(found, truth, strict=True)):
                    return way
        return self._in_turn


def _is_rows(arg: Any) -> bool:
    return isinstance(arg, Tensor) and arg.ndim > 0


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= CLOSE * b.abs().max().clamp(min=1e-300)).all())


# ---------------------------------------------------------------------------------------------------- the ordering


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


# -------------------------------------------------------------------------------------------------------- the units


def column_units(blocks: _Blocks, args: tuple[Any, ...], seed: int = 0) -> Points:
    """Relative scales of the columns of x: (P,), inf where a column makes no difference.

    The change of each by which the covariance falls to half, found by running the program on pairs of rows that differ
    in one column. The displacements halve from the column's range down, and all values are the data's own, so that
    labels stay labels. In units of their geometric mean, rounded to 4 %: the same at parameters that hardly differ, and
    one where the kernel treats columns alike.
    """
    x = args[0].reshape(len(args[0]), -1)
    some = np.random.default_rng(seed).choice(len(x), min(len(x), N_BASE_ROWS), replace=False)
    unit = np.array([_unit(blocks, args, torch.from_numpy(some).to(x.device), c) for c in range(x.shape[1])])
    matters = np.isfinite(unit)
    octaves = np.log2(unit[matters])
    unit[matters] = 2.0 ** (np.round(16 * (octaves - octaves.mean())) / 16) if matters.any() else 1.0
    return unit


def _unit(blocks: _Blocks, args: tuple[Any, ...], some: Tensor, c: int) -> float:
    """The displacement in column c at which the covariance with the rows ``some`` has fallen to half."""
    column = args[0].reshape(len(args[0]), -1)[:, c]
    known = column.unique()
    extent = known[-1] - known[0]
    if not float(extent) > 0:
        return math.inf
    halvings = max(12, math.ceil(math.log2(len(column))))
    step = extent * torch.logspace(
        -halvings, 0, halvings + 1, base=2, dtype=column.dtype, device=column.device
    )
    here = column[some, None, None]
    wanted = here + torch.stack([step, -step], 1)  # (S, G, 2)
    above = torch.searchsorted(known, wanted).clamp(1, len(known) - 1)
    nearer = (known[above] - wanted).abs() <= (wanted - known[above - 1]).abs()
    there = torch.where(nearer, known[above], known[above - 1])
    moved = (there - here).abs()
    # first no displacement at all
    there, moved = (
        torch.cat([here.expand(-1, 1, 2), there], 1),
        torch.cat([moved.new_zeros(len(some), 1, 2), moved], 1),
    )
    level, size = _fall(
        _covariances(blocks, args, some, c, there), moved, torch.cat([step.new_zeros(1), step])
    )
    if float(size[1:2].sum()) <= 2.0**-6 * float(extent):
        level, size = level[1:], size[1:]  # a continuous column: without the noise that equal rows may share
    level = (level / level[0]).clamp(min=1e-12)
    if len(level) < 2 or not bool(torch.isfinite(level).all()):
        return math.inf
    fallen = (level < FALLEN).nonzero()[:, 0].tolist()
    i = fallen[0] if fallen else len(level) - 1
    if not fallen or float(size[i - 1]) == 0:
        # no step short of it or none beyond: as if it fell like exp(-(d / l)^2)
        drop = -math.log(min(float(level[i]), 1.0))
        return float(size[i]) * math.sqrt(-math.log(FALLEN) / drop) if drop > 1e-6 else math.inf
    # between two steps like exp(-(d / l)^c): log(-log level) is linear in log d
    a, b = size[i - 1 : i + 1].log().tolist()
    f, g = level[i - 1 : i + 1].clamp(max=1 - 1e-12).log().neg().log().tolist()
    return math.exp(a + (math.log(-math.log(FALLEN)) - f) / (g - f) * (b - a))


def _covariances(blocks: _Blocks, args: tuple[Any, ...], some: Tensor, c: int, there: Tensor) -> Tensor:
    """Covariances of rows with themselves, column c displaced to ``there`` (S, G, 2): of that shape."""
    pairs = some[:, None].expand(len(some), there[0].numel()).reshape(-1, 1).expand(-1, 2)
    first, *others = rows_of(args, pairs)  # (B, 2, ...)
    first = first.clone()
    first.reshape(*pairs.shape, -1)[:, 1, c] = there.flatten()
    with torch.no_grad():
        return blocks.together(first, *others)[1][:, 0, 1].reshape(there.shape)


def _fall(cov: Tensor, moved: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Mean covariance and displacement at each step that the data have, from (S, G, 2) to (G',) each."""
    counts = (moved - step[:, None]).abs() <= 0.1 * step[:, None]
    n = counts.sum((0, 2))
    level, size = (torch.where(counts, a, 0.0).sum((0, 2))[n > 0] / n[n > 0] for a in (cov, moved))
    return level, size


# -------------------------------------------------------------------------------------------------- the conditionals


class _Layout(NamedTuple):
    """Which tokens each observed one is predicted from."""

    seen: Tensor
    """(T,) bool: the observed tokens."""
    unit: Points
    """(P,) of each column of x."""
    sets: Tensor
    """(n, m + 1) tokens in their order, each behind its neighbours."""
    place: Tensor
    """(T,) of each token in the order."""


class _Memory:
    """What is found out once about the rows, and shared by the copies that `read` makes."""

    def __init__(self) -> None:
        self.source: tuple[Any, ...] = ()
        self.versions: list[int] = []
        self.args: tuple[Any, ...] = ()  # without missing cells
        self.value: Tensor | None = None
        self.unit: Points | None = None
        self.layout: _Layout | None = None

    def holds(self, args: tuple[Any, ...]) -> bool:
        return (
            len(self.source) == len(args)
            and all(a is b for a, b in zip(args, self.source, strict=True))
            and self.versions == _versions(args)
        )


def _versions(args: tuple[Any, ...]) -> list[int]:
    """Changes when a tensor is written into."""
    return [a._version for a in args if isinstance(a, Tensor)]


class _Neighbours(Conditionals):
    """See `NearestNeighbors`."""

    remembers = True
    divisible = True
    structure: Program

    def __init__(self, settings: NearestNeighbors, blocks: _Blocks | None, program: Program):
        self.settings = settings
        self.blocks = blocks
        self.model: Model | None = None if blocks is None else blocks.model
        self.structure = program
        self.exact = self.telescopes = settings.m >= program.n_tokens - 1
        self.name = f"NearestNeighbors({settings.m}, ordering={settings.ordering!r})"
        self.why = (
            f"the observations are one Gaussian vector of {program.n_tokens} tokens, each predicted from its "
            f"{min(settings.m, program.n_tokens - 1)} nearest predecessors; no covariance of all of them is made"
        )
        self._memory = _Memory()

    # ------------------------------------------------------------------------------------------------- the contract

    @property
    def value(self) -> Tensor:
        if self._memory.value is None:
            raise RuntimeError("call read(args) first: this predictor has not read the program yet")
        return self._memory.value

    @property
    def scale(self) -> float:
        return self.structure.scale

    def read(self, args: tuple[Any, ...]) -> _Neighbours:
        blocks = self._program()
        site = self.structure.sites[0]._replace(shape=(len(args[0]),))
        new = _Neighbours(self.settings, blocks, self.structure._replace(sites=(site,)))
        if not self._memory.source or self._memory.holds(args):
            new._memory = self._memory  # the program itself is run where tokens are scored
        memory = new._memory
        if memory.source:
            return new
        memory.source, memory.versions = args, _versions(args)
        memory.args = tuple(fill(a) for a in args)
        rows = torch.arange(len(args[0]), device=args[0].device)
        width = 1 + min(self.settings.m, len(rows) - 1)
        whole = len(rows) // width * width
        with torch.no_grad():
            sets = [*rows[:whole].reshape(-1, width).split(max(1, CHUNK // width**2)), rows[None, whole:]]
            value = torch.cat([blocks(memory.args, part)[2].flatten() for part in sets if part.numel()])
        missing = (
            args[-1].isnan() if args[-1].is_floating_point() else torch.zeros_like(value, dtype=torch.bool)
        )
        memory.value = torch.where(missing.reshape(value.shape), torch.nan, value)[None]
        return new

    def freeze(self) -> _Neighbours:
        return _Neighbours(self.settings, None, self.structure)

    def settle(self) -> bool:
        if self._memory.unit is None:
            return False  # nothing found out yet
        before, now = self._memory.unit, self._units()
        self._memory.unit = now
        same = np.isfinite(before) & np.isfinite(now)
        return not (
            np.array_equal(np.isfinite(before), np.isfinite(now))
            and bool((np.abs(np.log2(before[same] / now[same])) < 0.25).all())
        )

    def joint(self, x: Tensor) -> Tensor:
        return torch.stack([self._total(row, self._layout(row)) for row in x])

    def sample(self, n_tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        # A quarter are the first in the order, always: the few far apart, and alone in telling of long distances.
        order = self._layout(self.value[0]).sets[:, -1]
        n = len(order)
        n_first = min(n, n_tokens // 4 + 1)
        rest = n_first + torch.randperm(n - n_first, generator=generator)[: n_tokens - n_first]
        places = torch.cat([torch.arange(n_first), rest])
        weight = torch.ones(len(places), dtype=torch.float64)
        weight[n_first:] = (n - n_first) / max(1, len(rest))
        return order[places.to(order.device)], weight.to(self.value)

    def partial(self, x: Tensor, tokens: Tensor, weight: Tensor) -> Tensor:
        return torch.stack([self._total(row, self._layout(row), tokens, weight) for row in x])

    def predicted(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        layout = self._layout(x[0])
        tokens = tokens[layout.seen[tokens]]
        return self._moments(self._memory.args, x[0], layout.sets[layout.place[tokens]], layout.place)

    def chain(self, x: Tensor, order: Tensor) -> Tensor:
        return torch.stack([torch.stack([self._chain(row, tokens) for row in x]) for tokens in order])

    def conditionals(self, x: Tensor, visible: Tensor) -> Tensor:
        out = x.new_zeros(len(visible), *x.shape)
        for s, mask in enumerate(visible):
            for n, row in enumerate(x):
                hidden = (~mask & ~row.isnan()).nonzero()[:, 0]
                sets = self._given(mask & ~row.isnan(), hidden)
                out[s, n] = torch.zeros_like(row).index_copy(0, hidden, self._log_probs(row, sets))
        return out

    def posterior(self, x: Tensor, visible: Tensor | None = None) -> Posterior:
        shown = ~x.isnan() if visible is None else ~x.isnan() & visible
        rows = []
        for row, seen in zip(x, shown, strict=True):
            hidden = (~seen).nonzero()[:, 0]
            mean, _ = self._moments(self._memory.args, row, self._given(seen, hidden))
            rows.append(torch.where(seen, row, 0.0).index_copy(0, hidden, mean))
        return Posterior(x.new_zeros(len(x), 0), torch.stack(rows))

    def predictive(self, seen: tuple[Any, ...], new: tuple[Any, ...], *, full: bool = False) -> Predictive:
        """Each new row given its m nearest rows seen; with ``full`` all of them given the neighbours of any."""
        read = self.read(seen)
        args = tuple(
            torch.cat([a, b]) if _is_rows(a) else a for a, b in zip(read._memory.args, new, strict=True)
        )
        hidden = torch.arange(len(seen[0]), len(args[0]), device=args[0].device)
        row = torch.cat([read.value[0], read.value.new_full((len(hidden),), torch.nan)])
        sets = read._given(~row.isnan(), hidden, args)
        if not full:
            return Predictive(*read._moments(args, row, sets), None)
        rows = sets[:, :-1].unique()
        if len(rows) + len(hidden) > MAX_FULL:
            raise ValueError(
                f"the covariance among {len(hidden)} new rows and their {len(rows)} neighbours would be of more than "
                f"{MAX_FULL} rows: ask for fewer rows at a time, or for standard deviations"
            )
        exact = JointGaussian(read._program().model, self.structure)
        return exact.predictive(rows_of(seen, rows), new, full=True)

    def evidence(self, x: Tensor) -> Evidence:
        """The score, and its error from the change that twice the neighbours make to a sample of the tokens.

        Twice that change, as if the error fell like 1/m.
        """
        lml = self.joint(x)
        diagnostics = {"m": self.settings.m, "ordering": self.settings.ordering}
        if self.exact:
            return Evidence(lml, 0.0, diagnostics)
        changes: list[tuple[float, float]] = []
        rng = np.random.default_rng(self.settings.random_state)
        for row in x:
            layout = self._layout(row)
            n = len(layout.sets)
            places = np.sort(rng.choice(n, min(n, N_ERROR_TERMS), replace=False))
            order = layout.sets[:, -1]
            near = predecessors(
                self._points(layout.unit)[order.cpu().numpy()], min(2 * self.settings.m, n - 1), places
            )
            some = torch.from_numpy(places).to(order.device)
            wider = torch.cat([order[torch.from_numpy(near).to(order.device)], order[some, None]], 1)
            by_token = self._log_probs(row, wider, layout.place)
            by_token = by_token - self._log_probs(row, layout.sets[some], layout.place)
            sampling = 0.0 if len(some) == n else float(by_token.std()) / math.sqrt(len(some))
            changes.append((n * float(by_token.mean()), n * sampling))
        change, sampling = np.sum(changes, axis=0).tolist()
        return Evidence(
            lml, 2 * math.hypot(change, sampling), {**diagnostics, "change_on_doubling_m": change}
        )

    # ------------------------------------------------------------------------------------------------- the neighbours

    def _program(self) -> _Blocks:
        if self.blocks is None:
            raise RuntimeError("this predictor is frozen: it has no program to read")
        return self.blocks

    def _units(self) -> Points:
        return column_units(self._program(), self._memory.args, self.settings.random_state)

    def _unit(self) -> Points:
        """Of the columns of x, at the parameters at which they were first asked for."""
        if self._memory.unit is None:
            self._memory.unit = self._units()
        return self._memory.unit

    def _layout(self, row: Tensor) -> _Layout:
        """Order and neighbours of the observed tokens of a row, found anew only where the units have changed."""
        memory, unit = self._memory, self._unit()
        kept, seen = memory.layout, ~row.isnan()
        if kept is not None and torch.equal(kept.seen, seen) and np.array_equal(kept.unit, unit):
            return kept
        tokens = seen.nonzero()[:, 0]
        points = self._points(unit)[tokens.cpu().numpy()]
        if self.settings.ordering == "given":
            order = np.arange(len(points))
        elif self.settings.ordering == "random":
            order = np.random.default_rng(self.settings.random_state).permutation(len(points))
        else:
            order = maxmin(points, self.settings.random_state)
        ordered = tokens[torch.from_numpy(order).to(tokens.device)]
        place = torch.zeros(len(row), dtype=torch.long, device=row.device)
        place[ordered] = torch.arange(len(ordered), device=row.device)
        memory.layout = _Layout(seen, unit, self._behind(ordered, points[order]), place)
        return memory.layout

    def _points(self, unit: Points, args: tuple[Any, ...] | None = None) -> Points:
        """The rows (N, P) in these units, without what makes no difference."""
        x = (self._memory.args if args is None else args)[0]
        points = x.reshape(len(x), -1).cpu().numpy().astype(np.float64)
        matters = np.isfinite(unit)
        return points[:, matters] / unit[matters] if matters.any() else points

    def _behind(self, ordered: Tensor, points: Points) -> Tensor:
        """Sets (n, m + 1) of tokens in their order, each behind its neighbours."""
        near = predecessors(points, min(self.settings.m, len(points) - 1))
        return torch.cat([ordered[torch.from_numpy(near).to(ordered.device)], ordered[:, None]], 1)

    def _given(self, seen: Tensor, hidden: Tensor, args: tuple[Any, ...] | None = None) -> Tensor:
        """Sets (H, m + 1) of hidden tokens, each behind the nearest of those seen."""
        tokens = seen.nonzero()[:, 0]
        m = min(self.settings.m, len(tokens))
        near = tokens.new_zeros(len(hidden), 0)
        if m and len(hidden):
            points = self._points(self._unit(), args)
            tree = cKDTree(points[tokens.cpu().numpy()], balanced_tree=False, compact_nodes=False)
            found = tree.query(
                points[hidden.cpu().numpy()], k=np.arange(1, m + 1), workers=torch.get_num_threads()
            )[1]
            near = tokens[torch.from_numpy(found).to(tokens.device)]
        return torch.cat([near, hidden[:, None]], 1)

    # --------------------------------------------------------------------------------------------------- the algebra

    def _chunks(
        self, args: tuple[Any, ...], row: Tensor, sets: Tensor, place: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Means (B,) of the last tokens, residuals (B, k) and covariances (B, k, k) of the sets, by chunks."""
        width = sets.shape[1]
        for part in sets.split(max(1, CHUNK // width**2)):
            loc, cov, _ = self._program()(args, part)
            residual = row[part] - loc
            if place is not None:
                # what comes after the last is no neighbour: a row of the identity, whose residual is 0
                later = place[part] > place[part[:, -1:]]
                if bool(later.any()):
                    outside = later[:, :, None] | later[:, None, :]
                    cov = torch.where(outside, torch.eye(width, dtype=cov.dtype, device=cov.device), cov)
                    residual = torch.where(later, 0.0, residual)
            yield loc[:, -1], residual, cov

    def _log_probs(self, row: Tensor, sets: Tensor, place: Tensor | None = None) -> Tensor:
        """Log-density (B,) of the last of each set given the others."""
        parts = [_LogProb.apply(r, cov) for _, r, cov in self._chunks(self._memory.args, row, sets, place)]
        return torch.cat(parts) if parts else row.new_zeros(0)

    def _moments(
        self, args: tuple[Any, ...], row: Tensor, sets: Tensor, place: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance (B,) of the last of each set given the others."""
        means, variances = [row.new_zeros(0)], [row.new_zeros(0)]
        for loc, residual, cov in self._chunks(args, row, sets, place):
            # with L = [[L_N, 0], [l', s]]:  mean = loc + l' L_N^-1 r_N,  variance = s^2
            root = cholesky(cov)
            white = torch.linalg.solve_triangular(root[:, :-1, :-1], residual[:, :-1, None], upper=False)
            means.append(loc + (root[:, -1:, :-1] @ white)[:, 0, 0])
            variances.append(root[:, -1, -1].square())
        return torch.cat(means), torch.cat(variances)

    def _chain(self, row: Tensor, tokens: Tensor) -> Tensor:
        """log p(y_t | nearest of y_<t) by token (T,)."""
        ordered = tokens[~row[tokens].isnan()]
        place = torch.zeros_like(tokens).index_copy(0, ordered, torch.arange(len(ordered), device=row.device))
        sets = self._behind(ordered, self._points(self._unit())[ordered.cpu().numpy()])
        return torch.zeros_like(row).index_copy(0, ordered, self._log_probs(row, sets, place))

    def _total(
        self, row: Tensor, layout: _Layout, tokens: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """The sum over all observed tokens, or a weighted one over some."""
        sets = layout.sets
        if tokens is not None and weight is not None:
            seen = layout.seen[tokens]
            sets, weight = sets[layout.place[tokens[seen]]], weight[seen]
        leaves = dict(pyro.get_param_store().named_parameters())
        moving = [leaves[n] for n in self.structure.parameters if leaves[n].requires_grad]

        def parts() -> Iterator[Tensor]:
            done = 0
            for _, residual, cov in self._chunks(self._memory.args, row, sets, layout.place):
                terms = _LogProb.apply(residual, cov)
                yield terms.sum() if weight is None else weight[done : done + len(terms)] @ terms
                done += len(terms)

        if not torch.is_grad_enabled() or not moving:
            return torch.stack([row.new_zeros(()), *parts()]).sum()
        return _Sum.apply(parts, *moving)


class _Sum(torch.autograd.Function):
    """A sum of many parts and its gradient to the leaves, without keeping more than one part's graph at a time."""

    @staticmethod
    def forward(ctx: Any, parts: Callable[[], Iterator[Tensor]], *leaves: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=leaves[0].device)
        grads = [torch.zeros_like(leaf) for leaf in leaves]
        with torch.enable_grad():
            for part in parts():
                total = total + part.detach()
                for grad, more in zip(
                    grads, torch.autograd.grad(part, leaves, materialize_grads=True), strict=True
                ):
                    grad += more
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(grad * g for g in ctx.saved_tensors))


class _LogProb(torch.autograd.Function):
    """Log-density (B,) of the last of each residual (B, k) given the others, with covariances (B, k, k)."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, cov: Tensor) -> Tensor:
        root = cholesky(cov)
        white = torch.linalg.solve_triangular(root, residual[..., None], upper=False)  # (B, k, 1)
        ctx.save_for_backward(root, white)
        # v_last = 1 / L_last,  z = v' r = (L^-1 r)_last
        return -0.5 * (white[:, -1, 0].square() + LOG_2PI) - root[:, -1, -1].log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        root, white = ctx.saved_tensors
        z = white[:, -1]  # (B, 1)
        # L^-T [(L^-1 r)_N, 0] = [K_N^-1 r_N, 0] and L^-T e_last, together
        right = torch.cat([white, torch.zeros_like(white)], 2)
        right[:, -1, 0], right[:, -1, 1] = 0.0, 1.0
        a, v = torch.linalg.solve_triangular(root.mT, right, upper=True).unbind(2)  # (B, k) each
        by_residual = -grad[:, None] * z * v
        if not ctx.needs_input_grad[1]:
            return by_residual, None
        # 1/2 [z (v a' + a v') + (z^2 - 1) v v'] = 1/2 (v b' + b v'),  b = z a + (z^2 - 1)/2 v
        half = 0.5 * grad[:, None] * (z * a + 0.5 * (z.square() - 1) * v)
        outer = half[:, :, None] * v[:, None, :]
        return by_residual, outer + outer.mT
