"""Do tasks side by side, hand out each result as it comes, and leave nothing running when that ends early."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from joblib import Parallel, delayed, effective_n_jobs
from joblib.parallel import get_active_backend

from bayes_mpt.runtime.interrupts import Stop, discarded
from bayes_mpt.runtime.progress import Task

__all__ = ["side_by_side"]

TO_STOP = 4.0  # seconds that threads have to hear of it


def side_by_side(
    calls: list[tuple[Task, tuple[Callable[..., Any], tuple[Any, ...]]]],
    n_jobs: int | None,
    done: Callable[[int, Any], None],
) -> None:
    """Make some calls by joblib, ``n_jobs`` at a time.

    Parameters
    ----------
    calls : list of (task, (function, arguments))
        Each is made inside of its task.
    n_jobs : int, optional
        As in joblib.
    done : callable
        Gets the place of a call and its result, as soon as there is one.

    Raises
    ------
    BaseException
        Of a call, or by Ctrl-C: the first. Processes that were started are killed then, threads are told to stop.
    """
    stop = Stop()
    jobs = [delayed(_call)(i, stop, task, *call) for i, (task, call) in enumerate(calls)]
    backend, _ = get_active_backend()
    try:
        if effective_n_jobs(n_jobs) == 1:
            _hand_out((call(*args, **named) for call, args, named in jobs), done)
        elif backend.supports_return_generator:
            results = Parallel(n_jobs=n_jobs, batch_size=1, return_as="generator_unordered")(jobs)
            _hand_out(results, done)
        else:  # in rounds, or there would be none before all are done
            step = effective_n_jobs(n_jobs)
            with Parallel(n_jobs=n_jobs, batch_size=1) as parallel:
                for first in range(0, len(jobs), step):
                    _hand_out(iter(parallel(jobs[first : first + step])), done)
    except BaseException:
        stop.press(TO_STOP)
        raise


def _hand_out(results: Iterator[tuple[int, Any]], done: Callable[[int, Any], None]) -> None:
    try:
        for i, result in results:
            done(i, result)
    except BaseException:
        with warnings.catch_warnings(), suppress(AttributeError):  # a list's iterator holds nothing that runs
            warnings.simplefilter("ignore")  # that not all was used
            results.close()  # type: ignore[attr-defined]
        raise


def _call(
    index: int, stop: Stop, task: Task, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> tuple[int, Any]:
    with stop.heard(), discarded(), task.running():
        return index, function(*arguments)
