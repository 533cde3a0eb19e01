"""Allocations of rows to components of a mixture, carried from where Gibbs chains have found them to their posterior.

With the parameters integrated, an allocation z of all rows has a known density p(z) p(rows | z). Its sum over all z is
the evidence. A chain m leaves shares r_ic, the probability that row i is in component c, and the mean sums over the
rows of each component, B. Between these and the posterior stand, for powers b from 0 to 1,

    prod_i r_i,z_i^(1 - b)  int p(parameters) L(B)^(1 - b) [p(z | weights) prod_i p(x_i | z_i, parameters)]^b,

L(B) the likelihood of rows with the sums B, so that the integral is known: it depends on (1 - b) B + b (sums of z). At
b = 0 allocations are independent, at b = 1 it is the density itself. Missing cells are drawn with the allocations, at
b = 0 given the others of their row under the component that B comes to; this density counts to the power 1 - b.

Chains begin with K, K - 1, ..., 1 clusters: where a component is empty, no Gibbs step soon fills it, nor empties one
that holds rows.

**Exchanged components, several modes.** The density of z is the same for all K! orders s of the components, and a
chain has found one of them; another chain may have found other clusters. Each takes in the share of an allocation that
is its own. With q_m(z) = prod_i r_i,z_i, these add up to one:

    Z = sum_m K! sum_z p(z, rows) g_m(z),    g_m(z) = q_m(z) / sum_m' sum_s q_m'(s z)

which holds whether components are apart (g is 1 near the chain), overlap, or are exchanged all the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, logsumexp, softmax

from bayes_mpt.evidence.annealing import resample
from bayes_mpt.evidence.components import Block, Components, Step, Sums

__all__ = ["Allocated", "Chains", "Path", "allocate", "chains_of", "log_sum_of_orders"]

Array = NDArray[np.float64]
Index = NDArray[np.intp]

N_BURNED, N_KEPT = 60, 30  # Gibbs steps of a chain
MIN_SHARE = 0.01
FLAT = 0.2  # power of what the chains' bounds say of them
NEAR = 3.0  # nats
MIN_CHANCE = 0.01  # of a chain that particles start from
MIN_EFFECTIVE = 0.6  # share of the particles of an island
FIRST_POWER, MAX_RISE, MIN_RISE = 0.05, 0.25, 1e-4


@dataclass(frozen=True, eq=False)
class Chains:
    """What M of them have found."""

    sums: Sums
    """B."""
    log_share: Array
    """(M, K, N) log r."""
    chance: Array
    """(M,) that a particle starts there."""
    offset: Array
    """(M,) nats that are taken back on the path."""
    n_agreeing: int
    """How many of all chains come within `NEAR` of the best."""


@dataclass
class Path:
    """What a pilot decides, and the run that counts keeps."""

    powers: list[float] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Allocated:
    """All rows."""

    log_z: Array
    """(G,) of each island."""
    sums: Sums
    """Of the particles, islands one after the other, all of one island with equal weights."""
    path: Path
    variance: float
    """Of the log mean weights of an island, told from the weights."""


def chains_of(rows: Array, blocks: list[Block], empty: Components, rng: np.random.Generator) -> Chains:
    """Chains from clusters.

    Parameters
    ----------
    rows : array of shape (N, T)
        In the units of the components.
    blocks : list of Block
        The same rows.
    empty : Components
        As many as chains.
    """
    n_chains, k = empty.nothing().n.shape
    share = np.stack([_clusters(rows, k - m % k, k, rng) for m in range(n_chains)])  # (M, K, N)
    # the clusters themselves, missing cells from the table
    clusters = _log(share, 1e-9)
    now = empty.of(empty.nothing())
    sums = now.redrawn(blocks, rng, Step(0.0, lambda i: clusters[:, :, i], reference=now))
    for _ in range(N_BURNED):
        sums = empty.of(sums).redrawn(blocks, rng, Step())
    share, kept = np.zeros_like(share), []

    def watch(rows: Index, probability: Array, one_hot: Array) -> None:
        share[:, :, rows] += probability / N_KEPT

    for _ in range(N_KEPT):
        kept.append(sums)
        sums = empty.of(sums).redrawn(blocks, rng, Step(watch=watch))
    mean = kept[0].map(*kept[1:], by=lambda *arrays: np.mean(arrays, axis=0))
    log_share = _log(share, MIN_SHARE)
    marginal = empty.of(mean).log_marginal()
    bound = marginal - (np.exp(log_share) * log_share).sum((1, 2))
    n_agreeing = int((bound > bound.max() - NEAR).sum())
    chance = softmax(FLAT * bound)
    used = np.flatnonzero(chance > MIN_CHANCE)
    chance = chance[used] / chance[used].sum()
    return Chains(
        mean.map(by=lambda a: a[used]), log_share[used], chance, (FLAT * bound - marginal)[used], n_agreeing
    )


def _clusters(rows: Array, n_clusters: int, n_components: int, rng: np.random.Generator) -> Array:
    """One-hot (K, N) by k-means from a random start."""
    from sklearn.cluster import KMeans  # slow to import

    found = (
        KMeans(min(n_clusters, len(rows)), n_init=1, random_state=int(rng.integers(2**31)))
        .fit(np.nan_to_num(rows))
        .labels_
    )
    return (found == np.arange(n_components)[:, None]).astype(float)


def _log(share: Array, least: float) -> Array:
    """Log (M, K, N), none of them zero."""
    return np.log((1 - least) * share + least / share.shape[1])


def allocate(
    blocks: list[Block],
    empty: Components,
    chains: Chains,
    n_islands: int,
    rng: np.random.Generator,
    path: Path | None = None,
) -> Allocated:
    """Islands of particles taken from their chains to the posterior; without a path a pilot, which makes one.

    Parameters
    ----------
    blocks : list of Block
        The rows.
    empty : Components
        As many as particles.
    chains : Chains
        Where they start.
    n_islands : int
        G.
    """
    plan = Path() if path is None else path
    now, log_weight = _start(blocks, empty, chains, n_islands, rng)
    n_particles, k = now.sums.n.shape
    b, rise, level, log_z, variance = 0.0, FIRST_POWER, 0, np.zeros(n_islands), 0.0
    while b < 1:
        if path is None:
            new, change = _risen(now, empty, chains, b, rise, log_weight, n_islands)
            plan.powers.append(new)
        else:
            new = path.powers[level]
            change = now.change(empty, chains, b, new)
        log_weight = (log_weight + change).reshape(n_islands, -1)
        effective = _effective(log_weight)
        variance += (1 / effective - 1) * n_islands / n_particles
        # 1 / effective - 1 is about the variance, which goes with the square of the rise
        ratio = (1 / MIN_EFFECTIVE - 1) / max(1 / effective - 1, 1e-9)
        rise = min((new - b) * min(4.0, math.sqrt(ratio)), MAX_RISE)
        index, gain = _chosen(log_weight, rng)
        log_z += gain
        log_weight, b, level = np.zeros(n_particles), new, level + 1
        now = now.taken(index)
        now.move(blocks, empty, chains, b, rng)
    log_share = now.log_share(chains).reshape(n_islands, -1)
    variance += (1 / _effective(log_share) - 1) * n_islands / n_particles
    index, gain = _chosen(log_share, rng)
    return Allocated(log_z + gain + gammaln(k + 1), now.taken(index).sums, plan, variance)


@dataclass(eq=False)
class _Particles:
    """On their way."""

    origin: Index
    """(P,) the chain that each started from."""
    base: Sums
    """Its B."""
    sums: Sums
    guided: Array
    """(P,) log q of the allocations."""
    agreement: Array | None = None
    """(P, M, K, K) at the end: of the rows in each component log shares of each component of each chain, added up."""

    def taken(self, index: Index) -> _Particles:
        agreement = None if self.agreement is None else self.agreement[index]
        base, sums = (s.map(by=lambda a: a[index]) for s in (self.base, self.sums))
        return _Particles(self.origin[index], base, sums, self.guided[index], agreement)

    def between(self, b: float) -> Sums:
        """(1 - b) B + b (sums of z)."""
        return self.base.map(self.sums, by=lambda start, end: (1 - b) * start + b * end)

    def change(self, empty: Components, chains: Chains, b: float, new: float) -> Array:
        """(P,) log ratio of the densities at two powers."""
        before, after = (empty.of(self.between(power)).log_marginal() for power in (b, new))
        return after - before - (new - b) * (self.guided + self.sums.log_hidden + chains.offset[self.origin])

    def move(
        self, blocks: list[Block], empty: Components, chains: Chains, b: float, rng: np.random.Generator
    ) -> None:
        """A Gibbs step at the power b, in place."""
        (n_particles, k), m = self.sums.n.shape, len(chains.chance)
        guided, agreement = np.zeros(n_particles), np.zeros((n_particles, m, k, k)) if b == 1 else None

        def pull(rows: Index) -> Array:
            return (1 - b) * chains.log_share[:, :, rows][self.origin]

        def watch(rows: Index, probability: Array, one_hot: Array) -> None:
            log_share = chains.log_share[:, :, rows]
            if agreement is None:
                guided[:] += np.einsum("pkn,pkn->p", one_hot, log_share[self.origin])
            else:
                product = one_hot.reshape(n_particles * k, -1) @ log_share.reshape(m * k, -1).T
                agreement[:] += product.reshape(n_particles, k, m, k).transpose(0, 2, 1, 3)

        step = Step(b, pull if b < 1 else None, watch, empty.of(chains.sums), self.origin)
        self.sums = empty.of(self.between(b)).redrawn(blocks, rng, step)
        self.guided, self.agreement = guided, agreement

    def log_share(self, chains: Chains) -> Array:
        """log g (P,)."""
        assert self.agreement is not None
        own = self.agreement[np.arange(len(self.origin)), self.origin]
        return np.trace(own, axis1=1, axis2=2) - logsumexp(log_sum_of_orders(self.agreement), axis=1)


def _start(
    blocks: list[Block], empty: Components, chains: Chains, n_islands: int, rng: np.random.Generator
) -> tuple[_Particles, Array]:
    """Particles at b = 0, and their log weights (P,)."""
    n_particles = len(empty.nothing().n)
    origin = _origins(chains.chance, n_islands, n_particles // n_islands, rng)
    base = chains.sums.map(by=lambda a: a[origin])
    now = _Particles(origin, base, base, np.zeros(n_particles))
    now.move(blocks, empty, chains, 0.0, rng)
    return now, empty.of(base).log_marginal() + (chains.offset - np.log(chains.chance))[origin]


def _risen(
    now: _Particles,
    empty: Components,
    chains: Chains,
    b: float,
    rise: float,
    log_weight: Array,
    n_islands: int,
) -> tuple[float, Array]:
    """The next power, at which enough particles count, and what it adds to their log weights (P,)."""
    while True:
        new = min(1.0, b + rise)
        change = now.change(empty, chains, b, new)
        effective = _effective((log_weight + change).reshape(n_islands, -1))
        if effective > 0.8 * MIN_EFFECTIVE or rise < MIN_RISE:
            return new, change
        rise = (new - b) / 2


def _origins(chance: Array, n_islands: int, n_each: int, rng: np.random.Generator) -> Index:
    """From which chain each particle starts."""
    u = (rng.random((n_islands, 1)) + np.arange(n_each)) / n_each
    return np.minimum(np.searchsorted(np.cumsum(chance), u.ravel()), len(chance) - 1)


def log_sum_of_orders(agreement: Array) -> Array:
    """log sum_s exp sum_c a[c, s(c)] (...) over all K! orders s, of a (..., K, K).

    Over sets: of the first components those that they may be exchanged for.
    """
    k = agreement.shape[-1]
    total = np.full((2**k, *agreement.shape[:-2]), -np.inf)
    total[0] = 0.0
    sets = np.arange(2**k)
    size = (sets[:, None] >> np.arange(k) & 1).sum(1)
    for c in range(k):
        for other in range(k):
            free = sets[(size == c) & (sets >> other & 1 == 0)]
            into = free | (1 << other)
            total[into] = np.logaddexp(total[into], total[free] + agreement[..., c, other])
    return total[-1]


def _chosen(log_weight: Array, rng: np.random.Generator) -> tuple[Index, Array]:
    """Which particles (G n,) go on, by weights (G, n), and the log mean weight (G,) of each island."""
    total = logsumexp(log_weight, axis=1)
    return resample(np.exp(log_weight - total[:, None]), rng), total - math.log(log_weight.shape[1])


def _effective(log_weight: Array) -> float:
    """Share (G, n) of the particles of an island that counts, of all islands the mean."""
    w = np.exp(log_weight - log_weight.max(1, keepdims=True))
    return float((w.sum(1) ** 2 / np.square(w).sum(1)).mean() / w.shape[1])
