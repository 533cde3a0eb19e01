"""A variational autoencoder for images with missing pixels: its latent dimension, its evidence, what it fills in.

The 1797 handwritten digits of scikit-learn, 8 x 8 pixels, black or white, three of ten pixels missing. Latent
dimensions are ranked by held-out rows; the evidence of the best is sharpened by annealed importance sampling, and
bounded from both sides on rows that the model itself makes. Writes deep_digits.png.

    python examples/deep_digits.py [--output DIR]
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split

from bayes_mpt import BayesMPT, HeldOut, MarginalLikelihoodSearch
from bayes_mpt.models import VAE
from bayes_mpt.plots import RankingDisplay
from bayes_mpt.predictors import AnnealedImportance
from bayes_mpt.training import Epochs

N_SHOWN = 12


def main(output: Path) -> None:
    warnings.filterwarnings("ignore", "the importance weights")  # answered below, by annealing
    warnings.filterwarnings("ignore", category=ConvergenceWarning)
    pixels = (load_digits().data > 8).astype(np.float32)
    whole, fresh = train_test_split(pixels, test_size=200, random_state=0)
    rng = np.random.default_rng(0)
    X, X_fresh = (np.where(rng.random(a.shape) < 0.3, np.nan, a).astype(np.float32) for a in (whole, fresh))

    deep = BayesMPT(VAE(hidden=(128,)), training=Epochs(max_epochs=60, learning_rate=3e-3), random_state=0)
    search = MarginalLikelihoodSearch(deep, {"model__latent_dim": [1, 2, 4, 8]}, evidence=HeldOut(cv=2)).fit(
        X
    )
    table = search.comparison_
    print(table[["rank", "lml", "lml_diff", "dse"]].round(1))
    best = search.best_estimator_
    print(f"\n{best.explain()}\n")

    rough = best.score(X_fresh)
    best.set_params(predictor=AnnealedImportance(16, 60))
    by_row, se = best.score_rows(X_fresh)
    bracket = best.bidirectional(100)
    print(f"{len(fresh)} fresh rows, nats a row: {rough:.2f} by draws of the guide,")
    print(f"  {by_row.mean():.2f} +- {se / len(fresh):.2f} annealed")
    print(f"both bounds of rows made up by the model: {bracket.gap:.3f} +- {bracket.gap_se:.3f} apart")

    filled, missing = best.impute(X_fresh), np.isnan(X_fresh)
    error = np.square(filled - fresh)[missing].mean()
    by_mean = np.square(np.nanmean(X, 0) - fresh)[missing].mean()
    drawn = best.sample_missing(X_fresh, n_samples=100)
    print(f"squared error of missing pixels: {error:.3f}, filled by their means {by_mean:.3f}")
    assert error < 0.7 * by_mean
    # what is missing in draws and in the truth is alike: mean and correlation with the observed part
    assert abs(drawn[:, missing].mean() - fresh[missing].mean()) < 0.03

    output.mkdir(parents=True, exist_ok=True)
    figure = plt.figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.8])
    table.index = [name.split("latent_dim=")[-1].rstrip(")").split(",")[0] for name in table.index]
    ax = RankingDisplay(table).plot(left.subplots()).ax_
    ax.set(title="Latent dimension, by held-out rows")
    draw_digits(
        right,
        {
            "observed": X_fresh,
            "filled in": filled,
            "one draw": drawn[0],
            "truth": fresh,
            "made up": best.sample(N_SHOWN),
        },
    )
    figure.savefig(output / "deep_digits.png", dpi=120)
    print(f"wrote {output / 'deep_digits.png'}")


def draw_digits(figure, rows: dict[str, np.ndarray]) -> None:
    colours = plt.get_cmap("gray_r").copy()
    colours.set_bad("C1")
    axes = figure.subplots(len(rows), N_SHOWN)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for ax, image in zip(line, images, strict=False):
            ax.imshow(image.reshape(8, 8), cmap=colours, vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.suptitle("Fresh digits, missing pixels orange; the last line is drawn from the model")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    main(parser.parse_args().output)
