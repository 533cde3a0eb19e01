"""Rank candidates by marginal likelihood: a search over a parameter grid.

Which number ranks is the ``evidence``: `bayes_mpt.estimators.rules`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, MetaEstimatorMixin, _fit_context, clone
from sklearn.callback import CallbackSupportMixin
from sklearn.model_selection import ParameterGrid
from sklearn.pipeline import Pipeline
from sklearn.utils import check_array, check_random_state, get_tags
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.validation import check_is_fitted

from bayes_mpt.estimators.average import ModelAverage
from bayes_mpt.estimators.best import AsItsBest
from bayes_mpt.estimators.candidates import Candidate, final_step
from bayes_mpt.estimators.checked import checked
from bayes_mpt.estimators.contenders import all_settled
from bayes_mpt.estimators.evaluation import (
    checkpointed,
    fit_candidate,
    fit_of,
    names_of,
    refuse_unfit,
    results_of,
    score_candidate,
    to_fit,
    unfitted,
)
from bayes_mpt.estimators.kept import Kept
from bayes_mpt.estimators.members import needs_estimator
from bayes_mpt.estimators.partial import Finished, Partial
from bayes_mpt.estimators.rules import (
    RULES,
    Auto,
    Rule,
    choose_rule,
    common_prior,
    fit_seed,
    refuse_incomparable,
    refuse_mixed_train,
    refuse_other_priors,
    rule_of,
)
from bayes_mpt.estimators.stages import Stage
from bayes_mpt.estimators.stored import Slot, prepare, seed_in, with_estimator
from bayes_mpt.estimators.summary import summary
from bayes_mpt.estimators.table import Ranking, comparison_table
from bayes_mpt.inputs import read_table, unmasked
from bayes_mpt.program.statistics import unchanged
from bayes_mpt.runtime.digests import CannotDigest, digest_of
from bayes_mpt.runtime.interrupts import interruptible
from bayes_mpt.runtime.serial import all_or_nothing
from bayes_mpt.warnings import CheckpointWarning, warn

__all__ = ["MarginalLikelihoodSearch"]


class MarginalLikelihoodSearch(MetaEstimatorMixin, CallbackSupportMixin, AsItsBest, BaseEstimator):
    """Fit every candidate of a grid and rank them by marginal likelihood.

    Parameters
    ----------
    estimator : BayesMPT or Pipeline ending in one
        With a model, where the grid sets ``model__...``.
    param_grid : dict or list of dicts
        As in `sklearn.model_selection.GridSearchCV`.
    evidence : str or rule of evidence, default="auto"
        What ranks: `Laplace`, `Integrated`, `Bic`, `HeldOut`, `Cumulative`, `Train`, or `Auto`, which takes what fits
        the candidates. A name in lower case stands for a rule's defaults, as in ``evidence="heldout"`` for
        ``evidence=HeldOut(cv=5, n_repeats=1)``. `evidence_` and `evidence_reason_` say which rule was taken and why.
    n_jobs : int, optional
        Candidates evaluated at a time, by joblib: in processes (loky), or in threads, which take turns.
    refit : bool or callable, default=True
        Keep the best candidate, fitted on all rows, as ``best_estimator_``. A callable takes ``cv_results_`` and
        returns an index (a one-standard-error rule, say).
    error_score : "raise" or float, default=nan
        What a candidate that cannot be fitted scores; its message stands in ``comparison_["diag"]``.
    checkpoint_dir : path, optional
        Where each finished candidate is written, in numbers, text and tensors; a search that asks for the same, with
        the same programs on the same data, takes up from there, in any process. A candidate of which that cannot be
        told is named by a warning and not written.
    random_state : int, RandomState or None
        For the partitions of the rows, and for all in ``estimator`` whose own ``random_state`` is None.
    verbose : int, default=0
        1 shows on stderr how many candidates are done, and where the one is that was heard of last: a bar in a terminal
        or a notebook, lines in a file. The logger ``bayes_mpt`` says it too, at level INFO; `set_callbacks` takes
        scikit-learn's, such as ``ProgressBar()``, whose tasks are the two stages, their candidates, and of these the
        iterations of the fit or the folds.

    Attributes
    ----------
    comparison_ : DataFrame
        One row a candidate, best first, in nats. Of factor models ``expected_diff``, the expected log-density of N new
        complete rows under the fit that is used, less that of the first, on average over the posterior of all
        candidates; ``expected_se``, its numerical error; ``p_better``, the probability that this fit predicts better
        than the first. ``lml``, the number of the rule; ``se``, its numerical error; ``lml_diff`` to the greatest;
        ``mc_dse``, numerical error of that difference; ``p_worse`` = Phi(-abs(lml_diff) / mc_dse), or by a t with F - 1
        degrees of freedom of one partition into F folds, the probability that the order of the two is that error's
        doing; ``weight``, the posterior probability among the candidates of its kind (PPCA or factor analysis), and
        ``log_bayes_factor``, where the number is an evidence; ``dse``, spread of ``lml_diff`` over new rows; ``diag``,
        the rule, or what to be wary of (a training that did not converge), or what failed. ``attrs["ranked_by"]``:
        "expected", where all candidates have it; "heldout", where hidden rows do not allow to believe in that
        (heavy tails, or a contradiction), whose nats are then in ``attrs["heldout"]``; else "lml".
    cv_results_ : dict
        With scikit-learn's keys; scores are mean nats a row of what ranks. ``lml`` and ``mean_test_lml`` are the rule's
        number, in all and a row.
    best_estimator_, best_params_, best_score_, best_index_
        As in scikit-learn; ``best_score_`` is in nats a row. An estimator that was found finished in
        ``checkpoint_dir`` is made of what is stored when it is first asked for.
    evidence_, evidence_reason_ : str
        The rule that was used, and why.
    n_splits_ : int
        Splits a candidate.
    partial_ : DataFrame
        Only after Ctrl-C: what was finished until then, a row a candidate: ``lml``, NaN where it was fitted but not
        scored yet; ``fit_time`` and ``score_time`` in seconds; ``diag``. All else is as it was before; the next `fit`
        that succeeds removes it. With a ``checkpoint_dir`` that one goes on from there.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from bayes_mpt import BayesMPT
    >>> from bayes_mpt.models import PPCA
    >>> search = MarginalLikelihoodSearch(BayesMPT(PPCA(1)), {"model__n_components": [0, 1, 2, 3]})
    >>> search.fit(load_iris().data).best_params_
    {'model__n_components': 3}
    >>> search.evidence_
    'integrated'
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "estimator": "no_validation",  # in words of ours
        "param_grid": [dict, list],
        "evidence": [str, *RULES],
        "n_jobs": [Integral, None],
        "refit": ["boolean", callable],
        "error_score": [StrOptions({"raise"}), Real],
        "checkpoint_dir": [str, os.PathLike, None],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        estimator: Any,
        param_grid: dict[str, Sequence[Any]] | list[dict[str, Sequence[Any]]],
        *,
        evidence: str | Rule | Auto = "auto",
        n_jobs: int | None = None,
        refit: bool | Callable[[dict[str, Any]], int] = True,
        error_score: float | Literal["raise"] = math.nan,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
    ):
        self.estimator = estimator
        self.param_grid = param_grid
        self.evidence = evidence
        self.n_jobs = n_jobs
        self.refit = refit
        self.error_score = error_score
        self.checkpoint_dir = checkpoint_dir
        self.random_state = random_state
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=False)
    def fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Fit and rank all candidates on X (N, T).

        Raises
        ------
        ValueError
            If candidates are not comparable (they score other tokens, or one integrates what another
            point-estimates), with the offenders' names; if every candidate fails; if training masks are no LML.
        KeyboardInterrupt
            At Ctrl-C, when nothing runs any more, in other processes neither; ``partial_`` has what was finished.
        """
        finished = Finished()
        root = self._init_callback_context(max_subtasks=2)
        with interruptible(), Partial(self, finished.table), unchanged(X):
            self._fit(X, y, finished, root)
        return self

    @all_or_nothing
    def _fit(self, X: ArrayLike, y: Any, finished: Finished, root: Any) -> None:
        grid = list(ParameterGrid(self.param_grid))
        if not grid:
            raise ValueError(f"param_grid holds no candidates: got {self.param_grid!r}")
        names = finished.names = names_of(grid)
        asked = rule_of(self.evidence)
        refuse_unfit(self.estimator, grid)
        X, y = self._read(X), unmasked(y)
        root.call_on_fit_task_begin(estimator=self, X=X, y=y)
        seed = self._partition_seed()
        state = fit_seed(self.random_state, seed)
        keys = self._keys(grid, names, X, y, state)
        found = self._run(
            fit_candidate,
            to_fit,
            [(self.estimator, p, X, y, asked.name, state) for p in grid],
            "fit",
            keys,
            finished,
            root,
        )
        good = _good(found)
        refuse_incomparable([n for n, c in zip(names, found, strict=True) if not c.error], good)
        rule, self.evidence_reason_ = choose_rule(asked, good)
        self.evidence_ = rule.name
        if rule.name == "train":
            refuse_mixed_train([n for n, c in zip(names, found, strict=True) if not c.error], good)
        finished.rule = self.evidence_
        factors = [c for c in good if c.facts.rotates and rule.name == "integrated"]
        prior = common_prior(with_estimator(factors[0], X, y), X) if factors else None
        found = self._run(
            score_candidate,
            fit_of,
            [(c, X, y, rule, seed, prior) for c in found],
            rule.name,
            _score_keys(keys, rule, seed),
            finished,
            root,
            n_fits=rule.n_fits,
        )
        _good(found)
        refuse_other_priors(names, found)
        ranking = checked(found, rule, asked, X, y, seed=seed, random_state=state)
        self._store(grid, names, found, ranking)
        unfinished = bool(self.refit) and any(map(_is_unfinished, found))
        self._kept = Kept.of(X, y, rule, seed) if unfinished else None
        root.call_on_fit_task_end(estimator=self, X=X, y=y)

    def _read(self, X: ArrayLike) -> Any:
        """The table, from which rows can be picked."""
        X = unmasked(X)
        if final_step(self.estimator) is not self.estimator:
            return X  # what stands before a model in a Pipeline may take anything
        X = read_table(X)
        checked_array = check_array(X, dtype=[np.float64, np.float32], ensure_all_finite="allow-nan")
        return X if hasattr(X, "__getitem__") else checked_array

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "comparison_")  # partial_ alone is no fit

    def _partition_seed(self) -> int:
        """Of the partitions of the rows; a search that takes up from a directory keeps the seed found there."""
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        folder = self._folder()
        if folder is None:
            return seed
        prepare(folder)
        return seed if self.random_state is not None else seed_in(folder, seed)

    def _folder(self) -> Path | None:
        return None if self.checkpoint_dir is None else Path(self.checkpoint_dir).expanduser()

    def _keys(
        self, grid: list[dict[str, Any]], names: list[str], X: Any, y: Any, state: int | None
    ) -> list[str | None]:
        """Digest of all that each candidate's fit depends on; None where there is none, of which a warning tells."""
        if self.checkpoint_dir is None:
            return [None] * len(grid)
        keys: list[str | None] = []
        refused: dict[str, list[str]] = {}
        data: str | None = None
        for name, params in zip(names, grid, strict=True):
            try:
                data = data or digest_of((X, y), "the data")
                candidate = unfitted(self.estimator, params, state)
                asked = {
                    "estimator": digest_of(candidate),
                    "data": data,
                    "evidence": rule_of(self.evidence).name,
                }
                keys.append(digest_of(asked))
            except CannotDigest as error:
                refused.setdefault(str(error), []).append(name)
                keys.append(None)
        for why, whose in refused.items():
            which = ", ".join(map(repr, whose))
            warn(f"nothing of {which} is kept in checkpoint_dir or taken from it: {why}", CheckpointWarning)
        return keys

    def _run(
        self,
        task: Callable[..., Candidate],
        unfitted_of: Callable[..., Any],
        arguments: list[tuple[Any, ...]],
        label: str,
        keys: list[str | None],
        finished: Finished,
        root: Any,
        *,
        n_fits: int | None = 0,
    ) -> list[Candidate]:
        """Do one task for every candidate, in parallel, taking finished ones from the checkpoint directory."""
        calls: list[tuple[Callable[..., Candidate], tuple[Any, ...]]] = []
        folder = self._folder()
        for name, args, key in zip(finished.names, arguments, keys, strict=True):
            slot = None
            if key is not None and folder is not None:
                slot = Slot.of(folder, label, key, unfitted_of(*args))
            calls.append((checkpointed, (slot, task, unfitted_of, args, self.error_score, name)))
        return Stage(self, label, finished, root, n_fits).run(calls)

    def _store(
        self, grid: list[dict[str, Any]], names: list[str], found: list[Candidate], ranking: Ranking
    ) -> None:
        failed = math.nan if self.error_score == "raise" else float(self.error_score)
        results = results_of(grid, found, ranking, failed)
        mean = results["mean_test_score"]
        best = int(np.argmin(results["rank_test_score"]))
        self.cv_results_ = results
        self.n_splits_ = sum(key.startswith("split") for key in results)
        self.multimetric_ = False
        self.candidate_names_ = names
        self.comparison_ = comparison_table(names, found, self.evidence_, ranking)
        self.best_index_ = _index(self.refit(results), len(grid)) if callable(self.refit) else best
        self.best_params_ = grid[self.best_index_]
        self.best_score_ = float(mean[self.best_index_])
        self._found = found if self.refit else None
        if self.refit:
            self.refit_time_ = 0.0  # the candidate was fitted on all rows already

    # ---------------------------------------------------------------------------- the best candidate, as an estimator

    @property
    def best_estimator_(self) -> Any:
        """The best candidate, fitted on all rows."""
        if vars(self).get("_found") is None:
            raise AttributeError(
                f"{type(self).__name__} object has no best_estimator_: not fitted, or refit=False"
            )
        return self._made([self.best_index_])[self.best_index_].estimator

    def average(
        self,
        weights: Literal["evidence", "stacking"] = "evidence",
        prior_weights: Mapping[str, float] | ArrayLike | None = None,
    ) -> ModelAverage:
        """The candidates averaged in place of the best one: an estimator, the mixture of what each predicts.

        Parameters
        ----------
        weights : "evidence" or "stacking", default="evidence"
            By evidence, where candidates have their posterior (``evidence="integrated"``, or nothing is estimated); by
            scores of hidden rows, where they offer a fit (``evidence="heldout"``).
        prior_weights : dict by candidate or array of shape (J,), optional
            Prior odds; by default equal for each class of models, in it for each number of latents or components.

        Raises
        ------
        ValueError
            If only one candidate did not fail, what is asked for cannot be had of them, or they are not comparable:
            other steps stand before their models.

        Warns
        -----
        LeftOutWarning
            If a candidate failed; the average is of the others.
        DrawsWarning
            If the errors of the evidences leave a weight open by more than 0.1.

        Examples
        --------
        >>> from sklearn.datasets import load_iris
        >>> from bayes_mpt import BayesMPT
        >>> from bayes_mpt.models import PPCA
        >>> X = load_iris().data
        >>> search = MarginalLikelihoodSearch(BayesMPT(PPCA(1)), {"model__n_components": [1, 2]}).fit(X)
        >>> search.average().weights_.sum().round(6)
        np.float64(1.0)
        """
        return ModelAverage(clone(self), weights=weights, prior_weights=prior_weights)._of(self)

    def _candidates(self) -> list[Candidate]:
        """All candidates, for an average; with their estimators where their predictions need these."""
        check_is_fitted(self)
        if self._found is None:
            raise ValueError("refit=False keeps no candidates to average: leave it True")
        piped = isinstance(self.estimator, Pipeline)
        return self._made(
            [i for i, c in enumerate(self._found) if needs_estimator(c) or (piped and not c.error)]
        )

    def _settled(self) -> list[Candidate]:
        """As `_candidates`, all folds of which have climbed as far as the fits; rows scored less well have no part."""
        return all_settled(self._candidates(), self._kept)

    def _made(self, places: list[int]) -> list[Candidate]:
        """All candidates, those at some places with their estimators."""
        assert self._found is not None
        unmade = [i for i in places if self._found[i].estimator is None]
        if unmade and self._kept is not None:
            X, y = self._kept.rows()
            for i in unmade:
                with_estimator(self._found[i], X, y)
            if not any(map(_is_unfinished, self._found)):
                self._kept = None
        for i in places:
            self._found[i].state_prior()
        return self._found

    def summary(self) -> str:
        """What ranks, by how much, how sure that is and what to be wary of, in lines of at most 80 characters."""
        check_is_fitted(self)
        return summary(self.comparison_, self.evidence_, self.evidence_reason_)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        if state.get("_kept") is not None:  # a file holds estimators, and no rows
            self._made([self.best_index_])
            self._candidates()
            state["_kept"] = None
        return state

    @property
    def n_features_in_(self) -> int:
        """Columns of X in `fit`."""
        return int(self._of_best("n_features_in_"))

    @property
    def feature_names_in_(self) -> NDArray[Any]:
        """Names of the columns of X in `fit`, where it had any."""
        return np.asarray(self._of_best("feature_names_in_"))

    def _of_best(self, name: str) -> Any:
        best = getattr(self, "best_estimator_", None)
        if best is None or not hasattr(best, name):
            raise AttributeError(f"{type(self).__name__} object has no {name} attribute: it is not fitted")
        return getattr(best, name)

    def _best(self) -> Any:
        check_is_fitted(self)
        if not self.refit:
            raise AttributeError("refit=False: there is no best_estimator_ to use")
        return self.best_estimator_

    def _offering(self) -> Any:
        """Whose methods are offered: the best candidate's, and before `fit` those of ``estimator``."""
        return getattr(self, "best_estimator_", None) if hasattr(self, "comparison_") else self.estimator

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        inner = get_tags(self.estimator)
        tags.estimator_type = inner.estimator_type
        tags.input_tags = inner.input_tags
        tags.transformer_tags = inner.transformer_tags
        tags.target_tags = inner.target_tags
        return tags


# ----------------------------------------------------------------------------------------------------------- helpers


def _is_unfinished(candidate: Candidate) -> bool:
    """Whether rows are needed to make its estimator, or for its folds to climb on."""
    return not candidate.error and (candidate.estimator is None or candidate.rough > 0)


def _score_keys(keys: list[str | None], rule: Rule, seed: int) -> list[str | None]:
    """Digests of all that each candidate's evidence depends on, from those of its fit."""
    asked = {"settings": rule.get_params(), **({"seed": seed} if rule.n_fits != 0 else {})}
    try:
        return [k and digest_of({"fit": k, "rule": rule.name, **asked}, "search") for k in keys]
    except CannotDigest as error:
        warn(f"no evidence is kept in checkpoint_dir: {error}", CheckpointWarning)
        return [None] * len(keys)


def _index(asked: Any, n_candidates: int) -> int:
    """What a callable ``refit`` has returned."""
    if not isinstance(asked, Integral) or not 0 <= int(asked) < n_candidates:
        raise ValueError(
            f"refit must return the place of a candidate in cv_results_, 0 to {n_candidates - 1}, got {asked!r}"
        )
    return int(asked)


def _good(found: list[Candidate]) -> list[Candidate]:
    good = [c for c in found if not c.error]
    if not good:
        raise ValueError(f"all {len(found)} candidates failed; the first one: {found[0].error}")
    return good
