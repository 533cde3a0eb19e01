"""Names of settings, as a grid gives them: what is meant by one that an estimator does not have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bayes_mpt.training import Ascent, Epochs, Steps

__all__ = ["check_names"]

TRAININGS = (Ascent, Steps, Epochs)


def check_names(estimator: Any, params: Mapping[str, Any]) -> None:
    """Refuse settings of what is None, and those of a part under the estimator's own name.

    Raises
    ------
    ValueError
        It says what to write.
    """
    own = estimator.get_params(deep=False)
    for name in params:
        part, _, inner = name.partition("__")
        if inner and part in own and own[part] is None and part not in params:
            raise ValueError(f"{name} is set, but {part} is None: {_remedy(part, inner)}")
        if inner or part in own:
            continue
        for holder in ("model", "training"):
            value = own[holder]
            has = value.get_params() if hasattr(value, "get_params") and not isinstance(value, type) else ()
            if name in has:
                raise ValueError(f"BayesMPT has no {name}, its {holder} has: write {holder}__{name}")
        if _with(name):
            remedy = _remedy("training", name)
            raise ValueError(f"BayesMPT has no {name}, a training has: write training__{name}, and {remedy}")


def _with(name: str) -> list[str]:
    """Trainings with a setting of this name."""
    return [f"training={kind.__name__}()" for kind in TRAININGS if name in kind().get_params()]


def _remedy(part: str, inner: str) -> str:
    if part == "model":
        return "write BayesMPT(PPCA()), say"
    if part == "training":
        fitting = _with(inner)
        return f"give the estimator {' or '.join(fitting)}" if fitting else "no training has such a setting"
    return f"give the estimator a {part}"
