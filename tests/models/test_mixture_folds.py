"""Fits of mixtures to some rows that score the others; against scipy, and against fits of the program."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from sklearn.datasets import load_iris
from sklearn.model_selection import KFold
from tables import tensor
from truths import mixture_log_terms

from bayes_mpt import BayesMPT
from bayes_mpt.estimators import refits
from bayes_mpt.models import GaussianMixture, mixture_folds, mixture_own_rows, mixture_steps
from bayes_mpt.models.gaussians import Gaussians
from bayes_mpt.models.mixture_climb import run_em
from bayes_mpt.models.mixture_em import coefficients_of, expectation, m_step, table_of
from bayes_mpt.models.mixture_gain import Purity, left_to_gain
from bayes_mpt.training import Ascent

KINDS = ["full", "tied", "diag", "spherical"]
IRIS = load_iris().data
SPLITS = list(KFold(3, shuffle=True, random_state=0).split(IRIS))


def covariances(mix):
    k, t = mix.loc.shape
    if mix.dense:
        return (mix.scale @ mix.scale.mT).expand(k, t, t).numpy()
    return torch.diag_embed(mix.scale.expand(k, t).square()).numpy()


def mixture(kind, seed=0, k=2, t=3):
    rng = np.random.default_rng(seed)
    root = np.tril(rng.normal(size=({"full": k}.get(kind, 1), t, t)))
    i = np.arange(t)
    root[:, i, i] = rng.uniform(0.3, 2.0, size=(len(root), t))
    scale = root if kind in ("full", "tied") else rng.uniform(0.3, 2.0, size=(k, t if kind == "diag" else 1))
    return Gaussians(tensor(rng.dirichlet(np.ones(k))), tensor(rng.normal(size=(k, t))), tensor(scale))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.3], ids=["complete", "holes"])
def test_densities_of_rows(kind, share):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(20, 3))
    x[rng.random(x.shape) < share] = np.nan
    mix = mixture(kind)
    want = logsumexp(mixture_log_terms(x, mix.weights.numpy(), mix.loc.numpy(), covariances(mix)), 0)
    np.testing.assert_allclose(mix.log_prob(tensor(x)), want, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_rows_are_scored_as_by_fits_of_the_program(kind, monkeypatch):
    """Also where rows that the same fits see stand together, as in large tables."""
    model = BayesMPT(GaussianMixture(2, kind), training=Ascent(tol=1e-6), random_state=3).fit(IRIS)
    want = [model.refit(IRIS[train]).score_samples(IRIS[test]) for train, test in SPLITS]
    for least in (mixture_folds.MIN_GROUP, 1):
        monkeypatch.setattr(mixture_folds, "MIN_GROUP", least)
        own = refits._own_scores(model, IRIS, SPLITS, None)
        for score, by_fit in zip(own, want, strict=True):
            np.testing.assert_allclose(score, by_fit, atol=1e-8)


@pytest.mark.parametrize(
    "settings",
    [
        {"penalty": True},
        {"n_init": 2},
        {"training": Ascent(max_iter=2, tol=1e-12)},
        {"masks": None, "predictor": "auto"},
    ],
    ids=["penalty", "starts", "cut short", "plain"],
)
def test_what_is_left_to_the_program(settings):
    model = BayesMPT(GaussianMixture(3), random_state=0, **settings)
    model.fitted_, model.n_features_in_ = None, 4
    found = refits._own_scores(model, IRIS, SPLITS, None)
    assert all((score is None) == ("predictor" not in settings) for score in found)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_rows_have_no_part_in_a_fit(kind):
    """Others in their place give the rows that stay the same scores."""
    splits = [(torch.arange(100), torch.arange(100, 150))]
    x = tensor(IRIS[np.random.default_rng(0).permutation(150)])
    other = x.clone()
    other[110:] = 3 * other[110:] + 5
    found = [
        GaussianMixture(2, kind).held_out(rows, splits, tol=1e-12, max_iter=500)[0][:10]
        for rows in (x, other)
    ]
    np.testing.assert_allclose(found[0], found[1], atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_side_by_side_or_one_by_one_or_by_parts(kind, monkeypatch):
    x, splits = tensor(IRIS), [(torch.as_tensor(a), torch.as_tensor(b)) for a, b in SPLITS]

    def scores(parts):
        torch.manual_seed(0)
        return torch.cat(GaussianMixture(2, kind).held_out(x, parts, tol=1e-9, max_iter=500))

    want = scores(splits)
    alone = torch.cat([scores([split]) for split in splits])
    np.testing.assert_allclose(alone, want, atol=1e-9)
    monkeypatch.setattr(mixture_folds, "CHUNK", 1)
    monkeypatch.setattr(mixture_folds, "MAX_NUMBERS", 600)
    monkeypatch.setattr(mixture_steps, "MAX_PRODUCTS", 500)
    np.testing.assert_allclose(scores(splits), want, atol=1e-9)


def blobs(n=900):
    """Two, apart, of numbers that are not rounded."""
    rng = np.random.default_rng(0)
    return tensor(rng.normal(size=(n, 2)) * [1.0, 3.0] + 5.0 * rng.integers(2, size=(n, 1)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prior", ["auto", None])
def test_own_rows_by_one_pass_or_one_by_one(kind, prior, monkeypatch):
    """Units, priors and starts are the same; and those of a fit of the program."""
    x, splits = blobs(), list(KFold(3, shuffle=True, random_state=0).split(np.empty((900, 1))))
    asked, of = [], mixture_own_rows.OwnTable.of
    monkeypatch.setattr(mixture_own_rows.OwnTable, "of", lambda *a, **how: asked.append(1) or of(*a, **how))
    model = BayesMPT(GaussianMixture(2, kind, prior), training=Ascent(tol=1e-13), random_state=3).fit(
        x.numpy()
    )
    found = refits._own_scores(model, x.numpy(), splits, None)
    assert not asked
    train, test = splits[0]
    # a fit of few rows climbs from more starts than a fold, and meets its tolerance of the score elsewhere
    np.testing.assert_allclose(
        found[0], model.refit(x[train].numpy()).score_samples(x[test].numpy()), atol=2e-5
    )
    monkeypatch.setattr(mixture_own_rows, "NARROW", 10.0)
    np.testing.assert_allclose(refits._own_scores(model, x.numpy(), splits, None), found, atol=1e-7)
    assert len(asked) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_rows_have_no_part_where_one_pass_reads_all(kind):
    """Nor where a hidden row is so far off that own rows are narrow beside it."""
    x, splits = blobs(), [(torch.arange(600), torch.arange(600, 900))]
    found = []
    for far in (0.0, 3.0, 1e3):
        rows = x.clone()
        rows[700:] = rows[700:] + far
        torch.manual_seed(0)
        found.append(GaussianMixture(2, kind).held_out(rows, splits, tol=1e-12, max_iter=500)[0][:100])
    np.testing.assert_allclose(found[1], found[0], atol=1e-9)
    np.testing.assert_allclose(found[2], found[0], atol=1e-4)  # it ends elsewhere within the tolerance


def test_a_fold_without_spread_is_left_to_the_program():
    x = tensor(IRIS).clone()
    x[:100, 1] = 3.0
    splits = [(torch.arange(100), torch.arange(100, 150)), (torch.arange(50, 150), torch.arange(50))]
    first, second = GaussianMixture(2).held_out(x, splits, tol=1e-4, max_iter=200)
    assert first is None and len(second) == 50


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_parameter_has_to_gain(kind):
    """Of two components that overlap, near the maximum: along one centre, by a search on scipy's density."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(200, 2)), rng.normal(size=(100, 2)) + 2.0])
    table = table_of(tensor(x), kind)
    rows, expect = table.rows, expectation(table.rows, kind)
    wide = mixture(kind, t=2)._replace(loc=tensor([[-0.5, -0.5], [1.0, 1.0]]), weights=tensor([0.6, 0.4]))
    climb = run_em(table, expect, wide, kind, tol=1e-12, max_iter=2000, to_end=True)

    def steepest(mix):
        shares = Purity()
        sums, _ = expect(mix, coefficients_of(mix), shares)
        after, _ = m_step(sums, mix, kind, None, 0.0)
        return float(left_to_gain(mix, after, shares.squares, tensor(len(rows))))

    assert climb.settled and steepest(climb.mix) < 1e-11
    loc = climb.mix.loc.clone()
    loc[1, 0] += 0.1
    moved = climb.mix._replace(loc=loc)

    def score(at):
        place = loc.clone()
        place[1, 0] = at
        terms = mixture_log_terms(rows.numpy(), moved.weights.numpy(), place.numpy(), covariances(moved))
        return logsumexp(terms, 0).mean()

    best = minimize_scalar(
        lambda at: -score(at), bounds=(float(loc[1, 0]) - 1, float(loc[1, 0]) + 1), method="bounded"
    )
    gain = -best.fun - score(float(loc[1, 0]))
    assert 0.5 * gain < steepest(moved) < 6 * gain
