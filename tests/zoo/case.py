"""One case of the zoo: a Pyro program as a user writes it, its data, and what it is held against.

A file ``programs_*.py`` holds the programs of one group, as plain functions, and ends with their list ``CASES``;
`test_zoo.py` finds the files by their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Data = tuple[Any, ...]
"""What `fit` is called with: (X,) or (X, y)."""


@dataclass(frozen=True)
class Case:
    """A program of `zoo.catalogue`, fitted as it stands, or refused.

    Attributes
    ----------
    name : str
        As in the catalogue.
    program : callable
        The Pyro program; a class (a `PyroModule`) is called without arguments by the test.
    data : callable
        ``data(rng)`` returns what `fit` is called with, (X,) or (X, y), from a generator of numpy.
    truth : callable, optional
        ``truth(params, *data)`` is the log evidence in nats by numpy and scipy alone, at the fitted values ``params``
        of the `pyro.param`s (an empty dict where there are none), or a pair: a lower and an upper bound. None:
        nothing is known ("runs"), or the program is refused.
    refused : str
        A regular expression that the message of the `ValueError` matches; empty where the program is fitted.
    settings : mapping
        Of `BayesMPT`, beside ``random_state=0``.
    tolerance : float
        In nats. The number must lie within the larger of this and three of its own standard errors.
    se : float
        The largest standard error, in nats, with which the number is still worth something.
    warns : str
        A regular expression of the one warning that may come with the case; any other fails it.
    slow : bool
        Takes a second or more of a CPU, and is no part of the quick tests.
    known : str
        What is missing where the case is known to fail; it must fail then. Where it is slow too, it is not run.
    seed : int
        Of the data.
    """

    name: str
    program: Callable[..., Any]
    data: Callable[[np.random.Generator], Data]
    truth: Callable[..., float | tuple[float, float]] | None = None
    refused: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-6
    se: float = 0.5
    warns: str = ""
    slow: bool = False
    known: str = ""
    seed: int = 0
