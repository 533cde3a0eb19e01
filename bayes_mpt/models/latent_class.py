"""Latent class analysis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np
import pyro
import pyro.distributions as dist
from numpy.typing import NDArray
from pyro.distributions import constraints
from torch import Tensor

from bayes_mpt.models.checks import (
    CheckedModel,
    IntegersFrom,
    OneOf,
    check_codes,
    check_memory,
    skipped_levels,
)
from bayes_mpt.models.latent_class_em import MIN_PROB, Classes, climb, codes_of, short_runs

__all__ = ["LatentClass"]


class LatentClass(CheckedModel):
    """Latent class analysis: tokens are codes 0, ..., L - 1, independent given the class of the row.

    Sites "class" (N,) and "x" (N, T), codes held as floats; parameters "weights" (C,) and "probs" (C, T, L).
    The classes start at the end of the best of 8 short runs of EM, each from the frequencies of the levels in a few
    rows a class, drawn at random. `maximize` goes on from there. A level that no row of a class has keeps a probability
    of 1e-10 in it.

    Parameters
    ----------
    n_classes : int, default=2
        C >= 1.
    n_levels : int or "auto", default="auto"
        L >= 1, the same for all tokens. "auto" is the largest code of the first run plus one.

    Examples
    --------
    >>> import torch
    >>> pyro.clear_param_store()
    >>> x = torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    >>> trace = pyro.poutine.trace(LatentClass(2)).get_trace(x)
    >>> trace.nodes["class"]["value"].shape, trace.nodes["probs"]["value"].shape
    (torch.Size([3]), torch.Size([2, 3, 3]))
    """

    maximizes_missing: ClassVar[bool] = True
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "n_classes": [IntegersFrom(1)],
        "n_levels": [IntegersFrom(1), OneOf("auto")],
    }

    def __init__(self, n_classes: int = 2, n_levels: int | Literal["auto"] = "auto"):
        self.n_classes = n_classes
        self.n_levels = n_levels

    def __call__(self, x: Tensor) -> None:
        """Run the program on codes x (N, T)."""
        self._validate_params()
        n_classes, given = int(self.n_classes), self.n_levels
        lowest, highest = float(x.min()), float(x.max())
        if not lowest >= 0:  # NaN too
            raise ValueError(f"x must hold codes 0, 1, 2, ..., got {lowest:g}")
        n_levels = round(highest) + 1 if given == "auto" else int(given)
        what = f"classes for n_classes={n_classes}, n_levels={n_levels}"
        check_memory(
            what, n_classes * x.shape[1] * n_levels, x, "use fewer, or codes without gaps (OrdinalEncoder)"
        )
        start = cache(
            lambda: _values(short_runs(x, n_classes, n_levels), x)
        )  # one search for both parameters
        weights = pyro.param("weights", lambda: start()["weights"], constraints.simplex)
        probs = pyro.param("probs", lambda: start()["probs"], constraints.simplex)
        if highest > probs.shape[-1] - 1:
            raise ValueError(
                f"x holds code {highest:g}, but parameter 'probs' has {probs.shape[-1]} levels, from 0: set "
                f"n_levels to the number of levels, {round(highest) + 1} or more, before the first run"
            )
        with pyro.plate("rows", len(x)):
            c = pyro.sample("class", dist.Categorical(weights))
            pyro.sample("x", dist.Categorical(probs[c]).to_event(1), obs=x)

    def maximize(
        self, x: Tensor, params: Mapping[str, Tensor], *, tol: float, max_iter: int
    ) -> dict[str, Tensor]:
        """Climb from ``params`` by EM, and past its first steps by L-BFGS in its units.

        As `bayes_mpt.program.offers.Offers.maximize`, for codes that may be NaN. Of a class without rows the levels are
        as they were.

        Examples
        --------
        >>> import torch
        >>> pyro.clear_param_store()
        >>> x = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, torch.nan]], dtype=torch.float64)
        >>> start = {"weights": x.new_tensor([0.5, 0.5]), "probs": x.new_tensor([[0.6, 0.4], [0.4, 0.6]])}
        >>> start["probs"] = start["probs"][:, None].expand(2, 2, 2)
        >>> better = LatentClass(2).maximize(x, start, tol=1e-12, max_iter=100)
        >>> better["probs"][:, 0].round(decimals=3)
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
        """
        codes = codes_of(x, params["probs"].shape[-1])
        weights, probs = (
            params[name].detach().double().clamp(min=MIN_PROB)[None].log() for name in ("weights", "probs")
        )
        try:
            return _values(climb(codes, Classes(weights, probs), tol=tol, max_iter=max_iter), x)
        except KeyboardInterrupt as press:
            if not press.args:
                raise
            raise KeyboardInterrupt(_values(press.args[0], x)) from press

    def check_rows(self, X: NDArray[np.floating], names: Iterable[Any]) -> None:
        """Refuse cells that are no codes, by the names of their columns."""
        check_codes(X, names)

    def advice(self, X: NDArray[np.floating]) -> list[str]:
        return skipped_levels(X) if self.n_levels == "auto" else []


def _values(classes: Classes, x: Tensor) -> dict[str, Tensor]:
    """The parameters by name, of the one fit there is."""
    return {"weights": classes.log_weights[0].exp().to(x), "probs": classes.log_probs[0].exp().to(x)}
