"""An order of tokens in which each looks at earlier ones alone, from what moves with which cells; or a cycle."""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["After", "Moved", "cycle_of", "reached", "sorted_tokens"]

After = tuple[NDArray[np.bool_], NDArray[np.bool_]]
"""Which tokens (L, T) and latents (L, L) are drawn after each latent, and so may depend on it."""


class Moved(NamedTuple):
    """What moves with the cells of each of B blocks."""

    value: NDArray[np.bool_]
    """(B, T) tokens."""
    law: NDArray[np.bool_]
    """(B, T) laws of tokens."""
    latents: NDArray[np.bool_]
    """(B, L) priors of latent sites."""


def sorted_tokens(moved: Moved, after: After) -> list[int] | None:
    """The tokens, each behind those that it looks at, else as they stand; None where there is a cycle."""
    value, law, latents = moved
    (n_blocks, n_tokens), n_latents = value.shape, latents.shape[1]
    # nodes: tokens, blocks of cells, latents; a block comes after its tokens and before what it moves
    children: list[list[int]] = [(n_tokens + np.flatnonzero(row)).tolist() for row in value.T]
    children += [
        [*np.flatnonzero(law[b]).tolist(), *(n_tokens + n_blocks + np.flatnonzero(latents[b])).tolist()]
        for b in range(n_blocks)
    ]
    moving = np.asarray(latents.any(0))
    for z in range(n_latents):
        # a latent whose prior looks at no token needs no place
        then = np.flatnonzero(after[0][z]).tolist() if moving[z] else []
        then += (n_tokens + n_blocks + np.flatnonzero(after[1][z] & moving)).tolist() if moving[z] else []
        children.append(then)
    waits = np.zeros(len(children), int)
    for some in children:
        np.add.at(waits, some, 1)
    ready = [(i if i < n_tokens else -1, i) for i in np.flatnonzero(waits == 0).tolist()]
    heapq.heapify(ready)
    out: list[int] = []
    n_done = 0
    while ready:
        _, i = heapq.heappop(ready)
        n_done += 1
        if i < n_tokens:
            out.append(i)
        for j in children[i]:
            waits[j] -= 1
            if not waits[j]:
                heapq.heappush(ready, (j if j < n_tokens else -1, j))
    return out if n_done == len(children) else None


def cycle_of(moved: Moved, after: After) -> list[int]:
    """Blocks of a shortest cycle, of which the tokens of each look at the next one's, and the last at the first's.

    Empty where there is none.
    """
    looks = reached(moved, after).astype(int) @ moved.value.T.astype(int) > 0  # (B, B)
    return _shortest_cycle(looks)


def reached(moved: Moved, after: After) -> NDArray[np.bool_]:
    """Tokens (B, T) whose laws move with each block: by themselves, or by latents whose prior does."""
    return np.asarray(moved.law | (moved.latents.astype(int) @ after[0].astype(int) > 0))


def _shortest_cycle(edge: NDArray[np.bool_]) -> list[int]:
    """Nodes of a shortest cycle of a graph (B, B)."""
    alone = np.flatnonzero(edge.diagonal())
    if len(alone):
        return [int(alone[0])]
    best: list[int] = []
    for start in range(len(edge)):
        came = {start: -1}
        line = [start]
        while line and not best:
            following = []
            for i in line:
                if edge[i, start]:
                    best = [i]
                    while came[best[-1]] >= 0:
                        best.append(came[best[-1]])
                    break
                for j in np.flatnonzero(edge[i]).tolist():
                    if j not in came:
                        came[j] = i
                        following.append(j)
            line = following
        if best:
            return best
    return best
