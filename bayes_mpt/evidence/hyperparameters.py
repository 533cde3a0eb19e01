"""The hyper-parameters of a program: their prior, and its log-likelihood and predictions as functions of them.

Parameters are one vector theta (D,), unconstrained, in the order in which the program names them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import transform_to

from bayes_mpt.predictors import Batch, Bound, Objective
from bayes_mpt.program.arguments import rows_of
from bayes_mpt.program.batched import Batched, found_out
from bayes_mpt.program.offers import offered
from bayes_mpt.program.program import Model
from bayes_mpt.program.store import own_random_state

__all__ = [
    "LogLikelihood",
    "Prior",
    "assign",
    "far_from_centre",
    "hyperprior",
    "log_likelihood",
    "predictions",
]

Array = NDArray[np.float64]

LogLikelihood = Callable[..., tuple[Array, Array]]
"""``(theta (B, D), gradient=True) -> (B,) nats, (B, D)``; -inf where the program cannot be evaluated."""

FAR = 8.0  # prior standard deviations
MAX_CELLS = 2**19  # of the covariances of points evaluated at a time
MIN_NEW = 64  # new rows that are predicted together


class Prior(NamedTuple):
    """Normal on the unconstrained parameters, times a correction where the true prior is another."""

    loc: Array
    """(D,)"""
    scale: Array
    """(D,)"""
    correction: Callable[[Tensor], Tensor] | None = None
    """theta (B, D) -> log of the true prior over the normal one (B,)."""

    def log_prob(self, theta: Tensor) -> Tensor:
        """(B, D) -> (B,), with gradients."""
        loc, scale = (torch.as_tensor(a).to(theta) for a in (self.loc, self.scale))
        normal = torch.distributions.Normal(loc, scale, validate_args=False).log_prob(theta).sum(1)
        return normal if self.correction is None else normal + self.correction(theta)


def hyperprior(model: Model, args: tuple[Any, ...], leaves: Mapping[str, Tensor]) -> Prior | None:
    """The prior that a model offers for its parameters in Pyro's store, by ``model.hyperprior(*args)``; or None.

    That gives for each parameter by name the pair (loc, scale) of a normal distribution of its unconstrained value, or
    a `torch.distributions.Distribution` of its natural value. None also where a parameter has no prior (one of a
    likelihood that the user wrote, say): what is left of the others' would be no prior of the model.
    """
    offer = offered(model, "hyperprior")
    if offer is None:
        return None
    found = offer(*args)
    if any(name not in found for name in leaves):
        return None
    supports = pyro.get_param_store().get_state()["constraints"]
    loc: list[Array] = []
    scale: list[Array] = []
    others: list[tuple[slice, _Natural]] = []
    at = 0
    for name, leaf in leaves.items():
        given, part = found[name], slice(at, at + leaf.numel())
        if isinstance(given, torch.distributions.Distribution):
            other = _Natural(given, supports[name], leaf)
            others.append((part, other))
            given = other.loc, other.scale
        for out, value in zip((loc, scale), given, strict=True):
            out.append(
                torch.as_tensor(value).detach().to(leaf).expand_as(leaf).flatten().cpu().double().numpy()
            )
        at = part.stop
    return Prior(_joined(loc), _joined(scale), _correction(others) if others else None)


def far_from_centre(prior: Prior, leaves: Mapping[str, Tensor]) -> list[str]:
    """Names of parameters with an element further from the prior's centre than any sensible value."""
    out, at = [], 0
    for name, leaf in leaves.items():
        part = slice(at, at + leaf.numel())
        at = part.stop
        off = (leaf.detach().flatten().cpu().double().numpy() - prior.loc[part]) / prior.scale[part]
        if (np.abs(off) > FAR).any():
            out.append(name)
    return out


class _Natural:
    """A prior of a natural value, seen from the unconstrained one: a normal of its mean and spread, and the rest.

    log p(theta) = log p(v(theta)) + log |dv / dtheta| - log P(v in the support)
    """

    def __init__(self, given: torch.distributions.Distribution, support: Any, leaf: Tensor):
        self.given, self.shape = given, leaf.shape
        self.transform = transform_to(support)
        low, high = (float(getattr(support, f"{side}_bound", math.nan)) for side in ("lower", "upper"))
        with own_random_state(0), torch.no_grad():
            draws = given.expand(self.shape).sample(torch.Size([4096])).double()
            mass = torch.ones(self.shape, dtype=torch.float64)
            if given.support is torch.distributions.constraints.real:
                at_high = given.cdf(torch.tensor(high)) if math.isfinite(high) else mass
                mass = at_high - (given.cdf(torch.tensor(low)) if math.isfinite(low) else 0 * mass)
        inside = support.check(draws)
        theta = self.transform.inv(torch.where(inside, draws, draws[inside].median()))
        self.log_mass = mass.double().log()
        self.loc, self.scale = theta.mean(0), theta.std(0)

    def __call__(self, theta: Tensor) -> Tensor:
        """Log of this density over the normal one: (B, d) -> (B,)."""
        theta = theta.reshape(-1, *self.shape)
        value = self.transform(theta)
        log_prob = (
            self.given.log_prob(value) + self.transform.log_abs_det_jacobian(theta, value) - self.log_mass
        )
        normal = torch.distributions.Normal(self.loc, self.scale).log_prob(theta)
        return (log_prob - normal).reshape(len(theta), -1).sum(1)


def _correction(others: list[tuple[slice, _Natural]]) -> Callable[[Tensor], Tensor]:
    return lambda theta: torch.stack([other(theta[:, part]) for part, other in others]).sum(0)


def log_likelihood(predictor: Bound, args: tuple[Any, ...], leaves: dict[str, Tensor]) -> LogLikelihood:
    """The LML of a program's observations as a function of its unconstrained parameters in Pyro's store.

    Many points at a time where the program runs on them side by side, which is tried; else one by one.
    """
    device = next(iter(leaves.values())).device
    objective = predictor.schedule(Batch(args, 1), None)[-1]
    n_chunk = max(1, MAX_CELLS // len(args[0]) ** 2)
    natural = _values(leaves)

    def together(theta: Tensor) -> Tensor:
        return predictor.read_at(args, natural(theta)).score()

    def alone(theta: Tensor) -> Tensor:
        return torch.stack([_One.apply(row, objective, leaves) for row in theta])

    with torch.no_grad():
        here = torch.cat([leaf.flatten() for leaf in leaves.values()])
        two = torch.stack([here, here + 0.1])
        found = found_out(lambda _: torch.allclose(together(two), alone(two), rtol=1e-9), (Batched.PLATE,))
    evaluate = together if found is Batched.PLATE else alone

    def of(theta: Array, gradient: bool = True) -> tuple[Array, Array]:
        values, grads = [], []
        for part in torch.as_tensor(theta, device=device).split(n_chunk):
            part = part.detach().requires_grad_(gradient)
            with torch.set_grad_enabled(gradient):
                value = evaluate(part)
            values.append(value.detach())
            usable = torch.isfinite(value.detach())
            if gradient and bool(usable.any()):
                grads.append(torch.autograd.grad(value[usable].sum(), part)[0])
            else:
                grads.append(torch.zeros_like(part))
        return torch.cat(values).double().cpu().numpy(), torch.cat(grads).double().cpu().numpy()

    return of


def predictions(
    predictor: Bound, args: tuple[Any, ...], new: tuple[Any, ...], leaves: dict[str, Tensor], theta: Array
) -> tuple[Array, Array]:
    """Means and variances (S, M) of the observations of M new rows given those of ``args``, at parameters theta (S, D).

    Side by side where the program runs so, as in `log_likelihood`. The parameters in the store are left as they are.
    """
    natural, n_seen = _values(leaves), len(args[0])

    def together(theta: Tensor, some: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        return predictor.read_at(args, natural(theta)).predict(some)

    def alone(theta: Tensor, some: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        found = []
        before = torch.cat([leaf.detach().clone().flatten() for leaf in leaves.values()])
        try:
            for row in theta:
                assign(leaves, row.to(before))
                found.append(predictor.read(args).predict(some))
        finally:
            assign(leaves, before)
        return torch.stack([f.mean for f in found]), torch.stack([f.var for f in found])

    def same(_: Batched) -> bool:
        both = zip(together(points[:2], some), alone(points[:2], some), strict=True)
        return all(torch.allclose(a, b, rtol=1e-6, atol=1e-12) for a, b in both)

    step = max(MIN_NEW, n_seen)  # new rows at a time
    size = max(1, MAX_CELLS // (n_seen + min(step, len(new[0]))) ** 2)
    columns = []
    with torch.no_grad():
        points = torch.as_tensor(theta, device=next(iter(leaves.values())).device)
        evaluate = alone
        for i in range(0, len(new[0]), step):
            some = rows_of(new, slice(i, i + step))
            if not i and len(points) > 1 and found_out(same, (Batched.PLATE,)) is Batched.PLATE:
                evaluate = together
            parts = [evaluate(p, some) for p in points.split(size)]
            columns.append([torch.cat(p).double().cpu().numpy() for p in zip(*parts, strict=True)])
    mean, var = (np.concatenate(c, axis=1) for c in zip(*columns, strict=True))
    return mean, var


def _values(leaves: Mapping[str, Tensor]) -> Callable[[Tensor], dict[str, Tensor]]:
    """theta (B, D) as B values of each parameter, by name."""
    supports = pyro.get_param_store().get_state()["constraints"]
    sizes = [leaf.numel() for leaf in leaves.values()]

    def values(theta: Tensor) -> dict[str, Tensor]:
        return {
            name: transform_to(supports[name])(part.reshape(-1, *leaf.shape).to(leaf))
            for (name, leaf), part in zip(leaves.items(), theta.split(sizes, 1), strict=True)
        }

    return values


class _One(torch.autograd.Function):
    """The program read at one point: its leaves are set, which autograd does not see."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, objective: Objective, leaves: Any) -> Tensor:
        grad = torch.zeros_like(theta)
        before = [leaf.detach().clone() for leaf in leaves.values()]
        try:
            assign(leaves, theta)
            with torch.enable_grad():
                value = objective()
                grads = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
            grad = torch.cat([g.flatten() for g in grads]).to(theta)
            value = value.detach()
        except (ValueError, torch.linalg.LinAlgError):  # ModelError is a ValueError too
            value = theta.new_tensor(-math.inf)
        finally:
            assign(leaves, torch.cat([b.flatten() for b in before]))
        ctx.save_for_backward(grad)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.saved_tensors[0], None, None


def assign(leaves: Mapping[str, Tensor], theta: Tensor) -> None:
    """Set a program's unconstrained parameters, theta (D,)."""
    with torch.no_grad():
        for leaf, part in zip(
            leaves.values(), theta.split([v.numel() for v in leaves.values()]), strict=True
        ):
            leaf.copy_(part.reshape(leaf.shape))


def _joined(parts: list[Array]) -> Array:
    return np.concatenate([np.empty(0), *parts])
