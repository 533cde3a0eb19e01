"""Mixtures of Gaussians that state their parameters: read as evaluation reads them, believed of no other program."""

from typing import ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from bayes_mpt import BayesMPT
from bayes_mpt.models import GaussianMixture
from bayes_mpt.predictors.choice import choose
from bayes_mpt.program.affine import stated_mixture

N, T = 60, 3
X = torch.randn(N, T, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Stranger:
    """A mixture of two under the same statement, whose sites may keep to it or not."""

    mixture_map: ClassVar = {"weights": "w", "loc": "m", "scale_tril": "root"}

    def __init__(self, weigh=lambda w: w, move=lambda m: m, widen=lambda r: r, factor=1.0):
        self.weigh, self.move, self.widen, self.factor = weigh, move, widen, factor

    def __call__(self, x):
        w = pyro.param("w", lambda: torch.tensor([0.3, 0.7]), constraints.simplex)
        m = pyro.param("m", lambda: torch.stack([x[0], x[1]]))
        eye = torch.eye(x.shape[1], dtype=x.dtype)
        root = pyro.param("root", lambda: eye + 0.5 * torch.ones_like(eye).tril(), constraints.lower_cholesky)
        with pyro.plate("rows", len(x)), pyro.poutine.scale(scale=self.factor):
            c = pyro.sample("c", dist.Categorical(self.weigh(w)))
            tokens = dist.MultivariateNormal(self.move(m)[c], scale_tril=self.widen(root))
            pyro.sample("x", tokens, obs=x)


class OtherCall(GaussianMixture):
    """Another program below the class that states it."""

    def __call__(self, x):
        Stranger(widen=lambda r: 2 * r)(x)


@pytest.mark.parametrize("kind", ["full", "tied"])
@pytest.mark.parametrize("k", [1, 3])
def test_a_stated_mixture_is_the_one_that_evaluation_finds(kind, k):
    x = X.clone()
    x[5, 1] = torch.nan
    model = GaussianMixture(k, kind)
    with pyro.get_param_store().scope():
        # a function says nothing of itself
        own, found = choose(model, (x,)), choose(lambda x: model(x), (x,))
        assert type(own) is not type(found)
        assert own.structure == found.structure
        params = [pyro.param(name).unconstrained() for name in ("weights", "loc", "scale_tril")]
        reads = [bound.read((x,)) for bound in (own, found)]
        grads = [torch.autograd.grad(read.score().sum(), params) for read in reads]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        score = reads[0].score().detach()
        torch.testing.assert_close(score, reads[1].score().detach(), rtol=1e-13, atol=0)
        for name in ("mean", "tokens"):
            a, b = (getattr(read.posterior(), name).detach() for read in reads)
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
        w, m, root = (pyro.param(name).detach().numpy() for name in ("weights", "loc", "scale_tril"))
    root = np.broadcast_to(root, (k, T, T))
    for row, told in zip(x.numpy(), score.numpy(), strict=True):
        seen = ~np.isnan(row)
        each = [
            multivariate_normal(c[seen], (r @ r.T)[seen][:, seen]).logpdf(row[seen])
            for c, r in zip(m, root, strict=True)
        ]
        assert told == pytest.approx(logsumexp(each, b=w), rel=1e-10)


@pytest.mark.parametrize(
    "model",
    [
        Stranger(weigh=lambda w: w.flip(0)),
        Stranger(move=lambda m: m + 1e-6),
        Stranger(widen=lambda r: r * (1 + 1e-6)),
        Stranger(factor=2.0),
        OtherCall(2),
        GaussianMixture(2, "diag"),
    ],
)
def test_what_a_run_does_not_show_is_not_believed(model):
    with pyro.get_param_store().scope():
        assert stated_mixture(model, (X,)) is None


def test_a_stated_mixture_of_ones_own_is_fitted_as_one_that_says_nothing():
    own, same = (BayesMPT(m, random_state=0).fit(X.numpy()) for m in (Stranger(), lambda x: Stranger()(x)))
    np.testing.assert_allclose(own.log_marginal_likelihood_, same.log_marginal_likelihood_, rtol=1e-9)
    with pyro.get_param_store().scope():
        assert stated_mixture(Stranger(), (X,)).program.discrete == ("c",)
