"""Sequential Monte Carlo from a t at the mode to a posterior on a slice, in islands: a pilot, and the run that counts.

Particles start from q, a multivariate t with 6 degrees of freedom in whitened coordinates, and follow q^(1-b) p^b as b
rises from 0 to 1: they are weighted, resampled within their island, and moved by Hamiltonian trajectories. Each island
gives an estimate Z_g of the integral of p.

A pilot chooses temperatures and step sizes by its own particles, which makes its estimates biased. They are then
frozen, and a run with fresh draws that decided nothing gives the number: its Z_g are unbiased and independent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, logsumexp

from bayes_mpt.evidence.slice import Slice
from bayes_mpt.predictors.nodes.resampling import effective, next_temperature

__all__ = ["Annealed", "Plan", "anneal", "resample"]

Array = NDArray[np.float64]

DEGREES = 6.0  # of freedom of the start
POOL = 16  # draws a particle at the start, of which those inside the slice are taken; K = 1: 4
CESS = 0.85  # share of the particles that stays effective from one temperature to the next
N_LEAPS = 5  # of the one trajectory at each temperature: temperatures nearer to each other are worth more than moves
ACCEPTANCE = 0.8  # that steps are adapted to
MAX_STEP = 1.2
MIN_RISE = 1e-4  # of a temperature


@dataclass
class Plan:
    """Temperatures and steps of an annealing; a pilot fills it."""

    temperatures: list[float] = field(default_factory=list)
    """From above 0 to 1."""
    steps: list[float] = field(default_factory=list)
    """Of the trajectory at each temperature."""


class Annealed(NamedTuple):
    """What an annealing found."""

    log_z: Array
    """(G,) of each island."""
    y: Array
    """(n, m) points of the posterior, as many of each island one after the other: those of one count alike."""
    plan: Plan
    variance: float
    """Of the log Z of an island, as the weights of all particles tell it: what it would be if moves forgot all."""
    acceptance: float
    """Mean over all trajectories."""


class _Particles:
    """Points with all that is known of them."""

    names = ("y", "log_p", "gauge", "force", "log_q", "force_q", "inside")

    def __init__(self, space: Slice, y: Array):
        read = space.read(y, _start_force)
        self.y, self.log_q, self.log_p, self.gauge = y, _log_start(y), read.log_density, read.log_gauge
        self.force, self.force_q, self.inside = read.force, read.start_force, read.inside

    def taken(self, index: NDArray[np.intp]) -> _Particles:
        new = object.__new__(_Particles)
        for name in self.names:
            setattr(new, name, getattr(self, name)[index])
        return new

    def put(self, where: NDArray[np.bool_], other: _Particles) -> None:
        """Take those of others, which are as many as there are True."""
        for name in self.names:
            getattr(self, name)[where] = getattr(other, name)

    @property
    def log_weight(self) -> Array:
        """log p / q (B,), -inf outside."""
        return np.where(
            self.inside, self.log_p + np.where(self.inside, self.gauge, 0.0) - self.log_q, -np.inf
        )

    def slope(self, b: float) -> Array:
        return (1 - b) * self.force_q + b * self.force

    def level(self, b: float) -> Array:
        """Log density of the path on the orbits, that is without the measure exp(gauge): (q / J)^(1 - b) p^b."""
        with np.errstate(invalid="ignore"):
            value = (1 - b) * (self.log_q - self.gauge) + b * self.log_p
        return np.where(self.inside, value, -np.inf)


def anneal(
    space: Slice,
    n_islands: int,
    n_each: int,
    rng: np.random.Generator,
    plan: Plan | None = None,
    cess: float | None = None,
) -> Annealed:
    """Islands of particles taken from the start to the posterior.

    Without a plan it is a pilot, which makes one: from one temperature to the next the share ``cess`` of the particles
    stays effective (`CESS` by default).
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return _anneal(space, n_islands, n_each, rng, plan, CESS if cess is None else cess)


def _anneal(
    space: Slice, n_islands: int, n_each: int, rng: np.random.Generator, plan: Plan | None, cess: float
) -> Annealed:
    pilot = plan is None
    plan = Plan() if plan is None else plan
    y, log_z = _start(space, n_islands, n_each, rng)
    now = _Particles(space, y)
    b, step, variance, accepted = 0.0, space.n_free**-0.25, 0.0, []
    for level in range(10_000):
        log_weight = np.where(np.isfinite(now.log_weight), now.log_weight, -1e300)
        new = next_temperature(b, log_weight, cess, MIN_RISE) if pilot else plan.temperatures[level]
        rise = (new - b) * log_weight
        variance += (1 / effective(rise) - 1) / n_each
        rise = rise.reshape(n_islands, -1)
        total = logsumexp(rise, axis=1)
        log_z += total - math.log(n_each)
        b = new
        if pilot:
            plan.temperatures.append(b)
            plan.steps.append(step)
        now = now.taken(resample(np.exp(rise - total[:, None]), rng))
        chance, inside = _move(space, now, b, plan.steps[level], rng)
        accepted.append(float(chance.mean()))
        if pilot and inside.any():  # an end outside says nothing of the step
            step = min(step * math.exp(chance[inside].mean() - ACCEPTANCE), MAX_STEP)
        if b == 1:
            break
    return Annealed(log_z, now.y, plan, variance, float(np.mean(accepted)))


def _start(space: Slice, n_islands: int, n_each: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Draws of q inside the slice, island by island, and the logarithm of the share (G,) of q that lies inside."""
    n_draws = n_each * (POOL if space.posterior.n_latents > 1 else 4)
    y, log_share = [], np.empty(n_islands)
    for island in range(n_islands):
        draws = rng.standard_normal((n_draws, space.n_free))
        draws /= np.sqrt(rng.chisquare(DEGREES, n_draws) / DEGREES)[:, None]
        inside = np.flatnonzero(space.contains(draws))
        log_share[island] = math.log(len(inside) / n_draws) if len(inside) else -1e300
        y.append(draws[np.resize(inside if len(inside) else np.arange(n_draws), n_each)])
    return np.concatenate(y), log_share


def _log_start(y: Array) -> Array:
    """Log density (B,) of the start at y (B, m)."""
    m = y.shape[1]
    constant = gammaln((DEGREES + m) / 2) - gammaln(DEGREES / 2) - 0.5 * m * math.log(DEGREES * math.pi)
    value: Array = constant - 0.5 * (DEGREES + m) * np.log1p(np.square(y).sum(1) / DEGREES)
    return value


def _start_force(y: Array) -> Array:
    """Its gradient (B, m)."""
    return -((DEGREES + y.shape[1]) / (DEGREES + np.square(y).sum(1)))[:, None] * y


def resample(weight: Array, rng: np.random.Generator) -> NDArray[np.intp]:
    """Systematic, within each row of weights (G, n) that add up to one: indices into all G n."""
    n_islands, n = weight.shape
    u = (rng.random((n_islands, 1)) + np.arange(n)) / n
    index = [np.minimum(np.searchsorted(np.cumsum(w), v), n - 1) for w, v in zip(weight, u, strict=True)]
    return np.concatenate([g * n + i for g, i in enumerate(index)])


def _move(
    space: Slice, now: _Particles, b: float, step: float, rng: np.random.Generator
) -> tuple[Array, NDArray[np.bool_]]:
    """One trajectory of every particle, in place: chances (B,) to accept, and which ends may say something of the step.

    The signs of weak columns are turned before and turned back afterwards. Densities are those at the points turned
    back, measures exp(gauge) those where the trajectory itself starts and ends.
    """
    momentum = rng.standard_normal(now.y.shape)
    length = step * rng.uniform(0.7, 1.3, (len(now.y), 1))
    kinetic = 0.5 * np.square(momentum).sum(1)
    y, slope, gauge = now.y.copy(), now.slope(b), now.gauge.copy()
    if space.n_weak:
        signs = rng.choice([-1.0, 1.0], (len(y), space.n_weak))
        y, moved = space.turned(y, signs)
        if moved.any():
            images = _Particles(space, y[moved])
            slope[moved], gauge[moved] = images.slope(b), images.gauge
    before = now.level(b) + gauge - kinetic
    momentum += 0.5 * length * slope
    for _ in range(N_LEAPS - 1):
        y += length * momentum
        force, force_q = space.forces(y, _start_force)
        momentum += length * ((1 - b) * force_q + b * force)
    y += length * momentum
    end = _Particles(space, y)
    momentum += 0.5 * length * end.slope(b)
    gauge = end.gauge.copy()
    allowed = np.isfinite(gauge)
    if space.n_weak:
        back, moved = space.turned(np.where(allowed[:, None], y, 0.0))
        moved &= allowed
        if moved.any():
            end.put(moved, _Particles(space, back[moved]))
    after = end.level(b) + gauge - 0.5 * np.square(momentum).sum(1)
    change = np.where(np.isfinite(after), after - before, -np.inf)
    chance = np.exp(np.minimum(change, 0.0))
    taken = rng.random(len(chance)) < chance
    now.put(taken, end.taken(np.flatnonzero(taken)))
    return chance, allowed
