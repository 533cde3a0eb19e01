"""Values and means of the tokens of a linear-Gaussian program."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.affine.form import AffineForm
from bayes_mpt.program.arguments import fill_all, fill_otherwise, has_missing
from bayes_mpt.program.layout import join_tokens, token_values
from bayes_mpt.program.missing import read_values, refuse_seen_gaps, values_with_gaps
from bayes_mpt.program.program import Model, ModelError
from bayes_mpt.program.run import SetLatents, one_precision, run
from bayes_mpt.program.sites import own_shown, sub_samples
from bayes_mpt.program.store import own_random_state

__all__ = ["token_gaps", "token_means"]


def token_means(
    model: Model, args: tuple[Any, ...], sites: tuple[str, ...], values: dict[str, Tensor]
) -> Tensor:
    """Means of the tokens at these latent values, the other latents at their means given them: (N, ...)."""
    with one_precision(args), SetLatents(values, others_at_mean=True):
        trace = poutine.trace(model).get_trace(*args)
    means = [trace.nodes[name]["fn"].mean for name in sites]
    return means[0] if len(means) == 1 else torch.cat([m.reshape(len(m), -1) for m in means], 1)


def token_gaps(
    model: Model, args: tuple[Any, ...], structure: AffineForm, trace: Trace, sites: dict[str, Tensor]
) -> Tensor:
    """The observed value as (N, T): a token that is computed from a missing cell is missing, or that a mask hides."""
    value = token_values(trace, structure.program)
    if structure.program.order is not None:  # a comparison or an index would not show what a NaN reaches
        if any(
            has_missing(a) for a in args
        ):  # read_values compares with a run at these latents, not at all probes
            trace = run(model, fill_all(args), sites)
        return read_values(model, args, structure.program, trace, sites)
    if any(has_missing(a) for a in args):
        # at latents that are not zero, which would hide what they multiply
        with torch.no_grad(), own_random_state(1):
            generic = run(model, fill_all(args), sub_samples(trace))
        latents = {name: generic.nodes[name]["value"] for name in structure.latent_names}
        refuse_seen_gaps(model, args, structure.program, generic, latents | sub_samples(trace))
        with torch.no_grad(), pyro.validation_enabled(False):
            raw = run(model, args, sites)
        n_cells = sum(int(a.isnan().sum()) for a in args if has_missing(a))
        with_gaps = token_values(raw, structure.program)
        whole = all(bool(own_shown(raw.nodes[name]).all()) for name in structure.site_names)
        if not whole or int(with_gaps.isnan().sum()) < n_cells:
            # missing cells without a token, or the program has a view of its own of them
            with torch.no_grad():
                other = run(model, tuple(fill_otherwise(a) for a in args), sites)
            shown = values_with_gaps(model, args, structure.site_names, trace, other, sites)
            with_gaps = join_tokens(shown, structure.program)
        n_missing = int((with_gaps.isnan() & ~value.isnan()).sum())
        if n_missing > n_cells:
            raise ModelError(
                f"{n_cells} missing cells make {n_missing} tokens of observed site {structure.observed!r} missing, "
                "since tokens are computed from several cells: observe the cells themselves, or fill them before"
            )
        value = with_gaps
    return value
