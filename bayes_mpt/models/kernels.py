"""Kernels of Gaussian processes: scikit-learn's read as gpytorch's, two more, and their names in words."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from gpytorch.constraints import Positive
from gpytorch.kernels import (
    AdditiveKernel,
    ConstantKernel,
    Kernel,
    LinearKernel,
    MaternKernel,
    PeriodicKernel,
    ProductKernel,
    RBFKernel,
    RQKernel,
    ScaleKernel,
)
from gpytorch.kernels.kernel import sq_dist
from linear_operator import to_dense
from sklearn.gaussian_process import kernels as theirs
from torch import Tensor

__all__ = [
    "Line",
    "Power",
    "check_columns",
    "from_sklearn",
    "kernel_name",
    "lines_meet",
    "named_kernel",
    "with_own_algebra",
]

NAMES = {RBFKernel: "RBF", RQKernel: "RQ", PeriodicKernel: "Periodic", LinearKernel: "Linear"}
NAMED = {
    "rbf": RBFKernel,
    "matern": partial(MaternKernel, nu=2.5),
    "rational quadratic": RQKernel,
    "periodic": PeriodicKernel,
    "linear": LinearKernel,
}
"""Kernels that a word stands for, at their defaults."""
MAX_COLUMNS = 3  # of which squared distances are summed difference by difference
HALVES = {0.5: "1/2", 1.5: "3/2", 2.5: "5/2"}


class Line(Kernel):
    """Straight lines through an unknown place: k(x, x') = variance (x - location) . (x' - location).

    Parameters
    ----------
    n_columns : int, default=1
        Of x, or of its ``active_dims``.

    Examples
    --------
    >>> Line()(torch.tensor([[0.0], [2.0]])).to_dense().detach()  # at first variance log 2, location 0
    tensor([[0.0000, 0.0000],
            [0.0000, 2.7726]])
    """

    def __init__(self, n_columns: int = 1, **kwargs: Any):
        super().__init__(**kwargs)
        self.register_parameter("raw_variance", torch.nn.Parameter(torch.zeros(*self.batch_shape, 1)))
        self.register_parameter("location", torch.nn.Parameter(torch.zeros(*self.batch_shape, 1, n_columns)))
        self.register_constraint("raw_variance", Positive())

    @property
    def variance(self) -> Tensor:
        """Of the slope."""
        return self.raw_variance_constraint.transform(self.raw_variance)

    @variance.setter
    def variance(self, value: Tensor | float) -> None:
        value = torch.as_tensor(value).to(self.raw_variance)
        self.initialize(raw_variance=self.raw_variance_constraint.inverse_transform(value))

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        a, b = x1 - self.location, x2 - self.location
        if diag:
            return self.variance * (a * b).sum(-1)
        return self.variance[..., None] * (a @ b.mT)


class Power(Kernel):
    """A kernel to a power, element by element: an integer one, or the kernel must be infinitely divisible.

    Parameters
    ----------
    base_kernel : gpytorch.kernels.Kernel
    exponent : float
    """

    def __init__(self, base_kernel: Kernel, exponent: float):
        super().__init__()
        self.base_kernel = base_kernel
        self.exponent = exponent

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        return to_dense(self.base_kernel(x1, x2, diag=diag, **params)) ** self.exponent


def with_own_algebra(kernel: Kernel) -> Kernel:
    """Replace, in place, what gpytorch computes with a needless loss.

    Distances, see `covar_dist`; a power, for which logarithms are faster; and sums with a LinearKernel, for which
    gpytorch factorises the rest of the sum at every evaluation, with jitter, only to keep a root that is not asked for.
    """
    for part in kernel.modules():
        if isinstance(part, Kernel):
            part.covar_dist = covar_dist
        if isinstance(part, LinearKernel):
            part.forward = partial(_linear, part)
        if isinstance(part, RQKernel):
            part.forward = partial(_rational, part)
    return kernel


def _linear(kernel: LinearKernel, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
    if diag:
        return (kernel.variance[..., 0] * x1 * x2).sum(-1)
    return (kernel.variance * x1) @ x2.mT


def _rational(
    kernel: RQKernel,
    x1: Tensor,
    x2: Tensor,
    diag: bool = False,
    last_dim_is_batch: bool = False,
    **params: Any,
) -> Tensor:
    square = covar_dist(x1 / kernel.lengthscale, x2 / kernel.lengthscale, diag, last_dim_is_batch, True)
    alpha = kernel.alpha if diag else kernel.alpha[..., None]
    alpha = alpha[..., None] if last_dim_is_batch else alpha
    return (-alpha * (1 + square / (2 * alpha)).log()).exp()  # a power takes twice as long


def covar_dist(
    x1: Tensor,
    x2: Tensor,
    diag: bool = False,
    last_dim_is_batch: bool = False,
    square_dist: bool = False,
    **params: Any,
) -> Tensor:
    """Distances between the rows of x1 (..., N, P) and x2 (..., M, P), to stand in a kernel for gpytorch's own.

    gpytorch expands |a - b|^2 into products, whose error, eps (range / length-scale)^2, is no longer small once its
    root is taken: repeated inputs come to lie apart. Here differences are taken first, except where many columns make
    that slow and no root follows.
    """
    if last_dim_is_batch:
        x1, x2 = x1.mT[..., None], x2.mT[..., None]
    if diag:
        out = (x1 - x2).norm(dim=-1)
        return out.square() if square_dist else out
    if square_dist and x1.shape[-1] > MAX_COLUMNS:
        return sq_dist(x1, x2, x1_eq_x2=torch.equal(x1, x2))
    if x1.shape[-1] == 1:
        gap = x1 - x2.mT
        return gap.square() if square_dist else gap.abs()
    if x1.device.type != "cpu":  # where cdist takes longer than a Cholesky factor of the same size
        square = sum((a - b.mT).square() for a, b in zip(x1.split(1, -1), x2.split(1, -1), strict=True))
        # a root has no slope at zero, unless zero is the least number instead
        return square if square_dist else square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()
    out = torch.cdist(x1, x2, compute_mode="donot_use_mm_for_euclid_dist")
    return out.square() if square_dist else out


def named_kernel(name: str, n_columns: int) -> Kernel:
    """The kernel of a name in `NAMED`, with a scale and a length-scale for each column.

    Examples
    --------
    >>> kernel_name(named_kernel("matern", 2)), named_kernel("rbf", 2).base_kernel.lengthscale.shape
    ('Matern 5/2', torch.Size([1, 2]))
    """
    if name == "linear":  # whose slope has a variance of its own
        return LinearKernel()
    return ScaleKernel(NAMED[name](ard_num_dims=n_columns))


# ------------------------------------------------------------------------------------------------ scikit-learn's


def from_sklearn(kernel: theirs.Kernel, n_columns: int = 1) -> tuple[Kernel | None, float | None]:
    """A kernel expression of `sklearn.gaussian_process.kernels` as gpytorch's, its white noise apart.

    Parameters
    ----------
    kernel : sklearn.gaussian_process.kernels.Kernel
        Sums, products and powers of ConstantKernel, RBF, Matern (nu 1/2, 3/2, 5/2, inf), RationalQuadratic,
        ExpSineSquared (of one column), DotProduct, and WhiteKernel as a summand.
    n_columns : int
        Of x.

    Returns
    -------
    kernel : gpytorch.kernels.Kernel or None
        At the expression's values; None where it holds nothing but noise. Hyper-parameters with "fixed" bounds do not
        require gradients; the other bounds are dropped.
    noise : float or None
        The noise level of a WhiteKernel whose bounds are "fixed"; None: it is free.

    Raises
    ------
    ValueError
        If there is no such kernel here; the message says why.

    Examples
    --------
    >>> kernel_name(from_sklearn(2.0 * theirs.RBF(3.0) + theirs.WhiteKernel())[0])
    'RBF'
    """
    terms = _summands(kernel)
    white = [t for t in terms if isinstance(t, theirs.WhiteKernel)]
    if len(white) > 1:
        raise ValueError(f"{kernel} has {len(white)} WhiteKernels: only their sum can be known, so give one")
    rest = [_translate(t, n_columns) for t in terms if not isinstance(t, theirs.WhiteKernel)]
    noise = float(white[0].noise_level) if white and white[0].hyperparameter_noise_level.fixed else None
    if not rest:
        return None, noise
    return (rest[0] if len(rest) == 1 else AdditiveKernel(*rest)), noise


def _summands(kernel: theirs.Kernel) -> list[theirs.Kernel]:
    if isinstance(kernel, theirs.Sum):
        return [*_summands(kernel.k1), *_summands(kernel.k2)]
    return [kernel]


def _factors(kernel: theirs.Kernel) -> list[theirs.Kernel]:
    if isinstance(kernel, theirs.Product):
        return [*_factors(kernel.k1), *_factors(kernel.k2)]
    return [kernel]


def _translate(kernel: theirs.Kernel, n_columns: int) -> Kernel:
    if isinstance(kernel, theirs.Sum):
        return AdditiveKernel(*(_translate(t, n_columns) for t in _summands(kernel)))
    if isinstance(kernel, theirs.Product):
        factors = _factors(kernel)
        level = [f for f in factors if isinstance(f, theirs.ConstantKernel)]
        rest = [_translate(f, n_columns) for f in factors if not isinstance(f, theirs.ConstantKernel)]
        if not rest:
            rest, level = [_translate(level[0], n_columns)], level[1:]
        out = rest[0] if len(rest) == 1 else ProductKernel(*rest)
        for f in level:
            out = _set(ScaleKernel(out), f, outputscale="constant_value")
        return out
    if isinstance(kernel, theirs.Exponentiation):
        return Power(_translate(kernel.kernel, n_columns), float(kernel.exponent))
    if isinstance(kernel, theirs.ConstantKernel):
        return _set(ConstantKernel(), kernel, constant="constant_value")
    if isinstance(kernel, theirs.Matern):  # which is an RBF to Python
        if kernel.nu == math.inf:
            return _set(RBFKernel(ard_num_dims=_ard(kernel)), kernel, lengthscale="length_scale")
        if kernel.nu not in HALVES:
            raise ValueError(
                f"Matern with nu={kernel.nu} is not supported: gpytorch has 0.5, 1.5 and 2.5, and RBF for infinity"
            )
        return _set(MaternKernel(nu=kernel.nu, ard_num_dims=_ard(kernel)), kernel, lengthscale="length_scale")
    if isinstance(kernel, theirs.RBF):
        return _set(RBFKernel(ard_num_dims=_ard(kernel)), kernel, lengthscale="length_scale")
    if isinstance(kernel, theirs.RationalQuadratic):
        return _set(RQKernel(), kernel, lengthscale="length_scale", alpha="alpha")
    if isinstance(kernel, theirs.ExpSineSquared):
        if n_columns > 1:
            raise ValueError(
                f"{kernel} takes the distance over all {n_columns} columns, which is no covariance in general: write "
                "gpytorch's PeriodicKernel(active_dims=[0]), say, for a period along one of them"
            )
        # exp(-2 sin^2 / l^2) there, exp(-2 sin^2 / lengthscale) here
        out = _set(PeriodicKernel(), kernel, period_length="periodicity")
        return _set(out, kernel, power=2, lengthscale="length_scale")
    if isinstance(kernel, theirs.DotProduct):
        # sigma_0^2 + x . x', whose slope has no parameter
        slope = LinearKernel().double()
        slope.variance = 1.0
        slope.raw_variance.requires_grad_(False)
        return AdditiveKernel(_set(ConstantKernel(), kernel, power=2, constant="sigma_0"), slope)
    if isinstance(kernel, theirs.WhiteKernel):
        raise ValueError(
            "WhiteKernel is the noise of the observations, so it must be a summand of the whole: write k1 * k2 + "
            "WhiteKernel()"
        )
    raise ValueError(f"there is no translation of {type(kernel).__name__}: write it with gpytorch.kernels")


def _ard(kernel: theirs.RBF) -> int | None:
    return len(kernel.length_scale) if kernel.anisotropic else None


def _set(module: Kernel, kernel: theirs.Kernel, power: int = 1, **names: str) -> Kernel:
    """Give a module a kernel's values; fixed ones are not to be trained."""
    module = module.double()
    for ours, name in names.items():
        value = torch.as_tensor(getattr(kernel, name), dtype=torch.float64) ** power
        module.initialize(**{ours: value})
        if getattr(kernel, f"hyperparameter_{name}").fixed:
            getattr(module, f"raw_{ours}").requires_grad_(False)
    return module


# --------------------------------------------------------------------------------------------------------- checks


def check_columns(kernel: Kernel, n_columns: int) -> None:
    """Refuse kernels that look at columns that x has not.

    Raises
    ------
    ValueError
        With the kernel's name, what it asks for, and what x has.
    """
    if kernel.active_dims is not None:
        most = int(kernel.active_dims.max())
        if most >= n_columns or int(kernel.active_dims.min()) < 0:
            raise ValueError(
                f"kernel {kernel_name(kernel)} has active_dims {kernel.active_dims.tolist()}, but x has {n_columns} "
                f"columns, 0 to {n_columns - 1} (a noise_column not counted)"
            )
        n_columns = len(kernel.active_dims)
    while isinstance(kernel, ScaleKernel):  # its active_dims are its base's, applied once
        if kernel.active_dims is None:
            return check_columns(kernel.base_kernel, n_columns)
        kernel = kernel.base_kernel
    if kernel.ard_num_dims is not None and kernel.ard_num_dims != n_columns:
        raise ValueError(
            f"kernel {kernel_name(kernel)} has {kernel.ard_num_dims} length-scales (ard_num_dims) for the "
            f"{n_columns} columns that it sees (a noise_column not counted)"
        )
    for child in _children(kernel):
        check_columns(child, n_columns)


def _children(kernel: Kernel) -> list[Kernel]:
    if isinstance(kernel, AdditiveKernel | ProductKernel):
        return list(kernel.kernels)
    base = getattr(kernel, "base_kernel", None)
    return [] if base is None else [base]


# ---------------------------------------------------------------------------------------------------------- names


def kernel_name(kernel: Any) -> str:
    """A kernel in a few words; its scales and hyper-parameters are left out.

    Examples
    --------
    >>> kernel_name(
    ...     ScaleKernel(RBFKernel()) + ScaleKernel(PeriodicKernel() * MaternKernel(nu=2.5, active_dims=[1]))
    ... )
    'RBF + Periodic × Matern 5/2[1]'
    """
    if not isinstance(kernel, Kernel | theirs.Kernel):
        return kernel if isinstance(kernel, str) else repr(kernel)
    if isinstance(kernel, theirs.Kernel):
        found, _ = from_sklearn(kernel)
        white = any(isinstance(t, theirs.WhiteKernel) for t in _summands(kernel))
        return " + ".join(
            [*([kernel_name(found)] if found is not None else []), *(["White"] if white else [])]
        )
    if isinstance(kernel, ScaleKernel):
        return kernel_name(kernel.base_kernel)
    if isinstance(kernel, AdditiveKernel):
        return " + ".join(kernel_name(k) for k in kernel.kernels)
    if isinstance(kernel, ProductKernel):
        return " × ".join(_bracketed(k) for k in kernel.kernels)
    if isinstance(kernel, Power):
        return f"({kernel_name(kernel.base_kernel)})^{kernel.exponent:g}"
    if isinstance(kernel, MaternKernel):
        name = f"Matern {HALVES[kernel.nu]}"
    elif isinstance(kernel, Line):
        name = "Linear"
    else:
        name = NAMES.get(type(kernel), type(kernel).__name__.removesuffix("Kernel"))
    columns = "" if kernel.active_dims is None else f"[{','.join(map(str, kernel.active_dims.tolist()))}]"
    return name + columns


def lines_meet(kernel: Kernel) -> Tensor | float | None:
    """Where the straight lines of a kernel are zero, which has a parameter or is 0; None of a kernel of no lines."""
    if isinstance(kernel, Line):
        return kernel.location
    return 0.0 if isinstance(kernel, LinearKernel) else None


def _bracketed(kernel: Kernel) -> str:
    while isinstance(kernel, ScaleKernel):
        kernel = kernel.base_kernel
    return f"({kernel_name(kernel)})" if isinstance(kernel, AdditiveKernel) else kernel_name(kernel)
