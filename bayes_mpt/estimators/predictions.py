"""What a fitted program says of rows: their scores, latents, missing cells, labels, and y."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayes_mpt.estimators.fitted import Fitted
from bayes_mpt.estimators.rows import refuse_far, refuse_missing, warn_of_far
from bayes_mpt.inputs import read_numbers, tensor_of
from bayes_mpt.masks import PermutationChain, Policy, check_policy
from bayes_mpt.predictors import Predictive
from bayes_mpt.predictors.base import together
from bayes_mpt.predictors.new_rows import means_of_new
from bayes_mpt.program.affine import token_means
from bayes_mpt.program.arguments import fill_all, same_cells
from bayes_mpt.program.layout import token_values
from bayes_mpt.program.offers import offered
from bayes_mpt.program.program import ModelError
from bayes_mpt.program.run import run
from bayes_mpt.program.shifts import of_cells
from bayes_mpt.program.statistics import SufficientStatistics
from bayes_mpt.score import ScoreEstimate, estimate

__all__ = [
    "covariance",
    "estimate_score",
    "impute",
    "label_probabilities",
    "latent_means",
    "missing_sd",
    "precision",
    "predict_y",
    "score_rows",
    "token_means_of",
]

Rows = NDArray[np.floating]


def score_rows(fitted: Fitted, rows: Rows, y: Any) -> tuple[NDArray[np.float64], float]:
    """Nats of each row (N,), and the standard error of their sum, 0 where the score is exact."""
    bound, structure = fitted.bound, fitted.bound.structure
    if structure.gaussian_vector:
        return _score_given_seen(fitted, rows, y), 0.0
    if structure.scores_input or not structure.by_row or bound.structure.takes_visible:
        with fitted.read(rows, y) as read:
            found = read.evidence()
    else:
        with torch.no_grad():
            found = together(fitted.each(lambda read: read.evidence(), rows, y))
    by_row = found.by_row.cpu().numpy()
    _warn_of_far(by_row, fitted, rows, y)
    return by_row, found.se


def _warn_of_far(nats: NDArray[np.floating], fitted: Fitted, rows: Rows, y: Any) -> None:
    """Scores of rows (N,), or of all of them (1,), that are -inf because a cell of X or y is as good as infinite."""
    if np.isfinite(nats).all() or len(nats) not in (1, len(rows)):
        return
    cells, names = rows, list(fitted.names)
    if y is not None and fitted.y_like is not None:
        observed = read_numbers(y, len(rows)).astype(np.float64).reshape(len(rows), -1)
        cells = np.hstack([rows, observed])
        names += ["y"] if observed.shape[1] == 1 else [f"y[:, {j}]" for j in range(observed.shape[1])]
    warn_of_far(np.broadcast_to(nats, len(rows)), cells, names, _precision(fitted))


def _precision(fitted: Fitted) -> Any:
    """In which rows are read."""
    return np.float32 if offered(fitted.model, "dtype") == torch.float32 else np.float64


def _told(found: Tensor, fitted: Fitted, rows: Rows) -> Rows:
    """An answer for each row (N, ...); refused where a cell is as good as infinite."""
    answer = found.cpu().numpy()
    if len(answer) == len(rows):
        refuse_far(answer, rows, fitted.names, _precision(fitted))
    return answer


def _score_given_seen(fitted: Fitted, rows: Rows, y: Any) -> NDArray[np.float64]:
    """log p(y_i | x_i, training rows) (N,)."""
    if y is None:
        raise ValueError("this model scores y given X: pass y")
    found = _predictive(fitted, rows)
    value = fitted.arguments(rows, y)[1].to(found.mean).reshape(found.mean.shape)
    normal = torch.distributions.Normal(found.mean, found.var.sqrt(), validate_args=False)
    nats = normal.log_prob(value).cpu().numpy()
    seen = np.where(np.isnan(nats), 0.0, nats)  # NaN where y is missing
    _warn_of_far(seen, fitted, rows, y)
    return nats


# ------------------------------------------------------------------------------------------- latents and cells


def latent_means(fitted: Fitted, rows: Rows, y: Any) -> Rows:
    """Posterior means of the latents given each row's observed cells (N, K); of discrete ones probabilities."""
    with torch.no_grad():
        means = fitted.each(lambda read: read.posterior().mean, rows, y)
    return _told(torch.cat(means), fitted, rows)


def token_means_of(fitted: Fitted, latents: Rows) -> Rows:
    """Means of the tokens given latents: (N, K) -> (N, T)."""
    reading = fitted.shared_map("inverse_transform")
    z = tensor_of(latents).to(reading.loc)
    n_latents = fitted.bound.structure.n_latents
    if z.shape[1] != n_latents:
        raise ValueError(f"latents must have shape (N, {n_latents}), got {tuple(z.shape)}")
    # u = R^-1 (z - b), x = loc + W u
    u = torch.linalg.solve(reading.latent_root[0], (z - reading.latent_loc[0]).mT).mT
    return fitted.unshifted((reading.loc[0] + u @ reading.loading[0][:, :n_latents].mT).cpu().numpy())


def impute(fitted: Fitted, rows: Rows, y: Any) -> Rows:
    """Rows with their NaN cells replaced by their means given the observed cells of the row."""
    with torch.no_grad():
        cells = fitted.tensor(rows)
        parts = fitted.each(lambda read: (read.value, read.posterior().tokens), rows, y)
        x = torch.cat([part[0] for part in parts])
        _refuse_gaps_in_line(x.isnan(), fitted)
        tokens = torch.where(x.isnan(), torch.cat([part[1] for part in parts]), x)
        if same_cells(x, cells):
            filled = tokens
        else:
            args = fitted.arguments(rows, y)
            with fitted.program(args):
                where = _cells_of(fitted, args)
            filled = cells.flatten().index_copy(0, where, tokens.flatten()).reshape(cells.shape)
    return fitted.unshifted(_told(filled, fitted, rows))


def _refuse_gaps_in_line(missing: Tensor, fitted: Fitted) -> None:
    """Refuse to impute tokens (N, T) that look at missing ones, of which they would take a filler for the value."""
    order = fitted.bound.structure.order
    for before, after in () if order is None else order.looks:
        if bool((missing[:, list(before)].any(1) & missing[:, list(after)].any(1)).any()):
            raise ModelError(
                "a missing cell looks at another missing one: the mean of the second is not all that the first depends "
                "on. Impute one step, and sample from there on, or make the series a latent that is observed with noise"
            )


def missing_sd(fitted: Fitted, rows: Rows) -> NDArray[np.float64]:
    """Standard deviations (N, T) of the NaN cells given the observed ones of the row; 0 where observed.

    Of rows that share a linear-Gaussian map: the diagonal of C_hh - C_ho C_oo^-1 C_oh.
    """
    structure = fitted.bound.structure
    if not structure.scores_input:
        draws = structure.order is None and structure.by_row and structure.observed_argument == 0
        raise ValueError(
            "return_std needs a program that observes the cells of X themselves by Normal sites, row by row"
            + (": use sample_missing" if draws and not structure.affine else "; impute gives the means alone")
        )
    cov = covariance(fitted).astype(np.float64)
    sd = np.zeros(rows.shape)
    patterns, index = np.unique(np.isnan(rows), axis=0, return_inverse=True)
    for g, hidden in enumerate(patterns):
        if hidden.any():
            seen = ~hidden
            known = cov[np.ix_(hidden, seen)]
            rest = cov[np.ix_(hidden, hidden)] - known @ np.linalg.solve(cov[np.ix_(seen, seen)], known.T)
            sd[np.ix_(index.reshape(-1) == g, hidden)] = np.sqrt(np.maximum(np.diag(rest), 0.0))
    return sd


def _cells_of(fitted: Fitted, args: tuple[Any, ...]) -> Tensor:
    """Which cell of X each token is, in reading order: a column at a time is marked with numbers of its own."""
    structure = fitted.bound.structure
    model, filled = of_cells(fitted.model, structure.shifts), fill_all(args)
    generator = torch.Generator().manual_seed(0)
    found: Tensor | None = None
    with pyro.validation_enabled(False):
        for column in range(filled[0].shape[1]):
            marks = torch.rand(len(filled[0]), generator=generator, dtype=torch.float64).to(filled[0])
            marked = filled[0].clone()
            marked[:, column] = marks
            try:
                trace = run(model, (marked, *filled[1:]))
            except (RuntimeError, ValueError, IndexError):
                continue  # an index, say: no token
            value = token_values(trace, structure).flatten()
            found = torch.full_like(value, -1, dtype=torch.long) if found is None else found
            row = torch.searchsorted(marks.sort().values, value).clamp(max=len(marks) - 1)
            row = marks.argsort()[row]
            is_mark = marks[row] == value
            found[is_mark] = (row * filled[0].shape[1] + column)[is_mark]
    if found is None or bool((found < 0).any()):
        raise ValueError(
            f"impute fills cells of X, but not every token of site {structure.observed!r} is one of them "
            "(transformed, computed from several, or y): observe cells of x themselves"
        )
    return found


def label_probabilities(fitted: Fitted, rows: Rows) -> NDArray[np.float64]:
    """Probabilities of the values of each row's one discrete latent given its observed cells: (N, K)."""
    with torch.no_grad():
        parts = fitted.each(lambda read: read.posterior().labels(), rows)
    return _told(torch.cat(parts), fitted, rows).astype(np.float64)


# ------------------------------------------------------------------------------------------------------ y of rows


def predict_y(fitted: Fitted, rows: Rows, *, return_std: bool, return_cov: bool) -> Any:
    """Means of y (M,), with their standard deviations or covariance where these are asked for."""
    bound = fitted.bound
    if bound.structure.gaussian_vector:
        found = _predictive(fitted, rows, full=return_cov)
        mean = found.mean.cpu().numpy()
        if return_cov:
            assert found.cov is not None
            return mean, found.cov.cpu().numpy()
        return (mean, found.var.sqrt().cpu().numpy()) if return_std else mean
    if return_std or return_cov:
        raise ValueError(
            f"{bound.name} predicts means only: return_std and return_cov need observations that are one Gaussian "
            "vector"
        )
    if bound.structure.order is not None:
        raise ValueError(
            f"observations of site {bound.structure.observed!r} look at earlier ones, and those of new rows are not "
            "known: predict one step, put it into y, and predict the next with the program itself"
        )
    model = of_cells(fitted.model, bound.structure.shifts)
    args, draws = fitted.new_arguments(rows), fitted.latents.shared
    if fitted.latents.growing:
        assert fitted.seen is not None and draws
        with fitted.program(fitted.seen) as _, torch.no_grad():
            return means_of_new(model, fitted.seen, args, fitted.latents.growing, draws).cpu().numpy()
    names = bound.structure.site_names
    with fitted.program(args) as _, torch.no_grad():
        means = [share * token_means(model, args, names, values) for share, values in draws or [(1.0, {})]]
        return torch.stack(means).sum(0).cpu().numpy()


def _predictive(fitted: Fitted, rows: Rows, *, full: bool = False) -> Predictive:
    """New observations given those of the training rows."""
    assert fitted.seen is not None
    refuse_missing(rows, fitted.names)
    new = fitted.new_arguments(rows)
    with fitted.program(fitted.seen) as predictor, torch.no_grad():
        return predictor.read(fitted.seen).predict(new, full=full)


# ----------------------------------------------------------------------------------------------------- all rows


def covariance(fitted: Fitted) -> NDArray[np.float64]:
    """W W' + diag(noise), (T, T)."""
    reading = fitted.shared_map("get_covariance")
    loading = reading.loading[0]
    return (loading @ loading.mT + torch.diag(reading.noise[0])).cpu().numpy()


def precision(fitted: Fitted) -> NDArray[np.float64]:
    """Its inverse, by Woodbury."""
    reading = fitted.shared_map("get_precision")
    loading, noise = reading.loading[0], reading.noise[0]
    scaled = loading / noise[:, None]
    inner = torch.eye(loading.shape[1], dtype=loading.dtype, device=loading.device) + loading.mT @ scaled
    return (torch.diag(1 / noise) - scaled @ torch.linalg.solve(inner, scaled.mT)).cpu().numpy()


def estimate_score(
    fitted: Fitted, rows: Rows, y: Any, masks: Policy | None, n_replicates: int
) -> ScoreEstimate:
    """The log marginal likelihood of rows by a mask policy, with its error over masks."""
    masks = PermutationChain() if masks is None else masks
    check_policy(masks)
    with fitted.read(rows, y) as read:
        x, moments = read.value, None
        few = not read.structure.dense or len(x) <= 2 * x.shape[1]
        if not few and read.structure.scores_input:
            moments = SufficientStatistics(x, str(x.device)).rows(x.dtype)
        return estimate(read, masks, n_replicates=n_replicates, random_state=fitted.draws, curve_rows=moments)
