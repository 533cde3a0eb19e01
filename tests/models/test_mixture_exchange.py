"""A component exchanged for rows that no other explains."""

import numpy as np
import pytest
import torch

from bayes_mpt.models.gaussians import Gaussians
from bayes_mpt.models.mixture_em import expectation, prior_of, table_of
from bayes_mpt.models.mixture_exchange import STEPS, exchanged
from bayes_mpt.models.mixture_steps import coefficients_of, m_step

FEW = 80  # rows of the third cluster, of 4000


def rows(n_few):
    rng = np.random.default_rng(0)
    cluster = np.r_[np.zeros(2000), np.full(2000 - n_few, 4.0), np.full(n_few, 14.0)]
    x = rng.normal(size=(4000, 3)) + cluster[:, None]
    return np.where(rng.random(x.shape) < 0.1, np.nan, x), cluster


@pytest.mark.parametrize("kind", ["full", "diag"])
@pytest.mark.parametrize("n_few", [FEW, 0])
def test_rows_that_no_component_explains_get_one(kind, n_few):
    x, cluster = rows(n_few)
    table, gaps = table_of(torch.from_numpy(x), kind), kind == "diag"
    prior, expect = prior_of(table, 3, kind), expectation(table.rows, kind)
    # two where the rows are, and a third on few of the second's
    at = torch.tensor([[0.0] * 3, [4.0] * 3, [4.3] * 3], dtype=torch.float64)
    scale = torch.ones(3, 3, dtype=torch.float64) / table.spread
    given = Gaussians(
        torch.tensor([0.5, 0.49, 0.01], dtype=torch.float64),
        (at - table.centre) / table.spread,
        torch.diag_embed(scale) if kind == "full" else scale,
    )
    found = exchanged(expect, given, kind, prior, gaps=gaps)
    if n_few:
        far = cluster == 14.0
        loc = (table.centre + table.spread * found.loc)[2].numpy()
        np.testing.assert_allclose(loc, np.nanmean(x[far], 0), atol=0.01)
        told = ~np.isnan(x).all(1)  # a row of which nothing is seen says nothing
        assert float(found.weights[2]) == pytest.approx(far[told].mean(), rel=1e-3)
        return
    for _ in range(STEPS):  # as it was, some steps later
        given, _ = m_step(expect(given, coefficients_of(given, gaps=gaps))[0], given, kind, prior, 0.0)
    values = [
        float(expect(mix, coefficients_of(mix, gaps=gaps))[1] + prior.log_prob(mix.scale))
        for mix in (found, given)
    ]
    assert values[0] >= values[1] - 1e-6
