"""Questions that tokens which look at each other cannot answer: all but their chain in the program's own order."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from bayes_mpt.program.program import ModelError, Order, list_names

if TYPE_CHECKING:
    from bayes_mpt.predictors.base import Conditionals, Posterior

__all__ = ["in_own_order", "own_order", "refuse_masks", "words_of"]

C = TypeVar("C", bound=type)


def own_order(read: Conditionals) -> Tensor:
    """An order of the tokens (1, T): the program's own where tokens look at each other, else as they stand."""
    order, value = read.structure.order, read.value
    if order is None:
        return torch.arange(value.shape[1], device=value.device)[None]
    return torch.tensor(order.tokens, device=value.device)[None]


def refuse_masks(what: str) -> None:
    """The error of what asks for another visible set than the tokens before one."""
    raise ModelError(
        f"{what} needs log p(x_i | x_R) for visible sets R of its own, and tokens of this program look at earlier "
        "tokens: they are read at their observed values, so that the program is a density along its own order alone. "
        "Leave masks=None (PermutationChain), whose terms are then those of this order"
    )


def words_of(order: Order) -> str:
    """What is said of an order in `explain`."""
    given = f"; conditioned on {list_names(order.given)}" if order.given else ""
    return f"the program's own, since tokens look at earlier ones (found {order.how}){given}"


def in_own_order(cls: C) -> C:
    """Let a class of `Conditionals` refuse what its program, if tokens look at each other, does not answer."""
    for name, guard in (("conditionals", _conditionals), ("chain", _chain), ("posterior", _posterior)):
        if name in vars(cls):
            setattr(cls, name, guard(vars(cls)[name]))
    return cls


def _conditionals(ask: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(ask)
    def asked(self: Conditionals, visible: Tensor) -> Tensor:
        if self.structure.order is not None:
            refuse_masks("a single conditional")
        return ask(self, visible)

    return asked


def _chain(ask: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(ask)
    def asked(self: Conditionals, order: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.structure.order is not None:
            if not bool((order == own_order(self).to(order.device)).all()):
                refuse_masks("a chain in another order")
        return ask(self, order, *args, **kwargs)

    return asked


def _posterior(ask: Callable[..., Posterior]) -> Callable[..., Posterior]:
    @wraps(ask)
    def asked(self: Conditionals, visible: Tensor | None = None) -> Posterior:
        if self.structure.order is not None and visible is not None:
            refuse_masks("a posterior given some tokens")
        return ask(self, visible)

    return asked
