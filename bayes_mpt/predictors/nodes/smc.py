"""Sequential Monte Carlo over latents that all rows share: the evidence with everything integrated.

Particles go from a start q to the posterior along q^(1 - b) p(u, x)^b (Neal 2001; Del Moral, Doucet & Jasra 2006), or
by revealing tokens in turn (Chopin 2002), reweighted, resampled and moved by Hamiltonian Monte Carlo. Half of q is the
prior, so that no mode is missed which the prior reaches; the other half is a Student-t at the posterior's mode, so that
the way is short where one mode is all there is. A pilot run finds temperatures, scales and steps; with these frozen,
each of R independent runs gives an unbiased estimate of Z.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from bayes_mpt.diagnostics import replicate_error
from bayes_mpt.predictors.base import Bound, Conditionals, Evidence, Guide, Posterior, Predictor
from bayes_mpt.predictors.nodes.adaptive import AdaptiveNodes
from bayes_mpt.predictors.nodes.given import Given
from bayes_mpt.predictors.nodes.newton import LaplaceApproximation
from bayes_mpt.predictors.nodes.resampling import KEEP, by_halves, next_temperature, systematic, weighted_root
from bayes_mpt.predictors.nodes.rules import DEGREES, log_t
from bayes_mpt.predictors.nodes.tempering import Particles, hmc_move
from bayes_mpt.predictors.nodes.weighted import constrained, program_values, warn_if_slow
from bayes_mpt.program.analysis import analyze
from bayes_mpt.program.arguments import fill
from bayes_mpt.program.program import Model, ModelError, Program, one_vector
from bayes_mpt.program.run import NODES, one_precision

__all__ = ["SequentialMonteCarlo"]

CELLS = 2**19  # log-densities of tokens at a time
TARGET = 0.8  # acceptance of the moves
LEAPS = 4
MAX_SD = 0.5  # of log Z between runs; above it there are twice the particles
MAX_DOUBLINGS = 4
MAX_LOCATED = 64  # latents, up to which the mode and its curvature are looked for
IMPOSSIBLE = -1e300  # log-density of particles that have none, finite so that differences are numbers
NEVER = -1e280  # below it no particle is possible
MAX_DRAWS = 200  # particles that a prediction averages over


class SequentialMonteCarlo(Predictor):
    """Integrate every latent of the data set: the Bayesian evidence, with a standard error from independent runs.

    Discrete latents are summed out for each particle. The program may hold no `pyro.param`: what is to be integrated
    must have a prior.

    Parameters
    ----------
    num_particles : int, default=256
        Of each run, at first: doubled until log Z varies by no more than 0.5 nats between runs.
    num_runs : int, default=8
        R independent runs with temperatures and moves frozen after a pilot.
    num_moves : int, default=2
        Hamiltonian moves a temperature.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist, torch
    >>> def coin(x):
    ...     p = pyro.sample("p", dist.Beta(x.new_tensor(1.0), x.new_tensor(1.0)))
    ...     with pyro.plate("rows", len(x)):
    ...         pyro.sample("x", dist.Bernoulli(p), obs=x)
    >>> x = torch.tensor([1.0] * 50 + [0.0] * 50, dtype=torch.float64)
    >>> _ = torch.manual_seed(0)
    >>> found = SequentialMonteCarlo().bind(coin, (x,)).read((x,)).evidence()
    >>> abs(float(found.by_row) + 71.398962) < 3 * found.se < 0.3
    True
    """

    def __init__(self, num_particles: int = 256, num_runs: int = 8, num_moves: int = 2):
        self.num_particles = num_particles
        self.num_runs = num_runs
        self.num_moves = num_moves

    def bind(self, model: Model, args: tuple[Any, ...], guide: Guide | None = None) -> Bound:
        for name, least in (("num_particles", 8), ("num_runs", 2), ("num_moves", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        program = analyze(model, args)
        if not program.continuous:
            raise ModelError("the program has no continuous latent to sample: use Exact()")
        if program.by_row:
            raise ModelError(
                f"all latents {list(program.latent_names)} are inside the rows plate {program.rows_plate!r}: rows "
                "are independent, and each is integrated by itself. Use Quadrature(), or Importance() with a guide"
            )
        if program.parameters:
            raise ModelError(
                f"the program has pyro.params {list(program.parameters)}: sequential Monte Carlo integrates and does "
                "not train. Give them priors by pyro.sample, or use Importance() with a guide"
            )
        bound = _Tempered(self, model, args, one_vector(program))
        warn_if_slow(bound.adaptive.one_by_one, bound)
        if not bound.adaptive.space.parts:
            raise ModelError(
                f"all latents {list(program.latent_names)} are integrated group by group "
                f"({bound.adaptive.inside}): there is nothing left for particles. Use Quadrature()"
            )
        return bound


class _Stage(NamedTuple):
    """A temperature and the moves at it."""

    temperature: float
    root: Tensor
    """(d, d) of the particles' covariance."""
    step: float


class _Tempered(Bound):
    """See `SequentialMonteCarlo`."""

    name = "SequentialMonteCarlo"
    model: Model
    structure: Program

    def __init__(self, settings: SequentialMonteCarlo, model: Model, args: tuple[Any, ...], program: Program):
        self.settings, self.model, self.structure = settings, model, program
        self.adaptive = AdaptiveNodes(model, args, program)
        space = self.adaptive.space
        self.why = (
            f"{settings.num_runs} runs of at least {settings.num_particles} particles over the {space.width} "
            f"numbers of {', '.join(space.names)}, from prior and mode to the posterior{self.adaptive.inside}"
        )

    def read(self, args: tuple[Any, ...]) -> Particulate:
        return Particulate(self.settings, self.model, self.structure, self.adaptive, args)


class Particulate(Conditionals):
    """One vector of observations under latents that particles stand for.

    The runs are made once, when they are first needed: what is asked, in whatever order, has the same particles.
    """

    structure: Program

    def __init__(
        self,
        settings: SequentialMonteCarlo,
        model: Model,
        program: Program,
        adaptive: AdaptiveNodes,
        args: tuple[Any, ...],
    ):
        self.settings, self.model, self.structure = settings, model, program
        self.adaptive, self.space = adaptive, adaptive.space
        self._args, self._filled = args, tuple(fill(a) for a in args)
        self.value = program_values(model, args, self._filled, program)

    # ---------------------------------------------------------------------------------------------- what it gives

    def evidence(self, orders: Tensor | None = None) -> Evidence:
        """log of the mean of Z over the runs, and its standard error, sd(Z) / (mean(Z) sqrt R) x t / 2."""
        return self._integrated[0]

    @cached_property
    def _integrated(self) -> tuple[Evidence, Particles]:
        """The evidence of the rows, and particles of their posterior."""
        return self._run_all(self.value)

    def _run_all(self, x: Tensor) -> tuple[Evidence, Particles]:
        seen = ~x.isnan()[0]
        n = self.settings.num_particles
        with torch.no_grad(), pyro.validation_enabled(False):
            located = self._locate(x, seen)
            for doubling in range(MAX_DOUBLINGS + 1):
                stages, _ = self._pilot(n, x, seen, located)
                log_z, cloud = self._runs(stages, n, x, seen, located)
                if doubling == MAX_DOUBLINGS or float(log_z.std()) <= MAX_SD:
                    break
                n *= 2
            inside = self._inside(x, seen, cloud)
        relative = (log_z - log_z.logsumexp(0) + math.log(len(log_z))).exp()  # Z_r / mean Z
        lml = log_z.logsumexp(0) - math.log(len(log_z)) + inside
        if float(lml) < NEVER:
            lml = lml.new_tensor(-math.inf)
        diagnostics = {
            "num_particles": n,
            "num_temperatures": len(stages),
            "log_z": log_z.cpu().numpy(),
            "sd_log_z": float(log_z.std()),
        }
        if inside:
            diagnostics["change with more nodes in each row"] = inside
        se = math.hypot(replicate_error(relative.double().cpu().numpy()), inside)
        return Evidence(lml[None], se, diagnostics, drawn=True), cloud

    def _inside(self, x: Tensor, seen: Tensor, cloud: Particles) -> float:
        """log of the mean over the posterior of Z with more nodes in each row over Z: 0 where rows have none."""
        if self.adaptive.rows is None:
            return 0.0
        u = cloud.u.flatten(0, 1)
        u = u[:: max(1, len(u) // MAX_DRAWS)]
        change = [(g.refined().log_joint(x, seen) - g.log_joint(x, seen))[:, 0] for g, _ in self._given(u)]
        return float(torch.cat(change).logsumexp(0)) - math.log(len(u))

    def _joint(self) -> Tensor:
        return self.evidence().by_row

    def conditionals(self, visible: Tensor) -> Tensor:
        x, out = self.value, []
        with torch.no_grad(), pyro.validation_enabled(False):
            for mask in visible:
                cloud = self._posterior(x, mask & ~x.isnan()[0])
                u = cloud.u.flatten(0, 1)
                predictive = torch.cat([g.predictive(x, mask)[:, 0] for g, _ in self._given(u)])  # (M, T)
                log_prob = predictive.logsumexp(0) - math.log(len(predictive))
                out.append(torch.where(~mask & ~x.isnan(), log_prob, 0.0))
        return torch.stack(out)

    def chain(self, order: Tensor, stops: list[int] | None = None) -> Tensor:
        with torch.no_grad(), pyro.validation_enabled(False):
            return torch.stack([self._reveal(self.value, tokens) for tokens in order])

    def posterior(self, visible: Tensor | None = None) -> Posterior:
        x = self.value
        with torch.no_grad(), pyro.validation_enabled(False):
            shown = ~x.isnan()[0] if visible is None else visible & ~x.isnan()[0]
            cloud = self._integrated[1] if visible is None else self._posterior(x, shown)
            u = cloud.u.flatten(0, 1)
            total = torch.stack([g.means(x, shown).sum(0) for g, _ in self._given(u)]).sum(0)
            mean = constrained(self.space, u[:, None]).mean(0)
        return Posterior(
            mean, total / len(u), of_shared=lambda: self._shared(u, torch.where(shown, x, torch.nan))
        )

    def _shared(self, u: Tensor, x: Tensor) -> list[tuple[float, dict[str, Tensor]]]:
        """Weighted values of the latents at some of the particles u (M, d) given the tokens x (1, T)."""
        with torch.no_grad(), pyro.validation_enabled(False):
            u = u[:: max(1, len(u) // MAX_DRAWS)]
            inner = [values for g, _ in self._given(u) for values in g.latents(x)] or [[{}]] * len(u)
        return [
            (1 / (len(u) * len(each)), {**self.space.values(v[None, None])[0], **values})
            for v, each in zip(u, inner, strict=True)
            for values in each
        ]

    # ------------------------------------------------------------------------------------------------- the particles

    def _locate(self, x: Tensor, seen: Tensor) -> LaplaceApproximation | None:
        """Mode and curvature of the posterior, where there are few enough latents."""
        if self.space.width > MAX_LOCATED or not bool(seen.any()):
            return None
        try:
            located = self.adaptive.locate(self._args, x, seen)
        except torch.linalg.LinAlgError:
            return None  # on the way to the mode; the prior alone is the start
        fine = torch.isfinite(located.mode).all() & torch.isfinite(located.root).all()
        return located if bool(fine) else None

    def _pilot(
        self, n: int, x: Tensor, seen: Tensor, located: LaplaceApproximation | None
    ) -> tuple[list[_Stage], Particles]:
        """One run that chooses each temperature so that half of the particles stay effective."""
        cloud = self._start(1, n, x, seen, located)
        stages: list[_Stage] = []
        temperature, step = 0.0, self.space.width**-0.25
        while temperature < 1:
            before, temperature = temperature, next_temperature(cloud.way[0], temperature)
            log_w = (temperature - before) * cloud.way
            root = weighted_root(cloud.u[0], log_w[0].softmax(0))
            cloud = cloud.take(systematic(log_w))
            for _ in range(self.settings.num_moves):
                cloud, accepted = self._move(cloud, temperature, root, step, x, seen, located)
                step *= math.exp(accepted - TARGET)
            stages.append(_Stage(temperature, root, step))
        return stages, cloud

    def _runs(
        self, stages: list[_Stage], n: int, x: Tensor, seen: Tensor, located: LaplaceApproximation | None
    ) -> tuple[Tensor, Particles]:
        """R independent runs along frozen stages: log Z (R,)."""
        cloud = self._start(self.settings.num_runs, n, x, seen, located)
        log_z = cloud.log_end.new_zeros(self.settings.num_runs)
        before = 0.0
        for stage in stages:
            log_w = (stage.temperature - before) * cloud.way
            log_z = log_z + log_w.logsumexp(1) - math.log(n)
            cloud = cloud.take(systematic(log_w))
            for _ in range(self.settings.num_moves):
                cloud, _ = self._move(cloud, stage.temperature, stage.root, stage.step, x, seen, located)
            before = stage.temperature
        return log_z, cloud

    def _posterior(self, x: Tensor, shown: Tensor) -> Particles:
        """Particles given the shown tokens."""
        located = self._locate(x, shown)
        if not bool(shown.any()):
            return self._start(1, self.settings.num_particles, x, shown, None)
        return self._pilot(self.settings.num_particles, x, shown, located)[1]

    def _reveal(self, x: Tensor, tokens: Tensor) -> Tensor:
        """log p(x_t | x_<t) of each token: particles reweighted token by token, moved when they degenerate."""
        n_runs, n = self.settings.num_runs, self.settings.num_particles
        shown = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
        cloud = self._start(n_runs, n, x, shown, None)
        log_w = torch.zeros_like(cloud.log_end)
        log_z = log_w.new_zeros(n_runs)
        out = torch.zeros_like(x)
        step = self.space.width**-0.25
        before = log_w.new_zeros(())
        for token in tokens:
            if bool(x[0, token].isnan()):
                continue
            shown = shown.clone()
            shown[token] = True
            log_end = self._log_end(cloud.u, x, shown)
            log_w = log_w + log_end - cloud.log_end
            cloud = Particles(cloud.u, cloud.log_start, log_end, cloud.slope)
            total = log_z + log_w.logsumexp(1) - math.log(n)
            now = total.logsumexp(0) - math.log(n_runs)  # log of the mean of Z
            if float(now) < NEVER:  # and so is all that follows
                rest = tokens[int((tokens == token).nonzero()) :]
                out[0, rest] = torch.where(x[0, rest].isnan(), 0.0, -math.inf).to(x)
                return out
            out[0, token], before = now - before, now
            share = log_w.softmax(1)
            if float((1 / share.square().sum(1)).min()) < KEEP * n:
                log_z = total
                root = weighted_root(cloud.u.flatten(0, 1), share.flatten() / n_runs)
                cloud = self._evaluate(cloud.take(systematic(log_w)).u, x, shown, None)
                log_w = torch.zeros_like(log_w)
                for _ in range(self.settings.num_moves):
                    cloud, accepted = self._move(cloud, 1.0, root, step, x, shown, None)
                    step *= math.exp(accepted - TARGET)
        return out

    def _start(
        self, n_runs: int, n: int, x: Tensor, seen: Tensor, located: LaplaceApproximation | None
    ) -> Particles:
        """Draws from q: the prior, and where it is located as many around the mode, in a random place of each run."""
        u = self._prior_draws(n_runs * n).reshape(n_runs, n, -1)
        if located is not None:
            normal = torch.randn(u.shape, dtype=u.dtype).to(u)
            chi = torch.distributions.Chi2(torch.tensor(DEGREES, dtype=u.dtype)).sample((n_runs, n)).to(u)
            t = normal * (DEGREES / chi)[..., None].sqrt()
            around = located.mode[0] + t @ located.root[0].mT
            # half and half, exactly: a stratified draw from the mixture
            even = (torch.arange(n, device=u.device) % 2 == 0)[None, :, None]
            u = torch.where(even, around, u)
        return self._evaluate(u, x, seen, located)

    def _prior_draws(self, n: int) -> Tensor:
        """Draws of the latents that take nodes (n, d)."""
        program = self.structure
        with pyro.validation_enabled(
            False
        ):  # a matrix without a factor is no error, but an impossible particle
            if self.adaptive.vectorised and self.adaptive.rows is None and n > 1:
                with one_precision(self._filled), pyro.plate(NODES, n, dim=-1 - program.depth):
                    values = self._one_draw()
                if len(values) == len(self.space.names):
                    return self.space.pack_values(values, n, 1)[:, 0].detach()
            if not self.adaptive.one_by_one:
                with suppress(RuntimeError, KeyError), one_precision(self._filled):
                    drawn = torch.vmap(lambda _: self._one_draw(), randomness="different")(torch.arange(n))
                    return self.space._replace(depth=0).pack_values(drawn, n, 1)[:, 0].detach()
            with one_precision(self._filled):
                draws = [self._one_draw() for _ in range(n)]
        whole = next((d for d in draws if len(d) == len(self.space.names)), None)
        if whole is None:
            raise ModelError(
                f"a matrix that the program computes is not positive definite at any of {n} draws from the prior: add "
                "to its diagonal, or write a narrower prior"
            )
        # where it failed before all latents were drawn, the others stand for them: that particle is impossible
        values = {name: torch.stack([(whole | d)[name] for d in draws]) for name in self.space.names}
        return self.space._replace(depth=0).pack_values(values, n, 1)[:, 0].detach()

    def _one_draw(self) -> dict[str, Tensor]:
        """Of the latents that take nodes; of those before a matrix without a Cholesky factor, where there is one."""
        tracer = pyro.poutine.trace(self.model)
        with suppress(torch.linalg.LinAlgError):
            tracer.get_trace(*self._filled)
        nodes = tracer.trace.nodes
        return {name: nodes[name]["value"] for name in self.space.names if name in nodes}

    def _move(
        self,
        cloud: Particles,
        temperature: float,
        root: Tensor,
        step: float,
        x: Tensor,
        seen: Tensor,
        located: LaplaceApproximation | None,
    ) -> tuple[Particles, float]:
        """Hamiltonian Monte Carlo in units of the particles' covariance root root'."""
        jitter = step * (0.8 + 0.4 * torch.rand(*cloud.log_end.shape, 1, dtype=cloud.u.dtype).to(cloud.u))
        momentum = torch.randn(cloud.u.shape, dtype=cloud.u.dtype).to(cloud.u)  # in units of root^-T

        def at(u: Tensor) -> Particles:
            return self._evaluate(u, x, seen, located)

        def uniform(like: Tensor) -> Tensor:
            return torch.rand(like.shape, dtype=like.dtype).to(like)

        moved, chance = hmc_move(at, cloud, temperature, jitter, momentum, uniform, LEAPS, root)
        return moved, float(chance.mean())

    # --------------------------------------------------------------------------------------------------- the program

    def _evaluate(
        self, u: Tensor, x: Tensor, seen: Tensor, located: LaplaceApproximation | None
    ) -> Particles:
        """Densities and slopes at u (R, S, d)."""
        values, slopes = [], []
        with torch.enable_grad():
            for part in self._chunks(u.flatten(0, 1)):
                value, slope = by_halves(
                    lambda some: self._both(some, x, seen, located),
                    part,
                    (part.new_full((2, 1), -math.inf), part.new_zeros(2, 1, part.shape[1])),
                )
                values.append(value)
                slopes.append(slope)
        start, end = torch.cat(values, 1).reshape(2, *u.shape[:2])
        bad = ~(torch.isfinite(start) & torch.isfinite(end))  # no finite density: never taken
        return Particles(
            u,
            torch.where(torch.isfinite(start), start, 0.1 * IMPOSSIBLE),
            torch.where(bad, IMPOSSIBLE, end),
            torch.cat(slopes, 1).reshape(2, *u.shape),
        )

    def _both(
        self, u: Tensor, x: Tensor, seen: Tensor, located: LaplaceApproximation | None
    ) -> tuple[Tensor, Tensor]:
        """log q(u) and log p(u, x_R) at u (M, d), (2, M), and their slopes (2, M, d)."""
        leaf = u.detach().requires_grad_()
        given, log_det, _ = self.adaptive.at(self._args, self._filled, leaf[:, None])
        start = (given.log_prior(x) + log_det)[:, 0]
        end = (given.log_joint(x, seen) + log_det)[:, 0]
        if located is not None:
            white = torch.linalg.solve(located.root[0], (leaf - located.mode[0]).mT).mT
            log_q = log_t(white) - torch.linalg.slogdet(located.root[0])[1]
            start = torch.logaddexp(start, log_q) - math.log(2)
        slopes = [
            torch.autograd.grad(t.sum(), leaf, retain_graph=True, materialize_grads=True)[0]
            if t.requires_grad
            else torch.zeros_like(leaf)
            for t in (start, end)
        ]
        return torch.stack([start, end]).detach(), torch.stack(slopes)

    def _log_end(self, u: Tensor, x: Tensor, seen: Tensor) -> Tensor:
        """log p(u, x_R) (R, S)."""

        def log_end(part: Tensor) -> tuple[Tensor]:
            given, log_det, _ = self.adaptive.at(self._args, self._filled, part[:, None])
            return ((given.log_joint(x, seen) + log_det)[:, 0],)

        parts = [
            by_halves(log_end, part, (u.new_tensor([-math.inf]),))[0]
            for part in self._chunks(u.flatten(0, 1))
        ]
        return torch.cat(parts).reshape(u.shape[:2])

    def _given(self, u: Tensor) -> Iterator[tuple[Given, Tensor]]:
        """The inner model at u (M, d), by chunks, and what it leaves out."""
        for part in self._chunks(u):
            given, log_det, _ = self.adaptive.at(self._args, self._filled, part[:, None])
            yield given, log_det

    def _chunks(self, u: Tensor) -> tuple[Tensor, ...]:
        return u.split(max(1, CELLS // max(1, self.structure.n_tokens * self.adaptive.n_evaluations)))
