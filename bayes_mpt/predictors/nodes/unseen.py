"""What climbs that found modes tell of those that none has found.

If the climbs that found a mode are a Poisson number h that is no zero, its mean l solves l / (1 - exp(-l)) = h, and for
each mode found such another is missed (Horvitz & Thompson 1952) with

    exp(-l) / (1 - exp(-l)) = 0.26, 0.06, 0.02, 0.01    for h = 2, 3, 4, 5

of its mass; one found once stands for as much again (Good 1953). Nothing here knows of a mode that no climb comes near
while all others are found often: 17 of 100 searches for four modes of random masses, by 24 climbs whose chances are
random too, miss more than a tenth of the mass in silence, those for twenty modes 1.5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.stats import chi2

__all__ = ["chance_of_new", "crowd_of", "missed_mass"]

BY_HITS = (1.0, 0.255, 0.063, 0.020, 0.007)  # mass that was missed, for that of a mode found so often
FEW_ALONE = 2  # modes found once that say nothing yet of the chance of new ones
SURE = 0.05  # chance of more modes than are said


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
    of_hits = (BY_HITS[0], *BY_HITS)  # one that only the middle leads to: as of one climb
    return sum((m * of_hits[n] for m, n in zip(shares, hits, strict=True) if n < len(of_hits)), 0.0)


def chance_of_new(hits: Sequence[int], n_climbs: int) -> float:
    """The chance that one more climb ends at a new mode (Good 1953): the share of climbs that ended alone.

    Examples
    --------
    >>> chance_of_new([5, 1, 1, 1], 8), chance_of_new([6, 1, 1], 8)
    (0.375, 0.0)
    """
    alone = sum(n == 1 for n in hits)
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
