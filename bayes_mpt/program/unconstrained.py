"""Log-densities of latents at the real numbers that their values are made from, so that no end of a support is lost.

Near 1 a number in double precision is 1 or at least 1e-16 away from it, and 0.35 of a Beta(0.01, 0.01) is nearer than
that; 0.0004 is nearer to 0 than its smallest number, and of a Dirichlet(0.01) every corner holds as much. Beside its
value z a latent can carry a real number u:

    between two bounds     the logarithm of the odds of the share p of the way that z has gone
    above or below one     the logarithm of the distance w from it
    shares                 their logarithms l

With log p = -log(1 + exp(-u)) and log(1 - p) = -log(1 + exp(u)) the log-densities have all digits:

    Beta           (a - 1) log p + (b - 1) log(1 - p) - log B(a, b)
    Kumaraswamy    log a + log b + (a - 1) log p + (b - 1) log(1 - p^a)
    Gamma          a log b + (a - 1) u - b exp(u) - log Gamma(a)
    Exponential    log b - b exp(u)
    Pareto         log a + a log s - (a + 1) log(s + exp(u))
    Dirichlet      sum_k (a_k - 1) l_k + log Gamma(sum_k a_k) - sum_k log Gamma(a_k)
    relaxed one-hot of temperature t      density of the vector l under the law of the logarithms, less sum_k l_k

and what transforms make of these and of laws of real numbers, last transform first:

    sigmoid of v           log f(u) - log p - log(1 - p)                     loc + scale v   log f(v) - log |scale|
    exp of v               log f(u) - u                                      v^e             log f(v) - log |dz / dv|
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.util import scale_and_mask, sum_rightmost
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import AffineTransform, ExpTransform, PowerTransform, SigmoidTransform
from torch.nn.functional import logsigmoid

from bayes_mpt.program.densities import log_density
from bayes_mpt.program.supports import before_last, stripped, support_of

__all__ = ["UNCONSTRAINED", "keeps_ends", "latent_density"]

UNCONSTRAINED = "unconstrained "  # before the name of a latent, among values of latents
Transformed = torch.distributions.TransformedDistribution
FORMULAS = (
    torch.distributions.Beta,
    torch.distributions.Kumaraswamy,
    torch.distributions.Gamma,
    torch.distributions.Exponential,
    torch.distributions.Pareto,
    torch.distributions.Dirichlet,
    torch.distributions.RelaxedOneHotCategorical,
)
FAR = 40.0  # of log odds: exp(-u) is log p and p^a is 1 - a exp(-u), to the last digit


def latent_density(node: Any) -> Tensor:
    """The log-density of a site of a run, at the real number that its value is made from where this is known.

    Examples
    --------
    >>> fn = dist.Beta(torch.tensor(0.01).double(), torch.tensor(0.01).double())
    >>> u = torch.tensor([-50.0, 50.0], dtype=torch.float64)
    >>> node = {"fn": fn, "value": u.sigmoid(), "infer": {UNCONSTRAINED: u}}
    >>> latent_density(node)  # the second would be that at 1 - 1e-16
    tensor([44.2018, 44.2018], dtype=torch.float64)
    """
    u = node["infer"].get(UNCONSTRAINED)
    exact = None if u is None or not keeps_ends(node["fn"]) else _density(node["fn"], u)
    return log_density(node["fn"], node["value"]) if exact is None else exact


def keeps_ends(fn: Any) -> bool:
    """Whether this law has all digits at the real number that a value is made from."""
    fn = stripped(fn)
    if isinstance(fn, torch.distributions.MixtureSameFamily):
        return isinstance(stripped(fn.component_distribution), FORMULAS[:5])
    if isinstance(fn, FORMULAS):
        return True
    if not isinstance(fn, Transformed) or not fn.transforms or fn.transforms[-1].event_dim:
        return False
    last, inner = fn.transforms[-1], before_last(fn)
    if isinstance(last, AffineTransform | PowerTransform):
        return keeps_ends(inner) and not fn.event_shape
    return isinstance(last, SigmoidTransform | ExpTransform) and _is_real(inner) and not fn.event_shape


def _is_real(fn: Any) -> bool:
    """Whether a law is of all real numbers."""
    try:
        return support_of(fn) is constraints.real
    except NotImplementedError:
        return False


def _density(fn: Any, u: Tensor) -> Tensor | None:
    """Log-density of the value that u makes, per unit of the value."""
    if isinstance(fn, torch.distributions.Independent):
        inner = _density(fn.base_dist, u)
        return None if inner is None else sum_rightmost(inner, fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution):
        inner = _density(fn.base_dist, u)
        return None if inner is None or fn._mask is False else scale_and_mask(inner, mask=fn._mask)
    if isinstance(fn, ExpandedDistribution):
        inner = _density(fn.base_dist, u)
        return None if inner is None else inner.expand(torch.broadcast_shapes(fn.batch_shape, inner.shape))
    if isinstance(fn, torch.distributions.MixtureSameFamily):
        parts = _density(fn.component_distribution, u[..., None])
        weights = fn.mixture_distribution.logits.log_softmax(-1)
        return None if parts is None else torch.logsumexp(parts + weights, -1)
    if isinstance(fn, FORMULAS):
        return _by_formula(fn, u)
    last, inner = fn.transforms[-1], before_last(fn)
    if isinstance(last, SigmoidTransform):
        return log_density(inner, u) - logsigmoid(u) - logsigmoid(-u)
    if isinstance(last, ExpTransform):
        return log_density(inner, u) - u
    if isinstance(last, PowerTransform):
        v = u / last.exponent
        found = _density(inner, v)
        return None if found is None else found - last.exponent.abs().log() - (last.exponent - 1) * v
    scale = torch.as_tensor(last.scale).to(u)
    between = hasattr(support_of(inner), "upper_bound") and hasattr(support_of(inner), "lower_bound")
    found = _density(inner, u * scale.sign() if between else u - scale.abs().log())
    return None if found is None else found - scale.abs().log()


def _by_formula(fn: Any, u: Tensor) -> Tensor:
    """Of the laws that are no transform of simpler ones."""
    if isinstance(fn, torch.distributions.Dirichlet):
        a = fn.concentration
        return ((a - 1) * u).sum(-1) + torch.lgamma(a.sum(-1)) - torch.lgamma(a).sum(-1)
    if isinstance(fn, torch.distributions.RelaxedOneHotCategorical):
        return fn.base_dist.log_prob(u) - u.sum(-1)
    if isinstance(fn, torch.distributions.Gamma):
        a, b = fn.concentration, fn.rate
        return a * b.log() + (a - 1) * u - b * u.exp() - torch.lgamma(a)
    if isinstance(fn, torch.distributions.Exponential):
        return fn.rate.log() - fn.rate * u.exp()
    if isinstance(fn, torch.distributions.Pareto):
        a, log_scale = fn.alpha, fn.scale.log()
        return a.log() + a * log_scale - (a + 1) * torch.logaddexp(log_scale, u)
    a, b = fn.concentration1, fn.concentration0
    log_p, log_rest = logsigmoid(u), logsigmoid(-u)
    if isinstance(fn, torch.distributions.Beta):
        constant = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
        return (a - 1) * log_p + (b - 1) * log_rest + constant
    far = u > FAR + a.log()
    log_left = torch.where(far, a.log() - u, (-torch.expm1(a * torch.where(far, -1.0, log_p))).log())
    return a.log() + b.log() + (a - 1) * log_p + (b - 1) * log_left
