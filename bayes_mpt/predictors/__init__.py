"""How log p(x_i | x_visible) is computed for a Pyro program: predictors.

In the room: ``base`` is the contract (`Predictor`, `Bound`, `Conditionals`) and ``objective`` what a training
maximises of it; ``choice`` picks a way, and has the one without an error. ``gaussian/`` computes by algebra,
``nodes/`` by averages over weighted nodes, ``self_predictive`` asks a network, ``own_order`` keeps to a program's own
order, ``new_rows`` predicts rows of one vector.

A new way is a `Predictor` of your own (docs/extend.md): it needs no change here but a line in ``choice``, if "auto"
is to take it. The contract is small for a purpose: a member more is asked of every way.
"""

from bayes_mpt.predictors.base import Bound, Conditionals, Evidence, Posterior, Predictive, Predictor
from bayes_mpt.predictors.choice import Exact, choose
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
