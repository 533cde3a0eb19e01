"""k-means of several tables side by side: against enumeration of all clusterings, and against scikit-learn's."""

from itertools import product

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_iris, load_wine
from tables import tensor

from bayes_mpt.models import mixture_clusters
from bayes_mpt.models.mixture_clusters import centres_of, nearest


def sum_of_squares(rows, centres):
    return float((rows[:, None] - centres).square().sum(-1).amin(1).sum())


def scaled(x):
    return tensor((x - x.mean(0)) / x.std(0))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_best_of_all_clusterings(k):
    rows = tensor(np.random.default_rng(k).normal(size=(8, 2)))
    rows = rows - rows.mean(0)
    best = min(
        sum(float((part - part.mean(0)).square().sum()) for c in set(which) if len(part := rows[which == c]))
        for which in map(np.array, product(range(k), repeat=8))
    )
    [centres] = centres_of([rows], k, seed=0, n_tries=10)
    assert sum_of_squares(rows, centres) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("k", [3, 6])
def test_as_good_as_another_tool(k):
    ours, theirs = [], []
    for x in (scaled(load_iris().data), scaled(load_wine().data)):
        for seed in range(10):
            ours.append(sum_of_squares(x, centres_of([x], k, seed, 3)[0]))
            theirs.append(KMeans(k, n_init=3, random_state=seed).fit(x.numpy()).inertia_)
    difference = (np.array(ours) - theirs) / np.mean(theirs)
    assert difference.mean() < 2 * difference.std() / np.sqrt(len(difference)) + 1e-3


def test_tables_have_no_part_in_each_others(monkeypatch):
    """Of other sizes, in another order, and so many that only some of their rows are read."""
    monkeypatch.setattr(mixture_clusters, "ROWS", 100)
    wine = scaled(load_wine().data)
    tables = [wine, wine[:60], wine[40:]]
    together = centres_of(tables, 4, 0, 3)
    alone = torch.cat([centres_of([table], 4, 0, 3) for table in tables])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(centres_of(tables[::-1], 4, 0, 3), alone.flip(0), rtol=0, atol=1e-12)
    assert not torch.equal(centres_of(tables, 4, 1, 3), together)


def test_random_rows_and_one_step():
    rows = scaled(load_iris().data)
    found = [centres_of([rows], 3, seed, 0)[0] for seed in range(5)]
    settled = [sum_of_squares(rows, centres_of([rows], 3, seed, 1)[0]) for seed in range(5)]
    assert np.mean([sum_of_squares(rows, centres) for centres in found]) > np.mean(settled)
    assert len({centres.sum().item() for centres in found}) == 5


def test_fewer_distinct_rows_than_clusters():
    rows = tensor([[-1.0], [1.0]]).repeat(4, 1)
    [centres] = centres_of([rows], 4, 0, 3)
    assert sum_of_squares(rows, centres) == 0
    assert set(centres.flatten().tolist()) == {-1.0, 1.0}


def test_nearest_is_the_likeliest():
    log_prob = tensor([[-1.0, -5.0], [-2.0, -3.0]])
    share, most = nearest(log_prob)
    assert share.tolist() == [[1.0, 0.0], [0.0, 1.0]] and most.tolist() == [-1.0, -3.0]
