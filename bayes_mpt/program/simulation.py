"""Draw rows from a program.

Where tokens look at earlier ones, a program reads these from its argument x: it is run on x with every token put into
it as it is drawn, by the same random numbers again until no cell of x changes. Then it has read what it has drawn.
"""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.arguments import cell_name
from bayes_mpt.program.layout import rows_first, token_values
from bayes_mpt.program.program import Model, ModelError, Program
from bayes_mpt.program.run import SetLatents, one_precision, run
from bayes_mpt.program.shifts import of_cells
from bayes_mpt.program.sites import latent_nodes, node_of, observed_nodes
from bayes_mpt.program.store import own_random_state

__all__ = ["simulate", "simulate_in_order"]


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
    """
    with torch.no_grad(), one_precision(args):
        trace = poutine.trace(poutine.uncondition(of_cells(model, program.shifts))).get_trace(*args)
    latents = {site.name: node_of(trace, site.name)["value"] for site in program.latents}
    return token_values(trace, program), latents


def simulate_in_order(model: Model, x: Tensor, program: Program, seed: int) -> Tensor:
    """Rows (N, T), or the N steps of one series, of a program whose tokens look at earlier ones.

    Parameters
    ----------
    model : callable
        A Pyro program, at the current parameters.
    x : (N, T) Tensor
        Of which only the shape matters.
    program : Program
        What was found out about it, on other rows.
    seed : int
        Of the draws.

    Raises
    ------
    ModelError
        If a cell of x is read and never drawn, or the draws do not come to rest. The cell is named.
    """
    model = of_cells(model, program.shifts)
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x)
    with torch.no_grad(), pyro.validation_enabled(False), own_random_state(seed):
        cells = _cells_by_site(model, x)
    drawn = torch.zeros(x.numel(), dtype=torch.bool, device=x.device)
    for of_site in cells.values():
        drawn[of_site.flatten()] = True
    if not bool(drawn.all()):
        cell = int((~drawn).nonzero()[0, 0])
        row, column = cell // x.shape[1], cell % x.shape[1]
        where = cell_name(model, x, 0, (slice(None), column) if program.by_row else (row, column))
        raise ModelError(
            f"tokens of site {program.observed!r} look at earlier ones, and {where} is read and never drawn: rows have "
            "no beginning. Give it a distribution of its own, an observed site before the others"
        )
    for _ in range(x.numel() // (len(x) if program.by_row else 1) + 2):
        before = x.clone()
        with own_random_state(seed):
            _draw_into(model, x, cells)
        if torch.equal(x, before):
            return x
    if program.by_row and program.order is not None and _token_by_token(model, x, cells, program, seed):
        return x
    raise ModelError(
        f"tokens of site {program.observed!r} look at earlier ones, and draws by the same random numbers do not come "
        "to rest: write one site for each step, from the first to the last"
    )


def _token_by_token(model: Model, x: Tensor, cells: dict[str, Tensor], program: Program, seed: int) -> bool:
    """Draw one token of all rows in each run, the latents held; False where these look at tokens."""
    assert program.order is not None
    by_row = torch.cat([rows_first(cells[s.name], s.row_axis) for s in program.sites], 1)  # (N, T)
    with own_random_state(seed):
        first = _draw_into(model, x, cells)
        held = {n["name"]: n["value"] for n in latent_nodes(first)}
        for token in program.order.tokens:
            last = _draw_into(model, x, cells, by_row[:, token], held)
    return all(
        torch.allclose(node_of(last, name)["fn"].log_prob(v), node_of(first, name)["fn"].log_prob(v))
        for name, v in held.items()
    )


def _draw_into(
    model: Model,
    x: Tensor,
    cells: dict[str, Tensor],
    only: Tensor | None = None,
    latents: dict[str, Tensor] | None = None,
) -> Trace:
    """One run, in which what is observed, or these cells of it alone, is drawn and put into x."""
    with torch.no_grad(), pyro.validation_enabled(False), one_precision((x,)), SetLatents(latents or {}):
        with _IntoArgument(x, cells, only):
            return poutine.trace(model).get_trace(x)


def _cells_by_site(model: Model, x: Tensor) -> dict[str, Tensor]:
    """Which cell of x, in reading order, each number of an observed site is: all cells of x are different."""
    found: dict[str, Tensor] = {}
    order = x.flatten().argsort()
    for node in observed_nodes(run(model, (x,))):
        value = node["value"]
        at = torch.searchsorted(x.flatten()[order], value.contiguous()).clamp(max=x.numel() - 1)
        if not bool((x.flatten()[order][at] == value).all()):
            raise ModelError(
                f"observed site {node['name']!r} is not made of cells of x as they stand, so that what is drawn cannot "
                "be put into x: observe the cells themselves"
            )
        found[node["name"]] = order[at]
    return found


class _IntoArgument(poutine.messenger.Messenger):
    """Draw what is observed, and put it into the argument that it is read from."""

    def __init__(self, x: Tensor, cells: dict[str, Tensor], only: Tensor | None):
        super().__init__()
        self.x, self.cells, self.only = x, cells, only

    def _pyro_sample(self, msg: Any) -> None:
        cells = self.cells.get(msg["name"])
        if cells is not None:
            drawn = msg["fn"]().to(self.x).reshape(cells.shape)
            if self.only is not None:
                drawn = torch.where(torch.isin(cells, self.only), drawn, self.x.view(-1)[cells])
            msg["value"] = drawn
            self.x.view(-1)[cells.flatten()] = drawn.flatten()
