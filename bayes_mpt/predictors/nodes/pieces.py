"""More pieces of a mixture, where Gaussians at the modes do not make the shape of a posterior.

A funnel's mode is at the end of its neck, far from its mass. Draws of the mixture q and a few of the prior tell: where
weights p / q are uneven, with both in q, a piece is added at the draw that weighs most, with the covariance of the
weighted draws near it (incremental mixture importance sampling, Raftery & Bao 2010), and shares and pieces are fitted
to all draws by their weights (Cappe, Douc, Guillin, Marin & Robert 2008), until draws weigh alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_mpt.diagnostics import pareto_k
from bayes_mpt.predictors.nodes.mixture import Modes
from bayes_mpt.predictors.nodes.resampling import weighted_root
from bayes_mpt.predictors.nodes.rules import degrees_of, log_t
from bayes_mpt.program.store import own_random_state

__all__ = ["Both", "Draws", "by_draws", "draws_of", "effective", "of_each", "shaped"]

Both = Callable[[Tensor], tuple[Tensor, Tensor]]
"""log p(u) and log p(u, x) (M,) at u (M, d)."""

N_DRAWS = 128  # of a round
MAX_ROUNDS = 12
ENOUGH = 0.4  # share of effective draws from which the modes alone have the posterior's shape
FITTED = 0.6  # from which pieces are enough
MAX_WIDTH = 12  # latents: draws in more dimensions weigh unevenly whatever the shape
NEAR = 0.1  # share of the draws that a new piece is made of
MIN_SHARE = 1e-3  # of a piece
N_FITS = 2  # steps of expectation maximisation after each new piece


class Draws(NamedTuple):
    """Points with two densities."""

    u: Tensor
    """(M, d)"""
    log_prior: Tensor
    """(M,)"""
    log_p: Tensor
    """(M,) of the joint density with the data."""

    def take(self, index: Tensor | slice) -> Draws:
        """Some of them."""
        return Draws(*(t[index] for t in self))

    def beside(self, others: Draws) -> Draws:
        """These, and others after them."""
        return Draws(*(torch.cat(both) for both in zip(self, others, strict=True)))

    def log_weight(self, modes: Modes, n_prior: int) -> Tensor:
        """log p / q (M,), q the prior, of which the first are draws, and the mixture, in proportion of the draws."""
        log_q = modes.log_density(self.u[:, None])[:, 0]
        if n_prior:
            n_drawn = len(self.u) - n_prior
            log_q = torch.logaddexp(self.log_prior + math.log(n_prior), log_q + math.log(n_drawn))
            log_q = log_q - math.log(len(self.u))
        return self.log_p - log_q


def effective(log_w: Tensor) -> float:
    """Share of draws of equal weight that draws of log-weights (M,) amount to."""
    share = log_w.softmax(0)
    return float(1 / share.square().sum()) / len(share)


def by_draws(both: Both, modes: Modes, n: int, prior: Tensor | None = None) -> tuple[float, float, float]:
    """log Z by n draws of the mixture and those (m, d) of the prior, its error, and the tail shape of the weights."""
    found, n_prior = draws_of(both, modes, n, MAX_ROUNDS + 1), 0
    if prior is not None:
        first = Draws(prior, *both(prior))
        first = first._replace(log_prior=first.log_prior.nan_to_num(-math.inf, math.inf, -math.inf))
        found, n_prior = first.beside(found), len(prior)
    log_w = found.log_weight(modes, n_prior)
    log_w = torch.where(log_w.isnan(), -math.inf, log_w)
    n = len(log_w)
    share = log_w.softmax(0)
    se = float((share.square().sum() - 1 / n).clamp(min=0).sqrt())
    k = float(pareto_k(log_w.double().cpu().numpy()[:, None])[0])
    return float(log_w.logsumexp(0)) - math.log(n), se, k


def draws_of(both: Both, modes: Modes, n: int, seed: int) -> Draws:
    """Always the same draws of a mixture, around those modes alone that are no images: p / q is the same at images."""
    with own_random_state(seed):
        u = modes.representatives().draws(n)[:, 0]
    return Draws(u, *both(u))


def shaped(both: Both, modes: Modes, prior: Tensor) -> Modes:
    """The mixture with as many pieces as it needs, by draws (n, d) of the prior and of itself."""
    if modes.mode.shape[-1] > MAX_WIDTH:
        return modes
    new = draws_of(both, modes, N_DRAWS, 0)
    first = Draws(prior, *both(prior))
    first = first.take(first.log_p.isfinite() & first.log_prior.isfinite())
    known = first
    for n_rounds in range(1, MAX_ROUNDS + 1):
        new = new.take(new.log_p.isfinite())
        enough = ENOUGH if n_rounds == 1 else FITTED
        if not len(new.u) or effective(first.beside(new).log_weight(modes, len(first.u))) > enough:
            break
        known = known.beside(new)
        modes = _with_piece(modes, known, len(first.u))
        new = draws_of(both, modes, N_DRAWS, n_rounds)
    return modes


def _with_piece(modes: Modes, draws: Draws, n_prior: int) -> Modes:
    """One more piece at the draw that weighs most, and all shares fitted to the draws."""
    orbits, u, width = modes.orbits, draws.u, draws.u.shape[1]
    assert orbits is not None
    at = modes.representatives()
    mean, root, parents = at.mode[:, 0], at.root[:, 0], list(orbits.parents)
    share = draws.log_weight(modes, n_prior).softmax(0)
    worst = int(share.argmax())
    whole = weighted_root(u, 0.5 * (share + 1 / len(u)))
    apart = torch.linalg.solve_triangular(whole, (u - u[worst]).mT, upper=False).norm(dim=0)
    near = apart.argsort()[: max(2 * width + 2, int(NEAR * len(u)))]
    own = 0.5 * (share[near] / share[near].sum() + 1 / len(near))
    parent = int(of_each(mean, root, u[worst][None])[: len(set(parents)), 0].argmax())
    mean, root = torch.cat([mean, u[worst][None]]), torch.cat([root, weighted_root(u[near], own)[None]])
    parents.append(parents[parent])
    log_share = torch.cat([at.log_share[:, 0], at.log_share.new_zeros(1)]).log_softmax(0)
    orbits = orbits._replace(
        moves=(*orbits.moves, orbits.moves[parents[-1]]),
        parents=tuple(parents),
        counts=(*orbits.counts, orbits.counts[parents[-1]]),
    )
    for _ in range(N_FITS):
        chance = (log_share[:, None] + of_each(mean, root, u)).softmax(0) * share  # (C, M)
        total = chance.sum(1)
        for c in range(len(mean)):
            n_own = float(total[c].square() / chance[c].square().sum().clamp(min=1e-300))
            if parents[c] != c and n_own > 2 * (width + 1):
                mean[c] = chance[c] @ u / total[c]
                root[c] = weighted_root(u, chance[c] / total[c])
        log_share = total.clamp(min=MIN_SHARE).log().log_softmax(0)
        spread = orbits.spread(mean, root, log_share - orbits.log_count.to(log_share))
        modes = Modes(*spread, modes.doubt, orbits, crowd=modes.crowd)
        share = draws.log_weight(modes, n_prior).softmax(0)
    return modes


def of_each(mean: Tensor, root: Tensor, u: Tensor) -> Tensor:
    """log of the Student-t of each piece (C, d) at u (M, d): (C, M)."""
    white = (torch.linalg.inv(root)[:, None] @ (u - mean[:, None])[..., None])[..., 0]
    return log_t(white, degrees_of(u.shape[1])) - torch.linalg.slogdet(root)[1][:, None]
