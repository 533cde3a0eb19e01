"""Draw rows from a program."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from bayes_mpt.program.layout import token_values
from bayes_mpt.program.program import Model, ModelError, Program
from bayes_mpt.program.run import one_precision
from bayes_mpt.program.shifts import of_cells
from bayes_mpt.program.sites import node_of

__all__ = ["simulate"]


def simulate(model: Model, args: tuple[Any, ...], program: Program) -> tuple[Tensor, dict[str, Tensor]]:
    """Tokens (N, T) and the latents that made them, drawn from the program.

    Parameters
    ----------
    model : callable
        A Pyro program, at the current parameters.
    args : tuple
        What it is called with: of the observed argument only the shape matters.
    program : Program
        What was found out about it.

    Raises
    ------
    ModelError
        If its tokens look at each other: it reads earlier tokens from its arguments, and draws all at once.
    """
    if program.order is not None:
        raise ModelError(
            f"tokens of site {program.observed!r} look at earlier tokens, which the program reads from its arguments: "
            "it draws one step ahead of these, and no rows of its own. Draw a step, put it into x, and draw the next"
        )
    with torch.no_grad(), one_precision(args):
        trace = poutine.trace(poutine.uncondition(of_cells(model, program.shifts))).get_trace(*args)
    latents = {site.name: node_of(trace, site.name)["value"] for site in program.latents}
    return token_values(trace, program), latents
