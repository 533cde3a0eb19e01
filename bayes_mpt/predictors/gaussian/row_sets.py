"""A program that observes one Gaussian vector, run on many sets of its rows at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from bayes_mpt.program.arguments import fill_all, rows_of, spread_rows
from bayes_mpt.program.batched import Batched, found_out, vmapped
from bayes_mpt.program.program import Model, ModelError, Program
from bayes_mpt.program.run import run
from bayes_mpt.program.sites import base

__all__ = ["RowSets", "is_rows"]

N_TRIAL_ROWS = 16  # on which it is found out how the program takes batches
CLOSE = 1e-9


class RowSets:
    """The program on many sets of rows at once."""

    def __init__(self, model: Model, program: Program, args: tuple[Any, ...]):
        self.model = model
        self.site = program.sites[0].name
        self.together: Callable[..., tuple[Tensor, Tensor, Tensor]] = self._find_out(args)

    def __call__(self, args: tuple[Any, ...], sets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means (B, k), covariances (B, k, k) and values (B, k) of sets (B, k) of rows, with gradients."""
        return self.together(*rows_of(args, sets))

    def _one(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        """A single run: on one set (k, ...), or on all sets (B, k, ...) where the program broadcasts."""
        node = run(self.model, args, labels=False).nodes[self.site]  # of a program without latents
        fn = base(node["fn"])
        return fn.loc, fn.covariance_matrix, node["value"].to(fn.loc)

    def _mapped(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        dims = tuple(0 if is_rows(a) else None for a in args)
        return cast(tuple[Tensor, Tensor, Tensor], vmapped(self._one, dims)(*args))

    def _in_turn(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        n = len(args[0])
        parts = [self._one(*(a[b] if is_rows(a) else a for a in args)) for b in range(n)]
        loc, cov, value = zip(*parts, strict=True)
        return torch.stack(loc), torch.stack(cov), torch.stack(value)

    def _find_out(self, args: tuple[Any, ...]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        """How the program takes batches; refuse one whose rows depend on which others are there."""
        rows = spread_rows(len(args[0]), N_TRIAL_ROWS).to(args[0].device)
        half = len(rows) // 2 or 1
        places = torch.stack(
            [torch.arange(half) * 2 % len(rows), torch.arange(half), torch.arange(half).flip(0)]
        )
        few = fill_all(rows_of(args, rows))
        with torch.no_grad():
            loc, cov, _ = self._one(*few)
            alone = rows_of(few, places.to(rows.device))
            truth = self._in_turn(*alone)
            whole = loc[places], cov[places[:, :, None], places[:, None, :]]
            if not all(_close(a, b) for a, b in zip(truth[:2], whole, strict=True)):
                raise ModelError(
                    f"the distribution of site {self.site!r} over some rows changes with the other rows there are (a "
                    "statistic of all rows inside the program, or their number), so that rows cannot be predicted from "
                    "neighbours alone: compute it outside the program, or use predictor=Exact()"
                )
            ways = {Batched.PLATE: self._one, Batched.VMAP: self._mapped, Batched.LOOP: self._in_turn}

            def same(batched: Batched) -> bool:
                both = zip(ways[batched](*alone), truth, strict=True)
                return all(a.shape == b.shape and _close(a, b) for a, b in both)

            return ways[found_out(same)]


def is_rows(arg: Any) -> bool:
    """Whether an argument of the program has rows."""
    return isinstance(arg, Tensor) and arg.ndim > 0


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= CLOSE * b.abs().max().clamp(min=1e-300)).all())
