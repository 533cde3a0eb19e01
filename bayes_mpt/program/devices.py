"""Devices: refuse one that is not there, take what holds tensors to another, leave all random states as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import cloudpickle
import torch
from torch import Tensor

__all__ = [
    "at_once",
    "check_device",
    "moved",
    "own_random_state",
    "random_states",
    "seed_programs",
    "set_random_states",
]


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


def seed_programs(seed: int) -> None:
    """Give torch's global generators, from which programs draw, a seed."""
    # torch.manual_seed also notes three call stacks for the day when CUDA may start: some milliseconds
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def own_random_state(seed: int | None = None) -> Iterator[None]:
    """Programs draw from torch's global generators: give them a seed, if there is one, and put them back."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            seed_programs(seed)
        yield


def random_states() -> list[Tensor]:
    """Of torch's global generators: the CPU's, then those of all GPUs."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *gpus]


def set_random_states(states: list[Tensor]) -> None:
    """Put back what `random_states` gave, those of GPUs as far as they are here."""
    torch.set_rng_state(states[0])
    if torch.cuda.is_available():
        for i, state in enumerate(states[1 : torch.cuda.device_count() + 1]):
            torch.cuda.set_rng_state(state, i)


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
