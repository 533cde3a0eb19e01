"""Sub-sampling plates that take all their rows: what a program says of a data set, and not of some of its rows."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyro.poutine.subsample_messenger import SubsampleMessenger

__all__ = ["whole_plates"]


@contextmanager
def whole_plates() -> Iterator[None]:
    """Let plates that this thread makes take all rows, where they would draw some.

    Pyro offers no handler for it: a plate refuses rows of another number than its ``subsample_size``.

    Examples
    --------
    >>> import pyro
    >>> with whole_plates(), pyro.plate("rows", 5, subsample_size=2) as rows:
    ...     print(rows)
    tensor([0, 1, 2, 3, 4])
    """
    drawn, here = SubsampleMessenger._subsample, threading.get_ident()

    def whole(
        name: str,
        size: Any = None,
        subsample_size: Any = None,
        subsample: Any = None,
        *others: Any,
        **named: Any,
    ) -> Any:
        ours = threading.get_ident() == here and size is not None and subsample is None
        return drawn(name, size, None if ours else subsample_size, subsample, *others, **named)

    SubsampleMessenger._subsample = staticmethod(whole)
    try:
        yield
    finally:
        SubsampleMessenger._subsample = staticmethod(drawn)
