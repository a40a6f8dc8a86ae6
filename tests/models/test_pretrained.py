"""Checkpoints in: what is read is what was saved, and what does not fit is refused before anything starts."""

import dataclasses
import json
import logging
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import DeiTConfig, DeiTForImageClassification, PreTrainedTokenizerFast

import fedsim
from baselines.fedavg import FedAvg
from fedgrow_algo.pretrain import trained_on_own_shard
from fedsim.algorithm import ClientContext, ClientInfo
from fedsim.cli import main
from fedsim.core.seeding import derive
from fedsim.core.tree import Tree
from fedsim.data.byte_tokenizer import byte_tokenizer
from fedsim.data.config import pydoc
from fedsim.engine.cohort import check_checkpoints, federation_sha256, members, tiers_of
from fedsim.engine.cost import cost_of
from fedsim.experiment import Experiment, from_pretrained, revived, with_settings
from fedsim.learning.meter import Meter, StepCost
from fedsim.learning.starts import check_start, load_small
from fedsim.learning.steps import run_client
from fedsim.learning.task import load_task, subset
from fedsim.models import Form, get_family
from fedsim.models.pretrained import Checkpoint, form_of
from tests.support.family_rows import LENGTH, ROWS, TEXTS, Row, batch_of, model_inputs, real


pytestmark = pytest.mark.usefixtures("one_thread")

SEED = 5  # of the experiment that reads a checkpoint


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Note every attempt to reach the network: the library swallows what it meets there, so raising is not enough."""
    attempts: list[Any] = []

    def refuse_to(*address: Any, **_: Any) -> None:
        attempts.append(address)
        raise OSError("tests touch no network")

    for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, refuse_to)
    yield
    assert not attempts


def built(row: Row, form: Form | None = None, seed: int = 1) -> Any:
    """A Hugging Face model of a row whose every parameter is drawn: none has the value it would be initialised with."""
    module = get_family(row.config.family).build(form or row.small, row.task.inputs)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return module.eval()


def saved(module: Any, folder: Path, **settings: Any) -> Checkpoint:
    module.save_pretrained(folder, **settings)
    return Checkpoint(str(folder))


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def read(row: Row, checkpoint: Checkpoint, form: Form | None = None, seed: int = SEED) -> dict[str, Tensor]:
    return load_small(row.task, form or row.small, checkpoint, seed)


def edited(folder: Path, **fields: Any) -> None:
    """Change fields of a saved config."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def with_task(row: Row, **changes: Any) -> Row:
    return dataclasses.replace(row, config=dataclasses.replace(row.config, **changes))


# what is read ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_a_checkpoint_computes_what_its_model_does(name: str, tmp_path: Path) -> None:
    row, module = ROWS[name], built(ROWS[name])
    tree = read(row, saved(module, tmp_path))
    assert same(tree, parameters(module))
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
    rounded = {key: tensor.to(precision).float() for key, tensor in parameters(module).items()}
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
    assert same(read(row, checkpoint), parameters(module))


def test_constants_that_older_versions_saved_are_passed_over(tmp_path: Path) -> None:
    row = ROWS["gpt2-lm"]
    module = built(row)
    checkpoint = saved(module, tmp_path)
    more = {f"transformer.h.0.attn.{name}": torch.ones(1, 1, 4, 4) for name in ("bias", "masked_bias")}
    save_file(load_file(tmp_path / "model.safetensors") | more, tmp_path / "model.safetensors", {"format": "pt"})
    assert same(read(row, checkpoint), parameters(module))


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
    assert same(read(row, checkpoint), parameters(other)), "a folder that has changed is read again"


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
    held = {name.removeprefix(f"{module.base_model_prefix}."): tensor for name, tensor in parameters(module).items()}
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
    tree, held = read(fewer, checkpoint), parameters(module)
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


@pytest.fixture
def tables() -> Iterator[list[str]]:
    """What the library logs, above all its reports of weights that were not as expected."""
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    yield logged
    logging.getLogger("transformers").removeHandler(handler)


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_folder_is_refused(how: str, tmp_path: Path, tables: list[str]) -> None:
    row, (break_, words) = ROWS["gpt2-text"], BROKEN[how]
    checkpoint = saved(built(row), tmp_path)
    break_(tmp_path)
    with pytest.raises(ValueError, match=r"^checkpoint\.path=") as error:
        check_start(row.task, row.small, checkpoint, SEED)
    assert "\n" not in str(error.value)
    for word in [*words, repr(str(tmp_path))]:
        assert word in str(error.value)
    assert not tables, "the library's own report says nothing more"


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
    assert same(read(row, checkpoint, said), parameters(module))


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
    assert same(read(with_task(plain, settings=eval(remedy)), checkpoint), parameters(module))


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
    assert same(read(with_task(shorter, settings=(("n_positions", LENGTH),)), checkpoint), parameters(module))


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


# in experiments -------------------------------------------------------------------------------------------------------


@pytest.fixture
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training steps are not counted, which takes seconds."""
    monkeypatch.setattr(StepCost, "measured", staticmethod(lambda *_: StepCost((0, 0), (0, 0))))


def checkpoint_of(experiment: Experiment, tier: int, folder: Path, seed: int = 1) -> Checkpoint:
    return saved(built(Row(experiment.task), experiment.tiers[tier].form, seed), folder)


def with_checkpoints(experiment: Experiment, checkpoints: Mapping[int, Checkpoint | None]) -> Experiment:
    tiers = tuple(
        dataclasses.replace(tier, checkpoint=checkpoints.get(number)) for number, tier in enumerate(experiment.tiers)
    )
    return dataclasses.replace(experiment, tiers=tiers)


@pytest.mark.parametrize("name", ["vit", "bert-tokens", "gpt2-lm", "llama-lm"])
def test_a_tier_from_a_checkpoint_has_its_form(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    form = dataclasses.replace(row.small, norm_eps=1e-3)
    checkpoint = saved(built(row, form), tmp_path)
    tier = from_pretrained("phone", row.config.family, checkpoint.path, share=2.0)
    assert (tier.name, tier.share, tier.checkpoint) == ("phone", 2.0, checkpoint)
    assert (tier.form.axes, tier.form.depth, tier.form.norm_eps) == (form.axes, form.depth, 1e-3)
    assert read(row, checkpoint, tier.form)
    with pytest.raises(ValueError, match=r"tier 'phone': checkpoint\.path='nowhere'"):
        from_pretrained("phone", row.config.family, "nowhere")


def test_a_checkpoint_is_part_of_an_experiment(tiny_experiment: Experiment) -> None:
    experiment = with_settings(tiny_experiment, ["tiers.1.checkpoint.path=models/a", "tiers.1.checkpoint.revision=b"])
    assert [tier.checkpoint for tier in experiment.tiers] == [None, Checkpoint("models/a", revision="b"), None]
    assert experiment.run_id != tiny_experiment.run_id
    assert revived(json.loads(experiment.canonical_json())).run_id == experiment.run_id
    moved = with_settings(experiment, ["tiers.1.checkpoint.hub=true"])
    assert moved.tiers[1].checkpoint == Checkpoint("models/a", hub=True, revision="b")
    assert with_settings(experiment, ["tiers.1.checkpoint=none"]) == tiny_experiment


@pytest.mark.parametrize(
    "setting, words",
    [
        ("tiers.1.checkpoint=models/a", ["tiers.1.checkpoint='models/a'", "set its fields instead", "checkpoint.path"]),
        ("tiers.1.checkpoint.hub=true", ["tiers.1.checkpoint", "tiers.1.checkpoint.path must be given"]),
        ("tiers.1.checkpoint.pth=a", ["tiers.1.checkpoint.pth", "did you mean path"]),
        ("tiers.1.checkpoint.path=3", ["checkpoint.path=3", "a text"]),
        ("tiers.1.form=none", ["tiers.1.form=None", "set its fields instead"]),
    ],
)
def test_checkpoints_that_cannot_be_set(setting: str, words: list[str], tiny_experiment: Experiment) -> None:
    with pytest.raises(ValueError) as error:
        with_settings(tiny_experiment, [setting])
    for word in words:
        assert word in str(error.value)


def test_the_federation_is_what_checkpoints_hold(tiny_experiment: Experiment, tmp_path: Path) -> None:
    task = load_task(tiny_experiment.task, None)
    one = checkpoint_of(tiny_experiment, 0, tmp_path / "one")
    shutil.copytree(one.path, tmp_path / "copy")
    two = checkpoint_of(tiny_experiment, 0, tmp_path / "two", seed=2)
    variants = [with_checkpoints(tiny_experiment, {0: c}) for c in (None, one, Checkpoint(str(tmp_path / "copy")), two)]
    nothing, first, copied, second = (federation_sha256(variant, members(variant, task)) for variant in variants)
    assert first == copied
    assert len({nothing, first, second}) == 3


def test_participants_know_their_tiers_checkpoint(tiny_experiment: Experiment) -> None:
    experiment = with_checkpoints(tiny_experiment, {2: Checkpoint("models/a")})
    for member in members(experiment, load_task(experiment.task, None)):
        assert member.info.checkpoint == (Checkpoint("models/a") if member.tier == experiment.tiers[2] else None)


def context(experiment: Experiment, checkpoint: Checkpoint | None) -> ClientContext:
    task = load_task(experiment.task, None)
    member = members(experiment, task)[0]
    assert task.dataset is not None
    return ClientContext(
        seed=experiment.seed,
        round=0,
        task=task,
        intermediate=experiment.intermediate,
        target=experiment.target,
        info=ClientInfo(0, "phone", experiment.tiers[0].form, len(member.train), checkpoint),
        train=subset(task.dataset.train, member.train),
        device=torch.device("cpu"),
        meter=Meter({}),
    )


def own_model(ctx: ClientContext, **settings: Any) -> Tree:
    return run_client(ctx, trained_on_own_shard(ctx, **settings))


@pytest.mark.usefixtures("uncounted")
def test_training_on_the_own_shard_starts_from_the_checkpoint(tiny_experiment: Experiment, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tiny_experiment, 0, tmp_path)
    settings: dict[str, Any] = {"batch_size": 16, "weight_decay": 0.0, "clip": None}
    ctx = context(tiny_experiment, checkpoint)
    held = load_small(ctx.task, ctx.info.form, checkpoint, ctx.seed)
    before = {name: tensor.clone() for name, tensor in held.items()}

    as_it_is = own_model(ctx, lr=1e-2, epochs=0, **settings)
    assert all(as_it_is[name] is held[name] for name in held), "held once a process, not once a participant"
    assert ctx.meter.work == []

    unmoved = own_model(ctx, lr=0.0, epochs=1, **settings)
    assert same(unmoved, dict(sorted(before.items())))
    trained = own_model(ctx, lr=1e-4, epochs=1, **settings)
    from_scratch = own_model(context(tiny_experiment, None), lr=1e-4, epochs=1, **settings)
    distances = [max(float((tree[n] - before[n]).abs().max()) for n in before) for tree in (trained, from_scratch)]
    assert 0 < distances[0] < 1e-2 < 0.1 < distances[1]
    assert same(held, before)


@pytest.mark.usefixtures("uncounted")
def test_tiers_start_from_checkpoints_of_their_own(
    tiny_experiment: Experiment, tiny_settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Two tiers from checkpoints of different forms, one that trains its own; all of it from the command line."""
    folders = {number: checkpoint_of(tiny_experiment, number, tmp_path / f"tier {number}") for number in (0, 2)}
    words = [*tiny_settings, "algorithm.preset=preserving", "algorithm.small_epochs=0", "algorithm.local_epochs=0"]
    words += [f"tiers.{number}.checkpoint.path={checkpoint.path}" for number, checkpoint in folders.items()]
    out = tmp_path / "out"
    assert main(["run", "benchmarks.suites:tiny", "--runtime", "inline", "--out", str(out), "--set", *words]) == 0

    results = fedsim.load(out)
    assert results.runs.status.tolist() == ["finished"]
    first = results.clients[results.clients["round"] == 0].set_index("client")
    task = load_task(tiny_experiment.task, None)
    assert task.dataset is not None
    for client, tier in enumerate(tiers_of(tiny_experiment)):
        number = tiny_experiment.tiers.index(tier)
        if number in folders:
            tree = load_small(task, tier.form, folders[number], tiny_experiment.seed)
        else:
            tree = task.fresh(tier.form, derive(tiny_experiment.seed, "small", client=client))
        expected = task.score(task.module(tier.form, tree), task.dataset.test)
        assert first.loss[client] == pytest.approx(expected.loss, rel=1e-3), "growth kept what the small model computes"
    assert first.loss.nunique() == 3


@pytest.mark.usefixtures("uncounted")
def test_a_checkpoint_as_it_is_costs_no_training(tiny_experiment: Experiment, tmp_path: Path) -> None:
    as_it_is = with_settings(tiny_experiment, ["algorithm.small_epochs=0"])
    experiment = with_checkpoints(as_it_is, {1: checkpoint_of(as_it_is, 1, tmp_path)})
    costs = cost_of(experiment, {}).participants
    assert ["pretrain" in cost.flops_per_step for cost in costs] == [True, False, True]


def test_vocabularies_that_differ_between_participants_are_refused(tmp_path: Path) -> None:
    row = ROWS["gpt2-lm"]
    padded = built(with_task(row, settings=(("vocab_size", 300),)))
    tiers = (
        from_pretrained("a", "gpt2", saved(built(row), tmp_path / "a").path),
        from_pretrained("b", "gpt2", saved(padded, tmp_path / "b").path),
    )
    experiment = Experiment(FedAvg(), row.config, tiers, row.wider, row.wider, participants=30)
    owners = [str(number) for number, tier in enumerate(tiers_of(experiment)) if tier.name == "b"]
    named = rf"tier 'b' \(participants {', '.join(owners[:8])}, \.\.\.: 15 in all\)"
    with pytest.raises(ValueError, match=rf"^{named}: checkpoint\.path=.*vocab_size is 300, here it is 258"):
        check_checkpoints(experiment)
    of_b = dataclasses.replace(experiment, task=dataclasses.replace(row.config, settings=(("vocab_size", 300),)))
    with pytest.raises(ValueError, match=r"^tier 'a' .*vocab_size is 258, here it is 300"):
        check_checkpoints(of_b)


@pytest.mark.parametrize("command", ["run", "inspect"])
def test_the_command_line_names_participants_and_field(
    command: str, tiny_experiment: Experiment, tiny_settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = checkpoint_of(tiny_experiment, 0, tmp_path / "small")
    more = ["--runtime", "inline", "--out", str(tmp_path / "out")] if command == "run" else []
    words = [*tiny_settings, "participants=5", f"tiers.2.checkpoint.path={checkpoint.path}"]
    assert main([command, "benchmarks.suites:tiny", *more, "--set", *words]) == 2
    tier = tiny_experiment.tiers[2]
    experiment = with_settings(tiny_experiment, ["participants=5"])
    owners = ", ".join(str(number) for number, owned in enumerate(tiers_of(experiment)) if owned == tier)
    message = capsys.readouterr().err
    assert f"error: tier {tier.name!r} (participants {owners}): form.width=12: must be 8, as in" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings, words",
    [
        (["tiers.2.form.kv_heads=2"], "form.kv_heads=2: must be form.heads=4"),
        (["tiers.2.form.heads=2", "algorithm.preset=preserving"], "growing 12x2 into 16x2"),
    ],
)
def test_a_tier_whose_form_does_not_fit_is_named(settings: list[str], words: str, tiny_experiment: Experiment) -> None:
    with pytest.raises(ValueError, match=f"^tier 'laptop': {words}"):
        with_settings(tiny_experiment, settings)


def test_forms_that_do_not_fit_each_other_are_no_tiers_fault(tiny_experiment: Experiment) -> None:
    with pytest.raises(ValueError, match=r"^growing 16x2 into 20x3"):
        with_settings(tiny_experiment, ["algorithm.preset=preserving", "intermediate.heads=2", "target.heads=5"])
