"""A mixture of Gaussians that a model states by the names of its parameters, in place of one that is found."""

from __future__ import annotations

from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.affine.declared import stated_run, stated_values
from bayes_mpt.program.affine.maps import DenseMap, with_correlated_noise
from bayes_mpt.program.program import Model, Program, split_events
from bayes_mpt.program.sites import base
from bayes_mpt.program.trials import CLOSE

__all__ = ["MixtureParts", "StatedMixture", "read_mixture", "stated_mixture"]

N_COMPARED = 64  # rows of the first run


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
    found = stated_run(model, args, "mixture_map")
    if found is None:
        return None
    names, first, x, program = found
    parts = MixtureParts(**names)
    return StatedMixture(split_events(program), parts) if _is_mixture(first, program, parts, x) else None


def read_mixture(parts: MixtureParts, model: Model, args: tuple[Any, ...]) -> tuple[DenseMap, Tensor]:
    """The maps of the components and the log weights (K,) at the parameters in the store, without a run.

    With gradients to the parameters. The maps have no latents, and no rows as their value.
    """
    weights, loc, root = stated_values(parts, model, args)
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
