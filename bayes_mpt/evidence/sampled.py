"""Evidence of a factor model with loadings, noise variances and mean integrated, and an error bar that can be believed.

    Z = int p(rows | W, psi, mu) p(W, psi, mu) dW dpsi dmu

under the stated prior of `factor_prior`: on the Procrustes slice (`slice`), by annealing (`annealing`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, logsumexp

from bayes_mpt.diagnostics import few_replicates, log_mean
from bayes_mpt.evidence.annealing import Annealed, anneal
from bayes_mpt.evidence.draws import FactorDraws
from bayes_mpt.evidence.factor_posterior import CompletePosterior, FactorPosterior
from bayes_mpt.evidence.factor_prior import FactorPrior
from bayes_mpt.evidence.incomplete_posterior import IncompletePosterior
from bayes_mpt.evidence.no_latents import Cells, independent_columns
from bayes_mpt.evidence.slice import Slice, climb
from bayes_mpt.evidence.surplus import fitted, has_surplus, other_modes
from bayes_mpt.predictors.gaussian.profile import Factors, Prior, diagonal, proportional
from bayes_mpt.program.statistics import Covariance, SufficientStatistics

__all__ = [
    "MAX_PARAMETERS",
    "SampledEvidence",
    "n_parameters",
    "sample_evidence",
]

Array = NDArray[np.float64]

MAX_PARAMETERS = 600
PILOT = 16  # particles of an island
SURPLUS_PARTICLES = 32  # of an island, at least
SURPLUS_CESS = 0.93  # temperatures nearer to each other
MIN_LOADING = 0.05  # of a column at the start of a climb
N_EM = 2
N_DRAWS = 256  # of the noise variances, without latents
LARGE_SE = 0.3  # nats
MIN_EFFECTIVE = 0.1  # share of the particles that must count under another scale


@dataclass(frozen=True, eq=False)
class SampledEvidence:
    """An evidence with an error bar, and the posterior that it was computed with."""

    log_evidence: float
    """Nats, of all rows, the mean integrated."""
    se: float
    """Nats: plus and minus two of them hold the truth in 95 % (t factor of the islands included)."""
    islands: Array
    """(G,) log Z of each."""
    n_particles: int
    """Of the run that counts, all islands together."""
    n_levels: int
    """Temperatures."""
    prior: FactorPrior
    scale_sensitivity: tuple[float, float]
    """Change of ``log_evidence`` with the prior's scale of the loadings halved, and doubled; NaN: cannot be told."""
    draws: FactorDraws
    flags: tuple[str, ...]
    """What to doubt, in words."""

    @property
    def covariance(self) -> Array:
        """(T, T) posterior mean of psi + W W'."""
        return self.draws.covariance(self.islands)

    @property
    def mean(self) -> Array:
        """(T,) posterior mean of mu."""
        return self.draws.mean(self.islands)


def n_parameters(n_tokens: int, n_latents: int, shape: Array | None, complete: bool = True) -> int:
    """Dimension of the integral: loadings up to rotation, noise variances, and with holes the mean."""
    rotations = n_latents * (n_latents - 1) // 2
    n_noise = n_tokens if shape is None else 1
    return n_tokens * n_latents - rotations + n_noise + (0 if complete else n_tokens)


def sample_evidence(
    statistics: SufficientStatistics,
    n_latents: int,
    prior: FactorPrior,
    *,
    shape: Array | None = None,
    se: float = 0.1,
    max_particles: int = 1024,
    n_islands: int = 16,
    seed: int = 0,
) -> SampledEvidence:
    """Evidence of the observed cells of rows, with its error.

    Where cells are missing it is right if they are missing at random given the observed ones; holes that depend on
    the value that would have stood there it does not see.

    Parameters
    ----------
    statistics : SufficientStatistics
        Of the rows (N, T): `bayes_mpt.program.statistics.SufficientStatistics`.
    n_latents : int
        K < T.
    prior : FactorPrior
        The same for all candidates of a table.
    shape : array of shape (T,), optional
        Known ratios of the noise variances (PPCA: ones); by default each token has a noise variance of its own.
    se : float, default=0.1
        Nats: the standard error that is sampled for.
    max_particles : int, default=1024
        Of the run that counts.
    n_islands : int, default=16
        Independent runs, from which the error is told.
    seed : int, default=0
        Same seed, same bits.

    Raises
    ------
    ValueError
        If there are more than `MAX_PARAMETERS` parameters, as many latents as columns, a constant column, or latents
        that reproduce the rows without noise.

    Examples
    --------
    >>> from bayes_mpt.evidence import factor_prior
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(200, 4)) * [3.0, 1.0, 1.0, 1.0]
    >>> table, prior = SufficientStatistics(x), factor_prior(x)
    >>> found = [sample_evidence(table, k, prior, shape=np.ones(4)) for k in range(3)]
    >>> int(np.argmax([f.log_evidence for f in found])), found[0].se, found[1].se < 0.2
    (1, 0.0, True)
    """
    complete = statistics.complete
    _check(n_latents, prior, shape, complete)
    if not n_latents:
        cells = Cells(*(a.cpu().double().numpy() for a in statistics.of_cells()))
        return _without_latents(cells, prior, shape, n_islands, seed)
    pairs = statistics if complete else statistics.available()
    mean, rest = pairs.mean.cpu().numpy(), np.zeros(0)
    posterior: FactorPosterior
    if complete:
        dense = pairs.covariance.dense()
        _refuse_low_rank(dense, n_latents)
        posterior = CompletePosterior(dense, mean, statistics.n, n_latents, prior, shape)
    else:
        posterior = IncompletePosterior(statistics, n_latents, prior, shape)
        rest = (mean - prior.center) / np.sqrt(posterior.units)
    factors = _factors(pairs.covariance, pairs.n, n_latents, prior, shape)
    spaces = _starts(posterior, factors, rest, pairs.covariance)
    return _sampled(spaces, se, max_particles, n_islands, seed)


def _refuse_low_rank(cov: Array, n_latents: int) -> None:
    sd = np.sqrt(np.diag(cov))
    sd = np.where(sd > 0, sd, 1.0)  # a constant column adds nothing to the rank
    rank = int(np.linalg.matrix_rank(cov / sd / sd[:, None], hermitian=True))
    if rank <= n_latents:
        raise ValueError(
            f"{n_latents} latents reproduce rows of rank {rank} (n_features = {len(cov)}) without noise, so that their "
            "likelihood has no bound: use fewer latents"
        )


def _check(n_latents: int, prior: FactorPrior, shape: Array | None, complete: bool) -> None:
    """Refuse what has no finite evidence, and what is too large to be sampled."""
    constant = np.flatnonzero(~(prior.units(shape) > 0))
    if len(constant):
        raise ValueError(
            f"the integrated evidence needs columns that vary, got constant ones at {constant.tolist()}: drop them"
        )
    n_tokens = len(prior.variances)
    if n_latents >= n_tokens:
        raise ValueError(
            f"the integrated evidence needs fewer latents than columns, got {n_latents} latents and n_features = "
            f"{n_tokens}: use fewer latents"
        )
    n_free = n_parameters(n_tokens, n_latents, shape, complete)
    if n_free > MAX_PARAMETERS:
        raise ValueError(
            f"the integrated evidence samples up to {MAX_PARAMETERS} parameters: {n_latents} latents of {n_tokens} "
            f"columns have {n_free}. Use evidence='laplace', or fewer latents"
        )


def _factors(
    cov: Covariance, n_rows: int, n_latents: int, prior: FactorPrior, shape: Array | None
) -> Factors:
    """Where the climb starts: the maximum of the likelihood, or with free noises of the posterior of these."""
    if shape is not None:
        return proportional(cov, n_latents, shape)
    a = prior.noise_shape
    return diagonal(cov, n_latents, prior=Prior(a, a / prior.variances, n_rows))


def _starts(posterior: FactorPosterior, factors: Factors, rest: Array, cov: Covariance) -> list[Slice]:
    """Slices through the maximum under normal loadings, whose variance is found by two steps of EM, and its like.

    The variance is no coordinate of the climb: its joint mode with the loadings is at zero.
    """
    v = factors.vectors * np.maximum(np.sqrt(factors.spectrum - 1), MIN_LOADING)
    log_share = np.log(factors.noise / posterior.units)
    theta = np.concatenate([v.ravel(), log_share[: posterior.n_noise], rest])
    tau2 = float((v**2 * np.exp(log_share)[:, None]).mean())
    for _ in range(N_EM):
        space = climb(posterior.with_prior(posterior.prior.normal(tau2)), theta)
        theta = space.center
        mean, e = posterior.split(theta[None])
        spread = np.square(space.basis[: posterior.n_loadings]).sum(1).reshape(mean[0].shape)
        tau2 = float(((mean[0] ** 2 + spread) * np.exp(e[0])[:, None]).mean())
    spaces = [climb(posterior.with_prior(posterior.prior.normal(tau2)), theta)]
    if has_surplus(spaces[0]):
        posterior = posterior.anchored(spaces[0].center)
        spaces = [climb(posterior.with_prior(posterior.prior.normal(tau2)), spaces[0].center)]
        root = np.sqrt(posterior.units)
        spaces += other_modes(spaces[0], cov.dense() / root / root[:, None])
    return [replace(space, posterior=posterior).widened() for space in spaces]


def _without_latents(
    cells: Cells, prior: FactorPrior, shape: Array | None, n_islands: int, seed: int
) -> SampledEvidence:
    """The integral in closed form, and draws from it."""
    value, e, weight = independent_columns(cells, prior, shape)
    if not math.isfinite(value):
        raise ValueError("the evidence of columns without any variation is infinite: drop constant columns")
    rng = np.random.default_rng(seed)
    u = rng.random((len(e), N_DRAWS))
    index = np.array(
        [np.minimum(np.searchsorted(np.cumsum(w), v), len(w) - 1) for w, v in zip(weight, u, strict=True)]
    )
    units = prior.units(shape)
    noise = (units[:, None] * np.exp(np.take_along_axis(e, index, 1))).T  # (S, T)
    held = prior.kappa + cells.n  # rows
    center = (prior.kappa * prior.center + cells.n * cells.mean) / held
    islands = np.full(n_islands, value)
    empty = np.zeros((N_DRAWS, len(units), 0))
    draws = FactorDraws.of(empty, noise, np.tile(center, (N_DRAWS, 1)), 1 / held, islands)
    noise = units * (weight * np.exp(e)).sum(1)  # what the draws come to, known exactly
    exact = np.broadcast_to(np.diag(noise), draws.island_covariances.shape)
    spread = np.broadcast_to(np.diag(noise / held), exact.shape)
    draws = replace(draws, mean_noise=noise, island_covariances=exact, island_mean_covariances=spread)
    return SampledEvidence(value, 0.0, islands, 0, 0, prior, (0.0, 0.0), draws, ())


def _sampled(
    spaces: list[Slice], se: float, max_particles: int, n_islands: int, seed: int
) -> SampledEvidence:
    first, second = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
    pilots = [anneal(space, n_islands, PILOT, first) for space in spaces]
    space, pilot, least = spaces[0], pilots[0], PILOT
    most = max(PILOT, max_particles // n_islands)
    if has_surplus(space):
        space, least = fitted(spaces, pilots), min(SURPLUS_PARTICLES, most)
        pilot = anneal(space, n_islands, PILOT, first, cess=SURPLUS_CESS)
    # of few islands no less than what the weights tell
    variance = max(float(pilot.log_z.var(ddof=1)), pilot.variance)
    wanted = PILOT * variance / n_islands * (few_replicates(n_islands) / se) ** 2
    n_each = int(np.clip(math.ceil(min(wanted, 1e6)), least, most))
    found = anneal(space, n_islands, n_each, second, pilot.plan)
    return _summary(space, found, n_each * n_islands)


def _summary(space: Slice, found: Annealed, n_particles: int) -> SampledEvidence:
    posterior = space.posterior
    theta = space.theta(found.y)
    v, e = posterior.split(theta)
    root = np.sqrt(posterior.units * np.exp(e))  # (S, T)
    loadings, noise = root[:, :, None] * v, root**2
    value, error = log_mean(found.log_z)
    prior = posterior.prior
    q = (np.square(v) * np.exp(e)[:, :, None]).sum((1, 2)) / prior.scale**2

    log_weight = np.repeat(log_softmax(found.log_z), len(v) // len(found.log_z))
    log_weight -= logsumexp(log_weight)

    def moved(factor: float) -> float:
        return _moved(prior.log_ratio(prior.scaled(factor), q, v[0].size), log_weight)

    return SampledEvidence(
        value,
        error,
        found.log_z,
        n_particles,
        len(found.plan.temperatures),
        prior,
        (moved(0.5), moved(2.0)),
        FactorDraws.of(loadings, noise, *posterior.means(theta), found.log_z),
        _flags(posterior, error),
    )


def _moved(log_ratio: Array, log_weight: Array) -> float:
    """Log mean ratio of two priors over weighted posterior draws; NaN where few of them count."""
    w = log_ratio + log_weight
    total = logsumexp(w)
    effective = math.exp(2 * total - logsumexp(2 * w))
    return float(total) if effective > MIN_EFFECTIVE * len(w) else math.nan


def _flags(posterior: FactorPosterior, se: float) -> tuple[str, ...]:
    flags = []
    t, k = posterior.n_tokens, posterior.n_latents
    if posterior.shape is None and (t - k) ** 2 <= t + k and posterior.n_rows <= 2 * t:
        flags.append(f"{k} latents are more than a covariance of {t} columns determines, and rows are few")
    elif posterior.shape is None and (t - k) ** 2 < t + k:
        flags.append(f"{k} latents are more than a covariance of {t} columns determines: modes may be missed")
    if se > LARGE_SE:
        flags.append(f"se above {LARGE_SE:g}: reads too small")
    return tuple(flags)
