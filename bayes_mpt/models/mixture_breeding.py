"""Mixtures bred from others: in each round some are crossed and some shaken, and the best of all go on.

Where a likelihood has many maxima, two good ones agree about most rows, and each has found what the other has not.
Components are matched by the rows that they have in common; a child has the shares of either parent (Pernkopf &
Bouchaffra 2005, Gribel & Vidal 2019), and a step of EM makes a mixture of it. What is shaken climbs for some steps with
rows that count as often as random numbers say (Elidan, Ninio, Friedman & Schuurmans 2002), which leads out of maxima
that hang on few rows and leaves good clusters as they are. Crossing alone ends where all are alike; shaking alone finds
each improvement by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol, TypeVar

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from bayes_mpt.models.left_out import Key

__all__ = ["Plan", "Ways", "bred", "crossed", "random_counts"]

SUCCESS = 0.01  # nats of all rows
ALIKE = 0.02  # the same: two that are no further apart are taken for one place
FLOOR = 1e-3  # of a component's share of a row, where each is taken from either parent: all may be zero

M = TypeVar("M")


class Plan(NamedTuple):
    """Of rounds of breeding."""

    rounds: int
    """At most"""
    children: int
    """Made in a round"""
    shaken: int
    """The same"""
    parents: int
    """Places of which some are shaken, the best"""
    kept: int
    """Of what is made, after few steps"""
    places: int
    """How many go on"""
    patience: int
    """Rounds without success"""


class Ways(Protocol[M]):
    """What is done with mixtures side by side."""

    def taken(self, at: M, index: Tensor) -> M:
        """Some of them."""

    def joined(self, parts: list[M]) -> M:
        """All of several."""

    def judged(self, at: M) -> tuple[M, Tensor]:
        """Where few steps lead, and the scores (B,), in nats."""

    def settled(self, at: M) -> tuple[M, Tensor]:
        """Where some more lead."""

    def shaken(self, at: M, generator: torch.Generator) -> M:
        """Where some lead in which rows count as random numbers say."""

    def child(self, first: M, second: M, generator: torch.Generator) -> M:
        """What is made of the shares of pairs (`crossed`), some steps later."""


def bred(at: M, n: int, ways: Ways[M], plan: Plan, generator: torch.Generator) -> M:
    """The mixtures that are left of n in the end, best first; given in that order."""
    waited = 0
    for _ in range(plan.rounds):
        which = torch.arange(plan.shaken, device="cpu") % min(n, plan.parents)
        made = [ways.shaken(ways.taken(at, which), generator)]
        if n > 1:
            pairs = [torch.randperm(n, generator=generator)[:2] for _ in range(plan.children)]
            first, second = torch.stack(pairs, 1)
            made.append(ways.child(ways.taken(at, first), ways.taken(at, second), generator))
        many, value = ways.judged(ways.joined(made))
        best = ways.taken(many, value.argsort(descending=True)[: plan.kept].cpu())
        both, value = ways.settled(ways.joined([at, best]))
        waited = 0 if float(value.max() - value[:n].max()) > SUCCESS else waited + 1
        chosen = _different(value, plan.places)
        at, n = ways.taken(both, chosen), len(chosen)
        if waited == plan.patience:
            break
    return at


def _different(value: Tensor, n: int) -> Tensor:
    """Indices of the best of values (B,), at most n, of which no two are alike."""
    order = value.argsort(descending=True).cpu()
    best = value.cpu()[order].tolist()
    chosen = [0]
    for i, each in enumerate(best):
        if len(chosen) < n and best[chosen[-1]] - each > ALIKE and each > -math.inf:
            chosen.append(i)
    return order[chosen]


def crossed(
    first: Mapping[Key, Tensor], second: Mapping[Key, Tensor], generator: torch.Generator
) -> dict[Key, Tensor]:
    """Shares of rows (B, K, n), of B children of the mixtures that have these shares: as the first has them, or not.

    In one half of the children each row is shared as one parent does, at random. In the others each component has
    all its shares from one, and what comes of that is divided by its sum.

    Parameters
    ----------
    first, second : mapping of Tensors of shape (B, K, n)
        By the names under which rows are read together.
    generator : torch.Generator
        On the CPU.

    Examples
    --------
    >>> a = {("rows", 0): torch.tensor([[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]])}
    >>> b = {("rows", 0): 1 - a["rows", 0]}  # the same but for the names of the components
    >>> crossed(a, b, torch.Generator().manual_seed(0))["rows", 0].round(decimals=2)
    tensor([[[1., 1., 0., 0.],
             [0., 0., 1., 1.]]])
    """
    common = sum(first[key] @ second[key].mT for key in first)  # (B, K, K)
    assert isinstance(common, Tensor)
    order = torch.stack(
        [torch.from_numpy(linear_sum_assignment(-each)[1]) for each in common.cpu().numpy()]
    ).to(common.device)
    n_children, n_components = order.shape
    by_rows = (torch.arange(n_children, device="cpu") < n_children // 2)[:, None, None]
    of_first = torch.rand((n_children, n_components, 1), generator=generator) < 0.5
    children = {}
    for key, share in first.items():
        other = second[key].gather(1, order[..., None].expand_as(share))
        of_row = torch.rand((n_children, 1, share.shape[-1]), generator=generator) < 0.5
        child = torch.where(torch.where(by_rows, of_row, of_first).to(share.device), share, other)
        child = child + FLOOR * (~by_rows).to(child)
        children[key] = child / child.sum(1, keepdim=True)
    return children


def random_counts(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """How often each row counts (B, n): exponential numbers, as in the Bayesian bootstrap (Rubin 1981)."""
    return torch.empty(shape, dtype=torch.float64, device="cpu").exponential_(generator=generator)
