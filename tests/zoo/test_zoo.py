"""Every program of the zoo is fitted as it stands, with a number that is right, or refused in words."""

from __future__ import annotations

import math
import warnings
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from zoo.case import Case
from zoo.catalogue import CATALOGUE
from zoo.table import PAGE, page

from bayes_mpt import BayesMPT

FILES = sorted(path.stem for path in Path(__file__).parent.glob("programs_*.py"))
CASES: list[Case] = [case for name in FILES for case in import_module(f"zoo.{name}").CASES]


def _parametrised(case: Case):
    marks = [pytest.mark.slow] if case.slow else []
    if case.known:
        marks.append(pytest.mark.xfail(strict=True, reason=case.known, run=not case.slow))
    return pytest.param(case, id=case.name, marks=marks)


@pytest.mark.usefixtures("nothing_left_behind")
@pytest.mark.parametrize("case", [_parametrised(case) for case in CASES])
def test_a_program(case):
    with torch.random.fork_rng():  # a network's first weights are the user's draws, not the package's
        program = case.program() if isinstance(case.program, type) else case.program
    data = case.data(np.random.default_rng(case.seed))
    mpt = BayesMPT(program, **{"random_state": 0, **case.settings})
    if case.refused:
        with pytest.raises(ValueError, match=case.refused):
            mpt.fit(*data)
        return
    with warnings.catch_warnings():
        if case.warns:
            warnings.filterwarnings("ignore", f".*{case.warns}")
        mpt.fit(*data)
    found, se = mpt.log_marginal_likelihood_, mpt.log_marginal_likelihood_se_
    assert math.isfinite(found)
    assert 0 <= se <= case.se
    assert mpt.explain()
    if case.truth is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        truth = case.truth(mpt.params_, *data)
    low, high = truth if isinstance(truth, tuple) else (truth, truth)
    near = max(case.tolerance, 3 * se)
    assert low - near <= found <= high + near, (
        f"{found:.6f} +- {se:.1e}, the truth is {low:.6f} to {high:.6f}"
    )


def test_every_case_is_of_the_catalogue():
    entries = {entry.name: entry for entry in CATALOGUE}
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
    assert set(names) == set(entries)
    for case in CASES:
        entry = entries[case.name]
        assert bool(case.refused) == (entry.outcome == "refused"), case.name
        assert (case.truth is None) == (entry.truth in ("message", "runs")), case.name


def test_the_page_shows_what_the_tests_hold():
    assert PAGE.read_text() == page(), "run python tests/zoo/table.py"
