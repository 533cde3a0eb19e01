"""Latent classes: EM against loops in numpy, the end of the climb, missing codes, bad input."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch

from bayes_mpt import BayesMPT
from bayes_mpt.models import LatentClass

SIZES = [0.5, 0.3, 0.2]


def table(seed, n_rows=200, n_levels=3, holes=0.0):
    """Codes of three classes, and where the holes are NaN."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(n_levels, 0.5), size=(3, 5))
    classes = rng.choice(3, p=SIZES, size=n_rows)
    x = np.array([[rng.choice(n_levels, p=p) for p in probs[c]] for c in classes], dtype=float)
    x[rng.random(x.shape) < holes] = np.nan
    return x


def start_of(seed, n_classes, n_tokens=5, n_levels=3):
    rng = np.random.default_rng(seed)
    return {
        "weights": torch.as_tensor(rng.dirichlet(np.ones(n_classes))),
        "probs": torch.as_tensor(rng.dirichlet(np.ones(n_levels), size=(n_classes, n_tokens))),
    }


def joint_of(row, weights, probs):
    """p(class, observed codes of a row), by loops."""
    out = []
    for c, weight in enumerate(weights):
        for t, code in enumerate(row):
            if not np.isnan(code):
                weight = weight * probs[c][t][int(code)]
        out.append(weight)
    return np.array(out)


def score_of(x, params):
    weights, probs = np.asarray(params["weights"]), np.asarray(params["probs"])
    return sum(np.log(joint_of(row, weights, probs).sum()) for row in x)


def em_by_loops(x, params, n_steps):
    weights, probs = np.asarray(params["weights"]), np.asarray(params["probs"])
    for _ in range(n_steps):
        sizes, counts = np.zeros_like(weights), np.zeros_like(probs)
        for row in x:
            joint = joint_of(row, weights, probs)
            for c, share in enumerate(joint / joint.sum()):
                sizes[c] += share
                for t, code in enumerate(row):
                    if not np.isnan(code):
                        counts[c, t, int(code)] += share
        weights, probs = sizes / len(x), counts / counts.sum(-1, keepdims=True)
    return weights, probs


@pytest.mark.parametrize("holes", [0.0, 0.3])
def test_first_steps_are_those_of_em_by_loops(holes):
    x = table(0, n_rows=60, holes=holes)
    x[7] = np.nan  # says nothing
    found = LatentClass(2).maximize(torch.as_tensor(x), start_of(0, 2), tol=0.0, max_iter=4)
    weights, probs = em_by_loops(x, start_of(0, 2), 4)
    np.testing.assert_allclose(found["weights"], weights, rtol=1e-10)
    np.testing.assert_allclose(found["probs"], probs, rtol=1e-10)


@pytest.mark.parametrize("holes", [0.0, 0.3])
def test_the_likelihood_rises_with_every_step(holes):
    x = table(1, n_rows=80, holes=holes)
    model, start = LatentClass(3), start_of(1, 3)
    steps = [*range(1, 21), 21, 22, 25, 40]  # beyond 20 of L-BFGS
    scores = [score_of(x, start)]
    scores += [score_of(x, model.maximize(torch.as_tensor(x), start, tol=0.0, max_iter=k)) for k in steps]
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(scores))
    assert scores[10] > scores[0] + 1


@pytest.mark.parametrize("holes", [0.0, 0.25])
def test_the_fit_is_the_best_of_many_starts_and_leaves_lbfgs_nothing(holes):
    x = table(2, holes=holes)
    fitted = BayesMPT(LatentClass(3), random_state=0).fit(x)
    assert fitted.fit_method_ == "maximize, the model's own"
    assert fitted.converged_
    assert fitted.n_iter_ == 1
    assert fitted.log_marginal_likelihood_ == pytest.approx(score_of(x, fitted.params_), abs=1e-8)
    np.testing.assert_allclose(
        fitted.score_samples(x)[:3],
        [np.log(joint_of(r, fitted.params_["weights"], fitted.params_["probs"]).sum()) for r in x[:3]],
    )
    ends = [
        score_of(x, LatentClass(3).maximize(torch.as_tensor(x), start_of(seed, 3), tol=1e-12, max_iter=1000))
        for seed in range(10)
    ]
    assert fitted.log_marginal_likelihood_ > max(ends) - 0.01
    # one more step of EM changes nothing that matters
    weights, probs = em_by_loops(x, fitted.params_, 1)
    again = score_of(x, {"weights": weights, "probs": probs})
    assert again == pytest.approx(fitted.log_marginal_likelihood_, abs=1e-4)


def test_one_class_is_the_frequencies_of_observed_codes():
    x = table(3, holes=0.2)
    fitted = BayesMPT(LatentClass(1)).fit(x)
    expected = [[np.nanmean(np.where(np.isnan(c), np.nan, c == level)) for level in range(3)] for c in x.T]
    np.testing.assert_allclose(fitted.params_["probs"][0], expected, rtol=1e-9)


def test_many_columns_and_parts_of_the_rows_give_the_same(monkeypatch):
    # 50 columns are too many for rows to be told apart as whole numbers; each row counts by itself
    x = np.tile(table(4, n_rows=30, holes=0.1), (2, 10))
    start = start_of(4, 2, n_tokens=50)
    whole = LatentClass(2).maximize(torch.as_tensor(x), start, tol=0.0, max_iter=3)
    monkeypatch.setattr("bayes_mpt.models.latent_class_em.MAX_CELLS", 1000)
    parts = LatentClass(2).maximize(torch.as_tensor(x), start, tol=0.0, max_iter=3)
    weights, probs = em_by_loops(x, start, 3)
    for found in (whole, parts):
        np.testing.assert_allclose(found["weights"], weights, rtol=1e-9)
        np.testing.assert_allclose(found["probs"], probs, rtol=1e-9, atol=2e-10)  # none is less than 1e-10


def test_a_class_without_rows_keeps_its_levels():
    x = torch.tensor([[0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    start = start_of(5, 2, n_tokens=2, n_levels=2)
    start["weights"] = torch.tensor([1.0, 0.0], dtype=torch.float64)
    found = LatentClass(2).maximize(x, start, tol=1e-9, max_iter=1)
    assert found["weights"][1] < 1e-9
    assert bool(torch.isfinite(found["probs"]).all())
    np.testing.assert_allclose(found["probs"][0], [[0.5, 0.5], [0, 1]], atol=1e-9)


def test_ctrl_c_in_a_climb_hands_over_the_best_so_far(monkeypatch):
    x, start = torch.as_tensor(table(6)), start_of(6, 4)
    model = LatentClass(4)
    before = score_of(x.numpy(), model.maximize(x, start, tol=0.0, max_iter=20))

    def press(*args, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr("bayes_mpt.models.quasi_newton.QuasiNewton._stop", press)
    with pytest.raises(KeyboardInterrupt) as pressed:
        model.maximize(x, start, tol=0.0, max_iter=30)
    assert score_of(x.numpy(), pressed.value.args[0]) >= before - 1e-9


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:2],
        lambda x: x[:3],  # fewer than classes
        lambda x: np.repeat(x[:2], 6, 0),
        lambda x: x[:, :1],
        lambda x: np.c_[x, np.full(len(x), 2.0)],
        lambda x: np.where(np.arange(len(x))[:, None] == 3, np.nan, x),
        lambda x: np.where((np.arange(5) == 1) & (np.arange(len(x)) > 0)[:, None], np.nan, x),
        lambda x: x.astype(np.float32),
    ],
    ids=["two rows", "three", "repeated", "one column", "constant", "empty row", "one cell", "float32"],
)
def test_odd_tables_have_a_likelihood_and_a_maximum(change):
    x = change(table(7, n_rows=20))
    fitted = BayesMPT(LatentClass(5, 3), random_state=0).fit(x)
    assert fitted.converged_
    assert fitted.log_marginal_likelihood_ == pytest.approx(score_of(x, fitted.params_), rel=1e-5, abs=1e-6)
    one = BayesMPT(LatentClass(1, 3), random_state=0).fit(x)
    assert fitted.log_marginal_likelihood_ >= one.log_marginal_likelihood_ - 1e-6
    empty = np.isnan(x).all(1)
    np.testing.assert_array_equal(fitted.score_samples(x)[empty], 0.0)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (table(8)[:1], "X has 1 sample while a minimum of 2 is required to estimate weights, probs"),
        (np.where(np.arange(5) == 2, np.nan, table(8)), "column 2 has no observed cell"),
        (table(8) - 1, "codes 0, 1, 2"),
        (table(8) + 5, "holds code 7, but parameter 'probs' has 3 levels"),
    ],
    ids=["one row", "empty column", "negative", "too large"],
)
def test_tables_that_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        BayesMPT(LatentClass(2, 3), random_state=0).fit(x)


@pytest.mark.parametrize("value, got", [(0.5, "0.5"), (-1.0, "-1"), (1e200, r"1e\+200")])
def test_what_is_no_code_is_named_in_fits_and_new_rows(value, got):
    x = pd.DataFrame(table(6, n_rows=30, holes=0.1), columns=["a", "b", "c", "d", "e"])
    wrong = x.copy()
    wrong.loc[4, "c"] = value
    words = f"column c must hold codes 0, 1, 2, ..., got {got} in row 4: recode .* OrdinalEncoder"
    with pytest.raises(ValueError, match=words):
        BayesMPT(LatentClass(2)).fit(wrong)
    fitted = BayesMPT(LatentClass(2), random_state=0).fit(x)
    for ask in (fitted.score_samples, fitted.predict_proba, fitted.impute):
        with pytest.raises(ValueError, match=words):
            ask(wrong)
