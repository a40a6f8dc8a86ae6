"""Nested states and flat trees."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.core.tree import State, clone, flat, mapped, nbytes, nested, numel, ordered, sha256, tensors, to
from fedsim.core.updates import ClientUpdate, weighted_mean, weighted_sum, whole_sum


names = st.text("ab:/-1", min_size=1, max_size=3).filter(lambda name: "::" not in name)
states = st.recursive(
    st.integers(0, 9).map(lambda number: torch.tensor(float(number))),
    lambda inner: st.dictionaries(names.filter(lambda n: n[0] != ":" and n[-1] != ":"), inner, min_size=1, max_size=3),
    max_leaves=6,
).filter(lambda state: isinstance(state, dict))
EXAMPLE: State = {"w": torch.ones(2), "m": {"x": {"w": torch.zeros(3)}, "n": torch.tensor([True])}, "empty": {}}


def test_by_hand() -> None:
    assert list(flat(EXAMPLE)) == ["w", "m::x::w", "m::n"]
    assert list(flat(EXAMPLE, ".")) == ["w", "m.x.w", "m.n"]
    assert (numel(EXAMPLE), nbytes(EXAMPLE), len(list(tensors(EXAMPLE)))) == (5, 21, 3)
    assert list(ordered(EXAMPLE)) == ["m", "w"] and list(ordered(EXAMPLE)["m"]) == ["n", "x"], "without what is empty"
    with pytest.raises(ValueError, match="'a::b': a name in a state must not contain '::'"):
        flat({"a::b": torch.ones(1)})
    twice: State = {"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1)}
    assert len(flat(twice)) == 2, "no file confuses them"
    with pytest.raises(ValueError, match=r"'a\.b': two tensors of a state have this name, written flat"):
        sha256(twice)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    return torch.equal(one, other)


@pytest.mark.parametrize("name", [":a", "a:", "::"])
def test_names_that_could_not_be_told_apart_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="nor begin or end with ':'"):
        flat({"part": {name: torch.ones(1)}})


@pytest.mark.parametrize("value", [0, None, False, [], 3.0, "x"])
def test_what_is_no_tensor_is_refused_and_never_dropped(value: Any) -> None:
    with pytest.raises(TypeError, match=r"'n' in a state is .*: must be a tensor, or tensors by name"):
        ordered({"part": {"n": value}})


@given(states)
def test_flat_and_nested_are_inverse(state: State) -> None:
    assert same(nested(flat(state)), state)
    assert same(mapped(lambda tensor: tensor, state), state) and same(to(state, "cpu"), state)
    assert sha256(state) == sha256(ordered(state)) == sha256(clone(state)) == sha256(flat(state, "."))
    copy = clone(state)
    for tensor in tensors(copy):
        tensor.fill_(-1.0)
    assert all(float(tensor) >= 0 for tensor in tensors(state))


def test_the_mean_of_nested_updates() -> None:
    """(1 * 1 + 3 * 5) / 4 = 4 in every part; of nobody it is what is there."""
    updates = [
        ClientUpdate(0, {"a": {"x": torch.tensor(1.0)}, "b": torch.tensor([1], dtype=torch.float16)}, 1),
        ClientUpdate(1, {"a": {"x": torch.tensor(5.0)}, "b": torch.tensor([5], dtype=torch.float16)}, 3),
    ]
    like = updates[0].tree
    for arriving in (updates, [weighted_sum(updates)], [updates[0], weighted_sum(updates[1:])]):
        found = weighted_mean(iter(arriving), like)
        assert same(found, {"a": {"x": torch.tensor(4.0)}, "b": torch.tensor([4], dtype=torch.float16)})
        assert found["b"].dtype == torch.float16
    assert weighted_mean(iter(()), like) is like and whole_sum(iter(())) is None
    total = whole_sum(iter(updates))
    assert total is not None and (total.weight, float(total.tree["a::x"])) == (4, 16.0)
    assert weighted_mean(iter(updates), {})["b"].dtype == torch.float32, "nothing to take dtypes from"
