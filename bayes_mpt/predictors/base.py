"""What every predictor offers: settings, a program bound to them, and the conditionals of the rows it has read."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import wraps
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro
import torch
from sklearn.base import BaseEstimator
from torch import Tensor

from bayes_mpt.diagnostics import disagreement, replicate_error
from bayes_mpt.masks import Masks, Policy
from bayes_mpt.predictors.objective import Batch, Objective
from bayes_mpt.predictors.own_order import in_own_order, own_order
from bayes_mpt.program.affine import DenseMap
from bayes_mpt.program.program import Model, ModelError, Program
from bayes_mpt.program.shifts import observing_cells
from bayes_mpt.runtime.serial import methods_take_turns

if TYPE_CHECKING:
    from bayes_mpt.predictors.gaussian.process import GaussianVectors

__all__ = [
    "Bound",
    "Conditionals",
    "Evidence",
    "Frozen",
    "Leaves",
    "Posterior",
    "Predictive",
    "Predictor",
    "along_orders",
    "together",
]

Guide = Callable[..., Any]

CHUNK = 2**22  # cells of (S, N, T) scored at once


@methods_take_turns()
@dataclass(frozen=True)
class Posterior:
    """Latents and tokens of each row given what is visible of it: tensors, or functions that find them when asked."""

    of_mean: Tensor | Callable[[], Tensor]
    of_tokens: Tensor | Callable[[], Tensor]
    of_labels: Callable[[], Tensor] | None = field(default=None, repr=False)
    of_draws: Callable[[int], Tensor] | None = field(default=None, repr=False)
    of_shared: Callable[[], list[tuple[float, dict[str, Tensor]]]] | None = field(default=None, repr=False)

    @property
    def mean(self) -> Tensor:
        """(N, K) posterior means of the latents; of a discrete one the probabilities of its values."""
        return self.of_mean if isinstance(self.of_mean, Tensor) else self.of_mean()

    @property
    def tokens(self) -> Tensor:
        """(N, T) means of the tokens at those latents: what `impute` fills in."""
        return self.of_tokens if isinstance(self.of_tokens, Tensor) else self.of_tokens()

    def labels(self) -> Tensor:
        """Probabilities of the values of each row's discrete latents, site after site: (N, L)."""
        if self.of_labels is None:
            raise NotImplementedError("there are no discrete latents")
        return self.of_labels()

    def draws(self, n: int) -> Tensor:
        """Rows with their missing tokens drawn together: (n, N, T)."""
        if self.of_draws is None:
            raise NotImplementedError("this way of scoring has no draws of missing tokens")
        return self.of_draws(n)

    def shared(self) -> list[tuple[float, dict[str, Tensor]]]:
        """Where rows are one vector: weighted values of the latents, for predictions of new rows."""
        return [] if self.of_shared is None else self.of_shared()


class Predictive(NamedTuple):
    """Gaussian prediction of new observations given those of the training rows."""

    mean: Tensor
    """(M,)"""
    var: Tensor
    """(M,) of each observation, its noise included."""
    cov: Tensor | None
    """(M, M), where it was asked for."""


class Evidence(NamedTuple):
    """Log marginal likelihood of rows with the error of the conditionals."""

    by_row: Tensor
    """(N,) nats."""
    se: float
    """Standard error of their sum; for quadrature the change on refining the nodes. 0 where exact."""
    diagnostics: dict[str, Any]
    steps: Tensor | None = None
    """(C, N, T) of the chains, where they do not add up to the same."""
    exact: bool = False
    """Whether there is no error."""
    drawn: bool = False
    """Whether its nodes are random, so that another seed gives another number."""


def together(parts: Iterable[Evidence]) -> Evidence:
    """Of all rows, from that of one part of them after the other."""
    parts = list(parts)
    by_row = torch.cat([part.by_row for part in parts])
    se, drawn = math.hypot(*(part.se for part in parts)), parts[0].drawn
    if len(parts) == 1 or "pareto_k" not in parts[0].diagnostics:
        return Evidence(by_row, se, parts[0].diagnostics, exact=parts[0].exact, drawn=drawn)
    found = [part.diagnostics for part in parts]
    starts = [0, *accumulate(len(part.by_row) for part in parts)]
    worst = [(start + row, k) for start, d in zip(starts, found, strict=False) for row, k in d["worst_rows"]]
    diagnostics = {
        **found[0],
        "pareto_k": max((d["pareto_k"] for d in found), key=lambda k: -math.inf if math.isnan(k) else k),
        "rows_with_bad_k": sum(d["rows_with_bad_k"] for d in found),
        "worst_rows": sorted(worst, key=lambda w: -math.inf if math.isnan(w[1]) else -w[1])[:5],
        "ess_min": min(d["ess_min"] for d in found),
        "missed": next((d["missed"] for d in found if d.get("missed")), ""),
        **{
            key: sum(d[key] * len(p.by_row) for d, p in zip(found, parts, strict=True)) / len(by_row)
            for key in ("ess_mean", "log_weight_sd")
        },
    }
    return Evidence(by_row, se, diagnostics, drawn=drawn)


def along_orders(steps: Tensor) -> Evidence:
    """The mean of log-densities along C chains (C, N, T) that differ, and how far they disagree."""
    by_order = steps.sum(-1)
    found = disagreement(by_order)
    return Evidence(by_order.mean(0), replicate_error(found["totals"]), found, steps)


class Leaves:
    """The parameters in Pyro's store when a program was read; asked later, it must still hold these very ones.

    Where it does not, the program would start again from its initial values, and quietly answer for these.
    """

    def __init__(self, names: tuple[str, ...]):
        store = dict(pyro.get_param_store().named_parameters())
        self._kept = {name: store[name] for name in names if name in store}

    def refuse_others(self) -> None:
        """Raise where the store no longer holds them."""
        store = dict(pyro.get_param_store().named_parameters())
        lost = [name for name, leaf in self._kept.items() if store.get(name) is not leaf]
        if lost:
            raise ModelError(
                f"the parameter store no longer holds {lost[0]!r} as it was when the program was read, so that its "
                "values then are gone: ask inside the store in which read(args) was called, or call it again"
            )


def _of_cells(bind: Callable[..., Bound]) -> Callable[..., Bound]:
    """`Predictor.bind` of any program that observes cells, shifted or not."""

    @wraps(bind)
    def binding(self: Any, model: Model, args: tuple[Any, ...], guide: Guide | None = None) -> Bound:
        return observing_cells(lambda program: bind(self, program, args, guide), model, args)

    return binding


class Predictor(BaseEstimator, ABC):
    """A way to compute log p(x_i | x_visible): settings only, so that it can stand in a parameter grid."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "bind" in vars(cls):
            cls.bind = _of_cells(cls.bind)  # type: ignore[method-assign]
        methods_take_turns()(cls)

    @abstractmethod
    def bind(self, model: Model, args: tuple[Any, ...], guide: Guide | None = None) -> Bound:
        """The program scored in this way, found out about by running it on ``args``.

        Parameters
        ----------
        model : callable
            A Pyro program.
        args : tuple
            What it is called with; tensors have N rows, NaN where missing.
        guide : callable, optional
            Where latents are sampled.

        Raises
        ------
        bayes_mpt.program.program.ModelError
            If the program cannot be scored in this way; the message names the site.
        """


class Bound(ABC):
    """One program scored one way. Holds no values of parameters: `read` takes those of the moment, and the rows."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        methods_take_turns()(cls)

    structure: Program
    model: Model | None = None
    """The program; None where it is left out (`Frozen`)."""
    guide: Guide | None = None
    """Trained with the program, where latents are drawn from it."""
    name: str = ""
    """Of the way, in words."""
    why: str = ""
    """What was found that allows this way, for `BayesMPT.explain`."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of what a training moves: the program's parameters, and those of a guide."""
        return self.structure.parameters

    @abstractmethod
    def read(self, args: tuple[Any, ...]) -> Conditionals:
        """The conditionals of these rows at the program's current parameters, with gradients."""

    def read_at(self, args: tuple[Any, ...], values: dict[str, Tensor]) -> GaussianVectors:
        """What `read` gives, at B values (B, ...) of each parameter side by side."""
        raise NotImplementedError(f"{self.name} reads a program at one value of its parameters at a time")

    def schedule(self, whole: Batch, masks: Policy | None, seed: int = 0) -> list[Objective]:
        """What a training on these rows maximises, one after the other: from cheap to all that it deserves.

        Parameters
        ----------
        whole : Batch
            The rows.
        masks : Policy or None
            What is hidden; None for what fits the way: the log-density, or of a network its own masks.
        seed : int
            Of what is picked at random.
        """
        return [Objective(self, whole, masks)]


@methods_take_turns()
class Conditionals(ABC):
    """log p(x_i | x_visible) of the rows that were read, for any visible set, hidden tokens scored one at a time.

    Immutable. Cells that are NaN are never visible and never scored. A mask is shared by all rows. All is in nats.
    Where tokens look at each other (`Program.order`), the chain in this order is all that is answered.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        methods_take_turns()(in_own_order(cls))

    structure: Program
    value: Tensor
    """(N, T) tokens; NaN where missing."""
    scale: float = 1.0
    """Plate or `poutine.scale` factor of the run."""

    @abstractmethod
    def conditionals(self, visible: Tensor) -> Tensor:
        """Score each hidden token alone: (S, T) bool -> (S, N, T) nats, 0 where visible or missing."""

    @abstractmethod
    def posterior(self, visible: Tensor | None = None) -> Posterior:
        """Latents given the visible (T,) and observed tokens of each row: all observed ones by default."""

    def chain(self, order: Tensor, stops: list[int] | None = None) -> Tensor:
        """Score token order[c, t] given order[c, :t]: (C, T) long -> (C, N, T) nats, by token.

        Between ``stops``, ascending numbers of tokens from 0 to T, a way that pays a run for every step may give each
        token the mean of its stretch.
        """
        place = order.argsort(1)
        out = []
        for t, tokens in zip(place, order, strict=True):
            found = self.conditionals(t < torch.arange(order.shape[1], device=t.device)[:, None])  # (T, N, T)
            steps = found[torch.arange(len(tokens)), :, tokens].mT  # (N, T) in turn
            out.append(torch.empty_like(steps).index_copy(1, tokens, steps))
        return torch.stack(out)

    def score(self, masks: Masks | None = None) -> Tensor:
        """Weighted sum of the conditionals over masks and tokens, (N,); without masks the log-density of each row."""
        if masks is None or (self.structure.order is not None and masks.order is not None):
            return self._joint()  # of chains there is one, in the program's own order
        weight = masks.weight.to(self.value)
        if masks.order is not None:
            return self._along(masks.order.to(self.value.device), weight)
        assert masks.visible is not None
        return self._over(masks.visible.to(self.value.device), weight)

    def evidence(self, orders: Tensor | None = None) -> Evidence:
        """The score with its error, as good as this way can make it.

        Where chains along different ``orders`` (C, T) do not add up to the same, along these.
        """
        return Evidence(self._joint(), 0.0, {}, exact=True)

    def predict(self, new: tuple[Any, ...], *, full: bool = False) -> Predictive:
        """Observations of new rows given those of the rows read, as the program's arguments."""
        raise ModelError(
            "this program does not predict rows from other rows: only observations that are one Gaussian vector do"
        )

    def at(self, tokens: Tensor) -> Conditionals:
        """The conditionals of other rows (N, T), where rows share what was read."""
        raise ModelError(
            "what was read of this program belongs to the rows that were read: call read(args) with the others"
        )

    def detached(self) -> Conditionals | None:
        """What serves for other rows, as plain tensors that pickle; None where nothing does."""
        return None

    def linear_map(self) -> DenseMap | None:
        """Linear-Gaussian maps: one for all rows, one for each, or those of a mixture; None where there are none."""
        return None

    # ------------------------------------------------------------------------- what a way may know better

    def _joint(self) -> Tensor:
        """Log-density of the observed tokens of each row (N,)."""
        return self.chain(own_order(self))[0].sum(-1)

    def _along(self, order: Tensor, weight: Tensor) -> Tensor:
        """The weighted sum (N,) along chains (C, T): whatever the order, they add up to the log-density."""
        return self._joint()

    def _over(self, visible: Tensor, weight: Tensor) -> Tensor:
        """The weighted sum (N,) over masks; both (S, T)."""
        if visible.ndim != 2:
            raise ModelError("masks of each row's own need a program that is conditioned on the mask")
        total = self.value.new_zeros(len(self.value))
        step = max(1, CHUNK // max(1, self.value.numel()))
        for i in range(0, len(visible), step):
            found = self.conditionals(visible[i : i + step])
            total = total + torch.einsum("snt,st->n", found, weight[i : i + step])
        return total


class Frozen(Bound):
    """What was found out about a program, without the program: pickles. Rows that share a map can still be read."""

    def __init__(self, bound: Bound, read: Conditionals | None = None):
        self.structure, self._parameters = bound.structure, bound.parameters
        self.shared = None if read is None else read.detached()
        self.name, self.why = bound.name, bound.why

    @property
    def parameters(self) -> tuple[str, ...]:
        return self._parameters

    def read(self, args: tuple[Any, ...]) -> Conditionals:
        if self.shared is None or not self.structure.scores_input:
            raise RuntimeError(
                "this predictor is frozen: it has no program to read. Use it through the estimator that was fitted"
            )
        return self.shared.at(args[0])
