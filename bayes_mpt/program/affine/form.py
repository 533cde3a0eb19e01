"""What a linear-Gaussian program is made of."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from bayes_mpt.program.batched import Batched
from bayes_mpt.program.program import Latent, Model, ModelError, Observed, Program

__all__ = ["AffineForm", "NotAffine", "Way"]


class NotAffine(ModelError):
    """The program is not linear-Gaussian given its parameters; it may be scored in another way."""


class AffineForm(NamedTuple):
    """The linear-Gaussian form of a program; found once."""

    program: Program
    """Its tokens are all elements of its observed sites, also those of one event."""
    spread: Tensor
    """(K,) prior standard deviations of the latents in the first run: the unit of the probes."""
    batched: Batched = Batched.LOOP
    """Where each row has a map: how the program takes several probes."""

    @property
    def sites(self) -> tuple[Observed, ...]:
        """The observed sites."""
        return self.program.sites

    @property
    def site_names(self) -> tuple[str, ...]:
        """Names of the observed sites, one by one."""
        return self.program.site_names

    @property
    def observed(self) -> str:
        """Names of the observed sites, in words."""
        return self.program.observed

    @property
    def latents(self) -> tuple[Latent, ...]:
        """The latent sites."""
        return self.program.latents

    @property
    def latent_names(self) -> tuple[str, ...]:
        """Names of the latent sites: integrated."""
        return self.program.latent_names

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the program's parameters."""
        return self.program.parameters

    @property
    def n_tokens(self) -> int:
        """T."""
        return self.program.n_tokens

    @property
    def n_latents(self) -> int:
        """K."""
        return self.program.n_latents

    @property
    def rows_plate(self) -> str | None:
        """The plate of the rows."""
        return self.program.rows_plate

    @property
    def by_row(self) -> bool:
        """Whether latents are per row; else all observations are ONE vector."""
        return self.program.by_row

    @property
    def per_row(self) -> bool:
        """Whether the map differs between rows (covariates, offsets), so that the program is read on the real rows."""
        return self.program.per_row

    @property
    def observed_argument(self) -> int | None:
        """Position of the argument whose cells are the tokens; None if they are computed."""
        return self.program.observed_argument

    @property
    def scores_input(self) -> bool:
        """Whether `read` need not run the real rows: the tokens are that argument, and nothing is scaled."""
        return self.program.scores_input

    @property
    def sub_rows(self) -> int | None:
        """Rows that a sub-sampling plate draws; None where the program takes all rows it is given."""
        return self.program.sub_rows


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
