"""Whether a law that a program writes itself adds up to one over two cells: a joint density, or that of an interval.

A law q of the cells a and b is given by its values at one row, at several draws of latents and parameters t. It is
right if

    int int q(a, b | t) da db = 1                              a density, or sums over whole numbers, or one of each
    q(a, b | t) + q(b, c | t) = q(a, c | t), q(-inf, inf | t) = 1   the probability of a value between a and b
    q(a, a | t) = d/db q(a, b | t) at b = a                    where some values are known: their density

Double integrals are sums over products of double exponential nodes, in coordinates in which the mass stands around zero
with spread one and no correlation, found in a few steps. Values that are positive, or between 0 and 1, are taken by
their logarithm or logit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
from numpy.typing import NDArray

from bayes_mpt.program.factor_sums import NEAR_ONE, REACH, Total, domains

__all__ = ["PairLaw", "is_interval", "pair_total"]

Array = NDArray[np.float64]

PairLaw = Callable[[Array, Array], "Array | None"]
"""log q of these values (G,) of two cells, -inf where impossible; None where the program does not take them."""

N_NODES = 129  # along each axis
N_ALONE = 513  # along the only axis of real numbers, whose mass moves with the whole number of the other
N_ZOOMS = 8
FAR = 60  # whole numbers beyond those of the data that a sum takes
MAX_CELLS = 2**17  # pairs of values in one run
NARROW = 0.999  # the largest correlation that one step takes out
N_ENDS = 801  # ends of intervals that stand side by side
N_INTERVALS = 2000  # between ends that are drawn


def pair_total(laws: list[PairLaw], values: tuple[Array, Array], whole: tuple[bool, bool]) -> Total | None:
    """What laws add up to over two cells; None where that cannot be computed.

    Where it is one at all draws for values that are positive, or between 0 and 1, as those of the data are, these are
    taken; else it is over all values.

    Parameters
    ----------
    laws : list of PairLaw
        At several draws.
    values : tuple of (N,) ndarray
        Of each cell in all rows.
    whole : tuple of bool
        Whether they are whole numbers.

    Examples
    --------
    >>> def normal(rho):
    ...     root = math.sqrt(1 - rho**2)
    ...     return lambda a, b: (
    ...         -0.5 * (a**2 - 2 * rho * a * b + b**2) / root**2 - math.log(2 * math.pi * root)
    ...     )
    >>> data = np.array([0.3, -1.2, 0.5]), np.array([0.1, -0.7, 1.1])
    >>> pair_total([normal(0.0), normal(0.9)], data, (False, False)).is_one
    True
    """
    over_all = None
    for where in product(*(list(domains(float(v.min()), float(v.max()))) for v in values)):
        axes = [_Axis(v, w, d) for v, w, d in zip(values, whole, where, strict=True)]
        found = [_plane(law, axes) for law in laws]
        sums = [f for f in found if f is not None]
        if len(sums) < len(laws):
            continue
        total = Total(tuple(sums))
        if total.is_one:
            return total
        over_all = total if over_all is None else over_all
    return over_all


def is_interval(laws: list[PairLaw], low: Array, high: Array) -> bool:
    """Whether laws are the probabilities of a value between two cells.

    Parameters
    ----------
    laws : list of PairLaw
        At several draws.
    low, high : (N,) ndarray
        The cells in all rows; where they are equal the law is a density.

    Examples
    --------
    >>> def waited(rate):
    ...     return lambda a, b: np.log(np.exp(-rate * a) - np.exp(-rate * b))
    >>> ends = np.array([0.0, 1.0, 2.0]), np.array([0.5, 1.5, 4.0])
    >>> is_interval([waited(r) for r in (0.5, 1.0, 2.0)], *ends)
    True
    """
    if not bool((low <= high).all()):
        return False
    known = bool((low == high).any())
    ends = np.concatenate([low, high])
    return any(
        all(_adds_up_along(law, _Axis(ends, False, where), known) for law in laws)
        for where in domains(float(ends.min()), float(ends.max()))
    )


def _adds_up_along(law: PairLaw, axis: _Axis, known: bool) -> bool:
    """Whether intervals between nodes add up to one, and any other interval is the sum of those in it."""
    t = axis.nodes(N_ENDS)[0]
    y = axis.value(axis.centre + axis.size * t)
    y = y[np.append(True, np.diff(y) > 0)]
    with np.errstate(all="ignore"):
        side_by_side, whole = law(y[:-1], y[1:]), law(y[:1], y[-1:])
        if side_by_side is None or whole is None:
            return False
        up_to = np.append(0.0, np.exp(side_by_side).cumsum())
        draw = np.random.default_rng(0)
        i, j = np.sort(draw.integers(len(y), size=(2, N_INTERVALS)), axis=0)
        i, j = i[i < j], j[i < j]
        others = law(y[i], y[j])
        if others is None or not np.isfinite(up_to).all():
            return False
        fine = (
            abs(float(np.exp(whole[0])) - 1) < NEAR_ONE
            and abs(up_to[-1] - 1) < NEAR_ONE
            and bool((np.abs(np.exp(others) - (up_to[j] - up_to[i])) < NEAR_ONE).all())
        )
        if not (fine and known):
            return fine
        middle = (y[1:] + y[:-1]) / 2
        at = law(middle, middle)
        if at is None:
            return False
        # each interval is its density times its width, where these are narrow
        rest = np.abs(np.exp(at) * np.diff(y) - np.diff(up_to)).sum()
    return bool(rest < 10 * NEAR_ONE)


class _Axis:
    """The values of a cell, in a coordinate z that takes all real numbers."""

    def __init__(self, values: Array, whole: bool, domain: tuple[float, float]):
        self.whole, self.domain = whole, domain
        self.least, self.most = float(values.min()), float(values.max())
        z = self._coordinate(values)
        self.centre, self.size = (
            (0.0, 1.0) if whole else (float(np.median(z)), float(z.std()) or max(1.0, abs(float(z.mean()))))
        )

    def nodes(self, n: int) -> tuple[Array, Array]:
        """Nodes t of z = centre + size t, and what each counts in a sum."""
        if self.whole:
            found = np.arange(
                max(self.least - FAR, self.domain[0]), min(self.most + FAR, self.domain[1]) + 1.0
            )
            return found, np.ones(len(found))
        v = np.linspace(-REACH, REACH, n)
        if math.isfinite(self.domain[0]):  # of logarithms and logits, along which tails fall exponentially
            return np.sinh(v), np.cosh(v) * (v[1] - v[0])
        s, slope = math.pi / 2 * np.sinh(v), math.pi / 2 * np.cosh(v)
        return np.sinh(s), np.cosh(s) * slope * (v[1] - v[0])

    @property
    def open_ends(self) -> tuple[bool, bool]:
        """Whether the first and the last node may cut off something."""
        low, high = self.domain
        if not self.whole:
            return True, True
        return self.least - FAR >= low, self.most + FAR <= high

    def _coordinate(self, values: Array) -> Array:
        low, high = self.domain
        if self.whole or not math.isfinite(low):
            return values
        unit = (float(values[values > low].min()) - low if bool((values > low).any()) else 1.0) / 2
        inside = np.clip(values, low + unit, high)
        if not math.isfinite(high):
            return np.log(inside - low)
        inside = np.clip((values - low) / (high - low), 1e-3, 1 - 1e-3)
        return np.log(inside / (1 - inside))

    def value(self, z: Array) -> Array:
        """The values at these coordinates."""
        low, high = self.domain
        if self.whole or not math.isfinite(low):
            return z
        with np.errstate(over="ignore"):
            if not math.isfinite(high):
                return low + np.exp(np.clip(z, -700, 700))
            return low + (high - low) * np.clip(1 / (1 + np.exp(-z)), 1e-300, 1 - 1e-16)

    def log_slope(self, z: Array) -> Array:
        """log dy / dz."""
        low, high = self.domain
        if self.whole or not math.isfinite(low):
            return np.zeros_like(z)
        if not math.isfinite(high):
            return z
        return math.log(high - low) - np.logaddexp(0, z) - np.logaddexp(0, -z)


def _plane(law: PairLaw, axes: list[_Axis]) -> float | None:
    """The sum or integral of a law over two axes; None where it cannot be computed."""
    n_continuous = sum(not a.whole for a in axes)
    n_nodes = N_NODES if n_continuous == 2 else N_ALONE
    (t, u), (count_t, count_u) = zip(*(axis.nodes(n_nodes) for axis in axes), strict=True)
    if len(t) * len(u) > MAX_CELLS:
        return None
    grid = np.stack([a.ravel() for a in np.meshgrid(t, u, indexing="ij")])  # (2, G)
    centre, root = np.array([a.centre for a in axes]), np.diag([a.size for a in axes])
    counts = np.outer(count_t, count_u)
    every_other = tuple(slice(None, None, None if a.whole else 2) for a in axes)
    for _ in range(N_ZOOMS):
        z = centre[:, None] + root @ grid
        log_q = law(*(axis.value(line) for axis, line in zip(axes, z, strict=True)))
        if log_q is None:
            return None
        slopes = sum(axis.log_slope(line) for axis, line in zip(axes, z, strict=True))
        peak = float((log_q + slopes).max())
        if not math.isfinite(peak):
            return None
        # in units of the highest value, which may be as far as to be zero
        share = np.exp(log_q + slopes - peak).reshape(counts.shape) * counts
        total = float(share.sum())
        half = 2**n_continuous * float(share[every_other].sum())
        if abs(total - half) < 0.1 * NEAR_ONE * total and max(_at_ends(share, axes)) < 1e-6 * total:
            return float(total * np.linalg.det(root) * np.exp(min(peak, 700.0)))
        if not n_continuous:
            return None
        centre, root = _zoomed(centre, root, share, (t, u), axes)
    return None


def _at_ends(share: Array, axes: list[_Axis]) -> Iterator[float]:
    for axis, by_node in zip(axes, (share.sum(1), share.sum(0)), strict=True):
        yield from (float(by_node[k]) for k, is_open in zip((0, -1), axis.open_ends, strict=True) if is_open)
    yield 0.0


def _zoomed(
    centre: Array, root: Array, share: Array, nodes: tuple[Array, Array], axes: list[_Axis]
) -> tuple[Array, Array]:
    """Coordinates in which this mass stands around zero, with spread one and no correlation."""
    middle, width, clipped = np.zeros(2), np.ones(2), []
    for k, (axis, t, by_node) in enumerate(zip(axes, nodes, (share.sum(1), share.sum(0)), strict=True)):
        if not axis.whole:
            up_to = (by_node.cumsum() - by_node / 2) / by_node.sum()
            low, middle[k], high = np.interp([0.25, 0.5, 0.75], up_to, t)
            at = min(int(np.searchsorted(t, middle[k])), len(t) - 2)
            width[k] = max((high - low) / 1.35, float(t[at + 1] - t[at]) / 8)
        clipped.append(np.clip((t - middle[k]) / width[k], -3, 3))
    rho = 0.0
    if not any(axis.whole for axis in axes):
        a, b = clipped
        size = (share.sum(1) @ a**2) * (share.sum(0) @ b**2)
        rho = float(np.clip(a @ share @ b / math.sqrt(size), -NARROW, NARROW)) if size > 0 else 0.0
    turned = np.diag(width) @ np.array([[1.0, 0.0], [rho, math.sqrt(1 - rho**2)]])
    return centre + root @ middle, root @ turned
