"""Rules of nodes and weights: Gauss-Hermite products, even steps as far as a density reaches, Sobol points."""

from __future__ import annotations

import math
from functools import cache
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import roots_hermite
from scipy.stats import chi2, norm, qmc
from torch import Tensor

__all__ = [
    "Detail",
    "Rule",
    "alone_rule",
    "degrees_of",
    "far_rule",
    "hermite",
    "log_t",
    "row_rule",
    "stretched",
    "unstretched",
]

Detail = Literal["rough", "usual", "fine", "panels"]
"""Of nodes inside a row or group: fine ones show the error of the usual, rough ones serve where little is.

Panels take the place of fine nodes where the density of one latent jumps or bends.
"""

DEGREES = 5.0  # of freedom of draws around a mode, at least
MAX_HERMITE = 4  # latents of a row, given those of the data set, up to which a product rule integrates them
ROW_NODES = {0: 1, 1: 16, 2: 8, 3: 6, 4: 5}  # of that rule along each axis
ROUGH_NODES = {0: 1, 1: 8, 2: 4, 3: 4, 4: 3}  # where little of the integral is
ROW_DRAWS = 128  # points where there are more
ROUGH_DRAWS = 32
# nodes along each axis of a rule that reaches as far as the density does
FAR_NODES: dict[Detail, dict[int, int]] = {
    "rough": {1: 13, 2: 9, 3: 7, 4: 5},
    "usual": {1: 25, 2: 13, 3: 9, 4: 7},
    "fine": {1: 41, 2: 25, 3: 13, 4: 9},
}
ALONE_FAR = {
    1: (61, 101),
    2: (21, 33),
    3: (13, 17),
    4: (9, 13),
}  # where no other latents take nodes; the finer
CUT: dict[Detail, float] = {
    "rough": 15.0,
    "usual": 18.0,
    "fine": 25.0,
    "panels": 25.0,
}  # nats below the mode, where it ends
EVEN = (0.5, 2.0)  # standard deviations up to which its nodes are even: of a long tail, and of none
LONG = 32.0  # of them, from which a tail is long


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


class Rule(NamedTuple):
    """Points and log-weights inside a row."""

    t: Tensor
    """(Q, d): in units of the posterior's root, or from -1 to 1 between the ends of what the density reaches."""
    log_weight: Tensor
    """(Q,)"""
    cut: float | None = None
    """Nats below the mode where these ends are; None where points are in units of the root."""


@cache
def far_rule(width: int, n_nodes: int, cut: float) -> Rule:
    """Even points s (Q, d) from -1 to 1 along each axis, for `stretched`."""
    one = np.linspace(-1, 1, n_nodes)
    s = torch.as_tensor(np.array(list(product(one, repeat=width))).reshape(n_nodes**width, width))
    return Rule(s, torch.full((len(s),), width * math.log(2 / (n_nodes - 1)), dtype=torch.float64), cut)


def stretched(s: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Points t (..., d), in units of the posterior's root, and log dt/ds (...) at s (..., d) from -1 to 1.

        t = c sinh(v),    v even between -asinh(low / c) and asinh(high / c)

    (Takahasi & Mori 1974), where a density reaches to ``low`` and ``high``, (..., d, 2), on the two sides of its mode.
    In even steps of v the sum of a smooth function falls off with exp(-const / step). With 25 points the error is
    below 1e-3 nats of the log odds of Beta(a, b), with a from 0.01 on and any b, and of a Student-t of one degree of
    freedom, and with 61 below 1e-4; 64 Hermite nodes have 0.2 and 0.06.

    Examples
    --------
    >>> s = torch.linspace(-1, 1, 41, dtype=torch.float64)[:, None]
    >>> t, log_step = stretched(s, torch.tensor([[8.0, 8.0]], dtype=torch.float64))
    >>> sum_of = (2 / 40 * (log_step - 0.5 * t[:, 0].square()).exp()).sum()
    >>> float(sum_of) / math.sqrt(2 * math.pi)
    1.0000000...
    """
    c, middle, half = _spans(reach)
    v = middle + half * s
    return c * v.sinh(), (half * c * v.cosh()).log().sum(-1)


def unstretched(t: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """s (..., d) and log dt/ds (...) of points t (..., d): what `stretched` has made them of.

    Examples
    --------
    >>> reach = torch.tensor([[8.0, 40.0]])
    >>> unstretched(stretched(torch.tensor([[0.3]]), reach)[0], reach)[0]
    tensor([[0.3000]])
    """
    c, middle, half = _spans(reach)
    v = (t / c).asinh()
    return (v - middle) / half, (half * c * v.cosh()).log().sum(-1)


def _spans(reach: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c, and the middle and half of the length of the way of v, (..., d) each."""
    c = (LONG / reach.amax(-1)).clamp(*EVEN)
    end = (reach / c[..., None]).asinh()
    return c, 0.5 * (end[..., 1] - end[..., 0]), 0.5 * end.sum(-1)


def alone_rule(width: int, fine: bool) -> Rule:
    """That which reaches far, in rows or groups beside which no other latents take nodes."""
    return far_rule(width, ALONE_FAR[width][fine], CUT["fine"])


@cache
def row_rule(width: int, detail: Detail, far: bool = False) -> Rule:
    """Points and log-weights inside a row: of up to four latents the fine ones reach far, and with ``far`` all."""
    detail = "fine" if detail == "panels" else detail
    if 0 < width <= MAX_HERMITE and (far or detail == "fine"):
        return far_rule(width, FAR_NODES[detail][width], CUT[detail])
    if width <= MAX_HERMITE:
        return Rule(*hermite(width, (ROUGH_NODES if detail == "rough" else ROW_NODES)[width]))
    # the same Sobol points for all rows and nodes, so that what they give is smooth in the latents of the data set
    n_points = {"rough": ROUGH_DRAWS, "usual": ROW_DRAWS, "fine": 8 * ROW_DRAWS}[detail]
    point = qmc.Sobol(width + 1, seed=0).random(n_points)
    degrees = degrees_of(width)
    t = torch.as_tensor(norm.ppf(point[:, :-1]) * np.sqrt(degrees / chi2.ppf(point[:, -1:], degrees)))
    return Rule(t, -log_t(t, degrees) - math.log(n_points))
