"""The table of a comparison: which number ranks, and what stands beside it.

Two errors stand in the table and are never mixed: ``mc_dse`` is the numerical error of a difference, ``dse`` its spread
over new rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import softmax
from scipy.stats import t as student_t

from bayes_mpt.diagnostics import partition_error, replicate_error
from bayes_mpt.estimators.candidates import Candidate
from bayes_mpt.evidence.expected import Expected, expected_score

__all__ = ["Ranking", "comparison_table", "ranked"]

Array = NDArray[np.float64]

EVIDENCE = ("integrated", "cumulative")  # rules whose differences are log Bayes factors, and give weights


@dataclass(frozen=True, eq=False)
class Ranking:
    """Which number ranks the candidates."""

    by: str
    """"expected": of new rows under the fits (`bayes_mpt.evidence.expected`); "heldout": of hidden rows, where the
    former is unreliable; "lml": the number of the rule."""
    value: Array
    """(J,) nats of all rows; NaN of a candidate that failed."""
    order: NDArray[np.intp]
    """(J,) places, best first."""
    expected: Expected | None = None
    """Where it is known; NaN of a candidate that failed."""


def ranked(found: list[Candidate], rule: str) -> Ranking:
    """By the expected score of new rows where all candidates that did not fail have one, else by the number itself."""
    lml = np.array([math.nan if c.error else c.evidence for c in found])
    good = np.array([not c.error for c in found])
    known = [c.believed for c in found if not c.error]
    if rule != "integrated" or not all(b is not None and b.determined for b in known):
        return Ranking("lml", lml, _best_first(lml))
    n_rows = next(len(c.by_row) for c in found if c.by_row is not None)
    held_out = np.array([c.held_out for c in found])
    hidden = bool(np.isfinite(held_out).any())
    first = int(np.nanargmax(held_out[good])) if hidden else None
    some = expected_score([c.believed for c in found if c.believed is not None], n_rows, first)
    expected = Expected(*(np.full(len(found), math.nan) for _ in some))
    for whole, part in zip(expected, some, strict=True):
        whole[good] = part
    by, value = ("heldout", held_out) if hidden else ("expected", expected.score)
    return Ranking(by, value, _best_first(value), expected)


def _best_first(value: Array) -> NDArray[np.intp]:
    return np.argsort(np.where(np.isnan(value), -np.inf, value) * -1, kind="stable")


def comparison_table(
    names: list[str], found: list[Candidate], rule: str, ranking: Ranking | None = None
) -> pd.DataFrame:
    """The table, best first; `MarginalLikelihoodSearch` says what the columns are."""
    ranking = ranked(found, rule) if ranking is None else ranking
    order = ranking.order
    lml = np.array([c.evidence for c in found])
    best = int(_best_first(lml)[0])
    diff = lml - lml[best]
    se, mc_dse, degrees = _numerical_errors(found, rule, found[best])
    with np.errstate(divide="ignore", invalid="ignore"):
        p_worse = student_t.cdf(-np.abs(diff) / mc_dse, degrees)
    p_worse[best] = math.nan
    evidence = rule in EVIDENCE or all(c.is_evidence for c in found if not c.error)
    columns = {
        "rank": np.argsort(order),
        **_expectations(ranking),
        "lml": lml,
        "se": se,
        "lml_diff": diff,
        "mc_dse": mc_dse,
        "p_worse": p_worse,
        "weight": _weights(lml, found, evidence),
        "log_bayes_factor": diff if evidence or rule == "laplace" else np.full(len(found), math.nan),
        "dse": np.array([_spread(c, found[best]) for c in found]),
    }
    frame = pd.DataFrame(
        {name: column[order] for name, column in columns.items()}
        | {"diag": [_said(found[i], rule, found[best]) for i in order]},
        index=pd.Index([names[i] for i in order], name="candidate"),
    )
    frame.attrs["ranked_by"] = ranking.by
    if ranking.by == "heldout":
        frame.attrs["heldout"] = dict(zip(frame.index, ranking.value[order].tolist(), strict=True))
    return frame


def _expectations(ranking: Ranking) -> dict[str, Array]:
    """Expected nats of new rows, less those of the candidate that ranks first, and how sure that is."""
    if ranking.expected is None:
        nothing = np.full(len(ranking.value), math.nan)
        return {"expected_diff": nothing, "expected_se": nothing, "p_better": nothing}
    score, se, p_better = ranking.expected
    return {"expected_diff": score - score[ranking.order[0]], "expected_se": se, "p_better": p_better}


def _numerical_errors(found: list[Candidate], rule: str, best: Candidate) -> tuple[Array, Array, Array]:
    """Of each number, of its difference to the greatest, and the degrees of freedom of the latter."""
    se, mc_dse = (np.full(len(found), math.nan) for _ in range(2))
    degrees = np.full(len(found), math.inf)
    for i, c in enumerate(found):
        if c.error:
            continue
        exact = rule in ("train", "integrated") or (
            rule == "heldout" and len(c.replicates) == 1 and not len(c.splits)
        )
        if exact:
            se[i] = c.se  # draws of their own; too wide a difference where candidates share a seed
            mc_dse[i] = 0.0 if c is best else math.hypot(c.se, best.se)
        elif c.fold is not None:
            se[i], mc_dse[i] = partition_error(*_lost(c), c.fold), partition_error(*_lost(c, best), c.fold)
            degrees[i] = c.fold.max()
        elif rule in ("heldout", "cumulative"):
            mc_dse[i] = replicate_error(c.replicates - best.replicates)
            se[i] = replicate_error(c.replicates)
    return se, mc_dse, degrees


def _weights(lml: Array, found: list[Candidate], evidence: bool) -> Array:
    """Posterior probabilities within each kind, whose candidates differ in the number of latents alone.

    Of mixtures none: those above .95 named the true number of components in 62 % of 145 cases
    (``benchmarks/ranking/mixture_choice.py``).
    """
    weight, kinds = np.full(len(lml), math.nan), [c.kind for c in found]
    for kind in {c.kind for c in found if not (c.error or c.facts.mixture)} if evidence else ():
        of_kind = np.array([k == kind for k in kinds]) & np.isfinite(lml)
        if of_kind.any():
            weight[of_kind] = softmax(lml[of_kind])
    return weight


def _spread(c: Candidate, best: Candidate) -> float:
    """Of the difference to another candidate over new rows: sqrt(N) times the standard deviation of a row's."""
    if c.error or c is best or c.by_row is None or best.by_row is None or len(c.by_row) < 2:
        return math.nan
    pair = (c.by_row - best.by_row)[~np.isnan(c.by_row)]
    return math.sqrt(len(pair)) * float(pair.std(ddof=1))


def _said(c: Candidate, rule: str, best: Candidate) -> str:
    label = c.label(rule)
    if c.kind != best.kind and not c.error:
        label += f"; its Bayes factor depends on the priors of noises: {c.kind} here, {best.kind} there"
    if c.believed is not None and not c.believed.determined:
        label += "; ranked by lml: some columns were never observed together, of which a fit says nothing"
    if np.isfinite(c.held_out):
        label += f"; ranked by hidden rows: {c.why_held_out}"
    return label


def _lost(candidate: Candidate, other: Candidate | None = None) -> tuple[Any, Any]:
    """Scores of rows by the fit to all of them, and held out; less those of another candidate by the same folds."""
    of_one: tuple[Any, Any] = candidate.at_fit, candidate.by_row
    return of_one if other is None else (of_one[0] - other.at_fit, of_one[1] - other.by_row)
