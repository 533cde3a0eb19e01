"""The Laplace evidence with missing cells: against dense sums over rows, the sampled evidence and complete rows."""

import math

import numpy as np
import pytest
from scipy.linalg import null_space
from scipy.stats import gamma, multivariate_normal
from tables import with_holes

from bayes_mpt import BayesMPT, MarginalLikelihoodSearch
from bayes_mpt.evidence import (
    FactorPrior,
    laplace_diagonal,
    laplace_of_cells,
    laplace_proportional,
    sample_evidence,
)
from bayes_mpt.evidence.laplace_incomplete import expand
from bayes_mpt.models import PPCA, FactorAnalysis
from bayes_mpt.predictors.gaussian.incomplete import Maximum, maximise
from bayes_mpt.predictors.gaussian.patterns import Patterns
from bayes_mpt.predictors.gaussian.profile import Prior
from bayes_mpt.program.statistics import SufficientStatistics
from bayes_mpt.warnings import AdviceWarning

SHAPE = 2.0  # psi_i ~ Gamma(2, 2 / var_i), a priori
RATIOS = {"fa": None, "ppca": np.ones(6), "known ratios": np.linspace(0.5, 2.0, 6)}


def table(seed, n, t, k, holes=0.0, signal=0.9):
    rng = np.random.default_rng(seed)
    x = signal * rng.normal(size=(n, k)) @ rng.normal(size=(k, t)) + rng.normal(size=(n, t)) + 2.0
    x[rng.random(x.shape) < holes] = np.nan
    return x[~np.isnan(x).all(1)]


def with_dropout(seed, n, t, k):
    """Each column is shown by a share of the rows of its own, whatever its values."""
    rng = np.random.default_rng(seed)
    x = 0.8 * rng.normal(size=(n, k)) @ rng.normal(size=(k, t)) + rng.normal(size=(n, t))
    for j, share in enumerate(rng.uniform(0, 0.8, t)):
        x[rng.permutation(n)[: int(share * n)], j] = np.nan
    return x


def evidence(x, k, shape=None):
    return laplace_of_cells(SufficientStatistics(x), k, shape)


def by_rows(x, k, shape):
    """The formula with nothing done cleverly: the information row by row and by differences, explicit tangents."""
    statistics, variance = SufficientStatistics(x), np.nanvar(x, 0)
    a = SHAPE
    prior = Prior(a, a / variance, len(x)) if shape is None else None
    at = maximise(statistics, k, shape, prior=prior)
    n, t = x.shape
    design = np.eye(t) if shape is None else np.ones((t, 1))
    mean_var = variance if shape is None else np.array([(variance / shape).mean()])
    ratios = np.ones(t) if shape is None else shape
    eta = np.log(at.noise if shape is None else at.noise[:1] / shape[0])
    u, s, _ = np.linalg.svd(at.loading / np.sqrt(at.noise)[:, None], full_matrices=False)
    v = u * s
    theta = np.concatenate([v.ravel(), eta])

    def model(th):
        v, root = th[: t * k].reshape(t, k), np.sqrt(ratios * np.exp(design @ th[t * k :]))
        return root[:, None] * (np.eye(t) + v @ v.T) * root

    cov, step = model(theta), 1e-5
    slopes = [(model(theta + step * e) - model(theta - step * e)) / (2 * step) for e in np.eye(len(theta))]
    lml, fisher, of_mean = 0.0, np.zeros((len(theta),) * 2), np.zeros((t, t))
    for row in x:
        o = np.flatnonzero(~np.isnan(row))
        lml += multivariate_normal(at.mean[o], cov[np.ix_(o, o)]).logpdf(row[o])
        inverse = np.linalg.inv(cov[np.ix_(o, o)])
        moved = [inverse @ d[np.ix_(o, o)] for d in slopes]
        fisher += 0.5 * np.array([[np.sum(p * q.T) for q in moved] for p in moved])
        of_mean[np.ix_(o, o)] += inverse
    share = np.exp(eta) / mean_var
    token_share = design @ share
    value = lml + (gamma(a, scale=mean_var / a).logpdf(np.exp(eta)) + eta).sum()
    value -= 0.5 * np.linalg.slogdet(of_mean @ cov / n)[1]
    h, g = fisher.copy(), np.zeros((len(theta), 0))
    h[np.arange(t * k, len(h)), np.arange(t * k, len(h))] += a * share
    if k:
        tau2 = (v**2 * token_share[:, None]).mean()
        h[: t * k, : t * k] += np.eye(t * k) * token_share.mean() / tau2
        sd = np.sqrt(tau2 / token_share)[:, None]
        value += (-0.5 * (v / sd) ** 2 - np.log(sd) - 0.5 * math.log(2 * math.pi)).sum()
        value += math.log({1: 2, 2: 4 * math.pi, 3: 16 * math.pi**2}[k])
    for i in range(k):
        for j in range(i):
            skew = np.zeros((k, k))
            skew[i, j], skew[j, i] = 1, -1
            g = np.column_stack([g, np.append((v @ skew).ravel(), np.zeros(len(eta)))])
    q = null_space(g.T) if g.size else np.eye(len(theta))
    value += 0.5 * np.linalg.slogdet(g.T @ g)[1] if g.size else 0.0
    value += 0.5 * q.shape[1] * math.log(2 * math.pi) - 0.5 * np.linalg.slogdet(q.T @ h @ q)[1]
    return value, lml


@pytest.mark.parametrize("kind", RATIOS)
@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_against_the_information_row_by_row(kind, k):
    x = table(k, 80, 6, max(k, 1), 0.25, signal=1.3)
    value, lml = by_rows(x, k, RATIOS[kind])
    found = evidence(x, k, RATIOS[kind])
    assert found.log_evidence == pytest.approx(value, abs=1e-5)
    assert found.lml == pytest.approx(lml, abs=1e-7)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", RATIOS)
@pytest.mark.parametrize("k", [0, 1, 2, 4])
def test_of_complete_rows_it_is_the_same_number(monkeypatch, kind, k, whole):
    if not whole:
        monkeypatch.setattr("bayes_mpt.evidence.laplace_incomplete.MAX_WHOLE", 0)
    x, shape = table(3, 120, 6, 2), RATIOS[kind]
    cov = np.cov(x.T, bias=True)
    want = laplace_diagonal(cov, 120, k) if shape is None else laplace_proportional(cov, 120, k, shape)
    at = Maximum(want.factors.lml, x.mean(0), want.factors.loading, want.factors.noise)
    got = expand(at, Patterns(x, np.ones(120)), x.var(0), shape)
    assert got.log_evidence == pytest.approx(want.log_evidence, abs=1e-8)
    assert evidence(x, k, shape).log_evidence == pytest.approx(want.log_evidence, abs=1e-3)


@pytest.mark.parametrize(("kind", "k"), [("fa", 0), ("fa", 1), ("ppca", 0), ("ppca", 1), ("ppca", 2)])
def test_against_the_sampled_evidence_under_the_same_prior(kind, k):
    """As far below it as of complete rows: up to a nat and a half."""
    n, t = 200, 5
    x, shape = table(1, n, t, max(k, 1), 0.2), None if kind == "fa" else np.ones(t)
    n = len(x)
    found = evidence(x, k, shape)
    f, prior = found.factors, FactorPrior(np.nanmean(x, 0), np.nanvar(x, 0))
    tau2 = float((f.loading**2 / prior.units(shape)[:, None]).mean()) if k else 1.0
    truth = sample_evidence(SufficientStatistics(x), k, prior.normal(tau2), shape=shape, seed=2)
    off = found.log_evidence + t / 2 * math.log(prior.kappa / n) - truth.log_evidence
    assert (-1.2 if k else -0.05) - 3 * truth.se < off < 0.05 + 3 * truth.se


@pytest.mark.parametrize(("n", "t", "k", "holes"), [(100, 40, 4, 0.3), (60, 40, 3, 0.4), (60, 30, 1, 0.6)])
def test_of_many_loadings_the_determinant_is_close_to_that_of_the_matrix(monkeypatch, n, t, k, holes):
    x, shape = table(2, n, t, k, holes), np.ones(t)
    x[:, :3] = with_holes(x[:, :3], 0.5)
    statistics = SufficientStatistics(x)
    at = maximise(statistics, k, shape)
    cells = Patterns(*(a.numpy() for a in statistics.rows()))

    def value():
        return expand(at, cells, np.nanvar(x, 0), shape).log_evidence

    want = value()
    monkeypatch.setattr("bayes_mpt.evidence.laplace_incomplete.MAX_WHOLE", 0)
    assert value() == pytest.approx(want, abs=0.25)
    assert value() != want


@pytest.mark.parametrize("kind", ["fa", "ppca"])
def test_units_and_empty_rows(kind):
    x = table(4, 90, 6, 2, 0.2)
    want = evidence(x, 2, RATIOS[kind]).log_evidence
    by = np.full(6, 1e3) if kind == "ppca" else np.logspace(-4, 4, 6)
    scaled = evidence(x * by, 2, RATIOS[kind]).log_evidence
    assert scaled == pytest.approx(want - (~np.isnan(x)).sum(0) @ np.log(by), abs=1e-3)
    hollow = np.insert(x, 7, np.nan, axis=0)
    assert evidence(hollow, 2, RATIOS[kind]).log_evidence == pytest.approx(want, abs=1e-4)


# ---------------------------------------------------------------------------------------------------- the estimators


@pytest.mark.parametrize(("seed", "n", "t", "k"), [(0, 150, 12, 2), (1, 200, 14, 1), (2, 300, 10, 3)])
def test_dropout_does_not_mislead_the_choice_of_the_dimension(seed, n, t, k):
    x = with_dropout(seed, n, t, k)
    model = BayesMPT(random_state=0).fit(x)
    assert model.n_components_ == k
    assert model.selection_[k] == pytest.approx(evidence(x, k, np.ones(t)).log_evidence, abs=1e-3)
    # the covariance of pairs, as if of complete rows, takes noise for latents
    pairs = SufficientStatistics(x).available()
    as_if = [laplace_proportional(pairs.covariance, pairs.n, j, np.ones(t)).log_evidence for j in range(t)]
    assert int(np.argmax(as_if)) > k


def test_the_estimators_evidence():
    x = table(5, 300, 6, 2, 0.15)
    for model, shape in ((PPCA(2), np.ones(6)), (FactorAnalysis(2), None)):
        got = BayesMPT(model).fit(x + 1e5).laplace(x + 1e5)
        assert got.log_evidence == pytest.approx(evidence(x, 2, shape).log_evidence, abs=1e-3)


def test_a_search_ranks_by_it_where_rows_are_too_many_to_be_sampled(monkeypatch):
    monkeypatch.setattr("bayes_mpt.estimators.integrals.MAX_CELLS", 0)
    x = table(6, 200, 6, 2, 0.15)
    grid = {"model": [PPCA(1), PPCA(2), FactorAnalysis(1), FactorAnalysis(2)]}
    search = MarginalLikelihoodSearch(BayesMPT(), grid).fit(x)
    assert (
        search.evidence_ == "laplace"
        and "600 parameters, or, with holes, 20000 cells" in search.evidence_reason_
    )
    want = [evidence(x, k, shape).log_evidence for shape in (np.ones(6), None) for k in (1, 2)]
    np.testing.assert_allclose(search.cv_results_["lml"], want, rtol=0, atol=1e-3)


def test_what_is_too_wide_is_refused_and_left_to_hidden_rows(monkeypatch):
    monkeypatch.setattr("bayes_mpt.evidence.laplace_incomplete.MAX_FREE", 10)
    monkeypatch.setattr("bayes_mpt.estimators.integrals.MAX_CELLS", 0)
    x = table(7, 60, 6, 1, 0.15)
    search = MarginalLikelihoodSearch(BayesMPT(), {"model": [FactorAnalysis(1), PPCA(1)]}).fit(x)
    assert search.evidence_ == "heldout"
    with pytest.raises(ValueError, match=r"up to 10, got 1 latents of 6 columns.*heldout"):
        BayesMPT(FactorAnalysis(1)).fit(x).laplace(x)


def test_the_default_says_which_dimensions_are_too_many_to_be_tried(monkeypatch):
    monkeypatch.setattr("bayes_mpt.evidence.laplace_incomplete.MAX_WHOLE", 5)
    monkeypatch.setattr("bayes_mpt.evidence.laplace_incomplete.MAX_WIDE", 6 * 2**3)
    x = table(8, 100, 6, 1, 0.15)
    with pytest.warns(AdviceWarning, match="more than 2 latent dimensions are not tried.*n_latents"):
        model = BayesMPT().fit(x)
    assert model.n_components_ == 1 and list(model.selection_) == [0, 1, 2]


def bad_tables():
    x = table(9, 60, 6, 1, 0.15)
    constant, few, empty = x.copy(), x.copy(), x.copy()
    constant[:, 2] = np.where(np.isnan(x[:, 2]), np.nan, 1.5)
    few[1:, 2] = np.nan
    few[0, 2] = 1.0
    empty[:, 2] = np.nan
    yield FactorAnalysis(1), constant, "without noise.*c2"
    yield FactorAnalysis(1), few, "without noise.*c2"
    yield FactorAnalysis(1), empty, "c2.*no observed cell"
    yield PPCA(1), empty, "c2.*no observed cell"
    rng = np.random.default_rng(0)
    exact = with_holes(rng.normal(size=(60, 1)) @ rng.normal(size=(1, 6)), 0.1)
    yield PPCA(1), exact, "1 latents.*without noise"


@pytest.mark.parametrize(("model", "x", "why"), list(bad_tables()))
def test_rows_without_noise_are_refused_by_name(model, x, why):
    pd = pytest.importorskip("pandas")
    names = [f"c{i}" for i in range(6)]
    fitted = BayesMPT(model).fit(pd.DataFrame(table(9, 60, 6, 1, 0.15), columns=names))
    with pytest.raises(ValueError, match=why):
        fitted.laplace(pd.DataFrame(x, columns=names))


def test_one_cell_of_a_column_is_no_obstacle_to_one_noise():
    x = table(10, 100, 6, 1, 0.15)
    x[1:, 2] = np.nan
    x[0, 2] = 1.0
    assert BayesMPT().fit(x).n_components_ == 1


def test_a_constant_column_with_holes_is_no_low_rank():
    x = table(11, 60, 6, 2, 0.2)
    x[:, 3] = np.where(np.isnan(x[:, 3]), np.nan, 0.1)
    assert BayesMPT().fit(x).n_components_ < 5  # without a warning


def test_columns_that_are_never_seen_together_tell_of_few_latents():
    """Two panels of three columns: twelve covariances, of which 1 + 6 K - K (K - 1) / 2 numbers are told."""
    x = table(12, 120, 6, 1)
    x[:60, 3:] = x[60:, :3] = np.nan
    model = BayesMPT(random_state=0).fit(x)
    assert model.n_components_ == 1 and max(model.selection_) == 2


def test_rows_of_low_rank_with_holes_are_refused():
    rng = np.random.default_rng(0)
    x = with_holes(rng.normal(size=(60, 2)) @ rng.normal(size=(2, 8)), 0.1)
    with pytest.raises(ValueError, match="2 latents reproduce these rows.*without any noise"):
        BayesMPT().fit(x)
