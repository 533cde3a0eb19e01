"""Pieces of a mixture that are moved to where weighted draws of it say that the posterior is.

    w_m = p(u_m, x) / q(u_m),    mean_c = sum_m w_m r_cm u_m / sum_m w_m r_cm,    share_c = sum_m w_m r_cm / sum_m w_m

r_cm is the chance that draw m is of piece c, and the covariance follows as the mean does: population Monte Carlo
(Cappe, Douc, Guillin, Marin & Robert 2008). Draws of all rounds are weighed together, q the mean of the mixtures of the
rounds (Cornuet, Marin, Mira & Robert 2012). The mixture that comes of it holds two more parts, for what
the moments do not tell: the moved pieces made wider, and what stood before. The number comes from fresh draws of it,
which decide nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayes_mpt.predictors.nodes.mixture import Modes
from bayes_mpt.predictors.nodes.pieces import Both, effective, of_each

__all__ = ["N_ROUNDS", "moved"]

N_ROUNDS = 10  # at the most
N_FITS = 2  # steps of expectation maximisation with the draws of each
ENOUGH = 0.6  # share of effective draws of a round, from which nothing is moved any more
KEPT = 0.1  # share of what stood before
WIDE, WIDER = 0.15, 1.5  # share of the moved pieces made wider, and by how much
MIN_EFFECTIVE = 2.0  # effective draws for each number, that a move rests on at the least
MIN_SHARE = 1e-3  # of a piece


def moved(both: Both, first: Modes, n: int) -> Modes:
    """A mixture moved by up to ten rounds of n draws.

    Parameters
    ----------
    both : callable
        log p(u) and log p(u, x) (M,) at u (M, d).
    first : Modes
        Of latents that all rows share.
    n : int
        Draws of a round.
    """
    at, rounds, points, log_p = first, [], [], []
    for _ in range(N_ROUNDS):
        points.append(at.representatives().draws(n)[:, 0])
        log_p.append(both(points[-1])[1])
        rounds.append(at)
        if effective(_log_weight(points[-1], log_p[-1], [at])) > ENOUGH:
            break
        u = torch.cat(points)
        log_w = _log_weight(u, torch.cat(log_p), rounds)
        if not bool((log_w > -math.inf).any()):
            break
        share = _even(log_w, min(n / 2, MIN_EFFECTIVE * (u.shape[1] + 1)))
        for _ in range(N_FITS):
            at = _fitted(at, u, share)
    if at is first:
        return first
    return beside(beside(at, at._replace(root=WIDER * at.root), WIDE), first, KEPT)


def beside(modes: Modes, others: Modes, share: float) -> Modes:
    """Both mixtures as one, the others with a share of it."""
    a, b = modes.orbits, others.orbits
    assert a is not None and b is not None
    orbits = a._replace(
        moves=(*a.moves, *b.moves),
        parents=(*a.parents, *(len(a.parents) + parent for parent in b.parents)),
        counts=(*a.counts, *b.counts),
    )
    one, two = modes.representatives(), others.representatives()
    mean, root = torch.cat([one.mode, two.mode])[:, 0], torch.cat([one.root, two.root])[:, 0]
    log_share = [one.log_share[:, 0] + math.log1p(-share), two.log_share[:, 0] + math.log(share)]
    log_mass = torch.cat(log_share) - orbits.log_count.to(mean)
    return Modes(*orbits.spread(mean, root, log_mass), modes.doubt, orbits, crowd=modes.crowd)


def _log_weight(u: Tensor, log_p: Tensor, rounds: list[Modes]) -> Tensor:
    """log p / q (M,), q the mean of mixtures; -inf where there is no number."""
    log_q = torch.stack([modes.log_density(u[:, None])[:, 0] for modes in rounds])
    log_w = log_p - log_q.logsumexp(0) + math.log(len(rounds))
    return torch.where(log_w.isfinite(), log_w, -math.inf)


def _even(log_w: Tensor, least: float) -> Tensor:
    """Shares (M,) in proportion of w^a, a the greatest power up to 1 that leaves so many effective draws."""
    least = min(least, float((log_w > -math.inf).sum()))
    low, high = 0.0, 1.0
    if effective(log_w) * len(log_w) >= least:
        return log_w.softmax(0)
    for _ in range(30):
        middle = (low + high) / 2
        enough = effective(middle * log_w) * len(log_w) >= least
        low, high = (middle, high) if enough else (low, middle)
    return (max(low, 1e-9) * log_w).softmax(0)


def _fitted(modes: Modes, u: Tensor, share: Tensor) -> Modes:
    """Each piece with the moments of its part of the draws u (M, d), as far as they tell them."""
    orbits, at = modes.orbits, modes.representatives()
    assert orbits is not None
    mean, root, width = at.mode[:, 0].clone(), at.root[:, 0].clone(), u.shape[1]
    chance = (at.log_share + of_each(mean, root, u)).softmax(0) * share  # (C, M)
    total = chance.sum(1)
    for c, own in enumerate(chance):
        n_own = float(own.sum().square() / own.square().sum().clamp(min=1e-300))
        if n_own <= MIN_EFFECTIVE:
            continue
        own = own / own.sum()
        off = u - own @ u
        # the covariance before counts as much as one draw for each number
        keep = n_own / (n_own + width)
        cov = keep * (own[:, None] * off).mT @ off + (1 - keep) * root[c] @ root[c].mT
        new, wrong = torch.linalg.cholesky_ex(cov)
        if not bool(wrong) and bool(new.isfinite().all()):
            mean[c], root[c] = own @ u, new
    log_share = total.clamp(min=MIN_SHARE).log().log_softmax(0)
    return Modes(
        *orbits.spread(mean, root, log_share - orbits.log_count.to(mean)),
        modes.doubt,
        orbits,
        crowd=modes.crowd,
    )
