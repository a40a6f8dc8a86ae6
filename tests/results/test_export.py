"""What `fedsim export` writes: a folder that plain `transformers` loads, and whose model is the participant's."""

import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, AutoTokenizer

from baselines.fedavg import FedAvg
from fedgrow_algo.dual_ligo import grown, operator_between
from fedsim.algorithm import ClientInfo
from fedsim.cli import main
from fedsim.data import text, vision
from fedsim.data.byte_tokenizer import END, MASK, PADDING, byte_characters, byte_tokenizer
from fedsim.data.config import DataConfig, Split, cifar10, digits, sst2
from fedsim.experiment import Experiment
from fedsim.learning.task import Task, TaskConfig, load_task
from fedsim.models import families
from fedsim.models.pretrained import Checkpoint
from fedsim.results import card, export
from fedsim.results.tables import load, read_table, rows_of, write_table
from fedsim.storage.checkpoint import Versions, private_of
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


pytestmark = pytest.mark.usefixtures("one_thread")

UNTIED = (("tie_word_embeddings", False),)
EXPORTED = ROWS | {
    "bert-mlm-untied": Row(TaskConfig(MASKED_TOKEN, "bert", settings=UNTIED)),
    "gpt2-lm-untied": Row(TaskConfig(NEXT_TOKEN, "gpt2", settings=UNTIED)),
    "modernbert-mlm-untied": Row(TaskConfig(MASKED_TOKEN, "modernbert", settings=UNTIED)),
}
ONE_OF_A_KIND = {"image": digits(), "text": TEXTS, "tokens": TAGS, "lm": NEXT_TOKEN, "mlm": MASKED_TOKEN}
ALWAYS = {"README.md", "config.json", "model.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
BESIDE = {"image": {"preprocessor_config.json"}, "lm": TOKENIZER | {"generation_config.json"}}
WORDS = ["good", "bad", "##ly", "[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What `transformers` warns of; it has a logger of its own, so the warnings filter does not see it."""
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    logger, ear = logging.getLogger("transformers"), Ear(logging.WARNING)
    logger.addHandler(ear)
    yield heard
    logger.removeHandler(ear)


def random_model(row: Row) -> Any:
    """A model of the row's small form in which nothing is what it starts as."""
    generator = torch.Generator().manual_seed(0)
    fresh = row.task.fresh(row.small, 0)
    tree = {name: 0.4 * torch.randn(tensor.shape, generator=generator) for name, tensor in fresh.items()}
    return row.task.module(row.small, tree)


def written(config: TaskConfig, to: Path, readme: str = "") -> Any:
    """Write a random model for some data; the model."""
    model = random_model(Row(config))
    export.write(model, config.data, readme, to)
    return model


def loaded(config: TaskConfig, folder: Path) -> Any:
    return getattr(transformers, card.AUTO_CLASSES[config.data.kind]).from_pretrained(folder)


def task_of(data: DataConfig) -> TaskConfig:
    """Data with a family that has a model for them."""
    return TaskConfig(data, {"image": "vit", "lm": "gpt2"}.get(data.kind, "bert"))


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


# the "bytes" tokenizer ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def byte_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One for each kind of text, as a user loads it."""
    folder, tokenizers = tmp_path_factory.mktemp("bytes"), {}
    for kind in ("text", "tokens", "lm", "mlm"):
        byte_tokenizer(kind, LENGTH).save_pretrained(folder / kind)
        tokenizers[kind] = AutoTokenizer.from_pretrained(folder / kind)
    return tokenizers


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=2 * LENGTH)  # surrogates have no UTF-8
FEW = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_bytes_are_written_as_the_library_writes_them() -> None:
    from tokenizers import pre_tokenizers

    assert sorted(byte_characters()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert byte_characters()[ord("a")] == "a" and byte_characters()[ord(" ")] == "\u0120"
    assert not {PADDING, END, MASK} & {*byte_characters()}


@given(ANY_TEXT)
@example("")
@example(END + PADDING + MASK)
@example(" \n\t\r\u0000\ufeff\u00a0 ")
@example("\U0010ffff\ue000")
@FEW
def test_tokens_are_those_that_training_saw(byte_tokenizers: dict[str, Any], some: str) -> None:
    expected = text.byte_ids(some).tolist()
    for kind, tokenizer in byte_tokenizers.items():
        if kind == "mlm" and any(sign in some for sign in (PADDING, END, MASK)):
            continue
        given_ids = tokenizer(some, verbose=False)["input_ids"]
        if kind in ("text", "tokens") and not some:
            assert given_ids == []  # the one text whose end cannot be told
            continue
        assert given_ids == expected, kind
        assert tokenizer.decode(given_ids, skip_special_tokens=True) == some


@given(st.lists(ANY_TEXT.filter(bool), min_size=1, max_size=3))
@example(["a" * LENGTH, "a" * (LENGTH - 1), "\u00e9" * LENGTH])
@FEW
def test_texts_are_cut_and_padded_as_in_training(byte_tokenizers: dict[str, Any], some: list[str]) -> None:
    expected = text.tokens(some, "bytes", LENGTH, hub=False)
    for kind in ("text", "tokens"):
        batch = byte_tokenizers[kind](some, truncation=True, padding="max_length", return_tensors="pt")
        assert {*batch} == {*expected}
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


@given(ANY_TEXT)
@FEW
def test_a_prompt_is_the_text_without_its_end(byte_tokenizers: dict[str, Any], some: str) -> None:
    assume(not any(sign in some for sign in (PADDING, END, MASK)))
    for kind in ("lm", "mlm"):
        ids = byte_tokenizers[kind](some, add_special_tokens=False, verbose=False)["input_ids"]
        assert ids == text.byte_ids(some)[:-1].tolist()
        pieces = text.pieces([some], "bytes", LENGTH)[0]["input_ids"]
        closed = torch.tensor([*ids, text.BYTE_END])
        alone = len(closed) % LENGTH == 1  # a last piece of one token, which leaves nothing to predict
        assert torch.equal(pieces[pieces != text.BYTE_PADDING], closed[: len(closed) - alone])


def test_special_tokens_have_the_ids_of_training(byte_tokenizers: dict[str, Any]) -> None:
    for kind, tokenizer in byte_tokenizers.items():
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == text.special_ids("bytes", False)
        assert tokenizer.mask_token_id == (text.mask_id("bytes", False) if kind == "mlm" else None)
        assert len(tokenizer) == task_of(ONE_OF_A_KIND[kind]).inputs.vocab_size
        assert tokenizer.model_max_length == LENGTH
    marked = byte_tokenizers["mlm"](f"a{MASK}c")["input_ids"]
    assert marked == [97, text.BYTE_MASK, 99, text.BYTE_END]


# tokenizers of checkpoints --------------------------------------------------------------------------------------------


def word_pieces(folder: Path) -> str:
    """BERT's tokenizer with few words: texts are framed, and tokens have types."""
    tokenizer = transformers.BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})
    tokenizer.save_pretrained(folder)
    assert "token_type_ids" in AutoTokenizer.from_pretrained(folder)("good")
    return str(folder)


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


def picture(mode: str, width: int, height: int) -> Image.Image:
    """Noise, every value of a byte among it."""
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    values.flat[:256] = np.arange(256)
    return Image.fromarray(values)


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


def test_grey_and_transparent_images_for_a_model_of_colour(tmp_path: Path) -> None:
    data = cifar10(image_size=8)
    written(TaskConfig(data, "vit"), tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    images = [picture("L", 16, 16), picture("RGBA", 16, 16)]
    ours = vision.pixels(images, 8, 3).float() / 127.5 - 1
    theirs = processor(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(theirs[0], ours[0])
    assert not torch.equal(theirs[1], ours[1]), "transparency is laid on white, unless the image is converted first"
    converted = processor(images[1].convert("RGB"), return_tensors="pt")["pixel_values"]
    assert torch.equal(converted[0], ours[1])


# the card -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ONE_OF_A_KIND)
def test_the_code_of_the_card_runs_where_the_card_lies(
    kind: str,
    tmp_path: Path,
    tiny_experiment: Experiment,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    said: list[str],
) -> None:
    config = task_of(ONE_OF_A_KIND[kind])
    written(config, tmp_path)
    picture("RGB", 30, 20).save(tmp_path / "image.png")
    answers = answers_of(config, tiny_experiment, tmp_path, capsys, monkeypatch)
    if kind == "image":
        assert re.fullmatch(r"LABEL_\d", answers)
    elif kind == "text":
        assert re.fullmatch(r"\['LABEL_\d', 'LABEL_\d'\]", answers)
    elif kind == "tokens":
        assert re.fullmatch(r"\[\('Ada', 'LABEL_\d'\), \('met', 'LABEL_\d'\), \('Bob', 'LABEL_\d'\)\]", answers)
    elif kind == "lm":
        assert answers.startswith("The")
    assert not said


def test_the_code_of_the_card_finds_words_in_word_pieces(
    tmp_path: Path, tiny_experiment: Experiment, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataclasses.replace(TAGS, tokenizer=word_pieces(tmp_path / "words"), max_length=4)
    config = task_of(data)
    written(config, tmp_path)
    answers = answers_of(config, tiny_experiment, tmp_path, capsys, monkeypatch)
    assert re.fullmatch(r"\[\('Ada', 'LABEL_\d'\), \('met', 'LABEL_\d'\)\]", answers), "the third word was cut off"


def answers_of(
    config: TaskConfig,
    experiment: Experiment,
    folder: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """What the card's code prints when it runs in the folder."""
    readme = card.card(told(dataclasses.replace(experiment, algorithm=FedAvg(), task=config)))
    code = readme.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    return capsys.readouterr().out.strip()


def told(experiment: Experiment, **changes: Any) -> card.Deployed:
    """What there is to tell of a model, made up."""
    row = {name: None for name in card.SCORES} | {"round": 0, "num_test_examples": 40}
    row |= {"bytes_up": 0, "bytes_down": 0, "upload_params": None}
    trained = {"round": 1, "bytes_up": 8_000, "bytes_down": 12_000, "upload_params": 2_000}
    scored = {"round": 2, "accuracy": 0.5, "loss": 1.25, "precision": 0.25, "recall": 0.75, "f1": 0.375}
    made_up = {
        "experiment": experiment,
        "form": experiment.target,
        "info": ClientInfo(1, "phone", experiment.tiers[0].form, 1234),
        "round": experiment.rounds,
        "run": {"versions": '{"torch": "2.0"}', "code_sha256": "abc", "git_commit": None},
        "clients": [row | {"accuracy": 0.1}, row | trained, row | scored],
        "received": {"width.embed": torch.zeros(20, 10), "depth.norm": torch.zeros(3, 2)},
        "private": {"middle.classifier.bias": torch.zeros(7)},
    }
    return card.Deployed(**made_up | changes)


def front_matter(readme: str) -> dict[str, Any]:
    assert readme.startswith("---\n")
    return yaml.safe_load(readme.split("---\n")[1])


def test_the_front_matter_is_what_model_cards_have(tiny_experiment: Experiment) -> None:
    assert front_matter(card.card(told(tiny_experiment))) == {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["federated-learning", "model-growth", "fedgrow"],
    }
    known = dataclasses.replace(tiny_experiment, algorithm=FedAvg(), task=TaskConfig(sst2(), "bert"))
    checkpoint = Checkpoint("someone/small: 'bert'", hub=True)
    info = ClientInfo(0, "phone", tiny_experiment.tiers[0].form, 5, checkpoint)
    assert front_matter(card.card(told(known, info=info))) == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["federated-learning", "fedavg"],
        "datasets": ["stanfordnlp/sst2"],
        "base_model": "someone/small: 'bert'",
    }


def test_the_card_tells_how_the_model_was_grown(tiny_experiment: Experiment) -> None:
    readme = card.card(told(tiny_experiment))
    for expected in (
        "vit 20x3, fedgrow, participant 1",
        "Method: `fedgrow`, preset `paper`.",
        "Small model: 8x1 (width x depth; 4 heads of 2, feed-forward width 8); trained on the participant's own data",
        "Intermediate form: 16x2",
        "This model: 20x3 (width x depth; 4 heads of 5, feed-forward width 20), after round 2 of 2, seed 0.",
        "Rounds: 0 local, 1 to 2 federated.",
        "Federation: 3 participants, 3 in each round.",
        "`digits`, dealt to the participants by `dirichlet, alpha 0.5`",
        "sent at most 2,000 parameters (0.008 MB) in a round, and received at most 0.012 MB",
        "206 parameters (0.001 MB): `depth`, `width`",
        "7 parameters (0.000 MB): `middle`",
        "1,234 training examples",
        "After round 2; accuracies are shares of examples. The test set holds 40 examples.",
        "| accuracy | 0.5000 |",
        "| loss | 1.2500 |",
        "| precision | 0.2500 |",
        "| f1 | 0.3750 |",
        "research simulation",
        f"Run `{tiny_experiment.run_id}`, sources `abc`.",
        "torch 2.0",
    ):
        assert expected in readme, expected
    assert "accuracy_val |" not in readme, "a score that is not known has no row"
    settings_told = readme.split("```json\n")[1].split("```")[0]
    assert json.loads(settings_told) == json.loads(tiny_experiment.canonical_json())
    assert "http" not in readme


def test_the_card_tells_where_a_small_model_came_from(tiny_experiment: Experiment) -> None:
    checkpoint = Checkpoint("someone/small", hub=True, revision="v2")
    info = ClientInfo(1, "phone", tiny_experiment.tiers[0].form, 5, checkpoint)
    readme = card.card(told(tiny_experiment, info=info, clients=[], received={}))
    assert "from the checkpoint `someone/small` at revision `v2`" in readme
    assert "sent nothing" in readme and "the server sends, after the last round, nothing." in readme
    assert "never scored" in readme


def test_the_card_of_a_model_that_was_not_grown_says_so(tiny_experiment: Experiment) -> None:
    readme = card.card(told(dataclasses.replace(tiny_experiment, algorithm=FedAvg())))
    assert "no small model was grown" in readme
    assert "Intermediate form" not in readme and "preset" not in readme.partition("```json")[0]


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
