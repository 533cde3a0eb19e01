"""What cannot happen scores -inf, what is rare its own logarithm, under every predictor; counts keep their digits."""

import itertools
import math
import warnings

import mpmath
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp
from torch.distributions import constraints

from bayes_mpt import BayesMPT
from bayes_mpt.predictors import Importance, Quadrature, SequentialMonteCarlo
from bayes_mpt.program.densities import log_density

POSSIBLE = np.array([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
ROWS = np.array(
    [[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [np.nan, 0.0, 1.0], [0.0, 1.0, 0.0]]
)  # 1 and 3 are impossible


def rows_of(x):
    return pyro.plate("rows", len(x))


def constants(x):
    with rows_of(x):
        pyro.sample("x", dist.Bernoulli(x.new_tensor([0.0, 0.5, 1.0])).to_event(1), obs=x)


def with_latent(x):
    with rows_of(x):
        u = pyro.sample("u", dist.Normal(x.new_zeros(()), 1.0))
        p = torch.stack([torch.zeros_like(u), torch.sigmoid(u), torch.ones_like(u)], -1)
        pyro.sample("x", dist.Bernoulli(p).to_event(1), obs=x)


def learned(x):
    p = pyro.param("p", lambda: x.new_tensor(0.3), constraint=constraints.unit_interval)
    with rows_of(x):
        pyro.sample("x", dist.Bernoulli(torch.stack([0 * p, p, 0 * p + 1])).to_event(1), obs=x)


def shared(x):
    m = pyro.sample("m", dist.Beta(x.new_tensor(1.0), x.new_tensor(1.0)))
    with rows_of(x):
        p = torch.stack([torch.zeros_like(m), m, torch.ones_like(m)], -1)
        pyro.sample("x", dist.Bernoulli(p).to_event(1), obs=x)


@pytest.mark.parametrize(
    "program, predictor",
    [
        (constants, "auto"),
        (learned, "auto"),
        (with_latent, "auto"),
        (with_latent, Quadrature(20)),
        (with_latent, Importance(200)),
    ],
)
def test_rows_that_cannot_occur(program, predictor):
    model = BayesMPT(program, predictor=predictor, random_state=0).fit(POSSIBLE)
    scores = model.score_samples(ROWS)
    assert scores[1] == scores[3] == -np.inf
    # the middle column alone is left to chance, evenly
    np.testing.assert_allclose(
        scores[[0, 2]], math.log(0.5), atol=0.1 if isinstance(predictor, Importance) else 1e-8
    )
    for bad in (ROWS, ROWS[[0, 1]]):
        with pytest.raises(
            ValueError,
            match=r"-inf at the (start|fitted parameters), since rows \[1.*(cannot occur|density 0)",
        ):
            BayesMPT(program, predictor=predictor, random_state=0).fit(bad)


@pytest.mark.parametrize(
    "program, predictor",
    [
        (constants, "auto"),
        (with_latent, "auto"),
        (with_latent, Importance(50)),
        (shared, "auto"),
        (shared, SequentialMonteCarlo(64)),
    ],
)
def test_masked_curve_of_rows_that_cannot_occur(program, predictor):
    """Every mask size has masks that hide the impossible cell and ones that show it: all end at -inf, none at NaN."""
    model = BayesMPT(program, predictor=predictor, random_state=0).fit(POSSIBLE)
    found = model.estimate(ROWS[:2])
    assert found.lml[-1] == -np.inf and (found.by_size.mean == -np.inf).all()


@pytest.mark.parametrize("predictor", ["auto", SequentialMonteCarlo()])
def test_rows_that_share_a_latent(predictor):
    model = BayesMPT(shared, predictor=predictor, random_state=0).fit(POSSIBLE)
    # one of two heads, the chance uniform: 1 / 6
    assert model.log_marginal_likelihood_ == pytest.approx(math.log(1 / 6), abs=0.02)
    assert model.score_samples(ROWS[:2]) == -np.inf
    with pytest.raises(ValueError, match="-inf at the fitted parameters"):
        BayesMPT(shared, predictor=predictor, random_state=0).fit(ROWS[:2])


def test_a_class_that_allows_nothing_else():
    """A latent class model with zeros in its weights and profiles, by hand."""
    weight, profile = np.array([0.4, 0.6, 0.0]), np.array([[0.0, 0.5, 0.2], [0.3, 1.0, 0.7], [0.5, 0.5, 0.5]])

    def program(x):
        with rows_of(x):
            z = pyro.sample("z", dist.Categorical(x.new_tensor(weight)))
            pyro.sample("x", dist.Bernoulli(x.new_tensor(profile)[z]).to_event(1), obs=x)

    rows = np.array(list(itertools.product([0.0, 1.0], repeat=3)))
    chance = (weight * np.where(rows[:, None] == 1, profile, 1 - profile).prod(-1)).sum(1)
    model = BayesMPT(program).fit(rows[chance > 0])
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(model.score_samples(rows), np.log(chance), rtol=1e-12)
    assert (chance == 0).sum() == 2
    classes = model.transform(rows[chance > 0])
    np.testing.assert_array_equal(classes[:, 2], 0)


def test_a_chain_that_never_goes_back():
    """A hidden Markov chain from left to right, summed over all its paths."""
    step = np.array([[0.5, 0.5, 0.0], [0.0, 0.7, 0.3], [0.0, 0.0, 1.0]])
    emit = np.array([[1.0, 0.0, 0.0], [0.2, 0.8, 0.0], [0.0, 0.3, 0.7]])

    def program(x):
        with rows_of(x):
            z = torch.zeros(len(x), dtype=torch.long)
            for t in pyro.markov(range(4)):
                z = pyro.sample(f"z{t}", dist.Categorical(x.new_tensor(step)[z]))
                pyro.sample(f"x{t}", dist.Categorical(x.new_tensor(emit)[z]), obs=x[:, t])

    rows = np.array([[0, 0, 1, 2], [0, 1, 1, 1], [2, 0, 0, 0], [1, 2, 2, 0]], dtype=float)
    truth = []
    for row in rows.astype(int):
        total = 0.0
        for path in itertools.product(range(3), repeat=4):
            before = (0, *path[:-1])
            total += np.prod([step[a, b] * emit[b, v] for a, b, v in zip(before, path, row, strict=True)])
        truth.append(np.log(total) if total else -np.inf)
    model = BayesMPT(program).fit(rows[:2])
    np.testing.assert_allclose(model.score_samples(rows), truth, rtol=1e-12)
    assert truth[2] == truth[3] == -np.inf


RARE = [0.0, 1e-300, 1e-30, 1e-17, 0.3, 1.0]
DISTRIBUTIONS = {
    "Bernoulli": (lambda p: dist.Bernoulli(p), lambda p: stats.bernoulli(p), [0.0, 1.0]),
    "Binomial": (lambda p: dist.Binomial(4, p), lambda p: stats.binom(4, p), [0.0, 1.0, 3.0, 4.0]),
    "Geometric": (lambda p: dist.Geometric(p), lambda p: stats.geom(p, loc=-1), [0.0, 2.0]),
    "NegativeBinomial": (
        lambda p: dist.NegativeBinomial(3.0, p),
        lambda p: stats.nbinom(3, 1 - p),
        [0.0, 2.0],
    ),
    "Categorical": (
        lambda p: dist.Categorical(torch.stack([1 - p, p])),
        lambda p: stats.bernoulli(p),
        [0.0, 1.0],
    ),
    "mixture": (
        lambda p: dist.MixtureSameFamily(
            dist.Categorical(torch.stack([1 - p, p])), dist.Bernoulli(p.new_tensor([0.0, 1.0]))
        ),
        lambda p: stats.bernoulli(p),
        [0.0, 1.0],
    ),
}


def scored(of, column):
    """Log-densities of one column of rows under a program of one site."""

    def program(x):
        with rows_of(x):
            pyro.sample("x", of(x), obs=x[:, 0])

    column = list(column)
    return (
        BayesMPT(program).fit(np.asarray(column[:1] * 2)[:, None]).score_samples(np.asarray(column)[:, None])
    )


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("p", RARE)
def test_rare_and_impossible_values(name, p):
    of, theirs, values = DISTRIBUTIONS[name]
    if (name == "Geometric" and p == 0) or (name == "NegativeBinomial" and p == 1):
        pytest.skip("there is no such distribution")
    with np.errstate(divide="ignore"):
        truth = theirs(p).logpmf(values)
    if name == "NegativeBinomial" and p < 1e-16:  # scipy takes 1 - p
        truth = np.array([0.0, -np.inf if p == 0 else math.log(6) + 2 * math.log(p)])
    if name == "Binomial" and 0 < p < 1e-16:
        truth = np.array([math.log(math.comb(4, int(v))) + v * math.log(p) for v in values])
    possible = sorted(zip(values, truth, strict=True), key=lambda pair: -pair[1])
    values, truth = map(np.array, zip(*possible, strict=True))
    found = scored(lambda x: of(x.new_tensor(p)).expand([len(x)]), values)
    np.testing.assert_allclose(found, truth, rtol=1e-12, atol=1e-14)


def test_infinite_logits():
    for logit, value in ((-np.inf, 0.0), (np.inf, 1.0)):
        found = scored(
            lambda x, a=logit: dist.Bernoulli(logits=x.new_tensor(a)).expand([len(x)]), [value, 1 - value]
        )
        assert found.tolist() == [0.0, -np.inf]


UNCHECKED = {
    "mixture": lambda x: dist.MixtureSameFamily(
        dist.Categorical(x.new_ones(2)), dist.Poisson(x.new_tensor([1.0, 3.0]), validate_args=False)
    ).expand([len(x)]),
    "mixture of vectors": lambda x: dist.MixtureSameFamily(
        dist.Categorical(x.new_ones(2)),
        dist.Poisson(x.new_tensor([[1.0], [3.0]]), validate_args=False).to_event(1),
    ).expand([len(x)]),
    "zeros": lambda x: dist.ZeroInflatedDistribution(
        dist.Poisson(x.new_tensor(2.0), validate_args=False), gate=x.new_tensor(0.2)
    ).expand([len(x)]),
}


@pytest.mark.parametrize("name", UNCHECKED)
@pytest.mark.parametrize("value", [-1.0, 0.5])
def test_values_are_checked_where_parts_are_not(name, value):
    """What is no count is refused, though the distributions inside would take it."""

    def program(x):
        with rows_of(x):
            law = UNCHECKED[name](x)
            pyro.sample("x", law, obs=x if law.event_dim else x[:, 0])

    model = BayesMPT(program).fit(np.array([[0.0], [2.0], [1.0]]))
    with pytest.raises(ValueError, match="(within|outside) the support"):
        model.score_samples(np.array([[0.0], [value]]))


def test_impossible_events():
    def program(x):
        p = x.new_tensor([0.0, 0.5, 0.5])
        with rows_of(x):
            pyro.sample("a", dist.OneHotCategorical(p), obs=x[:, :3])
            pyro.sample("b", dist.Multinomial(2, p), obs=x[:, 3:])

    rows = np.array([[0, 1, 0, 0, 1, 1], [1, 0, 0, 0, 2, 0], [0, 0, 1, 1, 1, 0]], dtype=float)
    found = BayesMPT(program).fit(rows[[0, 0]]).score_samples(rows)
    np.testing.assert_allclose(found, [2 * math.log(0.5), -np.inf, -np.inf], rtol=1e-12)


# ------------------------------------------------------------------------------------------------------ large counts


def lgamma(value):
    return mpmath.loggamma(mpmath.mpf(value))


def poisson(v, rate):
    return v * mpmath.log(rate) - rate - lgamma(v + 1)


def binomial(v, n, p):
    ways = lgamma(n + 1) - lgamma(v + 1) - lgamma(n - v + 1)
    return ways + v * mpmath.log(p) + (n - v) * mpmath.log(1 - p)


def negative_binomial(v, r, p):
    return lgamma(r + v) - lgamma(v + 1) - lgamma(r) + v * mpmath.log(p) + r * mpmath.log(1 - p)


COUNTS = [
    (lambda x: dist.Poisson(x.new_tensor(1e9)), poisson, (1e9,), [1e9, 1e9 + 1e5]),
    (lambda x: dist.Poisson(x.new_tensor(1e12)), poisson, (1e12,), [1e12 + 3e6, 1e12 - 1]),
    (lambda x: dist.Poisson(x.new_tensor(1e15)), poisson, (1e15,), [1e15 + 5e7, 0.999999e15]),
    (lambda x: dist.Binomial(10**12, x.new_tensor(0.25)), binomial, (1e12, 0.25), [2.5e11, 2.5e11 + 9e5]),
    (lambda x: dist.Binomial(10**12, x.new_tensor(1e-12)), binomial, (1e12, 1e-12), [3.0, 1.0]),
    (lambda x: dist.Binomial(10**9, logits=x.new_tensor(0.0)), binomial, (1e9, 0.5), [5e8, 5.001e8]),
    (
        lambda x: dist.NegativeBinomial(10.0, x.new_tensor(0.5**30)),
        negative_binomial,
        (10.0, 0.5**30),
        [0.0, 2.0],
    ),
    (
        lambda x: dist.NegativeBinomial(3.0, 1 - x.new_tensor(0.5**40)),
        negative_binomial,
        (3.0, 1 - 0.5**40),
        [1e12, 5e12],
    ),
    (
        lambda x: dist.NegativeBinomial(1e10, x.new_tensor(0.5)),
        negative_binomial,
        (1e10, 0.5),
        [1e10, 1e10 + 1e5],
    ),
]


@pytest.mark.parametrize("of, theirs, parameters, values", COUNTS)
def test_large_counts_keep_their_digits(of, theirs, parameters, values):
    found = scored(lambda x: of(x).expand([len(x)]), values)
    with mpmath.workdps(60):
        truth = [float(theirs(mpmath.mpf(v), *map(mpmath.mpf, parameters))) for v in values]
    np.testing.assert_allclose(found, truth, rtol=1e-9, atol=1e-9)


def test_a_rate_is_learned_from_large_counts():
    counts = 1e12 + 1e6 * np.random.default_rng(0).normal(size=(50, 1))

    def program(x):
        shift = pyro.param("shift", lambda: x.new_tensor(0.1))
        with rows_of(x):
            pyro.sample("x", dist.Poisson((1e12 + 1e6 * shift).expand(len(x))), obs=x[:, 0])

    model = BayesMPT(program).fit(counts.round())
    assert 1e12 + 1e6 * model.params_["shift"] == pytest.approx(counts.round().mean(), rel=1e-10)


def test_other_large_counts_say_so():
    values = [2e9, 3e9]
    with pytest.warns(UserWarning, match="GammaPoisson at counts up to [23]e\\+09.*wrong by about"):
        scored(lambda x: dist.GammaPoisson(x.new_tensor(2.0), x.new_tensor(1e-9)).expand([len(x)]), values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scored(
            lambda x: dist.GammaPoisson(x.new_tensor(2.0), x.new_tensor(1e-3)).expand([len(x)]), [5.0, 7.0]
        )


# --------------------------------------------------------------------------------- matrices that cannot be factorised

NUGGET = 1e-17  # too small where the length-scale is long


def curve(x, y):
    length = pyro.sample("length", dist.LogNormal(x.new_tensor(0.0), x.new_tensor(0.3)))
    cov = torch.exp(-0.5 * ((x - x.mT) / length[..., None, None]) ** 2) + NUGGET * torch.eye(len(x)).to(x)
    root = torch.linalg.cholesky(cov)
    pyro.sample("y", dist.MultivariateNormal(x.new_zeros(len(x)), scale_tril=root), obs=y)


def test_a_proposal_without_a_cholesky_factor_is_rejected():
    x = np.linspace(0, 3, 12)[:, None]
    y = np.sin(2 * x[:, 0])
    at = np.linspace(-2, 2, 2001)
    log_p = []
    for log_length in at:
        cov = np.exp(-0.5 * ((x - x.T) / np.exp(log_length)) ** 2) + NUGGET * np.eye(12)
        root, info = torch.linalg.cholesky_ex(torch.as_tensor(cov))
        if info:
            log_p.append(-np.inf)
            continue
        white = np.linalg.solve(root.numpy(), y)
        log_p.append(-white @ white / 2 - np.log(np.diag(root)).sum() - 6 * np.log(2 * np.pi))
    assert 0.1 < np.isinf(log_p).mean() < 0.9  # or nothing is tested
    truth = logsumexp(log_p + stats.norm(0, 0.3).logpdf(at)) + np.log(at[1] - at[0])
    model = BayesMPT(curve, predictor=SequentialMonteCarlo(128), random_state=0).fit(x, y)
    assert model.log_marginal_likelihood_ == pytest.approx(
        truth, abs=4 * model.log_marginal_likelihood_se_ + 0.02
    )


def test_a_matrix_that_never_has_a_factor_is_named():
    def program(x, y):
        length = pyro.sample("length", dist.LogNormal(x.new_tensor(9.0), x.new_tensor(0.1)))
        root = torch.linalg.cholesky(torch.exp(-((x - x.mT) ** 2) / length[..., None, None]) - 1.0)
        pyro.sample("y", dist.MultivariateNormal(x.new_zeros(len(x)), scale_tril=root), obs=y)

    x = np.linspace(0, 3, 12)[:, None]
    with pytest.raises(
        ValueError, match="a matrix after site 'length' that cannot .* Latent 'length' is .* there"
    ):
        BayesMPT(program, predictor=SequentialMonteCarlo(64)).fit(x, np.sin(x[:, 0]))


def test_the_latent_that_makes_a_distribution_impossible_is_named_with_its_value():
    def program(x):
        tau = pyro.sample("tau", dist.Gamma(x.new_tensor(1e-4), 1e-4))  # 0 at nearly all draws of the prior
        level = pyro.sample("level", dist.Normal(x.new_tensor(0.0), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(level, 1e-300 * tau), obs=x[:, 0])

    with pytest.raises(
        ValueError, match=r"distribution after site 'level' that cannot be.*Latent 'tau' is .*e-.* there"
    ):
        BayesMPT(program).fit(np.ones((3, 1)))


# ------------------------------------------------------------------------------------------------------- tiny noise

LOADING = np.random.default_rng(0).normal(size=(4, 2))


def factors(x, noise, classes):
    with rows_of(x):
        shift = pyro.sample("k", dist.Categorical(x.new_ones(2)))[..., None] if classes else 0.0
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(shift + z @ x.new_tensor(LOADING).T, noise).to_event(1), obs=x)


def gaussian(row, noise):
    """The density of the cells of a row that are there, in 80 digits."""
    seen = np.flatnonzero(~np.isnan(row))
    loading = mpmath.matrix(LOADING[seen].tolist())
    cov = loading * loading.T + mpmath.mpf(noise) ** 2 * mpmath.eye(len(seen))
    r = mpmath.matrix([mpmath.mpf(float(v)) for v in row[seen]])
    return -((r.T * mpmath.inverse(cov) * r)[0] + mpmath.log(mpmath.det(2 * mpmath.pi * cov))) / 2


@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("noise", [1e-8, 1e-10, 1e-12])
def test_tiny_noise_keeps_the_digits_that_rows_have(noise, classes):
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(4, 2)) @ LOADING.T + noise * rng.normal(size=(4, 4))
    rows[0, 1] = np.nan
    with mpmath.workdps(80):
        truth = [gaussian(row, noise) for row in rows]
        if classes:
            truth = [
                mpmath.log((mpmath.exp(a) + mpmath.exp(gaussian(r - 1, noise))) / 2)
                for a, r in zip(truth, rows, strict=True)
            ]
        truth = np.array([float(v) for v in truth])
    found = BayesMPT(lambda x: factors(x, noise, classes)).fit(rows).score_samples(rows)
    np.testing.assert_allclose(
        found, truth, rtol=0, atol=1e-15 / noise
    )  # the rows' own rounding in units of the noise


def test_a_count_is_impossible_under_a_rate_beyond_all_floats():
    rate = torch.tensor([2.0, torch.inf], dtype=torch.float64, requires_grad=True)
    for count in (3.0, 2e9):  # also where the density is a difference of large numbers
        found = log_density(dist.Poisson(rate), torch.tensor(count, dtype=torch.float64))
        assert found[0].isfinite() and found[1] == -torch.inf
        (slope,) = torch.autograd.grad(found[0], rate)
        assert slope.isfinite().all()
