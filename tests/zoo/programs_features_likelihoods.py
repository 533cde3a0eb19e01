"""One feature each: distributions of what is observed."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from pyro.nn import DenseNN
from scipy import stats
from scipy.special import betaln, gammaln, logsumexp
from torch import nn
from torch.distributions import constraints
from truths import log_density
from zoo.case import Array, Case


def transformed_tokens(x):
    m = pyro.param("m", torch.zeros(2))
    s = pyro.param("s", torch.ones(2), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        log_normal = dist.TransformedDistribution(dist.Normal(m, s), [T.ExpTransform()])
        pyro.sample("x", log_normal.to_event(1), obs=x)


def spline_coupling():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return T.SplineCoupling(2, 1, DenseNN(1, [4], [4, 4, 3, 4]), count_bins=4, bound=4.0)


class SplineFlow(nn.Module):
    def __init__(self):
        super().__init__()
        self.spline = spline_coupling()

    def forward(self, x):
        pyro.module("spline", self.spline)
        base = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.TransformedDistribution(base, [self.spline]), obs=x)


def mixture_same_family(x):
    weights = pyro.param("weights", torch.tensor([0.5, 0.5]), constraint=constraints.simplex)
    locs = pyro.param("locs", torch.tensor([-1.0, 4.0]))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        mixture = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(locs, scale))
        pyro.sample("x", mixture, obs=x[:, 0])


def gaussian_hmm_site(series):
    a = pyro.param("a", torch.tensor(0.5), constraint=constraints.interval(-1, 1))
    noise = pyro.param("noise", torch.tensor(1.0), constraint=constraints.positive)
    start = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    move = dist.Normal(torch.zeros(1), 0.5).to_event(1)
    see = dist.Normal(torch.zeros(1), noise).to_event(1)
    hmm = dist.GaussianHMM(start, a.reshape(1, 1), move, torch.eye(1), see, duration=series.shape[1])
    with pyro.plate("rows", len(series)):
        pyro.sample("y", hmm, obs=series.unsqueeze(-1))


def von_mises(angles):
    loc = pyro.param("loc", torch.tensor(0.0))
    concentration = pyro.param("concentration", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(angles)):
        pyro.sample("x", dist.VonMises(loc, concentration), obs=angles[:, 0])


def compositional_dirichlet(shares):
    alpha = pyro.param("alpha", torch.ones(3), constraint=constraints.positive)
    with pyro.plate("rows", len(shares)):
        pyro.sample("x", dist.Dirichlet(alpha), obs=shares)


def multinomial_rows(counts):
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("rows", len(counts)):
        pyro.sample("x", dist.Multinomial(10, p), obs=counts)


def categorical_table(codes):
    p = pyro.param("p", torch.ones(2, 3) / 3, constraint=constraints.simplex)
    with pyro.plate("rows", len(codes), dim=-2), pyro.plate("columns", 2, dim=-1):
        pyro.sample("x", dist.Categorical(p), obs=codes)


def beta_binomial(hits):
    a = pyro.param("a", torch.tensor(2.0), constraint=constraints.positive)
    b = pyro.param("b", torch.tensor(2.0), constraint=constraints.positive)
    with pyro.plate("rows", len(hits)):
        pyro.sample("x", dist.BetaBinomial(a, b, total_count=12), obs=hits[:, 0])


def negative_binomial(counts):
    size = pyro.param("size", torch.tensor(2.0), constraint=constraints.positive)
    rate = pyro.param("rate", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(counts)):
        pyro.sample("x", dist.GammaPoisson(size, rate), obs=counts[:, 0])


def log_normals(rng: np.random.Generator) -> tuple[Array]:
    return (np.exp(rng.normal(size=(40, 2)) * [0.3, 1.0] + [1.0, -0.5]),)


def moons(rng: np.random.Generator) -> tuple[Array]:
    first = rng.normal(size=60)
    return (np.column_stack([first, np.abs(first) - 1 + 0.3 * rng.normal(size=60)]),)


def two_heaps(rng: np.random.Generator) -> tuple[Array]:
    return (np.where(rng.uniform(size=60) < 0.3, -2.0, 3.0)[:, None] + rng.normal(size=(60, 1)),)


def four_series(rng: np.random.Generator) -> tuple[Array]:
    z = rng.normal(size=(20, 6))
    for t in range(1, 6):
        z[:, t] = 0.8 * z[:, t - 1] + 0.5 * z[:, t]
    return (z + 0.4 * rng.normal(size=z.shape),)


def spectrum(params, x):
    """The family's conjugate of one chain: state_0 ~ N(0, 1), then it moves before every observation."""
    n = x.shape[1]
    a = params["a"]
    var = np.empty(n + 1)
    var[0] = 1.0
    for t in range(n):
        var[t + 1] = a**2 * var[t] + 0.25
    cov = np.array([[a ** abs(s - t) * var[min(s, t) + 1] for t in range(n)] for s in range(n)])
    return float(log_density(x, np.zeros(n), cov + params["noise"] ** 2 * np.eye(n)).sum())


def read_again(params, x):
    """The flow in double precision, by its own log-density; that it is one, by its integral over the plane."""
    with torch.random.fork_rng():
        flow = spline_coupling().double()
    state = {name.removeprefix("spline$$$"): torch.as_tensor(value) for name, value in params.items()}
    flow.load_state_dict(state)
    base = dist.Normal(torch.zeros(2).double(), torch.ones(2).double()).to_event(1)
    flowing = dist.TransformedDistribution(base, [flow])
    axis = torch.linspace(-8, 8, 321, dtype=torch.float64)
    with torch.no_grad():
        total = flowing.log_prob(torch.cartesian_prod(axis, axis)).exp().sum() * (axis[1] - axis[0]) ** 2
        assert abs(float(total) - 1) < 0.01
        return float(flowing.log_prob(torch.as_tensor(x)).sum())


def heaps(params, x):
    terms = stats.norm.logpdf(x, params["locs"], params["scale"]) + np.log(params["weights"])
    return logsumexp(terms, axis=1).sum()


def multinomials(params, x):
    """Dirichlet-multinomial of all rows together, times each row's coefficient."""
    total = x.sum(0)
    coefficient = (gammaln(x.sum(1) + 1) - gammaln(x + 1).sum(1)).sum()
    return coefficient + gammaln(3) - gammaln(3 + total.sum()) + gammaln(1 + total).sum()


def beta_binomials(params, x):
    a, b = params["a"], params["b"]
    choose = gammaln(13) - gammaln(x + 1) - gammaln(13 - x)
    return (choose + betaln(a + x, b + 12 - x) - betaln(a, b)).sum()


def negative_binomials(params, x):
    return stats.nbinom.logpmf(x, params["size"], params["rate"] / (1 + params["rate"])).sum()


CASES = [
    Case(
        "transformed_tokens",
        transformed_tokens,
        log_normals,
        lambda p, x: stats.lognorm.logpdf(x, p["s"], scale=np.exp(p["m"])).sum(),
    ),
    Case("spline_flow", SplineFlow, moons, read_again, warns="no smooth maximum"),
    Case("mixture_same_family", mixture_same_family, two_heaps, heaps),
    Case("gaussian_hmm_site", gaussian_hmm_site, four_series, spectrum),
    Case(
        "von_mises",
        von_mises,
        lambda rng: (rng.vonmises(1.0, 3.0, size=(40, 1)),),
        lambda p, x: stats.vonmises.logpdf(x, p["concentration"], p["loc"]).sum(),
        tolerance=1e-5,  # torch's Bessel function is a polynomial with seven digits
    ),
    Case(
        "compositional_dirichlet",
        compositional_dirichlet,
        lambda rng: (rng.dirichlet([4.0, 2.0, 1.0], size=40),),
        lambda p, x: stats.dirichlet.logpdf(x.T, p["alpha"]).sum(),
    ),
    Case(
        "multinomial_rows",
        multinomial_rows,
        lambda rng: (rng.multinomial(10, [0.5, 0.3, 0.2], size=25).astype(float),),
        multinomials,
    ),
    Case(
        "categorical_table",
        categorical_table,
        lambda rng: (rng.integers(3, size=(40, 2)).astype(float),),
        lambda p, x: sum(np.log(p["p"][j, x[:, j].astype(int)]).sum() for j in range(2)),
    ),
    Case(
        "beta_binomial",
        beta_binomial,
        lambda rng: (rng.binomial(12, rng.beta(2, 4, size=(40, 1))).astype(float),),
        beta_binomials,
    ),
    Case(
        "negative_binomial",
        negative_binomial,
        lambda rng: (rng.poisson(rng.gamma(2, 2, size=(40, 1))).astype(float),),
        negative_binomials,
    ),
]
