"""Likelihood, slopes and information of rows with missing cells, by dense algebra of each row's observed cells."""

import tracemalloc

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from bayes_mpt.evidence.factor_posterior import information as of_shares
from bayes_mpt.predictors.gaussian import patterns
from bayes_mpt.predictors.gaussian.incomplete import maximise
from bayes_mpt.predictors.gaussian.patterns import Maps, Patterns
from bayes_mpt.predictors.gaussian.profile import Prior
from bayes_mpt.program.statistics import SufficientStatistics


def table(t=5, k=2, n=12, seed=0):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, t))
    rows[rng.random(rows.shape) < 0.35] = np.nan
    weight = rng.uniform(0.5, 3.0, n)
    maps = Maps(rng.normal(size=(2, t)), rng.normal(size=(2, t, k)), rng.uniform(0.2, 2.0, (2, t)))
    return rows, weight, maps


def flat(maps, b=0):
    return np.concatenate([part[b].ravel() for part in maps])


def parts(theta, t, k):
    return theta[:t], theta[t : t + t * k].reshape(t, k), theta[t + t * k :]


def log_density(rows, weight, theta, k):
    t = rows.shape[1]
    mean, w, noise = parts(theta, t, k)
    cov = w @ w.T + np.diag(noise)
    total = 0.0
    for row, share in zip(rows, weight, strict=True):
        o = ~np.isnan(row)
        if o.any():
            total += share * multivariate_normal(mean[o], cov[np.ix_(o, o)]).logpdf(row[o])
    return total


def fisher(shown, count, theta, k, cov_of):
    """sum_rows 1/2 tr S^-1 dS S^-1 dS' (P, P), dS by differences of a quadratic or smooth function of theta."""
    h = 1e-5
    slopes = [(cov_of(theta + h * e) - cov_of(theta - h * e)) / (2 * h) for e in np.eye(len(theta))]
    found = np.zeros((len(theta), len(theta)))
    for seen, n in zip(shown, count, strict=True):
        o = np.flatnonzero(seen)
        inverse = np.linalg.inv(cov_of(theta)[np.ix_(o, o)])
        turned = np.array([(inverse @ s[np.ix_(o, o)]).ravel() for s in slopes])
        other = np.array([(inverse @ s[np.ix_(o, o)]).T.ravel() for s in slopes])
        found += 0.5 * n * turned @ other.T
    return found


@pytest.mark.parametrize("n_parts", [1, 3])
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_score_and_slopes(k, quick, n_parts, monkeypatch):
    rows, weight, maps = table(k=k)
    rows[3] = np.nan  # a row without any cell counts for nothing
    of = Patterns(rows, weight)
    monkeypatch.setattr(patterns, "CHUNK", 2 * (5 + k**2) * (12 // n_parts))
    found = of.quick_slopes(maps, rough=False) if quick else of.slopes(maps)
    for exact, few in zip(found, of.quick_slopes(maps, rough=True), strict=True):
        np.testing.assert_allclose(few, exact, rtol=1e-4, atol=1e-4)
    for b in range(2):
        theta = flat(maps, b)
        assert found.total[b] == pytest.approx(log_density(rows, weight, theta, k), rel=1e-12)
        steps = 1e-5 * np.eye(len(theta))
        want = [
            (log_density(rows, weight, theta + s, k) - log_density(rows, weight, theta - s, k)) / 2e-5
            for s in steps
        ]
        got = np.concatenate([found.mean[b], found.loading[b].ravel(), found.noise[b]])
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3])
def test_information(k):
    rows, weight, maps = table(k=k)
    t = rows.shape[1]
    patterns, first = Patterns(rows, weight), maps.some(np.array([0]))
    info = patterns.information(first)
    theta = flat(maps)[t:]

    def cov_of(theta):
        w, noise = theta[: t * k].reshape(t, k), theta[t * k :]
        return w @ w.T + np.diag(noise)

    want = fisher(~np.isnan(rows), weight, theta, k, cov_of)
    np.testing.assert_allclose(info.loading.reshape(t * k, -1), want[: t * k, : t * k], rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(info.noise, want[t * k :, t * k :], rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(info.cross.reshape(t * k, t), want[: t * k, t * k :], rtol=1e-7, atol=1e-8)
    mean = np.zeros((t, t))
    for row, n in zip(rows, weight, strict=True):
        o = np.flatnonzero(~np.isnan(row))
        mean[np.ix_(o, o)] += n * np.linalg.inv(cov_of(theta)[np.ix_(o, o)])
    np.testing.assert_allclose(info.mean, mean, rtol=1e-10, atol=1e-12)
    own_mean, own_loading, own_noise = patterns.own_information(first)
    np.testing.assert_allclose(own_mean, np.diag(mean), rtol=1e-10)
    np.testing.assert_allclose(np.append(own_loading, own_noise), np.diag(want), rtol=1e-7)


def test_information_in_shares():
    """In V = psi^-1/2 W and log psi, as the sampled evidence takes it."""
    rows, weight, maps = table(k=2)
    t, k = 5, 2
    v, e = maps.loading[0], np.log(maps.noise[0])

    def cov_of(theta):
        w = np.exp(0.5 * theta[t * k :])[:, None] * theta[: t * k].reshape(t, k)
        return w @ w.T + np.diag(np.exp(theta[t * k :]))

    found, _ = of_shares(v, (~np.isnan(rows)).T.astype(float), weight)
    want = fisher(~np.isnan(rows), weight, np.append(v, e), k, cov_of)
    np.testing.assert_allclose(found, want, rtol=1e-7, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [None, np.array([1.0, 2.0, 0.5, 1.0, 3.0])])
def test_the_maximum_a_posteriori_is_stationary(shape):
    """Under Gamma(2, b) of the logarithms of the noises, or of the one factor."""
    rng = np.random.default_rng(3)
    t, k, n = 5, 2, 80
    rows = rng.normal(size=(n, k)) @ rng.normal(size=(k, t)) + rng.normal(size=(n, t))
    rows[rng.random(rows.shape) < 0.3] = np.nan
    rows = rows[~np.isnan(rows).all(1)]
    rate = 2 / np.nanvar(rows, 0) if shape is None else np.array([1.5])
    found = maximise(SufficientStatistics(rows), k, shape, prior=Prior(2.0, rate, len(rows)))
    assert found.converged
    factor = found.noise if shape is None else found.noise[:1] / shape[:1]

    def posterior(theta):
        log_factor = theta[t + t * k :]
        noise = np.exp(log_factor) * (1 if shape is None else shape)
        density = log_density(rows, np.ones(len(rows)), np.concatenate([theta[: t + t * k], noise]), k)
        return density + (2 * log_factor - rate * np.exp(log_factor)).sum()

    theta = np.concatenate([found.mean, found.loading.ravel(), np.log(factor)])
    slope = np.array(
        [(posterior(theta + s) - posterior(theta - s)) / 2e-5 for s in 1e-5 * np.eye(len(theta))]
    )
    assert np.abs(slope).max() < 2e-3  # of some hundred nats
    for _ in range(20):
        assert posterior(theta + 0.02 * rng.normal(size=len(theta))) < posterior(theta)


def test_diagonals_of_many_tokens_make_no_matrix_of_them():
    t = 3000
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(6, t))
    rows[rng.random(rows.shape) < 0.1] = np.nan
    patterns = Patterns(rows, np.ones(6))
    maps = Maps(np.zeros((1, t)), rng.normal(size=(1, t, 4)), np.ones((1, t)))
    tracemalloc.start()
    patterns.own_information(maps)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * t * t / 4
