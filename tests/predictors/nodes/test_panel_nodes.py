"""One latent that jumps or bends: training, conditionals, chains and posteriors against dense quadrature."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from scipy.stats import norm

from bayes_mpt import BayesMPT
from bayes_mpt.masks import UniformSize
from bayes_mpt.predictors.choice import choose
from bayes_mpt.score import CumulativeMaskedScore
from bayes_mpt.warnings import NotConvergedWarning

F64 = torch.float64
Y = np.random.default_rng(0).normal(size=(4, 3))
SLOPES = np.array([1.0, 0.5, -1.0])  # of three tokens
AT = np.array([0.15, 0.7, 0.6])  # where it jumps or bends, its height, noise
MEANS = {
    "a jump that moves": (lambda z, c, b: torch.where(z > c, b, -b), lambda z, c, b: np.where(z > c, b, -b)),
    "a jump in place": (
        lambda z, c, b: torch.where(z > 0.15, b * z, -b) + c,
        lambda z, c, b: np.where(z > 0.15, b * z, -b) + c,
    ),
    "a bend": (lambda z, c, b: b * (z - c).abs(), lambda z, c, b: b * np.abs(z - c)),
}


@pytest.fixture(autouse=True)
def no_parameters_of_others():
    pyro.clear_param_store()


def parameters():
    c, b, s = AT
    positive = dist.constraints.positive
    return (
        pyro.param("c", torch.tensor(c)),
        pyro.param("b", torch.tensor(b)),
        pyro.param("s", torch.tensor(s), constraint=positive),
    )


def of_rows(mean, many=False):
    """A latent of each row; ``many`` numbers say where it jumps, or one."""

    def model(x):
        c, b, s = parameters()
        c = 0.01 * pyro.param("many", x.new_ones(20)).sum() if many else c
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            tokens = mean(z, c, b)[..., None] * torch.as_tensor(SLOPES)
            pyro.sample("y", dist.Normal(tokens, s).to_event(1), obs=x)

    return model


def of_all(mean):
    def model(x):
        c, b, s = parameters()
        z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(mean(z, c, b), s), obs=x[:, 0])

    return model


def dense(mean, y, slopes, at, visible):
    """log Z, and E[z], of each row of y (N, T), by Gauss and Legendre's rule between the places of the jumps."""
    c, b, s = at
    ends = np.unique(np.r_[np.linspace(-9, 9, 73), c, 0.15])
    t, w = np.polynomial.legendre.leggauss(12)
    half = 0.5 * np.diff(ends)[:, None]
    z, w = ((half * t + ends[:-1, None] + half).ravel(), (half * w).ravel())
    log_p = norm.logpdf(z) + np.log(w)
    each = norm.logpdf(y[:, visible, None], mean(z, c, b) * slopes[visible, None], s).sum(1) + log_p
    log_z = logsumexp(each, axis=1) if visible.any() else np.zeros(len(y))
    return log_z, np.exp(each - logsumexp(each, axis=1, keepdims=True)) @ z


def both(level, kind):
    """A program, its rows, and the truth for a table (N, T)."""
    mean, same = MEANS[kind]
    if level == "of rows":
        return of_rows(mean), torch.as_tensor(Y[:2]), lambda at, seen: dense(same, Y[:2], SLOPES, at, seen)
    y = Y[:2].reshape(1, -1)
    return of_all(mean), torch.as_tensor(y.T), lambda at, seen: dense(same, y, np.ones(6), at, seen)


@pytest.mark.parametrize(
    ("kind", "level"),
    [
        ("a jump that moves", "of rows"),
        ("a jump that moves", "of all"),
        ("a jump in place", "of rows"),
        ("a bend", "of all"),
    ],
)
def test_scores_slopes_steps_and_posteriors(kind, level):
    model, x, truth = both(level, kind)
    read = choose(model, (x,)).read((x,))
    n_tokens = read.value.shape[1]
    everything = np.ones(n_tokens, dtype=bool)
    score = read.score()
    np.testing.assert_allclose(score.detach(), truth(AT, everything)[0], atol=1e-8)

    score.sum().backward()
    leaf = dict(pyro.get_param_store().named_parameters())
    slopes = np.array([float(leaf[name].grad) for name in "cbs"]) / [1, 1, AT[2]]
    steps = 1e-5 * np.eye(3)
    want = [sum(side * truth(AT + side * h, everything)[0].sum() for side in (1, -1)) / 2e-5 for h in steps]
    np.testing.assert_allclose(slopes, want, atol=5e-5)

    few = everything.copy()
    few[-2:] = False
    before, mean = truth(AT, few)
    with torch.no_grad():
        found = read.conditionals(torch.as_tensor(few)[None])[0]
        chain = read.chain(torch.arange(n_tokens)[None])[0]
        posterior = read.posterior(torch.as_tensor(few)).mean
    for token in (n_tokens - 2, n_tokens - 1):
        more = few.copy()
        more[token] = True
        np.testing.assert_allclose(found[:, token], truth(AT, more)[0] - before, atol=1e-6)
    by_step = np.stack([truth(AT, np.arange(n_tokens) < t)[0] for t in range(n_tokens + 1)], 1)
    np.testing.assert_allclose(chain, np.diff(by_step), atol=5e-5)
    np.testing.assert_allclose(posterior[:, 0], mean, atol=1e-6)


@pytest.mark.slow
def test_the_masked_loss_and_its_slopes():
    model, x, truth = both("of rows", "a jump that moves")
    loss = CumulativeMaskedScore(UniformSize(2), random_state=0).differentiable_loss(model, None, x)
    loss.backward()
    masks = UniformSize(2).draw(3, torch.Generator().manual_seed(0))
    slope = float(dict(pyro.get_param_store().named_parameters())["c"].grad)

    def wanted(at):
        total = 0.0
        for seen, weight in zip(masks.visible.numpy(), masks.weight.numpy(), strict=True):
            for token in np.flatnonzero(~seen):
                more = seen.copy()
                more[token] = True
                total -= weight[token] * (truth(at, more)[0] - truth(at, seen)[0]).sum()
        return total

    assert float(loss.detach()) == pytest.approx(wanted(AT), abs=1e-6)
    step = np.array([1e-5, 0, 0])
    assert slope == pytest.approx((wanted(AT + step) - wanted(AT - step)) / 2e-5, abs=1e-4)


@pytest.mark.slow
def test_a_training_moves_a_jump_to_the_maximum():
    y = np.random.default_rng(2).normal(size=12) + np.where(np.arange(12) < 9, 1, -1)

    def model(x):
        c = pyro.param("c", x.new_tensor(0.0))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.sample("y", dist.Normal(torch.where(z > c, 1.0, -1.0).to(x), 1.0), obs=x[:, 0])

    def loss(c):  # a mixture of two
        return -np.logaddexp(norm.logsf(c) + norm.logpdf(y, 1), norm.logcdf(c) + norm.logpdf(y, -1)).sum()

    best = minimize_scalar(loss, bounds=(-5, 5), method="bounded", options={"xatol": 1e-8})
    found = BayesMPT(model).fit(y[:, None])
    assert found.log_marginal_likelihood_ == pytest.approx(-best.fun, abs=1e-5)
    assert found.params_["c"] == pytest.approx(best.x, abs=1e-3)


def test_jumps_that_too_many_parameters_move_are_named():
    y = torch.as_tensor(Y[:, :1])

    def model(x):
        c = pyro.param("c", 0.01 * torch.arange(20, dtype=F64)).sum()
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.sample("y", dist.Normal(torch.where(z > c, 1.0, -1.0).to(x), 1.0), obs=x[:, 0])

    bound = choose(model, (y,))
    with pytest.warns(NotConvergedWarning, match="density of z jumps where parameters say"):
        bound.read((y,)).score()


def two_of_rows(mean):
    def model(x):
        c, b, s = parameters()
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            tokens = (mean(z[..., 0], c, b) + torch.tanh(z[..., 1]))[..., None].expand(*z.shape[:-1], 3)
            pyro.sample("y", dist.Normal(tokens, s).to_event(1), obs=x)

    return model


def inside_of_all(mean):
    def model(x):
        c, b, s = parameters()
        w = pyro.sample("w", dist.LogNormal(x.new_tensor(0.0), 0.5))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            tokens = (w * mean(z, c, b))[..., None] * torch.as_tensor(SLOPES)
            pyro.sample("y", dist.Normal(tokens, s).to_event(1), obs=x)

    return model


def of_many_numbers(mean):
    return of_rows(mean, many=True)


@pytest.mark.slow
@pytest.mark.parametrize("level", [two_of_rows, inside_of_all, of_many_numbers])
def test_trainings_that_go_by_nodes_between_jumps_say_so_once(level):
    """Of two latents, of rows inside of latents that all share, of more numbers than differences are taken of."""
    x = torch.as_tensor(Y if level is of_many_numbers else Y[:2])
    smooth = level(lambda z, c, b: c + b * torch.sigmoid(z))
    choose(smooth, (x,)).read((x,)).score().sum().backward()  # a warning fails the run

    pyro.clear_param_store()
    bound = choose(level(MEANS["a jump in place"][0]), (x,))
    with pytest.warns(NotConvergedWarning, match="density of z jumps or bends.* nats off") as told:
        bound.read((x,)).score().sum().backward()
    assert len(told) == 1
    bound.read((x,)).score()  # not again


@pytest.mark.slow
def test_a_cliff_at_whose_edge_a_mode_is_found():
    """Logits of a billion z and more, as a fit may end with: a token is 0 to one side of 0 and 1 to the other."""
    slopes = np.array([0.26, -3.4e11, 0.37, 0.85, -0.11])
    x = np.array([[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 1, 0, 1], [1, 1, 0, 1, 1], [1, 1, 1, 0, 1]], float)

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            logits = z[..., None] * torch.as_tensor(slopes)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    z = np.linspace(0, 12, 24001)
    z = np.where(x[:, 1:2] == 1, -z, z)  # on this side alone it can be
    log_prob = norm.logpdf(z)
    for t in (0, 2, 3, 4):
        log_prob = log_prob - np.logaddexp(0, (1 - 2 * x[:, t : t + 1]) * slopes[t] * z)
    log_prob[:, [0, -1]] -= np.log(2)
    truth = logsumexp(log_prob, axis=1) + np.log(12 / 24000)
    fitted = BayesMPT(model).fit(x)
    assert fitted.score_samples(x) == pytest.approx(truth, abs=1e-7)
    assert fitted.log_marginal_likelihood_ == pytest.approx(truth.sum(), abs=1e-6)
