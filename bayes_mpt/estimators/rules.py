"""The rules of evidence: which number ranks fitted candidates, and whether they can be compared by it.

- `Laplace`: loadings and noise integrated out around the rotation orbit (`bayes_mpt.evidence.laplace`), or all
  parameters of a Gaussian mixture (`bayes_mpt.evidence.mixture_laplace`); one fit a candidate. A fast screen: it has no
  error.
- `Integrated`: loadings, noise variances and mean of factor models integrated under a stated prior
  (`bayes_mpt.evidence.sampled`), with an error; or a few hyper-parameters (of a kernel, say) under the model's
  hyperprior (`bayes_mpt.evidence.integrated`): these candidates are left at their maximum a posteriori, which predicts
  better.
- `Bic`: minus half the Bayesian information criterion, the likelihood at the fit less P / 2 log N for P free
  parameters; one fit a candidate, for any program with independent rows. It has no error.
- `HeldOut`: log predictive of hidden rows, K folds, repeated.
- `Cumulative`: rows revealed in blocks, each predicted from those before it, from a visible share on: the conditional
  LML, log p(rest | visible share).
- `Train`: the LML at its maximum. It rises with every surplus parameter and cannot choose a dimension; kept to compare
  with other tools, and right where nothing is point-estimated.
- `Auto`: `Integrated` where every candidate declares its symmetries and is small enough to be sampled, or offers a
  prior of its few hyper-parameters; `Laplace` where a factor model is larger; `Train` where nothing is point-estimated;
  `HeldOut` elsewhere.

Their names in lower case stand for their defaults: ``evidence="heldout"`` is ``evidence=HeldOut()``.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, ClassVar, cast

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.model_selection import BaseCrossValidator
from sklearn.utils._param_validation import Interval

from bayes_mpt.estimators.bayes_mpt import BayesMPT
from bayes_mpt.estimators.candidates import Candidate, Facts, before_final
from bayes_mpt.estimators.integrals import MAX_CELLS, at_mode
from bayes_mpt.estimators.refits import Cumulative, HeldOut
from bayes_mpt.estimators.unbounded import refuse_unbounded
from bayes_mpt.evidence.factor_prior import FactorPrior, factor_prior
from bayes_mpt.evidence.integrated import IntegratedEvidence
from bayes_mpt.evidence.sampled import MAX_PARAMETERS
from bayes_mpt.program.program import list_names
from bayes_mpt.runtime.serial import left_as_found, turn

__all__ = [
    "RULES",
    "Auto",
    "Bic",
    "Integrated",
    "Laplace",
    "Rule",
    "Train",
    "choose_rule",
    "common_prior",
    "fit_seed",
    "give_evidence",
    "refuse_incomparable",
    "refuse_mixed_train",
    "refuse_other_priors",
    "rule_of",
]

MAX_INTEGRATED = 16  # hyper-parameters


class Laplace(BaseEstimator):
    """Loadings and noise variances, or all of a mixture of full covariances, integrated by Laplace's approximation."""

    name: ClassVar[str] = "laplace"
    n_fits: ClassVar[int] = 0
    _parameter_constraints: ClassVar[dict[str, Any]] = {}

    def chosen(self, models: list[Facts]) -> tuple[Rule, str]:
        """Itself, and why."""
        return self, "asked for"

    def evaluate(self, candidate: Candidate, X: Any, y: Any, **seeds: Any) -> None:
        """Give a candidate, which was fitted to X as its model sees it, its evidence."""
        candidate.take(candidate.model.laplace(X))
        _of_one_fit(candidate, X, y)


class Integrated(BaseEstimator):
    """What was point-estimated integrated under a prior, by sampling, with an error.

    Of factor models these are loadings, noise variances and mean, under one prior for all candidates of a table
    (`bayes_mpt.evidence.factor_prior`); of Gaussian mixtures weights, means and covariances, likewise
    (`bayes_mpt.evidence.mixture_prior`); of a model that offers a hyperprior, its hyper-parameters.

    Parameters
    ----------
    se : float, default=0.1
        Nats: the standard error that is sampled for.
    max_particles : int, default=1024
        That are taken for it at most, of a factor model or mixture.
    """

    name: ClassVar[str] = "integrated"
    n_fits: ClassVar[int] = 0
    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "se": [Interval(Real, 0, None, closed="neither")],
        "max_particles": [Interval(Integral, 128, None, closed="left")],
    }

    def __init__(self, se: float = 0.1, max_particles: int = 1024):
        self.se = se
        self.max_particles = max_particles

    def chosen(self, models: list[Facts]) -> tuple[Rule, str]:
        """Itself, and why."""
        return self, "asked for"

    def evaluate(
        self,
        candidate: Candidate,
        X: Any,
        y: Any,
        *,
        to_map: bool = False,
        prior: FactorPrior | None = None,
        **seeds: Any,
    ) -> None:
        """As `Laplace.evaluate`; with ``to_map`` an estimator is left at the maximum under its hyperprior.

        ``prior`` is that of factor models.
        """
        prior = prior if candidate.facts.rotates else None  # that of mixtures is a function of the rows alone
        found = candidate.model.integrated(X, y, se=self.se, max_particles=self.max_particles, prior=prior)
        candidate.take(found)
        if to_map and candidate.nodes is not None:
            _move_to_map(candidate.model, X, y, cast(IntegratedEvidence, found))
        candidate.replicates = np.array([candidate.evidence])
        _of_one_fit(candidate, X, y)


class Train(BaseEstimator):
    """The log marginal likelihood at its maximum; the evidence itself where nothing is point-estimated."""

    name: ClassVar[str] = "train"
    n_fits: ClassVar[int] = 0
    _parameter_constraints: ClassVar[dict[str, Any]] = {}

    def chosen(self, models: list[Facts]) -> tuple[Rule, str]:
        """Itself, and why."""
        return self, "asked for"

    def evaluate(self, candidate: Candidate, X: Any, y: Any, **seeds: Any) -> None:
        """As `Laplace.evaluate`."""
        model = candidate.model  # what the fit found: an integral over all latents may have taken long
        candidate.evidence, candidate.se = model.fitted_.total, model.fitted_.se
        candidate.replicates = np.array([candidate.evidence])
        _of_one_fit(candidate, X, y)


class Bic(BaseEstimator):
    """Minus half the Bayesian information criterion: log p(X) at the fit, less P / 2 log N with P free parameters.

    It approaches the log evidence under any prior up to a number that does not grow with N and is not known: there is
    no error, and no weight. Of programs with independent rows; cells may be missing. Mixtures of Gaussians are taken at
    the mode under the prior of their covariances, which is no part of the number (`BayesMPT.bic`).

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from bayes_mpt import BayesMPT, MarginalLikelihoodSearch
    >>> from bayes_mpt.models import GaussianMixture
    >>> grid = {"model__n_components": [1, 2, 3]}
    >>> search = MarginalLikelihoodSearch(BayesMPT(GaussianMixture()), grid, evidence="bic", random_state=0)
    >>> search.fit(load_iris().data).best_params_
    {'model__n_components': 2}
    """

    name: ClassVar[str] = "bic"
    n_fits: ClassVar[int] = 0
    _parameter_constraints: ClassVar[dict[str, Any]] = {}

    def chosen(self, models: list[Facts]) -> tuple[Rule, str]:
        """Itself, and why; refused where there is no number of rows or of parameters to charge for."""
        if not all(m.counted for m in models):
            fixed = any(not m.parameters for m in models)
            raise ValueError(
                "evidence='bic' charges for each parameter by the number of independent rows: here "
                + (
                    "nothing is point-estimated in a candidate, whose LML is its evidence"
                    if fixed
                    else "rows are tokens of one vector, or are predicted by a network that is no density of its own"
                )
                + ". Use 'integrated', 'heldout' or 'train'"
            )
        return self, "asked for"

    def evaluate(self, candidate: Candidate, X: Any, y: Any, **seeds: Any) -> None:
        """As `Laplace.evaluate`."""
        model = candidate.model
        candidate.evidence, candidate.se = -0.5 * model.bic(X, y), math.nan
        candidate.about = (
            "at the maximum a posteriori" if model.at_map_ else "at the maximum of the likelihood"
        )
        _of_one_fit(candidate, X, y)


class Auto(BaseEstimator):
    """The rule that fits the candidates.

    Parameters
    ----------
    cv, n_repeats
        Of `HeldOut`, where it is that.
    """

    name: ClassVar[str] = "auto"
    _parameter_constraints: ClassVar[dict[str, Any]] = HeldOut._parameter_constraints

    def __init__(self, cv: int | BaseCrossValidator = 5, n_repeats: int = 1):
        self.cv = cv
        self.n_repeats = n_repeats

    @property
    def held_out(self) -> HeldOut:
        """What it takes elsewhere, and what checks what it takes."""
        return HeldOut(self.cv, self.n_repeats)

    def chosen(self, models: list[Facts]) -> tuple[Rule, str]:
        """The rule that fits the models, and why."""
        vectors, held_out = [m for m in models if not m.by_row], self.held_out
        if all(not m.parameters for m in models):
            return Train(), "nothing is point-estimated: the LML is the evidence itself"
        sizes = [m.n_hyperparameters for m in models]
        if all(size is not None and size <= MAX_INTEGRATED for size in sizes):
            return Integrated(), (
                f"every candidate offers a prior of its hyper-parameters, {MAX_INTEGRATED} at most: they are "
                "integrated, and predictions are at their maximum a posteriori"
            )
        if vectors and all(m.remembers for m in models):
            return held_out, (
                "a candidate's hyper-parameters have no prior, or are many, so that they cannot be integrated: hidden "
                "rows are predicted, each given the visible ones"
            )
        if vectors:
            return Train(), "rows are tokens of one vector, so none can be held out: the LML at its maximum"
        if all(m.affordable for m in models):
            return Integrated(), (
                "every candidate declares its loadings free up to rotation: loadings, noise variances and mean are "
                "integrated under one prior"
            )
        if all(m.rotates for m in models):
            return Laplace(), (
                "every candidate declares its loadings free up to rotation, and one is too large to be sampled (more "
                f"than {MAX_PARAMETERS} parameters, or, with holes, {MAX_CELLS} cells): Laplace's approximation for all"
            )
        if all(m.mixture for m in models):
            return held_out, (
                "every candidate is a Gaussian mixture: hidden rows are predicted, and fits chosen so lost least in "
                "simulations"
            )
        return held_out, (
            "a candidate's point estimates have no declared prior or symmetry, or are too many, so that they cannot be "
            "integrated: hidden rows are predicted"
        )


Rule = Laplace | Integrated | Bic | HeldOut | Cumulative | Train
RULES = (Auto, Laplace, Integrated, Bic, HeldOut, Cumulative, Train)


def rule_of(evidence: Any) -> Rule | Auto:
    """The rule, or that of this name at its defaults."""
    if isinstance(evidence, RULES):
        evidence._validate_params()
        return evidence
    for rule in RULES:
        if isinstance(evidence, str) and evidence == rule.name:
            return rule()
    names = ", ".join(repr(rule.name) for rule in RULES)
    classes = ", ".join(f"{rule.__name__}()" for rule in RULES)
    raise ValueError(f"evidence must be one of {names}, or a rule, one of {classes}, got {evidence!r}")


def choose_rule(rule: Rule | Auto, found: list[Candidate]) -> tuple[Rule, str]:
    """The rule that ranks, and why."""
    return rule.chosen([c.facts for c in found])


def refuse_incomparable(names: list[str], found: list[Candidate]) -> None:
    """All must score the same tokens, in the same units, in the same sense of a token.

    One vector (a pooled model, say) stands beside rows, by the totals of the same cells, where all integrate the same.
    """
    mixed = len({c.facts.by_row for c in found}) > 1
    kinds: dict[str, list[Any]] = {
        "meaning of a row (independent rows against one vector), and in what is integrated": [
            c.facts.integrated if mixed else () for c in found
        ],
        "tokens (other rows, features or scaling)": [
            c.tokens.split(": ")[-1] if mixed else c.tokens for c in found
        ],
        "kind of token (codes that have probabilities against numbers that have densities)": [
            c.facts.discrete for c in found
        ],
    }
    for what, values in kinds.items():
        common = max(values, key=values.count)
        others = [n for n, v in zip(names, values, strict=True) if v != common]
        if others:
            raise ValueError(
                f"not comparable: {', '.join(map(repr, others))} and the rest differ in their {what}. Marginal "
                f"likelihoods can only be compared as densities of the same numbers{_of_given(names, found)}"
            )


def _of_given(names: list[str], found: list[Candidate]) -> str:
    """Which cells are not scored, where these differ: an autoregression of more lags begins later."""
    if len({c.facts.given for c in found}) < 2:
        return ""
    each = "; ".join(
        f"{n!r} is given {list_names(c.facts.given) or 'nothing'}" for n, c in zip(names, found, strict=True)
    )
    return f". Let all score the same cells: {each}"


def common_prior(candidate: Candidate, X: Any) -> FactorPrior:
    """The prior of all factor models of a table, told by one: they see the same tokens."""
    return factor_prior(candidate.model._ready(before_final(candidate.estimator, X))[1])


def refuse_other_priors(names: list[str], found: list[Candidate]) -> None:
    """All evidence must be under one prior, or each under its model's own."""
    own = "the model's own"
    priors = {n: c.prior or own for n, c in zip(names, found, strict=True) if not c.error}
    first = next(iter(priors))
    other = next((n for n, p in priors.items() if p != priors[first]), None)
    if other is not None:
        raise ValueError(
            f"not comparable: the evidence of {first!r} is under the prior {priors[first]!r}, that of {other!r} under "
            f"{priors[other]!r}. Compare candidates under one prior, or use evidence='heldout'"
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
    rule: Rule,
    *,
    seed: int = 0,
    random_state: int | None = None,
    to_map: bool = False,
    prior: FactorPrior | None = None,
    rough: bool = False,
) -> Candidate:
    """The candidate, which was fitted on X, with its evidence.

    Parameters
    ----------
    candidate : Candidate
        Changed in place; its estimator is not, unless ``to_map``.
    X, y : array-like
        What it was fitted on.
    rule : Rule
        As `choose_rule` returns it.
    seed : int
        For the partitions of the rows.
    random_state : int, optional
        For the fits of folds, where the estimator has none.
    to_map : bool, default=False
        Whether `Integrated` leaves the estimator at its maximum a posteriori.
    prior : FactorPrior, optional
        As `common_prior` of all candidates.
    rough : bool, default=False
        Whether `HeldOut` may end fits to folds early, which `bayes_mpt.estimators.contenders` settles.
    """
    # Densities of all candidates are of the same table: what stands before the model is fitted once, on all rows.
    X = before_final(candidate.estimator, X)
    refuse_unbounded(candidate.model, X, y)
    how: dict[str, Any] = {"seed": seed, "random_state": random_state}
    rule.evaluate(candidate, X, y, **how, to_map=to_map, prior=prior, rough=rough)
    return candidate


def _of_one_fit(candidate: Candidate, X: Any, y: Any) -> None:
    """What its rows contribute to an evidence that is of the fit itself."""
    model = candidate.model
    if model.predictor_.structure.by_row:
        candidate.by_row = np.asarray(model.score_samples(X, y))
    candidate.n_scored = 1.0 if candidate.by_row is None else float(len(candidate.by_row))
    candidate.splits = np.array([candidate.evidence / candidate.n_scored])


def _move_to_map(model: BayesMPT, X: Any, y: Any, found: IntegratedEvidence) -> None:
    """Take the maximum a posteriori that was found on the training rows for the parameters."""
    with turn(), left_as_found(store=True, estimator=model):
        model._keep(at_mode(*model._ready(X), y, found))


def fit_seed(random_state: Any, drawn: int) -> int | None:
    """What a ``random_state`` gives to fits that have none, so that the same call ranks alike; ``drawn`` from it."""
    if random_state is None:
        return None
    return int(random_state) if isinstance(random_state, Integral) else drawn
