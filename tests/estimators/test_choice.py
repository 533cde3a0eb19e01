"""The choice among factor models: by what their fits are expected to predict; weights within a kind; one prior."""

import math

import numpy as np
import pytest
from scipy.special import softmax
from test_selection import gaussian

from bayes_mpt import BayesMPT, MarginalLikelihoodSearch, compare
from bayes_mpt.estimators.candidates import Candidate
from bayes_mpt.estimators.checked import _contradicts
from bayes_mpt.estimators.refits import HeldOut
from bayes_mpt.estimators.rules import Auto, Integrated
from bayes_mpt.evidence import factor_prior, sample_evidence
from bayes_mpt.models import PPCA, FactorAnalysis, GaussianMixture
from bayes_mpt.program.statistics import SufficientStatistics
from bayes_mpt.warnings import MisfitWarning

N, T = 80, 5


def table(holes=0.0, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, 2)) @ rng.normal(size=(2, T)) + 0.7 * rng.normal(size=(N, T))
    x[rng.random(x.shape) < holes] = np.nan
    return x


def search(x, grid=None, evidence="auto", **kw):
    grid = (
        {"model": [PPCA(k) for k in range(3)] + [FactorAnalysis(k) for k in range(3)]}
        if grid is None
        else grid
    )
    return MarginalLikelihoodSearch(BayesMPT(), grid, evidence=evidence, random_state=0, **kw).fit(x)


@pytest.fixture(scope="module")
def found():
    return search(table())


def test_the_table_of_both_kinds(found):
    c = found.comparison_
    assert c.attrs["ranked_by"] == "expected" and found.evidence_ == "integrated"
    assert c["expected_diff"].iloc[0] == 0 and (np.diff(c["expected_diff"]) < 0).all()
    assert c["expected_se"].iloc[0] == 0 and (c["expected_se"].iloc[1:] > 0).all()
    assert math.isnan(c["p_better"].iloc[0]) and (c["p_better"].iloc[1:] < 0.6).all()
    assert c["lml_diff"].max() == 0 and (c["lml_diff"] == c["lml"] - c["lml"].max()).all()
    first = c["lml"].idxmax()
    np.testing.assert_allclose(c["mc_dse"].drop(first), np.hypot(c["se"], c.loc[first, "se"]).drop(first))
    np.testing.assert_array_equal(c["log_bayes_factor"], c["lml_diff"])
    kind = c.index.str.startswith("PPCA")
    for of_kind in (kind, ~kind):
        np.testing.assert_allclose(c["weight"][of_kind], softmax(c["lml"][of_kind]), rtol=1e-9)
    other = c.index.str.startswith("PPCA") != first.startswith("PPCA")
    assert (c["diag"].str.contains("depends on the priors of noises") == other).all()


def test_scores_follow_what_ranks(found):
    r, c = found.cv_results_, found.comparison_
    place = [found.candidate_names_.index(n) for n in c.index]
    assert r["rank_test_score"][place].tolist() == list(range(1, 7)) and found.best_index_ == place[0]
    score = N * r["mean_test_score"][place]
    np.testing.assert_allclose(score - score[0], c["expected_diff"], atol=1e-9)
    np.testing.assert_allclose(r["mean_test_lml"], r["lml"] / N)
    assert found.best_score_ == r["mean_test_score"].max() and found.n_splits_ == 1


@pytest.mark.filterwarnings("ignore::bayes_mpt.warnings.ZeroNoiseWarning")
@pytest.mark.parametrize("holes", [0.0, 0.1])
def test_numbers_are_those_of_the_sampled_evidence(holes):
    x = table(holes)
    s = search(x, {"model": [PPCA(2), FactorAnalysis(1)]}, Integrated(se=0.2, max_particles=256))
    prior = factor_prior(x)
    for name, k, shape in zip(s.candidate_names_, (2, 1), (np.ones(T), None), strict=True):
        row = s.comparison_.loc[name]
        other = sample_evidence(SufficientStatistics(x), k, prior, shape=shape, seed=99)
        assert row["lml"] == pytest.approx(other.log_evidence, abs=3 * math.hypot(row["se"], other.se))
        assert row["se"] > 0


@pytest.mark.slow
def test_the_same_in_processes_and_of_a_folder(tmp_path, caplog):
    """What two processes found is taken up by one."""
    grid = {"model": [PPCA(2), FactorAnalysis(1)]}
    one = search(table(), grid)
    again = search(table(), grid, n_jobs=2, checkpoint_dir=tmp_path)
    with caplog.at_level("INFO", "bayes_mpt"):
        taken = search(table(), grid, checkpoint_dir=tmp_path)
    assert caplog.text.count("fit taken up from checkpoint_dir") == 2
    for other in (again, taken):
        assert other.comparison_.equals(one.comparison_)
    assert taken.best_estimator_.score(table()) == pytest.approx(
        one.best_estimator_.score(table()), abs=1e-12
    )


def test_compare_makes_the_same_table(found):
    x = table()
    fits = {n: found_model.fit(x) for n, found_model in _models().items()}
    got = compare(fits, x, random_state=0)
    assert got.attrs["ranked_by"] == "expected"
    assert got.equals(found.comparison_.loc[got.index]) and list(got.index) == list(found.comparison_.index)


def _models():
    models = [PPCA(k) for k in range(3)] + [FactorAnalysis(k) for k in range(3)]
    return {repr(m): BayesMPT(m, random_state=0) for m in models}


def test_the_fit_states_the_prior_of_its_evidence(found):
    line = f"evidence:        under {factor_prior(table()).describe()}"
    said = next(s for s in found.best_estimator_.explain().splitlines() if s.startswith(line))
    assert "compares candidates of this table alone" in said
    assert "evidence:" not in BayesMPT(PPCA(1)).fit(table()).explain()


def test_one_column_is_one_model():
    """T = 1 without latents: both kinds are one."""
    x = table()[:, :1]
    c = search(x, {"model": [PPCA(0), FactorAnalysis(0)]}).comparison_
    assert c["lml"].iloc[0] == pytest.approx(c["lml"].iloc[1], abs=1e-9) and (c["weight"] == 1).all()


def test_another_prior_is_refused():
    x = table()
    grid = {"model": [PPCA(1), gaussian(1.0)]}
    with pytest.raises(ValueError, match=r"not comparable.*loadings: t_3.*the model's own"):
        search(x, grid, "integrated")


def test_a_candidate_without_expectation_leaves_the_rank_to_the_evidence():
    s = search(table(), {"model": [gaussian(1.0), gaussian(2.0)]}, "integrated")
    assert s.comparison_.attrs["ranked_by"] == "lml" and s.comparison_["expected_diff"].isna().all()


def test_a_failed_candidate_is_left_out(found):
    models = [PPCA(k) for k in range(3)] + [FactorAnalysis(k) for k in range(3)]
    c = search(table(), {"model": [PPCA(T), *models]}).comparison_
    assert c.index[-1] == f"PPCA(n_components={T})" and math.isnan(c["expected_diff"].iloc[-1])
    assert c.iloc[:-1].drop(columns="diag").equals(found.comparison_.drop(columns="diag"))


# ------------------------------------------------------------------------------------------------ rows as they are


def heavy(seed=0):
    x = np.random.default_rng(seed).standard_t(2.5, size=(N, 1)) + 0.5 * table(seed=seed)
    return x / np.sqrt(np.random.default_rng(seed + 1).chisquare(2, size=(N, 1)) / 2)


def test_heavy_tails_are_told_and_rank_by_hidden_rows():
    x, grid = heavy(), {"model": [PPCA(k) for k in range(3)]}
    with pytest.warns(MisfitWarning, match="tails of these rows are heavier"):
        s = search(x, grid, Auto(cv=4))
    c = s.comparison_
    held_out = search(x, grid, HeldOut(cv=4))
    assert c.attrs["ranked_by"] == "heldout" and c["diag"].str.contains("ranked by hidden rows").all()
    assert list(c.index) == list(held_out.comparison_.index) and s.best_params_ == held_out.best_params_
    np.testing.assert_allclose(
        s.cv_results_["mean_test_score"], held_out.cv_results_["mean_test_score"], rtol=1e-9
    )
    assert (c["lml"] != held_out.comparison_["lml"]).all()  # the evidence stands beside
    with pytest.warns(MisfitWarning):  # asked for by name the rule stands, and the warning says what to do
        assert search(x, grid, "integrated").comparison_.attrs["ranked_by"] == "expected"


@pytest.mark.filterwarnings("ignore::bayes_mpt.warnings.ZeroNoiseWarning")
def test_a_candidate_that_no_fold_can_fit_ranks_last():
    """Four observed cells in a column are enough for a fit, three in a fold are not."""
    x = heavy()
    x[4:, 2] = np.nan
    with pytest.warns(MisfitWarning):
        s = search(x, {"model": [PPCA(1), FactorAnalysis(2), PPCA(0)]}, Auto(cv=4))
    c = s.comparison_
    assert c.attrs["ranked_by"] == "heldout" and c.index[-1].startswith("Factor")
    assert "without a score of hidden rows" in c["diag"].iloc[-1] and np.isfinite(c["lml"]).all()
    assert c["diag"].iloc[:-1].str.contains("ranked by hidden rows").all()
    assert "ranked by hidden rows" not in c["diag"].iloc[-1]


def test_one_row_far_out_is_told():
    """Where the kurtosis of many rows does not show it."""
    x = np.random.default_rng(0).normal(size=(1500, 4))
    x[7] = 3.5
    with pytest.warns(MisfitWarning, match="row 7 lies farther out"):
        s = search(x, {"model": [PPCA(0), FactorAnalysis(0)]})
    assert s.comparison_.attrs["ranked_by"] == "heldout"


def test_light_tails_are_told():
    x = np.random.default_rng(0).choice([-1.0, 1.0], size=(200, 4))
    with pytest.warns(MisfitWarning, match="tails of these rows are lighter"):
        assert search(x, {"model": [PPCA(0), PPCA(1)]}).comparison_.attrs["ranked_by"] == "expected"


def test_hidden_rows_that_contradict():
    """By more than twice the error of the difference, over rows and over partitions."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=100)
    fold = np.repeat(np.arange(5), 20)

    def pair(shift):
        first, second = (
            Candidate(by_row=rows + s, at_fit=rows + s, fold=fold)
            for s in (np.zeros(100), shift + 0.1 * rows)
        )
        return first, second

    error = 10 * (0.1 * rows).std(ddof=1)  # of the sum
    assert not _contradicts(*pair(1.9 * error / 100 - 0.1 * rows.mean()))
    assert _contradicts(*pair(2.1 * error / 100 - 0.1 * rows.mean()))
    assert not _contradicts(*pair(-1.0))


def test_summary_fits_a_terminal(found):
    text = found.summary()
    assert max(map(len, text.splitlines())) <= 80
    for name in found.candidate_names_:
        assert name[-12:] in text
    for value in found.comparison_["lml"]:
        assert f"{value:.1f}" in text
    assert "expected log-density" in text and "prior's scale halved" in text and "(dse)" in text


@pytest.mark.slow
@pytest.mark.parametrize("evidence", ["laplace", "train", HeldOut(cv=3)])
def test_summary_of_other_rules(evidence):
    s = search(table(), {"model": [PPCA(0), PPCA(1), PPCA(T)]}, evidence)
    text = s.summary()
    assert max(map(len, text.splitlines())) <= 80 and "new rows" not in text
    assert evidence != "laplace" or "5 latents leave no direction" in text  # why the last one failed


def test_summary_tells_long_names_apart():
    grid = {"model__covariance_type": ["full", "diag"], "model__n_components": [1, 2]}
    estimator = BayesMPT(GaussianMixture(), random_state=0)
    lines = MarginalLikelihoodSearch(estimator, grid, evidence="bic").fit(table()).summary().splitlines()
    assert max(map(len, lines)) <= 80
    first = 1 + next(i for i, line in enumerate(lines) if line.startswith("candidate"))
    assert len({line.split("  ")[0] for line in lines[first : first + 4]}) == 4


# ------------------------------------------------------------------------------------------------ tables at the edge


def edge(change):
    x = table()
    change(x)
    return x


def diag(x):
    """By kind and number of latents: what is said, and the evidence."""
    models = {"ppca 0": PPCA(0), "ppca 2": PPCA(2), "fa 0": FactorAnalysis(0), "fa 2": FactorAnalysis(2)}
    s = search(x, {"model": list(models.values())}, "integrated")
    c = s.comparison_.loc[s.candidate_names_].set_axis(list(models))
    return c["diag"], c["lml"]


@pytest.mark.parametrize("hole", [False, True])
def test_constant_column(hole):
    """Without a noise variance of its own it is a column like another; with one its density is infinite."""

    def change(x):
        x[:, 2] = 3.0
        x[0, 0] = np.nan if hole else x[0, 0]

    said, lml = diag(edge(change))
    for k in (0, 2):
        assert "columns 2 are constant" in said[f"fa {k}"]
        assert np.isfinite(lml[f"ppca {k}"])


@pytest.mark.parametrize("hole", [False, True])
def test_duplicated_column(hole):
    def change(x):
        x[:, 2] = x[:, 1]
        x[0, 0] = np.nan if hole else x[0, 0]

    said, lml = diag(edge(change))
    assert "duplicated" in said["fa 2"]
    assert np.isfinite(lml.drop("fa 2")).all()


def test_one_observed_cell_in_a_column():
    def change(x):
        x[1:, 2] = np.nan

    said, lml = diag(edge(change))
    assert "too few observed cells in column 2" in said["fa 2"]
    for k in (0, 2):
        assert said[f"ppca {k}"].startswith("few observed cells in column 2")
        assert np.isfinite(lml[f"ppca {k}"])


@pytest.mark.filterwarnings("ignore::bayes_mpt.warnings.ZeroNoiseWarning")
@pytest.mark.parametrize("k", [1, 2])
def test_a_row_without_cells_changes_nothing(k):
    x = table(0.1)
    for model in (PPCA(k), FactorAnalysis(k)):
        one, more = (
            search(z, {"model": [model]}, "integrated").comparison_["lml"].iloc[0]
            for z in (x, np.vstack([x, np.full((1, T), np.nan)]))
        )
        assert more == pytest.approx(one, abs=0.5)  # two runs of the sampler


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.__setitem__((slice(None), 2), np.nan), "column 2 has no observed cell"),
        (lambda x: x.__setitem__((3, 2), np.inf), "contains infinity in column 2"),
    ],
)
def test_refused_by_the_name_of_the_column(change, message):
    with pytest.raises(ValueError, match=message):
        search(edge(change))


def test_single_precision_is_the_same_number():
    x = table(0.1)
    one, other = (
        search(z, {"model": [PPCA(2)]}).comparison_["lml"].iloc[0] for z in (x, x.astype(np.float32))
    )
    assert other == pytest.approx(one, abs=0.3)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_few_rows(n):
    x = table()[:n]
    if n == 1:
        with pytest.raises(ValueError, match="minimum of 2"):
            search(x)
        return
    said, lml = diag(x)
    if n <= 3:  # K latents reproduce K + 1 rows
        assert "without any noise" in said["ppca 2"] and "without any" in said["fa 2"]
    assert np.isfinite(lml[["ppca 0", "fa 0"]]).all()


def test_more_latents_than_a_covariance_determines_are_marked():
    x = table()[:9]
    said = search(x, {"model": [FactorAnalysis(1), FactorAnalysis(3)]}, "integrated").comparison_["diag"]
    assert "more than a covariance of 5 columns determines" in said["FactorAnalysis(n_components=3)"]
    assert "determines" not in said["FactorAnalysis(n_components=1)"]
