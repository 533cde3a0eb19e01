"""Evidence of a program with its parameters integrated: Laplace around the orbit, importance samples around modes.

They are given densities and know no estimator; nothing is refitted here.
"""

from bayes_mpt.evidence.hyperparameters import Prior, hyperprior, log_likelihood
from bayes_mpt.evidence.integrated import IntegratedEvidence, Mode, integrate
from bayes_mpt.evidence.laplace import LaplaceEvidence, laplace_diagonal, laplace_proportional

__all__ = [
    "IntegratedEvidence",
    "LaplaceEvidence",
    "Mode",
    "Prior",
    "hyperprior",
    "integrate",
    "laplace_diagonal",
    "laplace_proportional",
    "log_likelihood",
]
