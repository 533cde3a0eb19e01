"""In which units the parameters move, so that the path is the same whatever the columns' scales."""

from __future__ import annotations

import math

import pyro
import torch
from torch import Tensor
from torch.distributions import constraints

from bayes_mpt.predictors import Conditionals, Objective
from bayes_mpt.predictors.objective import Outputs
from bayes_mpt.training.problem import assign, flat, untouched

__all__ = ["metric", "units"]

N_SCALE_PROBES = 4
MAX_WHITENED = 64  # parameters whose information matrix is taken whole


def units(objective: Objective, leaves: dict[str, Tensor], read: Conditionals | None = None) -> Tensor:
    """A step of one in each parameter should move the outputs of an objective (`Objective.outputs`) by about one.

    Over random signs v, E (J' v)_j^2 is sum_i J_ij^2, J being the outputs' Jacobian.
    """
    return _units(objective.outputs(read), leaves)


def _units(found: Outputs | None, leaves: dict[str, Tensor]) -> Tensor:
    if found is None:
        return torch.ones_like(flat(leaves)).detach()
    outputs = found.value
    if found.spread is not None:
        outputs = math.sqrt(2) * (outputs / found.spread) / math.sqrt(len(outputs))
    generator = torch.Generator().manual_seed(0)
    square = torch.zeros_like(flat(leaves))
    for _ in range(N_SCALE_PROBES):
        sign = torch.randint(0, 2, outputs.shape, generator=generator).to(outputs) * 2 - 1
        grads = torch.autograd.grad(
            outputs, list(leaves.values()), sign, retain_graph=True, materialize_grads=True
        )
        square += torch.cat([g.flatten() for g in grads]).square() / N_SCALE_PROBES
    for name, part in zip(leaves, square.split([v.numel() for v in leaves.values()]), strict=True):
        if part.numel() and not bool((part > 0).any()) and found.whole:
            raise untouched(name)
    unit = torch.where(square > 0, square, torch.ones_like(square)).rsqrt().detach()
    # A constrained parameter moves through a logarithm or the like: one is far, and at a bound its slope is zero.
    bound = pyro.get_param_store().get_state()["constraints"]
    most = [
        torch.full_like(v.flatten(), math.inf if bound[n] is constraints.real else 1.0)
        for n, v in leaves.items()
    ]
    if found.few_rows:
        # What a few rows alone touch (a guide's own numbers for each row) would look flat: no further than its size.
        most.append(flat(leaves).detach().abs().clamp(min=1.0))
        return torch.minimum(unit, torch.minimum(torch.cat(most[:-1]), most[-1]))
    return torch.minimum(unit, torch.cat(most))


def metric(objective: Objective, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """`units`, and of one Gaussian vector the matrix that whitens: in its units the information of all tokens is one.

    With mean m_i and variance v_i of each token given those before it, the information about the parameters is
    sum_i  dm_i dm_i' / v_i + 1/2 d(log v_i) d(log v_i)',  found by differences on some of the tokens.
    """
    here = objective.outputs()
    unit = _units(here, leaves)
    if here is None or here.spread is None or here.weight is None or len(unit) > MAX_WHITENED:
        return unit, None
    start, step = flat(leaves).detach().clone(), 1e-3 * unit
    columns = []
    with torch.no_grad():
        for k in range(len(start)):
            ends: list[Tensor] = []
            for sign in (1, -1):
                moved = start.clone()
                moved[k] += sign * step[k]
                assign(leaves, moved)
                found = objective.outputs()
                assert found is not None
                ends.append(found.value / here.spread)
            columns.append((ends[0] - ends[1]) / 2e-3)
        assign(leaves, start)
    jacobian = torch.stack(columns, 1)  # (2B, D) in steps of the units
    if not bool(torch.isfinite(jacobian).all()):
        return unit, None
    information, vectors = torch.linalg.eigh(jacobian.mT @ (here.weight[:, None] * jacobian))
    # no step beyond the unit of a single parameter: where the data say nothing, nor does their information
    return unit, vectors * information.clamp(min=1.0).rsqrt()
