"""One battery for all linear-Gaussian programs: every number against dense algebra done here with numpy."""

import math
import pickle
from itertools import combinations
from typing import NamedTuple

import mpmath
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam, PyroSample
from tables import known_factors, tensor
from truths import conditionals, every_mask, log_density

from bayes_mpt import BayesMPT
from bayes_mpt.models import PPCA, FactorAnalysis
from bayes_mpt.predictors import choose
from bayes_mpt.predictors.gaussian.linear import LinearRows
from bayes_mpt.program.affine import affine_form, first_reading, read, read_stated, stated_form
from bayes_mpt.program.batched import Batched

N_ROWS = 7
TOL = 1e-9  # nats


class Case(NamedTuple):
    """A program, what it is called with, and the truth: z ~ N(z_mean, z_cov), x = loc + loading z + N(0, noise)."""

    name: str
    program: object
    args: tuple  # of numpy arrays
    x: np.ndarray  # (N, T), what is scored
    loc: np.ndarray  # (B, T), B = 1 or N
    loading: np.ndarray  # (B, T, K)
    noise: np.ndarray  # (B, T)
    z_mean: np.ndarray  # (B, K)
    z_cov: np.ndarray  # (B, K, K)
    params: dict  # what stands in the parameter store beforehand

    @property
    def n_tokens(self):
        return self.x.shape[1]

    def map(self, n):
        """Of row n: mean and covariance of x, mean of z, covariance of (z, x)."""
        loc, loading, noise, z_mean, z_cov = (
            a[n % len(a)] for a in (self.loc, self.loading, self.noise, self.z_mean, self.z_cov)
        )
        return loc + loading @ z_mean, loading @ z_cov @ loading.T + np.diag(noise), z_mean, z_cov @ loading.T


def case(name, program, args, x, loc, loading, noise, z_mean=None, z_cov=None, params=None):
    loc, noise = np.atleast_2d(loc), np.atleast_2d(noise)
    loading = loading if loading.ndim == 3 else loading[None]
    k = loading.shape[-1]
    z_mean = np.zeros((1, k)) if z_mean is None else np.atleast_2d(z_mean)
    z_cov = np.eye(k)[None] if z_cov is None else z_cov if z_cov.ndim == 3 else z_cov[None]
    return Case(name, program, args, x, loc, loading, noise, z_mean, z_cov, params or {})


def parts(seed, t, k):
    """Random loc (t,), loading (t, k), noise variances (t,) and rows (N, t)."""
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=t),
        rng.normal(size=(t, k)),
        rng.uniform(0.2, 2.0, t),
        2 * rng.normal(size=(N_ROWS, t)),
    )


# ------------------------------------------------------------------------------------------------------ the cases


def ppca(t, k):
    loc, loading, noise, x = parts(1, t, k)
    params = {"loc": (loc, None), "loading": (loading, None), "noise_variance": (noise[0], "positive")}
    return case(f"PPCA {t}x{k}", PPCA(k), (x,), x, loc, loading, np.full(t, noise[0]), params=params)


def factor_analysis(t, k):
    loc, loading, noise, x = parts(2, t, k)
    params = {"loc": (loc, None), "loading": (loading, None), "noise_variance": (noise, "positive")}
    return case(f"FactorAnalysis {t}x{k}", FactorAnalysis(k), (x,), x, loc, loading, noise, params=params)


def chained():
    t, k1, k2 = 5, 2, 3
    loc, loading, noise, x = parts(3, t, k1 + k2)
    rng = np.random.default_rng(30)
    a, b, s = rng.normal(size=(k2, k1)), rng.normal(size=k2), rng.uniform(0.3, 1.5, k2)

    def program(x):
        with pyro.plate("rows", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(k1), 1.0).to_event(1))
            z2 = pyro.sample("z2", dist.Normal(z1 @ tensor(a).T + tensor(b), tensor(s)).to_event(1))
            mean = tensor(loc) + torch.cat([z1, z2], -1) @ tensor(loading).T
            pyro.sample("x", dist.Normal(mean, tensor(noise).sqrt()).to_event(1), obs=x)

    cov = np.block([[np.eye(k1), a.T], [a, a @ a.T + np.diag(s**2)]])
    return case(
        "chained latents", program, (x,), x, loc, loading, noise, np.concatenate([np.zeros(k1), b]), cov
    )


def state_space():
    """z_t = 0.8 z_(t-1) + 0.3 + N(0, 0.5^2), x_t = 2 z_t + N(0, 0.7^2): as many latents as tokens."""
    t = 6
    x = np.random.default_rng(31).normal(size=(N_ROWS, t))

    def program(x):
        with pyro.plate("rows", len(x)):
            z = [pyro.sample("z0", dist.Normal(x.new_zeros(()) + 1.0, 1.0))]
            for i in range(1, t):
                z.append(pyro.sample(f"z{i}", dist.Normal(0.8 * z[-1] + 0.3, 0.5)))
            pyro.sample("x", dist.Normal(2 * torch.stack(z, -1), 0.7).to_event(1), obs=x)

    # z = L (b + R u) with L the inverse of the bidiagonal matrix of the recursion
    lag = np.linalg.inv(np.eye(t) - 0.8 * np.eye(t, k=-1))
    mean = lag @ np.array([1.0] + [0.3] * (t - 1))
    cov = lag @ np.diag([1.0] + [0.25] * (t - 1)) @ lag.T
    return case("state space", program, (x,), x, np.zeros(t), 2 * np.eye(t), np.full(t, 0.49), mean, cov)


def multivariate(kind):
    t, k = 5, 3
    loc, loading, noise, x = parts(4, t, k)
    root = np.tril(np.random.default_rng(40).normal(size=(k, k))) + np.eye(k)
    cov, mean = root @ root.T, np.array([0.5, -1.0, 2.0])
    how = {
        "covariance_matrix": cov,
        "precision_matrix": np.linalg.inv(cov),
        "scale_tril": np.linalg.cholesky(cov),
    }

    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.MultivariateNormal(tensor(mean), **{kind: tensor(how[kind])}))
            mean_x = tensor(loc) + z @ tensor(loading).T
            pyro.sample("x", dist.Normal(mean_x, tensor(noise).sqrt()).to_event(1), obs=x)

    return case(f"MultivariateNormal {kind}", program, (x,), x, loc, loading, noise, mean, cov)


def latent_means():
    t, k = 6, 2
    loc, loading, noise, x = parts(5, t, k)
    mean, sd = np.array([3.0, -40.0]), np.array([0.5, 7.0])

    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(tensor(mean), tensor(sd)).to_event(1))
            mean_x = tensor(loc) + z @ tensor(loading).T
            pyro.sample("x", dist.Normal(mean_x, tensor(noise).sqrt()).to_event(1), obs=x)

    return case("latent means", program, (x,), x, loc, loading, noise, mean, np.diag(sd**2))


def two_sites():
    t = 5
    loc, loading, noise, x = parts(6, t, 4)

    def program(x):
        with pyro.plate("rows", len(x)):
            level = pyro.sample("level", dist.Normal(x.new_tensor(1.5), 2.0))
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            mean = tensor(loc) + level[:, None] * tensor(loading)[:, 0] + z @ tensor(loading)[:, 1:].T
            pyro.sample("x", dist.Normal(mean, tensor(noise).sqrt()).to_event(1), obs=x)

    return case(
        "two latent sites",
        program,
        (x,),
        x,
        loc,
        loading,
        noise,
        np.array([1.5, 0, 0, 0]),
        np.diag([4.0, 1, 1, 1]),
    )


def feature_plate():
    t, k = 5, 2
    loc, loading, noise, x = parts(7, t, k)

    def program(x):
        with pyro.plate("rows", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(x.new_zeros(k), 1.0).to_event(1))  # (N, 1, K)
            with pyro.plate("features", t, dim=-1):
                mean = tensor(loc) + (z * tensor(loading)).sum(-1)
                pyro.sample("x", dist.Normal(mean, tensor(noise).sqrt()), obs=x)

    return case("feature plate", program, (x,), x, loc, loading, noise)


def latent_a_cell():
    """A latent of its own for every cell, inside both plates, beside one of the row."""
    t = 4
    loc, loading, noise, x = parts(8, t, 1)

    def program(x):
        with pyro.plate("rows", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))  # (N, 1)
            with pyro.plate("features", t, dim=-1):
                v = pyro.sample("v", dist.Normal(x.new_zeros(()), 0.6))  # (N, T)
                mean = tensor(loc) + z * tensor(loading)[:, 0] + 2 * v
                pyro.sample("x", dist.Normal(mean, tensor(noise).sqrt()), obs=x)

    w = np.concatenate([loading, 2 * np.eye(t)], 1)
    return case(
        "latent a cell", program, (x,), x, loc, w, noise, np.zeros(1 + t), np.diag([1.0] + [0.36] * t)
    )


def covariates():
    """The offset and the loadings change with a covariate of the row."""
    t, k = 5, 2
    loc, loading, noise, x = parts(9, t, k)
    rng = np.random.default_rng(90)
    y, slope = rng.normal(size=(N_ROWS, 2)), rng.normal(size=t)

    def program(x, y):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(k), 1.0).to_event(1))
            mean = tensor(loc) + y[:, :1] * tensor(slope) + (1 + y[:, 1:] ** 2) * (z @ tensor(loading).T)
            pyro.sample("x", dist.Normal(mean, tensor(noise).sqrt()).to_event(1), obs=x)

    w = (1 + y[:, 1] ** 2)[:, None, None] * loading
    return case("covariates", program, (x, y), x, loc + y[:, :1] * slope, w, noise)


def heteroscedastic():
    t, k = 6, 2
    loc, loading, _, x = parts(10, t, k)
    sd = np.random.default_rng(100).uniform(0.1, 3.0, (N_ROWS, t))

    def program(x, sd):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(k), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(tensor(loc) + z @ tensor(loading).T, sd).to_event(1), obs=x)

    return case("noise by row", program, (x, sd), x, loc, loading, sd**2)


def sorted_rows(what, n=40):
    """Maps that are alike in the first rows of the table and not in the last."""
    t, k = 3, 1
    loc, loading, noise, _ = parts(21, t, k)
    rng = np.random.default_rng(210)
    x, last = 2 * rng.normal(size=(n, t)), (np.arange(n) >= n - 5).astype(float)[:, None]
    y = last if what != "noise" else np.sqrt(noise) * (1 + 3 * last)

    def program(x, y):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(k), 1.0).to_event(1))
            mean, sd = tensor(loc) + z @ tensor(loading).T, tensor(noise).sqrt()
            if what == "offset":
                mean = mean + 5 * y
            elif what == "loading":
                mean = tensor(loc) + (1 + 2 * y) * (z @ tensor(loading).T)
            else:
                sd = y
            pyro.sample("x", dist.Normal(mean, sd).to_event(1), obs=x)

    offset = loc + 5 * last if what == "offset" else np.tile(loc, (n, 1))
    w = (1 + 2 * last * (what == "loading"))[:, :, None] * loading
    variance = y**2 if what == "noise" else np.tile(noise, (n, 1))
    return case(f"sorted rows, {what}", program, (x, y), x, offset, w, variance)


def regression(n=6):
    """Bayesian linear regression: the weights are shared, so the n targets are tokens of one vector."""
    rng = np.random.default_rng(11)
    x, y = rng.normal(size=(n, 3)), rng.normal(size=n)

    def program(x, y):
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 2.0).to_event(1))
        b = pyro.sample("b", dist.Normal(x.new_tensor(0.3), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x @ w + b, 0.7), obs=y)

    return case(
        "linear regression",
        program,
        (x, y),
        y[None],
        np.zeros(n),
        np.concatenate([x, np.ones((n, 1))], 1),
        np.full(n, 0.49),
        np.array([0, 0, 0, 0.3]),
        np.diag([4.0, 4, 4, 1]),
    )


def outside_and_inside():
    """One latent of the data set and one of each row: 3 rows of 2 tokens are one vector of 6."""
    n, t = 3, 2
    rng = np.random.default_rng(12)
    x, noise = rng.normal(size=(n, t)), np.array([0.5, 1.5])
    shared, own = rng.normal(size=t), rng.normal(size=t)

    def program(x):
        s = pyro.sample("s", dist.Normal(x.new_tensor(-1.0), 3.0))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.2), 1.0))
            mean = s * tensor(shared) + z[:, None] * tensor(own)
            pyro.sample("x", dist.Normal(mean, tensor(noise).sqrt()).to_event(1), obs=x)

    w = np.concatenate([np.tile(shared, n)[:, None], np.kron(np.eye(n), own[:, None])], 1)
    return case(
        "latents outside and inside",
        program,
        (x,),
        x.reshape(1, -1),
        np.zeros(n * t),
        w,
        np.tile(noise, n),
        np.array([-1.0] + [0.2] * n),
        np.diag([9.0] + [1.0] * n),
    )


def twice():
    t, k = 5, 2
    loc, loading, noise, x = parts(13, t, k)

    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(k), 1.0).to_event(1))
            mean = tensor(loc) + z @ tensor(loading).T
            pyro.sample("x", dist.Normal(mean, tensor(noise).sqrt()).to_event(1), obs=2 * x)

    return case("obs = 2 x", program, (x,), 2 * x, loc, loading, noise)


def one_token():
    loc, loading, noise, x = parts(14, 1, 1)

    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            mean = tensor(loc) + z @ tensor(loading).T
            pyro.sample("x", dist.Normal(mean, tensor(noise).sqrt()).to_event(1), obs=x)

    return case("one token", program, (x,), x, loc, loading, noise)


class Factors(PyroModule):
    def __init__(self, loc, loading, noise):
        super().__init__()
        self.loc = PyroParam(tensor(loc))
        self.loading = PyroParam(tensor(loading))
        self.noise = PyroParam(tensor(noise), constraint=constraints.positive)

    def forward(self, x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.loading.shape[1]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.loc + z @ self.loading.T, self.noise.sqrt()).to_event(1), obs=x)


def pyro_module():
    loc, loading, noise, x = parts(15, 6, 2)
    return case("PyroModule", Factors(loc, loading, noise), (x,), x, loc, loading, noise)


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](2, 1).double()
        self.linear.weight = PyroSample(dist.Normal(torch.zeros(1, 2, dtype=torch.float64), 1.5).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0).to_event(1))

    def forward(self, x, y):
        mean = self.linear(x)[:, 0]
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def pyro_sample():
    rng = np.random.default_rng(16)
    x, y = rng.normal(size=(6, 2)), rng.normal(size=6)
    w = np.concatenate([x, np.ones((6, 1))], 1)
    return case(
        "PyroSample weights",
        Regression(),
        (x, y),
        y[None],
        np.zeros(6),
        w,
        np.full(6, 0.25),
        np.zeros(3),
        np.diag([2.25, 2.25, 1.0]),
    )


CASES = [
    ppca(6, 2),
    ppca(10, 3),
    factor_analysis(6, 2),
    factor_analysis(5, 0),
    factor_analysis(4, 4),
    factor_analysis(3, 5),
    chained(),
    state_space(),
    multivariate("covariance_matrix"),
    multivariate("precision_matrix"),
    multivariate("scale_tril"),
    latent_means(),
    two_sites(),
    feature_plate(),
    latent_a_cell(),
    covariates(),
    heteroscedastic(),
    sorted_rows("offset"),
    sorted_rows("loading"),
    sorted_rows("noise"),
    regression(),
    regression(10),
    outside_and_inside(),
    twice(),
    one_token(),
    pyro_module(),
    pyro_sample(),
]
BY_ROW = [c for c in CASES if len(c.x) > 1]


def with_holes(c):
    """The same case with 10 to 40 % of its cells missing; row 0 complete and row 1 empty where rows are scored."""
    rng = np.random.default_rng(len(c.name))
    hole = rng.random(c.x.shape) < 0.3
    if len(c.x) > 1:
        hole[0], hole[1] = False, True
    elif not hole.any():
        hole[0, 0] = True
    args = list(c.args)
    if len(c.x) > 1:
        args[0] = np.where(hole, np.nan, args[0])
    else:  # one vector: its tokens stand in the last argument
        args[-1] = np.where(hole.reshape(args[-1].shape), np.nan, args[-1])
    return c._replace(args=tuple(args), x=np.where(hole, np.nan, c.x))


@pytest.fixture(params=["complete", "missing"])
def holes(request):
    return request.param == "missing"


@pytest.fixture(params=CASES, ids=lambda c: c.name)
def item(request, holes):
    return with_holes(request.param) if holes else request.param


def predictor_of(c):
    """What the package makes of the program, with gradients cut."""
    with pyro.get_param_store().scope():
        for name, (value, constraint) in c.params.items():
            where = constraints.positive if constraint == "positive" else constraints.real
            pyro.param(name, tensor(value), constraint=where)
        args = tuple(tensor(a) for a in c.args)
        with torch.no_grad():
            return choose(c.program, args).read(args)


# ------------------------------------------------------------------------------------------------ the dense truth


def dense_conditionals(c, n, visible):
    """log p(x_i | x_visible) of row n by one dense solve; 0 where visible or missing."""
    mean, cov, *_ = c.map(n)
    return conditionals(c.x[n], visible, mean, cov)


def dense_joint(c):
    return np.array([log_density(c.x[n : n + 1], *c.map(n)[:2])[0] for n in range(len(c.x))])


def close(got, want, tol=TOL):
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=tol)


# -------------------------------------------------------------------------------------------------------- the tests


def test_what_was_read(item):
    predictor = predictor_of(item)
    assert isinstance(predictor, LinearRows) and predictor.evidence().exact
    np.testing.assert_array_equal(predictor.reading.value.numpy(), item.x)
    assert predictor.structure.by_row == (len(item.x) > 1)
    assert set(predictor.structure.parameters) >= set(item.params)


def test_joint(item):
    close(predictor_of(item).at(tensor(item.x)).score().numpy(), dense_joint(item))


def test_conditionals_of_every_mask(item):
    visible = every_mask(item.n_tokens)
    got = predictor_of(item).at(tensor(item.x)).conditionals(torch.from_numpy(visible)).numpy()
    want = np.stack([[dense_conditionals(item, n, v) for n in range(len(item.x))] for v in visible])
    close(got, want)


def test_chains(item):
    rng = np.random.default_rng(0)
    t = item.n_tokens
    orders = np.stack([np.arange(t), np.arange(t)[::-1], rng.permutation(t), rng.permutation(t)])
    got = predictor_of(item).at(tensor(item.x)).chain(torch.from_numpy(orders)).numpy()
    for c, order in enumerate(orders):
        for n in range(len(item.x)):
            want, visible = np.zeros(t), np.zeros(t, dtype=bool)
            for token in order:
                want[token] = dense_conditionals(item, n, visible)[token]
                visible[token] = True
            close(got[c, n], want)


def test_area_under_the_masked_curve_is_the_lml(item):
    """sum_m S(x; m) = log p(x), S(m) the mean over all masks of m hidden tokens of their mean score."""
    visible = every_mask(item.n_tokens)
    size = (~visible).sum(1)
    score = (
        predictor_of(item).at(tensor(item.x)).conditionals(torch.from_numpy(visible)).numpy().sum(-1)
    )  # (S, N)
    area = sum((score[size == m] / m).mean(0) for m in range(1, item.n_tokens + 1))
    close(area, dense_joint(item))


def test_posterior(item):
    predictor = predictor_of(item)
    masks = [None, *(np.random.default_rng(1).random((3, item.n_tokens)) < 0.5)]
    for visible in masks:
        got = predictor.at(tensor(item.x)).posterior(None if visible is None else torch.from_numpy(visible))
        for n in range(len(item.x)):
            mean, cov, z_mean, cross = item.map(n)
            seen = ~np.isnan(item.x[n]) & (True if visible is None else visible)
            alpha = np.linalg.solve(cov[np.ix_(seen, seen)], item.x[n, seen] - mean[seen])
            z = z_mean + cross[:, seen] @ alpha
            loading, loc = item.loading[n % len(item.loading)], item.loc[n % len(item.loc)]
            close(got.mean[n].numpy(), z)
            close(got.tokens[n].numpy(), loc + loading @ z)


def test_frozen_and_pickled_it_gives_the_same_without_the_program(item):
    predictor = predictor_of(item)
    again = pickle.loads(pickle.dumps(predictor.detached())).at(tensor(item.x))
    visible, order = torch.from_numpy(every_mask(item.n_tokens)), torch.arange(item.n_tokens)[None]
    for name, args in {"score": (), "conditionals": (visible,), "chain": (order,)}.items():
        assert torch.equal(getattr(again, name)(*args), getattr(predictor, name)(*args))


@pytest.mark.parametrize(
    "c", [c for c in BY_ROW if not c.params and c.name != "PyroModule"], ids=lambda c: c.name
)
def test_the_estimator_scores_a_program_with_nothing_to_train(c, holes):
    c = with_holes(c) if holes else c
    if holes:  # the empty row is refused or scored 0 elsewhere: leave it out here
        keep = np.arange(len(c.x)) != 1
        own = [f if len(f) == 1 else f[keep] for f in c[4:9]]
        c = Case(c.name, c.program, tuple(a[keep] for a in c.args), c.x[keep], *own, c.params)
    model = BayesMPT(c.program).fit(*c.args)
    close(model.score_samples(*c.args), dense_joint(c))
    assert model.log_marginal_likelihood_ == pytest.approx(dense_joint(c).sum(), abs=TOL * 10)
    assert model.params_ == {}


@pytest.mark.parametrize("c", [regression(), outside_and_inside()], ids=lambda c: c.name)
def test_the_estimator_scores_one_vector(c):
    """The LML of all rows together, which is not the sum of the rows' own."""
    model = BayesMPT(c.program).fit(*c.args)
    got = np.atleast_1d(model.score_samples(*c.args))
    assert got.shape == (1,)
    close(got, dense_joint(c))
    assert model.log_marginal_likelihood_ == pytest.approx(dense_joint(c)[0], abs=TOL)


# --------------------------------------------------------------------------------------------- gradients, extremes


def test_gradients_are_those_of_the_dense_density():
    c = factor_analysis(5, 2)
    x = tensor(c.x)
    dense = {n: tensor(v).requires_grad_() for n, (v, _) in c.params.items()}
    cov = dense["loading"] @ dense["loading"].T + torch.diag(dense["noise_variance"])
    torch.distributions.MultivariateNormal(dense["loc"], cov).log_prob(x).sum().backward()
    order = torch.tensor([[3, 1, 0, 4, 2]])
    for score in (lambda p: p.at(x).score(), lambda p: p.at(x).chain(order)):
        with pyro.get_param_store().scope():
            leaves = {}
            for name, (value, constraint) in c.params.items():
                where = constraints.positive if constraint else constraints.real
                pyro.param(name, tensor(value), constraint=where)
            score(choose(c.program, (x,)).read((x,))).sum().backward()
            for name in dense:
                leaves[name] = pyro.param(name).unconstrained().grad
        # noise is held by its logarithm
        want = {n: d.grad * (d.detach() if n == "noise_variance" else 1) for n, d in dense.items()}
        for name in dense:
            np.testing.assert_allclose(leaves[name].numpy(), want[name].numpy(), rtol=1e-10, atol=1e-10)


def exact_conditionals(c, visible, digits=60):
    """(S, N, T) with 60 digits, of the very float64 numbers that the program holds."""
    with mpmath.workdps(digits):
        w = mpmath.matrix(c.loading[0].tolist())
        cov = w * w.T + mpmath.diag([mpmath.mpf(float(v)) for v in c.noise[0]])
        out = np.zeros((len(visible), *c.x.shape))
        for s, v in enumerate(visible):
            seen = [int(i) for i in np.flatnonzero(v)]
            inv = mpmath.inverse(mpmath.matrix([[cov[i, j] for j in seen] for i in seen])) if seen else None
            for i in map(int, np.flatnonzero(~v)):
                row = mpmath.matrix([[cov[i, j] for j in seen]]) * inv if seen else None
                var = cov[i, i] - (sum(row[j] * cov[i, seen[j]] for j in range(len(seen))) if seen else 0)
                for n in range(len(c.x)):
                    r = [
                        mpmath.mpf(float(a)) - mpmath.mpf(float(b))
                        for a, b in zip(c.x[n], c.loc[0], strict=True)
                    ]
                    m = sum(row[j] * r[seen[j]] for j in range(len(seen))) if seen else mpmath.mpf(0)
                    out[s, n, i] = float(-((r[i] - m) ** 2) / var / 2 - mpmath.log(2 * mpmath.pi * var) / 2)
        return out


def tiny(relative, n_latents=2, t=4):
    """Rows drawn from a factor model whose noise is this share of each token's variance."""
    loc, loading, _, _ = parts(17, t, n_latents)
    noise = relative * (loading**2).sum(1) * np.array([1.0, 2.0, 0.5, 3.0])[:t]
    rng = np.random.default_rng(18)
    x = loc + rng.normal(size=(4, n_latents)) @ loading.T + np.sqrt(noise) * rng.normal(size=(4, t))
    return case(f"noise {relative}", known_factors(loc, loading, noise), (x,), x, loc, loading, noise)


@pytest.mark.parametrize("relative", [1e-4, 1e-6, 1e-8, 1e-10, 1e-12])
def test_tiny_noise(relative):
    """Against 60 digits. By QR of [I; psi^-1/2 W] float64 keeps 5e-10 nats even at 1e-12 noise."""
    c = tiny(relative)
    visible = every_mask(4)
    want = exact_conditionals(c, visible)
    size = (~visible).sum(1)
    lml = sum((want[size == m].sum(-1) / m).mean(0) for m in range(1, 5))
    predictor = predictor_of(c)
    x = tensor(c.x)
    slack = 1e-9 + 100 * np.finfo(float).eps / math.sqrt(
        relative
    )  # the condition of the square root, not of S
    np.testing.assert_allclose(predictor.at(x).score().numpy(), lml, rtol=0, atol=slack)
    np.testing.assert_allclose(
        predictor.at(x).conditionals(torch.from_numpy(visible)).numpy(), want, rtol=0, atol=slack
    )
    np.testing.assert_allclose(
        predictor.at(x).chain(torch.tensor([[2, 0, 3, 1]])).sum(-1)[0].numpy(), lml, rtol=0, atol=slack
    )


@pytest.mark.parametrize("relative", [1e-4, 1e-8, 1e-12])
def test_tiny_noise_bounded_by_the_dense_error(relative):
    """What any route must keep: no NaN, and no worse than a dense factorisation, T eps / relative."""
    c = tiny(relative)
    visible = every_mask(4)
    want = exact_conditionals(c, visible)
    size = (~visible).sum(1)
    lml = sum((want[size == m].sum(-1) / m).mean(0) for m in range(1, 5))
    predictor, x = predictor_of(c), tensor(c.x)
    bound = 1e-9 + 100 * np.finfo(float).eps / relative
    got = predictor.at(x).conditionals(torch.from_numpy(visible)).numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=bound)
    np.testing.assert_allclose(predictor.at(x).score().numpy(), lml, rtol=0, atol=bound)


@pytest.mark.parametrize("scale", [1e-8, 1e8, "mixed"])
@pytest.mark.parametrize("k", [2, 6], ids=["woodbury", "dense"])
def test_scales(scale, k):
    """log p(c x) = log p(x) - sum log c, conditional by conditional."""
    t = 5
    loc, loading, noise, x = parts(19, t, k)
    by = np.logspace(-8, 8, t) if scale == "mixed" else np.full(t, scale)
    plain = case("plain", None, (x,), x, loc, loading, noise)
    scaled = predictor_of(
        case(
            "scaled",
            known_factors(by * loc, by[:, None] * loading, by**2 * noise),
            (x * by,),
            x,
            loc,
            loading,
            noise,
        )
    )
    visible = every_mask(t)
    want = np.stack([[dense_conditionals(plain, n, v) for n in range(len(x))] for v in visible])
    want = want - np.where(visible, 0.0, np.log(by))[:, None]
    close(scaled.at(tensor(x * by)).conditionals(torch.from_numpy(visible)).numpy(), want)
    close(scaled.at(tensor(x * by)).score().numpy(), dense_joint(plain) - np.log(by).sum())
    chain = scaled.at(tensor(x * by)).chain(torch.arange(t)[None]).sum(-1)[0].numpy()
    close(chain, dense_joint(plain) - np.log(by).sum())


@pytest.mark.parametrize("shift", [1e4, 1e8])
def test_large_offsets(shift):
    """loc = 1e8 sd: loadings are differences of means, known to a rounding of the mean and no better."""
    loc, loading, noise, x = parts(20, 5, 2)
    loc, x = loc + shift, x + shift
    c = case("shifted", known_factors(loc, loading, noise), (x,), x, loc, loading, noise)
    close(
        predictor_of(c).at(tensor(x)).score().numpy(), dense_joint(c), TOL + 100 * np.finfo(float).eps * shift
    )


@pytest.mark.slow
def test_many_rows_are_scored_as_few():
    """Rows are scored by chunks where there are many: the same numbers, whatever their number."""
    c = factor_analysis(6, 2)
    predictor = predictor_of(c)
    few = predictor.at(tensor(c.x)).score()
    many = predictor.at(tensor(np.tile(c.x, (400_000, 1)))).score()
    assert len(many) == 400_000 * N_ROWS
    close(many[:N_ROWS].numpy(), few.numpy(), 1e-12)
    close(many[-N_ROWS:].numpy(), few.numpy(), 1e-12)


def test_masks_that_hide_a_size_only():
    """The number of masks of the battery, and that they are all different: a guard of the guard."""
    for t in (1, 4):
        visible = every_mask(t)
        assert (
            len({tuple(v) for v in visible})
            == 2**t - 1
            == sum(len(list(combinations(range(t), m))) for m in range(1, t + 1))
        )


# ------------------------------------------------------------------------------------------------- all probes at once


def random_slopes(x, c):
    """Row latents, of which the second depends on the first, on covariates: every row has a map of its own."""
    loading = pyro.param("loading", lambda: x.new_ones(x.shape[1]))
    with pyro.plate("rows", len(x)):
        a = pyro.sample("a", dist.Normal(c[:, 0], 1.5))
        b = pyro.sample("b", dist.Normal((0.5 * a)[..., None].expand(*a.shape, 2), 2.0).to_event(1))
        mean = loading * (a * c[:, 1])[..., None] + (b * c[:, :2]).sum(-1, keepdim=True)
        pyro.sample("x", dist.Normal(mean, 0.1 + c[:, 2:].square()).to_event(1), obs=x)


def correlated_weights(x, c):
    """One vector, its weights one MultivariateNormal, its noise another."""
    w = pyro.sample("w", dist.MultivariateNormal(x.new_zeros(3), torch.diag(c[0].square() + 1) + 0.5))
    cov = torch.eye(len(x)).to(x) + 0.3
    pyro.sample("x", dist.MultivariateNormal((c * w[..., None, :]).sum(-1), cov), obs=x[:, 0])


def matrix_weights(x, c):
    """Written for one set of weights at a time."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), 2.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(c @ w, 1.0), obs=x[:, 0])


@pytest.mark.parametrize("n_rows", [7, 8, 12])
@pytest.mark.parametrize(
    ("program", "batched"),
    [(random_slopes, Batched.PLATE), (correlated_weights, Batched.PLATE), (matrix_weights, Batched.VMAP)],
)
def test_all_probes_in_one_run_are_the_runs_apart(program, batched, n_rows):
    rng = np.random.default_rng(0)
    args = tuple(torch.as_tensor(rng.normal(size=(n_rows, 3))) for _ in range(2))
    with pyro.get_param_store().scope():
        found = affine_form(program, args)
        assert found.batched is batched
        one, other = (read(program, args, found._replace(batched=way)) for way in (batched, Batched.LOOP))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


class InSinglePrecision:
    """Factor analysis with one noise, by a program whose rows are single precision."""

    dtype = torch.float32

    def __call__(self, x):
        loc = pyro.param("loc", lambda: x.mean(0))
        loading = pyro.param("loading", lambda: torch.linspace(1, 2, x.shape[1])[:, None])
        scale = pyro.param("scale", x.new_tensor(1.0), constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            mean = loc + z @ loading.mT
            pyro.sample("x", dist.Normal(mean, scale * x.new_ones(x.shape[1])).to_event(1), obs=x)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # so few digits
@pytest.mark.parametrize("share", [0.0, 0.1])
def test_many_rows_in_single_precision(share):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 1)) @ rng.normal(size=(1, 4)) + 0.5 * rng.normal(size=(50, 4))
    rows = np.where(rng.random(x.shape) < share, np.nan, x)
    best = BayesMPT(PPCA(1), random_state=0).fit(rows)
    model = BayesMPT(InSinglePrecision(), random_state=0).fit(rows)
    assert model.log_marginal_likelihood_ == pytest.approx(best.log_marginal_likelihood_, abs=0.02)
    assert model.score(rows) * 50 == pytest.approx(model.log_marginal_likelihood_, rel=1e-4)


# ------------------------------------------------------------------------------------------- maps that models state


class SquaredNoise(FactorAnalysis):
    """Another program under the same statement."""

    def __call__(self, x):
        n, t = x.shape
        loc = pyro.param("loc", lambda: x.mean(0))
        loading = pyro.param("loading", lambda: torch.ones(t, self.n_components))
        noise = pyro.param("noise_variance", lambda: x.var(0), constraints.positive)
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.n_components), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(loc + z @ loading.mT, noise).to_event(1), obs=x)


class OtherMap(SquaredNoise):
    """One that states what it does not do."""

    linear_map = FactorAnalysis.linear_map


@pytest.mark.parametrize(("n", "t", "k"), [(6, 4, 0), (5, 9, 2), (3, 1, 1), (2, 3, 5)])
@pytest.mark.parametrize("kind", [PPCA, FactorAnalysis])
def test_a_stated_map_is_the_one_that_evaluation_finds(kind, n, t, k):
    x = torch.randn(n, t, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
    with pyro.get_param_store().scope():
        form = stated_form(kind(k), (x,))
        names = form.program.parts
        # a function says nothing of itself
        found, seen = first_reading(lambda x: kind(k)(x), (x,))
        assert form.program._replace(dense=False, parts=None) == found.program
        assert set(names) == set(found.parameters)
        for a, b in zip(read_stated(names, kind(k), (x,))[:5], seen[:5], strict=True):
            assert a.shape == b.shape
            close(a.detach(), b.detach(), 1e-13)


@pytest.mark.parametrize("kind", [SquaredNoise, OtherMap])
def test_what_a_class_states_is_not_believed_of_another_call(kind):
    x = np.random.default_rng(0).normal(size=(30, 4)) @ np.diag([1.0, 2.0, 3.0, 4.0])
    with pyro.get_param_store().scope():
        assert stated_form(kind(1), (tensor(x),)) is None
    # the noise of its tokens is the square of its parameter, and the maximum that of factor analysis
    own, same = BayesMPT(kind(1)).fit(x), BayesMPT(FactorAnalysis(1)).fit(x)
    np.testing.assert_allclose(own.score(x), same.score(x), rtol=1e-9)
    np.testing.assert_allclose(own.params_["noise_variance"] ** 2, same.params_["noise_variance"], rtol=1e-5)
