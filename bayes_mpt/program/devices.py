"""Devices: refuse one that is not there, take what holds tensors to another, give a GPU more at once."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import cloudpickle
import torch

__all__ = ["at_once", "check_device", "moved"]


def at_once(n_numbers: int, device: torch.device, times: int = 8) -> int:
    """How many numbers one step should make where so many stay in a CPU's cache: a GPU wants more work in each."""
    return n_numbers if device.type == "cpu" else times * n_numbers


def check_device(device: str) -> None:
    """Refuse a device that torch cannot compute on here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={device!r} is not one that torch finds here ({str(error).splitlines()[0]}): "
            'set_params(device="cpu")'
        ) from error


def moved(content: Any, device: str) -> Any:
    """A copy of anything that can be pickled, its tensors on this device; those that were one still are.

    Examples
    --------
    >>> x = torch.ones(2)
    >>> a, b = moved([x, {"x": x}], "cpu")
    >>> a is b["x"], a is x
    (True, False)
    """
    file = BytesIO()
    torch.save(content, file, pickle_module=cloudpickle)
    file.seek(0)
    return torch.load(file, map_location=device, weights_only=False)  # what was written here just now
