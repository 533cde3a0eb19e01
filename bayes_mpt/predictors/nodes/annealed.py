"""Annealed importance sampling: draws from guide or prior, led to each row's posterior before they are weighed."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayes_mpt.masks import Policy
from bayes_mpt.predictors.base import Evidence, Guide, Predictor
from bayes_mpt.predictors.nodes.guide import Drawn, GuideDraws, evidence_of_draws
from bayes_mpt.predictors.nodes.importance import Importance
from bayes_mpt.predictors.nodes.tempering import Particles, hmc_move
from bayes_mpt.predictors.nodes.weighted import Nodes, NodeSource, Read, constrained, objective_of_draws
from bayes_mpt.predictors.objective import Batch, Objective
from bayes_mpt.program.arguments import Args
from bayes_mpt.program.batched import Batched
from bayes_mpt.program.latents import Space, space
from bayes_mpt.program.program import Model, ModelError
from bayes_mpt.program.run import run
from bayes_mpt.program.simulation import simulate

__all__ = ["AnnealedImportance", "Bracket"]

TARGET = 0.7  # acceptance of the moves
N_PILOT = 2  # particles that find the steps
MARGIN = 2.0  # nats by which the prior must be better: pilots are noisy
N_SCALE = 16  # draws that tell the scale of the start
PILOT_RATE = 0.5  # by which log steps follow the acceptance


class Bracket(NamedTuple):
    """Bidirectional Monte Carlo on rows that were simulated from the program; nats."""

    lower: NDArray[np.float64]
    """(N,) log Z by annealing from the guide; at most the truth in expectation."""
    upper: NDArray[np.float64]
    """(N,) by annealing back from the latents that made the row; at least the truth in expectation."""

    @property
    def gap(self) -> float:
        """Mean over rows of what the error of neither can exceed in expectation."""
        return float((self.upper - self.lower).mean())

    @property
    def gap_se(self) -> float:
        """Its standard error over rows."""
        return float((self.upper - self.lower).std(ddof=1) / math.sqrt(len(self.lower)))


class AnnealedImportance(Predictor):
    """Importance sampling whose draws go to the posterior before they are weighed (Neal 2001).

    Along b = 0 .. 1 each particle moves by Hamiltonian Monte Carlo on q(u)^(1 - b) p(u, x)^b, and collects
    (b_k - b_(k-1)) log p(u, x) / q(u) on its way. The mean of the weights is unbiased for p(x), so its logarithm is low
    on the average: the less, the more steps, and the nearer the start q. That is the guide, or for a row of which a
    pilot run of two chains finds it better by far the prior: a guide may be far off, on rows unlike those that it
    learnt from for one. Step sizes of every row and temperature come from the pilot runs too, and are frozen. A
    training takes the guide's draws as they are (`Importance`).

    Parameters
    ----------
    num_particles : int, default=16
        S chains for each row.
    num_temperatures : int, default=50
        Steps of b: even ones from the guide, from the prior growing in proportion.
    num_leaps : int, default=3
        Leapfrog steps of each move.
    training_particles : int, default=10
        Of the training.

    Examples
    --------
    >>> import torch
    >>> from bayes_mpt import BayesMPT
    >>> from bayes_mpt.models import VAE
    >>> from bayes_mpt.training import Epochs
    >>> X = (torch.rand(60, 6, generator=torch.Generator().manual_seed(0)) < 0.3).numpy().astype("float32")
    >>> way = AnnealedImportance(num_particles=8, num_temperatures=6)
    >>> model = BayesMPT(
    ...     VAE(1, hidden=(8,)),
    ...     predictor=way,
    ...     training=Epochs(max_epochs=2, validation_fraction=0),
    ...     random_state=0,
    ... )
    >>> model.fit(X).score_samples(X).shape
    (60,)
    """

    def __init__(
        self,
        num_particles: int = 16,
        num_temperatures: int = 50,
        num_leaps: int = 3,
        training_particles: int = 10,
    ):
        self.num_particles = num_particles
        self.num_temperatures = num_temperatures
        self.num_leaps = num_leaps
        self.training_particles = training_particles

    def bind(self, model: Model, args: tuple[Any, ...], guide: Guide | None = None) -> NodeSource:
        for name, least in (
            ("num_particles", 2),
            ("num_temperatures", 1),
            ("num_leaps", 1),
            ("training_particles", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if guide is None:
            raise ModelError("AnnealedImportance starts from a guide, got none: give BayesMPT a guide")
        start = Importance(self.num_particles, self.training_particles).from_guide(model, args, guide)
        return Annealed(self, start)


class Annealed(NodeSource):
    """Nodes at the ends of annealed chains, with the weights that the chains collected."""

    name = "AnnealedImportance"
    relocates = True

    def __init__(self, settings: AnnealedImportance, start: GuideDraws):
        if start.batched is not Batched.PLATE or start.adaptive is not None or start.has_points:
            raise ModelError(
                "AnnealedImportance moves all draws of the guide at once: program and guide must broadcast over "
                "leading batch dimensions, and the guide must draw every latent from a density: use Importance()"
            )
        self.settings, self.start = settings, start
        self.model, self.structure, self.guide = start.model, start.structure, start.guide
        self.fillings = start.fillings
        self.why = (
            f"{settings.num_particles} draws of {', '.join(start.names)} from guide or prior, annealed to each row's "
            f"posterior in {settings.num_temperatures} steps"
        )

    @property
    def parameters(self) -> tuple[str, ...]:
        return self.start.parameters

    def schedule(self, whole: Batch, masks: Policy | None, seed: int = 0) -> list[Objective]:
        if masks is not None and not masks.chains:
            return [objective_of_draws(self, whole, masks)]
        return self.start.schedule(whole, masks)  # the bound of the guide's draws has gradients

    def evidence(self, nodes: Nodes) -> Evidence:
        return evidence_of_draws(nodes)

    def place(self, args: Args, visible: Tensor | None = None, near: Any = None) -> Read:
        drawn = self.start.drawn(args, visible)
        path = _Path(self, drawn)
        with torch.no_grad():
            steps = path.begin()
            end, log_w = path.forward(steps, self.settings.num_particles)
            given, part, scale, _ = drawn.given(path.values(end.u), len(end.u))
            # nodes so weighed that sum_s w_s p(x_R, u_s) is the mean of the chains' weights
            log_weight = log_w - end.log_end + part - math.log(len(end.u))
            latents = constrained(path.space, end.u)
        return Read(given, log_weight, drawn.value, scale, latents, path.space.names)

    def bracket(self, args: tuple[Any, ...], latents: dict[str, Tensor]) -> Bracket:
        """Forward from the start, and back from the latents that made these rows (Grosse, Ghahramani & Adams 2015)."""
        drawn = self.start.drawn(Args(args, self.fillings), None)
        path = _Path(self, drawn)
        n = self.settings.num_particles
        with torch.no_grad():
            steps = path.begin()
            lower = path.forward(steps, n)[1].logsumexp(0) - math.log(n)
            exact = path.space.pack_values({k: v[None] for k, v in latents.items()}, 1, drawn.value.shape[0])
            upper = math.log(n) - (-path.backward(steps, exact.expand(n, *exact.shape[1:]))).logsumexp(0)
        return Bracket(lower.double().cpu().numpy(), upper.double().cpu().numpy())


class _Path:
    """From guide or prior to the posterior of each row."""

    def __init__(self, reader: Annealed, drawn: Drawn):
        self.settings, self.start, self.drawn = reader.settings, reader.start, drawn
        trace = run(reader.model, drawn.args.filled)
        self.space: Space = space(reader.structure, trace, reader.start.names)
        self.n_rows = len(drawn.value)
        self.from_prior: Tensor = torch.zeros(self.n_rows, dtype=torch.bool, device=drawn.value.device)
        """(N,) Where a row starts."""
        self.scale: Tensor
        """(N, d) The unit of its moves."""

    def values(self, u: Tensor) -> dict[str, Tensor]:
        """Of the latent sites at u (S, N, d)."""
        return self.space.values(u)[0]

    @property
    def beta(self) -> Tensor:
        """(num_temperatures + 1, N) From 0 to 1, in small steps first from a prior, which is far away."""
        like = self.drawn.value
        t = torch.linspace(0, 1, self.settings.num_temperatures + 1, dtype=like.dtype, device=like.device)[
            :, None
        ]
        return torch.where(self.from_prior, t.square(), t)

    def begin(self) -> list[Tensor]:
        """Choose where each row starts; the step sizes (N, 1) of its moves at each temperature."""
        pilots = []
        for prior in (False, True):
            self.from_prior = torch.full_like(self.from_prior, prior)
            self.scale = self._draw(N_SCALE).std(0).clamp(min=1e-6)
            pilots.append((self.scale, *self._pilot()))
        (scale, steps, log_w), (scale_prior, steps_prior, log_w_prior) = pilots
        self.from_prior = ~(log_w + MARGIN >= log_w_prior)
        pick = self.from_prior[:, None]
        self.scale = torch.where(pick, scale_prior, scale)
        return [torch.where(pick, b, a) for a, b in zip(steps, steps_prior, strict=True)]

    def _pilot(self) -> tuple[list[Tensor], Tensor]:
        """Step sizes, and the mean logarithm (N,) of the weights: the better a start, the higher."""
        point = self._at(self._draw(N_PILOT))
        log_step = torch.full_like(point.u[0, :, :1], math.log(0.5 * self.space.width**-0.25))
        steps, log_w = [], torch.zeros_like(point.log_end)
        for before, beta in pairwise(self.beta):
            log_w = log_w + (beta - before) * (point.log_end - point.log_start)
            point, accepted = self._move(point, beta, log_step.exp())
            log_step = log_step + PILOT_RATE * (accepted.mean(0)[:, None] - TARGET)
            steps.append(log_step.exp())
        return steps, log_w.mean(0)

    def forward(self, steps: list[Tensor], n: int) -> tuple[Particles, Tensor]:
        """Ends of n chains of each row, and the logarithms (S, N) of the weights they collected."""
        point = self._at(self._draw(n))
        log_w = torch.zeros_like(point.log_end)
        for k, (before, beta) in enumerate(pairwise(self.beta), 1):
            log_w = log_w + (beta - before) * (point.log_end - point.log_start)
            if k < len(steps):  # a move at the end changes no weight
                point, _ = self._move(point, beta, steps[k - 1])
        return point, log_w

    def backward(self, steps: list[Tensor], u: Tensor) -> Tensor:
        """The same weights (S, N) of chains that go from exact draws u (S, N, d) of the posterior to the start."""
        point = self._at(u)
        log_w = torch.zeros_like(point.log_end)
        for k, (before, beta) in reversed(list(enumerate(pairwise(self.beta), 1))):
            if k < len(steps):
                point, _ = self._move(point, beta, steps[k - 1])
            log_w = log_w + (beta - before) * (point.log_end - point.log_start)
        return log_w

    def _draw(self, n: int) -> Tensor:
        """Draws (n, N, d) of where the rows start."""
        guide = self.space.pack_values(self.drawn.draw(n), n, self.n_rows)
        if not bool(self.from_prior.any()):
            return guide
        draws = []
        for _ in range(n):
            _, latents = simulate(self.start.model, self.drawn.args.filled, self.start.structure)
            draws.append(self.space.pack_values({k: v[None] for k, v in latents.items()}, 1, self.n_rows))
        return torch.where(self.from_prior[:, None], torch.cat(draws), guide)

    def _at(self, u: Tensor) -> Particles:
        """Densities and slopes at u (S, N, d)."""
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            values, log_det = self.space.values(leaf)
            given, part, _, _ = self.drawn.given(values, len(u))
            guide, prior = self.drawn.log_q(values, len(u)), given.log_prior(self.drawn.value) + part
            start = torch.where(self.from_prior, prior, guide) + log_det
            end = given.log_joint(self.drawn.value, self.drawn.shown) + part + log_det
            slopes = [
                torch.autograd.grad(t.sum(), leaf, retain_graph=True, materialize_grads=True)[0]
                for t in (start, end)
            ]
        return Particles(u, start.detach(), end.detach(), torch.stack(slopes))

    def _move(self, point: Particles, beta: Tensor, step: Tensor) -> tuple[Particles, Tensor]:
        """Hamiltonian Monte Carlo in units of the start's scale; with the chances (S, N) that it was accepted."""
        momentum = torch.randn_like(point.u)
        return hmc_move(
            self._at, point, beta, step * self.scale, momentum, torch.rand_like, self.settings.num_leaps
        )
