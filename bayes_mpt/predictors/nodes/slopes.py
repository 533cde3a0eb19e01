"""Whether weighted draws of a guide cover a posterior: by the slope of its log density, which is none on average.

    E[d log p(u, x) / du] = 0,  E[(u - E u) d log p(u, x) / du] = -1

under the posterior, by parts. A guide that is much narrower than the posterior often has a low Pareto k, since it never
draws the large weights; its weighted draws have a slope all the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import norm
from torch import Tensor

from bayes_mpt.program.batched import Batched
from bayes_mpt.program.latents import Space, space
from bayes_mpt.program.layout import from_rows
from bayes_mpt.program.run import run

if TYPE_CHECKING:
    from bayes_mpt.predictors.nodes.guide import GuideDraws
    from bayes_mpt.predictors.nodes.weighted import Nodes

__all__ = ["FALSE", "numbers_at", "slopes_at", "slopes_of", "what_is_missed"]

Array = NDArray[np.float64]

FALSE = 1e-4  # chance that means which are zero for the posterior look as if they were not
TINY = 1e-300


def slopes_at(bound: GuideDraws, nodes: Nodes) -> tuple[Array, Array]:
    """The draws of a guide as unconstrained numbers u (S, N, d), and the slope of log p(u, x) there."""
    where, u = numbers_at(bound, nodes)
    return u.double().cpu().numpy(), slopes_of(bound, nodes, where, u)


def numbers_at(bound: GuideDraws, nodes: Nodes) -> tuple[Space, Tensor]:
    """The space of the latents that a guide draws, and its draws there, u (S, N, d)."""
    program, names = bound.structure, nodes.last.names
    n_draws, n_rows, _ = nodes.last.latents.shape
    sites = [site for site in program.latents if site.name in names]
    parts = nodes.last.latents.split([site.width for site in sites], -1)
    where = space(program, run(bound.model, nodes.args.filled), names)
    given = {s.name: from_rows(part, s.shape, s.row_axis) for s, part in zip(sites, parts, strict=True)}
    return where, where.pack_values(given, n_draws, n_rows)


def slopes_of(bound: GuideDraws, nodes: Nodes, where: Space, u: Tensor) -> Array:
    """The slope (S, N, d) of log p(u, x) at unconstrained numbers u (S, N, d)."""
    drawn, slopes = bound.drawn(nodes.args, None), []
    seen = torch.ones(drawn.value.shape[1], dtype=torch.bool, device=drawn.value.device)
    for part in u.split(1 if bound.batched is Batched.LOOP else len(u)):
        with torch.enable_grad():
            leaf = part.clone().requires_grad_()
            values, log_det = where.values(leaf)
            inner, beside, *_ = drawn.given(values, len(leaf))
            total = (inner.log_joint(drawn.value, seen) + beside + log_det).sum()
            slopes.append(torch.autograd.grad(total, leaf, materialize_grads=True)[0])
    return torch.cat(slopes).double().cpu().numpy()


def what_is_missed(u: Array, slope: Array, share: Array) -> str:
    """What says that draws u (S, N, d) with shares (S, N, 1) leave out a part of the posterior; empty if nothing does.

    Examples
    --------
    >>> u = np.random.default_rng(0).normal(size=(1000, 1, 1))
    >>> even = np.full(u.shape, 1e-3)
    >>> what_is_missed(u, -u, even)  # of a standard normal posterior
    ''
    >>> what_is_missed(u, -(u - 1), even)[:51]
    'the posterior reaches where the guide draws nothing'
    """
    centred = u - (share * u).sum(0)
    zero = np.concatenate([slope, centred * slope + 1], -1)
    mean = (share * zero).sum(0)
    off = np.abs(mean) / np.sqrt(np.square(share * (zero - mean)).sum(0) + TINY)
    if not off.max() > norm.isf(FALSE / off.size):
        return ""
    return (
        f"the posterior reaches where the guide draws nothing (the log joint has a slope, {off.max():.0f} errors from "
        "none, on average over the weighted draws): take a wider or richer guide, or train it longer"
    )
