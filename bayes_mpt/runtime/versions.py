"""Which versions a result is of: those of the packages that compute, and of our own source.

What lies in an installed package does not change under its version.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import site
import sys
import sysconfig
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["here", "is_installed", "version"]

PACKAGES = ("torch", "numpy", "scipy", "pyro-ppl", "gpytorch", "linear-operator", "scikit-learn")


@functools.cache
def here() -> tuple[str, ...]:
    """What all values are of: Python, whose bytecode functions are, and what computes."""
    found = [".".join(map(str, sys.version_info[:2])), platform.machine(), version("bayes_mpt")]
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found.append(f"{package} {metadata.version(package).partition('+')[0]}")
    return tuple(found)


@functools.cache
def version(package: str) -> str:
    """Of a top-level package; our own source counts too, which may be under way between two versions."""
    if package == "bayes_mpt":
        h = hashlib.sha256()
        root = Path(__file__).parents[1]
        for file in sorted(root.rglob("*.py")):
            h.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
        return h.hexdigest()
    if package in sys.stdlib_module_names:
        return ".".join(map(str, sys.version_info[:2]))
    found = getattr(sys.modules.get(package), "__version__", None)
    if not isinstance(found, str):
        found = ""
        with suppress(metadata.PackageNotFoundError):
            found = metadata.version(package)
    return found.partition("+")[0]


@functools.cache
def _places() -> tuple[Path, ...]:
    """Folders of installed packages."""
    paths = sysconfig.get_paths()
    found = [paths[k] for k in ("stdlib", "platstdlib", "purelib", "platlib")]
    return tuple(Path(p).resolve() for p in [*found, *site.getsitepackages(), site.getusersitepackages()])


def is_installed(module: Any) -> bool:
    """Whether a module, by name, is of an installed package: one that does not change under its version."""
    if not isinstance(module, str):
        return False
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top in sys.builtin_module_names or top == "bayes_mpt":
        return top != "__main__"
    found = sys.modules.get(top)
    files = [getattr(found, "__file__", None), *list(getattr(found, "__path__", []))]
    return any(
        isinstance(file, str) and any(place in Path(file).resolve().parents for place in _places())
        for file in files
    )
