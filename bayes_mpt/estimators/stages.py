"""One of the two stages of a search, fits or evidence: its candidates side by side, and what is said of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from bayes_mpt.estimators.candidates import Candidate, final_step
from bayes_mpt.estimators.partial import Finished
from bayes_mpt.runtime.progress import Bar, Channel, Task, log
from bayes_mpt.runtime.tasks import side_by_side

__all__ = ["Stage"]

FITS = "fit"


class Stage:
    """What a search does to all of its candidates.

    Parameters
    ----------
    search : MarginalLikelihoodSearch
        Whose settings and callbacks are used.
    label : str
        "fit", or the rule of evidence.
    finished : Finished
        Gets each candidate as soon as it is whole.
    root : CallbackContext
        Of the search.
    n_fits : int or None
        Further fits of a candidate; None where it is not known.
    """

    def __init__(self, search: Any, label: str, finished: Finished, root: Any, n_fits: int | None = 0):
        self._search, self._label, self._finished, self._root = search, label, finished, root
        self._n_fits = n_fits

    def run(self, calls: list[tuple[Callable[..., Candidate], tuple[Any, ...]]]) -> list[Candidate]:
        """The results of a function and its arguments for each candidate."""
        search, label, names, whole = self._search, self._label, self._finished.names, self._finished.found
        bar = Bar(label, len(calls), shown=bool(search.verbose))
        found: list[Candidate] = [Candidate()] * len(calls)

        def failed(i: int) -> bool:
            return i in whole and bool(whole[i].error)

        def hear(i: int, text: str) -> None:
            if text:
                bar.moved(f"{names[i]}: {text}")
            elif not failed(i):
                log.info("candidate %r: %s begins", names[i], label)

        def done(i: int, candidate: Candidate) -> None:
            said, known = _said(candidate, label), failed(i)
            found[i] = whole[i] = candidate
            bar.done(f"{names[i]}: {said}")
            if not known:  # of the stage before
                log.info("candidate %r: %s", names[i], said)

        channel = Channel(hear) if search.verbose or log.isEnabledFor(logging.INFO) else None
        stage = self._context(len(calls))
        # all ahead: a context that is sent to another process must not change meanwhile
        tasks = [Task(i, channel, *self._place(stage, i)) for i in range(len(calls))]
        try:
            side_by_side(list(zip(tasks, calls, strict=True)), search.n_jobs, done)
        finally:
            bar.close()
            if channel is not None:
                channel.close()
        if stage is not None:
            stage.call_on_fit_task_end(estimator=search)
        return found

    def _context(self, total: int) -> Any:
        """Its place in scikit-learn's tree of tasks; None where no callback looks at it."""
        estimators = (self._search, self._search.estimator, final_step(self._search.estimator))
        if not any(hasattr(e, "_skl_callbacks") for e in estimators):
            return None
        return self._root.subcontext(
            task_name="fits" if self._label == FITS else f"evidence {self._label}",
            max_subtasks=total,
            sequential_subtasks=False,
        ).call_on_fit_task_begin(estimator=self._search)

    def _place(self, stage: Any, i: int) -> tuple[Any, Any]:
        """Of a candidate in that tree, and who calls the callbacks."""
        if stage is None:
            return None, None
        return stage.subcontext(task_name="candidate", task_id=i, max_subtasks=self._n_fits), self._search


def _said(candidate: Candidate, label: str) -> str:
    """How a candidate has fared in a stage, in a few words."""
    if candidate.error:
        return f"failed: {candidate.error}"
    if candidate.taken_up and label == FITS:
        return "fit taken up from checkpoint_dir"
    if candidate.taken_up:
        return f"taken up from checkpoint_dir, LML {candidate.evidence:.2f} ({label})"
    if label == FITS:
        return f"fitted in {candidate.fit_time:.2f} s"
    return (
        f"finished, LML {candidate.evidence:.2f} ({label}), {candidate.fit_time + candidate.score_time:.2f} s"
    )
