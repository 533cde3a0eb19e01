"""Nodes on panels for one latent whose density jumps or bends, and the slopes of jumps that parameters move.

Panels are found without gradients; their nodes and weights serve like those of any rule. Where a jump at c moves with
a parameter t, the integral has a slope that no node shows (Leibniz):

    d/dt int f(u, t) du = int df/dt du + (f(c-) - f(c+)) dc/dt

Bends, and jumps that stay in place, have none. So along one direction of all parameters the slope at the nodes is held
against a difference of integrals, and where the two differ each parameter's difference takes the place of its slope.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import pyro
import torch
from torch import Tensor

from bayes_mpt.predictors.nodes.mixture import Modes
from bayes_mpt.predictors.nodes.panels import MAX_ROUNDS, Integrals, Panels, by_panels, laid, thinned
from bayes_mpt.predictors.nodes.placing import reaching
from bayes_mpt.predictors.nodes.probes import n_probes, reach_of_prior
from bayes_mpt.predictors.nodes.rules import CUT
from bayes_mpt.program.arguments import Args, same_cells
from bayes_mpt.program.program import list_names
from bayes_mpt.program.store import own_random_state
from bayes_mpt.warnings import NotConvergedWarning, warn

if TYPE_CHECKING:
    from bayes_mpt.predictors.nodes.adaptive import AdaptiveNodes

__all__ = ["PanelNodes", "Rows"]

STEP = 1e-4  # of differences, in a parameter of size one
SHORT = 0.01  # of it, at which what differs is looked at again
DIFFERS = 1e-4  # of a slope, from which a jump is believed to move
UNSEEN = 0.01  # nats that places far from all modes add, from which they matter
LEAST_PROBES = 480  # where it is known that they do
MAX_MOVING = 16  # numbers, up to which each has a difference of its own


class Rows(NamedTuple):
    """What is visible of some rows."""

    args: Args
    value: Tensor
    """(N, T) tokens."""
    visible: Tensor
    """(T,)"""


class PanelNodes:
    """Panels of each row's latent, or of the one that all rows share.

    Parameters
    ----------
    adaptive : AdaptiveNodes
        Of a program of which one latent takes nodes.

    Attributes
    ----------
    jumps : bool
        Whether panels were asked for, so that fainter jumps, as of fewer tokens, are worth them too.
    everywhere : bool
        Whether places far from all modes matter, so that panels are laid over all that the prior reaches.
    moves : bool
        Whether parameters are known to move jumps.
    told : bool
        Whether jumps that too many parameters may move were looked at.
    """

    def __init__(self, adaptive: AdaptiveNodes):
        self.adaptive, self.jumps, self.moves = adaptive, False, False
        self.everywhere = self.told = False
        self._kept: tuple[Tensor, Tensor, Panels] | None = None
        self._looked: list[tuple[Tensor, bool]] = []

    def forget(self) -> None:
        """Look for the next panels from the modes, not from the last ones."""
        self._kept, self.jumps, self.moves = None, False, False
        self.everywhere, self.told, self._looked = False, False, []

    @torch.no_grad()
    def look(self, rows: Rows, modes: Modes, log_z: Tensor) -> bool:
        """Whether places that no mode is near matter, where ``log_z`` (N,) is by nodes; looked at once for the cells.

        Once more without gradients, when parameters have come to rest.
        """
        trains = bool(log_z.requires_grad)
        if any(with_ == trains and same_cells(x, rows.value) for x, with_ in self._looked):
            return self.everywhere
        self._looked = [*(k for k in self._looked if k[1] != trains), (rows.value.detach(), trains)]
        n = n_probes(self.adaptive, rows.value)
        if not n or self.everywhere:
            return self.everywhere
        with own_random_state():
            around, empty = self._around(rows, modes), rows.value.isnan().all(1)
            start = self._over_prior(rows, around)

        def more(max_rounds: int) -> bool:
            found = self._integrals(rows, around, start, max_rounds)
            change = torch.where(empty, 0.0, found.log_z - log_z)
            return float((change.abs() + found.error.clamp(max=1.0) * (~empty)).sum()) > UNSEEN

        with own_random_state():
            self.everywhere = more(0) and more(MAX_ROUNDS)
        return self.everywhere

    def _over_prior(self, rows: Rows, around: Modes) -> Panels:
        at = self.adaptive
        whole = reach_of_prior(at, rows.args, rows.value)
        n = max(LEAST_PROBES, n_probes(at, rows.value))
        return laid(around, whole, n)

    def _around(self, rows: Rows, modes: Modes) -> Modes:
        """Modes, and how far the density reaches around each."""
        density = self.adaptive.row_density(rows.args, rows.value, rows.visible, {})
        return reaching(density, modes, 1, CUT["fine"])

    def find(self, rows: Rows, modes: Modes) -> Integrals:
        """The panels of each row, from those of the same cells at other values of parameters."""
        start, self.jumps = None, True
        if self._kept is not None:
            data, shown, kept = self._kept
            start = kept if torch.equal(shown, rows.visible) and same_cells(data, rows.value) else None
        around = self._around(rows, modes)
        if start is None and self.everywhere:
            start = self._over_prior(rows, around)
        found = self._integrals(rows, around, start)
        assert found.panels is not None
        density = self.adaptive.row_density(rows.args, rows.value, rows.visible, {})
        panels = thinned(density, found.panels, rows.value.shape[1])
        if bool(rows.visible.all()):
            self._kept = rows.value.detach(), rows.visible, panels
        return found._replace(panels=panels)

    def _integrals(
        self, rows: Rows, around: Modes, start: Panels | None, max_rounds: int = MAX_ROUNDS
    ) -> Integrals:
        density = self.adaptive.row_density(rows.args, rows.value, rows.visible, {})
        return by_panels(density, around, 1, rows.value.shape[1], start=start, max_rounds=max_rounds)

    def too_many(self, names: tuple[str, ...]) -> bool:
        """Whether a training moves so many numbers, as of a network, that panels at each step would take too long."""
        store = dict(pyro.get_param_store().named_parameters())
        return sum(store[n].numel() for n in names if n in store) > MAX_MOVING

    def slopes_of_jumps(
        self, rows: Rows, modes: Modes, found: Integrals, log_z: Tensor, names: tuple[str, ...]
    ) -> Tensor:
        """Zeros (N,), whose gradient is what jumps that move with parameters add to that of ``log_z`` (N,)."""
        store = dict(pyro.get_param_store().named_parameters())
        leaves = [store[n] for n in names if n in store and store[n].requires_grad]
        if not leaves:
            return torch.zeros_like(log_z)

        def integrals() -> Tensor:
            return self._integrals(rows, self._around(rows, modes), found.panels).log_z

        many = self.too_many(names)
        self.told = many
        self.moves = self.moves or _differ(integrals, leaves, log_z)
        if not self.moves:
            return torch.zeros_like(log_z)
        if many:
            latents = list_names(self.adaptive.space.names)
            warn(
                f"the density of {latents} jumps where parameters say, and gradients do not see such a jump move: the "
                f"parameters have more than {MAX_MOVING} numbers, so that training goes by slopes without it and "
                "may end where the score has no maximum. Let the density change over a width, as "
                "torch.sigmoid(20 * (z - c)) does, or fix where it jumps",
                NotConvergedWarning,
            )
            return torch.zeros_like(log_z)
        return _corrected(integrals, leaves, log_z)


def _differ(integrals: Callable[[], Tensor], leaves: list[Tensor], log_z: Tensor) -> bool:
    """Whether along one direction of all parameters a difference is another slope than that of ``log_z`` (N,)."""
    generator = torch.Generator().manual_seed(0)
    along = [
        (2.0 * torch.randint(0, 2, p.shape, generator=generator) - 1).to(p) * (1 + p.detach().abs())
        for p in leaves
    ]
    slopes: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if log_z.requires_grad:
        slopes = torch.autograd.grad(log_z.sum(), leaves, retain_graph=True, allow_unused=True)
    at_nodes = sum(float((s * v).sum()) for s, v in zip(slopes, along, strict=True) if s is not None)
    long, short = (
        abs(float(_difference(integrals, leaves, along, h).sum()) - at_nodes) for h in (STEP, SHORT * STEP)
    )
    # where a density is steep differences have errors, which fall with their steps; what a jump adds does not
    return min(long, short) > DIFFERS * (abs(at_nodes) + len(log_z)) and short > 0.5 * long


def _corrected(integrals: Callable[[], Tensor], leaves: list[Tensor], log_z: Tensor) -> Tensor:
    """Zeros (N,) with the gradient of differences less that of ``log_z``, of each number of each parameter."""
    unit = torch.ones_like(log_z, requires_grad=True)
    slopes: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if log_z.requires_grad:
        slopes = torch.autograd.grad(log_z, leaves, unit, create_graph=True, allow_unused=True)
    total = torch.zeros_like(log_z)
    for k, (leaf, slope) in enumerate(zip(leaves, slopes, strict=True)):
        for i in range(leaf.numel()):
            along = [torch.zeros_like(p) for p in leaves]
            along[k].view(-1)[i] = size = 1 + float(leaf.detach().reshape(-1)[i].abs())
            by_row = _difference(integrals, leaves, along) / size  # (N,)
            if slope is not None and slope.requires_grad:
                # of a sum with weights w the slope is linear in them, and its derivative to them that of each row
                (own,) = torch.autograd.grad(slope.reshape(-1)[i], unit, retain_graph=True, allow_unused=True)
                by_row = by_row if own is None else by_row - own
            number = leaf.reshape(-1)[i]
            total = total + by_row.detach() * (number - number.detach())
    return total


def _difference(
    integrals: Callable[[], Tensor], leaves: list[Tensor], along: list[Tensor], step: float = STEP
) -> Tensor:
    """The slope (N,) of integrals along a direction of parameters."""
    moved = partial(_moved, leaves, along)
    with moved(step):
        more = integrals()
    with moved(-step):
        less = integrals()
    return (more - less) / (2 * step)


@contextmanager
def _moved(leaves: list[Tensor], along: list[Tensor], step: float) -> Iterator[None]:
    """With other values of parameters, of which no graph is told: they are put back."""
    before = [p.detach().clone() for p in leaves]
    try:
        for p, v in zip(leaves, along, strict=True):
            p.data.add_(v, alpha=step)
        yield
    finally:
        for p, value in zip(leaves, before, strict=True):
            p.data.copy_(value)
