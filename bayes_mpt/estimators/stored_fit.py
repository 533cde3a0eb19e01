"""What a training has found, in numbers, text and tensors, and a fit made again of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from bayes_mpt.estimators.fit import set_buffers
from bayes_mpt.estimators.fitted import Fitted

__all__ = ["dump", "restored"]

# By the names of the attributes, and what each is in a file.
NUMBERS: dict[str, Callable[[Any], Any]] = {
    "log_likelihood_": float,
    "history_": lambda values: [float(v) for v in values],
    "n_iter_": int,
    "converged_": bool,
    "noise_at_zero_": lambda names: [str(n) for n in names],
    "fit_method_": str,
    "at_map_": bool,
}


def dump(fitted: Fitted) -> dict[str, Any]:
    """What `fit_program` takes as ``left`` to make the fit again without training, and `restored` to complete it."""
    found = fitted.attributes()
    return {
        "seed": fitted.seed,
        "random": fitted.random_after,
        "parameters": dict(fitted.state),
        "buffers": {name: buffer.detach().clone() for name, buffer in fitted.buffers().items()},
        "digest": fitted.digest,
        "se": fitted.se,
        **{name: found[name] for name in NUMBERS},
    }


def restored(made: Fitted, left: dict[str, Any]) -> Fitted:
    """A fit that was made again of what it had left, with what its training said.

    Raises
    ------
    ValueError
        If the rows are others, or their log marginal likelihood differs.
    """
    said = {name: kind(left[name]) for name, kind in NUMBERS.items()}
    total, wanted = made.total, said["log_likelihood_"]
    single = any(v.dtype == torch.float32 for v in made.state.values())
    if made.digest != left["digest"]:
        raise ValueError("the rows are not those of that fit")
    if not math.isclose(total, wanted, rel_tol=1e-3 if single else 1e-6, abs_tol=1e-6):
        raise ValueError(
            f"the log marginal likelihood at its parameters is {total}, where the fit found {wanted}"
        )
    set_buffers(left["buffers"], made.model, made.guide)
    columns = [str(name) for name in made.names]
    fit = replace(
        made.fit,
        method=said["fit_method_"],
        history=said["history_"],
        n_iter=said["n_iter_"],
        converged=said["converged_"],
        at_zero=[columns.index(name) for name in said["noise_at_zero_"]],
    )
    return replace(made, fit=fit, total=wanted, se=left["se"], at_map=said["at_map_"])
