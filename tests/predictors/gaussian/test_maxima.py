"""The highest of several maxima: against a quasi-Newton method from 20 random starts, of tables of every kind."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from bayes_mpt import BayesMPT, MarginalLikelihoodSearch
from bayes_mpt.evidence import laplace_diagonal
from bayes_mpt.models import FactorAnalysis
from bayes_mpt.predictors.gaussian import modes, newton
from bayes_mpt.predictors.gaussian.profile import Prior, diagonal
from bayes_mpt.program.statistics import Covariance

KINDS = (
    "strong",
    "weak",
    "few rows",
    "beyond Ledermann",
    "simple structure",
    "far rows",
    "fewer rows than columns",
)
N_TABLES = 4  # of each kind
STARTS = 20
WITHIN = 0.1  # nats


def drawn(kind, index):
    """Rows (N, T) of a factor model, and how many latents are fitted: up to three fewer or two more than there are."""
    rng = np.random.default_rng([KINDS.index(kind), index, 5])
    t, k, n = int(rng.integers(10, 20)), int(rng.integers(2, 7)), int(rng.integers(200, 1000))
    fitted = max(1, k + int(rng.integers(-3, 3)))
    signal = {"strong": 1.0, "weak": 0.35}.get(kind, rng.uniform(0.4, 1.2))
    if kind == "few rows":
        n = int(rng.integers(22, 60))
    if kind == "beyond Ledermann":
        t = int(rng.integers(5, 10))
        fitted = min(t - 2, math.ceil((2 * t + 1 - math.sqrt(8 * t + 1)) / 2) + int(rng.integers(0, 2)))
    if kind == "fewer rows than columns":
        t, n = 24, 18
        fitted = min(fitted, 4)
    loading = signal * rng.normal(size=(t, k))
    if kind == "simple structure":
        loading *= rng.integers(0, k, t)[:, None] == np.arange(k)
    noise = np.exp(rng.uniform(math.log(0.3), math.log(3), t))
    x = rng.normal(size=(n, k)) @ loading.T + np.sqrt(noise) * rng.normal(size=(n, t))
    if kind == "far rows":
        x /= np.sqrt(rng.chisquare(4, size=(n, 1)) / 4)
    return x, fitted


def best_of_random(cov, n_rows, k, prior, rng):
    """Nats, of all rows: the log-density at the best noises that 20 climbs find, and its prior."""
    t, variance = len(cov), np.diag(cov)
    corr = cov / np.sqrt(np.outer(variance, variance))

    def loss_and_slope(log_share):
        share = np.exp(log_share)
        value, u = np.linalg.eigh(corr / np.sqrt(np.outer(share, share)))
        theta = np.where(np.arange(t) >= t - k, np.maximum(value, 1.0), 1.0)
        loss = 0.5 * (log_share.sum() + (np.log(theta) + value / theta).sum())
        # d loss / d log psi_i = 1/2 (1 - sum_j u_ij^2 lambda_j / theta_j)
        slope = 0.5 * (1 - u**2 @ (value / theta))
        if prior:
            loss -= (2 * log_share - 2 * share).sum() / n_rows
            slope -= (2 - 2 * share) / n_rows
        return loss, slope

    least = np.inf
    for i in range(STARTS):
        start = rng.uniform(math.log(1e-3), 0, t) if i % 2 else np.log(rng.uniform(0.02, 1, t))
        found = minimize(
            loss_and_slope,
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=[(math.log(1e-8), 10)] * t,
            options={"maxiter": 300, "ftol": 1e-11, "gtol": 1e-7},
        )
        least = min(least, found.fun)
    own = 2 * np.log(variance).sum() if prior else 0.0  # 2 log psi of the prior
    return -n_rows * (least + 0.5 * (t * math.log(2 * math.pi) + np.log(variance).sum())) + own


def density(cov, n_rows, factors, prior):
    """The same of factors, by the dense covariance."""
    model = np.diag(factors.noise) + factors.loading @ factors.loading.T
    value = (
        -0.5 * n_rows * (np.linalg.slogdet(2 * math.pi * model)[1] + np.trace(np.linalg.solve(model, cov)))
    )
    if prior:
        share = factors.noise / np.diag(cov)
        value += (2 * np.log(factors.noise) - 2 * share).sum()
    return value


def below_best(kind, index, prior):
    """Nats by which what we find lies below the best of 20."""
    x, k = drawn(kind, index)
    n, cov = len(x), np.cov(x.T, bias=True)
    of_noise = Prior(2.0, 2.0 / np.diag(cov), n) if prior else None
    found = diagonal(Covariance(cov), k, prior=of_noise, refuse=False)
    best = best_of_random(cov, n, k, prior, np.random.default_rng(index))
    return best - density(cov, n, found, prior)


@pytest.mark.slow
@pytest.mark.parametrize("prior", [False, True], ids=["likelihood", "posterior"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_best_of_many_starts(kind, prior):
    below = np.array([below_best(kind, index, prior) for index in range(N_TABLES)])
    assert (below <= WITHIN).sum() >= N_TABLES - 1, below
    assert np.median(below) <= 1e-3, below


def test_strong_signals_with_fewer_latents_than_there_are():
    """1000 x 50, ten latents, of which six are fitted: one climb ends 562 nats low."""
    rng = np.random.default_rng(2)
    loading, noise = rng.normal(size=(50, 10)), np.exp(rng.uniform(np.log(0.3), np.log(3), 50))
    x = rng.normal(size=(1000, 10)) @ loading.T + np.sqrt(noise) * rng.normal(size=(1000, 50))
    cov = np.cov(x.T, bias=True)
    start = 1 / np.diag(np.linalg.inv(cov))
    low, found = diagonal(Covariance(cov), 6, start=start), diagonal(Covariance(cov), 6)
    assert density(cov, 1000, found, False) - density(cov, 1000, low, False) == pytest.approx(562.4, abs=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_laplace_begins_where_the_fit_has_been_and_ends_where_it_would_alone(kind, monkeypatch):
    """What the climbs of a fit have found saves those of its evidence, and changes no bit of it."""
    count = []
    decompose = newton.dsyevd
    monkeypatch.setattr(newton, "dsyevd", lambda *a, **b: count.append(1) or decompose(*a, **b))
    for index in range(N_TABLES):
        x, k = drawn(kind, index)
        cov = Covariance(np.cov(x.T, bias=True), maxima={})
        diagonal(cov, k, n_rows=len(x), refuse=False)
        count.clear()
        beside = laplace_diagonal(cov, len(x), k)
        n_beside, _ = len(count), count.clear()
        alone = laplace_diagonal(cov.dense(), len(x), k)
        assert beside.log_evidence == alone.log_evidence
        assert (beside.factors.noise == alone.factors.noise).all()
        assert n_beside < len(count)


@pytest.mark.parametrize("n_latents", [1, 3])
def test_a_step_of_em_is_that_of_the_moments_of_the_latents(n_latents):
    """Rubin & Thayer (1982), with loadings that are best for the noise; under a prior its least is that of a grid."""
    x, _ = drawn("strong", 0)
    corr = np.corrcoef(x.T)
    log_noise = np.log(np.random.default_rng(0).uniform(0.2, 0.8, len(corr)))
    profile = newton.Profile(corr, n_latents, log_noise)
    loading = profile.factors(0).loading
    pull = loading.T @ np.linalg.inv(loading @ loading.T + np.diag(np.exp(log_noise)))  # E[z | x] = pull x
    second = np.eye(n_latents) - pull @ loading + pull @ corr @ pull.T
    new = corr @ pull.T @ np.linalg.inv(second)
    assert np.exp(profile.left()) == pytest.approx(np.diag(corr - new @ pull @ corr), rel=1e-9)
    prior = Prior(2.0, np.full(len(corr), 2.0), 50)
    left, grid = np.exp(profile.left()), np.linspace(-4, 1, 200_001)
    softened = profile.under(prior).left()
    for i in range(3):
        loss = grid / 2 + left[i] / np.exp(grid) / 2 - (2 * grid - 2 * np.exp(grid)) / 50
        assert softened[i] == pytest.approx(grid[loss.argmin()], abs=3e-5)


@pytest.mark.parametrize(("n_tokens", "n_latents", "close"), [(12, 3, 1e-6), (64, 10, 2e-5)])
def test_slope_and_curvature_are_those_of_the_dense_likelihood(n_tokens, n_latents, close):
    """By differences along a line; of many tokens a sum is in single precision. Vectors found later are the same."""
    rng = np.random.default_rng(0)
    corr = np.corrcoef(
        rng.normal(size=(300, 5)) @ rng.normal(size=(5, n_tokens)) + rng.normal(size=(300, n_tokens)),
        rowvar=False,
    )
    log_noise = np.log(rng.uniform(0.3, 0.8, n_tokens))

    def lml(log_noise):
        root = np.exp(log_noise / 2)
        value, vectors = np.linalg.eigh(corr / root / root[:, None])
        loading = root[:, None] * vectors[:, -n_latents:] * np.sqrt(np.maximum(value[-n_latents:] - 1, 0))
        cov = loading @ loading.T + np.diag(np.exp(log_noise))
        fit = np.trace(np.linalg.solve(cov, corr))
        return -0.5 * (n_tokens * math.log(2 * math.pi) + np.linalg.slogdet(cov)[1] + fit)

    here = newton.Profile(corr, n_latents, log_noise)
    later = newton.Profile(corr, n_latents, log_noise, likely_passed=True)
    assert here.lml == pytest.approx(lml(log_noise), rel=1e-13)
    assert later.lml == pytest.approx(here.lml, rel=1e-13)
    for one in (here, later):
        for direction in rng.normal(size=(3, n_tokens)) / math.sqrt(n_tokens):
            up, down = (lml(log_noise + step * direction) for step in (1e-4, -1e-4))
            assert direction @ one.slope() == pytest.approx((up - down) / 2e-4, abs=1e-7)
            bent = (2 * lml(log_noise) - up - down) / 1e-8
            assert direction @ one.curvature() @ direction == pytest.approx(bent, abs=close)


def test_a_climb_is_given_up_only_where_it_would_end_at_the_known_maximum_or_below():
    """From 25 random starts each, of tables with several maxima."""
    given_up = 0
    for index in range(3):
        x, _ = drawn("strong", index)
        corr, rng = np.corrcoef(x.T), np.random.default_rng(index)
        climb = newton.Climb(corr, Prior(2.0, np.full(len(corr), 2.0), len(x)), 1000, 1e-10)
        starts = [climb.at(2, np.log(rng.uniform(0.02, 1, len(corr)))) for _ in range(25)]
        known = climb.top(starts[0])
        for start in starts:
            if climb.top(start, known) is known:
                given_up += 1
                assert climb.top(start).loss > known.loss - 1e-8
    assert given_up > 15


def test_a_candidate_is_the_same_alone_and_among_others():
    x, _ = drawn("strong", 1)
    search = lambda sizes: MarginalLikelihoodSearch(  # noqa: E731
        BayesMPT(FactorAnalysis()), {"model__n_components": sizes}, evidence="laplace"
    ).fit(x)
    among, alone = search([3, 1, 2]), search([2])
    assert among.cv_results_["lml"][2] == alone.cv_results_["lml"][0]


def test_more_columns_than_rows_exchange_a_latent_too():
    """28 x 250, six latents: one climb ends 5.5 nats below the best of 20 random starts."""
    rng = np.random.default_rng([20261, 4, 8])
    t, n, k = int(rng.integers(210, 261)), int(rng.integers(20, 60)), int(rng.integers(4, 11))
    size = rng.uniform(0.4, 1.2)
    loading = size * rng.normal(size=(t, k))
    x = rng.normal(size=(n, k)) @ loading.T
    x += np.exp(rng.uniform(math.log(0.3), math.log(3), t) / 2) * rng.normal(size=(n, t))
    x -= x.mean(0)
    x /= x.std(0)
    _, singular, right = np.linalg.svd(x / math.sqrt(n), full_matrices=False)
    cov = Covariance(rows=singular[: n - 1, None] * right[: n - 1])
    best = max(
        diagonal(cov, 6, start=np.exp(np.random.default_rng(i).uniform(-7, 0, t)), tol=1e-6).lml
        for i in range(20)
    )
    assert (n, t) == (28, 250)
    assert n * (best - diagonal(cov, 6).lml) < 0.1


def test_cost_of_a_latent_left_out_is_that_of_the_dense_covariance():
    x, _ = drawn("strong", 0)
    n, t = x.shape
    corr, k, prior = np.corrcoef(x.T), 3, Prior(2.0, np.full(t, 2.0), n)
    climb = newton.Climb(corr, prior, 100, 1e-8)
    top = climb.top(climb.at(k, np.full(t, -0.7)))
    starts, costs = modes._without_one(climb, top, top)
    loading, share = top.factors(0).loading, top.communality(k)
    dense = []
    for left_out in range(k):
        psi = np.exp(top.log_noise) + share[:, left_out]
        kept = np.delete(loading, left_out, 1)
        cov = kept @ kept.T + np.diag(psi)
        lml = -0.5 * (
            t * math.log(2 * math.pi) + np.linalg.slogdet(cov)[1] + np.trace(np.linalg.solve(cov, corr))
        )
        dense.append(-lml - (2 * np.log(psi) - 2 * psi).sum() / n)
    order = np.argsort(dense)
    np.testing.assert_allclose(costs + top.loss, np.array(dense)[order], rtol=1e-12)
    kept_share = share.sum(1)[:, None] - share[:, order]
    np.testing.assert_allclose(np.exp(starts), (1 - kept_share).T.clip(modes.LEAST, 1.0), rtol=1e-12)
