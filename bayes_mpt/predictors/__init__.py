"""How log p(x_i | x_visible) is computed for a Pyro program: predictors."""

from bayes_mpt.predictors.annealed import AnnealedImportance
from bayes_mpt.predictors.base import Conditionals, Evidence, Posterior, Predictive, Predictor
from bayes_mpt.predictors.choice import choose
from bayes_mpt.predictors.exact import Exact
from bayes_mpt.predictors.importance import Importance
from bayes_mpt.predictors.linear_gaussian import LinearGaussian
from bayes_mpt.predictors.markov import MarkovGaussian
from bayes_mpt.predictors.nearest_neighbors import NearestNeighbors
from bayes_mpt.predictors.quadrature import Quadrature
from bayes_mpt.predictors.self_predictive import SelfPredictive
from bayes_mpt.predictors.smc import SequentialMonteCarlo

__all__ = [
    "AnnealedImportance",
    "Conditionals",
    "Evidence",
    "Exact",
    "Importance",
    "LinearGaussian",
    "MarkovGaussian",
    "NearestNeighbors",
    "Posterior",
    "Predictive",
    "Predictor",
    "Quadrature",
    "SelfPredictive",
    "SequentialMonteCarlo",
    "choose",
]
