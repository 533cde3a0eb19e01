"""Mixtures of tables as strangers have them: right, or refused by the name of what is wrong."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import logsumexp
from truths import mixture_log_terms

from bayes_mpt import BayesMPT
from bayes_mpt.models import PPCA, GaussianMixture, MixtureOfFactorAnalyzers
from bayes_mpt.training import Ascent

N, T = 60, 3


def two_groups():
    rng = np.random.default_rng(0)
    x = np.r_[rng.normal(size=(N // 2, T)), rng.normal(4, 1, (N // 2, T))]
    return np.where(rng.random(x.shape) < 0.1, np.nan, x)


HOLES = two_groups()


def model_of(program):
    return BayesMPT(program, training=Ascent(tol=1e-9), random_state=0)


@pytest.mark.parametrize(
    "program",
    [GaussianMixture(2), GaussianMixture(2, "diag"), MixtureOfFactorAnalyzers(2, 1), PPCA(1)],
    ids=["full", "diag", "analysers", "ppca"],
)
def test_any_unit_or_a_refusal(program):
    """The LML moves by the log of the unit for each cell; where squares leave what a float holds, none is reported."""
    cells = int((~np.isnan(HOLES)).sum())
    want = model_of(program).fit(HOLES).log_marginal_likelihood_
    for unit in (1e-12, 1e12):
        got = model_of(program).fit(HOLES * unit).log_marginal_likelihood_
        assert got + cells * np.log(unit) == pytest.approx(want, abs=1e-3)
    for unit, what in ((1e-165, "underflow"), (1e165, "overflow")):
        x = pd.DataFrame(HOLES * [1.0, unit, 1.0], columns=["a", "b", "c"])
        with pytest.raises(ValueError, match=f"squares of column b {what}: rescale it"):
            model_of(program).fit(x)


def test_without_a_complete_row_no_square_is_too_small():
    x = np.where(np.eye(N, T, dtype=bool) | (np.arange(N)[:, None] % T == np.arange(T)), np.nan, HOLES)
    assert model_of(GaussianMixture(2, "diag")).fit(x).converged_


@pytest.mark.filterwarnings(
    "ignore:the training stopped:bayes_mpt.warnings.NotConvergedWarning"
)  # where does not matter
@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
@pytest.mark.parametrize(
    "x, k",
    [(HOLES[:6], 6), (HOLES[:5], 7), (np.repeat(HOLES[:6], 3, 0), 2), (HOLES[:, :1], 3)],
    ids=["a component each", "more components than rows", "repeated rows", "one column"],
)
def test_scores_are_those_of_the_parameters(x, k, kind):
    """Of scipy's densities at what was found, as labels and criteria are."""
    model = BayesMPT(GaussianMixture(k, kind), training=Ascent(max_iter=30, tol=1e-4), random_state=0)
    model.fit(x)
    cov = model.covariances_
    if kind == "tied":
        cov = np.broadcast_to(cov, (k, *cov.shape))
    elif kind != "full":
        cov = np.stack([np.diag(np.broadcast_to(c, x.shape[1])) for c in cov])
    terms = mixture_log_terms(x, model.weights_, model.means_, cov)
    np.testing.assert_allclose(model.score_samples(x), logsumexp(terms, 0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(model.predict_proba(x).sum(1), 1.0)
    assert np.isfinite(model.impute(x)).all() and np.isfinite(model.bic(x))
