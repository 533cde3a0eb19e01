"""What every predictor offers, and the choice among them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any, NamedTuple, Self

import torch
from sklearn.base import BaseEstimator
from torch import Generator, Tensor

from bayes_mpt.program.affine import AffineForm
from bayes_mpt.program.program import Model, ModelError, Program
from bayes_mpt.runtime.serial import methods_take_turns

__all__ = [
    "Conditionals",
    "Evidence",
    "Posterior",
    "Predictive",
    "Predictor",
    "refuse_other_rows",
    "together",
]

Guide = Callable[..., Any]


class Posterior(NamedTuple):
    """Latents and tokens of each row given what is visible of it."""

    mean: Tensor
    """(N, K) posterior means of the latents; of a discrete one the probabilities of its values."""
    tokens: Tensor
    """(N, T) means of the tokens at those latents: what `impute` fills in."""


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


def together(parts: Iterable[Evidence]) -> Evidence:
    """Of all rows, from that of one part of them after the other."""
    parts = list(parts)
    by_row = torch.cat([part.by_row for part in parts])
    se = math.hypot(*(part.se for part in parts))
    if len(parts) == 1 or "pareto_k" not in parts[0].diagnostics:
        return Evidence(by_row, se, parts[0].diagnostics)
    found = [part.diagnostics for part in parts]
    starts = [0, *accumulate(len(part.by_row) for part in parts)]
    worst = [(start + row, k) for start, d in zip(starts, found, strict=False) for row, k in d["worst_rows"]]
    diagnostics = {
        **found[0],
        "pareto_k": max((d["pareto_k"] for d in found), key=lambda k: -math.inf if math.isnan(k) else k),
        "rows_with_bad_k": sum(d["rows_with_bad_k"] for d in found),
        "worst_rows": sorted(worst, key=lambda w: -math.inf if math.isnan(w[1]) else -w[1])[:5],
        "ess_min": min(d["ess_min"] for d in found),
        **{
            key: sum(d[key] * len(p.by_row) for d, p in zip(found, parts, strict=True)) / len(by_row)
            for key in ("ess_mean", "log_weight_sd")
        },
    }
    return Evidence(by_row, se, diagnostics)


def refuse_other_rows(x: Tensor, read: Tensor) -> None:
    """Rows ``x`` must be the rows that were read, NaN where these are: (N, T) both.

    For conditionals that hold log-densities of the rows last read and would answer for those, whatever ``x`` says.
    """
    if x is read or (x.shape == read.shape and bool(((x == read) | (x.isnan() & read.isnan())).all())):
        return
    what = "other values than" if x.shape == read.shape else f"shape {tuple(x.shape)} in place of"
    raise ModelError(
        f"these conditionals answer for the rows that were last read, of shape {tuple(read.shape)}; x has {what} "
        "these: call read(args) with the rows to be scored, and pass its `value` as x"
    )


class Predictor(BaseEstimator, ABC):
    """A way to compute log p(x_i | x_visible): settings only, so that it can stand in a parameter grid."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        methods_take_turns()(cls)

    @abstractmethod
    def bind(self, model: Model, args: tuple[Any, ...], guide: Guide | None = None) -> Conditionals:
        """The conditionals of this program, found out about by running it on ``args``.

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


class Conditionals(ABC):
    """log p(x_i | x_visible) of one program for any visible set, hidden tokens scored one at a time.

    Rows ``x`` are (N, T), NaN where missing: such tokens are never visible and never scored. A mask is shared by all
    rows. Everything is in nats.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        methods_take_turns()(cls)

    structure: AffineForm | Program
    model: Model | None
    """The program; None in a frozen predictor."""
    exact: bool = False
    """Whether the conditionals have no error."""
    guide: Guide | None = None
    """Trained with the program, where latents are drawn from it."""
    name: str = ""
    """Of the way, in words."""
    sampled: bool = False
    """Whether reading draws random nodes."""
    one_by_one: bool = False
    """Whether nodes are run one by one, because the program does not take several at once: slow."""
    climbs: bool = False
    """Whether there is an `objective` without random nodes."""
    trainable: bool = True
    """Whether scores have gradients."""
    own_masks: bool = False
    """Whether masks may be each row's own, (S, N, T): then trained on one mask a row, and scored by `weighed`."""
    independent: bool = False
    """Whether hidden tokens are independent of each other given the visible ones (`bayes_mpt.masks.Blocks`)."""
    telescopes: bool = True
    """Whether a chain of conditionals adds up to `joint`, whatever its order."""
    relocates: bool = False
    """Whether every visible set costs a run of the program (`revealed`)."""
    remembers: bool = False
    """Whether new observations are predicted from those of the training rows (`predictive`)."""
    divisible: bool = False
    """Whether `joint` is a sum over tokens that can be estimated from some of them (`sample`, `partial`)."""
    why: str = ""
    """What was found that allows this way, for `BayesMPT.explain`."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of what a training moves: the program's parameters, and those of a guide."""
        return self.structure.parameters

    @property
    @abstractmethod
    def value(self) -> Tensor:
        """(N, T) tokens of the run last read; NaN where missing."""

    @property
    @abstractmethod
    def scale(self) -> float:
        """Plate or `poutine.scale` factor of the run last read."""

    @abstractmethod
    def read(self, args: tuple[Any, ...]) -> Self:
        """Take the program's current parameters, with gradients. Opens no parameter store, caches no tensors."""

    def dream(self, args: tuple[Any, ...], generator: Generator) -> Tensor | None:
        """What a guide makes of latents whose rows were simulated (N,), to train it on; None if not asked for."""
        return None

    def in_training(self) -> tuple[Self, ...]:
        """What a training goes through: cheap steps first, the last with as much effort as a step deserves."""
        return (self,)

    @abstractmethod
    def freeze(self) -> Self:
        """Without the program: pickles. Plain tensors where rows share a map; others are to be bound and read anew."""

    @abstractmethod
    def conditionals(self, x: Tensor, visible: Tensor) -> Tensor:
        """Score each hidden token alone: (N, T), (S, T) bool -> (S, N, T) nats, 0 where visible or missing."""

    @abstractmethod
    def chain(self, x: Tensor, order: Tensor) -> Tensor:
        """Score token order[c, t] given order[c, :t]: (N, T), (C, T) long -> (C, N, T) nats, by token."""

    def revealed(self, x: Tensor, order: Tensor, sizes: list[int]) -> Tensor:
        """Log-density of the first tokens of an order (T,), for each of some numbers of them: (len(sizes), N) nats."""
        raise NotImplementedError(f"{self.name} gives all steps of a chain at once")

    @abstractmethod
    def joint(self, x: Tensor) -> Tensor:
        """Log-density of the observed tokens of each row, the sum of any chain: (N, T) -> (N,) nats."""

    def weighed(self, x: Tensor, visible: Tensor, weight: Tensor) -> Tensor:
        """Weighted sum (N,) of `conditionals` over masks and tokens; both (S, T), or (S, N, T)."""
        raise NotImplementedError(f"{self.name} supports only masks that all rows share")

    def joint_at(self, args: tuple[Any, ...], values: dict[str, Tensor]) -> Tensor:
        """Log-density (B,) of a program's observations at B values (B, ...) of each parameter, side by side."""
        raise NotImplementedError(f"{self.name} reads a program at one value of its parameters at a time")

    def objective(self, args: tuple[Any, ...]) -> Tensor:
        """A smooth approximation of `joint` (N,) at the program's current parameters, where that is random."""
        raise NotImplementedError(f"{self.name} trains on its own score")

    def sample(self, n_tokens: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Random tokens (B,) and weights (B,) with which their terms add up to `joint` in expectation."""
        raise NotImplementedError(f"{self.name} cannot estimate its score from a sample of tokens")

    def partial(self, x: Tensor, tokens: Tensor, weight: Tensor) -> Tensor:
        """A weighted sum of the terms of these tokens: (N, T), (B,), (B,) -> (N,) nats."""
        raise NotImplementedError(f"{self.name} cannot estimate its score from a sample of tokens")

    def predicted(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of tokens of one Gaussian vector, each given those before it: (1, T), (B,) -> (B,)."""
        raise NotImplementedError(f"{self.name} does not predict tokens by a Gaussian")

    def settle(self) -> bool:
        """Find out anew, at the current parameters, which tokens are near; whether that has changed."""
        return False

    def forget(self) -> None:
        """Leave what earlier readings have found to make the next one shorter: that gives what a first one would."""
        return

    def shared_latents(self, x: Tensor) -> list[tuple[float, dict[str, Tensor]]]:
        """Where rows are one vector: weighted posterior values of the latents given x, for predictions of new rows."""
        return []

    def predictive(self, seen: tuple[Any, ...], new: tuple[Any, ...], *, full: bool = False) -> Predictive:
        """Observations of new rows given those of the rows seen, both as the program's arguments."""
        raise NotImplementedError(f"{self.name} does not predict rows from other rows")

    def draw(self, x: Tensor, n_draws: int) -> Tensor:
        """Rows with their missing tokens drawn together given the observed ones: (N, T) -> (D, N, T)."""
        raise NotImplementedError(f"{self.name} has no draws of missing tokens")

    def evidence(self, x: Tensor) -> Evidence:
        """`joint` with its error, as good as this way can make it."""
        return Evidence(self.joint(x), 0.0, {})

    def label_probabilities(self, x: Tensor) -> Tensor:
        """Of the values of each row's discrete latents given its observed tokens, site after site: (N, L)."""
        raise NotImplementedError(f"{self.name} has no discrete latents")

    @abstractmethod
    def posterior(self, x: Tensor, visible: Tensor | None = None) -> Posterior:
        """Latents given the visible (T,) and observed tokens of each row: all observed ones by default."""
