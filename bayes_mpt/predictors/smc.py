"""Sequential Monte Carlo over latents that all rows share: the evidence with everything integrated.

Particles go from the prior to the posterior by tempering the likelihood (Del Moral, Doucet & Jasra 2006; Neal 2001),
or by revealing tokens in turn (Chopin 2002), reweighted, resampled and moved by Hamiltonian Monte Carlo. A pilot run
finds temperatures, scales and steps; with these frozen, each of R independent runs gives an unbiased estimate of Z.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from bayes_mpt.factors import Factors, read_factors
from bayes_mpt.latents import Space, space
from bayes_mpt.predictors.base import Conditionals, Evidence, Guide, Posterior, Predictor
from bayes_mpt.predictors.errors import replicate_error
from bayes_mpt.predictors.nodes import constrained, program_values
from bayes_mpt.predictors.placed import vectorises
from bayes_mpt.tracing import NODES, Model, ModelError, Program, fill, one_vector, run, survey

__all__ = ["SequentialMonteCarlo"]

CELLS = 2**22  # log-densities of tokens at a time
KEEP = 0.5  # share of effective particles that a step of the temperature keeps
TARGET = 0.8  # acceptance of the moves
LEAPS = 4
MAX_SD = 0.5  # of log Z between runs; above it there are twice the particles
MAX_DOUBLINGS = 4
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
    >>> found = SequentialMonteCarlo().bind(coin, (x,)).read((x,)).evidence(x[None])
    >>> abs(float(found.by_row) + 71.398962) < 3 * found.se < 0.3
    True
    """

    def __init__(self, num_particles: int = 256, num_runs: int = 8, num_moves: int = 2):
        self.num_particles = num_particles
        self.num_runs = num_runs
        self.num_moves = num_moves

    def bind(self, model: Model, args: tuple[Any, ...], guide: Guide | None = None) -> Conditionals:
        for name, least in (("num_particles", 8), ("num_runs", 2), ("num_moves", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        program = survey(model, args)
        if not program.continuous:
            raise ModelError("the program has no continuous latent to sample: use Exact()")
        if program.by_row:
            raise ModelError(
                f"all latents {list(program.latent_names)} stand inside the rows plate {program.rows_plate!r}: rows "
                "are independent, and each is integrated by itself. Use Quadrature(), or Importance() with a guide"
            )
        if program.parameters:
            raise ModelError(
                f"the program has pyro.params {list(program.parameters)}: sequential Monte Carlo integrates and does "
                "not train. Give them priors by pyro.sample, or use Importance() with a guide"
            )
        return _Particles(self, model, args, one_vector(program))


class _Stage(NamedTuple):
    """A temperature and the moves at it."""

    temperature: float
    root: Tensor
    """(d, d) of the particles' covariance."""
    step: float


@dataclass(frozen=True)
class _Cloud:
    """Particles of R runs."""

    u: Tensor
    """(R, S, d)"""
    log_prior: Tensor
    """(R, S)"""
    log_lik: Tensor
    """(R, S), of what is visible."""
    slope: Tensor
    """(2, R, S, d): of the prior, of the likelihood."""

    def take(self, index: Tensor) -> _Cloud:
        """Particles index (R, S) of each run."""
        long = index[..., None].expand_as(self.u)
        return _Cloud(
            self.u.gather(1, long),
            self.log_prior.gather(1, index),
            self.log_lik.gather(1, index),
            self.slope.gather(2, long.expand_as(self.slope)),
        )


class _Particles(Conditionals):
    """The conditionals that particles give."""

    name = "SequentialMonteCarlo"
    sampled = True
    trainable = False
    structure: Program

    def __init__(self, settings: SequentialMonteCarlo, model: Model, args: tuple[Any, ...], program: Program):
        self.settings, self.model, self.structure = settings, model, program
        filled = tuple(fill(a) for a in args)
        self.space: Space = space(program, run(model, filled), program.continuous)
        self.vectorised = vectorises(model, filled, program, self.space)
        summed = f"; {', '.join(program.discrete)} summed out" if program.discrete else ""
        self.why = (
            f"{settings.num_runs} runs of at least {settings.num_particles} particles over the "
            f"{self.space.width} numbers of {', '.join(self.space.names)}, from the prior to the posterior{summed}"
        )
        self._filled: tuple[Any, ...] = ()
        self._value: Tensor | None = None
        self._scale = 1.0
        self._cloud: _Cloud | None = None

    @property
    def value(self) -> Tensor:
        if self._value is None:
            raise RuntimeError("call read(args) first: this predictor has not read the program yet")
        return self._value

    @property
    def scale(self) -> float:
        return self._scale

    def read(self, args: tuple[Any, ...]) -> _Particles:
        if self.model is None:
            raise RuntimeError("this predictor is frozen: it has no program to read")
        new = self._copy()
        new._filled = tuple(fill(a) for a in args)
        new._value = program_values(self.model, args, new._filled, self.structure)
        return new

    def freeze(self) -> _Particles:
        new = self._copy()
        new.model, new._cloud = None, None
        return new

    # ---------------------------------------------------------------------------------------------- what it gives

    def evidence(self, x: Tensor) -> Evidence:
        """log of the mean of Z over the runs, and its standard error, sd(Z) / (mean(Z) sqrt R) x t / 2."""
        seen = ~x.isnan()
        n = self.settings.num_particles
        with torch.no_grad(), pyro.validation_enabled(False):
            for doubling in range(MAX_DOUBLINGS + 1):
                stages, _ = self._pilot(n, seen)
                log_z, self._cloud = self._runs(stages, n, seen)
                if doubling == MAX_DOUBLINGS or float(log_z.std()) <= MAX_SD:
                    break
                n *= 2
        relative = (log_z - log_z.logsumexp(0) + math.log(len(log_z))).exp()  # Z_r / mean Z
        lml = log_z.logsumexp(0) - math.log(len(log_z))
        diagnostics = {
            "num_particles": n,
            "num_temperatures": len(stages),
            "log_z": log_z.cpu().numpy(),
            "sd_log_z": float(log_z.std()),
        }
        return Evidence(lml[None], replicate_error(relative.double().cpu().numpy()), diagnostics)

    def joint(self, x: Tensor) -> Tensor:
        return self.evidence(x).by_row

    def conditionals(self, x: Tensor, visible: Tensor) -> Tensor:
        out = []
        with torch.no_grad(), pyro.validation_enabled(False):
            for mask in visible:
                shown = mask & ~x.isnan()
                cloud = self._posterior(shown)
                predictive = self._predictive(cloud.u.flatten(0, 1), shown)  # (M, T)
                log_prob = predictive.logsumexp(0) - math.log(len(predictive))
                out.append(torch.where(~mask & ~x.isnan(), log_prob, 0.0))
        return torch.stack(out)

    def chain(self, x: Tensor, order: Tensor) -> Tensor:
        out = []
        with torch.no_grad(), pyro.validation_enabled(False):
            for tokens in order:
                out.append(self._reveal(x, tokens))
        return torch.stack(out)

    def posterior(self, x: Tensor, visible: Tensor | None = None) -> Posterior:
        with torch.no_grad(), pyro.validation_enabled(False):
            shown = ~x.isnan() if visible is None else visible & ~x.isnan()
            cloud = self._cloud if visible is None and self._cloud is not None else self._posterior(shown)
            u = cloud.u.flatten(0, 1)[:, None]  # (M, 1, d)
            means = [self._factors(part).means(shown).mean(0) * len(part) for part in self._chunks(u[:, 0])]
            tokens = torch.stack(means).sum(0) / len(u)
            return Posterior(constrained(self.space, u).mean(0), tokens)

    def shared_latents(self, x: Tensor) -> list[tuple[float, dict[str, Tensor]]]:
        with torch.no_grad(), pyro.validation_enabled(False):
            cloud = self._posterior(~x.isnan()) if self._cloud is None else self._cloud
        u = cloud.u.flatten(0, 1)
        u = u[:: max(1, len(u) // MAX_DRAWS)]
        return [(1 / len(u), self.space.values(v[None, None])[0]) for v in u]

    # ------------------------------------------------------------------------------------------------- the particles

    def _copy(self) -> _Particles:
        new = object.__new__(_Particles)
        new.__dict__.update(self.__dict__)
        return new

    def _pilot(self, n: int, seen: Tensor) -> tuple[list[_Stage], _Cloud]:
        """One run that chooses each temperature so that half of the particles stay effective."""
        cloud = self._prior(1, n, seen)
        stages: list[_Stage] = []
        temperature, step = 0.0, 0.5 * self.space.width**-0.25 * 2
        while temperature < 1:
            temperature = _next_temperature(cloud.log_lik[0], temperature)
            before = stages[-1].temperature if stages else 0.0
            log_w = (temperature - before) * cloud.log_lik
            root = _root(cloud.u[0], log_w[0].softmax(0))
            cloud = cloud.take(_systematic(log_w))
            accepted = 0.0
            for _ in range(self.settings.num_moves):
                cloud, accepted = self._move(cloud, temperature, root, step, seen)
                step *= math.exp(accepted - TARGET)
            stages.append(_Stage(temperature, root, step))
        return stages, cloud

    def _runs(self, stages: list[_Stage], n: int, seen: Tensor) -> tuple[Tensor, _Cloud]:
        """R independent runs along frozen stages: log Z (R,)."""
        cloud = self._prior(self.settings.num_runs, n, seen)
        log_z = cloud.log_lik.new_zeros(self.settings.num_runs)
        before = 0.0
        for stage in stages:
            log_w = (stage.temperature - before) * cloud.log_lik
            log_z = log_z + log_w.logsumexp(1) - math.log(n)
            cloud = cloud.take(_systematic(log_w))
            for _ in range(self.settings.num_moves):
                cloud, _ = self._move(cloud, stage.temperature, stage.root, stage.step, seen)
            before = stage.temperature
        return log_z, cloud

    def _posterior(self, shown: Tensor) -> _Cloud:
        """Particles given the shown tokens."""
        if not bool(shown.any()):
            return self._prior(1, self.settings.num_particles, shown)
        return self._pilot(self.settings.num_particles, shown)[1]

    def _reveal(self, x: Tensor, tokens: Tensor) -> Tensor:
        """log p(x_t | x_<t) of each token: particles reweighted token by token, moved when they degenerate."""
        n_runs, n = self.settings.num_runs, self.settings.num_particles
        shown = torch.zeros_like(x, dtype=torch.bool)
        cloud = self._prior(n_runs, n, shown)
        log_w = torch.zeros_like(cloud.log_lik)
        log_z = log_w.new_zeros(n_runs)
        out = torch.zeros_like(x)
        step = self.space.width**-0.25
        before = log_w.new_zeros(())
        for token in tokens:
            if bool(x[0, token].isnan()):
                continue
            shown = shown.clone()
            shown[0, token] = True
            log_lik = self._log_lik(cloud.u, shown)
            gain = log_lik - cloud.log_lik
            cloud = _Cloud(cloud.u, cloud.log_prior, log_lik, cloud.slope)
            total = log_z + (log_w + gain).logsumexp(1) - math.log(n)
            now = total.logsumexp(0) - math.log(n_runs)  # log of the mean of Z
            out[0, token], before = now - before, now
            log_w = log_w + gain
            share = log_w.softmax(1)
            if float((1 / share.square().sum(1)).min()) < KEEP * n:
                log_z = total
                root = _root(cloud.u.flatten(0, 1), share.flatten() / n_runs)
                cloud = self._evaluate(cloud.take(_systematic(log_w)).u, shown)
                log_w = torch.zeros_like(log_w)
                for _ in range(self.settings.num_moves):
                    cloud, accepted = self._move(cloud, 1.0, root, step, shown)
                    step *= math.exp(accepted - TARGET)
        return out

    def _prior(self, n_runs: int, n: int, seen: Tensor) -> _Cloud:
        assert self.model is not None
        if self.vectorised:
            with pyro.plate(NODES, n_runs * n, dim=-1 - self.structure.depth):
                trace = pyro.poutine.trace(self.model).get_trace(*self._filled)
            values = {name: trace.nodes[name]["value"] for name in self.space.names}
            u = self.space.pack_values(values, n_runs * n, 1)
        else:
            draws = [pyro.poutine.trace(self.model).get_trace(*self._filled) for _ in range(n_runs * n)]
            u = torch.cat([self.space.pack(d, 1) for d in draws])
        return self._evaluate(u.reshape(n_runs, n, -1).detach(), seen)

    def _move(
        self, cloud: _Cloud, temperature: float, root: Tensor, step: float, seen: Tensor
    ) -> tuple[_Cloud, float]:
        """Hamiltonian Monte Carlo in units of the particles' covariance root root'."""
        jitter = step * (0.8 + 0.4 * torch.rand(*cloud.log_lik.shape, 1, dtype=cloud.u.dtype).to(cloud.u))
        momentum = torch.randn(cloud.u.shape, dtype=cloud.u.dtype).to(cloud.u)  # in units of root^-T

        def slope(c: _Cloud) -> Tensor:
            """root' grad of the tempered log-density."""
            return (c.slope[0] + temperature * c.slope[1]).nan_to_num(0.0) @ root

        def energy(c: _Cloud, p: Tensor) -> Tensor:
            value = c.log_prior + temperature * c.log_lik - 0.5 * p.square().sum(-1)
            return torch.where(value.isnan(), -torch.inf, value)

        new, p = cloud, momentum
        for _ in range(LEAPS):
            p = p + 0.5 * jitter * slope(new)
            new = self._evaluate(new.u + jitter * (p @ root.mT), seen)
            p = p + 0.5 * jitter * slope(new)
        log_ratio = energy(new, p) - energy(cloud, momentum)
        accept = torch.rand(log_ratio.shape, dtype=log_ratio.dtype).to(log_ratio).log() < log_ratio
        rate = float(log_ratio.clamp(max=0).exp().nan_to_num(0.0).mean())
        pick = accept[..., None]
        return _Cloud(
            torch.where(pick, new.u, cloud.u),
            torch.where(accept, new.log_prior, cloud.log_prior),
            torch.where(accept, new.log_lik, cloud.log_lik),
            torch.where(pick, new.slope, cloud.slope),
        ), rate

    # --------------------------------------------------------------------------------------------------- the program

    def _evaluate(self, u: Tensor, seen: Tensor) -> _Cloud:
        """Densities and slopes at u (R, S, d)."""
        priors, liks, slopes = [], [], []
        with torch.enable_grad():
            for part in self._chunks(u.flatten(0, 1)):
                leaf = part.detach().requires_grad_()
                factors, log_det = self._factors_and_det(leaf)
                prior = factors.log_prior()[:, 0]
                lik = factors.log_joint(seen)[:, 0] - prior
                prior = prior + log_det
                pair = [
                    torch.autograd.grad(t.sum(), leaf, retain_graph=True, materialize_grads=True)[0]
                    if t.requires_grad
                    else torch.zeros_like(leaf)
                    for t in (prior, lik)
                ]
                priors.append(prior.detach())
                liks.append(lik.detach())
                slopes.append(torch.stack(pair))
        shape = u.shape[:2]
        lik = torch.cat(liks).reshape(shape)
        prior = torch.cat(priors).reshape(shape)
        bad = ~(torch.isfinite(lik) & torch.isfinite(prior))
        return _Cloud(
            u,
            torch.where(bad, -torch.inf, prior),
            torch.where(bad, -1e300, lik),
            torch.cat(slopes, 1).reshape(2, *u.shape),
        )

    def _log_lik(self, u: Tensor, seen: Tensor) -> Tensor:
        """log p(x_R | u) (R, S)."""
        parts = []
        for part in self._chunks(u.flatten(0, 1)):
            factors = self._factors(part)
            parts.append((factors.log_joint(seen) - factors.log_prior())[:, 0])
        return torch.cat(parts).reshape(u.shape[:2])

    def _predictive(self, u: Tensor, seen: Tensor) -> Tensor:
        return torch.cat([self._factors(part).predictive(seen)[:, 0] for part in self._chunks(u)])

    def _chunks(self, u: Tensor) -> tuple[Tensor, ...]:
        n = max(1, CELLS // max(1, self.structure.n_tokens)) if self.vectorised else 1
        return u.split(n)

    def _factors(self, u: Tensor) -> Factors:
        return self._factors_and_det(u)[0]

    def _factors_and_det(self, u: Tensor) -> tuple[Factors, Tensor]:
        assert self.model is not None
        values, log_det = self.space.values(u[:, None])
        return read_factors(self.model, self._filled, self.structure, values, len(u)), log_det[:, 0]


def _next_temperature(log_lik: Tensor, now: float) -> float:
    """The highest temperature that keeps a share of the particles effective, by bisection."""

    def ess(temperature: float) -> float:
        share = ((temperature - now) * log_lik).softmax(0)
        return float(1 / share.square().sum())

    if ess(1.0) >= KEEP * len(log_lik):
        return 1.0
    low, high = now, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if ess(middle) >= KEEP * len(log_lik) else (low, middle)
    return max(low, now + 1e-12)


def _systematic(log_w: Tensor) -> Tensor:
    """Systematic resampling of each run: (R, S) -> indices (R, S)."""
    n_runs, n = log_w.shape
    edges = log_w.softmax(1).cumsum(1)
    start = torch.rand(n_runs, 1, dtype=log_w.dtype).to(log_w)
    points = (start + torch.arange(n, device=log_w.device)) / n
    return torch.searchsorted(edges / edges[:, -1:], points).clamp(max=n - 1)


def _root(u: Tensor, share: Tensor) -> Tensor:
    """A lower factor of the weighted covariance of particles (S, d), drawn towards its diagonal."""
    mean = share @ u
    centred = u - mean
    cov = (share[:, None] * centred).mT @ centred
    variance = cov.diagonal().clamp(min=1e-12)
    ess = float(1 / share.square().sum())
    keep = ess / (ess + u.shape[1])
    cov = keep * cov + torch.diag((1 - keep) * variance + 1e-9 * variance)
    return torch.linalg.cholesky(cov)
