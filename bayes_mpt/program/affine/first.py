"""The first reading of a map: the one that its analysis has made."""

from __future__ import annotations

from typing import Any

import pyro
import torch

__all__ = ["FirstReading"]


class FirstReading:
    """A map as its analysis has read it, good once and while the parameters are those of that reading."""

    def __init__(self, reading: Any):
        self._reading = reading
        self._leaves = dict(pyro.get_param_store().named_parameters())
        self._values = [leaf.detach().clone() for leaf in self._leaves.values()]
        self._versions = [leaf._version for leaf in self._leaves.values()]

    def take(self) -> Any:
        """The map, or None where it is taken or parameters have moved since."""
        reading, self._reading = self._reading, None
        leaves = dict(pyro.get_param_store().named_parameters())
        if reading is None or leaves.keys() != self._leaves.keys() or not torch.is_grad_enabled():
            return None
        for name, value, version in zip(self._leaves, self._values, self._versions, strict=True):
            leaf = leaves[name]
            # an optimiser may write into a leaf behind autograd's back
            if leaf is not self._leaves[name] or leaf._version != version or not torch.equal(leaf, value):
                return None
        return reading
