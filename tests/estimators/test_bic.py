"""The rule "bic" against scikit-learn's criterion at the same parameters, and dense densities of observed cells."""

import math

import numpy as np
import pytest
from scipy.special import logsumexp
from sklearn.mixture import GaussianMixture as TheirMixture
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from truths import log_density, mixture_log_terms

from bayes_mpt import Auto, BayesMPT, Bic, HeldOut, MarginalLikelihoodSearch, compare
from bayes_mpt.models import PPCA, BayesianRegression, GaussianMixture, GaussianProcess, LatentClass
from bayes_mpt.training import Ascent

RNG = np.random.default_rng(5)
X = np.concatenate([RNG.normal(size=(40, 2)), RNG.normal(size=(30, 2)) * 0.7 + 4])
HOLES = np.where(RNG.random(X.shape) < 0.15, np.nan, X)
GRID = {"model__n_components": [1, 2]}


def search(model, grid=GRID, evidence="bic"):
    return MarginalLikelihoodSearch(
        BayesMPT(model), grid, evidence=evidence, random_state=0, error_score="raise"
    )


def density(params, x):
    """Total log density of a mixture with full covariances."""
    covs = params["scale_tril"] @ params["scale_tril"].transpose(0, 2, 1)
    return logsumexp(mixture_log_terms(x, params["weights"], params["loc"], covs), axis=0).sum()


def test_it_is_minus_half_of_sklearns_at_the_same_parameters():
    found = search(GaussianMixture()).fit(X)
    lml = dict(zip(found.candidate_names_, found.cv_results_["lml"], strict=True))
    for name, k in zip(found.candidate_names_, GRID["model__n_components"], strict=True):
        params = BayesMPT(GaussianMixture(k), random_state=0).fit(X).params_
        want = TheirMixture(k)
        want.weights_, want.means_ = params["weights"], params["loc"]
        want.precisions_cholesky_ = np.linalg.inv(params["scale_tril"]).transpose(0, 2, 1)
        assert lml[name] == pytest.approx(-want.bic(X) / 2, rel=1e-10)
    assert found.evidence_ == "bic" and found.best_params_ == {"model__n_components": 2}
    table = found.comparison_
    # of order one and unknown: no error, no weight, no factor
    assert table[["se", "mc_dse", "p_worse", "weight", "log_bayes_factor"]].isna().all(axis=None)
    assert np.isfinite(table["dse"].iloc[1]) and table["diag"].str.startswith("bic").all()
    assert "lml by 'bic'" in found.summary() and "at the maximum a posteriori (all)" in found.summary()


def test_missing_cells():
    found = search(GaussianMixture()).fit(HOLES)
    best = found.best_estimator_
    want = density(best.params_, HOLES) - 0.5 * (1 + 2 * (2 + 3)) * math.log((~np.isnan(HOLES).all(1)).sum())
    assert found.best_params_ == {"model__n_components": 2}
    assert found.comparison_["lml"].iloc[0] == pytest.approx(want, rel=1e-10)


def test_one_table_of_mixtures_and_factor_models():
    """BIC asks for a likelihood and a count only."""
    models = [GaussianMixture(1, covariance_prior=None), PPCA(1)]
    table = search(None, {"model": models}, Bic()).fit(X).comparison_
    assert table["diag"].eq("bic; at the maximum of the likelihood").all()
    found = table["lml"]
    gauss = log_density(X, X.mean(0), np.cov(X.T, bias=True)).sum() - 0.5 * 5 * math.log(len(X))
    assert found.to_dict() == pytest.approx(
        {"GaussianMixture": gauss, "PPCA": gauss}, rel=1e-9
    )  # of two columns both are any Gaussian


def test_models_fitted_by_hand_and_behind_a_scaler():
    pipe = make_pipeline(StandardScaler(), BayesMPT(GaussianMixture(2), random_state=0)).fit(X)
    table = compare({"two": pipe}, X, evidence="bic")
    z = StandardScaler().fit_transform(X)
    assert table["lml"].iloc[0] == pytest.approx(-pipe[-1].bic(z) / 2, rel=1e-12)
    with pytest.raises(ValueError, match="'bic' needs the rows"):
        compare({"two": pipe}, X[:20], evidence="bic")


def test_codes():
    codes = RNG.integers(0, 2, size=(50, 3)).astype(float)
    found = search(LatentClass(1, 2), {"model__n_classes": [1]}).fit(codes)
    share = codes.mean(0)
    want = (codes * np.log(share) + (1 - codes) * np.log1p(-share)).sum() - 1.5 * math.log(50)
    assert found.comparison_["lml"].iloc[0] == pytest.approx(want, rel=1e-9)


def test_who_is_refused():
    y = X @ [1.0, 2.0] + RNG.normal(size=len(X))
    with pytest.raises(ValueError, match="nothing is point-estimated in a candidate"):
        search(BayesianRegression(), [{}]).fit(X, y)
    process = BayesMPT(GaussianProcess(), training=Ascent(tol=1e-3))
    with pytest.raises(ValueError, match="independent rows: here rows are tokens of one vector"):
        MarginalLikelihoodSearch(process, [{}], evidence="bic").fit(X[:20], y[:20])


# ------------------------------------------------------------------------------------------------------ and "auto"


@pytest.mark.slow
@pytest.mark.parametrize("x", [X, HOLES], ids=["complete", "holes"])
def test_what_auto_takes_for_gaussian_mixtures(x):
    found = search(GaussianMixture(), GRID, Auto(cv=2)).fit(x)
    assert found.evidence_ == "heldout" and "every candidate is a Gaussian mixture" in found.evidence_reason_
    want = search(GaussianMixture(), GRID, HeldOut(cv=2)).fit(x)
    np.testing.assert_array_equal(found.cv_results_["lml"], want.cv_results_["lml"])
    assert found.best_params_ == {"model__n_components": 2} and found.comparison_["weight"].isna().all()


def test_and_beside_other_models():
    found = search(None, {"model": [GaussianMixture(2), PPCA(1)]}, Auto(cv=2)).fit(X)
    assert found.evidence_ == "heldout" and "Gaussian mixture" not in found.evidence_reason_
