"""Evidence of a program with its parameters integrated, by Laplace's approximation or by particles, nodes or draws.

In the room, by what is integrated:

- Factor models: ``factor_prior`` (``saturated``), ``factor_posterior`` (``incomplete_posterior``), ``slice`` (the
  rotations); ``sampled`` by ``annealing`` (``surplus`` columns; ``no_latents``), ``draws`` of it; ``laplace``
  (``laplace_wide``, ``laplace_incomplete``).
- Gaussian mixtures: ``mixture_prior``, ``mixture`` (``allocations``, ``components``, ``mixture_marginals``),
  ``mixture_laplace``.
- Hyper-parameters: ``hyperparameters`` and ``integrated``.
- What a user has already: ``from_draws`` (``chains``, ``bridge``, ``fresh``), ``from_guide``; ``images``.
- What is said of it: ``expected``, ``predictive``, ``misfit``.

They are given densities and know no estimator; nothing is refitted here. An evidence carries its error, but
Laplace's, which has none.
"""

from bayes_mpt.evidence.factor_prior import FactorPrior, factor_prior
from bayes_mpt.evidence.from_draws import DrawsEvidence, from_draws
from bayes_mpt.evidence.from_guide import from_guide
from bayes_mpt.evidence.hyperparameters import Prior, hyperprior, log_likelihood
from bayes_mpt.evidence.integrated import IntegratedEvidence, Mode, integrate
from bayes_mpt.evidence.laplace import LaplaceEvidence, laplace_diagonal, laplace_proportional
from bayes_mpt.evidence.laplace_incomplete import laplace_of_cells
from bayes_mpt.evidence.mixture import MixtureEvidence, mixture_evidence
from bayes_mpt.evidence.mixture_laplace import MixtureLaplace, laplace_mixture
from bayes_mpt.evidence.mixture_prior import MixturePrior, mixture_prior
from bayes_mpt.evidence.sampled import SampledEvidence, sample_evidence

__all__ = [
    "DrawsEvidence",
    "FactorPrior",
    "IntegratedEvidence",
    "LaplaceEvidence",
    "MixtureEvidence",
    "MixtureLaplace",
    "MixturePrior",
    "Mode",
    "Prior",
    "SampledEvidence",
    "factor_prior",
    "from_draws",
    "from_guide",
    "hyperprior",
    "integrate",
    "laplace_diagonal",
    "laplace_mixture",
    "laplace_of_cells",
    "laplace_proportional",
    "log_likelihood",
    "mixture_evidence",
    "mixture_prior",
    "sample_evidence",
]
