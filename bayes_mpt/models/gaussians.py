"""Mixtures of Gaussians in numbers, and steps of EM made longer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MIN_WEIGHT", "Gaussians", "Longer"]

MIN_WEIGHT = 1e-6  # of a component: the logarithm of an empty one is infinite
GROWTH, MAX_FACTOR = 1.5, 50.0  # of the factor by which steps are longer, while they rise
NEAR = 1e-3  # the size of a step, in units of the table and logarithms, below which EM is taken as linear
MEMORY = 8  # steps of which a longer one is made there


class Gaussians(NamedTuple):
    """Gaussians in the units of a table: of a mixture, or of several, along leading dimensions."""

    weights: Tensor
    """(..., K), none of them zero"""
    loc: Tensor
    """(..., K, T)"""
    scale: Tensor
    """Cholesky factors (..., K, T, T) of the covariances, (..., 1, T, T) if tied, or standard deviations (..., K, T) or
    (..., K, 1)"""

    @property
    def dense(self) -> bool:
        """Whether the scales are Cholesky factors."""
        return self.scale.ndim > self.loc.ndim


class Longer:
    """Steps longer than those of EM, for the way and for its end.

    Far from a maximum EM goes the same way for many steps, each of them short: steps of a factor more, which grows as
    long as they rise, take a third of the steps (Salakhutdinov & Roweis 2003). Near it EM is linear in the parameters:
    with steps f_i = EM(u_i) - u_i the next place is u + f - (dU + dF) g with g = argmin |f - dF g|, at which it would
    move no more (Anderson 1965; of EM: Henderson & Varadhan 2019).
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """A step was too long: begin again with EM's own."""
        self.factor = 1.0
        self.places: list[Tensor] = []
        self.steps: list[Tensor] = []

    def __call__(self, before: Gaussians, after: Gaussians) -> Gaussians:
        """The place after ``before``, from which EM's own step goes ``after``."""
        place, end = _flat(before), _flat(after)
        step = end - place
        self.places.append(place)
        self.steps.append(step)
        del self.places[: -MEMORY - 1], self.steps[: -MEMORY - 1]
        self.factor = min(GROWTH * self.factor, MAX_FACTOR)
        found = place + self.factor * step
        if len(self.steps) > 1 and not float(step.norm()) > NEAR:
            moved = torch.stack(self.places).diff(dim=0)  # (M, D)
            turned = torch.stack(self.steps).diff(dim=0)
            gram, rhs = turned @ turned.mT, turned @ step
            ridge = 1e-10 * gram.diagonal().mean()
            share, failed = torch.linalg.solve_ex(gram + ridge * torch.eye(len(gram)).to(gram), rhs)
            found = torch.where(failed > 0, end, end - share @ (moved + turned))
        return _unflat(found, after) if bool(torch.isfinite(found).all()) else after


def _flat(mix: Gaussians) -> Tensor:
    """Numbers without bounds."""
    scale = mix.scale
    if mix.dense:
        diagonal = scale.diagonal(dim1=1, dim2=2)
        scale = scale.tril(-1) / diagonal[..., None] + torch.diag_embed(diagonal.log())
    else:
        scale = scale.log()
    return torch.cat([mix.weights.log(), mix.loc.flatten(), scale.flatten()])


def _unflat(numbers: Tensor, like: Gaussians) -> Gaussians:
    n_components, n_loc = len(like.weights), like.loc.numel()
    weights, loc, scale = numbers.split([n_components, n_loc, len(numbers) - n_components - n_loc])
    scale = scale.reshape(like.scale.shape)
    if like.dense:
        diagonal = scale.diagonal(dim1=1, dim2=2).exp()
        scale = scale.tril(-1) * diagonal[..., None] + torch.diag_embed(diagonal)
    else:
        scale = scale.exp()
    weights = weights.softmax(0).clamp(min=MIN_WEIGHT)
    return Gaussians(weights / weights.sum(), loc.reshape(like.loc.shape), scale)
