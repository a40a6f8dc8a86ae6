"""What tests of local training train: a form, settings, the loss, the same model in plain PyTorch, and objectives."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from fedsim.algorithm import ClientContext
from fedsim.core.tree import Tree
from fedsim.data.config import digits
from fedsim.learning.objectives import Frozen, Objective, TaskLoss
from fedsim.learning.task import Batch, TaskConfig
from fedsim.models import Form
from tests.support.clients import objective_of


FORM = Form(12, 2, heads=2)
CONFIG = TaskConfig(digits(limit=60), patch_size=4)
SETTINGS: dict[str, Any] = {"purpose": "target", "lr": 1e-2, "epochs": 1, "batch_size": 8}


def loss_in(ctx: ClientContext) -> TaskLoss:
    return TaskLoss(ctx.task, FORM)


def plain_model(form: Form) -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=form.width,
        num_hidden_layers=form.depth,
        num_attention_heads=form.heads,
        intermediate_size=form.width,
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = 10
    return ViTForImageClassification(config)


def noted(objectives: Sequence[Objective], seen: list[tuple[int, Tensor]]) -> tuple[Objective, ...]:
    """The same objectives; which one was asked for which batch is noted, counting left out."""

    def note(number: int, objective: Objective) -> Objective:
        def asked(tree: Mapping[str, Tensor], batch: Batch) -> Tensor:
            if type(batch["pixel_values"]) is Tensor and batch["pixel_values"].any():
                seen.append((number, batch["pixel_values"]))
            return objective({**tree}, {}, batch)

        return objective_of(asked)

    return tuple(note(number, objective) for number, objective in enumerate(objectives))


@dataclasses.dataclass(frozen=True)
class Square:
    """Smallest where a tensor is 0."""

    name: str

    def __call__(self, parameters: Tree, frozen: Frozen, batch: Batch) -> Tensor:
        return parameters[self.name].square().sum()
