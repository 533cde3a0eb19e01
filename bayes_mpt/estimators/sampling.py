"""Rows drawn from a fitted program, and missing cells drawn given the observed ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayes_mpt.estimators.fitted import Fitted
from bayes_mpt.estimators.rows import as_tensor, refuse_far
from bayes_mpt.inputs import wanted
from bayes_mpt.predictors.nodes.annealed import Annealed, AnnealedImportance, Bracket
from bayes_mpt.program.offers import name_of
from bayes_mpt.program.program import list_names
from bayes_mpt.program.simulation import simulate, simulate_in_order
from bayes_mpt.program.store import OwnStore, own_random_state

__all__ = ["bracket", "draw_missing", "draw_rows"]

_Drawn = TypeVar("_Drawn")


def draw_rows(fitted: Fitted, n_rows: int) -> NDArray[np.float64]:
    """Rows (n_rows, T), the same ones at every call."""
    if not isinstance(n_rows, Integral) or n_rows < 1:
        raise ValueError(f"n_samples must be an integer of at least 1, got {n_rows!r}")
    n_columns = len(fitted.names)
    if fitted.bound.structure.takes_visible:  # a row of which nothing is known
        return draw_missing(fitted, np.full((int(n_rows), n_columns), np.nan), None, 1)[0]
    if fitted.bound.structure.order is not None:
        return fitted.unshifted(_in_order(fitted, int(n_rows)).double().cpu().numpy())
    if not fitted.bound.structure.affine:
        return fitted.unshifted(_simulate(fitted, int(n_rows))[0].double().cpu().numpy())
    if fitted.y_like is not None or fitted.bound.structure.per_row or not fitted.bound.structure.by_row:
        raise ValueError(_given_covariates(fitted))
    reading = fitted.shared_map("sample")
    n_latents = reading.loading.shape[-1]
    generator = torch.Generator().manual_seed(fitted.draws)
    draw = torch.randn(n_rows, n_latents + len(reading.loc[0]), generator=generator, dtype=torch.float64).to(
        reading.loc
    )
    u, e = draw[:, :n_latents], draw[:, n_latents:]
    x = reading.loc[0] + u @ reading.loading[0].mT + reading.noise[0].sqrt() * e
    return fitted.unshifted(x.cpu().numpy())


def _simulate(fitted: Fitted, n_rows: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows (N, T) from the fitted program, and the latents that made them."""
    structure = fitted.bound.structure
    if not structure.by_row or structure.observed_argument != 0:
        raise ValueError(_given_covariates(fitted))
    return _at_fit(fitted, n_rows, lambda rows: simulate(fitted.model, (rows,), structure))


def _given_covariates(fitted: Fitted) -> str:
    """Why no rows are drawn of nothing, and what to do."""
    shared = [s.name for s in fitted.bound.structure.latents if s.row_axis is None]
    why = (
        f"all rows share the latents {list_names(map(repr, shared))}" if shared else "it looks at covariates"
    )
    means = " predict(X) gives means of y." if fitted.y_like is not None else ""
    return (
        "rows are drawn of nothing where a program observes the cells of X itself and rows are independent and alike, "
        f"which {name_of(fitted.model)} does not: {why}.{means} For draws run the program at its fitted parameters on "
        "a table of your own: pyro.poutine.trace(pyro.poutine.uncondition(pyro.poutine.substitute(program, params)))"
        ".get_trace(x, ...), where params are params_ as tensors and latents come from their priors"
    )


def _in_order(fitted: Fitted, n_rows: int) -> Tensor:
    """Rows (N, T), or one series of so many steps, each token drawn from what was drawn before it."""
    if fitted.y_like is not None:
        raise ValueError(
            "rows cannot be drawn where a program takes y: tokens look at earlier ones, of which y is none"
        )
    draw = partial(simulate_in_order, fitted.model, program=fitted.bound.structure, seed=fitted.draws)
    return _at_fit(fitted, n_rows, draw)


def _at_fit(fitted: Fitted, n_rows: int, draw: Callable[[Tensor], _Drawn]) -> _Drawn:
    """What is drawn of the program at its fitted parameters, for a table of so many rows."""
    rows = as_tensor(np.zeros((n_rows, len(fitted.names))), fitted.model, fitted.device)
    with OwnStore() as store:
        store.prefill(fitted.initial)
        with own_random_state(fitted.draws):
            draw(rows)  # networks put their parameters into the store
        store.begin(fitted.state)
        with own_random_state(fitted.draws):
            return draw(rows)


def draw_missing(fitted: Fitted, rows: NDArray[np.floating], y: Any, n_samples: int) -> NDArray[np.float64]:
    """Rows with their NaN cells drawn together given the observed cells of the row: (n_samples, N, T)."""
    structure = fitted.bound.structure
    cells = not structure.affine and structure.by_row and structure.observed_argument == 0
    if not (cells or fitted.bound.structure.takes_visible):
        raise ValueError(
            f"missing cells are drawn where the program observes the cells of X, row by row, and its latents are "
            f"drawn or on a grid, got {fitted.bound.name}: use impute for their means"
        )
    with torch.no_grad():
        try:
            parts = fitted.each(lambda read: read.posterior().draws(n_samples), rows, y)
        except NotImplementedError as error:
            raise ValueError(f"{error}: use impute for their means") from error
        except RuntimeError:  # torch refuses probabilities that are NaN
            refuse_far(np.full(len(rows), np.nan), rows, fitted.names)
            raise
    return fitted.unshifted(torch.cat(parts, 1).double().cpu().numpy())


def bracket(fitted: Fitted, n_rows: int) -> Bracket:
    """Bounds on the LML of rows simulated from the fitted program, by annealing both ways."""
    words = "bidirectional needs annealing: set_params(predictor=AnnealedImportance())"
    wanted(AnnealedImportance, fitted.predictor, words, ValueError)
    rows, latents = _simulate(fitted, n_rows)
    with fitted.program((rows,)) as predictor:
        return cast(Annealed, predictor).bracket((rows,), latents)
