"""The integrated evidence of Gaussian mixtures through estimators: fits, searches, comparisons, averages, files."""

import math

import numpy as np
import pytest
from scipy.special import multigammaln
from scipy.stats import multivariate_t

from bayes_mpt import BayesMPT, Integrated, MarginalLikelihoodSearch, compare
from bayes_mpt.evidence import MixturePrior, factor_prior, mixture_evidence, mixture_prior
from bayes_mpt.models import PPCA, GaussianMixture


def table(seed=0, n=90, t=2):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, t)) + 5.0 * rng.integers(0, 2, (n, 1))


@pytest.fixture(scope="module")
def search():
    grid = {"model__n_components": [1, 2, 3]}
    rule = Integrated(se=0.2, max_particles=256)
    return MarginalLikelihoodSearch(BayesMPT(GaussianMixture()), grid, evidence=rule, random_state=0).fit(
        table()
    )


def test_of_a_fit_is_that_of_its_rows():
    x = table(1)
    x[2, 0] = np.nan
    fitted = BayesMPT(GaussianMixture(2, "diag"), random_state=0).fit(x)
    found = fitted.integrated(x, se=0.2)
    direct = mixture_evidence(x, 2, mixture_prior(x), covariance_type="diag", se=0.2, seed=5)
    assert found.log_evidence == pytest.approx(direct.log_evidence, abs=3 * math.hypot(found.se, direct.se))
    assert found.prior.describe() == mixture_prior(x).describe()


def test_a_search_ranks_by_it(search):
    assert search.evidence_ == "integrated"
    assert search.best_params_ == {"model__n_components": 2}
    table_ = search.comparison_
    assert (table_["se"] >= 0).all() and table_["se"].iloc[0] < 0.5
    # above .95 they named the true number in 62 % of 145 cases: benchmarks/ranking/mixture_choice.py
    assert table_["weight"].isna().all()


def test_an_average_by_it_is_refused(search):
    with pytest.raises(ValueError, match=r"'n_components=1', .* gives no weights: .* weights='stacking'"):
        search.average(weights="evidence")


def test_new_rows_are_predicted_by_the_posterior():
    """Of one component it is a t, of which 256 draws make a mixture of normals."""
    x, new = table(), table(7, 50)
    n, kappa = len(x), 0.01
    found = BayesMPT(GaussianMixture(1)).fit(x).integrated(x)
    held = kappa + n
    scale = found.prior.covariance * (1 + n)
    law = multivariate_t(found.prior.center, scale * (held + 1) / (held * (n + 3)), df=n + 3)
    nats = found.law.log_prob(new)
    np.testing.assert_allclose(nats, law.logpdf(new), atol=0.1)
    assert nats.sum() == pytest.approx(law.logpdf(new).sum(), abs=0.5)
    two = BayesMPT(GaussianMixture(2), random_state=0).fit(x).integrated(x)
    assert two.law.log_prob(new).sum() > nats.sum()  # two clusters are predicted better


def test_closed_form_of_one_full_component_through_a_fit():
    x = table(2)
    found = BayesMPT(GaussianMixture(1)).fit(x).integrated(x)
    n, t, kappa, degrees = len(x), 2, 0.01, 4
    s = np.cov(x.T, bias=True)
    truth = (
        -0.5 * n * t * math.log(math.pi)
        + multigammaln((degrees + n) / 2, t)
        - multigammaln(degrees / 2, t)
        + 0.5 * degrees * np.linalg.slogdet(s)[1]
        - 0.5 * (degrees + n) * np.linalg.slogdet(s * (1 + n))[1]
        + 0.5 * t * math.log(kappa / (kappa + n))
    )
    assert found.log_evidence == pytest.approx(truth, abs=1e-8)


def test_other_priors_are_refused_by_name():
    x = table(3)
    fits = {
        "mixture": BayesMPT(GaussianMixture(2), random_state=0).fit(x),
        "factors": BayesMPT(PPCA(1)).fit(x),
    }
    with pytest.raises(
        ValueError, match=r"'mixture' is under the prior 'weights: Dirichlet.*'factors' under 'load"
    ):
        compare(fits, x, evidence="integrated")
    with pytest.raises(TypeError, match="takes a MixturePrior, got FactorPrior"):
        fits["mixture"].integrated(x, prior=factor_prior(x))
    with pytest.raises(TypeError, match="takes a FactorPrior, got MixturePrior"):
        fits["factors"].integrated(x, prior=mixture_prior(x))


def test_a_prior_of_ones_own():
    x = table(4)
    fitted = BayesMPT(GaussianMixture(2), random_state=0).fit(x)
    own = MixturePrior(np.zeros(2), 4 * np.eye(2), concentration=1.0)
    found = fitted.integrated(x, prior=own, se=0.2)
    direct = mixture_evidence(x, 2, own, se=0.2, seed=3)
    assert found.prior is own
    assert found.log_evidence == pytest.approx(direct.log_evidence, abs=3 * math.hypot(found.se, direct.se))


def test_same_bits_again_and_from_a_file(tmp_path):
    x = table(5)
    grid = {"model__n_components": [1, 2]}

    def searched(**how):
        return MarginalLikelihoodSearch(
            BayesMPT(GaussianMixture()), grid, evidence=Integrated(se=0.5), random_state=0, **how
        ).fit(x)

    first, second = searched(checkpoint_dir=tmp_path), searched()
    again = searched(checkpoint_dir=tmp_path)
    for other in (second, again):
        assert (other.comparison_["lml"] == first.comparison_["lml"]).all()
    assert (again.comparison_["se"] == first.comparison_["se"]).all()


def test_a_subclass_may_be_another_program_and_has_no_such_evidence():
    class Shifted(GaussianMixture):
        def __call__(self, x):
            super().__call__(x)

    x = table()
    fitted = BayesMPT(Shifted(2), random_state=0).fit(x)
    for ask in (fitted.integrated, fitted.laplace):
        with pytest.raises(ValueError, match="needs a"):
            ask(x)
