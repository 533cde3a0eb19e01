"""Noise variances that a training has left at zero, and whether the likelihood grows without bound there."""

from __future__ import annotations

import torch
from torch import Tensor

from bayes_mpt.concentrated import NoiseFloorError
from bayes_mpt.predictors import LinearGaussian
from bayes_mpt.training.problem import Problem

__all__ = ["noise_at_zero"]

SMALL = 1e-3  # of a token's variance: a larger noise is none that vanishes
LOWER = 1e-4  # by which a noise is multiplied to see whether it matters
LEAST = 1e-8  # of a token's variance: from here on down, where a noise is smaller yet and sums have lost their digits
NOTHING = 0.01  # nats of all rows, below which it does not
MUCH = 1.0  # nats of all rows, by which a bounded likelihood does not rise


def noise_at_zero(problem: Problem) -> list[int]:
    """Columns with trained noise variances that could as well be zero: the likelihood does not fall on the way there.

    Raises
    ------
    NoiseFloorError
        If it rises without bound.
    """
    predictor = problem.read()
    if not isinstance(predictor, LinearGaussian) or len(predictor.reading.noise) > 1:
        return []
    noise, loading = predictor.reading.noise[0], predictor.reading.loading[0]
    small = (noise <= SMALL * (noise + loading.square().sum(-1))).nonzero()[:, 0].tolist()
    if not small or not noise.requires_grad:
        return []
    tied = _tied(noise, list(problem.leaves().values()))
    with torch.no_grad():
        least = LEAST * (noise + loading.square().sum(-1))

        def score(noise: Tensor) -> float:
            moved = predictor.with_reading(predictor.reading._replace(noise=noise[None]))
            return float(problem.score_of(moved))

        def gain(columns: Tensor) -> float:
            """Nats of all rows by which the likelihood rises where these columns' noise is lowered."""
            high = torch.where(columns, noise.maximum(least), noise)
            low = torch.where(columns, LOWER * high, high)
            return (score(low) - score(high)) * problem.n_rows

        found = torch.zeros(len(noise), dtype=torch.bool, device=noise.device)
        for column in small:
            if not bool(found[column]) and bool(tied[column].any()) and gain(tied[column]) > -NOTHING:
                found |= tied[column]
        columns = found.nonzero()[:, 0].tolist()
        if columns and gain(found) > MUCH:
            raise NoiseFloorError(columns)
    return columns


def _tied(noise: Tensor, leaves: list[Tensor]) -> Tensor:
    """Which noise variances share parameters: (T, T), rows of False where there is none."""
    touched = []
    for value in noise:
        grads = torch.autograd.grad(value, leaves, retain_graph=True, materialize_grads=True)
        touched.append(torch.cat([(g != 0).flatten() for g in grads]))
    shared = torch.stack(touched).to(noise)
    return shared @ shared.mT > 0
