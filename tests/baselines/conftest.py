"""What all tests of the baselines have in common: they are quick."""

import pytest

from tests.support.small_federation import without_counting


@pytest.fixture(autouse=True)
def _quick(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    without_counting(monkeypatch)
