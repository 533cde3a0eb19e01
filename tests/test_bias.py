"""What a fixed mask size leaves out of the LML, by enumeration of all masks, and where training at it ends.

Two programs with truths of their own: a linear-Gaussian one by dense algebra, a Bernoulli one by a grid over z.
"""

import math
from itertools import combinations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logsumexp
from scipy.stats import multivariate_normal, norm
from truths import known_noise_maximum

from bayes_mpt import BayesMPT
from bayes_mpt.masks import Masks
from bayes_mpt.predictors import Quadrature, choose
from bayes_mpt.score import fixed_rate_bias

NOISE = 0.2


def all_of_size(n_tokens, size):
    """Every mask of one size, weighted so that the score is S(m) itself and not an estimate."""
    hidden = torch.zeros(math.comb(n_tokens, size), n_tokens, dtype=torch.bool)
    hidden.scatter_(1, torch.combinations(torch.arange(n_tokens), size), True)
    return Masks(~hidden, None, hidden.double() / size / len(hidden))


def factors(x, loading):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(loading.shape[1]), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ loading.T, math.sqrt(NOISE)).to_event(1), obs=x)


def pixels(x, weight, bias):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Bernoulli(logits=z[..., None] * weight + bias).to_event(1), obs=x)


class LinearGaussian:
    """x = W z + e, e ~ N(0, NOISE); truth by dense covariances."""

    predictor = "auto"

    def __init__(self, loading):
        self.loading = loading
        self.cov = loading @ loading.T + NOISE * np.eye(len(loading))

    def draw(self, n_rows):
        return np.random.default_rng(0).multivariate_normal(np.zeros(len(self.cov)), self.cov, size=n_rows)

    def program(self, x):
        factors(x, torch.from_numpy(self.loading))

    def block(self, x, hidden, seen):
        """log p(x_hidden | x_seen) of each row, the block together."""
        if not hidden:
            return np.zeros(len(x))
        cross, hidden_cov = self.cov[np.ix_(hidden, seen)], self.cov[np.ix_(hidden, hidden)]
        gain = np.linalg.solve(self.cov[np.ix_(seen, seen)], cross.T).T
        centred = x[:, hidden] - x[:, seen] @ gain.T
        return multivariate_normal(np.zeros(len(hidden)), hidden_cov - gain @ cross.T).logpdf(centred)


class Pixels:
    """x_i ~ Bernoulli(sigmoid(w_i z + b_i)); truth by a sum over a fine grid of z, exact to float64."""

    predictor = Quadrature(80)
    Z = np.linspace(-10, 10, 401)  # the rule converges exponentially: twice the nodes change no digit

    def __init__(self, weight, bias):
        self.weight, self.bias = weight, bias

    def draw(self, n_rows):
        rng = np.random.default_rng(0)
        return (rng.random((n_rows, len(self.bias))) < expit(self.log_odds(rng.normal(size=n_rows)))).astype(
            float
        )

    def log_odds(self, z):
        return z[:, None] * self.weight + self.bias

    def program(self, x):
        pixels(x, torch.from_numpy(self.weight), torch.from_numpy(self.bias))

    def block(self, x, hidden, seen):
        sign = 2 * x[:, None] - 1  # (N, 1, T)
        by_node = log_expit(sign * self.log_odds(self.Z))  # (N, G, T)
        prior = norm.logpdf(self.Z) + by_node[..., seen].sum(-1)
        return logsumexp(prior + by_node[..., hidden].sum(-1), axis=1) - logsumexp(prior, axis=1)


RNG = np.random.default_rng(1991)
CASES = {
    "linear-Gaussian": LinearGaussian(RNG.normal(size=(8, 2))),
    "pixels": Pixels(2 * RNG.normal(size=5), RNG.normal(size=5)),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def enumerated(request):
    """The case, rows, its LML by the truth (N,), its curve S(m) by our conditionals (T, N)."""
    case = request.param
    x = case.draw(5)
    args = (torch.from_numpy(x),)
    n_tokens = x.shape[1]
    with pyro.get_param_store().scope(), torch.no_grad():
        predictor = choose(case.program, args, predictor=case.predictor).read(args)
        curve = [predictor.score(all_of_size(n_tokens, m)).numpy() for m in range(1, n_tokens + 1)]
    return case, x, case.block(x, list(range(n_tokens)), []), np.array(curve)


def mean_over_masks(case, x, size, value):
    """Mean over all hidden sets of one size of value(hidden, seen): (N,)."""
    tokens = range(x.shape[1])
    return np.mean(
        [value(list(h), [i for i in tokens if i not in h]) for h in combinations(tokens, size)], axis=0
    )


@pytest.mark.slow
def test_the_area_is_the_lml(enumerated):
    _, _, lml, curve = enumerated
    np.testing.assert_allclose(curve.sum(0), lml, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_beyond_a_size_lies_the_lml_of_what_it_leaves_visible(enumerated):
    """Tail: sum over m > M of S(m) = E_R log p(x_R), |R| = T - M."""
    case, x, _, curve = enumerated
    for size in range(1, len(curve) + 1):
        want = mean_over_masks(case, x, size, lambda _, seen: case.block(x, seen, []))
        np.testing.assert_allclose(curve[size:].sum(0), want, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_up_to_a_size_lies_the_joint_block(enumerated):
    """Sum over m <= M of S(m) = E_M log p(x_M | x_R), the hidden tokens together."""
    case, x, _, curve = enumerated
    for size in range(1, len(curve) + 1):
        want = mean_over_masks(case, x, size, lambda hidden, seen: case.block(x, hidden, seen))
        np.testing.assert_allclose(curve[:size].sum(0), want, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_the_bias_is_a_tail_and_a_dependence_within_the_mask(enumerated):
    """B = LML - T S(M) = [sum over m > M of S(m) - (T - M) S(M)] + E_M [log p(x_M | x_R) - sum_i log p(x_i | x_R)]."""
    case, x, lml, curve = enumerated
    n_tokens = len(curve)
    model = BayesMPT(case.program, predictor=case.predictor).fit(x)
    for size in range(1, n_tokens + 1):
        alone = mean_over_masks(
            case, x, size, lambda hidden, seen: sum(case.block(x, [i], seen) for i in hidden)
        )
        np.testing.assert_allclose(size * curve[size - 1], alone, rtol=0, atol=1e-9)
        together = mean_over_masks(case, x, size, lambda hidden, seen: case.block(x, hidden, seen))
        seen = mean_over_masks(case, x, size, lambda _, seen: case.block(x, seen, []))
        want = seen - (n_tokens - size) / size * alone + together - alone
        np.testing.assert_allclose(lml - n_tokens * curve[size - 1], want, rtol=0, atol=1e-9)
        got = fixed_rate_bias(model, x, size / n_tokens)
        assert got.value == pytest.approx(want.mean(), abs=1e-9) and got.se == 0
        # a bias that the tail alone explains would need the joint block in the loss: here tokens depend on each other
        assert size == 1 or abs(together - alone).max() > 1e-3


# ---------------------------------------------------------------------------------------------- in expectation


def population(case, n_tokens):
    """Rows and weights with which a weighted mean is the expectation of the score under the case."""
    if isinstance(case, LinearGaussian):  # quadratic in x: rows with the second moments serve
        root = np.linalg.cholesky(case.cov)
        return math.sqrt(n_tokens) * root.T, np.full(n_tokens, 1 / n_tokens)
    x = np.array([[i >> t & 1 for t in range(n_tokens)] for i in range(2**n_tokens)], dtype=float)
    return x, np.exp(case.block(x, list(range(n_tokens)), []))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_size_of_the_bias(case):
    """Under the true model S(m) falls with m: low rates flatter, high ones hurt, and B differs between parameters."""
    n_tokens = len(case.cov if isinstance(case, LinearGaussian) else case.bias)
    x, weight = population(case, n_tokens)
    assert weight.sum() == pytest.approx(1, abs=1e-12)

    def curve(program):
        args = (torch.from_numpy(x),)
        with pyro.get_param_store().scope(), torch.no_grad():
            predictor = choose(program, args, predictor=case.predictor).read(args)
            return np.array(
                [predictor.score(all_of_size(n_tokens, m)).numpy() @ weight for m in range(1, n_tokens + 1)]
            )

    s = curve(case.program)
    assert (np.diff(s) < 0).all()
    bias = s.sum() - n_tokens * s
    assert (np.diff(bias) > 0).all() and bias[0] < -0.03 and bias[-1] > 0.03
    other = (
        LinearGaussian(1.3 * case.loading)
        if isinstance(case, LinearGaussian)
        else Pixels(1.3 * case.weight, case.bias)
    )
    s_other = curve(other.program)
    assert (abs(s_other.sum() - n_tokens * s_other - bias)[[0, -1]] > 1e-3).all()


# ----------------------------------------------------------------------------------------- where training at it ends


def lml_after_training(program, x, weight, sizes):
    """Expected LML where the mean of T S(m) over these sizes is greatest, the best of some starts."""
    rows, weight = torch.from_numpy(x), torch.from_numpy(weight)
    n_tokens = x.shape[1]
    parts = [all_of_size(n_tokens, m) for m in sizes]
    share = n_tokens / len(parts)
    masks = Masks(torch.cat([p.visible for p in parts]), None, share * torch.cat([p.weight for p in parts]))
    found = []
    for start in range(3):
        with pyro.get_param_store().scope():
            pyro.set_rng_seed(start)
            bound = choose(program, (rows,))
            leaves = [p for _, p in pyro.get_param_store().named_parameters()]
            optimiser = torch.optim.LBFGS(
                leaves,
                max_iter=500,
                tolerance_grad=1e-10,
                tolerance_change=1e-15,
                line_search_fn="strong_wolfe",
            )

            def closure(bound=bound, optimiser=optimiser):
                optimiser.zero_grad()
                loss = -bound.read((rows,)).score(masks) @ weight
                loss.backward()
                return loss

            optimiser.step(closure)
            with torch.no_grad():
                read = bound.read((rows,))
                score = read.score(masks) @ weight
                found.append((float(score), float(read.score() @ weight)))
    return max(found)[1]


def gaussian_factors(n_latents):
    def program(x):
        factors(x, pyro.param("loading", lambda: torch.randn(x.shape[1], n_latents, dtype=torch.float64)))

    return program


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[1], [4], [6]], ids=str)
def test_a_well_specified_program_ends_at_the_truth_whatever_the_size(sizes):
    case = CASES["linear-Gaussian"]
    x, weight = population(case, 8)
    want = -0.5 * (np.linalg.slogdet(2 * math.pi * case.cov)[1] + 8)  # minus the entropy
    assert known_noise_maximum(case.cov, 2, NOISE) == pytest.approx(want, abs=1e-10)
    assert lml_after_training(gaussian_factors(2), x, weight, sizes) == pytest.approx(want, abs=1e-7)


@pytest.mark.slow
def test_with_everything_hidden_only_the_marginals_are_learnt():
    case = CASES["linear-Gaussian"]
    x, weight = population(case, 8)
    assert (
        lml_after_training(gaussian_factors(2), x, weight, [8]) < known_noise_maximum(case.cov, 2, NOISE) - 1
    )


@pytest.mark.slow
def test_a_misspecified_program_ends_lower():
    """Three factors made the rows and one is fitted: each size has its own maximum, only all of them the LML's."""
    case = LinearGaussian(np.random.default_rng(0).normal(size=(6, 3)))
    x, weight = population(case, 6)
    best = known_noise_maximum(case.cov, 1, NOISE)
    for size in (1, 2, 3, 5):
        assert best - 10 < lml_after_training(gaussian_factors(1), x, weight, [size]) < best - 0.01, size
    everything = lml_after_training(gaussian_factors(1), x, weight, range(1, 7))
    assert everything == pytest.approx(best, abs=1e-7)


@pytest.mark.slow
def test_pixels_have_the_same_maxima():
    """No closed form: every S(m) is stationary at the truth, and none that sees a token at a misspecified best LML."""
    case = CASES["pixels"]
    x, weight = population(case, 5)
    for size in range(1, 6):
        gradient = gradient_of_curve(x, weight, size, case.weight, case.bias)
        assert gradient.abs().max() < 1e-8, size  # S(T) too: it cannot tell the truth from other loadings

    # two factors made these
    z = np.linspace(-8, 8, 81)
    w = 3 * np.random.default_rng(1).normal(size=(2, 5))
    log_odds = (z[:, None, None] * w[0] + z[:, None] * w[1] + 1).reshape(-1, 5)  # (G, T)
    prior = (norm.logpdf(z)[:, None] + norm.logpdf(z)).ravel()
    log_p = logsumexp(prior + log_expit((2 * x[:, None] - 1) * log_odds).sum(-1), axis=1)
    weight = np.exp(log_p - logsumexp(log_p))
    fit = minimize(
        one_factor_grid, np.r_[w[0], np.zeros(5)], (x, weight), jac=True, tol=1e-14, options={"gtol": 1e-10}
    )
    found = fit.x[:5], fit.x[5:]
    assert -fit.fun < weight @ np.log(weight) - 1e-3
    by_size = [gradient_of_curve(x, weight, size, *found) for size in range(1, 6)]
    assert all(g.abs().max() > 1e-4 for g in by_size[:4])
    assert sum(by_size).abs().max() < 1e-7


def one_factor_grid(theta, x, weight):
    """Minus the expected LML of one factor and its gradient, by a grid."""
    z = torch.linspace(-10, 10, 401, dtype=torch.float64)
    theta = torch.tensor(theta, requires_grad=True)
    log_odds = z[:, None] * theta[:5] + theta[5:]
    log_p = torch.nn.functional.logsigmoid(torch.from_numpy(2 * x - 1)[:, None] * log_odds).sum(-1)
    log_prior = -0.5 * z**2 - 0.5 * math.log(2 * math.pi) + math.log(z[1] - z[0])
    value = -(log_prior + log_p).logsumexp(1) @ torch.from_numpy(weight)
    value.backward()
    return float(value.detach()), theta.grad.numpy()


def gradient_of_curve(x, weight, size, loading, bias):
    """Of the expected S(m) in loading and bias, (2 T,)."""
    rows = torch.from_numpy(x)

    def program(x):
        pixels(
            x,
            pyro.param("loading", lambda: torch.from_numpy(loading.copy())),
            pyro.param("bias", lambda: torch.from_numpy(bias.copy())),
        )

    with pyro.get_param_store().scope():
        predictor = choose(program, (rows,), predictor=Quadrature(80)).read((rows,))
        score = predictor.score(all_of_size(x.shape[1], size)) @ torch.from_numpy(weight)
        return torch.cat(torch.autograd.grad(score, [pyro.param("loading"), pyro.param("bias")]))
