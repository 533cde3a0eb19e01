"""How many latent dimensions a factor model has, where none is named: those with the highest evidence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bayes_mpt.evidence.laplace import laplace_proportional
from bayes_mpt.evidence.laplace_incomplete import TooWideError, laplace_of_cells
from bayes_mpt.predictors.gaussian.incomplete import constant_columns, pairs_of
from bayes_mpt.predictors.gaussian.profile import NoiseFloorError, spectrum
from bayes_mpt.program.statistics import SufficientStatistics
from bayes_mpt.warnings import AdviceWarning, UnboundedWarning, warn

__all__ = ["choose_dimension"]

MAX_AUTO = 50  # latent dimensions that "auto" tries at most
PATIENCE = 3  # dimensions beyond the best so far that are tried with missing cells
STARTS = 2  # of a climb with missing cells, of each dimension


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
