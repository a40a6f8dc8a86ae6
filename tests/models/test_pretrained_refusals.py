"""Checkpoints that do not fit are refused before anything starts: broken folders, other models, other tokens."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import DeiTConfig, DeiTForImageClassification, PreTrainedTokenizerFast

from fedsim.data.byte_tokenizer import byte_tokenizer
from fedsim.data.config import pydoc
from fedsim.learning.starts import check_start
from fedsim.models import get_family
from fedsim.models.checkpoint import Checkpoint
from fedsim.models.pretrained import form_of
from tests.support.checkpoints import SEED, built, edited, read, same, saved, with_task
from tests.support.family_rows import LENGTH, ROWS, TEXTS
from tests.support.small_federation import weights_of


pytestmark = pytest.mark.usefixtures("one_thread", "no_network")


# weights that are refused ---------------------------------------------------------------------------------------------


def without_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_short(share: float, name: str = "model.safetensors") -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(share * len(whole))])

    return cut


def pickled(then: Callable[[Path], None]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        then(folder)

    return rewrite


def changed(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return rewrite


QUERY = "transformer.h.1.attn.c_attn.weight"

BROKEN: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no weights": (without_file, ["could not be read", "no file named model.safetensors"]),
    "cut near the end": (cut_short(0.99), ["could not be read", "SafetensorError"]),
    "cut in the header": (cut_short(0.01), ["could not be read", "SafetensorError"]),
    "empty": (cut_short(0.0), ["could not be read", "SafetensorError"]),
    "pickle cut near the end": (pickled(cut_short(0.99, "pytorch_model.bin")), ["could not be read"]),
    "pickle cut early": (pickled(cut_short(0.1, "pytorch_model.bin")), ["could not be read"]),
    "pickle empty": (pickled(cut_short(0.0, "pytorch_model.bin")), ["could not be read"]),
    "no config": (lambda folder: (folder / "config.json").unlink(), ["holds no config.json"]),
    "config cut": (cut_short(0.5, "config.json"), ["config.json could not be read"]),
    "config of nothing": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "nonesuch"}'),
        ["config.json could not be read", "nonesuch"],
    ),
    "config without heads": (lambda folder: edited(folder, n_head=0), ["task.family='gpt2' cannot read"]),
    "config with a text for a size": (lambda folder: edited(folder, n_embd="16"), ["config.json could not be read"]),
    "pickle of something else": (
        pickled(lambda folder: torch.save([1, 2], folder / "pytorch_model.bin")),
        ["could not be read"],
    ),
    "parameter missing": (changed(lambda weights: weights.pop(QUERY)), ["lacks a parameter", QUERY]),
    "wrong shape": (
        changed(lambda weights: weights.update({QUERY: torch.zeros(16, 8)})),
        [QUERY, "(16, 8)", "(16, 48)"],
    ),
    "head for another width": (
        changed(lambda weights: weights.update({"score.weight": torch.zeros(5, 8)})),
        ["score.weight", "(5, 8)", "(3, 16)"],
    ),
    "another block": (
        changed(lambda weights: weights.update({QUERY.replace("1", "2"): torch.zeros(16, 48)})),
        ["holds a parameter", QUERY.replace("1", "2")],
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_folder_is_refused(how: str, tmp_path: Path, said: list[str]) -> None:
    row, (break_, words) = ROWS["gpt2-text"], BROKEN[how]
    checkpoint = saved(built(row), tmp_path)
    break_(tmp_path)
    with pytest.raises(ValueError, match=r"^checkpoint\.path=") as error:
        check_start(row.task, row.small, checkpoint, SEED)
    assert "\n" not in str(error.value)
    for word in [*words, repr(str(tmp_path))]:
        assert word in str(error.value)
    assert not said, "the library's own report says nothing more"


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    row = ROWS["vit"]
    checkpoint = saved(built(row), tmp_path, max_shard_size="4KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"could not be read.*{shard.name}"):
        read(row, checkpoint)


def test_a_saved_body_with_another_block_is_refused(tmp_path: Path) -> None:
    row = ROWS["vit"]
    checkpoint = saved(built(row, dataclasses.replace(row.small, depth=3)).base_model, tmp_path)
    edited(tmp_path, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"holds 16 parameters \(layers\.2\."):
        read(row, checkpoint)


@pytest.mark.parametrize("hub", [False, True])
def test_a_file_is_no_checkpoint(hub: bool, tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with pytest.raises(ValueError, match=r"^checkpoint\.path="):
        form_of("vit", Checkpoint(str(tmp_path / "model"), hub=hub))


@pytest.mark.parametrize("path", ["nowhere", "models/nowhere", "some-owner/some-model"])
def test_a_name_is_not_looked_for_unless_it_may_be_fetched(path: str) -> None:
    with pytest.raises(ValueError, match=rf"checkpoint\.path='{path}': must be a folder .* checkpoint\.hub=true"):
        form_of("vit", Checkpoint(path))


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.path='': must be a folder"):
        Checkpoint("")


# models that are refused ----------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_family_is_refused(tmp_path: Path) -> None:
    checkpoint = saved(built(ROWS["gpt2-text"]), tmp_path)
    for read_it in (lambda: read(ROWS["bert-text"], checkpoint), lambda: form_of("bert", checkpoint)):
        with pytest.raises(ValueError, match=r"checkpoint\.path=.*type 'gpt2'.*task\.family='bert'"):
            read_it()


def test_a_distilled_deit_is_another_family(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    checkpoint = saved(DeiTForImageClassification(DeiTConfig(**sizes, image_size=8, patch_size=4)), tmp_path)
    with pytest.raises(ValueError, match=r"type 'deit'.*task\.family='vit'"):
        form_of("vit", checkpoint)


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("vit", {"width": 8}, ["form.width=8", "must be 16"]),
        ("vit", {"depth": 3}, ["form.depth=3", "must be 2"]),
        ("vit", {"heads": 4}, ["form.heads=4", "must be 2"]),
        ("vit", {"head_dim": 4}, ["form.head_dim=4", "must be 8"]),
        ("vit", {"mlp": None}, ["form.mlp=None", "must be 24", "None stands for 16"]),
        ("vit", {"norm_eps": 1.01e-12}, ["form.norm_eps=1.01e-12", "must be 1e-12"]),
        ("vit", {"norm_eps": 1e-5}, ["form.norm_eps=1e-05", "must be 1e-12"]),
        ("llama-lm", {"kv_heads": None}, ["form.kv_heads=None", "must be 2", "None stands for 4"]),
        ("gpt2-lm", {"norm_eps": 1e-5}, ["form.norm_eps=1e-05", "must be 0.00048"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_a_form_that_is_not_the_checkpoints_is_refused(
    name: str, change: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    row = ROWS[name]
    checkpoint = saved(built(row), tmp_path)
    with pytest.raises(ValueError, match=r"^form\..*checkpoint\.path=") as error:
        read(row, checkpoint, dataclasses.replace(row.small, **change))
    for word in words:
        assert word in str(error.value)


def test_an_epsilon_of_the_checkpoints_own_must_be_said(tmp_path: Path) -> None:
    row = ROWS["gpt2-lm"]
    said = dataclasses.replace(row.small, norm_eps=1e-5)
    module = built(row, said)
    checkpoint = saved(module, tmp_path)
    with pytest.raises(ValueError, match=r"form\.norm_eps=None: must be 1e-05.*None stands for 0\.00048"):
        read(row, checkpoint)
    assert same(read(row, checkpoint, said), weights_of(module))


def test_a_constant_that_differs_is_refused_with_its_remedy(tmp_path: Path) -> None:
    plain = ROWS["llama-lm"]
    row = with_task(plain, settings=(("hidden_act", "gelu"), ("rope_theta", 5e5), ("tie_word_embeddings", True)))
    module = built(row)
    checkpoint = saved(module, tmp_path)
    with pytest.raises(ValueError, match=r"^checkpoint\.path=") as error:
        read(plain, checkpoint)
    for word in ("hidden_act is 'gelu', here it is 'silu'", "rope_theta is 500000.0, here it is 10000.0"):
        assert word in str(error.value)
    assert "tie_word_embeddings is True, here it is False" in str(error.value)
    remedy = str(error.value).partition("task.settings=")[2].partition(" gives")[0]
    assert dict(eval(remedy)) == dict(row.config.settings)
    assert same(read(with_task(plain, settings=eval(remedy)), checkpoint), weights_of(module))


def test_settings_that_do_not_differ_stay_in_the_remedy(tmp_path: Path) -> None:
    checkpoint = saved(built(with_task(ROWS["vit"], settings=(("qkv_bias", False),))), tmp_path)
    both = with_task(ROWS["vit"], settings=(("qkv_bias", False), ("hidden_act", "relu")))
    with pytest.raises(ValueError, match=r"task\.settings=\(\('qkv_bias', False\), \('hidden_act', 'gelu'\)\)"):
        read(both, checkpoint)


def test_settings_that_the_checkpoint_does_without_leave_the_remedy(tmp_path: Path) -> None:
    checkpoint = saved(built(ROWS["llama-lm"]), tmp_path)
    linear = with_task(ROWS["llama-lm"], settings=(("rope_type", "linear"), ("factor", 2.0)))
    with pytest.raises(
        ValueError, match=r"factor is None, here it is 2\.0.*task\.settings=\(\('rope_type', 'default'\),\)"
    ):
        read(linear, checkpoint)


def test_a_constant_that_no_model_of_ours_can_have_is_refused_as_such(tmp_path: Path) -> None:
    row = ROWS["llama-lm"]
    config = get_family("llama").config(row.small, row.task.inputs)
    config.rope_parameters = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}
    checkpoint = saved(get_family("llama").model_class(row.task.inputs)(config), tmp_path)
    with pytest.raises(ValueError, match=r"rope_type is 'yarn'.*no model of this experiment can have that.*one of"):
        read(row, checkpoint)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"patch_size": 4}, ["task.patch_size=4", "must be 2"]),
        (
            {"data": dataclasses.replace(ROWS["vit"].config.data, image_size=16)},
            ["task.data.image_size=16", "must be 8"],
        ),
        ({"data": dataclasses.replace(ROWS["vit"].config.data, channels=3)}, ["task.data.channels=3", "must be 1"]),
    ],
    ids=str,
)
def test_images_of_another_shape_are_refused(change: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    checkpoint = saved(built(ROWS["vit"]), tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint\.path=") as error:
        read(with_task(ROWS["vit"], **change), checkpoint)
    for word in words:
        assert word in str(error.value)


def test_positions_must_be_those_of_the_checkpoint(tmp_path: Path) -> None:
    row = ROWS["gpt2-lm"]
    module = built(row)
    checkpoint = saved(module, tmp_path)
    longer = with_task(row, data=pydoc(max_length=LENGTH + 1))
    with pytest.raises(ValueError, match=rf"task\.data\.max_length={LENGTH + 1}: must be at most {LENGTH}"):
        read(longer, checkpoint)
    shorter = with_task(row, data=pydoc(max_length=LENGTH - 1))
    with pytest.raises(ValueError, match=rf"n_positions is {LENGTH}, here it is {LENGTH - 1}.*'n_positions', {LENGTH}"):
        read(shorter, checkpoint)
    assert same(read(with_task(shorter, settings=(("n_positions", LENGTH),)), checkpoint), weights_of(module))


def test_rotary_positions_have_no_table_but_an_end(tmp_path: Path) -> None:
    row = ROWS["llama-lm"]
    checkpoint = saved(built(row), tmp_path)
    assert read(with_task(row, data=pydoc(max_length=LENGTH - 1)), checkpoint)
    with pytest.raises(ValueError, match=rf"task\.data\.max_length={LENGTH + 1}: must be at most {LENGTH}"):
        read(with_task(row, data=pydoc(max_length=LENGTH + 1)), checkpoint)


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    masked, plain = ROWS["bert-mlm"], ROWS["bert-text"]  # 259 tokens, and 258
    larger, smaller = saved(built(masked), tmp_path / "a"), saved(built(plain), tmp_path / "b")
    with pytest.raises(ValueError, match=r"vocab_size is 259, here it is 258.*\('vocab_size', 259\).*only padded"):
        read(plain, larger)
    with pytest.raises(ValueError, match=r"its vocabulary has 258 tokens, that of task\.data\.tokenizer 259"):
        read(masked, smaller)
    assert read(with_task(plain, settings=(("vocab_size", 259),)), larger)


# tokenizers -----------------------------------------------------------------------------------------------------------


WORDS = ["<pad>", "<mask>", "the", "cat", "sat"]


def tokenizer_of(words: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {word: id_ for id_, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", mask_token="<mask>")


def test_a_checkpoint_with_other_tokens_is_refused(tmp_path: Path) -> None:
    """Its vocabulary is as large as the task's, so no shape would tell."""
    own, other, without = tmp_path / "own", tmp_path / "other", tmp_path / "without"
    tokenizer_of(WORDS).save_pretrained(own)
    row = with_task(ROWS["gpt2-text"], data=dataclasses.replace(TEXTS, tokenizer=str(own)))
    module = built(row)
    for folder in (own, other, without):
        saved(module, folder)
    tokenizer_of([*WORDS[:3], "sat", "cat"]).save_pretrained(other)
    for folder in (own, without):
        check_start(row.task, row.small, Checkpoint(str(folder)), SEED)
    with pytest.raises(ValueError, match=r"task\.data\.tokenizer=.*'cat' is 4 there and 3 here"):
        check_start(row.task, row.small, Checkpoint(str(other)), SEED)
    (other / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"checkpoint\.path=.*its tokenizer could not be read"):
        check_start(row.task, row.small, Checkpoint(str(other)), SEED)


@pytest.mark.parametrize("name, kind", [("gpt2-text", "text"), ("gpt2-lm", "lm"), ("bert-mlm", "mlm")])
def test_bytes_are_told_from_other_tokens(name: str, kind: str, tmp_path: Path) -> None:
    row = ROWS[name]
    checkpoint = saved(built(row), tmp_path)
    byte_tokenizer(kind, LENGTH).save_pretrained(tmp_path)
    check_start(row.task, row.small, checkpoint, SEED)
    tokenizer_of(WORDS).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"task\.data\.tokenizer='bytes': must be the tokenizer that checkpoint\.path="
    ):
        check_start(row.task, row.small, checkpoint, SEED)
