"""The linear-Gaussian map of programs in which every site looks at few latents: chains, trends, lags.

    z_k = latent_loc_k + sum_j slope_kj z_j + (root u)_k,    x_i = loc_i + sum_j slope_ij z_j + e_i

Kept as a list of its nonzeros, it is read in a time linear in the length. One backward pass gives the slopes of all
outputs (means of latents and tokens) that share no latent (Curtis, Powell & Reid 1974), so their number does not
grow with the length. Where slopes are is found once, from products with vectors alone. The latents are then put into
blocks, each of which depends on the block before it and on no other: a Markov chain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import reverse_cuthill_mckee
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from bayes_mpt.program import affine
from bayes_mpt.program.affine import AffineForm, latent_parts, latent_values
from bayes_mpt.program.tracing import Model, base, fill, is_subsample, run

__all__ = ["Blocks", "Layout", "NotSparse", "Sparse", "SparseMap"]

MIN_LATENTS = 16  # below, a dense map costs nothing
MAX_TOUCHED = 64  # outputs that one latent may reach
MAX_WIDTH = 64  # latents in a block
PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97)
JITTER = 0.05  # of the parameters, so that no slope is zero by their start
# What things cost, in multiplications: a site's call, a backward pass through it, an operation on tensors.
SITE_CALL, SITE_PASS, OPERATION = 1e5, 2e4, 1e4
N_OPERATIONS = 100  # for each level of the tree of blocks
N_PRODUCTS = 60  # of w x w matrices for each block


class NotSparse(Exception):
    """A dense map costs less."""


class Layout(NamedTuple):
    """Where the nonzeros of a map are, and its blocks; found once."""

    out: Tensor
    """(E,) which output (K latents, then T tokens) has a slope,"""
    into: Tensor
    """(E,) and along which latent."""
    colour: Tensor
    """(K + T,) of each output: those of one colour share no latent."""
    root_row: Tensor
    """(F,)"""
    root_col: Tensor
    """(F,)"""
    n_blocks: int
    width: int
    """w, latents in a block; the last one is filled up."""
    n_slots: int
    """Most tokens in a block."""
    place: Tensor
    """(K,) of each latent among the n_blocks x w."""
    slot: Tensor
    """(T,) of each token among the n_blocks x n_slots."""

    @property
    def n_colours(self) -> int:
        return int(self.colour.max()) + 1


class Blocks(NamedTuple):
    """The chain of blocks: z_b = start + step z_(b-1) + root u,  x_b = loc + before z_(b-1) + own u + e."""

    start: Tensor
    """(B, n, w)"""
    step: Tensor
    """(B, n, w, w)"""
    root: Tensor
    """(B, n, w, w)"""
    loc: Tensor
    """(B, n, t)"""
    before: Tensor
    """(B, n, t, w)"""
    own: Tensor
    """(B, n, t, w)"""
    noise: Tensor
    """(B, n, t); 1 in slots without a token."""


class SparseMap(NamedTuple):
    """The map at the current parameters. B is 1 (shared by all rows) or N."""

    loc: Tensor
    """(B, T) means of the tokens where all latents are zero."""
    latent_loc: Tensor
    """(B, K) means of the latents where those they depend on are zero."""
    slope: Tensor
    """(B, E) at ``layout.out``, ``layout.into``."""
    root: Tensor
    """(B, F) at ``layout.root_row``, ``layout.root_col``: factors of the latents' covariances given earlier ones."""
    noise: Tensor
    """(B, T) variances."""
    scale: float
    value: Tensor
    layout: Layout

    def tokens_at(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means and variances of the tokens given latents z (N, K), and the size of what the means are sums of."""
        mean, size = self.means_at(z)
        n_latents = z.shape[-1]
        return mean[:, n_latents:], self.noise.expand(len(z), -1), size[:, n_latents:]

    def means_at(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Means of latents and tokens side by side given the latents z (N, K), and the size of their parts."""
        start = torch.cat([self.latent_loc, self.loc], 1).expand(len(z), -1)
        part = self.slope * z[:, self.layout.into]
        return start.index_add(1, self.layout.out, part), start.abs().index_add(
            1, self.layout.out, part.abs()
        )

    def log_joint(self, z: Tensor, value: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """log p(value, z), summed over rows, from the means and variances of the tokens at z."""
        rest = z - self.means_at(z)[0][:, : z.shape[-1]]
        _, root = self._latent_blocks()
        rest = _scatter(rest, self.layout.place, (self.layout.n_blocks, self.layout.width))
        u = torch.linalg.solve_triangular(root, rest[..., None], upper=False)
        logdet = self._filled_diagonal().log().sum(-1).expand(len(z)).sum()
        n_filled = (self.layout.n_blocks * self.layout.width - z.shape[-1]) * len(z)
        prior = Normal(0.0, 1.0).log_prob(u).sum() - logdet + 0.5 * math.log(2 * math.pi) * n_filled
        return Normal(mean, variance.sqrt()).log_prob(value).sum() + prior

    def dense(self) -> affine.DenseMap:
        """The map as matrices (K, K) and (T, K)."""
        k, t = self.latent_loc.shape[1], self.loc.shape[1]
        slope = _scatter(self.slope, self.layout.out * k + self.layout.into, (k + t, k))
        root = _scatter(self.root, self.layout.root_row * k + self.layout.root_col, (k, k))
        reading = affine.integrate_prior(
            self.loc, slope[:, k:], self.noise, self.latent_loc, slope[:, :k], root, self.value
        )
        return reading._replace(scale=self.scale)

    def blocks(self) -> Blocks:
        """The map as a chain of blocks."""
        n, w, t = self.layout.n_blocks, self.layout.width, self.layout.n_slots
        n_latents = self.latent_loc.shape[1]
        within, root = self._latent_blocks()
        out, into = self.layout.out, self.layout.into
        column = self.layout.place[into]
        prior = out < n_latents
        row = torch.where(prior, self.layout.place[out.clamp(max=n_latents - 1)], 0)
        earlier = prior & (column // w != row // w)
        step = _scatter(self.slope[:, earlier], row[earlier] * w + column[earlier] % w, (n, w, w))
        start = _scatter(self.latent_loc, self.layout.place, (n, w))
        if within is not None:
            # z = start + step z_before + within z + root u: latents stand in an order in which `within` is lower
            left = torch.eye(w, dtype=step.dtype, device=step.device) - within
            right = torch.cat([start[..., None], step, root], -1)
            solved = torch.linalg.solve_triangular(left, right, upper=False, unitriangular=True)
            start, step, root = solved[..., 0], solved[..., 1 : 1 + w], solved[..., 1 + w :]
        slot = self.layout.slot[(out - n_latents).clamp(min=0)]
        here = ~prior & (column // w == slot // t)
        there = ~prior & ~here
        own = _scatter(self.slope[:, here], slot[here] * w + column[here] % w, (n, t, w))
        before = _scatter(self.slope[:, there], slot[there] * w + column[there] % w, (n, t, w))
        loc = _scatter(self.loc, self.layout.slot, (n, t))
        noise = _scatter(self.noise, self.layout.slot, (n, t), fill=1.0)
        return Blocks(
            start,
            step,
            root,
            loc + (own @ start[..., None])[..., 0],
            before + own @ step,
            own @ root,
            noise,
        )

    def _latent_blocks(self) -> tuple[Tensor | None, Tensor]:
        """Slopes of latents along others of their block (B, n, w, w), None without any, and the roots."""
        n, w, place = self.layout.n_blocks, self.layout.width, self.layout.place
        n_latents = self.latent_loc.shape[1]
        row, col = place[self.layout.root_row], place[self.layout.root_col]
        root = _scatter(self.root, row * w + col % w, (n, w, w))
        filled = torch.ones(n * w, dtype=root.dtype, device=root.device).index_fill(0, place, 0.0)
        root = root + torch.diag_embed(filled.unflatten(0, (n, w)))
        prior = self.layout.out < n_latents
        out, into = place[self.layout.out[prior]], place[self.layout.into[prior]]
        same = out // w == into // w
        if not bool(same.any()):
            return None, root
        return _scatter(self.slope[:, prior][:, same], out[same] * w + into[same] % w, (n, w, w)), root

    def _filled_diagonal(self) -> Tensor:
        return self.root[:, self.layout.root_row == self.layout.root_col]


def _scatter(values: Tensor, index: Tensor, shape: tuple[int, ...], fill: float = 0.0) -> Tensor:
    """(B, E) at E different places of an array of this shape: (B, *shape)."""
    start = values.new_full((len(values), math.prod(shape)), fill)
    return start.index_copy(1, index, values).unflatten(1, shape)


class Sparse:
    """Slopes by backward passes, many at a time.

    Attributes
    ----------
    layout : Layout
        Of the program's map, once one has been read.
    """

    def __init__(self) -> None:
        self.layout: Layout | None = None

    def check_applicable(self, structure: AffineForm) -> None:
        if structure.n_latents < MIN_LATENTS:
            raise NotSparse(f"{structure.n_latents} latents")

    def read_shared(self, model: Model, args: tuple[Any, ...], structure: AffineForm) -> SparseMap:
        """One run: row 0 has z = 0 and gives the slopes, the others check that these hold everywhere."""
        n_probes = 1 + affine.N_CHECKS
        rows = tuple(fill(affine.cycle(a, n_probes)) for a in args)
        probes = torch.cat([rows[0].new_zeros(1, structure.n_latents), _far(structure, rows[0])])
        first = rows[0].new_zeros(n_probes)
        first[0] = 1.0
        if self.layout is None:
            self.layout = self._find(model, rows, structure, first, shared=True)
        wanted = torch.is_grad_enabled() and bool(structure.parameters)
        with torch.enable_grad():
            ran = _Run(model, rows, structure, probes)
            slope = ran.slopes(self.layout, first, wanted)[:1]
        reading = SparseMap(
            ran.loc[:1],
            ran.latent_loc[:1],
            slope,
            ran.root[:1],
            ran.scale[:1].square(),
            1.0,
            rows[0],
            self.layout,
        )
        affine._check_constant(ran.scale, f"observed site {structure.observed!r}")
        affine._check_constant(ran.root, "latent sites")
        _check(reading, structure, probes[1:], ran.means()[1:])
        return reading if wanted else _detached(reading)

    def read_per_row(self, model: Model, args: tuple[Any, ...], structure: AffineForm) -> SparseMap:
        """A run at z = 0 gives the slopes of all rows; others, far away, check that these hold everywhere."""
        rows = tuple(fill(a) for a in args)
        n_rows = affine._batch(structure, rows)
        zero = rows[0].new_zeros(n_rows, structure.n_latents)
        every = torch.linspace(1.0, 2.0, n_rows, dtype=zero.dtype, device=zero.device)
        points = _far(structure, zero)
        if self.layout is None:
            self.layout = self._find(model, rows, structure, every, shared=False)
        else:  # the points have been checked one by one; now every latent is at one of the three distances
            turn = torch.arange(points.shape[1], device=zero.device) % len(points)
            points = points.gather(0, turn[None])
        wanted = torch.is_grad_enabled() and bool(structure.parameters)
        with torch.enable_grad():
            ran = _Run(model, rows, structure, zero)
            slope = ran.slopes(self.layout, torch.ones_like(every), wanted)
        fixed = {n: node["value"] for n, node in ran.trace.nodes.items() if is_subsample(node)}
        value = affine._value(model, args, structure, ran.trace, {**latent_values(structure, zero), **fixed})
        reading = SparseMap(
            ran.loc,
            ran.latent_loc,
            slope,
            ran.root,
            ran.scale.square(),
            affine._scale(ran.trace.nodes[structure.sites[0]]),
            value,
            self.layout,
        )
        for point in points:
            with torch.no_grad():
                other = _Run(model, rows, structure, point.expand(n_rows, -1), fixed)
            for a, b, where in (
                (ran.scale, other.scale, f"observed site {structure.observed!r}"),
                (ran.root, other.root, "latent sites"),
            ):
                affine._check_constant(torch.stack([a, b]), where)
            _check(reading, structure, point.expand(n_rows, -1), other.means())
        return reading if wanted else _detached(reading)

    def first_read_per_row(
        self, model: Model, args: tuple[Any, ...], structure: AffineForm
    ) -> tuple[AffineForm, SparseMap]:
        return structure, self.read_per_row(model, args, structure)

    def _find(
        self, model: Model, rows: tuple[Any, ...], structure: AffineForm, weight: Tensor, shared: bool
    ) -> Layout:
        """Where the slopes are, and the blocks; an error if a dense map costs less."""
        _refuse_dearer(structure, shared)
        zero = rows[0].new_zeros(len(weight), structure.n_latents)
        with torch.no_grad():
            ran = _Run(model, rows, structure, zero)
        if any(isinstance(base(ran.trace.nodes[n]["fn"]), MultivariateNormal) for n in structure.sites):
            raise NotSparse("correlated tokens")
        with torch.no_grad():
            unit = zero.clone()
            unit[:, structure.n_latents // 2] = structure.spread[structure.n_latents // 2]
            moved = _Run(model, rows, structure, unit).means() != ran.means()
            n_touched = int(moved.any(0).sum())
        if n_touched > MAX_TOUCHED:
            raise NotSparse(f"one latent reaches {n_touched} outputs")
        _refuse_dearer(structure, shared, n_touched)
        with torch.enable_grad():
            try:
                with _jittered():  # a slope that is zero now need not stay zero
                    found = _nonzeros(_Run(model, rows, structure, zero), weight, n_touched)
            except (RuntimeError, ValueError):  # the program does not take such parameters
                found = _nonzeros(_Run(model, rows, structure, zero), weight, n_touched)
        layout = _arrange(*found, *_root_entries(ran.roots), structure, zero.device)
        _refuse_dearer(structure, shared, layout.n_colours, layout.n_blocks, layout.width, layout.n_slots)
        return layout


def _refuse_dearer(structure: AffineForm, shared: bool, *sizes: int) -> None:
    dense, sparse = costs(structure, shared, *sizes)
    if sparse > dense:
        raise NotSparse(f"at least {sparse:.3g} multiplications against {dense:.3g}")


def costs(
    structure: AffineForm,
    shared: bool,
    n_colours: int = 1,
    n_blocks: int = 1,
    width: int = 1,
    n_slots: int = 1,
) -> tuple[float, float]:
    """Of reading the program and factorising its covariance, by a dense map and by this one, in multiplications."""
    k, t = structure.n_latents, structure.n_tokens
    n_sites = len(structure.latents) + len(structure.sites)
    dense = (1 if shared else k + 4) * SITE_CALL * n_sites + t * k**2 + k**3 / 3
    reading = ((1 if shared else 2) * SITE_CALL + n_colours * SITE_PASS) * n_sites
    algebra = n_blocks * width**2 * (N_PRODUCTS * width + 10 * n_slots)
    return dense, reading + algebra + OPERATION * N_OPERATIONS * (1 + math.log2(n_blocks))


class _Run:
    """One run of the program at latents z (N, K), whose values are leaves to differentiate by."""

    def __init__(
        self,
        model: Model,
        rows: tuple[Any, ...],
        structure: AffineForm,
        z: Tensor,
        fixed: dict[str, Tensor] | None = None,
    ):
        self.structure = structure
        recording = torch.is_grad_enabled()
        self.leaves = {
            name: v.detach().clone().requires_grad_(recording)
            for name, v in latent_values(structure, z).items()
        }
        self.trace = run(model, rows, {**self.leaves, **(fixed or {})})
        self.loc, self.scale = (t[0] for t in affine._token_normal(self.trace, structure))  # (N, T)
        latent_loc, roots = latent_parts(self.trace, structure)
        self.latent_loc, self.roots = latent_loc[0], [r[0] for r in roots]
        self.root = torch.cat([_lower(r) for r in self.roots], 1)  # (N, F)

    def means(self) -> Tensor:
        """Of latents and tokens, the outputs: (N, K + T)."""
        return torch.cat([self.latent_loc, self.loc], 1)

    def pull(self, v: Tensor, create_graph: bool = False) -> Tensor:
        """J_n' v_n of every row: (N, K + T) -> (N, K)."""
        means = self.means()
        if not means.requires_grad:
            return v.new_zeros(len(v), self.structure.n_latents)
        grads = torch.autograd.grad(
            means,
            list(self.leaves.values()),
            v,
            retain_graph=True,
            create_graph=create_graph,
            materialize_grads=True,
        )
        sites = self.structure.latents
        return torch.cat(
            [affine._flat(g, g.shape, s.row_axis)[0] for g, s in zip(grads, sites, strict=True)], 1
        )

    def slopes(self, layout: Layout, weight: Tensor, create_graph: bool) -> Tensor:
        """Nonzeros of the map of the rows of weight 1: (N, E), whose colours are in order."""
        of_entry = layout.colour[layout.out]
        parts = [weight.new_zeros(len(weight), 0)]
        for colour in range(layout.n_colours):
            pulled = self.pull(weight[:, None] * (layout.colour == colour), create_graph)
            parts.append(pulled[:, layout.into[of_entry == colour]])
        return torch.cat(parts, 1)


def _lower(root: Tensor) -> Tensor:
    """Entries of a site's root (N, width) or (N, events, D, D): (N, F)."""
    if root.ndim == 2:
        return root
    row, col = torch.tril_indices(root.shape[-1], root.shape[-1], device=root.device)
    return root[..., row, col].flatten(1)


def _root_entries(roots: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries of all sites' roots among the latents: (F,), (F,)."""
    rows, cols, start = [], [], 0
    for root in roots:
        width = 1 if root.ndim == 2 else root.shape[-1]
        n = root.shape[1]
        row, col = torch.tril_indices(width, width)
        first = start + width * torch.arange(n)[:, None]
        rows.append((first + row).flatten())
        cols.append((first + col).flatten())
        start += n * width
    return torch.cat(rows), torch.cat(cols)


def _far(structure: AffineForm, like: Tensor) -> Tensor:
    """(3, K): random points at 1, 10 and 100 standard deviations."""
    return affine.random_points(structure.spread.to(like))


def _check(reading: SparseMap, structure: AffineForm, z: Tensor, got: Tensor) -> None:
    with torch.no_grad():
        want, size = reading.means_at(z)
        affine.check_affine(got, want, size, structure, f"sites of {structure.observed!r} and the latents")


def _detached(reading: SparseMap) -> SparseMap:
    loc, latent_loc, slope, root, noise = (t.detach() for t in reading[:5])
    return SparseMap(loc, latent_loc, slope, root, noise, *reading[5:])


# ------------------------------------------------------------------------------------------------------ the layout


@contextmanager
def _jittered() -> Iterator[None]:
    """Parameters a little off, so that none makes a slope zero by its value."""
    leaves = [p for _, p in pyro.get_param_store().named_parameters()]
    before = [p.detach().clone() for p in leaves]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for p in leaves:
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
                p += JITTER * (1 + p.abs()) * noise
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(leaves, before, strict=True):
                p.copy_(value)


def _nonzeros(ran: _Run, weight: Tensor, n_touched: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Outputs and latents of the nonzeros of J, the weighted sum of the rows' maps, from products J' v alone.

    Outputs are dealt into buckets. With weights cos(angle_i) and sin(angle_i) for those of one bucket, a latent that
    reaches only one of them gives away which, by the angle. What is known is taken off, and other buckets are tried.

    Raises
    ------
    NotSparse
        If that does not find them all.
    """
    n_outputs = ran.means().shape[1]
    place = np.arange(n_outputs)
    random = np.random.default_rng(0)
    # Irregular angles, or the sum of two equal slopes would often look like a third output.
    angle = np.pi * (place + random.uniform(0.1, 0.9, n_outputs)) / n_outputs
    out, into, slope = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)

    def rest(v: NDArray[np.float64]) -> NDArray[np.float64]:
        """What of J' v the known nonzeros do not explain."""
        seed = weight[:, None] * torch.as_tensor(v).to(weight)
        found = (weight @ ran.pull(seed)).detach().double().cpu().numpy()
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


def _arrange(
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
    # A token stands in the block of the last latent that it depends on; those without any, spread evenly.
    block = np.full(n_tokens, -1)
    np.maximum.at(block, token, place[reached] // width)
    free = np.flatnonzero(block < 0)
    block[free] = np.arange(len(free)) * n_blocks // max(1, len(free))
    by_block = np.argsort(block, kind="stable")
    count = np.bincount(block, minlength=n_blocks)
    nth = np.empty(n_tokens, dtype=np.int64)
    nth[by_block] = np.arange(n_tokens) - np.repeat(count.cumsum() - count, count)
    n_slots = max(1, int(count.max(initial=1)))
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
        on_device(block * n_slots + nth),
    )


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
