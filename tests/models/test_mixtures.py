"""Mixtures of Gaussians: EM with missing cells, and the prior of the covariances; against loops over rows by scipy."""

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn import mixture
from sklearn.datasets import load_iris, load_wine
from sklearn.mixture._gaussian_mixture import _compute_precision_cholesky
from tables import tensor
from truths import mixture_log_terms, responsibilities

from bayes_mpt import BayesMPT, MarginalLikelihoodSearch
from bayes_mpt.models import PPCA, FactorAnalysis, GaussianMixture, MixtureOfFactorAnalyzers, mixture_steps
from bayes_mpt.models.covariance_prior import steps_of
from bayes_mpt.training import Ascent
from bayes_mpt.warnings import PrecisionWarning

pytestmark = pytest.mark.usefixtures("own_store")

KINDS = ["full", "tied", "diag", "spherical"]
IRIS, WINE = load_iris().data, load_wine().data


def with_holes(x, share, seed=0):
    return np.where(np.random.default_rng(seed).random(x.shape) < share, np.nan, x)


HOLES = with_holes(WINE[:60, :4], 0.25)
HOLES[3], HOLES[20], HOLES[40, 1:] = np.nan, WINE[20, :4], np.nan


def covariances(p):
    """(K, T, T) of parameters by name."""
    k, t = p["loc"].shape
    if "scale_tril" in p:
        root = np.asarray(p["scale_tril"])
        return np.broadcast_to(root @ np.swapaxes(root, -1, -2), (k, t, t))
    return np.stack([np.diag(np.broadcast_to(s, t) ** 2) for s in np.asarray(p["scale"])])


def log_terms(x, p):
    """log w_k N(x_o; loc_k, S_k) of each row's observed cells, (K, N)."""
    return mixture_log_terms(x, np.asarray(p["weights"]), np.asarray(p["loc"]), covariances(p))


def log_density(x, p):
    return float(logsumexp(log_terms(x, p), 0).sum())


def log_prior(x, p, kind):
    """Of complete rows whose columns are not rounded."""
    covs, t = covariances(p), x.shape[1]
    scale = (
        (1e-5 if kind in ("full", "tied") and t > 1 else 0.01) * np.cov(x.T, bias=True) / len(covs) ** (2 / t)
    )
    scale = {"diag": np.diag(np.diag(scale)), "spherical": np.eye(t) * np.trace(scale) / t}.get(kind, scale)
    covs = covs[:1] if kind == "tied" else covs
    q = 0.3 if kind in ("full", "tied") and t > 1 else 1.0
    return sum(-0.5 * (q * np.linalg.slogdet(c)[1] + np.trace(scale @ np.linalg.inv(c))) for c in covs)


def start_of(program, x):
    """Where it starts, its gaps filled with the columns' means."""
    torch.manual_seed(0)
    program(tensor(np.where(np.isnan(x), np.nanmean(x, 0), x)))
    return {name: value.detach() for name, value in pyro.get_param_store().items()}


def objective(program, x):
    penalty = program.penalty(tensor(x))

    def value(p):
        return log_density(x, p) + (0.0 if penalty is None else float(penalty(p)))

    return value


@pytest.mark.parametrize("prior", ["auto", None])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("x", [HOLES, IRIS[::3]], ids=["holes", "complete"])
def test_the_likelihood_rises_at_every_step(x, kind, prior):
    """Of the observed cells, with the log prior; step by step, and in a climb whose steps are made longer."""
    program = GaussianMixture(2, kind, covariance_prior=prior)
    start = start_of(program, x)
    value = objective(program, x)
    alone, climbed = [value(start)], []
    p = start
    for n in range(1, 8):
        p = program.maximize(tensor(x), p, tol=0.0, max_iter=1)
        alone.append(value(p))
        climbed.append(value(program.maximize(tensor(x), start, tol=0.0, max_iter=3 * n)))
    slack = 1e-9 * abs(alone[0])
    assert min(np.diff(alone)) > -slack and min(np.diff(climbed)) > -slack
    assert climbed[-1] >= alone[-1] - slack, "as many steps and more"


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_with_holes_is_that_of_the_expected_rows(kind):
    """Ghahramani & Jordan (1994), row by row; the prior is one more row of each component."""
    program = GaussianMixture(2, kind, covariance_prior=None)
    p = {name: v.numpy() for name, v in start_of(program, HOLES).items()}
    got = program.maximize(tensor(HOLES), {n: tensor(v) for n, v in p.items()}, tol=0.0, max_iter=1)
    covs, share = covariances(p), responsibilities(log_terms(HOLES, p))
    if kind in ("diag", "spherical"):  # given the component missing cells say nothing, and are left out
        seen = ~np.isnan(HOLES)
        cells = share.T @ seen
        loc = share.T @ np.nan_to_num(HOLES) / cells
        square = np.stack([s @ np.nan_to_num((HOLES - m) ** 2) for s, m in zip(share.T, loc, strict=True)])
        if kind == "spherical":
            square, cells = square.sum(1, keepdims=True), cells.sum(1, keepdims=True)
        np.testing.assert_allclose(got["loc"], loc, rtol=1e-9)
        np.testing.assert_allclose(got["scale"], np.sqrt(square / cells), rtol=1e-9)
        return
    known = ~np.isnan(HOLES).all(1)
    t = HOLES.shape[1]
    first, second = np.zeros((2, t)), np.zeros((2, t, t))
    for row, r in zip(HOLES[known], share[known], strict=True):
        o, m = np.flatnonzero(~np.isnan(row)), np.flatnonzero(np.isnan(row))
        for k in range(2):
            gain = covs[k][:, o] @ np.linalg.inv(covs[k][np.ix_(o, o)])
            mean = p["loc"][k] + gain @ (row[o] - p["loc"][k][o])
            mean[o] = row[o]
            left = np.zeros((t, t))
            left[np.ix_(m, m)] = (covs[k] - gain @ covs[k][o])[np.ix_(m, m)]
            first[k] += r[k] * mean
            second[k] += r[k] * (np.outer(mean, mean) + left)
    count = share[known].sum(0)
    loc = first / count[:, None]
    within = second - count[:, None, None] * loc[:, :, None] * loc[:, None]
    np.testing.assert_allclose(got["weights"], count / count.sum(), rtol=1e-9)
    np.testing.assert_allclose(got["loc"], loc, rtol=1e-9)
    want = within.sum(0)[None] / count.sum() if kind == "tied" else within / count[:, None, None]
    np.testing.assert_allclose(covariances(got), np.broadcast_to(want, (2, t, t)), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_prior_is_a_small_share_of_a_row(kind):
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.normal(size=(40, 3)), rng.normal(size=(30, 3)) + 3]) * [1.0, 10.0, 1e-3]
    program = GaussianMixture(2, kind)
    start = start_of(program, x)
    penalty = program.penalty(tensor(x))
    far = {**start, "loc": start["loc"] + 1.0}
    far |= {
        n: v * tensor(np.linspace(1, 2, v.shape[-1]))[:, None] for n, v in start.items() if n == "scale_tril"
    }
    far |= {n: v * 1.7 for n, v in start.items() if n == "scale"}
    want = log_prior(x, far, kind) - log_prior(x, start, kind)
    assert float(penalty(far) - penalty(start)) == pytest.approx(want, rel=1e-9)
    # nothing is left to climb, and what is reported leaves the prior out
    model = BayesMPT(GaussianMixture(2, kind), random_state=0).fit(x)
    assert model.converged_ and model.at_map_ and model.fit_method_.startswith("maximize")
    assert "iteration" not in model.explain()  # EM does not tell how many
    assert model.log_marginal_likelihood_ == pytest.approx(log_density(x, model.params_), abs=1e-8)
    best = log_density(x, model.params_) + log_prior(x, model.params_, kind)
    for name, value in model.params_.items():
        if name != "weights":
            for factor in (1 - 1e-3, 1 + 1e-3):
                moved = {**model.params_, name: value * factor}
                assert log_density(x, moved) + log_prior(x, moved, kind) < best


def test_the_prior_hardly_moves_components_with_many_rows():
    x = np.concatenate([IRIS, IRIS[:, ::-1] + 10]) + 0.05 * np.random.default_rng(0).normal(size=(300, 4))
    for kind in KINDS:
        held = BayesMPT(GaussianMixture(2, kind), random_state=0).fit(x)
        free = BayesMPT(GaussianMixture(2, kind, covariance_prior=None), random_state=0).fit(x)
        assert 0 < free.log_marginal_likelihood_ - held.log_marginal_likelihood_ < 0.7
        assert "inverse" in held.explain() and "covariance_prior" in held.explain()
        assert "covariance_prior" not in free.explain() and not free.at_map_


def whole_numbers(seed):
    """As minutes between eruptions: two groups, one column."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(55, 6, 97), rng.normal(80, 6, 175)])[:, None].round()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_whole_numbers_do_not_make_components(seed):
    """A repeated value is no cluster: neither where it is rounded little nor where a component is as wide as a step."""
    for unit in (1, 5):
        x = unit * (whole_numbers(seed) / unit).round()
        fits = {k: BayesMPT(GaussianMixture(k), random_state=seed).fit(x) for k in (1, 2, 5)}
        assert min(fits, key=lambda k: fits[k].bic(x)) == 2
        # no component is denser than the cells are known
        assert max(float(m.score_samples(x).max()) for m in fits.values()) < -np.log(unit)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_whole_numbers_do_not_make_components_in_folds(seed):
    estimator = BayesMPT(GaussianMixture(), training=Ascent(tol=1e-6), random_state=seed)
    grid = {"model__n_components": [2, 5]}
    found = MarginalLikelihoodSearch(estimator, grid, evidence="heldout", random_state=seed)
    assert found.fit(whole_numbers(seed)).best_params_ == {"model__n_components": 2}


@pytest.mark.slow
def test_a_fold_has_the_prior_of_its_rows():
    x = with_holes(WINE[:, [0, 1, 6]], 0.1)
    whole = BayesMPT(GaussianMixture(2), training=Ascent(tol=1e-6), random_state=0).fit(x)
    fold = whole.refit(x[::2])
    alone = BayesMPT(GaussianMixture(2), training=Ascent(tol=1e-6), random_state=0).fit(x[::2])
    for name, value in alone.params_.items():
        np.testing.assert_array_equal(fold.params_[name], value)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_and_criteria_with_holes(kind):
    model = BayesMPT(GaussianMixture(2, kind), training=Ascent(tol=1e-4), random_state=0).fit(HOLES)
    p, terms = model.params_, log_terms(HOLES, model.params_)
    share = responsibilities(terms)
    np.testing.assert_allclose(model.predict_proba(HOLES), share, rtol=0, atol=1e-10)
    np.testing.assert_allclose(model.predict_proba(HOLES)[3], p["weights"], atol=1e-13)
    np.testing.assert_array_equal(model.predict(HOLES), share.argmax(1))
    total = logsumexp(terms, 0).sum()
    n_free = {"full": 1 + 8 + 20, "tied": 1 + 8 + 10, "diag": 1 + 8 + 8, "spherical": 1 + 8 + 2}[kind]
    assert model.bic(HOLES) == pytest.approx(
        -2 * total + n_free * np.log(len(HOLES) - np.isnan(HOLES).all(1).sum()), rel=1e-10
    )
    assert model.aic(HOLES) == pytest.approx(-2 * total + 2 * n_free, rel=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_without_holes_it_ends_where_sklearn_does(kind):
    x = WINE[:, [0, 1, 6]]
    model = BayesMPT(GaussianMixture(2, kind, covariance_prior=None), random_state=0).fit(x)
    p = model.params_
    precisions = np.linalg.inv(covariances(p))
    theirs = mixture.GaussianMixture(
        2,
        covariance_type=kind,
        tol=1e-10,
        max_iter=500,
        reg_covar=0,
        weights_init=p["weights"],
        means_init=p["loc"],
        precisions_init={
            "full": precisions,
            "tied": precisions[0],
            "diag": np.diagonal(precisions, axis1=1, axis2=2),
            "spherical": precisions[:, 0, 0],
        }[kind],
    ).fit(x)
    assert model.score(x) == pytest.approx(theirs.score(x), abs=1e-7)
    np.testing.assert_allclose(p["loc"], theirs.means_, rtol=1e-3)


def test_rows_by_parts(monkeypatch):
    """What does not fit in memory at once is summed by parts."""
    from bayes_mpt.models import mixture_patterns

    for kind in KINDS:
        program = GaussianMixture(2, kind)
        start = start_of(program, HOLES)
        want = program.maximize(tensor(HOLES), start, tol=0.0, max_iter=3)
        with monkeypatch.context() as m:
            m.setattr(mixture_steps, "MAX_PRODUCTS", 100)
            m.setattr(mixture_patterns, "MAX_NUMBERS", 100)
            m.setattr(mixture_patterns, "MAX_ROWS", 3)
            got = program.maximize(tensor(HOLES), start, tol=0.0, max_iter=3)
        for name, value in want.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-8, atol=1e-10)
        pyro.clear_param_store()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.2], ids=["complete", "holes"])
def test_a_constant_column_is_named(kind, share):
    import pandas as pd

    x = pd.DataFrame(with_holes(np.random.default_rng(0).normal(size=(50, 3)), share), columns=list("abc"))
    x["d"] = 2.5
    model = BayesMPT(GaussianMixture(2, kind), random_state=0)
    if kind == "spherical":  # one variance, which other columns keep above zero
        assert np.isfinite(model.fit(x).log_marginal_likelihood_)
        return
    with pytest.raises(ValueError, match="no spread.*Constant here: 'd'") as error:
        model.fit(x)
    assert ("'diag'" in str(error.value)) == (kind in ("full", "tied"))


def test_where_a_prior_would_not_help_none_is_advised():
    x = np.random.default_rng(0).normal(size=(50, 3))
    x[:, 2] = 2.5
    with pytest.raises(ValueError, match="collapsed") as error:
        BayesMPT(GaussianMixture(2, covariance_prior=None), random_state=0).fit(x)
    assert "covariance_prior" not in str(error.value)


@pytest.mark.parametrize(
    "model", [GaussianMixture(2, "full"), GaussianMixture(2, "tied"), MixtureOfFactorAnalyzers(2)]
)
def test_a_row_so_far_out_that_columns_are_alike_is_named_as_a_reason(model):
    x = np.random.default_rng(0).normal(size=(60, 3))
    x[5] = 1e6
    with pytest.raises(ValueError, match="far out"):
        BayesMPT(model, random_state=0).fit(x)


def test_penalty_adds_nothing_to_a_mixture_that_has_one():
    x = HOLES[:, :2]
    models = [BayesMPT(GaussianMixture(2), penalty=b, random_state=0).fit(x) for b in (False, True)]
    assert models[0].log_marginal_likelihood_ == models[1].log_marginal_likelihood_
    with pytest.raises(ValueError, match="penalty=True needs .* penalty"):
        BayesMPT(GaussianMixture(2, covariance_prior=None), penalty=True, random_state=0).fit(x)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_drawn(kind):
    """Mean and covariance of 20 000 draws are sum w m and sum w (S + m m') - mean mean', to five errors."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(0, 1, (60, 2)), rng.normal([6, 3], [1, 2], (40, 2))]) + 1000
    model = BayesMPT(GaussianMixture(2, kind), random_state=0).fit(x)
    w, loc = model.params_["weights"], model.params_["loc"]
    if kind in ("full", "tied"):
        root = np.broadcast_to(model.params_["scale_tril"], (2, 2, 2))
    else:
        root = np.array([np.diag(np.broadcast_to(s, 2)) for s in model.params_["scale"]])
    mean = w @ loc
    cov = np.einsum("k,kij,klj->il", w, root, root) + (w[:, None] * (loc - mean)).T @ (loc - mean)
    drawn = model.sample(20_000)
    assert drawn.mean(0) == pytest.approx(mean, abs=5 * np.sqrt(cov.max() / 20_000))
    assert np.cov(drawn.T) == pytest.approx(cov, abs=5 * 1.5 * cov.max() / np.sqrt(20_000))


def test_what_is_refused_leaves_gradients_and_the_store_as_they_were():
    x = np.random.default_rng(0).normal(size=(30, 2))
    model = BayesMPT(GaussianMixture(1), random_state=0).fit(x)
    pyro.clear_param_store()
    x[0, 0] = np.nan
    with pytest.raises(ValueError, match="use impute for their means"):
        model.sample_missing(x)
    assert torch.is_grad_enabled() and not list(pyro.get_param_store())


@pytest.mark.slow
@pytest.mark.parametrize("apart, seed, kind", [(5, 1, "full"), (8, 3, "tied")])
def test_a_column_that_a_cluster_never_shows_stays_in_the_table(apart, seed, kind):
    """The score is flat along that centre but for rows of the other cluster, whose shares are all but zero."""
    rng = np.random.default_rng(seed)
    x = np.r_[rng.normal(size=(20, 3)), rng.normal(apart, 1, (20, 3))]
    x[:20, 0] = x[20:, 1] = np.nan
    fit = BayesMPT(GaussianMixture(2, kind), random_state=seed).fit(x)
    assert fit.converged_
    assert np.abs(fit.params_["loc"]).max() < 2 * np.nanmax(np.abs(x))
    assert fit.log_marginal_likelihood_ == pytest.approx(log_density(x, fit.params_), rel=1e-9)
    assert np.abs(fit.impute(x)).max() < 3 * np.nanmax(np.abs(x))


@pytest.mark.parametrize("kind", ["full", "diag"])
def test_repeated_rows_end_without_a_warning(kind):
    """Where a row lies on a centre its slope is rounding error."""
    x = np.repeat(np.random.default_rng(0).normal(size=(4, 2)), 10, 0)
    assert BayesMPT(GaussianMixture(2, kind), random_state=0).fit(x).converged_


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_with_holes_is_as_good_as_the_best_of_ten(kind):
    """Of ten climbs to the end, each from one start, by random rows for centres."""
    x = with_holes(WINE[:, [0, 6, 9, 11]], 0.1)
    program = GaussianMixture(3, kind)
    value, start = objective(program, x), start_of(program, x)
    rng, ends = np.random.default_rng(0), []
    for _ in range(10):
        rows = np.where(np.isnan(x), np.nanmean(x, 0), x)[rng.choice(len(x), 3, replace=False)]
        # so few steps leave no room for other starts
        end = program.maximize(tensor(x), {**start, "loc": tensor(rows)}, tol=1e-10, max_iter=200)
        ends.append(value(end))
    fit = BayesMPT(program, training=Ascent(tol=1e-7), random_state=0).fit(x)
    assert value({name: tensor(v) for name, v in fit.params_.items()}) > max(ends) - 0.1


@pytest.mark.slow
def test_fits_of_many_columns_with_holes_end_at_one_place():
    """Whatever the seed, and no lower than the best of 40 climbs from random rows for centres."""
    x = with_holes(WINE, 0.1)
    program = GaussianMixture(3, "diag")
    value, start = objective(program, x), start_of(program, x)
    rng, ends = np.random.default_rng(0), []
    for _ in range(40):
        rows = np.where(np.isnan(x), np.nanmean(x, 0), x)[rng.choice(len(x), 3, replace=False)]
        end = program.maximize(tensor(x), {**start, "loc": tensor(rows)}, tol=1e-9, max_iter=100)
        ends.append(value(end))
    for seed in (1, 2):
        fit = BayesMPT(program, random_state=seed).fit(x)
        assert value({name: tensor(v) for name, v in fit.params_.items()}) > max(ends) - 1e-3


# ------------------------------------------------------------------------------------------ as scikit-learn's users ask


@pytest.mark.parametrize("kind", KINDS)
def test_what_scikit_learn_calls_by_name_is_what_it_computes(kind):
    """Their methods at our parameters, shapes included, are ours."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 2)) * [1.0, 3.0] + 6.0 * rng.integers(0, 2, (60, 1))
    model = BayesMPT(GaussianMixture(2, kind), random_state=0)
    assert hasattr(model, "fit_predict") and not hasattr(model, "means_")
    labels = model.fit_predict(x)
    theirs = mixture.GaussianMixture(2, covariance_type=kind).fit(x)
    for name in ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_"):
        assert getattr(model, name).shape == getattr(theirs, name).shape, name
    theirs.weights_, theirs.means_, theirs.covariances_ = model.weights_, model.means_, model.covariances_
    theirs.precisions_cholesky_ = _compute_precision_cholesky(model.covariances_, kind)
    want = theirs.precisions_cholesky_
    np.testing.assert_allclose(model.precisions_cholesky_, want, rtol=1e-10, atol=1e-12)
    want = np.square(want) if want.ndim == 1 or kind == "diag" else want @ want.swapaxes(-1, -2)
    np.testing.assert_allclose(model.precisions_, want, rtol=1e-10, atol=1e-12)
    for name in ("score_samples", "score", "predict_proba", "bic", "aic"):
        np.testing.assert_allclose(getattr(model, name)(x), getattr(theirs, name)(x), rtol=1e-10, atol=1e-14)
    np.testing.assert_array_equal(theirs.predict(x), labels)
    np.testing.assert_array_equal(model.predict(x), labels)
    assert model.log_marginal_likelihood_ == pytest.approx(len(x) * theirs.score(x), rel=1e-10)
    assert model.sample(3).shape == theirs.sample(3)[0].shape


def test_covariances_of_factor_analysers_and_programs_without_labels():
    x = np.random.default_rng(1).normal(size=(40, 3))
    model = BayesMPT(MixtureOfFactorAnalyzers(2, 1), random_state=0).fit(x)
    laws = [multivariate_normal(m, c) for m, c in zip(model.means_, model.covariances_, strict=True)]
    want = logsumexp([np.log(w) + law.logpdf(x) for w, law in zip(model.weights_, laws, strict=True)], axis=0)
    np.testing.assert_allclose(model.score_samples(x), want, rtol=1e-9)
    np.testing.assert_allclose(model.precisions_ @ model.covariances_, [np.eye(3)] * 2, atol=1e-9)
    assert not hasattr(BayesMPT(PPCA(1)).fit(x), "precisions_")
    assert not hasattr(BayesMPT(PPCA(1)), "fit_predict") and not hasattr(BayesMPT(PPCA(1)).fit(x), "weights_")
    with pytest.raises(ValueError, match="labels rows by the one discrete latent"):
        BayesMPT(no_labels).fit_predict(x)


def no_labels(x):
    loc = pyro.param("loc", torch.zeros(3, dtype=x.dtype))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", pyro.distributions.Normal(loc, 1.0).to_event(1), obs=x)


# --------------------------------------------------------------------------------------- rows as good as infinitely far


@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
def test_labels_of_a_row_too_far_to_square_are_refused(kind):
    x = np.random.default_rng(0).normal(size=(40, 3))
    model = BayesMPT(GaussianMixture(2, kind), random_state=0).fit(x)
    new = np.array([[0.0, 1.0, np.nan], [0.0, 1e200, np.nan]])
    with pytest.warns(PrecisionWarning, match=r"row 1 holds 1e\+200 in column 1: the log-density"):
        nats = model.score_samples(new)
    assert np.isfinite(nats[0]) and nats[1] == -np.inf
    for ask in (model.predict_proba, model.predict, model.transform, model.impute, model.sample_missing):
        with pytest.raises(ValueError, match=r"row 1 holds 1e\+200 in column 1, whose square no float holds"):
            ask(new)
    far = np.array([[0.0, 1e150, np.nan]])  # its square is a number
    assert np.isfinite(model.score_samples(far)).all() and np.isfinite(model.predict_proba(far)).all()


@pytest.mark.parametrize("model", [PPCA(1), FactorAnalysis(1)], ids=repr)
def test_a_row_too_far_to_square_is_imputed_and_its_score_is_said(model):
    x = np.random.default_rng(0).normal(size=(40, 3)) @ np.array([[2.0, 1, 0], [0, 1, 1], [0, 0, 1]])
    fitted = BayesMPT(model).fit(pd.DataFrame(x, columns=["a", "b", "c"]))
    new = pd.DataFrame([[0.0, 1.0, np.nan], [2e200, 1e200, np.nan]], columns=["a", "b", "c"])
    with pytest.warns(PrecisionWarning, match=r"row 1 holds 2e\+200 in column a: the log-density"):
        assert fitted.score_samples(new)[1] == -np.inf
    cov = fitted.get_covariance()
    want = cov[2, :2] @ np.linalg.solve(cov[:2, :2], [2.0, 1.0])
    assert fitted.impute(new).iloc[1, 2] == pytest.approx(1e200 * want, rel=1e-8)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
def test_steps_of_rounded_columns_are_seen_in_single_precision(scale):
    cells = scale * load_iris().data.astype(np.float32)
    rows = torch.from_numpy(cells.astype(float))
    np.testing.assert_allclose(steps_of(rows / rows.std(0)) * rows.std(0), 0.1 * scale, rtol=1e-4)
    normal = torch.from_numpy(
        np.random.default_rng(0).normal(size=(150, 20)).astype(np.float32).astype(float)
    )
    assert not steps_of(normal).any()
