"""What a search does to one candidate: its name, its fit, its evidence, and what is on disk of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, clone

from bayes_mpt.estimators.candidates import (
    Candidate,
    final_step,
    model_in,
    not_converged,
    token_digest,
    unchecked,
)
from bayes_mpt.estimators.rules import Rule, give_evidence
from bayes_mpt.estimators.stored import Slot, with_estimator
from bayes_mpt.estimators.table import Ranking
from bayes_mpt.evidence.factor_prior import FactorPrior
from bayes_mpt.masks import require_lml
from bayes_mpt.program.run import takes_visible
from bayes_mpt.runtime.progress import fitted_in_task
from bayes_mpt.warnings import DivergenceWarning, warnings_of

__all__ = [
    "checkpointed",
    "cloned",
    "fit_candidate",
    "fit_of",
    "names_of",
    "refuse_unfit",
    "results_of",
    "score_candidate",
    "to_fit",
    "unfitted",
]


def names_of(grid: list[dict[str, Any]]) -> list[str]:
    """What the grid sets, in words: short where that tells candidates apart."""
    for describe in (_short, repr):
        names = [
            " ".join(
                describe(value)
                if isinstance(value, BaseEstimator) or callable(value)
                else f"{key.rpartition('__')[2]}={value}"
                for key, value in params.items()
            )
            or "as given"
            for params in grid
        ]
        if len(set(names)) == len(names):
            return names
    return [n if names.count(n) == 1 else f"{n} #{i}" for i, n in enumerate(names)]


def _short(value: Any) -> str:
    if isinstance(value, BaseEstimator):
        return type(value).__name__
    from gpytorch.kernels import Kernel  # slow to import, as are scikit-learn's
    from sklearn.gaussian_process.kernels import Kernel as GaussianProcessKernel

    from bayes_mpt.models.kernels import kernel_name

    if isinstance(value, Kernel | GaussianProcessKernel):
        return kernel_name(value)
    return getattr(value, "__name__", repr(value))


# ------------------------------------------------------------------------------------------- the two stages


def fit_candidate(
    estimator: Any, params: dict[str, Any], X: Any, y: Any, evidence: str, random_state: int | None
) -> Candidate:
    """Fit on all rows; ``random_state`` is for whatever has none."""
    start = time.perf_counter()
    candidate = unfitted(estimator, params, random_state)
    # where an estimate diverges, the integral does not
    silent = (DivergenceWarning,) if evidence in ("auto", "integrated") else ()
    with warnings_of(silent=silent), fitted_in_task(candidate, X, y):
        fitted = candidate.fit(X, y)
    fit_time = time.perf_counter() - start
    zero = final_step(fitted).noise_at_zero_
    note = f"the noise variance of column {', '.join(map(repr, zero))} is zero" if zero else ""
    candidate = Candidate(fitted, tokens=token_digest(fitted, X, y), fit_time=fit_time, note=note)
    candidate.doubt(not_converged(final_step(fitted)))
    candidate.doubt(unchecked(final_step(fitted)))
    return candidate


def unfitted(estimator: Any, params: dict[str, Any], random_state: int | None) -> Any:
    """What is fitted."""
    candidate = clone(estimator).set_params(**cloned(params))
    if random_state is not None:
        candidate.set_params(**dict.fromkeys(_unseeded(candidate), random_state))
    return candidate


def to_fit(
    estimator: Any, params: dict[str, Any], X: Any, y: Any, evidence: str, random_state: int | None
) -> Any:
    """What `fit_candidate` fits, of the same arguments."""
    return unfitted(estimator, params, random_state)


def fit_of(candidate: Candidate, X: Any, y: Any, rule: Rule, seed: int, prior: FactorPrior | None) -> Any:
    """What the candidate of `score_candidate` is a fit of, of the same arguments; None of one that failed."""
    if candidate.error:
        return None
    return candidate.unfitted if candidate.estimator is None else clone(candidate.estimator)


def score_candidate(
    candidate: Candidate, X: Any, y: Any, rule: Rule, seed: int, prior: FactorPrior | None
) -> Candidate:
    """Give a fitted candidate its evidence."""
    if candidate.error:
        return candidate
    start = time.perf_counter()
    with_estimator(candidate, X, y)
    candidate = give_evidence(candidate, X, y, rule, seed=seed, to_map=True, prior=prior, rough=True)
    candidate.score_time = time.perf_counter() - start
    candidate.taken_up = False
    return candidate


def checkpointed(
    slot: Slot | None,
    task: Callable[..., Candidate],
    unfitted_of: Callable[..., Any],
    args: tuple[Any, ...],
    error_score: Any,
    name: str,
) -> Candidate:
    """Run a task unless its result is on disk; one that fails, or is not finished, leaves nothing there.

    ``unfitted_of`` the same arguments is what is fitted. The task's warnings name the candidate.
    """
    if slot is not None and slot.found is None:
        estimator = unfitted_of(*args)
        if estimator is not None:
            slot.look(estimator)  # another search may have been faster
    if slot is not None and slot.found is not None:
        slot.found.taken_up = True
        return slot.found
    try:
        with warnings_of(name):
            result = task(*args)
    except Exception as error:
        if error_score == "raise":
            raise
        return Candidate(error=f"{type(error).__name__}: {error}")
    if slot is not None and not result.error:
        slot.put(result)
    return result


def _unseeded(estimator: Any) -> list[str]:
    """Names of the parameters of an estimator, its steps and its model that are a random_state of None."""
    return [
        name
        for name, value in estimator.get_params().items()
        if value is None and name.rpartition("__")[2] == "random_state"
    ]


def refuse_unfit(estimator: Any, grid: list[dict[str, Any]]) -> None:
    """Refuse candidates that no search can fit."""
    model_in(estimator, "estimator")
    # other values of the model's own settings change nothing that is looked at here
    of_model = {frozenset(p): p for p in grid if all(name.startswith("model__") for name in p)}
    others = [p for p in grid if not all(name.startswith("model__") for name in p)]
    for params in [*of_model.values(), *others]:
        candidate = final_step(clone(estimator).set_params(**cloned(params)))
        checkpoint = getattr(candidate.training, "checkpoint", None)
        if checkpoint is not None:
            raise ValueError(
                f"checkpoint={checkpoint!r} holds one training, and a search makes many: leave it None, and give the "
                "search a checkpoint_dir"
            )
        if candidate.masks is not None:
            independent = takes_visible(candidate.model)
            require_lml(candidate.masks, "MarginalLikelihoodSearch", independent=independent)


def cloned(params: dict[str, Any]) -> dict[str, Any]:
    """Fresh copies, as grid search makes them: candidates must not share a model that stands in the grid."""
    return {k: clone(v, safe=False) for k, v in params.items()}


# ------------------------------------------------------------------------------------------- all of them


def results_of(
    grid: list[dict[str, Any]], found: list[Candidate], ranking: Ranking, failed: float
) -> dict[str, Any]:
    """What scikit-learn calls ``cv_results_``, of what ranks; ``failed`` is the score of a failure.

    ``lml`` and ``mean_test_lml`` are those of the rule, in all and a row.
    """
    rows = max(c.n_scored for c in found if not c.error)
    n_scored = np.array([c.n_scored if not c.error else rows for c in found])
    lml = np.array([c.evidence if not c.error else failed * rows for c in found])
    if ranking.by == "lml":
        mean = lml / n_scored
        n_splits = max(len(c.splits) for c in found)
        splits = np.array([c.splits if len(c.splits) else np.full(n_splits, failed) for c in found])
        splits = splits.reshape(len(found), n_splits)
    else:
        mean = np.where(np.isnan(ranking.value), failed, ranking.value / n_scored)
        n_splits, splits = 1, mean[:, None]
    order = np.argsort(np.where(np.isnan(mean), -np.inf, mean) * -1, kind="stable")
    rank = np.empty(len(found), dtype=np.int32)
    rank[order] = np.arange(1, len(found) + 1)
    results: dict[str, Any] = {
        "mean_fit_time": np.array([c.fit_time for c in found]),
        "std_fit_time": np.zeros(len(found)),
        "mean_score_time": np.array([c.score_time for c in found]),
        "std_score_time": np.zeros(len(found)),
    }
    for key in sorted({k for p in grid for k in p}):
        column = np.ma.masked_all(len(grid), dtype=object)
        for i, params in enumerate(grid):
            if key in params:
                column[i] = params[key]
        results[f"param_{key}"] = column
    results["params"] = grid
    for i in range(n_splits):
        results[f"split{i}_test_score"] = splits[:, i]
    return results | {
        "mean_test_score": mean,
        "std_test_score": splits.std(1),
        "rank_test_score": rank,
        "lml": lml,
        "mean_test_lml": lml / n_scored,
    }
