"""How many latent dimensions do the wines have? Rank PPCA and factor analysis by marginal likelihood.

178 wines, 13 chemical measurements (shipped with scikit-learn), standardised. Every candidate is fitted once; its
loadings, noise variances and mean are then integrated, and the candidates are ranked by what their fits are expected to
predict; the picture shows their evidence. Writes ranking.png and masked_curve.png.

    python examples/latent_dimension.py [--output DIR]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_wine
from sklearn.preprocessing import StandardScaler

from bayes_mpt import BayesMPT, MarginalLikelihoodSearch
from bayes_mpt.models import PPCA, FactorAnalysis
from bayes_mpt.plots import MaskedCurveDisplay, RankingDisplay


def main(output: Path) -> None:
    wine = load_wine(as_frame=True)
    X = StandardScaler().set_output(transform="pandas").fit_transform(wine.data)

    search = MarginalLikelihoodSearch(
        BayesMPT(),
        [
            {"model": [PPCA()], "model__n_components": range(13)},
            {"model": [FactorAnalysis()], "model__n_components": range(9)},
        ],
        random_state=0,
    ).fit(X)
    best = search.best_estimator_

    print(f"{len(X)} wines, {X.shape[1]} measurements\n")
    print(search.summary())
    print(f"\n{best.explain()}\n")

    estimate = best.estimate(X)
    area = estimate.by_size.mean.sum()
    print(f"log marginal likelihood {estimate.total:.4f} nats, {estimate.lml.mean():.6f} a row")
    print(f"area under the masked curve   {area:.6f} a row")

    # Two numbers that are known otherwise: PPCA's maximum in closed form, and the area under the curve.
    assert abs(ppca_maximum(X.to_numpy(), 3) - BayesMPT(PPCA(3)).fit(X).score(X)) < 1e-9
    assert abs(area - estimate.lml.mean()) < 1e-9

    output.mkdir(parents=True, exist_ok=True)
    ranking = RankingDisplay.from_search(search)
    ranking.ax_.set_title("Latent dimensions of 178 wines")
    ranking.figure_.savefig(output / "ranking.png", dpi=120)

    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    candidates = {
        "independent columns": FactorAnalysis(0),
        "PPCA, best": None,
        "best of all": best.fitted_model_,
    }
    ppca = next(name for name in search.comparison_.index if name.startswith("PPCA"))
    candidates["PPCA, best"] = PPCA(int(ppca.rpartition("=")[2]))
    for label, model in candidates.items():
        fitted = BayesMPT(model, random_state=0).fit(X)
        total = fitted.score(X)
        MaskedCurveDisplay(fitted.estimate(X, n_replicates=64).by_size).plot(
            ax, label=f"{label}: {model!r}, {total:.2f} nats a row"
        )
    ax.set_title("The area under the masked curve is the log marginal likelihood")
    ax.legend(fontsize="small")
    figure.savefig(output / "masked_curve.png", dpi=120)
    print(f"wrote {output / 'ranking.png'} and {output / 'masked_curve.png'}")


def ppca_maximum(X: np.ndarray, k: int) -> float:
    """Maximum of PPCA's log-likelihood, nats a row (Tipping & Bishop 1999, eq. 8)."""
    value = np.linalg.eigvalsh(np.cov(X.T, bias=True))[::-1]
    d = len(value)
    noise = value[k:].mean()
    return -0.5 * (d * math.log(2 * math.pi) + np.log(value[:k]).sum() + (d - k) * math.log(noise) + d)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    main(parser.parse_args().output)
