"""Checkpoints that tests write: models whose every parameter is drawn, saved to folders, and read again."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.learning.starts import load_small
from fedsim.models import Form, get_family
from fedsim.models.checkpoint import Checkpoint
from tests.support.family_rows import Row


SEED = 5  # of the experiment that reads a checkpoint


def built(row: Row, form: Form | None = None, seed: int = 1) -> Any:
    """A Hugging Face model of a row whose every parameter is drawn: none has the value it would be initialised with."""
    module = get_family(row.config.family).build(form or row.small, row.task.inputs)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return module.eval()


def saved(module: Any, folder: Path, **settings: Any) -> Checkpoint:
    module.save_pretrained(folder, **settings)
    return Checkpoint(str(folder))


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def read(row: Row, checkpoint: Checkpoint, form: Form | None = None, seed: int = SEED) -> dict[str, Tensor]:
    return load_small(row.task, form or row.small, checkpoint, seed)


def edited(folder: Path, **fields: Any) -> None:
    """Change fields of a saved config."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def with_task(row: Row, **changes: Any) -> Row:
    return dataclasses.replace(row, config=dataclasses.replace(row.config, **changes))
