"""Discrete latents of the data set beside Normal ones: a linear-Gaussian map for each joint value of all of them."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from bayes_mpt.predictors.gaussian.linear import LinearGaussian
from bayes_mpt.predictors.nodes.given import AffineBatch
from bayes_mpt.predictors.nodes.weighted import FixedSites, NodeSource, Read
from bayes_mpt.program.arguments import fill
from bayes_mpt.program.densities import log_density
from bayes_mpt.program.devices import own_random_state
from bayes_mpt.program.program import Model, ModelError, Program
from bayes_mpt.program.run import run

__all__ = ["MAX_JOINT_VALUES", "joint_maps"]

MAX_JOINT_VALUES = 256  # each is read by itself: some ten runs of the program


class _JointMaps(NodeSource):
    """One node for each joint value c of the discrete latents, p(x) = sum_c p(c) N(x; m_c, C_c)."""

    name = "Exact"

    def __init__(self, model: Model, args: tuple[Any, ...], program: Program):
        self.model, self.structure = model, program
        self.values = _all_values(model, args, program)
        self.maps = [LinearGaussian(FixedSites(model, value), args) for value in self.values]
        self.why = (
            f"the {len(self.values)} joint values of {', '.join(program.discrete)} are summed out, and given them "
            "every mean is affine in the other latents"
        )
        if not torch.allclose(self._log_prior(args, 0), self._log_prior(args, 1), rtol=1e-9, atol=1e-12):
            raise ModelError(
                f"the distribution of {list(program.discrete)} depends on {list(program.continuous)}: given the "
                "discrete values the others are not Gaussian. Use Importance() with a guide"
            )

    def place(self, args: tuple[Any, ...], visible: Tensor | None = None, near: Any = None) -> Read:
        maps = [of_value.read(args) for of_value in self.maps]
        discrete = self.structure.discrete
        flat = [torch.cat([value[name].flatten() for name in discrete]) for value in self.values]
        latents = torch.stack(flat).to(maps[0].value)[:, None]  # (S, 1, K)
        log_weight = self._log_prior(args)[:, None]
        return Read(AffineBatch(maps), log_weight, maps[0].value, maps[0].scale, latents, discrete)

    def _log_prior(self, args: tuple[Any, ...], seed: int = 0) -> Tensor:
        """log p(c) of each joint value (S,); the other latents are drawn, and must not matter."""
        filled, out = tuple(fill(a) for a in args), []
        for value in self.values:
            with own_random_state(seed):
                trace = run(FixedSites(self.model, value, hide=False), filled)
            nodes = [trace.nodes[name] for name in self.structure.discrete]
            out.append(torch.stack([log_density(n["fn"], n["value"]).sum() for n in nodes]).sum())
        return torch.stack(out)


def joint_maps(model: Model, args: tuple[Any, ...], program: Program) -> NodeSource:
    """Programs that are linear-Gaussian given discrete latents of the data set.

    Raises
    ------
    ModelError
        If these have more than `MAX_JOINT_VALUES` joint values.
    NotAffine
        If some value leaves a program that is no linear-Gaussian one.
    """
    return _JointMaps(model, args, program)


def _all_values(model: Model, args: tuple[Any, ...], program: Program) -> list[dict[str, Tensor]]:
    """Every joint value of the discrete latents, each site's in its own shape."""
    trace = run(model, tuple(fill(a) for a in args))
    choices, total = [], 1
    for name in program.discrete:
        fn = trace.nodes[name]["fn"]
        support = fn.enumerate_support(expand=False)  # (values, 1, ..., event)
        support = support.reshape(len(support), *fn.event_shape)
        n_drawn = fn.batch_shape.numel()
        total *= len(support) ** n_drawn
        if total > MAX_JOINT_VALUES:
            raise ModelError(
                f"discrete latents {list(program.discrete)} have more than {MAX_JOINT_VALUES} joint values, each of "
                "which would need a linear-Gaussian map: use fewer, or Importance() with a guide"
            )
        of_site = [
            torch.stack(picked).reshape(fn.batch_shape + fn.event_shape)
            for picked in product(support, repeat=n_drawn)
        ]
        choices.append(of_site)
    return [dict(zip(program.discrete, values, strict=True)) for values in product(*choices)]
