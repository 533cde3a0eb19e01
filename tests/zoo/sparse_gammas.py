"""The evidence of the zoo's deep exponential family by numpy and scipy alone: `python tests/zoo/sparse_gammas.py`.

Rows have closed forms but for one integral (`truths.sparse_gamma_rows`). Over the eight logarithms w that they share
particles go from the prior to the posterior by tempering and Metropolis moves, six times; then a mixture of Student-t
around their particles is drawn from, whose weights p / q have an unbiased mean. Both take minutes, and agree.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from scipy.special import gammaln, logsumexp
from scipy.stats import multivariate_t

sys.path.insert(0, str(Path(__file__).parents[1]))
from truths import sparse_gamma_rows
from zoo.case import Array

D = 8
N_CENTRES = 150


def log_likelihood(x: Array, w: Array) -> Array:
    """(M,) log p(x | w) at w (M, 8)."""
    parts = [
        sparse_gamma_rows(x, p[:, :2], p[:, 2:].reshape(-1, 2, 3)) for p in np.array_split(w, len(w) // 50)
    ]
    return np.concatenate(parts).sum(1)


def log_prior(w: Array) -> Array:
    """(M,) eight logarithms of Gamma(1/2, 1/2)."""
    return (0.5 * np.log(0.5) - gammaln(0.5) + 0.5 * w - 0.5 * np.exp(w)).sum(1)


def particles(x: Array, seed: int, n: int = 1000) -> tuple[float, Array]:
    """log Z, and particles (n, 8) of the posterior."""
    rng = np.random.default_rng(seed)
    w = np.log(rng.gamma(0.5, 2.0, size=(n, D)).clip(min=1e-80))
    log_p, temperature, log_z = log_likelihood(x, w), 0.0, 0.0

    def effective(step: float) -> float:
        share = np.exp(step * log_p - logsumexp(step * log_p))
        return 1 / (share**2).sum() / n

    while temperature < 1:
        low, high = 0.0, 1 - temperature
        for _ in range(40 if effective(high) < 0.85 else 0):
            middle = (low + high) / 2
            low, high = (middle, high) if effective(middle) > 0.85 else (low, middle)
        step = low or high
        log_z += logsumexp(step * log_p) - np.log(n)
        share = np.exp(step * log_p - logsumexp(step * log_p))
        index = np.searchsorted(share.cumsum(), (np.arange(n) + rng.random()) / n).clip(max=n - 1)
        w, log_p, temperature = w[index], log_p[index], temperature + step
        for move in range(6):
            cov = np.cov(w.T) + 1e-9 * np.eye(D)
            normal = rng.normal(size=w.shape)
            if move % 3 == 0:
                off = 0.6 * normal @ np.linalg.cholesky(cov).T * np.exp(0.7 * rng.normal(size=(n, 1)))
            elif move % 3 == 1:  # a few coordinates
                off = 1.2 * np.sqrt(np.diag(cov)) * normal * (rng.random(w.shape) < 0.25)
            else:  # along the line between two others
                one, other = rng.integers(n, size=(2, n))
                off = 0.5 * rng.random((n, 1)) * (w[one] - w[other]) + 0.01 * normal
            new = (w + off).clip(-300, 20)
            new_p = log_likelihood(x, new)
            gain = temperature * (new_p - log_p) + log_prior(new) - log_prior(w)
            taken = np.log(rng.random(n)) < gain
            w, log_p = np.where(taken[:, None], new, w), np.where(taken, new_p, log_p)
    return float(log_z), w


def by_draws(x: Array, w: Array, n: int = 20_000, seed: int = 0) -> tuple[float, float]:
    """log Z and its standard error, by draws of a mixture around particles (M, 8) and, one of twenty, of the prior."""
    rng = np.random.default_rng(seed)
    white = np.linalg.solve(np.linalg.cholesky(np.cov(w.T)), w.T).T
    pieces = []
    for centre in white[rng.permutation(len(w))[:N_CENTRES]]:
        near = w[((white - centre) ** 2).sum(1).argsort()[:250]]
        pieces.append(multivariate_t(near.mean(0), 1.6 * np.cov(near.T) + 1e-3 * np.eye(D), df=6, seed=rng))
    counts = np.bincount(rng.integers(N_CENTRES, size=n - n // 20), minlength=N_CENTRES)
    u = np.concatenate([p.rvs(k).reshape(-1, D) for p, k in zip(pieces, counts, strict=True)])
    u = np.concatenate([u, np.log(rng.gamma(0.5, 2.0, size=(n // 20, D)).clip(min=1e-80))])
    of_pieces = logsumexp([p.logpdf(u) for p in pieces], axis=0) - np.log(N_CENTRES)
    log_q = np.logaddexp(of_pieces + np.log(0.95), log_prior(u) + np.log(0.05))
    log_w = log_likelihood(x, u) + log_prior(u) - log_q
    share = np.exp(log_w - logsumexp(log_w))
    return float(logsumexp(log_w) - np.log(n)), float(np.sqrt((share**2).sum() - 1 / n))


if __name__ == "__main__":
    from zoo.programs_pyro_deep import counts

    (table,) = counts(np.random.default_rng(0))
    rows = table.astype(int)
    runs = [particles(rows, seed) for seed in range(6)]
    z = np.exp([log_z - runs[0][0] for log_z, _ in runs])
    mean, error = runs[0][0] + np.log(z.mean()), z.std(ddof=1) / z.mean() / 6**0.5
    print(f"particles: {mean:.3f} +- {error:.3f}", flush=True)
    both = np.concatenate([w for _, w in runs])
    both = np.concatenate([both, both[:, [1, 0, 5, 6, 7, 2, 3, 4]]])  # names of the factors changed
    print("draws: {:.3f} +- {:.3f}".format(*by_draws(rows, both[:: len(both) // 3000])))
