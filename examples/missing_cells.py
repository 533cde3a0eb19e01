"""A table with holes: how many latent dimensions, how sure is that, and what stands in the empty cells?

178 wines, 13 chemical measurements (shipped with scikit-learn), of which every seventh is taken away, as if it had not
been measured. Candidates are ranked by what their fits are expected to predict; loadings, noise variances and mean are
integrated under one prior, which gives each candidate's log evidence with its error, and weights. The empty cells are
then filled by the posterior of the chosen model, with intervals, and since here the measurements are known after all,
counted. Writes missing_cells.png.

    python examples/missing_cells.py [--output DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from sklearn.base import clone
from sklearn.datasets import load_wine

from bayes_mpt import BayesMPT, MarginalLikelihoodSearch, loadings
from bayes_mpt.models import FactorAnalysis

SHARE = 1 / 7


def main(output: Path) -> None:
    measured = load_wine(as_frame=True).data
    hidden = np.random.default_rng(0).random(measured.shape) < SHARE
    X = measured.mask(hidden)

    search = MarginalLikelihoodSearch(
        BayesMPT(FactorAnalysis(), penalty=True), {"model__n_components": range(7)}, random_state=0
    ).fit(X)
    print(f"{len(X)} wines, {X.shape[1]} measurements, {hidden.mean():.0%} of the cells missing\n")
    print(search.summary())

    model = clone(search.best_estimator_).set_params(average="posterior").fit(X)
    print(
        f"\nlog evidence {model.log_marginal_likelihood_:.1f} +- {model.log_marginal_likelihood_se_:.2f} nats"
    )
    print(loadings(model).round(2).iloc[:, :6].to_string())
    filled, sd = (np.asarray(a) for a in model.impute(X, return_std=True))  # a DataFrame gives DataFrames
    error = (measured.to_numpy() - filled)[hidden] / sd[hidden]
    covered = np.mean(np.abs(error) < 1.96)
    print(f"\n{hidden.sum()} empty cells; their 95 % intervals hold {covered:.1%} of the measurements")
    assert 0.92 < covered < 0.98

    output.mkdir(parents=True, exist_ok=True)
    figure = _drawn(search, measured, filled, sd, hidden)
    figure.savefig(output / "missing_cells.png", dpi=120)
    print(f"wrote {output / 'missing_cells.png'}")


def _drawn(search, measured, filled, sd, hidden) -> plt.Figure:
    """Evidence with its error, weights, and the empty cells of three columns."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    table = search.comparison_.loc[search.candidate_names_]
    middle_ends = (-0.6, len(table) - 0.4)
    k = np.array([int(name.rpartition("=")[2]) for name in table.index])
    near = table["lml_diff"] > -60
    left.errorbar(k[near], table["lml_diff"][near], 2 * table["se"][near], fmt="o", ms=3, capsize=4)
    left.axhline(0, color="0.8", lw=1, zorder=0)
    left.set(xlabel="latent dimension", ylabel="log evidence against the best, nats", xlim=middle_ends)
    left.set_title(f"Evidence, two errors ({(~near).sum()} further below)")
    middle.bar(k, table["weight"])
    middle.set(xlabel="latent dimension", ylabel="posterior probability", title="Weights")
    middle.set(xlim=middle_ends, ylim=(0, 1))
    names = ["alcohol", "flavanoids", "color_intensity"]
    for j, name in enumerate(names):
        column = measured.columns.get_loc(name)
        center, scale = measured[name].mean(), measured[name].std()
        rows = np.flatnonzero(hidden[:, column])
        truth = (measured[name].to_numpy()[rows] - center) / scale
        mean = (filled[rows, column] - center) / scale
        right.errorbar(
            truth, mean, 1.96 * sd[rows, column] / scale, fmt="o", ms=3, lw=0.8, color=f"C{j}", label=name
        )
    ends = np.array(right.get_xlim())
    right.plot(ends, ends, color="0.5", lw=1)
    right.set(
        xlabel="measured", ylabel="filled in, 95 % intervals", title="Empty cells, columns standardised"
    )
    right.legend(fontsize="small")
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    main(parser.parse_args().output)
