"""A digest of what was asked, by value: equal in every process that asks for the same, on machines of one kind.

Neither addresses nor hash seeds, the layout of memory or what is shared with what go into it. What lies in an installed
package is known by its name and the package's version; the user's own code by what it does (bytecode), what it refers
to and what it holds. What has no value that could be read is refused, never passed over.
"""

from __future__ import annotations

import copyreg
import dis
import enum
import functools
import hashlib
import inspect
import re
import types
import weakref
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse
import torch
from sklearn.base import BaseEstimator

from bayes_mpt.runtime.checkpoints import raw_bytes
from bayes_mpt.runtime.versions import here, is_installed, version

__all__ = ["CannotDigest", "digest_of", "in_words"]

BLOCK = 2**22  # numbers of an array that are copied at a time
WORDS = 120  # letters of a value in an error
MAX_DEPTH = 200  # levels of values inside values

# Of a class, what Python makes of the rest; of an estimator, who watches it.
_OF_THE_CLASS = {
    "__dict__",
    "__weakref__",
    "__doc__",
    "__module__",
    "__annotations__",
    "__annotate__",
    "__annotate_func__",
    "__annotations_cache__",
    "__firstlineno__",
    "__static_attributes__",
    "__abstractmethods__",
    "__dataclass_fields__",
    "_abc_impl",
}
_WATCHERS = {"_skl_callbacks", "_parent_callback_ctx", "_callback_fit_ctx"}
_DESCRIPTORS = (
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)


class CannotDigest(TypeError):
    """A value that cannot be told from others: its ``path`` and what it is."""

    def __init__(self, path: str, what: str):
        super().__init__(path, what)
        self.path, self.what = path, what

    def __str__(self) -> str:
        return f"{self.path or 'the value'} ({self.what}) has no value that can be compared between processes"


def digest_of(value: Any, name: str = "", *, initial: bool = True) -> str:
    """The digest of a value, 64 hexadecimal digits.

    Parameters
    ----------
    value : object
        Numbers, text, containers, arrays, tables, tensors, networks, kernels, estimators, functions with what they
        refer to and hold, classes and objects.
    name : str
        What it is called in errors.
    initial : bool, default=True
        Whether the values of networks' parameters count that a training would move, or their shapes alone.

    Raises
    ------
    CannotDigest
        If something in it has no value: a lock, an open file, a generator. It is named.

    Examples
    --------
    >>> digest_of({"a", "b"}) == digest_of({"b", "a"}), digest_of(1) == digest_of(1.0)
    (True, False)
    >>> one, two = (lambda x, k=k: x + k for k in (1, 2))
    >>> digest_of(one) == digest_of(two)
    False
    """
    about = ["bayes_mpt", *here(), str(torch.get_default_dtype())]
    return hashlib.sha256("\n".join(about).encode() + _Walk(initial).of(value, name)).hexdigest()


def in_words(value: Any) -> str:
    """A value in one short line, without its address."""
    said = getattr(value, "__qualname__", None)
    text = said if isinstance(said, str) else " ".join(repr(value).split())
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    return text if len(text) <= WORDS else f"{text[: WORDS - 3]}..."


def _named(module: str, name: str) -> bytes:
    return _hashed("named", [module, name, version(module.partition(".")[0])])


def _hashed(kind: str, parts: Iterable[bytes | str]) -> bytes:
    """Of parts, each with its length, so that none runs into the next."""
    h = hashlib.sha256(kind.encode() + b"\0")
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        h.update(len(raw).to_bytes(8, "little") + raw)
    return h.digest()


class _Walk:
    """One digest under way: functions and classes are met once, and cycles end."""

    def __init__(self, initial: bool) -> None:
        self.initial = initial
        self.met: dict[int, int] = {}  # code by address: its number in the order of meeting
        self.inside: list[int] = []  # addresses of the values that this one is in
        self.kept: list[Any] = []  # so that no address is given twice
        self.numbers, self.code = _Numbers(self), _Code(self)

    def of(self, value: Any, path: str) -> bytes:
        """Digest of a value called ``path``."""
        found = _plain(value)
        if found is not None:
            return found
        if id(value) in self.inside:
            return _hashed("again", [str(len(self.inside) - self.inside.index(id(value)))])
        if len(self.inside) > MAX_DEPTH:
            raise CannotDigest(path, f"more than {MAX_DEPTH} values inside each other")
        self.inside.append(id(value))
        self.kept.append(value)
        try:
            return self._of(value, path)
        finally:
            self.inside.pop()

    def _of(self, value: Any, path: str) -> bytes:
        """By its kind; the kinds are tried in this order."""
        for kind in (self.numbers.of, self._of_container, self.code.of, self._of_wrapper, self._of_state):
            found = kind(value, path)
            if found is not None:
                return found
        return self._object(value, path)

    def _of_container(self, value: Any, path: str) -> bytes | None:
        """Lists, sets and mappings; None of other values."""
        if isinstance(value, list | tuple) and type(value) in (list, tuple, torch.Size):
            return _hashed(type(value).__name__, [self.of(v, f"{path}[{i}]") for i, v in enumerate(value)])
        if isinstance(
            value, set | frozenset
        ):  # also one's own kind, whose copies would be told in some order
            parts = [] if type(value) in (set, frozenset) else [self.of(type(value), path)]
            return _hashed("set", [*parts, *sorted(self._apart([(v, path)]) for v in value)])
        if type(value) is dict or isinstance(value, types.MappingProxyType):
            return self._mapping(value, path)
        return None

    def _of_wrapper(self, value: Any, path: str) -> bytes | None:
        """What is made of functions, or holds a value; None of other values."""
        if isinstance(value, staticmethod | classmethod):
            return _hashed(type(value).__name__, [self.of(value.__func__, path)])
        if type(value) is property:
            return _hashed("property", [self.of(f, path) for f in (value.fget, value.fset, value.fdel)])
        if isinstance(value, functools.partial):
            held = (value.func, value.args, value.keywords)
            return _hashed("partial", [self.of(part, path) for part in held])
        if isinstance(value, functools.cached_property):  # with a lock
            return _hashed("cached property", [self.of(value.func, path)])
        if isinstance(value, functools._lru_cache_wrapper):
            return _hashed("cached", [self.of(value.__wrapped__, path)])
        if isinstance(value, types.CellType):
            try:
                return _hashed("cell", [self.of(value.cell_contents, path)])
            except ValueError:
                return _hashed("cell", [])
        if isinstance(value, weakref.ref):
            return _hashed("weak", [self.of(value(), path)])
        if isinstance(value, enum.Enum):
            return _hashed("enum", [self.of(type(value), path), value.name])
        return None

    def _of_state(self, value: Any, path: str) -> bytes | None:
        """Generators, networks and estimators; None of other values."""
        if isinstance(value, np.random.RandomState):
            return _hashed("RandomState", [self.of(value.get_state(), path)])
        if isinstance(value, np.random.Generator):
            return _hashed("Generator", [self.of(value.bit_generator.state, path)])
        if isinstance(value, torch.Generator):
            return _hashed("torch.Generator", [self.of(value.get_state(), path)])
        if isinstance(value, np.ufunc) and value.__name__.isidentifier():
            return _hashed("ufunc", [value.__name__, str(value.types), str(value.identity)])
        if isinstance(value, torch.jit.ScriptModule | torch.jit.ScriptFunction):
            raise CannotDigest(path, f"a {type(value).__name__}")
        if isinstance(value, torch.nn.Module):
            return self._network(value, path)
        if isinstance(value, BaseEstimator):
            state = {k: v for k, v in vars(value).items() if k not in _WATCHERS}
            kind = self.of(type(value), path)
            return _hashed("estimator", [kind, self.attributes(state, path, "__" if path else "")])
        return None

    def _apart(self, values: list[tuple[Any, str]]) -> bytes:
        """Of values in an order that means nothing: what is met in one is not known in the next."""
        inner = _Walk(self.initial)
        inner.met, inner.inside, inner.kept = dict(self.met), list(self.inside), self.kept
        return b"".join(inner.of(v, path) for v, path in values)

    def _mapping(self, value: Any, path: str) -> bytes:
        if all(type(key) is str for key in value):
            return self.attributes(value, path, None)
        pairs = [self._apart([(key, path), (v, f"{path}[{key!r:.60}]")]) for key, v in value.items()]
        return _hashed("dict", sorted(pairs))

    def attributes(self, state: Any, path: str, sep: str | None = ".") -> bytes:
        """By name; ``sep`` None: in brackets."""
        parts: list[bytes | str] = []
        for name in sorted(state):
            parts += [
                name,
                self.of(state[name], f"{path}[{name!r}]" if sep is None else f"{path}{sep}{name}"),
            ]
        return _hashed("dict", parts)

    def _network(self, value: torch.nn.Module, path: str) -> bytes:
        state = dict(vars(value))
        parts = [self.of(type(value), path)]
        for name in ("_parameters", "_buffers"):
            parts.append(self.attributes(state.pop(name, {}), path))
        # the order of its parts means something: they may be gone through one after the other
        for name, part in state.pop("_modules", {}).items():
            parts.append(_hashed(name, [self.of(part, f"{path}.{name}")]))
        # torch numbers the hooks of a process one after the other
        state = {
            k: list(v.values()) if "_hooks" in k and isinstance(v, dict) else v for k, v in state.items()
        }
        return _hashed("network", [*parts, self.attributes(state, path)])

    def _object(self, value: Any, path: str) -> bytes:
        """By what a copy of it would be made of."""
        kind = type(value)
        if kind.__name__ == "OpOverload" or isinstance(value, torch.dtype | torch.device):
            return _hashed(kind.__name__, [str(value)])
        try:
            reduced = copyreg.dispatch_table.get(kind)
            made = value.__reduce_ex__(4) if reduced is None else reduced(value)
        except Exception:
            raise CannotDigest(path, f"a {kind.__module__}.{kind.__qualname__}") from None
        if isinstance(made, str):
            return _named(getattr(value, "__module__", None) or kind.__module__, made)
        make, args, state, items, pairs = (*made, None, None, None)[:5]
        parts = [self.of(kind, path), self.of(make, path), self.of(args, path)]
        if isinstance(state, dict) and all(type(key) is str for key in state):
            parts.append(self.attributes(state, path))
        else:
            parts.append(self.of(state, path))
        parts.append(self.of(None if items is None else list(items), path))
        parts.append(self.of(None if pairs is None else list(pairs), path))
        return _hashed("object", parts)


class _Numbers(NamedTuple):
    """Digests of tensors, arrays and tables."""

    walk: _Walk

    def of(self, value: Any, path: str) -> bytes | None:
        """Tensors, arrays and tables; None of other values."""
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if isinstance(value, np.ndarray):
            return self._array(value, path)
        if isinstance(value, pd.DataFrame | pd.Series | pd.Index):
            return self._table(value, path)
        if scipy.sparse.issparse(value):
            rows = value.tocsr(copy=True)
            rows.sum_duplicates()
            where = (rows.indices.astype(np.int64), rows.indptr.astype(np.int64))
            about = (value.format, rows.shape, *where, rows.data)
            return _hashed("sparse", [self.walk.of(part, path) for part in about])
        return None

    def _tensor(self, value: torch.Tensor, path: str) -> bytes:
        if type(value) not in (torch.Tensor, torch.nn.Parameter) and not isinstance(
            value, torch.nn.Parameter
        ):
            raise CannotDigest(path, f"a {type(value).__name__}")
        about = [str(value.dtype), repr(tuple(value.shape)), value.device.type, str(value.requires_grad)]
        plain = value.detach()
        if value.layout != torch.strided:
            if value.layout != torch.sparse_coo:
                plain = plain.to_sparse_coo()
            plain = plain.coalesce()
            parts = [self.walk.of(plain.indices(), path), self.walk.of(plain.values(), path)]
            return _hashed("sparse tensor", [*about, *parts])
        moved = isinstance(value, torch.nn.Parameter) and value.requires_grad
        if value.device.type == "meta" or (moved and not self.walk.initial):
            return _hashed("tensor", about)
        try:
            raw = raw_bytes(plain)
        except (RuntimeError, NotImplementedError):
            raise CannotDigest(path, f"a tensor of {value.dtype}") from None
        return _hashed("tensor", [*about, hashlib.sha256(raw).digest()])

    def _array(self, value: np.ndarray[Any, Any], path: str) -> bytes:
        if isinstance(value, np.ma.MaskedArray):
            mask = np.ma.getmaskarray(value)
            shown = np.where(mask, np.zeros((), value.dtype), value.data)
            return _hashed("masked", [self.walk.of(shown, path), self.walk.of(mask, path)])
        about = [repr(value.shape), value.dtype.str if value.dtype.names is None else repr(value.dtype.descr)]
        if value.dtype.hasobject:
            return _hashed("objects", [*about, *(self.walk.of(v, path) for v in value.ravel().tolist())])
        h = hashlib.sha256()
        step = max(1, BLOCK * max(1, len(value)) // max(1, value.size)) if value.ndim else 1
        for start in range(0, len(value), step) if value.ndim else [0]:
            part = value[start : start + step] if value.ndim else value
            h.update(np.ascontiguousarray(part).tobytes())
        return _hashed("array", [*about, h.digest()])

    def _table(self, value: Any, path: str) -> bytes:
        if isinstance(value, pd.DataFrame):
            columns = [value.iloc[:, i].array for i in range(value.shape[1])]
            parts = [
                self.walk.of(value.columns, f"{path}.columns"),
                self.walk.of(value.index, f"{path}.index"),
            ]
        elif isinstance(value, pd.Series):
            columns, parts = [value.array], [self.walk.of(value.index, path), self.walk.of(value.name, path)]
        elif isinstance(value, pd.MultiIndex):
            return _hashed(
                "MultiIndex", [self.walk.of(value.tolist(), path), self.walk.of(list(value.names), path)]
            )
        else:
            columns, parts = [value.array], [self.walk.of(value.name, path)]
        for column in columns:
            cells = np.asarray(column)
            levels = getattr(column.dtype, "categories", None)
            about: list[bytes | str] = []
            if levels is not None:
                about = [self.walk.of(np.asarray(levels), path), str(column.dtype.ordered)]
            parts.append(_hashed("column", [str(column.dtype), *about, self.walk.of(cells, path)]))
        return _hashed("table", parts)


class _Code(NamedTuple):
    """Digests of modules, classes, functions and methods."""

    walk: _Walk

    def of(self, value: Any, path: str) -> bytes | None:
        """Modules, classes, functions and methods; None of other values."""
        if isinstance(value, types.ModuleType):
            return self._module(value, path)
        if isinstance(value, type):
            return self._once(value, path, self._class)
        if isinstance(value, types.FunctionType):
            return self._once(value, path, self._function)
        if isinstance(value, types.CodeType):
            return self._code(value, path)
        if isinstance(value, types.MethodType):
            return _hashed("method", [self.walk.of(value.__func__, path), self.walk.of(value.__self__, path)])
        if isinstance(value, types.BuiltinFunctionType | types.MethodWrapperType):
            return self._builtin(value, path)
        if isinstance(value, _DESCRIPTORS):
            return _hashed("descriptor", [self.walk.of(value.__objclass__, path), value.__name__])
        return None

    def _once(self, value: Any, path: str, read: Any) -> bytes:
        """Code may refer to itself, also by way of others."""
        if id(value) in self.walk.met:
            return _hashed("met", [str(self.walk.met[id(value)])])
        self.walk.met[id(value)] = len(self.walk.met)
        found: bytes = read(value, path)
        return found

    def _function(self, value: types.FunctionType, path: str) -> bytes:
        module = value.__globals__.get("__name__")
        parts: list[bytes | str] = [self._code(value.__code__, path)]
        parts += [
            self.walk.of(value.__defaults__, f"{path}, a default"),
            self.walk.of(value.__kwdefaults__, path),
        ]
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            parts += [name, self.walk.of(cell, f"{path}.{name}")]
        if is_installed(module):
            parts.append(_named(str(module), value.__code__.co_qualname))
        else:
            for name in sorted(_globals_of(value.__code__)):
                if name in value.__globals__:
                    parts += [name, self.walk.of(value.__globals__[name], f"{path}.{name}")]
        state = {k: v for k, v in vars(value).items() if k != "__wrapped__" or not value.__closure__}
        return _hashed("function", [*parts, self.walk.attributes(state, path)])

    def _code(self, code: types.CodeType, path: str) -> bytes:
        consts = code.co_consts
        if consts and isinstance(consts[0], str) and code.co_flags & inspect.CO_NEWLOCALS:
            consts = (None, *consts[1:]) if _docstring(code) else consts
        counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        exceptions = getattr(code, "co_exceptiontable", b"")
        parts = [self.walk.of(part, path) for part in (counts, names, consts)]
        return _hashed("code", [code.co_code, exceptions, *parts])

    def _class(self, value: type, path: str) -> bytes:
        module = value.__module__
        if is_installed(module) and "<locals>" not in value.__qualname__:
            own = [b for b in value.__bases__ if any(not is_installed(c.__module__) for c in b.__mro__)]
            return _hashed(
                "class", [_named(module, value.__qualname__), *(self.walk.of(b, path) for b in own)]
            )
        state = {k: v for k, v in vars(value).items() if k not in _OF_THE_CLASS}
        slots = {k for k, v in state.items() if isinstance(v, types.MemberDescriptorType)}
        state = {k: v for k, v in state.items() if k not in slots}
        parts = [
            self.walk.of(value.__bases__, path),
            self.walk.of(type(value), path),
            self.walk.attributes(state, path),
        ]
        return _hashed("own class", [value.__qualname__, *parts])

    def _module(self, value: types.ModuleType, path: str) -> bytes:
        name = value.__name__
        if is_installed(name):
            return _named(name, "")
        if id(value) in self.walk.met:
            return _hashed("met", [str(self.walk.met[id(value)])])
        self.walk.met[id(value)] = len(self.walk.met)
        file = getattr(value, "__file__", None)
        if name == "__main__" or not isinstance(file, str) or not Path(file).is_file():
            raise CannotDigest(path, f"module {name!r}, which has no file of its own")
        # what its functions do stands in its file; what they take from elsewhere does not
        others = {k: v for k, v in vars(value).items() if _of_others(v, name)}
        return _hashed("module", [name, Path(file).read_bytes(), self.walk.attributes(others, path)])

    def _builtin(self, value: Any, path: str) -> bytes:
        owner = value.__self__
        if owner is None or isinstance(owner, types.ModuleType):
            module = owner.__name__ if owner is not None else value.__module__ or ""
            return _named(module, value.__qualname__)
        return _hashed("builtin method", [value.__name__, self.walk.of(owner, path)])


def _plain(value: Any) -> bytes | None:
    """Of what cannot hold anything else; None of all other values."""
    kind = type(value)
    if value is None or value is Ellipsis or value is NotImplemented:
        return _hashed("one", [repr(value)])
    if kind in (bool, int):
        return _hashed(kind.__name__, [hex(value)])
    if kind is float:
        return _hashed("float", [value.hex()])
    if kind is complex:
        return _hashed("complex", [value.real.hex(), value.imag.hex()])
    if kind is str:
        return _hashed("str", [value])
    if kind in (bytes, bytearray):
        return _hashed(kind.__name__, [bytes(value)])
    if isinstance(value, np.generic) and not isinstance(value, np.object_ | np.void):
        return _hashed("scalar", [value.dtype.str, value.tobytes()])
    if isinstance(value, PurePath):
        return _hashed("path", [value.as_posix()])
    if isinstance(value, np.dtype):
        return _hashed("dtype", [value.str if value.names is None else repr(value.descr)])
    return None


def _globals_of(code: types.CodeType) -> set[str]:
    """Names that a function, and those inside it, look up outside all functions."""
    found = {
        str(step.argval) for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    return found.union(*(_globals_of(c) for c in code.co_consts if isinstance(c, types.CodeType)))


def _docstring(code: types.CodeType) -> bool:
    """Whether the first constant of a function, a text, is what it says of itself: no instruction takes it."""
    return all(not (s.opname == "LOAD_CONST" and s.arg == 0) for s in dis.get_instructions(code))


def _of_others(value: Any, module: str) -> bool:
    """Whether a name of a module stands for code of another one that is no package."""
    if isinstance(value, types.ModuleType):
        return not is_installed(value.__name__)
    if isinstance(value, types.FunctionType | type):
        return value.__module__ != module and not is_installed(value.__module__)
    return False
