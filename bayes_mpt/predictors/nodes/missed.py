"""Modes of a posterior that particles find, and whether each is found often enough to be weighed.

Modes are looked for by Newton's method from draws of the prior before the particles start, and from the pilot's
particles that stand around none of them. Each particle belongs to the mode whose Student-t is highest there. Of a mode
that holds posterior mass two things are held against it: that fewer than half of the independent runs found it, and that
fewer than ten of all the particles they started with lead there. The error of the runs knows nothing of either.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayes_mpt.predictors.nodes.newton import LaplaceApproximation, newton
from bayes_mpt.predictors.nodes.particles import Shown
from bayes_mpt.predictors.nodes.path import Arrived
from bayes_mpt.predictors.nodes.reference import Reference

__all__ = ["Shares", "climb", "shares_of", "strays"]

N_STARTS = 8
COST = 2e8  # of the starts together: log-densities times the square of the numbers
MAX_STEPS = 60
SURE = 1e-9
APART = 0.5  # standard deviations between modes that are two
FAR = 40.0  # nats below the highest: a mode without mass
RADIUS = 6.0  # standard deviations of the squared radius, beyond which a particle is around no mode
MASS = 0.01  # of the posterior, from which a mode counts
MIN_ANCESTORS = 10
CANNOT = (torch.linalg.LinAlgError, ValueError, RuntimeError)


def n_starts(shown: Shown) -> int:
    """How many climbs are worth their time."""
    each = shown.x.shape[1] * shown.adaptive.n_evaluations * shown.adaptive.space.width**2
    return max(1, min(N_STARTS, int(COST / max(1, each))))


def climb(shown: Shown, starts: Tensor, known: Reference | None = None) -> Reference | None:
    """The distinct modes of a posterior that climbs from points (S, d) end at, with those known; None without any.

    All side by side; where they fail together, one by one.
    """

    def log_prob(u: Tensor) -> Tensor:
        given, part, _ = shown.adaptive.at(shown.args, shown.filled, u)
        return part + given.log_joint(shown.x, shown.seen)

    found = []
    for some in (starts, *starts.split(1)):
        try:
            at = newton(log_prob, some[:, None], MAX_STEPS, SURE)
            with torch.no_grad():
                height = log_prob(at.mode)[:, 0]
        except CANNOT:
            continue
        found.append((at.mode[:, 0], at.root[:, 0], height))
        if len(some) == len(starts):
            break
    if known is not None and len(known):
        log_det = torch.linalg.slogdet(known.root)[1]
        found.insert(0, (known.mode, known.root, known.log_mass - log_det))
    if not found:
        return None
    mode, root, height = (torch.cat(parts) for parts in zip(*found, strict=True))
    return _distinct(mode, root, height)


def _distinct(mode: Tensor, root: Tensor, height: Tensor) -> Reference | None:
    fine = torch.isfinite(height) & torch.isfinite(mode).all(1) & torch.isfinite(root).flatten(1).all(1)
    mode, root, height = mode[fine], root[fine], height[fine]
    log_mass = height + torch.linalg.slogdet(root)[1]
    kept: list[int] = []
    for k in log_mass.argsort(descending=True).tolist():
        if not bool(torch.isfinite(log_mass[k])) or log_mass[k] < log_mass[kept[0] if kept else k] - FAR:
            continue
        between = [torch.linalg.solve(root[j], mode[k] - mode[j]).square().sum().sqrt() for j in kept]
        if all(float(distance) > APART for distance in between):
            kept.append(k)
    if not kept:
        return None
    return Reference.around(LaplaceApproximation(mode[kept], root[kept]), height[kept])


def strays(reference: Reference, u: Tensor, most: int) -> Tensor:
    """Particles (M, d) that are around no mode, a few of them (m, d) spread evenly."""
    d = u.shape[1]
    back = torch.linalg.inv(reference.root)
    radius = torch.einsum("kij,mkj->mki", back, u[:, None] - reference.mode).square().sum(-1).amin(1)
    away = u[radius > d + RADIUS * (2 * d) ** 0.5 + RADIUS]
    return away[:: max(1, -(-len(away) // most))]


class Shares(NamedTuple):
    """What of the posterior each run found at each of K modes."""

    share: NDArray[np.float64]
    """(R, K) of its particles."""
    ancestors: NDArray[np.int64]
    """(R, K): first particles that they come from."""
    mass: NDArray[np.float64]
    """(K,) over all runs, each weighted by its Z."""

    @property
    def missed(self) -> tuple[int, ...]:
        """The modes with mass that too few runs or particles have found."""
        few = (self.share > 0).sum(0) < len(self.share) / 2
        few |= self.ancestors.sum(0) < MIN_ANCESTORS
        return tuple(np.flatnonzero(few & (self.mass > MASS)).tolist())

    @property
    def why(self) -> str:
        """What is missed, in words."""
        k = max(self.missed, key=lambda k: float(self.mass[k]))
        return (
            f"a mode of the posterior that holds {self.mass[k]:.0%} of it was found by "
            f"{int((self.share[:, k] > 0).sum())} of {len(self.share)} runs, from {int(self.ancestors[:, k].sum())} "
            "first particles"
        )


def shares_of(reference: Reference, arrived: Arrived) -> Shares:
    """Of particles at the posterior."""
    u = arrived.particles.u  # (R, S, d)
    n_runs, n = u.shape[:2]
    k = max(1, len(reference))
    if k > 1:
        label = reference.of_each(u.flatten(0, 1)).nan_to_num(-torch.inf).argmax(1).reshape(n_runs, n)
    else:
        label = torch.zeros(n_runs, n, dtype=torch.long, device=u.device)
    share = torch.nn.functional.one_hot(label, k).to(u).mean(1)
    mass = arrived.log_z.softmax(0) @ share
    pairs = torch.stack([label * n + arrived.ancestor], 0)[0]
    ancestors = np.zeros((n_runs, k), dtype=np.int64)
    for run in range(n_runs):
        kinds = pairs[run].unique() // n
        ancestors[run] = torch.bincount(kinds, minlength=k).cpu().numpy()
    return Shares(share.double().cpu().numpy(), ancestors, mass.double().cpu().numpy())
