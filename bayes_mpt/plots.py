"""Pictures: the area under the masked curve, and a ranking. Matplotlib is imported when they are drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from bayes_mpt.curves import Curve, RateCurve
from bayes_mpt.inputs import unmasked

if TYPE_CHECKING:
    from bayes_mpt.estimators.decomposition import Decomposition

__all__ = ["DecompositionDisplay", "MaskedCurveDisplay", "RankingDisplay"]


class MaskedCurveDisplay:
    """The masked curve S(x; m) against the number of hidden tokens, or their share; the area under it is the LML.

    Parameters
    ----------
    curve : Curve or RateCurve
        `bayes_mpt.score.ScoreEstimate.by_size`, or `bayes_mpt.language.MaskedLanguageModel.masked_curve`.

    Attributes
    ----------
    ax_, figure_, line_, errorbar_ : matplotlib artists
        After `plot`.
    """

    def __init__(self, curve: Curve | RateCurve):
        self.curve = curve

    @classmethod
    def from_estimator(cls, estimator: Any, X: ArrayLike, y: Any = None, *, ax: Any = None) -> Self:
        """Estimate the curve of a fitted `BayesMPT` on rows X and draw it."""
        return estimator.estimate(X, y).plot(ax)

    def plot(self, ax: Any = None, *, label: str | None = None, color: str | None = None) -> Self:
        """Draw on ``ax``, or on new axes."""
        self.ax_, self.figure_ = _axes(ax)
        label_x, unit = self.curve.labels
        area = f"{self.curve.area:.2f} {unit}"
        drawn = ~np.isnan(self.curve.mean)
        size, mean, se = (a[drawn] for a in self.curve)
        (self.line_,) = self.ax_.plot(size, mean, label=label, color=color)
        band = 2 * np.nan_to_num(se)
        self.errorbar_ = self.ax_.fill_between(
            size, mean - band, mean + band, alpha=0.3, color=self.line_.get_color()
        )
        self.ax_.fill_between(size, mean, 0, alpha=0.08, color=self.line_.get_color(), linewidth=0)
        self.ax_.set(
            xlabel=label_x,
            ylabel="S(m), nats per hidden token",
            title=f"area under the masked curve: {area}",
        )
        return self


class RankingDisplay:
    """Candidates by evidence, as differences from the best.

    Parameters
    ----------
    comparison : DataFrame
        `bayes_mpt.MarginalLikelihoodSearch.comparison_`, or what `bayes_mpt.compare` returned.

    Attributes
    ----------
    ax_, figure_, errorbar_ : matplotlib artists
        After `plot`.
    """

    def __init__(self, comparison: pd.DataFrame):
        self.comparison = comparison

    @classmethod
    def from_search(cls, search: Any, *, ax: Any = None) -> Self:
        """Draw the ranking of a fitted `bayes_mpt.MarginalLikelihoodSearch`."""
        return cls(search.comparison_).plot(ax)

    def plot(self, ax: Any = None, *, n_best: int | None = None) -> Self:
        """Draw the ``n_best`` candidates, or all; bars are one ``dse``, the spread over new rows."""
        table = self.comparison.dropna(subset=["lml"]).iloc[:n_best][::-1]
        self.ax_, self.figure_ = _axes(ax, height=1.2 + 0.28 * len(table))
        place = np.arange(len(table))
        self.errorbar_ = self.ax_.errorbar(
            table["lml_diff"],
            place,
            xerr=table["dse"].fillna(0),
            fmt="o",
            ms=5,
            lw=1,
            color="C0",
            ecolor="0.7",
        )
        if table["lml_diff"].min() < -100:  # the leaders' gaps would vanish beside the laggards'
            self.ax_.set_xscale("symlog", linthresh=10)
        self.ax_.axvline(0, color="0.5", lw=0.8, ls=":")
        self.ax_.set_yticks(place, list(table.index))
        self.ax_.set(
            xlabel=f"log evidence below the best, nats ({self.comparison['diag'].iloc[0].partition(';')[0]})"
        )
        return self


class DecompositionDisplay:
    """A series and the additive parts of its Gaussian process, one below the other.

    Parameters
    ----------
    x : array of shape (M,)
        The input of each row, of one column.
    parts : Decomposition
        `bayes_mpt.decompose` at these rows.
    seen : tuple of arrays, optional
        Inputs and observations to draw above.

    Attributes
    ----------
    axes_, figure_ : matplotlib artists
        After `plot`.
    """

    def __init__(self, x: ArrayLike, parts: Decomposition, seen: tuple[ArrayLike, ArrayLike] | None = None):
        self.x = np.ravel(x)
        self.parts = parts
        self.seen = seen

    @classmethod
    def from_estimator(
        cls, estimator: Any, X: ArrayLike, y: ArrayLike | None = None, *, at: ArrayLike | None = None
    ) -> Self:
        """Draw the parts that a fitted `KernelSearch` of one input column finds, at X or ``at`` other rows.

        Those of a `BayesMPT` are drawn by ``DecompositionDisplay(x, decompose(model, X)).plot()``.
        """
        X, at, y = unmasked(X), unmasked(at), unmasked(y)
        rows = np.asarray(X if at is None else at, dtype=float)
        if rows.ndim != 2 or rows.shape[1] != 1:
            raise ValueError(f"only inputs of one column can be drawn, got shape {rows.shape}")
        if not hasattr(estimator, "decompose"):
            raise TypeError(
                f"from_estimator draws what a KernelSearch finds, got {type(estimator).__name__}: write "
                "DecompositionDisplay(x, bayes_mpt.decompose(model, X)).plot()"
            )
        parts = estimator.decompose(rows)
        return cls(rows, parts, None if y is None else (np.ravel(X), np.ravel(y))).plot()

    def plot(self, axes: Any = None, *, names: list[str] | None = None) -> Self:
        """Draw on J + 1 axes, or on new ones; bands are two standard deviations, ``names`` title the parts."""
        names = self.parts.names if names is None else names
        if axes is None:
            import matplotlib.pyplot as plt

            n = len(names) + 1
            _, axes = plt.subplots(n, 1, figsize=(8, 1 + 1.9 * n), sharex=True, layout="constrained")
        self.axes_, self.figure_ = axes, axes[0].figure
        order = np.argsort(self.x)
        x = self.x[order]
        if self.seen is not None:
            axes[0].plot(*self.seen, ".", color="0.6", ms=3)
        axes[0].plot(x, self.parts.total[order], color="C0", lw=1)
        axes[0].set_title("observations and the whole")
        for j, name in enumerate(names):
            mean, band = self.parts.mean[j][order], 2 * self.parts.sd[j][order]
            axes[j + 1].plot(x, mean, color=f"C{j + 1}", lw=1)
            axes[j + 1].fill_between(x, mean - band, mean + band, color=f"C{j + 1}", alpha=0.25, linewidth=0)
            axes[j + 1].axhline(0, color="0.7", lw=0.6, zorder=0)
            axes[j + 1].set_title(name)
        return self


def _axes(ax: Any, height: float = 4.0) -> tuple[Any, Any]:
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(figsize=(7, height), layout="constrained")
    return ax, ax.figure
