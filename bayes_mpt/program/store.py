"""Parameters and random numbers of one's own around a Pyro program.

Pyro keeps parameters in one global store, and programs draw from torch's global generators. A fit uses them and leaves
them as they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import pyro
import torch
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from torch import Tensor
from torch.distributions.constraints import Constraint

__all__ = [
    "Initial",
    "OwnStore",
    "State",
    "load",
    "moved_parameters",
    "own_random_state",
    "random_states",
    "save",
    "seed_programs",
    "set_random_states",
]


class OwnStore:
    """A parameter store of one's own around a program: nothing outside it changes, networks of the program included.

    `pyro.module` puts a network's own tensors into the store, where they are trained in place; so values are copied
    into the store and out of it, and networks get theirs back at the end, also after Ctrl-C; so does Pyro's stack of
    handlers, on which an interrupted program may have left its own.
    """

    def __init__(self) -> None:
        self._scope = pyro.get_param_store().scope()
        self._lent: dict[Tensor, Tensor] = {}
        self._handlers: list[Any] = []
        self._plates: list[Any] = []

    def __enter__(self) -> Self:
        self._handlers, self._plates = list(_PYRO_STACK), list(_DIM_ALLOCATOR._stack)
        self._scope.__enter__()
        return self

    def initial(self) -> Initial:
        """Parameters and constraints as a program's first run left them; networks make their own."""
        store = pyro.get_param_store()
        bounds = store.get_state()["constraints"]
        return {
            name: (leaf.detach().clone(), bounds[name])
            for name, leaf in store.named_parameters()
            if not isinstance(leaf, torch.nn.Parameter)
        }

    def prefill(self, initial: Initial) -> None:
        """Before a program's first run on other rows: spare it the search for initial values."""
        params = {name: value.clone().requires_grad_() for name, (value, _) in initial.items()}
        bounds = {name: bound for name, (_, bound) in initial.items()}
        pyro.get_param_store().set_state({"params": params, "constraints": bounds})

    def begin(self, state: State | None) -> None:
        """After the program's first run: remember what its networks held, and start from ``state``."""
        for _, leaf in pyro.get_param_store().named_parameters():
            if isinstance(leaf, torch.nn.Parameter):
                self._lent.setdefault(leaf, leaf.detach().clone())
        if state is not None:
            load(state)

    def __exit__(self, *error: Any) -> None:
        with torch.no_grad():
            for leaf, value in self._lent.items():
                leaf.copy_(value)
        self._scope.__exit__(None, None, None)
        self.unwind()

    def unwind(self) -> None:
        """Leave the handlers that a program has entered by hand and that Ctrl-C has kept it from leaving."""
        _PYRO_STACK[:], _DIM_ALLOCATOR._stack[:] = self._handlers, self._plates


Initial = dict[str, tuple[Tensor, Constraint]]
"""Unconstrained parameters by name, each with its constraint."""

State = dict[str, Tensor]
"""Unconstrained parameters by name, detached copies."""


def save() -> State:
    """Copies of all parameters in the store."""
    return {name: leaf.detach().clone() for name, leaf in pyro.get_param_store().named_parameters()}


def load(state: State) -> None:
    """Copy values into the store's parameters.

    Raises
    ------
    ValueError
        If a parameter is missing from ``state``, or has another shape there.
    """
    with torch.no_grad():
        for name, leaf in pyro.get_param_store().named_parameters():
            if name not in state or state[name].shape != leaf.shape:
                got = tuple(state[name].shape) if name in state else "none"
                raise ValueError(
                    f"parameter {name!r} has shape {tuple(leaf.shape)}, but the last fit left one of shape {got}: "
                    "fit with warm_start=False"
                )
            leaf.copy_(state[name])


@contextmanager
def moved_parameters(size: float, seed: int = 0) -> Iterator[None]:
    """All parameters a little off: one that is zero or one by its start hides what it multiplies.

    They are moved in place and put back. A graph that was made before can no longer be differentiated.
    """
    leaves = [leaf for _, leaf in pyro.get_param_store().named_parameters()] if size else []
    before = [leaf.detach().clone() for leaf in leaves]
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for leaf in leaves:
                noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)
                leaf += size * (1 + leaf.abs()) * noise
        yield
    finally:
        with torch.no_grad():
            for leaf, value in zip(leaves, before, strict=True):
                leaf.copy_(value)


# ---------------------------------------------------------------------------------------------------- random numbers


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
