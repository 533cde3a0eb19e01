"""Which parameter of a program says where its rows lie: found by moving both.

Rows far from zero beside their spread (seconds since 1970, a calibrated 1e9) leave few digits for the spread. If adding
d to every row and to one parameter leaves all densities as they are, the program can be fitted to the rows less
their means, and what was subtracted be added to that parameter afterwards.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import constraints

from bayes_mpt.program.arguments import fill
from bayes_mpt.program.program import Model
from bayes_mpt.program.run import first_run, run, takes_visible
from bayes_mpt.program.sites import is_subsample
from bayes_mpt.program.store import OwnStore

__all__ = ["location_parameter"]

TOL = 1e-9


def location_parameter(model: Model, args: tuple[Any, ...], moved: NDArray[np.bool_]) -> str | None:
    """The name of a parameter (..., T) that moves with the rows; None where the program has no such.

    Parameters
    ----------
    model : callable
        A Pyro program.
    args : tuple
        A few rows (n, T) first, near zero.
    moved : array of shape (T,)
        The columns that are to move.
    """
    if takes_visible(model):
        return None
    rows = fill(args[0])
    sd = rows.std(0, correction=0)
    generator = torch.Generator().manual_seed(0)
    size = 1 + torch.rand(len(sd), generator=generator, dtype=torch.float64).to(sd)
    step = torch.where(sd > 0, sd, torch.ones_like(sd)) * size * torch.as_tensor(moved).to(sd)  # (T,)
    with OwnStore() as store:
        try:
            first_run(model, (rows, *args[1:]))
            bounds = pyro.get_param_store().get_state()["constraints"]
            leaves = dict(pyro.get_param_store().named_parameters())
            store.begin(None)
            for name, leaf in leaves.items():
                if bounds[name] is constraints.real and leaf.shape[-1:] == step.shape:
                    if _moves(model, (rows, *args[1:]), leaves, name, step):
                        return name
        except (RuntimeError, ValueError, IndexError):
            return None  # a program that does not run says why where it is read
    return None


@torch.no_grad()
def _moves(model: Model, args: tuple[Any, ...], leaves: dict[str, Tensor], name: str, step: Tensor) -> bool:
    """Whether the densities stay, at the initial parameters and at others close by."""
    generator = torch.Generator().manual_seed(1)
    before = {n: leaf.detach().clone() for n, leaf in leaves.items()}
    try:
        for spread in (0.0, 0.1):
            for leaf in leaves.values():
                noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)
                leaf += spread * leaf.abs() * noise
            here = run(model, args)
            latents = {n: node["value"] for n, node in here.nodes.items() if _drawn(node)}
            leaves[name] += step
            there = run(model, (args[0] + step, *args[1:]), latents)
            leaves[name] -= step
            if not _same_densities(here, there):
                return False
        return True
    finally:
        for n, leaf in leaves.items():
            leaf.copy_(before[n])


def _drawn(node: Any) -> bool:
    return node["type"] == "sample" and (not node["is_observed"] or is_subsample(node))


def _same_densities(here: Trace, there: Trace) -> bool:
    """Of all sites, and that what is observed did move."""
    if here.nodes.keys() != there.nodes.keys():
        return False
    here.compute_log_prob()
    there.compute_log_prob()
    moved = False
    for name, node in here.nodes.items():
        if node["type"] != "sample" or is_subsample(node):
            continue
        a, b = node["log_prob"], there.nodes[name]["log_prob"]
        if a.shape != b.shape or not bool(((a - b).abs() <= TOL * (1 + a.abs() + b.abs())).all()):
            return False
        moved |= node["is_observed"] and not torch.equal(node["value"], there.nodes[name]["value"])
    return moved
