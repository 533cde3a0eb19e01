"""Discrete latents beside continuous ones: all nodes in one run, against sums and integrals by scipy."""

from itertools import product

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.integrate import quad
from scipy.special import logsumexp
from scipy.stats import beta, norm, poisson

from bayes_mpt import BayesMPT
from bayes_mpt.predictors import Importance, Quadrature
from bayes_mpt.program.analysis import analyze
from bayes_mpt.program.batched import Batched
from bayes_mpt.program.factor_runs import read_factors


def integral(log_joint, low, high, near):
    """log of the integral of exp(log_joint), scaled by its value nearby."""
    top = max(log_joint(at) for at in near)
    whole = quad(
        lambda u: np.exp(log_joint(u) - top), low, high, points=near, limit=500, epsabs=0, epsrel=1e-12
    )
    return top + np.log(whole[0])


def random(seed=0):
    return np.random.default_rng(seed)


def mixture(x):
    second = pyro.sample("second", dist.Normal(1.0, 2.0))
    locs = torch.stack([second.new_zeros(()), second])
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("x", dist.Normal(locs[z], 1.0), obs=x[:, 0])


def test_a_mixture_by_assignments_has_the_evidence_of_the_sum():
    x = random().normal([0.0, 3.0] * 10, 1.0)

    def log_joint(second):
        parts = np.stack([np.log(0.3) + norm.logpdf(x), np.log(0.7) + norm.logpdf(x, second)])
        return norm.logpdf(second, 1, 2) + logsumexp(parts, 0).sum()

    found = BayesMPT(mixture).fit(x[:, None])  # a warning that nodes run one by one would be an error
    assert "node by node" not in found.explain()
    assert found.log_marginal_likelihood_ == pytest.approx(
        integral(log_joint, -10, 10, (0.0, 1.5, 3.0)), abs=1e-8
    )


def by_label(x):
    with pyro.plate("rows", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.4, 0.6])))
        z = pyro.sample("z", dist.Normal(torch.tensor([0.0, 2.0])[k], 0.5))
        pyro.sample("x", dist.Poisson(z.exp()), obs=x[:, 0])


def test_a_label_decides_of_the_mean_of_a_latent_beside_counts():
    x, shares, total = np.array([0.0, 1, 3, 9]), [], 0.0
    for count in x:

        def log_joint(z, k, count=count):
            weight = np.log([0.4, 0.6][k]) + norm.logpdf(z, [0, 2][k], 0.5)
            return weight + poisson.logpmf(count, np.exp(z))

        each = [integral(lambda z, k=k: log_joint(z, k), -6, 8, (0.0, 1.0, 2.0)) for k in range(2)]
        total += logsumexp(each)
        shares.append(np.exp(each - logsumexp(each)))
    found = BayesMPT(by_label).fit(x[:, None])
    assert found.log_marginal_likelihood_ == pytest.approx(total, abs=1e-9)
    assert found.predict_proba(x[:, None]) == pytest.approx(np.array(shares), abs=1e-9)


def chain_of_states(x):
    loc = pyro.sample("loc", dist.Normal(1.0, 1.0))
    locs, stay, z = torch.stack([-loc, loc]), torch.tensor([[0.8, 0.2], [0.3, 0.7]]), 0
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(stay[z]))
        pyro.sample(f"x_{t}", dist.Normal(locs[z], 1.0), obs=x[t, 0])


def test_a_hidden_markov_chain_with_a_prior_is_that_of_all_its_paths():
    x, stay = random(1).normal(size=5), np.array([[0.8, 0.2], [0.3, 0.7]])

    def log_joint(loc):
        paths = []
        for path in product(range(2), repeat=len(x)):
            steps = np.log(stay[(0, *path[:-1]), path])
            paths.append(steps.sum() + norm.logpdf(x, np.array([-loc, loc])[list(path)]).sum())
        return norm.logpdf(loc, 1, 1) + logsumexp(paths)

    found = BayesMPT(chain_of_states, predictor=Quadrature(128)).fit(x[:, None])
    truth = integral(log_joint, -8, 8, (-1.0, 0.0, 0.5, 1.0))
    assert found.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-8)
    assert found.log_marginal_likelihood_se_ < 1e-6


TOPICS = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])


def topics(x):
    phi = torch.tensor(TOPICS)
    with pyro.plate("documents", len(x), dim=-2):
        share = pyro.sample("share", dist.Beta(torch.tensor(2.0), 3.0))
        with pyro.plate("words", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Bernoulli(share)).long()
            pyro.sample("x", dist.Categorical(phi[z]), obs=x)


def test_topics_of_words_are_summed_within_each_document():
    x = random(2).integers(0, 3, size=(3, 5)).astype(float)
    total = 0.0
    for words in x.astype(int):

        def log_joint(share, words=words):
            return (
                beta.logpdf(share, 2, 3)
                + np.log((1 - share) * TOPICS[0, words] + share * TOPICS[1, words]).sum()
            )

        total += integral(log_joint, 0, 1, (0.2, 0.4, 0.6))
    found = BayesMPT(topics).fit(x)
    assert found.log_marginal_likelihood_ == pytest.approx(total, abs=1e-7)


def weights(x):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
        pyro.sample(
            "kind", dist.Categorical(logits=torch.stack([w[0] + z, w[1] * z, 0 * z], -1)), obs=x[:, 0]
        )
        pyro.sample("x", dist.Normal(w[z.long()], 1.0), obs=x[:, 1])


def test_runs_in_one_are_the_runs_one_by_one():
    x = torch.stack([torch.tensor([0.0, 1, 2, 1]), torch.tensor([0.3, -1.0, 2.0, 0.5])], -1).double()
    program = analyze(weights, (x,))
    w = torch.tensor([[0.5, -1.0], [2.0, 0.3], [0.0, 0.0]]).double()
    together = read_factors(weights, (x,), program, {"w": w}, 3, Batched.VMAP)
    apart = [read_factors(weights, (x,), program, {"w": each}) for each in w]
    visible = torch.ones(1, 8, dtype=torch.bool)
    visible[0, [1, 6]] = False
    for question in ("log_joint", "predictive", "means", "levels", "responsibilities"):
        one_by_one = torch.cat([getattr(f, question)(visible) for f in apart])
        torch.testing.assert_close(getattr(together, question)(visible), one_by_one, rtol=1e-12, atol=1e-12)


def times_matrix(x):
    with pyro.plate("rows", len(x)):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Poisson((w @ x.new_ones(2, 3)).exp()).to_event(1), obs=x)


def test_tokens_are_drawn_at_nodes_of_a_program_that_does_not_broadcast():
    x = torch.tensor([[1.0, 2.0, np.nan], [0.0, 1.0, 1.0]], dtype=torch.float64)
    read = Importance(200).bind(times_matrix, (x,)).read((x,))
    torch.manual_seed(0)
    draws = read.posterior().draws(400)
    assert draws.shape == (400, 2, 3)
    assert torch.equal(draws[:, ~x.isnan()], x[~x.isnan()].expand(400, -1))
    mean, error = draws[:, 0, 2].mean(), draws[:, 0, 2].std() / 20
    assert 0 < error < 0.2
    assert abs(mean - read.posterior().tokens[0, 2]) < 4 * error
