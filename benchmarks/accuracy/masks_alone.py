"""Training on random masks alone, from a random start, against the closed form of PPCA.

`BayesMPT(PPCA(k), masks=UniformSize(n))` never sees the exact score: each step of Adam draws n masks of all sizes. How
far from the closed-form maximum of Tipping & Bishop (1999) it ends, nats a row, on raw columns (scales differ up to
1e5-fold) and standardised ones.

Asked: within 0.01 nats a row, on four tables of scikit-learn, raw and standardised.

Found, with other jobs on both cores (the last row in a run of its own): within 9e-5 and 7e-5 on iris (raw,
standardised), 2.5e-3 and 1.3e-4 on wine, 4.9e-3 and 1.1e-3 on breast cancer, 8.9e-4 and 7.5e-4 on digits, in 12 to 78
seconds of CPU time each and 294 in all.
"""

import sys
import time
import warnings
from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning

from bayes_mpt import BayesMPT
from bayes_mpt.masks import UniformSize
from bayes_mpt.models import PPCA
from bayes_mpt.training import Steps

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/, for timing.py
from timing import Report, run

CASES = {
    "iris": (load_iris, 2, 16),
    "wine": (load_wine, 3, 32),
    "breast cancer": (load_breast_cancer, 5, 32),
    "digits": (load_digits, 10, 32),
}


def main(report: Report, args):
    for name, (load, k, n_masks) in list(CASES.items())[: 1 if args.quick else None]:
        raw = load().data
        sd = raw.std(0)
        for scaled, x in (("raw", raw), ("standardised", (raw / np.where(sd > 0, sd, 1))[:, sd > 0])):
            start = time.process_time()
            model = BayesMPT(
                PPCA(k), masks=UniformSize(n_masks), training=Steps(max_iter=6000), random_state=1991
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(x)
            seconds = time.process_time() - start
            gap = optimum(x, k) - model.score(x)
            report.row(case=f"{name}, {scaled}", seconds=round(seconds, 1), gap=f"{gap:.2e}")
            report.target(f"{name}, {scaled}: within 0.01 nats a row", -1e-9 < gap < 0.01, f"{gap:.2e}")


def optimum(x, k):
    """Tipping & Bishop (1999), eq. 8, mean nats a row."""
    value = PCA(svd_solver="full").fit(x).explained_variance_ * (len(x) - 1) / len(x)
    value = np.pad(value, (0, x.shape[1] - len(value)))
    t, noise = x.shape[1], value[k:].mean()
    return -0.5 * (t * np.log(2 * np.pi) + np.log(value[:k]).sum() + (t - k) * np.log(noise) + t)


if __name__ == "__main__":
    run(main, __file__, __doc__)
