"""A search in place of its best candidate: methods that ask that one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.metaestimators import available_if

from bayes_mpt.estimators.candidates import before_final, final_step
from bayes_mpt.estimators.rows import takes_y

__all__ = ["AsItsBest"]


class AsItsBest(ABC):
    """What a fitted search offers as an estimator: all that its best candidate does."""

    estimator: Any

    @abstractmethod
    def fit(self, X: ArrayLike, y: Any = None) -> Any:
        """Find the best candidate."""

    @abstractmethod
    def _best(self) -> Any:
        """The best candidate; an error where there is none."""

    @abstractmethod
    def _offering(self) -> Any:
        """Whose methods are offered."""

    def score(self, X: ArrayLike, y: Any = None) -> float:
        """Mean nats a row of the best candidate."""
        return float(self._best().score(X, **_given(y)))

    def score_samples(self, X: ArrayLike, y: Any = None) -> NDArray[np.float64]:
        """Nats of each row under the best candidate."""
        return np.asarray(self._best().score_samples(X, **_given(y)))

    @available_if(lambda self: hasattr(self.estimator, "transform"))
    def transform(self, X: ArrayLike, y: Any = None) -> Any:
        """Posterior means of the best candidate's latents."""
        return self._best().transform(X, **_given(y))

    @available_if(lambda self: hasattr(self.estimator, "transform"))
    def fit_transform(self, X: ArrayLike, y: Any = None) -> Any:
        """Fit the search, then transform X by the best candidate."""
        model = final_step(self.fit(X, y)._best()).fitted_model_
        return self.transform(X, y if takes_y(model) else None)

    @available_if(lambda self: hasattr(self.estimator, "inverse_transform"))
    def inverse_transform(self, Z: ArrayLike) -> Any:
        """Means of the tokens given latents, under the best candidate."""
        return self._best().inverse_transform(Z)

    @available_if(lambda self: hasattr(self.estimator, "impute"))
    def impute(self, X: ArrayLike, y: Any = None, return_std: bool = False) -> Any:
        """X with its missing cells filled by the best candidate."""
        return self._best().impute(X, **_given(y), **({"return_std": True} if return_std else {}))

    @available_if(lambda self: hasattr(self._offering(), "predict"))
    def predict(self, X: ArrayLike, return_std: bool = False, return_cov: bool = False) -> Any:
        """As `BayesMPT.predict`, by the best candidate: means of y, or labels of the rows."""
        asked = {"return_std": return_std, "return_cov": return_cov}
        return self._best().predict(X, **{name: True for name, value in asked.items() if value})

    @available_if(lambda self: hasattr(self._offering(), "predict_proba"))
    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """As `BayesMPT.predict_proba`, by the best candidate."""
        return np.asarray(self._best().predict_proba(X))

    @available_if(lambda self: hasattr(final_step(self._offering()), "bic"))
    def bic(self, X: ArrayLike, y: Any = None) -> float:
        """Bayesian information criterion of the best candidate on X: the lower the better."""
        best = self._best()
        return float(final_step(best).bic(before_final(best, X), y))

    @available_if(lambda self: hasattr(final_step(self._offering()), "aic"))
    def aic(self, X: ArrayLike, y: Any = None) -> float:
        """Akaike information criterion of the best candidate on X: the lower the better."""
        best = self._best()
        return float(final_step(best).aic(before_final(best, X), y))

    @available_if(lambda self: hasattr(self.estimator, "sample"))
    def sample(self, n_samples: int = 1) -> Any:
        """Rows drawn from the best candidate."""
        return self._best().sample(n_samples)

    @available_if(lambda self: hasattr(self.estimator, "get_feature_names_out"))
    def get_feature_names_out(self, input_features: ArrayLike | None = None) -> Any:
        """Names of the best candidate's latents."""
        return self._best().get_feature_names_out(input_features)

    @available_if(lambda self: hasattr(self.estimator, "set_output"))
    def set_output(self, *, transform: str | None = None) -> Self:
        """Container of `transform`'s output, as in scikit-learn."""
        self.estimator.set_output(transform=transform)
        if hasattr(self, "best_estimator_"):
            self.best_estimator_.set_output(transform=transform)
        return self


def _given(y: Any) -> dict[str, Any]:
    return {} if y is None else {"y": y}
