"""Relative scales of the columns of x: how far the covariance reaches along each."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayes_mpt.predictors.gaussian.neighborhoods import (
    Points,
)
from bayes_mpt.predictors.gaussian.row_sets import RowSets
from bayes_mpt.program.arguments import rows_of

__all__ = ["column_units"]

N_BASE_ROWS = 4  # around which the correlation is followed
FALLEN = 0.5  # the share of the covariance at which a displacement counts as one unit
WITHIN = (0.1, 1 / 3)  # shares of a step by which a displacement of the data may differ from it


def column_units(blocks: RowSets, args: tuple[Any, ...], seed: int = 0) -> Points:
    """Relative scales of the columns of x: (P,), inf where a column makes no difference.

    The change of each by which the covariance falls to half, found by running the program on pairs of rows that differ
    in one column. The displacements halve from the column's range down, and all values are the data's own, so that
    labels stay labels. In units of their geometric mean, rounded to 4 %: the same at parameters that hardly differ, and
    one where the kernel treats columns alike.
    """
    x = args[0].reshape(len(args[0]), -1)
    some = np.random.default_rng(seed).choice(len(x), min(len(x), N_BASE_ROWS), replace=False)
    unit = np.array([_unit(blocks, args, torch.from_numpy(some).to(x.device), c) for c in range(x.shape[1])])
    matters = np.isfinite(unit)
    octaves = np.log2(unit[matters])
    unit[matters] = 2.0 ** (np.round(16 * (octaves - octaves.mean())) / 16) if matters.any() else 1.0
    return unit


def _unit(blocks: RowSets, args: tuple[Any, ...], some: Tensor, c: int) -> float:
    """The displacement in column c at which the covariance with the rows ``some`` has fallen to half."""
    column = args[0].reshape(len(args[0]), -1)[:, c]
    known = column.unique()
    extent = known[-1] - known[0]
    if not float(extent) > 0:
        return math.inf
    halvings = max(12, math.ceil(math.log2(len(column))))
    step = extent * torch.logspace(
        -halvings, 0, halvings + 1, base=2, dtype=column.dtype, device=column.device
    )
    here = column[some, None, None]
    wanted = here + torch.stack([step, -step], 1)  # (S, G, 2)
    above = torch.searchsorted(known, wanted).clamp(1, len(known) - 1)
    nearer = (known[above] - wanted).abs() <= (wanted - known[above - 1]).abs()
    there = torch.where(nearer, known[above], known[above - 1])
    moved = (there - here).abs()
    # first no displacement at all
    there, moved = (
        torch.cat([here.expand(-1, 1, 2), there], 1),
        torch.cat([moved.new_zeros(len(some), 1, 2), moved], 1),
    )
    cov, step = _covariances(blocks, args, some, c, there), torch.cat([step.new_zeros(1), step])
    for within in WITHIN:  # a grid may have no displacement near a step
        level, size = _fall(cov, moved, step, within)
        if float(size[1:2].sum()) <= 2.0**-6 * float(extent):
            level, size = (
                level[1:],
                size[1:],
            )  # a continuous column: without the noise that equal rows may share
        if len(level) > 1:
            break
    else:
        return math.inf
    level = (level / level[0]).clamp(min=1e-12)
    if not bool(torch.isfinite(level).all()):
        return math.inf
    fallen = (level < FALLEN).nonzero()[:, 0].tolist()
    i = fallen[0] if fallen else len(level) - 1
    if not fallen or float(size[i - 1]) == 0:
        # no step short of it or none beyond: as if it fell like exp(-(d / l)^2)
        drop = -math.log(min(float(level[i]), 1.0))
        return float(size[i]) * math.sqrt(-math.log(FALLEN) / drop) if drop > 1e-6 else math.inf
    # between two steps like exp(-(d / l)^c): log(-log level) is linear in log d
    a, b = size[i - 1 : i + 1].log().tolist()
    f, g = level[i - 1 : i + 1].clamp(max=1 - 1e-12).log().neg().log().tolist()
    return math.exp(a + (math.log(-math.log(FALLEN)) - f) / (g - f) * (b - a))


def _covariances(blocks: RowSets, args: tuple[Any, ...], some: Tensor, c: int, there: Tensor) -> Tensor:
    """Covariances of rows with themselves, column c displaced to ``there`` (S, G, 2): of that shape."""
    pairs = some[:, None].expand(len(some), there[0].numel()).reshape(-1, 1).expand(-1, 2)
    first, *others = rows_of(args, pairs)  # (B, 2, ...)
    first = first.clone()
    first.reshape(*pairs.shape, -1)[:, 1, c] = there.flatten()
    with torch.no_grad():
        return blocks.together(first, *others)[1][:, 0, 1].reshape(there.shape)


def _fall(cov: Tensor, moved: Tensor, step: Tensor, within: float) -> tuple[Tensor, Tensor]:
    """Mean covariance and displacement at each step that the data have, from (S, G, 2) to (G',) each."""
    counts = (moved - step[:, None]).abs() <= within * step[:, None]
    n = counts.sum((0, 2))
    level, size = (torch.where(counts, a, 0.0).sum((0, 2))[n > 0] / n[n > 0] for a in (cov, moved))
    return level, size
