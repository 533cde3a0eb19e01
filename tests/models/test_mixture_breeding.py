"""Mixtures bred from others, and the algebra of missing cells of many side by side."""

import numpy as np
import pytest
import torch

from bayes_mpt.models import mixture_patterns
from bayes_mpt.models.mixture_breeding import FLOOR, Plan, bred, crossed

N, K, CHILDREN = 200, 3, 40


def shares(seed):
    """Of rows by two parents of each child, the second with other names of its components; and which those are."""
    rng = np.random.default_rng(seed)
    first = rng.dirichlet(np.full(K, 0.1), N).T
    second = np.where(rng.random(N) < 0.3, rng.dirichlet(np.full(K, 0.1), N).T, first)
    orders = [rng.permutation(K) for _ in range(CHILDREN)]
    return np.stack([first] * CHILDREN), np.stack([second[order] for order in orders]), second


def test_children_have_shares_of_either_parent_whatever_the_names():
    first, other, second = shares(0)
    parts = {("rows", 0): slice(0, 120), ("block", 1): slice(120, None)}
    each = [{key: torch.from_numpy(a[..., part]) for key, part in parts.items()} for a in (first, other)]
    child = torch.cat(list(crossed(*each, torch.Generator().manual_seed(0)).values()), -1).numpy()
    np.testing.assert_allclose(child.sum(1), 1.0, rtol=1e-14)
    by_rows, by_components = child[: CHILDREN // 2], child[CHILDREN // 2 :]
    of_first, of_second = (np.abs(by_rows - p).max(1) < 1e-14 for p in (first[0], second))
    assert (of_first | of_second).all()
    differ = np.abs(first[0] - second).max(0) > 1e-6
    assert of_first[:, differ].mean() == pytest.approx(0.5, abs=0.05)  # four standard errors
    alike = np.abs(by_components - first[0])[..., ~differ]
    assert alike.max() < K * FLOOR
    mixed = np.stack([[np.where(c, first[0].T, second.T).T for c in np.ndindex(*[2] * K)]])[0] + FLOOR
    mixed /= mixed.sum(1, keepdims=True)
    found = np.abs(by_components[:, None] - mixed).max((2, 3)).min(1)
    assert found.max() < 1e-14
    assert len(np.unique(by_components.round(12), axis=0)) > 2**K / 2


class Numbers:
    """Places are numbers, of which the nearest whole one is the end of a climb; the higher, the better, up to 9."""

    def taken(self, at, index):
        return at[index]

    def joined(self, parts):
        return torch.cat(parts)

    def judged(self, at):
        at = torch.where(at.round() > 9, 0.0, at.round())
        return at, at

    settled = judged

    def shaken(self, at, generator):
        return at + torch.rand(at.shape, generator=generator) * 3 - 0.8

    def child(self, first, second, generator):
        return (first + second) / 2


def test_the_best_go_on_and_no_two_are_alike():
    plan = Plan(rounds=10, children=4, shaken=6, parents=2, kept=4, places=3, patience=8)
    start = torch.tensor([2.0, 1.0, 0.0])
    end = bred(start, 3, Numbers(), plan, torch.Generator().manual_seed(0))
    assert end.tolist() == sorted(set(end.tolist()), reverse=True)
    assert end[0] == 9 and len(end) == 3
    alone = bred(start[:1], 1, Numbers(), plan, torch.Generator().manual_seed(0))
    assert alone[0] > start[0]


@pytest.mark.parametrize("many", [1, 10**9])
def test_covariances_of_hidden_cells_are_inverses_of_blocks(monkeypatch, many):
    monkeypatch.setattr(mixture_patterns, "MANY", many)
    rng = np.random.default_rng(1)
    root = rng.normal(size=(2, 3, 6, 9))
    precision = root @ root.swapaxes(2, 3)
    sets = [[4], [0, 5, 2], [1, 3]]
    hidden, hides = np.zeros((3, 3), int), np.zeros((3, 3))
    for p, cells in enumerate(sets):
        hidden[p, : len(cells)], hides[p, : len(cells)] = cells, 1
    cov, log_det = mixture_patterns._given_observed(*map(torch.from_numpy, (precision, hidden, hides)))
    for p, cells in enumerate(sets):
        block, n = precision[..., cells, :][..., cells], len(cells)
        want = np.zeros((2, 3, 3, 3))
        want[..., :n, :n] = np.linalg.inv(block)
        np.testing.assert_allclose(cov[:, :, p].numpy(), want, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(log_det[..., p].numpy(), np.linalg.slogdet(block)[1], rtol=1e-12)
