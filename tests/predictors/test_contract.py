"""What every way of scoring owes: rows of its own, its parameters or a refusal, defaults that add up; all nine ways."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.special import betaln

from bayes_mpt.masks import Blocks, EverySize, LeaveOneOut, PermutationChain, UniformSize
from bayes_mpt.predictors import (
    AnnealedImportance,
    Bound,
    Conditionals,
    Exact,
    Importance,
    NearestNeighbors,
    Posterior,
    Predictor,
    Quadrature,
    SelfPredictive,
    SequentialMonteCarlo,
    choose,
)
from bayes_mpt.program.program import ModelError
from bayes_mpt.program.store import OwnStore
from bayes_mpt.score import CumulativeMaskedScore, estimate

F64 = torch.float64
T = 3
X = torch.tensor([[0.3, -1.0, 0.7], [1.5, 2.0, 1.2], [-0.4, 0.1, math.nan]], dtype=F64)
VISIBLE = torch.tensor([[True, False, False], [False, False, False], [True, True, False]])
SLOPE = 0.8


@pytest.fixture(autouse=True)
def store():
    with OwnStore():
        torch.default_generator.manual_seed(0)
        yield


# ------------------------------------------------------------- one density, x ~ N(0, slope^2 11' + I), by all ways


def one_latent(x):
    slope = pyro.param("slope", torch.tensor(SLOPE, dtype=F64))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal((slope * z)[..., None], 1.0).expand([*z.shape, T]).to_event(1), obs=x)


def posterior(x, visible=None):
    """N(slope sum x / (1 + slope^2 n), 1 / (1 + slope^2 n)): importance weights that do not vary."""
    slope = pyro.param("slope", torch.tensor(SLOPE, dtype=F64))
    shown = torch.ones_like(x) if visible is None else visible.to(x)
    precision = 1 + slope**2 * shown.sum(-1)
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(slope * (x * shown).sum(-1) / precision, precision.rsqrt()))


def network(x, visible):
    """The conditionals of the same density: mean and variance of a token given the visible others."""
    slope = pyro.param("slope", torch.tensor(SLOPE, dtype=F64))
    others = visible.to(x)[:, None] * (1 - torch.eye(T, dtype=x.dtype))  # (N, T, T)
    precision = 1 + slope**2 * others.sum(-1)
    mean = slope**2 * (others @ x[..., None])[..., 0] / precision
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mean, (1 + slope**2 / precision).sqrt()).to_event(1), obs=x)


def truth(row, shown):
    """log p of the tokens shown."""
    on = np.flatnonzero(shown & ~np.isnan(row))
    cov = SLOPE**2 + np.eye(len(on))
    return stats.multivariate_normal(np.zeros(len(on)), cov).logpdf(row[on]) if len(on) else 0.0


def truths(visible):
    """(S, N, T)."""
    out = np.zeros((len(visible), *X.shape))
    for s, mask in enumerate(visible.numpy()):
        for n, row in enumerate(X.numpy()):
            for t in np.flatnonzero(~mask & ~np.isnan(row)):
                out[s, n, t] = truth(row, mask | (np.arange(T) == t)) - truth(row, mask)
    return out


LML = np.array([truth(row, np.ones(T, dtype=bool)) for row in X.numpy()])
WAYS = {
    "closed form": (one_latent, "auto", None),
    "exact": (one_latent, Exact(), None),
    "quadrature": (one_latent, Quadrature(20), None),
    "importance": (
        one_latent,
        Importance(5),
        posterior,
    ),  # whole sets of tokens without error, single ones not
    "annealed": (one_latent, AnnealedImportance(3, 3), posterior),
    "network": (network, SelfPredictive(2), None),
}


def read_by(way, rows=X):
    program, predictor, guide = WAYS[way]
    return choose(program, (rows,), predictor=predictor, guide=guide).read((rows,))


@pytest.mark.parametrize("way", WAYS)
def test_all_ways_give_the_same_numbers(way):
    read = read_by(way)
    tol = {"quadrature": 1e-7, "annealed": 1e-7}.get(way, 1e-9)
    with torch.no_grad():
        np.testing.assert_allclose(read.score(), LML, atol=tol)
        for order in ([2, 0, 1], [0, 1, 2]):
            steps = read.chain(torch.tensor([order]))[0]
            np.testing.assert_allclose(steps.sum(1), LML, atol=tol)
            for k, t in enumerate(order):
                shown = torch.zeros(1, T, dtype=torch.bool)
                shown[0, order[:k]] = True
                np.testing.assert_allclose(steps[:, t], truths(shown)[0, :, t], atol=tol)
        np.testing.assert_allclose(read.score(PermutationChain(2).draw(T, 0)), LML, atol=tol)
        found = read.evidence(torch.tensor([[0, 1, 2], [2, 1, 0]]))
        np.testing.assert_allclose(found.by_row, LML, atol=tol)
        assert found.se <= 1e-6 and (found.exact == (way in ("closed form", "exact")))
        if way in ("importance", "annealed"):
            return
        np.testing.assert_allclose(read.conditionals(VISIBLE), truths(VISIBLE), atol=tol)
        draw = UniformSize(3).draw(T, 0)
        want = (truths(draw.visible) * draw.weight.numpy()[:, None]).sum((0, 2))
        np.testing.assert_allclose(read.score(draw), want, atol=tol)
        # of the third token of the last row: slope^2 / (1 + 2 slope^2) times the sum of the others
        mean = SLOPE**2 * float(X[2, :2].sum()) / (1 + 2 * SLOPE**2)
        assert float(read.posterior().tokens[2, 2]) == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("way", ["closed form", "quadrature", "network"])
def test_gradients_reach_the_parameters(way):
    """d log p / d slope by differences of the dense density."""
    score = read_by(way).score().sum()
    leaf = dict(pyro.get_param_store().named_parameters())["slope"]
    (got,) = torch.autograd.grad(score, leaf)

    def total(slope):
        cov = slope**2 + np.eye(T)
        return sum(
            stats.multivariate_normal(np.zeros(k), cov[:k, :k]).logpdf(row[:k])
            for row, k in zip(X.numpy(), (3, 3, 2), strict=True)
        )

    want = (total(SLOPE + 1e-5) - total(SLOPE - 1e-5)) / 2e-5
    assert float(got) == pytest.approx(want, rel=1e-6, abs=1e-6)


def test_blocks_are_for_programs_that_are_conditioned_on_the_mask():
    blocks = Blocks(EverySize(), [0, 0, 1])
    with torch.no_grad():
        estimate(read_by("network"), blocks, n_replicates=2)
        with pytest.raises(ValueError, match="Blocks"):
            estimate(read_by("closed form"), blocks)
        with pytest.raises(ValueError, match="LML"):
            estimate(read_by("closed form"), LeaveOneOut())


# ----------------------------------------------------------------------------------- latents that all rows share


def coin(x):
    p = pyro.sample("p", dist.Beta(x.new_tensor(2.0), x.new_tensor(3.0)))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Bernoulli(p), obs=x)


HEADS = torch.tensor([1.0, 0.0, math.nan, 1.0, 1.0], dtype=F64)


def log_beta(heads, tails):
    return betaln(2 + heads, 3 + tails) - betaln(2, 3)


@pytest.mark.parametrize(
    "predictor", [Quadrature(), SequentialMonteCarlo(256, 4)], ids=["quadrature", "particles"]
)
def test_one_vector_with_a_missing_token(predictor):
    read = choose(coin, (HEADS,), predictor=predictor).read((HEADS,))
    tol = 1e-6 if isinstance(predictor, Quadrature) else 0.1
    with torch.no_grad():
        found = read.evidence()
        assert float(found.by_row) == pytest.approx(log_beta(3, 1), abs=max(1e-6, 4 * found.se))
        visible = torch.tensor([[True, True, True, False, False]])
        single = log_beta(2, 1) - log_beta(1, 1)
        np.testing.assert_allclose(read.conditionals(visible)[0, 0], [0, 0, 0, single, single], atol=tol)
        steps = read.chain(torch.tensor([[4, 2, 1, 0, 3]]))[0, 0]
        want = [
            log_beta(2, 1) - log_beta(1, 1),
            log_beta(1, 1) - log_beta(1, 0),
            0,
            log_beta(3, 1) - log_beta(2, 1),
        ]
        np.testing.assert_allclose(steps[[0, 1, 2, 3]], want, atol=tol)
        given = read.posterior()
        assert float(given.mean) == pytest.approx(5 / 9, abs=tol)
        weight, values = zip(*given.shared(), strict=True)
        mean = sum(w * float(v["p"]) for w, v in zip(weight, values, strict=True))
        assert mean == pytest.approx(5 / 9, abs=tol)


# -------------------------------------------------------------------------------- what was read, and its parameters


def process(x, y):
    cov = pyro.param("scale", torch.tensor(2.0, dtype=F64)) * torch.exp(-torch.cdist(x, x))
    pyro.sample(
        "y", dist.MultivariateNormal(torch.zeros_like(y), cov + torch.eye(x.shape[-2], dtype=F64)), obs=y
    )


INPUTS = torch.linspace(0, 3, 7, dtype=F64)[:, None]
SERIES = INPUTS.sin()[:, 0]
LATE = {
    "quadrature": (one_latent, (X,), Quadrature(8), None, lambda read: read.conditionals(VISIBLE)),
    "importance": (one_latent, (X,), Importance(5), posterior, lambda read: read.conditionals(VISIBLE)),
    "network": (network, (X,), SelfPredictive(1), None, lambda read: read.score()),
    "neighbours": (process, (INPUTS, SERIES), NearestNeighbors(3), None, lambda read: read.score()),
    "process": (process, (INPUTS, SERIES), "auto", None, lambda read: read.predict((INPUTS + 0.1, SERIES))),
}


@pytest.mark.parametrize("way", LATE)
def test_asked_after_its_store_is_gone_it_refuses(way):
    """What runs the program when it is asked would start again from initial values."""
    program, args, predictor, guide, ask = LATE[way]
    with OwnStore(), torch.no_grad():
        read = choose(program, args, predictor=predictor, guide=guide).read(args)
        ask(read)
    with pytest.raises(ModelError, match="no longer holds"):
        ask(read)
    with OwnStore(), pytest.raises(ModelError, match="no longer holds"):
        pyro.param("slope", torch.tensor(0.1, dtype=F64))
        pyro.param("scale", torch.tensor(0.1, dtype=F64))
        ask(read)


def test_what_was_found_of_one_reading_is_no_other_ones():
    """Posterior means of m given b, whatever was asked of a before."""

    def program(x):
        m = pyro.sample("m", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    a = torch.full((20,), 2.0, dtype=F64)
    bound = SequentialMonteCarlo(64, 4).bind(program, (a,))
    of_a, of_b = bound.read((a,)), bound.read((-a,))
    of_a.evidence()
    assert float(of_b.posterior().mean) == pytest.approx(-40 / 21, abs=0.1)
    assert float(of_a.posterior().mean) == pytest.approx(40 / 21, abs=0.1)


def test_other_rows_of_maps_that_all_rows_share():
    with torch.no_grad():
        read = read_by("closed form")
        np.testing.assert_allclose(read.at(X[1:]).score(), LML[1:], atol=1e-9)
        np.testing.assert_allclose(read.score(), LML, atol=1e-9)
        with pytest.raises(ModelError, match=r"call read\(args\) with the others"):
            read_by("quadrature").at(X)


# ----------------------------------------------------------------------------------------- a predictor of one's own


class Dense(Predictor):
    """Gaussian tokens of a known covariance: what a way has to say at the least."""

    def bind(self, model, args, guide=None):
        return _Dense(model)


class _Dense(Bound):
    name = "Dense"

    def __init__(self, model):
        self.model, self.structure = model, Exact().bind(model, (X,)).structure

    def read(self, args):
        return _DenseRows(self.structure, args[0], pyro.param("slope"))


class _DenseRows(Conditionals):
    def __init__(self, structure, rows, slope):
        self.structure, self.value = structure, rows
        self.cov = slope**2 + torch.eye(T, dtype=F64)

    def _moments(self, row, shown):
        gain = self.cov[:, shown] @ torch.linalg.inv(self.cov[shown][:, shown])
        return gain @ row[shown], self.cov.diagonal() - (gain * self.cov[:, shown]).sum(1)

    def conditionals(self, visible):
        out = torch.zeros(len(visible), *self.value.shape, dtype=F64)
        for s, mask in enumerate(visible):
            for n, row in enumerate(self.value):
                mean, var = self._moments(row, mask & ~row.isnan())
                var = torch.where(mask | row.isnan(), 1.0, var)
                found = -0.5 * ((row.nan_to_num() - mean).square() / var + (2 * math.pi * var).log())
                out[s, n] = torch.where(mask | row.isnan(), 0.0, found)
        return out

    def posterior(self, visible=None):
        shown = ~self.value.isnan() if visible is None else visible & ~self.value.isnan()
        means = [self._moments(row, on)[0] for row, on in zip(self.value, shown, strict=True)]
        return Posterior(self.value.new_zeros(len(self.value), 0), torch.stack(means))


def test_a_predictor_of_ones_own_needs_conditionals_and_a_posterior():
    WAYS["own"] = (one_latent, Dense(), None)
    try:
        with torch.no_grad():
            read = read_by("own")
            np.testing.assert_allclose(read.score(), LML, atol=1e-9)
            np.testing.assert_allclose(read.chain(torch.tensor([[2, 0, 1]])).sum(-1)[0], LML, atol=1e-9)
            found = estimate(read, PermutationChain(), n_replicates=2, random_state=0)
            np.testing.assert_allclose(found.lml, LML, atol=1e-9)
        loss = CumulativeMaskedScore(UniformSize(4), Dense(), random_state=0).differentiable_loss(
            one_latent, None, X
        )
        (slope,) = torch.autograd.grad(loss, dict(pyro.get_param_store().named_parameters())["slope"])
        assert math.isfinite(float(slope))
    finally:
        del WAYS["own"]
