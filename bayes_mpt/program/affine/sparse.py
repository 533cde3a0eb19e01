"""The linear-Gaussian map of programs in which every site looks at few latents: chains, trends, lags.

    z_k = latent_loc_k + sum_j slope_kj z_j + (root u)_k,    x_i = loc_i + sum_j slope_ij z_j + e_i

Kept as a list of its nonzeros, it is read in a time linear in the length. One backward pass gives the slopes of all
outputs (means of latents and tokens) that share no latent (Curtis, Powell & Reid 1974), so their number does not
grow with the length. Where slopes are is found once, from products with vectors alone. The latents are then put into
blocks, each of which depends on the block before it and on no other: a Markov chain.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import MultivariateNormal

from bayes_mpt.program.affine.chain import arrange, nonzeros
from bayes_mpt.program.affine.form import AffineForm
from bayes_mpt.program.affine.normals import (
    batch,
    latent_parts,
    latent_values,
    scale_of,
    token_normal,
)
from bayes_mpt.program.affine.probes import N_CHECKS, check_affine, check_constant, random_points
from bayes_mpt.program.affine.sparse_map import Layout, NotSparse, SparseMap
from bayes_mpt.program.affine.tokens import token_gaps
from bayes_mpt.program.arguments import cycle, fill_all
from bayes_mpt.program.layout import flat, token_values
from bayes_mpt.program.program import Model
from bayes_mpt.program.run import run
from bayes_mpt.program.sites import base, is_subsample
from bayes_mpt.program.store import moved_parameters

__all__ = ["Sparse", "costs"]

MIN_LATENTS = 16  # below, a dense map costs nothing
MAX_TOUCHED = 64  # outputs that one latent may reach
JITTER = 0.05  # of the parameters, so that no slope is zero by their start
# What things cost, in multiplications: a site's call, a backward pass through it, an operation on tensors.
SITE_CALL, SITE_PASS, OPERATION = 1e5, 2e4, 1e4
N_OPERATIONS = 100  # for each level of the tree of blocks
N_PRODUCTS = 60  # of w x w matrices for each block


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
        n_probes = 1 + N_CHECKS
        rows = fill_all(cycle(a, n_probes) for a in args)
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
            token_values(ran.trace, structure.program),
            self.layout,
        )
        check_constant(ran.scale, f"observed site {structure.observed!r}")
        check_constant(ran.root, "latent sites")
        _check(reading, structure, probes[1:], ran.means()[1:])
        return reading if wanted else _detached(reading)

    def read_per_row(self, model: Model, args: tuple[Any, ...], structure: AffineForm) -> SparseMap:
        """A run at z = 0 gives the slopes of all rows; others, far away, check that these hold everywhere."""
        rows = fill_all(args)
        n_rows = batch(structure, rows)
        zero = rows[0].new_zeros(n_rows, structure.n_latents)
        every = torch.linspace(1.0, 2.0, n_rows, dtype=zero.dtype, device=zero.device)
        points = _far(structure, zero)
        if self.layout is None:
            self.layout = self._find(model, rows, structure, every, shared=False)
        else:  # the points have been checked one by one; now every latent is at one of these distances
            turn = torch.arange(points.shape[1], device=zero.device) % len(points)
            points = points.gather(0, turn[None])
        wanted = torch.is_grad_enabled() and bool(structure.parameters)
        with torch.enable_grad():
            ran = _Run(model, rows, structure, zero)
            slope = ran.slopes(self.layout, torch.ones_like(every), wanted)
        fixed = {n: node["value"] for n, node in ran.trace.nodes.items() if is_subsample(node)}
        value = token_gaps(
            model, args, structure, ran.trace, {**latent_values(structure.program, zero), **fixed}
        )
        reading = SparseMap(
            ran.loc,
            ran.latent_loc,
            slope,
            ran.root,
            ran.scale.square(),
            scale_of(ran.trace.nodes[structure.site_names[0]]),
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
                check_constant(torch.stack([a, b]), where)
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
        if any(isinstance(base(ran.trace.nodes[n]["fn"]), MultivariateNormal) for n in structure.site_names):
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
                with moved_parameters(JITTER):  # a slope that is zero now need not stay zero
                    found = _nonzeros_of(_Run(model, rows, structure, zero), weight, n_touched)
            except (RuntimeError, ValueError):  # the program does not take such parameters
                found = _nonzeros_of(_Run(model, rows, structure, zero), weight, n_touched)
        layout = arrange(*found, *_root_entries(ran.roots), structure, zero.device)
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
            for name, v in latent_values(structure.program, z).items()
        }
        self.trace = run(model, rows, {**self.leaves, **(fixed or {})})
        self.loc, self.scale = (t[0] for t in token_normal(self.trace, structure))  # (N, T)
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
        return torch.cat([flat(g, g.shape, s.row_axis)[0] for g, s in zip(grads, sites, strict=True)], 1)

    def slopes(self, layout: Layout, weight: Tensor, create_graph: bool) -> Tensor:
        """Nonzeros of the map of the rows of weight 1: (N, E), whose colours are in order."""
        of_entry = layout.colour[layout.out]
        parts = [weight.new_zeros(len(weight), 0)]
        for colour in range(layout.n_colours):
            pulled = self.pull(weight[:, None] * (layout.colour == colour), create_graph)
            parts.append(pulled[:, layout.into[of_entry == colour]])
        return torch.cat(parts, 1)


def _nonzeros_of(ran: _Run, weight: Tensor, n_touched: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Outputs and latents of the nonzeros of the weighted sum of the rows' maps."""
    pull = lambda v: weight @ ran.pull(weight[:, None] * torch.as_tensor(v).to(weight))  # noqa: E731
    return nonzeros(pull, ran.means().shape[1], n_touched)


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
    """(4, K): random points at 1, 10 and 100 standard deviations, and opposite the last."""
    return random_points(structure.spread.to(like))


def _check(reading: SparseMap, structure: AffineForm, z: Tensor, got: Tensor) -> None:
    with torch.no_grad():
        want, size = reading.means_at(z)
        check_affine(got, want, size, structure, f"sites of {structure.observed!r} and the latents")


def _detached(reading: SparseMap) -> SparseMap:
    loc, latent_loc, slope, root, noise = (t.detach() for t in reading[:5])
    return SparseMap(loc, latent_loc, slope, root, noise, *reading[5:])
