"""How many clusters of wines, and of which shape, when cells are missing? Gaussian mixtures by held-out likelihood.

Alcohol and diluted absorbance of 178 wines (shipped with scikit-learn), rounded as they are, standardised, a tenth of
the cells emptied.
Beside it scikit-learn's BIC, which needs complete rows. The wines' three cultivars are not shown to any model; the two
columns were picked, among six, as a pair in which cultivars differ.
Writes mixture.png.

    python examples/mixture.py [--output DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.patches import Ellipse
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn import mixture
from sklearn.datasets import load_wine
from sklearn.metrics import adjusted_rand_score
from sklearn.preprocessing import StandardScaler

from bayes_mpt import BayesMPT, HeldOut, MarginalLikelihoodSearch
from bayes_mpt.models import GaussianMixture
from bayes_mpt.plots import RankingDisplay
from bayes_mpt.training import Ascent

COLUMNS = ["alcohol", "od280/od315_of_diluted_wines"]
CANDIDATES = {kind: range(1, 5) for kind in ("full", "tied", "diag", "spherical")}


def main(output: Path) -> None:
    wine = load_wine(as_frame=True)
    # Both columns are rounded to 0.01, and up to six wines share a value, onto which a component could shrink for a
    # density without bound, held out too: the prior of the covariances, the default, keeps it from that.
    whole = StandardScaler().set_output(transform="pandas").fit_transform(wine.data[COLUMNS])
    X = whole.mask(np.random.default_rng(0).random(whole.shape) < 0.1)
    kept = ~X.isna().all(axis=1)
    X, cultivar = X[kept], wine.target[kept]
    complete = X.dropna()

    # The maximised likelihood of a mixture has no bound (a component can shrink onto equal rows) and rises with every
    # component, so it cannot choose: rows that were not fitted must.
    grid = [
        {"model__covariance_type": [kind], "model__n_components": numbers}
        for kind, numbers in CANDIDATES.items()
    ]
    search = MarginalLikelihoodSearch(
        BayesMPT(GaussianMixture(), training=Ascent(tol=1e-7), random_state=0),
        grid,
        evidence=HeldOut(cv=3),
        random_state=0,
    ).fit(X)
    table = search.comparison_
    table["BIC"] = np.array(
        [
            -bic(p["model__covariance_type"], p["model__n_components"], complete) / 2
            for p in search.cv_results_["params"]
        ]
    )[[search.candidate_names_.index(name) for name in table.index]]
    table.index = [name.replace("covariance_type=", "").replace("n_components=", "") for name in table.index]

    print(
        f"{len(X)} wines, {int(X.isna().sum().sum())} of {X.size} cells missing; {len(complete)} rows complete"
    )
    with pd.option_context("display.width", 120, "display.float_format", "{:.2f}".format):
        print(
            table[["rank", "lml", "lml_diff", "dse", "BIC", "diag"]].rename(
                columns={"BIC": "-BIC/2, complete rows"}
            )
        )
    best = search.best_estimator_
    print(f"\n{best.explain()}\n")
    agreement = adjusted_rand_score(cultivar, best.transform(X).argmax(1))
    print(f"clusters of {best.fitted_model_!r} against the cultivars: adjusted Rand index {agreement:.2f}")

    # Known otherwise: the density of the observed cells of each row, a mixture of the marginals of the components.
    assert np.allclose(best.score_samples(X), by_scipy(best.params_, X.to_numpy()), atol=1e-8)
    # One full Gaussian on complete rows has its maximum in closed form: -n/2 (log |2 pi S| + T).
    one = BayesMPT(GaussianMixture(1, covariance_prior=None)).fit(complete)
    maximum = -0.5 * (np.linalg.slogdet(2 * np.pi * np.cov(complete.T, bias=True))[1] + complete.shape[1])
    assert abs(one.score(complete) - maximum) < 1e-6
    assert agreement > 0.5  # the clusters mean something

    output.mkdir(parents=True, exist_ok=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    RankingDisplay(table).plot(left)
    below = (table["BIC"] - table["BIC"].max())[::-1]
    left.plot(below, np.arange(len(below)), "x", color="C3", label="-BIC/2, complete rows only")
    left.legend(loc="upper left")
    left.set_title("Shape and number of components")
    draw_clusters(right, best, whole[kept], X, cultivar)
    figure.savefig(output / "mixture.png", dpi=120)
    print(f"wrote {output / 'mixture.png'}")


def bic(kind: str, n_components: int, rows: pd.DataFrame) -> float:
    return (
        mixture.GaussianMixture(n_components, covariance_type=kind, n_init=5, random_state=0)
        .fit(rows)
        .bic(rows)
    )


def covariances(params: dict[str, np.ndarray]) -> np.ndarray:
    """(K, T, T)."""
    if "scale_tril" in params:
        covs = params["scale_tril"] @ params["scale_tril"].mT
        return np.broadcast_to(covs, (len(params["loc"]), *covs.shape[-2:]))  # tied: one for all
    variance = np.broadcast_to(params["scale"] ** 2, params["loc"].shape)
    return variance[:, :, None] * np.eye(variance.shape[1])


def by_scipy(params: dict[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Log densities of the observed cells, nats a row."""
    out = []
    for row in rows:
        seen = ~np.isnan(row)
        out.append(
            logsumexp(
                [
                    np.log(weight) + multivariate_normal.logpdf(row[seen], loc[seen], cov[np.ix_(seen, seen)])
                    for weight, loc, cov in zip(
                        params["weights"], params["loc"], covariances(params), strict=True
                    )
                ]
            )
        )
    return np.array(out)


def draw_clusters(
    ax: plt.Axes, best: BayesMPT, whole: pd.DataFrame, X: pd.DataFrame, cultivar: pd.Series
) -> None:
    missing = X.isna().any(axis=1)
    for label, marker in enumerate("os^"):
        mine = cultivar == label
        ax.scatter(
            *whole[mine & ~missing].to_numpy().T,
            s=16,
            marker=marker,
            color=f"C{label}",
            label=f"cultivar {label}",
        )
        ax.scatter(
            *whole[mine & missing].to_numpy().T, s=16, marker=marker, color="none", edgecolor=f"C{label}"
        )
    for weight, loc, cov in zip(
        best.params_["weights"], best.params_["loc"], covariances(best.params_), strict=True
    ):
        value, vector = np.linalg.eigh(cov)
        angle = np.degrees(np.arctan2(vector[1, 1], vector[0, 1]))
        for sd in (1, 2):
            width, height = 2 * sd * np.sqrt(value[::-1])
            ax.add_patch(
                Ellipse(
                    loc, width, height, angle=angle, fill=False, color="0.2", lw=0.8 + weight, alpha=1 / sd
                )
            )
    ax.set(xlabel=f"{COLUMNS[0]}, standardised", ylabel=f"{COLUMNS[1]}, standardised")
    shape = best.fitted_model_
    ax.set_title(
        f"{shape.n_components} {shape.covariance_type} components, 1 and 2 sd; open: a cell was hidden"
    )
    ax.legend(fontsize="small")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    main(parser.parse_args().output)
