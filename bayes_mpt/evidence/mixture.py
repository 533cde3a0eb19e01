"""Evidence of a Gaussian mixture with weights, means and covariances integrated, and an error bar that can be believed.

    Z = int p(rows | weights, means, covariances) p(weights, means, covariances)

under the stated prior of `mixture_prior`: the parameters in closed form, all allocations of rows to components by
particles (`allocations`). It is the cumulative score of the rows revealed one by one in any order, each predicted from
those before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax

from bayes_mpt.diagnostics import few_replicates, log_mean
from bayes_mpt.evidence.allocations import allocate, chains_of
from bayes_mpt.evidence.components import Components, blocks_of, components
from bayes_mpt.evidence.mixture_prior import MixturePrior, checked_rows
from bayes_mpt.evidence.predictive import GaussianRows
from bayes_mpt.evidence.sampled import LARGE_SE

__all__ = ["COVARIANCE_TYPES", "MAX_COMPONENTS", "MixtureEvidence", "mixture_evidence"]

Array = NDArray[np.float64]

COVARIANCE_TYPES = ("full", "tied", "diag", "spherical")
MAX_COMPONENTS = 12  # whose orders are summed over
N_CHAINS = 32
PILOT = 16  # particles of an island
MAX_DRAWS, MAX_CELLS = 256, 2**20  # that are kept, and of their covariances
MAX_COVARIANCES = 10_000  # cells of one particle's
MIN_EIGENVALUE = 1e-10  # of correlations


@dataclass(frozen=True, eq=False)
class MixtureEvidence:
    """An evidence with an error bar, and the posterior that it was computed with."""

    log_evidence: float
    """Nats, of the observed cells of all rows."""
    se: float
    """Nats: plus and minus two of them hold the truth in 95 % (t factor of the islands included)."""
    islands: Array
    """(G,) log Z of each."""
    n_particles: int
    """Of the run that counts, all islands together."""
    n_levels: int
    """Steps between the chains and the posterior."""
    prior: MixturePrior
    law: GaussianRows
    """Of a new row: weights, means and covariances drawn from their posterior."""
    flags: tuple[str, ...]
    """What to doubt, in words."""


def mixture_evidence(
    rows: ArrayLike,
    n_components: int,
    prior: MixturePrior,
    *,
    covariance_type: str = "full",
    se: float = 0.1,
    max_particles: int = 1024,
    n_islands: int = 8,
    seed: int = 0,
) -> MixtureEvidence:
    """Evidence of the observed cells of rows, with its error.

    Where cells are missing it is right if they are missing at random given the observed ones.

    Parameters
    ----------
    rows : array of shape (N, T)
        NaN where missing. A row of which nothing is observed counts nothing.
    n_components : int
        K, from 1 to 12.
    prior : MixturePrior
        The same for all candidates of a table.
    covariance_type : {"full", "tied", "diag", "spherical"}, default="full"
    se : float, default=0.1
        Nats: the standard error that is sampled for.
    max_particles : int, default=1024
        Of the run that counts.
    n_islands : int, default=8
        Independent runs, from which the error is told.
    seed : int, default=0
        Same seed, same bits.

    Raises
    ------
    ValueError
        If there are more components than 12, or none, if rows are no table of the prior's columns, if a column is
        constant, or the prior's covariance singular.

    Examples
    --------
    >>> from bayes_mpt.evidence import mixture_prior
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(200, 2)) + 4.0 * rng.integers(0, 2, size=(200, 1))
    >>> found = [mixture_evidence(x, k, mixture_prior(x)) for k in (1, 2, 3)]
    >>> int(np.argmax([f.log_evidence for f in found])), found[0].se, found[1].se < 0.2
    (1, 0.0, True)
    """
    table = checked_rows(rows, len(prior.center))
    _check(table, n_components, prior, covariance_type)
    unit = prior.units(covariance_type)
    shown = ~np.isnan(table)
    x = ((table - prior.center) / unit)[shown.any(1)]
    blocks = blocks_of(x, covariance_type)
    first, second, third, fourth = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(4))

    def empty(n: int) -> Components:
        return components(prior, covariance_type, n_components, n)

    chains = chains_of(x, blocks, empty(N_CHAINS), first)
    pilot = allocate(blocks, empty(PILOT * n_islands), chains, n_islands, second)
    variance = max(float(pilot.log_z.var(ddof=1)), pilot.variance)
    wanted = PILOT * variance / n_islands * (few_replicates(n_islands) / se) ** 2
    n_each = int(np.clip(math.ceil(min(wanted, 1e6)), PILOT, max(PILOT, max_particles // n_islands)))
    found = allocate(blocks, empty(n_each * n_islands), chains, n_islands, third, pilot.path)
    value, error = log_mean(found.log_z)
    jacobian = float(shown.sum(0) @ np.log(unit))
    chance = np.cumsum(np.repeat(softmax(found.log_z), n_each))
    n_kept = min(len(chance), MAX_DRAWS, max(16, MAX_CELLS // (n_components * x.shape[1] ** 2)))
    kept = np.searchsorted(chance, (np.arange(n_kept) + 0.5) / n_kept * chance[-1])
    share, loc, cov = empty(n_kept).of(found.sums.map(by=lambda a: a[kept])).parameters(fourth)
    law = GaussianRows(
        share.ravel() / n_kept,
        (loc * unit + prior.center).reshape(-1, x.shape[1]),
        (cov * unit * unit[:, None]).reshape(-1, x.shape[1], x.shape[1]),
    )
    return MixtureEvidence(
        value - jacobian,
        error,
        found.log_z - jacobian,
        n_each * n_islands,
        len(found.path.powers),
        prior,
        law,
        _flags(error, chains.n_agreeing),
    )


def _flags(error: float, n_agreeing: int) -> tuple[str, ...]:
    flags = []
    if error > LARGE_SE:
        flags.append(f"se above {LARGE_SE:g}: reads too small")
    if n_agreeing < 2:
        flags.append(f"one chain of {N_CHAINS} alone has found the best clusters: there may be better ones")
    return tuple(flags)


def _check(rows: NDArray[np.floating], n_components: int, prior: MixturePrior, kind: str) -> None:
    """Refuse what has no finite evidence, and what is too large to be sampled."""
    if kind not in COVARIANCE_TYPES:
        raise ValueError(f"covariance_type must be one of {COVARIANCE_TYPES}, got {kind!r}")
    if not isinstance(n_components, Integral) or n_components < 1:
        raise ValueError(f"n_components must be an integer of at least 1, got {n_components!r}")
    if n_components > MAX_COMPONENTS:
        raise ValueError(
            f"the integrated evidence of a mixture sums over all orders of its components, {MAX_COMPONENTS} at most, "
            f"got {n_components}: use evidence='heldout', or fewer components"
        )
    n_cells = n_components * rows.shape[1] ** 2
    if n_cells > MAX_COVARIANCES:
        raise ValueError(
            f"the integrated evidence of a mixture holds covariances of up to {MAX_COVARIANCES} cells in all, got "
            f"{n_components} components of {rows.shape[1]} columns, {n_cells}: use evidence='bic', or fewer columns"
        )
    if np.isnan(rows).all():
        raise ValueError(
            f"the integrated evidence needs an observed cell, got none in rows of shape {rows.shape}"
        )
    constant = np.flatnonzero(~(np.diag(prior.covariance) > 0))
    if len(constant):
        raise ValueError(
            f"the integrated evidence needs columns that vary, got constant ones at {constant.tolist()}: drop them"
        )
    if kind in ("full", "tied"):
        least = np.linalg.eigvalsh(prior.scale(kind, 1))[0]
        if least < MIN_EIGENVALUE:
            raise ValueError(
                f"the prior of {kind} covariances needs a covariance of the table that is not singular, got an "
                f"eigenvalue of {least:.1e} in units of its columns: drop columns that repeat others, use more rows "
                "than columns, or covariance_type='diag'"
            )
