"""docs/paper.md against the numbers that the scripts of examples/paper wrote, and the cheap ones of these anew."""

import importlib.util
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import multivariate_normal
from truths import known_noise_maximum

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "paper.md").read_text()
RESULTS = {
    path.stem: json.loads(path.read_text())
    for path in sorted((ROOT / "docs" / "images" / "paper").glob("*.json"))
}
SCRIPTS = sorted(path.stem for path in (ROOT / "examples" / "paper").glob("*.py") if path.stem != "setting")
NUMBER = re.compile(r"-?\d+\.\d+")


@pytest.fixture(scope="module")
def setting():
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("setting", ROOT / "examples" / "paper" / "setting.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def tables(text):
    return [cells(line) for line in text.splitlines() if line.startswith("|")]


def test_every_script_has_its_numbers_and_its_picture():
    assert sorted(RESULTS) == SCRIPTS
    for name in SCRIPTS:
        assert (ROOT / "docs" / "images" / "paper" / f"{name}.png").exists()
        assert f"images/paper/{name}.png" in PAGE


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_page_shows_the_table_of_the_script(name):
    found = RESULTS[name]
    assert found["source"].startswith("arXiv 2306.00520") and found["differences"]
    wanted = [found["columns"], *found["rows"]]
    shown = [line for line in tables(PAGE) if set("".join(line)) != {"-"}]
    assert all(row in shown for row in wanted), [row for row in wanted if row not in shown]


def test_the_page_has_no_other_numbers():
    rows = [row for found in RESULTS.values() for row in [found["columns"], *found["rows"]]]
    for line in tables(PAGE):
        assert line in rows or set("".join(line)) == {"-"}, line
    prose = "\n".join(line for line in PAGE.splitlines() if not line.startswith("|")).replace(
        "2306.00520", ""
    )
    assert not NUMBER.findall(prose)


@pytest.mark.parametrize("shared, column", [(True, 2), (False, 3)])
def test_exact_values_anew(setting, shared, column):
    def row(name, start):
        return next(float(r[column].split(" ")[0]) for r in RESULTS[name]["rows"] if r[0].startswith(start))

    def by_scipy(n, d, k, seed):
        loading, x = setting.generated(n, d, k, seed, shared=shared)
        cov = loading @ loading.T + setting.NOISE * np.eye(d)
        return multivariate_normal(np.zeros(d), cov).logpdf(x).mean(), x

    assert row("table_1", "exact LML") == pytest.approx(by_scipy(1000, 200, 5, 1991)[0], abs=5.1e-4)
    assert row("figure_1", "D = 512: exact LML") == pytest.approx(by_scipy(100, 512, 2, 111)[0], abs=5.1e-3)
    truth, x = by_scipy(2000, 10, 2, 1991)
    assert row("figure_2", "LML of the true loadings") == pytest.approx(truth, abs=5.1e-4)
    best = known_noise_maximum(x.T @ x / len(x), 2, setting.NOISE)
    assert row("figure_2", "largest LML") == pytest.approx(best, abs=5.1e-4)
    assert row("figure_2", "every size: LML at the end") == pytest.approx(best, abs=5.1e-4)


@pytest.mark.parametrize("size", [4, 20])
def test_prior_masses_anew(size):
    """Of the published grid: nodes 10 / (L - 1) apart, each weighted as if they were 10 / L apart."""
    z = np.linspace(-5, 5, size)
    mass = (10 / size * np.exp(-(z**2) / 2).sum() / math.sqrt(2 * math.pi)) ** 2
    (found,) = [
        r for r in RESULTS["bernoulli_mnist"]["rows"] if r[0].endswith(f"L = {size}") and "mass" in r[0]
    ]
    assert float(found[2]) == pytest.approx(mass, abs=5.1e-5)
    assert float(found[3]) == pytest.approx(mass * (size / (size - 1)) ** 2, abs=5.1e-5)


def test_summaries_are_those_of_the_runs():
    runs = RESULTS["table_1"]["numbers"]
    for column, name in ((2, "as its code computes"), (3, "corrected noise")):
        for row in RESULTS["table_1"]["rows"]:
            if not row[0].endswith("masks"):
                continue
            values = runs[name][row[0].split(" ")[0]]
            assert row[column].startswith(f"{np.mean(values):.3f}")
    for name, found in RESULTS["bernoulli_mnist"]["numbers"].items():
        if isinstance(found, dict) and "heldout" in found:
            (row,) = [r for r in RESULTS["bernoulli_mnist"]["rows"] if r[0] == name]
            assert row[3] == f"{found['heldout']:.2f}" and row[2] == f"{found['reported']:.2f}"
