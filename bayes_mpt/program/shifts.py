"""Observed values that are cells of an argument less something that moves, as in pyro.sample("r", fn, obs=x - f(z)).

    v(x, z) = c x + d(z),    p(x | z) = |dv/dx| p_v(v(x, z)) = |c| p_v(c x + d(z))

The tokens are |c| x: data, whatever the latents and parameters are. What moves is put into the distribution, so that
all ways of scoring see a program that observes its data: of Normal(m, s) it is Normal(m - d(z), s). The program is
wrapped for that (`ObservesCells`); which cells its values are is found once (`bayes_mpt.program.shift_trials`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch import Independent
from pyro.distributions.torch_distribution import ExpandedDistribution, TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from bayes_mpt.program.densities import log_density
from bayes_mpt.program.layout import from_rows
from bayes_mpt.program.offers import Around
from bayes_mpt.program.program import Model, Shift, ValuesMove
from bayes_mpt.program.run import signature_of, takes_visible
from bayes_mpt.program.shift_trials import find_shifts
from bayes_mpt.program.sites import is_subsample

__all__ = ["ObservesCells", "Shifted", "observing_cells", "of_cells", "shifted", "shifts_of"]

_Answer = TypeVar("_Answer")


class ObservesCells(Around):
    """A program that observes shifted cells, as one that observes the cells themselves.

    Parameters
    ----------
    model : callable
        A Pyro program.
    shifts : tuple of Shift
        Of its observed sites that move.

    Examples
    --------
    >>> import pyro
    >>> def residuals(x):
    ...     mean = pyro.sample("mean", dist.Normal(3.0, 1.0))
    ...     with pyro.plate("rows", len(x)):
    ...         pyro.sample("r", dist.Normal(0.0, 1.0), obs=x[:, 0] - mean)
    >>> cells = ObservesCells(residuals, (Shift("r", 0, (0,), (2,), 0, "rows", 2),))
    >>> trace = poutine.trace(poutine.condition(cells, {"mean": torch.tensor(3.0)})).get_trace(
    ...     torch.ones(2, 1)
    ... )
    >>> trace.nodes["r"]["value"], trace.nodes["r"]["fn"].loc
    (tensor([1., 1.]), tensor([3., 3.]))
    """

    def __init__(self, model: Model, shifts: tuple[Shift, ...]):
        self.model, self.shifts = model, shifts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program."""
        with _Cells(self.shifts, args):
            return self.model(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return signature_of(self.model)


def shifts_of(model: Model) -> tuple[Shift, ...]:
    """Those of a program that is wrapped to observe cells; none of any other."""
    return model.shifts if isinstance(model, ObservesCells) else ()


def of_cells(model: Model, shifts: tuple[Shift, ...]) -> Model:
    """A program as one that observes cells: itself where it does."""
    return ObservesCells(model, shifts) if shifts and not shifts_of(model) else model


def observing_cells(ask: Callable[[Model], _Answer], model: Model, args: tuple[Any, ...]) -> _Answer:
    """What is asked of a program, as one that observes cells where latents or parameters shift what it observes.

    Parameters
    ----------
    ask : callable
        Of the program. It raises `ValuesMove` where observed values move.
    model : callable
        A Pyro program.
    args : tuple
        What it is called with.

    Raises
    ------
    ModelError
        If they move otherwise than by a shift. The site is named.
    """
    try:
        return ask(model)
    except ValuesMove:
        if takes_visible(model) or shifts_of(model):
            raise
        shifts = find_shifts(model, args)
        if not shifts:
            raise
    return ask(ObservesCells(model, shifts))


class _Cells(poutine.messenger.Messenger):
    """Observe cells, and shift the distributions by what stood between them and what was observed."""

    def __init__(self, shifts: tuple[Shift, ...], args: tuple[Any, ...]):
        super().__init__()
        self.shifts, self.args = {shift.site: shift for shift in shifts}, args
        self.rows: dict[str, Tensor] = {}
        """Those that a plate has drawn, by the plate."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_subsample(msg):
            self.rows[msg["name"]] = msg["value"]

    def _pyro_sample(self, msg: Any) -> None:
        shift = self.shifts.get(msg["name"])
        if shift is None or not msg["is_observed"]:
            return
        frame = next((f for f in msg["cond_indep_stack"] if f.name == shift.plate), None)
        drawn = frame is not None and frame.full_size is not None and frame.size < frame.full_size
        tokens = _cells_of(shift, self.args, self.rows[frame.name] if frame is not None and drawn else None)
        sign = 1 if shift.factor > 0 else -1
        by = torch.as_tensor(msg["value"]) - sign * tokens
        # of a missing cell: nothing is scored there, and NaN would reach the distribution of the others
        by = torch.where(tokens.isnan(), torch.zeros_like(by), by)
        msg["fn"], msg["value"] = shifted(msg["fn"], by, sign), tokens


def _cells_of(shift: Shift, args: tuple[Any, ...], rows: Tensor | None) -> Tensor:
    """The tokens of a site, in the layout of its value: |c| x."""
    arg = args[shift.position]
    if shift.row_axis is None:
        value = arg.flatten()[torch.tensor(shift.cells, device=arg.device)].reshape(shift.shape)
    else:
        if rows is not None:
            arg = arg[rows.to(arg.device)]
        n_lead = arg.ndim - shift.n_axes  # copies of the program side by side
        part = arg.reshape(*arg.shape[: n_lead + 1], -1)
        same = shift.row_axis == 0 and shift.shape[1:] == tuple(arg.shape[n_lead + 1 :])
        if same and shift.cells == tuple(range(part.shape[-1])):
            value = arg
        else:
            part = part[..., torch.tensor(shift.cells, device=arg.device)]
            value = from_rows(part, shift.shape, shift.row_axis)
    return value if abs(shift.factor) == 1 else abs(shift.factor) * value


# ---------------------------------------------------------------------------------------------------- distributions


def shifted(fn: Any, by: Tensor, sign: int = 1) -> Any:
    """The distribution of x where sign x + by has the distribution ``fn``.

    Parameters
    ----------
    fn : Distribution
    by : Tensor
        In the layout of a value of ``fn``, with or without leading batch dimensions.
    sign : 1 or -1

    Examples
    --------
    >>> shifted(dist.Normal(0.0, 1.0), torch.tensor([2.0]))
    Normal(loc: tensor([-2.]), scale: tensor([1.]))
    >>> shifted(dist.Gamma(2.0, 1.0), torch.tensor(-3.0)).log_prob(
    ...     torch.tensor(4.0)
    ... )  # of 1 under the Gamma: -1
    tensor(-1.)
    """
    if isinstance(fn, Independent):
        return shifted(fn.base_dist, by, sign).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution):
        return shifted(fn.base_dist, by, sign).mask(fn._mask)
    batch = torch.broadcast_shapes(fn.batch_shape, by.shape[: by.ndim - fn.event_dim])
    if isinstance(fn, ExpandedDistribution):
        return shifted(fn.base_dist, by, sign).expand(batch)
    if isinstance(fn, torch.distributions.MultivariateNormal) and type(fn) is not dist.MultivariateNormal:
        fn = dist.MultivariateNormal(fn.loc, fn.covariance_matrix, validate_args=False)  # of gpytorch, say
    if isinstance(fn, torch.distributions.Normal | torch.distributions.MultivariateNormal):
        out = fn.expand(batch)
        out.loc = sign * (out.loc - by)
        return out
    return Shifted(fn, by, sign)


class Shifted(TorchDistribution):
    """The distribution of x where sign x + by has the distribution ``law``.

    Parameters
    ----------
    law : Distribution
    by : Tensor
        It broadcasts with a value of ``law``.
    sign : 1 or -1
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 -- as torch has it

    def __init__(self, law: Any, by: Tensor, sign: int = 1):
        batch = torch.broadcast_shapes(law.batch_shape, by.shape[: by.ndim - law.event_dim])
        self.law, self.sign = law.expand(batch), sign
        self.by = by.expand(batch + law.event_shape)
        super().__init__(batch, law.event_shape, validate_args=False)
        self._validate_args = law._validate_args

    @property
    def kind(self) -> str:
        """Name of the distribution that is shifted."""
        return type(self.law).__name__

    @property
    def has_rsample(self) -> bool:
        """As of the distribution that is shifted."""
        return bool(self.law.has_rsample)

    @property
    def support(self) -> Any:
        """Where sign x + by is in the support of the other."""
        inner = self.law.support
        real = inner
        while hasattr(real, "base_constraint"):
            real = real.base_constraint
        return inner if real is constraints.real else _ShiftedSupport(inner, self.by, self.sign)

    @property
    def mean(self) -> Tensor:
        """sign (E[v] - by)."""
        return self.sign * (self.law.mean - self.by)

    @property
    def variance(self) -> Tensor:
        """That of the other."""
        return self.law.variance

    def expand(self, batch_shape: Any, _instance: Any = None) -> Shifted:
        """The same over more leading batch dimensions."""
        batch_shape = torch.Size(batch_shape)
        return Shifted(
            self.law.expand(batch_shape), self.by.expand(batch_shape + self.event_shape), self.sign
        )

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws with gradients."""
        return self.sign * (self.law.rsample(torch.Size(sample_shape)) - self.by)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws."""
        with torch.no_grad():
            return self.sign * (self.law.sample(torch.Size(sample_shape)) - self.by)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p_v(sign value + by)."""
        return log_density(self.law, self.sign * value + self.by)


class _ShiftedSupport(constraints.Constraint):
    """Values that are in another set once they are shifted."""

    def __init__(self, inner: Any, by: Tensor, sign: int):
        self.inner, self.by, self.sign = inner, by, sign
        self.is_discrete, self.event_dim = inner.is_discrete, inner.event_dim
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Where they are."""
        return self.inner.check(self.sign * value + self.by)
