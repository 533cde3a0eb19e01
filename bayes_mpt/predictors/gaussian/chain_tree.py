"""Stretches of a chain of blocks, joined in a binary tree: what `MarkovGaussian` computes with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayes_mpt.predictors.gaussian.linear import Groups, cholesky, group_rows
from bayes_mpt.program.affine.sparse_map import Blocks, SparseMap
from bayes_mpt.program.program import ModelError, NotPositiveDefinite

__all__ = [
    "ChainRows",
    "Found",
    "Leaves",
    "down",
    "every_block",
    "every_moment",
    "finish",
    "leaves_of",
    "refuse_lost_digits",
    "take",
    "up",
]

MAX_LOST = 1e-7  # nats a token


class ChainRows:
    """Rows whose matrices are shared: (S, G, m, ...) of G groups, and vectors (S, V, m, ..., R), N = V R.

    R is N where all rows are one group, so that a product of matrices serves them all; otherwise V is N.
    """

    def __init__(self, x: Tensor, reading: SparseMap):
        if not bool((reading.noise > 0).all()):
            raise NotPositiveDefinite(
                f"a noise variance is {reading.noise.min().item()}: every token needs noise"
            )
        groups: Groups = group_rows(x, reading.loc)
        self.x, self.layout = x, reading.layout
        self.seen, self.index = groups.seen[0], groups.index  # (G, T), (N,)
        self.one = len(self.seen) == 1
        self.blocks = reading.blocks()
        value = x.new_zeros(len(x), self.layout.n_blocks * self.layout.n_slots)
        value = value.index_copy(1, self.layout.slot, x.nan_to_num(0.0))
        value = value.unflatten(1, (self.layout.n_blocks, self.layout.n_slots)) - self.blocks.loc  # (N, n, t)
        self.residual = value.movedim(0, -1)[None, None] if self.one else value[None, ..., None]

    def of(self, matrix: Tensor) -> Tensor:
        """(S, G, m, ...) of each row, where these are not one group."""
        return matrix if matrix.shape[1] == 1 else matrix[:, self.index]

    def rows_first(self, vector: Tensor) -> Tensor:
        """(S, V, m, R) -> (S, N, m)."""
        return vector[:, 0].movedim(-1, 1) if self.one else vector[..., 0]

    def of_rows(self, number: Tensor) -> Tensor:
        """(S, G, m) -> (S, N, m)."""
        return number[:, self.index]

    def by_token(self, vector: Tensor) -> Tensor:
        """(S, V, n, t, R) -> (S, N, T)."""
        return self.rows_first(vector.flatten(2, 3))[..., self.layout.slot]

    def of_token(self, number: Tensor) -> Tensor:
        """(S, G, n, t) -> (S, N, T)."""
        return self.of_rows(number.flatten(2))[..., self.layout.slot]

    def by_latent(self, vector: Tensor) -> Tensor:
        """(S, V, n, w, R) -> (S, N, K)."""
        return self.rows_first(vector.flatten(2, 3))[..., self.layout.place]

    def squares(self, vector: Tensor) -> Tensor:
        """Of mask 0: (S, V, n, w, R) -> (N,)."""
        return self.rows_first(vector.square().sum(-2))[0].sum(-1)

    def in_slots(self, tokens: Tensor) -> Tensor:
        """(S, G, T) bool -> (S, G, n, t)."""
        n, t = self.layout.n_blocks, self.layout.n_slots
        slots = torch.zeros(*tokens.shape[:2], n * t, dtype=torch.bool, device=tokens.device)
        return slots.index_copy(2, self.layout.slot, tokens).unflatten(2, (n, t))


class _Stretch(NamedTuple):
    """m stretches given their visible tokens: z_j given z_i is N(A z_i + b, C), and J, eta what they tell of z_i."""

    carry: Tensor
    """A: (S, G, m, w, w), as C and J."""
    cov: Tensor
    info: Tensor
    mean: Tensor
    """b: (S, V, m, w, R), as eta."""
    pull: Tensor
    logdet: Tensor
    """(S, G, m): of the covariance of the tokens given z_i, over that of their noise."""


class _Outside(NamedTuple):
    """What the rest of the chain tells of the two ends of a stretch."""

    mean: Tensor
    """Of the latents before it, given the tokens before it: N(mean, cov)."""
    cov: Tensor
    pull: Tensor
    """Of the last latents in it, from the tokens after it: exp(pull' z - z' info z / 2)."""
    info: Tensor


class Leaves(NamedTuple):
    """Stretches of one block, and what is needed to look inside."""

    stretch: _Stretch
    blocks: Blocks
    r: Tensor
    """(S, G, m, w, w): r u has unit covariance given z_(b-1) and the block's own tokens,"""
    white: Tensor
    """(S, V, m, w, R): and mean white - slope z_(b-1)."""
    slope: Tensor
    """(S, G, m, w, w)"""
    root: Tensor
    """(S, G, m, w, w): z_b changes by root with r u."""

    def take(self, index: Tensor) -> Leaves:
        """Of these blocks, by number."""
        inside = (t[:, :, index] for t in (self.r, self.white, self.slope, self.root))
        return Leaves(take(self.stretch, index), self.blocks.take(index), *inside)


class Found(NamedTuple):
    """Posterior means, and variances of the tokens, in m blocks."""

    u: Tensor
    """(S, V, m, w, R), as z."""
    z: Tensor
    earlier: Tensor
    """Of the latents of the block before."""
    tokens: Tensor
    """(S, V, m, t, R)"""
    variance: Tensor
    """(S, G, m, t); of a visible token that of another one in its place."""


def take(part: Any, index: Tensor) -> Any:
    """Stretches by number, which tensors have on axis 2."""
    return type(part)(*(t[:, :, index] for t in part))


def leaves_of(blocks: Blocks, shown: Tensor, residual: Tensor, rows: ChainRows) -> Leaves:
    """Blocks (B, m, ...) given the tokens shown (S, G, m, t) of residuals (1, V, m, t, R)."""
    scale = torch.where(shown, blocks.noise.rsqrt(), 0.0)
    own, before = scale[..., None] * blocks.own, scale[..., None] * blocks.before
    width = own.shape[-1]
    eye = torch.eye(width, dtype=own.dtype, device=own.device).expand(*own.shape[:-2], width, width)
    # [I; own] = Q R without squaring:  u | z_(b-1), x ~ N(R^-1 Q2' (y - before z_(b-1)), (R' R)^-1)
    q, r = torch.linalg.qr(torch.cat([eye, own], -2))
    top, bottom = q[..., :width, :], q[..., width:, :]
    y = rows.of(scale[..., None]) * residual
    white = rows.of(bottom).mT @ y
    slope = bottom.mT @ before
    root = torch.linalg.solve_triangular(r, blocks.root.expand(*r.shape), left=False, upper=True)
    # What is left of `before` and y once u is fitted to them. Both are projected on the complement of Q: one would do,
    # were it not for the rounding errors of the other, which a small noise makes large.
    rest = torch.cat([-top @ slope, before - bottom @ slope], -2)
    y = torch.cat([-rows.of(top) @ white, y - rows.of(bottom) @ white], -2)
    stretch = _Stretch(
        carry=blocks.step - root @ slope,
        cov=root @ root.mT,
        info=rest.mT @ rest,
        mean=blocks.start[..., None] + rows.of(root) @ white,
        pull=rows.of(rest).mT @ y,
        logdet=2 * r.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1),
    )
    return Leaves(stretch, blocks, r, white, slope, root)


def _between(cov: Tensor, info: Tensor) -> tuple[Tensor, Tensor]:
    """(I + cov info)^-1 and the log determinant of its inverse, where two stretches meet."""
    if cov.shape[-1] == 1:
        total = 1 + cov * info
        return total.reciprocal(), total[..., 0, 0].log()
    total = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device) + cov @ info
    return torch.linalg.inv(total), torch.linalg.slogdet(total)[1]


def _forward(
    mean: Tensor, cov: Tensor, right: _Stretch, meet: Tensor, rows: ChainRows
) -> tuple[Tensor, Tensor]:
    """Latents at the end of a stretch, those at its start being N(mean, cov): meet = (I + cov info)^-1."""
    pulled = rows.of(right.carry @ meet) @ (mean + rows.of(cov) @ right.pull)
    return pulled + right.mean, _symmetric(right.carry @ meet @ cov @ right.carry.mT) + right.cov


def _backward(
    left: _Stretch, pull: Tensor, info: Tensor, meet: Tensor, rows: ChainRows
) -> tuple[Tensor, Tensor]:
    """What a stretch and the tokens after it tell of the latents before it: meet = (I + cov info)^-1."""
    carry = meet @ left.carry
    message = rows.of(carry).mT @ (pull - rows.of(info) @ left.mean)
    return message + left.pull, _symmetric(left.carry.mT @ info @ carry) + left.info


def _join(left: _Stretch, right: _Stretch, rows: ChainRows) -> _Stretch:
    """Two stretches, one behind the other."""
    meet, logdet = _between(left.cov, right.info)
    mean, cov = _forward(left.mean, left.cov, right, meet, rows)
    pull, info = _backward(left, right.pull, right.info, meet, rows)
    carry = right.carry @ meet @ left.carry
    return _Stretch(carry, cov, info, mean, pull, left.logdet + right.logdet + logdet)


def _symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)


def finish(leaves: Leaves, outside: _Outside, rows: ChainRows) -> Found:
    """Look inside the blocks."""
    stretch, blocks = leaves.stretch, leaves.blocks
    # z_(b-1) given everything
    pull, info = _backward(stretch, outside.pull, outside.info, _between(stretch.cov, outside.info)[0], rows)
    meet, _ = _between(outside.cov, info)
    cov = _symmetric(meet @ outside.cov)
    mean = rows.of(meet) @ (outside.mean + rows.of(outside.cov) @ pull)
    # r u given z_(b-1) and everything: precision I + root' info root, where a small noise has cancelled
    pulled = leaves.root.mT @ outside.info
    eye = torch.eye(pulled.shape[-1], dtype=pulled.dtype, device=pulled.device)
    factor = cholesky(eye + _symmetric(pulled @ leaves.root))
    slope = torch.cholesky_solve(leaves.slope + pulled @ blocks.step, factor)
    right = leaves.white + rows.of(leaves.root).mT @ outside.pull - rows.of(pulled) @ blocks.start[..., None]
    v = torch.cholesky_solve(right, rows.of(factor)) - rows.of(slope) @ mean
    u = torch.linalg.solve_triangular(rows.of(leaves.r), v, upper=True)
    own = torch.linalg.solve_triangular(
        leaves.r, blocks.own.expand(*leaves.r.shape[:-2], -1, -1), upper=True, left=False
    )
    before = blocks.before - own @ slope
    spread = torch.linalg.solve_triangular(factor, own.mT, upper=False)
    variance = blocks.noise + spread.square().sum(-2) + ((before @ cov) * before).sum(-1)
    z = blocks.start[..., None] + blocks.step @ mean + blocks.root @ u
    tokens = blocks.loc[..., None] + blocks.before @ mean + blocks.own @ u
    return Found(u, z, mean, tokens, variance)


@torch.no_grad()
def refuse_lost_digits(found: Found, outside: _Outside, rows: ChainRows) -> None:
    """The same latents, found from the block that they are in and from the next one, must agree.

    A gap changes the quadratic form by its product with the slope of what the tokens after it tell.
    """
    gap = (found.z - found.earlier.roll(-1, 2))[:, :, :-1]
    slope = (outside.pull - rows.of(outside.info) @ found.z)[:, :, :-1]
    lost = float((gap * slope).abs().sum((2, 3)).max()) if gap.numel() else 0.0
    if not lost <= MAX_LOST * rows.x.shape[1]:
        raise ModelError(
            f"along the chain of latents float64 loses digits (the log-density has an error of about {lost:.1g}): some "
            "standard deviations are too small beside others, such as noises of 1e-8 after a start of 1e6. Take a "
            "narrower start, or give tokens and latents more noise"
        )


class _Level(NamedTuple):
    """How the stretches of one level make those of the next, and what the latter's outsides say of the former's."""

    left: Tensor
    right: Tensor
    """Numbers of the stretches that are joined;"""
    single: Tensor
    """of those that have no neighbour, which come last."""
    before: Tensor
    """Numbers of the questions about a right part,"""
    left_of: Tensor
    """and of the stretch on their left;"""
    after: Tensor
    """about a left part,"""
    right_of: Tensor
    """and of the stretch on their right."""
    parent: Tensor | None = None
    """For each question its number on the level above; None where they are the same."""


def up(leaves: _Stretch, plan: list[_Level], rows: ChainRows) -> list[_Stretch]:
    """Stretches of every level, the longest last."""
    tree = [leaves]
    for level in plan:
        last = tree[-1]
        joined = _join(take(last, level.left), take(last, level.right), rows)
        if len(level.single):
            joined = _Stretch(
                *(torch.cat([a, b[:, :, level.single]], 2) for a, b in zip(joined, last, strict=True))
            )
        tree.append(joined)
    return tree


def down(tree: list[_Stretch], plan: list[_Level], rows: ChainRows) -> _Outside:
    """What the rest of the chain tells of each stretch at the bottom that is asked about."""
    top = tree[-1]
    zero = _Outside(*(torch.zeros_like(t) for t in (top.mean, top.cov, top.pull, top.info)))
    if plan and plan[-1].parent is None:  # as many questions as tokens, from the top on
        zero = take(zero, torch.zeros(rows.x.shape[1], dtype=torch.long, device=rows.x.device))
    outside = zero
    for level, last in zip(plan[::-1], tree[-2::-1], strict=True):
        if level.parent is not None:
            outside = take(outside, level.parent)
        mean, cov, pull, info = outside
        left = take(last, level.left_of)
        m, c = mean[:, :, level.before], cov[:, :, level.before]
        m, c = _forward(m, c, left, _between(c, left.info)[0], rows)
        right = take(last, level.right_of)
        p, i = pull[:, :, level.after], info[:, :, level.after]
        p, i = _backward(right, p, i, _between(right.cov, i)[0], rows)
        outside = _Outside(
            mean.index_copy(2, level.before, m),
            cov.index_copy(2, level.before, c),
            pull.index_copy(2, level.after, p),
            info.index_copy(2, level.after, i),
        )
    return outside


def every_block(n_blocks: int, device: torch.device) -> list[_Level]:
    """One stretch for every block at the bottom, and a question about each of these."""
    plan = []
    while n_blocks > 1:
        number = torch.arange(n_blocks, device=device)
        left, right = number[: n_blocks // 2 * 2 : 2], number[1::2]
        single = number[n_blocks // 2 * 2 :]
        plan.append(_Level(left, right, single, right, left, left, right, number // 2))
        n_blocks = len(left) + len(single)
    return plan


@dataclass(frozen=True)
class _Moments:
    """The tree of all versions along a chain: a stretch has one for each number of its tokens that are visible."""

    plan: list[_Level]
    """With a question for every token, about its own block just before it is revealed."""
    block: Tensor
    """(m,) of the versions at the bottom."""
    n_visible: Tensor
    """(m,) tokens that are."""
    nth: Tensor
    """(T,) of a token among those of its block, in the order of the chain."""
    version: Tensor
    """(T,) of its block at the moment of its question."""

    def shown(self, place: Tensor, n_slots: int) -> Tensor:
        """(m, t): visible tokens of the versions, which stand at these places (T,) in their block."""
        token_block = self.block[self.version]
        nth = torch.full((int(self.block.max()) + 1, n_slots), n_slots, device=place.device)
        nth[token_block, place] = self.nth
        return nth[self.block] < self.n_visible[:, None]


def every_moment(block: Tensor, order: Tensor, n_blocks: int) -> _Moments:
    """Versions of the stretches along a chain, for tokens (T,) of these blocks."""
    device = block.device
    tensor = lambda a: torch.from_numpy(np.ascontiguousarray(a)).to(device)  # noqa: E731
    n_tokens = len(block)
    rank = np.empty(n_tokens, dtype=np.int64)
    rank[order.cpu().numpy()] = np.arange(n_tokens)
    node, n = block.cpu().numpy(), n_blocks

    def versions(node: Any, n: int) -> tuple[Any, Any, Any]:
        """Tokens by node and rank; of each its number in its node; the first version of each node."""
        line = np.lexsort((rank, node))
        count = np.bincount(node, minlength=n)
        first = count.cumsum() - count
        nth = np.empty(n_tokens, dtype=np.int64)
        nth[line] = np.arange(n_tokens) - np.repeat(first, count)
        return line, nth, first + np.arange(n)

    _, nth, first = versions(node, n)
    of = np.repeat(np.arange(n), np.diff(np.append(first, n_tokens + n)))
    bottom = (tensor(of), tensor(np.arange(n_tokens + n) - first[of]), tensor(nth), tensor(first[node] + nth))
    plan = []
    while n > 1:
        parent, n_parents = node // 2, (n + 1) // 2
        line, nth, first_parent = versions(parent, n_parents)
        is_left = node % 2 == 0
        count = is_left[line].cumsum()
        # tokens of the left part up to and with this one, of those in the same parent
        with_this = np.empty(n_tokens, dtype=np.int64)
        start = np.append(0, count)[(first_parent - np.arange(n_parents))[parent]]
        with_this[line] = count
        with_this -= start
        of = np.repeat(np.arange(n_parents), np.diff(np.append(first_parent, n_tokens + n_parents)))
        n_left = np.zeros(n_tokens + n_parents, dtype=np.int64)
        n_left[first_parent[parent] + nth + 1] = with_this
        n_visible = np.arange(n_tokens + n_parents) - first_parent[of]
        pair = 2 * of + 1 < n
        left = first[2 * of] + n_left
        right = first[np.minimum(2 * of + 1, n - 1)] + n_visible - n_left
        single = (first[2 * of] + n_visible)[~pair]
        # just before a token is revealed
        left_before = with_this - is_left
        after = np.flatnonzero(is_left & (node + 1 < n))
        before = np.flatnonzero(~is_left)
        right_of = first[node[after] + 1] + nth[after] - left_before[after]
        left_of = first[node[before] - 1] + left_before[before]
        arrays = (left[pair], right[pair], single, before, left_of, after, right_of)
        plan.append(_Level(*[tensor(a) for a in arrays]))
        node, n, first = parent, n_parents, first_parent
    return _Moments(plan, *bottom)
