"""Average the candidates of a search, or choose one? Both judged by fresh rows, on simulated tables.

    python benchmarks/ranking/averaging.py                  # SIZES below, some minutes of one core
    python benchmarks/ranking/averaging.py --quick          # a few tables of another seed

Peer: the search's own choice, `best_estimator_`, as a user has it. Groups, each with its grid:

- factors: Gaussian rows, N 60-200, D 6-12, of PPCA and factor analysis in turn, true K 0-3; candidates PPCA with K 0-3
  and factor analysis with K 0-2, evidence="integrated", averaged by weights="evidence". Beside it the chosen candidate
  averaged over its posterior, which parts what the average over K gains from what that over parameters does; and the
  fits mixed by the same weights, which `average` refuses;
- kernels: N 30-80 observations of four kernels in turn, noise 2 to 50 % of the signal's variance, hyper-parameters
  log-uniform in ranges that owe nothing to the priors; the same four are candidates, averaged by weights="evidence";
- mixtures: N 80-160, D 2-4, of 1 to 3 Gaussian clusters, apart or not; candidates GaussianMixture with 1 to 3
  components, evidence="heldout", averaged by weights="stacking";
- off: N 80-160, D 5-8, laws that no candidate has: t_5 rows, gross outliers, skewed columns, two groups of rows with
  loadings of their own; candidates PPCA with K 0-3 and factor analysis with K 1-2, stacked.

Judged by the mean log density of 2000 fresh rows times N (of kernels the sum over 60 fresh y, each alone given the
data): nats over as many new rows as there were. Differences are paired by table, with normal 95 % intervals.
Finished tables are kept as JSON lines, and a run goes on from them.

Asked: averaging better on average than choosing, and not worse by more than the interval, on at least 100 tables of
factor models and 60 sets for kernels.

Found, six minutes of CPU time, the seed fixed before (six kernel sets with 100 fresh y and longer fits were dropped for
what they cost, before anything was compared; all was run again after the prior of mixtures had changed); average minus
choice:

- factors, 100 tables: **met**, +1.45 nats (0.87 to 2.03), better in 68 %. Of these +1.0 are the chosen candidate's
  posterior, +0.41 (0.04 to 0.78) the average over candidates. Fits mixed by the same weights gain -0.04 (-0.55 to
  0.47): the average is ahead of them by 1.49 (1.04 to 1.95), and of the best fit as known afterwards by 0.25 (-0.18 to
  0.68);
- kernels, 60 sets: **met** in the mean, +0.40 (-0.23 to 1.03), an interval that holds zero, better in 47 %; all of it
  from the nodes of the chosen kernel, against which the average is even, -0.02 (-0.16 to 0.11). Inputs lie among those
  seen, where kernels agree;
- mixtures, 30 tables, stacked: **met**, +1.82 (0.48 to 3.16), better in 47 %, at worst -3.9;
- off, 40 tables, stacked: **met**, +22.1 (7.6 to 36.5), better in 88 %; in each of the four laws, from +4.5 (two groups
  of rows) to +59 (outliers): a mixture of fits has the heavy tails that no fit has.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from choice_study import rows_of_law
from gpytorch.kernels import LinearKernel, MaternKernel, PeriodicKernel, RBFKernel, ScaleKernel
from kernel_ranking import covariance
from scipy.special import logsumexp
from selection_study import interval
from sklearn.base import clone

from bayes_mpt import BayesMPT, MarginalLikelihoodSearch
from bayes_mpt.models import PPCA, FactorAnalysis, GaussianMixture, GaussianProcess
from bayes_mpt.training import Ascent

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/, for timing.py
from timing import Report, run

KEPT = Path(__file__).with_suffix(".jsonl")
SEED, QUICK_SEED = 1618, 1
SIZES = {"factors": 100, "kernels": 60, "mixtures": 30, "off": 40}
QUICK = {"factors": 2, "kernels": 2, "mixtures": 2, "off": 4}
N_FRESH, N_FRESH_Y = 2000, 60
N_CHECKED = 2  # tables on which the mixture is compared with the average's own
OFF = ("t_5", "outliers", "skewed", "two groups")
FACTORS = [{"model": [PPCA()], "model__n_components": [0, 1, 2, 3]}]
FACTORS += [{"model": [FactorAnalysis()], "model__n_components": [0, 1, 2]}]
STACKED = [{"model": [PPCA()], "model__n_components": [0, 1, 2, 3]}]
STACKED += [{"model": [FactorAnalysis()], "model__n_components": [1, 2]}]


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


# ------------------------------------------------------------------------------------------------------------ tables


def factor_rows(rng: np.random.Generator, law: str, n: int, d: int, ppca: bool) -> tuple[np.ndarray, int]:
    """n rows and N_FRESH more of one law; its K."""
    k = int(rng.integers(0, 4))
    w = log_uniform(rng, 0.2, 1.5) * rng.uniform(0.5, 1.5, k) * rng.normal(size=(d, k))
    noise = np.ones(d) if ppca else np.exp(rng.uniform(-0.5, 0.5, d) * math.log(log_uniform(rng, 2, 50)))
    if law != "two groups":
        return rows_of_law(law, n + N_FRESH, w, noise, rng), k
    other = rng.normal(size=(d, 1))
    rows = rows_of_law("gaussian", n + N_FRESH, w, noise, rng)
    second = rows_of_law("gaussian", n + N_FRESH, other, noise, rng)
    return np.where(rng.random((n + N_FRESH, 1)) < 0.3, second, rows), k


def cluster_rows(rng: np.random.Generator, n: int, d: int) -> tuple[np.ndarray, int]:
    """The same of Gaussian clusters."""
    k = int(rng.integers(1, 4))
    apart = log_uniform(rng, 1, 4)
    centers = apart * rng.normal(size=(k, d))
    roots = np.linalg.cholesky(np.eye(d) + 0.5 * (a := rng.normal(size=(k, d, d))) @ a.transpose(0, 2, 1) / d)
    label = rng.choice(k, n + N_FRESH, p=rng.dirichlet(np.full(k, 5.0)))
    z = rng.normal(size=(n + N_FRESH, d))
    return centers[label] + np.einsum("nij,nj->ni", roots[label], z), k


def kernels() -> dict[str, Any]:
    return {
        "RBF": ScaleKernel(RBFKernel()),
        "Matern 3/2": ScaleKernel(MaternKernel(nu=1.5)),
        "periodic": ScaleKernel(PeriodicKernel()),
        "linear": LinearKernel(),
    }


def curve(rng: np.random.Generator, kind: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and observations of one kernel, the fresh ones last."""
    x = rng.uniform(size=(n + N_FRESH_Y, 1))
    cov = covariance(kind, x, rng)
    noise = log_uniform(rng, 0.02, 0.5) * np.diag(cov).mean()
    y = rng.multivariate_normal(np.zeros(len(x)), cov + noise * np.eye(len(x)), method="eigh")
    return x, log_uniform(rng, 0.1, 10) * (y + rng.normal())


# ------------------------------------------------------------------------------------------------------------- study


def of_factors(seed: int, index: int) -> dict[str, Any]:
    rng = np.random.default_rng([seed, 0, index])
    n, d = int(rng.integers(60, 201)), int(rng.integers(6, 13))
    rows, k = factor_rows(rng, "gaussian", n, d, index % 2 == 0)
    seen, new = rows[:n], rows[n:]
    search = MarginalLikelihoodSearch(BayesMPT(), FACTORS, evidence="integrated", random_state=0).fit(seen)
    average = search.average()
    best = average.candidate_names_.index(search.candidate_names_[search.best_index_])
    models = [
        clone(p["model"]).set_params(n_components=p["model__n_components"])
        for p in search.cv_results_["params"]
    ]
    fits = np.array([BayesMPT(model).fit(seen).score_samples(new) for model in models])
    with np.errstate(divide="ignore"):
        mixed = logsumexp(fits + np.log(average.weights_)[:, None], axis=0)
    scores = {
        "chosen": search.score_samples(new),
        "chosen, its posterior": average.members_[best].log_prob(new),
        "fits mixed by evidence": mixed,
        "average": average.score_samples(new),
        "best fit, known afterwards": fits[np.argmax(fits.sum(1))],
    }
    return {"n": n, "d": d, "k": k, **{name: n * float(s.mean()) for name, s in scores.items()}}


def of_kernels(seed: int, index: int) -> dict[str, Any]:
    rng = np.random.default_rng([seed, 1, index])
    names = list(kernels())
    n, kind = int(rng.integers(30, 81)), names[index % len(names)]
    x, y = curve(rng, kind, n)
    grid = {"model": [GaussianProcess(kernel) for kernel in kernels().values()]}
    # the maximum of the likelihood is only one start of many; candidates are left at their maximum a posteriori
    short = BayesMPT(training=Ascent(max_iter=2))
    search = MarginalLikelihoodSearch(short, grid, evidence="integrated", random_state=0).fit(x[:n], y[:n])
    average = search.average()
    each = np.array([member.log_prob(x[n:], y[n:]) for member in average.members_])
    with np.errstate(divide="ignore"):
        mixed = logsumexp(each + np.log(average.weights_)[:, None], axis=0)
    if index < N_CHECKED:
        some = slice(n, n + 3)
        np.testing.assert_allclose(mixed[:3], average.score_samples(x[some], y[some]), atol=1e-6)
    scores = {
        "chosen": search.score_samples(x[n:], y[n:]),
        "chosen, its posterior": each[search.best_index_],
        "average": mixed,
    }
    return {"n": n, "kind": kind, **{name: float(s.sum()) for name, s in scores.items()}}


def of_stacking(group: str, seed: int, index: int) -> dict[str, Any]:
    rng = np.random.default_rng([seed, 2 + (group == "off"), index])
    n = int(rng.integers(80, 161))
    if group == "mixtures":
        d, law = int(rng.integers(2, 5)), "clusters"
        rows, k = cluster_rows(rng, n, d)
        grid: Any = {"model__n_components": [1, 2, 3]}
        estimator = BayesMPT(GaussianMixture(), random_state=0)
    else:
        d, law = int(rng.integers(5, 9)), OFF[index % len(OFF)]
        rows, k = factor_rows(rng, law, n, d, index % 8 < 4)
        grid, estimator = STACKED, BayesMPT(random_state=0)
    seen, new = rows[:n], rows[n:]
    search = MarginalLikelihoodSearch(estimator, grid, evidence="heldout", random_state=0).fit(seen)
    average = search.average("stacking")
    scores = {"chosen": search.score_samples(new), "average": average.score_samples(new)}
    told = {"heldout gain": n * average.heldout_gain_, "heldout gain se": n * average.heldout_gain_se_}
    return {"n": n, "d": d, "k": k, "law": law, **told} | {m: n * float(s.mean()) for m, s in scores.items()}


def study(group: str, index: int, seed: int) -> dict[str, Any]:
    """One table: a line of the kept file."""
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fits without noise, rows that are not Gaussian
        if group == "factors":
            found = of_factors(seed, index)
        elif group == "kernels":
            found = of_kernels(seed, index)
        else:
            found = of_stacking(group, seed, index)
    key = {"group": group, "index": index, "seed": seed}
    return key | found | {"cpu": time.process_time() - start}


def compared(
    report: Report, group: str, rows: list[dict[str, Any]], other: str, ours: str = "average"
) -> None:
    """A row of the table, and for the choice a verdict."""
    diff = np.array([row[ours] - row[other] for row in rows])
    mean, low, high = interval(diff)
    better = float((diff > 0).mean())
    said = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
    report.row(
        group=group,
        tables=len(rows),
        compared=f"{ours} - {other}",
        nats=said,
        better=f"{better:.0%}",
        worst=f"{diff.min():+.1f}",
        cpu=f"{np.median([row['cpu'] for row in rows]):.2f}",
        differences=[round(float(v), 4) for v in diff],
    )
    if (ours, other) == ("average", "chosen") and group in SIZES:
        report.target(
            f"{group}: averaging better on average than choosing, and not worse by more than the interval",
            bool(mean > 0) if len(rows) > 10 else None,
            f"{said} nats, better in {better:.0%}",
        )


def main(report: Report, args: argparse.Namespace) -> None:
    sizes, seed = (QUICK, QUICK_SEED) if args.quick else (SIZES, SEED)
    kept = Path(os.devnull) if args.quick else KEPT
    lines = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {(r["group"], r["index"]): r for r in lines if r["seed"] == seed}
    with kept.open("a") as stream:
        for group, size in sizes.items():
            for index in range(size):
                if (group, index) not in done:
                    done[group, index] = study(group, index, seed)
                    stream.write(json.dumps(done[group, index]) + "\n")
                    stream.flush()
    for group, size in sizes.items():
        rows = [done[group, index] for index in range(size)]
        compared(report, group, rows, "chosen")
        for other in ("chosen, its posterior", "fits mixed by evidence", "best fit, known afterwards"):
            if other in rows[0]:
                compared(report, group, rows, other)
        if "fits mixed by evidence" in rows[0]:
            compared(report, group, rows, "chosen", "fits mixed by evidence")
    off = [done["off", index] for index in range(sizes["off"])]
    for law in OFF:
        compared(report, f"off, {law}", [row for row in off if row["law"] == law], "chosen")
    cpu = sum(row["cpu"] for row in done.values())
    report.note(f"{cpu:.0f} s of CPU time, of the tables taken up from an earlier run too")
    report.note("nats over as many new rows as there were (of kernels over 60 new y), paired, 95 % intervals")


if __name__ == "__main__":
    run(main, __file__, __doc__)
