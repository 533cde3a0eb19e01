"""AIC and BIC: the log-likelihood at its maximum, less a charge for the numbers that were free to move.

AIC = -2 log p(X) + 2 P,    BIC = -2 log p(X) + P log N,    N rows with an observed cell

Of a model without a maximum of its own, whose fits add a prior always (`Offers.penalty`: mixtures of Gaussians), p(X)
is the likelihood at the mode under that prior, and the prior no part of it (Fraley & Raftery 2007).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyro.distributions import constraints
from torch.distributions.constraints import Constraint

from bayes_mpt.estimators.fitted import Fitted
from bayes_mpt.estimators.predictions import score_rows
from bayes_mpt.program.offers import offered

__all__ = ["criterion", "n_free_parameters"]


def criterion(fitted: Fitted, rows: NDArray[np.floating], y: Any, price: Callable[[int], float]) -> float:
    """-2 log p(X) + P price(N)."""
    if fitted.posterior is not None:
        raise ValueError(
            "AIC and BIC are of the maximum of the likelihood, and this fit is averaged over its posterior, whose log "
            "evidence is log_marginal_likelihood_: use average=None"
        )
    if fitted.at_map and offered(fitted.model, "penalised") is None:
        raise ValueError(
            "AIC and BIC are of the likelihood at its maximum, and this fit is at the maximum a posteriori: leave "
            "penalty=False, or rank by an evidence"
        )
    by_row, _ = score_rows(fitted, rows, y)
    of_program = {name: fitted.params[name] for name in fitted.bound.structure.parameters}
    of_constraint = {name: constraint for name, (_, constraint) in fitted.initial.items()}
    n_free = n_free_parameters(fitted.model, of_program, of_constraint)
    # a row of which nothing is observed says nothing
    n_rows = len(by_row) if y is not None else int((~np.isnan(rows).all(1)).sum())
    return float(-2 * by_row.sum() + n_free * price(n_rows))


def n_free_parameters(
    model: Any, params: Mapping[str, NDArray[Any]], constraint_of: Mapping[str, Constraint]
) -> int:
    """P: how many numbers of the parameters are free.

    What the constraints take away is known: a simplex of K probabilities has K - 1 free numbers, a covariance or its
    Cholesky factor T (T + 1) / 2. Directions in which the density does not change, such as rotations of loadings, are
    known to the models that offer ``n_free_parameters(params)``.

    Parameters
    ----------
    model : callable
        A Pyro program.
    params : dict of arrays
        Values of its parameters.
    constraint_of : dict of Constraint
        Of those that have one.
    """
    own = offered(model, "n_free_parameters")
    if own is not None:
        return int(own(params))
    return sum(_n_free(np.shape(value), constraint_of.get(name)) for name, value in params.items())


_SIMPLEX = (type(constraints.simplex), type(constraints.sphere))
_TRIANGLE = tuple(
    type(c)
    for c in (
        constraints.lower_cholesky,
        constraints.softplus_lower_cholesky,
        constraints.lower_triangular,
        constraints.positive_definite,
        constraints.positive_semidefinite,
        constraints.symmetric,
    )
)
_STRICT_TRIANGLE = tuple(
    type(c) for c in (constraints.corr_cholesky, constraints.corr_matrix, constraints.unit_lower_cholesky)
)


def _n_free(shape: tuple[int, ...], constraint: Constraint | None) -> int:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    n = shape[-1] if shape else 1
    if isinstance(constraint, _SIMPLEX):
        return prod(shape[:-1]) * (n - 1)
    if isinstance(constraint, _STRICT_TRIANGLE):  # before the triangles, of which they are
        return prod(shape[:-2]) * n * (n - 1) // 2
    if isinstance(constraint, _TRIANGLE):
        return prod(shape[:-2]) * n * (n + 1) // 2
    return prod(shape)
