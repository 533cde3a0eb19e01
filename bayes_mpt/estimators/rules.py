"""The rules of evidence: which number ranks fitted candidates, whether they can be compared, and the number itself."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import BaseCrossValidator, KFold
from sklearn.pipeline import Pipeline

from bayes_mpt.diagnostics import BAD_K
from bayes_mpt.estimators.bayes_mpt import BayesMPT, move_to_map
from bayes_mpt.estimators.integrals import n_hyperparameters, noise_shape
from bayes_mpt.estimators.repeats import flat_direction, repeated_columns
from bayes_mpt.evidence.integrated import Integrated
from bayes_mpt.program.program import Observed, Program, list_names

__all__ = [
    "Candidate",
    "Facts",
    "before_final",
    "choose_rule",
    "final_step",
    "fit_seed",
    "give_evidence",
    "not_converged",
    "refuse_incomparable",
    "refuse_mixed_train",
    "refuse_unbounded",
    "token_digest",
]

MAX_INTEGRATED = 16  # hyper-parameters
N_TRIED = 64  # rows on which a density is tried for its width
WIDTH = (
    1e-3  # of the least spread of the rows; a density narrower than this where they have none is degenerate
)


@dataclass(frozen=True)
class Facts:
    """What the rules must know of a fitted model, in numbers and text: a file tells them without the model."""

    by_row: bool
    """Whether rows are independent."""
    remembers: bool
    """Whether new rows are predicted given those of the fit."""
    discrete: tuple[bool, ...]
    """Which kinds of tokens there are."""
    parameters: tuple[str, ...]
    """What is point-estimated."""
    n_hyperparameters: int | None
    """As `integrals.n_hyperparameters`."""
    rotates: bool
    """Whether loadings are declared free up to rotation."""
    complete: bool
    """Whether no cell was missing."""
    converged: bool
    """Whether the training ended by its own rule."""

    @classmethod
    def of(cls, model: BayesMPT) -> Facts:
        structure = model.predictor_.structure
        discrete = {isinstance(site, Observed) and site.discrete for site in structure.sites}
        return cls(
            by_row=bool(structure.by_row),
            remembers=bool(model.predictor_.remembers),
            discrete=tuple(sorted(discrete)),
            parameters=tuple(structure.parameters),
            n_hyperparameters=n_hyperparameters(model.fitted_),
            rotates=noise_shape(model.fitted_) is not None,
            complete=model.complete_,
            converged=model.converged_,
        )


@dataclass
class Candidate:
    """What one candidate's evaluation found."""

    estimator: Any = None
    """Fitted on all rows; a Pipeline or a BayesMPT. None of a network that was trained elsewhere, and while what the
    fit found is only known from a file."""
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
    known: Facts | None = None
    """Of the fitted model, where they were told; `facts` asks the model otherwise."""
    unfitted: Any = None
    """What is to be fitted, and what its fit has left in a file (``left``), while there is no ``estimator``."""
    left: dict[str, Any] | None = None
    taken_up: bool = False
    """Whether this is from a file, of the stage that it was last in."""

    @property
    def model(self) -> BayesMPT:
        return final_step(self.estimator)

    @property
    def facts(self) -> Facts:
        """What the rules must know of the fitted model."""
        if self.known is None:
            self.known = Facts.of(self.model)
        return self.known

    @property
    def is_evidence(self) -> bool:
        """Whether no parameter was point-estimated; those of a network always were."""
        return (self.estimator is not None or self.known is not None) and not self.facts.parameters

    def label(self, rule: str) -> str:
        """What to say of the number: the rule, or that nothing stands at an estimate; an error or a doubt instead."""
        return self.error or self.note or ("integrated" if rule == "train" and self.is_evidence else rule)

    def doubt(self, why: str) -> None:
        """Add what to be wary of, if there is anything."""
        self.note = "; ".join(filter(None, [self.note, why]))

    def take(self, found: Integrated) -> None:
        """An evidence with the hyper-parameters integrated."""
        self.evidence, self.se = found.log_evidence, found.se
        if found.pareto_k > BAD_K:
            self.doubt(f"integrated, but Pareto k {found.pareto_k:.2f}: se is unreliable")


def choose_rule(evidence: str, found: list[Candidate]) -> tuple[str, str]:
    """The rule that ranks, and why."""
    models = [c.facts for c in found]
    vectors = [m for m in models if not m.by_row]
    if evidence == "cumulative" and vectors:
        raise ValueError(
            "evidence='cumulative' needs independent rows: here they are tokens of one vector, and those of a block "
            "are scored one by one, not together. Use 'integrated' or 'heldout'"
        )
    if evidence == "heldout" and not all(m.remembers for m in vectors):
        raise ValueError(
            "evidence='heldout' needs independent rows, or observations that are one Gaussian vector: here rows are "
            "tokens of one vector, and none can be scored given the others. Use 'train'"
        )
    if evidence != "auto":
        return evidence, "asked for"
    if all(not m.parameters for m in models):
        return "train", "nothing is point-estimated: the LML is the evidence itself"
    sizes = [m.n_hyperparameters for m in models]
    if all(size is not None and size <= MAX_INTEGRATED for size in sizes):
        return "integrated", (
            f"every candidate offers a prior of its hyper-parameters, {MAX_INTEGRATED} at most: they are integrated, "
            "and predictions are at their maximum a posteriori"
        )
    if vectors and all(m.remembers for m in models):
        return "heldout", (
            "a candidate's hyper-parameters have no prior, or are many, so that they cannot be integrated: hidden rows "
            "are predicted, each given the visible ones"
        )
    if vectors:
        return "train", "rows are tokens of one vector, so none can be held out: the LML at its maximum"
    missing = any(not m.complete for m in models)
    if all(m.rotates for m in models) and not missing:
        return "laplace", "every candidate declares its loadings free up to rotation, and no cell is missing"
    why = (
        "cells are missing" if missing else "a candidate's point estimates have no declared prior or symmetry"
    )
    return "heldout", f"{why}, so that they cannot be integrated: hidden rows are predicted"


def refuse_incomparable(names: list[str], found: list[Candidate]) -> None:
    """All must score the same tokens, in the same units, in the same sense of a token."""
    kinds: dict[str, list[Any]] = {
        "meaning of a row (independent rows against one vector)": [c.facts.by_row for c in found],
        "tokens (other rows, features or scaling)": [c.tokens for c in found],
        "kind of token (codes that have probabilities against numbers that have densities)": [
            c.facts.discrete for c in found
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
    """The LML of some at a maximum over parameters, of others with nothing to maximise over."""
    fixed = [not c.facts.parameters for c in found]
    if any(fixed) and not all(fixed):
        others = [n for n, f in zip(names, fixed, strict=True) if f]
        raise ValueError(
            "not comparable by evidence='train': nothing is point-estimated in "
            f"{', '.join(map(repr, others))}, while the others are at their maximum over parameters. Use 'heldout'"
        )


def give_evidence(
    candidate: Candidate,
    X: Any,
    y: Any,
    rule: str,
    *,
    cv: int | BaseCrossValidator = 5,
    n_repeats: int = 1,
    visible_share: float = 0.5,
    seed: int = 0,
    random_state: int | None = None,
    to_map: bool = False,
) -> Candidate:
    """The candidate, which was fitted on X, with its evidence.

    Parameters
    ----------
    candidate : Candidate
        Changed in place; its estimator is not, unless ``to_map``.
    X, y : array-like
        What it was fitted on.
    rule : str
        As `choose_rule` returns it.
    cv, n_repeats, visible_share
        As in `bayes_mpt.MarginalLikelihoodSearch`.
    seed : int
        For the partitions of the rows.
    random_state : int, optional
        For the fits of folds, where the estimator has none.
    to_map : bool, default=False
        Whether "integrated" leaves the estimator at its maximum a posteriori.
    """
    # Densities of all candidates are of the same table: what stands before the model is fitted once, on all rows.
    X = before_final(candidate.estimator, X)
    model = candidate.model
    refuse_unbounded(model, X, y)
    if rule in ("laplace", "integrated", "train"):
        if rule == "laplace":
            candidate.evidence = model.laplace(X).log_evidence
        elif rule == "integrated":
            integrated = model.integrated(X, y)
            candidate.take(integrated)
            if to_map:
                move_to_map(model, X, y, integrated)
        else:  # what the fit found: an integral over all latents may have taken long
            candidate.evidence, candidate.se = (
                model.log_marginal_likelihood_,
                model.log_marginal_likelihood_se_,
            )
        if rule != "laplace":
            candidate.replicates = np.array([candidate.evidence])
        if model.predictor_.structure.by_row:
            candidate.by_row = np.asarray(model.score_samples(X, y))
        candidate.n_scored = 1.0 if candidate.by_row is None else float(len(candidate.by_row))
        candidate.splits = np.array([candidate.evidence / candidate.n_scored])
        return candidate
    splits = _folds if rule == "heldout" else _blocks
    by_row, replicates, means, n_cut_short = [], [], [], 0
    for repeat in range(n_repeats):
        total, count = np.zeros(len(X)), np.zeros(len(X))
        for train, test in splits(len(X), cv, visible_share, seed + repeat):
            fold = model.refit(_rows(X, train), _rows(y, train), random_state=random_state)
            n_cut_short += not fold.converged_
            score = fold.score_samples(_rows(X, test), _rows(y, test))
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
    return candidate


def not_converged(model: BayesMPT) -> str:
    """What to say of a training that did not end by its own rule; nothing of one that did."""
    if model.converged_:
        return ""
    return f"not converged after {model.n_iter_} iteration{'' if model.n_iter_ == 1 else 's'}"


def refuse_unbounded(model: BayesMPT, X: Any, y: Any = None) -> None:
    """Raise ValueError where the rows X do not vary in some direction and the fitted density has no width there.

    The likelihood grows without bound then. Fits with a closed form refuse such columns; one that climbs ends
    somewhere on the way, at thousands of nats.
    """
    structure = model.predictor_.structure
    cells = structure.scores_input or (isinstance(structure, Program) and structure.observed_argument == 0)
    codes = isinstance(structure, Program) and any(site.discrete for site in structure.sites)
    if not (structure.by_row and structure.parameters and cells) or codes or model.predictor_.own_masks:
        return
    with model.read_rows(X, y) as read:
        rows = read.value.double().cpu().numpy()
    if rows.shape[1] != model.n_features_in_:
        return
    constant = np.nanmin(rows, 0) == np.nanmax(rows, 0)
    step = flat_direction(rows)
    if constant.any():  # also where no row is complete
        unit = np.nanstd(rows, 0)
        step = np.where(constant, 1.0 if constant.all() else np.median(unit[~constant]), 0.0)
    if step is None:
        return
    some = np.unique(np.linspace(0, len(rows) - 1, N_TRIED).round().astype(int))
    here = _rows(X, some)
    lost = model.score_samples(here, _rows(y, some)) - model.score_samples(
        here + WIDTH * step, _rows(y, some)
    )
    if not np.nanmean(lost) > 0.5:
        return
    n_rows, n_columns = rows.shape
    observed = (~np.isnan(rows)).sum(0)
    which, found = "that are constant or repeat others", constant.nonzero()[0].tolist()
    if not found and (observed.min() == n_rows or (~np.isnan(rows)).all(1).sum() > n_columns):
        found = repeated_columns(rows)
    if not found:  # complete rows are too few to tell
        which = f"with the fewest observed cells ({observed.min()})"
        found = np.flatnonzero(observed == observed.min()).tolist()
    names = getattr(model, "feature_names_in_", np.arange(n_columns))[found]
    raise ValueError(
        f"the likelihood has no maximum: these rows (n_samples = {n_rows}, n_features = {n_columns}) do not vary in "
        f"some direction, and the fitted density has shrunk to zero width there. Columns {which}: "
        f"{list_names(repr(n) if isinstance(n, str) else str(n) for n in names)}. Drop them, or use fewer latents"
    )


def fit_seed(random_state: Any, drawn: int) -> int | None:
    """What a ``random_state`` gives to fits that have none, so that the same call ranks alike; ``drawn`` from it."""
    if random_state is None:
        return None
    return int(random_state) if isinstance(random_state, Integral) else drawn


def _folds(
    n: int, cv: int | BaseCrossValidator, visible_share: float, seed: int
) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    splitter: Any = cv
    if isinstance(cv, Integral):
        splitter = KFold(min(int(cv), n), shuffle=True, random_state=seed % 2**32)
    return list(splitter.split(np.empty((n, 1))))


def _blocks(
    n: int, cv: int | BaseCrossValidator, visible_share: float, seed: int
) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Rows in a random order, each block predicted from all rows before it."""
    if not isinstance(cv, Integral):
        raise ValueError(f"evidence='cumulative' takes an int for cv, the number of blocks, got {cv!r}")
    order = np.random.RandomState(seed % 2**32).permutation(n)
    edges = np.linspace(max(2, round(visible_share * n)), n, int(cv) + 1).round().astype(int)
    return [(order[:a], order[a:b]) for a, b in pairwise(edges) if b > a]


def _rows(a: Any, index: NDArray[Any]) -> Any:
    if a is None:
        return None
    return a.iloc[index] if hasattr(a, "iloc") else np.asarray(a)[index]


def final_step(estimator: Any) -> Any:
    """The model: an estimator itself, or what a Pipeline ends in."""
    return estimator[-1] if isinstance(estimator, Pipeline) else estimator


def before_final(estimator: Any, X: Any) -> Any:
    """X as the model sees it."""
    if isinstance(estimator, Pipeline):
        # Step by step: a Pipeline cut before its model would ask its last step whether it is fitted, which one that
        # learns nothing need not answer.
        for _, step in estimator.steps[:-1]:
            if step is not None and step != "passthrough":
                X = step.transform(X)
    return X


def token_digest(estimator: Any, X: Any, y: Any) -> str:
    """Fingerprint of the tokens that are scored, the same whether a model takes them in single or double precision."""
    with final_step(estimator).read_rows(before_final(estimator, X), y) as read:
        rows = read.value
        shape = repr(tuple(rows.shape)).encode()
        return hashlib.sha256(shape + rows.float().cpu().numpy().tobytes()).hexdigest()[:16]
