"""What a program must not do: observe what is no data, hide a latent, look at the tokens."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.program import ModelError
from bayes_mpt.program.sites import (
    base,
    is_subsample,
    latent_nodes,
    observed_nodes,
)

__all__ = [
    "check_sites",
    "refuse_unregistered",
    "refuse_unregistered_parameters",
]

MAX_VALUES = 4096  # of one discrete latent


def check_sites(trace: Trace, *, factors_too: bool = False) -> None:
    """What a program must keep to where it is scored at given latents, or with latents summed out: in its first run."""
    nodes, latents = observed_nodes(trace, factors_too=factors_too), latent_nodes(trace)
    for node in latents:
        _check_latent(node)
    for node in (*nodes, *latents):
        _check_plates(node)
    for node in nodes:
        _check_support(node)


def _check_latent(node: Any) -> None:
    """A discrete latent must have few enough values to sum over."""
    fn = node["fn"]
    if getattr(fn, "has_enumerate_support", False):
        try:
            n_values = len(fn.enumerate_support(expand=False))
        except NotImplementedError as error:
            raise ModelError(f"discrete latent {node['name']!r} cannot be enumerated: {error}") from error
        if n_values > MAX_VALUES:
            raise ModelError(
                f"discrete latent {node['name']!r} has {n_values} values, more than {MAX_VALUES}: it cannot be summed "
                "out. Use one with fewer, or a continuous latent"
            )
    elif getattr(fn.support, "is_discrete", False):
        kind = type(base(fn)).__name__
        raise ModelError(
            f"discrete latent {node['name']!r} is {kind}, which has infinite support: it cannot be summed out. Use "
            f"Binomial, or cut it off at a largest value, say 50: probs = dist.{kind}(...).log_prob(torch.arange(51.0))"
            f".exp(); pyro.sample({node['name']!r}, dist.Categorical(probs))"
        )
    elif isinstance(base(fn), dist.Delta):
        raise ModelError(
            f"latent {node['name']!r} is a Delta, which has nothing to integrate: compute it without pyro.sample, or "
            "use pyro.deterministic"
        )


def _check_plates(node: Any) -> None:
    """Every axis of a site belongs to an event or to a plate."""
    dims = {f.dim for f in node["cond_indep_stack"] if f.vectorized}
    shape = node["fn"].batch_shape
    for dim in range(-len(shape), 0):
        if shape[dim] > 1 and dim not in dims:
            raise ModelError(
                f"site {node['name']!r} has an axis of size {shape[dim]} that neither a plate nor an event declares: "
                'put it into pyro.plate("rows", len(x)) where these are independent rows, or append .to_event(1)'
            )


def _check_support(node: Any) -> None:
    """Tokens must be values that their distribution can take."""
    fn = base(node["fn"])
    if not fn._validate_args:
        return
    try:
        fine = fn.support.check(node["value"])
    except (NotImplementedError, AttributeError, RuntimeError):
        return
    if not bool(fine.all()):
        bad = node["value"].expand(fine.shape)[~fine] if fine.shape == node["value"].shape else node["value"]
        raise ModelError(
            f"observed site {node['name']!r} has values outside the support of its {type(fn).__name__}, such as "
            f"{float(bad.flatten()[0]):.6g}: check the column's coding, or take another distribution. Where the ends "
            f"of the support move with latents or parameters, write dist.{type(fn).__name__}(..., "
            "validate_args=False): then values outside have density zero there, and no error ends the run"
        )


def refuse_unregistered_parameters(trace: Trace) -> None:
    """Every trainable tensor behind a site must be in the parameter store, or it is silently never trained."""
    outputs: list[Tensor] = []
    with torch.enable_grad(), pyro.validation_enabled(False):
        for node in trace.nodes.values():
            if node["type"] == "sample" and not is_subsample(node):
                fn = base(node["fn"])
                outputs += (
                    [fn.loc, fn.scale] if type(fn) is dist.Normal else [node["fn"].log_prob(node["value"])]
                )
    refuse_unregistered(outputs)


def refuse_unregistered(outputs: list[Tensor]) -> None:
    """Every trainable tensor behind these must be in the parameter store."""
    known = {id(p) for _, p in pyro.get_param_store().named_parameters()}
    seen, todo = set(), [t.grad_fn for t in outputs if t.grad_fn is not None]
    while todo:
        fn = todo.pop()
        if fn in seen:
            continue
        seen.add(fn)
        leaf = getattr(fn, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise ModelError(
                f"the program uses a trainable tensor of shape {tuple(leaf.shape)} that Pyro does not know of, so it "
                "would never be trained: register the network inside the program with pyro.module(name, network)"
            )
        todo.extend(nxt for nxt, _ in fn.next_functions if nxt is not None)
