"""What a linear-Gaussian program is made of."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.program import Latent, Model, ModelError, list_names

__all__ = ["AffineForm", "NotAffine", "Outline", "Way"]


class NotAffine(ModelError):
    """The program is not linear-Gaussian given its parameters; it may be scored in another way."""


class AffineForm(NamedTuple):
    """What a program is made of; found once."""

    sites: tuple[str, ...]
    """Names of the observed sites; their values side by side are the tokens."""
    latents: tuple[Latent, ...]
    parameters: tuple[str, ...]
    """Names of the `pyro.param`s (and module parameters) that the program touches: point-estimated."""
    rows_plate: str | None
    by_row: bool
    """True: latents are per row, tokens are the features of a row. False: all observations are ONE vector."""
    per_row: bool
    """True: the map differs between rows (covariates, offsets), so the program is read on the real batch."""
    observed_argument: int | None
    """Position of the argument that the observed site's value equals; None if it is a transformation."""
    scores_input: bool
    """The value is that argument itself and nothing is scaled: `read` need not run the real batch."""
    sub_rows: int | None
    """Rows that a sub-sampling plate draws; None where the program takes all rows it is given."""
    width: int
    """T."""
    spread: Tensor
    """(K,) prior standard deviations of the latents in the first run: the unit of the probes."""
    depth: int
    """Plate dimensions that the program uses."""
    row_axes: tuple[int | None, ...]
    """The axis of the rows plate in the value of each observed site."""
    at_once: bool = False
    """With ``per_row``: the program broadcasts over a plate of probes, so that one run reads them all."""
    takes_visible: bool = False
    """Never: see `Program`."""

    @property
    def n_latents(self) -> int:
        """K."""
        return sum(site.width for site in self.latents)

    @property
    def observed(self) -> str:
        """Names of the observed sites, in words."""
        return list_names(self.sites)

    @property
    def site_names(self) -> tuple[str, ...]:
        """Names of the observed sites, one by one."""
        return self.sites

    @property
    def n_tokens(self) -> int:
        """T."""
        return self.width

    @property
    def latent_names(self) -> tuple[str, ...]:
        """Names of the latent sites: integrated."""
        return tuple(site.name for site in self.latents)


class Way(Protocol):
    """How the map is found."""

    def check_applicable(self, structure: AffineForm) -> None:
        """Say by an error of its own that the way is not meant for such a program."""

    def read_shared(self, model: Model, args: tuple[Any, ...], structure: AffineForm) -> Any:
        """The map that all rows share: one run on rows that are probes."""

    def read_per_row(self, model: Model, args: tuple[Any, ...], structure: AffineForm) -> Any:
        """A map for every row, or of the one vector, and its value: runs on the rows themselves."""

    def first_read_per_row(
        self, model: Model, args: tuple[Any, ...], structure: AffineForm
    ) -> tuple[AffineForm, Any]:
        """`read_per_row` for the first time, and what it finds out for the others."""


class Outline(NamedTuple):
    """What a first run tells of a program, whichever way its map is read."""

    first: Trace
    args: tuple[Any, ...]
    """Filled; the rows of that run."""
    structure: AffineForm
    """As if every row had a map of its own."""
