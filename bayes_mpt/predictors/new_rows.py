"""Predict new rows of one vector whose latents grow with the rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayes_mpt.program.analysis import analyze
from bayes_mpt.program.arguments import fill, fill_all, head
from bayes_mpt.program.factor_runs import read_factors
from bayes_mpt.program.program import Model, ModelError, Program
from bayes_mpt.program.run import run

__all__ = ["growing", "means_of_new"]

N_DRAWS = 1000  # of the latents of new rows at the least, and that run side by side


def growing(model: Model, args: tuple[Any, ...], program: Program) -> tuple[str, ...]:
    """Latents of one vector that have a number for each row: function values, say."""
    n_rows = len(args[0])
    if program.by_row or n_rows < 2 or not any(n_rows in site.shape for site in program.latents):
        return ()
    try:
        trace = run(model, fill_all(head(args, n_rows - 1)))
    except (RuntimeError, ValueError, IndexError):  # written for so many rows: a plate of literal size
        return ()
    return tuple(
        site.name
        for site in program.latents
        if site.shape == (n_rows,) and trace.nodes[site.name]["value"].shape == (n_rows - 1,)
    )


def means_of_new(
    model: Model,
    seen: tuple[Any, ...],
    new: tuple[Any, ...],
    names: tuple[str, ...],
    draws: list[tuple[float, dict[str, Tensor]]],
) -> Tensor:
    """Means of the tokens of M new rows given the rows seen, where the latents ``names`` grow with the rows: (M,).

    Latents of new rows are standard normal whatever those of the rows seen are (f = L u, L lower triangular): they are
    drawn, evenly for each row. Each draw given the rows seen counts by its share.

    Parameters
    ----------
    model : callable
        A Pyro program.
    seen, new : tuple
        Its arguments.
    names : tuple of str
        From `growing`.
    draws : list of (share, values)
        Weighted posterior values of all latents given the rows seen.
    """
    n_seen, n_new = len(seen[0]), len(new[0])
    share = torch.tensor([s for s, _ in draws], dtype=torch.float64)
    copies = -(-N_DRAWS // len(draws))  # of few draws, so that enough is drawn of the new rows
    picked = torch.arange(len(draws)).repeat_interleave(copies)
    weight = share[picked] / (copies * share.sum())  # (S,)
    values = {name: torch.stack([v[name] for _, v in draws])[picked] for name in draws[0][1]}
    n_draws = len(picked)
    even = torch.special.ndtri((torch.arange(n_draws, dtype=torch.float64) + 0.5) / n_draws)
    both = tuple(
        torch.cat([fill(a), b]) if isinstance(a, Tensor) else a for a, b in zip(seen, new, strict=True)
    )
    program = analyze(model, both)
    longer = dict(values)
    for name in names:
        fresh = torch.stack([even[torch.randperm(n_draws)] for _ in range(n_new)], -1)
        longer[name] = torch.cat([values[name], fresh.to(values[name])], -1)
    everything = torch.ones(1, n_seen + n_new, dtype=torch.bool)

    def means(args: tuple[Any, ...], program: Program, at: dict[str, Tensor]) -> Tensor:
        n = len(next(iter(at.values())))
        pads = {s.name: (1,) * (program.depth - s.n_batch) for s in program.latents}
        at = {name: v.reshape(n, *pads[name], *v.shape[1:]) for name, v in at.items()}
        return read_factors(model, args, program, at, n).means(everything[:, : program.n_tokens])[:, 0]

    parts = [slice(i, i + N_DRAWS) for i in range(0, n_draws, N_DRAWS)]
    found = torch.cat(
        [means(both, program, {n: v[at] for n, v in longer.items()}) for at in parts]
    )  # (S, N + M)
    old = fill_all(seen)
    few = means(old, analyze(model, old), {n: v[:2] for n, v in values.items()})
    if not torch.allclose(few, found[:2, :n_seen], rtol=1e-5, atol=1e-8):
        raise ModelError(
            f"new rows change what latents {list(names)} mean for the old ones, so that they cannot be predicted: map "
            "them by a lower triangular matrix, as a Cholesky factor is"
        )
    return weight.to(found) @ found[:, n_seen:]
