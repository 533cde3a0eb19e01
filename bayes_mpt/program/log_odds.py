"""Latents between 0 and 1 by the logarithm of their odds, so that neither end is lost.

Near 1 a number in double precision is 1 or at least 1e-16 away from it, and 0.35 of a Beta(0.01, 0.01) is nearer than
that; 0.0004 is nearer to 0 than its smallest number. Beside its value p a latent can carry u = log p - log(1 - p), at
which the log-densities of these laws have all digits:

    Beta           (a - 1) log p + (b - 1) log(1 - p) - log B(a, b)
    Kumaraswamy    log a + log b + (a - 1) log p + (b - 1) log(1 - p^a)
    sigmoid of u   log f(u) - log p - log(1 - p), where u has the density f: a relaxed Bernoulli, a logit-normal

with log p = -log(1 + exp(-u)) and log(1 - p) = -log(1 + exp(u)).
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.util import scale_and_mask, sum_rightmost
from torch import Tensor
from torch.distributions.transforms import SigmoidTransform
from torch.nn.functional import logsigmoid

from bayes_mpt.program.densities import log_density

__all__ = ["LOG_ODDS", "has_log_odds", "latent_density"]

LOG_ODDS = "log odds of "  # before the name of a latent, among values of latents


def latent_density(node: Any) -> Tensor:
    """The log-density of a site of a run, at the log odds of its value where these are known.

    Examples
    --------
    >>> fn = dist.Beta(torch.tensor(0.01).double(), torch.tensor(0.01).double())
    >>> u = torch.tensor([-50.0, 50.0], dtype=torch.float64)
    >>> node = {"fn": fn, "value": u.sigmoid(), "infer": {LOG_ODDS: u}}
    >>> latent_density(node)  # the second would be that at 1 - 1e-16
    tensor([44.2018, 44.2018], dtype=torch.float64)
    """
    odds = node["infer"].get(LOG_ODDS)
    exact = None if odds is None else _at_log_odds(node["fn"], odds)
    return log_density(node["fn"], node["value"]) if exact is None else exact


def has_log_odds(fn: Any) -> bool:
    """Whether this law has all digits at log odds."""
    inside = fn
    while isinstance(
        inside, torch.distributions.Independent | dist.MaskedDistribution | ExpandedDistribution
    ):
        inside = inside.base_dist
    if isinstance(inside, torch.distributions.MixtureSameFamily):
        return has_log_odds(inside.component_distribution)
    if isinstance(inside, torch.distributions.Beta | torch.distributions.Kumaraswamy):
        return True
    moved = isinstance(inside, torch.distributions.TransformedDistribution)
    return moved and len(inside.transforms) == 1 and isinstance(inside.transforms[0], SigmoidTransform)


def _at_log_odds(fn: Any, u: Tensor) -> Tensor | None:
    """Log-density at log odds u, of the value; None of other laws."""
    if not has_log_odds(fn):
        return None
    if isinstance(fn, torch.distributions.Independent):
        inner = _at_log_odds(fn.base_dist, u)
        return None if inner is None else sum_rightmost(inner, fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution):
        inner = _at_log_odds(fn.base_dist, u)
        return None if inner is None or fn._mask is False else scale_and_mask(inner, mask=fn._mask)
    if isinstance(fn, ExpandedDistribution):
        inner = _at_log_odds(fn.base_dist, u)
        return None if inner is None else inner.expand(torch.broadcast_shapes(fn.batch_shape, inner.shape))
    if isinstance(fn, torch.distributions.MixtureSameFamily):
        parts = _at_log_odds(fn.component_distribution, u[..., None])
        return (
            None
            if parts is None
            else torch.logsumexp(parts + fn.mixture_distribution.logits.log_softmax(-1), -1)
        )
    log_p, log_rest = logsigmoid(u), logsigmoid(-u)
    if isinstance(fn, torch.distributions.Beta):
        a, b = fn.concentration1, fn.concentration0
        constant = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
        return (a - 1) * log_p + (b - 1) * log_rest + constant
    if not isinstance(fn, torch.distributions.Kumaraswamy):
        return log_density(fn.base_dist, u) - log_p - log_rest
    a, b = fn.concentration1, fn.concentration0
    return a.log() + b.log() + (a - 1) * log_p + (b - 1) * (-torch.expm1(a * log_p)).log()
