"""Adaptive Gauss-Hermite quadrature over a few continuous latents, the rest exact inside."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bayes_mpt.diagnostics import BAD_K, widening_of
from bayes_mpt.predictors.base import Evidence, Guide, Predictor
from bayes_mpt.predictors.nodes.adaptive import AdaptiveNodes
from bayes_mpt.predictors.nodes.mixture import Modes
from bayes_mpt.predictors.nodes.modes import ModeSearch
from bayes_mpt.predictors.nodes.panel_nodes import PanelNodes, Rows
from bayes_mpt.predictors.nodes.panels import UNEVEN, roughness
from bayes_mpt.predictors.nodes.placing import integral
from bayes_mpt.predictors.nodes.prior import prior_points
from bayes_mpt.predictors.nodes.probes import highest_of_prior
from bayes_mpt.predictors.nodes.replicates import by_replicates
from bayes_mpt.predictors.nodes.rough_training import RoughTraining, warn_of_nodes
from bayes_mpt.predictors.nodes.rule_errors import (
    MAX_WHOLE,
    beyond,
    changes,
    shells,
    size,
    uneven_axes,
    without_corners,
)
from bayes_mpt.predictors.nodes.rules import CUT, Detail, Rule, alone_rule, far_rule, hermite
from bayes_mpt.predictors.nodes.unseen import doubted
from bayes_mpt.predictors.nodes.weighted import (
    Nodes,
    NodeSource,
    Read,
    constrained,
    program_values,
    warn_if_slow,
)
from bayes_mpt.program.analysis import analyze
from bayes_mpt.program.arguments import Args, same_cells
from bayes_mpt.program.program import Model, ModelError, Program
from bayes_mpt.program.store import own_random_state

__all__ = ["Quadrature"]

MAX_WIDTH = 4
NODES = {1: 64, 2: 16, 3: 10, 4: 8}  # along each axis, by the number of latents
MAX_NODES = 8192  # around all modes together, where these are several
ROUGH = 0.01  # nats of change with more nodes, from which panels are, or draws are asked too
N_CHECKS = 1024
N_DRAWS = 4096  # where draws may do better than nodes
N_MOVING = 500  # of a round that moves the mixture before
PRIOR_ONE_IN = 8  # of them there is one of the prior
DENSE = 1e-4  # nats of change, up to which nodes are not made denser
MAX_CELLS = 2**22  # log-densities of tokens, for the densest
MIN_NODES = 3  # along each axis
FAR = 3.0  # errors, from which nodes are held for wrong
HIGHER = 1.0  # nats above all modes, from which a place is believed to be of another
HIGHER_PLACE = "of points that are spread like the prior one is {:.0f} nats higher than all around the modes"
SMOOTH = 1 / 8  # of what is uneven is left between twice as many nodes: of a bend a fourth, of a jump half
NO_PART = 0.01  # of the error: what is left out is no more
LITTLE = 5e-3  # share of the integral that a shell adds, beyond which rows and groups are integrated roughly


class Quadrature(Predictor):
    """Gauss-Hermite nodes around the mode of each row's posterior, or every mode of all rows' (Liu & Pierce 1994).

    Takes up to four continuous latents, of a row or shared by all rows. Discrete latents are summed out inside, and
    latents that are linear-Gaussian given the others integrated in closed form: a regression with an unknown noise
    variance needs nodes over that variance alone.

    Parameters
    ----------
    n_nodes : int, optional
        Along each axis; by default 64, 16, 10, 8 for one to four latents.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist, torch
    >>> def coin(x):
    ...     p = pyro.sample("p", dist.Beta(x.new_tensor(1.0), x.new_tensor(1.0)))
    ...     with pyro.plate("rows", len(x)):
    ...         pyro.sample("x", dist.Bernoulli(p), obs=x)
    >>> x = torch.tensor([1.0] * 50 + [0.0] * 50, dtype=torch.float64)
    >>> float(Quadrature().bind(coin, (x,)).read((x,)).score())  # log B(51, 51) = -71.39896...
    -71.39896...
    """

    def __init__(self, n_nodes: int | None = None):
        self.n_nodes = n_nodes

    def bind(self, model: Model, args: tuple[Any, ...], guide: Guide | None = None) -> NodeSource:
        return self.bind_program(model, args, analyze(model, args))

    def bind_program(self, model: Model, args: tuple[Any, ...], program: Program) -> NodeSource:
        """`bind` where it is known what `analyze` finds."""
        if self.n_nodes is not None and (not isinstance(self.n_nodes, int) or self.n_nodes < 2):
            raise ValueError(f"n_nodes must be an integer of at least 2, got {self.n_nodes!r}")
        if not program.continuous:
            raise ModelError("the program has no continuous latent: use Exact()")
        return self.bind_nodes(AdaptiveNodes(model, Args(args), program))

    def bind_nodes(self, adaptive: AdaptiveNodes) -> NodeSource:
        """`bind` where it is known too which latents take nodes."""
        width, program = adaptive.space.width, adaptive.program
        _check_width(width, program)
        bound = _Hermite(adaptive, self.n_nodes or NODES[max(1, width)], self.n_nodes is not None)
        warn_if_slow(adaptive.batched, bound)
        return bound


class _Hermite(NodeSource):
    """Nodes around each mode, in units of the posterior's root there.

    With Gaussians q_j at J modes and the shares w_j of their masses, the integral is a sum of integrals around one
    mode each, whose integrands add up to p wherever modes lie, apart, close or in one place:

        int p(u) du = sum_j int p(u) w_j q_j(u) / sum_i w_i q_i(u) du
    """

    relocates = True
    name = "Quadrature"

    def __init__(self, adaptive: AdaptiveNodes, n_nodes: int, asked: bool):
        self.adaptive, self.n_nodes, self.asked = adaptive, n_nodes, asked
        by_row = adaptive.program.by_row and not asked  # as many as were asked for stay as they are
        self.modes = ModeSearch(adaptive, Rule(*hermite(adaptive.space.width, n_nodes)) if by_row else None)
        self.model, self.structure = adaptive.model, adaptive.program
        self.panels = PanelNodes(adaptive)
        self._inside: tuple[Tensor, bool] | None = None
        self._rough = RoughTraining(adaptive.space.names, adaptive.space.width)

    @property
    def why(self) -> str:  # type: ignore[override]  # how nodes stand is found out with the rows
        """How, in words."""
        space, placing = self.adaptive.space, self.modes.placing
        names, each = (
            ", ".join(space.names),
            "the mode" if self.structure.by_row and placing.n_modes == 1 else "each mode",
        )
        if not space.parts:
            return self.adaptive.inside
        if placing.far:
            n = len(alone_rule(space.width, fine=False).t) * placing.n_modes
            return (
                f"{n} nodes of {names} that reach as far as the density, around {each}{self.adaptive.inside}"
            )
        return (
            f"{self.n_nodes} Gauss-Hermite nodes along each of {space.width} axes ({names}), around {each}"
            f"{self.adaptive.inside}"
        )

    def _alone(self, nodes: Nodes, mask: Tensor) -> Tensor:
        return nodes.each_at_its_own(mask)

    def _forget(self) -> None:
        self.modes.forget()
        self.panels.forget()
        self._inside = None
        self._rough = RoughTraining(self.adaptive.space.names, self.adaptive.space.width)

    def place(self, args: Args, visible: Tensor | None = None, near: Any = None) -> Read:
        value = program_values(self.model, args, self.structure)
        if visible is None:
            visible = torch.ones(value.shape[1], dtype=torch.bool, device=value.device)
        modes = self.modes.find(args, value, visible, near)
        return self._around(args, value, modes, self._rule(modes))

    def _rule(self, modes: Modes, finer: bool = False) -> Rule:
        """Nodes around each mode; finer ones show their error."""
        width = self.adaptive.space.width
        if modes.reach is not None:
            return alone_rule(width, finer)
        rule = Rule(*hermite(width, self._n_nodes(modes, finer)))
        # those of rows or groups stand at every node: at corners where no share of a Gaussian is, for nothing
        return rule if finer or self.asked or self.adaptive.rows is None else without_corners(rule)

    def _n_nodes(self, modes: Modes, finer: bool = False) -> int:
        """Along each axis, fewer where modes are so many that the program would run at too many nodes."""
        n_modes, _, width = modes.mode.shape
        most = max(MIN_NODES, int((MAX_NODES / n_modes) ** (1 / max(1, width))))
        n = self.n_nodes if n_modes == 1 else min(self.n_nodes, most)
        if not finer:
            return n
        return 2 * n if width <= 2 else n + 3

    def _around(
        self,
        args: Args,
        value: Tensor,
        modes: Modes,
        rule: Rule,
    ) -> Read:
        """Nodes for rows whose posteriors are located, around each mode."""
        u, log_weight = modes.nodes(rule)  # (J, Q, N, d), (J, Q, N)
        log_weight = log_weight.expand(u.shape[:-1]).flatten(0, 1)
        return self._at(args, value, modes, u.flatten(0, 1), log_weight)

    def _at(self, args: Args, value: Tensor, modes: Modes, u: Tensor, log_weight: Tensor) -> Read:
        """The program at nodes u (Q, N, d) with log-weights (Q, N)."""
        given, part, scale = self.adaptive.at(args, u)
        latents = constrained(self.adaptive.space, u)
        return Read(given, log_weight + part, value, scale, latents, self.adaptive.space.names, located=modes)

    def settled(self, nodes: Nodes, read: Read, log_part: Tensor, visible: Tensor) -> tuple[Read, Tensor]:
        modes = read.located
        if self.adaptive.rows is not None:
            return self._settled_inside(nodes, read, log_part, visible)
        if self.adaptive.space.width == 2:  # a rule of more has too few nodes along each axis to tell
            self._rough.look(log_part, len(modes.mode))
        if self.asked or not self._one_axis(modes) or read.error is not None:
            return read, log_part
        uneven = self._uneven(read, log_part)
        # where nodes jump too: a mode at the edge of a cliff may have panels that see the cliff alone
        unseen = self._unseen(nodes, read, log_part, visible)
        if uneven <= (0.0 if self.panels.jumps else UNEVEN) and not unseen:
            return read, log_part
        if torch.is_grad_enabled() and self.panels.too_many(self.parameters):
            if not self.panels.told:
                self._on_panels(nodes, modes, visible)  # which says so where they move a jump
                self._rough.tell(uneven, len(log_part[0]), moves=self.panels.moves)
            return read, log_part
        # slopes of jumps are those of panels
        if not unseen and not (self.panels.jumps and torch.is_grad_enabled()):
            finer = self._around(nodes.args, nodes.value, modes, self._rule(modes, finer=True))
            part = finer.log_weight + finer.given.log_joint(nodes.value, visible)
            if self._uneven(finer, part) <= min(UNEVEN, SMOOTH * uneven):
                return finer, part
        return self._on_panels(nodes, modes, visible)

    def _one_axis(self, modes: Modes) -> bool:
        """Whether panels can be laid: of images that are not listed they would see nothing."""
        partial = modes.orbits is not None and modes.orbits.partial
        return self.adaptive.space.width == 1 and self.adaptive.rows is None and not partial

    def _settled_inside(
        self, nodes: Nodes, read: Read, log_part: Tensor, visible: Tensor
    ) -> tuple[Read, Tensor]:
        """With panels in every row or group of one latent that jumps; a training goes by nodes, and says so."""
        jumps = read.given.detail == "usual" and self._jumps_inside(nodes, read, log_part)
        if not jumps or torch.is_grad_enabled():
            return read, log_part
        read = read._replace(given=read.given.with_detail("panels"))
        return read, read.log_weight + read.given.log_joint(nodes.value, visible)

    @torch.no_grad()
    def _jumps_inside(self, nodes: Nodes, read: Read, log_part: Tensor) -> bool:
        """Whether the density of a latent inside jumps, looked at once for the cells, at the best node."""
        if self._inside is None or not same_cells(self._inside[0], nodes.value):
            rows = self.adaptive.rows
            assert rows is not None
            best = log_part[:, 0].nan_to_num(-math.inf).argmax()[None]
            with rows.nearby.unmoved():
                uneven = read.given.with_detail("fine", best).uneven(nodes.value)[0]
            self._inside = nodes.value.detach(), uneven > UNEVEN
            if uneven > ROUGH and log_part.requires_grad:
                warn_of_nodes(rows.own, uneven, " inside rows or groups")
        return self._inside[1]

    def _unseen(self, nodes: Nodes, read: Read, log_part: Tensor, visible: Tensor) -> bool:
        """Whether there is more than the nodes of one latent have seen."""
        if not bool(visible.all()):
            return self.panels.everywhere
        rows = Rows(nodes.args, nodes.value, visible)
        return self.panels.look(rows, read.located, log_part.logsumexp(0))

    @staticmethod
    def _uneven(read: Read, log_part: Tensor) -> float:
        """Nats by which jumps between the nodes of one latent may move the sum of all rows."""
        return float(roughness(log_part.detach().unflatten(0, (len(read.located.mode), -1))).sum())

    def _on_panels(self, nodes: Nodes, modes: Modes, visible: Tensor) -> tuple[Read, Tensor]:
        """Nodes on panels, which see jumps and bends, and log of each one's part (S, N) of Z."""
        if nodes.leaves is not None:
            nodes.leaves.refuse_others()
        rows = Rows(nodes.args, nodes.value, visible)
        found = self.panels.find(rows, modes)
        assert found.panels is not None
        u, log_weight = found.panels.nodes()
        read = self._at(nodes.args, nodes.value, modes, u, log_weight)._replace(error=found.error)
        log_part = read.log_weight + read.given.log_joint(nodes.value, visible)
        if torch.is_grad_enabled():
            log_z = log_part.logsumexp(0)
            log_part = log_part + self.panels.slopes_of_jumps(rows, modes, found, log_z, self.parameters)
        return read, log_part

    @torch.no_grad()
    def evidence(self, nodes: Nodes) -> Evidence:
        if self.adaptive.rows is not None:  # every node costs those of all rows or groups
            return self._with_rows_inside(nodes)
        if (read := nodes.whole()[0]).error is not None:
            return self._of_panels(nodes, read, {})
        few, modes = nodes.score(), nodes.last.located
        around = modes
        if self.structure.by_row and self.asked and self.adaptive.space.parts:
            around = self.modes.reaching(nodes.args, nodes.value, modes)
        rule, finest = self._rule(modes), self._rule(around, finer=True)
        finer = nodes.at_nodes(self._around(nodes.args, nodes.value, around, finest))
        read, log_part = finer.whole()
        many = finer.score()
        change = float((many - few).sum())
        diagnostics = changes(rule, finest, change)
        n_modes = len(modes.mode)
        if read.error is not None:
            return self._of_panels(finer, read, diagnostics)
        uneven = self._uneven(read, log_part) if self._one_axis(modes) else 0.0
        if self._one_axis(modes) and (uneven > UNEVEN or size(many - few) > ROUGH):
            finer = nodes.at_nodes(self._on_panels(nodes, modes, torch.ones_like(nodes.value[0]).bool())[0])
            return self._of_panels(finer, finer.last, diagnostics)
        se = max(abs(change), uneven)
        if around.reach is not None and self.adaptive.space.width > 1:
            many, se = self._denser(nodes, around, finest, many, max(se, size(many - few)), diagnostics)
        if n_modes > 1 and not self.structure.by_row:
            se += beyond(finer.log_weights(), modes, finest)
        several = self.adaptive.space.width > 1
        top = float((log_part - around.nodes(finest)[1].flatten(0, 1)).amax()) if several else None
        # of more than two a finer rule has too few nodes along each axis to tell
        if several and (
            se > ROUGH or (self.adaptive.space.width == 2 and uneven_axes(log_part, n_modes) > ROUGH)
        ):
            drawn, error = self._sharper(nodes, many, se, diagnostics)
            if drawn is not many:
                many, se, top = drawn, error, None
        if (top is not None or not several) and not self.structure.by_row:
            many, se = self._better(nodes, many, se, diagnostics)
        if self.structure.by_row:
            return Evidence(many, se, diagnostics)
        return self._doubted(nodes, many, se, diagnostics, top)

    def _sharper(
        self, nodes: Nodes, many: Tensor, se: float, diagnostics: dict[str, Any]
    ) -> tuple[Tensor, float]:
        """log Z (N,) of several latents by draws, where these have a smaller error than the nodes, and its error."""
        value, modes = nodes.value, nodes.last.located
        everything = torch.ones(value.shape[1], dtype=torch.bool, device=value.device)
        density = self.adaptive.row_density(nodes.args, value, everything, {})
        with own_random_state():
            found, k = by_replicates(density, modes, value.shape[1] * self.adaptive.n_evaluations)
        empty = value.isnan().all(1)
        log_z = torch.where(empty, 0.0, found.log_z)
        error = float(torch.where(empty, 0.0, found.error).square().sum().sqrt())
        diagnostics["by draws of the same mixture"] = float(log_z.sum())
        off = abs(float((log_z - many).sum()))
        if k >= BAD_K or not (error < se or off > FAR * math.hypot(error, se)):
            return many, se
        diagnostics["n_nodes"] = found.n_evaluations
        return log_z, error

    def _with_rows_inside(self, nodes: Nodes) -> Evidence:
        """The evidence where rows or groups have nodes of their own at each node."""
        few, modes = nodes.score(), nodes.last.located
        rule, finest = self._rule(modes), self._rule(modes, finer=True)
        uneven, left = nodes.uneven_inside()
        detail: Detail = "fine" if uneven <= UNEVEN else "panels"
        inside = nodes.gain_inside(detail)
        many, outside = self._outwards(nodes, finest, inside, detail)
        change = many - few
        diagnostics = changes(rule, finest, float(change.sum()))
        # panels have an error of their own, and fine nodes one that their change bounds
        se = abs(float(change.sum())) if detail == "fine" else abs(float((change - inside).sum())) + left
        se = self._checked(nodes, many, max(se, outside, uneven if detail == "fine" else 0.0), diagnostics)
        return self._doubted(nodes, many, se, diagnostics)

    def _denser(
        self, nodes: Nodes, modes: Modes, rule: Rule, many: Tensor, se: float, diagnostics: dict[str, Any]
    ) -> tuple[Tensor, float]:
        """log Z (N,) with twice as many steps along each axis while that changes it, and the error of its sum.

        Two rules that differ by a few nodes may be wrong alike where a density has its mass at corners, which its
        tails reach along other lines than the axes. Half the step leaves a small part of the error of the whole.
        """
        value, width = nodes.value, modes.mode.shape[-1]
        everything = torch.ones(value.shape[1], dtype=torch.bool, device=value.device)
        density = self.adaptive.row_density(nodes.args, value, everything, {})
        n, cells = (
            round(len(rule.t) ** (1 / width)),
            len(modes.mode) * value.numel() * self.adaptive.n_evaluations,
        )
        while se > DENSE:
            n = 2 * n - 1
            if n**width * cells > MAX_CELLS:
                break
            found = integral(density, modes, far_rule(width, n, CUT["fine"]), value.shape[1])
            found = torch.where(value.isnan().all(1), 0.0, found)
            se, many = size(found - many), found
            diagnostics["n_nodes"] = n
        return many, se

    def _better(
        self, nodes: Nodes, many: Tensor, se: float, diagnostics: dict[str, Any]
    ) -> tuple[Tensor, float]:
        """log Z (1,) and its error by nodes, or by draws of the same mixture where theirs is smaller."""
        modes = nodes.last.located
        if not (modes.has_pieces or se > ROUGH):
            return many, se
        everything = torch.ones(nodes.value.shape[1], dtype=torch.bool, device=nodes.value.device)
        drawn, its, k = self._by_draws(nodes, everything, N_DRAWS if se > ROUGH else N_CHECKS)
        diagnostics["by draws of the same mixture"] = drawn
        se, its = math.hypot(se, drawn - float(many.sum())), its * widening_of(k)
        if k > BAD_K or its >= se:
            return many, se
        diagnostics["pareto_k"] = k
        return torch.full_like(many, drawn), its

    def _by_draws(self, nodes: Nodes, everything: Tensor, n: int) -> tuple[float, float, float]:
        """log Z by n draws of the mixture, moved by the weights of others, and a few of the prior: `by_draws`."""
        args, value = nodes.args, nodes.value
        with own_random_state(0):
            modes = self.modes.move(args, value, everything, nodes.last.located, N_MOVING)
            prior = prior_points(self.adaptive, args.filled, n // PRIOR_ONE_IN).to(value)
            known = bool(prior.isfinite().all())  # a vague prior has draws that no number stands for
            return self.modes.check(args, value, everything, modes, n, prior if known else None)

    def _checked(self, nodes: Nodes, many: Tensor, se: float, diagnostics: dict[str, Any]) -> float:
        """The error, after draws: nodes of one rule may agree and both be wrong."""
        modes = nodes.last.located
        if not self.adaptive.space.parts or not (modes.has_pieces or se > ROUGH):
            return se
        everything = torch.ones(nodes.value.shape[1], dtype=torch.bool, device=nodes.value.device)
        by_draws, _, _ = self.modes.check(nodes.args, nodes.value, everything, modes, N_CHECKS)
        diagnostics["by draws of the same mixture"] = by_draws
        return math.hypot(se, by_draws - float(many.sum()))

    def _doubted(
        self,
        nodes: Nodes,
        many: Tensor,
        se: float,
        diagnostics: dict[str, Any],
        top: float | None = None,
    ) -> Evidence:
        """The evidence of latents that all rows share, with what speaks against its modes.

        With ``top``, the greatest log-density at its nodes.
        """
        modes = nodes.last.located
        diagnostics["n_modes"] = len(modes.mode)
        doubt = modes.doubt or nodes.doubt_inside()
        if not doubt and self.adaptive.rows is None and self.adaptive.space.width > 1:
            higher = highest_of_prior(self.adaptive, nodes.args, nodes.value, modes, top)
            doubt = HIGHER_PLACE.format(higher) if higher > HIGHER else ""
        return doubted(Evidence(many, se, diagnostics), modes._replace(doubt=doubt))

    def _of_panels(self, nodes: Nodes, read: Read, diagnostics: dict[str, Any]) -> Evidence:
        """The evidence of one latent whose density jumps, bends or has long tails, by nodes on panels."""
        assert read.error is not None
        diagnostics["n_nodes"] = len(read.log_weight)
        se = float(torch.where(nodes.value.isnan().all(1), 0.0, read.error).sum())
        if self.structure.by_row:
            return Evidence(nodes.score(), se, diagnostics)
        return self._doubted(nodes, nodes.score(), se, diagnostics)

    def _outwards(self, nodes: Nodes, finest: Rule, inside: Tensor, detail: Detail) -> tuple[Tensor, float]:
        """log Z (1,) by more nodes, shell by shell from the middle until what is left is no part of the error.

        Of what is left, shells that shrink by a factor r from c on are believed to add c r / (1 - r). Rows and groups
        are integrated finely where that is cheap, or changes log Z by much: ``inside`` (1,), seen at nodes of the usual
        rule, between which a row may come to have other modes. Beyond a shell that has added little they are roughly.
        With it the nats by which jumps between the nodes of one latent may move log Z.
        """
        modes, few = nodes.last.located, nodes.score()
        error, rows = float(inside.abs()), self.adaptive.rows
        one = (
            rows is not None and rows.width == 1 and 1 < len(finest.t) <= MAX_WHOLE
        )  # cheap, whatever the error
        fine = one or (len(finest.t) > 1 and error > ROUGH)
        shell = shells(finest).to(few.device)
        total, added, shrinks, uneven = torch.full_like(few, -math.inf), math.inf, 1.0, 0.0
        for n_shells, number in enumerate(shell.unique(), 1):
            some = (shell == number).nonzero()[:, 0]
            part_of = Rule(finest.t[some.cpu()], finest.log_weight[some.cpu()])
            read = self._around(nodes.args, nodes.value, modes, part_of)
            if fine or added < LITTLE:
                read = read._replace(given=read.given.with_detail("rough" if added < LITTLE else detail))
            at_nodes = nodes.at_nodes(read)
            part = at_nodes.score()
            if finest.t.shape[1] == 1:  # which are one shell
                uneven = float(roughness(at_nodes.log_weights().unflatten(0, (len(modes.mode), -1))).sum())
            total = torch.logaddexp(total, part)
            before, added = added, float((part - total).exp())
            last, shrinks = shrinks, added / before if before > 0 else 0.0
            r = max(last, shrinks)
            left = added * r / (1 - r) if r < 1 else math.inf
            if n_shells > 3 and left <= NO_PART * max(error, float((total - few).abs())):
                break
        return (total if fine else total + inside), uneven


def _check_width(width: int, program: Program) -> None:
    """Refuse more latents than a rule of nodes can serve."""
    if width > MAX_WIDTH:
        where = "a row" if program.by_row else "in all"
        raise ModelError(
            f"Quadrature takes at most {MAX_WIDTH} continuous latents, got {width} {where} at sites "
            f"{list(program.continuous)}: use Importance() with a guide, or SequentialMonteCarlo() for latents that "
            "all rows share"
        )
