"""Draws of the latents of each row from a shape that was learned of it, in place of a product of nodes.

Beside shared latents w that are drawn themselves, what p(x_n | w) is needed for is a mean over these draws, and an
unbiased estimate serves as well as the number (Andrieu & Roberts 2009): its error is one more part of how uneven the
weights of the draws are, and so of the error that is stated. In coordinates t of the row's own mode and root the
posterior of a row hardly changes with w. Its shape is learned once, at a few w with a product of nodes, as the share of
the integral in each cell between them. Draws of these cells, stratified, with some of a wide Student-t beside,
give the estimate:

    p(x_n | w) = mean over i of  p(z_i, x_n | w) |root| / q(t_i),    z_i = mode + root t_i

Three latents of slowly falling tails take 729 nodes to a tenth of a nat in twenty rows, or 64 draws of the kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from scipy.stats import qmc
from torch import Tensor

from bayes_mpt.predictors.nodes.mixture import Modes
from bayes_mpt.predictors.nodes.rules import Rule, degrees_of, log_t, stretched, unstretched

__all__ = ["RowDraws", "learned", "upright"]

WIDE, WIDER = (
    0.125,
    1.3,
)  # draws of the Student-t for each one of the cells, and its scale in units of the root
NOISE = (
    0.25  # variance of the log density of all rows, at one value of the shared latents, that draws may add
)
MIN_DRAWS = 32
CHEAPER = 4  # times fewer draws than nodes, from which they are taken
CELLS = 2**20  # log-densities of tokens at a time
NEAR = 50.0  # nats below the best: values further down teach nothing


@dataclass(frozen=True)
class RowDraws:
    """The shapes of the posteriors of N rows, as cells that have shares of them."""

    reach: Tensor
    """(N, d, 2): up to where cells are, to both sides of each axis of the root, in units of it."""
    share: Tensor
    """(N, (n + 2)^d) of each of n cells along every axis, and 0 around them."""
    n_along: int
    """n"""
    shown: Tensor
    """(N, T): the tokens that the posteriors are given."""
    n_draws: int
    """Of cells; those of the Student-t come on top."""

    @property
    def n_points(self) -> int:
        """Q, of all kinds."""
        return self.n_draws + self._n_wide

    @property
    def _n_wide(self) -> int:
        return int(WIDE * self.n_draws)

    def serves(self, shown: Tensor) -> bool:
        """Whether the shapes are those given these tokens (N, T)."""
        return self.shown.shape == shown.shape and bool((self.shown == shown).all())

    def nodes(self, modes: Modes, n_nodes: int, alike: bool) -> tuple[Tensor, Tensor]:
        """Draws u (S, Q, N, d) at each of S values of the shared latents, and their log-weights (S, Q, N).

        int f(u) du = E sum_q exp(log_weight_q) f(u_q)

        The same for the same S whenever they are asked for. ``alike``: the same t at all S, so that what they give is
        smooth in the shared latents.
        """
        n_rows, width = self.reach.shape[:2]
        mode, root = (t[0].unflatten(0, (n_nodes, n_rows)) for t in (modes.mode, modes.root))
        generator = torch.Generator().manual_seed(0)
        n = 1 if alike else n_nodes
        s = self._of_cells(
            torch.rand(n, 1, n_rows, width + 1, generator=generator, dtype=mode.dtype).to(mode)
        )
        t, more = stretched(s, self.reach)
        degrees = degrees_of(width)
        normal = torch.randn(
            n, self._n_wide, n_rows, width + int(degrees), generator=generator, dtype=mode.dtype
        ).to(mode)
        chi = normal[..., width:].square().sum(-1, keepdim=True)
        far = WIDER * normal[..., :width] * (int(degrees) / chi).sqrt()
        s_far, more_far = unstretched(far, self.reach)
        t, s, more = (torch.cat(both, 1) for both in zip((t, s, more), (far, s_far, more_far), strict=True))
        # q(t) = (1 - a) q_cells(s) ds/dt + a q_wide(t)
        of_cells = self._log_density(s) - more + math.log(self.n_draws / self.n_points)
        of_wide = log_t(t / WIDER, degrees) - width * math.log(WIDER) + math.log(self._n_wide / self.n_points)
        log_q = torch.logaddexp(of_cells, of_wide) + math.log(self.n_points)
        u = mode[:, None] + (root[:, None] @ t[..., None])[..., 0]
        return u, torch.linalg.slogdet(root)[1][:, None] - log_q

    def _of_cells(self, shift: Tensor) -> Tensor:
        """Draws s (S, Q, N, d) of the density of `_log_density`, by Sobol points that are shifted (S, 1, N, d + 1)."""
        width, n = self.reach.shape[1], self.n_along
        point = (_sobol(self.n_draws, width + 1).to(shift)[:, None] + shift) % 1  # (S, Q, N, d + 1)
        until = self.share.cumsum(1)
        of = point[..., 0].movedim(-1, 0)  # (N, S, Q)
        cell = torch.searchsorted(until, (of.flatten(1) * until[:, -1:]).contiguous(), right=True)
        cell = cell.clamp(max=until.shape[1] - 1).unflatten(1, of.shape[1:]).movedim(0, -1)
        step = [(n + 2) ** (width - 1 - i) for i in range(width)]
        place = torch.stack([cell // k % (n + 2) - 1 for k in step], -1).to(shift)
        # up to the middles of the next cells, ever rarer: a density that is even between the middles of cells
        part = point[..., 1:]
        aside = torch.where(part < 0.5, (2 * part).sqrt() - 1, 1 - (2 - 2 * part).sqrt())
        return -1 + (place + aside) * 2 / (n - 1)

    def _log_density(self, s: Tensor) -> Tensor:
        """Log-density (...) of s (..., N, d): between the middles of cells in proportion of their shares."""
        n_rows, width = self.reach.shape[:2]
        n = self.n_along
        at = (s + 1) * (n - 1) / 2
        inside = ((at > -1) & (at < n)).all(-1)
        low = at.nan_to_num().floor().clamp(-1, n - 1)
        over, low = at - low, low.long() + 1
        base = torch.arange(n_rows, device=s.device) * (n + 2) ** width
        step = [(n + 2) ** (width - 1 - i) for i in range(width)]
        for i, k in enumerate(step):
            base = base + low[..., i] * k
        flat, density = self.share.flatten(), torch.zeros_like(s[..., 0])
        for corner in product((0, 1), repeat=width):
            part = flat[
                (base + sum(c * k for c, k in zip(corner, step, strict=True))).clamp(max=len(flat) - 1)
            ]
            for i, c in enumerate(corner):
                part = part * (over[..., i] if c else 1 - over[..., i])
            density = density + part
        return torch.where(inside, density, 0.0).log() + width * math.log((n - 1) / 2)


def upright(modes: Modes) -> Modes:
    """The same with triangular roots: a root is turned as it was found, and shapes are told along its axes."""
    cov = modes.root @ modes.root.mT
    lower, failed = torch.linalg.cholesky_ex(cov)
    return modes._replace(root=torch.where((failed == 0)[..., None, None], lower, modes.root))


@cache
def _sobol(n: int, width: int) -> Tensor:
    return torch.as_tensor(qmc.Sobol(width, seed=0).random(n))


def learned(
    log_prob: Callable[[Tensor, Tensor], Tensor], modes: Modes, n_nodes: int, rule: Rule, shown: Tensor
) -> RowDraws | None:
    """The shapes of N rows, seen at S values of the shared latents; None where nodes cost little more than draws.

    Parameters
    ----------
    log_prob : callable
        `RowDensity`.
    modes : Modes
        One of each row at each of the S values (1, S N, ...), with its reach.
    rule : Rule
        An even one along every axis, for nodes that reach far.
    shown : Tensor
        (N, T) what the density is given.
    """
    assert modes.reach is not None
    n_rows, width = len(shown), modes.mode.shape[-1]
    good = modes.mode[0].isfinite().all(-1).unflatten(0, (n_nodes, n_rows)).all(-1).nonzero()[:, 0]
    if not len(good):
        return None
    mode, root, reach = (
        t[0].unflatten(0, (n_nodes, n_rows))[good] for t in (modes.mode, modes.root, modes.reach)
    )
    reach = reach.amax(0)
    t, more = stretched(rule.t.to(mode)[:, None], reach)  # (Q, N, d), (Q, N)
    log_p = torch.stack([_at_nodes(log_prob, mode[i], root[i], t, good[i], shown) for i in range(len(good))])
    log_p = (log_p + more).nan_to_num(-math.inf, -math.inf, -math.inf)  # (S, Q, N)
    whole = log_p.logsumexp(1).sum(-1) + torch.linalg.slogdet(root)[1].sum(-1)
    seen = whole.isfinite() & (whole > whole.nan_to_num(-math.inf).max() - NEAR)
    if not bool(seen.any()):
        return None
    each = log_p[seen].softmax(1)
    share = each.square().mean(0).sqrt()
    share = share / share.sum(0)  # (Q, N)
    # sum_q p_q^2 / q_q - 1: variance of what one draw gives
    spread = torch.where(each > 0, each.square() / share, 0.0).sum(1) - 1
    n = max(MIN_DRAWS, float(spread.sum(1).median()) / NOISE)
    n_draws = 2 ** math.ceil(math.log2(n))
    if CHEAPER * n_draws > len(rule.t):
        return None
    n_along = round(len(rule.t) ** (1 / width))
    grid = share.T.reshape(n_rows, *[n_along] * width)
    padded = torch.nn.functional.pad(grid, [1] * (2 * width)).flatten(1)
    return RowDraws(reach, padded.contiguous(), n_along, shown, n_draws)


def _at_nodes(
    log_prob: Callable[[Tensor, Tensor], Tensor],
    mode: Tensor,
    root: Tensor,
    t: Tensor,
    number: Tensor,
    shown: Tensor,
) -> Tensor:
    """log p (Q, N) of rows at nodes t (Q, N, d) in units of their roots, at one value of the shared latents."""
    u = mode + (root @ t[..., None])[..., 0]
    at_once = u.split(max(1, CELLS // shown.numel()))
    return torch.cat([log_prob(part, number.expand(len(part))) for part in at_once])
