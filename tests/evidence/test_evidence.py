"""The Laplace evidence: its determinant by numerical differentiation, its value by brute-force integration."""

import math

import numpy as np
import pytest
from scipy.linalg import null_space, qr
from scipy.optimize import minimize
from scipy.special import gammaln
from scipy.stats import gamma

from bayes_mpt import BayesMPT
from bayes_mpt.evidence.laplace import laplace_diagonal, laplace_proportional, log_volume
from bayes_mpt.models import PPCA, FactorAnalysis

SHAPE = 2.0  # psi_i ~ Gamma(2, 2 / var_i), a priori


def sample_covariance(seed, t, k, n, isotropic, signal=1.0):
    rng = np.random.default_rng(seed)
    w = signal * rng.normal(size=(t, k))
    noise = np.ones(t) if isotropic else rng.uniform(0.3, 2.0, t)
    x = rng.normal(size=(n, k)) @ w.T + np.sqrt(noise) * rng.normal(size=(n, t))
    return x, np.cov(x.T, bias=True)


def log_likelihood(cov, n, model):
    """n rows with this covariance under N(0, model); model (..., T, T)."""
    log_det = np.linalg.slogdet(2 * math.pi * model)[1]
    return (
        -0.5
        * n
        * (log_det + np.trace(np.linalg.solve(model, np.broadcast_to(cov, model.shape)), axis1=-2, axis2=-1))
    )


def model_covariance(v, log_noise):
    """psi^1/2 (I + V V') psi^1/2."""
    root = np.exp(log_noise / 2)
    return root[..., :, None] * (np.eye(v.shape[-2]) + v @ np.swapaxes(v, -1, -2)) * root[..., None, :]


class Setting:
    """Prior and parametrisation of one kind, written out again: psi = exp(design @ eta), V = psi^-1/2 W.

    W_ik ~ N(0, tau^2 var_i) and psi_i ~ Gamma(2, 2 / var_i); in PPCA var_i is the mean variance.
    """

    def __init__(self, cov, n, k, kind):
        self.cov, self.n, self.k, self.kind, self.t = cov, n, k, kind, len(cov)
        self.design = np.eye(self.t) if kind == "fa" else np.ones((self.t, 1))
        self.variance = np.diag(cov) if kind == "fa" else np.diag(cov).mean(keepdims=True)

    def evidence(self):
        if self.kind == "fa":
            return laplace_diagonal(self.cov, self.n, self.k)
        return laplace_proportional(self.cov, self.n, self.k, np.ones(self.t))

    def log_prior_noise(self, eta):
        """Density of eta = log psi: that of psi times psi."""
        return (gamma(SHAPE, scale=self.variance / SHAPE).logpdf(np.exp(eta)) + eta).sum(-1)

    def log_noise(self, eta):
        return eta @ self.design.T

    def share(self, eta):
        """(..., T) psi / var."""
        return (np.exp(eta) / self.variance) @ self.design.T

    def tau2(self):
        """Empirical: the mean of W^2 / var at the point of expansion."""
        v, eta = self.point()
        return (v**2 * self.share(eta)[:, None]).mean()

    def log_prior_loading(self, v, eta):
        """Density of V given the noise: V_ik ~ N(0, tau^2 var_i / psi_i); and of any V turned by a rotation."""
        sd = np.sqrt(self.tau2() / self.share(eta))[..., None]
        return (-0.5 * (v / sd) ** 2 - np.log(sd) - 0.5 * math.log(2 * math.pi)).sum((-1, -2))

    def log_likelihood(self, v, eta):
        return log_likelihood(self.cov, self.n, model_covariance(v, self.log_noise(eta)))

    def point(self):
        """V (T, K) and eta at the point of expansion."""
        factors = self.evidence().factors
        v = factors.loading / np.sqrt(factors.noise)[:, None]
        eta = np.log(factors.noise) if self.kind == "fa" else np.log(factors.noise[:1])
        return v, eta


KINDS = ["ppca", "fa"]


def laplace_by_differences(s):
    """design.md's formula with nothing done cleverly: Fisher information by central differences, explicit tangents."""
    v, eta = s.point()
    t, k, p = s.t, s.k, len(eta)
    theta = np.concatenate([v.ravel(), eta])
    d = len(theta)

    def model(th):
        return model_covariance(th[: t * k].reshape(t, k), s.log_noise(th[t * k :]))

    step = 1e-5
    slopes = [(model(theta + step * e) - model(theta - step * e)) / (2 * step) for e in np.eye(d)]
    inverse = np.linalg.inv(model(theta))
    fisher = 0.5 * np.array([[np.trace(inverse @ a @ inverse @ b) for b in slopes] for a in slopes])
    precision = np.zeros(d)
    precision[: t * k] = s.share(eta).mean() / s.tau2()  # the mean over the tokens
    precision[t * k :] = SHAPE * np.exp(eta) / s.variance
    h = s.n * fisher + np.diag(precision)
    tangents = []
    for a in range(k):
        for b in range(a):
            skew = np.zeros((k, k))
            skew[a, b], skew[b, a] = 1, -1
            tangents.append(np.concatenate([(v @ skew).ravel(), np.zeros(p)]))
    value = float(s.log_likelihood(v, eta) + s.log_prior_loading(v, eta) + s.log_prior_noise(eta))
    if tangents:
        g = np.array(tangents).T
        q = null_space(g.T)
        value += 0.5 * np.linalg.slogdet(g.T @ g)[1]
        # the orbit is flat: the information does not see the tangents
        np.testing.assert_allclose(fisher @ g, 0, atol=1e-6)
    else:
        g, q = np.zeros((d, 0)), np.eye(d)
    value += 0.5 * (d - g.shape[1]) * math.log(2 * math.pi) - 0.5 * np.linalg.slogdet(q.T @ h @ q)[1]
    return value + {0: 0.0, 1: math.log(2), 2: math.log(4 * math.pi), 3: math.log(16 * math.pi**2)}[k]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t, k, n", [(5, 1, 100), (6, 2, 400), (7, 3, 60), (6, 0, 50), (4, 3, 80)])
def test_against_differences_and_explicit_tangents(kind, t, k, n):
    # four columns hold one factor of their own noise and no more: 3 loadings a column there are PPCA's alone
    if kind == "fa" and (t, k) == (4, 3):
        pytest.skip("surplus loadings vanish: another k")
    _, cov = sample_covariance(t + k, t, max(k, 1), n, kind == "ppca", signal=1.5)
    s = Setting(cov, n, k, kind)
    if k == 0:
        eta = s.point()[1]
        curvature = n / 4 * s.design.T @ (np.eye(t) + np.eye(t)) @ s.design
        curvature += np.diag(SHAPE * np.exp(eta) / s.variance)
        want = log_likelihood(cov, n, np.diag(np.exp(s.log_noise(eta)))) + s.log_prior_noise(eta)
        want += len(eta) / 2 * math.log(2 * math.pi) - 0.5 * np.linalg.slogdet(curvature)[1]
    else:
        assert np.linalg.matrix_rank(s.point()[0], tol=1e-3) == k
        want = laplace_by_differences(s)
    assert s.evidence().log_evidence == pytest.approx(float(want), abs=1e-5)


@pytest.mark.parametrize("k, volume", [(1, 2), (2, 4 * math.pi), (3, 16 * math.pi**2)])
def test_volume_of_the_orthogonal_group(k, volume):
    assert log_volume(k) == pytest.approx(math.log(volume), abs=1e-13)


@pytest.mark.parametrize("k", range(2, 9))
def test_volumes_are_products_of_spheres(k):
    """O(k) / O(k - 1) is the sphere in k dimensions, of area 2 pi^(k/2) / Gamma(k/2)."""
    sphere = math.log(2) + k / 2 * math.log(math.pi) - math.lgamma(k / 2)
    assert log_volume(k) - log_volume(k - 1) == pytest.approx(sphere, abs=1e-12)


# ------------------------------------------------------------------------------------------- the point of expansion


def test_ppca_expands_at_the_maximum_of_the_likelihood():
    _, cov = sample_covariance(0, 6, 2, 200, True)
    found = laplace_proportional(cov, 200, 2, np.ones(6))
    value = np.linalg.eigvalsh(cov)[::-1]
    noise = value[2:].mean()
    best = -0.5 * (6 * math.log(2 * math.pi) + np.log(value[:2]).sum() + 4 * math.log(noise) + 6)
    assert found.lml == pytest.approx(200 * best, abs=1e-8)
    np.testing.assert_allclose(found.factors.noise, noise, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2])
def test_factor_analysis_expands_at_the_map_of_its_noise(k):
    n = 80
    _, cov = sample_covariance(1, 6, 2, n, False)
    found = laplace_diagonal(cov, n, k)
    s = Setting(cov, n, k, "fa")

    def loss(theta):
        v, eta = theta[: 6 * k].reshape(6, k), theta[6 * k :]
        return -float(s.log_likelihood(v, eta) + s.log_prior_noise(eta))

    v, eta = s.point()
    at_theirs = -loss(np.concatenate([v.ravel(), eta]))
    rng = np.random.default_rng(9)
    starts = [np.concatenate([v.ravel() + 0.1, eta - 0.1]), 0.5 * rng.normal(size=6 * k + 6)]
    best = max(
        -minimize(loss, start, method="BFGS", options={"gtol": 1e-6, "maxiter": 2000}).fun for start in starts
    )
    assert at_theirs == pytest.approx(best, abs=1e-5)
    want = float(s.log_likelihood(v, eta))
    assert found.lml == pytest.approx(want, abs=1e-7)


# ------------------------------------------------------------------------------------------------ brute force


def brute_force(s, n_draws=40_000):
    """log of the integral over loadings and noise, tau^2 as at the point of expansion.

    Every V is L O, L lower trapezoidal with a positive diagonal and O orthogonal, dV = prod_i l_ii^(K - i) dL dO
    (Muirhead 1982, 2.1.13), and the integrand does not see O: the orbit contributes vol O(K). Over L and eta there is
    one mode, integrated by importance sampling from a Student t whose scale comes from numerical second differences.
    """
    # the order of the tokens is free: first those whose loadings pin the rotation best, so that l_ii stays away from 0
    first = qr(s.point()[0].T, pivoting=True)[2]
    s = Setting(s.cov[np.ix_(first, first)], s.n, s.k, s.kind)
    v, eta = s.point()
    tau2, (t, k) = s.tau2(), v.shape
    where = np.array([(i, j) for i in range(t) for j in range(k) if j <= i])
    on_diagonal = np.flatnonzero(where[:, 0] == where[:, 1])
    power = k - 1 - np.arange(k)

    def log_integrand(theta):
        lower, e = np.zeros((*theta.shape[:-1], t, k)), theta[..., len(where) :]
        lower[..., where[:, 0], where[:, 1]] = theta[..., : len(where)]
        diagonal = theta[..., on_diagonal]
        sd = np.sqrt(tau2 / s.share(e))[..., None]  # rows of L are as long as those of V = L O
        prior = (-0.5 * (lower / sd) ** 2 - np.log(sd) - 0.5 * math.log(2 * math.pi)).sum((-1, -2))
        jacobian = (power * np.log(np.maximum(diagonal, 1e-300))).sum(-1)
        value = s.log_likelihood(lower, e) + prior + jacobian + s.log_prior_noise(e)
        return np.where((diagonal > 0).all(-1), value, -1e10)

    r = np.linalg.qr(v.T, mode="r")  # v = (q r)' = r' q'
    lower = (r.T * np.sign(np.diag(r)))[where[:, 0], where[:, 1]]
    start = np.concatenate([lower, eta])
    mode = minimize(lambda th: -log_integrand(th), start, method="BFGS", options={"gtol": 1e-4}).x
    d, step = len(mode), 1e-3
    e = step * np.eye(d)
    pairs = mode + np.array([[[a + b, a - b, b - a, -a - b] for b in e] for a in e])
    f = log_integrand(pairs)
    h = -(f[..., 0] - f[..., 1] - f[..., 2] + f[..., 3]) / (4 * step**2)
    root = np.linalg.cholesky(np.linalg.inv((h + h.T) / 2))
    rng, df = np.random.default_rng(0), 4
    z = rng.normal(size=(n_draws, d)) / np.sqrt(rng.chisquare(df, n_draws) / df)[:, None]
    log_q = (
        gammaln((df + d) / 2) - gammaln(df / 2) - d / 2 * math.log(df * math.pi)
        - np.log(np.diag(root)).sum() - (df + d) / 2 * np.log1p((z**2).sum(1) / df)
    )  # fmt: skip
    log_w = np.concatenate([log_integrand(mode + part @ root.T) for part in np.array_split(z, 10)]) - log_q
    w = np.exp(log_w - log_w.max())
    assert w.sum() ** 2 / (w**2).sum() > 0.05 * n_draws  # effective draws
    volume = {1: 2.0, 2: 4 * math.pi}[k]
    return log_w.max() + math.log(w.mean()) + math.log(volume)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind, t, k", [("ppca", 4, 1), ("ppca", 5, 2), ("fa", 6, 1), ("fa", 6, 2)])
def test_against_brute_force_integration(kind, t, k, seed):
    """Within hundredths (PPCA) or tenths (FA, expanded at a MAP of the noise alone) of a nat at N = 400.

    A forgotten orbit would cost 0.7 (K = 1) or 2.5 (K = 2).
    """
    _, cov = sample_covariance(10 + seed, t, k, 400, kind == "ppca", signal=1.5)
    s = Setting(cov, 400, k, kind)
    got, want = s.evidence().log_evidence, brute_force(s)
    assert got == pytest.approx(want, abs=0.06 if kind == "ppca" else 0.3)
    assert got < want + 0.05  # it lies low, not high


def test_the_error_falls_with_the_rows():
    errors = []
    for n in (100, 1600):
        _, cov = sample_covariance(3, 4, 1, n, True, signal=1.5)
        s = Setting(cov, n, 1, "ppca")
        errors.append(abs(s.evidence().log_evidence - brute_force(s)))
    assert errors[1] < 0.5 * errors[0] + 0.01
    assert errors[1] < 0.05


# --------------------------------------------------------------------------------------------------- equivariance


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [0, 1, 3])
def test_units(kind, k, scale):
    """x -> c x: minus N T log c, whatever the dimension, so that no unit favours a candidate."""
    _, cov = sample_covariance(5, 8, 3, 100, kind == "ppca")
    a, b = Setting(cov, 100, k, kind).evidence(), Setting(cov * scale**2, 100, k, kind).evidence()
    assert b.log_evidence == pytest.approx(a.log_evidence - 800 * math.log(scale), abs=1e-5)


def test_units_of_each_column():
    _, cov = sample_covariance(5, 8, 3, 100, False)
    by = np.logspace(-8, 8, 8)
    a, b = (laplace_diagonal(c, 100, 2).log_evidence for c in (cov, cov * by * by[:, None]))
    assert b == pytest.approx(a - 100 * np.log(by).sum(), abs=1e-4)


def test_rotations_of_the_tokens():
    """PPCA does not know the axes."""
    _, cov = sample_covariance(6, 7, 2, 100, True)
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(7, 7)))[0]
    a, b = (laplace_proportional(c, 100, 2, np.ones(7)).log_evidence for c in (cov, q @ cov @ q.T))
    assert a == pytest.approx(b, abs=1e-8)


def test_known_ratios_of_the_noise_are_units():
    """Noise c * shape is PPCA in the units sqrt(shape)."""
    _, cov = sample_covariance(7, 6, 2, 100, False)
    shape = np.array([0.5, 1.0, 2.0, 4.0, 8.0, 1.0])
    a = laplace_proportional(cov, 100, 2, shape)
    b = laplace_proportional(cov / np.sqrt(shape) / np.sqrt(shape)[:, None], 100, 2, np.ones(6))
    assert a.log_evidence == pytest.approx(b.log_evidence - 50 * np.log(shape).sum(), abs=1e-8)


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_the_estimators_evidence(k):
    x, cov = sample_covariance(8, 7, 2, 90, True)
    for model, want in (
        (PPCA(k), laplace_proportional(cov, 90, k, np.ones(7))),
        (FactorAnalysis(k), laplace_diagonal(cov, 90, k)),
    ):
        got = BayesMPT(model).fit(x + 1e3).laplace(x + 1e3)
        assert got.log_evidence == pytest.approx(want.log_evidence, abs=1e-5)


def test_auto_takes_the_dimension_of_the_highest_evidence():
    x, cov = sample_covariance(2, 8, 3, 300, True, signal=1.5)
    model = BayesMPT().fit(x)
    want = {k: laplace_proportional(cov, 300, k, np.ones(8)).log_evidence for k in range(8)}
    assert model.n_components_ == max(want, key=want.get) == 3
    for k, value in want.items():
        assert model.selection_[k] == pytest.approx(value, abs=1e-6)


def test_a_surplus_latent_costs_and_a_missing_one_costs_more():
    x, _ = sample_covariance(2, 8, 3, 300, True, signal=1.5)
    score = [laplace_proportional(np.cov(x.T, bias=True), 300, k, np.ones(8)).log_evidence for k in range(7)]
    assert int(np.argmax(score)) == 3
    assert score[3] - score[2] > 10 and 1 < score[3] - score[4] < 30
