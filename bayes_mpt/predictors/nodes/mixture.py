"""A mixture around the modes of a posterior: proposal of draws, and how the integral is shared out among nodes."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_mpt.predictors.nodes.newton import LaplaceApproximation
from bayes_mpt.predictors.nodes.resampling import systematic
from bayes_mpt.predictors.nodes.rules import Rule, degrees_of, log_t, stretched
from bayes_mpt.predictors.nodes.symmetries import Coordinates, Moves

__all__ = ["Modes", "Orbits"]

PART_DEGREES = 10.0  # of freedom of the Student-t by which modes share the integral of a row


class Orbits(NamedTuple):
    """What moves each of R modes that were found, and each of C - R pieces beside them, to its images."""

    where: Coordinates
    moves: tuple[Moves, ...]
    """C of them, each with the one that moves nothing first."""
    parents: tuple[int, ...]
    """Of each of the C the mode beside which it stands: of a mode itself."""
    counts: tuple[int, ...]
    """How many images each of the C has: more than those listed, where only those within reach are."""

    @property
    def partial(self) -> bool:
        """Whether there are more images than those listed."""
        return any(n > len(by.order) for n, by in zip(self.counts, self.moves, strict=True))

    @property
    def log_count(self) -> Tensor:
        """log of the number of images of each (C,)."""
        return torch.tensor(self.counts, dtype=torch.float64).log()

    @property
    def first(self) -> list[int]:
        """Where those that are no images stand among all."""
        return [0, *accumulate(len(m.order) for m in self.moves[:-1])]

    def spread(self, u: Tensor, root: Tensor, log_mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All images (J, 1, ...) of modes and pieces (C, d), their roots (C, d, d) and masses (C,)."""
        modes, roots, masses = [], [], []
        for mode, its, mass, by in zip(u, root, log_mass, self.moves, strict=True):
            images, image_roots = self.where.images(mode, its, by)
            modes.append(images[:, None])
            roots.append(image_roots[:, None])
            masses.append(mass.expand(len(images))[:, None])
        return torch.cat(modes), torch.cat(roots), torch.cat(masses)


class Modes(NamedTuple):
    """J modes of the latents of N rows (N = 1: of all rows), with their curvatures and masses.

    Where these do not make the shape of a posterior, more pieces of it stand among them.
    """

    mode: Tensor
    """(J, N, d)"""
    root: Tensor
    """(J, N, d, d): covariance = root root'."""
    log_mass: Tensor
    """(J, N): log of the integral around each, approximately."""
    doubt: str = ""
    """What speaks for modes that were missed, in words; empty where nothing does."""
    orbits: Orbits | None = None
    """Which modes are images of others; None where symmetries were not looked for."""
    reach: Tensor | None = None
    """(J, N, d, 2): how far the density reaches along both sides of each axis of the root, in units of it."""
    crowd: float = 0.0
    """Of modes that are doubted: how many there may be, images of one counted once. Infinite: no telling."""

    @classmethod
    def one(cls, located: LaplaceApproximation) -> Modes:
        """A single mode of each row."""
        return cls(located.mode[None], located.root[None], located.mode.new_zeros(1, len(located.mode)))

    @property
    def log_share(self) -> Tensor:
        """(J, N) log w_j; they add up to less than 1 where there are more images than those listed."""
        if self.orbits is None or not self.orbits.partial:
            return self.log_mass.log_softmax(0)
        return self.log_mass - self.representatives().log_mass.logsumexp(0)

    @property
    def has_pieces(self) -> bool:
        """Whether there is more in it than modes."""
        return self.orbits is not None and any(c != parent for c, parent in enumerate(self.orbits.parents))

    def log_gaussian(self, u: Tensor) -> Tensor:
        """log of Gaussians q_j at u (..., N, d): (J, ..., N)."""
        white, log_det = self._white(u)
        return -0.5 * white.square().sum(-1) - log_det - 0.5 * u.shape[-1] * math.log(2 * math.pi)

    def of_rows(self, rows: slice) -> Modes:
        """Those of some rows."""
        reach = None if self.reach is None else self.reach[:, rows]
        return Modes(self.mode[:, rows], self.root[:, rows], self.log_mass[:, rows], reach=reach)

    def log_part(self, u: Tensor) -> Tensor:
        """Log of each mode's part (J, Q, N) of the integral, q_j w_j / sum_i w_i q_i, at u (J, Q, N, d) around it.

        With Gaussians q; where nodes reach far with Student-t, whose parts change over lengths that steps grow with.
        """
        if self.reach is None:
            each = self.log_gaussian(u)  # (J, J, Q, N)
        else:
            white, log_det = self._white(u)
            each = log_t(white, PART_DEGREES) - log_det
        shares = (each + self.log_share[:, None, None]).log_softmax(0)
        return shares.diagonal(dim1=0, dim2=1).movedim(-1, 0)

    def nodes(self, rule: Rule) -> tuple[Tensor, Tensor]:
        """Nodes u (J, Q, N, d) of a rule around each mode, and their log-weights (J, Q, N).

        int f(u) du = sum_jq exp(log_weight_jq) f(u_jq)
        """
        t, log_w = rule.t.to(self.mode), rule.log_weight.to(self.mode)[:, None]  # (Q, d), (Q, 1)
        # products of matrices, where broadcasting would copy a root for each node
        if self.reach is not None:
            t, more = stretched(t[:, None], self.reach[:, None])  # (J, Q, N, d), (J, Q, N)
            log_w = log_w + more
            step = (t.transpose(1, 2) @ self.root.mT).transpose(1, 2)
        else:
            step = (t @ self.root.flatten(1, 2).mT).unflatten(-1, self.mode.shape[1:])
        u = self.mode[:, None] + step
        log_weight = log_w + torch.linalg.slogdet(self.root)[1][:, None]
        return u, log_weight if len(self.mode) == 1 else log_weight + self.log_part(u)

    def log_density(self, u: Tensor) -> Tensor:
        """log q of the mixture of Student-t at u (..., N, d): (..., N)."""
        white, log_det = self._white(u)
        each = log_t(white, degrees_of(u.shape[-1])) - log_det
        return (each + self.log_share.reshape(log_det.shape)).logsumexp(0)

    def representatives(self) -> Modes:
        """Those that are no images, each with the mass of all its images."""
        if self.orbits is None:
            return self
        first = torch.tensor(self.orbits.first, device=self.mode.device)
        mass = self.log_mass[first] + self.orbits.log_count.to(self.log_mass)[:, None]
        return Modes(self.mode[first], self.root[first], mass)

    def draws(self, n: int) -> Tensor:
        """Of the mixture of Student-t (n, N, d): around each mode as many as its share asks for."""
        return self.drawn(n)[0]

    def drawn(self, n: int) -> tuple[Tensor, Tensor]:
        """`draws`, and which mode or piece each is of (n, N), all images of one counted as one."""
        if self.orbits is not None and self.orbits.partial:
            return self.representatives().drawn(n)  # p / q is the same at all images
        n_modes, n_rows, width = self.mode.shape
        # multivariate t: a normal vector over the root of a chi-square that its axes share
        normal = torch.randn(n, n_rows, width, dtype=self.mode.dtype).to(self.mode)
        degrees = degrees_of(width)
        chi = (
            torch.distributions.Chi2(torch.tensor(degrees, dtype=normal.dtype)).sample((n, n_rows)).to(normal)
        )
        t = normal * (degrees / chi.to(normal))[..., None].sqrt()
        if n_modes == 1:
            one = torch.zeros(n, n_rows, dtype=torch.long, device=t.device)
            return self.mode[0] + (self.root[0] @ t[..., None])[..., 0], one
        of = systematic(self.log_share.mT.expand(n_rows, -1), n).mT  # (n, N)
        row = torch.arange(n_rows, device=of.device)
        u = self.mode[of, row] + (self.root[of, row] @ t[..., None])[..., 0]
        if self.orbits is None:
            return u, of
        return u, torch.bucketize(of, torch.tensor(self.orbits.first[1:], device=of.device), right=True)

    def _white(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """u (..., N, d) in units of each mode (J, ..., N, d), and log |root| (J, ..., N) of it."""
        n_modes, n_rows, width = self.mode.shape
        inner = (1,) * (u.ndim - 2)
        apart = u - self.mode.reshape(n_modes, *inner, n_rows, width)
        log_det = torch.linalg.slogdet(self.root)[1].reshape(n_modes, *inner, n_rows)
        # one product of matrices for each mode and row, where broadcasting would copy inverses for each u
        by_row = apart.flatten(1, -3).transpose(1, 2) if inner else apart[:, :, None]  # (J, N, ..., d)
        white = by_row @ torch.linalg.inv(self.root).mT
        return white.transpose(1, 2).reshape(apart.shape) if inner else white[:, :, 0], log_det
