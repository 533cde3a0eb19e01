"""Shared latents led from the prior to the posterior, beside rows whose latents are draws of learned shapes.

For programs of which every row has so many latents with slowly falling tails that a product of nodes costs most of all:
the density of the shared latents is nowhere smooth enough for climbs then, and thousands of places have to be cheap.
"""

from __future__ import annotations

import pyro
import torch
from torch import Tensor

from bayes_mpt.predictors.nodes.from_prior import Bent, led
from bayes_mpt.predictors.nodes.modes import ModeSearch
from bayes_mpt.predictors.nodes.placing_trials import placing_inside
from bayes_mpt.predictors.nodes.prior import prior_points
from bayes_mpt.predictors.nodes.row_nodes import RowNodes
from bayes_mpt.predictors.nodes.rules import MAX_HERMITE
from bayes_mpt.program.arguments import Args, same_cells
from bayes_mpt.program.store import own_random_state

__all__ = ["Leading"]

MANY = 3  # latents of a row, from which a rule that reaches far has many nodes
PER_NUMBER = 5  # draws of a round for each number of a covariance at the least
OF_PRIOR = 2  # draws of the prior for each one of a round
N_LEARNED = 32  # places at which the shapes of rows are learned
N_TRIED = 8  # of these, where it is seen how nodes must stand


class Leading:
    """Finds a proposal for the shared latents of a program, and the shapes of its rows; kept for its data.

    Parameters
    ----------
    search : ModeSearch
        Of the program.
    n_draws : int
        Of a round.
    """

    def __init__(self, search: ModeSearch, n_draws: int):
        self.search, self.n_draws = search, n_draws
        self._kept: tuple[Tensor, Tensor, Bent | None] | None = None

    @property
    def leads(self) -> bool:
        """Whether the last proposal was one of its own."""
        return self._kept is not None and self._kept[2] is not None

    def forget(self) -> None:
        """Begin again at the next call."""
        self._kept = None

    def find(self, args: Args, x: Tensor, visible: Tensor) -> Bent | None:
        """The proposal given the visible (T,) of the tokens x; None where the program is not of the kind."""
        at, width = self.search.adaptive, self.search.adaptive.space.width
        if at.program.by_row or at.program.parameters or not isinstance(at.rows, RowNodes):
            return None
        numbers = width * (width + 1) / 2
        if not MANY <= at.rows.width <= MAX_HERMITE or self.n_draws < PER_NUMBER * numbers:
            return None
        if self._kept is not None:
            data, shown, kept = self._kept
            if torch.equal(shown, visible) and same_cells(data, x):
                return kept
        before = at.rows
        with pyro.validation_enabled(False), torch.no_grad():
            found = self._led(args, x, visible)
        if found is None:
            at.rows = before
        self._kept = x.detach(), visible, found
        return found

    def _led(self, args: Args, x: Tensor, visible: Tensor) -> Bent | None:
        at = self.search.adaptive
        prior = prior_points(at, args.filled, OF_PRIOR * self.n_draws)
        prior = prior[prior.isfinite().all(1)]
        both = self.search.densities(args, x, visible, "rough")
        log_prior, log_p = both(prior)
        likely = (log_p - log_prior).nan_to_num(-torch.inf).argsort(descending=True)
        some = prior[likely[:N_LEARNED]]
        tried = some[:N_TRIED, None]
        placing_inside(at, args, x, visible, tried, tried.new_zeros(len(tried)))
        if not self._learns(args, x, visible, some):
            return None
        found = led(both, prior, self.n_draws)
        if found is not None:
            with own_random_state(0):
                self._learns(args, x, visible, found.drawn(N_LEARNED)[0][:, 0])
        return found

    def _learns(self, args: Args, x: Tensor, visible: Tensor, u: Tensor) -> bool:
        """Take draws in every row in place of many nodes, of shapes learned at values u (M, d); whether it is done."""
        at = self.search.adaptive
        assert isinstance(at.rows, RowNodes)
        if not at.rows.placing.far:
            return False
        learned = at.rows.learned(args, at.space._replace(depth=0).values(u[:, None])[0], x, visible)
        if learned.placing.draws is not None:
            at.rows = learned
        return at.rows.placing.draws is not None
