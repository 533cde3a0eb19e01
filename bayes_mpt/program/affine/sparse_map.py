"""The linear-Gaussian map of a chain of latents, as a list of its nonzeros.

z_k = latent_loc_k + sum_j slope_kj z_j + (root u)_k,    x_i = loc_i + sum_j slope_ij z_j + e_i
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal

from bayes_mpt.program.affine.maps import DenseMap, integrate_prior

__all__ = ["Blocks", "Layout", "NotSparse", "SparseMap"]


class NotSparse(Exception):
    """A dense map costs less."""


class Layout(NamedTuple):
    """Where the nonzeros of a map are, and its blocks; found once."""

    out: Tensor
    """(E,) which output (K latents, then T tokens) has a slope,"""
    into: Tensor
    """(E,) and along which latent."""
    colour: Tensor
    """(K + T,) of each output: those of one colour share no latent."""
    root_row: Tensor
    """(F,)"""
    root_col: Tensor
    """(F,)"""
    n_blocks: int
    width: int
    """w, latents in a block; the last one is filled up."""
    n_slots: int
    """Most tokens in a block."""
    place: Tensor
    """(K,) of each latent among the n_blocks x w."""
    slot: Tensor
    """(T,) of each token among the n_blocks x n_slots."""

    @property
    def n_colours(self) -> int:
        return int(self.colour.max()) + 1


class Blocks(NamedTuple):
    """The chain of blocks: z_b = start + step z_(b-1) + root u,  x_b = loc + before z_(b-1) + own u + e."""

    start: Tensor
    """(B, n, w)"""
    step: Tensor
    """(B, n, w, w)"""
    root: Tensor
    """(B, n, w, w)"""
    loc: Tensor
    """(B, n, t)"""
    before: Tensor
    """(B, n, t, w)"""
    own: Tensor
    """(B, n, t, w)"""

    def take(self, index: Tensor) -> Blocks:
        """Some of the blocks, by number."""
        return Blocks(*(t[:, index] for t in self))

    noise: Tensor
    """(B, n, t); 1 in slots without a token."""


class SparseMap(NamedTuple):
    """The map at the current parameters. B is 1 (shared by all rows) or N."""

    loc: Tensor
    """(B, T) means of the tokens where all latents are zero."""
    latent_loc: Tensor
    """(B, K) means of the latents where those they depend on are zero."""
    slope: Tensor
    """(B, E) at ``layout.out``, ``layout.into``."""
    root: Tensor
    """(B, F) at ``layout.root_row``, ``layout.root_col``: factors of the latents' covariances given earlier ones."""
    noise: Tensor
    """(B, T) variances."""
    scale: float
    value: Tensor
    layout: Layout

    def tokens_at(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means and variances of the tokens given latents z (N, K), and the size of what the means are sums of."""
        mean, size = self.means_at(z)
        n_latents = z.shape[-1]
        return mean[:, n_latents:], self.noise.expand(len(z), -1), size[:, n_latents:]

    def means_at(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Means of latents and tokens side by side given the latents z (N, K), and the size of their parts."""
        start = torch.cat([self.latent_loc, self.loc], 1).expand(len(z), -1)
        part = self.slope * z[:, self.layout.into]
        return start.index_add(1, self.layout.out, part), start.abs().index_add(
            1, self.layout.out, part.abs()
        )

    def log_joint(self, z: Tensor, value: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """log p(value, z), summed over rows, from the means and variances of the tokens at z."""
        rest = z - self.means_at(z)[0][:, : z.shape[-1]]
        _, root = self._latent_blocks()
        rest = _scatter(rest, self.layout.place, (self.layout.n_blocks, self.layout.width))
        u = torch.linalg.solve_triangular(root, rest[..., None], upper=False)
        logdet = self._filled_diagonal().log().sum(-1).expand(len(z)).sum()
        n_filled = (self.layout.n_blocks * self.layout.width - z.shape[-1]) * len(z)
        prior = Normal(0.0, 1.0).log_prob(u).sum() - logdet + 0.5 * math.log(2 * math.pi) * n_filled
        return Normal(mean, variance.sqrt()).log_prob(value).sum() + prior

    def dense(self) -> DenseMap:
        """The map as matrices (K, K) and (T, K)."""
        k, t = self.latent_loc.shape[1], self.loc.shape[1]
        slope = _scatter(self.slope, self.layout.out * k + self.layout.into, (k + t, k))
        root = _scatter(self.root, self.layout.root_row * k + self.layout.root_col, (k, k))
        reading = integrate_prior(
            self.loc, slope[:, k:], self.noise, self.latent_loc, slope[:, :k], root, self.value
        )
        return reading._replace(scale=self.scale)

    def blocks(self) -> Blocks:
        """The map as a chain of blocks."""
        n, w, t = self.layout.n_blocks, self.layout.width, self.layout.n_slots
        n_latents = self.latent_loc.shape[1]
        within, root = self._latent_blocks()
        out, into = self.layout.out, self.layout.into
        column = self.layout.place[into]
        prior = out < n_latents
        row = torch.where(prior, self.layout.place[out.clamp(max=n_latents - 1)], 0)
        earlier = prior & (column // w != row // w)
        step = _scatter(self.slope[:, earlier], row[earlier] * w + column[earlier] % w, (n, w, w))
        start = _scatter(self.latent_loc, self.layout.place, (n, w))
        if within is not None:
            # z = start + step z_before + within z + root u: latents stand in an order in which `within` is lower
            left = torch.eye(w, dtype=step.dtype, device=step.device) - within
            right = torch.cat([start[..., None], step, root], -1)
            solved = torch.linalg.solve_triangular(left, right, upper=False, unitriangular=True)
            start, step, root = solved[..., 0], solved[..., 1 : 1 + w], solved[..., 1 + w :]
        slot = self.layout.slot[(out - n_latents).clamp(min=0)]
        here = ~prior & (column // w == slot // t)
        there = ~prior & ~here
        own = _scatter(self.slope[:, here], slot[here] * w + column[here] % w, (n, t, w))
        before = _scatter(self.slope[:, there], slot[there] * w + column[there] % w, (n, t, w))
        loc = _scatter(self.loc, self.layout.slot, (n, t))
        noise = _scatter(self.noise, self.layout.slot, (n, t), fill=1.0)
        return Blocks(
            start,
            step,
            root,
            loc + (own @ start[..., None])[..., 0],
            before + own @ step,
            own @ root,
            noise,
        )

    def _latent_blocks(self) -> tuple[Tensor | None, Tensor]:
        """Slopes of latents along others of their block (B, n, w, w), None without any, and the roots."""
        n, w, place = self.layout.n_blocks, self.layout.width, self.layout.place
        n_latents = self.latent_loc.shape[1]
        row, col = place[self.layout.root_row], place[self.layout.root_col]
        root = _scatter(self.root, row * w + col % w, (n, w, w))
        filled = torch.ones(n * w, dtype=root.dtype, device=root.device).index_fill(0, place, 0.0)
        root = root + torch.diag_embed(filled.unflatten(0, (n, w)))
        prior = self.layout.out < n_latents
        out, into = place[self.layout.out[prior]], place[self.layout.into[prior]]
        same = out // w == into // w
        if not bool(same.any()):
            return None, root
        return _scatter(self.slope[:, prior][:, same], out[same] * w + into[same] % w, (n, w, w)), root

    def _filled_diagonal(self) -> Tensor:
        return self.root[:, self.layout.root_row == self.layout.root_col]


def _scatter(values: Tensor, index: Tensor, shape: tuple[int, ...], fill: float = 0.0) -> Tensor:
    """(B, E) at E different places of an array of this shape: (B, *shape)."""
    start = values.new_full((len(values), math.prod(shape)), fill)
    return start.index_copy(1, index, values).unflatten(1, shape)
