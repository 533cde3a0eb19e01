"""Draws in rows in place of nodes, and shared latents that are led from the prior: against closed forms."""

import numpy as np
import pyro
import pytest
import torch
from scipy.special import gammaln, logsumexp
from truths import sparse_gamma_rows
from zoo.programs_pyro_deep import counts, deep_exponential_family

from bayes_mpt.predictors.nodes.adaptive import AdaptiveNodes
from bayes_mpt.predictors.nodes.from_prior import Warp, led
from bayes_mpt.predictors.nodes.mixture import Modes
from bayes_mpt.predictors.nodes.modes import ModeSearch
from bayes_mpt.predictors.nodes.placing import Placing
from bayes_mpt.predictors.nodes.row_draws import upright
from bayes_mpt.program.analysis import analyze
from bayes_mpt.program.arguments import Args


@pytest.fixture
def rows():
    """The first 8 rows of a program whose rows have three latents each, and 60 values of the eight that are shared."""
    x = torch.as_tensor(counts(np.random.default_rng(0))[0])[:8]
    args = Args((x,))
    at = AdaptiveNodes(deep_exponential_family, args, analyze(deep_exponential_family, (x,)))
    at.rows = at.rows.placed(Placing(True))
    u = torch.as_tensor(np.random.default_rng(1).normal([0.3] * 2 + [-0.5] * 6, 1.0, size=(60, 8)))
    return at, args, x, u


def test_draws_of_learned_shapes_are_right_on_the_average(rows):
    """Of 36 draws a row, by an error that is that of its spread; of the nodes in whose place they stand, by none."""
    at, args, x, u = rows
    flat, seen = x.reshape(1, -1), torch.ones(x.numel(), dtype=torch.bool)
    truth = sparse_gamma_rows(x.long().numpy(), u[:, :2].numpy(), u[:, 2:].reshape(-1, 2, 3).numpy()).sum(1)
    search = ModeSearch(at)
    prior = (0.5 * np.log(0.5) - gammaln(0.5) + 0.5 * u - 0.5 * u.exp()).sum(1).numpy()
    with torch.no_grad(), pyro.validation_enabled(False):
        held = at.space._replace(depth=0).values(u[:16, None])[0]
        at.rows = at.rows.learned(args, held, flat, seen)
        assert at.rows.placing.draws.n_points < 100 and at.rows.n_nodes < 100
        found = {d: search.densities(args, flat, seen, d)(u)[1].numpy() - prior for d in ("usual", "rough")}
        again = search.densities(args, flat, seen, "usual")(u)[1].numpy() - prior
    np.testing.assert_allclose(
        again, found["usual"], rtol=1e-4
    )  # the same draws, from climbs that began elsewhere
    ratio = np.exp(found["usual"] - truth)
    se = ratio.std() / np.sqrt(len(ratio))
    assert abs(ratio.mean() - 1) < 3 * se < 0.25
    # alike at all values of the shared latents the error is one of a smooth function
    assert np.std(found["rough"] - truth) < 0.6


def test_roots_are_turned_alike():
    root = torch.randn(5, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turn = torch.linalg.qr(
        torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )[0]
    a, b = (upright(Modes(root[None, :, 0], r[None], root.new_zeros(1, 5))).root for r in (root, root @ turn))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(a @ a.mT, (root @ root.mT)[None], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_sparse_weights_led_from_the_prior():
    """w_k ~ Gamma(1/2, 1/2), counts 0, 0, 0, 1, 4, 30 of Poisson(w_k): each is negative binomial."""
    x = torch.tensor([0.0, 0.0, 0.0, 1.0, 4.0, 30.0], dtype=torch.float64)
    law = torch.distributions.Gamma(torch.full((6,), 0.5, dtype=torch.float64), 0.5)
    truth = float(
        (
            torch.lgamma(x + 0.5) - torch.lgamma(x + 1) - gammaln(0.5) - 0.5 * np.log(3.0) - x * np.log(1.5)
        ).sum()
    )

    def both(u):
        prior = (law.log_prob(u.exp()) + u).sum(1)
        return prior, prior + (x * u - u.exp() - torch.lgamma(x + 1)).sum(1)

    torch.manual_seed(0)
    z = []
    for _ in range(3):
        proposal = led(both, law.sample((400,)).log(), 400)
        u = proposal.drawn(800)[0]
        w = (both(u[:, 0])[1] - proposal.log_density(u)[:, 0]).numpy()
        value, se = (
            logsumexp(w) - np.log(len(w)),
            np.exp(w - w.max()).std() / np.exp(w - w.max()).mean() / 800**0.5,
        )
        assert 1e-3 < se < 0.06
        z.append((value - truth) / se)
    assert np.abs(z).max() < 3.5 and np.sqrt(np.mean(np.square(z))) < 2


def test_bent_coordinates():
    """There and back, and a density that integrates to 1."""
    draws = torch.distributions.Gamma(0.3, 1.0).sample((400, 2)).double().log()
    warp = Warp.of(draws)
    u = torch.linspace(-60, 8, 200_001, dtype=torch.float64)[:, None].expand(-1, 2)
    v, log_det = warp.from_u(u)
    torch.testing.assert_close(warp.to_u(v), u, rtol=1e-10, atol=1e-9)
    slope = (
        torch.gradient(v[:, 0], spacing=(u[:, 0],))[0].log()
        + torch.gradient(v[:, 1], spacing=(u[:, 1],))[0].log()
    )
    torch.testing.assert_close(-log_det[5:-5], slope[5:-5], rtol=0, atol=2e-3)
