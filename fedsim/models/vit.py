"""Vision Transformer: `ViTForImageClassification` (pre-LN, learned positions, class token)."""

from typing import TYPE_CHECKING

from transformers import ViTConfig, ViTForImageClassification

from fedsim.core.submodel import ParamSpec
from fedsim.models.declare import (
    ACTIVATIONS,
    chosen,
    refuse_foreign,
    refuse_grouped_queries,
    refuse_kind,
    stacked,
    without,
)
from fedsim.models.family import Family, Form, Inputs


if TYPE_CHECKING:
    from transformers import PretrainedConfig


PREFIX = "vit.layers."

EMBEDDINGS = {
    "vit.embeddings.cls_token": ("", "", "embed"),
    "vit.embeddings.position_embeddings": ("", "", "embed"),
    "vit.embeddings.patch_embeddings.projection.weight": ("embed", "", "", ""),
    "vit.embeddings.patch_embeddings.projection.bias": ("embed",),
}

ENDING = {
    "vit.layernorm.weight": ("*embed",),
    "vit.layernorm.bias": ("+embed",),
    "classifier.weight": ("=class", "<embed"),
    "classifier.bias": ("=class",),
}

BLOCK = {
    "attention.q_proj.weight": ("query:head head_dim", "<embed"),
    "attention.q_proj.bias": ("query:head head_dim",),
    "attention.k_proj.weight": ("key:head head_dim", "<embed"),
    "attention.k_proj.bias": ("key:head head_dim",),
    "attention.v_proj.weight": ("value:head head_dim", "<embed"),
    "attention.v_proj.bias": ("value:head head_dim",),
    "attention.o_proj.weight": ("embed", "<value:head head_dim"),
    "attention.o_proj.bias": ("embed",),
    "layernorm_before.weight": ("*embed",),
    "layernorm_before.bias": ("+embed",),
    "layernorm_after.weight": ("*embed",),
    "layernorm_after.bias": ("+embed",),
    "mlp.fc1.weight": ("mlp", "<embed"),
    "mlp.fc1.bias": ("mlp",),
    "mlp.fc2.weight": ("embed", "<mlp"),
    "mlp.fc2.bias": ("embed",),
}

QKV_BIASES = [f"attention.{letter}_proj.bias" for letter in "qkv"]

SETTINGS = {"hidden_act": ACTIVATIONS, "qkv_bias": bool, "initializer_range": float}


class Vit(Family):
    """`transformers.ViTForImageClassification`. Heads may be of any size; there are no grouped queries."""

    dropouts = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    constants = ("hidden_act", "qkv_bias", "image_size", "patch_size", "num_channels")

    def check(self, form: Form, inputs: Inputs) -> None:
        refuse_kind("vit", inputs, "image")
        image, patch = inputs.image_size, inputs.patch_size
        if not image or not patch or image % patch:
            raise ValueError(f"task.patch_size={patch}: must divide task.data.image_size={image}")
        refuse_grouped_queries("vit", form)
        chosen(inputs, SETTINGS)

    def model_class(self, inputs: Inputs) -> type[ViTForImageClassification]:
        return ViTForImageClassification

    def config(self, form: Form, inputs: Inputs) -> ViTConfig:
        assert inputs.image_size and inputs.patch_size and inputs.channels
        config = ViTConfig(
            hidden_size=form.width,
            num_hidden_layers=form.depth,
            num_attention_heads=form.heads,
            intermediate_size=form.inner,
            layer_norm_eps=1e-12 if form.norm_eps is None else float(form.norm_eps),
            image_size=inputs.image_size,
            patch_size=inputs.patch_size,
            num_channels=inputs.channels,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **chosen(inputs, SETTINGS),
        )
        config.num_labels = inputs.num_classes
        if form.head_size * form.heads != form.width:  # the attention asks for this field, the config class has none
            setattr(config, "head_dim", form.head_size)  # noqa: B010, pyright knows the declared fields only
        return config

    def form(self, config: "PretrainedConfig") -> Form:
        refuse_foreign(config, "vit")
        return Form(
            config.hidden_size,
            config.num_hidden_layers,
            heads=config.num_attention_heads,
            mlp=config.intermediate_size,
            kv_heads=config.num_attention_heads,
            head_dim=getattr(config, "head_dim", config.hidden_size // config.num_attention_heads),
            norm_eps=config.layer_norm_eps,
        )

    def specs(self, form: Form, inputs: Inputs) -> dict[str, ParamSpec]:
        biased = dict(inputs.settings).get("qkv_bias", True)
        return stacked(form, EMBEDDINGS, PREFIX, BLOCK if biased else without(BLOCK, QKV_BIASES), ENDING)


FAMILY = Vit()
