"""Whether a law that a program writes itself adds up to one along a cell: a density, and what is cut off from it.

A law q is given by its values at one row, at several draws of latents and parameters t. Along a cell y it is right if

    int q(y | t) dy = 1                            a density, or a sum over whole numbers
    int_a^b q(y | t) dy = 1                        of values that are recorded between a and b alone (truncated)
    int_a^b q(y | t) dy + q(a | t) + q(b | t) = 1  where many values are a or b exactly (censored there)
    q(y | t, hidden) = int_y^inf q(u | t, seen) du where another column says that y is a bound (censored at y),
    q(y | t, hidden) = int_b^inf q(u | t, seen) du or at one b: to the right, or to the left

The bounds a and b need not stand in the program. They are found from the integrals at one draw, and have to be the same
at all the others, at which the integral over all values is another.

Integrals are sums over double exponential nodes (Takahasi and Mori 1974), which take tails and edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["NEAR_ONE", "REACH", "Law", "Total", "adds_up", "domains", "is_censored"]

Array = NDArray[np.float64]

Law = Callable[[Array], "Array | None"]
"""log q of these values (G,) of a cell, -inf where they are impossible; None where the program does not take them."""

N_NODES = 4001
REACH = 4.2  # of the nodes: tails of exp(52) of the unit
NEAR_ONE = 1e-3
MOVED = 10 * NEAR_ONE  # by which totals of several draws have to differ where bounds are found from them
MIN_DRAWS = 3
FAR = 1000  # whole numbers beyond those of the data that a sum takes
N_ZOOMS = 6


class _Curve(NamedTuple):
    """A law along a cell, at one draw."""

    nodes: Array
    """(G,), rising."""
    edges: Array
    """(G + 1,) of the cells around them."""
    up_to: Array
    """(G + 1,) integral up to each edge."""

    @property
    def total(self) -> float:
        """Integral over all."""
        return float(self.up_to[-1])

    def below(self, y: float) -> float:
        """Integral up to y."""
        return float(np.interp(y, self.edges, self.up_to))

    def where(self, share: float) -> float:
        """The y up to which the integral is this."""
        return float(np.interp(share, self.up_to, self.edges))


class Total(NamedTuple):
    """What a law adds up to."""

    values: tuple[float, ...]
    """At each draw."""
    low: float = -math.inf
    high: float = math.inf
    """Bounds of the values that the program itself does not state."""

    @property
    def error(self) -> float:
        """The largest distance from one."""
        return max(abs(v - 1) for v in self.values)

    @property
    def is_one(self) -> bool:
        """Whether it is one at all draws."""
        return self.error < NEAR_ONE


def adds_up(laws: list[Law], values: Array, whole: bool) -> Total | None:
    """What laws add up to along a cell that has these values in the data; None where that cannot be computed.

    Parameters
    ----------
    laws : list of Law
        At several draws.
    values : (N,) ndarray
        Of the cell in all rows that show it.
    whole : bool
        They are whole numbers.

    Examples
    --------
    >>> normal = lambda m: lambda y: -0.5 * (y - m) ** 2 - 0.5 * math.log(2 * math.pi)
    >>> found = adds_up([normal(0.0), normal(0.5), normal(1.5)], np.array([0.3, 1.2, 4.0]), False)
    >>> found.is_one
    True
    """
    low, high = float(values.min()), float(values.max())
    best = None
    for domain in domains(low, high):
        for masses in _masses(values, whole):
            found = _total(laws, values, whole, domain, masses)
            if found is not None and (best is None or found.error < best.error):
                best = found
            if found is not None and found.is_one:
                return found
    for domain in domains(low, high):
        curves = [c for law in laws if (c := _curve(law, values, whole, domain)) is not None]
        bounds = None if len(curves) < MIN_DRAWS else _bounds(curves, low, high)
        if bounds is not None:
            return Total(tuple(c.below(bounds[1]) - c.below(bounds[0]) for c in curves), *bounds)
    return best


def is_censored(laws: dict[float, list[Law]], values: dict[float, Array], whole: bool) -> bool:
    """Whether one of several laws along a cell is a density, and the others what it gives to values that are cut off.

    Parameters
    ----------
    laws : dict of code to list of Law
        By the code that says in which way a row is cut off, each at the same draws.
    values : dict of code to (N,) ndarray
        Of the cell in the rows with each code.
    whole : bool
        They are whole numbers.

    Examples
    --------
    >>> def waited(rate):
    ...     return lambda t: np.where(t < 0, -math.inf, math.log(rate) - rate * t)
    >>> def still_waiting(rate):
    ...     return lambda t: np.where(t < 0, 0.0, -rate * t)
    >>> laws = {0.0: [waited(r) for r in (0.5, 1.0, 2.0)], 1.0: [still_waiting(r) for r in (0.5, 1.0, 2.0)]}
    >>> is_censored(laws, {0.0: np.array([0.2, 0.7]), 1.0: np.array([1.0])}, False)
    True
    """
    every = np.concatenate(list(values.values()))
    low, high = float(every.min()), float(every.max())
    for seen, seen_laws in laws.items():
        for domain in domains(low, high):
            curves = [_curve(law, every, whole, domain) for law in seen_laws]
            fine = [k for k, c in enumerate(curves) if c is not None and abs(c.total - 1) < NEAR_ONE]
            known = sum(c is not None for c in curves)
            if len(fine) < max(MIN_DRAWS, known):
                continue
            density = [c for c in curves if c is not None]
            ends = float(values[seen].min()), float(values[seen].max())
            if all(
                _is_cut_off(density, [some[k] for k in fine], *ends)
                for code, some in laws.items()
                if code != seen
            ):
                return True
    return False


def _is_cut_off(density: list[_Curve], hidden: list[Law], low: float, high: float) -> bool:
    """Whether laws of hidden values are the integrals of a density beyond them, or beyond one bound for all.

    That is no value between the least and the largest that is seen.
    """
    mass = [_at(law, c.nodes) for c, law in zip(density, hidden, strict=True)]
    if len(density) < MIN_DRAWS or any(m is None for m in mass):
        return False
    found = [m for m in mass if m is not None]
    if max(float(m.max()) for m in found) < MOVED:
        return False  # too small to tell
    if all(np.ptp(m) <= 1e-9 * m.max() for m in found):
        shares = [float(m[0]) for m in found]
        to_right = [(c, c.total - s) for c, s in zip(density, shares, strict=True)]
        to_left = list(zip(density, shares, strict=True))
        right, left = (_same_bound(some) for some in (to_right, to_left))
        unit = _size(np.array([low, high])) * 1e-6
        return (right is not None and right >= high - unit) or (left is not None and left <= low + unit)
    for share in (
        0.5,
        0.0,
        1.0,
    ):  # of the value itself that is below it: all or nothing where it is a whole number
        below = [c.up_to[:-1] + share * np.diff(c.up_to) for c in density]
        for side in (below, [c.total - up_to for c, up_to in zip(density, below, strict=True)]):
            if all(np.abs(a - m).max() < NEAR_ONE for a, m in zip(side, found, strict=True)):
                return True
    return False


def _same_bound(shares: list[tuple[_Curve, float]]) -> float | None:
    """The y up to which all curves integrate to their share; None where it moves."""
    bound = float(np.median([c.where(s) for c, s in shares]))
    if max(s for _, s in shares) - min(s for _, s in shares) < MOVED:
        return None  # nothing tells it from another bound
    return bound if all(abs(c.below(bound) - s) < NEAR_ONE for c, s in shares) else None


# ----------------------------------------------------------------------------------------------- where values are


def domains(low: float, high: float) -> Iterator[tuple[float, float]]:
    """Sets of values that a law may be written for: it may be any number elsewhere."""
    yield -math.inf, math.inf
    if low >= 0:
        yield 0.0, math.inf
    if low >= 0 and high <= 1:
        yield 0.0, 1.0


def _masses(values: Array, whole: bool) -> Iterator[tuple[float, ...]]:
    """Values that have a probability of their own: of continuous ones the least or largest, if several rows have it."""
    found, counts = np.unique(values, return_counts=True)
    ends = tuple(float(found[i]) for i in {0, len(found) - 1} if counts[i] > 1)
    if ends and not whole and len(found) > 1:
        yield ends
    yield ()


def _bounds(curves: list[_Curve], low: float, high: float) -> tuple[float, float] | None:
    """Bounds around the data between which all curves integrate to one; None where they move from draw to draw."""
    totals = [c.total for c in curves]
    if max(totals) - min(totals) < MOVED:
        return None
    tries = [
        (float(np.median([c.where(c.total - 1) for c in curves])), math.inf),
        (-math.inf, float(np.median([c.where(1.0) for c in curves]))),
        *_two_sided(curves, low),
    ]
    unit = _size(np.array([low, high])) * 1e-6
    for a, b in tries:
        whole = all(abs(c.below(b) - c.below(a) - 1) < NEAR_ONE for c in curves)
        if whole and a <= low + unit and b >= high - unit:
            return a, b
    return None


def _two_sided(curves: list[_Curve], low: float) -> Iterator[tuple[float, float]]:
    """Pairs of bounds between which the two curves that differ most integrate to one."""
    first, second = min(curves, key=lambda c: c.total), max(curves, key=lambda c: c.total)
    starts = first.edges[first.edges <= low]
    starts = starts[first.total - first.up_to[: len(starts)] >= 1]
    ends = np.interp(np.interp(starts, first.edges, first.up_to) + 1, first.up_to, first.edges)
    rest = np.interp(ends, second.edges, second.up_to) - np.interp(starts, second.edges, second.up_to) - 1
    for i in np.flatnonzero(np.diff(np.sign(rest))):
        share = rest[i] / (rest[i] - rest[i + 1])
        yield (
            float(starts[i] + share * (starts[i + 1] - starts[i])),
            float(ends[i] + share * (ends[i + 1] - ends[i])),
        )


# ------------------------------------------------------------------------------------------------------------ integrals


def _total(
    laws: list[Law], values: Array, whole: bool, domain: tuple[float, float], masses: tuple[float, ...]
) -> Total | None:
    """Of one domain, cut off at values that have a probability of their own."""
    low, high = float(values.min()), float(values.max())
    lower = low if low in masses else domain[0]
    upper = high if high in masses else domain[1]
    totals = []
    for law in laws:
        curve = _curve(law, values, whole, (lower, upper))
        alone = _at(law, np.array(masses)) if masses else np.zeros(0)
        if curve is not None and alone is not None:
            totals.append(curve.total + float(alone.sum()))
    return Total(tuple(totals)) if len(totals) >= min(MIN_DRAWS, len(laws)) else None


def _curve(law: Law, values: Array, whole: bool, domain: tuple[float, float]) -> _Curve | None:
    """A law along its cell, at nodes that are fine enough; None where there are none."""
    if whole:
        nodes = np.arange(max(values.min() - FAR, domain[0]), min(values.max() + FAR, domain[1]) + 1.0)
        q = _at(law, nodes)
        return None if q is None else _summed(nodes, np.append(nodes - 0.5, nodes[-1] + 0.5), q)
    centre, size = float(np.median(values)), _size(values)
    cut = False
    for _ in range(N_ZOOMS):
        nodes, edges, steps = _nodes(domain, centre, size)
        log_q = law(nodes)
        if log_q is None:
            return None
        if not cut:
            cut = True
            inner = _support(law, nodes, log_q, domain)
            if inner != domain:
                domain = inner
                continue
        with np.errstate(over="ignore"):
            share = _exp(log_q) * steps
        found = _summed(nodes, edges, share)
        half = 2 * float(share[::2].sum())
        fine = (
            found is not None and found.total > 0 and abs(found.total - half) < 0.1 * NEAR_ONE * found.total
        )
        if found is not None and fine and max(share[0], share[-1]) < 1e-6 * found.total:
            return found
        peak = int(log_q.argmax())  # between whose neighbours the mass stands
        if not 0 < peak < N_NODES - 1 or not math.isfinite(log_q[peak]):
            return None
        centre, size = float(nodes[peak]), float(nodes[peak + 1] - nodes[peak - 1])
    return None


def _at(law: Law, values: Array) -> Array | None:
    log_q = law(values)
    return None if log_q is None else _exp(log_q)


def _exp(log_q: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.exp(log_q)


def _summed(nodes: Array, edges: Array, share: Array) -> _Curve | None:
    if not np.isfinite(share).all():
        return None
    return _Curve(nodes, edges, np.append(0.0, share.cumsum()))


def _nodes(domain: tuple[float, float], centre: float, size: float) -> tuple[Array, Array, Array]:
    """Nodes, the edges between them, and dy / dv of each times its step."""
    low, high = domain
    ends = np.linspace(-REACH, REACH, N_NODES + 1)
    v = (ends[1:] + ends[:-1]) / 2

    def at(v: Array) -> Array:
        s = math.pi / 2 * np.sinh(v)
        if math.isfinite(low) and math.isfinite(high):
            return low + (high - low) / (1 + np.exp(-2 * s))
        if math.isfinite(low):
            return low + max(centre - low, size) * np.exp(s)
        if math.isfinite(high):
            return high - max(high - centre, size) * np.exp(-s)
        return centre + size * np.sinh(s)

    s, slope = math.pi / 2 * np.sinh(v), math.pi / 2 * np.cosh(v)
    if math.isfinite(low) and math.isfinite(high):
        slope = slope * (high - low) / (2 * np.cosh(s) ** 2)
    elif math.isfinite(low):
        slope = slope * max(centre - low, size) * np.exp(s)
    elif math.isfinite(high):
        slope = slope * max(high - centre, size) * np.exp(-s)
    else:
        slope = slope * size * np.cosh(s)
    return at(v), at(ends), slope * (ends[1] - ends[0])


def _support(law: Law, nodes: Array, log_q: Array, domain: tuple[float, float]) -> tuple[float, float]:
    """The domain, cut where the law becomes 0 all at once."""
    positive = np.flatnonzero(log_q > -math.inf)
    if not len(positive):
        return domain
    first, last = positive[0], positive[-1]
    low, high = domain
    if first > 0:
        low = _edge(law, nodes[first - 1], nodes[first], low)
    if last < len(nodes) - 1:
        high = _edge(law, nodes[last + 1], nodes[last], high)
    return low, high


def _edge(law: Law, outside: float, inside: float, otherwise: float) -> float:
    """Where the law becomes possible; ``otherwise`` where it fades out."""
    unit = abs(outside - inside)
    for _ in range(4):
        between = np.linspace(outside, inside, 1001)
        log_q = law(between)
        if log_q is None or not log_q[-1] > -math.inf or log_q[0] > -math.inf:
            return otherwise
        at = int((log_q > -math.inf).argmax())
        outside, inside = float(between[at - 1]), float(between[at])
    return 0.0 if abs(inside) < 1e-9 * unit else inside


def _size(values: Array) -> float:
    return float(values.std()) or max(1.0, abs(float(values.mean())))
