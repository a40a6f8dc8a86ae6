"""Vision Transformer: `ViTForImageClassification` (pre-LN, learned positions, class token)."""

from transformers import ViTConfig, ViTForImageClassification

from fedsim.models.family import Family, Form, Inputs
from fedsim.submodel import ParamSpec


PREFIX = "vit.layers."

OUTSIDE = {
    "vit.embeddings.cls_token": ("", "", "embed"),
    "vit.embeddings.position_embeddings": ("", "", "embed"),
    "vit.embeddings.patch_embeddings.projection.weight": ("embed", "", "", ""),
    "vit.embeddings.patch_embeddings.projection.bias": ("embed",),
    "vit.layernorm.weight": ("*embed",),
    "vit.layernorm.bias": ("+embed",),
    "classifier.weight": ("", "<embed"),
    "classifier.bias": ("",),
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


class Vit(Family):
    """`transformers.ViTForImageClassification`; dropout off, so that a step is a function of its batch."""

    def check(self, form: Form, inputs: Inputs) -> None:
        if inputs.kind != "image":
            raise ValueError(f"task.family='vit': reads images, but the data are of kind {inputs.kind!r}")
        image, patch = inputs.image_size, inputs.patch_size
        if not image or not patch or image % patch:
            raise ValueError(f"task.patch_size={patch}: must divide task.data.image_size={image}")

    def build(self, form: Form, inputs: Inputs) -> ViTForImageClassification:
        self.check(form, inputs)
        assert inputs.image_size and inputs.patch_size and inputs.channels
        config = ViTConfig(
            hidden_size=form.width,
            num_hidden_layers=form.depth,
            num_attention_heads=form.heads,
            intermediate_size=form.inner,
            image_size=inputs.image_size,
            patch_size=inputs.patch_size,
            num_channels=inputs.channels,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        config.num_labels = inputs.num_classes
        return ViTForImageClassification(config)

    def specs(self, form: Form, inputs: Inputs) -> dict[str, ParamSpec]:
        outside = {name: ParamSpec(dims, None, name) for name, dims in OUTSIDE.items()}
        blocks = {
            f"{PREFIX}{layer}.{role}": ParamSpec(dims, layer, role)
            for layer in range(form.depth)
            for role, dims in BLOCK.items()
        }
        return outside | blocks


FAMILY = Vit()
