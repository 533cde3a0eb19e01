"""Gaussian process regression and classification."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy, deepcopy
from functools import lru_cache
from numbers import Real
from typing import Any, ClassVar

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
from gpytorch.means import ConstantMean, LinearMean, Mean, ZeroMean
from linear_operator import to_linear_operator
from pyro.distributions import constraints
from sklearn.gaussian_process import kernels as theirs
from torch import Tensor

from bayes_mpt.models.checks import CheckedModel, Instance, IntegersFrom, NumbersFrom, OneOf
from bayes_mpt.models.kernel_starts import LENGTH_SHARE, columns_of, extent_of, start_value, variance_of
from bayes_mpt.models.kernels import (
    NAMED,
    Line,
    check_columns,
    from_sklearn,
    kernel_name,
    named_kernel,
    with_own_algebra,
)
from bayes_mpt.models.noise_floor import above_rounding, noise_above

__all__ = ["GaussianProcess"]

NOISE_SHARE = 0.1  # of the variance of y, in the noise at the start
FLOOR = 1e-8  # of the variance of y, the least noise that is learned
NUGGET = 1e-8  # of the mean variance of f, in its covariance before a likelihood: smooth kernels have no root without
PRIOR_SD = {"lengthscale": 1.0, "period_length": 1.0, "outputscale": 1.5, "variance": 1.5, "alpha": 1.0}
NOISE_SD = 1.5
OTHER_SD = 1.5  # of a parameter whose meaning is not known, unconstrained
MEANS = {"zero": lambda n: ZeroMean(), "constant": lambda n: ConstantMean(), "linear": LinearMean}
LIKELIHOODS = {
    "gaussian": None,
    "bernoulli": lambda f: dist.Bernoulli(logits=f),
    "poisson": lambda f: dist.Poisson(f.exp()),
}


class GaussianProcess(CheckedModel):
    """Gaussian process: y ~ N(m(x), k(x, x') + noise), or y ~ likelihood(f) with f ~ N(m(x), k(x, x')).

    Site "y" (N,), the observations of one vector; with a likelihood also the latent "u" (N,), f = m + L u. Parameters
    "noise" and one for each free parameter of kernel and mean by its path, such as "kernel.base_kernel.lengthscale",
    in natural units. They start in units of the data, whatever values the modules hold; what has
    ``requires_grad=False`` there is known and keeps its value.

    A noise that is learned is at least 1e-8 of the variance of y: the likelihood of a curve without noise grows without
    bound as it goes to zero. A fit that ends at this floor warns. So that the covariance keeps digits in float64, a
    noise near its floor is lifted to 1e-11 of k(x, x), by no more than 100 floors. A given noise is taken as it is.

    Parameters
    ----------
    kernel : gpytorch.kernels.Kernel, sklearn.gaussian_process.kernels.Kernel or str, optional
        Default: ``ScaleKernel(RBFKernel(ard_num_dims=P))``, which is "rbf"; so are "matern" (nu 5/2), "rational
        quadratic" and "periodic" with their kernels, and "linear" is ``LinearKernel()``. An expression of scikit-learn
        is translated (`bayes_mpt.models.kernels.from_sklearn`): its WhiteKernel is the noise, of its bounds only
        "fixed" counts.
    mean : gpytorch.means.Mean or {"zero", "constant", "linear"}, optional
        Default: ``ConstantMean()``.
    noise : float, optional
        Known variance of the noise; None learns it, or takes that of a fixed WhiteKernel.
    noise_column : int, optional
        Column of x that holds a known noise variance for each row, in addition; the kernel does not see it.
    likelihood : callable or {"gaussian", "bernoulli", "poisson"}, optional
        From latent function values to a distribution of y with their shape, such as
        ``lambda f: dist.Poisson(f.exp())``, which is "poisson"; "bernoulli" takes them for logits. None or "gaussian":
        Gaussian noise, integrated in closed form.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> pyro.clear_param_store()
    >>> x, y = (torch.as_tensor(a) for a in load_diabetes(return_X_y=True))
    >>> trace = pyro.poutine.trace(GaussianProcess()).get_trace(x, y)
    >>> trace.nodes["kernel.base_kernel.lengthscale"]["value"].shape, trace.nodes["y"]["value"].shape
    (torch.Size([1, 10]), torch.Size([442]))
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "kernel": [
            Instance((Kernel, theirs.Kernel), "a kernel of gpytorch or of sklearn.gaussian_process"),
            OneOf(*NAMED),
            None,
        ],
        "mean": [OneOf(*MEANS), Instance(Mean, "a gpytorch.means.Mean"), None],
        "noise": [NumbersFrom(), None],
        "noise_column": [IntegersFrom(None), None],
        "likelihood": [OneOf(*LIKELIHOODS), callable, None],
    }

    def __init__(
        self,
        kernel: Kernel | str | None = None,
        *,
        mean: Mean | str | None = None,
        noise: float | None = None,
        noise_column: int | None = None,
        likelihood: Callable[[Tensor], Any] | str | None = None,
    ):
        self.kernel = kernel
        self.mean = mean
        self.noise = noise
        self.noise_column = noise_column
        self.likelihood = likelihood

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Run the program on inputs x ([B,] N, P) and observations y ([B,] N), or y ([B,] N, 1)."""
        self._validate_params()
        if y.ndim == x.ndim and y.shape[-1] == 1:
            y = y[..., 0]
        if y.shape != x.shape[:-1]:
            raise ValueError(
                f"y must have one number for each row of x, shape {tuple(x.shape[:-1])}, got {tuple(y.shape)}: give "
                "several outputs one below the other, with a column of x that says which (IndexKernel)"
            )
        y = y if y.is_floating_point() else y.to(x)
        known, x = self._known_noise(x)
        kernel, level = self._kernel(x.shape[-1])
        mean = self._mean(x.shape[-1])
        loc = _with_parameters("mean", mean, x, y)(x)
        cov = _with_parameters("kernel", kernel, x, y)(x)
        likelihood = self.likelihood_function
        if likelihood is not None:
            u = pyro.sample("u", dist.Normal(torch.zeros_like(loc), 1.0).to_event(loc.ndim))
            dense = cov.to_dense()
            nugget = NUGGET * dense.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
            root = torch.linalg.cholesky(dense + nugget * torch.eye(dense.shape[-1]).to(dense))
            f = loc + (root @ u[..., None])[..., 0]
            try:
                tokens = likelihood(f)
            except TypeError as error:
                raise TypeError(
                    f"GaussianProcess: likelihood cannot be called with f alone: {error}"
                ) from error
            if not hasattr(tokens, "to_event"):
                raise TypeError(
                    "GaussianProcess: likelihood must give a distribution of y, such as lambda f: "
                    f"dist.Poisson(f.exp()), got {type(tokens).__name__}"
                )
            pyro.sample("y", tokens.to_event(loc.ndim), obs=y)
            return
        dense = cov.to_dense()
        own = dense.diagonal(dim1=-2, dim2=-1)
        noise = level if level is not None else above_rounding(*_learned_noise(y), own)
        dense = torch.diagonal_scatter(dense, own + known + noise, dim1=-2, dim2=-1)
        tokens = gpytorch.distributions.MultivariateNormal(loc, to_linear_operator(dense))  # unfactorised
        pyro.sample("y", tokens, obs=y)

    def hyperprior(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Priors of the hyper-parameters by the parameters' names, with centres in units of the data.

        Each is a pair (loc, scale), in the shape of the parameter, of a normal distribution on its unconstrained
        value, such as the logarithm; or a `torch.distributions.Distribution` of its natural value, where one is
        registered with a gpytorch module that is no normal in the unconstrained one.
        """
        y = y[..., 0] if y.ndim == x.ndim else y
        y = y if y.is_floating_point() else y.to(x)
        x = self.inputs(x)
        kernel, level = self._kernel(x.shape[-1])
        out: dict[str, Any] = {}
        for prefix, module in (
            ("kernel", kernel),
            ("mean", self._mean(x.shape[-1])),
        ):
            module = deepcopy(module)
            if next(module.parameters(), None) is not None:
                module = module.to(x)
            variances = _variances(module, variance_of(y)) if isinstance(module, Kernel) else {}
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
                centre, sd = _centre(natural, raw.detach(), owner, x, y, variances.get(id(owner)))
                if natural in ("constant", "bias"):
                    sd = sd * _reach(kernel, module, x)
                out[full] = _unconstrained(centre, sd, _support(constraint))
        if level is None and self.likelihood_function is None:
            centre = (NOISE_SHARE * variance_of(y)).to(x)
            out["noise"] = centre.log(), torch.full_like(centre, NOISE_SD)
        return out

    def floored(self, x: Tensor, y: Tensor) -> dict[str, str]:
        """The parameters in Pyro's store that are at their least value, each with a sentence that says so.

        Parameters
        ----------
        x, y : tensors of shapes (N, P), (N,)
            The rows that they were trained on.
        """
        if "noise" not in pyro.get_param_store():
            return {}
        floor = FLOOR * float(variance_of(y))
        if float(pyro.param("noise").detach()) <= 2 * floor:
            return {
                "noise": f"its floor, {FLOOR:g} of the variance of y: these observations show no noise. Where they "
                f"have none, give a small variance, such as noise={100 * floor:.0e}"
            }
        return {}

    def at(self, params: dict[str, Any], x: Tensor) -> tuple[Kernel, Mean, Tensor]:
        """Kernel and mean at these values of the parameters, and the variances of the noise (N,) of rows x.

        Parameters
        ----------
        params : dict of arrays
            By name, as `bayes_mpt.BayesMPT.params_` has them.
        x : tensor of shape (N, P)
        """
        known, x = self._known_noise(x)
        kernel, level = self._kernel(x.shape[-1])
        values = {name: torch.as_tensor(value).to(x) for name, value in params.items()}
        noise = known + (values.pop("noise", 0.0) if level is None else level)
        with pyro.poutine.substitute(data=values):
            kernel = _with_parameters("kernel", kernel, x, x[:, 0])
            mean = _with_parameters("mean", self._mean(x.shape[-1]), x, x[:, 0])
        return kernel, mean, noise

    @property
    def likelihood_function(self) -> Callable[[Tensor], Any] | None:
        """`likelihood` as a function, a name looked up; None where the noise is Gaussian."""
        return LIKELIHOODS[self.likelihood] if isinstance(self.likelihood, str) else self.likelihood

    @property
    def gaussian_vector(self) -> bool:
        """Whether y is one Gaussian vector given x, as `bayes_mpt.BayesMPT` asks."""
        return self.likelihood_function is None

    def _mean(self, n_columns: int) -> Mean:
        """The mean function, of so many columns."""
        mean = "constant" if self.mean is None else self.mean
        if not isinstance(mean, str):
            return mean
        return _named_mean(mean, n_columns, torch.get_default_dtype())

    def inputs(self, x: Tensor) -> Tensor:
        """The columns of x that the kernel sees."""
        return self._known_noise(x)[1]

    def _known_noise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Variances that a column of x holds ([B,] N), zero without one, and the other columns."""
        if self.noise_column is None:
            return x.new_zeros(x.shape[:-1]), x
        width = x.shape[-1]
        if not -width <= self.noise_column < width:
            raise ValueError(f"noise_column={self.noise_column} is not among the {width} columns of x")
        column = self.noise_column % width
        if bool((x[..., column] < 0).any()):
            raise ValueError(f"column {column} of x holds variances of the noise, so it must not be negative")
        return x[..., column], x[..., [c for c in range(width) if c != column]]

    def _kernel(self, n_columns: int) -> tuple[Kernel, float | None]:
        """The kernel for so many columns, and the variance of the noise if it is known."""
        self._validate_params()
        kernel, level = self.kernel, None if self.noise is None else float(self.noise)
        if kernel is None:
            return _default_kernel(n_columns, torch.get_default_dtype()), level
        if isinstance(kernel, str):
            return named_kernel(kernel, n_columns), level
        if isinstance(kernel, theirs.Kernel):
            kernel, white = from_sklearn(self.kernel, n_columns)
            if kernel is None:
                raise ValueError(f"{self.kernel} is noise alone: add a kernel to it")
            if level is not None and white is not None:
                raise ValueError(f"the noise is given twice: noise={level}, and {white} in {self.kernel}")
            level = white if level is None else level
        check_columns(kernel, n_columns)
        return kernel, level

    def __repr__(self, N_CHAR_MAX: int = 700) -> str:
        said = ["default" if self.kernel is None else kernel_name(self.kernel)]
        for name in ("mean", "noise", "noise_column", "likelihood"):
            value = getattr(self, name)
            if value is not None:
                word = (
                    value
                    if isinstance(value, Real | str)
                    else getattr(value, "__name__", type(value).__name__)
                )
                said.append(f"{name}={word}")
        return f"GaussianProcess({', '.join(said)})"


@lru_cache(maxsize=16)
def _default_kernel(n_columns: int, dtype: torch.dtype) -> Kernel:
    """Where none is given, for so many columns, in torch's default ``dtype``; read only, since programs run often."""
    return ScaleKernel(RBFKernel(ard_num_dims=n_columns))


@lru_cache(maxsize=16)
def _named_mean(name: str, n_columns: int, dtype: torch.dtype) -> Mean:
    """The mean function of this name, as `_default_kernel`."""
    with torch.random.fork_rng(devices=[]):  # a linear one draws values, which are not used
        return MEANS[name](n_columns)


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
    centre: Any = start_value(name, raw, owner, x, y)
    sd = PRIOR_SD.get(name, OTHER_SD)
    columns = columns_of(owner, x)
    if name == "period_length":  # not where y has its strongest wave: a prior has not seen that
        centre = LENGTH_SHARE * extent_of(columns, raw) * torch.ones_like(raw)
    if name == "lengthscale" and not isinstance(owner, PeriodicKernel):
        centre = centre * math.sqrt(columns.shape[-1])  # distances grow with the number of columns
    if name == "outputscale":
        centre = variance * torch.ones_like(raw)
    if name == "variance" and isinstance(owner, LinearKernel | Line):
        spread = columns.var(0).sum() if len(columns) > 1 else columns.new_zeros(())
        centre = variance / torch.where(spread > 0, spread, 1.0) * torch.ones_like(raw)
    if name == "location":
        return centre, extent_of(columns, raw)
    if name in ("constant", "bias"):
        return centre, float(variance_of(y).sqrt())
    if name == "weights":
        spread = columns.std(0, correction=0)
        unit = variance_of(y).sqrt() / torch.where(spread > 0, spread, 1.0)
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
                "element by element: such a prior is not supported. Register it on the parameter itself"
            )
        real = owner.constraint_for_parameter_name(f"raw_{name}") is None
        one = torch.ones_like(raw).detach()
        if isinstance(prior, torch.distributions.LogNormal if not real else torch.distributions.Normal):
            return prior.loc.to(raw) * one, prior.scale.to(raw) * one
        return prior
    return None


def _with_parameters(prefix: str, module: Any, x: Tensor, y: Tensor) -> Any:
    """A copy of a gpytorch module whose free parameters are `pyro.param`s, and the known ones in the dtype of x."""
    module = with_own_algebra(_copy(module, x))
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
    return new


def _first(name: str, raw: Tensor, owner: Any, module: Any, x: Tensor, y: Tensor) -> Tensor:
    """An initial value: the centre of the prior, but for periods, of which one is looked for in y."""
    raw = raw.detach().to(x)
    if name == "period_length":
        return start_value(name, raw, owner, x, y)
    variance = _variances(module, variance_of(y)).get(id(owner)) if isinstance(module, Kernel) else None
    return _centre(name, raw, owner, x, y, variance)[0]


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


def _learned_noise(y: Tensor) -> tuple[Tensor, float]:
    """The parameter "noise", () or (B,) of several parameter values side by side, and its floor."""
    # Once made it keeps the floor of the rows that it was made on. The public way to a constraint changes the store.
    bound = pyro.get_param_store()._constraints.get("noise")
    if isinstance(bound, noise_above):
        return pyro.param("noise"), bound.lower_bound
    variance = variance_of(y)
    floor = float(FLOOR * variance)
    return pyro.param("noise", NOISE_SHARE * variance, noise_above(floor)), floor
