"""The evidence of a Pyro program from draws of a trained guide.

Z is the mean of their weights p(u, x) / q(u). Where a group of J changes g of the latents keeps the log joint, as
components that change names or factors that change their sign, and the guide q draws one of the images alone, the mean
of its images takes its place (`bayes_mpt.evidence.images`):

    q_sym(u) = 1/J sum over g of q(g u) |dg / du|,    Z = E[p(u, x) / q_sym(u)],    u ~ q

since p / q_sym is the same at all images. No count of modes enters: modes that overlap or are one come out right too.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from torch import Tensor

from bayes_mpt.diagnostics import BAD_K, pareto_k
from bayes_mpt.evidence.chains import MIN_DRAWS, read_arguments, refuse_call
from bayes_mpt.evidence.from_draws import DrawsEvidence
from bayes_mpt.evidence.images import Images, changes_of, group_of
from bayes_mpt.predictors import Importance
from bayes_mpt.predictors.base import Guide
from bayes_mpt.predictors.nodes.guide import Drawn, GuideDraws
from bayes_mpt.predictors.nodes.slopes import numbers_at, slopes_of, what_is_missed
from bayes_mpt.predictors.nodes.symmetries import Coordinates
from bayes_mpt.predictors.nodes.weighted import Nodes, warn_if_slow
from bayes_mpt.program.batched import Batched
from bayes_mpt.program.latents import Space
from bayes_mpt.program.program import Model
from bayes_mpt.program.run import SetLatents
from bayes_mpt.program.shifts import observing_cells
from bayes_mpt.program.sites import is_point, latent_nodes
from bayes_mpt.program.store import own_random_state
from bayes_mpt.program.whole_plates import whole_plates
from bayes_mpt.runtime.serial import takes_turns
from bayes_mpt.warnings import DrawsWarning, warn

__all__ = ["from_guide"]

Array = NDArray[np.float64]

N_SEEN = 8  # draws at which it is seen what the auxiliary sites of a guide hold
SAME = 1e-6  # of such a number, and of a log-density


@takes_turns
def from_guide(
    model: Model, guide: Guide, *data: Any, n_draws: int = 1000, random_state: int = 0
) -> DrawsEvidence:
    """The log marginal likelihood from draws of a trained guide, by the mean of their weights as they are.

    The product of the rows' means where rows are independent under program and guide. Latents of rows that the guide
    leaves out are integrated. Plates that draw some rows, on which program and guide were trained, take all of them.
    The error is NaN where the weights' tail is too heavy for one, at Pareto k above 0.7, or
    where the slope of the log joint at the weighted draws shows that they miss a part of the posterior.

    Where components may change names or factors their sign without a change of the log joint, a guide of the data set's
    latents that draws one of the images tells of all of them, and the number has its error: the guide's density is the
    mean of its images. Where that density is not known, as of a guide with auxiliary draws of its own, or there are
    more than 720 images, the error is NaN.

    Parameters
    ----------
    model : callable
        The Pyro program.
    guide : callable
        With the program's continuous latents, its parameters as they stand in Pyro's store.
    *data
        What the program is called with.
    n_draws : int, default=1000
        At least 200.
    random_state : int, default=0
        Of the draws.

    Raises
    ------
    ModelError
        If the guide does not fit the program; the message names the site.
    ValueError
        If there are fewer than 200 draws.

    Warns
    -----
    DrawsWarning
        Where the error is NaN.

    Examples
    --------
    >>> import pyro.distributions as dist
    >>> def coin(x):
    ...     p = pyro.sample("p", dist.Beta(x.new_tensor(1.0), x.new_tensor(1.0)))
    ...     with pyro.plate("rows", len(x)):
    ...         pyro.sample("x", dist.Bernoulli(p), obs=x)
    >>> def guide(x):
    ...     pyro.sample("p", dist.Beta(x.new_tensor(45.0), x.new_tensor(45.0)))
    >>> found = from_guide(coin, guide, np.repeat([0.0, 1.0], 50))
    >>> bool(abs(found.log_evidence + 71.398962) < 3 * found.se < 0.1)
    True
    """
    if not isinstance(n_draws, int | np.integer) or n_draws < MIN_DRAWS:
        raise ValueError(f"n_draws must be an integer of at least {MIN_DRAWS}, got {n_draws!r}")
    n_draws = int(n_draws)
    refuse_call(model, data, "model")
    refuse_call(guide, data, "guide")
    args = read_arguments(data)
    store = pyro.get_param_store()
    state, seed = store.scope(store.get_state()), own_random_state(random_state)
    with state, seed, torch.no_grad(), whole_plates():  # the guide may have been trained on some rows a step
        bind = Importance(n_draws).from_guide
        bound = observing_cells(lambda program: bind(program, args, guide), model, args)
        warn_if_slow(bound.batched, bound)
        nodes = bound.read(args)
        where, u = numbers_at(bound, nodes)
        points = u.double().cpu().numpy()
        density = _Density.of(bound, nodes, where)
        images, one_sided = _images(density, points, np.random.default_rng(random_state))
        if images is not None:
            nodes = density.spread(images, points[:, 0])
            points = images.at_random(points[:, 0], np.random.default_rng(random_state))[:, None]
        slope = slopes_of(bound, nodes, where, torch.as_tensor(points).to(u))
        seen = torch.ones(nodes.value.shape[1], dtype=torch.bool, device=nodes.value.device)
        log_w = nodes.last.log_weight + nodes.last.given.log_joint(nodes.value, seen) + math.log(n_draws)
        inside = float(nodes.gain_inside().sum())
    weights = log_w.double().cpu().numpy()  # (S, N)
    log_z = logsumexp(weights, axis=0) - math.log(n_draws)  # (N,)
    relative = np.exp(weights - log_z)
    halves = [logsumexp(weights[part], axis=0).sum() for part in (slice(0, None, 2), slice(1, None, 2))]
    k = float(np.max(pareto_k(weights)))
    missed = what_is_missed(points, slope, relative[..., None] / n_draws)
    flags = [*_heavy(k), *([missed] if missed else []), *one_sided]
    if flags:
        warn(f"the evidence from this guide has no reliable error: {'; '.join(flags)}", DrawsWarning)
    se = math.hypot(math.sqrt(float(relative.var(0).sum()) / n_draws), inside)
    return DrawsEvidence(
        float(log_z.sum()) + inside,
        math.nan if flags else se,
        float(np.min(n_draws**2 / np.square(relative).sum(0))),
        float(np.min(np.minimum(relative, 1).mean(0))),
        k,
        float(halves[1] - halves[0]),
        n_draws,
        nodes.last.names,
        tuple(n for n in bound.structure.latent_names if n not in nodes.last.names),
        bound.structure.parameters,
        tuple(flags),
        1 if images is None else len(images),
    )


def _heavy(k: float) -> list[str]:
    if k <= BAD_K:
        return []
    return [
        f"the weights' tail is too heavy (Pareto k {k:.2f}): train the guide longer, or take a richer one"
    ]


class _Density(NamedTuple):
    """Log densities of unconstrained latents u (M, d) of the data set: of the program, and of its guide."""

    bound: GuideDraws
    nodes: Nodes
    drawn: Drawn
    where: Space

    @classmethod
    def of(cls, bound: GuideDraws, nodes: Nodes, where: Space) -> _Density:
        return cls(bound, nodes, bound.drawn(nodes.args, None), where)

    def log_joint(self, u: Array) -> Array:
        """Of the program, (M,)."""
        values, log_det = self.where.values(self._points(u))
        given, beside, *_ = self.drawn.given(values, len(u))
        seen = torch.ones(self.drawn.value.shape[1], dtype=torch.bool, device=self.drawn.value.device)
        found: Array = (
            (given.log_joint(self.drawn.value, seen) + beside + log_det)[:, 0].double().cpu().numpy()
        )
        return found

    def log_q(self, u: Array, auxiliary: dict[str, Array]) -> Array:
        """Of the guide, (M,): sites of the program's names are set, and ``auxiliary`` ones to these columns of u."""
        values, log_det = self.where.values(self._points(u))
        runs, args, shown = self.bound.runs, self.drawn.args, self.drawn.shown
        before = runs.trace(args.filled, shown, len(u))
        told = {n: v for n, v in values.items() if not is_point(before.nodes[n])}
        for name, columns in auxiliary.items():
            value = before.nodes[name]["value"]
            told[name] = torch.as_tensor(u[:, columns]).to(value).reshape(value.shape)
        with SetLatents(told):
            trace = runs.trace(args.filled, shown, len(u))
        found: Array = (runs.log_q(trace, len(u)) + log_det)[:, 0].double().cpu().numpy()
        return found

    def auxiliary(self) -> dict[str, Array] | None:
        """The columns of u that each auxiliary site of the guide holds, as autoguides do; None if it holds others.

        Seen at draws, at which the density that is found so must be that of the run.
        """
        runs = self.bound.runs
        trace = runs.trace(self.drawn.args.filled, self.drawn.shown, N_SEEN)
        values = {name: trace.nodes[name]["value"] for name in self.where.names}
        u = self.where.pack_values(values, N_SEEN, 1)  # (8, 1, d)
        out = {}
        for node in latent_nodes(trace):
            if node["name"] in values:
                continue
            held = (
                node["value"].reshape(N_SEEN, -1) if len(node["value"]) == N_SEEN else u.new_zeros(N_SEEN, 0)
            )
            off = (held[:, :, None] - u).abs().amax(0)  # (k, d)
            if not len(off) or bool((off.amin(1) > SAME * (1 + held.abs().amax(0))).any()):
                return None
            out[node["name"]] = off.argmin(1).cpu().numpy()
        known = (runs.log_q(trace, N_SEEN) + self.where.values(u)[1])[:, 0].double().cpu().numpy()
        found = self.log_q(u[:, 0].double().cpu().numpy(), out)
        return out if np.allclose(found, known, rtol=SAME, atol=SAME) else None

    def spread(self, images: Images, u: Array) -> Nodes:
        """The nodes at draws u (S, d) of the guide, with weights by the mean of its images."""
        auxiliary = self.auxiliary()
        assert auxiliary is not None

        def log_q(points: Array) -> Array:
            parts = [
                self.log_q(part, auxiliary) for part in np.array_split(points, max(1, len(points) // len(u)))
            ]
            return np.concatenate(parts)

        change = log_q(u) - images.mean_density(log_q, u)
        last = self.nodes.last
        log_weight = last.log_weight + torch.as_tensor(change).to(last.log_weight)[:, None]
        return self.nodes.at_nodes(last._replace(log_weight=log_weight))

    def _points(self, u: Array) -> Tensor:
        return torch.as_tensor(u)[:, None].to(self.nodes.last.log_weight)


def _images(density: _Density, u: Array, rng: np.random.Generator) -> tuple[Images | None, list[str]]:
    """The images over which draws u (S, 1, d) of a guide are not spread, or why they cannot be counted."""
    bound = density.bound
    if bound.structure.by_row or bound.batched is Batched.LOOP or u.shape[1] != 1:
        return None, []
    where = Coordinates(density.where)
    with pyro.validation_enabled(False):
        changes = changes_of(density.log_joint, where, u.swapaxes(0, 1), rng)
        if not changes:
            return None, []
        images = group_of(where, changes) if density.auxiliary() is not None else None
    if images is not None:
        return images, []
    return None, [
        "the log joint stays the same under changes of names or signs of latents, and the guide draws one of the "
        "images alone, while its density at the others is not known, or they are more than 720: these are left out. "
        "Order or fix what may change places, or take from_draws"
    ]
