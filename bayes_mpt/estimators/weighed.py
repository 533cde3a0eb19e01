"""Numbers by which a fit is weighed against others: information criteria, and the evidence of what was estimated."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.metaestimators import available_if

from bayes_mpt.estimators import availability, integrals, sampling
from bayes_mpt.estimators.criteria import criterion
from bayes_mpt.estimators.fitted import Fitted
from bayes_mpt.evidence.factor_prior import FactorPrior
from bayes_mpt.evidence.integrated import IntegratedEvidence
from bayes_mpt.evidence.laplace import LaplaceEvidence
from bayes_mpt.evidence.mixture import MixtureEvidence
from bayes_mpt.evidence.mixture_laplace import MixtureLaplace
from bayes_mpt.evidence.mixture_prior import MixturePrior
from bayes_mpt.evidence.sampled import SampledEvidence
from bayes_mpt.predictors.nodes.annealed import Bracket
from bayes_mpt.runtime.serial import methods_take_turns

__all__ = ["Weighed"]


@methods_take_turns(store=True)
class Weighed(ABC):
    """What a fitted `BayesMPT` says of itself beside others."""

    @abstractmethod
    def _ready(self, X: ArrayLike) -> tuple[Fitted, NDArray[np.floating]]:
        """The fit, and rows as it takes them."""

    @abstractmethod
    def _current(self) -> Fitted:
        """The fit."""

    @available_if(availability.counts_parameters)
    def aic(self, X: ArrayLike, y: Any = None) -> float:
        """Akaike information criterion, -2 log p(X) + 2 P with P free parameters: the lower the better.

        See `bic` for the parameters that it is taken at, and for what is refused.
        """
        return criterion(*self._ready(X), y, lambda n_rows: 2.0)

    @available_if(availability.counts_parameters)
    def bic(self, X: ArrayLike, y: Any = None) -> float:
        """Bayesian information criterion, -2 log p(X) + P log N with P free parameters: the lower the better.

        It is taken at ``params_``, the maximum of the likelihood. The likelihood of mixtures of Gaussians and of factor
        analysers has no bound, so that they are fitted under a prior of their covariances
        (``covariance_prior="auto"``): theirs is taken at the mode under it, and p(X) is the likelihood there, without
        the prior, as in Fraley & Raftery (2007). With ``covariance_prior=None`` it is taken at a maximum of the
        likelihood.

        Parameters
        ----------
        X : array of shape (N, T)
            NaN where missing: p(X) is then of the observed cells.
        y : array of shape (N,), optional
            Of models that predict it.

        Raises
        ------
        ValueError
            If the fit is averaged over its posterior, or is at the maximum a posteriori because of ``penalty=True``.

        Examples
        --------
        >>> from sklearn.datasets import load_iris
        >>> from bayes_mpt import BayesMPT
        >>> from bayes_mpt.models import PPCA
        >>> X = load_iris().data
        >>> fits = {k: BayesMPT(PPCA(k)).fit(X) for k in (1, 2)}
        >>> {k: round(fit.bic(X)) for k, fit in fits.items()}
        {1: 986, 2: 870}
        """
        return criterion(*self._ready(X), y, math.log)

    def laplace(self, X: ArrayLike) -> LaplaceEvidence | MixtureLaplace:
        """Evidence of X with what was point-estimated integrated out, by Laplace's approximation.

        Of models that declare their loadings free up to rotation (``model.symmetries``): loadings and noise variances,
        around the orbit of rotations; where cells are missing it is the evidence of the observed ones:
        `bayes_mpt.evidence.laplace_incomplete`. Of a `GaussianMixture` with full covariances: all parameters, under
        `bayes_mpt.evidence.mixture_prior` of X; see `bayes_mpt.evidence.mixture_laplace`.
        """
        return integrals.laplace_evidence(*self._ready(X))

    def integrated(
        self,
        X: ArrayLike,
        y: Any = None,
        *,
        se: float = 0.1,
        max_particles: int = 1024,
        prior: FactorPrior | MixturePrior | None = None,
    ) -> IntegratedEvidence | SampledEvidence | MixtureEvidence:
        """Evidence of X (and y) with what was point-estimated integrated, sampled until its error is ``se``.

        Of a factor model (``model.symmetries``): loadings, noise variances and mean under ``prior``, by default
        `bayes_mpt.evidence.factor_prior` of X; see `bayes_mpt.evidence.sampled`. Of a `GaussianMixture`: weights, means
        and covariances under `bayes_mpt.evidence.mixture_prior`; see `bayes_mpt.evidence.mixture`. Of a model that
        offers a prior of its parameters (``model.hyperprior(x, y)``), and whose LML is not drawn: see
        `bayes_mpt.evidence.integrated`.
        """
        fitted, rows = self._ready(X)
        return integrals.evidence_of(fitted, rows, y, prior, se, max_particles)

    def bidirectional(self, n_samples: int = 100) -> Bracket:
        """How far off the LML is, bounded on rows simulated from the fitted model (bidirectional Monte Carlo).

        Annealing from the guide bounds log p(x) from below in expectation, annealing back from the latents that made
        x from above (Grosse, Ghahramani & Adams 2015). ``predictor`` says how: `AnnealedImportance`. The bounds are of
        each simulated row, with the mean ``gap`` and its standard error.
        """
        return sampling.bracket(self._current(), n_samples)
