"""What the nodes of a rule, and those of a finer one, tell of their error."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bayes_mpt.predictors.nodes.mixture import Modes
from bayes_mpt.predictors.nodes.panels import roughness
from bayes_mpt.predictors.nodes.rules import Rule

__all__ = ["MAX_WHOLE", "beyond", "changes", "shells", "size", "uneven_axes", "without_corners"]

MAX_WHOLE = 1024  # nodes, up to which all are tried at once
SHELLS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)  # share of a Gaussian outside of each
CORNERS = (
    1e-6  # share of a Gaussian at nodes that are left out, of many at each of which rows or groups have nodes
)


def changes(rule: Rule, finer: Rule, change: float) -> dict[str, Any]:
    """By how much the finer rule has changed log Z, in words."""
    n_nodes, more = (len(r.t[:, 0].unique()) if r.t.shape[1] else 1 for r in (rule, finer))
    return {"n_nodes": more, f"change from {n_nodes} nodes": change}


def uneven_axes(log_part: Tensor, n_modes: int) -> float:
    """Nats by which jumps along an axis of a product rule of two (J Q^2, N) may move the sum of all rows."""
    n = math.isqrt(len(log_part) // n_modes)
    grid = log_part.unflatten(0, (n_modes, n, n))
    return max(float(roughness(part.flatten(0, 1)).sum()) for part in (grid, grid.transpose(1, 2)))


def size(change: Tensor) -> float:
    """Of changes of rows (N,) in one number: that of their sum, or their own where they cancel by chance."""
    return max(abs(float(change.sum())), float(change.square().sum().sqrt()))


def shells(rule: Rule) -> Tensor:
    """The shell (Q,) of each node of a rule, by the share of a Gaussian that lies outside; one of a small rule."""
    t, log_w = rule.t, rule.log_weight
    if len(t) <= MAX_WHOLE:
        return torch.zeros(len(t), dtype=torch.long)
    radius = t.square().sum(1)
    outwards, order = radius.sort()
    until = (log_w - 0.5 * radius)[order].softmax(0).cumsum(0)
    inside = until[torch.searchsorted(outwards, radius + 1e-9) - 1]
    return torch.bucketize(inside - 1, -torch.tensor(SHELLS, dtype=t.dtype))


def without_corners(rule: Rule) -> Rule:
    """The nodes of a large rule but those of the smallest weights, together `CORNERS` of a Gaussian."""
    if len(rule.t) <= MAX_WHOLE:
        return rule
    share = (rule.log_weight - 0.5 * rule.t.square().sum(1)).softmax(0)
    order = share.argsort(stable=True)
    kept = order[share[order].cumsum(0) > CORNERS].sort().values
    return Rule(rule.t[kept], rule.log_weight[kept])


def beyond(log_prob: Tensor, modes: Modes, rule: Rule) -> float:
    """Share of the integral (J Q, N) at the outermost nodes, above that of a Gaussian: as much may lie beyond them."""
    t, log_w = rule.t.to(log_prob), rule.log_weight.to(log_prob)
    outer = t.abs().amax(1) >= t.max() * (1 - 1e-9)
    gaussian = (log_w - 0.5 * t.square().sum(1)).softmax(0)[outer].sum()
    at_outer = log_prob.softmax(0).unflatten(0, (len(modes.mode), len(t)))[:, outer].sum()
    return float((at_outer - 2 * gaussian).clamp(min=0))
