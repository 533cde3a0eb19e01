"""Rules of nodes and weights: Gauss-Hermite products, Sobol points of a Student-t."""

from __future__ import annotations

import math
from functools import cache
from itertools import product
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import roots_hermite
from scipy.stats import chi2, norm, qmc
from torch import Tensor

__all__ = ["Detail", "degrees_of", "far_rule", "hermite", "log_t", "row_rule"]

Detail = Literal["rough", "usual", "fine"]
"""Of nodes inside a row or group: fine ones show the error of the usual, rough ones serve where little is."""

DEGREES = 5.0  # of freedom of draws around a mode, at least
MAX_HERMITE = 4  # latents of a row, given those of the data set, up to which a product rule integrates them
ROW_NODES = {0: 1, 1: 16, 2: 8, 3: 6, 4: 5}  # of that rule along each axis
ROUGH_NODES = {0: 1, 1: 8, 2: 4, 3: 4, 4: 3}  # where little of the integral is
ROW_DRAWS = 128  # points where there are more
ROUGH_DRAWS = 32
FAR = 200.0  # standard deviations, of a rule for tails that fall slowly
STRETCH = 2.0  # of them, to which its nodes are even
FAR_NODES: dict[Detail, int] = {"rough": 21, "usual": 41, "fine": 81}  # of it


@cache
def hermite(width: int, n_nodes: int) -> tuple[Tensor, Tensor]:
    """Points t (Q, d) in units of the posterior's root, and log-weights (Q,) of a density there.

    The integral of f is sum_q exp(log_weight_q) |root| f(mode + root t_q), exact where f is the Gaussian times a
    polynomial of degree 2 n - 1 along each axis.
    """
    one = roots_hermite(n_nodes)[0]
    t = np.array(list(product(one, repeat=width))).reshape(n_nodes**width, width)
    log_w = np.array([sum(c) for c in product(_log_weight(one), repeat=width)])
    return torch.as_tensor(math.sqrt(2) * t), torch.as_tensor(log_w + 0.5 * width * math.log(2))


def _log_weight(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """log (w_q exp(x_q^2)) = -log n - 2 log |psi_{n-1}(x_q)| at the n roots x (n,) of the Hermite polynomial H_n.

    By the recursion of the Hermite functions,

        psi_0 = pi^(-1/4) exp(-x^2 / 2),    psi_{k+1} = sqrt(2 / (k + 1)) x psi_k - sqrt(k / (k + 1)) psi_{k-1}

    with the scale kept apart, since w underflows from 371 nodes on.
    """
    before, now, log_scale = np.zeros_like(x), np.ones_like(x), -0.5 * np.square(x) - 0.25 * math.log(math.pi)
    for k in range(len(x) - 1):
        before, now = now, math.sqrt(2 / (k + 1)) * x * now - math.sqrt(k / (k + 1)) * before
        size = np.maximum(np.abs(now), np.abs(before))
        before, now, log_scale = before / size, now / size, log_scale + np.log(size)
    return -math.log(len(x)) - 2 * (np.log(np.abs(now)) + log_scale)


def degrees_of(width: int) -> float:
    """Of freedom: in many dimensions the radius hardly varies, and that of few degrees would miss it."""
    return max(DEGREES, 2.0 * width)


def log_t(t: Tensor, degrees: float = DEGREES) -> Tensor:
    """Log-density of a multivariate Student-t of unit scale: (..., d) -> (...).

    That of `pyro.distributions.MultivariateStudentT` at scale I, kept by hand: Pyro's solves with a copy of its (d, d)
    scale for every t, d times the memory and 30 times the seconds at d = 30, and wants a lower triangular scale, which
    the root of a covariance is not.
    """
    width = t.shape[-1]
    return (
        math.lgamma((degrees + width) / 2)
        - math.lgamma(degrees / 2)
        - width / 2 * math.log(degrees * math.pi)
        - (degrees + width) / 2 * torch.log1p(t.square().sum(-1) / degrees)
    )


@cache
def far_rule(n_nodes: int) -> tuple[Tensor, Tensor]:
    """Points and log-weights along one axis, as `hermite`, that reach 200 standard deviations.

        int f(t) dt = h sum_s cosh(s / c) f(c sinh(s / c)),    c = 2, in equal steps h of s

    (Takahasi & Mori 1974). With 81 nodes the error is below 1e-9 nats of a Gaussian and of two of them four standard
    deviations apart, 7e-8 of the logarithm of odds of Beta(0.05, 0.05), where 32 Hermite nodes have 3e-2, and 3e-7 of a
    Student-t of 3 degrees of freedom, where they have 3e-3.
    """
    end = STRETCH * math.asinh(FAR / STRETCH)
    s = torch.linspace(-end, end, n_nodes, dtype=torch.float64)
    step = 2 * end / (n_nodes - 1)
    return STRETCH * (s / STRETCH).sinh()[:, None], (step * (s / STRETCH).cosh()).log()


@cache
def row_rule(width: int, detail: Detail, far: bool = False) -> tuple[Tensor, Tensor]:
    """Points and log-weights inside a row, as `hermite`.

    Of one latent the fine ones reach far, and with ``far`` the others too.
    """
    fine = detail == "fine"
    if width == 1 and (fine or far):
        return far_rule(FAR_NODES[detail])
    if width <= MAX_HERMITE:
        n_nodes = (ROUGH_NODES if detail == "rough" else ROW_NODES)[width]
        return hermite(width, (2 * n_nodes if width <= 2 else n_nodes + 3) if fine else n_nodes)
    # the same Sobol points for all rows and nodes, so that what they give is smooth in the latents of the data set
    n_points = {"rough": ROUGH_DRAWS, "usual": ROW_DRAWS, "fine": 8 * ROW_DRAWS}[detail]
    point = qmc.Sobol(width + 1, seed=0).random(n_points)
    degrees = degrees_of(width)
    t = torch.as_tensor(norm.ppf(point[:, :-1]) * np.sqrt(degrees / chi2.ppf(point[:, -1:], degrees)))
    return t, -log_t(t, degrees) - math.log(n_points)
