"""What a fit leaves: a program at its parameters, in one object that never changes, and how rows are read with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayes_mpt import training
from bayes_mpt.estimators.rows import arguments, as_tensor, takes_y
from bayes_mpt.evidence.sampled import SampledEvidence
from bayes_mpt.inputs import read_numbers
from bayes_mpt.predictors import Bound, Conditionals, Predictor, choose
from bayes_mpt.predictors.base import Frozen, Guide
from bayes_mpt.program.affine import DenseMap
from bayes_mpt.program.arguments import fill
from bayes_mpt.program.devices import at_once, check_device, moved
from bayes_mpt.program.offers import name_of, offered
from bayes_mpt.program.program import Model, ModelError, list_names
from bayes_mpt.program.statistics import SufficientStatistics, digest_of_rows
from bayes_mpt.program.store import Initial, OwnStore, State, own_random_state
from bayes_mpt.warnings import SlowProgramWarning, warnings_of

__all__ = ["OPTIONAL", "Fitted", "Latents", "n_at_once"]

OPTIONAL = ("selection_", "components_", "mean_", "noise_variance_")  # attributes that not every fit has
MAX_READ_CELLS = 2**18  # of programs that are read on the rows they score: cells at a time
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Latents:
    """What is said of latents after a fit."""

    n_numbers: int
    """That `BayesMPT.transform` gives a row."""
    shared: list[tuple[float, dict[str, Tensor]]]
    """Weighted posterior values of those that all rows share."""
    growing: tuple[str, ...]
    """Those of one vector that have a number for each row."""


@dataclass(frozen=True)
class Fitted:
    """A program at its fitted parameters, and what was seen on the way; a change makes another one (`replace`)."""

    model: Model
    guide: Guide | None
    bound: Frozen
    """How the program is scored, without it; of rows that share a map also the map."""
    analysis: Bound | None
    """The program as it was found to be, where that does not depend on its rows: what a refit takes over."""
    initial: Initial
    state: State
    """The program's unconstrained parameters."""
    params: dict[str, NDArray[Any]]
    """The parameters by name, of the rows themselves."""
    names: NDArray[Any]
    """Of the columns (T,)."""
    shift: NDArray[np.float64] | None
    """(T,) subtracted from all rows that the program sees."""
    location: str | None
    """The parameter to which it is added in ``params``."""
    y_like: tuple[tuple[int, ...], Any] | None
    """Shape and type of one row's y."""
    fill_values: Tensor | None
    """A value (T,) of each column, for a program that is conditioned on the mask."""
    statistics: SufficientStatistics | None
    """Moments of all rows seen, where these are all that the score needs."""
    seen: tuple[Any, ...] | None
    """The training rows, where new ones are predicted from them."""
    digest: str
    """Fingerprint of the training rows; empty where others were seen before."""
    complete: bool
    """Whether no cell was missing."""
    latents: Latents
    fit: training.Fit
    """How the training went."""
    total: float
    """Log marginal likelihood of the training rows, nats."""
    se: float
    """Its standard error."""
    drawn: bool
    """Whether masks or nodes were drawn for it."""
    seed: int
    """Of the training."""
    random_after: list[Tensor]
    """Torch's random states at its end, from which its score was drawn."""
    at_map: bool
    """Whether the parameters are at the maximum a posteriori."""
    selection: dict[int, float] | None
    """``{K: log evidence}`` where the dimension was chosen."""
    device: str
    predictor: Predictor | str = "auto"
    """How the program is read on new rows."""
    posterior: SampledEvidence | None = None
    """Where rows are scored by the mean over it and not at the maximum."""
    evidence_prior: str = ""
    """The prior of the evidence that a search has ranked it by, in words."""
    draws: int = 0
    """Seed of what is drawn to score or to simulate rows, the same at every call."""

    # ---------------------------------------------------------------------------------------------- its settings

    def moved(self, device: str) -> Fitted:
        """The same on another device."""
        check_device(device)
        return replace(moved(self, device), device=device)

    def with_settings(self, predictor: Predictor | str, draws: int) -> Fitted:
        """The same, read in another way."""
        if predictor is self.predictor and draws == self.draws:
            return self
        return replace(self, predictor=predictor, draws=draws)

    # ---------------------------------------------------------------------------------------------- rows, as tensors

    def tensor(self, rows: NDArray[np.floating]) -> Tensor:
        """Rows as the program sees them."""
        return as_tensor(rows, self.model, self.device, self.shift)

    def arguments(self, rows: NDArray[np.floating], y: Any = None) -> tuple[Any, ...]:
        """What the program is called with."""
        return arguments(self.model, rows, y, self.device, self.shift)

    def new_arguments(self, rows: NDArray[np.floating]) -> tuple[Any, ...]:
        """The same for rows whose y is asked for."""
        assert self.y_like is not None
        shape, dtype = self.y_like
        return self.arguments(rows, np.zeros((len(rows), *shape), dtype=dtype))

    def unshifted(self, rows: NDArray[Any]) -> NDArray[Any]:
        """What was subtracted from the rows before the program saw them added again."""
        return rows if self.shift is None else rows + self.shift

    def moments_of(self, rows: NDArray[np.floating]) -> SufficientStatistics | None:
        """The moments of these rows, if they are those of the fit; None of others, or where a fit needs more."""
        if self.statistics is None or not self.digest or self.digest != digest_of_rows(rows):
            return None
        return self.statistics

    # ---------------------------------------------------------------------------------------------- the program

    @contextmanager
    def program(self, args: tuple[Any, ...]) -> Iterator[Bound]:
        """Inside ``with``: the program at its fitted parameters, bound on these arguments."""
        if (
            self.fill_values is not None
        ):  # of columns without any cell nothing else tells what values they may have
            args = (fill(args[0], self.fill_values),)
        with OwnStore() as store, own_random_state(self.draws):
            store.prefill(self.initial)
            predictor = self._known
            if predictor is None:
                with warnings_of(silent=(SlowProgramWarning,)):  # the fit has said so
                    predictor = choose(self.model, args, predictor=self.predictor, guide=self.guide)
            store.begin(self.state)
            yield predictor

    @property
    def _known(self) -> Bound | None:
        """The program as the fit has found it, where that is what reading it on other rows would find."""
        found = self.analysis
        known = found is not None and found.structure.serves_any_rows and self.predictor == "auto"
        return found if known and not isinstance(self.model, torch.nn.Module) else None

    @contextmanager
    def read(self, rows: NDArray[np.floating], y: Any = None) -> Iterator[Conditionals]:
        """Inside ``with``, where no gradients are tracked: the conditionals of these rows."""
        if self.bound.structure.scores_input:
            with torch.no_grad():
                yield self.bound.read((self.tensor(rows),))
            return
        args = self.arguments(rows, y)
        # a network's penalties, and the loss of a contrastive head, stand in its scores where gradients are
        with self.program(args) as predictor:
            with torch.no_grad():
                yield predictor.read(args)

    def each(
        self, ask: Callable[[Conditionals], _Answer], rows: NDArray[np.floating], y: Any = None
    ) -> list[_Answer]:
        """The answers of the conditionals of `read`, a part of the rows after the other where that can be."""
        # Not a generator of conditionals: an error in its caller would leave it, and what it has opened, half way.
        structure = self.bound.structure
        if structure.scores_input or not structure.by_row:
            with self.read(rows, y) as whole:
                return [ask(whole)]
        y = None if y is None or not takes_y(self.model) else read_numbers(y, len(rows))
        step = n_at_once(rows, self.device)
        args = [
            self.arguments(rows[i : i + step], None if y is None else y[i : i + step])
            for i in range(0, len(rows), step)
        ]
        answers = []
        with self.program(args[0]) as predictor:
            for some in args:
                with torch.no_grad():
                    read = predictor.read(some)
                answers.append(ask(read))
        return answers

    @property
    def noise_parameter(self) -> str | None:
        """The noise variance of a model that declares its loadings free up to rotation."""
        name = (offered(self.model, "symmetries") or {}).get("rotations")
        if name is not None and name not in self.params:
            raise ModelError(
                f"symmetries of {name_of(self.model)} name the noise variance {name!r}, and its parameters are "
                f"{list_names(self.params) or 'none'}: name one of these"
            )
        return name

    def shared_map(self, what: str) -> DenseMap:
        """The linear-Gaussian map that all rows share; ``what`` needs it."""
        shared, structure = self.bound.shared, self.bound.structure
        if shared is not None and structure.affine and structure.by_row and not structure.per_row:
            found = shared.linear_map()
            if found is not None:
                return found
        raise ValueError(f"{what} needs a program whose rows share one map; this one's rows differ")

    def buffers(self) -> dict[str, Tensor]:
        """What the networks of program and guide keep beside their parameters, such as running means."""
        return {
            f"{kind}.{name}": buffer
            for kind, net in (("model", self.model), ("guide", self.guide))
            if isinstance(net, torch.nn.Module)
            for name, buffer in net.named_buffers()
        }

    # ---------------------------------------------------------------------------------------------- as attributes

    def attributes(self) -> dict[str, Any]:
        """What an estimator tells, by the names of its attributes."""
        structure, fit = self.bound.structure, self.fit
        found: dict[str, Any] = {
            "fitted_model_": self.model,
            "fitted_guide_": self.guide,
            "predictor_": self.bound,
            "params_": self.params,
            "log_likelihood_": self.total,
            "log_marginal_likelihood_": self.total if self.posterior is None else self.posterior.log_evidence,
            "log_marginal_likelihood_se_": self.se if self.posterior is None else self.posterior.se,
            "history_": fit.history,
            "n_iter_": max(1, fit.n_iter),
            "converged_": fit.converged,
            "interrupted_": fit.interrupted,
            "noise_at_zero_": [str(self.names[c]) for c in fit.at_zero],
            "fit_method_": fit.method,
            "at_map_": self.at_map,
            "complete_": self.complete,
            "data_digest_": self.digest,
            "n_components_": structure.n_latents,
            "_n_features_out": self.latents.n_numbers,
        }
        if self.selection is not None:
            found["selection_"] = self.selection
        if structure.dense and structure.by_row and not structure.per_row:
            reading = self.shared_map("components_")
            k = structure.n_latents  # further columns are correlated noise
            root = reading.loading[0][:, k:]
            noise = (reading.noise[0] + root.square().sum(1)).cpu().numpy()
            if self.posterior is not None:
                noise = self.posterior.draws.mean_noise
            name = self.noise_parameter
            tied = name is not None and self.params[name].ndim == 0
            found["components_"] = reading.loading[0][:, :k].mT.cpu().numpy()
            found["mean_"] = self.unshifted(reading.loc[0].cpu().numpy())
            found["noise_variance_"] = float(noise[0]) if tied else noise
        return found


def n_at_once(rows: NDArray[Any] | Tensor, device: str) -> int:
    """Rows of programs that are read on the rows they score."""
    return max(256, at_once(MAX_READ_CELLS, torch.device(device)) // rows.shape[1])
