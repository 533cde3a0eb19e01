"""Where EM starts with missing cells: the likelihood has many maxima there, and a short climb tells good starts."""

from __future__ import annotations

import torch
from torch import Tensor

from bayes_mpt.models.covariance_prior import CovariancePrior
from bayes_mpt.models.gaussians import Gaussians
from bayes_mpt.models.mixture_em import Expect, Table, from_clusters, run_em

__all__ = ["best_start", "filled"]

STARTS = 6  # beside the one that is given
ROUNDS = (5, 5, 10)  # steps of EM, after each of which the better half goes on


def best_start(
    table: Table,
    expect: Expect,
    given: Gaussians,
    covariance_type: str,
    prior: CovariancePrior | None,
    max_iter: int,
) -> tuple[Gaussians, int]:
    """The start from which a short EM comes furthest, at its end, and the steps that all took, up to ``max_iter``.

    One start is given; the others are clusters of the rows in whose gaps stand random cells of the same columns.
    """
    n_components = len(given.weights)
    if n_components == 1 or max_iter < (STARTS + 1) * sum(ROUNDS):
        return given, 0
    seeds = torch.randint(2**31 - 1, (STARTS,), device="cpu").tolist()
    places = [given]
    for seed in seeds:
        whole = table._replace(rows=filled(table.rows, seed))
        places.append(from_clusters(whole, n_components, covariance_type, seed, prior, n_tries=1))
    used = 0
    for n_steps in ROUNDS:
        climbs = [
            run_em(table, expect, place, covariance_type, tol=0.0, max_iter=n_steps, prior=prior)
            for place in places
        ]
        used += sum(climb.n_steps for climb in climbs)
        climbs = [climb for climb in climbs if not climb.hopeless] or climbs[:1]
        climbs.sort(key=lambda climb: -climb.value)
        places = [climb.mix for climb in climbs[: -(-len(climbs) // 2)]]
        if len(places) == 1:
            break
    return places[0], used


def filled(rows: Tensor, seed: int) -> Tensor:
    """Rows (N, T) with an observed cell of the same column, at random, in place of each that is missing."""
    generator = torch.Generator().manual_seed(seed)
    out = rows.clone()
    for column, cells in enumerate(rows.unbind(1)):
        gaps = cells.isnan()
        known = cells[~gaps]
        n_gaps = int(gaps.sum())
        if n_gaps:
            drawn = torch.randint(max(1, len(known)), (n_gaps,), generator=generator)
            out[gaps, column] = known[drawn.to(known.device)] if len(known) else 0.0
    return out
