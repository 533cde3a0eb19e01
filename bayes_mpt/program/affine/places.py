"""Many values of the latents, at which a map that a few probes gave is looked at once more.

A window may be so narrow that no probe is inside, and hold the mass of the posterior. Quasi-random points lie densely
along every axis, also where there are several.
"""

from __future__ import annotations

import torch
from scipy.stats import norm, qmc
from torch import Tensor

from bayes_mpt.program.affine.maps import DenseMap

__all__ = ["n_places", "places"]

MOST, LEAST = 512, 256  # places of the prior, and as many of the posterior; none where fewer are cheap
NUMBERS = 2**20  # in the largest temporary
MAX_LATENTS = 64


def n_places(n_rows: int, n_tokens: int, n_latents: int) -> int:
    """How many places of the prior are looked at, a power of two; 0 where a run at them would take long."""
    if not 0 < n_latents <= MAX_LATENTS:
        return 0
    n = min(MOST, NUMBERS // (2 * max(1, n_rows * n_tokens * n_latents)))
    return 2 ** (n.bit_length() - 1) if n >= LEAST else 0


@torch.no_grad()
def places(reading: DenseMap, value: Tensor, n: int) -> Tensor:
    """(2 n, K): n quasi-random points of the prior, and n of the posteriors given the tokens (N, T) of rows in turn.

    Of a map that rows share, or of the rows in turn. z = b + R u,  u ~ N(m, V),  V = (I + W' S^-1 W)^-1,
    m = V W' S^-1 (x - loc).
    """
    b, root = reading.latent_loc, reading.latent_root
    n_latents = b.shape[1]
    standard = torch.as_tensor(norm.ppf(qmc.Sobol(n_latents, seed=0).random(n))).to(b)
    weighted = reading.loading / reading.noise[..., None]  # (B, T, K + noise)
    n_inside = reading.loading.shape[-1]
    inside = torch.eye(n_inside).to(b) + reading.loading.mT @ weighted  # (B, ., .)
    rest = (value - reading.loc).nan_to_num(0.0)  # (N, T): a missing cell is near enough at its mean
    cov = torch.linalg.inv(inside)
    mean = (cov @ weighted.mT @ rest[..., None])[..., :n_latents, 0]  # (N, K)
    width = torch.linalg.cholesky(cov[:, :n_latents, :n_latents])  # (B, K, K)
    at = torch.arange(n, device=b.device)
    of_rows = mean[at % len(mean)] + (width[at % len(width)] @ standard[..., None])[..., 0]
    u = torch.cat([standard, of_rows])[..., None]
    every = torch.arange(2 * n, device=b.device)
    return b[every % len(b)] + (root[every % len(root)] @ u)[..., 0]
