"""Posteriors that have one mode given all tokens and two given some, against dense grids."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

from bayes_mpt.predictors import Importance, Quadrature
from bayes_mpt.predictors.nodes.modes import _Climbs

F64 = torch.float64
GRID = np.linspace(-7, 7, 14001)
SIGNED = np.array([0, 0, 0, 1, 1])  # which tokens tell the sign of the latent


def means(a, signed):
    return torch.where(torch.tensor(signed == 1), a, a**2)


def shared(x):
    a = pyro.sample("a", dist.Normal(x.new_tensor(0.0), 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(means(a, SIGNED), 0.3), obs=x[:, 0])


def of_rows(x):
    with pyro.plate("rows", len(x)):
        a = pyro.sample("a", dist.Normal(x.new_tensor(0.0), 1.0))
        pyro.sample("y", dist.Normal(means(a[..., None], SIGNED), 0.3).to_event(1), obs=x)


def log_z(values, signed):
    log_p = stats.norm.logpdf(GRID)
    for value, s in zip(values, signed, strict=True):
        log_p = log_p + stats.norm.logpdf(value, GRID if s else GRID**2, 0.3)
    return logsumexp(log_p) + np.log(GRID[1] - GRID[0])


def truth(values, visible):
    before = log_z(values[visible], SIGNED[visible]) if visible.any() else 0.0
    out = np.zeros(len(values))
    for i in np.flatnonzero(~visible):
        more = np.append(np.flatnonzero(visible), i)
        out[i] = log_z(values[more], SIGNED[more]) - before
    return out


VISIBLE = np.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 1, 0], [1, 1, 0, 1, 0]], dtype=bool)
ROWS = np.array([[1.5, 1.3, 1.6, 1.2, 1.1], [2.0, 1.7, 2.2, -1.4, -1.5], [0.1, 0.2, 0.1, 0.3, 0.2]])


@pytest.mark.parametrize("program", [shared, of_rows])
def test_tokens_that_tell_a_sign_are_hidden(program):
    x = torch.tensor(ROWS if program is of_rows else ROWS[:1].T, dtype=F64)
    found = Quadrature().bind(program, (x,)).read((x,)).conditionals(torch.as_tensor(VISIBLE))
    want = [
        [truth(row, visible) for row in (ROWS if program is of_rows else ROWS[:1])] for visible in VISIBLE
    ]
    np.testing.assert_allclose(found.numpy(), want, atol=1e-4)


@pytest.mark.parametrize("program", [shared, of_rows])
def test_steps_of_a_chain(program):
    rows = ROWS if program is of_rows else ROWS[:1]
    x = torch.tensor(rows if program is of_rows else rows.T, dtype=F64)
    order = np.array([2, 0, 1, 4, 3])
    found = Quadrature().bind(program, (x,)).read((x,)).chain(torch.as_tensor(order)[None])[0]
    for t in range(5):
        visible = np.isin(np.arange(5), order[:t])
        want = [truth(row, visible)[order[t]] for row in rows]
        np.testing.assert_allclose(found[:, order[t]].numpy(), want, atol=1e-4)


def of_many(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    a = z.sum(-1) / 5**0.5
    pyro.sample("y", dist.Normal(means(a[..., None], SIGNED), 0.3).to_event(1), obs=x[:, 0])


def of_many_in_rows(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        a = z.sum(-1) / 5**0.5
        pyro.sample("y", dist.Normal(means(a[..., None], SIGNED), 0.3).to_event(1), obs=x)


@pytest.mark.parametrize("program", [of_many, of_many_in_rows])
def test_more_latents_than_a_rule_takes(program):
    """By draws around every mode: the sum of five is the latent of the others. Half of the mass was missed."""
    rows = ROWS if program is of_many_in_rows else ROWS[:1]
    x = torch.tensor(rows if program is of_many_in_rows else rows.T, dtype=F64)
    found = Importance(1000).bind(program, (x,)).read((x,)).conditionals(torch.as_tensor(VISIBLE[:2]))
    want = [[truth(row, visible) for row in rows] for visible in VISIBLE[:2]]
    np.testing.assert_allclose(found.numpy(), want, atol=0.1)


def groups(x, mean=0.0):
    with pyro.plate("groups", len(PAIRS)):
        a = pyro.sample("a", dist.Normal(mean, 1.0))
    with pyro.plate("rows", len(x)):
        own = a[x[:, 0].long()]
        pyro.sample("y", dist.Normal(torch.where(x[:, 1] == 1, own, own**2), 0.3), obs=x[:, 2])


def groups_of_one_mean(x):
    groups(x, pyro.sample("mean", dist.Normal(0.0, 0.5)))


def rows_of_one_mean(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 0.5))
    with pyro.plate("rows", len(x)):
        a = pyro.sample("a", dist.Normal(mean, 1.0))
        pyro.sample("square", dist.Normal(a**2, 0.3), obs=x[:, 0])
        pyro.sample("plain", dist.Normal(a, 0.3), obs=x[:, 1])


PAIRS = np.array([[2.2, 1.5], [1.4, -1.2]])
"""A square and a value with its sign of each row, or group."""


def log_z_of_pairs(seen, spread):
    """log p of the pairs that are seen (2, 2), the mean of a of a standard deviation."""
    a = GRID[::20]
    mean, weight = np.polynomial.hermite_e.hermegauss(40 if spread else 1)
    total = np.log(weight / weight.sum())
    for (square, plain), (with_square, with_plain) in zip(PAIRS, seen, strict=True):
        log_p = stats.norm.logpdf(a, spread * mean[:, None])
        log_p = log_p + with_square * stats.norm.logpdf(square, a**2, 0.3)
        log_p = log_p + with_plain * stats.norm.logpdf(plain, a, 0.3)
        total = total + logsumexp(log_p, axis=1) + np.log(a[1] - a[0])
    return logsumexp(total)


@pytest.mark.parametrize(
    "program", [groups, pytest.param(groups_of_one_mean, marks=pytest.mark.slow), rows_of_one_mean]
)
def test_rows_and_groups_inside_of_other_latents(program):
    """Squares alone are visible, and signs are asked for."""
    by_row = program is rows_of_one_mean
    flat = np.c_[[0, 0, 1, 1], [0, 1, 0, 1], PAIRS.ravel()]
    x = torch.tensor(PAIRS if by_row else flat, dtype=F64)
    seen = np.array([[1, 0], [1, 0]])
    visible = torch.tensor([[True, True, False, False] if by_row else [True, False, True, False]])
    found = Quadrature().bind(program, (x,)).read((x,)).conditionals(visible).flatten().numpy()
    want = []
    for k in range(2):
        more = seen.copy()
        more[k, 1] = 1
        spread = 0.0 if program is groups else 0.5
        want.append(log_z_of_pairs(more, spread) - log_z_of_pairs(seen, spread))
    np.testing.assert_allclose(found[~visible[0].numpy()], want, atol=5e-3)


def test_one_mode_is_followed(monkeypatch):
    """Where no set of few tokens shows another, nothing is searched again."""

    def program(x):
        a = pyro.sample("a", dist.Normal(x.new_tensor(0.0), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(a.exp(), 0.3), obs=x[:, 0])

    x = torch.tensor(ROWS[:1].T, dtype=F64)
    read = Quadrature().bind(program, (x,)).read((x,))
    read.conditionals(torch.as_tensor(VISIBLE[:1]))
    monkeypatch.setattr(_Climbs, "_starts", lambda *args: pytest.fail("searched again"))
    monkeypatch.setattr(_Climbs, "_with_images", lambda *args: pytest.fail("searched again"))
    read.conditionals(torch.as_tensor(VISIBLE))
