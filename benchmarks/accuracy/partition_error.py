"""Is the error of held-out scores from one partition right? Against the spread over other partitions of the same rows.

Each table (PPCA rows, N 60 to 250, D 6 to 13, K 1 to 3) is scored held out by two candidates, K and K + 1, in 5 folds
of 12 random partitions. ``ratio`` is the root mean square of the stated errors over the standard deviation of the
totals; ``covered`` is the share of partitions whose interval, +- t(4, 0.975) errors, holds the mean over partitions
(each one's own share in that mean allowed for). Asked: a median ratio of 0.8 to 2 and at least 90 % covered, of a
candidate's own total and of the difference.

Run on more tables: ``python benchmarks/accuracy/partition_error.py --tables 200``.
"""

import sys
from pathlib import Path

import numpy as np
from scipy.stats import multivariate_normal
from scipy.stats import t as student_t
from sklearn.model_selection import KFold

from bayes_mpt.diagnostics import partition_error
from bayes_mpt.predictors.gaussian.profile import proportional
from bayes_mpt.program.statistics import Covariance

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/, for timing.py
from timing import Report, run

TABLES, QUICK, PARTITIONS, FOLDS = 40, 3, 12, 5


def drawn(index):
    """Rows and K."""
    rng = np.random.default_rng([707, index])
    n, d, k = (int(rng.integers(*ends)) for ends in ((60, 251), (6, 14), (1, 4)))
    return rng.normal(size=(n, k)) @ rng.normal(size=(k, d)) * rng.uniform(0.4, 1.2) + rng.normal(
        size=(n, d)
    ), k


def scores(train, test, k):
    """(M,) nats of rows by the maximum of the likelihood of others."""
    fit = proportional(Covariance(np.cov(train.T, bias=True)), k, np.ones(train.shape[1]))
    cov = fit.loading @ fit.loading.T + np.diag(fit.noise)
    return multivariate_normal(train.mean(0), cov).logpdf(test)


def of_table(index):
    """Ratio and share covered of a candidate's own total, and of the difference of two."""
    x, k = drawn(index)
    at_fit = np.array([scores(x, x, q) for q in (k, k + 1)])
    totals, errors = [], []
    for partition in range(PARTITIONS):
        held_out, fold = np.empty_like(at_fit), np.empty(len(x), dtype=int)
        for f, (train, test) in enumerate(KFold(FOLDS, shuffle=True, random_state=partition).split(x)):
            fold[test] = f
            held_out[:, test] = [scores(x[train], x[test], q) for q in (k, k + 1)]
        a, d = (
            np.array([at_fit[0], at_fit[0] - at_fit[1]]),
            np.array([held_out[0], held_out[0] - held_out[1]]),
        )
        totals.append(d.sum(1))
        errors.append([partition_error(*pair, fold) for pair in zip(a, d, strict=True)])
    totals, errors = np.array(totals), np.array(errors)
    ratio = np.sqrt((errors**2).mean(0)) / totals.std(0, ddof=1)
    off = np.abs(totals - totals.mean(0)) * np.sqrt(PARTITIONS / (PARTITIONS - 1))
    return ratio, (off < student_t.ppf(0.975, FOLDS - 1) * errors).mean(0)


def main(report: Report, args):
    n_tables = args.tables or (QUICK if args.quick else TABLES)
    found = [of_table(index) for index in range(n_tables)]
    for i, what in enumerate(("own total", "difference")):
        ratio = np.array([r[i] for r, _ in found])
        covered = float(np.mean([c[i] for _, c in found]))
        low, middle, high = (float(q) for q in np.quantile(ratio, [0.1, 0.5, 0.9]))
        report.row(what=what, tables=n_tables, ratio=middle, **{"10 %": low, "90 %": high}, covered=covered)
        report.target(
            f"{what}: median ratio 0.8 to 2, at least 90 % covered",
            None if args.quick else 0.8 <= middle <= 2 and covered >= 0.9,
            f"{middle:.2f} ({low:.2f} to {high:.2f}), {covered:.1%}",
        )


def options(parser):
    parser.add_argument("--tables", type=int)


if __name__ == "__main__":
    run(main, __file__, __doc__, options)
