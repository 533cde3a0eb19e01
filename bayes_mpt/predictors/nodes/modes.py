"""Every mode of a posterior of latents that all rows share, and one mixture around them.

Newton's method climbs from draws of the prior, side by side; symmetries that are found by evaluation add the images of
each mode. All of them enter one mixture q = sum_j w_j q_j, and every node u counts as p(u, x) / q(u): modes that
overlap, or that are one, are counted once, which a sum of estimates of theirs would not do.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import pyro
import torch
from torch import Tensor

from bayes_mpt.predictors.nodes import few_visible as few
from bayes_mpt.predictors.nodes.conjugacy import prior_draws
from bayes_mpt.predictors.nodes.mixture import Modes, Orbits
from bayes_mpt.predictors.nodes.newton import MET, Peaks, by_halves, climb, distances
from bayes_mpt.predictors.nodes.pieces import Both, by_draws, shaped
from bayes_mpt.predictors.nodes.placing import Placing
from bayes_mpt.predictors.nodes.placing_trials import placing_inside, placing_of_rows
from bayes_mpt.predictors.nodes.population import moved
from bayes_mpt.predictors.nodes.rules import MAX_HERMITE, Detail, Rule, alone_rule
from bayes_mpt.predictors.nodes.symmetries import (
    MAX_IMAGES,
    Coordinates,
    Moves,
    Symmetry,
    find_symmetries,
    orbit,
)
from bayes_mpt.predictors.nodes.unseen import EQUAL_MASS, Seen, by_mass, chance_of_new, crowd_of, missed_mass
from bayes_mpt.program.arguments import Args, same_cells
from bayes_mpt.program.batched import Batched
from bayes_mpt.program.program import n_rows_of
from bayes_mpt.program.store import own_random_state

if TYPE_CHECKING:
    from bayes_mpt.predictors.nodes.adaptive import AdaptiveNodes

__all__ = ["ModeSearch"]

N_STARTS = 16  # draws from the prior that climbs start at, at first
MAX_STARTS = 64  # where a mode that matters was found by few of them
REACH = 2.0  # half as many more start spread evenly up to it along each axis, in unconstrained units
N_MIDDLE = 9  # draws whose median one more climb starts at
FEW_STARTS = 4  # where each costs a run of its own
N_AROUND = 64  # climbs from around the modes, where one that matters was found rarely
AROUND = 5.0  # standard deviations around them
OFTEN = 2  # climbs that must have found a mode that matters
ENOUGH_SEEN = 0.01  # share of the mass that may be missed before more climbs are made
UNSEEN_MASS = 0.05  # share from which it is a reason for doubt
UNSEEN = 0.1  # chance of a new mode at the next climb, from which the search is doubted
MATTERS = 1e-3  # share of the mass from which a mode matters
NEGLIGIBLE = 23.0  # nats below the largest mode: 1e-10 of it
MAX_STEPS = 60
SHARES_OF_WAY = (1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-5)  # 0 may be a saddle
HOPELESS = 1000.0  # nats below the best start
N_FAR = 8  # of these that are climbed from all the same
SAME_MODE = 0.1  # standard deviations
SAME_BY_DRAWS = 0.5  # where rows or groups are integrated by draws: tops of such a density are uneven
ROUGHLY = 1e-6  # of a log-density: to be gained where a rough climb ends
N_POINTS = 8  # of the prior, and as many near the mode, at which symmetries are tried
WORK = 2**22  # log-densities of tokens, times latents, that the first starts may cost a step
CELLS = 2**20  # of them at a time
NESTED = 8  # times as many to find the modes in rows or groups
N_INSIDE = 32  # draws at which finer nodes inside rows and groups are tried
FOLLOWED = 1.0  # nats, up to which other nodes inside move modes no farther than a climb from them comes
MAX_SYMMETRIC = 64  # latents, up to which symmetries are looked for


class _Found(NamedTuple):
    """Tops of climbs, distinct ones, the greatest mass first."""

    u: Tensor
    """(J, d)"""
    root: Tensor
    """(J, d, d)"""
    log_mass: Tensor
    """(J,)"""
    hits: Tensor
    """(J,) climbs that have ended there."""


class ModeSearch:
    """Where the modes of a program are; found once for its data, and followed from there.

    Parameters
    ----------
    adaptive : AdaptiveNodes
        Of a program whose latents belong to the data set. Of latents of rows one mode is followed in each, or several
        where it has them.
    rule : Rule, optional
        That integrates rows by themselves, where it is one of nodes: whether it serves is looked at.
    """

    def __init__(self, adaptive: AdaptiveNodes, rule: Rule | None = None):
        self.adaptive, self.rule = adaptive, rule
        self._kept: tuple[Tensor, Tensor, Modes] | None = None
        self._rows: tuple[Tensor, Placing] | None = None
        self._few: tuple[Tensor, Tensor | None] | None = None

    def forget(self) -> None:
        """Search again at the next call."""
        self._kept = self._rows = self._few = None
        self.adaptive.forget()

    def find(self, args: Args, x: Tensor, visible: Tensor, near: Modes | None = None) -> Modes:
        """The modes of the latents given the visible (T,) of the tokens x (N, T).

        A search is made for data that are new; for the same ones, of which parameters may have moved, and from
        ``near``, modes for other visible tokens of theirs, each mode is followed to where it has gone.
        """
        at = self.adaptive
        if at.program.by_row or not at.space.width:
            placing = self._placing(args, x)
            if not bool(visible.all()):
                placing = self._with_few(args, x, placing, near)
            cut = alone_rule(at.space.width, fine=True).cut if placing.far and at.space.width else None
            return at.locate(args, x, visible, placing, cut, near=near)
        if near is None and self._kept is not None:
            data, shown, kept = self._kept
            if torch.equal(shown, visible) and same_cells(data, x):
                near = kept
        climbs = _Climbs(at, args, x, visible)
        with pyro.validation_enabled(False), torch.no_grad():
            more = None if near is None or bool(visible.all()) else self._further(args, x, near)
            found = climbs.search() if near is None else climbs.follow(near, more)
            if near is None and at.rows is not None:
                with own_random_state(0):
                    u = found.representatives().draws(N_INSIDE)
                change = placing_inside(at, args, x, visible, u, found.log_density(u)[:, 0])
                if change:  # what little that moves modes, a climb from them follows
                    climbs = _Climbs(at, args, x, visible)
                    found = climbs.search() if change > FOLLOWED else climbs.follow(found)
        if near is None or (self._kept is not None and near is self._kept[2]):
            self._kept = x.detach(), visible, found
        return found

    def _further(self, args: Args, x: Tensor, near: Modes) -> Tensor | None:
        """Modes (P, d) that few visible tokens show, beside those that are followed."""
        if self._few is None or not same_cells(self._few[0], x):
            few.place_inside(self.adaptive, args, x, near.mode[near.log_mass[:, 0].argmax()][None])
            found = []
            for seen in few.small_sets(x.shape[1], halves=self.adaptive.space.width <= MAX_HERMITE):
                climbs = _Climbs(self.adaptive, args, x, seen.to(x.device))
                if climbs.may_differ(near):
                    found.append(climbs.apart_from(near))
            places = torch.cat(found) if found else x.new_zeros(0, self.adaptive.space.width)
            self._few = x.detach(), places if len(places) else None
        return self._few[1]

    def _with_few(self, args: Args, x: Tensor, placing: Placing, near: Modes | None) -> Placing:
        """How nodes stand where not all tokens are visible: around modes that few of them show besides."""
        width = self.adaptive.space.width
        new = self._few is None or not (torch.is_grad_enabled() or same_cells(self._few[0], x))
        if new and not width:
            self._few = x.detach(), None
            few.place_inside(self.adaptive, args, x, x.new_zeros(1, 1, 0))
        elif new:
            with pyro.validation_enabled(False), torch.no_grad():
                near = near or self.adaptive.locate(args, x, x.new_ones(x.shape[1]).bool())
                self._few = x.detach(), few.further_starts(self.adaptive, args, x, near)
        if self._few is None or self._few[1] is None:
            return placing
        starts = self._few[1] if placing.starts is None else torch.cat([placing.starts, self._few[1]])
        return Placing(width <= MAX_HERMITE, starts)

    def reaching(self, args: Args, x: Tensor, modes: Modes) -> Modes:
        """Modes of rows, with how far the density reaches around each."""
        if modes.reach is not None:
            return modes
        everything = x.new_ones(x.shape[1]).bool()
        cut = alone_rule(self.adaptive.space.width, fine=True).cut
        return self.adaptive.locate(args, x, everything, self._placing(args, x), cut, near=modes)

    @property
    def placing(self) -> Placing:
        """How nodes stand in rows or groups beside which no other latents take nodes."""
        return Placing() if self._rows is None else self._rows[1]

    def _placing(self, args: Args, x: Tensor) -> Placing:
        """The same for these rows: looked at where they are new, and not while parameters move."""
        known = self._rows
        if known is None or not (torch.is_grad_enabled() or same_cells(known[0], x)):
            with pyro.validation_enabled(False), torch.no_grad():
                known = self._rows = x.detach(), placing_of_rows(self.adaptive, args, x, self.rule)
        return known[1]

    def check(
        self, args: Args, x: Tensor, visible: Tensor, modes: Modes, n: int, prior: Tensor | None = None
    ) -> tuple[float, float, float]:
        """log Z of latents that all rows share by n draws of the mixture: `by_draws`."""
        with pyro.validation_enabled(False), torch.no_grad():
            return by_draws(self.densities(args, x, visible, "usual"), modes, n, prior)

    def densities(self, args: Args, x: Tensor, visible: Tensor, detail: Detail) -> Both:
        """log p(u) and log p(u, x_R) of latents that all rows share."""
        return partial(_Climbs(self.adaptive, args, x, visible).both, detail=detail)

    def move(self, args: Args, x: Tensor, visible: Tensor, modes: Modes, n: int) -> Modes:
        """A mixture moved to where draws of it, n of a round, say that the posterior of shared latents is."""
        detail = _Climbs(self.adaptive, args, x, visible).proposing
        with pyro.validation_enabled(False), torch.no_grad():
            return moved(self.densities(args, x, visible, detail), modes, n)


class _Climbs:
    """Climbs of one log joint density of latents that all rows share."""

    def __init__(self, adaptive: AdaptiveNodes, args: Args, x: Tensor, visible: Tensor):
        self.adaptive, self.args, self.x, self.visible = adaptive, args, x, visible
        self.width = adaptive.space.width
        self._drawn = x.new_zeros(0, self.width)
        self._cells = max(1, x.numel() * adaptive.n_evaluations)
        self.by_draws = adaptive.rows is not None and adaptive.rows.width > MAX_HERMITE
        # fewer draws, or few nodes an axis that reach far, make poor proposals
        far = adaptive.rows is not None and adaptive.rows.placing.far and adaptive.rows.width > 1
        self.proposing: Detail = "usual" if self.by_draws or far else "rough"
        self.same_mode = SAME_BY_DRAWS if self.by_draws else SAME_MODE

    def _at_once(self, u: Tensor) -> tuple[Tensor, ...]:
        """Of places u (M, d) as many as memory will bear: without slopes those inside rows go by parts themselves."""
        nested = self.adaptive.rows is not None and not torch.is_grad_enabled()
        return u.split(max(1, CELLS // (NESTED * self.x.numel() if nested else self._cells)))

    def log_prob(self, u: Tensor, detail: Detail = "usual") -> Tensor:
        """log p(u, x_R) (M,) at u (M, d)."""
        found = []
        for part in self._at_once(u):
            given, left, _ = self.adaptive.at(self.args, part[:, None])
            found.append((left + given.with_detail(detail).log_joint(self.x, self.visible))[:, 0])
        return torch.cat(found)

    def both(self, u: Tensor, detail: Detail = "usual") -> tuple[Tensor, Tensor]:
        """log p(u) and log p(u, x_R) (M,) at u (M, d); -inf where a matrix has no factor."""

        def of(part: Tensor) -> tuple[Tensor, Tensor]:
            given, log_det, _ = self.adaptive.at(self.args, part[:, None])
            prior = given.log_prior(self.x) + log_det
            joint = given.with_detail(detail).log_joint(self.x, self.visible) + log_det
            return prior.expand(len(part), 1)[:, 0], joint.expand(len(part), 1)[:, 0]

        never = (u.new_full((1,), -math.inf),) * 2
        parts = [by_halves(of, part, never) for part in self._at_once(u)]
        priors, joints = zip(*parts, strict=True)
        return torch.cat(priors), torch.cat(joints)

    def _n_starts(self) -> int:
        """How many draws of the prior climbs start at, at first."""
        n = FEW_STARTS if self.adaptive.batched is Batched.LOOP else N_STARTS
        return max(2, min(n, WORK // (self._cells * self.width)))

    def _starts(self, n: int) -> Tensor:
        """The middle of the prior, places near 0, and n draws: (M, d)."""
        middle = self._draws(N_MIDDLE)[:N_MIDDLE].median(0).values
        # of a vague prior the draws lie where no climb begins
        generator = torch.Generator().manual_seed(0)
        part = torch.stack([torch.randperm(n // 2, generator=generator) for _ in range(self.width)], 1)
        near = REACH * (2 * (part + 0.5) / (n // 2) - 1).to(middle.dtype)  # one in each part of each axis
        return self._nearer(torch.cat([middle[None], near.to(middle), self._draws(n)[:n]]))

    def may_differ(self, near: Modes) -> bool:
        """Whether the density may have more modes than one."""
        draws = self._draws(N_MIDDLE)[:N_MIDDLE, None]
        return few.has_hills(lambda u: self.log_prob(u[:, 0])[:, None], near.mode[0], near.root[0], draws)

    def apart_from(self, near: Modes) -> Tensor:
        """Tops (P, d) that matter, of one climb from each start, at which none from modes that are known ends."""
        peaks = self._climb(torch.cat([near.mode[:, 0], self._starts(self._n_starts())]))
        found, _ = self._distinct(peaks, torch.ones_like(peaks.same))
        return few.apart(found.u, found.root, found.log_mass, peaks.u[peaks.same[: len(near.mode)]])

    def search(self) -> Modes:
        """From the middle of the prior, near 0 and from draws; from more of these where a mode was found by few."""
        most = n = self._n_starts()
        if self.adaptive.batched is not Batched.LOOP:
            most = max(n, min(MAX_STARTS, 4 * WORK // (self._cells * self.width)))
        peaks, n_starts = self._climb(self._starts(n)), n
        while True:
            # the climb from the middle is no draw: it finds no mode often
            found, _ = self._distinct(peaks, _hits(peaks, peaks.same[1:]))
            modes, seen = self._with_images(found)
            unseen = chance_of_new(found.log_mass, found.hits, len(peaks.same) - 1)
            if not (seen.missed > ENOUGH_SEEN or seen.n_rare or unseen > UNSEEN) or n_starts >= most:
                break
            n = min(most, 2 * n_starts)
            peaks = _join(peaks, self._climb(self._nearer(self._draws(n)[n_starts:n])))
            n_starts = n
        if (seen.missed > ENOUGH_SEEN or seen.n_rare) and self.adaptive.batched is not Batched.LOOP:
            found, n_climbs = self._from_others(peaks, modes)
            modes, seen = self._with_images(found)
            unseen = chance_of_new(found.log_mass, found.hits, n_climbs)
        n_modes = len(modes.representatives().mode)
        doubt = ""
        if seen.n_rare and seen.missed > UNSEEN_MASS:
            doubt = (
                f"{seen.n_rare} of {n_modes} modes that matter were found by one of {n_starts} climbs from the prior, "
                "and by none from another mode, so that others may have been found by none"
            )
        elif seen.missed > UNSEEN_MASS:
            doubt = (
                f"modes that matter were found by so few of {n_starts} climbs from the prior and more from other "
                f"modes, that {seen.missed:.0%} of the mass may be at modes which none has found"
            )
        elif unseen > UNSEEN:
            doubt = (
                f"{unseen:.0%} of the climbs have ended where no other has, so that as many of further ones would "
                "find new modes"
            )
        elif not seen.whole:
            doubt = (
                f"more than {MAX_IMAGES} images of a mode overlap with it, and only so many were looked at"
            )
        both = partial(self.both, detail=self.proposing)
        crowd = crowd_of(by_mass(found.log_mass, found.hits)) if doubt else 0.0
        return shaped(both, modes._replace(doubt=doubt, crowd=crowd), self._draws(n_starts))

    def _from_others(self, peaks: Peaks, modes: Modes) -> tuple[_Found, int]:
        """Tops after more climbs, from places around modes, and how many climbs count: those back to theirs do not.

        The prior may lead to a mode rarely, such as that of the second best change point, and its neighbours often.
        """
        at = modes.representatives()
        generator = torch.Generator().manual_seed(1)
        share = 0.5 * at.log_mass[:, 0].softmax(0).cpu() + 0.5 / len(at.mode)
        of = torch.multinomial(share, N_AROUND, True, generator=generator)
        normal = torch.randn(N_AROUND, self.width, 1, generator=generator, dtype=at.mode.dtype).to(at.mode)
        mean, root = at.mode[of, 0], at.root[of, 0]
        more = self._climb(mean + AROUND * (root @ normal)[..., 0])
        end = more.u[more.same]
        back = torch.linalg.solve(root, (end - mean)[..., None])[..., 0].norm(dim=1) < 2 * self.same_mode
        both = _join(peaks, more)
        first, further = both.same[1 : len(peaks.same)], both.same[len(peaks.same) :]
        ends = torch.cat([first, further[~back]])
        return self._distinct(both, _hits(both, ends))[0], len(ends)

    def follow(self, near: Modes, more: Tensor | None = None) -> Modes:
        """Modes that have moved a little, and their images; pieces move with their modes.

        With places (P, d) of ``more``, what is found from those of them from which a valley lies before every mode.
        """
        orbits = near.orbits
        assert orbits is not None
        found = self._follow_pieces(near, orbits) if near.has_pieces else self._follow_modes(near, orbits)
        if more is None:
            return found
        beyond = few.beyond_valleys(self.log_prob, more, found.mode[:, 0])
        if not bool(beyond.any()):
            return found
        peaks = self._climb(torch.cat([found.representatives().mode[:, 0], more[beyond]]))
        tops, _ = self._distinct(peaks, torch.ones_like(peaks.same))
        modes = self._with_images(tops)[0]._replace(doubt=near.doubt)
        return shaped(partial(self.both, detail=self.proposing), modes, self._draws(N_STARTS))

    def _follow_modes(self, near: Modes, orbits: Orbits) -> Modes:
        peaks = self._climb(near.mode[orbits.first, 0])
        found, index = self._distinct(peaks, torch.ones_like(peaks.same))
        keep = found.log_mass >= found.log_mass[0] - NEGLIGIBLE
        kept = index[keep].tolist()
        moves, counts = (tuple(of[j] for j in kept) for of in (orbits.moves, orbits.counts))
        orbits = Orbits(orbits.where, moves, tuple(range(len(kept))), counts)
        spread = orbits.spread(found.u[keep], found.root[keep], found.log_mass[keep])
        return Modes(*spread, near.doubt, orbits, crowd=near.crowd)

    def _follow_pieces(self, near: Modes, orbits: Orbits) -> Modes:
        first, parents = orbits.first, list(orbits.parents)
        mean, root = near.mode[first, 0], near.root[first, 0]
        n_modes = len(set(parents))  # these stand before all pieces
        peaks = self._climb(mean[:n_modes])
        new, new_root = (
            torch.where(peaks.top.reshape(-1, *(1,) * (old.ndim - 1)), found, old[:n_modes])
            for found, old in ((peaks.u, mean), (peaks.root, root))
        )
        # u - mode, in units of the mode's root, is kept
        turn = new_root[parents] @ torch.linalg.inv(root[parents])
        mean = new[parents] + (turn @ (mean - mean[parents])[..., None])[..., 0]
        spread = orbits.spread(mean, turn @ root, near.log_mass[first, 0])
        return Modes(*spread, near.doubt, orbits, crowd=near.crowd)

    def _draws(self, n: int) -> Tensor:
        """(M, d) at least n of the prior, always the same ones first."""
        at, before = self.adaptive, len(self._drawn)
        if before < n:
            n_rows = n_rows_of(at.program, self.args.filled)
            traces = prior_draws(at.model, self.args.filled, n, before)
            draws = [at.within_reach(at.space.pack(t, n_rows)[0]) for t in traces]
            self._drawn = torch.cat([self._drawn, *draws])
        return self._drawn

    @torch.no_grad()
    def _nearer(self, u: Tensor) -> Tensor:
        """(M, d): each start, or, of one beyond hope, the part of its way from 0 with the greatest density.

        A vague prior goes past all places from which a climb comes back. Of a few latents the highest of those that are
        beyond hope are starts too, behind all others: a narrow mode may stand between, as that of a moving average
        that cannot be inverted.
        """
        none = (u.new_full((1,), -math.inf),)
        ways = torch.stack([u * share for share in SHARES_OF_WAY])  # (W, M, d)
        (value,) = by_halves(lambda part: (self.log_prob(part),), ways.flatten(0, 1), none)
        value = torch.where(value.isfinite(), value, -math.inf).unflatten(0, ways.shape[:2])
        best = value.argmax(0)
        best[value[0] > value.max() - HOPELESS] = 0
        nearer = ways[best, torch.arange(len(u), device=u.device)]
        if u.shape[1] > MAX_HERMITE or self.adaptive.batched is Batched.LOOP:
            return nearer
        far = ((best > 0) & value[0].isfinite()).nonzero()[:, 0]
        far = far[value[0][far].argsort(descending=True)[:N_FAR]]
        return torch.cat([nearer, u[far]])

    def _climb(self, u: Tensor) -> Peaks:
        """From places (M, d); where rows or groups have nodes of a rule, by rough ones until close to the tops."""
        sure = self.adaptive.sure
        if self.adaptive.rows is None or self.by_draws:
            return climb(self.log_prob, u, MAX_STEPS, sure, self.same_mode if self.by_draws else MET)
        rough = climb(partial(self.log_prob, detail="rough"), u, MAX_STEPS, ROUGHLY)
        ends, of = rough.same.unique(return_inverse=True)
        found = climb(self.log_prob, rough.u[ends], MAX_STEPS, sure)
        first = torch.stack([(found.same[of] == k).to(torch.int8).argmax() for k in range(len(ends))])
        return Peaks(found.u[of], found.value[of], found.root[of], found.top[of], first[found.same[of]])

    def _distinct(self, peaks: Peaks, hits: Tensor) -> tuple[_Found, Tensor]:
        """Tops that are no others, and which climbs these are; if there is none, the highest place."""
        top = peaks.top & peaks.value.isfinite() & peaks.root.isfinite().all(-1).all(-1)
        ends = top & (peaks.same == torch.arange(len(top), device=top.device))
        if not bool(ends.any()):
            ends = torch.zeros_like(top)
            ends[peaks.value.nan_to_num(-math.inf).argmax()] = True
        constant = 0.5 * self.width * math.log(2 * math.pi)
        log_mass = peaks.value + torch.linalg.slogdet(peaks.root)[1] + constant
        index = ends.nonzero()[:, 0]
        index = index[log_mass[index].argsort(descending=True)]
        inverse = torch.linalg.inv(peaks.root[index])
        near = distances(peaks.u[index], inverse.mT @ inverse) < self.same_mode
        first = near.to(torch.int8).argmax(1)  # of the greatest mass, of those that are one mode
        own = (first == torch.arange(len(first), device=first.device)).nonzero()[:, 0]
        pooled = torch.zeros_like(hits[index]).index_add(0, first, hits[index])
        index = index[own]
        return _Found(peaks.u[index], peaks.root[index], log_mass[index], pooled[own]), index

    def _with_images(self, found: _Found) -> tuple[Modes, Seen]:
        """The modes and their images under symmetries, and what is known of others."""
        keep = found.log_mass >= found.log_mass[0] - NEGLIGIBLE
        u, root, log_mass, hits = (t[keep] for t in found)
        where = Coordinates(self.adaptive.space)
        symmetries = self._symmetries(where, u[0], root[0])
        moves, counts, own_hits, chosen, whole = [], [], [], [], True
        left = torch.ones(len(u), dtype=torch.bool, device=u.device)
        for j in range(len(u)):
            if not bool(left[j]):
                continue
            images = orbit(where, symmetries, u[j], root[j])
            by = Moves.of(images.elements)
            white = (
                torch.linalg.inv(where.images(u[j], root[j], by)[1])[:, None]
                @ (u - images.images[:, None])[..., None]
            )
            own = left & (white[..., 0].norm(dim=-1) < 2 * self.same_mode).any(0)
            if images.n_images > len(images.elements):  # those that are not listed have its mass
                own |= left & ((log_mass - log_mass[j]).abs() < EQUAL_MASS)
            own[j] = True
            left &= ~own
            whole &= images.whole
            moves.append(by)
            counts.append(images.n_images)
            chosen.append(j)
            own_hits.append(int(hits[own].sum()))
        orbits = Orbits(where, tuple(moves), tuple(range(len(moves))), tuple(counts))
        some = torch.tensor(chosen, device=u.device)
        modes = Modes(*orbits.spread(u[some], root[some], log_mass[some]), "", orbits)
        mass = (log_mass[some] + orbits.log_count.to(log_mass)).softmax(0)
        if int(found.hits.sum()) < OFTEN:
            return modes, Seen(0, 0.0, whole)
        n_rare = sum(m > MATTERS and n < OFTEN for m, n in zip(mass.tolist(), own_hits, strict=True))
        return modes, Seen(n_rare, missed_mass(mass.tolist(), own_hits), whole)

    def _symmetries(self, where: Coordinates, u: Tensor, root: Tensor) -> list[Symmetry]:
        """Of the log joint density, at points of the prior and near the mode."""
        parts = self.adaptive.space.parts
        if self.width > MAX_SYMMETRIC or any(p.latent.row_axis is not None for p in parts):
            return []
        generator = torch.Generator().manual_seed(0)
        normal = torch.randn(N_POINTS, self.width, generator=generator, dtype=u.dtype).to(u)
        points = torch.cat([u + normal @ root.mT, self._draws(N_POINTS)[:N_POINTS]])
        return find_symmetries(self.log_prob, where, points)


def _hits(peaks: Peaks, same: Tensor) -> Tensor:
    """How many climbs, those that ended as ``same`` says, have ended at each."""
    return torch.bincount(same, minlength=len(peaks.same))


def _join(a: Peaks, b: Peaks) -> Peaks:
    u, value, root, top = (torch.cat([s, t]) for s, t in zip(a[:4], b[:4], strict=True))
    return Peaks(u, value, root, top, torch.cat([a.same, b.same + len(a.same)]))
