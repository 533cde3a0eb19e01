"""L-BFGS that ends where EM creeps, in units in which the curvature of EM's own bound is about one.

There its first step is about that of EM, and the slope of the bound is that of the score itself (Jamshidian & Jennrich
1997).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

__all__ = ["QuasiNewton", "flat"]

MEMORY = 30  # steps that L-BFGS remembers

Place = TypeVar("Place")


def flat(tol: float, score: float) -> float:
    """The slope below which a step of one in an unknown of curvature one gains no more than ``tol`` of a mean score."""
    return math.sqrt(2 * tol * max(1.0, abs(score)))


class QuasiNewton(Generic[Place]):
    """One climb from a place, by steps phi (P,) that begin at zero.

    Parameters
    ----------
    start : object
        Where it begins.
    place : callable
        Where steps phi lead.
    measure : callable
        Of a place the mean score, its slope (P,) along phi, and whether it is flat there.
    least : Tensor of shape (P,), optional
        Bounds of phi from below.
    """

    def __init__(
        self,
        start: Place,
        place: Callable[[Tensor], Place],
        measure: Callable[[Place], tuple[float, Tensor, bool]],
        least: Tensor | None = None,
    ):
        self._place, self._measure, self._least = place, measure, least
        self._best, self._score, self._flat = start, -math.inf, False

    def run(self, n_steps: int, like: Tensor, max_iter: int) -> Place:
        """The best place after so many steps at most; ``n_steps`` is P, and ``like`` a tensor as phi is to be.

        Raises
        ------
        KeyboardInterrupt
            At Ctrl-C; its argument is the best place so far.
        """
        bounds = None
        if self._least is not None:
            bounds = [(low, None) for low in self._least.tolist()]
        options = {"maxiter": max_iter, "maxfun": 2 * max_iter, "maxcor": MEMORY, "ftol": 0.0, "gtol": 0.0}
        try:
            minimize(
                lambda phi: self._loss(torch.as_tensor(phi).to(like)),
                np.zeros(n_steps),
                jac=True,
                method="L-BFGS-B",
                bounds=bounds,
                callback=self._stop,
                options=options,
            )
        except KeyboardInterrupt as press:
            raise KeyboardInterrupt(self._best) from press
        return self._best

    def _loss(self, phi: Tensor) -> tuple[float, NDArray[np.float64]]:
        """Minus the mean score, and its slope; keeps the best."""
        at = self._place(phi)
        score, slope, is_flat = self._measure(at)
        if not math.isfinite(score):
            return 1e30, np.zeros(len(phi))
        if score > self._score:
            self._best, self._score, self._flat = at, score, is_flat
        return -score, -slope.cpu().numpy()

    def _stop(self, intermediate_result: Any) -> None:
        """After each step."""
        if self._flat:
            raise StopIteration
