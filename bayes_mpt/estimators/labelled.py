"""Rows that belong to components or classes: labels in one call, and a mixture's parameters by scikit-learn's names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.metaestimators import available_if

from bayes_mpt.estimators import availability
from bayes_mpt.estimators.fitted import Fitted
from bayes_mpt.models import GaussianMixture, MixtureOfFactorAnalyzers
from bayes_mpt.program.offers import name_of

__all__ = ["Labelled"]


class Labelled(ABC):
    """What users of scikit-learn's mixtures ask a `BayesMPT` of one.

    ``weights_``, ``means_``, ``covariances_``, ``precisions_`` and ``precisions_cholesky_`` are those of a
    `GaussianMixture` or `MixtureOfFactorAnalyzers`, in the shapes of ``sklearn.mixture.GaussianMixture``; other
    programs have none.
    """

    fitted_: Fitted

    @abstractmethod
    def fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Fit to rows."""

    @available_if(availability.may_take_labels)
    def fit_predict(self, X: ArrayLike, y: Any = None) -> NDArray[np.int64]:
        """Fit to X (N, T), NaN where missing, and label its rows: ``fit(X).predict(X)``, (N,), counted from 0.

        Raises
        ------
        ValueError
            As `BayesMPT.fit`, or if the program's rows have no labels.

        Examples
        --------
        >>> from bayes_mpt import BayesMPT
        >>> X = np.array([[0.0], [1.0], [2.0], [10.0], [11.0], [12.5]])
        >>> model = BayesMPT(GaussianMixture(2), random_state=0)
        >>> labels = model.fit_predict(X)
        >>> model.means_[labels].round(1).ravel()
        array([ 1. ,  1. ,  1. , 11.2, 11.2, 11.2])
        """
        found: Any = self.fit(X, y)
        if not availability.takes_labels(self):
            raise ValueError(
                "fit_predict labels rows by the one discrete latent that each has, as in a mixture: "
                f"{name_of(self.fitted_.model)} has none, or several. Use fit, and transform"
            )
        return np.asarray(found.predict(X))

    @property
    def weights_(self) -> NDArray[np.float64]:
        """Of the components, (K,)."""
        return self._of_mixture("weights_")["weights"]

    @property
    def means_(self) -> NDArray[np.float64]:
        """Of the components, (K, T)."""
        return self._of_mixture("means_")["loc"]

    @property
    def covariances_(self) -> NDArray[np.float64]:
        """Of the components: (K, T, T), "tied" (T, T), "diag" variances (K, T), "spherical" (K,)."""
        params = self._of_mixture("covariances_")
        if "scale_tril" in params:
            root = params["scale_tril"]
            return root @ root.swapaxes(-1, -2)
        if "loading" in params:
            loading, noise = params["loading"], params["noise_variance"]
            return loading @ loading.swapaxes(-1, -2) + noise[:, :, None] * np.eye(noise.shape[1])
        variances = np.square(params["scale"])
        spherical = cast(GaussianMixture, self.fitted_.model).covariance_type == "spherical"
        return variances[:, 0] if spherical else variances

    @property
    def precisions_cholesky_(self) -> NDArray[np.float64]:
        """Of the components, in the shapes of `covariances_`: U with precision = U U', upper triangular, or 1 / sd.

        Examples
        --------
        >>> from bayes_mpt import BayesMPT
        >>> model = BayesMPT(GaussianMixture(2, "tied"), random_state=0).fit(np.eye(4)[:, :2])
        >>> U = model.precisions_cholesky_
        >>> np.allclose(U @ U.T, np.linalg.inv(model.covariances_)), np.allclose(U, np.triu(U))
        (True, True)
        """
        params = self._of_mixture("precisions_cholesky_")
        if "scale" in params:
            return 1 / np.sqrt(self.covariances_)
        # L^-T of a covariance L L'
        root = params["scale_tril"] if "scale_tril" in params else np.linalg.cholesky(self.covariances_)
        eye = np.broadcast_to(np.eye(root.shape[-1]), root.shape)
        return np.triu(np.linalg.solve(root, eye).swapaxes(-1, -2))

    @property
    def precisions_(self) -> NDArray[np.float64]:
        """Of the components, in the shapes of `covariances_`: their inverses, of variances one by one."""
        root = self.precisions_cholesky_
        return np.square(root) if "scale" in self._of_mixture("precisions_") else root @ root.swapaxes(-1, -2)

    def _of_mixture(self, asked: str) -> dict[str, NDArray[Any]]:
        """Its parameters."""
        known = not availability.is_unfitted(self)
        # a subclass may be another program
        if known and type(self.fitted_.model) in (GaussianMixture, MixtureOfFactorAnalyzers):
            return self.fitted_.params
        raise AttributeError(f"{type(self).__name__!r} has {asked} once a mixture of Gaussians is fitted")
