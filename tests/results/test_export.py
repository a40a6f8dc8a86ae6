"""What `fedsim export` writes: a folder that plain `transformers` loads, and whose model is the participant's."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoImageProcessor, AutoModelForImageClassification, AutoTokenizer

from fedgrow_algo.dual_ligo import grown, operator_between
from fedsim.cli import main
from fedsim.data import text, vision
from fedsim.data.byte_tokenizer import byte_characters
from fedsim.data.config import DataConfig, cifar10, digits
from fedsim.data.dataset import Split
from fedsim.experiment import Experiment
from fedsim.learning.task import Task, TaskConfig, load_task
from fedsim.models import families
from fedsim.results import card, export
from fedsim.results.tables import load, read_table, rows_of, write_table
from fedsim.storage.checkpoint import Versions, private_of
from tests.support.exported import picture, random_model, task_of, word_pieces, written
from tests.support.family_rows import (
    LENGTH,
    MASKED_TOKEN,
    NEXT_TOKEN,
    ROWS,
    TAGS,
    TEXTS,
    TIED,
    Row,
    examples,
    model_inputs,
)
from tests.support.manifests import rewrite


pytestmark = pytest.mark.usefixtures("one_thread")

UNTIED = (("tie_word_embeddings", False),)
EXPORTED = ROWS | {
    "bert-mlm-untied": Row(TaskConfig(MASKED_TOKEN, "bert", settings=UNTIED)),
    "gpt2-lm-untied": Row(TaskConfig(NEXT_TOKEN, "gpt2", settings=UNTIED)),
    "modernbert-mlm-untied": Row(TaskConfig(MASKED_TOKEN, "modernbert", settings=UNTIED)),
}
ALWAYS = {"README.md", "config.json", "model.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
BESIDE = {"image": {"preprocessor_config.json"}, "lm": TOKENIZER | {"generation_config.json"}}


def loaded(config: TaskConfig, folder: Path) -> Any:
    return getattr(transformers, card.AUTO_CLASSES[config.data.kind]).from_pretrained(folder)


# the model ------------------------------------------------------------------------------------------------------------


def test_every_family_is_exported() -> None:
    assert {*families()} <= {row.config.family for row in EXPORTED.values()}
    assert {row.config.data.kind for row in EXPORTED.values()} == {*card.AUTO_CLASSES} == {*card.PIPELINES}


@pytest.mark.parametrize("name", EXPORTED)
def test_plain_transformers_loads_the_same_model(name: str, tmp_path: Path, said: list[str]) -> None:
    row = EXPORTED[name]
    model, kind = random_model(row), row.config.data.kind
    export.write(model, row.config.data, "", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == ALWAYS | BESIDE.get(kind, TOKENIZER)

    again = loaded(row.config, tmp_path)
    assert type(again) is type(model)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(model).__name__]
    assert {tensor.dtype for tensor in again.parameters()} == {torch.float32}
    split = examples(row.task)
    inputs = model_inputs(row.task.batch(split, torch.arange(len(split)), generator=torch.Generator()))
    with torch.no_grad():
        before, after = model(**inputs).logits, again(**inputs).logits
    assert before.std() > 0.1  # a model that says nothing would prove nothing
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    assert not said


@pytest.mark.parametrize("name", [name for name in EXPORTED if "untied" in name or (name in TIED and TIED[name].head)])
def test_tied_heads_stay_tied_and_others_apart(name: str, tmp_path: Path) -> None:
    row = EXPORTED[name]
    export.write(random_model(row), row.config.data, "", tmp_path)
    again = loaded(row.config, tmp_path)
    tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert tied == (row.config.settings != UNTIED)


@pytest.mark.parametrize("name", [name for name, row in EXPORTED.items() if row.config.data.kind == "lm"])
def test_language_models_generate_from_their_cache(name: str, tmp_path: Path, said: list[str]) -> None:
    row = EXPORTED[name]
    model = random_model(row)
    assert not model.config.use_cache  # as it was trained
    export.write(model, row.config.data, "", tmp_path)
    again, tokenizer = loaded(row.config, tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert again.config.use_cache and again.generation_config.use_cache
    prompt = tokenizer(["T", "The"], add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    cached, plain = (
        again.generate(**prompt, do_sample=False, min_length=LENGTH, max_length=LENGTH, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(cached, plain) and cached.shape == (2, LENGTH)
    assert not said


def test_classes_have_the_names_the_data_gave_them(tmp_path: Path) -> None:
    names = ("O", "B-PER", "I-PER")
    written(task_of(dataclasses.replace(TAGS, class_names=names)), tmp_path / "named")
    config: Any = transformers.AutoConfig.from_pretrained(tmp_path / "named")
    assert config.id2label == {0: "O", 1: "B-PER", 2: "I-PER"} and config.label2id["I-PER"] == 2
    assert config.problem_type is None
    written(task_of(TEXTS), tmp_path / "plain")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "plain")
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert config.problem_type == "single_label_classification"


def test_nothing_of_the_machine_is_in_the_folder(tmp_path: Path) -> None:
    data = dataclasses.replace(TEXTS, tokenizer=word_pieces(tmp_path / "words"))
    written(task_of(data), tmp_path / "model")
    for path in (tmp_path / "model").glob("*.json"):
        assert str(tmp_path) not in path.read_text(), path.name


# tokenizers of checkpoints --------------------------------------------------------------------------------------------


def byte_pairs(folder: Path) -> str:
    """GPT-2's tokenizer with one word, another one after a space; the end stands in for padding."""
    vocabulary = {character: number for number, character in enumerate(byte_characters())}
    vocabulary |= {"\u0120a": 256, "<|endoftext|>": 257}
    merges: Any = [("\u0120", "a")]  # pairs, as the library reads them; its annotation says texts
    transformers.GPT2Tokenizer(vocab=vocabulary, merges=merges).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("made", [word_pieces, byte_pairs])
def test_a_tokenizer_of_a_checkpoint_goes_with_the_model(made: Any, tmp_path: Path) -> None:
    data = dataclasses.replace(TEXTS, tokenizer=made(tmp_path / "given"), max_length=5)
    some = ["good badly", "good bad good bad good bad", "a", " a a"]
    for family in ("bert", "gpt2"):
        written(TaskConfig(data, family), tmp_path / family)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / family)
        batch = tokenizer(some, truncation=True, padding="max_length", return_tensors="pt")
        expected = text.tokens(some, data.tokenizer, 5, hub=False)
        assert {*batch} == {*expected}, "GPT-2 would add embeddings for types of tokens"
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


@pytest.mark.parametrize("made", [word_pieces, byte_pairs])
def test_a_tokenizer_for_tags_reads_lists_of_words(made: Any, tmp_path: Path) -> None:
    data = dataclasses.replace(TAGS, tokenizer=made(tmp_path / "given"), max_length=6)
    written(task_of(data), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    words = [["a", "badly", "a"], ["good"]]
    batch = tokenizer(words, is_split_into_words=True, truncation=True, padding="max_length", return_tensors="pt")
    expected, _ = text.word_tokens(words, data.tokenizer, 6, hub=False)
    assert made is word_pieces or expected["input_ids"][0, 0] == 256, "the first word is marked like the others"
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_a_tokenizer_that_is_gone_is_named(tmp_path: Path) -> None:
    data = dataclasses.replace(TEXTS, tokenizer=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"task\.data\.tokenizer='.*gone': no such folder"):
        export.write(random_model(Row(task_of(TEXTS))), data, "", tmp_path / "model")
    assert not (tmp_path / "model").exists()


# the image processor --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [digits(), cifar10(image_size=16)], ids=["grey", "colour"])
@pytest.mark.parametrize("size", [(16, 16), (40, 23), (8, 32)], ids=str)
def test_images_become_what_training_saw(data: DataConfig, size: tuple[int, int], tmp_path: Path) -> None:
    written(TaskConfig(data, "vit"), tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    mode = "L" if data.channels == 1 else "RGB"
    images = [picture("L", *size).convert(mode), picture("RGB", *size).convert(mode)]
    pixels = vision.pixels(images, data.image_size, data.channels)
    assert pixels.shape == (2, data.channels, data.image_size, data.image_size)
    task = Task(TaskConfig(data, "vit"))
    expected = task.batch(Split({"pixel_values": pixels}, torch.zeros(2, dtype=torch.long)), torch.arange(2))
    given_pixels = processor(images, return_tensors="pt")["pixel_values"]
    assert given_pixels.dtype == torch.float32
    assert torch.equal(given_pixels, expected["pixel_values"])


# the command ----------------------------------------------------------------------------------------------------------


def test_export_writes_the_model_that_was_scored(
    tmp_path: Path, tiny_run: Path, tiny_experiment: Experiment, capsys: pytest.CaptureFixture, said: list[str]
) -> None:
    clients = load(tiny_run).clients.query("round == 2").set_index("client")
    folder = tiny_run / "checkpoints" / tiny_experiment.run_id
    server = Versions(folder, "server").load(before=3)
    task = load_task(tiny_experiment.task, None)
    assert server is not None and task.dataset is not None
    test = task.batch(task.dataset.test, torch.arange(len(task.dataset.test)))
    operator = operator_between("paper", task, tiny_experiment.middle, tiny_experiment.target)
    answers = []
    for participant in range(3):
        to = tmp_path / str(participant)
        assert main(["export", str(tiny_run), "--participant", str(participant), "--to", str(to)]) == 0
        assert str(to) in capsys.readouterr().out
        model = AutoModelForImageClassification.from_pretrained(to)
        private = private_of(folder / "private", participant).load(before=3)
        assert private is not None
        tree = grown(operator, server[1], private[1]["middle"])
        with torch.no_grad():
            logits = model.eval()(pixel_values=test["pixel_values"]).logits
            deployed = task.forward(tiny_experiment.target, tree, test)
        torch.testing.assert_close(logits, deployed, rtol=0, atol=1e-6)
        right = (logits.argmax(-1) == test["labels"]).float().mean().item()
        assert right == pytest.approx(clients.accuracy[participant], abs=1e-6)
        assert torch.nn.functional.cross_entropy(logits, test["labels"]).item() == pytest.approx(
            clients.loss[participant], rel=1e-5
        )
        answers.append(logits)
        readme = (to / "README.md").read_text()
        assert tiny_experiment.run_id in readme and f"participant {participant}" in readme
        assert f"| accuracy | {clients.accuracy[participant]:.4f} |" in readme
        assert f"{clients.num_examples[participant]:,} training examples" in readme
        assert f"sent at most {int(clients.upload_params[participant]):,} parameters" in readme
    assert not torch.allclose(answers[0], answers[1]), "every participant has a model of its own"
    assert not said


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--participant", "3"], ["--participant=3", "from 0 to 2"]),
        (["--participant", "-1"], ["--participant=-1", "from 0 to 2"]),
        (["--participant", "0", "--run", "nothing"], ["--run='nothing'"]),
    ],
)
def test_export_of_what_is_not_there(
    words: list[str], expected: list[str], tmp_path: Path, tiny_run: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["export", str(tiny_run), "--to", str(tmp_path / "model"), *words]) == 2
    message = capsys.readouterr().err
    for word in expected:
        assert word in message
    assert not (tmp_path / "model").exists()


def test_export_of_a_run_that_failed(
    tmp_path: Path, tiny_run: Path, tiny_experiment: Experiment, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    shutil.copytree(tiny_run, out)
    (row,) = rows_of(read_table(out, "runs"), "runs")
    write_table(out, "runs", tiny_experiment.run_id, [row | {"status": "failed", "error": "participant 1: tired"}])
    assert main(["export", str(out), "--participant", "0", "--to", str(tmp_path / "model")]) == 2
    message = capsys.readouterr().err
    assert "a run that finished; this one failed (participant 1: tired): resume it first" in message
    assert not (tmp_path / "model").exists()


def test_export_from_a_folder_without_results(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["export", str(tmp_path), "--participant", "0", "--to", str(tmp_path / "model")]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_export_to_a_place_that_cannot_be_written(
    tmp_path: Path, tiny_run: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    to = tmp_path / "file" / "model"
    assert main(["export", str(tiny_run), "--participant", "0", "--to", str(to)]) == 2
    assert f"--to={str(to)!r}" in capsys.readouterr().err


def test_export_wants_to_know_which_run_of_several(
    tmp_path: Path, tiny_run: Path, tiny_experiment: Experiment, capsys: pytest.CaptureFixture
) -> None:
    out, other = tmp_path / "out", dataclasses.replace(tiny_experiment, seed=1)
    shutil.copytree(tiny_run, out)
    shutil.copytree(out / "checkpoints" / tiny_experiment.run_id, out / "checkpoints" / other.run_id)
    rewrite(out / "checkpoints" / other.run_id / "manifest.json", run_id=other.run_id, files={})
    (row,) = rows_of(read_table(out, "runs"), "runs")
    changed = {"run_id": other.run_id, "seed": 1, "config": other.canonical_json()}
    write_table(out, "runs", other.run_id, [row | changed])
    assert main(["export", str(out), "--participant", "0", "--to", str(tmp_path / "model")]) == 2
    message = capsys.readouterr().err
    assert tiny_experiment.run_id in message and other.run_id in message
    named = ["--run", other.run_id, "--participant", "0", "--to", str(tmp_path / "model")]
    assert main(["export", str(out), *named]) == 0
    readme = (tmp_path / "model" / "README.md").read_text()
    assert "after round 2 of 2, seed 1" in readme and f"Run `{other.run_id}`" in readme
