"""Masked language models: the area under the masked curve of texts, and its comparison between models.

In the room: ``texts`` (token ids and their masked copies) and ``masked_language`` (scores and comparisons). It uses
masks, curves and errors of the package, and no Pyro program.
"""

from bayes_mpt.language.masked_language import MaskedLanguageModel, TextScores, compare_language_models

__all__ = ["MaskedLanguageModel", "TextScores", "compare_language_models"]
