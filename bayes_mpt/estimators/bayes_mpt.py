"""BayesMPT: any Pyro program as a scikit-learn estimator, trained on the masked score."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import replace
from numbers import Integral, Real
from os import PathLike
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pyro
import torch
from numpy.typing import ArrayLike, NDArray
from pyro.infer.autoguide import AutoGuide
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    DensityMixin,
    TransformerMixin,
    _fit_context,
    clone,
)
from sklearn.callback import CallbackSupportMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_array, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from bayes_mpt import training
from bayes_mpt.estimators.criteria import n_free_parameters
from bayes_mpt.estimators.fit import (
    MAX_INIT_ROWS,
    Trainer,
    bind,
    choose_dimension,
    log_prior,
    of_program,
    refuse_subsampling,
    warn_of_ignored_rows,
)
from bayes_mpt.estimators.repeats import repeated_columns
from bayes_mpt.estimators.rows import (
    arguments,
    as_tensor,
    check_program,
    refuse_constant,
    refuse_empty,
    refuse_missing,
    refuse_one_row,
    refuse_unobserved,
    takes_y,
    update_statistics,
)
from bayes_mpt.evidence.integrated import (
    Integrated,
    Prior,
    assign,
    far_from_centre,
    hyperprior,
    integrate,
    log_likelihood,
)
from bayes_mpt.evidence.laplace import Laplace, laplace_diagonal, laplace_proportional
from bayes_mpt.inputs import read_numbers, read_table, unmasked
from bayes_mpt.masks import PermutationChain, Policy
from bayes_mpt.models import PPCA
from bayes_mpt.models.checks import CheckedModel
from bayes_mpt.predictors import (
    Bound,
    Conditionals,
    Evidence,
    LinearGaussian,
    Predictive,
    Predictor,
    choose,
)
from bayes_mpt.predictors.base import Frozen, together
from bayes_mpt.predictors.gaussian.linear import LinearRows
from bayes_mpt.predictors.gaussian.markov import MarkovRows
from bayes_mpt.predictors.gaussian.profile import NoiseFloorError, spectrum
from bayes_mpt.predictors.new_rows import growing, means_of_new
from bayes_mpt.predictors.nodes.annealed import Annealed, AnnealedImportance, Bracket
from bayes_mpt.predictors.self_predictive import sees_all
from bayes_mpt.program.affine import AffineForm, DenseMap, token_means, tokens_of
from bayes_mpt.program.devices import (
    at_once,
    check_device,
    moved,
    own_random_state,
    random_states,
    set_random_states,
)
from bayes_mpt.program.location import location_parameter
from bayes_mpt.program.simulation import simulate
from bayes_mpt.program.statistics import SufficientStatistics, digest_of_rows, far_means
from bayes_mpt.program.store import OwnStore, State, load, save
from bayes_mpt.program.tracing import (
    Model,
    ModelError,
    Program,
    fill,
    filling,
    list_names,
    not_finite,
    run,
)
from bayes_mpt.runtime.atomic import all_or_nothing, restored_on_failure
from bayes_mpt.runtime.digests import CannotDigest, digest_of, in_words
from bayes_mpt.runtime.interrupts import check, discarded, interruptible, to_be_discarded
from bayes_mpt.runtime.progress import Line, part, tell
from bayes_mpt.runtime.serial import left_as_found, methods_take_turns, turn
from bayes_mpt.score import ScoreEstimate, estimate

__all__ = ["BayesMPT"]

CURVE_CHAINS = 8
WIDE = 2.0  # nats, of the logarithms of a row's weights: the mean of a few of them misses what is rare
MAX_CHAIN_CELLS = 2**24  # tokens times steps, up to which a network's score of its training rows is of chains
MAX_LOCATION_ROWS = 64  # on which it is found out whether a program moves with its rows
MAX_READ_CELLS = 2**18  # of programs that are read on the rows they score: cells at a time


@methods_take_turns(store=True, but=("fit", "partial_fit"), inherited=("fit_transform",))
class BayesMPT(
    CallbackSupportMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin, DensityMixin, BaseEstimator
):
    """Train a Pyro program on its cumulative masked score, the log marginal likelihood (LML), and score rows by it.

    Parameters
    ----------
    model : callable, optional
        A Pyro program called as ``model(x)``, or ``model(x, y)`` where y is given to `fit`; one of
        `bayes_mpt.models`, a function, or a `PyroModule` (copied before it is trained). None is PPCA with the latent
        dimension ranked automatically. What it may offer beside: a method ``guide``, a ``dtype`` for its rows
        (`torch.float32`; float64 by default), and a ``batch_size`` and ``learning_rate`` of its own.
    guide : callable, optional
        Where latents that cannot be integrated are drawn from; trained with the program (copied if it is a module).
        Unused where the score is exact. None takes ``model.guide``, where there is one.
    masks : Policy, optional
        Train on masks drawn from this policy, by Adam. None maximises the exact score, deterministically. Programs
        ``model(x, visible)`` are trained on one mask a row and step, by default of `UniformSize`; on `LeaveOneOut`
        without ``batch_size``, the pseudo-likelihood, by L-BFGS.
    predictor : Predictor or "auto", default="auto"
        How hidden tokens are predicted, such as ``Quadrature(64)``; "auto" takes the most exact way that fits the
        program (`bayes_mpt.predictors.choose`), and `explain` says which and why.
    max_iter : int, default=2000
        Iterations of Newton or L-BFGS, steps of Adam, or epochs.
    tol : float, default=1e-10
        Newton and L-BFGS stop when the mean score changes by less than this share of itself. Adam halves
        its step when a window of steps gains less than ``tol`` (at least 2e-5) nats a row, and stops after six.
    learning_rate : float, optional
        Of Adam, in units in which the program's map moves by about one; by epochs, of the parameters themselves, after
        a rise over the first steps. None takes ``model.learning_rate``, or else 0.05 and by epochs 0.001.
    batch_size : int, optional
        Rows a step of Adam; None takes by epochs ``model.batch_size``, or else all of them. Needs independent rows, or
        a predictor whose score is a sum over tokens (`NearestNeighbors`): then tokens a step.
    early_stopping : bool, optional
        Whether to train by epochs of minibatches, until rows that are held out score no better: for networks. None:
        where the model has a ``batch_size`` of its own. In such a training masks are chains unless ``masks`` is given.
    validation_fraction : float, default=0.1
        Share of the rows held out by ``early_stopping``; 0 runs all of ``max_iter``.
    n_iter_no_change : int, default=10
        Epochs without a better score of these rows, after which the training stops, at the best.
    checkpoint : path, optional
        File to which the training by epochs writes where it is, after each, and from which it goes on if that exists,
        to the same parameters bit for bit (on a CPU). It is of one training on its rows, with its settings, of which
        ``max_iter`` alone may change: needs an integer ``random_state``, and no ``n_init`` above 1.
    n_init : int or "auto", default="auto"
        Starts where the maximum has no closed form; the best is kept. Further ones are drawn from the hyperprior of a
        model that has one, such as `bayes_mpt.models.GaussianProcess`, else (and for programs ``model(x, visible)``)
        from the program's initial values. "auto" is 1, but 8 where cells are missing and the rows share a
        linear-Gaussian map (PPCA, factor analysis, programs of that kind): there are local maxima and saddles. Such a
        map with free mean, loadings and noise is fitted by an EM of its own, of which one start is made of the pairs
        of cells observed together and the others are random; L-BFGS goes on from the best. Of other programs "auto"
        tries 4 starts for a few steps.
    penalty : bool, default=False
        Maximise the score plus the log hyperprior of the model's parameters (maximum a posteriori). What is reported
        as a log marginal likelihood never includes it.
    warm_start : bool, default=False
        Start from the parameters of the last fit.
    random_state : int, RandomState or None
        For initial values, masks and draws.
    device : str, default="cpu"
        Where the algebra is done, such as "cuda". A fitted estimator follows it; in a file all is on the CPU.
    verbose : int, default=0
        1 shows on stderr where the training is, and at its end what it came to: one line that changes in a terminal,
        a line at times in a file.

    Attributes
    ----------
    log_marginal_likelihood_ : float
        Total nats of the training rows' observed cells, at the fitted parameters; of many rows under a program
        ``model(x, visible)`` an unbiased estimate from a few random masks for each row.
    log_marginal_likelihood_se_ : float
        Its standard error over masks; 0 where it is exact.
    params_ : dict of arrays
        The program's parameters.
    history_ : list of float
        Mean score a row after each iteration; of what is maximised, a ``penalty`` included, where no rows are held out.
    n_iter_ : int
        Iterations.
    converged_ : bool
        Whether the training ended by its own rule.
    interrupted_ : bool
        Whether Ctrl-C has cut the training short; then the parameters are the best until then.
    noise_at_zero_ : list of str
        Columns whose noise variance has ended at zero, of which a warning tells; looked for where cells are missing.
    predictor_ : Predictor
        Frozen: needs neither program nor parameter store.
    n_components_ : int
        K.
    components_, mean_, noise_variance_ : arrays
        (K, T), (T,), () or (T,): the linear-Gaussian map in units of standard normal latents, where all rows share it.
    at_map_ : bool
        Whether the parameters are at the maximum a posteriori under the model's hyperprior, not at that of the score.
    complete_ : bool
        Whether no cell of the training rows was missing.
    data_digest_ : str
        Fingerprint of the training rows; empty after `partial_fit`, which has seen others before.
    selection_ : dict
        Where "auto" chose the dimension: ``{K: log evidence}``; with missing cells, from the pairs observed together.
    n_features_in_, feature_names_in_
        As in scikit-learn.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> X = load_iris().data
    >>> model = BayesMPT().fit(X)
    >>> model.n_components_, model.transform(X).shape
    (3, (150, 3))
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "model": [callable, None],
        "guide": [callable, None],
        "masks": [Policy, None],
        "predictor": [StrOptions({"auto"}), Predictor],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "learning_rate": [Interval(Real, 0, None, closed="neither"), None],
        "batch_size": [Interval(Integral, 1, None, closed="left"), None],
        "early_stopping": ["boolean", None],
        "validation_fraction": [Interval(Real, 0, 1, closed="left")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "checkpoint": [str, PathLike, None],
        "n_init": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "penalty": ["boolean"],
        "warm_start": ["boolean"],
        "random_state": ["random_state"],
        "device": [str],
        "verbose": ["verbose"],
    }

    _state: State  # the program's unconstrained parameters after the last fit
    _n_features_out: int  # numbers that `transform` gives a row
    _shift: NDArray[np.float64] | None  # (T,) subtracted from all rows that the program sees
    _location: str | None  # the parameter to which it is added in `params_`
    _y_like: tuple[tuple[int, ...], Any] | None  # shape and type of one row's y
    _fill_values: Tensor | None  # a value (T,) of each column, for a program that is conditioned on the mask
    _analysis: Bound | None  # the program as it was found to be, where that does not depend on its rows
    _trained_with: int  # the seed of the training
    _random_after: list[Tensor]  # torch's random states at its end, from which its score was drawn

    def __init__(
        self,
        model: Model | None = None,
        *,
        guide: Callable[..., Any] | None = None,
        masks: Policy | None = None,
        predictor: Predictor | str = "auto",
        max_iter: int = 2000,
        tol: float = 1e-10,
        learning_rate: float | None = None,
        batch_size: int | None = None,
        early_stopping: bool | None = None,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        checkpoint: str | PathLike[str] | None = None,
        n_init: int | Literal["auto"] = "auto",
        penalty: bool = False,
        warm_start: bool = False,
        random_state: int | np.random.RandomState | None = None,
        device: str = "cpu",
        verbose: int = 0,
    ):
        self.model = model
        self.guide = guide
        self.masks = masks
        self.predictor = predictor
        self.max_iter = max_iter
        self.tol = tol
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.checkpoint = checkpoint
        self.n_init = n_init
        self.penalty = penalty
        self.warm_start = warm_start
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    # ------------------------------------------------------------------------------------------------------- fit

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Maximise the masked score of X.

        Parameters
        ----------
        X : array-like of shape (N, T)
            NaN cells are missing, and those that a `numpy.ma` array masks. A memory map is read by chunks and never
            copied.
        y : array-like of shape (N, ...), optional
            Second argument of the program, if it takes one.

        Returns
        -------
        BayesMPT

        Raises
        ------
        ValueError
            If X or a parameter is unfit, the program cannot be scored exactly (a ``ModelError``), or the likelihood has
            no maximum; the message names the column, site or parameter. The estimator is then what it was before,
            fitted or not.
        KeyboardInterrupt
            At Ctrl-C, always. Before the first iteration the estimator is then what it was before. After it, it is
            fitted, with the best parameters until then: ``interrupted_`` is True and ``converged_`` False; a second
            Ctrl-C while its scores are computed leaves it what it was before.
        """
        context = self._init_callback_context(max_subtasks=None)
        with (
            turn(),
            left_as_found(store=True),
            interruptible(),
            restored_on_failure(self),
            self._shown() as line,
        ):
            self._fit(X, y, context, line, seen=None, warm=self.warm_start)
        return self._whole()

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Add rows to those seen so far and fit again, from the last parameters.

        Of complete rows only mean and covariance are kept, so a stream of any length fits in memory. Programs that
        are read on their own rows (covariates) cannot be fitted by parts.
        """
        context = self._init_callback_context(max_subtasks=None)
        with (
            turn(),
            left_as_found(store=True),
            interruptible(),
            restored_on_failure(self),
            self._shown() as line,
        ):
            fitted = hasattr(self, "predictor_")
            if fitted:
                self._sync_device()
            if fitted and self._statistics is None:
                raise ValueError(
                    "partial_fit needs a program whose rows share one map; fit this one on all rows at once"
                )
            # a fit by masks goes on from where it was; an exact one ends at the maximum over all rows in any case
            warm = fitted and self.masks is not None
            self._fit(X, y, context, line, seen=self._statistics if fitted else None, warm=warm)
        return self._whole()

    def _whole(self) -> Self:
        """The estimator, whose attributes are all of one fit: so Ctrl-C is raised here that cut it short."""
        if self.interrupted_:
            raise KeyboardInterrupt
        return self

    def refit(self, X: ArrayLike, y: Any = None, *, random_state: int | None = None) -> Self:
        """A new estimator of the same settings, fitted to other rows.

        As ``clone(self).fit(X, y)``, from initial values of its own, which have seen no rows but these; only what the
        program is made of is known already, where rows share a map. ``random_state`` is taken if it has none.
        """
        check_is_fitted(self)
        self._sync_device()
        new = clone(self)
        if new.random_state is None:
            new.random_state = random_state
        new._template = self
        with discarded(), part(new, X, y):  # after Ctrl-C nobody would see it
            return new.fit(X, y)

    def _dump(self) -> dict[str, Any]:
        """What a fit has found out by training, in numbers, text and tensors: `_restore` makes it again of them."""
        check_is_fitted(self)
        return {
            "seed": self._trained_with,
            "random": self._random_after,
            "parameters": dict(self._state),
            "buffers": {name: buffer.detach().clone() for name, buffer in self._buffers().items()},
            "digest": self.data_digest_,
            **{name: getattr(self, name) for name in _NUMBERS_OF_FIT},
        }

    def _restore(self, X: ArrayLike, y: Any, left: dict[str, Any]) -> Self:
        """Be as a fit to X has left an estimator of the same settings (`_dump`), without training.

        The program is run once, as at the start of a fit, and read at the parameters that were found.

        Raises
        ------
        ValueError
            If the rows are others, the program has other parameters, or their log marginal likelihood differs.
        """
        with turn(), left_as_found(store=True), restored_on_failure(self), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what there is to warn of was said by the fit
            self._fit(X, y, _Unwatched(), Line(), seen=None, warm=False, left=left)
            total, wanted = self.log_marginal_likelihood_, float(left["log_marginal_likelihood_"])
            single = any(v.dtype == torch.float32 for v in self._state.values())
            if self.data_digest_ != left["digest"]:
                raise ValueError("the rows are not those of that fit")
            if not math.isclose(total, wanted, rel_tol=1e-3 if single else 1e-6, abs_tol=1e-6):
                raise ValueError(
                    f"the log marginal likelihood at its parameters is {total}, where the fit found {wanted}"
                )
            for name, kind in _NUMBERS_OF_FIT.items():
                setattr(self, name, kind(left[name]))
            _set_buffers(left["buffers"], self.fitted_model_, self.fitted_guide_)
        return self

    def _buffers(self) -> dict[str, Tensor]:
        """What the networks of program and guide keep beside their parameters, such as running means."""
        found = {"model": self.fitted_model_, "guide": self.fitted_guide_}
        return {
            f"{kind}.{name}": buffer
            for kind, net in found.items()
            if isinstance(net, torch.nn.Module)
            for name, buffer in net.named_buffers()
        }

    @contextmanager
    def _shown(self) -> Iterator[Line]:
        """Where the training says where it is; what it came to is said at the end, of an exact one too."""
        line, start, text = Line(), time.perf_counter(), ""
        try:
            yield line
            if self.verbose:
                text = (
                    f"{self.fit_method_}, {self.n_iter_} iteration{'' if self.n_iter_ == 1 else 's'}, log marginal "
                    f"likelihood {self.log_marginal_likelihood_:.4f} nats, {time.perf_counter() - start:.2f} s"
                    f"{'' if self.converged_ else ', not converged'}"
                )
        finally:
            line.end(text)

    def _fit(
        self,
        X: ArrayLike,
        y: Any,
        context: Any,
        line: Line,
        *,
        seen: SufficientStatistics | None,
        warm: bool,
        left: dict[str, Any] | None = None,
    ) -> None:
        check_device(self.device)
        if warm and hasattr(self, "_state"):
            self._sync_device()
        template: BayesMPT | None = self.__dict__.pop("_template", None)
        model = PPCA() if self.model is None else self.model
        check_program(model, with_y=y is not None and takes_y(model))
        if self.guide is not None:
            check_program(self.guide, with_y=y is not None and takes_y(model), name="guide")
        X = self._check_rows(X, reset=seen is None)
        y = None if y is None or not takes_y(model) else read_numbers(y, len(X))
        context.call_on_fit_task_begin(estimator=self, X=X, y=y)
        if isinstance(model, torch.nn.Module):
            model = deepcopy(model).double().to(self.device)  # a PyroModule trains in place
        guide = _own_guide(self.guide, self.model, model, self.device)
        state = self._state if warm and hasattr(self, "_state") else None
        trainer = self._trainer(model, context, line)
        if left is not None:
            trainer = replace(trainer, seed=int(left["seed"]))
        with_y = y is not None
        self.__dict__.pop("selection_", None)
        # The one pass over all rows, with all threads; what follows sees the moments only, if rows share a map.
        if trainer.by_epochs:
            refuse_unobserved(np.isnan(X).all(0), trainer.names)
        auto = getattr(model, "n_components", None) == "auto"
        per_row = (trainer.by_epochs and not auto) or with_y
        shift, location = (None, None) if seen is None else (self._shift, self._location)
        statistics = None if per_row else update_statistics(X, seen, self.device, trainer.names, shift)
        if statistics is not None and seen is None:
            shift = far_means(statistics)
            statistics = (
                statistics if shift is None else update_statistics(X, None, self.device, trainer.names, shift)
            )
        known = None
        if template is not None and template._analysis is not None and not isinstance(model, torch.nn.Module):
            known = template._analysis, template._state
        with training.one_thread(X.size if statistics is None else statistics.n_cells):
            if statistics is not None and auto:
                refuse_one_row(statistics.n_rows, ("n_components",))
                refuse_constant(statistics)
                model, self.selection_, at_floor = choose_dimension(model, statistics)
                trainer = replace(trainer, at_floor=at_floor)
                state = None if state is not None and self.n_components_ != model.n_components else state
                known = None
            if shift is not None and seen is None:
                some = arguments(model, X[:MAX_LOCATION_ROWS], None, self.device, shift)
                with own_random_state(trainer.seed):
                    location = location_parameter(model, some, shift != 0)
                if location is None:  # its rows cannot be told from where they lie
                    assert statistics is not None
                    statistics, shift = statistics.moved(torch.as_tensor(shift).to(statistics.mean)), None
            with OwnStore() as store, own_random_state(trainer.seed):
                predictor, args = bind(
                    model,
                    guide,
                    lambda rows: arguments(
                        model, X[rows], None if y is None else y[rows], self.device, shift
                    ),
                    X.shape,
                    self.predictor,
                    takes_y=with_y,
                    by_epochs=trainer.by_epochs,
                    known=known,
                )
                self._analysis = predictor if predictor.structure.scores_input else None
                moments = predictor.structure.scores_input and isinstance(predictor, LinearGaussian)
                self._initial = store.initial()
                store.begin(state)
                refuse_subsampling(predictor, args)
                if seen is None:
                    refuse_one_row(len(X), predictor.structure.parameters)
                warn_of_ignored_rows(predictor, model, args)
                for sentence in model.advice(X) if isinstance(model, CheckedModel) else ():
                    warnings.warn(sentence, UserWarning, stacklevel=4)
                if predictor.one_by_one:
                    warnings.warn(
                        "the program does not run on several nodes at once, so each is run by itself, which is slow "
                        f"({predictor.name}: {predictor.why}). Write it without Python's if on latents, and with "
                        "operations that broadcast over leading batch dimensions: (x * w).sum(-1) for x @ w, z[..., "
                        "None] for "
                        "z[:, None]",
                        UserWarning,
                        stacklevel=4,
                    )
                if predictor.remembers:
                    refuse_missing(X, trainer.names)
                    refuse_empty(y, estimated=bool(predictor.parameters))
                if moments:
                    if statistics is None:
                        statistics = update_statistics(X, seen, self.device, trainer.names)
                    if predictor.structure.parameters:
                        refuse_constant(statistics)
                    # Few rows are scored themselves; many, and those of earlier calls, through their moments.
                    raw = seen is None and len(X) <= 2 * X.shape[1]
                    rows, weight = (
                        (as_tensor(X, model, self.device, shift), None)
                        if raw
                        else statistics.rows(args[0].dtype)
                    )
                    problem = training.Problem(predictor, args, rows, weight, statistics.n_rows)
                else:
                    statistics = None
                    n_rows = len(X) if predictor.structure.by_row else 1
                    problem = training.Problem(predictor, args, None, None, n_rows)
                leaves = of_program(problem)
                prior = hyperprior(model, args, leaves)
                if self.penalty:
                    problem = replace(problem, log_prior=log_prior(model, prior, leaves))
                if trainer.by_epochs and (moments or predictor.remembers or not predictor.structure.by_row):
                    raise ValueError(
                        f"early_stopping holds rows out of a training by epochs, which {predictor.name} does not use "
                        f"({predictor.why}): leave early_stopping=None"
                    )
                if left is None:
                    fit = trainer.train(problem, statistics, prior, warm=state is not None)
                    if fit.interrupted:
                        store.unwind()
                        if to_be_discarded():
                            raise KeyboardInterrupt
                    self._trained_with, self._random_after = trainer.seed, random_states()
                else:  # trained before: what that found, and where it left the draws
                    fit = _found_before(left, model, guide)
                    self._trained_with, self._random_after = trainer.seed, left["random"]

                def complete() -> None:
                    """Score the rows and set all that the fit leaves."""
                    if prior is not None and not fit.interrupted:
                        _warn_of_bounds(prior, problem)
                    problem.predictor.settle()
                    read, total, se = self._score_of_training(problem, fit, trainer)
                    if not np.isfinite(total):
                        raise ModelError(
                            f"the log marginal likelihood is {total} at the fitted parameters"
                            f"{training.impossible(problem, read)}: "
                            f"{not_finite(sees_all(model), args)}. Check what the program computes from these"
                        )
                    self._keep_latents(model, problem.predictor, read, args, template)
                    self._fill_values = filling(args[0][:MAX_INIT_ROWS]) if predictor.own_masks else None
                    self._state = save()
                    self._shift, self._location = shift, location
                    self.params_ = self._parameters()
                    self._y_like = (y.shape[1:], y.dtype) if y is not None else None
                    self._statistics = statistics
                    self._seen = args if predictor.remembers or self._growing else None
                    self._store_fit(model, guide, Frozen(problem.predictor, read), fit, total, se)
                    self.data_digest_ = digest_of_rows(X) if seen is None else ""
                    self.complete_ = (
                        bool(statistics.complete) if statistics is not None else not bool(np.isnan(X).any())
                    )

                try:
                    complete()
                except KeyboardInterrupt:
                    if fit.interrupted or to_be_discarded():
                        raise
                    store.unwind()
                    fit.interrupted, fit.converged = True, False
                    complete()
        context.call_on_fit_task_end(estimator=self, X=X, y=y)

    def _parameters(self) -> dict[str, NDArray[Any]]:
        """Those in the store by name, of the rows themselves."""
        store = pyro.get_param_store()
        found = {n: store[n].detach().cpu().numpy().copy() for n in self._state}
        if self._location is not None:
            found[self._location] = self._unshifted(found[self._location])
        return found

    def _unshifted(self, rows: NDArray[Any]) -> NDArray[Any]:
        """What was subtracted from the rows before the program saw them added again."""
        return rows if self._shift is None else rows + self._shift

    def _trainer(self, model: Model, context: Any, line: Line) -> Trainer:
        by_epochs = self.early_stopping if self.early_stopping is not None else hasattr(model, "batch_size")
        if by_epochs and self.checkpoint is not None and not isinstance(self.random_state, Integral):
            raise ValueError(
                f"checkpoint needs an integer random_state, to hold out the same rows, got {self.random_state!r}"
            )
        if self.checkpoint is not None and not by_epochs:
            raise ValueError(
                f"checkpoint={self.checkpoint!r} is of a training by epochs, which this model is not trained by: leave "
                "it None, or set early_stopping=True"
            )
        if by_epochs and self.checkpoint is not None and self.n_init not in ("auto", 1):
            raise ValueError(
                f"checkpoint holds one training, but n_init={self.n_init}: leave one of them out"
            )

        def report(step: int, score: float) -> bool:
            check()
            tell(step, self.max_iter)
            if self.verbose and (by_epochs or step == 1 or step % max(1, self.max_iter // 100) == 0):
                line.show(f"{step:>6}/{self.max_iter}  score {score:.6f} nats a row")
            if not hasattr(self, "_skl_callbacks"):
                return False
            task = context.subcontext(task_name="iteration")
            task.call_on_fit_task_begin(estimator=self)
            return bool(task.call_on_fit_task_end(estimator=self))

        return Trainer(
            predictor=self.predictor,
            masks=self.masks,
            max_iter=self.max_iter,
            tol=self.tol,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            validation_fraction=self.validation_fraction,
            n_iter_no_change=self.n_iter_no_change,
            checkpoint=self.checkpoint,
            asked=self._asked() if by_epochs and self.checkpoint is not None else {},
            n_init=self.n_init,
            by_epochs=by_epochs,
            seed=int(check_random_state(self.random_state).randint(2**31 - 1)),
            names=self._names(),
            report=report,
        )

    def _asked(self) -> dict[str, tuple[str, str]]:
        """What a checkpoint is of, by name: in words, and a digest in which parameters to be trained are shapes."""
        names = (
            "model",
            "guide",
            "predictor",
            "masks",
            "validation_fraction",
            "n_iter_no_change",
            "random_state",
        )
        found = {}
        for name in names:
            value = getattr(self, name)
            try:
                found[name] = in_words(value), digest_of(value, name, initial=False)
            except CannotDigest as error:
                raise ValueError(
                    f"checkpoint={self.checkpoint!r} could not tell this training from others: {error}. Leave it None"
                ) from error
        return found

    @torch.no_grad()
    def _score_of_training(
        self, problem: training.Problem, fit: training.Fit, trainer: Trainer
    ) -> tuple[Conditionals, float, float]:
        """The conditionals at the fitted parameters, and the total score of the training rows with its error."""
        by_parts = trainer.by_epochs and not problem.predictor.own_masks
        some = problem
        if by_parts:  # as many rows as the epochs never hold at once
            step = min(self._n_at_once(problem.args[0]), problem.n_rows)
            some = training.take_rows(problem, torch.arange(step))
        read = some.read() if fit.last is None else fit.last
        if problem.predictor.exact and not by_parts:
            score = float(problem.score_of(read)) if fit.last is None else fit.history[-1]
            return read, score * problem.n_rows, 0.0
        if problem.predictor.own_masks and read.value.numel() * problem.args[0].shape[1] > MAX_CHAIN_CELLS:
            return read, *training.total_on_masks(problem, read, trainer.seed)
        parts = self._evidence_by_parts(problem) if by_parts else [read.evidence()]
        found = together(parts)
        warn_of(found.diagnostics)
        return read, float(found.by_row.sum()), found.se

    @torch.no_grad()
    def _keep_latents(
        self,
        model: Model,
        predictor: Bound,
        read: Conditionals,
        args: tuple[Any, ...],
        template: BayesMPT | None,
    ) -> None:
        """What is said of latents later: those that all rows share, those that come with rows, numbers a row."""
        structure = predictor.structure
        outside = {site.name for site in structure.latents if structure.rows_plate not in site.plates}
        self._shared_latents = [
            (share, {n: v.detach().clone() for n, v in values.items() if n in outside})
            for share, values in (
                [] if structure.by_row or predictor.remembers else read.posterior().shared()
            )
        ]
        self._growing: tuple[str, ...] = ()
        if isinstance(structure, Program) and len(args) > 1 and not predictor.exact:
            self._growing = growing(model, args, structure)
        # numbers a row; of discrete latents one for each value, which only the posterior tells
        if predictor.remembers:
            self._n_features_out = 0
        elif template is not None and structure is template.predictor_.structure:
            self._n_features_out = template._n_features_out
        elif any(site.discrete for site in structure.latents):
            one = read.at(read.value[:1]) if structure.scores_input else read
            self._n_features_out = one.posterior().mean.shape[1]
        else:
            self._n_features_out = structure.n_latents

    def _n_at_once(self, X: NDArray[Any]) -> int:
        """Rows of programs that are read on the rows they score."""
        return max(256, at_once(MAX_READ_CELLS, torch.device(self.device)) // X.shape[1])

    def _evidence_by_parts(self, problem: training.Problem) -> Iterator[Evidence]:
        for index in torch.arange(problem.n_rows).split(self._n_at_once(problem.args[0])):
            yield training.take_rows(problem, index).read().evidence()

    def _store_fit(
        self,
        model: Model,
        guide: Callable[..., Any] | None,
        predictor: Frozen,
        fit: training.Fit,
        total: float,
        se: float,
    ) -> None:
        self._fitted_on = self.device
        self.fitted_model_ = model
        self.fitted_guide_ = guide
        self.predictor_ = predictor
        self.log_marginal_likelihood_ = total
        self.log_marginal_likelihood_se_ = se
        self.history_ = fit.history
        self.n_iter_ = max(1, fit.n_iter)
        self.converged_ = fit.converged
        self.interrupted_ = fit.interrupted
        self.noise_at_zero_ = [str(self._names()[c]) for c in fit.at_zero]
        self.fit_method_ = fit.method
        self.at_map_ = bool(self.penalty)
        structure = predictor.structure
        self.n_components_ = structure.n_latents
        if isinstance(predictor.shared, LinearRows) and structure.by_row and not structure.per_row:
            reading = predictor.shared.reading
            self.components_ = reading.loading[0].mT.cpu().numpy()
            self.mean_ = self._unshifted(reading.loc[0].cpu().numpy())
            noise = reading.noise[0].cpu().numpy()
            tied = np.ndim(self.params_.get("noise_variance", noise)) == 0
            self.noise_variance_ = float(noise[0]) if tied else noise

    # ------------------------------------------------------------------------------------------------- what it says

    def score_samples(self, X: ArrayLike, y: Any = None) -> NDArray[np.float64]:
        """Log marginal likelihood of each row's observed cells.

        Returns
        -------
        array of shape (N,)
            Nats. A program whose rows are tokens of one vector (a latent outside the rows plate) has one number, the
            LML of all rows together; where the observations are one Gaussian vector (a Gaussian process), each y alone
            given the training rows, NaN where y is missing.
        """
        return self.score_rows(X, y)[0]

    def score_rows(self, X: ArrayLike, y: Any = None) -> tuple[NDArray[np.float64], float]:
        """`score_samples` (N,), and the standard error of their sum, 0 where the score is exact."""
        check_is_fitted(self)
        structure = self.predictor_.structure
        if self.predictor_.remembers:
            return self._score_given_seen(X, y), 0.0
        if structure.scores_input or not structure.by_row or self.predictor_.own_masks:
            with self.read_rows(X, y) as read:
                found = read.evidence()
                return found.by_row.cpu().numpy(), found.se
        with torch.no_grad():
            found = together(read.evidence() for read in self._read_parts(X, y))
        return found.by_row.cpu().numpy(), found.se

    def score(self, X: ArrayLike, y: Any = None) -> float:
        """Mean of `score_samples`, nats a row."""
        return float(self.score_samples(X, y).mean())

    def estimate(
        self, X: ArrayLike, y: Any = None, *, masks: Policy | None = None, n_replicates: int = CURVE_CHAINS
    ) -> ScoreEstimate:
        """Log marginal likelihood of rows with its error over masks, and the masked curve S(x; m).

        Parameters
        ----------
        X : array-like of shape (N, T)
            Rows.
        y : array-like, optional
            As in `fit`.
        masks : Policy, optional
            Must have ``is_lml``; `PermutationChain` by default, which is exact where the conditionals are. A program
            ``model(x, visible)`` takes `Blocks` too.
        n_replicates : int, default=8
            Independent draws of the policy.

        Raises
        ------
        ValueError
            If the expectation of the policy's score is not the LML.
        """
        masks = PermutationChain() if masks is None else masks
        if not isinstance(masks, Policy):
            raise TypeError(f"masks must be a mask policy such as UniformSize(20), got {masks!r}")
        with self.read_rows(X, y) as read:
            x = read.value
            few = not isinstance(read, LinearRows) or len(x) <= 2 * x.shape[1]
            statistics = (
                None if few or not read.structure.scores_input else SufficientStatistics(x, str(x.device))
            )
            return estimate(
                read,
                masks,
                n_replicates=n_replicates,
                random_state=self._seed(),
                curve_rows=None if statistics is None else statistics.rows(x.dtype),
            )

    def transform(self, X: ArrayLike, y: Any = None) -> NDArray[np.floating]:
        """Posterior means of the latents given each row's observed cells, shape (N, K), in the dtype of X.

        Of discrete latents the probabilities of their values.
        """
        with torch.no_grad():
            means = [read.posterior().mean for read in self._read_parts(X, y)]
        return torch.cat(means).cpu().numpy().astype(self._dtype_of(X), copy=False)

    def inverse_transform(self, Z: ArrayLike) -> NDArray[np.floating]:
        """Means of the tokens given latents: (N, K) -> (N, T)."""
        reading = self._shared_reading("inverse_transform")
        z = torch.as_tensor(check_array(unmasked(Z), dtype=np.float64)).to(reading.loc)
        if z.shape[1] != self.n_components_:
            raise ValueError(f"latents must have shape (N, {self.n_components_}), got {tuple(z.shape)}")
        # u = R^-1 (z - b), x = loc + W u
        u = torch.linalg.solve(reading.latent_root[0], (z - reading.latent_loc[0]).mT).mT
        rows = (reading.loc[0] + u @ reading.loading[0].mT).cpu().numpy()
        return self._unshifted(rows).astype(self._dtype_of(Z), copy=False)

    def impute(self, X: ArrayLike, y: Any = None) -> NDArray[np.floating]:
        """X with its NaN cells replaced by their means given the observed cells of the row."""
        check_is_fitted(self)
        with torch.no_grad():
            cells = self._tensor(self._check_rows(X, reset=False))
            parts = [(read.value, read.posterior().tokens) for read in self._read_parts(X, y)]
            x = torch.cat([part[0] for part in parts])
            tokens = torch.where(x.isnan(), torch.cat([part[1] for part in parts]), x)
            if x.shape == cells.shape and bool(((x == cells) | (x.isnan() & cells.isnan())).all()):
                filled = tokens
            else:
                args = self._arguments(self._check_rows(X, reset=False), y)
                with self._fitted_program(args):
                    where = self._cells_of(args)
                filled = cells.flatten().index_copy(0, where, tokens.flatten()).reshape(cells.shape)
        return self._unshifted(filled.cpu().numpy()).astype(self._dtype_of(X), copy=False)

    def _cells_of(self, args: tuple[Any, ...]) -> Tensor:
        """Which cell of X each token is, in reading order: a column at a time is marked with numbers of its own."""
        structure = self.predictor_.structure
        filled = tuple(fill(a) for a in args)
        generator = torch.Generator().manual_seed(0)
        found: Tensor | None = None
        with pyro.validation_enabled(False):
            for column in range(filled[0].shape[1]):
                marks = torch.rand(len(filled[0]), generator=generator, dtype=torch.float64).to(filled[0])
                marked = filled[0].clone()
                marked[:, column] = marks
                try:
                    trace = run(self.fitted_model_, (marked, *filled[1:]))
                except (RuntimeError, ValueError, IndexError):
                    continue  # an index, say: no token
                value = tokens_of(trace, structure).flatten()
                found = torch.full_like(value, -1, dtype=torch.long) if found is None else found
                row = torch.searchsorted(marks.sort().values, value).clamp(max=len(marks) - 1)
                row = marks.argsort()[row]
                is_mark = marks[row] == value
                found[is_mark] = (row * filled[0].shape[1] + column)[is_mark]
        if found is None or bool((found < 0).any()):
            raise ValueError(
                f"impute fills cells of X, but not every token of site {structure.observed!r} is one of them "
                "(transformed, computed from several, or y): observe cells of x themselves"
            )
        return found

    def _takes_labels(self) -> bool:
        """Whether each row has one discrete latent, whose value is its label."""
        structure = getattr(getattr(self, "predictor_", None), "structure", None)
        return isinstance(structure, Program) and structure.one_label and self._y_like is None

    @available_if(_takes_labels)
    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Probabilities of the values of each row's one discrete latent given its observed cells: (N, K).

        Of a mixture, of its components. A row without any observed cell has those before any data.
        """
        with torch.no_grad():
            parts = [read.posterior().labels() for read in self._read_parts(X, None)]
        return torch.cat(parts).double().cpu().numpy()

    def _counts_parameters(self) -> bool:
        """Whether rows are independent and something was estimated by the likelihood."""
        if self._is_unfitted():
            return True
        found = self.predictor_
        return bool(found.structure.by_row and found.structure.parameters) and not (
            found.remembers or found.own_masks
        )

    @available_if(_counts_parameters)
    def aic(self, X: ArrayLike, y: Any = None) -> float:
        """Akaike information criterion, -2 log p(X) + 2 P with P free parameters: the lower the better."""
        return self._criterion(X, y, lambda n_rows: 2.0)

    @available_if(_counts_parameters)
    def bic(self, X: ArrayLike, y: Any = None) -> float:
        """Bayesian information criterion, -2 log p(X) + P log N with P free parameters: the lower the better."""
        return self._criterion(X, y, math.log)

    def _criterion(self, X: ArrayLike, y: Any, price: Callable[[int], float]) -> float:
        by_row = self.score_samples(X, y)
        of_program = {name: self.params_[name] for name in self.predictor_.structure.parameters}
        constraints = {name: constraint for name, (_, constraint) in self._initial.items()}
        n_free = n_free_parameters(self.fitted_model_, of_program, constraints)
        return float(-2 * by_row.sum() + n_free * price(len(by_row)))

    @available_if(lambda self: self._takes_labels() or self._predicts_y())
    def predict(self, X: ArrayLike, return_std: bool = False, return_cov: bool = False) -> Any:
        """Means of y for new rows X, for programs ``model(x, y)``; labels of rows, for mixtures.

        A program of x alone in which each row has one discrete latent gives the likeliest value of it (N,), counted
        from 0. Means of y are averaged over the posterior of the latents that all rows share (regression weights) given
        the training rows; those of new rows are at their means given these. Where the observations are one Gaussian
        vector (a Gaussian process), given the training rows' observations.

        Parameters
        ----------
        X : array-like of shape (M, P)
        return_std, return_cov : bool, default=False
            Of a Gaussian vector: also the standard deviations (M,) or the covariance (M, M) of the new observations,
            their noise included.
        """
        check_is_fitted(self)
        if return_std and return_cov:
            raise ValueError("ask for return_std or return_cov, not both")
        if self._takes_labels():
            if return_std or return_cov:
                raise ValueError("labels have neither return_std nor return_cov: see predict_proba")
            return self.predict_proba(X).argmax(1)
        rows = self._check_rows(X, reset=False)
        assert self._y_like is not None
        if self.predictor_.remembers:
            found = self._predictive(rows, full=return_cov)
            mean = found.mean.cpu().numpy()
            if return_cov:
                assert found.cov is not None
                return mean, found.cov.cpu().numpy()
            return (mean, found.var.sqrt().cpu().numpy()) if return_std else mean
        if return_std or return_cov:
            raise ValueError(
                f"{self.predictor_.name} predicts means only: return_std and return_cov need observations that are "
                "one Gaussian vector"
            )
        shape, dtype = self._y_like
        args = self._arguments(rows, np.zeros((len(rows), *shape), dtype=dtype))
        structure = self.predictor_.structure
        if self._growing:
            assert self._seen is not None and self._shared_latents
            with self._fitted_program(self._seen) as _, torch.no_grad():
                model, draws = self.fitted_model_, self._shared_latents
                return means_of_new(model, self._seen, args, self._growing, draws).cpu().numpy()
        with self._fitted_program(args) as _, torch.no_grad():
            means = torch.stack(
                [
                    share * token_means(self.fitted_model_, args, structure.site_names, values)
                    for share, values in self._shared_latents or [(1.0, {})]
                ]
            ).sum(0)
        return means.cpu().numpy()

    @available_if(lambda self: self._predicts_y() and (self._is_unfitted() or self.predictor_.remembers))
    def sample_y(self, X: ArrayLike, n_samples: int = 1, random_state: int | None = 0) -> NDArray[np.float64]:
        """Draw observations of new rows together, given the training rows: (M, n_samples)."""
        check_is_fitted(self)
        mean, cov = self.predict(X, return_cov=True)
        rng = check_random_state(random_state)
        return rng.multivariate_normal(mean, cov, n_samples).T

    def _predictive(self, rows: NDArray[np.floating], *, full: bool = False) -> Predictive:
        """New observations given those of the training rows."""
        assert self._seen is not None and self._y_like is not None
        refuse_missing(rows, self._names())
        shape, dtype = self._y_like
        new = self._arguments(rows, np.zeros((len(rows), *shape), dtype=dtype))
        with self._fitted_program(self._seen) as predictor, torch.no_grad():
            return predictor.read(self._seen).predict(new, full=full)

    def _score_given_seen(self, X: ArrayLike, y: Any) -> NDArray[np.float64]:
        """log p(y_i | x_i, training rows) (N,)."""
        if y is None:
            raise ValueError("this model scores y given X: pass y")
        rows = self._check_rows(X, reset=False)
        found = self._predictive(rows)
        value = self._arguments(rows, y)[1].to(found.mean).reshape(found.mean.shape)
        log_prob = torch.distributions.Normal(found.mean, found.var.sqrt(), validate_args=False).log_prob(
            value
        )
        return log_prob.cpu().numpy()

    def sample(self, n_samples: int = 1) -> NDArray[np.float64]:
        """Draw rows from the fitted model: (n_samples, T), the same ones at every call; ``random_state`` chooses."""
        check_is_fitted(self)
        if not isinstance(n_samples, Integral) or n_samples < 1:
            raise ValueError(f"n_samples must be an integer of at least 1, got {n_samples!r}")
        if self.predictor_.own_masks:  # a row of which nothing is known
            return self.sample_missing(np.full((int(n_samples), self.n_features_in_), np.nan))[0]
        if isinstance(self.predictor_.structure, Program):
            return self._unshifted(self._simulate(int(n_samples))[0].double().cpu().numpy())
        reading = self._shared_reading("sample")
        generator = torch.Generator().manual_seed(self._seed())
        draw = torch.randn(
            n_samples, self.n_components_ + len(reading.loc[0]), generator=generator, dtype=torch.float64
        ).to(reading.loc)
        u, e = draw[:, : self.n_components_], draw[:, self.n_components_ :]
        x = reading.loc[0] + u @ reading.loading[0].mT + reading.noise[0].sqrt() * e
        return self._unshifted(x.cpu().numpy())

    def _simulate(self, n_rows: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Rows (N, T) from the fitted program, and the latents that made them."""
        structure = self.predictor_.structure
        if not isinstance(structure, Program) or not structure.by_row or structure.observed_argument != 0:
            raise ValueError(
                f"rows can be drawn where the program observes the cells of X itself and rows are independent, which "
                f"{self.fitted_model_!r} does not"
            )
        rows = as_tensor(np.zeros((n_rows, self.n_features_in_)), self.fitted_model_, self.device)
        with OwnStore() as store:
            store.prefill(self._initial)
            with own_random_state(self._seed()):
                # networks put their parameters into the store
                simulate(self.fitted_model_, (rows,), structure)
            store.begin(self._state)
            with own_random_state(self._seed()):
                return simulate(self.fitted_model_, (rows,), structure)

    def sample_missing(self, X: ArrayLike, y: Any = None, *, n_samples: int = 1) -> NDArray[np.float64]:
        """X with its NaN cells drawn together given the observed cells of the row, for multiple imputation.

        Returns
        -------
        array of shape (n_samples, N, T)

        Raises
        ------
        ValueError
            If the program does not observe the cells of X, or its tokens are not independent given nodes of latents
            (`Importance`, `Quadrature`), unless it is conditioned on the mask: then cells are drawn one by one.
        """
        check_is_fitted(self)
        structure = self.predictor_.structure
        cells = isinstance(structure, Program) and structure.by_row and structure.observed_argument == 0
        if not (cells or self.predictor_.own_masks):
            raise ValueError(
                f"missing cells are drawn where the program observes the cells of X, row by row, and its latents are "
                f"drawn or on a grid, got {self.predictor_.name}: use impute for their means"
            )
        with torch.no_grad():
            try:
                parts = [read.posterior().draws(n_samples) for read in self._read_parts(X, y)]
            except NotImplementedError as error:
                raise ValueError(f"{error}: use impute for their means") from error
        return self._unshifted(torch.cat(parts, 1).double().cpu().numpy())

    def bidirectional(self, n_samples: int = 100) -> Bracket:
        """How far off the LML is, bounded on rows simulated from the fitted model (bidirectional Monte Carlo).

        Annealing from the guide bounds log p(x) from below in expectation, annealing back from the latents that made
        x from above (Grosse, Ghahramani & Adams 2015). ``predictor`` says how: `AnnealedImportance`.

        Returns
        -------
        Bracket
            Of each simulated row, with the mean ``gap`` and its standard error.
        """
        check_is_fitted(self)
        if not isinstance(self.predictor, AnnealedImportance):
            raise ValueError(
                f"bidirectional needs annealing: set_params(predictor=AnnealedImportance()), now {self.predictor!r}"
            )
        rows, latents = self._simulate(n_samples)
        args = (rows,)
        with self._fitted_program(args) as predictor:
            assert isinstance(predictor, Annealed)
            return predictor.bracket(args, latents)

    def get_covariance(self) -> NDArray[np.float64]:
        """Covariance of a row: W W' + diag(noise), (T, T)."""
        reading = self._shared_reading("get_covariance")
        loading = reading.loading[0]
        return (loading @ loading.mT + torch.diag(reading.noise[0])).cpu().numpy()

    def get_precision(self) -> NDArray[np.float64]:
        """Inverse of the covariance, by Woodbury: (T, T)."""
        reading = self._shared_reading("get_precision")
        loading, noise = reading.loading[0], reading.noise[0]
        scaled = loading / noise[:, None]
        inner = torch.eye(loading.shape[1], dtype=loading.dtype, device=loading.device) + loading.mT @ scaled
        return (torch.diag(1 / noise) - scaled @ torch.linalg.solve(inner, scaled.mT)).cpu().numpy()

    def laplace(self, X: ArrayLike) -> Laplace:
        """Evidence of X with loadings and noise variances integrated out (Laplace around the orbit of rotations).

        Raises
        ------
        ValueError
            If the model does not declare that its loadings are free up to rotation (``model.rotations``).
        """
        check_is_fitted(self)
        rows = self._check_rows(X, reset=False)
        statistics = SufficientStatistics(rows, self.device, self._shift)
        shape = self.noise_shape()
        if shape is None:
            raise ValueError(
                f"the Laplace evidence needs a factor model that declares rotations = True, got "
                f"{self.fitted_model_!r}: use evidence='heldout'"
            )
        if not statistics.complete:
            raise ValueError(
                "the Laplace evidence needs complete rows, got missing cells: use evidence='heldout'"
            )
        cov, k = statistics.covariance, self.n_components_
        try:
            with training.one_thread(statistics.n_cells):
                if isinstance(shape, np.ndarray):
                    return laplace_proportional(cov, statistics.n, k, shape)
                return laplace_diagonal(cov, statistics.n, k)
        except NoiseFloorError as error:
            rank = spectrum(cov, np.ones(len(statistics.mean)), 0).rank
            raise ValueError(
                f"{k} latents leave no direction for the noise of these rows (n_samples = {statistics.n}, n_features = "
                f"{len(statistics.mean)}, rank {rank}): use fewer latents, or drop columns that repeat others "
                f"({list_names(map(str, self._names()[repeated_columns(rows)])) or 'none found'})"
            ) from error

    def integrated(self, X: ArrayLike, y: Any = None) -> Integrated:
        """Evidence of X (and y) with the hyper-parameters integrated under the model's hyperprior.

        Importance sampling from a mixture around all modes that are found; see `bayes_mpt.evidence.integrated`.

        Raises
        ------
        ValueError
            If the model offers no prior of its parameters (``model.hyperprior(x, y)``), or its LML is drawn.

        Examples
        --------
        >>> from bayes_mpt.models import GaussianProcess
        >>> rng = np.random.default_rng(0)
        >>> X = rng.uniform(size=(40, 1))
        >>> y = np.sin(6 * X[:, 0]) + 0.1 * rng.normal(size=40)
        >>> model = BayesMPT(GaussianProcess()).fit(X, y)
        >>> found = model.integrated(X, y)
        >>> bool(found.log_evidence < model.log_marginal_likelihood_), bool(found.se < 0.2)
        (True, True)
        """
        check_is_fitted(self)
        rows = self._check_rows(X, reset=False)
        args = self._arguments(rows, y)
        if self.n_hyperparameters() is None:
            raise ValueError(
                f"the integrated evidence needs a model that offers hyperprior(x, y) and an LML without draws, got "
                f"{self.fitted_model_!r}: use evidence='heldout' or 'train'"
            )
        with training.one_thread(len(rows) ** 2), self._fitted_program(args) as predictor:
            problem = training.Problem(predictor, args, None, None, 1)
            leaves = of_program(problem)
            if not leaves:
                return Integrated(float(problem.score()), 0.0, 1.0, math.nan, 1, ())
            prior = hyperprior(self.fitted_model_, args, leaves)
            assert prior is not None
            current = torch.cat([leaf.detach().flatten() for leaf in leaves.values()]).cpu().double().numpy()
            found = integrate(
                log_likelihood(predictor, args, leaves), prior, current=current, seed=self._seed()
            )
        return found._replace(names=tuple(leaves))

    @all_or_nothing
    def move_to_map(self, X: ArrayLike, y: Any, found: Integrated) -> None:
        """Take the maximum a posteriori that `integrated` found on the training rows for the parameters."""
        check_is_fitted(self)
        if not found.modes:
            return
        rows = self._check_rows(X, reset=False)
        args = self._arguments(rows, y)
        with training.one_thread(len(rows) ** 2), self._fitted_program(args) as predictor, torch.no_grad():
            problem = training.Problem(predictor, args, None, None, 1)
            assign(of_program(problem), torch.as_tensor(found.modes[0].theta))
            read = problem.read()
            self.log_marginal_likelihood_ = float(problem.score_of(read))
            self.predictor_ = Frozen(predictor, read)
            self._state = save()
            self.params_ = self._parameters()
        self.at_map_ = True

    def n_hyperparameters(self) -> int | None:
        """For the integrated evidence: how many parameters have a prior; None where it does not apply."""
        check_is_fitted(self)
        names = self.predictor_.structure.parameters
        if (
            self.predictor_.sampled
            or self.predictor_.own_masks
            or (names and not hasattr(self.fitted_model_, "hyperprior"))
        ):
            return None
        return sum(self.params_[name].size for name in names)

    def noise_shape(self) -> NDArray[np.float64] | str | None:
        """For the Laplace evidence: known ratios of the noise variances, "free", or None where it does not apply."""
        check_is_fitted(self)
        structure = self.predictor_.structure
        if not getattr(self.fitted_model_, "rotations", False) or not structure.scores_input:
            return None
        noise = np.atleast_1d(self.params_.get("noise_variance", np.empty(0)))
        if len(noise) == 1:
            return np.ones(self.n_features_in_)
        return "free" if len(noise) == self.n_features_in_ else None

    def explain(self) -> str:
        """How the score is computed, why, what is integrated and what is point-estimated."""
        check_is_fitted(self)
        s = self.predictor_.structure
        latents = list_names(
            f"{site.name} ({'discrete' if site.discrete else site.width} "
            f"{'a row' if site.row_axis is not None else 'in all'})"
            for site in s.latents
        )
        if not s.by_row:
            tokens = f"all observations of site {s.observed!r}, one vector"
        else:
            tokens = f"the {s.n_tokens} observations of site {s.observed!r} in a row; rows are independent"
        read = (
            ""
            if not isinstance(s, AffineForm)
            else (
                "; read on the real rows, since each row has its own map"
                if s.per_row
                else "; read once for all rows"
            )
        )
        kind = self.predictor_.name
        where = ", at their maximum a posteriori under the model's hyperprior" if self.at_map_ else ""
        return "\n".join(
            [
                f"tokens:          {tokens}",
                f"latents:         {latents or 'none'}",
                f"predictor:       {kind}: {self.predictor_.why}{read}",
                f"integrated:      {list_names(s.latent_names) or 'nothing'}",
                f"point-estimated: {', '.join(s.parameters) or 'nothing'}{where}",
                f"training:        {self.fit_method_}, {self.n_iter_} iterations"
                + (", interrupted" if self.interrupted_ else ""),
            ]
        )

    def digest(self, X: ArrayLike) -> str:
        """Fingerprint of a table, to tell whether the model was fitted on it (``data_digest_``)."""
        return digest_of_rows(self._check_rows(X, reset=False))

    @contextmanager
    def read_rows(self, X: ArrayLike, y: Any = None) -> Iterator[Conditionals]:
        """Inside ``with``, where no gradients are tracked: the conditionals of these rows, which are its ``value``."""
        with turn(), left_as_found(store=True):
            check_is_fitted(self)
            rows = self._check_rows(X, reset=False)
            if self.predictor_.structure.scores_input:
                with torch.no_grad():
                    yield self.predictor_.read((self._tensor(rows),))
                return
            # a network's penalties, and the loss of a contrastive head, stand in its scores where gradients are
            with self._read_rows(rows, y) as found, torch.no_grad():
                yield found

    def _read_parts(self, X: ArrayLike, y: Any) -> Iterator[Conditionals]:
        """As `read_rows`, a part of the rows after the other where that can be, to be used as they come."""
        check_is_fitted(self)
        structure = self.predictor_.structure
        if structure.scores_input or not structure.by_row:
            with self.read_rows(X, y) as whole:
                yield whole
            return
        rows = self._check_rows(X, reset=False)
        y = self._targets(y, len(rows))
        step = self._n_at_once(rows)
        parts = [
            self._arguments(rows[i : i + step], None if y is None else y[i : i + step])
            for i in range(0, len(rows), step)
        ]
        with self._fitted_program(parts[0]) as predictor:
            for args in parts:
                with torch.no_grad():
                    read = predictor.read(args)
                yield read

    @contextmanager
    def _read_rows(self, rows: NDArray[np.floating], y: Any) -> Iterator[Conditionals]:
        args = self._arguments(rows, y)
        with self._fitted_program(args) as predictor:
            with torch.no_grad():
                read = predictor.read(args)
            yield read

    @contextmanager
    def _fitted_program(self, args: tuple[Any, ...]) -> Iterator[Bound]:
        """The program at its fitted parameters, on these arguments."""
        if (
            self._fill_values is not None
        ):  # of columns without any cell nothing else tells what values they may have
            args = (fill(args[0], self._fill_values),)
        with OwnStore() as store, own_random_state(self._seed()):
            store.prefill(self._initial)
            predictor = choose(self.fitted_model_, args, predictor=self.predictor, guide=self.fitted_guide_)
            store.begin(self._state)
            yield predictor

    # ------------------------------------------------------------------------------------------------- where it is

    def _sync_device(self) -> None:
        """Bring what the fit left to `device`, where that was set since, or where a file does not know of it."""
        if self.device != self._fitted_on:
            check_device(self.device)
            self.__dict__.update(self._left_by_fit(self.device))

    def _left_by_fit(self, device: str) -> dict[str, Any]:
        """What is no setting, its tensors on this device."""
        settings = self.get_params(deep=False)
        found = moved({k: v for k, v in vars(self).items() if k not in settings}, device)
        return {**found, "_fitted_on": device}

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        # a file may be read where there is no such device
        return {**state, **self._left_by_fit("cpu")} if getattr(self, "_fitted_on", "cpu") != "cpu" else state

    # ------------------------------------------------------------------------------------------------------- checks

    def _check_rows(self, X: ArrayLike, *, reset: bool) -> NDArray[np.floating]:
        if not reset:
            check_is_fitted(self)
            self._sync_device()
        return validate_data(
            self, read_table(X), reset=reset, dtype=[np.float64, np.float32], ensure_all_finite="allow-nan"
        )

    def _targets(self, y: Any, n_rows: int) -> NDArray[Any] | None:
        """The program's second argument; None where it takes none."""
        return None if y is None or not takes_y(self.fitted_model_) else read_numbers(y, n_rows)

    def _arguments(self, rows: NDArray[np.floating], y: Any) -> tuple[Any, ...]:
        return arguments(self.fitted_model_, rows, y, self.device, self._shift)

    def _tensor(self, rows: NDArray[np.floating]) -> Tensor:
        return as_tensor(rows, self.fitted_model_, self.device, self._shift)

    def _is_unfitted(self) -> bool:
        return not hasattr(self, "predictor_")

    def _predicts_y(self) -> bool:
        """Whether there is a y to predict; of a program that is not fitted yet whether it takes one."""
        if self._is_unfitted():
            return self.model is not None and takes_y(self.model)
        return self._y_like is not None

    def _names(self) -> NDArray[Any]:
        """Of the columns, for errors."""
        return getattr(self, "feature_names_in_", np.arange(self.n_features_in_))

    def _shared_reading(self, what: str) -> DenseMap:
        check_is_fitted(self)
        self._sync_device()
        structure, shared = self.predictor_.structure, self.predictor_.shared
        if structure.by_row and not structure.per_row:
            if isinstance(shared, LinearRows):
                return shared.reading
            if isinstance(shared, MarkovRows):
                return shared.dense()
        raise ValueError(f"{what} needs a program whose rows share one map; this one's rows differ")

    def _seed(self) -> int:
        """The same at every call of a fitted estimator, so that scores do not change from call to call."""
        state = self.random_state
        return int(state) if isinstance(state, Integral) else 0

    @staticmethod
    def _dtype_of(X: Any) -> Any:
        dtypes = (
            set(X.dtypes) if hasattr(X, "dtypes") else {getattr(X, "dtype", None)}
        )  # a DataFrame has several
        return np.float32 if dtypes == {np.dtype(np.float32)} else np.float64

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


# ---------------------------------------------------------------------------------------------------------- helpers


_DIVERGING = ContextVar("diverging", default=False)


@contextmanager
def may_diverge(active: bool) -> Iterator[None]:
    """Inside, fits of this thread do not warn of estimates that diverge; filters of warnings are every thread's."""
    token = _DIVERGING.set(active)
    try:
        yield
    finally:
        _DIVERGING.reset(token)


def _warn_of_bounds(prior: Prior, problem: training.Problem) -> None:
    """Say so where an estimate diverges: the likelihood does not hold it."""
    if _DIVERGING.get():
        return
    store = pyro.get_param_store()
    drawn = problem.predictor.sampled or problem.predictor.own_masks
    averaged = "" if drawn else "; evidence='integrated' averages over it"
    held = "" if problem.log_prior is not None else f". penalty=True holds it by the model's prior{averaged}"
    floored = getattr(problem.predictor.model, "floored", None)
    at_floor: dict[str, str] = {} if floored is None else floored(*problem.args)
    for name in dict.fromkeys([*at_floor, *far_from_centre(prior, of_program(problem))]):
        value = np.array2string(store[name].detach().cpu().numpy().ravel(), precision=3, threshold=6)
        why = at_floor.get(name, "towards the end of its range: the data do not determine it")
        warnings.warn(
            f"the estimate of parameter {name!r} diverged to {value}, {why}{held}",
            ConvergenceWarning,
            stacklevel=6,
        )


class _Unwatched:
    """A task that no callback hears of."""

    def call_on_fit_task_begin(self, **about: Any) -> None: ...

    def call_on_fit_task_end(self, **about: Any) -> None: ...


# What a fit says of itself and its training, and what each is in a file.
_NUMBERS_OF_FIT: dict[str, Callable[[Any], Any]] = {
    "log_marginal_likelihood_": float,
    "log_marginal_likelihood_se_": float,
    "history_": lambda values: [float(v) for v in values],
    "n_iter_": int,
    "converged_": bool,
    "noise_at_zero_": lambda names: [str(n) for n in names],
    "fit_method_": str,
    "at_map_": bool,
}


def _found_before(left: dict[str, Any], model: Model, guide: Callable[..., Any] | None) -> training.Fit:
    """Put what a training found (`BayesMPT._dump`) into the parameter store and the networks."""
    here = {name for name, _ in pyro.get_param_store().named_parameters()}
    if here != set(left["parameters"]):
        raise ValueError(
            f"the program has parameters {sorted(here)}, the fit had {sorted(left['parameters'])}"
        )
    load(left["parameters"])
    _set_buffers(left["buffers"], model, guide)
    set_random_states(left["random"])
    return training.Fit(str(left["fit_method_"]))


@torch.no_grad()
def _set_buffers(found: State, model: Any, guide: Any) -> None:
    """Give networks what `BayesMPT._buffers` found in them."""
    for name, value in found.items():
        kind, _, inside = name.partition(".")
        (model if kind == "model" else guide).get_buffer(inside).copy_(value)


def _own_guide(guide: Any, original: Any, model: Model, device: str) -> Any:
    """The model's own by default. A module trains in place: a copy; Pyro's automatic guides keep to our model."""
    if guide is None:
        own = getattr(model, "guide", None)
        return own if callable(own) else None
    if not isinstance(guide, torch.nn.Module):
        return guide
    of = getattr(guide, "_model", None)
    copy = deepcopy(guide).double().to(device)
    if of is not None:
        guide._model = of
    if isinstance(copy, AutoGuide):
        # Pyro's copies lose it, and offer no other way to give it back; it may be a part of our model (poutine.block)
        copy._model = of if of is not None and of[0] is not original else (model,)
    return copy


def warn_of(diagnostics: dict[str, Any]) -> None:
    """Say so where the error of an estimate is unreliable."""
    bad = diagnostics.get("rows_with_bad_k", 0)
    if bad:
        worst = ", ".join(f"{row} (k = {k:.2f})" for row, k in diagnostics["worst_rows"][:3])
        warnings.warn(
            f"the importance weights of {bad} rows have a tail so heavy (Pareto k > 0.7) that their error is "
            f"unreliable, the worst being rows {worst}: use more particles or a wider guide",
            UserWarning,
            stacklevel=8,
        )
    sd = diagnostics.get("log_weight_sd", 0.0)
    if sd > WIDE and math.isnan(diagnostics["pareto_k"]):  # too few for a tail to be fitted
        warnings.warn(
            f"the importance weights of a row spread over {sd:.1f} nats (standard deviation, on average), of which "
            f"{diagnostics['num_particles']} draws cover too little: the evidence is probably too low by more than its "
            "error. Use more particles, or more temperatures where they are annealed",
            UserWarning,
            stacklevel=8,
        )
