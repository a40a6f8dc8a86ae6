"""What `overhead.py` measures: an algorithm that does nothing, models that know nothing, generated images, experiments.

Actors of Ray import this module by its name, so nothing here may depend on being run as a script.
"""

import dataclasses
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn

from baselines.fedavg import FedAvg
from benchmarks.suites import tiny
from fedsim.algorithm import (
    Algorithm,
    ClientContext,
    ClientInfo,
    ClientUpdate,
    Partial,
    Payload,
    ServerContext,
    weighted_mean,
    weighted_sum,
)
from fedsim.core.tree import Tree, clone
from fedsim.data.partition import Partition
from fedsim.data.source import DataConfig, digits
from fedsim.experiment import Experiment, Tier, with_settings
from fedsim.learning.task import TaskConfig
from fedsim.models import Family, Form


CLASSES = 10
TESTED = 10  # test examples: everyone is scored after the last round, which is none of those measured
NEVER = 1_000_000  # `eval_every` of runs whose rounds are measured: only the first and the last are scored
KILOBYTES_10, MEGABYTES_40 = 2_560, 10_000_000  # of fp32 numbers
SHARD, BATCH = 640, 32  # of `work`: 20 steps a participant
WORKERS = 50


@dataclasses.dataclass(frozen=True)
class NoOp(Algorithm):
    """Everyone sends back what they received: the round's machinery and nothing else.

    - `numel`: fp32 numbers that are sent down, and up by each client.
    - `witness`: a file in which the aggregator leaves word, each round, of its process; empty: it does not.
    """

    numel: int = KILOBYTES_10
    witness: str = ""

    @property
    def name(self) -> str:
        return "noop"

    # at the aggregator ----------------------------------------------------------------------------------------------

    def server_init(self, ctx: ServerContext) -> Tree:
        return {"value": torch.arange(self.numel, dtype=torch.float32)}  # zeros would not take memory

    def server_broadcast(self, state: Tree, cohort: Sequence[ClientInfo], ctx: ServerContext) -> Mapping[int, Payload]:
        return {client.id: state for client in cohort}

    def combine(self, updates: Sequence[ClientUpdate]) -> Partial | None:
        return weighted_sum(updates)

    def server_aggregate(self, state: Tree, updates: Iterable[ClientUpdate | Partial], ctx: ServerContext) -> Tree:
        if self.witness:
            loaded = "transformers" in sys.modules
            Path(self.witness).write_text(f"round {ctx.round}: {'with' if loaded else 'without'} transformers")
        return weighted_mean(updates, state)

    # at a participant -----------------------------------------------------------------------------------------------

    def client_update(self, payload: Payload, state: Tree, ctx: ClientContext) -> tuple[ClientUpdate, Tree]:
        return ClientUpdate(ctx.info.id, clone(payload), 1), state

    def client_model(self, payload: Payload, state: Tree, ctx: ClientContext) -> nn.Module:
        return Constant(ctx.task.inputs.num_classes)


class Constant(nn.Module):
    """A model with one parameter, `(classes,)`, that says the same of every image."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(classes))

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(len(pixel_values), -1))


class NoModel(Family):
    """A family of constants, of any form: nothing of Hugging Face is imported for it."""

    def check(self, form: Form, inputs: Any) -> None:
        return None

    def build(self, form: Form, inputs: Any) -> Any:
        return Constant(inputs.num_classes)

    def model_class(self, inputs: Any) -> Any:
        raise NotImplementedError("there is no Hugging Face class")

    def config(self, form: Form, inputs: Any) -> Any:
        raise NotImplementedError("there is no Hugging Face config")

    def form(self, config: Any) -> Form:
        raise NotImplementedError("there is no Hugging Face config")

    def specs(self, form: Form, inputs: Any) -> Any:
        raise NotImplementedError("a constant has no named axes")


FAMILY = NoModel()


# data -----------------------------------------------------------------------------------------------------------------


def write_images(folder: Path, examples: int, size: int, channels: int) -> None:
    """Random images with random labels as parquet: so many training examples, and `TESTED` test examples."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for split, count in (("train", examples), ("test", TESTED)):
        images = rng.integers(0, 256, (count, size, size, channels), dtype=np.uint8)
        labels = rng.integers(0, CLASSES, count)
        table = pa.table({"image": [png(image) for image in images], "label": labels})
        pq.write_table(table, folder / f"{split}.parquet")


def png(image: np.ndarray) -> bytes:
    """`(H, W, C)` as an encoded image."""
    buffer = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def small_images(folder: Path, examples: int) -> DataConfig:
    """8x8 pixels, one channel; `examples` of those in the folder."""
    columns: dict[str, Any] = {"image": "image", "label": "label"}
    return DataConfig(str(folder), **columns, image_size=8, channels=1, num_classes=CLASSES, limit=examples)


# experiments ----------------------------------------------------------------------------------------------------------


def nothing(data: Path, participants: int, *, family: str = __name__, **fields: Any) -> Experiment:
    """Participants with two images each who do nothing, without or with models to be scored in principle."""
    small = Form(8, 1, heads=2)
    settings: dict[str, Any] = {"rounds": 20, "chunk": 50, "algorithm": NoOp()} | fields
    return Experiment(
        task=TaskConfig(small_images(data, 2 * participants), family, patch_size=4),
        tiers=(Tier("device", small),),
        intermediate=small,
        target=small,
        partition=Partition("iid"),
        participants=participants,
        validation_share=0.0,
        eval_every=NEVER,
        scored="cohort",
        **settings,
    )


def noop(data: Path) -> Experiment:
    """1,000 participants who send 10 KB each."""
    return nothing(data, 1000)


def bulk(data: Path) -> Experiment:
    """20 participants who send 40 MB each."""
    return nothing(data, 20, algorithm=NoOp(MEGABYTES_40), rounds=8, chunk=4)


def population(data: Path, participants: int, witness: str = "") -> Experiment:
    """100 of so many participants a round, who send 10 KB each; the driver counts ViTs."""
    algorithm = NoOp(witness=witness)
    return nothing(data, participants, family="vit", algorithm=algorithm, cohort=100, rounds=14, chunk=10)


def work(data: Path) -> Experiment:
    """50 participants who take 20 steps of a ViT of 6 blocks, 128 wide, on batches of 32 images of 17 tokens."""
    columns: dict[str, Any] = {"image": "image", "label": "label"}
    images = DataConfig(str(data), **columns, image_size=32, channels=3, num_classes=CLASSES)
    return Experiment(
        algorithm=FedAvg(lr=1e-3, batch_size=BATCH, clip=None),
        task=TaskConfig(images, patch_size=8),
        tiers=(Tier("device", Form(32, 1)),),
        intermediate=Form(64, 3),
        target=Form(128, 6),
        partition=Partition("iid"),
        participants=WORKERS,
        rounds=3,
        validation_share=0.0,
        eval_every=NEVER,
        scored="cohort",
    )


def without_model() -> Experiment:
    """20 participants with digits who send 10 KB each, without any model: for the time to the first round."""
    form = Form(8, 1, heads=2)
    return Experiment(
        algorithm=NoOp(),
        task=TaskConfig(digits(), __name__),
        tiers=(Tier("device", form),),
        intermediate=form,
        target=form,
        partition=Partition("iid"),
        participants=20,
        rounds=1,
    )


def with_vit() -> Experiment:
    """The same participants with FedAvg of a small Hugging Face ViT."""
    forms = {"tiers": (Tier("device", Form(16, 1)),), "intermediate": Form(24, 2), "target": Form(32, 2)}
    return dataclasses.replace(without_model(), algorithm=FedAvg(), task=TaskConfig(digits(), patch_size=4), **forms)


def mixed() -> Experiment:
    """Fed-Grow with eight participants of three forms, each asking for a CPU: four hosts fill two nodes of two CPUs."""
    cpus = [f"tiers.{number}.num_cpus=1" for number in range(3)]
    return with_settings(tiny(), ["participants=8", "algorithm.local_epochs=1", "algorithm.small_epochs=1", *cpus])
