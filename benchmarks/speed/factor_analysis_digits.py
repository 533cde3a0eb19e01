"""Factor analysis of digits: scikit-learn's FactorAnalysis against BayesMPT.

Data: 1797 x 64 pixels of `load_digits`, each cell plus N(0, 0.5^2) (seed 0) so that no pixel is constant.
Scikit-learn at its default tolerance (tol=1e-2), and at tol=1e-8 with as many iterations as that takes. Its default
SVD, "randomized", is noisier than 1e-8 and stops the iteration early, at a lower likelihood; "lapack" is run as well,
and the one that gets further counts. The likelihood is scikit-learn's `score`, mean nats a row of the training rows;
our parameters are scored by the same code.

Asked: at the default tolerance no slower and a higher likelihood, for K = 5, 10 and 20 latents; at `tol=1e-8` equal
likelihoods and 20 times faster, for K = 20.

Found (``--repeats 1``): at the default tolerance 3.4, 3.0 and 1.75 times as fast for K = 5, 10 and 20. The
likelihood is higher by 0.0044, 0.0027 and 0.143 nats a row (at K = 20 the peer stops after 12 iterations). There a
noise goes to zero, and 10 nats above (0.006 a row) stands a maximum that an earlier search, twice as slow, had found.
At `tol=1e-8` more than 370 times as fast: after 3000 iterations (10 s, against 0.03 s) the peer is still 0.034 nats a
row below.
"""

import sys
import warnings
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.decomposition import FactorAnalysis as SklearnFactorAnalysis
from sklearn.exceptions import ConvergenceWarning

from bayes_mpt import BayesMPT
from bayes_mpt.models import FactorAnalysis

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/, for timing.py
from timing import Report, interleave, run

JITTER, SEED = 0.5, 0


def sklearn_score(ours, x):
    """Our maximum scored by scikit-learn."""
    peer = SklearnFactorAnalysis(ours.n_components_)
    peer.components_, peer.noise_variance_ = ours.components_, ours.noise_variance_
    peer.mean_, peer.n_features_in_ = ours.mean_, x.shape[1]
    return peer.score(x)


def main(report: Report, args):
    x = load_digits().data
    x = x + JITTER * np.random.default_rng(SEED).normal(size=x.shape)
    sizes = (5, 20) if args.quick else (5, 10, 20)
    few = args.repeats or (2 if args.quick else 3)
    max_iter = 300 if args.quick else 3000
    report.note(f"digits {x.shape[0]} x {x.shape[1]}, jitter {JITTER}, seed {SEED}; scores in nats a row")

    def peer(k, **options):
        def call():
            with warnings.catch_warnings():
                if args.quick:
                    warnings.simplefilter("ignore", ConvergenceWarning)
                return SklearnFactorAnalysis(k, random_state=0, **options).fit(x)

        return call

    def compare(case, k, timings, method):
        peer_score, our_score = (timings[n].result.score(x) for n in (method, "ours"))
        ratios = report.compare(
            case,
            timings[method],
            timings["ours"],
            peer_score=round(peer_score, 6),
            our_score=round(sklearn_score(timings["ours"].result, x), 6),
            peer_iter=timings[method].result.n_iter_,
        )
        return float(np.median(ratios)), our_score - peer_score

    for k in sizes:
        ours = lambda k=k: BayesMPT(FactorAnalysis(k)).fit(x)  # noqa: E731
        timings = interleave({"default": peer(k), "ours": ours}, 3 * few)
        ratio, gain = compare(f"K = {k}, default tol", k, timings, "default")
        report.target(
            f"K = {k}, default tolerance: no slower, and a higher likelihood",
            ratio >= 1 and gain > 0,
            f"{ratio:.2f} times as fast, {gain:+.4f} nats a row",
        )
        strict = {
            method: peer(k, tol=1e-8, max_iter=max_iter, svd_method=method)
            for method in ("randomized", "lapack")
        }
        timings = interleave({**strict, "ours": ours}, few, warm_up=False)
        found = {method: compare(f"K = {k}, tol 1e-8, {method}", k, timings, method) for method in strict}
        furthest = max(strict, key=lambda m: -found[m][1])
        ratio, gain = found[furthest]
        text = f"{ratio:.1f} times as fast as its {furthest} SVD, {gain:+.1e} nats a row"
        if timings[furthest].result.n_iter_ == max_iter:
            report.note(f"K = {k}, tol 1e-8: peer cut off at {max_iter} iterations; {text}")
        elif k < 20:
            report.note(f"K = {k}, tol 1e-8: {text}")
        else:
            report.target(
                "K = 20, at equal likelihood (tol 1e-8): at least 20 times faster",
                ratio >= 20 and gain > -1e-9,
                text,
            )


if __name__ == "__main__":
    run(main, __file__, __doc__)
