"""Is the place where a mixture ends the best, and is it one place? The wines, a tenth of the cells missing.

178 rows of 13 columns, three components. What is compared is what a fit climbs, the LML and the log prior of the
covariances, so that a fit that ends higher is the better one.

``peers``: 100 climbs from one start each, with no search: centres are three rows, or those of a k-means (every other
one), of a table in whose gaps stand random cells of the same column; covariances are those of the table. ``over 10``
and ``over 100``: by how many nats the worst of our fits, ``random_state=0`` to 9, ends above the best of the first ten
of them and of all, ``reach 10`` and ``reach 100``: how many of the fits end no lower, or less than 0.1 nats.

``apart``: how far the worst of our fits lies below the best of them, ``within``: how many lie less than 0.1 nats below
that. Asked: all ten within 0.1 nats of the best of ten, peers or seeds, under 1 CPU second a fit in the median.

Each start and each fit is random by itself: seeds share nothing.
"""

import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_wine

from bayes_mpt import BayesMPT
from bayes_mpt.models import GaussianMixture, MixtureOfFactorAnalyzers
from bayes_mpt.models.gaussians import Gaussians

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/, for timing.py
from timing import Report, run, threads

K, FACTORS = 3, 2
SEEDS, QUICK, NEAR, PRICE = 10, 2, 0.1, 1.0
PEERS, FEW, QUICK_PEERS = 100, 10, 4
MODELS = {kind: GaussianMixture(K, kind) for kind in ("full", "tied", "diag", "spherical")} | {
    "factor analysers": MixtureOfFactorAnalyzers(n_components=K, n_factors=FACTORS)
}
NO_SEARCH = 199  # steps: with fewer than 200 no model has starts of its own


def table():
    x = load_wine().data
    return np.where(np.random.default_rng(0).random(x.shape) < 0.1, np.nan, x)


def value(model, x, params):
    """The LML of all rows and the log prior of the covariances, at parameters by name."""
    p = {name: torch.as_tensor(each) for name, each in params.items()}
    if "loading" in p:
        cov = p["loading"] @ p["loading"].mT + torch.diag_embed(p["noise_variance"])
        scale = torch.linalg.cholesky(cov)
    elif "scale_tril" in p:
        scale = p["scale_tril"].expand(K, -1, -1)
    else:
        scale = p["scale"]
    rows = torch.as_tensor(x)
    return float(Gaussians(p["weights"], p["loc"], scale).log_prob(rows).sum() + model.penalty(rows)(p))


def single_start(model, x, seed):
    """Parameters by name, where one climb begins."""
    rng = np.random.default_rng([seed, 1])
    full = x.copy()
    for column in full.T:
        gaps = np.isnan(column)
        column[gaps] = rng.choice(column[~gaps], gaps.sum())
    if seed % 2:
        unit = (full - full.mean(0)) / full.std(0)
        centre = KMeans(K, n_init=1, random_state=seed).fit(unit).cluster_centers_
        centre = full.mean(0) + full.std(0) * centre
    else:
        centre = full[rng.choice(len(full), K, replace=False)]
    start = {"weights": np.full(K, 1 / K), "loc": centre}
    if isinstance(model, MixtureOfFactorAnalyzers):
        start["loading"] = 0.3 * full.std(0)[:, None] * rng.normal(size=(K, x.shape[1], FACTORS))
        start["noise_variance"] = np.tile(0.5 * full.var(0), (K, 1))
    elif model.covariance_type in ("full", "tied"):
        root = np.linalg.cholesky(np.cov(full.T))
        start["scale_tril"] = root if model.covariance_type == "tied" else np.stack([root] * K)
    elif model.covariance_type == "diag":
        start["scale"] = np.tile(full.std(0), (K, 1))
    else:
        start["scale"] = np.full((K, 1), np.sqrt(full.var(0).mean()))
    return {name: torch.as_tensor(each) for name, each in start.items()}


def fits(model, x, n):
    """What fits reach, and their CPU seconds."""
    found, seconds = [], []
    for seed in range(n):
        before = time.process_time()
        fit = BayesMPT(model, random_state=seed).fit(x)
        seconds.append(time.process_time() - before)
        found.append(value(model, x, fit.params_))
    return np.array(found), seconds


def peers(model, x, n):
    """What climbs from one start each reach."""
    rows = torch.as_tensor(x)
    ends = (model.maximize(rows, single_start(model, x, i), tol=1e-9, max_iter=NO_SEARCH) for i in range(n))
    return np.array([value(model, x, end) for end in ends])


def main(report: Report, args):
    x = table()
    for kind, model in MODELS.items():
        with threads(1), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fits that have not converged
            found, seconds = fits(model, x, QUICK if args.quick else SEEDS)
            ends = peers(model, x, QUICK_PEERS if args.quick else PEERS)
        below, of_few, of_all = found.max() - found, ends[:FEW].max(), ends.max()
        within, reach = int((below < NEAR).sum()), [int((found > m - NEAR).sum()) for m in (of_few, of_all)]
        cpu = float(np.median(seconds))
        report.row(
            components=kind,
            fits=len(found),
            best=float(found.max()),
            apart=float(below.max()),
            within=within,
            peers=len(ends),
            **{"over 10": float(found.min() - of_few), "reach 10": reach[0]},
            **{"over 100": float(found.min() - of_all), "reach 100": reach[1]},
            cpu=cpu,
            found=found.tolist(),
            ends=ends.tolist(),
            seconds=seconds,
        )
        decided = None if args.quick else True
        asked = {
            f"no lower than {NEAR} nats below the best of {FEW} climbs from one start each": reach[0],
            f"no lower than {NEAR} nats below the best of {PEERS} of them": reach[1],
            f"within {NEAR} nats of the best of {SEEDS} seeds": within,
        }
        for text, n in asked.items():
            figure = f"{n} of {len(found)}"
            if n == within and text.endswith("seeds"):
                figure += f", {below.max():.2f} apart"
            report.target(f"{kind}: all {text}", decided and n == len(found), figure)
        report.target(f"{kind}: median under {PRICE:g} CPU s", decided and cpu < PRICE, f"{cpu:.2f} s")


if __name__ == "__main__":
    run(main, __file__, __doc__)
