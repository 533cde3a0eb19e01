"""Factor models with surplus columns: which they are, their other modes, and a start that a pilot has fitted.

The posterior of a column that the rows do not need is far from a normal at the maximum: its direction wanders over all
that the noise leaves open, its length lies off the maximum's, and the directions of two noise eigenvectors may each be
a maximum of its own. So a first pilot is run from each maximum, and the run that counts starts from a t with the mean
and the spread of what the pilots found. A start decides how much the islands differ, not what they are right for.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from bayes_mpt.evidence.annealing import Annealed
from bayes_mpt.evidence.slice import Slice, climb

__all__ = ["fitted", "has_surplus", "other_modes"]

Array = NDArray[np.float64]

SURPLUS = 1.5  # times the largest column of noise: a column as weak as that may be surplus
N_OTHERS = 2  # directions of noise that are climbed from
DISTANT = 1.0  # standard deviations between two modes


def has_surplus(space: Slice) -> bool:
    """Whether the weakest column is no larger than one that noise alone makes.

    The largest eigenvalue of N rows of T noises of variance one is near (1 + (T / N)^1/2)^2, and 1 + a^2 of a column.
    """
    posterior = space.posterior
    edge = (1 + math.sqrt(posterior.n_tokens / posterior.n_rows)) ** 2
    return float(np.square(space.reference).sum(0).min()) < SURPLUS * (edge - 1)


def other_modes(space: Slice, cov: Array) -> list[Slice]:
    """Slices through further maxima of a posterior with free noises: the weakest column put along other directions.

    Parameters
    ----------
    space : Slice
        Through the maximum that is known.
    cov : array of shape (T, T)
        Of the rows, in the units of the posterior.
    """
    posterior, n = space.posterior, space.reference.size
    if posterior.n_noise == 1:  # these have one maximum
        return []
    root = np.exp(-0.5 * posterior.split(space.center[None])[1][0])
    vectors = np.linalg.eigh(root[:, None] * cov * root)[1][:, ::-1]
    k = posterior.n_latents
    length = float(np.linalg.norm(space.reference[:, -1]))
    found: list[Slice] = []
    for j in range(k, min(k + N_OTHERS, posterior.n_tokens)):
        theta = space.center.copy()
        v = space.reference.copy()
        v[:, -1] = length * vectors[:, j]
        theta[:n] = v.ravel()
        try:
            other = climb(posterior, theta)
        except np.linalg.LinAlgError:  # no maximum from there
            continue
        if all(_apart(known, other) for known in [space, *found]):
            found.append(other)
    return found


def _apart(one: Slice, other: Slice) -> bool:
    return float(np.linalg.norm(one.coordinates(other.center[None]))) > DISTANT


def fitted(spaces: list[Slice], pilots: list[Annealed]) -> Slice:
    """The first slice, in units of the mean and spread of what the pilots from all of them found.

    Each counts by its evidence. Modes of two pilots may overlap: this decides a start and no number.
    """
    log_z = np.array([np.logaddexp.reduce(pilot.log_z) for pilot in pilots])
    share = np.exp(log_z - np.logaddexp.reduce(log_z))
    points = [spaces[0].coordinates(s.theta(p.y)) for s, p in zip(spaces, pilots, strict=True)]
    n = len(points[0])
    count = np.diff(np.round(np.cumsum([0.0, *share]) * n).astype(int))
    parts = [y[np.linspace(0, len(y) - 1, c).round().astype(int)] for y, c in zip(points, count, strict=True)]
    return spaces[0].fitted(np.concatenate(parts))
