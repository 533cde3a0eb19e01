"""What is passed as X and y: masked arrays, tensors, one row, what is no table; estimators after a fit that failed."""

import inspect
import math
import warnings
from datetime import date

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.exceptions import NotFittedError
from sklearn.gaussian_process.kernels import DotProduct
from torch.utils.data import DataLoader, TensorDataset

from bayes_mpt import BayesMPT, HeldOut, KernelSearch, MarginalLikelihoodSearch, compare, data_digest
from bayes_mpt.models import (
    PPCA,
    BayesianRegression,
    FactorAnalysis,
    GaussianMixture,
    GaussianProcess,
    LatentClass,
    Potts,
)
from bayes_mpt.training import Ascent
from bayes_mpt.warnings import PrecisionWarning

RNG = np.random.default_rng(0)
X = RNG.normal(size=(30, 4))
MASK = RNG.random(X.shape) < 0.2
HOLES = np.where(MASK, np.nan, X)
MASKED = np.ma.masked_array(np.where(MASK, -9999.0, X), MASK)
BOWL = GaussianProcess(DotProduct(1.0, "fixed") ** 2, mean="zero", noise=1.0)  # nothing to estimate
FRAME = pd.DataFrame(X, columns=list("abcd"))


@pytest.fixture(scope="module")
def fitted():
    return BayesMPT(PPCA(1), random_state=0).fit(HOLES)


# ------------------------------------------------------------------------------------------------------ masked arrays


def test_masked_cells_are_missing_in_fits(fitted):
    model = BayesMPT(PPCA(1), random_state=0).fit(MASKED)
    assert not model.complete_
    assert model.log_marginal_likelihood_ == fitted.log_marginal_likelihood_
    np.testing.assert_array_equal(model.mean_, fitted.mean_)
    assert model.data_digest_ == fitted.data_digest_
    first, more = (
        BayesMPT(PPCA(1), random_state=0).partial_fit(X).partial_fit(a[:9]) for a in (MASKED, HOLES)
    )
    assert first.score(X) == more.score(X)


@pytest.mark.parametrize("rows", [MASKED, list(MASKED)], ids=["array", "list of rows"])
@pytest.mark.parametrize("method", ["score_samples", "transform", "impute"])
def test_masked_cells_are_missing_in_methods(fitted, method, rows):
    np.testing.assert_array_equal(getattr(fitted, method)(rows), getattr(fitted, method)(HOLES))
    assert data_digest(rows) == data_digest(HOLES)


def test_masked_cells_are_missing_in_estimates_and_rankings(fitted):
    np.testing.assert_array_equal(fitted.estimate(MASKED).lml, fitted.estimate(HOLES).lml)
    tables = [compare({"one": fitted, "two": fitted}, a, evidence="train")["lml"] for a in (MASKED, HOLES)]
    pd.testing.assert_series_equal(*tables)
    search = MarginalLikelihoodSearch(
        BayesMPT(PPCA(0), random_state=0),
        {"training": [Ascent(tol=1e-9)]},
        evidence=HeldOut(cv=2),
        random_state=0,
    )
    tables = [search.fit(a).comparison_["lml"] for a in (MASKED, HOLES)]
    pd.testing.assert_series_equal(*tables)


def test_masked_whole_numbers():
    codes = RNG.integers(3, size=(60, 3))
    hidden = RNG.random(codes.shape) < 0.1
    fits = [
        BayesMPT(LatentClass(2), random_state=0).fit(a)
        for a in (np.ma.masked_array(codes, hidden), np.where(hidden, np.nan, codes))
    ]
    assert not fits[0].complete_
    assert fits[0].log_marginal_likelihood_ == fits[1].log_marginal_likelihood_


def test_masked_targets():
    y = np.round(10 * X[:, 0]).astype(int)
    hidden = np.arange(30) % 5 == 0
    fits = [
        BayesMPT(BOWL, random_state=0).fit(X[:, :2], a)
        for a in (np.ma.masked_array(y, hidden), np.where(hidden, np.nan, y))
    ]
    assert fits[0].log_marginal_likelihood_ == fits[1].log_marginal_likelihood_
    rows = [
        fits[1].score_samples(X[:, :2], a)
        for a in (np.ma.masked_array(y, hidden), np.where(hidden, np.nan, y))
    ]
    np.testing.assert_array_equal(*rows)
    with pytest.raises(ValueError, match="NaN"):
        BayesianRegression().log_evidence(X, np.ma.masked_array(y, hidden))
    with pytest.raises(ValueError, match="column 0 of X has missing cells"):
        KernelSearch(max_depth=1, error_score="raise").fit(np.ma.masked_array(X[:, :1], hidden[:, None]), y)


# --------------------------------------------------------------------------------------------------- other containers


def test_tensors_leave_their_graph():
    x, y = torch.tensor(X, requires_grad=True), torch.tensor(X[:, 0], requires_grad=True)
    fits = [BayesMPT(PPCA(1), random_state=0).fit(a) for a in (x, X)]
    assert fits[0].score(x) == fits[1].score(X)
    fits = [BayesMPT(BayesianRegression()).fit(*a) for a in ((x, y), (X, X[:, 0]))]
    assert fits[0].log_marginal_likelihood_ == fits[1].log_marginal_likelihood_
    assert x.grad is None


def test_numbers_in_object_columns():
    frame = FRAME.astype(object)
    frame.iloc[3, 1], frame.iloc[4, 2] = pd.NA, None
    holes = X.copy()
    holes[3, 1] = holes[4, 2] = np.nan
    fits = [BayesMPT(PPCA(0), random_state=0).fit(a) for a in (frame, holes)]
    first, second = (fit.log_marginal_likelihood_ for fit in fits)
    assert first == pytest.approx(second, rel=1e-13)  # sums of arrays that lie elsewhere in memory
    y = pd.Series([None, *range(29)], dtype="Int64")
    fits = [BayesMPT(BOWL).fit(X[:, :1], a) for a in (y, y.to_numpy(dtype=float, na_value=np.nan))]
    assert fits[0].log_marginal_likelihood_ == fits[1].log_marginal_likelihood_


@pytest.mark.parametrize("kind", ["pandas", "polars"])
def test_a_table_that_is_filled_comes_back_as_it_came(kind):
    library = pytest.importorskip(kind)
    cells = HOLES[:, :3]
    table = library.DataFrame(dict(zip("abc", cells.T, strict=True)))
    if kind == "pandas":
        table.index = pd.Index(range(100, 130), name="row")
    search = MarginalLikelihoodSearch(BayesMPT(PPCA(1)), {"model": [PPCA(0), PPCA(1)]}).fit(table)
    for model in (search, search.average(), BayesMPT(PPCA(1)).fit(table)):
        filled, sd = model.impute(table, return_std=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an array has no names
            alone = model.impute(cells)
        for found in (filled, sd, model.impute(table)):
            assert type(found) is library.DataFrame and list(found.columns) == ["a", "b", "c"]
            if kind == "pandas":
                pd.testing.assert_index_equal(found.index, table.index)
        np.testing.assert_allclose(filled.to_numpy(), alone, rtol=1e-9)
        assert ((sd.to_numpy() > 0) == np.isnan(cells)).all()


def linear(x, y):
    w = pyro.sample("w", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


@pytest.mark.parametrize("program", [linear, BOWL], ids=["one vector", "rows given others"])
def test_a_y_whose_square_no_float_holds_is_warned_of(program):
    y = X[:, 0].copy()
    fitted = BayesMPT(program).fit(X, y)
    y[3] = 1e200
    with pytest.warns(PrecisionWarning, match=r"row 3 holds 1e\+200 in column y: .* -inf"):
        assert fitted.score(X, y) == -math.inf


def test_latents_in_a_frame_are_turned_back_without_a_warning():
    fitted = BayesMPT(PPCA(1)).set_output(transform="pandas").fit(FRAME)
    plain = BayesMPT(PPCA(1)).fit(X)
    warns = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        found = fitted.inverse_transform(fitted.transform(FRAME))
    finally:
        torch.set_warn_always(warns)
    np.testing.assert_allclose(found, plain.inverse_transform(plain.transform(X)), rtol=1e-9)


def test_rows_are_not_drawn_without_their_covariates():
    def given_a_column(x):
        slope = pyro.param("slope", lambda: x.new_zeros(()))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(slope * x[:, 0], 1.0), obs=x[:, 1])

    with pytest.raises(
        ValueError, match="linear does not: all rows share the latents 'w'.*predict.*uncondition"
    ):
        BayesMPT(linear).fit(X, X[:, 0]).sample(3)
    fitted = BayesMPT(given_a_column).fit(X)
    with pytest.raises(
        ValueError, match="given_a_column does not: it looks at covariates.*params are params_"
    ):
        fitted.sample(3)
    # as the message says
    params = {name: torch.as_tensor(value) for name, value in fitted.params_.items()}
    program = pyro.poutine.uncondition(pyro.poutine.substitute(given_a_column, params))
    table = torch.full((4000, 2), 2.0, dtype=torch.float64)
    with pyro.get_param_store().scope():
        pyro.set_rng_seed(0)
        drawn = pyro.poutine.trace(program).get_trace(table).nodes["y"]["value"]
    assert float(drawn.mean()) == pytest.approx(2 * fitted.params_["slope"], abs=4 / math.sqrt(4000))


@pytest.mark.parametrize(
    "kind", [">f8", np.longdouble, np.float16, np.uint8, np.int8, np.uint16, np.uint64, ">i4"]
)
def test_a_y_of_any_kind_of_number(kind):
    def below(x, y):
        with pyro.plate("rows", len(x)):
            pyro.sample(
                "y", dist.Normal(pyro.param("level", lambda: x.new_zeros(())), 1.0), obs=y - 2 * x[:, 0]
            )

    def counts(x, y):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Poisson(pyro.param("rate", lambda: x.new_ones(()))), obs=y)

    y = np.array([0, 1, 3, 0, 2, 1])
    x = np.zeros((6, 1))
    for program in (below, counts):
        expected = BayesMPT(program).fit(x, y.astype(np.float64)).log_marginal_likelihood_
        assert BayesMPT(program).fit(x, y.astype(kind)).log_marginal_likelihood_ == pytest.approx(
            expected, abs=1e-12
        )


def test_tables_of_polars_are_read_by_column():
    polars = pytest.importorskip("polars")
    table = polars.DataFrame({"a": X[:, 0], "b": X[:, 1]})
    for column, words in [
        (["red"] * 30, "column 'b' of X holds 'red'.*OrdinalEncoder"),
        ([date(2020, 1, 1)] * 30, "column 'b' of X holds the date"),
        ([[1, 2]] * 30, r"column 'b' of X holds \[1, 2\], which is no number"),
    ]:
        with pytest.raises((ValueError, TypeError), match=words):
            BayesMPT(PPCA(1)).fit(table.with_columns(b=polars.Series(column)))
    with pytest.raises(TypeError, match=r"pass X.collect\(\)"):
        BayesMPT(PPCA(1)).fit(table.lazy())
    expected = BayesMPT(PPCA(1)).fit(X[:, :2]).log_marginal_likelihood_
    assert BayesMPT(PPCA(1)).fit(table).log_marginal_likelihood_ == pytest.approx(expected, abs=1e-12)


def test_two_columns_of_one_name():
    table = FRAME.set_axis(list("abbc"), axis=1)
    for fit in (BayesMPT(PPCA(1)).fit, MarginalLikelihoodSearch(BayesMPT(PPCA(1)), {"model": [PPCA(1)]}).fit):
        with pytest.raises(ValueError, match="two columns of X have the name 'b'.*give each its own name"):
            fit(table)


@pytest.mark.parametrize("model", [PPCA(1), FactorAnalysis(1), GaussianMixture(1, "diag")], ids=str)
def test_views_that_are_read_only_or_backwards(model):
    warns = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # a warning is an error here, and torch gives this one once
    try:
        for wide in (X, X[:3]):  # more columns than rows take another way
            expected = BayesMPT(model, random_state=0).fit(wide.copy()).score_samples(wide.copy())
            fixed = wide.copy()
            fixed.flags.writeable = False
            for view in (fixed, wide[::-1].copy()[::-1], wide[:, ::-1].copy()[:, ::-1]):
                found = BayesMPT(model, random_state=0).fit(view).score_samples(view)
                np.testing.assert_allclose(found, expected, rtol=1e-9)
    finally:
        torch.set_warn_always(warns)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (FRAME.assign(b="red"), r"column 'b' of X holds 'red'.*OrdinalEncoder.*OneHotEncoder"),
        (FRAME.assign(b=pd.Categorical(["red"] * 30)), "column 'b' of X holds 'red'"),
        (FRAME.assign(b=pd.to_datetime([None, *["2020-01-01"] * 29])), "column 'b' of X holds the date"),
        (FRAME.assign(b=pd.Timedelta("1 day")), "'b' of X holds the date.*days since the first"),
        (
            np.array([["1", "red"], ["2", "blue"]]),
            r"column 1 of X holds 'red', which is no number \(.*float: 'red'\)",
        ),
        ([[1.0, "red"], [2.0, "blue"]], "column 1 of X holds 'red'"),
        (np.full((5, 2), np.datetime64("2020-01-01")), "column 0 of X holds the date"),
        (DataLoader(TensorDataset(torch.ones(4, 2))), "got DataLoader: stack its rows"),
        (TensorDataset(torch.ones(4, 2)), "got TensorDataset"),
        (iter(X), "must be an array with all rows"),
        (dict(FRAME), r"got dict: pass pandas.DataFrame\(X\)"),
        ({"rows": X}, "got dict: stack its rows"),
        (
            np.zeros(5, dtype=[("a", float), ("b", float)]),
            "structured array with the fields a, b: pass pandas",
        ),
        (torch.ones(4, 2).to_sparse(), r"to_dense\(\)"),
    ],
)
def test_what_is_no_table(fitted, table, words):
    with pytest.raises((ValueError, TypeError), match=words):
        BayesMPT(PPCA(1)).fit(table)
    with pytest.raises((ValueError, TypeError), match=words):
        MarginalLikelihoodSearch(BayesMPT(PPCA(1)), {"model__n_components": [0, 1]}).fit(table)
    if not isinstance(table, pd.DataFrame):
        with pytest.raises((ValueError, TypeError), match=words):
            fitted.score_samples(table)


@pytest.mark.parametrize(
    ("y", "words"),
    [
        (["red"] * 30, "y holds 'red'.*LabelEncoder"),
        (np.array([object()] * 30), "y holds <object"),
        (np.full(30, np.datetime64("2020-01-01")), "y holds the date"),
        (1j * X[:, 0], "complex"),
        (3.0, "a row for each of the 30 rows of X, got a single number"),
        (np.ones(31), "a row for each of the 30 rows of X, got 31"),
        (iter(X[:, 0]), "y must be an array"),
        (None, "takes a second argument: pass y"),
    ],
)
def test_what_is_no_y(y, words):
    with pytest.raises((ValueError, TypeError), match=words):
        BayesMPT(BayesianRegression()).fit(X, y)


def test_a_y_that_is_not_used_may_be_anything():
    assert BayesMPT(PPCA(1)).fit(X, ["red"] * 30).complete_


def test_compare_wants_names(fitted):
    with pytest.raises(TypeError, match="dict of names and fitted estimators.*got list"):
        compare([fitted, fitted], HOLES)


# ------------------------------------------------------------------------------------------------------------ one row


def one_share(x):
    """Successes of ten under a uniform prior: log p = -log 11, whatever their number."""
    p = pyro.sample("p", dist.Beta(x.new_tensor(1.0), 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Binomial(10, p[..., None] if p.dim() else p), obs=x[:, 0])


def known(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None], 1.0).expand(x.shape).to_event(1), obs=x)


@pytest.mark.parametrize("successes", [0, 2, 10])
def test_one_row_is_enough_where_all_is_integrated(successes):
    row = np.array([[float(successes)]])
    model = BayesMPT(one_share).fit(row)
    assert model.log_marginal_likelihood_ == pytest.approx(-math.log(11), abs=1e-10)
    assert model.score_samples(row) == pytest.approx([-math.log(11)], abs=1e-10)
    search = MarginalLikelihoodSearch(BayesMPT(one_share), {"training": [Ascent(5), Ascent(6)]}).fit(row)
    np.testing.assert_allclose(search.comparison_["lml"], -math.log(11), rtol=0, atol=1e-10)


def test_one_row_of_programs_without_parameters():
    row = np.array([[1.0, -1.0]])
    # covariance [[2, 1], [1, 2]]: determinant 3, row' inverse row = 2
    truth = -math.log(2 * math.pi) - math.log(3) / 2 - 1
    assert BayesMPT(known).fit(row).log_marginal_likelihood_ == pytest.approx(truth, abs=1e-12)
    model = BayesMPT(BayesianRegression()).fit(X[:1], X[:1, 0])
    assert model.log_marginal_likelihood_ == pytest.approx(
        BayesianRegression().log_evidence(X[:1], X[:1, 0]), abs=1e-9
    )


@pytest.mark.parametrize(
    "model",
    [None, PPCA(1), FactorAnalysis(1), GaussianMixture(2), LatentClass(2), Potts(), GaussianProcess()],
    ids=repr,
)
def test_one_row_estimates_nothing(model):
    with pytest.raises(ValueError, match="X has 1 sample while a minimum of 2 is required to estimate"):
        BayesMPT(model).fit(np.ones((1, 3)), [1.0])


def test_one_row_that_its_own_prior_reads():
    def reads(x):
        p = pyro.sample("p", dist.Beta(1 + x.sum(), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Binomial(10, p[..., None] if p.dim() else p), obs=x[:, 0])

    with pytest.raises(ValueError, match="site 'p' changes with the observed x itself"):
        BayesMPT(reads).fit([[2.0]])


# -------------------------------------------------------------------------------------------------- fits that fail

WIDE = np.column_stack([X, X[:, 0]])  # a column twice: no maximum


def test_a_failed_refit_changes_nothing():
    model = BayesMPT(FactorAnalysis(1)).fit(FRAME)
    before, score = dict(vars(model)), model.score(FRAME)
    others = FRAME.assign(d=1.0).set_axis(list("wxyz"), axis=1)
    for bad in (WIDE, others, FRAME.assign(d=np.inf)):
        with pytest.raises(ValueError):
            model.fit(bad)
        assert vars(model) == before
    assert model.score(FRAME) == score and list(model.feature_names_in_) == list("abcd")
    with pytest.raises(ValueError, match="feature names"):
        model.score(others)
    with pytest.raises(ValueError, match="feature names"):
        model.score(FRAME.assign(e=1.0))
    with pytest.raises(ValueError):
        model.partial_fit(FRAME.assign(d=np.inf))
    assert vars(model) == before


def test_a_failed_first_fit_leaves_nothing():
    model = BayesMPT(FactorAnalysis(1))
    with pytest.raises(ValueError):
        model.fit(WIDE)
    assert vars(model) == vars(BayesMPT(FactorAnalysis(1))) | {"model": model.model}


@pytest.mark.parametrize("program", [FactorAnalysis(1), GaussianProcess()], ids=["x", "x, y"])
def test_every_method_says_that_nothing_is_fitted(program):
    model = BayesMPT(program)
    with pytest.raises(ValueError):
        model.fit(WIDE[:, :4] * np.nan, X[:, 0])
    calls = {
        "inverse_transform": (X[:, :1],),
        "refit": (X,),
    }
    without = {"fit", "fit_transform", "partial_fit", "read_rows", "set_params"}
    for name, method in inspect.getmembers(BayesMPT, callable):
        if method.__qualname__.split(".")[0] != "BayesMPT" or name.startswith("_") or name in without:
            continue
        if not hasattr(model, name):
            of_y = name in ("predict", "sample_y") and not isinstance(program, GaussianProcess)
            assert of_y or name == "predict_proba"  # which only a fitted program is known to have
            continue
        wants = [
            p for p in inspect.signature(getattr(model, name)).parameters.values() if p.default is p.empty
        ]
        with pytest.raises(NotFittedError):
            getattr(model, name)(*calls.get(name, (X,) * len(wants)))


def test_an_interrupted_refit_changes_nothing():
    """Ctrl-C where the program is read, before the training."""
    calls = []

    def program(x):
        calls.append(len(x))
        if len(calls) == stop:
            raise KeyboardInterrupt
        loc = pyro.param("loc", lambda: x.mean(0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    stop = None
    model = BayesMPT(program).fit(X)
    before = dict(vars(model))
    stop = len(calls) + 2
    pyro.clear_param_store()
    with pytest.raises(KeyboardInterrupt):
        model.fit(X[:, :3])
    assert vars(model) == before
    assert not list(pyro.get_param_store())


def test_a_network_is_as_it_was_after_a_failed_fit():
    network = torch.nn.Linear(1, 4).double()
    before = [p.detach().clone() for p in network.parameters()]

    def program(x):
        pyro.module("network", network)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(network(z), 1.0).to_event(1), obs=x)

    model = BayesMPT(program, training=Ascent(max_iter=20, tol=1e-2)).fit(X)
    score = model.score(X)
    with pytest.raises(ValueError, match="inf"):
        model.fit(np.where(MASK, np.inf, X))
    with pytest.raises(ValueError):
        model.fit(X[:, :3])  # the network has four outputs
    assert model.score(X) == score
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_a_search_that_fails_changes_nothing():
    search = MarginalLikelihoodSearch(BayesMPT(PPCA(1)), {"model__n_components": [0, 1]}).fit(X)
    before = dict(vars(search))
    with pytest.raises(ValueError):
        search.fit(np.ones((20, 4)))
    assert vars(search).keys() == before.keys() and all(vars(search)[k] is before[k] for k in before)
