"""What a search keeps of its fit for what may be asked later: the rows, and how hidden ones were scored."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, NamedTuple, Self

import numpy as np

from bayes_mpt.runtime.digests import digest_of

__all__ = ["Kept"]


class Kept(NamedTuple):
    """The rows of a fit and what scored them; a copy, as the caller may change the table."""

    X: Any
    y: Any
    digest: str
    rule: Any
    """Of evidence"""
    seed: int
    """Of its partitions"""

    @classmethod
    def of(cls, X: Any, y: Any, rule: Any, seed: int) -> Self:
        """A memory map is not one to copy: whether it has changed is seen when it is read."""
        own_X, own_y = (rows if isinstance(rows, np.memmap) else deepcopy(rows) for rows in (X, y))
        return cls(own_X, own_y, digest_of((X, y)), rule, seed)

    def rows(self) -> tuple[Any, Any]:
        """X and y as they were.

        Raises
        ------
        RuntimeError
            If they are a memory map that has been written to.
        """
        if digest_of((self.X, self.y)) != self.digest:
            raise RuntimeError(
                "the rows have changed since fit, in place, and candidates are to be made on them as they were: "
                "call fit again"
            )
        return self.X, self.y
