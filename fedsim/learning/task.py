"""The task: model family + data + loss + score."""

import contextlib
import copy
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.core.fields import check_range, check_types, refuse
from fedsim.core.seeding import generator as stream
from fedsim.core.seeding import torch_seeded
from fedsim.core.submodel import ParamSpec
from fedsim.core.tree import Tree
from fedsim.data.config import PER_TOKEN
from fedsim.data.source import DataConfig, Dataset, Split, load
from fedsim.data.text import IGNORED
from fedsim.data.vision import floats, resized
from fedsim.learning.augmentation import Augmentation, augmented
from fedsim.learning.entities import EntityCounts, EntityTags
from fedsim.learning.masking import masked
from fedsim.learning.skeleton import called_with, dropping, skeleton
from fedsim.models import Form, Inputs, get_family


Batch = dict[str, Tensor]
MOST_SCORED, SCORING_BYTES = 256, 2**28  # examples at once, and bytes of a layer's output for them


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """What is learned: the data, and the family of model that learns them.

    - `data`: see `fedsim.data.source.DataConfig`.
    - `family`: a file of `fedsim/models`, or the dotted name of a module that declares `FAMILY`.
    - `patch_size`: side of an image patch in pixels (image families).
    - `settings`: fields of the Hugging Face config and their values, over the family's own: `(("rope_theta", 5e5),)`.
    - `augmentation`: of images that are trained on; None: they are as they are.
    - `label_smoothing`: the share of a label, in training, that goes to all classes alike.
    - `dropout`: the probability that every dropout of the family has in training; its config may name several.

    The last three are for training alone: models are scored and deployed without them, and by the plain loss.
    """

    data: DataConfig = DataConfig()
    family: str = dataclasses.field(default="vit", metadata={"module": True})
    patch_size: int = 2
    settings: tuple[tuple[str, str | int | float | bool], ...] = ()
    augmentation: Augmentation | None = dataclasses.field(default=None, metadata={"later": True})
    label_smoothing: float = dataclasses.field(default=0.0, metadata={"later": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"later": True})

    def __post_init__(self) -> None:
        check_types(self, "task")
        check_range(self, "task", "patch_size", least=1)
        names = [name for name, _ in self.settings]
        if "" in names or len({*names}) < len(names):
            refuse("task.settings", self.settings, "pairs of a field's name, each named once, and its value")
        family = get_family(self.family)
        for name in ("label_smoothing", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                refuse(f"task.{name}", getattr(self, name), "at least 0, and below 1")
        if self.dropout and not family.dropouts:
            refuse("task.dropout", self.dropout, f"0: the family {self.family!r} names no dropout")
        if self.augmentation is not None and self.data.kind != "image":
            raise ValueError(
                f"task.augmentation: must be None for data of kind {self.data.kind!r}: it is of images alone"
            )

    @property
    def inputs(self) -> Inputs:
        """What a model must know of the data."""
        data = self.data
        if data.kind == "image":
            return Inputs(
                "image",
                data.num_classes,
                image_size=data.image_size,
                channels=data.channels,
                patch_size=self.patch_size,
                settings=self.settings,
            )
        padding, end = data.special_ids
        return Inputs(
            data.kind,
            data.num_classes,
            vocab_size=data.vocab_size,
            max_length=data.max_length,
            padding_id=padding,
            end_id=end,
            mask_id=data.mask_id,
            settings=self.settings,
        )


@dataclasses.dataclass(frozen=True)
class Score:
    """What a model got right on a split: counts per class (one class for language modelling).

    `entities`: only for token classes that are the tags of entities.
    """

    loss: float
    correct: np.ndarray  # (classes,)
    count: np.ndarray  # (classes,)
    entities: EntityCounts | None = None

    @property
    def accuracy(self) -> float:
        """Share of examples (of labelled tokens, where tokens are) that were right; NaN on an empty split."""
        total = self.count.sum()
        return float(self.correct.sum() / total) if total else float("nan")

    @property
    def precision(self) -> float:
        """Share of the entities said that are there; NaN where entities are not scored."""
        return self.entities.precision if self.entities else float("nan")

    @property
    def recall(self) -> float:
        """Share of the entities there that are said; NaN where entities are not scored."""
        return self.entities.recall if self.entities else float("nan")

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; NaN where entities are not scored."""
        return self.entities.f1 if self.entities else float("nan")

    def accuracy_under(self, mix: np.ndarray) -> float:
        """Per-class accuracy weighted by a label mix `(classes,)`: what the owner of such data would experience."""
        weight = np.where(self.count > 0, mix, 0.0)
        if not weight.sum():
            return float("nan")
        per_class = self.correct / np.maximum(self.count, 1)
        return float((weight * per_class).sum() / weight.sum())


class Task:
    """A `TaskConfig` brought to life in one process. `dataset=None` (no data loaded) is enough to build and count.

    Tasks are equal if their configs are, and travel without data.
    """

    def __init__(self, config: TaskConfig, dataset: Dataset | None = None) -> None:
        self.config = config
        self.inputs = config.inputs
        self.dataset = dataset

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.config == other.config  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash(self.config)

    def __reduce__(self) -> tuple[type["Task"], tuple[TaskConfig]]:
        return type(self), (self.config,)

    # models ---------------------------------------------------------------------------------------------------------

    def specs(self, form: Form) -> dict[str, ParamSpec]:
        """The named axes of every parameter of a model of this form."""
        return get_family(self.config.family).specs(form, self.inputs)

    def skeleton(self, form: Form) -> nn.Module:
        """A module to run trees in with `called_with`. Shared by the whole process: never change it."""
        return skeleton(self.config.family, form, self.inputs, self.config.dropout)

    def fresh(self, form: Form, seed: int) -> Tree:
        """Randomly initialised parameters, as the Hugging Face class draws them."""
        with torch_seeded(seed):
            module = get_family(self.config.family).build(form, self.inputs)
        return {name: parameter.detach() for name, parameter in module.named_parameters()}

    def module(self, form: Form, tree: Mapping[str, Tensor]) -> nn.Module:
        """A module of its own with these parameters, in evaluation mode."""
        module = copy.deepcopy(self.skeleton(form)).to(next(iter(tree.values())).device)
        for name, parameter in module.named_parameters():
            parameter.data = tree[name].detach()
        return module.eval()

    def forward(self, form: Form, tree: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Logits of the model of this form with these parameters; gradients reach `tree`."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        return called_with(self.skeleton(form), tree, inputs).logits

    def dropping(self, seed: int) -> contextlib.AbstractContextManager[None]:
        """Inside, models drop out as the config says, by draws of this seed; elsewhere they never do."""
        return dropping(seed) if self.config.dropout else contextlib.nullcontext()

    # data -----------------------------------------------------------------------------------------------------------

    def batch(
        self,
        split: Split,
        index: Tensor,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
        augment: torch.Generator | None = None,
    ) -> Batch:
        """Model inputs and labels of some examples. Pixels become floats, in [-1, 1] unless the data say otherwise.

        `augment`: draws how images are augmented, where the config says so; None: they are not.
        `generator`: draws which tokens are to be predicted, where tokens are masked and the split has not been masked
        before (it has no `labels` among its inputs); None: always the same stream.
        """
        batch = split.examples(index)
        if self.inputs.kind == "lm":
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        elif self.inputs.kind == "mlm" and "labels" not in batch:
            batch = self._masked(batch, generator)
        elif "labels" not in batch:
            batch["labels"] = split.labels[index]
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        if "pixel_values" in batch:
            batch["pixel_values"] = resized(batch["pixel_values"], self.config.data.image_size)
            if augment is not None and self.config.augmentation is not None:
                batch |= augmented(batch, self.inputs.num_classes, self.config.augmentation, augment)
            batch["pixel_values"] = floats(batch["pixel_values"], self.config.data)
        return batch

    def stacked(self, batches: Sequence[Batch]) -> Batch:
        """Batches of one size as one, `(k, ...)`; texts are padded to the longest."""
        padding = {"input_ids": self.inputs.padding_id or 0, "attention_mask": 0, "labels": IGNORED}
        found = {}
        for name in batches[0]:
            each = [batch[name] for batch in batches]
            if name in padding and each[0].dim() == 2:
                longest = max(tensor.shape[1] for tensor in each)
                each = [F.pad(tensor, (0, longest - tensor.shape[1]), value=padding[name]) for tensor in each]
            found[name] = torch.stack(each)
        return found

    def _masked(self, batch: Batch, generator: torch.Generator | None) -> Batch:
        generator = generator or stream(0, "scoring/mask")
        ids, labels = masked(batch["input_ids"], batch["attention_mask"], self.inputs, generator)
        return batch | {"input_ids": ids, "labels": labels}

    def example(self, size: int) -> Batch:
        """A batch of the right shapes that holds no data: for counting."""
        kind, inputs = self.inputs.kind, self.inputs
        if kind == "image":
            assert inputs.channels and inputs.image_size
            pixels = torch.zeros(size, inputs.channels, inputs.image_size, inputs.image_size)
            return {"pixel_values": pixels, "labels": torch.zeros(size, dtype=torch.long)}
        assert inputs.max_length
        tokens = torch.zeros(size, inputs.max_length, dtype=torch.long)
        labels = tokens if kind in PER_TOKEN else torch.zeros(size, dtype=torch.long)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}

    # loss and score -------------------------------------------------------------------------------------------------

    def aligned(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Predictions `(M, classes)` and what they should have been `(M,)`; M counts tokens where these are labelled.
        Labels of mixed images are shares of classes, `(M, classes)`.

        A token predicts the next one ("lm"), or itself ("tokens", "mlm").
        """
        labels = batch["labels"]
        if self.inputs.kind == "lm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        if self.inputs.kind in PER_TOKEN:
            return logits.flatten(0, 1), labels.flatten()
        return logits, labels

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """What is trained: mean cross-entropy over examples (over labelled tokens, where tokens are labelled)."""
        smoothing = self.config.label_smoothing
        return F.cross_entropy(*self.aligned(logits, batch), ignore_index=IGNORED, label_smoothing=smoothing)

    def distillation(self, logits: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy against another's softmax, over what `loss` is a mean over."""
        student, labels = self.aligned(logits, batch)
        soft = self.aligned(teacher, batch)[0].softmax(-1)
        kept = torch.ones_like(student[:, 0]) if labels.is_floating_point() else (labels != IGNORED).to(student.dtype)
        return (F.cross_entropy(student, soft, reduction="none") * kept).sum() / kept.sum()

    def _scored_at_once(self, model: nn.Module) -> int:
        """Goes by sizes alone, not by the memory there is: it decides bits."""
        inputs = self.inputs
        if inputs.kind == "image":
            assert inputs.image_size and inputs.patch_size
            tokens = (inputs.image_size // inputs.patch_size) ** 2 + 1
        else:
            tokens = inputs.max_length or 1
        widths = [getattr(layer, "out_features", getattr(layer, "nf", 1)) for layer in model.modules()]
        return max(1, min(MOST_SCORED, SCORING_BYTES // (4 * tokens * max(widths))))

    @torch.no_grad()
    def score(self, model: nn.Module, split: Split, batch_size: int | None = None) -> Score:
        """Loss and counts of right answers on a split; independent of `batch_size` to rounding.

        - `batch_size`: None: 256, or as many as leave each layer's output below `SCORING_BYTES`.

        Where tokens are masked, the same ones are, each time, for everyone who scores this split.

        **Raises:** `ValueError` for a model that says NaN: no class is the largest of its scores.
        """
        kind = self.inputs.kind
        if kind == "mlm" and "labels" not in split.inputs:
            split = Split(self._masked(dict(split.inputs), None), split.labels)
        tags = EntityTags.of(self.config.data.class_names) if kind == "tokens" else None
        entities = EntityCounts() if tags and len(split.labels) else None
        classes = 1 if kind in ("lm", "mlm") else self.inputs.num_classes
        device = next(model.parameters()).device
        batch_size = batch_size or self._scored_at_once(model)
        loss, correct, count = 0.0, np.zeros(classes, np.int64), np.zeros(classes, np.int64)
        for start in range(0, len(split.labels), batch_size):
            index = torch.arange(start, min(start + batch_size, len(split.labels)))
            batch = self.batch(split, index, device)
            logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
            predicted, labels = self.aligned(logits, batch)
            kept = labels != IGNORED
            predicted, labels = predicted[kept], labels[kept]
            loss += float(F.cross_entropy(predicted.double(), labels, reduction="sum"))
            said = predicted.argmax(-1)
            right = said == labels
            of_class = torch.zeros_like(labels) if classes == 1 else labels
            count += torch.bincount(of_class, minlength=classes).cpu().numpy()
            correct += torch.bincount(of_class[right], minlength=classes).cpu().numpy()
            if tags and entities:
                example = (batch["labels"] != IGNORED).nonzero()[:, 0]  # kept tokens, in the order of `aligned`
                entities += tags.count(labels.cpu().numpy(), said.cpu().numpy(), example.cpu().numpy())
        if np.isnan(loss):
            raise ValueError("the logits of a model that is scored are NaN: must be numbers")
        total = int(count.sum())
        return Score(loss / total if total else float("nan"), correct, count, entities)


def load_task(config: TaskConfig, data_dir: str | None) -> Task:
    """The task with its data. **Raises:** `ValueError` where the data are missing or not as the config says."""
    return Task(config, load(config.data, data_dir))
