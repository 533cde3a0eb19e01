"""What a program is: it is run for the first time and its predictor chosen, or its dimension ranked before."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pyro
import torch

from bayes_mpt.evidence.laplace import laplace_proportional
from bayes_mpt.evidence.laplace_incomplete import TooWideError, laplace_of_cells
from bayes_mpt.predictors import Bound, Predictor, choose
from bayes_mpt.predictors.base import Guide
from bayes_mpt.predictors.gaussian.incomplete import constant_columns, pairs_of
from bayes_mpt.predictors.gaussian.process import N_TRIAL_ROWS, is_gaussian_vector
from bayes_mpt.predictors.gaussian.profile import NoiseFloorError, spectrum
from bayes_mpt.predictors.self_predictive import sees_all
from bayes_mpt.program.arguments import fill_all
from bayes_mpt.program.program import Model
from bayes_mpt.program.run import first_run
from bayes_mpt.program.statistics import SufficientStatistics
from bayes_mpt.program.store import OwnStore, State
from bayes_mpt.warnings import AdviceWarning, SlowProgramWarning, UnboundedWarning, warn, warnings_of

__all__ = ["MAX_INIT_ROWS", "bind", "choose_dimension"]

MAX_INIT_ROWS = 4096  # rows on which it is found out what a program is
TRIAL_ROWS = 1024  # the same, of a table that has more than those
MAX_INIT_CELLS = 2**20  # of a table on which a program first runs, which initialises its parameters
MAX_INIT_VECTOR = 1024  # rows of one Gaussian vector, which may mean a matrix of their square
MAX_AUTO = 50  # latent dimensions that "auto" tries at most
PATIENCE = 3  # dimensions beyond the best so far that are tried with missing cells
STARTS = 2  # of a climb with missing cells, of each dimension


def bind(
    model: Model,
    guide: Guide | None,
    arguments: Callable[[Any], tuple[Any, ...]],
    shape: tuple[int, int],
    predictor: Predictor | str,
    *,
    takes_y: bool,
    by_epochs: bool,
    known: tuple[Bound, State] | None = None,
) -> tuple[Bound, tuple[Any, ...]]:
    """Run the program for the first time and choose its predictor; with what it is to be read on.

    Parameters
    ----------
    model, guide : callable
        The program, in a parameter store of its own.
    arguments : callable
        What the program is called with for some rows: an index of them.
    shape : (N, T)
        Of the table.
    predictor : Predictor or "auto"
        As in `BayesMPT`.
    takes_y : bool
        Whether there is a second argument: then all rows are read.
    by_epochs : bool
        Whether the rows are never read all at once.
    known : tuple, optional
        The predictor and the parameters of another fit of the same program, which holds for any rows.
    """
    n_rows, n_columns = shape
    if takes_y:
        args = arguments(slice(None))
        with OwnStore():
            vector = is_gaussian_vector(model, args)
        if vector:
            # Its covariance may be made whole: initial values from as many rows as that costs little, at random,
            # since of a series the first rows are no sample.
            some = torch.randperm(n_rows)[:MAX_INIT_VECTOR].sort().values.numpy()
            first_run(model, fill_all(arguments(some)))
            return choose(model, args, predictor=predictor, guide=guide), args
    n_init = MAX_INIT_CELLS // n_columns
    # "auto" begins with a run on all rows itself, if they are not too many
    begins_whole = predictor == "auto" and not takes_y and n_rows <= min(n_init, MAX_INIT_ROWS)
    if known is not None or (N_TRIAL_ROWS < min(n_rows, n_init) and not begins_whole):
        # Initial values from all rows, or a start that is a fit of its own (EM) would be one to the first rows
        # only. A program that cannot run says why below.
        with suppress(Exception):
            first_run(sees_all(model), fill_all(arguments(slice(n_init))))
    args = arguments(slice(MAX_INIT_ROWS if n_rows <= MAX_INIT_ROWS else TRIAL_ROWS))
    if known is not None and _same_shapes(known[1]):
        found = known[0]
    else:
        found = choose(model, args, predictor=predictor, guide=guide)
    if n_rows > MAX_INIT_ROWS and not (found.structure.scores_input and found.structure.dense):
        args = arguments(slice(None))
        if not (found.structure.scores_input or found.structure.serves_any_rows) and not by_epochs:
            with warnings_of(silent=(SlowProgramWarning,)):  # said above
                found = choose(model, args, predictor=predictor, guide=guide)
    return found, args


def _same_shapes(state: State) -> bool:
    """Whether the store holds parameters of these names and shapes."""
    here = dict(pyro.get_param_store().named_parameters())
    return {n: v.shape for n, v in state.items()} == {n: v.shape for n, v in here.items()}


def choose_dimension(model: Any, statistics: SufficientStatistics) -> tuple[Any, int, dict[int, float], bool]:
    """Rank all K by the evidence.

    Where cells are missing each K needs a climb, and they are tried upwards from 0 until `PATIENCE` of them in a row
    are worse than the best.

    Returns
    -------
    model
        With the best K.
    best : int
        That.
    evidence
        ``{K: log evidence}`` of those tried.
    at_floor
        Whether K latents reproduce these rows without noise, so that the likelihood is unbounded there.
    """
    n, n_tokens = statistics.n_rows, len(statistics.mean)
    most = max(min(n_tokens - 1, n - 2, MAX_AUTO), 0)
    rank = None
    if statistics.complete:
        evidence, rank = _of_complete_rows(statistics, most)
    else:
        evidence = _of_observed_cells(statistics, most)
    best, at_floor = max(evidence, key=lambda k: evidence[k]), rank is not None
    if rank is not None:
        best = rank
        evidence[best] = math.inf
        warn(
            f"the {n} rows of {n_tokens} columns have rank {best}: with {best} latent dimensions or more no noise is "
            f"left and the likelihood is unbounded. Taken are {best}, with a noise of the size of rounding errors; "
            + (f"{best + 1} to {most} are left out" if most > best else "no larger number is tried"),
            UnboundedWarning,
        )
    return model.__class__(**{**model.get_params(), "n_components": best}), best, evidence, at_floor


def _of_complete_rows(statistics: SufficientStatistics, most: int) -> tuple[dict[int, float], int | None]:
    """The evidence of all K up to ``most``, on one covariance, and the rank of rows without noise."""
    n, cov, shape = statistics.n, statistics.covariance, np.ones(len(statistics.mean))
    # K latents and a noise need K + 1 directions in which the rows differ
    known = spectrum(cov, shape, most)
    largest = max(min(most, known.rank - 1), 0)
    evidence = {k: laplace_proportional(cov, n, k, shape, known).log_evidence for k in range(largest + 1)}
    # rows differ in at most n - 1 directions, and in none along a constant column
    at_floor = 0 < known.rank < min(n - 1, int((statistics.variance > 0).sum())) and known.rank <= MAX_AUTO
    return evidence, known.rank if at_floor else None


def _of_observed_cells(statistics: SufficientStatistics, most: int) -> dict[int, float]:
    """The evidence of K = 0, 1, ... on the observed cells; infinite, which a fit refuses, where no noise is left."""
    n_tokens = len(statistics.mean)
    shape = np.ones(n_tokens)
    pairs = pairs_of(statistics, shape)
    evidence = dict[int, float]()
    # one of the columns that vary is left to the noise
    n_varying = n_tokens - int(constant_columns(statistics, of_one_cell=True).sum())
    for k in range(min(most, max(n_varying - 1, 0)) + 1):
        if k and not _determined(statistics, k):
            break
        try:
            found = laplace_of_cells(statistics, k, shape, pairs=pairs, n_init=STARTS)
        except NoiseFloorError:
            evidence[k] = math.inf
            break
        except TooWideError as error:
            warn(f"more than {k - 1} latent dimensions are not tried: {error}", AdviceWarning)
            break
        evidence[k] = found.log_evidence
        if k - max(evidence, key=lambda k: evidence[k]) >= PATIENCE:
            break
    return evidence


def _determined(statistics: SufficientStatistics, k: int) -> bool:
    """Whether the cells are enough for K latents: T - 1 of them of complete rows, if these are more than K + 1.

    Loadings and noise are T K - K (K - 1) / 2 + 1 numbers, for as many covariances of columns that are seen together.
    And K + 1 rows lie in a plane of K dimensions: these have (K + 1)(T - K) numbers, and so many cells beyond the first
    K of a row can be on it without noise.
    """
    t, seen = len(statistics.mean), (~statistics.incomplete.isnan()).double()
    together = t * (t + 1) // 2
    if not statistics.n:
        together = (int((seen.mT @ seen > 0).sum()) + t) // 2
    beyond = statistics.n * (t - k) + int((seen.sum(1) - k).clamp(min=0).sum())
    return t * k - k * (k - 1) // 2 + 1 <= together and not 0 < beyond <= (k + 1) * (t - k)
