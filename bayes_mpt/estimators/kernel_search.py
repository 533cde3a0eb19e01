"""Discover the kernel of a Gaussian process: sums and products grown from a base set, ranked by evidence.

A candidate is a sum of products, each with a scale of its own. From the best so far the next ones come by adding a base
kernel, multiplying one product by it, or exchanging one factor (Duvenaud, Lloyd, Grosse, Tenenbaum & Ghahramani 2013).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pandas as pd
from gpytorch.kernels import (
    AdditiveKernel,
    Kernel,
    MaternKernel,
    PeriodicKernel,
    ProductKernel,
    RBFKernel,
    RQKernel,
    ScaleKernel,
)
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm
from sklearn.base import BaseEstimator, MetaEstimatorMixin, _fit_context, clone
from sklearn.callback import CallbackSupportMixin
from sklearn.utils import check_array
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted

from bayes_mpt.estimators.bayes_mpt import BayesMPT
from bayes_mpt.estimators.candidates import model_in
from bayes_mpt.estimators.decomposition import Decomposition, decompose, describe, process_of
from bayes_mpt.estimators.partial import Finished, Partial, finished_table
from bayes_mpt.estimators.rules import RULES, Auto, Rule, rule_of
from bayes_mpt.estimators.search import MarginalLikelihoodSearch
from bayes_mpt.inputs import read_table
from bayes_mpt.models import GaussianProcess
from bayes_mpt.models.kernels import Line, lines_meet
from bayes_mpt.runtime.interrupts import interruptible
from bayes_mpt.runtime.serial import restored_on_failure

__all__ = ["KernelSearch"]

Expression = tuple[tuple[int, ...], ...]
"""A sum of products of base kernels by their place, sorted."""

ENDS = 0.01  # nats, by which the ends of trainings of one likelihood differ


class KernelSearch(MetaEstimatorMixin, CallbackSupportMixin, BaseEstimator):
    """Grow the kernel of a Gaussian process from a base set, greedily, and keep the best by evidence.

    Parameters
    ----------
    estimator : BayesMPT, optional
        With a `bayes_mpt.models.GaussianProcess`, whose kernel the search sets. Its noise is the white part of every
        candidate.
    base : sequence of gpytorch kernels, optional
        Without scales. Default: RBF, Matern 1/2, 3/2 and 5/2, periodic, rational quadratic and linear along each
        column of X.
    max_depth : int, default=4
        Base kernels in an expression, at most.
    evidence : str or rule of evidence, default="auto"
        As in `MarginalLikelihoodSearch`. "train", the LML at its maximum, never finds a kernel too large.
    n_jobs : int, optional
        Candidates evaluated at a time, by joblib.
    error_score : "raise" or float, default=nan
        What a candidate that cannot be fitted scores.
    random_state : int, RandomState or None
    verbose : int, default=0
        1 shows at each depth what `MarginalLikelihoodSearch` does; log and callbacks are as there, the depths a stage
        above.

    Attributes
    ----------
    comparison_ : DataFrame
        All candidates that were tried, best first; see `MarginalLikelihoodSearch`. Its column ``depth`` tells when.
    best_estimator_ : BayesMPT
        With the best kernel, fitted.
    best_kernel_ : str
        Its name.
    best_score_ : float
        Its evidence, nats.
    path_ : list of str
        The best of each depth.
    evidence_, evidence_reason_ : str
        The rule that was used, and why.
    partial_ : DataFrame
        Only after Ctrl-C: what was finished until then, as of `MarginalLikelihoodSearch`, with the column ``depth``.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x = np.linspace(0, 10, 60)[:, None]
    >>> y = np.sin(2 * np.pi * x[:, 0]) + 0.1 * rng.normal(size=60)
    >>> search = KernelSearch(base=[PeriodicKernel(), RBFKernel()], max_depth=1).fit(x, y)
    >>> search.describe(unit="years")
    'a period of 1.00 years, plus noise of sd 0.0...'
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "estimator": "no_validation",  # in words of ours
        "base": ["array-like", None],
        "max_depth": [Interval(Integral, 1, None, closed="left")],
        "evidence": [str, *RULES],
        "n_jobs": [Integral, None],
        "error_score": [StrOptions({"raise"}), Real],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        estimator: BayesMPT | None = None,
        *,
        base: Sequence[Kernel] | None = None,
        max_depth: int = 4,
        evidence: str | Rule | Auto = "auto",
        n_jobs: int | None = None,
        error_score: float | Literal["raise"] = math.nan,
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
    ):
        self.estimator = estimator
        self.base = base
        self.max_depth = max_depth
        self.evidence = evidence
        self.n_jobs = n_jobs
        self.error_score = error_score
        self.random_state = random_state
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=False)
    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Grow and rank kernels on inputs X (N, P) and observations y (N,), NaN where missing.

        The growth ends where the best of a depth is not better than the best so far by more than the error of their
        difference, or than 0.01 nats, by which trainings to the same tolerance differ. Ctrl-C ends it as it does
        `MarginalLikelihoodSearch.fit`.
        """
        finished: list[pd.DataFrame] = []
        root = self._init_callback_context(max_subtasks=self.max_depth)

        def table() -> pd.DataFrame:
            return pd.concat(finished) if finished else Finished().table().assign(depth=1)

        with interruptible(), Partial(self, table), restored_on_failure(self):
            self._fit(X, y, finished, root)
        return self

    def _fit(self, X: ArrayLike, y: ArrayLike, finished: list[pd.DataFrame], root: Any) -> None:
        estimator = BayesMPT(GaussianProcess()) if self.estimator is None else self.estimator
        words = "KernelSearch needs BayesMPT(GaussianProcess(...))"
        model = model_in(estimator, "estimator")
        process = process_of(model.model if model is estimator else estimator, words)
        X = read_table(X)
        width = check_array(X, ensure_all_finite="allow-nan").shape[1]
        base = _default_base(width, process.noise_column) if self.base is None else list(self.base)
        for kernel in base:
            if not isinstance(kernel, Kernel) or isinstance(kernel, ScaleKernel):
                raise TypeError(f"base must hold kernels of gpytorch without a ScaleKernel, got {kernel!r}")
        if not base:
            raise ValueError("base is empty: give at least one kernel")
        rule_of(self.evidence)
        root.call_on_fit_task_begin(estimator=self, X=X, y=y)
        tried: set[Expression] = set()
        tables: list[pd.DataFrame] = []
        best, self.path_ = None, []
        candidates: list[Expression] = [((i,),) for i in range(len(base))]
        for depth in range(1, self.max_depth + 1):
            candidates = [c for c in dict.fromkeys(candidates) if c not in tried]
            if not candidates:
                break
            tried.update(candidates)
            search = MarginalLikelihoodSearch(
                clone(estimator),
                {"model__kernel": [_kernel(c, base) for c in candidates]},
                evidence=self.evidence,
                n_jobs=self.n_jobs,
                error_score=self.error_score,
                random_state=self.random_state,
                verbose=self.verbose,
            )
            level = root.subcontext(task_name="depth")
            try:
                with level.propagate_callback_context(search):
                    level.call_on_fit_task_begin(estimator=self, X=X, y=y)
                    search.fit(X, y)
            except KeyboardInterrupt:
                if hasattr(search, "partial_"):
                    finished.append(search.partial_.assign(depth=depth))
                raise
            level.call_on_fit_task_end(estimator=self, X=X, y=y)
            finished.append(finished_table(search).assign(depth=depth))
            table = search.comparison_.assign(depth=depth)
            tables.append(table)
            self.path_.append(table.index[0])
            leader = table.iloc[0]
            error = 0.0 if best is None else math.hypot(*np.nan_to_num([leader["se"], self._best_se]), ENDS)
            if best is not None and not leader["lml"] > self.best_score_ + error:
                break
            best = candidates[search.best_index_]
            self.best_score_, self._best_se = float(leader["lml"]), float(leader["se"])
            self.best_estimator_, self.best_kernel_ = search.best_estimator_, str(table.index[0])
            self.evidence_, self.evidence_reason_ = search.evidence_, search.evidence_reason_
            candidates = _grown(best, base)
        self.comparison_ = _joined(tables)
        root.call_on_fit_task_end(estimator=self, X=X, y=y)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "best_estimator_")  # partial_ alone is no fit

    def predict(self, X: ArrayLike, return_std: bool = False, return_cov: bool = False) -> Any:
        """As `BayesMPT.predict`, by the best kernel."""
        return self._best.predict(X, return_std=return_std, return_cov=return_cov)

    def sample_y(self, X: ArrayLike, n_samples: int = 1, random_state: int | None = 0) -> NDArray[np.float64]:
        """As `BayesMPT.sample_y`, by the best kernel."""
        return self._best.sample_y(X, n_samples, random_state)

    def score_samples(self, X: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
        """Nats of each new y given the training rows."""
        return self._best.score_samples(X, y)

    def score(self, X: ArrayLike, y: ArrayLike) -> float:
        """Mean of `score_samples`."""
        return self._best.score(X, y)

    @property
    def n_features_in_(self) -> int:
        """Columns of X in `fit`."""
        if not hasattr(self, "best_estimator_"):
            raise AttributeError("not fitted")
        return int(self.best_estimator_.n_features_in_)

    @property
    def _best(self) -> BayesMPT:
        check_is_fitted(self, "best_estimator_")
        return self.best_estimator_

    def decompose(self, X: ArrayLike | None = None) -> Decomposition:
        """The additive parts of the best kernel at rows X, by default those of the training."""
        return decompose(self._best, X)

    def describe(self, unit: str = "") -> str:
        """The best kernel in words, from its fitted hyper-parameters.

        Parameters
        ----------
        unit : str
            Of the inputs, such as "years".
        """
        return describe(self._best, unit)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.estimator_type = "regressor"
        tags.target_tags.required = True
        tags.input_tags.allow_nan = False
        return tags


# ---------------------------------------------------------------------------------------------------- expressions


def _default_base(width: int, noise_column: int | None) -> list[Kernel]:
    columns = range(width - (noise_column is not None))
    out: list[Kernel] = []
    for c in columns:
        where: dict[str, Any] = {} if len(columns) == 1 else {"active_dims": [c]}
        out += [
            RBFKernel(**where),
            *(MaternKernel(nu=nu, **where) for nu in (0.5, 1.5, 2.5)),
            PeriodicKernel(**where),
            RQKernel(**where),
            Line(**where),
        ]
    return out


def _grown(best: Expression, base: list[Kernel]) -> list[Expression]:
    """One more base kernel in a sum or a product, or another one in place of one."""
    out = []
    for i in range(len(base)):
        out.append((*best, (i,)))
        for t, product in enumerate(best):
            rest = best[:t] + best[t + 1 :]
            out.append((*rest, (*product, i)))
            out += [(*rest, (*product[:f], i, *product[f + 1 :])) for f in range(len(product))]
    tidy = [tuple(sorted(tuple(sorted(product)) for product in e)) for e in out]
    return [e for e in tidy if not _redundant(e, base)]


def _redundant(expression: Expression, base: list[Kernel]) -> bool:
    """Whether a smaller expression says the same: only lines gain by being multiplied, and lose by being added."""
    lines = {i for i, k in enumerate(base) if lines_meet(k) is not None}
    squares = any(i not in lines and product.count(i) > 1 for product in expression for i in product)
    return squares or any(expression.count((i,)) > 1 for i in lines)


def _kernel(expression: Expression, base: list[Kernel]) -> Kernel:
    terms = []
    for product in expression:
        factors = [deepcopy(base[i]) for i in product]
        terms.append(ScaleKernel(factors[0] if len(factors) == 1 else ProductKernel(*factors)))
    return terms[0] if len(terms) == 1 else AdditiveKernel(*terms)


def _joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """One table of those of all depths, in their columns, against the best of all."""
    out = pd.concat(tables).sort_values("lml", ascending=False, kind="stable")
    best, others = out.iloc[0], np.arange(len(out)) > 0
    diff = out["lml"] - best["lml"]
    out["rank"] = np.arange(len(out))
    out["lml_diff"] = diff
    out["mc_dse"] = np.where(others, np.hypot(out["se"], best["se"]), 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        out["p_worse"] = np.where(others, norm.cdf(-np.abs(diff) / out["mc_dse"]), math.nan)
    if out["weight"].notna().any():
        out["weight"] = np.exp(diff) / np.exp(diff).sum()
        out["log_bayes_factor"] = diff
    return out
