"""Which way fits a program: one without an error (`Exact`), or the nearest; and of a table, which rows tell."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pyro
import torch

from bayes_mpt.inputs import wanted
from bayes_mpt.predictors.base import Bound, Guide, Predictor
from bayes_mpt.predictors.gaussian.linear import LinearGaussian
from bayes_mpt.predictors.gaussian.markov import closed_form
from bayes_mpt.predictors.gaussian.nearest_neighbors import NearestNeighbors, near_conditionals
from bayes_mpt.predictors.gaussian.process import (
    N_TRIAL_ROWS,
    JointGaussian,
    gaussian_program,
    is_gaussian_vector,
)
from bayes_mpt.predictors.nodes.adaptive import AdaptiveNodes
from bayes_mpt.predictors.nodes.enumeration import enumerated, mixture_of_maps
from bayes_mpt.predictors.nodes.importance import Importance
from bayes_mpt.predictors.nodes.quadrature import MAX_WIDTH, Quadrature
from bayes_mpt.predictors.nodes.smc import SequentialMonteCarlo
from bayes_mpt.predictors.nodes.stated_mixture import mixture_as_stated
from bayes_mpt.predictors.nodes.vector_maps import vector_of_maps
from bayes_mpt.predictors.self_predictive import SelfPredictive, sees_all
from bayes_mpt.program.affine import NotAffine, check_normal
from bayes_mpt.program.analysis import look
from bayes_mpt.program.arguments import Args, fill_all
from bayes_mpt.program.offers import offered
from bayes_mpt.program.program import Model, ModelError, Program
from bayes_mpt.program.run import first_run, run, takes_visible
from bayes_mpt.program.shifts import observing_cells
from bayes_mpt.program.sites import latent_nodes
from bayes_mpt.program.store import OwnStore, State
from bayes_mpt.runtime.serial import takes_turns
from bayes_mpt.warnings import SlowProgramWarning, warnings_of

__all__ = ["MAX_INIT_ROWS", "Exact", "choose", "choose_for_table"]

N_DRAWS = 1000
MAX_JOINT = 4096  # tokens of one Gaussian vector whose covariance is made whole
MAX_INIT_ROWS = 4096  # rows on which it is found out what a program is
TRIAL_ROWS = 1024  # the same, of a table that has more than those
MAX_INIT_CELLS = 2**20  # of a table on which a program first runs, which initialises its parameters
MAX_INIT_VECTOR = 1024  # rows of one Gaussian vector, which may mean a matrix of their square


# ---------------------------------------------------------------------------------------------- without an error


class Exact(Predictor):
    """No error: linear-Gaussian programs in closed form, discrete latents summed out, mixtures of both.

    Linear-Gaussian programs in which every site looks at few latents (a local level, a linear dynamical system, lags)
    take a time linear in their length; others that of dense algebra, cubic in the number of latents.

    Discrete latents are summed by Pyro's own tensor variable elimination, in time linear in the length of a chain
    written with `pyro.markov`. Where tokens are Normal given them, and Normal latents stand beside them, every joint
    value of the discrete latents of a row has a linear-Gaussian map of its own; so has every combination of the values
    of discrete latents of the data set (which weights of a regression are not zero).

    Examples
    --------
    >>> import pyro, pyro.distributions as dist, torch
    >>> def coins(x):
    ...     with pyro.plate("rows", len(x)):
    ...         fair = pyro.sample("fair", dist.Bernoulli(x.new_tensor(0.5)))
    ...         p = torch.where(fair == 1, 0.5, 0.9)
    ...         pyro.sample("x", dist.Bernoulli(p[..., None].expand(*p.shape, 2)).to_event(1), obs=x)
    >>> x = torch.ones(1, 2, dtype=torch.float64)
    >>> Exact().bind(coins, (x,)).read((x,)).score().exp()  # (0.5^2 + 0.9^2) / 2
    tensor([0.5300], dtype=torch.float64)
    """

    def bind(self, model: Model, args: tuple[Any, ...], guide: Guide | None = None) -> Bound:
        vector = gaussian_program(model, args)
        if vector is not None:
            return JointGaussian(model, vector)
        stated = _as_stated(model, args)
        return _by_its_map(model, args, partial(_summed_out, model, args)) if stated is None else stated


def _as_stated(model: Model, args: tuple[Any, ...]) -> Bound | None:
    """A program by what it says of its own density, with which its first run agrees; None where it says nothing."""
    if offered(model, "linear_map") is not None:
        return LinearGaussian.stated(model, args)
    return None if offered(model, "mixture_map") is None else mixture_as_stated(model, args)


def _by_its_map(
    model: Model, args: tuple[Any, ...], otherwise: Callable[[Program, NotAffine], Bound]
) -> Bound:
    """A program by its linear-Gaussian map; one that has none as ``otherwise`` has it, which is told the reason."""
    analysis = look(model, args)
    try:
        check_normal(analysis.first, analysis.program)  # before anything is run again
        return closed_form(model, args, analysis)
    except NotAffine as error:
        reason = error
    return otherwise(analysis.checked(), reason)


def _summed_out(model: Model, args: tuple[Any, ...], program: Program, reason: NotAffine) -> Bound:
    """What of a program that is not linear-Gaussian is so given its discrete latents, or has no others."""
    kinds = {site.kind for site in program.sites}
    if program.discrete and kinds <= {"Normal", "MultivariateNormal"}:
        if program.continuous or "MultivariateNormal" in kinds:
            of = mixture_of_maps if program.by_row else vector_of_maps
            return of(model, args, program)
    if program.continuous:
        raise ModelError(
            f"{reason} Latent sites {list(program.continuous)} are neither linear-Gaussian nor discrete, so they "
            "cannot be integrated exactly: use Quadrature() for up to four numbers a row, Importance() with a "
            "guide, or SequentialMonteCarlo() for latents that all rows share"
        )
    return enumerated(model, args, program)


# --------------------------------------------------------------------------------------------- what fits a program


def _samples(guide: Guide, args: tuple[Any, ...]) -> bool:
    """Whether a guide has any site: SVI wants one also where nothing is to be drawn."""
    filled = fill_all(args)
    if takes_visible(guide):
        guide = partial(guide, visible=torch.ones_like(filled[0], dtype=torch.bool))
    return bool(latent_nodes(run(guide, filled)))


@takes_turns
def choose(
    model: Model,
    args: tuple[Any, ...],
    *,
    predictor: Predictor | str = "auto",
    guide: Guide | None = None,
) -> Bound:
    """The program, scored in the most exact way that fits it.

    "auto" takes, in this order: of a program ``model(x, visible)`` what it says itself (`SelfPredictive`); of
    observations that are one Gaussian vector the exact density up to 4096 of them, beyond that `NearestNeighbors(30)`;
    a closed form, where the program is linear-Gaussian given its parameters; the sum over all values of discrete
    latents; with a guide, `Importance`; without one, `Quadrature` over up to four continuous latents. For more of them
    `Importance` around the mode of each row's posterior where they belong to rows, and where all rows share them
    `SequentialMonteCarlo`; or, if there are `pyro.param`s to be trained or latents of rows or groups inside,
    `Importance` around the modes.

    Parameters
    ----------
    model : callable
        A Pyro program.
    args : tuple
        What it is called with.
    predictor : Predictor or "auto"
        A way to take instead.
    guide : callable, optional
        For `Importance`.

    Raises
    ------
    bayes_mpt.program.program.ModelError
        If the program cannot be scored; the message names the site and what to do.
    """
    if predictor != "auto":
        words = "predictor must be 'auto' or a predictor such as Exact() or Importance(100)"
        # abstract, which mypy does not take for a type
        return wanted(Predictor, predictor, words, ValueError).bind(model, args, guide)  # type: ignore[type-abstract]
    if takes_visible(model):
        return SelfPredictive().bind(model, args, guide)
    vector = offered(model, "gaussian_vector")
    stated = _of_vector(model, args) if vector else _as_stated(model, args)
    if stated is not None:
        return stated
    return observing_cells(lambda program: _chosen(program, args, guide), model, args)


def _chosen(model: Model, args: tuple[Any, ...], guide: Guide | None) -> Bound:
    """What "auto" takes for a program that observes its data, and states nothing."""
    vector = _of_vector(model, args)
    return _by_its_map(model, args, partial(_not_affine, model, args, guide)) if vector is None else vector


def _of_vector(model: Model, args: tuple[Any, ...]) -> Bound | None:
    """What "auto" takes for observations that are one Gaussian vector; None of others."""
    vector = gaussian_program(model, args) if len(args) > 1 else None
    if vector is not None and len(args[0]) > MAX_JOINT:
        return near_conditionals(NearestNeighbors(), model, args, vector)
    return None if vector is None else JointGaussian(model, vector)


def _not_affine(
    model: Model, args: tuple[Any, ...], guide: Guide | None, program: Program, reason: NotAffine
) -> Bound:
    """The same for a program that has no linear-Gaussian map."""
    if not program.continuous:
        return _summed_out(model, args, program, reason)
    if program.discrete and {s.kind for s in program.sites} <= {"Normal", "MultivariateNormal"}:
        try:
            return _summed_out(model, args, program, reason)
        except ModelError:
            pass  # not linear-Gaussian given the discrete latents either
    if guide is not None and _samples(guide, args):
        return Importance().bind_guide(model, args, guide, program)
    adaptive = AdaptiveNodes(model, Args(args), program)
    if adaptive.space.width <= MAX_WIDTH:  # where the others are integrated in closed form, or piece by piece
        return Quadrature().bind_nodes(adaptive)
    if program.by_row:
        return Importance().bind_nodes(adaptive)
    # sequential Monte Carlo trains no parameters, and moves of particles with nodes in every row or group cost minutes
    if program.parameters or adaptive.rows is not None:
        # one integral over many latents deserves more draws than one of many rows
        return Importance(N_DRAWS).bind_nodes(adaptive)
    return SequentialMonteCarlo().bind_program(model, args, program)


def choose_for_table(
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
    """The program run for the first time, and scored as `choose` has it; with what it is to be read on.

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
        The predictor and the parameters of another fit of the same program, which holds for any rows.
    """
    n_rows, n_columns = shape
    if takes_y:
        args = arguments(slice(None))
        with OwnStore():
            vector = is_gaussian_vector(model, args)
        if vector:
            # Its covariance may be made whole: initial values from as many rows as that costs little, at random,
            # since of a series the first rows are no sample.
            some = torch.randperm(n_rows)[:MAX_INIT_VECTOR].sort().values.numpy()
            first_run(model, fill_all(arguments(some)), labels=False)
            return choose(model, args, predictor=predictor, guide=guide), args
    n_init = MAX_INIT_CELLS // n_columns
    # "auto" begins with a run on all rows itself, if they are not too many
    begins_whole = predictor == "auto" and not takes_y and n_rows <= min(n_init, MAX_INIT_ROWS)
    if known is not None or (N_TRIAL_ROWS < min(n_rows, n_init) and not begins_whole):
        # Initial values from all rows, or a start that is a fit of its own (EM) would be one to the first rows
        # only. A program that cannot run says why below.
        with suppress(Exception):
            first_run(sees_all(model), fill_all(arguments(slice(n_init))))
    args = arguments(slice(MAX_INIT_ROWS if n_rows <= MAX_INIT_ROWS else TRIAL_ROWS))
    if known is not None and _same_shapes(known[1]):
        found = known[0]
    else:
        found = choose(model, args, predictor=predictor, guide=guide)
    if n_rows > MAX_INIT_ROWS and not (found.structure.scores_input and found.structure.dense):
        args = arguments(slice(None))
        if not (found.structure.scores_input or found.structure.serves_any_rows) and not by_epochs:
            with warnings_of(silent=(SlowProgramWarning,)):  # said above
                found = choose(model, args, predictor=predictor, guide=guide)
    return found, args


def _same_shapes(state: State) -> bool:
    """Whether the store holds parameters of these names and shapes."""
    here = dict(pyro.get_param_store().named_parameters())
    return {n: v.shape for n, v in state.items()} == {n: v.shape for n, v in here.items()}
