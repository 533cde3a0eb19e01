"""Is the error of the sampled evidence of factor models reliable? Short runs against long ones, over tables and seeds.

Four groups of tables: complete rows, 5 to 20 % of the cells missing, 20 to 40 %, and surplus columns (more latents than
made the rows). Each table is drawn afresh: D 5 to 30, true K 0 to 5, N 60 to 500, signal 0.2 to 1.5, both kinds
(PPCA; factor analysis with noises of ratio up to e^2); half of that for tables with holes. Runs as a user makes them,
at se 0.1 and at most 1024 particles, are compared with one long run of another seed with more temperatures and longer
trajectories, 32 islands of 64 particles (of 32 with holes), whose own error is added:

    z = (short - long) / (se_short^2 + se_long^2)^1/2

``within`` is the share of |z| <= 2, over all runs of a group, its interval over tables (a table counts once, by its
share). Asked: at least 90 %, z standard deviation at most 1.2, |mean z| at most 0.3 in each group.

Prices are CPU seconds of one thread for one candidate at its true K, start and pilot included.

Every table is kept in ``evidence_calibration.jsonl`` as it is done and not run again, so that a run can be stopped;
groups take turns. ``--report`` makes the table of what is there. Run on fewer: ``--tables 12``.

The stored figures are of tables of stream 17, with the force of the start taken where an image with turned signs stands
and not at the point turned back; that made islands with weak columns differ more.
"""

import json
import math
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from bayes_mpt.evidence import annealing, factor_prior, sample_evidence
from bayes_mpt.program.statistics import SufficientStatistics

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/, for timing.py
from timing import Report, run

TABLES, SEEDS, QUICK = 50, 3, 2
FRESH = 29  # stream of the tables: one that nothing was tuned on
KEPT = Path(__file__).with_suffix(".jsonl")
GROUPS = {  # share missing from, to; surplus columns from, to; largest D and N
    "complete": ((0.0, 0.0), (0, 0), 30, 500),
    "5-20 % missing": ((0.05, 0.2), (0, 0), 15, 250),
    "20-40 % missing": ((0.2, 0.4), (0, 0), 15, 250),
    "surplus columns": ((0.0, 0.0), (1, 2), 30, 500),
}
LONG = {"se": 1e-6, "n_islands": 32}
SLOW = {"CESS": 0.93, "N_LEAPS": 6}  # more temperatures, a longer trajectory at each
ASKED = {"within": 0.9, "sd": 1.2, "mean": 0.3}
PRICES = {"N 200, D 10, K 3": (200, 10, 3, 0.3), "N 500, D 30, K 5": (500, 30, 5, 0.8)}


def table(rng, n, d, k, kind, signal):
    noise = np.ones(d) if kind == "ppca" else np.exp(rng.uniform(-1, 1, d))
    return signal * rng.normal(size=(n, k)) @ rng.normal(size=(k, d)) + np.sqrt(noise) * rng.normal(
        size=(n, d)
    )


def drawn(group, index):
    """Rows, K and shape of one table of a group."""
    (low, high), surplus, largest_d, largest_n = GROUPS[group]
    rng = np.random.default_rng([FRESH, list(GROUPS).index(group), index])
    kind = ("fa", "ppca")[index % 2]
    d = int(rng.integers(5, largest_d + 1))
    n = round(math.exp(rng.uniform(math.log(60), math.log(largest_n))))
    true = int(rng.integers(0 if surplus == (0, 0) else 1, min(5, d // 3) + 1))
    k = true + int(rng.integers(surplus[0], surplus[1] + 1))
    if k == 0:
        k = 1  # none is exact: one column too many instead
    x = table(rng, n, d, true, kind, rng.uniform(0.2, 1.5))
    x[rng.random(x.shape) < rng.uniform(low, high)] = np.nan
    return x[~np.isnan(x).all(1)], k, None if kind == "fa" else np.ones(d)


def evidence(x, k, shape, **how):
    return sample_evidence(SufficientStatistics(x), k, factor_prior(x), shape=shape, **how)


@contextmanager
def slowly():
    """Inside ``with``: an annealing that takes more steps."""
    before = {name: getattr(annealing, name) for name in SLOW}
    for name, value in SLOW.items():
        setattr(annealing, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(annealing, name, value)


def compared(group, index, n_seeds):
    """Short runs of one table and a long one: a line of what is kept."""
    x, k, shape = drawn(group, index)
    with slowly():
        most = 32 * (32 if np.isnan(x).any() else 64)
        long = evidence(x, k, shape, seed=10_000 + index, max_particles=most, **LONG)
    runs = []
    for seed in range(n_seeds):
        start = time.process_time()
        found = evidence(x, k, shape, seed=seed)
        runs.append(
            {
                "z": (found.log_evidence - long.log_evidence) / math.hypot(found.se, long.se),
                "se": found.se,
                "levels": found.n_levels,
                "particles": found.n_particles,
                "islands": found.islands.tolist(),
                "cpu": time.process_time() - start,
            }
        )
    size = {"n": x.shape[0], "d": x.shape[1], "k": k, "kind": "fa" if shape is None else "ppca"}
    return {
        "group": group,
        "index": index,
        **size,
        "long": long.log_evidence,
        "long se": long.se,
        "runs": runs,
    }


def calibrated(report, group, tables):
    """z of every run (tables, seeds), told in sum."""
    runs = [run for table in tables for run in table["runs"]]
    z = np.array([[run["z"] for run in table["runs"]] for table in tables])
    share = (np.abs(z) <= 2).mean(1)  # of a table
    half = 1.96 * share.std(ddof=1) / math.sqrt(len(z)) if len(z) > 1 else math.nan
    of = {name: np.array([run[name] for run in runs]) for name in ("se", "levels", "cpu")}
    report.row(
        group=group,
        tables=len(z),
        runs=z.size,
        within=float(share.mean()),
        **{
            "+-": half,
            "z mean": float(z.mean()),
            "z sd": float(z.std(ddof=1)),
            "max |z|": float(np.abs(z).max()),
        },
        se=float(np.median(of["se"])),
        **{"se > 0.15": float(np.mean(of["se"] > 0.15))},
        **{"long se": float(np.median([table["long se"] for table in tables]))},
        levels=float(np.median(of["levels"])),
        cpu=float(np.median(of["cpu"])),
    )
    return z


def prices(report, n_tables, quick):
    for what, (n, d, k, asked) in PRICES.items():
        seconds, se = [], []
        for index in range(n_tables):
            rng = np.random.default_rng([FRESH, 99, n, index])
            kind = ("fa", "ppca")[index % 2]
            x = table(rng, n, d, k, kind, rng.uniform(0.5, 1.5))
            start = time.process_time()
            found = evidence(x, k, None if kind == "fa" else np.ones(d), seed=index)
            seconds.append(time.process_time() - start)
            se.append(found.se)
        median = float(np.median(seconds))
        report.row(
            price=what, runs=n_tables, median=median, most=float(np.max(seconds)), se=float(np.median(se))
        )
        report.target(
            f"CPU seconds of a candidate, {what}: median under {asked}",
            None if quick else median < asked,
            f"{median:.2f} s at se {np.median(se):.2f}",
        )


def main(report: Report, args):
    n_tables = args.tables or (QUICK if args.quick else TABLES)
    n_seeds = args.seeds or SEEDS
    groups = args.groups or list(GROUPS)
    report.note("errors in nats; z: against a long run, both errors in the denominator")
    kept = args.kept or KEPT.with_stem(KEPT.stem + "_quick" * args.quick)
    lines = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {(line["group"], line["index"]): line for line in lines}
    with kept.open("a") as stream:
        for index in range(0 if args.report else n_tables):
            for group in groups:
                if (group, index) not in done:
                    done[group, index] = compared(group, index, n_seeds)
                    stream.write(json.dumps(done[group, index]) + "\n")
                    stream.flush()
    for group in groups:
        tables = [line for (of, index), line in sorted(done.items()) if of == group and index < n_tables]
        if not tables:
            continue
        z = calibrated(report, group, tables)
        within, sd, mean = float((np.abs(z) <= 2).mean()), float(z.std(ddof=1)), float(z.mean())
        report.target(
            f"{group}: at least 90 % within 2 se, z sd at most 1.2, |mean z| at most 0.3",
            None
            if args.quick
            else within >= ASKED["within"] and sd <= ASKED["sd"] and abs(mean) <= ASKED["mean"],
            f"{within:.1%}, sd {sd:.2f}, mean {mean:+.2f} over {z.size} runs",
        )
    prices(report, 2 if args.quick else 10, args.quick)


def options(parser):
    parser.add_argument("--tables", type=int)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--groups", nargs="*", choices=list(GROUPS))
    parser.add_argument("--kept", type=Path, help="file of the tables that are done")
    parser.add_argument("--report", action="store_true", help="of the tables that are done")


if __name__ == "__main__":
    run(main, __file__, __doc__, options)
