"""What makes a number right, or its error honest, and would not be missed by a look at it: each against stated parts.

Errors cover the truth over seeds and are above zero unless a way is exact; every correction is recomputed; chunks of
any size give the same number; rows that judge a training are none of those that train.
"""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from scipy.integrate import quad
from scipy.special import logsumexp
from scipy.stats import norm, poisson
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import KFold
from tables import with_holes

from bayes_mpt import BayesMPT, HeldOut, MarginalLikelihoodSearch, data_digest, score
from bayes_mpt.estimators import fitted as fitted_module
from bayes_mpt.estimators.comparison import compare
from bayes_mpt.masks import LeaveOneOut, UniformSize, one_each
from bayes_mpt.models import PPCA, FactorAnalysis, Potts
from bayes_mpt.predictors import Importance, Quadrature, SequentialMonteCarlo, base
from bayes_mpt.predictors.gaussian import linear
from bayes_mpt.training import Ascent, Epochs, Steps

F64 = torch.float64


def normal_rows(n, seed=0):
    return math.sqrt(2) * torch.randn(n, 1, generator=torch.Generator().manual_seed(seed), dtype=F64)


def one_latent(x):
    """x ~ N(0, 2): a latent N(0, 1) with a noise of one."""
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x)


def wide_guide(x):
    """The posterior is N(x / 2, 1/2)."""
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(x[:, 0] / 2, 1.3 * 0.5**0.5))


# ----------------------------------------------------------------------------------------------------- draws and nodes


@pytest.mark.slow
def test_particles_move_by_accepted_steps_only():
    """So many latents that the particles start from the prior: what brings them to the posterior are their moves."""
    n_latents, n = 66, 12
    g = torch.Generator().manual_seed(0)
    x = 2 / math.sqrt(n_latents) * torch.randn(n, n_latents, generator=g, dtype=F64)
    y = x @ torch.randn(n_latents, generator=g, dtype=F64) + 0.5 * torch.randn(n, generator=g, dtype=F64)

    def regression(x, y):
        w = pyro.sample("w", dist.Normal(x.new_zeros(n_latents), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal((x * w[..., None, :]).sum(-1), 0.5), obs=y)

    # y ~ N(0, X X' + 1/4)
    cov = x @ x.mT + 0.25 * torch.eye(n, dtype=F64)
    want = float(dist.MultivariateNormal(torch.zeros(n, dtype=F64), cov).log_prob(y))
    torch.manual_seed(1)
    read = SequentialMonteCarlo(64).bind(regression, (x, y)).read((x, y))
    found = read.evidence()
    assert 0 < found.se < 1
    assert abs(float(found.by_row) - want) < 3.5 * found.se


def counts(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Poisson((1.5 * z)[..., None].exp().expand(*z.shape, 2)).to_event(1), obs=x)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n_nodes", [2, 3, 5])
def test_the_error_of_a_coarse_rule_is_above_zero_and_covers(n_nodes, seed):
    x = torch.as_tensor(np.random.default_rng(seed).poisson(2, (20, 2)), dtype=F64)

    def density(z, row):
        return np.exp(poisson.logpmf(row, math.exp(1.5 * z)).sum() + norm.logpdf(z))

    want = sum(math.log(quad(density, -8, 8, (row,), limit=200, epsabs=0)[0]) for row in x.numpy())
    read = Quadrature(n_nodes).bind(counts, (x,)).read((x,))
    found = read.evidence()
    assert 0 < found.se < 5
    # even nodes, which rough rows end with, err by less than rounding and the truth's own quadrature
    assert abs(float(found.by_row.sum()) - want) < 2 * found.se + 1e-11


def counts_of_two(x):
    z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    rate = torch.stack([z[..., 0], z.sum(-1)], -1).exp()
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Poisson(rate[..., None, :]).to_event(1), obs=x)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n_nodes", [2, 3, 4])
def test_the_error_of_a_coarse_rule_of_shared_latents_covers(n_nodes, seed):
    """Which no even nodes follow: the number is that of a rule that is coarse as well."""
    x = torch.as_tensor(np.random.default_rng(seed).poisson(2, (2, 2)), dtype=F64)
    one = np.linspace(-9, 9, 601)
    a, b = np.meshgrid(one, one, indexing="ij")
    log_p = norm.logpdf(a) + norm.logpdf(b) + 2 * math.log(one[1] - one[0])
    for row in x.numpy():
        log_p = log_p + poisson.logpmf(row[0], np.exp(a)) + poisson.logpmf(row[1], np.exp(a + b))
    want = logsumexp(log_p)
    found = Quadrature(n_nodes).bind(counts_of_two, (x,)).read((x,)).evidence()
    error = abs(float(found.by_row.sum()) - want)
    assert 1e-9 < error < 2 * found.se < 5


def test_the_bias_of_a_log_mean_is_taken_off():
    """20 draws a row are 1e-3 nats low; over 20 000 rows that is twelve standard errors."""
    x = normal_rows(20_000)
    want = float(dist.Normal(0.0, math.sqrt(2)).log_prob(x).sum())
    torch.manual_seed(0)
    bound = Importance(20).bind(one_latent, (x,), wide_guide)
    off, errors = [], []
    for _ in range(6):
        read = bound.read((x,))
        found = read.evidence()
        plain = float(read.score().sum())
        off.append(float(found.by_row.sum()) - want)
        errors.append(found.se)
        assert plain < want - 0.5 * found.se
        assert off[-1] > plain - want  # the correction goes up
    assert abs(np.mean(off)) < 3.5 * np.mean(errors) / math.sqrt(6)
    assert 0.4 < np.std(off, ddof=1) / np.mean(errors) < 1.8


def test_the_stated_error_is_the_spread_over_draws():
    x = normal_rows(500)
    bound = Importance(20).bind(one_latent, (x,), wide_guide)
    totals, errors = [], []
    for seed in range(60):
        torch.manual_seed(seed)
        read = bound.read((x,))
        totals.append(float(read.score().sum()))
        errors.append(read.evidence().se)
    assert np.std(totals, ddof=1) == pytest.approx(np.mean(errors), rel=0.25)


# -------------------------------------------------------------------------------------------------------- chunks, parts


def correlated(n=40, t=6):
    return np.random.default_rng(0).normal(size=(n, t)) @ np.random.default_rng(1).normal(size=(t, t))


def test_masks_in_chunks_of_any_size(monkeypatch):
    x = correlated()
    model = BayesMPT(PPCA(2), random_state=0).fit(x)
    want = model.estimate(x, masks=UniformSize(64))
    assert want.se > 0
    for cells in (40 * 6, 40 * 6 * 8, 40 * 6 * 30 + 1):
        monkeypatch.setattr(score, "CHUNK", cells)
        got = model.estimate(x, masks=UniformSize(64))
        assert (got.total, got.se) == pytest.approx((want.total, want.se), rel=1e-12)
        # masks of one size weigh otherwise than those of another: recomputed one mask at a time
        assert abs(got.total - model.log_marginal_likelihood_) < 3 * got.se


@pytest.mark.slow
def test_the_weighted_sum_in_chunks_of_any_size(monkeypatch):
    """Masks of one size weigh otherwise than those of another: summed here one by one, with their weights."""
    x = torch.as_tensor(correlated())
    read = Quadrature(8).bind(one_latent_of_six, (x,)).read((x,))
    masks = UniformSize(6).draw(6, torch.Generator().manual_seed(0))
    assert len(masks.weight.unique()) > 2
    want = sum(
        (read.conditionals(v[None])[0] * w).sum(1)
        for v, w in zip(masks.visible, masks.weight.to(x), strict=True)
    )
    for cells in (40 * 6, 40 * 6 * 5, 2**22):
        monkeypatch.setattr(base, "CHUNK", cells)
        torch.testing.assert_close(read.score(masks), want, rtol=1e-12, atol=0)


def one_latent_of_six(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.StudentT(5.0, z[..., None].expand(*z.shape, 6), 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("name", ["CHUNK", "CACHED_CHUNK", "MAX_DENSE"])
def test_algebra_in_chunks_of_any_size(monkeypatch, name):
    x = correlated(30, 7)
    x = with_holes(x, 0.2, seed=2)
    model = BayesMPT(FactorAnalysis(2), random_state=0, training=Ascent(max_iter=20))
    with pytest.warns():
        model.fit(x)
    visible = torch.as_tensor(np.random.default_rng(3).random((9, 7)) < 0.5)
    rows = torch.as_tensor(x)
    want = model.score_samples(x), model.predictor_.read((rows,)).conditionals(visible), model.transform(x)
    monkeypatch.setattr(linear, name, 5)
    got = model.score_samples(x), model.predictor_.read((rows,)).conditionals(visible), model.transform(x)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=1e-10)


def heavy_tailed(x):
    """A program whose rows are read when they are scored, with a free scale."""
    scale = pyro.param("scale", x.new_tensor(1.0), constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.StudentT(5.0, z[..., None], scale).to_event(1), obs=x)


@pytest.mark.slow
def test_errors_of_parts_add_up(monkeypatch):
    """Parts are drawn independently: the variance of a sum is the sum of their variances."""
    x = normal_rows(1024).numpy()
    model = BayesMPT(heavy_tailed, predictor=Importance(10), training=Steps(max_iter=3), random_state=0)
    with pytest.warns():
        model.fit(x)
    _, whole = model.score_rows(x)
    monkeypatch.setattr(fitted_module, "MAX_READ_CELLS", 128)  # parts of 128 rows
    _, parts = model.score_rows(x)
    alone = [model.score_rows(x[i : i + 128])[1] for i in range(0, 1024, 128)]
    assert min(alone) > 0
    # the mean of eight parts' errors would be a third of it, their sum three times as much
    assert parts == pytest.approx(whole, rel=0.15)
    assert parts == pytest.approx(math.sqrt(sum(s**2 for s in alone)), rel=0.15)


# ------------------------------------------------------------------------------------------- which rows, and how often


def test_rows_that_judge_a_training_do_not_train(monkeypatch):
    """Of the two sets of rows that a training by epochs sees, neither holds a row of the other."""
    from bayes_mpt.training.epochs import _Training

    seen = {"train": set(), "held out": set()}
    step, look = _Training._pass, _Training._look

    def watched_step(training):
        seen["train"].update(map(float, training.rows.args[0][:, 0]))
        return step(training)

    def watched_look(training):
        seen["held out"].update(map(float, training.held_out.args[0][:, 0]))
        return look(training)

    monkeypatch.setattr(_Training, "_pass", watched_step)
    monkeypatch.setattr(_Training, "_look", watched_look)
    x = normal_rows(200).numpy()
    model = BayesMPT(
        heavy_tailed, training=Epochs(batch_size=50, max_epochs=3, validation_fraction=0.2), random_state=0
    )
    with pytest.warns():
        model.fit(x)
    assert len(seen["train"]) == 160 and len(seen["held out"]) == 40
    assert not seen["train"] & seen["held out"]


@pytest.mark.parametrize("n_repeats", [1, 2])
def test_held_out_rows_are_scored_by_a_fit_without_them(n_repeats):
    """Against fits to each fold's other rows; over repeats the evidence stays below the maximised likelihood."""
    x = correlated(30, 3)
    search = MarginalLikelihoodSearch(
        BayesMPT(PPCA(1)),
        {"model__n_components": [1, 2]},
        evidence=HeldOut(cv=KFold(3, shuffle=False) if n_repeats == 1 else 3, n_repeats=n_repeats),
        random_state=0,
    ).fit(x)
    if n_repeats == 1:
        for k in (1, 2):
            want = 0.0
            for train, test in KFold(3).split(x):
                fold = BayesMPT(PPCA(k)).fit(x[train])
                cov, mean = fold.get_covariance(), fold.mean_
                want += (
                    dist.MultivariateNormal(torch.as_tensor(mean), torch.as_tensor(cov))
                    .log_prob(torch.as_tensor(x[test]))
                    .sum()
                    .item()
                )
            got = search.cv_results_["lml"][search.cv_results_["params"].index({"model__n_components": k})]
            assert got == pytest.approx(want, rel=1e-9)
    else:
        # scored by rows that it has seen a fit is better than by others: the evidence must not be that
        at_maximum = BayesMPT(PPCA(2)).fit(x).log_marginal_likelihood_
        assert search.cv_results_["lml"].max() < at_maximum


@pytest.mark.slow
def test_a_log_prior_counts_once_however_many_batches():
    """MAP by minibatches: each step sees the batch's share of the prior, or the coupling would shrink to nothing."""
    rng = np.random.default_rng(0)
    first = rng.integers(3, size=(400, 1))
    second = np.where(rng.random((400, 1)) < 0.8, first, rng.integers(3, size=(400, 1)))
    x = np.hstack([first, second]).astype(float)

    def strength(**settings):
        model = BayesMPT(Potts(prior_sd=0.3), masks=LeaveOneOut(), penalty=True, random_state=0, **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # all epochs are run
            model.fit(x)
        return float(model.fitted_model_.couplings(model.params_).contact_map(corrected=False)[0, 1])

    whole = strength()
    by_batches = strength(training=Steps(batch_size=20, max_iter=150, learning_rate=0.02))
    assert by_batches == pytest.approx(whole, rel=0.05)


def test_fewer_rows_than_masks_get_masks_of_all_sizes():
    t, n, draws = 6, 20, 1500
    g = torch.Generator().manual_seed(0)
    sizes = torch.cat([(~one_each(UniformSize(64).draw(t, g), n, g).visible[0]).sum(1) for _ in range(draws)])
    share = sizes.bincount(minlength=t + 1)[1:].double() / len(sizes)
    # 5 standard errors of independent draws
    assert (share - 1 / t).abs().max() < 5 * math.sqrt(5 / 36 / len(sizes))


# --------------------------------------------------------------------------------------------- the table and the digest


def test_the_error_of_a_difference_holds_that_of_the_best():
    x = normal_rows(60)
    models = {
        str(draws): BayesMPT(one_latent, predictor=Importance(draws), random_state=draws).fit(x)
        for draws in (5, 10, 40)
    }
    table = compare(models, normal_rows(60, seed=1))
    assert (table["se"] > 0).all()
    best, others = table.iloc[0], table.iloc[1:]
    np.testing.assert_allclose(others["mc_dse"], np.hypot(others["se"], best["se"]), rtol=1e-12)
    np.testing.assert_allclose(
        others["p_worse"], norm.cdf(-np.abs(others["lml_diff"]) / others["mc_dse"]), rtol=1e-12
    )


@pytest.mark.slow
def test_repeats_of_held_out_rows_have_their_error():
    """The mean of R partitions has the spread of one over the root of R, by Student's t for so few."""
    x = correlated(60, 5)
    search = MarginalLikelihoodSearch(
        BayesMPT(PPCA(1)), {"model__n_components": [1, 2, 3]}, evidence=HeldOut(n_repeats=4), random_state=0
    ).fit(x)
    table = search.comparison_
    assert (table["se"] > 0).all() and (table["mc_dse"].iloc[1:] > 0).all()
    # repeats share their partitions: the difference is better known than either
    assert (table["mc_dse"].iloc[1:] < np.hypot(table["se"].iloc[1:], table["se"].iloc[0])).all()


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[[1, 0, 2, 3, 4]],  # another order of equal rows is the same table
        lambda x: x[[2, 1, 0, 3, 4]],
        lambda x: x[[0, 2, 1, 3, 4]],
        lambda x: x[:, [1, 0, 2]],
        lambda x: x[[0, 1, 2, 2, 2]],
        lambda x: x[[0, 0, 0, 2, 4]],
        lambda x: np.hstack([x[[2, 1, 0, 3, 4], :1], x[:, 1:]]),
        lambda x: x * np.array([[-1], [-1], [1], [1], [1]]),
        lambda x: np.where(np.arange(15).reshape(5, 3) == 7, np.nextafter(x, np.inf), x),
    ],
)
def test_the_digest_tells_tables_of_the_same_cells_apart(change):
    a, b, c = [1.0, 2.0, 1.0], [3.0, 4.0, 0.5], [1.0, 0.0, -1.0]
    x = np.array([a, a, b, b, c])
    model = BayesMPT(PPCA(1)).fit(x)
    other = change(x)
    assert (data_digest(other) == data_digest(x)) == np.array_equal(other, x)
    assert model.data_digest_ == data_digest(x)
