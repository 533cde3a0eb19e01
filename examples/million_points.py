"""A Gaussian process on a map: kernel fitted, every cell predicted, with its standard deviation.

The elevation around Jacksboro (138 632 cells, shipped with matplotlib): a fifth of the cells are shown, and none of a
square. Or the EGM96 geoid, 1 038 240 cells on the sphere, all shown but a tenth and a square, from the file
egm96_15.gtx (of Debian's proj-data, for one), which takes a quarter of an hour:

    python examples/million_points.py [--output DIR] [--geoid FILE] [--share 0.2] [--neighbors 20]

Writes million_points.png.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from gpytorch.kernels import MaternKernel, ScaleKernel
from matplotlib.cbook import get_sample_data
from matplotlib.colors import LogNorm, Normalize
from scipy.spatial import cKDTree

from bayes_mpt import BayesMPT
from bayes_mpt.models import GaussianProcess
from bayes_mpt.predictors import NearestNeighbors


class Field(NamedTuple):
    name: str
    unit: str
    height: np.ndarray  # (rows, columns)
    place: np.ndarray  # (cells, P) coordinates in which distance is distance


def elevation() -> Field:
    with get_sample_data("jacksboro_fault_dem.npz") as dem:
        height = dem["elevation"].astype(float)
    rows, columns = np.indices(height.shape)
    return Field("Elevation", "m", height, np.c_[rows.ravel(), columns.ravel()] * 0.09)  # km, about


def geoid(path: Path) -> Field:
    south, west, step_north, step_east = np.fromfile(path, ">f8", 4)
    n_rows, n_columns = np.fromfile(path, ">i4", 2, offset=32)
    height = np.fromfile(path, ">f4", offset=40).reshape(n_rows, n_columns).astype(float)
    north = np.radians(south + step_north * np.arange(n_rows))[:, None]
    east = np.radians(west + step_east * np.arange(n_columns))[None]
    sphere = [np.cos(north) * np.cos(east), np.cos(north) * np.sin(east), np.sin(north) + 0 * east]
    return Field("Geoid EGM96", "m", height, 6371 * np.stack([a.ravel() for a in sphere], 1))  # km


def main(output: Path, geoid_file: Path | None, share: float, m: int) -> None:
    field = elevation() if geoid_file is None else geoid(geoid_file)
    rng = np.random.default_rng(0)
    shown = rng.random(field.height.shape) < share
    rows, columns = field.height.shape
    square = np.s_[rows // 2 : rows // 2 + rows // 8, columns // 5 : columns // 5 + rows // 8]
    shown[square] = False
    shown = shown.ravel()
    X, y = field.place, field.height.ravel()

    begun = time.perf_counter()
    model = GaussianProcess(ScaleKernel(MaternKernel(nu=1.5)))
    fitted = BayesMPT(model, predictor=NearestNeighbors(m), random_state=0).fit(X[shown], y[shown])
    fit_time = time.perf_counter() - begun
    mean, sd = fitted.predict(X, return_std=True)
    print(f"{shown.sum()} cells shown, {len(y)} predicted; {fitted.explain()}")
    print(f"fitted in {fit_time:.0f} s, predicted in {time.perf_counter() - begun - fit_time:.0f} s")
    for name, value in fitted.params_.items():
        print(f"  {name:<35}{np.ravel(value)[0]:.5g}")
    print(
        f"  log marginal likelihood {fitted.log_marginal_likelihood_:.0f}, of which the neighbours left out are worth "
        f"about {fitted.log_marginal_likelihood_se_:.0f}"
    )

    # Known otherwise: the cells that were hidden.
    hidden = ~shown
    error = np.where(hidden, mean - y, 0.0)
    nearest = y[shown][cKDTree(X[shown]).query(X[hidden])[1]]
    rms, plain = np.sqrt(np.mean(error[hidden] ** 2)), np.sqrt(np.mean((nearest - y[hidden]) ** 2))
    inside = np.mean(np.abs(error[hidden]) < 2 * sd[hidden])
    print(
        f"hidden cells: root mean square error {rms:.2f} {field.unit}, of the nearest shown cell {plain:.2f}; "
        f"{inside:.1%} within two standard deviations"
    )
    assert rms < 0.7 * plain
    assert 0.9 < inside < 0.99
    hole = np.zeros(field.height.shape, dtype=bool)
    hole[square] = True
    assert sd[hole.ravel()].max() > 3 * np.median(sd)  # it knows where it knows little

    output.mkdir(parents=True, exist_ok=True)
    grid = lambda a: a.reshape(field.height.shape)  # noqa: E731
    panels = [
        (f"{field.name}: shown", grid(np.where(shown, y, np.nan)), "terrain"),
        ("Predicted", grid(mean), "terrain"),
        ("Standard deviation", grid(sd), "magma"),
        ("Error / standard deviation", grid(error / sd), "RdBu"),
    ]
    wide = columns > 1.5 * rows
    figure, axes = plt.subplots(2, 2, figsize=(13, 7.5) if wide else (11, 9.5), layout="constrained")
    for ax, (title, values, colours) in zip(axes.flat, panels, strict=True):
        norm = {
            "terrain": Normalize(y.min(), y.max()),
            "magma": LogNorm(np.quantile(sd[hidden], 0.01), sd.max()),
            "RdBu": Normalize(-4, 4),
        }[colours]
        image = ax.imshow(values, cmap=colours, norm=norm, interpolation="nearest")
        unit = "" if colours == "RdBu" else field.unit
        figure.colorbar(image, ax=ax, shrink=0.8, label=unit)
        ax.set(title=title, xticks=[], yticks=[])
    figure.savefig(output / "million_points.png", dpi=110)
    print(f"wrote {output / 'million_points.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    parser.add_argument("--geoid", type=Path, help="egm96_15.gtx")
    parser.add_argument("--share", type=float, help="of the cells, shown")
    parser.add_argument("--neighbors", type=int, default=20)
    args = parser.parse_args()
    share = args.share or (0.2 if args.geoid is None else 0.9)
    main(args.output, args.geoid, share, args.neighbors)
