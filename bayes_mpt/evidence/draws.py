"""Draws from the posterior of a factor model, and what all of them together come to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

__all__ = ["FactorDraws"]

Array = NDArray[np.float64]

MAX_DRAWS = 256  # that are kept


@dataclass(frozen=True, eq=False)
class FactorDraws:
    """Of x ~ N(mu, C), C = psi + W W': moments of each of G islands, and some draws of all that count alike."""

    loadings: Array
    """(S, T, K) W, each turned into the slice."""
    noise: Array
    """(S, T) psi"""
    means: Array
    """(S, T) centres of mu."""
    spread: Array
    """(T,) s: Cov(mu | draw) = s^1/2 C s^1/2."""
    island_covariances: Array
    """(G, T, T) E[C]"""
    island_means: Array
    """(G, T) E[mu]"""
    island_mean_covariances: Array
    """(G, T, T) Cov[mu]"""
    mean_loadings: Array
    """(T, K) E[W]"""
    mean_noise: Array
    """(T,) E[psi]"""

    @classmethod
    def of(cls, loadings: Array, noise: Array, means: Array, spread: Array, log_z: Array) -> Self:
        """Draws of G islands one after the other, each as many, which count by their evidence, log Z (G,)."""
        n_islands = len(log_z)
        n_draws, n_tokens, k = loadings.shape
        each = n_draws // n_islands
        share = softmax(log_z)
        w = loadings.reshape(n_islands, each, n_tokens, k)
        flat = w.transpose(0, 2, 1, 3).reshape(n_islands, n_tokens, -1)
        cov = flat @ flat.transpose(0, 2, 1) / each  # (G, T, T)
        noises = noise.reshape(n_islands, each, n_tokens).mean(1)
        cov[:, np.arange(n_tokens), np.arange(n_tokens)] += noises
        centers = means.reshape(n_islands, each, n_tokens)
        off = centers - centers.mean(1, keepdims=True)
        root = np.sqrt(spread)
        mean_cov = root[:, None] * cov * root + off.transpose(0, 2, 1) @ off / each
        n_kept = min(n_draws, MAX_DRAWS)
        among = np.cumsum(np.repeat(share / each, each))
        kept = np.minimum(np.searchsorted(among, (np.arange(n_kept) + 0.5) / n_kept), n_draws - 1)
        return cls(
            loadings[kept],
            noise[kept],
            means[kept],
            spread,
            cov,
            centers.mean(1),
            mean_cov,
            np.einsum("g,gtk->tk", share, w.mean(1)),
            share @ noises,
        )

    def shifted(self, by: Array) -> Self:
        """Of rows to which ``by`` (T,) is added."""
        return replace(self, means=self.means + by, island_means=self.island_means + by)

    def covariance(self, log_z: Array) -> Array:
        """E[C] (T, T), each island weighted by its evidence, log Z (G,)."""
        return np.asarray(np.einsum("g,gst->st", softmax(log_z), self.island_covariances))

    def mean(self, log_z: Array) -> Array:
        """E[mu] (T,), likewise."""
        return np.asarray(softmax(log_z) @ self.island_means)
