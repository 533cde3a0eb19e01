"""Remedies of docs/any_program.md, followed: a program that is refused, what it is rewritten to, and its number."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats
from scipy.special import logsumexp
from torch.distributions import AffineTransform

from bayes_mpt import BayesMPT
from bayes_mpt.program.program import ModelError

Y = np.array([[0.4], [-0.7], [1.1], [0.2], [0.9], [-0.3]])
y, N = Y[:, 0], len(Y)
Normal = dist.Normal


class Remedy(NamedTuple):
    """A row of the table."""

    said: str
    """Words of the refusal."""
    bad: Any
    good: Any
    truth: float
    """Log marginal likelihood of the rewritten program."""
    data: tuple[Any, ...] = (Y,)
    tolerance: float = 1e-6


def normal(covariance, of=y):
    return float(stats.multivariate_normal.logpdf(of, cov=covariance))


def observed(law, by="rows", factor=False, value=lambda x: x[:, 0]):
    """A program of one latent m and what is observed of the first column: the law given m and x."""

    def program(x):
        m = pyro.sample("m", Normal(0.0, 1.0))
        if factor and by is None:
            pyro.factor("f", law(m, x))
            return
        with pyro.plate("rows", len(x) if by == "rows" else by):
            if factor:
                pyro.factor("f", law(m, x))
            else:
                pyro.sample("x", law(m, x), obs=value(x))

    return program


def latents_first(draw, scale=1.0):
    """A program of one mean, computed from latents."""

    def program(x):
        mean = draw()
        with pyro.plate("rows", len(x)):
            pyro.sample("x", Normal(mean, scale), obs=x[:, 0])

    return program


plain = observed(lambda m, x: Normal(m, 1.0))
TILTED = latents_first(lambda: pyro.sample("m", Normal(0.0, math.sqrt(0.5))))
SHARED = normal(np.eye(N) + 1)


def tilted(x):
    pyro.factor("f", -0.5 * pyro.sample("m", Normal(0.0, 1.0)) ** 2)
    pyro.sample("x", Normal(0.0, 1.0).expand([len(x)]).to_event(1), obs=x[:, 0])


def scored_twice(x):
    m = pyro.sample("m", Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", Normal(m, 1.0), obs=x[:, 0])
        pyro.factor("f", Normal(m, 1.0).log_prob(x[:, 0]))


def scaled_site(x):
    m = pyro.sample("m", Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)), poutine.scale(scale=2.0):
        pyro.sample("x", Normal(m, 1.0), obs=x[:, 0])


def closure():
    m = pyro.sample("m", Normal(0.0, 1.0))
    with pyro.plate("rows", N):
        pyro.sample("x", Normal(m, 1.0), obs=torch.as_tensor(y))


def no_plate(x):
    pyro.sample("x", Normal(pyro.sample("m", Normal(0.0, 1.0)), 1.0), obs=x[:, 0])


def declared(x):
    m = pyro.sample("m", Normal(0.0, 1.0))
    pyro.sample("x", Normal(m, 1.0).expand([len(x)]).to_event(1), obs=x[:, 0])


def branch(z):
    return 1.0 if z == 1 else -1.0


def two_values(mean):
    return latents_first(lambda: mean(pyro.sample("z", dist.Bernoulli(0.3))))


def count(law):
    return latents_first(lambda: 0.2 * pyro.sample("k", law()))


def cut_off():
    n = torch.arange(51.0)
    return dist.Categorical(logits=dist.Poisson(2.0).log_prob(n))


def own_mean(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("x", Normal(x[:, 0].mean(), 1.0), obs=x[:, 0])


def parameter(x):
    m = pyro.param("m", lambda: x[:, 0].mean())
    with pyro.plate("rows", len(x)):
        pyro.sample("x", Normal(m, 1.0), obs=x[:, 0])


def detached(x):
    m = pyro.param("m", lambda: x.new_zeros(()))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", Normal(0.0, 1.0), obs=x[:, 0] - m.detach())


def noisy(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("x", Normal(0.0, 1.0), obs=x[:, 0] + torch.randn(len(x)))


def noise(x):
    with pyro.plate("rows", len(x)):
        e = pyro.sample("e", Normal(0.0, 1.0))
        pyro.sample("x", Normal(e, 1.0), obs=x[:, 0])


def sums_of_rows(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("x", Normal(0.0, 1.0), obs=x[:, 0].cumsum(0))


def one_vector(x):
    pyro.sample("x", Normal(0.0, 1.0).expand([len(x)]).to_event(1), obs=x[:, 0].cumsum(0))


def copied(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Delta(pyro.sample("m", Normal(0.0, 1.0))), obs=x[:, 0])


def spread(x):
    with pyro.plate("rows", len(x)):
        twice = pyro.deterministic("twice", 2 * pyro.sample("m", Normal(0.0, 1.0)))
        pyro.sample("x", Normal(twice, 0.1), obs=x[:, 0])


def wide(prior):
    return latents_first(lambda: pyro.sample("m", prior))


def unprior():
    with poutine.mask(mask=False):
        return pyro.sample("m", Normal(0.0, 1.0))


def looked_up(index):
    def program(x):
        theta = pyro.sample("theta", Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", Normal(theta[index(x[:, 0])], 1.0), obs=x[:, 1])

    return program


def correlation(end):
    def program(x):
        r = pyro.sample("r", dist.Uniform(-end, end))
        with pyro.plate("rows", len(x)):
            law = dist.MultivariateNormal(torch.zeros(2), torch.eye(2) + r * (1 - torch.eye(2)))
            pyro.sample("x", law, obs=x)

    return program


def precision(x):
    w = pyro.sample("w", dist.Wishart(torch.tensor(9.0), torch.eye(2)))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), precision_matrix=w), obs=x)


def cholesky(x):
    root = pyro.sample("root", dist.LKJCholesky(2, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), scale_tril=root), obs=x)


def in_single_precision(dtype):
    return latents_first(
        lambda: torch.ones(2, dtype=dtype) @ pyro.sample("w", Normal(torch.zeros(2), 1.0).to_event(1))
    )


def masked(x):
    m = pyro.sample("m", Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)), poutine.mask(mask=x[:, 0] > 0):
        pyro.sample("x", Normal(m, 1.0), obs=x[:, 0])


def cut_at_zero(m, x):
    law = Normal(m, 1.0)
    return torch.where(x[:, 0] > 0, law.log_prob(x[:, 0]), law.cdf(torch.zeros(())).log())


def forward(first):
    def program(x):
        a = pyro.sample("a", Normal(0.0, 1.0))
        if first:
            pyro.sample("x_0", Normal(0.0, 1.0), obs=x[0, 0])
        for t in range(1, len(x)):
            pyro.sample(f"x_{t}", Normal(a * x[t - 1, 0], 1.0), obs=x[t, 0])

    return program


def window(**settings):
    return observed(lambda m, x: dist.Uniform(m - 1, m + 1, **settings))


def on_grid(log_joint, low, high, n=4001):
    """log of the integral of exp(log_joint) by rectangles."""
    at = np.linspace(low, high, n + 2)[1:-1]
    return float(logsumexp(log_joint(at)) + np.log(at[1] - at[0]))


def correlated(r):
    squares = (Y2**2).sum() - 2 * r * Y2.prod(1).sum()
    return -N * np.log(2 * np.pi) - 0.5 * N * np.log(1 - r**2) - 0.5 * squares / (1 - r**2) - np.log(2)


Y2 = np.c_[y, y[::-1]]
CODES = np.c_[[0.0, 1, 0, 1, 2, 2], y]
HOLE = np.where(np.arange(N)[:, None] == 2, np.nan, Y)
SAME = normal(np.eye(N) + (CODES[:, :1] == CODES[:, 0]))
LABELS = np.logaddexp(
    np.log(0.7) + stats.norm.logpdf(y, -1).sum(), np.log(0.3) + stats.norm.logpdf(y, 1).sum()
)
COUNTS = logsumexp([stats.poisson.logpmf(k, 2) + stats.norm.logpdf(y, 0.2 * k).sum() for k in range(51)])
FOURS = logsumexp([stats.binom.logpmf(k, 4, 0.5) + stats.norm.logpdf(y, 0.2 * k).sum() for k in range(5)])
WIDE = normal(np.eye(N) + 1e6)
MEAN = float(stats.norm.logpdf(y, y.mean()).sum())
CUT = on_grid(lambda m: stats.norm.logpdf(m) + stats.norm.logpdf(y[y > 0, None], m).sum(0)
              + (y <= 0).sum() * stats.norm.logcdf(0, m), -9, 9)  # fmt: skip
AHEAD = float(stats.norm.logpdf(y[0]) + normal(np.eye(N - 1) + np.outer(y[:-1], y[:-1]), y[1:]))
INSIDE = np.array([[-0.4], [1.1], [0.3], [0.9]])
WINDOW = np.log(stats.norm.cdf(0.6) - stats.norm.cdf(0.1)) - 4 * np.log(2)

REMEDIES = [
    Remedy("values of shape", no_plate, declared, SHARED),
    Remedy("statistic of x inside the program", own_mean, parameter, MEAN),
    Remedy(
        "cannot run on all values",
        two_values(branch),
        two_values(lambda z: torch.where(z == 1, 1.0, -1.0)),
        LABELS,
    ),
    Remedy(
        "cannot run on all values",
        two_values(branch),
        two_values(lambda z: torch.tensor([-1.0, 1.0])[z.long()]),
        LABELS,
    ),
    Remedy("infinite support", count(lambda: dist.Poisson(2.0)), count(cut_off), COUNTS),
    Remedy("infinite support", count(lambda: dist.Poisson(2.0)), count(lambda: dist.Binomial(4, 0.5)), FOURS),
    Remedy("moves with no cell of the data", tilted, TILTED, normal(np.eye(N) + 0.5)),
    Remedy(
        "is no log-density of column 0",
        observed(lambda m, x: -0.5 * (x[:, 0] - m) ** 2, factor=True),
        observed(lambda m, x: -0.5 * (x[:, 0] - m) ** 2 - 0.5 * math.log(2 * math.pi), factor=True),
        SHARED,
    ),
    Remedy(
        "not one number for each row",
        observed(lambda m, x: Normal(m, 1.0).log_prob(x[:, 0]).sum(), by=None, factor=True),
        observed(lambda m, x: Normal(m, 1.0).log_prob(x[:, 0]), factor=True),
        SHARED,
    ),
    Remedy("scored by site 'x' too", scored_twice, plain, SHARED),
    Remedy("takes no argument", closure, plain, SHARED),
    Remedy("as an index", looked_up(lambda j: j), looked_up(lambda j: j.long()), SAME, (CODES,)),
    Remedy("is masked", latents_first(unprior), wide(Normal(0.0, 1e3)), WIDE),
    Remedy(
        "ImproperUniform",
        wide(dist.ImproperUniform(dist.constraints.real, (), ())),
        wide(Normal(0.0, 1e3)),
        WIDE,
    ),
    Remedy("outside the support", window(), window(validate_args=False), WINDOW, (INSIDE,)),
    Remedy(
        "mixes precisions",
        in_single_precision(torch.float32),
        in_single_precision(torch.float64),
        normal(np.eye(N) + 2),
    ),
    Remedy("cut off from gradients", detached, parameter, MEAN),
    Remedy("change from run to run", noisy, noise, normal(2 * np.eye(N))),
    Remedy("depends on other rows", sums_of_rows, one_vector, float(stats.norm.logpdf(y.cumsum()).sum())),
    Remedy("moves with observed values", masked, observed(cut_at_zero, factor=True), CUT),
    Remedy("Delta at other values", copied, spread, normal(4.01 * np.eye(N))),
    Remedy("different scales .* Leave poutine.scale away", scaled_site, plain, SHARED),
    Remedy("write the rows plate with len", observed(lambda m, x: Normal(m, 1.0), by=30), plain, SHARED),
    Remedy(
        "fills in missing cells",
        observed(lambda m, x: Normal(m, 1.0), value=lambda x: x[:, 0].nan_to_num()),
        plain,
        normal(np.eye(N - 1) + 1, np.delete(y, 2)),
        (HOLE,),
    ),
    Remedy(
        "PositiveDefinite|cannot be factorised",
        correlation(2.0),
        correlation(1.0),
        on_grid(correlated, -1, 1),
        (Y2,),
        1e-5,
    ),
    Remedy("has no transform to real numbers", precision, cholesky, on_grid(correlated, -1, 1), (Y2,), 1e-5),
]


@pytest.mark.filterwarnings("ignore:Singular sample")  # of torch's Wishart
@pytest.mark.parametrize("remedy", REMEDIES, ids=lambda r: r.said)
def test_what_a_refusal_says_to_write_is_fitted_with_the_right_number(remedy):
    with pytest.raises(ModelError, match=remedy.said):
        BayesMPT(remedy.bad, random_state=0).fit(*remedy.data)
    found = BayesMPT(remedy.good, random_state=0).fit(*remedy.data).log_marginal_likelihood_
    assert found == pytest.approx(remedy.truth, abs=remedy.tolerance)


def test_a_series_drawn_forward_begins_with_an_observed_site():
    with pytest.raises(ModelError, match="is read and never drawn"):
        BayesMPT(forward(False)).fit(Y).sample(2)
    begun = BayesMPT(forward(True)).fit(Y)
    assert np.isfinite(begun.sample(2)).all()
    assert begun.log_marginal_likelihood_ == pytest.approx(AHEAD, abs=1e-9)


def low():
    return pyro.sample("low", dist.Uniform(0.5, 1.5))


MOVING = {
    "dist.Uniform(0.0, 1.0)); z = low + (high - low) * share": (
        lambda: dist.Uniform(0.0, low()),
        lambda: low() * pyro.sample("z_share", dist.Uniform(0.0, 1.0)),
        lambda a, p: a * p,
    ),
    "dist.Pareto(1.0, alpha)); z = scale * share": (
        lambda: dist.Pareto(low(), 4.0),
        lambda: low() * pyro.sample("z_share", dist.Pareto(1.0, 4.0)),
        lambda a, p: a * (1 - p) ** -0.25,
    ),
    "dist.Exponential(...)); z = loc + scale * share": (
        lambda: dist.TransformedDistribution(dist.Exponential(1.0), [AffineTransform(low(), 1.0)]),
        lambda: low() + pyro.sample("z_share", dist.Exponential(1.0)),
        lambda a, p: a - np.log1p(-p),
    ),
    "dist.Beta(...)); z = loc + scale * share": (
        lambda: dist.AffineBeta(torch.tensor(2.0), torch.tensor(2.0), low(), torch.tensor(3.0)),
        lambda: low() + 3 * pyro.sample("z_share", dist.Beta(2.0, 2.0)),
        lambda a, p: a + 3 * stats.beta.ppf(p, 2, 2),
    ),
}


@pytest.mark.parametrize("said", MOVING)
def test_ends_that_move_are_refused_with_the_program_that_draws_the_same(said):
    """Of which the number is an average over low and over quantiles of what has fixed ends."""
    moving, share, of_quantiles = MOVING[said]
    with pytest.raises(ModelError, match="ends of the support of latent site 'z'") as refused:
        BayesMPT(latents_first(lambda: pyro.sample("z", moving()), 0.5)).fit(Y)
    assert said in str(refused.value)
    node, weight = (0.5 * a for a in np.polynomial.legendre.leggauss(150))
    z = of_quantiles(1 + node[:, None], (0.5 + node) ** 4)  # a quantile may have a root at its end
    log_weight = np.log(weight)[:, None] + np.log(4 * weight * (0.5 + node) ** 3)
    squares = ((y**2).sum() - 2 * y.sum() * z + N * z**2) / 0.5**2
    truth = logsumexp(-0.5 * squares + log_weight) - N * np.log(0.5 * np.sqrt(2 * np.pi))
    fitted = BayesMPT(latents_first(share, 0.5), random_state=0).fit(Y)
    assert abs(fitted.log_marginal_likelihood_ - truth) < min(
        0.01, max(1e-4, fitted.log_marginal_likelihood_se_)
    )
