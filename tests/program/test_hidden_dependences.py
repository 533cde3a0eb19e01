"""What a parameter hides that is zero or one at its start: dependences on rows, on their number, on other values."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from scipy import optimize, stats

from bayes_mpt import BayesMPT
from bayes_mpt.predictors import Exact, Importance, Quadrature
from bayes_mpt.program.program import ModelError

X = np.random.default_rng(0).normal(size=(24, 3)) + 1
LOADING = torch.tensor([1.0, 0.5, -1.0], dtype=torch.float64)
KINDS = pytest.mark.parametrize("kind", ["normal", "student"])


def program_with(
    mean=lambda x, c: 0.0,
    obs=lambda x, c: x,
    prior=lambda x, c: 0.0,
    start=0.0,
    n=lambda x: (),
    kind="normal",
):
    """One factor with fixed loadings, and a parameter c that does something at other values than its start."""

    def program(x):
        c = pyro.param("c", lambda: x.new_full(n(x), start))
        scale = pyro.param("scale", x.new_tensor(1.0), constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)) + prior(x, c), 1.0))
            loc = z[..., None] * LOADING + mean(x, c)
            fn = dist.StudentT(5.0, loc, scale) if kind == "student" else dist.Normal(loc, scale)
            pyro.sample("x", fn.to_event(1), obs=obs(x, c))

    return program


@KINDS
@pytest.mark.parametrize(
    "settings",
    [
        {"mean": lambda x, c: c * x.mean(0)},
        {"mean": lambda x, c: c * x[-1:]},
        {"mean": lambda x, c: c * x[:1]},
        {"mean": lambda x, c: c * x.roll(1, 1)},
        {"mean": lambda x, c: (c - 1) * x.mean(0), "start": 1.0},
        {"mean": lambda x, c: c.log() * x.mean(0), "start": 1.0},
        {"prior": lambda x, c: c * x[:, 0]},
        {"prior": lambda x, c: c * x.mean()},
    ],
    ids=["mean", "last", "first", "neighbour", "at one", "log", "prior", "prior of all"],
)
def test_a_dependence_that_a_parameter_hides_is_refused(kind, settings):
    with pytest.raises(ModelError, match=r"site '[xz]' changes with the observed x itself"):
        BayesMPT(program_with(kind=kind, **settings), random_state=0).fit(X)


@KINDS
@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"obs": lambda x, c: x - c.detach()}, "cut off from gradients"),
        ({"obs": lambda x, c: x - float(c.detach())}, "cut off from gradients"),
        ({"obs": lambda x, c: x * c.detach(), "start": 1.0}, "cut off from gradients"),
        ({"obs": lambda x, c: x * (1 + c * c)}, "Jacobian"),
        ({"obs": lambda x, c: x + c * (x - x.mean(0))}, "Jacobian"),
        ({"obs": lambda x, c: x - x.mean(0)}, "depends on other rows"),
        ({"obs": lambda x, c: x.cumsum(0)}, "depends on other rows"),
        ({"obs": lambda x, c: x - x[:1]}, "depends on other rows"),
        ({"obs": lambda x, c: x - x[-1:]}, "depends on other rows"),
    ],
    ids=[
        "detached",
        "number",
        "detached scale",
        "scale",
        "centred by a share",
        "centred",
        "sums",
        "first",
        "last",
    ],
)
def test_observed_values_that_are_no_data_are_refused(kind, settings, match):
    with pytest.raises(ModelError, match=f"site 'x'.*{match}"):
        BayesMPT(program_with(kind=kind, **settings), random_state=0).fit(X)


def best(groups):
    """The highest log-density of rows with one mean, the same for all columns, for each of these groups."""
    w = LOADING.numpy()

    def at(log_scale):
        cov = np.outer(w, w) + np.exp(2 * log_scale) * np.eye(3)
        one = np.linalg.solve(cov, np.ones(3))
        total = 0.0
        for rows in groups:
            mean = (rows @ one).mean() / one.sum()
            total += stats.multivariate_normal(np.full(3, mean), cov).logpdf(rows).sum()
        return -total

    return -optimize.minimize_scalar(at, (-1.0, 0.5)).fun


@pytest.mark.parametrize("start", [0.0, 1.0])
@pytest.mark.parametrize("how", ["all", "number", "parity", "row"])
def test_rows_with_means_of_their_own_are_read_one_by_one(how, start):
    """A mean for all rows, one times their number, one for each of two groups, one for each row."""
    mean, n, groups = {
        "all": (lambda x, c: c, lambda x: (), [X]),
        "number": (lambda x, c: c * len(x), lambda x: (), [X]),
        "parity": (lambda x, c: c[torch.arange(len(x)) % 2][:, None], lambda x: (2,), [X[::2], X[1::2]]),
        "row": (lambda x, c: c[: len(x)][:, None], lambda x: (len(x),), list(X[:, None])),
    }[how]
    model = BayesMPT(program_with(mean=mean, n=n, start=start), random_state=0).fit(X)
    assert model.log_marginal_likelihood_ == pytest.approx(best(groups), abs=1e-6)


@KINDS
def test_a_shift_by_a_parameter_is_a_mean(kind):
    shift, mean = (
        BayesMPT(program_with(kind=kind, **{what: f}), random_state=0).fit(X)
        for what, f in (("obs", lambda x, c: x - c), ("mean", lambda x, c: c))
    )
    assert shift.log_marginal_likelihood_ == pytest.approx(mean.log_marginal_likelihood_, abs=1e-6)


@KINDS
def test_columns_that_are_no_tokens_may_say_anything_of_their_row(kind):
    """A slope of zero at first, along a column of X that is not observed."""

    def program(x):
        slope = pyro.param("slope", x.new_zeros(2))
        with pyro.plate("rows", len(x)):
            loc = x[:, :1] * slope
            fn = dist.StudentT(5.0, loc, 1.0) if kind == "student" else dist.Normal(loc, 1.0)
            pyro.sample("x", fn.to_event(1), obs=x[:, 1:])

    model = BayesMPT(program, random_state=0).fit(X)
    law = stats.t(5) if kind == "student" else stats.norm()
    want = sum(
        -optimize.minimize_scalar(lambda b, y=y: -law.logpdf(y - b * X[:, 0]).sum()).fun for y in X[:, 1:].T
    )
    assert model.log_marginal_likelihood_ == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("start", [0.0, 0.3])
def test_a_latent_that_may_depend_on_another(start):
    """z2 ~ N(a z1, 1), with a at zero first: its gradient is there."""

    def program(x):
        a = pyro.param("a", x.new_tensor(start))
        with pyro.plate("rows", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(len(x)), 1.0))
            z2 = pyro.sample("z2", dist.Normal(a * z1, 1.0))
            pyro.sample("x", dist.Normal(torch.stack([z1, z2], -1), 0.5).to_event(1), obs=x)

    rng = np.random.default_rng(0)
    z = rng.normal(size=(50, 2))
    x = np.column_stack([z[:, 0], 1.5 * z[:, 0] + z[:, 1]]) + 0.5 * rng.normal(size=(50, 2))

    def total(a):
        cov = np.array([[1.0, a], [a, 1 + a * a]]) + 0.25 * np.eye(2)
        return stats.multivariate_normal(np.zeros(2), cov).logpdf(x).sum()

    want = -optimize.minimize_scalar(lambda a: -total(a), (0.0, 1.0)).fun
    assert BayesMPT(program).fit(x).log_marginal_likelihood_ == pytest.approx(want, abs=1e-6)


# ------------------------------------------------------------------------------------- rows beside columns


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("predictor", ["auto", Exact(), Quadrature(), Importance(400)], ids=str)
def test_rows_on_either_side_of_a_plate_of_columns(predictor, dim, holes):
    """N rows of T tokens, never one vector of N T: x_n ~ N(0, I + w w')."""
    x = np.random.default_rng(1).normal(size=(7, 3))
    if holes:
        x[[1, 4], [0, 2]] = np.nan

    def program(x):
        with pyro.plate("rows", len(x), dim=dim):
            z = pyro.sample(
                "z", dist.Normal(x.new_zeros(()), 1.0).expand([len(x)] if dim == -1 else [len(x), 1])
            )
            loading = LOADING if dim == -2 else LOADING[:, None]
            with pyro.plate("columns", 3, dim=-3 - dim):
                pyro.sample("x", dist.Normal(z * loading, 1.0), obs=x if dim == -2 else x.mT)

    model = BayesMPT(program, predictor=predictor, random_state=0).fit(x)
    cov = np.eye(3) + np.outer(LOADING, LOADING)
    seen = ~np.isnan(x)
    want = [
        stats.multivariate_normal(np.zeros(s.sum()), cov[np.ix_(s, s)]).logpdf(row[s])
        for row, s in zip(x, seen, strict=True)
    ]
    error = 1e-9 if not isinstance(predictor, Importance) else 0.3
    np.testing.assert_allclose(model.score_samples(x), want, atol=error)
    assert model.transform(x).shape == (7, 1)
    assert model.predictor_.structure.n_tokens == 3
