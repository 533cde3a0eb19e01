"""All or nothing: an estimator whose fit fails is what it was before, and two fits of one do not mix."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import RLock
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

__all__ = ["all_or_nothing", "restored_on_failure"]

P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E")

_fitting: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # of each estimator a lock
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_fitting.clear)  # the threads that hold them are not there


def all_or_nothing(method: Callable[Concatenate[E, P], R]) -> Callable[Concatenate[E, P], R]:
    """A method that gives the estimator its old attributes back if it fails, also by Ctrl-C.

    For methods that set attributes and change none of the objects that these hold. Threads that call it of the same
    estimator do so one after the other.

    Examples
    --------
    >>> class Half:
    ...     @all_or_nothing
    ...     def fit(self):
    ...         self.width_ = 3
    ...         raise ValueError("too wide")
    >>> half = Half()
    >>> half.fit()
    Traceback (most recent call last):
    ValueError: too wide
    >>> vars(half)
    {}
    """

    @wraps(method)
    def guarded(self: E, *args: P.args, **kwargs: P.kwargs) -> R:
        with _fitting.setdefault(self, RLock()), restored_on_failure(self):
            return method(self, *args, **kwargs)

    return guarded


@contextmanager
def restored_on_failure(estimator: Any) -> Iterator[None]:
    """The same for what is inside ``with``."""
    before = dict(vars(estimator))
    try:
        yield
    except BaseException:
        now = vars(estimator)
        now.update(before)  # first: it is never empty for another thread
        for name in now.keys() - before.keys():
            del now[name]
        raise
