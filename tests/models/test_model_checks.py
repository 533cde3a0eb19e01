"""What a model, program or guide must be is checked before anything runs; what is odd about them gives a warning."""

import time

import gpytorch
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from bayes_mpt import BayesMPT, MarginalLikelihoodSearch
from bayes_mpt.models import (
    PPCA,
    VAE,
    BayesianRegression,
    FactorAnalysis,
    FactoredAttention,
    GaussianMixture,
    GaussianProcess,
    LatentClass,
    MaskedPatches,
    MaskedTransformer,
    MixtureOfFactorAnalyzers,
    Potts,
)
from bayes_mpt.training import Ascent, Epochs, Steps

RNG = np.random.default_rng(0)
X = RNG.normal(size=(30, 5))
CODES = RNG.integers(4, size=(30, 4)).astype(float)
BITS = (RNG.random((30, 16)) > 0.5).astype(float)
HUGE = 10**9
NO_SIZE = (-1, 0, 1.5, "x", True, None, HUGE, float("nan"), [2], np.array([1, 2]), object)
NO_SWITCH = (-1, 1.5, "x", None, [2], object)
NO_SD = (-1, 0, "x", True, None, float("nan"), float("inf"), [2], object)
NO_WORD = (-1, 0, 1.5, "x", True, None, [2], object)
layer = torch.nn.Linear


def without(values, *allowed):
    return tuple(v for v in values if not any(v is a for a in allowed))


MISTAKES = [
    (PPCA(), {"n_components": without(NO_SIZE, 0)}),
    (FactorAnalysis(), {"n_components": (*without(NO_SIZE, 0), "auto")}),
    (GaussianMixture(), {"n_components": (*NO_SIZE, "auto"), "covariance_type": (*NO_WORD, "VVV")}),
    (MixtureOfFactorAnalyzers(), {"n_components": NO_SIZE, "n_factors": without(NO_SIZE, 0)}),
    (LatentClass(), {"n_classes": NO_SIZE, "n_levels": (*NO_SIZE, 2)}),
    (
        Potts(),
        {"separable": NO_SWITCH, "field": NO_SWITCH, "max_states": without(NO_SIZE, HUGE), "prior_sd": NO_SD}
        | {"n_levels": (*NO_SIZE, 2)},
    ),
    (
        FactoredAttention(),
        {"n_heads": NO_SIZE, "head_size": without(NO_SIZE, None), "softmax": NO_SWITCH, "field": NO_SWITCH}
        | {"n_levels": (*NO_SIZE, 2), "prior_sd": NO_SD},
    ),
    (
        VAE(hidden=(4,)),
        {
            "latent_dim": NO_SIZE,
            "likelihood": (*NO_WORD, "poisson"),
            "hidden": (16, (4, 0), (4, "a"), None, object),
        }
        | {"image_shape": (3, (2, 2), (5,), (1, 16), (0, 0), "44"), "n_levels": without(NO_SIZE, None, HUGE)}
        | {"encoder": (3, layer(3, 3), layer(32, 3)), "decoder": (3, layer(3, 3), layer(2, 3), object)},
    ),
    (
        MaskedPatches((4, 4), 2, 8, 1, 2),
        {"image_shape": (16, None, "44", (4, 5), (4,), (2, 2)), "patch": (0, "x", None, 3, (2, 2, 2), True)}
        | {
            "width": NO_SIZE,
            "n_layers": NO_SIZE,
            "n_heads": (*NO_SIZE, 3),
            "likelihood": (*NO_WORD, "poisson"),
        }
        | {"n_levels": without(NO_SIZE, None, HUGE)},
    ),
    (
        MaskedTransformer(8, 1, 2),
        {"width": NO_SIZE, "n_layers": NO_SIZE, "n_heads": (*NO_SIZE, 3), "head": (*NO_WORD, "linear")}
        | {
            "n_levels": (-1, 0, 1.5, "x", True, 2, [4, 4], [4, 4, 4, 2], object),
            "groups": (3, [0, 1], [None] * 4),
        },
    ),
    (
        BayesianRegression(),
        {"prior_scale": NO_SD, "noise_shape": NO_SD, "noise_rate": NO_SD, "fit_intercept": NO_SWITCH},
    ),
    (
        GaussianProcess(),
        {"kernel": (3, "gauss", object, gpytorch.kernels.RBFKernel(ard_num_dims=7))}
        | {"mean": (3, "quadratic", gpytorch.means.ZeroMean), "noise": without(NO_SD, 0, None)}
        | {
            "noise_column": (1.5, "x", True, 5, -6),
            "likelihood": (3, "softmax", lambda f: f, lambda: 1, object),
        },
    ),
]
CASES = [
    (model, name, value)
    for model, by_name in MISTAKES
    for name, values in by_name.items()
    for value in values
]
TABLES = {LatentClass: CODES, Potts: CODES, FactoredAttention: CODES, MaskedTransformer: CODES}
TABLES |= {VAE: BITS, MaskedPatches: BITS}


def test_mistakes_are_named_before_anything_runs():
    """Each by its name and without the shapes that Pyro appends; none takes long."""
    found = []
    for model, name, value in CASES:
        wrong = model.__class__(**{**model.get_params(deep=False), name: value})
        start = time.process_time()
        try:
            BayesMPT(wrong, training=Ascent(max_iter=1)).fit(TABLES.get(type(model), X), X[:, 0])
        except (ValueError, TypeError) as error:
            said = str(error)
            # levels too few are said of the cell that has one more
            named = name in said or (name == "n_levels" and "codes 0, ..., 1" in said)
            if "Trace Shapes" in said or not named:
                found.append(f"{type(model).__name__}({name}={value!r}): {said}")
        else:
            found.append(f"{type(model).__name__}({name}={value!r}) is fitted")
        if time.process_time() - start > 5:
            found.append(f"{type(model).__name__}({name}={value!r}) took long")
    assert len(CASES) > 250 and not found, "\n".join(found)


@pytest.mark.parametrize(
    "program",
    [PPCA(-1), PPCA("auto"), GaussianMixture(0), LatentClass(0), VAE(0), GaussianProcess(mean=3)],
    ids=repr,
)
def test_programs_by_themselves_check_too(program):
    args = (torch.as_tensor(X), torch.as_tensor(X[:, 0]))[: 1 + isinstance(program, GaussianProcess)]
    with pytest.raises(ValueError, match=f"{type(program).__name__}: .* must be"):
        program(*args)


def test_a_search_says_what_is_wrong_in_its_table():
    search = MarginalLikelihoodSearch(
        BayesMPT(GaussianMixture(1)), {"model__n_components": [1, -1, "x"]}, evidence="train"
    ).fit(X)
    said = search.comparison_["diag"].iloc[1:].tolist()
    assert all("n_components must be an integer of at least 1, got" in s and "\n" not in s for s in said)


def test_errors_of_a_program_come_as_they_are():
    def refuses(x):
        raise ValueError("three columns are wanted")

    with pytest.raises(ValueError, match="^three columns are wanted$"):
        BayesMPT(refuses).fit(X)


@pytest.mark.parametrize(
    ("named", "given"),
    [
        ({"mean": "zero"}, {"mean": gpytorch.means.ZeroMean()}),
        ({"mean": "constant"}, {}),
        ({"mean": "linear"}, {"mean": gpytorch.means.LinearMean(1)}),
        ({"likelihood": "gaussian"}, {}),
        ({"likelihood": "poisson"}, {"likelihood": lambda f: dist.Poisson(f.exp())}),
        ({"likelihood": "bernoulli"}, {"likelihood": lambda f: dist.Bernoulli(logits=f)}),
    ],
)
def test_means_and_likelihoods_by_name(named, given):
    """The density of data at given latents and initial parameters is that of the objects."""
    x, y = torch.as_tensor(X[:9, :1]), torch.as_tensor(BITS[:9, 0])
    found = []
    for settings in (named, given):
        pyro.clear_param_store()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            trace = pyro.poutine.trace(GaussianProcess(**settings)).get_trace(x, y)
        found.append(float(trace.log_prob_sum().detach()))
    pyro.clear_param_store()
    assert found[0] == found[1]


# ------------------------------------------------------------------------------------------------ programs and guides


def no_argument():
    pass


def three_arguments(x, y, z):
    pass


def normal(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0).expand(x.shape).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": no_argument}, r"no_argument\(\) takes no argument: its data stand in a closure"),
        (
            {"model": three_arguments},
            r"called as three_arguments\(x, y\).*missing a required argument: 'z'.*partial",
        ),
        ({"model": PPCA}, r"the class PPCA: write PPCA\(...\)"),
        (
            {"model": normal, "guide": pyro.infer.autoguide.AutoNormal},
            "guide must be a program, got the class AutoNormal",
        ),
        ({"model": normal, "guide": no_argument}, r"guide no_argument\(\) takes no argument"),
    ],
)
def test_programs_that_cannot_be_called(settings, words):
    with pytest.raises((ValueError, TypeError), match=words):
        BayesMPT(**settings).fit(X, X[:, 0])


# ------------------------------------------------------------------------------------------------------------ warnings


def ignores(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(x.new_zeros(2), 1.0).to_event(1), obs=x.new_zeros(len(x), 2))


def ignores_what_shares_a_latent(x):
    mean = pyro.sample("mean", dist.StudentT(x.new_tensor(5.0), 0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mean[..., None] if mean.dim() else mean, 1.0), obs=x.new_zeros(len(x)))


def holds_its_rows(x):
    loc = pyro.param("loc", torch.zeros(5))
    with pyro.plate("rows", len(X)):
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=torch.as_tensor(X))


@pytest.mark.parametrize("program", [ignores, ignores_what_shares_a_latent, holds_its_rows])
def test_rows_that_are_ignored(program):
    with pytest.warns(UserWarning, match="observed site 'x' does not change with X"):
        BayesMPT(program).fit(X)


def test_rows_that_are_not_ignored():
    """Warnings are errors here: columns that are constant, cells that are computed from, y alone."""

    def computed(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x.sum(1) > 0.0)

    def series(x):
        for t in range(len(x)):
            pyro.sample(f"x_{t}", dist.Normal(0.0, 1.0), obs=x[t, 0])

    BayesMPT(series).fit(X[:9])
    BayesMPT(series).fit(np.tile(X[:, :1], (3, 1)))
    BayesMPT(normal).fit(np.ones((4, 2)))
    BayesMPT(computed).fit(X)
    BayesMPT(BayesianRegression()).fit(X, X[:, 0])


@pytest.mark.parametrize("model", [PPCA(99), FactorAnalysis(6), MixtureOfFactorAnalyzers(1, 6)], ids=repr)
def test_more_latents_than_columns(model):
    with pytest.warns(UserWarning, match=r"=(99|6) is more than the 5 columns of X"):
        BayesMPT(model, training=Ascent(tol=1e-4)).fit(X)


@pytest.mark.filterwarnings("ignore:the training stopped")
@pytest.mark.filterwarnings("ignore:the importance weights")  # of the autoencoder, after one step
@pytest.mark.parametrize(
    ("model", "training"),
    [
        (LatentClass(), Ascent(1)),
        (Potts(), Steps(max_iter=1)),
        (FactoredAttention(), Steps(max_iter=1)),
        (VAE(1, "categorical", hidden=(2,)), Epochs(max_epochs=1)),
        (MaskedTransformer(8, 1, 1), Epochs(max_epochs=1)),
        (MaskedPatches((1, 2), (1, 1), 8, 1, 1, likelihood="categorical"), Epochs(max_epochs=1)),
    ],
    ids=lambda a: type(a).__name__,
)
def test_codes_that_skip_a_level(model, training):
    x = np.array([[0.0, 1.0], [3.0, 0.0], [np.nan, 3.0], [1.0, 1.0]] * 3)
    with pytest.warns(UserWarning, match="go up to 3, but no cell holds 2: .*n_levels=4"):
        BayesMPT(model, training=training, random_state=0).fit(x)
    BayesMPT(model.set_params(n_levels=4), training=training, random_state=0).fit(x)  # no warning
