"""Every Python block of README and docs runs, page by page, each page in one namespace."""

import json
import re
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"^(?P<indent> *)```python[^\n]*\n(?P<code>.*?)^(?P=indent)```", re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=lambda page: page.name
)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    monkeypatch.chdir(tmp_path)  # what a page writes is not left in the checkout
    text = page.read_text()
    if "from transformers import" in text:
        pytest.importorskip("transformers", reason="the extra `language` is not installed")
    namespace = {"__name__": "__main__"}
    with pyro.get_param_store().scope():
        for block in BLOCK.finditer(text):
            # Blank lines in front, so that a traceback names the line of the page.
            above = text.count("\n", 0, block.start("code"))
            code = "\n" * above + textwrap.dedent(block["code"])
            exec(compile(code, str(page), "exec"), namespace)
    pyplot.close("all")


def test_the_readme_prints_what_it_promises(capsys, monkeypatch):
    """In a terminal of 80 columns pandas leaves out the columns in the middle of a wide table."""
    monkeypatch.setenv("COLUMNS", "80")
    block = BLOCK.search((ROOT / "README.md").read_text())["code"]
    promised = ("lml_diff", "dse", "weight", "log_bayes_factor")
    with pd.option_context("display.max_columns", 0, "display.width", 80):  # of a terminal: as many as fit
        exec(block, {"__name__": "__main__"})
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if "lml_diff" in line)
    assert header.split() == list(promised)
    table = lines[lines.index(header) + 2 :][:5]
    assert all(len(line) <= 80 and "..." not in line for line in (header, *table))


def test_no_block_escapes():
    """A fence that the pattern above does not read (another spelling, say) would never be run."""
    for page in PAGES:
        text = page.read_text()
        fences = re.findall(r"^ *(?:```|~~~) *\{?\.?(?:py|pycon|python)", text, re.MULTILINE | re.IGNORECASE)
        assert len(fences) == len(BLOCK.findall(text)), page.name


def test_the_page_of_the_gpu_gives_the_measured_figures():
    page = (ROOT / "docs" / "gpu.md").read_text()
    rows = json.loads((ROOT / "benchmarks" / "speed" / "gpu.json").read_text())["rows"]
    ratio = {r["case"]: np.median(np.divide(r["peer_wall"], r["ours_wall"])) for r in rows if "case" in r}
    shown = [
        float(line.rsplit("|", 2)[1])
        for line in page.splitlines()
        if re.match(r"\| (exact|the same|step)", line)
    ]
    step = "masked score ({0}) against {1}({0}), batch {2}".format
    cases = [f"n = 10000, exact, against GPyTorch by {way}" for way in ("Cholesky", "default")]
    cases += [step(10, "RenyiELBO", batch) for batch in (128, 8192, 32768)]
    cases += [f"masked score (1) against Trace_ELBO, batch {batch}" for batch in (128, 32768)]
    assert shown == [round(ratio[case], 2) for case in cases]
    fit = {r["n"]: r["fit_s"] for r in rows if "fit_s" in r}
    assert f"{fit[100_000]:.1f} seconds for 100 000 points, {fit[1_000_000]:.0f} seconds" in page
