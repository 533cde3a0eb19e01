"""Running a program: with latents set, in one precision, its errors in words."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine import runtime
from pyro.poutine.reparam_messenger import ReparamHandler
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.arguments import fill_all, head
from bayes_mpt.program.densities import log_density
from bayes_mpt.program.program import Model, ModelError, NotPositiveDefinite, Program
from bayes_mpt.program.seen_labels import with_seen_labels
from bayes_mpt.program.sites import base, is_subsample, latent_nodes, sub_samples
from bayes_mpt.program.store import own_random_state
from bayes_mpt.program.unconstrained import UNCONSTRAINED

__all__ = [
    "FAILURES",
    "FirstRun",
    "SetLatents",
    "first_run",
    "nodes_plate",
    "not_finite",
    "one_precision",
    "run",
    "signature_of",
    "takes_visible",
    "values_of",
]

FAILURES = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)
"""Of a program that does not take such rows, or such values of its latents."""

MAX_INIT_CELLS = 2**22  # of the rows of the first run
N_TRIES = (
    16  # draws of the latents from the prior at which the cause of a number that is not finite is looked for
)
NODES = "_nodes"  # the plate of nodes, left of a program's own plates
MIXED = re.compile("dtype|scalar type|data type|result type")  # in torch's messages about precision


@lru_cache(maxsize=32)
def nodes_plate(n: int, depth: int) -> pyro.plate:
    """The plate of n nodes left of a program's own, which are ``depth``; made once, as that asks all handlers.

    Not to be entered inside of itself, as no plate of its name may be.

    Examples
    --------
    >>> with nodes_plate(3, 1):
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> z.shape
    torch.Size([3, 1])
    """
    return pyro.plate(NODES, n, dim=-1 - depth)


class SetLatents(poutine.messenger.Messenger):
    """Fix latent values, the others at their means if asked. Not `poutine.condition`: they stay latent sites."""

    def __init__(self, values: dict[str, Tensor], others_at_mean: bool = False):
        super().__init__()
        self.values = values
        self.others_at_mean = others_at_mean

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True
            if UNCONSTRAINED + msg["name"] in self.values:
                msg["infer"] = {**msg["infer"], UNCONSTRAINED: self.values[UNCONSTRAINED + msg["name"]]}
        elif self.others_at_mean and not msg["is_observed"] and not is_subsample(msg):
            msg["value"] = msg["fn"].mean
            msg["done"] = True


def takes_visible(program: Any) -> bool:
    """Whether a program or guide has an argument that tells it which tokens it sees."""
    try:
        return "visible" in signature_of(program).parameters
    except (TypeError, ValueError):
        return False


def signature_of(target: Any) -> inspect.Signature:
    """As `inspect.signature`; of a network its ``forward``, of ``poutine.reparam(program, ...)`` the program's.

    That of an object whose class has a plain ``__call__`` is remembered.

    Raises
    ------
    TypeError, ValueError
        As there.

    Examples
    --------
    >>> def program(x, y=None): ...
    >>> signature_of(poutine.reparam(program, config={}))
    <Signature (x, y=None)>
    """
    inner = getattr(target, "__wrapped__", None)
    if isinstance(inner, ReparamHandler) and not hasattr(target, "__signature__"):
        target = inner
    while isinstance(target, ReparamHandler):
        target = target.fn
    if isinstance(target, torch.nn.Module):
        target = target.forward
    call = vars(type(target)).get("__call__")
    if (
        type(call) is FunctionType
        and not hasattr(target, "__wrapped__")
        and not hasattr(target, "__signature__")
    ):
        return _of_call(call)
    return inspect.signature(target)


@lru_cache(maxsize=16)
def _of_call(call: FunctionType) -> inspect.Signature:
    """Of a method's arguments but the object itself."""
    return inspect.signature(MethodType(call, object()))


def run(
    model: Model, args: tuple[Any, ...], values: dict[str, Tensor] | None = None, *, labels: bool = True
) -> Trace:
    """The trace of one run with these latent values; the random state stays as it was where latents are drawn.

    ``labels``: whether sites that are observed in part are to be a latent and its tokens (`with_seen_labels`).
    A program that fails inside of handlers that it has entered itself leaves them to nobody.
    """
    handlers, plates = list(runtime._PYRO_STACK), list(runtime._DIM_ALLOCATOR._stack)
    try:
        with one_precision(args), own_random_state() if values is None else SetLatents(values):
            return poutine.trace(with_seen_labels(model) if labels else model).get_trace(*args)
    except BaseException:
        runtime._PYRO_STACK[:], runtime._DIM_ALLOCATOR._stack[:] = handlers, plates
        raise


@contextmanager
def one_precision(args: tuple[Any, ...]) -> Iterator[None]:
    """Run a program in the precision of its rows and where they are, however it is written: ``torch.zeros(4)``.

    To be entered before all other handlers of a run.
    """
    tensors = [a for a in args if isinstance(a, Tensor)]
    floating = [a.dtype for a in tensors if a.is_floating_point()]
    before = torch.get_default_dtype()
    n_rows = len(tensors[0]) if tensors and tensors[0].ndim else None
    casts = _Casts(floating[0] if floating else before, tensors[0].device if tensors else None, n_rows)
    # a default device looks at each call of torch: only where rows are not on the one that is the default anyway
    away = bool(tensors) and tensors[0].device.type != "cpu"
    torch.set_default_dtype(casts.dtype)
    try:
        with tensors[0].device if away else nullcontext(), casts:
            yield
    except ValueError as raised:
        error = _own_error(raised)
        first_line = str(error).splitlines()[0]
        if first_line.startswith("Shape mismatch inside plate"):
            casts.refuse_literal_size(first_line, error)
            raise ModelError(
                f"{first_line}: append .to_event(1) where a row has several tokens or numbers, or give the outer plate "
                "dim=-2"
            ) from error
        if not first_line.startswith("Expected parameter"):  # torch's, which names no site
            if error is raised:
                raise
            raise error from error.__cause__
        broken = [n for n, p in pyro.get_param_store().items() if not bool(torch.isfinite(p).all())]
        if broken:
            raise ModelError(
                f"parameter {broken[0]!r} is not finite: check its initial value and constraint"
            ) from error
        raise ModelError(
            f"the program makes a distribution {casts.where} that cannot be: {first_line.rstrip(':')}. Check the "
            f"parameters {casts.parameters} and their constraints, and what is computed from latents far from zero "
            f"(exp, division){_there(casts.latents)}"
        ) from error
    except torch.linalg.LinAlgError as error:
        first_line = str(error).splitlines()[0]
        raise NotPositiveDefinite(
            f"the program needs a matrix {casts.where} that cannot be factorised ({first_line}). Add to the "
            "diagonal of a covariance, or keep what it is computed from nearer to sensible values by a narrower prior"
            f"{_there(casts.latents)}"
        ) from error
    except RuntimeError as error:
        if "must match the size of tensor" in str(error):
            casts.refuse_literal_size(str(_own_error(error)).splitlines()[0], error)
        if not MIXED.search(str(error)):
            raise
        short = [n for n, p in pyro.get_param_store().named_parameters() if p.dtype != casts.dtype]
        what = (
            f"parameters {short} are not {casts.dtype}" if short else f"not all its tensors are {casts.dtype}"
        )
        first_line = str(error).splitlines()[0]
        raise ModelError(
            f"the program mixes precisions {casts.where}: {what}, as x is ({first_line}). Write constants with "
            "dtype=x.dtype, and networks as network.to(x.dtype), which is network.double() for BayesMPT"
        ) from error
    finally:
        torch.set_default_dtype(before)


def _own_error(error: BaseException) -> BaseException:
    """What a program raised, without the table of shapes that Pyro's trace puts below it."""
    while "Trace Shapes:" in str(error) and error.__cause__ is not None:
        error = error.__cause__
    return error


class _Casts(poutine.messenger.Messenger):
    """Observed values, draws and initial values of parameters in one precision, the latter in one place."""

    def __init__(self, dtype: torch.dtype, device: torch.device | None, n_rows: int | None = None):
        super().__init__()
        self.dtype, self.device, self.n_rows = dtype, device, n_rows
        self.plates: dict[str, int] = {}
        """Sizes of those that the program has entered."""
        self.site = ""
        """The last site that the program has reached."""
        self.parameters: list[str] = []
        """Those that it has reached."""
        self.reached: list[Any] = []
        """Messages of the latents that it has reached."""

    @property
    def where(self) -> str:
        """How far the program came, in words."""
        return f"after site {self.site!r}" if self.site else "before its first site"

    @property
    def latents(self) -> dict[str, Tensor]:
        """Values of the latents that it has reached."""
        values = {msg["name"]: msg["value"] for msg in self.reached}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def refuse_literal_size(self, message: str, error: BaseException) -> None:
        """Say so where a plate has another size than there are rows, and both are in torch's message."""
        sizes = {int(n) for n in re.findall(r"\d+", message)}
        for name, size in self.plates.items():
            if "inside plate(" in message and f"inside plate({name!r})" not in message:
                continue  # entries of a smaller plate may well be looked up in that of the rows
            if self.n_rows is not None and size != self.n_rows and {size, self.n_rows} <= sizes:
                raise ModelError(
                    f"{message}: plate {name!r} has {size} entries and x has {self.n_rows} rows. Write "
                    f"pyro.plate({name!r}, len(x)), so that other rows can be scored"
                ) from error

    def _pyro_sample(self, msg: Any) -> None:
        if is_subsample(msg):
            self.plates[msg["name"]] = msg["fn"].size
            return
        self.site = msg["name"]
        _keep_masks(msg)
        if msg["is_observed"]:
            msg["value"] = torch.as_tensor(msg["value"]).to(self.dtype)
            return
        self.reached.append(msg)
        if isinstance(base(msg["fn"]), dist.ImproperUniform):
            raise ModelError(
                f"latent {msg['name']!r} is ImproperUniform, which has no density: the marginal likelihood under a "
                "prior that does not integrate to 1 is known up to a constant of one's choice, so there is none. Give "
                "it a proper prior, however wide"
            )
        elif msg["value"] is None and not getattr(msg["fn"], "has_enumerate_support", False):
            value = msg["fn"](*msg["args"], **msg["kwargs"])
            msg["value"] = value.to(self.dtype) if value.is_floating_point() else value

    def _pyro_param(self, msg: Any) -> None:
        name, *init = msg["args"]
        self.parameters.append(name)
        if name in pyro.get_param_store():
            return  # which needs no initial value
        if init and not isinstance(init[0], torch.nn.Parameter):  # networks are trained in place
            msg["args"] = name, partial(self._cast, init[0])

    def _cast(self, value: Any) -> Any:
        value = value() if callable(value) else value
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(device=self.device, dtype=self.dtype) if floating else value


def _keep_masks(msg: Any) -> None:
    """Masks as they are when a site is reached: ``seen |= x[:, t] > 0`` would change them under the site's hands."""
    if isinstance(msg["mask"], Tensor):
        msg["mask"] = msg["mask"].clone()
    fn = msg["fn"]
    while hasattr(fn, "base_dist"):
        if isinstance(getattr(fn, "_mask", None), Tensor):
            fn._mask = fn._mask.clone()
        fn = fn.base_dist


def first_run(model: Model, args: tuple[Any, ...], *, labels: bool = True) -> tuple[Trace, tuple[Any, ...]]:
    """The first run, which initialises parameters from x, on all rows unless the table is very large."""
    if not args or not isinstance(args[0], Tensor) or args[0].ndim == 0:
        raise ModelError("the program must be called with a tensor of rows as its first argument")
    n_rows = max(64, MAX_INIT_CELLS // max(1, args[0][:1].numel()))
    init = args if len(args[0]) <= n_rows else head(args, n_rows)
    try:
        return run(model, init, labels=labels), init
    except (RuntimeError, ValueError, IndexError) as error:
        if init is args:
            raise
        try:  # the program insists on all its rows (data held in a closure, a plate of fixed size)
            return run(model, args, labels=labels), args
        except Exception:
            raise error from None


class FirstRun(NamedTuple):
    """A program that has been run once, before it is known whether it may be scored."""

    model: Model
    args: tuple[Any, ...]
    """Filled: what it was run on."""
    program: Program
    """What was found out about it."""
    trace: Trace
    """That run."""

    @property
    def latents(self) -> dict[str, Tensor]:
        """Values of the latents in that run."""
        return values_of(self.trace)

    def with_argument(self, position: int, other: Tensor) -> tuple[Any, ...]:
        """The arguments with another one in a place."""
        return (*self.args[:position], other, *self.args[position + 1 :])

    def taken(self, args: tuple[Any, ...], latents: dict[str, Tensor]) -> Trace | None:
        """A run on other arguments, at these latents; None where the program does not take them."""
        try:
            with torch.no_grad(), pyro.validation_enabled(False):
                return run(self.model, args, {**latents, **sub_samples(self.trace)})
        except FAILURES:
            return None


def values_of(trace: Trace) -> dict[str, Tensor]:
    """Values of the latents in a run."""
    return {node["name"]: node["value"].detach() for node in latent_nodes(trace)}


def not_finite(model: Model, args: tuple[Any, ...]) -> str:
    """The sites whose log-density is not finite at latents drawn from the prior, and the latents, in words."""
    args = fill_all(args)
    for seed in range(N_TRIES):
        with pyro.validation_enabled(False), own_random_state(seed):
            try:
                trace = run(model, args)
            except ModelError as error:  # with the latent that it has come to
                return str(error)
            sites = [s for s in trace.nodes.values() if s["type"] == "sample" and not is_subsample(s)]
            found = {s["name"]: log_density(s["fn"], s["value"]) for s in sites}
        bad = {
            n: float(t[~torch.isfinite(t)][0]) for n, t in found.items() if not bool(torch.isfinite(t).all())
        }
        if bad:
            there = _there({s["name"]: s["value"] for s in sites if not s["is_observed"]})
            said = (
                f"the log-density of site {n!r} is {v} at latents drawn from the prior"
                for n, v in bad.items()
            )
            return "; ".join(said) + there
    return (
        f"at {N_TRIES} draws of the latents from the prior every site has a finite log-density, so the cause is a "
        "parameter or an extreme value of a latent"
    )


@torch.no_grad()
def _there(latents: dict[str, Tensor]) -> str:
    """The latent whose value is furthest from one, up or down, in words; nothing where no values are at hand."""
    worst, found = -1.0, ""
    for name, value in latents.items():
        if torch._C._functorch.is_batchedtensor(value) or not value.numel() or not value.is_floating_point():
            continue  # of copies side by side none is the one
        far = value.detach().abs().double().log().abs().nan_to_num(nan=math.inf).flatten()
        if float(far.max()) > worst:
            worst, found = (
                float(far.max()),
                f". Latent {name!r} is {float(value.flatten()[far.argmax()]):.4g} there",
            )
    return found
