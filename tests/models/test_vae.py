"""Deep latent-variable models: the program, its training by epochs, its evidence, what it fills in."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import norm
from sklearn.base import clone
from sklearn.datasets import load_digits, load_wine
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tables import with_holes
from torch import nn

from bayes_mpt import BayesMPT, HeldOut, MarginalLikelihoodSearch
from bayes_mpt.masks import UniformSize
from bayes_mpt.models import VAE
from bayes_mpt.predictors import AnnealedImportance, Importance, Quadrature, choose
from bayes_mpt.program.batched import Batched
from bayes_mpt.program.store import OwnStore
from bayes_mpt.training import Epochs

pytestmark = [
    pytest.mark.usefixtures("nothing_left_behind"),
    pytest.mark.filterwarnings("ignore:the importance weights", "ignore:the training stopped"),
]


@pytest.fixture(scope="module")
def digits():
    """Binary pixels, 4 x 4 of 8 x 8: few enough for grids over two latents to be quick."""
    return (load_digits().images[:, ::2, 2:6] > 8).reshape(-1, 16).astype(np.float32)


@pytest.fixture(scope="module")
def fitted(digits):
    """Trained also on rows that it makes, tokens of them hidden, so that its guide serves for any visible set."""
    settings = {"training": Epochs(max_epochs=30, learning_rate=0.01), "random_state": 0}
    return BayesMPT(VAE(2, hidden=(24,)), predictor=Importance(100, dream=True), **settings).fit(digits)


def by_grid(model, X, half_width=6.0, n=61):
    """log p(x) of the observed cells of each row, by the rectangle rule over two latents, from the parameters alone."""
    p = {k: v.astype(float) for k, v in model.params_.items()}
    axis = np.linspace(-half_width, half_width, n)
    z = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    h = z @ p["decoder.0.weight"].T + p["decoder.0.bias"]
    h = h / (1 + np.exp(-h))  # SiLU
    logits = p["shift"] + h @ p["decoder.2.weight"].T + p["decoder.2.bias"]  # (G, T)
    log_prior = norm.logpdf(z).sum(1) + 2 * math.log(axis[1] - axis[0])
    seen = ~np.isnan(X)
    on, off = -np.logaddexp(0, -logits), -np.logaddexp(0, logits)
    log_prob = np.where(seen, np.nan_to_num(X), 0) @ on.T + np.where(seen, 1 - np.nan_to_num(X), 0) @ off.T
    return logsumexp(log_prior + log_prob, axis=1)


class TestEvidence:
    @pytest.mark.slow
    @pytest.mark.parametrize("share", [0.0, 0.4])
    def test_importance_against_a_grid(self, fitted, digits, share):
        X = with_holes(digits[:30], share)
        truth = by_grid(fitted, X)
        sharp = clone_with(fitted, Importance(20000))
        got, se = sharp.score_rows(X)
        assert abs(got.sum() - truth.sum()) < 4 * se + 1e-3
        assert np.abs(got - truth).max() < 0.2

    @pytest.mark.slow
    @pytest.mark.parametrize("share", [0.0, 0.4])
    def test_annealing_against_a_grid(self, fitted, digits, share):
        X = with_holes(digits[:60], share)
        truth = by_grid(fitted, X)
        got, se = clone_with(fitted, AnnealedImportance(64, 40)).score_rows(X)
        assert 0 < se < 1.0
        assert abs(got.sum() - truth.sum()) < 4 * se
        assert np.abs(got - truth).max() < 0.2

    @pytest.mark.slow
    def test_annealing_mends_a_guide_that_is_wrong(self):
        """A linear-Gaussian program, whose LML is known, and a guide far from the posterior."""
        loading = torch.tensor([[1.0, 0.5], [-0.7, 1.2], [0.3, 0.3], [2.0, -1.0]], dtype=torch.float64)

        def program(x):
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal((loading @ z[..., None])[..., 0], 0.5).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("rows", len(x)):
                pyro.sample("z", dist.Normal(x.new_full((len(x), 2), 0.8), 0.9).to_event(1))

        generator = torch.Generator().manual_seed(0)
        z = torch.randn(40, 2, generator=generator, dtype=torch.float64)
        x = z @ loading.mT + 0.5 * torch.randn(40, 4, generator=generator, dtype=torch.float64)
        cov = loading @ loading.mT + 0.25 * torch.eye(4, dtype=torch.float64)
        truth = torch.distributions.MultivariateNormal(torch.zeros(4, dtype=torch.float64), cov).log_prob(x)
        with OwnStore(), torch.random.fork_rng():
            torch.manual_seed(0)
            read = AnnealedImportance(32, 60).bind(program, (x,), guide).read((x,))
            found = read.evidence()
            bracket = AnnealedImportance(8, 20).bind(program, (x,), guide).bracket((x,), {"z": z})
        assert found.se < 1.5
        assert abs(float(found.by_row.sum() - truth.sum())) < 4 * found.se
        posterior_cov = torch.linalg.inv(torch.eye(2, dtype=torch.float64) + loading.mT @ loading / 0.25)
        mean = x @ loading @ posterior_cov / 0.25
        assert float((read.posterior().mean - mean).square().mean().sqrt()) < 0.2
        low, high = (float((b - truth.numpy()).mean()) for b in bracket[:2])
        assert low < 0.05 and high > -0.05 and 0 < bracket.gap < 3

    @pytest.mark.slow
    @pytest.mark.parametrize("loc, scale", [(None, 1.0), (3.0, 0.01)])
    def test_annealing_starts_from_the_better_of_guide_and_prior(self, loc, scale):
        """x = z + noise: the guide is the posterior itself, or nowhere near it."""
        sd = 0.3

        def program(x):
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, sd).to_event(1), obs=x)

        def guide(x):
            shrink = 1 / (1 + sd**2)
            where = x * shrink if loc is None else x.new_full(x.shape, loc)
            with pyro.plate("rows", len(x)):
                width = sd * shrink**0.5 if loc is None else scale
                pyro.sample("z", dist.Normal(where, width).to_event(1))

        x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        truth = torch.from_numpy(norm.logpdf(x.numpy(), 0, (1 + sd**2) ** 0.5).sum(1))
        with OwnStore(), torch.random.fork_rng():
            torch.manual_seed(0)
            read = AnnealedImportance(16, 40).bind(program, (x,), guide).read((x,))
            found = read.evidence()
        if loc is None:  # its weights are all equal
            assert float((found.by_row - truth).abs().max()) < 1e-9
        else:
            assert abs(float((found.by_row - truth).mean())) < 0.1

    def test_says_so_where_draws_are_too_few(self):
        def program(x):
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 0.02).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("rows", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

        X = np.random.default_rng(0).normal(size=(50, 2))
        model = BayesMPT(program, guide=guide, predictor=Importance(10), random_state=0)
        with pytest.warns(UserWarning, match="10 draws cover too little"):
            model.fit(X)
        truth = norm.logpdf(X, 0, (1 + 0.02**2) ** 0.5).sum()
        assert model.log_marginal_likelihood_ + 10 * model.log_marginal_likelihood_se_ < truth

    @pytest.mark.slow
    def test_draws_run_side_by_side_whatever_the_number_of_rows(self):
        x = torch.zeros(6000, 784)
        model = VAE(2, hidden=(4,))
        with OwnStore():
            with torch.random.fork_rng():
                assert Importance(3).bind(model, (x,), model.guide).batched is Batched.PLATE

    @pytest.mark.slow
    def test_both_bounds_enclose_the_grid(self, fitted):
        model = clone_with(fitted, AnnealedImportance(16, 30))
        bracket = model.bidirectional(200)
        truth = by_grid(model, model.sample(200))
        assert (bracket.lower - truth).mean() < 0.02
        assert (bracket.upper - truth).mean() > -0.02
        assert -0.02 < bracket.gap < 0.3

    @pytest.mark.slow
    def test_more_particles_are_no_lower(self, fitted, digits):
        few = clone_with(fitted, Importance(2)).estimate(digits[:300])
        assert few.se > 0 and few.total < by_grid(fitted, digits[:300]).sum() + 4 * few.se

    @pytest.mark.slow
    def test_conditionals_of_single_cells(self, fitted, digits):
        """log p(x_i | visible) for masks of all sizes, by the same grid."""
        X = digits[:20].astype(float)
        generator = torch.Generator().manual_seed(3)
        masks = UniformSize(4).draw(16, generator).visible
        with clone_with(fitted, Importance(4000)).read_rows(X) as predictor, torch.no_grad():
            got = predictor.conditionals(masks).numpy()
        for k, visible in enumerate(masks.numpy()):
            seen = np.where(visible, X, np.nan)
            base = by_grid(fitted, seen)
            for token in np.flatnonzero(~visible):
                more = seen.copy()
                more[:, token] = X[:, token]
                assert np.abs(got[k, :, token] - (by_grid(fitted, more) - base)).max() < 0.2


class TestTraining:
    @pytest.mark.slow
    def test_learns_and_holds_out(self, digits, fitted):
        independent = -(
            np.log(np.maximum(digits.mean(0), 1e-9)) * digits
            + np.log(np.maximum(1 - digits.mean(0), 1e-9)) * (1 - digits)
        )
        assert fitted.score(digits) > -independent.sum(1).mean() + 0.5
        assert fitted.history_[-1] > fitted.history_[0]
        assert fitted.log_marginal_likelihood_se_ > 0
        assert all(v.dtype == np.float32 for v in fitted.params_.values())

    def test_stops_early_at_the_best(self):
        noise = (np.random.default_rng(0).random((200, 8)) < 0.5).astype(np.float32)
        model = BayesMPT(
            VAE(2, hidden=(32,)),
            training=Epochs(learning_rate=0.02, patience=5, max_epochs=500),
            random_state=0,
        ).fit(noise)
        assert model.converged_ and model.n_iter_ < 500
        # the parameters are those of the best epoch, some of which went by before the training gave up
        assert 5 <= model.n_iter_ - 1 - int(np.argmax(model.history_)) < 500

    def test_same_seed_same_weights(self, digits):
        one, two = (
            BayesMPT(VAE(2, hidden=(8,)), training=Epochs(max_epochs=2), random_state=5).fit(digits[:300])
            for _ in "ab"
        )
        assert all((one.params_[k] == two.params_[k]).all() for k in one.params_)

    @pytest.mark.slow
    def test_resumes_to_the_bit(self, digits, tmp_path):
        """Killed in another process between two epochs."""
        whole = BayesMPT(VAE(2, hidden=(8,)), training=Epochs(max_epochs=6), random_state=3).fit(digits[:400])
        file = tmp_path / "training.pt"
        np.save(tmp_path / "x.npy", digits[:400])
        script = textwrap.dedent(
            f"""
            import os, signal, numpy as np
            from bayes_mpt.training import Epochs, epochs
            from bayes_mpt import BayesMPT
            from bayes_mpt.models import VAE
            keep = epochs._keep
            def keep_and_die(file, progress, *rest):
                keep(file, progress, *rest)
                if progress.epoch == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
            epochs._keep = keep_and_die
            training = Epochs(max_epochs=6, checkpoint={str(file)!r})
            model = BayesMPT(VAE(2, hidden=(8,)), training=training, random_state=3)
            model.fit(np.load({str(tmp_path / "x.npy")!r}))
            """
        )
        died = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert died.returncode == -9, died.stderr
        assert file.exists()
        resumed = BayesMPT(
            VAE(2, hidden=(8,)), training=Epochs(max_epochs=6, checkpoint=file), random_state=3
        ).fit(digits[:400])
        assert resumed.history_ == whole.history_
        assert all((resumed.params_[k] == whole.params_[k]).all() for k in whole.params_)
        with pytest.raises(ValueError, match="another model"):
            BayesMPT(VAE(3, hidden=(8,)), random_state=3, training=Epochs(checkpoint=file)).fit(digits[:400])
        with pytest.raises(ValueError, match="integer random_state"):
            BayesMPT(VAE(2, hidden=(8,)), training=Epochs(checkpoint=file)).fit(digits[:400])

    @pytest.mark.slow
    def test_with_missing_cells(self, digits):
        X = with_holes(digits, 0.4)
        model = BayesMPT(
            VAE(2, hidden=(24,)), training=Epochs(max_epochs=30, learning_rate=0.01), random_state=0
        ).fit(X)
        missing = np.isnan(X)
        filled = model.impute(X)
        assert (filled[~missing] == X[~missing]).all()
        by_mean = np.nanmean(X, 0)[None].repeat(len(X), 0)
        error = np.square(filled - digits)[missing].mean()
        assert error < 0.95 * np.square(by_mean - digits)[missing].mean()

    def test_masks_train_too(self, digits):
        model = BayesMPT(
            VAE(1, hidden=(8,)), masks=UniformSize(2), training=Epochs(max_epochs=2), random_state=0
        )
        with pytest.warns(UserWarning, match="no bound"):
            model.fit(digits[:200])
        assert np.isfinite(model.score(digits[:50]))


class TestModel:
    @pytest.mark.slow
    @pytest.mark.parametrize("likelihood", ["gaussian", "studentt"])
    def test_real_columns_in_their_own_units(self, likelihood):
        X = load_wine().data.astype(np.float64)
        model = BayesMPT(
            VAE(2, likelihood, hidden=(16,)), training=Epochs(max_epochs=30), random_state=0
        ).fit(X)
        scaled = BayesMPT(
            VAE(2, likelihood, hidden=(16,)), training=Epochs(max_epochs=30), random_state=0
        ).fit(StandardScaler().fit_transform(X))
        # the same model in other units: densities differ by the Jacobian
        jacobian = np.log(X.std(0)).sum()
        assert abs(model.score(X) - (scaled.score(StandardScaler().fit_transform(X)) - jacobian)) < 0.5

    @pytest.mark.slow
    def test_categorical(self):
        rng = np.random.default_rng(0)
        hidden = rng.integers(3, size=600)
        X = np.where(rng.random((600, 5)) < 0.8, hidden[:, None], rng.integers(3, size=(600, 5))).astype(
            float
        )
        X[rng.random(X.shape) < 0.1] = np.nan
        model = BayesMPT(
            VAE(2, "categorical", hidden=(16,)),
            training=Epochs(max_epochs=40, learning_rate=5e-3),
            random_state=0,
        ).fit(X)
        filled = model.impute(X)
        assert set(np.unique(filled)) <= {0.0, 1.0, 2.0}
        shares = [np.bincount(X[~np.isnan(X[:, t]), t].astype(int), minlength=3) for t in range(5)]
        independent = sum((s * np.log(s / s.sum())).sum() for s in shares) / len(X)
        assert model.score(X) > independent + 0.5
        with pytest.raises(ValueError, match="codes"):
            BayesMPT(VAE(2, "categorical", n_levels=2)).fit(np.nan_to_num(X))

    @pytest.mark.slow
    @pytest.mark.parametrize("likelihood", ["bernoulli", "categorical"])
    def test_convolutional(self, likelihood):
        X = (load_digits().data[:256] > 8).astype(np.float32)
        model = BayesMPT(
            VAE(3, likelihood, hidden=(16,), image_shape=(8, 8)),
            training=Epochs(max_epochs=3),
            random_state=0,
        )
        model.fit(X)
        assert np.isfinite(model.score(X))
        with pytest.raises(ValueError, match="image_shape"):
            clone(model).set_params(model__image_shape=(8, 7)).fit(X)

    def test_networks_of_ones_own(self, digits):
        class Encoder(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 4))

            def forward(self, x):
                return self.net(x)

        with torch.random.fork_rng():
            encoder, decoder = Encoder(), nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 16))
            batch_norm = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 16))
        before = [p.clone() for p in (*encoder.parameters(), *decoder.parameters())]
        model = BayesMPT(
            VAE(2, encoder=encoder, decoder=decoder), training=Epochs(max_epochs=3), random_state=0
        ).fit(digits[:200])
        after = (*encoder.parameters(), *decoder.parameters())
        assert all(
            torch.equal(a, b) for a, b in zip(before, after, strict=True)
        )  # the user's own are untouched
        assert not np.allclose(model.params_["decoder.0.weight"], decoder[0].weight.detach())
        with pytest.raises(ValueError, match="LayerNorm"):
            BayesMPT(VAE(2, decoder=batch_norm)).fit(digits[:200])

    @pytest.mark.slow
    def test_pickles_and_pipelines(self, fitted, digits):
        again = pickle.loads(pickle.dumps(fitted))
        assert (again.score_samples(digits[:20]) == fitted.score_samples(digits[:20])).all()
        X = load_wine().data
        pipeline = make_pipeline(
            StandardScaler(),
            BayesMPT(VAE(2, "gaussian", hidden=(8,)), training=Epochs(max_epochs=3), random_state=0),
        )
        assert pipeline.fit_transform(X).shape == (178, 2)

    def test_rejects(self, digits):
        with pytest.raises(ValueError, match="latent_dim"):
            BayesMPT(VAE(0)).fit(digits)
        with pytest.raises(ValueError, match="likelihood"):
            BayesMPT(VAE(1, "poisson")).fit(digits)
        with pytest.raises(ValueError, match="AnnealedImportance"):
            BayesMPT(VAE(1), training=Epochs(max_epochs=1)).fit(digits[:50]).bidirectional()
        with pytest.raises(ValueError, match="guide"):
            choose(lambda x: VAE(1)(x), (torch.zeros(5, 3),), predictor=AnnealedImportance())
        with pytest.raises(ValueError, match="column 3 has no observed cell"):
            BayesMPT(VAE(1)).fit(np.where(np.arange(16) == 3, np.nan, digits))
        with pytest.raises(ValueError, match="Epochs"):
            BayesMPT(training=Epochs()).fit(load_wine().data)


class TestDraws:
    @pytest.mark.slow
    def test_rows_have_the_models_moments(self, fitted):
        drawn = fitted.sample(20000)
        p = {k: v.astype(float) for k, v in fitted.params_.items()}
        z = np.random.default_rng(1).normal(size=(200000, 2))
        h = z @ p["decoder.0.weight"].T + p["decoder.0.bias"]
        logits = p["shift"] + h / (1 + np.exp(-h)) @ p["decoder.2.weight"].T + p["decoder.2.bias"]
        mean = (1 / (1 + np.exp(-logits))).mean(0)
        assert np.abs(drawn.mean(0) - mean).max() < 5 * 0.5 / math.sqrt(20000)
        assert (fitted.sample(5) == fitted.sample(5)).all()

    @pytest.mark.slow
    def test_missing_cells_are_drawn_together(self, fitted, digits):
        """Of two hidden cells, the four probabilities, by the grid."""
        X = digits[:5].astype(float).copy()
        X[:, [5, 9]] = np.nan
        drawn = clone_with(fitted, Importance(500)).sample_missing(X, n_samples=1000)
        assert (drawn[:, ~np.isnan(X)] == X[~np.isnan(X)]).all()
        base = by_grid(fitted, X)
        for a in (0.0, 1.0):
            for b in (0.0, 1.0):
                full = X.copy()
                full[:, 5], full[:, 9] = a, b
                chance = np.exp(by_grid(fitted, full) - base)
                got = ((drawn[:, :, 5] == a) & (drawn[:, :, 9] == b)).mean(0)
                assert np.abs(got - chance).max() < 0.05

    def test_programs_without_draws_say_so(self):
        model = BayesMPT(random_state=0).fit(load_wine().data)
        with pytest.raises(ValueError, match="use impute"):
            model.sample_missing(load_wine().data)


@pytest.mark.slow
def test_search_over_the_latent_dimension():
    """Rows of a decoder with two latents: one is too few, and held-out rows say so."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(400, 2))
    X = (rng.random((400, 24)) < 1 / (1 + np.exp(-4 * np.sin(z @ rng.normal(size=(2, 24)))))).astype(
        np.float32
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        search = MarginalLikelihoodSearch(
            BayesMPT(VAE(hidden=(32,)), random_state=0, training=Epochs(max_epochs=25, learning_rate=6e-3)),
            {"model__latent_dim": [1, 2]},
            evidence=HeldOut(cv=2),
            random_state=0,
        ).fit(X)
    assert search.best_params_ == {"model__latent_dim": 2}
    assert search.comparison_["lml_diff"].min() < 0


def test_quadrature_still_takes_a_small_one(digits):
    """Another way to score the same program: two latents on a grid of nodes."""
    model = BayesMPT(VAE(1, hidden=(8,)), training=Epochs(max_epochs=5), random_state=0).fit(digits[:300])
    by_nodes = clone_with(model, Quadrature(128)).score(digits[:100])
    by_draws, se = clone_with(model, Importance(5000)).score_rows(digits[:100])
    assert abs(by_nodes - by_draws.mean()) < 4 * se / 100 + 1e-3


def clone_with(model, predictor):
    """The fitted model, scored in another way."""
    other = pickle.loads(pickle.dumps(model))
    return other.set_params(predictor=predictor)


@pytest.mark.slow
def test_curve_of_many_tokens_adds_up(digits):
    """Beyond 32 tokens the curve is averaged over blocks of sizes: its area is still log p(x)."""
    X = np.hstack([digits, digits[:, ::-1], digits[::-1]])[:200]
    model = BayesMPT(
        VAE(1, hidden=(8,)), training=Epochs(max_epochs=5, learning_rate=0.01), random_state=0
    ).fit(X)
    found = clone_with(model, Importance(2000)).estimate(X[:20], n_replicates=2)
    assert found.by_size.mean.shape == (48,)
    assert abs(found.by_size.mean.sum() - found.total / 20) < 0.1


@pytest.mark.parametrize(
    "file, above", [("deep_training", "5000 digits"), ("deep_training_mnist", "50 000 digits")]
)
def test_the_page_gives_the_measured_figures(file, above):
    root = Path(__file__).parents[2]
    page = (root / "docs" / "deep_models.md").read_text()
    page = page[page.index(f"| LML of fresh rows, {above} |") :]
    for run in json.loads((root / "benchmarks" / "deep" / f"{file}.json").read_text())["summary"]:
        ours = run["loss"].startswith("masked")
        figure = f"{run['lml']:.1f}" if ours else f"{-run['ours above']:+.1f} ± {run['se']:.1f}"
        line = next(line for line in page.splitlines() if line.startswith(f"| {run['loss']} |"))
        assert line.split("|")[2 + [0.0, 0.3, 0.6].index(run["missing"])].strip() == figure
