"""Candidates that hidden rows may prefer: their folds climb on where the others' need not.

What a fold's last steps gain is little against what a candidate far behind lacks, and takes most of the time: surplus
components creep. So a search climbs folds to `refits.ROUGH` at first, and to the tolerance of the fits for the best
candidate and for all that are not behind it by many times the error of their difference over rows. An average weighs
also what is far behind: the expected density of any other relative to the true one is one, so that chance gives weight.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from bayes_mpt.estimators.candidates import Candidate
from bayes_mpt.estimators.kept import Kept
from bayes_mpt.estimators.rules import Rule, give_evidence
from bayes_mpt.estimators.stored import with_estimator

__all__ = ["all_settled", "contenders", "settle"]

N_ERRORS = 5.0  # behind, from which on what is left to climb does not matter


def settle(found: list[Candidate], rule: Rule, X: Any, y: Any, *, seed: int) -> None:
    """Score the rough candidates that may be the best anew, by folds that climb as far as the fits do.

    Parameters
    ----------
    found : list of Candidate
        With their evidence, changed in place.
    rule, X, y, seed
        As in `bayes_mpt.estimators.rules.give_evidence`.
    """

    def again(c: Candidate) -> None:
        start = time.perf_counter()
        give_evidence(with_estimator(c, X, y), X, y, rule, seed=seed)
        c.score_time += time.perf_counter() - start

    _until_settled(found, again)


def all_settled(found: list[Candidate], kept: Kept | None) -> list[Candidate]:
    """Candidates, of which the rough ones are copies that are scored anew; in error where no rows are kept for that."""
    rough = [i for i, c in enumerate(found) if c.rough and not c.error]
    out = list(found)
    for i in rough:
        if kept is None:
            out[i] = replace(
                found[i],
                error=f"its folds ended at {found[i].rough:.0e} of a score, and a search from a file has no rows to "
                "climb on with: average before it is pickled",
            )
            continue
        X, y = kept.rows()
        out[i] = replace(found[i])
        give_evidence(with_estimator(out[i], X, y), X, y, kept.rule, seed=kept.seed)
    return out


def _until_settled(found: list[Candidate], again: Callable[[Candidate], None]) -> None:
    while places := contenders(found):
        for i in places:
            again(found[i])


def contenders(found: list[Candidate]) -> list[int]:
    """Places of the rough candidates that may be the best, as far as their scores tell."""
    good = [i for i, c in enumerate(found) if not c.error and not math.isnan(c.evidence)]
    if not good:
        return []
    best = found[max(good, key=lambda i: found[i].evidence)]
    return [i for i in good if found[i].rough and _is_near(found[i], best)]


def _is_near(candidate: Candidate, best: Candidate) -> bool:
    if candidate is best:
        return True
    assert candidate.by_row is not None and best.by_row is not None
    each = best.by_row - candidate.by_row
    each = each[~np.isnan(each)]
    return float(each.sum()) < N_ERRORS * math.sqrt(len(each)) * float(each.std())
