"""What a Pyro program is made of: observed sites, latents, plates; and running it with latents set.

A program is read by evaluation, never by name or by source. Its tokens are the values of its observed sites: all
elements of them, site after site, where a site's distribution has a density for each element; a whole event (a
Multinomial count, say) where it has not.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch import Independent
from pyro.poutine import runtime
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.densities import log_density
from bayes_mpt.program.devices import own_random_state

__all__ = ["Latent", "Model", "ModelError", "Observed", "Program", "analyze"]

Model = Callable[..., Any]

MAX_INIT_CELLS = 2**22
NODES = "_nodes"  # the plate of nodes, left of a program's own plates
MAX_VALUES = 4096  # of one discrete latent
MAX_NAMES = 12  # in a message
N_TRIAL_ROWS = 8
N_OTHERS = 3  # draws of all latents that are tried to see whether observed values move
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}
MIXED = re.compile("dtype|scalar type|data type|result type")  # in torch's messages about precision


class ModelError(ValueError):
    """The program cannot be scored; the message names the site and what to do."""


class NotPositiveDefinite(ModelError, torch.linalg.LinAlgError):
    """A matrix that the program computes has no factor: where latents are proposed, the proposal is impossible."""


class MissingCovariate(ModelError):
    """A cell is missing on which the tokens' distribution depends."""


class Latent(NamedTuple):
    """One latent site."""

    name: str
    shape: tuple[int, ...]
    """Shape of the site's value in the first run."""
    row_axis: int | None
    """The axis of the rows plate in that shape; None outside the plate."""
    plates: tuple[str, ...]
    """Names of the plates around the site."""
    width: int
    """Numbers that the site adds to K: of one row, or of the whole data set."""
    discrete: bool = False
    """Its values can be enumerated."""
    n_batch: int = 0
    """Axes of the value that are no event."""


class Observed(NamedTuple):
    """One observed site."""

    name: str
    shape: tuple[int, ...]
    """Shape of the site's value in the first run."""
    row_axis: int | None
    """The axis of the rows plate in that shape."""
    n_joint: int
    """Axes, on the right, of an event that has one density for all of it: one token."""
    kind: str
    """Name of the distribution of a token."""
    discrete: bool
    """Whether a token has a probability, and no density."""

    @property
    def n_tokens(self) -> int:
        """Tokens of one row; of all observations without a rows plate."""
        kept = self.shape[: len(self.shape) - self.n_joint]
        n = 1
        for axis, size in enumerate(kept):
            n *= 1 if axis == self.row_axis else size
        return n


class Program(NamedTuple):
    """What a program is made of; found once."""

    sites: tuple[Observed, ...]
    latents: tuple[Latent, ...]
    parameters: tuple[str, ...]
    """Names of the `pyro.param`s (and module parameters) that the program touches: point-estimated."""
    rows_plate: str | None
    by_row: bool
    """True: latents are per row, tokens are the features of a row. False: all observations are ONE vector."""
    depth: int
    """Plate dimensions that the program uses."""
    sub_rows: int | None
    """Rows that a sub-sampling plate draws; None where the program takes all rows it is given."""
    scale: float = 1.0
    """Plate or `poutine.scale` factor of the sites."""
    observed_argument: int | None = None
    """Position of the argument whose cells are the tokens as they stand, and that no distribution looks at."""
    per_row: bool = True
    """Programs of this kind are read on the rows that they score."""
    scores_input: bool = False
    """The tokens are an argument itself and nothing is scaled: rows are scored without a run of their own."""
    takes_visible: bool = False
    """The program is conditioned on the mask: hidden tokens are independent of each other, each row has its own."""

    @property
    def observed(self) -> str:
        """Names of the observed sites, in words."""
        return list_names(self.site_names)

    @property
    def site_names(self) -> tuple[str, ...]:
        """Names of the observed sites, one by one."""
        return tuple(site.name for site in self.sites)

    @property
    def n_tokens(self) -> int:
        """T."""
        return sum(site.n_tokens for site in self.sites)

    @property
    def n_latents(self) -> int:
        """Numbers that stand for the latents."""
        return sum(site.width for site in self.latents)

    @property
    def latent_names(self) -> tuple[str, ...]:
        """Names of the latent sites: integrated."""
        return tuple(site.name for site in self.latents)

    @property
    def discrete(self) -> tuple[str, ...]:
        """Names of the latents that can be enumerated."""
        return tuple(site.name for site in self.latents if site.discrete)

    @property
    def one_label(self) -> bool:
        """Whether each row has one discrete latent, a label of the row."""
        found = [site for site in self.latents if site.discrete]
        if len(found) != 1 or found[0].row_axis is None or not self.by_row:
            return False
        return all(n == 1 for i, n in enumerate(found[0].shape[: found[0].n_batch]) if i != found[0].row_axis)

    @property
    def continuous(self) -> tuple[str, ...]:
        """Names of the others."""
        return tuple(site.name for site in self.latents if not site.discrete)


@torch.enable_grad()
def analyze(model: Model, args: tuple[Any, ...], *, own_masks: bool = False) -> Program:
    """Run the program on real rows and find out what it is made of.

    The first run also creates the parameters that the program initialises from ``x``.

    Parameters
    ----------
    model : callable
        A Pyro program.
    args : tuple
        What the program is called with; tensors have N rows. NaN cells are filled.
    own_masks : bool, default=False
        The program hides tokens itself, and its distributions look at the visible ones. It may have factors
        (`factor_nodes`), which train it and enter no score.

    Returns
    -------
    Program

    Raises
    ------
    ModelError
        If nothing is observed, a factor stands in the program, a token's distribution looks at the tokens, or
        trainable tensors are unknown to Pyro. The site is named.
    """
    args = tuple(fill(a) for a in args)
    first, init = first_run(model, args)
    factors = factor_nodes(first)
    nodes = observed_nodes(first, factors_too=own_masks)
    latents = latent_nodes(first)
    rows, by_row = rows_plate_of(nodes, latents, len(init[0]))
    sites = tuple(_observed(node, rows if by_row else None) for node in nodes)
    n_rows = sites[0].shape[sites[0].row_axis] if by_row and sites[0].row_axis is not None else 1
    program = Program(
        sites,
        tuple(describe_latent(node, rows if by_row else None) for node in latents),
        tuple(n for n, site in first.nodes.items() if site["type"] == "param"),
        rows,
        by_row,
        plate_depth((*nodes, *latents)),
        n_rows if by_row and n_rows != len(init[0]) else None,
        float(nodes[0]["scale"]),
    )
    for node in latents:
        _check_latent(node)
    for node in (*nodes, *latents):
        _check_plates(node)
    for node in nodes:
        _check_support(node)
    check_observed(model, init, first, own_masks=own_masks)
    scales = {n["name"]: float(n["scale"]) for n in (*nodes, *latents, *factors)}
    if len(set(scales.values())) > 1:
        raise ModelError(
            f"sites have different scales {scales}: a score weighs all sites alike. Sub-sample the rows plate, or put "
            "poutine.scale around the whole program"
        )
    _refuse_unregistered(first)
    if program.sub_rows is None and not own_masks:
        tokens = _refuse_dependence_on_x(model, init, program, first)
        if len(nodes) == 1 and not sites[0].n_joint:
            whole = [i for i in tokens if nodes[0]["value"] is init[i]]
            if whole and nan_shows(model, init, whole[0], first):
                program = program._replace(observed_argument=whole[0])
    return program


def list_names(names: Iterable[str]) -> str:
    """Names in words, those in the middle of a long list left out."""
    names = list(names)
    if len(names) > MAX_NAMES:
        names[3:-1] = [f"... ({len(names) - 4} more)"]
    return ", ".join(names)


# ---------------------------------------------------------------------------------------------------- runs and sites


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
        elif self.others_at_mean and not msg["is_observed"] and not is_subsample(msg):
            msg["value"] = msg["fn"].mean
            msg["done"] = True


def takes_visible(program: Any) -> bool:
    """Whether a program or guide has an argument that tells it which tokens it sees."""
    target = program.forward if isinstance(program, torch.nn.Module) else program
    try:
        return "visible" in inspect.signature(target).parameters
    except (TypeError, ValueError):
        return False


def run(model: Model, args: tuple[Any, ...], values: dict[str, Tensor] | None = None) -> Trace:
    """The trace of one run with these latent values; the random state stays as it was where latents are drawn.

    A program that fails inside of handlers that it has entered itself leaves them to nobody.
    """
    handlers, plates = list(runtime._PYRO_STACK), list(runtime._DIM_ALLOCATOR._stack)
    try:
        with one_precision(args), _rng_untouched(active=values is None), SetLatents(values or {}):
            return poutine.trace(model).get_trace(*args)
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
    casts = _Casts(floating[0] if floating else before, tensors[0].device if tensors else None)
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
            "(exp, division)"
        ) from error
    except torch.linalg.LinAlgError as error:
        first_line = str(error).splitlines()[0]
        raise NotPositiveDefinite(
            f"the program needs a matrix {casts.where} that cannot be factorised ({first_line}). Add to the "
            "diagonal of a covariance, or keep what it is computed from nearer to sensible values by a narrower prior"
        ) from error
    except RuntimeError as error:
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

    def __init__(self, dtype: torch.dtype, device: torch.device | None):
        super().__init__()
        self.dtype, self.device = dtype, device
        self.site = ""
        """The last site that the program has reached."""
        self.parameters: list[str] = []
        """Those that it has reached."""

    @property
    def where(self) -> str:
        """How far the program came, in words."""
        return f"after site {self.site!r}" if self.site else "before its first site"

    def _pyro_sample(self, msg: Any) -> None:
        if is_subsample(msg):
            return
        self.site = msg["name"]
        if msg["is_observed"]:
            msg["value"] = torch.as_tensor(msg["value"]).to(self.dtype)
        elif msg["value"] is None and not getattr(msg["fn"], "has_enumerate_support", False):
            value = msg["fn"](*msg["args"], **msg["kwargs"])
            msg["value"] = value.to(self.dtype) if value.is_floating_point() else value

    def _pyro_param(self, msg: Any) -> None:
        name, *init = msg["args"]
        self.parameters.append(name)
        if init and not isinstance(init[0], torch.nn.Parameter):  # networks are trained in place
            first = init[0]
            msg["args"] = (name, lambda: self._cast(first() if callable(first) else first))

    def _cast(self, value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(device=self.device, dtype=self.dtype) if floating else value


def first_run(model: Model, args: tuple[Any, ...]) -> tuple[Trace, tuple[Any, ...]]:
    """The first run, which initialises parameters from x, on all rows unless the table is very large."""
    init = init_rows(args)
    try:
        return run(model, init), init
    except (RuntimeError, ValueError, IndexError) as error:
        if init is args:
            raise
        try:  # the program insists on all its rows (data held in a closure, a plate of fixed size)
            return run(model, args), args
        except Exception:
            raise error from None


@contextmanager
def _rng_untouched(active: bool) -> Iterator[None]:
    """The first run samples latents; leave the user's random state as it was."""
    if not active:
        yield
        return
    with own_random_state():
        yield


def is_subsample(node: Any) -> bool:
    return node["type"] == "sample" and type(node["fn"]).__name__ == "_Subsample"


def latent_nodes(trace: Trace) -> list[Any]:
    return [
        node
        for node in trace.nodes.values()
        if node["type"] == "sample" and not node["is_observed"] and not is_subsample(node)
    ]


def factor_nodes(trace: Trace) -> list[Any]:
    """The sites of `pyro.factor`; the log-factor of one is ``base(node["fn"]).log_factor``."""
    return [n for n in trace.nodes.values() if n["type"] == "sample" and isinstance(base(n["fn"]), dist.Unit)]


def observed_nodes(trace: Trace, *, factors_too: bool = False) -> list[Any]:
    """The observed sites; an error where there is none, or a factor, unless these may stand beside."""
    nodes = [
        n
        for n in trace.nodes.values()
        if n["type"] == "sample" and n["is_observed"] and not n["infer"].get("_deterministic")
    ]
    factors = [n["name"] for n in factor_nodes(trace)]
    if factors and not factors_too:
        raise ModelError(
            f"site {factors[0]!r} is a pyro.factor: the program is not a normalised density of its tokens"
        )
    nodes = [n for n in nodes if n["name"] not in factors and not _repeats_itself(n)]
    for node in nodes:
        got, want = tuple(node["value"].shape), tuple(node["fn"].shape())
        if got != want:
            raise ModelError(
                f"observed site {node['name']!r} has values of shape {got} under a distribution of shape {want}: write "
                "the rows plate with len(x), and .expand or .to_event where the distribution is too small"
            )
    if not nodes:
        raise ModelError(
            f"the program must have at least one observed site, got none (it reached {list(trace.nodes)[1:-1]}): write "
            'pyro.sample("x", ..., obs=x), where every run reaches it'
        )
    return nodes


def _repeats_itself(node: Any) -> bool:
    """Whether a site is a Delta at its own value, which reparametrised latents leave behind: nothing to score."""
    fn = base(node["fn"])
    return (
        isinstance(fn, dist.Delta)
        and fn.v is node["value"]
        and not bool(torch.as_tensor(fn.log_density).any())
    )


def node_of(trace: Trace, name: str) -> Any:
    """A site of a run."""
    if name not in trace.nodes:
        raise ModelError(
            f"site {name!r} was there when the program was first run, and is not now (sites: {list(trace.nodes)}): "
            "the sites of a program must not depend on chance, nor on values of latents or parameters"
        )
    return trace.nodes[name]


def not_finite(model: Model, args: tuple[Any, ...]) -> str:
    """The sites whose log-density is not finite at latents drawn from the prior, in words."""
    with pyro.validation_enabled(False):
        trace = run(model, tuple(fill(a) for a in args))
        found = {
            name: log_density(node["fn"], node["value"])
            for name, node in trace.nodes.items()
            if node["type"] == "sample" and not is_subsample(node)
        }
    bad = {n: float(t[~torch.isfinite(t)][0]) for n, t in found.items() if not bool(torch.isfinite(t).all())}
    if not bad:
        return (
            "at latents drawn from the prior every site has a finite log-density, so the cause is a parameter or an "
            "extreme value of a latent"
        )
    return "; ".join(
        f"the log-density of site {n!r} is {v} at latents drawn from the prior" for n, v in bad.items()
    )


def describe_latent(node: Any, rows_plate: str | None) -> Latent:
    shape = tuple(node["value"].shape)
    plates = tuple(f.name for f in node["cond_indep_stack"])
    frames = [f for f in node["cond_indep_stack"] if f.name == rows_plate]
    discrete = bool(getattr(node["fn"], "has_enumerate_support", False))
    n_batch = len(node["fn"].batch_shape)
    if not frames:
        return Latent(node["name"], shape, None, plates, node["value"].numel(), discrete, n_batch)
    axis = n_batch + frames[0].dim
    width = node["value"].numel() // max(1, shape[axis])
    return Latent(node["name"], shape, axis, plates, width, discrete, n_batch)


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
        raise ModelError(
            f"discrete latent {node['name']!r} is {type(base(fn)).__name__}, which has infinite support: it cannot be "
            "summed out. Use Categorical or Binomial up to a largest value"
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
            f"{float(bad.flatten()[0]):.6g}: check the column's coding, or take another distribution (at latents and "
            "parameters as first drawn; a support that moves with them needs validate_args=False)"
        )


def _observed(node: Any, rows_plate: str | None) -> Observed:
    fn = base(node["fn"])
    shape = tuple(node["value"].shape)
    try:
        discrete = bool(fn.support.is_discrete)
    except (NotImplementedError, AttributeError):
        discrete = bool(fn.has_enumerate_support)
    return Observed(
        node["name"], shape, plate_axis(node, rows_plate), fn.event_dim, type(fn).__name__, discrete
    )


def plate_axis(node: Any, plate: str | None) -> int | None:
    """The axis of a plate in the value of a site."""
    batch = len(node["fn"].batch_shape)
    axes = [batch + f.dim for f in node["cond_indep_stack"] if f.name == plate and f.vectorized]
    return axes[0] if axes else None


def rows_plate_of(nodes: list[Any], latents: list[Any], n_rows: int) -> tuple[str | None, bool]:
    """The plate of the rows, and whether all latents live inside it.

    It is a plate around every observed site; one of as many rows as ``x`` has, and around all latents, comes first.
    """
    common: list[str] = [f.name for f in nodes[0]["cond_indep_stack"] if f.vectorized]
    sizes = {f.name: f.full_size or f.size for f in nodes[0]["cond_indep_stack"]}
    for node in nodes[1:]:
        here = {f.name for f in node["cond_indep_stack"] if f.vectorized}
        common = [name for name in common if name in here]
    around = {
        name: all(any(f.name == name for f in node["cond_indep_stack"]) for node in latents)
        for name in common
    }
    # the outermost of several plates that would do
    dims = {f.name: f.dim for f in nodes[0]["cond_indep_stack"]}
    ranked = sorted(common, key=lambda name: (sizes[name] != n_rows, not around[name], dims[name]))
    if not ranked:
        return None, False
    return ranked[0], around[ranked[0]]


def plate_depth(nodes: Iterable[Any]) -> int:
    """Plate dimensions around these sites."""
    return max((-f.dim for n in nodes for f in n["cond_indep_stack"] if f.vectorized), default=0)


def base(fn: Any) -> Any:
    """The distribution under `Independent`, `expand` and masks."""
    while isinstance(fn, Independent | torch.distributions.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def n_rows_of(program: Program, args: tuple[Any, ...]) -> int:
    """Rows that a run on these arguments has."""
    if not program.by_row:
        return 1
    return program.sub_rows or len(args[0])


def rows_given_shared(program: Program, trace: Trace) -> Program | None:
    """The program of the rows alone, its other latents held: None where no latent stands in the plate, or all do."""
    rows = program.rows_plate
    own = [s for s in program.latents if rows in s.plates]
    if program.by_row or rows is None or not own or len(own) == len(program.latents):
        return None
    return program._replace(
        sites=tuple(_observed(node_of(trace, s.name), rows) for s in program.sites),
        latents=tuple(describe_latent(node_of(trace, s.name), rows) for s in own),
        by_row=True,
    )


def split_events(program: Program) -> Program:
    """The same program with the elements of a MultivariateNormal as tokens, for those who can score them one by one."""
    return program._replace(sites=tuple(s._replace(n_joint=0) for s in program.sites))


def one_vector(program: Program) -> Program:
    """The same program with all its observations as tokens of one vector."""
    sites = tuple(s._replace(row_axis=None) for s in program.sites)
    latents = tuple(
        s._replace(row_axis=None, width=s.width * (1 if s.row_axis is None else s.shape[s.row_axis]))
        for s in program.latents
    )
    return program._replace(sites=sites, latents=latents, by_row=False)


# ------------------------------------------------------------------------------------------------------ the tokens


def rows_first(value: Tensor, row_axis: int | None, n_joint: int = 0) -> Tensor:
    """A site's value (or anything of that layout) as (N, tokens of the site)."""
    if n_joint:
        value = value.flatten(value.ndim - n_joint).sum(
            -1
        )  # a token of several numbers: NaN if one of them is
    if row_axis is None:
        return value.reshape(1, -1)
    return value.movedim(row_axis, 0).reshape(value.shape[row_axis], -1)


def rows_axis(node: Any, program: Program) -> int | None:
    """Where the rows are in the log-density of a site, counted from the right; None where they are one vector."""
    if not program.by_row:
        return None
    return next(
        (f.dim for f in node["cond_indep_stack"] if f.name == program.rows_plate and f.vectorized), None
    )


def sum_by_row(log_prob: Tensor, axis: int | None, n: int) -> Tensor:
    """Log-densities of one site in a run on n nodes, summed over all axes but nodes and rows: (n, N)."""
    kept = {0} if n > 1 else set()
    if axis is not None:
        kept.add(axis % log_prob.ndim)
    away = [i for i in range(log_prob.ndim) if i not in kept]
    total = log_prob.sum(away) if away else log_prob
    return total if total.ndim == 2 else total.reshape(-1, 1) if axis is None else total[None]


def token_values(trace: Trace, program: Program) -> Tensor:
    """Values of the tokens of a run: (N, T) in floating point; a token of several numbers is their sum."""
    for site in program.sites:
        check_shape(node_of(trace, site.name), site)
    return _tokens({s.name: trace.nodes[s.name]["value"] for s in program.sites}, program)


def _tokens(values: dict[str, Tensor], program: Program) -> Tensor:
    parts = [rows_first(values[s.name], s.row_axis, s.n_joint) for s in program.sites]
    dtype = next((p.dtype for p in parts if p.is_floating_point()), torch.get_default_dtype())
    return parts[0].to(dtype) if len(parts) == 1 else torch.cat([p.to(dtype) for p in parts], 1)


def check_shape(node: Any, site: Observed) -> None:
    """A site's value must have the shape that it had when the program was first run, but for the number of rows."""
    got = tuple(node["value"].shape)
    same = [a == b or axis == site.row_axis for axis, (a, b) in enumerate(zip(got, site.shape, strict=False))]
    if len(got) != len(site.shape) or not all(same):
        raise ModelError(
            f"observed site {site.name!r} had shape {site.shape} when the program was first run and has {got} now: "
            "tokens may not change between calls, nor may rows without a rows plate around them"
        )


def read_values(
    model: Model, args: tuple[Any, ...], program: Program, trace: Trace, sites: dict[str, Tensor]
) -> Tensor:
    """Values of the tokens (N, T) of a run on filled arguments, NaN where computed from a missing cell."""
    value = token_values(trace, program)
    if not any(has_missing(a) for a in args):
        return value
    # Other values in the missing cells: the tokens that move are the missing ones, and no distribution may move.
    others = tuple(fill_otherwise(a) for a in args)
    with torch.no_grad(), pyro.validation_enabled(False):
        try:
            other = run(model, others, sites)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ModelError(
                f"the program does not run on other values in the missing cells: {error}. Drop constant columns, and "
                "make covariates complete"
            ) from error
        before, after = _own_log_probs(trace, trace, program), _own_log_probs(other, trace, program)
    for name, a, b in zip((*program.site_names, *program.latent_names), after, before, strict=True):
        if not bool((a == b).all()):
            raise MissingCovariate(
                f"missing cells reach the distribution of site {name!r}: covariates must be complete, "
                "only what is observed may be missing"
            )
    shown = values_with_gaps(model, args, program.site_names, trace, other, sites)
    with_gaps = _tokens(shown, program)
    missing = with_gaps.isnan() & ~value.isnan()
    for site in program.sites:
        if site.n_joint > 1 and bool(missing.any()):
            raise ModelError(
                f"site {site.name!r} ({site.kind}) has one density for a whole event of several axes, which a missing "
                "cell would drop with all its other cells. Write a series as a loop of Normal sites, one or two for "
                "each step: these are scored step by step, in time linear in the length"
            )
        lost = shown[site.name].isnan()
        if site.n_joint == 1 and bool((lost.any(-1) & ~lost.all(-1)).any()):
            raise ModelError(
                f"site {site.name!r} ({site.kind}) has one density for a whole event, and of some events a few cells "
                "alone are missing: the observed ones would be dropped with them. Leave these rows out, or make them "
                "missing whole; of a Gaussian process, use bayes_mpt.models.GaussianProcess, which takes missing "
                "observations"
            )
    n_cells = sum(int(a.isnan().sum()) for a in args if has_missing(a))
    if int(missing.sum()) > n_cells:
        raise ModelError(
            f"{n_cells} missing cells make {int(missing.sum())} tokens of observed site {program.observed!r} missing, "
            "since tokens are computed from several cells: observe the cells themselves, or fill them before"
        )
    return with_gaps


def values_with_gaps(
    model: Model,
    args: tuple[Any, ...],
    names: Iterable[str],
    filled: Trace,
    other: Trace,
    sites: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Values of the observed sites of a run on filled arguments, NaN where they are computed from a missing cell.

    A value is, if it moves with what is filled in (``other`` is a run with other fillings), or with NaN in place. A
    program that leaves missing cells out by a mask of its own is taken at its word; one that would hide more than
    these, or count what it fills in itself as observed, is refused.
    """
    names = tuple(names)
    try:
        with torch.no_grad(), pyro.validation_enabled(False):
            raw: Trace | None = run(model, args, sites)
    except (RuntimeError, ValueError, IndexError, TypeError):
        raw = None  # the program does not take NaN: it has no view of its own
    out = {}
    for name in names:
        value = node_of(filled, name)["value"]
        moves = node_of(other, name)["value"] != value
        if raw is not None:
            node = node_of(raw, name)
            moves = moves | (node["value"] != value)
            hidden = ~own_shown(node) & own_shown(filled.nodes[name])
            if bool((hidden & ~moves).any()):
                raise ModelError(
                    f"a mask of the program hides observed cells of site {name!r} where others are missing: take the "
                    "mask away and leave the cells NaN. Missing cells are left out by the package"
                )
            if bool((moves & ~hidden & _in_support(node)).any()):
                raise ModelError(
                    f"the program fills in missing cells of observed site {name!r} itself (nan_to_num, a comparison), "
                    "and they would be scored as observed: write obs=x and leave the cells NaN. Missing cells are "
                    "left out by the package"
                )
        out[name] = torch.where(moves, torch.nan, value)
    return out


def _in_support(node: Any) -> Tensor:
    """Where a site's value is one that its distribution can take: NaN is none, nor what NaN becomes as an integer."""
    fn, value = base(node["fn"]), node["value"]
    number = ~value.isnan()
    try:
        fine = fn.support.check(value)
    except (NotImplementedError, AttributeError, RuntimeError):
        return number
    return number & fine[(...,) + (None,) * (value.ndim - fine.ndim)]


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
        shown = shown & (mask[(...,) + (None,) * n_outer] if mask.ndim else mask)
    return shown


# ------------------------------------------------------------------------------------------------------ the checks


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
    trace = run(model, leaves, {**latents, **_sub_samples(first)})
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
        moved = run(model, args, {**held, **_sub_samples(first)})
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
        return run(model, args, {**held, **_sub_samples(first)})


def _sub_samples(trace: Trace) -> dict[str, Tensor]:
    return {name: node["value"] for name, node in trace.nodes.items() if is_subsample(node)}


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


def nan_shows(model: Model, args: tuple[Any, ...], position: int, first: Trace) -> bool:
    """Whether NaN in the argument that is observed as it stands are NaN there too, and no mask hides other cells."""
    trace, holes = run_with_holes(model, args, position, first)
    if trace is None:
        return True
    (node,) = observed_nodes(trace)
    missing = node["value"].isnan()
    if missing.numel() != holes.numel():
        return False
    holes = holes.reshape(missing.shape)
    newly = own_shown(first.nodes[node["name"]]) & ~own_shown(node)
    return torch.equal(missing, holes) and not bool((newly & ~holes).any())


def run_with_holes(
    model: Model, args: tuple[Any, ...], position: int, first: Trace
) -> tuple[Trace | None, Tensor]:
    """A run with NaN in one cell of every second row of an argument, if the program takes them; and which these are."""
    x = args[position]
    holes = torch.zeros(x.shape, dtype=torch.bool, device=x.device).reshape(len(x), -1)
    rows = torch.arange(0, len(x), 2, device=x.device)
    holes[rows, (rows // 2) % holes.shape[1]] = True
    holes = holes.reshape(x.shape)
    changed = (*args[:position], torch.where(holes, torch.nan, x), *args[position + 1 :])
    latents = {n["name"]: n["value"] for n in latent_nodes(first)}
    try:
        with torch.no_grad(), pyro.validation_enabled(False):
            return run(model, changed, {**latents, **_sub_samples(first)}), holes
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None, holes


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _refuse_unregistered(trace: Trace) -> None:
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


def _refuse_dependence_on_x(model: Model, args: tuple[Any, ...], program: Program, first: Trace) -> list[int]:
    """No token's distribution may look at the tokens: resample every column of an argument and see what moves.

    Columns are resampled, so that counts stay counts; latents keep the values of the first run. The
    positions of arguments that were found to be tokens, and to be looked at by no distribution, are returned.
    """
    free = []
    latents = {node["name"]: node["value"] for node in latent_nodes(first)}
    with torch.no_grad():
        before = _own_log_probs(first, first, program)
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
            after = _own_log_probs(trace, first, program)
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


def resampled(arg: Any) -> Any:
    """Every column of an argument resampled by itself: counts stay counts."""
    if not isinstance(arg, Tensor) or not arg.ndim:
        return arg
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(len(arg), arg.shape, generator=generator).to(arg.device)
    return torch.gather(arg, 0, index)


def shifted(arg: Any) -> Any:
    """Every cell of an argument one larger: whole numbers stay whole."""
    if not isinstance(arg, Tensor):
        return arg
    return ~arg if arg.dtype == torch.bool else arg + 1


def _own_log_probs(trace: Trace, values: Trace, program: Program) -> list[Tensor]:
    """The log-densities of one run's tokens under another's distributions."""
    with pyro.validation_enabled(False):
        tokens = [
            base(node_of(trace, s.name)["fn"]).log_prob(node_of(values, s.name)["value"])
            for s in program.sites
        ]
        latents = [
            node_of(trace, s.name)["fn"].log_prob(node_of(values, s.name)["value"]) for s in program.latents
        ]
    return tokens + latents


# -------------------------------------------------------------------------------------------------------- arguments


def fill(arg: Any, value: Tensor | None = None) -> Any:
    """NaN cells replaced, by default by `filling`, so that any program can run; they are never scored.

    The argument itself where nothing is missing.
    """
    if not has_missing(arg):
        return arg
    value = filling(arg) if value is None else value
    assert value is not None
    return torch.where(arg.isnan(), value, arg)


def filling(arg: Any) -> Tensor | None:
    """What stands for the missing cells of each column: its mean; where all are whole numbers the (lower) median.

    An observed value stays in any support. None for an argument that can have no missing cells.
    """
    if not isinstance(arg, Tensor) or not arg.is_floating_point():
        return None
    whole = ((arg == arg.round()) | arg.isnan()).all(0)
    value = torch.where(whole, arg.nanmedian(0).values, arg.nanmean(0))
    # of cells that are equal the mean need not be they, to the last digit
    low, high = arg.nan_to_num(torch.inf).amin(0), arg.nan_to_num(-torch.inf).amax(0)
    value = torch.where(low <= high, value.clamp(low, high), value)
    return value.nan_to_num(1.0)  # a column without any cell: in most supports


def fill_otherwise(arg: Any) -> Any:
    """NaN cells replaced by other values than `fill` takes: the column's least or largest, whichever is further."""
    if not has_missing(arg):
        return arg
    first = fill(arg)
    low = arg.nan_to_num(torch.inf).amin(0)
    high = arg.nan_to_num(-torch.inf).amax(0)
    value = torch.where((first - low).abs() >= (high - first).abs(), low, high)
    value = torch.where(torch.isfinite(value) & (value != first), value, first + 1)
    return torch.where(arg.isnan(), value, arg)


def has_missing(arg: Any) -> bool:
    if not isinstance(arg, Tensor) or not arg.is_floating_point():
        return False
    return bool(arg.sum().isnan()) and bool(arg.isnan().any())  # a sum costs a tenth, and rules it out


def head(args: tuple[Any, ...], n_rows: int) -> tuple[Any, ...]:
    """The first rows."""
    return rows_of(args, slice(n_rows)) if isinstance(args[0], Tensor) else args


def rows_of(args: tuple[Any, ...], index: Any) -> tuple[Any, ...]:
    """Some rows, or sets of them, of each argument that has as many as the first."""
    total = len(args[0])
    return tuple(a[index] if isinstance(a, Tensor) and a.ndim and len(a) == total else a for a in args)


def spread_rows(n_rows: int, n_wanted: int) -> Tensor:
    """Evenly spaced indices: of a sorted table the first rows are no sample."""
    return torch.linspace(0, n_rows - 1, min(n_rows, n_wanted)).round().long()


def init_rows(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Rows for the first run: all of them unless the table is very large."""
    if not args or not isinstance(args[0], Tensor) or args[0].ndim == 0:
        raise ModelError("the program must be called with a tensor of rows as its first argument")
    per_row = max(1, args[0][0].numel()) if len(args[0]) else 1
    n_rows = max(64, MAX_INIT_CELLS // per_row)
    return args if len(args[0]) <= n_rows else head(args, n_rows)
