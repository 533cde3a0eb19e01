"""What a fit says: while it runs, when it has ended, and when it is asked how a score is computed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bayes_mpt import training
from bayes_mpt.estimators.fitted import Fitted
from bayes_mpt.predictors.own_order import words_of
from bayes_mpt.program.offers import offered
from bayes_mpt.program.program import list_names
from bayes_mpt.runtime.interrupts import check
from bayes_mpt.runtime.progress import Line, tell
from bayes_mpt.training.lbfgs import OWN

__all__ = ["Unwatched", "explain", "iterated", "shown"]

OF_THE_TABLE = "; units read from the table, so that evidence compares candidates of this table alone"


class Unwatched:
    """A task that no callback hears of."""

    def call_on_fit_task_begin(self, **about: Any) -> None: ...

    def call_on_fit_task_end(self, **about: Any) -> None: ...


@contextmanager
def shown(estimator: Any) -> Iterator[Line]:
    """Where a ``verbose`` training says where it is; what it came to is said at the end, of an exact one too."""
    line, start, text = Line(), time.perf_counter(), ""
    try:
        yield line
        text = _came_to(estimator.fitted_, time.perf_counter() - start)
    finally:
        line.end(text)


def _came_to(fitted: Fitted, seconds: float) -> str:
    ended = "" if fitted.fit.converged else ", not converged"
    return f"{_way(fitted.fit)}, log marginal likelihood {fitted.total:.4f} nats, {seconds:.2f} s{ended}"


def _way(fit: training.Fit) -> str:
    """How it was trained; a model's own way does not say how many steps it took."""
    n_iter = max(1, fit.n_iter)
    return (
        fit.method if fit.method == OWN else f"{fit.method}, {n_iter} iteration{'' if n_iter == 1 else 's'}"
    )


def iterated(
    estimator: Any, context: Any, line: Line | None, every: bool, max_iter: int, step: int, score: float
) -> bool:
    """Called after each iteration of a training: Ctrl-C, a search, the line and callbacks hear of it.

    Parameters
    ----------
    estimator : BayesMPT
        Whose callbacks count.
    context : CallbackContext
        Of the fit.
    line : Line or None
        Gets each iteration where ``every``, else a hundred of them.
    max_iter : int
        Iterations at most.
    step : int
        This one, counted from 1.
    score : float
        Mean nats a row after it.

    Returns
    -------
    bool
        Whether a callback has the training end here.
    """
    check()
    tell(step, max_iter)
    if line is not None and (every or step == 1 or step % max(1, max_iter // 100) == 0):
        line.show(f"{step:>6}/{max_iter}  score {score:.6f} nats a row")
    if not hasattr(estimator, "_skl_callbacks"):
        return False
    task = context.subcontext(task_name="iteration")
    task.call_on_fit_task_begin(estimator=estimator)
    return bool(task.call_on_fit_task_end(estimator=estimator))


def explain(fitted: Fitted) -> str:
    """How the score is computed, why, what is integrated and what is point-estimated."""
    bound, s, fit, averaged = fitted.bound, fitted.bound.structure, fitted.fit, fitted.posterior
    latents = list_names(
        f"{site.name} ({'discrete' if site.discrete else site.width} "
        f"{'a row' if site.row_axis is not None else 'in all'})"
        for site in s.latents
    )
    sites = f"site{'s' if len(s.site_names) > 1 else ''} {list_names(map(repr, s.site_names))}"
    if not s.by_row:
        tokens = f"all observations of {sites}, one vector"
    else:
        tokens = f"the {s.n_tokens} observations of {sites} in a row; rows are independent"
    if s.shifts:
        names = list_names(repr(shift.site) for shift in s.shifts)
        tokens += f"; what shifts the values of {names} stands in the distribution"
    read = ""
    if s.affine:
        per_row = "; read on the real rows, since each row has its own map"
        read = per_row if s.per_row else "; read once for all rows"
    prior, believed = offered(fitted.model, "penalised"), offered(fitted.model, "believed")
    where = ", at their maximum a posteriori under the model's prior" if fitted.at_map else ""
    where = where if prior is None else f", at {prior}"
    return "\n".join(
        [
            f"tokens:          {tokens}",
            *([f"order:           {words_of(s.order)}"] if s.order is not None else []),
            f"latents:         {latents or 'none'}",
            f"predictor:       {bound.name}: {bound.why}{read}",
            f"integrated:      {list_names(s.latent_names) or 'nothing'}",
            f"point-estimated: {', '.join(s.parameters) or 'nothing'}{where}",
            *([f"believed:        {believed}"] if believed else []),
            f"training:        {_way(fit)}" + (", interrupted" if fit.interrupted else ""),
            *([f"averaged:        {averaged.prior.describe()}{OF_THE_TABLE}"] if averaged else []),
            *(
                [f"evidence:        under {fitted.evidence_prior}{OF_THE_TABLE}"]
                if fitted.evidence_prior and not averaged
                else []
            ),
        ]
    )
