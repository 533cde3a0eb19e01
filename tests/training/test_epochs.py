"""Training by epochs: its steps against Adam written out by hand."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from bayes_mpt.masks import PermutationChain
from bayes_mpt.predictors import Batch, choose
from bayes_mpt.program.store import OwnStore
from bayes_mpt.training import Problem
from bayes_mpt.training.epochs import train_by_epochs

N_ROWS, BATCH, EPOCHS = 6, 2, 20
POINT = torch.tensor([[1.0, -2.0, 30.0]], dtype=torch.float64)


def program(x):
    loc = pyro.param("loc", lambda: x.new_zeros(x.shape[1]))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def trained(learning_rate=0.5, max_epochs=EPOCHS, **settings):
    """Where the parameter ends on rows that are all the same, so that their order does not matter."""
    rows = POINT.expand(N_ROWS, -1).clone()
    with OwnStore():
        whole = Batch((rows,), N_ROWS)
        (objective,) = choose(program, (rows,)).schedule(whole, PermutationChain())
        settings = {"patience": 5, "random_state": 0, **settings}
        train_by_epochs(
            [Problem(objective)],
            whole,
            batch_size=BATCH,
            max_epochs=max_epochs,
            learning_rate=learning_rate,
            **settings,
        )
        return pyro.param("loc").detach().numpy().copy()


def by_hand(learning_rate, epochs=EPOCHS):
    """Adam (Kingma & Ba 2015) with a rate that rises over a tenth of the steps; the mean of each step's parameters."""
    per_epoch = N_ROWS // BATCH
    loc, first, second, mean = (np.zeros(3) for _ in range(4))
    for step in range(1, per_epoch * epochs + 1):
        slope = loc - POINT.numpy()[0]  # of -log N(x; loc, 1)
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope**2
        rate = learning_rate * min(1, step / (per_epoch * epochs // 10))
        loc = loc - rate * first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        share = 1 / min(step, per_epoch)
        mean = (1 - share) * mean + share * loc
    return mean


@pytest.mark.parametrize("learning_rate", [0.01, 0.5])
def test_steps_by_hand(learning_rate):
    np.testing.assert_allclose(trained(learning_rate), by_hand(learning_rate), rtol=1e-12)


def test_goes_on_to_the_bit(tmp_path):
    """Stopped by a report between two epochs, the mean goes on where it was."""
    file = tmp_path / "training.pt"
    trained(checkpoint=file, report=lambda epoch, _: epoch == 7)
    assert (trained(checkpoint=file) == trained()).all()
