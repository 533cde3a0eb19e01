"""Programs that predict their own hidden tokens, against enumeration and against tables of known density."""

import math
import pickle
from itertools import permutations, product

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.base import clone
from truths import every_row

from bayes_mpt import BayesMPT, HeldOut, MarginalLikelihoodSearch
from bayes_mpt.masks import (
    Blocks,
    EverySize,
    FixedRate,
    LeaveOneOut,
    Masks,
    PermutationChain,
    UniformSize,
    one_each,
)
from bayes_mpt.predictors import Exact, SelfPredictive, choose
from bayes_mpt.program.program import ModelError
from bayes_mpt.score import CumulativeMaskedScore, estimate
from bayes_mpt.training import Steps

pytestmark = pytest.mark.usefixtures("own_store")

T = 4
TABLE = torch.randn(2**T, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(0)
STATES = torch.from_numpy(every_row(T, 2)).double()


def table(x, visible):
    """The exact conditionals of a table of 2^T probabilities."""
    fits = ((STATES == x[:, None]) | ~visible[:, None]).all(-1)  # (N, 2^T)
    weight = torch.where(fits, TABLE, -torch.inf)[..., None]
    ones = torch.where(STATES == 1, weight, -torch.inf).logsumexp(1)
    zeros = torch.where(STATES == 0, weight, -torch.inf).logsumexp(1)
    # of a visible token one of the two is impossible; what is said of it is not used
    logits = torch.where(visible, 0.0, ones - zeros)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def network(x, visible):
    """Conditionals that fit no joint density, and look at the token itself where it is visible."""
    w = pyro.param("w", lambda: torch.randn(T, T, dtype=torch.float64))
    b = pyro.param("b", lambda: torch.zeros(T, dtype=torch.float64))
    seen = (2 * x - 1) * visible
    with pyro.plate("rows", len(x)):
        logits = b + torch.tanh(seen @ w) + 0.3 * seen.roll(1, 1) * seen.roll(2, 1)
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def bound(model, x):
    torch.manual_seed(3)
    return choose(model, (x,)).read((x,))


# ------------------------------------------------------------------------------------------------------- the scores


def test_consistent_conditionals_give_the_density_in_every_order():
    found = bound(table, STATES)
    orders = torch.tensor(list(permutations(range(T))))
    sums = found.chain(orders).sum(-1)
    np.testing.assert_allclose(sums, TABLE.expand(len(orders), -1), atol=1e-12)
    np.testing.assert_allclose(found.score(), TABLE, atol=1e-12)
    assert found.evidence().diagnostics["order_sd"] < 1e-12
    every = torch.stack([torch.tensor(v) for v in product((False, True), repeat=T)])
    m = (~every).sum(1)
    weight = torch.where(every, 0.0, 1.0 / (m * torch.tensor([math.comb(T, int(k)) for k in m]))[:, None])
    area = torch.einsum("snt,st->n", found.conditionals(every), weight.nan_to_num(0.0).double())
    np.testing.assert_allclose(area, TABLE, atol=1e-12)
    drawn = estimate(found, EverySize(200), n_replicates=8, random_state=0)
    assert abs(drawn.total - float(TABLE.sum())) < 3 * drawn.se


def test_chain_and_weighed_are_sums_of_conditionals():
    x = STATES.clone()
    x[2, 1] = x[5, 3] = torch.nan
    found = bound(network, x)
    order = torch.tensor([[2, 0, 3, 1], [0, 1, 2, 3]])
    chain = found.chain(order).detach()
    for c, tokens in enumerate(order):
        for t, token in enumerate(tokens):
            visible = torch.zeros(1, T, dtype=torch.bool)
            visible[0, tokens[:t]] = True
            alone = found.conditionals(visible)[0, :, token].detach()
            np.testing.assert_allclose(chain[c, :, token], alone, atol=1e-12)
    assert float(chain[:, 2, 1].abs().max()) == 0.0  # never scored
    masks = UniformSize(7).draw(T, 0)
    expected = torch.einsum("snt,st->n", found.conditionals(masks.visible), masks.weight)
    np.testing.assert_allclose(found.score(masks).detach(), expected.detach(), atol=1e-12)


@pytest.mark.parametrize("model", [network, table])
def test_one_run_serves_all_tokens_hidden_alone_only_where_they_do_not_look_at_themselves(model):
    found = bound(model, STATES)
    masks = LeaveOneOut().draw(T)
    each = found.conditionals(masks.visible).sum(0).sum(-1).detach()
    np.testing.assert_allclose(found.score(masks).detach(), each, atol=1e-12)
    assert not found.blind


def test_blindness_is_seen_through_a_start_at_which_nothing_depends_on_anything():
    def zero(x, visible):
        w = pyro.param("w", lambda: torch.zeros(T, T, dtype=torch.float64))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(x @ w, 1.0).to_event(1), obs=x)

    def blind(x, visible):
        w = pyro.param("w", lambda: torch.zeros(T, T, dtype=torch.float64))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(x @ (w * (1 - torch.eye(T))), 1.0).to_event(1), obs=x)

    for model, expected in ((zero, False), (blind, True)):
        with pyro.get_param_store().scope():
            assert bound(model, STATES).blind is expected
            assert float(pyro.param("w").detach().abs().max()) == 0.0  # as it was


def test_a_program_sees_nothing_of_what_is_hidden():
    seen = []

    def spy(x, visible):
        seen.append((x.clone(), visible.clone()))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0).to_event(1), obs=x)

    x = 5 + STATES
    x[0, 0] = torch.nan
    found = bound(spy, x)
    seen.clear()
    score = found.conditionals(torch.tensor([[True, False, True, False]]))[0]
    for shown, visible in seen:
        assert not bool(visible[0, 0]) and bool((shown[~visible] == 0).all())
    expected = torch.where(
        torch.tensor([False, True, False, True]), dist.Normal(0, 1).log_prob(x.nan_to_num(0.0)), 0.0
    )
    np.testing.assert_allclose(score, expected, atol=1e-12)


def test_two_inequalities_by_enumeration():
    """Every order's density is normalised; their mean log lies below the log of their mean, and below -H."""
    found = bound(network, STATES)
    orders = torch.tensor(list(permutations(range(T))))
    by_order = found.chain(orders).sum(-1).detach()  # (T!, 2^T)
    np.testing.assert_allclose(by_order.logsumexp(1), 0.0, atol=1e-12)
    area, mixture = by_order.mean(0), by_order.logsumexp(0) - math.log(len(orders))
    assert bool((area < mixture).all()) and abs(float(mixture.logsumexp(0))) < 1e-12
    assert float(area.logsumexp(0)) < -1e-3  # less than a density
    p = TABLE.exp()
    entropy = -float(p @ TABLE)
    assert float(p @ area) < float(p @ mixture) < -entropy
    # the area under the masked curve, over all masks
    drawn = estimate(found, EverySize(200), n_replicates=8, random_state=0)
    assert abs(drawn.total - float(area.sum())) < 3 * drawn.se


def test_blocks_by_enumeration():
    """Hidden tokens are independent given what is visible, so that each order of blocks is a density too."""
    x, groups = STATES, np.array([0, 1, 1, 0])
    found = bound(network, x)
    by_order = []
    for first, then in ((0, 1), (1, 0)):
        visible = torch.tensor(np.stack([np.zeros(T, bool), groups == first]))
        nothing, one = found.conditionals(visible).detach()
        by_order.append(nothing[:, groups == first].sum(1) + one[:, groups == then].sum(1))
    by_order = torch.stack(by_order)  # (2, 2^T)
    np.testing.assert_allclose(by_order.logsumexp(1), 0.0, atol=1e-12)
    area, p = by_order.mean(0), TABLE.exp()
    assert float(p @ area) < float(p @ (by_order.logsumexp(0) - math.log(2))) < float(p @ TABLE)
    drawn = estimate(found, Blocks(EverySize(100), groups), n_replicates=8, random_state=0)
    assert abs(drawn.total - float(area.sum())) < 3 * drawn.se + 1e-9
    assert np.isnan(drawn.by_size.mean[[0, 2]]).all()
    assert drawn.by_size.area * len(x) == pytest.approx(drawn.total)
    with pytest.raises(ValueError, match="leaves out mask sizes"):
        estimate(found, Blocks(FixedRate(0.5), groups))


def test_disagreement_is_reported():
    found = SelfPredictive(n_orders=6).bind(network, (STATES,)).read((STATES,))
    told = found.evidence()
    totals = told.diagnostics["totals"]
    assert len(totals) == 6 and np.ptp(totals) > 1e-3
    assert abs(float(told.by_row.detach().sum()) - totals.mean()) < 1e-10
    assert told.diagnostics["log_mean_exp"] > totals.mean()
    assert told.diagnostics["order_sd"] > 0 and told.se > 0
    given = found.chain(torch.arange(T)[None]).detach().sum()
    assert abs(told.diagnostics["total_given_order"] - float(given)) < 1e-10
    assert math.isnan(SelfPredictive(1).bind(network, (STATES,)).read((STATES,)).evidence().se)
    curve = estimate(found, masks=UniformSize(4), n_replicates=2, random_state=0)
    assert "order_sd" not in curve.diagnostics and not curve.exact


@pytest.mark.slow
def test_one_mask_for_each_row_has_the_same_expectation():
    found = bound(network, STATES)
    masks = UniformSize(5).draw(T, 0)
    whole = found.score(masks).detach()
    own = [found.score(one_each(masks, len(STATES), seed)).detach() for seed in range(600)]
    own = torch.stack(own)
    z = (own.mean(0) - whole) / (own.std(0) / math.sqrt(len(own)))
    assert float(z.abs().max()) < 4
    # every mask is given to as many rows, but for one
    own = one_each(masks, 17, 0)
    assert own.visible.shape == own.weight.shape == (1, 17, T)
    count = [(own.visible[0] == v).all(1).sum() for v in masks.visible.unique(dim=0)]
    assert sum(count) == 17
    with pytest.raises(ValueError, match="chain"):
        one_each(masks._replace(visible=None), 3)


# -------------------------------------------------------------------------------------------------------- refusals


def with_latent(x, visible):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[:, None].expand(x.shape), 1.0).to_event(1), obs=x)


def batch_norm(x, visible):
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(x.mean(0).expand(x.shape), 1.0).to_event(1), obs=x)


def doubled(x, visible):
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0).to_event(1), obs=2 * x)


def half(x, visible):
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(torch.zeros_like(x[:, :2]), 1.0).to_event(1), obs=x[:, :2])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (with_latent, r"latent sites \['z'\]"),
        (batch_norm, "other rows of the batch"),
        (doubled, "cells of x, unchanged"),
        (half, "must hold the 4 cells"),
    ],
)
def test_programs_that_cannot_be_scored_so(model, words):
    with pytest.raises(ModelError, match=words):
        choose(model, (STATES + 1,))


def test_a_factor_trains_and_enters_no_score():
    """Normal tokens of one mean, pulled to zero: mean(x) / (1 + strength) is the maximum, and scored as a density."""
    strength = 0.5

    def pulled(x, visible):
        mean = pyro.param("mean", lambda: x.new_tensor(0.1))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0).expand(x.shape).to_event(1), obs=x)
            pyro.factor("pull", -0.5 * strength * mean.square().expand(len(x)))

    X = 2 + np.random.default_rng(0).normal(size=(50, T))
    found = BayesMPT(pulled, masks=LeaveOneOut(), random_state=0).fit(X)
    mean = X.mean() / (1 + strength)
    np.testing.assert_allclose(found.params_["mean"], mean, rtol=1e-6)
    density = dist.Normal(torch.tensor(mean), 1.0).log_prob(torch.as_tensor(X)).sum(1)
    np.testing.assert_allclose(found.score_samples(X), density, rtol=1e-5)
    np.testing.assert_allclose(found.log_marginal_likelihood_, density.sum(), rtol=1e-5)


def test_a_factor_that_looks_at_what_is_hidden_is_seen_for_every_mask():
    def counted(x, visible):
        network(x * visible, visible)
        with pyro.plate("cells", len(x)):
            pyro.factor("shown", 0.1 * visible.sum(1).to(x))

    def blind(x, visible):
        w = pyro.param("w", lambda: torch.randn(T, T, dtype=torch.float64)).tril(-1)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Bernoulli(logits=(x * visible) @ w).to_event(1), obs=x)
            pyro.factor("shown", 0.1 * visible.sum(1).to(x))

    each = ~torch.eye(T, dtype=torch.bool)
    for model in (counted, blind):
        found = bound(model, STATES)
        scored = found.score(Masks(each, None, (~each).double())).detach()
        with torch.no_grad():
            plain = found.score(Masks(each, None, (~each).double()))
        np.testing.assert_allclose(scored - plain, T * 0.1 * (T - 1), atol=1e-12)


def scaled_factor(x, visible):
    network(x, visible)
    with pyro.plate("others", len(x)), pyro.poutine.scale(scale=2.0):
        pyro.factor("penalty", torch.zeros(len(x), dtype=x.dtype))


def test_a_factor_of_another_scale_is_refused():
    with pytest.raises(ModelError, match="different scales"):
        bound(scaled_factor, STATES)


def test_only_programs_told_what_is_visible():
    def plain(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Bernoulli(logits=pyro.param("b", torch.zeros(T))).to_event(1), obs=x)

    assert choose(plain, (STATES,)).name != "SelfPredictive"
    with pytest.raises(ModelError, match="no argument of that name"):
        SelfPredictive().bind(plain, (STATES,))
    with pytest.raises(ModelError, match="one table"):
        SelfPredictive().bind(table, (STATES, STATES))
    assert choose(table, (STATES,)).name == "SelfPredictive"
    with pytest.raises((ModelError, TypeError)):
        choose(table, (STATES,), predictor=Exact())


# -------------------------------------------------------------------------------------------------------- training


class Net(torch.nn.Module):
    """A small network on tokens and on what is visible of them."""

    def __init__(self, width=16):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(2 * T, width), torch.nn.Tanh(), torch.nn.Linear(width, T)
        )

    def forward(self, x, visible):
        pyro.module("net", self)
        logits = self.layers(torch.cat([(2 * x - 1) * visible, visible.to(x)], 1))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def sample(n, seed):
    index = torch.multinomial(TABLE.exp(), n, True, generator=torch.Generator().manual_seed(seed))
    return STATES[index].numpy()


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    with pyro.get_param_store().scope():
        return BayesMPT(Net(), training=Steps(batch_size=200, max_iter=600, tol=1e-3), random_state=0).fit(
            sample(2000, 0)
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the training stopped")
def test_a_network_learns_the_density_from_masks(fitted):
    fresh = sample(5000, 1)
    entropy_like = float(
        TABLE[(torch.as_tensor(fresh) @ torch.tensor([8.0, 4, 2, 1]).double()).long()].mean()
    )
    score = fitted.score(fresh)
    assert entropy_like - 0.02 < score < entropy_like + 0.005
    assert fitted.history_[0] < score - 0.2
    assert "SelfPredictive" in fitted.explain() and fitted.n_components_ == 0
    told = fitted.estimate(fresh)
    assert abs(told.total / 5000 - score) < 4 * (told.se / 5000 + 1e-4)
    assert told.diagnostics["log_mean_exp"] >= told.total
    assert np.isfinite(told.by_size.mean).all()


def test_draws_are_of_the_conditional_density():
    """Consistent conditionals, drawn one by one in any order, are draws from the density that they belong to."""
    n = 20_000
    some = torch.tensor([[math.nan, 1.0, math.nan, math.nan]], dtype=torch.float64)
    torch.manual_seed(0)
    drawn = bound(table, some).posterior().draws(n)[:, 0]
    assert bool((drawn[:, 1] == 1).all())
    place = (drawn @ torch.tensor([8.0, 4, 2, 1], dtype=torch.float64)).long()
    share = torch.bincount(place, minlength=2**T) / n
    truth = torch.where(STATES[:, 1] == 1, TABLE, -torch.inf).softmax(0)
    z = (share - truth) / (truth * (1 - truth) / n).sqrt().clamp(min=1e-12)
    assert bool((z.abs() < 4).all())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the training stopped")
def test_a_network_makes_rows(fitted):
    drawn = fitted.sample(4000)
    np.testing.assert_array_equal(drawn, fitted.sample(4000))
    place = (torch.as_tensor(drawn) @ torch.tensor([8.0, 4, 2, 1]).double()).long()
    share = torch.bincount(place, minlength=2**T) / 4000
    orders = torch.tensor(list(permutations(range(T))))
    with fitted.read_rows(STATES.numpy()) as found, torch.no_grad():
        mixture = found.chain(orders).sum(-1).exp().mean(0)  # of all orders, by enumeration
    z = (share - mixture) / (mixture * (1 - mixture) / 4000).sqrt()
    assert bool((z.abs() < 4).all())
    x = sample(6, 5)
    holes = x.copy()
    holes[:, 2] = np.nan
    filled = fitted.sample_missing(holes, n_samples=3)
    assert filled.shape == (3, 6, T) and not np.isnan(filled).any()
    np.testing.assert_array_equal(np.delete(filled, 2, axis=2), np.repeat(np.delete(x, 2, 1)[None], 3, 0))


def test_chains_of_one_draw_count_one_by_one():
    """Two draws of three chains are six orders to the diagnostics, and two replicates to the error."""
    found = bound(network, STATES)
    told = estimate(found, PermutationChain(3), n_replicates=2, random_state=0)
    generator = torch.Generator().manual_seed(0)
    orders = torch.cat([PermutationChain(3).draw(T, generator).order for _ in range(2)])
    by_order = found.chain(orders).sum(-1).detach()  # (6, N)
    assert told.diagnostics["order_sd"] == pytest.approx(
        float(by_order.std(0).square().mean().sqrt()), abs=1e-12
    )
    mixture = (by_order.logsumexp(0) - math.log(6)).sum()
    assert told.diagnostics["log_mean_exp"] == pytest.approx(float(mixture), abs=1e-10)
    assert told.diagnostics["totals"].shape == (2,)
    assert told.total == pytest.approx(float(by_order.mean(0).sum()), abs=1e-10)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the training stopped")
def test_scores_of_rows_do_not_depend_on_their_neighbours(fitted):
    fresh = sample(50, 2)
    fresh[3, 1] = np.nan
    whole = fitted.score_samples(fresh)
    np.testing.assert_allclose(
        np.concatenate([fitted.score_samples(r[None]) for r in fresh]), whole, atol=1e-10
    )
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.score_samples(fresh), whole)
    filled = fitted.impute(fresh)
    assert not np.isnan(filled).any() and 0 < filled[3, 1] < 1
    assert fitted.transform(fresh).shape == (50, 0)


@pytest.mark.slow
def test_search_by_held_out_rows():
    x = sample(300, 3)
    search = MarginalLikelihoodSearch(
        BayesMPT(
            table, predictor=SelfPredictive(2), training=Steps(batch_size=100, max_iter=60), random_state=0
        ),
        [{"model": [network]}, {"model": [Independent()], "masks": [Blocks(UniformSize(8), [0, 0, 1, 1])]}],
        evidence=HeldOut(cv=2),
        error_score="raise",
    )
    with pytest.warns(UserWarning):
        search.fit(x)
    assert search.evidence_ == "heldout" and len(search.comparison_) == 2
    assert np.isfinite(search.cv_results_["lml"]).all()


class Independent:
    """Tokens alone."""

    def __call__(self, x, visible):
        b = pyro.param("b", lambda: torch.zeros(T, dtype=torch.float64))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Bernoulli(logits=b.expand(x.shape)).to_event(1), obs=x)


@pytest.mark.slow
def test_independent_tokens_reach_their_closed_form_by_svi_and_by_fit():
    x = sample(500, 4)
    p = x.mean(0)
    best = float((p * np.log(p) + (1 - p) * np.log(1 - p)).sum())
    est = BayesMPT(Independent(), masks=LeaveOneOut()).fit(x)
    assert est.converged_ and abs(est.score(x) - best) < 1e-8
    pyro.clear_param_store()
    svi = pyro.infer.SVI(
        Independent(),
        lambda x: None,
        pyro.optim.Adam({"lr": 0.03}),
        CumulativeMaskedScore(UniformSize(16), random_state=0),
    )
    rows = torch.as_tensor(x)
    for _ in range(400):
        svi.step(rows)
    np.testing.assert_allclose(torch.sigmoid(pyro.param("b").detach()), p, atol=0.02)
    assert clone(SelfPredictive(3)).n_orders == 3
