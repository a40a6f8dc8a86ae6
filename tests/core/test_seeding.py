"""Streams by coordinates, and streams that nobody can compute again."""

import os

import pytest
import torch

from fedsim.core.seeding import WORDS, from_system, generator


def draws(stream: torch.Generator) -> list[float]:
    return torch.randn(8, generator=stream, dtype=torch.float64).tolist()


def test_a_stream_is_a_function_of_its_coordinates() -> None:
    places = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "a", 0, 0), (0, "a", 0, 1)]
    assert draws(generator(*places[0])) == draws(generator(*places[0]))
    assert len({tuple(draws(generator(*place))) for place in places}) == len(places)


def test_a_stream_of_the_system_has_all_of_its_state_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal bytes equal draws; of any other word, others: not 32 bits, which is what `manual_seed` takes."""
    asked: list[int] = []

    def bytes_with(changed: int | None):
        def urandom(size: int) -> bytes:
            asked.append(size)
            return bytes(255 * (place // 4 == changed) for place in range(size))

        return urandom

    found = []
    for changed in (None, None, 5, 300, WORDS - 1):
        monkeypatch.setattr(os, "urandom", bytes_with(changed))
        found.append(torch.randint(2**31, (2 * WORDS,), generator=from_system()).tolist())
    assert asked == [4 * WORDS] * 5
    assert found[0] == found[1] and len({tuple(each) for each in found}) == 4
    monkeypatch.undo()
    one, other = from_system(), from_system()
    assert draws(one) != draws(other)


def test_a_stream_of_the_system_is_uniform() -> None:
    counts = torch.bincount(torch.randint(16, (160_000,), generator=from_system()), minlength=16)
    chi_square = float(((counts - 10_000) ** 2 / 10_000).sum())
    assert chi_square < 60, "15 degrees of freedom: a false alarm in some five million"


def test_seeds_of_torch_are_of_32_bits() -> None:
    """Why `from_system` is there; if torch takes more one day, this says so."""
    one, other = (torch.Generator().manual_seed(5 + more) for more in (0, 2**32))
    assert draws(one) == draws(other)
