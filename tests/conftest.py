"""Fixtures of all tests: what is a test's own state, and that none of it stays behind."""

from __future__ import annotations

from collections.abc import Iterator

import pretend_device  # noqa: F401  (a device must be known before the first backward pass of a process)
import pyro
import pytest
import torch

SEED = 1991


@pytest.fixture
def own_store(request: pytest.FixtureRequest) -> Iterator[None]:
    """An empty parameter store and torch's generator at a seed, for tests that run programs by their own hands.

    It lies inside of `nothing_left_behind` where a test has both.
    """
    if "nothing_left_behind" in request.fixturenames:
        request.getfixturevalue("nothing_left_behind")
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.default_generator.manual_seed(SEED)
        yield


@pytest.fixture
def nothing_left_behind() -> Iterator[None]:
    """Leaves Pyro's store, torch's generator and its default precision as they were, or the test fails."""
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.default_generator.manual_seed(SEED)
        pyro.param("mine", torch.tensor(1.0))
        before, dtype = torch.get_rng_state(), torch.get_default_dtype()
        yield
        assert list(pyro.get_param_store().keys()) == ["mine"]
        assert torch.equal(before, torch.get_rng_state())
        assert torch.get_default_dtype() == dtype


@pytest.fixture
def in_double() -> Iterator[None]:
    """Double precision wherever a network's own numbers are made."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
