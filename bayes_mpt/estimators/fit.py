"""From a program and rows to a fitted one, in the order in which it goes: read, trained, scored."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from bayes_mpt import training
from bayes_mpt.estimators.checks import check_bound, warn_of_bounds, warn_of_weights
from bayes_mpt.estimators.dimension import choose_dimension
from bayes_mpt.estimators.fitted import Fitted, Latents, n_at_once
from bayes_mpt.estimators.penalty import noise_prior_of, own_penalty, penalty_of
from bayes_mpt.estimators.rows import (
    arguments,
    as_tensor,
    refuse_constant,
    refuse_one_row,
    refuse_unobserved,
    update_statistics,
)
from bayes_mpt.estimators.trainer import Trainer
from bayes_mpt.evidence.hyperparameters import Prior, hyperprior
from bayes_mpt.predictors import Batch, Bound, Conditionals, Objective
from bayes_mpt.predictors.base import Frozen, Guide, together
from bayes_mpt.predictors.choice import MAX_INIT_ROWS, choose_for_table
from bayes_mpt.predictors.new_rows import growing
from bayes_mpt.predictors.self_predictive import sees_all
from bayes_mpt.program.arguments import filling
from bayes_mpt.program.location import location_parameter
from bayes_mpt.program.offers import offered
from bayes_mpt.program.program import Model, ModelError
from bayes_mpt.program.run import not_finite
from bayes_mpt.program.statistics import SufficientStatistics, digest_of_rows, far_means
from bayes_mpt.program.store import (
    Initial,
    OwnStore,
    State,
    load,
    own_random_state,
    random_states,
    save,
    set_random_states,
)
from bayes_mpt.runtime.interrupts import to_be_discarded
from bayes_mpt.runtime.serial import one_thread
from bayes_mpt.warnings import AdviceWarning, warn

__all__ = ["fit_program", "parameters", "set_buffers"]

MAX_CHAIN_CELLS = 2**24  # tokens times steps, up to which a network's score of its training rows is of chains
MAX_LOCATION_ROWS = 64  # on which it is found out whether a program moves with its rows


@dataclass(frozen=True)
class _Table:
    """The rows of a fit, and what the one pass over them has found."""

    X: NDArray[np.floating]
    y: NDArray[Any] | None
    device: str
    statistics: SufficientStatistics | None
    """Moments of these rows and of those seen before; None where rows do not share a map."""
    shift: NDArray[np.float64] | None
    location: str | None
    more: bool
    """Whether rows were seen before."""

    @property
    def n_cells(self) -> int:
        return self.X.size if self.statistics is None else self.statistics.n_cells

    def arguments(self, model: Model, rows: Any) -> tuple[Any, ...]:
        """What the program is called with for some rows: an index of them."""
        y = None if self.y is None else self.y[rows]
        return arguments(model, self.X[rows], y, self.device, self.shift)


@dataclass(frozen=True)
class _Read:
    """A program that was run for the first time on a table, and what is to be maximised."""

    model: Model
    guide: Guide | None
    table: _Table
    problem: training.Problem
    prior: Prior | None
    initial: Initial
    trainer: Trainer


def fit_program(
    model: Model,
    guide: Guide | None,
    X: NDArray[np.floating],
    y: NDArray[Any] | None,
    trainer: Trainer,
    *,
    device: str = "cpu",
    penalty: bool = False,
    start: Fitted | None = None,
    more: Fitted | None = None,
    template: Fitted | None = None,
    left: dict[str, Any] | None = None,
) -> Fitted:
    """A program, fitted to rows.

    Parameters
    ----------
    model, guide : callable
        Modules are copied.
    X : array of shape (N, T)
        NaN where missing.
    y : array of shape (N, ...), optional
        Second argument of the program.
    trainer : Trainer
        How it is trained.
    device : str
        Where.
    penalty : bool
        Whether the log prior (`bayes_mpt.estimators.penalty`) is added to what is maximised.
    start : Fitted, optional
        From whose parameters to start.
    more : Fitted, optional
        Fitted to earlier rows, which are to count too.
    template : Fitted, optional
        The same program on other rows: what it is made of is known from there, and no number.
    left : dict, optional
        What a training has found before (`bayes_mpt.estimators.stored.dump`): nothing is trained.
    """
    original, template = model, None if isinstance(model, torch.nn.Module) else template
    if isinstance(model, torch.nn.Module):
        model = deepcopy(model).double().to(device)  # a PyroModule trains in place
    guide = _own_guide(guide, original, model, device)
    if left is not None:
        trainer = replace(trainer, seed=int(left["seed"]))
    auto = offered(model, "n_components") == "auto"
    # The one pass over all rows, with all threads; what follows sees the moments only, if rows share a map.
    table = _table_of(X, y, trainer, device, more, auto=auto)
    with one_thread(table.n_cells):
        selection = None
        if table.statistics is not None and auto:
            refuse_one_row(table.statistics.n_rows, ("n_components",))
            refuse_constant(table.statistics)
            model, n_latents, selection, at_floor = choose_dimension(model, table.statistics)
            trainer, template = replace(trainer, at_floor=at_floor), None
            if start is not None and start.bound.structure.n_latents != n_latents:
                start = None
        if table.shift is not None and more is None:
            table = _located(table, model, trainer.seed)
        with OwnStore() as store, own_random_state(trainer.seed):
            read = _read(model, guide, table, trainer, store, start, template, more, penalty=penalty)
            bound = read.problem.bound
            analysis = bound if bound.structure.scores_input or bound.structure.serves_any_rows else None
            fit, random_after = _trained(read, store, left, warm=start is not None)
            try:
                found = _scored(read, fit, template, penalty=penalty)
            except KeyboardInterrupt:
                if fit.interrupted or to_be_discarded():
                    raise
                store.unwind()
                fit.interrupted, fit.converged = True, False
                found = _scored(read, fit, template, penalty=penalty)
    return replace(found, analysis=analysis, random_after=random_after, selection=selection)


# ------------------------------------------------------------------------------------------------------ its rows


def _table_of(
    X: NDArray[np.floating],
    y: NDArray[Any] | None,
    trainer: Trainer,
    device: str,
    more: Fitted | None,
    *,
    auto: bool,
) -> _Table:
    """The one pass over all rows, and what is to be subtracted from them."""
    if trainer.by_epochs:
        refuse_unobserved(np.isnan(X).all(0), trainer.names)
    if more is not None:
        table = _Table(X, y, device, None, more.shift, more.location, True)
    else:
        table = _Table(X, y, device, None, None, None, False)
    if (trainer.by_epochs and not auto) or y is not None:
        return table
    seen = None if more is None else more.statistics
    statistics = update_statistics(X, seen, device, trainer.names, table.shift)
    shift = far_means(statistics) if more is None else None
    if shift is None:
        return replace(table, statistics=statistics)
    return replace(table, statistics=update_statistics(X, None, device, trainer.names, shift), shift=shift)


def _located(table: _Table, model: Model, seed: int) -> _Table:
    """Shifted rows with the parameter that moves with them; without a shift where there is none."""
    assert table.shift is not None
    with own_random_state(seed):
        few = table.arguments(model, slice(MAX_LOCATION_ROWS))
        location = location_parameter(model, few, table.shift != 0)
    if location is not None:
        return replace(table, location=location)
    assert table.statistics is not None  # its rows cannot be told from where they lie
    back = torch.as_tensor(table.shift).to(table.statistics.mean)
    return replace(table, statistics=table.statistics.moved(back), shift=None)


# --------------------------------------------------------------------------------------------------- its program


def _read(
    model: Model,
    guide: Guide | None,
    table: _Table,
    trainer: Trainer,
    store: OwnStore,
    start: Fitted | None,
    template: Fitted | None,
    more: Fitted | None,
    *,
    penalty: bool,
) -> _Read:
    """Run the program for the first time, in the store that is open; say what is to be maximised."""
    known = None if template is None or template.analysis is None else (template.analysis, template.state)
    predictor, args = choose_for_table(
        model,
        guide,
        partial(table.arguments, model),
        table.X.shape,
        trainer.predictor,
        takes_y=table.y is not None,
        by_epochs=trainer.by_epochs,
        known=known,
    )
    initial = store.initial()
    store.begin(None if start is None else start.state)
    structure = predictor.structure
    if not table.more and len(table.X) == 1:
        refuse_one_row(1, structure.parameters)
    if structure.parts is None:  # else its first run has shown what is asked there
        check_bound(predictor, model, args, table.X, table.y, trainer.names)
    advice = offered(model, "advice")
    for sentence in [] if advice is None else advice(table.X):
        warn(sentence, AdviceWarning)
    moments = structure.scores_input and structure.dense
    if trainer.by_epochs and (moments or not structure.by_row):
        raise ValueError(
            f"training=Epochs(...) is of minibatches of independent rows, which {predictor.name} does not use "
            f"({predictor.why}): leave training=None"
        )
    statistics = _moments(table, trainer, predictor, more) if moments else None
    whole = _whole(model, table, predictor, args, statistics)
    problem = training.Problem(Objective(predictor, whole), statistics)
    prior = None
    if penalty or offered(model, "hyperprior") is not None or offered(model, "penalty") is not None:
        problem, prior = _with_priors(problem, model, args, table, penalty=penalty)
    return _Read(model, guide, table, problem, prior, initial, trainer)


def _with_priors(
    problem: training.Problem, model: Model, args: tuple[Any, ...], table: _Table, *, penalty: bool
) -> tuple[training.Problem, Prior | None]:
    """What is added to the score, and the hyperprior, which may not be."""
    leaves = problem.of_program()
    prior = None if offered(model, "hyperprior") is None else hyperprior(model, args, leaves)
    own = None if offered(model, "penalty") is None else own_penalty(model, problem.whole.args)
    if own is not None:
        return replace(problem, log_prior=own), prior
    if not penalty:
        return problem, prior
    if prior is not None:
        return replace(problem, log_prior=penalty_of(prior, list(leaves))), prior
    statistics = table.statistics if problem.statistics is None else problem.statistics
    noise = noise_prior_of(model, leaves, table.X, statistics)
    return replace(problem, log_prior=noise, noise_prior=noise), None


def _moments(table: _Table, trainer: Trainer, predictor: Bound, more: Fitted | None) -> SufficientStatistics:
    """Of all rows seen, which vary."""
    statistics = table.statistics
    if statistics is None:
        seen = None if more is None else more.statistics
        statistics = update_statistics(table.X, seen, table.device, trainer.names)
    if predictor.structure.parameters:
        refuse_constant(statistics)
    return statistics


def _whole(
    model: Model,
    table: _Table,
    predictor: Bound,
    args: tuple[Any, ...],
    statistics: SufficientStatistics | None,
) -> Batch:
    """All rows, as they are scored."""
    n_rows, n_columns = table.X.shape
    if statistics is None:
        return Batch(args, n_rows if predictor.structure.by_row else 1)
    # Few rows are scored themselves; many, and those of earlier calls, through their moments.
    if not table.more and n_rows <= 2 * n_columns:
        rows = as_tensor(table.X, model, table.device, table.shift)
        return Batch(args, statistics.n_rows, rows)
    return Batch(args, statistics.n_rows, *statistics.rows(args[0].dtype))


def _own_guide(guide: Any, original: Any, model: Model, device: str) -> Any:
    """The model's own by default. A module trains in place: a copy; Pyro's automatic guides keep to our model."""
    if guide is None:
        own = offered(model, "guide")
        return own if callable(own) else None
    if not isinstance(guide, torch.nn.Module):
        return guide
    # Pyro's copies lose their model, originals too, as do the parts of a list; there is no other way to give it back.
    kept = [(m, m._model, m.master) for m in guide.modules() if isinstance(m, AutoGuide)]
    copy = deepcopy(guide).double().to(device)
    copies = [m for m in copy.modules() if isinstance(m, AutoGuide)]
    for (part, of, master), own in zip(kept, copies, strict=True):
        part._model, part.master = of, master
        # it may be a part of our model (poutine.block)
        own._model = of if of is not None and of[0] is not original else (model,)
    return copy


# -------------------------------------------------------------------------------------------------- its training


def _trained(
    read: _Read, store: OwnStore, left: dict[str, Any] | None, *, warm: bool
) -> tuple[training.Fit, list[Tensor]]:
    """Move the parameters in the store, or put there what was found before; with torch's random states after it."""
    if left is not None:
        return _found_before(left, read.model, read.guide), left["random"]
    fit = read.trainer.train(read.problem, read.prior, warm=warm)
    if fit.interrupted:
        store.unwind()
        if to_be_discarded():
            raise KeyboardInterrupt
    return fit, random_states()


def _found_before(left: dict[str, Any], model: Model, guide: Guide | None) -> training.Fit:
    """Put what a training found into the parameter store and the networks."""
    here = {name for name, _ in pyro.get_param_store().named_parameters()}
    if here != set(left["parameters"]):
        raise ValueError(
            f"the program has parameters {sorted(here)}, the fit had {sorted(left['parameters'])}"
        )
    load(left["parameters"])
    set_buffers(left["buffers"], model, guide)
    set_random_states(left["random"])
    return training.Fit(str(left["fit_method_"]))


@torch.no_grad()
def set_buffers(found: State, model: Any, guide: Any) -> None:
    """Give networks what `Fitted.buffers` found in them."""
    for name, value in found.items():
        kind, _, inside = name.partition(".")
        (model if kind == "model" else guide).get_buffer(inside).copy_(value)


# ---------------------------------------------------------------------------------------------------- its score


def _scored(read: _Read, fit: training.Fit, template: Fitted | None, *, penalty: bool) -> Fitted:
    """Score the rows at the parameters in the store, and say all that the fit leaves."""
    model, table, problem = read.model, read.table, read.problem
    score = _score_of_training(problem, fit, read.trainer, table.device)
    found, total = score.read, score.total
    if read.prior is not None and not fit.interrupted:
        warn_of_bounds(read.prior, problem, drawn=score.drawn)
    predictor, args = problem.bound, problem.whole.args
    if not np.isfinite(total):
        raise ModelError(
            f"the log marginal likelihood is {total} at the fitted parameters"
            f"{training.impossible(problem, found)}: {not_finite(sees_all(model), args)}. Check what the program "
            "computes from these"
        )
    latents, state = _latents(model, predictor, score, args, template), save()
    statistics, y = problem.statistics, table.y
    return Fitted(
        model=model,
        guide=read.guide,
        bound=Frozen(predictor, found),
        analysis=None,
        initial=read.initial,
        state=state,
        params=parameters(state, table.shift, table.location),
        names=read.trainer.names,
        shift=table.shift,
        location=table.location,
        y_like=None if y is None else (y.shape[1:], y.dtype),
        fill_values=filling(args[0][:MAX_INIT_ROWS]) if predictor.structure.takes_visible else None,
        statistics=statistics,
        seen=args if predictor.structure.gaussian_vector or latents.growing else None,
        digest="" if table.more else digest_of_rows(table.X),
        complete=bool(statistics.complete) if statistics is not None else not bool(np.isnan(table.X).any()),
        latents=latents,
        fit=replace(fit, last=None, total=None),
        total=total,
        se=score.se,
        drawn=score.drawn,
        seed=read.trainer.seed,
        random_after=[],
        at_map=penalty or offered(model, "penalised") is not None,
        selection=None,
        device=table.device,
    )


def parameters(
    state: State, shift: NDArray[np.float64] | None, location: str | None
) -> dict[str, NDArray[Any]]:
    """Values of the parameters in the store by name, of the rows themselves."""
    store = pyro.get_param_store()
    found = {name: store[name].detach().cpu().numpy().copy() for name in state}
    if location is not None and shift is not None:
        found[location] = found[location] + shift
    return found


class _Score(NamedTuple):
    """The training rows at the fitted parameters."""

    read: Conditionals
    """Of all of them, or of some where they are too many to be read at once."""
    total: float
    """Nats of all."""
    se: float
    exact: bool
    drawn: bool
    """Whether masks or nodes were drawn for it."""


@torch.no_grad()
def _score_of_training(problem: training.Problem, fit: training.Fit, trainer: Trainer, device: str) -> _Score:
    """The total score of the training rows, with its error."""
    objective, whole = problem.objective, problem.whole
    if fit.last is not None and fit.total is not None:
        return _Score(fit.last, fit.total, 0.0, exact=True, drawn=False)
    structure = problem.bound.structure
    if trainer.by_epochs and not structure.takes_visible:
        step = n_at_once(whole.args[0], device)
        parts = [whole.take(i) for i in torch.arange(len(whole.args[0])).split(step)]
        read = objective.read(parts[0]) if fit.last is None else fit.last
        found = together(objective.read(part).evidence() for part in parts)
    else:
        read = objective.read() if fit.last is None else fit.last
        if structure.takes_visible and read.value.numel() * whole.args[0].shape[1] > MAX_CHAIN_CELLS:
            return _Score(read, *training.total_on_masks(read, trainer.seed), exact=False, drawn=True)
        found = read.evidence()
    if found.diagnostics:
        warn_of_weights(found.diagnostics)
    by_row = found.by_row if whole.weight is None else whole.weight * found.by_row
    drawn = found.drawn or structure.takes_visible
    return _Score(read, float(by_row.sum()), found.se, found.exact, drawn)


@torch.no_grad()
def _latents(
    model: Model, predictor: Bound, score: _Score, args: tuple[Any, ...], template: Fitted | None
) -> Latents:
    """What is said of latents later: those that all rows share, those that come with rows, numbers a row."""
    structure, read = predictor.structure, score.read
    shared = []
    if not structure.by_row:
        outside = {site.name for site in structure.latents if structure.rows_plate not in site.plates}
        for share, values in read.posterior().shared() if outside else []:
            shared.append((share, {n: v.detach().clone() for n, v in values.items() if n in outside}))
    with_rows: tuple[str, ...] = ()
    if len(args) > 1 and not score.exact:
        with_rows = growing(model, args, structure)
    # numbers a row; of discrete latents one for each value, which only the posterior tells
    if structure.gaussian_vector:
        n_numbers = 0
    elif template is not None and structure is template.bound.structure:
        n_numbers = template.latents.n_numbers
    elif any(site.discrete for site in structure.latents):
        one = read.at(read.value[:1]) if structure.scores_input else read
        n_numbers = one.posterior().mean.shape[1]
    else:
        n_numbers = structure.n_latents
    return Latents(n_numbers, shared, with_rows)
