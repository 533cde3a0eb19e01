"""One candidate: what a rule must know of a fitted model, and what its evaluation has found."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from functools import singledispatchmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline
from torch import Tensor

from bayes_mpt.diagnostics import BAD_K
from bayes_mpt.estimators.availability import counts_parameters
from bayes_mpt.estimators.bayes_mpt import BayesMPT
from bayes_mpt.estimators.integrals import affordable, laplace_applies, n_hyperparameters
from bayes_mpt.evidence.expected import Believed
from bayes_mpt.evidence.integrated import IntegratedEvidence, Nodes
from bayes_mpt.evidence.mixture import MixtureEvidence
from bayes_mpt.evidence.mixture_laplace import MixtureLaplace
from bayes_mpt.evidence.predictive import GaussianRows, RowPredictive
from bayes_mpt.evidence.sampled import SampledEvidence
from bayes_mpt.inputs import wanted
from bayes_mpt.models.mixtures import GaussianMixture
from bayes_mpt.program.offers import name_of, offered
from bayes_mpt.program.program import list_names
from bayes_mpt.program.statistics import known_of

__all__ = [
    "Candidate",
    "Facts",
    "before_final",
    "final_step",
    "model_in",
    "not_converged",
    "token_digest",
]


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
    integrated: tuple[str, ...]
    """The latent sites."""
    n_hyperparameters: int | None
    """As `integrals.n_hyperparameters`."""
    rotates: bool
    """As `integrals.laplace_applies`: whether loadings are declared free up to rotation."""
    affordable: bool
    """As `integrals.affordable`."""
    counted: bool
    """As `availability.counts_parameters`: whether AIC and BIC apply."""
    mixture: bool
    """Whether it is a Gaussian mixture."""
    converged: bool
    """Whether the training ended by its own rule."""
    given: tuple[str, ...] = ()
    """Cells that tokens look at and that are never scored."""

    @classmethod
    def of(cls, model: BayesMPT) -> Facts:
        structure = model.predictor_.structure
        discrete = {site.discrete for site in structure.sites}
        return cls(
            by_row=bool(structure.by_row),
            remembers=bool(structure.gaussian_vector),
            discrete=tuple(sorted(discrete)),
            parameters=tuple(structure.parameters),
            integrated=tuple(sorted(structure.latent_names)),
            n_hyperparameters=n_hyperparameters(model.fitted_),
            rotates=laplace_applies(model.fitted_),
            affordable=affordable(model.fitted_),
            counted=counts_parameters(model),
            mixture=type(model.fitted_.model) is GaussianMixture,
            converged=model.converged_,
            given=() if structure.order is None else structure.order.given,
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
    about: str = ""
    """What to say beside the name of the rule."""
    prior: str = ""
    """What was integrated under which prior, where that is not the model's own: two that differ are not comparable."""
    believed: Believed | None = None
    """The fit and the posterior that the evidence was computed with, where rows are Gaussian under both."""
    nodes: Nodes | None = None
    """What the evidence was integrated over, where that were hyper-parameters: the model itself is at their maximum."""
    held_out: float = math.nan
    """Nats of hidden rows, where these rank and not the expected score."""
    why_held_out: str = ""
    known: Facts | None = None
    """Of the fitted model, where they were told; `facts` asks the model otherwise."""
    unfitted: Any = None
    """What is to be fitted, and what its fit has left in a file (``left``), while there is no ``estimator``."""
    left: dict[str, Any] | None = None
    at_fit: NDArray[np.float64] | None = None
    """(N,) nats: the rows' scores by the fit to all rows, where one random partition of them is all there is."""
    fold: NDArray[Any] | None = None
    """(N,) in which fold of that partition each row was hidden."""
    hidden: NDArray[np.float64] | None = None
    """(R, N) nats of each row by the fit that has not seen it, by repeat; NaN of one that was never hidden."""
    split: NDArray[np.float64] | None = None
    """(R, N) by which split that was; None where a row was hidden more than once."""
    rough: float = 0.0
    """The tolerance of the fits to folds, where it is rougher than that of the fit to all rows."""
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
        name = "integrated" if rule == "train" and self.is_evidence else rule
        far = f"folds far behind, ended at {self.rough:.0e} of a score" if self.rough else ""
        return self.error or self.note or "; ".join(filter(None, [name, self.about, far]))

    def doubt(self, why: str) -> None:
        """Add what to be wary of, if there is anything."""
        if why not in self.note.split("; "):
            self.note = "; ".join(filter(None, [self.note, why]))

    def state_prior(self) -> None:
        """Let `explain` of the fit say under which prior its evidence is."""
        if self.prior and self.estimator is not None:
            self.model.fitted_ = replace(self.model.fitted_, evidence_prior=self.prior)

    @property
    def kind(self) -> str:
        """Weights are stated within it: candidates that differ in the number of latents alone."""
        return "" if self.believed is None else self.believed.kind

    @property
    def predictive(self) -> RowPredictive | None:
        """The law of a new row that goes with the evidence, where that is told without the estimator."""
        if self.believed is None:
            return None
        draws, islands = self.believed.draws, self.believed.islands
        return GaussianRows.of(draws.mean(islands), draws.covariance(islands))

    @singledispatchmethod
    def take(self, found: Any) -> None:
        """The evidence that a rule has found of the rows the model was fitted to, of any kind."""
        self.evidence = found.log_evidence

    @take.register
    def _sampled(self, found: SampledEvidence) -> None:
        """With loadings, noise variances and mean integrated."""
        model = self.model
        self.evidence, self.se, self.prior = found.log_evidence, found.se, found.prior.describe()
        noises = "one noise variance" if np.ndim(model.noise_variance_) == 0 else "a noise variance a column"
        fit = model.mean_, model.get_covariance()
        self.believed = Believed(noises, found.islands, found.draws, *fit, _pairs_are_seen(model))
        if model.n_components_:
            half, double = (f"{v:+.1f}" for v in found.scale_sensitivity)
            self.about = f"prior's scale halved {half}, doubled {double} nats"
        for flag in found.flags:
            self.doubt(flag)
        seen = model.fitted_.statistics
        if seen is not None and not model.complete_:
            few = (seen.of_cells()[0] <= model.n_components_ + 1).cpu().numpy()
            if few.any():
                names = list_names(map(str, model.fitted_.names[few]))
                self.doubt(f"few observed cells in column {names}: a new complete row is a guess there")

    @take.register
    def _allocated(self, found: MixtureEvidence) -> None:
        """With all parameters of a mixture integrated."""
        self.evidence, self.se, self.prior = found.log_evidence, found.se, found.prior.describe()
        for flag in found.flags:
            self.doubt(flag)

    @take.register
    def _mixture(self, found: MixtureLaplace) -> None:
        """Laplace's, of a mixture."""
        self.evidence, self.prior = found.log_evidence, found.prior.describe()
        if found.overlapping:
            pairs = ", ".join(f"{i} and {j}" for i, j in found.overlapping)
            self.doubt(f"laplace, but components {pairs} overlap: the approximation is unreliable")

    @take.register
    def _integrated(self, found: IntegratedEvidence) -> None:
        """With the hyper-parameters integrated."""
        self.evidence, self.se, self.nodes = found.log_evidence, found.se, found.nodes
        if found.pareto_k > BAD_K:
            self.doubt(f"integrated, but Pareto k {found.pareto_k:.2f}: se is unreliable")


def _pairs_are_seen(model: BayesMPT) -> bool:
    """Whether each pair of columns was observed together in some row."""
    statistics = model.fitted_.statistics
    if statistics is None or statistics.n:
        return True
    seen = (~statistics.incomplete.isnan()).double()
    return bool((seen.mT @ seen > 0).all())


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


def model_in(estimator: Any, name: str) -> BayesMPT:
    """The model of an estimator, as `final_step`; what is none and does not end in one is refused."""
    model = final_step(estimator)
    program = callable(model) and not isinstance(model, type)
    wrap = f" (wrap the program, BayesMPT({name_of(model)}))" if program else ""
    return wanted(BayesMPT, model, f"{name} must be a BayesMPT or a Pipeline ending in one{wrap}")


def not_converged(model: BayesMPT) -> str:
    """What to say of a training that did not end by its own rule; nothing of one that did."""
    if model.converged_:
        return ""
    return f"not converged after {model.n_iter_} iteration{'' if model.n_iter_ == 1 else 's'}"


def unchecked(model: BayesMPT) -> str:
    """What a program says of its own densities, which nothing has checked; nothing of most."""
    return offered(model.fitted_.model, "believed") or ""


def token_digest(estimator: Any, X: Any, y: Any) -> str:
    """Fingerprint of the tokens that are scored, the same whether a model takes them in single or double precision.

    The rows and tokens that they form, then a digest of the values in turn: that of one vector is that of its rows.
    """
    with final_step(estimator).read_rows(before_final(estimator, X), y) as read:
        rows = read.value
        if isinstance(X, np.ndarray) and rows.shape == X.shape and rows.data_ptr() == X.ctypes.data:
            known, what = known_of(X), ("tokens", rows.dtype)  # the rows themselves
            if what not in known:
                known[what] = _digest(rows)
            return str(known[what])
        return _digest(rows)


def _digest(rows: Tensor) -> str:
    values = hashlib.sha256(rows.float().cpu().numpy().tobytes()).hexdigest()[:16]
    return f"{len(rows)} x {rows.shape[1]}: {values}"
