"""The examples in docstrings do what they say."""

import doctest

import fedsim.algorithm
import fedsim.testing


def test_the_smallest_algorithm_of_the_contract_runs() -> None:
    result = doctest.testmod(fedsim.algorithm, raise_on_error=False)
    assert result.attempted >= 4
    assert result.failed == 0


def test_a_federation_in_three_lines(one_thread: None) -> None:
    result = doctest.testmod(fedsim.testing, raise_on_error=False)
    assert (result.attempted, result.failed) == (3, 0)
