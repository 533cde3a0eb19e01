"""Ctrl-C: where a press may be raised, who is to hear of it, and what is not to be finished for its sake.

A press raises KeyboardInterrupt wherever the program happens to be, also half-way into or out of a context: a handler
would stay on Pyro's stack, a parameter store would be half emptied. Inside `interruptible` such a press waits until
that is over. One that is lost on the way (Python prints and drops errors of some callbacks) is raised by the next
`check`, at the latest at the end.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

__all__ = ["Stop", "check", "check_stop", "discarded", "interruptible", "to_be_discarded"]

SWITCHING = {"__enter__", "__exit__", "__del__"}
AGAIN, LONGEST = 0.005, 1.0  # seconds until a press comes again, and for which one may be put off


class interruptible:
    """Inside ``with``, Ctrl-C leaves at once, but never half-way into or out of a context."""

    active: interruptible | None = None

    def __enter__(self) -> Self:
        self.pressed = False
        self._put_off_since: float | None = None
        self._handler: Any = None
        self._outermost = sys._getframe(1)
        if threading.current_thread() is threading.main_thread() and interruptible.active is None:
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):  # else presses are ignored, or end the process
                self._handler = handler
                signal.signal(signal.SIGINT, self._press)
                interruptible.active = self
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._handler is None:
            return
        interruptible.active = None
        signal.signal(signal.SIGINT, self._handler)
        if self.pressed and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error

    def _press(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        since = now if self._put_off_since is None else self._put_off_since
        if now - since < LONGEST and self._switching(frame):
            self._put_off_since = since
            again = threading.Timer(AGAIN, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        self._put_off_since = None
        try:
            self._handler(number, frame)
        except KeyboardInterrupt:
            self.pressed = True
            raise

    def _switching(self, frame: FrameType | None) -> bool:
        while frame is not None and frame is not self._outermost:
            if frame.f_code.co_name in SWITCHING:
                return True
            frame = frame.f_back
        return False


# ------------------------------------------------------------------------------------------------------- who hears


class Stop:
    """Tells tasks of this process that it is over: threads, to which no signal comes.

    Other processes get a copy that says nothing; these are ended from outside.
    """

    def __init__(self) -> None:
        self._pressed = threading.Event()
        self._running = 0
        self._changed = threading.Condition()

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Inside ``with`` this thread's `check` looks here."""
        before = getattr(_here, "stop", None)
        with self._changed:
            self._running += 1
        _here.stop = self
        try:
            check_stop()
            yield
        finally:
            _here.stop = before
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def press(self, seconds: float) -> None:
        """Tell them, and wait for so long at most until none runs."""
        self._pressed.set()
        with self._changed:
            self._changed.wait_for(lambda: not self._running, seconds)

    def __reduce__(self) -> tuple[Any, ...]:
        return Stop, ()


_here = threading.local()


def check_stop() -> None:
    """Raise KeyboardInterrupt where the `Stop` that is heard here says so."""
    stop: Stop | None = getattr(_here, "stop", None)
    if stop is not None and stop._pressed.is_set():
        raise KeyboardInterrupt


def check() -> None:
    """The same, and where a press in this thread has been lost on its way up; while something is trained."""
    check_stop()
    guard = interruptible.active
    if guard is not None and guard.pressed and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------- what is not finished


@contextmanager
def discarded() -> Iterator[None]:
    """Inside ``with``, fits of which nobody will see a part: an interrupted one is not completed."""
    before = to_be_discarded()
    _here.discarded = True
    try:
        yield
    finally:
        _here.discarded = before


def to_be_discarded() -> bool:
    """Whether this is inside of `discarded`."""
    return bool(getattr(_here, "discarded", False))
