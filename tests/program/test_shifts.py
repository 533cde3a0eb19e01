"""Observed values that latents or parameters shift: obs=x - f(z) is scored as x under the shifted distribution."""

import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from scipy import integrate, optimize, stats
from scipy.special import logsumexp
from truths import log_density

from bayes_mpt import BayesMPT
from bayes_mpt.evidence import from_draws
from bayes_mpt.predictors import Exact, Importance, Quadrature, SequentialMonteCarlo, choose
from bayes_mpt.program.program import ModelError
from bayes_mpt.score import CumulativeMaskedScore

pytestmark = pytest.mark.usefixtures("own_store")

rng = np.random.default_rng(0)
X = 1 + rng.normal(size=(12, 3))
Y = X.sum(1) + rng.normal(size=12)
x0 = X[:, 0]
ONES = np.ones((12, 12))


def gaussian(values, cov):
    return stats.multivariate_normal(np.zeros(len(values)), cov + np.eye(len(values))).logpdf(values)


def integral(log_joint, low=-9.0, high=9.0):
    return np.log(
        integrate.quad(lambda z: np.exp(log_joint(z)), low, high, epsabs=0, epsrel=1e-11, limit=200)[0]
    )


# ------------------------------------------------------------------------------------------- kinds of shifts


def of_all_rows(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("r", dist.Normal(0.0, 1.0), obs=x[:, 0] - mu)


def turned(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("r", dist.StudentT(5.0, 0.5, 1.0), obs=mu - x[:, 0])


def doubled(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("r", dist.Normal(0.0, 1.0), obs=2 * x[:, 0] - mu)


def by_a_label_of_the_row(x):
    with pyro.plate("rows", len(x)):
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample(
            "r", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x - torch.tensor([-1.0, 2.0])[c, None]
        )


def by_a_rare_label(x):
    with pyro.plate("rows", len(x)):
        c = pyro.sample("c", dist.Bernoulli(x.new_tensor(1e-6)))
        pyro.sample("r", dist.Normal(0.0, 1.0), obs=x[:, 0] - c)


def by_a_label_of_all(x):
    s = pyro.sample("s", dist.HalfNormal(1.0))
    c = pyro.sample("c", dist.Bernoulli(0.4))
    with pyro.plate("rows", len(x)):
        pyro.sample("r", dist.Normal(0.0, s), obs=x[:, 0] - 2 * c)


def by_both(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("r", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x - mu - z[..., None])


def beside_covariates(x):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("r", dist.Normal(0.0, 1.0), obs=x[:, 2] - slope * x[:, 0])


def of_a_regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("r", dist.Normal(0.0, 1.0), obs=y - x @ w)


def step_by_step(x):
    mu, z = pyro.sample("mu", dist.Normal(0.0, 1.0)), x.new_tensor(0.0)
    for t in range(len(x)):
        z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
        pyro.sample(f"r_{t}", dist.Normal(0.0, 1.0), obs=x[t, 0] - z - mu)


def of_a_mixture(x):
    law = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.5, 0.5])), dist.Normal(torch.tensor([-1.0, 1.0]), 0.5)
    )
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("r", law, obs=x[:, 0] - mu)


def of_vectors(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("r", dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 0.5), obs=x - z)


def decentred(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("r", dist.Normal(z, 1.0), obs=x[:, 0])


def halves(m):
    return 0.5 * stats.norm(m - 1, 0.5).pdf(x0) + 0.5 * stats.norm(m + 1, 0.5).pdf(x0)


WALK = np.minimum.outer(np.arange(1, 13), np.arange(1, 13))
normal = stats.norm.logpdf
TRUTHS = {
    of_all_rows: lambda: gaussian(x0, ONES),
    turned: lambda: integral(lambda m: stats.t(5, 0.5).logpdf(m - x0).sum() + normal(m)),
    doubled: lambda: gaussian(2 * x0, ONES),
    by_a_label_of_the_row: lambda: sum(
        logsumexp([np.log(p) + normal(row, m, 1).sum() for p, m in ((0.3, -1), (0.7, 2))]) for row in X
    ),
    by_a_rare_label: lambda: np.log((1 - 1e-6) * np.exp(normal(x0)) + 1e-6 * np.exp(normal(x0, 1))).sum(),
    by_a_label_of_all: lambda: np.log(
        sum(
            p * np.exp(integral(lambda s, m=m: normal(x0, m, s).sum() + stats.halfnorm.logpdf(s), 1e-3, 10))
            for p, m in ((0.6, 0), (0.4, 2))
        )
    ),
    by_both: lambda: gaussian(X.ravel(), 4 * np.kron(ONES, np.eye(3)) + np.kron(np.eye(12), np.ones((3, 3)))),
    beside_covariates: lambda: gaussian(X[:, 2], np.outer(x0, x0)),
    of_a_regression: lambda: gaussian(Y, X @ X.T),
    step_by_step: lambda: gaussian(x0, WALK + ONES),
    of_a_mixture: lambda: integral(lambda m: np.log(halves(m)).sum() + normal(m)),
    of_vectors: lambda: stats.multivariate_normal(np.zeros(3), 2 * np.eye(3) + 0.5).logpdf(X).sum(),
    poutine.reparam(decentred, {"r": LocScaleReparam(0.0)}): lambda: normal(x0, 0, 2**0.5).sum(),
}


@pytest.mark.parametrize(
    "program", TRUTHS, ids=lambda program: getattr(program, "__name__", "reparametrised")
)
def test_shifted_values_have_the_density_of_the_data(program):
    args = (X, Y) if program is of_a_regression else (X,)
    model = BayesMPT(program, random_state=0).fit(*args)
    assert model.log_marginal_likelihood_ == pytest.approx(TRUTHS[program](), abs=1e-9)
    assert model.log_marginal_likelihood_se_ < 1e-9
    assert "shifts the values of 'r" in model.explain()


@pytest.mark.parametrize(
    "predictor", [Exact(), Quadrature(), Importance(200), SequentialMonteCarlo(64, 8)], ids=str
)
def test_every_predictor_scores_them(predictor):
    model = BayesMPT(of_all_rows, predictor=predictor, random_state=0).fit(X)
    error = 4 * model.log_marginal_likelihood_se_
    assert (error > 1e-4) == isinstance(predictor, Importance | SequentialMonteCarlo)
    assert model.log_marginal_likelihood_ == pytest.approx(gaussian(x0, ONES), abs=error + 1e-9)


@pytest.mark.slow
def test_they_are_scored_as_a_loss_of_svi_and_from_draws():
    x = torch.from_numpy(X)
    assert CumulativeMaskedScore().loss(of_all_rows, None, x) == pytest.approx(-gaussian(x0, ONES), abs=1e-9)
    grid = np.linspace(-4, 6, 4001)
    density = np.array([np.exp(stats.t(5, 0.5).logpdf(m - x0).sum() + normal(m)) for m in grid])
    draws = np.interp(np.random.default_rng(0).uniform(size=(4, 500)), density.cumsum() / density.sum(), grid)
    found = from_draws(turned, {"mu": draws}, X)
    assert abs(found.log_evidence - TRUTHS[turned]()) < 4 * found.se < 0.2


# ---------------------------------------------------------------------------------- what comes back is the data


def factor_analysis(shift, law):
    """One factor: what is observed is the noise, or the row."""

    def program(x):
        w = pyro.param("w", x.new_tensor([1.0, 0.5, -1.0]))
        b = pyro.param("b", x.new_tensor([1.0, 2.0, 3.0]))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            mean = z[..., None] * w + b
            pyro.sample("x", law(0 * mean if shift else mean).to_event(1), obs=x - mean if shift else x)

    return program


@pytest.mark.parametrize("law", [lambda m: dist.Normal(m, 0.7), lambda m: dist.StudentT(5.0, m, 0.7)])
def test_rows_are_sampled_and_imputed_as_data(law):
    rows = np.random.default_rng(1).normal(size=(40, 1)) * [1.0, 0.5, -1.0] + [1.0, 2.0, 3.0]
    rows += 0.7 * np.random.default_rng(2).normal(size=rows.shape)
    rows[::5, 1] = np.nan
    shifted, plain = (BayesMPT(factor_analysis(s, law), random_state=0).fit(rows) for s in (True, False))
    for ask in ("score_samples", "impute", "transform"):
        np.testing.assert_allclose(getattr(shifted, ask)(rows), getattr(plain, ask)(rows), atol=1e-6)
    np.testing.assert_allclose(shifted.sample(5), plain.sample(5), atol=1e-5)
    if shifted.predictor_.name == "Exact":  # against dense algebra
        w, b = shifted.params_["w"], shifted.params_["b"]
        cov = np.outer(w, w) + 0.49 * np.eye(3)
        np.testing.assert_allclose(shifted.score_samples(rows), log_density(rows, b, cov), atol=1e-10)
        gain = cov[1, [0, 2]] @ np.linalg.inv(cov[np.ix_([0, 2], [0, 2])])
        want = b[1] + (rows[::5][:, [0, 2]] - b[[0, 2]]) @ gain
        np.testing.assert_allclose(shifted.impute(rows)[::5, 1], want, atol=1e-10)
        np.testing.assert_allclose(shifted.sample(20_000).mean(0), b, atol=0.05)


def test_a_fit_pickles():
    model = BayesMPT(by_a_label_of_the_row).fit(X)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_allclose(again.score_samples(X[:4]), model.score_samples(X)[:4], atol=1e-12)
    np.testing.assert_allclose(again.sample(3), model.sample(3), atol=1e-12)


def test_a_response_is_predicted_as_data():
    model = BayesMPT(of_a_regression).fit(X, Y)
    want = X @ np.linalg.solve(X.T @ X + np.eye(3), X.T @ Y)
    np.testing.assert_allclose(model.predict(X), want, atol=1e-9)


@pytest.mark.parametrize("n_rows", [1, 2, 3])
def test_a_response_of_few_rows_is_predicted(n_rows):
    def program(x, y):
        w = pyro.param("w", torch.zeros(3))
        with pyro.plate("rows", len(x)):
            pyro.sample("r", dist.StudentT(5.0, 0.0, 1.0), obs=y - x @ w)

    model = BayesMPT(program).fit(X, Y)
    np.testing.assert_allclose(model.predict(X[:n_rows]), X[:n_rows] @ model.params_["w"], atol=1e-9)
    scores = model.score_samples(X[:n_rows], Y[:n_rows])
    np.testing.assert_allclose(scores, stats.t(5).logpdf((Y - X @ model.params_["w"])[:n_rows]), atol=1e-9)


def test_rows_far_from_zero_keep_their_digits():
    far = X + 1e6

    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(1e6, 1.0))
            pyro.sample("r", dist.Normal(0.0, 1.0), obs=x[:, 0] - z)

    model = BayesMPT(program).fit(far)
    assert model.log_marginal_likelihood_ == pytest.approx(normal(x0, 0, 2**0.5).sum(), abs=1e-6)


# ----------------------------------------------------------------------------------------------- what is refused


def observing(value, parameters=False, event=False):
    def program(x):
        if parameters:
            m = pyro.param("m", torch.tensor(0.0))
            s = pyro.param("s", torch.tensor(1.0), constraint=dist.constraints.positive)
        else:
            m = pyro.sample("m", dist.Normal(0.0, 1.0))
            s = pyro.sample("s", dist.HalfNormal(1.0))
        with pyro.plate("rows", len(x)):
            v = value(x, m, s)
            fn = dist.Normal(x.new_zeros(v.shape[-1]), 1.0).to_event(1) if event else dist.Normal(0.0, 1.0)
            pyro.sample("r", fn, obs=v)

    return program


REFUSED = {
    "scale": lambda x, m, s: (x[:, 0] - m) / s,
    "scale alone": lambda x, m, s: x[:, 0] * s,
    "mean of rows": lambda x, m, s: x[:, 0] - x[:, 0].mean() - m,
    "lag": lambda x, m, s: x[:, 0] - m * x[:, 0].roll(1),
    "difference": lambda x, m, s: x[:, 0] - 0.5 * x[:, 0].roll(1) - m,
    "square": lambda x, m, s: x[:, 0].square() - m,
    "outlier": lambda x, m, s: x[:, 0].clamp(max=30.0) - m,
    "after the shift": lambda x, m, s: (x[:, 0] - m).sinh(),
    "no data": lambda x, m, s: m.expand(len(x)),
}
REFUSED_ROWS = {
    "other columns": lambda x, m, s: x - m * x.roll(1, 1),
    "scaled columns": lambda x, m, s: x * x.new_tensor([1.0, 2.0, 3.0]) - m,
    "twice": lambda x, m, s: torch.stack([x[:, 0] - m, x[:, 0] + m], -1),
    "length": lambda x, m, s: (x - m) / (x - m).norm(dim=-1, keepdim=True),
    "partly": lambda x, m, s: torch.stack([x[:, 0] - m, m.expand(len(x))], -1),
}


@pytest.mark.parametrize("parameters", [False, True], ids=["latents", "parameters"])
@pytest.mark.parametrize("how", [*REFUSED, *REFUSED_ROWS])
def test_other_functions_of_the_data_are_refused(how, parameters):
    value = REFUSED.get(how) or REFUSED_ROWS[how]
    program = observing(value, parameters, event=how in REFUSED_ROWS)
    reason = (
        r"site 'r' are computed from latents or parameters.*Jacobian.*obs=x|by site 'r': it would count twice"
    )
    with pytest.raises(ModelError, match=reason):
        choose(program, (torch.from_numpy(X),))


def test_a_latent_that_moves_no_value_of_these_data_is_seen():
    """x - m (x > 50) is x where no x is so large, and has no density elsewhere."""
    with pytest.raises(
        ModelError, match="site 'r' are computed from latents or parameters, and not by a shift alone"
    ):
        choose(observing(lambda x, m, s: x[:, 0] - m * (x[:, 0] > 50).to(x)), (torch.from_numpy(X),))


def test_a_statistic_of_rows_beside_latents_of_all_is_refused():
    with pytest.raises(ModelError, match="value of observed site 'r' in one row depends on other rows"):
        choose(observing(lambda x, m, s: x[:, 0] - x[:, 0].mean()), (torch.from_numpy(X),))


@pytest.mark.parametrize("cut", [lambda m: m.detach(), lambda m: m.item()], ids=["detach", "item"])
def test_a_shift_without_gradients_is_refused(cut):
    program = observing(lambda x, m, s: x[:, 0] - cut(m), parameters=True)
    with pytest.raises(ModelError, match="cut off from gradients"):
        choose(program, (torch.from_numpy(X),))


# ------------------------------------------------------------------------------------------------ residuals of a series


def moving_average(x, share=None):
    share = pyro.sample("share", dist.Normal(0.0, 0.5)) if share is None else share()
    before = x.new_zeros(())
    for t in range(len(x)):
        residual = x[t, 0] - share * before
        pyro.sample(f"x_{t}", dist.Normal(0.0, 1.0), obs=residual)
        before = residual


def of_share(share):
    """x = e + share * (e one step before): its residuals by a triangular system of ones."""
    return stats.norm.logpdf(np.linalg.solve(np.eye(12) + share * np.eye(12, k=-1), x0)).sum()


def test_a_moving_average_by_residuals():
    found = BayesMPT(moving_average).fit(X[:, :1])
    truth = integral(lambda share: of_share(share) + stats.norm.logpdf(share, 0, 0.5), -3, 3)
    assert found.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-6)
    trained = BayesMPT(lambda x: moving_average(x, lambda: pyro.param("share", torch.tensor(0.1)))).fit(
        X[:, :1]
    )
    best = optimize.minimize_scalar(lambda s: -of_share(s), bounds=(-3, 3), method="bounded").fun
    assert trained.log_marginal_likelihood_ == pytest.approx(-best, abs=1e-6)


def test_an_autoregression_by_residuals_is_conditional_on_its_first_cell():
    def program(x):
        slope, mean = (pyro.param(name, torch.tensor(0.1)) for name in ("slope", "mean"))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        for t in range(1, len(x)):
            pyro.sample(f"x_{t}", dist.Normal(0.0, scale), obs=x[t, 0] - mean - slope * x[t - 1, 0])

    columns = np.c_[np.ones(11), x0[:-1]]
    rest = x0[1:] - columns @ np.linalg.lstsq(columns, x0[1:], rcond=None)[0]
    model = BayesMPT(program).fit(X[:, :1])
    assert model.log_marginal_likelihood_ == pytest.approx(normal(rest, 0, rest.std()).sum(), abs=1e-7)
    assert "conditioned on x[0]" in model.explain()


@pytest.mark.parametrize(
    "value",
    [
        lambda x, t, a: (x[t] - 0.3 * x[t - 1]) / (1 + a**2),
        lambda x, t, a: x[t].sinh() - a,
        lambda x, t, a: x[t] - a * x[(t + 1) % len(x)],
        lambda x, t, a: x[t] - a * torch.tanh(x[t]),
    ],
    ids=["scale", "sinh", "cycle", "own cell"],
)
def test_residuals_with_other_jacobians_are_refused(value):
    def program(x):
        a = pyro.sample("a", dist.Normal(0.0, 0.1))
        for t in range(len(x)):
            pyro.sample(f"x_{t}", dist.Normal(0.0, 1.0), obs=value(x[:, 0], t, a))

    with pytest.raises(ModelError, match="are computed from latents or parameters, and"):
        BayesMPT(program).fit(X[:, :1])
