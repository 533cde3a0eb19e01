"""Ready Pyro programs. They import Pyro and nothing of bayes_mpt."""

from bayes_mpt.models.linear_gaussian import PPCA, FactorAnalysis

__all__ = ["PPCA", "FactorAnalysis"]
