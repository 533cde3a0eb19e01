"""Every Python block of README and docs runs, page by page, each page in one namespace."""

import json
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyro
import pytest
from sklearn.datasets import load_iris

import bayes_mpt
from bayes_mpt import BayesMPT
from bayes_mpt.models import PPCA

ROOT = Path(__file__).parents[1]
PACKAGE = Path(bayes_mpt.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"^(?P<indent> *)```python[^\n]*\n(?P<code>.*?)^(?P=indent)```", re.DOTALL | re.MULTILINE)


def run_blocks(page, folder, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    monkeypatch.chdir(folder)  # what a page writes is not left in the checkout
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES[1:] if BLOCK.search(page.read_text())], ids=lambda page: page.name
)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    run_blocks(page, tmp_path, monkeypatch)


@pytest.mark.slow
def test_the_readme_runs_and_prints_what_it_promises(tmp_path, monkeypatch, capsys):
    """The summary that stands in the README, in 80 columns: candidates in that order, numbers within their errors."""
    text = PAGES[0].read_text()
    run_blocks(PAGES[0], tmp_path, monkeypatch)
    printed = capsys.readouterr().out.split("\n\n")
    promised = re.search(r"```text\n(Ranked.*?)```", text, re.DOTALL)[1].split("\n\n")
    assert max(map(len, promised[1].splitlines())) <= 80
    assert printed[0] == promised[0]
    got, want = ([line.split() for line in block.strip().splitlines()] for block in (printed[1], promised[1]))
    assert got[0] == want[0]
    of_name = {(row[0], row[1]): row for row in got[1:]}
    assert set(of_name) == {(row[0], row[1]) for row in want[1:]}
    for row in want[1:]:
        here = of_name[row[0], row[1]]
        lml, se, weight = (-4, -3, -1)
        assert float(here[lml]) == pytest.approx(float(row[lml]), abs=4 * max(float(row[se]), 0.1))
        assert float(here[weight]) == pytest.approx(float(row[weight]), abs=0.15)
        assert float(here[2]) == pytest.approx(float(row[2]), abs=0.1 * abs(float(row[2])) + 1)


def test_no_block_escapes():
    """A fence that the pattern above does not read (another spelling, say) would never be run."""
    for page in PAGES:
        text = page.read_text()
        fences = re.findall(r"^ *(?:```|~~~) *\{?\.?(?:py|pycon|python)", text, re.MULTILINE | re.IGNORECASE)
        assert len(fences) == len(BLOCK.findall(text)), page.name


def test_the_way_of_a_plain_fit_is_what_the_page_says():
    """The table of files is what `BayesMPT(PPCA(2)).fit(X)` enters, in this order; models are left out."""
    table = (ROOT / "docs" / "fit.md").read_text().split("These are all the files")[1].split("\n## ")[0]
    entered = []

    def note(frame, event, argument):
        file = Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in file.parents and file.parent.name != "models":
            entered.append(file.relative_to(PACKAGE).as_posix())

    X = load_iris().data
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        BayesMPT(PPCA(2)).fit(X)
    finally:
        sys.setprofile(before)
    assert list(dict.fromkeys(entered)) == re.findall(r"^\| `([\w/]+\.py)` \|", table, re.MULTILINE)


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


@pytest.mark.parametrize(
    "page", [ROOT / "docs" / "fit.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name
)
def test_the_map_names_files_that_exist(page):
    package = ROOT / "bayes_mpt"
    names = {file.name for file in package.rglob("*.py")}
    said = set(re.findall(r"`([\w/]+\.py)`", page.read_text()))
    assert said
    assert not [n for n in said if n not in names and not (ROOT / n).exists() and not (package / n).exists()]
