"""Every Python block of README and docs runs, page by page, each page in one namespace."""

import re
import textwrap
from pathlib import Path

import pyro
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"^(?P<indent> *)```python[^\n]*\n(?P<code>.*?)^(?P=indent)```", re.DOTALL | re.MULTILINE)


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


def test_no_block_escapes():
    """A fence that the pattern above does not read (another spelling, say) would never be run."""
    for page in PAGES:
        text = page.read_text()
        fences = re.findall(r"^ *(?:```|~~~) *\{?\.?(?:py|pycon|python)", text, re.MULTILINE | re.IGNORECASE)
        assert len(fences) == len(BLOCK.findall(text)), page.name
