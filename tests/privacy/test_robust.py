"""Every robust rule against numbers worked out by hand, where it breaks, and what holds of all of them."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim.privacy import robust_mean
from fedsim.privacy.robust import RULES


FIVE = [[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [3.0, 1.0], [20.0, -10.0]]
CUT = [[3.0, 4.0], [6.0, 8.0], [0.0, 0.0], [0.0, 10.0], [-3.0, -4.0]]  # norms 5, 10, 0, 10, 5
AROUND = [[3.0, 4.0], [9.0, 12.0], [3.0, 14.0], [0.0, 0.0], [3.0, 4.0]]  # from (3, 4): 0, (6, 8), (0, 10), -(3, 4), 0
TURNED = [[1.0, 0.0], [0.0, 3.0], [-5.0, 0.0], [3.0, 4.0], [10.0, 0.0]]  # cosines with (2, 0): 1, 0, -1, 0.6, 1
# Forces of the third and fourth cancel; of an angle of 120 degrees between the others, y = 1 / sqrt(3).
FERMAT = [[-1.0, 0.0], [1.0, 0.0], [0.0, 8.0], [0.0, -3.0], [0.0, 10.0]]
LINE = [[0.0], [1.0], [2.0], [3.0], [4.0], [5.0], [100.0]]


def of(rule: str, rows: list[list[float]], weights: list[float] | None = None, **more: Any) -> list[float]:
    x, w = torch.tensor(rows, dtype=torch.float64), None if weights is None else torch.tensor(weights)
    found = robust_mean(rule, x, w, **more)
    assert found.dtype == torch.float64
    return found.tolist()


@pytest.mark.parametrize(
    ("rule", "more", "rows", "expected"),
    [
        ("mean", {}, FIVE, [5, -1]),
        ("median", {}, FIVE, [2, 0]),
        ("median", {}, FIVE[:4], [1, 0.5]),  # of an even number, the middle two
        ("trimmed_mean", {"trim": 1}, FIVE, [5 / 3, 1 / 3]),
        ("trimmed_mean", {"trim": 2}, FIVE, [2, 0]),
        ("krum", {"attackers": 1}, FIVE, [2, 0]),  # scores 14, 6, 34, 12, 834, of two neighbours each
        ("multi_krum", {"attackers": 1, "keep": 2}, FIVE, [2.5, 0.5]),
        ("multi_krum", {"attackers": 1}, FIVE, [1.25, 1.25]),
        ("bulyan", {"attackers": 0}, FIVE, [5, -1]),
        ("bulyan", {"attackers": 1}, LINE, [2]),  # chooses 2, 3, 1, 4, 0; of those 1, 2, 3 are next to their median
        ("geometric_median", {}, FERMAT, [0, 1 / math.sqrt(3)]),
        ("norm_bound", {"bound": 5}, CUT, [0.6, 1.8]),
        ("centered_clipping", {"bound": 5}, CUT, [0.6, 1.8]),  # from 0
        ("centered_clipping", {"bound": 5, "start": torch.tensor([3.0, 4.0])}, AROUND, [3, 5]),
        ("fltrust", {"trusted": torch.tensor([2.0, 0.0])}, TURNED, [4.72 / 2.6, 0.96 / 2.6]),
    ],
)
def test_a_rule_gives_what_is_worked_out_by_hand(rule, more, rows, expected) -> None:
    assert of(rule, rows, **more) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("rule", "more", "expected"),
    [
        ("mean", {}, [1.2, 0.8]),
        ("norm_bound", {"bound": 2.0}, [0.6, 0.4]),
        ("centered_clipping", {"bound": 2.0}, [0.6, 0.4]),
        ("geometric_median", {}, [0, 0]),  # half of all weight is in one place
        ("median", {}, [0, 0]),
        ("multi_krum", {"attackers": 0}, [4 / 3, 4 / 3]),  # not weighted
    ],
)
def test_weights_count_where_the_table_says_so(rule, more, expected) -> None:
    rows = [[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]]
    assert of(rule, rows, [5.0, 3.0, 2.0], **more) == pytest.approx(expected, abs=1e-5)


# One more than the largest number of colluding attackers that does not move it: they all send 1e6.
BREAKS = [
    ("mean", {}, 5, 1),
    ("trimmed_mean", {"trim": 1}, 5, 2),
    ("trimmed_mean", {"trim": 2}, 5, 3),
    ("median", {}, 5, 3),
    ("krum", {"attackers": 1}, 5, 3),
    ("multi_krum", {"attackers": 1}, 5, 2),
    ("bulyan", {"attackers": 1}, 7, 4),
    ("geometric_median", {}, 5, 3),
]


@pytest.mark.parametrize(("rule", "more", "clients", "breaks"), BREAKS)
def test_one_attacker_fewer_is_survived_and_one_more_is_not(rule, more, clients, breaks) -> None:
    def reached(attackers: int) -> float:
        honest = [[float(k)] for k in range(clients - attackers)]
        return of(rule, honest + [[1e6]] * attackers, **more)[0]

    assert -1e-3 <= reached(breaks - 1) <= clients
    assert reached(breaks) > 1e5


def test_clipped_rules_are_moved_by_each_attacker_and_by_no_more_than_the_bound() -> None:
    for rule in ("norm_bound", "centered_clipping"):
        for attackers in (1, 2, 5):
            assert of(rule, [[0.0]] * (5 - attackers) + [[1e6]] * attackers, bound=2.0) == [2.0 * attackers / 5]


def test_fltrust_is_never_longer_than_the_trusted_update_and_leaves_out_who_disagrees() -> None:
    t = torch.tensor([0.0, 2.0])
    found = of("fltrust", [[0.0, 1.0], [1e6, -1.0], [-1e6, -1.0], [0.0, -1e6]], trusted=t)
    assert found == [0.0, 2.0]
    assert of("fltrust", [[1.0, 0.0], [0.0, -5.0]], trusted=t) == [0.0, 0.0], "nobody agrees"
    assert of("fltrust", [[1.0, 0.0], [0.0, 0.0]], trusted=torch.zeros(2)) == [0.0, 0.0]
    assert torch.tensor(of("fltrust", [[1e6, 1.0], [3.0, 4.0]], trusted=t)).norm() <= 2.0


# what holds of all rules ----------------------------------------------------------------------------------------------


ALL = [
    ("mean", {}),
    ("median", {}),
    ("trimmed_mean", {"trim": 2}),
    ("krum", {"attackers": 1}),
    ("multi_krum", {"attackers": 2}),
    ("multi_krum", {"attackers": 2, "keep": 3}),
    ("bulyan", {"attackers": 1}),
    ("geometric_median", {}),
    ("norm_bound", {"bound": 3.0}),
    ("centered_clipping", {"bound": 3.0}),
    ("fltrust", {"trusted": torch.tensor([1.0, 2.0])}),
]
MOVES_ALONG = [(rule, more) for rule, more in ALL if rule not in ("norm_bound", "centered_clipping", "fltrust")]
ROWS = st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=7, max_size=9)


def tensor(rows: list[tuple[int, int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_every_rule_is_looked_at() -> None:
    assert {rule for rule, _ in ALL} == RULES.keys()


@pytest.mark.parametrize(("rule", "more"), ALL)
@given(rows=ROWS, data=st.data())
@settings(max_examples=30)
def test_the_order_of_clients_does_not_matter_to_the_bit_even_of_ties(rule, more, rows, data) -> None:
    order = data.draw(st.permutations(range(len(rows))))
    x = tensor(rows) / 3
    assert torch.equal(robust_mean(rule, x, **more), robust_mean(rule, x[order], **more))


@pytest.mark.parametrize(("rule", "more"), MOVES_ALONG)
@given(rows=ROWS, shift=st.tuples(st.integers(-99, 99), st.integers(-99, 99)))
@settings(max_examples=30)
def test_where_all_vectors_move_the_result_moves_along(rule, more, rows, shift) -> None:
    x, by = tensor(rows), tensor([shift])
    found = robust_mean(rule, x + by, **more) - by[0]
    torch.testing.assert_close(found, robust_mean(rule, x, **more), atol=1e-4, rtol=0)


def test_clipped_rules_do_not_move_along() -> None:
    x = tensor([(1, 0), (0, 1), (2, 2)])
    for rule in ("norm_bound", "centered_clipping"):
        moved = robust_mean(rule, x + 100, bound=3.0) - 100
        assert not torch.allclose(moved, robust_mean(rule, x, bound=3.0), atol=1.0)
    start = torch.tensor([100.0, 100.0])  # it moves along with what it steps from
    moved = robust_mean("centered_clipping", x + 100, bound=3.0, start=start) - 100
    torch.testing.assert_close(moved, robust_mean("centered_clipping", x, bound=3.0))


@pytest.mark.parametrize(("rule", "more"), ALL)
def test_of_equal_vectors_the_mean_is_that_vector(rule, more) -> None:
    same = torch.tensor([1.1, 2.2], dtype=torch.float64)  # of a norm below 3
    more = more | ({"trusted": same} if rule == "fltrust" else {})
    torch.testing.assert_close(robust_mean(rule, same.expand(7, 2), **more), same)


def test_vectors_are_computed_with_in_float64() -> None:
    x = torch.tensor([[2.0**25], [1.0], [1.0]])
    assert robust_mean("mean", x).item() == (2**25 + 2) / 3  # in float32, 2^25 + 1 is 2^25


# refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "more", "message"),
    [
        ("mode", {}, r"rule='mode': must be one of mean, median, .*fltrust"),
        ("krum", {"attackers": 2}, r"attackers=2: must be fewer: krum then needs 7 of 6 clients"),
        ("multi_krum", {"attackers": 2}, r"attackers=2.*needs 7 of 6"),
        ("multi_krum", {"attackers": 1, "keep": 6}, r"attackers=1.*keep=6.*needs 7 of 6"),
        ("bulyan", {"attackers": 1}, r"attackers=1.*needs 7 of 6"),
        ("trimmed_mean", {"trim": 3}, r"trim=3.*needs 7 of 6"),
        ("krum", {}, "attackers=None: must be a whole number, at least 0, for krum"),
        ("krum", {"attackers": True}, "attackers=True"),
        ("krum", {"attackers": -1}, "attackers=-1"),
        ("multi_krum", {"attackers": 1, "keep": 0}, "keep=0: must be a whole number, at least 1"),
        ("median", {"trim": 1}, "trim=1: must be left out: median has no such setting"),
        ("norm_bound", {"bound": 0}, "bound=0: must be a finite number above 0"),
        ("norm_bound", {"bound": math.inf}, "bound=inf"),
        ("centered_clipping", {"bound": 1.0, "start": torch.zeros(3)}, r"start=\(3,\): must be .* \(2,\)"),
        ("fltrust", {}, "trusted=None"),
        ("fltrust", {"trusted": torch.tensor([1.0, math.nan])}, "trusted=.*finite"),
    ],
)
def test_settings_that_cannot_be_are_refused(rule, more, message) -> None:
    with pytest.raises(ValueError, match=message):
        robust_mean(rule, torch.zeros(6, 2), **more)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("rule", "more"), ALL)
def test_vectors_that_are_not_finite_are_refused_by_row(rule, more, bad) -> None:
    x = torch.zeros(7, 2)
    x[4, 1] = bad
    with pytest.raises(ValueError, match=r"vectors=.*rows \[4\].*finite"):
        robust_mean(rule, x, **more)


def test_shapes_and_weights_that_cannot_be_are_refused() -> None:
    for shape in ((3,), (0, 3), (3, 0)):
        with pytest.raises(ValueError, match="vectors="):
            robust_mean("mean", torch.zeros(shape))
    for weights in ([1.0, 1.0], [1.0, 0.0, 1.0], [1.0, -1.0, 1.0], [1.0, math.nan, 1.0]):
        with pytest.raises(ValueError, match="weights="):
            robust_mean("mean", torch.zeros(3, 2), torch.tensor(weights))


@pytest.mark.parametrize(
    ("rule", "more", "clients"),
    [("krum", {"attackers": 2}, 7), ("bulyan", {"attackers": 1}, 7), ("trimmed_mean", {"trim": 3}, 7)],
)
def test_as_many_clients_as_a_rule_needs_are_enough(rule, more, clients) -> None:
    assert of(rule, [[1.0]] * clients, **more) == [1.0]
