"""One at a time, all or nothing: whatever runs a program waits for its turn, and what fails leaves all as it was.

A process has one stack of Pyro's handlers, one parameter store, one flag of validation, one default dtype and one
random generator of torch. So there is one lock, re-entrant, around every public call that runs a program: calls from
several threads wait for each other, and each answers as if it were alone. It is held around programs, never around
other code of the user's: a search takes it for each fit and each score, not while it waits for threads that need it.

A call that fails, also by Ctrl-C, leaves what a process has one of as it was, and the estimator that it fits. A forked
process has a lock of its own: if another thread was inside at that moment, it is not there to leave, and what it had
changed is put back at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, wraps
from inspect import isfunction, isgeneratorfunction, unwrap
from threading import RLock
from typing import Any, Concatenate, ParamSpec, Self, TypeVar
from weakref import WeakKeyDictionary, ref

import pyro
import torch
from pyro import distributions, infer, poutine
from pyro.poutine import runtime
from threadpoolctl import ThreadpoolController

__all__ = [
    "all_or_nothing",
    "left_as_found",
    "methods_take_turns",
    "one_thread",
    "restored_on_failure",
    "takes_turns",
    "turn",
]

MANY_CELLS = 2**21  # of a table whose algebra is worth several threads
AFTER_FORK = "autograd's threading in combination with fork"  # in torch's own message

P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E")
C = TypeVar("C", bound=type)


class _Process:
    """What a process has one of, as it is when this is made."""

    def __init__(self, *, store: bool) -> None:
        self.handlers = list(runtime._PYRO_STACK)
        self.plates = list(runtime._DIM_ALLOCATOR._stack)
        self.store = pyro.get_param_store().get_state() if store else None
        self.validation = (
            (distributions.enable_validation, distributions.is_validation_enabled()),
            (infer.enable_validation, infer.is_validation_enabled()),
            (poutine.enable_validation, poutine.is_validation_enabled()),
        )
        self.dtype = torch.get_default_dtype()
        self.random = torch.get_rng_state()
        self.n_threads = torch.get_num_threads()

    def put_back(self) -> None:
        """Make it so again."""
        runtime._PYRO_STACK[:] = self.handlers
        runtime._DIM_ALLOCATOR._stack[:] = self.plates
        if self.store is not None:
            pyro.get_param_store().clear()
            pyro.get_param_store().set_state(self.store)
        for enable, was in self.validation:
            enable(was)
        torch.set_default_dtype(self.dtype)
        torch.set_rng_state(self.random)
        if torch.get_num_threads() != self.n_threads:
            torch.set_num_threads(self.n_threads)


class left_as_found:
    """Put back what a process has one of where the block fails; inside `turn`, of which the outermost one counts.

    Parameters
    ----------
    store : bool
        Whether parameters in Pyro's store belong to it: of calls that have a store of their own, and do not fill the
        user's.
    estimator : object, optional
        It gets its old attributes back too, also where an outer block counts.
    """

    # A class, and looked up by a weak reference: Ctrl-C between the lines of a generator's frame, or at the first of
    # `__exit__`, would else leave a thread inside that has gone.
    def __init__(self, *, store: bool = False, estimator: Any = None) -> None:
        self._store, self._estimator = store, estimator
        self._alone: AbstractContextManager[None] | None = None
        self.found: _Process | None = None

    def __enter__(self) -> Self:
        self._before = {} if self._estimator is None else dict(vars(self._estimator))
        if _outermost() is None:
            self.found = _Process(store=self._store)
            _Now.outermost = ref(self)
            if _Now.forked:
                self._alone = one_thread()
                self._alone.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is not None and self._estimator is not None:
            _give_back(self._estimator, self._before)
        if self.found is None:
            return
        try:
            if self._alone is not None:
                self._alone.__exit__(None, None, None)
            if kind is not None:
                self.found.put_back()
        except KeyboardInterrupt:
            self.found.put_back()
            raise
        finally:
            _Now.outermost = None
        if _Now.forked and isinstance(error[0], RuntimeError) and AFTER_FORK in str(error[0]):
            raise RuntimeError(
                "this process was forked from one in which torch had begun to compute gradients beside another device "
                'than the CPU, by threads that are not here: start processes by "spawn" (multiprocessing), '
                "or by joblib's default backend, loky"
            ) from error[0]


class _Now:
    """Of this process; a forked one has its own."""

    lock = RLock()
    outermost: ref[left_as_found] | None = None
    """Of the thread that holds the lock."""
    forked = False


def turn() -> Any:
    """The lock: inside ``with turn()`` no other thread is. The lock itself, of which Ctrl-C cannot lose the release."""
    return _Now.lock


def _outermost() -> left_as_found | None:
    return None if _Now.outermost is None else _Now.outermost()


def takes_turns(function: Callable[P, R], *, store: bool = False) -> Callable[P, R]:
    """A function or method that waits for its turn, and leaves the process as it found it where it fails.

    Examples
    --------
    >>> takes_turns(abs)(-3)
    3
    """

    @wraps(function)
    def waiting(*args: P.args, **kwargs: P.kwargs) -> R:
        with turn():
            if _outermost() is not None:  # a call inside of another, which puts back for both
                return function(*args, **kwargs)
            with left_as_found(store=store):
                return function(*args, **kwargs)

    return waiting


def methods_take_turns(
    *, store: bool = False, but: tuple[str, ...] = (), inherited: tuple[str, ...] = ()
) -> Callable[[C], C]:
    """A class whose public methods take turns: those that it defines ``but`` some, and some that it has inherited.

    Generators and properties are left as they are.
    """

    def decorate(cls: C) -> C:
        own = [name for name in vars(cls) if not name.startswith("_") and name not in but]
        for name in (*own, *inherited):
            method = vars(cls).get(name) if name in own else getattr(cls, name)
            guarded: Any = method  # by scikit-learn's `available_if`
            if isfunction(getattr(method, "fn", None)):
                guarded.fn = takes_turns(guarded.fn, store=store)
            elif isfunction(method) and not isgeneratorfunction(unwrap(method)):
                setattr(cls, name, takes_turns(method, store=store))
        return cls

    return decorate


# ------------------------------------------------------------------------------------------------- of an estimator

_fitting: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # of each estimator a lock


def all_or_nothing(method: Callable[Concatenate[E, P], R]) -> Callable[Concatenate[E, P], R]:
    """A method that gives the estimator its old attributes back if it fails, also by Ctrl-C.

    For methods that set attributes and change none of the objects that these hold, and run code of the user's, so that
    they take no turn. Threads that call it of the same estimator do so one after the other.

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
        _give_back(estimator, before)
        raise


def _give_back(estimator: Any, before: dict[str, Any]) -> None:
    now = vars(estimator)
    now.update(before)  # first: it is never empty for another thread
    for name in now.keys() - before.keys():
        del now[name]


# ---------------------------------------------------------------------------------------- threads of the algebra


@cache
def _pools() -> ThreadpoolController:
    return ThreadpoolController()


@contextmanager
def one_thread(n_cells: int = 0) -> Iterator[None]:
    """One thread around small algebra, where handing work to threads costs more than the work; then as before.

    In a forked process around all of it: the threads of OpenMP's pool were not forked, and would be waited for without
    an end.
    """
    before = torch.get_num_threads()
    held = before == 1 and all(pool.num_threads == 1 for pool in _pools().lib_controllers)
    if n_cells > MANY_CELLS or held:
        yield
        return
    torch.set_num_threads(1)
    try:
        with _pools().limit(limits=1):
            yield
    finally:
        torch.set_num_threads(before)


def _after_fork() -> None:
    """In the child: still inside, if the thread that forked was; else nobody is."""
    _Now.forked = True
    _fitting.clear()  # the threads that hold these locks are not there
    if _Now.lock.acquire(blocking=False):
        _Now.lock.release()
        return
    left = _outermost()
    _Now.lock, _Now.outermost = RLock(), None
    if left is not None and left.found is not None:
        left.found.put_back()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
