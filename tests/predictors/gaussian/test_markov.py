"""Chains of latents, against dense algebra, many digits, statsmodels and Pyro's own hidden Markov model."""

from __future__ import annotations

import warnings

import mpmath
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import statsmodels.api as sm
import torch
from torch.distributions import constraints

from bayes_mpt import BayesMPT
from bayes_mpt.masks import PermutationChain, UniformSize
from bayes_mpt.predictors import LinearGaussian, MarkovGaussian, choose
from bayes_mpt.predictors.gaussian.markov import MarkovRows
from bayes_mpt.program.affine import sparse
from bayes_mpt.program.program import ModelError
from bayes_mpt.score import CumulativeMaskedScore

F64 = torch.float64


@pytest.fixture(autouse=True)
def _fresh():
    pyro.clear_param_store()
    torch.default_generator.manual_seed(0)


@pytest.fixture
def always(monkeypatch):
    """Take the chain however small the program."""
    monkeypatch.setattr(sparse, "costs", lambda *args: (1.0, 0.0))


# ------------------------------------------------------------------------------------------------------ programs


def level(x):
    """One series, one site a step; an AR(1) with a drift."""
    q = pyro.param("q", torch.tensor(0.7, dtype=F64), constraint=constraints.positive)
    phi = pyro.param("phi", torch.tensor(0.9, dtype=F64))
    z = x.new_tensor(3.0)
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Normal(phi * z, q))
        pyro.sample(f"x_{t}", dist.Normal(z + 0.1 * t, 0.5), obs=x[t])


def trends(x):
    """A series in each row: level and slope."""
    q = pyro.param("q", torch.tensor([0.7, 0.3], dtype=F64))
    with pyro.plate("rows", len(x)):
        up = pyro.sample("up_0", dist.Normal(x.new_tensor(0.5), 1.0))
        z = pyro.sample("z_0", dist.Normal(x.new_tensor(3.0), 2.0))
        for t in range(x.shape[1]):
            if t:
                z = pyro.sample(f"z_{t}", dist.Normal(z + up, q[0]))
                up = pyro.sample(f"up_{t}", dist.Normal(0.9 * up, q[1]))
            pyro.sample(f"x_{t}", dist.Normal(z, 0.5), obs=x[:, t])


def system(x):
    """A linear dynamical system with correlated noise and a start at which slopes are zero."""
    step = pyro.param("step", 0.9 * torch.eye(3, dtype=F64))
    look = pyro.param("look", lambda: torch.randn(2, 3, dtype=F64))
    root = pyro.param("root", torch.eye(3, dtype=F64) + 0.1)
    mean = x.new_zeros(3)
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.MultivariateNormal(mean, root @ root.T))
        pyro.sample(f"x_{t}", dist.Normal(look @ z, 0.5).to_event(1), obs=x[t])
        mean = step @ z


def lags(x):
    """An AR(2), all tokens in one site."""
    a = pyro.param("a", torch.tensor([0.5, 0.3], dtype=F64))
    z = [x.new_zeros(()), x.new_zeros(())]
    for t in range(len(x)):
        z.append(pyro.sample(f"z_{t}", dist.Normal(a[0] * z[-1] + a[1] * z[-2], 1.0)))
    with pyro.plate("time", len(x)):
        pyro.sample("x", dist.Normal(torch.stack(z[2:]), 0.3), obs=x)


def one_after_the_other(x):
    """All slopes first, then all levels: the program's order is no chain."""
    q = pyro.param("q", torch.tensor(0.1, dtype=F64))
    up, z = [], []
    for t in range(len(x)):
        up.append(pyro.sample(f"up_{t}", dist.Normal(up[-1] if t else x.new_zeros(()), q)))
    for t in range(len(x)):
        z.append(pyro.sample(f"z_{t}", dist.Normal(z[-1] + up[t - 1] if t else x.new_zeros(()), 0.5)))
    with pyro.plate("time", len(x)):
        pyro.sample("x", dist.Normal(torch.stack(z), 0.3), obs=x)


def shocks(x):
    """A moving average: latents in one site, that know nothing of each other."""
    b = pyro.param("b", torch.tensor(0.0, dtype=F64))
    with pyro.plate("shocks", len(x)):
        e = pyro.sample("e", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("time", len(x)):
        pyro.sample("x", dist.Normal(e + b * torch.cat([e[:1] * 0, e[:-1]]), 0.3), obs=x)


def by_covariate(x, u):
    """A series in each row, with a covariate that makes the maps differ."""
    beta = pyro.param("beta", torch.tensor(0.4, dtype=F64))
    with pyro.plate("rows", len(x)):
        z = u.new_zeros(len(x))
        for t in range(x.shape[1]):
            z = pyro.sample(f"z_{t}", dist.Normal(z * u, 1.0))
            pyro.sample(f"x_{t}", dist.Normal(z + beta * u, 0.5), obs=x[:, t])


PROGRAMS = {
    "level": (level, (21,), 1),
    "trends": (trends, (5, 18), 2),
    "system": (system, (13, 2), 3),
    "lags": (lags, (17,), 2),
    "one after the other": (one_after_the_other, (18,), 2),
    "shocks": (shocks, (17,), 1),
    "covariate": (by_covariate, (4, 17), 1),
}


def drawn(name, missing):
    """Arguments of a program."""
    model, shape, width = PROGRAMS[name]
    x = torch.randn(shape, dtype=F64) + 1
    if missing:
        x.view(-1)[[0, 3, 7, 8, 9, 15]] = torch.nan
    args = (x, torch.linspace(0.2, 0.9, len(x), dtype=F64)) if name == "covariate" else (x,)
    return model, args, width


# ------------------------------------------------------------------------------------------- against dense algebra


@pytest.mark.slow
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("name", PROGRAMS)
def test_equal_to_dense_algebra(name, missing, always):
    model, args, width = drawn(name, missing)
    chain = choose(model, args)
    assert isinstance(chain, MarkovGaussian) and chain.read(args).evidence().exact
    assert chain.read(args).reading.layout.width == width
    dense = LinearGaussian(model, args).read(args)
    chain = chain.read(args)
    x = chain.value
    assert torch.equal(x.nan_to_num(7.0), dense.value.nan_to_num(7.0))
    n_tokens = x.shape[1]
    visible = torch.rand(5, n_tokens) < 0.6
    visible[0], visible[1] = False, True
    order = torch.stack([torch.randperm(n_tokens), torch.arange(n_tokens), torch.arange(n_tokens).flip(0)])
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)  # noqa: E731
    close(chain.at(x).score(), dense.at(x).score())
    close(chain.at(x).conditionals(visible), dense.at(x).conditionals(visible))
    close(chain.at(x).chain(order), dense.at(x).chain(order))
    close(chain.at(x).chain(order).sum(-1), chain.at(x).score().expand(3, -1))
    for mask in (None, visible[2]):
        found, want = chain.at(x).posterior(mask), dense.at(x).posterior(mask)
        close(found.mean, want.mean)
        close(found.tokens, want.tokens)
    leaves = [p for _, p in pyro.get_param_store().named_parameters()]
    weight = torch.randn(5, 1, n_tokens, dtype=F64)
    scores = (
        lambda p: p.at(x).score().sum(),
        lambda p: (p.at(x).conditionals(visible) * weight).sum(),
        lambda p: (p.at(x).chain(order) * weight[:3]).sum(),
    )
    for score in scores:
        got, want = (torch.autograd.grad(score(p), leaves, retain_graph=True) for p in (chain, dense))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    if name == "trends":
        for a, b in zip(chain.linear_map()[:5], dense.reading[:5], strict=True):
            close(a, b)


@pytest.mark.parametrize("missing", [False, True])
def test_against_the_multivariate_normal(missing, always):
    """x = level of an AR(1) + noise: covariance written down by hand."""
    model, args, _ = drawn("level", missing)
    x = args[0]
    n = len(x)
    predictor = choose(model, args).read(args)
    weight = torch.tensor(
        [[0.9 ** (s - t) if t <= s else 0.0 for t in range(n)] for s in range(n)], dtype=F64
    )
    cov = 0.49 * weight @ weight.T + 0.25 * torch.eye(n, dtype=F64)
    mean = 3 * 0.9 ** torch.arange(1, n + 1, dtype=F64) + 0.1 * torch.arange(n, dtype=F64)
    seen = ~x.isnan()
    want = dist.MultivariateNormal(mean[seen], cov[seen][:, seen]).log_prob(x[seen])
    assert predictor.score().item() == pytest.approx(float(want), abs=1e-9)


@pytest.mark.slow
def test_slopes_that_are_zero_at_the_start_are_read(always):
    """Of `system`, off the diagonal: the map must follow when a training moves them."""
    model, args, _ = drawn("system", False)
    predictor = choose(model, args)
    with torch.no_grad():
        pyro.get_param_store()["step"].copy_(0.5 * torch.randn(3, 3, dtype=F64))
    x = predictor.read(args).value
    want = LinearGaussian(model, args).read(args).at(x).score()
    torch.testing.assert_close(predictor.read(args).at(x).score(), want, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_masked_scores_and_the_loss(always):
    model, args, _ = drawn("trends", True)
    draws = [UniformSize(4).draw(18, random_state=0), PermutationChain().draw(18, random_state=0)]
    chain, dense = choose(model, args).read(args), LinearGaussian(model, args).read(args)
    for draw in draws:
        got, want = (p.score(draw) for p in (chain, dense))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    loss = CumulativeMaskedScore(random_state=0)
    svi = pyro.infer.SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.01}), loss)
    losses = [svi.step(*args) for _ in range(30)]
    assert losses[-1] < losses[0]


def test_small_programs_stay_dense():
    model, args, _ = drawn("trends", False)
    assert isinstance(choose(model, args), LinearGaussian)
    x = torch.randn(30, 40, dtype=F64)

    def factors(x):
        w = pyro.param("w", lambda: torch.randn(40, 20, dtype=F64))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(20), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ w.T, 1.0).to_event(1), obs=x)

    assert isinstance(choose(factors, (x,)), LinearGaussian)
    pyro.clear_param_store()
    assert isinstance(choose(level, (torch.randn(40, dtype=F64),)), MarkovGaussian)


def test_what_is_no_chain_of_normals_is_refused(always):
    def bent(x):
        z = x.new_zeros(())
        for t in range(len(x)):
            z = pyro.sample(f"z_{t}", dist.Normal(torch.relu(z + 5), 1.0))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[t])

    def own_future(x):
        z = x.new_zeros(())
        for t in range(len(x)):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            pyro.sample(f"x_{t}", dist.Normal(z + x[t - 1], 1.0), obs=x[t])  # x[-1] is the last one

    x = torch.randn(30, dtype=F64)
    with pytest.raises(ModelError, match="is not affine in the latents z_0, z_1, z_2, ... .26 more., z_29"):
        MarkovGaussian(bent, (x,))
    with pytest.raises(ModelError, match="changes with the observed x itself"):
        MarkovGaussian(own_future, (x,))


# --------------------------------------------------------------------------------------------------- small noises


def trend_and_cycle(sd, start):
    """Level, slope and a cycle of sds (level, slope, cycle, noise): the noise is not along an axis of the latents."""

    def model(x):
        z = [x.new_tensor(0.0)] * 3
        for t in range(len(x)):
            mean = (z[0] + z[1], z[1], -0.7 * z[2]) if t else z
            scale = sd[:3] if t else (start, start, 1.0)
            z = [
                pyro.sample(f"{n}_{t}", dist.Normal(m, s)) for n, m, s in zip("abc", mean, scale, strict=True)
            ]
            pyro.sample(f"x_{t}", dist.Normal(z[0] + z[2], sd[3]), obs=x[t])

    return model


def kalman(sd, start, x):
    """Log-densities of the steps with 60 digits."""
    with mpmath.workdps(60):
        m = mpmath.matrix
        step, look = m([[1, 1, 0], [0, 1, 0], [0, 0, mpmath.mpf(-0.7)]]), m([[1, 0, 1]])
        var = [mpmath.mpf(s) ** 2 for s in (*sd, start)]
        mean, cov, out = m([0, 0, 0]), mpmath.diag([var[4], var[4], 1]), []
        for t in range(len(x)):
            if t:
                mean, cov = step * mean, step * cov * step.T + mpmath.diag(var[:3])
            s, gap = (look * cov * look.T)[0] + var[3], mpmath.mpf(float(x[t])) - (look * mean)[0]
            out.append(float(-(gap * gap / s + mpmath.log(2 * mpmath.pi * s)) / 2))
            gain = cov * look.T / s
            mean, cov = mean + gain * gap, cov - gain * (look * cov)
        return torch.tensor(out, dtype=F64)


@pytest.mark.parametrize(
    ("sd", "start"),
    [
        ((0.5, 0.1, 0.5, 1.0), 10.0),
        ((1e-8, 1e-8, 0.5, 1.0), 10.0),
        ((0.5, 0.1, 0.5, 1e-6), 10.0),
        ((1e-3, 1e-5, 1.0, 1e-8), 1e3),
        ((0.5, 0.1, 0.5, 1e-3), 1e7),
    ],
)
def test_small_noises(sd, start, always):
    x = 3 * torch.randn(20, dtype=F64)
    predictor = MarkovGaussian(trend_and_cycle(sd, start), (x,)).read((x,))
    want = kalman(sd, start, x)
    got = predictor.chain(torch.arange(20)[None])[0, 0]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert predictor.score().item() == pytest.approx(float(want.sum()), rel=1e-11)


def test_lost_digits_are_noticed(always):
    x = 3 * torch.randn(20, dtype=F64)
    predictor = MarkovGaussian(trend_and_cycle((1e-8, 1e-1, 1e-8, 1e-8), 1e6), (x,)).read((x,))
    order = torch.arange(20)[None]
    for score in (lambda: predictor.score(), lambda: predictor.chain(order)):
        with pytest.raises(ModelError, match="float64 loses digits"):
            score()


# ------------------------------------------------------------------------------------------- against other libraries


def structural(kind, start):
    """A local level, or a local linear trend, with known start N(mean, sd^2) and variances as parameters."""

    def model(x):
        noise, q, q_up = (
            pyro.param(n, x.new_tensor(v), constraint=constraints.positive)
            for n, v in (
                ("noise", 0.3 * start[1] ** 2),
                ("q", 0.1 * start[1] ** 2),
                ("q_up", 1e-4 * start[1] ** 2),
            )
        )
        z, up = x.new_tensor(start[0]), x.new_tensor(0.0)
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Normal(z + up, q.sqrt() if t else start[1]))
            if kind == "lltrend":
                up = pyro.sample(f"up_{t}", dist.Normal(up, q_up.sqrt() if t else start[1]))
            pyro.sample(
                f"x_{t}",
                dist.Normal(z, noise.sqrt()).expand([x[0].numel()]).to_event(1),
                obs=x[t].reshape(-1),
            )

    return model


def by_statsmodels(kind, start, x):
    """The same model there."""
    found = sm.tsa.UnobservedComponents(x, kind)
    k = found.ssm.k_states
    found.ssm.initialize_known(np.array([start[0], 0.0])[:k], start[1] ** 2 * np.eye(k))
    found.ssm.loglikelihood_burn = 0
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llevel", "lltrend"])
@pytest.mark.parametrize("series", ["nile", "co2"])
def test_against_statsmodels(kind, series):
    """Real series; that of CO2 has weeks without a measurement."""
    data = getattr(sm.datasets, series).load_pandas().data
    x = (data["volume"] if series == "nile" else data["co2"][:120]).to_numpy(dtype=float)
    assert np.isnan(x).any() == (series == "co2")
    start = (1000.0, 300.0) if series == "nile" else (315.0, 3.0)
    args = (torch.tensor(x),)
    predictor = choose(structural(kind, start), args)
    assert isinstance(predictor, MarkovGaussian)
    predictor = predictor.read(args)
    params = [pyro.param(n).item() for n in ("noise", "q", "q_up")][: 3 if kind == "lltrend" else 2]
    theirs = by_statsmodels(kind, start, x)
    want = theirs.loglike(params)
    got = predictor.score().item()
    assert got == pytest.approx(want, rel=1e-8 / abs(want), abs=1e-8)
    smoothed = theirs.smooth(params).smoothed_state[0]
    levels = predictor.posterior().mean[0, :: 2 if kind == "lltrend" else 1]
    np.testing.assert_allclose(levels.detach(), smoothed, rtol=1e-9)
    order = torch.arange(len(x))[None]
    steps = predictor.chain(order)[0, 0].detach().numpy()
    np.testing.assert_allclose(steps, theirs.loglikeobs(params), atol=1e-8)


@pytest.mark.slow
def test_maximum_likelihood_on_nile():
    """The variances of Durbin & Koopman (2012), 15099 and 1469, and statsmodels' at the same start."""
    x = sm.datasets.nile.load_pandas().data[["volume"]].to_numpy(dtype=float)
    start = (1000.0, 1e5)

    def model(x):
        noise = pyro.param("noise", lambda: x.var(), constraint=constraints.positive)
        q = pyro.param("q", lambda: 0.1 * x.var(), constraint=constraints.positive)
        z = x.new_tensor(start[0])
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Normal(z, q.sqrt() if t else start[1]))
            pyro.sample(f"x_{t}", dist.Normal(z, noise.sqrt()), obs=x[t, 0])

    mpt = BayesMPT(model).fit(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = by_statsmodels("llevel", start, x[:, 0])
        best = theirs.fit(start_params=[15099.0, 1469.0], disp=0, gtol=1e-10, ftol=1e-14)
    assert mpt.log_marginal_likelihood_ >= best.llf - 1e-7
    assert mpt.log_marginal_likelihood_ == pytest.approx(best.llf, abs=1e-5)
    assert float(mpt.params_["noise"]) == pytest.approx(15099, rel=2e-3)
    assert float(mpt.params_["q"]) == pytest.approx(1469, rel=5e-3)
    said = mpt.explain()
    assert "100 blocks of 1" in said and "linear in the length" in said
    assert "z_0 (1 in all)" in said and "(96 more)" in said
    assert mpt.estimate(x).exact and mpt.estimate(x).total == pytest.approx(
        mpt.log_marginal_likelihood_, abs=1e-8
    )


def test_against_the_hidden_markov_model_of_pyro(always):
    """`GaussianHMM.log_prob` of several series of several numbers, and its gradient."""
    x = torch.randn(3, 12, 2, dtype=F64)
    step, look = 0.4 * torch.randn(3, 3, dtype=F64), torch.randn(3, 2, dtype=F64)
    root = 0.5 * torch.eye(3, dtype=F64) + 0.2
    scale = torch.tensor([0.7, 1.1], dtype=F64)

    def model(x):
        a = pyro.param("a", step)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.MultivariateNormal(x.new_zeros(3), torch.eye(3, dtype=F64)))
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z_{t}", dist.MultivariateNormal(z @ a, root @ root.T))
                pyro.sample(f"x_{t}", dist.Normal(z @ look, scale).to_event(1), obs=x[:, t])

    predictor = choose(model, (x,))
    assert isinstance(predictor, MarkovGaussian)
    leaf = pyro.param("a")
    got = predictor.read((x,)).at(x.flatten(1)).score()
    a = step.clone().requires_grad_()
    start = dist.MultivariateNormal(torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64))
    walk = dist.MultivariateNormal(torch.zeros(3, dtype=F64), root @ root.T)
    noise = dist.Normal(torch.zeros(2, dtype=F64), scale).to_event(1)
    want = dist.GaussianHMM(start, a, walk, look, noise, duration=12).log_prob(x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    grads = torch.autograd.grad(got.sum(), leaf)[0], torch.autograd.grad(want.sum(), a)[0]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-8)


# ---------------------------------------------------------------------------------------------------------- length


@pytest.mark.slow
def test_the_work_is_linear_in_the_length(monkeypatch):
    """Counted, not timed: runs and passes stay the same, and no tensor has more than a few numbers a step."""
    calls = []

    class Counted(sparse._Run):
        def __init__(self, *args, **kwargs):
            calls.append("run")
            super().__init__(*args, **kwargs)

        def pull(self, *args, **kwargs):
            calls.append("pass")
            return super().pull(*args, **kwargs)

    monkeypatch.setattr(sparse, "_Run", Counted)
    counts = []
    for n in (100, 200):
        pyro.clear_param_store()
        calls.clear()
        x = torch.randn(n, dtype=F64)
        predictor = choose(level, (x,)).read((x,))
        assert isinstance(predictor, MarkovRows)
        assert max(t.numel() for t in (*predictor.reading[:5], *predictor.reading.blocks())) <= 2 * n
        counts.append(list(calls))
    assert counts[0] == counts[1]


def test_a_series_as_one_event_is_one_token():
    """`GaussianHMM` has one density for all steps: no step of it can be hidden, and none may be missing."""
    x = torch.randn(3, 10, 1, dtype=F64)
    eye = torch.eye(1, dtype=F64)
    normal = dist.MultivariateNormal(torch.zeros(1, dtype=F64), eye)
    series = dist.GaussianHMM(normal, 0.9 * eye, normal, eye, normal, duration=10)

    def model(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("x", series, obs=x)

    predictor = choose(model, (x,)).read((x,))
    assert predictor.structure.n_tokens == 1
    torch.testing.assert_close(predictor.score(), series.log_prob(x))
    x[1, 3] = torch.nan
    with pytest.raises(ModelError, match="one density for a whole event of several axes"):
        choose(model, (x,)).read((x,))
