"""Bad input gets a clear error that says what was got, or a finite right answer; never a silent NaN or a wrong number.

Right answers are dense Gaussian densities worked out here with numpy, scipy and mpmath.
"""

import mpmath
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse
import torch
from sklearn.exceptions import NotFittedError
from tables import with_holes
from truths import factor_covariance, log_density

from bayes_mpt import BayesMPT, Cumulative, HeldOut, Integrated, MarginalLikelihoodSearch, compare
from bayes_mpt.masks import FixedRate, LeaveOneOut, UniformSize
from bayes_mpt.models import PPCA, FactorAnalysis
from bayes_mpt.predictors import Exact
from bayes_mpt.score import CumulativeMaskedScore, fixed_rate_bias
from bayes_mpt.training import Ascent, Epochs, Steps

SEED = 1991
N_ROWS, T, K = 60, 5, 2
ERRORS = (ValueError, TypeError, NotImplementedError)
MODELS = [PPCA(1), FactorAnalysis(1)]

# the parameters of the programs below
LOC = np.array([1.0, -2.0, 0.5, 3.0, 0.0])
LOADING = np.array([[1.2, 0.1], [0.8, -0.7], [-0.5, 0.9], [0.3, 0.3], [1.0, -1.1]])
SCALE = np.array([0.5, 0.7, 0.9, 1.1, 0.6])
ROTATION = np.linalg.qr(np.random.default_rng(SEED).normal(size=(T, T)))[0]
COVARIANCE = LOADING @ LOADING.T + np.diag(SCALE**2)


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(SEED)
    return LOC + rng.normal(size=(N_ROWS, K)) @ LOADING.T + SCALE * rng.normal(size=(N_ROWS, T))


@pytest.fixture(autouse=True)
def empty_parameter_store():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def ppca_lml(x, n_components):
    """The maximum of the likelihood per row, in 60 digits: eigenvalues of the covariance with divisor N."""
    with mpmath.workdps(60):
        rows = mpmath.matrix(x.tolist())
        n, t = rows.rows, rows.cols
        mean = [mpmath.fsum(rows[i, j] for i in range(n)) / n for j in range(t)]
        cov = mpmath.matrix(t, t)
        for a in range(t):
            for b in range(a + 1):
                cov[a, b] = cov[b, a] = (
                    mpmath.fsum((rows[i, a] - mean[a]) * (rows[i, b] - mean[b]) for i in range(n)) / n
                )
        value = sorted(mpmath.eigsy(cov, eigvals_only=True), reverse=True)
        noise = mpmath.fsum(value[n_components:]) / (t - n_components)
        logdet = mpmath.fsum(mpmath.log(v) for v in value[:n_components]) + (t - n_components) * mpmath.log(
            noise
        )
        return float(-(t * mpmath.log(2 * mpmath.pi) + logdet + t) / 2)


def scored(program, x):
    """A program with nothing to train is scored as it is."""
    return BayesMPT(model=program).fit(x).score_samples(x)


# -- programs: all are called as program(x) and are Gaussian unless their name says otherwise


def rows_of(x):
    return pyro.plate("rows", x.shape[0])


def constants(x):
    return [torch.as_tensor(value, dtype=x.dtype, device=x.device) for value in (LOC, LOADING, SCALE)]


def latent(x, n=K):
    return pyro.sample("z", dist.Normal(torch.zeros(n, dtype=x.dtype), 1.0).to_event(1))


def plain(x):
    loc, loading, scale = constants(x)
    with rows_of(x):
        pyro.sample("x", dist.Normal(loc + latent(x) @ loading.T, scale).to_event(1), obs=x)


def twice(x):
    loc, loading, scale = constants(x)
    with rows_of(x):
        pyro.sample("x", dist.Normal(loc + latent(x) @ loading.T, scale).to_event(1), obs=2 * x)


def first_three(x):
    loc, loading, scale = constants(x)
    with rows_of(x):
        pyro.sample(
            "x", dist.Normal((loc + latent(x) @ loading.T)[..., :3], scale[:3]).to_event(1), obs=x[:, :3]
        )


def batch_mean(x):
    _, loading, scale = constants(x)
    with rows_of(x):
        pyro.sample("x", dist.Normal(x.mean(0) + latent(x) @ loading.T, scale).to_event(1), obs=x)


def batch_scale(x):
    loc, loading, _ = constants(x)
    with rows_of(x):
        pyro.sample("x", dist.Normal(loc + latent(x) @ loading.T, x.std(0)).to_event(1), obs=x)


def row_mean(x):
    _, loading, scale = constants(x)
    with rows_of(x):
        pyro.sample(
            "x", dist.Normal(x.mean(1, keepdim=True) + latent(x) @ loading.T, scale).to_event(1), obs=x
        )


def own_cells(x):
    _, loading, scale = constants(x)
    with rows_of(x):
        pyro.sample("x", dist.Normal(0.5 * x + latent(x) @ loading.T, scale).to_event(1), obs=x)


def signs(x):
    loc, loading, scale = constants(x)
    with rows_of(x):
        mean = loc + 3.0 * (x > 0).to(x.dtype) + latent(x) @ loading.T
        pyro.sample("x", dist.Normal(mean, scale).to_event(1), obs=x)


def flipped(x):
    loc, loading, scale = constants(x)
    with rows_of(x):
        pyro.sample("x", dist.Normal(loc + latent(x) @ loading.T, scale).to_event(1), obs=x.flip(1))


def rotated(x):
    loc, loading, scale = constants(x)
    turned = x @ torch.as_tensor(ROTATION, dtype=x.dtype)
    with rows_of(x):
        pyro.sample("x", dist.Normal(loc + latent(x) @ loading.T, scale).to_event(1), obs=turned)


def subsampled(x):
    loc, loading, scale = constants(x)
    with pyro.plate("some_rows", x.shape[0], subsample_size=10) as index:
        pyro.sample("x", dist.Normal(loc + latent(x) @ loading.T, scale).to_event(1), obs=x[index])


def unobserved(x):
    loc, loading, scale = constants(x)
    with rows_of(x):
        pyro.sample("x", dist.Normal(loc + latent(x) @ loading.T, scale).to_event(1))


def empty(x):
    return x.sum()


def poisson(x):
    _, loading, _ = constants(x)
    with rows_of(x):
        pyro.sample("counts", dist.Poisson((latent(x) @ loading.T).exp()).to_event(1), obs=x)


def student_t(x):
    loc, loading, scale = constants(x)
    with rows_of(x):
        pyro.sample("tails", dist.StudentT(4.0, loc + latent(x) @ loading.T, scale).to_event(1), obs=x)


def gamma_latent(x):
    loc, loading, scale = constants(x)
    with rows_of(x):
        z = pyro.sample("positive", dist.Gamma(torch.ones(K, dtype=x.dtype), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(loc + z @ loading.T, scale).to_event(1), obs=x)


def bent_far_out(x):
    """relu(z + 5) is affine wherever z is likely to be."""
    loc, loading, scale = constants(x)
    with rows_of(x):
        pyro.sample("x", dist.Normal(loc + torch.relu(latent(x) + 5) @ loading.T, scale).to_event(1), obs=x)


def squared(x):
    loc, loading, scale = constants(x)
    with rows_of(x):
        pyro.sample("x", dist.Normal(loc + latent(x) ** 2 @ loading.T, scale).to_event(1), obs=x)


def product(x):
    """Affine in each latent alone, not in both."""
    loc, loading, scale = constants(x)
    with rows_of(x):
        z = latent(x)
        pyro.sample("x", dist.Normal(loc + z[..., :1] * z[..., 1:] * loading[:, 0], scale).to_event(1), obs=x)


def random_scale(x):
    loc, loading, scale = constants(x)
    with rows_of(x):
        z = latent(x)
        pyro.sample("x", dist.Normal(loc + z @ loading.T, scale * z[..., :1].exp()).to_event(1), obs=x)


# -- shapes


@pytest.mark.parametrize(
    ("shape", "got"),
    [((7,), r"1|\(7,\)"), ((4, 3, 2), r"3|\(4, 3, 2\)"), ((0, 5), "0 sample"), ((5, 0), "0 feature")],
)
@pytest.mark.parametrize("model", [None, *MODELS], ids=repr)
def test_wrong_shapes(shape, got, model):
    with pytest.raises(ValueError, match=got):
        BayesMPT(model=model).fit(np.ones(shape))


@pytest.mark.parametrize("width", [T - 1, T + 2])
@pytest.mark.parametrize(
    "method", ["score", "score_samples", "transform", "impute", "estimate", "partial_fit"]
)
def test_another_number_of_features(x, method, width):
    estimator = BayesMPT(model=PPCA(1))
    estimator = estimator.partial_fit(x) if method == "partial_fit" else estimator.fit(x)
    with pytest.raises(ValueError, match=rf"(?s){width} features.*{T} features"):
        getattr(estimator, method)(np.zeros((4, width)))


def test_latents_of_the_wrong_width(x):
    with pytest.raises(ValueError, match="3"):
        BayesMPT(model=PPCA(1)).fit(x).inverse_transform(np.zeros((4, 3)))


# -- columns and rows without content


@pytest.mark.parametrize("model", [None, *MODELS], ids=repr)
def test_a_column_without_values(x, model):
    frame = pd.DataFrame(x, columns=["a", "b", "ghost", "d", "e"])
    frame["ghost"] = np.nan
    with pytest.raises(ValueError, match="ghost"):
        BayesMPT(model=model).fit(frame)
    with pytest.raises(ValueError, match="2"):
        BayesMPT(model=model).fit(frame.to_numpy())


@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_a_column_without_values_after_fit_is_merely_missing(x, model):
    estimator = BayesMPT(model=model).fit(x)
    hollow = x.copy()
    hollow[:, 2] = np.nan
    cov = factor_covariance(estimator.components_, estimator.noise_variance_)
    truth = log_density(hollow, estimator.mean_, cov)
    np.testing.assert_allclose(estimator.score_samples(hollow), truth, rtol=0, atol=1e-9)
    assert np.isfinite(estimator.transform(hollow)).all() and np.isfinite(estimator.impute(hollow)).all()


@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_a_row_without_values(x, model):
    """It has nothing to say: log p = 0, latents at their prior mean, cells imputed by the mean, the fit unchanged."""
    hollow = np.insert(x, 7, np.nan, axis=0)
    with_it, without = BayesMPT(model=model).fit(hollow), BayesMPT(model=model).fit(x)
    assert with_it.log_marginal_likelihood_ == pytest.approx(without.log_marginal_likelihood_, abs=1e-6)
    assert with_it.score_samples(hollow)[7] == 0
    np.testing.assert_allclose(with_it.transform(hollow)[7], 0, atol=1e-12)
    np.testing.assert_allclose(with_it.impute(hollow)[7], with_it.mean_, rtol=1e-10)


@pytest.mark.parametrize("model", [None, *MODELS], ids=repr)
def test_no_values_at_all(model):
    with pytest.raises(ValueError, match="(?i)nan|missing|observed"):
        BayesMPT(model=model).fit(np.full((20, 4), np.nan))


@pytest.mark.parametrize("infinity", [np.inf, -np.inf])
@pytest.mark.parametrize("model", [None, *MODELS, plain], ids=["None", "PPCA", "FactorAnalysis", "program"])
def test_infinities(x, model, infinity):
    bad = x.copy()
    bad[4, 1] = infinity
    with pytest.raises(ValueError, match="infinity in column 1: "):
        BayesMPT(model=model).fit(bad)
    with pytest.raises(ValueError, match="infinity in column 'b': "):
        BayesMPT(model=model).fit(pd.DataFrame(bad, columns=list("abcdefgh")[: bad.shape[1]]))
    with pytest.raises(ValueError, match="infinity in column 1: "):
        BayesMPT(model=model).fit(x).score_samples(bad)


def test_numbers_too_large_to_square(x):
    """1e200 is finite and its square is not: a clear error or a finite likelihood."""
    bad = x.copy()
    bad[:, 1] *= 1e200
    try:
        lml = BayesMPT(model=PPCA(1)).fit(bad).log_marginal_likelihood_ / N_ROWS
    except ValueError as error:
        assert len(str(error)) > 20
    else:
        assert lml == pytest.approx(ppca_lml(bad, 1), abs=1e-9)


# -- constant and duplicated columns, few rows, many latents


def test_constant_column_factor_analysis_names_it(x):
    frame = pd.DataFrame(x, columns=["a", "b", "c", "flat", "e"]).assign(flat=4.0)
    with pytest.raises(ValueError, match="flat"):
        BayesMPT(model=FactorAnalysis(1)).fit(frame)
    with pytest.raises(ValueError, match="3"):
        BayesMPT(model=FactorAnalysis(1)).fit(frame.to_numpy())


@pytest.mark.parametrize("value", [0.0, 4.0, 0.1, 1e6])
def test_constant_column_ppca_is_well_defined(x, value):
    flat = x.copy()
    flat[:, 3] = value
    estimator = BayesMPT(model=PPCA(1)).fit(flat)
    assert estimator.score(flat) == pytest.approx(ppca_lml(flat, 1), abs=1e-9)


@pytest.mark.parametrize("model", [None, *MODELS], ids=repr)
def test_all_columns_constant(model):
    """The likelihood of any of our models is unbounded."""
    with pytest.raises(ValueError, match="(?i)constant|varian|unbounded"):
        BayesMPT(model=model).fit(np.tile([1.0, 2.0, 3.0, 4.0], (20, 1)))


@pytest.mark.parametrize("factor", [1.0, -2.5])
@pytest.mark.parametrize("n_components", [1, 2])
def test_duplicated_columns_factor_analysis_names_them(x, factor, n_components):
    frame = pd.DataFrame(x, columns=["a", "source", "c", "d", "e"]).assign(
        echo=lambda f: factor * f["source"]
    )
    with pytest.raises(ValueError, match="source|echo"):
        BayesMPT(model=FactorAnalysis(n_components)).fit(frame)


def test_duplicated_columns_ppca(x):
    doubled = np.column_stack([x, x[:, 1]])
    estimator = BayesMPT(model=PPCA(2)).fit(doubled)
    assert estimator.score(doubled) == pytest.approx(ppca_lml(doubled, 2), abs=1e-9)


def test_rank_deficient_data_ppca(x):
    """Exactly two directions and two latents: the noise goes to zero and the likelihood to infinity."""
    flat = np.column_stack([x[:, 0], x[:, 1], x[:, 0] + x[:, 1], x[:, 0] - x[:, 1]])
    with pytest.raises(ValueError, match="(?i)n_components|rank|noise|unbounded"):
        BayesMPT(model=PPCA(2)).fit(flat)


@pytest.mark.parametrize("model", [None, *MODELS], ids=repr)
def test_one_row_to_fit(x, model):
    with pytest.raises(ValueError, match="1 sample|[oO]ne (row|sample)|n_samples ?= ?1"):
        BayesMPT(model=model).fit(x[:1])


def test_one_row_to_search(x):
    with pytest.raises(ValueError, match="1|one"):
        MarginalLikelihoodSearch(BayesMPT(model=PPCA(1)), {"model__n_components": [1, 2]}).fit(x[:1])


def test_one_row_to_score_is_right(x):
    np.testing.assert_allclose(
        BayesMPT(model=plain).fit(x).score_samples(x[4:5]),
        log_density(x[4:5], LOC, COVARIANCE),
        rtol=0,
        atol=1e-9,
    )


@pytest.mark.parametrize("n_rows", [2, 3])
@pytest.mark.parametrize("model", [FactorAnalysis(1), FactorAnalysis(2)], ids=repr)
def test_two_or_three_rows_factor_analysis_is_unbounded(x, model, n_rows):
    """With N - 1 <= K the rows lie on the loadings' plane: no maximum. One latent, three rows: the same columnwise."""
    try:
        estimator = BayesMPT(model=model).fit(x[:n_rows])
    except ValueError as error:
        assert any(word in str(error).lower() for word in ("unbounded", "row", "sample", "column", "noise"))
    else:
        cov = factor_covariance(estimator.components_, estimator.noise_variance_)
        truth = log_density(x[:n_rows], estimator.mean_, cov)
        np.testing.assert_allclose(estimator.score_samples(x[:n_rows]), truth, rtol=1e-9, atol=1e-9)
        assert (estimator.noise_variance_ > 1e-12).all(), "a variance of zero is not a fit"


@pytest.mark.filterwarnings("ignore:n_components=8 is more than the 5 columns")
@pytest.mark.parametrize("n_components", [T, T + 3])
@pytest.mark.parametrize("kind", [PPCA, FactorAnalysis])
def test_as_many_latents_as_columns(x, kind, n_components):
    """Either an error that names the numbers, or the saturated model: the sample covariance itself."""
    try:
        estimator = BayesMPT(model=kind(n_components)).fit(x)
    except ValueError as error:
        assert str(n_components) in str(error) and str(T) in str(error)
    else:
        centred = x - x.mean(0)
        saturated = log_density(x, x.mean(0), centred.T @ centred / N_ROWS).mean()
        assert estimator.score(x) == pytest.approx(saturated, abs=1e-9)
        assert estimator.log_marginal_likelihood_ == pytest.approx(N_ROWS * saturated, abs=1e-4)


def test_one_latent_fewer_than_columns_is_saturated(x):
    centred = x - x.mean(0)
    saturated = log_density(x, x.mean(0), centred.T @ centred / N_ROWS).mean()
    assert BayesMPT(model=PPCA(T - 1)).fit(x).score(x) == pytest.approx(saturated, abs=1e-9)


def test_more_columns_than_rows(x):
    wide = np.random.default_rng(SEED).normal(size=(8, 20))
    assert BayesMPT(model=PPCA(2)).fit(wide).score(wide) == pytest.approx(ppca_lml(wide, 2), abs=1e-9)


# -- what the program observes


def test_the_reference_program_is_exact(x):
    np.testing.assert_allclose(scored(plain, x), log_density(x, LOC, COVARIANCE), rtol=0, atol=1e-9)
    holes = with_holes(x, 0.2, SEED)
    np.testing.assert_allclose(scored(plain, holes), log_density(holes, LOC, COVARIANCE), rtol=0, atol=1e-9)


def test_a_program_that_observes_twice_x_is_scored_on_twice_x(x):
    estimator = BayesMPT(model=twice).fit(x)
    truth = log_density(2 * x, LOC, COVARIANCE)
    np.testing.assert_allclose(estimator.score_samples(x), truth, rtol=0, atol=1e-9)
    assert estimator.log_marginal_likelihood_ == pytest.approx(truth.sum(), abs=1e-8)
    np.testing.assert_allclose(estimator.estimate(x).lml, truth, rtol=0, atol=1e-9)


def test_the_loss_too_scores_twice_x(x):
    rows = torch.as_tensor(x)
    loss = CumulativeMaskedScore()(twice, lambda x: None, rows)(rows)
    assert loss.item() == pytest.approx(-log_density(2 * x, LOC, COVARIANCE).sum(), abs=1e-7)


def test_a_program_that_observes_some_columns(x):
    """The tokens are the observed value: three of five columns, or an error that says so."""
    try:
        values = scored(first_three, x)
    except ERRORS as error:
        assert "3" in str(error)
    else:
        np.testing.assert_allclose(
            values, log_density(x[:, :3], LOC[:3], COVARIANCE[:3, :3]), rtol=0, atol=1e-9
        )


@pytest.mark.parametrize(
    ("program", "parameters"),
    [
        (batch_mean, lambda x: (x.mean(0), COVARIANCE)),
        (batch_scale, lambda x: (LOC, LOADING @ LOADING.T + np.diag(x.var(0, ddof=1)))),
    ],
    ids=["mean", "scale"],
)
def test_statistics_of_the_batch_inside_the_program(x, program, parameters):
    """An error, or the density under the statistics of the rows at hand (or of the training rows): nothing else."""
    x = 50 + 3 * x
    try:
        estimator = BayesMPT(model=program).fit(x)
    except ERRORS as error:
        assert len(str(error)) > 20
        return
    assert estimator.log_marginal_likelihood_ == pytest.approx(log_density(x, *parameters(x)).sum(), rel=1e-9)
    try:
        values = estimator.score_samples(x[:9])
    except ERRORS:
        return
    of_these, of_training = (log_density(x[:9], *parameters(rows)) for rows in (x[:9], x))
    assert np.allclose(values, of_these, rtol=1e-9) or np.allclose(values, of_training, rtol=1e-9)


@pytest.mark.parametrize("leading_zeros", [False, True])
@pytest.mark.parametrize("program", [row_mean, own_cells, signs])
def test_hidden_cells_inside_the_mean_are_refused(x, program, leading_zeros):
    """A density of x whose mean looks at x is none: there is no right answer to give.

    Rows of zeros in front hide it from a test that multiplies the first few rows by something.
    """
    x = x.copy()
    x[: 20 * leading_zeros] = 0
    with pytest.raises(ERRORS, match=r"\bx\b"):
        scored(program, x)


def test_a_batch_mean_behind_leading_zeros(x):
    x = x + 20
    x[:20] = 0
    try:
        estimator = BayesMPT(model=batch_mean).fit(x)
    except ERRORS as error:
        assert len(str(error)) > 20
    else:
        truth = log_density(x, x.mean(0), COVARIANCE).sum()
        assert estimator.log_marginal_likelihood_ == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("program", ["twice", "flipped", "rotated"])
def test_missing_cells_of_a_transformed_observation(x, program):
    """A missing cell is the missing token only where tokens are cells in place; else an error, or the right token."""
    holes = with_holes(x, 0.2, SEED)
    model, tokens = {
        "twice": (twice, 2 * holes),
        "flipped": (flipped, holes[:, ::-1]),
        "rotated": (rotated, None),
    }[program]
    try:
        values = scored(model, holes)
    except ERRORS as error:
        assert "missing" in str(error) and program != "twice"
    else:
        assert tokens is not None, "a rotation of a row with a missing cell has no value"
        np.testing.assert_allclose(values, log_density(tokens, LOC, COVARIANCE), rtol=0, atol=1e-9)


def test_a_rotated_observation_of_complete_rows(x):
    np.testing.assert_allclose(
        scored(rotated, x), log_density(x @ ROTATION, LOC, COVARIANCE), rtol=0, atol=1e-9
    )


def test_a_parameter_that_no_score_depends_on_is_named(x):
    def program(x):
        detached = pyro.param("detached_loading", torch.ones(T, 1, dtype=x.dtype)).detach()
        with rows_of(x):
            pyro.sample("x", dist.Normal(latent(x, 1) @ detached.T, 1.0).to_event(1), obs=x)

    try:
        values = scored(program, x)
    except ERRORS as error:
        assert "detached_loading" in str(error)
    else:
        np.testing.assert_allclose(
            values, log_density(x, np.zeros(T), np.ones((T, T)) + np.eye(T)), rtol=0, atol=1e-9
        )


@pytest.mark.parametrize("model", [None, PPCA(1), FactorAnalysis(1)], ids=repr)
def test_one_column(x, model):
    """An error that says so, or a Gaussian of one variable."""
    column = x[:, :1]
    try:
        estimator = BayesMPT(model=model).fit(column)
    except ValueError as error:
        assert "1 feature" in str(error) or "n_features" in str(error)
    else:
        truth = log_density(column, column.mean(0), column.var(0)[:, None]).mean()
        assert estimator.score(column) == pytest.approx(truth, abs=1e-9)


def test_a_subsampled_plate_is_named(x):
    with pytest.raises(ERRORS, match="some_rows"):
        BayesMPT(model=subsampled).fit(x)


@pytest.mark.slow
def test_a_subsampled_plate_in_the_loss_is_named_or_scaled(x):
    """An error that names the plate, or an unbiased estimate of the whole table's loss."""
    rows = torch.as_tensor(x)
    pyro.set_rng_seed(SEED)
    try:
        loss = CumulativeMaskedScore()(subsampled, lambda x: None, rows)
        values = np.array([loss(rows).item() for _ in range(300)])
    except ERRORS as error:
        assert "some_rows" in str(error)
    else:
        truth = -log_density(x, LOC, COVARIANCE).sum()
        assert values.std() > 0.01 * abs(truth), "other rows every time"
        assert abs(values.mean() - truth) < 3 * values.std() / np.sqrt(len(values))


# -- scales

SCALES = np.array([1e-8, 1e-4, 1.0, 1e4, 1e8])


@pytest.mark.parametrize("n_components", [1, 2])
@pytest.mark.parametrize("order", [1, -1])
def test_scales_ppca(x, n_components, order):
    mixed = x * SCALES[::order]
    estimator = BayesMPT(model=PPCA(n_components)).fit(mixed)
    assert estimator.score(mixed) == pytest.approx(ppca_lml(mixed, n_components), abs=1e-9)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_one_scale_for_the_whole_table_ppca(x, scale):
    """Closed form, and log p changes by T log scale."""
    plain_lml = BayesMPT(model=PPCA(2)).fit(x).score(x)
    scaled = BayesMPT(model=PPCA(2)).fit(scale * x).score(scale * x)
    assert scaled == pytest.approx(ppca_lml(scale * x, 2), abs=1e-9)
    assert scaled == pytest.approx(plain_lml - T * np.log(scale), abs=1e-9)


@pytest.mark.parametrize(
    "scales", [SCALES, SCALES[::-1], np.full(T, 1e-8), np.full(T, 1e8)], ids=["up", "down", "small", "large"]
)
def test_scales_factor_analysis(x, scales):
    """Its maximum is equivariant: every row's log p changes by the sum of the log scales."""
    base = BayesMPT(model=FactorAnalysis(1)).fit(x)
    mixed = BayesMPT(model=FactorAnalysis(1)).fit(x * scales)
    assert mixed.score(x * scales) == pytest.approx(base.score(x) - np.log(scales).sum(), abs=1e-9)
    np.testing.assert_allclose(
        mixed.score_samples(x * scales), base.score_samples(x) - np.log(scales).sum(), rtol=0, atol=1e-6
    )
    np.testing.assert_allclose(
        np.abs(mixed.transform(x * scales)), np.abs(base.transform(x)), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("missing", [False, True])
def test_scales_in_a_program(x, missing):
    def program(x):
        loc, loading, scale = constants(x)
        unit = torch.as_tensor(SCALES, dtype=x.dtype)
        with rows_of(x):
            mean = (loc + latent(x) @ loading.T) * unit
            pyro.sample("x", dist.Normal(mean, scale * unit).to_event(1), obs=x)

    rows = with_holes(x, 0.2, SEED) if missing else x
    units = (~np.isnan(rows) * np.log(SCALES)).sum(1)
    truth = log_density(rows, LOC, COVARIANCE) - units
    np.testing.assert_allclose(scored(program, rows * SCALES), truth, rtol=0, atol=1e-8)


@pytest.mark.parametrize("noise", [1e-6, 1e-8])
def test_tiny_noise_beside_large_loadings(x, noise):
    """Variances 1e-12 and 1e-16 of the signal's: Woodbury cancels here. The truth is in 80 digits."""

    def program(x):
        loc, loading, _ = constants(x)
        with rows_of(x):
            pyro.sample("x", dist.Normal(loc + latent(x) @ loading.T, noise).to_event(1), obs=x)

    rows = LOC + np.random.default_rng(SEED).normal(size=(6, K)) @ LOADING.T
    with mpmath.workdps(80):
        loading = mpmath.matrix(LOADING.tolist())
        cov = loading * loading.T + mpmath.mpf(noise) ** 2 * mpmath.eye(T)
        constant = T * mpmath.log(2 * mpmath.pi) + mpmath.log(mpmath.det(cov))
        truth = []
        for row in rows:
            d = mpmath.matrix([mpmath.mpf(a) - mpmath.mpf(b) for a, b in zip(row, LOC, strict=True)])
            truth.append(float(-(constant + (d.T * mpmath.inverse(cov) * d)[0]) / 2))
    try:
        values = scored(program, rows)
    except ERRORS as error:
        assert "noise" in str(error)
    else:
        # the rows' own rounding is 1e-16: 1e-10 and 1e-8 of the noise
        np.testing.assert_allclose(values, truth, rtol=0, atol=1e-4)


# -- types


@pytest.mark.parametrize("model", [None, *MODELS], ids=repr)
def test_strings(model):
    with pytest.raises(ValueError, match="(?i)string|convert|numeric|dtype"):
        BayesMPT(model=model).fit(np.array([["a", "b"], ["c", "d"], ["e", "f"]]))


def test_a_column_of_strings(x):
    frame = pd.DataFrame(x, columns=list("abcde")).assign(c="red")
    with pytest.raises(ValueError, match="red"):
        BayesMPT(model=PPCA(1)).fit(frame)


@pytest.mark.parametrize(
    "container", [scipy.sparse.csr_matrix, scipy.sparse.csc_array, scipy.sparse.coo_array]
)
@pytest.mark.parametrize("method", ["fit", "score_samples", "transform", "impute"])
def test_sparse_matrices(x, method, container):
    estimator = BayesMPT(model=PPCA(1)).fit(x)
    with pytest.raises((TypeError, ValueError), match="(?i)sparse"):
        getattr(estimator, method)(container(x))


def test_complex_numbers(x):
    with pytest.raises(ValueError, match="(?i)complex"):
        BayesMPT(model=PPCA(1)).fit(x + 1j)


@pytest.mark.parametrize(
    "call",
    [
        lambda e, x: e.score(x),
        lambda e, x: e.score_samples(x),
        lambda e, x: e.transform(x),
        lambda e, x: e.inverse_transform(x[:, :1]),
        lambda e, x: e.impute(x),
        lambda e, x: e.sample(3),
        lambda e, x: e.estimate(x),
        lambda e, x: e.explain(),
        lambda e, x: e.get_covariance(),
        lambda e, x: e.get_precision(),
        lambda e, x: e.get_feature_names_out(),
        lambda e, x: fixed_rate_bias(e, x, 0.5),
        lambda e, x: compare({"one": e, "two": e}, x),
    ],
    ids="score score_samples transform inverse_transform impute sample estimate explain get_covariance get_precision "
    "get_feature_names_out fixed_rate_bias compare".split(),
)
def test_unfitted(x, call):
    with pytest.raises(NotFittedError, match="BayesMPT|one"):
        call(BayesMPT(model=PPCA(1)), x)


@pytest.mark.parametrize("method", ["score", "score_samples", "transform"])
def test_unfitted_search(x, method):
    search = MarginalLikelihoodSearch(BayesMPT(model=PPCA(1)), {"model__n_components": [1, 2]})
    with pytest.raises(NotFittedError, match="MarginalLikelihoodSearch"):
        getattr(search, method)(x)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", 3),
        ("model", "ppca"),
        ("guide", 3),
        ("masks", "uniform"),
        ("masks", UniformSize),
        ("predictor", "magic"),
        ("predictor", 3),
        ("training", "steps"),
        ("training", Ascent),
        ("max_iter", Ascent(max_iter="many")),
        ("max_iter", Ascent(max_iter=0)),
        ("max_iter", Steps(max_iter=2.5)),
        ("tol", Ascent(tol=-1.0)),
        ("tol", Steps(tol="small")),
        ("learning_rate", Steps(learning_rate=0.0)),
        ("learning_rate", Epochs(learning_rate="fast")),
        ("batch_size", Steps(batch_size=0)),
        ("batch_size", Epochs(batch_size=2.5)),
        ("validation_fraction", Epochs(validation_fraction=1.0)),
        ("patience", Epochs(patience=0)),
        ("n_init", 0),
        ("warm_start", "maybe"),
        ("random_state", "seed"),
        ("device", 3.5),
        ("verbose", "loud"),
    ],
    ids=repr,
)
def test_parameter_of_the_wrong_type(x, name, value):
    with pytest.raises((ValueError, TypeError), match=name):
        BayesMPT(
            **{"model": PPCA(1), "training" if isinstance(value, Ascent | Steps | Epochs) else name: value}
        ).fit(x)


def test_unknown_device_is_named(x):
    with pytest.raises((ValueError, RuntimeError), match="abacus"):
        BayesMPT(model=PPCA(1), device="abacus").fit(x)


@pytest.mark.parametrize("value", [-1, 2.5, "best", None], ids=repr)
@pytest.mark.parametrize("kind", [PPCA, FactorAnalysis])
def test_wrong_number_of_latents(x, kind, value):
    with pytest.raises((ValueError, TypeError), match=f"n_components(?s:.*){value}"):
        BayesMPT(model=kind(n_components=value)).fit(x)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("evidence", "waic"),
        ("evidence", HeldOut),
        ("cv", HeldOut(cv=1)),
        ("n_repeats", HeldOut(n_repeats=0)),
        ("visible_share", Cumulative(visible_share=1.5)),
        ("se", Integrated(se=0.0)),
        ("n_jobs", "all"),
        ("refit", "best"),
    ],
    ids=repr,
)
def test_search_parameter_of_the_wrong_type(x, name, value):
    rule = isinstance(value, HeldOut | Cumulative | Integrated)
    options = {"evidence": "heldout"} | {"evidence" if rule else name: value}
    with pytest.raises((ValueError, TypeError), match=name):
        MarginalLikelihoodSearch(BayesMPT(model=PPCA(1)), {"model__n_components": [1, 2]}, **options).fit(x)


def test_search_over_a_parameter_that_does_not_exist(x):
    with pytest.raises(ValueError, match="n_factors"):
        MarginalLikelihoodSearch(
            BayesMPT(model=PPCA(1)), {"model__n_factors": [1, 2]}, error_score="raise"
        ).fit(x)


def test_search_over_a_model_that_is_not_there(x):
    with pytest.raises(ValueError, match="model"):
        MarginalLikelihoodSearch(BayesMPT(), {"model__n_components": [1, 2]}).fit(x)


@pytest.mark.parametrize("grid", [{"model__n_components": []}, [], {"model__n_components": 3}], ids=repr)
def test_search_over_nothing(x, grid):
    with pytest.raises(
        (ValueError, TypeError), match="(?i)grid|empty|non-empty|n_components|sequence|iterable|candidate"
    ):
        MarginalLikelihoodSearch(BayesMPT(model=PPCA(1)), grid).fit(x)


# -- masks that are not the LML


@pytest.mark.parametrize("masks", [FixedRate(), FixedRate(0.4, n_masks=3), LeaveOneOut()], ids=repr)
def test_masks_that_are_not_the_lml_are_refused_where_one_is_reported(x, masks):
    estimator = BayesMPT(model=PPCA(1)).fit(x)
    with pytest.raises(ValueError, match="(?s)LML|marginal") as error:
        estimator.estimate(x, masks=masks)
    assert type(masks).__name__ in str(error.value)


@pytest.mark.parametrize("masks", [FixedRate(0.4), LeaveOneOut()], ids=repr)
def test_training_on_them_still_reports_the_lml(x, masks):
    """They may train; what is then reported is the LML of the model, not the masks' own score."""
    estimator = BayesMPT(model=plain, masks=masks, random_state=0).fit(x)
    truth = log_density(x, LOC, COVARIANCE)
    assert estimator.log_marginal_likelihood_ == pytest.approx(truth.sum(), abs=1e-7)
    np.testing.assert_allclose(estimator.score_samples(x), truth, rtol=0, atol=1e-9)
    np.testing.assert_allclose(estimator.estimate(x).lml, truth, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rate", [0, -0.1, 1.5, "half"], ids=repr)
def test_fixed_rate_bias_of_no_rate(x, rate):
    with pytest.raises((ValueError, TypeError), match="rate"):
        fixed_rate_bias(BayesMPT(model=PPCA(1)).fit(x), x, rate)


@pytest.mark.parametrize("masks", [FixedRate(), LeaveOneOut()], ids=repr)
def test_a_search_ranks_by_no_such_masks(x, masks):
    """Refused, or trained on them and ranked by the LML all the same."""
    search = MarginalLikelihoodSearch(
        BayesMPT(model=plain, masks=masks, random_state=0),
        {"training": [Steps(max_iter=5), Steps(max_iter=6)]},
        evidence="train",
    )
    try:
        search.fit(x)
    except ValueError as error:
        assert "LML" in str(error) and type(masks).__name__ in str(error)
    else:
        truth = log_density(x, LOC, COVARIANCE).sum()
        np.testing.assert_allclose(search.comparison_["lml"], truth, rtol=1e-10)


@pytest.mark.parametrize("masks", ["uniform", 3, UniformSize], ids=repr)
def test_estimate_with_masks_that_are_none(x, masks):
    with pytest.raises((ValueError, TypeError), match="masks"):
        BayesMPT(model=PPCA(1)).fit(x).estimate(x, masks=masks)


@pytest.mark.parametrize("n", [-1, 2.5, "many"], ids=repr)
def test_sample_of_no_size(x, n):
    with pytest.raises((ValueError, TypeError), match="n_samples|integer|n_rows"):
        BayesMPT(model=PPCA(1)).fit(x).sample(n)


def test_latents_that_are_nan(x):
    with pytest.raises(ValueError, match="(?i)nan"):
        BayesMPT(model=PPCA(1)).fit(x).inverse_transform([[np.nan]])


def test_laplace_of_a_parameter_without_prior_says_what_to_do(x):
    """No candidate has this evidence: the error says why, and is none about an empty sequence."""

    def program(x):
        weight = pyro.param("weight", torch.ones(T, dtype=x.dtype))
        with rows_of(x):
            pyro.sample("x", dist.Normal(weight * latent(x, 1), 1.0).to_event(1), obs=x)

    search = MarginalLikelihoodSearch(
        BayesMPT(model=program), {"training": [Ascent(50), Ascent(60)]}, evidence="laplace"
    )
    with pytest.raises(ERRORS, match="(?i)laplace|prior|heldout"):
        search.fit(x)


@pytest.mark.parametrize("evidence", ["auto", "laplace", "heldout", "cumulative", "train"])
def test_a_search_with_infinities(x, evidence):
    bad = x.copy()
    bad[4, 1] = np.inf
    with pytest.raises(ValueError, match="(?i)inf"):
        MarginalLikelihoodSearch(
            BayesMPT(model=PPCA(1)), {"model__n_components": [1, 2]}, evidence=evidence
        ).fit(bad)


# -- programs outside the linear-Gaussian family


@pytest.mark.parametrize("program", [unobserved, empty])
def test_no_observed_site(x, program):
    with pytest.raises(ERRORS, match="(?i)observ|obs="):
        BayesMPT(model=program).fit(x)


@pytest.mark.parametrize(
    ("program", "site"), [(poisson, "counts"), (student_t, "tails"), (gamma_latent, "positive")]
)
def test_a_site_that_is_not_gaussian_is_named(x, program, site):
    with pytest.raises(ERRORS, match=site):
        BayesMPT(model=program, predictor=Exact()).fit(np.round(np.abs(x)))


@pytest.mark.parametrize("program", [bent_far_out, squared, product, random_scale])
def test_not_affine_in_the_latents(x, program):
    with pytest.raises(ERRORS, match=r"\b[xz]\b"):
        BayesMPT(model=program, predictor=Exact()).fit(x)


@pytest.mark.parametrize("program", [poisson, bent_far_out, squared, product, random_scale])
def test_the_loss_refuses_them_too(x, program):
    rows = torch.as_tensor(np.round(np.abs(x)))
    with pytest.raises(ERRORS):
        CumulativeMaskedScore(predictor=Exact())(program, lambda x: None, rows)(rows)


def test_the_program_raises_its_own_error(x):
    def broken(x):
        raise KeyError("no_such_column")

    with pytest.raises(Exception, match="no_such_column"):
        BayesMPT(model=broken).fit(x)


def a_program_with(network, registered):
    def program(x):
        if registered:
            pyro.module("decoder", network)
        with rows_of(x):
            pyro.sample("x", dist.Normal(network(latent(x)), 1.0).to_event(1), obs=x)

    return program


def test_a_network_that_is_not_registered_is_refused(x):
    program = a_program_with(torch.nn.Linear(K, T).double(), registered=False)
    with pytest.raises(ERRORS, match=r"pyro\.module|register"):
        BayesMPT(model=program).fit(x)


def test_svi_refuses_a_network_that_is_not_registered(x):
    program = a_program_with(torch.nn.Linear(K, T).double(), registered=False)
    svi = pyro.infer.SVI(program, lambda x: None, pyro.optim.Adam({"lr": 0.01}), loss=CumulativeMaskedScore())
    with pytest.raises(ERRORS, match=r"pyro\.module|register"):
        svi.step(torch.as_tensor(x))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_registered_or_frozen_network_is_welcome(x, frozen):
    """The counterpart: the refusal above is about the registration, not about networks."""
    torch.manual_seed(SEED)
    network = torch.nn.Linear(K, T).double().requires_grad_(not frozen)
    start = [p.detach().clone().numpy() for p in network.parameters()]
    estimator = BayesMPT(model=a_program_with(network, registered=not frozen)).fit(x)
    at_start = log_density(x, start[1], start[0] @ start[0].T + np.eye(T)).mean()
    if frozen:
        assert estimator.score(x) == pytest.approx(at_start, abs=1e-9)
    else:
        # noise fixed at 1: loadings from the eigenvalues above 1 (Tipping & Bishop with a known noise)
        value, vector = np.linalg.eigh(np.cov(x.T, bias=True))
        kept = vector[:, -K:] * np.sqrt(np.maximum(value[-K:] - 1, 0))
        best = log_density(x, x.mean(0), kept @ kept.T + np.eye(T)).mean()
        assert best > at_start + 0.1
        assert estimator.score(x) == pytest.approx(best, abs=1e-7)


def test_a_parameter_that_is_nan_is_named(x):
    def program(x):
        offset = pyro.param("crooked_offset", torch.full((T,), float("nan"), dtype=x.dtype))
        with rows_of(x):
            pyro.sample("x", dist.Normal(offset + latent(x) @ constants(x)[1].T, 1.0).to_event(1), obs=x)

    with pytest.raises((ValueError, FloatingPointError), match="crooked_offset"):
        BayesMPT(model=program).fit(x)


def test_a_constant_in_float32_says_what_to_write(x):
    """Matrix products of mixed dtypes raise in torch; the message must say what to do."""
    loading = torch.as_tensor(LOADING, dtype=torch.float32)

    def program(x):
        with rows_of(x):
            pyro.sample("x", dist.Normal(latent(x) @ loading.T, 1.0).to_event(1), obs=x)

    try:
        values = scored(program, x)
    except (*ERRORS, RuntimeError) as error:
        assert "dtype" in str(error)
    else:
        cov = loading.double().numpy() @ loading.double().numpy().T + np.eye(T)
        np.testing.assert_allclose(values, log_density(x, np.zeros(T), cov), rtol=0, atol=1e-5)


# -- comparability


def test_compare_refuses_nothing_to_compare(x):
    with pytest.raises(ValueError, match="(?i)empty|at least|no model|nothing"):
        compare({}, x)


def test_compare_refuses_other_features_by_name(x):
    wide, narrow = BayesMPT(model=PPCA(1)).fit(x), BayesMPT(model=PPCA(1)).fit(x[:, :3])
    with pytest.raises(ValueError, match="narrow"):
        compare({"wide": wide, "narrow": narrow}, x)
