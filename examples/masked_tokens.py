"""A transformer that fills in hidden pixels, and what its masked curve says of it.

The 1797 handwritten digits of scikit-learn, the six middle columns of 8 x 8 pixels in four
grey levels, a tenth of the pixels missing. One
network predicts any pixels from any others; the area under its curve, from one hidden pixel to all, is a score in nats
a row, here before and after the training, on digits that it has not seen, with its spread between orders of the
pixels. Writes masked_tokens.png.

    python examples/masked_tokens.py [--output DIR]
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

from bayes_mpt import BayesMPT
from bayes_mpt.masks import EverySize
from bayes_mpt.models import MaskedTransformer
from bayes_mpt.plots import MaskedCurveDisplay
from bayes_mpt.predictors import SelfPredictive
from bayes_mpt.training import Epochs

N_SHOWN, N_SCORED, WIDTH, EPOCHS = 10, 50, 32, 30
SHAPE = (8, 6)


def main(output: Path) -> None:
    warnings.filterwarnings("ignore", category=ConvergenceWarning)  # EPOCHS is all the time there is
    pixels = load_digits().images[:, :, 1:7].reshape(-1, np.prod(SHAPE))
    levels = np.digitize(pixels, [3, 8, 13]).astype(np.float32)
    X, fresh = train_test_split(levels, test_size=397, random_state=0)
    X = np.where(np.random.default_rng(0).random(X.shape) < 0.1, np.nan, X)

    settings = {"predictor": SelfPredictive(n_orders=1), "random_state": 0}
    program = MaskedTransformer(WIDTH, n_levels=4)
    start = BayesMPT(program, training=Epochs(max_epochs=1, learning_rate=1e-9), **settings).fit(X[:200])
    mpt = BayesMPT(
        program, training=Epochs(max_epochs=EPOCHS, batch_size=32, learning_rate=2e-3), **settings
    ).fit(X)
    print(mpt.explain())

    curves = {}
    for name, model in {"before training": start, "after training": mpt}.items():
        found = model.estimate(fresh[:N_SCORED], masks=EverySize(1), n_replicates=4)
        curves[name] = found.by_size
        print(f"{name}: area {found.total / N_SCORED:.1f} +- {found.se / N_SCORED:.1f} nats a digit")
    mpt.set_params(predictor=SelfPredictive(n_orders=4))
    found = mpt.estimate(fresh[:N_SCORED], n_replicates=2)
    spread = found.diagnostics["order_sd"]
    print(f"the score of a digit changes by {spread:.2f} nats between orders of its pixels")

    half = np.where(np.random.default_rng(1).random(fresh.shape) < 0.5, np.nan, fresh)
    half[: N_SHOWN // 2] = fresh[: N_SHOWN // 2]
    half[: N_SHOWN // 2, fresh.shape[1] // 2 :] = np.nan  # of the first ones the lower half
    hidden, filled = np.isnan(half), mpt.impute(half)
    right = (filled == fresh)[hidden].mean()
    commonest = np.array([np.bincount(c[~np.isnan(c)].astype(int), minlength=4).argmax() for c in X.T])
    by_column = (commonest == fresh)[hidden].mean()
    print(
        f"{right:.1%} of hidden pixels filled in with the right level; by each pixel's commonest {by_column:.1%}"
    )
    assert right > by_column + 0.05

    output.mkdir(parents=True, exist_ok=True)
    figure = plt.figure(figsize=(12, 3.6), layout="constrained")
    left, side = figure.subfigures(1, 2, width_ratios=[1, 1.9])
    ax = left.subplots()
    for name, curve in curves.items():
        MaskedCurveDisplay(curve).plot(ax, label=name)
    ax.set(xlabel="hidden pixels", ylabel="nats a hidden pixel", title="Masked curve of fresh digits")
    ax.legend()
    draw_digits(side, {"visible": half, "filled in": filled, "truth": fresh})
    figure.savefig(output / "masked_tokens.png", dpi=120)
    print(f"wrote {output / 'masked_tokens.png'}")


def draw_digits(figure, rows: dict[str, np.ndarray]) -> None:
    colours = plt.get_cmap("gray_r").copy()
    colours.set_bad("C1")
    axes = figure.subplots(len(rows), N_SHOWN)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for ax, image in zip(line, images, strict=False):
            ax.imshow(image.reshape(SHAPE), cmap=colours, vmin=0, vmax=3)
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.suptitle("Fresh digits of four grey levels, hidden pixels orange")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    main(parser.parse_args().output)
