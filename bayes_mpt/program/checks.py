"""What a program must not do: observe what is no data, hide a latent, look at the tokens."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.arguments import resampled, shifted
from bayes_mpt.program.devices import own_random_state
from bayes_mpt.program.layout import log_probs_under
from bayes_mpt.program.program import Model, ModelError, Program, list_names
from bayes_mpt.program.run import run
from bayes_mpt.program.sites import (
    base,
    is_subsample,
    latent_nodes,
    node_of,
    observed_nodes,
    own_shown,
    sub_samples,
)

__all__ = [
    "check_latent",
    "check_observed",
    "check_plates",
    "check_support",
    "refuse_dependence_on_x",
    "refuse_unregistered",
    "refuse_unregistered_parameters",
]

MAX_VALUES = 4096  # of one discrete latent
N_OTHERS = 3  # draws of all latents that are tried to see whether observed values move
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}


def check_latent(node: Any) -> None:
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
        raise ModelError(
            f"discrete latent {node['name']!r} is {type(base(fn)).__name__}, which has infinite support: it cannot be "
            "summed out. Use Categorical or Binomial up to a largest value"
        )
    elif isinstance(base(fn), dist.Delta):
        raise ModelError(
            f"latent {node['name']!r} is a Delta, which has nothing to integrate: compute it without pyro.sample, or "
            "use pyro.deterministic"
        )


def check_plates(node: Any) -> None:
    """Every axis of a site belongs to an event or to a plate."""
    dims = {f.dim for f in node["cond_indep_stack"] if f.vectorized}
    shape = node["fn"].batch_shape
    for dim in range(-len(shape), 0):
        if shape[dim] > 1 and dim not in dims:
            raise ModelError(
                f"site {node['name']!r} has an axis of size {shape[dim]} that neither a plate nor an event declares: "
                'put it into pyro.plate("rows", len(x)) where these are independent rows, or append .to_event(1)'
            )


def check_support(node: Any) -> None:
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
            f"{float(bad.flatten()[0]):.6g}: check the column's coding, or take another distribution (at latents and "
            "parameters as first drawn; a support that moves with them needs validate_args=False)"
        )


def check_observed(
    model: Model,
    args: tuple[Any, ...],
    first: Trace,
    *,
    own_masks: bool = False,
) -> None:
    """What is observed must be data, and every prior whole, in the first run of a program and in further ones.

    Parameters
    ----------
    model : callable
        A Pyro program.
    args : tuple
        Filled: what it was first run on.
    first : Trace
        That run.
    own_masks : bool, default=False
        The program hides tokens itself: its masks are no matter.

    Raises
    ------
    ModelError
        If observed values move with latents, or otherwise than by a shift with parameters; if a mask hides all that is
        observed, or a latent on which something visible depends. The site is named.
    """
    nodes = observed_nodes(first, factors_too=own_masks)
    if not own_masks and not any(bool(own_shown(node).any()) for node in nodes):
        raise ModelError(
            f"a mask of the program hides every value of {list_names(repr(n['name']) for n in nodes)}: nothing is left "
            "to score. Take the mask away; missing cells are left NaN in x, and left out by the package"
        )
    _refuse_masked_latents(model, args, first)
    _refuse_moving_values(model, args, first, nodes)
    _refuse_scaled_values(model, args, first, nodes)


def _refuse_moving_values(model: Model, args: tuple[Any, ...], first: Trace, nodes: list[Any]) -> None:
    """No observed value may change with latents, or from run to run."""
    changed = None
    for seed in range(1, 1 + N_OTHERS):
        with suppress(RuntimeError, ValueError, IndexError):  # far out in a prior a program may break
            changed = _run_on_others(model, args, first, {}, seed)
            break
    if changed is None:
        return  # where it is trained it says why
    for node in nodes:
        name = node["name"]
        if _same(node["value"], node_of(changed, name)["value"]):
            continue
        latents = [n["name"] for n in latent_nodes(first)]
        held = {n["name"]: n["value"] for n in latent_nodes(first)}
        if not latents or not _same(
            node["value"], node_of(_run_on_others(model, args, first, held), name)["value"]
        ):
            raise ModelError(
                f"observed values of site {name!r} change from run to run: what is observed must be data. Draw random "
                "numbers outside the program, or by pyro.sample"
            )
        raise ModelError(
            f"observed values of site {name!r} change with the latents {list_names(map(repr, latents))}: what is "
            "observed must be data. Put the latents into the distribution: of a residual, pyro.sample("
            f"{name!r}, dist.Normal(0, 1), obs=x - mu), write pyro.sample({name!r}, dist.Normal(mu, 1), obs=x)"
        )


def _refuse_scaled_values(model: Model, args: tuple[Any, ...], first: Trace, nodes: list[Any]) -> None:
    """Observed values may be shifted by parameters, which keeps their density; anything else has a Jacobian.

    The data are the last argument that a value depends on, v(x); with d v / d x free of parameters they are shifted.
    """
    names = [n["name"] for n in nodes if n["value"].requires_grad]
    if not names:
        return
    leaves = tuple(
        a.detach().clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in args
    )
    latents = {n["name"]: n["value"].detach() for n in latent_nodes(first)}
    trace = run(model, leaves, {**latents, **sub_samples(first)})
    parameters = [p for _, p in pyro.get_param_store().named_parameters()]
    for name in names:
        value = node_of(trace, name)["value"]
        inputs = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad]
        slopes = torch.autograd.grad(value.sum(), inputs, create_graph=True, allow_unused=True)
        found = [s for s in slopes if s is not None]
        if found and not _moves(found[-1], parameters):
            continue
        raise ModelError(
            f"observed values of site {name!r} are computed with parameters, and not by a shift alone (obs=x * scale): "
            "their density is not that of the data, which has a Jacobian besides. Observe the data, obs=x, and put the "
            "parameters into the distribution, such as a TransformedDistribution"
        )


def _moves(output: Tensor, parameters: list[Tensor]) -> bool:
    if not output.requires_grad:
        return False
    grads = torch.autograd.grad(output.sum(), parameters, retain_graph=True, allow_unused=True)
    return any(g is not None and bool((g != 0).any()) for g in grads)


def _refuse_masked_latents(model: Model, args: tuple[Any, ...], first: Trace) -> None:
    """A latent may be masked only where nothing that is visible depends on it, as behind the end of a series."""
    masked = {n["name"]: own_shown(n) for n in latent_nodes(first)}
    masked = {name: shown for name, shown in masked.items() if not bool(shown.all())}
    if not masked:
        return
    held = {n["name"]: n["value"] for n in latent_nodes(first)}
    other = _run_on_others(model, args, first, {n: v for n, v in held.items() if n not in masked})
    for name, shown in masked.items():
        held[name] = torch.where(shown, held[name], node_of(other, name)["value"])
    with torch.no_grad(), pyro.validation_enabled(False):
        moved = run(model, args, {**held, **sub_samples(first)})
        before, after = _visible_log_probs(first), _visible_log_probs(moved)
    if all(_same(before[name], after[name]) for name in before):
        return
    name = next(iter(masked))
    raise ModelError(
        f"latent site {name!r} is masked (poutine.mask), so that its prior is not counted although visible values "
        "depend on it: such a program has no marginal likelihood. Take the mask off the latent, and give it a wide "
        "prior if it is to be free"
    )


def _visible_log_probs(trace: Trace) -> dict[str, Tensor]:
    """Log-densities of all sites, 0 where masks of the program hide them."""
    trace.compute_log_prob()
    return {
        name: node["log_prob"]
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not is_subsample(node)
    }


def _run_on_others(
    model: Model, args: tuple[Any, ...], first: Trace, held: dict[str, Tensor], seed: int = 1
) -> Trace:
    """A run at other latents than the first, but for those that are held; plates keep the rows that they drew."""
    with torch.no_grad(), pyro.validation_enabled(False), own_random_state(seed), _OtherLatents(first, held):
        return run(model, args, {**held, **sub_samples(first)})


class _OtherLatents(poutine.messenger.Messenger):
    """Draw latents anew; of discrete ones take the next value wherever a draw repeats the first run's."""

    def __init__(self, first: Trace, held: dict[str, Tensor]):
        super().__init__()
        self.first, self.held = first, held

    def _pyro_post_sample(self, msg: Any) -> None:
        fn, name = msg["fn"], msg["name"]
        if msg["is_observed"] or name in self.held or name not in self.first.nodes:
            return
        if not getattr(fn, "has_enumerate_support", False):
            return
        before, value = self.first.nodes[name]["value"], msg["value"]
        if before.shape != value.shape:
            return
        with suppress(NotImplementedError):
            low, *others = fn.enumerate_support(expand=False)[:2]
            if others:
                swapped = torch.where(value == low, others[0], low).to(value)
                msg["value"] = torch.where(value == before, swapped, value)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def refuse_unregistered_parameters(trace: Trace) -> None:
    """Every trainable tensor behind a site must be in the parameter store, or it is silently never trained."""
    with torch.enable_grad():
        densities = [
            node["fn"].log_prob(node["value"]).sum()
            for node in trace.nodes.values()
            if node["type"] == "sample" and not is_subsample(node)
        ]
    refuse_unregistered(densities)


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


def refuse_dependence_on_x(model: Model, args: tuple[Any, ...], program: Program, first: Trace) -> list[int]:
    """No token's distribution may look at the tokens: resample every column of an argument and see what moves.

    Columns are resampled, so that counts stay counts; latents keep the values of the first run. The
    positions of arguments that were found to be tokens, and to be looked at by no distribution, are returned.
    """
    free = []
    latents = {node["name"]: node["value"] for node in latent_nodes(first)}
    with torch.no_grad():
        before = log_probs_under(first, first, program)
        for position, arg in enumerate(args):
            if not isinstance(arg, Tensor) or arg.ndim == 0 or not len(arg):
                continue
            changed = resampled(arg) if len(arg) > 1 else shifted(arg)
            try:
                with pyro.validation_enabled(False):
                    trace = run(model, (*args[:position], changed, *args[position + 1 :]), latents)
            except (RuntimeError, ValueError, IndexError):
                continue  # the program does not take such values
            moved = [
                not torch.equal(trace.nodes[s.name]["value"], first.nodes[s.name]["value"])
                for s in program.sites
            ]
            if not any(moved):
                continue  # a covariate
            after = log_probs_under(trace, first, program)
            for name, a, b in zip((*program.site_names, *program.latent_names), after, before, strict=True):
                close = (a - b).abs() <= CLOSE.get(b.dtype, 1e-4) * (1 + b.abs())
                if not bool((close | b.isnan() | (a == b)).all()):
                    raise ModelError(
                        f"the distribution of site {name!r} changes with the observed x itself (a "
                        "statistic of x inside the program, earlier tokens, or x as its own covariate): a hidden "
                        "token would be scored with its own value. Compute the statistic outside, make it a "
                        "pyro.param, or pass covariates as a further argument"
                    )
            free.append(position)
    return free
