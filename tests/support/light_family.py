"""A family outside the package and outside Hugging Face, in plain torch: hosts that come back need not import it.

Residual blocks on the pixels of an image as one vector: what a run is made of, without attention.
"""

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from fedsim.core.submodel import ParamSpec
from fedsim.models.declare import refuse_kind, stacked
from fedsim.models.family import Family, Form, Inputs


ENTRY = {
    "entry.weight": ("embed", ""),
    "entry.bias": ("embed",),
}

ENDING = {
    "last.weight": ("*embed",),
    "last.bias": ("+embed",),
    "head.weight": ("=class", "<embed"),
    "head.bias": ("=class",),
}

BLOCK = {
    "norm.weight": ("*embed",),
    "norm.bias": ("+embed",),
    "up.weight": ("mlp", "<embed"),
    "up.bias": ("mlp",),
    "down.weight": ("embed", "<mlp"),
    "down.bias": ("embed",),
}


class Block(nn.Module):
    def __init__(self, form: Form) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(form.width)
        self.up, self.down = nn.Linear(form.width, form.inner), nn.Linear(form.inner, form.width)

    def forward(self, stream: Tensor) -> Tensor:
        return stream + self.down(nn.functional.gelu(self.up(self.norm(stream))))


class Model(nn.Module):
    def __init__(self, form: Form, inputs: Inputs) -> None:
        super().__init__()
        assert inputs.image_size and inputs.channels
        self.entry = nn.Linear(inputs.channels * inputs.image_size**2, form.width)
        self.blocks = nn.ModuleList(Block(form) for _ in range(form.depth))
        self.last, self.head = nn.LayerNorm(form.width), nn.Linear(form.width, inputs.num_classes)

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        stream = self.entry(pixel_values.flatten(1))
        for block in self.blocks:
            stream = block(stream)
        return SimpleNamespace(logits=self.head(self.last(stream)))


class Light(Family):
    def check(self, form: Form, inputs: Inputs) -> None:
        refuse_kind(__name__, inputs, "image")

    def build(self, form: Form, inputs: Inputs) -> Any:
        self.check(form, inputs)
        return Model(form, inputs)

    def specs(self, form: Form, inputs: Inputs) -> dict[str, ParamSpec]:
        return stacked(form, ENTRY, "blocks.", BLOCK, ENDING)

    def model_class(self, inputs: Inputs) -> Any:
        raise NotImplementedError("there is no Hugging Face class")

    def config(self, form: Form, inputs: Inputs) -> Any:
        raise NotImplementedError("there is no Hugging Face config")

    def form(self, config: Any) -> Form:
        raise NotImplementedError("there is no Hugging Face config")


FAMILY = Light()
