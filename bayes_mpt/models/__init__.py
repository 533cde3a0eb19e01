"""Ready Pyro programs. They import Pyro and nothing of bayes_mpt.

In the room: ``linear_gaussian`` (PPCA, factor analysis), ``regression``, ``mixtures`` (``mixture_em``,
``mixture_starts``, ``mixture_breeding``, ``mixture_exchange``, ``mixture_patterns``, ``left_out``,
``covariance_prior``, ``gaussians``), ``factor_mixtures`` (``factor_mixture_em``), ``latent_class``
(``latent_class_em``), ``gaussian_process`` (``kernels``, ``kernel_starts``, ``noise_floor``), ``potts``
(``couplings``), ``vae``, ``masked_transformer`` and ``patches`` (``networks``). ``checks`` and ``quasi_newton`` are
shared.

Touch freely: a model is a program with settings. What it says of itself beside running is listed in
`bayes_mpt.program.offers`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bayes_mpt.models.couplings import Couplings
    from bayes_mpt.models.factor_mixtures import MixtureOfFactorAnalyzers
    from bayes_mpt.models.gaussian_process import GaussianProcess
    from bayes_mpt.models.latent_class import LatentClass
    from bayes_mpt.models.linear_gaussian import PPCA, FactorAnalysis
    from bayes_mpt.models.masked_transformer import MaskedTransformer, contrastive_loss
    from bayes_mpt.models.mixtures import GaussianMixture
    from bayes_mpt.models.patches import MaskedPatches
    from bayes_mpt.models.potts import FactoredAttention, Potts
    from bayes_mpt.models.regression import BayesianRegression
    from bayes_mpt.models.vae import VAE

__all__ = [
    "PPCA",
    "VAE",
    "BayesianRegression",
    "Couplings",
    "FactorAnalysis",
    "FactoredAttention",
    "GaussianMixture",
    "GaussianProcess",
    "LatentClass",
    "MaskedPatches",
    "MaskedTransformer",
    "MixtureOfFactorAnalyzers",
    "Potts",
    "contrastive_loss",
]

# Each model is imported when it is first asked for (PEP 562): a Gaussian process brings gpytorch, PPCA only Pyro.
_HOMES = {
    "couplings": ["Couplings"],
    "factor_mixtures": ["MixtureOfFactorAnalyzers"],
    "gaussian_process": ["GaussianProcess"],
    "latent_class": ["LatentClass"],
    "linear_gaussian": ["PPCA", "FactorAnalysis"],
    "masked_transformer": ["MaskedTransformer", "contrastive_loss"],
    "mixtures": ["GaussianMixture"],
    "patches": ["MaskedPatches"],
    "potts": ["FactoredAttention", "Potts"],
    "regression": ["BayesianRegression"],
    "vae": ["VAE"],
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            globals()[name] = value = getattr(import_module(f"{__name__}.{home}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
