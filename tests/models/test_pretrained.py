"""Checkpoints in: what is read is what was saved, and heads that are missing are drawn from the seed."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedsim.core.seeding import derive
from fedsim.models.checkpoint import Checkpoint
from tests.support.checkpoints import SEED, built, read, same, saved, with_task
from tests.support.family_rows import ROWS, TEXTS, batch_of, model_inputs, real
from tests.support.small_federation import weights_of


pytestmark = pytest.mark.usefixtures("one_thread", "no_network")


# what is read ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_a_checkpoint_computes_what_its_model_does(name: str, tmp_path: Path) -> None:
    row, module = ROWS[name], built(ROWS[name])
    tree = read(row, saved(module, tmp_path))
    assert same(tree, weights_of(module))
    assert tree.keys() == row.task.specs(row.small).keys()

    batch = model_inputs(batch_of(row.task))
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].float()
    by_library = type(module).from_pretrained(tmp_path, local_files_only=True)
    with torch.no_grad():
        expected, got = by_library(**batch).logits, row.task.forward(row.small, tree, batch)
    assert torch.equal(real(got, batch), real(expected, batch))
    assert expected.std() > 0.01


@pytest.mark.parametrize("name", ["vit", "gpt2-lm", "bert-text", "llama-lm-tied"])
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16], ids=str)
def test_every_precision_is_read_as_fp32(name: str, precision: torch.dtype, tmp_path: Path) -> None:
    row, module = ROWS[name], built(ROWS[name])
    rounded = {key: tensor.to(precision).float() for key, tensor in weights_of(module).items()}
    tree = read(row, saved(module.to(precision), tmp_path))
    assert {tensor.dtype for tensor in tree.values()} == {torch.float32}
    assert same(tree, rounded)


@pytest.mark.parametrize("layout", ["sharded", "bin"])
@pytest.mark.parametrize("name", ["vit", "bert-mlm"])
def test_layouts_of_weight_files(name: str, layout: str, tmp_path: Path) -> None:
    row, module = ROWS[name], built(ROWS[name])
    checkpoint = saved(module, tmp_path, **({"max_shard_size": "4KB"} if layout == "sharded" else {}))
    if layout == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    else:
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert same(read(row, checkpoint), weights_of(module))


def test_constants_that_older_versions_saved_are_passed_over(tmp_path: Path) -> None:
    row = ROWS["gpt2-lm"]
    module = built(row)
    checkpoint = saved(module, tmp_path)
    more = {f"transformer.h.0.attn.{name}": torch.ones(1, 1, 4, 4) for name in ("bias", "masked_bias")}
    save_file(load_file(tmp_path / "model.safetensors") | more, tmp_path / "model.safetensors", {"format": "pt"})
    assert same(read(row, checkpoint), weights_of(module))


def test_everyone_in_a_process_holds_the_same_tensors(tmp_path: Path) -> None:
    row = ROWS["vit"]
    checkpoint = saved(built(row), tmp_path / "a")
    one, two = read(row, checkpoint), read(row, Checkpoint(checkpoint.path))
    assert all(one[name] is two[name] for name in one)
    one.clear()
    assert read(row, checkpoint), "the mapping is the caller's own, the tensors are not"
    assert not any(tensor.requires_grad for tensor in two.values())

    other = built(row, seed=2)
    saved(other, tmp_path / "a")
    assert same(read(row, checkpoint), weights_of(other)), "a folder that has changed is read again"


def test_reading_leaves_the_global_random_stream_alone(tmp_path: Path) -> None:
    row = ROWS["vit"]
    checkpoint = saved(built(row).base_model, tmp_path)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    read(row, checkpoint)
    assert torch.equal(torch.rand(3), expected)


# heads ----------------------------------------------------------------------------------------------------------------


ENTRIES = {  # what a checkpoint of one row lacks for another
    ("vit", "vit"): {"classifier"},
    ("bert-mlm", "bert-mlm"): {"cls"},
    ("bert-mlm", "bert-tokens"): {"classifier"},
    ("bert-mlm", "bert-text"): {"classifier", "bert.pooler"},
    ("bert-tokens", "bert-text"): {"bert.pooler"},
    ("bert-text", "bert-mlm"): {"cls"},
    ("bert-text", "bert-tokens"): set(),
    ("gpt2-lm", "gpt2-lm"): set(),
    ("gpt2-lm", "gpt2-text"): {"score"},
    ("gpt2-text", "gpt2-lm"): set(),
    ("llama-lm", "llama-lm"): {"lm_head"},
    ("llama-lm", "llama-text"): {"score"},
    ("llama-text", "llama-lm"): {"lm_head"},
}


@pytest.mark.parametrize("of, wanted", ENTRIES, ids=lambda name: name)
def test_a_missing_head_is_drawn_from_the_seed(of: str, wanted: str, tmp_path: Path) -> None:
    """A row for itself stands for its body alone, as a model without a head saves it."""
    row, module = ROWS[wanted], built(ROWS[of])
    if of.startswith("bert"):
        row = with_task(row, settings=(("vocab_size", 259),))  # room for the mask, whatever the data
        module = built(with_task(ROWS[of], settings=(("vocab_size", 259),)))
    checkpoint = saved(module.base_model if of == wanted else module, tmp_path)
    tree = read(row, checkpoint)
    held = {name.removeprefix(f"{module.base_model_prefix}."): tensor for name, tensor in weights_of(module).items()}
    drawn = {name for name in tree if name.startswith(tuple(f"{entry}." for entry in ENTRIES[of, wanted]))}
    assert len(drawn) >= len(ENTRIES[of, wanted])
    for name in tree.keys() - drawn:
        assert torch.equal(tree[name], held[name.removeprefix(f"{module.base_model_prefix}.")])
    fresh = row.task.fresh(row.small, derive(SEED, "head"))
    assert all(torch.equal(tree[name], fresh[name]) for name in drawn)
    if drawn:
        assert not same(read(row, checkpoint, seed=SEED + 1), tree)


def test_a_head_of_another_number_of_classes_is_drawn(tmp_path: Path) -> None:
    row = ROWS["bert-text"]
    module = built(row)
    checkpoint = saved(module, tmp_path)
    fewer = with_task(row, data=dataclasses.replace(TEXTS, num_classes=2))
    tree, held = read(fewer, checkpoint), weights_of(module)
    fresh = fewer.task.fresh(row.small, derive(SEED, "head"))
    for name in tree:
        assert torch.equal(tree[name], (fresh if name.startswith("classifier.") else held)[name])
    assert "bert.pooler.dense.weight" in held, "the pooler is another part, and stays"


def test_a_head_of_which_a_part_is_missing_is_refused(tmp_path: Path) -> None:
    row = ROWS["vit"]
    checkpoint = saved(built(row), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["classifier.bias"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"checkpoint\.path=.*lacks a parameter \(classifier\.bias\)"):
        read(row, checkpoint)
