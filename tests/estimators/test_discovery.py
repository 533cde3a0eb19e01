"""Growing kernels, and the parts of a series, against dense algebra."""

import warnings

import gpytorch
import matplotlib.pyplot as plt
import numpy as np
import pytest
from gpytorch.kernels import LinearKernel, MaternKernel, PeriodicKernel, RBFKernel, RQKernel, ScaleKernel
from gpytorch.means import ZeroMean
from scipy.spatial.distance import cdist
from sklearn.base import clone
from sklearn.gaussian_process import kernels as theirs

from bayes_mpt import BayesMPT, KernelSearch
from bayes_mpt.estimators.decomposition import decompose
from bayes_mpt.estimators.kernel_search import _grown, _kernel
from bayes_mpt.models import PPCA, GaussianProcess
from bayes_mpt.models.kernels import Line, kernel_name
from bayes_mpt.plots import DecompositionDisplay
from bayes_mpt.training import Ascent

# evidence="train" maximises, and a part that the data do without vanishes
pytestmark = pytest.mark.filterwarnings("ignore:the estimate of parameter")


@pytest.fixture(scope="module")
def series():
    """A trend and a period of one year, a year apart from the next."""
    rng = np.random.default_rng(0)
    x = np.sort(rng.uniform(1990, 2000, 90))[:, None]
    t = x[:, 0]
    y = 0.3 * (t - 1995) + np.sin(2 * np.pi * t) + 0.1 * rng.normal(size=90)
    y[[5, 40]] = np.nan
    return x, y


@pytest.fixture(scope="module")
def search(series):
    base = [RBFKernel(), PeriodicKernel(), Line()]
    with warnings.catch_warnings():  # marks do not reach fixtures
        warnings.filterwarnings("ignore", "the estimate of parameter")
        return KernelSearch(base=base, max_depth=2, evidence="train").fit(*series)


def test_parts_are_those_of_dense_algebra(series):
    x, y = series
    kernel = theirs.ConstantKernel(2.0, "fixed") * theirs.RBF(3.0, "fixed")
    kernel += theirs.ConstantKernel(0.5, "fixed") * theirs.ExpSineSquared(1.2, 1.0, "fixed", "fixed")
    kernel += theirs.WhiteKernel(0.01, "fixed")
    model = BayesMPT(GaussianProcess(kernel, mean=ZeroMean())).fit(x, y)
    new = np.linspace(1989, 2001, 31)[:, None]
    parts = decompose(model, new)
    seen = ~np.isnan(y)
    trend = lambda a, b: 2.0 * np.exp(-0.5 * cdist(a, b, "sqeuclidean") / 9)  # noqa: E731
    period = lambda a, b: 0.5 * np.exp(-2 * np.sin(np.pi * cdist(a, b)) ** 2 / 1.2**2)  # noqa: E731
    whole = trend(x[seen], x[seen]) + period(x[seen], x[seen]) + 0.01 * np.eye(seen.sum())
    for j, part in enumerate((trend, period)):
        across = part(new, x[seen])
        np.testing.assert_allclose(parts.mean[j], across @ np.linalg.solve(whole, y[seen]), atol=1e-8)
        cov = part(new, new) - across @ np.linalg.solve(whole, across.T)
        np.testing.assert_allclose(parts.sd[j], np.sqrt(np.diag(cov)), atol=1e-6)
    np.testing.assert_allclose(parts.total, model.predict(new), atol=1e-10)
    assert parts.names == ["RBF", "Periodic"]
    np.testing.assert_allclose(parts.noise_sd, 0.1)


@pytest.mark.slow
def test_parts_sum_to_the_whole(search, series):
    parts = search.decompose()
    seen = ~np.isnan(series[1])
    np.testing.assert_allclose(parts.total, search.predict(series[0][seen]), atol=1e-9)
    table = np.column_stack([series[0], np.full(90, 0.02)])
    mean = gpytorch.means.LinearMean(1)
    kernel = ScaleKernel(RBFKernel()) + ScaleKernel(MaternKernel(nu=0.5))
    model = BayesMPT(GaussianProcess(kernel, mean=mean, noise_column=1)).fit(table, series[1])
    parts = decompose(model, table)
    np.testing.assert_allclose(parts.total, model.predict(table), atol=1e-9)
    _, std = model.predict(table, return_std=True)
    both = np.sqrt((parts.sd**2).sum(0))
    assert (std**2 - parts.noise_sd**2 < both**2 + 1e-9).all()  # the parts' errors are anti-correlated


@pytest.mark.slow
def test_the_period_is_found(search, series):
    assert "Periodic" in search.best_kernel_
    assert search.best_score_ == search.best_estimator_.log_marginal_likelihood_
    assert search.path_[0] in search.comparison_.index
    words = search.describe(unit="years")
    assert "a period of 1.00 years" in words
    sd = float(words.rpartition("noise of sd ")[2])
    assert sd == pytest.approx(0.1, abs=0.03)


def test_table_of_all_that_was_tried(search, series):
    table = search.comparison_
    assert table.index.is_unique
    assert set(table["depth"]) == {1, 2}
    assert (table["rank"] == np.arange(len(table))).all()
    assert table["lml"].is_monotonic_decreasing
    assert table["lml_diff"].iloc[0] == 0 and (table["lml_diff"] <= 0).all()
    assert table.index[0] == search.best_kernel_
    assert search.evidence_ == "train"
    # what a search over the same kernels alone finds
    alone = BayesMPT(GaussianProcess(ScaleKernel(RBFKernel()))).fit(*series)
    assert table["lml"]["RBF"] == pytest.approx(alone.log_marginal_likelihood_, abs=1e-6)


def test_interface(search, series):
    x, y = series
    assert clone(search).get_params()["max_depth"] == 2
    assert search.predict(x[:3]).shape == (3,)
    _, std = search.predict(x[:3], return_std=True)
    assert (std > 0).all() and search.sample_y(x[:3], 5).shape == (3, 5)
    assert search.score(x[:3], y[:3]) == pytest.approx(search.score_samples(x[:3], y[:3]).mean())
    assert search.n_features_in_ == 1
    with pytest.raises(AttributeError):
        KernelSearch().predict(x)


def test_expressions_grow_by_sums_products_and_exchange():
    base = [RBFKernel(), PeriodicKernel(), Line()]
    grown = _grown(((0,),), base)
    assert ((0,), (1,)) in grown and ((0, 1),) in grown and ((1,),) in grown and ((0,), (0,)) in grown
    assert ((0, 0),) not in grown  # two RBFs multiplied are one
    grown = _grown(((2,),), base)
    assert ((2,), (2,)) not in grown and (
        (2, 2),
    ) in grown  # lines add up to a line, and multiply to a parabola
    names = [kernel_name(_kernel(e, base)) for e in set(_grown(((0,), (1, 2)), base))]
    assert len(names) == len(set(names))
    assert "RBF + RBF × Periodic × Linear" in names


def test_it_stops_where_nothing_is_gained(series):
    x, _ = series
    y = np.random.default_rng(3).normal(size=len(x))
    found = KernelSearch(base=[RBFKernel()], max_depth=4, evidence="train").fit(x, y)
    assert found.comparison_["depth"].max() <= 3


def test_refused(series):
    x, y = series
    with pytest.raises(TypeError, match="without a ScaleKernel"):
        KernelSearch(base=[ScaleKernel(RBFKernel())]).fit(x, y)
    with pytest.raises(TypeError, match=r"needs BayesMPT\(GaussianProcess"):
        KernelSearch(BayesMPT(PPCA(1))).fit(x, y)
    with pytest.raises(ValueError, match="base is empty"):
        KernelSearch(base=[]).fit(x, y)
    with pytest.raises(TypeError, match="additive parts"):
        decompose(BayesMPT(PPCA(1)).fit(np.column_stack([x, x**2])))


@pytest.mark.slow
def test_words():
    """Every base kernel has words, alone and in a product."""
    x = np.linspace(0, 10, 40)[:, None]
    y = np.sin(x[:, 0])
    cases = {
        ScaleKernel(
            PeriodicKernel() * RBFKernel()
        ): r"a period of .* years that slowly changes over .* years",
        ScaleKernel(PeriodicKernel() * Line()): "whose amplitude grows linearly from zero at .* years",
        ScaleKernel(Line() * Line()): "a parabola",
        ScaleKernel(RQKernel()): "many scales",
        ScaleKernel(MaternKernel(nu=0.5) * LinearKernel()): "a rough curve .* from zero at 0",
        ScaleKernel(RBFKernel() * RQKernel())
        + ScaleKernel(MaternKernel(nu=2.5)): "a twice differentiable curve",
    }
    for kernel, words in cases.items():
        fitted = BayesMPT(GaussianProcess(kernel, noise=0.01), training=Ascent(max_iter=3))
        with pytest.warns():
            fitted.fit(x, y)
        found = KernelSearch()
        found.best_estimator_ = fitted
        pytest.importorskip("re").search(words, found.describe("years")) or pytest.fail(
            found.describe("years")
        )


def test_columns_of_their_own():
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 5, (70, 2))
    y = np.sin(2 * x[:, 1]) + 0.1 * rng.normal(size=70)
    base = [RBFKernel(active_dims=[c]) for c in (0, 1)]
    found = KernelSearch(base=base, max_depth=1, evidence="train").fit(x, y)
    assert found.best_kernel_ == "RBF[1]"
    assert "along column 1" in found.describe()


def test_picture(search, series):
    plt.switch_backend("Agg")
    new = np.linspace(1990, 2001, 50)[:, None]
    display = DecompositionDisplay.from_estimator(search, *series, at=new)
    assert len(display.axes_) == len(search.decompose().names) + 1
    with pytest.raises(ValueError, match="one column"):
        DecompositionDisplay.from_estimator(search, np.ones((3, 2)))
    plt.close("all")
