"""Laplace's evidence of a factor model on rows with missing cells, its information summed over what the rows show.

The formula is that of `laplace`; of complete rows it is the same number. What differs:

- the point of expansion has no closed form: a climb goes there (`bayes_mpt.predictors.gaussian.incomplete`). The
  variances var_i are those of the observed cells;
- H is the Fisher information of the observed cells, sum_g n_g I(o_g) over the patterns o_g of cells that n_g rows
  show, a matrix of d = T K + P numbers each way. The tangents G of the orbit are still directions without information:
  there H is the precision p of the loadings' prior and no more, so that log det (Q'HQ) = log det H - g log p. With one
  noise factor and more than `MAX_WHOLE` no matrix is made: its determinant is that of `laplace_wide`;
- the mean is integrated, mu | C ~ N(m0, C / kappa) with C = W W' + diag(psi) and kappa -> 0. Of complete rows that
  gives T/2 log(kappa / N), the same to all candidates, which is left out. What it gives beyond that with holes,

    -1/2 log det(H_mu C / N),    H_mu = sum_g n_g C_o^-1

  is another number for each: the fewer the latents, the less a row says of the means of cells that it does not show.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import svd

from bayes_mpt.evidence.factor_posterior import information
from bayes_mpt.evidence.laplace import NOISE_SHAPE, LaplaceEvidence, around_orbit, prior_precision
from bayes_mpt.evidence.laplace_wide import log_det_of_wide, sums_of_wide
from bayes_mpt.predictors.gaussian.incomplete import (
    Maximum,
    Pairs,
    maximise,
    refuse_constant_columns,
    too_few,
)
from bayes_mpt.predictors.gaussian.patterns import Patterns
from bayes_mpt.predictors.gaussian.profile import Factors, NoiseFloorError, Prior
from bayes_mpt.program.statistics import SufficientStatistics

__all__ = ["TooWideError", "expand", "laplace_fits", "laplace_of_cells"]

Array = NDArray[np.float64]

MAX_WHOLE = 2000  # loadings of one noise factor up to which H is made
MAX_FREE = 3000  # loadings and noises, where each token has its own: H is made
MAX_WIDE = 2 * 10**7  # T K^3 where H is not made: numbers in one array
NO_LOADING = 1e-6  # squares of V summed over the tokens, which a climb leaves where the maximum is at zero
NO_NOISE = 1e-12  # of the mean variance, as one factor for all columns


class TooWideError(ValueError):
    """More loadings than the evidence can be computed of."""


def laplace_fits(n_tokens: int, n_latents: int, *, tied: bool) -> bool:
    """Whether `laplace_of_cells` takes tables of this width; ``tied``: noise variances up to one factor are known."""
    n_loadings = n_tokens * n_latents
    if tied:
        return n_loadings <= MAX_WHOLE or n_tokens * n_latents**3 <= MAX_WIDE
    return n_loadings + n_tokens <= MAX_FREE


def laplace_of_cells(
    statistics: SufficientStatistics,
    n_latents: int,
    shape: Array | None = None,
    *,
    pairs: Pairs | None = None,
    n_init: int = 8,
    seed: int = 0,
) -> LaplaceEvidence:
    """Evidence of the observed cells, with loadings, noise variances and mean integrated.

    It is right where cells are missing at random given the observed ones.

    Parameters
    ----------
    statistics : SufficientStatistics
        Of the rows (N, T).
    n_latents : int
        K.
    shape : array of shape (T,), optional
        Known ratios of the noise variances (PPCA: ones), expanded at the maximum of the likelihood; by default each
        token has a noise variance of its own, expanded at their maximum a posteriori.
    pairs : Pairs, optional
        `bayes_mpt.predictors.gaussian.incomplete.pairs_of` both, where several numbers of latents are tried.
    n_init : int, default=8
        Starts of the climb.
    seed : int, default=0
        Of these.

    Raises
    ------
    TooWideError
        If there are more loadings than `laplace_fits` allows.
    NoiseFloorError, FewCellsError
        If these columns are reproduced without noise: constant, of few cells, or, with known ratios, all of them.
    ValueError
        If a column has no observed cell.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(200, 4)) * [3.0, 1.0, 1.0, 1.0]
    >>> x[rng.random(x.shape) < 0.2] = np.nan
    >>> table = SufficientStatistics(x)
    >>> scores = [laplace_of_cells(table, k, np.ones(4)).log_evidence for k in range(3)]
    >>> int(np.argmax(scores))
    1
    """
    count, _, square = (a.cpu().numpy() for a in statistics.of_cells())
    empty = np.flatnonzero(count == 0).tolist()
    if empty:
        raise ValueError(
            f"the Laplace evidence needs an observed cell in each column, got none at {empty}: drop them"
        )
    variance = square / count
    _check_width(len(count), n_latents, tied=shape is not None)
    of_noise = None
    if shape is None:
        refuse_constant_columns(statistics)
        few = too_few(statistics, n_latents)
        if few is not None:
            raise few
        of_noise = Prior(NOISE_SHAPE, NOISE_SHAPE / variance, statistics.n_rows)
    found = maximise(statistics, n_latents, shape, prior=of_noise, pairs=pairs, n_init=n_init, seed=seed)
    if found.interrupted:
        raise KeyboardInterrupt
    if shape is not None and found.noise[0] / shape[0] <= NO_NOISE * (variance / shape).mean():
        raise NoiseFloorError(list(range(len(shape))))
    rows, weight = (a.cpu().numpy() for a in statistics.rows())
    return expand(found, Patterns(rows, weight), variance, shape)


def _check_width(n_tokens: int, n_latents: int, *, tied: bool) -> None:
    if laplace_fits(n_tokens, n_latents, tied=tied):
        return
    limit = (
        f"n_features n_latents^3 up to {MAX_WIDE}" if tied else f"n_features (n_latents + 1) up to {MAX_FREE}"
    )
    raise TooWideError(
        f"the Laplace evidence of rows with missing cells takes {limit}, got {n_latents} latents of {n_tokens} "
        "columns: use fewer latents, or evidence='heldout'"
    )


def expand(at: Maximum, cells: Patterns, variance: Array, shape: Array | None = None) -> LaplaceEvidence:
    """The evidence of these cells, expanded at this point; ``variance`` (T,) of the tokens, for the prior."""
    root = np.sqrt(at.noise)
    u, s, _ = svd(at.loading / root[:, None], full_matrices=False)
    used = s**2 > NO_LOADING
    u, s = u[:, used], s[used]
    v = u * s
    share = at.noise / variance if shape is None else at.noise[:1] / shape[:1] / (variance / shape).mean()
    if shape is None or v.size <= MAX_WHOLE:
        fisher, of_mean = information(v, cells.shown, cells.count)
        log_det = _log_det(fisher, v, share)
    else:
        sums = sums_of_wide(v, cells.shown, cells.count)
        precision, curvature = prior_precision(v, share)
        log_det, of_mean = log_det_of_wide(sums, v, precision, float(curvature[0])), sums.mean
    lml = cells.n_rows * at.lml
    n_rows = float(cells.count[cells.shown.any(0)].sum())  # an empty row changes nothing
    # in units of psi^1/2, where C = I + V V'
    sign, size = np.linalg.slogdet(of_mean / n_rows)
    log_det_mean = float(size) + float(np.log1p(s**2).sum())
    if not sign > 0:
        raise FloatingPointError("the information of the mean is not positive: the Laplace evidence fails")
    value = around_orbit(lml, v, share, log_det) - 0.5 * log_det_mean
    return LaplaceEvidence(value, lml, Factors(at.lml, at.noise, 1 + s**2, u, at.n_iter))


def _log_det(fisher: Array, v: Array, share: Array) -> float:
    """log det(Q'HQ) by the information (T K + T, T K + T) of V and log psi."""
    n_loadings, n_latents = v.size, v.shape[1]
    precision, curvature = prior_precision(v, share)
    if len(share) == 1:  # d log psi_i = d log c
        h = np.empty((n_loadings + 1, n_loadings + 1))
        h[:-1, :-1] = fisher[:n_loadings, :n_loadings]
        h[-1, :-1] = h[:-1, -1] = fisher[:n_loadings, n_loadings:].sum(1)
        h[-1, -1] = fisher[n_loadings:, n_loadings:].sum()
    else:
        h = fisher
    own = np.arange(len(h))
    h[own, own] += np.concatenate([np.full(n_loadings, precision), curvature])
    sign, log_det = np.linalg.slogdet(h)
    if not sign > 0:
        raise FloatingPointError("the information is not positive: the Laplace evidence fails")
    n_tangents = n_latents * (n_latents - 1) // 2
    return float(log_det) - (n_tangents * math.log(precision) if n_tangents else 0.0)
