"""Compare marginal likelihoods: what is comparable, by which rule, and the table.

Two errors stand in the table and are never mixed: ``mc_dse`` is the numerical error of a difference, ``dse`` its spread
over new rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from bayes_mpt.estimator import BayesMPT
from bayes_mpt.hyperparameters import Integrated
from bayes_mpt.predictors.errors import replicate_error
from bayes_mpt.predictors.importance import BAD_K
from bayes_mpt.tracing import Observed

__all__ = ["Candidate", "compare"]

MAX_INTEGRATED = 16  # hyper-parameters


@dataclass
class Candidate:
    """What one candidate's evaluation found."""

    estimator: Any = None
    """Fitted on all rows; a Pipeline or a BayesMPT. None of a network that was trained elsewhere."""
    evidence: float = math.nan
    """Total nats."""
    by_row: NDArray[np.float64] | None = None
    """(N,) nats: what the rows contribute; None without a rows plate."""
    replicates: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """(R,) evidence by repeat of the folds."""
    se: float = 0.0
    """Numerical error of the evidence that one evaluation states of itself; 0 where exact."""
    n_scored: float = math.nan
    """Rows that the evidence is a sum over."""
    splits: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """Mean nats a row by split."""
    tokens: str = ""
    """Fingerprint of what was scored."""
    fit_time: float = 0.0
    score_time: float = 0.0
    error: str = ""
    note: str = ""
    """What to be wary of."""

    @property
    def model(self) -> BayesMPT:
        return final_step(self.estimator)

    @property
    def is_evidence(self) -> bool:
        """Whether no parameter was point-estimated; those of a network always were."""
        return self.estimator is not None and not self.model.predictor_.structure.parameters

    def take(self, found: Integrated) -> None:
        """An evidence with the hyper-parameters integrated."""
        self.evidence, self.se = found.log_evidence, found.se
        if found.pareto_k > BAD_K:
            self.note = f"integrated, but Pareto k {found.pareto_k:.2f}: se is unreliable"


def compare(
    estimators: Mapping[str, Any],
    X: ArrayLike,
    y: Any = None,
    *,
    evidence: Literal["auto", "laplace", "integrated", "heldout", "train"] = "auto",
) -> pd.DataFrame:
    """Rank models that were fitted by hand, in the same table as `MarginalLikelihoodSearch.comparison_`.

    Parameters
    ----------
    estimators : dict of name to fitted BayesMPT or Pipeline
        All fitted on X, or none of them.
    X : array-like of shape (N, T)
        Rows to compare on.
    y : array-like, optional
        As in `BayesMPT.fit`.
    evidence : {"auto", "laplace", "integrated", "heldout", "train"}, default="auto"
        "heldout" scores X as new rows: no model may have been fitted on them. "auto" is "laplace" where all models
        were fitted on X and declare their symmetries, "integrated" where they offer a prior of their few
        hyper-parameters, "train" where they were fitted on X otherwise, else "heldout".

    Returns
    -------
    DataFrame
        Best first; see `MarginalLikelihoodSearch`.

    Raises
    ------
    ValueError
        If the numbers are not comparable, with the offenders' names: another scaling, other features, other training
        rows, another thing integrated.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from bayes_mpt.models import PPCA, FactorAnalysis
    >>> X = load_iris().data
    >>> fitted = {"ppca": BayesMPT(PPCA(2)).fit(X), "fa": BayesMPT(FactorAnalysis(1)).fit(X)}
    >>> list(compare(fitted, X).index)
    ['ppca', 'fa']
    """
    if not estimators:
        raise ValueError("nothing to compare: got an empty dict")
    if evidence not in ("auto", "laplace", "integrated", "heldout", "train"):
        raise ValueError(
            f"evidence must be 'auto', 'laplace', 'integrated', 'heldout' or 'train', got {evidence!r}"
        )
    names, found = list(estimators), []
    for name, estimator in estimators.items():
        check_is_fitted(final_step(estimator), msg=f"{name!r} is not fitted: call fit first")
        try:
            by_row, se = final_step(estimator).score_rows(before_final(estimator, X), y)
        except ValueError as error:
            raise ValueError(f"{name!r} cannot be compared on these rows: {error}") from error
        tokens = token_digest(estimator, X, y)
        found.append(Candidate(estimator, float(by_row.sum()), by_row, se=se, tokens=tokens))
    refuse_incomparable(names, found)
    by_parts = [n for n, c in zip(names, found, strict=True) if not c.model.data_digest_]
    if by_parts:
        raise ValueError(
            f"{', '.join(map(repr, by_parts))} were fitted by partial_fit, so it is not known whether these rows were "
            "among theirs: fit all on the same rows at once"
        )
    trained = [_trained_on(c.model, before_final(c.estimator, X)) for c in found]
    if any(trained) and not all(trained):
        others = [n for n, t in zip(names, trained, strict=True) if not t]
        raise ValueError(
            f"{', '.join(map(repr, others))} were not fitted on these rows and the rest were: fit all on the same "
            "rows, or compare all on new ones"
        )
    if evidence == "auto":
        rule = "heldout" if not all(trained) else choose_rule("auto", found)[0]
        rule = "train" if rule == "heldout" and all(trained) else rule
    else:
        rule = choose_rule(evidence, found)[0]
    if rule == "heldout" and any(trained):
        raise ValueError("evidence='heldout' needs new rows: the models were fitted on these")
    if rule != "heldout" and not all(trained):
        raise ValueError(f"evidence={rule!r} needs the rows that the models were fitted on: got others")
    if rule == "train":
        refuse_mixed_train(names, found)
    if rule == "laplace":
        for c in found:
            c.evidence = c.model.laplace(before_final(c.estimator, X)).log_evidence
    if rule == "integrated":
        for c in found:
            c.take(c.model.integrated(before_final(c.estimator, X), y))
    if rule != "heldout":
        for c in found:
            if not c.model.predictor_.structure.by_row:
                c.by_row = None
    if rule == "train":
        for c in found:
            c.evidence, c.se = c.model.log_marginal_likelihood_, c.model.log_marginal_likelihood_se_
    if rule != "laplace":
        for c in found:
            c.replicates = np.array([c.evidence])
    return comparison_table(names, found, rule)


def choose_rule(evidence: str, found: list[Candidate]) -> tuple[str, str]:
    """The rule that ranks, and why."""
    models = [c.model for c in found]
    vectors = [m for m in models if not m.predictor_.structure.by_row]
    if evidence == "cumulative" and vectors:
        raise ValueError(
            "evidence='cumulative' needs independent rows: here they are tokens of one vector, and those of a block "
            "are scored one by one, not together. Use 'integrated' or 'heldout'"
        )
    if evidence == "heldout" and not all(m.predictor_.remembers for m in vectors):
        raise ValueError(
            "evidence='heldout' needs independent rows, or observations that are one Gaussian vector: here rows are "
            "tokens of one vector, and none can be scored given the others. Use 'train'"
        )
    if evidence != "auto":
        return evidence, "asked for"
    if all(not m.predictor_.structure.parameters for m in models):
        return "train", "nothing is point-estimated: the LML is the evidence itself"
    sizes = [m.n_hyperparameters() for m in models]
    if all(size is not None and size <= MAX_INTEGRATED for size in sizes):
        return "integrated", (
            f"every candidate offers a prior of its hyper-parameters, {MAX_INTEGRATED} at most: they are integrated, "
            "and predictions are at their maximum a posteriori"
        )
    if vectors and all(m.predictor_.remembers for m in models):
        return "heldout", (
            "a candidate's hyper-parameters have no prior, or are many, so that they cannot be integrated: hidden rows "
            "are predicted, each given the visible ones"
        )
    if vectors:
        return "train", "rows are tokens of one vector, so none can be held out: the LML at its maximum"
    missing = any(not m.complete_ for m in models)
    if all(m.noise_shape() is not None for m in models) and not missing:
        return "laplace", "every candidate declares its loadings free up to rotation, and no cell is missing"
    why = (
        "cells are missing" if missing else "a candidate's point estimates have no declared prior or symmetry"
    )
    return "heldout", f"{why}, so that they cannot be integrated: hidden rows are predicted"


def refuse_incomparable(names: list[str], found: list[Candidate]) -> None:
    """All must score the same tokens, in the same units, in the same sense of a token."""
    kinds: dict[str, list[Any]] = {
        "meaning of a row (independent rows against one vector)": [
            c.model.predictor_.structure.by_row for c in found
        ],
        "tokens (other rows, features or scaling)": [c.tokens for c in found],
        "kind of token (codes that have probabilities against numbers that have densities)": [
            {isinstance(site, Observed) and site.discrete for site in c.model.predictor_.structure.sites}
            for c in found
        ],
    }
    for what, values in kinds.items():
        common = max(values, key=values.count)
        others = [n for n, v in zip(names, values, strict=True) if v != common]
        if others:
            raise ValueError(
                f"not comparable: {', '.join(map(repr, others))} differ from the rest in their {what}. Marginal "
                "likelihoods can only be compared as densities of the same numbers"
            )


def refuse_mixed_train(names: list[str], found: list[Candidate]) -> None:
    fixed = [not c.model.predictor_.structure.parameters for c in found]
    if any(fixed) and not all(fixed):
        others = [n for n, f in zip(names, fixed, strict=True) if f]
        raise ValueError(
            "not comparable by evidence='train': nothing is point-estimated in "
            f"{', '.join(map(repr, others))}, while the others are at their maximum over parameters. Use 'heldout'"
        )


def comparison_table(names: list[str], found: list[Candidate], rule: str) -> pd.DataFrame:
    """The table, best first; `MarginalLikelihoodSearch` says what the columns are."""
    lml = np.array([c.evidence for c in found])
    order = np.argsort(np.where(np.isnan(lml), -np.inf, lml) * -1, kind="stable")
    best = found[order[0]]
    diff = lml - best.evidence
    mc_dse, dse, se = (np.full(len(found), math.nan) for _ in range(3))
    for i, c in enumerate(found):
        if c.error:
            continue
        exact = rule in ("train", "integrated") or (
            rule == "heldout" and len(c.replicates) == 1 and not len(c.splits)
        )
        if exact:
            se[i] = c.se  # draws of their own; too wide a difference where candidates share a seed
            mc_dse[i] = 0.0 if c is best else math.hypot(c.se, best.se)
        elif rule in ("heldout", "cumulative"):
            mc_dse[i] = replicate_error(c.replicates - best.replicates)
            se[i] = replicate_error(c.replicates)
        if c.by_row is not None and best.by_row is not None and len(c.by_row) > 1 and c is not best:
            pair = (c.by_row - best.by_row)[~np.isnan(c.by_row)]
            dse[i] = math.sqrt(len(pair)) * pair.std(ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        p_worse = norm.cdf(-np.abs(diff) / mc_dse)
    p_worse[order[0]] = math.nan
    evidence = rule in ("laplace", "integrated", "cumulative") or all(
        c.is_evidence for c in found if not c.error
    )
    weight = np.exp(diff) / np.nansum(np.exp(diff)) if evidence else np.full(len(found), math.nan)
    frame = pd.DataFrame(
        {
            "rank": np.arange(len(found)),
            "lml": lml[order],
            "lml_diff": diff[order],
            "mc_dse": mc_dse[order],
            "p_worse": p_worse[order],
            "dse": dse[order],
            "weight": weight[order],
            "log_bayes_factor": diff[order] if evidence else math.nan,
            "se": se[order],
            "diag": [found[i].error or found[i].note or rule for i in order],
        },
        index=pd.Index([names[i] for i in order], name="candidate"),
    )
    return frame


def final_step(estimator: Any) -> Any:
    return estimator[-1] if isinstance(estimator, Pipeline) else estimator


def before_final(estimator: Any, X: Any) -> Any:
    """X as the model sees it."""
    return estimator[:-1].transform(X) if isinstance(estimator, Pipeline) and len(estimator) > 1 else X


def token_digest(estimator: Any, X: Any, y: Any) -> str:
    """Fingerprint of the tokens that are scored, the same whether a model takes them in single or double precision."""
    with final_step(estimator).read_rows(before_final(estimator, X), y) as (_, rows):
        shape = repr(tuple(rows.shape)).encode()
        return hashlib.sha256(shape + rows.float().cpu().numpy().tobytes()).hexdigest()[:16]


def _trained_on(model: BayesMPT, X: Any) -> bool:
    return model.data_digest_ == model.digest(X)
