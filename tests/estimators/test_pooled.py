"""A pooled model, whose rows are one vector, beside one whose rows are independent: compared by their totals."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
from scipy import stats

from bayes_mpt import BayesMPT, compare

X = np.random.default_rng(0).normal(1.0, 1.0, size=(12, 3))


def pooled(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0).expand(x.shape).to_event(1), obs=x)


def unpooled(x):
    with pyro.plate("rows", len(x)):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        pyro.sample("x", dist.Normal(mu[..., None], 1.0).expand((*mu.shape, 3)).to_event(1), obs=x)


def partly(x):
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("rows", len(x)):
        mu = pyro.sample("mu", dist.Normal(0.0, tau))
        pyro.sample("x", dist.Normal(mu[..., None], 1.0).expand((*mu.shape, 3)).to_event(1), obs=x)


def test_pooled_and_unpooled_are_compared_by_totals():
    table = compare({"pooled": BayesMPT(pooled).fit(X), "unpooled": BayesMPT(unpooled).fit(X)}, X)
    one = stats.multivariate_normal(np.zeros(36), np.eye(36) + 4).logpdf(X.ravel())
    each = stats.multivariate_normal(np.zeros(3), np.eye(3) + 4).logpdf(X).sum()
    assert table.loc["pooled", "lml"] == pytest.approx(one, abs=1e-9)
    assert table.loc["unpooled", "lml_diff"] == pytest.approx(each - one, abs=1e-9)
    assert table["dse"].isna().all() and (table["mc_dse"] == 0).all()


def test_other_latents_or_other_cells_are_refused():
    models = {"pooled": BayesMPT(pooled).fit(X), "partly": BayesMPT(partly).fit(X)}
    with pytest.raises(ValueError, match="'partly' and the rest differ.*one vector.*in what is integrated"):
        compare({"unpooled": BayesMPT(unpooled).fit(X), **models}, X)
    assert compare(models, X).loc["partly", "rank"] in (
        0,
        1,
    )  # both one vector: latents of rows under a shared one
    with pytest.raises(ValueError, match="not comparable.*tokens|cannot be compared on these rows"):
        compare({"pooled": BayesMPT(pooled).fit(X[:, :2]), "unpooled": BayesMPT(unpooled).fit(X)}, X)
