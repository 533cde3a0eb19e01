"""Are the evidence with hyper-parameters integrated, and the weights made of it, what they claim to be?

    python benchmarks/accuracy/hyperparameter_calibration.py          # 320 rankings, 40 references: half an hour
    python benchmarks/accuracy/hyperparameter_calibration.py --quick  # 8 and 16

Kernel and hyper-parameters are drawn from the very prior that is integrated over (that of `GaussianProcess.hyperprior`
for inputs on (0, 1) and observations of mean 0 and variance 1), 25 to 60 inputs are uniform, the observations drawn.

1. The evidence of the true kernel against sequential Monte Carlo written here, from the prior through tempered
   likelihoods, in four runs of 1024 particles. Asked: within twice the stated error in at least 90 % of the fits.
2. Posterior weights over all eight kernels. Asked: in every bin of the top kernel's weight the share of data sets in
   which it is the true one lies within the 95 % binomial interval of the mean weight. A plot.

Found: 37 of 40 fits are within twice the error, both errors counted (the reference's is as large as ours: by ours alone
24); the other three are 0.09 nats off. Periodic kernels are included. All five bins are inside: mean weights 0.21,
0.27, 0.36, 0.55, 0.90 and hit rates 0.22, 0.31, 0.36, 0.58, 0.83, the last at the edge of its interval
(hyperparameter_calibration.png).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyro
import torch
from scipy.special import logsumexp
from scipy.stats import binom

from bayes_mpt.diagnostics import replicate_error
from bayes_mpt.evidence.hyperparameters import LogLikelihood, Prior, assign, hyperprior, log_likelihood
from bayes_mpt.evidence.integrated import integrate
from bayes_mpt.models import GaussianProcess
from bayes_mpt.predictors import choose
from bayes_mpt.predictors.gaussian.process import moments

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/
from ranking.kernel_ranking import KINDS, kernels

RESULTS = Path(__file__).with_suffix(".json")
N_PARTICLES = 1024
N_MOVES = 8
CANON = torch.linspace(0, 1, 200, dtype=torch.float64)[:, None]
UNIT = torch.as_tensor([-1.0, 1.0] * 100, dtype=torch.float64) * math.sqrt(
    199 / 200
)  # of mean 0 and variance 1


def opened(name: str, x: torch.Tensor, y: torch.Tensor) -> tuple[Any, Any, Prior]:
    """Inside a store of one's own: predictor, leaves and the one prior of all data sets."""
    model = GaussianProcess(kernels()[name])
    predictor = choose(model, (x, y))
    store = dict(pyro.get_param_store().named_parameters())
    leaves = {n: store[n] for n in predictor.parameters}
    prior = hyperprior(model, (CANON, UNIT), leaves)
    assert prior is not None
    return predictor, leaves, prior


def draw(seed: int, index: int) -> tuple[str, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng([seed, index])
    name, n = KINDS[index % len(KINDS)], int(rng.integers(25, 61))
    x = torch.as_tensor(rng.uniform(size=(n, 1)))
    with pyro.get_param_store().scope(), torch.no_grad():
        predictor, leaves, prior = opened(name, x, torch.as_tensor(rng.normal(size=n)))
        assign(leaves, torch.as_tensor(prior.loc + prior.scale * rng.normal(size=len(prior.loc))))
        loc, cov, _ = moments(predictor.model, (x, torch.zeros(n, dtype=x.dtype)), predictor.structure)
    y = rng.multivariate_normal(loc.detach().numpy(), cov.detach().numpy(), method="eigh")
    return name, x, torch.as_tensor(y)


def tempered(likelihood: LogLikelihood, prior: Prior, rng: np.random.Generator) -> float:
    """Log evidence by sequential Monte Carlo from prior to posterior; its moves are random walks."""
    d = len(prior.loc)
    phi = rng.normal(size=(N_PARTICLES, d))
    of = lambda p: likelihood(prior.loc + prior.scale * p, gradient=False)[0]  # noqa: E731
    value, power, total = of(phi), 0.0, 0.0
    while power < 1:

        def ess(step: float, value: np.ndarray = value) -> float:
            w = np.exp(step * value - logsumexp(step * value))
            return 1 / np.square(w).sum()

        low, high = 0.0, 1 - power
        if ess(high) < 0.6 * N_PARTICLES:
            for _ in range(40):
                middle = (low + high) / 2
                low, high = (middle, high) if ess(middle) >= 0.6 * N_PARTICLES else (low, middle)
        step = high
        total += float(logsumexp(step * value)) - math.log(N_PARTICLES)
        power += step
        w = np.exp(step * value - logsumexp(step * value))
        index = np.searchsorted(np.cumsum(w), (np.arange(N_PARTICLES) + rng.uniform()) / N_PARTICLES)
        phi, value = phi[index.clip(max=N_PARTICLES - 1)], value[index.clip(max=N_PARTICLES - 1)]
        root = np.linalg.cholesky(np.cov(phi.T).reshape(d, d) + 1e-10 * np.eye(d))
        for move in range(N_MOVES):
            scale = (2.4 if move % 2 else 0.4) / math.sqrt(d)
            new = phi + scale * rng.normal(size=phi.shape) @ root.T
            new_value = of(new)
            log_a = power * (new_value - value) - 0.5 * (np.square(new).sum(1) - np.square(phi).sum(1))
            yes = np.log(rng.uniform(size=N_PARTICLES)) < log_a
            phi[yes], value[yes] = new[yes], new_value[yes]
    return total


def evidence(name: str, x: torch.Tensor, y: torch.Tensor, seed: int, reference: bool) -> dict[str, Any]:
    with pyro.get_param_store().scope():
        predictor, leaves, prior = opened(name, x, y)
        likelihood = log_likelihood(predictor, (x, y), leaves)
        found = integrate(likelihood, prior, seed=seed)
        out = {
            "log_evidence": found.log_evidence,
            "se": found.se,
            "pareto_k": found.pareto_k,
            "laplace": found.laplace,
        }
        if reference:
            runs = np.array([tempered(likelihood, prior, np.random.default_rng([seed, r])) for r in range(4)])
            top = runs.max()
            z = np.exp(runs - top)
            reference = top + math.log(z.mean())
            out |= {"reference": float(reference), "reference_se": replicate_error(z / z.mean())}
    return out


def bins(weight: np.ndarray, hit: np.ndarray, n_bins: int = 5) -> list[dict[str, float]]:
    out = []
    for part in np.array_split(np.argsort(weight), n_bins):
        mean, share, n = weight[part].mean(), hit[part].mean(), len(part)
        low, high = binom.ppf([0.025, 0.975], n, mean) / n
        out.append(
            {
                "n": n,
                "weight": mean,
                "hit": share,
                "low": low,
                "high": high,
                "inside": bool(low <= share <= high),
            }
        )
    return out


def plot(references: list[dict[str, Any]], table: list[dict[str, float]]) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    error = [r["log_evidence"] - r["reference"] for r in references]
    bar = [2 * math.hypot(r["se"], r["reference_se"]) for r in references]
    left.errorbar(range(len(error)), error, yerr=bar, fmt="o", ms=4, lw=1)
    left.axhline(0, color="0.5", lw=0.8)
    left.set(
        xlabel="data set",
        ylabel="log evidence minus reference, nats",
        title="evidence, with two standard errors",
    )
    right.plot([0, 1], [0, 1], color="0.5", lw=0.8)
    mean = np.array([b["weight"] for b in table])
    span = np.array([[b["weight"] - b["low"], b["high"] - b["weight"]] for b in table]).T
    right.errorbar(mean, mean, yerr=span, fmt="none", color="0.7", lw=6)
    right.plot(mean, [b["hit"] for b in table], "o")
    right.set(
        xlabel="weight of the top kernel",
        ylabel="share in which it is the true one",
        title="posterior weights",
    )
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=12)
    parser.add_argument("--references", type=int, default=40)
    parser.add_argument("--rankings", type=int, default=320)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    n_references, n_rankings = (8, 16) if args.quick else (args.references, args.rankings)
    torch.set_num_threads(1)
    references = []
    for i in range(n_references):
        name, x, y = draw(args.seed + 1, i)
        references.append({"kind": name, "n": len(y)} | evidence(name, x, y, i, True))
        print(references[-1], flush=True)
    rankings = []
    for i in range(n_rankings):
        name, x, y = draw(args.seed, i)
        log_z = np.array([evidence(k, x, y, i, False)["log_evidence"] for k in KINDS])
        weight = np.exp(log_z - logsumexp(log_z))
        rankings.append({"kind": name, "weights": weight.tolist()})
        if i % 16 == 15:
            print("rankings", i + 1, flush=True)
    top = np.array([max(r["weights"]) for r in rankings])
    hit = np.array([KINDS[int(np.argmax(r["weights"]))] == r["kind"] for r in rankings])
    table = bins(top, hit)
    of_truth = np.mean([math.log(max(r["weights"][KINDS.index(r["kind"])], 1e-300)) for r in rankings])
    print(
        json.dumps(
            {"bins": table, "true_kernel": hit.mean(), "mean_log_weight_of_truth": of_truth}, indent=1
        ),
        flush=True,
    )
    within = [
        abs(r["log_evidence"] - r["reference"]) <= 2 * math.hypot(r["se"], r["reference_se"])
        for r in references
    ]
    found = {
        "seed": args.seed,
        "n_rankings": n_rankings,
        "bins": table,
        "true_kernel": float(hit.mean()),
        "mean_log_weight_of_truth": float(of_truth),
        "n_references": n_references,
        "within_two_errors": float(np.mean(within)),
        "mean_error": float(np.mean([r["log_evidence"] - r["reference"] for r in references])),
        "references": references,
    }
    print(json.dumps({k: v for k, v in found.items() if k != "references"}, indent=1))
    if not args.quick:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        plot(references, table)


if __name__ == "__main__":
    main()
