"""Couplings of a Potts model learnt from its samples: factored attention and full pseudo-likelihood.

Teacher and student: L = 12 sites, C = 4 levels, W_iajb = J_ij U_ab with J ~ N(0, 1/L) and U normal with zero sums,
both symmetric; M independent Gibbs chains of 150 sweeps. One head of `FactoredAttention` without softmax, the best of
six starts, and the full `Potts` are trained on one hidden site (`LeaveOneOut`: the pseudo-likelihood) by L-BFGS. Asked:
the squared relative error of the couplings, |W - W_true|^2 / |W_true|^2 in the zero-sum gauge, falls as 1/M (slope
-1 +- 0.1 from M = 500), about ten times below that of the full model. On a teacher that is a sum of two such products
one head must fail and two succeed. Gap: cross-entropy of one hidden site above that of the teacher, on 8000 fresh
rows, nats a site.

Found: the slopes of `FactoredAttention` are -1.03, -0.92 and -0.93 for M = 500 to 16 000 with three teachers; those of
the full model -1.04, -1.06 and -1.11. The last falls short, few rows of the first teacher being too few for it. The
errors are 12.6, 14.1 and 9.9 times smaller than the full model's (0.0013 against 0.016 at M = 16 000, first teacher).
Two products: the errors of one head are 0.30, 0.46 and 0.44, those of two at most 0.0095.
"""

import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

from bayes_mpt import BayesMPT
from bayes_mpt.masks import LeaveOneOut
from bayes_mpt.models import Couplings, FactoredAttention, Potts
from bayes_mpt.predictors import SelfPredictive

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/, for timing.py
from timing import Report, run

L, C, FRESH, SWEEPS, STARTS = 12, 4, 8000, 150, 6
SIZES = (500, 1000, 2000, 4000, 8000, 16000)


def product(generator):
    """J_ij U_ab."""
    j = torch.randn(L, L, generator=generator, dtype=torch.float64).triu(1) / L**0.5
    u = torch.randn(C, C, generator=generator, dtype=torch.float64)
    u = (u + u.T) / 2**0.5
    u = u - u.mean(0) - u.mean(1, keepdim=True) + u.mean()
    return (j + j.T)[:, None, :, None] * u[:, None, :]


def teacher(seed, n_products):
    """The sum of ``n_products`` of them; with two each is scaled so that the sum is as strong as one."""
    generator = torch.Generator().manual_seed(seed)
    w = sum(product(generator) for _ in range(n_products)) / n_products**0.5
    return Couplings(torch.zeros(L, C, dtype=torch.float64), w)


def rows(truth, n, seed):
    return truth.sample(n, 1, n_warmup=SWEEPS, random_state=seed).x[:, 0].astype(float)


def cross_entropy(couplings, x):
    """Of one hidden site given all others, nats a site."""
    codes = torch.as_tensor(x).long()
    return -float(couplings.conditionals(codes).gather(2, codes[..., None]).mean())


def fit(model, x, n_init=1, penalty=False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # with few rows, levels never seen together
        est = BayesMPT(
            model,
            masks=LeaveOneOut(),
            n_init=n_init,
            penalty=penalty,
            predictor=SelfPredictive(n_orders=1),
            random_state=0,
        )
        return est.fit(x)


def errors(couplings, truth, x):
    w, true = couplings.coupling, truth.zero_sum().coupling
    return {
        "error": float((w - true).square().sum() / true.square().sum()),
        "gap": cross_entropy(couplings, x) - cross_entropy(truth, x),
    }


def slope(sizes, values):
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def main(report: Report, args):
    sizes = SIZES[:3] if args.quick else SIZES
    seeds = range(1, 2 if args.quick else 4)
    report.note(
        f"L = {L}, C = {C}, M = {sizes[0]} .. {sizes[-1]}, teachers {list(seeds)}, {FRESH} fresh rows"
    )
    students = {
        "factored attention": (FactoredAttention(softmax=False, field=False), False),
        # a prior so wide that it only holds what few rows leave undetermined
        "full Potts": (Potts(field=False, max_states=64, prior_sd=30.0), True),
    }
    found = {}
    for seed in seeds:
        truth = teacher(seed, 1)
        x, fresh = rows(truth, max(sizes), 100 + seed), rows(truth, FRESH, 200 + seed)
        for name, (model, penalty) in students.items():
            start = time.process_time()
            by_size = []
            for n in sizes:
                est = fit(model, x[:n], n_init=1 if penalty else STARTS, penalty=penalty)
                by_size.append(errors(model.couplings(est.params_), truth, fresh))
                report.row(case=f"{name}, teacher {seed}", M=n, **by_size[-1])
            found[name, seed] = [row["error"] for row in by_size]
            cpu = time.process_time() - start
            report.row(case=f"{name}, teacher {seed}", slope=slope(sizes, found[name, seed]), cpu_seconds=cpu)
    slopes = [slope(sizes, v) for v in found.values()]
    told = None if args.quick else all(abs(v + 1) <= 0.1 for v in slopes)
    report.target("slopes -1 +- 0.1", told, ", ".join(f"{v:.3f}" for v in slopes))
    one, full = (np.array([found[name, seed] for seed in seeds]) for name in students)
    ratios = np.median(full / one, axis=1)
    report.target(
        "error of full Potts / factored attention about ten",
        None if args.quick else bool((ratios > 7).all()),
        ", ".join(f"{v:.1f}" for v in ratios) + " (median over M, by teacher)",
    )
    n, worst, best = sizes[-1], 0.0, np.inf
    for seed in seeds:
        truth = teacher(seed, 2)
        x, fresh = rows(truth, n, 300 + seed), rows(truth, FRESH, 400 + seed)
        for n_heads in (1, 2):
            model = FactoredAttention(n_heads, softmax=False, field=False)
            row = errors(model.couplings(fit(model, x, n_init=STARTS).params_), truth, fresh)
            report.row(case=f"two products, teacher {seed}, heads: {n_heads}", M=n, **row)
            best = min(best, row["error"]) if n_heads == 1 else best
            worst = max(worst, row["error"]) if n_heads == 2 else worst
    report.target(
        "two products: one head fails, two succeed",
        None if args.quick else worst < 0.05 < best,
        f"error of one head at least {best:.3f}, of two at most {worst:.4f}",
    )


if __name__ == "__main__":
    run(main, __file__, __doc__)
