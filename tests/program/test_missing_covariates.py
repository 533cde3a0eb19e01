"""Programs that look at where cells are missing: they run on filled cells, so that they are refused, with a remedy."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy.integrate import quad
from scipy.stats import norm

from bayes_mpt import BayesMPT
from bayes_mpt.program.program import MissingCovariate, ModelError

N = 14
RNG = np.random.default_rng(0)
X = RNG.normal(size=N)
Y = X + 0.3 * RNG.normal(size=N)
SEEN = np.ones(N, dtype=bool)
SEEN[[3, 7]] = False
HOLES = np.where(SEEN, X, np.nan)[:, None]


def of_latents(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        lost = pyro.sample("lost", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w * torch.where(x[:, 0].isnan(), lost, x[:, 0]), 1.0), obs=y)


def not_normal(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        lost = pyro.sample("lost", dist.Normal(0.0, 1.0))
        rate = (w * torch.where(x[:, 0].isnan(), lost, x[:, 0])).exp()
        pyro.sample("y", dist.Poisson(rate), obs=y)


def of_both(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        lost = pyro.sample("lost", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[:, 0])
        pyro.sample("y", dist.Normal(w * torch.where(x[:, 0].isnan(), lost, x[:, 0]), 1.0), obs=y)


def scales(x, y):
    level = pyro.param("level", lambda: x.new_zeros(()))
    scale = torch.where(x.isnan().any(-1), 2.0, 1.0)
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(level, scale), obs=y)


@pytest.mark.parametrize("program", [of_latents, not_normal, of_both, scales])
def test_laws_that_look_at_nan_are_refused(program):
    y = Y.round().clip(0) if program is not_normal else Y
    with pytest.raises(MissingCovariate, match=r"holes = np.isnan\(X\).*torch.where\(holes"):
        BayesMPT(program).fit(HOLES, y)
    fitted = BayesMPT(program).fit(
        X[:, None], y
    )  # complete rows are fine, and holes that come later are seen
    with pytest.raises(MissingCovariate, match="missing cells reach the distribution"):
        fitted.score(HOLES, y)


def of_cells(x):
    level = pyro.param("level", lambda: x.new_zeros(()))
    scale = torch.where(x.isnan().any(-1, keepdim=True), 10.0, 1.0).expand(x.shape)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(level, scale).to_event(1), obs=x)


def cells_of_a_latent(x):
    scale = torch.where(x.isnan().any(-1, keepdim=True), 10.0, 1.0).expand(x.shape)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z[..., None].exp(), scale).to_event(1), obs=x)


@pytest.mark.parametrize("program", [of_cells, cells_of_a_latent])
def test_laws_of_the_table_itself_that_look_at_nan_are_refused(program):
    whole = np.c_[X, Y]
    holes = np.where(RNG.random(whole.shape) < 0.2, np.nan, whole)
    with pytest.raises(MissingCovariate, match="another one where a cell is NaN"):
        BayesMPT(program).fit(holes)
    with pytest.raises(MissingCovariate, match="another one where a cell is NaN"):
        BayesMPT(program).fit(whole).score(holes)


def remedy(x, holes, y, x_too):
    w = pyro.sample("w", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        lost = pyro.sample("lost", dist.Normal(0.0, 1.0))
        if x_too:
            with poutine.mask(mask=holes[:, 0] == 0):
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[:, 0])
        pyro.sample("y", dist.Normal(w * torch.where(holes[:, 0] > 0, lost, x[:, 0]), 1.0), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize("x_too", [False, True])
def test_the_remedy_integrates_over_them(x_too):
    def program(x, holes, y):
        remedy(x, holes, y, x_too)

    def log_joint(w):
        of_seen = norm.logpdf(Y[SEEN], w * X[SEEN]).sum()
        return of_seen + norm.logpdf(Y[~SEEN], 0, np.sqrt(1 + w * w)).sum() + norm.logpdf(w, 0, 2)

    truth = (
        np.log(quad(lambda w: np.exp(log_joint(w) + 10), -15, 15, points=[0, 1], epsabs=0, limit=200)[0]) - 10
    )
    truth += norm.logpdf(X[SEEN]).sum() if x_too else 0.0
    fitted = BayesMPT(program).fit((np.nan_to_num(HOLES, nan=5.0), np.isnan(HOLES) * 1.0), Y)
    assert fitted.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-8)


def filtered(x, density):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    seen = x[:, 0][~x[:, 0].isnan()]
    with pyro.plate("rows", len(seen)):
        pyro.sample("x", density(mean, 1.0), obs=seen)


@pytest.mark.parametrize("density", [dist.Normal, dist.Laplace])
def test_programs_that_leave_missing_cells_out_need_not(density):
    def program(x):
        filtered(x, density)

    with pytest.raises(ModelError, match="leaves missing cells of site 'x' out itself.*leave the cells NaN"):
        BayesMPT(program).fit(HOLES)
    assert np.isfinite(BayesMPT(program).fit(X[:, None]).log_marginal_likelihood_)
