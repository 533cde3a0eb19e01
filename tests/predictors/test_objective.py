"""What a training maximises: totals of batches against dense algebra, and what each way's schedule goes through."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import multivariate_normal
from torch.distributions import constraints

from bayes_mpt.masks import LeaveOneOut, PermutationChain, UniformSize
from bayes_mpt.models import PPCA, GaussianProcess
from bayes_mpt.predictors import Batch, Importance, NearestNeighbors, Quadrature, choose
from bayes_mpt.program.program import ModelError
from bayes_mpt.score import CumulativeMaskedScore

X = torch.as_tensor(
    np.random.default_rng(0).normal(size=(12, 3)) @ [[1.0, 0.5, 0.2], [0, 1, 0.3], [0, 0, 0.7]]
)


@pytest.fixture(autouse=True)
def own_store():
    with pyro.get_param_store().scope():
        torch.default_generator.manual_seed(0)
        yield


def number(total):
    return float(total.detach())


def gaussian(x):
    slope = pyro.param("slope", lambda: x.new_tensor([0.5, -1.0, 0.8]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(slope * z[..., None], 0.6).to_event(1), obs=x)


def log_densities(rows):
    slope = np.array([0.5, -1.0, 0.8])
    return multivariate_normal(np.zeros(3), np.outer(slope, slope) + 0.36 * np.eye(3)).logpdf(rows.numpy())


def binary(x):
    slope = pyro.param("slope", lambda: x.new_tensor([0.5, -1.0, 0.8]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Bernoulli(logits=slope * z[..., None]).to_event(1), obs=x)


def guide(x, visible):
    pull = pyro.param("pull", lambda: x.new_zeros(3))
    width = pyro.param("width", lambda: x.new_tensor(0.8), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal((x * visible) @ pull, width))


def one_level(x):
    spread = pyro.param("spread", lambda: x.new_tensor(1.0), constraint=constraints.positive)
    level = pyro.sample("level", dist.Normal(x.new_zeros(3), spread).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Bernoulli(logits=level.cumsum(-1)).to_event(1), obs=x)


def test_totals_of_rows_weighted_rows_and_parts():
    want, weight = log_densities(X), torch.arange(12.0, dtype=torch.float64)
    bound = choose(gaussian, (X,))
    (objective,) = bound.schedule(Batch((X,), 12), None)
    assert not objective.noisy
    assert number(objective()) == pytest.approx(want.sum(), rel=1e-12)
    parts = [objective(objective.whole.take(i)) for i in torch.arange(12).split(5)]
    assert number(sum(parts)) == pytest.approx(want.sum(), rel=1e-12)
    (weighted,) = bound.schedule(Batch((X,), 66, X, weight), None)
    assert number(weighted()) == pytest.approx(want @ weight.numpy(), rel=1e-12)
    # rows drawn by their weights, whose mean is the weighted mean: over all draws each row as often as it weighs
    some = weighted.sample(20_000, torch.Generator().manual_seed(0))
    assert number(weighted(some)) / some.n_rows == pytest.approx(want @ weight.numpy() / 66, abs=0.05)


def test_scales_are_counted():
    def scaled(x):
        with pyro.poutine.scale(scale=2.5):
            gaussian(x)

    (objective,) = choose(scaled, (X,)).schedule(Batch((X,), 12), None)
    assert number(objective()) == pytest.approx(2.5 * log_densities(X).sum(), rel=1e-12)


def test_terms_of_a_long_vector_add_up_to_it_on_average():
    x = torch.linspace(0, 20, 80, dtype=torch.float64)[:, None]
    args = x, torch.sin(x[:, 0])
    (objective,) = (
        NearestNeighbors(4).bind(GaussianProcess(), args).schedule(Batch(args, 1), PermutationChain())
    )
    with torch.no_grad():
        whole = number(objective())
        assert float(objective(objective.sample(80, torch.Generator().manual_seed(0)))) == pytest.approx(
            whole
        )
        draws = [float(objective(objective.sample(25, torch.Generator().manual_seed(s)))) for s in range(40)]
    assert abs(np.mean(draws) - whole) < 4 * np.std(draws) / np.sqrt(40)
    assert np.std(draws) > 0


def test_rows_of_one_vector_are_no_batch():
    (objective,) = Quadrature(6).bind(one_level, ((X > 0).double(),)).schedule(Batch((X,), 1), None)
    with pytest.raises(ModelError, match="batch_size=4 needs independent rows"):
        objective.sample(4, torch.Generator())


BITS = (X > 0).double()


@pytest.mark.parametrize(
    "bound, masks, noisy",
    [
        (lambda: choose(PPCA(1), (X,)), None, [False]),
        (lambda: choose(PPCA(1), (X,)), UniformSize(2), [True]),
        (lambda: Quadrature(8).bind(binary, (BITS,)), None, [False]),
        (lambda: Importance(4).bind(binary, (BITS,)), None, [True]),
        (lambda: Importance(4).bind(one_level, (BITS,)), None, [False]),  # climbs Laplace's approximation
        (lambda: Importance(4).bind(one_level, (BITS,)), PermutationChain(), [True]),
        (lambda: Importance(30, 10).bind(binary, (BITS,), guide), None, [True] * 3),
        (lambda: choose(network, (X,)), None, [True]),
        (lambda: choose(network, (X,)), LeaveOneOut(), [False]),
    ],
)
def test_what_takes_steps(bound, masks, noisy):
    """An objective is noisy where two calls differ."""
    rows = X if bound().structure.n_tokens == 3 and bound().name in ("Exact", "SelfPredictive") else BITS
    found = bound().schedule(Batch((rows,), len(rows)), masks)
    assert [o.noisy for o in found] == noisy
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        first, second = (float(found[-1](None, generator if found[-1].noisy else None)) for _ in range(2))
    assert (abs(first - second) > 1e-8) == noisy[-1]


def network(x, visible):
    slope = pyro.param("slope", lambda: x.new_tensor(0.4))
    mean = x.sum(1, keepdim=True) / visible.sum(1, keepdim=True).clamp(min=1)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(slope * mean, 1.0).expand(x.shape).to_event(1), obs=x)


def test_draws_grow_along_a_schedule():
    found = Importance(100).bind(binary, (BITS,), guide).schedule(Batch((BITS,), 12), None)
    assert [o.bound.read((BITS,)).evidence().diagnostics["num_particles"] for o in found] == [1, 3, 10]


def test_a_slow_program_says_so_where_it_is_bound():
    def branching(x, y):
        weight = pyro.sample("weight", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        sign = 1.0 if bool((weight == weight).all()) else -1.0
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=sign * x @ weight), obs=y)

    for predictor in (Quadrature(4), Importance(4)):
        with pytest.warns(UserWarning, match="not run on several nodes at once"):
            predictor.bind(branching, (X, BITS[:, 0]))


def test_dreams_move_the_guide_alone():
    """The loss is the same number with dreams and without, and so is the program's gradient."""
    found = []
    for dream in (False, True):
        with pyro.get_param_store().scope():
            torch.manual_seed(0)
            elbo = CumulativeMaskedScore(predictor=Importance(5, dream=dream), random_state=0)
            value = elbo.loss_and_grads(binary, guide, BITS)
            grads = {n: p.grad.clone() for n, p in pyro.get_param_store().named_parameters()}
        found.append((value, grads))
    (plain, without), (dreaming, with_dreams) = found
    assert plain == dreaming
    assert torch.allclose(without["slope"], with_dreams["slope"], rtol=1e-12)
    assert not torch.allclose(without["pull"], with_dreams["pull"], rtol=1e-3)
