"""Average the candidates of a search in place of choosing one: a mixture of what each predicts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logsumexp, softmax
from sklearn.base import BaseEstimator, DensityMixin, clone
from sklearn.pipeline import Pipeline
from sklearn.utils import get_tags
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted, validate_data

from bayes_mpt.estimators.candidates import Candidate, before_final
from bayes_mpt.estimators.members import YPredictive, fit_of, posterior_of
from bayes_mpt.estimators.odds import equal_odds, given_odds
from bayes_mpt.estimators.rows import dtype_of, refuse_far, warn_of_far
from bayes_mpt.estimators.rules import refuse_incomparable, refuse_other_priors
from bayes_mpt.estimators.stacking import cross_fitted, log_mixture, stacked_weights
from bayes_mpt.evidence.predictive import RowPredictive
from bayes_mpt.inputs import like_table, read_table
from bayes_mpt.program.program import list_names
from bayes_mpt.runtime.digests import CannotDigest, digest_of
from bayes_mpt.runtime.serial import methods_take_turns
from bayes_mpt.warnings import DrawsWarning, LeftOutWarning, warn

__all__ = ["ModelAverage"]

MAX_WEIGHT_SE = 0.1  # of a weight, from the errors of the evidences, beyond which it is said


@methods_take_turns(store=True, but=("fit",))
class ModelAverage(DensityMixin, BaseEstimator):
    """The candidates of a search averaged: a mixture of what each predicts (`MarginalLikelihoodSearch.average`).

    Parameters
    ----------
    search : MarginalLikelihoodSearch
        Whose candidates `fit` averages. It is cloned: a search that is fitted already has `average`.
    weights : "evidence" or "stacking", default="evidence"
        "evidence" weighs posterior predictives by evidence and prior odds: factor models as
        ``BayesMPT(average="posterior")``, Gaussian processes over the nodes that their hyper-parameters were integrated
        over. "stacking" weighs the fits so that their mixture predicts the rows best that ``evidence="heldout"`` hides:
        Gaussian mixtures too, whose evidence gives no weights.
    prior_weights : dict by candidate or array of shape (J,), optional
        Prior odds of evidence weights. By default classes of models are equal, in a class the numbers of latents,
        components or classes, and of each number the candidates.

    Attributes
    ----------
    weights_ : array of shape (J,)
        Adding up to one.
    candidate_names_ : list of str
        Whose they are; names as in ``comparison_``.
    prior_weights_ : array of shape (J,), or None
        Prior probabilities; None of stacking, which has none.
    left_out_ : dict
        Candidates that failed, and why.
    members_ : list
        What is mixed.
    heldout_score_, heldout_se_ : float
        Of stacking: mean nats a row of the mixture on hidden rows, by weights that were fitted to other folds, and its
        standard error over rows.
    heldout_gain_, heldout_gain_se_ : float
        The same less that of the candidate that is best on those other folds: above zero, averaging pays.
    n_features_in_, feature_names_in_
        As in scikit-learn.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from bayes_mpt import BayesMPT, MarginalLikelihoodSearch
    >>> from bayes_mpt.models import PPCA
    >>> X = load_iris().data
    >>> search = MarginalLikelihoodSearch(BayesMPT(PPCA(1)), {"model__n_components": [1, 2, 3]}).fit(X)
    >>> both = search.average()
    >>> both.candidate_names_, both.score_samples(X).shape
    (['n_components=1', 'n_components=2', 'n_components=3'], (150,))
    """

    members_: list[Any]

    def __init__(
        self,
        search: Any,
        *,
        weights: Literal["evidence", "stacking"] = "evidence",
        prior_weights: Mapping[str, float] | ArrayLike | None = None,
    ):
        self.search = search
        self.weights = weights
        self.prior_weights = prior_weights

    def fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Search on X (N, T), and average what is found.

        Raises
        ------
        ValueError
            As `MarginalLikelihoodSearch.average`.
        """
        self._check_settings()
        return self._of(clone(self.search).fit(X, y))

    def _of(self, search: Any) -> Self:
        """Fitted: the average of a search that is."""
        self._check_settings()
        found = search._settled() if self.weights == "stacking" else search._candidates()
        names = search.candidate_names_
        failed = {n: c.error for n, c in zip(names, found, strict=True) if c.error}
        kept = [i for i, c in enumerate(found) if not c.error]
        some, candidates = [names[i] for i in kept], [found[i] for i in kept]
        if len(kept) < 2:
            said = f"; left out: {_said(failed)}" if failed else ""
            raise ValueError(f"an average needs two candidates, got {some[0]!r} alone{said}")
        refuse_incomparable(some, candidates)
        if self.weights == "evidence":
            refuse_other_priors(some, candidates)
            members = _posteriors(some, candidates, search.evidence_)
            prior = self.prior_weights
            odds = equal_odds(candidates) if prior is None else given_odds(prior, names, kept)
            with np.errstate(divide="ignore"):
                log_weights = np.array([c.evidence for c in candidates]) + np.log(odds)
            weights, reported = softmax(log_weights), {}
            _warn_of_errors(some, log_weights, np.array([c.se for c in candidates]))
        else:
            scores, split = _hidden(some, candidates, search.evidence_)
            members, odds = [fit_of(c) for c in candidates], None
            rows = scores[~np.isnan(scores).any(2)]  # of all repeats
            weights, reported = stacked_weights(rows), _reported(*cross_fitted(scores, split))
        before = _steps_before(some, candidates, self.weights)
        if failed:
            warn(f"left out of the average: {_said(failed)}", LeftOutWarning)
        for name in [n for n in vars(self) if n.endswith("_")]:
            delattr(self, name)
        self.weights_, self.prior_weights_ = weights, odds
        self.candidate_names_, self.left_out_, self.members_ = some, failed, members
        self._before = before
        self.n_features_in_ = search.n_features_in_
        if hasattr(search, "feature_names_in_"):
            self.feature_names_in_ = search.feature_names_in_
        self.__dict__.update(reported)
        return self

    # ------------------------------------------------------------------------------------------------ what it says

    def score_samples(self, X: ArrayLike, y: Any = None) -> NDArray[np.float64]:
        """Log density of each row's observed cells, or of its y, alone, under the mixture: nats (N,).

        Each row is predicted from the rows of the fit. The sum over rows is not the log density of all of them
        together: that would learn from one row for the next.
        """
        return log_mixture(self._log_prob(X, y).T, self.weights_)

    def score(self, X: ArrayLike, y: Any = None) -> float:
        """Mean of `score_samples`, nats a row."""
        return float(self.score_samples(X, y).mean())

    @available_if(lambda self: self._mixes(rows=True))
    def sample(self, n_samples: int = 1, random_state: int | np.random.Generator | None = 0) -> NDArray[Any]:
        """Draw rows: each from a candidate that is drawn by its weight. (n_samples, T), the same for the same seed."""
        check_is_fitted(self)
        if not isinstance(n_samples, int | np.integer) or n_samples < 1:
            raise ValueError(f"n_samples must be an integer of at least 1, got {n_samples!r}")
        rng = np.random.default_rng(random_state)
        drawn = rng.choice(len(self.weights_), size=int(n_samples), p=self.weights_)
        out = np.empty((int(n_samples), self.n_features_in_))
        for j, member in enumerate(self.members_):
            count = int((drawn == j).sum())
            if count:
                out[drawn == j] = member.sample(count, rng)
        return out

    @available_if(lambda self: self._mixes(rows=True))
    def impute(self, X: ArrayLike, return_std: bool = False) -> Any:
        """X with its NaN cells replaced by their means given the observed cells of the row; a DataFrame of a DataFrame.

        These cells also tell which candidate the row goes with: its weight is w_j p_j(observed cells). With
        ``return_std`` also the standard deviations (N, T), 0 where observed, by the law of total variance, where all
        candidates have theirs.
        """
        rows = self._rows(X)
        log_prob = np.array([member.log_prob(rows) for member in self.members_])
        with np.errstate(divide="ignore"):
            logits = log_prob + np.log(self.weights_)[:, None]
        with np.errstate(invalid="ignore"):
            share = softmax(logits, axis=0)[:, :, None]  # (J, N, 1)
        means, variances = zip(*(member.fill(rows) for member in self.members_), strict=True)
        mean, hidden = (share * np.array(means)).sum(0), np.isnan(rows)
        refuse_far(mean, rows, self._names)
        filled = like_table(X, np.where(hidden, mean, rows).astype(dtype_of(X), copy=False))
        if not return_std:
            return filled
        return filled, like_table(X, np.where(hidden, self._spread(share, mean, means, variances), 0.0))

    @available_if(lambda self: self._mixes(rows=False))
    def predict(self, X: ArrayLike, return_std: bool = False) -> Any:
        """Means of y for new rows X (M,); with ``return_std`` also the standard deviations, noise included.

        These are by the law of total variance, where all candidates have theirs.
        """
        rows = self._rows(X)
        means, variances = zip(*(member.moments(rows) for member in self.members_), strict=True)
        mean = self.weights_ @ np.array(means)
        return (mean, self._spread(self.weights_[:, None], mean, means, variances)) if return_std else mean

    # ----------------------------------------------------------------------------------------------------- helpers

    def _check_settings(self) -> None:
        if not hasattr(self.search, "_candidates"):
            raise ValueError(
                f"search must be a MarginalLikelihoodSearch, whose candidates are averaged, got {self.search!r}"
            )
        if self.weights not in ("evidence", "stacking"):
            raise ValueError(f"weights must be 'evidence' or 'stacking', got {self.weights!r}")
        if self.weights == "stacking" and self.prior_weights is not None:
            raise ValueError(
                "prior_weights go with weights='evidence': stacking has no prior odds, leave it None"
            )

    def _rows(self, X: ArrayLike) -> NDArray[Any]:
        """X as the models see it."""
        check_is_fitted(self)
        if self._before is not None:
            X = before_final(self._before, X)
            return np.asarray(X, dtype=np.float64)
        kinds = [np.float64, np.float32]
        return validate_data(self, read_table(X), reset=False, dtype=kinds, ensure_all_finite="allow-nan")

    @property
    def _names(self) -> Any:
        return getattr(self, "feature_names_in_", range(self.n_features_in_))

    def _log_prob(self, X: ArrayLike, y: Any) -> NDArray[np.float64]:
        """Nats (J, N) of each row under each candidate."""
        rows = self._rows(X)
        if hasattr(self.members_[0], "fill"):  # of rows
            found = np.array([member.log_prob(rows) for member in self.members_])
            warn_of_far(found.max(0), rows, self._names)
            return found
        if y is None:
            raise ValueError("the candidates score y given X: pass y")
        return np.array([member.log_prob(rows, y) for member in self.members_])

    def _mixes(self, *, rows: bool) -> bool:
        """Whether the candidates are of rows, else of y; before `fit`, what the search may find."""
        if not hasattr(self, "members_"):
            return hasattr(self.search, "sample" if rows else "predict")
        if not rows:
            return hasattr(self.members_[0], "moments")
        return hasattr(self.members_[0], "fill") and self._before is None  # cells of X itself

    def _spread(self, share: Any, mean: Any, means: Any, variances: Any) -> NDArray[np.float64]:
        """sqrt(sum_j w_j (v_j + (m_j - m)^2))."""
        lacking = [n for n, v in zip(self.candidate_names_, variances, strict=True) if v is None]
        if lacking:
            raise ValueError(
                f"return_std needs a standard deviation of every candidate, and {list_names(map(repr, lacking))} "
                "told none: leave it False"
            )
        return np.asarray(np.sqrt((share * (np.array(variances) + np.square(np.array(means) - mean))).sum(0)))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        inner = get_tags(self.search)
        tags.input_tags, tags.target_tags = inner.input_tags, inner.target_tags
        return tags


def _said(failed: dict[str, str]) -> str:
    return "; ".join(f"{name!r} ({error})" for name, error in failed.items())


def _posteriors(names: list[str], found: list[Candidate], rule: str) -> list[RowPredictive | YPredictive]:
    """The posterior predictive of every candidate."""
    mixtures = [n for n, c in zip(names, found, strict=True) if c.facts.mixture]
    if mixtures and rule == "integrated":
        raise ValueError(
            f"the evidence of Gaussian mixtures, {list_names(map(repr, mixtures))}, gives no weights: those of numbers "
            "of components are far too sure. Search with evidence='heldout' for weights='stacking'"
        )
    known = [posterior_of(c) if rule == "integrated" or c.is_evidence else None for c in found]
    members = [member for member in known if member is not None]
    if len(members) < len(known):
        lacking = [n for n, member in zip(names, known, strict=True) if member is None]
        remedy = (
            "use weights='stacking'"
            if rule == "heldout"
            else "search with evidence='integrated', or with evidence='heldout' for weights='stacking'"
        )
        raise ValueError(
            f"weights='evidence' mixes posterior predictives by their evidence, and evidence={rule!r} leaves of "
            f"{list_names(map(repr, lacking))} a fit at its maximum, which pays for what an integral hardly notices: "
            f"{remedy}"
        )
    return members


def _warn_of_errors(names: list[str], log_weights: NDArray[np.float64], se: NDArray[np.float64]) -> None:
    """Where the errors of the evidences leave the weights open.

    With l_j the log of a weight before it is normalised, w_j = expit(l_j - log sum_k!=j exp l_k). That difference has,
    to first order, the variance se_j^2 + sum_k!=j (w_k / (1 - w_j))^2 se_k^2.
    """
    open_ = []
    for j in np.flatnonzero(np.isfinite(log_weights)):
        others = np.isfinite(log_weights) & (np.arange(len(names)) != j)
        if others.any():
            logit = log_weights[j] - logsumexp(log_weights[others])
            error = math.hypot(se[j], *(softmax(log_weights[others]) * se[others]))
            error = math.inf if math.isnan(error) else error  # it is not known
            low, high = expit([logit - 2 * error, logit + 2 * error])
            if high - low > 4 * MAX_WEIGHT_SE:
                open_.append(f"{names[j]!r} (se {se[j]:.2g} nats, weight {low:.2f} to {high:.2f})")
    if open_:
        warn(
            f"weights='evidence': the errors of the evidences leave open how much goes to {list_names(open_)}. Search "
            "with a smaller error, evidence=Integrated(se=0.05), or with evidence='heldout' for weights='stacking'",
            DrawsWarning,
        )


def _hidden(
    names: list[str], found: list[Candidate], rule: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores (R, N, J) of hidden rows by all candidates, and the folds (R, N) of the rows."""
    if rule != "heldout":
        raise ValueError(
            f"weights='stacking' needs scores of rows that a fit has not seen, and evidence={rule!r} hides none: "
            "search with evidence='heldout', or HeldOut(cv=10), say"
        )
    split = found[0].split
    if split is None or any(c.split is None or c.hidden is None for c in found):
        raise ValueError(
            "weights='stacking' needs each row hidden once a repeat, and this splitter hides some more than once: use "
            "HeldOut(cv=10), or a splitter such as KFold"
        )
    if all(len(np.unique(s[~np.isnan(s)])) < 2 for s in split):
        raise ValueError(
            "weights='stacking' are fitted and reported on different folds, and this splitter makes one: use HeldOut()"
        )
    scores = np.stack([c.hidden for c in found if c.hidden is not None], axis=2)
    unscored = np.isnan(scores)
    uneven = unscored & ~unscored.all(2, keepdims=True)  # a y that is missing is scored by none
    some = [name for j, name in enumerate(names) if uneven[..., j].any()]
    if some:
        raise ValueError(
            f"hidden rows have no score under {list_names(map(repr, some))}: leave these out of the grid"
        )
    return scores, split


def _reported(mixture: NDArray[np.float64], chosen: NDArray[np.float64]) -> dict[str, float]:
    """Means over hidden rows with their standard errors."""
    root, gain = math.sqrt(len(mixture)), mixture - chosen
    return {
        "heldout_score_": float(mixture.mean()),
        "heldout_se_": float(mixture.std(ddof=1)) / root,
        "heldout_gain_": float(gain.mean()),
        "heldout_gain_se_": float(gain.std(ddof=1)) / root,
    }


def _steps_before(names: list[str], found: list[Candidate], weights: str) -> Pipeline | None:
    """What stands before all models, which is the same; a step that learns from rows is refused where it differs."""
    if not any(isinstance(c.estimator, Pipeline) for c in found):
        return None
    digests = []
    for name, c in zip(names, found, strict=True):
        steps = c.estimator.steps[:-1] if isinstance(c.estimator, Pipeline) else []
        steps = [step for _, step in steps if step is not None and step != "passthrough"]
        learned = [step for step in steps if _learns(step)]
        if learned and weights == "stacking":
            raise ValueError(
                f"{learned[0]!r} before the model of {name!r} has learnt from all rows, the hidden ones too, so that "
                "their scores are not those of rows never seen, and one for each fold would be another scale for each. "
                "Give X in fixed units, or use weights='evidence' where candidates have one"
            )
        try:
            digests.append(digest_of(steps))
        except CannotDigest as error:
            raise ValueError(
                f"it cannot be told whether what stands before the models is the same: {error}"
            ) from error
    other = next((n for n, d in zip(names, digests, strict=True) if d != digests[0]), None)
    if other is not None:
        raise ValueError(
            f"{names[0]!r} and {other!r} see rows through different steps before their models: average candidates that "
            "share one step, or give X as it comes out of it"
        )
    return next(c.estimator for c in found if isinstance(c.estimator, Pipeline))


def _learns(step: Any) -> bool:
    """Whether a step before a model is fitted to rows."""
    try:
        return bool(get_tags(step).requires_fit)
    except AttributeError:
        return True
