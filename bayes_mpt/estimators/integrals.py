"""Evidence of a fitted program with what was point-estimated integrated: by Laplace, or by importance sampling."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from bayes_mpt import training
from bayes_mpt.estimators.fit import parameters
from bayes_mpt.estimators.fitted import Fitted
from bayes_mpt.estimators.repeats import repeated_columns
from bayes_mpt.estimators.rows import refuse_missing, refuse_unobserved
from bayes_mpt.evidence.factor_prior import FactorPrior, factor_prior
from bayes_mpt.evidence.hyperparameters import assign, hyperprior, log_likelihood, predictions
from bayes_mpt.evidence.integrated import IntegratedEvidence, Nodes, integrate
from bayes_mpt.evidence.laplace import LaplaceEvidence, laplace_diagonal, laplace_proportional
from bayes_mpt.evidence.laplace_incomplete import laplace_fits, laplace_of_cells
from bayes_mpt.evidence.mixture import MixtureEvidence, mixture_evidence
from bayes_mpt.evidence.mixture_laplace import MixtureLaplace, laplace_mixture
from bayes_mpt.evidence.mixture_prior import MixturePrior, mixture_prior
from bayes_mpt.evidence.sampled import MAX_PARAMETERS, SampledEvidence, n_parameters, sample_evidence
from bayes_mpt.models.mixtures import GaussianMixture
from bayes_mpt.predictors import Batch, Objective
from bayes_mpt.predictors.base import Frozen
from bayes_mpt.predictors.gaussian.incomplete import FewCellsError
from bayes_mpt.predictors.gaussian.profile import NoiseFloorError, spectrum
from bayes_mpt.program.offers import name_of, offered
from bayes_mpt.program.program import list_names
from bayes_mpt.program.statistics import SufficientStatistics
from bayes_mpt.program.store import save
from bayes_mpt.runtime.serial import one_thread

__all__ = [
    "MAX_CELLS",
    "affordable",
    "allocated_evidence",
    "at_mode",
    "evidence_of",
    "integrated_evidence",
    "laplace_applies",
    "laplace_evidence",
    "n_hyperparameters",
    "noise_shape",
    "predictions_over",
    "sampled_evidence",
]

N_TRIAL = 8  # rows
SAME = 1e-5  # of the standard deviations, in single precision too
MAX_CELLS = 20_000  # of a table with holes, of which all rows count at every step: some 30 s of CPU time


def noise_shape(fitted: Fitted) -> NDArray[np.float64] | str | None:
    """For the Laplace evidence: known ratios of the noise variances, "free", or None where it does not apply."""
    if fitted.noise_parameter is None or not fitted.bound.structure.scores_input:
        return None
    noise, n_columns = np.atleast_1d(fitted.params[fitted.noise_parameter]), len(fitted.names)
    if len(noise) == 1:
        return np.ones(n_columns)
    return "free" if len(noise) == n_columns else None


def laplace_evidence(fitted: Fitted, rows: NDArray[np.floating]) -> LaplaceEvidence | MixtureLaplace:
    """Evidence of rows with loadings and noise variances integrated out, or all parameters of a Gaussian mixture."""
    if type(fitted.model) is GaussianMixture:
        return _laplace_of_mixture(fitted, fitted.model.covariance_type, rows)
    own = fitted.moments_of(rows)
    statistics = SufficientStatistics(rows, fitted.device, fitted.shift) if own is None else own
    shape = noise_shape(fitted)
    if shape is None:
        raise ValueError(
            "the Laplace evidence needs a factor model that declares its symmetries, {'rotations': name of the noise "
            f"variance}}, or a GaussianMixture with full covariances, got {name_of(fitted.model)}: use "
            "evidence='heldout'"
        )
    if not statistics.complete:
        return _laplace_of_cells(fitted, rows, statistics, None if isinstance(shape, str) else shape)
    cov, k = statistics.covariance, fitted.bound.structure.n_latents
    try:
        if k >= len(statistics.mean):
            raise NoiseFloorError(list(range(k)))
        with one_thread(statistics.n_cells):
            if isinstance(shape, np.ndarray):
                return laplace_proportional(cov, statistics.n, k, shape)
            return laplace_diagonal(cov, statistics.n, k)
    except NoiseFloorError as error:
        rank = spectrum(cov, np.ones(len(statistics.mean)), 0).rank
        raise ValueError(
            f"{k} latents leave no direction for the noise of these rows (n_samples = {statistics.n}, n_features = "
            f"{len(statistics.mean)}, rank {rank}): use fewer latents, or drop columns that repeat others "
            f"({list_names(map(str, fitted.names[repeated_columns(rows)])) or 'none found'})"
        ) from error


def _laplace_of_mixture(fitted: Fitted, kind: str, rows: NDArray[np.floating]) -> MixtureLaplace:
    """The Laplace evidence of a Gaussian mixture."""
    if kind != "full":
        raise ValueError(
            f"the Laplace evidence of a mixture needs covariance_type='full', got {kind!r}: use evidence='bic' or "
            "'heldout'"
        )
    refuse_unobserved(np.isnan(rows).all(0), fitted.names)
    params = {name: np.asarray(value, dtype=np.float64) for name, value in fitted.params.items()}
    root, rows = params["scale_tril"], np.asarray(rows, dtype=np.float64)
    prior = mixture_prior(rows)
    return laplace_mixture(rows, prior, params["weights"], params["loc"], root @ root.swapaxes(1, 2))


def _laplace_of_cells(
    fitted: Fitted,
    rows: NDArray[np.floating],
    statistics: SufficientStatistics,
    shape: NDArray[np.float64] | None,
) -> LaplaceEvidence:
    """The Laplace evidence where cells are missing."""
    refuse_unobserved(np.isnan(rows).all(0), fitted.names)
    k = fitted.bound.structure.n_latents
    try:
        with one_thread(statistics.n_cells):
            return laplace_of_cells(statistics, k, shape)
    except (NoiseFloorError, FewCellsError) as error:
        names = list_names(map(str, fitted.names[error.columns]))
        raise ValueError(
            f"{k} latents reproduce the observed cells of these columns without noise, so that the Laplace evidence "
            f"has no point to expand at: {names}. They are constant, or have too few cells: use fewer latents, or drop "
            "them"
        ) from error


def laplace_applies(fitted: Fitted) -> bool:
    """Whether `laplace_evidence` applies, also to as large a table."""
    shape = noise_shape(fitted)
    if shape is None:
        return False
    tied, k = not isinstance(shape, str), fitted.bound.structure.n_latents
    return fitted.complete or laplace_fits(len(fitted.names), k, tied=tied)


def affordable(fitted: Fitted) -> bool:
    """Whether `sampled_evidence` applies, and takes seconds at most."""
    shape, statistics = noise_shape(fitted), fitted.statistics
    if shape is None or statistics is None:
        return False
    free, k = None if isinstance(shape, str) else shape, fitted.bound.structure.n_latents
    if n_parameters(len(fitted.names), k, free, fitted.complete) > MAX_PARAMETERS:
        return False
    return fitted.complete or statistics.n_cells <= MAX_CELLS


def _refuse_fixed_loadings(fitted: Fitted, rows: NDArray[np.floating]) -> None:
    """Refuse a program whose declared symmetry is none: a random rotation of its loadings must leave C as it is."""
    if fitted.posterior is not None:  # tried before it was averaged
        return
    shared = fitted.shared_map("the sampled evidence")
    k, n_tokens = fitted.bound.structure.n_latents, len(fitted.names)
    if k < 2:  # nothing to turn but signs
        return
    loading, noise = shared.loading[0].double(), shared.noise[0].double()
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64))[0]
    state, found = dict(fitted.state), False
    for name, value in state.items():
        if value.shape == (n_tokens, k):
            state[name], found = value @ turn.to(value), True
        elif value.shape == (k, n_tokens):
            state[name], found = turn.to(value).mT @ value, True
    if found:
        args = (fitted.tensor(rows[:N_TRIAL]),)
        with replace(fitted, state=state).program(args) as bound, torch.no_grad():
            turned = bound.read(args).linear_map()
        assert turned is not None
        other, rest = turned.loading[0].double(), turned.noise[0].double()
        change = (other @ other.mT - loading @ loading.mT + torch.diag(rest - noise)).abs()
        size = (loading.square().sum(1) + noise).sqrt()
        found = bool((change <= SAME * size[:, None] * size).all())
    if not found:
        raise ValueError(
            f"{name_of(fitted.model)} declares its loadings free up to rotation, but has no parameter of shape "
            f"({n_tokens}, {k}) or ({k}, {n_tokens}) that can be turned without changing the covariance: the "
            "evidence would be of another model. Drop the declaration, and use evidence='heldout'"
        )


def sampled_evidence(
    fitted: Fitted,
    rows: NDArray[np.floating],
    prior: FactorPrior | None = None,
    *,
    se: float = 0.1,
    max_particles: int = 1024,
    seed: int = 0,
) -> SampledEvidence:
    """Evidence of rows with loadings, noise variances and mean integrated, and its error.

    Parameters
    ----------
    fitted : Fitted
        A factor model that declares its symmetries.
    rows : array of shape (N, T)
    prior : FactorPrior, optional
        The same for all candidates of a table; by default `bayes_mpt.evidence.factor_prior.factor_prior` of the rows.
    se, max_particles, seed
        As in `bayes_mpt.evidence.sampled.sample_evidence`.
    """
    shape = noise_shape(fitted)
    if shape is None:
        raise ValueError(
            "the sampled evidence needs a factor model that declares its symmetries, {'rotations': name of the noise "
            f"variance}}, got {name_of(fitted.model)}: use evidence='heldout'"
        )
    _refuse_fixed_loadings(fitted, rows)
    prior = factor_prior(rows) if prior is None else prior
    k, free = fitted.bound.structure.n_latents, None if isinstance(shape, str) else shape
    # far from zero only differences have digits: the rows as the program sees them, and their prior
    shift = np.zeros(rows.shape[1]) if fitted.shift is None else fitted.shift
    statistics = SufficientStatistics(rows, fitted.device, fitted.shift)
    near = replace(prior, center=prior.center - shift)
    with one_thread(statistics.n_cells):
        found = sample_evidence(
            statistics, k, near, shape=free, se=se, max_particles=max_particles, seed=seed
        )
    return replace(found, prior=prior, draws=found.draws.shifted(shift))


def allocated_evidence(
    fitted: Fitted,
    rows: NDArray[np.floating],
    prior: MixturePrior | None = None,
    *,
    se: float = 0.1,
    max_particles: int = 1024,
    seed: int = 0,
) -> MixtureEvidence:
    """Evidence of rows under a Gaussian mixture with weights, means and covariances integrated, and its error.

    Parameters
    ----------
    fitted : Fitted
        A `GaussianMixture`.
    rows : array of shape (N, T)
    prior : MixturePrior, optional
        The same for all candidates of a table; by default `bayes_mpt.evidence.mixture_prior.mixture_prior` of the rows.
    se, max_particles, seed
        As in `bayes_mpt.evidence.mixture.mixture_evidence`.
    """
    assert type(fitted.model) is GaussianMixture
    k, kind = int(fitted.model.n_components), fitted.model.covariance_type
    refuse_unobserved(np.isnan(rows).all(0), fitted.names)
    x = np.asarray(rows, dtype=np.float64)
    prior = mixture_prior(x) if prior is None else prior
    with one_thread(x.size):
        return mixture_evidence(
            x, k, prior, covariance_type=kind, se=se, max_particles=max_particles, seed=seed
        )


def n_hyperparameters(fitted: Fitted) -> int | None:
    """For the integrated evidence: how many parameters have a prior; None where it does not apply."""
    names = fitted.bound.structure.parameters
    if fitted.drawn or (names and offered(fitted.model, "hyperprior") is None):
        return None
    return sum(fitted.params[name].size for name in names)


def evidence_of(
    fitted: Fitted,
    rows: NDArray[np.floating],
    y: Any,
    prior: FactorPrior | MixturePrior | None,
    se: float,
    max_particles: int,
) -> IntegratedEvidence | SampledEvidence | MixtureEvidence:
    """Evidence of rows with what was point-estimated integrated, in the way that the model allows."""
    # a subclass may run another program
    mixture, factors = type(fitted.model) is GaussianMixture, noise_shape(fitted) is not None
    taken = MixturePrior if mixture else FactorPrior if factors else None
    if prior is not None and (taken is None or not isinstance(prior, taken)):
        raise TypeError(
            f"the evidence of {name_of(fitted.model)} takes {'no prior' if taken is None else f'a {taken.__name__}'}, "
            f"got {type(prior).__name__}"
        )
    if mixture:
        own = cast(MixturePrior | None, prior)
        return allocated_evidence(fitted, rows, own, se=se, max_particles=max_particles, seed=fitted.draws)
    if factors:
        of_factors = cast(FactorPrior | None, prior)
        return sampled_evidence(
            fitted, rows, of_factors, se=se, max_particles=max_particles, seed=fitted.draws
        )
    return integrated_evidence(fitted, rows, y, se)


def integrated_evidence(fitted: Fitted, rows: NDArray[np.floating], y: Any, se: float) -> IntegratedEvidence:
    """Evidence of rows with the hyper-parameters integrated under the model's hyperprior.

    Examples
    --------
    >>> from bayes_mpt import BayesMPT
    >>> from bayes_mpt.models import GaussianProcess
    >>> rng = np.random.default_rng(0)
    >>> X = rng.uniform(size=(40, 1))
    >>> y = np.sin(6 * X[:, 0]) + 0.1 * rng.normal(size=40)
    >>> model = BayesMPT(GaussianProcess()).fit(X, y)
    >>> found = model.integrated(X, y)
    >>> bool(found.log_evidence < model.log_marginal_likelihood_), bool(found.se < 0.2)
    (True, True)
    """
    args = fitted.arguments(rows, y)
    if n_hyperparameters(fitted) is None:
        raise ValueError(
            f"the integrated evidence needs a model that offers hyperprior(x, y) and an LML without draws, got "
            f"{name_of(fitted.model)}: use evidence='heldout', 'bic' or 'train'"
        )
    with one_thread(len(rows) ** 2), fitted.program(args) as predictor:
        problem = training.Problem(Objective(predictor, Batch(args, 1)))
        leaves = problem.of_program()
        if not leaves:
            return IntegratedEvidence(float(problem.score()), 0.0, 1.0, math.nan, 1, ())
        prior = hyperprior(fitted.model, args, leaves)
        assert prior is not None
        current = torch.cat([leaf.detach().flatten() for leaf in leaves.values()]).cpu().double().numpy()
        likelihood = log_likelihood(predictor, args, leaves)
        found = integrate(likelihood, prior, current=current, seed=fitted.draws, max_se=se)
    return found._replace(names=tuple(leaves))


def predictions_over(
    fitted: Fitted, rows: NDArray[np.floating], nodes: Nodes
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means and variances (S, M) of new observations given those of the training rows, at each node of an evidence."""
    assert fitted.seen is not None
    refuse_missing(rows, fitted.names)
    seen, new = fitted.seen, fitted.new_arguments(rows)
    with one_thread(len(seen[0]) ** 2), fitted.program(seen) as predictor:
        leaves = training.Problem(Objective(predictor, Batch(seen, 1))).of_program()
        return predictions(predictor, seen, new, leaves, nodes.theta)


def at_mode(fitted: Fitted, rows: NDArray[np.floating], y: Any, found: IntegratedEvidence) -> Fitted:
    """The program at the maximum a posteriori that `integrated_evidence` found on the training rows."""
    if not found.modes:
        return fitted
    args = fitted.arguments(rows, y)
    with one_thread(len(rows) ** 2), fitted.program(args) as predictor, torch.no_grad():
        problem = training.Problem(Objective(predictor, Batch(args, 1)))
        assign(problem.of_program(), torch.as_tensor(found.modes[0].theta))
        read = problem.objective.read()
        state = save()
        return replace(
            fitted,
            total=float(problem.score_of(read)),
            bound=Frozen(predictor, read),
            state=state,
            params=parameters(state, fitted.shift, fitted.location),
            at_map=True,
        )
