"""Fill in three of ten cells: squared error and coverage, a deep model against scikit-learn's imputers.

Tables that scikit-learn ships, standardised, cells hidden at random; every method sees the observed cells alone. Ours
are PPCA and a `VAE` with Gaussian tokens, latent dimensions and the two kinds ranked by the log marginal likelihood of
held-out rows, cells missing there too: the errors of the best of either kind, and of the pick. Intervals come from
draws of the missing cells by the VAE (`BayesMPT.sample_missing`).

    python benchmarks/accuracy/imputation.py [--seeds 3]

Asked: a smaller squared error, and 90 % intervals that cover nine of ten cells.

Found (`--seeds 3`), mean squared errors on wine, diabetes and breast cancer, in this order: the pick of PPCA and `VAE`
(Gaussian tokens), kind and dimension (1 to 16) by held-out rows, 0.604, 0.517 and 0.238; `VAE` alone 0.604, 0.530 and
0.264; PPCA alone 0.675, 0.509 and 0.206; `IterativeImputer` 0.798, 0.719 and 0.199; column means 1.033, 0.976 and
1.019. On breast cancer, 30 columns that nearly repeat each other, the pick falls behind: a density of rows is not won
where squared errors are, and PPCA fills in better than the `VAE` that is picked. The intervals cover 86.8, 89.7 and
92.5 % of the cells: too few on wine, whose 178 rows are few for a network.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.experimental import enable_iterative_imputer  # noqa: F401  # makes the import below work
from sklearn.impute import IterativeImputer, SimpleImputer
from sklearn.preprocessing import StandardScaler

from bayes_mpt import BayesMPT, HeldOut, MarginalLikelihoodSearch
from bayes_mpt.models import PPCA, VAE
from bayes_mpt.training import Epochs

RESULTS = Path(__file__).with_suffix(".json")
TABLES = {"wine": load_wine, "diabetes": load_diabetes, "breast cancer": load_breast_cancer}
DIMENSIONS, MAX_EPOCHS = [1, 2, 4, 8, 16], 200


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
    settings = {"random_state": [seed], "training": [Epochs(max_epochs=MAX_EPOCHS, batch_size=32)]}
    nets = [VAE(k, likelihood="gaussian", hidden=(64,)) for k in DIMENSIONS]
    grids: list[dict[str, Any]] = [{"model": [PPCA(k) for k in DIMENSIONS]}, {"model": nets, **settings}]
    search = MarginalLikelihoodSearch(BayesMPT(), grids, evidence=HeldOut(cv=3)).fit(X)
    lml = {}
    for label, kind in (("PPCA", PPCA), ("VAE", VAE)):
        found = zip(search.cv_results_["params"], search.cv_results_["lml"], strict=True)
        params, lml[label] = max(
            ((p, v) for p, v in found if isinstance(p["model"], kind)), key=lambda f: f[1]
        )
        best = BayesMPT(**params).fit(X)
        out[label] = float(np.square(best.impute(X) - whole)[missing].mean())
        out[f"{label}: dimension"] = best.n_components_
    out["pick"] = out[max(lml, key=lambda label: lml[label])]
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
    keys = ("mean", "IterativeImputer", "PPCA", "VAE", "pick", "coverage of 90 %")
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
    parser.add_argument("--seeds", type=int, default=3)
    main(parser.parse_args().seeds)
