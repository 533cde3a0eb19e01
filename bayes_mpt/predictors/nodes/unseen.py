"""What modes that climbs have found tell of others that none has found.

A mode that few climbs have found tells that others may have been found by none. If h climbs of it are a Poisson number
that is no zero, its mean l solves l / (1 - exp(-l)) = h, and for each mode found such another is missed (Horvitz &
Thompson 1952) with

    exp(-l) / (1 - exp(-l)) = 0.26, 0.06, 0.02, 0.01    for h = 2, 3, 4, 5

of its mass; one found once stands for as much again (Good 1953). `Modes.doubt` says so where much is missed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_mpt.predictors.base import Evidence
from bayes_mpt.predictors.nodes.mixture import Modes
from bayes_mpt.warnings import MissedModeWarning, warn

__all__ = ["EQUAL_MASS", "Seen", "chance_of_new", "doubted", "missed_mass"]

UNSEEN_BY_HITS = (1.0, 0.255, 0.063, 0.020, 0.007)  # mass that was missed, for that of a mode found so often
FEW_ALONE = 2  # modes found once that say nothing yet of a new one at the next climb
EQUAL_MASS = 1e-4  # nats


class Seen(NamedTuple):
    """What modes that were found tell of others."""

    n_rare: int
    """How many that matter were found by one climb."""
    missed: float
    """Mass at modes that no climb has found, over that of those found."""
    whole: bool
    """Whether all images of each are here."""


def doubted(evidence: Evidence, modes: Modes) -> Evidence:
    """The evidence, without an error and with a warning where something speaks for modes that were missed."""
    if not modes.doubt:
        return evidence
    warn(
        f"the evidence may miss modes of the posterior, so that it has no error (se is nan): {modes.doubt}. Narrow the "
        "priors, give latents starting values by better scaled priors, or compare with SequentialMonteCarlo()",
        MissedModeWarning,
    )
    return evidence._replace(se=math.nan)


def missed_mass(shares: Sequence[float], hits: Sequence[int]) -> float:
    """Mass of modes that no climb has found, over that of those found, by how many climbs found each.

    Examples
    --------
    >>> missed_mass([0.5, 0.5], [12, 12])
    0.0
    >>> round(missed_mass([0.5, 0.4, 0.1], [12, 2, 1]), 3)
    0.202
    """
    if len(hits) == 1:  # of one mode all climbs are, however many
        return 0.0
    of_hits = (UNSEEN_BY_HITS[0], *UNSEEN_BY_HITS)  # one that only the middle leads to: as of one climb
    return sum((m * of_hits[n] for m, n in zip(shares, hits, strict=True) if n < len(of_hits)), 0.0)


def chance_of_new(log_mass: Tensor, hits: Tensor, n_climbs: int) -> float:
    """The chance that one more climb ends at a new mode (Good 1953): the share of climbs that ended alone.

    Images of a mode under symmetries have its mass, and count as one.
    """
    mass, order = log_mass.sort()
    group = (mass.diff(prepend=mass[:1]) > EQUAL_MASS).cumsum(0)
    pooled = torch.zeros_like(hits).index_add(0, group, hits[order])
    alone = int((pooled == 1).sum())
    return alone / n_climbs if alone > FEW_ALONE else 0.0
