"""Which latents a linear-Gaussian map integrates once others are known."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.predictors.gaussian.linear import LinearGaussian
from bayes_mpt.predictors.nodes.weighted import FixedSites
from bayes_mpt.program.affine import NotAffine
from bayes_mpt.program.arguments import Args
from bayes_mpt.program.layout import rows_first
from bayes_mpt.program.program import Latent, Model, Program
from bayes_mpt.program.run import run
from bayes_mpt.program.sites import base, node_of
from bayes_mpt.program.store import own_random_state, seed_programs
from bayes_mpt.program.unconstrained import latent_density

__all__ = ["log_prior_of", "node_values", "non_conjugate", "prior_draws"]

GAUSSIAN = {"Normal", "MultivariateNormal"}
MAX_LEFT_OUT = 4  # latents that multiply others: more take too many nodes


def prior_draws(model: Model, filled: tuple[Any, ...], n: int, first: int = 0) -> list[Trace]:
    """The first n runs, or those from another on, that differ and are always the same ones."""
    traces = []
    with own_random_state():
        for seed in range(first, n):
            seed_programs(seed)
            traces.append(run(model, filled))  # which leaves the random state as it was
    return traces


def node_values(values: dict[str, Tensor], s: int) -> dict[str, Tensor]:
    """Of one node, of values (S, ...) at several."""
    return {name: v[s] for name, v in values.items()}


def log_prior_of(trace: Trace, latents: tuple[Latent, ...], like: Tensor) -> Tensor:
    """log p of these sites of a run: (N,), or (1,) of the data set."""
    total = like.new_zeros(1)
    for latent in latents:
        node = node_of(trace, latent.name)
        total = total + rows_first(latent_density(node), latent.row_axis).sum(-1)
    return total


def non_conjugate(
    model: Model, args: Args, program: Program, held: dict[str, Tensor]
) -> tuple[tuple[str, ...], LinearGaussian | None]:
    """The continuous latents that a linear-Gaussian map leaves over, with the map; all where there is none."""
    everything = program.continuous
    if program.discrete or {s.kind for s in program.sites} - GAUSSIAN:
        return everything, None
    with own_random_state(0):
        trace = run(model, args.filled)
    drawn = {n: node_of(trace, n)["value"].detach() for n in everything}

    def given(names: Iterable[str]) -> LinearGaussian | None:
        with suppress(NotAffine):
            return LinearGaussian(FixedSites(model, {**held, **{n: drawn[n] for n in names}}), args.given)
        return None

    if held and (template := given(())) is not None:  # of a row: all together
        return (), template
    normal = [n for n in everything if type(base(node_of(trace, n)["fn"])).__name__ in GAUSSIAN]
    alone = {n: given(m for m in everything if m != n) for n in normal}
    kept = [n for n, template in alone.items() if template is not None]
    rest = tuple(n for n in everything if n not in kept)

    def stirs(name: str) -> bool:
        """Whether the density of a latent that takes nodes depends on this one."""
        moved = run(model, args.filled, {**held, **drawn, name: drawn[name] + 1})
        return any(
            not torch.equal(*(t.nodes[n]["fn"].log_prob(drawn[n]) for t in (trace, moved))) for n in rest
        )

    def settle() -> None:
        nonlocal kept, rest
        while stirring := [n for n in kept if stirs(n)]:
            kept = [n for n in kept if n not in stirring]
            rest = tuple(n for n in everything if n not in kept)

    settle()
    # one by one they are; all together?
    template = given(rest) if len(kept) > 1 else next((alone[n] for n in kept), None)
    if not kept or (not rest and template is not None):  # all could be integrated, but nodes were asked for
        return everything, None
    if template is None:  # some multiply each other, as a coefficient does a state
        kept = _together(kept, lambda names: given(n for n in everything if n not in names) is not None)
        rest = tuple(n for n in everything if n not in kept)
        settle()
        template = given(rest) if kept and rest else None
    if template is not None and template.structure.by_row and not program.by_row:
        template = None  # what is left belongs to rows, which are integrated one by one
    return (everything if template is None else rest), template


def _together(names: list[str], is_affine: Callable[[list[str]], bool]) -> list[str]:
    """Of latents that are affine one by one, most that are together: from the last to the first, or the other way.

    Blocks are halved down to those that multiply one that is taken already; of these a few are left out.
    """

    def take(order: list[str]) -> list[str]:
        taken: list[str] = []
        n_out, blocks = 0, [order]
        while blocks:
            block = blocks.pop()
            if is_affine(taken + block):
                taken = taken + block
            elif len(block) > 1:
                half = len(block) // 2
                blocks += [block[half:], block[:half]]
            else:
                n_out += 1
                if n_out > MAX_LEFT_OUT:
                    return []
        return taken

    return max(take(names[::-1]), take(names), key=len)
