"""Which way fits a program."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from bayes_mpt.inputs import wanted
from bayes_mpt.predictors.base import Bound, Guide, Predictor
from bayes_mpt.predictors.exact import by_its_map, summed_out
from bayes_mpt.predictors.gaussian.nearest_neighbors import NearestNeighbors, near_conditionals
from bayes_mpt.predictors.gaussian.process import JointGaussian, gaussian_program
from bayes_mpt.predictors.nodes.adaptive import AdaptiveNodes
from bayes_mpt.predictors.nodes.importance import Importance
from bayes_mpt.predictors.nodes.quadrature import MAX_WIDTH, Quadrature
from bayes_mpt.predictors.nodes.smc import SequentialMonteCarlo
from bayes_mpt.predictors.self_predictive import SelfPredictive
from bayes_mpt.program.affine import NotAffine
from bayes_mpt.program.arguments import fill_all
from bayes_mpt.program.program import Model, ModelError, Program
from bayes_mpt.program.run import run, takes_visible
from bayes_mpt.program.shift_trials import observing_cells
from bayes_mpt.program.sites import latent_nodes
from bayes_mpt.runtime.serial import takes_turns

__all__ = ["choose"]

N_DRAWS = 1000
MAX_JOINT = 4096  # tokens of one Gaussian vector whose covariance is made whole


def _samples(guide: Guide, args: tuple[Any, ...]) -> bool:
    """Whether a guide has any site: SVI wants one also where nothing is to be drawn."""
    filled = fill_all(args)
    if takes_visible(guide):
        guide = partial(guide, visible=torch.ones_like(filled[0], dtype=torch.bool))
    return bool(latent_nodes(run(guide, filled)))


@takes_turns
def choose(
    model: Model,
    args: tuple[Any, ...],
    *,
    predictor: Predictor | str = "auto",
    guide: Guide | None = None,
) -> Bound:
    """The program, scored in the most exact way that fits it.

    "auto" takes, in this order: of a program ``model(x, visible)`` what it says itself (`SelfPredictive`); of
    observations that are one Gaussian vector the exact density up to 4096 of them, beyond that `NearestNeighbors(30)`;
    a closed form, where the program is linear-Gaussian given its parameters; the sum over all values of discrete
    latents; with a guide, `Importance`; without one, `Quadrature` over up to four continuous latents. For more of them
    `Importance` around the mode of each row's posterior where they belong to rows, and where all rows share them
    `SequentialMonteCarlo`; or, if there are `pyro.param`s to be trained or latents of rows or groups inside,
    `Importance` around the modes.

    Parameters
    ----------
    model : callable
        A Pyro program.
    args : tuple
        What it is called with.
    predictor : Predictor or "auto"
        A way to take instead.
    guide : callable, optional
        For `Importance`.

    Raises
    ------
    bayes_mpt.program.program.ModelError
        If the program cannot be scored; the message names the site and what to do.
    """
    if predictor != "auto":
        words = "predictor must be 'auto' or a predictor such as Exact() or Importance(100)"
        # abstract, which mypy does not take for a type
        return wanted(Predictor, predictor, words, ValueError).bind(model, args, guide)  # type: ignore[type-abstract]
    if takes_visible(model):
        return SelfPredictive().bind(model, args, guide)
    return observing_cells(lambda program: _chosen(program, args, guide), model, args)


def _chosen(model: Model, args: tuple[Any, ...], guide: Guide | None) -> Bound:
    """What "auto" takes for a program that observes its data."""
    vector = gaussian_program(model, args)
    if vector is not None:
        if len(args[0]) > MAX_JOINT:
            return near_conditionals(NearestNeighbors(), model, args, vector)
        return JointGaussian(model, vector)
    return by_its_map(model, args, partial(_not_affine, model, args, guide))


def _not_affine(
    model: Model, args: tuple[Any, ...], guide: Guide | None, program: Program, reason: NotAffine
) -> Bound:
    """The same for a program that has no linear-Gaussian map."""
    if not program.continuous:
        return summed_out(model, args, program, reason)
    if program.discrete and {s.kind for s in program.sites} <= {"Normal", "MultivariateNormal"}:
        try:
            return summed_out(model, args, program, reason)
        except ModelError:
            pass  # not linear-Gaussian given the discrete latents either
    if guide is not None and _samples(guide, args):
        return Importance().bind(model, args, guide)
    adaptive = AdaptiveNodes(model, args, program)
    if adaptive.space.width <= MAX_WIDTH:  # where the others are integrated in closed form, or piece by piece
        return Quadrature().bind_nodes(adaptive)
    if program.by_row:
        return Importance().bind_nodes(adaptive)
    # sequential Monte Carlo trains no parameters, and moves of particles with nodes in every row or group cost minutes
    if program.parameters or adaptive.rows is not None:
        # one integral over many latents deserves more draws than one of many rows
        return Importance(N_DRAWS).bind_nodes(adaptive)
    return SequentialMonteCarlo().bind(model, args)
