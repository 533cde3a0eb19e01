"""Sequential Monte Carlo over latents that all rows share: the evidence with everything integrated.

Particles go from a reference r to the posterior along r(u)^(1 - b) p(u, x)^b (Neal 2001; Del Moral, Doucet & Jasra
2006), or by revealing tokens in turn (Chopin 2002), reweighted, resampled and moved by Hamiltonian Monte Carlo. The
reference is a fixed mixture of the prior, so that no mode is missed which the prior reaches, and of the modes that
were found, so that the way is short. A pilot finds temperatures, moves and the number of particles; with these frozen,
each of R independent runs gives an unbiased estimate of Z, and the number comes from them alone.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from bayes_mpt.diagnostics import log_mean
from bayes_mpt.predictors.base import Bound, Conditionals, Evidence, Guide, Posterior, Predictor
from bayes_mpt.predictors.nodes.adaptive import AdaptiveNodes
from bayes_mpt.predictors.nodes.conjugacy import node_values
from bayes_mpt.predictors.nodes.missed import Shares, shares_of, unled, with_climbs, with_strays
from bayes_mpt.predictors.nodes.modes import Modes, ModeSearch
from bayes_mpt.predictors.nodes.own_units import in_own_units, own_values
from bayes_mpt.predictors.nodes.particles import Shown, Target
from bayes_mpt.predictors.nodes.path import Arrived, Path, Stage, next_step
from bayes_mpt.predictors.nodes.prior import halved, spread_of, vague_sites, within_reach
from bayes_mpt.predictors.nodes.reference import Reference
from bayes_mpt.predictors.nodes.resampling import systematic, weighted_root
from bayes_mpt.predictors.nodes.tempering import NEVER, Particles
from bayes_mpt.predictors.nodes.two_sided import TwoSided, simulated
from bayes_mpt.predictors.nodes.weighted import program_values, side_by_side, warn_if_slow
from bayes_mpt.program.analysis import analyze
from bayes_mpt.program.arguments import Args
from bayes_mpt.program.program import Model, ModelError, Program, list_names, one_vector
from bayes_mpt.warnings import HeavyTailWarning, MissedModeWarning, VaguePriorWarning, warn

__all__ = ["SequentialMonteCarlo"]

MAX_SD = 0.25  # of log Z between runs; where a pilot foresees more there are twice the particles
WIDE_SD = 1.0  # of log Z between runs, above which their error is unreliable
MAX_DOUBLINGS = 4
PILOT = 0.25  # of the particles
MIN_PILOT = 32
MAX_LOCATED = 256  # latents, up to which modes and their curvatures are looked for
N_PRIOR = 400  # draws that tell whether a prior is vague
N_CLIMBS = 12  # where the prior is too vague to say from where
MAX_PILOTS = 3
LONG = 4  # levels, from which the start is moved to where the pilot's particles are
MAX_DRAWS = 200  # particles that a prediction averages over
KEEP = 0.5  # share of effective particles, below which those that see one more token are moved


class SequentialMonteCarlo(Predictor):
    """Integrate every latent of the data set: the Bayesian evidence, with a standard error from independent runs.

    Discrete latents are summed out for each particle. The program may hold no `pyro.param`: what is to be integrated
    must have a prior.

    Parameters
    ----------
    num_particles : int, default=256
        Of each run, at least: doubled up to four times where a pilot foresees that log Z varies by more than a quarter
        of a nat between runs, or where there may be more modes than these would find.
    num_runs : int, default=8
        R independent runs with temperatures and moves frozen after a pilot.
    num_moves : int, default=1
        Hamiltonian moves a temperature.
    check : bool or int, default=False
        On how many data sets simulated from the prior the runs are checked from both sides, with each evidence: from
        the reference to the posterior, which gives a log Z that is too low on the average, and back from the latents
        that made the data, which are an exact draw of the posterior, one that is too high. A gap tells of posterior
        mass that the runs do not reach. True: one.

    Notes
    -----
    The standard error is that of the mean of Z over the runs, widened for their small number. It is NaN, with a
    `MissedModeWarning`, where a mode with posterior mass was found by fewer than half of the runs or from fewer than
    ten first particles, where climbs have found so many modes that ten particles from the prior for each that there may
    be are more than all runs start with, or where ``check`` leaves a gap of more than a nat. No mode can be seen that
    neither a climb nor a particle has come near: of the prior it must hold more than about one part in R times the
    number of particles.

    Effects, Normal latents whose scale other latents decide, are moved in units of it where their room varies too much
    otherwise.

    A prior is vague if its draws leave the range of floating point, as those of Gamma(1e-4, 1e-4) do, or if it is e^50
    times as wide as the posterior. Then particles start at the modes alone, and a `VaguePriorWarning` says by how much
    half of the prior's scale changes the number.

    ``diagnostics`` hold the cost in ``levels``, at most 200 temperatures; ``log_z`` of each run and their ``sd_log_z``;
    of each mode the ``mode_share`` and ``mode_ancestors`` by run (R, K) and the ``mode_mass`` (K,).

    Examples
    --------
    >>> import pyro, pyro.distributions as dist, torch
    >>> def coin(x):
    ...     p = pyro.sample("p", dist.Beta(x.new_tensor(1.0), x.new_tensor(1.0)))
    ...     with pyro.plate("rows", len(x)):
    ...         pyro.sample("x", dist.Bernoulli(p), obs=x)
    >>> x = torch.tensor([1.0] * 50 + [0.0] * 50, dtype=torch.float64)
    >>> _ = torch.manual_seed(0)
    >>> found = SequentialMonteCarlo().bind(coin, (x,)).read((x,)).evidence()
    >>> abs(float(found.by_row) + 71.398962) < 3 * found.se < 0.3
    True
    """

    def __init__(
        self, num_particles: int = 256, num_runs: int = 8, num_moves: int = 1, check: bool | int = False
    ):
        self.num_particles = num_particles
        self.num_runs = num_runs
        self.num_moves = num_moves
        self.check = check

    def bind(self, model: Model, args: tuple[Any, ...], guide: Guide | None = None) -> Bound:
        return self.bind_program(model, args, analyze(model, args))

    def bind_program(self, model: Model, args: tuple[Any, ...], program: Program) -> Bound:
        """`bind` where it is known what `analyze` finds."""
        for name, least in (("num_particles", 8), ("num_runs", 2), ("num_moves", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if not isinstance(self.check, int) or self.check < 0:
            raise ValueError(f"check must be True, False or a number of data sets, got {self.check!r}")
        if not program.continuous:
            raise ModelError("the program has no continuous latent to sample: use Exact()")
        if program.by_row:
            raise ModelError(
                f"all latents {list(program.latent_names)} are inside the rows plate {program.rows_plate!r}: rows "
                "are independent, and each is integrated by itself. Use Quadrature(), or Importance() with a guide"
            )
        if program.parameters:
            raise ModelError(
                f"the program has pyro.params {list(program.parameters)}: sequential Monte Carlo integrates and does "
                "not train. Give them priors by pyro.sample, or use Importance() with a guide"
            )
        bound = _Tempered(self, model, args, one_vector(program))
        warn_if_slow(bound.adaptive.batched, bound)
        if not bound.adaptive.space.parts:
            raise ModelError(
                f"all latents {list(program.latent_names)} are integrated group by group "
                f"({bound.adaptive.inside}): there is nothing left for particles. Use Quadrature()"
            )
        return bound


class _Tempered(Bound):
    """See `SequentialMonteCarlo`."""

    name = "SequentialMonteCarlo"
    model: Model
    structure: Program

    def __init__(self, settings: SequentialMonteCarlo, model: Model, args: tuple[Any, ...], program: Program):
        self.settings, self.model, self.structure = settings, model, program
        adaptive = AdaptiveNodes(model, Args(args), program)
        self.adaptive = in_own_units(adaptive, Args(args), program_values(model, Args(args), program))
        self.search = ModeSearch(self.adaptive)
        space = self.adaptive.space
        self.why = (
            f"{settings.num_runs} runs of at least {settings.num_particles} particles over the {space.width} "
            f"numbers of {list_names(space.names)}, from prior and modes to the posterior{self.adaptive.inside}"
        )

    def read(self, args: tuple[Any, ...]) -> Particulate:
        return Particulate(self.settings, self.model, self.structure, self.search, Args(args))


class _Integrated(NamedTuple):
    """What runs have found."""

    evidence: Evidence
    u: Tensor
    """(M, d) particles of the posterior."""
    path: Path
    stages: list[Stage]


class Particulate(Conditionals):
    """One vector of observations under latents that particles stand for.

    The runs are made once, when they are first needed: what is asked, in whatever order, has the same particles.
    """

    structure: Program

    def __init__(
        self,
        settings: SequentialMonteCarlo,
        model: Model,
        program: Program,
        search: ModeSearch,
        args: Args,
    ):
        self.settings, self.model, self.structure = settings, model, program
        self._search, self.adaptive, self.space = search, search.adaptive, search.adaptive.space
        self._args = args
        self.value = program_values(model, args, program)

    # ---------------------------------------------------------------------------------------------- what it gives

    def evidence(self, orders: Tensor | None = None) -> Evidence:
        """log of the mean of Z over the runs, and its standard error, sd(Z) / (mean(Z) sqrt R) x t / 2."""
        return self._integrated.evidence

    def _joint(self) -> Tensor:
        return self.evidence().by_row

    def conditionals(self, visible: Tensor) -> Tensor:
        x, out = self.value, []
        with torch.no_grad(), pyro.validation_enabled(False):
            for mask in visible:
                shown = self._shown(mask & ~x.isnan()[0])
                predictive = [g.predictive(x, mask)[:, 0] for g, _ in shown.given(self._posterior(shown))]
                log_prob = torch.cat(predictive).logsumexp(0) - math.log(sum(len(p) for p in predictive))
                out.append(torch.where(~mask & ~x.isnan(), log_prob, 0.0))
        return torch.stack(out)

    def chain(self, order: Tensor, stops: list[int] | None = None) -> Tensor:
        with torch.no_grad(), pyro.validation_enabled(False):
            stops = stops or list(range(order.shape[1] + 1))
            return torch.stack([self._reveal(self.value, tokens, stops) for tokens in order])

    def posterior(self, visible: Tensor | None = None) -> Posterior:
        x = self.value
        with torch.no_grad(), pyro.validation_enabled(False):
            shown = self._shown(~x.isnan()[0] if visible is None else visible & ~x.isnan()[0])
            u = self._integrated.u if visible is None else self._posterior(shown)
            total = torch.stack([g.posterior(x, shown.seen).tokens().sum(0) for g, _ in shown.given(u)]).sum(
                0
            )
            values = own_values(self.adaptive, self._args.filled, u)
            mean = side_by_side(self.space, values, len(u), 1).mean(0)
        seen = torch.where(shown.seen, x, torch.nan)
        return Posterior(mean, total / len(u), of_shared=lambda: self._shared(shown, u, seen))

    def _shared(self, shown: Shown, u: Tensor, x: Tensor) -> list[tuple[float, dict[str, Tensor]]]:
        """Weighted values of the latents at some of the particles u (M, d) given the tokens x (1, T)."""
        with torch.no_grad(), pyro.validation_enabled(False):
            u = u[:: max(1, len(u) // MAX_DRAWS)]
            everything = torch.ones_like(shown.seen)
            even = ((g, x.new_ones(len(log_det))) for g, log_det in shown.given(u))
            nothing: list[list[dict[str, Tensor]]] = [[{}]] * len(u)
            inside = [values for g, share in even for values in g.posterior(x, everything).values(share)]
            beside = own_values(self.adaptive, self._args.filled, u)
        return [
            (1 / (len(u) * len(each)), {**node_values(beside, s), **values})
            for s, each in enumerate(inside or nothing)
            for values in each
        ]

    # ------------------------------------------------------------------------------------------------------ the runs

    @cached_property
    def _integrated(self) -> _Integrated:
        """The evidence of the rows, and particles of their posterior."""
        settings, shown = self.settings, self._shown(~self.value.isnan()[0])
        with torch.no_grad(), pyro.validation_enabled(False):
            reference, vague = self._reference(shown)
            path, stages, n = self._prepare(shown, reference)
            arrived = path.run(stages, settings.num_runs, n)
            u = _pooled(arrived)
            shares = shares_of(_strays(path, arrived) or path.target.reference, arrived)
            inside = self._inside(shown, u)
            some = u[:: max(1, len(u) // MAX_DRAWS)]
            changes = {name: halved(self.adaptive, self._args.filled, some, name) for name in vague}
        log_z = arrived.log_z.double().cpu().numpy()
        lml, se = log_mean(log_z)
        # few runs may agree by chance: no less than what the weights tell
        se = max(se, math.sqrt(arrived.variance / len(log_z)))
        if lml < NEVER:
            lml = -math.inf
        diagnostics: dict[str, Any] = {
            "num_particles": n,
            "levels": len(stages),
            "log_z": log_z,
            "sd_log_z": float(log_z.std(ddof=1)),
            "mode_share": shares.share,
            "mode_ancestors": shares.ancestors,
            "mode_mass": shares.mass,
        }
        if inside:
            diagnostics["change with more nodes in each row"] = inside
        if vague:
            diagnostics["change with half the scale of a vague prior"] = changes
        if settings.check:
            diagnostics["check"] = [self._check() for _ in range(int(settings.check))]
        doubt = unled(path.target.reference, n * settings.num_runs)
        se = _judge(math.hypot(se, inside), shares, doubt, diagnostics)
        by_row = self.value.new_tensor([lml + inside])
        return _Integrated(Evidence(by_row, se, diagnostics, drawn=True), u, path, stages)

    def _prepare(self, shown: Shown, reference: Reference) -> tuple[Path, list[Stage], int]:
        """A path, its stages, and how many particles of each run it needs: all by pilots."""
        settings = self.settings
        n_pilot = max(MIN_PILOT, int(PILOT * settings.num_particles))
        for attempt in range(MAX_PILOTS):
            path = Path(Target(shown, reference), settings.num_moves)
            stages, arrived = path.pilot(settings.num_runs, n_pilot)
            more = _strays(path, arrived) if attempt < MAX_PILOTS - 1 else None
            if more is None:
                break
            reference = more
        if len(stages) > LONG and len(reference):
            other = Path(
                Target(shown, reference.refitted(arrived.particles.u.flatten(0, 1))), settings.num_moves
            )
            found = other.pilot(settings.num_runs, n_pilot)
            if len(found[0]) < len(stages):
                path, (stages, arrived) = other, found
        # of few runs no less than what the weights tell
        variance = max(float(arrived.log_z.var()), arrived.variance) * n_pilot
        n = settings.num_particles
        most = n * 2**MAX_DOUBLINGS
        start = path.target.reference
        wanted = start.wanted / (max(start.prior, 1e-300) * settings.num_runs)
        while n < most and (variance / n > MAX_SD**2 or n < wanted - 1 <= most):
            n *= 2
        return path, stages, n

    @cached_property
    def _modes(self) -> Modes:
        """The modes of the posterior given all tokens."""
        return self._search.find(self._args, self.value, torch.ones_like(self.value[0], dtype=torch.bool))

    def _reference(self, shown: Shown) -> tuple[Reference, tuple[str, ...]]:
        """Where particles start, and which latents have a vague prior."""
        points, found = shown.prior_points(N_PRIOR), None
        vague = vague_sites(self.adaptive, points, None)
        if self.space.width <= MAX_LOCATED and bool(shown.seen.any()):
            if vague:  # whose draws are no places to climb from
                starts = within_reach(self.adaptive, points, vague, N_CLIMBS)
                found = with_climbs(shown, replace(Reference.of_prior(points), prior=0.0), starts)
            else:
                modes = self._modes
                if bool((~shown.seen & ~shown.x.isnan()[0]).any()):  # those of fewer tokens are near
                    modes = self._search.find(self._args, shown.x, shown.seen, modes)
                found = Reference.around(modes)
                found = found and found.led(self.settings.num_particles * self.settings.num_runs)
        vague = vague_sites(self.adaptive, points, None if found is None else found.root[0])
        if found is None and vague and bool(shown.seen.any()):
            raise ModelError(
                f"the prior of latent {vague[0]!r} is so vague that its draws leave the range of floating point, and "
                "no mode of the posterior was found to start at: write a narrower prior, in units of the data"
            )
        if found is None:
            return Reference.of_prior(points), ()
        return (replace(found, prior=0.0) if vague else found.within(spread_of(points))), vague

    def _shown(self, seen: Tensor) -> Shown:
        return Shown(self.adaptive, self._args, self.value, seen)

    def _posterior(self, shown: Shown) -> Tensor:
        """Particles (M, d) given the tokens shown."""
        n = self.settings.num_particles
        if not bool(shown.seen.any()):
            return shown.prior_points(n)
        path = Path(Target(shown, self._reference(shown)[0]), self.settings.num_moves)
        return path.pilot(1, n)[1].particles.u[0]

    def _inside(self, shown: Shown, u: Tensor) -> float:
        """log of the mean over the posterior of Z with more nodes in each row over Z: 0 where rows have none."""
        if self.adaptive.rows is None:
            return 0.0
        x, seen, u = self.value, shown.seen, u[:: max(1, len(u) // MAX_DRAWS)]
        change = [
            (g.with_detail("fine").log_joint(x, seen) - g.log_joint(x, seen))[:, 0] for g, _ in shown.given(u)
        ]
        return float(torch.cat(change).logsumexp(0)) - math.log(len(u))

    def _check(self) -> TwoSided:
        """Runs to the posterior and back, on data simulated from a draw of the prior."""
        data, start = simulated(self.adaptive.model, self._args.filled, self.structure, self.space)
        args = Args(data.args)
        if data.model is not self.adaptive.model:
            adaptive = AdaptiveNodes(data.model, args, data.program)
        else:
            adaptive = self.adaptive
        settings = SequentialMonteCarlo(
            self.settings.num_particles, self.settings.num_runs, self.settings.num_moves
        )
        read = Particulate(settings, data.model, data.program, ModeSearch(adaptive), args)
        found = read._integrated
        n_runs, n = self.settings.num_runs, found.evidence.diagnostics["num_particles"]
        path, stages = found.path, found.stages
        with torch.no_grad(), pyro.validation_enabled(False):
            reference = path.target.reference
            if len(reference):  # runs back do not come to where the prior alone is
                path = Path(path.target._replace(reference=replace(reference, prior=0.0)), path.n_moves)
                stages, _ = path.pilot(n_runs, max(MIN_PILOT, int(PILOT * n)))
            upper = path.back(stages, start.expand(n_runs, n, -1).clone())
        return TwoSided.of(found.evidence.diagnostics["log_z"], upper.double().cpu().numpy())

    def _reveal(self, x: Tensor, tokens: Tensor, stops: list[int]) -> Tensor:
        """log p(x_t | x_<t) of each token: particles reweighted from stop to stop, moved when they degenerate."""
        n_runs, n = self.settings.num_runs, self.settings.num_particles
        shown = self._shown(torch.zeros(x.shape[1], dtype=torch.bool, device=x.device))
        prior = Reference.of_prior(x.new_zeros(1, self.space.width))
        cloud = Target(shown, prior).start(n_runs, n)
        log_w = torch.zeros_like(cloud.log_end)
        log_z, out = log_w.new_zeros(n_runs), torch.zeros_like(x)
        step, before = self.space.width**-0.25, log_w.new_zeros(())
        for start, end in pairwise(stops):
            some = tokens[start:end][~x[0, tokens[start:end]].isnan()]
            if not len(some):
                continue
            seen = shown.seen.clone()
            seen[some] = True
            shown = self._shown(seen)
            log_end = shown.log_joint(cloud.u)
            log_w = log_w + log_end - cloud.log_end
            cloud = Particles(cloud.u, cloud.log_start, log_end, cloud.slope)
            total = log_z + log_w.logsumexp(1) - math.log(n)
            now = total.logsumexp(0) - math.log(n_runs)  # log of the mean of Z
            if float(now) < NEVER:  # and so is all that follows
                rest = tokens[start:]
                out[0, rest] = torch.where(x[0, rest].isnan(), 0.0, -math.inf).to(x)
                return out
            out[0, some], before = (now - before) / len(some), now
            share = log_w.softmax(1)
            if float((1 / share.square().sum(1)).min()) < KEEP * n:
                log_z = total
                root = weighted_root(cloud.u.flatten(0, 1), share.flatten() / n_runs)
                path = Path(Target(shown, prior), self.settings.num_moves)
                cloud = path.target.at(cloud.take(systematic(log_w)).u)
                log_w = torch.zeros_like(log_w)
                for _ in range(max(2, path.n_moves)):
                    cloud, accepted = path.move(cloud, 1.0, root, step)
                    step = next_step(step, accepted)
        return out


def _strays(path: Path, arrived: Arrived) -> Reference | None:
    """A path's reference with the modes that its particles have found; None where there are no new ones."""
    if float(arrived.log_z.max()) < NEVER:
        return None
    return with_strays(path.target.shown, path.target.reference, arrived.particles.u.flatten(0, 1))


def _pooled(arrived: Arrived) -> Tensor:
    """Particles (M, d) of all runs, each run by its Z."""
    u, log_z = arrived.particles.u, arrived.log_z
    index = systematic(log_z[:, None].expand(u.shape[:2]).reshape(1, -1))
    return u.flatten(0, 1)[index[0]]


def _judge(se: float, shares: Shares, doubt: str, diagnostics: dict[str, Any]) -> float:
    """The error, NaN where it is unknown; with warnings."""
    changes = diagnostics.get("change with half the scale of a vague prior", {})
    for name, change in changes.items():
        said = (
            "by how much is not known"
            if math.isnan(change)
            else f"halving its scale changes lml by {change:.3g}"
        )
        warn(f"the number depends on the vague prior of latent {name!r}: {said}", VaguePriorWarning)
    why = [shares.why] if shares.missed else []
    why += [doubt] if doubt else []
    gaps = [c for c in diagnostics.get("check", []) if c.misses]
    if gaps:
        why.append(f"on data simulated from the prior the runs miss {max(c.gap for c in gaps):.3g} nats")
    if why:
        warn(
            f"sequential Monte Carlo may have missed a part of the posterior: {'; '.join(why)}. Use more particles",
            MissedModeWarning,
        )
        return math.nan
    if diagnostics["sd_log_z"] > WIDE_SD:
        warn(
            f"the log Z of independent runs of {diagnostics['num_particles']} particles differ by "
            f"{diagnostics['sd_log_z']:.2g} nats (standard deviation), so that their error is unreliable: use more "
            "particles, or more moves",
            HeavyTailWarning,
        )
    return se
