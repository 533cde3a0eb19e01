"""Which measurements explain the progression of diabetes? Evidence of all 64 regressions on six columns.

442 patients (shipped with scikit-learn), columns and target standardised. Weights and noise variance are integrated:
the weights in closed form, the variance by quadrature. Nothing is fitted, so the evidence needs no penalty, and it
is compared with Student's t, its closed form. Writes variable_selection.png.

    python examples/variable_selection.py [--output DIR]
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy.special import softmax
from scipy.stats import multivariate_t
from sklearn.datasets import load_diabetes
from torch import Tensor

from bayes_mpt import BayesMPT
from bayes_mpt.models import BayesianRegression
from bayes_mpt.predictors import Quadrature

NAMES = ["age", "sex", "bmi", "bp", "s3", "s5"]
N_BEST = 12  # of the ranking, in the picture


class Subset(BayesianRegression):
    """Regression on some of the columns."""

    def __init__(self, columns: tuple[int, ...] = (), prior_scale: float = 1.0):
        super().__init__(prior_scale)
        self.columns = columns

    def __call__(self, x: Tensor, y: Tensor) -> None:
        super().__call__(x[:, list(self.columns)], y)


def main(output: Path) -> None:
    data = load_diabetes(as_frame=True)
    X = standardised(data.data[NAMES]).to_numpy()
    y = standardised(data.target).to_numpy().copy()

    subsets = [s for size in range(len(NAMES) + 1) for s in combinations(range(len(NAMES)), size)]
    fits = {s: BayesMPT(Subset(s), predictor=Quadrature(16)).fit(X, y) for s in subsets}
    table = pd.DataFrame({"lml": [fits[s].log_marginal_likelihood_ for s in subsets]}, index=subsets)
    table["closed form"] = [by_student(X[:, list(s)], y) for s in subsets]
    table = table.sort_values("lml", ascending=False)
    table["lml_diff"] = table["lml"] - table["lml"].max()
    table["weight"] = softmax(table["lml"])  # every subset equally probable before
    chosen = list(table.index)
    best = fits[chosen[0]]
    table.index = [" ".join(NAMES[i] for i in s) or "none" for s in chosen]

    print(f"{len(y)} patients, {len(subsets)} regressions:")
    with pd.option_context("display.width", 120, "display.float_format", "{:.4f}".format):
        print(table[["lml", "closed form", "weight"]].head(N_BEST).to_string())
    print(f"\n{best.explain()}\n")

    # The posterior probability of a column is the sum over subsets with it.
    inclusion = [float(table["weight"][[i in subset for subset in chosen]].sum()) for i in range(len(NAMES))]
    for name, probability in zip(NAMES, inclusion, strict=True):
        print(f"  {name:4} is in the regression with probability {probability:.4f}")

    # Known otherwise: y is Student-t, and so are the probabilities that follow.
    assert np.allclose(table["lml"], table["closed form"], rtol=0, atol=1e-6)
    by_library = [
        BayesianRegression().log_evidence(X[:, list(s)], y) for s in chosen if s
    ]  # takes no empty X
    assert np.allclose(table["lml"][[bool(s) for s in chosen]], by_library, rtol=0, atol=1e-6)
    share = np.exp(table["closed form"] - table["closed form"].max())
    known = [share[[i in subset for subset in chosen]].sum() / share.sum() for i in range(len(NAMES))]
    assert np.allclose(inclusion, known, atol=1e-6)
    # The posterior mean of the weights is ridge regression with penalty 1 / prior_scale^2 (the intercept's too).
    design = np.column_stack([X[:, list(chosen[0])], np.ones(len(y))])
    ridge = np.linalg.solve(design.T @ design + np.eye(design.shape[1]), design.T @ y)
    assert np.allclose(best.predict(X), design @ ridge, atol=1e-6)

    output.mkdir(parents=True, exist_ok=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained", width_ratios=(3, 2))
    top = table[:N_BEST][::-1]
    left.plot(top["lml_diff"], top.index, "o", label="by quadrature")
    left.plot(
        top["closed form"] - table["closed form"].max(), top.index, "x", color="C3", ms=9, label="closed form"
    )
    left.set(title=f"The best {N_BEST} of {len(subsets)} subsets", xlabel="log evidence below the best, nats")
    left.legend()
    right.barh(NAMES[::-1], inclusion[::-1], color="C0")
    right.axvline(0.5, color="0.4", ls=":", label="before the data")
    right.set(title="Posterior inclusion probabilities", xlim=(0, 1))
    right.legend(loc="lower right")
    figure.savefig(output / "variable_selection.png", dpi=120)
    print(f"wrote {output / 'variable_selection.png'}")


def standardised(table: pd.DataFrame | pd.Series) -> pd.DataFrame | pd.Series:
    return (table - table.mean()) / table.std(ddof=0)


def by_student(x: np.ndarray, y: np.ndarray) -> float:
    """Density of y with w ~ N(0, v I) and v ~ InvGamma(1, 1): t with 2 degrees of freedom, shape I + X X'."""
    design = np.column_stack([x, np.ones(len(y))])
    return float(multivariate_t.logpdf(y, shape=np.eye(len(y)) + design @ design.T, df=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    main(parser.parse_args().output)
