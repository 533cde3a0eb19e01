"""What has been found of a table, for as long as nobody changes it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

__all__ = ["once", "unchanged"]

Found = TypeVar("Found")

_HELD: ContextVar[tuple[Any, dict[Hashable, Any]] | None] = ContextVar("held", default=None)


@contextmanager
def unchanged(table: Any) -> Iterator[None]:
    """Inside ``with``, in this thread, a table stays as it is: what `once` finds of it is not looked for again.

    A search fits one table many times. Other threads and processes look for themselves.
    """
    token = _HELD.set((table, {}))
    try:
        yield
    finally:
        _HELD.reset(token)


def once(table: Any, what: Hashable, find: Callable[[], Found]) -> Found:
    """What ``find`` returns, which depends on the table and on ``what`` alone, and which nobody changes.

    Examples
    --------
    >>> with unchanged(table := [1, 2]):
    ...     first = once(table, "sum", lambda: sum(table))
    ...     second = once(table, "sum", lambda: 1 / 0)
    >>> first, second
    (3, 3)
    """
    held = _HELD.get()
    if held is None or held[0] is not table:
        return find()
    found = held[1]
    if what not in found:
        found[what] = find()
    return found[what]
