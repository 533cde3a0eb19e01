"""How a program is trained, as objects that stand in parameter grids: ``training__learning_rate``, say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from os import PathLike
from typing import Any, ClassVar, Literal

import torch
from sklearn.base import BaseEstimator
from sklearn.utils._param_validation import Interval

from bayes_mpt.program.offers import offered
from bayes_mpt.training.adam import train_on_masks
from bayes_mpt.training.epochs import train_by_epochs
from bayes_mpt.training.lbfgs import maximize_lbfgs
from bayes_mpt.training.problem import Fit, Problem, Report

__all__ = ["Ascent", "Epochs", "Steps", "Training"]

RATE, NETWORK_RATE = 0.05, 1e-3  # of Adam, in units of the map; and of networks' own parameters

_POSITIVE_INTEGER = Interval(Integral, 1, None, closed="left")
_POSITIVE = Interval(Real, 0, None, closed="neither")
_NOT_NEGATIVE = Interval(Real, 0, None, closed="left")


class Ascent(BaseEstimator):
    """Maximise the exact score: in closed form or by EM where there is one, else by L-BFGS.

    Parameters
    ----------
    max_iter : int, default=2000
        Iterations of L-BFGS, of Newton's method, or of EM.
    tol : float, default=1e-10
        It ends when the mean score changes by less than this share of itself.

    Examples
    --------
    >>> from bayes_mpt import BayesMPT
    >>> from bayes_mpt.models import GaussianMixture
    >>> BayesMPT(GaussianMixture(3), training=Ascent(tol=1e-6)).training
    Ascent(tol=1e-06)
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "max_iter": [_POSITIVE_INTEGER],
        "tol": [_NOT_NEGATIVE],
    }
    by_masks: ClassVar[Literal[False]] = False
    by_epochs: ClassVar[bool] = False
    limits: ClassVar[str] = "max_iter"

    def __init__(self, max_iter: int = 2000, tol: float = 1e-10):
        self.max_iter = max_iter
        self.tol = tol

    def run(
        self,
        stages: Sequence[Problem],
        *,
        seed: int,
        max_iter: int | None = None,
        asked: Mapping[str, tuple[str, str]] | None = None,
        report: Report | None = None,
    ) -> Fit:
        """Train the last of some problems, of which the others are cheaper; ``max_iter`` in place of its own."""
        return maximize_lbfgs(stages[-1], max_iter=max_iter or self.max_iter, tol=self.tol, report=report)


class Steps(BaseEstimator):
    """Maximise the masked score by Adam, on a fresh draw of masks each step.

    Parameters
    ----------
    learning_rate : float, optional
        In units in which the program's map moves by about one; None takes the model's own, or else 0.05.
    batch_size : int, optional
        Rows a step; None takes all of them. Needs independent rows, or a predictor whose score is a sum over tokens
        (`NearestNeighbors`): then tokens a step.
    max_iter : int, default=2000
        Steps.
    tol : float, default=1e-10
        The step is halved when a window of steps gains less than this (at least 2e-5) nats a row; after six halvings it
        ends.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "learning_rate": [_POSITIVE, None],
        "batch_size": [_POSITIVE_INTEGER, None],
        "max_iter": [_POSITIVE_INTEGER],
        "tol": [_NOT_NEGATIVE],
    }
    by_masks: ClassVar[Literal[True]] = True
    by_epochs: ClassVar[bool] = False
    limits: ClassVar[str] = "max_iter"

    def __init__(
        self,
        learning_rate: float | None = None,
        batch_size: int | None = None,
        max_iter: int = 2000,
        tol: float = 1e-10,
    ):
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.max_iter = max_iter
        self.tol = tol

    def run(
        self,
        stages: Sequence[Problem],
        *,
        seed: int,
        max_iter: int | None = None,
        asked: Mapping[str, tuple[str, str]] | None = None,
        report: Report | None = None,
    ) -> Fit:
        """As `Ascent.run`."""
        problem = stages[-1]
        return train_on_masks(
            problem,
            max_iter=max_iter or self.max_iter,
            learning_rate=self.learning_rate or offered(problem.bound.model, "learning_rate") or RATE,
            batch_size=self.batch_size,
            random_state=seed,
            tol=self.tol,
            report=report,
        )


class Epochs(BaseEstimator):
    """Maximise the masked score by Adam over minibatches, until held-out rows score no better: for networks.

    Masks are chains where an estimator names none.

    Parameters
    ----------
    batch_size : int, optional
        Rows a step; None takes the model's own, or else all of them.
    learning_rate : float, optional
        Of the parameters themselves, after a rise over the first steps; None takes the model's own, or else 0.001.
    max_epochs : int, default=2000
        Passes over the rows that train.
    patience : int, default=10
        Epochs without a better score of the held-out rows, after which the training stops, at the best.
    validation_fraction : float, default=0.1
        Share of the rows held out; 0 runs all epochs.
    checkpoint : path, optional
        File to which the training writes where it is, after each epoch, and from which it goes on if that exists, to
        the same parameters bit for bit (on a CPU). It is of one training on its rows, with its settings, of which
        ``max_epochs`` alone may change: needs an integer ``random_state``, and no ``n_init`` above 1.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "batch_size": [_POSITIVE_INTEGER, None],
        "learning_rate": [_POSITIVE, None],
        "max_epochs": [_POSITIVE_INTEGER],
        "patience": [_POSITIVE_INTEGER],
        "validation_fraction": [Interval(Real, 0, 1, closed="left")],
        "checkpoint": [str, PathLike, None],
    }
    by_masks: ClassVar[Literal[True]] = True
    by_epochs: ClassVar[bool] = True
    limits: ClassVar[str] = "max_epochs"

    def __init__(
        self,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        max_epochs: int = 2000,
        patience: int = 10,
        validation_fraction: float = 0.1,
        checkpoint: str | PathLike[str] | None = None,
    ):
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.max_epochs = max_epochs
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.checkpoint = checkpoint

    def run(
        self,
        stages: Sequence[Problem],
        *,
        seed: int,
        max_iter: int | None = None,
        asked: Mapping[str, tuple[str, str]] | None = None,
        report: Report | None = None,
    ) -> Fit:
        """As `Ascent.run`; ``asked`` says what a checkpoint is of."""
        whole, model = stages[-1].whole, stages[-1].bound.model
        n_rows = len(whole.args[0])
        n_out = math.ceil(self.validation_fraction * n_rows)
        if n_out >= n_rows:
            raise ValueError(f"validation_fraction={self.validation_fraction} leaves none of {n_rows} rows")
        order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed))
        return train_by_epochs(
            stages,
            whole.take(order[n_out:]),
            whole.take(order[:n_out]) if n_out else None,
            batch_size=self.batch_size or offered(model, "batch_size") or n_rows,
            max_epochs=max_iter or self.max_epochs,
            learning_rate=self.learning_rate or offered(model, "learning_rate") or NETWORK_RATE,
            patience=self.patience,
            random_state=seed,
            checkpoint=self.checkpoint,
            asked=asked,
            report=report,
        )


Training = Ascent | Steps | Epochs
