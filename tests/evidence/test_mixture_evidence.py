"""The evidence of Gaussian mixtures: against all allocations, quadrature, closed forms and rows in sequence."""

import itertools
import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import gammaln, logsumexp, multigammaln
from scipy.stats import gamma, invgamma
from scipy.stats import t as student_t

from bayes_mpt.evidence import MixturePrior, factor_prior, mixture_evidence, mixture_prior, sample_evidence
from bayes_mpt.program.statistics import SufficientStatistics

KINDS = ("full", "tied", "diag", "spherical")
KAPPA, ALPHA, DEGREES = 0.01, 4.0, 3


def table(seed, n, t, sep=3.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, t)) * np.arange(1, t + 1) + sep * rng.integers(0, 2, (n, 1)) + 2.0


def log_inverse_wishart(scale, scatter, degrees, n):
    """Of n rows with this scatter; log pi, and what the means cost, left out."""
    t = len(scale)
    return (
        multigammaln((degrees + n) / 2, t)
        - multigammaln(degrees / 2, t)
        + 0.5 * degrees * np.linalg.slogdet(scale)[1]
        - 0.5 * (degrees + n) * np.linalg.slogdet(scale + scatter)[1]
    )


def log_joint(x, z, k, prior, kind):
    """log p(z) p(x | z), NaN where a cell does not exist: then of diagonal kinds only."""
    t = x.shape[1]
    scale = prior.covariance / k ** (2 / t)
    n = np.bincount(z, minlength=k)
    value = gammaln(k * ALPHA) - gammaln(len(x) + k * ALPHA) + (gammaln(n + ALPHA) - gammaln(ALPHA)).sum()
    value -= 0.5 * (~np.isnan(x)).sum() * math.log(math.pi)
    scatters, cells = np.zeros((k, t, t)), np.zeros((k, t))
    for c in range(k):
        off = x[z == c] - prior.center
        cells[c] = (~np.isnan(off)).sum(0)
        held = KAPPA + cells[c]
        value += 0.5 * np.log(KAPPA / held).sum()
        total = np.nansum(off, 0)
        if kind in ("full", "tied"):
            scatters[c] = off.T @ off - np.outer(total, total) / held[0]
        else:
            scatters[c] = np.diag(np.nansum(off**2, 0) - total**2 / held)
    if kind == "tied":
        return value + log_inverse_wishart(scale, scatters.sum(0), t - 1 + DEGREES, len(x))
    for c in range(k):
        if kind == "full":
            value += log_inverse_wishart(scale, scatters[c], t - 1 + DEGREES, n[c])
        elif kind == "diag":
            for j in range(t):
                one = np.ix_([j], [j])
                value += log_inverse_wishart(scale[one], scatters[c][one], DEGREES, cells[c, j])
        else:
            one = np.eye(1)
            of_mean = np.trace(scale) / t * one
            value += log_inverse_wishart(of_mean, np.trace(scatters[c]) * one, DEGREES, cells[c].sum())
    return value


def enumerated(x, k, prior, kind):
    """All K^N allocations."""
    return logsumexp(
        [log_joint(x, np.array(z), k, prior, kind) for z in itertools.product(range(k), repeat=len(x))]
    )


CASES = {"one column": (1, 8, 1, 3), "two columns": (2, 8, 2, 2), "three columns": (3, 7, 3, 2)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_against_all_allocations(case, kind):
    seed, n, t, k = CASES[case]
    x = table(seed, min(n, 6) if k == 3 else n, t)
    prior = mixture_prior(x)
    found = mixture_evidence(x, k, prior, covariance_type=kind, se=0.05, max_particles=4096, seed=1)
    assert found.se < 0.25
    assert found.log_evidence == pytest.approx(enumerated(x, k, prior, kind), abs=3 * found.se)


@pytest.mark.parametrize("kind", ("diag", "spherical"))
def test_holes_of_independent_columns_against_all_allocations(kind):
    x = table(4, 8, 2)
    x[[0, 3, 5], [0, 1, 1]] = np.nan
    prior = mixture_prior(x)
    found = mixture_evidence(x, 2, prior, covariance_type=kind, se=0.05, max_particles=4096, seed=1)
    assert found.se < 0.1
    assert found.log_evidence == pytest.approx(enumerated(x, 2, prior, kind), abs=3 * found.se)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("full", "tied"))
@pytest.mark.parametrize("n_components", (1, 2))
def test_a_hole_against_quadrature(kind, n_components):
    x = table(5, 6, 2)
    x[2, 1] = np.nan
    prior = mixture_prior(x)
    # trapezoids in u, of sinh u: tails fall as a power
    u = np.linspace(-9, 9, 121)
    unit = math.sqrt(prior.covariance[1, 1])
    values = []
    for point in u:
        full = x.copy()
        full[2, 1] = prior.center[1] + unit * math.sinh(point)
        values.append(enumerated(full, n_components, prior, kind) + math.log(unit * math.cosh(point)))
    truth = logsumexp(values) + math.log(u[1] - u[0])
    found = mixture_evidence(x, n_components, prior, covariance_type=kind, se=0.05, seed=1)
    assert 0 < found.se < 0.1
    assert found.log_evidence == pytest.approx(truth, abs=3 * found.se)


@pytest.mark.parametrize("kind", KINDS)
def test_one_component_is_exact(kind):
    x = table(6, 40, 3)
    found = mixture_evidence(x, 1, mixture_prior(x), covariance_type=kind)
    truth = log_joint(x, np.zeros(40, dtype=int), 1, mixture_prior(x), kind)
    assert found.log_evidence == pytest.approx(truth, abs=1e-8)
    assert found.se < 1e-8


@pytest.mark.parametrize(
    ("n_tokens", "kind", "shape"),
    [(1, "full", None), (3, "diag", None), (3, "spherical", np.ones(3))],
    ids=["one column", "a noise each", "one noise"],
)
def test_one_component_beside_factor_models_without_factors(n_tokens, kind, shape):
    """The same model under two priors of its variances: one integral over each, the mean integrated alike."""
    x = table(14, 25, n_tokens)
    prior, other = mixture_prior(x), factor_prior(x)
    spread = np.eye(25) + 1 / KAPPA
    off = x - prior.center
    squares = np.einsum("it,it->t", off, np.linalg.solve(spread, off))
    log_norm = 25 * math.log(2 * math.pi) + np.linalg.slogdet(spread)[1]
    units = other.units(shape)
    columns = [[0, 1, 2]] if shape is not None else [[i] for i in range(n_tokens)]

    def integral(law_in_units):
        total = 0.0
        for those in columns:
            s, law = units[those[0]], law_in_units(units[those[0]])

            def log_joint(log_variance, those=those, law=law):
                v = math.exp(log_variance)
                log_l = -0.5 * sum(log_norm + 25 * log_variance + squares[i] / v for i in those)
                return log_l + law.logpdf(v) + log_variance

            top = log_joint(math.log(s))
            found = quad(
                lambda e, top=top, f=log_joint: math.exp(f(e) - top),
                math.log(s) - 4,
                math.log(s) + 4,
                limit=200,
            )
            total += top + math.log(found[0])
        return total

    def of_mixture(s):
        return invgamma(DEGREES / 2, scale=s / 2)

    def of_factors(s):
        return gamma(2, scale=s / 2)

    mixture = mixture_evidence(x, 1, prior, covariance_type=kind).log_evidence
    factors = sample_evidence(SufficientStatistics(x), 0, other, shape=shape)
    assert mixture == pytest.approx(integral(of_mixture), abs=1e-6)
    assert factors.log_evidence == pytest.approx(integral(of_factors), abs=1e-6)
    # the two under one prior: the factors' posterior draws, each counted by the ratio of the laws
    noise = factors.draws.noise[:, [those[0] for those in columns]]  # (S, P)
    at = units[[those[0] for those in columns]]
    ratio = np.exp((of_mixture(at).logpdf(noise) - of_factors(at).logpdf(noise)).sum(1))
    error = ratio.std() / ratio.mean() / math.sqrt(len(ratio))
    assert 0 < error < 0.1
    assert mixture == pytest.approx(factors.log_evidence + math.log(ratio.mean()), abs=3 * error)


def test_with_one_column_all_kinds_are_the_same():
    x = table(7, 60, 1)
    prior = mixture_prior(x)
    found = [
        mixture_evidence(x, 2, prior, covariance_type=kind, se=0.05, seed=2)
        for kind in ("full", "diag", "spherical")
    ]
    for other in found[1:]:
        assert other.log_evidence == pytest.approx(
            found[0].log_evidence, abs=3 * math.hypot(other.se, found[0].se)
        )
    one = [mixture_evidence(x, 1, prior, covariance_type=kind).log_evidence for kind in KINDS]
    assert one == pytest.approx([one[0]] * 4, abs=1e-9)


def in_sequence(x, k, prior, n_particles, rng):
    """Rows of one column revealed one by one to particles that allocate them, without any moves.

    Returns the log of the mean weight, and its error. A row after others in one component follows the t that belongs
    to their posterior.
    """
    center, scale = prior.center[0], prior.covariance[0, 0] / k**2
    n, total_x, total_xx = (np.zeros((n_particles, k)) for _ in range(3))  # of the rows in each component
    total, each = np.zeros(n_particles), np.arange(n_particles)
    for i, row in enumerate(x[:, 0] - center):
        kappa, degrees, m = KAPPA + n, DEGREES + n, total_x / (KAPPA + n)
        spread = scale + total_xx - kappa * m**2
        log_p = np.log(n + ALPHA) - math.log(i + k * ALPHA)
        log_p += student_t.logpdf(row, degrees, m, np.sqrt(spread * (kappa + 1) / (kappa * degrees)))
        marginal = logsumexp(log_p, axis=1)
        total += marginal
        z = (np.exp(log_p - marginal[:, None]).cumsum(1) < rng.random((n_particles, 1))).sum(1)
        n[each, z] += 1
        total_x[each, z] += row
        total_xx[each, z] += row**2
    w = np.exp(total - total.max())
    return math.log(w.mean()) + total.max(), w.std() / w.mean() / math.sqrt(n_particles)


@pytest.mark.slow
def test_rows_in_sequence_in_two_orders_come_to_the_same():
    rng = np.random.default_rng(8)
    x = np.concatenate([rng.normal(size=(8, 1)), 4 + rng.normal(size=(6, 1))])
    prior = mixture_prior(x)
    found = mixture_evidence(x, 2, prior, se=0.03, seed=3)
    for _ in range(2):
        value, se = in_sequence(rng.permutation(x), 2, prior, 2000, rng)
        assert found.log_evidence == pytest.approx(value, abs=3 * math.hypot(found.se, se))
    again = mixture_evidence(rng.permutation(x), 2, prior, se=0.03, seed=4)
    assert again.log_evidence == pytest.approx(found.log_evidence, abs=3 * math.hypot(found.se, again.se))


@pytest.mark.slow
def test_error_bar_over_seeds():
    """Neither too small nor too large: two of it hold, and z spreads like a normal."""
    z = []
    for case, kind in itertools.product(((1, 8, 1, 2), (3, 7, 3, 2), (9, 10, 2, 2)), ("full", "diag")):
        seed, n, t, k = case
        x = table(seed, n, t)
        prior = mixture_prior(x)
        truth = enumerated(x, k, prior, kind)
        found = [mixture_evidence(x, k, prior, covariance_type=kind, seed=s) for s in range(10)]
        z += [(f.log_evidence - truth) / f.se for f in found]
    z = np.array(z)
    assert (np.abs(z) > 2).mean() < 0.1
    assert 0.7 < z.std() < 1.3
    assert abs(z.mean()) < 0.4


@pytest.mark.parametrize("kind", ("full", "diag"))
def test_surplus_components_agree_over_seeds(kind):
    """Where chains of one number of clusters alone would differ by ten nats."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 4)) + 4 * rng.normal(size=(2, 4))[rng.integers(2, size=80)]
    prior = mixture_prior(x)
    found = [mixture_evidence(x, 4, prior, covariance_type=kind, seed=s) for s in range(3)]
    values, errors = [f.log_evidence for f in found], [f.se for f in found]
    assert np.ptp(values) < 4 * max(errors) < 2.5


def test_far_components_are_counted_in_all_orders():
    """Components that never meet: the evidence is that of each, times all K! orders."""
    rng = np.random.default_rng(1)
    x = np.concatenate([1000 * c + rng.normal(size=(15, 1)) for c in range(3)])
    prior = mixture_prior(x)
    truth = log_joint(x, np.repeat([0, 1, 2], 15), 3, prior, "full") + math.log(6)
    found = mixture_evidence(x, 3, prior, seed=1)
    assert found.log_evidence == pytest.approx(truth, abs=0.05 + 3 * found.se)


def test_same_seed_same_bits_and_units_do_not_matter():
    x = table(10, 50, 2)
    x[3, 1] = np.nan
    first, again = (mixture_evidence(x, 2, mixture_prior(x), seed=5) for _ in range(2))
    assert (first.islands == again.islands).all()
    assert first.flags == ()
    other = mixture_evidence(x * [1000.0, 1.0], 2, mixture_prior(x * [1000.0, 1.0]), seed=5)
    n_cells = 50
    assert other.log_evidence == pytest.approx(first.log_evidence - n_cells * math.log(1000), abs=1e-5)


def test_a_row_without_cells_counts_nothing():
    x = table(11, 30, 2)
    prior = mixture_prior(x)
    more = np.concatenate([x, np.full((2, 2), np.nan)])
    assert mixture_evidence(more, 2, prior).log_evidence == mixture_evidence(x, 2, prior).log_evidence


def test_prior_of_holes_is_that_of_a_saturated_normal():
    """A column that is missing where another is large: its observed cells have another mean."""
    rng = np.random.default_rng(2)
    x = rng.multivariate_normal([0, 0], [[1, 0.9], [0.9, 1]], size=4000)
    x[x[:, 0] > 0, 1] = np.nan
    prior = mixture_prior(x)
    assert np.nanmean(x[:, 1]) < -0.6
    np.testing.assert_allclose(prior.center, [0, 0], atol=0.06)
    np.testing.assert_allclose(prior.covariance, [[1, 0.9], [0.9, 1]], atol=0.08)


def test_what_has_no_evidence_is_refused():
    x = table(12, 20, 3)
    constant = x.copy()
    constant[:, 1] = 1.0
    repeated = x.copy()
    repeated[:, 2] = 2 * repeated[:, 1]
    with pytest.raises(ValueError, match=r"constant ones at \[1\]"):
        mixture_evidence(constant, 2, mixture_prior(constant))
    with pytest.raises(ValueError, match="drop columns that repeat others"):
        mixture_evidence(repeated, 2, mixture_prior(repeated))
    assert math.isfinite(
        mixture_evidence(repeated, 2, mixture_prior(repeated), covariance_type="diag").log_evidence
    )
    with pytest.raises(ValueError, match="12 at most, got 13"):
        mixture_evidence(x, 13, mixture_prior(x))
    with pytest.raises(ValueError, match="covariance_type must be one of"):
        mixture_evidence(x, 2, mixture_prior(x), covariance_type="round")
    infinite, empty = x.copy(), x.copy()
    infinite[3, 2], empty[:, 1] = np.inf, np.nan
    with pytest.raises(ValueError, match=r"an infinity in columns \[2\]"):
        mixture_evidence(infinite, 2, mixture_prior(x))
    with pytest.raises(ValueError, match=r"an infinity in columns \[2\]"):
        mixture_prior(infinite)
    with pytest.raises(ValueError, match=r"columns must have an observed cell, got none at \[1\]"):
        mixture_prior(empty)


def test_rows_are_a_table_of_the_columns_of_the_prior():
    x = table(12, 20, 3)
    prior = mixture_prior(x)
    assert mixture_prior(x.tolist()).describe() == prior.describe()
    for wrong in (lambda: mixture_prior(x[:, 0]), lambda: mixture_evidence(x[0], 2, prior)):
        with pytest.raises(ValueError, match=r"table of shape \(N, T\), got shape"):
            wrong()
    with pytest.raises(ValueError, match="prior is of 3 columns and the rows have 2"):
        mixture_evidence(x[:, :2], 2, prior)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        mixture_evidence(x, 0, prior)
    with pytest.raises(ValueError, match="must have an observed cell"):
        mixture_prior(np.full((3, 2), np.nan))


def test_describe_tells_priors_apart():
    x = table(13, 20, 2)
    prior = mixture_prior(x)
    same = MixturePrior(prior.center.copy(), prior.covariance.copy())
    assert same.describe() == prior.describe()
    assert MixturePrior(prior.center, prior.covariance, concentration=1.0).describe() != prior.describe()
    assert mixture_prior(x[1:]).describe() != prior.describe()
