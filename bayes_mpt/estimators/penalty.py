"""What is added to the score: the log prior of a model's parameters, or of its noise variances.

By ``penalty=True`` that which the model offers; and always a prior without which its likelihood has no bound
(`bayes_mpt.program.offers.Offers.penalty`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayes_mpt.evidence.factor_prior import FactorPrior, factor_prior
from bayes_mpt.evidence.hyperparameters import Prior
from bayes_mpt.program.offers import name_of, offered
from bayes_mpt.program.program import Model
from bayes_mpt.program.statistics import SufficientStatistics
from bayes_mpt.training import NoisePrior

__all__ = ["noise_prior_of", "own_penalty", "penalty_of"]


def own_penalty(model: Model, args: tuple[Any, ...]) -> Callable[[], Tensor] | None:
    """What every fit of a model adds, at the parameters that stand in Pyro's store at the time; None for nothing."""
    make = offered(model, "penalty")
    found = None if make is None else make(*args)
    if found is None:
        return None
    return lambda: found(dict(pyro.get_param_store().items()))


def penalty_of(prior: Prior, names: list[str]) -> Callable[[], Tensor]:
    """A model's hyperprior of these parameters, at those that stand in Pyro's store at the time."""

    def at_present() -> Tensor:
        store: dict[str, Any] = dict(pyro.get_param_store().named_parameters())  # a restart makes new leaves
        return prior.log_prob(torch.cat([store[name].flatten() for name in names])[None])[0]

    return at_present


def noise_prior_of(
    model: Model,
    leaves: dict[str, Tensor],
    X: NDArray[np.floating],
    statistics: SufficientStatistics | None,
) -> NoisePrior:
    """The prior of noise variances under which the evidence integrates them (`bayes_mpt.evidence.factor_prior`).

    Parameters
    ----------
    model : callable
        A factor model that declares its symmetries.
    leaves : dict of Tensor
        The program's unconstrained parameters by name.
    X : array of shape (N, T)
        The rows.
    statistics : SufficientStatistics, optional
        Moments of all rows seen, where there are some.
    """
    name, n_columns = (offered(model, "symmetries") or {}).get("rotations", ""), X.shape[1]
    n_noise = leaves[name].numel() if name in leaves else 0
    if n_noise not in (1, n_columns):
        raise ValueError(
            f"penalty=True needs a model that offers hyperprior(x, y) or penalty(x), or a factor model whose "
            f"symmetries name its noise variance, got {name_of(model)}: write priors into the program by pyro.sample, "
            "or leave penalty=False"
        )
    stated = _stated(X, statistics)
    units = stated.units(None if n_noise > 1 else np.ones(n_columns))
    return NoisePrior(name, stated.noise_shape, stated.noise_shape / units[:n_noise])


def _stated(X: NDArray[np.floating], statistics: SufficientStatistics | None) -> FactorPrior:
    """The prior of a table, from its moments where earlier rows count too."""
    if statistics is None:
        return factor_prior(X)
    if statistics.complete:
        return FactorPrior(statistics.mean.cpu().numpy(), statistics.variance.cpu().numpy())
    return factor_prior(*(a.cpu().numpy() for a in statistics.rows()))
