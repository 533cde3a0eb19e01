"""CPU time of a fit against rows N, tokens T and latents K, beside the model that the algorithm implies.

    seconds = a + b K + c N T^2 + (N T) d + e I T^3

a: the program is read a few dozen times, on K + 4 probe rows each (b). N T: the rows are checked and read. N T^2: their
covariance, after which nothing depends on N. I T^3: one eigendecomposition an iteration (PPCA: one in all; factor
analysis: one for each step of Newton). The five constants are fitted, non-negative, to all points in relative error;
the picture shows points and model. CPU seconds, which other work on the machine disturbs less than wall time; bars
from the least to the greatest. Data: K latents with standard normal loadings, noise variances log-uniform on
[0.3, 3].

Asked: every time within a factor 2 of the model, and after the covariance nothing that grows with N but the checks.

Found: every time is within a factor 1.7 of the model (scaling.png).
"""

import sys
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from bayes_mpt import BayesMPT
from bayes_mpt.models import PPCA, FactorAnalysis
from bayes_mpt.program.statistics import SufficientStatistics

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/, for timing.py
from timing import Report, interleave, run

MODELS = {"PPCA": PPCA, "FactorAnalysis": FactorAnalysis}
BASE = {"N": 4000, "T": 100, "K": 5}
CHECK = 2e-9  # seconds a cell that checking and sampling the rows may take
SWEEPS = {
    "N": (300, 1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000),
    "T": (8, 15, 30, 60, 120, 240, 480),
    "K": (1, 2, 4, 8, 16, 32, 50),
}
QUICK = {"N": (300, 3000, 30_000), "T": (15, 60, 240), "K": (1, 8, 32)}
TERMS = ("reading", "reading a latent", "covariance", "rows", "eigendecompositions")


def data(N, T, K):
    rng = np.random.default_rng(0)
    loading = rng.normal(size=(T, K))
    noise_sd = np.exp(0.5 * rng.uniform(np.log(0.3), np.log(3), T))
    x = rng.normal(size=(N, T))
    x *= noise_sd
    for start in range(0, N, 50_000):
        rows = x[start : start + 50_000]
        rows += rng.normal(size=(len(rows), K)) @ loading.T
    return x


def cost(p):
    """What each constant multiplies."""
    n, t, k = p["N"], p["T"], p["K"]
    return [1.0, k, n * t**2, n * t, p["iterations"] * t**3]


def main(report: Report, args):
    sweeps, repeats = (QUICK if args.quick else SWEEPS), args.repeats or (3 if args.quick else 5)
    report.note("otherwise " + ", ".join(f"{k} = {v}" for k, v in BASE.items()))
    points = []
    for axis, values in sweeps.items():
        for value in values:
            at = {**BASE, axis: value}
            x = data(**at)
            calls = {name: lambda m=m, k=at["K"], x=x: BayesMPT(m(k)).fit(x) for name, m in MODELS.items()}
            timings = interleave({**calls, "moments": lambda x=x: SufficientStatistics(x)}, repeats)
            moments = timings.pop("moments")
            for name, timing in timings.items():
                points.append(
                    {
                        "model": name,
                        "axis": axis,
                        **at,
                        "iterations": timing.result.n_iter_,
                        "seconds": float(np.median(timing.cpu)),
                        "least": min(timing.cpu),
                        "greatest": max(timing.cpu),
                        "moments": float(np.median(moments.cpu)),
                        "after": float(np.median(np.subtract(timing.cpu, moments.cpu))),
                    }
                )
    constants = {}
    for name in MODELS:
        mine = [p for p in points if p["model"] == name]
        costs = np.array([cost(p) for p in mine])
        seconds = np.array([p["seconds"] for p in mine])
        scale = costs.max(0)
        constants[name] = nnls(costs / scale / seconds[:, None], np.ones(len(mine)))[0] / scale
        for p, predicted in zip(mine, costs @ constants[name], strict=True):
            p["predicted"] = float(predicted)
        terms = [f"{t} {c:.2e}" for t, c in zip(TERMS, constants[name], strict=True)]
        report.note(f"{name}, seconds: " + ", ".join(terms))
    for p in points:
        report.row(**p, measured_over_predicted=p["seconds"] / p["predicted"])

    for name in MODELS:
        off = [p["seconds"] / p["predicted"] for p in points if p["model"] == name]
        report.target(
            f"{name}: every time within a factor of 2 of the model",
            0.5 < min(off) and max(off) < 2,
            f"measured / model from {min(off):.2f} to {max(off):.2f} over {len(off)} points",
        )
        rows = [p for p in points if p["model"] == name and p["axis"] == "N"]
        near, far = rows[0], rows[-1]
        allowed = near["after"] + CHECK * far["N"] * far["T"]
        report.target(
            f"{name}: beyond the covariance, nothing grows with N but checks ({1e9 * CHECK:.0f} ns a cell)",
            far["after"] < allowed,
            f"fit less covariance: {1e3 * near['after']:.0f} ms at N = {near['N']}, {1e3 * far['after']:.0f} ms at "
            f"N = {far['N']} (allowed {1e3 * allowed:.0f} ms)",
        )
    if not args.quick:
        draw(points)


def draw(points):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True, layout="constrained")
    for ax, axis in zip(axes, SWEEPS, strict=True):
        for i, name in enumerate(MODELS):
            mine = [p for p in points if p["axis"] == axis and p["model"] == name]
            at, seconds = [p[axis] for p in mine], np.array([p["seconds"] for p in mine])
            error = [seconds - [p["least"] for p in mine], [p["greatest"] for p in mine] - seconds]
            ax.errorbar(
                at, seconds, error, fmt="os"[i], color=f"C{i}", markersize=4, label=f"{name}, measured"
            )
            ax.plot(at, [p["predicted"] for p in mine], color=f"C{i}", linewidth=1, label=f"{name}, model")
        moments = {p[axis]: p["moments"] for p in points if p["axis"] == axis}
        ax.plot(moments.keys(), moments.values(), ":", color="0.4", linewidth=1, label="covariance alone")
        ax.set(xscale="log", yscale="log", xlabel={"N": "rows N", "T": "tokens T", "K": "latents K"}[axis])
        ax.set_title(", ".join(f"{k} = {v}" for k, v in BASE.items() if k != axis), fontsize=9)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("CPU seconds of one fit")
    axes[0].legend(fontsize=7)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    run(main, __file__, __doc__)
