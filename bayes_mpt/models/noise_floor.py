"""The least noise that is learned beside a kernel, with no trace of it where the observations have noise.

    noise = (exp(4 u) + floor^4)^(1/4),    u the unconstrained parameter

From 1e4 floors on this is exp(u) to the last bit of float64, and it is smooth on the way down to the floor.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.transforms import Transform

__all__ = ["above_rounding", "noise_above"]

ROUNDING = 1e-11  # of k(x, x), the least noise beside it: the Cholesky factor of 4096 rows needs 3e-12
MAX_LIFT = 100  # floors, to which a large k(x, x) lifts the noise: more would stand for the noise of the observations


class noise_above(constraints.greater_than):
    """The constraint of a noise variance that cannot fall below ``lower_bound``.

    Parameters
    ----------
    lower_bound : float
        The floor.

    Examples
    --------
    >>> u = torch.tensor([-30.0, 0.0], dtype=torch.float64)
    >>> transform_to(noise_above(1e-8))(u)
    tensor([1.0000e-08, 1.0000e+00], dtype=torch.float64)
    """


class _Floor(Transform):
    """u to noise, see above."""

    domain = constraints.real
    bijective = True
    sign = 1

    def __init__(self, floor: float):
        super().__init__()
        self.floor = floor
        self.codomain = noise_above(floor)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Floor) and other.floor == self.floor

    def __hash__(self) -> int:
        return hash((_Floor, self.floor))

    def _call(self, x: Tensor) -> Tensor:
        top = x.exp()
        # whichever is larger stands before the root, so that no fourth power overflows
        low = self.floor * (1 + (top.clamp(max=self.floor) / self.floor) ** 4) ** 0.25
        high = top.clamp(min=self.floor)
        return torch.where(top < self.floor, low, high * (1 + (self.floor / high) ** 4) ** 0.25)

    def _inverse(self, y: Tensor) -> Tensor:
        share = (1 - (self.floor / y) ** 4).clamp(min=torch.finfo(y.dtype).tiny)
        return y.log() + 0.25 * share.log()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log d noise / du = 4 u - 3 log noise."""
        return 4 * x - 3 * y.log()


for _registry in (biject_to, transform_to):
    _registry.register(noise_above, lambda constraint: _Floor(constraint.lower_bound))


def above_rounding(noise: Tensor, floor: float, own: Tensor) -> Tensor:
    """The noise of each row ([B,] N) beside the variance that the kernel gives it, ``own`` ([B,] N).

        (noise^4 + lift^4)^(1/4),    1 / lift = 1 / (ROUNDING k(x, x)) + 1 / (MAX_LIFT floor)

    Parameters
    ----------
    noise : tensor of shape () or (B,)
        Learned, above ``floor``; of several parameter values side by side.
    """
    own = ROUNDING / floor * own
    lift = own / (1 + own / MAX_LIFT)  # in floors
    noise = noise[..., None]
    return noise * (1 + (lift * (floor / noise)) ** 4) ** 0.25
