"""Fill in three of ten cells: squared error and coverage, a deep model against scikit-learn's imputers.

Tables that scikit-learn ships, standardised, cells hidden at random; every method sees the observed cells alone. Ours
are a `VAE` with Gaussian tokens whose latent dimension is ranked by held-out rows, and PPCA chosen by its evidence.
Intervals come from draws of the missing cells (`BayesMPT.sample_missing`).

    python benchmarks/imputation.py [--seeds 5]
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.experimental import enable_iterative_imputer  # noqa: F401  # makes the import below work
from sklearn.impute import IterativeImputer, SimpleImputer
from sklearn.preprocessing import StandardScaler

from bayes_mpt import BayesMPT, MarginalLikelihoodSearch
from bayes_mpt.models import PPCA, VAE

RESULTS = Path(__file__).parent / "results" / "imputation.json"
TABLES = {"wine": load_wine, "diabetes": load_diabetes, "breast cancer": load_breast_cancer}
DIMENSIONS = [1, 2, 4]


def one(name: str, seed: int) -> dict[str, float | str | int]:
    """Errors of each method on one table with holes."""
    whole = StandardScaler().fit_transform(TABLES[name]().data)
    missing = np.random.default_rng(seed).random(whole.shape) < 0.3
    X = np.where(missing, np.nan, whole)
    X, whole, missing = (a[~missing.all(1)] for a in (X, whole, missing))
    out: dict[str, float | str | int] = {"table": name, "seed": seed}
    for label, imputer in (
        ("mean", SimpleImputer()),
        ("IterativeImputer", IterativeImputer(random_state=seed)),
    ):
        out[label] = float(np.square(imputer.fit_transform(X) - whole)[missing].mean())
    linear = MarginalLikelihoodSearch(BayesMPT(PPCA()), {"model__n_components": DIMENSIONS}).fit(X)
    out["PPCA"] = float(np.square(linear.best_estimator_.impute(X) - whole)[missing].mean())
    deep = BayesMPT(VAE(likelihood="gaussian", hidden=(64,)), batch_size=32, max_iter=100, random_state=seed)
    search = MarginalLikelihoodSearch(deep, {"model__latent_dim": DIMENSIONS}, evidence="heldout", cv=3).fit(
        X
    )
    best = search.best_estimator_
    out["latent dimension"] = best.fitted_model_.latent_dim
    out["VAE"] = float(np.square(best.impute(X) - whole)[missing].mean())
    draws = best.sample_missing(X, n_samples=400)
    low, high = np.quantile(draws, [0.05, 0.95], axis=0)
    out["coverage of 90 %"] = float(((low <= whole) & (whole <= high))[missing].mean())
    return out


def main(seeds: int) -> None:
    warnings.simplefilter("ignore")
    runs = []
    for seed in range(seeds):
        for name in TABLES:
            runs.append(one(name, seed))
            print(runs[-1], flush=True)
    keys = ("mean", "IterativeImputer", "PPCA", "VAE", "coverage of 90 %")
    summary = {
        name: {key: float(np.mean([r[key] for r in runs if r["table"] == name])) for key in keys}
        for name in TABLES
    }
    for name, row in summary.items():
        print(name, {key: round(value, 3) for key, value in row.items()})
    RESULTS.write_text(json.dumps({"seeds": seeds, "summary": summary, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    main(parser.parse_args().seeds)
