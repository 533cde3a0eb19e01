"""What the evidence of factor models believes, that rows are Gaussian, checked on the rows.

The kurtosis of the whitened rows and the farthest of them are compared with what the posterior predicts
(`bayes_mpt.evidence.misfit`); and the first two candidates predict hidden rows, each fitted to the others. Where tails
are heavier than Gaussian, or hidden rows contradict the expected scores by more than twice their error, all candidates
are ranked by hidden rows.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from bayes_mpt.diagnostics import partition_error
from bayes_mpt.estimators.candidates import Candidate, before_final
from bayes_mpt.estimators.contenders import settle
from bayes_mpt.estimators.rules import Auto, Rule, give_evidence
from bayes_mpt.estimators.stored import with_estimator
from bayes_mpt.estimators.table import Ranking, ranked
from bayes_mpt.evidence.misfit import Kurtosis, kurtosis
from bayes_mpt.warnings import MisfitWarning, warn, warnings_of

__all__ = ["checked"]

N_ERRORS = 2.0
UNLIKELY = 0.01  # of tails heavier than those of the rows: hidden rows rank
MISFIT = 0.005  # of tails as far off to one side: a warning
LONELY = 1e-5  # of a row as far out: both; most real tables have one that is less far, and it does no harm


def checked(
    found: list[Candidate],
    rule: Rule,
    asked: Rule | Auto,
    X: Any,
    y: Any,
    *,
    seed: int,
    random_state: int | None,
) -> Ranking:
    """The ranking of candidates that have their evidence, settled, and checked where that believes rows to be Gaussian.

    Parameters
    ----------
    found : list of Candidate
        Those that rank by hidden rows get their score; those whose evidence is rough and may be the best, theirs.
    rule, asked : rule of evidence
        What gave the evidence, and what was asked for: `Auto` checks its choice.
    X, y : array-like
        What they were fitted on.
    seed, random_state
        As in `give_evidence`.
    """
    settle(found, rule, X, y, seed=seed)
    ranking = ranked(found, rule.name)
    if ranking.by != "expected":
        return ranking
    first = found[ranking.order[0]]
    tails = _told_tails(with_estimator(first, X, y), X)
    heavy = tails.p_heavier < UNLIKELY or tails.p_outlier < LONELY
    if rule is not asked and sum(not c.error for c in found) > 1:  # it was chosen: that is to be checked
        held_out = cast(Auto, asked).held_out

        def hidden(c: Candidate) -> Candidate:
            other = Candidate(with_estimator(c, X, y).estimator)
            with warnings_of(silent=(ConvergenceWarning,)):  # the fits to all rows have said so
                return give_evidence(other, X, y, held_out, seed=seed, random_state=random_state)

        try:
            if not heavy and not _contradicts(*(hidden(found[i]) for i in ranking.order[:2])):
                return ranking
        except ValueError as error:  # a fold may be too small for a candidate
            first.doubt(f"not checked on hidden rows: {error}")
            return ranking
        why = "tails are heavier than Gaussian" if heavy else "they contradict the expected scores"
        for c in (c for c in found if not c.error):
            try:
                c.held_out, c.why_held_out = hidden(c).evidence, why
            except ValueError as error:
                c.doubt(f"last, without a score of hidden rows: {error}")
        return ranked(found, rule.name)
    return ranking


def _contradicts(first: Candidate, second: Candidate) -> bool:
    """Whether hidden rows prefer the second by more than twice the error of that, over rows and over partitions."""
    assert first.by_row is not None and second.by_row is not None
    diff = first.by_row - second.by_row
    some = diff[~np.isnan(diff)]
    error = math.sqrt(len(some)) * float(some.std(ddof=1))
    if first.fold is not None and first.at_fit is not None and second.at_fit is not None:
        error = math.hypot(error, partition_error(first.at_fit - second.at_fit, diff, first.fold))
    return float(some.sum()) < -N_ERRORS * error


def _told_tails(best: Candidate, X: Any) -> Kurtosis:
    """Kurtosis of the rows under the posterior of a candidate; a warning where that is off."""
    assert best.believed is not None
    rows = best.model._ready(before_final(best.estimator, X))[1]
    found = kurtosis(rows, best.believed.draws)
    if min(found.p_heavier, found.p_lighter) < MISFIT:
        tails = "heavier" if found.ratio > 1 else "lighter"
        what = f"the tails of these rows are {tails} than those of Gaussian rows (Mardia's kurtosis is "
        what += f"{found.ratio:.2f} times what the posterior predicts)"
    elif found.p_outlier < LONELY:
        what = f"row {found.farthest} lies farther out than Gaussian rows do (p {found.p_outlier:.1g})"
    else:
        return found
    warn(
        f"{what}, and evidence, its error, weights and expected scores believe rows to be Gaussian. Transform the "
        "columns, or rank by hidden rows, evidence='heldout'",
        MisfitWarning,
    )
    return found
