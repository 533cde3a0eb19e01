"""A program at many values of something: on a leading plate, else by `torch.vmap`, else one run after another.

Which of them a program takes is found out by trying a few values, together and apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import Enum
from typing import Any

import pyro
import torch
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

__all__ = ["TOGETHER", "Batched", "MappedEnumeration", "Tensors", "found_out", "run_mapped", "vmapped"]

Tensors = dict[str, tuple[Tensor, int]]
"""What is taken out of a run, by name: (enumerated..., plates..., right...), and how many axes are right of plates."""


class Batched(Enum):
    """How a program takes several values."""

    PLATE = "on a plate left of its own: it broadcasts over leading batch dimensions"
    VMAP = "by torch.vmap: it does not (x @ w, locs[z])"
    LOOP = "one run after another"


TOGETHER = (Batched.PLATE, Batched.VMAP)
"""The ways of one run, the cheaper first."""

WRITTEN = "vmap: inplace arithmetic"
"""In torch's message where what differs from node to node is written into memory that does not."""
MADE = {torch.zeros, torch.ones, torch.empty, torch.full}
MADE |= {torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like}
MADE |= {Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full}


def found_out(same: Callable[[Batched], bool], ways: Sequence[Batched] = TOGETHER) -> Batched:
    """The first of these ways in which a few values give together what they give apart; a loop if none does.

    Parameters
    ----------
    same : callable
        Whether they do in this way. What it raises says that they do not: nobody knows what a program that was written
        for one value does with several.
    ways : sequence of Batched
        That are tried.

    Examples
    --------
    >>> w = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> apart = torch.stack([torch.ones(2) @ each for each in w])
    >>> found_out(lambda way: torch.equal(torch.ones(2) @ w if way is Batched.PLATE else apart, apart)).name
    'VMAP'
    """
    for way in ways:
        with suppress(Exception):
            if same(way):
                return way
    return Batched.LOOP


def vmapped(alone: Callable[..., Any], in_dims: Any = 0, randomness: str = "error") -> Callable[..., Any]:
    """`torch.vmap` of a function that runs a program, also of one that fills memory that it has made.

    Examples
    --------
    >>> def shares(a):
    ...     p = torch.zeros(2)  # one for all, so that vmap writes nothing into it
    ...     p[0], p[1] = a, 1 - a
    ...     return p
    >>> vmapped(shares)(torch.tensor([0.25, 0.5]))
    tensor([[0.2500, 0.7500],
            [0.5000, 0.5000]])
    """

    def own_memory(*values: Any) -> Any:
        with _OwnMemory(values):
            return alone(*values)

    def together(*values: Any) -> Any:
        with pyro.validation_enabled(False):  # a check would have to branch on its values
            try:
                return torch.vmap(alone, in_dims, randomness=randomness)(*values)
            except RuntimeError as error:
                if WRITTEN not in str(error):
                    raise
            return torch.vmap(own_memory, in_dims, randomness=randomness)(*values)

    return together


class _OwnMemory(TorchFunctionMode):
    """What a program makes (`torch.zeros`) is made for every node, so that it can be filled with its values."""

    def __init__(self, values: Any):
        super().__init__()
        batched = torch._C._functorch.is_batchedtensor
        one = next(v for v in tree_leaves(values) if isinstance(v, Tensor) and batched(v))
        self.nothing = torch.zeros_like(one.detach().flatten()[0])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A call of torch."""
        found = func(*args, **(kwargs or {}))
        if func not in MADE:
            return found
        nothing = self.nothing.to(found.dtype)
        return found | nothing if found.dtype == torch.bool else found + nothing


def run_mapped(
    alone: Callable[[dict[str, Tensor]], tuple[Trace, Tensors]], values: dict[str, Tensor], depth: int
) -> tuple[Trace, dict[str, Tensor]]:
    """What S runs say, the nodes on an axis of their own left of the program's plates.

    Parameters
    ----------
    alone : callable
        The run at values of one node, on a plate of one node left of all plates.
    values : dict of name to Tensor
        (S, ...) of each latent.
    depth : int
        Plate dimensions of the program.

    Returns
    -------
    trace : Trace
        Of all runs. Its tensors are gone: sites, plates and symbols stay.
    tensors : dict of name to Tensor
        (enumerated..., S, plates..., right...), S of 1 for what is the same at all nodes.

    Examples
    --------
    >>> import pyro.distributions as dist
    >>> def program():
    ...     w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...     with pyro.plate("rows", 3):
    ...         return pyro.sample("x", dist.Normal(torch.ones(3, 2) @ w, 1.0), obs=torch.zeros(3))
    >>> def alone(values):
    ...     with pyro.plate("nodes", 1, dim=-2):
    ...         trace = pyro.poutine.trace(pyro.poutine.condition(program, values)).get_trace()
    ...     return trace, {"x": (trace.nodes["x"]["fn"].log_prob(trace.nodes["x"]["value"]), 0)}
    >>> run_mapped(alone, {"w": torch.zeros(5, 2)}, 1)[1]["x"].shape
    torch.Size([5, 3])
    """
    kept: list[Trace] = []
    right: dict[str, int] = {}

    def one(node: dict[str, Tensor]) -> dict[str, Tensor]:
        trace, found = alone(node)
        kept[:] = [trace]
        right.update({name: n for name, (_, n) in found.items()})
        return {name: t[(None,) * (depth + 1 + n - t.ndim)] for name, (t, n) in found.items()}

    found = vmapped(one, randomness="different")(values)  # what is drawn here is drawn for each node
    return kept[0], {name: _placed(t, depth + right[name]) for name, t in found.items()}


class MappedEnumeration(EnumMessenger):
    """Pyro's enumeration of discrete latents, also under `torch.vmap`, and of reparametrised ones in `pyro.markov`."""

    def _pyro_sample(self, msg: Any) -> None:
        """Keep to the sites that were reached: a reparametrised one is known to `pyro.markov` before its own parts."""
        scope = msg["infer"].get("_markov_scope", {})
        for name in [n for n in scope if n not in self._markov_depths]:
            del scope[name]
        super()._pyro_sample(msg)

    def _pyro_post_sample(self, msg: Any) -> None:
        """Remember the axes of a value: Pyro asks ``value.data`` for its shape, which vmap refuses to give."""
        value = msg["value"]
        if isinstance(value, Tensor):
            msg["value"] = torch.empty(value.shape, device="meta")
        super()._pyro_post_sample(msg)
        msg["value"] = value


def _placed(t: Tensor, n_after: int) -> Tensor:
    """(S, left..., 1, after...) -> (left..., S, after...)."""
    t = t[:1] if len(t) > 1 and not t.stride(0) else t  # vmap repeats what no node changes
    at = t.ndim - n_after - 1
    return t.select(at, 0).movedim(0, at - 1)
