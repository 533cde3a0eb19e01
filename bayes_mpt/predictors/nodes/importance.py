"""Importance sampling: nodes drawn from a guide, or around the mode of each row's posterior."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bayes_mpt.masks import Policy
from bayes_mpt.predictors.base import Conditionals, Evidence, Guide, Predictor
from bayes_mpt.predictors.nodes.adaptive import AdaptiveNodes
from bayes_mpt.predictors.nodes.from_prior import Bent
from bayes_mpt.predictors.nodes.guide import (
    Drawn,
    GuideDraws,
    evidence_of_draws,
)
from bayes_mpt.predictors.nodes.leading import Leading
from bayes_mpt.predictors.nodes.mixture import Modes
from bayes_mpt.predictors.nodes.modes import ModeSearch
from bayes_mpt.predictors.nodes.newton import LaplaceApproximation
from bayes_mpt.predictors.nodes.population import beside
from bayes_mpt.predictors.nodes.prior import prior_points
from bayes_mpt.predictors.nodes.quadrature import Quadrature
from bayes_mpt.predictors.nodes.resampling import by_halves
from bayes_mpt.predictors.nodes.unseen import doubted
from bayes_mpt.predictors.nodes.weighted import (
    Nodes,
    NodeSource,
    Read,
    constrained,
    objective_of_draws,
    program_values,
    warn_if_slow,
    warn_of_ratios,
)
from bayes_mpt.predictors.objective import Batch, Objective
from bayes_mpt.program.analysis import analyze
from bayes_mpt.program.arguments import Args
from bayes_mpt.program.program import Model, ModelError, Program, list_names
from bayes_mpt.program.run import takes_visible

__all__ = ["Drawn", "GuideDraws", "Importance", "evidence_of_draws"]

N_WIDENINGS = 6  # steps from Laplace's Gaussian towards the closest one
MIN_SHARE = 0.05  # of the mass around a mode, from which this is worth while
WIDENING_COST = 200_000_000
MAX_PAIRS = 64  # of draws of a widening
MAX_NESTED_PAIRS = 12  # where rows or groups are integrated at each
HALF = 0.5  # share of the widened mixture, beside the one at the modes, in the first round of moves
MOVING = 0.5  # draws of a round of moves, of those of the number
MIN_MOVING = 100
PER_NUMBER = 5  # draws of a round for each number of a covariance at the least: of fewer it is told worse
PRIOR = (
    0.1  # share of the draws, of latents that all rows share: no weight is above that of the best draw / 0.1
)
MAX_CONDITIONED_DRAWS = 10  # draws of a step of the training, from a guide that is conditioned on the mask


class Importance(Predictor):
    """Weighted draws: w_s = p(u_s, x) / q(u_s), shared along a chain, so that the score is the importance bound.

    Parameters
    ----------
    num_particles : int, default=100
        S draws for each row.
    training_particles : int, optional
        As many of a step of the training. None: as many as ``num_particles``, but at most 10 of a guide that is
        conditioned on the mask, whose draws hardly cost less than the program at each of them.
    doubly_reparameterized : bool, optional
        Whether a chain's gradient in a guide's parameters is that of Tucker, Lawson, Gu & Maddison (2019): the same
        expectation with less noise from the draws, for a step that takes a little longer.
        False gives the gradient of the bound itself, that of `pyro.infer.RenyiELBO`. None: where the guide is
        conditioned on the mask. Guides whose draws have no ``rsample``, or that cannot be drawn side by side, have the
        latter in any case.
    dream : bool, default=False
        Whether a guide that is conditioned on the mask is trained also on rows that the program makes, random tokens of
        them hidden (the sleep phase of Hinton, Dayan, Frey & Neal 1995): single conditionals of complete rows get
        nearer, while the program itself learns more slowly.

    Notes
    -----
    With a guide (hand-written or from `pyro.infer.autoguide`) its parameters are trained with the program's. A guide
    that takes an argument ``visible`` is called as ``guide(x, ..., visible=visible)``, x zero and ``visible`` (N, T)
    False where a token is hidden: then single conditionals can be asked for too. Without a guide the draws are
    Student-t (5 degrees of freedom) around the mode of each row's posterior, which is located afresh for every visible
    set. Of latents that all rows share, thirteen at the most for 1000 draws, the Student-t around all modes are moved
    to the mean and covariance of weighted draws first, in up to ten rounds of half as many draws (Cappe, Douc,
    Guillin, Marin & Robert 2008), so that a number costs up to six times its own draws; those of the rounds decide
    nothing of it but where its own are drawn, which leaves the mean of the weights unbiased. A tenth of these are
    draws of the prior, in proportion of which it is a part of the mixture (Hesterberg 1995): no weight is above ten
    times the greatest likelihood, however slowly the tails of the posterior fall.

    Where every row has three or four latents of its own with tails so slow that nodes must reach far, rows are
    integrated by draws of shapes that are learned of them, so that the weights are right on the average alone, and
    hold that error; and the proposal for the shared latents is led from draws of the prior in place of climbs to modes.

    Of the whole-row weights Pareto's k and the effective sample size are reported (Vehtari, Simpson, Gelman, Yao &
    Gabry 2024), the worst rows by name; k above 0.7 warns.
    """

    def __init__(
        self,
        num_particles: int = 100,
        training_particles: int | None = None,
        doubly_reparameterized: bool | None = None,
        dream: bool = False,
    ):
        self.num_particles = num_particles
        self.training_particles = training_particles
        self.dream = dream
        self.doubly_reparameterized = doubly_reparameterized

    def bind(self, model: Model, args: tuple[Any, ...], guide: Guide | None = None) -> NodeSource:
        program = self._analyze(model, args)
        if guide is not None:
            return self.bind_guide(model, args, guide, program)
        return self.bind_nodes(AdaptiveNodes(model, Args(args), program))

    def bind_guide(self, model: Model, args: tuple[Any, ...], guide: Guide, program: Program) -> NodeSource:
        """`bind` with a guide, where it is known what the program is made of."""
        drawn = self._draws(model, args, guide, program)
        warn_if_slow(drawn.batched, drawn)
        return drawn

    def bind_nodes(self, adaptive: AdaptiveNodes) -> NodeSource:
        """`bind` without a guide, where it is known which latents take nodes."""
        if not adaptive.space.parts:  # all are integrated group by group: there is nothing to draw
            return Quadrature().bind_nodes(adaptive)
        bound = _AroundMode(adaptive, self.num_particles)
        warn_if_slow(adaptive.batched, bound)
        return bound

    def from_guide(self, model: Model, args: tuple[Any, ...], guide: Guide) -> GuideDraws:
        """The program scored by draws from a guide."""
        return self._draws(model, args, guide, self._analyze(model, args))

    def _draws(self, model: Model, args: tuple[Any, ...], guide: Guide, program: Program) -> GuideDraws:
        conditioned_on_mask = takes_visible(guide)
        n_training = self.training_particles
        if n_training is None:
            n_training = min(
                self.num_particles, MAX_CONDITIONED_DRAWS if conditioned_on_mask else self.num_particles
            )
        twice = conditioned_on_mask if self.doubly_reparameterized is None else self.doubly_reparameterized
        return GuideDraws(model, guide, args, program, self.num_particles, n_training, twice, self.dream)

    def _analyze(self, model: Model, args: tuple[Any, ...]) -> Program:
        """What the program is made of, checked with the settings."""
        for name in ("num_particles", "training_particles"):
            value = getattr(self, name)
            if (value is not None or name == "num_particles") and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        program = analyze(model, args)
        if not program.continuous:
            raise ModelError("the program has no continuous latent, so nothing to draw: use Exact()")
        return program


def _no_outputs(objective: Objective, read: Conditionals | None) -> None:
    return None


class _AroundMode(NodeSource):
    """Student-t draws around the mode of each row's posterior."""

    name = "Importance"
    relocates = True

    def __init__(self, adaptive: AdaptiveNodes, n_draws: int):
        self.adaptive, self.n_draws = adaptive, n_draws
        self.modes = ModeSearch(adaptive)
        self.leading = Leading(self.modes, max(MIN_MOVING, int(MOVING * n_draws)))
        self.model, self.structure = adaptive.model, adaptive.program

    @property
    def why(self) -> str:  # type: ignore[override]  # how draws are placed is found out with the rows
        """How, in words."""
        names, inside = list_names(self.adaptive.space.names), self.adaptive.inside
        if self.leading.leads:
            return f"{self.n_draws} draws of {names}, led from the prior to the posterior{inside}"
        return f"{self.n_draws} Student-t draws of {names} around the mode of each row's posterior{inside}"

    def place(self, args: Args, visible: Tensor | None = None, near: Any = None) -> Read:
        value = program_values(self.model, args, self.structure)
        if visible is None:
            visible = torch.ones(value.shape[1], dtype=torch.bool, device=value.device)
        led = self.leading.find(args, value, visible)
        if led is None:
            found = self.modes.find(args, value, visible, near)
            modes: Modes | Bent = found if self.structure.by_row else self._moved(args, value, visible, found)
        else:
            found, modes = led.located(), led
        n_prior = 0 if self.structure.by_row or self.structure.parameters else int(PRIOR * self.n_draws)
        u, of = modes.drawn(self.n_draws - n_prior)
        stratum = None if self.structure.by_row else of[:, 0]
        lost = torch.zeros_like(u[..., 0], dtype=torch.bool)
        if n_prior:
            more = prior_points(self.adaptive, args.filled, n_prior)[:, None].to(u)
            u = torch.cat([u, more.nan_to_num(0.0, 0.0, 0.0)])
            stratum = torch.cat([of[:, 0], of.new_full((n_prior,), -1)])
            # one that no number stands for, or at which the program has none, has no weight
            none = ~more.isfinite().all(-1) | self._impossible(args, u[-n_prior:], value, visible)
            lost = torch.cat([lost, none])
            u = torch.where(lost[..., None], modes.mode[0], u)
        try:
            given, part, scale = self.adaptive.at(args, u)
        except torch.linalg.LinAlgError:
            if self.structure.by_row:
                raise
            lost = lost | self._impossible(args, u, value, visible)
            u = torch.where(lost[..., None], modes.mode[0], u)
            given, part, scale = self.adaptive.at(args, u)
        log_q = modes.log_density(u)
        if n_prior:
            log_prior = (given.log_prior(value) + part).nan_to_num(-math.inf, math.inf, -math.inf)
            share = n_prior / self.n_draws
            log_q = torch.logaddexp(log_q + math.log1p(-share), log_prior + math.log(share))
        log_weight = torch.where(lost, -math.inf, part - log_q - math.log(self.n_draws))
        latents = constrained(self.adaptive.space, u)
        return Read(
            given, log_weight, value, scale, latents, self.adaptive.space.names, found, stratum=stratum
        )

    def _impossible(self, args: Args, u: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        """(S, 1) whether the program has no number at a draw u (S, 1, d), or a matrix of it no Cholesky factor."""

        def runs(part: Tensor) -> tuple[Tensor]:
            given, outside, _ = self.adaptive.at(args, part)
            both = given.log_joint(value, visible) + given.log_prior(value) + outside
            return (both.isnan().expand(len(part), 1)[:, 0],)

        return by_halves(runs, u, (torch.ones_like(u[:1, 0, 0], dtype=torch.bool),))[0][:, None]

    def _moved(self, args: Args, value: Tensor, visible: Tensor, found: Modes) -> Modes:
        """The mixture moved to where its draws say that the posterior is, by more draws."""
        width, n = found.mode.shape[-1], max(MIN_MOVING, int(MOVING * self.n_draws))
        wide = found if found.has_pieces else self._widened(args, value, visible, found)
        if n < PER_NUMBER * width * (width + 1) / 2:
            return wide
        if not found.has_pieces:  # these were fitted to draws already
            wide = beside(found, wide, HALF)
        return self.modes.move(args, value, visible, wide, n)

    def _widened(self, args: Args, value: Tensor, visible: Tensor, found: Modes) -> Modes:
        """The mixture of the Gaussians closest to the posterior around each mode, and of their images."""
        orbits = found.orbits
        first = [0] if orbits is None else orbits.first
        # each draw costs a curvature, d^3 operations, and that through the nodes of all rows where they have some
        most = MAX_PAIRS if self.adaptive.rows is None else MAX_NESTED_PAIRS
        n_pairs = max(4, min(most, WIDENING_COST // (found.mode.shape[-1] ** 3 * len(first))))
        wide, share = [], found.representatives().log_share[:, 0].exp().tolist()
        for mode, root, part in zip(found.mode[first], found.root[first], share, strict=True):
            near = LaplaceApproximation(mode, root)
            for _ in range(N_WIDENINGS if part > MIN_SHARE else 0):
                half = torch.randn(n_pairs, *mode.shape, dtype=mode.dtype).to(mode)
                try:
                    next_one = self.adaptive.refine_gaussian(
                        args, value, visible, near, torch.cat([half, -half])
                    )
                except torch.linalg.LinAlgError:  # at one of the draws: the Gaussian before does
                    break
                if not all(bool(t.isfinite().all()) for t in next_one):
                    break
                near = next_one
            wide.append(near)
        u, root = (torch.stack(each)[:, 0] for each in zip(*wide, strict=True))
        if orbits is None:
            return found._replace(mode=u[:, None], root=root[:, None])
        mode, root, log_mass = orbits.spread(u, root, found.log_mass[first, 0])
        return found._replace(mode=mode, root=root, log_mass=log_mass)

    def evidence(self, nodes: Nodes) -> Evidence:
        modes = nodes.last.located
        doubt = modes.doubt or nodes.doubt_inside()
        return doubted(evidence_of_draws(nodes), modes._replace(doubt=doubt))

    def _forget(self) -> None:
        self.modes.forget()
        self.leading.forget()

    def schedule(self, whole: Batch, masks: Policy | None, seed: int = 0) -> list[Objective]:
        if self.structure.by_row:
            return [objective_of_draws(self, whole, masks)]
        warn_of_ratios(self, masks)
        # without masks Laplace's approximation, which can be climbed; no part of it is cheap
        return [
            Objective(
                self,
                whole,
                masks,
                refresh=self._forget,
                smooth=self.laplace,
                outputs=_no_outputs,
            )
        ]

    def laplace(self, args: tuple[Any, ...]) -> Tensor:
        """A smooth approximation of the score (N,) at the program's current parameters."""
        rows = Args(args)
        value = program_values(self.model, rows, self.structure)
        visible = torch.ones(value.shape[1], dtype=torch.bool, device=value.device)
        return self.adaptive.laplace(rows, value, visible)
