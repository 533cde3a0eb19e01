"""Nearest-neighbour conditionals of Gaussian vectors against dense algebra written out here, and against GPBoost."""

import math
import subprocess
import sys

import gpytorch
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from scipy.spatial.distance import cdist
from sklearn.gaussian_process import kernels as theirs

from bayes_mpt import BayesMPT
from bayes_mpt.masks import PermutationChain
from bayes_mpt.models import GaussianProcess
from bayes_mpt.predictors import Exact, NearestNeighbors, choose
from bayes_mpt.predictors.gaussian import near_objective, nearest_neighbors, process
from bayes_mpt.predictors.gaussian.neighborhoods import maxmin, predecessors
from bayes_mpt.predictors.gaussian.vecchia import LogProbGiven
from bayes_mpt.program.program import ModelError
from bayes_mpt.program.store import OwnStore
from bayes_mpt.training import Steps

N, P = 60, 2
THETA = {"amplitude": 1.3, "length": 0.3, "noise": 0.2, "centre": 0.4}


def data(n=N, p=P, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, p, generator=generator, dtype=torch.float64)
    y = (4 * x[:, 0]).sin() + 0.5 * torch.randn(n, generator=generator, dtype=torch.float64)
    return x, y


def param(name):
    positive = constraints.positive if name != "centre" else constraints.real
    return pyro.param(name, torch.tensor(THETA[name], dtype=torch.float64), constraint=positive)


def unbatched(x, y):
    """A user's program that knows one set of rows only: it asks for len(x) and builds eye(n)."""
    n = len(x)
    gap = (x[:, None] - x[None]).abs().sum(-1)
    cov = param("amplitude") * torch.exp(-gap / param("length")) + param("noise") * torch.eye(
        n, dtype=x.dtype
    )
    pyro.sample("y", dist.MultivariateNormal(param("centre") * x.new_ones(n), cov), obs=y)


def one_by_one(x, y):
    """A program that neither broadcasts nor maps: it looks at a value."""
    if float(x.sum()) > 1e9:
        raise ValueError("too far away")
    unbatched(x, y)


def broadcasting(x, y):
    gap = (x[..., :, None, :] - x[..., None, :, :]).abs().sum(-1)
    eye = torch.eye(x.shape[-2], dtype=x.dtype)
    cov = param("amplitude") * torch.exp(-gap / param("length")) + param("noise") * eye
    pyro.sample("y", dist.MultivariateNormal(param("centre") * torch.ones_like(y), cov), obs=y)


def dense_cov(x, theta):
    gap = (x[:, None] - x[None]).abs().sum(-1)
    return theta["amplitude"] * torch.exp(-gap / theta["length"]) + theta["noise"] * torch.eye(
        len(x), dtype=x.dtype
    )


def conditional(cov, r, i, near):
    """Mean (of the residual) and variance of token i given others, by the textbook formula and one solve each."""
    if not len(near):
        return torch.zeros((), dtype=cov.dtype), cov[i, i]
    weights = torch.linalg.solve(cov[near][:, near], cov[near, i])
    return weights @ r[near], cov[i, i] - weights @ cov[near, i]


def vecchia(x, y, theta, order, m, home=None):
    """log p by token, neighbours found by sorting all distances. The kernel's distance is a sum over columns, and
    equal scales of the columns make Euclid's the one that neighbours are near in. Tokens of one home see the neighbours
    of all of them, and each other, as far as they come before."""
    home = torch.arange(len(x)) if home is None else home
    cov, r = dense_cov(x, theta), y - theta["centre"]
    gap = torch.from_numpy(cdist(x.numpy(), x.numpy()))
    out = torch.zeros(len(x), dtype=x.dtype)
    sets = [{i, *order[:t][gap[i, order[:t]].argsort()[:m]].tolist()} for t, i in enumerate(order.tolist())]
    for t, i in enumerate(order.tolist()):
        shared = set().union(*(sets[s] for s, j in enumerate(order.tolist()) if home[j] == home[i]))
        near = torch.tensor([j for j in order[:t].tolist() if j in shared], dtype=torch.long)
        mean, var = conditional(cov, r, i, near)
        log_prob = -0.5 * ((r[i] - mean) ** 2 / var + var.log() + math.log(2 * math.pi))
        out = out.index_put((torch.tensor(i),), log_prob)
    return out


def thetas():
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in THETA.items()}


def read(m, model=broadcasting, args=None, **settings):
    args = data() if args is None else args
    return NearestNeighbors(m, **settings).bind(model, args).read(args)


@pytest.fixture
def alone(monkeypatch):
    """Vecchia's own approximation: no token shares its neighbours."""
    monkeypatch.setattr("bayes_mpt.predictors.gaussian.neighborhoods.MAX_GROUP", 1)


@pytest.fixture(autouse=True)
def own_store():
    with OwnStore():
        yield


# -------------------------------------------------------------------------------------------------------- the truth


@pytest.mark.parametrize("ordering", ["maxmin", "random", "given"])
@pytest.mark.parametrize("model", [broadcasting, unbatched, one_by_one, GaussianProcess()])
def test_all_predecessors_are_exact(model, ordering):
    x, y = data()
    near = read(N - 1, model, ordering=ordering)
    exact = Exact().bind(model, (x, y)).read((x, y))
    assert near.evidence().exact
    with torch.no_grad():
        assert float(near.score()) == pytest.approx(float(exact.score()), abs=1e-10)
        assert near.evidence().se == 0


@pytest.mark.parametrize("model", [broadcasting, unbatched, one_by_one])
@pytest.mark.parametrize("m", [1, 4, 11])
def test_few_neighbours_equal_the_textbook(model, m, alone):
    x, y = data()
    near = read(m, model, ordering="given")
    order = torch.arange(N)
    truth = vecchia(x, y, thetas(), order, m)
    with torch.no_grad():
        assert torch.allclose(near.chain(order[None])[0, 0], truth, rtol=0, atol=1e-11)
        assert float(near.score()) == pytest.approx(float(truth.sum()), abs=1e-10)
    with torch.no_grad():
        assert not near.evidence().exact


def test_any_order(alone):
    x, y = data()
    order = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(s)) for s in range(3)])
    with torch.no_grad():
        found = read(6).chain(order)
    for tokens, got in zip(order, found[:, 0], strict=True):
        assert torch.allclose(got, vecchia(x, y, thetas(), tokens, 6), rtol=0, atol=1e-11)


def test_shared_neighbours_equal_the_textbook():
    x, y = data(250)
    near = read(9, args=(x, y))
    layout = near._layout(y)
    sizes = torch.bincount(layout.home)
    assert sizes.sum() == 250 and 2 < sizes.double().mean() and sizes.max() <= 8
    truth = vecchia(x, y, thetas(), layout.order, 9, layout.home)
    with torch.no_grad():
        assert float(near.score()) == pytest.approx(float(truth.sum()), abs=1e-10)
        assert torch.allclose(near.chain(layout.order[None])[0, 0], truth, rtol=0, atol=1e-11)
        tokens = torch.tensor([7, 200, 31])
        mean, var = near.predicted(tokens)
    assert torch.allclose(
        dist.Normal(mean, var.sqrt()).log_prob(y[tokens]), truth[tokens], rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("n_columns", [1, 2, 3, 8])
def test_sharing_sees_more_for_no_more(monkeypatch, n_columns):
    """Every token sees at least its own m, so that none is predicted worse if the truth is the program."""
    x, y = data(600, n_columns)
    m, tokens = 12, torch.arange(600)
    shared = read(m, args=(x, y))
    sets = shared._layout(y).groups
    assert sets.start.diff().square().sum() <= 600 * (m + 1) ** 2
    with torch.no_grad():
        truth = Exact().bind(broadcasting, (x, y)).read((x, y)).cov.logdet()
        _, less = shared.predicted(tokens)
        monkeypatch.setattr("bayes_mpt.predictors.gaussian.neighborhoods.MAX_GROUP", 1)
        _, more = read(m, args=(x, y)).predicted(tokens)
    assert bool((less <= more * (1 + 1e-12)).all())
    losses = less.log().sum() - truth, more.log().sum() - truth
    assert 0 < losses[0] < (0.9 if n_columns <= 2 else 1 + 1e-9) * losses[1]


@pytest.mark.parametrize("m", [5, 11])
@pytest.mark.parametrize("model", [broadcasting, unbatched])
def test_gradients_equal_those_of_the_textbook(model, m):
    x, y = data()
    near = read(m, model, ordering="given")
    home = near._layout(y).home
    assert (len(home.unique()) < N) == (m == 11)
    theta = {name: value.requires_grad_() for name, value in thetas().items()}
    vecchia(x, y, theta, torch.arange(N), m, home).sum().backward()
    leaves = dict(pyro.get_param_store().named_parameters())
    grads = torch.autograd.grad(near.score().sum(), list(leaves.values()))
    for name, grad in zip(leaves, grads, strict=True):
        # the leaves of positive parameters are their logarithms
        truth = theta[name].grad * (1 if name == "centre" else THETA[name])
        assert float(grad) == pytest.approx(float(truth), rel=1e-9)


@pytest.mark.parametrize("own", [[[4], [4], [4]], [[0, 2, 4], [1, 2, -1], [3, -1, -1]]])
def test_gradients_of_a_term(own):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 5, 5, generator=generator, dtype=torch.float64)
    cov = (a @ a.mT + torch.eye(5, dtype=torch.float64)).requires_grad_()
    residual = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    places = torch.tensor(own)
    assert torch.autograd.gradcheck(
        lambda r, c: LogProbGiven.apply(r, 0.5 * (c + c.mT), places), (residual, cov)
    )


def test_gradients_by_chunks(monkeypatch):
    """One chunk or many: the same sum and gradient."""
    near = read(5)
    leaves = [leaf for _, leaf in pyro.get_param_store().named_parameters()]

    def both():
        score = near.score().sum()
        return score.detach(), torch.stack(torch.autograd.grad(score, leaves))

    whole = both()
    monkeypatch.setattr("bayes_mpt.predictors.gaussian.nearest_neighbors.CHUNK", 7 * 36)
    for a, b in zip(whole, both(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_missing_observations_are_left_out():
    x, y = data()
    kept = torch.rand(N, generator=torch.Generator().manual_seed(1)) < 0.7
    holes = torch.where(kept, y, torch.nan)
    with torch.no_grad():
        with_holes = read(5, args=(x, holes))
        without = read(5, args=(x[kept], y[kept]))
        assert bool((with_holes.value[0].isnan() == ~kept).all())
        found = float(with_holes.score())
        assert found == pytest.approx(float(without.score()), abs=1e-11)
        # the holes, given their nearest observed rows
        posterior = with_holes.posterior().tokens[0]
    cov, r = dense_cov(x, thetas()), y - THETA["centre"]
    gap = cdist(x.numpy(), x.numpy())
    seen = kept.nonzero()[:, 0]
    for i in (~kept).nonzero()[:, 0].tolist():
        near = seen[gap[i, seen].argsort()[:5]]
        mean, _ = conditional(cov, r, i, near)
        assert float(posterior[i]) == pytest.approx(float(mean) + THETA["centre"], abs=1e-11)
    assert torch.equal(posterior[kept], y[kept])


def test_conditionals_given_a_visible_set():
    x, y = data()
    visible = torch.rand(2, N, generator=torch.Generator().manual_seed(2)) < torch.tensor([[0.5], [0.03]])
    visible = torch.cat([visible, torch.zeros(1, N, dtype=torch.bool)])  # also nothing at all
    with torch.no_grad():
        found = read(4).conditionals(visible)[:, 0]
    cov, r = dense_cov(x, thetas()), y - THETA["centre"]
    gap = cdist(x.numpy(), x.numpy())
    for mask, got in zip(visible, found, strict=True):
        seen = mask.nonzero()[:, 0]
        for i in range(N):
            near = seen[gap[i, seen].argsort()[:4]]
            mean, var = conditional(cov, r, i, near)
            truth = 0.0 if mask[i] else float(dist.Normal(mean, var.sqrt()).log_prob(r[i]))
            assert float(got[i]) == pytest.approx(truth, abs=1e-11)


# --------------------------------------------------------------------------------------------- order and neighbours


def test_maxmin_takes_the_furthest():
    points = np.random.default_rng(0).random((200, 3))
    order = maxmin(points)
    gap = cdist(points, points)
    assert sorted(order) == list(range(200))
    for t in range(1, 200):
        rest = np.setdiff1d(np.arange(200), order[:t])
        nearest = gap[np.ix_(rest, order[:t])].min(1)
        assert nearest.max() == pytest.approx(gap[order[t], order[:t]].min(), abs=1e-12)


def test_maxmin_of_many_points_is_nearly_exact(monkeypatch):
    points = np.random.default_rng(0).random((3000, 2))
    quick = maxmin(points)
    monkeypatch.setattr("bayes_mpt.predictors.gaussian.neighborhoods.N_EXACT_ORDER", 3000)
    exact = maxmin(points)
    assert sorted(quick) == sorted(exact) == list(range(3000))

    def separation(order, n):
        gap = cdist(points[order[:n]], points[order[:n]])
        return (gap + np.eye(n) * 9).min()

    for n in (100, 1000):
        assert separation(quick, n) > 0.8 * separation(exact, n)
        assert separation(np.arange(3000), n) < 0.2 * separation(exact, n)  # a random order is far from it


@pytest.mark.parametrize("case", ["random", "sorted", "repeated", "one side"])
def test_predecessors_are_the_nearest(case):
    rng = np.random.default_rng(0)
    points = {
        "random": rng.random((500, 2)),
        "sorted": np.sort(rng.random((500, 1)), 0),
        "repeated": rng.integers(0, 4, (500, 2)).astype(float),
        "one side": np.concatenate([np.linspace(5, 6, 250), np.linspace(0, 1, 250)])[:, None],
    }[case]
    m = 7
    near = predecessors(points, m)
    some = np.array([3, 100, 499])
    assert np.array_equal(predecessors(points, m, some), near[some])
    for i in range(500):
        if i <= m:
            assert sorted(near[i]) == [j for j in range(m + 1) if j != i]
            continue
        assert (near[i] < i).all() and len(set(near[i])) == m
        gap = np.linalg.norm(points[:i] - points[i], axis=1)
        assert np.allclose(np.sort(gap[near[i]]), np.sort(gap)[:m], rtol=0, atol=1e-12)


def kernel_program(x, y):
    """Length-scales 4 to 1; a label whose two groups are independent but for a tenth; a column without any effect."""
    gap = (x[..., :, None, 0] - x[..., None, :, 0]) / 0.4
    other = (x[..., :, None, 1] - x[..., None, :, 1]) / 0.1
    same = torch.where(x[..., :, None, 2] == x[..., None, :, 2], 1.0, 0.1)
    cov = torch.exp(-0.5 * gap.square() - 0.5 * other.square()) * same
    cov = cov + 0.1 * torch.eye(x.shape[-2], dtype=x.dtype)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(y), cov), obs=y)


def test_distance_is_in_units_of_the_kernel():
    x, y = data(500)
    label = (torch.arange(500) % 2).double()
    x = torch.cat([x, label[:, None], x[:, :1].flip(0)], 1)
    units = read(5, kernel_program, (x, y))._layout(y).unit
    # exp(-(d / l)^2 / 2) is a half at l sqrt(2 log 2); a label that leaves a tenth is as far as exp(-(d / l)^2) = 0.1
    half = np.sqrt(np.array([2 * 0.4**2, 2 * 0.1**2, 1 / math.log(10)]) * math.log(2))
    assert np.allclose(units[:3] / units[1], half / half[1], rtol=0.06)
    assert math.isinf(units[3])


def test_units_do_not_depend_on_the_inputs_scale():
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=1.5, ard_num_dims=2))
    x, y = data(300)
    plain = read(8, GaussianProcess(kernel), (x, y))._layout(y).unit
    pyro.clear_param_store()
    scale = np.array([1e6, 1e-4])
    scaled = read(8, GaussianProcess(kernel), (x * torch.from_numpy(scale), y))._layout(y).unit
    assert (scaled[0] / scaled[1]) / (plain[0] / plain[1]) == pytest.approx(1e10, rel=0.1)
    isotropic = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=1.5))
    pyro.clear_param_store()
    assert read(8, GaussianProcess(isotropic), (x, y))._layout(y).unit.tolist() == [1, 1]


@pytest.mark.parametrize("n_rows", [3, 5, 7, 10, 11, 30])
def test_rows_on_a_regular_grid(n_rows):
    """Few grids have two rows half their range apart, or a quarter."""
    x = torch.linspace(0, 12, n_rows, dtype=torch.float64)[:, None]
    y = torch.sin(x[:, 0])
    cov = torch.exp(-0.5 * (x - x.mT) ** 2) + 0.1 * torch.eye(n_rows, dtype=torch.float64)
    want = dist.MultivariateNormal(torch.zeros(n_rows, dtype=torch.float64), cov).log_prob(y)

    def smooth(x, y):
        cov = torch.exp(-0.5 * torch.cdist(x, x) ** 2) + 0.1 * torch.eye(x.shape[-2], dtype=x.dtype)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(y), cov), obs=y)

    got = choose(smooth, (x, y), predictor=NearestNeighbors(n_rows)).read((x, y)).score()
    assert got.item() == pytest.approx(want.item(), rel=1e-12)


def test_error_covers_the_distance_to_the_truth():
    x, y = data(400)
    exact = Exact().bind(broadcasting, (x, y)).read((x, y))
    with torch.no_grad():
        truth = float(exact.score())
        gaps, errors = [], []
        for m in (2, 5, 10, 20):
            found = read(m, args=(x, y)).evidence()
            gaps.append(abs(float(found.by_row.sum()) - truth))
            errors.append(found.se)
    assert all(gap < 2 * se for gap, se in zip(gaps, errors, strict=True))
    assert gaps[-1] < gaps[0] / 4 and errors[-1] < errors[0] / 4


@pytest.mark.slow
def test_sampled_terms_are_unbiased():
    x, y = data(300)
    near = read(20, args=(x, y))
    assert near._layout(y).groups.own.shape[1] > 1  # whole groups are drawn
    generator = torch.Generator().manual_seed(0)
    leaves = [leaf for _, leaf in pyro.get_param_store().named_parameters()]

    def value_and_gradient(score):
        return torch.cat([score.detach().reshape(1), torch.stack(torch.autograd.grad(score, leaves))])

    truth = value_and_gradient(near.score().sum())
    draws = torch.stack(
        [value_and_gradient(near.partial(*near.sample(40, generator)).sum()) for _ in range(400)]
    )
    error = draws.std(0) / math.sqrt(len(draws))
    assert bool(((draws.mean(0) - truth).abs() < 3.5 * error).all())
    assert bool((error > 0).all())
    everything = near.partial(*near.sample(300, generator))
    assert float(everything.detach()) == pytest.approx(float(truth[0]), abs=1e-10)


# ------------------------------------------------------------------------------------------------------ the estimator


def test_choice_by_size(monkeypatch):
    monkeypatch.setattr("bayes_mpt.predictors.choice.MAX_JOINT", 50)
    few, many = data(50), data(51)
    assert choose(broadcasting, few).read(few).evidence().exact
    chosen = choose(broadcasting, many)
    assert chosen.name == "NearestNeighbors(30, ordering='maxmin')"
    fitted = BayesMPT(GaussianProcess()).fit(*(a.numpy() for a in many))
    assert (
        "NearestNeighbors(30, ordering='maxmin')" in fitted.explain() and "of 51 tokens" in fitted.explain()
    )


@pytest.mark.slow
@pytest.mark.parametrize("columns, nu", [(1, 0.5), (2, math.inf), (3, 1.5)])
def test_kernels_rank_as_by_the_exact_likelihood(columns, nu):
    rng = np.random.default_rng(0)
    X = rng.random((250, columns))
    cov = theirs.Matern(0.2 * columns, nu=nu)(X) + 0.04 * np.eye(250)
    y = np.linalg.cholesky(cov) @ rng.normal(size=250)
    found = {}
    for other in (0.5, 1.5, math.inf):
        model = GaussianProcess(1.0 * theirs.Matern(nu=other))
        found[other] = [
            BayesMPT(model, predictor=p, random_state=0).fit(X, y).log_marginal_likelihood_
            for p in (Exact(), NearestNeighbors(30))
        ]
    by_exact, by_neighbours = (sorted(found, key=lambda k, i=i: -found[k][i]) for i in (0, 1))
    assert by_neighbours == by_exact


@pytest.mark.slow
def test_fit_is_the_exact_one_with_all_neighbours():
    X, y = (a.numpy() for a in data(50))
    near = BayesMPT(GaussianProcess(), predictor=NearestNeighbors(50)).fit(X, y)
    exact = BayesMPT(GaussianProcess(), predictor=Exact()).fit(X, y)
    assert near.log_marginal_likelihood_ == pytest.approx(exact.log_marginal_likelihood_, abs=1e-3)
    new = np.random.default_rng(1).random((7, P))
    for a, b in zip(near.predict(new, return_std=True), exact.predict(new, return_std=True), strict=True):
        assert np.allclose(a, b, rtol=0.01, atol=0.01)
    whole = near.predict(new, return_cov=True)
    assert np.allclose(np.sqrt(np.diag(whole[1])), near.predict(new, return_std=True)[1], rtol=1e-9)


def test_predictions_equal_the_textbook():
    x, y = data()
    new = torch.rand(9, P, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    near = read(5)
    with torch.no_grad():
        found = near.predict((new, y.new_zeros(9)))
        full = near.predict((new, y.new_zeros(9)), full=True)
        exact = Exact().bind(broadcasting, (x, y)).read((x, y)).predict((new, y.new_zeros(9)), full=True)
    both, r = torch.cat([x, new]), torch.cat([y, y.new_zeros(9)]) - THETA["centre"]
    cov, gap = dense_cov(both, thetas()), cdist(both.numpy(), x.numpy())
    for k in range(9):
        mean, var = conditional(cov, r, N + k, torch.from_numpy(gap[N + k].argsort()[:5].copy()))
        assert float(found.mean[k]) == pytest.approx(float(mean) + THETA["centre"], abs=1e-11)
        assert float(found.var[k]) == pytest.approx(float(var), abs=1e-11)
    # the joint one sees more neighbours, and no more than there are
    assert bool((full.var <= found.var + 1e-12).all()) and bool((exact.var <= full.var + 1e-12).all())
    assert torch.allclose(full.cov, exact.cov, rtol=0, atol=0.1)


def test_a_large_joint_prediction_is_refused(monkeypatch):
    monkeypatch.setattr("bayes_mpt.predictors.gaussian.nearest_neighbors.MAX_FULL", 40)
    x, y = data()
    with pytest.raises(ValueError, match="ask for fewer rows at a time"):
        read(5).predict((x, y), full=True)


@pytest.mark.slow
def test_score_after_fit_is_that_of_fit():
    """The neighbours belong to the fitted parameters: read afresh, the score is the same."""
    rng = np.random.default_rng(0)
    X = rng.random((400, 2))
    y = np.sin(12 * X[:, 0]) + X[:, 1] + 0.1 * rng.normal(size=400)
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel(ard_num_dims=2))
    fitted = BayesMPT(GaussianProcess(kernel), predictor=NearestNeighbors(10)).fit(X, y)
    long, short = fitted.params_["kernel.base_kernel.lengthscale"].ravel()[[1, 0]]
    assert long > 2 * short
    with fitted.read_rows(X, y) as near, torch.no_grad():
        assert float(near.score()) == pytest.approx(fitted.log_marginal_likelihood_, abs=1e-8)
        assert near._layout(near.value[0]).unit[0] < near._layout(near.value[0]).unit[1]


@pytest.mark.slow
def test_training_by_stages_ends_at_the_same_maximum(monkeypatch):
    X, y = (a.numpy() for a in data(400))
    settings = dict(predictor=NearestNeighbors(10), random_state=0)
    whole = BayesMPT(broadcasting, **settings).fit(X, y)
    monkeypatch.setattr(process, "N_COARSE", 50)
    monkeypatch.setattr(near_objective, "N_MIDDLE", 100)
    counts = []
    stages = near_objective.coarse_to_fine
    monkeypatch.setattr(
        nearest_neighbors, "coarse_to_fine", lambda *a: counts.append(len(found := stages(*a))) or found
    )
    staged = BayesMPT(broadcasting, **settings).fit(X, y)
    assert counts == [3]
    assert staged.log_marginal_likelihood_ == pytest.approx(whole.log_marginal_likelihood_, abs=5e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the training stopped")
def test_minibatches_of_terms_train():
    X, y = (a.numpy() for a in data(200))
    exact = BayesMPT(broadcasting, predictor=NearestNeighbors(5)).fit(X, y)
    batches = BayesMPT(
        broadcasting,
        predictor=NearestNeighbors(5),
        masks=PermutationChain(),
        training=Steps(batch_size=50, max_iter=300),
        random_state=0,
    ).fit(X, y)
    assert batches.log_marginal_likelihood_ == pytest.approx(exact.log_marginal_likelihood_, abs=0.5)


def test_what_cannot_be_cut_to_neighbours_says_why():
    x, y = data()

    def of_all_rows(x, y):
        unbatched((x - x.mean(0)) / x.std(0), y)

    with pytest.raises(ModelError, match=r"changes with the other rows.*Exact\(\)"):
        NearestNeighbors(5).bind(of_all_rows, (x, y))

    def rows(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1), obs=x)

    with pytest.raises(ModelError, match="one MultivariateNormal"):
        NearestNeighbors(5).bind(rows, (x,))
    for wrong in (0, 2.5, True):
        with pytest.raises(ValueError, match="m must be"):
            NearestNeighbors(wrong).bind(broadcasting, (x, y))
    with pytest.raises(ValueError, match="ordering must be"):
        NearestNeighbors(5, ordering="sorted").bind(broadcasting, (x, y))


@pytest.mark.parametrize("n", [2, 3])
def test_very_few_rows(n):
    x, y = data(n)
    near, exact = (p.bind(broadcasting, (x, y)).read((x, y)) for p in (NearestNeighbors(30), Exact()))
    with torch.no_grad():
        assert float(near.score()) == pytest.approx(float(exact.score()), abs=1e-11)


# ------------------------------------------------------------------------------------------------------------- scale

MEMORY = """
import resource, numpy as np, torch
from bayes_mpt import BayesMPT
from bayes_mpt.models import GaussianProcess
from bayes_mpt.predictors import NearestNeighbors
from bayes_mpt.training import Ascent
torch.set_num_threads(1)
rng = np.random.default_rng(0)
BayesMPT(GaussianProcess(), training=Ascent(max_iter=1)).fit(rng.random((300, 2)), rng.normal(size=300))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
X = rng.random((9000, 2))
y = np.sin(5 * X[:, 0]) + 0.3 * rng.normal(size=9000)
import warnings; warnings.simplefilter("ignore")
fitted = BayesMPT(GaussianProcess(), predictor=NearestNeighbors(10), training=Ascent(max_iter=1)).fit(X, y)
fitted.predict(X, return_std=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_memory_of_many_rows_is_bounded():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[-1]) < 280e3  # kB; the covariance of all rows alone would take 648e3


# ----------------------------------------------------------------------------------------------------- another library


def test_gpboost_agrees(alone):
    gpboost = pytest.importorskip("gpboost", reason="GPBoost is not installed")
    x, y = data(300)
    m, theta = 8, thetas()
    peer = gpboost.GPModel(
        gp_coords=x.numpy(),
        cov_function="exponential",
        gp_approx="vecchia",
        num_neighbors=m,
        vecchia_ordering="none",
        likelihood="gaussian",
    )
    cov_pars = np.array([THETA["noise"], THETA["amplitude"], THETA["length"]])
    theirs = -peer.neg_log_likelihood(cov_pars=cov_pars, y=(y - THETA["centre"]).numpy())

    def euclidean(x, y):
        gap = (x[..., :, None, :] - x[..., None, :, :]).square().sum(-1)
        gap = torch.where(gap > 0, gap, 1.0).sqrt() * (gap > 0)
        cov = theta["amplitude"] * torch.exp(-gap / theta["length"])
        cov = cov + theta["noise"] * torch.eye(x.shape[-2], dtype=x.dtype)
        pyro.sample("y", dist.MultivariateNormal(theta["centre"] * torch.ones_like(y), cov), obs=y)

    near = read(m, euclidean, (x, y), ordering="given")
    with torch.no_grad():
        assert float(near.score()) == pytest.approx(theirs, abs=1e-6)
