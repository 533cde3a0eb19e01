"""What are sunspots made of? Sums and products of kernels grown until the evidence no longer gains.

Yearly sunspot numbers from 1700 to 2008 (shipped with statsmodels), their square roots. `KernelSearch` starts from four
base kernels and says in words, and as curves, what the best kernel it finds sees in the series. Writes
discover_kernel.png. Skips where statsmodels is not installed.

    python examples/discover_kernel.py [--output DIR] [--n-jobs N]
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import pandas as pd
from gpytorch.kernels import MaternKernel, PeriodicKernel, RBFKernel, RQKernel

from bayes_mpt import KernelSearch
from bayes_mpt.plots import DecompositionDisplay


def main(output: Path, n_jobs: int) -> None:
    try:
        from statsmodels.datasets import sunspots
    except ImportError:
        print("skipped: statsmodels, which carries the series, is not installed")
        return
    data = sunspots.load_pandas().data
    x, y = data[["YEAR"]].to_numpy(), np.sqrt(data["SUNACTIVITY"].to_numpy())
    base = [RBFKernel(), MaternKernel(nu=1.5), PeriodicKernel(), RQKernel()]
    search = KernelSearch(base=base, max_depth=2, n_jobs=n_jobs, random_state=0, verbose=1).fit(x, y)
    print(f"{len(search.comparison_)} kernels tried, ranked by {search.evidence_}: {search.evidence_reason_}")
    with pd.option_context("display.width", 140, "display.float_format", "{:.2f}".format):
        print(search.comparison_[["rank", "lml", "lml_diff", "weight", "depth", "diag"]].head(8).to_string())
    words = search.describe(unit="years")
    print(f"\nthe best of each depth: {', then '.join(search.path_)}\nin words: {words}")

    # Known otherwise: the cycle of Schwabe lasts about eleven years; the parts are no more and no less than the whole.
    periods = [float(p) for p in re.findall(r"(?:a period of|recurs every) ([\d.]+) years", words)]
    assert any(10 < p < 12 for p in periods), words
    parts = search.decompose()
    assert np.abs(parts.total - search.predict(x)).max() < 1e-8

    at = np.arange(1700, 2030, 0.5)[:, None]
    display = DecompositionDisplay.from_estimator(search, x, y, at=at)
    display.axes_[0].set(ylabel="square root of sunspots")
    display.axes_[-1].set(xlabel="year")
    output.mkdir(parents=True, exist_ok=True)
    display.figure_.savefig(output / "discover_kernel.png", dpi=120)
    print(f"wrote {output / 'discover_kernel.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    parser.add_argument("--n-jobs", type=int, default=2)
    arguments = parser.parse_args()
    main(arguments.output, arguments.n_jobs)
