"""Which candidates' folds climb on, and what stands of those that do not."""

import pickle

import numpy as np
import pytest

from bayes_mpt import BayesMPT, MarginalLikelihoodSearch
from bayes_mpt.estimators import contenders as module
from bayes_mpt.estimators import refits
from bayes_mpt.estimators.candidates import Candidate
from bayes_mpt.estimators.contenders import contenders, settle
from bayes_mpt.estimators.refits import ROUGH, HeldOut
from bayes_mpt.estimators.rules import give_evidence
from bayes_mpt.estimators.stacking import stacked_weights
from bayes_mpt.models import GaussianMixture
from bayes_mpt.training import Ascent


def table(seed=0, n=200):
    rng = np.random.default_rng(seed)
    centre = np.array([[0.0, 0.0], [6.0, 0.0], [0.0, 6.0]])
    return centre[rng.integers(3, size=n)] + rng.normal(size=(n, 2))


def search(sizes=(1, 2, 3), **how):
    model = BayesMPT(GaussianMixture(), training=Ascent(tol=1e-6))
    grid = {"model__n_components": list(sizes)}
    return MarginalLikelihoodSearch(model, grid, evidence="heldout", random_state=0, **how)


def candidate(by_row, rough=ROUGH, **how):
    by_row = np.asarray(by_row, dtype=float)
    return Candidate(evidence=float(np.nansum(by_row)), by_row=by_row, rough=rough, **how)


def test_the_best_and_what_is_near():
    """Near: behind by less than five times sqrt(N) of the standard deviation of a row's difference."""
    rng = np.random.default_rng(0)
    best = rng.normal(size=100)
    noise = rng.normal(size=100)
    noise = (noise - noise.mean()) / noise.std()  # the error of a sum is 10
    found = [candidate(best - 0.49 + noise), candidate(best), candidate(best - 0.51 + noise)]
    assert contenders(found) == [0, 1]
    found[1].rough = 0.0
    assert contenders(found) == [0]
    found[0] = Candidate(error="failed")
    assert contenders(found) == []
    assert contenders([Candidate(error="failed")]) == []


def test_rows_without_a_score_do_not_count():
    best = np.where(np.arange(100) < 50, np.nan, np.random.default_rng(0).normal(size=100))
    shift = np.where(np.arange(100) % 2, 1.0, -1.0)
    assert contenders([candidate(best, 0.0), candidate(best - 0.7 + shift)]) == [1]  # 35 of 5 x 7.07
    assert contenders([candidate(best, 0.0), candidate(best - 0.8 + shift)]) == []


def test_one_that_falls_back_brings_others_near(monkeypatch):
    first, second = candidate(np.zeros(4)), candidate(np.full(4, -9.0))
    asked = []

    def again(c, *args, **how):
        asked.append(c)
        c.rough = 0.0
        if c is first:
            first.by_row = np.full(4, -10.0)
            first.evidence = -40.0

    monkeypatch.setattr(module, "give_evidence", again)
    settle([first, second], HeldOut(), None, None, seed=0)
    assert [c is first for c in asked] == [True, False] and not second.rough


def test_a_search_scores_contenders_as_if_alone():
    x = table()
    found = search().fit(x)
    assert [c.rough for c in found._candidates()[:2]] == [ROUGH, ROUGH]
    assert found._found[found.best_index_].rough == 0.0
    seed = found._partition_seed()
    for c in found._candidates():
        if not c.rough:
            alone = give_evidence(Candidate(c.model), x, None, HeldOut(), seed=seed)
            assert c.evidence == alone.evidence
            np.testing.assert_array_equal(c.by_row, alone.by_row)
        diag = found.comparison_.loc[f"n_components={c.model.model.n_components}", "diag"]
        assert ("far behind" in diag) == bool(c.rough)


def test_what_is_rough_stays_so_in_a_checkpoint(tmp_path):
    x = table()
    first = search(checkpoint_dir=tmp_path).fit(x)
    again = search(checkpoint_dir=tmp_path).fit(x)
    plain = search().fit(x)
    for other in (again, plain):
        assert list(other.comparison_["diag"]) == list(first.comparison_["diag"])
        np.testing.assert_array_equal(other.comparison_["lml"], first.comparison_["lml"])


@pytest.mark.parametrize("tol", [ROUGH, 1e-3])
def test_nothing_is_rough_where_the_fits_are(tol):
    found = search((1, 3)).set_params(estimator__training=Ascent(tol=tol)).fit(table())
    assert all(c.rough == 0.0 for c in found._candidates())


def test_models_without_scores_of_their_own_are_not_rough():
    x = table(n=40)
    x[0, 0] = np.nan  # of tables with holes folds go through the program
    found = search((1,)).fit(x)
    assert all(c.rough == 0.0 for c in found._candidates())
    assert np.isfinite(found.comparison_["lml"]).all()


@pytest.mark.slow
def test_weights_are_of_folds_that_climbed_to_the_end(monkeypatch, tmp_path):
    """Candidates far behind have weights too: stacked ones do not depend on where their folds had ended."""
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, 300)
    x = 3 * np.c_[np.cos(angle), np.sin(angle)] + 0.2 * rng.normal(
        size=(300, 2)
    )  # a ring is no three Gaussians
    x[:60] = 2 * rng.normal(size=(60, 2))
    found = {}
    for rough in (1e-2, 1e-12):
        monkeypatch.setattr(refits, "ROUGH", rough)
        found[rough] = search((1, 2, 3, 6), checkpoint_dir=tmp_path / str(rough)).fit(x)
    few, all_ = found.values()
    assert [c.rough for c in few._found] == [1e-2, 1e-2, 1e-2, 0.0] and not any(c.rough for c in all_._found)
    truth = stacked_weights(np.stack([c.hidden for c in all_._found], 2)[0])
    as_ranked = stacked_weights(np.stack([c.hidden for c in few._found], 2)[0])
    assert abs(as_ranked - truth).max() > 0.005 and (truth > 0).sum() == 3
    table_before = few.comparison_.copy()
    average = few.average("stacking")
    np.testing.assert_array_equal(average.weights_, truth)
    assert average.heldout_score_ == all_.average("stacking").heldout_score_
    assert few.comparison_.equals(table_before) and few._found[0].rough == 1e-2  # the search ranks as it did
    monkeypatch.setattr(refits, "ROUGH", 1e-2)
    taken_up = search((1, 2, 3, 6), checkpoint_dir=tmp_path / "0.01").fit(x)
    np.testing.assert_array_equal(taken_up.average("stacking").weights_, truth)
    with pytest.raises(ValueError, match="ended at 1e-02 of a score, and a search from a file has no rows"):
        pickle.loads(pickle.dumps(few)).average("stacking")
