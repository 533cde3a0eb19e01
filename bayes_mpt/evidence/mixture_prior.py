"""The stated prior of Gaussian mixtures: proper, free of units, and one for all candidates of a table.

With the table's mean m0 and covariance S, component c of K has the mean mu_c and the covariance C_c:

    weights        ~ Dirichlet(4, ..., 4)
    mu_c | C_c     ~ N(m0, C_c / kappa), kappa = 0.01
    C_c            ~ inverse Wishart(T + 2 degrees, scale S / K^(2/T)): mean S / K^(2/T), a K-th of the table's volume

"tied" components share one such C. Of "diag" and "spherical" ones each variance has the law that it has under the
inverse Wishart, an inverse gamma with 3 degrees of freedom and mean S_ii / K^(2/T), "spherical": that of the mean of
these. So with one column all four are the same.

m0 and S are read from the table. So a number under this prior compares candidates of one table; it is not the
probability of the rows under a model that was stated before they were seen.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayes_mpt.evidence.saturated import saturated

__all__ = ["MixturePrior", "checked_rows", "mixture_prior"]

Array = NDArray[np.float64]


def checked_rows(rows: ArrayLike, n_tokens: int | None = None) -> Array:
    """Rows as an array (N, T); refused if they are no table, or not of as many columns as a prior is of."""
    x: Array = np.asarray(rows, dtype=np.float64)
    if x.ndim != 2:
        raise ValueError(f"rows must be a table of shape (N, T), got shape {x.shape}")
    if n_tokens is not None and x.shape[1] != n_tokens:
        raise ValueError(
            f"the prior is of {n_tokens} columns and the rows have {x.shape[1]}: use mixture_prior of these columns"
        )
    infinite = np.flatnonzero(np.isinf(x).any(0))
    if len(infinite):
        raise ValueError(
            f"rows must be finite, or NaN where a cell is missing, got an infinity in columns {infinite.tolist()}"
        )
    return x


@dataclass(frozen=True, eq=False)
class MixturePrior:
    """Prior of weights, means and covariances, common to all Gaussian mixtures of a table.

    Parameters
    ----------
    center : array of shape (T,)
        m0, where the means are centred.
    covariance : array of shape (T, T)
        S, of the table: the units.
    kappa : float, default=0.01
        Rows that the prior of a mean is worth.
    degrees : float, default=3.0
        Of freedom of each variance; the inverse Wishart has T - 1 more.
    concentration : float, default=4.0
        Of the Dirichlet law of the weights.

    Examples
    --------
    >>> print(mixture_prior(np.array([[0.0, 1.0], [2.0, 5.0], [4.0, 3.0]])).describe())
    weights: Dirichlet(4); means: N(m0, C/0.01); covariances C: inverse Wishart or gamma, 3 degrees a variance, mean
    S/K^(2/T); units: m0 and S f6a6af2a
    """

    center: Array
    covariance: Array
    kappa: float = 0.01
    degrees: float = 3.0
    concentration: float = 4.0

    def describe(self) -> str:
        """One line that is the same for two priors if and only if they are, with a fingerprint of m0 and S."""
        table = np.concatenate([self.center, self.covariance.ravel()]).astype(float)
        return (
            f"weights: Dirichlet({self.concentration:g}); means: N(m0, C/{self.kappa:g}); covariances C: inverse "
            f"Wishart or gamma, {self.degrees:g} degrees a variance, mean S/K^(2/T); units: m0 and S "
            f"{hashlib.sha256(table.tobytes()).hexdigest()[:8]}"
        )

    def units(self, kind: str) -> Array:
        """(T,) standard deviations, in which the scale of the prior is the identity on the diagonal, but for K."""
        variances = np.diag(self.covariance)
        return np.sqrt(np.full_like(variances, variances.mean()) if kind == "spherical" else variances)

    def scale(self, kind: str, n_components: int) -> Array:
        """Scale of the covariances in these units: (T, T) of "full" and "tied", (T,) of "diag", (1,) of "spherical"."""
        n_tokens = len(self.center)
        share = n_components ** (-2 / n_tokens) * (self.degrees - 2)
        if kind == "spherical":
            return np.full(1, share)
        if kind == "diag":
            return np.full(n_tokens, share)
        unit = self.units(kind)
        return share * self.covariance / unit / unit[:, None]


def mixture_prior(rows: ArrayLike) -> MixturePrior:
    """The prior of a table: centred at its mean, in units of its covariance.

    Parameters
    ----------
    rows : array of shape (N, T)
        NaN where missing. With missing cells mean and covariance are those of a normal fitted to the observed cells,
        and not those of the observed cells, which holes that follow other columns move.

    Raises
    ------
    ValueError
        If rows are no table, or nothing of them is observed.

    Examples
    --------
    >>> prior = mixture_prior(np.array([[0.0, 1.0], [2.0, 5.0], [4.0, 3.0]]))
    >>> prior.center, prior.covariance.shape
    (array([2., 3.]), (2, 2))
    """
    x = checked_rows(rows)
    if np.isnan(x).all():
        raise ValueError(f"rows must have an observed cell, got none in a table of shape {x.shape}")
    empty = np.flatnonzero(np.isnan(x).all(0))
    if len(empty):
        raise ValueError(f"columns must have an observed cell, got none at {empty.tolist()}: drop them")
    if np.isnan(x).any():
        x = x[~np.isnan(x).all(1)]
        return MixturePrior(*saturated(x, np.ones(len(x))))
    return MixturePrior(x.mean(0), np.cov(x.T, bias=True).reshape(x.shape[1], -1))
