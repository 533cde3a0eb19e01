"""Variances that a training has left at zero, and whether the likelihood grows without bound there."""

from __future__ import annotations

import torch
from torch import Tensor

from bayes_mpt.predictors.gaussian.linear import LinearRows
from bayes_mpt.predictors.gaussian.profile import NoiseFloorError
from bayes_mpt.training.problem import Problem

__all__ = ["collapsed", "noise_at_zero"]

SMALL = 1e-3  # of a token's variance: a larger noise is none that vanishes
LOWER = 1e-4  # by which a noise is multiplied to see whether it matters
MIN_NOISE = (
    1e-8  # of a token's variance: from here on down, where a noise is smaller yet and sums lose digits
)
NOTHING = 0.01  # nats of all rows, below which it does not
COLLAPSED = (
    1e-10  # of the columns' variances: below it a component of a mixture has no spread in some direction
)
ITS_SHARE = 0.5  # of the largest, from which a column is named
MUCH = 1.0  # nats of all rows, by which a bounded likelihood does not rise


def noise_at_zero(problem: Problem) -> list[int]:
    """Columns with trained noise variances that could as well be zero: the likelihood does not fall on the way there.

    A prior of the noise variances counts with it: it has no weight at zero, and holds them away from there.

    Raises
    ------
    NoiseFloorError
        If it rises without bound.
    """
    if not problem.bound.structure.dense:
        return []
    read = problem.objective.read()
    reading = read.linear_map()
    if reading is None or len(reading.noise) > 1:
        return []
    noise, loading = reading.noise[0], reading.loading[0]
    small = (noise <= SMALL * (noise + loading.square().sum(-1))).nonzero()[:, 0].tolist()
    if not small or not noise.requires_grad:
        return []
    tied, prior = _tied(noise, list(problem.leaves().values())), problem.noise_prior
    with torch.no_grad():
        least = MIN_NOISE * (noise + loading.square().sum(-1))

        def score(noise: Tensor) -> float:
            moved = LinearRows(read.structure, reading._replace(noise=noise[None]))
            held = 0.0 if prior is None else prior.of_map(noise) / problem.whole.n_rows
            return float(problem.score_of(moved) + held)

        def gain(columns: Tensor) -> float:
            """Nats of all rows by which the likelihood rises where these columns' noise is lowered."""
            high = torch.where(columns, noise.maximum(least), noise)
            low = torch.where(columns, LOWER * high, high)
            return (score(low) - score(high)) * problem.whole.n_rows

        found = torch.zeros(len(noise), dtype=torch.bool, device=noise.device)
        for column in small:
            if not bool(found[column]) and bool(tied[column].any()) and gain(tied[column]) > -NOTHING:
                found |= tied[column]
        columns = found.nonzero()[:, 0].tolist()
        if columns and gain(found) > MUCH:
            raise NoiseFloorError(columns)
    return columns


@torch.no_grad()
def collapsed(problem: Problem) -> dict[int, list[int]]:
    """Components of a mixture of Gaussian maps that have lost their spread, and the columns in whose direction."""
    if problem.bound.structure.affine:
        return {}
    read = problem.objective.read()
    reading, x = read.linear_map(), read.value
    if reading is None:
        return {}
    seen = ~x.isnan()
    mean = x.nan_to_num(0.0).sum(0) / seen.sum(0)
    sd = (torch.where(seen, x - mean, 0.0).square().sum(0) / seen.sum(0)).sqrt()
    unit = torch.where(sd > 0, sd, torch.ones_like(sd))
    loading = reading.loading / unit[:, None]
    cov = loading @ loading.mT + torch.diag_embed(reading.noise / unit.square())  # (S, T, T)
    value, vector = torch.linalg.eigh(cov)
    lost = value < COLLAPSED  # (S, T)
    share = (vector.square() * lost[:, None]).sum(-1)  # (S, T), of each column's axis
    return {
        component: (share[component] >= ITS_SHARE * share[component].max()).nonzero()[:, 0].tolist()
        for component in lost.any(1).nonzero()[:, 0].tolist()
    }


def _tied(noise: Tensor, leaves: list[Tensor]) -> Tensor:
    """Which noise variances share parameters: (T, T), rows of False where there is none."""
    touched = []
    for value in noise:
        grads = torch.autograd.grad(value, leaves, retain_graph=True, materialize_grads=True)
        touched.append(torch.cat([(g != 0).flatten() for g in grads]))
    shared = torch.stack(touched).to(noise)
    return shared @ shared.mT > 0
