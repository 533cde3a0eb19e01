"""A comparison in 80 columns: what ranks, by how much, how sure that is, and what to be wary of."""

from __future__ import annotations

import math
import re
import textwrap

import pandas as pd

__all__ = ["summary"]

WIDTH = 80
NAME = 24
N_NAMED = 2  # of the candidates that share a remark
RANKED_BY = {
    "expected": "the expected log-density of as many new rows under each fit",
    "heldout": "hidden rows",
    "lml": "lml",
}


def summary(table: pd.DataFrame, rule: str, reason: str) -> str:
    """The columns that decide, of a table of candidates, in lines of at most 80 characters."""
    by = table.attrs["ranked_by"]
    head = f"Ranked by {RANKED_BY[by]}; lml by {rule!r}: {reason}. All in nats, best first."
    columns = {
        "lml": [f"{v:.1f}" for v in table["lml"]],
        "+-": [_error(v) for v in table["se"]],
        "lml_diff": [f"{v:.1f}" for v in table["lml_diff"]],
        "weight": ["" if math.isnan(v) else f"{v:.3f}" for v in table["weight"]],
    }
    if by == "heldout":
        hidden = pd.Series(table.attrs["heldout"])
        columns = {"hidden rows": [f"{v:.1f}" for v in hidden - hidden.iloc[0]], **columns}
    if by == "expected":
        columns = {
            "new rows": [f"{v:.1f}" for v in table["expected_diff"]],
            "p_better": ["" if math.isnan(v) else f"{v:.2f}" for v in table["p_better"]],
            **columns,
        }
    names = _shortened([str(n) for n in table.index])
    wide = max(9, *(len(n) for n in names))
    cells = [[title, *column] for title, column in columns.items()]
    widths = [max(len(c) for c in column) for column in cells]
    lines = [
        "  ".join([name.ljust(wide), *(c[i].rjust(w) for c, w in zip(cells, widths, strict=True))]).rstrip()
        for i, name in enumerate(["candidate", *names])
    ]
    return "\n".join([*_wrapped(head), "", *lines, "", *_doubts(table, names)]).rstrip()


def _doubts(table: pd.DataFrame, names: list[str]) -> list[str]:
    """How far the first two are apart, and each remark with the candidates that it is of."""
    lines = []
    dse = table["dse"].dropna()
    if len(dse):
        name = names[list(table.index).index(dse.index[0])]
        lines += _wrapped(
            f"+- is numerical. The larger doubt is other rows: the lml_diff of {name} would move by {dse.iloc[0]:.1f} "
            "with them (dse)."
        )
    remarks: dict[str, list[str]] = {}
    for name, said in zip(names, table["diag"], strict=True):
        for part in str(said).split("; "):
            if part.startswith("prior's scale") and name != names[0]:
                continue  # much the same for all
            if part and part not in ("integrated", "laplace", "bic", "heldout", "train", "cumulative"):
                remarks.setdefault(part, []).append(name)
    for remark, whose in remarks.items():
        if len(whose) == len(names) > 1:
            who = "all"
        elif len(whose) <= N_NAMED:
            who = ", ".join(whose)
        else:
            who = f"{', '.join(whose[:N_NAMED])} and {len(whose) - N_NAMED} more"
        lines += _wrapped(f"- {remark} ({who})")
    return lines


def _error(v: float) -> str:
    return "" if math.isnan(v) else f"{v:.2f}"


def _shortened(names: list[str]) -> list[str]:
    """The ends of long names, of which the last is what is tuned; where these are alike, names of settings cut."""
    ends = [n if len(n) <= NAME else f"{n[:6]}...{n[9 - NAME :]}" for n in names]
    if len(set(ends)) == len(set(names)):
        return ends
    return [re.sub(r"(\w{4})\w{3,}=", r"\1..=", n) for n in names]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ")
