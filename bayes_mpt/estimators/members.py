"""What an average mixes: the law of new rows, or of new y, under each candidate of a search.

With weights of evidence a candidate is its posterior predictive: of factor models a `RowPredictive` that
goes with the evidence, of a Gaussian vector the nodes that its hyper-parameters were integrated over (`NodesOfY`).
Where nothing was estimated that is the fit itself, as it always is with weights of hidden rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from bayes_mpt.estimators import predictions, sampling
from bayes_mpt.estimators.bayes_mpt import BayesMPT
from bayes_mpt.estimators.candidates import Candidate
from bayes_mpt.estimators.integrals import predictions_over
from bayes_mpt.evidence.integrated import Nodes
from bayes_mpt.evidence.predictive import RowPredictive
from bayes_mpt.program.offers import name_of

__all__ = ["FitOfRows", "FitOfY", "NodesOfY", "YPredictive", "fit_of", "needs_estimator", "posterior_of"]

Array = NDArray[np.float64]

LOG_2PI = math.log(2 * math.pi)


class YPredictive(Protocol):
    """The law of the y of a new row, given its X and the rows of the fit."""

    def log_prob(self, rows: Array, y: Any) -> Array:
        """Nats of each y alone (N,), NaN where it is missing."""
        ...

    def moments(self, rows: Array) -> tuple[Array, Array | None]:
        """Means and variances (N,), None where these are not told."""
        ...


@dataclass(frozen=True, eq=False)
class NodesOfY:
    """Observations that are one Gaussian vector, their hyper-parameters integrated: a mixture over nodes."""

    estimator: BayesMPT
    nodes: Nodes

    def log_prob(self, rows: Array, y: Any) -> Array:
        """As `YPredictive.log_prob`."""
        fitted = self.estimator._current()
        value = fitted.arguments(rows, y)[1].double().cpu().numpy().reshape(-1)
        mean, var = predictions_over(fitted, rows, self.nodes)  # (S, N)
        log_prob = -0.5 * (np.square(value - mean) / var + np.log(var) + LOG_2PI)
        return np.asarray(logsumexp(log_prob + np.log(self.nodes.share)[:, None], axis=0))

    def moments(self, rows: Array) -> tuple[Array, Array]:
        """As `YPredictive.moments`."""
        mean, var = predictions_over(self.estimator._current(), rows, self.nodes)
        share = self.nodes.share
        whole = share @ mean
        return whole, share @ (var + np.square(mean - whole))


@dataclass(frozen=True, eq=False)
class FitOfY:
    """A y as the fit of a candidate predicts it."""

    estimator: BayesMPT

    def log_prob(self, rows: Array, y: Any) -> Array:
        """As `YPredictive.log_prob`."""
        fitted = self.estimator._current()
        structure = fitted.bound.structure
        if not (structure.by_row or structure.gaussian_vector):
            raise ValueError(
                f"{name_of(fitted.model)} has no density of one new y alone: its rows are tokens of one vector. Use "
                "predict"
            )
        return np.asarray(predictions.score_rows(fitted, rows, y)[0], dtype=np.float64)

    def moments(self, rows: Array) -> tuple[Array, Array | None]:
        """As `YPredictive.moments`."""
        fitted = self.estimator._current()
        if not fitted.bound.structure.gaussian_vector:
            mean = predictions.predict_y(fitted, rows, return_std=False, return_cov=False)
            return np.asarray(mean, dtype=np.float64), None
        mean, sd = predictions.predict_y(fitted, rows, return_std=True, return_cov=False)
        return np.asarray(mean, dtype=np.float64), np.square(sd, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class FitOfRows:
    """Rows as the fit of a candidate has them: a `RowPredictive`."""

    estimator: BayesMPT

    def log_prob(self, rows: Array) -> Array:
        """As `RowPredictive.log_prob`."""
        found = predictions.score_rows(self.estimator._current(), rows, None)[0]
        return np.asarray(found, dtype=np.float64)

    def sample(self, n_rows: int, rng: np.random.Generator) -> Array:
        """As `RowPredictive.sample`."""
        fitted = self.estimator._current()
        seeded = fitted.with_settings(fitted.predictor, int(rng.integers(2**31)))
        return np.asarray(sampling.draw_rows(seeded, n_rows), dtype=np.float64)

    def fill(self, rows: Array) -> tuple[Array, Array | None]:
        """As `RowPredictive.fill`."""
        fitted = self.estimator._current()
        mean = np.asarray(predictions.impute(fitted, rows, None), dtype=np.float64)
        try:
            return mean, np.square(predictions.missing_sd(fitted, rows))
        except ValueError:  # only of rows that share a linear-Gaussian map
            return mean, None


def needs_estimator(candidate: Candidate) -> bool:
    """Whether the candidate's predictive needs its fit."""
    return not candidate.error and candidate.predictive is None


def posterior_of(candidate: Candidate) -> RowPredictive | YPredictive | None:
    """The posterior predictive that an evidence has integrated; None of what offers a fit at its maximum only."""
    if candidate.predictive is not None:
        return candidate.predictive
    if candidate.nodes is not None and candidate.nodes.theta.shape[1]:
        return NodesOfY(candidate.model, candidate.nodes) if candidate.facts.remembers else None
    return fit_of(candidate) if candidate.is_evidence else None


def fit_of(candidate: Candidate) -> RowPredictive | YPredictive:
    """The law under the fit."""
    of_y = candidate.model.fitted_.y_like is not None
    return FitOfY(candidate.model) if of_y else FitOfRows(candidate.model)
