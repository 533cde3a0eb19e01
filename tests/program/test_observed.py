"""What is observed must be data: values that move, cells that the program fills in or hides itself, rows not read."""

from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.reparam import LocScaleReparam
from scipy import optimize, stats
from scipy.special import betaln
from truths import log_density

from bayes_mpt import BayesMPT
from bayes_mpt.masks import PermutationChain, UniformSize
from bayes_mpt.predictors import (
    Exact,
    Importance,
    NearestNeighbors,
    Quadrature,
    SequentialMonteCarlo,
    choose,
)
from bayes_mpt.program.program import ModelError
from bayes_mpt.score import CumulativeMaskedScore

pytestmark = pytest.mark.usefixtures("own_store")

X = 2 + np.random.default_rng(0).normal(size=(30, 1))
z = X[:, 0]
HOLES = X.copy()
HOLES[::3] = np.nan
SEEN = HOLES[~np.isnan(HOLES)]


CHOICES = pytest.mark.parametrize(
    "predictor", ["auto", Exact(), Quadrature(), Importance(50), SequentialMonteCarlo(16, 2)], ids=str
)


def with_wide_mean(values):
    """Log-density of values with unit noise around one mean ~ N(0, 10^2)."""
    n = len(values)
    return stats.multivariate_normal(np.zeros(n), np.eye(n) + 100).logpdf(values)


def shared_mean(x, value=lambda x: x[:, 0], hide=lambda x: True):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(x)), poutine.mask(mask=hide(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=value(x))


# ---------------------------------------------------------------------------------------- values that move


def test_values_that_change_from_run_to_run_are_refused():
    with pytest.raises(ModelError, match="site 'x' change from run to run"):
        BayesMPT(lambda x: shared_mean(x, lambda x: x[:, 0] + torch.rand(len(x)))).fit(X)


def test_scaled_observations_of_a_gaussian_vector_are_refused():
    scaled = gaussian_vector(lambda y: y * pyro.param("s", torch.tensor(1.0)))
    for predictor in ("auto", NearestNeighbors(5)):
        with pytest.raises(ModelError, match="site 'y'.*Jacobian"):
            BayesMPT(scaled, predictor=predictor).fit(X, z)


def shifted(kind, start):
    """Tokens shifted by a parameter, under some distribution and latents."""

    def program(x):
        mu = pyro.param("mu", torch.tensor(start))
        with pyro.plate("rows", len(x)):
            loc = x.new_zeros(len(x))
            if kind == "latent":
                loc = loc + pyro.sample("a", dist.Normal(0.0, 1.0))
            fn = dist.StudentT(5.0, loc, 1.0) if kind == "student" else dist.Normal(loc, 1.0)
            pyro.sample("r", fn, obs=x[:, 0] - mu)

    return program


@pytest.mark.parametrize("start", [0.0, 1.0])  # at 0 the values are the cells themselves
@pytest.mark.parametrize("kind", ["normal", "student", "latent"])
def test_a_shift_by_a_parameter_keeps_its_density(kind, start):
    best = {
        "normal": stats.norm(z.mean(), 1).logpdf(z).sum(),
        "latent": stats.norm(z.mean(), 2**0.5).logpdf(z).sum(),
        "student": -optimize.minimize_scalar(lambda m: -stats.t(5, m).logpdf(z).sum()).fun,
    }[kind]
    model = BayesMPT(shifted(kind, start), random_state=0).fit(X)
    assert model.log_marginal_likelihood_ == pytest.approx(best, abs=1e-7)


def test_a_residual_of_a_regression_by_parameters():
    x = np.random.default_rng(1).normal(size=(30, 2))
    y = x @ [1.0, -2.0] + z

    def program(x, y):
        w = pyro.param("w", torch.zeros(2))
        with pyro.plate("rows", len(x)):
            pyro.sample("r", dist.Normal(0.0, 1.0), obs=y - x @ w)

    model = BayesMPT(program).fit(x, y)
    w, square, *_ = np.linalg.lstsq(x, y)
    np.testing.assert_allclose(model.params_["w"], w, atol=1e-5)
    truth = -0.5 * square[0] - 15 * np.log(2 * np.pi)
    assert model.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-8)


@pytest.mark.parametrize("start", [1.0, 1.3])
@pytest.mark.parametrize(
    "fn", [dist.Normal(0.0, 1.0), dist.StudentT(5.0, 0.0, 1.0)], ids=["normal", "student"]
)
def test_values_scaled_by_a_parameter_are_refused(fn, start):
    def program(x):
        s = pyro.param("s", torch.tensor(start))
        with pyro.plate("rows", len(x)):
            pyro.sample("r", fn, obs=x[:, 0] * s)

    with pytest.raises(ModelError, match="site 'r'.*Jacobian"):
        BayesMPT(program).fit(X)
    pyro.clear_param_store()
    with pytest.raises(ModelError, match="site 'r'.*Jacobian"):
        CumulativeMaskedScore().loss(program, None, torch.from_numpy(X))


def test_reparametrised_latents_leave_no_tokens():
    rows = np.random.default_rng(0).normal(size=(20, 3))

    def program(x):
        with pyro.plate("rows", len(x)):
            c = pyro.sample("c", dist.Normal(0.0, 1.5))
            pyro.sample("x", dist.Normal(c[..., None], 1.0).expand([*c.shape, 3]).to_event(1), obs=x)

    model = BayesMPT(poutine.reparam(program, {"c": LocScaleReparam(0.0)})).fit(rows)
    truth = stats.multivariate_normal(np.zeros(3), np.eye(3) + 1.5**2).logpdf(rows)
    np.testing.assert_allclose(model.score_samples(rows), truth, atol=1e-10)
    assert len(model.estimate(rows).by_size.size) == 3


# -------------------------------------------------------------------------------- cells that the program hides


def observed(x):
    return ~x[:, 0].isnan()


def zeros(x):
    return x[:, 0].nan_to_num(0.0)


@CHOICES
def test_a_mask_of_what_is_missing_is_as_good_as_none(predictor):
    if isinstance(predictor, SequentialMonteCarlo):
        pytest.skip("noisy")
    model = BayesMPT(lambda x: shared_mean(x, zeros, observed), predictor=predictor, random_state=0).fit(
        HOLES
    )
    error = max(1e-8, 4 * model.log_marginal_likelihood_se_)
    assert model.log_marginal_likelihood_ == pytest.approx(with_wide_mean(SEEN), abs=error)


@pytest.mark.slow
@pytest.mark.parametrize("value", [zeros, lambda x: x[:, 0]], ids=["filled", "as it is"])
def test_an_obs_mask_of_what_is_missing(value):
    def program(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=value(x), obs_mask=observed(x))

    model = BayesMPT(program).fit(HOLES)
    assert model.log_marginal_likelihood_ == pytest.approx(with_wide_mean(SEEN), abs=1e-9)


def test_masks_of_missing_cells_beside_parameters():
    def program(x):
        mu = pyro.param("mu", torch.tensor(0.0))
        with pyro.plate("rows", len(x)), poutine.mask(mask=observed(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=zeros(x))

    model = BayesMPT(program).fit(HOLES)
    truth = stats.norm(SEEN.mean(), 1).logpdf(SEEN).sum()
    assert model.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-8)


def filled_by_parameters(x):
    mu = pyro.param("mu", torch.tensor(0.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=zeros(x))


def filled_beside_students(x):
    with pyro.plate("rows", len(x)):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        pyro.sample("x", dist.StudentT(5.0, mu, 1.0), obs=zeros(x))


def signs(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Bernoulli(pyro.param("p", torch.tensor(0.5))), obs=(x[:, 0] > 2).double())


@pytest.mark.parametrize(
    "program", [lambda x: shared_mean(x, zeros), filled_by_parameters, filled_beside_students, signs]
)
def test_missing_cells_that_the_program_fills_in_are_refused(program):
    with pytest.raises(ModelError, match="fills in missing cells of observed site 'x'.*leave the cells NaN"):
        BayesMPT(program).fit(HOLES)
    model = BayesMPT(program).fit(X)  # no cell is missing: nothing is filled in
    assert np.isfinite(model.log_marginal_likelihood_)
    with pytest.raises(ModelError, match="fills in missing cells of observed site 'x'"):
        model.score_samples(HOLES)


def mean_beside(law, mask, value=lambda x: x[:, 0]):
    """A shared mean, and a mask that says which cells are there."""

    def program(x, y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(x)), poutine.mask(mask=mask(x, y)):
            pyro.sample("x", law(mu), obs=value(x))

    return program


def unit(mu):
    return dist.Normal(mu, 1.0)


def test_a_mask_by_another_argument_makes_cells_missing():
    y = (np.arange(30) % 3 > 0).astype(float)
    model = BayesMPT(mean_beside(unit, lambda x, y: y > 0)).fit(X, y)
    assert model.log_marginal_likelihood_ == pytest.approx(with_wide_mean(z[y > 0]), abs=1e-8)
    assert np.isfinite(model.estimate(X, y, masks=PermutationChain()).total)
    read = choose(mean_beside(unit, lambda x, y: y > 0), (torch.from_numpy(X), torch.from_numpy(y)))
    tokens = read.read((torch.from_numpy(X), torch.from_numpy(y))).value
    np.testing.assert_array_equal(tokens[0].isnan(), y == 0)


def test_a_mask_by_a_column_that_is_no_token():
    x = np.column_stack([z, np.arange(30) % 3])
    model = BayesMPT(mean_beside(unit, lambda x, y: x[:, 1] > 0)).fit(x)
    assert model.log_marginal_likelihood_ == pytest.approx(with_wide_mean(z[x[:, 1] > 0]), abs=1e-8)


@pytest.mark.parametrize("law", [unit, lambda mu: dist.StudentT(5.0, mu, 1.0)], ids=["normal", "student"])
@pytest.mark.parametrize(
    "mask", [lambda x: x[:, 0] > 2, lambda x: x[:, 0] > -50, lambda x: x[:, 0] < x[:, 0].mean() + 20]
)
def test_masks_that_look_at_observed_values_are_refused(law, mask):
    with pytest.raises(ModelError, match="site 'x' moves with observed values.*truncated"):
        choose(mean_beside(law, lambda x, y: mask(x)), (torch.from_numpy(X),))


def test_masks_that_look_at_latents_are_refused():
    def program(x):
        mu = pyro.sample("mu", dist.Normal(2.0, 1.0))
        with pyro.plate("rows", len(x)), poutine.mask(mask=(x[:, 0] * 0 + mu) > 1.5):
            pyro.sample("x", dist.StudentT(5.0, mu, 1.0), obs=x[:, 0])

    with pytest.raises(
        ModelError, match="mask or scale of the program at site 'x' moves with latents|hides every"
    ):
        choose(program, (torch.from_numpy(X),))


def test_a_mask_of_what_is_missing_beside_a_shift():
    def program(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(x)), poutine.mask(mask=observed(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=zeros(x) - mu)

    model = BayesMPT(program).fit(HOLES)
    assert model.log_marginal_likelihood_ == pytest.approx(with_wide_mean(SEEN), abs=1e-8)


def gaussian_vector(value):
    def program(x, y):
        cov = torch.exp(-torch.cdist(x, x)) + torch.eye(len(x))
        pyro.sample("y", dist.MultivariateNormal(x.new_zeros(len(x)), cov), obs=value(y))

    return program


@pytest.mark.parametrize("predictor", ["auto", NearestNeighbors(29)], ids=str)
def test_missing_observations_of_a_gaussian_vector(predictor):
    x, seen = np.arange(30.0)[:, None], ~np.isnan(HOLES[:, 0])
    cov = (np.exp(-np.abs(x - x.T)) + np.eye(30))[np.ix_(seen, seen)]
    truth = stats.multivariate_normal(np.zeros(len(cov)), cov).logpdf(SEEN)
    model = BayesMPT(gaussian_vector(lambda y: y), predictor=predictor).fit(x, HOLES[:, 0])
    assert model.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-9)
    with pytest.raises(ModelError, match="fills in missing cells of observed site 'y'"):
        BayesMPT(gaussian_vector(lambda y: y.nan_to_num(0.0)), predictor=predictor).fit(x, HOLES[:, 0])


@pytest.mark.parametrize("predictor", ["auto", Quadrature()], ids=str)
def test_masks_that_hide_observed_cells_of_rows_with_gaps_are_refused(predictor):
    """Complete cases only: a program that leaves out whole rows."""

    def program(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(x)), poutine.mask(mask=~x.isnan().any(1)):
            pyro.sample("x", dist.Normal(mu, 1.0).expand([len(x), 2]).to_event(1), obs=x)

    with pytest.raises(ModelError, match="hides observed cells of site 'x'.*leave the cells NaN"):
        BayesMPT(program, predictor=predictor).fit(np.hstack([X, HOLES]))


@pytest.mark.parametrize("latent", [True, False])
def test_programs_of_which_everything_is_masked_are_refused(latent):
    def program(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0)) if latent else pyro.param("mu", torch.tensor(0.0))
        with pyro.plate("rows", len(x)), poutine.mask(mask=False):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x[:, 0])

    with pytest.raises(ModelError, match="hides every value of 'x'"):
        BayesMPT(program).fit(X)


@pytest.mark.parametrize("how", ["handler", "distribution"])
@pytest.mark.parametrize("token", [lambda m: dist.Normal(m, 1.0), lambda m: dist.Poisson(m.exp())])
def test_masked_priors_are_refused(token, how):
    def program(x):
        prior = dist.Normal(0.0, 1.0)
        with poutine.mask(mask=how != "handler"):
            mu = pyro.sample("mu", prior.mask(False) if how == "distribution" else prior)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", token(mu), obs=x[:, 0])

    with pytest.raises(ModelError, match="latent site 'mu' is masked"):
        BayesMPT(program).fit(np.abs(X.round()))


def test_series_masked_behind_their_ends():
    """Latents may be masked where nothing visible depends on them: two-state chains of different lengths."""
    step, loc = torch.tensor([[0.9, 0.1], [0.3, 0.7]]).double(), torch.tensor([-1.0, 1.5]).double()
    lengths, x = [4, 2, 3], np.random.default_rng(0).normal(size=(3, 4))

    def program(x):
        with pyro.plate("rows", len(x)):
            state = None
            for t in pyro.markov(range(4)):
                with poutine.mask(mask=t < torch.tensor(lengths)):
                    p = step[0] if state is None else step[state]
                    state = pyro.sample(f"z_{t}", dist.Categorical(p))
                    pyro.sample(f"x_{t}", dist.Normal(loc[state], 1.0), obs=x[:, t])

    def forward(row):
        p = step[0].numpy() * stats.norm(loc.numpy(), 1).pdf(row[0])
        for value in row[1:]:
            p = (p @ step.numpy()) * stats.norm(loc.numpy(), 1).pdf(value)
        return np.log(p.sum())

    truth = [forward(row[:n]) for row, n in zip(x, lengths, strict=True)]
    np.testing.assert_allclose(BayesMPT(program).fit(x).score_samples(x), truth, atol=1e-10)


@pytest.mark.parametrize("latents_too", [False, True])
def test_walks_masked_behind_their_ends_are_in_closed_form(latents_too):
    walks, lengths = np.random.default_rng(0).normal(size=(3, 5)).cumsum(1), np.array([5.0, 2.0, 3.0])

    def program(x, n):
        with pyro.plate("rows", len(x)):
            at = x.new_zeros(len(x))
            for t in pyro.markov(range(5)):
                with poutine.mask(mask=t < n if latents_too else True):
                    at = pyro.sample(f"z_{t}", dist.Normal(at, 1.0))
                with poutine.mask(mask=t < n):
                    pyro.sample(f"x_{t}", dist.Normal(at, 1.0), obs=x[:, t])

    cov = np.minimum.outer(np.arange(1, 6), np.arange(1, 6)) + np.eye(5)
    short = [w[: int(n)] for w, n in zip(walks, lengths, strict=True)]
    truth = [stats.multivariate_normal(np.zeros(len(w)), cov[: len(w), : len(w)]).logpdf(w) for w in short]
    model = BayesMPT(program).fit(walks, lengths)
    assert model.predictor_.name == "Exact"
    np.testing.assert_allclose(model.score_samples(walks, lengths), truth, atol=1e-10)


@pytest.mark.parametrize("holes", [False, True])
def test_a_mask_of_cells_beside_many_latents_is_in_closed_form(holes):
    x = np.random.default_rng(0).normal(size=(9, 3))
    shown = np.random.default_rng(1).uniform(size=(9, 3)) < 0.6
    seen = shown & (np.arange(27).reshape(9, 3) % 4 > 0 if holes else True)
    x[~seen & shown] = np.nan

    def program(x, m):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(6), 1.0).to_event(1))
            loc = z[..., :3] + z[..., 3:]
            pyro.sample("x", dist.Normal(loc, 1.0).mask(m > 0).to_event(1), obs=x)

    model = BayesMPT(program).fit(x, shown.astype(float))
    assert model.predictor_.name == "Exact"
    truth = stats.norm(0, 3**0.5).logpdf(x[seen]).sum()
    assert model.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-10)


# ---------------------------------------------------------------------------------- sites that are no tokens


def test_delta_sites_at_their_own_values_are_deterministic():
    def program(x):
        with pyro.plate("rows", len(x)):
            c = pyro.sample("c", dist.Normal(0.0, 1.0))
            pyro.sample("twice", dist.Delta(2 * c), obs=2 * c)
            pyro.sample("x", dist.Normal(c, 1.0), obs=x[:, 0])

    model = BayesMPT(program).fit(X)
    assert model.log_marginal_likelihood_ == pytest.approx(stats.norm(0, 2**0.5).logpdf(z).sum(), abs=1e-10)
    assert model.predictor_.structure.site_names == ("x",)


@pytest.mark.parametrize(
    ("fn", "match"),
    [
        (lambda c, x: dist.Delta(c), "site 'x' is a Delta at other values"),
        (lambda c, x: dist.Delta(x, log_density=-c), "site 'x' is a Delta with a log-density"),
    ],
)
def test_other_delta_sites_are_refused(fn, match):
    def program(x):
        with pyro.plate("rows", len(x)):
            c = pyro.sample("c", dist.Normal(0.0, 1.0))
            pyro.sample("x", fn(c, x[:, 0]), obs=x[:, 0])

    with pytest.raises(ModelError, match=match):
        choose(program, (torch.from_numpy(X),))


def test_priors_without_density_have_no_evidence():
    def program(x):
        mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x[:, 0])

    with pytest.raises(ModelError, match="latent 'mu' is ImproperUniform.*proper prior"):
        BayesMPT(program).fit(X)


@pytest.mark.parametrize("law", [unit, lambda mu: dist.StudentT(5.0, mu, 1.0)], ids=["normal", "student"])
def test_a_plate_of_literal_size_takes_so_many_rows(law):
    def program(x):
        with pyro.plate("rows", 30):
            c = pyro.sample("c", dist.Normal(0.0, 1.0))
            pyro.sample("x", law(0 * c), obs=x[:, 0] - c)

    def plain(x):
        with pyro.plate("rows", len(x)):
            c = pyro.sample("c", dist.Normal(0.0, 1.0))
            pyro.sample("x", law(c), obs=x[:, 0])

    model = BayesMPT(program).fit(X)
    assert model.log_marginal_likelihood_ == pytest.approx(
        BayesMPT(plain).fit(X).log_marginal_likelihood_, abs=1e-8
    )
    with pytest.raises(ModelError, match=r"plate 'rows' has 30 entries and x has 5 rows.*len\(x\)"):
        model.score_samples(X[:5])


# ------------------------------------------------------------------------------------- rows and their plate


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("holes", [False, True])
def test_a_plate_of_rows_right_of_a_plate_of_columns(width, holes):
    x = np.random.default_rng(0).normal(size=(7, 3))
    if holes:
        x[[1, 4], [0, 2]] = np.nan
    loading = torch.tensor([[1.0, 1.0, 1.0], [0.5, -1.0, 2.0]]).double()[:width]

    def program(x):
        with pyro.plate("rows", len(x), dim=-1):
            c = pyro.sample("c", dist.Normal(x.new_zeros(len(x), width), 1.0).to_event(1))
            with pyro.plate("columns", 3, dim=-2):
                pyro.sample("x", dist.Normal((c @ loading).transpose(-1, -2), 1.0), obs=x.mT)

    cov = np.eye(3) + loading.numpy().T @ loading.numpy()
    truth = log_density(x, np.zeros(3), cov)
    model = BayesMPT(program).fit(x)
    np.testing.assert_allclose(model.score_samples(x), truth, atol=1e-10)
    np.testing.assert_allclose(model.score_samples(x[:4]), truth[:4], atol=1e-10)
    assert model.log_marginal_likelihood_se_ == 0 and model.transform(x).shape == (7, width)


# --------------------------------------------------------------------------------------- rows that were not read


def coins(x):
    with pyro.plate("rows", len(x)):
        c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.5)))
        pyro.sample(
            "x",
            dist.Bernoulli(torch.where(c == 1, 0.9, 0.2)[..., None].expand(*c.shape, 3)).to_event(1),
            obs=x,
        )


def students(x):
    with pyro.plate("rows", len(x)):
        c = pyro.sample("c", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.StudentT(5.0, c[..., None].expand(*c.shape, 3), 1.0).to_event(1), obs=x)


def one_mean(x):
    m = pyro.sample("m", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0).expand([len(x), 3]).to_event(1), obs=x)


A = torch.ones(4, 3, dtype=torch.float64)
B = A * torch.tensor([1.0, 0.0, 0.0])
VISIBLE = torch.tensor([[True, False, True]])
QUESTIONS = {
    "score": lambda read, wide: read.score(),
    "conditionals": lambda read, wide: read.conditionals(VISIBLE.repeat(1, wide)),
    "chain": lambda read, wide: read.chain(torch.arange(3 * wide)[None]),
    "evidence": lambda read, wide: read.evidence().by_row,
    "posterior": lambda read, wide: read.posterior().tokens,
    "masks": lambda read, wide: read.score(UniformSize(2).draw(3 * wide, 0)),
    "chain score": lambda read, wide: read.score(PermutationChain().draw(3 * wide, 0)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "predictor"),
    [
        (coins, "auto"),
        (students, Quadrature(8)),
        (students, Importance(10)),
        (one_mean, SequentialMonteCarlo(8, 2, 1)),
    ],
    ids=["sum", "quadrature", "importance", "particles"],
)
@torch.no_grad()
def test_a_reading_answers_for_its_own_rows(program, predictor):
    """Whatever else is read; and where other rows need a reading of their own, it says so."""
    bound = choose(program, (A,), predictor=predictor)
    line = isinstance(predictor, SequentialMonteCarlo)
    wide = 4 if line else 1
    for ask in QUESTIONS.values():
        torch.manual_seed(0)
        want = ask(bound.read((A,)), wide)
        torch.manual_seed(0)
        read = bound.read((A,))
        state = torch.get_rng_state()
        bound.read((B,)).evidence()
        torch.set_rng_state(state)
        torch.testing.assert_close(ask(read, wide), want, rtol=1e-6, atol=1e-6)
    with pytest.raises(ModelError, match=r"call read\(args\) with the others"):
        read.at(B.reshape(1, -1) if line else B)


@torch.no_grad()
def test_maps_of_each_row_refuse_another_number_of_rows():
    def program(x, t):
        with pyro.plate("rows", len(x)):
            c = pyro.sample("c", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal((c * t)[..., None].expand(*c.shape, 3), 1.0).to_event(1), obs=x)

    t = torch.arange(4).double()
    read = choose(program, (A, t)).read((A, t))
    covs = [np.eye(3) + float(s) ** 2 for s in t]
    truth = [stats.multivariate_normal(np.zeros(3), c).logpdf(B[0].numpy()) for c in covs]
    np.testing.assert_allclose(read.at(B).score(), truth, atol=1e-12)  # the maps do not look at the tokens
    for other, match in ((B[:1], "call read"), (B[:, :1], "3 tokens")):
        with pytest.raises(ModelError, match=match):
            read.at(other).score()


@torch.no_grad()
def test_particles_of_a_reading_do_not_depend_on_what_was_asked_before():
    x = torch.full((20, 1), -2.0, dtype=torch.float64)

    def program(x):
        m = pyro.sample("m", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x[:, 0])

    bound = choose(program, (x,), predictor=SequentialMonteCarlo(64, 4))
    means = []
    for first in ("posterior", "evidence"):
        torch.manual_seed(0)
        read = bound.read((x,))
        getattr(read, first)()
        again = read.evidence(), read.evidence()
        assert float(again[0].by_row) == float(again[1].by_row)
        means.append(float(read.posterior().mean))
    assert means[0] == means[1] == pytest.approx(float(x.sum()) / 21, abs=0.1)
    other = bound.read((-x,))  # what was found for other rows is gone
    assert float(other.posterior().mean) == pytest.approx(-float(x.sum()) / 21, abs=0.1)


# ------------------------------------------------------------------------- dependences that a few rows do not show


def linear(mean=lambda x: 0.0, prior=lambda x: 0.0, value=lambda x, z: x, k=1, refuses=lambda n: False):
    """Factor analysis with fixed loadings, something added to its mean, to its prior's mean, to what it observes."""
    loading = torch.randn(4, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def program(x):
        if refuses(len(x)):
            raise ValueError("so many rows are not taken")
        scale = pyro.param("scale", x.new_tensor(1.0), constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(k) + prior(x), 1.0).to_event(1))
            loc = z @ loading.mT + mean(x)
            pyro.sample("x", dist.Normal(loc, scale * x.new_ones(4)).to_event(1), obs=value(x, z))

    program.loading = loading
    return program


@pytest.mark.parametrize(("k", "n"), [(5, 9), (7, 20)])
@pytest.mark.parametrize("where", ["mean", "prior"])
def test_a_program_that_refuses_few_rows_is_checked_on_all(k, n, where):
    """As many rows as probes are taken, or all; in both the first row is looked at."""
    program = linear(**{where: lambda x: x[0, :1]}, k=k, refuses=lambda rows: rows < 9)
    with pytest.raises(ModelError, match="changes with the observed x itself"):
        BayesMPT(program, random_state=0).fit(np.random.default_rng(1).normal(size=(n, 4)))


@pytest.mark.parametrize(("k", "n"), [(1, 5), (2, 6), (4, 8), (5, 9)])
def test_a_parameter_of_each_row_where_rows_are_as_many_as_probes(k, n):
    """x ~ N(c_n, W W' + s): a shift for each row, zero at first; its maximum is that of least squares."""
    x = np.random.default_rng(1).normal(size=(n, 4))
    shifts = lambda x: pyro.param("shift", lambda: x.new_zeros(n, 1))  # noqa: E731
    program = linear(mean=shifts, k=k)
    model = BayesMPT(program, random_state=0).fit(x)
    cov = (program.loading @ program.loading.mT).numpy() + model.params_["scale"] ** 2 * np.eye(4)
    one = np.linalg.solve(cov, np.ones(4))
    best = x @ one / one.sum()
    np.testing.assert_allclose(model.params_["shift"][:, 0], best, atol=1e-4)
    want = sum(
        stats.multivariate_normal(np.full(4, c), cov).logpdf(row) for c, row in zip(best, x, strict=True)
    )
    assert model.log_marginal_likelihood_ == pytest.approx(want, abs=1e-6)


def test_values_that_move_only_far_out_in_the_prior():
    """Where no draw of the prior that was looked at has moved them: a shift that is not affine, for quadrature."""
    x = np.random.default_rng(1).normal(size=(24, 4))
    program = linear(value=lambda x, z: x + torch.relu(z.abs() - 2.35))
    bound = choose(program, (torch.from_numpy(x),))
    assert bound.name == "Quadrature"
    loading, z = program.loading[:, 0].numpy(), np.linspace(-9, 9, 20_001)[:, None, None]
    kernel = stats.norm.logpdf(x, z * loading - np.maximum(np.abs(z) - 2.35, 0)).sum(-1) + stats.norm.logpdf(
        z[..., 0]
    )
    want = np.log(np.exp(kernel).sum(0) * 18 / 20_000).sum()
    found = bound.read((torch.from_numpy(x),)).evidence()
    assert float(found.by_row.sum()) == pytest.approx(want, abs=0.01)


def test_a_statistic_that_only_a_change_of_some_rows_moves():
    program = linear(mean=lambda x: (x.mean().abs() > 2).double())
    with pytest.raises(ModelError, match="depends on other rows"):
        BayesMPT(program).fit(np.random.default_rng(1).normal(5.0, size=(20, 4)))


def test_a_number_of_rows_is_no_dependence_on_their_values():
    x = np.random.default_rng(1).normal(size=(20, 4))
    program = linear(mean=lambda x: 1.0 if len(x) < 10 else 0.0, k=6)
    model = BayesMPT(program, random_state=0).fit(x)
    cov = (program.loading @ program.loading.mT).numpy() + model.params_["scale"] ** 2 * np.eye(4)
    want = stats.multivariate_normal(np.zeros(4), cov).logpdf(x).sum()
    assert model.log_marginal_likelihood_ == pytest.approx(want, abs=1e-9)


def at_two_sites(x, other=dist.Normal):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("a", dist.Normal(mean, 1.0), obs=x[:, 0])
        pyro.sample("b", other(mean, 2.0), obs=x[:, 0])


def in_copies(x):
    mean = pyro.sample("mean", dist.Normal(x.new_zeros(3), 2.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("a", dist.Normal(mean, 1.0).to_event(1), obs=x[:, :1].expand(-1, 3))


def in_a_loop(x):
    level = pyro.param("level", lambda: x.new_zeros(()))
    for t in range(len(x)):
        pyro.sample(f"x_{t}", dist.Normal(level, 1.0), obs=x[min(t, 3), 0])


def copied(x, of=lambda x: x[:, [0, 0]]):
    mean = pyro.sample("mean", dist.Normal(x.new_zeros(()), 2.0))
    obs = of(x)
    with pyro.plate("rows", len(obs)):
        pyro.sample("a", dist.Normal(mean, 1.0).expand(obs.shape).to_event(1), obs=obs)


def copied_in_rows(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 2.0))
        pyro.sample("a", dist.Normal(z[..., None], 1.0).expand([*z.shape, 2]).to_event(1), obs=x.repeat(1, 2))


def copied_shifted(x):
    mean = pyro.sample("mean", dist.Normal(x.new_zeros(()), 2.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0), obs=x[:, 0] - mean)
        pyro.sample("b", dist.Normal(mean, 2.0), obs=x[:, 0] * 1.0)


def one_latent_of_rows(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z[..., None], 1.0).expand([*z.shape, 2]).to_event(1), obs=x)


@pytest.mark.parametrize(
    "program",
    [
        at_two_sites,
        partial(at_two_sites, other=dist.Laplace),
        in_copies,
        in_a_loop,
        copied,
        partial(copied, of=lambda x: torch.cat([x, x])),
        partial(copied, of=lambda x: torch.stack([x[:, 0], x[:, 0]], -1)),
        copied_in_rows,
        copied_shifted,
    ],
)
def test_cells_that_would_count_twice_are_refused(program):
    with pytest.raises(ModelError, match="is observed more than once.*count twice"):
        BayesMPT(program).fit(np.linspace(0, 1, 6)[:, None])


def categories(x, columns=(0, 1)):
    share = pyro.sample("share", dist.Dirichlet(x.new_ones(2)))
    with pyro.plate("rows", len(x)):
        for name, column in zip("ab", columns, strict=True):
            pyro.sample(name, dist.Categorical(share), obs=x[:, column].long())


def test_equal_columns_are_no_copies():
    x = np.repeat([[0.0], [1.0], [1.0], [0.0], [1.0]], 2, axis=1)
    truth = betaln(7, 5)  # six ones of ten
    assert BayesMPT(categories).fit(x).log_marginal_likelihood_ == pytest.approx(truth, abs=1e-9)
    with pytest.raises(ModelError, match=r"cell x\[:, 0\] is observed more than once, by site 'a', 'b'"):
        BayesMPT(partial(categories, columns=(0, 0))).fit(x)
    rows = BayesMPT(one_latent_of_rows).fit(x)
    cov = np.eye(2) + 1
    truth = stats.multivariate_normal(np.zeros(2), cov).logpdf(x).sum()
    assert rows.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-9)


def test_cells_that_one_of_two_sites_scores_are_not():
    """Which site it is says another column, by masks that leave each cell once."""

    def program(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        wide = x[:, 1] > 0
        with pyro.plate("rows", len(x)):
            with poutine.mask(mask=~wide):
                pyro.sample("narrow", dist.Normal(mean, 1.0), obs=x[:, 0])
            with poutine.mask(mask=wide):
                pyro.sample("wide", dist.Normal(mean, 3.0), obs=x[:, 0])

    y, wide = np.linspace(-1, 2, 8), np.arange(8) % 2
    truth = stats.multivariate_normal(np.zeros(8), np.diag(np.where(wide, 9.0, 1.0)) + 4.0).logpdf(y)
    fitted = BayesMPT(program).fit(np.c_[y, wide])
    assert fitted.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-9)


def test_weights_of_rows_are_refused():
    def weighed(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", len(x)), poutine.scale(scale=x[:, 1]):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x[:, 0])

    with pytest.raises(ModelError, match="'x' has a scale of its own for each row.*Repeat rows"):
        BayesMPT(weighed).fit(np.c_[np.linspace(0, 1, 6), np.arange(1.0, 7.0)])
