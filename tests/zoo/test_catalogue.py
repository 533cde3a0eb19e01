"""The list itself: long enough, no name twice, nine in ten fitted."""

from zoo.catalogue import CATALOGUE


def test_the_list():
    names = [entry.name for entry in CATALOGUE]
    assert len(names) == len(set(names)) >= 100
    assert {entry.outcome for entry in CATALOGUE} == {"fitted", "refused"}
    assert all((entry.outcome == "refused") == (entry.truth == "message") for entry in CATALOGUE)
    assert sum(entry.outcome == "fitted" for entry in CATALOGUE) >= 0.9 * len(names)
