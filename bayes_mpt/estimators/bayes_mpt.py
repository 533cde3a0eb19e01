"""BayesMPT: any Pyro program as a scikit-learn estimator, trained on the masked score."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    DensityMixin,
    TransformerMixin,
    _fit_context,
    clone,
)
from sklearn.callback import CallbackSupportMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from bayes_mpt.estimators import availability, predictions, sampling
from bayes_mpt.estimators.adapted import CURABLE, Adapted, adapted_to
from bayes_mpt.estimators.availability import is_unfitted, takes_labels
from bayes_mpt.estimators.averaging import averaged
from bayes_mpt.estimators.fit import fit_program
from bayes_mpt.estimators.fitted import OPTIONAL, Fitted
from bayes_mpt.estimators.labelled import Labelled
from bayes_mpt.estimators.names import check_names
from bayes_mpt.estimators.report import Unwatched, explain, iterated, shown
from bayes_mpt.estimators.rows import check_program, checked_rows, dtype_of, takes_y
from bayes_mpt.estimators.stored_fit import restored
from bayes_mpt.estimators.trainer import trainer_of
from bayes_mpt.estimators.weighed import Weighed
from bayes_mpt.inputs import like_table, read_numbers, unmasked, widths_of
from bayes_mpt.masks import Policy
from bayes_mpt.models import PPCA
from bayes_mpt.predictors import Conditionals, Predictor
from bayes_mpt.program.devices import check_device
from bayes_mpt.program.program import Model
from bayes_mpt.runtime.interrupts import discarded, interruptible
from bayes_mpt.runtime.progress import Line, part
from bayes_mpt.runtime.serial import left_as_found, methods_take_turns, turn
from bayes_mpt.score import ScoreEstimate
from bayes_mpt.training import Ascent, Epochs, Steps, Training
from bayes_mpt.warnings import ZeroNoiseWarning, warnings_of

__all__ = ["BayesMPT"]


@methods_take_turns(store=True, but=("fit", "partial_fit"), inherited=("fit_transform",))
class BayesMPT(
    Weighed,
    Labelled,
    CallbackSupportMixin,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    DensityMixin,
    BaseEstimator,
):
    """Train a Pyro program on its cumulative masked score, the log marginal likelihood (LML), and score rows by it.

    Parameters
    ----------
    model : callable, optional
        A Pyro program called as ``model(x)``, or ``model(x, y)`` where y is given to `fit`; one of
        `bayes_mpt.models`, a function, or a `PyroModule` (copied before it is trained). None is PPCA with the latent
        dimension ranked automatically. What it may offer beside: `bayes_mpt.program.offers.Offers`.
    guide : callable, optional
        Where latents that cannot be integrated are drawn from; trained with the program (copied if it is a module).
        Unused where the score is exact. None takes ``model.guide``, where there is one.
    masks : Policy, optional
        Train on masks drawn from this policy. None maximises the exact score, deterministically. Programs
        ``model(x, visible)`` are trained on one mask a row and step, by default of `UniformSize`; on `LeaveOneOut`,
        the pseudo-likelihood, by `Ascent`.
    predictor : Predictor or "auto", default="auto"
        How hidden tokens are predicted, such as ``Quadrature(64)``; "auto" takes the most exact way that fits the
        program (`bayes_mpt.predictors.choose`), and `explain` says which and why.
    training : Ascent, Steps or Epochs, optional
        How it is trained (`bayes_mpt.training`). None takes what fits: `Ascent` of an exact score, `Steps` of Adam
        where the score is drawn or ``masks`` are, `Epochs` of minibatches where the model has a ``batch_size``.
    n_init : int or "auto", default="auto"
        Starts where the maximum has no closed form; the best is kept. Further ones are drawn from the hyperprior of a
        model that has one, such as `bayes_mpt.models.GaussianProcess`, else (and for programs ``model(x, visible)``)
        from the program's initial values. "auto" is 1, but 8 where cells are missing and the rows share a
        linear-Gaussian map: there are local maxima and saddles. Such a map with free mean, loadings and noise is
        fitted by an EM, one start of which is made of the pairs of cells observed together; L-BFGS goes on from the
        best. Of other programs "auto" tries 4 starts for a few steps.
    penalty : bool, default=False
        Maximise the score plus the log prior (maximum a posteriori): the hyperprior of the model's parameters, or, of
        PPCA and factor analysis, that of the noise variances, Gamma(2, 2 / column's variance) seen from their
        logarithms, which holds them above zero. What is reported as a log marginal likelihood never includes it.
    average : "posterior", optional
        Of a factor model: score, impute and sample by the mean of the Gaussian over the posterior of loadings, noise
        variances and mean, under the prior of `bayes_mpt.evidence.factor_prior`, in place of that at the maximum.
        `log_marginal_likelihood_` is then the log evidence, ``log_likelihood_`` that of the training rows as they are
        scored, ``components_`` and ``noise_variance_`` are means over the posterior; `explain` states the prior.
    warm_start : bool, default=False
        Start from the parameters of the last fit.
    random_state : int, RandomState or None
        For initial values, masks and draws.
    device : str, default="cpu"
        Where the algebra is done, such as "cuda". A fitted estimator follows it; in a file all is on the CPU.
    verbose : int, default=0
        1 shows on stderr where the training is, and at its end what it came to.

    Attributes
    ----------
    log_marginal_likelihood_ : float
        Total nats of the training rows' observed cells, at the fitted parameters; of many rows under a program
        ``model(x, visible)`` an unbiased estimate from a few random masks for each row.
    log_likelihood_ : float
        The same of the rows as they are scored now; another number only with ``average``.
    log_marginal_likelihood_se_ : float
        Its standard error over masks; 0 where it is exact.
    params_ : dict of arrays
        The program's parameters.
    history_ : list of float
        Mean score a row after each iteration; of what is maximised, a ``penalty`` included, where no rows are held out.
    n_iter_ : int
        Iterations, those of an EM before included, whose scores are not in ``history_``; 1 where a model's own
        ``maximize`` has reached the maximum, of whose steps it does not tell.
    converged_ : bool
        Whether the training ended by its own rule.
    interrupted_ : bool
        Whether Ctrl-C has cut the training short, at the best parameters until then.
    noise_at_zero_ : list of str
        Columns whose noise variance is zero (1e-8 of theirs: a density needs a width): warned of; with missing cells.
    predictor_ : Predictor
        Frozen: needs neither program nor parameter store.
    n_components_ : int
        K.
    components_, mean_, noise_variance_ : arrays
        (K, T), (T,), (T,): the linear-Gaussian map in units of standard normal latents, where all rows share it; one
        number is the noise of a model that says so.
    weights_, means_, covariances_, precisions_, precisions_cholesky_ : arrays
        Of a mixture of Gaussians, as in ``sklearn.mixture.GaussianMixture``.
    at_map_ : bool
        Whether the parameters are at the maximum a posteriori (``penalty``, or a prior that the model always adds), not
        at that of the score.
    complete_ : bool
        Whether no cell of the training rows was missing.
    data_digest_ : str
        Fingerprint of the training rows; empty after `partial_fit`, which has seen others before.
    selection_ : dict
        Where "auto" chose the dimension: ``{K: log evidence}``; with missing cells up to three beyond the best.
    fitted_ : Fitted
        All of this in one object that never changes.
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
        "training": [Ascent, Steps, Epochs, None],
        "n_init": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "penalty": ["boolean"],
        "average": [StrOptions({"posterior"}), None],
        "warm_start": ["boolean"],
        "random_state": ["random_state"],
        "device": [str],
        "verbose": ["verbose"],
    }

    fitted_: Fitted

    def __init__(
        self,
        model: Model | None = None,
        *,
        guide: Callable[..., Any] | None = None,
        masks: Policy | None = None,
        predictor: Predictor | str = "auto",
        training: Training | None = None,
        n_init: int | Literal["auto"] = "auto",
        penalty: bool = False,
        average: Literal["posterior"] | None = None,
        warm_start: bool = False,
        random_state: int | np.random.RandomState | None = None,
        device: str = "cpu",
        verbose: int = 0,
    ):
        self.model = model
        self.guide = guide
        self.masks = masks
        self.predictor = predictor
        self.training = training
        self.n_init = n_init
        self.penalty = penalty
        self.average = average
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
            copied. Of a program ``model(x1, x2, y)`` a tuple of tables, ``fit((x1, x2), y)``.
        y : array-like of shape (N, ...), optional
            Second argument of the program, if it takes one; the last of several.

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
        return self._train(X, y, self._init_callback_context(max_subtasks=None))

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Add rows to those seen so far and fit again, from the last parameters.

        Of complete rows only mean and covariance are kept, so a stream of any length fits in memory. Programs that
        are read on their own rows (covariates) cannot be fitted by parts.
        """
        context = self._init_callback_context(max_subtasks=None)
        return self._train(X, y, context, goes_on=not is_unfitted(self))

    def refit(self, X: ArrayLike, y: Any = None, *, random_state: int | None = None) -> Self:
        """A new estimator of the same settings, fitted to other rows.

        As ``clone(self).fit(X, y)``, from initial values of its own, which have seen no rows but these; only what the
        program is made of is known already, where rows share a map. ``random_state`` is taken if it has none.
        """
        template, new = self._current(), clone(self)
        if new.random_state is None:
            new.random_state = random_state
        new._template = template
        with discarded(), part(new, X, y):  # after Ctrl-C nobody would see it
            return new.fit(X, y)

    def _train(self, X: ArrayLike, y: Any, context: Any, *, goes_on: bool = False) -> Self:
        """Fit; ``goes_on``: rows seen before count too."""
        said = shown(self) if self.verbose else nullcontext()
        with turn(), interruptible(), left_as_found(store=True, estimator=self), said as line:
            more = self._current() if goes_on else None
            if more is not None and more.statistics is None:
                raise ValueError(
                    "partial_fit needs a program whose rows share one map; fit this one on all rows at once"
                )
            # of all rows an exact fit ends at the maximum in any case
            warm = self.masks is not None if goes_on else self.warm_start
            start = self._current() if warm and not is_unfitted(self) else None
            self._fit(X, y, context, line, more=more, start=start)
        if self.interrupted_:  # its attributes are all of one fit, so that Ctrl-C can be raised
            raise KeyboardInterrupt
        return self

    def _fit(self, X: ArrayLike, y: Any, context: Any, line: Line | None, **before: Any) -> None:
        """Fit, with what `fit_program` takes of other fits."""
        if self.device != "cpu":
            check_device(self.device)
        template: Fitted | None = self.__dict__.pop("_template", None)
        model = PPCA() if self.model is None else self.model
        with_y = y is not None and takes_y(model)
        widths = widths_of(X) if isinstance(X, tuple) else None
        check_program(model, with_y=with_y, n_inputs=1 if widths is None else len(widths))
        if self.guide is not None:
            check_program(self.guide, with_y=with_y, name="guide")
        X = checked_rows(self, X, reset=before.get("more") is None)
        y = read_numbers(y, len(X)) if with_y else None
        context.call_on_fit_task_begin(estimator=self, X=X, y=y)
        trainer = trainer_of(self, model, getattr(self, "feature_names_in_", np.arange(self.n_features_in_)))
        trainer = replace(trainer, report=partial(iterated, self, context, line, trainer.by_epochs))
        before |= {"device": self.device, "penalty": bool(self.penalty), "template": template}
        if self.average is not None and before.get("more") is not None:
            raise ValueError("average='posterior' needs all rows at once: call fit, not partial_fit")
        # of a maximum that scores nothing
        with nullcontext() if self.average is None else warnings_of(silent=(ZeroNoiseWarning,)):
            adapted = None if widths is None else Adapted(model, widths=widths)
            fitted = None
            while fitted is None:
                try:
                    fitted = fit_program(
                        model if adapted is None else adapted, self.guide, X, y, trainer, **before
                    )
                except CURABLE as error:
                    adapted = adapted_to(error, model, adapted, X, y, self.device)
        if self.average is not None:
            fitted = averaged(fitted.with_settings(self.predictor, self._draws), X)
        self._keep(fitted)
        context.call_on_fit_task_end(estimator=self, X=X, y=y)

    def _restore(self, X: ArrayLike, y: Any, left: dict[str, Any]) -> Self:
        """Be as a fit to X has left an estimator of the same settings (`stored_fit.dump`), without training."""
        with turn(), left_as_found(store=True, estimator=self), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what there is to warn of was said by the fit
            self._fit(X, y, Unwatched(), None, left=left)
            self._keep(restored(self.fitted_, left))
        return self

    # ------------------------------------------------------------------------------------------------ what it has

    def set_params(self, **params: Any) -> Self:
        """Set settings, ``training__learning_rate`` too; see scikit-learn."""
        check_names(self, params)
        return super().set_params(**params)

    def _keep(self, fitted: Fitted) -> None:
        for name in OPTIONAL:
            self.__dict__.pop(name, None)
        self.__dict__.update(fitted.attributes(), fitted_=fitted)

    def _current(self) -> Fitted:
        """What the fit left, on the device that is set now, and read as the settings now say."""
        check_is_fitted(self)
        if self.device != self.fitted_.device:
            self._keep(self.fitted_.moved(self.device))
        return self.fitted_.with_settings(self.predictor, self._draws)

    @property
    def _draws(self) -> int:
        """Seed of the same draws at every call, so that scores do not change from call to call."""
        return int(self.random_state) if isinstance(self.random_state, Integral) else 0

    def _ready(self, X: ArrayLike) -> tuple[Fitted, NDArray[np.floating]]:
        """What the fit left, and rows that it is asked about."""
        return self._current(), checked_rows(self, X, reset=False)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if is_unfitted(self) or self.fitted_.device == "cpu":
            return state
        here = self.fitted_.moved("cpu")  # a file may be read where there is no such device
        return {**state, **here.attributes(), "fitted_": here}

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    # ------------------------------------------------------------------------------------------------- what it says

    def score_samples(self, X: ArrayLike, y: Any = None) -> NDArray[np.float64]:
        """Log marginal likelihood of each row's observed cells.

        Nats (N,). A program whose rows are tokens of one vector (a latent outside the rows plate) has one number, the
        LML of all rows together; where the observations are one Gaussian vector (a Gaussian process), each y alone
        given the training rows, NaN where y is missing. `score_rows` returns their error too.
        """
        return self.score_rows(X, y)[0]

    def score_rows(self, X: ArrayLike, y: Any = None) -> tuple[NDArray[np.float64], float]:
        """`score_samples` (N,) and the standard error of their sum, sqrt(N) that of one; 0 where the score is exact."""
        return predictions.score_rows(*self._ready(X), y)

    def score(self, X: ArrayLike, y: Any = None) -> float:
        """Mean of `score_samples`, nats a row."""
        return float(self.score_samples(X, y).mean())

    def estimate(
        self, X: ArrayLike, y: Any = None, *, masks: Policy | None = None, n_replicates: int = 8
    ) -> ScoreEstimate:
        """Log marginal likelihood of rows with its error over masks, and the masked curve S(x; m).

        Parameters
        ----------
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
        return predictions.estimate_score(*self._ready(X), y, masks, n_replicates)

    def transform(self, X: ArrayLike, y: Any = None) -> NDArray[np.floating]:
        """Posterior means of the latents given each row's observed cells, shape (N, K), in the dtype of X.

        Of discrete latents the probabilities of their values.
        """
        return predictions.latent_means(*self._ready(X), y).astype(dtype_of(X), copy=False)

    def inverse_transform(self, Z: ArrayLike) -> NDArray[np.floating]:
        """Means of the tokens given latents: (N, K) -> (N, T)."""
        fitted = self._current()
        latents = check_array(unmasked(Z), dtype=np.float64)
        return predictions.token_means_of(fitted, latents).astype(dtype_of(Z), copy=False)

    def impute(self, X: ArrayLike, y: Any = None, return_std: bool = False) -> Any:
        """X with its NaN cells replaced by their means given the observed cells of the row; a DataFrame of a DataFrame.

        With ``return_std`` also their standard deviations (N, T), 0 where observed, where rows share a linear-Gaussian
        map; of other programs `sample_missing` draws the cells.
        """
        found = like_table(X, predictions.impute(*self._ready(X), y).astype(dtype_of(X), copy=False))
        return (found, like_table(X, predictions.missing_sd(*self._ready(X)))) if return_std else found

    @available_if(availability.takes_labels)
    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Probabilities of the values of each row's one discrete latent given its observed cells: (N, K).

        Of a mixture, of its components. A row without any observed cell has those before any data.
        """
        return predictions.label_probabilities(*self._ready(X))

    @available_if(availability.predicts)
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
        fitted = self._current()
        if return_std and return_cov:
            raise ValueError("ask for return_std or return_cov, not both")
        if not takes_labels(self):
            rows = checked_rows(self, X, reset=False)
            return predictions.predict_y(fitted, rows, return_std=return_std, return_cov=return_cov)
        if return_std or return_cov:
            raise ValueError("labels have neither return_std nor return_cov: see predict_proba")
        return self.predict_proba(X).argmax(1)

    @available_if(availability.predicts_vector)
    def sample_y(self, X: ArrayLike, n_samples: int = 1, random_state: int | None = 0) -> NDArray[np.float64]:
        """Draw observations of new rows together, given the training rows: (M, n_samples)."""
        mean, cov = self.predict(X, return_cov=True)
        return check_random_state(random_state).multivariate_normal(mean, cov, n_samples).T

    def sample(self, n_samples: int = 1) -> NDArray[np.float64]:
        """Draw rows (n_samples, T), or so many steps of a series that reads its own past: the same at every call."""
        return sampling.draw_rows(self._current(), n_samples)

    def sample_missing(self, X: ArrayLike, y: Any = None, *, n_samples: int = 1) -> NDArray[np.float64]:
        """X with its NaN cells drawn together given the observed cells of the row: (n_samples, N, T).

        Raises
        ------
        ValueError
            If the program does not observe the cells of X, or its tokens are not independent given nodes of latents
            (`Importance`, `Quadrature`), unless it is conditioned on the mask: then cells are drawn one by one.
        """
        return sampling.draw_missing(*self._ready(X), y, n_samples)

    def get_covariance(self) -> NDArray[np.float64]:
        """Covariance of a row: W W' + diag(noise), (T, T)."""
        return predictions.covariance(self._current())

    def get_precision(self) -> NDArray[np.float64]:
        """Inverse of the covariance, by Woodbury: (T, T)."""
        return predictions.precision(self._current())

    def explain(self) -> str:
        """How the score is computed, why, what is integrated and what is point-estimated."""
        return explain(self._current())

    @contextmanager
    def read_rows(self, X: ArrayLike, y: Any = None) -> Iterator[Conditionals]:
        """Inside ``with``, where no gradients are tracked: the conditionals of these rows, which are its ``value``."""
        with turn(), left_as_found(store=True):
            fitted, rows = self._ready(X)
            with fitted.read(rows, y) as found:
                yield found
