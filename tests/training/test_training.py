"""Maxima against closed forms, scikit-learn and scipy's optimiser on dense densities; how a training ends."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from sklearn.decomposition import PCA
from sklearn.decomposition import FactorAnalysis as SkFactorAnalysis
from sklearn.exceptions import ConvergenceWarning
from tables import known_factors, tensor, with_holes
from truths import covariance, factor_covariance, log_density, mean_log_density, ppca_maximum

from bayes_mpt import BayesMPT
from bayes_mpt.masks import PermutationChain, UniformSize
from bayes_mpt.models import PPCA, FactorAnalysis
from bayes_mpt.training import Ascent, Steps

DATA = {
    "iris": (load_iris().data, 2),
    "wine": (load_wine().data, 3),
    "breast cancer": (load_breast_cancer().data, 5),
    "digits": (load_digits().data, 10),
}
JITTERED = DATA["digits"][0] + np.random.default_rng(1991).normal(0, 0.5, DATA["digits"][0].shape)
# scikit-learn 1.9.1 after 1500 iterations of EM (-138.6922 after 100), its tol=1e-8 not yet met:
# FactorAnalysis(20, tol=1e-8, max_iter=1500, svd_method="lapack").fit(JITTERED).score(JITTERED)
SKLEARN_DIGITS_20 = -138.63984284614241


@pytest.fixture(params=DATA, ids=lambda name: name.replace(" ", "_"))
def data(request):
    return DATA[request.param]


# ------------------------------------------------------------------------------------- against scikit-learn, as fixed


def pca_program(x, k):
    pca = PCA(k).fit(x)
    loading = pca.components_.T * np.sqrt(np.maximum(pca.explained_variance_ - pca.noise_variance_, 0))
    return pca, known_factors(pca.mean_, loading, np.full(x.shape[1], pca.noise_variance_))


def fa_program(x, k):
    fa = SkFactorAnalysis(k, svd_method="lapack").fit(x)
    return fa, known_factors(fa.mean_, fa.components_.T, fa.noise_variance_)


@pytest.mark.parametrize("make", [pca_program, fa_program])
def test_the_score_of_scikit_learn(make, data):
    x, k = data
    theirs, program = make(x, k)
    ours = BayesMPT(program).fit(x)
    assert ours.score(x) == pytest.approx(theirs.score(x), abs=1e-8)
    assert ours.log_marginal_likelihood_ / len(x) == pytest.approx(theirs.score(x), abs=1e-8)
    np.testing.assert_allclose(ours.score_samples(x), theirs.score_samples(x), rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("make", [pca_program, fa_program])
def test_observed_cells_of_incomplete_rows(make, data):
    x, k = data
    if len(x) > 1000:
        x = x[::6]  # a dense solve a row is the truth, and it is slow
    theirs, program = make(x, k)
    holes = with_holes(x, 0.1)
    ours = BayesMPT(program).fit(holes)
    want = log_density(holes, theirs.mean_, theirs.get_covariance())
    np.testing.assert_allclose(ours.score_samples(holes), want, rtol=0, atol=1e-8)
    assert ours.log_marginal_likelihood_ == pytest.approx(want.sum(), abs=1e-8 * len(x))


# --------------------------------------------------------------------------------------------------- maxima


def test_ppca_reaches_its_closed_form_optimum(data):
    x, k = data
    for n in (1, k):
        model = BayesMPT(PPCA(n)).fit(x)
        best = ppca_maximum(x, n) / len(x)
        assert model.score(x) == pytest.approx(best, abs=1e-6)
        assert model.log_marginal_likelihood_ / len(x) == pytest.approx(best, abs=1e-6)
        np.testing.assert_allclose(model.mean_, x.mean(0), atol=1e-7 * (1 + abs(x).max()))
        value = np.linalg.eigvalsh(covariance(x))[::-1]
        assert model.noise_variance_ == pytest.approx(value[n:].mean(), rel=1e-6)
        signal = np.linalg.svd(model.components_, compute_uv=False) ** 2 + model.noise_variance_
        np.testing.assert_allclose(np.sort(signal)[::-1], value[:n], rtol=1e-6)


def test_ppca_with_no_latents(data):
    x, _ = data
    assert BayesMPT(PPCA(0)).fit(x).score(x) == pytest.approx(ppca_maximum(x, 0) / len(x), abs=1e-9)


def test_reported_scores_are_those_of_the_fitted_parameters(data):
    x, k = data
    model = BayesMPT(PPCA(k)).fit(x)
    cov = factor_covariance(model.components_, model.noise_variance_)
    np.testing.assert_allclose(model.get_covariance(), cov, rtol=1e-12, atol=1e-12 * abs(cov).max())
    np.testing.assert_allclose(
        model.get_precision() @ cov, np.eye(x.shape[1]), atol=1e-13 * np.linalg.cond(cov) + 1e-12
    )
    assert model.log_marginal_likelihood_ / len(x) == pytest.approx(
        mean_log_density(x, model.mean_, cov), abs=1e-8
    )


def sklearn_score(x, k):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return SkFactorAnalysis(k, tol=1e-8, max_iter=20_000, svd_method="lapack").fit(x).score(x)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, k, theirs",  # noted down where 20 000 iterations of EM take long, and have not converged
    [
        ("iris", 1, None),
        ("wine", 2, -19.79823609248214),
        ("wine", 3, None),
        ("breast cancer", 3, 12.997096211098379),
        ("breast cancer", 5, 15.407954622265462),
    ],
)
def test_factor_analysis_is_no_lower_than_scikit_learn(name, k, theirs):
    x = DATA[name][0][:, :: 2 if name == "breast cancer" else 1]
    ours = BayesMPT(FactorAnalysis(k)).fit(x)
    assert ours.score(x) >= (sklearn_score(x, k) if theirs is None else theirs) - 1e-9
    cov = factor_covariance(ours.components_, ours.noise_variance_)
    assert ours.score(x) == pytest.approx(mean_log_density(x, ours.mean_, cov), abs=1e-7)


def test_factor_analysis_of_digits_where_em_stalls():
    ours = BayesMPT(FactorAnalysis(20)).fit(JITTERED)
    assert ours.score(JITTERED) > SKLEARN_DIGITS_20
    cov = factor_covariance(ours.components_, ours.noise_variance_)
    assert ours.score(JITTERED) == pytest.approx(mean_log_density(JITTERED, ours.mean_, cov), abs=1e-8)


def test_the_maximum_is_stationary():
    """Joreskog's conditions: diag(S^-1 (S - C) S^-1) = 0 and W' S^-1 C = W' at the maximum of factor analysis."""
    x = DATA["wine"][0]
    x = x / x.std(0)
    model = BayesMPT(FactorAnalysis(3)).fit(x)
    cov = factor_covariance(model.components_, model.noise_variance_)
    inverse = np.linalg.inv(cov)
    inner = model.noise_variance_ > 1e-6  # not at a boundary
    gradient = inverse - inverse @ covariance(x) @ inverse
    assert abs(np.diag(gradient)[inner] * model.noise_variance_[inner]).max() < 1e-5
    np.testing.assert_allclose(model.components_ @ inverse @ covariance(x), model.components_, atol=1e-5)


@pytest.mark.slow
def test_masks_alone_from_a_random_start():
    """Raw data, whose columns' scales differ 1e4-fold; `benchmarks/accuracy/masks_alone.py` has whole tables."""
    x, k = DATA["breast cancer"][0][:, :6], 2
    model = BayesMPT(PPCA(k), masks=UniformSize(16), random_state=1991, training=Steps(max_iter=500))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x)
    best = ppca_maximum(x, k) / len(x)
    assert best - 0.01 <= model.score(x) <= best + 1e-9
    assert model.fit_method_ == "adam"


@pytest.mark.slow
def test_minibatches_of_masks():
    x, k = DATA["iris"]
    model = BayesMPT(
        PPCA(k),
        masks=PermutationChain(),
        training=Steps(batch_size=50, max_iter=600, learning_rate=0.03),
        random_state=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x)
    best = ppca_maximum(x, k) / len(x)
    assert best - 0.02 <= model.score(x) <= best + 1e-9


@pytest.mark.slow
def test_missing_cells_reach_a_maximum():
    """With cells missing there is no closed form: scipy's optimiser on the dense density, from our end and another."""
    x = DATA["iris"][0]
    holes = with_holes(x, 0.15)
    model = BayesMPT(PPCA(1)).fit(holes)

    def unpack(theta):
        loading = theta[4:8, None]
        return theta[:4], loading @ loading.T + theta[8].exp() * torch.eye(4, dtype=torch.float64)

    best = dense_optimum(
        holes, unpack, [np.concatenate([np.nanmean(holes, 0), v, [-1.0]]) for v in np.eye(4)]
    )
    assert model.score(holes) == pytest.approx(best, abs=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the training stopped", "ignore:the estimate of")
def test_missing_cells_and_a_noise_that_goes_to_zero():
    """Two factors for four columns: the likelihood is bounded, and reached where two columns have no noise left."""
    x = load_iris().data
    holes = with_holes(x, 0.1)
    model = BayesMPT(FactorAnalysis(2), random_state=8).fit(holes)

    def unpack(theta):
        loading = theta[4:12].reshape(4, 2)
        return theta[:4], loading @ loading.T + torch.diag(theta[12:].square() + 1e-12)

    # in standard deviations: in the logarithm of a variance the optimiser too ends 0.0015 nats a row too low
    rng = np.random.default_rng(1)
    starts = [np.concatenate([np.nanmean(holes, 0), rng.normal(size=8), np.full(4, 0.3)]) for _ in range(2)]
    assert model.score(holes) == pytest.approx(dense_optimum(holes, unpack, starts), abs=1e-4)


# ------------------------------------------------------------------------------------------ the general way: L-BFGS


def dense_optimum(x, unpack, starts):
    """Mean nats a row at the best of several BFGS runs on the dense density of the observed cells."""
    groups = {}
    for row in x:
        groups.setdefault(tuple(~np.isnan(row)), []).append(row)

    def loss(theta):
        theta = torch.tensor(theta, requires_grad=True)
        mean, cov = unpack(theta)
        total = 0.0
        for seen, rows in groups.items():
            s = torch.tensor(seen)
            if s.any():
                d = torch.distributions.MultivariateNormal(mean[s], cov[s][:, s], validate_args=False)
                total = total - d.log_prob(tensor(rows)[:, s]).sum() / len(x)
        total.backward()
        return float(total.detach()), theta.grad.numpy()

    found = [
        minimize(
            loss, s, jac=True, method="L-BFGS-B", options={"maxiter": 3000, "ftol": 1e-15, "gtol": 1e-9}
        ).fun
        for s in starts
    ]
    return -min(found)


SMALL = np.random.default_rng(4)
SMALL_X = SMALL.normal(size=(60, 2)) @ SMALL.normal(size=(2, 5))
SMALL_X += SMALL.normal(size=(60, 5)) * np.array([0.5, 1, 0.7, 1.2, 0.4]) + np.array([3.0, -1, 0, 100, 2])


def factor_program(loading_of, noise_of):
    def program(x):
        loc = pyro.param("loc", lambda: x[0].clone())
        loading, noise = loading_of(), noise_of()
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(loading.shape[1]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(loc + z @ loading.T, noise.sqrt()).to_event(1), obs=x)

    return program


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def lower_triangular():
    return pyro.param("loading", lambda: randn(5, 2)).tril()


def positive():
    return pyro.param("loading", lambda: randn(5, 1).abs(), constraint=constraints.positive)


def signs():
    """Loadings of known sign and free size, so that the bound is inside."""
    return pyro.param("size", lambda: randn(5, 1).abs(), constraint=constraints.positive) * SIGNS[:, None]


def free_noise():
    return pyro.param("noise", lambda: torch.ones(5, dtype=torch.float64), constraint=constraints.positive)


def tied_noise():
    pair = pyro.param("noise", lambda: torch.ones(2, dtype=torch.float64), constraint=constraints.positive)
    return pair[torch.tensor([0, 0, 0, 1, 1])]


def free_loading(k):
    return lambda: pyro.param("loading", lambda: randn(5, k))


_first = np.linalg.eigh(np.corrcoef(SMALL_X.T))[1][:, -1]
SIGNS = tensor(np.sign(_first))


def starts_of(n, seed=0):
    rng = np.random.default_rng(seed)
    return [np.concatenate([SMALL_X.mean(0), 0.5 * rng.normal(size=n - 5)]) for _ in range(4)]


def tril_unpack(th):
    w = th[5:15].reshape(5, 2).tril()
    return th[:5], w @ w.T + torch.diag(th[15:].exp())


def positive_unpack(th):
    w = th[5:10].exp()[:, None]
    return th[:5], w @ w.T + torch.diag(th[10:].exp())


def signs_unpack(th):
    w = th[5:10].exp()[:, None] * SIGNS[:, None]
    return th[:5], w @ w.T + torch.diag(th[10:].exp())


def tied_unpack(k):
    def unpack(th):
        w = th[5 : 5 + 5 * k].reshape(5, k)
        return th[:5], w @ w.T + torch.diag(th[-2:].exp()[torch.tensor([0, 0, 0, 1, 1])])

    return unpack


CONSTRAINED = {
    "lower-triangular loadings": (factor_program(lower_triangular, free_noise), tril_unpack, 20),
    "positive loadings": (factor_program(positive, free_noise), positive_unpack, 15),
    "loadings of known sign": (factor_program(signs, free_noise), signs_unpack, 15),
    "tied noise, one latent": (factor_program(free_loading(1), tied_noise), tied_unpack(1), 12),
    "tied noise, two latents": (factor_program(free_loading(2), tied_noise), tied_unpack(2), 17),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONSTRAINED)
def test_constrained_programs_against_scipy(name):
    program, unpack, n = CONSTRAINED[name]
    best = dense_optimum(SMALL_X, unpack, starts_of(n))
    model = BayesMPT(program, n_init=5, random_state=0).fit(SMALL_X)
    assert model.score(SMALL_X) == pytest.approx(best, abs=1e-6)
    cov = factor_covariance(model.components_, model.noise_variance_)
    assert model.score(SMALL_X) == pytest.approx(mean_log_density(SMALL_X, model.mean_, cov), abs=1e-9)
    if "positive" in name:
        assert (model.params_["loading"] > 0).all()
    if "triangular" in name:
        assert model.components_[1, 0] == 0.0


def test_regression_on_covariates_is_least_squares():
    """No latents, own rows: slopes by least squares, noise the mean squared residual."""
    rng = np.random.default_rng(5)
    y = rng.normal(size=(50, 3))
    x = y @ rng.normal(size=(3, 4)) + rng.normal(size=(50, 4)) * [0.1, 1, 10, 100]

    def program(x, y):
        slope = pyro.param("slope", lambda: x.new_zeros(3, 4))
        noise = pyro.param("noise", lambda: x.var(0), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(y @ slope, noise.sqrt()).to_event(1), obs=x)

    model = BayesMPT(program).fit(x, y)
    slope = np.linalg.lstsq(y, x, rcond=None)[0]
    noise = ((x - y @ slope) ** 2).mean(0)
    best = -0.5 * (np.log(2 * math.pi * noise).sum() + 4)
    assert model.log_marginal_likelihood_ / 50 == pytest.approx(best, abs=1e-8)
    np.testing.assert_allclose(model.params_["slope"], slope, rtol=1e-3, atol=1e-3 * np.sqrt(noise).max())
    np.testing.assert_allclose(model.params_["noise"], noise, rtol=1e-3)


@pytest.mark.parametrize("init", [0.0, 1.0])
def test_effects_of_groups_in_sorted_rows(init):
    """The rows come sorted by group, as real tables do: the first many look as if all had one map."""
    rng = np.random.default_rng(7)
    y = np.repeat([0.0, 1.0, 2.0], 30)[:, None]
    x = y * 3 + rng.normal(size=(90, 2))

    def program(x, y):
        slope = pyro.param("slope", lambda: x.new_full((2,), init))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(y * slope, 1.0).to_event(1), obs=x)

    slope = (y * x).sum(0) / (y**2).sum()
    best = -0.5 * ((x - y * slope) ** 2).sum() - 90 * math.log(2 * math.pi)
    model = BayesMPT(program).fit(x, y)
    np.testing.assert_allclose(model.params_["slope"], slope, atol=1e-5)
    assert model.log_marginal_likelihood_ == pytest.approx(best, abs=1e-7)


def test_type_two_maximum_likelihood_of_a_regression():
    """Weights integrated, their spread and the noise maximised: the n targets are one vector."""
    rng = np.random.default_rng(6)
    x = rng.normal(size=(40, 3))
    y = x @ np.array([1.0, -2.0, 0.5]) + 0.3 * rng.normal(size=40)

    def program(x, y):
        spread = pyro.param("spread", lambda: x.new_ones(()), constraint=constraints.positive)
        noise = pyro.param("noise", lambda: x.new_ones(()), constraint=constraints.positive)
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), spread).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x @ w, noise), obs=y)

    def loss(theta):
        cov = math.exp(2 * theta[0]) * x @ x.T + math.exp(2 * theta[1]) * np.eye(40)
        return -multivariate_normal(np.zeros(40), cov).logpdf(y)

    best = minimize(
        loss, [0, 0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 2000}
    )
    model = BayesMPT(program).fit(x, y)
    assert model.log_marginal_likelihood_ == pytest.approx(-best.fun, abs=1e-7)
    assert math.log(model.params_["noise"]) == pytest.approx(best.x[1], abs=1e-3)
    assert math.log(model.params_["spread"]) == pytest.approx(best.x[0], abs=1e-3)


# ---------------------------------------------------------------------------------------------------- scales


def tied_noise_from_the_data(x):
    """No closed form; starts in the units of x."""
    loc = pyro.param("loc", lambda: x.mean(0))
    loading = pyro.param("loading", lambda: x.std(0)[:, None] * randn(5, 1))
    noise = pyro.param("noise", lambda: x.var() * x.new_ones(2), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
        noise = noise[torch.tensor([0, 0, 0, 1, 1])]
        pyro.sample("x", dist.Normal(loc + z @ loading.T, noise.sqrt()).to_event(1), obs=x)


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e4, 1e8, "mixed"])
@pytest.mark.parametrize(
    "model", [PPCA(2), FactorAnalysis(2), tied_noise_from_the_data], ids=["ppca", "fa", "lbfgs"]
)
def test_scale_invariance(model, scale):
    """x -> c x changes the maximum by -sum log c a row, and nothing else."""
    if scale == "mixed" and not isinstance(model, FactorAnalysis):
        pytest.skip("one noise for columns of different units is another model")
    x = SMALL_X - [0, 0, 0, 100, 0]
    by = np.logspace(-8, 8, 5) if scale == "mixed" else np.full(5, scale)
    one, other = (BayesMPT(model, random_state=0).fit(a) for a in (x, x * by))
    assert other.score(x * by) == pytest.approx(one.score(x) - np.log(by).sum(), abs=1e-7)
    np.testing.assert_allclose(other.mean_ / by, one.mean_, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e4])
def test_converged_means_stationary(scale):
    """A start in absolute units (noise 1, loadings N(0, 1)), far from data in other units: found, or owned up to."""
    x = (SMALL_X - [0, 0, 0, 100, 0]) * scale
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = BayesMPT(CONSTRAINED["tied noise, one latent"][0], random_state=0).fit(x)
    assert model.converged_ or scale != 1.0  # in these units at the least, so that something is looked at
    if not model.converged_:
        return
    loc, noise = (
        tensor(model.mean_).requires_grad_(),
        tensor(np.log(model.noise_variance_[[0, 3]])).requires_grad_(),
    )
    loading = tensor(model.components_.T).requires_grad_()
    cov = loading @ loading.T + torch.diag(noise.exp()[torch.tensor([0, 0, 0, 1, 1])])
    torch.distributions.MultivariateNormal(loc, cov).log_prob(tensor(x)).mean().backward()
    for leaf, unit in ((loc, x.std()), (loading, x.std()), (noise, 1.0)):
        assert float(leaf.grad.abs().max()) * unit < 1e-2  # nats a row and a unit of the data


@pytest.mark.slow
def test_masks_train_alike_at_all_scales():
    def score(scale):
        model = BayesMPT(PPCA(1), masks=UniformSize(8), random_state=0, training=Steps(max_iter=120))
        return model.fit(SMALL_X * scale).score(SMALL_X * scale)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        one = score(1.0)
        for scale in (1e-8, 1e8):
            assert score(scale) == pytest.approx(one - 5 * math.log(scale), abs=1e-3)


# ------------------------------------------------------------------------------------------------- starts and ends


@pytest.mark.slow
def test_warm_start():
    program = CONSTRAINED["lower-triangular loadings"][0]
    cold = BayesMPT(program, random_state=0, warm_start=True).fit(SMALL_X)
    first = cold.n_iter_
    best = cold.score(SMALL_X)
    again = cold.fit(SMALL_X)
    assert again.score(SMALL_X) == pytest.approx(best, abs=1e-9)
    assert again.n_iter_ < first / 3
    off = BayesMPT(program, random_state=0).fit(SMALL_X)
    assert off.fit(SMALL_X).n_iter_ >= first / 3


def test_warm_start_goes_on_where_it_stopped():
    program = CONSTRAINED["lower-triangular loadings"][0]
    model = BayesMPT(program, random_state=0, warm_start=True, training=Ascent(max_iter=5))
    scores = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for _ in range(4):
            scores.append(model.fit(SMALL_X).score(SMALL_X))
    assert (np.diff(scores) > 0).all()


def two_hills(x):
    """mean = a^3 - 3 a against data around 5: one global maximum near a = 2.28, a local one at a = -1 (mean 2)."""
    a = pyro.param("a", lambda: randn())
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal((a**3 - 3 * a).expand(2), 1.0).to_event(1), obs=x)


@pytest.mark.slow
def test_restarts_keep_the_best():
    x = 5 + np.random.default_rng(0).normal(size=(40, 2))
    m = x.mean()
    best = -math.log(2 * math.pi) - 0.5 * ((x - m) ** 2).sum(1).mean()
    trap = -math.log(2 * math.pi) - 0.5 * ((x - 2) ** 2).sum(1).mean()
    single = [BayesMPT(two_hills, random_state=s).fit(x).score(x) for s in range(6)]
    assert min(single) == pytest.approx(trap, abs=1e-6)  # the trap is real
    model = BayesMPT(two_hills, n_init=12, random_state=0).fit(x)
    assert model.score(x) == pytest.approx(best, abs=1e-8)
    assert model.log_marginal_likelihood_ / 40 == pytest.approx(best, abs=1e-8)
    assert model.history_[-1] == pytest.approx(best, abs=1e-8)  # of the start that won


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:the estimate of the noise variance of column"
)  # from the first rows alone
@pytest.mark.parametrize("missing", [False, True], ids=["complete", "missing"])
@pytest.mark.parametrize("model", [PPCA(2), FactorAnalysis(2)], ids=repr)
def test_partial_fit_equals_fit(model, missing):
    x = DATA["wine"][0] / DATA["wine"][0].std(0)
    if missing:
        x = with_holes(x, 0.03)
    whole = BayesMPT(model, random_state=0).fit(x)
    parts = BayesMPT(model, random_state=0)
    for chunk in np.array_split(x, 5):
        parts.partial_fit(chunk)
    assert parts.log_marginal_likelihood_ == pytest.approx(whole.log_marginal_likelihood_, abs=1e-5)
    assert parts.score(x) == pytest.approx(whole.score(x), abs=1e-7)
    np.testing.assert_allclose(parts.get_covariance(), whole.get_covariance(), rtol=1e-3, atol=1e-3)
    one_by_one = BayesMPT(PPCA(1)).partial_fit(x[:20])
    one_by_one.partial_fit(x[20:21])
    assert one_by_one.score(x[:21]) == pytest.approx(BayesMPT(PPCA(1)).fit(x[:21]).score(x[:21]), abs=1e-7)


def test_fit_forgets_what_partial_fit_saw():
    model = BayesMPT(PPCA(1)).partial_fit(SMALL_X).fit(SMALL_X[:30])
    assert model.score(SMALL_X[:30]) == pytest.approx(ppca_maximum(SMALL_X[:30], 1) / 30, abs=1e-8)


def interrupted(after, seen):
    """A factor program (tied noise: no closed form) in which Ctrl-C is pressed once, in the given run."""
    count = 0

    def program(x):
        nonlocal count
        loc = pyro.param("loc", lambda: x.new_zeros(5))
        loading = pyro.param("loading", lambda: randn(5, 1))
        noise = pyro.param("noise", lambda: x.new_ones(2), constraint=constraints.positive)
        count += 1
        if count == after:
            raise KeyboardInterrupt
        noise = noise[torch.tensor([0, 0, 0, 1, 1])]
        if count < after:
            with torch.no_grad():
                seen.append((loc.numpy().copy(), (loading @ loading.T + torch.diag(noise)).numpy()))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(loc + z @ loading.T, noise.sqrt()).to_event(1), obs=x)

    return program


@pytest.mark.slow
@pytest.mark.parametrize("after", [20, 24])
def test_ctrl_c_keeps_the_best_state(after):
    x, seen = SMALL_X - [0, 0, 0, 100, 0], []
    model = BayesMPT(interrupted(after, seen), random_state=0)
    with pytest.raises(KeyboardInterrupt):
        model.fit(x)
    visited = [mean_log_density(x, m, c) for m, c in seen]
    best = BayesMPT(CONSTRAINED["tied noise, one latent"][0], random_state=0, n_init=3).fit(x).score(x)
    assert model.score(x) == pytest.approx(max(visited), abs=1e-9)
    assert visited[0] + 1 < model.score(x) < best - 1e-12  # it was cut short, and had come some way
    assert model.interrupted_ and not model.converged_
    cov = factor_covariance(model.components_, model.noise_variance_)
    assert model.log_marginal_likelihood_ / 60 == pytest.approx(
        mean_log_density(x, model.mean_, cov), abs=1e-9
    )


@pytest.mark.slow
def test_ctrl_c_in_a_training_on_masks():
    x, seen = SMALL_X - [0, 0, 0, 100, 0], []
    model = BayesMPT(
        interrupted(300, seen), masks=UniformSize(4), random_state=0, training=Steps(max_iter=10_000)
    )
    with pytest.raises(KeyboardInterrupt):
        model.fit(x)
    visited = [mean_log_density(x, m, c) for m, c in seen]
    assert model.score(x) > visited[0] + 1
    assert model.score(x) > np.mean(visited[-50:]) - 0.3  # not an old state
    assert 50 < model.n_iter_ < 300 and model.interrupted_ and not model.converged_


def test_ctrl_c_before_the_first_window_of_a_training_on_masks():
    """There is no average yet; what was learnt so far is kept all the same."""
    x, seen = SMALL_X - [0, 0, 0, 100, 0], []
    model = BayesMPT(
        interrupted(55, seen), masks=UniformSize(4), random_state=0, training=Steps(max_iter=10_000)
    )
    with pytest.raises(KeyboardInterrupt):
        model.fit(x)
    visited = [mean_log_density(x, m, c) for m, c in seen]
    assert model.n_iter_ > 20 and model.interrupted_ and not model.converged_
    assert model.score(x) > visited[0] + 0.1


# ------------------------------------------------------------------------------------------------------- errors


def program_with(extra):
    def program(x):
        factor = extra(x)
        loc = pyro.param("loc", lambda: x.mean(0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc * factor, 1.0).to_event(1), obs=x)

    return program


def not_a_number(x):
    return pyro.param("temperature", torch.tensor(math.nan, dtype=torch.float64))


def infinite(x):
    return pyro.param("temperature", torch.tensor(math.inf, dtype=torch.float64))


def nan_gradient(x):
    """The value is finite and its derivative is 0 * inf = NaN."""
    p = pyro.param("temperature", torch.tensor(0.0, dtype=torch.float64))
    return torch.where(p < 1, torch.ones_like(p) + 0 * p.abs().sqrt(), p)


def unused(x):
    pyro.param("temperature", torch.tensor(1.0, dtype=torch.float64))
    return 1.0


@pytest.mark.parametrize("masks", [None, UniformSize(2)], ids=repr)
@pytest.mark.parametrize("extra", [not_a_number, infinite, nan_gradient, unused])
def test_a_bad_parameter_is_named(extra, masks):
    with pytest.raises(ValueError, match="temperature"):
        BayesMPT(program_with(extra), masks=masks).fit(SMALL_X)


def test_nan_that_comes_up_during_the_training_is_an_error_that_names_its_cause():
    """log of a parameter that Adam drives below zero."""

    def program(x):
        a = pyro.param("temperature", torch.tensor(0.05, dtype=torch.float64))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(torch.log(a).expand(5), 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match="temperature"):
        BayesMPT(
            program, masks=UniformSize(2), training=Steps(max_iter=200, learning_rate=0.5), random_state=0
        ).fit(SMALL_X - 50)
