"""What all tests of the baselines have in common: they are quick."""

import pytest


@pytest.fixture(autouse=True)
def _quick(one_thread: None, uncounted: None) -> None:
    """Models this small only lose time to a second thread, and to counting."""
