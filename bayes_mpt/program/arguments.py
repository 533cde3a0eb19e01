"""What a program is called with: missing cells filled, rows picked, values changed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Args",
    "cell_name",
    "cycle",
    "fill",
    "fill_all",
    "fill_otherwise",
    "filling",
    "has_missing",
    "head",
    "resampled",
    "rows_of",
    "same_cells",
    "shifted",
    "spread_rows",
    "stands_in",
]

N_TRIAL_ROWS = 8


def resampled(arg: Any) -> Any:
    """Every column of an argument resampled by itself: counts stay counts."""
    if not isinstance(arg, Tensor) or not arg.ndim:
        return arg
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(len(arg), arg.shape, generator=generator).to(arg.device)
    return torch.gather(arg, 0, index)


def shifted(arg: Any) -> Any:
    """Every cell of an argument one larger: whole numbers stay whole."""
    if not isinstance(arg, Tensor):
        return arg
    return ~arg if arg.dtype == torch.bool else arg + 1


def fill(arg: Any, value: Tensor | None = None) -> Any:
    """NaN cells replaced, by default by `filling`, so that any program can run; they are never scored.

    The argument itself where nothing is missing.
    """
    if not has_missing(arg):
        return arg
    value = filling(arg) if value is None else value
    assert value is not None
    return torch.where(arg.isnan(), value, arg)


def fill_all(args: Iterable[Any]) -> tuple[Any, ...]:
    """All arguments of a call without missing cells, each as `fill` has it."""
    return tuple(fill(a) for a in args)


@dataclass(frozen=True, eq=False)
class Args:
    """What a program is called with: as it is given, and without missing cells."""

    given: tuple[Any, ...]
    """NaN where a cell is missing."""
    fillings: tuple[Tensor | None, ...] | None = None
    """What stands for the missing cells of each argument, by default what `filling` has for it."""

    @cached_property
    def filled(self) -> tuple[Any, ...]:
        """Each as `fill` has it: the argument itself where nothing is missing."""
        if self.fillings is None:
            return fill_all(self.given)
        return tuple(fill(a, v) for a, v in zip(self.given, self.fillings, strict=True))


def same_cells(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values, and NaN at the same places."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def filling(arg: Any) -> Tensor | None:
    """What stands for the missing cells of each column: its mean; where all are whole numbers the (lower) median.

    An observed value stays in any support. None for an argument that can have no missing cells.
    """
    if not isinstance(arg, Tensor) or not arg.is_floating_point():
        return None
    whole = ((arg == arg.round()) | arg.isnan()).all(0)
    value = torch.where(whole, arg.nanmedian(0).values, arg.nanmean(0))
    # of cells that are equal the mean need not be they, to the last digit
    low, high = arg.nan_to_num(torch.inf).amin(0), arg.nan_to_num(-torch.inf).amax(0)
    value = torch.where(low <= high, value.clamp(low, high), value)
    return value.nan_to_num(1.0)  # a column without any cell: in most supports


def fill_otherwise(arg: Any) -> Any:
    """NaN cells replaced by other values than `fill` takes: the column's least or largest, whichever is further."""
    if not has_missing(arg):
        return arg
    first = fill(arg)
    low = arg.nan_to_num(torch.inf).amin(0)
    high = arg.nan_to_num(-torch.inf).amax(0)
    value = torch.where((first - low).abs() >= (high - first).abs(), low, high)
    value = torch.where(torch.isfinite(value) & (value != first), value, first + 1)
    return torch.where(arg.isnan(), value, arg)


def has_missing(arg: Any) -> bool:
    """Whether an argument has NaN cells."""
    if not isinstance(arg, Tensor) or not arg.is_floating_point():
        return False
    return bool(arg.sum().isnan()) and bool(arg.isnan().any())  # a sum costs a tenth, and rules it out


def stands_in(value: Any, arg: Any) -> bool:
    """Whether a value is made of an argument's cells as they stand, by the memory that they share: copies are not."""
    if not isinstance(value, Tensor) or not isinstance(arg, Tensor):
        return False
    try:
        own, memory = value.untyped_storage(), arg.untyped_storage()
        return own.data_ptr() == memory.data_ptr() and own.nbytes() == memory.nbytes()
    except RuntimeError:  # tensors that wrap others have no memory of their own
        return value is arg


def head(args: tuple[Any, ...], n_rows: int) -> tuple[Any, ...]:
    """The first rows."""
    return rows_of(args, slice(n_rows)) if isinstance(args[0], Tensor) else args


def rows_of(args: tuple[Any, ...], index: Any) -> tuple[Any, ...]:
    """Some rows, or sets of them, of each argument that has as many as the first."""
    total = len(args[0])
    return tuple(a[index] if isinstance(a, Tensor) and a.ndim and len(a) == total else a for a in args)


def spread_rows(n_rows: int, n_wanted: int) -> Tensor:
    """Evenly spaced indices: of a sorted table the first rows are no sample."""
    return torch.linspace(0, n_rows - 1, min(n_rows, n_wanted)).round().long()


def changes(arg: Tensor, real: bool) -> Iterator[Tensor]:
    """Other values for an argument, first those that change most; a program may not take them all.

    Shifted with changed signs; scaled, for programs that need positive numbers; resampled. Columns of whole numbers are
    always resampled, unless all tokens are real numbers (``real``).
    """
    resample = resampled if len(arg) > 1 else shifted
    whole = torch.ones(arg.shape[1:], dtype=torch.bool, device=arg.device)
    if arg.is_floating_point():
        whole = torch.zeros_like(whole) if real else (arg == arg.round()).all(0)
    constant = whole & (arg == arg[:1]).all(0)
    ways: list[Callable[[Tensor], Tensor]] = [resample]
    # a code that is no index of a program's ends it on a GPU, here it is an error from which one goes on
    if len(arg) > 1 and bool(constant.any()) and arg.device.type == "cpu":
        ways.insert(0, lambda a: torch.where(constant, _half_away(a), resample(a)))
    if not bool(whole.all()):
        generator = torch.Generator().manual_seed(1)
        random = torch.rand(arg.shape, generator=generator, dtype=torch.float64).to(arg)
        size = arg.abs().mean(0) + arg.std(0, correction=0)
        size = torch.where(size > 0, size, torch.ones_like(size))
        for way in ways:
            yield torch.where(whole, way(arg), (4 * random - 2) * size - arg)
            yield torch.where(whole, way(arg), arg * (1 + 0.5 * random))
    for way in ways:
        yield way(arg)


def _half_away(arg: Tensor) -> Tensor:
    """Half of the cells 0, or 1 where they are: resampling leaves a column that is constant as it is."""
    generator = torch.Generator().manual_seed(2)
    away = torch.randint(2, arg.shape, generator=generator).bool()
    return torch.where(away, (arg == 0).to(arg), arg)


def cycle(arg: Any, n_rows: int) -> Any:
    """So many rows, from the first again where there are fewer."""
    if not isinstance(arg, Tensor) or not arg.ndim:
        return arg
    return arg[:n_rows] if len(arg) >= n_rows else arg[torch.arange(n_rows, device=arg.device) % len(arg)]


def cell_name(model: Callable[..., Any], arg: Tensor, position: int, index: Sequence[int | slice]) -> str:
    """A cell of an argument, or all along some axes, as one writes it: x[3], or x[:, 2]."""
    names: list[str] = []
    with suppress(TypeError, ValueError):
        parameters = inspect.signature(model).parameters.values()
        names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    unnamed = f"argument {position}" if position else "x"
    called = names[position] if position < len(names) else unnamed
    parts = [*index, *[slice(None)] * (arg.ndim - len(index))]
    while len(parts) > 1 and (arg.shape[len(parts) - 1] == 1 or isinstance(parts[-1], slice)):
        parts.pop()  # a single column has no name, nor what is meant as a whole
    return f"{called}[{', '.join(str(i) if isinstance(i, int) else ':' for i in parts)}]"
