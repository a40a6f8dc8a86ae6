"""What the platform asks of a model family, and the size of a model."""

import abc
import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from fedsim.core.fields import check_range, check_types
from fedsim.core.limits import check_memory
from fedsim.core.seeding import torch_seeded
from fedsim.core.submodel import ParamSpec


if TYPE_CHECKING:  # torch models are only built where they are needed
    from transformers import PretrainedConfig, PreTrainedModel


@dataclasses.dataclass(frozen=True)
class Form:
    """The size of a transformer: what differs between participants, the intermediate form and the target.

    - `width`: size of the residual stream.
    - `depth`: number of blocks.
    - `heads`: attention heads; must divide `width` unless `head_dim` is given.
    - `mlp`: inner width of the feed-forward part; None means `width` (FFN ratio 1, as in the Fed-Grow ladders).
    - `kv_heads`: heads of keys and values, each shared by `heads / kv_heads` heads of queries (grouped-query
      attention); None means `heads`.
    - `head_dim`: size of a head; None means `width / heads`.
    - `norm_eps`: what normalisations add to the variance; None means what the family says for this width.
    """

    width: int
    depth: int = dataclasses.field(metadata={"most": 1000})
    heads: int = 4
    mlp: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        check_types(self, "form")
        check_range(self, "form", "width", "depth", "heads", "mlp", "kv_heads", "head_dim", least=1)
        check_range(self, "form", "norm_eps", least=0)
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"form.heads={self.heads}: must divide form.width={self.width}, or give form.head_dim")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"form.kv_heads={self.kv_heads}: must divide form.heads={self.heads}")

    @property
    def inner(self) -> int:
        """Inner width of the feed-forward part."""
        return self.width if self.mlp is None else self.mlp

    @property
    def head_size(self) -> int:
        """Coordinates of one attention head."""
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def axes(self) -> Mapping[str, int]:
        """Sizes of the named axes: `head` is `kv_head` times `group`, `rotary` a head size that RoPE turns in pairs."""
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        return {
            "embed": self.width,
            "head": self.heads,
            "kv_head": kv_heads,
            "group": self.heads // kv_heads,
            "head_dim": self.head_size,
            "rotary": self.head_size,
            "mlp": self.inner,
        }

    def __str__(self) -> str:
        return f"{self.width}x{self.depth}"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a model must know of the data it is built for. Fields that a family does not use stay at None."""

    kind: str  # "image", "text", "tokens" (a class for each token), "lm" (next token) or "mlm" (masked token)
    num_classes: int
    image_size: int | None = None
    channels: int | None = None
    patch_size: int | None = None
    vocab_size: int | None = None
    max_length: int | None = None
    padding_id: int | None = None
    end_id: int | None = None
    mask_id: int | None = None
    settings: tuple[tuple[str, str | int | float | bool], ...] = ()  # of the Hugging Face config, over the family's own


class Family(abc.ABC):
    """One Hugging Face family. Stateless; a module of this folder holds one instance named `FAMILY`."""

    post_norm: bool = False  # whether a block normalises after adding to the residual stream (BERT), not before
    dropouts: tuple[str, ...] = ()  # fields of the Hugging Face config that are probabilities of dropout
    constants: tuple[str, ...] = ()  # fields of the Hugging Face config, beyond the form, that grown models must share

    @abc.abstractmethod
    def check(self, form: Form, inputs: Inputs) -> None:
        """**Raises:** `ValueError` if no model of this form exists for such data."""

    @abc.abstractmethod
    def model_class(self, inputs: Inputs) -> "type[PreTrainedModel]":
        """The Hugging Face class for such data."""

    @abc.abstractmethod
    def config(self, form: Form, inputs: Inputs) -> "PretrainedConfig":
        """The Hugging Face config of a model of this form, without dropout."""

    @abc.abstractmethod
    def form(self, config: "PretrainedConfig") -> Form:
        """The form of a model with this config, every field given: the inverse of `config`.

        **Raises:** `ValueError` if the config is another family's.
        """

    @abc.abstractmethod
    def specs(self, form: Form, inputs: Inputs) -> dict[str, ParamSpec]:
        """The named axes of every parameter of `build(form, inputs)`, and where it stands: in a block, before or after.

        Early exits and heads of one's own are made of what stands after the blocks (`ParamSpec.after`).
        """

    def shared(self, config: "PretrainedConfig") -> dict[str, Any]:
        """What `constants` are in a config, by the settings that decide them: entries of a mapping each on its own."""
        flat: dict[str, Any] = {}
        for name in self.constants:
            value = getattr(config, name, None)
            flat |= dict(value) if isinstance(value, Mapping) else {name: value}
        return {name: value for name, value in flat.items() if value is not None}

    def build(self, form: Form, inputs: Inputs) -> "PreTrainedModel":
        """A randomly initialised Hugging Face module (draws from torch's global stream)."""
        self.check(form, inputs)
        return self.model_class(inputs)(self.config(form, inputs))

    def with_dropout(self, form: Form, inputs: Inputs, dropout: float) -> "PreTrainedModel":
        """The same, in training mode, with this probability in every field of `dropouts`."""
        self.check(form, inputs)
        config = self.config(form, inputs)
        for name in self.dropouts:
            setattr(config, name, dropout)
        return self.model_class(inputs)(config).train()

    @functools.lru_cache(maxsize=256)  # noqa: B019, families are few and live as long as the process
    def check_memory(self, form: Form, inputs: Inputs) -> None:
        """**Raises:** `ValueError` if this machine has less memory than the parameters of such a model take."""
        with torch_seeded(0), torch.device("meta"):
            model = self.build(form, inputs)
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        asked = {name: value for name, value in vars(form).items() | vars(inputs).items() if value is not None}
        check_memory("form, task", dict(sorted(asked.items())), size)
