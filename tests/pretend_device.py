"""A device for machines without a GPU: it computes on the CPU, and refuses what a GPU would refuse.

That is, operations on tensors of both places (but for numbers, and indices), generators of the other place, and
conversion to numpy. A tensor that a program forgot to move is found by it, numerical differences are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.serialization import _serialization_tls
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing

__all__ = ["DEVICE", "away"]

CAN = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
DEVICE = "cuda" if torch.cuda.is_available() else "pretended" if CAN else None
aten = torch.ops.aten
REBUILD = torch._utils._rebuild_tensor
MOVES = (aten.copy_, aten._to_copy)
TAKES_INDICES = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index)


@contextmanager
def away() -> Iterator[None]:
    """`DEVICE` can be computed on."""
    if DEVICE == "cuda":
        yield
        return
    with _Factories(), mock.patch.object(torch._utils, "_rebuild_tensor", _rebuilt):
        yield


class _There(Tensor):
    """Claims to be away; its numbers are those of a tensor of the CPU."""

    @staticmethod
    def __new__(cls, here: Tensor) -> _There:
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        return Tensor._make_wrapper_subclass(cls, here.shape, device=torch.device(DEVICE, 0), **layout)

    def __init__(self, here: Tensor):
        self.here = here.detach()

    def __repr__(self) -> str:
        return f"There({self.here})"

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert a tensor that is away to numpy")

    __array__ = numpy

    def tolist(self) -> Any:
        return self.here.tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _loaded, (self.here, self.requires_grad, isinstance(self, torch.nn.Parameter))

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [a for a in _leaves((args, tuple(kwargs.values()))) if isinstance(a, Tensor)]
        near = [a for a in given if not isinstance(a, _There) and a.ndim > 0]
        op = func.overloadpacket
        if near and op not in MOVES and not (op in TAKES_INDICES and isinstance(args[0], _There)):
            shapes = [(type(a).__name__, tuple(a.shape)) for a in given]
            raise RuntimeError(f"{func}: not all tensors are in the same place: {shapes}")
        target = kwargs.get("device")
        to_there = (
            _is_there(target) if target is not None else op is not aten.copy_ or isinstance(args[0], _There)
        )
        if kwargs.get("generator") is not None and to_there:
            raise RuntimeError(f"{func}: the generator is not where the numbers are to be")
        if target is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        out = func(*_each(_here, args), **{k: _each(_here, a) for k, a in kwargs.items()})
        if not to_there:
            return out
        out = _each(lambda a: _There(a) if isinstance(a, Tensor) else a, out)
        if op is aten._to_copy or not _has_aliases(func):
            return out
        return return_and_correct_aliasing(func, args, kwargs, out)


class _Factories(TorchFunctionMode):
    """Make and move tensors: what names a device is seen here, before torch looks for it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to:
            return _to(*args, **kwargs)
        if func is torch.Tensor.cpu:
            return _to(args[0], "cpu")
        if func is torch.as_tensor and isinstance(args[0], _There):
            return _to(args[0], **kwargs)
        if _is_there(kwargs.get("device")):
            return _to(func(*args, **{**kwargs, "device": "cpu"}), DEVICE)
        if func is torch.Tensor.new_tensor and isinstance(args[0], _There):
            return _to(torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}), DEVICE)
        return func(*args, **kwargs)


def _to(x: Tensor, *target: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to`, whatever it is given."""
    if target and isinstance(target[0], Tensor):
        target = (target[0].device, target[0].dtype, *target[1:])
    device = kwargs.pop("device", None)
    if target and isinstance(target[0], str | torch.device):
        device, *target = target
    target = tuple(t for t in target if t is not None and t is not False)  # no dtype, not later
    with torch._C.DisableTorchFunction():
        if device is not None and _is_there(device) != isinstance(x, _There):
            x = _Send.apply(x) if _is_there(device) else _Fetch.apply(x)
        return x.to(*target, **kwargs) if target or kwargs else x


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _There(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _here(grad)


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.here.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _There(grad)


def _loaded(here: Tensor, requires_grad: bool, is_parameter: bool) -> Tensor:
    """What was away when it was saved: the numbers are where `torch.load` has put them."""
    if is_parameter:
        return torch.nn.Parameter(here, requires_grad)
    return here.detach().requires_grad_(requires_grad)


def _rebuilt(*parts: Any) -> Tensor:
    """A tensor that `torch.load` makes of what was read."""
    here = REBUILD(*parts)
    return _There(here) if _is_there(_serialization_tls.map_location) else here


def _leaves(values: Any) -> Iterator[Any]:
    """All that an operation is given, those of its lists one by one."""
    for a in values:
        if isinstance(a, list | tuple):
            yield from _leaves(a)
        else:
            yield a


def _each(function: Any, a: Any) -> Any:
    """The function of each leaf. `torch.utils._pytree` takes much longer than the operation itself."""
    return type(a)(_each(function, b) for b in a) if isinstance(a, list | tuple) else function(a)


@cache
def _has_aliases(func: Any) -> bool:
    """Whether an operation gives a view of what it is given, or changes it."""
    schema = func._schema
    return any(a.alias_info is not None for a in (*schema.arguments, *schema.returns))


def _here(a: Any) -> Any:
    return a.here if isinstance(a, _There) else a


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **where: Any) -> Tensor:
    return _There(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **where: Any) -> Tensor:
    return _There(torch.empty_strided(size, stride, dtype=dtype))


def _zeros(size: Any, *, dtype: Any = None, **where: Any) -> Tensor:
    return _There(torch.zeros(size, dtype=dtype))


if DEVICE == "pretended":

    class _Backend(backend_registration._DummyBackendModule):
        """One device, whose random numbers are drawn by the CPU's generator."""

        def is_available(self) -> bool:
            return True

        def device_count(self) -> int:
            return 1

        def is_initialized(self) -> bool:
            return True

        def current_device(self) -> int:
            return 0

        def get_rng_state(self, device: Any = 0) -> Tensor:
            return torch.get_rng_state()

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return []

        def set_rng_state(self, state: Tensor, device: Any = 0) -> None:
            pass

    backend_registration._setup_privateuseone_for_python_backend(rename=DEVICE, backend_module=_Backend())
    torch.serialization.register_package(
        0, lambda storage: None, lambda storage, location: storage if _is_there(location) else None
    )  # `torch.load` leaves the numbers here
    made = torch.library.Library("aten", "IMPL")  # what autograd makes by itself
    made.impl("empty.memory_format", _empty, "PrivateUse1")
    made.impl("empty_strided", _empty_strided, "PrivateUse1")
    made.impl("_efficientzerotensor", _zeros, "PrivateUse1")
