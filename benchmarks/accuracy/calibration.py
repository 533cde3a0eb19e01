"""Is the reported standard error reliable? Estimates of known log marginal likelihoods, over many seeds.

Data and parameters are fixed; only the seed of the estimate differs. Six kinds of estimate, two models of each:

coin        40 tosses, 26 heads: p ~ Beta(1, 1), and Beta(20, 20). Sequential Monte Carlo, 64 particles, 8 runs; truth
            in closed form.
regression  20 rows simulated with two of three covariates: `BayesianRegression` on these two, and on all. Sequential
            Monte Carlo, 64 particles, 8 runs; truth in closed form.
two modes   20 rows, 0.6 Normal(m1, 1) + 0.4 Normal(m2, 1), m ~ Normal(0, sd 3), and sd 6: both orders of the centres
            fit. Sequential Monte Carlo, 64 particles, 8 runs; truth on a grid.
counts      100 rows, 5 Poisson tokens of rate exp(a + b z), z ~ Normal(0, 1): the b that made the rows, and 0.8 b.
            Importance sampling without a guide, 30 draws; truth by quadrature, 128 nodes (64 agree to 1e-8).
items       100 rows, 8 Bernoulli tokens of logits a + b z, z ~ Normal(0, 1): the b that made the rows, and 0.8 b.
            Importance sampling, 30 draws from a guide: Normal, its mean linear in the row, its standard deviation the
            same for all rows, so that it is a little off everywhere. Truth as above.
masks       100 rows, 10 tokens: PPCA(2) and PPCA(1), fitted. Masked score, UniformSize(20), 8 replicates of masks;
            truth: the exact joint.

Coverage is the share of seeds in which the truth lies within 2 reported standard errors (``mc_dse`` for differences of
a pair). An estimate of the first model is paired with one of the second from another seed; masks are those of the same
seed, as in a search. Rows "same seed" pair draws of one seed too, as a search with an integer random_state does: no
target, since such errors partly cancel, which mc_dse leaves out. ``z bias`` and ``z sd`` are mean and standard
deviation of error / se, ``bias`` and ``sd`` those of the error, ``se`` the root mean square of what was reported.

Rankings: the second model's estimates are shifted so that the true difference takes, over the seeds of a pair, values
spread evenly over +- 4 of the pair's median mc_dse, in random order, each seed used once. In bins of ``p_worse`` the
share of pairs put in the wrong order is held against the mean of p_worse. Table and errors are the package's own
(`bayes_mpt.estimators.comparison.comparison_table`). Intervals are Clopper-Pearson's, 95 %.

Asked, on 12 models and 6 pairs, 200 to 400 seeds: the truth within +-2 standard errors in 90 to 99 % of seeds, and
rankings wrong as often as ``p_worse`` says.

Found: in 94.5 to 96.0 % of seeds (pairs 94.0 to 95.5 %), and all five bins inside (calibration.png).
"""

import math
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.special import betaln
from scipy.stats import binomtest

from bayes_mpt import BayesMPT
from bayes_mpt.estimators.candidates import Candidate
from bayes_mpt.estimators.comparison import comparison_table
from bayes_mpt.masks import UniformSize
from bayes_mpt.models import PPCA, BayesianRegression
from bayes_mpt.predictors import Importance, Quadrature, SequentialMonteCarlo
from bayes_mpt.program.store import OwnStore
from bayes_mpt.score import estimate

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/, for timing.py
from timing import Report, run

SEEDS, QUICK = 400, 12
SLOW = 0.5  # share of them for sequential Monte Carlo
SPREAD = 4.0  # true differences, in mc_dse
BINS = (0.0, 0.01, 0.05, 0.15, 0.3, 0.5)
BAND = (0.90, 0.99)
NORMAL = 0.9545  # of a normal error lies within 2 of its sd


class Found(NamedTuple):
    """One estimate."""

    value: float
    se: float
    replicates: np.ndarray | None = None
    """Totals by draw of the masks."""


class Case(NamedTuple):
    """A model whose log marginal likelihood is known."""

    kind: str
    name: str
    truth: float
    find: Callable[[int], Found]
    """The estimate from a seed."""


# --------------------------------------------------------------------------------------------------- the twelve models


def sampled(kind, name, truth, predictor, args):
    """A predictor that draws, bound once, read afresh for every seed."""

    def find(seed):
        torch.manual_seed(seed)
        read = predictor.read(args)
        found = read.evidence()
        return Found(float(found.by_row.sum()), found.se)

    return Case(kind, name, truth, find)


def coins():
    heads, n = 26, 40
    x = torch.tensor([1.0] * heads + [0.0] * (n - heads), dtype=torch.float64)
    for a in (1.0, 20.0):

        def coin(x, a=a):
            p = pyro.sample("p", dist.Beta(x.new_tensor(a), x.new_tensor(a)))
            with pyro.plate("rows", len(x)):
                pyro.sample("x", dist.Bernoulli(p), obs=x)

        truth = float(betaln(heads + a, n - heads + a) - betaln(a, a))
        predictor = SequentialMonteCarlo(num_particles=64, num_runs=8).bind(coin, (x,))
        yield sampled("coin", f"Beta({a:.0f}, {a:.0f})", truth, predictor, (x,))


def regressions():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 3))
    y = x[:, 0] - 0.5 * x[:, 1] + 0.7 * rng.normal(size=20)
    for k in (2, 3):
        model, args = BayesianRegression(), (torch.as_tensor(x[:, :k]), torch.as_tensor(y))
        predictor = SequentialMonteCarlo(num_particles=64, num_runs=8).bind(model, args)
        yield sampled("regression", f"{k} covariates", model.log_evidence(x[:, :k], y), predictor, args)


def two_modes():
    rng = np.random.default_rng(4)
    x = torch.as_tensor(rng.normal(size=20) + np.where(rng.uniform(size=20) < 0.6, 1.5, -1.5))
    share = torch.tensor([0.6, 0.4], dtype=torch.float64)
    for sd in (3.0, 6.0):

        def mixture(x, sd=sd):
            centres = pyro.sample("centres", dist.Normal(x.new_zeros(2), sd).to_event(1))
            with pyro.plate("rows", len(x)):
                parts = dist.Normal(centres, 1.0)
                pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(share), parts), obs=x)

        grid = torch.linspace(-8, 8, 801, dtype=torch.float64)
        one = -0.5 * (x[:, None] - grid).square() - 0.5 * math.log(2 * math.pi)  # (N, G)
        log_p = torch.logaddexp(share[0].log() + one[:, :, None], share[1].log() + one[:, None]).sum(0) + sum(
            dist.Normal(0.0, sd).log_prob(g) for g in (grid[:, None], grid)
        )
        truth = float(log_p.flatten().logsumexp(0) + 2 * (grid[1] - grid[0]).log())
        predictor = SequentialMonteCarlo(num_particles=64, num_runs=8).bind(mixture, (x,))
        yield sampled("two modes", f"prior sd {sd:.0f}", truth, predictor, (x,))


def factor_model(likelihood, a, b):
    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", likelihood(a + b * z[..., None]).to_event(1), obs=x)

    return model


def by_quadrature(model, x):
    few, many = (float(Quadrature(n_nodes=n).bind(model, (x,)).read((x,)).score().sum()) for n in (64, 128))
    assert abs(few - many) < 1e-8, (few, many)
    return many


def poisson(log_rate):
    return dist.Poisson(log_rate.exp())


def bernoulli(logits):
    return dist.Bernoulli(logits=logits)


def counts():
    rng = np.random.default_rng(1)
    a, b = torch.linspace(-0.5, 1.5, 5, dtype=torch.float64), torch.as_tensor(rng.uniform(0.3, 1.0, 5))
    z = rng.normal(size=(100, 1))
    x = torch.as_tensor(rng.poisson(np.exp(a.numpy() + b.numpy() * z)), dtype=torch.float64)
    for share in (1.0, 0.8):
        model = factor_model(poisson, a, share * b)
        predictor = Importance(num_particles=30).bind(model, (x,))
        yield sampled("counts", f"loading x {share}", by_quadrature(model, x), predictor, (x,))


def items():
    rng = np.random.default_rng(2)
    a, b = torch.linspace(-1.0, 1.0, 8, dtype=torch.float64), torch.as_tensor(rng.uniform(0.7, 1.8, 8))
    z = rng.normal(size=(100, 1))
    p = 1 / (1 + np.exp(-(a.numpy() + b.numpy() * z)))
    x = torch.as_tensor(rng.uniform(size=p.shape) < p, dtype=torch.float64)
    for share in (1.0, 0.8):
        model = factor_model(bernoulli, a, share * b)
        # posterior moments on a grid, and the line through the means
        grid = torch.linspace(-8, 8, 801, dtype=torch.float64)
        logits = a + share * b * grid[:, None]
        log_p = x @ logits.T - torch.nn.functional.softplus(logits).sum(1) - grid.square() / 2
        weight = log_p.softmax(1)
        mean = weight @ grid
        sd = float((weight @ grid.square() - mean.square()).mean().sqrt())
        design = torch.cat([x, x.new_ones(len(x), 1)], 1)
        line = torch.linalg.lstsq(design, mean[:, None]).solution[:, 0]

        def guide(x, line=line, sd=sd):
            with pyro.plate("rows", len(x)):
                pyro.sample("z", dist.Normal(x @ line[:-1] + line[-1], sd))

        predictor = Importance(num_particles=30).bind(model, (x,), guide)
        yield sampled("items", f"loading x {share}", by_quadrature(model, x), predictor, (x,))


def masked():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(100, 2)) @ rng.normal(size=(2, 10)) + rng.normal(size=(100, 10))
    rows = torch.as_tensor(x)
    for k in (2, 1):
        predictor = BayesMPT(PPCA(k)).fit(x).predictor_

        def find(seed, predictor=predictor):
            found = estimate(predictor.read((rows,)), UniformSize(20), n_replicates=8, random_state=seed)
            return Found(found.total, found.se, found.diagnostics["totals"])

        with torch.no_grad():
            truth = float(predictor.read((rows,)).score().sum())
        yield Case("masks", f"PPCA({k})", truth, find)


# ------------------------------------------------------------------------------------------------------- calibration


def candidate(found, shift=0.0):
    """What the package's comparison takes; ``shift`` moves estimate and truth together."""
    totals = np.array([found.value]) if found.replicates is None else found.replicates
    return Candidate(evidence=found.value + shift, replicates=totals + shift, se=found.se)


def compared(a, b, shift=0.0):
    """(difference first - second, mc_dse, p_worse) by the package's table."""
    rule = "train" if a.replicates is None else "cumulative"  # the latter: errors from paired replicates
    table = comparison_table(["first", "second"], [candidate(a), candidate(b, shift)], rule)
    worse = table.iloc[1]
    sign = -1.0 if worse.name == "first" else 1.0
    return -sign * worse["lml_diff"], worse["mc_dse"], worse["p_worse"]


def interval(count, n):
    ci = binomtest(int(count), int(n)).proportion_ci()
    return ci.low, ci.high


def percent(count, n):
    low, high = interval(count, n)
    return f"{count / n:.1%} ({low:.1%} to {high:.1%})"


def covered(report, what, role, error, se):
    """Add a row; the share of seeds with the truth inside."""
    z = error / se
    n, count = len(z), int((np.abs(z) <= 2).sum())
    report.row(
        estimate=what,
        seeds=n,
        within_2=percent(count, n),
        below=int((z < -2).sum()),
        above=int((z > 2).sum()),
        bias=float(error.mean()),
        **{"bias's se": float(error.std(ddof=1) / math.sqrt(n))},
        sd=float(error.std(ddof=1)),
        se=float(np.sqrt(np.mean(se**2))),
        **{"z bias": float(z.mean()), "z sd": float(z.std(ddof=1))},
    )
    return {"what": what, "role": role, "share": count / n, "interval": interval(count, n)}


def main(report: Report, args):
    seeds = args.seeds or (QUICK if args.quick else SEEDS)
    report.note("errors in nats; shares with their 95 % intervals; se: root mean square of what was reported")
    rng = np.random.default_rng(0)
    shares, rankings = [], []
    with OwnStore():
        for kind, (make, paired, share) in KINDS.items():
            n = math.ceil(share * seeds)
            pair = tuple(make())
            found = [[case.find(seed) for seed in range(n)] for case in pair]
            for case, mine in zip(pair, found, strict=True):
                error = np.array([f.value for f in mine]) - case.truth
                se = np.array([f.se for f in mine])
                shares.append(covered(report, f"{kind}: {case.name}", "model", error, se))
            first, same = found
            second = same if paired else same[-1:] + same[:-1]
            truth = pair[0].truth - pair[1].truth
            diff, mc_dse, _ = np.array([compared(*both) for both in zip(first, second, strict=True)]).T
            shares.append(covered(report, f"{kind}: difference", "pair", diff - truth, mc_dse))
            level = SPREAD * float(np.median(mc_dse))
            if not paired:
                diff, mc_dse, _ = np.array([compared(*both) for both in zip(first, same, strict=True)]).T
                shares.append(covered(report, f"{kind}: same seed", "same", diff - truth, mc_dse))
            wanted = rng.permutation(np.linspace(-level, level, n))
            for a, b, true in zip(first, second, wanted, strict=True):
                got, _, p_worse = compared(a, b, shift=truth - true)
                rankings.append((p_worse, got * true < 0))
    bins = ranked(report, np.array(rankings))
    verdicts(report, shares, bins, args.quick)
    if not args.quick:
        draw(shares, bins)


def ranked(report, rankings):
    """Wrong orders by bin of p_worse."""
    p_worse, wrong = rankings.T
    bins = []
    for low, high in pairwise(BINS):
        here = (p_worse >= low) & ((p_worse < high) | (high == BINS[-1]))
        if not here.any():
            continue
        n, count = int(here.sum()), int(wrong[here].sum())
        mean, ci = float(p_worse[here].mean()), interval(count, n)
        report.row(
            p_worse=f"{low:g} to {high:g}",
            rankings=n,
            wrong=count,
            share_wrong=percent(count, n),
            mean_p_worse=mean,
            inside=bool(ci[0] <= mean <= ci[1]),
        )
        bins.append({"mean": mean, "share": count / n, "interval": ci, "n": n, "wrong": count})
    return bins


def verdicts(report, shares, bins, quick):
    for what, group in (
        (
            "the truth of six kinds of model, two of each",
            [s for s in shares if s["role"] == "model"],
        ),
        ("the true difference of six pairs", [s for s in shares if s["role"] == "pair"]),
    ):
        inside = [BAND[0] <= s["share"] <= BAND[1] for s in group]
        least, most = (f(group, key=lambda s: s["share"]) for f in (min, max))
        report.target(
            f"+- 2 reported standard errors cover {what} in {BAND[0]:.0%} to {BAND[1]:.0%} of seeds",
            None if quick else all(inside),
            f"{sum(inside)} of {len(group)}; from {least['share']:.1%} ({least['what']}) to {most['share']:.1%} "
            f"({most['what']})",
        )
    inside = [b["interval"][0] <= b["mean"] <= b["interval"][1] for b in bins]
    report.target(
        "the rate of wrong rankings in each bin of p_worse: p_worse within the 95 % interval",
        None if quick else all(inside),
        f"{sum(inside)} of {len(bins)}; "
        + ", ".join(f"{b['share']:.3f} for {b['mean']:.3f}" for b in bins)
        + f"; {sum(b['n'] for b in bins)} rankings",
    )


def draw(shares, bins):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 6), layout="constrained", width_ratios=(1.35, 1))
    left.axvspan(*(100 * b for b in BAND), color="0.9", label="asked for: 90 to 99 %")
    left.axvline(100 * NORMAL, color="0.5", linewidth=1, linestyle=":", label="a normal error: 95.4 %")
    styles = {
        "model": ("o", "C0", "C0", "one model"),
        "pair": ("D", "C1", "C1", "difference of the pair"),
        "same": ("D", "C1", "white", "the same, both with one seed (no target)"),
    }
    for i, s in enumerate(shares):
        marker, color, face, _ = styles[s["role"]]
        bar = 100 * np.abs(np.array(s["interval"])[:, None] - s["share"])
        style = {"fmt": marker, "color": color, "mfc": face, "markersize": 5, "capsize": 2}
        left.errorbar(100 * s["share"], i, xerr=bar, **style)
    for marker, color, face, label in styles.values():
        left.plot([], [], marker, color=color, mfc=face, label=label)
    left.set_yticks(range(len(shares)), [s["what"] for s in shares], fontsize=8)
    left.invert_yaxis()
    left.set(xlabel="% of seeds with the truth within 2 reported standard errors", xlim=(85, 100.3))
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside lower left", ncols=3)
    left.grid(axis="x", alpha=0.3)

    x, y = np.array([b["mean"] for b in bins]), np.array([b["share"] for b in bins])
    bar = np.abs(np.array([b["interval"] for b in bins]).T - y)
    right.plot((0, 0.5), (0, 0.5), color="0.5", linewidth=1, label="calibrated")
    right.errorbar(x, y, bar, fmt="o", capsize=2, label="six pairs together, 95 % intervals")
    for b in bins:
        right.annotate(f" {b['n']}", (b["mean"], b["share"]), fontsize=7, va="top", color="0.4")
    right.set(xlabel="mean p_worse in the bin", ylabel="share of wrong rankings")
    right.legend(fontsize=8, loc="upper left")
    right.grid(alpha=0.3)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)
    plt.close(figure)


KINDS = {  # models, whether draws are shared, share of the seeds
    "coin": (coins, False, SLOW),
    "regression": (regressions, False, SLOW),
    "two modes": (two_modes, False, SLOW),
    "counts": (counts, False, 1.0),
    "items": (items, False, 1.0),
    "masks": (masked, True, 1.0),
}

if __name__ == "__main__":
    run(main, __file__, __doc__, lambda parser: parser.add_argument("--seeds", type=int))
