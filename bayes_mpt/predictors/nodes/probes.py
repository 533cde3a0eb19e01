"""What nodes around modes have not seen: places of the prior that no climb and no node comes near.

A window that is narrow and holds the mass, in a density that is flat elsewhere, has no slope that leads there. Of one
latent many nodes are cheap, so that panels over all that the prior reaches are held against the nodes. Of several
latents points of the prior's width tell at least that there is a higher place than all modes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyro
import torch
from scipy.stats import norm, qmc
from torch import Tensor

from bayes_mpt.predictors.nodes.conjugacy import prior_draws
from bayes_mpt.predictors.nodes.mixture import Modes
from bayes_mpt.predictors.nodes.placing import reaching
from bayes_mpt.program.arguments import Args
from bayes_mpt.program.batched import Batched
from bayes_mpt.program.store import own_random_state

if TYPE_CHECKING:
    from bayes_mpt.predictors.nodes.adaptive import AdaptiveNodes

__all__ = ["highest_of_prior", "n_probes", "reach_of_prior"]

N_DRAWS = 9
CUT = 18.0  # nats below the middle of the prior, where it ends
CELLS = 2**20  # log-densities of tokens that probes may cost
PROBES = (480, 1920)  # at least, or none, and at the most
N_POINTS = 1024  # of several latents
NARROWEST = 1e-6


def n_probes(at: AdaptiveNodes, value: Tensor) -> int:
    """How many places rows (N, T) are looked at; 0 where they are too many, or run one by one."""
    n = min(PROBES[1], CELLS // max(1, value.numel() * at.n_evaluations))
    return n if n >= PROBES[0] and at.batched is not Batched.LOOP else 0


@torch.no_grad()
def reach_of_prior(at: AdaptiveNodes, args: Args, value: Tensor) -> Modes:
    """The middle of one latent's prior in each row (1, N, 1), and how far it reaches to both sides."""
    middle, spread = _of_draws(at, args, len(value))
    around = Modes(middle[None], spread[None, ..., None], middle.new_zeros(1, len(middle)))
    nothing = torch.zeros(value.shape[1], dtype=torch.bool, device=value.device)
    return reaching(at.row_density(args, value, nothing, {}), around, 1, CUT)


@torch.no_grad()
def highest_of_prior(
    at: AdaptiveNodes, args: Args, value: Tensor, modes: Modes, top: float | None = None
) -> float:
    """By how many nats a place of the prior is higher than ``top``, by default that of draws around the modes.

    Of latents that all rows share; 0 where none is.
    """
    n = min(N_POINTS, n_probes(at, value))
    if not n:
        return 0.0
    middle, spread = _of_draws(at, args, 1)
    normal = torch.as_tensor(norm.ppf(qmc.Sobol(middle.shape[1], seed=0).random(N_POINTS)[:n])).to(middle)
    with own_random_state(0):
        known = torch.cat([modes.mode, modes.draws(n)])
    u = torch.cat([known, middle + spread * normal[:, None]])  # (J + 2 n, 1, d)
    everything = torch.ones(value.shape[1], dtype=torch.bool, device=value.device)
    with pyro.validation_enabled(False), own_random_state():
        density = at.row_density(args, value, everything, {})
        found = density(u, torch.zeros(len(u), dtype=torch.long, device=u.device))[:, 0]
    found = torch.where(found.isfinite(), found, -torch.inf)
    top = float(found[: len(known)].amax()) if top is None else top
    return max(0.0, float(found[len(known) :].amax()) - top)


def _of_draws(at: AdaptiveNodes, args: Args, n_rows: int) -> tuple[Tensor, Tensor]:
    """Middle and spread (N, d) of a few draws of the prior."""
    traces = prior_draws(at.model, args.filled, N_DRAWS)
    draws = torch.stack([at.within_reach(at.space.pack(t, n_rows)[0]) for t in traces])  # (9, N, d)
    return draws.median(0).values, draws.std(0).clamp(min=NARROWEST)
