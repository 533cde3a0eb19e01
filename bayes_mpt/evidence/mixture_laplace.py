"""Evidence of a Gaussian mixture with full covariances, its parameters integrated by Laplace's approximation.

Coordinates around a point (w, mu, C = L L') in which the integrand is close to normal, and which no change of units
moves: w = softmax(a, 0), mu_c + L_c m_c, L_c exp(A_c) L_c' with symmetric A_c. With the prior of the collapsed evidence
(`bayes_mpt.evidence.mixture_prior`) and the Jacobian of these coordinates,

    log evidence = log K! + log p(X | w, mu, C) + log p(w, mu, C) + sum_c [ log w_c + log |L_c| + (T + 1)/2 log |C_c| ]
                   + P/2 log 2 pi - 1/2 log det(-H)

at the maximum of all that H is the Hessian of. H is exact: second derivatives of complete rows, plus the covariance of
the scores over the allocations (Louis 1982); rows with missing cells by what they show (`mixture_marginals`).

log K! counts the modes in which components have changed places. Where components overlap these are not apart, or the
integrand is not normal, and the number is off by an amount that is not known: `MixtureLaplace.overlapping` names them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln, logsumexp, multigammaln

from bayes_mpt.evidence.mixture_marginals import LOG_2PI, Mixture, Pattern, patterns_of, seen_of
from bayes_mpt.evidence.mixture_prior import MixturePrior, checked_rows

__all__ = ["MixtureLaplace", "laplace_mixture"]

Array = NDArray[np.float64]

EM_STEPS = 100
EM_GAIN = 1e-3  # nats of all rows: less, and Newton goes on
NEWTON_STEPS = 50
DECREMENT = 1e-6  # nats that a further step would gain
HALVINGS = 20  # of a step that does not climb
LONGEST = 1.0  # step of a coordinate
MIN_EIGENVALUE = 1e-10  # of the prior's scale, in its units
OVERLAP = 0.2  # of the rows of the smaller component, that are shared with another


class MixtureLaplace(NamedTuple):
    """An approximate evidence: it has no error."""

    log_evidence: float
    """Nats, of all rows."""
    lml: float
    """Nats, of all rows, at the point of expansion."""
    weights: Array
    """(K,) at that point, the maximum a posteriori in the coordinates above."""
    loc: Array
    """(K, T)"""
    covariances: Array
    """(K, T, T)"""
    prior: MixturePrior
    overlapping: tuple[tuple[int, int], ...]
    """Pairs of components that share more than a fifth of their rows: the number is unreliable then."""


class NoModeError(ValueError):
    """The climb has ended where the integrand has no maximum."""


class _Law(NamedTuple):
    """The prior in its units, centred."""

    alpha: float
    kappa: float
    degrees: float
    """nu of the inverse Wishart."""
    scale: Array
    """(T, T)"""


def laplace_mixture(
    rows: ArrayLike, prior: MixturePrior, weights: Array, loc: Array, covariances: Array
) -> MixtureLaplace:
    """Evidence of rows, expanded at the maximum a posteriori that is reached from a fit.

    Parameters
    ----------
    rows : array of shape (N, T)
        NaN where missing.
    prior : MixturePrior
        The same for all candidates of a table.
    weights, loc, covariances : arrays of shape (K,), (K, T), (K, T, T)
        The fit.

    Raises
    ------
    ValueError
        If there is no maximum where the climb ends, or the table's covariance is singular, or rows
        are no table of the prior's columns.

    Examples
    --------
    >>> from bayes_mpt.evidence.mixture_prior import mixture_prior
    >>> x = np.random.default_rng(0).normal(size=(100, 2))
    >>> one = np.ones(1), x.mean(0)[None], np.cov(x.T)[None]
    >>> two = np.full(2, 0.5), np.array([[-1.0, 0.0], [1.0, 0.0]]), np.tile(np.cov(x.T), (2, 1, 1))
    >>> found = [laplace_mixture(x, mixture_prior(x), *fit).log_evidence for fit in (one, two)]
    >>> bool(found[0] > found[1])
    True
    """
    table, (k, t) = checked_rows(rows, len(prior.center)), loc.shape
    unit = np.where(prior.units("full") > 0, prior.units("full"), 1.0)
    law = _Law(prior.concentration, prior.kappa, prior.degrees + t - 1, prior.scale("full", k))
    if not np.linalg.eigvalsh(law.scale)[0] > MIN_EIGENVALUE:
        raise ValueError(
            "the Laplace evidence of a mixture needs a covariance of the table that is not singular: drop columns that "
            "are constant or repeat others, or use more rows than columns"
        )
    patterns = patterns_of((table - prior.center) / unit)
    root = np.linalg.cholesky(covariances) / unit[:, None]
    mix = Mixture(np.log(weights / weights.sum()), (loc - prior.center) / unit, root)
    with np.errstate(under="ignore"):
        mix, neg_hessian = _newton(patterns, _em(patterns, mix, law), law)
        lml = sum(float(logsumexp(s.log_joint, axis=1).sum()) for s in seen_of(patterns, mix))
    log_det = np.linalg.slogdet(neg_hessian)[1]
    jacobian = mix.log_weights.sum() + (t + 2) * np.linalg.slogdet(mix.root)[1].sum()
    n_free = len(neg_hessian)
    units = sum(float(np.log(unit[c]).sum()) * len(x) for c, x in patterns)
    found = (
        lml - units + _log_prior(mix, law) + jacobian + 0.5 * (n_free * LOG_2PI - log_det) + gammaln(k + 1)
    )
    covs = unit[:, None] * (mix.root @ mix.root.swapaxes(1, 2)) * unit
    centers = prior.center + unit * mix.loc
    weights, overlapping = np.exp(mix.log_weights), _overlapping(patterns, mix)
    return MixtureLaplace(float(found), lml - units, weights, centers, covs, prior, overlapping)


def _log_prior(mix: Mixture, law: _Law) -> float:
    """log p(w, mu, C)."""
    k, t = mix.loc.shape
    nu, log_det = law.degrees, 2 * np.linalg.slogdet(mix.root)[1]
    y0, psi = _whitened_prior(mix, law)
    dirichlet = gammaln(k * law.alpha) - k * gammaln(law.alpha) + (law.alpha - 1) * mix.log_weights.sum()
    means = 0.5 * (t * math.log(law.kappa) - t * LOG_2PI - log_det - law.kappa * (y0**2).sum(1))
    constant = 0.5 * nu * (np.linalg.slogdet(law.scale)[1] - t * math.log(2)) - multigammaln(0.5 * nu, t)
    wishart = constant - 0.5 * (nu + t + 1) * log_det - 0.5 * np.trace(psi, axis1=1, axis2=2)
    return float(dirichlet + means.sum() + wishart.sum())


def _whitened_prior(mix: Mixture, law: _Law) -> tuple[Array, Array]:
    """Of each component: the centre of the means (K, T) and the scale of the covariances (K, T, T), both whitened."""
    back = np.linalg.inv(mix.root)
    return -(back @ mix.loc[:, :, None])[:, :, 0], back @ law.scale @ back.swapaxes(1, 2)


class _Sums(NamedTuple):
    """Over rows, weighted by their shares in each component."""

    n: Array
    """(K,)"""
    y: Array
    """(K, T)"""
    yy: Array
    """(K, T, T)"""
    known: Array
    """(K, T, T) of Pi."""
    score: float
    """What is climbed: log p(X, w, mu, C) with the Jacobian, but for constants."""


def _sums(patterns: list[Pattern], mix: Mixture, law: _Law) -> _Sums:
    k, t = mix.loc.shape
    n, y, yy, known = np.zeros(k), np.zeros((k, t)), np.zeros((k, t, t)), np.zeros((k, t, t))
    y0, psi = _whitened_prior(mix, law)
    score = law.alpha * mix.log_weights.sum() - (law.degrees + 1) * np.linalg.slogdet(mix.root)[1].sum()
    score -= 0.5 * (law.kappa * (y0**2).sum() + np.trace(psi, axis1=1, axis2=2).sum())
    for seen in seen_of(patterns, mix):
        of_pattern = seen.share.sum(0)
        n += of_pattern
        weighted = (seen.share[:, :, None] * seen.y).swapaxes(0, 1)  # (K, n, T)
        y += weighted.sum(1)
        yy += weighted.swapaxes(1, 2) @ seen.y.swapaxes(0, 1)
        known += of_pattern[:, None, None] * seen.known
        score += logsumexp(seen.log_joint, axis=1).sum()
    return _Sums(n, y, yy, known, float(score))


# -------------------------------------------------------------------------------------------------- the maximum


def _em(patterns: list[Pattern], mix: Mixture, law: _Law) -> Mixture:
    before = -math.inf
    eye = np.eye(mix.loc.shape[1])
    for _ in range(EM_STEPS):
        s = _sums(patterns, mix, law)
        if s.score - before < EM_GAIN:
            break
        before = s.score
        y0, psi = _whitened_prior(mix, law)
        count = s.n[:, None, None]
        step = (s.y + law.kappa * y0) / (s.n + law.kappa)[:, None]
        # sum over rows and the prior's centre of (y - step)(y - step)', and what missing cells add
        moment = s.yy + law.kappa * y0[:, :, None] * y0[:, None, :]
        moment -= (count + law.kappa) * step[:, :, None] * step[:, None, :]
        moment = (moment + count * eye - s.known + psi) / (law.degrees + 1 + count)
        log_weights = np.log(s.n + law.alpha)
        mix = Mixture(
            log_weights - logsumexp(log_weights),
            mix.loc + (mix.root @ step[:, :, None])[:, :, 0],
            mix.root @ np.linalg.cholesky(moment),
        )
    return mix


def _newton(patterns: list[Pattern], mix: Mixture, law: _Law) -> tuple[Mixture, Array]:
    """The maximum, and -H there."""
    for _ in range(NEWTON_STEPS):
        gradient, neg_hessian, score = _derivatives(patterns, mix, law)
        value, vector = np.linalg.eigh(neg_hessian)
        slope = vector.T @ gradient
        along = slope / np.maximum(np.abs(value), 1e-8 * np.abs(value).max())
        if 0.5 * float(along @ slope) < DECREMENT and value[0] > 0:
            return mix, neg_hessian - _of_exponential(*mix.loc.shape)
        step = vector @ along
        step *= min(1.0, LONGEST / np.abs(step).max())
        for _ in range(HALVINGS):
            moved = _moved(mix, step)
            if _sums(patterns, moved, law).score > score:
                break
            step /= 2
        else:
            break
        mix = moved
    raise NoModeError(
        f"the Laplace evidence of {len(mix.loc)} components has no point to expand at: where the climb ends the "
        "posterior is flat or has no maximum. Use fewer components, or evidence='integrated' or 'heldout'"
    )


def _moved(mix: Mixture, step: Array) -> Mixture:
    k, t = mix.loc.shape
    a, of_each = step[: k - 1], step[k - 1 :].reshape(k, -1)
    log_weights = mix.log_weights + np.append(a, 0.0)
    root = np.empty_like(mix.root)
    for c, way in enumerate(of_each):
        value, vector = np.linalg.eigh((_duplication(t) @ way[t:]).reshape(t, t))
        root[c] = mix.root[c] @ (vector * np.exp(value / 2))
    loc = mix.loc + (mix.root @ of_each[:, :t, None])[:, :, 0]
    return Mixture(log_weights - logsumexp(log_weights), loc, root)


def _duplication(t: int) -> Array:
    """(T^2, T(T+1)/2): from the lower triangle of a symmetric matrix to all of it."""
    found = np.zeros((t, t, t * (t + 1) // 2))
    for j, (a, b) in enumerate(zip(*np.tril_indices(t), strict=True)):
        found[a, b, j] = found[b, a, j] = 1.0
    return found.reshape(t * t, -1)


def _of_exponential(k: int, t: int) -> Array:
    """Hessian of log |d exp(A)| at A = 0, which is sum over i < j of (lambda_i - lambda_j)^2 / 24."""
    eye = np.eye(t).reshape(-1)
    d = _duplication(t)
    each = np.zeros((t + d.shape[1],) * 2)
    each[t:, t:] = d.T @ (t * np.eye(t * t) - np.outer(eye, eye)) @ d / 12
    found = np.zeros((k - 1 + k * len(each),) * 2)
    for c in range(k):
        part = slice(k - 1 + c * len(each), k - 1 + (c + 1) * len(each))
        found[part, part] = each
    return found


def _derivatives(patterns: list[Pattern], mix: Mixture, law: _Law) -> tuple[Array, Array, float]:
    """Gradient and -H (P,), (P, P), and the score, in the coordinates (a, m_1, A_1, m_2, ...)."""
    k, t = mix.loc.shape
    d = _duplication(t)
    q, w, s = t + d.shape[1], np.exp(mix.log_weights), _sums(patterns, mix, law)
    y0, psi = _whitened_prior(mix, law)
    n_free, eye = k - 1 + k * q, np.eye(t)
    gradient, hessian = np.empty(n_free), np.zeros((n_free, n_free))
    total = s.n.sum() + k * law.alpha
    gradient[: k - 1] = (s.n + law.alpha - w * total)[:-1]
    hessian[: k - 1, : k - 1] = total * (np.outer(w, w) - np.diag(w))[:-1, :-1]
    squares = s.yy + law.kappa * y0[:, :, None] * y0[:, None, :] + psi
    of_a = 0.5 * (squares - s.known - (law.degrees + 1) * eye)
    gradient[k - 1 :] = np.concatenate([s.y + law.kappa * y0, of_a.reshape(k, -1) @ d], 1).reshape(-1)
    second = _of_patterns(patterns, mix, hessian, d)
    for c in range(k):
        at = k - 1 + c * q
        m, a = slice(at, at + t), slice(at + t, at + q)
        hessian[m, m] -= s.known[c] + law.kappa * eye
        across, inner = second[0][c] + law.kappa * np.einsum("ia,b->iab", eye, y0[c]), second[1][c]
        part = across.reshape(t, -1) @ d
        hessian[m, a] -= part
        hessian[a, m] -= part.T
        # of the prior, as of complete rows; and what is linear in Pi and y y' of each row
        own = 0.25 * _both(eye, 2 * s.yy[c] - s.known[c] - squares[c])
        hessian[a, a] += d.T @ (inner + own) @ d
    return gradient, -hessian, s.score


def _both(x: Array, z: Array) -> Array:
    return np.kron(x, z) + np.kron(z, x)


def _of_patterns(patterns: list[Pattern], mix: Mixture, hessian: Array, d: Array) -> tuple[Array, Array]:
    """Sums of r Pi_ia y_b (K, T, T, T) and of r (Pi x Pi - y y' x Pi - Pi x y y') / 2 (K, T^2, T^2).

    The covariance of the scores over the allocations is added to the Hessian.
    """
    k, t = mix.loc.shape
    q, w = t + d.shape[1], np.exp(mix.log_weights)
    first, inner = np.zeros((k, t, t, t)), np.zeros((k, t * t, t * t))
    for seen in seen_of(patterns, mix):
        r, y = seen.share, seen.y
        n = len(y)
        scores = np.empty((n, k, q))
        scores[:, :, :t] = y
        yy = y[:, :, :, None] * y[:, :, None, :]
        scores[:, :, t:] = 0.5 * ((yy - seen.known).reshape(n, k, -1) @ d)
        mean = np.empty((n, hessian.shape[0]))
        mean[:, : k - 1] = (r - w)[:, :-1]
        mean[:, k - 1 :] = (r[:, :, None] * scores).reshape(n, -1)
        hessian -= mean.T @ mean
        for c in range(k):
            at = slice(k - 1 + c * q, k - 1 + (c + 1) * q)
            of_weights = ((c == np.arange(k)) - w)[:-1]
            weighted = r[:, c, None] * scores[:, c]
            hessian[: k - 1, : k - 1] += r[:, c].sum() * np.outer(of_weights, of_weights)
            hessian[: k - 1, at] += np.outer(of_weights, weighted.sum(0))
            hessian[at, : k - 1] += np.outer(weighted.sum(0), of_weights)
            hessian[at, at] += weighted.T @ scores[:, c]
            pi, sum_y = seen.known[c], r[:, c] @ y[:, c]
            sum_yy = (r[:, c, None] * y[:, c]).T @ y[:, c]
            first[c] += pi[:, :, None] * sum_y
            inner[c] += 0.5 * (r[:, c].sum() * np.kron(pi, pi) - _both(sum_yy, pi))
    return first, inner


def _overlapping(patterns: list[Pattern], mix: Mixture) -> tuple[tuple[int, int], ...]:
    shared = sum(s.share.T @ s.share for s in seen_of(patterns, mix))
    n = sum(s.share.sum(0) for s in seen_of(patterns, mix))
    share = shared / np.minimum(n, n[:, None])
    return tuple((i, j) for i in range(len(n)) for j in range(i) if share[i, j] > OVERLAP)
