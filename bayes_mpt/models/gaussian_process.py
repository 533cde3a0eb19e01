"""Gaussian process regression and classification."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy, deepcopy
from numbers import Integral, Real
from typing import Any

import gpytorch
import pyro
import pyro.distributions as dist
import torch
from gpytorch.constraints import Interval
from gpytorch.kernels import (
    AdditiveKernel,
    Kernel,
    LinearKernel,
    PeriodicKernel,
    ProductKernel,
    RBFKernel,
    ScaleKernel,
)
from gpytorch.means import ConstantMean, Mean
from linear_operator import to_dense
from linear_operator.operators import DiagLinearOperator
from pyro.distributions import constraints
from sklearn.base import BaseEstimator
from torch import Tensor

__all__ = ["GaussianProcess"]

NOISE_SHARE = 0.1  # of the variance of y, in the noise at the start
LENGTH_SHARE = 0.2  # of the inputs' range, in a length-scale at the start
PRIOR_SD = {"lengthscale": 1.0, "period_length": 1.0, "outputscale": 1.5, "variance": 1.5, "alpha": 1.0}
NOISE_SD = 1.5
OTHER_SD = 1.5  # of a parameter whose meaning is not known, unconstrained


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
            noise = noise + learnt[..., None]  # one for each of several parameter values side by side
        else:
            noise = noise + _not_negative("noise", self.noise)
        tokens = gpytorch.distributions.MultivariateNormal(loc, cov + DiagLinearOperator(noise))
        pyro.sample("y", tokens, obs=y)

    def hyperprior(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Priors of the hyper-parameters by the parameters' names, with centres in units of the data.

        Each is a pair (loc, scale), in the shape of the parameter, of a normal distribution on its unconstrained
        value, such as the logarithm; or a `torch.distributions.Distribution` of its natural value, where one is
        registered with a gpytorch module that is no normal in the unconstrained one.
        """
        if self.noise_column is not None:
            x = x[..., [c for c in range(x.shape[-1]) if c != self.noise_column % x.shape[-1]]]
        kernel = ScaleKernel(RBFKernel(ard_num_dims=x.shape[-1])) if self.kernel is None else self.kernel
        out: dict[str, Any] = {}
        for prefix, module in (
            ("kernel", kernel),
            ("mean", ConstantMean() if self.mean is None else self.mean),
        ):
            module = deepcopy(module)
            if next(module.parameters(), None) is not None:
                module = module.to(x)
            variances = _variances(module, _variance(y)) if isinstance(module, Kernel) else {}
            for path, raw, constraint in module.named_parameters_and_constraints():
                if not raw.requires_grad:
                    continue
                owner, name = _owner(module, path)
                natural = name.removeprefix("raw_")
                full = ".".join([prefix, *path.split(".")[:-1], natural])
                given = _registered(owner, natural, raw)
                if given is not None:
                    out[full] = given
                    continue
                centre, sd = _centre(natural, raw, owner, x, y, variances.get(id(owner)))
                if natural in ("constant", "bias"):
                    sd = sd * _reach(kernel, module, x)
                out[full] = _unconstrained(centre, sd, _support(constraint))
        if self.noise is None and self.likelihood is None:
            centre = (NOISE_SHARE * _variance(y)).to(x)
            out["noise"] = centre.log(), torch.full_like(centre, NOISE_SD)
        return out


def _variances(kernel: Kernel, variance: Any) -> dict[int, Any]:
    """The prior variance that each kernel of an expression has to give, by id: a product's is that of one factor."""
    out = {id(kernel): variance}
    parts = [k for k in kernel.children() if isinstance(k, Kernel)]
    if isinstance(kernel, AdditiveKernel | ProductKernel):
        parts = list(kernel.kernels)
    gives = [isinstance(kernel, ProductKernel) and _has_variance(k) for k in parts]
    for i, part in enumerate(parts):
        mine = variance
        if isinstance(kernel, ScaleKernel) or (any(gives) and i != gives.index(True)):
            mine = torch.ones_like(torch.as_tensor(variance))
        out |= _variances(part, mine)
    return out


def _has_variance(kernel: Kernel) -> bool:
    return any(path.endswith(("raw_outputscale", "raw_variance")) for path, _ in kernel.named_parameters())


def _centre(
    name: str, raw: Tensor, owner: Any, x: Tensor, y: Tensor, variance: Any
) -> tuple[Tensor, Tensor | float]:
    """Centre of the prior in natural units, and the standard deviation of the unconstrained value."""
    centre: Any = _start(name, raw, owner, x, y)
    sd = PRIOR_SD.get(name, OTHER_SD)
    if name == "lengthscale" and not isinstance(owner, PeriodicKernel):
        n_columns = x.shape[-1] if owner.active_dims is None else len(owner.active_dims)
        centre = centre * math.sqrt(n_columns)  # distances grow with the number of columns
    if name == "outputscale":
        centre = variance * torch.ones_like(raw)
    if name == "variance" and isinstance(owner, LinearKernel):
        columns = x if owner.active_dims is None else x[..., owner.active_dims]
        spread = columns.reshape(-1, columns.shape[-1]).var(0).sum()
        centre = variance / torch.where(spread > 0, spread, 1.0) * torch.ones_like(raw)
    if name in ("constant", "bias"):
        return y.nanmean() * torch.ones_like(raw), float(_variance(y).sqrt())
    if name == "weights":
        spread = x.reshape(-1, x.shape[-1]).std(0)
        unit = _variance(y).sqrt() / torch.where(spread > 0, spread, 1.0)
        return centre, unit.reshape(-1, 1).expand_as(raw)
    return centre, sd


def _reach(kernel: Kernel, mean: Mean, x: Tensor) -> float:
    """How much further than the data a constant may lie: where lines meet x = 0, in standard deviations of y."""
    if not any(isinstance(k, LinearKernel) for k in kernel.modules()) and not hasattr(mean, "weights"):
        return 1.0
    columns = x.reshape(-1, x.shape[-1])
    spread = columns.var(0).sum()
    return float((1 + columns.mean(0).square().sum() / spread).sqrt()) if spread > 0 else 1.0


def _unconstrained(centre: Tensor, sd: Any, support: Any) -> tuple[Tensor, Tensor]:
    """(loc, scale) of the unconstrained value whose natural value is centred there, inside the support."""
    low, high = (float(getattr(support, f"{side}_bound", math.nan)) for side in ("lower", "upper"))
    if math.isfinite(low):
        room = high - low if math.isfinite(high) else centre.abs()
        centre = torch.maximum(centre, torch.as_tensor(low + 0.05 * room).to(centre))
    if math.isfinite(high):
        room = high - low if math.isfinite(low) else centre.abs()
        centre = torch.minimum(centre, torch.as_tensor(high - 0.05 * room).to(centre))
    loc = torch.distributions.transform_to(support).inv(centre)
    return loc, sd * torch.ones_like(loc)


def _registered(owner: Any, name: str, raw: Tensor) -> Any:
    """The prior that a gpytorch module holds for this parameter: (loc, scale) where its logarithm, or it, is normal."""
    for prior, closure, _ in owner._priors.values():
        value = closure(owner)
        touched = torch.autograd.grad(value.sum(), raw, allow_unused=True)[0] if value.requires_grad else None
        if touched is None:
            continue
        if not torch.equal(value, getattr(owner, name)) or prior.event_shape:
            raise ValueError(
                f"the prior registered for {name!r} of {type(owner).__name__} is not of the parameter's natural value, "
                "each element alone: such a prior cannot be read. Register it on the parameter itself"
            )
        real = owner.constraint_for_parameter_name(f"raw_{name}") is None
        one = torch.ones_like(raw).detach()
        if isinstance(prior, torch.distributions.LogNormal if not real else torch.distributions.Normal):
            return prior.loc.to(raw) * one, prior.scale.to(raw) * one
        return prior
    return None


def _with_parameters(prefix: str, module: Any, x: Tensor, y: Tensor) -> Any:
    """A copy of a gpytorch module whose free parameters are `pyro.param`s, and the known ones in the dtype of x."""
    module = _copy(module, x)
    for path, raw, constraint in list(module.named_parameters_and_constraints()):
        owner, name = _owner(module, path)
        del owner._parameters[name]
        if not raw.requires_grad:
            setattr(owner, name, raw.detach().to(x))
            continue
        natural = name.removeprefix("raw_")
        full = ".".join([prefix, *path.split(".")[:-1], natural])
        value = pyro.param(
            full, lambda n=natural, r=raw, o=owner: _first(n, r, o, module, x, y), _support(constraint)
        )
        setattr(owner, name, value if constraint is None else constraint.inverse_transform(value))
    return module


def _copy(module: Any, x: Tensor) -> Any:
    """Of the modules and of nothing in them, which is shared, but for buffers in the dtype of x: programs run often."""
    new = copy(module)
    new.__dict__ = dict(module.__dict__)
    new._parameters = dict(module._parameters)
    new._modules = {n: None if m is None else _copy(m, x) for n, m in module._modules.items()}
    new._buffers = {
        n: b.to(x) if b is not None and b.is_floating_point() else b for n, b in module._buffers.items()
    }
    if isinstance(module, LinearKernel):
        # To add a low-rank operator to another gpytorch decomposes that one: n^3 for nothing, or an error.
        new.forward = lambda *args, **kwargs: to_dense(type(module).forward(new, *args, **kwargs))
    return new


def _first(name: str, raw: Tensor, owner: Any, module: Any, x: Tensor, y: Tensor) -> Tensor:
    """An initial value: the centre of the prior."""
    variance = _variances(module, _variance(y)).get(id(owner)) if isinstance(module, Kernel) else None
    return _centre(name, raw.to(x), owner, x, y, variance)[0]


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
    one = torch.ones_like(raw).detach()
    if name == "lengthscale" and isinstance(owner, PeriodicKernel):
        return one  # of sines
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
