"""Prior odds of the candidates of an average."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator

from bayes_mpt.estimators.availability import is_unfitted
from bayes_mpt.estimators.candidates import Candidate, final_step
from bayes_mpt.program.program import list_names

__all__ = ["equal_odds", "given_odds"]

Array = NDArray[np.float64]

SIZES = ("n_components", "n_classes")  # by which candidates of one class are told apart


def equal_odds(found: list[Candidate]) -> Array:
    """Prior probabilities (J,): equal for all classes of models, in one for all sizes, of a size for all candidates.

    The size is the number of latents, components or classes. Nine PPCA and one mixture are one half each, not nine to
    one.
    """
    keys = [_class_and_size(i, c) for i, c in enumerate(found)]
    classes = [k for k, _ in keys]
    shares = []
    for key in keys:
        sizes = {size for kind, size in keys if kind == key[0]}
        shares.append(1 / (len(set(classes)) * len(sizes) * keys.count(key)))
    return np.array(shares)


def given_odds(prior_weights: Mapping[str, float] | ArrayLike, names: list[str], kept: list[int]) -> Array:
    """Prior probabilities of the candidates that are ``kept``, by their names or in the order of all ``names``."""
    if isinstance(prior_weights, Mapping):
        unknown = [n for n in prior_weights if n not in names]
        missing = [names[i] for i in kept if names[i] not in prior_weights]
        if unknown or missing:
            what = f"has no {list_names(map(repr, missing))}" if missing else ""
            other = f"names {list_names(map(repr, unknown))}, which is no candidate" if unknown else ""
            raise ValueError(
                f"prior_weights {' and '.join(filter(None, [what, other]))}: give one number for each candidate, by "
                f"name: {list_names(map(repr, names))}"
            )
        values = [prior_weights[names[i]] for i in kept]
    else:
        given = np.asarray(prior_weights)
        if given.shape != (len(names),):
            raise ValueError(
                f"prior_weights must hold one number for each of the {len(names)} candidates, in the order of "
                f"candidate_names_, or a dict by name: got shape {given.shape}"
            )
        values = [given[i] for i in kept]
    try:
        odds = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"prior_weights must be numbers, got {prior_weights!r}") from error
    if not (np.isfinite(odds).all() and (odds >= 0).all() and odds.sum() > 0):
        raise ValueError(
            f"prior_weights must be finite, none negative and not all zero, got {prior_weights!r}"
        )
    return odds / odds.sum()


def _class_and_size(place: int, candidate: Candidate) -> tuple[Any, Any]:
    """What a candidate is of; a program without a size is one of its own."""
    estimator = final_step(candidate.unfitted if candidate.estimator is None else candidate.estimator)
    model = estimator.model if is_unfitted(estimator) else estimator.fitted_.model
    params = model.get_params(deep=False) if isinstance(model, BaseEstimator) else {}
    size = next((params[name] for name in SIZES if name in params), None)
    kind: Any = type(model)
    if kind.__name__ == "function":
        kind = f"{model.__module__}.{model.__qualname__}"
    return kind, ("at", place) if size is None else size
