"""Trainings of a few steps whose ends a person can compute."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedsim.core.tree import Tree, tensors
from fedsim.learning.objectives import Frozen, Objective
from fedsim.learning.steps import Asking
from fedsim.learning.task import Batch
from fedsim.learning.training import Training
from tests.support.small_federation import Federation


SLOW: dict[str, Any] = {"lr": 1e-3, "epochs": 2, "batch_size": 4}  # shards of 6, 12 and 18: 4, 6 and 10 steps
STEPS: dict[str, Any] = {"purpose": "target", "lr": 0.1, "epochs": 1, "batch_size": 4}  # 2, 3 and 5 steps


@dataclasses.dataclass(frozen=True)
class Slope:
    """Falls by `factor` and by `frozen["slope"]` a unit: AdamW goes `lr` a step."""

    factor: float = 1.0

    def __call__(self, parameters: Tree, frozen: Frozen, batch: Batch) -> Tensor:
        return self.factor * (frozen.get("slope", 1.0) * parameters["x"]).sum()


@dataclasses.dataclass(frozen=True)
class Sum:
    """The sum of everything."""

    def __call__(self, parameters: Tree, frozen: Frozen, batch: Batch) -> Tensor:
        return torch.cat([*tensors(parameters)]).sum()


def training(
    federation: Federation,
    client: int,
    objective: Objective,
    start: Mapping[str, Tensor],
    frozen: Frozen | None = None,
    **settings: Any,
) -> Callable[[], Asking[Tree]]:
    """A call that is one training."""

    def call() -> Asking[Tree]:
        asked = Training(objective, start, frozen or {}, **STEPS | settings)
        trained = yield federation.at_client(1, client), asked
        return trained.parameters

    return call
