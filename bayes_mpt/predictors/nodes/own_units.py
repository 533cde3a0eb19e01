"""Normal latents in units of their own distribution, where that has a scale which other latents decide.

    z = m + s e,    e ~ N(0, 1),    m and s as the program has them

The program is the same, told of e where it is told of z. Effects around a common level with a scale of its own stand
in a funnel: where s is small so is the room for z, and the density of z rises without bound. That of e does neither
(Papaspiliopoulos, Roberts & Skold 2007), unless the data say much more of each z than its prior does: then s, e and m
are tied to one narrow ridge, and z itself is the better number. Draws from the prior that the data make likely tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from bayes_mpt.predictors.nodes.adaptive import AdaptiveNodes
from bayes_mpt.predictors.nodes.conjugacy import node_values, prior_draws
from bayes_mpt.predictors.nodes.newton import curvature
from bayes_mpt.predictors.nodes.prior import prior_points
from bayes_mpt.predictors.nodes.resampling import by_halves, effective, systematic
from bayes_mpt.program.arguments import Args
from bayes_mpt.program.batched import Batched, vmapped
from bayes_mpt.program.program import Model, Program
from bayes_mpt.program.run import run
from bayes_mpt.program.sites import base, node_of
from bayes_mpt.program.store import own_random_state

__all__ = ["InOwnUnits", "in_own_units", "own_values", "told_values"]

N_DRAWS = 400  # of the prior, weighed by the data
N_ALONE = 50  # where each is a run of its own
N_LOOKED = 32  # of these, at which it is seen how much room each latent has
FUNNEL = 0.5  # variance of the logarithm of a number's room, from which this matters
MAX_WIDTH = 256  # numbers, up to which curvatures are taken


class InOwnUnits:
    """A program whose sites ``names`` are told in units of their own distribution.

    Examples
    --------
    >>> import pyro
    >>> def program():
    ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
    ...     return pyro.sample("z", dist.Normal(1.0, scale))
    >>> two, three = torch.tensor(2.0), torch.tensor(3.0)
    >>> float(pyro.poutine.condition(InOwnUnits(program, ("z",)), {"scale": two, "z": three})())
    7.0
    """

    def __init__(self, model: Model, names: tuple[str, ...]):
        self.model, self.names = model, names

    def __call__(self, *args: Any) -> Any:
        """Run it."""
        with _Told(self.names):
            return self.model(*args)


class _Told(Messenger):
    """Inside of all other handlers, which see e with its distribution; the program goes on with m + s e."""

    def __init__(self, names: tuple[str, ...]):
        super().__init__()
        self.names = names
        self.laws: dict[str, Any] = {}
        self.scale: dict[str, Tensor] = {}
        self.own: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.names:
            return
        fn = msg["fn"]
        law = self.laws[msg["name"]] = base(fn)
        zero = torch.zeros_like(law.loc)
        msg["fn"] = dist.Normal(zero, torch.ones_like(zero), validate_args=False).to_event(fn.event_dim)

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.names:
            law = self.laws[msg["name"]]
            self.scale[msg["name"]] = law.scale
            self.own[msg["name"]] = msg["value"] = law.loc + law.scale * msg["value"]


def in_own_units(adaptive: AdaptiveNodes, args: Args, x: Tensor) -> AdaptiveNodes:
    """The program with those of its latents in units of their own, that gain by it; itself where none does.

    Parameters
    ----------
    adaptive : AdaptiveNodes
        Of a program whose latents belong to the data set, none of them integrated inside.
    args : Args
    x : Tensor of shape (1, T)
        The tokens.
    """
    whole = adaptive.rows is None and not adaptive.gaussian and not adaptive.program.by_row
    if not whole or adaptive.space.width > MAX_WIDTH:
        return adaptive
    names = _scaled_by_others(adaptive.model, args.filled, adaptive.program)
    if not names:
        return adaptive
    told = AdaptiveNodes(InOwnUnits(adaptive.model, names), args, adaptive.program)
    kept = _gaining(told, args, x)
    if kept == names:
        return told
    return AdaptiveNodes(InOwnUnits(adaptive.model, kept), args, adaptive.program) if kept else adaptive


def own_values(adaptive: AdaptiveNodes, filled: tuple[Any, ...], u: Tensor) -> dict[str, Tensor]:
    """Values (S, ...) of the program's own latents at points u (S, d), in whatever units it is told of them."""
    told = _told(adaptive, u)
    if not isinstance(adaptive.model, InOwnUnits):
        return told
    return {**told, **_recorded(adaptive, filled, u, lambda seen: seen.own)}


def told_values(
    adaptive: AdaptiveNodes, filled: tuple[Any, ...], values: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The inverse of `own_values`: of the program's own latents (S, ...), all of them, what it is told of each."""
    if not isinstance(adaptive.model, InOwnUnits):
        return values
    model, n = adaptive.model, len(next(iter(values.values())))

    def at(one: dict[str, Tensor]) -> dict[str, Tensor]:
        trace = run(model.model, filled, one)
        laws = {name: base(node_of(trace, name)["fn"]) for name in model.names}
        return {
            name: ((one[name] - law.loc) / law.scale).reshape(one[name].shape) for name, law in laws.items()
        }

    with torch.no_grad(), own_random_state():
        told = None
        if adaptive.batched is not Batched.LOOP:
            with suppress(Exception):  # nobody knows what a program does with several
                told = cast(dict[str, Tensor], vmapped(at, randomness="different")(values))
        if told is None:
            each = [at({name: v[s] for name, v in values.items()}) for s in range(n)]
            told = {name: torch.stack([one[name] for one in each]) for name in model.names}
    return {**values, **told}


def _recorded(
    adaptive: AdaptiveNodes, filled: tuple[Any, ...], u: Tensor, what: Callable[[_Told], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Numbers (S, ...) of each site that is told in its own units, at points u (S, d)."""
    model = cast(InOwnUnits, adaptive.model)
    told = _told(adaptive, u)

    def at(one: dict[str, Tensor]) -> dict[str, Tensor]:
        with _Told(model.names) as seen:
            run(model.model, filled, one)
        return {name: what(seen)[name].expand(one[name].shape) for name in model.names}

    with torch.no_grad(), own_random_state():  # discrete latents are drawn, and do not matter
        if adaptive.batched is not Batched.LOOP:
            with suppress(Exception):  # nobody knows what a program does with several
                return cast(dict[str, Tensor], vmapped(at, randomness="different")(told))
        each = [at(node_values(told, s)) for s in range(len(u))]
    return {name: torch.stack([one[name] for one in each]) for name in model.names}


def _told(adaptive: AdaptiveNodes, u: Tensor) -> dict[str, Tensor]:
    """Values (S, ...) of what a program is told at points u (S, d)."""
    told, _ = adaptive.space._replace(depth=0).values(u[:, None])
    return {name: value[None] for name, value in told.items()} if len(u) == 1 else told


def _gaining(told: AdaptiveNodes, args: Args, x: Tensor) -> tuple[str, ...]:
    """Of the latents that a program may be told in their own units, those whose room varies less in these.

    The room of a number is what prior and data leave it, the others held: in its own units (1 + c)^(-1/2), c the
    curvature of the log-likelihood, and s times that as it is. Where it varies much no step suits all places.
    """
    model = cast(InOwnUnits, told.model)
    points = _likely(told, args, x)
    if len(points) < 2:
        return model.names
    scale = _recorded(told, args.filled, points, lambda seen: seen.scale)
    room = 0.5 * _variance_of_e(told, args, x, points).log()
    groups: dict[bytes, list[str]] = {}  # of one scale, or of scales that move together
    for name in model.names:
        log = scale[name].reshape(len(points), -1)[:, 0].log()
        moves = (log - log[0]).mul(1e6).round().long()
        groups.setdefault(moves.cpu().numpy().tobytes(), []).append(name)
    out: list[str] = []
    for names in groups.values():
        in_units = torch.cat([room[:, told.space.columns[name]] for name in names], 1)
        log_scale = torch.cat([scale[name].reshape(len(points), -1).log() for name in names], 1)
        varies = float((in_units + log_scale).var(0).mean())
        if varies > FUNNEL and varies > float(in_units.var(0).mean()):
            out += names
    return tuple(name for name in model.names if name in out)


def _log_likelihood(told: AdaptiveNodes, args: Args, x: Tensor, u: Tensor) -> Tensor:
    """log p(x | u) (M,) at u (M, d)."""
    seen = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
    given, _, _ = told.at(args, u[:, None])
    return (given.log_joint(x, seen) - given.log_prior(x))[:, 0]


def _likely(told: AdaptiveNodes, args: Args, x: Tensor) -> Tensor:
    """(M, d) draws from the prior, more of those that fit the data, and not too few of them different."""

    def log_likelihood(u: Tensor) -> tuple[Tensor]:
        return (_log_likelihood(told, args, x, u),)

    with own_random_state(0), torch.no_grad():
        u = prior_points(told, args.filled, N_ALONE if told.batched is Batched.LOOP else N_DRAWS)
        u = u[u.isfinite().all(1)]
        (found,) = by_halves(log_likelihood, u, (u.new_full((1,), -math.inf),))
        u, found = u[found.isfinite()], found[found.isfinite()]
        if len(u) < 2:
            return u
        power = 1.0
        while effective((power * found).cpu().numpy()) * len(u) < min(N_LOOKED, len(u)) / 2:
            power *= 0.8
        return u[systematic(power * found[None], N_LOOKED)[0]]


@torch.enable_grad()
def _variance_of_e(told: AdaptiveNodes, args: Args, x: Tensor, u: Tensor) -> Tensor:
    """(M, d) 1 / (1 + c) at u (M, d), c the curvature that the data give along each axis."""
    leaf = u.detach().requires_grad_()
    total = _log_likelihood(told, args, x, leaf).sum()
    (slope,) = torch.autograd.grad(total, leaf, create_graph=True, materialize_grads=True)
    if not slope.requires_grad:
        return torch.ones_like(u)
    said = curvature(slope, leaf).diagonal(dim1=-2, dim2=-1).detach()
    return 1 / (1 + said.clamp(min=0.0).nan_to_num(0.0))


def _normal(fn: Any) -> Any:
    """The Normal distribution of a site that no mask hides, or None."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return fn if type(fn) is dist.Normal else None


def _scaled_by_others(model: Model, filled: tuple[Any, ...], program: Program) -> tuple[str, ...]:
    """Names of the Normal latents whose scale other latents decide, and none of them discrete."""
    first, second = prior_draws(model, filled, 2)
    out = []
    for latent in program.latents:
        laws = [_normal(node_of(trace, latent.name)["fn"]) for trace in (first, second)]
        if laws[0] is not None and laws[1] is not None:
            if not torch.equal(laws[0].scale, laws[1].scale) and latent.row_axis is None:
                out.append(latent.name)
    if not out or not program.discrete:
        return tuple(out)
    same = {name: node_of(first, name)["value"] for name in program.continuous}
    with own_random_state(1):  # other values of the discrete ones
        third = run(model, filled, same)

    def stays(name: str) -> bool:
        one, other = (base(node_of(trace, name)["fn"]) for trace in (first, third))
        return torch.equal(one.loc, other.loc) and torch.equal(one.scale, other.scale)

    return tuple(name for name in out if stays(name))
