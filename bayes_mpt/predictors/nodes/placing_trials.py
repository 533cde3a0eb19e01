"""How nodes are to stand in the rows or groups of a table, found out by evaluation at its data.

Of rows by themselves the usual rule is held against one that reaches as far as the density does. Inside of latents that
all rows share this is done at a few draws of these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayes_mpt.predictors.nodes.placing import Placing, integral
from bayes_mpt.predictors.nodes.rules import MAX_HERMITE, Rule, alone_rule
from bayes_mpt.program.arguments import Args

if TYPE_CHECKING:
    from bayes_mpt.predictors.nodes.adaptive import AdaptiveNodes
    from bayes_mpt.predictors.nodes.group_nodes import GroupNodes
    from bayes_mpt.predictors.nodes.row_nodes import RowNodes

__all__ = ["placing_inside", "placing_of_rows"]

ENOUGH = {1: 1e-6, 2: 1e-4, 3: 1e-3, 4: 3e-3}  # nats that a finer rule may change in a row, by its latents
ENOUGH_INSIDE = 0.01  # nats that it may change in all rows or groups
CELLS = 2**20  # log-densities of tokens at a time


def placing_of_rows(at: AdaptiveNodes, args: Args, x: Tensor, rule: Rule | None) -> Placing:
    """For rows by themselves, or for groups where there are no other latents; without a rule of nodes their modes."""
    everything, width = torch.ones(x.shape[1], dtype=torch.bool, device=x.device), at.space.width
    if not width:
        if at.rows is None:
            return Placing()
        most = ENOUGH.get(at.rows.width, ENOUGH_INSIDE)
        placing_inside(at, args, x, everything, x.new_zeros(1, 1, 0), x.new_zeros(1), most)
        return at.rows.placing
    starts = at.row_starts(args, x, everything)
    placing = Placing(starts is not None and width <= MAX_HERMITE, starts)
    if rule is None or width > MAX_HERMITE or placing.far:
        return placing
    finer = alone_rule(width, fine=True)
    modes = at.locate(args, x, everything, placing, finer.cut)
    density = at.row_density(args, x, everything, {})
    many = integral(density, modes, finer, x.shape[1])
    usual = integral(density, modes._replace(reach=None), rule, x.shape[1])
    return placing._replace(far=bool(((many - usual).abs() > ENOUGH[width]).any()))


def placing_inside(
    at: AdaptiveNodes,
    args: Args,
    x: Tensor,
    visible: Tensor,
    u: Tensor,
    log_q: Tensor,
    most: float = ENOUGH_INSIDE,
) -> float:
    """Place nodes in every row or group as they must be, seen at draws u (M, 1, d) of the other latents.

    Returns by how many nats log Z has changed, infinity where rows have come to have several modes; 0 where all is left
    as it was. ``log_q`` (M,) is the density of the draws.
    """
    rows = at.rows
    assert rows is not None
    if not rows.width:  # in closed form
        return 0.0
    before = rows.placing

    def joint(rows: RowNodes | GroupNodes, fine: bool) -> Tensor:
        found = []
        n_nodes = len(rows.rule("fine").t) * rows.placing.n_modes
        for part in u.split(max(1, CELLS // max(1, x.numel() * n_nodes))):
            given, log_det, _ = at.at(args, part)
            with rows.nearby.unmoved():
                detailed = given.with_detail("fine") if fine else given
                found.append((detailed.log_joint(x, visible) + log_det)[:, 0])
        return torch.cat(found) - log_q

    usual = joint(rows, fine=False)
    best = int(usual.nan_to_num(-torch.inf).argmax())
    held = {name: v[None] for name, v in at.space._replace(depth=0).values(u[best : best + 1])[0].items()}
    starts = rows.starts(args, held, x, visible)
    far = before.far or starts is not None
    change = torch.inf if starts is not None else 0.0
    if not far and rows.width <= MAX_HERMITE:
        change = abs(float(joint(rows, fine=True).logsumexp(0) - usual.logsumexp(0)))
        far = change > most
        change = change if far else 0.0
    at.rows = rows.placed(Placing(far and rows.width <= MAX_HERMITE, starts))
    return change
