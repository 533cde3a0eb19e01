"""What an interrupted search has finished."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from bayes_mpt.estimators.candidates import Candidate

__all__ = ["Finished", "Partial", "finished_table"]


@dataclass
class Finished:
    """Candidates by name, as far as they have come."""

    names: list[str] = field(default_factory=list)
    found: dict[int, Candidate] = field(default_factory=dict)
    """By place; only what is whole."""
    rule: str = ""

    def table(self) -> pd.DataFrame:
        """One row a finished candidate, in the order of the grid; ``lml`` is NaN of one that is fitted only."""
        found = sorted(self.found.items())
        return pd.DataFrame(
            {
                "lml": [math.nan if c.error else c.evidence for _, c in found],
                "fit_time": [c.fit_time for _, c in found],
                "score_time": [c.score_time for _, c in found],
                "diag": [
                    c.label("fitted, not scored" if math.isnan(c.evidence) else self.rule) for _, c in found
                ],
            },
            index=pd.Index([self.names[i] for i, _ in found], name="candidate"),
        )


class Partial:
    """Inside ``with``: at Ctrl-C the search gets a table as its ``partial_``; where it succeeds, it loses an older one.

    A second Ctrl-C does not come between (`bayes_mpt.runtime.interrupts`).
    """

    def __init__(self, search: Any, table: Callable[[], pd.DataFrame]):
        self._search, self._table = search, table

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, KeyboardInterrupt):
            self._search.partial_ = self._table()
        elif error is None:
            vars(self._search).pop("partial_", None)


def finished_table(search: Any) -> pd.DataFrame:
    """The same table of a search that was not interrupted."""
    table, times = search.comparison_, search.cv_results_
    index = pd.Index(search.candidate_names_, name="candidate")
    return pd.DataFrame(
        {
            "lml": table["lml"].reindex(index),
            "fit_time": times["mean_fit_time"],
            "score_time": times["mean_score_time"],
            "diag": table["diag"].reindex(index),
        },
        index=index,
    )
