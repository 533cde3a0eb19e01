"""The search: every number of its tables by hand from closed forms and dense densities, its guards, its restarts."""

import math

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from scipy.stats import multivariate_normal, norm
from scipy.stats import t as student_t
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_wine
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, KFold, ParameterGrid, PredefinedSplit, ShuffleSplit
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, QuantileTransformer, StandardScaler
from tables import with_holes
from truths import covariance, ppca, replicate_error

from bayes_mpt import Auto, BayesMPT, Cumulative, HeldOut, MarginalLikelihoodSearch, compare
from bayes_mpt.evidence import laplace_diagonal, laplace_proportional
from bayes_mpt.masks import UniformSize
from bayes_mpt.models import (
    PPCA,
    VAE,
    FactorAnalysis,
    GaussianMixture,
    GaussianProcess,
    MaskedPatches,
    MaskedTransformer,
    MixtureOfFactorAnalyzers,
)
from bayes_mpt.training import Ascent, Epochs, Steps

N, T = 60, 6
RNG = np.random.default_rng(1991)
X = RNG.normal(size=(N, 2)) @ RNG.normal(size=(2, T)) + 0.7 * RNG.normal(size=(N, T)) + 3
GRID = {"model__n_components": [1, 2, 3]}
COLUMNS = [
    *("rank", "expected_diff", "expected_se", "p_better", "lml", "se", "lml_diff", "mc_dse", "p_worse"),
    *("weight", "log_bayes_factor", "dse", "diag"),
]


def ppca_scores(train, test, k):
    return np.atleast_1d(multivariate_normal(*ppca(train, k)).logpdf(test))


def search(evidence, grid=None, **kw):
    return MarginalLikelihoodSearch(
        BayesMPT(PPCA(1), random_state=0), grid or GRID, evidence=evidence, random_state=0, **kw
    )


def gaussian(mean, sd=1.0):
    """A program with nothing to train."""

    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(mean + z[:, None].expand(-1, x.shape[1]), sd).to_event(1), obs=x)

    return program


def gaussian_scores(x, mean, sd=1.0):
    t = x.shape[1]
    return multivariate_normal(np.full(t, float(mean)), np.ones((t, t)) + sd**2 * np.eye(t)).logpdf(x)


@pytest.fixture
def record(monkeypatch):
    """Every fit and every scoring of rows by it: (training rows, scored rows, scores)."""
    calls = {"fit": [], "score": []}
    fit, score = BayesMPT.fit, BayesMPT.score_samples

    def recorded_fit(self, X, y=None):
        calls["fit"].append((self, np.array(X)))
        self._rows = np.array(X)
        return fit(self, X, y)

    def recorded_score(self, X, y=None):
        out = score(self, X, y)
        calls["score"].append((self.model.n_components, self._rows, np.array(X), out))
        return out

    monkeypatch.setattr(BayesMPT, "fit", recorded_fit)
    monkeypatch.setattr(BayesMPT, "score_samples", recorded_score)
    return calls


# ------------------------------------------------------------------------------------------------- the table by hand


def check_results(s, lml, n_rows=N):
    """What cv_results_ and comparison_ say of candidates with these totals, in the order of the grid."""
    lml = np.asarray(lml)
    np.testing.assert_allclose(s.cv_results_["lml"], lml, rtol=0, atol=1e-6)
    np.testing.assert_allclose(s.cv_results_["mean_test_score"], lml / n_rows, rtol=0, atol=1e-8)
    np.testing.assert_array_equal(s.cv_results_["mean_test_lml"], s.cv_results_["mean_test_score"])
    order = np.argsort(-lml)
    np.testing.assert_array_equal(s.cv_results_["rank_test_score"][order], np.arange(1, len(lml) + 1))
    assert s.best_index_ == order[0]
    assert s.best_params_ == list(ParameterGrid(s.param_grid))[order[0]]
    assert s.best_score_ == pytest.approx(lml.max() / n_rows, abs=1e-8)
    c = s.comparison_
    assert isinstance(c, pd.DataFrame) and list(c.columns) == COLUMNS
    np.testing.assert_array_equal(c["rank"], np.arange(len(lml)))
    np.testing.assert_allclose(c["lml"], lml[order], atol=1e-6)
    np.testing.assert_allclose(c["lml_diff"], lml[order] - lml.max(), atol=1e-6)
    assert (c["lml_diff"] <= 0).all() and c["lml_diff"].iloc[0] == 0
    assert list(c.index) == [s.candidate_names_[i] for i in order]
    assert c.attrs["ranked_by"] == "lml"
    assert c[["expected_diff", "expected_se", "p_better"]].isna().all(axis=None)


def check_dse(table, names, by_row):
    """sqrt(N) sd of the difference of rows' scores; NaN for the best itself."""
    best = by_row[names.index(table.index[0])]
    for name in table.index[1:]:
        want = math.sqrt(len(best)) * np.std(by_row[names.index(name)] - best, ddof=1)
        assert table.loc[name, "dse"] == pytest.approx(want, rel=1e-5)
    assert math.isnan(table["dse"].iloc[0])


def check_weights(table, is_evidence):
    if not is_evidence:
        assert table["weight"].isna().all() and table["log_bayes_factor"].isna().all()
        return
    w = np.exp(table["lml"] - table["lml"].max())
    np.testing.assert_allclose(table["weight"], w / w.sum(), rtol=1e-9)
    np.testing.assert_allclose(table["log_bayes_factor"], table["lml"] - table["lml"].max(), atol=1e-12)


def test_train():
    s = search("train").fit(X)
    by_row = [ppca_scores(X, X, k) for k in (1, 2, 3)]
    check_results(s, [b.sum() for b in by_row])
    check_dse(s.comparison_, s.candidate_names_, by_row)
    check_weights(s.comparison_, False)
    assert (s.comparison_["mc_dse"] == 0).all() and (s.comparison_["se"] == 0).all()
    assert (s.comparison_["p_worse"].iloc[1:] == 0).all() and math.isnan(s.comparison_["p_worse"].iloc[0])
    assert s.best_params_ == {"model__n_components": 3}  # it rises for ever, which is why it cannot choose


def test_laplace():
    s = search("laplace", {"model": [PPCA(1), PPCA(2), FactorAnalysis(1), FactorAnalysis(2)]}).fit(X)
    cov = covariance(X)
    want = [laplace_proportional(cov, N, k, np.ones(T)).log_evidence for k in (1, 2)]
    want += [laplace_diagonal(cov, N, k).log_evidence for k in (1, 2)]
    np.testing.assert_allclose(s.cv_results_["lml"], want, atol=1e-5)
    check_results(s, s.cv_results_["lml"])
    # an approximation of unknown error is never given an error of zero, and its ratios are too sharp for weights
    assert s.comparison_["weight"].isna().all()
    assert s.comparison_["mc_dse"].isna().all() and s.comparison_["se"].isna().all()
    assert s.comparison_["p_worse"].isna().all()
    assert s.comparison_["diag"].str.contains("laplace").all()


def test_nothing_to_train_is_an_evidence():
    grid = {"model": [gaussian(2.5), gaussian(3.0), gaussian(3.0, 2.0)]}
    s = search("auto", grid).fit(X)
    by_row = [gaussian_scores(X, 2.5), gaussian_scores(X, 3.0), gaussian_scores(X, 3.0, 2.0)]
    assert s.evidence_ == "train" and "point-estimated" in s.evidence_reason_
    check_results(s, [b.sum() for b in by_row])
    check_dse(s.comparison_, s.candidate_names_, by_row)
    check_weights(s.comparison_, True)
    assert (s.comparison_["mc_dse"] == 0).all()


def test_keys_are_those_of_grid_search_cv():
    ours = search(HeldOut(cv=3)).fit(X).cv_results_
    theirs = GridSearchCV(BayesMPT(PPCA(1)), GRID, cv=3).fit(X).cv_results_
    assert theirs.keys() <= ours.keys()
    assert ours["params"] == theirs["params"]
    np.testing.assert_array_equal(ours["param_model__n_components"], theirs["param_model__n_components"])


# ---------------------------------------------------------------------------------------------- held out, cumulative


@pytest.mark.slow
def test_leave_one_out_against_a_loop():
    """With as many folds as rows there is one partition only."""
    n, x = 20, X[:20]
    s = search(HeldOut(cv=n)).fit(x)
    by_row = [np.concatenate([ppca_scores(np.delete(x, i, 0), x[i], k) for i in range(n)]) for k in (1, 2, 3)]
    check_results(s, [b.sum() for b in by_row], n)
    check_dse(s.comparison_, s.candidate_names_, by_row)
    check_weights(s.comparison_, False)
    assert s.n_splits_ == n


@pytest.mark.slow
def test_held_out_folds_against_a_loop(record):
    s = search(HeldOut(cv=4, n_repeats=3)).fit(X)
    assert s.n_splits_ == 12
    for i, k in enumerate((1, 2, 3)):
        scored = [c for c in record["score"] if c[0] == k and len(c[2]) == N // 4]
        assert len(scored) == 12
        repeats = []
        for repeat in range(3):
            part = scored[4 * repeat : 4 * repeat + 4]
            # a partition: every row hidden once, and fitted on exactly the others
            hidden = np.concatenate([c[2] for c in part])
            assert {r.tobytes() for r in hidden} == {r.tobytes() for r in X} and len(hidden) == N
            for _, train, test, _ in part:
                assert {r.tobytes() for r in train} == {r.tobytes() for r in X} - {r.tobytes() for r in test}
            repeats.append([ppca_scores(c[1], c[2], k) for c in part])
        splits = [b.mean() for r in repeats for b in r]
        for j, want in enumerate(splits):
            assert s.cv_results_[f"split{j}_test_score"][i] == pytest.approx(want, abs=1e-7)
        totals = [sum(b.sum() for b in r) for r in repeats]
        assert s.cv_results_["lml"][i] == pytest.approx(np.mean(totals), abs=1e-5)
        assert s.comparison_.loc[s.candidate_names_[i], "se"] == pytest.approx(
            replicate_error(totals), rel=1e-4
        )


@pytest.mark.slow
def test_the_errors_of_repeated_folds():
    """From the splits' scores alone: folds of one size, so a repeat's total is the fold size times their sum."""
    s = search(HeldOut(cv=4, n_repeats=5)).fit(X)
    splits = np.array([s.cv_results_[f"split{i}_test_score"] for i in range(20)])  # (20, 3)
    totals = splits.reshape(5, 4, 3).sum(1) * (N / 4)  # (5, 3)
    check_results(s, totals.mean(0))
    best = s.best_index_
    for i, name in enumerate(s.candidate_names_):
        row = s.comparison_.loc[name]
        assert row["se"] == pytest.approx(replicate_error(totals[:, i]), rel=1e-6)
        if i == best:
            assert math.isnan(row["p_worse"])
            continue
        mc_dse = replicate_error(totals[:, i] - totals[:, best])  # paired: the same folds
        assert row["mc_dse"] == pytest.approx(mc_dse, rel=1e-6)
        assert row["p_worse"] == pytest.approx(norm.cdf(-abs(row["lml_diff"]) / mc_dse), rel=1e-6)
        assert row["mc_dse"] < row["se"] + s.comparison_["se"].iloc[0]


def test_the_error_of_one_partition():
    """The folds' losses against fits to all rows, from fits of our own; p_worse by a t of F - 1 degrees of freedom."""
    folds = KFold(5, shuffle=True, random_state=3)
    s = search(HeldOut(cv=folds)).fit(X)
    lost = {}
    for name, params in zip(s.candidate_names_, s.cv_results_["params"], strict=True):
        full = clone(s.estimator).set_params(**params).fit(X)
        lost[name] = np.array(
            [
                full.score_samples(X[test]).sum()
                - clone(s.estimator).set_params(**params).fit(X[train]).score_samples(X[test]).sum()
                for train, test in folds.split(X)
            ]
        )
    best = s.comparison_.index[0]
    for name, row in s.comparison_.iterrows():
        assert row["se"] == pytest.approx(math.sqrt(5) * lost[name].std(ddof=1), rel=1e-5)
        if name == best:
            continue
        error = math.sqrt(5) * (lost[name] - lost[best]).std(ddof=1)
        assert row["mc_dse"] == pytest.approx(error, rel=1e-5)
        assert row["p_worse"] == pytest.approx(student_t.cdf(-abs(row["lml_diff"]) / error, 4), rel=1e-4)


@pytest.mark.slow
def test_the_error_of_one_partition_covers_other_partitions():
    """Neither too small nor absurdly large: against the spread over partitions, on three tables."""
    ratios, outside = [], []
    for table in range(3):
        rng = np.random.default_rng(table)
        rows = rng.normal(size=(80, 2)) @ rng.normal(size=(2, 6)) * 0.7 + rng.normal(size=(80, 6))
        grid = {"model__n_components": [1, 2]}
        runs = [
            MarginalLikelihoodSearch(BayesMPT(PPCA()), grid, evidence="heldout", random_state=seed).fit(rows)
            for seed in range(6)
        ]
        diff = np.array([r.cv_results_["lml"][0] - r.cv_results_["lml"][1] for r in runs])
        error = np.array([r.comparison_["mc_dse"].max() for r in runs])
        ratios.append(np.sqrt(np.mean(error**2)) / diff.std(ddof=1))
        outside.append(np.abs(diff - diff.mean()) > student_t.ppf(0.975, 4) * error)
    assert 0.7 < np.mean(ratios) < 2.2
    assert np.mean(outside) < 0.15


@pytest.mark.parametrize("cv", [KFold(4), ShuffleSplit(3, random_state=0), PredefinedSplit(np.arange(N) % 3)])
def test_a_partition_that_is_not_drawn_has_no_error(cv):
    s = search(HeldOut(cv=cv)).fit(X)
    assert s.comparison_["mc_dse"].iloc[1:].isna().all() and s.comparison_["se"].isna().all()


def test_all_candidates_see_the_same_folds(record):
    search(HeldOut(cv=5)).fit(X)
    tests = {k: [c[2].tobytes() for c in record["score"] if c[0] == k and len(c[2]) < N] for k in (1, 2, 3)}
    assert tests[1] == tests[2] == tests[3] and len(set(tests[1])) == 5


@pytest.mark.parametrize("share, cv", [(0.5, 5), (0.2, 12)])
def test_cumulative_against_a_loop(share, cv, record):
    """log p(rest | visible share): each block of rows predicted from all rows before it."""
    s = search(Cumulative(n_blocks=cv, visible_share=share)).fit(X)
    first = round(share * N)
    rows_in_x = {r.tobytes(): i for i, r in enumerate(X)}
    for i, k in enumerate((1, 2, 3)):
        blocks = [c for c in record["score"] if c[0] == k and len(c[1]) < N]
        assert len(blocks) == cv
        total, seen = 0.0, None
        for _, train, test, _ in blocks:
            train_rows = {rows_in_x[r.tobytes()] for r in train}
            test_rows = {rows_in_x[r.tobytes()] for r in test}
            assert train_rows.isdisjoint(test_rows)
            assert len(train_rows) == first if seen is None else train_rows == seen
            seen = train_rows | test_rows
            total += ppca_scores(train, test, k).sum()
        assert seen == set(range(N))
        assert s.cv_results_["lml"][i] == pytest.approx(total, abs=1e-5)
    check_results(s, s.cv_results_["lml"], n_rows=N - first)
    check_weights(s.comparison_, True)


@pytest.mark.slow
def test_cumulative_of_a_program_with_nothing_to_train(record):
    """Then log p(rest | share) is the rest's own LML, whatever the blocks."""
    s = MarginalLikelihoodSearch(
        BayesMPT(gaussian(3.0)),
        {"training": [Ascent(tol=1e-10)]},
        evidence=Cumulative(n_blocks=3, n_repeats=80),
        random_state=0,
    )
    by_row = gaussian_scores(X, 3.0)
    record["score"].clear()
    lml = MarginalLikelihoodSearch.fit
    with pytest.MonkeyPatch.context() as m:  # n_components is not an attribute of a plain program
        m.setattr(BayesMPT, "score_samples", lambda self, X, y=None: gaussian_scores(np.asarray(X), 3.0))
        lml(s, X)
    sd = math.sqrt(N / 2 * by_row.var(ddof=1) / 2)  # half the rows, drawn without replacement
    assert abs(s.cv_results_["lml"][0] - by_row.sum() / 2) < 3.5 * sd / math.sqrt(80)
    assert s.comparison_["se"].iloc[0] == pytest.approx(sd / math.sqrt(80), rel=0.3)


# ---------------------------------------------------------------------------------------------------- auto


def loc_only(x):
    loc = pyro.param("loc", lambda: x.mean(0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def own_noise(x):
    noise = pyro.param("noise", lambda: x.new_ones(T), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(3.0, noise).to_event(1), obs=x)


def shared_level(x):
    level = pyro.sample("level", dist.Normal(x.new_zeros(()), 5.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(level, x.new_ones(x.shape[1])).to_event(1), obs=x)


@pytest.mark.slow
def test_auto_takes_the_rule_that_fits_and_says_why():
    holes = with_holes(X, 0.05)
    cases = [
        ({"model": [PPCA(1), FactorAnalysis(1)]}, X, "integrated", "rotation"),
        ({"model": [PPCA(1), PPCA(2)]}, holes, "integrated", "rotation"),
        ({"model": [PPCA(1), loc_only]}, X, "heldout", "point estimates"),
        ({"model": [gaussian(1.0), gaussian(2.0)]}, X, "train", "point-estimated"),
        ({"model": [shared_level]}, X, "train", "evidence itself|point-estimated"),
    ]
    for grid, x, rule, why in cases:
        s = search(Auto(cv=3), grid).fit(x)
        assert s.evidence_ == rule, grid
        assert pd.Series([s.evidence_reason_]).str.contains(why).all()


def test_one_vector_has_one_score():
    s = search("auto", {"model": [shared_level]}).fit(X[:5])
    want = multivariate_normal(np.zeros(5 * T), 25 * np.ones((5 * T, 5 * T)) + np.eye(5 * T)).logpdf(
        X[:5].ravel()
    )
    assert s.cv_results_["lml"][0] == pytest.approx(want, abs=1e-8)
    assert s.comparison_["dse"].isna().all()


def test_missing_cells_held_out():
    holes = with_holes(X, 0.1)
    s = search(HeldOut(cv=3), {"model": [gaussian(3.0), gaussian(2.0)]}).fit(holes)
    want = []
    for mean in (3.0, 2.0):
        total = 0.0
        for row in holes:
            r = row[~np.isnan(row)]
            if len(r):
                total += (
                    gaussian_scores(r[None], mean) if len(r) > 1 else norm(mean, math.sqrt(2)).logpdf(r[0])
                )
        want.append(float(total))
    np.testing.assert_allclose(s.cv_results_["lml"], want, atol=1e-8)


# ------------------------------------------------------------------------------------------------- comparability


def test_scaling_inside_the_grid_is_refused():
    pipe = Pipeline([("scale", StandardScaler()), ("mpt", BayesMPT(PPCA(1)))])
    grid = {"scale": [StandardScaler(), "passthrough"], "mpt__model__n_components": [1, 2]}
    with pytest.raises(ValueError, match=r"(?s)not comparable.*(passthrough|StandardScaler).*scaling"):
        MarginalLikelihoodSearch(pipe, grid).fit(X)


@pytest.mark.parametrize("evidence", ["laplace", "train", "heldout", "cumulative"])
def test_refused_by_every_rule(evidence):
    pipe = Pipeline([("scale", StandardScaler()), ("mpt", BayesMPT(PPCA(1)))])
    with pytest.raises(ValueError, match="not comparable"):
        MarginalLikelihoodSearch(
            pipe, {"scale": [StandardScaler(), StandardScaler(with_mean=False)]}, evidence=evidence
        ).fit(X)


def test_one_scaling_for_all_is_fine():
    pipe = make_pipeline(StandardScaler(), BayesMPT(PPCA(1)))
    s = MarginalLikelihoodSearch(pipe, {"bayesmpt__model__n_components": [1, 2]}, evidence="train").fit(X)
    z = (X - X.mean(0)) / X.std(0)
    check_results(s, [ppca_scores(z, z, k).sum() for k in (1, 2)])
    np.testing.assert_allclose(s.best_estimator_.score_samples(X), ppca_scores(z, z, 2), atol=1e-7)


@pytest.mark.slow
def test_a_pipeline_held_out_scores_one_table():
    """The scaler is fitted once, on all rows, so that every split's density is of the same numbers."""
    pipe = make_pipeline(StandardScaler(), BayesMPT(PPCA(1)))
    n, x = 20, X[:20]
    grid = {"bayesmpt__model__n_components": [1, 2]}
    s = MarginalLikelihoodSearch(pipe, grid, evidence=HeldOut(cv=n)).fit(x)
    z = (x - x.mean(0)) / x.std(0)
    want = [sum(ppca_scores(np.delete(z, i, 0), z[i], k)[0] for i in range(n)) for k in (1, 2)]
    check_results(s, want, n)


class Halved(TransformerMixin, BaseEstimator):
    """Learns nothing, so that nothing tells whether it is fitted."""

    def fit(self, X, y=None):
        return self

    def transform(self, X):
        return np.asarray(X) / 2


@pytest.mark.slow
@pytest.mark.parametrize("evidence", ["laplace", HeldOut(2)])
@pytest.mark.parametrize("step", [Halved(), FunctionTransformer(lambda x: x / 2), "passthrough", None])
def test_a_step_that_learns_nothing(step, evidence):
    pipe = Pipeline([("scale", StandardScaler()), ("half", step), ("mpt", BayesMPT(PPCA(1), random_state=0))])
    grid = {"mpt__model__n_components": [1, 2]}
    s = MarginalLikelihoodSearch(pipe, grid, evidence=evidence, random_state=0).fit(X)
    z = (X - X.mean(0)) / X.std(0) / (1 if step in ("passthrough", None) else 2)
    plain = search(evidence, {"model__n_components": [1, 2]}).fit(z)
    np.testing.assert_allclose(numbers(s.comparison_), numbers(plain.comparison_), rtol=1e-9)
    np.testing.assert_allclose(s.score_samples(X), plain.score_samples(z), rtol=1e-9)
    table = compare({"one": s.best_estimator_}, X, evidence="train")
    assert table["lml"].iloc[0] == pytest.approx(s.score_samples(X).sum())


def test_other_features_are_refused():
    def pick(columns):
        return ColumnTransformer([("pick", "passthrough", columns)])

    pipe = Pipeline([("pick", pick([0, 1, 2])), ("mpt", BayesMPT(PPCA(1)))])
    with pytest.raises(ValueError, match=r"(?s)not comparable.*features"):
        MarginalLikelihoodSearch(pipe, {"pick": [pick([0, 1, 2]), pick([0, 1, 2, 3])]}).fit(X)
    with pytest.raises(ValueError, match=r"(?s)not comparable.*features"):  # as many, but others
        MarginalLikelihoodSearch(pipe, {"pick": [pick([0, 1, 2]), pick([1, 2, 3])]}).fit(X)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning", "ignore:the importance weights")
def test_single_and_double_precision_are_compared():
    network = {"model": [VAE(1, likelihood="gaussian", hidden=(4,))], "training": [Epochs(max_epochs=3)]}
    kept = MarginalLikelihoodSearch(
        BayesMPT(random_state=0), [{"model": [PPCA(1)]}, network], evidence=HeldOut(cv=2)
    )
    assert np.isfinite(kept.fit(X).cv_results_["lml"]).all()


def test_another_observed_value_is_refused():
    def doubled(x):
        loc = pyro.param("loc", lambda: x.mean(0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=2 * x)

    with pytest.raises(ValueError, match=r"(?s)not comparable.*doubled"):
        search("heldout", {"model": [loc_only, own_noise, doubled]}).fit(X)


@pytest.mark.slow
def test_probabilities_against_densities_are_refused():
    """A density is as large as the data are coarse, a probability at most one."""
    codes = (X > 3).astype("float32")
    networks = [
        MaskedPatches((2, 3), patch=1, width=8, likelihood="bernoulli"),
        MaskedPatches((2, 3), patch=1, width=8, likelihood="categorical"),
        MaskedTransformer(8, 1, 2),
    ]
    settings = {"training": Epochs(max_epochs=1, validation_fraction=0.0), "random_state": 0}
    s = MarginalLikelihoodSearch(BayesMPT(**settings), {"model": networks}, evidence=Auto(cv=2)).fit(codes)
    assert s.comparison_["lml"].notna().all()
    normal = MaskedPatches((2, 3), patch=1, width=8, likelihood="gaussian")
    for other in ({"model": [normal]}, {"model": [PPCA(1)], "training": [None]}):
        with pytest.raises(ValueError, match=r"(?s)not comparable.*densities"):
            MarginalLikelihoodSearch(
                BayesMPT(**settings), [{"model": networks[:1]}, other], evidence=Auto(cv=2)
            ).fit(codes)


@pytest.mark.slow
def test_integrated_against_point_estimated_is_refused():
    """The maximised LML of one and the evidence of the other are different things."""
    with pytest.raises(ValueError, match="not comparable"):
        search("train", {"model": [PPCA(1), PPCA(2), gaussian(3.0)]}).fit(X)
    with pytest.raises(ValueError, match="not comparable"):  # rows are tokens of one vector in one of them
        search("auto", {"model": [PPCA(1), PPCA(2), shared_level]}).fit(X)
    # held-out rows can be compared: both predict
    n, x = 20, X[:20]
    s = search(HeldOut(cv=n), {"model": [PPCA(1), gaussian(3.0)]}).fit(x)
    want = [sum(ppca_scores(np.delete(x, i, 0), x[i], 1)[0] for i in range(n)), gaussian_scores(x, 3.0).sum()]
    check_results(s, want, n)


def half_integrated(x):
    """A latent of all rows, with a trained spread."""
    spread = pyro.param("spread", lambda: x.new_ones(()), constraint=constraints.positive)
    level = pyro.sample("level", dist.Normal(x.new_zeros(()), spread))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(level, x.new_ones(x.shape[1])).to_event(1), obs=x)


def test_a_hyper_parameter_integrated_in_one_and_maximised_in_the_other_is_refused():
    with pytest.raises(ValueError, match="not comparable"):
        search("train", {"model": [half_integrated, shared_level]}).fit(X[:10])


# ------------------------------------------------------------------------------------------------- failures, refit


def broken(x):
    raise RuntimeError("broken on purpose")


def test_error_score():
    grid = {"model": [PPCA(1), broken, PPCA(2)]}
    s = search("train", grid).fit(X)
    np.testing.assert_allclose(
        s.cv_results_["lml"], [ppca_scores(X, X, 1).sum(), np.nan, ppca_scores(X, X, 2).sum()], atol=1e-6
    )
    assert s.best_index_ == 2 and s.cv_results_["rank_test_score"][1] == 3
    assert "broken on purpose" in s.comparison_["diag"].iloc[-1]
    assert s.comparison_["lml"].isna().tolist() == [False, False, True]
    with pytest.raises(RuntimeError, match="on purpose"):
        search("train", grid, error_score="raise").fit(X)
    number = search("train", grid, error_score=-1000.0).fit(X)
    assert number.cv_results_["mean_test_score"][1] == -1000.0
    with pytest.raises(ValueError, match=r"(?s)all 2 candidates.*on purpose"):
        search("train", {"model": [broken, broken]}).fit(X)


def repeated(what, holes=False):
    """(N, 5) with a column that says nothing new, in a table with names."""
    x = RNG.normal(size=(N, 2)) @ RNG.normal(size=(2, 5)) + 0.5 * RNG.normal(size=(N, 5))
    x[:, 3] = {"constant": 2.5, "duplicated": x[:, 1], "sum": x[:, :3].sum(1)}[what]
    x[RNG.random(x.shape) < 0.1 * holes] = np.nan
    return pd.DataFrame(x, columns=list("abcde"))


NO_BOUND = [PPCA(5), MixtureOfFactorAnalyzers(2), GaussianMixture(2)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize(
    "what, named, models",
    [
        ("constant", "'d'", [*NO_BOUND, FactorAnalysis(1), GaussianMixture(2, "diag")]),
        ("duplicated", "'b'|'d'", [*NO_BOUND, FactorAnalysis(1)]),
        ("sum", "'[abcd]'", [PPCA(4), PPCA(5), GaussianMixture(2)]),
    ],
)
def test_a_likelihood_without_bound_is_an_error_that_names_columns(what, named, models):
    """A density can be as narrow as it likes where the rows have no spread: any number of nats would come first."""
    x = repeated(what)
    grid = {"model": [PPCA(1), *models]}
    s = MarginalLikelihoodSearch(
        BayesMPT(training=Ascent(max_iter=100), random_state=0), grid, evidence="train"
    ).fit(x)
    failed = s.comparison_.iloc[1:]
    assert s.best_index_ == 0 and failed["lml"].isna().all() and len(failed) == len(models)
    assert failed["diag"].str.contains(named).all() and not failed["diag"].str.contains("'e'").any()
    assert failed["diag"].str.contains("repeat|duplicated|without").all()
    assert s.cv_results_["lml"][0] == pytest.approx(ppca_scores(x.to_numpy(), x.to_numpy(), 1).sum())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_constant_column_with_missing_cells_too():
    x = repeated("constant", holes=True)
    grid = {"model": [PPCA(1), PPCA(5), FactorAnalysis(1), GaussianMixture(2, "diag")]}
    s = MarginalLikelihoodSearch(
        BayesMPT(training=Ascent(max_iter=60), random_state=0), grid, evidence="train"
    ).fit(x)
    assert s.best_index_ == 0 and s.comparison_["diag"].iloc[1:].str.contains("'d'").all()
    try:  # without bound: whether rounding lets sixty iterations come to the floor decides
        five = BayesMPT(PPCA(5), training=Ascent(max_iter=60), random_state=0).fit(x)
    except ValueError as error:
        assert "'d'" in str(error) and "no maximum" in str(error)
    else:
        fits = {"one": BayesMPT(PPCA(1)).fit(x), "five": five}
        assert "'d'" in compare(fits, x, evidence="train").loc["five", "diag"]


@pytest.mark.parametrize(
    ("estimator", "call"),
    [
        (BayesMPT(GaussianMixture(2)), lambda s: s.bic(X)),
        (BayesMPT(GaussianProcess()), lambda s: s.predict(X)),
        (BayesMPT(PPCA(1)), lambda s: s.transform(X)),
        (BayesMPT(PPCA(1)), lambda s: s.score(X)),
    ],
)
def test_a_search_that_is_not_fitted_says_so(estimator, call):
    with pytest.raises(NotFittedError):
        call(MarginalLikelihoodSearch(estimator, {"n_init": [1, 2]}))


def test_a_narrow_density_that_has_a_bound_is_no_error():
    """Columns that repeat others are reproduced with a shared noise, and few rows leave most directions flat."""
    loud = RNG.normal(size=(N, 1)) @ RNG.normal(size=(1, T)) * 1e3 + RNG.normal(size=(N, T))
    for x in (repeated("sum"), RNG.normal(size=(8, 20)), loud, 1e6 + X):
        table = search("train", {"model": [PPCA(0), PPCA(1), PPCA(2)]}).fit(x).comparison_
        assert table["lml"].notna().all()


def test_a_failed_candidate_beside_weights():
    s = search("integrated", {"model": [PPCA(1), PPCA(T), PPCA(2)]}).fit(X)
    w = s.comparison_["weight"]
    assert w.iloc[:2].sum() == pytest.approx(1.0) and not w.iloc[2] > 0


def test_a_candidate_that_fails_in_its_folds_only():
    """Too few rows in a fold: the search goes on, and says so."""

    def needs_all(x):
        if len(x) == N - N // 3:
            raise RuntimeError("too few rows")
        loc_only(x)

    s = search(HeldOut(cv=3), {"model": [loc_only, needs_all]}).fit(X)
    assert s.best_index_ == 0 and "too few rows" in s.comparison_["diag"].iloc[1]
    assert math.isnan(s.cv_results_["mean_test_score"][1])
    assert np.isnan(s.cv_results_["split0_test_score"][1]) and np.isfinite(
        s.cv_results_["split0_test_score"][0]
    )


def test_refit():
    smallest = search("laplace", refit=lambda results: int(np.argmin(results["lml"]))).fit(X)
    assert (
        smallest.best_index_
        == int(np.argmin(smallest.cv_results_["lml"]))
        != int(np.argmax(smallest.cv_results_["lml"]))
    )
    k = (1, 2, 3)[smallest.best_index_]
    np.testing.assert_allclose(smallest.score_samples(X), ppca_scores(X, X, k), atol=1e-7)
    assert smallest.best_score_ == pytest.approx(min(smallest.cv_results_["mean_test_score"]))
    off = search("laplace", refit=False).fit(X)
    assert not hasattr(off, "best_estimator_") and off.best_params_ is not None
    with pytest.raises(AttributeError, match="refit"):
        off.score_samples(X)


def test_the_best_predicts_with_its_errors():
    x = np.linspace(0, 3, 12)[:, None]
    y = np.sin(3 * x[:, 0]) + 0.1 * RNG.normal(size=12)
    new = np.array([[0.4], [1.3], [4.0]])
    s = MarginalLikelihoodSearch(
        BayesMPT(GaussianProcess(), penalty=True), {"training": [Ascent(tol=1e-8)]}, evidence="train"
    )
    best = s.fit(x, y).best_estimator_
    mean, cov = s.predict(new, return_cov=True)
    np.testing.assert_array_equal(s.predict(new), mean)
    np.testing.assert_array_equal(cov, best.predict(new, return_cov=True)[1])
    np.testing.assert_allclose(s.predict(new, return_std=True)[1], np.sqrt(np.diag(cov)), rtol=1e-9)
    pipe = make_pipeline(StandardScaler(), BayesMPT(GaussianProcess(), penalty=True))
    piped = MarginalLikelihoodSearch(pipe, {"bayesmpt__training": [Ascent(tol=1e-8)]}, evidence="train").fit(
        x, y
    )
    z = (new - x.mean()) / x.std()
    want = piped.best_estimator_[-1].predict(z, return_std=True)[1]
    np.testing.assert_allclose(piped.predict(new, return_std=True)[1], want, rtol=1e-9)


def test_the_best_is_fitted_on_all_rows():
    s = search(HeldOut(cv=3)).fit(X)
    k = s.best_params_["model__n_components"]
    np.testing.assert_allclose(s.score_samples(X), ppca_scores(X, X, k), atol=1e-7)
    assert s.score(X) == pytest.approx(ppca_scores(X, X, k).mean(), abs=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("in_pipeline", [False, True])
def test_the_same_call_gives_the_same_ranking(in_pipeline):
    """Starts of the k-means differ from fit to fit, unless a seed comes from somewhere."""
    x = np.random.default_rng(3).normal(size=(40, 4))

    def found(estimator, random_state):
        prefix = "mpt__" if in_pipeline else ""
        if in_pipeline:
            steps = [("normal", QuantileTransformer(n_quantiles=9, subsample=20)), ("mpt", estimator)]
            estimator = Pipeline(steps)
        grid = {f"{prefix}model__n_components": [3, 5]}
        s = MarginalLikelihoodSearch(estimator, grid, evidence=Auto(cv=2), random_state=random_state).fit(x)
        states = {k: v for k, v in estimator.get_params().items() if k.endswith("random_state")}
        assert states.pop(f"{prefix}random_state") == own  # ours is not touched
        assert all(v is None for v in states.values())
        return s

    own = None
    mixture = BayesMPT(GaussianMixture(covariance_type="diag"))
    one, two = (found(mixture, 5) for _ in range(2))
    pd.testing.assert_frame_equal(one.comparison_, two.comparison_)
    assert (numbers(found(mixture, 6).comparison_) != numbers(one.comparison_)).any()
    model = one.best_estimator_[-1] if in_pipeline else one.best_estimator_
    assert model.random_state == 5
    if in_pipeline:
        assert one.best_estimator_[0].random_state == 5
    else:
        seeded = (
            found(clone(mixture), np.random.RandomState(5)),
            found(clone(mixture), np.random.RandomState(5)),
        )
        pd.testing.assert_frame_equal(*(s.comparison_ for s in seeded))
        own = 11
        mixture.set_params(random_state=11)
        assert found(mixture, 5).best_estimator_.random_state == 11


# ------------------------------------------------------------------------------------------------- jobs, restarts


@pytest.mark.slow
@pytest.mark.parametrize("evidence", ["laplace", HeldOut(3, n_repeats=2)])
def test_two_jobs_give_what_one_gives(evidence):
    one, two = (search(evidence, n_jobs=j).fit(X) for j in (1, 2))
    pd.testing.assert_frame_equal(one.comparison_, two.comparison_, rtol=1e-12)
    np.testing.assert_array_equal(one.transform(X), two.transform(X))


@pytest.mark.slow
def test_two_jobs_of_a_local_program():
    """A closure pickles with cloudpickle only."""
    grid = {"model": [gaussian(2.0), gaussian(3.0)]}
    one, two = (search("train", grid, n_jobs=j).fit(X) for j in (1, 2))
    pd.testing.assert_frame_equal(one.comparison_, two.comparison_)


class Crash(BaseException):
    """The machine goes down: nothing may catch it."""


@pytest.fixture
def fits(monkeypatch):
    """Counts fits; goes down in the one of number ``crash_at``."""

    class Counter:
        n, crash_at, error = 0, None, Crash

    fit = BayesMPT.fit

    def counted(self, X, y=None):
        Counter.n += 1
        if Counter.n == Counter.crash_at:
            raise Counter.error("power cut")
        return fit(self, X, y)

    monkeypatch.setattr(BayesMPT, "fit", counted)
    return Counter


@pytest.mark.parametrize("error", [Crash, KeyboardInterrupt])
def test_a_search_takes_up_after_a_crash(tmp_path, fits, error):
    grid = {"model__n_components": [0, 1, 2, 3, 4]}
    want = search("laplace", grid).fit(X).comparison_
    assert fits.n == 5
    fits.n, fits.crash_at, fits.error = 0, 3, error
    with pytest.raises(error):
        search("laplace", grid, checkpoint_dir=tmp_path).fit(X)
    fits.n, fits.crash_at = 0, None
    resumed = search("laplace", grid, checkpoint_dir=tmp_path).fit(X)
    assert fits.n == 3  # the third on; the two that were done are read
    pd.testing.assert_frame_equal(resumed.comparison_, want)
    fits.n = 0
    again = search("laplace", grid, checkpoint_dir=str(tmp_path)).fit(X)
    assert fits.n == 0
    pd.testing.assert_frame_equal(again.comparison_, want)
    np.testing.assert_allclose(
        again.score_samples(X), ppca_scores(X, X, again.best_params_["model__n_components"])
    )


def test_a_crash_in_the_folds_loses_one_candidate(tmp_path, fits):
    want = search(HeldOut(cv=4)).fit(X).comparison_
    assert fits.n == 3 + 12
    fits.n, fits.crash_at = 0, 3 + 4 + 2  # the second fold of the second candidate
    with pytest.raises(Crash):
        search(HeldOut(cv=4), checkpoint_dir=tmp_path).fit(X)
    fits.n, fits.crash_at = 0, None
    resumed = search(HeldOut(cv=4), checkpoint_dir=tmp_path).fit(X)
    assert fits.n == 8
    pd.testing.assert_frame_equal(resumed.comparison_, want)


@pytest.mark.slow
def test_a_checkpoint_is_of_its_data_and_settings(tmp_path, fits):
    search(HeldOut(cv=3), checkpoint_dir=tmp_path).fit(X)

    def n_fits(x=X, evidence=None):
        fits.n = 0
        s = search(evidence or HeldOut(3), checkpoint_dir=tmp_path).fit(x)
        return fits.n, s

    assert n_fits()[0] == 0
    other = X.copy()
    other[7, 3] += 1e-6
    assert n_fits(other)[0] == 3 + 9
    assert n_fits(X[::-1].copy())[0] == 3 + 9
    count, s = n_fits(evidence=HeldOut(4))
    assert count >= 12
    pd.testing.assert_frame_equal(s.comparison_, search(HeldOut(cv=4)).fit(X).comparison_)
    count, s = n_fits(X, "train")
    np.testing.assert_allclose(
        s.cv_results_["lml"], [ppca_scores(X, X, k).sum() for k in (1, 2, 3)], atol=1e-6
    )
    grid = {"model": [FactorAnalysis(1), FactorAnalysis(2), FactorAnalysis(3)]}
    fits.n = 0
    fa = search("laplace", grid, checkpoint_dir=tmp_path).fit(X)
    assert fits.n == 3
    np.testing.assert_allclose(
        fa.cv_results_["lml"],
        [laplace_diagonal(covariance(X), N, k).log_evidence for k in (1, 2, 3)],
        atol=1e-5,
    )


@pytest.mark.parametrize("make", [gaussian, lambda m: gaussian(m, 2.0)])
def test_a_checkpoint_tells_programs_apart(tmp_path, make):
    """Two closures of one name that differ in what they hold: a stale score would be a wrong number."""
    for mean in (3.0, 2.0):
        s = search("train", {"model": [make(mean)]}, checkpoint_dir=tmp_path).fit(X)
        sd = 1.0 if make is gaussian else 2.0
        assert s.cv_results_["lml"][0] == pytest.approx(gaussian_scores(X, mean, sd).sum(), abs=1e-7)


def test_refuses_the_checkpoint_of_a_training(tmp_path):
    """All candidates and folds would be what the first of them left there."""
    estimator = BayesMPT(PPCA(1), training=Epochs(checkpoint=tmp_path / "training.pt"), random_state=0)
    with pytest.raises(ValueError, match="checkpoint_dir"):
        MarginalLikelihoodSearch(estimator, GRID).fit(X)


def test_a_torn_checkpoint_is_written_again(tmp_path, fits):
    want = search("laplace", checkpoint_dir=tmp_path).fit(X).comparison_
    for file in tmp_path.iterdir():
        if file.is_file():
            file.write_bytes(file.read_bytes()[:50])
    fits.n = 0
    with pytest.warns(UserWarning, match="set aside"):
        got = search("laplace", checkpoint_dir=tmp_path).fit(X)
    assert fits.n == 3
    pd.testing.assert_frame_equal(got.comparison_, want)


def test_a_failed_candidate_is_tried_again(tmp_path, fits):
    fits.crash_at, fits.error = 2, RuntimeError
    first = search("train", checkpoint_dir=tmp_path).fit(X)
    assert np.isnan(first.cv_results_["lml"][1])
    fits.n, fits.crash_at = 0, None
    second = search("train", checkpoint_dir=tmp_path).fit(X)
    assert fits.n == 1
    np.testing.assert_allclose(
        second.cv_results_["lml"], [ppca_scores(X, X, k).sum() for k in (1, 2, 3)], atol=1e-6
    )


# ------------------------------------------------------------------------------------------------------- compare


@pytest.fixture(scope="module")
def fitted():
    return {k: BayesMPT(PPCA(k), random_state=0).fit(X) for k in (1, 2, 3)}


def test_compare_on_the_training_rows(fitted):
    by_row = {f"k{k}": ppca_scores(X, X, k) for k in fitted}
    table = compare({f"k{k}": m for k, m in fitted.items()}, X, evidence="train")
    assert list(table.columns) == COLUMNS and list(table.index) == ["k3", "k2", "k1"]
    np.testing.assert_allclose(table["lml"], [by_row[n].sum() for n in table.index], atol=1e-6)
    check_dse(table, list(by_row), list(by_row.values()))
    check_weights(table, False)
    found = search("train").fit(X).comparison_
    np.testing.assert_allclose(
        table.drop(columns="diag").to_numpy(float), found.drop(columns="diag").to_numpy(float), atol=1e-8
    )


def test_compare_by_laplace_is_the_search(fitted):
    table = compare({f"k{k}": m for k, m in fitted.items()}, X, evidence="laplace")
    found = search("laplace").fit(X).comparison_
    np.testing.assert_allclose(
        table.drop(columns="diag").to_numpy(float), found.drop(columns="diag").to_numpy(float), atol=1e-8
    )


def test_compare_on_new_rows(fitted):
    new = np.random.default_rng(5).normal(size=(40, T)) + 3
    by_row = {f"k{k}": ppca_scores(X, new, k) for k in fitted}
    table = compare({f"k{k}": m for k, m in fitted.items()}, new, evidence="heldout")
    for name in by_row:
        assert table.loc[name, "lml"] == pytest.approx(by_row[name].sum(), abs=1e-5)
    check_dse(table, list(by_row), list(by_row.values()))
    assert (table["mc_dse"] == 0).all()


def numbers(table):
    return table.drop(columns="diag").to_numpy(float)


CLUSTERS = np.concatenate([RNG.normal(size=(30, 3)), RNG.normal(size=(30, 3)) + 4])


@pytest.mark.slow
def test_compare_does_what_the_search_does_where_parameters_are_point_estimated():
    """Two clusters: by the maximised likelihood three would come first."""
    grid = {"model__n_components": [1, 2, 3]}
    fits = {
        f"n_components={k}": BayesMPT(GaussianMixture(k, "diag"), random_state=7).fit(CLUSTERS)
        for k in (1, 2, 3)
    }
    before = {name: (m.log_marginal_likelihood_, m.score_samples(CLUSTERS)) for name, m in fits.items()}
    best_by_train = max(fits, key=lambda name: fits[name].log_marginal_likelihood_)
    table = compare(fits, CLUSTERS, evidence=Auto(cv=3, n_repeats=2), random_state=3)
    s = MarginalLikelihoodSearch(
        BayesMPT(GaussianMixture(2, "diag"), random_state=7),
        grid,
        evidence=Auto(cv=3, n_repeats=2),
        random_state=3,
    ).fit(CLUSTERS)
    assert table.index[0] == "n_components=2" != best_by_train == "n_components=3"
    assert list(table.index) == list(s.comparison_.index)
    np.testing.assert_allclose(numbers(table), numbers(s.comparison_), rtol=1e-9)
    assert (table["diag"] == "heldout").all() and table["weight"].isna().all()
    assert (table["mc_dse"].iloc[1:] > 0).all()  # never an error of zero
    assert table.attrs["evidence"] == "heldout" and table.attrs["reason"] == s.evidence_reason_
    for name, model in fits.items():  # left as they were
        assert model.log_marginal_likelihood_ == before[name][0]
        np.testing.assert_array_equal(model.score_samples(CLUSTERS), before[name][1])
    train = compare(fits, CLUSTERS, evidence="train")
    assert train.index[0] == "n_components=3" and (train["diag"] == "train").all()


@pytest.mark.slow
def test_compare_takes_what_is_comparable_of_mixed_families():
    fits = {m: BayesMPT(p, random_state=0).fit(X) for m, p in (("ppca", PPCA(1)), ("loc", loc_only))}
    assert (compare(fits, X, evidence=Auto(cv=3), random_state=0)["diag"] == "heldout").all()
    table = compare({"ppca": fits["ppca"], "fa": BayesMPT(FactorAnalysis(1)).fit(X)}, X)
    assert table.attrs["evidence"] == "integrated" and table["weight"].tolist() == [1, 1]  # one of each kind
    # asked for on the rows of the fits, folds hold rows out, and leave-one-out has one partition only
    x = X[:12]
    loo = compare({k: BayesMPT(PPCA(k)).fit(x) for k in (1, 2)}, x, evidence=HeldOut(cv=len(x)))
    for k in (1, 2):
        want = sum(ppca_scores(np.delete(x, i, 0), x[i], k)[0] for i in range(len(x)))
        assert loo.loc[k, "lml"] == pytest.approx(want, abs=1e-5)


def test_compare_says_where_everything_is_integrated():
    fits = {m: BayesMPT(gaussian(m)).fit(X) for m in (2.5, 3.0)}
    for rows in (X, X[:20]):  # an evidence of any rows: none has taught them anything
        for asked in ("auto", "train"):
            table = compare(fits, rows, evidence=asked)
            assert (table["diag"] == "integrated").all() and (table["mc_dse"] == 0).all()
            check_weights(table, True)
            for m in fits:
                assert table.loc[m, "lml"] == pytest.approx(gaussian_scores(rows, m).sum(), abs=1e-8)
    s = search("auto", {"model": [gaussian(2.5), gaussian(3.0)]}).fit(X)
    assert (s.comparison_["diag"] == "integrated").all()


def test_compare_refuses_the_maximised_likelihood_of_one_vector_unless_asked():
    fits = {"half": BayesMPT(half_integrated).fit(X[:10]), "again": BayesMPT(half_integrated).fit(X[:10])}
    with pytest.raises(ValueError, match="evidence='train'"):
        compare(fits, X[:10])
    assert (compare(fits, X[:10], evidence="train")["diag"] == "train").all()


def test_compare_gives_a_model_that_fails_in_its_folds_its_error():
    calls = []

    def fails_again(x):
        if calls and len(x) == N - N // 3:
            raise RuntimeError("too few rows")
        loc_only(x)

    fits = {"loc": BayesMPT(loc_only).fit(X), "fails": BayesMPT(fails_again).fit(X)}
    calls.append(1)
    table = compare(fits, X, evidence=Auto(cv=3))
    assert table.index[0] == "loc" and "too few rows" in table.loc["fails", "diag"]
    assert math.isnan(table.loc["fails", "lml"])
    with pytest.raises(ValueError, match="too few rows"):
        compare({"fails": fits["fails"]}, X, evidence=Auto(cv=3))


def test_compare_refuses_what_is_not_comparable(fitted):
    other_rows = BayesMPT(PPCA(1)).fit(X[:50])
    scaled = make_pipeline(StandardScaler(), BayesMPT(PPCA(1))).fit(X)
    narrow = BayesMPT(PPCA(1)).fit(X[:, :4])
    fixed = BayesMPT(gaussian(3.0)).fit(X)
    good = {"a": fitted[1], "b": fitted[2]}
    for name, offender in {"rows": other_rows, "scaled": scaled, "narrow": narrow, "fixed": fixed}.items():
        with pytest.raises(ValueError, match=rf"'{name}'"):
            compare({**good, name: offender}, X, evidence="train")
    with pytest.raises(ValueError, match="fitted on"):
        compare(good, X[:30], evidence="train")
    with pytest.raises(TypeError, match="by name"):
        compare(list(good.values()), X)
    with pytest.raises(Exception, match="not fitted"):
        compare({**good, "raw": BayesMPT(PPCA(1))}, X)


# ----------------------------------------------------------------------------------------------- real data, masks


@pytest.mark.slow
def test_the_kind_and_the_dimension_of_wine_by_held_out_likelihood():
    """The order of candidates by our held-out rule is that of a plain loop over sklearn's folds."""
    x = load_wine().data
    x = x / x.std(0)
    s = MarginalLikelihoodSearch(
        BayesMPT(PPCA(1)),
        {"model__n_components": [1, 3, 5]},
        evidence=HeldOut(cv=10, n_repeats=3),
        random_state=1,
    ).fit(x)
    loop = []
    for k in (1, 3, 5):
        totals = [
            sum(ppca_scores(x[a], x[b], k).sum() for a, b in KFold(10, shuffle=True, random_state=r).split(x))
            for r in range(8)
        ]
        loop.append((np.mean(totals), np.std(totals, ddof=1)))
    for (mean, sd), got in zip(loop, s.cv_results_["lml"], strict=True):
        assert abs(got - mean) < 4 * sd * math.sqrt(1 / 3 + 1 / 8)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_candidates_trained_on_masks():
    s = MarginalLikelihoodSearch(
        BayesMPT(PPCA(1), masks=UniformSize(12), random_state=0, training=Steps(max_iter=250)),
        {"model__n_components": [1, 2]},
        evidence="train",
    ).fit(X)
    want = np.array([ppca_scores(X, X, k).sum() for k in (1, 2)])
    assert (s.cv_results_["lml"] <= want + 1e-6).all()
    assert (s.cv_results_["lml"] > want - 0.05 * N).all()


def test_torch_threads_are_left_alone():
    before = torch.get_num_threads()
    search(HeldOut(cv=3)).fit(X)
    assert torch.get_num_threads() == before
