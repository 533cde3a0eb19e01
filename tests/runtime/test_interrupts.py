"""Ctrl-C, pressed with real signals: what a fit and a search leave behind."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings

import joblib
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.poutine.runtime import _PYRO_STACK
from scipy.special import logsumexp
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted
from truths import factor_covariance, log_density, mixture_log_terms

from bayes_mpt import BayesMPT, HeldOut, KernelSearch, MarginalLikelihoodSearch, compare
from bayes_mpt.masks import UniformSize
from bayes_mpt.models import PPCA, VAE, FactorAnalysis, GaussianMixture
from bayes_mpt.runtime.interrupts import check_stop, interruptible
from bayes_mpt.runtime.progress import Task
from bayes_mpt.runtime.tasks import side_by_side
from bayes_mpt.training import Epochs, Steps

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 1)) @ RNG.normal(size=(1, 4)) * 2 + RNG.normal(size=(60, 4))
WIDE = RNG.normal(size=(80, 1)) @ RNG.normal(size=(1, 6)) + RNG.normal(size=(80, 6))
HOLES = np.where(RNG.random(WIDE.shape) < 0.15, np.nan, WIDE)
OLD = X[:30, :3]


@pytest.fixture(autouse=True)
def ctrl_c():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press():
    os.kill(os.getpid(), signal.SIGINT)


class Pressed:
    """Calls something, and presses Ctrl-C at the start of some of its calls."""

    def __init__(self, call, *at):
        self.call, self.at, self.n = call, set(at), 0

    def __call__(self, *args, **kwargs):
        self.n += 1
        if self.n in self.at:
            press()
        return self.call(*args, **kwargs)


class Program(Pressed):
    """A program in some of whose runs Ctrl-C is pressed."""

    def __call__(self, x):
        return super().__call__(x)


def tied(x):
    """Noise shared by two columns each: no closed form, so L-BFGS."""
    n_tokens = x.shape[1]
    loc = pyro.param("loc", lambda: x.new_zeros(n_tokens))
    loading = pyro.param("loading", lambda: torch.randn(n_tokens, 1, dtype=x.dtype))
    noise = pyro.param("noise", lambda: x.new_ones(2), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
        scale = noise[torch.arange(n_tokens) // 2].sqrt()
        pyro.sample("x", dist.Normal(loc + z @ loading.T, scale).to_event(1), obs=x)


def factor_scores(model, x):
    return log_density(x, model.mean_, factor_covariance(model.components_, model.noise_variance_))


def is_interrupted(model, x):
    """Whether this is a whole fit to x, cut short: what is said of the rows is that of the parameters."""
    assert model.interrupted_ and not model.converged_
    assert model.n_features_in_ == x.shape[1] and model.n_iter_ >= 1 and model.history_
    np.testing.assert_allclose(model.score_samples(x), factor_scores(model, x), atol=1e-9)
    assert model.log_marginal_likelihood_ == pytest.approx(factor_scores(model, x).sum(), abs=1e-7)


@pytest.mark.parametrize("refit", [False, True])
def test_a_fit_keeps_its_best(refit):
    program = Program(tied)
    model = BayesMPT(program, random_state=0, n_init=1)
    if refit:
        model.fit(OLD)
        assert not model.interrupted_
    best = BayesMPT(tied, random_state=0, n_init=1).fit(X)
    program.n, program.at = 0, {25}
    with pytest.raises(KeyboardInterrupt):
        model.fit(X)
    is_interrupted(model, X)
    assert model.score(X) < best.score(X) - 1e-9
    program.at = set()
    model.fit(X)
    assert model.converged_ and not model.interrupted_
    assert model.score(X) == pytest.approx(best.score(X), abs=1e-9)


def test_a_fit_on_masks_keeps_its_best():
    program = Program(tied, 120)
    model = BayesMPT(program, masks=UniformSize(4), random_state=0)
    with pytest.raises(KeyboardInterrupt):
        model.fit(X)
    is_interrupted(model, X)


def test_a_later_start_keeps_the_best_that_has_ended():
    first = Program(tied)
    one = BayesMPT(first, random_state=0, n_init=1).fit(X)
    assert one.converged_
    model = BayesMPT(Program(tied, first.n + 8), random_state=0, n_init=3)
    with pytest.raises(KeyboardInterrupt):
        model.fit(X)
    is_interrupted(model, X)
    assert model.score(X) >= one.score(X) - 1e-12


@pytest.mark.parametrize("late", [False, True])
def test_em_keeps_its_best(monkeypatch, late):
    """In the starts, and in the climb from the best of them."""
    model = BayesMPT(PPCA(2), random_state=0).fit(HOLES[:30])
    pressed = Pressed(np.linalg.cholesky)
    monkeypatch.setattr(np.linalg, "cholesky", pressed)
    undisturbed = BayesMPT(PPCA(2), random_state=0).fit(HOLES)
    pressed.n, pressed.at = 0, {pressed.n - 2 if late else 3}
    with pytest.raises(KeyboardInterrupt):
        model.fit(HOLES)
    is_interrupted(model, HOLES)
    assert model.fit_method_ == "em"
    assert model.score(HOLES) < undisturbed.score(HOLES)


def test_a_mixture_keeps_its_best(monkeypatch):
    """Its own EM, in `climb`."""
    model = BayesMPT(GaussianMixture(2), random_state=0)
    climb = GaussianMixture.climb

    def pressed(self, x, params, **settings):
        amax = Pressed(torch.Tensor.amax, 3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "amax", lambda t, *args, **named: amax(t, *args, **named))
            return climb(self, x, params, **settings)

    monkeypatch.setattr(GaussianMixture, "climb", pressed)
    with pytest.raises(KeyboardInterrupt):
        model.fit(X)
    assert model.interrupted_ and not model.converged_
    p = model.params_
    terms = mixture_log_terms(X, p["weights"], p["loc"], p["scale_tril"] @ p["scale_tril"].mT)
    np.testing.assert_allclose(model.score_samples(X), logsumexp(terms, 0), atol=1e-9)
    assert model.log_marginal_likelihood_ == pytest.approx(model.score_samples(X).sum(), abs=1e-7)


class OwnClimb:
    """A mean that is climbed to by half of the way at a time, with Ctrl-C on it."""

    def __call__(self, x):
        loc = pyro.param("loc", lambda: x.new_zeros(x.shape[1]))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(x.new_ones(2)))
            pyro.sample("x", dist.Normal(loc + z[..., None], 1.0).to_event(1), obs=x)

    def maximize(self, x, params, *, tol, max_iter):
        half = 0.5 * (params["loc"] + x.mean(0) - 0.5)
        raise KeyboardInterrupt({"loc": half})


def test_a_model_of_ones_own_may_keep_its_best():
    model = BayesMPT(OwnClimb())
    with pytest.raises(KeyboardInterrupt):
        model.fit(X)
    assert model.interrupted_ and not model.converged_
    np.testing.assert_allclose(model.params_["loc"], 0.5 * (X.mean(0) - 0.5), atol=1e-12)


@pytest.mark.filterwarnings("ignore:the importance weights")  # of a network that has learnt little
def test_epochs_keep_their_best():
    model = BayesMPT(
        VAE(1, likelihood="gaussian", hidden=(4,)),
        training=Epochs(max_epochs=50, batch_size=20),
        random_state=0,
    )
    model.set_callbacks(PressAt(3))
    with pytest.raises(KeyboardInterrupt):
        model.fit(X)
    assert model.interrupted_ and not model.converged_ and model.n_iter_ == 3
    assert np.isfinite(model.score(X))


class PressAt:
    """A callback of scikit-learn that presses Ctrl-C after an iteration."""

    def __init__(self, at):
        self.at, self.n = at, 0

    def setup(self, estimator, context): ...

    def teardown(self, estimator, context): ...

    def on_fit_task_begin(self, estimator, context): ...

    def on_fit_task_end(self, estimator, context):
        self.n += context.task_name == "iteration"
        if self.n == self.at:
            self.n += 1
            press()


def test_partial_fit_is_whole_too():
    program = Program(tied)
    model = BayesMPT(program, random_state=0).partial_fit(X[:30])
    program.n, program.at = 0, {25}
    with pytest.raises(KeyboardInterrupt):
        model.partial_fit(X[30:])
    assert model.interrupted_ and not model.converged_
    assert model.log_marginal_likelihood_ == pytest.approx(factor_scores(model, X).sum(), abs=1e-7)


# ------------------------------------------------------------------------------------------------- nothing happened


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("at", [1, 3])
def test_before_the_first_iteration_nothing_has_happened(refit, at):
    program = Program(tied)
    model = BayesMPT(program, random_state=0)
    if refit:
        model.fit(OLD)
    before = dict(vars(model))
    program.n, program.at = 0, {at}
    with pytest.raises(KeyboardInterrupt):
        model.fit(X)
    assert vars(model).keys() == before.keys() and all(vars(model)[k] is before[k] for k in before)


def test_a_second_press_gives_the_old_fit_back():
    """While the scores of the interrupted one are computed."""
    program = Program(tied)
    model = BayesMPT(program, random_state=0).fit(OLD)
    before = dict(vars(model))
    program.n, program.at = 0, {25, 26}
    with pytest.raises(KeyboardInterrupt):
        model.fit(X)
    assert program.n == 26
    assert vars(model).keys() == before.keys() and all(vars(model)[k] is before[k] for k in before)


def test_a_press_after_the_training_loses_nothing():
    program = Program(tied)
    best = BayesMPT(program, random_state=0).fit(X)
    model = BayesMPT(Program(tied, program.n), random_state=0)
    with pytest.raises(KeyboardInterrupt):
        model.fit(X)
    is_interrupted(model, X)
    assert model.score(X) == best.score(X)


def test_a_program_that_swallows_the_press_does_not_swallow_it():
    calls = 0

    def program(x):
        nonlocal calls
        calls += 1
        if calls == 25:
            try:
                press()
            except KeyboardInterrupt:
                pass
        tied(x)

    model = BayesMPT(program, random_state=0)
    with pytest.raises(KeyboardInterrupt):
        model.fit(X)
    assert model.interrupted_ and not model.converged_


@pytest.mark.parametrize("at", [2, 25, 26])
def test_nothing_is_left_behind(at):
    network = torch.nn.Linear(1, 4).double()

    def program(x):
        pyro.module("network", network)
        noise = pyro.param("noise", lambda: x.new_ones(2), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            scale = noise[torch.arange(4) // 2].sqrt()
            pyro.sample("x", dist.Normal(network(z), scale).to_event(1), obs=x)

    def state():
        settings = torch.get_default_dtype(), torch.get_num_threads(), signal.getsignal(signal.SIGINT)
        return *settings, list(_PYRO_STACK), dist.is_validation_enabled(), list(pyro.get_param_store())

    pyro.clear_param_store()
    pyro.param("mine", torch.ones(2))
    before, random = state(), torch.get_rng_state()
    weights = [p.detach().clone() for p in network.parameters()]
    with pytest.raises(KeyboardInterrupt):
        BayesMPT(Program(program, at, *([27] if at == 26 else [])), random_state=0).fit(X)
    assert state() == before
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(a, b) for a, b in zip(weights, network.parameters(), strict=True))
    pyro.clear_param_store()


@pytest.mark.parametrize("at", ["__enter__", "__exit__"])
def test_a_context_is_entered_and_left_as_a_whole(at):
    """Pyro's handlers put themselves on a stack: a press right after that would leave them there."""
    stack = []

    class Handler:
        def __enter__(self):
            stack.append(self)
            if at == "__enter__":
                press()

        def __exit__(self, *error):
            if at == "__exit__":
                press()
            stack.pop()

    with pytest.raises(KeyboardInterrupt), interruptible():
        with Handler():
            time.sleep(0.2)
        time.sleep(0.2)
    assert not stack
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --------------------------------------------------------------------------------------------------------- searches


def slow_second(path=None):
    """Two candidates of one program; in the second one Ctrl-C is pressed."""
    second = Program(tied)
    grid = {"model": [PPCA(1), second, FactorAnalysis(1)]}
    search = MarginalLikelihoodSearch(
        BayesMPT(random_state=0), grid, evidence="train", checkpoint_dir=path, random_state=0
    )
    return search, second


@pytest.mark.parametrize("refit", [False, True])
def test_a_search_keeps_what_was_finished(refit):
    search, second = slow_second()
    if refit:
        search.fit(OLD)
    before = dict(vars(search))
    second.n, second.at = 0, {25}
    with pytest.raises(KeyboardInterrupt):
        search.fit(X)
    table = search.partial_
    assert list(table.index) == ["PPCA"]
    assert table["lml"].isna().all() and (table["fit_time"] > 0).all()
    assert list(table["diag"]) == ["fitted, not scored"]
    after = {k: v for k, v in vars(search).items() if k != "partial_"}
    assert after.keys() == before.keys() and all(after[k] is before[k] for k in before)
    if not refit:
        with pytest.raises(NotFittedError):
            check_is_fitted(search)
        with pytest.raises(NotFittedError):
            search.score(X)
    second.at = set()
    assert not hasattr(search.fit(X), "partial_")
    assert set(search.comparison_["diag"]) == {"train"}


def test_an_interrupted_search_goes_on_from_its_checkpoints(tmp_path, monkeypatch):
    """In the folds: the first candidate has its evidence, the others have their fits."""

    def search(path):
        grid = {"model__n_components": [0, 1, 2]}
        return MarginalLikelihoodSearch(
            BayesMPT(FactorAnalysis(), random_state=0),
            grid,
            evidence=HeldOut(cv=3),
            random_state=0,
            checkpoint_dir=path,
        )

    fit = BayesMPT.fit
    counted = Pressed(fit)
    monkeypatch.setattr(BayesMPT, "fit", lambda *args: counted(*args))
    want = search(None).fit(X).comparison_
    assert counted.n == 3 + 9
    counted.n, counted.at = 0, {3 + 3 + 2}
    interrupted = search(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        interrupted.fit(X)
    partial = interrupted.partial_
    first = partial["lml"].dropna()
    assert (
        list(partial.index) == [f"n_components={k}" for k in range(3)]
        and list(first.index) == partial.index[:1]
    )
    assert first.iloc[0] == want.loc[first.index[0], "lml"]
    counted.n, counted.at = 0, set()
    pd.testing.assert_frame_equal(search(tmp_path).fit(X).comparison_, want)
    assert counted.n == 6  # the folds of two


def test_a_kernel_search_keeps_what_was_finished(monkeypatch):
    from gpytorch.kernels import RBFKernel

    from bayes_mpt.models.kernels import Line

    x = np.linspace(0, 3, 15)[:, None]
    y = np.sin(3 * x[:, 0]) + x[:, 0]
    search = KernelSearch(base=[RBFKernel(), Line()], max_depth=2, evidence="train")
    fit = BayesMPT.fit
    counted = Pressed(fit, 4)
    monkeypatch.setattr(BayesMPT, "fit", lambda *args: counted(*args))
    with warnings.catch_warnings(), pytest.raises(KeyboardInterrupt):
        warnings.filterwarnings("ignore", "the estimate of parameter")
        search.fit(x, y)
    assert list(search.partial_["depth"]) == [1, 1, 2]
    assert list(search.partial_["lml"].isna()) == [False, False, True]
    with pytest.raises(NotFittedError):
        check_is_fitted(search)


CHILD = """
    import logging, sys, time
    import numpy as np
    import pyro, torch
    import pyro.distributions as dist
    from bayes_mpt import BayesMPT, MarginalLikelihoodSearch
    from bayes_mpt.models import PPCA

    def slow(x):
        loc = pyro.param("loc", lambda: x.mean(0))
        for _ in range(600):
            time.sleep(0.1)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def slow_too(x):
        slow(x)

    if __name__ == "__main__":
        X = np.random.default_rng(0).normal(size=(20, 3))
        logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
        grid = {"model": [PPCA(1), slow, slow_too]}
        search = MarginalLikelihoodSearch(BayesMPT(), grid, n_jobs=2)
        for _ in range(2):
            try:
                search.fit(X)
            except KeyboardInterrupt:
                print("KeyboardInterrupt", list(search.partial_.index), hasattr(search, "comparison_"), flush=True)
"""


def processes(session):
    """Of a session, those that wait for their parent left out."""
    found = []
    for number in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{number}/stat") as stat, open(f"/proc/{number}/cmdline") as line:
                fields, command = stat.read().rsplit(")", 1)[1].split(), line.read()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z" and "resource_tracker" not in command:
            found.append(int(number))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for processes in /proc")
def test_a_search_in_two_processes_ends_with_all_of_them(tmp_path):
    """Pressed in its own process, and then in all of the group."""
    script = tmp_path / "child.py"
    script.write_text(textwrap.dedent(CHILD))
    child = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        lines = iter(child.stdout.readline, "")
        for to, left in [(os.kill, {child.pid}), (os.killpg, set())]:
            assert any(line.startswith("candidate 'PPCA': fitted") for line in lines)
            assert any(line.startswith("candidate 'slow_too': fit begins") for line in lines)
            time.sleep(0.3)
            before, start = set(processes(child.pid)), time.monotonic()
            to(child.pid, signal.SIGINT)
            last = next(line for line in lines if line.startswith("KeyboardInterrupt"))
            assert time.monotonic() - start < 5
            assert last.split(maxsplit=1)[1].strip() == "['PPCA'] False"
            while before & set(processes(child.pid)) > left and time.monotonic() - start < 5:
                time.sleep(0.05)
            assert before & set(processes(child.pid)) == left
        assert not list(lines)
        child.wait(5)
        start = time.monotonic()
        while processes(child.pid) and time.monotonic() - start < 5:  # those of joblib end after it
            time.sleep(0.05)
        assert not processes(child.pid)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.stdout.close()


def test_threads_hear_of_it():
    """No signal comes to them."""
    ended, waiting = [], threading.Barrier(3)

    def work():
        waiting.wait()
        try:
            while True:
                check_stop()
                time.sleep(0.01)
        finally:
            ended.append(threading.get_ident())

    def presser():
        waiting.wait()
        press()

    calls = [(Task(i, None), (work, ())) for i in range(2)]
    with joblib.parallel_config(backend="threading"), pytest.raises(KeyboardInterrupt):
        threading.Thread(target=presser).start()
        side_by_side(calls, 2, lambda i, result: None)
    assert len(set(ended)) == 2


# ------------------------------------------------------------------------------------- what has not converged says so


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_training_that_did_not_converge_is_marked():
    estimator = BayesMPT(FactorAnalysis(), masks=UniformSize(4), training=Steps(max_iter=5), random_state=0)
    grid = [{"model__n_components": [1]}, {"model__n_components": [2], "masks": [None], "training": [None]}]
    search = MarginalLikelihoodSearch(estimator, grid, evidence="train").fit(X)
    diag = dict(
        zip(search.candidate_names_, search.comparison_.loc[search.candidate_names_, "diag"], strict=True)
    )
    assert list(diag.values()) == ["not converged after 5 iterations", "train"]
    short = BayesMPT(FactorAnalysis(1), masks=UniformSize(4), training=Steps(max_iter=5), random_state=0).fit(
        X
    )
    table = compare({"short": short, "long": BayesMPT(FactorAnalysis(1)).fit(X)}, X, evidence="train")
    assert table["diag"].to_dict() == {"long": "train", "short": "not converged after 5 iterations"}
    search.set_params(evidence=HeldOut(cv=2)).fit(X)
    diag = search.comparison_.loc[search.candidate_names_, "diag"]
    assert list(diag) == ["not converged after 5 iterations; 2 of 2 fits to folds not converged", "heldout"]
