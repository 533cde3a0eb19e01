"""The evidence of a Pyro program from draws of its posterior that a user already has.

What can be integrated without draws is: latents of rows, discrete ones, and those that are Gaussian given the others,
by the predictors that integrate them in a fit. The rest, as unconstrained numbers u, is integrated by a warped bridge
from the draws (`bayes_mpt.evidence.bridge`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from numpy.typing import ArrayLike, NDArray
from pyro.ops.stats import split_gelman_rubin
from scipy.stats import norm
from torch import Tensor

from bayes_mpt.diagnostics import BAD_K
from bayes_mpt.evidence.bridge import Bridge, Warp, bridge, effective_draws
from bayes_mpt.evidence.chains import (
    read_arguments,
    read_chains,
    read_tables,
    refuse_call,
    refuse_other_joint,
    unconstrained,
)
from bayes_mpt.evidence.fresh import Fresh, fresh_draws
from bayes_mpt.evidence.images import Images, changes_of, group_of
from bayes_mpt.predictors import Exact, choose
from bayes_mpt.predictors.nodes.adaptive import AdaptiveNodes
from bayes_mpt.predictors.nodes.own_units import InOwnUnits, in_own_units, told_values
from bayes_mpt.predictors.nodes.resampling import by_halves
from bayes_mpt.predictors.nodes.slopes import FALSE
from bayes_mpt.predictors.nodes.symmetries import Coordinates
from bayes_mpt.predictors.nodes.weighted import program_values
from bayes_mpt.program.analysis import analyze
from bayes_mpt.program.arguments import Args
from bayes_mpt.program.batched import Batched
from bayes_mpt.program.program import Model, ModelError, one_vector
from bayes_mpt.program.shifts import observing_cells, of_cells
from bayes_mpt.program.store import own_random_state
from bayes_mpt.runtime.serial import takes_turns
from bayes_mpt.warnings import DrawsWarning, warn

__all__ = ["DrawsEvidence", "from_draws"]

Array = NDArray[np.float64]

MAX_DRAWS = 4000  # that are scored
MAX_ALONE = 1000  # of a program that runs on one at a time
TINY = 1e-300
CELLS = 2**19  # log-densities of tokens at a time
N_REFINED = 200  # draws at which rows get more nodes
MIN_OVERLAP = 0.02
BAD_R_HAT = 1.1
APART = 3.0  # errors between the two halves of the chains
APART_IMAGES = 1e-3  # of the proposal's density at the draws, from the other images
HOPELESS_K, HOPELESS = (
    1.2,
    0.5,
)  # of weights of the proposal, and their error in nats, beyond which none are drawn anew
MIN_FRESH = 1000  # draws
MISSED = 4.0  # errors between these and the bridge
AS_PRECISE = 3.0  # times the bridge's error, up to which theirs is preferred
PRECISE = 0.03  # nats, up to which it is in any case
ROUGH = 1.5  # what is added to their errors where effective draws are estimated


class DrawsEvidence(NamedTuple):
    """Log marginal likelihood of all data from draws, and how far to trust it."""

    log_evidence: float
    """Nats."""
    se: float
    """Its standard error; NaN where ``flags`` say why it cannot be believed."""
    n_eff: float
    """Effective draws, for this very number: of the posterior, or of those drawn anew; of a guide, of the row with the
    fewest. NaN if none."""
    overlap: float
    """The integral of the lesser of posterior and proposal (guide): 1 where they agree, NaN if no draw was needed."""
    pareto_k: float
    """Tail of posterior over proposal; a bridge stands values above 0.7, fresh draws and those of a guide do not."""
    split_half: float
    """Nats: from the second half of each chain minus from the first."""
    n_draws: int
    """Draws that were scored."""
    bridged: tuple[str, ...]
    """Latent sites whose draws were used."""
    integrated: tuple[str, ...]
    """The others, integrated without: what was drawn of them is ignored."""
    point_estimated: tuple[str, ...]
    """`pyro.param`s held at their values: the number is conditional on them."""
    flags: tuple[str, ...] = ()
    """What to be wary of, in words."""
    n_images: int = 1
    """Images of the draws, under symmetries of the log joint, over which the proposal was spread; 1: none."""


@takes_turns
def from_draws(
    model: Model,
    draws: Mapping[str, ArrayLike] | Any,
    *data: Any,
    log_joint: ArrayLike | bool | None = None,
    random_state: int = 0,
) -> DrawsEvidence:
    """The log marginal likelihood from draws of the posterior, such as Pyro's NUTS gives, by bridge sampling.

    Latents of rows, discrete latents and those that are Gaussian given the others are integrated first, and what was
    drawn of them is ignored; where that is all of them, no draw is used. A mode that the draws have missed is missed,
    unless it is an image of theirs: where components may change names or factors their sign without a change of the log
    joint, chains may stay in one labelling, or each in its own.

    What chains have left out around the rest of a mode is found by fresh draws of the bridge's proposal, moved by their
    weights (`bayes_mpt.evidence.fresh`). Where these are about as precise, theirs is the number, since no chain can
    mislead them.

    Parameters
    ----------
    model : callable
        The Pyro program that was drawn from.
    draws : mapping, or InferenceData or DataTree of ArviZ
        Site name -> values as in the program, (chains, draws, ...): ``mcmc.get_samples(group_by_chain=True)``. Without
        the axis of chains, (draws, ...), they are taken as one chain. At least 200 in all.
    *data
        What the program was called with: arrays or tensors, NaN where missing, and whatever else it takes.
    log_joint : array of shape (chains, draws), or False, optional
        What the sampler has recorded at each draw: log joint, with the Jacobian of Pyro's transforms or without, or the
        potential energy. It must equal the program's up to a constant. By default ``lp`` of ``sample_stats``, if there
        is one; False leaves it out.
    random_state : int, default=0
        Of the proposal's draws.

    Raises
    ------
    ModelError
        If draws are missing, too few, not finite, of another shape or outside of the support, if the recorded log
        joint is not that of this program and data, or if the program cannot be scored.

    Warns
    -----
    DrawsWarning
        Where the error is NaN: chains differ, the posterior of these data is not where the draws are, or is hardly
        where the proposal is; where it is widened, since the two halves of the chains differ; and where fresh draws
        and chains differ by more than four errors.

    Examples
    --------
    >>> import pyro.distributions as dist
    >>> def coin(x):
    ...     p = pyro.sample("p", dist.Beta(x.new_tensor(1.0), x.new_tensor(1.0)))
    ...     with pyro.plate("rows", len(x)):
    ...         pyro.sample("x", dist.Bernoulli(p), obs=x)
    >>> p = np.random.default_rng(0).beta(51, 51, size=(4, 500))  # what NUTS would draw
    >>> found = from_draws(coin, {"p": p}, np.repeat([0.0, 1.0], 50))
    >>> bool(abs(found.log_evidence + 71.398962) < 3 * found.se < 0.1)  # log B(51, 51)
    True
    """
    refuse_call(model, data, "model")
    args = read_arguments(data)
    arrays, recorded = read_tables(draws, log_joint)
    store = pyro.get_param_store()
    with store.scope(store.get_state()), own_random_state(random_state):
        if recorded is not None:
            refuse_other_joint(model, args, arrays, recorded)
        without = _without_draws(model, args)
        if without is not None:
            return without
        program = one_vector(observing_cells(lambda program: analyze(program, args), model, args))
        model = of_cells(model, program.shifts)
        if program.scale != 1.0:
            raise ModelError(
                "a program that sub-samples or scales its rows has no evidence of its own: write it with all rows"
            )
        rows = Args(args)
        joint = _LogJoint(AdaptiveNodes(model, rows, program), rows)
        values = read_chains(arrays, {p.latent.name: p.latent.shape for p in joint.space.parts})
        most = MAX_ALONE if joint.adaptive.batched is Batched.LOOP else MAX_DRAWS
        thin = math.ceil(math.prod(next(iter(values.values())).shape[:2]) / most)
        u = joint.numbers({name: v[:, ::thin] for name, v in values.items()})
        return _bridged(joint, u, np.random.default_rng(random_state))


# ------------------------------------------------------------------------------------------- what needs no draws


def _without_draws(model: Model, args: tuple[Any, ...]) -> DrawsEvidence | None:
    """The evidence, where the predictors integrate every latent; None where they do not."""
    bound = None
    with suppress(ModelError):
        bound = Exact().bind(model, args)
    if bound is None:
        program = observing_cells(lambda program: analyze(program, args), model, args)
        if not program.by_row:
            return None
        bound = choose(model, args)
    with torch.no_grad():
        found = bound.read(args).evidence()
    nan = math.nan
    return DrawsEvidence(
        float(found.by_row.sum()), found.se, nan, nan, nan, nan, 0, (), bound.structure.latent_names,
        bound.parameters, (f"every latent is integrated without draws, by {bound.name}: none was used",),
    )  # fmt: skip


class _LogJoint:
    """log p(u, x), u (M, d) the latents that cannot be integrated without draws, unconstrained."""

    def __init__(self, adaptive: AdaptiveNodes, args: Args):
        self._x = program_values(adaptive.model, args, adaptive.program)
        self._seen, self._args = ~self._x.isnan()[0], args
        # effects whose scale is drawn stand in a funnel, which no proposal reaches into: in their own units they do not
        self.adaptive = in_own_units(adaptive, args, self._x)
        self.space = self.adaptive.space

    def numbers(self, values: dict[str, Array]) -> Array:
        """Draws (C, S, ...) of the program's own latents as points u (C, S, d)."""
        u = unconstrained(self.space, values)  # what is outside of the support is refused
        if not isinstance(self.adaptive.model, InOwnUnits):
            return u
        n_chains, n = u.shape[:2]
        flat = {name: torch.as_tensor(v.reshape(n_chains * n, *v.shape[2:])) for name, v in values.items()}
        told = told_values(self.adaptive, self._args.filled, flat)
        with torch.no_grad():
            return self.space.pack_values(told, n_chains * n, 1)[:, 0].reshape(n_chains, n, -1).numpy()

    def __call__(self, u: Array) -> Array:
        """At points u (M, d): (M,)."""

        def value(part: Tensor) -> tuple[Tensor]:
            return (self._value(part),)

        with torch.no_grad(), pyro.validation_enabled(False):
            parts = [by_halves(value, p, (p.new_full((1,), -math.inf),))[0] for p in self._chunks(u)]
        return np.nan_to_num(torch.cat(parts).numpy(), nan=-math.inf, posinf=math.inf, neginf=-math.inf)

    def with_slope(self, u: Array) -> tuple[Array, Array]:
        """The same (M,) with its slope (M, d)."""

        def both(part: Tensor) -> tuple[Tensor, Tensor]:
            leaf = part.detach().requires_grad_()
            value = self._value(leaf)
            slope = torch.autograd.grad(value.sum(), leaf, materialize_grads=True)[0]
            return value.detach(), slope

        with torch.enable_grad(), pyro.validation_enabled(False):
            found = [
                by_halves(both, p, (p.new_full((1,), -math.inf), p.new_zeros(1, p.shape[1])))
                for p in self._chunks(u)
            ]
        value, slope = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
        return value, slope

    def inside(self, u: Array) -> float:
        """log of the mean over posterior draws u of what more nodes in each row change; 0 where rows have none."""
        if self.adaptive.rows is None:
            return 0.0
        change = []
        with torch.no_grad(), pyro.validation_enabled(False):
            for part in self._chunks(u[:: max(1, len(u) // N_REFINED)]):
                given = self.adaptive.at(self._args, part[:, None])[0]
                joints = [g.log_joint(self._x, self._seen)[:, 0] for g in (given.with_detail("fine"), given)]
                change.append(joints[0] - joints[1])
        all_ = torch.cat(change)
        return float(all_.logsumexp(0)) - math.log(len(all_))

    def _value(self, u: Tensor) -> Tensor:
        given, part, _ = self.adaptive.at(self._args, u[:, None])
        return (given.log_joint(self._x, self._seen) + part)[:, 0]

    def _chunks(self, u: Array) -> Iterator[Tensor]:
        at_once = CELLS // max(1, self.adaptive.program.n_tokens * self.adaptive.n_evaluations)
        yield from torch.as_tensor(u).to(self._x).split(max(1, at_once))


# ---------------------------------------------------------------------------------------------------- the bridge


def _bridged(joint: _LogJoint, u: Array, rng: np.random.Generator) -> DrawsEvidence:
    """From draws u (C, S, d)."""
    n_chains, n, d = u.shape
    flat = u.reshape(-1, d)
    value, slope = joint.with_slope(flat)
    if not np.isfinite(value).all():
        i = int(np.argmin(np.isfinite(value)))
        raise ModelError(
            f"draw {i % n} of chain {i // n} has no density under the program and these data: were the draws made of "
            "other data, or under another prior?"
        )
    images, too_many = _images(joint, u, rng)
    found = bridge(joint, u, value.reshape(n_chains, n), rng, images)
    inside = joint.inside(flat)
    split = float(found.by_half[0] - found.by_half[1])
    fresh = None
    if found.pareto_k < HOPELESS_K and found.se_by_proposal < HOPELESS:
        most = MAX_ALONE if joint.adaptive.batched is Batched.LOOP else MAX_DRAWS
        fresh = fresh_draws(
            joint, Warp.of(flat, value, images), min(max(2 * n_chains * n, MIN_FRESH), most), rng
        )
    number = _believed(found, fresh)
    se = math.hypot(number.se, inside)
    wrong = [*too_many, *number.wrong, *_not_as_drawn(joint, u, value, slope, images, rng)]
    if found.overlap < MIN_OVERLAP:
        wrong.append(
            f"posterior and proposal hardly overlap ({found.overlap:.3f}): more draws, or fewer latents that are drawn "
            "(those of rows in a plate are integrated)"
        )
    flags = [*wrong, *number.flags]
    if not number.fresh and abs(split) > APART * float(np.hypot(*found.se_by_half)):
        se = math.hypot(abs(split) / 2, inside)
        flags.append(
            f"the two halves of the chains differ by {split:.2f} nats, more than their errors allow: run them longer"
        )
    if flags:
        warn(f"the evidence from these draws is unreliable: {'; '.join(flags)}", DrawsWarning)
    program = joint.adaptive.program
    return DrawsEvidence(
        number.log_z + inside,
        math.nan if wrong else se,
        number.n_eff,
        found.overlap,
        number.pareto_k,
        split,
        n_chains * n,
        joint.space.names,
        tuple(name for name in program.latent_names if name not in joint.space.names),
        program.parameters,
        tuple(flags),
        1 if images is None else len(images),
    )


class _Number(NamedTuple):
    """Which number is believed, of the bridge from the chains or of fresh draws of its proposal."""

    log_z: float
    se: float
    n_eff: float
    pareto_k: float
    fresh: bool
    flags: tuple[str, ...] = ()
    """What to be wary of."""
    wrong: tuple[str, ...] = ()
    """Why neither is believed."""


def _believed(found: Bridge, fresh: Fresh | None) -> _Number:
    """Of fresh draws where they are about as precise, since no chain can mislead them, else of the bridge."""
    bridged = _Number(found.log_z, found.se, found.n_eff, found.pareto_k, False)
    if fresh is None:
        return bridged
    gap = fresh.log_z - found.log_z
    both = math.hypot(found.se, fresh.se)
    known = fresh.pareto_k <= BAD_K
    said = (
        f"fresh draws around the chains find the log evidence {gap:+.2f} nats from what the chains tell, "
        f"{abs(gap) / both:.0f} errors: they have left out, or stayed too long in, a part of the posterior"
    )
    if abs(gap) > MISSED * both and (known or gap > 0):
        if not known:
            return bridged._replace(wrong=(f"{said}; run them longer",))
        flags = (f"{said}. The number is that of the fresh draws; run longer chains",)
        return _Number(fresh.log_z, fresh.se, fresh.n_eff, fresh.pareto_k, True, flags)
    if known and fresh.se <= max(AS_PRECISE * found.se, PRECISE):
        return _Number(fresh.log_z, fresh.se, fresh.n_eff, fresh.pareto_k, True)
    # what the other one leaves of doubt; of a heavy tail a mean is too low as a rule, and speaks where it is above
    doubt = abs(gap) - fresh.se if known else gap
    return bridged._replace(se=math.hypot(found.se, max(0.0, doubt)))


def _images(joint: _LogJoint, u: Array, rng: np.random.Generator) -> tuple[Images | None, list[str]]:
    """The images over which draws (C, S, d) are not spread, None where there are none; or why they are not counted."""
    where = Coordinates(joint.space)
    # chains that stay in different labellings are spread over these together, and each over none
    changes = changes_of(joint, where, u, rng, apart=bool(_not_mixed(joint, u)))
    if not changes:
        return None, []
    images = group_of(where, changes)
    if images is not None:
        return images, []
    return None, [
        "the log joint stays the same under more changes of names or signs of latents than can be tried (720), and the "
        "draws are not spread over these: the number leaves other labellings out. Order or fix what may change places"
    ]


def _not_as_drawn(
    joint: _LogJoint, u: Array, value: Array, slope: Array, images: Images | None, rng: np.random.Generator
) -> list[str]:
    """What says that chains (C, S, d) have not mixed, or that these are no draws of the log joint."""
    if images is None:
        return [*_not_mixed(joint, u), *_slanted(u, slope.reshape(u.shape))]
    flat = u.reshape(-1, u.shape[-1])
    one, others = images.gathered(flat, int(value.argmax()))
    # where images overlap, draws moved to one of them end at an edge, and have a slope there
    moved = one if others < APART_IMAGES else images.at_random(flat, rng)
    return [
        *_not_mixed(joint, one.reshape(u.shape)),
        *_slanted(moved.reshape(u.shape), joint.with_slope(moved)[1].reshape(u.shape)),
    ]


def _not_mixed(joint: _LogJoint, u: Array) -> list[str]:
    """What says that chains (C, S, d) are in different places, or their halves."""
    r_hat = split_gelman_rubin(torch.as_tensor(u)).numpy()
    worst = int(np.argmax(r_hat))
    if not r_hat[worst] > BAD_R_HAT:
        return []
    names = [p.latent.name for p in joint.space.parts for _ in range(math.prod(p.shape))]
    return [f"chains have not mixed: R-hat of site {names[worst]!r} is {r_hat[worst]:.2f}; run them longer"]


def _slanted(u: Array, slope: Array) -> list[str]:
    """What says that u (C, S, d) are no draws of the density whose logarithm has this slope there.

    Under a density that vanishes at infinity, E[slope] = 0 and E[(u - E u) slope] = -1 for each number.
    """
    centred = u - u.mean((0, 1))
    zero = np.concatenate([slope, centred * slope + 1], -1)
    off = np.abs(zero.mean((0, 1))) / (zero.std((0, 1)) / np.sqrt(effective_draws(zero)) + TINY)
    if not off.max() > ROUGH * norm.isf(FALSE / off.size):
        return []
    return [
        f"the log joint has a slope where these draws are dense ({off.max():.0f} errors from none): they are draws of "
        "other data, of another prior, or of chains that have not converged, or the log joint jumps"
    ]
