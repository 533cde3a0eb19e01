"""Densities of rows that are left out of the components that judge them, against components made without them."""

import numpy as np
import pytest
import torch
from scipy import stats

from bayes_mpt.models.left_out import LeftOut

N, T, K = 12, 2, 2


def made_of(x, share, kind):
    """Weights, means and covariances of rows with these shares (K, N)."""
    count = share.sum(1)
    loc = share @ x / count[:, None]
    off = x - loc[:, None]
    scatter = np.einsum("kn,kni,knj->kij", share, off, off)
    if kind == "tied":
        return count, loc, np.broadcast_to(scatter.sum(0) / count.sum(), scatter.shape)
    cov = scatter / count[:, None, None]
    if kind == "spherical":
        cov = np.stack([np.eye(T) * np.trace(c) / T for c in cov])
    return count, loc, cov


def terms(row, loc, cov):
    return np.array([stats.multivariate_normal(m, c).logpdf(row) for m, c in zip(loc, cov, strict=True)])


@pytest.mark.parametrize("kind", ["full", "tied", "spherical"])
def test_left_out_is_without_the_row(kind):
    """Of a tied covariance each component's change is by its own share of the row alone."""
    rng = np.random.default_rng(0)
    x, share = rng.normal(size=(N, T)), rng.dirichlet([1.0, 1.0], N).T
    count, loc, cov = made_of(x, share, kind)
    square = -2 * np.stack(
        [terms(row, loc, cov) + 0.5 * np.linalg.slogdet(2 * np.pi * cov)[1] for row in x], 1
    )
    args = (torch.from_numpy(a) for a in (share, square, np.full(N, float(T)), count))
    got = LeftOut(kind).change(*args).numpy()
    for i, row in enumerate(x):
        for k in range(K):
            without = share.copy()
            without[k, i] = 0.0
            n, m, c = made_of(x, without, kind)
            want = np.log(n[k] / count[k]) + terms(row, m, c)[k] - terms(row, loc, cov)[k]
            assert got[k, i] == pytest.approx(want, rel=1e-9)


def test_rows_count_as_often_as_is_said():
    """From the second time on without all that a row has counted: twice is as if it stood there twice."""
    rng = np.random.default_rng(1)
    counts = torch.tensor(rng.integers(1, 4, N).astype(float))
    log_prob, square = (torch.from_numpy(rng.normal(size=(K, N)) ** 2) for _ in range(2))
    cells = torch.full((N,), float(T), dtype=torch.float64)
    shares = LeftOut("full", lambda key, log_prob: counts)
    first, _ = shares(("rows",), log_prob, lambda: square, cells)
    torch.testing.assert_close(first, log_prob.softmax(0) * counts)
    count = first.sum(1)
    shares.told(count)
    second, _ = shares(("rows",), log_prob, lambda: square, cells)
    change = shares.change(first, square, cells, count)
    torch.testing.assert_close(second, (log_prob + change).softmax(0) * counts)
