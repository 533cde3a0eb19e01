"""Where EM of a mixture of Gaussians begins, and the prior of its covariances, of a table."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayes_mpt.models.covariance_prior import CovariancePrior, steps_of
from bayes_mpt.models.gaussians import Gaussians
from bayes_mpt.models.mixture_climb import Climb, run_em
from bayes_mpt.models.mixture_clusters import centres_of, nearest
from bayes_mpt.models.mixture_products import DENSE, n_products, products_of
from bayes_mpt.models.mixture_steps import (
    Expect,
    Table,
    chunks_of,
    coefficients_of,
    expectation,
    expectation_of,
    m_step,
    table_of,
)

__all__ = [
    "DENSE",
    "REG_COVAR",
    "START_STEPS",
    "START_TOL",
    "START_TRIES",
    "Climb",
    "Expect",
    "Gaussians",
    "Table",
    "around",
    "chunks_of",
    "coefficients_of",
    "expectation",
    "from_clusters",
    "m_step",
    "n_products",
    "prior_of",
    "products_of",
    "run_em",
    "share_of_table",
    "table_of",
    "within",
]

START_TRIES = 3  # of the k-means of the start
START_TOL = 1e-3  # nats a row, of the EM of the start
START_STEPS = 100
REG_COVAR = 1e-6  # added to variances by the EM of the start, in units of the columns' variances
SHARE = 1e-2  # of the covariance of the table, in the prior of the covariances
THIN = 1e-5  # the same of full and tied ones, in which a direction between columns may be thin


def within(table: Table, loc: Tensor) -> Tensor:
    """Centres (K, T) no further from the cells of a table than these from each other: beyond, the score is flat."""
    rows = table.rows
    high = rows.nan_to_num(-math.inf).amax(0)
    low = rows.nan_to_num(math.inf).amin(0)
    room = high - low
    return torch.where(room >= 0, loc.clamp(low - room, high + room), loc)


def prior_of(table: Table, n_components: int, covariance_type: str) -> CovariancePrior:
    """The prior of the covariances in the units of a table; zero where that has no spread in some direction."""
    n_rows, n_tokens = table.rows.shape
    if covariance_type in DENSE:
        scale = _covariance(table) * (~table.constant)
    elif covariance_type == "diag":
        scale = (~table.constant).to(table.rows)
    else:  # the columns' mean variance is one
        scale = (~table.constant).any()[None].to(table.rows)
    prior = CovariancePrior(share_of_table(n_tokens, n_components, covariance_type) * scale, n_tokens)
    if not prior.proper:
        return prior._replace(scale=torch.zeros_like(scale))
    # a density of at most 1 / h for N / K rows: no cell has more than all of the probability
    rounding = n_rows / n_components * steps_of(table.rows).square() / (2 * math.pi)
    if covariance_type == "spherical":
        rounding = rounding.mean(0, keepdim=True)
    return prior._replace(scale=prior.scale + (torch.diag(rounding) if scale.ndim == 2 else rounding))


def share_of_table(n_tokens: int, n_components: int, covariance_type: str) -> float:
    """How much of the covariance of the table the prior has, where columns are not rounded."""
    share = THIN if covariance_type in DENSE and n_tokens > 1 else SHARE
    return share / n_components ** (2 / n_tokens)


def _covariance(table: Table) -> Tensor:
    """Of the table, by EM where cells are missing."""
    rows = table.rows
    gaps = rows.isnan()
    if not bool(gaps.any()):
        return rows.mT @ rows / len(rows)
    eye = torch.eye(rows.shape[1]).to(rows)
    whole = Gaussians(rows.new_ones(1), rows.new_zeros(1, rows.shape[1]), eye[None])
    climb = run_em(table, expectation(rows, "full"), whole, "full", tol=START_TOL, max_iter=START_STEPS)
    if climb.hopeless:
        return torch.zeros_like(eye)
    return (climb.mix.scale @ climb.mix.scale.mT)[0]


# ---------------------------------------------------------------------------------------------------------- the start


def from_clusters(
    table: Table,
    n_components: int,
    covariance_type: str,
    seed: int,
    prior: CovariancePrior | None = None,
    n_tries: int = START_TRIES,
    n_steps: int = START_STEPS,
) -> Gaussians:
    """Gaussians found by EM from the clusters of a k-means on some of the rows, none of whose cells is missing.

    The best of ``n_tries`` k-means; with none, of random rows and what is nearest to them.
    """
    rows = table.rows
    n_least = max(2, n_components)  # a row given twice changes no frequency
    if len(rows) < n_least:
        rows = rows.repeat(-(-n_least // len(rows)), 1)
    centres = centres_of([rows], n_components, seed, n_tries)[0]
    wide = around(centres, rows.new_ones(rows.shape[1]), covariance_type)
    expect = expectation_of(chunks_of(rows, covariance_type))
    sums, _ = expect(wide, coefficients_of(wide), lambda key, log_prob, square, n_cells: nearest(log_prob))
    mix = m_step(sums, wide, covariance_type, prior, REG_COVAR)[0]
    if not n_steps:
        return mix
    climb = run_em(
        table._replace(rows=rows),
        expect,
        mix,
        covariance_type,
        tol=START_TOL,
        max_iter=n_steps,
        prior=prior,
        reg_covar=REG_COVAR,
    )
    return climb.mix


def around(centres: Tensor, unit: Tensor, covariance_type: str) -> Gaussians:
    """Components at centres (..., K, T), in all directions as wide as units (..., T): a row is the nearest one's."""
    *shape, n_components, n_tokens = centres.shape
    if covariance_type in DENSE:
        n_scales = 1 if covariance_type == "tied" else n_components
        scale = torch.diag_embed(unit)[..., None, :, :].expand(*shape, n_scales, -1, -1)
    else:
        scale = unit[..., None, : n_tokens if covariance_type == "diag" else 1].expand(
            *shape, n_components, -1
        )
    return Gaussians(centres.new_full((*shape, n_components), 1 / n_components), centres, scale)
