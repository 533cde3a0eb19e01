"""Which values a distribution can take: those of torch, and through affine maps and mixtures, where torch says less.

Of loc + scale v torch says that it is a real number, whatever v is. Here v between a and b gives loc + scale a to
loc + scale b, and v above a bound what is above (or, with a scale below 0, below) the bound's own image. Of an angle
it says the same, and its density is periodic: one turn of it, from -pi to pi, holds all of the mass.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import AffineTransform

__all__ = ["before_last", "ends_move", "stripped", "support_of"]

Transformed = torch.distributions.TransformedDistribution
BETWEEN = (type(constraints.unit_interval), type(constraints.half_open_interval(0, 1)))
ABOVE = (type(constraints.positive), type(constraints.nonnegative))
ANGLES = (torch.distributions.VonMises, dist.SineBivariateVonMises)
BELOW = type(constraints.less_than(0))


def support_of(fn: Any) -> Any:
    """The constraint that a distribution's values satisfy.

    Raises
    ------
    NotImplementedError
        As torch, of a distribution that does not say.

    Examples
    --------
    >>> import pyro.distributions as dist
    >>> half = dist.TransformedDistribution(dist.Beta(2.0, 2.0), [AffineTransform(-1.0, 0.5)])
    >>> half.support, support_of(half)
    (Real(), Interval(lower_bound=-1.0, upper_bound=-0.5))
    """
    if isinstance(fn, torch.distributions.MixtureSameFamily):
        parts = support_of(fn.component_distribution)
        alike = not any(isinstance(bound, Tensor) for bound in _bounds_of(parts))
        return parts if alike else fn.support
    if isinstance(fn, torch.distributions.Independent):
        return constraints.independent(support_of(fn.base_dist), fn.reinterpreted_batch_ndims)
    if type(fn).__name__ in ("MaskedDistribution", "ExpandedDistribution"):
        return support_of(fn.base_dist)
    if isinstance(fn, ANGLES):
        turn = constraints.interval(-math.pi, math.pi)
        return constraints.independent(turn, 1) if fn.event_shape else turn
    inner = moved(fn)
    if inner is None:
        return fn.support
    support, map_ = support_of(inner), fn.transforms[-1]
    if isinstance(support, BETWEEN):
        ends = map_(torch.as_tensor(support.lower_bound)), map_(torch.as_tensor(support.upper_bound))
        return constraints.interval(torch.minimum(*ends), torch.maximum(*ends))
    if not isinstance(support, (*ABOVE, BELOW)):
        return fn.support
    up = torch.as_tensor(map_.scale) > 0
    if bool(up.all()) or not bool(up.any()):
        above = isinstance(support, ABOVE) == bool(up.all())
        bound = map_(torch.as_tensor(_bounds_of(support)[0]))
        return (constraints.greater_than if above else constraints.less_than)(bound)
    return fn.support


def moved(fn: Any) -> Any:
    """What an affine map with no support of its own maps; None where the last transform is none."""
    plain = isinstance(fn, Transformed) and type(fn).support is Transformed.support
    if not plain or not fn.transforms or not isinstance(fn.transforms[-1], AffineTransform):
        return None
    return None if fn.transforms[-1].event_dim or fn.event_shape else before_last(fn)


def before_last(fn: Any) -> Any:
    """A transformed distribution without its last transform."""
    return (
        Transformed(fn.base_dist, fn.transforms[:-1], validate_args=False)
        if fn.transforms[1:]
        else fn.base_dist
    )


def stripped(fn: Any) -> Any:
    """The distribution of one event, without masks and what is only expanded or declared independent."""
    while type(fn).__name__ in ("MaskedDistribution", "ExpandedDistribution") or isinstance(
        fn, torch.distributions.Independent
    ):
        fn = fn.base_dist
    return fn


def ends_move(fn: Any, other: Any) -> bool:
    """Whether the ends of a support move: they hang on a parameter, or are others in another run."""
    try:
        here, there = (_bounds_of(support_of(law)) for law in (fn, other))
    except NotImplementedError:
        return False
    tensors = [(a, b) for a, b in zip(here, there, strict=True) if isinstance(a, Tensor)]
    return any(a.requires_grad or (a.shape == b.shape and not torch.equal(a, b)) for a, b in tensors)


def _bounds_of(support: Any) -> tuple[Any, ...]:
    """The finite ends of a support, where it has any."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    names = ("lower_bound", "upper_bound")
    return tuple(getattr(support, name) for name in names if hasattr(support, name))
