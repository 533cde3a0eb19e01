"""The rules of evidence that fit to some rows and predict others: `HeldOut` and `Cumulative`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from copy import deepcopy
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.model_selection import BaseCrossValidator, KFold
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import HasMethods, Interval

from bayes_mpt.estimators.bayes_mpt import BayesMPT
from bayes_mpt.estimators.candidates import Candidate, Facts
from bayes_mpt.estimators.rows import as_tensor, checked_rows, rows_of
from bayes_mpt.program.offers import offered_of_itself
from bayes_mpt.program.store import own_random_state
from bayes_mpt.runtime.serial import one_thread
from bayes_mpt.training import Ascent

__all__ = ["Cumulative", "HeldOut"]

Splits = Iterable[tuple[NDArray[Any], NDArray[Any]]]
"""Of rows: those fitted to, those scored."""

_FOLDS = [Interval(Integral, 2, None, closed="left"), HasMethods(["split", "get_n_splits"])]
ROUGH = 1e-4  # of the score: where fits to folds may end of candidates that are far behind
_POSITIVE_INTEGER = [Interval(Integral, 1, None, closed="left")]


class HeldOut(BaseEstimator):
    """Log predictive of hidden rows, each fold of them given a fit to the others.

    Parameters
    ----------
    cv : int or splitter, default=5
        Folds. A splitter, such as `sklearn.model_selection.KFold`, is used as it is.
    n_repeats : int, default=1
        Random partitions of the rows, averaged.

    Notes
    -----
    Another partition gives another number. Of one repeat that error is estimated by how unevenly the folds lose against
    the fits to all rows (`bayes_mpt.diagnostics.partition_error`), of several by their spread. There is none, NaN, with
    a splitter that does not draw its partition at random (groups, time series, a fixed one): another draw would be
    the same; nor where rows are tokens of one vector.

    A search ends fits of Gaussian mixtures to folds, of complete tables, at 1e-4 of the score at first. The best
    candidate, and those that are not behind it by five times ``dse``, go on to the tolerance of the training; ``diag``
    names the others, whose scores may still move by a few times ``dse``.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from bayes_mpt import BayesMPT, MarginalLikelihoodSearch
    >>> from bayes_mpt.models import PPCA
    >>> rule = HeldOut(cv=3, n_repeats=2)
    >>> grid = {"model__n_components": [1, 2]}
    >>> search = MarginalLikelihoodSearch(BayesMPT(PPCA()), grid, evidence=rule, random_state=0)
    >>> search.fit(load_iris().data).n_splits_
    6
    """

    name: ClassVar[str] = "heldout"
    _parameter_constraints: ClassVar[dict[str, Any]] = {"cv": _FOLDS, "n_repeats": _POSITIVE_INTEGER}

    def __init__(self, cv: int | BaseCrossValidator = 5, n_repeats: int = 1):
        self.cv = cv
        self.n_repeats = n_repeats

    def chosen(self, models: list[Facts]) -> tuple[Self, str]:
        """Itself, and why; refused where rows cannot be held out."""
        if not all(m.by_row or m.remembers for m in models):
            raise ValueError(
                "evidence='heldout' needs independent rows, or observations that are one Gaussian vector: here rows "
                "are tokens of one vector, and none can be scored given the others. Use 'train'"
            )
        return self, "asked for"

    @property
    def n_fits(self) -> int | None:
        """How many a candidate takes; None where a splitter does not say."""
        return self.n_repeats * int(self.cv) if isinstance(self.cv, Integral) else None

    def evaluate(
        self,
        candidate: Candidate,
        X: Any,
        y: Any,
        *,
        seed: int,
        random_state: int | None,
        rough: bool = False,
        **how: Any,
    ) -> None:
        """As `Laplace.evaluate`; ``seed`` is of the partitions, ``random_state`` of fits that have none.

        With ``rough`` fits that a program offers to hidden rows may end at `ROUGH`, and the candidate knows of it.
        """
        repeats = [self._folds(len(X), seed + repeat) for repeat in range(self.n_repeats)]
        candidate.hidden = _by_refits(candidate, X, y, repeats, random_state, rough=rough)
        candidate.split = _splits_of(len(X), repeats)
        if self.n_repeats == 1 and self._is_partition and candidate.facts.by_row:
            if candidate.at_fit is None:
                candidate.at_fit = np.asarray(candidate.model.score_samples(X, y), dtype=np.float64)
            candidate.fold = np.empty(len(X), dtype=np.int_)
            for f, (_, test) in enumerate(repeats[0]):
                candidate.fold[test] = f

    @property
    def _is_partition(self) -> bool:
        """Whether each row is hidden once, in a fold drawn at random: only then another draw would say otherwise."""
        splitter: Any = self.cv
        return isinstance(splitter, Integral) or (type(splitter) is KFold and bool(splitter.shuffle))

    def _folds(self, n: int, seed: int) -> Splits:
        splitter: Any = self.cv
        if isinstance(self.cv, Integral):
            splitter = KFold(min(int(self.cv), n), shuffle=True, random_state=seed % 2**32)
        return list(splitter.split(np.empty((n, 1))))


class Cumulative(BaseEstimator):
    """Rows revealed in blocks, each predicted from all before it: log p(rest | visible share).

    Parameters
    ----------
    n_blocks : int, default=5
    n_repeats : int, default=1
        Random orders of the rows, averaged; two or more give the error ``mc_dse``.
    visible_share : float, default=0.5
        Share of rows that it starts from.
    """

    name: ClassVar[str] = "cumulative"
    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "n_blocks": _POSITIVE_INTEGER,
        "n_repeats": _POSITIVE_INTEGER,
        "visible_share": [Interval(Real, 0, 1, closed="neither")],
    }

    def __init__(self, n_blocks: int = 5, n_repeats: int = 1, visible_share: float = 0.5):
        self.n_blocks = n_blocks
        self.n_repeats = n_repeats
        self.visible_share = visible_share

    def chosen(self, models: list[Facts]) -> tuple[Self, str]:
        """Itself, and why; refused where rows are one vector."""
        if not all(m.by_row for m in models):
            raise ValueError(
                "evidence='cumulative' needs independent rows: here they are tokens of one vector, and those of a "
                "block are scored one by one, not together. Use 'integrated' or 'heldout'"
            )
        return self, "asked for"

    @property
    def n_fits(self) -> int:
        """How many a candidate takes."""
        return self.n_repeats * self.n_blocks

    def evaluate(
        self, candidate: Candidate, X: Any, y: Any, *, seed: int, random_state: int | None, **how: Any
    ) -> None:
        """As `HeldOut.evaluate`."""
        repeats = [self._blocks(len(X), seed + repeat) for repeat in range(self.n_repeats)]
        _by_refits(candidate, X, y, repeats, random_state)

    def _blocks(self, n: int, seed: int) -> Splits:
        order = np.random.RandomState(seed % 2**32).permutation(n)
        first = max(2, round(self.visible_share * n))
        edges = np.linspace(first, n, self.n_blocks + 1).round().astype(int)
        return [(order[:a], order[a:b]) for a, b in pairwise(edges) if b > a]


def _by_refits(
    candidate: Candidate,
    X: Any,
    y: Any,
    repeats: list[Splits],
    random_state: int | None,
    *,
    rough: bool = False,
) -> NDArray[np.float64]:
    """Scores of rows by fits to others, averaged over repeats; those of each repeat (R, N) are returned."""
    by_row, replicates, means, n_cut_short = [], [], [], 0
    least, candidate.rough = ROUGH if rough else 0.0, 0.0
    for splits in map(list, repeats):
        total, count = np.zeros(len(X)), np.zeros(len(X))
        own = _own_scores(candidate.model, X, splits, random_state, least)
        if any(score is not None for score in own) and least > _ascent(candidate.model).tol:
            candidate.rough = least
        for (train, test), score in zip(splits, own, strict=True):
            if score is None:
                fold = candidate.model.refit(rows_of(X, train), rows_of(y, train), random_state=random_state)
                n_cut_short += not fold.converged_
                score = fold.score_samples(rows_of(X, test), rows_of(y, test))
            total[test] += score
            count[test] += 1
            means.append(float(np.nanmean(score)))  # of a missing y there is none
        # A row that a splitter hides more than once counts once, with its mean; one that stays visible not at all.
        by_row.append(np.divide(total, count, out=np.full(len(X), math.nan), where=count > 0))
        replicates.append(float(np.nansum(by_row[-1])))
    shown = ~np.isnan(by_row)  # (R, N)
    candidate.n_scored = float(shown.sum(1).mean())
    candidate.by_row = np.divide(
        np.nansum(by_row, 0), shown.sum(0), out=np.full(len(X), math.nan), where=shown.any(0)
    )
    candidate.replicates = np.array(replicates)
    candidate.evidence = float(np.mean(replicates))
    candidate.splits = np.array(means)
    if n_cut_short:
        candidate.doubt(f"{n_cut_short} of {len(means)} fits to folds not converged")
    return np.array(by_row)


def _ascent(model: BayesMPT) -> Any:
    """How it is trained."""
    return Ascent() if model.training is None else model.training


def _own_scores(
    model: BayesMPT,
    X: Any,
    splits: list[tuple[NDArray[Any], NDArray[Any]]],
    random_state: int | None,
    least_tol: float = 0.0,
) -> list[NDArray[np.float64] | None]:
    """Of each split the scores of hidden rows by the program's own fits (`Offers.held_out`); None where it has none.

    They end at the tolerance of the training, or at ``least_tol``.
    """
    none: list[NDArray[np.float64] | None] = [None] * len(splits)
    how, program = _ascent(model), cast(Any, model.model)
    plain = not (model.guide or model.masks or model.average or model.penalty)
    plain &= model.predictor == "auto" and model.n_init in ("auto", 1) and model.device == "cpu"
    held_out = offered_of_itself(program, "held_out")
    if held_out is None or how.by_masks or not plain:
        return none
    state = deepcopy(random_state if model.random_state is None else model.random_state)
    seed = int(check_random_state(state).randint(2**31 - 1))
    x = as_tensor(checked_rows(model, X, reset=False), program, model.device)
    with one_thread(x.numel()), own_random_state(seed):
        found = held_out(
            x,
            [(torch.as_tensor(train), torch.as_tensor(test)) for train, test in splits],
            tol=max(how.tol, least_tol),
            max_iter=how.max_iter,
        )
    return [None if score is None else score.numpy() for score in found]


def _splits_of(n_rows: int, repeats: list[Splits]) -> NDArray[np.float64] | None:
    """By which split (R, N) each row was hidden, NaN by none; None if a row was hidden more than once."""
    out = np.full((len(repeats), n_rows), math.nan)
    for place, splits in zip(out, repeats, strict=True):
        for f, (_, test) in enumerate(splits):
            if not np.isnan(place[test]).all():
                return None
            place[test] = f
    return out
