"""Refuse rows on which a density has shrunk to zero width: their likelihood has no maximum."""

from __future__ import annotations

from typing import Any

import numpy as np

from bayes_mpt.estimators.bayes_mpt import BayesMPT
from bayes_mpt.estimators.repeats import flat_direction, repeated_columns
from bayes_mpt.estimators.rows import rows_of
from bayes_mpt.program.program import list_names

__all__ = ["refuse_unbounded"]

N_TRIED = 64  # rows on which a density is tried for its width
WIDTH = (
    1e-3  # of the least spread of the rows; a density narrower than this where they have none is degenerate
)


def refuse_unbounded(model: BayesMPT, X: Any, y: Any = None) -> None:
    """Raise ValueError where the rows X do not vary in some direction and the fitted density has no width there.

    The likelihood grows without bound then. Fits with a closed form refuse such columns; one that climbs ends
    somewhere on the way, at thousands of nats.
    """
    structure = model.predictor_.structure
    cells = structure.scores_input or (not structure.affine and structure.observed_argument == 0)
    codes = any(site.discrete for site in structure.sites)
    if (
        not (structure.by_row and structure.parameters and cells)
        or codes
        or model.predictor_.structure.takes_visible
    ):
        return
    fitted, table = model._ready(X)
    moments = fitted.moments_of(table)
    if moments is not None and moments.complete and moments.full_rank:
        return
    with model.read_rows(X, y) as read:
        x = read.value
        rows = x.double().cpu().numpy()
    if rows.shape[1] != model.n_features_in_:
        return
    constant = np.nanmin(rows, 0) == np.nanmax(rows, 0)
    step = flat_direction(rows)
    if constant.any():  # also where no row is complete
        unit = np.nanstd(rows, 0)
        step = np.where(constant, 1.0 if constant.all() else np.median(unit[~constant]), 0.0)
    if step is None:
        return
    some = np.unique(np.linspace(0, len(rows) - 1, N_TRIED).round().astype(int))
    here = rows_of(X, some)
    lost = model.score_samples(here, rows_of(y, some)) - model.score_samples(
        here + WIDTH * step, rows_of(y, some)
    )
    if not np.nanmean(lost) > 0.5:
        return
    n_rows, n_columns = rows.shape
    observed = (~np.isnan(rows)).sum(0)
    which, found = "that are constant or repeat others", constant.nonzero()[0].tolist()
    if not found and (observed.min() == n_rows or (~np.isnan(rows)).all(1).sum() > n_columns):
        found = repeated_columns(rows)
    if not found:  # complete rows are too few to tell
        which = f"with the fewest observed cells ({observed.min()})"
        found = np.flatnonzero(observed == observed.min()).tolist()
    names = model.fitted_.names[found]
    raise ValueError(
        f"the likelihood has no maximum: these rows (n_samples = {n_rows}, n_features = {n_columns}) do not vary in "
        f"some direction, and the fitted density has shrunk to zero width there. Columns {which}: "
        f"{list_names(repr(n) if isinstance(n, str) else str(n) for n in names)}. Drop them, or use fewer latents"
    )
