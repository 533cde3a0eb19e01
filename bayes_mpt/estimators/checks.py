"""What is refused of a program and its fit, and what is warned of."""

from __future__ import annotations

import math
from contextlib import suppress
from itertools import product
from typing import Any

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayes_mpt import training
from bayes_mpt.estimators.rows import refuse_empty, refuse_missing
from bayes_mpt.evidence.hyperparameters import Prior, far_from_centre
from bayes_mpt.predictors import Bound
from bayes_mpt.predictors.gaussian.process import N_TRIAL_ROWS
from bayes_mpt.program.arguments import fill_all, head, resampled, shifted
from bayes_mpt.program.offers import offered
from bayes_mpt.program.program import Model, ModelError
from bayes_mpt.program.run import run
from bayes_mpt.warnings import (
    DivergenceWarning,
    DrawsWarning,
    HeavyTailWarning,
    IgnoredRowsWarning,
    warn,
)

__all__ = ["check_bound", "warn_of_bounds", "warn_of_weights"]

WIDE = 2.0  # nats, of the logarithms of a row's weights: the mean of a few of them misses what is rare


def check_bound(
    predictor: Bound,
    model: Model,
    args: tuple[Any, ...],
    X: NDArray[np.floating],
    y: NDArray[Any] | None,
    names: NDArray[Any],
) -> None:
    """Refuse what cannot be fitted to these rows, and warn of what is odd."""
    structure = predictor.structure
    _refuse_subsampling(predictor, args)
    if (
        structure.observed_argument is None and not structure.takes_visible
    ):  # else its tokens are cells of the rows
        _warn_of_ignored_rows(predictor, model, args)
    if structure.gaussian_vector:
        assert y is not None
        refuse_missing(X, names)
        refuse_empty(y, estimated=bool(predictor.parameters))


def _refuse_subsampling(predictor: Bound, args: tuple[Any, ...]) -> None:
    """Programs whose score is that of other rows than they are given, or weighed."""
    structure = predictor.structure
    scale = structure.scale
    if structure.by_row and structure.sub_rows is None and scale != 1.0:
        raise ModelError(
            f"poutine.scale weighs the program by {scale:.4g}, so that its score is no marginal likelihood: fit "
            "the program itself, or train with pyro.infer.SVI and CumulativeMaskedScore, which take the weight"
        )
    if structure.sub_rows is not None and scale == 1.0:
        raise ModelError(
            f"no plate of the {len(args[0])} rows of X stands around observed site {structure.observed!r}: plate "
            f'{structure.rows_plate!r} has {structure.sub_rows}. Write pyro.plate("rows", len(x)) around it'
        )
    if structure.sub_rows is not None or scale != 1.0:
        raise ModelError(
            f"plate {structure.rows_plate!r} sub-samples its rows (scale {scale:.4g}): BayesMPT makes minibatches "
            'itself. Write pyro.plate("rows", len(x)) without subsample_size, or train with pyro.infer.SVI and '
            "CumulativeMaskedScore"
        )


def _warn_of_ignored_rows(predictor: Bound, model: Model, args: tuple[Any, ...]) -> None:
    """Say so where no argument changes what a program observes."""
    structure = predictor.structure
    filled = fill_all(args)
    refused = (RuntimeError, ValueError, IndexError, KeyError)

    def observed(some: tuple[Any, ...]) -> list[Tensor]:
        with torch.no_grad(), pyro.validation_enabled(False):
            trace = run(model, some)
            return [trace.nodes[name]["value"] for name in structure.site_names]

    # a program may insist on all its rows, or have a site for each
    for some in (head(filled, N_TRIAL_ROWS), filled):
        with suppress(*refused):
            before = observed(some)
            break
    else:
        return
    # Resampled rows may be equal, shifted ones have values out of range; an argument may say how many sites there are,
    # so that it can only be changed alone, or not at all.
    every, ran = range(len(some)), False
    for change, chosen in product((resampled, shifted), (set(every), *({i} for i in every))):
        with suppress(*refused):
            after = observed(tuple(change(a) if i in chosen else a for i, a in enumerate(some)))
            ran = True
            if not all(map(torch.equal, before, after)):
                return
    if not ran:
        return
    warn(
        f"observed site {structure.observed!r} does not change with X: the rows that were given are ignored, and "
        "whatever they are the score is the same. Write obs=x, or a part of it",
        IgnoredRowsWarning,
    )


# ------------------------------------------------------------------------------------------------ where it has ended


def warn_of_bounds(prior: Prior, problem: training.Problem, *, drawn: bool) -> None:
    """Say so where an estimate diverges: the likelihood does not hold it; ``drawn`` is its score."""
    store = pyro.get_param_store()
    averaged = "" if drawn else "; evidence='integrated' averages over it"
    held = "" if problem.log_prior is not None else f". penalty=True holds it by the model's prior{averaged}"
    floored = offered(problem.bound.model, "floored")
    at_floor: dict[str, str] = {} if floored is None else floored(*problem.whole.args)
    for name in dict.fromkeys([*at_floor, *far_from_centre(prior, problem.of_program())]):
        value = np.array2string(store[name].detach().cpu().numpy().ravel(), precision=3, threshold=6)
        why = at_floor.get(name, "towards the end of its range: the data do not determine it")
        warn(f"the estimate of parameter {name!r} diverged to {value}, {why}{held}", DivergenceWarning)


def warn_of_weights(diagnostics: dict[str, Any]) -> None:
    """Say so where the error of an estimate is unreliable."""
    bad = diagnostics.get("rows_with_bad_k", 0)
    if bad:
        worst = ", ".join(f"{row} (k = {k:.2f})" for row, k in diagnostics["worst_rows"][:3])
        warn(
            f"the importance weights of {bad} rows have a tail so heavy (Pareto k > 0.7) that their error is "
            f"unreliable, the worst being rows {worst}: use more particles or a wider guide",
            HeavyTailWarning,
        )
    if diagnostics.get("missed"):
        warn(f"the evidence has no reliable error (se is nan): {diagnostics['missed']}", DrawsWarning)
    sd = diagnostics.get("log_weight_sd", 0.0)
    if sd > WIDE and math.isnan(diagnostics["pareto_k"]):  # too few for a tail to be fitted
        warn(
            f"the importance weights of a row spread over {sd:.1f} nats (standard deviation, on average), of which "
            f"{diagnostics['num_particles']} draws cover too little: the evidence is probably too low by more than its "
            "error. Use more particles, or more temperatures where they are annealed",
            HeavyTailWarning,
        )
