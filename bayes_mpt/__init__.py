"""Masked self-supervision, scored so that it is the log marginal likelihood of a Pyro program."""

import logging

from bayes_mpt.comparison import compare
from bayes_mpt.discovery import KernelSearch
from bayes_mpt.estimator import BayesMPT
from bayes_mpt.selection import MarginalLikelihoodSearch

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent unless the user wants it

__all__ = ["BayesMPT", "KernelSearch", "MarginalLikelihoodSearch", "compare"]
