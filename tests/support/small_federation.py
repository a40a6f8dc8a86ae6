"""What tests do with `fedsim.testing.Federation`: participants with 6, 12 and 18 digits, of one form or of three."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim.core.tree import Tree
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


def drawn_like(tree: Mapping[str, Tensor], seed: int) -> Tree:
    """Random tensors of the names, shapes and dtypes of others."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(t.shape, generator=generator).to(t.dtype) for name, t in sorted(tree.items())}


def mean(trees: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> Tree:
    """The weighted mean, written out in float64."""
    share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return {
        name: torch.einsum("k,k...->...", share, torch.stack([tree[name].double() for tree in trees]))
        for name in trees[0]
    }


def assert_same_bits(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    differing = [name for name in left if not torch.equal(left[name], right[name])]
    assert not differing, differing[:4]


def assert_close(left: Mapping[str, Tensor], right: Mapping[str, Tensor], atol: float) -> None:
    assert left.keys() == right.keys()
    assert distance(left, right) < atol, distance(left, right)


def distance(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """The largest difference between two trees."""
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)
