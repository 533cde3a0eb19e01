"""Compare models that were fitted by hand: what is comparable, and by which rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from bayes_mpt.estimators.bayes_mpt import BayesMPT
from bayes_mpt.estimators.candidates import (
    Candidate,
    before_final,
    final_step,
    model_in,
    not_converged,
    token_digest,
    unchecked,
)
from bayes_mpt.estimators.checked import checked
from bayes_mpt.estimators.refits import HeldOut
from bayes_mpt.estimators.rows import data_digest
from bayes_mpt.estimators.rules import (
    Auto,
    Rule,
    Train,
    choose_rule,
    common_prior,
    fit_seed,
    give_evidence,
    refuse_incomparable,
    refuse_mixed_train,
    refuse_other_priors,
    rule_of,
)
from bayes_mpt.estimators.table import comparison_table
from bayes_mpt.inputs import unmasked

__all__ = ["compare"]


def compare(
    estimators: Mapping[str, Any],
    X: ArrayLike,
    y: Any = None,
    *,
    evidence: str | Rule | Auto = "auto",
    random_state: int | np.random.RandomState | None = None,
) -> pd.DataFrame:
    """Rank models that were fitted by hand, in the same table as `MarginalLikelihoodSearch.comparison_`.

    On the rows that the models were fitted on, this does what a search over them would do. On new rows it ranks by
    their log predictive, which no model has seen.

    Parameters
    ----------
    estimators : dict of name to fitted BayesMPT or Pipeline
        All fitted on X, or none of them. They are left as they are.
    X : array-like of shape (N, T)
        Rows to compare on.
    y : array-like, optional
        As in `BayesMPT.fit`.
    evidence : str or rule of evidence, default="auto"
        `Laplace`, `Integrated`, `Bic`, `HeldOut`, `Train` or `Auto`; a name in lower case stands for a rule's defaults.
        On the training rows "auto" is that of `MarginalLikelihoodSearch`: "integrated" where all models declare their
        symmetries or offer a prior of their few hyper-parameters, "laplace" where a factor model is too large, else
        "heldout", which fits each model again for each fold. "train", the LML at its maximum, rises with every
        surplus parameter: it is taken by itself only where nothing is point-estimated, and then is the evidence.
        On new rows "auto" is "heldout", which scores them as they are.
    random_state : int, RandomState or None
        For the partitions, and for fits in folds whose estimator has none.

    Returns
    -------
    DataFrame
        Best first; see `MarginalLikelihoodSearch`. Its ``attrs`` hold the rule that was taken, "evidence", and why,
        "reason".

    Raises
    ------
    ValueError
        If the numbers are not comparable, with the offenders' names: another scaling, other features, other training
        rows, another thing integrated. If parameters are point-estimated and no row can be held out: then only
        ``evidence="train"`` is left, and is to be asked for.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from bayes_mpt.models import PPCA, FactorAnalysis
    >>> X = load_iris().data
    >>> fitted = {"ppca": BayesMPT(PPCA(2)).fit(X), "fa": BayesMPT(FactorAnalysis(1)).fit(X)}
    >>> table = compare(fitted, X)
    >>> list(table.index), table.attrs["evidence"]
    (['ppca', 'fa'], 'integrated')
    """
    if not isinstance(estimators, Mapping):
        raise TypeError(
            "compare takes models by name: estimators must be a dict of names and fitted estimators, such as "
            f"{{'first': first, 'second': second}}, got {type(estimators).__name__}"
        )
    if not estimators:
        raise ValueError("nothing to compare: got an empty dict")
    X, y = unmasked(X), unmasked(y)
    asked = rule_of(evidence)
    if asked.name == "cumulative":
        raise ValueError("evidence='cumulative' is of a search, which fits to few rows first: use 'heldout'")
    names, found = list(estimators), []
    for name, estimator in estimators.items():
        model_in(estimator, repr(name))
        check_is_fitted(final_step(estimator), msg=f"{name!r} is not fitted: call fit first")
        try:
            candidate = Candidate(estimator, tokens=token_digest(estimator, X, y))
        except ValueError as error:
            raise ValueError(f"{name!r} cannot be compared on these rows: {error}") from error
        candidate.doubt(not_converged(final_step(estimator)))
        candidate.doubt(unchecked(final_step(estimator)))
        found.append(candidate)
    refuse_incomparable(names, found)
    seen = _all_trained_on(names, found, X)
    rule, why = _rule(asked, found, seen)
    if rule.name == "train":
        refuse_mixed_train(names, found)
    seed = int(check_random_state(random_state).randint(2**31 - 1))
    own_state = fit_seed(random_state, seed)
    factors = next((c for c in found if c.facts.rotates), None)
    sampled = seen and factors is not None and rule.name == "integrated"
    prior = common_prior(factors, X) if sampled and factors is not None else None
    for i, c in enumerate(found):
        if not seen:
            _score_new_rows(c, X, y)
            continue
        try:
            give_evidence(c, X, y, rule, seed=seed, random_state=own_state, prior=prior)
        except Exception as error:
            found[i] = Candidate(c.estimator, error=f"{type(error).__name__}: {error}")
    if all(c.error for c in found):
        raise ValueError(f"all {len(found)} models failed; the first one: {found[0].error}")
    refuse_other_priors(names, found)
    ranking = checked(found, rule, asked, X, y, seed=seed, random_state=own_state) if seen else None
    table = comparison_table(names, found, rule.name, ranking)
    table.attrs |= {"evidence": rule.name, "reason": why}
    return table


def _all_trained_on(names: list[str], found: list[Candidate], X: Any) -> bool:
    """Whether all models were fitted on these rows, or none; where nothing was estimated, rows are as good as new."""
    if all(_is_integral(c) for c in found):
        return all(_trained_on(c, X) for c in found)
    by_parts = [n for n, c in zip(names, found, strict=True) if not c.model.data_digest_]
    if by_parts:
        raise ValueError(
            f"{', '.join(map(repr, by_parts))} were fitted by partial_fit, so it is not known whether these rows were "
            "among theirs: fit all on the same rows at once"
        )
    trained = [_trained_on(c, X) for c in found]
    if any(trained) and not all(trained):
        others = [n for n, t in zip(names, trained, strict=True) if not t]
        raise ValueError(
            f"the rows are those of the fits of some, and not of {', '.join(map(repr, others))}: fit all on the same "
            "rows, or compare all on new ones"
        )
    return all(trained)


def _rule(asked: Rule | Auto, found: list[Candidate], seen: bool) -> tuple[Rule, str]:
    """The rule that ranks, and why; ``seen``: the models were fitted on the rows."""
    if seen:
        rule, why = choose_rule(asked, found)
        if asked.name == "auto" and rule.name == "train" and not all(c.is_evidence for c in found):
            raise ValueError(
                f"{why}, by which models that differ in their parameters are not to be ranked. Ask for "
                "evidence='train' if that is what you want, or compare on new rows"
            )
        return rule, why
    if all(_is_integral(c) for c in found) and asked.name in ("auto", "train"):
        return Train(), "nothing is point-estimated: the LML is the evidence itself"
    if asked.name == "auto":
        return HeldOut(), "none of the models was fitted on these rows: they are predicted"
    rule, why = choose_rule(asked, found)
    if rule.name != "heldout":
        raise ValueError(f"evidence={rule.name!r} needs the rows that the models were fitted on: got others")
    return rule, why


def _is_integral(candidate: Candidate) -> bool:
    """Whether the score of any rows is their evidence, whatever rows the model has seen."""
    return candidate.is_evidence and not candidate.model.predictor_.structure.gaussian_vector


def _score_new_rows(candidate: Candidate, X: Any, y: Any) -> None:
    rows, candidate.se = candidate.model.score_rows(before_final(candidate.estimator, X), y)
    candidate.evidence = float(np.nansum(rows))  # of a missing y there is none
    candidate.replicates = np.array([candidate.evidence])
    candidate.by_row = rows


def _trained_on(candidate: Candidate, X: Any) -> bool:
    model: BayesMPT = candidate.model
    return model.data_digest_ == data_digest(before_final(candidate.estimator, X))
