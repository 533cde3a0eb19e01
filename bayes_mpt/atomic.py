"""All or nothing: an estimator whose fit fails is what it was before."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

__all__ = ["all_or_nothing"]

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
        before: dict[str, Any] = dict(vars(self))
        try:
            return method(self, *args, **kwargs)
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            raise

    return guarded
