"""Modes that were found at values of other latents: a climb at further values starts at the nearest one's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["Nearby"]

MAX_KEPT = 2048  # nodes of the last climbs


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
        return mode[torch.cdist(at / unit, known / unit).argmin(1)]

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


def _side_by_side(held: dict[str, Tensor]) -> Tensor:
    """Values (S, ...) as numbers (S, H) between which distances are never infinite."""
    parts = [v.detach().reshape(len(v), -1) for v in held.values()]
    numbers = torch.cat(parts, 1).nan_to_num()
    return numbers.sign() * numbers.abs().log1p()
