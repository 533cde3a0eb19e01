"""How much a prior of the covariances of a mixture costs where it is not needed, and saves where it is.

Fits of `GaussianMixture` with full covariances, their prior's mean a share of the table's covariance over K^(2/T) (1e-5
is the default, all of it that of Fraley & Raftery 2007) or the plain likelihood; what each loses in nats
against the plain likelihood on N fresh rows, by 4 000 of them. "small": 40 tables with K 1-4, T 2-6, N 60-400, standard
deviations of .3 to 1.5 in random directions, centres normal of standard deviation 3 or 1.2; fitted are the right K and
3 more. "large": three tables of 10 000 rows, five components with thin directions in ten columns. A plain fit that has
no bound is left out of the pairs and counted. Sizes and seeds were fixed before.
"""

import sys
import warnings
from pathlib import Path

import numpy as np

from bayes_mpt import BayesMPT
from bayes_mpt.models import GaussianMixture, mixture_em
from bayes_mpt.training import Ascent

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/, for timing.py
from timing import Report, run

SHARES = [1.0, 1e-2, 1e-3, 1e-4, 1e-5, None]
SEED, N_SMALL, N_LARGE, FRESH, SURPLUS = 23, 40, 3, 4_000, 3


def small(index):
    rng = np.random.default_rng([SEED, index])
    k, t, n = int(rng.integers(1, 5)), int(rng.integers(2, 7)), int(rng.integers(60, 401))
    weights, centre = rng.dirichlet(np.full(k, 5.0)), (3.0 if index % 2 else 1.2) * rng.normal(size=(k, t))
    sizes = np.exp(rng.uniform(np.log(0.3), np.log(1.5), (k, 1, t)))
    return table(rng, weights, centre, np.linalg.qr(rng.normal(size=(k, t, t)))[0] * sizes, n), k


def large(index):
    rng = np.random.default_rng([SEED, 1, index])
    root = rng.normal(size=(5, 10, 10)) / np.sqrt(10)
    return table(rng, np.full(5, 0.2), 3.0 * rng.normal(size=(5, 10)), root, 10_000), 5


def table(rng, weights, centre, root, n):
    """Rows and fresh rows."""
    c = rng.choice(len(weights), n + FRESH, p=weights)
    x = centre[c] + np.einsum("nij,nj->ni", root[c], rng.normal(size=(n + FRESH, centre.shape[1])))
    return x[:n], x[n:]


def loss(x, fresh, k, share):
    """Nats on as many fresh rows as there are rows, but for a constant; NaN without a bound."""
    before, prior = mixture_em.THIN, None if share is None else "auto"
    mixture_em.THIN = before if share is None else share
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit = BayesMPT(
                GaussianMixture(k, covariance_prior=prior), training=Ascent(tol=1e-6), random_state=0
            )
            return -len(x) * fit.fit(x).score(fresh)
    except ValueError:
        return np.nan
    finally:
        mixture_em.THIN = before


def main(report: Report, args):
    few = args.quick
    cases = {
        "small, right K": ([small(i) for i in range(4 if few else N_SMALL)], 0),
        f"small, {SURPLUS} more": ([small(i) for i in range(4 if few else N_SMALL)], SURPLUS),
        "large, right K": ([large(i) for i in range(1 if few else N_LARGE)], 0),
    }
    worst = {}
    for name, (tables, more) in cases.items():
        found = np.array([[loss(x, new, k + more, s) for s in SHARES] for (x, new), k in tables])
        gain = found - found[:, -1:]
        for share, each in zip(SHARES[:-1], gain[:, :-1].T, strict=True):
            told = each[~np.isnan(each)]
            half = 1.96 * told.std(ddof=1) / np.sqrt(len(told)) if len(told) > 1 else np.nan
            worst[name, share] = told.mean()
            report.row(
                case=name, share=share, tables=len(told), mean=told.mean(), half=half, worst=told.max()
            )
        report.note(f"{name}: {int(np.isnan(found[:, -1]).sum())} of {len(found)} plain fits without a bound")
    ours = max(worst["small, right K", 1e-5], worst["large, right K", 1e-5])
    report.target(
        "1e-5: at the right K no more than 3 nats a table off the plain likelihood",
        None if few else ours < 3,
        f"{ours:+.2f} nats at most",
    )


if __name__ == "__main__":
    run(main, __file__, __doc__)
