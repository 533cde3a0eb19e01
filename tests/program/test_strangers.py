"""Kinds of programs that strangers bring, as they write them: a truth of its own for each, or words of refusal."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.reparam import LocScaleReparam
from scipy import stats
from scipy.special import expit, gammaln, logsumexp
from sklearn.exceptions import DataConversionWarning

from bayes_mpt import BayesMPT
from bayes_mpt.program.program import ModelError


def schools(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("schools", len(x)):
        theta = pyro.sample("theta", dist.Normal(mu, 2.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=x[:, 0])


def test_a_program_behind_poutine_reparam_has_the_arguments_of_the_program():
    """Pyro's wrapper takes any: with reparametrised effects the number is that of the program itself."""
    y = np.array([2.0, -1.0, 0.5, 3.0])
    model = poutine.reparam(schools, config={"theta": LocScaleReparam(0.0)})
    truth = stats.multivariate_normal.logpdf(y, cov=5 * np.eye(4) + 25)
    assert BayesMPT(model).fit(y[:, None]).log_marginal_likelihood_ == pytest.approx(truth, abs=1e-9)


def test_reparametrised_latents_of_a_markov_chain_beside_labels_that_are_summed_out():
    """Capture and recapture, with an effect of each year: pyro.markov knows it before its parts."""
    seen = np.array([[1, 1, 0], [1, 0, 1], [1, 0, 0], [1, 1, 1.0]])

    @config_enumerate
    def program(x):
        animals, alive = pyro.plate("animals", len(x)), 1.0
        for t in pyro.markov(range(1, 3)):
            effect = pyro.sample(f"effect_{t}", dist.Normal(0.5, 0.7))
            with animals:
                alive = pyro.sample(f"alive_{t}", dist.Bernoulli(0.8 * alive))
                pyro.sample(f"seen_{t}", dist.Bernoulli(torch.sigmoid(effect) * alive), obs=x[:, t])

    model = poutine.reparam(program, config={f"effect_{t}": LocScaleReparam(0.0) for t in (1, 2)})
    node, weight = np.polynomial.hermite_e.hermegauss(40)
    p, q = expit(0.5 + 0.7 * node)[:, None], expit(0.5 + 0.7 * node)
    by_animal = [0.8 * p * (1 - 0.8 * q), 0.8 * (1 - p) * 0.8 * q]
    by_animal += [0.2 + 0.8 * (1 - p) * (1 - 0.8 * q), 0.8 * p * 0.8 * q]
    truth = np.log((np.prod(by_animal, axis=0) * np.outer(weight, weight)).sum() / weight.sum() ** 2)
    assert BayesMPT(model, random_state=0).fit(seen).log_marginal_likelihood_ == pytest.approx(
        truth, abs=1e-7
    )


def line(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def test_a_response_in_a_table_of_one_column_is_read_as_numbers():
    """As scikit-learn does, with its warning; of a program that observes the column there is none."""
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(7, 2)), rng.normal(size=(7, 1))
    truth = stats.multivariate_normal.logpdf(y[:, 0], cov=np.eye(7) + X @ X.T)
    with pytest.warns(DataConversionWarning, match=r"y.ravel\(\)"):
        fitted = BayesMPT(line).fit(X, y)
    assert fitted.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-9)
    assert 7 * fitted.score(X, y) == pytest.approx(7 * fitted.score(X, y[:, 0]), abs=1e-12)
    assert fitted.predict(X).shape == (7,)


def test_a_table_of_true_and_false_may_be_a_condition():
    rng = np.random.default_rng(1)
    x, y = rng.random((12, 1)) < 0.5, rng.integers(0, 5, 12)

    def program(x, y):
        rate = pyro.sample("rate", dist.Gamma(torch.full((2,), 2.0), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Poisson(torch.where(x[:, 0], rate[1], rate[0])), obs=y)

    def evidence(y):
        return gammaln(2 + y.sum()) - (2 + y.sum()) * np.log(1 + len(y)) - gammaln(y + 1).sum()

    found = BayesMPT(program).fit(x, y).log_marginal_likelihood_
    assert found == pytest.approx(evidence(y[x[:, 0]]) + evidence(y[~x[:, 0]]), abs=1e-8)
    with pytest.raises(ModelError, match=r"x\[:, j\] == 1"):
        BayesMPT(program).fit(x + 0.5, y)


def test_a_program_that_fills_memory_runs_on_all_nodes_at_once(recwarn):
    """Ordered categories: torch.zeros(...) of one node, filled with what differs from node to node."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=15)
    y = np.digitize(x + rng.logistic(size=15), [-0.5, 1.0])

    def program(x, y):
        slope, first = (
            pyro.sample("slope", dist.Normal(0.0, 1.0)),
            pyro.sample("first", dist.Normal(-0.5, 1.0)),
        )
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.OrderedLogistic(slope * x[:, 0], torch.stack([first, first + 1.5])), obs=y)

    slope, first = (axis[..., None] for axis in np.meshgrid(np.linspace(-5, 6, 111), np.linspace(-6, 5, 111)))
    below = [0.0 * first, *(expit(cut - slope * x) for cut in (first, first + 1.5)), 1 + 0.0 * first]
    shape = slope.shape[:2] + x.shape
    share = np.stack([np.broadcast_to(above - under, shape) for under, above in pairwise(below)])
    log_share = np.log(np.take_along_axis(share, y[None, None, None], 0))[0].sum(-1)
    log_prior = (stats.norm.logpdf(slope) + stats.norm.logpdf(first, -0.5))[..., 0]
    truth = logsumexp(log_share + log_prior) + 2 * np.log(0.1)
    fitted = BayesMPT(program).fit(x[:, None], y)
    assert fitted.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-6)
    assert not recwarn.list


def test_memory_that_a_gradient_needs_is_not_written_into():
    """torch says so in words of its own; what the refusal says to write has the number."""
    y = np.array([0.3, -0.2, 0.5])

    def filled(x):
        a = pyro.sample("a", dist.Uniform(-1.0, 1.0))
        mean = torch.zeros(len(x))
        mean[0] = a
        for t in range(1, len(x)):
            mean[t] = a * mean[t - 1]
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=x[:, 0])

    def stacked(x):
        means = [pyro.sample("a", dist.Uniform(-1.0, 1.0))]
        for _ in range(1, len(x)):
            means.append(means[0] * means[-1])
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(torch.stack(means, -1), 1.0), obs=x[:, 0])

    with pytest.raises(ModelError, match=r"torch.stack\(values, -1\)"):
        BayesMPT(filled).fit(y[:, None])
    node, weight = np.polynomial.legendre.leggauss(60)
    terms = stats.norm.logpdf(y[:, None], node ** np.arange(1, 4)[:, None]).sum(0)
    found = BayesMPT(stacked).fit(y[:, None]).log_marginal_likelihood_
    assert found == pytest.approx(logsumexp(terms + np.log(weight / 2)), abs=1e-8)


@pytest.mark.parametrize("right", [False, True])
def test_a_change_point_meets_the_entries_of_a_plate_as_it_is(right):
    y = np.array([5.0, 4, 6, 1, 0, 2])

    def program(x):
        early, late = pyro.sample("early", dist.Exponential(0.3)), pyro.sample("late", dist.Exponential(0.3))
        s = pyro.sample("s", dist.Categorical(torch.ones(6) / 6))
        before = torch.arange(6.0) < (s if right else s[..., None])
        with pyro.plate("years", 6):
            pyro.sample("y", dist.Poisson(torch.where(before, early, late)), obs=x[:, 0])

    if not right:
        with pytest.raises(ModelError, match=r"as it is, s and not s\[..., None\]"):
            BayesMPT(program).fit(y[:, None])
        return

    def evidence(y):
        return (
            np.log(0.3) + gammaln(1 + y.sum()) - (1 + y.sum()) * np.log(0.3 + len(y)) - gammaln(y + 1).sum()
        )

    truth = logsumexp([evidence(y[:s]) + evidence(y[s:]) for s in range(6)]) - np.log(6)
    fitted = BayesMPT(program).fit(y[:, None])
    assert abs(fitted.log_marginal_likelihood_ - truth) < min(0.01, fitted.log_marginal_likelihood_se_)
