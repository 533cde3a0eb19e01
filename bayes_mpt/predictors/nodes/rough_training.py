"""Trainings that go by nodes although a density jumps or bends between them: nothing mends these, so they say so."""

from __future__ import annotations

import math

from torch import Tensor

from bayes_mpt.predictors.nodes.rule_errors import uneven_axes
from bayes_mpt.program.program import list_names
from bayes_mpt.warnings import NotConvergedWarning, warn

__all__ = ["RoughTraining", "warn_of_nodes"]

N_LOOKS = 8  # steps of a training, of which the first may show little: few tokens, a height of zero
ROUGH = {1: 0.035, 2: 0.05}  # nats, by the number of latents, of each row or of those that all rows share


def warn_of_nodes(names: tuple[str, ...], nats: float, where: str = "") -> None:
    """Say that a training goes by nodes between which the density of these latents jumps by so many nats."""
    warn(
        f"the density of {list_names(names)} jumps or bends{where}: a training goes by nodes, which may be "
        f"{nats:.2g} nats off there, so that it may end beside the maximum. Scores and the evidence afterwards see "
        "the jumps",
        NotConvergedWarning,
    )


class RoughTraining:
    """Looks at the first steps of a training, and warns once.

    Parameters
    ----------
    names : tuple of str
        The latents that take nodes.
    width : int
        Of them all.
    """

    def __init__(self, names: tuple[str, ...], width: int):
        self.names, self.rough = names, ROUGH.get(width, math.inf)
        self._left, self._told = N_LOOKS, False

    def look(self, log_part: Tensor, n_modes: int) -> None:
        """At the parts (J Q, N) of integrals by a product rule around each of J modes."""
        if self._left and not self._told and log_part.requires_grad:
            self._left -= 1
            self.tell(uneven_axes(log_part.detach(), n_modes), log_part.shape[1])

    def tell(self, nats: float, n_rows: int, *, moves: bool = False) -> None:
        """Of so many nats in all rows, unless it has been told that jumps move."""
        if nats > self.rough * n_rows and not moves and not self._told:
            self._told = True
            warn_of_nodes(self.names, nats)
