"""`pyro.factor` as a log-density of a row's cells: believed, checked where that is cheap, refused where it is none."""

import math
import pickle
import re
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy.integrate import quad
from scipy.stats import expon, norm, poisson
from torch.distributions import constraints
from truths import log_density

from bayes_mpt import BayesMPT, compare
from bayes_mpt.program.program import ModelError

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def table(seed=0, size=(12, 1)):
    return np.random.default_rng(seed).normal(1.0, 1.0, size=size)


def normal(x, constant=HALF_LOG_2PI):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        pyro.factor("density", -0.5 * (x[:, 0] - mu) ** 2 - constant)


def as_site(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[:, 0])


def test_a_normalised_factor_is_a_site_of_its_cells():
    x = table()
    truth = BayesMPT(as_site).fit(x).log_marginal_likelihood_  # closed form
    fitted = BayesMPT(normal).fit(x)
    assert fitted.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-8)
    assert "not checked" not in fitted.explain()
    assert pickle.loads(pickle.dumps(fitted)).score(x) == pytest.approx(truth, abs=1e-8)


def test_missing_cells_of_a_factor_are_left_out():
    x = table()
    holes = x.copy()
    holes[[1, 5]] = np.nan
    truth = BayesMPT(as_site).fit(x[~np.isnan(holes[:, 0])]).log_marginal_likelihood_
    assert BayesMPT(normal).fit(holes).log_marginal_likelihood_ == pytest.approx(truth, abs=1e-8)


def test_a_factor_that_does_not_add_up_to_one_is_refused():
    with pytest.raises(ModelError, match="adds up to 2.507, 2.507, .* and not to 1"):
        BayesMPT(partial(normal, constant=0.0)).fit(table())


def rounded(x):
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        share = [dist.Normal(0.0, scale).cdf(x[:, 0] + side) for side in (0.5, -0.5)]
        pyro.factor("density", (share[0] - share[1]).log())


def counted(x):
    with pyro.plate("rows", len(x)):
        pyro.factor("density", x[:, 0] * math.log(1.5) - 1.5 - torch.lgamma(x[:, 0] + 1))


def waited(x):
    with pyro.plate("rows", len(x)):
        pyro.factor("density", math.log(2.0) - 2 * x[:, 0])


@pytest.mark.parametrize(
    ("program", "x", "truth"),
    [
        (counted, np.arange(5.0), lambda x, _: poisson.logpmf(x, 1.5)),
        (waited, np.linspace(0.1, 2, 7), lambda x, _: expon.logpdf(x, scale=0.5)),
        (
            rounded,
            np.array([-2.0, -1, 0, 0, 1, 3]),
            lambda x, s: np.log(norm.cdf(x + 0.5, 0, s) - norm.cdf(x - 0.5, 0, s)),
        ),
    ],
)
def test_sums_over_counts_and_integrals_over_the_positive_numbers_are_checked(program, x, truth):
    fitted = BayesMPT(program).fit(x[:, None])
    scale = fitted.params_.get("scale")
    assert fitted.log_marginal_likelihood_ == pytest.approx(truth(x, scale).sum(), abs=1e-9)
    assert "believed" not in fitted.explain()


def waiting(x, stopped):
    rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.0))
    with pyro.plate("rows", len(x)):
        pyro.factor("density", torch.where(stopped > 0, 0.0, rate.log()) - rate * x[:, 0])


def test_a_survival_function_is_checked_against_its_density():
    x, stopped = np.array([0.3, 0.7, 1.0, 0.2, 1.0]), np.array([0.0, 0, 1, 0, 1])
    fitted = BayesMPT(waiting).fit(np.tile(x, 2)[:, None], np.tile(stopped, 2))

    def joint(rate):
        return rate * np.exp(-rate) * rate**6 * np.exp(-rate * 2 * x.sum())

    assert fitted.log_marginal_likelihood_ == pytest.approx(np.log(quad(joint, 0, 60)[0]), abs=1e-6)
    assert "believed" not in fitted.explain()


def triple(x):
    rho = pyro.sample("rho", dist.Uniform(-0.9, 0.9))
    with pyro.plate("rows", len(x)):
        square = (x[:, 0] ** 2 - 2 * rho * x[:, 0] * x[:, 1] + x[:, 1] ** 2) / (1 - rho**2) + x[:, 2] ** 2
        pyro.factor("density", -0.5 * square - 0.5 * torch.log1p(-(rho**2)) - 3 * HALF_LOG_2PI)


def test_what_was_not_checked_is_said():
    x = table(size=(5, 3))

    def joint(rho):
        covariance = np.array([[1, rho, 0], [rho, 1, 0], [0, 0, 1]])
        return np.exp(log_density(x, np.zeros(3), covariance).sum()) / 1.8

    fitted = BayesMPT(triple).fit(x)
    truth = np.log(quad(joint, -0.9, 0.9, epsabs=0, epsrel=1e-10)[0])
    assert fitted.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-6)
    assert "believed:        not checked: factor 'density'" in fitted.explain()
    ranked = compare({"a": fitted, "b": BayesMPT(triple).fit(x)}, x)
    assert all("not checked: factor 'density'" in said for said in ranked["diag"])


# -- values that are cut off


def tail(mu, bound):
    return torch.special.log_ndtr(mu - bound)


def by_column(x, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    above = x[:, 0] > 0
    with pyro.plate("rows", len(y)):
        with poutine.mask(mask=~above):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        pyro.factor("beyond", torch.where(above, tail(mu, 2.0), 0.0))


def factor_first(x, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    above = x[:, 0] > 0
    with pyro.plate("rows", len(y)):
        with poutine.mask(mask=above):
            pyro.factor("beyond", tail(mu, y))
        with poutine.mask(mask=~above):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def by_value(x, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(y)):
        with poutine.mask(mask=y < 2):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        pyro.factor("beyond", torch.where(y >= 2, tail(mu, 2.0), 0.0))


def one_factor(x, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(y)):
        pyro.factor("y", torch.where(y >= 2, tail(mu, 2.0), dist.Normal(mu, 1.0).log_prob(y)))


@pytest.mark.parametrize("program", [by_column, factor_first, by_value, one_factor])
def test_a_density_with_the_mass_of_what_is_cut_off(program):
    y = np.minimum(table(size=30), 2.0)
    above = (y == 2).astype(float)
    assert 2 < above.sum() < 20

    def joint(mu):
        return norm.pdf(mu, 0, 2) * np.exp(norm.logpdf(y[y < 2], mu).sum() + above.sum() * norm.logsf(2, mu))

    truth = np.log(quad(joint, -3, 5, epsabs=0, epsrel=1e-11)[0])
    fitted = BayesMPT(program).fit(above[:, None], y)
    assert fitted.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-7)
    assert "believed" not in fitted.explain()


def test_a_mass_of_another_bound_is_not_checked():
    y = np.minimum(np.linspace(-1, 4, 26), 3.0)  # the program has 2
    fitted = BayesMPT(by_column).fit((y == 3).astype(float)[:, None], y)
    assert "not checked: factor 'beyond'" in fitted.explain()


def between(x, low, high, of_site=True, wrong=0.0):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    sides = torch.special.log_ndtr(mu - low), torch.special.log_ndtr(high - mu)
    log_inside = sides[0] if high == math.inf else sides[1]
    if math.isfinite(low) and math.isfinite(high):
        log_inside = (sides[0].exp() + sides[1].exp() - 1).log()
    with pyro.plate("rows", len(x)):
        if of_site:
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x[:, 0])
            pyro.factor("bounds", (wrong - log_inside) * x.new_ones(len(x)))
        else:
            pyro.factor("x", dist.Normal(mu, 1.0).log_prob(x[:, 0]) - log_inside)


@pytest.mark.parametrize("of_site", [True, False])
@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.5, math.inf, "over values above 0.5"),
        (-math.inf, 1.75, "over values below 1.75"),
        (0.0, 2.0, "over values above .* and below 2$"),
    ],
)
def test_bounds_of_a_truncated_law_are_found(of_site, low, high, said):
    x = table(size=60)
    x = x[(x > low) & (x < high)][:, None]

    def joint(mu):
        share = norm.cdf(high, mu) - norm.cdf(low, mu)
        return norm.pdf(mu, 0, 2) * np.exp((norm.logpdf(x, mu) - np.log(share)).sum() + 30)

    truth = np.log(quad(joint, -6, 6, epsabs=0, epsrel=1e-11, limit=200)[0]) - 30
    fitted = BayesMPT(partial(between, low=low, high=high, of_site=of_site)).fit(x)
    assert fitted.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-6)
    assert re.search(f"believed: .* adds up to one {said}", fitted.explain(), re.MULTILINE)


def test_a_constant_that_is_none_is_refused():
    x = np.abs(table())
    with pytest.raises(
        ModelError, match="'bounds' with site 'x' is no log-density of column 0: it adds up to"
    ):
        BayesMPT(partial(between, low=0.0, high=math.inf, wrong=0.2)).fit(x)
    outside = np.append(x, [[-0.5]], 0)
    with pytest.raises(ModelError, match="'bounds' with site 'x' is no log-density of column 0"):
        BayesMPT(partial(between, low=0.0, high=math.inf)).fit(outside)


def test_a_missing_part_of_what_a_factor_reads_is_refused():
    x, stopped = np.array([0.3, 0.7, np.nan, 0.2, 1.0]), np.array([0.0, 0, 1, 0, 1])
    with pytest.raises(ModelError, match="one density for a whole event"):
        BayesMPT(waiting).fit(x[:, None], stopped)
    holes = np.array([[0.5], [np.nan], [0.3], [1.0]])
    with pytest.raises(ModelError, match="missing cells reach the distribution of site 'density'"):
        BayesMPT(line).fit(holes, np.array([0.3, 0.1, 0.2, 0.8]))


def line(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.factor("density", -0.5 * (y - w * x[:, 0]) ** 2 - HALF_LOG_2PI)


def test_a_response_is_told_from_its_covariates_by_its_integral():
    x, y = table(), table(1)[:, 0]
    truth = float(log_density(y[None], np.zeros(12), x @ x.T + np.eye(12))[0])
    fitted = BayesMPT(line).fit(x, y)
    assert fitted.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-8)
    assert "believed" not in fitted.explain()
    y_holes = y.copy()
    y_holes[2] = np.nan
    fewer = BayesMPT(line).fit(np.delete(x, 2, 0), np.delete(y, 2)).log_marginal_likelihood_
    assert BayesMPT(line).fit(x, y_holes).log_marginal_likelihood_ == pytest.approx(fewer, abs=1e-8)


def mixture_of_factors(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3, dtype=torch.float64)))
        pyro.factor("density", -0.5 * (x[:, 0] - 3 * z) ** 2 - HALF_LOG_2PI)


def test_discrete_latents_of_a_factor_are_summed_out():
    x = table()
    truth = np.log(0.7 * norm.pdf(x) + 0.3 * norm.pdf(x, 3)).sum()
    assert BayesMPT(mixture_of_factors).fit(x).log_marginal_likelihood_ == pytest.approx(truth, abs=1e-9)


def penalty(x):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.factor("penalty", -w.abs())
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(w, 1.0), obs=x[:, 0])


def twice(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[:, 0])
        pyro.factor("again", -0.5 * x[:, 0] ** 2 - HALF_LOG_2PI)


def neighbours(x):
    with pyro.plate("rows", len(x)):
        pyro.factor("density", -0.5 * (x[:, 0] - x[:, 0].roll(1)) ** 2 - HALF_LOG_2PI)


def total(x):
    pyro.factor("density", (-0.5 * x[:, 0] ** 2 - HALF_LOG_2PI).sum())


@pytest.mark.parametrize(
    ("program", "match"),
    [
        (
            penalty,
            "'penalty' is a pyro.factor that moves with no cell of the data: it tilts the prior of 'w'",
        ),
        (twice, "read by pyro.factor 'again' and scored by site 'x' too"),
        (neighbours, "moves in one row with cells of other rows"),
        (total, "not one number for each row"),
    ],
)
def test_what_is_no_density_of_its_rows_cells_is_refused(program, match):
    with pytest.raises(ModelError, match=match):
        BayesMPT(program).fit(table())
