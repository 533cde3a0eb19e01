"""Mixtures of Gaussians and of factor analysers."""

from __future__ import annotations

import warnings
from functools import cache
from numbers import Integral
from typing import Any, Literal, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from sklearn import mixture
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

__all__ = ["GaussianMixture", "MixtureOfFactorAnalyzers"]

COVARIANCE_TYPES = ("full", "diag", "spherical")
REG_COVAR = 1e-6  # added to variances by the EM of the start, in units of the columns' variances
LEAST_WEIGHT = 1e-6  # of a component at the start: the logarithm of an empty one is infinite
LEAST_NOISE = 1e-3  # of a factor analyser at the start, in units of the columns' variances


class GaussianMixture(BaseEstimator):
    """Mixture of Gaussians: x ~ N(loc_c, S_c) in component c, which has the probability weights_c.

    Sites "component" (N,) and "x" (N, T); parameters "weights" (K,), "loc" (K, T), and "scale_tril"
    (K, T, T), the Cholesky factors of the covariances, if these are full, or else the standard deviations
    "scale", (K, T) or (K, 1). They start at the end of one run of EM by scikit-learn.

    Parameters
    ----------
    n_components : int, default=2
        K >= 1.
    covariance_type : {"full", "diag", "spherical"}, default="full"
        What is free in the covariance of each component: all, the diagonal, one variance.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> pyro.clear_param_store()
    >>> x = torch.as_tensor(load_iris().data)
    >>> trace = pyro.poutine.trace(GaussianMixture(3)).get_trace(x)
    >>> trace.nodes["component"]["value"].shape, trace.nodes["scale_tril"]["value"].shape
    (torch.Size([150]), torch.Size([3, 4, 4]))
    """

    def __init__(self, n_components: int = 2, covariance_type: Literal["full", "diag", "spherical"] = "full"):
        self.n_components = n_components
        self.covariance_type = covariance_type

    def __call__(self, x: Tensor) -> None:
        """Run the program on rows x (N, T)."""
        n_components = _integer("n_components", self.n_components, 1)
        kind = self.covariance_type
        if kind not in COVARIANCE_TYPES:
            raise ValueError(f"covariance_type must be one of {', '.join(COVARIANCE_TYPES)}, got {kind!r}")
        start = cache(lambda: _gaussian_start(x, n_components, kind))  # one EM for all parameters
        weights = pyro.param("weights", lambda: start()["weights"], constraints.simplex)
        loc = pyro.param("loc", lambda: start()["loc"])
        if kind == "full":
            scale = pyro.param("scale_tril", lambda: start()["scale_tril"], constraints.lower_cholesky)
        else:
            scale = pyro.param("scale", lambda: start()["scale"], constraints.positive)
        with pyro.plate("rows", len(x)):
            c = pyro.sample("component", dist.Categorical(weights))
            if kind == "full":
                tokens = dist.MultivariateNormal(loc[c], scale_tril=scale[c])
            else:
                tokens = dist.Normal(loc[c], scale[c]).to_event(1)
            pyro.sample("x", tokens, obs=x)


class MixtureOfFactorAnalyzers(BaseEstimator):
    """Mixture of factor analysers (Ghahramani & Hinton 1996): x = loc_c + W_c z + e, e ~ N(0, diag(psi_c)).

    Sites "component" (N,), "z" (N, F) and "x" (N, T); parameters "weights" (K,), "loc" (K, T), "loading"
    (K, T, F) and "noise_variance" (K, T).

    Parameters
    ----------
    n_components : int, default=2
        K >= 1.
    n_factors : int, default=1
        F >= 0, the same in all components.

    Examples
    --------
    >>> from sklearn.datasets import load_wine
    >>> pyro.clear_param_store()
    >>> x = torch.as_tensor(load_wine().data)
    >>> trace = pyro.poutine.trace(MixtureOfFactorAnalyzers(3, n_factors=2)).get_trace(x)
    >>> trace.nodes["z"]["value"].shape, trace.nodes["loading"]["value"].shape
    (torch.Size([178, 2]), torch.Size([3, 13, 2]))
    """

    def __init__(self, n_components: int = 2, n_factors: int = 1):
        self.n_components = n_components
        self.n_factors = n_factors

    def __call__(self, x: Tensor) -> None:
        """Run the program on rows x (N, T)."""
        n_components = _integer("n_components", self.n_components, 1)
        n_factors = _integer("n_factors", self.n_factors, 0)
        start = cache(lambda: _factor_start(x, n_components, n_factors))
        weights = pyro.param("weights", lambda: start()["weights"], constraints.simplex)
        loc = pyro.param("loc", lambda: start()["loc"])
        loading = pyro.param("loading", lambda: start()["loading"])
        noise = pyro.param("noise_variance", lambda: start()["noise_variance"], constraints.positive)
        with pyro.plate("rows", len(x)):
            c = pyro.sample("component", dist.Categorical(weights))
            z = pyro.sample("z", dist.Normal(x.new_zeros(n_factors), 1.0).to_event(1))
            mean = loc[c] + (loading[c] @ z[..., None])[..., 0]
            pyro.sample("x", dist.Normal(mean, noise[c].sqrt()).to_event(1), obs=x)


def _integer(name: str, value: Any, least: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)


# ----------------------------------------------------------------------------------------------- the starts


class _Clusters(NamedTuple):
    """What EM found in rows = (x - centre) / spread."""

    em: mixture.GaussianMixture
    rows: np.ndarray  # (N, T)
    centre: np.ndarray  # (T,)
    spread: np.ndarray  # (T,)
    weights: np.ndarray  # (K,), none of them zero
    seed: int

    @property
    def loc(self) -> np.ndarray:
        """(K, T), in the units of x."""
        return self.centre + self.spread * self.em.means_


def _clusters(x: Tensor, n_components: int, covariance_type: str) -> _Clusters:
    """EM by scikit-learn from a k-means, in units in which its regularisation suits all columns."""
    seed = int(torch.randint(2**31 - 1, ()))
    rows = x.detach().cpu().numpy().astype(np.float64)
    n_least = max(2, n_components)  # for scikit-learn; a row given twice changes no frequency
    if len(rows) < n_least:
        rows = np.tile(rows, (-(-n_least // len(rows)), 1))
    centre, spread = rows.mean(0), rows.std(0)
    spread[np.ptp(rows, 0) == 0] = 0.0  # the mean of a constant need not be that constant
    if covariance_type == "spherical":  # columns share their unit, or one variance would mean something else
        spread[:] = np.sqrt(np.square(spread).mean())
    spread[spread == 0] = 1.0
    rows = (rows - centre) / spread
    em = mixture.GaussianMixture(
        n_components,
        covariance_type=covariance_type,
        tol=1e-7,
        reg_covar=REG_COVAR,
        max_iter=1000,
        random_state=seed,
    )
    with warnings.catch_warnings():  # a start need not have converged, nor use all of its clusters
        warnings.simplefilter("ignore", ConvergenceWarning)
        em.fit(rows)
    weights = np.maximum(em.weights_, LEAST_WEIGHT)
    return _Clusters(em, rows, centre, spread, weights / weights.sum(), seed)


def _gaussian_start(x: Tensor, n_components: int, covariance_type: str) -> dict[str, Tensor]:
    found = _clusters(x, n_components, covariance_type)
    cov = found.em.covariances_  # (K, T, T), (K, T) or (K,)
    start = {"weights": found.weights, "loc": found.loc}
    if covariance_type == "full":
        start["scale_tril"] = found.spread[:, None] * np.linalg.cholesky(cov)
    elif covariance_type == "diag":
        start["scale"] = found.spread * np.sqrt(cov)
    else:
        start["scale"] = found.spread[:1] * np.sqrt(cov)[:, None]
    return {name: torch.from_numpy(value).to(x) for name, value in start.items()}


def _factor_start(x: Tensor, n_components: int, n_factors: int) -> dict[str, Tensor]:
    """Clusters with diagonal covariances, then probabilistic PCA in each."""
    found = _clusters(x, n_components, "diag")
    share = found.em.predict_proba(found.rows)  # (N, K)
    share /= np.maximum(share.sum(0), np.finfo(float).tiny)
    away = found.rows - found.em.means_[:, None]  # (K, N, T)
    cov = np.einsum("nk,knt,knu->ktu", share, away, away, optimize=True)  # (K, T, T)
    value, vector = np.linalg.eigh(cov)  # ascending
    n_tokens = x.shape[1]
    n_leading = min(n_factors, n_tokens)
    first = n_tokens - n_leading
    rest = value[:, :first].mean(1, keepdims=True) if first else np.zeros((n_components, 1))
    # W = U (L - rest)^1/2; not zero, which would be a saddle point
    root = np.sqrt(np.maximum(value[:, first:] - rest, LEAST_NOISE))  # (K, n_leading)
    rng = np.random.default_rng(found.seed)
    loading = 0.1 * rng.normal(size=(n_components, n_tokens, n_factors))  # factors beyond T, if any
    loading[..., :n_leading] = (vector[..., first:] * root[:, None])[..., ::-1]
    variance = np.diagonal(cov, axis1=1, axis2=2)
    noise = np.maximum(variance - np.square(loading).sum(-1), np.maximum(0.1 * variance, LEAST_NOISE))
    start = {
        "weights": found.weights,
        "loc": found.loc,
        "loading": found.spread[:, None] * loading,
        "noise_variance": np.square(found.spread) * noise,
    }
    return {name: torch.from_numpy(value).to(x) for name, value in start.items()}
