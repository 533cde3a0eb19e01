"""What users pass as X and y, made ready for scikit-learn's checks; what is no table of numbers is refused in words.

Masked cells of `numpy.ma` become NaN, which is missing here; tensors leave their graph and their device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import date, timedelta
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.sparse import issparse
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

__all__ = ["like_table", "read_numbers", "read_table", "tensor_of", "unmasked", "wanted", "widths_of"]

_T = TypeVar("_T")

NO_NUMBERS = "OSUMmV"  # kinds of numpy arrays whose cells need not be numbers


def wanted(kind: type[_T], got: Any, words: str, error: type[Exception] = TypeError) -> _T:
    """What was passed, where it is of the kind that is wanted.

    Parameters
    ----------
    kind : type
        That is wanted.
    got : object
        What was passed.
    words : str
        What is wanted, and what to do, of which the refusal is made.
    error : type, default=TypeError
        Of the refusal.

    Examples
    --------
    >>> wanted(int, "3", "rows must be an integer")
    Traceback (most recent call last):
        ...
    TypeError: rows must be an integer, got '3'
    """
    if isinstance(got, kind):
        return got
    raise error(f"{words}, got {getattr(got, '__name__', None) or repr(got)}")


def unmasked(a: Any) -> Any:
    """Masked cells as NaN; what has no mask as it is.

    Examples
    --------
    >>> unmasked(np.ma.masked_array([1, 2], [False, True]))
    array([ 1., nan])
    """
    if isinstance(a, list | tuple) and any(isinstance(row, np.ma.MaskedArray) for row in a):
        a = np.ma.array(a)
    if not isinstance(a, np.ma.MaskedArray):
        return a
    if a.dtype.kind in "biu":  # which have no NaN
        a = a.astype(np.float64)
    elif a.dtype.kind not in "fc":
        a = a.astype(object)
    return np.asarray(a.filled(np.nan))


def tensor_of(array: NDArray[Any]) -> Tensor:
    """A tensor that is not written into: a view of the array, where torch has one without a warning, else a copy.

    It has none of an array that is read backwards, and warns of one that is read-only, as pandas gives them.

    Examples
    --------
    >>> tensor_of(np.arange(3.0)[::-1])
    tensor([2., 1., 0.], dtype=torch.float64)
    """
    fine = array.flags.writeable and min(array.strides, default=0) >= 0
    return torch.from_numpy(array if fine else array.copy())


def widths_of(X: Any) -> tuple[int, ...] | None:
    """Columns of each of several tables of the same rows, a tuple; None of one table.

    Raises
    ------
    ValueError
        If one of them is no table (N, T), or they have different numbers of rows.

    Examples
    --------
    >>> widths_of((np.zeros((5, 1)), np.zeros((5, 3)))), widths_of([[1.0, 2.0], [3.0, 4.0]])
    ((1, 3), None)
    """
    if not isinstance(X, tuple) or len(X) < 2 or not any(hasattr(a, "ndim") and a.ndim for a in X):
        return None
    shapes = [np.shape(a) for a in X]
    if any(len(s) != 2 for s in shapes) or len({s[0] for s in shapes}) > 1:
        raise ValueError(
            f"X is a tuple of arrays of shapes {shapes}: give several inputs of a program as tables of the same rows, "
            "a single column as a[:, None], which the program reads as x[:, 0]"
        )
    return tuple(s[1] for s in shapes)


def like_table(X: Any, cells: NDArray[Any]) -> Any:
    """Cells (N, T) as the table X came: of a DataFrame, of pandas or polars, with its index and columns; else an array.

    Examples
    --------
    >>> table = pd.DataFrame({"a": [1, 2], "b": [None, 0.5]}, index=["first", "second"])
    >>> like_table(table, np.array([[1.0, 0.25], [2.0, 0.5]]))
              a     b
    first   1.0  0.25
    second  2.0  0.50
    """
    if isinstance(X, pd.DataFrame):
        return pd.DataFrame(cells, index=X.index, columns=X.columns)
    if _is_of_polars(X):
        return type(X)(dict(zip(X.columns, cells.T, strict=True)))
    return cells


def read_table(X: Any) -> Any:
    """A table X for scikit-learn's own checks; several of a tuple side by side.

    Raises
    ------
    TypeError
        If it is no table, such as a DataLoader.
    ValueError
        If a column holds text, dates or infinities, or two have one name; the column is named.
    """
    if type(X) is np.ndarray and X.ndim == 2 and X.dtype.kind == "f":
        _refuse_infinite(X)
        return X
    if widths_of(X) is not None:
        return np.hstack([np.asarray(read_table(a)) for a in X])
    X = _array(X, "X")
    if isinstance(X, list | tuple | np.ndarray) and np.ndim(X) == 1 and not any(np.ndim(a) for a in X):
        raise ValueError(
            f"Expected 2D array, a table (N, T), got 1D array of {len(X)} numbers instead. Reshape your data: one "
            "column is X[:, None], array.reshape(-1, 1), which the program reads as x[:, 0]; one row X.reshape(1, -1)"
        )
    if isinstance(X, list | tuple):
        with suppress(ValueError):  # rows of different lengths: scikit-learn says so
            X = np.asarray(X)
    if isinstance(X, pd.DataFrame):
        if not X.columns.is_unique:
            twice = X.columns[X.columns.duplicated()][0]
            raise ValueError(
                f"two columns of X have the name {twice!r}: give each its own name (X.columns = ...), or drop one"
            )
        columns: Iterable[tuple[Any, Any]] = (
            (name, X.iloc[:, j].to_numpy(dtype=object))
            for j, (name, dtype) in enumerate(X.dtypes.items())
            if not pd.api.types.is_numeric_dtype(dtype)
        )
    elif _is_of_polars(X):
        columns = (
            (name, _objects(X[name].to_list()))
            for name in X.columns
            if not (X[name].dtype.is_numeric() or str(X[name].dtype) == "Boolean")
        )
    elif isinstance(X, np.ndarray) and X.ndim == 2 and X.dtype.kind in NO_NUMBERS:
        columns = enumerate(X.T)
    else:
        _refuse_infinite(X)
        return X
    for name, column in columns:
        _refuse_text(
            column,
            f"column {name!r} of X",
            "encode the column first, by scikit-learn's OrdinalEncoder (one column of codes) or OneHotEncoder (a "
            "column of 0 and 1 for each value), or drop it",
        )
    # what pandas calls missing in a column of Python objects
    objects = isinstance(X, pd.DataFrame) and any(dtype.kind == "O" for dtype in X.dtypes)
    X = X.where(X.notna(), np.nan) if objects else X
    _refuse_infinite(X)
    return X


def _is_of_polars(X: Any) -> bool:
    """Whether a table is a DataFrame of polars, which need not be installed."""
    return type(X).__module__.split(".")[0] == "polars" and hasattr(X, "to_numpy")


def _objects(cells: list[Any]) -> NDArray[Any]:
    """An array of these objects, lists among them as they are."""
    found = np.empty(len(cells), dtype=object)
    found[:] = cells
    return found


def _refuse_infinite(X: Any) -> None:
    if isinstance(X, pd.DataFrame):
        numbers = X.select_dtypes("float")
        names, cells = list(numbers.columns), numbers.to_numpy(dtype=np.float64, na_value=np.nan)
    elif isinstance(X, np.ndarray) and X.ndim == 2 and X.dtype.kind == "f" and not isinstance(X, np.memmap):
        names, cells = list(range(X.shape[1])), X
    else:
        return
    with np.errstate(all="ignore"):
        if math.isfinite(cells.sum()):  # in one pass that keeps nothing
            return
    infinite = np.isinf(cells).any(0)
    if infinite.any():
        columns = ", ".join(repr(n) for n, i in zip(names, infinite, strict=True) if i)
        raise ValueError(
            f"Input X contains infinity in column {columns}: give the cells as NaN, which is missing, or drop them"
        )


def read_numbers(y: Any, n_rows: int) -> NDArray[Any]:
    """A second argument of a program, as an array of numbers for each of the rows of X.

    Raises
    ------
    TypeError
        If it is no array, such as a DataLoader.
    ValueError
        If it holds text, dates, infinities or complex numbers, or has another number of rows.
    """
    y = _array(y, "y")
    if isinstance(y, pd.Series | pd.DataFrame):
        missing = bool(np.asarray(y.isna()).any())
        numeric = all(
            map(pd.api.types.is_numeric_dtype, y.dtypes if isinstance(y, pd.DataFrame) else [y.dtype])
        )
        y = y.to_numpy(dtype=np.float64, na_value=np.nan) if missing and numeric else y.to_numpy()
    y = np.asarray(y)
    if y.dtype.kind == "c":
        raise ValueError("y holds complex numbers: give their real and imaginary parts as two columns")
    if y.dtype.kind in NO_NUMBERS:
        _refuse_text(y.ravel(), "y", "encode it first, by scikit-learn's LabelEncoder (codes 0, 1, ...)")
        y = np.where(pd.isna(y), np.nan, y).astype(np.float64)
    if not y.ndim or len(y) != n_rows:
        got = len(y) if y.ndim else "a single number"
        raise ValueError(f"y must have a row for each of the {n_rows} rows of X, got {got}")
    if y.dtype.kind == "f" and np.isinf(y).any():
        raise ValueError("y contains infinity")
    return _in_native_type(y)


def _in_native_type(y: NDArray[Any]) -> NDArray[Any]:
    """Numbers of a kind that torch computes with: whole ones in 64 bits, as what is made of a few bits wraps around."""
    if y.dtype.kind in "iu":
        wide = y.dtype.kind == "u" and y.size > 0 and int(y.max()) > np.iinfo(np.int64).max
        return y.astype(np.float64 if wide else np.int64, copy=False)
    if y.dtype.kind == "f" and (y.dtype.itemsize > 8 or not y.dtype.isnative):
        return y.astype(np.float64)
    return y


def _array(a: Any, name: str) -> Any:
    """Without mask, graph and device."""
    if issparse(a):
        return a  # scikit-learn refuses it
    if isinstance(a, np.ndarray) and a.dtype.names is not None:
        raise ValueError(
            f"{name} is a structured array with the fields {', '.join(a.dtype.names)}: pass pandas.DataFrame({name}), "
            "whose columns are these, or a plain array"
        )
    if isinstance(a, Mapping) and all(np.ndim(column) == 1 for column in a.values()):
        raise TypeError(
            f"{name} must be an array with all rows, got {type(a).__name__}: pass pandas.DataFrame({name})"
        )
    if hasattr(a, "collect") and hasattr(a, "collect_schema"):
        raise TypeError(
            f"{name} is a query that has not been run ({type(a).__name__}): pass {name}.collect()"
        )
    if isinstance(a, DataLoader | Dataset | Iterator | Mapping):
        raise TypeError(
            f"{name} must be an array with all rows, got {type(a).__name__}: stack its rows into one array, or map "
            "them from a file (numpy.memmap). BayesMPT makes minibatches itself (batch_size=...)"
        )
    if isinstance(a, Tensor):
        if a.layout != torch.strided:
            raise TypeError(f"{name} is a sparse tensor, and dense data are required: pass {name}.to_dense()")
        a = a.detach().cpu()
        return (a.float() if a.dtype in (torch.bfloat16, torch.float16) else a).numpy()
    return unmasked(a)


def _refuse_text(cells: Any, what: str, remedy: str) -> None:
    """Cells that are neither numbers nor missing: the first of them is shown."""
    dates = cells.dtype.kind in "Mm"  # which become numbers without a word
    if not dates:
        with suppress(TypeError, ValueError):
            cells.astype(np.float64)
            return
    for cell in cells:
        if cell is None or cell is pd.NA or cell is pd.NaT:
            continue
        cell = cell.item() if isinstance(cell, np.generic) and not dates else cell
        shown = repr(cell)
        if dates or isinstance(cell, date | timedelta):
            raise ValueError(f"{what} holds the date {shown}: make it a number, such as days since the first")
        try:
            float(cell)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{what} holds {shown}, which is no number ({error}): {remedy}") from None
