"""Independent truths: dense densities, closed forms and enumerations in numpy and scipy, with nothing of the package.

A missing cell is NaN. A row of none but missing cells has log-density zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.special import gammaln, logsumexp
from scipy.stats import norm
from scipy.stats import t as student_t

Array = NDArray[np.float64]


# ------------------------------------------------------------------------------------------- dense Gaussian densities


def factor_covariance(components: Array, noise_variance: Array | float) -> Array:
    """W' W + diag(noise) (T, T) of components W (K, T) and one noise variance or T of them."""
    return components.T @ components + np.diag(np.broadcast_to(noise_variance, components.shape[1]))


def log_density(x: Array, mean: Array, cov: Array) -> Array:
    """(N,) log N(x_o; mean_o, cov_oo) of the observed cells o of each row of x (N, T).

    By a Cholesky factor L of cov_oo: -1/2 |L^-1 (x_o - mean_o)|^2 - sum log diag L - |o|/2 log 2 pi. (scipy's
    `multivariate_normal` takes a covariance whose eigenvalues differ 1e10-fold for singular.)
    """
    out = np.zeros(len(x))
    seen = ~np.isnan(x)
    for shown in np.unique(seen, axis=0):
        if shown.any():
            rows = (seen == shown).all(1)
            root = np.linalg.cholesky(cov[np.ix_(shown, shown)])  # (|o|, |o|)
            z = solve_triangular(root, (x[rows][:, shown] - mean[shown]).T, lower=True)  # (|o|, rows)
            constant = np.log(np.diag(root)).sum() + shown.sum() / 2 * np.log(2 * np.pi)
            out[rows] = -0.5 * (z**2).sum(0) - constant
    return out


def mean_log_density(x: Array, mean: Array, cov: Array) -> float:
    """Nats a row of complete rows, from their moments: -1/2 [log |2 pi cov| + tr cov^-1 (C + r r')], r = x_ - mean."""
    off = x.mean(0) - mean
    second = covariance(x) + np.outer(off, off)
    return float(-0.5 * (np.linalg.slogdet(2 * math.pi * cov)[1] + np.trace(np.linalg.solve(cov, second))))


def conditionals(row: Array, visible: NDArray[np.bool_], mean: Array, cov: Array) -> Array:
    """(T,) log p(x_i | x_v) of one row's hidden cells i given its visible ones v; 0 where visible or missing."""
    seen, hidden = visible & ~np.isnan(row), ~visible & ~np.isnan(row)
    gain = np.linalg.solve(cov[np.ix_(seen, seen)], cov[seen]).T  # (T, |v|) = cov_iv cov_vv^-1
    m = mean + gain @ (row[seen] - mean[seen])
    v = np.diag(cov) - (gain * cov[:, seen]).sum(1)
    out = np.zeros(len(row))
    out[hidden] = -0.5 * ((row - m)[hidden] ** 2 / v[hidden] + np.log(2 * math.pi * v[hidden]))
    return out


def mixture_log_terms(x: Array, weights: Array, means: Array, covs: Array) -> Array:
    """(K, N) log w_k + log N(x_o; mean_ko, cov_koo): `logsumexp` over axis 0 is the density of a Gaussian mixture."""
    return np.stack([np.log(w) + log_density(x, m, c) for w, m, c in zip(weights, means, covs, strict=True)])


def responsibilities(log_terms: Array) -> Array:
    """(N, K) shares of each component, from their log-terms (K, N)."""
    return np.exp(log_terms - logsumexp(log_terms, axis=0)).T


# ----------------------------------------------------------------------------------------------- maxima in closed form


def covariance(x: Array) -> Array:
    """(T, T) of complete rows, divided by their number."""
    return np.cov(x.T, bias=True)


def ppca(x: Array, k: int) -> tuple[Array, Array]:
    """Mean (T,) and covariance (T, T) at the maximum of PPCA's likelihood (Tipping & Bishop 1999, eq. 7-8)."""
    value, vector = np.linalg.eigh(covariance(x))
    value, vector = value[::-1], vector[:, ::-1]
    noise = value[k:].mean()
    return x.mean(0), (vector[:, :k] * (value[:k] - noise)) @ vector[:, :k].T + noise * np.eye(x.shape[1])


def ppca_maximum(x: Array, k: int) -> float:
    """Nats of all rows at that maximum: -N/2 [T log 2 pi + sum_{j<=k} log l_j + (T - k) log noise + T].

    Eigenvalues l_j of the covariance by singular values of the centred rows, which keep the digits of small ones.
    """
    n, t = x.shape
    centred = x - x.mean(0)
    value = np.zeros(t)
    singular = np.linalg.svd(centred - centred.mean(0), compute_uv=False)
    value[: len(singular)] = singular**2 / n
    noise = value[k:].sum() / (t - k)
    return float(-n / 2 * (t * np.log(2 * np.pi) + np.log(value[:k]).sum() + (t - k) * np.log(noise) + t))


def known_noise_maximum(second: Array, k: int, noise: float) -> float:
    """Greatest mean nats a row of k factors beside a known noise, of rows with these second moments (T, T) and mean 0.

    The leading eigenvalues are matched where they exceed the noise, the others stay at it.
    """
    value = np.linalg.eigvalsh(second)[::-1]
    theta = np.where(np.arange(len(value)) < k, np.maximum(value, noise), noise)
    return float(-0.5 * (np.log(2 * math.pi * theta) + value / theta).sum())


# ------------------------------------------------------------------------------------------------------- enumerations


def every_mask(n_tokens: int) -> NDArray[np.bool_]:
    """(2^T - 1, T) every non-empty set of hidden tokens, as what stays visible."""
    return ((np.arange(1, 2**n_tokens)[:, None] >> np.arange(n_tokens)) & 1) == 0


def lml_weights(visible: NDArray[np.bool_]) -> Array:
    """(S, T) weights 1 / (m C(T, m)) of the m hidden tokens of every mask, by which the score is the LML itself."""
    hidden, n_tokens = ~visible, visible.shape[1]
    return np.array([row / (m * math.comb(n_tokens, m)) for row in hidden for m in [int(row.sum())]])


def every_row(n_tokens: int, n_levels: int) -> NDArray[np.int64]:
    """(L^T, T) every row of codes 0 .. L - 1, the last token fastest."""
    return np.array(list(product(range(n_levels), repeat=n_tokens)), dtype=np.int64)


def normal_grid(half_width: float, n: int) -> tuple[Array, Array]:
    """Nodes (n,) of a fine grid and their log-weights under N(0, 1), for the rectangle rule."""
    node = np.linspace(-half_width, half_width, n)
    return node, norm.logpdf(node) + np.log(node[1] - node[0])


# ---------------------------------------------------------------------------------------------------------- a network


def transformer_by_hand(
    p: dict[str, Array],
    x: Array,
    visible: NDArray[np.bool_],
    n_heads: int,
    n_layers: int,
    pulled: Callable[[int, NDArray[np.bool_]], float] = lambda layer, seen: 1.0,
) -> tuple[Array, Array, Array]:
    """The masked transformer of these parameters in numpy, token by token.

    Logits (N, T, L), states (N, layers + 1, T, D), shares of attention (N, layers, H, T, T); ``pulled`` says by what
    the pull of visible tokens to all of them is multiplied.
    """
    n_tokens, d = x.shape[1], p["mask"].shape[-1]
    size = d // n_heads

    def norm(h: Array, name: str) -> Array:
        centred = h - h.mean(-1, keepdims=True)
        unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return unit * p[f"{name}.scale"] + p[f"{name}.shift"]

    logits, states, shares = [], [], np.zeros((len(x), n_layers, n_heads, n_tokens, n_tokens))
    for row in range(len(x)):
        seen = visible[row]
        h = np.stack([p["embedding"][0, int(x[row, t])] if seen[t] else p["mask"] for t in range(n_tokens)])
        of_row = [h]
        h = h + p["position"]
        for layer in range(n_layers):
            q, k, v = np.split(norm(h, f"layer{layer}.norm1") @ p[f"layer{layer}.attend"].T, 3, axis=-1)
            found = np.zeros((n_tokens, d))
            for head in range(n_heads):
                own = slice(head * size, (head + 1) * size)
                for i in range(n_tokens):
                    pull = np.exp(q[i, own] @ k[:, own].T / math.sqrt(size))
                    if seen[i]:
                        pull = pull * pulled(layer, seen)
                    shares[row, layer, head, i] = pull / pull.sum()
                    found[i, own] = shares[row, layer, head, i] @ v[:, own]
            h = h + found @ p[f"layer{layer}.attended"].T
            up = norm(h, f"layer{layer}.norm2") @ p[f"layer{layer}.up"].T + p[f"layer{layer}.up_bias"]
            bump = 0.5 * up * (1 + np.vectorize(math.erf)(up / math.sqrt(2)))
            h = h + bump @ p[f"layer{layer}.down"].T
            of_row.append(h)
        out = norm(h, "norm") @ p["embedding"][0].T + p["bias"]
        logits.append(out - np.log(np.exp(out).sum(-1, keepdims=True)))
        states.append(of_row)
    return np.stack(logits), np.array(states), shares


# -------------------------------------------------------------------------------------------------- errors of averages


def replicate_error(values: Array) -> float:
    """Standard error of the mean of n replicates, widened so that two of it cover what Student's t with n - 1 says."""
    n = len(values)
    return float(np.std(values, ddof=1) / math.sqrt(n) * student_t.ppf(norm.cdf(2), n - 1) / 2)


def sparse_gamma_rows(x: NDArray[np.int64], log_top: Array, log_bottom: Array) -> Array:
    """(M, N) log p(x_n | w) of rows of counts x (N, T) under a deep exponential family of K = 2 factors.

        z ~ Gamma(1/2, 1/2),    z_k ~ Gamma(1/2, 1 / (2 z w_k)),    x_t ~ Poisson(sum_k z_k w_kt)

    Counts are split between the factors, over which z_k is integrated in closed form; over log z even steps are
    added up, an integrand that falls off to both sides. Parameters are the logarithms of w_k (M, 2) and w_kt (M, 2, T).
    """
    v = np.arange(-30, 5.01, 0.5)
    log_prior = 0.5 * np.log(0.5) - gammaln(0.5) + 0.5 * v - 0.5 * np.exp(v) + np.log(0.5)
    log_rate = np.log(0.5) - v - log_top[..., None]  # (M, 2, V)
    log_sum = np.logaddexp(log_rate, logsumexp(log_bottom, axis=2)[..., None])
    nothing = 0.5 * (log_rate - log_sum).sum(1) + log_prior  # (M, V)
    out = []
    for row in x:
        total = row.sum()
        split = np.zeros(
            (len(log_top), 1)
        )  # log of the weight of each count of the first factor, (M, total + 1)
        for t in np.repeat(np.arange(len(row)), row):
            none = np.full((len(split), 1), -np.inf)
            split = np.logaddexp(
                np.hstack([none, split + log_bottom[:, :1, t]]),
                np.hstack([split + log_bottom[:, 1:, t], none]),
            )
        k = np.arange(total + 1)
        split = (
            split + gammaln(0.5 + k) + gammaln(0.5 + total - k) - 2 * gammaln(0.5) - gammaln(row + 1).sum()
        )
        each = -k[:, None] * log_sum[:, :1] - (total - k)[:, None] * log_sum[:, 1:] + nothing[:, None]
        out.append(logsumexp(each + split[..., None], axis=(1, 2)))
    return np.stack(out, 1)
