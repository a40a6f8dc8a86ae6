"""Who computes what: small cases by hand, and what must hold for any."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.runtime.base import Resources
from fedsim.runtime.schedule import Durations, Unit, assigned, cut_where_it_pays, makespan, merged


BOTH = frozenset([0, 1])


def units(*seconds: float, hosts: frozenset[int] = BOTH) -> list[Unit]:
    return [Unit(place, (place,), each, hosts) for place, each in enumerate(seconds)]


def test_longest_first_by_hand() -> None:
    """5 and 4 start; 3 goes to the host of 4, then 3 to that of 5, and 3 to the one done first (7 against 8)."""
    given = assigned(units(3, 5, 3, 4, 3), [0, 1], {})
    assert given == {0: [1, 2], 1: [0, 3, 4]}
    assert makespan(units(3, 5, 3, 4, 3), given, {}) == 10


def test_a_slow_host_gets_less() -> None:
    given = assigned(units(1, 1, 1, 1), [0, 1], {0: 1.0, 1: 3.0})
    assert len(given[0]) == 3 and len(given[1]) == 1


def test_what_is_already_given_counts() -> None:
    assert assigned(units(1, 1), [0, 1], {}, {0: 5.0}) == {0: [], 1: [0, 1]}


def test_only_those_may_compute_who_ask_for_enough() -> None:
    there = [*units(1, 1, hosts=frozenset([1])), *units(1)]
    assert assigned(there, [0, 1], {})[0] == [2]
    assert assigned(there, [0], {}) == {0: [2]}, "the others are nowhere: their host is away"


def test_participants_stay_where_they_are_if_it_hardly_matters() -> None:
    at_home = [dataclasses.replace(unit, home=1 - unit.chunk % 2) for unit in units(*[1.0] * 40)]
    given = assigned(at_home, [0, 1], {})
    assert given == {0: list(range(1, 40, 2)), 1: list(range(0, 40, 2))}
    crowded = [dataclasses.replace(unit, home=0) for unit in units(1, 1)]
    assert assigned(crowded, [0, 1], {}) == {0: [0], 1: [1]}


def members(*chunks: tuple[float, ...]) -> list[list[Unit]]:
    ids = iter(range(100))
    return [[Unit(place, (next(ids),), each, BOTH) for each in chunk] for place, chunk in enumerate(chunks)]


def test_chunks_are_cut_up_where_hosts_would_wait() -> None:
    """Three chunks of 4 s on two hosts last 8 s; cut one into its halves of 2 s and they last 6."""
    cut = cut_where_it_pays(members((2.0, 2.0), (2.0, 2.0), (2.0, 2.0)), [0, 1], {})
    assert sorted(len(unit.ids) for unit in cut) == [1, 1, 2, 2]
    assert makespan(cut, assigned(cut, [0, 1], {}), {}) == 6


def test_chunks_stay_whole_where_nothing_is_gained() -> None:
    even = cut_where_it_pays(members((1.0, 1.0), (1.0, 1.0)), [0, 1], {})
    assert [unit.ids for unit in even] == [(0, 1), (2, 3)]
    fast = cut_where_it_pays(members(*[(1e-4, 1e-4)] * 3), [0, 1], {})
    assert [len(unit.ids) for unit in fast] == [2, 2, 2], "a ten-thousandth of a second is not worth a message"
    alone = cut_where_it_pays(members((2.0, 2.0), (2.0, 2.0), (2.0, 2.0)), [0], {})
    assert [len(unit.ids) for unit in alone] == [2, 2, 2]


def test_a_chunk_whose_members_share_no_host_is_cut_up() -> None:
    apart = [Unit(0, (0,), 1.0, frozenset([0])), Unit(0, (1,), 1.0, frozenset([1]))]
    assert merged(apart) is None
    assert cut_where_it_pays([apart], [0, 1], {}) == apart


@settings(deadline=None)
@given(
    st.lists(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=5), min_size=1, max_size=8),
    st.integers(1, 5),
    st.data(),
)
def test_everybody_is_computed_once_in_the_order_of_the_cohort(chunks: list[list[float]], hosts: int, data) -> None:
    everywhere = frozenset(range(hosts))
    ids = iter(range(1000))
    parts = [
        [Unit(place, (next(ids),), each, everywhere, data.draw(st.sampled_from([None, 0]))) for each in chunk]
        for place, chunk in enumerate(chunks)
    ]
    slowness = {host: data.draw(st.floats(0.5, 2.0)) for host in everywhere}
    cut = cut_where_it_pays(parts, everywhere, slowness)
    assert [id_ for unit in cut for id_ in unit.ids] == [id_ for part in parts for unit in part for id_ in unit.ids]
    given = assigned(cut, everywhere, slowness)
    assert sorted(number for numbers in given.values() for number in numbers) == list(range(len(cut)))
    assert all(numbers == sorted(numbers) for numbers in given.values())


def test_durations_lie_on_a_line_over_the_size() -> None:
    durations = Durations()
    assert durations.expected("train", "phone", 10) is None
    durations.note("train", "phone", 10, 3.0)
    assert durations.expected("train", "phone", 99) == pytest.approx(3.0), "one point has no slope"
    durations.note("train", "phone", 20, 5.0)
    assert durations.expected("train", "phone", 40) == pytest.approx(9.0)
    assert durations.expected("score", "phone", 40) is None and durations.expected("train", "board", 40) is None
    durations.note("score", "phone", 10, 4.0)
    durations.note("score", "phone", 20, 2.0)
    assert durations.expected("score", "phone", 30) == pytest.approx(3.0), "no longer for less: the mean"


def test_hosts_that_take_longer_are_known() -> None:
    durations = Durations()
    assert durations.slowness(1) == 1.0
    durations.note_host(1, 1.0, 3.0)
    assert durations.slowness(1) == 2.0 and durations.slowness(0) == 1.0
    durations.note_host(0, 0.0, 3.0)
    assert durations.slowness(0) == 1.0, "nothing was expected"


def test_what_covers_a_request() -> None:
    host = Resources(1.0, 0.5, 100.0, (("farm", 1.0),))
    assert host.covers(Resources(0.5, 0.5)) and host.covers(host)
    assert not host.covers(Resources(1.0, 0.6)) and not host.covers(Resources(1.0, 0.0, 101.0))
    assert not host.covers(Resources(1.0, custom=(("other", 1.0),)))
    assert not Resources(1.0).covers(Resources(1.0, memory_mb=1.0))
