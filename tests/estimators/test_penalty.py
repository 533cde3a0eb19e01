"""`penalty=True` of factor models: the maximum a posteriori under the prior of their noise, against dense algebra."""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from scipy.stats import gamma
from sklearn.exceptions import ConvergenceWarning
from tables import with_holes

from bayes_mpt import BayesMPT
from bayes_mpt.evidence.factor_prior import factor_prior
from bayes_mpt.masks import UniformSize
from bayes_mpt.models import PPCA, FactorAnalysis
from bayes_mpt.predictors import Quadrature
from bayes_mpt.training import Steps


def table(t=6, k=2, n=60, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, k)) @ rng.normal(size=(k, t)) + 0.7 * rng.normal(size=(n, t))


def rates(x, model):
    """2 / u: u the columns' variances, or their mean for one noise of all."""
    prior = factor_prior(x)
    units = prior.units(np.ones(x.shape[1]) if isinstance(model, PPCA) else None)
    return 2 / (units[0] if isinstance(model, PPCA) else units)


def posterior(x, rate, loc, loading, noise):
    """Dense log p(observed cells) + log density of log psi, psi ~ Gamma(2, rate); noise () or (T,)."""
    cov = loading @ loading.mT + torch.diag(noise.expand(len(loc)))
    total = torch.zeros((), dtype=torch.float64)
    for row in torch.tensor(x):
        o = ~row.isnan()
        if o.any():
            total = total + dist.MultivariateNormal(loc[o], cov[o][:, o]).log_prob(row[o])
    rate = torch.as_tensor(rate)
    return total + (dist.Gamma(2.0, rate).log_prob(noise) + noise.log()).sum()


def slopes(model, x, rate, names=("loc", "loading", "noise_variance")):
    """The posterior at a fit, and its slopes in mean, loadings and log noise."""
    loc, loading, noise = (torch.as_tensor(model.params_[name]) for name in names)
    at = [a.requires_grad_() for a in (loc, loading, noise.log())]
    value = posterior(x, rate, at[0], at[1], at[2].exp())
    return value.item(), torch.autograd.grad(value, at)


@pytest.mark.parametrize("share", [0.0, 0.25])
@pytest.mark.parametrize("program", [PPCA(2), FactorAnalysis(2)], ids=["ppca", "factors"])
def test_it_is_where_the_dense_posterior_is_level(program, share):
    x = 3 + table() * np.array([1, 5, 0.1, 1, 2, 1])
    x = with_holes(x, share)
    model = BayesMPT(program, penalty=True, random_state=0).fit(x)
    value, found = slopes(model, x, rates(x, program))
    assert model.converged_ and model.at_map_
    unit = torch.as_tensor(np.nanstd(x, 0))
    for slope, size in zip(found, (unit, unit[:, None], 1.0), strict=True):
        assert float((slope * size).abs().max()) < 2e-3  # nats of all rows
    # the history is of what is maximised, the LML of the rows alone
    assert len(x) * model.history_[-1] == pytest.approx(value, abs=1e-6)
    prior = gamma(2, scale=1 / rates(x, program))
    noise = np.atleast_1d(model.params_["noise_variance"])
    log_prior = (prior.logpdf(noise) + np.log(noise)).sum()
    assert model.log_marginal_likelihood_ == pytest.approx(value - log_prior, abs=1e-6)
    free = BayesMPT(program, random_state=0).fit(x)
    assert model.log_marginal_likelihood_ < free.log_marginal_likelihood_
    assert slopes(free, x, rates(x, program))[0] < value


@pytest.mark.parametrize("n_latents", [1, 3])
def test_one_noise_that_the_prior_lifts_above_a_latent(n_latents):
    """Few rows, a prior of as many: fewer latents are used than there are, and no other noise is better."""
    x = np.random.default_rng(2).normal(size=(5, 4))
    x = np.linalg.qr(x - x.mean(0))[0] * np.sqrt([20, 0.55, 0.525, 0.5])  # variances 4, .11, .105, .1
    model = BayesMPT(PPCA(n_latents), penalty=True).fit(x)
    rate = rates(x, PPCA())
    cov = np.cov(x.T, bias=True)
    value, vector = np.linalg.eigh(cov)

    def best(noise):
        size = np.sqrt(np.maximum(value[-n_latents:] - noise, 0))
        loading = torch.as_tensor(vector[:, -n_latents:] * size)
        return posterior(x, rate, torch.as_tensor(x.mean(0)), loading, torch.as_tensor(noise)).item()

    noise = float(model.noise_variance_)
    assert best(noise) == pytest.approx(len(x) * model.history_[-1], abs=1e-6)
    assert best(noise) > max(best(noise * f) for f in (0.02, 0.3, 0.9, 0.999, 1.001, 1.1, 3.0))
    assert n_latents == 1 or (noise > value[-2] and (np.abs(model.components_).max(1) > 1e-6).sum() == 1)


def heywood():
    """Two factors, 240 x 8, three of ten cells missing: the likelihood is highest without noise in "item 3"."""
    rng = np.random.default_rng(11)
    x = rng.normal(size=(240, 2)) @ rng.normal(size=(2, 8))
    x += rng.uniform(0.3, 1.2, 8) * rng.normal(size=(240, 8))
    x = np.where(rng.random(x.shape) < 0.3, np.nan, x)
    return pd.DataFrame(x, columns=[f"item {c}" for c in range(8)])


def test_the_warning_of_no_noise_proposes_it_and_it_holds_the_noise_above_zero():
    x = heywood()
    with pytest.warns(
        ConvergenceWarning,
        match=r"'item 3' is zero.*Use penalty=True, which holds the noise above zero",
    ):
        free = BayesMPT(FactorAnalysis(2), random_state=0).fit(x)
    held = BayesMPT(FactorAnalysis(2), penalty=True, random_state=0).fit(x)  # a warning would fail
    variance = np.nanvar(x.to_numpy(), 0)
    assert free.noise_at_zero_ == ["item 3"] and held.noise_at_zero_ == []
    assert held.noise_variance_[3] > 1e-3 * variance[3]
    assert free.log_marginal_likelihood_ - 10 < held.log_marginal_likelihood_ < free.log_marginal_likelihood_
    rate = rates(x.to_numpy(), FactorAnalysis())
    assert max(float(s.abs().max()) for s in slopes(held, x.to_numpy(), rate)[1]) < 2e-3


def test_complete_rows_keep_their_noise_too():
    """Three factors are one too many for these columns: the likelihood ends without noise."""
    x = table(6, 2, 40, seed=0)
    free = BayesMPT(FactorAnalysis(3)).fit(x)
    held = BayesMPT(FactorAnalysis(3), penalty=True).fit(x)
    assert (free.noise_variance_ / x.var(0)).min() < 1e-7 and (held.noise_variance_ / x.var(0)).min() > 1e-3
    rate = rates(x, FactorAnalysis())
    assert max(float(s.abs().max()) for s in slopes(held, x, rate)[1]) < 1e-3


# ------------------------------------------------------------------------------------------------ by steps uphill


class Positive:
    """Factor analysis with loadings that may not be negative, for which nothing is solved."""

    symmetries = {"rotations": "psi"}  # noqa: RUF012

    def __call__(self, x):
        n, t = x.shape
        loc = pyro.param("m", lambda: torch.zeros(t, dtype=x.dtype))
        loading = pyro.param("w", lambda: torch.ones(t, 1, dtype=x.dtype), constraints.positive)
        psi = pyro.param("psi", lambda: torch.ones(t, dtype=x.dtype), constraints.positive)
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(loc + z @ loading.mT, psi.sqrt()).to_event(1), obs=x)


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_a_program_that_is_climbed_has_the_same_penalty(share):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(50, 1)) * np.array([1.0, 0.8, 1.3, 1.0]) + 0.5 * rng.normal(size=(50, 4))
    x = with_holes(x, share)
    model = BayesMPT(Positive(), penalty=True, random_state=0).fit(x)
    value, found = slopes(model, x, rates(x, FactorAnalysis()), ("m", "w", "psi"))
    assert max(float(s.abs().max()) for s in found) < 0.02
    solved = BayesMPT(FactorAnalysis(1), penalty=True, random_state=0).fit(x)
    assert len(x) * solved.history_[-1] == pytest.approx(value, abs=1e-3)


def test_a_warm_start_climbs_the_same_posterior():
    x = with_holes(table(), 0.2)
    model = BayesMPT(FactorAnalysis(2), penalty=True, warm_start=True, random_state=0).fit(x)
    first = model.history_[-1]
    assert model.fit(x).fit_method_ == "lbfgs"
    assert len(x) * (model.history_[-1] - first) == pytest.approx(0, abs=1e-3)


def test_other_predictors_climb_the_same_posterior():
    x = table(3, 1, 6, seed=1)
    exact, free = (BayesMPT(PPCA(1), penalty=p).fit(x).noise_variance_ for p in (True, False))
    model = BayesMPT(PPCA(1), predictor=Quadrature(32), penalty=True, random_state=0).fit(x)
    assert model.fit_method_ == "lbfgs" and exact > 1.05 * free
    assert model.params_["noise_variance"] == pytest.approx(exact, rel=1e-3)


def test_steps_on_masks_climb_the_same_posterior():
    """The first step is scored at the initial values, where one noise is half of the mean variance v."""
    x, found = table(3, 1, 6, seed=1), []
    for penalty in (True, False):
        settings = {"masks": UniformSize(), "training": Steps(max_iter=1), "random_state": 0}
        with pytest.warns(ConvergenceWarning):
            found.append(BayesMPT(PPCA(1), penalty=penalty, **settings).fit(x).history_[0])
    v = x.var(0).mean()
    want = gamma(2, scale=v / 2).logpdf(v / 2) + np.log(v / 2)
    assert len(x) * (found[0] - found[1]) == pytest.approx(want, abs=1e-9)


def test_rows_in_parts_are_one_table():
    for x in (table(), with_holes(table(), 0.2)):
        whole = BayesMPT(FactorAnalysis(1), penalty=True, random_state=0).fit(x)
        parts = (
            BayesMPT(FactorAnalysis(1), penalty=True, random_state=0).partial_fit(x[:25]).partial_fit(x[25:])
        )
        assert parts.noise_variance_ == pytest.approx(whole.noise_variance_, rel=1e-3)


# ---------------------------------------------------------------------------------------------- where there is none


def test_columns_that_repeat_others_are_refused_still():
    x = table(5, 2, 40)
    twice = np.column_stack([x, x[:, 0]])
    for rows in (twice, np.where(np.arange(40)[:, None] < 5, with_holes(twice, 0.2), twice)):
        with pytest.raises(
            ValueError, match="the likelihood grows without bound as their noise goes to zero"
        ):
            BayesMPT(FactorAnalysis(2), penalty=True, random_state=0).fit(rows)


def test_few_cells_are_held_by_the_prior():
    """Three cells, a mean and two loadings: without the prior there is no maximum, with it there is."""
    x = table(5, 2, 40)
    x[3:, 4] = np.nan
    with pytest.raises(ValueError, match="too few observed cells .* use penalty=True"):
        BayesMPT(FactorAnalysis(2), random_state=0).fit(x)
    model = BayesMPT(FactorAnalysis(2), penalty=True, random_state=0).fit(x)
    assert model.converged_ and model.noise_variance_[4] > 1e-3 * np.nanvar(x[:, 4])
    x[1:, 4] = np.nan
    with pytest.raises(ValueError, match="too few observed cells"):
        BayesMPT(FactorAnalysis(2), penalty=True, random_state=0).fit(x)


def test_criteria_of_the_maximum_are_refused():
    model = BayesMPT(PPCA(1), penalty=True).fit(table())
    with pytest.raises(ValueError, match="AIC and BIC are of the likelihood at its maximum"):
        model.bic(table())


def test_the_automatic_dimension():
    model = BayesMPT(penalty=True).fit(table())
    assert model.n_components_ == 2 and model.at_map_
