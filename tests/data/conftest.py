"""What tests of reading data have in common: they touch no network, and no file is read before they do."""

import pytest

from fedsim.data.source import load


@pytest.fixture
def read_again(no_network: None) -> None:
    """Files of the same name are others in each test."""
    load.cache_clear()
