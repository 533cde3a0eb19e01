"""The sampled evidence: against draws from the prior, quadrature and dense algebra, none of which know a slice."""

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import logsumexp
from scipy.stats import gamma, multivariate_normal

from bayes_mpt import BayesMPT
from bayes_mpt.estimators.integrals import sampled_evidence
from bayes_mpt.evidence import FactorPrior, factor_prior, sample_evidence
from bayes_mpt.evidence.factor_posterior import CompletePosterior
from bayes_mpt.evidence.incomplete_posterior import IncompletePosterior
from bayes_mpt.evidence.slice import Slice
from bayes_mpt.models import PPCA, FactorAnalysis
from bayes_mpt.program.statistics import SufficientStatistics

KAPPA, SCALE, DEGREES, SHAPE = 0.01, 0.3, 3, 2.0


def table(seed, n, t, k, holes=0.0, signal=0.8):
    rng = np.random.default_rng(seed)
    x = signal * rng.normal(size=(n, k)) @ rng.normal(size=(k, t)) + rng.normal(size=(n, t)) + 2.0
    x[rng.random(x.shape) < holes] = np.nan
    return x[~np.isnan(x).all(1)]


def evidence(x, k, prior, shape=None, **how):
    return sample_evidence(SufficientStatistics(x), k, prior, shape=shape, **how)


def from_prior(x, k, prior, shape, n_draws, seed=0):
    """Log likelihoods of prior draws, and the draws' covariances: dense, over all cells of the table together."""
    rng = np.random.default_rng(seed)
    t = x.shape[1]
    if shape is None:
        units = prior.variances
        psi = units / SHAPE * rng.gamma(SHAPE, size=(n_draws, t))
    else:
        units = shape * (prior.variances / shape).mean()
        psi = units / SHAPE * rng.gamma(SHAPE, size=(n_draws, 1))
    spread = SCALE * np.sqrt(DEGREES / rng.chisquare(DEGREES, size=(n_draws, 1, 1)))
    w = spread * np.sqrt(units)[:, None] * rng.normal(size=(n_draws, t, k))
    cov = w @ w.transpose(0, 2, 1) + psi[:, :, None] * np.eye(t)
    row, column = np.nonzero(~np.isnan(x))
    off = (x - prior.center)[row, column]
    same = (row[:, None] == row) + 1 / KAPPA
    joint = cov[:, column[:, None], column] * same  # of cells (r, i), (s, j): C_ij ([r = s] + 1 / kappa)
    root = np.linalg.cholesky(joint)
    log_det = 2 * np.log(np.diagonal(root, axis1=1, axis2=2)).sum(1)
    quadratic = (
        np.linalg.solve(joint, np.broadcast_to(off, (n_draws, len(off)))[:, :, None])[:, :, 0] * off
    ).sum(1)
    return -0.5 * (len(off) * math.log(2 * math.pi) + log_det + quadratic), cov


def truth_from_prior(x, k, prior, shape, n_draws=40_000, n_chunks=8):
    """Log evidence, its standard error, and the posterior mean covariance."""
    parts = [from_prior(x, k, prior, shape, n_draws // n_chunks, seed) for seed in range(n_chunks)]
    log_l = np.concatenate([p[0] for p in parts])
    cov = np.concatenate([p[1] for p in parts])
    weight = np.exp(log_l - log_l.max())
    value = math.log(weight.mean()) + log_l.max()
    return (
        value,
        weight.std() / weight.mean() / math.sqrt(len(weight)),
        np.tensordot(weight / weight.sum(), cov, 1),
    )


CASES = {
    "factor analysis": (1, 7, 3, 1, 0.0, None),
    "two latents": (2, 6, 4, 2, 0.0, None),
    "ppca": (3, 7, 3, 2, 0.0, np.ones(3)),
    "known ratios": (4, 7, 3, 1, 0.0, np.array([1.0, 2.0, 0.5])),
    "holes": (5, 8, 3, 1, 0.25, None),
    "holes, two latents": (6, 7, 4, 2, 0.25, None),
    "holes, ppca": (7, 8, 3, 1, 0.25, np.ones(3)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_against_draws_from_the_prior(case):
    seed, n, t, k, holes, shape = CASES[case]
    x = table(seed, n, t, k, holes)
    prior = FactorPrior(np.full(t, 1.5), np.linspace(1.5, 2.5, t))
    truth, truth_se, cov = truth_from_prior(x, k, prior, shape)
    assert truth_se < 0.03
    found = evidence(x, k, prior, shape, se=0.05, max_particles=2048, seed=4)
    assert found.log_evidence == pytest.approx(truth, abs=3 * math.hypot(found.se, truth_se))
    assert found.se < 0.15
    sd = np.sqrt(np.diag(cov))
    assert np.abs((found.covariance - cov) / sd / sd[:, None]).max() < 0.12


@pytest.mark.parametrize("shape", [None, np.array([1.0, 3.0])])
@pytest.mark.parametrize("holes", [0.0, 0.3])
def test_without_latents_is_a_product_of_integrals(shape, holes):
    x = table(8, 9, 2, 1, holes)
    prior = FactorPrior(np.array([1.0, 2.0]), np.array([2.0, 3.0]))
    cells = [x[~np.isnan(x[:, i]), i] for i in range(2)]

    def likelihood(i, psi):
        c = cells[i]
        return multivariate_normal(np.full(len(c), prior.center[i]), psi * (np.eye(len(c)) + 1 / KAPPA)).pdf(
            c
        )

    if shape is None:
        parts = [
            quad(
                lambda p, i=i, v=v: likelihood(i, p) * gamma(SHAPE, scale=v / SHAPE).pdf(p),
                0,
                60,
                points=[1, 5],
            )[0]
            for i, v in enumerate(prior.variances)
        ]
    else:
        unit = (prior.variances / shape).mean()
        density = gamma(SHAPE, scale=unit / SHAPE).pdf
        parts = [
            quad(
                lambda c: likelihood(0, c * shape[0]) * likelihood(1, c * shape[1]) * density(c),
                0,
                60,
                points=[1, 5],
            )[0]
        ]
    found = evidence(x, 0, prior, shape)
    assert found.log_evidence == pytest.approx(np.log(parts).sum(), abs=1e-6)
    assert found.se == 0


def test_one_column_is_the_same_model_for_both_kinds():
    x = table(9, 30, 1, 1)
    prior = factor_prior(x)
    one, other = (evidence(x, 0, prior, shape) for shape in (None, np.ones(1)))
    assert one.log_evidence == pytest.approx(other.log_evidence, abs=1e-12)


@pytest.mark.slow
def test_two_columns_by_quadrature():
    """PPCA of two columns, K = 1: polar loadings and one noise on a grid."""
    x = table(10, 40, 2, 1)
    prior = factor_prior(x)
    n, unit = len(x), prior.variances.mean()
    off = x.mean(0) - prior.center
    scatter = n * np.cov(x.T, bias=True) + n * KAPPA / (n + KAPPA) * np.outer(off, off)
    log_r, angle = np.linspace(-9, 4, 260), np.linspace(0, math.pi, 90, endpoint=False)
    log_psi = np.linspace(-4, 3, 160) + math.log(unit)
    r, a, psi = np.exp(log_r)[:, None, None], angle[:, None], np.exp(log_psi)
    along = np.cos(a) ** 2 * scatter[0, 0] + np.sin(a) ** 2 * scatter[1, 1] + np.sin(2 * a) * scatter[0, 1]
    log_det = np.log(psi) + np.log(psi + r**2)
    trace = along / (psi + r**2) + (np.trace(scatter) - along) / psi
    log_l = -0.5 * (n * (2 * math.log(2 * math.pi) + log_det) + trace) + math.log(KAPPA / (n + KAPPA))
    # W / unit^1/2 ~ bivariate t, in polar coordinates r dr da = r^2 dlog r da; angles from 0 to 2 pi
    s2 = SCALE**2 * unit
    log_t = -math.log(2 * math.pi * s2) - (DEGREES + 2) / 2 * np.log1p(r**2 / s2 / DEGREES) + 2 * np.log(r)
    log_noise = gamma(SHAPE, scale=unit / SHAPE).logpdf(psi) + np.log(psi)
    step = (log_r[1] - log_r[0]) * (2 * angle[1]) * (log_psi[1] - log_psi[0])
    truth = logsumexp(log_l + log_t + log_noise) + math.log(step)
    found = evidence(x, 1, prior, np.ones(2), se=0.03, max_particles=4096, seed=1)
    assert found.log_evidence == pytest.approx(truth, abs=3 * found.se)
    assert found.se < 0.06


@pytest.mark.parametrize("shape", [None, np.ones(5)])
def test_complete_rows_by_both_ways(shape):
    """The mean in closed form, and as coordinates: a row without any cell, of probability one, makes the difference."""
    x = table(11, 60, 5, 2)
    prior = factor_prior(x)
    one = evidence(x, 2, prior, shape, seed=1)
    other = evidence(np.vstack([x, np.full((1, 5), np.nan)]), 2, prior, shape, seed=2)
    assert one.log_evidence == pytest.approx(other.log_evidence, abs=3 * math.hypot(one.se, other.se))


def test_no_units_and_no_order():
    """Columns in other units move it by the Jacobian; rows and columns in another order not at all."""
    x = table(12, 80, 5, 2)
    unit = np.array([1e-3, 1.0, 50.0, 1e4, 0.2])
    y = (x * unit)[::-1, [3, 1, 4, 0, 2]]
    one, other = (evidence(z, 2, factor_prior(z), seed=s) for s, z in enumerate((x, y)))
    wanted = one.log_evidence - len(x) * np.log(unit).sum()
    assert other.log_evidence == pytest.approx(wanted, abs=3 * math.hypot(one.se, other.se))


def test_another_scale_of_the_prior():
    """What is told of it by reweighting is what a run under that prior finds."""
    x = table(13, 100, 6, 2)
    prior = factor_prior(x)
    found = evidence(x, 2, prior, se=0.05)
    for factor, told in zip((0.5, 2.0), found.scale_sensitivity, strict=True):
        other = evidence(x, 2, prior.scaled(factor), se=0.05, seed=1)
        error = 3 * math.hypot(found.se, other.se) + 0.1
        assert other.log_evidence - found.log_evidence == pytest.approx(told, abs=error)


@pytest.mark.slow
def test_same_seed_same_bits():
    x = table(14, 50, 5, 2, holes=0.1)
    prior = factor_prior(x)
    one, again, other = (evidence(x, 2, prior, seed=s) for s in (5, 5, 6))
    assert np.array_equal(one.islands, again.islands) and np.array_equal(
        one.draws.loadings, again.draws.loadings
    )
    assert one.log_evidence != other.log_evidence
    assert one.log_evidence == pytest.approx(other.log_evidence, abs=3 * math.hypot(one.se, other.se))


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("holes", [0.0, 0.1])
def test_draws_are_of_the_means_that_are_told(k, holes):
    x = table(15, 80, 5, k, holes)
    found = evidence(x, k, factor_prior(x), se=0.05, seed=1)
    draws = found.draws
    w, psi = draws.loadings, draws.noise
    n = min(256, found.n_particles or 256)
    assert w.shape == (n, 5, k) and psi.shape == (n, 5)
    each = w @ w.transpose(0, 2, 1) + psi[:, :, None] * np.eye(5)
    cov, error = each.mean(0), 6 * each.std(0) / np.sqrt(n)
    assert (np.abs(found.covariance - cov) <= error).all()
    assert (np.abs(draws.mean_noise - psi.mean(0)) <= 6 * psi.std(0) / np.sqrt(n)).all()
    sd = np.nanstd(x, 0)
    if k and not holes:
        assert np.abs((cov - np.cov(x.T, bias=True)) / sd / sd[:, None]).max() < 0.2
    # the mean: that of the columns, known to about C / N
    assert (np.abs(found.mean - np.nanmean(x, 0)) < 0.1 * sd).all()
    shown = np.isfinite(x).sum(0)
    known = np.diag(draws.island_mean_covariances.mean(0)) * shown / sd**2
    assert 0.7 < known.min() and known.max() < 1.4


def test_prior_of_a_table_with_holes_undoes_dropout():
    """A column that is missing where another one is high: its own cells are too low, a joint fit is not."""
    rng = np.random.default_rng(16)
    z = rng.normal(size=(4000, 1))
    x = z + 0.3 * rng.normal(size=(4000, 2))
    x[x[:, 0] > 0, 1] = np.nan
    prior = factor_prior(x)
    assert prior.center == pytest.approx([0, 0], abs=0.06)
    assert prior.variances == pytest.approx([1.09, 1.09], abs=0.1)
    assert abs(np.nanmean(x[:, 1])) > 0.5


@pytest.mark.parametrize(("model", "shape"), [(PPCA(1), np.ones(5)), (FactorAnalysis(1), None)])
@pytest.mark.parametrize("holes", [0.0, 0.1])
def test_of_a_fitted_program(model, shape, holes):
    x = table(17, 200, 5, 1, holes)
    fitted = BayesMPT(model).fit(x).fitted_
    found = sampled_evidence(fitted, x, seed=2)
    assert found.log_evidence == pytest.approx(
        evidence(x, 1, factor_prior(x), shape, seed=2).log_evidence, abs=1e-6
    )
    assert found.prior.describe() == factor_prior(x).describe()


def test_priors_are_told_apart():
    x = table(18, 20, 3, 1)
    prior = factor_prior(x)
    assert prior.describe() == factor_prior(x.copy()).describe()
    assert len({prior.describe(), prior.scaled(2).describe(), factor_prior(x[1:]).describe()}) == 3


def test_refused():
    x = table(19, 30, 4, 1)
    x[:, 2] = 1.0
    with pytest.raises(ValueError, match=r"columns that vary.*\[2\]"):
        evidence(x, 1, factor_prior(x))
    wide = FactorPrior(np.zeros(200), np.ones(200))
    with pytest.raises(ValueError, match="up to 600 parameters.*laplace"):
        evidence(table(22, 50, 200, 1), 3, wide)
    few = table(20, 3, 5, 1)
    with pytest.raises(ValueError, match=r"fewer latents than columns, got 5 latents and n_features = 5"):
        evidence(few, 5, factor_prior(few))
    with pytest.raises(ValueError, match=r"rank 2 \(n_features = 5\) without noise"):
        evidence(few, 2, factor_prior(few))


def test_marked():
    x = table(21, 8, 5, 1)
    found = evidence(x, 3, factor_prior(x), max_particles=128)
    assert any("more than a covariance" in flag and "rows are few" in flag for flag in found.flags)
    x = table(21, 60, 5, 1)
    flags = [evidence(x, k, factor_prior(x), se=1.0, max_particles=256).flags for k in (2, 3)]
    assert not any("modes may be missed" in flag for flag in flags[0])
    assert any("modes may be missed" in flag for flag in flags[1])


@pytest.mark.parametrize("holes", [0.0, 0.2])
def test_forces_are_gradients(holes):
    """By differences, also where weak columns have changed their sign: the start's is that at the point turned back."""
    x = table(3, 40, 5, 1, holes, signal=0.4)
    moments, prior = SufficientStatistics(x), factor_prior(x).normal(0.3)
    if holes:
        posterior = IncompletePosterior(moments, 3, prior)
    else:
        posterior = CompletePosterior(moments.cov.numpy(), moments.mean.numpy(), len(x), 3, prior)
    rng = np.random.default_rng(0)
    theta = 0.3 * rng.normal(size=15 + 5 + 5 * bool(holes))
    plain = Slice.through(posterior, theta)
    space = plain.widened()
    assert space.n_weak > 1
    wide = plain.back @ space.basis  # the same points in other units
    assert np.linalg.svd(wide)[1].min() > 1 - 1e-9 and np.linalg.svd(wide)[1].max() > 1.5
    np.testing.assert_allclose(plain.basis @ wide, space.basis, atol=1e-12)
    np.testing.assert_allclose(space.back @ space.basis, np.eye(space.n_free), atol=1e-12)
    assert space.log_jacobian - plain.log_jacobian == pytest.approx(np.linalg.slogdet(wide)[1], abs=1e-9)
    space = space.fitted(0.1 + 0.3 * rng.normal(size=(90, space.n_free)))
    y = 0.3 * rng.normal(size=(60, space.n_free))
    y = y[space.contains(y)]
    images, moved = space.turned(y, rng.choice([-1.0, 1.0], (len(y), space.n_weak)))
    y = np.concatenate([y[:2], images[moved][:3]])

    def start(y):
        return -np.tanh(y)

    def by_differences(value):
        steps = 1e-5 * np.eye(space.n_free)
        return np.stack([(value(y + s) - value(y - s)) / 2e-5 for s in steps], 1)

    assert list(space.contains(y)) == [True] * 2 + [False] * 3
    read = space.read(y, start)
    want = by_differences(lambda y: -np.log(np.cosh(space.turned(y)[0])).sum(1))
    np.testing.assert_allclose(read.start_force, want, rtol=1e-5, atol=1e-5)
    want = by_differences(lambda y: sum(part for part in space.read(space.turned(y)[0], start)[:2]))
    np.testing.assert_allclose(read.force, want, rtol=1e-5, atol=1e-5)
    for few, all_digits in zip(space.forces(y, start), (read.force, read.start_force), strict=True):
        np.testing.assert_allclose(few, all_digits, rtol=1e-3, atol=1e-3)


def surplus_space():
    x = table(23, 60, 5, 1)
    moments, prior = SufficientStatistics(x), factor_prior(x).normal(0.3)
    posterior = CompletePosterior(moments.cov.numpy(), moments.mean.numpy(), len(x), 2, prior)
    rng = np.random.default_rng(1)
    return Slice.through(posterior, 0.5 * rng.normal(size=15)), rng


def test_units_of_a_pilot():
    """Of many points their mean and covariance, of few hardly anything; the slice itself is the same."""
    space, rng = surplus_space()
    m = space.n_free
    mix = np.eye(m) + 0.3 * rng.normal(size=(m, m))
    shift = 0.4 * rng.normal(size=m)
    many = shift + rng.normal(size=(100_000, m)) @ mix.T
    found = space.fitted(many)
    center = (space.back @ (found.center - space.center)).ravel()
    units = space.back @ found.basis
    np.testing.assert_allclose(center, shift, atol=0.03)
    np.testing.assert_allclose(units @ units.T, mix @ mix.T, atol=0.08)
    np.testing.assert_allclose(found.back @ found.basis, np.eye(m), atol=1e-10)
    assert found.log_jacobian - space.log_jacobian == pytest.approx(np.linalg.slogdet(units)[1], abs=1e-9)
    few = space.fitted(rng.normal(size=(40, m)))
    units = space.back @ few.basis
    assert np.abs(units @ units.T - np.eye(m)).max() < 0.25  # their own covariance is 0.5 off
    assert np.linalg.norm(space.back @ (few.center - space.center)) < 0.6
    y = 0.3 * rng.normal(size=(50, m))
    for one in (space, found):
        v = one.theta(y)[:, :10].reshape(-1, 5, 2)
        polar = one.reference.T @ v
        np.testing.assert_allclose(polar, polar.transpose(0, 2, 1), atol=1e-10)
        np.testing.assert_allclose(one._polar(y)[0], np.linalg.eigvalsh(polar), atol=1e-9)


def test_turned_into_the_slice():
    space, rng = surplus_space()
    y = 0.3 * rng.normal(size=(30, space.n_free))
    y = y[space.contains(y)]
    theta = space.theta(y)
    turn = np.linalg.qr(rng.normal(size=(len(y), 2, 2)))[0]
    theta[:, :10] = (theta[:, :10].reshape(-1, 5, 2) @ turn).reshape(len(y), 10)
    np.testing.assert_allclose(space.coordinates(theta), y, atol=1e-10)


@pytest.mark.parametrize("shape", [None, np.array([1.0, 2.0, 1.0, 1.0])])
@pytest.mark.parametrize("holes", [0.0, 0.2])
def test_anchored_is_a_change_of_variables(shape, holes):
    """Density by the Jacobian's determinant, gradient by differences, information by the Jacobian of differences."""
    x = table(24, 30, 4, 1, holes)
    moments, prior = SufficientStatistics(x), factor_prior(x)
    if holes:
        plain = IncompletePosterior(moments, 2, prior, shape)
    else:
        plain = CompletePosterior(moments.cov.numpy(), moments.mean.numpy(), len(x), 2, prior, shape)
    rng = np.random.default_rng(2)
    d = 8 + plain.n_noise + 4 * bool(holes)
    center, theta = 0.4 * rng.normal(size=(2, d))
    found = plain.anchored(center)

    def to_plain(theta):
        v, e = found.split(theta[None])
        return np.concatenate([v.ravel(), e[0][: plain.n_noise], theta[8 + plain.n_noise :]])

    def jacobian(theta):
        steps = 1e-6 * np.eye(d)
        return np.stack([(to_plain(theta + s) - to_plain(theta - s)) / 2e-6 for s in steps], 1)

    np.testing.assert_allclose(to_plain(center), center, atol=1e-14)
    volume = np.linalg.slogdet(jacobian(theta))[1]
    value, gradient = found.log_density(theta[None])
    assert value[0] == pytest.approx(plain.log_density(to_plain(theta)[None])[0][0] + volume, abs=1e-6)
    steps = 1e-5 * np.eye(d)
    want = (found.log_density(theta + steps)[0] - found.log_density(theta - steps)[0]) / 2e-5
    np.testing.assert_allclose(gradient[0], want, rtol=1e-5, atol=1e-5)
    j = jacobian(theta)
    np.testing.assert_allclose(
        found.information(theta), j.T @ plain.information(to_plain(theta)) @ j, rtol=1e-5, atol=1e-4
    )


def complete_from_prior(x, k, prior, shape, n_draws, seed):
    """Log evidence of complete rows and its error, by draws from the prior: the mean's integral is a matrix normal's.

    log p(X | C) = -NT/2 log 2 pi - N/2 log |C| + T/2 log(kappa / (N + kappa)) - 1/2 tr C^-1 S,
    S the scatter about the mean plus N kappa / (N + kappa) times the square of the mean's distance to the centre.
    """
    rng = np.random.default_rng(seed)
    n, t = x.shape
    units = prior.variances if shape is None else shape * (prior.variances / shape).mean()
    psi = units / SHAPE * rng.gamma(SHAPE, size=(n_draws, t if shape is None else 1))
    spread = SCALE * np.sqrt(DEGREES / rng.chisquare(DEGREES, size=(n_draws, 1, 1)))
    w = spread * np.sqrt(units)[:, None] * rng.normal(size=(n_draws, t, k))
    cov = w @ w.transpose(0, 2, 1) + psi[:, :, None] * np.eye(t)
    off = x.mean(0) - prior.center
    scatter = n * np.cov(x.T, bias=True) + n * KAPPA / (n + KAPPA) * np.outer(off, off)
    quadratic = np.einsum("bij,ji->b", np.linalg.inv(cov), scatter)
    log_l = -0.5 * (n * t * math.log(2 * math.pi) + n * np.linalg.slogdet(cov)[1] + quadratic)
    log_l += 0.5 * t * math.log(KAPPA / (n + KAPPA))
    weight = np.exp(log_l - log_l.max())
    return log_l.max() + math.log(weight.mean()), weight.std() / weight.mean() / math.sqrt(n_draws)


@pytest.mark.slow
def test_the_error_of_surplus_columns():
    """Against draws from the prior, neither too small nor too large: no column made these rows."""
    z = []
    for seed, t, k, shape, n_runs in [(31, 4, 2, np.ones(4), 10), (32, 3, 1, None, 20)]:
        x = np.random.default_rng(seed).normal(size=(15, t)) * np.linspace(1.0, 1.5, t)
        prior = factor_prior(x)
        truth, truth_se = complete_from_prior(x, k, prior, shape, 300_000, seed + 1)
        assert truth_se < 0.01
        found = [evidence(x, k, prior, shape, seed=s) for s in range(n_runs)]
        z += [(f.log_evidence - truth) / math.hypot(f.se, truth_se) for f in found]
    assert np.mean(np.abs(z) <= 2) >= 0.9
    assert 0.5 < np.std(z) < 1.3
    assert abs(np.mean(z)) < 0.5
