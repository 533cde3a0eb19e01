"""How log p(x_i | x_visible) is computed for a Pyro program: predictors."""

from bayes_mpt.predictors.base import Bound, Conditionals, Evidence, Posterior, Predictive, Predictor
from bayes_mpt.predictors.choice import choose
from bayes_mpt.predictors.exact import Exact
from bayes_mpt.predictors.gaussian.linear import LinearGaussian
from bayes_mpt.predictors.gaussian.markov import MarkovGaussian
from bayes_mpt.predictors.gaussian.nearest_neighbors import NearestNeighbors
from bayes_mpt.predictors.nodes.annealed import AnnealedImportance
from bayes_mpt.predictors.nodes.importance import Importance
from bayes_mpt.predictors.nodes.quadrature import Quadrature
from bayes_mpt.predictors.nodes.smc import SequentialMonteCarlo
from bayes_mpt.predictors.objective import Batch, Objective
from bayes_mpt.predictors.self_predictive import SelfPredictive

__all__ = [
    "AnnealedImportance",
    "Batch",
    "Bound",
    "Conditionals",
    "Evidence",
    "Exact",
    "Importance",
    "LinearGaussian",
    "MarkovGaussian",
    "NearestNeighbors",
    "Objective",
    "Posterior",
    "Predictive",
    "Predictor",
    "Quadrature",
    "SelfPredictive",
    "SequentialMonteCarlo",
    "choose",
]
