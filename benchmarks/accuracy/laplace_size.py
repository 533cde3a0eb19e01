"""How far Laplace's evidence is from the sampled one, for candidates of one table against the true dimension.

    python benchmarks/accuracy/laplace_size.py                # 60 tables, about 6 minutes on one core
    python benchmarks/accuracy/laplace_size.py --tables 4

Tables of PPCA and factor analysis (60 to 300 rows, 5 to 12 columns, 1 to 3 latents), half of them with 15 % of the
cells missing. For K = 0 .. the true one plus two, the difference of the log evidence to that of the true dimension, by
Laplace's approximation minus by `bayes_mpt.evidence.sample_evidence` (error sampled for: .05 nats): what the fast
screen adds to or takes from a candidate. The two have priors of their own, so that this is not its error alone.

Asked: the measured table in docs/evidence.md, in place of one sentence.

Found: see the JSON beside this file, and docs/evidence.md.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from bayes_mpt import BayesMPT
from bayes_mpt.models import PPCA, FactorAnalysis

RESULTS = Path(__file__).with_suffix(".json")


def table(seed: int) -> tuple[np.ndarray, str, int]:
    """Rows, kind and dimension."""
    rng = np.random.default_rng([20261129, seed])
    n, t, k = int(rng.integers(60, 301)), int(rng.integers(5, 13)), int(rng.integers(1, 4))
    kind = ("ppca", "fa")[seed % 2]
    sd = np.ones(t) if kind == "ppca" else np.exp(rng.uniform(-0.7, 0.7, t))
    x = rng.normal(size=(n, k)) @ (rng.normal(size=(k, t)) * rng.uniform(0.5, 1.5)) + sd * rng.normal(
        size=(n, t)
    )
    if seed % 4 > 1:
        x[rng.random(x.shape) < 0.15] = np.nan
    return x, kind, k


def differences(seed: int) -> list[dict[str, Any]]:
    """Of each candidate of a table."""
    x, kind, true = table(seed)
    found: dict[int, tuple[float, float, float]] = {}
    for k in range(min(true + 3, x.shape[1] // 2 + 1)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = BayesMPT((PPCA if kind == "ppca" else FactorAnalysis)(k), random_state=0).fit(x)
                sampled: Any = model.integrated(x, se=0.05)
                found[k] = model.laplace(x).log_evidence, sampled.log_evidence, sampled.se
        except ValueError:  # too many latents for these rows
            continue
    if true not in found:
        return []
    at = found[true]
    return [
        {
            "kind": kind,
            "missing": bool(np.isnan(x).any()),
            "surplus": k - true,
            "difference": (laplace - at[0]) - (value - at[1]),
            "se": float(np.hypot(se, at[2])),
        }
        for k, (laplace, value, se) in found.items()
        if k != true
    ]


def summarised(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """5 %, 50 % and 95 % quantiles by kind, holes and surplus."""
    lines = []
    for missing in (False, True):
        for kind in ("ppca", "fa"):
            for name, low, high in (("fewer", -9, -1), ("one more", 1, 1), ("two more", 2, 2)):
                some = [
                    r["difference"]
                    for r in rows
                    if r["missing"] == missing and r["kind"] == kind and low <= r["surplus"] <= high
                ]
                if some:
                    q = np.quantile(some, [0.05, 0.5, 0.95]).round(2).tolist()
                    lines.append(
                        {"missing": missing, "kind": kind, "latents": name, "n": len(some), "quantiles": q}
                    )
    return lines


def main(n_tables: int) -> None:
    start = time.process_time()
    rows = [row for seed in range(n_tables) for row in differences(seed)]
    lines = summarised(rows)
    for line in lines:
        print(line)
    result = {
        "tables": n_tables,
        "cpu_s": round(time.process_time() - start, 1),
        "summary": lines,
        "rows": rows,
    }
    if n_tables >= 60:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", type=int, default=60)
    main(parser.parse_args().tables)
