"""Evidence of a factor model with its point estimates integrated out: Laplace's approximation around the orbit.

Loadings are known only up to a rotation of the latents, so the maximum is not a point but an orbit, whose volume is
integrated exactly and whose normal directions are Gaussian. In units V = psi^-1/2 W, with log psi = B eta and the
rotation chosen so that V = U diag(s), s_k = (theta_k - 1)^1/2,

    log evidence = LML + sum_ik log N(W_ik; 0, tau^2 var_i) + sum_i log Gamma(psi_i; 2, 2 / var_i) + log |d(W, psi)|
                 + (d - g)/2 log 2 pi - 1/2 log det(Q' H Q) + 1/2 log det(G' G) + log vol O(K)

with var_i the variance of token i, tau^2 the mean of W_ik^2 / var_i (empirical), d = T K + P parameters (V, eta) and
|d(W, psi)| their Jacobian, G the g = K (K - 1)/2 tangents of the orbit, Q the normal directions, H = N x Fisher
information + prior precision (of the loadings: its mean over the tokens). In the basis U the loadings' part of H falls
apart into single entries and 2 x 2 blocks, so the whole costs O(T^2 K^2), or O(T K^4) of many tokens, and not (T K)^3.

PPCA treats all directions of the token space alike, so there var_i is the mean variance, and there is one psi.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import multigammaln

from bayes_mpt.predictors.gaussian.profile import Factors, Prior, Spectrum, diagonal, proportional
from bayes_mpt.program.statistics import Covariance

__all__ = ["LaplaceEvidence", "laplace_diagonal", "laplace_proportional"]

Array = NDArray[np.float64]

LOG_2PI = math.log(2 * math.pi)
MAX_DENSE = 1000  # tokens up to which a matrix of them is made: it keeps digits where a noise is all but zero
NOISE_SHAPE = 2.0  # psi_i ~ Gamma(2, 2 / var_i): mean var_i, no weight at zero, soft towards it


class LaplaceEvidence(NamedTuple):
    """An approximate evidence: it ranks, and is not unbiased."""

    log_evidence: float
    """Nats, of all rows."""
    lml: float
    """Nats, of all rows, at the point of expansion."""
    factors: Factors
    """The point of expansion."""


def laplace_proportional(
    cov: Array | Covariance, n_rows: int, n_latents: int, shape: Array, known: Spectrum | None = None
) -> LaplaceEvidence:
    """Noise c * shape with one unknown c (PPCA: shape of ones), expanded at the maximum of the likelihood.

    Parameters
    ----------
    cov : array of shape (T, T), or bayes_mpt.program.statistics.Covariance
        Covariance of the rows, divided by N.
    n_rows : int
        N.
    n_latents : int
        K < T.
    shape : array of shape (T,)
        Known ratios of the noise variances.
    known : Spectrum, optional
        `bayes_mpt.predictors.gaussian.profile.spectrum` of both, where several numbers of latents are tried.

    Examples
    --------
    >>> cov = np.diag([9.0, 1.0, 1.0, 1.0])
    >>> scores = [laplace_proportional(cov, 200, k, np.ones(4)).log_evidence for k in range(3)]
    >>> int(np.argmax(scores))
    1
    """
    cov = _covariance(cov)
    factors = proportional(cov, n_latents, shape, known)
    share = factors.noise[:1] / shape[:1] / (cov.variances / shape).mean()
    return _around_orbit(factors, n_rows, share)


def laplace_diagonal(cov: Array | Covariance, n_rows: int, n_latents: int) -> LaplaceEvidence:
    """A noise variance of its own for each token (factor analysis), expanded at its maximum a posteriori.

    The prior keeps the expansion away from zero variances (Heywood cases), at which maximum likelihood often ends.

    Parameters
    ----------
    cov : array of shape (T, T), or bayes_mpt.program.statistics.Covariance
        Covariance of the rows, divided by N.
    n_rows : int
        N.
    n_latents : int
        K.
    """
    cov = _covariance(cov)
    variance = cov.variances
    prior = Prior(NOISE_SHAPE, NOISE_SHAPE / variance, n_rows)
    factors = diagonal(cov, n_latents, prior=prior)
    return _around_orbit(factors, n_rows, factors.noise / variance)


def _covariance(cov: Array | Covariance) -> Covariance:
    return Covariance(cov) if isinstance(cov, np.ndarray) else cov


def _around_orbit(factors: Factors, n_rows: int, share: Array) -> LaplaceEvidence:
    """Integrate over loadings and noises around the orbit of rotations.

    ``share`` (P,) is each noise in units of its prior mean, psi / var: of all tokens together (P = 1), or of each (T).
    """
    # Columns of zero loading have no orbit and no information: their prior integrates to one.
    used = factors.spectrum > 1 + 1e-10
    theta, u = factors.spectrum[used], factors.vectors[:, used]  # (K,), (T, K)
    lml = n_rows * factors.lml
    log_det = _log_det(theta, u, n_rows, share)
    return LaplaceEvidence(around_orbit(lml, u * np.sqrt(theta - 1), share, log_det), lml, factors)


def around_orbit(lml: float, v: Array, share: Array, log_det: float) -> float:
    """Log evidence at V (T, K) of orthogonal columns and noises of these ``share`` (P,), given log det(Q'HQ)."""
    n_tokens, n_latents = v.shape
    # density of log psi: a^a / Gamma(a) share^a exp(-a share)
    a = NOISE_SHAPE
    log_prior = float((a * np.log(a * share) - a * share - math.lgamma(a)).sum())
    n_free = n_tokens * n_latents + len(share) - n_latents * (n_latents - 1) // 2
    value = lml + log_prior + 0.5 * n_free * LOG_2PI - 0.5 * log_det
    if not n_latents:
        return float(value)
    # sum_ik V_ik^2 share_i / tau^2 = T K
    token_share = np.broadcast_to(share, n_tokens)
    tau2 = scale_of_loadings(v, share)
    value += -0.5 * n_latents * (n_tokens * (LOG_2PI + math.log(tau2) + 1) - np.log(token_share).sum())
    # of a tangent (s_l, -s_k): log det (G'G) is the sum of the logarithms of their squared lengths
    square = np.square(v).sum(0)
    low, high = _pairs(n_latents)
    return float(value + 0.5 * np.log(square[low] + square[high]).sum() + log_volume(n_latents))


def scale_of_loadings(v: Array, share: Array) -> float:
    """tau^2: W_ik ~ N(0, tau^2 var_i), so that V_ik ~ N(0, tau^2 / share_i)."""
    return float((v**2 * np.broadcast_to(share, len(v))[:, None]).mean())


def prior_precision(v: Array, share: Array) -> tuple[float, Array]:
    """What the prior adds to H: of each loading, its mean over the tokens; and of each log psi (P,), a share."""
    precision = float(share.mean()) / scale_of_loadings(v, share) if v.size else 0.0
    return precision, NOISE_SHAPE * share


def _log_det(theta: Array, u: Array, n_rows: int, share: Array) -> float:
    """log det(Q'HQ) of complete rows, in the basis U."""
    n_tokens, n_latents = u.shape
    n_noise = len(share)
    s = np.sqrt(theta - 1)
    precision, curvature = prior_precision(u * s, share)
    if not n_latents:
        # H_pp = N/2
        return float(np.log(n_rows * n_tokens / (2 * n_noise) + curvature).sum())
    d, m = s / theta, (theta - 1) / theta
    # H on the entries of V: in U's complement N m_k + 1/tau^2, on U_k itself 2 N (theta_k - 1)/theta_k^2 + 1/tau^2
    h_outside = n_rows * m + precision
    h_own = 2 * n_rows * (theta - 1) / theta**2 + precision
    log_det = (n_tokens - n_latents) * np.log(h_outside).sum() + np.log(h_own).sum()
    # A pair (l, k): 2 x 2 block, of which the tangent (s_l, -s_k) lies in the orbit and (s_k, s_l) is normal to it
    low, high = _pairs(n_latents)
    norm2 = s[low] ** 2 + s[high] ** 2
    h_pair = precision + n_rows / norm2 * (
        s[high] ** 2 * m[high] / theta[low]
        + s[low] ** 2 * m[low] / theta[high]
        + 2 * s[low] * s[high] * d[low] * d[high]
    )
    log_det += np.log(h_pair).sum()
    # Coupling of the loadings to log psi in the same basis
    outside = (d + s) ** 2 / h_outside
    own = n_rows * d / np.sqrt(h_own)
    pair = s[high] * (d[high] + s[high] / theta[low]) + s[low] * (d[low] + s[low] / theta[high])
    pair = n_rows / 2 * pair / np.sqrt(norm2 * h_pair)
    if n_noise == 1:
        # summed over all tokens R o R^-1 is T, and u_l o u_k is 1 for l = k and 0 else
        sign, log_det_noise = 1.0, np.log(n_rows * n_tokens / 2 - np.square(own).sum() + curvature[0])
    else:
        sign, log_det_noise = _log_det_noise(u, theta, n_rows, curvature, outside, own, pair)
    if sign <= 0:
        raise FloatingPointError(
            "the curvature of the noise variances is not positive: the Laplace evidence fails"
        )
    return float(log_det + log_det_noise)


def _log_det_noise(
    u: Array, theta: Array, n_rows: int, curvature: Array, outside: Array, own: Array, pair: Array
) -> tuple[float, float]:
    """Sign and logarithm of the determinant of the noises' part of H, its coupling to the loadings taken off.

    With V = U diag(s), R = I + V V' and o the product of elements,

        N/4 (I + R o R^-1) + diag(curvature) - N^2/4 (I - U U') o (U diag(outside) U') - sum_lk m_lk^2 f_lk f_lk'

    where f_lk = u_l o u_k (T,) for l <= k and m their couplings, own and pair. Every term is diagonal or of such f:
    D + F M F', of which the determinant costs T K^4 / 4 and no matrix of tokens is made.
    """
    n_tokens, n_latents = u.shape
    a, b = theta - 1, (theta - 1) / theta
    diagonal = n_rows / 4 * (2 + u**2 @ (a - b)) - n_rows**2 / 4 * (u**2 @ outside) + curvature  # (T,)
    low, high = _pairs(n_latents)
    f = np.concatenate([u**2, u[:, low] * u[:, high]], 1)
    weight = np.concatenate(
        [
            n_rows**2 / 4 * outside - n_rows / 4 * a * b - own**2,
            n_rows**2 / 4 * (outside[low] + outside[high])
            - n_rows / 4 * (a[low] * b[high] + a[high] * b[low])
            - pair**2,
        ]
    )
    if f.shape[1] < n_tokens > MAX_DENSE:
        # |D + F M F'| = |D| |I + M F' D^-1 F|
        inner = np.eye(f.shape[1]) + weight[:, None] * (f.T @ (f / diagonal[:, None]))
        sign, log_det = np.linalg.slogdet(inner)
        return sign * np.prod(np.sign(diagonal)), log_det + np.log(np.abs(diagonal)).sum()
    sign, log_det = np.linalg.slogdet(np.diag(diagonal) + (f * weight) @ f.T)
    return sign, log_det


@lru_cache(maxsize=32)
def _pairs(n: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Indices of the pairs of n things."""
    return np.triu_indices(n, 1)


def log_volume(k: int) -> float:
    """log vol O(K) = log(2^K pi^(K^2/2) / Gamma_K(K/2)): 2, 4 pi, 16 pi^2 for K = 1, 2, 3."""
    return k * math.log(2) + k * k / 2 * math.log(math.pi) - float(multigammaln(k / 2, k))
