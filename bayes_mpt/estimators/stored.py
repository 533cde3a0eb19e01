"""Results of a search in a folder: which file holds what was asked, how one is taken up, and how a model is made again.

A file holds what a candidate's evaluation found (`bayes_mpt.estimators.rules.Candidate`) and what its training left, in
the format of `bayes_mpt.runtime.checkpoints`. Its name is the stage and the digest of all that the result depends on
(`bayes_mpt.runtime.digests`). The model itself is not in it: it is made of the estimator that the search was given.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from sklearn.pipeline import Pipeline

from bayes_mpt.estimators.candidates import Candidate, Facts, final_step
from bayes_mpt.estimators.stored_fit import dump
from bayes_mpt.evidence.draws import FactorDraws
from bayes_mpt.evidence.expected import Believed
from bayes_mpt.evidence.integrated import Nodes
from bayes_mpt.runtime.checkpoints import SUFFIX, make_room, read, set_aside, write
from bayes_mpt.warnings import CheckpointWarning, warn

__all__ = ["Slot", "prepare", "seed_in", "with_estimator"]

OLDER = re.compile(r"\d{4}-[a-z]+-[0-9a-f]{20}(\.\d+)?\.(pkl|part)|seed")  # before there was a format
STEM = 32  # digits of a digest in the name of a file; the file holds all of them

_NUMBERS = ("evidence", "se", "n_scored", "fit_time", "score_time", "rough")
_TEXTS = ("tokens", "error", "note", "about", "prior")
_FLAGS = ("by_row", "remembers", "rotates", "affordable", "counted", "mixture", "converged")
_ROWS = ("by_row", "at_fit", "fold")  # numbers by row, or None
_REPEATS = ("hidden", "split")  # the same of each repeat


@dataclass
class Slot:
    """Where one result is, or will be."""

    file: Path
    label: str
    """The stage of the search."""
    asked: str
    """Digest of what the result depends on."""
    found: Candidate | None = None

    @classmethod
    def of(cls, folder: Path, label: str, asked: str, unfitted: Any) -> Slot:
        """With what is in the folder already."""
        slot = cls(folder / f"{label}-{asked[:STEM]}{SUFFIX}", label, asked)
        slot.look(unfitted)
        return slot

    def look(self, unfitted: Any) -> None:
        """Take up a result that is there; ``unfitted`` is the estimator whose fit it is of."""
        self.found = read(self.file, "candidate", self._candidate)
        if self.found is not None:
            self.found.unfitted = unfitted

    def put(self, result: Candidate) -> None:
        """Write a result down."""
        facts = asdict(result.facts)
        numbers = {k: float(getattr(result, k)) for k in _NUMBERS}
        arrays = {k: np.asarray(getattr(result, k), float) for k in ("replicates", "splits")}
        rows = {k: _optional(getattr(result, k)) for k in _ROWS + _REPEATS}
        content = {
            "asked": self.asked,
            "stage": self.label,
            **numbers,
            **arrays,
            **{k: getattr(result, k) for k in _TEXTS},
            **rows,
            "believed": None if result.believed is None else asdict(result.believed),
            "nodes": None if result.nodes is None else result.nodes._asdict(),
            "facts": facts,
            "left": result.left if result.estimator is None else dump(result.model.fitted_),
        }
        write(self.file, "candidate", content)

    def _candidate(self, content: dict[str, Any]) -> Candidate:
        """Of the content of a file, of which nothing is taken on trust."""
        if content["asked"] != self.asked or content["stage"] != self.label:
            raise ValueError("of something else")
        arrays = {k: _vector(content[k]) for k in ("replicates", "splits")}
        rows: dict[str, Any] = {k: None if content[k] is None else _vector(content[k]) for k in _ROWS}
        rows |= {k: None if content[k] is None else _array(content[k], 2) for k in _REPEATS}
        numbers: dict[str, Any] = {k: _as(float, content[k]) for k in _NUMBERS}
        texts = {k: _as(str, content[k]) for k in _TEXTS}
        facts, left = content["facts"], content["left"]
        n = facts["n_hyperparameters"]
        known = Facts(
            **{k: _as(bool, facts[k]) for k in _FLAGS},
            discrete=tuple(_as(bool, v) for v in facts["discrete"]),
            parameters=tuple(_as(str, v) for v in facts["parameters"]),
            integrated=tuple(_as(str, v) for v in facts["integrated"]),
            n_hyperparameters=None if n is None else _as(int, n),
        )
        tensors = [*left["parameters"].values(), *left["buffers"].values(), *left["random"]]
        if not all(isinstance(t, torch.Tensor) for t in tensors):
            raise TypeError("not tensors")
        for name, kind in (("seed", int), ("digest", str), ("log_likelihood_", float), ("se", float)):
            _as(kind, left[name])
        believed, nodes = _believed(content["believed"]), _nodes(content["nodes"])
        found = Candidate(known=known, left=left, believed=believed, nodes=nodes)
        for name, value in (numbers | arrays | texts | rows).items():
            setattr(found, name, value)
        return found


def prepare(folder: Path) -> None:
    """Have the folder, that can be written to, without what versions before this format have left there."""
    make_room(folder)
    older = sorted(f for f in folder.iterdir() if OLDER.fullmatch(f.name))
    if older:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for file in older:
                set_aside(file, "it is of an older version")
        more = f" and {len(older) - 1} others" if len(older) > 1 else ""
        warn(
            f"checkpoint {older[0]}{more} of an older version, whose files are not opened: set aside with the ending "
            "aside, and what they stood for is computed anew",
            CheckpointWarning,
        )


def seed_in(folder: Path, drawn: int) -> int:
    """The seed of the searches in a folder: the first one's, of all that may begin at once."""

    def made(content: dict[str, Any]) -> int:
        return _as(int, content["seed"])

    file = folder / f"seed{SUFFIX}"
    found = read(file, "seed", made)
    if found is None:
        write(file, "seed", {"seed": drawn}, once=True)
        found = read(file, "seed", made)
    return drawn if found is None else int(found)


def with_estimator(candidate: Candidate, X: Any, y: Any) -> Candidate:
    """Make a candidate's estimator of what its fit has left; where that does not lead there, fit it again."""
    if candidate.estimator is not None or candidate.left is None:
        return candidate
    left = candidate.left
    try:
        estimator = _restored(clone(candidate.unfitted), X, y, left)
    except Exception as error:
        warn(
            f"what is stored of the fit of {candidate.unfitted!r} does not make it again ({error}): it is fitted anew",
            CheckpointWarning,
        )
        estimator = clone(candidate.unfitted).fit(X, y)
    candidate.estimator, candidate.unfitted, candidate.left = estimator, None, None
    return candidate


def _restored(estimator: Any, X: Any, y: Any, left: dict[str, Any]) -> Any:
    """The estimator as its fit left it; what stands before a model in a Pipeline is fitted."""
    if isinstance(estimator, Pipeline):
        for i, (name, step) in enumerate(estimator.steps[:-1]):
            if step is not None and step != "passthrough":
                X = (
                    step.fit_transform(X, y)
                    if hasattr(step, "fit_transform")
                    else step.fit(X, y).transform(X)
                )
                estimator.steps[i] = (name, step)
    final_step(estimator)._restore(X, y, left)
    return estimator


def _optional(rows: Any) -> Any:
    return None if rows is None else np.asarray(rows, dtype=np.float64)


def _believed(stored: Any) -> Believed | None:
    """The posterior of a candidate; the dimensions of its arrays agree."""
    if stored is None:
        return None
    numbers = dict(stored)
    draws = FactorDraws(**numbers.pop("draws"))
    kind, determined = _as(str, numbers.pop("kind")), _as(bool, numbers.pop("determined"))
    found = Believed(kind=kind, draws=draws, determined=determined, **numbers)
    s, t, k = draws.loadings.shape
    g = len(found.islands)
    wanted = {
        "islands": (g,),
        "fit_mean": (t,),
        "fit_covariance": (t, t),
        "noise": (s, t),
        "means": (s, t),
        "spread": (t,),
        "island_covariances": (g, t, t),
        "island_means": (g, t),
        "island_mean_covariances": (g, t, t),
        "mean_loadings": (t, k),
        "mean_noise": (t,),
    }
    for name, shape in wanted.items():
        value = getattr(found if hasattr(found, name) else draws, name)
        if not isinstance(value, np.ndarray) or value.shape != shape or value.dtype != np.float64:
            raise TypeError(f"{name} is no array of shape {shape}")
    return found


def _nodes(stored: Any) -> Nodes | None:
    """What hyper-parameters were integrated over."""
    if stored is None:
        return None
    found = Nodes(_array(stored["theta"], 2), _array(stored["share"], 1))
    if len(found.theta) != len(found.share):
        raise TypeError("theta and share differ in length")
    return found


def _vector(value: Any) -> np.ndarray[Any, Any]:
    return _array(value, 1)


def _array(value: Any, ndim: int) -> np.ndarray[Any, Any]:
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or value.ndim != ndim:
        raise TypeError(f"not an array of {ndim} dimensions")
    return value


def _as(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"not {kind.__name__}")
    return value
