"""What a climb of a mixture may have left: how much each parameter by itself still has to gain.

EM's step from one component (w, m, S = L L') goes to (w', m', S'). In the component's own units it moves the centre by
d = L^-1 (m' - m) and the covariance by D = L^-1 S' L'^-1 - I. With shares r of the rows, of which the mean over rows is
w, a step of one in a natural parameter there has the slope and the information (nats a row)

    centre:  w d_i,  w p            covariance:  w D_ij,  w p  (i < j),    w D_ii / 2,  w p / 2
    weight:  w' - w,  w (p - w)

where p = sum r^2 / sum r is about the share of the information that is left where it is not known whose the rows are.
A parameter by itself has slope^2 / (2 information) to gain.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bayes_mpt.models.gaussians import MIN_WEIGHT, Gaussians
from bayes_mpt.models.left_out import Key, Shares, plain_shares

__all__ = ["Purity", "left_to_gain", "squares_of"]

LEAST = 0.01  # of p: a component all of whose rows are others'


class Purity:
    """How components share rows, as ``of`` says; with the sums of the shares' squares (..., K)."""

    squares: Tensor

    def __init__(self, of: Shares = plain_shares):
        self.of, self.squares = of, torch.zeros(())

    def __call__(
        self, key: Key, log_prob: Tensor, square: Callable[[], Tensor], n_cells: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `bayes_mpt.models.left_out.Shares`."""
        share, density = self.of(key, log_prob, square, n_cells)
        self.squares = squares_of(share) + self.squares.to(share)
        return share, density


def squares_of(share: Tensor) -> Tensor:
    """The sums (..., K) over rows of the squares of shares (..., K, n)."""
    return torch.linalg.vector_norm(share, dim=-1).square()


def left_to_gain(before: Gaussians, after: Gaussians, squares: Tensor, n_rows: Tensor) -> Tensor:
    """The most that a parameter of each mixture (...) has to gain by itself, nats a row.

    Parameters
    ----------
    before, after : Gaussians
        Mixtures (..., K components), and where a step of EM goes from there.
    squares : Tensor of shape (..., K)
        As `Purity` has summed them before the step.
    n_rows : Tensor of shape (...)

    Examples
    --------
    >>> wide = Gaussians(torch.ones(1), torch.zeros(1, 1), torch.ones(1, 1))
    >>> aside = wide._replace(loc=torch.full((1, 1), 0.5))
    >>> n_rows = torch.tensor(100.0)
    >>> left_to_gain(wide, aside, n_rows[None], n_rows)  # of N(x; m, 1) with the mean 1/2: m^2 / 2
    tensor(0.1250)
    """
    weight = before.weights
    pure = (squares / (n_rows[..., None] * weight)).clamp(min=LEAST, max=1.0)  # (..., K)
    share, moved = weight / pure, after.loc - before.loc
    if before.dense:
        centre = torch.linalg.solve_triangular(before.scale, moved[..., None], upper=False)[..., 0]
        root = torch.linalg.solve_triangular(before.scale, after.scale, upper=False)
        change = root @ root.mT
        change.diagonal(dim1=-2, dim2=-1).sub_(1.0)
        each = change.square() * (0.5 - 0.25 * torch.eye(change.shape[-1]).to(change))
        of_scale = each.flatten(-2).amax(-1)
    else:
        centre = moved / before.scale
        change = (after.scale / before.scale).square() - 1
        alike = before.loc.shape[-1] // before.scale.shape[-1]  # columns that have one variance
        of_scale = 0.25 * alike * change.square().amax(-1)
    gain = share * torch.maximum(0.5 * centre.square().amax(-1), of_scale)
    if weight.shape[-1] > 1:
        rest = (pure - weight).clamp(min=LEAST)
        gain = torch.maximum(gain, (after.weights - weight).square() / (2 * weight * rest))
    return torch.where(weight > MIN_WEIGHT, gain, 0.0).amax(-1)
