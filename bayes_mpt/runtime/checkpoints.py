"""Files of numbers, text and tensors: written whole, read with suspicion, never executed.

A file is in the format of safetensors: eight bytes with the length of a header, the header in JSON, then the tensors'
numbers. The header's ``__metadata__`` holds ``format`` (name and version), ``kind`` (what it is a file of), ``content``
(JSON in which a tensor stands as ``{"tensor": name}``, a numpy array as ``{"array": name}``) and ``sha256``, the
checksum of the whole file with zeros in its own place.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import platform
import re
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayes_mpt.warnings import CheckpointWarning, warn

__all__ = [
    "FORMAT",
    "SUFFIX",
    "CheckpointError",
    "DamagedError",
    "decode",
    "encode",
    "make_room",
    "raw_bytes",
    "read",
    "set_aside",
    "write",
]

FORMAT = "bayes_mpt 1"
MAX_HEADER = 2**28  # bytes
ZEROS = "0" * 64
SUFFIX = ".safetensors"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class CheckpointError(OSError):
    """A checkpoint cannot be written or read, in plain words."""

    def __str__(self) -> str:
        return str(self.strerror or super().__str__())


class DamagedError(ValueError):
    """A file is not what it should be, and why."""


# ------------------------------------------------------------------------------------------------------ the format


def encode(kind: str, content: dict[str, Any]) -> bytes:
    """The bytes of a file.

    Parameters
    ----------
    kind : str
        What it is a file of.
    content : dict
        Of None, bool, int, float, str, tensors, numpy arrays of numbers, lists and dicts of these by name.
    """
    tensors: dict[str, Tensor] = {}
    tree = _taken_out(content, "", tensors)
    header: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "kind": kind,
            "sha256": ZEROS,
            "content": json.dumps(tree, separators=(",", ":")),
        }
    }
    parts, at = [], 0
    for name, tensor in tensors.items():
        raw = raw_bytes(tensor)
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + len(raw)],
        }
        parts.append(raw)
        at += len(raw)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    whole = b"".join([len(text).to_bytes(8, "little"), text, *parts])
    return whole.replace(ZEROS.encode(), hashlib.sha256(whole).hexdigest().encode(), 1)


def raw_bytes(tensor: Tensor) -> bytes:
    """A tensor's numbers one after the other, whatever its layout in memory."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg()
    apart = torch.empty(plain.numel(), dtype=plain.dtype).copy_(plain.reshape(-1))
    return bytes(apart.view(torch.uint8).numpy().data)


def decode(raw: bytes, kind: str) -> dict[str, Any]:
    """The content of a file of this kind.

    Raises
    ------
    DamagedError
        If these bytes are anything else, and what they are as far as that can be told.
    """
    if not raw:
        raise DamagedError("it is empty")
    if raw[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise DamagedError("it is a pickle, a zip or of an older version, none of which is opened")
    length = int.from_bytes(raw[:8], "little")
    if length > min(len(raw) - 8, MAX_HEADER) or raw[8:9] != b"{":
        raise DamagedError("it is not a file of ours, or cut off")
    try:
        header = json.loads(raw[8 : 8 + length])
        about = header.pop("__metadata__")
        version, found, said, text = (about[k] for k in ("format", "kind", "sha256", "content"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedError("its header cannot be read") from None
    if version != FORMAT:
        raise DamagedError(f"its format is {str(version)[:40]!r}, where {FORMAT!r} is read")
    if not isinstance(said, str) or not re.fullmatch("[0-9a-f]{64}", said):
        raise DamagedError("it has no checksum")
    blank = raw[: 8 + length].replace(said.encode(), ZEROS.encode(), 1)
    whole = hashlib.sha256(blank)
    whole.update(memoryview(raw)[8 + length :])
    if whole.hexdigest() != said:
        raise DamagedError("its checksum is wrong")
    if found != kind:
        raise DamagedError(f"it holds a {str(found)[:40]!r}, where a {kind!r} was looked for")
    try:
        tensors = {name: _tensor(raw[8 + length :], entry) for name, entry in header.items()}
        content = _put_back(json.loads(text), tensors)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError):
        raise DamagedError("its content cannot be read") from None
    if not isinstance(content, dict):
        raise DamagedError("its content cannot be read")
    return content


def _taken_out(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The tree with names in the place of tensors, which are collected."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.generic):
        return _taken_out(value.item(), path, tensors)
    if isinstance(value, Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, Tensor) else "array"
        if isinstance(value, np.ndarray) and value.dtype.kind not in "biuf":
            raise TypeError(f"{path} is of {value.dtype}, which a file does not hold")
        found = value.detach().cpu() if isinstance(value, Tensor) else _from_numpy(value)
        if found.dtype not in _CODES or found.layout != torch.strided:
            raise TypeError(f"{path} is of {found.dtype}, {found.layout}, which a file does not hold")
        tensors[path] = found
        return {kind: path}
    if isinstance(value, list | tuple):
        return [_taken_out(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
    if isinstance(value, dict) and all(type(key) is str for key in value):
        if (
            len(value) == 1
            and isinstance(next(iter(value.values())), str)
            and set(value) <= {"tensor", "array"}
        ):
            raise TypeError(f"{path}: {value} would be taken for a tensor")
        # "/" in a name is not between names
        return {
            k: _taken_out(v, f"{path}/{k.replace('~', '~0').replace('/', '~1')}", tensors)
            for k, v in value.items()
        }
    raise TypeError(f"{path} is a {type(value).__name__}, which a file does not hold")


def _from_numpy(array: NDArray[Any]) -> Tensor:
    native = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    return torch.from_numpy(native.copy()).reshape(array.shape)


def _tensor(raw: bytes, entry: Any) -> Tensor:
    """One tensor, of which the header says only what the numbers bear out."""
    dtype, shape, (start, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    sizes = [*shape, start, end]
    if not all(type(n) is int and 0 <= n <= 2**62 for n in sizes) or not start <= end <= len(raw):
        raise ValueError("sizes")
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError("sizes")
    if start == end:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw[start:end]), dtype=torch.uint8).view(dtype).reshape(shape).clone()


def _put_back(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, dict):
        if len(tree) == 1:
            ((kind, name),) = tree.items()
            if isinstance(name, str) and kind in ("tensor", "array"):
                return tensors[name] if kind == "tensor" else tensors[name].numpy()
        return {k: _put_back(v, tensors) for k, v in tree.items()}
    return [_put_back(v, tensors) for v in tree] if isinstance(tree, list) else tree


# ------------------------------------------------------------------------------------------------------- the disk


def write(file: Path, kind: str, content: dict[str, Any], *, once: bool = False) -> bool:
    """Write a file whole or not at all; what was there before stays until the new one is on the disk.

    Parameters
    ----------
    file : Path
        Its folder is made.
    kind, content
        As in `encode`.
    once : bool, default=False
        Leave a file that is there as it is.

    Returns
    -------
    bool
        Whether it was written.

    Raises
    ------
    CheckpointError
        If the disk is full, the folder read-only and the like. Nothing is left behind.
    """
    raw = encode(kind, content)
    part = _part_of(file)
    try:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "xb") as stream:
                stream.write(raw)
                stream.flush()
                os.fsync(stream.fileno())
            written = _put(part, file, once)
        finally:
            with suppress(OSError):
                part.unlink()
        _sync(file.parent)
    except OSError as error:
        raise _unwritten(file.name, file.parent, error) from error
    return written


def make_room(folder: Path, name: str = "") -> None:
    """Make the folder, see that it can be written to, and remove what killed processes left of files of this name.

    Raises
    ------
    CheckpointError
        If nothing can be written there.
    """
    part = _part_of(folder / (name or "try"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(b"")
        finally:
            with suppress(OSError):
                part.unlink()
        for left in folder.glob(f".{glob.escape(name)}*.part"):
            found = re.fullmatch(rf"\..*\.{re.escape(_host())}-(\d+)\.[0-9a-f]+\.part", left.name)
            if found and not _is_running(int(found[1])):
                left.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritten(name or "files", folder, error) from error


def _part_of(file: Path) -> Path:
    """Where it is written before it is whole: a name of this process's own, on this machine."""
    return file.with_name(f".{file.name}.{_host()}-{os.getpid()}.{secrets.token_hex(4)}.part")


def _host() -> str:
    return re.sub("[^A-Za-z0-9]", "_", platform.node())


def _is_running(process: int) -> bool:
    if os.name != "posix":
        return True  # where a signal of 0 would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's
    return True


def _unwritten(name: str, folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        error.errno,
        f"checkpoint {name} cannot be written into the folder {folder}: {error.strerror or error}. Make room or give "
        "another folder; what was finished before is kept",
    )


def _put(part: Path, file: Path, once: bool) -> bool:
    if not once:
        os.replace(part, file)
        return True
    try:
        os.link(part, file)
    except FileExistsError:
        return False
    except OSError:  # a disk without links
        if file.exists():
            return False
        os.replace(part, file)
    return True


def _sync(folder: Path) -> None:
    """Have the disk keep the folder's names too, where folders can be opened."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(
    file: Path, kind: str, made: Callable[[dict[str, Any]], Any] = lambda content: content
) -> Any | None:
    """What a file holds; None where there is none, or none that can be used: that is set aside with a warning.

    Parameters
    ----------
    file : Path
    kind : str
        As in `encode`.
    made : callable, optional
        Makes of the content what is returned; a ValueError, TypeError, KeyError or AttributeError of it means that the
        content is not what it should be.
    """
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise DamagedError("it is no file")  # a pipe would wait for ever
        return made(decode(file.read_bytes(), kind))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(
            error.errno, f"checkpoint {file} cannot be read: {error.strerror or error}"
        ) from error
    except DamagedError as error:
        set_aside(file, str(error))
    except (ValueError, TypeError, KeyError, AttributeError):
        set_aside(file, "its content is not what it should be")
    return None


def set_aside(file: Path, why: str) -> None:
    """Give a file another name, under which nothing looks for it, and say so."""
    aside = file.with_name(f"{file.name}.aside")
    n = 1
    while aside.exists() or aside.is_symlink():
        n += 1
        aside = file.with_name(f"{file.name}.aside{n}")
    try:
        file.rename(aside)
    except FileNotFoundError:
        return  # another search was faster
    except OSError as error:
        raise CheckpointError(
            error.errno,
            f"checkpoint {file} is of no use ({why}) and cannot be renamed: {error.strerror or error}",
        ) from error
    warn(
        f"checkpoint {file} is of no use: {why}. It is set aside as {aside.name}, and what it stood for is computed "
        "anew",
        CheckpointWarning,
    )
