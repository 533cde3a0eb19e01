"""What modes that climbs have found tell of others that none has found.

A mode that few climbs have found tells that others may have been found by none. If h climbs of it are a Poisson number
that is no zero, its mean l solves l / (1 - exp(-l)) = h, and for each mode found such another is missed (Horvitz &
Thompson 1952) with

    exp(-l) / (1 - exp(-l)) = 0.26, 0.06, 0.02, 0.01    for h = 2, 3, 4, 5

of its mass; one found once stands for as much again (Good 1953). `Modes.doubt` says so where much is missed.

It is a rough number, good for a warning and never added to an evidence. In 1000 searches each for 10, 20 and 50 modes,
by 24 or 64 climbs, with chances of climbs that go with the masses in part or do not know of them, its mean is 0.5 to
2.2 times the mass that was missed, and half to nine tenths of the single ones are within a factor of three. Where more
than a tenth was missed it says so in 87 to 100 of 100. It says too much rather than too little where there are many
modes: of searches for 10 and 20 that missed less than 0.01 it doubts nine in ten, of those for five that are found
alike 3 in 100.

Nothing here knows of a mode that no climb comes near while all others are found often: 17 of 100 searches for four
modes of random masses, by 24 climbs whose chances are random too, miss more than a tenth in silence, those for twenty
modes 1.5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.stats import chi2
from torch import Tensor

from bayes_mpt.predictors.base import Evidence
from bayes_mpt.predictors.nodes.mixture import Modes
from bayes_mpt.warnings import MissedModeWarning, warn

__all__ = ["EQUAL_MASS", "Seen", "by_mass", "chance_of_new", "crowd_of", "doubted", "missed_mass"]

UNSEEN_BY_HITS = (1.0, 0.255, 0.063, 0.020, 0.007)  # mass that was missed, for that of a mode found so often
FEW_ALONE = 2  # modes found once that say nothing yet of a new one at the next climb
EQUAL_MASS = 1e-4  # nats
SURE = 0.05  # chance of more modes than are said


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


def by_mass(log_mass: Tensor, hits: Tensor) -> list[int]:
    """Climbs that ended at each mode (J,): images of one under symmetries have its mass, and count as one."""
    mass, order = log_mass.sort()
    group = (mass.diff(prepend=mass[:1]) > EQUAL_MASS).cumsum(0)
    pooled: list[int] = torch.zeros_like(hits).index_add(0, group, hits[order]).tolist()
    return pooled


def chance_of_new(log_mass: Tensor, hits: Tensor, n_climbs: int) -> float:
    """The chance that one more climb ends at a new mode (Good 1953): the share of climbs that ended alone."""
    alone = sum(n == 1 for n in by_mass(log_mass, hits))
    return alone / n_climbs if alone > FEW_ALONE else 0.0


def crowd_of(hits: Sequence[int]) -> float:
    """How many modes there may be, by how many climbs ended at each: at most so many in 95 of 100 cases.

    Of n climbs to K modes that are found alike about n^2 / (2 K) come where another has been. With m of them that mean
    is at least half of the 5 % point of a chi-square with 2 m degrees of freedom. Infinite where none has met another.

    Examples
    --------
    >>> [round(crowd_of(hits)) for hits in ([2] * 22 + [1] * 30, [2] * 5 + [1] * 67, [16, 1])]
    [184, 1505, 16]
    """
    n = sum(hits)
    met = n - sum(h > 0 for h in hits)
    return n**2 / float(chi2.ppf(SURE, 2 * met)) if met else math.inf
