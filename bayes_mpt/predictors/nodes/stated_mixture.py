"""Mixtures of Gaussians that say so: their components are the nodes, read off the parameters without a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayes_mpt.predictors.gaussian.linear import LinearRows
from bayes_mpt.predictors.nodes.given import AffineBatch
from bayes_mpt.predictors.nodes.weighted import NodeSource, Read
from bayes_mpt.program.affine import StatedMixture, read_mixture, stated_mixture
from bayes_mpt.program.arguments import Args
from bayes_mpt.program.program import Model

__all__ = ["mixture_as_stated"]


class _AsStated(NodeSource):
    """One node for each component, with the Gaussian that the model states."""

    name = "Exact"
    why = "the model states the Gaussians of its components, with which its first run agrees; they are summed out"

    def __init__(self, model: Model, stated: StatedMixture):
        self.model, self.parts, self.structure = model, stated.parts, stated.program
        self.given = stated.program._replace(
            latents=(), per_row=True, scores_input=False, affine=True, dense=True
        )
        """What a row is once its component is known."""

    def place(self, args: Args, visible: Tensor | None = None, near: Any = None) -> Read:
        maps, log_weight = read_mixture(self.parts, self.model, args.given)
        components = torch.eye(len(log_weight)).to(log_weight)[:, None]  # (K, 1, K), one or zero
        return Read(
            AffineBatch(shared=LinearRows(self.given, maps)),
            log_weight[:, None],
            args.given[0],
            maps.scale,
            components,
            (),
        )


def mixture_as_stated(model: Model, args: tuple[Any, ...]) -> NodeSource | None:
    """A program that states its Gaussians (`bayes_mpt.program.affine.stated_mixture`); None of one that does not."""
    found = stated_mixture(model, args)
    return None if found is None else _AsStated(model, found)
