"""Gaussian process regression and classification."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from numbers import Integral, Real
from typing import Any

import gpytorch
import pyro
import pyro.distributions as dist
import torch
from gpytorch.constraints import Interval
from gpytorch.kernels import Kernel, RBFKernel, ScaleKernel
from gpytorch.means import ConstantMean, Mean
from linear_operator.operators import DiagLinearOperator
from pyro.distributions import constraints
from sklearn.base import BaseEstimator
from torch import Tensor

__all__ = ["GaussianProcess"]

NOISE_SHARE = 0.1  # of the variance of y, in the noise at the start
LENGTH_SHARE = 0.3  # of the inputs' range, in a length-scale at the start


class GaussianProcess(BaseEstimator):
    """Gaussian process: y ~ N(m(x), k(x, x') + noise), or y ~ likelihood(f) with f ~ N(m(x), k(x, x')).

    Site "y" (N,), the observations of one vector; with a likelihood also the latent "u" (N,), f = m + L u. Parameters
    "noise" and one for each free parameter of kernel and mean by its path, such as "kernel.base_kernel.lengthscale",
    in natural units. They start in units of the data, whatever values the modules hold; what has
    ``requires_grad=False`` there is known and keeps its value.

    Parameters
    ----------
    kernel : gpytorch.kernels.Kernel, optional
        Default: ``ScaleKernel(RBFKernel(ard_num_dims=P))``.
    mean : gpytorch.means.Mean, optional
        Default: ``ConstantMean()``.
    noise : float, optional
        Known variance of the noise; None learns it.
    noise_column : int, optional
        Column of x that holds a known noise variance for each row, in addition; the kernel does not see it.
    likelihood : callable, optional
        From latent function values to a distribution of y with their shape, such as
        ``lambda f: dist.Poisson(f.exp())``. None: Gaussian noise, integrated in closed form.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> pyro.clear_param_store()
    >>> x, y = (torch.as_tensor(a) for a in load_diabetes(return_X_y=True))
    >>> trace = pyro.poutine.trace(GaussianProcess()).get_trace(x, y)
    >>> trace.nodes["kernel.base_kernel.lengthscale"]["value"].shape, trace.nodes["y"]["value"].shape
    (torch.Size([1, 10]), torch.Size([442]))
    """

    def __init__(
        self,
        kernel: Kernel | None = None,
        *,
        mean: Mean | None = None,
        noise: float | None = None,
        noise_column: int | None = None,
        likelihood: Callable[[Tensor], Any] | None = None,
    ):
        self.kernel = kernel
        self.mean = mean
        self.noise = noise
        self.noise_column = noise_column
        self.likelihood = likelihood

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Run the program on inputs x ([B,] N, P) and observations y ([B,] N)."""
        known = None
        if self.noise_column is not None:
            column = self.noise_column % x.shape[-1]
            known = x[..., column]
            x = x[..., [c for c in range(x.shape[-1]) if c != column]]
        kernel = ScaleKernel(RBFKernel(ard_num_dims=x.shape[-1])) if self.kernel is None else self.kernel
        mean = ConstantMean() if self.mean is None else self.mean
        kernel = _with_parameters("kernel", kernel, x, y)
        loc = _with_parameters("mean", mean, x, y)(x)
        cov = kernel(x)
        if self.likelihood is not None:
            u = pyro.sample("u", dist.Normal(torch.zeros_like(loc), 1.0).to_event(loc.ndim))
            f = loc + (torch.linalg.cholesky(cov.to_dense()) @ u[..., None])[..., 0]
            pyro.sample("y", self.likelihood(f).to_event(loc.ndim), obs=y)
            return
        noise = torch.zeros_like(loc) if known is None else known
        if self.noise is None:
            learnt = pyro.param("noise", lambda: NOISE_SHARE * _variance(y), constraints.positive)
            noise = noise + learnt
        else:
            noise = noise + _not_negative("noise", self.noise)
        tokens = gpytorch.distributions.MultivariateNormal(loc, cov + DiagLinearOperator(noise))
        pyro.sample("y", tokens, obs=y)


def _with_parameters(prefix: str, module: Any, x: Tensor, y: Tensor) -> Any:
    """A copy of a gpytorch module whose free parameters are `pyro.param`s, and the known ones in the dtype of x."""
    module = deepcopy(module)
    if next(module.parameters(), None) is not None:
        module = module.to(x)
    for path, raw, constraint in list(module.named_parameters_and_constraints()):
        owner, name = _owner(module, path)
        del owner._parameters[name]
        if not raw.requires_grad:
            setattr(owner, name, raw.detach())
            continue
        natural = name.removeprefix("raw_")
        full = ".".join([prefix, *path.split(".")[:-1], natural])
        value = pyro.param(
            full, lambda n=natural, r=raw, o=owner: _start(n, r, o, x, y), _support(constraint)
        )
        setattr(owner, name, value if constraint is None else constraint.inverse_transform(value))
    return module


def _owner(module: Any, path: str) -> tuple[Any, str]:
    *parents, name = path.split(".")
    for parent in parents:
        module = getattr(module, parent)
    return module, name


def _support(constraint: Interval | None) -> Any:
    if constraint is None:
        return constraints.real
    low, high = float(constraint.lower_bound), float(constraint.upper_bound)
    if math.isinf(high):
        return constraints.positive if low == 0 else constraints.greater_than(low)
    return constraints.less_than(high) if math.isinf(low) else constraints.interval(low, high)


def _start(name: str, raw: Tensor, owner: Any, x: Tensor, y: Tensor) -> Tensor:
    """An initial value in units of the data, in the shape of the raw parameter."""
    one = torch.ones_like(raw)
    if name in ("lengthscale", "period_length"):
        columns = x if owner.active_dims is None else x[..., owner.active_dims]
        extent = columns.reshape(-1, columns.shape[-1]).std(0) * math.sqrt(
            12
        )  # of uniform inputs: their range
        extent = torch.where(extent > 0, extent, 1.0)
        return LENGTH_SHARE * (extent if raw.shape[-1] == len(extent) else extent.mean()) * one
    if name in ("outputscale", "variance"):
        return _variance(y) * one
    if name == "constant":
        return y.nanmean() * one
    return one if name != "weights" and name != "bias" else 0 * one


def _variance(y: Tensor) -> Tensor:
    """Variance of the observed y, not zero."""
    seen = y[~y.isnan()].double()
    variance = seen.var() if len(seen) > 1 else seen.new_ones(())
    return torch.where(variance > 0, variance, 1.0)


def _not_negative(name: str, value: Any) -> float:
    if (
        not isinstance(value, Real)
        or (isinstance(value, bool | Integral) and value < 0)
        or not 0 <= float(value) < math.inf
    ):
        raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
    return float(value)
