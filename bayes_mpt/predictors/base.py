"""The predictor protocol, and the choice of a predictor for a program."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor

from bayes_mpt.tracing import Model, Structure

__all__ = ["Posterior", "Predictor", "choose"]


class Posterior(NamedTuple):
    """The latents given the visible tokens of each row, and what they say of all tokens."""

    mean: Tensor
    """(N, K) latent means."""
    tokens: Tensor
    """(N, T) means of all tokens."""


class Predictor(ABC):
    """log p(x_i | x_visible) of a program. Knows nothing of mask policies.

    Rows ``x`` are (N, T) tensors; NaN cells are missing: never visible, never scored.
    """

    exact: bool
    """Whether the conditionals are those of one joint density, without error, so that every chain sums to it."""
    structure: Structure
    model: Model | None
    """The program; None once frozen."""

    @property
    @abstractmethod
    def value(self) -> Tensor:
        """(N, T), the observed tokens of the run last read; NaN where missing."""

    @property
    @abstractmethod
    def scale(self) -> float:
        """Plate or `poutine.scale` factor of the run last read."""

    @abstractmethod
    def read(self, args: tuple[Any, ...]) -> Predictor:
        """Take the program's current parameters, with gradients. Opens no parameter store, caches no tensors."""

    @abstractmethod
    def freeze(self) -> Predictor:
        """The same as plain tensors: pickles, and needs neither the program nor a parameter store."""

    @abstractmethod
    def conditionals(self, x: Tensor, visible: Tensor) -> Tensor:
        """Score each hidden token alone: (N, T), (S, T) bool -> (S, N, T) nats, 0 where visible or missing."""

    @abstractmethod
    def chain(self, x: Tensor, order: Tensor) -> Tensor:
        """Score token order[c, t] given order[c, :t]: (N, T), (C, T) long -> (C, N, T) nats, by token."""

    @abstractmethod
    def joint(self, x: Tensor) -> Tensor:
        """Log-density of the observed tokens of each row, the sum of any chain: (N, T) -> (N,) nats."""

    @abstractmethod
    def posterior(self, x: Tensor, visible: Tensor | None = None) -> Posterior:
        """Latents given the visible (T,) and observed tokens of each row: all observed ones by default."""


def choose(model: Model, args: tuple[Any, ...]) -> Predictor:
    """The predictor that fits a program: at present `Exact`, or an error that says why it does not fit.

    Parameters
    ----------
    model : callable
        A Pyro program.
    args : tuple
        What it is called with.

    Raises
    ------
    bayes_mpt.tracing.ModelError
        If the program is not linear-Gaussian given its parameters.
    """
    from bayes_mpt.predictors.exact import Exact  # the implementations import this file

    return Exact(model, args)
