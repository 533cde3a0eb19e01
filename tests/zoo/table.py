"""The table of docs/any_program.md: what comes of programs that show one feature each.

``python tests/zoo/table.py`` writes it, from the list and the cases that `test_zoo.py` runs.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "any_program.md"
START, END = "<!-- written by python tests/zoo/table.py -->", "<!-- end of the table -->"


def table() -> str:
    """Markdown: a row for each feature, with its result as the tests hold it."""
    from zoo.catalogue import FEATURES

    files = sorted(path.stem for path in HERE.glob("programs_features_*.py"))
    cases = {case.name: case for name in files for case in import_module(f"zoo.{name}").CASES}
    lines = ["| in the program | result | held against |", "|---|---|---|"]
    for entry in FEATURES:
        case = cases[entry.name]
        words = case.refused.replace("\\", "")
        result = f'refused: "... {words} ..."' if words else entry.outcome
        if case.known:
            result = f"not as listed: {case.known}"
        lines.append(f"| {entry.after} | {result} | {'' if case.refused else entry.truth} |")
    return "\n".join(lines)


def page() -> str:
    """The page with the table as it should be."""
    before, _, rest = PAGE.read_text().partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    PAGE.write_text(page())
