"""Draws of latents from their prior in unconstrained coordinates, and what a vague prior does to a number.

The logarithm of a Gamma variable is drawn as such, since of Gamma(1e-4, 1e-4) 93 % of the draws are below the smallest
floating-point number (Marsaglia & Tsang 2000):

    log g_a = log g_(a + 1) + log(v) / a,    v uniform on (0, 1)
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.gamma import _standard_gamma

from bayes_mpt.predictors.nodes.adaptive import AdaptiveNodes
from bayes_mpt.program.batched import Batched
from bayes_mpt.program.densities import log_density
from bayes_mpt.program.layout import to_rows
from bayes_mpt.program.program import ModelError
from bayes_mpt.program.run import nodes_plate, one_precision, run
from bayes_mpt.program.sites import base, node_of
from bayes_mpt.program.supports import support_of

__all__ = ["halved", "prior_points", "spread_of", "vague_sites", "within_reach"]

LOG = "/log "  # before the name of a site: the logarithm of its value
LEAVE = 0.01  # share of draws outside the range of floating point, from which a prior is vague
REACH = 8.0  # of unconstrained numbers: 1 / 3000 to 3000
FAR = 50.0  # log of how much wider than the posterior, the same


class _LogGamma(poutine.messenger.Messenger):
    """Draw Gamma variables by their logarithms, which are kept; to be entered before plates."""

    def __init__(self) -> None:
        super().__init__()
        self.logs: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        fn, sign = base(msg["fn"]), 1.0
        if isinstance(fn, torch.distributions.InverseGamma):
            fn, sign = fn.base_dist, -1.0
        if msg["is_observed"] or msg["done"] or not isinstance(fn, torch.distributions.Gamma):
            return
        shape = msg["fn"].batch_shape + msg["fn"].event_shape
        a, rate = fn.concentration.expand(shape), fn.rate.expand(shape)
        # torch's own draw, whose limits have no rule for values side by side
        log = sign * (_standard_gamma(a + 1).log() - rate.log() + torch.rand_like(a).log() / a)
        self.logs[msg["name"]], msg["value"], msg["done"] = log, log.exp(), True

    def draw(self, adaptive: AdaptiveNodes, filled: tuple[Any, ...]) -> dict[str, Tensor]:
        """Values of the latents that take nodes, as far as the program goes, and logarithms of some."""
        self.logs = {}
        tracer = poutine.trace(adaptive.model)
        with suppress(torch.linalg.LinAlgError):
            tracer.get_trace(*filled)
        nodes = tracer.trace.nodes
        values = {name: nodes[name]["value"] for name in adaptive.space.names if name in nodes}
        return values | {LOG + name: log for name, log in self.logs.items() if name in values}


def prior_points(adaptive: AdaptiveNodes, filled: tuple[Any, ...], n: int) -> Tensor:
    """Draws (n, d) of the latents that take nodes; one that no number stands for is NaN or infinite.

    Side by side where the program runs so, else one by one. Where it fails before all latents are drawn, for want of a
    matrix's Cholesky factor, those of another draw stand for the rest: a point that is impossible in any case.
    """
    names, gamma = set(adaptive.space.names), _LogGamma()
    with pyro.validation_enabled(False), one_precision(filled):
        if adaptive.batched is Batched.PLATE and adaptive.rows is None and n > 1:
            with gamma, nodes_plate(n, adaptive.program.depth):
                values = gamma.draw(adaptive, filled)
            if names <= set(values):
                return _pack(adaptive, values, n)
        with gamma:
            if adaptive.batched is not Batched.LOOP:
                with suppress(RuntimeError, KeyError):
                    mapped = torch.vmap(lambda _: gamma.draw(adaptive, filled), randomness="different")
                    return _pack(adaptive, mapped(torch.arange(n)), n, depth=0)
            draws = [gamma.draw(adaptive, filled) for _ in range(n)]
    whole = next((d for d in draws if names <= set(d)), None)
    if whole is None:
        raise ModelError(
            f"a matrix that the program computes is not positive definite at any of {n} draws from the prior: add to "
            "its diagonal, or write a narrower prior"
        )
    values = {name: torch.stack([(whole | d)[name] for d in draws]) for name in whole}
    return _pack(adaptive, values, n, depth=0)


def _pack(adaptive: AdaptiveNodes, values: dict[str, Tensor], n: int, depth: int | None = None) -> Tensor:
    space = adaptive.space if depth is None else adaptive.space._replace(depth=depth)
    u = space.pack_values(values, n, 1)[:, 0].detach()
    columns = space.columns
    for part in space.parts:
        log = values.get(LOG + part.latent.name)
        if log is not None and _positive(part):
            raw = log.reshape(n, *part.shape)
            u[:, columns[part.latent.name]] = to_rows(raw, part.latent.row_axis, 1)[:, 0]
    return u


# --------------------------------------------------------------------------------------------------- vague priors


def vague_sites(adaptive: AdaptiveNodes, points: Tensor, root: Tensor | None) -> tuple[str, ...]:
    """Names of latents whose prior is so wide that its draws (n, d) are no way to the posterior.

    Its draws leave the range of floating point, or they spread over a length e^50 times that of the posterior, whose
    covariance is root root' (d, d).
    """
    info = torch.finfo(points.dtype)
    narrow = None if root is None else root.square().sum(1).sqrt().log()
    wide, out = spread_of(points).log(), []
    for part in adaptive.space.parts:
        columns = adaptive.space.columns[part.latent.name]
        u = points[:, columns]
        outside = ~torch.isfinite(u)
        if _positive(part):
            outside |= (u <= math.log(info.tiny)) | (u >= math.log(info.max))
        far = narrow is not None and float((wide - narrow)[columns].max()) > FAR
        if far or float(outside.any(1).double().mean()) > LEAVE:
            out.append(part.latent.name)
    return tuple(out)


def within_reach(adaptive: AdaptiveNodes, points: Tensor, vague: tuple[str, ...], n: int) -> Tensor:
    """The first n draws (n, d) of points, but those of vague latents spread over the numbers that data are made of."""
    out, even = points[:n].clone(), torch.linspace(-REACH, REACH, n, dtype=points.dtype).to(points)
    for name in vague:
        out[:, adaptive.space.columns[name]] = even[:, None]
    return out


def spread_of(points: Tensor) -> Tensor:
    """Half of the distance between quartiles (d,) of points (n, d), in standard deviations of a Gaussian."""
    share = points.new_tensor([0.25, 0.75])
    low, high = points.nan_to_num(0.0).quantile(share, 0)
    return ((high - low) / 1.349).clamp(min=1e-300)


def _at(adaptive: AdaptiveNodes, filled: tuple[Any, ...], u: Tensor) -> Trace:
    """A run at one point (d,)."""
    values, _ = adaptive.space._replace(depth=0).values(u[None, None])
    with pyro.validation_enabled(False):
        return run(adaptive.model, filled, values)


def halved(adaptive: AdaptiveNodes, filled: tuple[Any, ...], points: Tensor, name: str) -> float:
    """By how much the log evidence changes if a prior has half its scale: NaN where it has none.

        log E[p'(z) / p(z)] over the posterior,    p'(z) = 2 p(m + 2 (z - m)) for each of its numbers

    with m the mean, or 0 where there is none and of positive numbers; over points (n, d) of the posterior.
    """
    change = []
    for u in points:
        trace = _at(adaptive, filled, u)
        node = node_of(trace, name)
        fn, value = node["fn"], node["value"]
        positive = _positive(_part_of(adaptive, name))
        support = support_of(base(fn))
        while hasattr(support, "base_constraint"):  # of each number of a vector
            support = support.base_constraint
        if not positive and support is not constraints.real:
            return math.nan
        middle = torch.zeros_like(value) if positive else fn.mean.nan_to_num(0.0, 0.0, 0.0)
        ratio = log_density(fn, middle + 2 * (value - middle)).sum() - log_density(fn, value).sum()
        change.append(ratio + value.numel() * math.log(2))
    return float(torch.stack(change).logsumexp(0)) - math.log(len(change))


def _part_of(adaptive: AdaptiveNodes, name: str) -> Any:
    return next(p for p in adaptive.space.parts if p.latent.name == name)


def _positive(part: Any) -> bool:
    """Whether the real numbers of a site are the logarithms of its values."""
    at = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)[:, None].expand(3, math.prod(part.shape))
    raw = at.reshape(3, *part.shape)
    value = part.transform(raw)
    return value.shape == raw.shape and bool(torch.allclose(value, raw.exp(), rtol=1e-12))
