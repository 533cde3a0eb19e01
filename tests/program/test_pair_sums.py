"""Factors of two columns: joint densities and intervals, that are right, and that are none."""

import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.integrate import quad
from torch.distributions import constraints

from bayes_mpt import BayesMPT
from bayes_mpt.program.pair_sums import is_interval, pair_total
from bayes_mpt.program.program import ModelError

LOG_2PI = math.log(2 * math.pi)
RNG = np.random.default_rng(0)
REAL, POSITIVE, UNIT = RNG.normal(size=(2, 20)), RNG.exponential(size=(2, 20)), RNG.uniform(size=(2, 20))
COUNTS = RNG.poisson(3, size=(2, 20)).astype(float)
CONTINUOUS = False, False


def law(log_prob):
    """As a program gives it: -inf where a law is impossible or no number."""

    def found(a, b):
        with np.errstate(all="ignore"):
            return np.nan_to_num(log_prob(a, b), nan=-math.inf, posinf=math.inf, neginf=-math.inf)

    return found


def normal(rho, mean=0.0, sd=1.0):
    joint = stats.multivariate_normal([mean, mean], sd**2 * np.array([[1, rho], [rho, 1]]))
    return law(lambda a, b: joint.logpdf(np.stack([a, b], -1)))


def gumbel(a, b, t=2.0):
    """Two waiting times, by the derivatives of exp(-(a^t + b^t)^(1/t))."""
    s = (a**t + b**t) ** (1 / t)
    return -s + np.log(s + t - 1) + (1 - 2 * t) * np.log(s) + (t - 1) * (np.log(a) + np.log(b))


def clayton(a, b, t=2.0):
    power = a**-t + b**-t - 1
    return np.log(1 + t) - (1 + t) * (np.log(a) + np.log(b)) - (2 + 1 / t) * np.log(power)


def student(a, b):
    joint = stats.multivariate_t([0, 0], [[1, 0.8], [0.8, 1]], df=3)
    return joint.logpdf(np.stack([a, b], -1))


@pytest.mark.parametrize(
    ("density", "values", "whole"),
    [
        (normal(0.0), REAL, CONTINUOUS),
        (normal(0.9999), REAL, CONTINUOUS),
        (normal(-0.9, 100.0, 0.01), REAL, CONTINUOUS),  # far from the data, and narrow
        (normal(0.9, 0.0, 1e4), REAL, CONTINUOUS),
        (law(student), REAL, CONTINUOUS),
        (law(gumbel), POSITIVE, CONTINUOUS),
        (lambda a, b: -a - b / 3 - math.log(3), POSITIVE, CONTINUOUS),  # which does not say where it is zero
        (law(clayton), UNIT, CONTINUOUS),
        (
            law(lambda a, b: stats.poisson.logpmf(a, 3) + stats.poisson.logpmf(b, 1 + a)),
            COUNTS,
            (True, True),
        ),
        (
            law(lambda a, b: stats.poisson.logpmf(a, 3) + stats.norm.logpdf(b, 2 * a, 0.5)),
            np.stack([COUNTS[0], REAL[0]]),
            (True, False),
        ),
    ],
)
def test_joint_densities_add_up_to_one(density, values, whole):
    found = pair_total([density], tuple(values), whole)
    assert found is not None and found.error < 1e-6
    (more,) = pair_total([lambda a, b: density(a, b) + 0.1], tuple(values), whole).values
    assert more == pytest.approx(math.exp(0.1), rel=1e-6)


def test_a_law_of_one_cell_given_the_other_has_no_double_integral():
    given = law(lambda a, b: stats.norm.logpdf(b, a))
    assert pair_total([given], tuple(REAL), CONTINUOUS) is None


@pytest.mark.parametrize(
    ("family", "values"),
    [
        (lambda s: stats.norm(0, s), REAL),
        (lambda s: stats.weibull_min(s), POSITIVE),
        (lambda s: stats.beta(s, 2.0), UNIT),
    ],
)
def test_intervals_are_masses_between_two_cells(family, values):
    low, high = np.sort(values, 0)
    known = np.where(np.arange(len(low)) < 5, low, high)  # the values themselves, in five rows
    families = [family(s) for s in (0.5, 1.0, 2.0)]

    def laws(mass, density=None):
        inside = [law(partial(mass, f)) for f in families]
        if density is None:
            return inside
        return [
            law(lambda a, b, f=f, of=of: np.where(a == b, density(f, a), of(a, b)))
            for f, of in zip(families, inside, strict=True)
        ]

    def right(f, a, b):
        return np.log(f.cdf(b) - f.cdf(a))

    assert is_interval(laws(right), low, high)
    assert is_interval(laws(right, lambda f, a: f.logpdf(a)), low, known)
    wrong = [
        laws(lambda f, a, b: np.log(f.cdf(a) - f.cdf(b))),
        laws(lambda f, a, b: right(f, a, b) + 0.01),
        laws(lambda f, a, b: f.logcdf(b) + f.logsf(a)),
        laws(lambda f, a, b: f.logpdf(a) + f.logpdf(b)),
    ]
    assert not any(is_interval(some, low, high) for some in wrong)
    assert not is_interval(laws(right, lambda f, a: f.logpdf(a) + 0.1), low, known)
    assert not is_interval(laws(right), high, low)


def pair(x, log_constant=0.0, normalised=True):
    rho = pyro.sample("rho", dist.Uniform(-0.9, 0.9))
    with pyro.plate("rows", len(x)):
        square = (x[:, 0] ** 2 - 2 * rho * x[:, 0] * x[:, 1] + x[:, 1] ** 2) / (1 - rho**2)
        constant = LOG_2PI + (0.5 * torch.log1p(-(rho**2)) if normalised else 0.0) - log_constant
        pyro.factor("density", -0.5 * square - constant)


@pytest.mark.parametrize(("log_constant", "normalised"), [(0.3, True), (0.0, False)])
def test_a_pair_that_does_not_add_up_to_one_is_refused(log_constant, normalised):
    with pytest.raises(ModelError, match=r"no log-density of columns 0 and 1: it adds up to .* and not to 1"):
        BayesMPT(partial(pair, log_constant=log_constant, normalised=normalised)).fit(REAL.T)


def given(x):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.factor("f", -0.5 * (x[:, 1] - w * x[:, 0]) ** 2 - 0.5 * (x[:, 2] - x[:, 1]) ** 2 - LOG_2PI)


def test_a_pair_is_told_from_its_covariate():
    table = np.random.default_rng(1).normal(size=(12, 3))
    x, y = table[:, 0], table[:, 1]
    truth = stats.multivariate_normal(np.zeros(12), np.eye(12) + np.outer(x, x)).logpdf(y)
    truth += stats.norm.logpdf(table[:, 2], y).sum()
    fitted = BayesMPT(given).fit(table)
    assert fitted.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-8)
    assert "believed" not in fitted.explain()


def between(x, log_constant=0.0):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    share = [dist.Normal(mu, 1.0).cdf(x[:, j]) for j in range(2)]
    with pyro.plate("rows", len(x)):
        pyro.factor("between", (share[1] - share[0]).log() + log_constant)


def test_interval_censoring_is_checked():
    ends = np.sort(REAL, 0).T

    def joint(mu):
        inside = stats.norm.cdf(ends[:, 1], mu) - stats.norm.cdf(ends[:, 0], mu)
        return stats.norm.pdf(mu, 0, 2) * np.exp(np.log(inside).sum() + 20)

    truth = np.log(quad(joint, -3, 3, epsabs=0, epsrel=1e-11)[0]) - 20
    fitted = BayesMPT(between).fit(ends)
    assert fitted.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-7)
    assert "believed" not in fitted.explain()
    scaled = BayesMPT(partial(between, log_constant=-0.2)).fit(ends)
    assert "not checked: factor 'between'" in scaled.explain()


def waited(x):
    rate = pyro.param("rate", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        known = x[:, 0] == x[:, 1]
        width = torch.where(known, 1.0, x[:, 1] - x[:, 0])
        mass = torch.log(-torch.expm1(-rate * width))
        pyro.factor("waited", torch.where(known, rate.log(), mass) - rate * x[:, 0])


def test_intervals_beside_known_values_are_checked():
    ends = np.sort(POSITIVE, 0).T
    ends[:6, 1] = ends[:6, 0]
    fitted = BayesMPT(waited).fit(ends)
    rate = fitted.params_["rate"]
    law_of = stats.expon(scale=1 / rate)
    mass = np.log(law_of.cdf(ends[6:, 1]) - law_of.cdf(ends[6:, 0]))
    assert fitted.log_marginal_likelihood_ == pytest.approx(
        law_of.logpdf(ends[:6, 0]).sum() + mass.sum(), abs=1e-9
    )
    assert "believed" not in fitted.explain()
