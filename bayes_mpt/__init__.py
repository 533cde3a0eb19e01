"""Masked self-supervision, scored so that it is the log marginal likelihood of a Pyro program."""

import logging

from bayes_mpt.estimators.bayes_mpt import BayesMPT
from bayes_mpt.estimators.comparison import compare
from bayes_mpt.estimators.decomposition import decompose
from bayes_mpt.estimators.kernel_search import KernelSearch
from bayes_mpt.estimators.rows import data_digest
from bayes_mpt.estimators.rules import Auto, Cumulative, HeldOut, Integrated, Laplace, Train
from bayes_mpt.estimators.search import MarginalLikelihoodSearch

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent unless the user wants it

__all__ = [
    "Auto",
    "BayesMPT",
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
]
