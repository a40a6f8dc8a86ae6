"""The examples in docstrings do what they say."""

import doctest

import fedsim.algorithm


def test_the_smallest_algorithm_of_the_contract_runs() -> None:
    result = doctest.testmod(fedsim.algorithm, raise_on_error=False)
    assert result.attempted >= 4
    assert result.failed == 0
