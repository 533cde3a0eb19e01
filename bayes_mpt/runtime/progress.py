"""Where long work is: a line or a bar on stderr, a log, and scikit-learn's callbacks, also from other processes.

A search gives each of its tasks a `Task`. What runs inside of it, a training or the fits of folds, says what it does
by `tell` and `part` without knowing who hears: the search's bar, its log, its callbacks, or nobody.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from multiprocessing.connection import Client, Connection, Listener
from os import urandom
from typing import Any

from tqdm.auto import tqdm

__all__ = ["Bar", "Channel", "Line", "Task", "fitted_in_task", "log", "part", "tell"]

log = logging.getLogger("bayes_mpt")

Hear = Callable[[int, str], None]
"""Called with the number of a task and what it does; with nothing where it starts."""

OFTEN = 0.1  # seconds between two words of a task, at least
SELDOM = 1.0  # and between two lines in a file
IN_A_SEARCH = 10.0  # of one that has many tasks


# ------------------------------------------------------------------------------------------------------- on stderr


def _live() -> bool:
    """Whether what is written can be written over: a terminal or a notebook, no file."""
    return sys.stderr.isatty() or any("notebook" in kind.__module__ for kind in tqdm.__mro__)


class Line:
    """One line that changes in a terminal; in a file, a new line at times."""

    def __init__(self) -> None:
        self._live, self._width, self._told = sys.stderr.isatty(), 0, -SELDOM

    def show(self, text: str) -> None:
        """Say where it is."""
        now = time.monotonic()
        if self._live:
            self._write(f"\r{text:<{self._width}}")
            self._width = len(text)
        elif now - self._told >= SELDOM:
            self._told = now
            self._write(f"{text}\n")

    def end(self, text: str = "") -> None:
        """Say how it went."""
        if self._live and (text or self._width):
            self._write(f"\r{text:<{self._width}}\n" if text else "\n")
        elif text:
            self._write(f"{text}\n")
        self._width = 0

    @staticmethod
    def _write(text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)


class Bar:
    """How many of some tasks are done, and what the others do: a bar in a terminal, lines in a file."""

    def __init__(self, label: str, total: int, *, shown: bool):
        self._label, self._total, self._done, self._told = label, total, 0, time.monotonic()
        self._shown = shown
        self._bar = tqdm(total=total, desc=label) if shown and _live() else None

    def moved(self, text: str) -> None:
        """A task is somewhere."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        elif self._shown and time.monotonic() - self._told >= IN_A_SEARCH:
            self._line(text)

    def done(self, text: str) -> None:
        """A task is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
        elif self._shown:
            self._line(text)

    def close(self) -> None:
        """No more will be said."""
        if self._bar is not None:
            self._bar.close()

    def _line(self, text: str) -> None:
        self._told = time.monotonic()
        Line._write(f"{self._label} {self._done}/{self._total}: {text}\n")


# ---------------------------------------------------------------------------------------------- from other processes


class Channel:
    """Carries words of tasks to ``hear``, in this process or from another one to which it is pickled."""

    def __init__(self, hear: Hear):
        self._hear, self._lock = hear, threading.Lock()
        self._listener: Listener | None = None
        self._key = urandom(32)

    def __call__(self, index: int, text: str) -> None:
        with self._lock:
            self._hear(index, text)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._listener is None:
            self._listener = Listener(authkey=self._key, backlog=128)
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()
        return _Sender, (self._listener.address, self._key)

    def close(self) -> None:
        """Hear no more."""
        if self._listener is not None:
            self._listener.close()

    def _accept(self, listener: Listener) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._receive, args=(listener.accept(),), daemon=True).start()

    def _receive(self, connection: Connection) -> None:
        with suppress(OSError, EOFError):
            while True:
                self(*connection.recv())
                connection.send(None)  # so that words come in the order of what happens


class _Sender:
    """The end of a `Channel` in another process."""

    _connections: dict[Any, Connection] = {}  # noqa: RUF012  # one to a listener, for all tasks here

    def __init__(self, address: Any, key: bytes):
        self._address, self._key = address, key

    def __call__(self, index: int, text: str) -> None:
        with suppress(OSError, EOFError):  # nobody hears any more
            if self._address not in self._connections:
                self._connections[self._address] = Client(self._address, authkey=self._key)
            self._connections[self._address].send((index, text))
            self._connections[self._address].recv()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Sender, (self._address, self._key)


# ------------------------------------------------------------------------------------------------------------ tasks


class Task:
    """One of many: its number, who hears of it, and its place in scikit-learn's tree of tasks."""

    def __init__(self, index: int, hear: Hear | None, context: Any = None, caller: Any = None):
        self.index, self.context, self.caller = index, context, caller
        self._hear = hear
        self._parts, self._told, self._begun = 0, 0.0, False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside ``with``, what is done is this task."""
        before = getattr(_here, "task", None)
        _here.task = self
        self.say("")
        if self.context is not None and self.context.max_subtasks != 0:
            self._begin()
        try:
            yield
        finally:
            _here.task = before
        if self.context is not None:
            if not self._begun:  # nothing was fitted
                self._begin()
            self.context.call_on_fit_task_end(estimator=self.caller)

    def _begin(self, X: Any = None, y: Any = None) -> None:
        self._begun = True
        self.context.call_on_fit_task_begin(estimator=self.caller, X=X, y=y)

    def say(self, text: str) -> None:
        """To whom hears."""
        if self._hear is not None:
            self._told = time.monotonic()
            self._hear(self.index, text)

    def moved(self, step: int, most: int) -> None:
        """An iteration; not each is reported."""
        if self._hear is not None and time.monotonic() - self._told >= OFTEN:
            part = f"fit {self._parts}, " if self._parts else ""
            self.say(f"{part}iteration {step} of at most {most}")

    @contextmanager
    def part(self, estimator: Any, X: Any, y: Any) -> Iterator[None]:
        """A fit of many in the task."""
        self._parts += 1
        if self.context is None:
            yield
            return
        context = self.context.subcontext(task_name="fold")
        with context.propagate_callback_context(estimator):
            context.call_on_fit_task_begin(estimator=self.caller, X=X, y=y)
            yield
        context.call_on_fit_task_end(estimator=self.caller, X=X, y=y)

    @contextmanager
    def whole(self, estimator: Any, X: Any, y: Any) -> Iterator[None]:
        """The one fit that the task is."""
        if self.context is None:
            yield
            return
        with self.context.propagate_callback_context(estimator):
            self._begin(X, y)
            yield


_here = threading.local()


def _task() -> Task | None:
    return getattr(_here, "task", None)


def tell(step: int, most: int) -> None:
    """Tell the task that is running here, if any, of an iteration."""
    task = _task()
    if task is not None:
        task.moved(step, most)


def part(estimator: Any, X: Any, y: Any) -> AbstractContextManager[None]:
    """Around a fit that is one of many in the task that is running here."""
    task = _task()
    return nullcontext() if task is None else task.part(estimator, X, y)


def fitted_in_task(estimator: Any, X: Any, y: Any) -> AbstractContextManager[None]:
    """Around the fit that is the task that is running here."""
    task = _task()
    return nullcontext() if task is None else task.whole(estimator, X, y)
