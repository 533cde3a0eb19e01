"""What the experiments of arXiv 2306.00520 share: the authors' data, a program of it, and how numbers are kept.

The authors' code (pmorenoz/MPT-LML, commit f6893a1) draws one noise value of standard deviation 0.2 a ROW and adds it
to all cells of the row; its model, x = W z + e, has independent noise of VARIANCE 0.2 in every cell. ``shared=True`` is
the former, ``shared=False`` draws what the model says, with the same loadings and latents.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.stats import multivariate_normal
from torch import Tensor

NOISE = 0.2  # variance, 1 / beta
SEEDS = (4, 44, 444, 4444, 44444)  # of the masks, and of the initial values


def generated(
    n: int, d: int, k: int, seed: int | torch.Generator, *, shared: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Loadings (D, K) and rows (N, D), drawn in single precision as published."""
    g = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    loading, z = torch.randn(d, k, generator=g), torch.randn(n, k, generator=g)
    noise = NOISE * torch.randn(n, 1, generator=g)
    if not shared:
        noise = math.sqrt(NOISE) * torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    return loading.double().numpy(), (z @ loading.T + noise).double().numpy()


def factors(x: Tensor, loading: Tensor) -> None:
    """x = W z + e, e ~ N(0, NOISE I): the paper's PPCA, whose mean is zero and whose noise is known."""
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(loading.shape[1]), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ loading.mT, math.sqrt(NOISE)).to_event(1), obs=x)


def lml(loading: np.ndarray, x: np.ndarray) -> float:
    """The exact log marginal likelihood by dense algebra, nats a row."""
    cov = loading @ loading.T + NOISE * np.eye(len(loading))
    return float(multivariate_normal(np.zeros(len(cov)), cov).logpdf(x).mean())


def few_rows(x: np.ndarray) -> Tensor:
    """R rows that stand for all: a score of a zero-mean Gaussian is quadratic, its mean depends on x' x / N alone.

    x' x / N = sum_j value_j v_j v_j', hence rows sqrt(R value_j) v_j; R is its rank, K + 1 with the shared noise.
    """
    value, vector = np.linalg.eigh(x.T @ x / len(x))
    kept = value > 1e-9 * value[-1]
    return torch.from_numpy((vector[:, kept] * np.sqrt(kept.sum() * value[kept])).T.copy())


def output_directory(doc: str) -> Path:
    """Where to write: --output, or a folder beside the scripts."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "output")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    return output


def report(
    output: Path,
    name: str,
    figure: plt.Figure,
    *,
    source: str,
    differences: list[str],
    columns: list[str],
    rows: list[list[str]],
    numbers: dict,
) -> None:
    """Print the table, in Markdown; write the picture, and the numbers beside the published ones."""
    width = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for line in [columns, ["-" * w for w in width], *rows]:
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, width, strict=True)) + " |")
    print("\nDifferences in setting:", *differences, sep="\n  - ")
    figure.savefig(output / f"{name}.png", dpi=120)
    plt.close(figure)
    kept = {
        "source": source,
        "differences": differences,
        "columns": columns,
        "rows": rows,
        "numbers": numbers,
    }
    (output / f"{name}.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {output / name}.png and .json")
