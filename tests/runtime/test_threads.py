"""Threads, forked processes and failures: the numbers of one thread alone, and nothing left behind."""

import os
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import joblib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from gpytorch.kernels import RBFKernel
from pyro import infer, poutine
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning

from bayes_mpt import BayesMPT, HeldOut, KernelSearch, MarginalLikelihoodSearch, compare, data_digest
from bayes_mpt.masks import UniformSize
from bayes_mpt.models import PPCA, VAE, FactorAnalysis, GaussianMixture, GaussianProcess
from bayes_mpt.models.kernels import Line
from bayes_mpt.predictors import Importance, choose
from bayes_mpt.score import CumulativeMaskedScore
from bayes_mpt.training import Ascent, Epochs, Steps

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*may not have converged:sklearn.exceptions.ConvergenceWarning",  # a few steps will do here
    "ignore:.*multi-threaded, use of fork:DeprecationWarning",  # Python says so from 3.12 on, and is right
)

rng = np.random.default_rng(0)
X = rng.normal(size=(30, 2)) @ rng.normal(size=(2, 4)) + rng.normal(size=(30, 4))
HOLES = np.where(rng.random(X.shape) < 0.2, np.nan, X)
CODES = (rng.random((40, 6)) < 0.4).astype(np.float32)
TIMES = np.linspace(0, 1, 12)[:, None]
HEIGHTS = np.sin(5 * TIMES[:, 0]) + 0.1 * rng.normal(size=12)


def student(x):
    loc = pyro.param("loc", lambda: x.mean(0))
    scale = pyro.param("scale", lambda: x.new_ones(4), constraint=dist.constraints.positive)
    w = pyro.param("w", lambda: x.new_ones(4))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.StudentT(4.0, loc + z[..., None] * w, scale).to_event(1), obs=x)


def robust(x):
    loc = pyro.param("loc", lambda: x.mean(0))
    scale = pyro.param("scale", lambda: x.new_ones(()), constraint=dist.constraints.positive)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.StudentT(4.0, loc, scale).to_event(1), obs=x)


# Ends of trainings differ in the last digits from run to run also in one thread: by where numpy puts its arrays.
SAME, TRAINED = {"rtol": 1e-12, "atol": 1e-12}, {"rtol": 1e-8, "atol": 1e-8}

CASES = {
    "no latents": (lambda: BayesMPT(robust), (X,)),
    "closed form": (lambda: BayesMPT(PPCA(1)), (X,)),
    "missing cells": (lambda: BayesMPT(FactorAnalysis(1), random_state=0, n_init=2), (HOLES,)),
    "EM": (lambda: BayesMPT(GaussianMixture(2), random_state=0), (X,)),
    "quadrature": (lambda: BayesMPT(student, training=Ascent(max_iter=3)), (X,)),
    "draws": (
        lambda: BayesMPT(
            student, predictor=Importance(4), training=Steps(max_iter=3, learning_rate=0.01), random_state=0
        ),
        (X,),
    ),
    "one vector": (lambda: BayesMPT(GaussianProcess(), training=Ascent(max_iter=5)), (TIMES, HEIGHTS)),
    "networks": (
        lambda: BayesMPT(VAE(latent_dim=1, hidden=(3,)), training=Epochs(max_epochs=1), random_state=0),
        (CODES,),
    ),
    "by masks": (
        lambda: BayesMPT(PPCA(1), masks=UniformSize(2), training=Steps(max_iter=8), random_state=0),
        (X,),
    ),
}


@pytest.fixture(autouse=True)
def _often_another_thread():
    """Threads are exchanged ten times as often as by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    pyro.clear_param_store()
    sys.setswitchinterval(before)


def state():
    """What a process has one of."""
    store = pyro.get_param_store()
    return (
        {name: value.detach().tolist() for name, value in store.items()},
        list(poutine.runtime._PYRO_STACK),
        list(poutine.runtime._DIM_ALLOCATOR._stack),
        (dist.is_validation_enabled(), infer.is_validation_enabled(), poutine.is_validation_enabled()),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.get_rng_state().tolist(),
        list(warnings.filters),
    )


def in_threads(call, arguments, n_threads=8):
    with ThreadPoolExecutor(n_threads) as pool:
        return list(pool.map(call, arguments))


def numbers(name):
    make, data = CASES[name]
    fitted = make().fit(*data)
    return fitted.log_marginal_likelihood_, fitted.score_samples(*data)


# ------------------------------------------------------------------------------------------------------ threads


@pytest.mark.slow
def test_fits_of_eight_threads_are_those_of_one():
    truth = {name: numbers(name) for name in CASES}
    before = state()
    for name, (lml, rows) in zip(CASES, in_threads(numbers, CASES), strict=True):
        np.testing.assert_allclose(lml, truth[name][0], err_msg=name, **TRAINED)
        np.testing.assert_allclose(rows, truth[name][1], err_msg=name, **TRAINED)
    assert state() == before


@pytest.mark.slow
def test_one_fitted_estimator_answers_eight_threads():
    fitted = {name: make().fit(*data) for name, (make, data) in CASES.items()}
    calls = {
        "score": lambda name: fitted[name].score_samples(*CASES[name][1]),
        "masks": lambda name: fitted[name].estimate(*CASES[name][1], n_replicates=2).total,
        "digest": lambda name: data_digest(CASES[name][1][0]),
        "impute": lambda name: fitted["no latents"].impute(HOLES),
        "transform": lambda name: fitted["draws"].transform(HOLES),
        "predict": lambda name: fitted["one vector"].predict(TIMES + 0.01, return_std=True)[1],
        "labels": lambda name: fitted["EM"].predict_proba(X),
        "criterion": lambda name: fitted["EM"].bic(X),
        "sample": lambda name: fitted["networks"].sample(3),
        "draw": lambda name: fitted["draws"].sample_missing(HOLES, n_samples=2),
        "refit": lambda name: fitted["no latents"].refit(X).score_samples(HOLES),
    }
    asked = [(what, name) for what in ("score", "masks", "digest") for name in CASES]
    asked = [
        (what, name) for what, name in asked if not (what == "masks" and name == "draws")
    ]  # its guide sees all
    asked += [(what, "") for what in list(calls)[3:]]
    truth = [calls[what](name) for what, name in asked]
    before = state()
    found = in_threads(lambda a: calls[a[0]](a[1]), asked)
    for (what, name), got, right in zip(asked, found, truth, strict=True):
        if what == "digest":
            assert got == right
        else:
            np.testing.assert_allclose(got, right, err_msg=f"{what} {name}", **SAME)
    assert state() == before


def test_a_refit_beside_scores_gives_the_numbers_of_the_old_or_the_new_fit():
    rows = [X[:20], X[10:]]
    model = BayesMPT(robust, training=Ascent(max_iter=2))
    truth = [model.fit(x).score_samples(X) for x in rows]

    def call(i):
        return None if i % 2 and model.fit(rows[i // 2 % 2]) else model.score_samples(X)

    for scores in in_threads(call, range(16)):
        assert scores is None or any(np.allclose(scores, right, **TRAINED) for right in truth)
    assert not np.allclose(*truth, rtol=1e-4)


def test_losses_and_predictors_of_eight_threads():
    x = torch.as_tensor(X)
    loss = CumulativeMaskedScore()(student, None, x)
    truth = loss(x).detach()
    joint = choose(student, (x,)).read((x,)).score().detach()

    def call(i):
        return loss(x).detach() if i % 2 else choose(student, (x,)).read((x,)).score().detach()

    for i, found in enumerate(in_threads(call, range(8))):
        torch.testing.assert_close(found, truth if i % 2 else joint, **SAME)


def test_a_thread_inside_may_ask_again():
    model = BayesMPT(student, training=Ascent(max_iter=2)).fit(X)
    truth = model.score(X)
    with model.read_rows(X) as predictor:
        assert model.score(X) == truth
        assert float(predictor.score().mean()) == pytest.approx(truth, rel=1e-12)


# ------------------------------------------------------------------------------------------------------ searches


@pytest.mark.parametrize(
    ("estimator", "grid", "settings"),
    [
        (BayesMPT(PPCA()), {"model__n_components": [0, 1, 2]}, {"evidence": HeldOut(2)}),
        (BayesMPT(robust), {"training": [Ascent(n) for n in (2, 3, 4)]}, {"evidence": "train"}),
    ],
    ids=["held-out", "train"],
)
def test_a_search_in_threads_is_the_serial_one(estimator, grid, settings):
    truth = MarginalLikelihoodSearch(estimator, grid, random_state=0, **settings).fit(X).comparison_
    before = state()
    with joblib.parallel_config(backend="threading"):
        search = MarginalLikelihoodSearch(estimator, grid, random_state=0, n_jobs=3, **settings).fit(X)
    assert state() == before
    assert list(search.comparison_.index) == list(truth.index)
    np.testing.assert_allclose(search.comparison_["lml"], truth["lml"], **TRAINED)


@pytest.mark.slow
def test_kernel_searches_and_comparisons_beside_each_other():
    def kernels(_):
        return (
            KernelSearch(base=[RBFKernel(), Line()], max_depth=1, evidence="train")
            .fit(TIMES, HEIGHTS)
            .comparison_["lml"]
        )

    fitted = {k: BayesMPT(PPCA(k)).fit(X) for k in (1, 2)}
    calls = [kernels, lambda _: compare({str(k): m for k, m in fitted.items()}, X)["lml"]]
    truth = [call(0) for call in calls]
    for i, found in enumerate(in_threads(lambda i: calls[i % 2](i), range(4), 4)):
        np.testing.assert_allclose(found, truth[i % 2], **TRAINED)


def test_two_fits_of_one_search_do_not_mix():
    search = MarginalLikelihoodSearch(
        BayesMPT(robust), {"training": [Ascent(2), Ascent(3)]}, evidence="train"
    )
    truth = [search.fit(x).comparison_ for x in (X, X[:20])]
    in_threads(lambda i: search.fit(X if i % 2 else X[:20]), range(4), 4)
    found = search.comparison_["lml"]
    assert search.best_estimator_.log_marginal_likelihood_ == found.max() == search.cv_results_["lml"].max()
    assert any(np.allclose(found, right["lml"], **TRAINED) for right in truth)


@pytest.mark.slow
def test_a_backend_that_gives_results_at_the_end_only():
    """Its candidates come in rounds."""
    search = MarginalLikelihoodSearch(BayesMPT(PPCA()), {"model__n_components": [0, 1, 2]}, n_jobs=2)
    alone = clone(search).set_params(n_jobs=1).fit(X)
    with joblib.parallel_config(backend="multiprocessing"):
        try:
            search.fit(X)
        except ValueError as error:
            assert FORKED in str(error)
            return
    np.testing.assert_allclose(search.cv_results_["lml"], alone.cv_results_["lml"], rtol=1e-9)


# -------------------------------------------------------------------------------------------------------- forks


# What torch does not do after a fork where there is another device, as in tests of one that ran before these.
FORKED = "RuntimeError: this process was forked"


def in_child(call, seconds=30.0):
    """What a forked process has found; an error where it hangs."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            found = repr(call())
        except BaseException as error:
            found = f"{type(error).__name__}: {error}"
        os.write(writer, found.encode())
        os._exit(0)
    os.close(writer)
    end = time.monotonic() + seconds
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the forked process hangs")
        time.sleep(0.01)
    with os.fdopen(reader) as file:
        return file.read()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_process_forked_beside_a_fit_finds_the_right_numbers():
    truth = BayesMPT(robust).fit(X).log_marginal_likelihood_
    pyro.param("users", torch.ones(2))
    before, inside, leave = state(), threading.Event(), threading.Event()

    def waits(x):
        with poutine.scale(scale=1.0), pyro.validation_enabled(False):
            pyro.param("users", x.new_zeros(3))
            inside.set()
            leave.wait(60)
            raise ValueError("enough")

    def fit():
        with pytest.raises(ValueError, match="enough"):
            BayesMPT(waits).fit(X)

    def child():
        here = state()[:6] == before[:6] and state()[6] == before[6]
        return here, BayesMPT(robust).fit(X).log_marginal_likelihood_

    thread = threading.Thread(target=fit)
    thread.start()
    try:
        assert inside.wait(30)
        found = in_child(child)
    finally:
        leave.set()
        thread.join()
    assert state() == before
    if not found.startswith(FORKED):
        same, lml = eval(found)
        assert same and lml == pytest.approx(truth, rel=1e-8)
    pyro.clear_param_store()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_does_not_wait_for_threads_that_were_not_forked():
    fitted, rows = BayesMPT(robust).fit(X), np.tile(X, (2000, 1))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        truth = fitted.score(rows)  # this is where OpenMP starts a pool of them
        found = in_child(lambda: (fitted.score(rows), torch.get_num_threads()))
    finally:
        torch.set_num_threads(before)
    score, n_threads = eval(found)
    assert score == pytest.approx(truth, rel=1e-12) and n_threads == 2


# ----------------------------------------------------------------------------------------------------- failures


class Fails:
    """A program that upsets everything and fails at its n-th run."""

    def __init__(self, run, error):
        self.run, self.error, self.n = run, error, 0

    def __call__(self, x):
        self.n += 1
        if self.n >= self.run:
            poutine.scale(scale=2.0).__enter__()
            pyro.plate("upset", 2, dim=-3).__enter__()
            pyro.param("left", x.new_zeros(3))
            pyro.enable_validation(False)
            torch.set_default_dtype(torch.float16)
            torch.set_num_threads(torch.get_num_threads() + 1)
            torch.manual_seed(7)
            raise self.error
        robust(x)


@pytest.mark.parametrize(
    "error", [ValueError("no"), ZeroDivisionError("no"), KeyboardInterrupt(), SystemExit(1)]
)
def test_nothing_is_left_behind_by_a_program_that_fails(error):
    pyro.param("users", torch.ones(2))
    BayesMPT(Fails(10**9, error), training=Ascent(max_iter=3)).fit(
        X
    )  # what is imported at first use may add filters of warnings
    before = state()
    whole = Fails(10**9, error)
    fitted = BayesMPT(whole, training=Ascent(max_iter=3)).fit(X)
    n_runs = whole.n
    assert state() == before
    for run in {
        1,
        2,
        n_runs // 2,
        n_runs,
    }:  # the first ones find out what it is; then it is trained, then scored
        with pytest.raises((type(error), ConvergenceWarning)):
            BayesMPT(Fails(run, error), training=Ascent(max_iter=3)).fit(X)
        assert state() == before, run
    right = fitted.score_samples(X)
    for call in (fitted.score_samples, fitted.transform, fitted.impute, fitted.estimate, fitted.refit):
        fitted.fitted_model_.run = 0
        fitted.set_params(model=Fails(1, error))
        with pytest.raises(type(error)):
            call(X)
        assert state() == before, call.__name__
    fitted.fitted_model_.run = 10**9
    np.testing.assert_allclose(fitted.score_samples(X), right, **SAME)
    pyro.clear_param_store()


def test_nothing_is_left_behind_by_guides_bad_rows_and_searches_that_fail():
    def guide(x):
        pyro.param("left", x.new_zeros(3))
        torch.set_default_dtype(torch.float16)
        raise KeyError("guide")

    calls = [
        lambda: BayesMPT(student, guide=guide, predictor=Importance(4)).fit(X),
        lambda: BayesMPT(robust).fit([["a", "b"]]),
        lambda: BayesMPT(robust).fit(np.full((4, 4), np.inf)),
        lambda: BayesMPT(robust).fit(X).score_samples(X[:, :2]),
        lambda: BayesMPT(robust).partial_fit(X).partial_fit(X),
        lambda: MarginalLikelihoodSearch(
            BayesMPT(Fails(1, ValueError("no"))), {"training": [Ascent(1), Ascent(2)]}
        ).fit(X),
        lambda: choose(Fails(2, ValueError("no")), (torch.as_tensor(X),)),
        lambda: CumulativeMaskedScore()(Fails(2, ValueError("no")), None, torch.as_tensor(X)),
    ]
    before = state()
    for i, call in enumerate(calls):
        with pytest.raises(Exception):  # noqa: B017  # which error is for other tests
            call()
        assert state()[1:] == before[1:], i
        assert i == 6 or state()[0] == before[0], i  # `choose` fills the user's own store
        pyro.clear_param_store()
