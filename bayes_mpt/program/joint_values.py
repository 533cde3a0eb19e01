"""Discrete latents of a plate whose entries meet outside of it: their values are enumerated together.

Pyro enumerates the entries of a plate side by side, each by itself, which is right while no density outside of the
plate looks at them. Where one does, ``(x * included * w).sum(-1)`` over the plate of the weights, say, all combinations
of their values are enumerated: L^n of n entries with L values each.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from pyro import poutine
from pyro.ops import packed
from torch import Tensor

from bayes_mpt.program.program import ModelError

__all__ = ["MAX_COMBINATIONS", "JointValues", "meeting_plates"]

MAX_COMBINATIONS = 4096

Meeting = dict[str, frozenset[str]]
"""By discrete site, the plates whose entries meet outside of them."""


def meeting_plates(trace: Any, log_probs: dict[str, Tensor]) -> Meeting:
    """The plates of discrete latents that a density outside of them looks at.

    Parameters
    ----------
    trace : Trace
        Of an enumerated run, its dimensions symbolised.
    log_probs : dict of name to Tensor
        Of its sites: (enumerated..., plates...).
    """
    nodes = {name: trace.nodes[name] for name in log_probs}
    plates = {
        n: {f.name: f.size for f in node["cond_indep_stack"] if f.vectorized} for n, node in nodes.items()
    }
    dims = {n: packed.pack(t, nodes[n]["infer"]["_dim_to_symbol"])._pyro_dims for n, t in log_probs.items()}
    found: Meeting = {}
    for name, node in nodes.items():
        symbol = node["infer"].get("_enumerate_symbol")
        if symbol is None:
            continue
        inside = [set(plates[other]) for other, symbols in dims.items() if symbol in symbols]
        left = {p for p, size in plates[name].items() if size > 1 and any(p not in own for own in inside)}
        if left:
            found[name] = frozenset(left)
    return found


class JointValues(poutine.messenger.Messenger):
    """Give a discrete site of a plate all combinations of its entries' values to enumerate.

    It stands inside of Pyro's enumeration, and outside of everything that expands a distribution.
    """

    def __init__(self, meeting: Meeting):
        super().__init__()
        self.meeting = meeting

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.meeting or msg["infer"].get("enumerate") != "parallel" or msg["done"]:
            return
        plates = self.meeting[msg["name"]]
        axes = {f.dim: f.size for f in msg["cond_indep_stack"] if f.vectorized and f.name in plates}
        fn = copy.copy(msg["fn"])
        single = fn.enumerate_support(expand=False)  # (L, 1..., event...)
        n_entries = 1
        for size in axes.values():
            n_entries *= size
        if len(single) ** n_entries > MAX_COMBINATIONS:
            raise ModelError(
                f"the {n_entries} entries of discrete latent {msg['name']!r} in plate {sorted(plates)} meet outside of "
                f"it: {len(single)}^{n_entries} combinations of values to sum over, more than {MAX_COMBINATIONS}. Take "
                "fewer entries, or a continuous latent in their place"
            )
        index = torch.cartesian_prod(*[torch.arange(len(single), device=single.device)] * n_entries)
        index = index.reshape(-1, n_entries)
        shape = [axes.get(d - len(fn.batch_shape), 1) for d in range(len(fn.batch_shape))]
        values = single.reshape(len(single), *fn.event_shape)[index]  # (L^n, n, event...)
        values = values.reshape(len(index), *shape, *fn.event_shape)
        fn.enumerate_support = lambda expand=True: values
        msg["fn"] = fn
