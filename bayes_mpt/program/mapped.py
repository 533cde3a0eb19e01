"""Runs of a program at several values of its latents in one, where it does not broadcast over them: by `torch.vmap`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

__all__ = ["MappedEnumeration", "Tensors", "run_mapped"]

Tensors = dict[str, tuple[Tensor, int]]
"""What is taken out of a run, by name: (enumerated..., plates..., right...), and how many axes are right of plates."""


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

    # a check would have to branch on its node; what is drawn here is drawn for each node
    with pyro.validation_enabled(False):
        found = torch.vmap(one, randomness="different")(values)
    return kept[0], {name: _placed(t, depth + right[name]) for name, t in found.items()}


class MappedEnumeration(EnumMessenger):
    """Pyro's enumeration of discrete latents, also under `torch.vmap`."""

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
