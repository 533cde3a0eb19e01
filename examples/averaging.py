"""Average the factor models of a table, or choose one? On wines that were not used, whichever was said before.

Nine chemical measurements of 178 wines (shipped with scikit-learn). Fifty wines are fitted, the other 128 judge: PPCA
and factor analysis with different numbers of latents, the choice of the search against the average of its candidates.
Fifteen draws of the fifty. Writes averaging.png.

    python examples/averaging.py [--output DIR]
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy.special import logsumexp
from sklearn.datasets import load_wine

from bayes_mpt import BayesMPT, MarginalLikelihoodSearch
from bayes_mpt.models import PPCA, FactorAnalysis

COLUMNS = [0, 1, 2, 3, 5, 6, 8, 10, 11]
MODELS = [*(PPCA(k) for k in range(4)), *(FactorAnalysis(k) for k in range(4))]
NAMES = [f"{kind}({k})" for kind in ("PPCA", "FA") for k in range(4)]
N_FITTED, N_DRAWS = 50, 15
WAYS = (
    "the choice, averaged\nover its posterior",
    "all candidates,\naveraged",
    "their fits mixed by\nthe same weights",
)


def main(output: Path) -> None:
    wine = load_wine().data[:, COLUMNS]
    found = [compared(wine, seed) for seed in range(N_DRAWS)]
    gains = np.array([gain for _, gain in found])
    print(f"nats over {N_FITTED} new wines, less those of the chosen fit, {N_DRAWS} draws:")
    for way, gain in zip(WAYS, gains.T, strict=True):
        half = 1.96 * gain.std(ddof=1) / np.sqrt(N_DRAWS)
        print(
            f"  {' '.join(way.split()):42} {gain.mean():+6.2f} +- {half:.2f}, better in {(gain > 0).mean():.0%}"
        )
    # Known otherwise: a posterior predicts better than its maximum, and its average does not lose that.
    assert gains[:, 1].mean() > 0 and gains[:, 1].mean() > gains[:, 2].mean()

    output.mkdir(parents=True, exist_ok=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    draw_weights(left, [weights for weights, _ in found])
    draw_gains(right, gains)
    figure.savefig(output / "averaging.png", dpi=120)
    print(f"wrote {output / 'averaging.png'}")


def compared(wine: np.ndarray, seed: int) -> tuple[np.ndarray, list[float]]:
    """Weights of the candidates, and what other ways gain on the choice, in nats over as many wines as were fitted."""
    order = np.random.default_rng(seed).permutation(len(wine))
    seen, new = wine[order[:N_FITTED]], wine[order[N_FITTED:]]
    mean, sd = seen.mean(0), seen.std(0)
    seen, new = (seen - mean) / sd, (new - mean) / sd
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tails that are not Gaussian, and fits without noise
        search = MarginalLikelihoodSearch(
            BayesMPT(), {"model": MODELS}, evidence="integrated", random_state=0
        )
        average = search.fit(seen).average()
        fits = np.array([BayesMPT(model).fit(seen).score_samples(new) for model in MODELS])
    chosen = search.score_samples(new)
    with np.errstate(divide="ignore"):
        mixed = logsumexp(fits + np.log(average.weights_)[:, None], axis=0)
    ways = average.members_[search.best_index_].log_prob(new), average.score_samples(new), mixed
    return average.weights_, [N_FITTED * float((way - chosen).mean()) for way in ways]


def draw_weights(ax: plt.Axes, weights: list[np.ndarray]) -> None:
    shown = np.array(weights)
    ax.imshow(shown, aspect="auto", cmap="Greys", vmin=0, vmax=1)
    ax.set_xticks(range(len(NAMES)), NAMES, rotation=45)
    ax.set(ylabel="draw of 50 wines", title="Weights of the candidates")
    for row, weight in enumerate(shown):
        for column, w in enumerate(weight):
            if w >= 0.05:
                color = "white" if w > 0.5 else "black"
                ax.text(column, row, f"{w:.2f}", ha="center", va="center", fontsize=6, color=color)


def draw_gains(ax: plt.Axes, gains: np.ndarray) -> None:
    spread = np.linspace(-0.12, 0.12, len(gains))
    for place, gain in enumerate(gains.T):
        ax.plot(place + spread, gain, "o", ms=4, alpha=0.7)
        ax.plot([place - 0.25, place + 0.25], [gain.mean()] * 2, color="black")
    ax.axhline(0, color="0.5", lw=0.8)
    ax.set_xticks(range(len(WAYS)), WAYS)
    ax.set(ylabel="nats over 50 new wines", title="Gained on the chosen fit")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    main(parser.parse_args().output)
