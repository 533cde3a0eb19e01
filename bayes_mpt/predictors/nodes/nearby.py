"""Modes that were found at values of other latents: where a climb at further values starts.

At the mode of the nearest values, and as much farther as modes have moved with values so far: to first order

    mode(v) = mode(v_near) + A (v - v_near),    A of least squares over the known ones
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["Nearby"]

MAX_KEPT = 2048  # nodes of the last climbs
MAX_FITTED = 256  # of them, from which it is seen how modes move
ENOUGH = 3  # times as many of them as values, from which that is looked at
FOLLOWS = 0.5  # share of a mode's variance that may be left of one that follows


class Nearby:
    """Where the last climbs have ended.

    Examples
    --------
    >>> nearby = Nearby()
    >>> nearby.keep({"scale": torch.tensor([1.0, 2.0])}, torch.tensor([[[0.5]], [[0.7]]]))
    >>> nearby.start({"scale": torch.tensor([1.9])}, (1, 1))
    tensor([[[0.7000]]])
    """

    def __init__(self) -> None:
        self._kept: tuple[Tensor, Tensor] | None = None

    def start(self, held: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor | None:
        """The modes (S, N, d) at the nearest values to S given ones; None where none of this shape (N, d) is known."""
        at = _side_by_side(held)
        if self._kept is None or self._kept[1].shape[1:] != shape or self._kept[0].shape[1] != at.shape[1]:
            return None
        known, mode = self._kept
        unit = known.std(0, correction=0)
        unit = torch.where(unit > 0, unit, 1.0)
        at, known = at / unit, known / unit
        near = torch.cdist(at, known).argmin(1)
        flat = mode.flatten(1)
        step = (at - known[near]) @ _slope(known, flat)
        ends, low, high = flat[near] + step, flat.amin(0), flat.amax(0)
        room = high - low  # values far from all known ones tell little
        return torch.minimum(torch.maximum(ends, low - room), high + room).reshape(len(at), *shape)

    def keep(self, held: dict[str, Tensor], mode: Tensor) -> None:
        """Modes (S, N, d) that were found at S values (S, ...) of the other latents."""
        at, good = _side_by_side(held), mode.isfinite().all(-1).all(-1)
        at, mode = at[good], mode[good]
        known = self._kept
        if known is not None and known[0].shape[1] == at.shape[1] and known[1].shape[1:] == mode.shape[1:]:
            at, mode = torch.cat([at, known[0]]), torch.cat([mode, known[1]])
        if len(mode):
            self._kept = at[:MAX_KEPT], mode[:MAX_KEPT]

    @contextmanager
    def unmoved(self) -> Iterator[None]:
        """Keep nothing of what is found meanwhile: at far-out values, which are no neighbours of those to come."""
        kept = self._kept
        try:
            yield
        finally:
            self._kept = kept

    def forget(self) -> None:
        """Start without them."""
        self._kept = None


def _slope(known: Tensor, mode: Tensor) -> Tensor:
    """How modes (S, M) move with values (S, H): (H, M), 0 of those that do not follow a plane."""
    some = slice(None, None, -(-len(known) // MAX_FITTED))
    at, there = known[some] - known[some].mean(0), mode[some] - mode[some].mean(0)
    if len(at) < ENOUGH * (at.shape[1] + 1):
        return at.new_zeros(at.shape[1], there.shape[1])
    slope = torch.linalg.pinv(at, rtol=1e-6) @ there
    follows = (there - at @ slope).square().sum(0) < FOLLOWS * there.square().sum(0)
    return torch.where(follows, slope, 0.0)


def _side_by_side(held: dict[str, Tensor]) -> Tensor:
    """Values (S, ...) as numbers (S, H) between which distances are never infinite."""
    parts = [v.detach().reshape(len(v), -1) for v in held.values()]
    numbers = torch.cat(parts, 1).nan_to_num()
    return numbers.sign() * numbers.abs().log1p()
