"""Ready programs, run by Pyro alone, against scikit-learn, scipy, quadrature and enumeration."""

import math
import warnings

import mpmath
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from scipy import integrate, stats
from scipy.special import gammaln, logsumexp
from sklearn import mixture
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris, load_wine
from sklearn.exceptions import ConvergenceWarning
from tables import tensor
from truths import mixture_log_terms, responsibilities

from bayes_mpt import BayesMPT
from bayes_mpt.models import (
    BayesianRegression,
    GaussianMixture,
    LatentClass,
    MixtureOfFactorAnalyzers,
    mixture_em,
    mixture_steps,
)
from bayes_mpt.training import Ascent

pytestmark = pytest.mark.usefixtures("own_store")

SEED = 1991
UNIT = dist.constraints.unit_interval
KINDS = ["full", "tied", "diag", "spherical"]
IRIS, WINE = load_iris().data, load_wine().data
MIXTURES = [*(GaussianMixture(3, kind) for kind in KINDS), MixtureOfFactorAnalyzers(3, 2)]
ALL = [*MIXTURES, BayesianRegression(2.0, 3.0, 0.5, fit_intercept=False), LatentClass(3, 4)]


def set_params(**values):
    """Start a program here and not where it would."""
    for name, (value, constraint) in values.items():
        pyro.param(name, tensor(value), constraint)


def params():
    return {name: value.detach().numpy().copy() for name, value in pyro.get_param_store().items()}


def enumerated(program, x, latent, **conditioned):
    """Log densities (K, ..., N) of the trace, every value of the discrete latent in turn, left in front."""
    program = poutine.condition(program, {name: tensor(value) for name, value in conditioned.items()})
    program = poutine.enum(config_enumerate(program), first_available_dim=-3)
    trace = poutine.trace(program).get_trace(tensor(x))
    trace.compute_log_prob()
    total = sum(node["log_prob"] for node in trace.nodes.values() if node["type"] == "sample")
    size = trace.nodes[latent]["value"].shape[0]
    return total.detach().numpy().reshape(size, -1, len(x))


def score_samples(program, x, latent="component", **conditioned):
    return logsumexp(enumerated(program, x, latent, **conditioned), 0)[0]


def elbo(program, x):
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    return -loss.loss(config_enumerate(program), lambda x: None, tensor(x))


# ---------------------------------------------------------------------------------------- Gaussian mixtures


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_components", [1, 2, 5])
def test_gaussian_mixture_is_that_of_sklearn(kind, n_components):
    truth = mixture.GaussianMixture(n_components, covariance_type=kind, random_state=0).fit(IRIS)
    set_mixture(truth)
    program = GaussianMixture(n_components, kind)
    np.testing.assert_allclose(score_samples(program, IRIS), truth.score_samples(IRIS), atol=1e-8, rtol=0)
    assert elbo(program, IRIS) == pytest.approx(truth.score_samples(IRIS).sum(), abs=1e-8 * len(IRIS))


def set_mixture(truth):
    constraints = dist.constraints
    set_params(weights=(truth.weights_, constraints.simplex), loc=(truth.means_, constraints.real))
    if truth.covariance_type in ("full", "tied"):
        set_params(scale_tril=(np.linalg.cholesky(truth.covariances_), constraints.lower_cholesky))
    else:
        sd = np.sqrt(truth.covariances_)
        set_params(scale=(sd if sd.ndim == 2 else sd[:, None], constraints.positive))


def precisions_of(kind, p):
    """As scikit-learn takes them."""
    if kind in ("full", "tied"):
        return np.linalg.inv(p["scale_tril"] @ np.swapaxes(p["scale_tril"], -1, -2))
    return p["scale"] ** -2 if kind == "diag" else p["scale"][:, 0] ** -2


@pytest.mark.filterwarnings(
    "ignore::sklearn.exceptions.ConvergenceWarning"
)  # of one step, which is the point
@pytest.mark.parametrize("kind", KINDS)
def test_start_is_where_em_ends(kind):
    """One more step of EM from the start changes next to nothing, and the start is as good as EM's end."""
    program = GaussianMixture(3, kind, covariance_prior=None)
    program(tensor(IRIS))
    got = params()
    program_score = elbo(program, IRIS) / len(IRIS)
    precisions = precisions_of(kind, got)
    again = mixture.GaussianMixture(
        3,
        covariance_type=kind,
        weights_init=got["weights"] / got["weights"].sum(),
        means_init=got["loc"],
        precisions_init=precisions,
        max_iter=1,
    ).fit(IRIS)
    assert again.score(IRIS) == pytest.approx(program_score, abs=2e-3)
    reference = mixture.GaussianMixture(3, covariance_type=kind, n_init=3, random_state=0).fit(IRIS)
    assert program_score > reference.score(IRIS) - 0.05


@pytest.mark.parametrize("program", MIXTURES, ids=repr)
def test_one_em_for_all_parameters_of_the_first_run(program, monkeypatch):
    runs = []
    em = mixture_em.run_em
    monkeypatch.setattr(
        mixture_em, "run_em", lambda table, *a, **k: runs.append(len(table.rows)) or em(table, *a, **k)
    )
    program(tensor(IRIS))
    first = params()
    program(tensor(WINE[:7, :4]))
    assert runs == [len(IRIS)], "the second run reads the parameters"
    for name, value in params().items():
        np.testing.assert_array_equal(value, first[name])


@pytest.mark.parametrize("program", [*MIXTURES, LatentClass(3)], ids=repr)
def test_start_follows_the_seed_of_torch(program):
    x = tensor(IRIS).round()
    starts = []
    for seed in (0, 0, 1):
        pyro.clear_param_store()
        torch.manual_seed(seed)
        program(x)
        starts.append(params())
    assert all(np.array_equal(starts[0][name], starts[1][name]) for name in starts[0])
    if isinstance(program, LatentClass):
        assert not np.array_equal(starts[0]["probs"], starts[2]["probs"])


@pytest.mark.parametrize("program", MIXTURES, ids=repr)
def test_start_does_not_depend_on_units(program):
    unit = np.full(4, 1e-3) if "spherical" in repr(program) else np.array([1e-8, 1.0, 1e3, 1e8])
    scores = []
    for x in (IRIS, IRIS * unit):
        pyro.clear_param_store()
        torch.manual_seed(SEED)
        program(tensor(x))
        z = {"z": np.zeros((len(x), 2))} if "Factor" in repr(program) else {}
        scores.append(score_samples(program, x, **z))
    np.testing.assert_allclose(scores[1] + np.log(unit).sum(), scores[0], atol=1e-5, rtol=0)


AWKWARD = {
    "iris": IRIS,
    "wine": WINE,
    "tiny": 1e-8 * IRIS,
    "huge": 1e8 * WINE,
    "mixed": IRIS * np.array([1e-8, 1.0, 1.0, 1e8]),
    "far": IRIS + 1e6,
    "constant column": np.column_stack([IRIS, np.full(150, 0.1), np.zeros(150)]),
    "all constant": np.full((9, 3), 0.1),
    "twin columns": IRIS[:, [0, 1, 0, 1]],
    "one row": IRIS[:1],
    "fewer rows than components": IRIS[:2],
    "two distinct rows": IRIS[[0, 0, 0, 0, 100, 100]],
    "one column": IRIS[:, :1],
    "wide": np.random.default_rng(SEED).normal(size=(6, 30)),
}


@pytest.mark.parametrize("x", AWKWARD.values(), ids=AWKWARD)
@pytest.mark.parametrize("program", [*MIXTURES, MixtureOfFactorAnalyzers(3, 6)], ids=repr)
def test_start_is_finite(program, x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program(tensor(x))
    values = params()
    assert all(np.isfinite(value).all() for value in values.values())
    assert (values["weights"] > 0).all()
    # the parameters are optimised unconstrained, and the likelihood has gradients there
    assert all(bool(torch.isfinite(p.unconstrained()).all()) for p in pyro.get_param_store().values())
    factors = isinstance(program, MixtureOfFactorAnalyzers)
    z = {"z": torch.zeros(len(x), program.n_factors, dtype=torch.float64)} if factors else {}
    guide = lambda x: None  # noqa: E731
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss
    value = loss(config_enumerate(poutine.condition(program, z)), guide, tensor(x))
    leaves = [p.unconstrained() for p in pyro.get_param_store().values() if p.numel()]
    assert all(bool(torch.isfinite(g).all()) for g in torch.autograd.grad(value, leaves))


def test_unit_of_a_constant_column_is_not_rounding_noise():
    """The mean of 0.1, repeated, is not 0.1, so neither is a computed deviation zero."""
    x = np.full((1000, 3), 0.1)
    assert 0 < x.std(0)[0] < 1e-12
    GaussianMixture(1, "diag")(tensor(x))
    np.testing.assert_allclose(params()["scale"], 1e-3)  # the square root of what EM adds to each variance


@pytest.mark.parametrize("program", MIXTURES, ids=repr)
def test_other_types_start_alike(program):
    x = tensor(IRIS)
    program(x)
    want = params()
    pyro.clear_param_store()
    torch.manual_seed(SEED)
    program(x.float())
    for name, value in params().items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, want[name], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_components_of_several_draws(kind):
    """A component of shape (S, N), under a plate of draws, gives what each of its rows gives alone."""
    program = GaussianMixture(3, kind)
    program(tensor(IRIS))
    component = torch.randint(3, (5, len(IRIS)))

    def several(x):
        with pyro.plate("draws", 5, dim=-2):
            program(x)

    def log_probs(model, values):
        trace = poutine.trace(poutine.condition(model, {"component": values})).get_trace(tensor(IRIS))
        trace.compute_log_prob()
        return (trace.nodes["x"]["log_prob"] + trace.nodes["component"]["log_prob"]).detach().numpy()

    want = np.stack([log_probs(program, c) for c in component])
    np.testing.assert_allclose(log_probs(several, component), want, rtol=1e-12)


# ----------------------------------------------------------------------------- mixtures of factor analysers


@pytest.mark.parametrize("n_factors", [0, 1, 2])
def test_factor_analyzers_integrate_to_gaussians(n_factors):
    """The program summed over a dense grid of z is, in each component, N(loc, W W' + diag(psi)) of scipy."""
    x = IRIS[::30]
    program = MixtureOfFactorAnalyzers(3, n_factors)
    rng = np.random.default_rng(SEED)
    k, t = 3, x.shape[1]
    weights, loc = rng.dirichlet(np.ones(k)), x[:k] + rng.normal(size=(k, t))
    loading, noise = rng.normal(size=(k, t, n_factors)), rng.uniform(0.3, 2.0, (k, t))
    constraints = dist.constraints
    set_params(
        weights=(weights, constraints.simplex),
        loc=(loc, constraints.real),
        loading=(loading, constraints.real),
        noise_variance=(noise, constraints.positive),
    )
    axis, step = np.linspace(-9, 9, 181, retstep=True)  # the trapezoid rule is exact to rounding here
    grid = np.stack(np.meshgrid(*[axis] * n_factors), -1) if n_factors else np.zeros((1, 0))
    z = grid.reshape(len(axis) ** n_factors, 1, n_factors)  # (G, 1, F)
    got = logsumexp(enumerated(program, x, "component", z=z), 1) + n_factors * np.log(step)  # (K, N)
    cov = loading @ np.swapaxes(loading, 1, 2) + noise[:, None] * np.eye(t)
    want = mixture_log_terms(x, weights, loc, cov)
    np.testing.assert_allclose(got, want, atol=1e-8, rtol=0)


def test_factor_analyzers_start_near_the_clusters():
    """Marginal covariances at the start keep the leading directions of well separated clusters."""
    rng = np.random.default_rng(SEED)
    direction = np.array([[1.0, 1.0, 1.0, 0.0], [0.0, 1.0, -1.0, 1.0]])
    centre = np.array([[0.0, 0.0, 0.0, 0.0], [30.0, 30.0, 0.0, 30.0]])
    x = np.concatenate(
        [
            m + 2 * rng.normal(size=(400, 1)) * d + 0.5 * rng.normal(size=(400, 4))
            for m, d in zip(centre, direction, strict=True)
        ]
    )
    MixtureOfFactorAnalyzers(2, 1)(tensor(x))
    got = params()
    order = np.argsort(got["loc"][:, 0])
    np.testing.assert_allclose(got["loc"][order], centre, atol=0.5)
    np.testing.assert_allclose(got["weights"], 0.5, atol=0.01)
    np.testing.assert_allclose(np.abs(got["loading"][order, :, 0]), 2 * np.abs(direction), atol=0.3)


def test_factors_beyond_the_tokens_are_no_saddle():
    MixtureOfFactorAnalyzers(2, 6)(tensor(IRIS))
    assert (np.square(params()["loading"]).sum(1) > 0).all()


# ----------------------------------------------------------------------------------------------- regression


def regression_data(n, p, seed=SEED):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p))
    return x, x @ rng.normal(size=p) + 0.7 + 0.5 * rng.normal(size=n)


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize(("n", "p"), [(1, 1), (30, 3), (5, 5), (6, 5), (4, 20)])
def test_log_evidence_is_multivariate_t(n, p, fit_intercept):
    x, y = regression_data(n, p)
    s, a, b = 1.7, 2.5, 0.6
    got = BayesianRegression(s, a, b, fit_intercept).log_evidence(x, y)
    design = np.column_stack([x, np.ones(n)]) if fit_intercept else x
    shape = b / a * (np.eye(n) + s**2 * design @ design.T)
    assert got == pytest.approx(stats.multivariate_t(np.zeros(n), shape, 2 * a).logpdf(y), abs=1e-10)


@pytest.mark.parametrize("n", [1, 8, 60])
def test_log_evidence_is_the_integral_over_the_noise(n):
    """Given the noise variance, y is Gaussian; the rest is quadrature."""
    x, y = regression_data(n, 3)
    s, a, b = 0.8, 1.0, 2.0
    got = BayesianRegression(s, a, b, fit_intercept=False).log_evidence(x, y)
    cov = np.eye(n) + s**2 * x @ x.T

    def density(log_v):
        v = np.exp(log_v)
        log_p = stats.multivariate_normal(np.zeros(n), v * cov).logpdf(y)
        return np.exp(log_p + stats.invgamma(a, scale=b).logpdf(v) + log_v - got)

    value, _ = integrate.quad(density, -8, 12, epsabs=1e-11, epsrel=1e-11, points=[-2, 0, 2], limit=200)
    assert value == pytest.approx(1.0, abs=1e-7)


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_regression_program_integrates_to_the_evidence(fit_intercept):
    """The program itself on a dense grid: S noise variances and weights at once, as (S, 1) and (S, 1, P)."""
    x, y = regression_data(12, 1 if fit_intercept else 2)
    model = BayesianRegression(1.3, 2.0, 0.7, fit_intercept)
    design = np.column_stack([x, np.ones(12)]) if fit_intercept else x
    # axes along the posterior: w = mean + sd L t, v = sd^2
    precision = design.T @ design + np.eye(2) / 1.3**2
    mean, root = np.linalg.solve(precision, design.T @ y), np.linalg.inv(np.linalg.cholesky(precision)).T
    log_v, dv = np.linspace(-6, 6, 121, retstep=True)
    u, du = np.linspace(-8, 8, 41, retstep=True)
    log_v, u1, u2 = (g.ravel() for g in np.meshgrid(log_v, u, u, indexing="ij"))
    v = np.exp(log_v)
    w = mean + np.sqrt(v)[:, None] * (np.stack([u1, u2], -1) @ root.T)
    log_volume = np.log(dv * du**2) + 2 * log_v + np.linalg.slogdet(root)[1]  # dw dv = |L| v du v dlog v

    values = {"noise_variance": tensor(v[:, None]), "weights": tensor(w[:, None])}
    trace = poutine.trace(poutine.condition(model, values)).get_trace(tensor(x), tensor(y))
    trace.compute_log_prob()
    nodes = trace.nodes
    assert nodes["y"]["log_prob"].shape == (len(v), 12)
    assert nodes["weights"]["log_prob"].shape == nodes["noise_variance"]["log_prob"].shape == (len(v), 1)
    log_joint = (
        nodes["y"]["log_prob"].sum(-1)
        + nodes["weights"]["log_prob"][:, 0]
        + nodes["noise_variance"]["log_prob"][:, 0]
    )
    assert logsumexp(log_joint.numpy() + log_volume) == pytest.approx(model.log_evidence(x, y), abs=1e-6)


def test_regression_program_is_the_one_written_down():
    x, y = regression_data(9, 4)
    v, w = 0.37, np.random.default_rng(1).normal(size=5)
    model = poutine.condition(
        BayesianRegression(2.0, 3.0, 0.4), {"noise_variance": tensor(v), "weights": tensor(w)}
    )
    trace = poutine.trace(model).get_trace(tensor(x), tensor(y))
    want = (
        stats.invgamma(3.0, scale=0.4).logpdf(v)
        + stats.norm(0, 2.0 * math.sqrt(v)).logpdf(w).sum()
        + stats.norm(x @ w[:-1] + w[-1], math.sqrt(v)).logpdf(y).sum()
    )
    assert float(trace.log_prob_sum()) == pytest.approx(want, rel=1e-12)
    assert not pyro.get_param_store().keys()


def test_log_evidence_of_many_rows():
    """The product of the predictive t densities, row by row, over 10000 rows."""
    x, y = regression_data(10_000, 3)
    s, a, b = 3.0, 1.5, 0.2
    cov, mean, total = s**2 * np.eye(3), np.zeros(3), 0.0
    shape, rate = a, b
    for row, target in zip(x, y, strict=True):
        gain = cov @ row
        spread = 1 + row @ gain
        error = target - row @ mean
        ratio = error**2 / (2 * rate * spread)
        total += gammaln(shape + 0.5) - gammaln(shape) - 0.5 * np.log(2 * np.pi * rate * spread)
        total -= (shape + 0.5) * np.log1p(ratio)
        mean, cov = mean + gain * error / spread, cov - np.outer(gain, gain) / spread
        shape, rate = shape + 0.5, rate + error**2 / (2 * spread)
    got = BayesianRegression(s, a, b, fit_intercept=False).log_evidence(x, y)
    assert got == pytest.approx(total, rel=1e-11)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_log_evidence_in_sixty_digits(scale):
    """Columns of very different units, two of them nearly equal."""
    x, y = regression_data(40, 3)
    x = np.column_stack([x, x[:, 0] + 1e-6 * x[:, 1]]) * np.array([scale, 1.0, 1 / scale, scale])
    s, a, b = 1.0, 1e3, 1e-3
    with mpmath.workdps(60):
        design, target = mpmath.matrix(x.tolist()), mpmath.matrix(y.tolist())
        cov = mpmath.eye(40) + mpmath.mpf(s) ** 2 * design * design.T
        root = mpmath.cholesky(cov)
        log_det = 2 * mpmath.fsum(mpmath.log(root[i, i]) for i in range(40))
        q = (target.T * mpmath.cholesky_solve(cov, target))[0]
        a_, b_, half = mpmath.mpf(a), mpmath.mpf(b), mpmath.mpf(20)
        want = mpmath.loggamma(a_ + half) - mpmath.loggamma(a_) - half * mpmath.log(2 * mpmath.pi * b_)
        want = float(want - log_det / 2 - (a_ + half) * mpmath.log1p(q / (2 * b_)))
    assert BayesianRegression(s, a, b, False).log_evidence(x, y) == pytest.approx(want, rel=1e-8)


def test_log_evidence_takes_a_table():
    data = load_diabetes(as_frame=True)
    model = BayesianRegression()
    assert model.log_evidence(data.data, data.target) == model.log_evidence(
        data.data.to_numpy(), data.target.to_numpy()
    )


# --------------------------------------------------------------------------------------------- latent class


def codes(n=60, t=4, n_levels=3):
    rng = np.random.default_rng(SEED)
    probs = rng.dirichlet(np.full(n_levels, 0.5), size=(2, t))
    group = rng.integers(2, size=n)
    return np.array([[rng.choice(n_levels, p=probs[g, j]) for j in range(t)] for g in group], dtype=float)


@pytest.mark.parametrize("n_classes", [1, 2, 4])
def test_latent_class_by_enumeration(n_classes):
    x = codes()
    program = LatentClass(n_classes, 3)
    got = score_samples(program, x, "class")
    at = params()
    for row, value in zip(x.astype(int), got, strict=True):
        terms = (
            at["weights"][c] * math.prod(at["probs"][c, t, level] for t, level in enumerate(row))
            for c in range(n_classes)
        )
        assert value == pytest.approx(math.log(math.fsum(terms)), abs=1e-12)
    assert elbo(program, x) == pytest.approx(got.sum(), abs=1e-9)


def test_latent_class_densities_sum_to_one():
    program = LatentClass(2)
    program(tensor(codes(t=3)))
    cells = np.stack(np.meshgrid(*[np.arange(3.0)] * 3), -1).reshape(-1, 3)
    assert np.exp(score_samples(program, cells, "class")).sum() == pytest.approx(1.0, abs=1e-12)


def test_levels_are_those_of_the_first_run():
    program = LatentClass(2)
    program(tensor(codes(n_levels=5)))
    n_levels = int(codes(n_levels=5).max()) + 1
    assert params()["probs"].shape == (2, 4, n_levels)
    program(tensor(np.zeros((3, 4))))
    assert params()["probs"].shape == (2, 4, n_levels)
    with pytest.raises(ValueError, match=f"holds code 9, but parameter 'probs' has {n_levels} levels.*10"):
        program(tensor(np.full((3, 4), 9.0)))
    assert program.get_params() == {"n_classes": 2, "n_levels": "auto"}


@pytest.mark.parametrize(
    "x",
    [codes(), np.zeros((5, 2)), codes()[:1], np.repeat(codes(), 50, 0), np.where(codes() > 1, 7.0, 0.0)],
    ids=["codes", "constant", "one row", "many rows", "absent levels"],
)
def test_latent_class_start(x):
    LatentClass(3)(tensor(x))
    probs = params()["probs"]
    assert np.isfinite(probs).all() and (probs > 0).all()
    np.testing.assert_allclose(probs.sum(-1), 1.0, rtol=1e-12)
    assert np.isfinite(elbo(LatentClass(3), x))
    if len(x) > 1 and np.ptp(x):
        assert np.abs(probs[0] - probs[1]).max() > 0.05, "classes that start equal stay equal"


def test_mean_of_a_column_in_a_missing_cell_starts_as_the_nearest_code():
    x, starts = codes(), []
    for value in (2.0, 1.6):
        pyro.clear_param_store()
        torch.manual_seed(SEED)
        x[0, 0] = value
        LatentClass(2)(tensor(x))
        starts.append(params()["probs"])
    np.testing.assert_array_equal(*starts)


# ------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    "program", [GaussianMixture(2, "diag"), LatentClass(2)], ids=["GaussianMixture", "LatentClass"]
)
def test_svi_trains_them(program):
    # far from where EM ends; the others start there
    if isinstance(program, GaussianMixture):
        x = IRIS
        set_params(loc=(IRIS[:2], dist.constraints.real))
    else:
        x = codes()
        probs = np.random.default_rng(SEED).dirichlet(np.ones(3), size=(2, 4))
        set_params(probs=(probs, dist.constraints.simplex))
    svi = SVI(
        config_enumerate(program),
        lambda x: None,
        pyro.optim.Adam({"lr": 0.02}),
        TraceEnum_ELBO(max_plate_nesting=1),
    )
    losses = [svi.step(tensor(x)) for _ in range(100)]
    assert losses[-1] < losses[0] - 1


# ------------------------------------------------------------------------------------ arguments, estimators


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (GaussianMixture(0), "n_components must be an integer of at least 1, got 0"),
        (GaussianMixture(2.0), "n_components .* got 2.0"),
        (GaussianMixture(True), "n_components .* got True"),
        (GaussianMixture("auto"), "n_components .* got 'auto'"),
        (GaussianMixture(2, "VVV"), "covariance_type must be one of full, tied, diag, spherical, got 'VVV'"),
        (MixtureOfFactorAnalyzers(-1), "n_components must be an integer of at least 1, got -1"),
        (MixtureOfFactorAnalyzers(2, -1), "n_factors must be an integer of at least 0, got -1"),
        (MixtureOfFactorAnalyzers(2, 1.5), "n_factors .* got 1.5"),
        (LatentClass(0), "n_classes must be an integer of at least 1, got 0"),
        (LatentClass(2, 0), 'n_levels must be an integer of at least 1 or "auto", got 0'),
        (LatentClass(2, "many"), "n_levels .* got 'many'"),
        (LatentClass(2, None), "n_levels .* got None"),
        (LatentClass(2, 2), "holds code 8, but parameter 'probs' has 2 levels"),
    ],
    ids=repr,
)
def test_bad_arguments(program, message):
    with pytest.raises(ValueError, match=message):
        program(tensor(IRIS).round())


def test_negative_codes():
    with pytest.raises(ValueError, match="x must hold codes 0, 1, 2, ..., got -1"):
        LatentClass(2)(tensor(codes() - 1))


def test_codes_that_are_no_integers():
    with pytest.raises(ValueError, match="support"):
        elbo(LatentClass(2), IRIS)


@pytest.mark.parametrize("name", ["prior_scale", "noise_shape", "noise_rate"])
@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, "1", None, True], ids=repr)
def test_bad_prior(name, value):
    model = BayesianRegression(**{name: value})
    x, y = regression_data(5, 2)
    with pytest.raises(ValueError, match=f"{name} must be a positive number, got"):
        model(tensor(x), tensor(y))
    with pytest.raises(ValueError, match=f"{name} must be a positive number, got"):
        model.log_evidence(x, y)


def test_bad_targets():
    x, y = regression_data(5, 2)
    with pytest.raises(ValueError, match=r"y must have shape \(5,\), .* got \(5, 1\)"):
        BayesianRegression()(tensor(x), tensor(y[:, None]))
    with pytest.raises(ValueError, match="inconsistent"):
        BayesianRegression().log_evidence(x, y[:4])
    with pytest.raises(ValueError, match="NaN"):
        BayesianRegression().log_evidence(x, np.where(y == y[0], np.nan, y))


@pytest.mark.parametrize("program", ALL, ids=repr)
def test_clone(program):
    copy = clone(program)
    assert copy is not program and copy.get_params() == program.get_params()
    assert vars(copy) == vars(program)
    name = next(iter(program.get_params()))
    assert copy.set_params(**{name: 7}).get_params()[name] == 7


def test_start_is_fitted_to_all_rows_of_a_long_table() -> None:
    """More rows than it takes to find out what a program is: EM must see them all, in whatever order they stand."""
    rng = np.random.default_rng(3)
    x = np.concatenate([rng.normal(size=(4100, 2)), rng.normal([30.0, 0.0], size=(900, 2))])
    theirs = mixture.GaussianMixture(2, tol=1e-10, max_iter=1000, random_state=0).fit(x)
    ours = BayesMPT(GaussianMixture(2, covariance_prior=None), training=Ascent(max_iter=1), random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        ours.fit(x)
    assert ours.log_marginal_likelihood_ / len(x) == pytest.approx(theirs.score(x), abs=1e-5)


def test_scoring_does_not_look_for_initial_values_again() -> None:
    """A start may be an EM, which is no business of whoever asks for a score."""
    n_starts = 0

    def two_groups(x):
        def start():
            nonlocal n_starts
            n_starts += 1
            return torch.stack([x.mean(0) - x.std(0), x.mean(0) + x.std(0)])

        loc = pyro.param("loc", start)
        scale = pyro.param("scale", lambda: x.std(0), dist.constraints.positive)
        with pyro.plate("rows", len(x)):
            c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.5))).long()
            pyro.sample("x", dist.Normal(loc[c], scale).to_event(1), obs=x)

    x = np.random.default_rng(1).normal(size=(60, 2)) + 4.0 * (np.arange(60) % 2)[:, None]
    fitted = BayesMPT(two_groups, random_state=0).fit(x)
    assert n_starts == 1
    loc, scale = fitted.params_["loc"], fitted.params_["scale"]
    truth = logsumexp([stats.norm(m, scale).logpdf(x[:7]).sum(1) for m in loc], axis=0) - math.log(2)
    np.testing.assert_allclose(fitted.score_samples(x[:7]), truth, rtol=0, atol=1e-12)
    assert n_starts == 1


# ------------------------------------------------------------------------------------------- EM of their own


def peers_em(kind, x, p, max_iter):
    """Where so many steps of scikit-learn's EM lead from parameters, nothing added to variances."""
    truth = mixture.GaussianMixture(
        len(p["loc"]),
        covariance_type=kind,
        tol=0,
        max_iter=max_iter,
        reg_covar=0,
        weights_init=p["weights"] / p["weights"].sum(),
        means_init=p["loc"],
        precisions_init=precisions_of(kind, p),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return truth.fit(x)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_fit_ends_at_a_maximum(kind):
    """By the default tolerance EM of another library gains nothing more; by a wide one it may gain about as much."""
    x = WINE[:, [0, 1, 2, 6]]
    model = BayesMPT(GaussianMixture(2, kind, covariance_prior=None), random_state=0).fit(x)
    assert model.converged_
    assert model.score(x) == pytest.approx(peers_em(kind, x, model.params_, max_iter=2000).score(x), abs=1e-6)
    loose = BayesMPT(
        GaussianMixture(2, kind, covariance_prior=None), training=Ascent(tol=1e-3), random_state=0
    ).fit(x)
    assert loose.converged_ and loose.fit_method_.startswith("maximize")
    assert loose.score(x) > model.score(x) - 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_products", [2**22, 100], ids=["at once", "by chunks"])
def test_maximize_is_em(kind, max_products, monkeypatch):
    """One step is one step of scikit-learn's."""
    monkeypatch.setattr(mixture_steps, "MAX_PRODUCTS", max_products)
    program = GaussianMixture(3, kind, covariance_prior=None)
    program(tensor(IRIS))
    start = {name: p.detach() for name, p in pyro.get_param_store().items()}
    got = program.maximize(tensor(IRIS), start, tol=0.0, max_iter=1)
    p = params()
    want = peers_em(kind, IRIS, p, max_iter=1)
    np.testing.assert_allclose(got["weights"], want.weights_, rtol=1e-10)
    np.testing.assert_allclose(got["loc"], want.means_, rtol=1e-10)
    if kind in ("full", "tied"):
        np.testing.assert_allclose(
            got["scale_tril"] @ got["scale_tril"].mT, want.covariances_, rtol=1e-8, atol=1e-12
        )
    else:
        np.testing.assert_allclose(
            np.square(got["scale"].numpy()).squeeze(), want.covariances_.squeeze(), rtol=1e-9
        )


def test_a_component_on_repeated_rows_begins_again():
    rng = np.random.default_rng(2)
    x = tensor(np.concatenate([rng.normal(size=(60, 2)), np.full((5, 2), 3.0)]))
    eye = torch.eye(2).double()
    start = {
        "weights": tensor([0.9, 0.1]),
        "loc": tensor([[0.0, 0.0], [3.0, 3.0]]),
        "scale_tril": torch.stack([eye, 0.1 * eye]),
    }
    with pytest.warns(UserWarning, match=r"component 1 \(5 rows\) has collapsed .*fewer components"):
        got = GaussianMixture(2, covariance_prior=None).maximize(x, start, tol=1e-3, max_iter=1)
    np.testing.assert_allclose(got["loc"][1], x.mean(0))
    cov = got["scale_tril"][1] @ got["scale_tril"][1].mT
    np.testing.assert_allclose(cov, np.diag(x.numpy().var(0)), atol=1e-12)
    assert 0 < got["weights"][1] < 1e-5


def test_a_component_that_collapses_again_is_an_error():
    x = np.concatenate([np.random.default_rng(2).normal(size=(60, 2)), np.full((5, 2), 99.0)])
    with pytest.raises(ValueError, match=r"component \d \(5 rows\) has collapsed .*fewer components"):
        BayesMPT(GaussianMixture(2, covariance_prior=None), random_state=0).fit(x)


@pytest.mark.parametrize("prior", ["auto", None])
@pytest.mark.parametrize(
    "x",
    [AWKWARD["constant column"], AWKWARD["twin columns"], AWKWARD["wide"]],
    ids=["constant", "twins", "wide"],
)
def test_rows_without_spread_are_refused(x, prior):
    what = "component .* without spread" if prior is None else "the table has no spread"
    with pytest.raises(ValueError, match=f"{what} .*covariance_type"):
        BayesMPT(GaussianMixture(2, covariance_prior=prior), random_state=0).fit(x)


def test_an_empty_component_stays():
    """No further from the table than that is wide."""
    x = tensor(IRIS)
    far = {
        "weights": torch.tensor([0.5, 0.5]).double(),
        "loc": torch.stack([x.mean(0), x.mean(0) + 1e4]),
        "scale": x.std(0).expand(2, -1),
    }
    got = GaussianMixture(2, "diag", covariance_prior=None).maximize(x, far, tol=1e-12, max_iter=50)
    np.testing.assert_allclose(got["loc"][0], IRIS.mean(0), rtol=1e-5)
    np.testing.assert_allclose(got["loc"][1], 2 * IRIS.max(0) - IRIS.min(0))
    assert 0 < got["weights"][1] < 1e-5


def test_a_model_may_bring_a_way_to_climb_that_is_no_good():
    """It is a start, and no more: what it leaves is climbed to the top."""

    class Wayward(GaussianMixture):
        def maximize(self, x, params, *, tol, max_iter):
            return {**params, "loc": params["loc"] + 0.5}

    x = WINE[:, [0, 1, 2, 6]]
    good = BayesMPT(GaussianMixture(1), random_state=0).fit(x)
    model = BayesMPT(Wayward(1), random_state=0).fit(x)
    assert model.fit_method_ == "lbfgs" and model.converged_
    assert model.log_marginal_likelihood_ == pytest.approx(good.log_marginal_likelihood_, abs=1e-6)


def test_em_takes_missing_cells():
    x = WINE[:, [0, 1, 2, 6]].copy()
    x[::7, 1] = np.nan
    model = BayesMPT(GaussianMixture(2), random_state=0).fit(x)
    p = model.params_
    cov = p["scale_tril"] @ p["scale_tril"].mT
    want = logsumexp(mixture_log_terms(x, p["weights"], p["loc"], cov), 0)
    assert model.fit_method_.startswith("maximize") and model.converged_
    np.testing.assert_allclose(model.score_samples(x), want, atol=1e-8)


def test_scores_of_a_mixture_need_no_program(monkeypatch):
    x = WINE[:, [0, 1, 2, 6]]
    model = BayesMPT(GaussianMixture(2), random_state=0).fit(x)
    want, share, filled = model.score_samples(x[:9]), model.transform(x[:9]), x[:9].copy()
    filled[0, 0] = np.nan
    imputed = model.impute(filled)
    monkeypatch.setattr(GaussianMixture, "__call__", None)
    np.testing.assert_array_equal(model.score_samples(x[:9]), want)
    np.testing.assert_array_equal(model.transform(x[:9]), share)
    np.testing.assert_array_equal(model.impute(filled), imputed)
    p = model.params_
    parts = mixture_log_terms(x[:9], p["weights"], p["loc"], p["scale_tril"] @ p["scale_tril"].mT)
    np.testing.assert_allclose(want, logsumexp(parts, 0), atol=1e-9)
    np.testing.assert_allclose(share, responsibilities(parts), atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [GaussianMixture(2), GaussianMixture(2, "diag"), MixtureOfFactorAnalyzers(2, 1), LatentClass(2, 3)],
    ids=repr,
)
def test_a_fold_is_a_fit_of_its_own(program):
    """What is taken over from the fit to all rows is what the program is, and no number that has seen hidden rows."""
    x = codes() if isinstance(program, LatentClass) else WINE[:, [0, 1, 2, 6]]
    whole = BayesMPT(program, training=Ascent(tol=1e-6), random_state=0).fit(x)
    fold = whole.refit(x[::2])
    alone = BayesMPT(program, training=Ascent(tol=1e-6), random_state=0).fit(x[::2])
    for name, value in alone.params_.items():
        np.testing.assert_array_equal(fold.params_[name], value)
    np.testing.assert_array_equal(fold.score_samples(x), alone.score_samples(x))


def test_a_program_of_discrete_latents_is_found_out_about_once():
    runs = []

    def coins(x):
        runs.append(len(x))
        p = pyro.param("p", lambda: torch.stack([0.2 + 0.5 * x.mean(0), 0.8 - 0.5 * x.mean(0)]), UNIT)
        with pyro.plate("rows", len(x)):
            c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.5)))
            pyro.sample("x", dist.Bernoulli(p[c.long()]).to_event(1), obs=x)

    x = (np.random.default_rng(SEED).random((40, 3)) < 0.4).astype(float)
    whole = BayesMPT(coins, training=Ascent(tol=1e-6), random_state=0).fit(x[:30])
    runs.clear()
    want = BayesMPT(coins, training=Ascent(tol=1e-6), random_state=0).fit(x[:20])
    first = len(runs)
    runs.clear()
    fold = whole.refit(x[:20], random_state=0)
    assert len(runs) < first
    assert set(runs) == {20}
    runs.clear()
    got = fold.score_samples(x[20:])
    assert len(runs) == 1
    np.testing.assert_array_equal(got, want.score_samples(x[20:]))
    p = fold.params_["p"]  # (2, 3)
    terms = [stats.bernoulli(q).logpmf(x[20:]).sum(1) + np.log(0.5) for q in p]
    np.testing.assert_allclose(got, logsumexp(terms, 0), atol=1e-12)
