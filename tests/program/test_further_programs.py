"""Programs after books and galleries, each with a truth of its own, beside the fixed list of the zoo."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats
from scipy.special import logsumexp

from bayes_mpt import BayesMPT


def log_integral(log_joint, *axes: tuple[float, float, int]) -> float:
    """log of the integral of exp(log_joint) over a box, by rectangles: ``log_joint`` takes points (M, d)."""
    grids = [np.linspace(*axis) for axis in axes]
    points = np.stack(np.meshgrid(*grids, indexing="ij"), -1).reshape(-1, len(axes))
    return float(logsumexp(log_joint(points)) + sum(np.log(g[1] - g[0]) for g in grids))


@pytest.mark.slow
def test_coefficients_that_multiply_states_leave_the_states_in_closed_form():
    """A state and its coefficient are each affine alone, and not together: an AR(2) that is observed with noise."""
    rng, n = np.random.default_rng(13), 10
    state = np.zeros(n)
    for t in range(n):
        state[t] = 0.6 * state[t - 1] * (t > 0) + 0.2 * state[t - 2] * (t > 1) + 0.5 * rng.normal()
    y = state + 0.3 * rng.normal(size=n)

    def program(y):
        a = pyro.sample("a", dist.Normal(0.5, 0.3))
        b = pyro.sample("b", dist.Normal(0.0, 0.3))
        before = last = y.new_zeros(())
        for t in range(len(y)):
            now = pyro.sample(f"z{t}", dist.Normal(a * last + b * before, 0.5))
            pyro.sample(f"y{t}", dist.Normal(now, 0.3), obs=y[t, 0])
            before, last = last, now

    def log_joint(u):
        a, b = u.T
        back = np.eye(n) - a[:, None, None] * np.eye(n, k=-1) - b[:, None, None] * np.eye(n, k=-2)
        root = 0.5 * np.linalg.inv(back)
        covariance = root @ root.swapaxes(1, 2) + 0.09 * np.eye(n)
        half = -0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1]
        quadratic = np.linalg.solve(covariance, np.broadcast_to(y[:, None], (len(u), n, 1)))[..., 0] @ y
        return half - 0.5 * quadratic + stats.norm.logpdf(a, 0.5, 0.3) + stats.norm.logpdf(b, 0.0, 0.3)

    mpt = BayesMPT(program, random_state=0).fit(y[:, None])
    assert "Quadrature" in str(mpt.explain())
    assert "in closed form" in str(mpt.explain())
    truth = log_integral(log_joint, (-1.0, 2.0, 121), (-1.5, 1.5, 121))
    assert mpt.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-6)


@pytest.mark.parametrize("law", ["Weibull", "LogNormal"])
def test_a_transformed_law_beside_the_mass_of_what_is_cut_off(law):
    """Its base distribution is no factor."""
    rng = np.random.default_rng(20)
    full = 2 * rng.weibull(1.5, 15)
    time, ended = np.minimum(full, 2.0), (full <= 2.0).astype(float)

    def program(table):
        k = pyro.sample("k", dist.Gamma(2.0, 1.0))
        time, ended = table[:, 0], table[:, 1]
        with pyro.plate("rows", len(table)):
            if law == "Weibull":
                fn, beyond = dist.Weibull(2.0, k), -((time / 2.0) ** k)
            else:
                fn = dist.LogNormal(0.0, k)
                beyond = torch.log(0.5 * torch.special.erfc(time.log() / k / 2**0.5))
            with poutine.mask(mask=ended == 1):
                pyro.sample("time", fn, obs=time)
            pyro.factor("beyond", torch.where(ended == 1, 0.0, beyond))

    def log_joint(u):
        k = np.exp(u)
        fn = stats.weibull_min(k, scale=2.0) if law == "Weibull" else stats.lognorm(k)
        parts = np.where(ended == 1, fn.logpdf(time), fn.logsf(time)).sum(1)
        return parts + stats.gamma.logpdf(k[:, 0], 2.0) + u[:, 0]

    mpt = BayesMPT(program, random_state=0).fit(np.c_[time, ended])
    assert "not checked" not in str(mpt.explain())
    truth = log_integral(log_joint, (-5.0, 4.0, 2001))
    assert mpt.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-6)


def test_a_moving_average_that_cannot_be_inverted_is_a_narrow_mode():
    """It holds 8 % of the evidence at |theta| > 1, behind places where the density is hopeless."""
    x = np.random.default_rng(3).normal(size=(14, 1))

    def program(x):
        theta = pyro.sample("theta", dist.Normal(0.0, 0.5))
        shock = x.new_zeros(())
        for t in range(len(x)):
            shock_now = x[t, 0] - theta * shock
            pyro.sample(f"x{t}", dist.Normal(0.0, 1.0), obs=shock_now)
            shock = shock_now

    def log_joint(u):
        shock, total = 0.0, stats.norm.logpdf(u[:, 0], 0.0, 0.5)
        for value in x[:, 0]:
            shock = value - u[:, 0] * shock
            total = total + stats.norm.logpdf(shock)
        return total

    mpt = BayesMPT(program, random_state=0).fit(x)
    truth = log_integral(log_joint, (-4.0, 4.0, 80001))
    assert mpt.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-6)
