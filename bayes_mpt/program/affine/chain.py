"""Where the slopes of a map are, found from products with vectors; and its latents in the order of a chain."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import reverse_cuthill_mckee
from torch import Tensor

from bayes_mpt.program.affine.form import AffineForm
from bayes_mpt.program.affine.sparse_map import Layout, NotSparse

__all__ = ["arrange", "nonzeros"]

MAX_WIDTH = 64  # latents in a block
PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97)


def nonzeros(
    pull: Callable[[NDArray[np.float64]], Tensor], n_outputs: int, n_touched: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Outputs and latents of the nonzeros of J from products J' v, which ``pull`` gives.

    Outputs are dealt into buckets. With weights cos(angle_i) and sin(angle_i) for those of one bucket, a latent that
    reaches only one of them gives away which, by the angle. What is known is taken off, and other buckets are tried.

    Raises
    ------
    NotSparse
        If that does not find them all.
    """
    place = np.arange(n_outputs)
    random = np.random.default_rng(0)
    # Irregular angles, or the sum of two equal slopes would often look like a third output.
    angle = np.pi * (place + random.uniform(0.1, 0.9, n_outputs)) / n_outputs
    out, into, slope = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)

    def rest(v: NDArray[np.float64]) -> NDArray[np.float64]:
        """What of J' v the known nonzeros do not explain."""
        found = pull(v).detach().double().cpu().numpy()
        if not np.isfinite(found).all():
            raise ValueError("a slope is not finite")
        part = slope * v[out]
        found -= np.bincount(into, part, minlength=len(found))
        size = np.bincount(into, np.abs(part), minlength=len(found))
        return np.where(np.abs(found) <= 1e-11 * size, 0.0, found)

    check = random.standard_normal(n_outputs)
    for n_buckets in PRIMES:
        if not rest(check).any():
            return out, into
        if n_buckets < min(n_touched, PRIMES[-3]):
            continue
        new = []
        for first in range(n_buckets):
            member = place % n_buckets == first
            cos, sin = rest(np.where(member, np.cos(angle), 0.0)), rest(np.where(member, np.sin(angle), 0.0))
            found = np.mod(np.arctan2(sin, cos), np.pi)
            index = (found * n_outputs / np.pi).astype(np.int64).clip(0, n_outputs - 1)
            single = ((cos != 0) | (sin != 0)) & (np.abs(found - angle[index]) < 1e-11)
            latent = np.flatnonzero(single & (index % n_buckets == first))
            i = index[latent]
            new.append((i, latent, cos[latent] * np.cos(angle[i]) + sin[latent] * np.sin(angle[i])))
        out = np.concatenate([out, *(n[0] for n in new)])
        into = np.concatenate([into, *(n[1] for n in new)])
        slope = np.concatenate([slope, *(n[2] for n in new)])
    raise NotSparse("the slopes are too many to be found")


def arrange(
    out: NDArray[np.int64],
    into: NDArray[np.int64],
    root_row: Tensor,
    root_col: Tensor,
    structure: AffineForm,
    device: torch.device,
) -> Layout:
    """Colours of the outputs, and an order of the latents in which each depends on its own block or the one before."""
    k, n_tokens = structure.n_latents, structure.n_tokens
    colour = _colours(out, into, k + n_tokens)
    order = np.lexsort((into, out, colour[out]))
    out, into = out[order], into[order]
    prior = out < k
    child, parent = out[prior], into[prior]
    token, reached = out[~prior] - k, into[~prior]
    best: tuple[int, NDArray[np.int64]] | None = None
    for place in _orders(out, into, child, parent, k):
        lowest, highest = np.full(n_tokens, k), np.full(n_tokens, -1)
        np.minimum.at(lowest, token, place[reached])
        np.maximum.at(highest, token, place[reached])
        lowest = np.where(highest < 0, 0, lowest)
        pairs = np.stack(
            [
                np.concatenate([place[child], highest.clip(0)]),
                np.concatenate([place[parent], np.where(highest < 0, 0, lowest)]),
            ]
        )
        together = np.stack([place[root_row.numpy()], place[root_col.numpy()]])
        span = int((pairs[0] - pairs[1]).max(initial=0))
        most = MAX_WIDTH if best is None else best[0] - 1
        for width in range(max(1, (span + 2) // 2), most + 1):
            high, low = pairs // width
            if (high - low <= 1).all() and (together[0] // width == together[1] // width).all():
                best = width, place
                break
    if best is None:
        raise NotSparse(f"no order of the latents has blocks of at most {MAX_WIDTH}")
    width, place = best
    n_blocks = -(-k // width)
    n_slots, slot = _slots(place[reached] // width, token, n_tokens, n_blocks)
    on_device = lambda a: torch.as_tensor(a).to(device)  # noqa: E731
    return Layout(
        on_device(out),
        on_device(into),
        on_device(colour),
        on_device(root_row),
        on_device(root_col),
        n_blocks,
        width,
        n_slots,
        on_device(place),
        on_device(slot),
    )


def _slots(
    of: NDArray[np.int64], token: NDArray[np.int64], n_tokens: int, n_blocks: int
) -> tuple[int, NDArray[np.int64]]:
    """Slots of a block, and the slot of each token (T,), which depends on latents in these blocks."""
    # A token stands in the block of the last latent that it depends on; those without any, spread evenly.
    block = np.full(n_tokens, -1)
    np.maximum.at(block, token, of)
    free = np.flatnonzero(block < 0)
    block[free] = np.arange(len(free)) * n_blocks // max(1, len(free))
    by_block = np.argsort(block, kind="stable")
    count = np.bincount(block, minlength=n_blocks)
    nth = np.empty(n_tokens, dtype=np.int64)
    nth[by_block] = np.arange(n_tokens) - np.repeat(count.cumsum() - count, count)
    n_slots = max(1, int(count.max(initial=1)))
    return n_slots, block * n_slots + nth


def _colours(out: NDArray[np.int64], into: NDArray[np.int64], n_outputs: int) -> NDArray[np.int64]:
    """Greedily: outputs that share a latent get different colours."""
    colour = np.zeros(n_outputs, dtype=np.int64)
    taken = [0] * (int(into.max(initial=-1)) + 1)  # bits: the colours of the outputs that a latent reaches
    order = np.argsort(out, kind="stable")
    starts = np.flatnonzero(np.diff(out[order], prepend=-1))
    for group in np.split(order, starts[1:]) if len(order) else []:
        latents = into[group].tolist()
        bits = 0
        for j in latents:
            bits |= taken[j]
        free = ~bits & (bits + 1)  # the lowest bit that is not set
        colour[out[group[0]]] = free.bit_length() - 1
        for j in latents:
            taken[j] |= free
    return colour


def _orders(
    out: NDArray[np.int64],
    into: NDArray[np.int64],
    child: NDArray[np.int64],
    parent: NDArray[np.int64],
    k: int,
) -> Iterator[NDArray[np.int64]]:
    """Places of the latents in orders that keep every latent behind those it depends on."""
    identity = np.arange(k)
    yield identity  # of the program: a loop over time
    # Latents stand near each other if an output depends on both: Cuthill & McKee (1969), from either end.
    rows, cols = np.concatenate([out, identity]), np.concatenate([into, identity])
    reach = coo_array((np.ones(len(rows)), (rows, cols)), shape=(int(rows.max()) + 1, k)).tocsr()
    near = reverse_cuthill_mckee((reach.T @ reach).tocsr(), symmetric_mode=True)
    by_child = np.argsort(child, kind="stable")
    for line in (near, near[::-1]):
        key = np.empty(k, dtype=np.int64)
        key[line] = identity
        for c, p in zip(child[by_child].tolist(), parent[by_child].tolist(), strict=True):
            key[c] = max(key[c], key[p])  # a parent stands earlier in the program, so its key is final
        place = np.empty(k, dtype=np.int64)
        place[np.lexsort((identity, key))] = identity
        yield place
