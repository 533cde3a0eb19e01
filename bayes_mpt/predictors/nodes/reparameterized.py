"""The doubly reparameterised gradient of draws from a guide."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.autograd.function import once_differentiable

from bayes_mpt.program.layout import rows_axis
from bayes_mpt.program.program import Program
from bayes_mpt.program.sites import is_point, is_subsample

__all__ = ["AlongDraws", "DrawsAsLeaves"]


class AlongDraws(torch.autograd.Function):
    """log q of draws, the draws and what else the guide made of them; the gradient doubly reparameterised.

    With shares v_s of the weights w_s = p(x, z_s) / q(z_s), z_s = z(noise, phi), both of

        d/d phi log mean w = sum_s v_s   (d log w_s / d z_s  d z_s / d phi  -  d log q(z_s) / d phi)
                             sum_s v_s^2  d log w_s / d z_s  d z_s / d phi

    have the same expectation. What arrives for log q is -v_s times something that the draws of a row share, so that v
    can be read off it.
    """

    @staticmethod
    def forward(ctx: Any, drawn: DrawsAsLeaves, found: list[Tensor], *raw: Tensor) -> Any:
        ctx.drawn, ctx.found = drawn, found
        return tuple(t.detach() for t in (*found, *drawn.leaves))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        drawn, found, leaves = ctx.drawn, ctx.found, ctx.drawn.leaves
        total = grads[0].sum(0)
        share = torch.where(total == 0, 0.0, grads[0] / total)  # 0: a row without any visible token
        moving = [i for i, f in enumerate(found) if f.requires_grad]
        inner = torch.autograd.grad(
            [found[i] for i in moving],
            leaves,
            [grads[i] for i in moving],
            retain_graph=True,
            materialize_grads=True,
        )
        back = [
            share.reshape(layout) * (a + b)
            for layout, a, b in zip(drawn.layouts, inner, grads[len(found) :], strict=True)
        ]
        for i in range(len(leaves) - 1, 0, -1):  # later draws that were made from earlier ones
            if drawn.raw[i].requires_grad:
                more = torch.autograd.grad(
                    drawn.raw[i], leaves[:i], back[i], retain_graph=True, allow_unused=True
                )
                back[:i] = [a if b is None else a + b for a, b in zip(back, more, strict=False)]
        return None, None, *back


class DrawsAsLeaves(poutine.messenger.Messenger):
    """Hands a guide's draws on as leaves, so that its later sites look at them apart from its parameters."""

    def __init__(self, program: Program, n: int):
        super().__init__()
        self.program, self.n = program, n
        self.names: list[str] = []
        self.raw: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self.layouts: list[list[int]] = []
        """Shapes that bring (S, N) beside each draw."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_subsample(msg) or is_point(msg):
            return
        value, axis = msg["value"], rows_axis(msg, self.program)
        layout = [1] * value.ndim
        if self.n > 1:
            layout[0] = self.n
        if axis is not None:
            layout[axis - msg["fn"].event_dim] = -1
        msg["value"] = value.detach().requires_grad_()
        self.names.append(msg["name"])
        self.raw.append(value)
        self.leaves.append(msg["value"])
        self.layouts.append(layout)
