"""average="posterior": rows under the mean of the Gaussian over the posterior, against dense algebra."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import multivariate_normal
from test_selection import loc_only

from bayes_mpt import BayesMPT, MarginalLikelihoodSearch, loadings
from bayes_mpt.evidence import factor_prior, sample_evidence
from bayes_mpt.models import PPCA, FactorAnalysis
from bayes_mpt.program.statistics import SufficientStatistics

N, T, K = 60, 6, 2


def table(holes=0.0, seed=0, n=N):
    rng = np.random.default_rng(7)
    w, sd, mean = rng.normal(size=(K, T)), rng.uniform(0.5, 1.5, T), 10 * rng.normal(size=T)
    rng = np.random.default_rng(seed)
    x = mean + rng.normal(size=(n, K)) @ w + sd * rng.normal(size=(n, T))
    x[rng.random(x.shape) < holes] = np.nan
    return x


CASES = [(PPCA(K), np.ones(T), 0.0), (FactorAnalysis(K), None, 0.0), (FactorAnalysis(K), None, 0.15)]


@pytest.fixture(scope="module", params=CASES, ids=["ppca", "fa", "fa-holes"])
def case(request):
    model, shape, holes = request.param
    x = table(holes)
    fitted = BayesMPT(model, average="posterior").fit(x)
    truth = sample_evidence(SufficientStatistics(x), K, factor_prior(x), shape=shape, seed=0)
    return x, fitted, truth


def test_rows_are_scored_by_the_mean_covariance(case):
    x, fitted, truth = case
    np.testing.assert_allclose(fitted.get_covariance(), truth.covariance, rtol=1e-6)
    np.testing.assert_allclose(fitted.mean_, truth.mean, rtol=1e-6)
    np.testing.assert_allclose(fitted.get_precision() @ fitted.get_covariance(), np.eye(T), atol=1e-9)
    want = []
    for row in x:
        o = np.isfinite(row)
        cov = fitted.get_covariance()[np.ix_(o, o)]
        want.append(multivariate_normal(fitted.mean_[o], cov).logpdf(row[o]) if o.any() else 0.0)
    np.testing.assert_allclose(fitted.score_samples(x), want, atol=1e-9)
    assert fitted.log_likelihood_ == pytest.approx(np.sum(want), abs=1e-8)
    assert fitted.log_marginal_likelihood_ == pytest.approx(truth.log_evidence, abs=1e-6)
    assert fitted.log_marginal_likelihood_se_ == pytest.approx(truth.se, rel=1e-6)


def test_attributes_are_means_over_the_draws(case):
    _, fitted, truth = case
    np.testing.assert_allclose(fitted.components_.T, truth.draws.mean_loadings, atol=1e-6)
    np.testing.assert_allclose(fitted.noise_variance_, truth.draws.mean_noise, rtol=1e-6)
    assert "averaged:        loadings: t_3" in fitted.explain() and "of this table alone" in fitted.explain()


def test_cells_and_latents_given_the_others(case):
    x, fitted, _ = case
    some = x.copy()
    some[:10, 0] = np.nan
    (filled, sd), cov, w = fitted.impute(some, return_std=True), fitted.get_covariance(), fitted.components_.T
    assert (sd[np.isfinite(some)] == 0).all()
    for i in range(10):
        o = np.isfinite(some[i])
        rest = np.linalg.solve(cov[np.ix_(o, o)], some[i, o] - fitted.mean_[o])
        np.testing.assert_allclose(filled[i, ~o], fitted.mean_[~o] + cov[np.ix_(~o, o)] @ rest, atol=1e-8)
        var = 1 / np.diag(np.linalg.inv(cov)) if o.sum() == T - 1 else None
        if var is not None:  # of one cell given all others, another way
            np.testing.assert_allclose(sd[i, 0], np.sqrt(var[0]), rtol=1e-9)
        # z ~ N(0, I), x = m + W z + e: E z = W' C^-1 (x - m)
        np.testing.assert_allclose(fitted.transform(some[i : i + 1])[0], w[o].T @ rest, atol=1e-8)
    z = np.random.default_rng(0).normal(size=(3, K))
    np.testing.assert_allclose(fitted.inverse_transform(z), fitted.mean_ + z @ w.T, atol=1e-9)


def test_samples_have_the_mean_covariance(case):
    _, fitted, _ = case
    n = 20_000
    x, cov = fitted.sample(n), fitted.get_covariance()
    sd = np.sqrt((np.outer(np.diag(cov), np.diag(cov)) + cov**2) / n)
    assert (np.abs(np.cov(x.T) - cov) < 5 * sd).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::bayes_mpt.warnings.ZeroNoiseWarning")  # of the maximum
def test_new_rows_are_predicted_better():
    """Than at the maximum, in each of four tables with few rows."""
    new, gains = table(seed=99, n=2000), []
    for seed in range(4):
        x = table(0.1 * (seed % 2), seed, n=25)
        one, mean = (BayesMPT(FactorAnalysis(K), average=a).fit(x) for a in (None, "posterior"))
        gains.append(mean.score(new) - one.score(new))
    assert min(gains) > 0


@pytest.mark.slow
def test_search_takes_what_is_used():
    """The expected score is of the averaged fits; the evidence is the same."""
    x, grid = table(), {"model__n_components": [1, 2, 3]}
    at_maximum, mean = (
        MarginalLikelihoodSearch(BayesMPT(PPCA(), average=a), grid, random_state=0).fit(x)
        for a in (None, "posterior")
    )
    np.testing.assert_allclose(mean.cv_results_["lml"], at_maximum.cv_results_["lml"], rtol=1e-12)
    assert (mean.cv_results_["mean_test_score"] > at_maximum.cv_results_["mean_test_score"]).all()
    assert mean.best_estimator_.log_marginal_likelihood_ == pytest.approx(mean.comparison_["lml"].iloc[0])


@pytest.mark.slow
def test_taken_up_from_a_folder(tmp_path):
    x, grid = table(), {"model__n_components": [1, 2]}
    made = [
        MarginalLikelihoodSearch(
            BayesMPT(PPCA(), average="posterior"), grid, random_state=0, checkpoint_dir=tmp_path
        ).fit(x)
        for _ in range(2)
    ]
    one, again = (m.best_estimator_ for m in made)
    np.testing.assert_array_equal(one.score_samples(x), again.score_samples(x))
    assert one.log_marginal_likelihood_ == again.log_marginal_likelihood_


def test_loadings_by_name():
    import pandas as pd

    x = pd.DataFrame(table(), columns=list("abcdef"))
    model = BayesMPT(FactorAnalysis(K), average="posterior", random_state=0).fit(x)
    found = loadings(model)
    assert list(found.index) == list("abcdef") and list(found[0].columns) == ["mean", "lower", "upper"]
    w = found.xs("mean", axis=1, level="value").to_numpy()
    np.testing.assert_allclose(w, model.components_.T)
    assert (found[0]["lower"] < w[:, 0]).all() and (w[:, 0] < found[0]["upper"]).all()
    assert loadings(BayesMPT(FactorAnalysis(0), average="posterior").fit(x)).shape == (T, 0)
    assert not loadings(BayesMPT(FactorAnalysis(K)).fit(x))[0].columns.isin(["lower"]).any()


@pytest.mark.parametrize("rotation", ["varimax", "oblimin"])
def test_rotated_loadings(rotation):
    """Simple structure is found: each column loads on one latent; intervals turn along."""
    pytest.importorskip("statsmodels")
    rng = np.random.default_rng(3)
    w = np.zeros((8, 2))
    w[:4, 0], w[4:, 1] = 1.0, 1.0
    x = rng.normal(size=(400, 2)) @ w.T + 0.5 * rng.normal(size=(400, 8))
    found = loadings(BayesMPT(FactorAnalysis(2), average="posterior", random_state=0).fit(x), rotation)
    got = np.abs(found.xs("mean", axis=1, level="value").to_numpy())
    order = np.argsort(-got[0])  # latents have no order
    np.testing.assert_allclose(got[:, order], w, atol=0.15)
    low, high = (found.xs(part, axis=1, level="value").to_numpy() for part in ("lower", "upper"))
    mean = found.xs("mean", axis=1, level="value").to_numpy()
    assert (low < mean).all() and (mean < high).all() and (high - low).max() < 0.4


def test_refused():
    x = table()
    with pytest.raises(ValueError, match="AIC and BIC"):
        BayesMPT(PPCA(1), average="posterior").fit(x).bic(x)
    with pytest.raises(ValueError, match="all rows at once"):
        BayesMPT(PPCA(1), average="posterior").fit(x).partial_fit(x)
    with pytest.raises(ValueError, match="average"):
        BayesMPT(PPCA(1), average="mean").fit(x)
    with pytest.raises(ValueError, match="declares its symmetries"):
        BayesMPT(loc_only, average="posterior").fit(x)
    with pytest.raises(ValueError, match="rotation must be"):
        loadings(BayesMPT(PPCA(2)).fit(x), "quartimax")


class Simple:
    """Two factors; ``free`` says whether each column may load on both."""

    symmetries = {"rotations": "psi"}  # noqa: RUF012 - what a model offers is a plain attribute

    def __init__(self, free):
        self.free = free

    def __call__(self, x):
        t = x.shape[1]
        start = torch.linspace(-1, 1, 2 * t, dtype=x.dtype).reshape(2, t).flip(0) + 0.3
        w = pyro.param("w", start)
        if not self.free:
            first = (torch.arange(t) < t // 2).to(x)
            w = w * torch.stack([first, 1 - first])
        psi = pyro.param("psi", torch.ones(t, dtype=x.dtype), constraint=dist.constraints.positive)
        loc = pyro.param("loc", x.new_zeros(t))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(loc + z @ w, psi.sqrt()).to_event(1), obs=x)


def test_a_declared_symmetry_is_tried():
    """Loadings of which some are fixed at zero cannot be turned: their evidence would be that of another model."""
    x = table()
    free = BayesMPT(Simple(True), random_state=0).fit(x)
    found = free.integrated(x)
    truth = BayesMPT(FactorAnalysis(2), random_state=0).fit(x).integrated(x)
    assert found.log_evidence == pytest.approx(
        truth.log_evidence, abs=3 * np.hypot(found.se, truth.se) + 0.01
    )
    fixed = BayesMPT(Simple(False), random_state=0).fit(x)
    with pytest.raises(ValueError, match="turned without changing the covariance"):
        fixed.integrated(x)
