"""Evidence of a program with its few hyper-parameters integrated.

    log p(y) = log int p(y | theta) p(theta) d theta,    theta (D,) unconstrained: the logarithms of length-scales, say

Climbs from several starts find the modes of p(y | theta) p(theta). Each is the place of a Student-t with the curvature
found there; these and the prior make one mixture q, from which randomised Sobol points are drawn, so that modes that
overlap are not counted twice:

    Z_r = 1/n sum_i p(y | theta_i) p(theta_i) / q(theta_i),    Z = mean of the R replicates Z_r

Where few of the draws are effective or the replicates differ, the mixture is fitted to them by EM and drawn from anew.
Everything is done in units of the prior, phi = (theta - loc) / scale.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp, ndtri
from scipy.stats import chi2
from scipy.stats.qmc import Sobol

from bayes_mpt.diagnostics import BAD_K, pareto_k, replicate_error
from bayes_mpt.evidence.hyperparameters import LogLikelihood, Prior
from bayes_mpt.predictors.nodes.rules import log_t
from bayes_mpt.program.program import ModelError

__all__ = ["IntegratedEvidence", "Mode", "Nodes", "integrate"]

Array = NDArray[np.float64]

LOG_2PI = math.log(2 * math.pi)
REACH = 2.5  # prior standard deviations that a line of starts reaches to both sides
N_LINE = 64  # points on the line along each parameter through the best top; half as many through the prior's centre
N_PRIOR = 64  # starts drawn from the prior
N_CLIMBS = 6  # of the starts, the best
MAX_CLIMBS = 8  # from the peaks beside the best top: a period that is hardly determined has many modes
NEAR = 8.0  # nats below the best top
MAX_ROUNDS = 200
LONGEST_STEP = 2.0  # prior standard deviations
GAIN = 1e-7  # nats that a further step promises, at which a climb ends
DIFFERENCE = 1e-4  # step of the finite differences, prior standard deviations
MET = 0.02  # prior standard deviations between two climbs that are one
SAME = 0.5  # distance of two modes in their own standard deviations, below which they are one
LOWEST = 12.0  # nats below the highest, at which a mode is left out
N_MODES = 10
DEGREES = 5.0  # of freedom of the Student-t
N_REPLICATES = 8
FIRST_POINTS = 32  # of each replicate
MAX_POINTS = 512
MAX_MIXTURE_ROUNDS = 6  # each with a better mixture and more points
PRIOR_SHARE = 0.1  # of the points, drawn from the prior
N_NEW_PARTS = 2  # of the mixture a round
MAX_PARTS = 16
NEW_PART_SHRINKS = 3.0
N_EM = 5
MAX_NODES = 256  # draws that are kept
MIN_SHARE = 0.4  # of the draws that are effective, or the mixture is fitted to them


class Mode(NamedTuple):
    """A maximum of the posterior."""

    theta: Array
    """(D,)"""
    log_joint: float
    """log p(y | theta) + log p(theta)."""
    log_mass: float
    """Laplace's approximation to its part of the log evidence."""
    root: Array
    """(D, D): theta = mode + root e has its curvature, e standard normal; no wider than the prior."""
    definite: bool
    """Whether the curvature was positive in all directions; if not it was set to the prior's there."""


class Nodes(NamedTuple):
    """Weighted draws from the posterior of the parameters: predictions are averaged over them."""

    theta: Array
    """(S, D)"""
    share: Array
    """(S,) adding up to one."""

    @classmethod
    def of(cls, theta: Array, share: Array) -> Nodes:
        """Of draws with their weights; more than `MAX_NODES` are thinned to evenly picked ones that count alike."""
        if len(theta) > MAX_NODES:
            place = (np.arange(MAX_NODES) + 0.5) / MAX_NODES
            picked = np.minimum(np.searchsorted(np.cumsum(share), place), len(theta) - 1)
            index, count = np.unique(picked, return_counts=True)
            return cls(theta[index], count / MAX_NODES)
        some = share > 0
        return cls(theta[some], share[some] / share[some].sum())


class IntegratedEvidence(NamedTuple):
    """An evidence with the hyper-parameters integrated, and how far to trust it."""

    log_evidence: float
    """Nats."""
    se: float
    """Its standard error over replicates."""
    ess: float
    """Effective number of draws."""
    pareto_k: float
    """Tail of their weights; above 0.7 the error is unreliable."""
    n_draws: int
    modes: tuple[Mode, ...]
    """Highest first: the maximum a posteriori."""
    names: tuple[str, ...] = ()
    """Parameters that theta is made of, in its order."""
    nodes: Nodes = Nodes(np.zeros((1, 0)), np.ones(1))
    """The draws, or some of them, that stand for the posterior."""

    @property
    def laplace(self) -> float:
        """Log evidence by Laplace's approximation alone, all modes together."""
        return float(logsumexp([mode.log_mass for mode in self.modes]))


def integrate(
    log_likelihood: LogLikelihood,
    prior: Prior,
    *,
    current: Array | None = None,
    seed: int = 0,
    max_se: float = 0.1,
) -> IntegratedEvidence:
    """Integrate a likelihood over its parameters.

    Parameters
    ----------
    log_likelihood : callable
        ``(theta (B, D), gradient=bool) -> (B,), (B, D)``, all points of a call side by side.
    prior : Prior
        Of theta.
    current : array of shape (D,), optional
        A further start, such as the maximum of the likelihood.
    seed : int
        Of the Sobol points.
    max_se : float
        Nats: the standard error at which no more are drawn.

    Examples
    --------
    >>> def log_likelihood(theta, gradient=True):  # y = 1 ~ N(theta, 1)
    ...     return -0.5 * (theta[:, 0] - 1) ** 2 - 0.5 * np.log(2 * np.pi), 1 - theta
    >>> found = integrate(log_likelihood, Prior(np.zeros(1), np.ones(1)))  # N(1; 0, 2)
    >>> bool(abs(found.log_evidence + 0.25 + 0.5 * np.log(4 * np.pi)) < 2 * found.se < 0.1)
    True
    """
    joint = _Joint(log_likelihood, prior)
    if not len(prior.loc):
        value = float(joint(np.zeros((1, 0)), gradient=False)[0][0])
        return IntegratedEvidence(value, 0.0, 1.0, math.nan, 1, ())
    phi = None if current is None else (current - prior.loc) / prior.scale
    modes = _modes(joint, _tops(joint, phi, seed))
    mixture = _Mixture.around(modes)
    points = FIRST_POINTS
    drawn: list[tuple[Array, Array, _Mixture]] = []
    for round_ in range(MAX_MIXTURE_ROUNDS):
        engines = [
            Sobol(len(prior.loc) + 2, rng=np.random.default_rng([seed, round_, r]))
            for r in range(N_REPLICATES)
        ]
        draws = mixture.place(np.concatenate([engine.random(points) for engine in engines]))
        log_p = joint(draws, gradient=False)[0]
        log_w = (log_p - mixture.log_prob(draws)).reshape(N_REPLICATES, points)
        log_z = logsumexp(log_w, axis=1) - math.log(points)  # (R,)
        top = log_z.max()
        z = np.exp(log_z - top)
        se = replicate_error(z / z.mean())
        share = np.exp(log_w - logsumexp(log_w)).ravel()
        ess = float(1 / np.square(share).sum())
        # Few effective draws hide what the mixture does not reach, and the replicates then agree on too little.
        k = float(pareto_k(log_w.reshape(-1, 1))[0])
        trusted = (ess >= MIN_SHARE * share.size or round_ >= 3) and (not k > BAD_K or round_ >= 4)
        if se <= max_se and trusted:
            break
        # The next mixture depends on these draws and not on its own: each round is an estimate without bias.
        drawn.append((draws, log_p, mixture))
        mixture = mixture.fitted(drawn)
        points = min(2 * points, MAX_POINTS) if round_ else points
    return IntegratedEvidence(
        float(top + math.log(z.mean())),
        se,
        ess,
        k,
        share.size,
        tuple(
            mode._replace(theta=prior.loc + prior.scale * mode.theta, root=prior.scale[:, None] * mode.root)
            for mode in modes
        ),
        nodes=Nodes.of(prior.loc + prior.scale * draws, share),
    )


# ------------------------------------------------------------------------------------------- in units of the prior


class _Joint:
    """log p(y | theta) p(phi), phi = (theta - loc) / scale, with its gradient in phi."""

    def __init__(self, log_likelihood: LogLikelihood, prior: Prior):
        self.log_likelihood, self.prior = log_likelihood, prior

    def __call__(self, phi: Array, gradient: bool = True) -> tuple[Array, Array]:
        prior = self.prior
        theta = prior.loc + prior.scale * phi
        value, grad = self.log_likelihood(theta, gradient=gradient)
        value = value - 0.5 * np.square(phi).sum(1) - 0.5 * phi.shape[1] * LOG_2PI
        grad = prior.scale * grad - phi if gradient else grad
        if prior.correction is not None:
            with torch.enable_grad():
                t = torch.as_tensor(theta).requires_grad_()
                extra = prior.correction(t)
                slope = torch.autograd.grad(extra.sum(), t)[0].numpy()
            value = value + extra.detach().numpy()
            grad = grad + prior.scale * slope if gradient else grad
        return np.where(np.isnan(value), -np.inf, value), grad


def _tops(joint: _Joint, current: Array | None, seed: int) -> tuple[Array, Array]:
    """Tops (B, D) that climbs end at, and their values (B,): first from the prior, then from peaks beside the best."""
    d = len(joint.prior.loc)
    sure = np.zeros((1, d)) if current is None else np.stack([np.zeros(d), np.clip(current, -4, 4)])
    cloud = ndtri(np.clip(Sobol(d, rng=np.random.default_rng([seed, 0])).random(N_PRIOR), 1e-6, 1 - 1e-6))
    on_cloud = joint(cloud, gradient=False)[0]
    best = np.argsort(-on_cloud)[: N_CLIMBS // 2]
    peaks, height = _peaks(joint, np.zeros(d), N_LINE // 2)
    found = np.concatenate([peaks, cloud[best]])
    order = np.argsort(-np.concatenate([height, on_cloud[best]]), kind="stable")
    starts = np.concatenate([sure, found[order][: N_CLIMBS - len(sure)]])
    # off the lines, or a climb may end on a saddle between two modes that mirror each other
    starts += 1e-3 * np.random.default_rng([seed, 1]).normal(size=starts.shape)
    phi, value = _maximize_bfgs(joint, starts)
    top = int(np.argmax(value))
    peaks, height = _peaks(joint, phi[top], N_LINE)
    others = (height > value[top] - NEAR) & (np.linalg.norm(peaks - phi[top], axis=1) > 4 * REACH / N_LINE)
    if not others.any():
        return phi, value
    more = _maximize_bfgs(joint, peaks[others][np.argsort(-height[others])][:MAX_CLIMBS])
    return np.concatenate([phi, more[0]]), np.concatenate([value, more[1]])


def _peaks(joint: _Joint, centre: Array, n: int) -> tuple[Array, Array]:
    """Local maxima along each parameter, the others held: points (M, D) and their values (M,)."""
    d = len(centre)
    lines = np.tile(centre, (d, n, 1))
    lines[np.arange(d), :, np.arange(d)] = np.linspace(-REACH, REACH, n)
    value = joint(lines.reshape(-1, d), gradient=False)[0].reshape(d, n)
    edge = np.pad(value, ((0, 0), (1, 1)), constant_values=-np.inf)
    peak = (value >= edge[:, :-2]) & (value > edge[:, 2:]) & np.isfinite(value)
    return lines[peak], value[peak]


def _maximize_bfgs(joint: _Joint, phi: Array) -> tuple[Array, Array]:
    """BFGS with backtracking from all starts side by side: tops (B, D) and their values (B,).

    Kept by hand: `scipy.optimize.minimize` climbs from one start at a time and ends no climb that has met another; on
    six starts of a Gaussian process of 40 rows it takes 72 calls and 0.33 s to the same top, where these take 11 and
    0.06 s.
    """
    value, grad = joint(phi)
    good = np.isfinite(value) & np.isfinite(grad).all(1)
    if not good.any():
        raise ModelError(
            "the program cannot be evaluated at any start of its hyper-parameters: check its prior"
        )
    phi, value, grad = phi[good], value[good], grad[good]
    n, d = phi.shape
    inverse = np.tile(np.eye(d), (n, 1, 1))  # of minus the Hessian
    fresh, active, ended = np.ones(n, bool), np.ones(n, bool), np.ones(n, bool)
    step, t = np.zeros((n, d)), np.ones(n)
    slope = np.zeros(n)

    def aim(rows: NDArray[np.intp]) -> None:
        step[rows] = np.einsum("bij,bj->bi", inverse[rows], grad[rows])
        norm = np.linalg.norm(step[rows], axis=1)
        limit = np.where(fresh[rows], 0.5, LONGEST_STEP)
        step[rows] *= np.minimum(1, limit / np.maximum(norm, 1e-300))[:, None]
        slope[rows] = (step[rows] * grad[rows]).sum(1)
        t[rows] = 1
        active[rows] = slope[rows] > GAIN

    aim(np.arange(n))
    for round_ in range(MAX_ROUNDS):
        a = active.nonzero()[0]
        if not len(a):
            break
        new = phi[a] + t[a, None] * step[a]
        new_value, new_grad = joint(new)
        finite = np.isfinite(new_value) & np.isfinite(new_grad).all(1)
        up = finite & (new_value >= value[a] + 1e-4 * t[a] * slope[a])
        # the top of the parabola through both values and the slope
        with np.errstate(invalid="ignore", divide="ignore"):
            top = slope[a] * t[a] ** 2 / (2 * (value[a] + slope[a] * t[a] - new_value))
        t[a] = np.clip(np.where(finite, top, 0), 0.1 * t[a], 0.5 * t[a])
        active[a[~up & (t[a] < 1e-8)]] = False
        rows = a[up]
        if not len(rows):
            continue
        s, y = new[up] - phi[rows], grad[rows] - new_grad[up]
        phi[rows], value[rows], grad[rows] = new[up], new_value[up], new_grad[up]
        sy = (s * y).sum(1)
        for i, k in enumerate(rows):
            if sy[i] > 1e-12:
                if fresh[k]:
                    inverse[k] = np.eye(d) * sy[i] / (y[i] @ y[i])
                v = np.eye(d) - np.outer(s[i], y[i]) / sy[i]
                inverse[k] = v @ inverse[k] @ v.T + np.outer(s[i], s[i]) / sy[i]
                fresh[k] = False
        aim(rows)
        # Of climbs that have met, and of those far below, one goes on: the others end at no mode of their own.
        order = np.argsort(-value)
        for j, k in enumerate(order):
            met = np.linalg.norm(phi[order[:j]] - phi[k], axis=1) < MET
            if (met & (value[order[:j]] - value[k] < 10 * MET)).any() or (
                round_ > 10 and value[k] < value[order[0]] - LOWEST - 8
            ):
                active[k], ended[k] = False, False
    return phi[ended], value[ended]


def _modes(joint: _Joint, tops: tuple[Array, Array]) -> list[Mode]:
    """Tops of the climbs, each once, with their curvature."""
    order = np.argsort(-tops[1])
    kept: list[int] = []
    for i in order:
        near = [np.linalg.norm(tops[0][i] - tops[0][k]) < 1e-3 for k in kept]
        if tops[1][i] > tops[1][order[0]] - LOWEST - 8 and not any(near):
            kept.append(int(i))
    phi, value = tops[0][kept], tops[1][kept]
    n, d = phi.shape
    around = phi[:, None, None] + DIFFERENCE * np.array([1, -1])[:, None, None] * np.eye(d)  # (B, 2, D, D)
    grad = joint(around.reshape(-1, d))[1].reshape(n, 2, d, d)
    hessian = (grad[:, 1] - grad[:, 0]) / (2 * DIFFERENCE)
    modes: list[Mode] = []
    for centre, height, h in zip(phi, value, hessian, strict=True):
        h = np.where(np.isfinite(h), (h + h.T) / 2, np.eye(d))
        curvature, axes = np.linalg.eigh(h)
        definite = bool(curvature[0] > 0)
        curvature = np.maximum(curvature, 1.0)
        away = [np.linalg.norm(np.linalg.solve(m.root, centre - m.theta)) for m in modes]
        if any(x < SAME for x in away):
            continue
        log_mass = height + 0.5 * (d * LOG_2PI - np.log(curvature).sum())
        modes.append(Mode(centre, float(height), float(log_mass), axes / np.sqrt(curvature), definite))
    best = max(mode.log_mass for mode in modes)
    return [m for m in modes if m.log_mass > best - LOWEST or m is modes[0]][:N_MODES]


class _Mixture(NamedTuple):
    """Student-t parts, and last the prior, a standard normal."""

    share: Array
    """(M,) of all parts."""
    centre: Array
    """(M - 1, D)"""
    root: Array
    """(M - 1, D, D)"""

    @classmethod
    def around(cls, modes: list[Mode]) -> _Mixture:
        n = len(modes)
        share = np.append(np.full(n, (1 - PRIOR_SHARE) / n), PRIOR_SHARE)
        return cls(share, np.array([m.theta for m in modes]), np.array([m.root for m in modes]))

    def place(self, u: Array) -> Array:
        """Points of the mixture (N, D) from uniform ones (N, D + 2): the first number chooses the part."""
        u = np.clip(u, 1e-9, 1 - 1e-9)
        part = np.searchsorted(np.cumsum(self.share)[:-1], u[:, 0])
        out = ndtri(u[:, 2:])
        t = (part < len(self.centre)).nonzero()[0]
        wide = out[t] * np.sqrt(DEGREES / chi2.ppf(u[t, 1:2], DEGREES))
        out[t] = self.centre[part[t]] + np.einsum("nij,nj->ni", self.root[part[t]], wide)
        return out

    def log_parts(self, phi: Array) -> tuple[Array, Array]:
        """log share + log density of each part (N, M), and the squared distance from the Student-t parts (N, M - 1)."""
        d = phi.shape[1]
        white = np.linalg.solve(self.root, np.moveaxis(phi[:, None] - self.centre, 0, -1))  # (M - 1, D, N)
        square = np.square(white).sum(1).T
        t = log_t(torch.as_tensor(white.mT), DEGREES).numpy().T - np.linalg.slogdet(self.root)[1]
        normal = -0.5 * np.square(phi).sum(1) - 0.5 * d * LOG_2PI
        return np.column_stack([t, normal]) + np.log(self.share), square

    def log_prob(self, phi: Array) -> Array:
        return logsumexp(self.log_parts(phi)[0], axis=1)

    def fitted(self, drawn: list[tuple[Array, Array, _Mixture]]) -> _Mixture:
        """Nearer to the posterior: the parts, and some new ones, moved by EM on all draws so far with their weights."""
        phi = np.concatenate([d[0] for d in drawn])
        log_p = np.concatenate([d[1] for d in drawn])
        size = np.array([len(d[0]) for d in drawn])
        log_q = logsumexp(
            [m.log_prob(phi) + math.log(n / size.sum()) for n, (_, _, m) in zip(size, drawn, strict=True)],
            axis=0,
        )
        log_w = log_p - log_q
        log_w -= logsumexp(log_w)
        # a few draws with great weights say where to look, not how much is there
        log_w = np.minimum(log_w, -0.5 * math.log(len(log_w)))
        w = np.exp(log_w - logsumexp(log_w))
        d, ess = phi.shape[1], 1 / np.square(w).sum()
        centre, root, share = self.centre, self.root, self.share
        for _ in range(N_NEW_PARTS):  # at the draw that the mixture misses most
            if len(centre) >= MAX_PARTS:
                break
            miss = log_p - _Mixture(share, centre, root).log_prob(phi)
            i = int(np.argmax(np.where(w > 0.2 / len(w), miss, -np.inf)))
            whole = phi - w @ phi
            cov = (whole * w[:, None]).T @ whole / NEW_PART_SHRINKS**2 + 1e-6 * np.eye(d)
            centre, root = (
                np.concatenate([centre, phi[i : i + 1]]),
                np.concatenate([root, np.linalg.cholesky(cov)[None]]),
            )
            n = len(centre)
            share = np.append(np.full(n, (1 - PRIOR_SHARE) / n), PRIOR_SHARE)
        before = root @ root.mT
        mixture = _Mixture(share, centre, root)
        for _ in range(N_EM):
            log_r, square = mixture.log_parts(phi)
            r = w[:, None] * np.exp(log_r - logsumexp(log_r, axis=1, keepdims=True))[:, :-1]  # (N, M - 1)
            u = r * (DEGREES + d) / (DEGREES + square)
            n = ess * r.sum(0)
            centre = (ess * u.T @ phi + mixture.centre) / (ess * u.sum(0) + 1)[:, None]
            off = phi[:, None] - centre  # (N, M - 1, D)
            cov = ess * np.einsum("nm,nmi,nmj->mij", u, off, off) + (d + 2) * before
            root = np.linalg.cholesky(cov / (n + d + 2)[:, None, None])
            share = (n + 1) / (n + 1).sum() * (1 - PRIOR_SHARE)
            mixture = _Mixture(np.append(share, PRIOR_SHARE), centre, root)
        return mixture


# ------------------------------------------------------------------------------------------------------- of a program
