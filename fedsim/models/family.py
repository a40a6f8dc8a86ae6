"""What the platform asks of a model family, and the size of a model."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedsim.fields import check_range, check_types
from fedsim.submodel import ParamSpec


if TYPE_CHECKING:  # torch models are only built where they are needed
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True)
class Form:
    """The size of a transformer: what differs between participants, the intermediate form and the target.

    - `width`: size of the residual stream.
    - `depth`: number of blocks.
    - `heads`: attention heads; must divide `width`.
    - `mlp`: inner width of the feed-forward part; None means `width` (FFN ratio 1, as in the Fed-Grow ladders).
    """

    width: int
    depth: int
    heads: int = 4
    mlp: int | None = None

    def __post_init__(self) -> None:
        check_types(self, "form")
        check_range(self, "form", "width", "depth", "heads", "mlp", least=1)
        if self.width % self.heads:
            raise ValueError(f"form.heads={self.heads}: must divide form.width={self.width}")

    @property
    def inner(self) -> int:
        """Inner width of the feed-forward part."""
        return self.width if self.mlp is None else self.mlp

    @property
    def axes(self) -> Mapping[str, int]:
        """Sizes of the named axes."""
        return {
            "embed": self.width,
            "head": self.heads,
            "head_dim": self.width // self.heads,
            "mlp": self.inner,
        }

    def __str__(self) -> str:
        return f"{self.width}x{self.depth}"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a model must know of the data it is built for. Fields that a family does not use stay at None."""

    kind: str  # "image", "text" or "lm"
    num_classes: int
    image_size: int | None = None
    channels: int | None = None
    patch_size: int | None = None
    vocab_size: int | None = None
    max_length: int | None = None
    padding_id: int | None = None
    end_id: int | None = None


class Family(abc.ABC):
    """One Hugging Face family. Stateless; a module of this folder holds one instance named `FAMILY`."""

    @abc.abstractmethod
    def check(self, form: Form, inputs: Inputs) -> None:
        """**Raises:** `ValueError` if no model of this form exists for such data."""

    @abc.abstractmethod
    def build(self, form: Form, inputs: Inputs) -> "PreTrainedModel":
        """A randomly initialised Hugging Face module (draws from torch's global stream)."""

    @abc.abstractmethod
    def specs(self, form: Form, inputs: Inputs) -> dict[str, ParamSpec]:
        """The named axes of every parameter of `build(form, inputs)`."""
