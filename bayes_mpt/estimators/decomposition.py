"""A fitted Gaussian process in its additive parts, as functions and in words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from gpytorch.kernels import (
    AdditiveKernel,
    Kernel,
    MaternKernel,
    PeriodicKernel,
    ProductKernel,
    RBFKernel,
    RQKernel,
    ScaleKernel,
)
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import check_array
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from bayes_mpt.inputs import read_table, tensor_of, wanted
from bayes_mpt.models import GaussianProcess
from bayes_mpt.models.kernels import kernel_name, lines_meet
from bayes_mpt.runtime.serial import takes_turns

if TYPE_CHECKING:
    from bayes_mpt.estimators.bayes_mpt import BayesMPT

__all__ = ["Decomposition", "decompose", "describe", "process_of"]


class Decomposition(NamedTuple):
    """A series in its additive parts: m(x) and one function for each summand of the kernel."""

    names: list[str]
    """Of the J summands."""
    mean: NDArray[np.float64]
    """(J, M) posterior means; with ``offset`` they sum to the prediction."""
    sd: NDArray[np.float64]
    """(J, M) posterior standard deviations, each part alone."""
    offset: NDArray[np.float64]
    """(M,) the mean function."""
    noise_sd: NDArray[np.float64]
    """(M,)"""

    @property
    def total(self) -> NDArray[np.float64]:
        """The prediction (M,)."""
        return self.offset + self.mean.sum(0)


@takes_turns
def decompose(estimator: BayesMPT, X: ArrayLike | None = None) -> Decomposition:
    """Split the prediction of a Gaussian process into the summands of its kernel, each given the training rows.

        f_j | y ~ N(K_j (K + noise)^-1 (y - m), K_j** - K_j (K + noise)^-1 K_j'),    K = sum_j K_j

    Parameters
    ----------
    estimator : BayesMPT
        A fitted `bayes_mpt.models.GaussianProcess` with Gaussian noise.
    X : array-like of shape (M, P), optional
        Where; by default at the training rows.

    Returns
    -------
    Decomposition
    """
    check_is_fitted(estimator)
    words = "only a GaussianProcess with Gaussian noise has additive parts"
    program = process_of(estimator.fitted_model_, words)
    if program.likelihood_function is not None:
        raise TypeError(f"{words}, got {program!r}")
    x, y = _seen(estimator)
    new = x if X is None else tensor_of(check_array(read_table(X), dtype=np.float64)).to(x)
    with torch.no_grad():
        kernel, mean, noise = program.at(estimator.params_, x)
        noise_new = program.at(estimator.params_, new)[2]
        x, new = program.inputs(x), program.inputs(new)
        cov = kernel(x).to_dense() + torch.diag(noise)
        root = torch.linalg.cholesky(cov)
        white = torch.linalg.solve_triangular(root, (y - mean(x))[:, None], upper=False)
        means, sds, names = [], [], []
        for part in _summands(kernel):
            across = torch.linalg.solve_triangular(root, part(x, new).to_dense(), upper=False)  # (N, M)
            means.append((across.mT @ white)[:, 0])
            alone = part(new, new, diag=True)
            sds.append((alone - across.square().sum(0)).clamp(min=0).sqrt())
            names.append(kernel_name(part))
        as_array = lambda t: t.cpu().numpy()  # noqa: E731
        return Decomposition(
            names,
            as_array(torch.stack(means)),
            as_array(torch.stack(sds)),
            as_array(mean(new)),
            as_array((torch.zeros(len(new)).to(new) + noise_new).sqrt()),
        )


def process_of(program: Any, words: str) -> GaussianProcess:
    """A program that is a Gaussian process; what is none is refused with ``words``."""
    return wanted(GaussianProcess, program, words)


def _seen(model: BayesMPT) -> tuple[Tensor, Tensor]:
    """Training rows whose y was observed."""
    if model.fitted_.seen is None:
        raise TypeError(f"{model.predictor_.name} does not predict from training rows")
    x, y = model.fitted_.seen
    y = y.reshape(len(x)).to(x)
    return x[~y.isnan()], y[~y.isnan()]


def _summands(kernel: Kernel) -> list[Kernel]:
    return list(kernel.kernels) if isinstance(kernel, AdditiveKernel) else [kernel]


@takes_turns
def describe(model: BayesMPT, unit: str = "") -> str:
    """The kernel of a fitted Gaussian process in words, from its hyper-parameters."""
    x, _ = _seen(model)
    program = process_of(model.fitted_model_, "only the kernel of a GaussianProcess has words")
    kernel, _, noise = program.at(model.params_, x)
    several = x.shape[1] > 1
    words = [_in_words(k, x, unit, several) for k in _summands(kernel)]
    return ", plus ".join([*words, f"noise of sd {_number(float(noise.mean().sqrt()))}"])


# ---------------------------------------------------------------------------------------------------------- words


def _in_words(kernel: Kernel, x: Tensor, unit: str, several: bool) -> str:
    """One summand: what leads it, and what the other factors do to that."""
    while isinstance(kernel, ScaleKernel):
        kernel = kernel.base_kernel
    factors = list(kernel.kernels) if isinstance(kernel, ProductKernel) else [kernel]
    order = [PeriodicKernel, RBFKernel, MaternKernel, RQKernel]
    factors.sort(key=lambda k: next((i for i, c in enumerate(order) if isinstance(k, c)), len(order)))
    lines = [k for k in factors if lines_meet(k) is not None]
    if len(lines) == len(factors):
        shapes = ["a straight line", "a parabola", "a cubic"]
        out = shapes[len(lines) - 1] if len(lines) <= 3 else f"a polynomial of degree {len(lines)}"
        return out + _where(factors[0], several)
    lead, rest = factors[0], factors[1:]
    out = _leading(lead, x, unit) + _where(lead, several)
    for k in rest:
        out += f" {_changing(k, unit)}{_where(k, several)}"
    return out


def _leading(kernel: Kernel, x: Tensor, unit: str) -> str:
    if isinstance(kernel, PeriodicKernel):
        return f"a period of {_quantity(kernel.period_length, unit)}"
    if isinstance(kernel, RBFKernel):
        long = float(kernel.lengthscale.min()) > float(np.ptp(x.cpu().numpy(), 0).max()) / 8
        return f"a smooth {'trend' if long else 'curve'} over {_quantity(kernel.lengthscale, unit)}"
    if isinstance(kernel, MaternKernel):
        kind = {0.5: "rough", 1.5: "once differentiable", 2.5: "twice differentiable"}[kernel.nu]
        return f"a {kind} curve over {_quantity(kernel.lengthscale, unit)}"
    if isinstance(kernel, RQKernel):
        return f"a curve over many scales around {_quantity(kernel.lengthscale, unit)}"
    return kernel_name(kernel)


def _changing(kernel: Kernel, unit: str) -> str:
    if isinstance(kernel, PeriodicKernel):
        return f"that recurs every {_quantity(kernel.period_length, unit)}"
    zero = lines_meet(kernel)
    if zero is not None:
        at = _quantity(zero, unit) if isinstance(zero, Tensor) else "0"
        return f"whose amplitude grows linearly from zero at {at}"
    if isinstance(kernel, RBFKernel):
        return f"that slowly changes over {_quantity(kernel.lengthscale, unit)}"
    if isinstance(kernel, MaternKernel):
        return f"that changes, not smoothly, over {_quantity(kernel.lengthscale, unit)}"
    if isinstance(kernel, RQKernel):
        return f"that changes over many scales around {_quantity(kernel.lengthscale, unit)}"
    return f"times {kernel_name(kernel)}"


def _where(kernel: Kernel, several: bool) -> str:
    if not several or kernel.active_dims is None:
        return ""
    return f" along column {', '.join(map(str, kernel.active_dims.tolist()))}"


def _quantity(value: Tensor, unit: str) -> str:
    numbers = ", ".join(_number(float(v)) for v in value.flatten())
    return f"{numbers} {unit}".strip()


def _number(value: float) -> str:
    """Three digits, without powers of ten where they can be avoided."""
    if value == 0 or not 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
