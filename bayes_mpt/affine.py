"""The linear-Gaussian map from a program's latents to its tokens.

Latents are set to probe values, the mean and scale of the observed site are recorded, and affinity is checked at
random points 1, 10 and 100 prior standard deviations away. What comes out is

    x = loc + loading u + e,    u ~ N(0, I_K),    e ~ N(0, diag(noise)),    z = latent_loc + latent_root u

`structure` does this once and finds out how the program may be read; `read` does it at every step of a training,
with gradients to the program's parameters.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.tracing import (
    N_TRIAL_ROWS,
    Latent,
    MissingCovariate,
    Model,
    ModelError,
    Program,
    SetLatents,
    base,
    describe_latent,
    fill,
    first_run,
    has_missing,
    head,
    is_subsample,
    latent_nodes,
    observed_nodes,
    one_precision,
    refuse_unregistered,
    rows_first,
    run,
    token_values,
)

__all__ = [
    "NotAffine",
    "Reading",
    "Structure",
    "latent_values",
    "read",
    "read_side_by_side",
    "structure",
    "token_means",
    "tokens_of",
]

N_CHECKS = 3  # random points on top of the K + 1 that fix the affine map: at 1, 10 and 100 sd
AFFINE_TOL = 1e-9


class NotAffine(ModelError):
    """The program is not linear-Gaussian given its parameters; it may be scored in another way."""


class Structure(NamedTuple):
    """What a program is made of; found once."""

    sites: tuple[str, ...]
    """Names of the observed sites; their values side by side are the tokens."""
    latents: tuple[Latent, ...]
    parameters: tuple[str, ...]
    """Names of the `pyro.param`s (and module parameters) that the program touches: point-estimated."""
    rows_plate: str | None
    by_row: bool
    """True: latents are per row, tokens are the features of a row. False: all observations are ONE vector."""
    own_rows: bool
    """True: the map differs between rows (covariates, offsets), so the program is read on the real batch."""
    observed_arg: int | None
    """Position of the argument that the observed site's value equals; None if it is a transformation."""
    plain: bool
    """The value is that argument itself and nothing is scaled: `read` need not run the real batch."""
    sub_rows: int | None
    """Rows that a sub-sampling plate draws; None where the program takes all rows it is given."""
    width: int
    """T."""
    spread: Tensor
    """(K,) prior standard deviations of the latents in the first run: the unit of the probes."""

    @property
    def n_latents(self) -> int:
        """K."""
        return sum(site.width for site in self.latents)

    @property
    def observed(self) -> str:
        """Names of the observed sites."""
        return ", ".join(self.sites)

    @property
    def site_names(self) -> tuple[str, ...]:
        """Names of the observed sites, one by one."""
        return self.sites

    @property
    def n_tokens(self) -> int:
        """T."""
        return self.width

    @property
    def latent_names(self) -> tuple[str, ...]:
        """Names of the latent sites: integrated."""
        return tuple(site.name for site in self.latents)


class Reading(NamedTuple):
    """The linear-Gaussian map at the current parameters. B is 1 (shared by all rows) or N."""

    loc: Tensor
    """(B, T)"""
    loading: Tensor
    """(B, T, K); with a MultivariateNormal token site T further columns, a root of the correlated noise."""
    noise: Tensor
    """(B, T) variances."""
    latent_loc: Tensor
    """(B, K)"""
    latent_root: Tensor
    """(B, K, K)"""
    scale: float
    """Plate or `poutine.scale` factor of the observed site (minibatches)."""
    value: Tensor
    """(N, T), the observed value of this run; NaN where missing."""


@torch.enable_grad()
def structure(model: Model, args: tuple[Any, ...]) -> Structure:
    """Run the program on real rows and find out what it is made of.

    The first run also creates the parameters that the program initialises from ``x``.

    Parameters
    ----------
    model : callable
        A Pyro program with one observed Normal site and Normal latents.
    args : tuple
        What the program is called with; tensors have N rows. NaN cells are filled with column means.

    Returns
    -------
    Structure

    Raises
    ------
    ModelError
        If the program is not linear-Gaussian given its parameters, sub-samples, uses other rows of ``x``, or
        holds trainable tensors that Pyro does not know of. The site is named.
    """
    args = tuple(fill(a) for a in args)
    first, init = first_run(model, args)
    sites, rows_plate, by_row = _sites(first)
    node = first.nodes[sites[0]]
    value = _tokens_of([first.nodes[name]["value"] for name in sites], by_row)
    n_rows = len(node["value"]) if by_row else 1
    latents = tuple(describe_latent(latent, rows_plate if by_row else None) for latent in latent_nodes(first))
    spread = [_flat(_normal(first.nodes[site.name])[1].detach(), site, n_rows)[0] for site in latents]
    draft = Structure(
        sites,
        latents,
        tuple(n for n, site in first.nodes.items() if site["type"] == "param"),
        rows_plate,
        by_row,
        own_rows=True,
        observed_arg=_observed_arg(value, init, first.nodes[sites[0]]["value"].ndim),
        plain=False,
        sub_rows=n_rows if by_row and n_rows != len(init[0]) else None,
        width=value.shape[1],
        spread=torch.cat(spread) if spread else init[0].new_zeros(0),
    )
    trial, before, whole, reading = init, None, None, None
    if by_row and _scale(node) == 1.0:
        few = head(init, min(N_TRIAL_ROWS, max(1, len(init[0]) - 1)))
        # A program that refuses fewer rows holds something for each.
        with suppress(RuntimeError, ValueError, IndexError):
            trial, before = few, _trial_run(model, few, draft)
        # With covariates a map that rows share now (a slope of zero, sorted groups) need not stay shared.
        if before is not None and not _covariates(init):
            reading = _shared_map(model, trial, draft, before)
        if reading is not None and len(init[0]) > len(trial[0]):
            whole = _trial_run(model, init, draft)  # what holds for a few rows need not hold for all
            if not _same_map(reading, draft, whole):
                reading, trial, before = None, init, whole
    if before is None:
        trial, before = init, _trial_run(model, init, draft)
    if reading is not None:
        draft = draft._replace(own_rows=False, plain=draft.observed_arg is not None)
    else:
        reading = _read_rows(model, trial, draft)
    refuse_unregistered(list(reading[:5]))
    _refuse_dependence_on_x(model, trial, draft, before)
    _compare_with_program(draft, reading, before if whole is None or reading.loc.shape[0] > 1 else whole)
    return draft


def read(model: Model, args: tuple[Any, ...], structure: Structure) -> Reading:
    """Read the program's map at its current parameters, with gradients to them.

    One run on K + 4 probe rows where all rows share the map; K + 1 runs on the real batch elsewhere.
    """
    if structure.own_rows:
        return _read_rows(model, args, structure)
    reading = _read_probes(model, args, structure)
    if structure.plain:
        assert structure.observed_arg is not None
        return reading._replace(value=args[structure.observed_arg])
    sites = _prior_means(structure, args)
    trace = run(model, tuple(fill(a) for a in args), sites)
    value = _value(model, args, structure, trace, sites)
    return reading._replace(value=value, scale=_scale(trace.nodes[structure.sites[0]]))


def token_means(
    model: Model, args: tuple[Any, ...], sites: tuple[str, ...], values: dict[str, Tensor]
) -> Tensor:
    """Means of the tokens at these latent values, the other latents at their means given them: (N, ...)."""
    with one_precision(args), SetLatents(values, others_at_mean=True):
        trace = poutine.trace(model).get_trace(*args)
    means = [trace.nodes[name]["fn"].mean for name in sites]
    return means[0] if len(means) == 1 else torch.cat([m.reshape(len(m), -1) for m in means], 1)


# ------------------------------------------------------------------------------------------------ the two readings


def _read_probes(model: Model, args: tuple[Any, ...], structure: Structure) -> Reading:
    """All probes in one run: row 0 has z = 0, rows 1..K a unit vector each, the last three are random."""
    n_latents = structure.n_latents
    n_probes = n_latents + 1 + N_CHECKS
    rows = tuple(fill(_cycle(a, n_probes)) for a in args)
    probes = _probes(structure, rows[0])  # (P, K)
    trace = run(model, rows, latent_values(structure, probes))
    loc, scale = _token_normal(trace, structure)  # (P, T)
    latent_loc, latent_root = _latent_normal(trace, structure, n_probes)  # (P, K), (P, K, K)
    where = f"observed site {structure.observed!r}"
    _check_constant(scale, where)
    tril = _correlated_noise(trace, structure)
    if tril is not None and len(tril) > 1:
        _check_constant(tril, where)
    map_loc, map_loading = _affine(loc[:, None], probes, structure, where)
    prior_loc, prior_slope = _affine(latent_loc[:, None], probes, structure, "latent sites")
    _check_constant(latent_root.flatten(1), "latent sites")
    reading = _integrate_prior(
        map_loc, map_loading, scale[:1].square(), prior_loc, prior_slope, latent_root[:1], rows[0]
    )
    return reading if tril is None else _with_correlated_noise(reading, tril[:1])


def _read_rows(model: Model, args: tuple[Any, ...], structure: Structure) -> Reading:
    """One run for each probe, on the real batch: every row, or the one vector, has a map of its own."""
    filled = tuple(fill(a) for a in args)
    probes = _probes(structure, filled[0])  # (P, K)
    n_rows = _batch(structure, filled)
    locs, scales, latent_locs, latent_roots, trils = [], [], [], [], []
    fixed: dict[str, Tensor] = {}
    scale_factor, value = 1.0, None
    for probe in probes:
        sites = latent_values(structure, probe.expand(n_rows, -1))
        trace = run(model, filled, {**sites, **fixed})
        if value is None:
            # The rows that a sub-sampling plate drew in the first run stay for the others.
            fixed = {n: node["value"] for n, node in trace.nodes.items() if is_subsample(node)}
            value = _value(model, args, structure, trace, {**sites, **fixed})
            scale_factor = _scale(trace.nodes[structure.sites[0]])
        loc, scale = _token_normal(trace, structure)
        latent_loc, latent_root = _latent_normal(trace, structure, n_rows)
        locs.append(loc)
        scales.append(scale)
        trils.append(_correlated_noise(trace, structure))
        latent_locs.append(latent_loc)
        latent_roots.append(latent_root)
    assert value is not None
    where = f"observed site {structure.observed!r}"
    scale, root = torch.stack(scales), torch.stack(latent_roots)
    _check_constant(scale, where)
    _check_constant(root, "latent sites")
    map_loc, map_loading = _affine(torch.stack(locs), probes, structure, where)
    prior_loc, prior_slope = _affine(torch.stack(latent_locs), probes, structure, "latent sites")
    reading = _integrate_prior(
        map_loc, map_loading, scale[0].square(), prior_loc, prior_slope, root[0], filled[0]
    )
    if trils[0] is not None:
        _check_constant(torch.stack([t for t in trils if t is not None]), where)
        reading = _with_correlated_noise(reading, trils[0].expand(len(reading.loc), -1, -1))
    return reading._replace(scale=scale_factor, value=value)


def read_side_by_side(
    model: Model,
    args: tuple[Any, ...],
    structure: Structure,
    values: dict[str, Tensor],
    priors: tuple[Latent, ...] = (),
) -> tuple[Reading, Tensor]:
    """The maps at S nodes, whose values (S, ...) of further latents are given, and log p of the ``priors`` there.

    One run for all nodes and probes, through `torch.vmap`. ``structure`` is that of the program at one node. B of the
    reading is S times N, node after node (N is 1 where all observations are one vector).
    """
    filled = tuple(fill(a) for a in args)
    probes = _probes(structure, filled[0])  # (P, K)
    n_probes, n_rows = len(probes), _batch(structure, filled)
    n_nodes = len(next(iter(values.values())))
    # rows that share a map, with nothing of their own among the values, are read on rows that are the probes
    shared = structure.by_row and not structure.own_rows and not any(p.row_axis is not None for p in priors)
    rows = tuple(fill(_cycle(a, n_probes)) for a in args) if shared else filled

    def at(fixed: dict[str, Tensor], z: Tensor) -> tuple[Tensor, ...]:
        trace = run(model, rows, {**fixed, **latent_values(structure, z)})
        if _correlated_noise(trace, structure) is not None:
            raise NotAffine(f"observed site {structure.observed!r} is correlated: read one node at a time")
        prior = z.new_zeros(1 if shared else n_rows)
        for p in priors:
            node = trace.nodes[p.name]
            prior = prior + rows_first(node["fn"].log_prob(node["value"]), p.row_axis).sum(-1)
        return *_token_normal(trace, structure), *_latent_normal(trace, structure, len(z)), prior

    with pyro.validation_enabled(False):  # a check would have to branch on its node
        if shared:  # (S, P, ...) -> (P, S, ...)
            loc, scale, latent_loc, latent_root, prior = torch.vmap(lambda v: at(v, probes))(values)
            loc, scale, latent_loc, root = (t.movedim(1, 0) for t in (loc, scale, latent_loc, latent_root))
        else:  # (S P, N, ...) -> (P, S N, ...)
            each = {name: v.repeat_interleave(n_probes, 0) for name, v in values.items()}
            found = torch.vmap(lambda v, z: at(v, z.expand(n_rows, -1)))(each, probes.repeat(n_nodes, 1))
            loc, scale, latent_loc, root = (
                t.unflatten(0, (n_nodes, n_probes)).movedim(1, 0).flatten(1, 2) for t in found[:4]
            )
            prior = found[4][::n_probes]
    where = f"observed site {structure.observed!r}"
    _check_constant(scale, where)
    _check_constant(root, "latent sites")
    map_loc, map_loading = _affine(loc, probes, structure, where)
    prior_loc, prior_slope = _affine(latent_loc, probes, structure, "latent sites")
    reading = _integrate_prior(
        map_loc, map_loading, scale[0].square(), prior_loc, prior_slope, root[0], filled[0]
    )
    if shared:
        each_row = [t.repeat_interleave(n_rows, 0) for t in reading[:5]]
        reading = Reading(each_row[0], each_row[1], each_row[2], each_row[3], each_row[4], 1.0, filled[0])
    return reading, prior


def _probes(structure: Structure, like: Tensor) -> Tensor:
    """(K + 4, K): zeros, the unit vectors, and three random points, in units of the prior's spread."""
    spread = structure.spread.to(like)
    n_latents = len(spread)
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(N_CHECKS, n_latents, generator=generator, dtype=torch.float64).to(like)
    random = random * torch.tensor([1.0, 10.0, 100.0]).to(like)[:, None]
    unit = torch.eye(n_latents, dtype=like.dtype, device=like.device)
    return torch.cat([unit.new_zeros(1, n_latents), unit, random]) * spread


def _affine(y: Tensor, probes: Tensor, structure: Structure, where: str) -> tuple[Tensor, Tensor]:
    """y (P, B, D) at the probes (P, K) -> intercept (B, D) and slope (B, D, K), checked at the random points."""
    n_latents = probes.shape[1]
    intercept = y[0]
    # slope_k = (y(e_k) - y(0)) / spread_k
    slope = (y[1 : n_latents + 1] - intercept) / structure.spread.to(y)[:, None, None]
    slope = slope.permute(1, 2, 0)
    with torch.no_grad():
        got = y[n_latents + 1 :]
        want = intercept + torch.einsum("bdk,pk->pbd", slope, probes[n_latents + 1 :])
        size = torch.einsum("bdk,pk->pbd", slope.abs(), probes[n_latents + 1 :].abs()) + intercept.abs()
        finite = torch.isfinite(y).all()
        if not finite or not bool(((got - want).abs() <= _tolerance(y) * (size + size.amax(0))).all()):
            broken = [n for n, p in pyro.get_param_store().items() if not bool(torch.isfinite(p).all())]
            if broken:
                raise ModelError(
                    f"parameter {broken[0]!r} is not finite: check its initial value and constraint"
                )
            what = "is not finite" if not finite else "is not affine in the latents"
            raise NotAffine(
                f"the mean of the {where} {what} {structure.latent_names}: this program is not linear-Gaussian, "
                "so its score has no closed form"
            )
    return intercept, slope


def _integrate_prior(
    loc: Tensor, loading: Tensor, noise: Tensor, b: Tensor, slope: Tensor, root: Tensor, like: Tensor
) -> Reading:
    """Latents may depend on earlier ones: z = b + A z + R u, so z = (I - A)^-1 (b + R u)."""
    n_latents = b.shape[-1]
    if n_latents and bool((slope != 0).any()):
        left = torch.eye(n_latents, dtype=like.dtype, device=like.device) - slope
        b = torch.linalg.solve(left, b[..., None])[..., 0]
        root = torch.linalg.solve(left, root)
    # x = loc + loading z + e = (loc + loading b) + (loading R) u + e
    loc = loc + (loading @ b[..., None])[..., 0]
    return Reading(loc, loading @ root, noise, b, root, 1.0, like)


def _with_correlated_noise(reading: Reading, tril: Tensor) -> Reading:
    loading, noise = _split_noise(tril, reading.noise.sqrt())
    return reading._replace(loading=torch.cat([reading.loading, loading], -1), noise=noise)


# ---------------------------------------------------------------------------------------------------- runs and sites


def _sites(trace: Trace) -> tuple[tuple[str, ...], str | None, bool]:
    """Names of the observed sites, of the rows plate, and whether all latents live inside it."""
    observed = observed_nodes(trace)
    for node in observed:
        if not node["value"].is_floating_point():
            raise NotAffine(
                f"observed site {node['name']!r} holds {node['value'].dtype}: pass it as floating point numbers"
            )
        _normal(node)
        if len(observed) > 1 and node["fn"].event_dim > base(node["fn"]).event_dim + 1:
            raise NotAffine(f"observed site {node['name']!r} has an event of several axes beside other sites")
        if len(observed) > 1 and isinstance(base(node["fn"]), torch.distributions.MultivariateNormal):
            raise NotAffine(
                f"observed site {node['name']!r} is MultivariateNormal beside other observed sites"
            )
    plates = [_outermost_plate(node) for node in observed]
    rows = plates[0] if len(set(plates)) == 1 else None
    if rows is None and len(observed) > 1:
        raise NotAffine(f"observed sites {[n['name'] for n in observed]} stand in no common rows plate")
    nodes = latent_nodes(trace)
    for latent in nodes:
        _normal(latent)
    by_row = rows is not None and all(
        any(f.name == rows for f in latent["cond_indep_stack"]) for latent in nodes
    )
    if len(observed) > 1 and len({float(n["scale"]) for n in observed}) > 1:
        raise NotAffine("observed sites have different scales")
    return tuple(node["name"] for node in observed), rows, by_row


def _outermost_plate(node: Any) -> str | None:
    """The plate of the leftmost batch axis."""
    batch = len(node["fn"].batch_shape)
    frames = [f for f in node["cond_indep_stack"] if f.vectorized and batch + f.dim == 0]
    return frames[0].name if frames else None


def _tokens_of(parts: list[Tensor], by_row: bool) -> Tensor:
    """Values (means, scales) of the observed sites side by side: (N, T), or one vector (1, T)."""
    return torch.cat([p.reshape((len(p), -1) if by_row else (1, -1)) for p in parts], 1)


def _batch(structure: Structure, args: tuple[Any, ...]) -> int:
    """Rows that a run on these arguments has."""
    if not structure.by_row:
        return 1
    return structure.sub_rows or len(args[0])


def _flat(value: Tensor, site: Latent, n_rows: int) -> Tensor:
    """A latent site's value (or scale) as (n_rows, width)."""
    if site.row_axis is None:
        return value.reshape(1, -1)
    return value.movedim(site.row_axis, 0).reshape(n_rows, -1)


def latent_values(structure: Structure, z: Tensor) -> dict[str, Tensor]:
    """z (n_rows, K) as values of the latent sites."""
    values, start = {}, 0
    for site in structure.latents:
        part = z[:, start : start + site.width]
        start += site.width
        if site.row_axis is None:
            values[site.name] = part.reshape(site.shape)
        else:
            rest = site.shape[: site.row_axis] + site.shape[site.row_axis + 1 :]
            values[site.name] = part.reshape(len(z), *rest).movedim(0, site.row_axis)
    return values


def _prior_means(structure: Structure, args: tuple[Any, ...]) -> dict[str, Tensor]:
    like = args[0]
    return latent_values(structure, like.new_zeros(_batch(structure, args), structure.n_latents))


def _normal(node: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a Normal or MultivariateNormal site, in the shape of its value."""
    fn = base(node["fn"])
    value = node["value"]
    if isinstance(fn, torch.distributions.Normal):
        return fn.loc.expand(value.shape).to(value), fn.scale.expand(value.shape).to(value)
    if isinstance(fn, torch.distributions.MultivariateNormal):
        return fn.loc.expand(value.shape).to(value), fn.stddev.expand(value.shape).to(value)
    kind = "observed" if node["is_observed"] else "latent"
    raise NotAffine(
        f"{kind} site {node['name']!r} is {type(fn).__name__}: only Normal or MultivariateNormal tokens and latents "
        "are linear-Gaussian"
    )


def _correlated_noise(trace: Trace, structure: Structure) -> Tensor | None:
    """Lower factors (B, T, T) of the covariance of tokens that are one MultivariateNormal event; None of others."""
    node = trace.nodes[structure.sites[0]]
    fn = base(node["fn"])
    if not isinstance(fn, torch.distributions.MultivariateNormal):
        return None
    n_tokens = fn.event_shape[0]
    n_rows = len(node["value"]) if structure.by_row else 1
    if node["value"].numel() != n_rows * n_tokens:
        raise NotAffine(
            f"observed site {node['name']!r} has several MultivariateNormal events a row: their noise is correlated "
            "in blocks, which is not read as one linear-Gaussian map"
        )
    tril = fn.scale_tril.to(node["value"]).expand(*node["fn"].batch_shape, n_tokens, n_tokens)
    return tril.reshape(-1, n_tokens, n_tokens)


def _split_noise(tril: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """L L' = W W' + diag(noise): correlated noise as further latents, of which half the least variance is left over.

    (B, T, T), (B, T) -> W (B, T, T), noise (B, T). In correlation units, so that every token keeps its share.
    """
    unit = tril / scale[..., None]
    corr = unit @ unit.mT
    with torch.no_grad():
        left = (
            0.5 * torch.linalg.eigvalsh(corr)[..., :1]
        )  # any share will do: W changes with it, the sum does not
    rest = corr - torch.diag_embed(left.expand(scale.shape))
    return scale[..., None] * torch.linalg.cholesky(rest), left * scale.square()


def _token_normal(trace: Trace, structure: Structure) -> tuple[Tensor, Tensor]:
    pairs = [_normal(trace.nodes[name]) for name in structure.sites]
    loc, scale = zip(*pairs, strict=True)
    return _tokens_of(list(loc), structure.by_row), _tokens_of(list(scale), structure.by_row)


def tokens_of(trace: Trace, structure: Structure | Program) -> Tensor:
    """Values of the tokens of a run (N, T), of a program that was found to be linear-Gaussian or of another."""
    if isinstance(structure, Program):
        return token_values(trace, structure)
    return _tokens_of([trace.nodes[name]["value"] for name in structure.sites], structure.by_row)


def _latent_normal(trace: Trace, structure: Structure, n_rows: int) -> tuple[Tensor, Tensor]:
    """Means (n_rows, K) and block-diagonal roots (n_rows, K, K) of the latents given the earlier ones."""
    like = trace.nodes[structure.sites[0]]["value"]
    locs: list[Tensor] = []
    blocks: list[Tensor] = []
    for site in structure.latents:
        node = trace.nodes[site.name]
        loc, scale = _normal(node)
        locs.append(_flat(loc, site, n_rows))
        fn = base(node["fn"])
        if isinstance(fn, torch.distributions.MultivariateNormal):
            width = fn.event_shape[0]
            tril = fn.scale_tril.to(loc).expand(*node["value"].shape, width)  # (..., D, D)
            if site.row_axis is not None:
                tril = tril.movedim(site.row_axis, 0)
            tril = tril.reshape(n_rows, -1, width, width)
            blocks.extend(tril.unbind(1))
        else:
            blocks.append(torch.diag_embed(_flat(scale, site, n_rows)))
    if not locs:
        return like.new_zeros(n_rows, 0), like.new_zeros(n_rows, 0, 0)
    loc = torch.cat(locs, 1)
    widths = [b.shape[-1] for b in blocks]
    before = [sum(widths[:i]) for i in range(len(blocks))]
    # block after block along the diagonal
    root = sum(
        torch.nn.functional.pad(b, (i, loc.shape[1] - i - w, i, loc.shape[1] - i - w))
        for b, i, w in zip(blocks, before, widths, strict=True)
    )
    return loc, root  # type: ignore[return-value]  # a sum of at least one


def _scale(node: dict[str, Any]) -> float:
    return float(node["scale"])


def _value(
    model: Model, args: tuple[Any, ...], structure: Structure, trace: Trace, sites: dict[str, Tensor]
) -> Tensor:
    """The observed value as (N, T): a token that is computed from a missing cell is missing."""
    value = tokens_of(trace, structure)
    if any(has_missing(a) for a in args):
        # The filled cells gave finite parameters and maps; what the NaN themselves reach shows which tokens to drop.
        with torch.no_grad():
            try:
                raw = run(model, args, sites)
                reached = [t.isnan().any() for t in _token_normal(raw, structure)]
            except ValueError:  # Pyro's own check of a mean or scale that is NaN
                reached = [torch.tensor(True)]
            if any(bool(r) for r in reached):
                raise MissingCovariate(
                    f"missing cells reach the mean or scale of observed site {structure.observed!r}: covariates must "
                    "be complete, only what is observed may be missing"
                )
            value = tokens_of(raw, structure)
        n_cells = sum(int(a.isnan().sum()) for a in args if has_missing(a))
        if int(value.isnan().sum()) > n_cells:
            raise ModelError(
                f"{n_cells} missing cells make {int(value.isnan().sum())} tokens of observed site "
                f"{structure.observed!r} missing, since tokens are computed from several cells: observe the cells "
                "themselves, or fill them before"
            )
    return value


def _observed_arg(value: Tensor, args: tuple[Any, ...], ndim: int) -> int | None:
    """Which argument the tokens are; ``ndim`` of the first site's value tells a table from a vector."""
    for i, a in enumerate(args):
        if (
            isinstance(a, Tensor)
            and a.ndim == 2
            and ndim <= 2
            and a.shape == value.shape
            and a.dtype == value.dtype
            and torch.equal(a, value)
        ):
            return i
    return None


# ---------------------------------------------------------------------------------------------------------- the checks


class _Trial(NamedTuple):
    """One run on real rows, each with random latents of its own, that all checks compare with."""

    trace: Trace
    z: Tensor
    """(N, K)"""
    loc: Tensor
    """(N, T), as the others."""
    scale: Tensor
    value: Tensor
    prior: Tensor
    """Means and roots of the latents given the earlier ones."""


def _trial_run(model: Model, args: tuple[Any, ...], structure: Structure, z: Tensor | None = None) -> _Trial:
    """The program on these rows at latents z; by default one standard deviation away, no two rows alike."""
    if z is None:
        n_rows = _batch(structure, args)
        factor = 0.5 + torch.arange(n_rows, dtype=args[0].dtype, device=args[0].device)[:, None] / n_rows
        z = factor * _probes(structure, args[0])[structure.n_latents + 1]
    with torch.no_grad():
        trace = run(model, args, latent_values(structure, z))
        loc, scale = _token_normal(trace, structure)
        latent_loc, root = _latent_normal(trace, structure, _batch(structure, args))
        prior = torch.cat([latent_loc, root.flatten(1)], 1)
        return _Trial(trace, z, loc, scale, tokens_of(trace, structure), prior)


def _covariates(args: tuple[Any, ...]) -> bool:
    """Whether rows come with more than their tokens."""
    n_rows = len(args[0])
    with_rows = [a for a in args if isinstance(a, Tensor) and a.ndim and len(a) == n_rows]
    return len(with_rows) > 1


def _shared_map(model: Model, args: tuple[Any, ...], structure: Structure, before: _Trial) -> Reading | None:
    """The map read from probe rows, if the real rows have the same one; else None."""
    try:
        reading = _read_probes(model, args, structure)
    except (RuntimeError, ValueError, IndexError):
        return None  # the program does not take K + 4 rows, or they differ
    return reading if _same_map(reading, structure, before) else None


def _same_map(reading: Reading, structure: Structure, before: _Trial) -> bool:
    """Whether these rows have this one map."""
    with torch.no_grad():
        u = torch.linalg.solve(reading.latent_root, (before.z - reading.latent_loc)[..., None])
        loading = reading.loading[..., : structure.n_latents]
        want = (loading @ u)[..., 0]
        size = (loading.abs() @ u.abs())[..., 0] + reading.loc.abs()
        same = (before.loc - reading.loc - want).abs() <= _tolerance(before.loc) * size
        variance = reading.noise + reading.loading[..., structure.n_latents :].square().sum(-1)
        return bool(same.all()) and _close(before.scale.square(), variance.expand_as(before.scale))


def _refuse_dependence_on_x(
    model: Model, args: tuple[Any, ...], structure: Structure, before: _Trial
) -> None:
    """The map may not look at the tokens, nor one row at other rows: change x and see what moves."""
    if structure.sub_rows is not None:
        return  # other rows every run; the estimator refuses such programs, SVI scales them
    with torch.no_grad():
        for position, arg in enumerate(args):
            if not isinstance(arg, Tensor) or not arg.ndim or not arg.numel():
                continue
            for changed_arg in _changes(arg):
                after = _after(
                    model, (*args[:position], changed_arg, *args[position + 1 :]), structure, before.z
                )
                if after is None:
                    continue  # the program does not take such values: log(x) of negative ones, say
                moves = [not _close(a, b) for a, b in zip(after[2:], before[2:], strict=True)]
                if moves[2] and (moves[0] or moves[1] or moves[3]):
                    what = "mean" if moves[0] else "scale" if moves[1] else "prior"
                    where = f"observed site {structure.observed!r}"
                    if not (moves[0] or moves[1]):
                        where = f"latent site {', '.join(map(repr, structure.latent_names))}"
                    raise ModelError(
                        f"the {what} of {where} changes with "
                        "the observed x itself (a statistic of x inside the program, or x as its own covariate): a "
                        "hidden token would be scored with its own value. Compute the statistic outside, make it a "
                        "pyro.param, or pass covariates as a further argument"
                    )
                if not structure.by_row or len(arg) != len(before.value) or len(arg) < 2:
                    break
                keep = len(arg) // 2
                late = torch.cat([arg[:keep], changed_arg[keep:]])
                after = _after(model, (*args[:position], late, *args[position + 1 :]), structure, before.z)
                if after is None:
                    continue
                for what, a, b in zip(
                    ("mean", "scale", "value", "latents' prior"), after[2:], before[2:], strict=True
                ):
                    if not _close(a[:keep], b[:keep]):
                        raise ModelError(
                            f"the {what} of observed site {structure.observed!r} in one row depends on other rows of "
                            f"plate {structure.rows_plate!r} (a statistic of x inside the program), so rows are not "
                            "independent: compute it outside the program, or make it a pyro.param"
                        )
                break  # one kind of change that the program takes is enough


def _changes(arg: Tensor) -> list[Tensor]:
    """Other values for an argument: shifted with changed signs; and, for programs that need positive ones, scaled."""
    generator = torch.Generator().manual_seed(1)
    if not arg.is_floating_point():  # codes and whole numbers: resampled
        index = torch.randint(len(arg), arg.shape, generator=generator)
        return [torch.gather(arg, 0, index.to(arg.device))]
    random = torch.rand(arg.shape, generator=generator, dtype=torch.float64).to(arg)
    size = arg.abs().mean(0) + arg.std(0, correction=0)
    size = torch.where(size > 0, size, torch.ones_like(size))
    return [(4 * random - 2) * size - arg, arg * (1 + 0.5 * random)]


def _after(model: Model, args: tuple[Any, ...], structure: Structure, z: Tensor) -> _Trial | None:
    try:
        after = _trial_run(model, args, structure, z)
    except (RuntimeError, ValueError, IndexError):
        return None
    return after if all(bool(torch.isfinite(t).all()) for t in after[2:]) else None


def _compare_with_program(structure: Structure, reading: Reading, before: _Trial) -> None:
    """The map must give the very log-density that the program gives itself."""
    trace, z = before.trace, before.z
    with torch.no_grad():
        trace.compute_log_prob()
        want = sum(float(s["log_prob_sum"]) for s in trace.nodes.values() if s["type"] == "sample")
        # log p(x, z) = log N(z; b, R R') + log N(x; loc + loading u, noise),  u = R^-1 (z - b)
        u = torch.linalg.solve(reading.latent_root, (z - reading.latent_loc)[..., None])
        mean = reading.loc + (reading.loading[..., : structure.n_latents] @ u)[..., 0]
        value = before.value
        root = reading.loading[..., structure.n_latents :]  # of correlated noise
        if root.shape[-1]:
            cov = root @ root.mT + torch.diag_embed(reading.noise)
            token = dist.MultivariateNormal(mean, cov).log_prob(value).sum()
        else:
            token = dist.Normal(mean, reading.noise.sqrt()).log_prob(value).sum()
        logdet = torch.linalg.slogdet(reading.latent_root)[1].expand(len(z)).sum()
        got = _scale(trace.nodes[structure.sites[0]]) * float(
            token + dist.Normal(0.0, 1.0).log_prob(u).sum() - logdet
        )
    if structure.sub_rows is None and not abs(got - want) <= _tolerance(z) * 1e3 * (1 + abs(want)):
        raise NotAffine(
            f"read as a linear-Gaussian program its log-density is {got:.8g}, but the program's own is {want:.8g} "
            f"(observed site {structure.observed!r}): a mask, a scale on one site or a factor hides in it"
        )


def _check_constant(scale: Tensor, where: str) -> None:
    """scale (P, ...): the same at all probes, or the variance depends on the latents."""
    with torch.no_grad():
        if not _close(scale, scale[:1].expand_as(scale)):
            raise NotAffine(
                f"the scale of the {where} depends on the latents: this program is not linear-Gaussian, so its "
                "score has no closed form"
            )


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape and a.shape[1:] != b.shape[1:]:
        return False
    a, b = a.detach(), b.detach()
    return bool(((a - b).abs() <= _tolerance(a) * (a.abs() + b.abs())).all())


def _tolerance(like: Tensor) -> float:
    return AFFINE_TOL if like.dtype == torch.float64 else 1e-4


def _cycle(arg: Any, n_rows: int) -> Any:
    if not isinstance(arg, Tensor) or not arg.ndim:
        return arg
    return arg[:n_rows] if len(arg) >= n_rows else arg[torch.arange(n_rows, device=arg.device) % len(arg)]
