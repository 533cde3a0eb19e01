"""Ready Pyro programs. They import Pyro and nothing of bayes_mpt."""

from bayes_mpt.models.couplings import Couplings
from bayes_mpt.models.gaussian_process import GaussianProcess
from bayes_mpt.models.latent_class import LatentClass
from bayes_mpt.models.linear_gaussian import PPCA, FactorAnalysis
from bayes_mpt.models.masked_transformer import MaskedTransformer, contrastive_loss
from bayes_mpt.models.mixtures import GaussianMixture, MixtureOfFactorAnalyzers
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
