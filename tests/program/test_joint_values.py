"""Discrete latents of a plate whose entries meet outside of it, by enumeration of all their values."""

from itertools import product

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

from bayes_mpt import BayesMPT
from bayes_mpt.program.program import ModelError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 3))
Y = X @ [1.5, 0.0, -1.0] + RNG.normal(size=12)
COUNTS = RNG.poisson(np.exp(0.3 + X @ [0.5, 0.0, -0.4])).astype(float)


def spike_and_slab(x, y):
    with pyro.plate("weights", 3):
        included = pyro.sample("included", dist.Bernoulli(0.3))
        w = pyro.sample("w", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal((x * (included * w)).sum(-1), 1.0), obs=y)


def subsets(log_density):
    found = []
    for included in product([0, 1], repeat=3):
        n = sum(included)
        found.append(n * np.log(0.3) + (3 - n) * np.log(0.7) + log_density(np.array(included)))
    return logsumexp(found)


def test_which_weights_of_a_regression_are_zero():
    """Given the inclusions a closed form, N(0, I + 4 X_d X_d')."""
    fit = BayesMPT(spike_and_slab).fit(X, Y)

    def given(included):
        part = X * included
        return stats.multivariate_normal(np.zeros(12), np.eye(12) + 4 * part @ part.T).logpdf(Y)

    assert fit.log_marginal_likelihood_ == pytest.approx(subsets(given), abs=1e-10)
    assert fit.log_marginal_likelihood_se_ == 0
    assert "Exact" in fit.explain()


def test_with_a_gap_in_the_response():
    y = np.where(np.arange(12) == 4, np.nan, Y)
    seen = ~np.isnan(y)

    def given(included):
        part = (X * included)[seen]
        return stats.multivariate_normal(np.zeros(11), np.eye(11) + 4 * part @ part.T).logpdf(y[seen])

    found = BayesMPT(spike_and_slab).fit(X, y).log_marginal_likelihood_
    assert found == pytest.approx(subsets(given), abs=1e-10)


def test_tokens_that_are_not_normal():
    """No continuous latent: every combination has a density of its own."""
    w = torch.tensor([0.5, 0.8, -0.4])

    def counts(x, y):
        with pyro.plate("weights", 3):
            included = pyro.sample("included", dist.Bernoulli(0.3))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Poisson((x * (included * w).unsqueeze(-2)).sum(-1).exp()), obs=y)

    def given(included):
        return stats.poisson(np.exp(X @ (included * w.double().numpy()))).logpmf(COUNTS).sum()

    found = BayesMPT(counts).fit(X, COUNTS).log_marginal_likelihood_
    assert found == pytest.approx(subsets(given), abs=1e-6)  # the weights are written in single precision


def test_entries_that_never_meet_stay_apart():
    """A class for each column: 2 values a column, not 2^3 a row."""

    def columns(x):
        with pyro.plate("columns", 3, dim=-1):
            high = pyro.sample("high", dist.Bernoulli(0.3))
            with pyro.plate("rows", len(x), dim=-2):
                pyro.sample("x", dist.Normal(high, 1.0), obs=x)

    by_column = [
        logsumexp(
            [np.log(0.7) + stats.norm(0, 1).logpdf(c).sum(), np.log(0.3) + stats.norm(1, 1).logpdf(c).sum()]
        )
        for c in X.T
    ]
    assert BayesMPT(columns).fit(X).log_marginal_likelihood_ == pytest.approx(sum(by_column), abs=1e-10)


def test_too_many_combinations_are_refused():
    def many(x, y):
        with pyro.plate("weights", 30):
            included = pyro.sample("included", dist.Bernoulli(0.3))
        with pyro.plate("rows", len(x)):
            pyro.sample(
                "y", dist.Poisson((0.1 * included.unsqueeze(-2)).sum(-1).exp() * x[:, 0].exp()), obs=y
            )

    with pytest.raises(ValueError, match=r"30 entries of discrete latent 'included'.*2\^30 combinations"):
        BayesMPT(many).fit(X, COUNTS)


@pytest.mark.parametrize("density", [dist.Normal, dist.Laplace])
@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("n_rows", [2, 5])
def test_values_that_line_up_with_rows_are_refused(n_rows, latent, density):
    """(x * z).sum(-1) with z (2, 1) runs for two rows, and row n sees value n; for others it does not run."""

    def program(x, y):
        scale = pyro.sample("scale", dist.HalfNormal(1.0)) if latent else 1.0
        with pyro.plate("weights", 3):
            included = pyro.sample("included", dist.Bernoulli(0.3))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", density((x * included).sum(-1), scale), obs=y)

    with pytest.raises(ModelError, match="cannot run on all values"):
        BayesMPT(program).fit(X[:n_rows], Y[:n_rows])


def test_an_axis_that_is_lost_in_a_loop_is_refused():
    def program(x):
        with pyro.plate("lags", 2):
            included = pyro.sample("included", dist.Bernoulli(0.4))
        for t in range(2, len(x)):
            pyro.sample(f"x_{t}", dist.Normal((included * x[t - 2 : t, 0]).sum(-1), 1.0), obs=x[t, 0])

    with pytest.raises(ModelError, match=r"site 'x_2' has another log-density"):
        BayesMPT(program).fit(X[:, :1])
