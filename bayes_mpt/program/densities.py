"""Log-densities of a program's sites, where those of torch are clamped or lose their digits.

torch turns probabilities into logits clamped to [eps, 1 - eps], so that what is impossible would score -36 nats and not
-inf, and takes counts through differences of lgamma, which are wrong by 1e-16 v log v. Here probabilities near 0 and 1
are taken as they are, and large counts by the saddle-point form (Loader 2000), with d(x, m) = x log(x / m) + m - x and
s(x) = log x! - log(sqrt(2 pi x) (x / e)^x):

    Poisson    -s(v) - d(v, rate) - 1/2 log(2 pi v)
    binomial   s(n) - s(v) - s(n - v) - d(v, n p) - d(n - v, n (1 - p)) + 1/2 log(n / (2 pi v (n - v)))
"""

from __future__ import annotations

import math
from copy import copy
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.util import scale_and_mask, sum_rightmost
from torch import Tensor
from torch.distributions import constraints

from bayes_mpt.warnings import PrecisionWarning, warn

__all__ = ["CellDensity", "log_density", "uncached", "unrepeated"]

LARGE = 1e8  # counts from which on the saddle-point form is taken
FEW_DIGITS = 1e9  # counts from which on other distributions of counts say that they lose digits
CLOSE = 1 + 1e-6
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
TRIALS = (
    torch.distributions.Bernoulli,
    torch.distributions.Binomial,
    torch.distributions.Geometric,
    torch.distributions.NegativeBinomial,
)
BY_LGAMMA = (
    dist.BetaBinomial,
    dist.GammaPoisson,
    dist.DirichletMultinomial,
    dist.ZeroInflatedDistribution,
    torch.distributions.Multinomial,
)


class CellDensity(dist.TorchDistribution):
    """What a program says by `pyro.factor` is the log-density of some cells of its row, as their distribution.

    It is that of the run's own cells, whatever value it is asked about; ``given`` moves with what it is given.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real

    def __init__(self, log_factor: Tensor, given: Tensor, n_cells: int):
        self.log_factor, self.given = log_factor, given
        super().__init__(log_factor.shape, torch.Size((n_cells,) if n_cells > 1 else ()), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """The factor."""
        return self.log_factor


def log_density(fn: Any, value: Tensor) -> Tensor:
    """``fn.log_prob(value)``, with -inf where the value is impossible and all digits for rare values and large counts.

    Examples
    --------
    >>> log_density(dist.Bernoulli(torch.zeros(2)), torch.tensor([0.0, 1.0]))
    tensor([0., -inf])
    """
    if type(fn) is dist.Normal:  # the most frequent one has all digits
        return fn.log_prob(value)
    if isinstance(fn, torch.distributions.Independent):
        return sum_rightmost(log_density(fn.base_dist, value), fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution) and fn._mask is not False:
        log_prob = log_density(fn.base_dist, value)
        return log_prob if fn._mask is True else scale_and_mask(log_prob, mask=fn._mask)
    if isinstance(fn, ExpandedDistribution):
        log_prob = log_density(fn.base_dist, value)
        return log_prob.expand(torch.broadcast_shapes(fn.batch_shape, log_prob.shape))
    if isinstance(fn, torch.distributions.MixtureSameFamily):
        if fn._validate_args:  # its parts may not look
            fn._validate_sample(value)
        _unclamp(fn.mixture_distribution)
        component = fn.component_distribution
        # a value beside each component: (..., [K], event)
        parts = log_density(component, value.unsqueeze(-1 - len(component.event_shape)))
        return torch.logsumexp(parts + fn.mixture_distribution.logits.log_softmax(-1), -1)
    if isinstance(fn, torch.distributions.OneHotCategorical | torch.distributions.Multinomial):
        _unclamp(fn._categorical)
    if isinstance(fn, torch.distributions.Categorical):
        _unclamp(fn)
    if isinstance(fn, BY_LGAMMA):
        _warn_of_large(fn, value)
    log_prob = _of_count(fn, value) if type(fn) is dist.Poisson else uncached(fn).log_prob(value)
    if isinstance(fn, torch.distributions.Poisson) and not _finite(log_prob) and _some(fn.rate.isinf()):
        # a rate that has left the floats: no count is possible, where torch has inf - inf
        finite = type(fn)(torch.where(fn.rate.isinf(), 1.0, fn.rate), validate_args=False)
        return torch.where(fn.rate.isinf(), -math.inf, _large(finite, value, finite.log_prob(value)))
    if isinstance(fn, TRIALS):
        log_prob = _rare(fn, value, log_prob)
    if isinstance(
        fn, torch.distributions.Poisson | torch.distributions.Binomial | torch.distributions.NegativeBinomial
    ):
        log_prob = _large(fn, value, log_prob)
    return log_prob


def _of_count(fn: dist.Poisson, value: Tensor) -> Tensor:
    """``fn.log_prob(value)`` to the last bit: log(value!), most of its cost, for each value and not for each rate."""
    if fn.is_sparse:
        return fn.log_prob(value)
    if fn._validate_args:
        fn._validate_sample(value)
    return value.xlogy(fn.rate) - fn.rate - (value + 1).lgamma()


def uncached(fn: Any) -> Any:
    """The distribution, its flows without what they remember: the inverse of the last value, at the parameters then."""
    inside = fn
    while inside is not None:
        if isinstance(inside, torch.distributions.TransformedDistribution):
            for transform in inside.transforms:
                transform.clear_cache()  # type: ignore[attr-defined]  # Pyro gives it to torch's
        inside = getattr(inside, "base_dist", None)
    return fn


def unrepeated(fn: Any) -> Any:
    """A distribution over a few values without what plates repeat: of a latent the log-density has 1 for N there.

    Examples
    --------
    >>> fn = dist.Bernoulli(torch.tensor(0.5)).expand([1000])
    >>> unrepeated(fn).log_prob(torch.tensor([[0.0], [1.0]])).shape
    torch.Size([2, 1])
    """
    if not isinstance(fn, torch.distributions.Bernoulli | torch.distributions.Categorical):
        return fn
    n_right = 1 if isinstance(fn, torch.distributions.Categorical) else 0
    if not any(_repeats(value, n_right) for value in vars(fn).values() if isinstance(value, Tensor)):
        return fn
    new = copy(fn)
    for name, value in vars(fn).items():
        if isinstance(value, Tensor):
            for axis in _repeats(value, n_right):
                value = value.narrow(axis, 0, 1)
            new.__dict__[name] = value
    new._validate_args = False  # whose shapes are those before
    return new


def _repeats(value: Tensor, n_right: int) -> list[int]:
    """Axes along which a plate repeats the same numbers; of the last ``n_right`` none."""
    sizes = zip(value.shape, value.stride(), strict=True)
    return [
        axis for axis, (n, step) in enumerate(sizes) if n > 1 and not step and axis < value.ndim - n_right
    ]


# ------------------------------------------------------------------------------------------------ what is impossible


def _unclamp(fn: torch.distributions.Categorical) -> None:
    """Give a distribution over categories the logarithms of its own probabilities for logits."""
    if "probs" not in fn.__dict__:
        return  # made from logits, which are not clamped
    eps = torch.finfo(fn.probs.dtype).eps
    # logits that are a user's own are below log eps there
    clamped = (fn.probs < eps) & (fn.logits > CLOSE * math.log(eps))
    if _some(clamped):
        fn.logits = torch.where(clamped, _times_log(torch.ones_like(fn.probs), fn.probs), fn.logits)


def _rare(fn: Any, value: Tensor, log_prob: Tensor) -> Tensor:
    """Of trials whose probability of success is so near 0 or 1 that torch clamps it."""
    p = fn.__dict__.get("probs")
    if p is None and _finite(log_prob):
        return log_prob  # infinite logits end in inf or inf - inf
    clamped = fn.logits.isinf()
    if p is None:
        p = (fn.logits > 0).to(fn.logits)
    else:
        eps = torch.finfo(p.dtype).eps
        clamped = clamped | (((p < eps) | (p > 1 - eps)) & (fn.logits.abs() < -CLOSE * math.log(eps)))
    if not _some(clamped):
        return log_prob
    if isinstance(fn, torch.distributions.Bernoulli):
        exact = _times_log(value, p) + _times_log(1 - value, p, of_failure=True)
    elif isinstance(fn, torch.distributions.Geometric):
        exact = _times_log(value, p, of_failure=True) + _times_log(torch.ones_like(value), p)
    elif isinstance(fn, torch.distributions.Binomial):
        n = fn.total_count
        ways = torch.lgamma(n + 1) - torch.lgamma(value + 1) - torch.lgamma(n - value + 1)
        exact = ways + _times_log(value, p) + _times_log(n - value, p, of_failure=True)
    else:
        n = fn.total_count
        ways = torch.lgamma(n + value) - torch.lgamma(value + 1) - torch.lgamma(n)
        ways = torch.where(n + value == 0, 0.0, ways)
        exact = ways + _times_log(value, p) + _times_log(n, p, of_failure=True)
    return torch.where(clamped, exact, log_prob)


def _times_log(count: Tensor, p: Tensor, of_failure: bool = False) -> Tensor:
    """count log p, or count log(1 - p): 0 where there are none, without a NaN in value or slope."""
    impossible = p >= 1 if of_failure else p <= 0
    safe = torch.where(impossible, 0.5, p)
    log = torch.log1p(-safe) if of_failure else safe.log()
    never = torch.where(count == 0, 0.0, -math.inf).to(log)
    return torch.where(impossible, never, count * log)


def _finite(log_prob: Tensor) -> bool:
    """Whether a sum, which is cheap, finds all finite."""
    total = log_prob.detach().sum()
    if torch._C._functorch.is_batchedtensor(total):
        return not _some(total - total != 0)
    return math.isfinite(total.item())


def _some(where: Tensor) -> bool:
    """Whether it holds anywhere; under vmap at any of the values that are run in one."""
    while torch._C._functorch.is_batchedtensor(where):
        where = torch._C._functorch.get_unwrapped(where)
    return bool(where.any())


# ------------------------------------------------------------------------------------------------------ large counts


def _large(fn: Any, value: Tensor, log_prob: Tensor) -> Tensor:
    """Of counts of `LARGE` and more."""
    if log_prob.dtype != torch.float64:
        return log_prob
    if isinstance(fn, torch.distributions.Poisson):
        large = value >= LARGE
        if not _some(large):
            return log_prob
        v, rate = torch.broadcast_tensors(torch.where(large, value, 1.0), fn.rate)
        return torch.where(large, -_deviance(v, rate) - _stirling(v), log_prob)
    n = fn.total_count + (value if isinstance(fn, torch.distributions.NegativeBinomial) else 0)
    # at either end a single power is left, which `log_prob` has right
    x = fn.total_count if isinstance(fn, torch.distributions.NegativeBinomial) else value
    large = (n >= LARGE) & (x > 0) & (x < n)
    if not _some(large):
        return log_prob
    p, q = (
        (fn.probs, 1 - fn.probs)
        if fn._param is fn.__dict__.get("probs")
        else (fn.logits.sigmoid(), (-fn.logits).sigmoid())
    )
    if isinstance(fn, torch.distributions.NegativeBinomial):
        p, q = q, p  # x failures among n trials, the last of which is one
    x, n = torch.where(large, x, 1.0), torch.where(large, n, 2.0)
    exact = _stirling(n) - _stirling(x) - _stirling(n - x) - _deviance(x, n * p) - _deviance(n - x, n * q)
    if isinstance(fn, torch.distributions.NegativeBinomial):
        exact = exact + (x / n).log()
    return torch.where(large, exact, log_prob)


def _deviance(x: Tensor, m: Tensor) -> Tensor:
    """x log(x / m) + m - x of x > 0."""
    e = (m - x) / x
    near = e.abs() < 0.5
    close = torch.where(near, e, 0.0)
    ratio = torch.where(near, 1.0, m / x)
    return x * torch.where(near, close - torch.log1p(close), e - ratio.log())


def _stirling(x: Tensor) -> Tensor:
    """log x! - x log x + x of x > 0."""
    series = HALF_LOG_2PI + 0.5 * x.log() + 1 / (12 * x) - 1 / (360 * x**3) + 1 / (1260 * x**5)
    small = x.clamp(max=16.0)
    return torch.where(x >= 16, series, torch.lgamma(small + 1) - small * small.log() + small)


def _warn_of_large(fn: Any, value: Tensor) -> None:
    """Say so where a density has few digits left."""
    if torch._C._functorch.is_batchedtensor(value) or not value.numel():
        return
    most = float(value.max())
    if most > FEW_DIGITS:
        warn(
            f"the log-density of {type(fn).__name__} at counts up to {most:.3g} is a difference of large numbers: in "
            f"float64 it is wrong by about {1e-16 * most * math.log(most):.1g} nats. Count in larger units",
            PrecisionWarning,
        )
