"""Discrete latents of the data set beside Normal ones: evidence and predictions by enumeration of all joint values."""

from itertools import product

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import logsumexp
from truths import log_density

from bayes_mpt import BayesMPT
from bayes_mpt.predictors.nodes import vector_maps

RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 2))
Y = X @ [1.0, 0.2] + RNG.normal(size=20)
Y[3] = np.nan


def chosen_columns(x, y):
    wide = pyro.sample("wide", dist.Categorical(torch.tensor([0.2, 0.8])))
    with pyro.plate("weights", 2):
        included = pyro.sample("included", dist.Bernoulli(0.3))
        w = pyro.sample("w", dist.Normal(0.0, 1.0 + 2 * wide))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal((x * (included * w).unsqueeze(-2)).sum(-1), 1.0), obs=y)


def test_evidence_and_predictions_are_averages_over_all_joint_values():
    seen = ~np.isnan(Y)
    log_p, mean = [], []
    for wide, *included in product((0, 1), repeat=3):
        design = X * included
        cov = (1 + 2 * wide) ** 2 * design @ design.T
        inner = cov[np.ix_(seen, seen)] + np.eye(seen.sum())
        prior = np.log([0.2, 0.8][wide]) + np.log(np.where(included, 0.3, 0.7)).sum()
        log_p.append(prior + log_density(Y[None, seen], np.zeros(seen.sum()), inner)[0])
        mean.append(cov[:, seen] @ np.linalg.solve(inner, Y[seen]))
    fitted = BayesMPT(chosen_columns).fit(X, Y)
    assert fitted.log_marginal_likelihood_ == pytest.approx(logsumexp(log_p), abs=1e-9)
    assert fitted.log_marginal_likelihood_se_ == 0
    share = np.exp(np.array(log_p) - logsumexp(log_p))
    np.testing.assert_allclose(fitted.predict(X), share @ np.array(mean), atol=1e-9)
    assert "Exact: the values of wide, included are summed out" in fitted.explain()


def test_too_many_joint_values_are_left_to_another_way(monkeypatch):
    monkeypatch.setattr(vector_maps, "MAX_VECTOR_MAPS", 7)
    fitted = BayesMPT(chosen_columns).fit(X, Y)
    assert "wide, included summed out" in fitted.explain()
    assert fitted.log_marginal_likelihood_ < 0
