"""DeBERTa-v2 and ModernBERT as their checkpoints are: configs as released, heads of other kinds, what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, DebertaV2Config, DebertaV2ForMaskedLM

from fedsim.core.seeding import derive
from fedsim.learning.starts import load_small
from fedsim.models import Form, get_family
from fedsim.models.checkpoint import Checkpoint
from tests.support.family_rows import ROWS, Row


pytestmark = pytest.mark.usefixtures("one_thread")

SEED = 5

# The fields of the config.json of microsoft/deberta-v3-base and of answerdotai/ModernBERT-base that concern the model.
DEBERTA_V3_BASE = {
    "model_type": "deberta-v2",
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "layer_norm_eps": 1e-7,
    "max_relative_positions": -1,
    "position_biased_input": False,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "type_vocab_size": 0,
    "vocab_size": 128_100,
}
MODERNBERT_BASE = {
    "model_type": "modernbert",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 50_281,
    "classifier_activation": "gelu",
    "classifier_bias": False,
    "classifier_dropout": 0.0,
    "classifier_pooling": "mean",
    "cls_token_id": 50_281,
    "decoder_bias": True,
    "deterministic_flash_attn": False,
    "embedding_dropout": 0.0,
    "eos_token_id": 50_282,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160_000.0,
    "hidden_activation": "gelu",
    "hidden_size": 768,
    "initializer_cutoff_factor": 2.0,
    "initializer_range": 0.02,
    "intermediate_size": 1152,
    "layer_norm_eps": 1e-5,
    "local_attention": 128,
    "local_rope_theta": 10_000.0,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "mlp_dropout": 0.0,
    "norm_bias": False,
    "norm_eps": 1e-5,
    "num_attention_heads": 12,
    "num_hidden_layers": 22,
    "pad_token_id": 50_283,
    "position_embedding_type": "absolute",
    "sep_token_id": 50_282,
    "tie_word_embeddings": True,
    "vocab_size": 50_368,
}
RELEASED = {"deberta": DEBERTA_V3_BASE, "modernbert": MODERNBERT_BASE}
FORMS = {
    "deberta": Form(768, 12, heads=12, mlp=3072, kv_heads=12, head_dim=64, norm_eps=1e-7),
    "modernbert": Form(768, 22, heads=12, mlp=1152, kv_heads=12, head_dim=64, norm_eps=1e-5),
}


def written(folder: Path, config: dict[str, Any]) -> Any:
    (folder / "config.json").write_text(json.dumps(config))
    return AutoConfig.from_pretrained(folder, local_files_only=True)


def drawn(module: nn.Module) -> Any:
    """The same module, nothing of it as it was initialised."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return module


@pytest.mark.parametrize("family", RELEASED)
def test_a_released_config_has_a_form(family: str, tmp_path: Path) -> None:
    assert get_family(family).form(written(tmp_path, RELEASED[family])) == FORMS[family]


REFUSED = [
    ("deberta", {"relative_attention": False}, "config.relative_attention=False: must be True"),
    ("deberta", {"pos_att_type": "p2c"}, r"config.pos_att_type=\['p2c'\]: must be \['p2c', 'c2p'\]"),
    ("deberta", {"pos_att_type": None}, r"config.pos_att_type=\[\]: must be \['p2c', 'c2p'\]"),
    ("deberta", {"share_att_key": False}, "config.share_att_key=False: must be True"),
    ("deberta", {"norm_rel_ebd": "none"}, "config.norm_rel_ebd='none': must be 'layer_norm'"),
    ("deberta", {"conv_kernel_size": 3, "conv_act": "gelu"}, "config.conv_kernel_size=3: must be 0"),
    ("deberta", {"embedding_size": 128}, "config.embedding_size=128: must be config.hidden_size=768"),
    ("deberta", {"pooler_hidden_size": 64}, "config.pooler_hidden_size=64: must be config.hidden_size=768"),
    ("deberta", {"max_relative_positions": 64}, "config.max_relative_positions=64: must be .*=512, or -1"),
    ("deberta", {"model_type": "bert"}, "config.model_type='bert': must be 'deberta-v2'"),
    ("modernbert", {"norm_bias": True}, "config.norm_bias=True: must be False"),
    ("modernbert", {"attention_bias": True}, "config.attention_bias=True: must be False"),
    ("modernbert", {"decoder_bias": False}, "config.decoder_bias=False: must be True"),
    (
        "modernbert",
        {"global_attn_every_n_layers": 2},
        r"config.layer_types=\[.*: must be 'full_attention' in block 0",
    ),
    (
        "modernbert",
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        "config.rope_parameters.*rope_type='linear': must be 'default'",
    ),
    ("modernbert", {"model_type": "bert"}, "config.model_type='bert': must be 'modernbert'"),
]


@pytest.mark.parametrize("family, changes, message", REFUSED, ids=lambda value: "-".join(value) if value else "")
def test_what_no_model_of_a_family_can_be_is_refused(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = written(tmp_path, RELEASED[family] | changes)
    with pytest.raises(ValueError, match=message):
        get_family(family).form(config)


@pytest.mark.parametrize("field", ["share_att_key", "norm_rel_ebd"])
def test_a_field_that_a_config_does_not_name_is_as_in_the_library(field: str, tmp_path: Path) -> None:
    config = written(tmp_path, {name: value for name, value in DEBERTA_V3_BASE.items() if name != field})
    with pytest.raises(ValueError, match=f"config.{field}="):
        get_family("deberta").form(config)


@pytest.mark.parametrize(
    ("name", "setting", "value", "message"),
    [
        (
            "deberta-text",
            "position_buckets",
            1,
            "task.settings.position_buckets=1: must be a whole number, and at least",
        ),
        ("deberta-text", "share_att_key", False, "task.settings='share_att_key': must be among hidden_act, "),
        ("deberta-mlm", "legacy", True, "task.settings='legacy': must be among"),
        (
            "modernbert-text",
            "local_attention",
            1,
            "task.settings.local_attention=1: must be a whole number, and at least 2",
        ),
        ("modernbert-text", "classifier_pooling", "max", "classifier_pooling='max': must be one of cls, mean"),
        ("modernbert-mlm", "norm_bias", True, "task.settings='norm_bias': must be among classifier_activation, "),
    ],
)
def test_settings_that_are_refused(name: str, setting: str, value: Any, message: str) -> None:
    row = ROWS[name]
    inputs = dataclasses.replace(row.task.inputs, settings=((setting, value),))
    with pytest.raises(ValueError, match=message):
        get_family(row.config.family).build(row.small, inputs)


@pytest.mark.parametrize(
    ("name", "form", "message"),
    [
        ("deberta-text", Form(16, 1, heads=4, kv_heads=2), "form.kv_heads=2: must be form.heads=4: 'deberta' has no"),
        ("deberta-text", Form(16, 1, heads=4, head_dim=8), "form.head_dim=8: must be form.width / form.heads = 16 / 4"),
        ("modernbert-mlm", Form(16, 1, heads=4, kv_heads=2), "form.kv_heads=2: must be form.heads=4"),
        ("modernbert-mlm", Form(16, 1, heads=4, head_dim=8), "form.head_dim=8: must be form.width / form.heads"),
        ("modernbert-mlm", Form(12, 1, heads=4), "form.head_dim=3: must be even"),
    ],
)
def test_forms_that_are_refused(name: str, form: Form, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_family(ROWS[name].config.family).check(form, ROWS[name].task.inputs)


# checkpoints of which something is missing, or is another's -----------------------------------------------------------


def with_room(row: Row) -> Row:
    """Room for the mask, whatever the data."""
    settings = (*row.config.settings, ("vocab_size", 259))
    return dataclasses.replace(row, config=dataclasses.replace(row.config, settings=settings))


@pytest.mark.parametrize("family", RELEASED)
@pytest.mark.parametrize("wanted", ["text", "tokens", "mlm"])
@pytest.mark.parametrize("of", ["text", "mlm", "nothing"])
def test_a_head_that_a_checkpoint_lacks_is_drawn_from_the_seed(
    family: str, of: str, wanted: str, tmp_path: Path
) -> None:
    row = with_room(ROWS[f"{family}-{wanted}"])
    held = with_room(ROWS[f"{family}-{'tokens' if of == 'nothing' else of}"])
    module = drawn(get_family(family).build(held.small, held.task.inputs))
    (module.base_model if of == "nothing" else module).save_pretrained(tmp_path)
    tree = load_small(row.task, row.small, Checkpoint(str(tmp_path)), SEED)

    theirs, fresh = dict(module.named_parameters()), row.task.fresh(row.small, derive(SEED, "head"))
    body = {name for name, _ in module.named_parameters() if name.startswith(f"{module.base_model_prefix}.")}
    assert body <= tree.keys()
    ours = {name for name in tree if not torch.equal(tree[name], fresh[name])}
    assert all(torch.equal(tree[name], theirs[name]) for name in ours)
    parts = {name.split(".")[0] for name in tree} - {module.base_model_prefix}
    kept = {part for part in parts if of != "nothing" and any(n.startswith(f"{part}.") for n in theirs)}
    assert ours == {name for name in tree if name in body or name.split(".")[0] in kept}


def test_the_older_head_of_deberta_counts_as_none(tmp_path: Path) -> None:
    row = ROWS["deberta-mlm"]
    config = get_family("deberta").config(row.small, row.task.inputs)
    module = drawn(DebertaV2ForMaskedLM(DebertaV2Config.from_dict(config.to_dict() | {"legacy": True})))
    assert any(name.startswith("cls.") for name, _ in module.named_parameters())
    module.save_pretrained(tmp_path)
    tree = load_small(row.task, row.small, Checkpoint(str(tmp_path)), SEED)
    fresh = row.task.fresh(row.small, derive(SEED, "head"))
    theirs = dict(module.named_parameters())
    for name in tree:
        assert torch.equal(tree[name], (fresh if name.startswith("lm_predictions.") else theirs)[name])


@pytest.mark.parametrize("setting", [("global_rope_theta", 50.0), ("local_rope_theta", 7.0), ("local_attention", 6)])
def test_a_checkpoint_with_another_constant_is_refused_with_the_setting_that_it_needs(
    setting: tuple[str, float], tmp_path: Path
) -> None:
    row = ROWS["modernbert-text"]
    config = dataclasses.replace(row.config, settings=tuple((dict(row.config.settings) | dict([setting])).items()))
    other = dataclasses.replace(row, config=config)
    module = drawn(get_family("modernbert").build(row.small, other.task.inputs))
    module.save_pretrained(tmp_path)
    checkpoint = Checkpoint(str(tmp_path))
    with pytest.raises(ValueError, match=rf"{setting[0]} is {setting[1]!r}, here .* task\.settings=.*{setting[0]}"):
        load_small(row.task, row.small, checkpoint, SEED)
    tree = load_small(other.task, row.small, checkpoint, SEED)
    assert all(torch.equal(tree[name], parameter) for name, parameter in module.named_parameters())


def test_what_released_weights_hold_besides_is_passed_over(tmp_path: Path) -> None:
    """The generator's head, and embeddings of positions that no model of version 3 reads."""
    row = ROWS["deberta-mlm"]
    module = drawn(get_family("deberta").build(row.small, row.task.inputs))
    module.save_pretrained(tmp_path)
    width = row.small.width
    more = {
        "mask_predictions.dense.weight": (width, width),
        "deberta.embeddings.position_embeddings.weight": (512, width),
    }
    weights = load_file(tmp_path / "model.safetensors") | {name: torch.ones(shape) for name, shape in more.items()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    tree = load_small(row.task, row.small, Checkpoint(str(tmp_path)), SEED)
    assert all(torch.equal(tree[name], parameter) for name, parameter in module.named_parameters())


@pytest.mark.parametrize("name", ["deberta-tokens", "modernbert-tokens"])
def test_weights_under_a_config_as_released_are_read(name: str, tmp_path: Path) -> None:
    """The fields as they are on the hub, at the size of a test; the vocabulary and the window are the experiment's."""
    row = ROWS[name]
    family = get_family(row.config.family)
    module = drawn(family.build(row.small, row.task.inputs))
    module.save_pretrained(tmp_path)
    config, sizes = module.config, ("vocab_size", "max_position_embeddings", "local_attention", "num_hidden_layers")
    sizes += ("hidden_size", "intermediate_size", "num_attention_heads", "pad_token_id", "classifier_pooling")
    released = RELEASED[row.config.family]
    same = {field: getattr(config, field) for field in sizes if field in released}
    labels = {"id2label": {str(i): str(i) for i in range(3)}, "label2id": {str(i): i for i in range(3)}}
    (tmp_path / "config.json").write_text(json.dumps(released | same | labels))
    tree = load_small(row.task, row.small, Checkpoint(str(tmp_path)), SEED)
    assert all(torch.equal(tree[name], parameter) for name, parameter in module.named_parameters())
