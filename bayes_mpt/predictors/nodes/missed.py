"""Modes of a posterior that particles find, and whether each is found often enough to be weighed.

Particles that stand around none of the modes that are known are where others are looked for. Each particle belongs to
the mode whose Student-t is highest there. Of a mode whose mass matters two things are held against it: that
fewer than half of the independent runs found it, and that fewer than ten of all the particles they started with lead
there. The error of the runs knows nothing of either. Nor does it of a mode that no particle comes to: where climbs have
found so many modes that few met another, ten particles from the prior for each that there may be keep it from being
missed, and where they are fewer, that is said.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayes_mpt.predictors.nodes.newton import climb
from bayes_mpt.predictors.nodes.particles import Shown
from bayes_mpt.predictors.nodes.path import Arrived
from bayes_mpt.predictors.nodes.reference import Reference

__all__ = ["Shares", "shares_of", "unled", "with_climbs", "with_strays"]

N_STRAYS = 8  # particles from which modes are looked for
WORK = 2e8  # log-densities times the square of the numbers, that these may cost a step
MAX_STEPS = 20  # particles are near
APART = 0.5  # standard deviations between modes that are two
NEGLIGIBLE = 23.0  # nats below the largest mode: 1e-10 of it
RADIUS = 6.0  # standard deviations of the squared radius, beyond which a particle is around no mode
MATTERS = 0.05  # of the posterior, as many nats: less is no error worth a warning
MIN_ANCESTORS = 10


def with_strays(shown: Shown, reference: Reference, u: Tensor) -> Reference | None:
    """A reference with modes that particles u (M, d) have found and climbs have not; None where there are none."""
    if not len(reference):
        return None
    d = u.shape[1]
    back = torch.linalg.inv(reference.root)
    radius = torch.einsum("kij,mkj->mki", back, u[:, None] - reference.mode).square().sum(-1).amin(1)
    away = u[radius > d + RADIUS * (2 * d) ** 0.5 + RADIUS]
    cost = shown.x.shape[1] * shown.adaptive.n_evaluations * d**2
    most = max(1, min(N_STRAYS, int(WORK / cost)))
    away = away[:: max(1, -(-len(away) // most))]
    return with_climbs(shown, reference, away) if len(away) else None


def with_climbs(shown: Shown, reference: Reference, starts: Tensor) -> Reference | None:
    """A reference with the modes that climbs from points (S, d) end at; None where there are no new ones."""

    def log_prob(points: Tensor) -> Tensor:
        at = shown.adaptive
        return at.log_prob(shown.args, shown.x, shown.seen, points[:, None])[:, 0]

    peaks = climb(log_prob, starts, MAX_STEPS, shown.adaptive.sure)
    constant = 0.5 * starts.shape[1] * math.log(2 * math.pi)
    log_mass = peaks.value + torch.linalg.slogdet(peaks.root)[1] + constant
    fine = peaks.top & log_mass.isfinite()
    if not len(reference) and not bool(fine.any()):  # no top: the highest place
        fine[peaks.value.nan_to_num(-math.inf).argmax()] = True
        fine &= log_mass.isfinite()
    highest = float(torch.cat([reference.log_mass, log_mass[fine]]).amax()) if bool(fine.any()) else 0.0
    new: list[int] = []
    for k in fine.nonzero()[:, 0].tolist():
        known, roots = torch.cat([reference.mode, peaks.u[new]]), torch.cat([reference.root, peaks.root[new]])
        apart = torch.linalg.solve(roots, (peaks.u[k] - known)[..., None])[..., 0].norm(dim=1)
        if bool((apart > APART).all()) and float(log_mass[k]) > highest - NEGLIGIBLE:
            new.append(k)
    if not new:
        return None
    return replace(
        reference,
        mode=torch.cat([reference.mode, peaks.u[new]]),
        root=torch.cat([reference.root, peaks.root[new]]),
        log_mass=torch.cat([reference.log_mass, log_mass[new]]),
    )


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
        rare = (self.share > 0).sum(0) < len(self.share) / 2
        first = self.ancestors.sum(0)
        # so many ancestors make the mass of a mode uncertain by mass / sqrt(ancestors), which may not matter
        few = (first < MIN_ANCESTORS) & (self.mass > MATTERS * np.sqrt(np.maximum(first, 1)))
        return tuple(np.flatnonzero(few | (rare & (self.mass > MATTERS))).tolist())

    @property
    def why(self) -> str:
        """What is missed, in words."""
        k = max(self.missed, key=lambda k: float(self.mass[k]))
        return (
            f"a mode of the posterior that holds {self.mass[k]:.0%} of it was found by "
            f"{int((self.share[:, k] > 0).sum())} of {len(self.share)} runs, from {int(self.ancestors[:, k].sum())} "
            "first particles"
        )


def unled(reference: Reference, n: int) -> str:
    """What speaks for modes that none of n particles has come to, in words; empty where nothing does."""
    n_prior = math.ceil(reference.prior * n)
    if n_prior >= reference.wanted - 1:
        return ""
    crowd = f"{reference.crowd:.0f} modes" if math.isfinite(reference.crowd) else "any number of modes"
    return (
        f"climbs have ended at so many places, and so few at the same, that there may be {crowd}, too many for the "
        f"{n_prior} particles that start from the prior"
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
