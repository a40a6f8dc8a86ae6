"""The procedures of Fed-Grow on three participants with a few digits."""

from collections.abc import Mapping
from typing import Any

import torch

import fedsim.testing
from fedgrow_algo.dual_ligo import operator_between
from fedgrow_algo.fedgrow import FedGrow
from fedgrow_algo.joint import FedGrowJoint
from fedgrow_algo.released_code import FedGrowReleasedCode
from fedgrow_algo.residual import FedGrowResidual
from fedsim.algorithm import Algorithm
from fedsim.core.tree import Tree, sha256
from fedsim.learning.task import Task
from fedsim.models import Form
from fedsim.testing import MIDDLE


TARGET = Form(16, 3, heads=2)
ROUND: dict[str, Any] = {"lr": 1e-2, "small_lr": 1e-2, "small_epochs": 1, "local_lr": 1e-2, "batch_size": 8}


def staged(**changes: Any) -> FedGrow:
    settings: dict[str, Any] = ROUND | {"local_epochs": 1} | changes
    return FedGrow(**settings)


def residual(**changes: Any) -> FedGrowResidual:
    settings: dict[str, Any] = ROUND | {"local_epochs": 1} | changes
    return FedGrowResidual(**settings)


def joint(**changes: Any) -> FedGrowJoint:
    return FedGrowJoint(**ROUND | changes)


def released(**changes: Any) -> FedGrowReleasedCode:
    settings: dict[str, Any] = ROUND | {"local_epochs": 1} | changes
    return FedGrowReleasedCode(**settings)


class Federation(fedsim.testing.Federation):
    """Three participants of one form with shards of 6, 12 and 18 digits."""

    def __init__(self, algorithm: Algorithm) -> None:
        super().__init__(algorithm, target=TARGET)

    def model(self, round: int, client: int) -> Tree:
        """Weights of what a client would deploy after a round."""
        return dict(self.deployed(round, client).named_parameters())


def shared_operator(task: Task):
    return operator_between("paper", task, MIDDLE, TARGET)


def assert_equal(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> None:
    assert sha256(dict(left)) == sha256(dict(right))
