"""What a fit, a score or a search warns of, as classes: filter on these, not on sentences.

>>> import warnings
>>> with warnings.catch_warnings():
...     warnings.simplefilter("ignore", HeavyTailWarning)  # of a score that is known to be rough

Those of a training that ended badly are scikit-learn's ``ConvergenceWarning`` too, all others ``UserWarning``. Each
points at the line outside of this package from which the call came.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import joblib
import sklearn
from sklearn.exceptions import ConvergenceWarning

__all__ = [
    "AdviceWarning",
    "CheckpointWarning",
    "CollapseWarning",
    "DivergenceWarning",
    "DrawsWarning",
    "HeavyTailWarning",
    "IgnoredRowsWarning",
    "LeftOutWarning",
    "MisfitWarning",
    "MissedModeWarning",
    "NoBoundWarning",
    "NotConvergedWarning",
    "PrecisionWarning",
    "SlowProgramWarning",
    "UnboundedWarning",
    "VaguePriorWarning",
    "ZeroNoiseWarning",
    "warn",
    "warnings_of",
]


class NotConvergedWarning(ConvergenceWarning):
    """A training stopped without meeting its stopping rule."""


class DivergenceWarning(ConvergenceWarning):
    """An estimate went to the end of its range: the data do not determine it."""


class ZeroNoiseWarning(ConvergenceWarning):
    """The noise variance of a column with missing cells ended at zero."""


class CollapseWarning(ConvergenceWarning):
    """A component of a mixture lost its spread."""


class UnboundedWarning(ConvergenceWarning):
    """Latents reproduce the rows without noise, so that the likelihood has no maximum."""


class HeavyTailWarning(UserWarning):
    """Importance weights are so uneven that the error of an estimate is unreliable."""


class DrawsWarning(UserWarning):
    """An evidence from draws has no reliable error, or one too large for what is done with it."""


class VaguePriorWarning(UserWarning):
    """An evidence depends on a prior that is so wide that the scale of it is no statement."""


class NoBoundWarning(UserWarning):
    """What is maximised is not a lower bound on the log marginal likelihood."""


class IgnoredRowsWarning(UserWarning):
    """What a program observes does not change with X."""


class LeftOutWarning(UserWarning):
    """Candidates of a search are not in an average of them."""


class MisfitWarning(UserWarning):
    """Rows are not what the evidence believes them to be."""


class MissedModeWarning(UserWarning):
    """An evidence may miss modes of a posterior, and has no error."""


class SlowProgramWarning(UserWarning):
    """A program runs on one node at a time."""


class AdviceWarning(UserWarning):
    """A model finds its settings odd for these rows."""


class PrecisionWarning(UserWarning):
    """A density has few digits left."""


class CheckpointWarning(UserWarning):
    """A result cannot be kept in a checkpoint, or not be taken from one."""


class _Scope(NamedTuple):
    candidate: str = ""
    silent: tuple[type[Warning], ...] = ()


_EVERYWHERE = _Scope()
_scope: ContextVar[_Scope] = ContextVar("scope", default=_EVERYWHERE)
# a context of its own for each thread, where the filters of `warnings` are every thread's

_PACKAGES = (sys.modules[__package__], joblib, sklearn)
_INSIDE = (
    *(os.path.dirname(os.path.abspath(str(package.__file__))) + os.sep for package in _PACKAGES),
    os.path.abspath(contextlib.__file__),
)


@contextlib.contextmanager
def warnings_of(candidate: str = "", *, silent: tuple[type[Warning], ...] = ()) -> Iterator[None]:
    """Inside ``with``, `warn` names a candidate of a search, and leaves out some classes of warnings."""
    around = _scope.get()
    token = _scope.set(_Scope(candidate or around.candidate, around.silent + silent))
    try:
        yield
    finally:
        _scope.reset(token)


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the first line outside of this package, scikit-learn and joblib."""
    scope = _scope.get()
    if issubclass(category, scope.silent):
        return
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    text = f"{message} (candidate {scope.candidate!r})" if scope.candidate else message
    warnings.warn(text, category, stacklevel=level)
