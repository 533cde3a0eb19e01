"""Which rule finds the kernel that made the data, and predicts best? A study on simulated data sets.

    python benchmarks/ranking/kernel_ranking.py                  # 504 data sets, about half an hour on one core
    python benchmarks/ranking/kernel_ranking.py --quick          # 8 data sets

Each data set has 40 to 150 inputs, uniform, and observations from one of eight kernels with noise; its hyper-parameters
are log-uniform in ranges that owe nothing to the package's priors (`draw`). On each every rule chooses among the same
eight kernels, with a constant mean and the noise learnt:

- integrated: the package's default, `bayes_mpt.evidence.integrated.integrate`; predicts at the maximum a posteriori;
- laplace: Laplace's approximation at the same modes, summed; predicts there too;
- BIC: maximised LML - log(n) / 2 for each parameter; predicts at the maximum of the LML;
- LML: the maximised LML itself.

"True kernel": the rule finds the one that made the data. "Regret": what its pick loses in log density on 100 fresh
observations, each alone given the data, against the best of all candidates, at either estimate. Differences are paired
by data set, with normal 95 % intervals. On the first data sets the numbers are asserted to be those of
`MarginalLikelihoodSearch`. Finished data sets are kept as JSON lines, and a run with the same arguments goes on from
them.

Asked, on 500 sets: the true kernel as often as by BIC (5 points more as the goal), a regret no worse, and far ahead of
the maximised likelihood.

Found, on 504 sets: 52.6 % found and 1.36 nats lost on 100 fresh points; BIC 45.4 % and 2.50, the maximised likelihood
31.2 % and 3.49. Paired, 95 % intervals: against BIC +7.1 points (3.0 to 11.3) and -1.15 nats (-1.77 to -0.53); against
the maximised likelihood +21 points (17 to 26) and -2.14 nats (-2.90 to -1.38). Laplace's approximation is as good as
its correction here. RBF and linear kernels are found less often than by BIC, which prefers few parameters.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyro
import torch
from gpytorch.kernels import LinearKernel, MaternKernel, PeriodicKernel, RBFKernel, RQKernel, ScaleKernel

from bayes_mpt import BayesMPT, MarginalLikelihoodSearch
from bayes_mpt.evidence import integrated
from bayes_mpt.evidence.hyperparameters import Prior, assign, hyperprior, log_likelihood
from bayes_mpt.evidence.integrated import integrate
from bayes_mpt.models import GaussianProcess
from bayes_mpt.predictors import choose

RESULTS = Path(__file__).with_suffix(".json")
RULES = ("integrated", "laplace", "BIC", "LML")
N_FRESH = 100
N_CHECKED = 2


def kernels() -> dict[str, Any]:
    return {
        "RBF": ScaleKernel(RBFKernel()),
        "Matern 1/2": ScaleKernel(MaternKernel(nu=0.5)),
        "Matern 3/2": ScaleKernel(MaternKernel(nu=1.5)),
        "Matern 5/2": ScaleKernel(MaternKernel(nu=2.5)),
        "periodic": ScaleKernel(PeriodicKernel()),
        "rational quadratic": ScaleKernel(RQKernel()),
        "linear": LinearKernel(),
        "RBF + linear": ScaleKernel(RBFKernel()) + LinearKernel(),
    }


KINDS = tuple(kernels())


class Truth(NamedTuple):
    kind: str
    x: np.ndarray  # (n + 100, 1), the fresh inputs last
    y: np.ndarray  # (n + 100,)
    n: int


def covariance(kind: str, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Of inputs on (0, 1), in closed form; hyper-parameters log-uniform."""

    def between(low: float, high: float) -> float:
        return float(np.exp(rng.uniform(math.log(low), math.log(high))))

    r = np.abs(x - x.T)
    length = between(0.05, 0.5)
    s = r / length
    if kind == "RBF":
        return np.exp(-0.5 * s**2)
    if kind == "Matern 1/2":
        return np.exp(-s)
    if kind == "Matern 3/2":
        return (1 + math.sqrt(3) * s) * np.exp(-math.sqrt(3) * s)
    if kind == "Matern 5/2":
        return (1 + math.sqrt(5) * s + 5 / 3 * s**2) * np.exp(-math.sqrt(5) * s)
    if kind == "periodic":
        return np.exp(-2 * np.sin(math.pi * r / between(0.08, 0.5)) ** 2 / between(0.3, 3.0))
    if kind == "rational quadratic":
        alpha = between(0.1, 2.0)
        return (1 + s**2 / (2 * alpha)) ** -alpha
    line = 12 * (x - 0.5) * (x.T - 0.5)  # of variance one over the range
    return line if kind == "linear" else np.exp(-0.5 * s**2) + between(0.3, 3.0) * line


def draw(seed: int, index: int) -> Truth:
    """n uniform on 40-150; noise variance log-uniform on 2-50 % of the signal's; units and offset of any size."""
    rng = np.random.default_rng([seed, index])
    kind = KINDS[index % len(KINDS)]
    n = int(rng.integers(40, 151))
    x = rng.uniform(size=(n + N_FRESH, 1))
    k = covariance(kind, x, rng)
    noise = float(np.exp(rng.uniform(math.log(0.02), math.log(0.5)))) * np.diag(k).mean()
    y = rng.multivariate_normal(np.zeros(len(x)), k + noise * np.eye(len(x)), method="eigh")
    unit, offset = np.exp(rng.normal(size=2) * 2), rng.normal()
    return Truth(kind, (x + rng.uniform(-1, 1)) * unit[0], unit[1] * (y + offset), n)


def candidate(kernel: Any, truth: Truth) -> dict[str, float]:
    """Evidences of one kernel, and its log density of the fresh observations at both estimates."""
    x, y = torch.as_tensor(truth.x), torch.as_tensor(truth.y)
    seen, new = (x[: truth.n], y[: truth.n]), (x[truth.n :], y[truth.n :])
    start = time.process_time()
    with pyro.get_param_store().scope():
        model = GaussianProcess(kernel)
        predictor = choose(model, seen)
        store = dict(pyro.get_param_store().named_parameters())
        leaves = {name: store[name] for name in predictor.parameters}
        prior = hyperprior(model, seen, leaves)
        assert prior is not None
        likelihood = log_likelihood(predictor, seen, leaves)
        found = integrate(likelihood, prior)
        seconds = time.process_time() - start
        theta, lml = maximise(likelihood, prior, np.stack([mode.theta for mode in found.modes]))
        fresh = []
        for at in (found.modes[0].theta, theta):
            assign(leaves, torch.as_tensor(at))
            with torch.no_grad():
                guess = predictor.read(seen).predict(new)
                fresh.append(
                    float(torch.distributions.Normal(guess.mean, guess.var.sqrt()).log_prob(new[1]).sum())
                )
    return {
        "integrated": found.log_evidence,
        "laplace": found.laplace,
        "BIC": lml - 0.5 * len(theta) * math.log(truth.n),
        "LML": lml,
        "se": found.se,
        "pareto_k": found.pareto_k,
        "ess": found.ess,
        "n_draws": found.n_draws,
        "fresh_map": fresh[0],
        "fresh_ml": fresh[1],
        "seconds": seconds,
    }


def maximise(likelihood: Any, prior: Prior, extra: np.ndarray) -> tuple[np.ndarray, float]:
    """The maximum of the LML from the three highest modes and the centre of the prior."""

    class Flat(integrated._Joint):
        def __call__(self, phi: np.ndarray, gradient: bool = True) -> Any:
            value, grad = self.log_likelihood(self.prior.loc + self.prior.scale * phi, gradient=gradient)
            return np.where(np.isnan(value), -np.inf, value), self.prior.scale * grad

    flat = Flat(likelihood, prior)
    starts = np.concatenate([np.zeros((1, len(prior.loc))), (extra[:3] - prior.loc) / prior.scale])
    phi, value = integrated._maximize_bfgs(flat, starts)
    best = int(np.argmax(value))
    return prior.loc + prior.scale * phi[best], float(value[best])


def one(task: tuple[int, int]) -> dict[str, Any]:
    torch.set_num_threads(1)
    truth = draw(*task)
    found = {name: candidate(kernel, truth) for name, kernel in kernels().items()}
    if task[1] < N_CHECKED:
        search = MarginalLikelihoodSearch(
            BayesMPT(), {"model": [GaussianProcess(k) for k in kernels().values()]}
        )
        search.fit(truth.x[: truth.n], truth.y[: truth.n])
        for name, lml in zip(KINDS, search.cv_results_["lml"], strict=True):
            assert abs(lml - found[name]["integrated"]) < 0.5, (name, lml, found[name])
    return {"index": task[1], "kind": truth.kind, "n": truth.n, "candidates": found}


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    hit: dict[str, np.ndarray] = {}
    regret: dict[str, np.ndarray] = {}
    for rule in RULES:
        fresh = "fresh_map" if rule in ("integrated", "laplace") else "fresh_ml"
        picks = [max(KINDS, key=lambda k: r["candidates"][k][rule]) for r in rows]
        hit[rule] = np.array([p == r["kind"] for p, r in zip(picks, rows, strict=True)], dtype=float)
        best = [max(max(c["fresh_map"], c["fresh_ml"]) for c in r["candidates"].values()) for r in rows]
        regret[rule] = np.array(
            [b - r["candidates"][p][fresh] for b, p, r in zip(best, picks, rows, strict=True)]
        )
    out: dict[str, Any] = {"n_data_sets": len(rows)}
    for rule in RULES:
        out[rule] = {
            "true_kernel": hit[rule].mean(),
            "regret": regret[rule].mean(),
            "true_kernel_by_kind": {
                k: float(np.mean([h for h, r in zip(hit[rule], rows, strict=True) if r["kind"] == k]))
                for k in KINDS
            },
        }
        if rule != "integrated":
            for what, table in (("true_kernel", hit), ("regret", regret)):
                difference = table["integrated"] - table[rule]
                half = 1.96 * difference.std(ddof=1) / math.sqrt(len(rows))
                out[rule][f"integrated_minus_this_{what}"] = [
                    difference.mean(),
                    difference.mean() - half,
                    difference.mean() + half,
                ]
    cells = [c for r in rows for c in r["candidates"].values()]
    out["seconds_a_candidate"] = {
        "mean": float(np.mean([c["seconds"] for c in cells])),
        "median": float(np.median([c["seconds"] for c in cells])),
    }
    out["share_with_bad_k"] = float(np.mean([c["pareto_k"] > 0.7 for c in cells]))
    out["largest_se"] = max(c["se"] for c in cells)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=504)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    n = 8 if args.quick else args.n
    kept = RESULTS.with_name(f"kernel_ranking-{args.seed}.jsonl")
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    rows = [r for r in rows if r["index"] < n]
    todo = [(args.seed, i) for i in range(n) if i not in {r["index"] for r in rows}]
    with get_context("spawn").Pool(args.jobs) as pool, kept.open("a") as stream:
        for row in pool.imap_unordered(one, todo):
            rows.append(row)
            stream.write(json.dumps(row) + "\n")
            stream.flush()
    found = summarise(rows)
    print(json.dumps(found, indent=1))
    if not args.quick:
        RESULTS.write_text(json.dumps({"seed": args.seed} | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
