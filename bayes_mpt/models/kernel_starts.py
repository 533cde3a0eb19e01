"""Where the parameters of kernels and means start, in units of the data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from gpytorch.kernels import IndexKernel, Kernel, LinearKernel, PeriodicKernel
from torch import Tensor

from bayes_mpt.models.kernels import Line

__all__ = ["LENGTH_SHARE", "columns_of", "extent_of", "start_value", "variance_of"]

MAX_ROWS = 4096  # that a period is looked for in
MAX_WAVES = 1024  # of the shortest period looked for, in the range of the inputs
LENGTH_SHARE = 0.2  # of the inputs' range, in a length-scale at the start


def start_value(name: str, raw: Tensor, owner: Any, x: Tensor, y: Tensor) -> Tensor:
    """An initial value in units of the data, in the shape of the raw parameter."""
    one = torch.ones_like(raw).detach()
    columns = columns_of(owner, x)
    if name == "period_length":
        periods = [_period(column, y.flatten()) for column in columns.mT]
        return raw.new_tensor(periods if raw.shape[-1] == len(periods) else periods[0]) * one
    if name == "lengthscale" and not isinstance(owner, PeriodicKernel):
        return LENGTH_SHARE * extent_of(columns, raw) * one
    if name == "location":
        return (columns.mean(0) if raw.shape[-1] == columns.shape[-1] else columns.mean()) * one
    if name == "variance" and isinstance(owner, LinearKernel | Line):  # of a slope
        spread = columns - columns.mean(0) if isinstance(owner, Line) else columns
        square = spread.square().sum(-1).mean()
        return variance_of(y) / torch.where(square > 0, square, 1.0) * one
    if isinstance(owner, IndexKernel):  # each task has half of the variance of its own, half of it in common
        return variance_of(y) / 2 * one if name == "var" else (variance_of(y) / 2).sqrt() * raw
    if name == "outputscale" or (name == "constant" and isinstance(owner, Kernel)):
        return variance_of(y) * one
    if name in ("constant", "bias"):
        return y.nanmean() * one
    return 0 * one if name == "weights" else one


def columns_of(owner: Any, x: Tensor) -> Tensor:
    """The columns that a kernel or mean sees, (N, P)."""
    dims = getattr(owner, "active_dims", None)
    return (x if dims is None else x[..., dims]).flatten(0, -2)


def extent_of(columns: Tensor, raw: Tensor) -> Tensor:
    """Ranges of the columns, one for each element of the parameter, or their mean."""
    # sqrt 12 standard deviations of uniform inputs are their range
    extent = columns.std(0, correction=0) * math.sqrt(12)
    extent = torch.where(extent > 0, extent, 1.0)
    return extent if raw.shape[-1] == len(extent) else extent.mean()


def _period(x: Tensor, y: Tensor) -> float:
    """The strongest period of y along one column, a parabola taken off (Lomb 1976): at most a quarter of the range."""
    from scipy.signal import lombscargle  # slow to import

    seen = ~y.isnan()
    every = max(1, int(seen.sum()) // MAX_ROWS)
    at, value = (a[seen][::every].double().numpy(force=True) for a in (x, y))
    extent = float(np.ptp(at)) if len(at) else 0.0
    if len(at) < 10 or extent == 0:
        return LENGTH_SHARE * extent or 1.0
    at = (at - at.min()) / extent
    value = value - np.polyval(np.polyfit(at, value, 2), at)
    waves = np.arange(4, min(MAX_WAVES, len(at) / 2), 0.25)  # in the range
    return extent / waves[lombscargle(at, value, 2 * np.pi * waves).argmax()]


def variance_of(y: Tensor) -> Tensor:
    """Variance of the observed y, not zero."""
    seen = y[~y.isnan()].double()
    variance = seen.var() if len(seen) > 1 else seen.new_ones(())
    return torch.where(variance > 0, variance, 1.0)
