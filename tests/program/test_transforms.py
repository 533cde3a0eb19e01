"""Shares from real numbers: torch's where both are exact, and right where torch's end at 1 - 2e-16."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit
from torch.distributions import biject_to, constraints

from bayes_mpt.program.transforms import Sticks, exact_transform


@pytest.mark.parametrize("n_shares", [2, 3, 7])
def test_shares_are_those_of_torch(n_shares):
    u = torch.as_tensor(np.random.default_rng(0).normal(0, 3, (50, n_shares - 1)))
    ours, theirs = Sticks(), biject_to(constraints.simplex)
    y = ours(u)
    torch.testing.assert_close(y, theirs(u), atol=1e-15, rtol=1e-12)
    torch.testing.assert_close(ours.log_abs_det_jacobian(u, y), theirs.log_abs_det_jacobian(u, theirs(u)))
    torch.testing.assert_close(ours.inv(y), u)
    matrix = torch.autograd.functional.jacobian(lambda v: ours(v)[:-1], u[0])
    torch.testing.assert_close(torch.linalg.slogdet(matrix)[1], ours.log_abs_det_jacobian(u, y)[0])
    torch.testing.assert_close(torch.vmap(ours)(u), y)


def test_a_share_is_as_exact_near_one_as_near_nothing():
    u = torch.tensor([[-700.0], [-50.0], [50.0], [700.0]], dtype=torch.float64)
    y = Sticks()(u)
    np.testing.assert_allclose(y[:, 0], expit(u[:, 0].numpy()), rtol=1e-13)
    np.testing.assert_allclose(y[:, 1], expit(-u[:, 0].numpy()), rtol=1e-13)
    torch.testing.assert_close(Sticks().inv(y), u)


def test_it_stands_in_for_the_transform_of_independent_parts():
    support = constraints.independent(constraints.simplex, 1)
    u = torch.as_tensor(np.random.default_rng(1).normal(size=(4, 5, 2)))
    exact, torchs = exact_transform(biject_to(support)), biject_to(support)
    torch.testing.assert_close(exact(u), torchs(u))
    torch.testing.assert_close(
        exact.log_abs_det_jacobian(u, exact(u)), torchs.log_abs_det_jacobian(u, torchs(u))
    )
