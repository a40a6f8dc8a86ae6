"""What tests do with `fedsim.testing.Federation`: participants with 6, 12 and 18 digits, of one form or of three."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from fedsim.core.tree import State, Tree, flat, mapped, nested, ordered
from fedsim.learning.meter import StepCost
from fedsim.models import Form
from fedsim.testing import MIDDLE, SIZES, SMALL, TARGET, Federation


__all__ = ["ALIKE", "LOCAL", "MEDIUM", "MIDDLE", "SIZES", "SMALL", "TARGET", "UNLIKE", "Federation"]

MEDIUM = Form(16, 2, heads=2)
ALIKE, UNLIKE = (SMALL,) * 3, (SMALL, MEDIUM, TARGET)
LOCAL: dict[str, Any] = {"lr": 1e-2, "epochs": 1, "batch_size": 8}


def without_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting a step takes longer than trainings of this size."""
    monkeypatch.setattr(StepCost, "measured", staticmethod(lambda *arguments: StepCost((0, 0), (1, 1))))


def weights_of(model: nn.Module) -> Tree:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def drawn_like(state: State, seed: int) -> State:
    """Random tensors of the names, shapes and dtypes of others."""
    generator = torch.Generator().manual_seed(seed)
    return mapped(lambda t: torch.randn(t.shape, generator=generator).to(t.dtype), ordered(state))


def mean(states: Sequence[State], weights: Sequence[float]) -> State:
    """The weighted mean, written out in float64."""
    share, trees = torch.tensor(weights, dtype=torch.float64) / sum(weights), [flat(state) for state in states]
    return nested(
        {
            name: torch.einsum("k,k...->...", share, torch.stack([tree[name].double() for tree in trees]))
            for name in trees[0]
        }
    )


def assert_same_bits(left: Mapping[str, Any], right: Mapping[str, Any]) -> None:
    one, other = flat(left), flat(right)
    assert one.keys() == other.keys()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing, differing[:4]


def assert_close(left: Mapping[str, Any], right: Mapping[str, Any], atol: float) -> None:
    assert flat(left).keys() == flat(right).keys()
    assert distance(left, right) < atol, distance(left, right)


def distance(left: Mapping[str, Any], right: Mapping[str, Any]) -> float:
    """The largest difference between two states."""
    one, other = flat(left), flat(right)
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)
