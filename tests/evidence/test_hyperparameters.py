"""Evidence with the hyper-parameters integrated, against quadrature on grids, closed forms and long runs."""

import math

import gpytorch
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from gpytorch.kernels import LinearKernel, MaternKernel, PeriodicKernel, RBFKernel, RQKernel, ScaleKernel
from gpytorch.priors import GammaPrior, LogNormalPrior, NormalPrior
from pyro.distributions import constraints
from scipy.integrate import quad
from scipy.special import logsumexp
from scipy.stats import gamma, multivariate_normal, multivariate_t, norm
from sklearn.exceptions import ConvergenceWarning

from bayes_mpt import BayesMPT, MarginalLikelihoodSearch, compare
from bayes_mpt.evidence.hyperparameters import Prior, hyperprior, log_likelihood
from bayes_mpt.evidence.integrated import _Mixture, integrate
from bayes_mpt.models import BayesianRegression, GaussianMixture, GaussianProcess, gaussian_process
from bayes_mpt.predictors import choose

LOG_2PI = math.log(2 * math.pi)


def standard(d):
    return Prior(np.zeros(d), np.ones(d))


def by_torch(f):
    """A log-likelihood of torch operations, with its gradient."""

    def of(theta, gradient=True):
        t = torch.as_tensor(theta).requires_grad_()
        value = f(t)
        return value.detach().numpy(), torch.autograd.grad(value.sum(), t)[0].numpy() if gradient else None

    return of


def close(found, truth, most=0.15):
    """Within four of the stated errors, of eight replicates each (t: one in 200 is further off), and these small."""
    assert found.se <= most
    assert abs(found.log_evidence - truth) <= 4 * found.se


@pytest.mark.parametrize("d", [1, 2, 7])
def test_the_mixture_is_of_the_densities_of_pyro(d):
    """Student-t parts whose roots are not triangular, and the prior."""
    rng = np.random.default_rng(d)
    root, centre, phi = rng.normal(size=(3, d, d)), rng.normal(size=(3, d)), 4 * rng.normal(size=(50, d))
    share = np.array([0.2, 0.3, 0.4, 0.1])
    lower = torch.linalg.cholesky(torch.as_tensor(root @ root.mT))
    parts = dist.MultivariateStudentT(5.0, torch.as_tensor(centre), lower).log_prob(
        torch.as_tensor(phi)[:, None]
    )
    prior = dist.Normal(torch.zeros(d).double(), 1.0).to_event(1).log_prob(torch.as_tensor(phi))
    want = logsumexp(np.column_stack([parts, prior]), axis=1, b=share)
    np.testing.assert_allclose(_Mixture(share, centre, root).log_prob(phi), want, rtol=1e-12, atol=0)


# -------------------------------------------------------------------------------------------- closed forms, grids


@pytest.mark.parametrize("d", [1, 3, 8])
def test_normal_likelihood(d):
    rng = np.random.default_rng(d)
    cov = np.cov(rng.normal(size=(d, 3 * d + 2))).reshape(d, d) / 20
    y, loc, scale = rng.normal(size=d), rng.normal(size=d), np.exp(rng.normal(size=d))
    precision = torch.as_tensor(np.linalg.inv(cov))
    constant = -0.5 * (d * LOG_2PI + np.linalg.slogdet(cov)[1])
    residual = lambda t: torch.as_tensor(y) - t  # noqa: E731
    found = integrate(
        by_torch(lambda t: constant - 0.5 * ((residual(t) @ precision) * residual(t)).sum(1)),
        Prior(loc, scale),
    )
    truth = multivariate_normal(loc, np.diag(scale**2) + cov).logpdf(y)
    close(found, truth, 0.1)
    assert found.laplace == pytest.approx(truth, abs=1e-5)  # here exact
    assert len(found.modes) == 1 and found.modes[0].definite
    posterior = np.linalg.inv(np.linalg.inv(cov) + np.diag(scale**-2.0))
    assert found.modes[0].root @ found.modes[0].root.T == pytest.approx(posterior, rel=1e-4, abs=1e-6)
    mean = posterior @ (np.linalg.inv(cov) @ y + loc / scale**2)
    assert found.modes[0].theta == pytest.approx(mean, abs=1e-3)


def grid_evidence(log_likelihood, d, n=1601, reach=8.0):
    line = np.linspace(-reach, reach, n)
    points = np.stack(np.meshgrid(*[line] * d, indexing="ij"), -1).reshape(-1, d)
    value = log_likelihood(points, gradient=False)[0] + norm.logpdf(points).sum(1)
    return float(logsumexp(value) + d * math.log(line[1] - line[0]))


CASES = {
    "skewed": (1, lambda t: -3 * torch.log1p(torch.exp(-4 * t[:, 0])) - 0.5 * t[:, 0].exp()),
    "two modes": (
        1,
        lambda t: torch.logsumexp(torch.stack([-40 * (t[:, 0] - 1.5) ** 2, -8 * (t[:, 0] + 1) ** 2]), 0),
    ),
    "flat": (2, lambda t: 0 * t[:, 0]),
    "banana": (2, lambda t: -8 * (t[:, 1] - t[:, 0] ** 2) ** 2 - 0.5 * (t[:, 0] - 1) ** 2),
    "half of it impossible": (2, lambda t: torch.where(t[:, 0] > 0, -((t[:, 0] - 1) ** 2), -math.inf)),
    "ridge": (2, lambda t: -200 * (t[:, 0] + t[:, 1] - 1) ** 2),
}


@pytest.mark.parametrize("name", CASES)
def test_grid(name):
    d, f = CASES[name]
    close(integrate(by_torch(f), standard(d)), grid_evidence(by_torch(f), d))


def test_one_mode_alone_is_wrong():
    """Two separate modes of equal mass: either alone loses log 2."""
    found = integrate(by_torch(lambda t: -50 * (t[:, 0].abs() - 1.5) ** 2), standard(1))
    truth = grid_evidence(by_torch(lambda t: -50 * (t[:, 0].abs() - 1.5) ** 2), 1)
    assert len(found.modes) == 2
    close(found, truth, 0.1)
    assert found.modes[0].log_mass == pytest.approx(truth - math.log(2), abs=0.1)


def test_overlapping_modes_are_not_counted_twice():
    f = by_torch(
        lambda t: torch.logsumexp(torch.stack([-6 * (t[:, 0] - 0.6) ** 2, -6 * (t[:, 0] + 0.6) ** 2]), 0)
    )
    found, truth = integrate(f, standard(1)), grid_evidence(f, 1)
    close(found, truth, 0.1)


@pytest.mark.slow
def test_error_is_calibrated():
    d, f = CASES["banana"]
    truth = grid_evidence(by_torch(f), d)
    z = [
        (r.log_evidence - truth) / r.se
        for r in (integrate(by_torch(f), standard(d), seed=s) for s in range(40))
    ]
    assert np.mean(np.abs(z) <= 2) >= 0.85
    assert abs(np.mean(z)) < 0.6


def test_nothing_to_integrate():
    found = integrate(lambda theta, gradient=True: (np.full(len(theta), -3.0), theta), standard(0))
    assert (found.log_evidence, found.se) == (-3.0, 0.0)


def test_a_program_that_can_never_be_evaluated():
    with pytest.raises(ValueError, match="cannot be evaluated at any start"):
        integrate(lambda theta, gradient=True: (np.full(len(theta), -np.inf), 0 * theta), standard(2))


# -------------------------------------------------------------------------------------------- Gaussian processes

KERNELS = {
    "RBF": ScaleKernel(RBFKernel()),
    "Matern 1/2": ScaleKernel(MaternKernel(nu=0.5)),
    "Matern 5/2": ScaleKernel(MaternKernel(nu=2.5)),
    "periodic": ScaleKernel(PeriodicKernel()),
    "rational quadratic": ScaleKernel(RQKernel()),
    "linear": LinearKernel(),
    "sum": ScaleKernel(RBFKernel()) + LinearKernel(),
    "product": ScaleKernel(RBFKernel()) * ScaleKernel(PeriodicKernel()),
    "ARD": ScaleKernel(RBFKernel(ard_num_dims=2)),
}


def wave(n=40, seed=0, columns=1):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 2, size=(n, columns))
    return x, np.sin(4 * x[:, 0]) + 0.3 * rng.normal(size=n)


def opened(model, x, y):
    """Inside a parameter store of one's own: likelihood, prior, leaves."""
    args = torch.as_tensor(x), torch.as_tensor(y)
    predictor = choose(model, args)
    store = dict(pyro.get_param_store().named_parameters())
    leaves = {name: store[name] for name in predictor.parameters}
    return predictor, args, hyperprior(model, args, leaves), leaves


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_side_by_side_is_one_by_one(name, missing):
    x, y = wave(columns=2 if name == "ARD" else 1)
    if missing:
        y[[3, 7]] = np.nan
    with pyro.get_param_store().scope():
        predictor, args, prior, leaves = opened(GaussianProcess(KERNELS[name]), x, y)
        theta = prior.loc + prior.scale * np.random.default_rng(1).normal(size=(5, len(prior.loc)))
        calls, read_at = [], predictor.read_at
        predictor.read_at = lambda *asked: calls.append(asked) or read_at(*asked)
        value, grad = log_likelihood(predictor, args, leaves)(theta)
        assert len(calls) == 2, "tried, and taken"
        predictor.read_at = type(predictor).__mro__[1].read_at.__get__(predictor)
        alone, slope = log_likelihood(predictor, args, leaves)(theta)
    assert value == pytest.approx(alone, rel=1e-9)
    assert grad == pytest.approx(slope, rel=1e-6, abs=1e-6)


def known(kernel, value):
    """A kernel whose own parameters are fixed."""
    for path, raw in kernel.named_parameters():
        raw.requires_grad_(False)
        raw.fill_(float(value[path]))
    return kernel


@pytest.mark.slow
def test_length_scale_by_quadrature():
    """One unknown: a grid over it, with the covariance written out."""
    x, y = wave(25)
    kernel = RBFKernel()
    model = GaussianProcess(kernel, mean=gpytorch.means.ZeroMean(), noise=0.09)
    found = BayesMPT(model).fit(x, y).integrated(x, y)
    loc, scale = (
        float(v) for v in model.hyperprior(torch.as_tensor(x), torch.as_tensor(y))["kernel.lengthscale"]
    )

    def density(theta):
        cov = np.exp(-0.5 * (x - x.T) ** 2 / math.exp(2 * theta)) + 0.09 * np.eye(len(x))
        return multivariate_normal(np.zeros(len(y)), cov).logpdf(y) + norm(loc, scale).logpdf(theta)

    top = max(density(t) for t in np.linspace(loc - 4, loc + 4, 100))
    integral = quad(lambda t: math.exp(density(t) - top), loc - 8, loc + 8, limit=400)[0]
    close(found, top + math.log(integral), 0.1)
    assert found.names == ("kernel.lengthscale",)


def test_bayesian_linear_regression():
    """A linear kernel with known variances is regression on x; the noise integrated by a grid over it."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 2))
    y = x @ [1.0, -2.0] + 0.5 * rng.normal(size=30)
    kernel = LinearKernel()
    kernel.variance = 1.0
    kernel.raw_variance.requires_grad_(False)
    model = GaussianProcess(kernel, mean=gpytorch.means.ZeroMean())
    loc, scale = (float(v) for v in model.hyperprior(torch.as_tensor(x), torch.as_tensor(y))["noise"])

    # y ~ N(0, X X' + noise), in the basis of X X'
    eigen, basis = np.linalg.eigh(x @ x.T)
    grid = np.linspace(loc - 8, loc + 8, 4001)
    sd = np.sqrt(eigen + np.exp(grid)[:, None])
    density = norm(0, sd).logpdf(basis.T @ y).sum(1) + norm(loc, scale).logpdf(grid)
    truth = logsumexp(density) + math.log(grid[1] - grid[0])
    close(BayesMPT(model).fit(x, y).integrated(x, y), truth, 0.1)


class InverseGammaPrior(gpytorch.priors.Prior, torch.distributions.InverseGamma):
    def __init__(self, a, b):
        torch.nn.Module.__init__(self)
        self._transform = None
        torch.distributions.InverseGamma.__init__(self, torch.as_tensor(a), torch.as_tensor(b))

    def expand(self, shape):
        return torch.distributions.InverseGamma(self.concentration, self.rate).expand(shape)


def test_conjugate_noise():
    """An inverse-gamma prior of the noise makes y Student-t: a registered prior, read with its Jacobian."""
    rng = np.random.default_rng(0)
    x = np.linspace(0, 1, 20)[:, None]
    y = 0.7 * rng.normal(size=20)
    kernel = ScaleKernel(RBFKernel())  # of a length-scale so short that it is white
    kernel.base_kernel.lengthscale = 1e-6
    kernel.base_kernel.raw_lengthscale.requires_grad_(False)
    kernel.register_prior("outputscale_prior", InverseGammaPrior(3.0, 2.0), "outputscale")
    model = GaussianProcess(kernel, mean=gpytorch.means.ZeroMean(), noise=0.0)
    truth = multivariate_t(np.zeros(20), 2 / 3 * np.eye(20), df=6).logpdf(y)
    close(BayesMPT(model).fit(x, y).integrated(x, y), truth, 0.1)


@pytest.mark.parametrize("period", [0.23, 0.7])
def test_periods(period):
    """The likelihood of a period has many peaks; a grid over it and length-scale, at known variances."""
    rng = np.random.default_rng(0)
    x = np.sort(rng.uniform(0, 2, size=(30, 1)), axis=0)
    y = np.sin(2 * math.pi * x[:, 0] / period) + 0.3 * rng.normal(size=30)
    kernel = PeriodicKernel()
    model = GaussianProcess(kernel, mean=gpytorch.means.ZeroMean(), noise=0.09)
    with pyro.get_param_store().scope():
        predictor, args, prior, leaves = opened(model, x, y)
        likelihood = log_likelihood(predictor, args, leaves)
        found = integrate(likelihood, prior)
        a = np.linspace(-4, 4, 800)
        b = np.linspace(-4, 4.5, 24)
        order = list(leaves)
        first = order.index("kernel.period_length")
        points = np.stack(np.meshgrid(a, b, indexing="ij"), -1).reshape(-1, 2)
        points = points if first == 0 else points[:, ::-1]
        value = []
        for part in np.array_split(points, 20):
            log_p = likelihood(prior.loc + prior.scale * part, gradient=False)[0]
            value.append(log_p + norm.logpdf(part).sum(1))
    truth = logsumexp(np.concatenate(value)) + math.log((a[1] - a[0]) * (b[1] - b[0]))
    close(found, truth)
    at = math.exp(found.modes[0].theta[first])
    assert at == pytest.approx(period, rel=0.05)


# -------------------------------------------------------------------------------------------- the prior


@pytest.mark.slow
def test_prior_is_in_units_of_the_data():
    """Other units of x and y: the same posterior, the evidence shifted by the Jacobian."""
    x, y = wave(30)
    for name in ("product", "sum"):
        a = BayesMPT(GaussianProcess(KERNELS[name]), penalty=True).fit(x, y).integrated(x, y)
        b = (
            BayesMPT(GaussianProcess(KERNELS[name]), penalty=True)
            .fit(1e3 * x, 1e-4 * y)
            .integrated(1e3 * x, 1e-4 * y)
        )
        shift = -30 * math.log(1e-4)
        assert b.log_evidence - shift == pytest.approx(a.log_evidence, abs=3 * math.hypot(a.se, b.se))
        assert b.modes[0].log_joint - shift == pytest.approx(a.modes[0].log_joint, abs=0.01)


@pytest.mark.slow
def test_a_line_far_from_the_origin_is_a_line():
    """The constant of a line reaches to where it meets x = 0: without that a second kernel has to make up for it."""
    rng = np.random.default_rng(0)
    x = rng.uniform(1960, 2000, size=(40, 1))
    y = 0.1 * x[:, 0] + rng.normal(size=40)
    line, more = (
        BayesMPT(GaussianProcess(KERNELS[name]), penalty=True).fit(x, y).integrated(x, y)
        for name in ("linear", "sum")
    )
    assert line.log_evidence > more.log_evidence


def test_registered_priors_replace_the_default():
    x, y = (torch.as_tensor(a) for a in wave())
    kernel = ScaleKernel(
        RBFKernel(lengthscale_prior=LogNormalPrior(0.3, 0.7)), outputscale_prior=GammaPrior(2.0, 3.0)
    )
    mean = gpytorch.means.ConstantMean(constant_prior=NormalPrior(1.0, 2.0))
    model = GaussianProcess(kernel, mean=mean)
    given = model.hyperprior(x, y)
    assert [float(v) for v in given["kernel.base_kernel.lengthscale"]] == pytest.approx([0.3, 0.7])
    assert [float(v) for v in given["mean.constant"]] == [1.0, 2.0]
    with pyro.get_param_store().scope():
        _, _, prior, leaves = opened(model, x, y)
        theta = np.random.default_rng(0).normal(size=(6, 4))
        at = dict(zip(leaves, theta.T, strict=True))
        noise = model.hyperprior(x, y)["noise"]
        # p(theta) = p(v) |dv / dtheta|, v = exp(theta)
        truth = (
            norm(0.3, 0.7).logpdf(at["kernel.base_kernel.lengthscale"])
            + gamma(2.0, scale=1 / 3).logpdf(np.exp(at["kernel.outputscale"]))
            + at["kernel.outputscale"]
            + norm(1.0, 2.0).logpdf(at["mean.constant"])
            + norm(float(noise[0]), float(noise[1])).logpdf(at["noise"])
        )
        assert prior.log_prob(torch.as_tensor(theta)).numpy() == pytest.approx(truth)


def test_normal_prior_of_a_positive_value_is_cut_off_at_zero():
    x, y = (torch.as_tensor(a) for a in wave())
    kernel = RBFKernel(lengthscale_prior=NormalPrior(0.5, 1.0))
    with pyro.get_param_store().scope():
        _, _, prior, leaves = opened(GaussianProcess(kernel, mean=gpytorch.means.ZeroMean(), noise=0.1), x, y)
        assert list(leaves) == ["kernel.lengthscale"]
        total = quad(
            lambda t: math.exp(float(prior.log_prob(torch.tensor([[t]], dtype=torch.float64)))), -30, 5
        )[0]
    assert total == pytest.approx(1, abs=1e-6)


def test_prior_of_something_else_is_refused():
    kernel = RBFKernel()
    kernel.register_prior("p", NormalPrior(0.0, 1.0), lambda m: m.lengthscale.log())
    x, y = (torch.as_tensor(a) for a in wave())
    with pytest.raises(
        ValueError, match="'lengthscale' of RBFKernel is not of the parameter's natural value"
    ):
        GaussianProcess(kernel).hyperprior(x, y)


# -------------------------------------------------------------------------------------------- the estimator


@pytest.mark.slow
def test_penalty_is_the_maximum_a_posteriori():
    x, y = wave()
    free = BayesMPT(GaussianProcess()).fit(x, y)
    held = BayesMPT(GaussianProcess(), penalty=True).fit(x, y)
    found = held.integrated(x, y)
    store = {n: torch.as_tensor(v) for n, v in held.params_.items()}
    theta = np.concatenate(
        [
            np.atleast_1d(store[n].numpy() if n == "mean.constant" else store[n].log().numpy()).ravel()
            for n in found.names
        ]
    )
    assert theta == pytest.approx(found.modes[0].theta, abs=2e-3)
    # what is reported is the LML, without the prior
    assert held.log_marginal_likelihood_ < free.log_marginal_likelihood_
    assert held.log_marginal_likelihood_ == pytest.approx(float(held.estimate(x, y).lml.sum()), abs=1e-8)
    assert "maximum a posteriori" in held.explain() and "maximum a posteriori" not in free.explain()
    with pytest.raises(ValueError, match="penalty=True needs a model that offers hyperprior"):
        BayesMPT(GaussianMixture(1, covariance_prior=None), penalty=True).fit(
            np.random.default_rng(0).normal(size=(20, 3))
        )


@pytest.mark.slow
def test_any_program_may_offer_a_prior():
    """Rows that are independent: theta the log variance of N(0, exp theta), with a closed gradient; one by one."""

    class Scale:
        def __call__(self, x):
            v = pyro.param("v", torch.ones((), dtype=torch.float64), constraints.positive)
            with pyro.plate("rows", len(x)):
                pyro.sample("x", dist.Normal(x.new_zeros(1), v.sqrt()).expand(x.shape).to_event(1), obs=x)

        def hyperprior(self, x):
            return {"v": (torch.tensor(0.5), torch.tensor(0.8))}

    x = 2 * np.random.default_rng(0).normal(size=(15, 1))
    grid = np.linspace(-6, 7, 4001)
    density = norm(0, np.exp(grid[:, None] / 2)).logpdf(x[:, 0]).sum(1) + norm(0.5, 0.8).logpdf(grid)
    truth = logsumexp(density) + math.log(grid[1] - grid[0])
    model = BayesMPT(Scale()).fit(x)
    close(model.integrated(x), truth, 0.1)
    held = BayesMPT(Scale(), penalty=True).fit(x)
    assert math.log(held.params_["v"]) == pytest.approx(grid[np.argmax(density)], abs=5e-3)


@pytest.mark.filterwarnings("ignore:the estimate of parameter")
def test_restarts_draw_from_the_prior(monkeypatch):
    """From a length-scale of nothing no slope leads away: all is noise. Draws from the prior find the wave."""
    centre = gaussian_process._centre

    def start(name, raw, owner, module, x, y):
        first = centre(name, raw.detach(), owner, x, y, torch.ones(()))[0]
        return 1e-6 * first if name == "lengthscale" else first

    monkeypatch.setattr(gaussian_process, "_first", start)
    rng = np.random.default_rng(0)
    x = np.sort(rng.uniform(0, 2, size=(30, 1)), axis=0)
    y = np.sin(2 * math.pi * x[:, 0]) + 0.2 * rng.normal(size=30)
    one, more = (
        BayesMPT(GaussianProcess(ScaleKernel(RBFKernel())), n_init=n, random_state=0).fit(x, y)
        for n in (1, 3)
    )
    assert more.log_marginal_likelihood_ > one.log_marginal_likelihood_ + 5


def test_estimates_that_run_away_are_named():
    x = np.linspace(0, 3, 20)[:, None]  # a curve without noise
    kernel = ScaleKernel(MaternKernel(nu=2.5))
    with pytest.warns(ConvergenceWarning) as said:
        BayesMPT(GaussianProcess(kernel)).fit(x, np.sin(x[:, 0]))
    assert any("'noise' diverged to [" in str(w.message) for w in said)
    BayesMPT(GaussianProcess(kernel), penalty=True).fit(x, np.sin(x[:, 0]))  # a warning would fail


# -------------------------------------------------------------------------------------------- search and comparison


@pytest.fixture(scope="module")
def line():
    rng = np.random.default_rng(3)
    x = rng.uniform(size=(50, 1))
    return x, 2 * x[:, 0] + 0.5 * rng.normal(size=50)


GRID = {"model": [GaussianProcess(LinearKernel()), GaussianProcess(ScaleKernel(MaternKernel(nu=0.5)))]}


@pytest.mark.slow
def test_search(line):
    x, y = line
    search = MarginalLikelihoodSearch(BayesMPT(), GRID).fit(x, y)
    assert search.evidence_ == "integrated" and "prior" in search.evidence_reason_
    table = search.comparison_
    assert isinstance(search.best_params_["model"].kernel, LinearKernel)
    assert table["weight"].sum() == pytest.approx(1)
    assert (table["se"] > 0).all() and table["mc_dse"].iloc[0] == 0
    assert table["mc_dse"].iloc[1] == pytest.approx(math.hypot(*table["se"]))
    assert table["dse"].isna().all()
    assert (table["diag"] == "integrated").all()
    assert table["log_bayes_factor"].iloc[1] == table["lml_diff"].iloc[1] < 0
    best = search.best_estimator_
    found = best.integrated(x, y)
    assert table["lml"].iloc[0] == pytest.approx(
        found.log_evidence, abs=3 * math.hypot(found.se, table["se"].iloc[0])
    )
    # the best candidate predicts at the maximum a posteriori, and says so
    assert np.log(best.params_["noise"]) == pytest.approx(
        found.modes[0].theta[found.names.index("noise")], abs=1e-3
    )
    assert "at their maximum a posteriori" in best.explain()
    held = BayesMPT(GaussianProcess(LinearKernel()), penalty=True).fit(x, y)
    assert best.predict(x) == pytest.approx(held.predict(x), abs=5e-3)
    assert best.log_marginal_likelihood_ == pytest.approx(held.log_marginal_likelihood_, abs=1e-2)


@pytest.mark.slow
def test_compare_agrees_with_search_and_leaves_models_alone(line):
    x, y = line
    fitted = {str(i): BayesMPT(model).fit(x, y) for i, model in enumerate(GRID["model"])}
    before = [m.log_marginal_likelihood_ for m in fitted.values()]
    table = compare(fitted, x, y)
    assert list(table.index) == ["0", "1"] and (table["diag"] == "integrated").all()
    assert [m.log_marginal_likelihood_ for m in fitted.values()] == before
    assert not any(m.at_map_ for m in fitted.values())
    train = compare(fitted, x, y, evidence="train")
    assert train["lml"].max() == max(before) and train["dse"].isna().all() and train["weight"].isna().all()


def no_prior(x, y):
    length = pyro.param("length", torch.tensor(0.5, dtype=torch.float64), constraints.positive)
    noise = pyro.param("noise", torch.tensor(0.1, dtype=torch.float64), constraints.positive)
    cov = torch.exp(-torch.cdist(x, x) / length) + noise * torch.eye(len(x), dtype=x.dtype)
    pyro.sample("y", dist.MultivariateNormal(x.new_zeros(len(x)), cov), obs=y)


@pytest.mark.slow
def test_programs_without_a_prior_are_held_out(line):
    x, y = line
    search = MarginalLikelihoodSearch(
        BayesMPT(), {"model": [no_prior, GRID["model"][0]]}, random_state=0
    ).fit(x, y)
    assert search.evidence_ == "heldout" and "cannot be integrated" in search.evidence_reason_
    total = 0.0  # each hidden y alone given the visible rows
    for k in range(2):
        assert np.isfinite(search.cv_results_["lml"][k])
    from sklearn.model_selection import KFold
    from sklearn.utils import check_random_state

    seed = int(check_random_state(0).randint(2**31 - 1))
    for train, test in KFold(5, shuffle=True, random_state=seed).split(x):
        m = BayesMPT(no_prior).fit(x[train], y[train])
        mean, sd = m.predict(x[test], return_std=True)
        total += norm(mean, sd).logpdf(y[test]).sum()
    assert search.cv_results_["lml"][0] == pytest.approx(total, abs=1e-3)
    with pytest.raises(ValueError, match="all 2 candidates failed|needs a model that offers hyperprior"):
        MarginalLikelihoodSearch(
            BayesMPT(), {"model": [no_prior]}, evidence="integrated", error_score="raise"
        ).fit(x, y)


@pytest.mark.slow
def test_rules_that_need_independent_rows_are_refused(line):
    x, y = line
    with pytest.raises(ValueError, match="'cumulative' needs independent rows"):
        MarginalLikelihoodSearch(BayesMPT(), GRID, evidence="cumulative").fit(x, y)
    with pytest.raises(
        ValueError, match="'heldout' needs independent rows, or observations that are one Gaussian"
    ):
        MarginalLikelihoodSearch(BayesMPT(), {"model": [BayesianRegression()]}, evidence="heldout").fit(x, y)
