"""Mixtures of Gaussians in numbers, and steps of EM made longer."""

from __future__ import annotations

import math
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

    def take(self, index: Tensor | int) -> Gaussians:
        """Some of several mixtures, or one."""
        return Gaussians(*(a[index] for a in self))

    def where(self, condition: Tensor, other: Gaussians) -> Gaussians:
        """These mixtures where the condition (B,) holds, the others elsewhere."""
        parts = zip(self, other, strict=True)
        return Gaussians(*(torch.where(condition.view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in parts))

    @property
    def dense(self) -> bool:
        """Whether the scales are Cholesky factors."""
        return self.scale.ndim > self.loc.ndim

    def log_prob(self, rows: Tensor) -> Tensor:
        """Log-densities (N,) of rows (N, T), NaN where a cell is missing, of a mixture.

        By differences to the centres, which lose no digits: sums of products do where a component is narrow.
        """
        seen = ~rows.isnan()
        off = torch.where(seen, rows - self.loc[:, None], 0.0)  # (K, N, T)
        if not self.dense:
            # log N(x_o) = -sum_o (z^2 / 2 + log s + log(2 pi) / 2)
            each = torch.where(seen, self.scale.log()[:, None], 0.0)
            square = (off / self.scale[:, None]).square().sum(-1)
            return self._mixed(square, 2 * each.sum(-1), seen)
        if bool(seen.all()):  # to look for patterns takes longer than the rest
            square = torch.linalg.solve_triangular(self.scale, off.mT, upper=False).square().sum(1)
            return self._mixed(
                square, 2 * self.scale.diagonal(dim1=1, dim2=2).log().sum(1, keepdim=True), seen
            )
        shown, which = torch.unique(seen, dim=0, return_inverse=True)
        square, log_det = torch.empty_like(off[..., 0]), torch.empty_like(off[..., 0])
        cov = self.scale @ self.scale.mT
        for pattern, cells in enumerate(shown):
            index = (which == pattern).nonzero()[:, 0]
            root = torch.linalg.cholesky(cov[:, cells][:, :, cells])
            part = off[:, index][:, :, cells].mT  # (K, O, n)
            square[:, index] = torch.linalg.solve_triangular(root, part, upper=False).square().sum(1)
            log_det[:, index] = 2 * root.diagonal(dim1=1, dim2=2).log().sum(1, keepdim=True)
        return self._mixed(square, log_det, seen)

    def _mixed(self, square: Tensor, log_det: Tensor, seen: Tensor) -> Tensor:
        """From squared distances and log-determinants (K, N) of the observed cells (N, T)."""
        norm = log_det + math.log(2 * math.pi) * seen.sum(-1).to(square)
        return (self.weights.log()[:, None] - 0.5 * (square + norm)).logsumexp(0)


class Longer:
    """Steps longer than those of EM, for the way and for its end, of B mixtures side by side.

    Far from a maximum EM goes the same way for many steps, each of them short: steps of a factor more, which grows as
    long as they rise, take a third of the steps (Salakhutdinov & Roweis 2003). Near it EM is linear in the parameters:
    with steps f_i = EM(u_i) - u_i the next place is u + f - (dU + dF) g with g = argmin |f - dF g|, at which it would
    move no more (Anderson 1965; of EM: Henderson & Varadhan 2019).
    """

    def __init__(self, n_mixtures: int) -> None:
        self.factor = torch.ones(n_mixtures, dtype=torch.float64, device="cpu")
        self.n_kept = torch.zeros(
            n_mixtures, dtype=torch.long, device="cpu"
        )  # of the latest places and steps
        self.places: list[Tensor] = []
        self.steps: list[Tensor] = []

    def keep(self, index: Tensor) -> None:
        """Only these mixtures go on."""
        self.factor, self.n_kept = self.factor[index], self.n_kept[index]
        self.places, self.steps = [a[index] for a in self.places], [a[index] for a in self.steps]

    def __call__(self, before: Gaussians, after: Gaussians, plain: Tensor) -> tuple[Gaussians, Tensor]:
        """The places after ``before``, from which EM's own step goes ``after``; and which are those of EM (B,).

        ``plain`` (B,) are to take that, and begin again: what led ``before`` was too long.
        """
        place, end = _flat(before), _flat(after)
        step = end - place
        self.places.append(place)
        self.steps.append(step)
        del self.places[: -MEMORY - 1], self.steps[: -MEMORY - 1]
        plain = plain.cpu()
        self.n_kept = torch.where(plain, 0, self.n_kept + 1)
        self.factor = torch.where(plain, 1.0, (GROWTH * self.factor).clamp(max=MAX_FACTOR))
        found = place + self.factor.to(place)[:, None] * step
        near = (self.n_kept > 1) & ~(step.norm(dim=1).cpu() > NEAR)
        if bool(near.any()):
            found = torch.where(near.to(place.device)[:, None], self._linear(end), found)
        plain = plain | ~torch.isfinite(found).all(1).cpu()
        return _unflat(torch.where(plain.to(place.device)[:, None], end, found), after), plain

    def _linear(self, end: Tensor) -> Tensor:
        """Where EM would move no more if it were linear."""
        n = len(self.places)
        moved = torch.stack(self.places, 1).diff(dim=1)  # (B, M, D)
        turned = torch.stack(self.steps, 1).diff(dim=1)
        kept = (n - torch.arange(n - 1, device="cpu") <= self.n_kept[:, None]).to(end)[..., None]
        moved, turned = kept * moved, kept * turned
        gram, rhs = turned @ turned.mT, turned @ self.steps[-1][..., None]
        size = gram.diagonal(dim1=1, dim2=2).sum(1) / kept[..., 0].sum(1).clamp(min=1.0)
        ridge = (1e-10 * size).clamp(min=torch.finfo(size.dtype).tiny)
        share, failed = torch.linalg.solve_ex(
            gram + ridge[:, None, None] * torch.eye(n - 1).to(gram), rhs
        )  # (B, M, 1)
        found = end - (share.mT @ (moved + turned))[:, 0]
        return torch.where(failed[:, None] > 0, end, found)


def _flat(mix: Gaussians) -> Tensor:
    """Numbers without bounds (B, D)."""
    scale = mix.scale
    if mix.dense:
        diagonal = scale.diagonal(dim1=-2, dim2=-1)
        scale = scale.tril(-1) / diagonal[..., None] + torch.diag_embed(diagonal.log())
    else:
        scale = scale.log()
    return torch.cat([mix.weights.log(), mix.loc.flatten(1), scale.flatten(1)], 1)


def _unflat(numbers: Tensor, like: Gaussians) -> Gaussians:
    n_components, n_loc = like.weights.shape[1], like.loc[0].numel()
    weights, loc, scale = numbers.split([n_components, n_loc, numbers.shape[1] - n_components - n_loc], 1)
    scale = scale.reshape(like.scale.shape)
    if like.dense:
        diagonal = scale.diagonal(dim1=-2, dim2=-1).exp()
        scale = scale.tril(-1) * diagonal[..., None] + torch.diag_embed(diagonal)
    else:
        scale = scale.exp()
    weights = weights.softmax(1).clamp(min=MIN_WEIGHT)
    return Gaussians(weights / weights.sum(1, keepdim=True), loc.reshape(like.loc.shape), scale)
