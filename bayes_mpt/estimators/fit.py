"""From a program and rows to a trained one: how it is read, which training fits it, where it starts again."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from typing import Any, Literal

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from bayes_mpt import training
from bayes_mpt.estimators.repeats import repeated_columns
from bayes_mpt.evidence.integrated import Prior, assign
from bayes_mpt.evidence.laplace import laplace_proportional
from bayes_mpt.masks import PermutationChain, Policy
from bayes_mpt.models.mixtures import CollapseError
from bayes_mpt.predictors import Bound, LinearGaussian, Predictor, choose
from bayes_mpt.predictors.base import Guide
from bayes_mpt.predictors.gaussian.incomplete import FewCellsError
from bayes_mpt.predictors.gaussian.process import N_TRIAL_ROWS, gaussian_program
from bayes_mpt.predictors.gaussian.profile import NoiseFloorError, spectrum
from bayes_mpt.predictors.self_predictive import sees_all
from bayes_mpt.program.statistics import SufficientStatistics
from bayes_mpt.program.store import OwnStore, State, load, save
from bayes_mpt.program.tracing import (
    Model,
    ModelError,
    Program,
    fill,
    first_run,
    has_missing,
    head,
    resampled,
    run,
    shifted,
)
from bayes_mpt.score import OWN_MASKS

__all__ = [
    "Trainer",
    "bind",
    "choose_dimension",
    "log_prior",
    "of_program",
    "refuse_subsampling",
    "warn_of_ignored_rows",
]

MAX_INIT_ROWS = 4096  # rows on which it is found out what a program is
MAX_INIT_CELLS = 2**20  # of a table on which a program first runs, which initialises its parameters
MAX_INIT_VECTOR = 1024  # rows of one Gaussian vector, which may mean a matrix of their square
MAX_AUTO = 50  # latent dimensions that "auto" tries at most
MAX_SETTLING = 2  # rounds of training in which what was found out at the start is found out anew
STARTS_WITH_HOLES = 8  # of a linear-Gaussian map with missing cells, where n_init is "auto"
TRIALS, TRIAL_STEPS = 4, 20  # starts and steps of L-BFGS instead, where no EM is known; the best goes on
RATE, NETWORK_RATE = 0.05, 1e-3  # of Adam, in units of the map; and of networks' own parameters

# ---------------------------------------------------------------------------------------------- what a program is


def bind(
    model: Model,
    guide: Guide | None,
    arguments: Callable[[Any], tuple[Any, ...]],
    shape: tuple[int, int],
    predictor: Predictor | str,
    *,
    takes_y: bool,
    by_epochs: bool,
    known: tuple[Bound, State] | None = None,
) -> tuple[Bound, tuple[Any, ...]]:
    """Run the program for the first time and choose its predictor; with what it is to be read on.

    Parameters
    ----------
    model, guide : callable
        The program, in a parameter store of its own.
    arguments : callable
        What the program is called with for some rows: an index of them.
    shape : (N, T)
        Of the table.
    predictor : Predictor or "auto"
        As in `BayesMPT`.
    takes_y : bool
        Whether there is a second argument: then all rows are read.
    by_epochs : bool
        Whether the rows are never read all at once.
    known : tuple, optional
        The predictor and the parameters of another fit of the same program, whose rows share one map.
    """
    n_rows, n_columns = shape
    if takes_y:
        args = arguments(slice(None))
        with OwnStore():
            vector = gaussian_program(model, args) is not None
        if vector:
            # Its covariance may be made whole: initial values from as many rows as that costs little, at random,
            # since of a series the first rows are no sample.
            some = torch.randperm(n_rows)[:MAX_INIT_VECTOR].sort().values.numpy()
            first_run(model, tuple(fill(a) for a in arguments(some)))
            return choose(model, args, predictor=predictor, guide=guide), args
    n_init = MAX_INIT_CELLS // n_columns
    # "auto" begins with a run on all rows itself, if they are not too many
    begins_whole = predictor == "auto" and not takes_y and n_rows <= min(n_init, MAX_INIT_ROWS)
    if known is not None or (N_TRIAL_ROWS < min(n_rows, n_init) and not begins_whole):
        # Initial values from all rows, or a start that is a fit of its own (EM) would be one to the first rows
        # only. A program that cannot run says why below.
        with suppress(Exception):
            first_run(sees_all(model), tuple(fill(a) for a in arguments(slice(n_init))))
    args = arguments(slice(MAX_INIT_ROWS))
    if known is not None and _same_shapes(known[1]):
        found = known[0]
    else:
        found = choose(model, args, predictor=predictor, guide=guide)
    if n_rows > MAX_INIT_ROWS and not (found.structure.scores_input and isinstance(found, LinearGaussian)):
        args = arguments(slice(None))
        if not found.structure.scores_input and not by_epochs:
            found = choose(model, args, predictor=predictor, guide=guide)
    return found, args


def choose_dimension(model: Any, statistics: SufficientStatistics) -> tuple[Any, dict[int, float], bool]:
    """Rank all K by the evidence, on one covariance.

    Returns
    -------
    model
        With the best K.
    evidence
        ``{K: log evidence}``.
    at_floor
        Whether K latents reproduce these rows without noise, so that the likelihood is unbounded there.
    """
    statistics = statistics if statistics.complete else statistics.available()
    n, n_tokens = statistics.n, len(statistics.mean)
    cov, shape = statistics.covariance, np.ones(n_tokens)
    most = min(n_tokens - 1, n - 2, MAX_AUTO)
    # K latents and a noise need K + 1 directions in which the rows differ
    known = spectrum(cov, shape, max(most, 0))
    largest = min(most, known.rank - 1)
    evidence = {
        k: laplace_proportional(cov, n, k, shape, known).log_evidence for k in range(max(largest, 0) + 1)
    }
    best = max(evidence, key=lambda k: evidence[k])
    # rows differ in at most n - 1 directions, and in none along a constant column
    at_floor = 0 < known.rank < min(n - 1, int((statistics.variance > 0).sum())) and known.rank <= MAX_AUTO
    if at_floor:
        best = known.rank
        evidence[best] = math.inf
        warnings.warn(
            f"the {n} rows of {n_tokens} columns have rank {best}: with {best} latent dimensions or more no noise is "
            f"left and the likelihood is unbounded. Taken are {best}, with a noise of the size of rounding errors; "
            + (f"{best + 1} to {most} are left out" if most > best else "no larger number is tried"),
            ConvergenceWarning,
            stacklevel=5,
        )
    return model.__class__(**{**model.get_params(), "n_components": best}), evidence, at_floor


def refuse_subsampling(predictor: Bound, args: tuple[Any, ...]) -> None:
    """Programs whose score is that of other rows than they are given, or weighed."""
    structure = predictor.structure
    scale = 1.0
    if isinstance(structure, Program):
        scale = structure.scale
    elif structure.per_row:
        scale = predictor.read(args).scale
    if structure.by_row and structure.sub_rows is None and scale != 1.0:
        raise ModelError(
            f"poutine.scale weighs the program by {scale:.4g}, so that its score is no marginal likelihood: fit "
            "the program itself, or train with pyro.infer.SVI and CumulativeMaskedScore, which take the weight"
        )
    if structure.sub_rows is not None and scale == 1.0:
        raise ModelError(
            f"no plate of the {len(args[0])} rows of X stands around observed site {structure.observed!r}: plate "
            f'{structure.rows_plate!r} has {structure.sub_rows}. Write pyro.plate("rows", len(x)) around it'
        )
    if structure.sub_rows is not None or scale != 1.0:
        raise ModelError(
            f"plate {structure.rows_plate!r} sub-samples its rows (scale {scale:.4g}): BayesMPT makes minibatches "
            'itself. Write pyro.plate("rows", len(x)) without subsample_size, or train with pyro.infer.SVI and '
            "CumulativeMaskedScore"
        )


def warn_of_ignored_rows(predictor: Bound, model: Model, args: tuple[Any, ...]) -> None:
    """Say so where no argument changes what a program observes."""
    structure = predictor.structure
    if structure.scores_input or predictor.own_masks:
        return  # its tokens are the cells of X
    filled = tuple(fill(a) for a in args)
    refused = (RuntimeError, ValueError, IndexError, KeyError)

    def observed(some: tuple[Any, ...]) -> list[Tensor]:
        with torch.no_grad(), pyro.validation_enabled(False):
            trace = run(model, some)
            return [trace.nodes[name]["value"] for name in structure.site_names]

    # a program may insist on all its rows, or have a site for each
    for some in (head(filled, N_TRIAL_ROWS), filled):
        with suppress(*refused):
            before = observed(some)
            break
    else:
        return
    for change in (resampled, shifted):  # resampled rows may be equal, shifted ones have values out of range
        try:
            after = observed(tuple(change(a) for a in some))
        except refused:
            continue
        if not all(map(torch.equal, before, after)):
            return
    warnings.warn(
        f"observed site {structure.observed!r} does not change with X: the rows that were given are ignored, and "
        "whatever they are the score is the same. Write obs=x, or a part of it",
        UserWarning,
        stacklevel=5,
    )


def of_program(problem: training.Problem) -> dict[str, Tensor]:
    """Unconstrained parameters of the program, those of a guide left out."""
    leaves = problem.leaves()
    return {name: leaves[name] for name in problem.predictor.structure.parameters}


def log_prior(model: Model, prior: Prior | None, leaves: dict[str, Tensor]) -> Callable[[], Tensor]:
    """The penalty: log-density of the parameters under the model's hyperprior."""
    if prior is None:
        raise ValueError(
            f"penalty=True needs a model that offers hyperprior(x, y), got {model!r}: write priors into the program by "
            "pyro.sample, or leave penalty=False"
        )
    names = list(leaves)

    def at_present() -> Tensor:
        store = dict(pyro.get_param_store().named_parameters())  # a restart makes new leaves
        return prior.log_prob(torch.cat([store[name].flatten() for name in names])[None])[0]

    return at_present


# --------------------------------------------------------------------------------------------------- its training


@dataclass(frozen=True)
class Trainer:
    """Train a problem in the way that fits it: closed form, L-BFGS, Adam on masks, or epochs of minibatches.

    Its settings are those of `BayesMPT`, of the same names.
    """

    predictor: Predictor | str
    masks: Policy | None
    max_iter: int
    tol: float
    learning_rate: float | None
    batch_size: int | None
    validation_fraction: float
    n_iter_no_change: int
    checkpoint: str | PathLike[str] | None
    asked: dict[str, tuple[str, str]]
    """What a checkpoint is of, by name: in words, and a digest."""
    n_init: int | Literal["auto"]
    by_epochs: bool
    seed: int
    names: NDArray[Any]
    """Of the columns (T,), for errors."""
    report: training.Report
    at_floor: bool = False
    """Whether a noise that goes to zero is held at the size of rounding errors, and not refused."""

    def train(
        self,
        problem: training.Problem,
        statistics: SufficientStatistics | None,
        prior: Prior | None,
        *,
        warm: bool,
    ) -> training.Fit:
        """Move the parameters in Pyro's store to where the score is highest.

        Parameters
        ----------
        problem : Problem
            What is maximised.
        statistics : SufficientStatistics or None
            Moments of the rows, where these are all that the score needs.
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
            return training.Fit("nothing to train", converged=True)
        if not problem.predictor.trainable:
            raise ModelError(
                f"{problem.predictor.name} scores a program and does not train it: choose another predictor"
            )
        ended = _Ended()
        try:
            try:
                fit = ended.keep(self._train(problem, statistics, prior, warm, ended))
                if statistics is not None and not statistics.complete and not fit.interrupted:
                    fit.at_zero = training.noise_at_zero(problem)
            except KeyboardInterrupt:
                fit = ended.interrupted()
        except NoiseFloorError as error:
            raise ValueError(self._unbounded(error, problem)) from error
        except FewCellsError as error:
            raise ValueError(self._few_cells(error)) from error
        except CollapseError as error:
            raise ValueError(f"{error}{self._repeats(problem)}") from error
        if fit.interrupted:
            return fit
        if fit.at_zero:
            one = len(fit.at_zero) == 1
            warnings.warn(
                f"the estimate of the noise variance of column{'' if one else 's'} {self._named(fit.at_zero)} is zero: "
                f"{'its' if one else 'their'} observed cells are explained without any noise, as it happens with few "
                "cells or too many latents, so that errors and intervals that come of this fit are too small. Use "
                "fewer latents, or a model whose columns share one noise (PPCA)",
                ConvergenceWarning,
                stacklevel=5,
            )
        if statistics is None and any(has_missing(a) for a in problem.args):
            self._warn_of_collapse(problem)
        if not fit.converged and not self.at_floor:
            if fit.n_iter >= self.max_iter:
                what = f"raise max_iter (now {self.max_iter})"
            elif problem.predictor.name == "Quadrature":
                what = (
                    f"with so few nodes the score is not smooth ({problem.predictor.why}). Give Quadrature a larger "
                    "n_nodes; if that does not help, a parameter diverges"
                )
            else:
                what = "the score has no smooth maximum near params_, or one at infinity: see history_"
            warnings.warn(
                f"the training stopped after {fit.n_iter} iterations without meeting its stopping rule: {what}",
                ConvergenceWarning,
                stacklevel=5,
            )
        return fit

    def _train(
        self,
        problem: training.Problem,
        statistics: SufficientStatistics | None,
        prior: Prior | None,
        warm: bool,
        ended: _Ended,
    ) -> training.Fit:
        masks = self._policy(problem)
        if problem.predictor.own_masks:
            problem = replace(problem, masks=masks)
        fixed = problem.masks is not None and problem.masks.deterministic and self.batch_size is None
        finer: list[training.Problem] = []
        n_init, solved = self._n_starts(statistics, warm), False
        if masks is None or (fixed and not self.by_epochs):
            if statistics is not None and (statistics.complete or not warm) and problem.log_prior is None:
                fit = self._solve(problem, statistics, n_init)
                if fit is not None and (statistics.complete or fit.interrupted):
                    return fit
                solved = fit is not None
                if fit is not None:
                    ended.keep(fit)
                    training.noise_at_zero(problem)  # before L-BFGS runs to where there is no bound
            train = partial(training.maximize_lbfgs, max_iter=self.max_iter, tol=self.tol, report=self.report)
            first, *finer = [problem] if warm else training.stages(problem, self.seed)
        else:
            stages = self._stages(problem, masks)
            first = problem = stages[-1]
            rate = self.learning_rate or getattr(problem.predictor.model, "learning_rate", None)
            if self.by_epochs:
                train = partial(self._train_by_epochs, stages=stages, masks=masks, rate=rate or NETWORK_RATE)
            else:
                train = partial(
                    training.train_on_masks,
                    masks=masks,
                    max_iter=self.max_iter,
                    learning_rate=rate or RATE,
                    batch_size=self.batch_size,
                    random_state=self.seed,
                    tol=self.tol,
                    report=self.report,
                )
        # EM has compared starts already
        fit = train(first) if solved else self._best_of(partial(train, first), first, prior, n_init, ended)
        for stage in finer:
            if fit.interrupted:
                break
            ended.keep(fit)
            fit = train(stage)
        for _ in range(MAX_SETTLING):
            if fit.interrupted:
                break
            ended.keep(fit)
            if not problem.predictor.settle():
                break
            fit = train(problem)
        return fit

    def _policy(self, problem: training.Problem) -> Policy | None:
        """The masks of the training; None for the exact score."""
        predictor = problem.predictor
        if self.masks is not None:
            return self.masks
        if predictor.own_masks:
            return OWN_MASKS
        # random nodes need steps that average over them, whatever is hidden
        random = predictor.sampled and not predictor.climbs
        return PermutationChain() if random or self.by_epochs else None

    def _stages(self, problem: training.Problem, masks: Policy) -> list[training.Problem]:
        """The problem with cheap steps first, where its predictor has such."""
        predictor = problem.predictor
        if self.batch_size is not None and not (predictor.structure.by_row or predictor.divisible):
            raise ModelError(
                f"batch_size={self.batch_size} needs independent rows, but a latent outside the rows plate "
                "makes all rows one vector: leave batch_size=None"
            )
        if masks.chains:
            return [replace(problem, predictor=p) for p in predictor.in_training()]
        if predictor.sampled and predictor.relocates:
            warnings.warn(
                "nodes that a guide draws anew for every mask make a ratio of two estimates, which is no bound "
                "on the log marginal likelihood: with few of them it rises while the guide leaves the posterior. "
                "Leave masks=None, which shares them along a chain, or take many: Importance(100)",
                UserWarning,
                stacklevel=7,
            )
        return [problem]

    def _train_by_epochs(
        self, problem: training.Problem, *, stages: list[training.Problem], masks: Policy, rate: float
    ) -> training.Fit:
        n_out = math.ceil(self.validation_fraction * problem.n_rows)
        if n_out >= problem.n_rows:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} leaves none of {problem.n_rows} rows"
            )
        order = torch.randperm(problem.n_rows, generator=torch.Generator().manual_seed(self.seed))
        batch_size = self.batch_size or getattr(problem.predictor.model, "batch_size", None) or problem.n_rows
        return training.train_by_epochs(
            [training.take_rows(stage, order[n_out:]) for stage in stages],
            [training.take_rows(stage, order[:n_out]) for stage in stages] if n_out else [],
            masks,
            batch_size=batch_size,
            max_epochs=self.max_iter,
            learning_rate=rate,
            patience=self.n_iter_no_change,
            random_state=self.seed,
            checkpoint=self.checkpoint,
            asked=self.asked,
            report=self.report,
        )

    def _n_starts(self, statistics: SufficientStatistics | None, warm: bool) -> int:
        """How many starts: one unless asked, and several where missing cells make local maxima and saddles likely."""
        if self.n_init != "auto":
            return self.n_init
        exact = self.masks is None and not self.by_epochs
        return (
            STARTS_WITH_HOLES
            if statistics is not None and not statistics.complete and exact and not warm
            else 1
        )

    def _solve(
        self, problem: training.Problem, statistics: SufficientStatistics, n_init: int
    ) -> training.Fit | None:
        """The closed-form maximum; with missing cells, the best end of EM from several starts."""
        rows, weight = statistics.rows(problem.args[0].dtype)
        whole = training.Problem(problem.predictor, problem.args, rows, weight, statistics.n_rows)
        fit = training.maximize_profile(
            whole, statistics, self.max_iter, self.tol, n_init=n_init, seed=self.seed, at_floor=self.at_floor
        )
        if fit is not None and fit.last is not None and problem.weight is None and problem.rows is not None:
            fit.last = fit.last.at(problem.rows)  # the rows themselves, where these are at hand
            with torch.no_grad():
                fit.history = [float(problem.score_of(fit.last))]
        return fit

    def _best_of(
        self,
        train: Callable[..., training.Fit],
        problem: training.Problem,
        prior: Prior | None,
        n_init: int,
        ended: _Ended,
    ) -> training.Fit:
        """Restart from draws of the hyperprior, or from fresh initial values, and keep the best."""
        if n_init == 1:
            return train()
        brief = self.n_init == "auto"  # a few steps from each start, then the best of them to its end
        attempt = partial(train, max_iter=min(TRIAL_STEPS, self.max_iter)) if brief else train
        n_init = min(n_init, TRIALS) if brief else n_init
        first = save()
        best = ended.keep(attempt())
        if best.interrupted:
            return best
        with torch.no_grad():
            best_score = float(problem.score())
        store = pyro.get_param_store()
        kept = save()
        model, guide = problem.predictor.model, problem.predictor.guide
        for start in range(1, n_init):
            store.clear()
            # inside a fork of the generator; the program's first run draws from it
            torch.manual_seed(self.seed + start)
            if model is not None:
                # a first run, which makes new initial values
                choose(model, problem.args, predictor=self.predictor, guide=guide)
            # a network's prior holds it; where it may start is its own affair
            if prior is not None and not problem.predictor.own_masks:
                loc, scale = (torch.as_tensor(a) for a in (prior.loc, prior.scale))
                assign(of_program(problem), torch.normal(loc, scale))
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

    def _warn_of_collapse(self, problem: training.Problem) -> None:
        """Components of a mixture; where no cell is missing its own `maximize` looks after them."""
        found = training.collapsed(problem)
        if found:
            which = ", ".join(f"{c} (column {self._named(columns)})" for c, columns in found.items())
            warnings.warn(
                f"component {which} has lost its spread, on the way to a likelihood without bound: repeated rows, few "
                "observed cells, or columns that are constant or repeat others. Use fewer components, or drop what "
                "repeats and what has few cells",
                ConvergenceWarning,
                stacklevel=6,
            )

    def _few_cells(self, error: FewCellsError) -> str:
        counted = zip(error.columns, error.n_cells, strict=True)
        which = ", ".join(f"{self._named([column])} ({n_cells})" for column, n_cells in counted)
        return (
            f"too few observed cells in column {which}: a mean and {error.n_latents} latents reproduce them without "
            "noise, so the likelihood has no maximum. Drop the column, use fewer latents, or a model whose columns "
            "share one noise (PPCA)"
        )

    def _repeats(self, problem: training.Problem) -> str:
        """Which columns are constant or repeat others, to be added to an error."""
        rows = problem.args[0] if problem.rows is None else problem.rows
        found = repeated_columns(rows.detach().cpu().double().numpy())
        return f". Columns that are constant or repeat others here: {self._named(found)}" if found else ""

    def _unbounded(self, error: NoiseFloorError, problem: training.Problem) -> str:
        columns = [self.names[c] for c in error.columns]
        if len(columns) == len(self.names):
            return (
                f"{problem.predictor.structure.n_latents} latents reproduce these rows (n_samples = "
                f"{problem.n_rows}, n_features = {len(self.names)}) without any noise, so the likelihood has no "
                "maximum: use fewer latents or more rows, and look for constant or duplicated columns"
                f"{self._repeats(problem)}"
            )
        named = self._named(error.columns)
        return (
            f"columns {named} are constant, duplicated, or exact combinations of others: the likelihood "
            "grows without bound as their noise goes to zero. Drop columns until none repeats another, or use PPCA"
        )


class _Ended:
    """The best training that has ended, to go back to where Ctrl-C is pressed in what comes after it."""

    def __init__(self) -> None:
        self._fit: training.Fit | None = None

    def keep(self, fit: training.Fit) -> training.Fit:
        """Remember this fit, whose parameters stand in the store."""
        store = pyro.get_param_store().get_state()
        self._fit, self._store, self._state = fit, store, save()
        return fit

    def interrupted(self) -> training.Fit:
        """The fit that was remembered, its parameters in the store; else raises KeyboardInterrupt."""
        if self._fit is None:
            raise KeyboardInterrupt
        store = pyro.get_param_store()
        store.clear()  # another start may have left parameters of its own
        store.set_state(self._store)
        load(self._state)
        self._fit.interrupted, self._fit.converged = True, False
        return self._fit


def _same(one: State, other: State) -> bool:
    """Whether two states hold the same parameters with the same values."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def _same_shapes(state: State) -> bool:
    """Whether the store holds parameters of these names and shapes."""
    here = dict(pyro.get_param_store().named_parameters())
    return {n: v.shape for n, v in state.items()} == {n: v.shape for n, v in here.items()}
