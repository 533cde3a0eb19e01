"""Trainings and rules as objects: in grids, refused by name, and with the numbers that the ways themselves give."""

import warnings
from functools import partial

import joblib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
from gpytorch.kernels import MaternKernel, ScaleKernel
from scipy.stats import multivariate_normal
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, KFold

from bayes_mpt import (
    Auto,
    BayesMPT,
    Cumulative,
    HeldOut,
    Integrated,
    KernelSearch,
    Laplace,
    MarginalLikelihoodSearch,
    Train,
    compare,
)
from bayes_mpt.masks import UniformSize
from bayes_mpt.models import PPCA, VAE, FactorAnalysis, GaussianProcess
from bayes_mpt.predictors import Importance
from bayes_mpt.training import Ascent, Epochs, Steps
from bayes_mpt.warnings import DivergenceWarning, HeavyTailWarning, NotConvergedWarning

RNG = np.random.default_rng(7)
X = RNG.normal(size=(60, 2)) @ RNG.normal(size=(2, 5)) + 0.5 * RNG.normal(size=(60, 5))
HOLES = np.where(RNG.random(X.shape) < 0.15, np.nan, X)


def student(x):
    loc = pyro.param("loc", lambda: x.mean(0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.StudentT(x.new_tensor(4.0), 0.0, 1.0))
        pyro.sample("x", dist.Normal(loc + z[..., None], 1.0).to_event(1), obs=x)


# ---------------------------------------------------------------------------------------------------------- trainings


def test_a_grid_sets_options_of_the_training():
    grid = {"training__tol": [1e-3, 1e-10]}
    search = GridSearchCV(BayesMPT(FactorAnalysis(1), training=Ascent()), grid, cv=2).fit(X)
    assert [p["training__tol"] for p in search.cv_results_["params"]] == [1e-3, 1e-10]
    estimator = clone(BayesMPT(VAE(1), training=Epochs(patience=3)))
    assert estimator.set_params(training__batch_size=7).training.get_params()["batch_size"] == 7
    whole = BayesMPT().set_params(training=Steps(), training__learning_rate=0.1)  # both at once
    assert whole.training.learning_rate == 0.1


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (
            {"training__learning_rate": 0.1},
            r"training is None: give the estimator training=Steps\(\) or training=Epochs",
        ),
        ({"training__patience": 3}, r"training is None: give the estimator training=Epochs\(\)$"),
        ({"n_components": 3}, "write model__n_components"),
        ({"max_iter": 3}, "write training__max_iter"),
        ({"guide__x": 3}, "guide is None"),
    ],
)
def test_a_name_that_is_of_a_part_says_what_to_write(params, said):
    estimator = BayesMPT(PPCA(1))
    with pytest.raises(ValueError, match=said):
        estimator.set_params(**params)
    with pytest.raises(ValueError, match=said):
        GridSearchCV(estimator, {k: [v] for k, v in params.items()}, cv=2, error_score="raise").fit(X)


def test_a_training_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"Importance draws.*training=Steps"):
        BayesMPT(student, predictor=Importance(5), training=Ascent(), random_state=0).fit(X)
    with pytest.raises(ValueError, match=r"masks=UniformSize.*drawn anew.*training=Steps"):
        BayesMPT(PPCA(1), masks=UniformSize(3), training=Ascent(), random_state=0).fit(X)
    with pytest.raises(ValueError, match=r"Epochs.*minibatches of independent rows"):
        BayesMPT(PPCA(1), training=Epochs(), random_state=0).fit(X)


@pytest.mark.slow
def test_steps_on_the_exact_score_end_at_its_maximum():
    """By Adam, where the closed form is known."""
    model = BayesMPT(PPCA(1), training=Steps(tol=1e-4), random_state=0).fit(X)
    assert model.fit_method_ == "adam"
    assert model.score(X) == pytest.approx(_ppca(X, 1), abs=1e-4)


def _ppca(x, k):
    """Mean log-density at the closed-form maximum."""
    value, vector = np.linalg.eigh(np.cov(x.T, bias=True))
    noise = value[: x.shape[1] - k].mean()
    value = np.r_[np.full(x.shape[1] - k, noise), value[x.shape[1] - k :]]
    return multivariate_normal(x.mean(0), (vector * value) @ vector.T).logpdf(x).mean()


def test_iterations_of_em_are_counted():
    few = BayesMPT(PPCA(1), n_init=1).fit(HOLES)
    assert (
        few.n_iter_ > len(few.history_) >= 1
    )  # L-BFGS goes on from EM, whose steps have no score of the rows


# -------------------------------------------------------------------------------------------------------------- rules


@pytest.mark.slow
def test_a_rule_is_its_name_at_its_defaults():
    grid = {"model__n_components": [0, 1]}
    search = partial(MarginalLikelihoodSearch, BayesMPT(PPCA(1)), grid, random_state=0)
    for name, rule in {"laplace": Laplace(), "heldout": HeldOut(), "train": Train(), "auto": Auto()}.items():
        one, two = search(evidence=name).fit(X), search(evidence=rule).fit(X)
        np.testing.assert_array_equal(one.comparison_["lml"], two.comparison_["lml"])
        assert one.evidence_ == two.evidence_
    assert search(evidence=HeldOut()).set_params(evidence__cv=3).fit(X).n_splits_ == 3


def test_folds_of_a_splitter_against_a_loop():
    """log p(fold | a fit to the others), dense."""
    folds = KFold(3)
    search = MarginalLikelihoodSearch(
        BayesMPT(PPCA()), {"model__n_components": [0]}, evidence=HeldOut(cv=folds), error_score="raise"
    ).fit(X)
    want = 0.0
    for train, test in folds.split(X):
        mean = X[train].mean(0)  # K = 0: one variance for all columns
        variance = np.square(X[train] - mean).mean()
        want += multivariate_normal(mean, variance * np.eye(X.shape[1])).logpdf(X[test]).sum()
    assert search.cv_results_["lml"][0] == pytest.approx(want, abs=1e-8)


@pytest.mark.slow
def test_a_smaller_error_is_sampled_for():
    x = np.linspace(0, 3, 12)[:, None]
    y = np.sin(3 * x[:, 0]) + 0.1 * RNG.normal(size=12)
    model = BayesMPT(GaussianProcess(), penalty=True, random_state=0).fit(x, y)
    rough, fine = model.integrated(x, y, se=0.5), model.integrated(x, y, se=0.02)
    assert fine.se < 0.05 and fine.n_draws >= rough.n_draws
    found = compare({"one": model}, x, y, evidence=Integrated(se=0.02), random_state=0)
    assert found["se"].iloc[0] < 0.05


@pytest.mark.parametrize("evidence", ["waic", 3, HeldOut, Auto])
def test_evidence_that_is_no_rule(evidence):
    model = BayesMPT(PPCA(1)).fit(X)
    with pytest.raises(ValueError, match=r"evidence"):
        compare({"one": model}, X, evidence=evidence)
    with pytest.raises(ValueError, match=r"evidence"):
        MarginalLikelihoodSearch(BayesMPT(PPCA()), {"model__n_components": [1]}, evidence=evidence).fit(X)
    with pytest.raises(ValueError, match="evidence") as error:
        KernelSearch(evidence=evidence).fit(X[:, :1], X[:, 1])
    assert "MarginalLikelihoodSearch" not in str(error.value)
    with pytest.raises(ValueError, match="heldout"):
        compare({"one": model}, X, evidence=Cumulative())


@pytest.mark.parametrize("wrong", [PPCA(1), "ppca", BayesMPT], ids=["program", "text", "class"])
def test_what_is_no_estimator_is_named(wrong):
    said = r"wrap the program, BayesMPT\(PPCA\(" if isinstance(wrong, PPCA) else "must be a BayesMPT"
    for call in (
        lambda: MarginalLikelihoodSearch(wrong, {"model__n_components": [1]}).fit(X),
        lambda: KernelSearch(wrong).fit(X[:, :1], X[:, 1]),
        lambda: compare({"one": wrong}, X),
    ):
        with pytest.raises(TypeError, match=said):
            call()


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    grid = {"model__n_components": [1]}
    MarginalLikelihoodSearch(BayesMPT(PPCA()), grid, checkpoint_dir="~/runs").fit(X)
    training = Epochs(max_epochs=1, checkpoint="~/epochs")
    codes = (X > 0).astype(float)
    with pytest.warns(HeavyTailWarning), pytest.warns(NotConvergedWarning):
        BayesMPT(VAE(1, hidden=(3,)), training=training, random_state=0).fit(codes)
    assert {p.name for p in tmp_path.iterdir()} == {"runs", "epochs"}


# ----------------------------------------------------------------------------------------------------------- warnings


def warned(call):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        call()
    return said


@pytest.mark.parametrize("n_jobs", [1, 2], ids=["one job", "threads"])
def test_a_warning_points_here_and_names_its_candidate(n_jobs):
    model = BayesMPT(masks=UniformSize(2), training=Steps(max_iter=3), random_state=0)
    (said,) = warned(lambda: clone(model).set_params(model=PPCA(1)).fit(X))
    assert said.category is NotConvergedWarning and issubclass(said.category, ConvergenceWarning)
    assert said.filename == __file__ and "candidate" not in str(said.message)
    assert "training=Steps(max_iter=...)" in str(said.message)
    grid = {"model": [PPCA(1), PPCA(2)]}
    search = MarginalLikelihoodSearch(model, grid, evidence="train", random_state=0, n_jobs=n_jobs)
    with joblib.parallel_config(backend="threading"):
        found = warned(lambda: search.fit(X))
    assert sorted(str(w.message).rpartition("(candidate ")[2] for w in found) == [
        "'PPCA(n_components=1)')",
        "'PPCA(n_components=2)')",
    ]
    assert n_jobs > 1 or all(w.filename == __file__ for w in found)


def test_estimates_that_diverge_are_no_matter_of_an_integral():
    x = np.linspace(0, 3, 20)[:, None]  # a curve without noise
    kernel = ScaleKernel(MaternKernel(nu=2.5))
    search = partial(MarginalLikelihoodSearch, BayesMPT(GaussianProcess()), {"model__kernel": [kernel]})
    found = {
        rule: [w.category for w in warned(lambda rule=rule: search(evidence=rule).fit(x, np.sin(x[:, 0])))]
        for rule in ("train", "integrated")
    }
    assert DivergenceWarning in found["train"] and DivergenceWarning not in found["integrated"]
