"""How log p(x_i | x_visible) is computed for a Pyro program: predictors."""

from bayes_mpt.predictors.base import Posterior, Predictor, choose
from bayes_mpt.predictors.exact import Exact

__all__ = ["Exact", "Posterior", "Predictor", "choose"]
