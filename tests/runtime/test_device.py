"""A fit on another device is the same fit: on a GPU where there is one, else on tensors that only claim to be away.

The claim is enough to find what stays behind: every operation on tensors of both places is refused, as a GPU would.
"""

from __future__ import annotations

import io
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pretend_device import DEVICE, away
from pyro.distributions.constraints import simplex
from pyro.nn import PyroModule
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_digits, load_iris
from sklearn.gaussian_process.kernels import RBF, Matern
from tables import with_holes

from bayes_mpt import BayesMPT, MarginalLikelihoodSearch
from bayes_mpt.masks import UniformSize
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
from bayes_mpt.predictors import (
    AnnealedImportance,
    Importance,
    NearestNeighbors,
    Quadrature,
    SequentialMonteCarlo,
)
from bayes_mpt.training import Ascent, Epochs, Steps

if DEVICE is None:
    pytest.skip("no GPU, and this torch cannot pretend one", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings(
    "ignore:the importance weights",
    "ignore:the training stopped",
    "ignore:the estimate of",
    "ignore:.*diverged to",
)


@pytest.fixture(autouse=True)
def place():
    pyro.clear_param_store()
    with away():
        yield


IRIS = load_iris().data
DIABETES = load_diabetes(scaled=False)
PIXELS = (load_digits().images[:200, ::2, 2:6] > 8).reshape(-1, 16).astype(np.float32)
CODES = np.digitize(IRIS, np.quantile(IRIS, [1 / 3, 2 / 3])).astype(float)
LINE = np.sort(np.random.default_rng(1).uniform(0, 10, 60))[:, None]
WAVE = np.sin(LINE[:, 0]) + 0.1 * np.random.default_rng(2).normal(size=60)


def own(x):
    """Written without a thought of devices."""
    w = pyro.param("w", lambda: torch.full((2, x.shape[1]), 0.1))
    b, sd = pyro.param("b", torch.zeros(x.shape[1])), pyro.param("sd", torch.tensor(1.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        rate = torch.exp(z @ w * sd + b)
        pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)


def hidden_markov(x):
    start = pyro.param("start", lambda: torch.tensor([0.6, 0.4]), constraint=simplex)
    move = pyro.param("move", lambda: torch.tensor([[0.8, 0.2], [0.3, 0.7]]), constraint=simplex)
    loc = pyro.param("loc", lambda: torch.tensor([0.0, 1.0]))
    with pyro.plate("rows", len(x), dim=-1):
        state = pyro.sample("s0", dist.Categorical(start), infer={"enumerate": "parallel"})
        pyro.sample("x0", dist.Normal(loc[state], 1.0), obs=x[:, 0])
        for t in range(1, x.shape[1]):
            state = pyro.sample(f"s{t}", dist.Categorical(move[state]), infer={"enumerate": "parallel"})
            pyro.sample(f"x{t}", dist.Normal(loc[state], 1.0), obs=x[:, t])


def logistic(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=(x * w).sum(-1)), obs=y)


COUNTS = np.random.default_rng(3).poisson(2.0, (40, 5)).astype(float)

# the same up to rounding: what has no randomness, or random numbers that are drawn on the CPU
EXACT = {
    "auto": (BayesMPT(), IRIS),
    "ppca": (BayesMPT(PPCA(2)), with_holes(IRIS, 0.1)),
    "factor analysis": (BayesMPT(FactorAnalysis(2)), IRIS),
    "factor analysis, holes": (BayesMPT(FactorAnalysis(1)), with_holes(IRIS, 0.1)),
    "factor analysis, masks": (
        BayesMPT(FactorAnalysis(2), masks=UniformSize(4), training=Steps(max_iter=4)),
        IRIS,
    ),
    "minibatches": (BayesMPT(FactorAnalysis(2), training=Steps(batch_size=32, max_iter=8)), IRIS),
    "regression": (BayesMPT(BayesianRegression()), DIABETES.data[:4, :1], DIABETES.target[:4]),
    "mixture": (BayesMPT(GaussianMixture(2)), IRIS),
    "mixture, holes": (BayesMPT(GaussianMixture(2), training=Ascent(max_iter=6)), with_holes(IRIS, 0.1)),
    "mixture of factor analysers": (
        BayesMPT(MixtureOfFactorAnalyzers(2, 1), training=Ascent(max_iter=6)),
        IRIS,
    ),
    "latent class": (BayesMPT(LatentClass(2), training=Ascent(max_iter=6)), CODES),
    "hidden Markov": (BayesMPT(hidden_markov, training=Ascent(max_iter=3)), COUNTS),
    "own program, quadrature": (BayesMPT(own, predictor=Quadrature(7), training=Ascent(max_iter=3)), COUNTS),
    "gaussian process": (BayesMPT(GaussianProcess(1.0 * RBF()), training=Ascent(max_iter=4)), LINE, WAVE),
    "nearest neighbours": (
        BayesMPT(
            GaussianProcess(1.0 * Matern(nu=1.5)), predictor=NearestNeighbors(8), training=Ascent(max_iter=4)
        ),
        LINE,
        WAVE,
    ),
    "potts": (BayesMPT(Potts(), training=Steps(max_iter=3)), CODES[:60]),
    "attention": (BayesMPT(FactoredAttention(2, 2), training=Steps(max_iter=4)), CODES[:60]),
    "patches": (
        BayesMPT(
            MaskedPatches((4, 4), (2, 2), width=8, n_layers=1, n_heads=2), training=Epochs(max_epochs=2)
        ),
        PIXELS,
    ),
}
# random numbers are drawn on the device itself: it runs, and gives finite numbers
RANDOM = {
    "own program": (BayesMPT(own, predictor=Importance(20), training=Steps(max_iter=4)), COUNTS),
    "transformer": (BayesMPT(MaskedTransformer(8, 1, 2, n_levels=3), training=Epochs(max_epochs=3)), CODES),
    "vae": (BayesMPT(VAE(2, hidden=(8,)), training=Epochs(max_epochs=3)), PIXELS),
    "vae, holes": (BayesMPT(VAE(2, hidden=(8,)), training=Epochs(max_epochs=3)), with_holes(PIXELS, 0.1)),
    "vae, gaussian": (
        BayesMPT(VAE(2, "gaussian", hidden=(8,)), training=Epochs(max_epochs=3)),
        with_holes(IRIS, 0.1),
    ),
    "vae, student": (BayesMPT(VAE(2, "studentt", hidden=(8,)), training=Epochs(max_epochs=3)), IRIS),
    "vae, codes": (BayesMPT(VAE(2, "categorical", hidden=(8,)), training=Epochs(max_epochs=3)), CODES),
    "vae, image": (BayesMPT(VAE(2, hidden=(8,), image_shape=(4, 4)), training=Epochs(max_epochs=2)), PIXELS),
    "vae, dream": (
        BayesMPT(VAE(2, hidden=(8,)), predictor=Importance(20, dream=True), training=Epochs(max_epochs=2)),
        PIXELS,
    ),
    "annealed": (
        BayesMPT(VAE(2, hidden=(8,)), predictor=AnnealedImportance(4, 3), training=Epochs(max_epochs=1)),
        PIXELS[:20],
    ),
    "particles": (
        BayesMPT(logistic, predictor=SequentialMonteCarlo(8, num_runs=2)),
        DIABETES.data[:30] / DIABETES.data[:30].std(0),
        (DIABETES.target[:30] > 150).astype(float),
    ),
}


# where rounding is magnified: the way of L-BFGS, Adam's steps where a gradient is zero but for it
LOOSER = {
    "factor analysis, holes": 1e-4,
    "factor analysis, masks": 0.02,
    "patches": 1e-3,
}


# one of each family comes back from a file, to either place
FROM_A_FILE = {"ppca", "mixture", "regression", "gaussian process", "potts", "own program, quadrature"}


class _NothingAway(pickle.Pickler):
    def reducer_override(self, obj):
        assert not (isinstance(obj, torch.Tensor) and obj.device.type != "cpu"), "a file would hold it"
        return NotImplemented


def unpickled(model):
    file = io.BytesIO()
    _NothingAway(file).dump(model)
    file.seek(0)
    return pickle.load(file)


def close(a, b, tol=1e-6):
    np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


def fitted(case, device):
    model, *data = case
    return clone(model).set_params(device=device, random_state=0).fit(*data)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_same_fit(name):
    _, *data = EXACT[name]
    here, there = fitted(EXACT[name], "cpu"), fitted(EXACT[name], DEVICE)
    tol = LOOSER.get(name, 1e-6)
    scores = there.score_samples(*data)
    np.testing.assert_allclose(scores, here.score_samples(*data), rtol=tol, atol=tol)
    assert there.params_.keys() == here.params_.keys()
    if name in FROM_A_FILE:
        back = unpickled(there)
        close(back.score_samples(*data), scores, 1e-9)  # where it was
        close(back.set_params(device="cpu").score_samples(*data), scores)
        if name == "ppca":
            close(back.set_params(device=DEVICE).score_samples(*data), scores, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", RANDOM)
def test_runs(name):
    _, *data = RANDOM[name]
    there = fitted(RANDOM[name], DEVICE)
    assert np.isfinite(there.score_samples(*data)).all()


class TestWhatAFitIsUsedFor:
    @pytest.mark.slow
    def test_table(self):
        X = with_holes(IRIS, 0.1)
        here, there = (fitted((BayesMPT(PPCA(2)), X), device) for device in ("cpu", DEVICE))
        close(abs(there.transform(X)), abs(here.transform(X)))
        close(there.impute(X), here.impute(X))
        close(there.inverse_transform(there.transform(X)), here.inverse_transform(here.transform(X)))
        close(there.get_covariance(), here.get_covariance())
        close(there.estimate(X).lml, here.estimate(X).lml)
        assert there.sample(5).shape == (5, 4)

    def test_evidence(self):
        here, there = (fitted((BayesMPT(FactorAnalysis(1)), IRIS), device) for device in ("cpu", DEVICE))
        close(there.laplace(IRIS).log_evidence, here.laplace(IRIS).log_evidence)

    @pytest.mark.slow
    @pytest.mark.parametrize("predictor", ["auto", NearestNeighbors(8)])
    def test_gaussian_process(self, predictor):
        case = BayesMPT(GaussianProcess(1.0 * RBF()), predictor=predictor), LINE[::3], WAVE[::3]
        here, there = (fitted(case, device) for device in ("cpu", DEVICE))
        at = np.linspace(0, 12, 7)[:, None]
        for a, b in zip(there.predict(at, return_std=True), here.predict(at, return_std=True), strict=True):
            close(a, b, 1e-5)
        if (
            predictor == "auto"
        ):  # of neighbours it takes a run of the program for each of its many evaluations
            evidence = [model.integrated(*case[1:]).log_evidence for model in (there, here)]
            close(*evidence, 1e-4)

    @pytest.mark.slow
    def test_autoencoder(self):
        X = with_holes(PIXELS, 0.1)
        there = fitted((BayesMPT(VAE(2, hidden=(8,)), training=Epochs(max_epochs=2)), X), DEVICE)
        assert there.transform(X).shape == (200, 2)
        filled = there.impute(X)
        seen = ~np.isnan(X)
        assert np.array_equal(filled[seen], X[seen])
        assert np.isfinite(filled).all()
        assert there.sample(5).shape == (5, 16)
        assert np.isfinite(there.sample_missing(X[:5], n_samples=2)).all()

    @pytest.mark.slow
    def test_bounds(self):
        case = (
            BayesMPT(VAE(2, hidden=(8,)), predictor=AnnealedImportance(2, 3), training=Epochs(max_epochs=1)),
            PIXELS[:10],
        )
        assert np.isfinite(fitted(case, DEVICE).bidirectional(10).gap)

    @pytest.mark.slow
    def test_network(self):
        class Program(PyroModule):
            def __init__(self):
                super().__init__()
                self.net = PyroModule[torch.nn.Linear](2, 4)

            def forward(self, x):
                with pyro.plate("rows", len(x)):
                    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                    pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)

        torch.manual_seed(0)
        program = Program()
        here, there = (fitted((BayesMPT(program), IRIS), device) for device in ("cpu", DEVICE))
        close(there.score_samples(IRIS), here.score_samples(IRIS), 1e-4)

    @pytest.mark.skipif(DEVICE != "cuda", reason="torch.save needs a device of its own")
    def test_resumes(self, tmp_path):
        def model(max_iter, checkpoint):
            return BayesMPT(
                VAE(2, hidden=(8,)),
                device=DEVICE,
                training=Epochs(max_epochs=max_iter, checkpoint=checkpoint, patience=9),
                random_state=0,
            )

        whole = model(4, None).fit(PIXELS)
        model(2, tmp_path / "at.pt").fit(PIXELS)
        resumed = model(4, tmp_path / "at.pt").fit(PIXELS)
        for name, value in whole.params_.items():
            close(resumed.params_[name], value, 1e-5)

    @pytest.mark.slow
    def test_search(self):
        here, there = (
            MarginalLikelihoodSearch(
                BayesMPT(device=device, random_state=0), {"model": [PPCA(1), PPCA(2), FactorAnalysis(1)]}
            ).fit(IRIS)
            for device in ("cpu", DEVICE)
        )
        close(there.cv_results_["mean_test_score"], here.cv_results_["mean_test_score"])


@pytest.mark.parametrize("device", ["nonsense", "xla"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(ValueError, match="not one that torch finds here"):
        BayesMPT(device=device).fit(IRIS)
    fitted = BayesMPT().fit(IRIS).set_params(device=device)
    with pytest.raises(ValueError, match="not one that torch finds here"):
        fitted.score(IRIS)
