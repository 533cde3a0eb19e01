"""What a Pyro program may say of itself beside running: one list of names, looked up in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.poutine.reparam_messenger import ReparamHandler
from torch import Tensor
from torch.nn import Module

__all__ = ["ANOTHER_PROGRAM", "Around", "Offers", "name_of", "offered", "offered_of_itself"]


class Offers(Protocol):
    """A model, as `bayes_mpt.BayesMPT` calls it, with all that it may offer; it needs to have none of it but the call.

    Examples
    --------
    >>> class Single:
    ...     dtype = torch.float32
    ...
    ...     def __call__(self, x): ...
    >>> offered(Single(), "dtype"), offered(Single(), "batch_size")
    (torch.float32, None)
    """

    dtype: ClassVar[torch.dtype]
    """Of its rows: `torch.float32`; float64 without."""
    batch_size: ClassVar[int]
    """Rows a step. A model that has one is trained by epochs (`bayes_mpt.training.Epochs`)."""
    learning_rate: ClassVar[float]
    """Of Adam, where the training names none."""
    n_components: int | Literal["auto"]
    """Number of latents; where it is "auto", that with the highest evidence is taken, of a copy with that number."""
    symmetries: ClassVar[Mapping[str, str]]
    """``{"rotations": name}``: loadings are free up to rotation, and the parameter of this name, one number or one for
    each column, is the noise variance. The orbit of the rotations is integrated in the Laplace evidence."""

    linear_map: ClassVar[Mapping[str, str]]
    """``{"loc": name, "loading": name, "noise": name}``: the parameters of these names, (T,), (T, K) and (T,) or one
    number, are all of a program x = loc + loading z + e with z ~ N(0, I) and e ~ N(0, diag(noise)) of rows x. The class
    is believed: no run but the first is made to find it out. Void in a subclass that has a ``__call__`` of its own."""

    mixture_map: Mapping[str, str] | None
    """``{"weights": name, "loc": name, "scale_tril": name}``: the parameters of these names, (K,), (K, T) and (K, T, T)
    or (T, T), are all of a program of rows x that draws c ~ Categorical(weights) and observes x as MultivariateNormal
    with loc_c and the Cholesky factor of c. It is believed as `linear_map` is; None: nothing is stated."""

    gaussian_vector: bool
    """Whether it observes its last argument, all of it and as it stands, as one MultivariateNormal whose mean and
    covariance are of the parameters and the other arguments. It is believed as `linear_map` is."""

    penalised: str | None
    """In words the prior that fits add to the score by `penalty`; None where they add none."""
    maximizes_missing: ClassVar[bool]
    """Whether `maximize` takes rows with NaN where a cell is missing; without it, complete rows alone."""

    def __call__(self, *args: Tensor) -> Any:
        """Run the program on rows x (N, T), and y."""

    def guide(self, *args: Tensor) -> Any:
        """Draw its latents."""

    def hyperprior(self, *args: Tensor) -> Mapping[str, Any]:
        """Priors of its parameters by name: ``(loc, scale)`` of the unconstrained value, or a distribution."""

    def floored(self, *args: Tensor) -> Mapping[str, str]:
        """Parameters that stand at the least value the model lets them have, each with the reason in words."""

    def maximize(
        self, x: Tensor, params: Mapping[str, Tensor], *, tol: float, max_iter: int
    ) -> Mapping[str, Tensor]:
        """Better values of its parameters for rows x, by an EM, say: it climbs the score and the `penalty`.

        Parameters
        ----------
        x : Tensor of shape (N, T)
            Rows; NaN where a cell is missing, of a model that `maximizes_missing`.
        params : dict of Tensor
            Values of the parameters, by name, from which to climb.
        tol : float
            It ends where no step has more than this share of the score to gain, or nats a row where that is small.
        max_iter : int
            Most steps.

        Returns
        -------
        dict of Tensor
            Better ones, by name.

        Raises
        ------
        KeyboardInterrupt
            At Ctrl-C; after the first step its argument is the parameters as they are then.
        """

    def climb(
        self, x: Tensor, params: Mapping[str, Tensor], *, tol: float, max_iter: int
    ) -> tuple[Mapping[str, Tensor], float]:
        """As `maximize`, and what a parameter by itself has to gain at most there, nats a row; infinite if not known.

        Where that is within the tolerance no gradient is taken. A subclass with another ``__call__``, `maximize` or
        `penalty` is not asked (`offered_of_itself`).
        """

    def held_out(
        self, x: Tensor, splits: Sequence[tuple[Tensor, Tensor]], *, tol: float, max_iter: int
    ) -> list[Tensor | None]:
        """Scores of rows by fits to others of the same table, as by as many fits of the program, only sooner.

        A subclass with another ``__call__``, `maximize` or `penalty` is not asked (`offered_of_itself`).

        Parameters
        ----------
        x : Tensor of shape (N, T)
            Rows; NaN where a cell is missing.
        splits : sequence of (Tensor, Tensor)
            Which rows are fitted, and which are scored by that.
        tol, max_iter
            As of `maximize`, at whose end each fit is; ``tol`` is rougher where a search asks for a first look.

        Returns
        -------
        list of Tensor or None
            Of each split log-densities, in the order of its rows; None where it leaves the fit to the program's
            training: what is warned of or refused, and fits that have not converged.
        """

    def penalty(self, *args: Tensor) -> Callable[[Mapping[str, Tensor]], Tensor] | None:
        """The log prior of its parameters that every fit adds, made once from the rows; no score includes it."""

    def n_free_parameters(self, params: Mapping[str, NDArray[Any]]) -> int:
        """How many numbers of the fitted density are free, for AIC and BIC."""

    def check_rows(self, X: NDArray[np.floating], names: Iterable[Any]) -> None:
        """Refuse rows X (N, T), NaN where missing, that it cannot observe; ``names`` are those of the columns.

        Raises
        ------
        ValueError
            Which names the column and the value.
        """

    def advice(self, X: NDArray[np.floating]) -> list[str]:
        """What is odd about its settings for rows X, NaN where missing: sentences, of which fits warn."""


ANOTHER_PROGRAM = ("__call__", "forward")
FITTED_OTHERWISE = (*ANOTHER_PROGRAM, "maximize", "penalty")
_NOTHING = object()


class Around:
    """What is called in place of a program, and offers what the program offers."""

    model: Any
    """The program."""

    def __getattr__(self, name: str) -> Any:
        """What the program has besides."""
        if name == "model" or name.startswith("__"):  # as it is unpickled it has none yet
            raise AttributeError(name)
        found = offered(self.model, name, _NOTHING)
        if found is _NOTHING:
            raise AttributeError(f"{type(self.model).__name__!r} object has no attribute {name!r}")
        return found

    def __repr__(self) -> str:
        return repr(self.model)


def name_of(model: Any) -> str:
    """A program in a message: a function by its name, a network by its class, a model with its settings.

    Examples
    --------
    >>> from functools import partial
    >>> from bayes_mpt.models import PPCA
    >>> def walk(x, lags): ...
    >>> name_of(walk), name_of(partial(walk, lags=2)), name_of(PPCA(2))
    ('walk', 'walk', 'PPCA(n_components=2)')
    """
    while isinstance(model, Around | partial | ReparamHandler):
        inner = {Around: "model", partial: "func", ReparamHandler: "fn"}
        model = next(getattr(model, name) for kind, name in inner.items() if isinstance(model, kind))
    name = getattr(model, "__name__", None)
    if isinstance(name, str):
        return name
    # what a network prints of itself may draw its weights
    plain = isinstance(model, Module) or repr(model).startswith("<")
    return type(model).__name__ if plain else repr(model)


def offered(model: Any, name: str, default: Any = None) -> Any:
    """What a model offers by this name of `Offers`; ``default`` where it does not."""
    return getattr(model, name, default)


def offered_of_itself(model: Any, name: str, unless: tuple[str, ...] = FITTED_OTHERWISE) -> Any:
    """As `offered`, but None where a class below that which offers it has one of the methods ``unless`` of its own.

    By default where it is another program, or is fitted otherwise.

    Examples
    --------
    >>> from bayes_mpt.models import GaussianMixture
    >>> class Other(GaussianMixture):
    ...     def __call__(self, x): ...
    >>> [offered_of_itself(model, "held_out") is None for model in (GaussianMixture(), Other())]
    [False, True]
    """
    for cls in type(model).__mro__:
        if name in vars(cls):
            return offered(model, name)
        if not vars(cls).keys().isdisjoint(unless):
            return None
    return None
