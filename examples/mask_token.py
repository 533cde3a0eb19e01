"""Does a mask token that resembles nothing learn faster? A transformer with and without masked token optimisation.

The 1797 handwritten digits of scikit-learn in 16 tokens, each 2 x 2 pixels in black or white, that is 16 codes.
Networks alike but for what `optimized_mask.py` adds, from the same start on the same masks, are trained at a learning
rate that suits the plain one and at twice that; a tenth of the digits is held out and scored after each epoch. Beside
the curves: how little a hidden token resembles any visible one in particular (heterogeneity), by layer, at the end. One
seed is an anecdote: `benchmarks/deep/mask_token.py` has several. Writes mask_token.png.

    python examples/mask_token.py [--output DIR]
"""

from __future__ import annotations

import argparse
import time
import warnings
from itertools import product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from optimized_mask import NOTHING, OptimizedMaskTransformer
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning

from bayes_mpt import BayesMPT
from bayes_mpt.predictors import SelfPredictive
from bayes_mpt.training import Epochs

WIDTH, EPOCHS = 32, 22
RATES = {2.5e-3: "-", 5e-3: "--"}
KINDS = {"learned": NOTHING, "optimized": {}}


def main(output: Path) -> None:
    warnings.filterwarnings("ignore", category=ConvergenceWarning)  # EPOCHS is all the time there is
    black = load_digits().images > 7
    blocks = black.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)
    X = (blocks @ [1, 2, 4, 8]).astype(np.float32)
    visible = np.random.default_rng(0).random(X.shape) < 0.4

    output.mkdir(parents=True, exist_ok=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for (kind, colour), (rate, style) in product({"learned": "C0", "optimized": "C1"}.items(), RATES.items()):
        start = time.process_time()
        program = OptimizedMaskTransformer(WIDTH, n_levels=16, **KINDS[kind])
        mpt = BayesMPT(
            program,
            predictor=SelfPredictive(n_orders=1),
            training=Epochs(max_epochs=EPOCHS, patience=EPOCHS, batch_size=64, learning_rate=rate),
            random_state=0,
        ).fit(X)
        by_layer = program.heterogeneity(mpt.params_, X, visible)
        print(
            f"{kind} at {rate:g}: held-out digits score {max(mpt.history_):.2f} nats at best in {EPOCHS} epochs, "
            f"{time.process_time() - start:.0f} s of CPU time; heterogeneity by layer "
            + ", ".join(f"{h:.2f}" for h in by_layer)
        )
        label = f"{kind}, rate {rate:g}"
        left.plot(range(1, EPOCHS + 1), mpt.history_, style, color=colour, label=label)
        right.plot(range(len(by_layer)), by_layer, f"o{style}", color=colour)
    left.set(xlabel="epochs", ylabel="nats a held-out digit", title="Masked score while training")
    right.set(
        xlabel="after layer",
        ylabel="heterogeneity",
        ylim=(0, 1.05),
        title="Heterogeneity of hidden tokens",
    )
    right.set_xticks(range(len(by_layer)), ["embedding", *map(str, range(1, len(by_layer)))])
    left.legend(title="mask token")
    figure.savefig(output / "mask_token.png", dpi=120)
    print(f"wrote {output / 'mask_token.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    main(parser.parse_args().output)
