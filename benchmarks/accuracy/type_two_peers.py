"""Type-II maximum likelihood on ten real sets, against scikit-learn's with ten restarts and the same bounds.

    python benchmarks/accuracy/type_two_peers.py

Columns and y are standardised and at most 200 rows are taken, evenly spaced. Peer: ``ConstantKernel * RBF +
WhiteKernel``, each hyper-parameter within 1e-5 to 1e5 (1e-10 for the noise), ``n_restarts_optimizer=10``. Ours:
`BayesMPT` with ``n_init=4``, the first start and three restarts, the same bounds on length-scale and variance; whether
the noise ended inside the peer's is reported. Asked: an LML no lower than the peer's by more than 1e-4 nats.

Found: maxima from 3 restarts equal to 2e-10 nats or higher (by up to 5e-8) in all ten.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gpytorch
import numpy as np
import statsmodels.api as sm
import torch
from gpytorch.constraints import Interval
from gpytorch.kernels import RBFKernel, ScaleKernel
from sklearn.datasets import load_diabetes, load_digits, load_linnerud, load_wine
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

from bayes_mpt import BayesMPT
from bayes_mpt.models import GaussianProcess

RESULTS = Path(__file__).with_suffix(".json")
LOW, HIGH, MIN_NOISE = 1e-5, 1e5, 1e-10
MAX_ROWS = 200


def series(y: Any) -> tuple[np.ndarray, np.ndarray]:
    y = np.asarray(y, dtype=float)
    keep = ~np.isnan(y)
    return np.arange(len(y), dtype=float)[keep, None], y[keep]


def sets() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    wine, digits, linnerud = load_wine().data, load_digits(), load_linnerud()
    longley, stackloss = sm.datasets.longley.load_pandas(), sm.datasets.stackloss.load_pandas()
    return {
        "diabetes": load_diabetes(return_X_y=True),
        "wine: alcohol": (wine[:, 1:], wine[:, 0]),
        "linnerud": (linnerud.data, linnerud.target[:, 1]),
        "digits: rows to digit": (digits.images.sum(2), digits.target.astype(float)),
        "co2": series(sm.datasets.co2.load_pandas().data["co2"]),
        "nile": series(sm.datasets.nile.load_pandas().data["volume"]),
        "sunspots": series(sm.datasets.sunspots.load_pandas().data["SUNACTIVITY"]),
        "elnino": series(sm.datasets.elnino.load_pandas().data.iloc[:, 1:].mean(axis=1)),
        "longley": (longley.exog.to_numpy(float), longley.endog.to_numpy(float)),
        "stackloss": (stackloss.exog.to_numpy(float), stackloss.endog.to_numpy(float)),
    }


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for name, (x, y) in sets().items():
        index = np.linspace(0, len(y) - 1, min(len(y), MAX_ROWS)).round().astype(int)
        x, y = x[index], y[index]
        x = x[:, x.std(0) > 0]
        x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
        p = x.shape[1] if x.shape[1] <= 6 else 1  # a length-scale for each of few columns
        kernel = ConstantKernel(1.0, (LOW, HIGH)) * RBF(
            np.ones(p) if p > 1 else 1.0, (LOW, HIGH)
        ) + WhiteKernel(0.1, (MIN_NOISE, HIGH))
        start = time.process_time()
        peer = GaussianProcessRegressor(kernel, alpha=0.0, n_restarts_optimizer=10, random_state=0).fit(x, y)
        theirs, their_time = peer.log_marginal_likelihood_value_, time.process_time() - start
        rbf = RBFKernel(ard_num_dims=p if p > 1 else None, lengthscale_constraint=Interval(LOW, HIGH))
        ours = GaussianProcess(
            ScaleKernel(rbf, outputscale_constraint=Interval(LOW, HIGH)), mean=gpytorch.means.ZeroMean()
        )
        start = time.process_time()
        fit = BayesMPT(ours, n_init=4, random_state=0).fit(x, y)
        our_time = time.process_time() - start
        inside = fit.params_["noise"].min() >= MIN_NOISE * (1 - 1e-6)
        rows.append(
            {
                "set": name,
                "n": len(y),
                "p": x.shape[1],
                "ours": fit.log_marginal_likelihood_,
                "theirs": theirs,
                "difference": fit.log_marginal_likelihood_ - theirs,
                "noise_inside": bool(inside),
                "seconds": our_time,
                "their_seconds": their_time,
            }
        )
        print({k: round(v, 5) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    worst = min(r["difference"] for r in rows)
    print(
        f"worst difference {worst:.2e}; no lower than the peer in {sum(r['difference'] > -1e-4 for r in rows)} of 10"
    )
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    main()
