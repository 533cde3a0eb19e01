"""A linear-Gaussian map that a model states by the names of its parameters, in place of one that is found."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.affine.form import AffineForm
from bayes_mpt.program.affine.maps import DenseMap
from bayes_mpt.program.arguments import N_TRIAL_ROWS, fill
from bayes_mpt.program.offers import offered
from bayes_mpt.program.program import Model, Parts, Program, split_events
from bayes_mpt.program.run import first_run
from bayes_mpt.program.sites import base, described, latent_nodes, observed_nodes, own_masks
from bayes_mpt.program.trials import CLOSE

__all__ = ["read_stated", "stated_form", "stated_run"]


@torch.enable_grad()
def stated_form(model: Model, args: tuple[Any, ...]) -> AffineForm | None:
    """The form of a program that states its map, if its first run keeps to that; None where it does not.

    A class is believed about a call of its own or of a class above it: where a subclass has another ``__call__`` the
    statement is none. What is believed is that other parameters, latents and rows give what the map says; the sites,
    plates, masks and scales of the first run, and its means at the latents that it has drawn, are compared.

    Parameters
    ----------
    model : callable
        A Pyro program.
    args : tuple
        What it is called with; tensors have N rows. NaN cells are filled.

    Examples
    --------
    >>> from bayes_mpt.models import PPCA
    >>> from bayes_mpt.program.store import OwnStore
    >>> with OwnStore():
    ...     form = stated_form(PPCA(1), (torch.randn(5, 3, dtype=torch.float64),))
    >>> form.n_latents, form.program.parts.noise
    (1, 'noise_variance')
    """
    found = stated_run(model, args, "linear_map")
    if found is None:
        return None
    names, first, init, program = found
    parts = Parts(**names)
    if not _one_table(program, init[0]):
        return None
    if not _is_map(first, program, parts, init[0]):
        return None
    program = split_events(program)._replace(
        per_row=False, observed_argument=0, scores_input=True, affine=True, dense=True, parts=parts
    )
    return AffineForm(program, init[0].new_ones(program.n_latents))


def read_stated(parts: Parts, model: Model, args: tuple[Any, ...]) -> DenseMap:
    """The map at the parameters in the store, with gradients to them, without a run."""
    store = pyro.get_param_store()
    if not all(name in store for name in parts):
        first_run(model, (fill(args[0]),))
    loc, loading, noise = (pyro.param(name) for name in parts)
    if (
        not torch.is_grad_enabled()
    ):  # an unconstrained parameter is a leaf, and nothing is computed of it here
        loc, loading, noise = loc.detach(), loading.detach(), noise.detach()
    n_latents = loading.shape[1]
    return DenseMap(
        loc[None],
        loading[None],
        noise.expand(loc.shape)[None],
        loc.new_zeros(1, n_latents),
        torch.eye(n_latents, dtype=loc.dtype, device=loc.device)[None],
        1.0,
        args[0],
    )


def stated_run(
    model: Model, args: tuple[Any, ...], name: str
) -> tuple[dict[str, str], Trace, tuple[Any, ...], Program] | None:
    """The parameters that a program states by this name, its first run, the arguments of that, and what they show.

    None where nothing is stated of this call, or the run has other parameters, more than one latent and one observed
    site, or masks of its own.
    """
    names = offered(model, name)
    if names is None or len(args) != 1 or not _of_this_call(model, name):
        return None
    first, init = first_run(model, (fill(args[0]),))
    latents, observed = latent_nodes(first), observed_nodes(first)
    params = {site for site, node in first.nodes.items() if node["type"] == "param"}
    if len(latents) != 1 or len(observed) != 1 or params != set(names.values()):
        return None
    if any(own_masks(n, n["fn"].event_dim) for n in (*latents, *observed)):
        return None
    return names, first, init, described(first, len(init[0]))


def _of_this_call(model: Model, name: str) -> bool:
    """Whether what is stated by this name stands in the class of the call, or below it."""
    for cls in type(model).__mro__:
        if name in vars(cls):
            return True
        if "__call__" in vars(cls) or "forward" in vars(cls):
            return False
    return False


def _one_table(program: Program, x: Tensor) -> bool:
    """Whether the sites are rows of latents and of tokens, in a plate of all rows."""
    site, latent = program.sites[0], program.latents[0]
    alike = site.shape == tuple(x.shape) and len(latent.shape) == 2
    return (
        alike
        and program.by_row
        and program.sub_rows is None
        and program.scale == 1.0
        and (site.row_axis, latent.row_axis) == (0, 0)
    )


def _is_map(first: Trace, program: Program, parts: Parts, x: Tensor) -> bool:
    """Whether latents are standard normal and tokens what the map makes of them, up to rounding, in this run."""
    observed, latent = (first.nodes[s.name] for s in (program.sites[0], program.latents[0]))
    of_observed, of_latent = base(observed["fn"]), base(latent["fn"])
    if not all(isinstance(fn, torch.distributions.Normal) for fn in (of_observed, of_latent)):
        return False
    with torch.no_grad():
        loc, loading, noise = (first.nodes[name]["value"] for name in parts)
        some = slice(N_TRIAL_ROWS)  # rows
        (n_tokens,), z = x.shape[1:], latent["value"][some]
        shapes = loc.shape == (n_tokens,) and loading.shape == (n_tokens, z.shape[1])
        if not shapes or noise.shape not in ((), (n_tokens,)):
            return False
        prior_mean, prior_sd = (
            t.expand(latent["value"].shape)[some] for t in (of_latent.loc, of_latent.scale)
        )
        mean, sd = (t.expand(x.shape)[some].to(x) for t in (of_observed.loc, of_observed.scale))
        miss = (mean - loc - z @ loading.mT).abs()
        near = miss <= CLOSE.get(x.dtype, 1e-4) * (loc.abs() + z.abs() @ loading.abs().mT + sd)
        told = bool(near.all()) and bool(
            (sd - noise.sqrt()).abs().max() <= CLOSE.get(x.dtype, 1e-4) * sd.max()
        )
        standard = not prior_mean.any() and bool((prior_sd == 1).all())
        value = observed["value"]
        return told and standard and (value is x or torch.equal(value, x))
