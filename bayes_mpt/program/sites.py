"""The sites of one run: which are latent, which observed, in which plates; what masks leave of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch import Independent
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.program import ColumnObserved, HasFactors, Latent, ModelError, Observed, Program

__all__ = [
    "base",
    "described",
    "factor_nodes",
    "is_point",
    "is_subsample",
    "latent_nodes",
    "node_of",
    "observed_nodes",
    "own_masks",
    "own_shown",
    "plate_axis",
    "plate_depth",
    "rows_given_shared",
    "rows_plate_of",
    "sub_samples",
]


def is_subsample(node: Any) -> bool:
    """Whether a site is the draw of rows of a sub-sampling plate."""
    return node["type"] == "sample" and type(node["fn"]).__name__ == "_Subsample"


def is_point(node: Any) -> bool:
    """Whether a site, of a guide, is put on a single point."""
    return isinstance(base(node["fn"]), dist.Delta)


def latent_nodes(trace: Trace) -> list[Any]:
    """The latent sites of a run."""
    return [
        node
        for node in trace.nodes.values()
        if node["type"] == "sample" and not node["is_observed"] and not is_subsample(node)
    ]


def factor_nodes(trace: Trace) -> list[Any]:
    """The sites of `pyro.factor`; the log-factor of one is ``base(node["fn"]).log_factor``."""
    return [n for n in trace.nodes.values() if n["type"] == "sample" and isinstance(base(n["fn"]), dist.Unit)]


def observed_nodes(trace: Trace, *, factors_too: bool = False, none_too: bool = False) -> list[Any]:
    """The observed sites; an error where there is none, or a factor, unless these may stand beside."""
    nodes = []
    for node in trace.nodes.values():
        if node["type"] != "sample" or not node["is_observed"] or node["infer"].get("_deterministic"):
            continue
        fn = base(node["fn"])
        if isinstance(fn, dist.Unit):
            if factors_too:
                continue
            raise HasFactors(
                f"site {node['name']!r} is a pyro.factor: the program is not a normalised density of its tokens. A "
                "factor inside of the rows plate that moves with its own row's cells is believed to be one by "
                "BayesMPT(model).fit(x), and not by a predictor or a loss of SVI alone"
            )
        if isinstance(fn, dist.Delta) and _repeats_itself(node, fn):
            continue
        got, want = tuple(node["value"].shape), tuple(node["fn"].shape())
        if got != want:
            of_column = got == (*want, 1)
            column = "give a response of one column as y.ravel(), or frame['y'], or " if of_column else ""
            raise (ColumnObserved if of_column else ModelError)(
                f"observed site {node['name']!r} has values of shape {got} under a distribution of shape {want}: "
                f"{column}write the rows plate with len(x), and .expand or .to_event where the distribution is too "
                "small; a single column of a table is x[:, 0], of one row x[t, 0]"
            )
        nodes.append(node)
    if not nodes and not none_too:
        raise ModelError(
            f"the program must have at least one observed site, got none (it reached {list(trace.nodes)[1:-1]}): write "
            'pyro.sample("x", ..., obs=x), where every run reaches it'
        )
    return nodes


def _repeats_itself(node: Any, fn: dist.Delta) -> bool:
    """Whether an observed Delta is at its own value, as reparametrised latents leave it: nothing to score.

    An error where it is at another value, or has a log-density besides.
    """
    value = node["value"]
    if bool(torch.as_tensor(fn.log_density).any()):
        raise ModelError(
            f"observed site {node['name']!r} is a Delta with a log-density of its own, which is no density of tokens: "
            "write it as the distribution that it stands for"
        )
    if fn.v is value or bool((fn.v == value).all()):
        return True
    raise ModelError(
        f"observed site {node['name']!r} is a Delta at other values than are observed, so that its density is zero or "
        "infinite: give it a distribution with a spread, or compute it by pyro.deterministic"
    )


def node_of(trace: Trace, name: str) -> Any:
    """A site of a run."""
    if name not in trace.nodes:
        raise ModelError(
            f"site {name!r} was there when the program was first run, and is not now (sites: {list(trace.nodes)}): "
            "the sites of a program must not depend on chance, nor on values of latents or parameters"
        )
    return trace.nodes[name]


def _refuse_row_scales(nodes: Sequence[Any]) -> None:
    """A scale must be one number: a density to the power of a row's weight is none."""
    for node in nodes:
        if torch.as_tensor(node["scale"]).numel() > 1:
            raise ModelError(
                f"site {node['name']!r} has a scale of its own for each row (poutine.scale with a column of weights): "
                "a density to the power of a weight is none, so that there is no marginal likelihood. Repeat rows that "
                "count several times, or give the distribution a scale that depends on the column"
            )


def described(first: Trace, n_rows: int, factors_too: bool = False) -> Program:
    """The program of a first run on so many rows."""
    nodes, latents = observed_nodes(first, factors_too=factors_too), latent_nodes(first)
    _refuse_row_scales((*nodes, *latents))
    rows, by_row = rows_plate_of(nodes, latents, n_rows)
    sites = tuple(_observed_site(node, rows if by_row else None) for node in nodes)
    own = sites[0].shape[sites[0].row_axis] if by_row and sites[0].row_axis is not None else 1
    return Program(
        sites,
        tuple(_latent_site(node, rows if by_row else None) for node in latents),
        tuple(n for n, site in first.nodes.items() if site["type"] == "param"),
        rows,
        by_row,
        plate_depth((*nodes, *latents)),
        own if by_row and own != n_rows else None,
        float(nodes[0]["scale"]),
    )


def _latent_site(node: Any, rows_plate: str | None) -> Latent:
    """A latent site of a run, as it is remembered."""
    shape = tuple(node["value"].shape)
    plates = tuple(f.name for f in node["cond_indep_stack"])
    axis = plate_axis(node, rows_plate)
    discrete = bool(getattr(node["fn"], "has_enumerate_support", False))
    n_batch = len(node["fn"].batch_shape)
    width = node["value"].numel() // (1 if axis is None else max(1, shape[axis]))
    return Latent(node["name"], shape, axis, plates, width, discrete, n_batch)


def _observed_site(node: Any, rows_plate: str | None) -> Observed:
    """An observed site of a run, as it is remembered."""
    fn = base(node["fn"])
    shape = tuple(node["value"].shape)
    try:
        discrete = bool(fn.support.is_discrete)
    except (NotImplementedError, AttributeError):
        discrete = bool(fn.has_enumerate_support)
    return Observed(
        node["name"],
        shape,
        plate_axis(node, rows_plate),
        fn.event_dim,
        getattr(fn, "kind", type(fn).__name__),
        discrete,
    )


def plate_axis(node: Any, plate: str | None) -> int | None:
    """The axis of a plate in the value of a site."""
    for frame in node["cond_indep_stack"]:
        if frame.name == plate and frame.vectorized:
            return len(node["fn"].batch_shape) + int(frame.dim)
    return None


def rows_plate_of(nodes: list[Any], latents: list[Any], n_rows: int) -> tuple[str | None, bool]:
    """The plate of the rows, and whether all latents live inside it.

    It is a plate around every observed site; one of as many rows as ``x`` has, and around all latents, comes first.
    """
    ranked = []
    for frame in nodes[0]["cond_indep_stack"]:
        if all(plate_axis(node, frame.name) is not None for node in nodes):
            around = all(plate_axis(node, frame.name) is not None for node in latents)
            size = frame.full_size or frame.size
            # the outermost of several plates that would do
            ranked.append((size != n_rows, not around, frame.dim, frame.name))
    if not ranked:
        return None, False
    _, outside, _, name = min(ranked)
    return name, not outside


def plate_depth(nodes: Iterable[Any]) -> int:
    """Plate dimensions around these sites."""
    return max((-f.dim for n in nodes for f in n["cond_indep_stack"] if f.vectorized), default=0)


def base(fn: Any) -> Any:
    """The distribution under `Independent`, `expand` and masks."""
    while isinstance(fn, Independent | torch.distributions.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def rows_given_shared(program: Program, trace: Trace) -> Program | None:
    """The program of the rows alone, its other latents held: None where no latent stands in the plate, or all do."""
    rows = program.rows_plate
    own = [s for s in program.latents if rows in s.plates]
    if program.by_row or rows is None or not own or len(own) == len(program.latents):
        return None
    return program._replace(
        sites=tuple(_observed_site(node_of(trace, s.name), rows) for s in program.sites),
        latents=tuple(_latent_site(node_of(trace, s.name), rows) for s in own),
        by_row=True,
        order=None,  # that of the whole; rows are asked for their share of what it asks
    )


def own_masks(node: Any, n_event: int) -> list[tuple[Tensor, int]]:
    """Masks of the program itself (`poutine.mask`, `MaskedDistribution`), and how many event axes each leaves out."""
    out, fn, inside = [], node["fn"], 0
    if node["mask"] is not None and node["mask"] is not True:
        out.append((torch.as_tensor(node["mask"]), n_event))
    while hasattr(fn, "base_dist"):
        inside += getattr(fn, "reinterpreted_batch_ndims", 0)
        mask = getattr(fn, "_mask", None)
        if mask is not None and mask is not True:
            out.append((torch.as_tensor(mask), n_event - inside))
        fn = fn.base_dist
    return out


def own_shown(node: Any) -> Tensor:
    """Which numbers of a site's value the program's own masks leave: bool, in the shape of the value."""
    value = node["value"]
    shown = torch.ones(value.shape, dtype=torch.bool, device=value.device)
    for mask, n_outer in own_masks(node, node["fn"].event_dim):
        while mask.ndim + n_outer > value.ndim and mask.ndim:  # of data at nodes: it moves with no latent
            mask = mask[0]
        shown = shown & (mask[(...,) + (None,) * n_outer] if mask.ndim else mask)
    return shown


def sub_samples(trace: Trace) -> dict[str, Tensor]:
    """The rows that sub-sampling plates drew in a run, by the plate."""
    return {name: node["value"] for name, node in trace.nodes.items() if is_subsample(node)}
