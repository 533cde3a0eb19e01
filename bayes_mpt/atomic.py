"""All or nothing: an estimator whose fit fails is what it was before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

__all__ = ["all_or_nothing", "restored_on_failure"]

P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E")


def all_or_nothing(method: Callable[Concatenate[E, P], R]) -> Callable[Concatenate[E, P], R]:
    """A method that gives the estimator its old attributes back if it fails, also by Ctrl-C.

    For methods that set attributes and change none of the objects that these hold.

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
        with restored_on_failure(self):
            return method(self, *args, **kwargs)

    return guarded


@contextmanager
def restored_on_failure(estimator: Any) -> Iterator[None]:
    """The same for what is inside ``with``."""
    before = dict(vars(estimator))
    try:
        yield
    except BaseException:
        vars(estimator).clear()
        vars(estimator).update(before)
        raise
