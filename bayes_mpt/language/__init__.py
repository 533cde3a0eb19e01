"""Masked language models: the area under the masked curve of texts, and its comparison between models."""

from bayes_mpt.language.masked_language import MaskedLanguageModel, TextScores, compare_language_models

__all__ = ["MaskedLanguageModel", "TextScores", "compare_language_models"]
