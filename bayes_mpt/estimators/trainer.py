"""The training of a program: which way fits it, from how many starts, and where it goes back to at Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from typing import Any, Literal

import pyro
import torch
from numpy.typing import NDArray
from sklearn.utils import check_random_state

from bayes_mpt import training
from bayes_mpt.estimators.repeats import repeated_columns
from bayes_mpt.evidence.hyperparameters import Prior, assign
from bayes_mpt.masks import Policy
from bayes_mpt.models.mixtures import CollapseError
from bayes_mpt.predictors import Predictor, choose
from bayes_mpt.predictors.gaussian.incomplete import FewCellsError
from bayes_mpt.predictors.gaussian.profile import NoiseFloorError
from bayes_mpt.predictors.objective import chains_unless_own
from bayes_mpt.program.arguments import has_missing
from bayes_mpt.program.offers import offered
from bayes_mpt.program.store import State, load, save, seed_programs
from bayes_mpt.runtime.digests import CannotDigest, digest_of, in_words
from bayes_mpt.training import Ascent, Epochs, Fit, Problem, Steps, Training
from bayes_mpt.warnings import (
    CollapseWarning,
    NotConvergedWarning,
    SlowProgramWarning,
    ZeroNoiseWarning,
    warn,
    warnings_of,
)

__all__ = ["Trainer", "trainer_of"]

MAX_SETTLING = 2  # rounds of training in which what was found out at the start is found out anew
STARTS_WITH_HOLES = 8  # of a linear-Gaussian map with missing cells, where n_init is "auto"
ASCENT, STEPS = Ascent(), Steps()  # where no training is asked for; nobody changes them
TRIALS, TRIAL_STEPS = 4, 20  # starts and steps of L-BFGS instead, where no EM is known; the best goes on


@dataclass(frozen=True)
class Trainer:
    """Train a problem as it is asked for, or in the way that fits it; the settings are those of `BayesMPT`."""

    predictor: Predictor | str
    masks: Policy | None
    training: Training | None
    asked: dict[str, tuple[str, str]]
    """What a checkpoint is of, by name: in words, and a digest."""
    n_init: int | Literal["auto"]
    seed: int
    names: NDArray[Any]
    """Of the columns (T,), for errors."""
    report: Callable[[int, int, float], bool] | None = None
    """A `Report` that is told first how many iterations there are at most."""
    at_floor: bool = False
    """Whether a noise that goes to zero is held at the size of rounding errors, and not refused."""

    @property
    def by_epochs(self) -> bool:
        """Whether the rows are never read all at once."""
        return self.training is not None and self.training.by_epochs

    def train(
        self,
        problem: Problem,
        prior: Prior | None,
        *,
        warm: bool,
    ) -> Fit:
        """Move the parameters in Pyro's store to where the score is highest.

        Parameters
        ----------
        problem : Problem
            What is maximised.
        prior : Prior or None
            Of the parameters, from which further starts are drawn.
        warm : bool
            Whether the parameters are those of an earlier fit.

        Raises
        ------
        KeyboardInterrupt
            By Ctrl-C before the first iteration; after it the fit ends where it is best, and says that it was
            interrupted.
        """
        if not problem.leaves():
            return Fit("nothing to train", converged=True)
        ended = _Ended()
        try:
            try:
                fit, how, n_before = self._train(problem, prior, warm, ended)
                if problem.has_holes and not fit.interrupted:
                    ended.keep(fit)
                    fit.at_zero = training.noise_at_zero(problem)
            except KeyboardInterrupt:
                fit = ended.interrupted()
        except NoiseFloorError as error:
            raise ValueError(self._unbounded(error, problem)) from error
        except FewCellsError as error:
            raise ValueError(self._few_cells(error, problem)) from error
        except CollapseError as error:
            named = f". Constant here: {self._named(error.constant)}" if error.constant else ""
            raise ValueError(f"{error}{named or self._repeats(problem)}") from error
        if not fit.interrupted:
            self._warn_of_end(fit, how, problem)
            fit.n_iter += n_before
        return fit

    def _warn_of_end(self, fit: Fit, how: Training, problem: Problem) -> None:
        if fit.at_zero:
            warn(self._without_noise(fit.at_zero, problem), ZeroNoiseWarning)
        if problem.statistics is None and any(has_missing(a) for a in problem.whole.args):
            self._warn_of_collapse(problem)
        if fit.converged or self.at_floor:
            return
        if fit.n_iter >= _limit(how):
            option = f"{type(how).__name__}({how.limits}=...)"
            what = f"raise {how.limits} (now {_limit(how)}): training={option}"
        elif problem.bound.name == "Quadrature":
            what = (
                f"with so few nodes the score is not smooth ({problem.bound.why}). Give Quadrature a larger "
                "n_nodes; if that does not help, a parameter diverges"
            )
        else:
            what = "the score has no smooth maximum near params_, or one at infinity: see history_"
        warn(
            f"the training stopped after {fit.n_iter} iterations without meeting its stopping rule: {what}",
            NotConvergedWarning,
        )

    def _train(
        self,
        problem: Problem,
        prior: Prior | None,
        warm: bool,
        ended: _Ended,
    ) -> tuple[Fit, Training, int]:
        """How it went, what it was, and iterations of that before the last run of it."""
        how, stages = self._plan(problem)
        coarse, finer, solved = stages, list[list[Problem]](), None
        n_init = 1 if self.n_init == "auto" else self.n_init
        if not how.by_masks:
            if (
                self.n_init == "auto" and problem.has_holes and not warm
            ):  # local maxima and saddles are likely
                n_init = STARTS_WITH_HOLES
            if problem.statistics is not None and not (problem.has_holes and warm):
                solved = training.maximize_profile(
                    problem, how.max_iter, how.tol, n_init=n_init, seed=self.seed, at_floor=self.at_floor
                )
                if solved is not None:
                    if not problem.has_holes or solved.converged or solved.interrupted:
                        return solved, how, 0
                    ended.keep(solved)
                    training.noise_at_zero(problem)  # before L-BFGS runs to where there is no bound
            coarse, *finer = [[stage] for stage in (stages[-1:] if warm else stages)]

        report = None if self.report is None else partial(self.report, _limit(how))
        train = partial(how.run, seed=self.seed, asked=self.asked, report=report)
        # EM has compared starts already
        again = partial(train, coarse)
        fit = again() if solved else self._best_of(again, how, coarse[-1], prior, n_init, ended)
        for finer_stages in finer:
            if fit.interrupted:
                break
            ended.keep(fit)
            fit = train(finer_stages)
        for _ in range(MAX_SETTLING):
            if fit.interrupted:
                break
            ended.keep(fit)
            if not stages[-1].objective.refresh():
                break
            fit = train(stages if how.by_masks else stages[-1:])
        return fit, how, 0 if solved is None else solved.n_iter

    def _plan(self, problem: Problem) -> tuple[Training, list[Problem]]:
        """The training that fits, where none is asked for, and what it maximises, from cheap to all of it."""
        masks, bound = self.masks, problem.bound
        if masks is None and self.training is not None and self.training.by_masks:
            masks = chains_unless_own(bound)
        stages = [replace(problem, objective=o) for o in bound.schedule(problem.whole, masks, self.seed)]
        noisy = stages[-1].objective.noisy
        how = self.training if self.training is not None else STEPS if noisy else ASCENT
        if how.by_masks or not noisy:
            return how, stages
        drawn = (
            f"masks={self.masks!r} are drawn anew at each step"
            if self.masks is not None
            else f"{bound.name} draws at each step what it averages over"
        )
        raise ValueError(
            f"training={how!r} is of an exact score, but {drawn}: write training=Steps(...), which takes max_iter and "
            "tol too, or leave training=None"
        )

    def _best_of(
        self,
        train: Callable[..., Fit],
        how: Training,
        problem: Problem,
        prior: Prior | None,
        n_init: int,
        ended: _Ended,
    ) -> Fit:
        """Restart from draws of the hyperprior, or from fresh initial values, and keep the best."""
        if n_init == 1:
            return train()
        brief = self.n_init == "auto"  # a few steps from each start, then the best of them to its end
        attempt = partial(train, max_iter=min(TRIAL_STEPS, _limit(how))) if brief else train
        n_init = min(n_init, TRIALS) if brief else n_init
        first = save()
        best = ended.keep(attempt())
        if best.interrupted:
            return best
        with torch.no_grad():
            best_score = float(problem.score())
        store = pyro.get_param_store()
        kept = save()
        model, guide = problem.bound.model, problem.bound.guide
        for start in range(1, n_init):
            store.clear()
            # inside a fork of the generator; the program's first run draws from it
            seed_programs(self.seed + start)
            if model is not None:
                # a first run, which makes new initial values
                with warnings_of(silent=(SlowProgramWarning,)):
                    choose(model, problem.whole.args, predictor=self.predictor, guide=guide)
            # a network's prior holds it; where it may start is its own affair
            if prior is not None and not problem.bound.structure.takes_visible:
                loc, scale = (torch.as_tensor(a) for a in (prior.loc, prior.scale))
                assign(problem.of_program(), torch.normal(loc, scale))
            if brief and _same(first, save()):
                break  # initial values without chance
            fit = attempt()
            with torch.no_grad():
                score = float(problem.score())
            if score > best_score:
                best, best_score, kept = ended.keep(fit), score, save()
            if fit.interrupted:
                best.interrupted, best.converged = True, False
                break
        load(kept)
        return best if not brief or best.converged or best.interrupted else train()

    def _named(self, columns: list[int]) -> str:
        names = [self.names[c] for c in columns]
        return ", ".join(repr(str(name)) if isinstance(name, str) else str(name) for name in names)

    def _warn_of_collapse(self, problem: Problem) -> None:
        """Components of a mixture; where no cell is missing its own `maximize` looks after them."""
        found = training.collapsed(problem)
        if found:
            which = ", ".join(f"{c} (column {self._named(columns)})" for c, columns in found.items())
            warn(
                f"component {which} has lost its spread, on the way to a likelihood without bound: repeated rows, few "
                "observed cells, or columns that are constant or repeat others. Use fewer components, or drop what "
                "repeats and what has few cells",
                CollapseWarning,
            )

    def _without_noise(self, columns: list[int], problem: Problem) -> str:
        one = len(columns) == 1
        return (
            f"the estimate of the noise variance of column{'' if one else 's'} {self._named(columns)} is zero: "
            f"{'its' if one else 'their'} observed cells are explained without any noise, as it happens with few "
            "cells or too many latents, so that errors and intervals that come of this fit are too small. Use "
            f"{_held_by_prior(problem)}fewer latents, or a model whose columns share one noise (PPCA)"
        )

    def _few_cells(self, error: FewCellsError, problem: Problem) -> str:
        counted = zip(error.columns, error.n_cells, strict=True)
        which = ", ".join(f"{self._named([column])} ({n_cells})" for column, n_cells in counted)
        return (
            f"too few observed cells in column {which}: a mean and {error.n_latents} latents reproduce them without "
            "noise, so the likelihood has no maximum. Drop the column, use "
            f"{_held_by_prior(problem)}fewer latents, or a model whose columns share one noise (PPCA)"
        )

    def _repeats(self, problem: Problem) -> str:
        """Which columns are constant or repeat others, to be added to an error."""
        rows = problem.whole.args[0] if problem.whole.rows is None else problem.whole.rows
        found = repeated_columns(rows.detach().cpu().double().numpy())
        return f". Columns that are constant or repeat others here: {self._named(found)}" if found else ""

    def _unbounded(self, error: NoiseFloorError, problem: Problem) -> str:
        columns = [self.names[c] for c in error.columns]
        if len(columns) == len(self.names):
            return (
                f"{problem.bound.structure.n_latents} latents reproduce these rows (n_samples = "
                f"{problem.whole.n_rows:.0f}, n_features = {len(self.names)}) without any noise, so the likelihood has "
                "no maximum: use fewer latents or more rows, and look for constant or duplicated columns"
                f"{self._repeats(problem)}"
            )
        named = self._named(error.columns)
        return (
            f"columns {named} are constant, duplicated, or exact combinations of others: the likelihood "
            "grows without bound as their noise goes to zero. Drop columns until none repeats another, or use PPCA"
        )


class _Ended:
    """The best training that has ended, to go back to where Ctrl-C is pressed in what comes after it."""

    _fit: Fit | None = None

    def keep(self, fit: Fit) -> Fit:
        """Remember this fit, whose parameters stand in the store."""
        store = pyro.get_param_store().get_state()
        self._fit, self._store, self._state = fit, store, save()
        return fit

    def interrupted(self) -> Fit:
        """The fit that was remembered, its parameters in the store; else raises KeyboardInterrupt."""
        if self._fit is None:
            raise KeyboardInterrupt
        store = pyro.get_param_store()
        store.clear()  # another start may have left parameters of its own
        store.set_state(self._store)
        load(self._state)
        self._fit.interrupted, self._fit.converged = True, False
        return self._fit


def _held_by_prior(problem: Problem) -> str:
    """What to use first where a noise goes to zero: a prior of the noise, where the model can have one."""
    if offered(problem.bound.model, "symmetries") is None or problem.log_prior is not None:
        return ""
    return "penalty=True, which holds the noise above zero by a prior, "


def _same(one: State, other: State) -> bool:
    """Whether two states hold the same parameters with the same values."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def trainer_of(settings: Any, model: Any, names: NDArray[Any]) -> Trainer:
    """How an estimator with these settings trains a model; ``names`` (T,) of the columns."""
    how, state = settings.training, settings.random_state
    if how is None and offered(model, "batch_size") is not None:
        how = Epochs()
    if how is not None:
        how._validate_params()
    asked: dict[str, tuple[str, str]] = {}
    if how is not None and how.by_epochs and how.checkpoint is not None:
        if not isinstance(state, Integral):
            raise ValueError(
                f"checkpoint needs an integer random_state, to hold out the same rows, got {state!r}"
            )
        if settings.n_init not in ("auto", 1):
            raise ValueError(
                f"checkpoint holds one training, but n_init={settings.n_init}: leave one of them out"
            )
        asked = _asked(settings, how)
    return Trainer(
        predictor=settings.predictor,
        masks=settings.masks,
        training=how,
        asked=asked,
        n_init=settings.n_init,
        seed=int(check_random_state(state).randint(2**31 - 1)),
        names=names,
    )


def _limit(how: Training) -> int:
    """Iterations at most."""
    return int(getattr(how, how.limits))


def _asked(settings: Any, how: Epochs) -> dict[str, tuple[str, str]]:
    """What a checkpoint is of, by name: in words, and a digest in which parameters to be trained are shapes."""
    values = {
        name: getattr(settings, name) for name in ("model", "guide", "predictor", "masks", "random_state")
    }
    values |= {name: getattr(how, name) for name in ("validation_fraction", "patience")}
    found = {}
    for name, value in values.items():
        try:
            found[name] = in_words(value), digest_of(value, name, initial=False)
        except CannotDigest as error:
            raise ValueError(
                f"checkpoint={how.checkpoint!r} could not tell this training from others: {error}. Leave it None"
            ) from error
    return found
