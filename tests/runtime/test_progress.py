"""Long work says where it is: plain lines, a log, scikit-learn's callbacks."""

import logging
import re
from importlib.util import find_spec

import numpy as np
import pytest
from gpytorch.kernels import RBFKernel

from bayes_mpt import BayesMPT, HeldOut, KernelSearch, MarginalLikelihoodSearch
from bayes_mpt.masks import UniformSize
from bayes_mpt.models import PPCA, FactorAnalysis
from bayes_mpt.models.kernels import Line
from bayes_mpt.training import Steps

X = np.random.default_rng(0).normal(size=(40, 4))
GRID = {"model": [PPCA(1), FactorAnalysis(1)]}


def is_plain(text):
    return not re.search(r"[\r\x1b\x08]", text)


class Tree:
    """A callback that notes the tasks it sees, as a path of names each."""

    max_propagation_depth = None

    def __init__(self):
        self.begun, self.ended = [], []

    def setup(self, estimator, context): ...

    def teardown(self, estimator, context): ...

    def on_fit_task_begin(self, estimator, context):
        self.begun.append(path(context))

    def on_fit_task_end(self, estimator, context):
        self.ended.append(path(context))


def path(context):
    names = []
    while context is not None:
        names.append((context.source_task_name or context.task_name, context.task_id))
        context = context.parent
    return tuple(names[::-1])


def test_an_exact_fit_is_shown_in_a_plain_line(capsys):
    model = BayesMPT(PPCA(1), verbose=1).fit(X)
    out, err = capsys.readouterr()
    assert not out and is_plain(err) and err.count("\n") == 1
    assert f"log marginal likelihood {model.log_marginal_likelihood_:.4f} nats" in err
    BayesMPT(PPCA(1)).fit(X)
    assert capsys.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_training_is_shown_in_plain_lines(capsys):
    BayesMPT(PPCA(1), masks=UniformSize(4), training=Steps(max_iter=10), random_state=0, verbose=1).fit(X)
    err = capsys.readouterr().err
    first, *_, last = err.splitlines()
    assert is_plain(err)
    assert first.split()[0] == "1/10" and "10 iterations" in last and "not converged" in last


def test_a_search_is_shown_in_plain_lines(capsys):
    search = MarginalLikelihoodSearch(BayesMPT(), GRID, evidence="laplace", verbose=1).fit(X)
    out, err = capsys.readouterr()
    assert not out and is_plain(err)
    lines = err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["fit 1/2", "fit 2/2", "laplace 1/2", "laplace 2/2"]
    assert f"LML {search.comparison_.loc['PPCA', 'lml']:.2f}" in lines[2]
    search.set_params(verbose=0).fit(X)
    assert capsys.readouterr() == ("", "")


def test_a_log_tells_of_candidates(caplog):
    bad = np.column_stack([X, np.ones(len(X))])  # a constant column: factor analysis has no maximum
    with caplog.at_level(logging.INFO, logger="bayes_mpt"):
        search = MarginalLikelihoodSearch(BayesMPT(), GRID, evidence="train").fit(bad)
    said = [record.getMessage() for record in caplog.records if record.name == "bayes_mpt"]
    assert all(record.levelno == logging.INFO for record in caplog.records)
    assert [re.sub(r"[\d.]+ s", "t", line) for line in said if "'PPCA'" in line] == [
        "candidate 'PPCA': fit begins",
        "candidate 'PPCA': fitted in t",
        "candidate 'PPCA': train begins",
        f"candidate 'PPCA': finished, LML {search.comparison_.loc['PPCA', 'lml']:.2f} (train), t",
    ]
    others = [line for line in said if "'FactorAnalysis'" in line]
    assert others[0].endswith("fit begins") and "failed: ValueError" in others[1] and len(others) == 2


def test_the_log_is_silent_by_default(capsys):
    MarginalLikelihoodSearch(BayesMPT(), GRID, evidence="train").fit(X)
    assert capsys.readouterr() == ("", "")
    assert any(isinstance(h, logging.NullHandler) for h in logging.getLogger("bayes_mpt").handlers)


def test_callbacks_see_stages_candidates_and_folds():
    tree = Tree()
    search = MarginalLikelihoodSearch(BayesMPT(), GRID, evidence=HeldOut(cv=2), random_state=0)
    search.set_callbacks(tree).fit(X)
    root = ("fit", 0)
    want = [(root,), (root, ("fits", 0)), (root, ("evidence heldout", 1))]
    for i in range(2):
        want += [(root, ("fits", 0), ("candidate", i)), (root, ("evidence heldout", 1), ("candidate", i))]
        want += [(root, ("evidence heldout", 1), ("candidate", i), ("fold", k)) for k in range(2)]
    assert sorted(tree.begun) == sorted(tree.ended) == sorted(want)
    assert tree.ended[-1] == (root,)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_callbacks_see_the_iterations_of_candidates():
    tree = Tree()
    estimator = BayesMPT(PPCA(1), masks=UniformSize(4), training=Steps(max_iter=7), random_state=0)
    search = MarginalLikelihoodSearch(estimator, {"model__n_components": [1, 2]}, evidence="train")
    search.set_callbacks(tree).fit(X)
    iterations = [task for task in tree.ended if task[-1][0] == "iteration"]
    assert [task[-2:] for task in iterations] == [
        (("candidate", i), ("iteration", k)) for i in range(2) for k in range(7)
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the estimate of parameter")
def test_callbacks_see_the_depths_of_a_kernel_search():
    x = np.linspace(0, 3, 15)[:, None]
    tree = Tree()
    search = KernelSearch(base=[RBFKernel(), Line()], max_depth=1, evidence="train")
    search.set_callbacks(tree).fit(x, np.sin(3 * x[:, 0]))
    assert sorted(tree.begun) == sorted(tree.ended)
    assert {task[1] for task in tree.begun if len(task) > 1} == {("depth", 0)}
    assert sum(task[-1][0] == "candidate" for task in tree.ended) == 4


@pytest.mark.slow
@pytest.mark.skipif(find_spec("rich") is None, reason="scikit-learn's ProgressBar is drawn by rich")
def test_a_bar_and_lines_from_two_processes(capsys):
    from sklearn.callback import ProgressBar

    bar = ProgressBar(max_propagation_depth=None)
    search = MarginalLikelihoodSearch(BayesMPT(), GRID, evidence="train", n_jobs=2, verbose=1)
    want = MarginalLikelihoodSearch(BayesMPT(), GRID, evidence="train").fit(X).comparison_
    found = search.set_callbacks(bar).fit(X).comparison_
    np.testing.assert_allclose(found["lml"], want["lml"], rtol=1e-13)
    out, err = capsys.readouterr()
    assert out.count("candidate | BayesMPT - fit") == 2
    assert is_plain(err) and "train 2/2" in err
