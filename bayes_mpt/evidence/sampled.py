"""Evidence of a factor model with loadings, noise variances and mean integrated, and an error bar that can be believed.

    Z = int p(rows | W, psi, mu) p(W, psi, mu) dW dpsi dmu

under the stated prior of `factor_prior`: on the Procrustes slice (`slice`), by annealing (`annealing`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp
from scipy.stats import t as student

from bayes_mpt.evidence.annealing import Annealed, anneal
from bayes_mpt.evidence.factor_posterior import CompletePosterior, FactorPosterior
from bayes_mpt.evidence.factor_prior import FactorPrior
from bayes_mpt.evidence.slice import Slice, climb
from bayes_mpt.predictors.gaussian.profile import Factors, Prior, diagonal, proportional
from bayes_mpt.program.statistics import Covariance

__all__ = ["MAX_PARAMETERS", "SampledEvidence", "n_parameters", "sample_evidence"]

Array = NDArray[np.float64]

MAX_PARAMETERS = 600
PILOT = 16  # particles of an island
SAFETY = 1.3  # on the pilot's error, which is itself uncertain
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
    covariance: Array
    """(T, T) posterior mean of psi + W W'."""
    loadings: Array
    """(T, K) posterior mean of W, each draw turned into the slice."""
    noise: Array
    """(T,) posterior mean of psi."""
    loadings_draws: Array
    """(S, T, K) equally weighted draws."""
    noise_draws: Array
    """(S, T)"""
    flags: tuple[str, ...]
    """What to doubt, in words."""


def n_parameters(n_tokens: int, n_latents: int, shape: Array | None, complete: bool = True) -> int:
    """Dimension of the integral: loadings up to rotation, noise variances, and with holes the mean."""
    rotations = n_latents * (n_latents - 1) // 2
    n_noise = n_tokens if shape is None else 1
    return n_tokens * n_latents - rotations + n_noise + (0 if complete else n_tokens)


def sample_evidence(
    cov: Array | Covariance,
    mean: Array,
    n_rows: int,
    n_latents: int,
    prior: FactorPrior,
    *,
    shape: Array | None = None,
    se: float = 0.1,
    max_particles: int = 1024,
    n_islands: int = 8,
    seed: int = 0,
) -> SampledEvidence:
    """Evidence of complete rows, with its error.

    Parameters
    ----------
    cov : array of shape (T, T), or bayes_mpt.program.statistics.Covariance
        Covariance of the rows, divided by N.
    mean : array of shape (T,)
        Of the rows.
    n_rows : int
        N.
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
    n_islands : int, default=8
        Independent runs, from which the error is told.
    seed : int, default=0
        Same seed, same bits.
    """
    cov = Covariance(cov) if isinstance(cov, np.ndarray) else cov
    n_free = n_parameters(len(mean), n_latents, shape)
    if n_free > MAX_PARAMETERS:
        raise ValueError(
            f"the integrated evidence samples up to {MAX_PARAMETERS} parameters: {n_latents} latents of {len(mean)} "
            f"columns have {n_free}. Use evidence='laplace'"
        )
    posterior = CompletePosterior(cov.dense(), np.asarray(mean, float), n_rows, n_latents, prior, shape)
    if shape is None:
        a = prior.noise_shape
        factors = diagonal(cov, n_latents, prior=Prior(a, a / prior.variances, n_rows))
    else:
        factors = proportional(cov, n_latents, shape)
    space = started(posterior, factors)
    return _sampled(space, se, max_particles, n_islands, seed)


def started(posterior: FactorPosterior, factors: Factors) -> Slice:
    """The slice through the maximum under normal loadings, whose variance is found by two steps of EM."""
    t, k = posterior.n_tokens, posterior.n_latents
    v = factors.vectors * np.maximum(np.sqrt(factors.spectrum - 1), 0.05)
    log_share = np.log(factors.noise / posterior.units)[: posterior.n_noise]
    theta = np.concatenate([v.ravel(), log_share])
    share = np.exp(log_share) * np.ones(t)
    tau2 = float((v**2 * share[:, None]).mean())
    prior = posterior.prior
    for last in (False, False, True):
        space = climb(posterior.with_prior(prior.normal(tau2)), theta)
        theta = space.center
        if last:
            break
        mean, e = posterior.split(theta[None])
        second = mean[0] ** 2 + np.square(space.basis[: t * k]).sum(1).reshape(t, k)
        tau2 = float((second * np.exp(e[0])[:, None]).mean())
    return replace(space, posterior=posterior)


def _sampled(space: Slice, se: float, max_particles: int, n_islands: int, seed: int) -> SampledEvidence:
    first, second = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
    pilot = anneal(space, n_islands, PILOT, first)
    wanted = PILOT * (SAFETY * error_of(pilot.log_z) / se) ** 2
    n_each = int(np.clip(math.ceil(min(wanted, 1e6)), PILOT, max(PILOT, max_particles // n_islands)))
    found = anneal(space, n_islands, n_each, second, pilot.plan)
    return _summary(space, found, n_each * n_islands)


def error_of(log_z: Array) -> float:
    """Standard error of log mean Z over islands (G,), such that two of it hold the truth as two of a normal do."""
    z = np.exp(log_z - log_z.max())
    raw = z.std(ddof=1) / z.mean() / math.sqrt(len(z))
    return float(raw * student.ppf(0.97725, len(z) - 1) / 2)


def _summary(space: Slice, found: Annealed, n_particles: int) -> SampledEvidence:
    posterior = space.posterior
    v, e = posterior.split(space.theta(found.y))
    root = np.sqrt(posterior.units * np.exp(e))  # (S, T)
    loadings, noise = root[:, :, None] * v, root**2
    flat = loadings.transpose(1, 0, 2).reshape(posterior.n_tokens, -1)
    covariance = flat @ flat.T / len(v) + np.diag(noise.mean(0))
    error = error_of(found.log_z)
    value = float(logsumexp(found.log_z) - math.log(len(found.log_z)))
    prior = posterior.prior
    q = (np.square(v) * np.exp(e)[:, :, None]).sum((1, 2)) / prior.scale**2

    def moved(factor: float) -> float:
        return _moved(prior.log_ratio(prior.scaled(factor), q, v[0].size))

    return SampledEvidence(
        value,
        error,
        found.log_z,
        n_particles,
        len(found.plan.temperatures),
        prior,
        (moved(0.5), moved(2.0)),
        covariance,
        loadings.mean(0),
        noise.mean(0),
        loadings,
        noise,
        _flags(posterior, error),
    )


def _moved(log_ratio: Array) -> float:
    """Log mean ratio of two priors over posterior draws; NaN where few of them count."""
    total = logsumexp(log_ratio)
    effective = math.exp(2 * total - logsumexp(2 * log_ratio))
    return float(total - math.log(len(log_ratio))) if effective > MIN_EFFECTIVE * len(log_ratio) else math.nan


def _flags(posterior: FactorPosterior, se: float) -> tuple[str, ...]:
    flags = []
    t, k = posterior.n_tokens, posterior.n_latents
    if posterior.shape is None and (t - k) ** 2 <= t + k and posterior.n_rows <= 2 * t:
        flags.append(f"{k} latents are more than a covariance of {t} columns determines, and rows are few")
    if se > LARGE_SE:
        flags.append(f"se above {LARGE_SE:g}: reads too small")
    return tuple(flags)
