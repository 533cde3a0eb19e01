"""Integrals over a few latents whose densities jump, by scrambled Sobol points of the mixture around their modes.

A product rule of nodes is tenths of a nat off where a density of several latents jumps, and so is its error. Points
that are drawn are not: each set of scrambled Sobol points (Owen 1997) has an estimate without bias, log-density over
that of the mixture, and several sets tell its error, where the tail of the weights has a variance.
"""

from __future__ import annotations

import math

import pyro
import torch
from scipy.stats import chi2, norm, qmc
from torch import Tensor

from bayes_mpt.diagnostics import pareto_k
from bayes_mpt.predictors.nodes.mixture import Modes
from bayes_mpt.predictors.nodes.panels import Integrals
from bayes_mpt.predictors.nodes.placing import RowDensity
from bayes_mpt.predictors.nodes.rules import degrees_of

__all__ = ["by_replicates"]

N_SETS = 16
POINTS = (256, 4096)  # of a set, at first and at the most
MORE = 4  # times as many, while the error is too large
ENOUGH = 5e-3  # nats
MAX_CELLS = 2**23  # log-densities of tokens
CELLS = 2**20  # of them at a time
INSIDE = 1e-12  # of the unit cube: its faces are at infinity


@torch.no_grad()
def by_replicates(log_prob: RowDensity, modes: Modes, n_tokens: int) -> tuple[Integrals, float]:
    """Integrals of N rows, or of the latents that all rows share (N = 1).

    Parameters
    ----------
    log_prob : callable
        `RowDensity` of a few latents.
    modes : Modes
        (J, N, d)
    n_tokens : int
        T, of each row, whose log-densities an evaluation costs.

    Returns
    -------
    Integrals
        Their ``error`` is of each row, in nats: rows have points of their own, so that errors add up like those of
        independent numbers.
    k : float
        Pareto's shape of the weights of the row of the greatest error: above 0.7 the error is none.
    """
    around = modes.representatives()  # p / q is the same at all images
    n_rows = around.mode.shape[1]
    most = min(POINTS[1], MAX_CELLS // (N_SETS * n_rows * n_tokens))
    n, step = POINTS[0], max(1, CELLS // (n_rows * n_tokens))
    while True:
        with pyro.validation_enabled(False):
            log_w = torch.stack(
                [_log_weights(log_prob, modes, _points(around, n, s), step) for s in range(N_SETS)]
            )  # (sets, n, N)
        each = log_w.logsumexp(1) - math.log(n)
        log_z = each.logsumexp(0) - math.log(N_SETS)
        error = (each - log_z).exp().std(0) / math.sqrt(N_SETS)
        if MORE * n > most or float(error.square().sum().sqrt()) < ENOUGH:
            worst = log_w[:, :, int(error.argmax())].flatten()[:, None]
            k = float(pareto_k(worst.double().cpu().numpy())[0])
            return Integrals(log_z, error, n * N_SETS), k
        n *= MORE


def _log_weights(log_prob: RowDensity, modes: Modes, u: Tensor, step: int) -> Tensor:
    """log p / q (n, N) at points u (n, N, d) of the mixture q."""
    parts = [
        log_prob(some, torch.zeros(len(some), dtype=torch.long, device=u.device)) - modes.log_density(some)
        for some in u.split(step)
    ]
    return torch.cat(parts).nan_to_num(-math.inf, -math.inf)


def _points(modes: Modes, n: int, seed: int) -> Tensor:
    """Of the mixture of Student-t (n, N, d): one set of Sobol points, shifted for each row."""
    n_modes, n_rows, width = modes.mode.shape
    point = torch.as_tensor(qmc.Sobol(width + 2, seed=seed).random(n))[:, None]  # (n, 1, d + 2)
    generator = torch.Generator().manual_seed(seed)
    shift = torch.rand(n_rows, width + 2, generator=generator, dtype=point.dtype)
    point = ((point + shift) % 1).clamp(INSIDE, 1 - INSIDE)  # (n, N, d + 2)
    degrees = degrees_of(width)
    wide = (degrees / torch.as_tensor(chi2.ppf(point[..., 1], degrees))).sqrt()
    t = (torch.as_tensor(norm.ppf(point[..., 2:])) * wide[..., None]).to(modes.mode)
    until = modes.log_mass.softmax(0).cumsum(0).mT.contiguous()  # (N, J)
    which = torch.searchsorted(until, point[..., 0].mT.contiguous().to(until)).mT.clamp(max=n_modes - 1)
    row = torch.arange(n_rows, device=which.device)
    return modes.mode[which, row] + (modes.root[which, row] @ t[..., None])[..., 0]
