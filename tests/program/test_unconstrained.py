"""Latents near an end of their support, stretched laws, and laws whose ends move: by arithmetic of many digits."""

from __future__ import annotations

import mpmath
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import betaln, gammaln, logsumexp
from scipy.stats import beta, norm, vonmises
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import AffineTransform, ExpTransform, SigmoidTransform

from bayes_mpt import BayesMPT
from bayes_mpt.program.program import ModelError
from bayes_mpt.program.supports import support_of
from bayes_mpt.program.transforms import Sticks, carried, exact_transform
from bayes_mpt.program.unconstrained import UNCONSTRAINED, keeps_ends, latent_density

FAR = [-900.0, -60.0, -3.0, 0.5, 60.0, 900.0]
mp = mpmath.mp.clone()
mp.dps = 420  # digits: exp(-900) is 1e-391


def tensor(value):
    return torch.tensor(value, dtype=torch.float64)


def transformed(base, *transforms):
    return dist.TransformedDistribution(base, list(transforms))


def log_beta(z, a, b):
    return (a - 1) * mp.log(z) + (b - 1) * mp.log(1 - z) - mp.log(mp.beta(a, b))


def log_gamma(z, a, b):
    return a * mp.log(b) + (a - 1) * mp.log(z) - b * z - mp.loggamma(a)


def log_normal(v, sd):
    return -(v**2) / 2 / sd**2 - mp.log(sd) - mp.log(2 * mp.pi) / 2


a, b, two, third = mp.mpf(0.02), mp.mpf(0.03), mp.mpf(2), mp.mpf(0.3)
BETWEEN = {
    "Beta": (lambda: dist.Beta(tensor(0.02), tensor(0.03)), lambda p: log_beta(p, a, b)),
    "Kumaraswamy": (
        lambda: dist.Kumaraswamy(tensor(0.02), tensor(0.03)),
        lambda p: mp.log(a * b) + (a - 1) * mp.log(p) + (b - 1) * mp.log(1 - p**a),
    ),
    "stretched": (
        lambda: transformed(dist.Beta(tensor(0.02), tensor(0.03)), AffineTransform(-1.0, 2.0)),
        lambda p: log_beta(p, a, b) - mp.log(2),
    ),
    "turned": (
        lambda: transformed(dist.Beta(tensor(0.02), tensor(0.03)), AffineTransform(1.0, -1.0)),
        lambda p: log_beta(1 - p, a, b),
    ),
    "logit-normal": (
        lambda: transformed(
            dist.Normal(tensor(0.0), 1.0), AffineTransform(2.0, tensor(0.3)), SigmoidTransform()
        ),
        lambda p: log_normal(mp.log(p) - mp.log(1 - p) - 2, third) - mp.log(p) - mp.log(1 - p),
    ),
    "mixture": (
        lambda: dist.MixtureSameFamily(
            dist.Categorical(tensor([0.5, 0.5])), dist.Beta(tensor([0.02, 2.0]), tensor([0.03, 2.0]))
        ),
        lambda p: mp.log(mp.exp(log_beta(p, a, b)) + mp.exp(log_beta(p, two, two))) - mp.log(2),
    ),
}
ABOVE = {
    "Gamma": (lambda: dist.Gamma(tensor(0.02), tensor(0.03)), lambda z: log_gamma(z, a, b)),
    "Chi2": (lambda: dist.Chi2(tensor(0.04)), lambda z: log_gamma(z, mp.mpf(0.04) / 2, mp.mpf(0.5))),
    "InverseGamma": (
        lambda: dist.InverseGamma(tensor(0.02), tensor(0.03)),
        lambda z: log_gamma(1 / z, a, b) - 2 * mp.log(z),
    ),
    "Weibull": (
        lambda: dist.Weibull(tensor(2.0), tensor(0.02)),
        lambda z: mp.log(a / 2) + (a - 1) * mp.log(z / 2) - (z / 2) ** a,
    ),
    "LogNormal": (
        lambda: dist.LogNormal(tensor(0.0), tensor(2.0)),
        lambda z: log_normal(mp.log(z), two) - mp.log(z),
    ),
    "scaled": (
        lambda: transformed(dist.Gamma(tensor(0.02), tensor(0.03)), AffineTransform(0.0, tensor(2.0))),
        lambda z: log_gamma(z / 2, a, b) - mp.log(2),
    ),
    "HalfCauchy": (
        lambda: dist.HalfCauchy(tensor(2.0)),
        lambda z: mp.log(2 / mp.pi / 2) - mp.log(1 + z**2 / 4),
    ),
}


def at(fn, u):
    value = exact_transform(biject_to(support_of(fn)))(u)
    return latent_density({"fn": fn, "value": value, "infer": {UNCONSTRAINED: u}})


@pytest.mark.parametrize("name", BETWEEN)
def test_a_law_between_two_ends_has_all_digits_at_both(name):
    law, truth = BETWEEN[name]
    assert keeps_ends(law())
    exact = [float(truth(1 / (1 + mp.exp(-mp.mpf(u))))) for u in FAR]
    np.testing.assert_allclose(at(law(), tensor(FAR)), exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ABOVE)
def test_a_law_above_an_end_has_all_digits_there_and_far_out(name):
    law, truth = ABOVE[name]
    exact = [float(truth(mp.exp(mp.mpf(u)))) for u in FAR if u < 100]
    np.testing.assert_allclose(at(law(), tensor(FAR)[: len(exact)]), exact, rtol=1e-11, atol=1e-12)
    assert not bool(at(law(), tensor(FAR)).isnan().any())


@pytest.mark.parametrize("relaxed", [False, True])
def test_shares_have_all_digits_in_every_corner(relaxed):
    u = tensor([[900.0, -800.0], [-900.0, 700.0], [-60.0, -70.0], [0.3, -0.2], [60.0, 900.0]])
    z = [[1 / (1 + mp.exp(-(mp.mpf(v) - mp.log(2 - i)))) for i, v in enumerate(row)] for row in u.tolist()]
    shares = [(z1, (1 - z1) * z2, (1 - z1) * (1 - z2)) for z1, z2 in z]
    c = [mp.mpf(v) for v in (0.02, 0.03, 0.5)]
    if relaxed:  # Maddison, Mnih and Teh 2017, with temperature 0.3 and probabilities 1/5, 2/5, 2/5
        fn = dist.RelaxedOneHotCategorical(tensor(0.3), tensor([0.2, 0.4, 0.4]))
        p = [mp.mpf(v) for v in (0.2, 0.4, 0.4)]
        t = mp.mpf(0.3)
        exact = [
            mp.log(2) + 2 * mp.log(t) - 3 * mp.log(sum(q * y**-t for q, y in zip(p, s, strict=True)))
            + sum(mp.log(q) - (t + 1) * mp.log(y) for q, y in zip(p, s, strict=True))
            for s in shares
        ]  # fmt: skip
    else:
        fn = dist.Dirichlet(tensor([0.02, 0.03, 0.5]))
        constant = mp.loggamma(sum(c)) - sum(mp.loggamma(v) for v in c)
        exact = [sum((v - 1) * mp.log(y) for v, y in zip(c, s, strict=True)) + constant for s in shares]
    node = {"fn": fn, "value": Sticks()(u), "infer": {UNCONSTRAINED: carried(Sticks(), u)}}
    np.testing.assert_allclose(latent_density(node), [float(v) for v in exact], rtol=1e-11)


def test_what_a_law_can_take():
    gamma = dist.Gamma(tensor(2.0), 1.0)
    below = support_of(transformed(gamma, AffineTransform(3.0, -2.0)))
    assert isinstance(below, type(constraints.less_than(3))) and float(below.upper_bound) == 3
    assert support_of(transformed(gamma, AffineTransform(0.0, tensor([1.0, -1.0])))) is constraints.real
    assert (
        support_of(transformed(dist.Normal(tensor(0.0), 1.0), AffineTransform(1.0, 2.0))) is constraints.real
    )
    assert support_of(transformed(gamma, ExpTransform())) == constraints.positive  # as torch says
    both = dist.Beta(tensor([1.0, 2.0]), 1.0)
    assert support_of(dist.MixtureSameFamily(dist.Categorical(tensor([1.0, 1.0])), both)) == (
        constraints.unit_interval
    )


# ------------------------------------------------------------------------------------------------------ whole fits


def dirichlet_multinomial(counts, a):
    """log int Dirichlet(p | a) prod_k p_k^counts_k."""
    total = gammaln(a.sum(-1)) - gammaln((a + counts).sum(-1))
    return (total + (gammaln(a + counts) - gammaln(a)).sum(-1)).sum()


def score(program, x):
    estimate = BayesMPT(program, random_state=0).fit(x).estimate(x)
    return estimate.total, estimate.se


@pytest.mark.slow
@pytest.mark.parametrize("a", [0.05, 0.02])
def test_rows_of_shares_in_corners(a):
    x = np.array([[0.0, 0, 0], [2, 2, 2], [0, 0, 2], [1, 1, 1]])

    def program(x):
        with pyro.plate("rows", len(x)):
            p = pyro.sample("p", dist.Dirichlet(torch.full((3,), a, dtype=torch.float64)))
            each = dist.Categorical(p[..., None, :].expand(*p.shape[:-1], 3, 3))
            pyro.sample("x", each.to_event(1), obs=x)

    counts = np.stack([(x == k).sum(1) for k in range(3)], 1)
    total, se = score(program, x)
    assert abs(total - dirichlet_multinomial(counts, np.full(3, a))) < min(2e-4, 10 * se)


def test_rows_between_other_ends():
    x = np.array([[0.2], [-1.3], [0.9]])

    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", transformed(dist.Beta(tensor(2.0), 2.0), AffineTransform(-1.0, 2.0)))
            pyro.sample("x", dist.Normal(z[..., None], 0.5).to_event(1), obs=x)

    p = (np.arange(4000) + 0.5) / 4000
    terms = beta.logpdf(p, 2, 2) + norm.logpdf(x, 2 * p - 1, 0.5)
    total, _ = score(program, x)
    np.testing.assert_allclose(total, (logsumexp(terms, axis=1) - np.log(4000)).sum(), atol=1e-6)


@pytest.mark.slow
def test_odds_of_one_of_which_much_is_beyond_one():
    """Of Beta(.02, .02) turned round a third is nearer to 1 than numbers are; of Gamma(.001, 1) half is below them."""
    x = np.array([[1.0, 1, 1], [0, 0, 0], [1, 0, 1]])
    k, a = x.sum(1), 0.02

    def coins(x):
        with pyro.plate("rows", len(x)):
            p = pyro.sample("p", transformed(dist.Beta(tensor(a), tensor(a)), AffineTransform(1.0, -1.0)))
            pyro.sample("x", dist.Bernoulli(p[..., None].expand(*p.shape, 3)).to_event(1), obs=x)

    assert abs(score(coins, x)[0] - (betaln(a + k, a + 3 - k) - betaln(a, a)).sum()) < 1e-6

    def counts(x):
        with pyro.plate("rows", len(x)):
            rate = pyro.sample("rate", dist.Gamma(tensor(0.001), tensor(1.0)))
            pyro.sample("x", dist.Poisson(rate[..., None].expand(*rate.shape, 3)).to_event(1), obs=x)

    truth = gammaln(0.001 + k) - gammaln(0.001) - (0.001 + k) * np.log(4)
    total, se = score(counts, x)
    assert abs(total - truth.sum()) < min(1e-4, 10 * se)


Y = np.array([[0.4], [0.9], [0.1], [0.7]])


def test_ends_that_move_with_a_parameter_are_refused():
    def program(x):
        high = pyro.param("high", lambda: x.new_tensor(3.0))
        z = pyro.sample("z", dist.Uniform(tensor(0.0), high))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[:, 0])

    with pytest.raises(ModelError, match="move with other latents or with parameters"):
        BayesMPT(program).fit(Y)


@pytest.mark.parametrize("by_row", [False, True])
def test_an_angle_turns_once(by_row):
    """Its density is periodic: over all real numbers it would count every turn."""
    y = np.array([[0.7], [2.9], [-2.8], [1.4]])

    def program(x):
        if not by_row:
            angle = pyro.sample("angle", dist.VonMises(tensor(3.0), tensor(0.5)))
        with pyro.plate("rows", len(x)):
            if by_row:
                angle = pyro.sample("angle", dist.VonMises(tensor(3.0), tensor(0.5)))
            pyro.sample("y", dist.VonMises(angle, tensor(2.0)), obs=x[:, 0])

    at = np.linspace(-np.pi, np.pi, 2000, endpoint=False)
    terms = vonmises.logpdf(y, 2, at)
    prior = vonmises.logpdf(at, 0.5, 3) + np.log(2 * np.pi / 2000)
    truth = logsumexp(prior + terms, axis=1).sum() if by_row else logsumexp(prior + terms.sum(0))
    total, se = score(program, y)
    assert abs(total - truth) < max(1e-4, 3 * se)
