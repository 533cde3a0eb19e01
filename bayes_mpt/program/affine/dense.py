"""Reading the map as matrices: one probe for every latent.

Latents are set to probe values, the mean and scale of the observed site are recorded, and affinity is checked at
random points 1, 10 and 100 prior standard deviations away.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.affine.form import AffineForm, NotAffine
from bayes_mpt.program.affine.maps import DenseMap, each_row, integrate_prior, with_correlated_noise
from bayes_mpt.program.affine.normals import (
    batch,
    correlated_noise,
    latent_parts,
    latent_values,
    prior_means,
    root_of_parts,
    scale_of,
    token_normal,
)
from bayes_mpt.program.affine.places import n_places, places
from bayes_mpt.program.affine.probes import N_CHECKS, affine_through, check_constant, probes_of, tolerance
from bayes_mpt.program.affine.tokens import token_gaps
from bayes_mpt.program.arguments import cycle, fill_all
from bayes_mpt.program.batched import TOGETHER, Batched, vmapped
from bayes_mpt.program.layout import flat, from_rows, token_values
from bayes_mpt.program.program import Latent, Model, list_names
from bayes_mpt.program.run import nodes_plate, run
from bayes_mpt.program.sites import sub_samples
from bayes_mpt.program.store import own_random_state

__all__ = ["Dense", "read_side_by_side"]

MAX_PROBED = 2**22  # numbers in one temporary of a run at several probes


class Dense:
    """One probe for every latent."""

    def check_applicable(self, structure: AffineForm) -> None:
        pass

    def read_shared(self, model: Model, args: tuple[Any, ...], structure: AffineForm) -> DenseMap:
        return _read_probes(model, args, structure)

    def read_per_row(self, model: Model, args: tuple[Any, ...], structure: AffineForm) -> DenseMap:
        return _read_rows(model, args, structure)

    def first_read_per_row(
        self, model: Model, args: tuple[Any, ...], structure: AffineForm
    ) -> tuple[AffineForm, DenseMap]:
        for batched in TOGETHER:
            form = structure._replace(batched=batched)
            together = _all_probes(model, args, form)
            if together is not None:
                return form, together
        return structure, _read_rows(model, args, structure)

    @torch.no_grad()
    def check_places(
        self, model: Model, args: tuple[Any, ...], structure: AffineForm, reading: DenseMap, value: Tensor
    ) -> None:
        """Compare the map, of rows with these tokens (N, T), with one run at many more places, if that is cheap.

        Raises
        ------
        NotAffine
            If it is another there.
        """
        filled = fill_all(args)
        at_once = structure.by_row and not structure.per_row  # the rows are the places
        n = n_places(1 if at_once else batch(structure, filled), structure.n_tokens, structure.n_latents)
        if not n or structure.sub_rows is not None or (not at_once and structure.batched is Batched.LOOP):
            return
        with own_random_state(0):
            try:
                z = places(reading, value, n)
                if at_once:
                    _read_probes(model, args, structure, z)
                else:
                    probes = probes_of(structure, filled[0], z)
                    _map_of(_run_together(model, filled, structure, probes), probes, structure)
            except NotAffine:
                raise
            except Exception:  # it does not take so many at a time
                return


def _read_probes(
    model: Model, args: tuple[Any, ...], structure: AffineForm, further: Tensor | None = None
) -> DenseMap:
    """All probes in one run: row 0 has z = 0, rows 1..K a unit vector each, the last are random or ``further``."""
    n_probes = structure.n_latents + 1 + (N_CHECKS if further is None else len(further))
    rows = fill_all(cycle(a, n_probes) for a in args)
    probes = probes_of(structure, rows[0], further)  # (P, K)
    trace = run(model, rows, latent_values(structure.program, probes))
    loc, scale = (t[0] for t in token_normal(trace, structure))  # (P, T)
    latent_loc, parts = latent_parts(trace, structure)  # (1, P, K), and of each site (1, P, ...)
    where = f"observed site {structure.observed!r}"
    check_constant(scale, where)
    noise_root = correlated_noise(trace, structure)
    tril = None if noise_root is None else noise_root[0]
    if tril is not None and len(tril) > 1:
        check_constant(tril, where)
    map_loc, map_loading = affine_through(loc[:, None], probes, structure, where)
    prior_loc, prior_slope = affine_through(latent_loc[0][:, None], probes, structure, "latent sites")
    for part in parts:
        check_constant(part[0], "latent sites")
    reading = integrate_prior(
        map_loc,
        map_loading,
        scale[:1].square(),
        prior_loc,
        prior_slope,
        root_of_parts(latent_loc[0, :1], [part[0, :1] for part in parts]),
        token_values(trace, structure.program),
    )
    return reading if tril is None else with_correlated_noise(reading, tril[:1])


class _Runs(NamedTuple):
    """The program at P probes, B rows each."""

    loc: Tensor
    """(P, B, T)"""
    scale: Tensor
    latent_loc: Tensor
    """(P, B, K), of each latent given the earlier ones."""
    latent_roots: tuple[Tensor, ...]
    """`latent_parts` of each site (P, B, ...): one matrix of all would be K times as much, for every probe."""
    noise_root: Tensor | None
    """(P, B, T, T) of tokens that are one MultivariateNormal."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        noise = () if self.noise_root is None else (self.noise_root,)
        return (self.loc, self.scale, self.latent_loc, *self.latent_roots, *noise)

    def each(self, change: Callable[[Tensor], Tensor]) -> _Runs:
        """The same change to all."""
        return _Runs(
            change(self.loc),
            change(self.scale),
            change(self.latent_loc),
            tuple(change(part) for part in self.latent_roots),
            None if self.noise_root is None else change(self.noise_root),
        )


def _read_rows(model: Model, args: tuple[Any, ...], structure: AffineForm) -> DenseMap:
    """The real batch at every probe: every row, or the one vector, has a map of its own."""
    filled = fill_all(args)
    probes = probes_of(structure, filled[0])  # (P, K)
    if not structure.n_latents:
        probes = probes[:1]  # one run is like another
    if structure.batched is Batched.PLATE:
        runs, trace = _run_at_once(model, filled, structure, probes)
    elif structure.batched is Batched.VMAP:
        runs = _run_mapped(model, filled, structure, probes)
        with torch.no_grad():
            trace = run(model, filled, prior_means(structure, filled))
    else:
        runs, trace = _run_apart(model, filled, structure, probes)
    sites = prior_means(structure, filled) | sub_samples(trace)
    value = token_gaps(model, args, structure, trace, sites)
    reading = _map_of(runs, probes, structure)
    return reading._replace(scale=scale_of(trace.nodes[structure.site_names[0]]), value=value)


def read_side_by_side(
    model: Model,
    args: tuple[Any, ...],
    structure: AffineForm,
    values: dict[str, Tensor],
    priors: tuple[Latent, ...],
    depth: int | None,
) -> tuple[DenseMap, Tensor]:
    """The maps at S nodes, whose values (S, ...) of further latents are given, and log p of the ``priors`` there.

    ``structure`` is that of the program at one node. B of the reading is S times N, node after node; the log-density is
    (S, N) (N is 1 where all observations are one vector). All nodes and probes are one run: on a plate left of the
    program's ``depth``, along which the values lie; through `torch.vmap` where that is None.
    """
    filled = fill_all(args)
    probes = probes_of(structure, filled[0])  # (P, K)
    n_probes, n_rows = len(probes), batch(structure, filled)
    n_nodes = len(next(iter(values.values())))
    # rows that share a map, with nothing of their own among the values, are read on rows that are the probes
    shared = structure.by_row and not structure.per_row and all(p.row_axis is None for p in priors)
    if shared:
        rows = fill_all(cycle(a, n_probes) for a in args)
        z = probes.expand(n_nodes, -1, -1)
    else:
        rows, z = filled, probes.repeat(n_nodes, 1)[:, None]
        values = {name: v.repeat_interleave(n_probes, 0) for name, v in values.items()}
    if depth is None:
        runs, log_prior, scale = _map_copies(model, rows, structure, z, values, priors)
    else:
        trace = _run_copies(model, rows, structure, z, depth, values)
        runs = _runs_of(trace, structure, len(z))
        log_prior, scale = (
            _log_prior(trace, priors, len(z), rows[0]),
            scale_of(trace.nodes[structure.site_names[0]]),
        )
    if shared:  # (S, P, ...) -> (P, S, ...)
        reading = _map_of(runs.each(lambda t: t.transpose(0, 1)), probes, structure)
        return each_row(reading, n_rows)._replace(value=filled[0]), log_prior
    by_probe = lambda t: t.unflatten(0, (n_nodes, n_probes)).transpose(0, 1)  # noqa: E731
    reading = _map_of(runs.each(lambda t: by_probe(t).flatten(1, 2)), probes, structure)
    log_prior = by_probe(log_prior)  # (P, S, N)
    # at a value that is impossible there is no density to compare
    check_constant(
        torch.where(log_prior.isfinite().all(0), log_prior, 0.0),
        f"prior of {list_names([p.name for p in priors])}",
    )
    return reading._replace(scale=scale, value=filled[0]), log_prior[0]


def _log_prior(trace: Trace, latents: tuple[Latent, ...], n_copies: int, like: Tensor) -> Tensor:
    """Log-densities of these latents in a run of copies, row by row: (P, N), or (P, 1) where no row has its own."""
    total = like.new_zeros(n_copies, 1)
    for latent in latents:
        node = trace.nodes[latent.name]
        shape = node["value"].shape[node["value"].ndim - len(latent.shape) :][: latent.n_batch]
        log_prob = node["fn"].log_prob(node["value"])
        total = total + flat(log_prob, shape, latent.row_axis, n_copies).sum(-1)
    return total


def _run_apart(
    model: Model, filled: tuple[Any, ...], structure: AffineForm, probes: Tensor
) -> tuple[_Runs, Trace]:
    """One run for each probe; and the first."""
    n_rows = batch(structure, filled)
    traces: list[Trace] = []
    for probe in probes:
        # The rows that a sub-sampling plate drew in the first run stay for the others.
        fixed = sub_samples(traces[0]) if traces else {}
        traces.append(run(model, filled, latent_values(structure.program, probe.expand(n_rows, -1)) | fixed))
    return _joined([_runs_of(trace, structure) for trace in traces]), traces[0]


def _run_at_once(
    model: Model, filled: tuple[Any, ...], structure: AffineForm, probes: Tensor
) -> tuple[_Runs, Trace]:
    """One run for all probes, or for as many as memory will bear; and the first."""
    n_rows = batch(structure, filled)
    out, traces = [], []
    for part in probes.split(_probes_at_once(structure, n_rows)):
        # An axis of the program as long as that of the probes could pass for it.
        n_copies = len(part)
        while n_copies in (n_rows, structure.n_tokens):
            n_copies += 1
        z = torch.cat([part, part[:1].expand(n_copies - len(part), -1)])
        traces.append(_run_copies(model, filled, structure, z[:, None], structure.program.depth, {}))
        out.append(_runs_of(traces[-1], structure, n_copies).each(itemgetter(slice(len(part)))))
    return _joined(out), traces[0]


def _run_mapped(model: Model, filled: tuple[Any, ...], structure: AffineForm, probes: Tensor) -> _Runs:
    """The same through `torch.vmap`."""
    step = _probes_at_once(structure, batch(structure, filled))
    return _joined(
        [_map_copies(model, filled, structure, part[:, None], {}, ())[0] for part in probes.split(step)]
    )


def _run_together(model: Model, filled: tuple[Any, ...], structure: AffineForm, probes: Tensor) -> _Runs:
    """All probes in one run, in the way that the program takes them."""
    if structure.batched is Batched.VMAP:
        return _run_mapped(model, filled, structure, probes)
    return _run_at_once(model, filled, structure, probes)[0]


def _probes_at_once(structure: AffineForm, n_rows: int) -> int:
    return max(2, MAX_PROBED // max(1, n_rows * structure.n_tokens * structure.n_latents))


def _run_copies(
    model: Model,
    filled: tuple[Any, ...],
    structure: AffineForm,
    z: Tensor,
    depth: int,
    values: dict[str, Tensor],
) -> Trace:
    """Copies of the program side by side, on a plate left of its own, at latents z (P, N, K), or (P, 1, K)."""
    n_copies, n_rows = len(z), batch(structure, filled)
    sites, start = dict(values), 0
    for site in structure.latents:
        part = z[..., start : start + site.width]
        start += site.width
        if site.row_axis is not None:
            part = part.expand(-1, n_rows, -1)
        part = from_rows(part, site.shape, site.row_axis)
        sites[site.name] = part.reshape(n_copies, *[1] * (depth - site.n_batch), *part.shape[1:])
    with nodes_plate(n_copies, depth):
        return run(model, filled, sites)


def _map_copies(
    model: Model,
    filled: tuple[Any, ...],
    structure: AffineForm,
    z: Tensor,
    values: dict[str, Tensor],
    priors: tuple[Latent, ...],
) -> tuple[_Runs, Tensor, float]:
    """`_run_copies` of a program that does not broadcast over leading batch dimensions.

    Its maps, log-densities of ``priors``, and scale.
    """
    n_rows, scales = batch(structure, filled), []

    def alone(node: dict[str, Tensor], z: Tensor) -> tuple[Any, ...]:
        trace = run(model, filled, node | latent_values(structure.program, z.expand(n_rows, -1)))
        scales.append(scale_of(trace.nodes[structure.site_names[0]]))
        runs = _runs_of(trace, structure).each(itemgetter(0))
        noise = () if runs.noise_root is None else (runs.noise_root,)
        return (
            (runs.loc, runs.scale, runs.latent_loc),
            runs.latent_roots,
            noise,
            _log_prior(trace, priors, 1, z)[0],
        )

    (loc, scale, latent_loc), roots, noise, log_prior = vmapped(alone)(values, z)
    return _Runs(loc, scale, latent_loc, roots, noise[0] if noise else None), log_prior, scales[0]


def _all_probes(model: Model, args: tuple[Any, ...], structure: AffineForm) -> DenseMap | None:
    """The map from one run at all probes, if that gives what runs apart give at the three random ones."""
    if structure.sub_rows is not None:
        return None  # other rows in every run
    probes = probes_of(structure, args[0])
    try:
        together = _run_together(model, args, structure, probes)
    except Exception:  # written for one set of latents at a time
        return None
    with torch.no_grad():
        apart, _ = _run_apart(model, args, structure, probes[-N_CHECKS:])
        for a, b in zip(together.tensors, apart.tensors, strict=True):
            size = b.abs() + b.abs().flatten(1).amax(1).reshape(-1, *[1] * (b.ndim - 1)) if b.numel() else b
            if not bool(((a[-N_CHECKS:] - b).abs() <= tolerance(b) * size).all()):
                return None
    return _map_of(together, probes, structure)


def _map_of(runs: _Runs, probes: Tensor, structure: AffineForm) -> DenseMap:
    """The affine map through the first K + 1 probes, checked at the others."""
    where = f"observed site {structure.observed!r}"
    check_constant(runs.scale, where)
    for part in runs.latent_roots:
        check_constant(part, "latent sites")
    loc, loading = affine_through(runs.loc, probes, structure, where)
    prior_loc, prior_slope = affine_through(runs.latent_loc, probes, structure, "latent sites")
    root = root_of_parts(runs.latent_loc[0], [part[0] for part in runs.latent_roots])
    reading = integrate_prior(loc, loading, runs.scale[0].square(), prior_loc, prior_slope, root, loc)
    if runs.noise_root is None:
        return reading
    check_constant(runs.noise_root, where)
    return with_correlated_noise(reading, runs.noise_root[0].expand(len(loc), -1, -1))


def _runs_of(trace: Trace, structure: AffineForm, n_copies: int = 1) -> _Runs:
    loc, scale = token_normal(trace, structure, n_copies)
    latent_loc, parts = latent_parts(trace, structure, n_copies)
    return _Runs(loc, scale, latent_loc, tuple(parts), correlated_noise(trace, structure, n_copies))


def _joined(runs: list[_Runs]) -> _Runs:
    loc, scale, latent_loc, roots, noise_root = zip(*runs, strict=True)
    tril = None if noise_root[0] is None else torch.cat(noise_root)
    parts = tuple(torch.cat(each) for each in zip(*roots, strict=True))
    return _Runs(torch.cat(loc), torch.cat(scale), torch.cat(latent_loc), parts, tril)
