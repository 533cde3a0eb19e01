"""Pictures: the area under the masked curve, and a ranking. Matplotlib is imported when they are drawn."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from bayes_mpt.score import Curve

__all__ = ["MaskedCurveDisplay", "RankingDisplay"]


class MaskedCurveDisplay:
    """The masked curve S(x; m) against the number of hidden tokens; the area under it is the LML.

    Parameters
    ----------
    curve : Curve
        `bayes_mpt.score.ScoreEstimate.by_size`.

    Attributes
    ----------
    ax_, figure_, line_, errorbar_ : matplotlib artists
        After `plot`.
    """

    def __init__(self, curve: Curve):
        self.curve = curve

    @classmethod
    def from_estimator(cls, estimator: Any, X: ArrayLike, y: Any = None, *, ax: Any = None) -> Self:
        """Estimate the curve of a fitted `BayesMPT` on rows X and draw it."""
        return cls(estimator.estimate(X, y).by_size).plot(ax)

    def plot(self, ax: Any = None, *, label: str | None = None, color: str | None = None) -> Self:
        """Draw on ``ax``, or on new axes."""
        self.ax_, self.figure_ = _axes(ax)
        size, mean, se = self.curve
        (self.line_,) = self.ax_.plot(size, mean, label=label, color=color)
        band = 2 * np.nan_to_num(se)
        self.errorbar_ = self.ax_.fill_between(
            size, mean - band, mean + band, alpha=0.3, color=self.line_.get_color()
        )
        self.ax_.fill_between(size, mean, 0, alpha=0.08, color=self.line_.get_color(), linewidth=0)
        total = float(np.nansum(mean))
        self.ax_.set(
            xlabel="hidden tokens m",
            ylabel="S(m), nats per hidden token",
            title=f"area under the masked curve: {total:.2f} nats a row",
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
        self.ax_.set(xlabel=f"log evidence below the best, nats ({self.comparison['diag'].iloc[0]})")
        return self


def _axes(ax: Any, height: float = 4.0) -> tuple[Any, Any]:
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(figsize=(7, height), layout="constrained")
    return ax, ax.figure
