"""The linear-Gaussian map from a program's latents to its tokens.

Latents are set to probe values, the mean and scale of the observed site are recorded, and affinity is checked at
random points 1, 10 and 100 prior standard deviations away. What comes out is

    x = loc + loading u + e,    u ~ N(0, I_K),    e ~ N(0, diag(noise)),    z = latent_loc + latent_root u

`affine_form` does this once and finds out how the program may be read; `read` does it at every step of a training,
with gradients to the program's parameters. Both take a `Way` of reading: `Dense` here, one probe for every latent;
where sites look at few latents each, `bayes_mpt.program.sparse.Sparse`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.tracing import (
    N_TRIAL_ROWS,
    NODES,
    Latent,
    MissingCovariate,
    Model,
    ModelError,
    Program,
    SetLatents,
    base,
    check_observed,
    describe_latent,
    fill,
    fill_otherwise,
    first_run,
    has_missing,
    head,
    is_subsample,
    latent_nodes,
    list_names,
    observed_nodes,
    one_precision,
    own_shown,
    plate_axis,
    plate_depth,
    refuse_unregistered,
    rows_first,
    rows_plate_of,
    run,
    run_with_holes,
    token_values,
    values_with_gaps,
)

__all__ = [
    "AffineForm",
    "Dense",
    "DenseMap",
    "Map",
    "NotAffine",
    "Way",
    "affine_form",
    "cycle",
    "latent_values",
    "read",
    "read_side_by_side",
    "same_by_label",
    "token_means",
    "tokens_of",
]

LOG_2PI = math.log(2 * math.pi)
N_CHECKS = 3  # random points on top of the K + 1 that fix the affine map: at 1, 10 and 100 sd
AFFINE_TOL = 1e-9
MAX_PROBED = 2**22  # numbers in one temporary of a run at several probes


class NotAffine(ModelError):
    """The program is not linear-Gaussian given its parameters; it may be scored in another way."""


class AffineForm(NamedTuple):
    """What a program is made of; found once."""

    sites: tuple[str, ...]
    """Names of the observed sites; their values side by side are the tokens."""
    latents: tuple[Latent, ...]
    parameters: tuple[str, ...]
    """Names of the `pyro.param`s (and module parameters) that the program touches: point-estimated."""
    rows_plate: str | None
    by_row: bool
    """True: latents are per row, tokens are the features of a row. False: all observations are ONE vector."""
    per_row: bool
    """True: the map differs between rows (covariates, offsets), so the program is read on the real batch."""
    observed_argument: int | None
    """Position of the argument that the observed site's value equals; None if it is a transformation."""
    scores_input: bool
    """The value is that argument itself and nothing is scaled: `read` need not run the real batch."""
    sub_rows: int | None
    """Rows that a sub-sampling plate draws; None where the program takes all rows it is given."""
    width: int
    """T."""
    spread: Tensor
    """(K,) prior standard deviations of the latents in the first run: the unit of the probes."""
    depth: int
    """Plate dimensions that the program uses."""
    row_axes: tuple[int | None, ...]
    """The axis of the rows plate in the value of each observed site."""
    at_once: bool = False
    """With ``per_row``: the program broadcasts over a plate of probes, so that one run reads them all."""
    takes_visible: bool = False
    """Never: see `Program`."""

    @property
    def n_latents(self) -> int:
        """K."""
        return sum(site.width for site in self.latents)

    @property
    def observed(self) -> str:
        """Names of the observed sites, in words."""
        return list_names(self.sites)

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


class DenseMap(NamedTuple):
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

    def tokens_at(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means and variances of the tokens given latents z (N, K), and the size of what the means are sums of."""
        u = self._standard(z)
        loading = self.loading[..., : z.shape[-1]]
        mean = self.loc + _applied(loading, u)
        size = self.loc.abs() + _applied(loading.abs(), u.abs())
        variance = self.noise + self.loading[..., z.shape[-1] :].square().sum(-1)
        return mean, variance.expand(mean.shape), size

    def log_joint(self, z: Tensor, value: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """log p(value, z), summed over rows, from the means and variances of the tokens at z."""
        # log p(x, z) = log N(z; b, R R') + log N(x; loc + loading u, noise),  u = R^-1 (z - b)
        root = self.loading[..., z.shape[-1] :]  # of correlated noise
        if root.shape[-1]:
            cov = root @ root.mT + torch.diag_embed(self.noise)
            token = dist.MultivariateNormal(mean, cov).log_prob(value).sum()
        else:
            token = -0.5 * ((value - mean).square() / variance + variance.log() + LOG_2PI).sum()
        logdet = torch.linalg.slogdet(self.latent_root)[1].expand(len(z)).sum()
        return token + dist.Normal(0.0, 1.0).log_prob(self._standard(z)).sum() - logdet

    def _standard(self, z: Tensor) -> Tensor:
        """u = R^-1 (z - b): (N, K)."""
        return torch.linalg.solve(self.latent_root, (z - self.latent_loc)[..., None])[..., 0]


def _applied(loading: Tensor, u: Tensor) -> Tensor:
    """Loadings (B, T, K) times latents (N, K): (N, T)."""
    # one product of matrices where all rows share the loadings, which broadcasting would copy for each
    return u @ loading[0].mT if len(loading) == 1 else (loading @ u[..., None])[..., 0]


class Map(Protocol):
    """A linear-Gaussian map in some layout, a NamedTuple with fields ``scale`` and ``value``: what the checks ask."""

    @property
    def loc(self) -> Tensor: ...  # (B, T)
    def tokens_at(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...
    def log_joint(self, z: Tensor, value: Tensor, mean: Tensor, variance: Tensor) -> Tensor: ...


class Way(Protocol):
    """How the map is found."""

    def check_applicable(self, structure: AffineForm) -> None:
        """Say by an error of its own that the way is not meant for such a program."""

    def read_shared(self, model: Model, args: tuple[Any, ...], structure: AffineForm) -> Any:
        """The map that all rows share: one run on rows that are probes."""

    def read_per_row(self, model: Model, args: tuple[Any, ...], structure: AffineForm) -> Any:
        """A map for every row, or of the one vector, and its value: runs on the rows themselves."""

    def first_read_per_row(
        self, model: Model, args: tuple[Any, ...], structure: AffineForm
    ) -> tuple[AffineForm, Any]:
        """`read_per_row` for the first time, and what it finds out for the others."""


class Outline(NamedTuple):
    """What a first run tells of a program, whichever way its map is read."""

    first: Trace
    args: tuple[Any, ...]
    """Filled; the rows of that run."""
    structure: AffineForm
    """As if every row had a map of its own."""


@torch.enable_grad()
def first_look(model: Model, args: tuple[Any, ...]) -> Outline:
    """Run the program for the first time, which creates the parameters that it initialises from ``x``.

    Raises
    ------
    ModelError
        If what it observes or its latents are not Normal, or observed values are computed with parameters.
    """
    first, init = first_run(model, tuple(fill(a) for a in args))
    sites, rows_plate, by_row, row_axes = _sites(first, len(init[0]))
    values = [first.nodes[name]["value"] for name in sites]
    if any(v.requires_grad for v in values):
        raise NotAffine(
            f"observed values of site {list_names(sites)!r} are computed with parameters, so that they are not read as "
            "data with one linear-Gaussian map"
        )
    value = _tokens_of(values, row_axes)
    n_rows = len(value)
    nodes = latent_nodes(first)
    latents = tuple(describe_latent(latent, rows_plate if by_row else None) for latent in nodes)
    spread = [
        _flat(_normal(n)[1].detach(), n["value"].shape, site.row_axis)[0, 0]
        for n, site in zip(nodes, latents, strict=True)
    ]
    draft = AffineForm(
        sites,
        latents,
        tuple(n for n, site in first.nodes.items() if site["type"] == "param"),
        rows_plate,
        by_row,
        per_row=True,
        observed_argument=_find_observed_argument(value, init, first.nodes[sites[0]]["value"].ndim),
        scores_input=False,
        sub_rows=n_rows if by_row and n_rows != len(init[0]) else None,
        width=value.shape[1],
        spread=torch.cat(spread) if spread else init[0].new_zeros(0),
        depth=plate_depth((*observed_nodes(first), *nodes)),
        row_axes=row_axes,
    )
    return Outline(first, init, draft)


@torch.enable_grad()
def affine_form(
    model: Model,
    args: tuple[Any, ...],
    way: Way | None = None,
    n_trial: int = N_TRIAL_ROWS,
    outline: Outline | None = None,
) -> AffineForm:
    """Run the program on real rows and find out what it is made of.

    Parameters
    ----------
    model : callable
        A Pyro program with one observed Normal site and Normal latents.
    args : tuple
        What the program is called with; tensors have N rows. NaN cells are filled with column means.
    way : Way, optional
        How to read it; `Dense` by default.
    n_trial : int, default=8
        Rows on which what one run can show is checked.
    outline : Outline, optional
        What `first_look` found out on these rows, where it has been asked already.

    Returns
    -------
    AffineForm

    Raises
    ------
    ModelError
        If the program is not linear-Gaussian given its parameters, sub-samples, uses other rows of ``x``, or
        holds trainable tensors that Pyro does not know of. The site is named.
    """
    way = Dense() if way is None else way
    first, init, draft = first_look(model, args) if outline is None else outline
    nodes, node = latent_nodes(first), first.nodes[draft.sites[0]]
    by_row = draft.by_row
    way.check_applicable(draft)
    check_observed(model, init, first)
    draft = _without_false_argument(model, init, draft, first)
    trial, before, whole, reading = init, None, None, None
    if by_row and _scale(node) == 1.0:
        few = head(init, min(n_trial, max(1, len(init[0]) - 1)))
        # A program that refuses fewer rows holds something for each, and is checked on all of them.
        with suppress(RuntimeError, ValueError, IndexError):
            trial, before = few, _trial_run(model, few, draft)
            if len(before.value) != len(few[0]):  # rows of its own, whatever it is given
                trial, before = init, None
        # With covariates a map that rows share now (a slope of zero, sorted groups) need not stay shared.
        if before is not None and not _covariates(init):
            reading = _shared_map(model, trial, draft, before, way)
        if reading is not None and len(init[0]) > len(trial[0]):
            whole = _trial_run(model, init, draft)  # what holds for a few rows need not hold for all
            if not _same_map(reading, whole):
                reading, trial, before = None, init, whole
    if before is None:
        trial, before = init, _trial_run(model, init, draft)
    if reading is not None:
        draft = draft._replace(per_row=False, scores_input=draft.observed_argument is not None)
    else:
        draft, reading = way.first_read_per_row(model, trial, draft)
    refuse_unregistered([t for n in (*observed_nodes(first), *nodes) for t in _normal(n)])
    _refuse_dependence_on_x(model, trial, draft, before)
    _compare_with_program(draft, reading, before if whole is None or reading.loc.shape[0] > 1 else whole)
    return draft


def read(model: Model, args: tuple[Any, ...], structure: AffineForm, way: Way | None = None) -> Any:
    """Read the program's map at its current parameters, with gradients to them.

    Dense: one run on K + 4 probe rows where all rows share the map. Elsewhere one run on the real batch for each probe,
    or one for all if the program broadcasts over a plate of probes.
    """
    way = Dense() if way is None else way
    if structure.per_row:
        return way.read_per_row(model, args, structure)
    reading = way.read_shared(model, args, structure)
    if structure.scores_input:
        assert structure.observed_argument is not None
        return reading._replace(value=args[structure.observed_argument])
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
        together = _all_probes(model, args, structure)
        structure = structure._replace(at_once=together is not None)
        return structure, _read_rows(model, args, structure) if together is None else together


def _read_probes(model: Model, args: tuple[Any, ...], structure: AffineForm) -> DenseMap:
    """All probes in one run: row 0 has z = 0, rows 1..K a unit vector each, the last three are random."""
    n_latents = structure.n_latents
    n_probes = n_latents + 1 + N_CHECKS
    rows = tuple(fill(cycle(a, n_probes)) for a in args)
    probes = _probes(structure, rows[0])  # (P, K)
    trace = run(model, rows, latent_values(structure, probes))
    loc, scale = (t[0] for t in _token_normal(trace, structure))  # (P, T)
    latent_loc, latent_root = (t[0] for t in _latent_normal(trace, structure))  # (P, K), (P, K, K)
    where = f"observed site {structure.observed!r}"
    _check_constant(scale, where)
    noise_root = _correlated_noise(trace, structure)
    tril = None if noise_root is None else noise_root[0]
    if tril is not None and len(tril) > 1:
        _check_constant(tril, where)
    map_loc, map_loading = _affine(loc[:, None], probes, structure, where)
    prior_loc, prior_slope = _affine(latent_loc[:, None], probes, structure, "latent sites")
    _check_constant(latent_root.flatten(1), "latent sites")
    reading = integrate_prior(
        map_loc, map_loading, scale[:1].square(), prior_loc, prior_slope, latent_root[:1], rows[0]
    )
    return reading if tril is None else _with_correlated_noise(reading, tril[:1])


class _Runs(NamedTuple):
    """The program at P probes, B rows each."""

    loc: Tensor
    """(P, B, T)"""
    scale: Tensor
    latent_loc: Tensor
    """(P, B, K), of each latent given the earlier ones."""
    latent_root: Tensor
    """(P, B, K, K)"""
    noise_root: Tensor | None
    """(P, B, T, T) of tokens that are one MultivariateNormal."""

    def each(self, change: Callable[[Tensor], Tensor]) -> _Runs:
        """The same change to all."""
        return _Runs(
            change(self.loc),
            change(self.scale),
            change(self.latent_loc),
            change(self.latent_root),
            None if self.noise_root is None else change(self.noise_root),
        )


def _read_rows(model: Model, args: tuple[Any, ...], structure: AffineForm) -> DenseMap:
    """The real batch at every probe: every row, or the one vector, has a map of its own."""
    filled = tuple(fill(a) for a in args)
    probes = _probes(structure, filled[0])  # (P, K)
    if not structure.n_latents:
        probes = probes[:1]  # one run is like another
    if structure.at_once:
        runs, trace = _run_at_once(model, filled, structure, probes)
    else:
        runs, trace = _run_apart(model, filled, structure, probes)
    sites = _prior_means(structure, filled) | _sub_sample(trace)
    value = _value(model, args, structure, trace, sites)
    reading = _map_of(runs, probes, structure)
    return reading._replace(scale=_scale(trace.nodes[structure.sites[0]]), value=value)


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
    filled = tuple(fill(a) for a in args)
    probes = _probes(structure, filled[0])  # (P, K)
    n_probes, n_rows = len(probes), _batch(structure, filled)
    n_nodes = len(next(iter(values.values())))
    # rows that share a map, with nothing of their own among the values, are read on rows that are the probes
    shared = structure.by_row and not structure.per_row and all(p.row_axis is None for p in priors)
    if shared:
        rows = tuple(fill(cycle(a, n_probes)) for a in args)
        z = probes.expand(n_nodes, -1, -1)
    else:
        rows, z = filled, probes.repeat(n_nodes, 1)[:, None]
        values = {name: v.repeat_interleave(n_probes, 0) for name, v in values.items()}
    if depth is None:
        runs, log_prior, scale = _map_copies(model, rows, structure, z, values, priors)
    else:
        trace = _run_copies(model, rows, structure, z, depth, values)
        runs = _runs_of(trace, structure, len(z))
        log_prior, scale = _log_prior(trace, priors, len(z), rows[0]), _scale(trace.nodes[structure.sites[0]])
    if shared:  # (S, P, ...) -> (P, S, ...)
        reading = _map_of(runs.each(lambda t: t.transpose(0, 1)), probes, structure)
        return _each_row(reading, n_rows)._replace(value=filled[0]), log_prior
    by_probe = lambda t: t.unflatten(0, (n_nodes, n_probes)).transpose(0, 1)  # noqa: E731
    reading = _map_of(runs.each(lambda t: by_probe(t).flatten(1, 2)), probes, structure)
    log_prior = by_probe(log_prior)  # (P, S, N)
    _check_constant(log_prior, f"prior of {list_names([p.name for p in priors])}")
    return reading._replace(scale=scale, value=filled[0]), log_prior[0]


def _each_row(reading: DenseMap, n_rows: int) -> DenseMap:
    """The same map for each of so many rows."""
    loc, loading, noise, latent_loc, root = (t.repeat_interleave(n_rows, 0) for t in reading[:5])
    return DenseMap(loc, loading, noise, latent_loc, root, reading.scale, reading.value)


def _log_prior(trace: Trace, latents: tuple[Latent, ...], n_copies: int, like: Tensor) -> Tensor:
    """Log-densities of these latents in a run of copies, row by row: (P, N), or (P, 1) where no row has its own."""
    total = like.new_zeros(n_copies, 1)
    for latent in latents:
        node = trace.nodes[latent.name]
        shape = node["value"].shape[node["value"].ndim - len(latent.shape) :][: latent.n_batch]
        log_prob = node["fn"].log_prob(node["value"])
        total = total + _flat(log_prob, shape, latent.row_axis, n_copies).sum(-1)
    return total


def _run_apart(
    model: Model, filled: tuple[Any, ...], structure: AffineForm, probes: Tensor
) -> tuple[_Runs, Trace]:
    """One run for each probe; and the first."""
    n_rows = _batch(structure, filled)
    traces: list[Trace] = []
    for probe in probes:
        # The rows that a sub-sampling plate drew in the first run stay for the others.
        fixed = _sub_sample(traces[0]) if traces else {}
        traces.append(run(model, filled, latent_values(structure, probe.expand(n_rows, -1)) | fixed))
    return _joined([_runs_of(trace, structure) for trace in traces]), traces[0]


def _sub_sample(trace: Trace) -> dict[str, Tensor]:
    """The rows that plates drew."""
    return {name: node["value"] for name, node in trace.nodes.items() if is_subsample(node)}


def _run_at_once(
    model: Model, filled: tuple[Any, ...], structure: AffineForm, probes: Tensor
) -> tuple[_Runs, Trace]:
    """One run for all probes, or for as many as memory will bear; and the first."""
    n_rows = _batch(structure, filled)
    step = max(2, MAX_PROBED // max(1, n_rows * structure.width * structure.n_latents))
    out, traces = [], []
    for part in probes.split(step):
        # An axis of the program as long as that of the probes could pass for it.
        n_copies = len(part)
        while n_copies in (n_rows, structure.width):
            n_copies += 1
        z = torch.cat([part, part[:1].expand(n_copies - len(part), -1)])
        traces.append(_run_copies(model, filled, structure, z[:, None], structure.depth, {}))
        out.append(_runs_of(traces[-1], structure, n_copies).each(itemgetter(slice(len(part)))))
    return _joined(out), traces[0]


def _run_copies(
    model: Model,
    filled: tuple[Any, ...],
    structure: AffineForm,
    z: Tensor,
    depth: int,
    values: dict[str, Tensor],
) -> Trace:
    """Copies of the program side by side, on a plate left of its own, at latents z (P, N, K), or (P, 1, K)."""
    n_copies, n_rows = len(z), _batch(structure, filled)
    sites, start = dict(values), 0
    for site in structure.latents:
        part = z[..., start : start + site.width]
        start += site.width
        if site.row_axis is None:
            part = part.reshape(n_copies, *site.shape)
        else:
            rest = site.shape[: site.row_axis] + site.shape[site.row_axis + 1 :]
            part = part.reshape(n_copies, -1, *rest).expand(n_copies, n_rows, *rest)
            part = part.movedim(1, site.row_axis + 1)
        sites[site.name] = part.reshape(n_copies, *[1] * (depth - site.n_batch), *part.shape[1:])
    with pyro.plate(NODES, n_copies, dim=-1 - depth):
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
    n_rows, scales = _batch(structure, filled), []

    def alone(node: dict[str, Tensor], z: Tensor) -> tuple[Tensor, ...]:
        trace = run(model, filled, node | latent_values(structure, z.expand(n_rows, -1)))
        scales.append(_scale(trace.nodes[structure.sites[0]]))
        found = (*_runs_of(trace, structure), _log_prior(trace, priors, 1, z))
        return tuple(t[0] for t in found if t is not None)

    with pyro.validation_enabled(False):  # a check would have to branch on its node
        *runs, log_prior = torch.vmap(alone)(values, z)
    return _Runs(*runs, *[None] * (5 - len(runs))), log_prior, scales[0]


def _all_probes(model: Model, args: tuple[Any, ...], structure: AffineForm) -> DenseMap | None:
    """The map from one run at all probes, if that gives what runs apart give at the three random ones."""
    if structure.sub_rows is not None:
        return None  # other rows in every run
    probes = _probes(structure, args[0])
    try:
        together, _ = _run_at_once(model, args, structure, probes)
    except Exception:  # written for one set of latents at a time
        return None
    with torch.no_grad():
        apart, _ = _run_apart(model, args, structure, probes[-N_CHECKS:])
        for a, b in zip(together, apart, strict=True):
            if a is None or b is None:
                continue
            size = b.abs() + b.abs().flatten(1).amax(1).reshape(-1, *[1] * (b.ndim - 1)) if b.numel() else b
            if not bool(((a[-N_CHECKS:] - b).abs() <= _tolerance(b) * size).all()):
                return None
    return _map_of(together, probes, structure)


def _map_of(runs: _Runs, probes: Tensor, structure: AffineForm) -> DenseMap:
    """The affine map through the first K + 1 probes, checked at the others."""
    where = f"observed site {structure.observed!r}"
    _check_constant(runs.scale, where)
    _check_constant(runs.latent_root, "latent sites")
    loc, loading = _affine(runs.loc, probes, structure, where)
    prior_loc, prior_slope = _affine(runs.latent_loc, probes, structure, "latent sites")
    reading = integrate_prior(
        loc, loading, runs.scale[0].square(), prior_loc, prior_slope, runs.latent_root[0], loc
    )
    if runs.noise_root is None:
        return reading
    _check_constant(runs.noise_root, where)
    return _with_correlated_noise(reading, runs.noise_root[0].expand(len(loc), -1, -1))


def _probes(structure: AffineForm, like: Tensor) -> Tensor:
    """(K + 4, K): zeros, the unit vectors, and three random points, in units of the prior's spread."""
    spread = structure.spread.to(like)
    unit = torch.diag(spread)
    return torch.cat([unit.new_zeros(1, len(spread)), unit, random_points(spread)])


def random_points(spread: Tensor) -> Tensor:
    """(3, K): 1, 10 and 100 standard deviations (K,) away."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(N_CHECKS, len(spread), generator=generator, dtype=torch.float64).to(spread)
    return random * torch.tensor([1.0, 10.0, 100.0]).to(spread)[:, None] * spread


def _affine(y: Tensor, probes: Tensor, structure: AffineForm, where: str) -> tuple[Tensor, Tensor]:
    """y (P, B, D) at the probes (P, K) -> intercept (B, D) and slope (B, D, K), checked at the random points."""
    n_latents = probes.shape[1]
    intercept = y[0]
    # slope_k = (y(e_k) - y(0)) / spread_k
    slope = (y[1 : n_latents + 1] - intercept) / structure.spread.to(y)[:, None, None]
    slope = slope.permute(1, 2, 0)
    with torch.no_grad():
        far = probes[n_latents + 1 :]
        want = intercept + torch.einsum("bdk,pk->pbd", slope, far)
        size = torch.einsum("bdk,pk->pbd", slope.abs(), far.abs()) + intercept.abs()
        check_affine(y[n_latents + 1 :], want, size, structure, where, bool(torch.isfinite(y).all()))
    return intercept, slope


def check_affine(
    got: Tensor, want: Tensor, size: Tensor, structure: AffineForm, where: str, finite: bool = True
) -> None:
    """Means at random points (P, ...) must be what the map says, up to rounding in parts of this size."""
    finite = finite and bool(torch.isfinite(got).all())
    size = size + size.amax(0) if len(size) else size
    if finite and bool(((got - want).abs() <= _tolerance(got) * size).all()):
        return
    broken = [n for n, p in pyro.get_param_store().items() if not bool(torch.isfinite(p).all())]
    if broken:
        raise ModelError(f"parameter {broken[0]!r} is not finite: check its initial value and constraint")
    what = "is not affine in the latents" if finite else "is not finite"
    raise NotAffine(
        f"the mean of the {where} {what} {list_names(structure.latent_names)}: this program is not linear-Gaussian, "
        "so its score has no closed form"
    )


def integrate_prior(
    loc: Tensor, loading: Tensor, noise: Tensor, b: Tensor, slope: Tensor, root: Tensor, like: Tensor
) -> DenseMap:
    """Latents may depend on earlier ones: z = b + A z + R u, so z = (I - A)^-1 (b + R u)."""
    n_latents = b.shape[-1]
    if n_latents and bool((slope != 0).any()):
        left = torch.eye(n_latents, dtype=like.dtype, device=like.device) - slope
        b = torch.linalg.solve(left, b[..., None])[..., 0]
        root = torch.linalg.solve(left, root)
    # x = loc + loading z + e = (loc + loading b) + (loading R) u + e
    loc = loc + (loading @ b[..., None])[..., 0]
    return DenseMap(loc, loading @ root, noise, b, root, 1.0, like)


def _with_correlated_noise(reading: DenseMap, tril: Tensor) -> DenseMap:
    loading, noise = _split_noise(tril, reading.noise.sqrt())
    return reading._replace(loading=torch.cat([reading.loading, loading], -1), noise=noise)


# ---------------------------------------------------------------------------------------------------- runs and sites


def _sites(trace: Trace, n_rows: int) -> tuple[tuple[str, ...], str | None, bool, tuple[int | None, ...]]:
    """Names of the observed sites, of the rows plate, whether all latents live inside it, and its axis in each site."""
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
    nodes = latent_nodes(trace)
    for latent in nodes:
        _normal(latent)
    rows, by_row = rows_plate_of(observed, nodes, n_rows)
    axes = tuple(plate_axis(node, rows) if by_row else None for node in observed)
    if len(observed) > 1 and len({float(n["scale"]) for n in observed}) > 1:
        raise NotAffine("observed sites have different scales")
    for node in observed:
        if not bool(own_shown(node).all()):
            raise NotAffine(f"a mask hides values of observed site {node['name']!r}")
    return tuple(node["name"] for node in observed), rows, by_row, axes


def _tokens_of(parts: list[Tensor], row_axes: tuple[int | None, ...]) -> Tensor:
    """Values of the observed sites side by side: (N, T), or one vector (1, T)."""
    return torch.cat([rows_first(p, axis) for p, axis in zip(parts, row_axes, strict=True)], 1)


def _batch(structure: AffineForm, args: tuple[Any, ...]) -> int:
    """Rows that a run on these arguments has."""
    if not structure.by_row:
        return 1
    return structure.sub_rows or len(args[0])


def _flat(t: Tensor, shape: torch.Size, row_axis: int | None, n_copies: int = 1) -> Tensor:
    """What stands for each number of a site's value of this shape, row by row of each copy: (P, B, width)."""
    lead = t.shape[1 : max(1, t.ndim - len(shape))]
    t = t.expand(n_copies, *lead, *shape).reshape(n_copies, *shape)
    if row_axis is None:
        return t.reshape(n_copies, 1, -1)
    return t.movedim(row_axis + 1, 1).reshape(n_copies, shape[row_axis], -1)


def latent_values(structure: AffineForm, z: Tensor) -> dict[str, Tensor]:
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


def _prior_means(structure: AffineForm, args: tuple[Any, ...]) -> dict[str, Tensor]:
    like = args[0]
    return latent_values(structure, like.new_zeros(_batch(structure, args), structure.n_latents))


def _normal(node: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a Normal or MultivariateNormal site, which broadcast to its value."""
    fn, value = base(node["fn"]), node["value"]
    if isinstance(fn, torch.distributions.Normal):
        return fn.loc.to(value), fn.scale.to(value)
    if isinstance(fn, torch.distributions.MultivariateNormal):
        return fn.loc.to(value), fn.stddev.to(value)
    kind = "observed" if node["is_observed"] else "latent"
    raise NotAffine(
        f"{kind} site {node['name']!r} is {type(fn).__name__}: only Normal or MultivariateNormal tokens and latents "
        "are linear-Gaussian"
    )


def _correlated_noise(trace: Trace, structure: AffineForm, n_copies: int = 1) -> Tensor | None:
    """Lower factors (P, B, T, T) of the covariance of tokens that are one MultivariateNormal; None of others."""
    node = trace.nodes[structure.sites[0]]
    fn, value = base(node["fn"]), node["value"]
    if not isinstance(fn, torch.distributions.MultivariateNormal):
        return None
    n_tokens = fn.event_shape[0]
    axis = structure.row_axes[0]
    n_rows = 1 if axis is None else value.shape[axis]
    if value.numel() != n_rows * n_tokens:
        raise NotAffine(
            f"observed site {node['name']!r} has several MultivariateNormal events a row: noise that is correlated in "
            "blocks is not supported"
        )
    tril = _flat(fn.scale_tril.to(value), torch.Size((*value.shape, n_tokens)), None, n_copies)
    return tril.reshape(n_copies, n_rows, n_tokens, n_tokens)


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


def _runs_of(trace: Trace, structure: AffineForm, n_copies: int = 1) -> _Runs:
    return _Runs(
        *_token_normal(trace, structure, n_copies),
        *_latent_normal(trace, structure, n_copies),
        _correlated_noise(trace, structure, n_copies),
    )


def _joined(runs: list[_Runs]) -> _Runs:
    loc, scale, latent_loc, latent_root, noise_root = zip(*runs, strict=True)
    tril = None if noise_root[0] is None else torch.cat(noise_root)
    return _Runs(torch.cat(loc), torch.cat(scale), torch.cat(latent_loc), torch.cat(latent_root), tril)


def _token_normal(trace: Trace, structure: AffineForm, n_copies: int = 1) -> tuple[Tensor, Tensor]:
    """Means and scales of the tokens (P, B, T)."""
    locs: list[Tensor] = []
    scales: list[Tensor] = []
    for name, axis in zip(structure.sites, structure.row_axes, strict=True):
        node = trace.nodes[name]
        for t, out in zip(_normal(node), (locs, scales), strict=True):
            out.append(_flat(t, node["value"].shape, axis, n_copies))
    return torch.cat(locs, -1), torch.cat(scales, -1)


def tokens_of(trace: Trace, structure: AffineForm | Program) -> Tensor:
    """Values of the tokens of a run (N, T), of a program that was found to be linear-Gaussian or of another."""
    if isinstance(structure, Program):
        return token_values(trace, structure)
    return _tokens_of([trace.nodes[name]["value"] for name in structure.sites], structure.row_axes)


def latent_parts(trace: Trace, structure: AffineForm, n_copies: int = 1) -> tuple[Tensor, list[Tensor]]:
    """Of the latents given the earlier ones: means (P, B, K), and a root of each site's covariance.

    Standard deviations (P, B, width) of independent ones, lower factors (P, B, events, D, D) of others.
    """
    value, axis = trace.nodes[structure.sites[0]]["value"], structure.row_axes[0]
    lead = (n_copies, 1 if axis is None else value.shape[axis])
    locs: list[Tensor] = []
    roots: list[Tensor] = []
    for site in structure.latents:
        node = trace.nodes[site.name]
        shape = node["value"].shape[node["value"].ndim - len(site.shape) :]
        loc, scale = (_flat(t, shape, site.row_axis, n_copies) for t in _normal(node))
        locs.append(loc)
        fn = base(node["fn"])
        if isinstance(fn, torch.distributions.MultivariateNormal):
            width = fn.event_shape[0]
            tril = _flat(fn.scale_tril.to(loc), torch.Size((*shape, width)), site.row_axis, n_copies)
            roots.append(tril.reshape(*lead, -1, width, width))
        else:
            roots.append(scale)
    return torch.cat(locs, -1) if locs else value.new_zeros(*lead, 0), roots


def _latent_normal(trace: Trace, structure: AffineForm, n_copies: int = 1) -> tuple[Tensor, Tensor]:
    """Means (P, B, K) and block-diagonal roots (P, B, K, K) of the latents given the earlier ones."""
    loc, parts = latent_parts(trace, structure, n_copies)
    blocks: list[Tensor] = []
    for part in parts:
        blocks.extend([torch.diag_embed(part)] if part.ndim == 3 else part.unbind(2))
    if len(blocks) == 1:
        return loc, blocks[0]
    root, start = loc.new_zeros(*loc.shape, loc.shape[-1]), 0
    for block in blocks:
        end = start + block.shape[-1]
        root[..., start:end, start:end] = block
        start = end
    return loc, root


def _scale(node: dict[str, Any]) -> float:
    return float(node["scale"])


def _value(
    model: Model, args: tuple[Any, ...], structure: AffineForm, trace: Trace, sites: dict[str, Tensor]
) -> Tensor:
    """The observed value as (N, T): a token that is computed from a missing cell is missing."""
    for name in structure.sites:
        if not bool(own_shown(trace.nodes[name]).all()):
            raise ModelError(
                f"a mask hides values of observed site {name!r}, and did not when the program was first run: leave the "
                "cells NaN, which the package leaves out, or show the masked rows when the predictor is made"
            )
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
        n_cells = sum(int(a.isnan().sum()) for a in args if has_missing(a))
        with_gaps = tokens_of(raw, structure)
        whole = all(bool(own_shown(raw.nodes[name]).all()) for name in structure.sites)
        if not whole or int(with_gaps.isnan().sum()) < n_cells:
            # missing cells without a token, or the program has a view of its own of them
            with torch.no_grad():
                other = run(model, tuple(fill_otherwise(a) for a in args), sites)
            shown = values_with_gaps(model, args, structure.sites, trace, other, sites)
            with_gaps = _tokens_of([shown[name] for name in structure.sites], structure.row_axes)
        value = with_gaps
        if int(value.isnan().sum()) > n_cells:
            raise ModelError(
                f"{n_cells} missing cells make {int(value.isnan().sum())} tokens of observed site "
                f"{structure.observed!r} missing, since tokens are computed from several cells: observe the cells "
                "themselves, or fill them before"
            )
    return value


def _find_observed_argument(value: Tensor, args: tuple[Any, ...], ndim: int) -> int | None:
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


def _without_false_argument(
    model: Model, args: tuple[Any, ...], structure: AffineForm, first: Trace
) -> AffineForm:
    """Missing cells of the argument that the tokens are must be missing there too, or the tokens are not it."""
    if structure.observed_argument is None:
        return structure
    trace, holes = run_with_holes(model, args, structure.observed_argument, first)
    if trace is None:
        return structure
    shown = _tokens_of([own_shown(trace.nodes[name]) for name in structure.sites], structure.row_axes)
    if torch.equal(tokens_of(trace, structure).isnan(), holes) and bool((shown | holes).all()):
        return structure
    return structure._replace(observed_argument=None)


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


def _trial_run(model: Model, args: tuple[Any, ...], structure: AffineForm, z: Tensor | None = None) -> _Trial:
    """The program on these rows at latents z; by default one standard deviation away, no two rows alike."""
    if z is None:
        n_rows = _batch(structure, args)
        factor = 0.5 + torch.arange(n_rows, dtype=args[0].dtype, device=args[0].device)[:, None] / n_rows
        z = factor * _probes(structure, args[0])[structure.n_latents + 1]
    with torch.no_grad():
        trace = run(model, args, latent_values(structure, z))
        loc, scale = (t[0] for t in _token_normal(trace, structure))
        latent_loc, roots = latent_parts(trace, structure)
        prior = torch.cat([latent_loc[0], *[r[0].flatten(1) for r in roots]], 1)
        return _Trial(trace, z, loc, scale, tokens_of(trace, structure), prior)


def _covariates(args: tuple[Any, ...]) -> bool:
    """Whether rows come with more than their tokens."""
    n_rows = len(args[0])
    with_rows = [a for a in args if isinstance(a, Tensor) and a.ndim and len(a) == n_rows]
    return len(with_rows) > 1


def _shared_map(model: Model, args: tuple[Any, ...], structure: AffineForm, before: _Trial, way: Way) -> Any:
    """The map read from probe rows, if the real rows have the same one; else None."""
    try:
        reading = way.read_shared(model, args, structure)
    except (RuntimeError, ValueError, IndexError):
        return None  # the program does not take K + 4 rows, or they differ
    return reading if _same_map(reading, before) else None


def same_by_label(
    model: Model, args: tuple[Any, ...], structure: AffineForm, reading: DenseMap, label: Tensor
) -> bool:
    """Whether each of these rows has the map that its label (N,) numbers among the B of the reading."""
    filled = tuple(fill(a) for a in args)
    loc, loading, noise, latent_loc, root = (t[label] for t in reading[:5])
    of_rows = DenseMap(loc, loading, noise, latent_loc, root, reading.scale, reading.value)
    return _same_map(of_rows, _trial_run(model, filled, structure))


def _same_map(reading: Map, before: _Trial) -> bool:
    """Whether these rows have this one map."""
    with torch.no_grad():
        mean, variance, size = reading.tokens_at(before.z)
        same = (before.loc - mean).abs() <= _tolerance(before.loc) * size
        return bool(same.all()) and _close(before.scale.square(), variance)


def _refuse_dependence_on_x(
    model: Model, args: tuple[Any, ...], structure: AffineForm, before: _Trial
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
                        where = f"latent site {list_names(map(repr, structure.latent_names))}"
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


def _after(model: Model, args: tuple[Any, ...], structure: AffineForm, z: Tensor) -> _Trial | None:
    try:
        after = _trial_run(model, args, structure, z)
    except (RuntimeError, ValueError, IndexError):
        return None
    return after if all(bool(torch.isfinite(t).all()) for t in after[2:]) else None


def _compare_with_program(structure: AffineForm, reading: Map, before: _Trial) -> None:
    """The map must give the very log-density that the program gives itself."""
    trace, z = before.trace, before.z
    with torch.no_grad():
        trace.compute_log_prob()
        want = sum(float(s["log_prob_sum"]) for s in trace.nodes.values() if s["type"] == "sample")
        mean, variance, size = reading.tokens_at(z)
        got = _scale(trace.nodes[structure.sites[0]]) * float(
            reading.log_joint(z, before.value, mean, variance)
        )
        # A mean that is large beside its noise is rounded: d log N(x; m, v) = (x - m) / v dm,  dm = eps (|x| + |m|)
        rounded = torch.finfo(z.dtype).eps * (before.value.abs() + size)
        rounding = 8 * float(((before.value - mean).abs() / variance * rounded).sum())
    if structure.sub_rows is None and not abs(got - want) <= _tolerance(z) * 1e3 * (1 + abs(want)) + rounding:
        raise NotAffine(
            f"read as a linear-Gaussian program its log-density is {got:.8g}, but the program's own is {want:.8g} "
            f"(observed site {structure.observed!r}): it contains a mask, a scale on one site or a factor"
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
    return torch.equal(a, b) or bool(((a - b).abs() <= _tolerance(a) * (a.abs() + b.abs())).all())


def _tolerance(like: Tensor) -> float:
    return AFFINE_TOL if like.dtype == torch.float64 else 1e-4


def cycle(arg: Any, n_rows: int) -> Any:
    """So many rows, from the first again where there are fewer."""
    if not isinstance(arg, Tensor) or not arg.ndim:
        return arg
    return arg[:n_rows] if len(arg) >= n_rows else arg[torch.arange(n_rows, device=arg.device) % len(arg)]
