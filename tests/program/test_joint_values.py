"""Discrete latents of a plate whose entries meet outside of it, by enumeration of all their values."""

from functools import partial
from itertools import product

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.integrate import quad
from scipy.special import logsumexp

from bayes_mpt import BayesMPT
from bayes_mpt.program.analysis import analyze
from bayes_mpt.program.factor_runs import read_factors
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


def test_entries_looked_up_by_their_first_axis_are_told_to_take_the_last():
    group, y = np.array([0.0, 4, 2, 3, 1, 4, 0]), np.array([0.3, 2.1, -0.4, 1.9, 0.1, 2.4, -0.2])

    def program(x, y, entry):
        share = pyro.sample("share", dist.Beta(x.new_tensor(1.0), 1.0))
        with pyro.plate("groups", 5):
            k = pyro.sample("k", dist.Bernoulli(share))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(2 * entry(k, x[:, 0].long()), 1.0), obs=y)

    with pytest.raises(ModelError, match=r"write k\[..., group\] in place of k\[group\]"):
        BayesMPT(partial(program, entry=lambda k, group: k[group])).fit(group[:, None], y)
    fitted = BayesMPT(partial(program, entry=lambda k, group: k[..., group])).fit(group[:, None], y)

    def likelihood(share):
        each = [
            share * stats.norm.pdf(y[group == j], 2).prod()
            + (1 - share) * stats.norm.pdf(y[group == j]).prod()
            for j in range(5)
        ]
        return np.prod(each)

    truth = np.log(quad(likelihood, 0, 1, epsabs=0, epsrel=1e-10)[0])
    assert fitted.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-8)


def test_an_axis_that_is_lost_in_a_loop_is_refused():
    def program(x):
        with pyro.plate("lags", 2):
            included = pyro.sample("included", dist.Bernoulli(0.4))
        for t in range(2, len(x)):
            pyro.sample(f"x_{t}", dist.Normal((included * x[t - 2 : t, 0]).sum(-1), 1.0), obs=x[t, 0])

    with pytest.raises(ModelError, match=r"site 'x_2' has another log-density"):
        BayesMPT(program).fit(X[:, :1])


GROUP = np.repeat([0.0, 1.0, 2.0], 4)[:, None]
LEVELS = np.array([-1.0, 0.0, 2.0])
SHARES = np.array([0.2, 0.5, 0.3])


def kinds_of_groups(look_up):
    def program(x, y):
        with pyro.plate("groups", 3):
            kind = pyro.sample("kind", dist.Categorical(torch.as_tensor(SHARES)))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(look_up(torch.as_tensor(LEVELS), kind, x[:, 0].long()), 1.0), obs=y)

    return program


@pytest.mark.parametrize(
    "look_up",
    [lambda level, k, i: level[k[..., i]], lambda level, k, i: level[k][..., i]],
    ids=["kind", "level"],
)
def test_entries_of_a_plate_are_looked_up_by_rows(look_up):
    terms = stats.norm.logpdf(Y[:, None], LEVELS).reshape(3, 4, 3).sum(1) + np.log(SHARES)  # (groups, kinds)
    found = BayesMPT(kinds_of_groups(look_up)).fit(GROUP, Y).log_marginal_likelihood_
    assert found == pytest.approx(logsumexp(terms, axis=1).sum(), abs=1e-9)


def test_entries_that_are_looked_up_along_the_values_are_refused_with_the_way_to_write_it():
    with pytest.raises(
        ModelError, match=r"inside plate\('rows'\) at site y dim -1, 12 vs 3\): write .* z\[\.\.\., group\]"
    ):
        BayesMPT(kinds_of_groups(lambda level, k, i: level[k[i]])).fit(GROUP, Y)


def test_effects_whose_means_are_chosen_in_each_entry():
    """Given the effects no row looks at the kinds: sum_k p(k) p(effect | k) in each entry, not in each combination."""

    def program(x, y):
        scale = pyro.sample("scale", dist.Gamma(x.new_tensor(2.0), 2.0))
        with pyro.plate("groups", 3):
            kind = pyro.sample("kind", dist.Categorical(torch.as_tensor(SHARES)))
            effect = pyro.sample("effect", dist.Normal(torch.as_tensor(LEVELS)[kind], 0.5))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(effect[..., x[:, 0].long()], scale), obs=y)

    args = torch.as_tensor(GROUP), torch.as_tensor(Y)
    scale, effect = np.array([0.7, 1.3]), RNG.normal(size=(2, 3))
    effects = logsumexp(np.log(SHARES) + stats.norm.logpdf(effect[..., None], LEVELS, 0.5), axis=-1).sum(1)
    rows = stats.norm.logpdf(Y, effect[:, GROUP[:, 0].astype(int)], scale[:, None]).sum(1)
    truth = stats.gamma.logpdf(scale, 2, scale=0.5) + effects + rows
    values = {"scale": torch.as_tensor(scale)[:, None], "effect": torch.as_tensor(effect)}
    read = read_factors(program, args, analyze(program, args), values, n_nodes=2)
    found = read.log_joint(torch.ones(1, 12, dtype=torch.bool))
    np.testing.assert_allclose(found[:, 0], truth, atol=1e-10)
