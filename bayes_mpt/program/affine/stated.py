"""What a model states of its density by the names of its parameters, in place of what is found by evaluation.

A map x = loc + loading z + e of standard normal latents z, or a mixture of Gaussians.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.affine.form import AffineForm
from bayes_mpt.program.affine.maps import DenseMap, with_correlated_noise
from bayes_mpt.program.arguments import N_TRIAL_ROWS, fill
from bayes_mpt.program.offers import ANOTHER_PROGRAM, offered_of_itself
from bayes_mpt.program.program import Model, Parts, Program, split_events
from bayes_mpt.program.run import first_run
from bayes_mpt.program.sites import base, described, own_masks
from bayes_mpt.program.trials import CLOSE

__all__ = ["MixtureParts", "StatedMixture", "read_mixture", "read_stated", "stated_form", "stated_mixture"]

N_COMPARED = 64  # rows of the first run of a mixture


def _run(
    model: Model, args: tuple[Any, ...], name: str
) -> tuple[dict[str, str], Trace, Tensor, Program] | None:
    """The parameters that a program states by this name, its first run, the rows of that, and what they show.

    None where nothing is stated of this call, or where the run has other parameters, or is not of one latent and one
    observed site, of the cells of X, in a plate of all rows and without masks of its own.
    """
    names = offered_of_itself(model, name, ANOTHER_PROGRAM)
    if names is None or len(args) != 1:
        return None
    # where a site is observed in part, its two halves are more sites than are stated
    first, init = first_run(model, (fill(args[0]),), labels=False)
    x, program = init[0], described(first, len(init[0]))
    if len(program.latents) != 1 or len(program.sites) != 1 or set(program.parameters) != set(names.values()):
        return None
    site, latent = program.sites[0], program.latents[0]
    of_rows = program.by_row and program.sub_rows is None and program.scale == 1.0
    if not of_rows or site.shape != tuple(x.shape) or (site.row_axis, latent.row_axis) != (0, 0):
        return None
    observed, drawn = first.nodes[site.name], first.nodes[latent.name]
    if own_masks(observed, observed["fn"].event_dim) or own_masks(drawn, drawn["fn"].event_dim):
        return None
    if observed["value"] is not x and not torch.equal(observed["value"], x):
        return None
    return names, first, x, program._replace(per_row=False, observed_argument=0, scores_input=True)


def _values(parts: tuple[str, ...], model: Model, args: tuple[Any, ...]) -> list[Tensor]:
    """Values of the parameters of these names in the store, without a run; gradients to them where they are tracked."""
    if not pyro.get_param_store().keys() >= set(parts):
        first_run(model, (fill(args[0]),))
    found = map(pyro.param, parts)
    # an unconstrained parameter is a leaf, and nothing is computed of it here
    return list(found) if torch.is_grad_enabled() else list(map(Tensor.detach, found))


# ---------------------------------------------------------------------------------------------- a linear-Gaussian map


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
    found = _run(model, args, "linear_map")
    if found is None:
        return None
    names, first, x, program = found
    parts = Parts(**names)
    if not _is_map(first, program, parts, x):
        return None
    program = program._replace(affine=True, dense=True, parts=parts)
    return AffineForm(program, x.new_ones(program.latents[0].width))


def read_stated(parts: Parts, model: Model, args: tuple[Any, ...]) -> DenseMap:
    """The map at the parameters in the store, with gradients to them, without a run."""
    loc, loading, noise = _values(parts, model, args)
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


def _is_map(first: Trace, program: Program, parts: Parts, x: Tensor) -> bool:
    """Whether latents are standard normal and tokens what the map makes of them, up to rounding, in this run."""
    observed, latent = first.nodes[program.sites[0].name], first.nodes[program.latents[0].name]
    tokens, prior, values = base(observed["fn"]), base(latent["fn"]), latent["value"]
    normal = isinstance(tokens, torch.distributions.Normal) and isinstance(prior, torch.distributions.Normal)
    if not normal or values.ndim != 2:
        return False
    with torch.no_grad():
        loc, loading = first.nodes[parts.loc]["value"], first.nodes[parts.loading]["value"]
        noise = first.nodes[parts.noise]["value"]
        some = slice(N_TRIAL_ROWS)  # rows
        (n_tokens,), z = x.shape[1:], values[some]
        shapes = loc.shape == (n_tokens,) and loading.shape == (n_tokens, z.shape[1])
        if not shapes or noise.shape not in ((), (n_tokens,)):
            return False
        prior_mean, prior_sd = prior.loc.expand(values.shape)[some], prior.scale.expand(values.shape)[some]
        mean, sd = tokens.loc.expand(x.shape)[some].to(x), tokens.scale.expand(x.shape)[some].to(x)
        miss = (mean - loc - z @ loading.mT).abs()
        near = miss <= CLOSE.get(x.dtype, 1e-4) * (loc.abs() + z.abs() @ loading.abs().mT + sd)
        told = bool(near.all()) and bool(
            (sd - noise.sqrt()).abs().max() <= CLOSE.get(x.dtype, 1e-4) * sd.max()
        )
        return told and not prior_mean.any() and bool((prior_sd == 1).all())


# --------------------------------------------------------------------------------------------- a mixture of Gaussians


class MixtureParts(NamedTuple):
    """Names of the parameters of a mixture c ~ Categorical(weights), x ~ N(loc_c, L_c L_c')."""

    weights: str
    """(K,)"""
    loc: str
    """(K, T)"""
    scale_tril: str
    """L: (K, T, T), or (T, T) for all components."""


class StatedMixture(NamedTuple):
    """A program that is such a mixture."""

    program: Program
    parts: MixtureParts


@torch.enable_grad()
def stated_mixture(model: Model, args: tuple[Any, ...]) -> StatedMixture | None:
    """The mixture that a program states to be, if its first run keeps to that; None where it does not.

    A class is believed as about a linear-Gaussian map (`bayes_mpt.program.affine.stated_form`): the sites, plates,
    masks and probabilities of the first run are compared, and the Gaussians of the components that it has drawn.

    Parameters
    ----------
    model : callable
        A Pyro program.
    args : tuple
        What it is called with; tensors have N rows. NaN cells are filled.

    Examples
    --------
    >>> from bayes_mpt.models import GaussianMixture
    >>> from bayes_mpt.program.store import OwnStore
    >>> with OwnStore():
    ...     found = stated_mixture(GaussianMixture(2), (torch.randn(9, 3, dtype=torch.float64),))
    >>> found.program.discrete, found.parts.loc
    (('component',), 'loc')
    """
    found = _run(model, args, "mixture_map")
    if found is None:
        return None
    names, first, x, program = found
    parts = MixtureParts(**names)
    return StatedMixture(split_events(program), parts) if _is_mixture(first, program, parts, x) else None


def read_mixture(parts: MixtureParts, model: Model, args: tuple[Any, ...]) -> tuple[DenseMap, Tensor]:
    """The maps of the components and the log weights (K,) at the parameters in the store, without a run.

    With gradients to the parameters. The maps have no latents, and no rows as their value.
    """
    weights, loc, root = _values(parts, model, args)
    root = root.expand(*loc.shape, loc.shape[1])
    noise, none = root.square().sum(-1), loc.new_zeros(len(loc), 0, 0)
    alone = DenseMap(loc, loc[..., None][..., :0], noise, none.flatten(1), none, 1.0, args[0][:0])
    return with_correlated_noise(alone, root), dist.Categorical(weights).logits


@torch.no_grad()
def _is_mixture(first: Trace, program: Program, parts: MixtureParts, x: Tensor) -> bool:
    """Whether labels and tokens have, up to rounding, the distributions that are stated, in this run."""
    observed, latent = (first.nodes[s.name] for s in (program.sites[0], program.latents[0]))
    tokens, label = base(observed["fn"]), base(latent["fn"])
    if not isinstance(tokens, torch.distributions.MultivariateNormal):
        return False
    if not isinstance(label, torch.distributions.Categorical) or latent["value"].ndim != 1:
        return False
    weights, loc, root = (first.nodes[name]["value"] for name in parts)
    (n_rows, n_tokens), n_components = x.shape, len(weights)
    if weights.ndim != 1 or loc.shape != (n_components, n_tokens):
        return False
    if root.shape not in ((n_tokens, n_tokens), (n_components, n_tokens, n_tokens)):
        return False
    some, close = slice(N_COMPARED), CLOSE.get(x.dtype, 1e-4)
    here = latent["value"][some]
    logits = label.logits.expand(n_rows, -1)[some]
    if logits.shape[1] != n_components:
        return False
    factor = root.expand(n_components, n_tokens, n_tokens)[here]
    size = factor.square().sum(-1).sqrt()  # (n, T)
    mean = tokens.loc.expand(x.shape)[some]
    scale = tokens.scale_tril.expand(n_rows, n_tokens, n_tokens)[some]
    return (
        bool(((logits - dist.Categorical(weights).logits).abs() <= close).all())
        and bool(((mean - loc[here]).abs() <= close * (loc[here].abs() + size)).all())
        and bool(((scale - factor).abs() <= close * size[..., None]).all())
    )
