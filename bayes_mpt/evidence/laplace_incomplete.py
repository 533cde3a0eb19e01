"""Laplace's evidence of a factor model on rows with missing cells, its information summed over what the rows show.

The formula is that of `laplace`; of complete rows it is the same number. What differs:

- the point of expansion has no closed form: a climb goes there (`bayes_mpt.predictors.gaussian.incomplete`);
- H is the Fisher information of the observed cells, sum_g n_g I(o_g) over the patterns o_g of cells that n_g rows
  show, a matrix of d = T K + P numbers each way. The tangents G of the orbit are still directions without information:
  there H is the precision p of the loadings' prior and no more, so that log det (Q'HQ) = log det H - g log p. Of more
  than `MAX_COORDINATES` no matrix is made: with one noise factor its determinant is that of `laplace_wide`;
- the mean. Of complete rows, under mu | C ~ N(m0, C / kappa) with C = W W' + diag(psi), integrating it adds
  T/2 log(kappa / (N + kappa)) to every candidate, which is left out. With holes that is another number for each:

    log int p(rows | mu) p(mu) dmu - log p(rows | mean) - T/2 log(kappa / (N + kappa))
        = -1/2 log det((H_mu + kappa C^-1) C) + T/2 log(N + kappa) - kappa/2 (mean - m0)' C^-1 (mean - m0)

  with H_mu = sum_g n_g C_o^-1, which is N C^-1 of complete rows: then it is zero at m0 = mean.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import svd

from bayes_mpt.evidence.factor_posterior import information
from bayes_mpt.evidence.factor_prior import FactorPrior
from bayes_mpt.evidence.laplace import NOISE_SHAPE, LaplaceEvidence, around_orbit, prior_precision
from bayes_mpt.evidence.laplace_wide import log_det_of_wide, sums_of_wide
from bayes_mpt.predictors.gaussian.incomplete import Maximum, maximise, refuse_constant_columns, too_few
from bayes_mpt.predictors.gaussian.patterns import Patterns
from bayes_mpt.predictors.gaussian.profile import Factors, NoiseFloorError, Prior
from bayes_mpt.program.statistics import SufficientStatistics

__all__ = ["MAX_COORDINATES", "MAX_WIDE", "TooWideError", "expand", "laplace_of_cells"]

Array = NDArray[np.float64]

MAX_COORDINATES = 3000  # loadings and noises up to which H is made
MAX_WIDE = 2 * 10**7  # numbers in one array where it is not
NO_LOADING = 1e-6  # squares of V summed over the tokens, which a climb leaves where the maximum is at zero
NO_NOISE = 1e-12  # of the mean variance, as one factor for all columns


class TooWideError(ValueError):
    """More loadings than the evidence can be computed of."""


def laplace_of_cells(
    statistics: SufficientStatistics,
    n_latents: int,
    prior: FactorPrior,
    shape: Array | None = None,
    *,
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
    prior : FactorPrior
        Of which m0, kappa and the variances are taken: the same for all candidates of a table. The scale of the
        loadings is that of the fit, as for complete rows.
    shape : array of shape (T,), optional
        Known ratios of the noise variances (PPCA: ones), expanded at the maximum of the likelihood; by default each
        token has a noise variance of its own, expanded at their maximum a posteriori.
    n_init : int, default=8
        Starts of the climb.
    seed : int, default=0
        Of these.

    Raises
    ------
    TooWideError
        If there are more loadings and noises than `MAX_COORDINATES`; with known ratios T K^3 beyond `MAX_WIDE` too.
    ValueError
        If a column has no observed cell.
    NoiseFloorError, FewCellsError
        If these columns are reproduced without noise: constant, of few cells, or, with known ratios, all of them.

    Examples
    --------
    >>> from bayes_mpt.evidence import factor_prior
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(200, 4)) * [3.0, 1.0, 1.0, 1.0]
    >>> x[rng.random(x.shape) < 0.2] = np.nan
    >>> table, prior = SufficientStatistics(x), factor_prior(x)
    >>> scores = [laplace_of_cells(table, k, prior, np.ones(4)).log_evidence for k in range(3)]
    >>> int(np.argmax(scores))
    1
    """
    _check(statistics, n_latents, shape)
    n_rows = statistics.n_rows
    of_noise = Prior(NOISE_SHAPE, NOISE_SHAPE / prior.variances, n_rows) if shape is None else None
    found = maximise(statistics, n_latents, shape, prior=of_noise, n_init=n_init, seed=seed)
    if found.interrupted:
        raise KeyboardInterrupt
    if shape is not None and found.noise[0] < NO_NOISE * prior.units(shape)[0]:
        raise NoiseFloorError(list(range(len(shape))))
    rows, weight = (a.cpu().numpy() for a in statistics.rows())
    return expand(found, Patterns(rows, weight), prior, shape)


def _check(statistics: SufficientStatistics, n_latents: int, shape: Array | None) -> None:
    """Refuse what has no point to expand at, and what is too large."""
    n_tokens = len(statistics.mean)
    empty = (statistics.of_cells()[0] == 0).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(
            f"the Laplace evidence needs an observed cell in each column, got none at {empty}: drop them"
        )
    size = n_tokens * (n_latents + 1)
    if shape is not None:
        if size > MAX_COORDINATES and n_tokens * n_latents**3 > MAX_WIDE:
            raise TooWideError(
                f"the Laplace evidence of rows with missing cells holds n_features n_latents^3 numbers, {MAX_WIDE} at "
                f"most: {n_latents} latents of {n_tokens} columns are too many. Use evidence='heldout', or fewer "
                "latents"
            )
        return
    if size > MAX_COORDINATES:
        raise TooWideError(
            f"the Laplace evidence of factor analysis with missing cells takes up to {MAX_COORDINATES} loadings and "
            f"noise variances: {n_latents} latents of {n_tokens} columns have {size}. Use evidence='heldout', fewer "
            "latents, or PPCA"
        )
    refuse_constant_columns(statistics)
    few = too_few(statistics, n_latents)
    if few is not None:
        raise few


def expand(at: Maximum, cells: Patterns, prior: FactorPrior, shape: Array | None = None) -> LaplaceEvidence:
    """The evidence of these cells, expanded at this point."""
    root = np.sqrt(at.noise)
    u, s, _ = svd(at.loading / root[:, None], full_matrices=False)
    used = s**2 > NO_LOADING
    u, s = u[:, used], s[used]
    v, share = u * s, at.noise / prior.units(shape)
    n_rows = float(cells.count[cells.shown.any(0)].sum())  # an empty row changes nothing
    lml = cells.n_rows * at.lml
    share = share if shape is None else share[:1]
    if v.size + len(share) <= MAX_COORDINATES:
        fisher, of_mean = information(v, cells.shown, cells.count)
        log_det = _log_det(fisher, v, share)
    else:
        sums = sums_of_wide(v, cells.shown, cells.count)
        precision, curvature = prior_precision(v, share)
        log_det, of_mean = log_det_of_wide(sums, v, precision, float(curvature[0])), sums.mean
    value = around_orbit(lml, v, share, log_det)
    value += _of_mean(of_mean, v, (at.mean - prior.center) / root, n_rows, prior.kappa)
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
    return float(log_det) - (n_tangents * np.log(precision) if n_tangents else 0.0)


def _of_mean(info: Array, v: Array, off: Array, n_rows: float, kappa: float) -> float:
    """What integrating the mean adds beyond complete rows; all in units of psi^1/2, where C = I + V V'."""
    n_tokens = len(v)
    m = np.eye(v.shape[1]) + v.T @ v
    inverse = np.eye(n_tokens) - v @ np.linalg.solve(m, v.T)  # C^-1
    log_det = np.linalg.slogdet(info + kappa * inverse)[1] + np.linalg.slogdet(m)[1]
    return float(0.5 * (n_tokens * np.log(n_rows + kappa) - log_det - kappa * off @ inverse @ off))
