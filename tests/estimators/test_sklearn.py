"""BayesMPT and MarginalLikelihoodSearch as scikit-learn citizens; every value against dense algebra done here."""

import pickle
import warnings
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pyro
import pytest
from sklearn.base import clone
from sklearn.datasets import load_iris, load_wine
from sklearn.decomposition import PCA
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks as checks
from sklearn.utils.estimator_checks import parametrize_with_checks
from truths import log_density, ppca

from bayes_mpt import BayesMPT, MarginalLikelihoodSearch
from bayes_mpt.masks import UniformSize
from bayes_mpt.models import PPCA, FactorAnalysis
from bayes_mpt.training import Ascent, Steps

SEED = 1991
N_ROWS, T, K = 80, 6, 2


def a_search():
    """Ranked by the fits alone: the checks look at how a search is called, and fit it some two hundred times."""
    return MarginalLikelihoodSearch(
        BayesMPT(model=PPCA(1)), {"model__n_components": [1, 2]}, evidence="train"
    )


@pytest.mark.slow
@parametrize_with_checks([BayesMPT(), a_search()])
def test_scikit_learn_checks(estimator, check):
    check(estimator)


TRANSFORMER_CHECKS = [
    checks.check_param_validation,
    checks.check_dataframe_column_names_consistency,
    checks.check_get_feature_names_out_error,
    checks.check_transformer_get_feature_names_out,
    checks.check_transformer_get_feature_names_out_pandas,
    checks.check_set_output_transform,
    checks.check_set_output_transform_pandas,
    checks.check_global_output_transform_pandas,
    checks.check_inplace_ensure_writeable,
]


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:X (has|does not have valid) feature names"
)  # the checks mix arrays and frames
@pytest.mark.parametrize("check", TRANSFORMER_CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("model", [None, PPCA(2), FactorAnalysis(2)], ids=repr)
def test_checks_that_are_not_run_by_themselves(model, check):
    check("BayesMPT", BayesMPT(model=model))


@pytest.mark.parametrize(
    "check",
    [checks.check_param_validation, checks.check_dataframe_column_names_consistency],
    ids=lambda c: c.__name__,
)
def test_checks_of_the_search_that_are_not_run_by_themselves(check):
    check("MarginalLikelihoodSearch", a_search())


# -- the data and the dense truth


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(SEED)
    loading = rng.normal(size=(T, K)) * [2.0, 1.0]
    return rng.normal(size=(N_ROWS, K)) @ loading.T + 0.6 * rng.normal(size=(N_ROWS, T)) + np.arange(T)


@pytest.fixture(scope="module")
def x_missing(x):
    x = x.copy()
    x[np.random.default_rng(SEED + 1).random(x.shape) < 0.15] = np.nan
    x[3] = np.r_[np.full(T - 1, np.nan), x[3, -1]]  # one observed cell
    return x


def posterior_and_filled(x, mean, loading, noise):
    """Posterior means of the latents and conditional means of the missing cells, by dense conditioning."""
    cov = loading @ loading.T + np.diag(noise)
    latent, filled = np.empty((len(x), loading.shape[1])), x.copy()
    for n, row in enumerate(x):
        seen = ~np.isnan(row)
        weights = np.linalg.solve(cov[np.ix_(seen, seen)], row[seen] - mean[seen])
        latent[n] = loading[seen].T @ weights
        filled[n, ~seen] = mean[~seen] + cov[np.ix_(~seen, seen)] @ weights
    return latent, filled


def parameters(estimator):
    noise = np.broadcast_to(estimator.noise_variance_, (estimator.n_features_in_,))
    return estimator.mean_, estimator.components_.T, noise


# -- complete rows


@pytest.mark.parametrize("n_components", [1, 2, 4])
def test_fit_and_score_samples_at_the_closed_form_optimum(x, n_components):
    estimator = BayesMPT(model=PPCA(n_components)).fit(x)
    truth = log_density(x, *ppca(x, n_components))
    assert estimator.log_marginal_likelihood_ / N_ROWS == pytest.approx(truth.mean(), abs=1e-9)
    assert estimator.score(x) == pytest.approx(truth.mean(), abs=1e-9)
    np.testing.assert_allclose(estimator.score_samples(x), truth, rtol=0, atol=1e-7)
    assert estimator.log_marginal_likelihood_se_ == 0


@pytest.mark.parametrize("model", [PPCA(2), FactorAnalysis(2)], ids=repr)
def test_learnt_attributes_belong_together(x, model):
    estimator = BayesMPT(model=model).fit(x)
    mean, loading, noise = parameters(estimator)
    assert loading.shape == (T, 2) and mean.shape == (T,)
    assert np.shape(estimator.noise_variance_) == (() if isinstance(model, PPCA) else (T,))
    cov = loading @ loading.T + np.diag(noise)
    np.testing.assert_allclose(estimator.get_covariance(), cov, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(estimator.get_precision(), np.linalg.inv(cov), rtol=1e-8, atol=1e-10)
    rows = log_density(x, mean, cov)
    np.testing.assert_allclose(estimator.score_samples(x), rows, rtol=0, atol=1e-9)
    assert estimator.log_marginal_likelihood_ == pytest.approx(rows.sum(), abs=1e-7)
    latent, _ = posterior_and_filled(x, mean, loading, noise)
    np.testing.assert_allclose(estimator.transform(x), latent, rtol=0, atol=1e-9)
    np.testing.assert_allclose(
        estimator.inverse_transform(latent), mean + latent @ loading.T, rtol=0, atol=1e-9
    )
    assert estimator.n_components_ == 2 and estimator.n_features_in_ == T
    assert isinstance(estimator.n_iter_, int) and estimator.n_iter_ >= 1


def test_fit_transform_is_fit_then_transform(x):
    two_steps = BayesMPT(model=PPCA(2)).fit(x).transform(x)
    np.testing.assert_allclose(BayesMPT(model=PPCA(2)).fit_transform(x), two_steps, rtol=0, atol=1e-10)


def test_agrees_with_scikit_learn_pca_up_to_its_degrees_of_freedom(x):
    """PCA divides by N - 1; times (N - 1) / N its covariance is the maximum-likelihood one."""
    pca = PCA(2, svd_solver="full").fit(x)
    cov = pca.get_covariance() * (N_ROWS - 1) / N_ROWS
    ours = BayesMPT(model=PPCA(2)).fit(x)
    np.testing.assert_allclose(ours.get_covariance(), cov, rtol=0, atol=1e-7)
    np.testing.assert_allclose(ours.mean_, pca.mean_, rtol=0, atol=1e-7)
    assert ours.score(x) == pytest.approx(log_density(x, pca.mean_, cov).mean(), abs=1e-9)


def test_sample_has_the_learnt_moments(x):
    estimator = BayesMPT(model=PPCA(2), random_state=0).fit(x)
    draws = estimator.sample(20_000)
    draws = draws[0] if isinstance(draws, tuple) else draws
    assert draws.shape == (20_000, T)
    cov = estimator.get_covariance()
    np.testing.assert_allclose(draws.mean(0), estimator.mean_, atol=5 * np.sqrt(cov.max() / 20_000))
    np.testing.assert_allclose(np.cov(draws.T), cov, atol=5 * np.sqrt(2 / 20_000) * cov.max())


# -- pipelines and searches


def test_pipeline_with_standard_scaler(x):
    pipe = make_pipeline(StandardScaler(), BayesMPT(model=PPCA(2))).fit(x)
    scaled = (x - x.mean(0)) / x.std(0)
    truth = log_density(scaled, *ppca(scaled, 2))
    assert pipe.score(x) == pytest.approx(truth.mean(), abs=1e-9)
    np.testing.assert_allclose(pipe.score_samples(x), truth, rtol=0, atol=1e-7)
    assert pipe.transform(x).shape == (N_ROWS, 2)


@pytest.mark.slow
@pytest.mark.parametrize("n_jobs", [None, 2])
def test_grid_search_over_latent_dimensions(x, n_jobs):
    dimensions, folds = [1, 2, 3], KFold(4)
    search = GridSearchCV(
        BayesMPT(model=PPCA(1)), {"model__n_components": dimensions}, cv=folds, n_jobs=n_jobs
    ).fit(x)
    for row, n_components in enumerate(dimensions):
        for fold, (train, test) in enumerate(folds.split(x)):
            truth = log_density(x[test], *ppca(x[train], n_components)).mean()
            assert search.cv_results_[f"split{fold}_test_score"][row] == pytest.approx(truth, abs=1e-7)
    assert search.best_params_ == {"model__n_components": 2}
    assert search.best_estimator_.n_components_ == 2


def test_grid_search_over_kinds_of_model(x):
    models = [PPCA(1), PPCA(2), FactorAnalysis(2)]
    search = GridSearchCV(BayesMPT(model=PPCA(1)), {"model": models}, cv=2).fit(x)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert models[0].n_components == 1, "the candidates' own models are left alone"


def test_cross_val_score_inside_a_pipeline(x):
    scores = cross_val_score(make_pipeline(StandardScaler(), BayesMPT(model=PPCA(2))), x, cv=KFold(3))
    for score, (train, test) in zip(scores, KFold(3).split(x), strict=True):
        mean, sd = x[train].mean(0), x[train].std(0)
        optimum = ppca((x[train] - mean) / sd, 2)
        assert score == pytest.approx(log_density((x[test] - mean) / sd, *optimum).mean(), abs=1e-7)


def test_search_by_training_likelihood_has_the_closed_form_scores(x):
    dimensions = [1, 2, 3]
    search = MarginalLikelihoodSearch(
        BayesMPT(model=PPCA(1)), {"model__n_components": dimensions}, evidence="train"
    ).fit(x)
    truth = [log_density(x, *ppca(x, k)).sum() for k in dimensions]
    ranked = search.comparison_.sort_values("rank")
    np.testing.assert_allclose(ranked["lml"], sorted(truth, reverse=True), rtol=0, atol=N_ROWS * 1e-8)
    assert search.best_params_ == {"model__n_components": dimensions[int(np.argmax(truth))]}
    assert search.best_estimator_.n_components_ == 3
    assert search.best_index_ == 2
    for key in ("params", "param_model__n_components", "mean_test_score", "rank_test_score", "mean_fit_time"):
        assert len(search.cv_results_[key]) == 3


def test_search_delegates_to_the_best_estimator(x):
    search = a_search().fit(x)
    truth = log_density(x, *ppca(x, search.best_params_["model__n_components"]))
    assert search.best_params_ == {"model__n_components": 2}
    assert search.score(x) == pytest.approx(truth.mean(), abs=1e-9)
    np.testing.assert_allclose(search.score_samples(x), truth, rtol=0, atol=1e-7)
    np.testing.assert_array_equal(search.transform(x), search.best_estimator_.transform(x))


def test_search_in_a_pipeline_with_a_scaler(x):
    pipe = make_pipeline(StandardScaler(), a_search()).fit(x)
    scaled = (x - x.mean(0)) / x.std(0)
    assert pipe.score(x) == pytest.approx(log_density(scaled, *ppca(scaled, 2)).mean(), abs=1e-9)


# -- pandas


def test_pandas_in_and_out(x):
    frame = pd.DataFrame(x, columns=list("abcdef"), index=[f"row {n}" for n in range(N_ROWS)])
    estimator = BayesMPT(model=PPCA(2)).set_output(transform="pandas").fit(frame)
    out = estimator.transform(frame)
    assert isinstance(out, pd.DataFrame)
    assert list(out.index) == list(frame.index)
    assert list(out.columns) == ["bayesmpt0", "bayesmpt1"] == list(estimator.get_feature_names_out())
    assert list(estimator.feature_names_in_) == list("abcdef")
    plain = BayesMPT(model=PPCA(2)).fit(x)
    np.testing.assert_allclose(out.to_numpy(), plain.transform(x), rtol=0, atol=1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no word about feature names
        np.testing.assert_allclose(estimator.score_samples(frame), plain.score_samples(x), rtol=0, atol=1e-10)


def test_pandas_through_a_pipeline():
    frame = load_iris(as_frame=True).data
    pipe = make_pipeline(StandardScaler(), BayesMPT(model=PPCA(1))).set_output(transform="pandas").fit(frame)
    assert list(pipe.transform(frame).columns) == ["bayesmpt0"]


def test_nullable_pandas_columns(x_missing):
    """pd.NA in a nullable column is a missing cell like any other."""
    frame = pd.DataFrame(x_missing).astype("Float64")
    plain = BayesMPT(model=PPCA(1)).fit(x_missing)
    estimator = BayesMPT(model=PPCA(1)).fit(frame)
    assert estimator.log_marginal_likelihood_ == pytest.approx(plain.log_marginal_likelihood_, abs=1e-9)


# -- clone, pickle, idempotence


@pytest.mark.parametrize(
    "estimator",
    [
        BayesMPT(),
        BayesMPT(model=PPCA(3), training=Ascent(max_iter=7), random_state=5),
        BayesMPT(model=FactorAnalysis(1)),
        a_search(),
    ],
    ids=["default", "PPCA", "FactorAnalysis", "search"],
)
def test_clone_keeps_the_parameters_and_nothing_learnt(x, estimator):
    fitted = clone(estimator).fit(x)
    twin = clone(fitted)
    assert repr(twin) == repr(estimator)
    assert not [name for name in vars(twin) if name.endswith("_") and not name.startswith("_")]
    assert twin.get_params(deep=True).keys() == estimator.get_params(deep=True).keys()


@pytest.mark.parametrize("model", [None, PPCA(2), FactorAnalysis(2)], ids=repr)
def test_pickle_round_trip_is_exact(x, x_missing, model):
    estimator = BayesMPT(model=model).fit(x)
    twin = pickle.loads(pickle.dumps(estimator))
    np.testing.assert_array_equal(twin.score_samples(x), estimator.score_samples(x))
    np.testing.assert_array_equal(twin.score_samples(x_missing), estimator.score_samples(x_missing))
    np.testing.assert_array_equal(twin.transform(x_missing), estimator.transform(x_missing))
    np.testing.assert_array_equal(twin.impute(x_missing), estimator.impute(x_missing))
    assert twin.estimate(x).total == estimator.estimate(x).total


def test_pickle_of_a_search(x):
    search = a_search().fit(x)
    twin = pickle.loads(pickle.dumps(search))
    np.testing.assert_array_equal(twin.score_samples(x), search.score_samples(x))
    pd.testing.assert_frame_equal(twin.comparison_, search.comparison_)


@pytest.mark.parametrize("model", [PPCA(2), FactorAnalysis(2)], ids=repr)
def test_fits_do_not_touch_one_another(x, model):
    """A second estimator, fitted in between on other data, changes nothing: no global parameter store leaks."""
    pyro.clear_param_store()
    first = BayesMPT(model=clone(model)).fit(x)
    before = first.score_samples(x)
    BayesMPT(model=clone(model)).fit(load_wine().data[:, :T])
    np.testing.assert_array_equal(first.score_samples(x), before)
    again = BayesMPT(model=clone(model)).fit(x)
    np.testing.assert_allclose(again.score_samples(x), before, rtol=0, atol=1e-10)
    assert not list(pyro.get_param_store().keys()), "the user's parameter store is left empty"


def test_the_constructor_stores_what_it_is_given():
    model = PPCA(2)
    estimator = BayesMPT(model=model)
    assert estimator.model is model
    estimator.fit(load_iris().data)
    assert estimator.model is model and model.get_params() == {"n_components": 2}


def test_fit_does_not_change_its_input(x, x_missing):
    for data in (x.copy(), x_missing.copy()):
        before = data.copy()
        estimator = BayesMPT(model=PPCA(1)).fit(data)
        estimator.transform(data), estimator.impute(data), estimator.score_samples(data)
        np.testing.assert_array_equal(data, before)


# -- dtypes


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_transform_keeps_the_dtype_and_scores_stay_exact(x, dtype):
    data = x.astype(dtype)
    estimator = BayesMPT(model=PPCA(2)).fit(data)
    assert estimator.transform(data).dtype == dtype
    mean, loading, noise = parameters(estimator)
    rows = log_density(data.astype(float), mean.astype(float), loading @ loading.T + np.diag(noise))
    np.testing.assert_allclose(estimator.score_samples(data), rows, rtol=0, atol=1e-9)
    truth = log_density(data.astype(float), *ppca(data.astype(float), 2))
    assert estimator.score(data) == pytest.approx(truth.mean(), abs=1e-9)


def test_float32_far_from_zero_is_worked_in_float64(x):
    data = (x + 1e4).astype(np.float32)
    estimator = BayesMPT(model=PPCA(2)).fit(data)
    truth = log_density(data.astype(float), *ppca(data.astype(float), 2)).mean()
    assert estimator.score(data) == pytest.approx(truth, abs=1e-9)


def test_integers_are_numbers(x):
    data = np.round(10 * x).astype(int)
    truth = log_density(data.astype(float), *ppca(data.astype(float), 2)).mean()
    assert BayesMPT(model=PPCA(2)).fit(data).score(data) == pytest.approx(truth, abs=1e-9)


@pytest.mark.parametrize("layout", ["fortran", "strided", "reversed", "readonly", "list"])
def test_memory_layouts(x, layout):
    data = {
        "fortran": lambda: np.asfortranarray(x),
        "strided": lambda: np.repeat(np.repeat(x, 2, 0), 3, 1)[::2, ::3],
        "reversed": lambda: x[::-1],
        "readonly": lambda: _readonly(x),
        "list": lambda: x.tolist(),
    }[layout]()
    truth = log_density(x, *ppca(x, 2)).mean()
    assert BayesMPT(model=PPCA(2)).fit(data).score(data) == pytest.approx(truth, abs=1e-9)


def _readonly(x):
    x = x.copy()
    x.flags.writeable = False
    return x


# -- missing cells


def em_with_missing_cells(x, n_components, n_steps):
    """PPCA by EM over the observed cells, in numpy: mean and covariance (Ilin & Raiko 2010, section 3)."""
    seen = ~np.isnan(x)
    mean = np.nanmean(x, 0)
    loading = np.random.default_rng(0).normal(size=(x.shape[1], n_components))
    noise = 1.0
    filled = np.where(seen, x, 0.0)
    for _ in range(n_steps):
        gram = np.einsum("nt,tk,tl->nkl", seen, loading, loading) + noise * np.eye(n_components)
        spread = np.linalg.inv(gram)  # posterior covariance / noise
        z = np.einsum("nkl,tl,nt->nk", spread, loading, seen * (filled - mean))
        # the M step regresses each column on (z, 1) over its observed rows
        for t in range(x.shape[1]):
            rows = seen[:, t]
            design = np.column_stack([z[rows], np.ones(rows.sum())])
            second = design.T @ design
            second[:-1, :-1] += noise * spread[rows].sum(0)
            *loading[t], mean[t] = np.linalg.solve(second, design.T @ x[rows, t])
        residual = seen * (filled - mean - z @ loading.T) ** 2
        extra = noise * seen * np.einsum("tk,nkl,tl->nt", loading, spread, loading)
        noise = (residual + extra).sum() / seen.sum()
    return mean, loading @ loading.T + noise * np.eye(x.shape[1])


@pytest.mark.slow
def test_fit_with_missing_cells_reaches_the_optimum(x_missing):
    estimator = BayesMPT(model=PPCA(2)).fit(x_missing)
    truth = log_density(x_missing, *em_with_missing_cells(x_missing, 2, 1500)).mean()
    assert estimator.score(x_missing) == pytest.approx(truth, abs=1e-7)
    assert estimator.log_marginal_likelihood_ / N_ROWS == pytest.approx(truth, abs=1e-7)


@pytest.mark.parametrize("model", [PPCA(2), FactorAnalysis(2)], ids=repr)
@pytest.mark.parametrize("fitted_on", ["complete", "missing"])
def test_missing_cells_in_every_method(x, x_missing, model, fitted_on):
    estimator = BayesMPT(model=model).fit(x if fitted_on == "complete" else x_missing)
    mean, loading, noise = parameters(estimator)
    rows = log_density(x_missing, mean, loading @ loading.T + np.diag(noise))
    np.testing.assert_allclose(estimator.score_samples(x_missing), rows, rtol=0, atol=1e-9)
    assert estimator.score(x_missing) == pytest.approx(rows.mean(), abs=1e-10)
    latent, filled = posterior_and_filled(x_missing, mean, loading, noise)
    np.testing.assert_allclose(estimator.transform(x_missing), latent, rtol=0, atol=1e-9)
    imputed = estimator.impute(x_missing)
    np.testing.assert_allclose(imputed, filled, rtol=0, atol=1e-9)
    seen = ~np.isnan(x_missing)
    np.testing.assert_array_equal(imputed[seen], x_missing[seen])
    estimate = estimator.estimate(x_missing)
    np.testing.assert_allclose(estimate.lml, rows, rtol=0, atol=1e-9)
    assert estimate.total == pytest.approx(rows.sum(), abs=1e-8)
    assert estimate.exact and estimate.se == 0


def test_impute_of_complete_rows_is_the_identity(x):
    np.testing.assert_array_equal(BayesMPT(model=PPCA(2)).fit(x).impute(x), x)


@pytest.mark.slow
def test_grid_search_with_missing_cells(x_missing):
    search = GridSearchCV(BayesMPT(model=PPCA(1)), {"model__n_components": [1, 2]}, cv=KFold(2)).fit(
        x_missing
    )
    assert search.best_params_ == {"model__n_components": 2}
    for fold, (train, test) in enumerate(KFold(2).split(x_missing)):
        truth = log_density(x_missing[test], *em_with_missing_cells(x_missing[train], 1, 1500)).mean()
        assert search.cv_results_[f"split{fold}_test_score"][0] == pytest.approx(truth, abs=1e-5)


@pytest.mark.parametrize("infinity", [np.inf, -np.inf])
@pytest.mark.parametrize(
    "method",
    ["fit", "partial_fit", "fit_transform", "score", "score_samples", "transform", "impute", "estimate"],
)
def test_infinities_are_rejected(x, method, infinity):
    bad = x.copy()
    bad[5, 2] = infinity
    estimator = BayesMPT(model=PPCA(1)).fit(x)
    with pytest.raises(ValueError, match="(?i)inf"):
        getattr(estimator, method)(bad)


def test_infinities_beside_missing_cells_are_rejected(x_missing):
    bad = x_missing.copy()
    bad[0, np.flatnonzero(~np.isnan(bad[0]))[0]] = np.inf
    with pytest.raises(ValueError, match="(?i)inf"):
        BayesMPT(model=PPCA(1)).fit(bad)
    with pytest.raises(ValueError, match="(?i)inf"):
        a_search().fit(bad)


# -- callbacks


needs_callbacks = pytest.mark.skipif(
    find_spec("sklearn.callback") is None, reason="scikit-learn has callbacks from 1.9 on"
)
needs_rich = pytest.mark.skipif(
    find_spec("rich") is None, reason="scikit-learn's ProgressBar is drawn by rich"
)


class Recorder:
    """A callback that notes the hooks; with `stop_after`, it asks for a stop after so many tasks."""

    def __init__(self, stop_after=None):
        self.names, self.stop_after = [], stop_after

    def setup(self, estimator, context):
        self.names.append("setup")

    def teardown(self, estimator, context):
        self.names.append("teardown")

    def on_fit_task_begin(self, estimator, context):
        self.names.append("begin")

    def on_fit_task_end(self, estimator, context):
        self.names.append("end")
        return self.stop_after is not None and self.names.count("end") >= self.stop_after


@needs_callbacks
def test_callback_hooks_come_in_order(x):
    recorder = Recorder()
    BayesMPT(model=FactorAnalysis(2)).set_callbacks(recorder).fit(x)
    assert recorder.names[0] == "setup" and recorder.names[-1] == "teardown"
    assert recorder.names.count("begin") == recorder.names.count("end") >= 1


@needs_callbacks
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # 30 steps are few on purpose
def test_a_callback_sees_the_iterations_and_can_stop_them(x):
    settings = dict(model=PPCA(1), masks=UniformSize(4), training=Steps(max_iter=30), random_state=0)
    recorder = Recorder()
    BayesMPT(**settings).set_callbacks(recorder).fit(x)
    stopper = Recorder(stop_after=3)
    stopped = BayesMPT(**settings).set_callbacks(stopper).fit(x)
    assert recorder.names.count("end") > 5
    assert stopper.names.count("end") < recorder.names.count("end")
    assert np.isfinite(stopped.score(x)), "a stopped fit is a fit"


@needs_callbacks
def test_a_callback_is_torn_down_when_fit_fails(x):
    recorder = Recorder()
    bad = np.where(np.arange(T) == 0, 1.0, x)  # a constant column: no maximum for factor analysis
    with pytest.raises(ValueError):
        BayesMPT(model=FactorAnalysis(2)).set_callbacks(recorder).fit(bad)
    assert recorder.names.count("setup") == recorder.names.count("teardown")


@needs_callbacks
@needs_rich
def test_progress_bar(x, capsys):
    from sklearn.callback import ProgressBar

    estimator = BayesMPT(model=PPCA(2)).set_callbacks(ProgressBar()).fit(x)
    assert "BayesMPT" in capsys.readouterr().out
    assert estimator.score(x) == pytest.approx(log_density(x, *ppca(x, 2)).mean(), abs=1e-9)


@needs_callbacks
@needs_rich
def test_progress_bar_reaches_the_estimator_through_a_search(x, capsys):
    from sklearn.callback import ProgressBar

    grid = GridSearchCV(BayesMPT(model=PPCA(1)), {"model__n_components": [1, 2]}, cv=2)
    grid.set_callbacks(ProgressBar()).fit(x)
    assert grid.best_params_ == {"model__n_components": 2}
    assert "BayesMPT" in capsys.readouterr().out
