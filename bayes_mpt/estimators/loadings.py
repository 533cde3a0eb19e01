"""Loadings of a factor model by name, rotated, with intervals of its posterior."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

if TYPE_CHECKING:
    from bayes_mpt.estimators.bayes_mpt import BayesMPT
from bayes_mpt.program.offers import name_of

__all__ = ["loadings"]

INTERVAL = (0.025, 0.975)


def loadings(estimator: BayesMPT, rotation: Literal["varimax", "oblimin"] | None = None) -> pd.DataFrame:
    """Loadings of the columns by name, rotated if asked for; of ``average="posterior"`` with 95 % intervals.

    Parameters
    ----------
    estimator : BayesMPT
        A fitted factor model, or another whose rows share a linear-Gaussian map.
    rotation : "varimax" or "oblimin", optional
        Of the mean loadings, and of all draws alike, by statsmodels. Latents are correlated after oblimin.

    Returns
    -------
    DataFrame
        A row a column of X; columns (k, "mean"), (k, "lower") and (k, "upper") of each latent k.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from bayes_mpt import BayesMPT
    >>> from bayes_mpt.models import FactorAnalysis
    >>> found = BayesMPT(FactorAnalysis(1), average="posterior").fit(load_iris(as_frame=True).data)
    >>> print(loadings(found).abs().round(1).index[2], loadings(found).shape)
    petal length (cm) (4, 3)
    """
    check_is_fitted(estimator)
    fitted = estimator.fitted_
    found = fitted.attributes()
    if "components_" not in found:
        raise ValueError(
            f"loadings need a linear-Gaussian map that all rows share, got {name_of(fitted.model)}"
        )
    mean = np.asarray(found["components_"], dtype=np.float64).T
    turned = _rotation(mean, rotation)
    parts = {"mean": mean @ turned}
    if fitted.posterior is not None:
        draws = fitted.posterior.draws.loadings @ turned  # (S, T, K)
        parts["lower"], parts["upper"] = np.quantile(draws, INTERVAL, axis=0)
    names = getattr(estimator, "feature_names_in_", fitted.names)
    values = np.stack(list(parts.values()), 2).reshape(len(mean), -1)  # (T, 3 K), or (T, K)
    columns = pd.MultiIndex.from_product([range(mean.shape[1]), parts], names=["latent", "value"])
    return pd.DataFrame(values, index=pd.Index(names, name="column"), columns=columns)


def _rotation(loadings: NDArray[np.float64], name: str | None) -> NDArray[np.float64]:
    """(K, K) that the loadings are multiplied by, from the right."""
    k = loadings.shape[1]
    if name is None or k < 2:
        return np.eye(k)
    arguments: dict[str, tuple[Any, ...]] = {"varimax": (), "oblimin": (0, "oblique")}
    if name not in arguments:
        raise ValueError(f"rotation must be None, 'varimax' or 'oblimin', got {name!r}")
    try:
        from statsmodels.multivariate.factor_rotation import rotate_factors  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("rotations are those of statsmodels: pip install statsmodels") from error
    rotate: Callable[..., Any] = rotate_factors
    turned = rotate(loadings, name, *arguments[name])[1]
    return np.asarray(turned if name == "varimax" else np.linalg.inv(turned).T)
