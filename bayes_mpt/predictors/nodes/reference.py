"""Where particles start: a fixed mixture of the prior and of the posterior's modes, widened.

    r(u) = c p(u) + (1 - c) sum_k w_k t_k(u)

t_k is a Student-t around mode k. The prior's share c is a fifth, so that no mode is missed which the prior reaches; it
is none where the prior is too vague to lead anywhere, and all where no mode was found.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from bayes_mpt.predictors.nodes.modes import Modes
from bayes_mpt.predictors.nodes.resampling import weighted_root
from bayes_mpt.predictors.nodes.rules import degrees_of, log_t

__all__ = ["Reference"]

PRIOR = 0.2  # its share
MOST_PRIOR = 0.8  # at most, where modes are doubted
START_EACH = 10  # particles from the prior for each mode that there may be
WIDER = 1.1  # than the posterior's standard deviations
ENOUGH = 3  # points a number, for their covariance to stand for a mode
EVEN = 0.5  # of a mode's share: the same for all, whatever Laplace's approximation says of its mass


@dataclass(frozen=True, eq=False)
class Reference:
    """The density that a path to the posterior starts from."""

    mode: Tensor
    """(K, d), K of 0: the prior alone."""
    root: Tensor
    """(K, d, d): covariances root root'."""
    log_mass: Tensor
    """(K,) of the posterior at the modes, by Laplace's approximation."""
    prior: float = PRIOR
    crowd: float = 0.0
    """How many modes there may be, where the search is in doubt (`Modes.crowd`)."""

    @classmethod
    def of_prior(cls, like: Tensor) -> Reference:
        """The prior alone, of points like these (..., d)."""
        d = like.shape[-1]
        return cls(like.new_zeros(0, d), like.new_zeros(0, d, d), like.new_zeros(0), 1.0)

    @classmethod
    def around(cls, modes: Modes) -> Reference | None:
        """Around modes, and the prior; None where no mode is finite."""
        mode, root, log_mass = modes.mode[:, 0], modes.root[:, 0], modes.log_mass[:, 0]
        fine = log_mass.isfinite() & mode.isfinite().all(1) & root.isfinite().flatten(1).all(1)
        if not bool(fine.any()):
            return None
        return cls(mode[fine], root[fine], log_mass[fine], crowd=modes.crowd)

    def led(self, n: int) -> Reference:
        """With so much of the prior that of n particles enough start there, where modes are doubted and it can be."""
        share = self.wanted / n
        return replace(self, prior=min(MOST_PRIOR, max(self.prior, share))) if math.isfinite(share) else self

    @property
    def wanted(self) -> float:
        """Particles that are to start from the prior: none where no mode is doubted."""
        return START_EACH * self.crowd

    def within(self, spread: Tensor) -> Reference:
        """No wider along any direction than the prior, which has a spread (d,): a ridge has no curvature."""
        left, size, right = torch.linalg.svd(self.root / spread[:, None])
        root = spread[:, None] * (left * size.clamp(max=1.0)[:, None]) @ right
        log_det = torch.linalg.slogdet(root)[1] - torch.linalg.slogdet(self.root)[1]
        return replace(self, root=root, log_mass=self.log_mass + log_det)

    def refitted(self, u: Tensor) -> Reference:
        """The same around groups of points (M, d) of the posterior, each group nearest to one of the modes."""
        label = self.of_each(u).argmax(1)
        mode, root, log_mass = self.mode.clone(), self.root.clone(), self.log_mass.clone()
        for k in range(len(self)):
            own = u[label == k]
            log_mass[k] = math.log(max(len(own), 0.5) / len(u))
            if len(own) > ENOUGH * u.shape[1]:
                mode[k] = own.mean(0)
                root[k] = weighted_root(own, own.new_full((len(own),), 1 / len(own)))
        return replace(self, mode=mode, root=root, log_mass=log_mass)

    def __len__(self) -> int:
        """K."""
        return len(self.mode)

    @property
    def share(self) -> Tensor:
        """(K,) of each mode."""
        return EVEN / max(1, len(self)) + (1 - EVEN) * self.log_mass.softmax(0)

    @cached_property
    def _back(self) -> tuple[Tensor, Tensor]:
        """(K, d, d) inverse roots, and (K,) the logarithms of their determinants."""
        back = torch.linalg.inv(self.root * WIDER)
        return back, torch.linalg.slogdet(back)[1]

    def of_each(self, u: Tensor) -> Tensor:
        """log t_k at u (M, d): (M, K)."""
        back, log_det = self._back
        white = torch.einsum("kij,mkj->mki", back, u[:, None] - self.mode)
        return log_t(white, degrees_of(u.shape[-1])) + log_det

    def log_prob(self, u: Tensor, log_prior: Tensor) -> Tensor:
        """log r at u (M, d), where the prior has log p (M,)."""
        if not len(self):
            return log_prior
        around = (self.of_each(u) + self.share.log()).logsumexp(1)
        if not self.prior:
            return around
        return torch.logaddexp(log_prior + math.log(self.prior), around + math.log1p(-self.prior))

    def draw(self, n_runs: int, n: int, prior_points: Callable[[int], Tensor]) -> Tensor:
        """n draws of each run (R, n, d), as many of each part as its share allows, in a place drawn for each run."""
        if not len(self):
            return prior_points(n_runs * n).reshape(n_runs, n, -1)
        like = self.mode
        share = torch.cat([like.new_tensor([self.prior]), (1 - self.prior) * self.share])
        even = torch.rand(n_runs, 1, dtype=like.dtype).to(like) + torch.arange(n, device=like.device)
        part = torch.searchsorted(share.cumsum(0), even / n).clamp(max=len(self)).flatten()
        u = like.new_empty(n_runs * n, like.shape[1])
        of_prior = part == 0
        if bool(of_prior.any()):
            u[of_prior] = prior_points(int(of_prior.sum()))
        k = part[~of_prior] - 1
        # a normal vector over the root of a chi-square that its axes share
        degrees = degrees_of(like.shape[1])
        normal = torch.randn(len(k), like.shape[1], dtype=like.dtype).to(like)
        chi = torch.distributions.Chi2(torch.tensor(degrees, dtype=like.dtype)).sample((len(k),)).to(like)
        t = normal * (degrees / chi).sqrt()[:, None]
        u[~of_prior] = self.mode[k] + WIDER * torch.einsum("mij,mj->mi", self.root[k], t)
        return u.reshape(n_runs, n, -1)
