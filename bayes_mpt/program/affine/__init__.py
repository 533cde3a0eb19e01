"""The linear-Gaussian form of a program: whether it has one, and the map from its latents to its tokens.

In the room: ``form`` is what is found, once; ``reading`` finds it and reads the map at every step, by one of three
ways: ``stated`` (the model names its parameters, also those of a mixture), ``sparse`` (``chain``, ``sparse_map``) and
``dense`` (``probes``, then once at many ``places``). ``maps`` is the map as matrices, ``normals`` and ``tokens`` are
what a run says of it, ``trial`` compares map and runs, ``first`` is the first reading.

Touch freely what is inside of one way; a new way has the four methods of `Way`. That a map agrees with runs on real
rows is never left out.
"""

from bayes_mpt.program.affine.dense import Dense, read_side_by_side
from bayes_mpt.program.affine.form import AffineForm, NotAffine, Way
from bayes_mpt.program.affine.maps import DenseMap, Map
from bayes_mpt.program.affine.normals import check_normal, latent_values
from bayes_mpt.program.affine.reading import affine_form, first_reading, read
from bayes_mpt.program.affine.stated import (
    StatedMixture,
    read_mixture,
    read_stated,
    stated_form,
    stated_mixture,
)
from bayes_mpt.program.affine.tokens import token_means
from bayes_mpt.program.affine.trial import same_by_label

__all__ = [
    "AffineForm",
    "Dense",
    "DenseMap",
    "Map",
    "NotAffine",
    "StatedMixture",
    "Way",
    "affine_form",
    "check_normal",
    "first_reading",
    "latent_values",
    "read",
    "read_mixture",
    "read_side_by_side",
    "read_stated",
    "same_by_label",
    "stated_form",
    "stated_mixture",
    "token_means",
]
