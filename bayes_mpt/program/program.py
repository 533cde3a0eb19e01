"""What a Pyro program is made of, as plain data: sites, latents, plates; and the errors of reading one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = [
    "ColumnObserved",
    "HasFactors",
    "Latent",
    "Looks",
    "MissingCovariate",
    "Model",
    "ModelError",
    "NotPositiveDefinite",
    "Observed",
    "Order",
    "Parts",
    "Program",
    "Shift",
    "SubSampled",
    "ValuesMove",
    "list_names",
    "n_rows_of",
    "one_vector",
    "split_events",
]

Model = Callable[..., Any]
MAX_NAMES = 12  # in a message


class ModelError(ValueError):
    """The program cannot be scored; the message names the site and what to do."""


class HasFactors(ModelError):
    """A `pyro.factor` stands in the program, of which it is not known that it is a density of cells."""


class ColumnObserved(ModelError):
    """Values of shape (N, 1) are observed under a distribution of N numbers."""


class SubSampled(ModelError):
    """A plate draws some of the rows beside latents of the data set: of these no number is the likelihood of all."""


class ValuesMove(ModelError):
    """Observed values move with latents or parameters: data are observed only if that is a shift of cells (`Shift`)."""


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
    moving: bool = False
    """The ends of its support move with other latents or with parameters."""


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


Looks = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


class Order(NamedTuple):
    """Tokens that look at other tokens: the one order in which their conditionals are a density."""

    tokens: tuple[int, ...]
    """The T tokens of a row, or of the one vector, each behind those that its distribution looks at."""
    looks: Looks
    """Some tokens, and those that may look at them: none of the first may be missing where one of the latter is not."""
    given: tuple[str, ...]
    """Cells that are looked at and never scored: all numbers are conditional on them."""
    how: str
    """How it was found, in words."""


class Shift(NamedTuple):
    """An observed site whose value is cells x of an argument and what latents and parameters add: c x + d."""

    site: str
    position: int
    """Of the argument."""
    cells: tuple[int, ...]
    """Of a row of the argument, one for each token of a row of the site; of the whole argument without a row axis."""
    shape: tuple[int, ...]
    """Of the site's value in the first run."""
    row_axis: int | None
    """Of the value: the rows of the argument, one by one."""
    plate: str | None = None
    """Along that axis; its rows may be a sub-sample."""
    n_axes: int = 1
    """Of the argument."""
    factor: float = 1.0
    """c; tokens are \\|c\\| x."""


class Parts(NamedTuple):
    """Names of the parameters that are the parts of a map x = loc + loading z + e, z ~ N(0, I), e ~ N(0, noise)."""

    loc: str
    """(T,)"""
    loading: str
    """(T, K)"""
    noise: str
    """(T,), or one number for all tokens: variances."""


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
    affine: bool = False
    """Tokens and latents are Normal, and every mean is affine in the latents: found by evaluation."""
    dense: bool = False
    """That map is in matrices, with gradients: the moments of complete rows are all that their score needs."""
    parts: Parts | None = None
    """The parameters that are mean, loadings and noise of this map, where the model states them."""
    gaussian_vector: bool = False
    """All observations are one Gaussian vector, whose covariance is of the other arguments: new ones are predicted."""
    shifts: tuple[Shift, ...] = ()
    """Of the sites whose values latents or parameters shift: the tokens are the cells of the arguments themselves."""
    meeting: tuple[tuple[str, frozenset[str]], ...] = ()
    """Discrete latents and those of their plates whose entries meet outside: their values are enumerated together."""
    takes_visible: bool = False
    """The program is conditioned on the mask: hidden tokens are independent of each other, each row has its own."""
    serves_any_rows: bool = False
    """What was found holds for other rows as well, though these do not share a map (`scores_input`)."""
    order: Order | None = None
    """Where tokens look at other tokens, as in an autoregression: their order. None: tokens look at latents alone."""

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


def list_names(names: Iterable[str]) -> str:
    """Names in words, those in the middle of a long list left out."""
    names = list(names)
    if len(names) > MAX_NAMES:
        names[3:-1] = [f"... ({len(names) - 4} more)"]
    return ", ".join(names)


def n_rows_of(program: Program, args: tuple[Any, ...]) -> int:
    """Rows that a run on these arguments has."""
    if not program.by_row:
        return 1
    return program.sub_rows or len(args[0])


def split_events(program: Program) -> Program:
    """The same program with the elements of a MultivariateNormal as tokens, for those who can score them one by one."""
    sites = tuple(s._replace(n_joint=0) for s in program.sites)
    if program.order is None or sites == program.sites:
        return program._replace(sites=sites)
    parts: list[NDArray[np.intp]] = []
    start = 0
    for whole, split in zip(program.sites, sites, strict=True):  # which numbers each token is made of
        n = split.n_tokens
        parts += list(np.arange(start, start + n).reshape(whole.n_tokens, -1))
        start += n
    return program._replace(sites=sites, order=_renamed(program.order, parts))


def _renamed(order: Order, parts: Sequence[NDArray[np.intp]]) -> Order:
    """The order of other tokens, of which these (T, ...) are what each token was."""

    def renamed(some: Sequence[int]) -> tuple[int, ...]:
        return tuple(np.concatenate([[], *(parts[t].ravel() for t in some)]).astype(int).tolist())

    looks = tuple((renamed(before), renamed(after)) for before, after in order.looks)
    return order._replace(tokens=renamed(order.tokens), looks=looks)


def one_vector(program: Program) -> Program:
    """The same program with all its observations as tokens of one vector."""
    sites = tuple(s._replace(row_axis=None) for s in program.sites)
    latents = tuple(
        s._replace(row_axis=None, width=s.width * (1 if s.row_axis is None else s.shape[s.row_axis]))
        for s in program.latents
    )
    order = program.order
    if order is not None and program.by_row:
        by_row, start = [], 0
        for site, whole in zip(program.sites, sites, strict=True):  # where the tokens of the rows go
            kept = site.shape[: len(site.shape) - site.n_joint]
            places = np.arange(start, start + whole.n_tokens).reshape(kept)
            first = places[None] if site.row_axis is None else np.moveaxis(places, site.row_axis, 0)
            by_row.append(first.reshape(len(first), -1))
            start += whole.n_tokens
        order = _renamed(order, list(np.concatenate(by_row, 1).T))
    return program._replace(sites=sites, latents=latents, by_row=False, order=order)
