"""Masked self-supervision, scored so that it is the log marginal likelihood of a Pyro program."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bayes_mpt.estimators.bayes_mpt import BayesMPT
    from bayes_mpt.estimators.comparison import compare
    from bayes_mpt.estimators.decomposition import decompose
    from bayes_mpt.estimators.kernel_search import KernelSearch
    from bayes_mpt.estimators.loadings import loadings
    from bayes_mpt.estimators.refits import Cumulative, HeldOut
    from bayes_mpt.estimators.rows import data_digest
    from bayes_mpt.estimators.rules import Auto, Bic, Integrated, Laplace, Train
    from bayes_mpt.estimators.search import MarginalLikelihoodSearch

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent unless the user wants it

__all__ = [
    "Auto",
    "BayesMPT",
    "Bic",
    "Cumulative",
    "HeldOut",
    "Integrated",
    "KernelSearch",
    "Laplace",
    "MarginalLikelihoodSearch",
    "Train",
    "compare",
    "data_digest",
    "decompose",
    "loadings",
]

# Each name is imported when it is first asked for (PEP 562): kernels bring gpytorch, a fit of PPCA needs none of it.
_HOMES = {
    "estimators.bayes_mpt": ["BayesMPT"],
    "estimators.comparison": ["compare"],
    "estimators.decomposition": ["decompose"],
    "estimators.kernel_search": ["KernelSearch"],
    "estimators.loadings": ["loadings"],
    "estimators.rows": ["data_digest"],
    "estimators.refits": ["Cumulative", "HeldOut"],
    "estimators.rules": ["Auto", "Bic", "Integrated", "Laplace", "Train"],
    "estimators.search": ["MarginalLikelihoodSearch"],
}
_MODULES = ["evidence", "language", "masks", "models", "plots", "predictors", "score", "training"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    for home, names in _HOMES.items():
        if name in names:
            globals()[name] = value = getattr(import_module(f"{__name__}.{home}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
