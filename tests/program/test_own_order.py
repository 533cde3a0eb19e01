"""Programs whose tokens look at earlier tokens: densities along their own order, found by evaluation, or refused."""

from itertools import product

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.ops.indexing import Vindex
from pyro.optim import Adam
from scipy import stats
from scipy.special import logsumexp, xlogy
from torch.distributions import constraints

from bayes_mpt import BayesMPT, compare
from bayes_mpt.masks import EverySize, Masks, PermutationChain, Policy, UniformSize
from bayes_mpt.predictors import Exact, SequentialMonteCarlo
from bayes_mpt.predictors.own_order import own_order
from bayes_mpt.program.analysis import look
from bayes_mpt.program.program import ModelError, one_vector
from bayes_mpt.score import CumulativeMaskedScore, fixed_rate_bias

RNG = np.random.default_rng(1)
SERIES = RNG.normal(size=16).cumsum()
TABLE = RNG.normal(size=(12, 6)).cumsum(1)
F64 = torch.float64


def real(name, value=0.0):
    return pyro.param(name, lambda: torch.tensor(value, dtype=F64))


def positive(name, value=1.0):
    return pyro.param(name, lambda: torch.tensor(value, dtype=F64), constraint=constraints.positive)


def share(name, *shape):
    return pyro.param(name, lambda: torch.full(shape, 0.4, dtype=F64), constraint=constraints.unit_interval)


def fitted(program, x, **settings):
    return BayesMPT(program, random_state=0, **settings).fit(np.atleast_2d(x.T).T)


def order_of(program, x):
    x = torch.as_tensor(x)
    with pyro.get_param_store().scope():
        return look(program, (x,)).program.order


def least_squares(y, columns):
    """The highest log-density of y ~ N(columns b, s^2), and its terms."""
    r = y - columns @ np.linalg.lstsq(columns, y, rcond=None)[0]
    return stats.norm(0, np.sqrt((r**2).mean())).logpdf(r)


# ------------------------------------------------------------------------------------------------- autoregressions


def loop(x):
    a, s = real("a"), positive("s")
    for t in range(1, len(x)):
        pyro.sample(f"x_{t}", dist.Normal(a * x[t - 1, 0], s), obs=x[t, 0])


def vector(x):
    a, s = real("a"), positive("s")
    pyro.sample("x", dist.Normal(a * x[:-1, 0], s).to_event(1), obs=x[1:, 0])


def plate(x):
    a, s = real("a"), positive("s")
    with pyro.plate("steps", len(x) - 1):
        pyro.sample("x", dist.Normal(a * x[:-1, 0], s), obs=x[1:, 0])


@pytest.mark.parametrize("program", [loop, vector, plate])
def test_an_autoregression_is_least_squares(program):
    model, terms = fitted(program, SERIES), least_squares(SERIES[1:], SERIES[:-1, None])
    assert model.log_marginal_likelihood_ == pytest.approx(terms.sum(), abs=1e-8)
    found = model.estimate(SERIES[:, None])
    assert found.by_size is None and found.exact and found.given == ("x[0]",)
    np.testing.assert_allclose(found.prequential, terms[None], atol=1e-5)
    assert "; given: x[0]" in str(found) and "conditioned on x[0]" in model.explain()
    assert model.estimate(SERIES[:, None], masks=PermutationChain(3)).total == found.total


def test_time_may_run_backwards():
    def backwards(x):
        a, s = real("a"), positive("s")
        pyro.sample("x", dist.Normal(a * x[1:, 0], s).to_event(1), obs=x[:-1, 0])

    model, terms = fitted(backwards, SERIES), least_squares(SERIES[:-1], SERIES[1:, None])
    assert model.log_marginal_likelihood_ == pytest.approx(terms.sum(), abs=1e-8)
    found = model.estimate(SERIES[:, None])
    assert found.given == ("x[15]",) and order_of(backwards, SERIES[:, None]).tokens == tuple(
        range(14, -1, -1)
    )
    np.testing.assert_allclose(found.prequential[0], terms[::-1], atol=1e-5)


def test_a_vector_autoregression_couples_columns():
    def program(x):
        a, s = pyro.param("a", lambda: x.new_zeros(3, 3)), positive("s")
        pyro.sample("x", dist.Normal(x[:-1] @ a, s).to_event(2), obs=x[1:])

    x = RNG.normal(size=(20, 3)).cumsum(0)
    r = x[1:] - x[:-1] @ np.linalg.lstsq(x[:-1], x[1:], rcond=None)[0]
    want = stats.norm(0, np.sqrt((r**2).mean())).logpdf(r).sum()
    model = fitted(program, x)
    assert model.log_marginal_likelihood_ == pytest.approx(want, abs=1e-7)
    assert model.predictor_.structure.order.given == ("x[0]",)


def table_in_a_loop(x, latent=False):
    a, s = real("a"), positive("s")
    with pyro.plate("series", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0)) if latent else 0.0
        for t in range(1, x.shape[1]):
            pyro.sample(f"x_{t}", dist.Normal(a * x[:, t - 1] + z, s), obs=x[:, t])


def table_at_once(x):
    a, s = real("a"), positive("s")
    with pyro.plate("series", len(x)):
        pyro.sample("x", dist.Normal(a * x[:, :-1], s).to_event(1), obs=x[:, 1:])


@pytest.mark.parametrize("program", [table_in_a_loop, table_at_once])
def test_each_row_of_a_table_is_a_series(program):
    model = fitted(program, TABLE)
    terms = least_squares(TABLE[:, 1:].ravel(), TABLE[:, :-1].reshape(-1, 1)).reshape(12, 5)
    np.testing.assert_allclose(model.score_samples(TABLE), terms.sum(1), atol=1e-4)
    assert model.log_marginal_likelihood_ == pytest.approx(terms.sum(), abs=1e-8)
    assert model.predictor_.structure.by_row and model.estimate(TABLE).given == ("x[:, 0]",)
    other = TABLE[::2].copy()  # rows of another number are read at their own values
    np.testing.assert_allclose(model.score_samples(other), terms.sum(1)[::2], atol=1e-4)


def test_rows_with_latents_and_a_past():
    """x_t = a x_(t-1) + z + e: x less its past is Gaussian, and the Jacobian is one."""
    model = fitted(lambda x: table_in_a_loop(x, latent=True), TABLE)
    a, s = (float(model.params_[n]) for n in "as")
    rest, cov = TABLE[:, 1:] - a * TABLE[:, :-1], s**2 * np.eye(5) + 1
    np.testing.assert_allclose(
        model.score_samples(TABLE), stats.multivariate_normal(np.zeros(5), cov).logpdf(rest), atol=1e-9
    )
    steps = model.estimate(TABLE).prequential
    for t in range(5):
        root = np.linalg.cholesky(cov)
        white = np.linalg.solve(root, rest.T)[t]
        np.testing.assert_allclose(steps[:, t], stats.norm().logpdf(white) - np.log(root[t, t]), atol=1e-9)


def test_a_level_behind_noise_that_also_carries_over():
    """A chain of latents, in linear time, each token with its own past in the mean."""

    def program(x):
        z = x.new_zeros(())
        for t in range(len(x)):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            pyro.sample(f"x_{t}", dist.Normal(z + (0.5 * x[t - 1] if t else 0.0), 1.0), obs=x[t])

    x = torch.as_tensor(SERIES)
    time = np.arange(1, 17)
    rest = SERIES - 0.5 * np.append(0, SERIES[:-1])
    want = stats.multivariate_normal(np.zeros(16), np.minimum.outer(time, time) + np.eye(16)).logpdf(rest)
    bound = Exact().bind(program, (x,))
    assert type(bound).__name__ == "MarkovGaussian"
    read = bound.read((x,))
    assert float(read.score()) == pytest.approx(want, abs=1e-9)
    assert float(read.chain(own_order(read)).sum()) == pytest.approx(want, abs=1e-9)


# ------------------------------------------------------------------------------------------ through scales and errors


def garch(x):
    w, a, b, s = positive("w", 0.5), share("a"), share("b"), positive("s0")
    for t in range(len(x)):
        if t:
            s = (w + a * x[t - 1, 0] ** 2 + b * s**2).sqrt()
        pyro.sample(f"x_{t}", dist.Normal(x.new_zeros(()), s), obs=x[t, 0])


def arma(x):
    a, b, s, error = real("a"), real("b"), positive("s"), 0.0
    for t in range(len(x)):
        mean = a * x[t - 1, 0] + b * error if t else x.new_zeros(())
        error = x[t, 0] - mean
        pyro.sample(f"x_{t}", dist.Normal(mean, s), obs=x[t, 0])


def garch_terms(x, p):
    s, out = p["s0"], []
    for t, value in enumerate(x):
        s = np.sqrt(p["w"] + p["a"] * x[t - 1] ** 2 + p["b"] * s**2) if t else s
        out.append(stats.norm(0, s).logpdf(value))
    return np.array(out)


def arma_terms(x, p):
    error, out = 0.0, []
    for t, value in enumerate(x):
        mean = p["a"] * x[t - 1] + p["b"] * error if t else 0.0
        error = value - mean
        out.append(stats.norm(mean, p["s"]).logpdf(value))
    return np.array(out)


@pytest.mark.parametrize(("program", "terms"), [(garch, garch_terms), (arma, arma_terms)])
def test_scales_and_errors_of_the_past(program, terms):
    x = np.diff(SERIES)
    model = fitted(program, x)
    want = terms(x, model.params_)
    assert model.log_marginal_likelihood_ == pytest.approx(want.sum(), abs=1e-9)
    np.testing.assert_allclose(model.estimate(x[:, None]).prequential[0], want, atol=1e-9)
    for name, value in model.params_.items():  # at the maximum
        for step in (-0.02, 0.02):
            moved = float(value) + step
            if name not in ("a", "b") or program is arma or 0 < moved < 1:
                assert terms(x, {**model.params_, name: moved}).sum() < want.sum() + 1e-6


@pytest.mark.slow
def test_the_evidence_of_an_autoregression_by_its_own_and_other_ways():
    def program(x):
        a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
        for t in range(1, len(x)):
            pyro.sample(f"x_{t}", dist.Normal(a * x[t - 1, 0], 2.0), obs=x[t, 0])

    x = SERIES[:12]
    want = stats.multivariate_normal(np.zeros(11), 4 * np.eye(11) + np.outer(x[:-1], x[:-1])).logpdf(x[1:])
    assert fitted(program, x).log_marginal_likelihood_ == pytest.approx(want, abs=1e-9)
    by_runs = fitted(program, x, predictor=SequentialMonteCarlo(32, 3))
    assert abs(by_runs.log_marginal_likelihood_ - want) < 4 * by_runs.log_marginal_likelihood_se_ < 1


# --------------------------------------------------------------------------------------------------- discrete tokens


def test_a_bayes_net_of_columns():
    def program(x):
        rain, sprinkler, grass = share("p"), share("q", 2), share("r", 2, 2)
        with pyro.plate("days", len(x)):
            # in whatever order it is written
            pyro.sample("grass", dist.Bernoulli(grass[x[:, 0].long(), x[:, 1].long()]), obs=x[:, 2])
            pyro.sample("sprinkler", dist.Bernoulli(sprinkler[x[:, 0].long()]), obs=x[:, 1])
            pyro.sample("rain", dist.Bernoulli(rain), obs=x[:, 0])

    x = RNG.integers(0, 2, size=(40, 3)).astype(float)

    def best(v):
        return xlogy(v.sum(), v.mean()) + xlogy(len(v) - v.sum(), 1 - v.mean())

    want = best(x[:, 0])
    for i in range(2):
        some = x[x[:, 0] == i]
        want += best(some[:, 1]) + sum(best(some[some[:, 1] == j, 2]) for j in range(2))
    model = fitted(program, x)
    assert model.log_marginal_likelihood_ == pytest.approx(want, abs=1e-6)
    assert model.predictor_.structure.order.tokens == (2, 1, 0)


def test_regimes_with_an_autoregression_each():
    slopes, moves = np.array([0.9, -0.5]), np.array([[0.8, 0.2], [0.3, 0.7]])

    def program(x):
        s, z = positive("s"), torch.zeros(()).long()
        for t in pyro.markov(range(1, len(x))):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.as_tensor(moves)[z]))
            pyro.sample(f"x_{t}", dist.Normal(torch.as_tensor(slopes)[z] * x[t - 1, 0], s), obs=x[t, 0])

    x = SERIES[:7]
    model = fitted(program, x)
    s, paths = float(model.params_["s"]), []
    for path in product(range(2), repeat=6):
        z = (0, *path)
        paths.append(
            sum(
                np.log(moves[z[t - 1], z[t]]) + stats.norm(slopes[z[t]] * x[t - 1], s).logpdf(x[t])
                for t in range(1, 7)
            )
        )
    assert model.log_marginal_likelihood_ == pytest.approx(logsumexp(paths), abs=1e-9)
    assert model.estimate(x[:, None]).prequential.sum() == pytest.approx(logsumexp(paths), abs=1e-9)


def test_a_hidden_chain_whose_notes_look_at_the_notes_before():
    moves = np.array([[0.8, 0.2], [0.3, 0.7]])
    table = RNG.uniform(0.2, 0.8, size=(2, 2, 3))

    def program(x):
        x, p = x.reshape(-1, 4, 3), torch.as_tensor(table)
        notes = pyro.plate("notes", 3, dim=-1)
        with pyro.plate("sequences", len(x), dim=-2):
            z, y = 0, torch.zeros(len(x), 3).long()
            for t in pyro.markov(range(4)):
                z = pyro.sample(f"z_{t}", dist.Categorical(torch.as_tensor(moves)[z]))
                with notes as k:
                    pyro.sample(f"y_{t}", dist.Bernoulli(Vindex(p)[z, y, k]), obs=x[:, t])
                y = x[:, t].long()

    x = RNG.integers(0, 2, size=(3, 12)).astype(float)
    want = []
    for row in x.reshape(3, 4, 3).astype(int):
        paths = []
        for path in product(range(2), repeat=4):
            total, z, y = 0.0, 0, np.zeros(3, int)
            for t, k in enumerate(path):
                p = table[k, y, np.arange(3)]
                total += np.log(moves[z, k]) + np.log(np.where(row[t], p, 1 - p)).sum()
                z, y = k, row[t]
            paths.append(total)
        want.append(logsumexp(paths))
    np.testing.assert_allclose(fitted(program, x).score_samples(x), want, atol=1e-9)


def test_dogs_learn_from_what_happened_to_them():
    """Two latents of the data set over tokens of thirty dogs: by a dense grid."""

    def program(x):
        a, b = (pyro.sample(n, dist.Normal(x.new_zeros(()), 1.0)) for n in "ab")
        avoided = x.cumsum(1) - x
        with pyro.plate("dogs", len(x)):
            for t in range(x.shape[1]):
                logits = 1 + 0.1 * a * avoided[:, t] + 0.1 * b * (t - avoided[:, t])
                pyro.sample(f"y_{t}", dist.Bernoulli(logits=logits), obs=x[:, t])

    x = (RNG.uniform(size=(10, 8)) < 0.6).astype(float)
    avoided = x.cumsum(1) - x
    shocked, u = np.arange(8) - avoided, np.linspace(-6, 6, 241)
    logits = 1 + 0.1 * u[:, None, None, None] * avoided + 0.1 * u[:, None, None] * shocked
    joint = (x * logits - np.logaddexp(0, logits)).sum((2, 3))
    joint += stats.norm.logpdf(u)[:, None] + stats.norm.logpdf(u)
    model = fitted(program, x)
    assert model.log_marginal_likelihood_ == pytest.approx(
        logsumexp(joint) + 2 * np.log(u[1] - u[0]), abs=1e-6
    )


@pytest.mark.parametrize(
    ("in_place", "latents_too"),
    [
        (True, True),
        *(pytest.param(*k, marks=pytest.mark.slow) for k in ((True, False), (False, True), (False, False))),
    ],
)
def test_capture_recapture_by_masks_of_the_past(in_place, latents_too):
    """Before its first capture an animal is not scored: a forward pass over alive and dead."""

    def program(x):
        survive, seen_again = share("survive"), share("seen")
        with pyro.plate("animals", len(x)):
            z, seen = x.new_ones(len(x)), torch.zeros(len(x)).bool()
            for t in pyro.markov(range(x.shape[1])):
                before = seen.to(x)
                with poutine.mask(mask=seen if latents_too else torch.tensor(True)):
                    z = pyro.sample(f"z_{t}", dist.Bernoulli(before * survive * z + 1 - before))
                with poutine.mask(mask=seen):
                    pyro.sample(f"x_{t}", dist.Bernoulli(seen_again * z), obs=x[:, t])
                if in_place:
                    seen |= x[:, t].bool()
                else:
                    seen = seen | x[:, t].bool()

    x = np.zeros((30, 5))
    x[np.arange(30), RNG.integers(0, 4, 30)] = 1
    x = np.maximum(x, (RNG.uniform(size=x.shape) < 0.4) * (x.cumsum(1) > 0))
    model = fitted(program, x)
    assert model.estimate(x).given == ("masked cells of x[:, 0], x[:, 1], x[:, 2], x[:, 3]",)
    phi, rho = (float(model.params_[n]) for n in ("survive", "seen"))
    want = []
    for row in x:
        dead, alive = 0.0, 1.0
        for value in row[row.argmax() + 1 :]:
            dead, alive = dead + alive * (1 - phi), alive * phi
            dead, alive = dead * (1 - value), alive * (rho if value else 1 - rho)
        want.append(np.log(dead + alive))
    np.testing.assert_allclose(model.score_samples(x), want, atol=1e-9)


def test_a_latent_whose_prior_looks_at_an_earlier_column():
    def program(x):
        a = real("a")
        with pyro.plate("rows", len(x)):
            pyro.sample("first", dist.Normal(x.new_zeros(()), 1.0), obs=x[:, 0])
            z = pyro.sample("z", dist.Bernoulli(logits=a * x[:, 0]))
            pyro.sample("second", dist.Normal(3 * z, 1.0), obs=x[:, 1])

    x = TABLE[:, :2]
    model = fitted(program, x)
    p = 1 / (1 + np.exp(-float(model.params_["a"]) * x[:, 0]))
    first, off, on = (stats.norm(m, 1).pdf(x[:, c]) for m, c in ((0, 0), (0, 1), (3, 1)))
    np.testing.assert_allclose(model.score_samples(x), np.log(first * (p * on + (1 - p) * off)), atol=1e-9)


# ------------------------------------------------------------------------------------------------------ no order


def one_site(mean, **settings):
    def program(x):
        a = real("a")
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(a * mean(x), 1.0).to_event(1), obs=x)

    return program


@pytest.mark.parametrize(
    ("mean", "cells"),
    [
        (lambda x: x.flip(-1)[:, :2], r"x\[:, 1\] looks at x\[:, 0\], which looks at x\[:, 1\]"),
        (lambda x: x.roll(1, 1), ".*which looks at x"),
        (lambda x: x.mean(0), ".* looks at x.* itself"),
        (lambda x: (x > 0).to(x).flip(-1), ".*which looks at x"),
    ],
    ids=["pair", "ring", "mean", "steps"],
)
def test_a_cycle_is_refused_by_its_cells(mean, cells):
    x = TABLE[:, :2] if "0" in cells else TABLE[:, :4]
    with pytest.raises(ModelError, match=f"site 'x' changes with the observed x itself: that of {cells}"):
        BayesMPT(one_site(mean)).fit(x)


def test_a_cycle_of_one_vector_is_refused():
    def through_a_scale(x):
        s = 1 + x[:, 0].roll(-1).abs()
        for t in range(len(x)):
            mean = 0.5 * x[t - 1, 0] if t else x.new_zeros(())
            pyro.sample(f"x_{t}", dist.Normal(mean, s[t]), obs=x[t, 0])

    def ring_in_a_plate(x):
        with pyro.plate("steps", len(x) - 1):
            pyro.sample("x", dist.Normal(0.3 * x[1:, 0].roll(1), 1.0), obs=x[1:, 0])

    for program in (through_a_scale, ring_in_a_plate):
        with pytest.raises(
            ModelError, match=r"changes with the observed x itself: that of x\[\d+\] looks at x"
        ):
            BayesMPT(program).fit(SERIES[:, None])


def test_a_mask_of_a_tokens_own_value_is_refused():
    def program(x):
        with pyro.plate("rows", len(x)), poutine.mask(mask=x[:, 0] > 0):
            pyro.sample("x", dist.Normal(real("a"), 1.0), obs=x[:, 0])

    with pytest.raises(ModelError, match="site 'x'"):
        BayesMPT(program).fit(TABLE)


def test_a_latent_that_looks_at_what_it_makes_is_refused():
    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x[:, 1], 1.0))
            for t in range(3):
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])

    with pytest.raises(
        ModelError, match=r"site 'z' .* prior looks at x\[:, 1\], and x\[:, 1\] is drawn after it"
    ):
        BayesMPT(program).fit(TABLE)


# ------------------------------------------------------------------------------------------- what is not answered


class Backwards(Policy):
    """The last token first: a chain, in an order that is not the program's."""

    chains, is_lml, deterministic = True, True, True

    def draw(self, n_tokens, random_state=None):
        order = torch.arange(n_tokens - 1, -1, -1)[None]
        return Masks(None, order, torch.ones(1, n_tokens, dtype=F64))


def test_other_masks_and_single_conditionals_are_refused():
    model = fitted(table_at_once, TABLE)
    for masks in (UniformSize(4), EverySize(), PermutationChain(groups=list("aabbb")), Backwards()):
        with pytest.raises(ValueError, match="look at earlier tokens"):
            model.estimate(TABLE, masks=masks)
    with pytest.raises(ValueError, match="look at earlier tokens"):
        BayesMPT(table_at_once, masks=UniformSize(4)).fit(TABLE)
    with pytest.raises(ValueError, match="look at earlier tokens"):
        model.estimate(TABLE).plot()
    with pytest.raises(ValueError, match="look at earlier tokens"):
        fixed_rate_bias(model, TABLE, 0.2)
    with pytest.raises(ModelError, match=r"x\[:, 0\] is read and never drawn"):
        model.sample(3)
    with model.read_rows(TABLE) as read:
        own = own_order(read)
        assert float(read.chain(own).sum()) == pytest.approx(model.log_marginal_likelihood_, abs=1e-9)
        with pytest.raises(ModelError, match="a chain in another order"):
            read.chain(own.flip(1))
        with pytest.raises(ModelError, match="a posterior given some tokens"):
            read.posterior(torch.ones(5, dtype=torch.bool))


# ------------------------------------------------------------------------------------------------------- drawn forward


def one_by_one(x):
    a, past = real("a", 0.3), x.new_zeros(())
    with pyro.plate("rows", len(x)):
        for t in range(x.shape[1]):
            past = pyro.sample(f"x_{t}", dist.Normal(a * past, 1.0), obs=x[:, t])


def all_at_once(x):
    past = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(real("a", 0.3) * past, 1.0).to_event(1), obs=x)


def of_a_copy(x):
    copied = x.clone()
    with pyro.plate("rows", len(x)):
        for t in range(x.shape[1]):
            past = copied[:, t - 1] if t else torch.zeros(len(x))
            pyro.sample(f"x_{t}", dist.Normal(real("a", 0.3) * past, 1.0), obs=x[:, t])


@pytest.mark.parametrize("program", [one_by_one, all_at_once, of_a_copy])
def test_rows_are_drawn_token_after_token(program):
    model = BayesMPT(program, random_state=3).fit(TABLE[:, :4])
    a, n = float(model.params_["a"]), 20_000
    assert abs(a) > 0.3
    rows = model.sample(n)
    root = np.linalg.inv(np.eye(4) - a * np.eye(4, k=-1))
    white = np.linalg.solve(root, rows.T)  # (4, n) independent N(0, 1)
    assert np.abs(white.mean(1)).max() < 5 / np.sqrt(n)
    assert np.abs(np.cov(white) - np.eye(4)).max() < 5 * np.sqrt(2 / n)
    np.testing.assert_array_equal(rows, model.sample(n))


def test_counts_and_series_are_drawn_forward():
    def counts(x):
        past = torch.cat([torch.ones_like(x[:, :1]), x[:, :-1]], 1)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Poisson(1 + share("a") * past).to_event(1), obs=x)

    model = BayesMPT(counts).fit(np.random.default_rng(0).poisson(2, size=(20, 3)).astype(float))
    rows, a, mean, n = model.sample(20_000), float(model.params_["a"]), 1.0, 20_000
    for t in range(3):
        mean = 1 + a * mean
        assert rows[:, t].mean() == pytest.approx(mean, abs=5 * rows[:, t].std() / np.sqrt(n))

    def series(x):
        pyro.sample("x_0", dist.Normal(real("first"), 1.0), obs=x[0, 0])
        for t in range(1, len(x)):
            pyro.sample(f"x_{t}", dist.Normal(0.9 * x[t - 1, 0], 0.01), obs=x[t, 0])

    drawn = BayesMPT(series).fit(SERIES[:, None]).sample(40)[:, 0]
    assert np.abs(drawn[1:] - 0.9 * drawn[:-1]).max() < 0.05
    assert np.abs(np.diff(drawn)).max() > 0


def test_a_missing_cell_is_refused_where_others_look_at_it():
    for column, by in ((5, table_at_once), (5, table_in_a_loop)):
        x = TABLE.copy()
        x[2, column] = np.nan  # nobody looks at the last one
        model = BayesMPT(by).fit(x)
        seen = ~np.isnan(x[:, 1:])
        terms = least_squares(x[:, 1:][seen], x[:, :-1][seen][:, None])
        assert model.log_marginal_likelihood_ == pytest.approx(terms.sum(), abs=1e-8)
        x[2, 3] = np.nan
        with pytest.raises(ValueError, match=r"It looks at x\[2, 3\], which is missing"):
            BayesMPT(by).fit(x)


@pytest.mark.parametrize("by", [table_at_once, table_in_a_loop])
def test_series_end_where_they_end(by):
    """Behind its end a series is missing, and what is missing may look at missing cells."""
    x = TABLE.copy()
    x[1, 3:], x[4, 5:] = np.nan, np.nan
    model = BayesMPT(by).fit(x)
    seen = ~np.isnan(x[:, 1:])
    terms = least_squares(x[:, 1:][seen], x[:, :-1][seen][:, None])
    assert model.log_marginal_likelihood_ == pytest.approx(terms.sum(), abs=1e-8)
    with pytest.raises(ModelError, match="looks at another missing one"):
        model.impute(x)
    x[2, 3] = np.nan  # at which the next one looks
    with pytest.raises(ValueError, match=r"It looks at x\[2, 3\], which is missing"):
        BayesMPT(by).fit(x)


@pytest.mark.parametrize("filled", [False, True])
def test_series_of_one_slope_end_where_they_end(filled):
    """A prior joins the rows to one vector, in which all rows' steps were changed together."""
    x = TABLE[:4, :5].copy()
    x[1, 3:], x[3, 4:] = np.nan, np.nan

    def program(x):
        slope, seen = pyro.sample("slope", dist.Normal(0.0, 0.5)), ~x.isnan()
        x = x.nan_to_num() if filled else x
        with pyro.plate("rows", len(x)):
            for t in range(5):
                with poutine.mask(mask=seen[:, t]):
                    mean = slope * x[:, t - 1] if t else x.new_zeros(len(x))
                    pyro.sample(f"x_{t}", dist.Normal(mean, 1.0), obs=x[:, t])

    seen = ~np.isnan(x)
    past = np.pad(x[:, :-1], ((0, 0), (1, 0)))[seen]
    truth = stats.multivariate_normal.logpdf(x[seen], cov=np.eye(len(past)) + 0.25 * np.outer(past, past))
    assert BayesMPT(program).fit(x).log_marginal_likelihood_ == pytest.approx(truth, abs=1e-9)
    x[0, 2] = np.nan
    with pytest.raises(ValueError, match=r"It looks at x\[0, 2\], which is missing"):
        BayesMPT(program).fit(x)


def test_gaps_that_nobody_looks_at_beside_a_normal_latent_of_each_row():
    """x_0 = z + e_0, x_t = z + .5 x_(t-1) + e_t: what is left of .5 x_(t-1) is N(0, I + 1 1')."""

    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            for t in range(5):
                past = 0.5 * x[:, t - 1] if t else 0.0
                pyro.sample(f"x_{t}", dist.Normal(z + past, 1.0), obs=x[:, t])

    x = TABLE[:, :5].copy()
    x[[0, 3], 4] = np.nan
    moved = x - np.pad(0.5 * x[:, :-1], ((0, 0), (1, 0)))
    truth = 0.0
    for row in moved:
        row = row[~np.isnan(row)]
        truth += stats.multivariate_normal(np.zeros(len(row)), np.eye(len(row)) + 1).logpdf(row)
    model = BayesMPT(program).fit(x)
    assert model.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-9)
    means = moved[[0, 3], :4].sum(1) / 5 + 0.5 * x[[0, 3], 3]
    assert model.impute(x)[[0, 3], 4] == pytest.approx(means, abs=1e-9)


def test_a_missing_cell_that_a_comparison_hides_is_refused():
    def program(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("x_0", dist.Normal(x.new_zeros(()), 1.0), obs=x[:, 0])
            pyro.sample("x_1", dist.Normal(real("a") * (x[:, 0] > 0).to(x), 1.0), obs=x[:, 1])

    x = TABLE[:, :2].copy()
    assert BayesMPT(program).fit(x).predictor_.structure.order.tokens == (0, 1)
    x[3, 0] = np.nan
    with pytest.raises(ValueError, match=r"It looks at x\[3, 0\]"):
        BayesMPT(program).fit(x)


def by_lags(lags, start):
    def program(x):
        a, s = pyro.param("a", lambda: x.new_zeros(lags)), positive("s")
        for t in range(start, len(x)):
            pyro.sample(f"x_{t}", dist.Normal((a * x[t - lags : t, 0].flip(0)).sum(), s), obs=x[t, 0])

    return program


def test_lags_are_compared_on_the_same_cells():
    x = SERIES[:, None]
    first, second, short = (fitted(by_lags(*k), SERIES) for k in ((1, 1), (2, 2), (1, 2)))
    with pytest.raises(ValueError, match=r"'AR\(1\)' is given x\[0\]; 'AR\(2\)' is given x\[0\], x\[1\]"):
        compare({"AR(1)": first, "AR(2)": second}, x, evidence="train")
    table = compare({"AR(1)": short, "AR(2)": second}, x, evidence="train")
    for lags, name in ((1, "AR(1)"), (2, "AR(2)")):
        columns = np.stack([SERIES[2 - k : len(SERIES) - k] for k in range(1, lags + 1)], 1)
        assert table.loc[name, "lml"] == pytest.approx(least_squares(SERIES[2:], columns).sum(), abs=1e-6)


@pytest.mark.slow
def test_svi_trains_along_the_order():
    x = torch.as_tensor(SERIES)[:, None]
    with pyro.get_param_store().scope():
        svi = SVI(vector, lambda x: None, Adam({"lr": 0.1}), CumulativeMaskedScore())
        losses = [svi.step(x) for _ in range(100)]
    assert losses[-1] == pytest.approx(-least_squares(SERIES[1:], SERIES[:-1, None]).sum(), abs=1e-2)


def test_what_is_observed_beside_x_is_not_predicted_ahead():
    def program(x, y):
        a = real("a")
        for t in range(1, len(y)):
            pyro.sample(f"y_{t}", dist.Normal(a * y[t - 1] + x[t, 0], 1.0), obs=y[t])

    x, y = TABLE[:8, :1], SERIES[:8]
    model = BayesMPT(program).fit(x, y)
    rest = y[1:] - x[1:, 0]
    a = (rest @ y[:-1]) / (y[:-1] @ y[:-1])
    assert model.log_marginal_likelihood_ == pytest.approx(
        stats.norm(a * y[:-1], 1).logpdf(rest).sum(), abs=1e-8
    )
    assert model.estimate(x, y).given == ("y[0]",)
    with pytest.raises(ValueError, match="look at earlier ones"):
        model.predict(x)


@pytest.mark.usefixtures("own_store")
def test_the_order_of_rows_as_one_vector():
    program = look(table_at_once, (torch.as_tensor(TABLE[:2]),)).program
    assert program.order.tokens == (0, 1, 2, 3, 4)
    assert one_vector(program).order.tokens == (0, 5, 1, 6, 2, 7, 3, 8, 4, 9)
    pairs = [((t, t + 5), (t + 1, t + 6)) for t in range(4)]
    assert one_vector(program).order.looks == tuple(pairs)


def seen_at_first(y):
    survives = pyro.param("survives", torch.tensor(0.8), constraint=constraints.unit_interval)
    found = pyro.param("found", torch.tensor(0.6), constraint=constraints.unit_interval)
    with pyro.plate("animals", len(y), dim=-1):
        z, seen = torch.ones(len(y)), torch.zeros(len(y), dtype=torch.bool)
        for t in range(y.shape[1]):
            with poutine.mask(mask=seen):
                alive = torch.where(seen, survives * z, 1.0)
                z = pyro.sample(f"z_{t}", dist.Bernoulli(alive), infer={"enumerate": "parallel"})
                pyro.sample(f"y_{t}", dist.Bernoulli(found * z), obs=y[:, t])
            seen = seen | (y[:, t] > 0.5)


def test_a_mask_that_looks_at_a_column_that_is_constant():
    """Every animal is seen at first, so that only values of other columns show that the mask looks at that cell."""
    history = np.array([[1, 1, 0, 1], [1, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]], float)
    fitted = BayesMPT(seen_at_first).fit(history)
    survives, found = (float(np.ravel(fitted.params_[name])[0]) for name in ("survives", "found"))
    truth = 0.0
    for row in history:
        dead_alive = np.array([0.0, 1.0])
        for y in row[1:]:
            dead_alive = np.array([dead_alive[0] + dead_alive[1] * (1 - survives), dead_alive[1] * survives])
            dead_alive = dead_alive * [1 - y, found if y else 1 - found]
        truth += np.log(dead_alive.sum())
    assert fitted.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-9)


@pytest.mark.parametrize(
    "other", [np.linspace(-1, 1, 8), np.arange(8) % 2, np.ones(8)], ids=["real", "codes", "ones"]
)
def test_a_constant_column_that_looks_at_itself(other):
    def itself(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("a", dist.Normal(pyro.param("mean", torch.tensor(0.0)), 1.0), obs=x[:, 0])
            pyro.sample("b", dist.Bernoulli(0.05 + 0.9 * x[:, 1]), obs=x[:, 1])

    with pytest.raises(ModelError, match=r"that of x\[:, 1\] looks at x\[:, 1\] itself"):
        BayesMPT(itself).fit(np.stack([other, np.ones(8)], 1))
