"""Which kernel for carbon dioxide? Five Gaussian processes ranked by evidence, and tried on the years that follow.

Weekly concentrations at Mauna Loa from 1958 to 2001 (shipped with statsmodels), of which every fourth week is taken;
weeks without a measurement stay in the table as missing y. The kernels are written as in scikit-learn. They are fitted
up to 1990 and ranked there; weeks after it, which none has seen, say whether the best deserves its place. Writes
rank_kernels.png. Skips where statsmodels is not installed.

    python examples/rank_kernels.py [--output DIR]
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.gaussian_process.kernels import RBF, ExpSineSquared, Matern, RationalQuadratic, WhiteKernel

from bayes_mpt import BayesMPT, MarginalLikelihoodSearch
from bayes_mpt.models import GaussianProcess
from bayes_mpt.plots import RankingDisplay

LAST = 1990.0

season = 1.0 * ExpSineSquared()
KERNELS = [
    1.0 * RBF() + WhiteKernel(),
    1.0 * Matern(nu=1.5) + WhiteKernel(),
    1.0 * RBF() + season + WhiteKernel(),
    1.0 * RBF() + season * RBF() + WhiteKernel(),
    1.0 * RBF() + season * RBF() + 1.0 * RationalQuadratic() + WhiteKernel(),
]


def main(output: Path) -> None:
    series = read_series()
    if series is None:
        print("skipped: statsmodels, which carries the series, is not installed")
        return
    year, ppm = series
    x, early = year[:, None], year < LAST
    seen = ~np.isnan(ppm)
    print(
        f"{early.sum()} weeks before {LAST:.0f}, {(~seen & early).sum()} of them without a measurement; "
        f"{(seen & ~early).sum()} measured after it"
    )
    search = MarginalLikelihoodSearch(BayesMPT(GaussianProcess()), {"model__kernel": KERNELS}, random_state=0)
    search.fit(x[early], ppm[early])
    table = search.comparison_
    print(f"ranked by {search.evidence_}: {search.evidence_reason_}")
    with pd.option_context("display.width", 140, "display.float_format", "{:.3f}".format):
        print(table[["rank", "lml", "lml_diff", "weight", "diag"]].to_string())
    best = search.best_estimator_
    period = [v.item() for n, v in best.params_.items() if "period_length" in n]
    print(f"\n{best.explain()}\n\nthe period found in {table.index[0]}: {period[0]:.4f} years")

    # Known otherwise: the seasons are a year long; and what follows is foretold the better, the better the kernel.
    assert abs(period[0] - 1) < 0.002
    assert "Periodic" in table.index[0]
    plain = BayesMPT(GaussianProcess(KERNELS[0])).fit(x[early], ppm[early])
    for end in (LAST + 2, year.max()):
        new = seen & (year >= LAST) & (year <= end)
        error = [float(np.sqrt(np.mean((m.predict(x[new]) - ppm[new]) ** 2))) for m in (best, plain)]
        print(
            f"{new.sum()} weeks up to {end:.0f}: root mean square error {error[0]:.2f} ppm, of an RBF {error[1]:.2f}"
        )
        if end == LAST + 2:
            assert error[0] < 0.6 * error[1]

    output.mkdir(parents=True, exist_ok=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.4), layout="constrained", width_ratios=[1, 1.5])
    RankingDisplay(table).plot(left)
    left.set_title("Kernels ranked by the weeks before 1990")
    draw_forecast(right, best, year, ppm)
    figure.savefig(output / "rank_kernels.png", dpi=120)
    print(f"wrote {output / 'rank_kernels.png'}")


def read_series() -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Year and parts per million (NaN where not measured) of every fourth week."""
    try:
        from statsmodels.datasets import co2
    except ImportError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pandas, from inside statsmodels
        data = co2.load_pandas().data.iloc[::4]
    year = data.index.year + (data.index.day_of_year - 1) / 365.25
    return year.to_numpy(float), data["co2"].to_numpy(float)


def draw_forecast(ax: plt.Axes, best: BayesMPT, year: NDArray[np.float64], ppm: NDArray[np.float64]) -> None:
    shown = year > 1982
    new = np.arange(1982, 2004, 1 / 24)
    mean, sd = best.predict(new[:, None], return_std=True)
    ax.fill_between(
        new, mean - 2 * sd, mean + 2 * sd, alpha=0.3, linewidth=0, label="two standard deviations"
    )
    ax.plot(new, mean, lw=1, label="mean")
    for when, color, name in ((year < LAST, "0.4", "fitted"), (year >= LAST, "C3", "not seen")):
        ax.plot(year[shown & when], ppm[shown & when], ".", ms=3, color=color, label=name)
    ax.axvline(LAST, color="0.5", lw=0.8, ls=":")
    ax.set(xlabel="year", ylabel="CO2, ppm", title="Forecast by the best of them")
    ax.legend(fontsize="small")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    main(parser.parse_args().output)
