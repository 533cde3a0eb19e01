"""The linear-Gaussian map from latents to tokens, as matrices.

x = loc + loading u + e,    u ~ N(0, I_K),    e ~ N(0, diag(noise)),    z = latent_loc + latent_root u
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["DenseMap", "Map", "each_row", "integrate_prior", "with_correlated_noise"]

LOG_2PI = math.log(2 * math.pi)


class DenseMap(NamedTuple):
    """The linear-Gaussian map at the current parameters. B is 1 (shared by all rows) or N."""

    loc: Tensor
    """(B, T)"""
    loading: Tensor
    """(B, T, K); with a MultivariateNormal token site T further columns, a root of the correlated noise."""
    noise: Tensor
    """(B, T) variances."""
    latent_loc: Tensor
    """(B, K)"""
    latent_root: Tensor
    """(B, K, K)"""
    scale: float
    """Plate or `poutine.scale` factor of the observed site (minibatches)."""
    value: Tensor
    """(N, T), the observed value of this run; NaN where missing."""

    def tokens_at(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means and variances of the tokens given latents z (N, K), and the size of what the means are sums of."""
        u = self._standard(z)
        loading = self.loading[..., : z.shape[-1]]
        mean = self.loc + _applied(loading, u)
        size = self.loc.abs() + _applied(loading.abs(), u.abs())
        variance = self.noise + self.loading[..., z.shape[-1] :].square().sum(-1)
        return mean, variance.expand(mean.shape), size

    def log_joint(self, z: Tensor, value: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """log p(value, z), summed over rows, from the means and variances of the tokens at z."""
        # log p(x, z) = log N(z; b, R R') + log N(x; loc + loading u, noise),  u = R^-1 (z - b)
        root = self.loading[..., z.shape[-1] :]  # of correlated noise
        if root.shape[-1]:
            cov = root @ root.mT + torch.diag_embed(self.noise)
            token = dist.MultivariateNormal(mean, cov).log_prob(value).sum()
        else:
            token = -0.5 * ((value - mean).square() / variance + variance.log() + LOG_2PI).sum()
        logdet = torch.linalg.slogdet(self.latent_root)[1].expand(len(z)).sum()
        return token - 0.5 * (self._standard(z).square() + LOG_2PI).sum() - logdet

    def _standard(self, z: Tensor) -> Tensor:
        """u = R^-1 (z - b): (N, K)."""
        rest = z - self.latent_loc
        if len(self.latent_root) == 1:
            return torch.linalg.solve(self.latent_root[0], rest.mT).mT
        return torch.linalg.solve(self.latent_root, rest[..., None])[..., 0]


def _applied(loading: Tensor, u: Tensor) -> Tensor:
    """Loadings (B, T, K) times latents (N, K): (N, T)."""
    # one product of matrices where all rows share the loadings, which broadcasting would copy for each
    return u @ loading[0].mT if len(loading) == 1 else (loading @ u[..., None])[..., 0]


class Map(Protocol):
    """A linear-Gaussian map in some layout, a NamedTuple with fields ``scale`` and ``value``: what the checks ask."""

    @property
    def loc(self) -> Tensor: ...  # (B, T)
    def tokens_at(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...
    def log_joint(self, z: Tensor, value: Tensor, mean: Tensor, variance: Tensor) -> Tensor: ...


def each_row(reading: DenseMap, n_rows: int) -> DenseMap:
    """The same map for each of so many rows."""
    loc, loading, noise, latent_loc, root = (t.repeat_interleave(n_rows, 0) for t in reading[:5])
    return DenseMap(loc, loading, noise, latent_loc, root, reading.scale, reading.value)


def integrate_prior(
    loc: Tensor, loading: Tensor, noise: Tensor, b: Tensor, slope: Tensor, root: Tensor, like: Tensor
) -> DenseMap:
    """Latents may depend on earlier ones: z = b + A z + R u, so z = (I - A)^-1 (b + R u)."""
    n_latents = b.shape[-1]
    # a slope that is zero now may depend on a parameter
    if n_latents and (slope.requires_grad or bool((slope != 0).any())):
        left = torch.eye(n_latents, dtype=like.dtype, device=like.device) - slope
        b = torch.linalg.solve(left, b[..., None])[..., 0]
        root = torch.linalg.solve(left, root)
    # x = loc + loading z + e = (loc + loading b) + (loading R) u + e
    loc = loc + (loading @ b[..., None])[..., 0]
    return DenseMap(loc, loading @ root, noise, b, root, 1.0, like)


def with_correlated_noise(reading: DenseMap, tril: Tensor) -> DenseMap:
    """The map with correlated noise of the tokens, lower factors (B, T, T), as further columns of its loadings."""
    loading, noise = _split_noise(tril, reading.noise.sqrt())
    return reading._replace(loading=torch.cat([reading.loading, loading], -1), noise=noise)


def _split_noise(tril: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """L L' = W W' + diag(noise): correlated noise as further latents, of which half the least variance is left over.

    (B, T, T), (B, T) -> W (B, T, T), noise (B, T). In correlation units, so that every token keeps its share.
    """
    unit = tril / scale[..., None]
    corr = unit @ unit.mT
    with torch.no_grad():
        left = (
            0.5 * torch.linalg.eigvalsh(corr)[..., :1]
        )  # any share will do: W changes with it, the sum does not
    rest = corr - torch.diag_embed(left.expand(scale.shape))
    return scale[..., None] * torch.linalg.cholesky(rest), left * scale.square()
